"""``loratools normalize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli.adapters import load_adapters
from loratools.cli.engines import ENGINE, words_of
from loratools.cli.options import REF, computing, reading, shared
from loratools.cli.outputs import resolve_out, show_dry_run, writing
from loratools.cli.progress import progress
from loratools.cli.text import counted, fields, listed, one_line, say_json, size, spread, warn

if TYPE_CHECKING:
    from loratools.cli.settings import Settings
    from loratools.verbs.normalize_report import NormalizeReport

__all__ = ["command", "show_normalization"]


@click.command()
@click.argument("ref", type=REF)
@click.argument("out", type=REF, required=False)
@click.option("--base", type=REF, help="The base model: needed for PiSSA, OLoRA and KaSA.")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rank of every module: the best approximation, or padded with zeros. The error is printed.",
)
@click.option(
    "--pad", is_flag=True, help="One rank for all modules, the largest; the others are padded with zeros."
)
@click.option(
    "--for",
    type=ENGINE,
    metavar="ENGINE",
    help="What it is to load in, such as vllm: kept to its rules, or refused by name.",
)
@reading
@writing
@computing
@shared
@click.pass_obj
def command(
    settings: Settings,
    /,
    *,
    ref: str,
    out: str | None,
    output: str | None,
    base: str | None,
    rank: int | None,
    pad: bool,
    config: str | None,
    alpha: float | None,
    enable_lora: tuple[bool, ...] | None,
    blockwise_experts: bool,
    allow_pickle: bool,
    dtype: str | None,
    to: str | None,
    force: bool,
    dry_run: bool,
    no_sync: bool,
    jobs: int | None,
    executor: str,
    device: str,
    max_memory: int | None,
    **named: Any,  # "for", a word that Python keeps to itself
) -> int:
    """Write the same update as a plain adapter that every loader reads the same way.

    Scalings go into the factors, patterns are resolved, names are mended, LoHa, LoKr, AdaLoRA and BD-LoRA become
    plain LoRA, and with --base so do PiSSA, OLoRA and KaSA. The update before and after is compared in float64.
    With --for the result is also what that engine loads and computes right: `validate --for` finds no fault in it.

    \b
    Examples:
      loratools normalize my-adapter plain
      loratools normalize my-pissa-adapter plain --base my-model
      loratools normalize my-adapter plain --rank 16
      loratools normalize my-adapter for-sglang --for sglang
    """  # noqa: D301 - \b is click's
    place = resolve_out(out, output, "loratools normalize REF OUT")
    from loratools.models import open_base
    from loratools.publishing import require_place
    from loratools.verbs.normalize import normalize
    from loratools.verbs.saving import describe_save, input_paths

    [adapter] = load_adapters(
        [ref], config, alpha, allow_pickle=allow_pickle, blockwise_experts=blockwise_experts,
        enable_lora=enable_lora,
    )  # fmt: skip
    inputs = [] if base is None else [Path(base)]
    require_place(Path(place), [*input_paths(adapter), *inputs], force=force)
    total = sum(tensor.spec.nbytes for tensor in adapter.tensors)
    with progress("Normalising", total, settings) as on_step:
        report = normalize(
            adapter, None if dry_run else place, base=base, rank=rank, pad=pad, engine=named["for"], dtype=dtype, to=to,
            jobs=jobs, executor=executor, device=device, max_memory=max_memory, force=force, sync=not no_sync,
            on_step=on_step,
        )  # fmt: skip
    if dry_run:
        plan = describe_save(
            report.adapter,
            place,
            verb="normalize",
            reads=[adapter, *inputs],
            format=to,
            dtype=dtype,
            force=force,
            base_config=None if base is None else open_base(base).config,
        )
        show_dry_run({**plan, "warnings": list(report.warnings)}, settings)
        return 0
    warn(report.warnings, settings)
    if settings.json:
        say_json(report.to_dict())
    elif not settings.quiet:
        show_normalization(report, settings)
    return 0


def show_normalization(report: NormalizeReport, settings: Settings) -> None:
    """Print a report of ``normalize``."""
    done = click.style("Normalised", fg="green", bold=True)
    click.echo(f"{done} {one_line(Path(report.path).name)}: {one_line(report.output)}")
    before, after = (spread(r.min, r.max) for r in (report.rank_before, report.rank))
    kinds = sorted({module.was for module in report.modules})
    pairs = [
        ("modules", f"{counted(len(report.modules), 'module')}, {', '.join(kinds) or 'none'} before"),
        ("rank", after if before == after else f"{before} before, {after} now"),
        ("difference", "none: every bit is the same" if report.exact else f"{report.relative:.2e} relative"),
        ("type", report.dtype),
        ("weights", f"{size(report.bytes_before)} before, {size(report.bytes)} now"),
    ]
    if report.dropped:
        pairs.append(("dropped", f"zero: {listed(report.dropped, settings)}"))
    if report.dropped_tensors:
        pairs.append(("dropped", f"of use in training only: {listed(report.dropped_tensors, settings)}"))
    if report.renamed:
        mended = [f"{old} to {new}" for old, new in report.renamed.items()]
        pairs.append(("renamed", listed(mended, settings, most=2)))
    changes = [f"{c.field} {_short(c.before)} to {_short(c.after)}" for c in report.config]
    if changes:
        pairs.append(("config", listed(changes, settings, most=len(changes))))
    if report.engine is not None:
        pairs.append((report.engine.name, words_of(report.engine)))
    fields(pairs)


def _short(value: Any) -> str:
    """A field's value, or how much of it there is."""
    if isinstance(value, dict) and value:
        return counted(len(value), "entry", "entries")
    if isinstance(value, list) and len(value) > 4:
        return counted(len(value), "name")
    return "nothing" if value is None or value == {} else str(value)
