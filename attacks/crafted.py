"""Files that a careful reader must refuse, made from code.

``python attacks/crafted.py FOLDER`` writes them all; the tests call the same functions. They hold
zeros and small headers, but for the few whose point is their size.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ATTACKS", "INDEXES", "Attack", "entry", "pack", "write_all"]


@dataclass(frozen=True, slots=True)
class Attack:
    """A file to be refused.

    Attributes:
        name: of the file, without its suffix.
        make: gives its bytes.
        complaint: what a message must contain: the fault, and the tensor where one is to blame.
        accepted: whether safetensors 0.8 opens it all the same.
    """

    name: str
    make: Callable[[], bytes]
    complaint: str
    accepted: bool = False


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(header: dict[str, Any] | str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of a header, as JSON or as given, and bytes; ``length`` is what it claims of the header."""
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


_W = entry("F32", [2], 0, 8)
_ZEROS = bytes(8)
_TEXT = json.dumps(_W)


def _with(**changes: Any) -> Callable[[], bytes]:
    return lambda: pack({"w": {**_W, **changes}}, _ZEROS)


def _named(name: str) -> Callable[[], bytes]:
    return lambda: pack({name: _W}, _ZEROS)


def _text(text: str | bytes, data: bytes = _ZEROS) -> Callable[[], bytes]:
    return lambda: pack(text, data)


def _many(count: int) -> Callable[[], bytes]:
    item = json.dumps(entry("F32", [0], 0, 0), separators=(",", ":"))
    return lambda: pack("{" + ",".join(f'"{i:x}":{item}' for i in range(count)) + "}")


def _many_names() -> bytes:
    """Looking for the repeated one must not take the square of their number."""
    names = ",".join(f'"{i:x}":0' for i in range(200_000))
    return pack('{"w":{' + names + ',"1":0}}', _ZEROS)


