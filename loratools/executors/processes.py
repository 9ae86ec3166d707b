"""Processes of their own, started anew ("spawn"): nothing is shared with them but files.

Function and items are pickled once for each worker, so that references into the same header stay one object, and
workers are told which item is next by its number. A worker that dies takes the run with it, with an error that says
so.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import traceback
from typing import TYPE_CHECKING, Any, TypeVar

from loratools.errors import Incomplete, LoratoolsError, Unsupported
from loratools.executors.base import process_peak

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

__all__ = ["Processes"]

Item = TypeVar("Item")
Result = TypeVar("Result")
_NAME = "loratools-worker"


class Processes:
    """``jobs`` processes, started by each :meth:`map` and gone when it ends.

    Starting one takes about a tenth of a second, so this pays for long work that holds the interpreter's lock, and
    to keep the memory of workers apart. Function, items and results must pickle: files are opened again by each
    worker, tensors in memory travel by value.

    A script that starts processes is read again by each of them, as Python's ``multiprocessing`` does everywhere, so
    its work belongs under a guard::

        import loratools as lt

        if __name__ == "__main__":
            lt.merge("base", "adapter", "merged", executor="processes")

    The command line, notebooks and modules that are imported need none.

    Args:
        jobs: how many.

    Raises:
        Unsupported: asked for while a worker reads the script that started it: the guard is missing.
    """

    remote = True

    def __init__(self, jobs: int) -> None:
        import multiprocessing

        if multiprocessing.current_process().name.startswith(_NAME):
            raise Unsupported(
                "a worker process was asked to start workers of its own",
                hint='put the script\'s work under: if __name__ == "__main__":',
            )
        self.jobs = jobs
        self.peak_memory = 0

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See :class:`~loratools.executors.base.Executor`.

        Raises:
            Incomplete: a worker died.
            Unsupported: function or items cannot be pickled.
        """
        listed = list(items)
        if not listed:
            return
        payload = _pickled(function, listed)
        workers = _start(min(self.jobs, len(listed)))
        try:
            yield from self._share_out(workers, payload, len(listed))
        except BaseException:
            for worker in workers:
                worker.process.terminate()
            raise
        finally:
            for worker in workers:
                worker.link.close()
                worker.process.join()

    def _share_out(self, workers: list[_Worker], payload: bytes, count: int) -> Iterator[Any]:
        from multiprocessing.connection import wait

        numbers = iter(range(count))
        for worker in workers:
            worker.send(payload, next(numbers))
        peaks = 0
        busy: dict[Any, _Worker] = {worker.link: worker for worker in workers}
        while busy:
            for link in wait(list(busy)):
                worker = busy[link]
                outcome, value = worker.receive()
                if outcome == "error":
                    raise value
                if outcome == "peak":
                    peaks += value
                    del busy[link]
                    continue
                worker.send(
                    None, next(numbers, None)
                )  # first, so that it works while the result is looked at
                yield value
        self.peak_memory = max(self.peak_memory, peaks)


class _Worker:
    """One process, and the pipe to it, as its parent sees them."""

    def __init__(self, process: SpawnProcess, link: Connection) -> None:
        self.process = process
        self.link = link

    def send(self, payload: bytes | None, number: int | None) -> None:
        """The number of the next item, after the work itself the first time. What went wrong, :meth:`receive` tells."""
        with contextlib.suppress(ConnectionError):
            if payload is not None:
                self.link.send_bytes(payload)
            self.link.send(number)

    def receive(self) -> tuple[str, Any]:
        """What the worker says. A pipe that ends means a process that has."""
        try:
            outcome: tuple[str, Any] = self.link.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise _died(self.process.exitcode) from error
        return outcome


def _died(code: int | None) -> Incomplete:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "the system kills what needs too much memory: fewer --jobs need less, threads least"
        return Incomplete(f"a worker process was killed ({name})", hint=hint)
    hint = 'a script that uses processes needs its work under: if __name__ == "__main__":'
    return Incomplete(f"a worker process ended before its work (exit code {code})", hint=hint)


def _pickled(function: Any, items: list[Any]) -> bytes:
    try:
        return pickle.dumps((function, items), pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise Unsupported(
            f"the work cannot be handed to another process: {error}", hint="use --executor threads"
        ) from error


def _start(count: int) -> list[_Worker]:
    """Start workers that never see the terminal's interrupt: their parent does, and ends them."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    workers = []
    with _no_interrupts():
        for number in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), name=f"{_NAME}-{number}", daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, mine))
    return workers


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold SIGINT back, for this thread and for the processes it starts meanwhile, which inherit that."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(link: Connection) -> None:
    """A worker's life: take the work, then one number after another, until there is none or the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):
        work = _Work(link.recv_bytes())
        while (number := link.recv()) is not None:
            link.send_bytes(work.answer(number))
        link.send(("peak", process_peak() or 0))


class _Work:
    """Function and items as they came through the pipe, with BLAS held to one thread."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._loaded: tuple[Callable[[Any], Any], list[Any]] | None = None

    def answer(self, number: int) -> bytes:
        """What becomes of an item, pickled: its result, or the error that came instead."""
        try:
            function, items = self._load()
            return pickle.dumps(("result", function(items[number])), pickle.HIGHEST_PROTOCOL)
        except BaseException as error:  # raised again in the parent
            return pickle.dumps(("error", _portable(error)))

    def _load(self) -> tuple[Callable[[Any], Any], list[Any]]:
        if self._loaded is None:
            import numpy  # noqa: F401, ICN001 - its BLAS must be loaded to be limited
            from threadpoolctl import threadpool_limits

            threadpool_limits(1, "blas")  # for as long as the process lives
            self._loaded, self._payload = pickle.loads(self._payload), b""  # noqa: S301 - from the parent
        return self._loaded


def _portable(error: BaseException) -> BaseException:
    """The error as it can travel, with the trace it left here as a note."""
    if not isinstance(error, LoratoolsError):
        error.add_note("In a worker process:\n" + "".join(traceback.format_exception(error)).rstrip())
    try:
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
    except Exception:  # pickling calls code of the error's own, which may raise anything
        again = None
    if type(again) is type(error) and str(again) == str(error):
        return error
    kept = RuntimeError(f"{type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", ()):
        kept.add_note(note)
    return kept
