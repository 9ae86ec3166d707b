"""Tensors made of other tensors by moving their elements about: transposed, permuted, some rows, several as one.

A reader gives every factor the shape that mathematics expects, however its file stores it. Nothing is read until a view
is, and no bit changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from loratools.errors import ShapeMismatch, Unsupported
from loratools.tensors.base import ByBytes, TensorRef, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loratools.dtypes import Array
    from loratools.tensors.base import Extent

__all__ = [
    "Gathered",
    "joined",
    "permuted",
    "picked",
    "placed",
    "reshaped",
    "sources",
    "stacked",
    "transposed",
]

_WORDS = {8: "u1", 16: "<u2", 32: "<u4", 64: "<u8"}  # the unsigned integer that carries a value's bits


@dataclass(frozen=True, slots=True)
class _Shuffle:
    """Elements of one tensor in another order: reshaped to ``inner``, its axes exchanged, rows picked."""

    inner: tuple[int, ...]
    axes: tuple[int, ...]
    rows: tuple[tuple[int, int], ...] | None = None

    def __call__(self, parts: Sequence[Array], shape: tuple[int, ...]) -> Array:
        import numpy as np

        values = parts[0].reshape(self.inner).transpose(self.axes)
        if self.rows is not None:
            values = np.concatenate([values[start:stop] for start, stop in self.rows])
        return np.ascontiguousarray(values).reshape(shape)


@dataclass(frozen=True, slots=True)
class _Together:
    """Several tensors one behind the other, along the first dimension."""

    def __call__(self, parts: Sequence[Array], shape: tuple[int, ...]) -> Array:
        import numpy as np

        return np.concatenate([part.reshape(-1) for part in parts]).reshape(shape)


@dataclass(frozen=True, slots=True)
class _Placed:
    """Matrices at their places in one that is zero elsewhere."""

    corners: tuple[tuple[int, int], ...]  # row and column of each one's first element

    def __call__(self, parts: Sequence[Array], shape: tuple[int, ...]) -> Array:
        import numpy as np

        whole = np.zeros((shape[0], prod(shape[1:])), parts[0].dtype)  # no bit set: 0.0 in every type
        for part, (row, column) in zip(parts, self.corners, strict=True):
            block = part.reshape(part.shape[0], -1)
            whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        return whole.reshape(shape)


class _ViewSource(ByBytes):
    """One tensor that is made of others; see :class:`~loratools.tensors.base.TensorSource`."""

    def __init__(self, name: str, refs: tuple[TensorRef, ...], spec: TensorSpec, made: Any) -> None:
        self.specs: Mapping[str, TensorSpec] = {name: spec}
        self.metadata: Mapping[str, str] = {}
        self.refs = refs
        self._made = made

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        import numpy as np

        spec = self.specs[name]
        word = np.dtype(_WORDS[spec.dtype.bits])
        parts = [ref.source.read_bytes(ref.name).view(word).reshape(ref.shape) for ref in self.refs]
        whole = self._made(parts, spec.shape).reshape(-1)
        return np.ascontiguousarray(whole[start : spec.count if stop is None else stop]).view(np.uint8)

    def extent(self, name: str) -> None:
        """Its bytes lie in no file in this order."""

    def identity(self) -> tuple[Any, ...]:
        sources = {id(ref.source): ref.source for ref in self.refs}
        return ("view", *(source.identity() for source in sources.values()))


def _view(refs: Sequence[TensorRef], shape: tuple[int, ...], made: Any) -> TensorRef:
    stored = refs[0].spec.dtype
    if stored.bits not in _WORDS:
        raise Unsupported(f"{refs[0].name}: values of {stored.bits} bits cannot be rearranged")
    name = refs[0].name
    return TensorRef(_ViewSource(name, tuple(refs), TensorSpec(stored, shape), made), name)


def permuted(
    ref: TensorRef, inner: tuple[int, ...], axes: tuple[int, ...], shape: tuple[int, ...]
) -> TensorRef:
    """A tensor reshaped to ``inner``, with its axes in another order, reshaped to ``shape``.

    Raises:
        ShapeMismatch: the numbers of elements differ.
    """
    if not prod(inner) == prod(shape) == ref.spec.count:
        raise ShapeMismatch(ref.name, ref.shape, inner)
    return _view([ref], shape, _Shuffle(inner, axes))


def transposed(ref: TensorRef) -> TensorRef:
    """A matrix with rows and columns exchanged."""
    rows, columns = ref.shape
    return permuted(ref, (rows, columns), (1, 0), (columns, rows))


def reshaped(ref: TensorRef, shape: tuple[int, ...]) -> TensorRef:
    """The same elements in another shape."""
    return ref if ref.shape == shape else permuted(ref, ref.shape, tuple(range(len(ref.shape))), shape)


def picked(ref: TensorRef, rows: Sequence[tuple[int, int]]) -> TensorRef:
    """Some rows of a tensor: runs ``(start, stop)`` of its first dimension, in this order.

    Raises:
        ShapeMismatch: a run is not in the tensor.
    """
    count = ref.shape[0] if ref.shape else 0
    if any(not 0 <= start <= stop <= count for start, stop in rows):
        raise ShapeMismatch(f"rows of {ref.name}", (max(stop for _, stop in rows),), (count,))
    if list(rows) == [(0, count)]:
        return ref
    shape = (sum(stop - start for start, stop in rows), *ref.shape[1:])
    return _view([ref], shape, _Shuffle(ref.shape, tuple(range(len(ref.shape))), tuple(rows)))


def joined(refs: Sequence[TensorRef]) -> TensorRef:
    """Tensors of one type, one behind the other along the first dimension.

    Raises:
        ShapeMismatch: their other dimensions, or their types, differ.
    """
    first = refs[0]
    for ref in refs[1:]:
        if ref.shape[1:] != first.shape[1:] or ref.spec.dtype != first.spec.dtype:
            raise ShapeMismatch(ref.name, ref.shape, first.shape)
    shape = (sum(ref.shape[0] for ref in refs), *first.shape[1:])
    return _view(list(refs), shape, _Together())


def stacked(refs: Sequence[TensorRef]) -> TensorRef:
    """Tensors of one shape and type behind a new first dimension.

    Raises:
        ShapeMismatch: they are not.
    """
    first = refs[0]
    for ref in refs[1:]:
        if ref.shape != first.shape or ref.spec.dtype != first.spec.dtype:
            raise ShapeMismatch(ref.name, ref.shape, first.shape)
    return _view(list(refs), (len(refs), *first.shape), _Together())


def placed(
    refs: Sequence[TensorRef], corners: Sequence[tuple[int, int]], shape: tuple[int, ...]
) -> TensorRef:
    """Tensors of one type inside a larger one of zeros, all seen as matrices: (first dimension, the others).

    Args:
        refs: the blocks.
        corners: the row and column of each one's first element.
        shape: of the whole.

    Raises:
        ShapeMismatch: a block sticks out, or is of another type than the first.
    """
    first = refs[0]
    for ref, (row, column) in zip(refs, corners, strict=True):
        fits = row + ref.shape[0] <= shape[0] and column + prod(ref.shape[1:]) <= prod(shape[1:])
        if not fits or ref.spec.dtype != first.spec.dtype:
            raise ShapeMismatch(ref.name, ref.shape, shape)
    return _view(list(refs), shape, _Placed(tuple(corners)))


class Gathered:
    """Tensors of anywhere, under names of their own, as one source."""

    def __init__(self, refs: Mapping[str, TensorRef], metadata: Mapping[str, str] | None = None) -> None:
        self.refs = refs
        self.specs: Mapping[str, TensorSpec] = {name: ref.spec for name, ref in refs.items()}
        self.metadata: Mapping[str, str] = metadata or {}

    def read(self, name: str, start: int = 0, stop: int | None = None, *, out: Array | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        return self.refs[name].source.read(self.refs[name].name, start, stop, out=out)

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        return self.refs[name].source.read_bytes(self.refs[name].name, start, stop)

    def extent(self, name: str) -> Extent | None:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        return self.refs[name].source.extent(self.refs[name].name)

    def identity(self) -> tuple[Any, ...]:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        found = {id(ref.source): ref.source for ref in self.refs.values()}
        return ("gathered", *(source.identity() for source in found.values()))


def sources(ref: TensorRef) -> Iterator[TensorRef]:
    """The stored tensors that a tensor is made of; of one that is no view, itself."""
    if isinstance(ref.source, _ViewSource):
        for inner in ref.source.refs:
            yield from sources(inner)
    else:
        yield ref
