"""``loratools engines``, and the type of ``--for``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loratools.cli.options import shared
from loratools.cli.tables import show_table
from loratools.cli.text import say_json
from loratools.engines.base import NAMES, known

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from loratools.cli.settings import Settings
    from loratools.engines.base import Rule
    from loratools.verbs.reports import EngineAnswer

__all__ = ["ENGINE", "ENGINES", "command", "known_engines", "words_of"]


class EngineName(click.ParamType[str]):
    """The name of an engine, by any of its names."""

    name = "engine"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See :class:`click.ParamType`."""
        found = known(str(value))
        if found is None:
            self.fail(f"{str(value)!r} is no engine that is known: {', '.join(NAMES)} are.", param, ctx)
        return found

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """Names that begin so; behind a comma, the next one."""
        from click.shell_completion import CompletionItem

        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(before + comma + name) for name in NAMES if name.startswith(last)]


class EngineList(click.ParamType[tuple[str, ...]]):
    """Names of engines with commas between them."""

    name = "engines"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """See :class:`click.ParamType`."""
        if isinstance(value, tuple):
            return value
        names = [name for name in str(value).split(",") if name.strip()]
        if not names:
            self.fail(f"it names no engine; known are {', '.join(NAMES)}.", param, ctx)
        return tuple(dict.fromkeys(ENGINE.convert(name, param, ctx) for name in names))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """As for one engine."""
        return ENGINE.shell_complete(ctx, param, incomplete)


ENGINE = EngineName()
ENGINES = EngineList()


@click.command()
@shared
@click.pass_obj
def command(settings: Settings) -> None:
    """List the programs that `validate --for` and `normalize --for` know, and what each accepts.

    What is said of an engine holds for the version that was read. With -v also every rule; --json has everything.

    \b
    Examples:
      loratools engines
      loratools engines -v
      loratools engines --json | jq '.engines[] | {name, version}'
    """  # noqa: D301 - \b is click's
    engines = known_engines()
    if settings.json:
        say_json({"schema": "loratools.engines/1", "engines": engines})
        return
    rows = [
        (e["name"], e["version"], ", ".join(e["formats"]), e["scale"], e["ranks"], str(len(e["rules"])))
        for e in engines
    ]
    show_table(["engine", "version read", "formats", "scale", "rank", "rules"], rows)
    if settings.verbose:
        for entry in engines:
            click.echo(f"\n{entry['title']} {entry['version']}: opens {entry['opens']}")
            for rule in entry["rules"]:
                loads, maths = rule["loads"], rule["same_maths"]
                click.echo(
                    f"  {rule['id']} ({rule['severity']}; loads {loads}, same maths {maths}): {rule['message']}"
                )


_LOADS = {"yes": "loads", "no": "does not load", "unknown": "may load"}
_MATHS = {
    "yes": "computes the same",
    "no": "computes something else",
    "unknown": "may compute something else",
}


def words_of(answer: EngineAnswer) -> str:
    """What an engine does with an adapter, in a few words: does it load, does it compute the same, what to set."""
    if answer.loads == "no":
        return _LOADS["no"]
    said = [_LOADS[answer.loads], _MATHS[answer.same_maths]]
    if answer.flags:
        said.append(f"set {' '.join(answer.flags)}")
    return ", ".join(said)


def known_engines() -> list[dict[str, Any]]:
    """Every engine and its rules as plain data."""
    from loratools.engines.base import engine

    return [
        {
            "name": one.name,
            "title": one.title,
            "version": one.version,
            "source": one.source,
            "opens": one.opens,
            "scale": one.scale,
            "ranks": one.ranks,
            "formats": list(one.formats),
            "convert": one.convert,
            "rules": [_as_data(rule) for rule in one.rules],
        }
        for one in map(engine, NAMES)
    ]


def _as_data(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "check": rule.check,
        "parameters": dict(rule.parameters),
        "formats": list(rule.formats),
        "severity": rule.severity,
        "loads": rule.loads,
        "same_maths": rule.same_maths,
        "message": rule.message,
        "flag": rule.flag or None,
        "fix": rule.fix or None,
        "versions": rule.versions or None,
        "evidence": rule.evidence,
        "source": rule.source,
    }
