"""One step's arithmetic: blocks of rows read, updated in float, and handed on before they are rounded.

The hot path of a merge. Buffers belong to the thread and are reused, because a fresh allocation costs ten times what
the conversion into it does; blocks stay within the processor's cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loratools.arrays import has_double
from loratools.deltas.base import Delta, Fitting
from loratools.deltas.lowrank import LowRank
from loratools.deltas.streams import buffer
from loratools.dtypes import accumulator, largest, narrow, numpy_dtype, widen
from loratools.errors import NonFinite, ShapeMismatch, Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratools.deltas.base import Update
    from loratools.dtypes import Array
    from loratools.planning import Contribution, WeightStep
    from loratools.targets import Term

__all__ = ["Block", "Survival", "blocks", "round_block", "stripe"]

STRIPE_BYTES = 1 << 20  # written at once
SAMPLE_ROWS = 16  # of each matrix, on which the survival of the change is measured


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a weight before and after. Both arrays are reused by the next block."""

    start: int  # row of the whole matrix
    values: Array  # (rows, columns), not rounded yet
    before: Array | None  # the base's first rows of them, as far as they were asked for


@dataclass(slots=True)
class Survival:
    """How much of the intended change is left after rounding, summed over the entries seen.

    Attributes:
        product: ⟨actual, intended⟩.
        intended: ‖intended‖².
        actual: ‖actual‖².
        unchanged: entries that rounding put back where they were.
        count: entries seen.
    """

    product: float = 0.0
    intended: float = 0.0
    actual: float = 0.0
    unchanged: int = 0
    count: int = 0

    def add(self, block: Block, rounded: Array) -> None:
        """Count a block, given its values as they will be stored."""
        assert block.before is not None
        rows = len(block.before)
        intended = (block.values[:rows] - block.before).reshape(-1)
        actual = (rounded[:rows] - block.before).reshape(-1)
        wanted, got = float(np.dot(intended, intended)), float(np.dot(actual, actual))
        if not math.isfinite(
            wanted + got
        ):  # a NaN of the base would hide all the others; float32 squares overflow
            finite = np.isfinite(intended) & np.isfinite(actual)
            intended, actual = (values[finite].astype(np.float64) for values in (intended, actual))
            wanted, got = float(np.dot(intended, intended)), float(np.dot(actual, actual))
        self.product += float(np.dot(actual, intended))
        self.intended += wanted
        self.actual += got
        self.unchanged += int(actual.size - np.count_nonzero(actual))
        self.count += actual.size

    def merge(self, other: Survival) -> None:
        """Count what another has seen."""
        self.product += other.product
        self.intended += other.intended
        self.actual += other.actual
        self.unchanged += other.unchanged
        self.count += other.count

    @property
    def share(self) -> float | None:
        """⟨actual, intended⟩ / ‖intended‖²: 1 where all of it survives; None where nothing was intended."""
        return self.product / self.intended if self.intended else None

    @property
    def cosine(self) -> float | None:
        """Between actual and intended change; None where either is zero."""
        scale = math.sqrt(self.intended * self.actual)
        return self.product / scale if scale else None


def blocks(step: WeightStep, *, keep_before: str = "none") -> Iterator[Block]:
    """The rows of a step, a block at a time.

    Args:
        step: what to compute.
        keep_before: how much of the base to hand on too: ``"none"``, the ``"first"`` rows of each matrix, or ``"all"``.

    Raises:
        ShapeMismatch: an update does not cover the rows it was planned for.
    """
    kind = numpy_dtype(step.accumulator)
    columns, double = step.columns, step.accumulator.name == "F64"
    updates = [_load(step, contribution, double) for contribution in step.contributions]
    sampled = step.start if keep_before == "first" and step.sampled else -1
    for start in range(step.start, step.stop, step.block_rows):
        shape = (min(step.block_rows, step.stop - start), columns)
        values = buffer("values", shape, kind)
        _read_base(step, start, values)
        keep = len(values) if keep_before == "all" else SAMPLE_ROWS if start == sampled else 0
        before = values[:keep].copy() if keep else None
        local = start - step.region
        _contribute(step.contributions, updates, values, local)
        yield Block(start, values, before)


