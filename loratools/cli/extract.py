"""``loratools extract``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from loratools.cli.options import REF, computing, shared
from loratools.cli.outputs import resolve_out, writing
from loratools.cli.progress import progress
from loratools.cli.tables import show_table
from loratools.cli.text import counted, fields, listed, one_line, percent, say_json, size, spread, warn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loratools.cli.settings import Settings
    from loratools.verbs.extract_report import ExtractReport, RankRule

__all__ = ["command", "show_extraction"]


class Expression(click.ParamType[str]):
    """A regular expression, as text."""

    name = "expression"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See :class:`click.ParamType`."""
        try:
            re.compile(value)
        except re.error as error:
            self.fail(f"{value!r} is not a regular expression: {error}.", param, ctx)
        return str(value)


@click.command()
@click.argument("base", type=REF)
@click.argument("tuned", type=REF)
@click.argument("out", type=REF, required=False)
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank of every module.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="F",
    help="Share of the squared singular values each module keeps, such as 0.99.",
)
@click.option(
    "--error",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="F",
    help="Relative error each module, and so the whole, may have, such as 0.05.",
)
@click.option(
    "--noise-floor",
    is_flag=True,
    help="What stands out of the rounding of TUNED's type; the rule where none is given.",
)
@click.option(
    "--svd",
    type=click.Choice(["auto", "exact", "randomized"]),
    default="auto",
    help="How matrices are decomposed; randomized is within a thousandth of the exact.",
)
@click.option(
    "--include",
    multiple=True,
    type=Expression(),
    metavar="RE",
    help="Only tensors in whose name this is found.",
)
@click.option(
    "--exclude", multiple=True, type=Expression(), metavar="RE", help="No tensor in whose name this is found."
)
@click.option(
    "--full-tensors",
    type=click.Choice(["auto", "none", "all"]),
    default="auto",
    help="What goes along whole: what has no low-rank form; nothing; or what is excluded too.",
)
@click.option("--modules", is_flag=True, help="A line for each module.")
@writing
@computing
@shared
@click.pass_obj
def command(
    settings: Settings,
    *,
    base: str,
    tuned: str,
    out: str | None,
    output: str | None,
    rank: int | None,
    energy: float | None,
    error: float | None,
    noise_floor: bool,
    svd: Literal["auto", "exact", "randomized"],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    full_tensors: Literal["auto", "none", "all"],
    modules: bool,
    dtype: str | None,
    to: str | None,
    force: bool,
    dry_run: bool,
    no_sync: bool,
    jobs: int | None,
    executor: str,
    device: str,
    max_memory: int | None,
) -> int:
    """Turn a fine-tune into an adapter: the difference of two checkpoints, each matrix at low rank.

    BASE and TUNED are folders with safetensors (one file or many) or single files of the same model. What has no
    low-rank form (norms, resized embeddings, new heads) goes along whole. Without a rule for the rank, what stands
    out of the noise of TUNED's rounding is kept.

    \b
    Examples:
      loratools extract my-model my-fine-tune adapter
      loratools extract my-model my-fine-tune adapter --rank 32
      loratools extract my-model my-fine-tune adapter --rank 16 --exclude embed_tokens --dtype bf16
    """  # noqa: D301 - \b is click's
    place = resolve_out(out, output, "loratools extract BASE TUNED OUT")
    from loratools.arrays import check_double
    from loratools.executors.base import make_executor
    from loratools.running import default_jobs
    from loratools.verbs.extract import plan_extract, run_extract

    device = check_double(device)
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    planned = plan_extract(
        base, tuned, place, rank=rank, energy=energy, error=error, noise_floor=noise_floor, svd=svd,
        include=include, exclude=exclude, full_tensors=full_tensors, to=to or "peft", force=force,
    )  # fmt: skip
    planned.require_memory(max_memory, workers.jobs)
    if dry_run:
        _show_plan(planned.to_dict(workers.jobs), settings)
        return 0
    total = sum(item.nbytes for item in planned.items)
    with progress("Extracting", total, settings, then="Writing") as on_step:
        report = run_extract(
            planned, dtype=dtype, jobs=jobs, executor=executor, device=device, max_memory=max_memory,
            sync=not no_sync, on_step=on_step,
        )  # fmt: skip
    warn(report.warnings, settings)
    if settings.json:
        say_json(report.to_dict())
    elif not settings.quiet:
        show_extraction(report, settings, modules=modules)
    return 0


def _show_plan(plan: dict[str, Any], settings: Settings) -> None:
    warn(plan["warnings"], settings)
    if settings.json:
        say_json(plan)
        return
    most = plan["parameters"]
    click.echo(f"Would write {one_line(plan['output'])}; nothing has been touched")
    fields(
        [
            ("reads", ", ".join(plan["reads"])),
            ("modules", f"{plan['modules']:,} at most, of low rank"),
            ("whole", f"{counted(plan['full_tensors'], 'tensor')} at most"),
            *([("left out", listed(plan["left_out"], settings))] if plan["left_out"] else []),
            ("parameters", "as many as the values ask for" if most is None else f"{most:,} at most"),
            ("bytes", f"{size(plan['bytes_read'])} to read at most"),
            ("memory", f"{size(plan['peak_memory'])} at most, with {counted(plan['jobs'], 'worker')}"),
        ]
    )


def show_extraction(report: ExtractReport, settings: Settings, *, modules: bool = False) -> None:
    """Print a report of ``extract``."""
    done = click.style("Extracted", fg="green", bold=True)
    names = f"{one_line(Path(report.tuned).name)} - {one_line(Path(report.base).name)}"
    click.echo(f"{done} {names}: {one_line(report.output)}")
    memory = f", peak memory {size(report.peak_memory)}" if report.peak_memory else ""
    pairs = [
        (
            "modules",
            f"{counted(len(report.modules), 'module')} of rank {spread(report.rank.min, report.rank.max)}",
        ),
        ("rule", _rule(report.rule)),
        ("lost", f"{percent(report.relative_error)} of the difference{_certificate(report)}"),
        (
            "written",
            f"{report.parameters:,} parameters, {size(report.bytes)} in {report.seconds:.2f} s{memory}",
        ),
        ("unchanged", counted(report.unchanged, "tensor")),
    ]
    for reason, tensors in _by_reason((one.name, one.reason) for one in report.full_tensors).items():
        pairs.append(
            ("whole", f"{counted(len(tensors), 'tensor')}, {reason}: {listed(tensors, settings, most=3)}")
        )
    for reason, tensors in _by_reason((one.name, one.reason) for one in report.skipped).items():
        pairs.append(("skipped", f"{listed(tensors, settings, most=3)}: {reason}"))
    fields(pairs)
    if modules:
        click.echo()
        show_table(
            ["module", "kind", ">rank", ">shape", ">lost", ">norm"],
            [
                (one.name, one.kind, one.rank, "x".join(map(str, one.shape)), percent(one.relative_error),
                 f"{one.norm:.3g}")
                for one in report.modules
            ],
        )  # fmt: skip


def _rule(rule: RankRule) -> str:
    if rule.name == "noise_floor":
        return "what stands out of the noise of rounding"
    return f"{rule.name} {rule.value:g}"


def _certificate(report: ExtractReport) -> str:
    """How far from the best possible the result can be."""
    beyond = report.optimality - 1
    if not beyond < 1:
        return ""
    return (
        ", which is the least possible"
        if beyond < 1e-9
        else f", at most {beyond:.1e} more than the least possible"
    )


def _by_reason(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in pairs:
        found.setdefault(reason, []).append(name)
    return found
