"""Exact algebra of low-rank deltas on their factors: sums, inner products, norms, singular values, truncations.

A delta (out, in) of rank r is handled through r x r matrices; the (out, in) matrix is formed only where its rank
exceeds its smaller side. Sums of products and decompositions are taken in float64 whatever the factors are stored in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from loratools.arrays import beside, from_device, namespace_of
from loratools.deltas.full import Dense
from loratools.deltas.hadamard import Hadamard
from loratools.deltas.kronecker import Kronecker
from loratools.deltas.lowrank import LowRank, whole
from loratools.errors import ShapeMismatch, Unsupported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.deltas.base import Delta
    from loratools.dtypes import Array

__all__ = [
    "Core",
    "add",
    "angles",
    "core",
    "distance",
    "factored",
    "inner",
    "norm",
    "overlap",
    "singular_values",
]

Side = Literal["left", "right"]

# The condition of a factor with its columns scaled to length one, up to which its Gram matrix serves: what a Gram
# matrix loses is the square of it, in units of float64's 1e-16.
_GRAM_CONDITION = 1e4
# A squared distance below this share of what it is the difference of has lost too many digits: from the core then.
_CANCELLED = 1e-4


def factored(delta: Delta) -> LowRank:
    """The same delta as two factors, its scaling inside ``up``.

    A Hadamard product of ranks p and q has rank p q (the face-splitting product of the factors), a Kronecker product
    the product of its sides' ranks. A dense delta is its own factor.

    >>> first, second = LowRank(np.ones((3, 2)), np.ones((2, 4))), LowRank(np.ones((3, 3)), np.ones((3, 4)))
    >>> factored(Hadamard(first, second, 0.5)).up.shape
    (3, 6)

    Raises:
        Unsupported: a delta of no known kind.
    """
    if isinstance(delta, LowRank):
        return delta if delta.scaling == 1.0 else LowRank(_scaled(delta.up, delta.scaling), delta.down)
    if isinstance(delta, Hadamard):
        first, second = factored(delta.first), factored(delta.second)
        up = (first.up[:, :, None] * second.up[:, None, :]).reshape(first.up.shape[0], -1)
        down = (first.down[:, None, :] * second.down[None, :, :]).reshape(-1, first.down.shape[1])
        return LowRank(_scaled(up, delta.scaling), down)
    if isinstance(delta, Kronecker):
        left, right = _thin(delta.left), _thin(delta.right)
        up = np.kron(left.up, right.up)[delta.first : delta.last]
        return LowRank(_scaled(up, delta.scaling), np.kron(left.down, right.down))
    if isinstance(delta, Dense):
        values = _scaled(delta.values, delta.scaling)
        rows, columns = values.shape
        if rows <= columns:
            return LowRank(np.eye(rows, dtype=values.dtype), values)
        return LowRank(values, np.eye(columns, dtype=values.dtype))
    raise Unsupported(f"{type(delta).__name__} has no factors")


def _scaled(values: Array, scaling: float) -> Array:
    return values if scaling == 1.0 else values * values.dtype.type(scaling)


def _thin(side: Array) -> LowRank:
    """One side of a Kronecker product by its own rank, without what is zero to its last digit."""
    left, values, right = np.linalg.svd(side.astype(np.float64), full_matrices=False)
    rank = int(np.count_nonzero(values > 8 * np.finfo(side.dtype).eps * values[:1].sum()))
    root = np.sqrt(values[:rank])
    return LowRank(
        (left[:, :rank] * root).astype(side.dtype), (root[:, None] * right[:rank]).astype(side.dtype)
    )


def add(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Σ wᵢ Dᵢ, exactly: the factors side by side, the weights in ``up``; one matrix where a term is stored whole.

    >>> one = LowRank(np.ones((3, 2)), np.ones((2, 4)))
    >>> add([(0.5, one), (2.0, one)]).up.shape
    (3, 4)

    Raises:
        ShapeMismatch: the deltas are of different shapes.
        ValueError: there are none.
    """
    if not terms:
        raise ValueError("a sum of no deltas has no shape")
    shape = terms[0][1].shape
    for _, delta in terms:
        if delta.shape != shape:
            raise ShapeMismatch("a term of the sum", delta.shape, shape)
    deltas = [factored(delta) for _, delta in terms]
    kind = np.result_type(*(delta.up.dtype for delta in deltas))
    if any(whole(delta) is not None for delta in deltas):
        return factored(Dense(_summed([weight for weight, _ in terms], deltas, kind)))
    up, start = np.empty((shape[0], sum(delta.up.shape[1] for delta in deltas)), kind), 0
    for (weight, _), delta in zip(terms, deltas, strict=True):
        stop = start + delta.up.shape[1]
        np.multiply(delta.up, delta.up.dtype.type(weight), out=up[:, start:stop])
        start = stop
    return LowRank(up, np.concatenate([delta.down for delta in deltas]))


