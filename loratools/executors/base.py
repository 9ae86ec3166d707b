"""The seam between a plan and whatever runs it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from loratools.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Executor", "make_executor", "process_peak"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs a function over items, in any order.

    Attributes:
        jobs: how many items are worked on at once.
        remote: whether that happens in other processes: function, items and results are pickled, and nothing else
            comes back.
        peak_memory: the most memory the workers have held, in bytes, where they are processes of their own; else 0.
    """

    jobs: int
    remote: bool
    peak_memory: int

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results as they come. The first exception stops the rest and is raised."""
        ...


def make_executor(name: str, jobs: int) -> Executor:
    """An executor by name: ``inline``, ``threads`` or ``processes``.

    Raises:
        Unsupported: one this build does not have, or without a worker.
    """
    if jobs < 1:
        raise Unsupported(f"jobs is {jobs!r}; there must be one worker at least")
    from loratools.executors.inline import Inline
    from loratools.executors.threads import Threads

    if name == "inline" or (name == "threads" and jobs == 1):
        return Inline()
    if name == "threads":
        return Threads(jobs)
    if name == "processes":
        from loratools.executors.processes import Processes

        return Processes(jobs)
    raise Unsupported(f"executor {name!r} is not in this build", hint="use inline, threads or processes")


def process_peak() -> int | None:
    """Most memory this process has held so far, in bytes; None where the system does not say."""
    with contextlib.suppress(
        OSError, ValueError
    ):  # Linux: rusage would count the process this one was forked from
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
