"""``loratools reduce``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loratools.cli.defaults import origin, strength, strongest
from loratools.cli.doorway import Misuse
from loratools.cli.options import FINITE, REF, SIZE, computing, enabling, pickles, shared
from loratools.cli.outputs import resolve_out, show_dry_run, writing
from loratools.cli.tables import show_table
from loratools.cli.text import counted, fields, listed, one_line, percent, say_json, spread, warn
from loratools.cli.text import size as readable

if TYPE_CHECKING:
    from loratools.cli.settings import Settings
    from loratools.verbs.reduce_report import ReduceReport

__all__ = ["command", "show_reduction"]

_USAGE = "loratools reduce REF OUT"
_RULES = {
    "rank": "--rank", "energy": "--energy", "error": "--error", "params": "--params", "size": "--size",
    "noise_floor": "--noise-floor",
}  # fmt: skip
_TOGETHER_ONLY = ("params", "size")


@click.command(options_metavar="[OPTIONS]")
@click.argument("ref", type=REF)
@click.argument("out", type=REF, required=False)
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank of every module.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Share of the sum of squared singular values to keep, such as 0.99.",
)
@click.option(
    "--error",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    help="Greatest relative error of the whole, such as 0.05.",
)
@click.option("--params", type=click.IntRange(min=1), metavar="N", help="Parameters the result may have.")
@click.option("--size", type=SIZE, help="Bytes its weight file may have, such as 20MB.")
@click.option("--noise-floor", is_flag=True, help="Keep what rounding the stored factors cannot have made.")
@click.option(
    "--per-module/--global",
    "per_module",
    default=None,
    help="Judge each module on its own, or find one optimum over all.  "
    "[default: global for --error, --params and --size]",
)
@click.option("--modules", is_flag=True, help="A line for each module.")
@click.option(
    "--config", type=click.Path(dir_okay=False), metavar="FILE", help="The adapter_config.json to read it by."
)
@click.option("--alpha", type=FINITE, metavar="NUMBER", help="The lora_alpha, where no file says it.")
@enabling
@click.option(
    "--blockwise-experts",
    is_flag=True,
    help="The B of fused experts is packed expert by expert (unsloth before September 2026).",
)
@pickles
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
    rank: int | None,
    energy: float | None,
    error: float | None,
    params: int | None,
    size: int | None,
    noise_floor: bool,
    per_module: bool | None,
    modules: bool,
    output: str | None,
    to: str | None,
    dry_run: bool,
    no_sync: bool,
    **options: Any,
) -> None:
    """Bring an adapter to a lower rank, and say exactly what is lost.

    Each module becomes the nearest one of its rank, found from its factors alone. Exactly one of --rank, --energy,
    --error, --params, --size and --noise-floor says how far to go. What is no delta is carried over as it is.

    \b
    Examples:
      loratools reduce my-adapter smaller --rank 16
      loratools reduce my-adapter smaller --size 10MB
      loratools reduce my-adapter smaller --error 0.05
      loratools reduce my-adapter smaller --rank 8 --global --modules
    """  # noqa: D301 - \b is click's
    target = resolve_out(out, output, _USAGE)
    rule: dict[str, Any] = {"rank": rank, "energy": energy, "error": error, "params": params, "size": size}
    rule = strongest({**rule, "noise_floor": noise_floor})
    per_module = _scope(rule, per_module)
    from loratools.verbs.reduce import plan_reduce, reduce

    chosen = {**rule, "per_module": per_module, "to": to, **options}
    if dry_run:
        show_dry_run(plan_reduce(ref, target, **chosen), settings)
        return
    report = reduce(ref, target, sync=not no_sync, **chosen)
    warn(report.warnings, settings)
    if settings.json:
        say_json(report.to_dict())
    elif not settings.quiet:
        show_reduction(report, ref, settings, modules=modules)


def _scope(rules: dict[str, Any], per_module: bool | None) -> bool | None:
    """The scope, unless the one rule has no such scope and was set more strongly than it.

    Raises:
        Misuse: not one rule, or a scope it does not have.
    """
    given = [name for name, value in rules.items() if value is not None and value is not False]
    if len(given) != 1:
        told = [_RULES[name] + origin(name) for name in given]
        said = f"{' and '.join(told)} say" if told else "nothing says"
        raise Misuse(f"{said} how far to reduce", hint=f"give exactly one of {', '.join(_RULES.values())}")
    (name,) = given
    odd = (per_module and name in _TOGETHER_ONLY) or (per_module is False and name == "noise_floor")
    if odd and strength("per_module") < strength(name):
        return None
    scope = origin("per_module")
    if odd and per_module:
        raise Misuse(
            f"{_RULES[name]} is a budget of all modules together", hint=f"leave --per-module{scope} out"
        )
    if odd:
        raise Misuse("--noise-floor is judged module by module", hint=f"leave --global{scope} out")
    return per_module


def show_reduction(report: ReduceReport, ref: str, settings: Settings, *, modules: bool = False) -> None:
    """Print a report of ``reduce``."""
    done = click.style("Reduced", fg="green", bold=True)
    click.echo(f"{done} {one_line(ref)}: {one_line(report.output)}")
    kept = [one for one in report.modules if one.rank]
    before = [one.rank_before for one in report.modules if one.rank_before is not None]
    was = f", from {spread(min(before), max(before))}" if before else ""
    worst = max(kept, key=lambda one: one.relative_error)
    lost = f"relative error {report.relative_error:.3g}, {percent(1 - report.relative_error**2)} of the energy kept"
    most = f"; most in {worst.name}: {worst.relative_error:.3g}" if worst.relative_error else ""
    pairs = [
        ("rank", f"{spread(report.rank.min, report.rank.max)}{was}"),
        ("modules", counted(len(kept), "module")),
        ("lost", lost + most),
        ("parameters", f"{report.parameters_after:,} ({report.parameters_before:,} before)"),
        (
            "size",
            f"{readable(report.bytes_after)} as {report.dtype} ({readable(report.bytes_before)} before)",
        ),
        ("time", f"{report.seconds:.2f} s"),
    ]
    if report.dropped:
        pairs.insert(2, ("dropped", listed(list(report.dropped), settings)))
    fields(pairs)
    if modules:
        click.echo()
        show_table(
            ["module", ">rank before", ">rank", ">norm", ">relative error"],
            [
                (one.name, one.rank_before, one.rank, f"{one.norm:.4g}", f"{one.relative_error:.3g}")
                for one in report.modules
            ],
        )
