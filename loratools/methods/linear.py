"""The exact weighted sum: concatenated factors, and the best approximation of a lower rank where one is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.methods.base import method

if TYPE_CHECKING:
    from loratools.deltas.lowrank import LowRank
    from loratools.methods.base import Stack

__all__ = ["linear"]


@method(
    aliases=("cat",),
    formula="D = sum_t w_t D_t = [w_1 s_1 B_1 .. w_T s_T B_T] [A_1; ..; A_T]",
    paper="https://arxiv.org/abs/2212.04089",
    when="Always to begin with: it is what loading the adapters side by side computes. With --rank the best "
    "approximation at that rank, which no other choice of factors betters.",
    cost="Copies the factors; with --rank a QR or Gram matrix and a small SVD a module.",
)
def linear(stack: Stack) -> LowRank:
    """The exact weighted sum (task arithmetic), by concatenating the factors.

    >>> import numpy as np
    >>> from loratools.deltas.lowrank import LowRank
    >>> from loratools.methods.base import Stack
    >>> one = LowRank(np.ones((4, 2)), np.ones((2, 3)))
    >>> linear(Stack("fc", (one, one), (0.5, 1.0))).up.shape
    (4, 4)
    """
    from loratools.deltas.algebra import add

    return add(list(zip(stack.weights, stack.deltas, strict=True)))
