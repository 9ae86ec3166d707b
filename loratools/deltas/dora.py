"""m / ‖W + D‖ · (W + D): DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353), with PEFT's norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.deltas.base import Update
    from loratools.dtypes import Array

__all__ = ["WeightDecomposed"]


@dataclass(frozen=True, slots=True, eq=False)
class WeightDecomposed:
    """W' = magnitude / norm · (W + D), one norm per output feature over everything else.

    Where the weight is stored (in, out), as in GPT-2's Conv1D and in embeddings, an output feature is a column, and
    the whole matrix is needed at once.
    """

    delta: Update  # a plain sum, or one that starts from a residual of the base (PiSSA, OLoRA)
    magnitude: Array  # (out,)
    by_column: bool = False  # the weight is stored (in, out)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as stored."""
        return self.delta.shape

    @property
    def rowwise(self) -> bool:
        """While output features are rows, and the rows of W + D need no others."""
        return self.delta.rowwise and not self.by_column

    def apply(self, weight: Array, start: int) -> Array:
        """See :class:`~loratools.deltas.base.Update`."""
        import numpy as np

        weight = self.delta.apply(weight, start)
        axis = 0 if self.by_column else 1
        norm = np.linalg.norm(weight, axis=axis)
        mine = self.magnitude if self.by_column else self.magnitude[start : start + weight.shape[0]]
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero row ends as NaN, which the caller names
            weight *= np.expand_dims(mine / norm, axis)
        return weight

    def transposed(self) -> WeightDecomposed:
        """See :class:`~loratools.deltas.base.Update`."""
        return WeightDecomposed(self.delta.transposed(), self.magnitude, not self.by_column)
