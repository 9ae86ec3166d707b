"""Products with a matrix that lies in memory, or that is made a few rows at a time because it is too large for that."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools.arrays import beside, from_device, to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loratools.dtypes import Array

__all__ = [
    "Matrix",
    "Mirrored",
    "Streamed",
    "buffer",
    "mirrored",
    "pieces",
    "times",
    "times_transposed",
    "whole",
]

_BLOCK = 1 << 19  # elements handled at once, so that they stay in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Streamed:
    """A matrix whose rows are made when they are asked for, again in every pass.

    Attributes:
        shape: (m, n).
        dtype: float32 or float64.
        rows: makes rows ``start`` to ``stop``, (stop - start, n); the array may be reused by the next call.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    rows: Callable[[int, int], Array]


@dataclass(frozen=True, slots=True, eq=False)
class Mirrored:
    """A matrix in memory with a copy on a device, where its products are formed.

    Attributes:
        values: (m, n).
        there: the copy.
    """

    values: Array
    there: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64."""
        found: np.dtype[Any] = self.values.dtype
        return found

    def rows(self, start: int, stop: int) -> Array:
        """Rows, from memory."""
        return self.values[start:stop]


Matrix = Streamed | Mirrored | np.ndarray[Any, Any]


def mirrored(matrix: Matrix, device: str) -> Matrix:
    """A matrix whose products are formed on a device; one that is streamed, and any on the processor, is as before."""
    if device == "cpu" or not isinstance(matrix, np.ndarray):
        return matrix
    return Mirrored(matrix, to_device(matrix, device))


class _Buffers(threading.local):
    """Arrays of one thread, reused: a fresh one costs more than what is done with it."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, Any], Array] = {}


_buffers = _Buffers()


def buffer(name: str, shape: tuple[int, int], kind: Any) -> Array:
    """An array of this thread by this name; the next call for the name reuses it."""
    count = shape[0] * shape[1]
    held = _buffers.held.get((name, kind))
    if held is None or held.size < count:
        held = _buffers.held[name, kind] = np.empty(count, kind)
    return held[:count].reshape(shape)


def pieces(matrix: Matrix) -> Iterator[tuple[int, int, Array]]:
    """Runs of rows: the first, one past the last, and their values.

    >>> [(start, stop) for start, stop, _ in pieces(np.zeros((3, 1 << 18), np.float32))]
    [(0, 2), (2, 3)]
    """
    count, columns = matrix.shape
    rows = max(1, _BLOCK // max(1, columns))
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        yield start, stop, matrix[start:stop] if isinstance(matrix, np.ndarray) else matrix.rows(start, stop)


def times(matrix: Matrix, columns: Array, name: str) -> Array:
    """D @ columns, in a buffer of this name."""
    product = buffer(name, (matrix.shape[0], columns.shape[1]), matrix.dtype)
    if isinstance(matrix, Mirrored):
        return from_device(matrix.there @ beside(columns, matrix.there), product)
    if not isinstance(matrix, Streamed):
        np.matmul(matrix, columns, out=product)
        return product
    for start, stop, rows in pieces(matrix):
        np.matmul(rows, columns, out=product[start:stop])
    return product


def times_transposed(matrix: Matrix, columns: Array, name: str) -> Array:
    """Dᵀ @ columns, in a buffer of this name."""
    product = buffer(name, (matrix.shape[1], columns.shape[1]), matrix.dtype)
    if isinstance(matrix, Mirrored):
        return from_device(matrix.there.T @ beside(columns, matrix.there), product)
    if not isinstance(matrix, Streamed):
        np.matmul(matrix.T, columns, out=product)
        return product
    product[:] = 0
    for start, stop, rows in pieces(matrix):
        product += rows.T @ columns[start:stop]
    return product


def whole(matrix: Matrix) -> Array:
    """All of a matrix in memory."""
    if not isinstance(matrix, Streamed):
        return matrix.values if isinstance(matrix, Mirrored) else matrix
    values = np.empty(matrix.shape, matrix.dtype)
    for start, stop, rows in pieces(matrix):
        values[start:stop] = rows
    return values