def _summed(weights: Sequence[float], deltas: Sequence[LowRank], kind: np.dtype) -> Array:
    """Σ wᵢ Dᵢ formed in full."""
    total = np.zeros(deltas[0].shape, kind)
    for weight, delta in zip(weights, deltas, strict=True):
        values = whole(delta)
        total += kind.type(weight) * (delta.up @ delta.down if values is None else values)
    return total


def inner(a: LowRank, b: LowRank) -> float:
    """⟨A, B⟩ = tr(Aᵀ B), from Gram matrices in float64.

    Raises:
        ShapeMismatch: the deltas are of different shapes.
    """
    if a.shape != b.shape:
        raise ShapeMismatch("the second delta", b.shape, a.shape)
    ups = _double(a.up).T @ _double(b.up)
    downs = _double(a.down) @ _double(b.down).T
    return float(np.vdot(ups, downs)) * a.scaling * b.scaling


def norm(delta: LowRank) -> float:
    """The Frobenius norm, from Gram matrices; of one whose terms cancel, from its singular values."""
    if (values := whole(delta)) is not None:
        return float(np.linalg.norm(_double(values))) * abs(delta.scaling)
    up, down = _double(delta.up), _double(delta.down)
    ups, downs = from_device(up.T @ up), from_device(down @ down.T)
    square, apart = float(np.vdot(ups, downs)), float(np.dot(np.diagonal(ups), np.diagonal(downs)))
    if square > _CANCELLED * apart:
        return math.sqrt(square) * abs(delta.scaling)
    return float(np.linalg.norm(core(delta).values)) if apart else 0.0


def distance(a: LowRank, b: LowRank) -> float:
    """‖A - B‖ from the singular values of the difference, so to its own digits however close the two are.

    :func:`loratools.deltas.likeness.compare` says it faster, with norms and overlaps.

    Raises:
        ShapeMismatch: the deltas are of different shapes.
    """
    return float(np.linalg.norm(singular_values(add([(1.0, _wide(a)), (-1.0, _wide(b))]))))


def _wide(delta: LowRank) -> LowRank:
    return LowRank(_double(delta.up), _double(delta.down), delta.scaling)


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """The singular value decomposition of a delta, in the coordinates of its factors.

    Attributes:
        values: singular values, falling; float64, as many as the rank or the smaller side.
        columns: (out, p); times ``left_map`` (p, k) the left singular vectors.
        left_map: see there.
        rows: (q, in); ``right_map`` (k, q) times it is the right singular vectors.
        right_map: see there.
        kind: the type factors are handed out in.
    """

    values: Array
    columns: Array
    left_map: Array
    rows: Array
    right_map: Array
    kind: np.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.columns.shape[0], self.rows.shape[1]

    def left(self, rank: int | None = None) -> Array:
        """The first left singular vectors: (out, rank), float64."""
        return self._columns(self.left_map[:, :rank])

    def right(self, rank: int | None = None) -> Array:
        """The first right singular vectors: (rank, in), float64."""
        return self._rows(self.right_map[:rank])

    def _columns(self, coordinates: Array) -> Array:
        return from_device(_double(self.columns) @ beside(coordinates, self.columns))

    def _rows(self, coordinates: Array) -> Array:
        return from_device(beside(coordinates, self.rows) @ _double(self.rows))

    def truncate(self, rank: int) -> LowRank:
        """The nearest delta of a rank, the root of each singular value on either side; zeros beyond what there is.

        Eckart and Young 1936, https://doi.org/10.1007/BF02288367.
        """
        kept = min(rank, self.values.size)
        root = np.sqrt(self.values[:kept])
        up = np.zeros((self.shape[0], rank), self.kind)
        down = np.zeros((rank, self.shape[1]), self.kind)
        up[:, :kept] = self._columns(self.left_map[:, :kept] * root)
        down[:kept] = self._rows(root[:, None] * self.right_map[:kept])
        return LowRank(up, down)

    def tail(self, rank: int) -> float:
        """The Frobenius norm of what :meth:`truncate` leaves out."""
        return float(np.linalg.norm(self.values[rank:]))


def core(delta: LowRank) -> Core:
    """Decompose a delta through its factors: O((out + in) r²). The long products are formed where the factors lie.

    Columns of ``up`` and rows of ``down`` are scaled to length one, so that factors of very different sizes do no harm.
    Their Gram matrices serve while they are well conditioned, QR decompositions where they are not; where the rank
    exceeds the smaller side, the matrix itself.

    >>> found = core(LowRank(np.diag([3.0, 2.0]), np.eye(2, 5)))
    >>> [round(float(value), 9) for value in found.values], found.truncate(1).up.shape
    ([3.0, 2.0], (2, 1))
    """
    delta = factored(delta)
    kind = np.dtype("f8" if "float64" in f"{delta.up.dtype} {delta.down.dtype}" else "f4")
    found = _reduced(delta)
    left, values, right = np.linalg.svd(found.matrix, full_matrices=False)
    if found.frames is None:
        return Core(values, left, np.eye(values.size), right, np.eye(values.size), kind)
    columns, left_map, right_map, rows = found.frames
    made = Core(values, columns, left_map @ left, rows, right @ right_map, kind)
    return _padded(made, min(delta.up.shape[1], *delta.shape))


