"""A bar on stderr while weights are computed: on a terminal only, and gone when done."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loratools.cli.settings import Settings

__all__ = ["progress", "wants_progress"]


class Weighed(Protocol):
    """A step of any verb."""

    @property
    def nbytes(self) -> int:
        """Its share of the work, in bytes."""
        ...


def wants_progress(settings: Settings) -> bool:
    """Whether somebody is watching."""
    return sys.stderr.isatty() and not settings.quiet


@contextlib.contextmanager
def progress(
    label: str, total: int, settings: Settings, then: str | None = None
) -> Iterator[Callable[[Weighed], None] | None]:
    """A bar over the bytes of a plan.

    Args:
        label: what is being done.
        total: bytes of all steps.
        settings: whether there is to be a bar at all.
        then: what is being done once all steps are, if that takes time too.

    Yields:
        What to call after each step; None without a bar.
    """
    if not wants_progress(settings):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), Speed(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        done = 0

        def on_step(step: Weighed) -> None:
            nonlocal done
            done += step.nbytes
            bar.update(task, completed=min(done, total))
            if then is not None and done >= total:
                bar.update(task, description=then, total=None)

        yield on_step
