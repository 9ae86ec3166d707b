"""A step's arithmetic held against what a checkpoint holds: what rounding explains, and what it does not.

A merge by somebody else may round more than once: the delta before the sum, or after each of several adapters. Each
entry may therefore be off by one spacing of the type for each adapter, of the largest value met on the way. Where the
deltas are smaller than that, no single entry tells anything, but all of them together do: roundings fall to both
sides, and a missing or halved delta leans to one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools.computing import blocks, round_block
from loratools.dtypes import accumulator, narrow, numpy_dtype, widen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratools.computing import Block
    from loratools.dtypes import Array, Dtype
    from loratools.planning import WeightStep
    from loratools.tensors.base import TensorRef, TensorSource

__all__ = ["Comparison", "Lean", "compare_copy", "compare_step"]

_COPY_BLOCK = 8 << 20  # elements
_FLOAT32_NOISE = 1e-6  # relative: a merge in the type it is stored in may add in another order
_PLAIN = 4  # spacings: a change that no rounding hides
_ENOUGH = 8  # entries of that kind
_LEANING = 8.0  # standard deviations
_LEANING_SHARE = (
    0.05  # of the change that survives rounding: less is no other scale, but another order of adding
)


@dataclass(frozen=True, slots=True)
class Lean:
    """How deviations from a reference lie along the intended change, summed over entries.

    Attributes:
        along: ⟨deviation, intended⟩.
        spread: Σ deviation² · intended², the variance of ``along`` if their signs were tossed.
        kept: ⟨reference - before, intended⟩.
    """

    along: float = 0.0
    spread: float = 0.0
    kept: float = 0.0

    def __add__(self, other: Lean) -> Lean:
        return Lean(self.along + other.along, self.spread + other.spread, self.kept + other.kept)

    @property
    def is_one_sided(self) -> bool:
        """Whether more of the change is there, or less, than chance explains."""
        return abs(self.along) > max(
            _LEANING * math.sqrt(self.spread),
            _LEANING_SHARE * abs(self.kept),
            _FLOAT32_NOISE * abs(self.kept),
        )


@dataclass(frozen=True, slots=True)
class Slope:
    """What was found against what was intended, over the entries whose change rounding cannot hide.

    Attributes:
        count: entries.
        product: ⟨found - before, exact - before⟩.
        intended: ‖exact - before‖².
        actual: ‖found - before‖².
        noise: what one rounding gives ‖found - exact‖² at most, Σ spacing² / 4.
    """

    count: int = 0
    product: float = 0.0
    intended: float = 0.0
    actual: float = 0.0
    noise: float = 0.0

    def __add__(self, other: Slope) -> Slope:
        return Slope(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    @property
    def scale(self) -> float | None:
        """The factor between the two, if it explains what was found to within a rounding."""
        if self.count < _ENOUGH:
            return None
        scale = self.product / self.intended
        residual = self.actual - scale * self.product  # ‖found - before - scale · intended‖²
        return scale if residual <= 2 * self.noise + _FLOAT32_NOISE * self.actual else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sums over the entries of one matrix: of what was found, what is right, and what was there before.

    Attributes:
        count: entries.
        differing: entries that are not the bytes expected.
        beyond: entries further off than rounding explains.
        error: ‖found - expected‖².
        expected: ‖expected‖².
        intended: ‖exact - before‖².
        actual: ‖found - before‖².
        slope: between the two.
        once: deviations from values rounded once.
        each: deviations from values rounded after each adapter.
        settled: entries of other parts of the matrix, which are as expected.
    """

    count: int = 0
    differing: int = 0
    beyond: int = 0
    error: float = 0.0
    expected: float = 0.0
    intended: float = 0.0
    actual: float = 0.0
    slope: Slope = Slope()
    once: Lean = Lean()
    each: Lean = Lean()
    settled: int = 0

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    @property
    def is_right(self) -> bool:
        """Whether rounding explains every difference, and all of them together."""
        return not self.beyond and not (self.once.is_one_sided and self.each.is_one_sided)

    @property
    def is_unmerged(self) -> bool:
        """Whether nothing has changed where something should have."""
        return bool(self.intended) and not self.actual and not self.settled

    @property
    def scale(self) -> float | None:
        """What the intended change was multiplied by, if that explains what was found to within a rounding."""
        return None if self.settled else self.slope.scale


def _values(sums: Comparison | Slope) -> tuple[Any, ...]:
    return tuple(getattr(sums, name) for name in type(sums).__slots__)


def compare_copy(ref: TensorRef, found: TensorSource, name: str, span: tuple[int, int]) -> Comparison:
    """Elements that should be the bytes of ``ref``.

    Args:
        ref: the right values.
        found: where ``name`` holds the others.
        name: of the tensor in question.
        span: first element and one past the last.
    """
    total = Comparison()
    for start in range(*span, _COPY_BLOCK):
        stop = min(start + _COPY_BLOCK, span[1])
        mine, theirs = ref.source.read_bytes(ref.name, start, stop), found.read_bytes(name, start, stop)
        differing = stop - start - _same(mine, theirs, stop - start)
        total += Comparison(stop - start, differing, differing, float(differing), float(stop - start))
    return total


