"""A step's arithmetic held against what a checkpoint holds: what rounding explains, and what it does not.

A merge by somebody else may round more than once: the delta before the sum, or after each of several adapters. Each
entry may therefore be off by one spacing of the type for each adapter, of the largest value met on the way. Where the
deltas are smaller than that, no single entry tells anything, but all of them together do: roundings fall to both
sides, and a missing or halved delta leans to one.

Bytes are compared first. Where a few elements differ, as where somebody added in another order, only these are judged:
all others are what they should be, and add nothing to a deviation or a lean.
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
# One in so many of the elements that a merge changes: a wrong scale or a missing delta alters a good share of them.
_FEW = 1000
# Relative: a merge in the type it is stored in may add in another order.
_FLOAT32_NOISE = 1e-6
# Spacings that a change must span for no rounding to hide it, and how many entries of that kind show a scale.
_PLAIN = 4
_ENOUGH = 8
# Standard deviations, and share of the change that survives rounding: less is no other scale, but another order of
# adding.
_LEANING = 8.0
_LEANING_SHARE = 0.05


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
        return not self.is_chance and abs(self.along) > _LEANING_SHARE * abs(self.kept)

    @property
    def is_chance(self) -> bool:
        """Whether signs that were tossed give such a sum, however much of the change there is."""
        return abs(self.along) <= _LEANING * math.sqrt(self.spread)


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
        differing: entries that are not the values expected.
        beyond: entries further off than rounding explains.
        changed: entries that the merge changes at all, as far as they were counted.
        error: ‖found - expected‖².
        expected: ‖expected‖²; of values not rounded yet, where no more than a few differ.
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
    changed: int = 0
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
        return None if self.settled or self.is_few else self.slope.scale

    @property
    def is_few(self) -> bool:
        """Whether so few entries differ, among those that the merge changes, that it is no matter of scale."""
        return self.differing * _FEW <= self.changed


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
        total += Comparison(
            stop - start, differing, differing, error=float(differing), expected=float(stop - start)
        )
    return total


def _same(mine: Array, theirs: Array, count: int) -> int:
    """How many of ``count`` elements are the same bytes."""
    if np.array_equal(mine, theirs):
        return count
    width = max(1, mine.size // count)
    return int(np.count_nonzero((mine.reshape(-1, width) == theirs.reshape(-1, width)).all(axis=1)))


def compare_step(step: WeightStep, found: TensorSource) -> Comparison:
    """Rows that a step computes, against the same rows of ``found``.

    Bytes first; from the first that differ, the elements that do while they are few; and sums over all where more do.
    """
    count = (step.stop - step.start) * step.columns
    exact = Comparison(count, settled=count if step.contributions else 0)
    expected = 0.0
    for block in blocks(step):
        if not np.array_equal(round_block(step, block), _theirs(step, block, found)):
            few = _compare_few(replace(step, start=block.start), found, count // _FEW)
            if few is None:
                return _compare_all(step, found)
            return replace(exact, differing=few.differing, error=few.error, expected=expected + few.expected)
        expected += _square(block.values)
    return replace(exact, expected=expected)


def _theirs(step: WeightStep, block: Block, found: TensorSource) -> Array:
    first = block.start * step.columns
    return found.read_bytes(step.name, first, first + block.values.size)


def _square(values: Array) -> float:
    """‖values‖², of those that are finite."""
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.dot(flat, flat))
    if not math.isfinite(square):
        finite = flat[np.isfinite(flat)].astype(np.float64)
        square = float(np.dot(finite, finite))
    return square


class _Trail:
    """Values on their way from the base through each adapter, in float64."""

    def __init__(self, dtype: Dtype, before: Array) -> None:
        self.dtype = dtype
        self.before: Array = before.astype(np.float64)
        self.exact = self.rounded = self.before
        self.largest: Array = np.abs(self.before)

    def add(self, after: Array) -> None:
        """Go on to the values after one more adapter."""
        values = after.astype(np.float64)
        step = values - self.exact
        self.largest = np.maximum(self.largest, np.maximum(np.abs(values), np.abs(step)))
        self.rounded = _rounded(self.rounded + step, self.dtype)
        self.exact = values


def _rounded(values: Array, dtype: Dtype) -> Array:
    if dtype == accumulator(dtype):
        return values
    return widen(_narrowed(values.astype(np.float32), dtype), dtype).astype(np.float64)


def _narrowed(values: Array, dtype: Dtype) -> Array:
    return narrow(values, dtype, np.empty(dtype.nbytes(values.size), np.uint8))


def _runs(step: WeightStep) -> list[Iterator[Block]]:
    """The blocks of a step after the first adapter, after two, and so on to all of them, each with the base's values.

    All share a buffer: a block is used before the next is asked for, of whichever run.
    """
    counts = range(1, len(step.contributions))
    partial = [replace(step, contributions=step.contributions[:count]) for count in counts]
    return [blocks(one, keep_before="all") for one in (*partial, step)]


def _compare_few(step: WeightStep, found: TensorSource, most: int) -> Comparison | None:
    """The elements that differ, if rounding explains each, they lean to no side, and they are few.

    Nothing is lost against :func:`_compare_all`: where an element is as expected, nothing is beyond a rounding and
    nothing leans.

    Args:
        step: from the first block on that differs.
        found: what to compare with.
        most: elements; more than these are not few, whatever the merge changes.

    Returns:
        Their sums; None where all elements must be looked at.
    """
    word = np.dtype(f"u{step.spec.dtype.bits // 8}")
    *partial, whole = _runs(step)
    seen, changed, expected = 0, 0, 0.0
    gathered: list[list[Array]] = []
    for block in whole:
        raw, theirs = (r.view(word) for r in (round_block(step, block), _theirs(step, block, found)))
        at = np.flatnonzero(raw != theirs)
        seen += at.size
        if seen > most:
            return None
        assert block.before is not None
        before, after = block.before.reshape(-1), block.values.reshape(-1)
        expected += _square(after)
        if changed < seen * _FEW:
            changed += int(np.count_nonzero(raw != _narrowed(before, step.spec.dtype).view(word)))
        ends = [after[at], raw[at], theirs[at]]
        between = [next(run).values.reshape(-1)[at] for run in partial]
        gathered.append([before[at], *between, *ends])
    before, *stages, raw, theirs = (np.concatenate(parts) for parts in zip(*gathered, strict=True))
    trail = _Trail(step.spec.dtype, before)
    for values in stages:
        trail.add(values)
    few = replace(_compare(step, trail, raw, theirs), changed=changed, expected=expected)
    return few if few.is_few and not few.beyond and few.once.is_chance else None


def _compare_all(step: WeightStep, found: TensorSource) -> Comparison:
    total = Comparison()
    runs = _runs(step)
    for _ in range(step.start, step.stop, step.block_rows):
        block = next(runs[0])
        assert block.before is not None
        trail = _Trail(step.spec.dtype, block.before.reshape(-1))
        trail.add(block.values.reshape(-1))
        for run in runs[1:]:
            block = next(run)
            trail.add(block.values.reshape(-1))
        total += _compare(step, trail, round_block(step, block), _theirs(step, block, found))
    return total


def _compare(step: WeightStep, trail: _Trail, raw: Array, theirs: Array) -> Comparison:
    """Elements as they should be and as they are, both as stored, with the trail to them."""
    dtype, adapters = step.spec.dtype, max(1, len(step.contributions))
    expected, actual = widen(raw, dtype).astype(np.float64), widen(theirs, dtype).astype(np.float64)
    before, exact = trail.before, trail.exact
    same = (expected == actual) | (np.isnan(expected) & np.isnan(actual))
    spacing = _spacing(trail.largest, dtype)
    beyond = ~(np.abs(actual - exact) <= spacing * adapters) & ~same
    # The others are counted, and kept out of the sums.
    known = np.isfinite(expected) & np.isfinite(before)
    for values in (expected, actual, exact, before, spacing, trail.rounded):
        values[~known] = 0.0
    intended, change = exact - before, actual - before
    return Comparison(
        count=same.size,
        differing=int(same.size - np.count_nonzero(same)),
        beyond=int(np.count_nonzero(beyond)),
        changed=int(np.count_nonzero(expected != before)),
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
