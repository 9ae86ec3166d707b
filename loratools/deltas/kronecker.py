"""scaling · W1 ⊗ W2: LoKr (Edalati et al. 2022, https://arxiv.org/abs/2212.10650; LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.deltas.full import Dense

if TYPE_CHECKING:
    from loratools.deltas.base import Delta, Span
    from loratools.dtypes import Array

__all__ = ["Kronecker"]


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """D = scaling · left ⊗ right, or some rows of it, formed as they are asked for."""

    left: Array  # (a, c)
    right: Array  # (b, d): D is (a * b, c * d); a convolution's kernel is flattened into d
    scaling: float
    first: int = 0  # row of the product that is D's first
    last: int | None = None  # one past D's last

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows = self.left.shape[0] * self.right.shape[0] if self.last is None else self.last
        return rows - self.first, self.left.shape[1] * self.right.shape[1]

    @property
    def rowwise(self) -> bool:
        """Always."""
        return True

    def rows(self, start: int, stop: int, out: Array | None = None) -> Array:  # noqa: ARG002 - formed by broadcasting
        """See :class:`~loratools.deltas.base.Delta`."""
        import numpy as np

        above, below = np.divmod(np.arange(start, stop) + self.first, self.right.shape[0])
        block = self.left[above][:, :, None] * self.right[below][:, None, :]
        block *= block.dtype.type(self.scaling)
        return block.reshape(stop - start, -1)

    def apply(self, weight: Array, start: int) -> Array:
        """``weight`` + D."""
        weight += self.rows(start, start + weight.shape[0])
        return weight

    def part(self, rows: Span | None, cols: Span | None) -> Delta:
        """Adjoining rows stay a product; any other sub-matrix is formed in full."""
        if rows is None or cols is not None or rows.step != 1:
            return Dense(self.rows(0, self.shape[0])).part(rows, cols)
        return replace(self, first=self.first + rows.start, last=self.first + rows.stop)

    def transposed(self) -> Delta:
        """(L ⊗ R)ᵀ = Lᵀ ⊗ Rᵀ."""
        if self.shape[0] != self.left.shape[0] * self.right.shape[0]:
            return Dense(self.rows(0, self.shape[0])).transposed()
        return Kronecker(self.left.T, self.right.T, self.scaling)
