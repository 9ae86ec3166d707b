"""``loratools inspect``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from loratools.cli.options import FINITE, REF, enabling, pickles, shared
from loratools.cli.tables import show_table
from loratools.cli.text import counted, fields, listed, one_line, say_json, size, spread, warn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loratools.cli.settings import Settings
    from loratools.verbs.reports import ExtraInfo, InspectReport, ModuleInfo

__all__ = ["command", "show_inspection"]

# Title of a column -> the field of a module it shows.
_MEASURES = {
    "norm": "norm",
    "spectral norm": "spectral_norm",
    "stable rank": "stable_rank",
    "effective rank": "effective_rank",
}
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


@click.command()
@click.argument("ref", type=REF)
@click.option("--modules", is_flag=True, help="A line for each module rather than for each kind of them.")
@click.option(
    "--spectrum",
    is_flag=True,
    help="Read the factors too: norms, ranks and singular values of what they add.",
)
@click.option("--metadata", is_flag=True, help="Show the metadata stored in the file.")
@click.option(
    "--config", type=click.Path(dir_okay=False), metavar="FILE", help="The adapter_config.json to read it by."
)
@click.option("--alpha", type=FINITE, metavar="NUMBER", help="The lora_alpha, where no file says it.")
@enabling
@pickles
@shared
@click.pass_obj
def command(
    settings: Settings,
    *,
    ref: str,
    modules: bool,
    spectrum: bool,
    metadata: bool,
    config: str | None,
    alpha: float | None,
    enable_lora: tuple[bool, ...] | None,
    allow_pickle: bool,
) -> None:
    """Say what an adapter is: its format, ranks, scaling and modules.

    Reads headers only, so it takes milliseconds whatever the size, unless --spectrum asks for mathematics.
    REF is a folder or a weight file; something that is not a LoRA is named for what it is.

    \b
    Examples:
      loratools inspect my-adapter
      loratools inspect my-adapter --modules
      loratools inspect my-adapter --spectrum --modules
      loratools inspect my-adapter --json | jq .scaling
    """  # noqa: D301 - \b is click's
    import loratools as lt

    report = lt.inspect(
        ref, config=config, alpha=alpha, allow_pickle=allow_pickle, enable_lora=enable_lora, spectrum=spectrum
    )
    warn(report.warnings, settings)
    if settings.json:
        say_json(report.to_dict())
    else:
        show_inspection(report, settings, modules=modules, metadata=metadata)


def show_inspection(
    report: InspectReport, settings: Settings, *, modules: bool = False, metadata: bool = False
) -> None:
    """Print a report of ``inspect``."""
    types = ", ".join(report.dtypes)
    click.echo(click.style(one_line(report.path), bold=True))
    pairs = [
        ("format", f"{report.format} ({report.evidence})"),
        ("kind", ", ".join(report.kinds)),
        ("base model", report.base_model or "not named"),
    ]
    if report.architecture is not None:
        pairs.append(("architecture", report.architecture))
    if report.rank.max is not None:
        pairs += [
            ("rank", spread(report.rank.min, report.rank.max)),
            ("alpha", spread(report.alpha.min, report.alpha.max)),
            ("scaling", spread(report.scaling.min, report.scaling.max)),
        ]
    pairs += [
        ("parameters", f"{report.parameters:,}"),
        ("size", f"{size(report.bytes)}{f' as {types}' if types else ''}"),
        ("modules", f"{len(report.modules):,}"),
    ]
    for reason, names in _by_reason(report.extras).items():
        pairs.append(
            ("besides", f"{counted(len(names), 'tensor')}, {reason}: {listed(names, settings, most=3)}")
        )
    fields(pairs)
    if report.modules:
        click.echo()
        _show_modules(report.modules, modules, spectrum=report.spectrum)
    if metadata:
        click.echo()
        fields(report.metadata.items() if report.metadata else [("metadata", "none")])


def _by_reason(extras: Iterable[ExtraInfo]) -> dict[str, list[str]]:
    """Names of the tensors that no module claims, by why they are there."""
    found: dict[str, list[str]] = {}
    for extra in extras:
        found.setdefault(extra.reason, []).append(extra.name)
    return found


def _show_modules(modules: Iterable[ModuleInfo], each: bool, *, spectrum: bool = False) -> None:
    """A row for each module, or for all that differ only in a number of their names."""
    groups: dict[tuple[object, ...], list[ModuleInfo]] = {}
    for module in modules:
        name = module.name if each else _NUMBER.sub("*", module.name)
        shape = "x".join(map(str, module.shape)) + (
            f" x{module.experts} experts" if module.experts > 1 else ""
        )
        row = (
            name,
            module.kind,
            module.rank,
            _short(module.alpha),
            _short(module.scaling),
            shape,
            module.dtype,
        )
        groups.setdefault(row, []).append(module)
    columns = ["kind", ">rank", ">alpha", ">scaling", ">shape", "dtype"]
    if spectrum:
        columns += [f">{title}" for title in _MEASURES]
    rows = []
    for group, members in groups.items():
        measured = [_over(members, name) for name in _MEASURES.values()] if spectrum else []
        rows.append([group[0], *([] if each else [len(members)]), *group[1:], *measured])
    show_table([*(["module"] if each else ["modules", ">count"]), *columns], rows)


def _over(modules: Iterable[ModuleInfo], measure: str) -> str:
    """Least and greatest of a measure over some modules."""
    values = [value for module in modules if (value := getattr(module, measure)) is not None]
    if not values:
        return "-"
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"
