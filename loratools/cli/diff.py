"""``loratools diff``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from loratools.cli.adapters import load_adapters
from loratools.cli.doorway import Misuse
from loratools.cli.options import FINITE, REF, architecture, computing, pickles, shared
from loratools.cli.progress import progress
from loratools.cli.tables import show_table
from loratools.cli.text import counted, fields, listed, one_line, say_json, warn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loratools.cli.settings import Settings
    from loratools.verbs.diff_report import DiffReport, ModuleDifference

__all__ = ["command", "show_differences"]

_TIMES = 10  # from here on, a distance is so many times A rather than a share of it
_WORST = 10  # rows of the table, unless --modules asks for all


@click.command()
@click.argument("a", type=REF, metavar="A")
@click.argument("b", type=REF, metavar="B")
@click.option(
    "--base", type=REF, metavar="REF", help="The model of both, where their names do not match their modules."
)
@architecture
@click.option("--modules", is_flag=True, help="A line for each module rather than for the most different.")
@click.option(
    "--tolerance", type=FINITE, default=1e-6, metavar="X", help="Relative distance that counts as none."
)
@pickles
@computing
@shared
@click.pass_obj
def command(
    settings: Settings,
    *,
    a: str,
    b: str,
    base: str | None,
    arch: str | None,
    modules: bool,
    tolerance: float,
    allow_pickle: bool,
    jobs: int | None,
    executor: str,
    device: str,
    max_memory: int | None,
) -> int:
    """Compare what two adapters do, however they are factored, named or typed.

    The updates of the weights are compared (scaled, over all modules), relative to those of A, together with
    heads, biases and token rows. Exit code 1 means that they differ by more than the tolerance.

    \b
    Examples:
      loratools diff run/checkpoint-100 run/checkpoint-200
      loratools diff adapter converted --tolerance 1e-3 && echo the same
      loratools diff ours theirs --base my-model --modules --json
    """  # noqa: D301 - \b is click's
    if tolerance < 0:
        raise Misuse(f"--tolerance {tolerance:g} is below 0", hint="a relative distance is 0 or more")
    from loratools.arrays import check_double
    from loratools.executors.base import make_executor
    from loratools.running import default_jobs
    from loratools.verbs.diff import plan_diff, run_diff

    device = check_double(device)
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    first, second = load_adapters((a, b), None, None, allow_pickle=allow_pickle, blockwise_experts=False)
    planned = plan_diff(first, second, base=base, arch=arch)
    planned.require_memory(max_memory, workers.jobs)
    with progress("Comparing", sum(item.nbytes for item in planned.items), settings) as on_step:
        report = run_diff(planned, workers, tolerance=tolerance, device=device, on_step=on_step)
    warn(report.warnings, settings)
    if settings.json:
        say_json(report.to_dict())
    else:
        show_differences(report, settings, modules=modules)
    return 0 if report.identical else 1


def show_differences(report: DiffReport, settings: Settings, *, modules: bool = False) -> None:
    """Print a report of ``diff``: the verdict first, then what differs, most of it first."""
    colour = "green" if report.identical else "yellow"
    click.echo(click.style(one_line(_headline(report)), fg=colour, bold=True))
    if settings.quiet:
        return
    fields(_facts(report, settings))
    if report.config:
        click.echo()
        show_table(["config", "A", "B"], [(c.field, _value(c.a), _value(c.b)) for c in report.config])
    if changed := report.changed_extras:
        click.echo()
        show_table(
            ["tensor", "role", ">difference", ">‖A‖", ">‖B‖"],
            [
                (e.name, e.role.replace("_", " "), e.why or _share(e.relative), _short(e.norm_a), _short(e.norm_b))
                for e in changed
            ],
        )  # fmt: skip
    if report.modules and (modules or not report.identical):
        click.echo()
        _show_modules(report.modules, modules)


def _headline(report: DiffReport) -> str:
    if report.identical:
        exact = report.distance == 0 and not any(extra.distance for extra in report.extras)
        return "The same update" + ("" if exact else f" (within {report.tolerance:g})")
    if not report.modules and (report.only_in_a or report.only_in_b) and not report.extras:
        return "Nothing in common to compare"
    if math.isinf(report.relative):
        return "A changes no weight, B does"
    if report.relative > report.tolerance:
        return f"They differ by {_share(report.relative)}{' of' * (report.relative < _TIMES)} A"
    if report.changed_extras:
        return "The same change of the weights, but other tensors differ"
    what = "modules" if report.one_sided_modules else "tensors beside them"
    return f"The same update where both have a module, but not the same {what}"


def _facts(report: DiffReport, settings: Settings) -> Iterable[tuple[str, str]]:
    yield "A", report.a
    yield "B", report.b
    cosine = "" if report.cosine is None else f", cosine {report.cosine:.4f}"
    yield (
        "distance",
        f"{_short(report.distance)}, ‖A‖ = {_short(report.norm_a)}, ‖B‖ = {_short(report.norm_b)}{cosine}",
    )
    beside = f", and {counted(len(report.extras), 'tensor')} beside them" if report.extras else ""
    yield "compared", f"{counted(len(report.modules), 'module')} that both have{beside}"
    for side, names in (("A", report.only_in_a), ("B", report.only_in_b)):
        if names:
            yield f"only in {side}", f"{len(names):,}: {listed(names, settings, most=3)}"


def _show_modules(found: Iterable[ModuleDifference], each: bool) -> None:
    """The most different modules, or all of them."""
    ordered = sorted(found, key=lambda module: -module.relative)
    shown = ordered if each else [m for m in ordered if m.distance][:_WORST]
    if not shown:
        return
    kinds = any(module.kind_a != module.kind_b for module in ordered)
    columns = [
        "module",
        ">difference",
        ">cosine",
        ">‖A‖",
        ">‖B‖",
        ">rank A",
        ">rank B",
        ">overlap",
        ">by chance",
    ]
    rows = [
        (
            module.name,
            _share(module.relative),
            None if module.cosine is None else f"{module.cosine:.4f}",
            _short(module.norm_a),
            _short(module.norm_b),
            module.rank_a,
            module.rank_b,
            None if module.overlap is None else f"{module.overlap:.3f}",
            None if module.overlap_null is None else f"{module.overlap_null:.3f}",
            *([f"{module.kind_a}, {module.kind_b}"] if kinds else []),
        )
        for module in shown
    ]
    show_table([*columns, *(["kinds"] if kinds else [])], rows)
    if len(shown) < len(ordered):
        click.echo(f"the {len(shown)} most different of {len(ordered):,} modules; --modules shows all")


def _share(share: float | None) -> str:
    """A relative distance as people read it.

    >>> _share(0.0321), _share(3.2e-9), _share(1.5), _share(0), _share(float("inf"))
    ('3.2 %', '3.2e-09', '150 %', 'none', 'all (A is zero)')
    >>> _share(12.34), _share(3.2e50)
    ('12.3 times', '3.2e+50 times')
    """
    if share is None:
        return "not comparable"
    if math.isinf(share):
        return "all (A is zero)"
    if share == 0:
        return "none"
    if share < 1e-4:
        return f"{share:.1e}"
    if share >= _TIMES:
        return f"{share:.3g} times"
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 100 else f"{percent:.2g} %"


def _short(value: float) -> str:
    return f"{value:.4g}"


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict) and len(value) > 2:
        return counted(len(value), "entry", "entries")
    return "not set" if value is None else str(value)