def _read_base(step: WeightStep, start: int, values: Array) -> None:
    if step.base is None:
        values.fill(0)
        return
    count = values.shape[0] * values.shape[1]
    first = start * values.shape[1]
    stored = numpy_dtype(accumulator(step.base.spec.dtype))
    if stored == values.dtype:
        step.base.source.read(step.base.name, first, first + count, out=values)
    else:  # a base in float32 that is asked for in float64, or the other way round
        values[...] = step.base.source.read(step.base.name, first, first + count).reshape(values.shape)


@dataclass(frozen=True, slots=True)
class _Placed:
    """An update and the rows and columns of the region it covers."""

    update: Update
    rows: slice
    cols: slice
    is_delta: bool


def _load(step: WeightStep, contribution: Contribution, double: bool) -> list[_Placed]:
    columns = step.columns
    placed = [_load_term(term, step.region_rows, columns, double) for term in contribution.terms]
    if step.device != "cpu" and (not double or has_double(step.device)):
        placed = [_moved(one, step.device) for one in placed]
    whole = (slice(0, step.region_rows, 1), slice(0, columns, 1))
    if contribution.replacement is not None:
        from loratools.deltas.full import Replacement

        ref = contribution.replacement

        def read(start: int, stop: int) -> Array:
            return ref.source.read(ref.name, start * columns, stop * columns).reshape(stop - start, columns)

        placed.insert(0, _Placed(Replacement(read, (step.region_rows, columns)), *whole, is_delta=False))
    if contribution.rows is not None:
        from loratools.deltas.full import Rows

        values = contribution.rows.tensor.load()
        update = Rows(np.asarray(contribution.rows.indices), values, (step.region_rows, columns))
        placed.append(_Placed(update, *whole, is_delta=False))
    return placed


def _moved(placed: _Placed, device: str) -> _Placed:
    """Plain low-rank factors, which are multiplied on the device; whatever else there is stays with numpy."""
    update = placed.update
    return replace(placed, update=update.on(device)) if isinstance(update, LowRank) else placed


def _load_term(term: Term, height: int, width: int, double: bool) -> _Placed:
    target = term.target
    update = term.module.load(term.part, target.delta_index, double=double)
    if isinstance(update, LowRank):
        update = update.folded()
    if target.delta_rows is not None or target.delta_cols is not None:
        if not isinstance(update, Delta):
            raise Unsupported(f"{term.name} is {term.module.kind}, of which a part has no meaning by itself")
        update = update.part(target.delta_rows, target.delta_cols)
    if target.transposed:
        update = update.transposed()
    rows = target.rows.slice if target.rows else slice(0, height, 1)
    cols = target.cols.slice if target.cols else slice(0, width, 1)
    covered = (len(range(*rows.indices(height))), len(range(*cols.indices(width))))
    if isinstance(update, Fitting):  # its file does not know the weight's shape
        update = update.fitted(covered)
    if update.shape != covered:
        raise ShapeMismatch(term.name, update.shape, covered)
    return _Placed(update, rows, cols, term.module.adds(term.part))


def _as_delta(update: Update) -> Delta:
    return update  # type: ignore[return-value]  # binding gives parts to plain sums only


def _contribute(
    contributions: tuple[Contribution, ...], updates: list[list[_Placed]], values: Array, start: int
) -> None:
    """Change ``values``, rows ``start`` and following of the region, by every contribution."""
    if all(p.is_delta for placed in updates for p in placed):
        for contribution, placed in zip(contributions, updates, strict=True):
            for one in placed:
                _add(one, contribution.weight, values, start)
        return
    if len(contributions) == 1 and contributions[0].weight == 1.0:
        _apply(updates[0], values, start)
        return
    before = values.copy()
    for contribution, placed in zip(contributions, updates, strict=True):
        after = before.copy()
        _apply(placed, after, start)
        after -= before
        after *= values.dtype.type(contribution.weight)
        values += after