def singular_values(delta: LowRank) -> Array:
    """The values of :func:`core` alone, for less: falling, float64, as many as the rank or the smaller side."""
    values = np.linalg.svd(_reduced(delta).matrix, compute_uv=False) * abs(delta.scaling)
    size = min(delta.up.shape[1], *delta.shape)
    return np.pad(values, (0, max(0, size - values.size)))


@dataclass(frozen=True, slots=True, eq=False)
class _Reduced:
    """A matrix with the singular values of a delta, and the way back to its singular vectors.

    Attributes:
        matrix: no larger than the ranks; the delta itself where these exceed its smaller side.
        frames: columns (out, p), left map (p, k), right map (k, q) and rows (q, in): columns @ left map and right map @
            rows are orthonormal, and the delta is the one times ``matrix`` times the other. None for the delta itself.
    """

    matrix: Array
    frames: tuple[Array, Array, Array, Array] | None


def _reduced(delta: LowRank) -> _Reduced:
    if (values := whole(delta)) is not None:
        return _Reduced(_double(values), None)
    up, down = _double(delta.up), _double(delta.down)
    if up.shape[1] > min(delta.shape):
        return _Reduced(from_device(up) @ from_device(down), None)
    ups, downs = from_device(up.T @ up), from_device(down @ down.T)
    used = (ups.diagonal() > 0) & (downs.diagonal() > 0)
    if not used.all():  # rank that was only padding, or never trained
        chosen = beside(np.flatnonzero(used), delta.up)
        return _reduced(LowRank(delta.up[:, chosen], delta.down[chosen]))
    return _by_grams(up, down, ups, downs) or _by_qr(from_device(up), from_device(down))


def _by_grams(up: Array, down: Array, up_gram: Array, down_gram: Array) -> _Reduced | None:
    """With up = Q L_Bᵀ c_B and downᵀ = P L_Aᵀ c_A with Cholesky factors L: the core is L_Bᵀ c_B c_A L_A."""
    up_lengths, down_lengths = np.sqrt(up_gram.diagonal()), np.sqrt(down_gram.diagonal())
    ups = _cholesky(up_gram / np.outer(up_lengths, up_lengths))
    downs = None if ups is None else _cholesky(down_gram / np.outer(down_lengths, down_lengths))
    if ups is None or downs is None:
        return None
    matrix = (ups[0].T * (up_lengths * down_lengths)) @ downs[0]
    return _Reduced(matrix, (up, ups[1].T / up_lengths[:, None], downs[1] / down_lengths, down))


def _cholesky(gram: Array) -> tuple[Array, Array] | None:
    """L and its inverse; None where squaring has cost too many digits."""
    try:
        lower = np.linalg.cholesky(gram)
        inverse = np.linalg.inv(lower)
    except np.linalg.LinAlgError:
        return None
    condition = np.linalg.norm(lower) * np.linalg.norm(inverse)
    return (lower, inverse) if condition < _GRAM_CONDITION else None


def _by_qr(up: Array, down: Array) -> _Reduced:
    columns, left = np.linalg.qr(up)
    rows, right = np.linalg.qr(down.T)
    own = np.eye(left.shape[0])
    return _Reduced(left @ right.T, (columns, own, own, rows.T))


def _padded(found: Core, size: int) -> Core:
    """The same with as many singular values as the rank: the missing ones are zero, and so are their vectors."""
    missing = size - found.values.size
    if missing <= 0:
        return found
    return Core(
        np.pad(found.values, (0, missing)),
        found.columns,
        np.pad(found.left_map, ((0, 0), (0, missing))),
        found.rows,
        np.pad(found.right_map, ((0, missing), (0, 0))),
        found.kind,
    )


def overlap(a: Core, b: Core, i: int, j: int, side: Side = "left") -> float:
    """How much of the first ``i`` singular directions of one lies in the first ``j`` of the other: 0 to 1.

    φ(i, j) = ‖U_iᵀ V_j‖² / min(i, j), section 7 of the LoRA paper. Of random subspaces it is max(i, j) / dimension.
    """
    cosines = _cosines(a, b, i, j, side)
    return float(np.sum(cosines**2)) / max(1, min(i, j))


def angles(a: Core, b: Core, i: int, j: int, side: Side = "left") -> Array:
    """Principal angles between the first ``i`` and ``j`` singular directions, in radians, rising: (min(i, j),).

    Small ones are accurate to about 1e-8, the root of float64's precision.
    """
    values = np.linalg.svd(_cosines(a, b, i, j, side), compute_uv=False)
    return np.arccos(np.clip(values, 0.0, 1.0))


def _cosines(a: Core, b: Core, i: int, j: int, side: Side) -> Array:
    if side == "left":
        return a.left(i).T @ b.left(j)
    return a.right(i) @ b.right(j).T


def _double(values: Array) -> Array:
    xp = namespace_of(values)
    wide: Array = xp.astype(values, xp.float64, copy=False)
    return wide
