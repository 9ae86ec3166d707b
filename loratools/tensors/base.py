"""What a tensor is before it is read, and the seams through which tensors come and go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from loratools.dtypes import widen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.dtypes import Array, Dtype

__all__ = ["ByBytes", "Extent", "TensorRef", "TensorSource", "TensorSpec", "span"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of a tensor."""

    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes, packed."""
        return self.dtype.nbytes(self.count)


class Extent(NamedTuple):
    """Where a tensor's bytes lie."""

    path: str
    offset: int  # bytes from the start of the file
    nbytes: int


def span(spec: TensorSpec, start: int, stop: int | None) -> tuple[int, int]:
    """Offset and length, in bytes, of elements ``start`` to ``stop`` of a tensor.

    Raises:
        IndexError: they are not all in the tensor, or do not begin and end on a byte.
    """
    stop = spec.count if stop is None else stop
    if not 0 <= start <= stop <= spec.count:
        raise IndexError(f"elements {start} to {stop} of a tensor of {spec.count}")
    if start * spec.dtype.bits % 8 or stop * spec.dtype.bits % 8:
        raise IndexError(f"elements {start} to {stop} of {spec.dtype.bits} bits share a byte with others")
    return spec.dtype.nbytes(start), spec.dtype.nbytes(stop - start)


class TensorSource(Protocol):
    """Names, dtypes and shapes for nothing; any tensor, or some of its rows, when asked.

    File sources can be pickled: a worker elsewhere opens its own handle.
    """

    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]

    def read(self, name: str, start: int = 0, stop: int | None = None, *, out: Array | None = None) -> Array:
        """Elements ``start`` to ``stop`` of a tensor in row-major order: rows are a contiguous run of them.

        Args:
            name: a key of ``specs``.
            start: first element.
            stop: one past the last; None reads to the end.
            out: a contiguous array of the right type and size to fill.

        Returns:
            One dimension; float32 (float64 for F64; integers as stored). ``out``, in its own shape, if it was given.
        """
        ...

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """The same elements as they are stored: uint8, one-dimensional."""
        ...

    def extent(self, name: str) -> Extent | None:
        """Where the bytes lie in a file, for copies that need not pass through Python; None in memory."""
        ...

    def identity(self) -> tuple[Any, ...]:
        """What must be unchanged for an interrupted run to go on: paths, sizes, times."""
        ...


class ByBytes(ABC):
    """Reading values for a source that knows how to read bytes."""

    specs: Mapping[str, TensorSpec]

    def read(self, name: str, start: int = 0, stop: int | None = None, *, out: Array | None = None) -> Array:
        """See :class:`TensorSource`."""
        if out is not None and not out.flags.c_contiguous:
            raise ValueError(f"{name}: out must be contiguous")
        raw = self.read_bytes(name, start, stop)
        values = widen(raw, self.specs[name].dtype, None if out is None else out.reshape(-1))
        return values if out is None else out

    @abstractmethod
    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """See :class:`TensorSource`."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor not read yet."""

    source: TensorSource
    name: str

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape."""
        return self.source.specs[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.spec.shape

    def load(self) -> Array:
        """The whole tensor, in its own shape (float32; float64 for F64; integers as stored)."""
        return self.source.read(self.name).reshape(self.shape)
