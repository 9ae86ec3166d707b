"""``loratools formats``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loratools.cli.options import shared
from loratools.cli.tables import show_table
from loratools.cli.text import say_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loratools.cli.settings import Settings

__all__ = ["command", "known_formats"]


@click.command()
@shared
@click.pass_obj
def command(settings: Settings) -> None:
    """List what this build reads, computes with, writes and recognises.

    \b
    Examples:
      loratools formats
      loratools formats --json
    """  # noqa: D301 - \b is click's
    from loratools.architectures.base import architectures
    from loratools.dtypes import DTYPES, compatible

    formats = known_formats()
    if settings.json:
        dtypes = [
            {"name": t.name, "bits": t.bits, "kind": t.kind, "compute": compatible(t)}
            for t in DTYPES.values()
        ]
        say_json(
            {
                "schema": "loratools.formats/1",
                "formats": formats,
                "architectures": list(architectures()),
                "dtypes": dtypes,
            }
        )
        return
    rows = [(f["name"], ", ".join(f["kinds"]), _uses(f), "; ".join(f["signs"])) for f in formats]
    show_table(["format", "kinds", "this build can", "known by"], rows)
    click.echo()
    computed = [t.name for t in DTYPES.values() if compatible(t)]
    copied = [t.name for t in DTYPES.values() if not compatible(t)]
    click.echo(f"architectures (--arch): {', '.join(architectures())}")
    click.echo(f"computed with: {', '.join(computed)}")
    click.echo(f"copied as stored: {', '.join(copied)}")


def known_formats() -> list[dict[str, Any]]:
    """The formats, each with its kinds of module, what gives it away, and what can be done with it."""
    from loratools.formats.recognise import only_recognised
    from loratools.formats.registry import FORMATS

    formats = [
        _format(one.name, one.kinds, one.signs, compute=one.computes, write=bool(one.writer))
        for one in FORMATS.values()
    ]
    formats.append(
        _format("safetensors", ["full model"], ["model.safetensors, or an index"], compute=True, write=True)
    )
    known = {entry["name"] for entry in formats}
    by_name: dict[str, dict[str, Any]] = {}
    for sign in only_recognised():
        if sign.format not in known:
            entry = by_name.setdefault(sign.format, _format(sign.format, [], []))
            for listed, value in ((entry["kinds"], sign.kind), (entry["signs"], sign.what)):
                if value not in listed:
                    listed.append(value)
    return [*formats, *by_name.values()]


def _format(
    name: str, kinds: Iterable[str], signs: Iterable[str], *, compute: bool = False, write: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "kinds": list(kinds),
        "signs": list(signs),
        "inspect": True,
        "compute": compute,
        "write": write,
    }


def _uses(entry: dict[str, Any]) -> str:
    return ", ".join(verb for verb in ("inspect", "compute", "write") if entry[verb])
