"""``run``: the only place where a plan becomes bytes."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from loratools.errors import LoratoolsError, Unsupported
from loratools.executors.base import process_peak
from loratools.planning import CopyStep, WeightStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

    from loratools.computing import Survival
    from loratools.dtypes import Array
    from loratools.executors.base import Executor
    from loratools.models import BaseModel
    from loratools.planning import Plan, Step

__all__ = [
    "RunResult", "Sink", "Writer", "default_jobs", "gather", "one_blas_thread", "peak_memory", "quiet",
    "require_files", "run",
]  # fmt: skip

Item = TypeVar("Item")
Result = TypeVar("Result")
Measure = Literal["none", "first", "all"]


class Writer(Protocol):
    """What a step writes with."""

    def write(self, step: WeightStep, start: int, raw: Array) -> None:
        """Rows of a weight, rounded, from row ``start``. ``raw`` is reused by the next call."""
        ...

    def copy(self, step: CopyStep) -> None:
        """A run of bytes from the base."""
        ...


class Sink(Writer, Protocol):
    """Where a plan's bytes go."""

    done: set[int]

    def writer(self) -> Writer:
        """What another process writes with: it pickles, and counts nothing."""
        ...

    def finish(self, index: int, step: Step) -> None:
        """All of a step's bytes are written."""
        ...

    def publish(self) -> None:
        """Everything is written: let it appear."""
        ...

    def abandon(self, *, keep: bool) -> None:
        """Something failed; ``keep`` what a later run can go on from."""
        ...


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did.

    Attributes:
        seconds: wall time of the steps and of publishing.
        resumed: steps an earlier run had done already.
        survival: by weight, where it was measured.
    """

    seconds: float
    resumed: int
    survival: dict[str, Survival] = field(default_factory=dict)


def run(
    plan: Plan,
    sink: Sink,
    executor: Executor,
    *,
    measure: Measure = "first",
    on_step: Callable[[Step], None] | None = None,
) -> RunResult:
    """Compute every step into the sink, then publish.

    Args:
        plan: what to do.
        sink: where to.
        executor: how.
        measure: how much of each weight to measure the survival of the change on.
        on_step: called in this thread after each step, for progress.

    Raises:
        LoratoolsError: a step cannot be computed; nothing was published.
    """
    started = time.perf_counter()
    todo = [(index, step) for index, step in enumerate(plan.steps) if index not in sink.done]
    resumed = len(plan.steps) - len(todo)
    seen_at: dict[int, Survival] = {}

    def here(item: tuple[int, Step]) -> tuple[int, Survival | None]:
        if isinstance(item[1], WeightStep):
            blas.limit()
        done = _work(item, sink, measure)
        sink.finish(*item)
        return done

    try:
        with _Blas() as blas:
            work = partial(_work, writer=sink.writer(), measure=measure) if executor.remote else here
            for index, seen in executor.map(work, _in_order(todo, executor.jobs)):
                if executor.remote:
                    sink.finish(index, plan.steps[index])
                if seen is not None:
                    seen_at[index] = seen
                if on_step is not None:
                    on_step(plan.steps[index])
        sink.publish()
    except BaseException as error:
        # What the inputs forbid will be forbidden again; what the machine did may be gone on from.
        sink.abandon(keep=not isinstance(error, LoratoolsError) or isinstance(error, OSError))
        raise
    return RunResult(time.perf_counter() - started, resumed, _by_weight(plan, seen_at))


def gather(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    executor: Executor,
    *,
    on_step: Callable[[Item], None] | None = None,
) -> list[Result]:
    """Apply a function to independent items, BLAS at one thread.

    Args:
        function: of a module, or a partial of one, so that another process can be told of it.
        items: what to work on.
        executor: how.
        on_step: called in this thread after each item, for progress.

    Returns:
        The results in the order of the items.
    """
    results: list[Any] = [None] * len(items)
    with one_blas_thread():
        for index, result in executor.map(partial(_numbered, function), list(enumerate(items))):
            results[index] = result
            if on_step is not None:
                on_step(items[index])
    return results


def _numbered(function: Callable[[Item], Result], numbered: tuple[int, Item]) -> tuple[int, Result]:
    with quiet():
        return numbered[0], function(numbered[1])


def _work(item: tuple[int, Step], writer: Writer, measure: Measure) -> tuple[int, Survival | None]:
    """One step, in whatever thread or process it falls to."""
    index, step = item
    if isinstance(step, CopyStep):
        writer.copy(step)
        return index, None
    with quiet():
        return index, _compute(step, writer, measure)


def _compute(step: WeightStep, writer: Writer, measure: Measure) -> Survival | None:
    """Compute a step's blocks and write them in stripes: fewer, longer writes hold up other workers less."""
    import numpy as np

    from loratools.computing import Survival, blocks, round_block, stripe
    from loratools.dtypes import widen

    seen = None
    gathered, filled, start = stripe(step), 0, step.start
    for block in blocks(step, keep_before=measure):
        count = step.spec.dtype.nbytes(block.values.size)
        if filled + count > gathered.size:
            writer.write(step, start, gathered[:filled])
            filled, start = 0, block.start
        raw = round_block(step, block, gathered[filled : filled + count])
        filled += count
        if block.before is not None:
            seen = seen or Survival()
            head = raw[: step.spec.dtype.nbytes(block.before.size)]
            rounded = widen(head, step.spec.dtype, np.empty(block.before.size, block.values.dtype))
            seen.add(block, rounded.reshape(block.before.shape))
    writer.write(step, start, gathered[:filled])
    return seen


