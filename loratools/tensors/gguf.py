"""GGUF files of llama.cpp as a source of tensors, read with the ``gguf`` package.

The package believes every length it reads, so a file's header is walked here first: whatever would lead outside the
file is refused before the package sees it.
"""

from __future__ import annotations

import importlib
import struct
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.dtypes import DTYPES
from loratools.errors import CorruptFile, Unsupported, quoted
from loratools.tensors.base import ByBytes, Extent, TensorSpec, span
from loratools.tensors.files import File
from loratools.tensors.header import check_name

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from types import ModuleType

    from loratools.dtypes import Array

__all__ = ["MAGIC", "GgufFile", "gguf_package"]

MAGIC = b"GGUF"
MAX_TEXT = 1_000_000  # bytes of a tensor's name
_AHEAD = 1 << 16
MAX_FIELDS = 100_000
MAX_TENSORS = 1_000_000
MAX_ITEMS = 2_000_000  # of all arrays: the package makes an object of each
MAX_DIMENSIONS = 4  # of ggml
_SHOWN = 1_000  # items of an array that are kept

# ggml's types that safetensors has too, by their name; the others are quantised blocks.
_PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
_STRING, _ARRAY = 8, 9
_UINT32 = 4
_ALIGNMENT = 32  # of the tensors' data, where general.alignment does not say it
_SIZES = {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2}  # bytes of an element of ggml's plain types
_AGAIN = "fetch it again, or write it again"
_WIDTHS = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # bytes of a scalar, by its type


def gguf_package() -> ModuleType:
    """The package that reads and writes GGUF.

    Raises:
        Unsupported: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise Unsupported(
            "GGUF needs the gguf package, which is not installed", hint="pip install 'loratools[gguf]'"
        ) from error


class GgufFile(ByBytes):
    """One GGUF file. Shapes are numpy's: the fastest dimension, which GGUF names first, is last.

    Attributes:
        fields: the metadata as Python values.

    Raises:
        NotFound: no such file.
        CorruptFile: it breaks a rule of the format.
        Unsupported: the ``gguf`` package is not installed, or a tensor is quantised.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self.file = File(path)
        try:
            _require_sane(self.file)
        finally:
            self.file.close()
        self.specs: Mapping[str, TensorSpec]
        self.fields: Mapping[str, Any]
        self.specs, self.fields, self._offsets = _read(self.path)
        self.metadata: Mapping[str, str] = {
            key: str(value) for key, value in self.fields.items() if not key.startswith("GGUF.")
        }

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        import numpy as np

        offset, count = span(self.specs[name], start, stop)
        raw = np.empty(count, np.uint8)
        self.file.read_into(raw.data, self._offsets[name] + offset)
        return raw

    def extent(self, name: str) -> Extent:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        return Extent(self.path, self._offsets[name], self.specs[name].nbytes)

    def identity(self) -> tuple[Any, ...]:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        found = Path(self.path).stat()
        return (self.path, found.st_size, found.st_mtime_ns)


def _read(path: str) -> tuple[dict[str, TensorSpec], dict[str, Any], dict[str, int]]:
    """Specs, metadata, and offsets in the file."""
    package = gguf_package()
    try:
        reader = package.GGUFReader(path)
        fields = {name: _value(field) for name, field in reader.fields.items()}
        listed = [
            (str(tensor.name), tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape)), tensor)
            for tensor in reader.tensors
        ]
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeError, TypeError) as error:
        raise CorruptFile(path, f"not a readable GGUF file: {error}") from error
    specs, offsets, size = {}, {}, Path(path).stat().st_size
    for name, kind, shape, tensor in listed:
        check_name(path, name)
        if kind not in _PLAIN:
            raise Unsupported(
                f"{path}: {name} is quantised ({kind})",
                hint="convert the adapter again with --outtype f16 or f32",
            )
        specs[name] = TensorSpec(DTYPES[kind], shape)
        offsets[name] = int(tensor.data_offset)
        if offsets[name] + specs[name].nbytes > size:
            raise _truncated(path, f"{name} ends after byte {size:,}, where the file does")
    return specs, fields, offsets


