"""A product of block-diagonal rotations, each on other features: BOFT (Liu et al. 2023, https://arxiv.org/abs/2311.06243).

- LyCORIS rotates output features. Stage i takes runs of 2ⁱ · size features, and of each the first of its left half, the
  first of its right half, the second of its left half and so on: W' = R_m ... R_1 W.
- PEFT rotates input features. Stage i takes runs of 2ⁱ · size features and shuffles the halves of their blocks; its Q
  is half of LyCORIS' and of the other sign: W' = W (R_m ... R_1)ᵀ.

Both may multiply output features by factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loratools.deltas.oft import Rotated, Stage, cayley, constrained, skew
from loratools.errors import ShapeMismatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratools.dtypes import Array

    _Order = Callable[[Array, int, int], Array]

__all__ = ["butterfly", "input_butterfly"]


def butterfly(blocks: Array, rescale: Array | None = None, constraint: float = 0.0) -> Rotated:
    """LyCORIS' BOFT.

    >>> made = butterfly(np.zeros((2, 4, 2, 2)))
    >>> [stage.order.tolist() for stage in made.stages]
    [[0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 1, 3, 4, 6, 5, 7]]

    Args:
        blocks: (stages, blocks, size, size), as stored.
        rescale: (out,).
        constraint: on ‖Q‖ over all stages; 0 is none.

    Raises:
        ShapeMismatch: so many stages do not divide the features.
    """
    change = cayley(constrained(skew(blocks), constraint))
    return Rotated(_stages(change, _interleaved), rescale=rescale)


def input_butterfly(blocks: Array, rescale: Array | None = None) -> Rotated:
    """PEFT's BOFT.

    Args:
        blocks: (stages, blocks, size, size), as stored.
        rescale: (out,).

    Raises:
        ShapeMismatch: so many stages do not divide the features.
    """
    change = cayley(-0.5 * skew(blocks))
    return Rotated(_stages(change, _halves), on_input=True, rescale=rescale)


def _stages(change: Array, order: _Order) -> tuple[Stage, ...]:
    stages, blocks, size = change.shape[:3]
    halved = stages > 1 or order is _interleaved
    if blocks % 2 ** (stages - 1) or (halved and size % 2):
        raise ShapeMismatch("butterfly", change.shape, (stages, 2 ** (stages - 1), size, size))
    return tuple(Stage(change[i], order(np.arange(blocks * size), i, size)) for i in range(stages))


def _interleaved(features: Array, stage: int, size: int) -> Array:
    runs = features.reshape(-1, 2, 2**stage * size // 2)
    taken: Array = np.swapaxes(runs, 1, 2).reshape(-1)
    return taken


def _halves(features: Array, stage: int, size: int) -> Array:
    if stage == 0:
        return features
    runs = features.reshape(-1, 2**stage, 2, size // 2)
    taken: Array = np.argsort(np.swapaxes(runs, 1, 2).reshape(-1))  # PEFT multiplies by the transpose first
    return taken
