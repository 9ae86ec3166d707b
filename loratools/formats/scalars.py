"""Numbers stored as tensors of one element: alphas and flags. They are read with the headers, so numpy stays out."""

from __future__ import annotations

import struct
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from loratools.errors import CorruptFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from loratools.dtypes import Dtype
    from loratools.tensors.base import TensorRef

__all__ = ["numbers"]

_FORMATS = {"F16": "<e", "F32": "<f", "F64": "<d"}


def numbers(refs: Iterable[TensorRef]) -> dict[str, float]:
    """The value of each tensor of one element, by its name; those with more or fewer are left out.

    Raises:
        CorruptFile: the file ends before one of them.
    """
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}

        def opened(path: str) -> BinaryIO:
            if path not in files:
                files[path] = stack.enter_context(Path(path).open("rb"))
            return files[path]

        return {ref.name: _number(ref, opened) for ref in refs if ref.spec.count == 1}


def _number(ref: TensorRef, opened: Callable[[str], BinaryIO]) -> float:
    extent, stored = ref.source.extent(ref.name), ref.spec.dtype
    if extent is None or not (stored.kind in {"int", "bool"} or stored.name in {*_FORMATS, "BF16"}):
        return float(ref.load().reshape(-1)[0])
    file = opened(extent.path)
    file.seek(extent.offset)
    raw = file.read(extent.nbytes)
    if len(raw) != extent.nbytes:
        raise CorruptFile(extent.path, f"ends within {ref.name}", hint="fetch it again")
    return _decoded(raw, stored)


def _decoded(raw: bytes, stored: Dtype) -> float:
    """One number from its bytes.

    >>> from loratools.dtypes import dtype
    >>> _decoded(bytes([0x80, 0x3F]), dtype("BF16")), _decoded(bytes([255, 255]), dtype("I16"))
    (1.0, -1.0)
    """
    if stored.name == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    if stored.name in _FORMATS:
        return float(struct.unpack(_FORMATS[stored.name], raw)[0])
    return float(int.from_bytes(raw, "little", signed=stored.name.startswith("I")))