def _value(field: Any) -> Any:
    """A metadata field as a Python value; of a long array, its beginning."""
    return field.contents(slice(_SHOWN)) if len(field.data) > 1 else field.contents()


# --- the walk through the header -----------------------------------------------------------------------------


def _require_sane(file: File) -> None:
    """Refuse a header whose counts and lengths lead outside the file.

    Raises:
        CorruptFile: they do; or it is no GGUF file of version 2 or 3, least significant byte first.
    """
    walk = _Walk(file)
    if not walk.size:
        raise CorruptFile(file.path, "is empty", hint=_AGAIN)
    if walk.take(4) != MAGIC:
        raise CorruptFile(file.path, "does not begin with GGUF")
    version = walk.number("<I")
    if version not in (2, 3):
        what = "most significant byte first" if version and not version & 0xFFFF else f"version {version}"
        raise CorruptFile(
            file.path, f"is GGUF {what}; versions 2 and 3, least significant byte first, are read"
        )
    tensors, fields = walk.count("tensors", MAX_TENSORS), walk.count("metadata fields", MAX_FIELDS)
    alignment, end = _ALIGNMENT, 0
    for _ in range(fields):
        key, kind = walk.text(), walk.number("<I")
        if (key, kind) == ("general.alignment", _UINT32):
            alignment = walk.number("<I") or _ALIGNMENT
        else:
            walk.value(kind)
    for _ in range(tensors):
        name = walk.text()
        dimensions = walk.number("<I")
        if dimensions > MAX_DIMENSIONS:
            raise CorruptFile(file.path, f"{quoted(name)} has {dimensions:,} dimensions")
        shape = [walk.number("<Q") for _ in range(dimensions)]
        size, offset = _SIZES.get(walk.number("<I"), 0), walk.number("<Q")
        end = max(end, offset + size * prod(shape))
        if prod(n or 1 for n in shape) > walk.size * 8:
            raise CorruptFile(file.path, f"{quoted(name)}: shape {shape} does not fit into the file")
    needed = -(-walk.place // alignment) * alignment + end if end else walk.place
    if needed > walk.size:
        raise _truncated(file.path, f"{walk.size:,} bytes of {needed:,}")


def _truncated(path: str, how: str) -> CorruptFile:
    return CorruptFile(path, f"is truncated: {how}", hint=_AGAIN)


class _Walk:
    """A position in a file that cannot leave it. Reads a little at a time: what follows the header may be long."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.path = file.path
        self.size = file.size()
        self.place = 0
        self.items = 0  # of all arrays so far
        self._begin, self._ahead = 0, b""  # what has been read of the file, and where that begins

    def skip(self, count: int) -> None:
        if self.place + count > self.size:
            raise _truncated(self.path, f"the header ends at byte {self.size:,}; more was expected")
        self.place += count

    def take(self, count: int) -> bytes:
        start = self.place
        self.skip(count)
        if count > MAX_TEXT:
            raise CorruptFile(self.path, f"a text of {count:,} bytes in the header; {MAX_TEXT:,} are allowed")
        if self.place > self._begin + len(self._ahead):
            self._begin = start
            self._ahead = self.file.read(min(max(count, _AHEAD), self.size - start), start)
        return self._ahead[start - self._begin : self.place - self._begin]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def count(self, what: str, limit: int) -> int:
        found = self.number("<Q")
        if found > limit:
            raise CorruptFile(self.path, f"{found:,} {what}; {limit:,} are allowed")
        return found

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def skip_text(self) -> None:
        self.skip(self.number("<Q"))

    def value(self, kind: int) -> None:
        """Pass over a value."""
        if kind == _STRING:
            self.skip_text()
        elif kind == _ARRAY:
            inner, items = self.number("<I"), self.count("items in an array", MAX_ITEMS - self.items)
            self.items += items
            if inner in _WIDTHS:
                self.skip(items * _WIDTHS[inner])
            elif inner == _STRING:
                for _ in range(items):
                    self.skip_text()
            else:
                raise CorruptFile(self.path, f"an array of type {inner}, which is none of GGUF's")
        elif kind in _WIDTHS:
            self.skip(_WIDTHS[kind])
        else:
            raise CorruptFile(self.path, f"a metadata field of type {kind}, which is none of GGUF's")