def _block_rows(rows: slice, start: int, height: int) -> tuple[slice, int, int]:
    """Which rows of a block an update covers, and which of the update's rows they are.

    >>> _block_rows(slice(1, 8, 2), 4, 4)  # rows 1 3 5 7 of the region, in a block of rows 4 to 7
    (slice(1, 4, 2), 2, 4)
    """
    covered = range(rows.start, rows.stop, rows.step)
    first = max(0, -(-(start - rows.start) // rows.step))
    last = min(len(covered), max(first, -(-(start + height - rows.start) // rows.step)))
    if first >= last:
        return slice(0, 0, 1), 0, 0
    return slice(covered[first] - start, covered[last - 1] - start + 1, rows.step), first, last


def _add(placed: _Placed, weight: float, values: Array, start: int) -> None:
    inside, first, last = _block_rows(placed.rows, start, values.shape[0])
    if first == last:
        return
    shape = (last - first, placed.update.shape[1])
    block = _as_delta(placed.update).rows(first, last, buffer("delta", shape, values.dtype))
    if weight != 1.0:
        block = block * values.dtype.type(weight)
    if shape == values.shape:
        values += block
    else:
        values[inside, placed.cols] += block


def _apply(placed: list[_Placed], values: Array, start: int) -> None:
    for one in placed:
        if one.is_delta:
            _add(one, 1.0, values, start)
            continue
        inside, first, last = _block_rows(one.rows, start, values.shape[0])
        if first < last:
            view = values[inside, one.cols]
            view[...] = one.update.apply(view, first)


def round_block(step: WeightStep, block: Block, out: Array | None = None) -> Array:
    """The block as it will be stored: rounded once, checked for values that became infinite.

    Returns:
        uint8, one-dimensional: ``out``, or the thread's own buffer, which the next block overwrites.

    Raises:
        NonFinite: a finite value of the base became infinite or not a number.
    """
    count = step.spec.dtype.nbytes(block.values.size)
    raw = buffer("raw", (1, count), np.uint8).reshape(-1) if out is None else out
    narrow(block.values, step.spec.dtype, raw)
    flat = block.values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.dot(flat, flat))  # finite and small enough: so is every entry
    if not square < min(largest(step.spec.dtype), 1.7e19) ** 2:
        _find_non_finite(step, block, raw)
    return raw


def stripe(step: WeightStep) -> Array:
    """The thread's buffer for rounded values waiting to be written: at least one block's bytes, uint8."""
    block = step.spec.dtype.nbytes(min(step.block_rows, step.stop - step.start) * step.columns)
    return buffer("stripe", (1, max(block, STRIPE_BYTES // block * block)), np.uint8).reshape(-1)


def _find_non_finite(step: WeightStep, block: Block, raw: Array) -> None:
    bad = ~np.isfinite(widen(raw, step.spec.dtype)).reshape(block.values.shape)
    if not bad.any():
        return
    if step.base is not None and all(c.replacement is None for c in step.contributions):
        before = np.empty(block.values.shape, block.values.dtype)
        _read_base(step, block.start, before)
        bad &= np.isfinite(before)  # what was not finite before is not this operation's doing
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        value = float(block.values[row, column])
        where = f"{step.name}[{block.start + row}, {column}]"
        if math.isfinite(value):
            raise NonFinite(
                f"{where}: {value:g} does not fit {step.spec.dtype} (largest {largest(step.spec.dtype):g})",
                hint="write a wider type: --dtype bf16 or f32",
            )
        raise NonFinite(
            f"{where} became {value}",
            hint="is the weight, or the alpha, too large? If not, loratools validate finds NaN and Inf in an adapter",
        )
