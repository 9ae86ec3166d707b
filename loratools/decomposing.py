"""From the values of two tensors to the factors of their difference: what a worker does for one module at a time."""

from __future__ import annotations

import hashlib
import math
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loratools.deltas.lowrank import LowRank
from loratools.deltas.ranks import (
    gavish_donoho,
    rank_above,
    rank_for_energy,
    rank_for_error,
    rounding_variance,
)
from loratools.deltas.spectra import exact, sketch
from loratools.deltas.streams import Streamed, mirrored
from loratools.dtypes import DTYPES
from loratools.errors import InputError, NonFinite
from loratools.extracting import Candidate

if TYPE_CHECKING:
    from loratools.deltas.spectra import Approximation, Spectrum
    from loratools.deltas.streams import Matrix
    from loratools.dtypes import Array
    from loratools.extracting import Whole
    from loratools.tensors.base import TensorRef

__all__ = ["Decomposed", "Part", "Rule", "Svd", "peak_bytes", "work"]

Svd = Literal["auto", "exact", "randomized"]

_CHUNK = 1 << 20  # bytes compared, or elements subtracted, at once
_MARGIN = 32  # columns of a sketch beyond those whose values are trusted
_FIRST = 64  # singular values looked at first, where a rule is to choose the rank
_SAMPLE = 1 << 18  # values on which the size of roundings is measured, in so many runs
_SAMPLES = 256
_HELD = 1 << 24  # elements of a table up to which it is held in memory
_NO_NOISE: tuple[float, str | None] = (0.0, None)
_scratch = threading.local()


