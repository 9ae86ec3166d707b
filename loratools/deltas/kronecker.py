"""scaling · W1 ⊗ W2: LoKr (Edalati et al. 2022, https://arxiv.org/abs/2212.10650; LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.deltas.full import Dense

if TYPE_CHECKING:
    from loratools.deltas.base import Span
    from loratools.dtypes import Array

__all__ = ["Kronecker"]


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """D = scaling · left ⊗ right, with rows formed as they are asked for."""

    left: Array  # (a, c)
    right: Array  # (b, d): D is (a * b, c * d); a convolution's kernel is flattened into d
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1]

    @property
    def rowwise(self) -> bool:
        """Always."""
        return True

    def rows(self, start: int, stop: int, out: Array | None = None) -> Array:  # noqa: ARG002 - formed by broadcasting
        """See :class:`~loratools.deltas.base.Delta`."""
        import numpy as np

        above, below = np.divmod(np.arange(start, stop), self.right.shape[0])
        block = self.left[above][:, :, None] * self.right[below][:, None, :]
        block *= block.dtype.type(self.scaling)
        return block.reshape(stop - start, -1)

    def apply(self, weight: Array, start: int) -> Array:
        """``weight`` + D."""
        weight += self.rows(start, start + weight.shape[0])
        return weight

    def part(self, rows: Span | None, cols: Span | None) -> Dense:
        """A sub-matrix of a Kronecker product is not one: formed in full."""
        return Dense(self.rows(0, self.shape[0])).part(rows, cols)

    def transposed(self) -> Kronecker:
        """(L ⊗ R)ᵀ = Lᵀ ⊗ Rᵀ."""
        return Kronecker(self.left.T, self.right.T, self.scaling)
