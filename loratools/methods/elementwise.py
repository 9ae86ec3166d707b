"""Rules that treat each entry by itself, a block of rows after another, so that no two dense deltas exist at once.

A rule is two steps: what a delta keeps of its entries (:class:`Sparsifier`), and how the adapters' entries become one
(:class:`Fuser`). Matrices of up to a million entries are computed in float64, larger ones in the factors' own type.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np

from loratools.deltas.lowrank import LowRank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from loratools.dtypes import Array

__all__ = [
    "Between", "Dropout", "Elected", "Fuser", "RankedDropout", "Sparsifier", "Summed", "Trim", "combine",
    "largest", "spans", "working",
]  # fmt: skip

_BLOCK = 1 << 16  # entries of each adapter handled at once, so that all adapters' stay in the cache
_SMALL = 1 << 20  # entries of a matrix up to which float64 costs nothing that anyone would notice
_SAMPLE = 1 << 14  # entries that bracket an order statistic
_WHOLE = 1 << 18  # entries up to which a selection from all of them is as quick


class Sparsifier(Protocol):
    """Decides what one delta keeps."""

    def __call__(self, values: Array) -> None:
        """Change the next rows of the delta in place; blocks come in order."""
        ...


class Fuser(Protocol):
    """Makes one block of the adapters' blocks."""

    def __call__(self, blocks: Sequence[Array], out: Array) -> None:
        """Fill ``out``. The blocks, each (rows, in), may be overwritten."""
        ...


def working(deltas: Sequence[LowRank]) -> tuple[LowRank, ...]:
    """The deltas in the type they are to be computed in."""
    rows, columns = deltas[0].shape
    kind = np.result_type(*(delta.up.dtype for delta in deltas))
    if rows * columns <= _SMALL:
        kind = np.dtype(np.float64)
    return tuple(
        LowRank(delta.up.astype(kind, copy=False), np.ascontiguousarray(delta.down, kind)) for delta in deltas
    )


