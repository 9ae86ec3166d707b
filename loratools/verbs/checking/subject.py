"""What is being checked, and how a finding is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.verbs.reports import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loratools.adapter import Adapter
    from loratools.errors import BadConfig
    from loratools.formats.opening import Opened
    from loratools.formats.peft_config import PeftConfig

__all__ = ["Subject", "error", "few", "info", "warning"]


@dataclass(frozen=True, slots=True)
class Subject:
    """An adapter under examination.

    Attributes:
        opened: its parts.
        config: PEFT's configuration; None for another format.
        adapter: what was made of both.
        faults: what was wrong with the configuration; grows while patterns are matched.
    """

    opened: Opened
    config: PeftConfig | None
    adapter: Adapter
    faults: list[BadConfig]

    def field(self, name: str) -> str:
        """Where a field of the configuration stands."""
        return f"{Path(str(self.opened.where)).name}: {name}"


def error(code: str, where: str, message: str, hint: str | None = None) -> Finding:
    """Something that makes the adapter wrong or useless."""
    return Finding(code, "error", where, message, hint)


def warning(code: str, where: str, message: str, hint: str | None = None) -> Finding:
    """Something that is probably not what was meant."""
    return Finding(code, "warning", where, message, hint)


def info(code: str, where: str, message: str, hint: str | None = None) -> Finding:
    """Something worth knowing."""
    return Finding(code, "info", where, message, hint)


def few(names: Iterable[str], most: int = 5) -> str:
    """Some names, and how many more there are.

    >>> few(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
