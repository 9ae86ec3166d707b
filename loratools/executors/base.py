"""The seam between a plan and whatever runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from loratools.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Executor", "make_executor"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs a function over items, in any order."""

    jobs: int

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results as they come. The first exception stops the rest and is raised."""
        ...


def make_executor(name: str, jobs: int) -> Executor:
    """An executor by name.

    Raises:
        Unsupported: one this build does not have.
    """
    from loratools.executors.inline import Inline
    from loratools.executors.threads import Threads

    if name == "inline" or (name == "threads" and jobs == 1):
        return Inline()
    if name == "threads":
        return Threads(jobs)
    raise Unsupported(f"executor {name!r} is not in this build", hint="use inline or threads")
