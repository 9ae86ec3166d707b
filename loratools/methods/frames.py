"""The common frame: orthonormal bases that hold every delta of a stack, and each delta as a small matrix in them.

D_t = L C_t Rᵀ exactly, with L (out, k) and R (in, l) from the concatenated factors, k and l at most the sum of ranks.
What a method does to singular values and vectors it may do to the C_t alone (Panariello et al. 2025,
https://arxiv.org/abs/2509.17786). A side whose ranks add up to its whole length needs no basis: it stays as it is,
which is the dense computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from loratools.deltas.lowrank import LowRank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.dtypes import Array

__all__ = ["ROUNDING", "Components", "Frame", "components", "frame", "polar"]

# A component smaller than the float32 rounding of the largest one is not information: adapters are stored in float32 at
# best. A method that gives every component the same weight would otherwise blow up what is left of a cancelled one.
ROUNDING = 2.0**-23
# Likewise what a sum of deltas leaves where they cancel, relative to the deltas (float64 leaves about 1e-16).
CANCELLED = 1e-12


class Components(NamedTuple):
    """A thin singular value decomposition, cut at the numerical rank r."""

    left: Array  # (k, r)
    values: Array  # (r,), descending, all above zero
    right: Array  # (r, l)

    def top(self, count: int) -> Components:
        """The first ``count`` of them."""
        return Components(self.left[:, :count], self.values[:count], self.right[:count])


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Bases for both sides, and the factors of each delta in them; all in float64.

    >>> import numpy as np
    >>> one = LowRank(np.ones((6, 1)), np.ones((1, 5)))
    >>> shared = frame((one, one))
    >>> shared.cores[0].shape, bool(np.allclose(shared.lift(shared.cores[0], np.eye(2)).rows(0, 6), 1))
    ((2, 2), True)
    """

    left: Array | None  # (out, k), orthonormal columns; None for the identity
    right: Array | None  # (in, l)
    ups: tuple[Array, ...]  # (k, r_t) each
    downs: tuple[Array, ...]  # (r_t, l) each
    dtype: type  # of the deltas, and so of the results

    @property
    def cores(self) -> tuple[Array, ...]:
        """The deltas in these coordinates: (k, l) each."""
        return tuple(up @ down for up, down in zip(self.ups, self.downs, strict=True))

    def weighted(self, weights: Sequence[float]) -> tuple[Array, ...]:
        """The deltas times their weights: (k, l) each."""
        return tuple(weight * core for weight, core in zip(weights, self.cores, strict=True))

    def coordinates(self, delta: LowRank) -> Array:
        """Any delta, projected onto the frame: (k, l)."""
        import numpy as np

        up, down = delta.up.astype(np.float64), delta.down.astype(np.float64)
        up = up if self.left is None else self.left.T @ up
        return delta.scaling * (up @ (down if self.right is None else down @ self.right))

    def lift(self, up: Array, down: Array) -> LowRank:
        """``up`` (k, r) times ``down`` (r, l) in the frame, as a delta of the whole matrix.

        Where r is 0 the result is zero, of rank 1: files have no tensors of rank 0.
        """
        import numpy as np

        if not up.shape[1]:
            up, down = np.zeros((up.shape[0], 1)), np.zeros((1, down.shape[1]))
        high = up if self.left is None else self.left @ up
        wide = down if self.right is None else down @ self.right.T
        return LowRank(high.astype(self.dtype), wide.astype(self.dtype))

    def lift_spectrum(self, left: Array, values: Array, right: Array) -> LowRank:
        """``left diag(values) right`` as a delta, the roots of the values on either side so that both are of one size.

        Args:
            left: (k, r).
            values: (r,), none below zero.
            right: (r, l).
        """
        import numpy as np

        roots = np.sqrt(values)
        return self.lift(left * roots, roots[:, None] * right)


def frame(deltas: Sequence[LowRank]) -> Frame:
    """The frame of some deltas of one shape: two QR decompositions of (out, R) and (in, R), R the sum of the ranks."""
    import numpy as np

    left, ups = _basis([delta.up.astype(np.float64) * delta.scaling for delta in deltas])
    right, downs = _basis([delta.down.T.astype(np.float64) for delta in deltas])
    dtype = np.result_type(np.float32, *(part.dtype for delta in deltas for part in (delta.up, delta.down)))
    return Frame(left, right, tuple(ups), tuple(down.T for down in downs), dtype.type)


def _basis(parts: list[Array]) -> tuple[Array | None, list[Array]]:
    """An orthonormal basis of the columns of all parts, and the parts in it."""
    import numpy as np

    joined = np.concatenate(parts, axis=1)
    if joined.shape[1] >= joined.shape[0]:
        return None, parts
    basis, triangle = np.linalg.qr(joined)
    stops = np.cumsum([part.shape[1] for part in parts])[:-1]
    return basis, np.split(triangle, stops, axis=1)


def components(matrix: Array, scale: float = 0.0) -> Components:
    """The singular value decomposition of a matrix, without what is only rounding.

    >>> import numpy as np
    >>> components(np.diag([2.0, 1.0, 1e-9])).values.tolist()
    [2.0, 1.0]

    Args:
        matrix: (k, l).
        scale: the size of the deltas that were added to make it; what is tiny beside that is their cancellation.
    """
    import numpy as np

    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    largest = values[0] if values.size else 0.0
    rank = int(np.count_nonzero(values > max(ROUNDING * largest, CANCELLED * scale)))
    return Components(left, values, right).top(rank)


def polar(matrix: Array) -> Array:
    """P Q of the singular value decomposition P S Q: the nearest matrix with orthonormal columns (or rows).

    Directions without information stay out of it, so that columns in common share their direction: two equal unit
    columns u become u/√2 and u/√2.
    """
    found = components(matrix)
    return found.left @ found.right
