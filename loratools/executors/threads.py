"""A few threads that take the next item when they are free. numpy and the kernel release the interpreter's lock."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Threads"]

Item = TypeVar("Item")
Result = TypeVar("Result")
_END = object()


class Threads:
    """``jobs`` threads, started anew by each :meth:`map`."""

    remote = False
    peak_memory = 0

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See :class:`~loratools.executors.base.Executor`."""
        results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        todo, lock, stop = iter(items), threading.Lock(), threading.Event()

        def work() -> None:
            try:
                while not stop.is_set():
                    with lock:
                        item: Any = next(todo, _END)
                    if item is _END:
                        break
                    results.put((function(item), None))
                results.put((_END, None))
            except BaseException as error:  # raised again in the caller's thread
                results.put((_END, error))

        workers = [
            threading.Thread(target=work, name=f"loratools-{i}", daemon=True) for i in range(self.jobs)
        ]
        for worker in workers:
            worker.start()
        try:
            running = len(workers)
            while running:
                result, error = results.get()
                if error is not None:
                    raise error
                if result is _END:
                    running -= 1
                else:
                    yield result
        finally:
            stop.set()
            for worker in workers:
                worker.join()
