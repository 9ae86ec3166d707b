"""R W, with R orthogonal and block-diagonal: OFT (Qiu et al. 2023, https://arxiv.org/abs/2306.07280) in its dialects.

- Diag-OFT (LyCORIS, kohya-ss) rotates output features: W' = Rᵀ W, with R = (I + Q)(I - Q)⁻¹ for the skew-symmetric
  Q = B - Bᵀ of the stored blocks B. kohya-ss holds ‖Q‖, over all blocks, below a constraint; LyCORIS may multiply the
  rotated output features by factors (``rescale``).
- PEFT's OFT (version 2, Qiu et al. 2025, https://arxiv.org/abs/2506.19847) rotates input features: W' = W Rᵀ, with Q
  packed as its upper triangle. R is the first terms of the series of (I + Q)(I - Q)⁻¹, or, exactly and with the other
  sign, (I - Q)(I + Q)⁻¹.

All R are computed in float64, and less the identity, so that a small rotation keeps its digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loratools.errors import ShapeMismatch

if TYPE_CHECKING:
    from loratools.dtypes import Array

__all__ = ["Rotated", "Stage", "cayley", "constrained", "neumann", "projected", "skew", "unpacked"]

_TOGETHER = 1 << 18  # values of blocks that are inverted at once


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """x' = x + C x on blocks of features, which lie apart or one behind the other.

    >>> turned = Stage(np.array([[[-1.0, -1.0], [1.0, -1.0]]]))(np.eye(4))  # every two features, by a right angle
    >>> turned.astype(int).tolist()
    [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]]
    """

    change: Array  # (blocks, size, size): R - I; one block is shared by all features
    order: Array | None = None  # (features,): which features the blocks take, in turn

    @property
    def features(self) -> int | None:
        """How many there are; None where one block is shared by as many as the weight has."""
        blocks, size = self.change.shape[:2]
        return None if blocks == 1 and self.order is None else blocks * size

    def __call__(self, features: Array) -> Array:
        """Rotate (features, n)."""
        size = self.change.shape[1]
        taken = features if self.order is None else features[self.order]
        blocks = taken.reshape(-1, size, features.shape[1])
        blocks = blocks + np.matmul(self.change.astype(features.dtype, copy=False), blocks)
        mixed: Array = blocks.reshape(features.shape)
        if self.order is None:
            return mixed
        back = np.empty_like(mixed)
        back[self.order] = mixed
        return back


@dataclass(frozen=True, slots=True, eq=False)
class Rotated:
    """W' = rescale ∘ (R W), or rescale ∘ (W Rᵀ) where input features are rotated.

    A file gives the rotations only; :meth:`fitted` says of which weight. A convolution's input features are its
    channels with their kernels, in the order they lie in.
    """

    stages: tuple[Stage, ...]
    on_input: bool = False
    rescale: Array | None = None  # (out,)
    stored_transposed: bool = False
    shape: tuple[int, int] = (0, 0)  # as stored

    @property
    def rowwise(self) -> bool:
        """While the rotated features are columns."""
        return self.on_input != self.stored_transposed

    def apply(self, weight: Array, start: int) -> Array:
        """See :class:`~loratools.deltas.base.Update`."""
        turned = weight.T if self.rowwise else weight
        for stage in self.stages:
            turned = stage(turned)
        weight[...] = turned.T if self.rowwise else turned
        if self.rescale is not None:
            factors = self.rescale.astype(weight.dtype, copy=False)
            if self.stored_transposed:
                weight *= factors
            else:
                weight *= factors[start : start + weight.shape[0], None]
        return weight

    def fitted(self, shape: tuple[int, int]) -> Rotated:
        """See :class:`~loratools.deltas.base.Fitting`."""
        out, into = shape[::-1] if self.stored_transposed else shape
        along = into if self.on_input else out
        for stage in self.stages:
            count = along if stage.features is None else stage.features
            if count != along or along % stage.change.shape[1]:
                raise ShapeMismatch("rotations", stage.change.shape, shape)
        if self.rescale is not None and self.rescale.shape != (out,):
            raise ShapeMismatch("rescale", self.rescale.shape, shape)
        return replace(self, shape=shape)

    def transposed(self) -> Rotated:
        """The same for the weight stored (in, out)."""
        return replace(self, stored_transposed=not self.stored_transposed, shape=self.shape[::-1])


def skew(blocks: Array) -> Array:
    """Q = B - Bᵀ of each block, (..., size, size), float64.

    >>> skew(np.array([[1.0, 2.0], [0.0, 3.0]])).tolist()
    [[0.0, 2.0], [-2.0, 0.0]]
    """
    wide = blocks.astype(np.float64)
    found: Array = wide - np.swapaxes(wide, -1, -2)
    return found


def unpacked(packed: Array) -> Array:
    """Skew-symmetric blocks from their upper triangles, row by row: (blocks, n) to (blocks, size, size), float64.

    >>> unpacked(np.array([[1.0, 2.0, 3.0]])).astype(int).tolist()
    [[[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]]

    Raises:
        ShapeMismatch: n is no size · (size - 1) / 2.
    """
    count = packed.shape[1]
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    if size * (size - 1) != 2 * count:
        raise ShapeMismatch("packed rotations", packed.shape, (packed.shape[0], size * (size - 1) // 2))
    blocks = np.zeros((packed.shape[0], size, size))
    rows, columns = np.triu_indices(size, 1)
    blocks[:, rows, columns] = packed
    blocks[:, columns, rows] = -packed.astype(np.float64)
    return blocks


def constrained(rotations: Array, limit: float) -> Array:
    """Q scaled down to a norm of ``limit`` over all blocks, where it is greater; 0 is no limit.

    >>> float(np.linalg.norm(constrained(np.ones((4, 2, 2)), 2.0)))
    2.0
    """
    norm = float(np.linalg.norm(rotations))
    if limit <= 0 or norm <= limit:
        return rotations
    return rotations * (limit / norm)


def projected(rotations: Array, limit: float) -> Array:
    """Q scaled down block by block to a norm of ``limit`` / √blocks: PEFT's ``coft``."""
    limit /= math.sqrt(len(rotations))
    norms = np.linalg.norm(rotations, axis=(1, 2), keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(norms <= limit, rotations, rotations * (limit / norms))
    return found


def cayley(rotations: Array) -> Array:
    """(I + Q)(I - Q)⁻¹ - I of each block, which is 2 (I - Q)⁻¹ Q.

    >>> cayley(np.array([[[0.0, 1.0], [-1.0, 0.0]]])).round().tolist()  # a quarter of a turn, less the identity
    [[[-1.0, 1.0], [-1.0, -1.0]]]
    """
    size = rotations.shape[-1]
    blocks = rotations.reshape(-1, size, size)
    found, identity = np.empty(blocks.shape), np.eye(size)
    step = max(1, _TOGETHER // max(1, size * size))
    for start in range(0, len(blocks), step):
        some = blocks[start : start + step]
        found[start : start + step] = 2 * np.linalg.solve(identity - some, some)
    return found.reshape(rotations.shape)


def neumann(rotations: Array, terms: int) -> Array:
    """The first terms of the series of :func:`cayley`, the last halved: 2Q + 2Q² + 2Q³ + Q⁴ for five, as PEFT has it.

    >>> neumann(np.array([[[0.0, 1.0], [-1.0, 0.0]]]), 5).tolist()
    [[[-1.0, 0.0], [0.0, -1.0]]]
    """
    total = np.zeros_like(rotations)
    if terms > 1:
        total += 2 * rotations
    if terms > 2:
        power = rotations @ rotations
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ rotations
            total += 2 * power
        total += power @ rotations
    return total
