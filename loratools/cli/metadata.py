"""``loratools metadata``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools.cli.doorway import Misuse
from loratools.cli.options import REF, shared
from loratools.cli.tables import show_table
from loratools.cli.text import counted, fields, one_line, say_json, size, warn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratools.cli.settings import Settings
    from loratools.verbs.metadata_report import MetadataChange, MetadataReport

__all__ = ["command", "show_metadata"]

_LINES = 8  # of a value that is JSON, without --verbose
_WIDTH = 100  # characters of any line of a value, without --verbose
_ROWS = 20  # changes listed without --verbose
_DONE = {"set": "set", "unset": "removed", "strip": "removed", "rehash": "corrected"}


@click.command()
@click.argument("ref", type=REF)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set a key. Can be repeated.")
@click.option(
    "--unset",
    multiple=True,
    metavar="KEY",
    help="Remove a key, or all that a pattern such as 'ss_*' matches.",
)
@click.option(
    "--strip-private",
    is_flag=True,
    help="Remove what tells about the author's machine and data: folders, captions, prompts, paths.",
)
@click.option("--rehash", is_flag=True, help="Correct the hashes the file states of itself.")
@click.option(
    "-o",
    "--output",
    type=REF,
    metavar="OUT",
    help="Write a copy: a folder, or a file ending in .safetensors.",
)
@click.option("--force", is_flag=True, help="Replace OUT, if loratools made it.")
@click.option("--dry-run", is_flag=True, help="Say what would be changed and written, and touch nothing.")
@click.option(
    "--no-sync", is_flag=True, help="Do not wait for the disk: faster, not safe against power cuts."
)
@shared
@click.pass_obj
def command(
    settings: Settings,
    *,
    ref: str,
    assignments: tuple[str, ...],
    unset: tuple[str, ...],
    strip_private: bool,
    rehash: bool,
    output: str | None,
    force: bool,
    dry_run: bool,
    no_sync: bool,
) -> None:
    """Show or edit the metadata in a file's header, without touching its tensors.

    REF is a safetensors file, or a folder with one. Without an option for it nothing is changed, and the hashes the
    file states are compared with its bytes. An edit is in place, whole or not at all; -o writes a copy instead.

    \b
    Examples:
      loratools metadata style.safetensors
      loratools metadata style.safetensors --set modelspec.title="Ink wash" --unset ss_session_id
      loratools metadata style.safetensors --strip-private --dry-run
      loratools metadata style.safetensors --strip-private -o public.safetensors
    """  # noqa: D301 - \b is click's
    values = _assigned(assignments)
    both = [key for key in unset if key in values]
    if both:
        raise Misuse(f"{both[0]} is both set and unset", hint="one of the two is enough")
    if force and output is None:
        raise Misuse("--force is for OUT, and there is none", hint="an edit in place needs no --force")
    import loratools as lt

    report = lt.edit_metadata(
        ref, set=values, unset=unset, strip_private=strip_private, rehash=rehash, out=output, force=force,
        dry_run=dry_run, sync=not no_sync,
    )  # fmt: skip
    warn(report.warnings, settings)
    if settings.json:
        say_json(report.to_dict())
    elif values or unset or strip_private or rehash or output is not None:
        if not settings.quiet:
            _show_edit(report, settings)
    else:
        show_metadata(report, settings)


def _assigned(assignments: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` taken apart at the first equals sign.

    Raises:
        Misuse: one has no key or no equals sign, or a key stands twice.
    """
    values: dict[str, str] = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key:
            raise Misuse(f"--set {assignment} is not KEY=VALUE", hint="--set modelspec.title='Ink wash'")
        if key in values:
            raise Misuse(f"--set gives {key} twice", hint="once is enough")
        values[key] = value
    return values


def show_metadata(report: MetadataReport, settings: Settings) -> None:
    """Print the metadata themselves, with JSON values laid out."""
    click.echo(click.style(one_line(report.file), bold=True))
    if not report.metadata:
        click.echo("  no metadata")
    plain = {key: value for key, value in report.metadata.items() if _nested(value) is None}
    fields((key, _cut(one_line(value), settings)) for key, value in plain.items())
    for key, value in report.metadata.items():
        if key not in plain:
            _show_nested(key, value, settings)
    for check in report.hashes:
        if check.fits:
            click.echo(f"  {one_line(check.key)} fits the data")


def _nested(value: str) -> object:
    from loratools.metadata.private import nested_json

    return nested_json(value)


def _show_nested(key: str, value: str, settings: Settings) -> None:
    lines = json.dumps(_nested(value), indent=2, ensure_ascii=False).splitlines()
    click.echo(f"  {click.style(one_line(key), dim=True)}")
    shown = lines if settings.verbose or len(lines) <= _LINES + 1 else lines[:_LINES]
    for line in shown:
        click.echo(f"    {_cut(one_line(line), settings)}")
    if len(shown) < len(lines):
        click.echo(f"    ... {len(lines) - len(shown):,} more lines (--verbose shows all)")


def _cut(text: str, settings: Settings) -> str:
    if settings.verbose or len(text) <= _WIDTH + 20:
        return text
    return f"{text[:_WIDTH]}... {len(text) - _WIDTH:,} more characters"


def _show_edit(report: MetadataReport, settings: Settings) -> None:
    """Print what an edit changed, and how it was written."""
    if report.output is None:
        click.echo(f"{one_line(report.file)}: nothing to change")
        return
    verb = "Would write" if report.dry_run else "Wrote"
    how = {
        "sector": f"{counted(report.bytes_written, 'byte')} of its header, in place",
        "copy": f"{size(report.bytes_written)}, the data copied as they are",
    }[report.written]
    click.echo(f"{click.style(verb, fg='green', bold=True)} {one_line(report.output)}: {how}")
    shown = report.changes if settings.verbose else report.changes[:_ROWS]
    rows = [(change.key, _done(change), change.reason, _now(change, settings)) for change in shown]
    columns = ("key", "was", "why", "now")
    used = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    if rows:
        show_table([columns[place] for place in used], [[row[place] for place in used] for row in rows])
    if len(shown) < len(report.changes):
        click.echo(f"... and {len(report.changes) - len(shown):,} more (--verbose lists all)")
    if report.files and len(report.files) > 1:
        _show_files(report.files)


def _done(change: MetadataChange) -> str:
    return "shortened" if change.action == "strip" and change.after is not None else _DONE[change.action]


def _now(change: MetadataChange, settings: Settings) -> str:
    return "" if change.after is None else _cut(one_line(change.after), settings)


def _show_files(files: Mapping[str, int]) -> None:
    fields([("files", ", ".join(f"{Path(name).name} ({size(count)})" for name, count in files.items()))])
