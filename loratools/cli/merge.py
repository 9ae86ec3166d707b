"""``loratools merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from loratools.cli.adapters import load_adapters, require_weights
from loratools.cli.doorway import Misuse
from loratools.cli.options import FLOATS, REF, SIZE, computing, shared, weighting
from loratools.cli.progress import progress
from loratools.cli.text import counted, fields, listed, one_line, percent, say_json, size, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.adapter import Adapter
    from loratools.cli.settings import Settings
    from loratools.verbs.reports import MergeReport, SurvivalSummary

__all__ = ["command", "show_merge"]

_NOTABLE = 0.95  # a weight of whose change less than this survives is named


@click.command(options_metavar="[OPTIONS]")
@click.argument("base", type=REF)
@click.argument("adapters", type=REF, nargs=-1, metavar="ADAPTER...")
@click.argument("out", type=REF, required=False)
@click.option("-o", "--output", type=REF, help="OUT, where it is not the last argument.")
@weighting
@click.option(
    "--dtype",
    type=FLOATS,
    metavar="TYPE",
    help="Type of the floats written, such as bf16.  [default: each keeps its own]",
)
@click.option(
    "--shard-size", type=SIZE, help="Bytes a file may have, such as 5GB.  [default: the base's files]"
)
@click.option(
    "--verify", is_flag=True, help="Read everything back and compare it; exit code 1 if it is not right."
)
@click.option("--resume", is_flag=True, help="Go on from the .part an interrupted run left.")
@click.option(
    "--no-sync", is_flag=True, help="Do not wait for the disk: faster, not safe against power cuts."
)
@click.option("--force", is_flag=True, help="Replace OUT, if loratools made it.")
@click.option("--dry-run", is_flag=True, help="Say what would be read and written, and touch nothing.")
@computing
@shared
@click.pass_obj
def command(
    settings: Settings,
    *,
    base: str,
    adapters: tuple[str, ...],
    out: str | None,
    output: str | None,
    weight: tuple[float, ...],
    config: str | None,
    alpha: float | None,
    enable_lora: tuple[bool, ...] | None,
    allow_unmatched: tuple[str, ...],
    on_conflict: Literal["error", "first", "last"],
    block_weights: tuple[str, ...],
    arch: str | None,
    blockwise_experts: bool,
    allow_pickle: bool,
    dtype: str | None,
    shard_size: int | None,
    verify: bool,
    resume: bool,
    no_sync: bool,
    force: bool,
    dry_run: bool,
    jobs: int | None,
    executor: str,
    device: str,
    max_memory: int | None,
) -> int:
    """Merge adapters into a base model, in memory that does not grow with the model.

    BASE is a folder with safetensors (one file or many), a single file or a diffusers pipeline, each ADAPTER a folder
    or file of any format. OUT is what BASE is: a complete checkpoint that appears whole or not at all.

    \b
    Examples:
      loratools merge my-model my-adapter merged
      loratools merge my-model style.lora voice.lora -w 1 -w 0.5 -o merged
      loratools merge merged my-adapter restored -w -1
      loratools merge sdxl.safetensors style.safetensors merged.safetensors --block-weights OUTALL
      loratools merge my-model my-adapter merged --dry-run
    """  # noqa: D301 - \b is click's
    names, target = _places(adapters, out, output)
    require_weights(weight, names)
    import loratools as lt
    from loratools.arrays import check_device
    from loratools.executors.base import make_executor
    from loratools.running import default_jobs

    check_device(device)
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    opened = load_adapters(
        names, config, alpha, allow_pickle=allow_pickle, blockwise_experts=blockwise_experts,
        enable_lora=enable_lora,
    )  # fmt: skip
    planned = lt.plan_merge(
        base, opened, target, weights=weight or None, dtype=dtype, shard_size=shard_size, force=force,
        allow_unmatched=allow_unmatched, on_conflict=on_conflict, blockwise_experts=blockwise_experts, device=device,
        arch=arch, block_weights=block_weights,
    )  # fmt: skip
    planned.plan.require_memory(max_memory, workers.jobs, apart=workers.remote)
    if dry_run:
        _show_plan(planned.to_dict(workers.jobs, apart=workers.remote), settings)
        return 0
    settings.on_interrupt = f"nothing was published; add --resume to go on from {target}.part"
    total = sum(step.nbytes for step in planned.plan.steps)
    with progress("Merging", total, settings, then="Verifying" if verify else None) as on_step:
        report = lt.run_merge(
            planned, verify=verify, resume=resume, sync=not no_sync, jobs=jobs, executor=executor,
            max_memory=max_memory, on_step=on_step,
        )  # fmt: skip
    settings.on_interrupt = None
    warn(report.warnings, settings)
    if settings.json:
        say_json(report.to_dict())
    elif not settings.quiet:
        show_merge(report, base, opened, weight, settings)
    return 1 if report.verified is False else 0


def _places(adapters: tuple[str, ...], out: str | None, output: str | None) -> tuple[tuple[str, ...], str]:
    """Which arguments are adapters, and where the result goes."""
    if output is not None and out is not None:
        adapters, out = (*adapters, out), output
    if not adapters or out is None:
        raise Misuse("merge needs a base, one adapter or more, and a place for the result",
                     hint="loratools merge BASE ADAPTER... OUT, or -o OUT")  # fmt: skip
    return adapters, out


def _show_plan(plan: dict[str, Any], settings: Settings) -> None:
    warn(plan["warnings"], settings)
    if settings.json:
        say_json(plan)
        return
    files = [f"{file['name']} ({size(file['bytes'])})" for file in plan["files"]]
    tensors = plan["tensors"]
    click.echo(f"Would write {one_line(plan['output'])}; nothing has been touched")
    fields(
        [
            ("reads", ", ".join(plan["reads"])),
            ("tensors", _tensors(tensors)),
            ("files", listed(files, settings)),
            ("besides", listed(plan["small_files"], settings) or "nothing"),
            *_left_out(plan["left_out"], settings),
            ("bytes", f"{size(plan['bytes_read'])} to read, {size(plan['bytes_written'])} to write"),
            ("memory", f"{size(plan['peak_memory'])} at most, with {counted(plan['jobs'], 'worker')}"),
        ]
    )


def show_merge(
    report: MergeReport, base: str, adapters: Sequence[Adapter], weights: Sequence[float], settings: Settings
) -> None:
    """Print a report of ``merge``."""
    factors = weights or [1.0] * len(adapters)
    named = [
        Path(adapter.name).name + (f" (weight {factor:g})" if factor != 1 else "")
        for adapter, factor in zip(adapters, factors, strict=True)
    ]
    sources = " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)
    done = click.style("Merged", fg="green", bold=True)
    click.echo(f"{done} {one_line(sources)} into {one_line(Path(base).name)}: {one_line(report.output)}")
    speed = f" ({size(report.bytes_written / report.seconds)}/s)" if report.seconds > 0 else ""
    memory = f", peak memory {size(report.peak_memory)}" if report.peak_memory else ""
    pairs = [
        ("tensors", f"{_tensors(report.tensors)}; {counted(report.modules['bound'], 'module')} merged"),
        ("written", f"{size(report.bytes_written)} in {report.seconds:.2f} s{speed}{memory}"),
        ("survival", _survival(report.survival)),
    ]
    if report.resumed:
        pairs.append(("resumed", f"{counted(report.resumed, 'step')} had been done before"))
    if unmatched := report.modules["unmatched"]:
        pairs.append(
            ("unused", f"{counted(len(unmatched), 'key')}, as allowed: {listed(unmatched, settings)}")
        )
    pairs += _left_out(report.left_out, settings)
    if report.verified is not None:
        right = "read back, every tensor is right"
        pairs.append(
            ("verified", right if report.verified else "NOT right; loratools verify names the tensors")
        )
    fields(pairs)


def _tensors(counts: dict[str, int]) -> str:
    added = f", {counts['added']:,} added" if counts.get("added") else ""
    return f"{counts['changed']:,} changed, {counts['copied']:,} copied{added}, {counts['total']:,} in all"


def _left_out(names: Sequence[str], settings: Settings) -> list[tuple[str, str]]:
    """Weight files beside the base that would have carried the unmerged model along."""
    return [("left out", f"{listed(list(names), settings)} (weights without the merge)")] if names else []


def _survival(survival: SurvivalSummary) -> str:
    if survival.mean is None:
        return "nothing to measure"
    if survival.mean != survival.mean:
        return "not measured: the sums of its squares overflow"
    text = f"{percent(survival.mean)} of the change survives rounding"
    if survival.min is not None and survival.min < _NOTABLE:
        text += f"; least in {survival.worst_module}: {percent(survival.min)}"
    if survival.unchanged:
        text += f"; {percent(survival.unchanged)} of the values stay as they were"
    return text
