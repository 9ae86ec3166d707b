"""Adapters trained against a base that their initialisation had changed: that is redone before the delta is added.

- PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948) starts from the top singular components of W and trains
  against W minus them.
- OLoRA (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775) starts from the first columns of W's QR decomposition and
  trains against W minus scaling times their part of W.
- KaSA (Wang et al. 2024, https://arxiv.org/abs/2412.06071) drops the smallest singular components of W.

All three are projections of W, computed in float64 from the base weight alone, so nothing random or stored is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["Method", "Residual", "taken_out"]

Method = Literal["pissa", "olora", "kasa"]


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """W' = (W - P(W)) + D, with P the part of W that the initialisation took out."""

    delta: LowRank
    method: Method
    rank: int
    scaling: float  # of the adapter; OLoRA takes that many times its part out
    stored_transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as stored."""
        return self.delta.shape

    @property
    def rowwise(self) -> bool:
        """Never: the decomposition needs the whole weight."""
        return False

    def apply(self, weight: Array, start: int) -> Array:
        """See :class:`~loratools.deltas.base.Update`."""
        import numpy as np

        wide = weight.astype(np.float64)
        # PEFT decomposes a Conv1D's weight as (out, in) for PiSSA, and as it is stored for OLoRA.
        natural = wide.T if self.stored_transposed and self.method != "olora" else wide
        natural -= _taken_out(natural, self.method, self.rank, self.scaling)
        wide += self.delta.rows(start, start + weight.shape[0])
        weight[...] = wide
        return weight

    def transposed(self) -> Residual:
        """See :class:`~loratools.deltas.base.Update`."""
        return replace(self, delta=self.delta.transposed(), stored_transposed=not self.stored_transposed)


def _taken_out(weight: Array, method: Method, rank: int, scaling: float) -> Array:
    """P(W): (out, in), float64."""
    left, right, factor = taken_out(weight, method, rank, scaling)
    part: Array = left @ right
    return part if factor == 1.0 else factor * part


def taken_out(weight: Array, method: Method, rank: int, scaling: float) -> tuple[Array, Array, float]:
    """P(W) as factors.

    Args:
        weight: W, (out, in), float64; as stored for OLoRA.
        method: how the adapter was initialised.
        rank: of the part.
        scaling: of the adapter.

    Returns:
        (out, rank), (rank, in), and what their product is multiplied by.
    """
    import numpy as np

    if method == "olora":
        basis = np.linalg.qr(weight[:, : min(rank, weight.shape[1])])[0]
        return basis, basis.T @ weight, scaling
    wide = weight.shape[0] <= weight.shape[1]
    gram = weight @ weight.T if wide else weight.T @ weight
    vectors = np.linalg.eigh(gram)[1]  # columns, smallest eigenvalue first
    vectors = vectors[:, -rank:] if method == "pissa" else vectors[:, :rank]
    return (vectors, vectors.T @ weight, 1.0) if wide else (weight @ vectors, vectors.T, 1.0)