ATTACKS: tuple[Attack, ...] = (
    # What is no safetensors file at all.
    Attack("empty_file", lambda: b"", "0 bytes cannot hold"),
    Attack("short_file", lambda: b"\x02\0\0", "3 bytes cannot hold"),
    Attack(
        "json_text", lambda: json.dumps({"error": "not found", "detail": "x" * 40}).encode(), "is JSON text"
    ),
    Attack("html_page", lambda: b"<!DOCTYPE html><html><body>Sign in</body></html>", "is HTML or XML text"),
    Attack(
        "lfs_pointer",
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
        "is a Git LFS pointer",
    ),
    # Lengths.
    Attack("length_over_file", lambda: pack({"w": _W}, _ZEROS, length=1_000), "longer than the file"),
    Attack("length_2_63", lambda: pack({"w": _W}, _ZEROS, length=1 << 63), "longer than the file"),
    Attack("length_zero", lambda: pack({}, _ZEROS, length=0), "header of 0 bytes"),
    Attack("header_over_cap", lambda: pack(b"{" + b" " * 16_000_000 + b"}"), "16,000,000 are allowed", True),
    Attack("header_over_100mb", lambda: pack(b"{" + b" " * 100_000_001 + b"}"), "16,000,000 are allowed"),
    Attack("trailing_bytes", lambda: pack({"w": _W}, bytes(9)), "tensors take 8 bytes, the file has 9"),
    Attack("truncated_data", lambda: pack({"w": _W}, bytes(7)), "tensors take 8 bytes, the file has 7"),
    # JSON.
    Attack("not_json", _text("{not json"), "header is not JSON"),
    Attack("not_utf8", _text(b'{"\xff":{}}'), "header is not JSON"),
    Attack("leading_space", _text(' {"w":' + _TEXT + "}"), "does not begin with '{'", True),
    Attack("not_an_object", _text("[]"), "does not begin with '{'"),
    Attack("garbage_after_json", _text('{"w":' + _TEXT + "}x"), "header is not JSON"),
    Attack("nul_padding", _text('{"w":' + _TEXT + "}\0\0"), "header is not JSON"),
    Attack("nested_deeply", _text('{"w":' + "[" * 200_000 + "]" * 200_000 + "}"), "nested too deeply"),
    Attack(
        "huge_integer", _text('{"w":{"dtype":"F32","shape":[' + "9" * 5_000 + "]}}"), "header is not JSON"
    ),
    Attack(
        "nan_constant", _text('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "NaN in the header"
    ),
    # Two readings of one file.
    Attack(
        "key_twice",
        _text('{"w":' + _TEXT + ',"w":' + json.dumps(entry("F32", [2], 8, 16)) + "}", bytes(16)),
        "'w' stands twice",
    ),
    Attack(
        "key_twice_same_offsets",
        _text('{"w":' + _TEXT + ',"w":' + json.dumps(entry("I32", [2], 0, 8)) + "}"),
        "'w' stands twice",
        True,
    ),
    Attack(
        "metadata_key_twice",
        _text('{"__metadata__":{"a":"1","a":"2"},"w":' + _TEXT + "}"),
        "'a' stands twice",
        True,
    ),
    Attack(
        "metadata_twice",
        _text('{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"},"w":' + _TEXT + "}"),
        "'__metadata__' stands twice",
    ),
    Attack(
        "field_twice",
        _text('{"w":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,8]}}'),
        "'shape' stands twice",
    ),
    Attack("one_of_many_twice", _many_names, "'1' stands twice"),
    Attack(
        "metadata_number",
        lambda: pack({"__metadata__": {"a": 1}, "w": _W}, _ZEROS),
        "__metadata__ is not a map",
    ),
    Attack(
        "metadata_list", lambda: pack({"__metadata__": ["a"], "w": _W}, _ZEROS), "__metadata__ is not a map"
    ),
    Attack(
        "metadata_half_a_pair",
        _text('{"__metadata__":{"a":"\\ud800"},"w":' + _TEXT + "}"),
        "half of a UTF-16 pair",
    ),
    # Bytes that no tensor, or more than one, claims.
    Attack("hole_at_start", lambda: pack({"w": entry("F32", [2], 4, 12)}, bytes(12)), "w leaves a hole"),
    Attack(
        "hole_between",
        lambda: pack({"v": _W, "w": entry("F32", [2], 12, 20)}, bytes(20)),
        "w leaves a hole",
    ),
    Attack("overlap", lambda: pack({"v": _W, "w": entry("F32", [2], 4, 12)}, bytes(12)), "w overlaps"),
    Attack("same_bytes_twice", lambda: pack({"v": _W, "w": _W}, _ZEROS), "w overlaps"),
    Attack("backwards", _with(data_offsets=[8, 0]), "w: F32 [2] needs 8 bytes, its offsets give -8"),
    Attack("size_mismatch", _with(shape=[3]), "w: F32 [3] needs 12 bytes, its offsets give 8"),
    Attack("half_bytes", lambda: pack({"w": entry("F4", [3], 0, 1)}, b"\0"), "w: 3 elements of 4 bits"),
    Attack("six_bits", lambda: pack({"w": entry("F6_E2M3", [3], 0, 2)}, b"\0\0"), "w: 3 elements of 6 bits"),
    # Entries.
    Attack("entry_is_text", _text('{"w":"F32"}'), "w: entry lacks"),
    Attack("entry_lacks_offsets", _text('{"w":{"dtype":"F32","shape":[2]}}'), "w: entry lacks"),
    Attack("three_offsets", _with(data_offsets=[0, 4, 8]), "w: entry lacks"),
    Attack("unknown_dtype", _with(dtype="F33"), "w: unknown dtype 'F33'"),
    Attack("dtype_is_list", _with(dtype=["F32"]), "w: unknown dtype ['F32']"),
    Attack("dtype_of_a_megabyte", _with(dtype="F" * 1_000_000), "w: unknown dtype 'FFFF"),
    Attack("shape_is_text", _with(shape="2"), "w: shape and data_offsets must be counts"),
    Attack("negative_dimension", _with(shape=[-2]), "w: shape and data_offsets must be counts"),
    Attack("two_negatives", _with(shape=[-2, -1]), "w: shape and data_offsets must be counts"),
    Attack("float_dimension", _with(shape=[2.0]), "w: shape and data_offsets must be counts"),
    Attack(
        "exponent_dimension",
        _text('{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'),
        "w: shape and",
    ),
    Attack("boolean_dimension", _with(shape=[True, 2]), "w: shape and data_offsets must be counts"),
    Attack("null_offset", _with(data_offsets=[None, 8]), "w: shape and data_offsets must be counts"),
    Attack("negative_offset", _with(data_offsets=[-8, 0]), "w: shape and data_offsets must be counts"),
    Attack("offsets_2_70", _with(shape=[1 << 40], data_offsets=[0, 1 << 70]), "w: data_offsets [0, 1180"),
    Attack("shape_overflows", _with(shape=[1 << 32, 1 << 32]), "w: shape [4294967296, 4294967296] is absurd"),
    Attack(
        "shape_wraps_to_two",
        _with(shape=[(1 << 63) + 1, 2]),
        "w: shape [9223372036854775809, 2] is absurd",
    ),
    Attack(
        "huge_and_zero",
        lambda: pack({"w": entry("F32", [1 << 62, 0], 0, 0)}),
        "w: shape [4611686018427387904, 0] is absurd",
        True,
    ),
    Attack(
        "dimensions_5001",
        lambda: pack({"w": entry("F32", [1] * 5_001, 0, 4)}, bytes(4)),
        "w: 5001 dimensions",
        True,
    ),
    Attack("tensors_150000", _many(150_000), "150,000 tensors; 100,000 are allowed", True),
    Attack("tensors_300000", _many(300_000), "16,000,000 are allowed", True),
    # Names.
    Attack("name_empty", _named(""), "a tensor has an empty name", True),
    Attack("name_nul", _named("a\0b"), r"in the name 'a\x00b'", True),
    Attack("name_newline", _named("a\nError: b"), r"in the name 'a\nError: b'", True),
    Attack("name_escape", _named("a\x1b[2Jb"), r"in the name 'a\x1b[2Jb'", True),
    Attack("name_bidi", _named("a\u202eb"), r"in the name 'a\u202eb'", True),
    Attack("name_zero_width", _named("a\u200bb"), r"in the name 'a\u200bb'", True),
    Attack("name_half_a_pair", _text('{"a\\ud800":' + _TEXT + "}"), r"in the name 'a\ud800'"),
    Attack("name_long", _named("n" * 2_000), "a tensor's name has 2,000 characters", True),
)

INDEXES: dict[str, str] = {
    "absolute": "/etc/passwd.safetensors",
    "climbing": "../model.safetensors",
    "climbing_inside": "a/../../model.safetensors",
    "in_a_folder": "a/model.safetensors",
    "backslash": "..\\model.safetensors",
    "drive": "C:model.safetensors",
    "share": "\\\\host\\model.safetensors",
    "stream": "model.safetensors:x.safetensors",
    "trailing_dot": "model.safetensors.",
    "trailing_space": "model.safetensors ",
    "nul": "a\0.safetensors",
    "newline": "a\n.safetensors",
    "other_suffix": "config.json",
    "no_stem": ".safetensors/",
    "empty": "",
}
"""Shard names that an index must not hold."""


def write_all(folder: Path) -> list[Path]:
    """Write every attack, and an index for every bad shard name."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for attack in ATTACKS:
        written.append(folder / f"{attack.name}.safetensors")
        written[-1].write_bytes(attack.make())
    for name, shard in INDEXES.items():
        written.append(folder / f"{name}.safetensors.index.json")
        written[-1].write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python attacks/crafted.py FOLDER")
    files = write_all(Path(sys.argv[1]))
    sys.stdout.write(f"{len(files)} files in {sys.argv[1]}\n")
