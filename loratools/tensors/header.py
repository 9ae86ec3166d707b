"""The header of a safetensors file, read as hostile input and written canonically.

Layout (https://github.com/huggingface/safetensors#format): eight bytes with the length of the header, the header as
JSON, then the tensors' bytes, which the entries must cover without holes or overlaps. The reference reader accepts
some things that are refused here because two parsers could read them differently, or because they can only harm:
repeated keys, names with control or bidirectional characters, shapes of absurd size, hundreds of thousands of tensors.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn

from loratools.dtypes import DTYPES
from loratools.errors import CorruptFile, quoted
from loratools.tensors.base import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "MAX_HEADER",
    "MAX_TENSORS",
    "Header",
    "check_name",
    "layout",
    "parse_header",
    "read_json",
    "read_length",
]

MAX_HEADER = 16_000_000  # bytes; a header of 1,000 tensors has about 120,000
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 48
MAX_NAME = 1_000  # characters
ALIGNMENT = 8

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says before its values."""

    specs: dict[str, TensorSpec]  # in the order of their bytes
    offsets: dict[str, int]  # bytes from the start of the file
    metadata: dict[str, str]
    data_start: int
    size: int  # of the whole file


def read_length(path: object, start: bytes, size: int) -> int:
    """The length of the header, from the first bytes of a file.

    Args:
        path: what to call the file in an error.
        start: its first bytes; eight are needed, more help to say what the file is instead.
        size: of the whole file, in bytes.

    Raises:
        CorruptFile: this cannot be a safetensors file.
    """
    _require_no_pointer(path, start)
    if size < ALIGNMENT:
        raise CorruptFile(path, f"{size} bytes cannot hold a safetensors header")
    length = int.from_bytes(start[:8], "little")
    if start[:1] in (b"{", b"<") and length > size:
        kind = "JSON" if start[:1] == b"{" else "HTML or XML"
        raise CorruptFile(
            path, f"is {kind} text, not safetensors", hint="a failed download often saves such a page"
        )
    if length > size - 8:
        raise CorruptFile(path, f"header of {length:,} bytes is longer than the file ({size:,} bytes)")
    if length > MAX_HEADER:
        raise CorruptFile(path, f"header of {length:,} bytes; {MAX_HEADER:,} are allowed")
    if length < 2:
        raise CorruptFile(path, f"header of {length} bytes cannot be JSON")
    return length


def _require_no_pointer(path: object, start: bytes) -> None:
    if start.startswith(_LFS_POINTER):
        raise CorruptFile(
            path, "is a Git LFS pointer, not the file itself", hint="fetch the real file: git lfs pull"
        )


def parse_header(path: object, text: bytes, size: int) -> Header:
    """Check and order the entries of a header.

    Args:
        path: what to call the file in an error.
        text: the header's JSON, without the eight bytes before it.
        size: of the whole file, in bytes.

    Raises:
        CorruptFile: it breaks a rule of the format, or one of this module's limits.
    """

    def fail(problem: str) -> NoReturn:
        raise CorruptFile(path, problem)

    if text[:1] != b"{":
        fail("header does not begin with '{'")
    entries = read_json(path, text, "header")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        fail("__metadata__ is not a map from strings to strings")
    if any(_SURROGATE.search(part) for pair in metadata.items() for part in pair):
        fail("__metadata__ holds half of a UTF-16 pair, which is not text")
    if len(entries) > MAX_TENSORS:
        fail(f"{len(entries):,} tensors; {MAX_TENSORS:,} are allowed")
    placed = sorted((_entry(path, name, entry) for name, entry in entries.items()), key=lambda p: p[2:])
    data_start, position = 8 + len(text), 0
    specs, offsets = {}, {}
    for name, spec, begin, end in placed:
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            fail(f"{name} {what}: starts at byte {begin:,} of the data, expected {position:,}")
        specs[name], offsets[name], position = spec, data_start + begin, end
    if data_start + position != size:
        fail(f"tensors take {position:,} bytes, the file has {size - data_start:,}")
    return Header(specs, offsets, metadata, data_start, size)


def read_json(path: object, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice: of two equal keys, one parser takes the first, another the last.

    Raises:
        CorruptFile: it is not JSON in UTF-8, not an object, or repeats a key; ``what`` is called by name.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            (twice, _count), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise CorruptFile(path, f"{quoted(twice)} stands twice in the {what}")
        return result

    def constant(name: str) -> NoReturn:
        raise CorruptFile(path, f"{name} in the {what}")

    _require_no_pointer(path, text)
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError as error:
        raise CorruptFile(path, f"{what} is not JSON: nested too deeply") from error
    except ValueError as error:
        if isinstance(error, CorruptFile):
            raise
        raise CorruptFile(path, f"{what} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CorruptFile(path, f"{what} is not a JSON object")
    return parsed


def _entry(path: object, name: str, entry: object) -> tuple[str, TensorSpec, int, int]:
    check_name(path, name)
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptFile(path, f"{name}: entry lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CorruptFile(path, f"{name}: unknown dtype {quoted(dtype_name)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in [*shape, begin, end]):
        raise CorruptFile(path, f"{name}: shape and data_offsets must be counts")
    if max(begin, end) > MAX_ELEMENTS * 8:
        raise CorruptFile(path, f"{name}: data_offsets {quoted([begin, end])} are absurd")
    if len(shape) > MAX_DIMENSIONS:
        raise CorruptFile(path, f"{name}: {len(shape)} dimensions; {MAX_DIMENSIONS} are allowed")
    spec = TensorSpec(DTYPES[dtype_name], tuple(shape))
    if max(shape, default=0) > MAX_ELEMENTS or prod(n or 1 for n in shape) > MAX_ELEMENTS:
        raise CorruptFile(path, f"{name}: shape {quoted(shape)} is absurd")
    if spec.count * spec.dtype.bits % 8:
        raise CorruptFile(path, f"{name}: {spec.count} elements of {spec.dtype.bits} bits do not fill bytes")
    if end - begin != spec.nbytes:
        raise CorruptFile(
            path,
            f"{name}: {spec.dtype} {shape} needs {spec.nbytes:,} bytes, its offsets give {end - begin:,}",
        )
    return name, spec, begin, end


def check_name(path: object, name: str) -> None:
    """Refuse a tensor name that could not be shown or typed safely, or is no name at all.

    Raises:
        CorruptFile: it is empty, ``__metadata__``, too long, or has control or bidirectional characters.
    """
    if not name:
        raise CorruptFile(path, "a tensor has an empty name")
    if name == "__metadata__":
        raise CorruptFile(path, "a tensor is called __metadata__, which is no name for one")
    if len(name) > MAX_NAME:
        raise CorruptFile(path, f"a tensor's name has {len(name):,} characters: {quoted(name)}")
    if name.isascii() and name.isprintable():
        return
    if any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in name):
        raise CorruptFile(path, f"control or bidirectional characters in the name {quoted(name, 200)}")


def layout(
    tensors: Iterable[tuple[str, TensorSpec]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds ``tensors`` in this order, and where each will lie.

    Returns:
        The eight bytes and the padded JSON; and offsets from the start of the file.

    Raises:
        CorruptFile: a name that :func:`parse_header` would refuse.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, position = {}, 0
    for name, spec in tensors:
        check_name("the output", name)  # a state dict may hold names that no reader should accept
        begins[name], end = position, position + spec.nbytes
        entries[name] = {"dtype": spec.dtype.name, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}