def spans(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Blocks of rows: (start, stop)."""
    rows = max(1, _BLOCK // max(1, shape[1]))
    rows = rows - rows % 8 or rows  # whole slivers for the product of thin factors
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def combine(deltas: Sequence[LowRank], sparsify: Sequence[Sparsifier | None], fuse: Fuser) -> Array:
    """The dense matrix that a rule makes of deltas.

    Args:
        deltas: of one type and shape.
        sparsify: one for each; None keeps all.
        fuse: makes one of them.
    """
    shape, kind = deltas[0].shape, deltas[0].up.dtype
    merged = np.empty(shape, kind)
    first = next(spans(shape), (0, 0))
    buffers = [np.empty((first[1], shape[1]), kind) for _ in deltas]
    for start, stop in spans(shape):
        blocks = [buffer[: stop - start] for buffer in buffers]
        for delta, keep, block in zip(deltas, sparsify, blocks, strict=True):
            delta.rows(start, stop, block)
            if keep is not None:
                keep(block)
        fuse(blocks, merged[start:stop])
    return merged


# --- what a delta keeps ------------------------------------------------------------------------------------------


class Trim:
    """Entries whose size is at least ``least`` (all that are equal to it with them)."""

    def __init__(self, least: float) -> None:
        self.least = least

    def __call__(self, values: Array) -> None:
        """See :class:`Sparsifier`."""
        values *= np.abs(values) >= self.least


class Between:
    """Entries whose size is at least ``least`` and less than ``limit``."""

    def __init__(self, least: float, limit: float) -> None:
        self.least = least
        self.limit = limit

    def __call__(self, values: Array) -> None:
        """See :class:`Sparsifier`."""
        sizes = np.abs(values)
        values *= (sizes >= self.least) & (sizes < self.limit)


class Dropout:
    """Each entry with probability ``density``, divided by it."""

    def __init__(self, density: float, random: np.random.Generator, *, rescale: bool) -> None:
        self.density = density
        self.random = random
        self.factor = 1 / density if rescale else 1.0

    def __call__(self, values: Array) -> None:
        """See :class:`Sparsifier`."""
        values *= self.random.random(values.shape, np.float32) < self.density
        if self.factor != 1.0:
            values *= values.dtype.type(self.factor)


class RankedDropout:
    """Each entry with a probability that rises with the rank of its size in its row, divided by it (DELLA)."""

    def __init__(self, density: float, epsilon: float, random: np.random.Generator, *, rescale: bool) -> None:
        self.density = density
        self.epsilon = epsilon
        self.random = random
        self.rescale = rescale

    def __call__(self, values: Array) -> None:
        """See :class:`Sparsifier`."""
        columns = values.shape[1]
        step = 2 * self.epsilon / max(1, columns - 1)
        ladder = (self.density - self.epsilon) + step * np.arange(columns)
        if columns == 1:
            ladder = np.array([self.density])
        chances = np.empty(values.shape, values.dtype)
        order = np.argsort(np.abs(values), axis=1, kind="stable")
        np.put_along_axis(chances, order, ladder.astype(values.dtype)[None, :], axis=1)
        values *= self.random.random(values.shape, np.float32) < chances
        if self.rescale:
            values /= chances


# --- how the adapters' entries become one ----------------------------------------------------------------------


class Summed:
    """Σ w x."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = weights

    def __call__(self, blocks: Sequence[Array], out: Array) -> None:
        """See :class:`Fuser`."""
        out[...] = 0
        for block, weight in zip(blocks, self.weights, strict=True):
            np.multiply(block, block.dtype.type(weight), out=block)
            out += block


class Elected:
    """Elect the sign of Σ w x (plus where it is zero); of the entries with that sign, the weighted mean or the sum.

    The mean is Σ w x / Σ |w| over the entries that have the elected sign, so that a mean of two equal adapters with
    weights of 0.5 is each of them, and a negative weight turns an adapter round.
    """

    def __init__(self, weights: Sequence[float], *, mean: bool) -> None:
        self.weights = weights
        self.mean = mean

    def __call__(self, blocks: Sequence[Array], out: Array) -> None:
        """See :class:`Fuser`."""
        out[...] = 0
        for block, weight in zip(blocks, self.weights, strict=True):
            np.multiply(block, block.dtype.type(weight), out=block)
            out += block
        signs = np.copysign(out.dtype.type(1), out)
        shares = np.zeros_like(out)
        out[...] = 0
        scratch = np.empty_like(out)
        for block, weight in zip(blocks, self.weights, strict=True):
            agrees = np.multiply(block, signs, out=scratch) > 0
            np.multiply(block, agrees, out=block)
            out += block
            if self.mean:
                shares += np.multiply(agrees, out.dtype.type(abs(weight)), out=scratch)
        if self.mean:
            np.copyto(shares, 1, where=shares == 0)
            out /= shares


# --- the n-th largest entry --------------------------------------------------------------------------------------


def largest(delta: LowRank, places: Sequence[int]) -> list[float]:
    """The sizes |x| at some places of their falling order, exactly: place 1 is the largest.

    >>> largest(LowRank(np.eye(2), np.array([[3.0, -4.0], [1.0, 2.0]])), [1, 3])
    [4.0, 2.0]
    """
    return select(
        lambda: (np.abs(delta.rows(start, stop)) for start, stop in spans(delta.shape)),
        delta.shape[0] * delta.shape[1],
        places,
        lambda rows, columns: np.abs(entries(delta, rows, columns)),
        delta.shape,
    )


def entries(delta: LowRank, rows: Array, columns: Array) -> Array:
    """Single entries of a delta, by their rows and columns."""
    picked: Array = np.einsum("kr,rk->k", delta.up[rows], delta.down[:, columns])
    return picked


def select(
    blocks: Callable[[], Iterable[Array]],
    count: int,
    places: Sequence[int],
    sampled: Callable[[Array, Array], Array],
    shape: tuple[int, int],
) -> list[float]:
    """Order statistics of entries that are never all there at once.

    A sample brackets each; one pass counts what lies above the bracket and collects what lies inside. A sample that
    misleads costs a second pass, not the result.

    Args:
        blocks: passes over all entries, block by block.
        count: how many there are.
        places: in falling order of the entries, from 1.
        sampled: the entries at some rows and columns.
        shape: of the matrix.
    """
    if count <= _WHOLE:
        brackets = [(-math.inf, math.inf)] * len(places)
    else:
        random = np.random.Generator(np.random.SFC64(count))
        rows, columns = (random.integers(0, side, _SAMPLE) for side in shape)
        sample = np.sort(sampled(rows, columns))[::-1]
        brackets = [_bracket(sample, place / count) for place in places]
    found = _in_brackets(blocks(), places, brackets)
    missing = [place for place, value in zip(places, found, strict=True) if value is None]
    again = iter(_in_brackets(blocks(), missing, [(-math.inf, math.inf)] * len(missing)) if missing else ())
    values = (next(again) if value is None else value for value in found)
    return [value for value in values if value is not None]


def _bracket(falling: Array, share: float) -> tuple[float, float]:
    """Values that an order statistic lies between but for a probability of 10⁻⁴, from a sorted sample."""
    count = falling.size
    middle, spread = share * count, 4 * math.sqrt(share * (1 - share) * count) + 4
    first, last = math.floor(middle - spread), math.ceil(middle + spread)
    high = math.inf if first < 0 else float(falling[min(first, count - 1)])
    low = -math.inf if last >= count else float(falling[last])
    return low, high


def _in_brackets(
    blocks: Iterable[Array], places: Sequence[int], brackets: Sequence[tuple[float, float]]
) -> list[float | None]:
    """The order statistics that lie in their brackets; None for the others."""
    above = [0] * len(places)
    inside: list[list[Array]] = [[] for _ in places]
    for block in blocks:
        for index, (low, high) in enumerate(brackets):
            over = block > high
            above[index] += int(np.count_nonzero(over))
            inside[index].append(block[(block >= low) & ~over])
    found: list[float | None] = []
    for place, before, parts in zip(places, above, inside, strict=True):
        values = np.concatenate(parts)
        left = place - before
        if not 1 <= left <= values.size:
            found.append(None)
            continue
        found.append(float(np.partition(values, values.size - left)[values.size - left]))
    return found
