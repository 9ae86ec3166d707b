"""SCE's three steps over blocks of rows: select what varies, calculate the adapters' energies, erase minorities.

Wan et al. 2024, https://arxiv.org/abs/2408.07990.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loratools.methods.elementwise import entries, select, spans

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["energies", "most_varying"]


def most_varying(deltas: Sequence[LowRank], density: float) -> float:
    """The least variance between adapters that an entry must have to be kept: 0 keeps all.

    Args:
        deltas: weighted, of one type.
        density: share of the entries that vary at all.
    """
    if density == 1.0:
        return 0.0
    rows, columns = deltas[0].shape
    varying = sum(int(np.count_nonzero(block)) for block in _variances(deltas))
    if not varying:
        return 0.0

    def sampled(at_rows: Array, at_columns: Array) -> Array:
        picked: Array = np.var([entries(delta, at_rows, at_columns) for delta in deltas], axis=0)
        return picked

    kept = max(1, int(density * varying))
    return select(lambda: _variances(deltas), rows * columns, [kept], sampled, (rows, columns))[0]


def energies(deltas: Sequence[LowRank], least: float) -> Array:
    """Of each entry that is kept, the mean of the adapters that have the elected sign, weighted by their energies.

    Args:
        deltas: weighted, of one type.
        least: the variance an entry must have to be kept.
    """
    sums = np.zeros(len(deltas))
    for blocks in _kept(deltas, least):
        sums += [float(np.vdot(block, block)) for block in blocks]
    total = float(sums.sum())
    shares = sums / total if total > 0 else sums
    merged = np.zeros(deltas[0].shape, deltas[0].up.dtype)
    for (start, stop), blocks in zip(spans(merged.shape), _kept(deltas, least), strict=True):
        _erase(blocks, shares, merged[start:stop])
    return merged


def _erase(blocks: Sequence[Array], shares: Array, out: Array) -> None:
    signs = np.copysign(out.dtype.type(1), sum(blocks[1:], blocks[0].copy()))
    weights = np.zeros_like(out)
    for block, share in zip(blocks, shares, strict=True):
        agrees = block * signs > 0
        part = np.multiply(agrees, out.dtype.type(share))
        weights += part
        out += part * block
    np.copyto(weights, 1, where=weights == 0)
    out /= weights


def _blocks(deltas: Sequence[LowRank]) -> Iterator[list[Array]]:
    for start, stop in spans(deltas[0].shape):
        yield [delta.rows(start, stop) for delta in deltas]


def _variances(deltas: Sequence[LowRank]) -> Iterator[Array]:
    for blocks in _blocks(deltas):
        yield np.var(blocks, axis=0)


def _kept(deltas: Sequence[LowRank], least: float) -> Iterator[list[Array]]:
    for blocks in _blocks(deltas):
        if least > 0.0:
            mask = np.var(blocks, axis=0) >= least
            for block in blocks:
                np.multiply(block, mask, out=block)
        yield blocks
