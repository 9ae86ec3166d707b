"""``loratools.toml``: a table for each command, checked against the options that command has."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from loratools.errors import BadConfig, NotFound

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["CONFIG_VARIABLE", "FILE_NAME", "origin", "read_defaults", "strength", "strongest"]

FILE_NAME = "loratools.toml"
CONFIG_VARIABLE = "LORATOOLS_CONFIG"
# A downloaded folder may bring a loratools.toml of its own. It cannot say what a user must say in person.
_NEVER_FOUND = frozenset({"allow_pickle", "force"})


_STRENGTHS = {ParameterSource.COMMANDLINE: 3, ParameterSource.ENVIRONMENT: 2, ParameterSource.DEFAULT_MAP: 1}


def strength(name: str) -> int:
    """How strongly a parameter of the command at hand was set: 3 typed, 2 environment, 1 a file, 0 not at all."""
    context = click.get_current_context(silent=True)
    source = None if context is None else context.get_parameter_source(name)
    return 0 if source is None else _STRENGTHS.get(source, 0)


def strongest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of parameters that exclude each other, those that were set most strongly; defaults give way to what was typed.

    Args:
        values: by parameter; None, False and nothing at all are not set.

    Returns:
        The same names; None, or False, where a value gave way.
    """
    given = {name: strength(name) for name, value in values.items() if _is_set(value)}
    most = max(given.values(), default=0)
    return {
        name: value if given.get(name, most) == most else (False if value is True else None)
        for name, value in values.items()
    }


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != ()


def origin(name: str) -> str:
    """Where a parameter's value came from, to put behind its name in a message; empty where it was typed."""
    context = click.get_current_context(silent=True)
    if context is None:
        return ""
    source = context.get_parameter_source(name)
    if source is ParameterSource.ENVIRONMENT:
        return f" (from the environment: {context.auto_envvar_prefix}_{name.upper()})"
    if source is ParameterSource.DEFAULT_MAP:
        return f" (from {getattr(context.obj, 'defaults_from', None) or FILE_NAME})"
    return ""


def read_defaults(
    name: str, command: click.Command, commands: Sequence[str]
) -> tuple[str | None, dict[str, Any]]:
    """The defaults a file gives one command.

    Args:
        name: of the command.
        command: whose options may be set.
        commands: names that a table may have.

    Returns:
        The file's name, if there is one, and values by parameter.

    Raises:
        NotFound: ``LORATOOLS_CONFIG`` names a file that is not there.
        BadConfig: not TOML, an unknown table or option, or a value of the wrong type.
    """
    named = os.environ.get(CONFIG_VARIABLE)
    path = Path(FILE_NAME if named is None else named)
    if named == "" or (named is None and not path.is_file()):
        return None, {}
    if not path.is_file():
        raise NotFound(f"{path}: no such file", hint=f"{CONFIG_VARIABLE} names it")
    document = _parse(path)
    for key, table in document.items():
        if key not in commands:
            raise _unknown(path, "table", f"[{key}]", key, commands)
        if not isinstance(table, dict):
            raise BadConfig(f"{path}: {key} must be a table", hint=f"write [{key}] on a line of its own")
    return str(path), _values(path, name, command, document.get(name, {}), found=named is None)


def _parse(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{path}: is not TOML: {error}") from error


def _values(
    path: Path, name: str, command: click.Command, table: Mapping[str, Any], *, found: bool
) -> dict[str, Any]:
    options = {
        spelling.removeprefix("--"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for spelling in parameter.opts
        if spelling.startswith("--")
    }
    values = {}
    for key, value in table.items():
        option = options.get(key.replace("_", "-"))
        if option is None or option.name is None:
            raise _unknown(path, "option", f"[{name}] {key}", key, sorted(options))
        if found and option.name in _NEVER_FOUND and value:
            raise BadConfig(
                f"{path}: [{name}] {key} cannot be set by a file that happens to lie in the current folder",
                hint=f"give it on the command line, or name the file in {CONFIG_VARIABLE}",
            )
        values[option.name] = _value(path, f"[{name}] {key}", option, value)
    return values


def _unknown(path: Path, what: str, shown: str, key: str, known: Sequence[str]) -> BadConfig:
    close = get_close_matches(key.replace("_", "-"), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
    return BadConfig(f"{path}: unknown {what} {shown}", hint=hint)


def _value(path: Path, where: str, option: click.Option, value: Any) -> Any:
    """A value, checked as the option itself would check it, but without taking text for a number."""
    items = value if option.multiple and isinstance(value, list) else [value]
    expected, kinds = _expected(option)
    for item in items:
        if type(item) not in kinds:
            raise BadConfig(f"{path}: {where} must be {expected}, not {item!r}")
        try:
            option.type.convert(item, option, None)
        except click.BadParameter as error:
            raise BadConfig(f"{path}: {where}: {error.message}") from error
    return items if option.multiple else value


def _expected(option: click.Option) -> tuple[str, tuple[type, ...]]:
    if option.is_flag:
        return "true or false", (bool,)
    kinds: dict[str, tuple[str, tuple[type, ...]]] = {
        "integer range": ("a whole number", (int,)),
        "integer": ("a whole number", (int,)),
        "number": ("a number", (int, float)),
        "float": ("a number", (int, float)),
        "float range": ("a number", (int, float)),
        "size": ('a size such as "2GB"', (int, str)),
    }
    return kinds.get(option.type.name, ("text", (str,)))
