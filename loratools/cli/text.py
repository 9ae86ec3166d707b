"""Numbers and names as people read them, and the only functions that write to stdout."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from loratools.errors import printable, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loratools.cli.settings import Settings

__all__ = [
    "counted", "fields", "listed", "one_line", "percent", "plain_output", "say_json", "size", "spread",
    "warn",
]  # fmt: skip


def one_line(text: object) -> str:
    r"""Text from anywhere, as one line that cannot move the cursor.

    >>> one_line("model\n\x1b[2J")
    'model\\n\\x1b[2J'
    """
    return printable(str(text)).replace("\n", "\\n")


def plain_output() -> bool:
    """Whether colour is unwelcome: https://no-color.org, and terminals that have none."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def percent(share: float) -> str:
    """A share of one; 100% only for all of it.

    >>> percent(1.0), percent(0.99996), percent(1.00004), percent(0.931)
    ('100%', '>99.9%', '100.0%', '93.1%')
    """
    if share < 1 and f"{share:.1%}" == "100.0%":
        return ">99.9%"
    if share > 0 and f"{share:.1%}" == "0.0%":
        return "<0.1%"
    return f"{share:.0%}" if share in {0, 1} else f"{share:.1%}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number of things.

    >>> counted(1, "module"), counted(1200, "module")
    ('1 module', '1,200 modules')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def spread(low: float | None, high: float | None) -> str:
    """Least and greatest of something.

    >>> spread(8, 8), spread(4, 16), spread(None, None)
    ('8', '4 to 16', 'not known')
    """
    if low is None or high is None:
        return "not known"
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def listed(names: Sequence[str], settings: Settings, most: int = 6) -> str:
    """Names behind one another: all of them with ``--verbose``, else the first few and a count.

    >>> from loratools.cli.settings import Settings
    >>> listed(["a", "b", "c", "d"], Settings(), most=2)
    'a, b and 2 more (--verbose lists all)'
    """
    if settings.verbose or len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most:,} more (--verbose lists all)"


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values, aligned."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        label = click.style(one_line(name).ljust(width), dim=True)
        click.echo(f"  {label}  {one_line(value)}".rstrip())


def warn(messages: Iterable[str], settings: Settings) -> None:
    """Warnings, on stderr."""
    if settings.quiet:
        return
    for message in messages:
        click.echo(f"{click.style('Warning:', fg='yellow', bold=True)} {one_line(message)}", err=True)


def say_json(document: dict[str, Any]) -> None:
    """Print a document. Everything beyond ASCII is escaped, so no name in it can play with a terminal."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))
