"""``loratools methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loratools.cli.options import shared
from loratools.cli.tables import show_table
from loratools.cli.text import say_json

if TYPE_CHECKING:
    from loratools.cli.settings import Settings
    from loratools.methods.base import Method, Option

__all__ = ["command", "known_methods"]


@click.command()
@shared
@click.pass_obj
def command(settings: Settings) -> None:
    """List the methods of combining adapters, with their options.

    A name is what --method of `loratools combine` takes. With -v also each option's meaning; --json has
    everything, formulas and papers included.

    \b
    Examples:
      loratools methods
      loratools methods -v
      loratools methods --json | jq '.methods[] | select(.name == "ties")'
    """  # noqa: D301 - \b is click's
    methods = known_methods()
    if settings.json:
        say_json({"schema": "loratools.methods/1", "methods": methods})
        return
    rows = [(_names(m), ", ".join(map(_flag, m["parameters"])), m["summary"]) for m in methods]
    show_table(["method", "options", "what it is"], rows)
    if settings.verbose:
        for entry in methods:
            _explain(entry)


def known_methods() -> list[dict[str, Any]]:
    """Every registered method as plain data, in the registry's order."""
    from loratools.methods import load

    return [_as_data(method) for method in load().values()]


def _as_data(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "aliases": list(method.aliases),
        "summary": method.summary,
        "formula": method.formula,
        "paper": method.paper or None,
        "when": method.when,
        "cost": method.cost,
        "spaces": list(method.spaces),
        "legacy": method.legacy,
        "adapters": {"least": method.least, "most": method.most},
        "parameters": [_parameter(option) for option in method.options],
    }


def _parameter(option: Option) -> dict[str, Any]:
    return {
        "name": option.name,
        "option": option.flag,
        "type": option.type.__name__,
        "default": option.default,
        "choices": list(option.choices),
        "range": None if option.choices or option.type not in {int, float} else str(option.range),
        "help": option.help,
    }


def _names(entry: dict[str, Any]) -> str:
    return ", ".join([entry["name"], *entry["aliases"]])


def _flag(parameter: dict[str, Any]) -> str:
    return f"{parameter['option']} {parameter['default']}"


def _explain(entry: dict[str, Any]) -> None:
    """A method's text, and a line for each of its options."""
    click.echo(f"\n{_names(entry)}: {entry['when'] or entry['summary']}")
    if entry["paper"]:
        click.echo(f"  {entry['paper']}")
    for parameter in entry["parameters"]:
        values = "|".join(parameter["choices"]) or parameter["range"] or parameter["type"]
        click.echo(f"  {parameter['option']} ({values}; default {parameter['default']}): {parameter['help']}")
