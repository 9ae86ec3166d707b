"""l ∘ W: (IA)³ (Liu et al. 2022, https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.dtypes import Array

__all__ = ["Scaled"]


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """W' = W with each row, or each column, multiplied by its own factor."""

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

    def transposed(self) -> Scaled:
        """Rows become columns."""
        return Scaled(self.factors, not self.by_column, (self.shape[1], self.shape[0]))
