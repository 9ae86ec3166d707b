"""scaling · (A1 B1) ∘ (A2 B2): LoHa (Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098; LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.deltas.base import Span
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["Hadamard", "tucker"]


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard:
    """D = scaling · first ∘ second, elementwise."""

    first: LowRank
    second: LowRank
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.first.shape

    @property
    def rowwise(self) -> bool:
        """Always."""
        return True

    def rows(self, start: int, stop: int, out: Array | None = None) -> Array:
        """See :class:`~loratools.deltas.base.Delta`."""
        block = self.first.rows(start, stop, out)
        block *= self.second.rows(start, stop)
        block *= block.dtype.type(self.scaling)
        return block

    def apply(self, weight: Array, start: int) -> Array:
        """``weight`` + D."""
        weight += self.rows(start, start + weight.shape[0])
        return weight

    def part(self, rows: Span | None, cols: Span | None) -> Hadamard:
        """See :class:`~loratools.deltas.base.Delta`."""
        return Hadamard(self.first.part(rows, cols), self.second.part(rows, cols), self.scaling)

    def transposed(self) -> Hadamard:
        """(F ∘ S)ᵀ = Fᵀ ∘ Sᵀ."""
        return Hadamard(self.first.transposed(), self.second.transposed(), self.scaling)


def tucker(core: Array, left: Array, right: Array) -> tuple[Array, Array]:
    """A Tucker (CP) decomposed convolution as two factors of a matrix (out, in * kernel).

    Args:
        core: (rank, rank, k1, k2), the ``t`` tensor.
        left: (rank, out).
        right: (rank, in).

    Returns:
        (out, rank) and (rank, in * k1 * k2).
    """
    import numpy as np

    down = np.einsum("pqkl,qi->pikl", core, right)
    return left.T, down.reshape(core.shape[0], -1)
