"""``loratools validate``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from loratools.cli.doorway import Misuse
from loratools.cli.engines import ENGINES, words_of
from loratools.cli.options import REF, pickles, shared
from loratools.cli.text import counted, one_line, say_json

if TYPE_CHECKING:
    from loratools.cli.settings import Settings
    from loratools.verbs.reports import Finding, ValidationReport

__all__ = ["command", "show_validation"]

_ORDER = ("error", "warning", "info")
_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


@click.command()
@click.argument("ref", type=REF)
@click.option("--base", type=REF, metavar="REF", help="The base model: every module must be there and fit.")
@click.option(
    "--for",
    type=ENGINES,
    metavar="ENGINE[,ENGINE...]",
    help="The programs that are to load it, such as vllm,llama.cpp: whether each does, and computes the same.",
)
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@click.option(
    "--format",
    type=click.Choice(["text", "json", "sarif", "github"]),
    default="text",
    help="For people, programs, code scanners, or GitHub's annotations.",
)
@click.option(
    "--config", type=click.Path(dir_okay=False), metavar="FILE", help="The adapter_config.json to read it by."
)
@pickles
@shared
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    ref: str,
    base: str | None,
    strict: bool,
    format: str,
    config: str | None,
    allow_pickle: bool,
    **named: Any,  # "for", a word that Python keeps to itself
) -> int:
    """Check an adapter: structure, configuration, NaN and Inf, and whether it fits a base and engines.

    Lists everything it finds, not only the first. Exit code 1 means that errors were found; that an engine loads the
    adapter and computes something else is one. `loratools engines` lists the engines.

    \b
    Examples:
      loratools validate my-adapter
      loratools validate my-adapter --base my-model --strict
      loratools validate my-adapter --for vllm,llama.cpp
      loratools validate my-adapter --format github
    """  # noqa: D301 - \b is click's
    settings: Settings = ctx.obj
    form = _form(ctx, format, json=settings.json)
    import loratools as lt

    report = lt.validate(
        ref, base=base, engines=named["for"] or (), strict=strict, config=config, allow_pickle=allow_pickle
    )
    if form == "json":
        say_json(report.to_dict())
    elif form == "text":
        show_validation(report, settings)
    else:
        from loratools.cli.annotations import show_github, show_sarif

        (show_sarif if form == "sarif" else show_github)(report)
    warned = strict and any(finding.severity == "warning" for finding in report.findings)
    return 0 if report.ok and not warned else 1


def _form(ctx: click.Context, format: str, *, json: bool) -> str:
    """What to print; of two wishes, that of the command line goes before that of a file.

    Raises:
        Misuse: both are of one place, and do not agree.
    """
    if not json or format in {"json", "text"}:
        return "json" if json else format
    typed = [ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in ("json", "format")]
    if typed[0] == typed[1]:
        raise Misuse(f"--json and --format {format} ask for two things", hint="leave one of them out")
    return "json" if typed[0] else format


def show_validation(report: ValidationReport, settings: Settings) -> None:
    """Print the findings, errors first."""
    ordered = sorted(report.findings, key=lambda finding: _ORDER.index(finding.severity))
    for finding in ordered:
        if finding.severity == "error" or not settings.quiet:
            _show_finding(finding)
    if settings.quiet:
        return
    for answer in report.engines:
        fine, bad = {answer.loads, answer.same_maths} == {"yes"}, "no" in (answer.loads, answer.same_maths)
        colour = "green" if fine else "red" if bad else "yellow"
        click.echo(f"{answer.name}: {click.style(one_line(words_of(answer)), fg=colour)}")
    count = Counter(finding.severity for finding in report.findings)
    nouns = {"error": "error", "warning": "warning", "info": "note"}
    found = [counted(count[severity], noun) for severity, noun in nouns.items() if count[severity]]
    path = one_line(report.path)
    seen = counted(len(report.modules), "module")
    verdict = click.style("ok" if report.ok else "not ok", fg="green" if report.ok else "red", bold=True)
    click.echo(f"{path}: {verdict}, {seen}, {', '.join(found) if found else 'nothing to report'}")


def _show_finding(finding: Finding) -> None:
    label = click.style(finding.severity.ljust(7), fg=_COLOURS[finding.severity], bold=True)
    told = finding.engine is not None and finding.where in finding.message
    where = f"{one_line(finding.where)}: " if finding.where and not told else ""
    code = finding.code if finding.engine is None else f"{finding.engine}: {finding.code}"
    click.echo(f"{label}  {where}{one_line(finding.message)} [{one_line(code)}]")
    if finding.hint:
        click.echo(f"         {click.style(one_line(finding.hint), dim=True)}")
