"""``loratools verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loratools.cli.adapters import load_adapters, require_weights
from loratools.cli.doorway import Misuse
from loratools.cli.options import REF, computing, shared, weighting
from loratools.cli.progress import progress
from loratools.cli.tables import show_table
from loratools.cli.text import counted, one_line, percent, say_json, warn

if TYPE_CHECKING:
    from loratools.cli.settings import Settings
    from loratools.verbs.reports import TensorVerdict, VerificationReport

__all__ = ["command", "show_verification"]


@click.command()
@click.argument("base", type=REF)
@click.argument("adapters", type=REF, nargs=-1, metavar="ADAPTER...")
@click.argument("merged", type=REF)
@weighting
@computing
@shared
@click.pass_obj
def command(
    settings: Settings,
    *,
    base: str,
    adapters: tuple[str, ...],
    merged: str,
    weight: tuple[float, ...],
    config: str | None,
    alpha: float | None,
    enable_lora: tuple[bool, ...] | None,
    allow_unmatched: tuple[str, ...],
    on_conflict: str,
    block_weights: tuple[str, ...],
    arch: str | None,
    blockwise_experts: bool,
    allow_pickle: bool,
    jobs: int | None,
    executor: str,
    device: str,
    max_memory: int | None,
) -> int:
    """Replay a merge and compare MERGED with it, by whomever it was made.

    Each tensor is exact, within one rounding, or wrong in a way that is named: not merged, merged at another
    scale, missing, different. Exit code 1 means that something is wrong.

    \b
    Examples:
      loratools verify my-model my-adapter merged
      loratools verify my-model style.lora voice.lora merged -w 1 -w 0.5 --json
    """  # noqa: D301 - \b is click's
    if not adapters:
        raise Misuse(
            "verify needs a base, one adapter or more, and the merged checkpoint",
            hint="loratools verify BASE ADAPTER... MERGED",
        )
    require_weights(weight, adapters)
    import loratools as lt
    from loratools.arrays import check_device
    from loratools.executors.base import make_executor
    from loratools.refs import local_path
    from loratools.running import default_jobs
    from loratools.verbs.verify import verify_merge

    check_device(device)
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    local_path(merged)  # named before any work, if it is not there
    opened = load_adapters(
        adapters, config, alpha, allow_pickle=allow_pickle, blockwise_experts=blockwise_experts,
        enable_lora=enable_lora,
    )  # fmt: skip
    request: dict[str, Any] = {
        "allow_unmatched": allow_unmatched, "on_conflict": on_conflict, "arch": arch, "block_weights": block_weights,
    }  # fmt: skip
    planned = lt.plan_merge(base, opened, weights=weight or None, device=device, **request)
    planned.plan.require_memory(max_memory, workers.jobs, apart=workers.remote)
    warn(planned.merged.warnings, settings)
    total = sum(step.nbytes for step in planned.plan.steps)
    with progress("Verifying", total, settings) as on_step:
        report = verify_merge(planned, merged, workers, on_step=on_step)
    if settings.json:
        say_json(report.to_dict())
    else:
        show_verification(report, settings)
    return 0 if report.ok else 1


def show_verification(report: VerificationReport, settings: Settings) -> None:
    """Print what is wrong, and a line in any case."""
    shown = [v for v in report.modules if not v.ok or (settings.verbose and v.verdict != "exact")]
    if shown:
        show_table(
            ["tensor", "verdict", "found"], [(v.name, v.verdict.replace("_", " "), _found(v)) for v in shown]
        )
    if settings.quiet:
        return
    wrong = sum(not verdict.ok for verdict in report.modules)
    counts = ", ".join(
        f"{count:,} {_WORDS.get(verdict, verdict)}" for verdict, count in sorted(report.summary.items())
    )
    verdict = click.style("ok" if report.ok else "not ok", fg="green" if report.ok else "red", bold=True)
    what = counted(len(report.modules), "tensor")
    said = "all as the merge gives them" if report.ok else f"{wrong:,} not what the merge gives"
    click.echo(f"{one_line(report.merged)}: {verdict}, {what}, {said} ({counts}; {report.seconds:.2f} s)")


_WORDS = {"rounding": "within one rounding", "wrong_scale": "at another scale", "unmerged": "not merged"}


def _found(verdict: TensorVerdict) -> str:
    """The figures that explain a verdict."""
    if verdict.verdict == "wrong_scale" and verdict.scale is not None:
        return f"the change, multiplied by {verdict.scale:.4g}"
    if verdict.verdict == "unmerged":
        return "the base's values"
    if verdict.verdict in {"missing", "unexpected"}:
        return "in the merge, not in the checkpoint" if verdict.verdict == "missing" else "not in the merge"
    if verdict.verdict == "shape":
        return "another shape"
    if verdict.differing is None or verdict.relative is None:
        return "another kind of type"
    return f"{percent(verdict.differing)} of the values differ, relative error {verdict.relative:.2g}"
