"""Tensors that are a piece of another, of which nothing else is read: one expert of a stack.

Like the views beside them, they keep the stored bits and cost nothing until they are read.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from loratools.errors import ShapeMismatch
from loratools.tensors.base import Extent, TensorRef, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.dtypes import Array

__all__ = ["slab"]


class _RunSource:
    """Consecutive elements of a tensor; see :class:`~loratools.tensors.base.TensorSource`. Reads nothing else of it."""

    def __init__(self, ref: TensorRef, begin: int, shape: tuple[int, ...]) -> None:
        self.specs: Mapping[str, TensorSpec] = {ref.name: TensorSpec(ref.spec.dtype, shape)}
        self.metadata: Mapping[str, str] = {}
        self.ref = ref
        self.begin = begin  # in elements

    def read(self, name: str, start: int = 0, stop: int | None = None, *, out: Array | None = None) -> Array:
        return self.ref.source.read(name, *self._shifted(name, start, stop), out=out)

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        return self.ref.source.read_bytes(name, *self._shifted(name, start, stop))

    def _shifted(self, name: str, start: int, stop: int | None) -> tuple[int, int]:
        last = self.specs[name].count if stop is None else stop
        if not 0 <= start <= last <= self.specs[name].count:
            raise IndexError(f"elements {start} to {last} of a tensor of {self.specs[name].count}")
        return self.begin + start, self.begin + last

    def extent(self, name: str) -> Extent | None:
        whole, spec = self.ref.source.extent(name), self.specs[name]
        if whole is None or spec.dtype.bits < 8:
            return None
        return Extent(whole.path, whole.offset + spec.dtype.nbytes(self.begin), spec.nbytes)

    def identity(self) -> tuple[Any, ...]:
        return ("run", self.begin, self.ref.source.identity())


def slab(ref: TensorRef, index: int, shape: tuple[int, ...]) -> TensorRef:
    """The ``index``-th of the equal pieces a tensor consists of along its first dimension, as a tensor of ``shape``.

    >>> import numpy as np
    >>> from loratools.tensors.memory import MemorySource
    >>> ref = TensorRef(MemorySource({"w": np.arange(12.0).reshape(3, 2, 2)}), "w")
    >>> slab(ref, 1, (2, 2)).load().tolist()
    [[4.0, 5.0], [6.0, 7.0]]

    Raises:
        ShapeMismatch: the tensor does not consist of such pieces, or of fewer.
    """
    size = prod(shape)
    if not size or ref.spec.count % size or not 0 <= index < ref.spec.count // size:
        raise ShapeMismatch(ref.name, ref.shape, shape)
    return TensorRef(_RunSource(ref, index * size, shape), ref.name)
