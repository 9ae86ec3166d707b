"""``loratools combine``. The options of the methods are those of their functions: nothing is listed here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from loratools.cli.adapters import load_adapters, require_weights
from loratools.cli.defaults import origin, strength
from loratools.cli.doorway import Misuse
from loratools.cli.options import (
    FINITE,
    REF,
    architecture,
    block_weights,
    computing,
    enabling,
    pickles,
    shared,
)
from loratools.cli.outputs import resolve_out, show_dry_run, writing
from loratools.cli.progress import progress
from loratools.cli.tables import show_table
from loratools.cli.text import counted, fields, listed, one_line, percent, say_json, size, warn
from loratools.methods import METHODS, find
from loratools.methods.base import takers

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratools.cli.settings import Settings
    from loratools.methods.base import Method, Option
    from loratools.verbs.combine_report import CombineReport

__all__ = ["command", "method_options", "show_combine"]

_NOTHING = 1e-7  # a relative error below this is what rounding to float32 makes


class _Names(click.ParamType[str]):
    """The name of a method, or an alias."""

    name = "method"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See :class:`click.ParamType`."""
        names = [name for method in METHODS.values() for name in (method.name, *method.aliases)]
        if value not in names:
            self.fail(f"{value!r} is none of {', '.join(names)}.", param, ctx)
        return str(value)


def method_options(taken: set[str]) -> list[Callable[[Any], Any]]:
    """An option for each option of any method, in the order of the registry.

    Args:
        taken: names the command has already.

    Raises:
        ValueError: a method wants one of these.
    """
    found: dict[str, list[tuple[str, Option]]] = {}
    for method in METHODS.values():
        for option in method.options:
            if option.name in taken:
                raise ValueError(f"method {method.name}: combine has an option {option.flag} of its own")
            found.setdefault(option.name, []).append((method.name, option))
    return [_click_option(owners) for owners in found.values()]


def _click_option(owners: list[tuple[str, Option]]) -> Callable[[Any], Any]:
    first = owners[0][1]
    flag = first.flag
    kinds = {option.type for _, option in owners}
    if kinds == {bool}:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    return click.option(
        flag,
        first.name,
        default=None,
        type=_click_type(kinds, owners),
        help=_help(owners),
        show_default=False,
    )


def _click_type(kinds: set[type], owners: list[tuple[str, Option]]) -> Any:
    if kinds == {bool}:
        return None
    if kinds == {int}:
        return click.INT
    if kinds <= {int, float}:
        return FINITE
    if all(option.choices for _, option in owners):
        return click.Choice(list(dict.fromkeys(one for _, option in owners for one in option.choices)))
    return click.STRING


def _help(owners: list[tuple[str, Option]]) -> str:
    """What it means to the first method that has it, and the default in each."""
    defaults: dict[str, list[str]] = {}
    for name, option in owners:
        defaults.setdefault(str(option.default), []).append(name)
    shown = "; ".join(f"{', '.join(names)}: {value}" for value, names in defaults.items())
    text = owners[0][1].help
    return f"{text[:1].upper()}{text[1:]}  [{shown}]".strip()


def _with_methods(function: Callable[..., Any]) -> Callable[..., Any]:
    own = {parameter.name for parameter in getattr(function, "__click_params__", ()) if parameter.name}
    for option in reversed(method_options(own)):
        function = option(function)
    return function


@click.command()
@click.argument("refs", type=REF, nargs=-1, required=True, metavar="REF...")
@click.option(
    "-w", "--weight", "weight", type=FINITE, multiple=True, metavar="NUMBER",
    help="What an adapter's delta is multiplied by; once for each, in their order.  [default: 1]",
)  # fmt: skip
@click.option(
    "--method", type=_Names(), default="linear", help="How; `loratools methods` describes them all."
)
@click.option(
    "--rank", type=click.IntRange(min=1), metavar="N",
    help="Rank of every module of the result, by the best approximation.  [default: the sum of the ranks]",
)  # fmt: skip
@click.option(
    "--extras", type=click.Choice(["error", "first", "average"]), default="error",
    help="What becomes of heads, biases and token rows that several adapters have and differ in.",
)  # fmt: skip
@click.option(
    "--base", type=REF, metavar="REF", help="The model of all, where their names do not match their modules."
)
@architecture
@block_weights
@click.option("--modules", is_flag=True, help="A line for each module.")
@click.option(
    "--config", type=click.Path(dir_okay=False), metavar="FILE",
    help="The adapter_config.json of a bare weight file.",
)  # fmt: skip
@click.option("--alpha", type=FINITE, metavar="NUMBER", help="The lora_alpha of a bare weight file.")
@enabling
@click.option(
    "--blockwise-experts", is_flag=True,
    help="The B of fused experts is packed expert by expert (unsloth before September 2026).",
)  # fmt: skip
@pickles
@writing
@computing
@shared
@_with_methods
@click.pass_obj
def command(
    settings: Settings,
    /,
    *,
    refs: tuple[str, ...],
    output: str | None,
    weight: tuple[float, ...],
    method: str,
    rank: int | None,
    extras: Literal["error", "first", "average"],
    base: str | None,
    arch: str | None,
    block_weights: tuple[str, ...],
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
    **given: Any,
) -> int:
    """Combine adapters into one, without their model.

    The default is their exact weighted sum, whatever their ranks; with --rank the best approximation of it. Other
    methods are chosen by --method; options that only some methods have name these in brackets, with their defaults.

    \b
    Examples:
      loratools combine style character -w 0.8 -w 0.6 -o both
      loratools combine style character -o both --rank 16
      loratools combine a b c -o abc --method ties --density 0.3 --space core
    """  # noqa: D301 - \b is click's
    require_weights(weight, refs)
    target = resolve_out(None, output, "loratools combine REF... -o OUT", last=False)
    options = _own_options(find(method), given)
    from loratools.arrays import check_double
    from loratools.executors.base import make_executor
    from loratools.running import default_jobs
    from loratools.verbs.combine import plan_combine, run_combine

    device = check_double(device)
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    opened = load_adapters(
        refs, config, alpha, allow_pickle=allow_pickle, blockwise_experts=blockwise_experts,
        enable_lora=enable_lora,
    )  # fmt: skip
    planned = plan_combine(
        opened, target, weights=weight or None, method=method, rank=rank, base=base, arch=arch,
        block_weights=block_weights, extras=extras,
        dtype=dtype, to=to, force=force, **options,
    )  # fmt: skip
    if dry_run:
        show_dry_run(planned.to_dict(workers.jobs), settings)
        return 0
    with progress("Combining", sum(item.nbytes for item in planned.items), settings) as on_step:
        report = run_combine(
            planned, sync=not no_sync, jobs=jobs, executor=executor, device=device, max_memory=max_memory,
            on_step=on_step,
        )  # fmt: skip
    warn(report.warnings, settings)
    if settings.json:
        say_json(report.to_dict())
    elif not settings.quiet:
        show_combine(report, settings, modules=modules)
    return 0


