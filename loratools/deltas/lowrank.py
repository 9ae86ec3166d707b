"""scaling · B A: the delta of LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import frexp
from typing import TYPE_CHECKING

from loratools.arrays import from_device, namespace_of, on_processor, to_device
from loratools.errors import ShapeMismatch

if TYPE_CHECKING:
    from loratools.deltas.base import Span
    from loratools.dtypes import Array

__all__ = ["LowRank", "block_diagonal", "expert", "product", "whole"]

# OpenBLAS multiplies small matrices (m·n·k up to a million) without packing them first, at twice the speed that thin
# factors reach otherwise; a batch of slivers stays on that path (measured: 5.0 against 2.6 GB/s at rank 16).
_SMALL_GEMM = 1_000_000
_SLIVERS = (8, 4)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """D = scaling · up @ down.

    >>> import numpy as np
    >>> delta = LowRank(np.ones((3, 2)), np.ones((2, 4)), 0.5)
    >>> delta.rows(0, 2).shape, float(delta.rows(0, 1)[0, 0])
    ((2, 4), 1.0)
    """

    up: Array  # (out, rank)
    down: Array  # (rank, in)
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.up.shape[1] != self.down.shape[0]:
            raise ShapeMismatch("low-rank factors", self.up.shape, self.down.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rowwise(self) -> bool:
        """Always."""
        return True

    def rows(self, start: int, stop: int, out: Array | None = None) -> Array:
        """See :class:`~loratools.deltas.base.Delta`. As PEFT does: the product first, then the scaling."""
        block = product(self.up[start:stop], self.down, out)
        if self.scaling != 1.0:
            block *= block.dtype.type(self.scaling)
        return block

    def apply(self, weight: Array, start: int) -> Array:
        """``weight`` + D."""
        weight += self.rows(start, start + weight.shape[0])
        return weight

    def part(self, rows: Span | None, cols: Span | None) -> LowRank:
        """See :class:`~loratools.deltas.base.Delta`."""
        up = self.up if rows is None else self.up[rows.slice]
        down = self.down if cols is None else self.down[:, cols.slice]
        return replace(self, up=up, down=down)

    def transposed(self) -> LowRank:
        """(up down)ᵀ = downᵀ upᵀ."""
        return LowRank(self.down.T, self.up.T, self.scaling)

    def on(self, device: str) -> LowRank:
        """The same delta with its factors on a device: blocks of rows are multiplied there and handed over by it."""
        return replace(self, up=to_device(self.up, device), down=to_device(self.down, device))

    def folded(self) -> LowRank:
        """The same delta with the scaling inside ``up``, where that changes no bit: a power of two."""
        if self.scaling == 1.0 or abs(frexp(self.scaling)[0]) != 0.5:
            return self
        return LowRank(self.up * self.up.dtype.type(self.scaling), self.down)


def whole(delta: LowRank) -> Array | None:
    """The matrix itself, unscaled, where one factor is the identity, as beside a difference that is stored whole.

    >>> import numpy as np
    >>> whole(LowRank(np.eye(2), np.ones((2, 3)))).shape, whole(LowRank(np.ones((2, 2)), np.ones((2, 3))))
    ((2, 3), None)
    """
    if _is_identity(delta.up):
        return delta.down
    return delta.up if _is_identity(delta.down) else None


def _is_identity(factor: Array) -> bool:
    import numpy as np

    size = factor.shape[0]
    if size != factor.shape[1] or not size or not on_processor(factor):
        return False
    corner = factor[:2, :2]
    if not np.array_equal(corner, np.eye(len(corner))):  # as nearly every factor tells at once
        return False
    return bool((factor.diagonal() == 1).all() and np.count_nonzero(factor) == size)


def product(up: Array, down: Array, out: Array | None = None) -> Array:
    """``up @ down``, in slivers of rows while the factors are thin enough for that to be faster.

    Factors on a device are multiplied there, and their product comes to the processor.
    """
    import numpy as np

    if not on_processor(up):
        return from_device(namespace_of(up).matmul(up, down), out)
    rows, (rank, columns) = up.shape[0], down.shape
    for sliver in _SLIVERS:
        if rows % sliver == 0 and rows > sliver and sliver * columns * rank <= _SMALL_GEMM:
            batch = up.reshape(rows // sliver, sliver, rank)
            shaped = None if out is None else out.reshape(rows // sliver, sliver, columns)
            return np.matmul(batch, down, out=shaped).reshape(rows, columns)
    return np.matmul(up, down, out=out)


def block_diagonal(compressed: Array, blocks: int) -> Array:
    """The block-diagonal matrix whose blocks are the row chunks of ``compressed`` (BD-LoRA).

    >>> import numpy as np
    >>> block_diagonal(np.ones((4, 3)), 2).shape
    (4, 6)
    """
    import numpy as np

    height, width = compressed.shape[0] // blocks, compressed.shape[1]
    result = np.zeros((compressed.shape[0], width * blocks), compressed.dtype)
    for i in range(blocks):
        rows = slice(i * height, (i + 1) * height)
        result[rows, i * width : (i + 1) * width] = compressed[rows]
    return result


def expert(
    up: Array, down: Array, index: int, experts: int, *, blockwise: bool = False
) -> tuple[Array, Array]:
    """The factors of one expert out of PEFT's packing of many (``target_parameters``).

    Args:
        up: (out, rank * experts), expert fastest; slowest where ``blockwise`` (unsloth before 2026-09).
        down: (experts * rank, in), expert slowest.
        index: which expert.
        experts: how many there are.
        blockwise: how ``up`` is packed.

    Returns:
        (out, rank) and (rank, in).
    """
    rank = down.shape[0] // experts
    mine = slice(index * rank, (index + 1) * rank)
    return (up[:, mine] if blockwise else up[:, index::experts]), down[mine]
