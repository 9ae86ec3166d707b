"""scaling · (A1 B1) ∘ (A2 B2): LoHa (Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098; LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.deltas.base import Span
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["Hadamard", "expanded", "tucker"]


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
        core: (rank, rank, kernel...), the ``t`` tensor.
        left: (rank, out).
        right: (rank, in).

    Returns:
        (out, rank) and (rank, in * kernel).
    """
    return left.T, expanded(core, right)


def expanded(core: Array, down: Array) -> Array:
    """The ``down`` of a CP decomposed convolution with its kernel: Σ_q core[p, q, kernel] down[q, in].

    >>> import numpy as np
    >>> expanded(np.ones((4, 2, 3, 3)), np.ones((2, 5))).shape
    (4, 45)

    Args:
        core: (p, q, kernel...), ``lora_mid`` or a ``t`` tensor.
        down: (q, in).

    Returns:
        (p, in * kernel).
    """
    import numpy as np

    flat = core.reshape(core.shape[0], core.shape[1], -1)
    product: Array = np.matmul(flat.transpose(0, 2, 1), down)  # (p, kernel, in)
    return np.ascontiguousarray(product.transpose(0, 2, 1)).reshape(core.shape[0], -1)