def _own_options(method: Method, given: dict[str, Any]) -> dict[str, Any]:
    """What was said of the method's options.

    Raises:
        Misuse: an option of other methods, or a value that is none of this method's.
    """
    own = {option.name: option for option in method.options}
    options = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in own:
            if strength(name) < strength("method"):  # a default that goes with another method
                continue
            names = takers(name)
            flag = f"--{name.replace('_', '-')}{origin(name)}"
            raise Misuse(
                f"{flag} is no option of the method {method.name}",
                hint=f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} it; choose one with --method",
            )
        options[name] = _converted(method, own[name], value)
    return options


def _converted(method: Method, option: Option, value: Any) -> Any:
    """A value in the method's own type, where the command line had to leave it as text or as a wider one."""
    try:
        if isinstance(value, str) and option.type is not str:
            value = option.type(value)
    except ValueError:
        raise Misuse(f"{option.flag} {value}: {method.name} wants a {option.type.__name__} there") from None
    from loratools.errors import Unsupported

    try:
        return option.check(method.name, value)
    except Unsupported as error:
        raise Misuse(f"{option.flag}: {error}") from error


def show_combine(report: CombineReport, settings: Settings, *, modules: bool = False) -> None:
    """Print a report of ``combine``."""
    named = [
        Path(name).name + (f" (weight {factor:g})" if factor != 1 else "")
        for name, factor in zip(report.adapters, report.weights, strict=True)
    ]
    sources = " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)
    done = click.style("Combined", fg="green", bold=True)
    click.echo(f"{done} {one_line(sources)}: {one_line(report.output)}")
    pairs = [
        ("method", _method(report)),
        ("modules", f"{counted(len(report.modules), 'module')}, rank {_ranks(report)}, {report.dtype}"),
        ("error", _error(report)),
        ("written", f"{size(report.bytes)} in all files, in {report.seconds:.2f} s"),
    ]
    everyone = tuple(range(len(report.adapters)))
    if partial := [one.name for one in report.modules if one.adapters != everyone]:
        told = f"{counted(len(partial), 'module')}, combined from the adapters that have them"
        pairs.append(("not in all", f"{told}: {listed(partial, settings)}"))
    if report.extras:
        pairs.append(
            ("besides", listed([f"{one.name} ({_rule(one.rule)})" for one in report.extras], settings))
        )
    fields(pairs)
    if modules:
        show_table(
            ["module", ">rank", "adapters", ">relative error"],
            [
                (one.name, one.rank, ", ".join(str(i + 1) for i in one.adapters), f"{one.relative_error:.3g}")
                for one in report.modules
            ],
        )


def _method(report: CombineReport) -> str:
    told = [f"{name.replace('_', ' ')} {value}" for name, value in report.options.items()]
    return report.method + (f" ({', '.join(told)})" if told else "")


def _ranks(report: CombineReport) -> str:
    low, high = (f(one.rank for one in report.modules) for f in (min, max))
    return f"{low}" if low == high else f"{low} to {high}"


def _error(report: CombineReport) -> str:
    rounded = report.rounding >= _NOTHING
    if report.relative_error < _NOTHING:
        if rounded:
            return (
                f"none before rounding to {report.dtype}, which changes the result by {report.rounding:.2%}"
            )
        return "none: the factors hold the result, to the last digits"
    worst = max(report.modules, key=lambda one: one.relative_error)
    return (
        f"{percent(report.relative_error)} of the result's norm is lost at this rank; "
        f"most in {worst.name}: {percent(worst.relative_error)}"
        + (f"; rounding to {report.dtype} changes it by {report.rounding:.2%} besides" if rounded else "")
    )


def _rule(rule: str) -> str:
    return {
        "only": "from the one adapter that has it", "same": "the same in all", "first": "the first adapter's",
        "average": "weighted mean",
    }[rule]  # fmt: skip
