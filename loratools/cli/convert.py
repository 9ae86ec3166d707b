"""``loratools convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli.adapters import load_adapters
from loratools.cli.doorway import Misuse
from loratools.cli.options import REF, architecture, computing, reading, shared
from loratools.cli.outputs import resolve_out, show_dry_run, writing
from loratools.cli.progress import progress
from loratools.cli.tables import show_table
from loratools.cli.text import counted, fields, listed, one_line, say_json, size, spread, warn
from loratools.errors import Unsupported

if TYPE_CHECKING:
    from loratools.cli.settings import Settings
    from loratools.verbs.convert_report import ConvertReport

__all__ = ["command", "show_conversion"]

_USAGE = "loratools convert REF OUT --to FORMAT"


@click.command()
@click.argument("ref", type=REF)
@click.argument("out", type=REF, required=False)
@click.option(
    "--base",
    type=REF,
    metavar="REF",
    help="The base model: its tensors say which architecture it is; GGUF needs it.",
)
@architecture
@click.option(
    "--allow-loss", multiple=True, metavar="NAME",
    help="A key or a module that may be left out, such as 'lora_te2*'. Can be repeated.",
)  # fmt: skip
@click.option("--modules", is_flag=True, help="A line for each module.")
@reading
@writing
@computing
@shared
@click.pass_obj
def command(
    settings: Settings,
    *,
    ref: str,
    out: str | None,
    output: str | None,
    base: str | None,
    arch: str | None,
    allow_loss: tuple[str, ...],
    modules: bool,
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
) -> int:
    """Write an adapter in another format, and compare it with what was read before it appears.

    OUT is a file where its name ends in .safetensors or .gguf, else a folder. What the original checkpoints fuse and
    diffusers splits is split, or joined block by block. A key that FORMAT cannot hold is an error, unless --allow-loss
    names it; so is a difference that rounding does not explain.

    \b
    Examples:
      loratools convert style-kohya.safetensors style.safetensors --to diffusers
      loratools convert style.safetensors style-comfy.safetensors --to comfy --arch flux1
      loratools convert my-adapter my-adapter-mlx --to mlx
    """  # noqa: D301 - \b is click's
    place = resolve_out(out, output, _USAGE)
    if to is None:
        raise Misuse("nothing says which format to write", hint=_USAGE)
    if device not in {"cpu", "auto"}:
        raise Unsupported("convert moves factors and multiplies next to none", hint="leave --device out")
    from loratools.verbs.convert import convert, plan_convert

    [adapter] = load_adapters(
        [ref],
        config,
        alpha,
        allow_pickle=allow_pickle,
        blockwise_experts=blockwise_experts,
        enable_lora=enable_lora,
    )
    chosen: dict[str, Any] = {
        "to": to, "base": base, "arch": arch, "allow_loss": allow_loss, "dtype": dtype, "force": force,
        "max_memory": max_memory,
    }  # fmt: skip
    if dry_run:
        show_dry_run(plan_convert(adapter, place, **chosen), settings)
        return 0
    total = sum(tensor.spec.nbytes for tensor in adapter.tensors)
    with progress("Comparing", total, settings) as on_step:
        report = convert(
            adapter, place, **chosen, jobs=jobs, executor=executor, sync=not no_sync, on_step=on_step
        )
    warn(report.warnings, settings)
    if settings.json:
        say_json(report.to_dict())
    elif not settings.quiet:
        show_conversion(report, settings, modules=modules)
    return 0


def show_conversion(report: ConvertReport, settings: Settings, *, modules: bool = False) -> None:
    """Print a report of ``convert``."""
    done = click.style("Converted", fg="green", bold=True)
    click.echo(f"{done} {one_line(Path(report.path).name)}: {one_line(report.output)}")
    ranks = [module.rank for module in report.modules if module.rank is not None]
    count = len(report.modules)
    if report.identical == count:
        difference = "none: every bit of the factors is the same"
    elif not report.greatest:
        difference = "none"
    else:
        difference = f"{report.relative:.2e} relative, {report.greatest:.2e} in the module that differs most"
    pairs = [
        ("formats", f"{report.source} to {report.to}"),
        *([("model", f"{report.architecture}: {report.evidence}")] if report.architecture else []),
        (
            "modules",
            f"{counted(count, 'module')} of rank {spread(min(ranks, default=None), max(ranks, default=None))}",
        ),
        ("the same", f"{report.identical:,} to the last bit"),
        ("difference", difference),
        ("bytes", size(report.bytes)),
    ]
    if report.lost:
        pairs.append(
            ("left out", listed([f"{loss.name} ({loss.reason})" for loss in report.lost], settings, most=2))
        )
    if report.dropped:
        pairs.append(("dropped", f"of use in training only: {listed(report.dropped, settings)}"))
    fields(pairs)
    if modules:
        click.echo()
        rows = [
            (m.name, m.kind, str(m.rank or ""), f"{m.relative:.1e}" if m.relative else "0")
            for m in report.modules
        ]
        show_table(["module", "kind", "rank", "relative"], rows)
