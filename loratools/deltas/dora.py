"""m / ‖W + D‖ · (W + D): DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353), by output or by input features.

PEFT and LyCORIS (since 3.2, and by default) have one norm and one magnitude for each output feature, over all inputs
and the kernel. LyCORIS before, on request since, and OneTrainer have one for each input channel, over all outputs and
the kernel. LyCORIS adds float32's epsilon to the norm, so that a row of zeros stays one; with PEFT it becomes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.errors import ShapeMismatch

if TYPE_CHECKING:
    from loratools.deltas.base import Update
    from loratools.dtypes import Array

__all__ = ["EPSILON", "WeightDecomposed"]

EPSILON = 2.0**-23  # of float32, which LyCORIS computes magnitudes in
_ROWS = 256


@dataclass(frozen=True, slots=True, eq=False)
class WeightDecomposed:
    """W' = magnitude / norm · (W + D), one norm for each output feature or for each input channel.

    Where the weight is stored (in, out), as in GPT-2's Conv1D and in embeddings, an output feature is a column, and
    the whole matrix is needed at once; so it is for input channels where the weight is stored (out, in).
    """

    delta: Update  # a plain sum, or one that starts from a residual of the base (PiSSA, OLoRA)
    magnitude: Array  # (out,) or (in,)
    by_column: bool = False  # what has a magnitude is a column, or a kernel of them
    epsilon: float = 0.0  # added to the norms

    def __post_init__(self) -> None:
        out, into = self.shape
        count = self.magnitude.size
        if not count or (into % count if self.by_column else out != count):
            raise ShapeMismatch("magnitude", self.magnitude.shape, self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as stored."""
        return self.delta.shape

    @property
    def rowwise(self) -> bool:
        """While magnitudes are those of rows, and the rows of W + D need no others."""
        return self.delta.rowwise and not self.by_column

    def apply(self, weight: Array, start: int) -> Array:
        """See :class:`~loratools.deltas.base.Update`."""
        import numpy as np

        weight = self.delta.apply(weight, start)
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero row ends as NaN, which the caller names
            if not self.by_column:
                norm = np.linalg.norm(weight, axis=1)
                mine = self.magnitude[start : start + weight.shape[0]]
                weight *= (mine / (norm + norm.dtype.type(self.epsilon)))[:, None]
            else:
                norm = self._column_norms(weight)
                factors = self.magnitude / (norm + norm.dtype.type(self.epsilon))
                kernel = weight.shape[1] // self.magnitude.size
                weight *= np.repeat(factors, kernel).astype(weight.dtype)
        return weight

    def _column_norms(self, weight: Array) -> Array:
        """One norm for each magnitude, over all rows and the columns of its kernel.

        Summed in float64; for PEFT's layers in the weight's own type, as PEFT does.
        """
        import numpy as np

        if not self.epsilon and self.magnitude.size == weight.shape[1]:
            plain: Array = np.linalg.norm(weight, axis=0)
            return plain
        squares = np.zeros(weight.shape[1])
        for first in range(0, weight.shape[0], _ROWS):
            wide = weight[first : first + _ROWS].astype(np.float64)
            squares += np.einsum("ij,ij->j", wide, wide)
        norms: Array = np.sqrt(squares.reshape(self.magnitude.size, -1).sum(axis=1))
        return norms

    def transposed(self) -> WeightDecomposed:
        """See :class:`~loratools.deltas.base.Update`."""
        return replace(self, delta=self.delta.transposed(), by_column=not self.by_column)
