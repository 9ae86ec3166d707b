"""How far two factored deltas are from each other, and how much of the space they use is shared.

Everything comes from the Gram matrices of the stacked factors, (ranks of both)² numbers in float64, which one pass over
the factors makes. A distance that is small against its terms cancels in them; it is then taken from the core of the
difference (:mod:`loratools.deltas.algebra`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratools.arrays import from_device, namespace, to_device
from loratools.deltas.lowrank import whole
from loratools.errors import ShapeMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["Likeness", "Overlap", "compare", "ratio", "total"]

_CHUNK = 1 << 17  # elements converted to float64 at a time: 1 MB, which stays in a cache
_ROUNDING = 2.0**-50  # of a sum in float64, against the sum of its terms' sizes
_ACCURATE = 1e-6  # relative error allowed in a squared distance
# A direction this much weaker than the strongest is taken for rounding noise of 16- or 32-bit factors.
_NOISE = 1e-5
_WELL_CONDITIONED = 1e-4  # least over greatest pivot of a Cholesky factor, for its inverse to be trusted


@dataclass(frozen=True, slots=True)
class Overlap:
    """Share of two subspaces, in [0, 1]: phi = ‖Uᵀ V‖² / min(i, j) (Hu et al. 2021, section 7).

    Attributes:
        value: of all directions that the two deltas use.
        null: what random subspaces of these dimensions would give: max(i, j) / n.
    """

    value: float
    null: float


@dataclass(frozen=True, slots=True)
class Likeness:
    """Two deltas, or two sets of them, compared.

    Attributes:
        norm_a: Frobenius norm of the first.
        norm_b: of the second.
        inner: their inner product.
        distance: Frobenius norm of their difference.
        outputs: overlap of their left singular spaces; None where one is zero, or it was not computed.
        inputs: the same of the right ones.
        up_cosine: between the ``up`` factors as they are stored, where their ranks are equal.
        down_change: ‖down_a - down_b‖ / ‖down_a‖ of the factors as they are stored, where their ranks are equal.
    """

    norm_a: float
    norm_b: float
    inner: float
    distance: float
    outputs: Overlap | None = None
    inputs: Overlap | None = None
    up_cosine: float | None = None
    down_change: float | None = None

    @property
    def relative(self) -> float:
        """‖A - B‖ / ‖A‖; infinite where only A is zero, 0 where both are."""
        return ratio(self.distance, self.norm_a)

    @property
    def cosine(self) -> float | None:
        """None where one of them is zero."""
        size = self.norm_a * self.norm_b
        return max(-1.0, min(1.0, self.inner / size)) if size else None


def ratio(part: float, whole: float) -> float:
    """``part`` / ``whole``, where nothing of nothing is nothing.

    >>> ratio(1, 2), ratio(1, 0), ratio(0, 0)
    (0.5, inf, 0.0)
    """
    return part / whole if whole else math.inf if part else 0.0


def compare(a: LowRank, b: LowRank, *, overlap: bool = True, device: str = "cpu") -> Likeness:
    """Compare two deltas of the same weight.

    >>> import numpy as np
    >>> from loratools.deltas.lowrank import LowRank
    >>> a = LowRank(np.ones((4, 1)), np.ones((1, 9)))
    >>> b = LowRank(np.full((4, 1), 2.0), np.ones((1, 9)), 0.25)
    >>> found = compare(a, b)
    >>> found.distance, found.relative, found.cosine, found.outputs.value
    (3.0, 0.5, 1.0, 1.0)

    Args:
        a: (out, rank) and (rank, in).
        b: of the same shape, of any rank.
        overlap: whether to compare the subspaces too.
        device: where the Gram matrices of the factors are formed, as
            :func:`~loratools.arrays.check_double` returns it; the factors themselves are numpy's.

    Raises:
        ShapeMismatch: they are not of the same shape.
    """
    if a.shape != b.shape:
        raise ShapeMismatch("two deltas to compare", b.shape, a.shape)
    if _crowded(a, b):
        return _dense(a, b)
    ups, downs = _gram(a.up, b.up, device), _gram(a.down.T, b.down.T, device)
    rank = a.up.shape[1]
    mine, theirs = slice(rank), slice(rank, None)

    def product(rows: slice, cols: slice, weight: float) -> tuple[float, float]:
        terms = weight * ups[rows, cols] * downs[rows, cols]
        return float(terms.sum()), float(abs(terms).sum())

    square_a, size_a = product(mine, mine, a.scaling**2)
    square_b, size_b = product(theirs, theirs, b.scaling**2)
    inner, size = product(mine, theirs, a.scaling * b.scaling)
    squared = square_a + square_b - 2 * inner
    noise = _ROUNDING * (size_a + size_b + 2 * size)
    distance = math.sqrt(squared) if squared * _ACCURATE > noise else _exact_distance(a, b, device)
    norm_a, norm_b = (
        math.sqrt(square) if square * _ACCURATE > _ROUNDING * terms else _exact_norm(delta)
        for square, terms, delta in ((square_a, size_a, a), (square_b, size_b, b))
    )
    left, right = _overlaps(a, b, ups, downs) if overlap and norm_a and norm_b else (None, None)
    return Likeness(
        norm_a, norm_b, inner, distance, left, right, _cosine(ups, rank), _change(downs, rank, a, b)
    )


def total(parts: Iterable[Likeness]) -> Likeness:
    """Several comparisons as one, of everything behind one another; overlaps are averaged.

    >>> total([Likeness(3, 0, 0, 3), Likeness(4, 1, 0, 4)]).norm_a
    5.0
    """
    parts = list(parts)
    changes = [part.down_change for part in parts if part.down_change is not None]
    cosines = [part.up_cosine for part in parts if part.up_cosine is not None]
    return Likeness(
        norm_a=math.hypot(*(part.norm_a for part in parts)),
        norm_b=math.hypot(*(part.norm_b for part in parts)),
        inner=math.fsum(part.inner for part in parts),
        distance=math.hypot(*(part.distance for part in parts)),
        outputs=_mean([part.outputs for part in parts if part.outputs is not None]),
        inputs=_mean([part.inputs for part in parts if part.inputs is not None]),
        up_cosine=math.fsum(cosines) / len(cosines) if cosines else None,
        down_change=math.fsum(changes) / len(changes) if changes else None,
    )


def _mean(overlaps: list[Overlap]) -> Overlap | None:
    if not overlaps:
        return None
    count = len(overlaps)
    return Overlap(sum(one.value for one in overlaps) / count, sum(one.null for one in overlaps) / count)


def _crowded(a: LowRank, b: LowRank) -> bool:
    """Whether the matrices themselves are smaller than the Gram matrices of their factors, or one is stored whole."""
    ranks: int = a.up.shape[1] + b.up.shape[1]
    return ranks > 2 * min(a.shape) or whole(a) is not None or whole(b) is not None


def _dense(a: LowRank, b: LowRank) -> Likeness:
    """From the matrices, where the ranks are as large as they; no subspace there says anything."""
    import numpy as np

    rows = max(1, _CHUNK // a.shape[1])
    sums = np.zeros(4)
    parts = [_rows(a), _rows(b)]
    for start in range(0, a.shape[0], rows):
        first, second = (part(slice(start, start + rows)).ravel() for part in parts)
        change = first - second
        sums += (first @ first, second @ second, first @ second, change @ change)
    square_a, square_b, inner, squared = map(float, sums)
    return Likeness(math.sqrt(square_a), math.sqrt(square_b), inner, math.sqrt(squared))


def _rows(delta: LowRank) -> Callable[[slice], Array]:
    """What makes rows of a delta, in float64."""
    import numpy as np

    values = whole(delta)
    if values is not None:
        return lambda some: delta.scaling * values[some].astype(np.float64)
    down = delta.down.astype(np.float64)
    return lambda some: delta.scaling * (delta.up[some].astype(np.float64) @ down)


def _gram(one: Array, other: Array, device: str) -> Array:
    """XᵀX of X = [one, other], (n, rank) each, in float64; converted a piece at a time on the processor."""
    import numpy as np

    if device != "cpu":
        xp = namespace(device)
        both = xp.concat([xp.astype(to_device(part, device), xp.float64) for part in (one, other)], axis=1)
        return from_device(both.T @ both)
    split, count = one.shape[1], one.shape[0]
    width = split + other.shape[1]
    gram = np.zeros((width, width))
    step = max(1, min(count, _CHUNK // max(width, 1)))
    # In the order the factors are stored, so that converting them runs along their rows.
    wide = one.flags.f_contiguous and not one.flags.c_contiguous
    buffer = np.empty((width, step)).T if wide else np.empty((step, width))
    for start in range(0, count, step):
        piece = buffer[: min(step, count - start)]
        piece[:, :split] = one[start : start + step]
        piece[:, split:] = other[start : start + step]
        gram += piece.T @ piece
    return gram


def _exact_distance(a: LowRank, b: LowRank, device: str) -> float:
    """‖A - B‖ where the Gram matrices cancel; nothing to compute where the factors are the same.

    Whatever M (rank_b, rank_a) is, up_a down_a - up_b down_b = (up_a - up_b M) down_a - up_b (down_b - M down_a). With
    the M that fits down_b to down_a both differences are small where A and B are close, in whatever factors; so
    they have all their digits, and their Gram matrices do not cancel.
    """
    import numpy as np

    from loratools.deltas.algebra import distance

    a, b = _without_padding(a), _without_padding(b)
    if a.scaling == b.scaling and np.array_equal(a.up, b.up) and np.array_equal(a.down, b.down):
        return 0.0
    ups = [d.up.astype(np.float64) * d.scaling for d in (a, b)]
    own, other = (d.down.astype(np.float64) for d in (a, b))
    try:
        fit = np.linalg.solve(own @ own.T, own @ other.T).T
    except np.linalg.LinAlgError:
        return distance(a, b)
    terms = _gram(ups[0] - ups[1] @ fit, -ups[1], device) * _gram(own.T, (other - fit @ own).T, device)
    squared = float(terms.sum())
    if squared * _ACCURATE > _ROUNDING * float(abs(terms).sum()):
        return math.sqrt(squared)
    return distance(a, b)


def _without_padding(delta: LowRank) -> LowRank:
    """The same delta without the rank that adds nothing."""
    used = delta.up.any(axis=0) & delta.down.any(axis=1)
    return delta if used.all() else replace(delta, up=delta.up[:, used], down=delta.down[used])


def _exact_norm(a: LowRank) -> float:
    """‖A‖ where the terms of its Gram matrices cancel."""
    from loratools.deltas.algebra import norm

    return norm(a)


def _cosine(grams: Array, rank: int) -> float | None:
    import numpy as np

    own, other, both = grams[:rank, :rank], grams[rank:, rank:], grams[:rank, rank:]
    size = math.sqrt(float(np.trace(own)) * float(np.trace(other)))
    return float(np.trace(both)) / size if own.shape == other.shape and size else None


def _change(grams: Array, rank: int, a: LowRank, b: LowRank) -> float | None:
    import numpy as np

    if a.down.shape != b.down.shape or not a.down.size:
        return None
    own, other, both = (
        float(np.trace(g)) for g in (grams[:rank, :rank], grams[rank:, rank:], grams[:rank, rank:])
    )
    return math.sqrt(max(own + other - 2 * both, 0.0) / own) if own else None


def _overlaps(a: LowRank, b: LowRank, ups: Array, downs: Array) -> tuple[Overlap, Overlap]:
    """Of the left and of the right singular spaces.

    Well-conditioned factors span them, and with G = L Lᵀ the columns of up L⁻ᵀ are orthonormal. Others have directions
    that the product lacks; the singular value decomposition finds those it has.
    """
    from loratools.deltas.algebra import core, overlap

    rank = a.up.shape[1]
    one, two = slice(rank), slice(rank, None)
    roots = [[_inverse_root(gram[part, part]) for part in (one, two)] for gram in (ups, downs)]
    if all(root is not None for pair in roots for root in pair):
        shared = [
            pair[0] @ gram[one, two] @ pair[1].T for gram, pair in zip((ups, downs), roots, strict=True)
        ]
        i, j = rank, b.up.shape[1]
        values = [float((side * side).sum()) / min(i, j) for side in shared]
    else:
        cores = core(a), core(b)
        i, j = (int((c.values > _NOISE * c.values[0]).sum()) for c in cores)
        values = [overlap(*cores, i, j, "left"), overlap(*cores, i, j, "right")]
    left, right = (Overlap(min(1.0, value), max(i, j) / n) for value, n in zip(values, a.shape, strict=True))
    return left, right


def _inverse_root(gram: Array) -> Any:
    """L⁻¹ of the Cholesky factor L; None where squaring has cost too many digits."""
    import numpy as np

    try:
        lower = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diagonal(lower)
    return np.linalg.inv(lower) if pivots.min() > _WELL_CONDITIONED * pivots.max() else None