@dataclass(frozen=True, slots=True)
class Rule:
    """How the rank of a module is chosen.

    Attributes:
        kind: the rank itself; the share of Σ σ² to keep; the relative error to allow; or what stands out of the
            noise that rounding to the tuned checkpoint's type has made.
        value: of the first three.
    """

    kind: Literal["rank", "energy", "error", "noise_floor"]
    value: float = 0.0

    def rank(self, spectrum: Spectrum, sigma: float) -> int | None:
        """The rank for a matrix; None where more singular values must be known to tell.

        Args:
            spectrum: of it.
            sigma: standard deviation of the noise in its entries.
        """
        values, most = spectrum.values, int(min(spectrum.matrix.shape))
        if self.kind == "rank":
            return min(int(self.value), most)
        if self.kind == "noise_floor":
            found = int(rank_above(values, gavish_donoho(spectrum.matrix.shape, sigma)))
        else:
            known = values if spectrum.complete else np.append(values, spectrum.remainder)
            choose = rank_for_energy if self.kind == "energy" else rank_for_error
            found = int(choose(known, self.value))
        return found if spectrum.complete or found + _MARGIN <= len(values) else None


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of a module, and what its truncation loses.

    Attributes:
        rank: that was chosen; 0 where nothing is kept.
        norm: of the difference, Frobenius.
        residual: of what is lost.
        optimality: at least residual / the least possible at this rank.
    """

    rank: int
    norm: float
    residual: float
    optimality: float


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed:
    """What became of a tensor.

    Attributes:
        changed: whether the two checkpoints differ in it (or in the bias beside it).
        factors: of the module, one for each expert; empty where it has no low-rank part.
        parts: what each loses.
        bias: what was added to the bias; None where it is unchanged.
        sigma: standard deviation of the noise that was assumed, where it was asked for.
        grid: the type whose rounding made it.
    """

    changed: bool
    factors: tuple[LowRank, ...] = ()
    parts: tuple[Part, ...] = ()
    bias: Array | None = None
    sigma: float | None = None
    grid: str | None = None


def work(item: Candidate | Whole, rule: Rule, svd: Svd, device: str = "cpu") -> Decomposed:
    """Compare one tensor with its counterpart, and decompose what lies between them.

    Raises:
        InputError: a checkpoint holds values that are not finite.
    """
    if not isinstance(item, Candidate):
        return Decomposed(item.base is None or not _same(item.base, item.tuned))
    bias = None if item.bias is None else _vector_difference(item.weight, *item.bias)
    if _same(item.base, item.tuned):
        return Decomposed(bias is not None, bias=bias)
    kind = _kind(item.base, item.tuned)
    wide = kind == np.float64 or _is_fine(item, rule)
    factors, parts, noise = [], [], _NO_NOISE
    for index in range(item.experts):
        matrix, noise = _difference(item, index, wide=wide, wants_noise=rule.kind == "noise_floor")
        seed = hashlib.sha256(f"{item.weight}\0{index}".encode()).digest()
        try:
            made = _decompose(mirrored(matrix, device), rule, noise[0], svd, seed, gram=kind == np.float32)
        except NonFinite:
            raise _not_finite(item.weight, item.base, item.tuned) from None
        parts.append(Part(made.rank, made.norm, made.residual, made.optimality))
        up, down = (made.down.T, made.up.T) if item.transposed else (made.up, made.down)
        factors.append(LowRank(np.ascontiguousarray(up, kind), np.ascontiguousarray(down, kind)))
    changed = bias is not None or any(part.norm for part in parts)
    kept = any(part.rank for part in parts)
    sigma = None if noise[1] is None else noise[0]
    return Decomposed(changed, tuple(factors) if kept else (), tuple(parts), bias, sigma, noise[1])


def _kind(base: TensorRef, tuned: TensorRef) -> type[Any]:
    """The type results are in: float64 where either of the two is."""
    return np.float64 if "F64" in {base.spec.dtype.name, tuned.spec.dtype.name} else np.float32


def _is_fine(item: Candidate, rule: Rule) -> bool:
    """Whether the noise to be found is that of float32, below what float32 products can see."""
    return rule.kind == "noise_floor" and item.tuned.spec.dtype.name == "F32"


def peak_bytes(item: Candidate | Whole) -> int:
    """Memory that :func:`work` needs at most for a fixed rank, without the factors it returns."""
    if not isinstance(item, Candidate):
        return 4 * _CHUNK
    width = 8 if "F64" in {item.base.spec.dtype.name, item.tuned.spec.dtype.name} else 4
    rows, columns = item.stored
    held = rows * columns if rows * columns <= _HELD or rows < 4 * columns else 0
    # The difference; blocks of stored values; blocks of columns in float64.
    return held * width + 24 * _CHUNK + (rows + columns) * 128 * 24


def _decompose(
    matrix: Matrix, rule: Rule, sigma: float, svd: Svd, seed: bytes, *, gram: bool
) -> Approximation:
    """The truncation a rule asks for; the sketch grows until it tells."""
    rank = int(rule.value)
    width = rank + max(_MARGIN, rank) if rule.kind == "rank" else _FIRST + _MARGIN
    while True:
        by_sketch = svd != "exact"
        spectrum = sketch(matrix, width, seed=seed, gram=gram) if by_sketch else exact(matrix, gram=gram)
        chosen = 0 if spectrum.norm == 0.0 else rule.rank(spectrum, sigma)
        if chosen is not None:
            return spectrum.truncate(chosen)
        width *= 2


def _difference(
    item: Candidate, index: int, *, wide: bool, wants_noise: bool
) -> tuple[Matrix, tuple[float, str | None]]:
    """TUNED - BASE of one matrix, in a buffer of this thread; and the noise that rounding has left in it.

    A table of tokens is far taller than wide, so its rows are read again in every pass rather than held.
    """
    rows, columns = item.stored
    start, count = index * rows * columns, rows * columns
    noise = _noise(item.tuned, start, count) if wants_noise else _NO_NOISE
    # Rounded coarsely after all, where float32 holds nothing finer than bfloat16.
    single = not wide or (noise[1] == "BF16" and _kind(item.base, item.tuned) == np.float32)
    kind = np.float32 if single else np.float64
    if count > _HELD and rows >= 4 * columns:
        return Streamed((rows, columns), np.dtype(kind), partial(_rows, item, kind)), noise
    values = _buffer("difference", count, kind)
    for first, stop in _runs(count):
        _subtract(item, start + first, values[first:stop])
    return values.reshape(rows, columns), noise


def _rows(item: Candidate, kind: type[Any], start: int, stop: int) -> Array:
    """Some rows of TUNED - BASE."""
    columns = item.stored[1]
    values = _buffer("difference", (stop - start) * columns, kind)
    for first, last in _runs(values.size):
        _subtract(item, start * columns + first, values[first:last])
    return values.reshape(stop - start, columns)


def _subtract(item: Candidate, start: int, values: Array) -> None:
    """Fill an array with TUNED - BASE from element ``start`` on."""
    _read_into(values, item.tuned, start)
    values -= _read(item.base, start, start + values.size)


def _runs(count: int) -> list[tuple[int, int]]:
    """Pieces of an array: what is converted stays in the cache."""
    return [(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]


def _read_into(values: Array, ref: TensorRef, start: int) -> None:
    """Fill an array with some elements."""
    if values.dtype == (np.float64 if ref.spec.dtype.name == "F64" else np.float32):
        ref.source.read(ref.name, start, start + values.size, out=values)
    else:
        values[:] = _read(ref, start, start + values.size)


def _read(ref: TensorRef, start: int, stop: int) -> Array:
    """Some elements, in a buffer of this thread."""
    kind = np.float64 if ref.spec.dtype.name == "F64" else np.float32
    return ref.source.read(ref.name, start, stop, out=_buffer("block", stop - start, kind))


def _buffer(name: str, count: int, kind: type[Any]) -> Array:
    """An array of this thread, grown on demand."""
    held: dict[tuple[str, type[Any]], Array] = _scratch.__dict__.setdefault("held", {})
    if (name, kind) not in held or held[name, kind].size < count:
        held[name, kind] = np.empty(count, kind)
    return held[name, kind][:count]


def _noise(ref: TensorRef, start: int, count: int) -> tuple[float, str]:
    """Standard deviation of the rounding error in values, known from the values alone; and the type rounded to.

    float32 values all of which bfloat16 holds were rounded to that, whatever they are stored in. Of a large matrix,
    runs of values in equal distances speak for all.
    """
    run = max(1, _SAMPLE // _SAMPLES)
    if count <= _SAMPLE:
        sample = _read(ref, start, start + count).copy()
    else:
        firsts = [start + number * (count - run) // (_SAMPLES - 1) for number in range(_SAMPLES)]
        sample = np.concatenate([_read(ref, first, first + run).copy() for first in firsts])
    grid = ref.spec.dtype
    if grid.name == "F32" and not (sample.view(np.uint32) & 0xFFFF).any():
        grid = DTYPES["BF16"]
    return math.sqrt(rounding_variance(sample, grid)), grid.name


def _vector_difference(name: str, base: TensorRef, tuned: TensorRef) -> Array | None:
    """TUNED - BASE of a bias, (out,); None where nothing has changed."""
    kind = _kind(base, tuned)
    difference: Array = (tuned.load().astype(kind) - base.load().astype(kind)).reshape(-1)
    if not np.isfinite(difference).all():
        raise _not_finite(name, base, tuned)
    return difference if difference.any() else None


def _not_finite(name: str, base: TensorRef, tuned: TensorRef) -> InputError:
    for ref, which in ((base, "the base"), (tuned, "the tuned checkpoint")):
        if not np.isfinite(ref.load()).all():
            return InputError(
                f"{ref.name}: {which} holds values that are not finite",
                hint="--exclude leaves the tensor out",
            )
    return InputError(f"{name}: the difference is not finite", hint="--exclude leaves the tensor out")


def _same(base: TensorRef, tuned: TensorRef) -> bool:
    """Whether two tensors hold the same values; the first difference ends the reading."""
    if base.shape != tuned.shape:
        return False
    if base.spec.dtype != tuned.spec.dtype:
        return all(
            np.array_equal(
                base.source.read(base.name, first, stop), tuned.source.read(tuned.name, first, stop)
            )
            for first, stop in _runs(base.spec.count)
        )
    step = max(1, _CHUNK * 8 // base.spec.dtype.bits)
    for start in range(0, base.spec.count, step):
        stop = min(start + step, base.spec.count)
        one = base.source.read_bytes(base.name, start, stop)
        if not np.array_equal(one, tuned.source.read_bytes(tuned.name, start, stop)):
            return False
    return True
