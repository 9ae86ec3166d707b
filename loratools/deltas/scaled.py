"""l ∘ W: (IA)³ (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

PEFT stores the factors l themselves, LyCORIS l - 1: the reader of a file says which, and here they are factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.errors import ShapeMismatch

if TYPE_CHECKING:
    from loratools.dtypes import Array

__all__ = ["Scaled"]


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """W' = W with each row, or each column, multiplied by its own factor.

    A file gives the factors only; :meth:`fitted` says of which weight.
    """

    factors: Array  # (out,) or (in,)
    by_column: bool
    shape: tuple[int, int]

    @property
    def rowwise(self) -> bool:
        """Always."""
        return True

    def apply(self, weight: Array, start: int) -> Array:
        """See :class:`~loratools.deltas.base.Update`."""
        if self.by_column:
            weight *= self.factors
        else:
            weight *= self.factors[start : start + weight.shape[0], None]
        return weight

    def fitted(self, shape: tuple[int, int]) -> Scaled:
        """The same for a weight of this shape, where each input channel of a convolution has a kernel of columns.

        Raises:
            ShapeMismatch: the rows or columns are no multiple of the factors.
        """
        import numpy as np

        count = self.factors.size
        along = shape[1] if self.by_column else shape[0]
        if count == 0 or along % count or (not self.by_column and along != count):
            raise ShapeMismatch("ia3 factors", self.factors.shape, shape)
        return replace(self, factors=np.repeat(self.factors, along // count), shape=shape)

    def transposed(self) -> Scaled:
        """Rows become columns."""
        return Scaled(self.factors, not self.by_column, (self.shape[1], self.shape[0]))
