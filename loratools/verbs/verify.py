"""``verify``: replay a merge and say, tensor by tensor, whether the checkpoint holds what the arithmetic gives."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.dtypes import accumulator, compatible
from loratools.executors.base import make_executor
from loratools.models import open_base
from loratools.planning import CopyStep, WeightStep, plan_steps
from loratools.refs import local_path
from loratools.running import default_jobs, one_blas_thread
from loratools.tensors.base import TensorSpec
from loratools.verbs.merge import plan_merge
from loratools.verbs.reports import TensorVerdict, VerificationReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from loratools.adapter import Adapter
    from loratools.computing import Block
    from loratools.dtypes import Array
    from loratools.executors.base import Executor
    from loratools.merging import Conflict
    from loratools.planning import Output, Step
    from loratools.tensors.base import TensorRef, TensorSource
    from loratools.verbs.merge import MergePlan

__all__ = ["verify", "verify_merge"]

Ref = str | os.PathLike[str]
_SEVERITY = ("different", "shape", "wrong_scale", "unmerged", "missing", "unexpected", "rounding", "exact")
# A merge in float32 may add in another order; one that rounds more than once (each adapter in turn, or the delta
# before the sum) stays within this many spacings of the type, per adapter.
_SPACINGS = 1.0
_COPY_BLOCK = 8 << 20


def verify(
    base: Ref | Mapping[str, Any],
    adapters: Ref | Adapter | Sequence[Ref | Adapter],
    merged: Ref | Mapping[str, Any],
    *,
    weights: Sequence[float] | None = None,
    allow_unmatched: Iterable[str] = (),
    on_conflict: Conflict = "error",
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
    jobs: int | None = None,
    executor: str = "threads",
    on_step: Callable[[Step], None] | None = None,
) -> VerificationReport:
    """Compare a merged checkpoint, by whomever it was made, with the arithmetic of the merge.

    Args:
        base: as for :func:`loratools.merge`.
        adapters: as for :func:`loratools.merge`.
        merged: the checkpoint in question: a folder, a file or a state dict. Its dtypes and shards are its own affair.
        weights: as for :func:`loratools.merge`, and so are the others.

    Returns:
        A verdict for each tensor, worst first.

    Raises:
        LoratoolsError: base and adapters cannot be merged, or a file cannot be read.
    """
    planned = plan_merge(
        base, adapters, weights=weights, allow_unmatched=allow_unmatched, on_conflict=on_conflict,
        allow_pickle=allow_pickle, blockwise_experts=blockwise_experts,
    )  # fmt: skip
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    return verify_merge(planned, merged, workers, on_step=on_step)


def verify_merge(
    planned: MergePlan,
    merged: Ref | Mapping[str, Any],
    executor: Executor,
    *,
    on_step: Callable[[Step], None] | None = None,
) -> VerificationReport:
    """:func:`verify`, for a merge that has been planned already."""
    started = time.perf_counter()
    model = open_base(local_path(merged) if isinstance(merged, (str, os.PathLike)) else merged)
    found = model.source
    verdicts, outputs = _presence(planned, found)
    _, steps = plan_steps({"": outputs}, {})
    starts = {output.name: output.base for output in outputs if output.base is not None}
    seen: dict[str, _Comparison] = {}

    def work(step: Step) -> tuple[Step, dict[str, _Comparison]]:
        return step, (
            _compare_copy(step, starts, found) if isinstance(step, CopyStep) else _compare_weight(step, found)
        )

    with one_blas_thread():
        for step, parts in executor.map(work, steps):
            for name, part in parts.items():
                seen[name] = seen[name] + part if name in seen else part
            if on_step is not None:
                on_step(step)
    verdicts += [comparison.verdict(name) for name, comparison in seen.items()]
    verdicts.sort(key=lambda v: (_SEVERITY.index(v.verdict), v.name))
    label = str(Path(merged)) if isinstance(merged, (str, os.PathLike)) else "the state dict"
    return VerificationReport(
        merged=label,
        ok=all(v.ok for v in verdicts),
        summary=dict(Counter(v.verdict for v in verdicts)),
        modules=tuple(verdicts),
        seconds=time.perf_counter() - started,
    )


def _presence(planned: MergePlan, found: TensorSource) -> tuple[list[TensorVerdict], list[Output]]:
    """Tensors that are missing, unexpected or of another shape; and the others, to be computed in the type found."""
    expected = planned.merged.outputs
    verdicts = [TensorVerdict(name, "unexpected") for name in found.specs if name not in expected]
    outputs = []
    for name, output in expected.items():
        if name not in found.specs:
            verdicts.append(TensorVerdict(name, "missing"))
        elif found.specs[name].shape != output.spec.shape:
            verdicts.append(TensorVerdict(name, "shape"))
        elif output.spec.count == 0:
            verdicts.append(TensorVerdict(name, "exact"))
        else:
            dtype = found.specs[name].dtype
            if dtype != output.spec.dtype and not (compatible(dtype) and compatible(output.spec.dtype)):
                verdicts.append(TensorVerdict(name, "different"))
            else:
                outputs.append(replace(output, spec=TensorSpec(dtype, output.spec.shape)))
    return verdicts, outputs


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Sums over the entries of one matrix: of what was found, what is right, and what was there before."""

    count: int = 0
    differing: int = 0
    beyond: int = 0  # entries further off than rounding explains
    error: float = 0.0  # ‖found - expected‖²
    expected: float = 0.0  # ‖expected‖²
    actual_intended: float = 0.0  # ⟨found - before, expected - before⟩
    intended: float = 0.0  # ‖expected - before‖²
    actual: float = 0.0  # ‖found - before‖²
    noise: float = 0.0  # what rounding alone gives ‖found - exact‖², in expectation

    def __add__(self, other: _Comparison) -> _Comparison:
        return _Comparison(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def verdict(self, name: str) -> TensorVerdict:
        differing = self.differing / self.count
        relative = math.sqrt(self.error / self.expected) if self.expected else math.sqrt(self.error)
        if not self.differing:
            return TensorVerdict(name, "exact", 0.0, 0.0)
        if not self.beyond:
            return TensorVerdict(name, "rounding", differing, relative)
        if self.intended and not self.actual:
            return TensorVerdict(name, "unmerged", differing, relative, 0.0)
        if self.intended:
            scale = self.actual_intended / self.intended
            residual = self.actual - scale * self.actual_intended  # ‖actual - scale · intended‖²
            if residual <= 4 * self.noise + 1e-6 * self.actual:
                return TensorVerdict(name, "wrong_scale", differing, relative, scale)
        return TensorVerdict(name, "different", differing, relative)


def _values(comparison: _Comparison) -> tuple[Any, ...]:
    return tuple(getattr(comparison, name) for name in _Comparison.__slots__)


def _compare_copy(
    step: CopyStep, starts: Mapping[str, TensorRef], found: TensorSource
) -> dict[str, _Comparison]:
    """Tensors that should be the same bytes as where they start from: the base, or an adapter that replaces them.

    A step may be a part of one large tensor, or a run of several.
    """
    compared, position = {}, -step.skip
    for name in step.names:
        ref = starts[name]
        size = ref.spec.nbytes
        first, last = max(0, -position), min(size, step.nbytes - position)
        if first < last:
            width = max(1, ref.spec.dtype.bits // 8)
            compared[name] = _compare_bytes(ref, found, name, (first // width, last // width))
        position += size
    return compared


def _compare_bytes(ref: TensorRef, found: TensorSource, name: str, span: tuple[int, int]) -> _Comparison:
    import numpy as np

    total = _Comparison()
    for start in range(*span, _COPY_BLOCK):
        stop = min(start + _COPY_BLOCK, span[1])
        mine, theirs = ref.source.read_bytes(ref.name, start, stop), found.read_bytes(name, start, stop)
        differing = int(np.count_nonzero(mine != theirs))
        total += _Comparison(stop - start, differing, differing, float(differing), float(mine.size))
    return total


def _compare_weight(step: WeightStep, found: TensorSource) -> dict[str, _Comparison]:
    from loratools.computing import blocks, round_block

    total = _Comparison()
    for block in blocks(step, keep_before="all"):
        raw = round_block(step, block)
        first = block.start * step.columns
        theirs = found.read_bytes(step.name, first, first + block.values.size)
        total += _compare_block(step, block, raw, theirs)
    experts = len(step.spec.shape) == 3 and step.region_rows == step.spec.shape[1]
    name = f"{step.name}[{step.region // step.region_rows}]" if experts and step.contributions else step.name
    return {name: total}


def _compare_block(step: WeightStep, block: Block, raw: Array, theirs: Array) -> _Comparison:
    import numpy as np

    from loratools.dtypes import numpy_dtype, widen

    dtype = step.spec.dtype
    width = dtype.bits // 8
    same = (raw.reshape(-1, width) == theirs.reshape(-1, width)).all(axis=1)
    exact = block.values.reshape(-1).astype(np.float64)
    before = exact if block.before is None else block.before.reshape(-1).astype(np.float64)
    expected = widen(raw, dtype).astype(np.float64)
    actual = widen(theirs, dtype).astype(np.float64)
    both_nan = np.isnan(expected) & np.isnan(actual)
    for values in (exact, before, expected, actual):
        values[both_nan] = 0.0
    magnitude = np.maximum(np.maximum(np.abs(before), np.abs(exact)), np.abs(exact - before))
    spacing = np.abs(np.spacing(magnitude.astype(numpy_dtype(dtype)))).astype(np.float64)
    if dtype == accumulator(dtype):  # sums in another order, rather than a rounding to a narrower type
        spacing = np.maximum(spacing * 8, magnitude * 1e-6)
    apart = np.abs(actual - exact)
    terms = max(1, len(step.contributions))
    beyond = ~(apart <= spacing * (_SPACINGS * terms)) & ~same & ~both_nan
    return _Comparison(
        count=same.size,
        differing=int(same.size - np.count_nonzero(same | both_nan)),
        beyond=int(np.count_nonzero(beyond)),
        error=float(np.sum((actual - expected) ** 2)),
        expected=float(np.sum(expected**2)),
        actual_intended=float(np.sum((actual - before) * (exact - before))),
        intended=float(np.sum((exact - before) ** 2)),
        actual=float(np.sum((actual - before) ** 2)),
        noise=float(np.sum(spacing**2) / 12),
    )
