"""Coordinates for rules that work entry by entry: what the entries are decides what the rule does.

``weight``: the entries of the weight itself, D_t. ``core``: U^T D_t V with U from [B_1 .. B_T] and V from
[A_1; ..; A_T] (Panariello et al. 2025, https://arxiv.org/abs/2509.17786). ``knots``: U^T D_t with the left singular
vectors of [D_1 .. D_T] (Stoica et al. 2024, https://arxiv.org/abs/2410.19735). In each, what an adapter adds is a
low-rank matrix again, and D_t is got back exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loratools.deltas.lowrank import LowRank
from loratools.methods.base import Approximation, seed_of
from loratools.methods.elementwise import working

if TYPE_CHECKING:
    from loratools.dtypes import Array
    from loratools.methods.base import Space, Stack

__all__ = ["Coordinates", "compress", "coordinates"]

_NOISE = 1e-13  # of the largest singular value: what lies below is the rounding of float64


@dataclass(frozen=True, slots=True, eq=False)
class Coordinates:
    """The deltas of a stack in the coordinates of a space.

    Attributes:
        deltas: one for each adapter, (rows, columns) of the space, in the type to compute in.
        left: (out, rows), orthonormal columns; None where the rows are those of the weight.
        right: (columns, in), orthonormal rows; None likewise.
        stack: whose they are.
    """

    deltas: tuple[LowRank, ...]
    left: Array | None
    right: Array | None
    stack: Stack

    def lift(self, merged: Array) -> LowRank | Approximation:
        """The delta that a matrix of this space stands for.

        Factors hold it exactly in ``core`` and ``knots``; in ``weight`` it has no low rank, and is approximated at the
        rank asked for, by default the sum of the adapters' ranks.
        """
        kind = np.result_type(*(delta.up.dtype for delta in self.stack.deltas))
        if self.left is None:
            return compress(merged, self.stack.rank or self.stack.total_rank, kind, self.stack.name)
        up, down = self.left, merged
        if self.right is not None:
            up, down = (
                (self.left @ merged, self.right)
                if merged.shape[0] >= merged.shape[1]
                else (
                    self.left,
                    merged @ self.right,
                )
            )
        return LowRank(up.astype(kind, copy=False), down.astype(kind, copy=False))


def coordinates(stack: Stack, space: Space) -> Coordinates:
    """A stack's deltas in the coordinates of a space."""
    if space == "weight":
        return Coordinates(working(stack.deltas), None, None, stack)
    wide = [LowRank(delta.up.astype(np.float64), delta.down.astype(np.float64)) for delta in stack.deltas]
    ups = np.concatenate([delta.up for delta in wide], axis=1)
    if space == "core":
        left = _basis(ups)
        right = _basis(np.concatenate([delta.down for delta in wide]).T).T
        small = [LowRank(left.T @ delta.up, delta.down @ right.T) for delta in wide]
        return Coordinates(tuple(small), left, right, stack)
    left = _shared_left(ups, wide)
    return Coordinates(working([LowRank(left.T @ delta.up, delta.down) for delta in wide]), left, None, stack)


def _basis(columns: Array) -> Array:
    """The left singular vectors whose singular values are not rounding: (n, k)."""
    vectors, values, _ = np.linalg.svd(columns, full_matrices=False)
    return _significant(vectors, values)


def _shared_left(ups: Array, deltas: list[LowRank]) -> Array:
    """The left singular vectors of [D_1 .. D_T] = [B_1 .. B_T] blockdiag(A_t), from the factors alone."""
    basis, triangle = np.linalg.qr(ups)
    pieces, start = [], 0
    for delta in deltas:
        rank = delta.down.shape[0]
        _, side = np.linalg.qr(delta.down.T)
        pieces.append(triangle[:, start : start + rank] @ side.T)
        start += rank
    vectors, values, _ = np.linalg.svd(np.concatenate(pieces, axis=1), full_matrices=False)
    return basis @ _significant(vectors, values)


def _significant(vectors: Array, values: Array) -> Array:
    kept = int(np.count_nonzero(values > _NOISE * values[:1].sum()))
    return vectors[:, : max(1, kept)]


def compress(matrix: Array, rank: int, kind: np.dtype, name: str) -> Approximation:
    """A dense matrix as factors of a rank, nearly the best that have it.

    Args:
        matrix: (out, in).
        rank: of the factors; beyond the matrix's own they are zero.
        kind: type of the factors.
        name: of the matrix, which the random directions depend on.
    """
    from loratools.deltas.spectra import randomized

    kept = min(rank, *matrix.shape)
    found = randomized(matrix, kept, seed=seed_of("compress", name))
    up, down = np.zeros((matrix.shape[0], rank), kind), np.zeros((rank, matrix.shape[1]), kind)
    up[:, :kept], down[:kept] = found.up, found.down
    return Approximation(LowRank(up, down), found.norm, found.residual)
