"""Element types: their names and sizes in a header, and the one conversion between stored bytes and float32.

Nothing here imports numpy until bytes are converted, so headers can be read without it. Names are those of
safetensors (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from loratools.errors import Unsupported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = [
    "DTYPES",
    "Dtype",
    "accumulator",
    "compatible",
    "dtype",
    "largest",
    "narrow",
    "numpy_dtype",
    "unpack_nibbles",
    "widen",
]

Kind = Literal["float", "int", "bool", "complex"]


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type.

    >>> dtype("BF16").nbytes(3), dtype("F4").nbytes(4)
    (6, 2)
    """

    name: str
    bits: int
    kind: Kind
    numpy: str | None  # the numpy or ml_dtypes name; None where neither has the type

    def nbytes(self, count: int) -> int:
        """Bytes taken by ``count`` elements; sub-byte types are packed."""
        return count * self.bits // 8

    def __str__(self) -> str:
        return self.name


DTYPES: dict[str, Dtype] = {
    t.name: t
    for t in (
        Dtype("BOOL", 8, "bool", "bool"),
        Dtype("F4", 4, "float", "float4_e2m1fn"),
        Dtype("F6_E2M3", 6, "float", None),
        Dtype("F6_E3M2", 6, "float", None),
        Dtype("U8", 8, "int", "uint8"),
        Dtype("I8", 8, "int", "int8"),
        Dtype("F8_E5M2", 8, "float", "float8_e5m2"),
        Dtype("F8_E4M3", 8, "float", "float8_e4m3fn"),
        Dtype("F8_E8M0", 8, "float", "float8_e8m0fnu"),
        Dtype("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz"),
        Dtype("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz"),
        Dtype("I16", 16, "int", "int16"),
        Dtype("U16", 16, "int", "uint16"),
        Dtype("F16", 16, "float", "float16"),
        Dtype("BF16", 16, "float", "bfloat16"),
        Dtype("I32", 32, "int", "int32"),
        Dtype("U32", 32, "int", "uint32"),
        Dtype("F32", 32, "float", "float32"),
        Dtype("C64", 64, "complex", "complex64"),
        Dtype("F64", 64, "float", "float64"),
        Dtype("I64", 64, "int", "int64"),
        Dtype("U64", 64, "int", "uint64"),
    )
}

_ALIASES = {
    "bfloat16": "BF16", "bf16": "BF16", "float16": "F16", "fp16": "F16", "f16": "F16", "half": "F16",
    "float32": "F32", "fp32": "F32", "f32": "F32", "float": "F32", "float64": "F64", "fp64": "F64", "f64": "F64",
    "double": "F64",
}  # fmt: skip


def dtype(name: str) -> Dtype:
    """The type a user or a header calls ``name``.

    >>> dtype("bfloat16").name
    'BF16'

    Raises:
        Unsupported: nobody calls a type that.
    """
    found = DTYPES.get(name) or DTYPES.get(_ALIASES.get(name.lower(), name.upper()))
    if found is None:
        raise Unsupported(
            f"unknown dtype {name!r}", hint="bf16, f16, f32 and f64 are usual; `loratools formats` lists all"
        )
    return found


@cache
def numpy_dtype(stored: Dtype) -> np.dtype[Any]:
    """The numpy type of one stored element (one *pair* of elements for F4).

    Raises:
        Unsupported: neither numpy nor ml_dtypes has the type (the 6-bit floats).
    """
    import numpy as np

    if stored.numpy is None:
        raise Unsupported(f"{stored} can be copied but not computed with")
    if stored.bits == 4:
        return np.dtype(np.uint8)
    if hasattr(np, stored.numpy):
        return np.dtype(stored.numpy)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, stored.numpy))
    return found


def accumulator(stored: Dtype) -> Dtype:
    """The type arithmetic on ``stored`` happens in: float64 for F64, float32 for every other float."""
    if stored.kind == "float":
        return DTYPES["F64"] if stored.name == "F64" else DTYPES["F32"]
    return stored


def compatible(stored: Dtype) -> bool:
    """Whether a value of this type can be rounded to once from float arithmetic (plain floats of 16 bits and up)."""
    return stored.kind == "float" and stored.bits >= 16


@cache
def largest(stored: Dtype) -> float:
    """The largest finite value of a float type."""
    if stored.name in {"F16", "F32", "F64"}:
        import numpy as np

        return float(np.finfo(numpy_dtype(stored)).max)
    import ml_dtypes

    return float(ml_dtypes.finfo(getattr(ml_dtypes, str(stored.numpy))).max)


def widen(raw: Array, stored: Dtype, out: Array | None = None) -> Array:
    """Stored bytes to values to compute with: float32, float64 for F64, integers and booleans as they are.

    Args:
        raw: the bytes, uint8, one-dimensional.
        stored: what they hold.
        out: an array of ``accumulator(stored)`` to fill instead of a new one; its size counts the elements.

    Returns:
        A one-dimensional array (``out`` where it was given); a view of ``raw`` where nothing had to change.
    """
    import numpy as np

    values = raw.view(numpy_dtype(stored))
    if stored.bits == 4:
        values = unpack_nibbles(values, stored)
    with np.errstate(invalid="ignore"):  # a signalling NaN stays a NaN, without a word
        if out is not None and stored.name == "F16" and out.dtype == np.float32:
            from loratools.halves import from_half

            from_half(values, out)
            return out
        if out is not None:
            np.copyto(out, values, casting="same_kind")
            return out
        if stored.kind == "float" and stored.name not in {"F32", "F64"}:
            return values.astype(np.float32)
    return values


def unpack_nibbles(pairs: Array, stored: Dtype) -> Array:
    """Packed 4-bit floats as ml_dtypes holds them: one byte an element."""
    import ml_dtypes
    import numpy as np

    nibbles = np.empty(pairs.size * 2, np.uint8)
    nibbles[0::2] = pairs & 0xF  # the first element sits in the low half, as torch packs float4
    nibbles[1::2] = pairs >> 4
    return nibbles.view(getattr(ml_dtypes, str(stored.numpy)))


def narrow(values: Array, stored: Dtype, out: Array) -> Array:
    """Round ``values`` once, to nearest even, into ``out`` (uint8, contiguous, ``stored.nbytes(values.size)`` long).

    Returns:
        ``out``.

    Raises:
        Unsupported: ``stored`` is not a plain float of 16 bits or more.
    """
    import numpy as np

    if not compatible(stored):
        raise Unsupported(f"values cannot be rounded to {stored}")
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what overflowed, and names it
        if stored.name == "BF16" and values.dtype == np.float64:
            values = _to_odd(values)
        if stored.name == "F16" and values.dtype == np.float32 and values.flags.c_contiguous:
            from loratools.halves import to_half

            to_half(values.reshape(-1), out.view(np.float16))
            return out
        np.copyto(out.view(numpy_dtype(stored)).reshape(values.shape), values, casting="unsafe")
    return out


def _to_odd(values: Array) -> Array:
    """float64 to float32, rounded to odd, so that rounding it on to bfloat16 (ml_dtypes' way) is rounding once.

    Boldo and Melquiond 2008, https://doi.org/10.1109/TC.2008.139.
    """
    import numpy as np

    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    inexact = (single != values) & np.isfinite(values)
    bits -= inexact & (np.abs(single) > np.abs(values))  # back towards zero
    bits |= inexact
    return single