def _same(mine: Array, theirs: Array, count: int) -> int:
    """How many of ``count`` elements are the same bytes."""
    if np.array_equal(mine, theirs):
        return count
    width = max(1, mine.size // count)
    return int(np.count_nonzero((mine.reshape(-1, width) == theirs.reshape(-1, width)).all(axis=1)))


def compare_step(step: WeightStep, found: TensorSource) -> Comparison:
    """Rows that a step computes, against the same rows of ``found``: bytes first, and sums where those differ."""
    count = (step.stop - step.start) * step.columns
    for block in blocks(step):
        if not np.array_equal(round_block(step, block), _theirs(step, block, found)):
            break
    else:
        return Comparison(count, settled=count if step.contributions else 0)
    total = Comparison()
    for block, trail in _replayed(step):
        raw = round_block(step, block)
        total += _compare_block(
            step.spec.dtype, max(1, len(step.contributions)), trail, raw, _theirs(step, block, found)
        )
    return total


def _theirs(step: WeightStep, block: Block, found: TensorSource) -> Array:
    first = block.start * step.columns
    return found.read_bytes(step.name, first, first + block.values.size)


class _Trail:
    """The values of a block on their way from the base through each adapter, in float64."""

    def __init__(self, dtype: Dtype) -> None:
        self.dtype = dtype
        self.before: Array | None = None

    def add(self, block: Block) -> None:
        """Go on to the values after one more adapter."""
        values = block.values.reshape(-1).astype(np.float64)
        if self.before is None:
            assert block.before is not None
            self.before = block.before.reshape(-1).astype(np.float64)
            self.exact = self.rounded = self.before
            self.largest = np.abs(self.before)
        step = values - self.exact
        self.largest = np.maximum(self.largest, np.maximum(np.abs(values), np.abs(step)))
        self.rounded = _rounded(self.rounded + step, self.dtype)
        self.exact = values


def _rounded(values: Array, dtype: Dtype) -> Array:
    if dtype == accumulator(dtype):
        return values
    raw = narrow(values.astype(np.float32), dtype, np.empty(dtype.nbytes(values.size), np.uint8))
    return widen(raw, dtype).astype(np.float64)


def _replayed(step: WeightStep) -> Iterator[tuple[Block, _Trail]]:
    """The blocks of a step, and the trail to each. Blocks share a buffer: each is used before the next."""
    partial = [
        replace(step, contributions=step.contributions[:count]) for count in range(1, len(step.contributions))
    ]
    runs = [blocks(one, keep_before="all") for one in (*partial, step)]
    for _ in range(step.start, step.stop, step.block_rows):
        trail = _Trail(step.spec.dtype)
        for run in runs:
            block = next(run)
            trail.add(block)
        yield block, trail


def _compare_block(dtype: Dtype, adapters: int, trail: _Trail, raw: Array, theirs: Array) -> Comparison:
    expected, actual = widen(raw, dtype).astype(np.float64), widen(theirs, dtype).astype(np.float64)
    same = (expected == actual) | (np.isnan(expected) & np.isnan(actual))
    before, exact = trail.before, trail.exact
    assert before is not None
    spacing = _spacing(trail.largest, dtype)
    beyond = ~(np.abs(actual - exact) <= spacing * adapters) & ~same
    known = np.isfinite(expected) & np.isfinite(before)  # the others are counted, and kept out of the sums
    for values in (expected, actual, exact, before, spacing, trail.rounded):
        values[~known] = 0.0
    intended, change = exact - before, actual - before
    return Comparison(
        count=same.size,
        differing=int(same.size - np.count_nonzero(same)),
        beyond=int(np.count_nonzero(beyond)),
        error=float(np.dot(actual - expected, actual - expected)),
        expected=float(np.dot(expected, expected)),
        intended=float(np.dot(intended, intended)),
        actual=float(np.dot(change, change)),
        slope=_slope(change, intended, spacing, _spacing(np.maximum(trail.largest, np.abs(actual)), dtype)),
        once=_lean(actual, expected, before, intended),
        each=_lean(actual, trail.rounded, before, intended),
    )


def _spacing(magnitude: Array, dtype: Dtype) -> Array:
    """The distance between values of a type; where sums are computed in it, what another order of adding gives."""
    finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
    spacing: Array = np.abs(np.spacing(finite.astype(numpy_dtype(dtype)))).astype(np.float64)
    if dtype == accumulator(dtype):
        np.maximum(spacing * 8, finite * _FLOAT32_NOISE, out=spacing)
    return spacing


def _slope(change: Array, intended: Array, spacing: Array, noise: Array) -> Slope:
    plain = np.abs(intended) >= _PLAIN * spacing
    change, intended, noise = change[plain], intended[plain], noise[plain]
    return Slope(
        intended.size,
        float(np.dot(change, intended)),
        float(np.dot(intended, intended)),
        float(np.dot(change, change)),
        float(np.dot(noise, noise)) / 4,
    )


def _lean(actual: Array, reference: Array, before: Array, intended: Array) -> Lean:
    pull = (actual - reference) * intended
    return Lean(float(pull.sum()), float(np.dot(pull, pull)), float(np.dot(reference - before, intended)))
