"""``loratools demo``."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli.inspect import show_inspection
from loratools.cli.merge import show_merge
from loratools.cli.options import REF, shared
from loratools.cli.text import one_line, say_json
from loratools.cli.validate import show_validation
from loratools.cli.verify import show_verification

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratools.cli.settings import Settings
    from loratools.verbs.reports import Report

__all__ = ["command"]


@click.command()
@click.argument("folder", type=REF, required=False, metavar="[DIR]")
@shared
@click.pass_obj
def command(settings: Settings, folder: str | None) -> int:
    """Show inspect, validate, merge and verify at work on a small model.

    The model and its adapter are made on the spot: nothing is downloaded, and it takes seconds. With DIR the
    files stay there to play with; without it they are removed.

    \b
    Examples:
      loratools demo
      loratools demo playground
    """  # noqa: D301 - \b is click's
    from loratools.verbs.demo import require_empty

    if folder is not None:
        require_empty(Path(folder))
    with _place(folder) as place, contextlib.chdir(place):
        steps = _run(settings, folder)
    if settings.json:
        say_json({"schema": "loratools.demo/1", "folder": folder, "steps": steps})
    elif not settings.quiet:
        _farewell(folder)
    return 0 if all(step["report"].get("ok", True) for step in steps) else 1


@contextlib.contextmanager
def _place(folder: str | None) -> Iterator[Path]:
    """Where the files go: the folder given, or one that is removed again."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="loratools-demo-") as name:
        yield Path(name)


def _run(settings: Settings, folder: str | None) -> list[dict[str, Any]]:
    """Every verb in turn, in the current folder."""
    import loratools as lt
    from loratools.verbs.demo import build_demo

    made = build_demo(Path())
    base, adapter, merged = str(made.base), str(made.adapter), str(made.merged)
    if not settings.json:
        where = "a folder that is removed afterwards" if folder is None else one_line(folder)
        click.echo(f"A small language model ({base}) and a LoRA for it ({adapter}), made in {where}.")
    steps: list[dict[str, Any]] = []

    def step(line: str) -> None:
        steps.append({"command": line})
        if not settings.json:
            click.echo(f"\n{click.style('$ ' + line, bold=True)}")

    def result(report: Report) -> None:
        steps[-1]["report"] = report.to_dict()

    step(f"loratools inspect {adapter}")
    result(inspected := lt.inspect(adapter))
    if not settings.json:
        show_inspection(inspected, settings)
    step(f"loratools validate {adapter} --base {base}")
    result(validated := lt.validate(adapter, base=base))
    if not settings.json:
        show_validation(validated, settings)
    step(f"loratools merge {base} {adapter} {merged}")
    opened = lt.load(adapter)
    result(merging := lt.merge(base, opened, merged))
    if not settings.json:
        show_merge(merging, base, [opened], (), settings)
    step(f"loratools verify {base} {adapter} {merged}")
    result(verified := lt.verify(base, opened, merged))
    if not settings.json:
        show_verification(verified, settings)
    return steps


def _farewell(folder: str | None) -> None:
    click.echo()
    if folder is None:
        click.echo("To keep the files and try these yourself: loratools demo playground")
    else:
        click.echo(f"The files are in {one_line(folder)}. Next: cd there, and run the commands above.")