class _Blas:
    """One thread for BLAS from the first step that computes on: until then another worker copies, and numpy loads."""

    def __init__(self) -> None:
        self._limits = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._limited = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._limits.close()

    def limit(self) -> None:
        """Hold BLAS to one thread until this context ends."""
        with self._lock:
            if not self._limited:
                self._limits.enter_context(one_blas_thread())
                self._limited = True


def _in_order(steps: list[tuple[int, Step]], jobs: int) -> Iterator[tuple[int, Step]]:
    """One step that computes, so that its worker loads numpy; the copies, which need none; then the others."""
    copies = [item for item in steps if isinstance(item[1], CopyStep)]
    computed = _interleave([item for item in steps if not isinstance(item[1], CopyStep)], jobs)
    yield from itertools.islice(computed, 1)
    yield from copies
    yield from computed


def _interleave(steps: list[tuple[int, Step]], jobs: int) -> Iterator[tuple[int, Step]]:
    """The steps in an order in which workers write to different files: two writers of one file wait for each other."""
    by_file: dict[int, list[tuple[int, Step]]] = {}
    for item in steps:
        by_file.setdefault(item[1].file, []).append(item)
    queues = list(by_file.values())
    for first in range(0, len(queues), jobs):
        for row in itertools.zip_longest(*queues[first : first + jobs]):
            yield from (item for item in row if item is not None)


def _by_weight(plan: Plan, seen_at: dict[int, Survival]) -> dict[str, Survival]:
    """Sums by weight, added in the order of the steps whatever order they came in."""
    total: dict[str, Survival] = {}
    for index in sorted(seen_at):
        step = plan.steps[index]
        assert isinstance(step, WeightStep)
        if step.name in total:
            total[step.name].merge(seen_at[index])
        else:
            total[step.name] = seen_at[index]
    return total


def require_files(executor: Executor, model: BaseModel) -> None:
    """Refuse a model in memory where the workers are other processes, which share nothing but files.

    Raises:
        Unsupported: with the name of the model.
    """
    if executor.remote and model.kind == "memory":
        raise Unsupported(
            f"executor 'processes' cannot read {model.name}: its workers share nothing but files",
            hint="use threads, or give a path",
        )


def quiet() -> contextlib.AbstractContextManager[Any]:
    """No warnings from numpy in this thread: values that are not finite are looked for and named elsewhere."""
    import numpy as np

    return np.errstate(all="ignore")


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS at one thread while workers run side by side: the same bytes for any number of them, and no barriers."""
    import numpy  # noqa: F401, ICN001 - its BLAS must be loaded to be limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def default_jobs() -> int:
    """Workers to use where nothing is said: the processors this process may run on, four at most."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 4)


def peak_memory(executor: Executor | None = None) -> int | None:
    """Most memory this process has held so far, in bytes; None where the system does not say.

    With an executor whose workers are processes, what each of them has held at most is added: no less than the peak
    of all together.
    """
    own = process_peak()
    return own if own is None or executor is None else own + executor.peak_memory
