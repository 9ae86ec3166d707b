"""One after another, in the calling thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Inline"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Inline:
    """The simplest executor."""

    jobs = 1
    remote = False
    peak_memory = 0

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See :class:`~loratools.executors.base.Executor`."""
        return map(function, items)
