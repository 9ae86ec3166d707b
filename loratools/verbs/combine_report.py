"""What ``combine`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratools.verbs.reports import Report

if TYPE_CHECKING:
    from loratools.adapter import Adapter

__all__ = ["CombineReport", "CombinedExtra", "CombinedModule"]


@dataclass(frozen=True, slots=True)
class CombinedModule:
    """One module of the result.

    Attributes:
        name: of it, in the result.
        rank: of the delta as stored; for several experts, that of each.
        shape: of the delta.
        adapters: which of the adapters have it, counted from 0 in the order given.
        relative_error: ‖written - defined‖ / ‖defined‖ over its matrices, before rounding to the output's type.
        norm: Frobenius, of what the method defines; None where it was not needed, the result being exact.
        zero: the result is zero.
    """

    name: str
    rank: int
    shape: tuple[int, ...]
    adapters: tuple[int, ...]
    relative_error: float
    norm: float | None
    zero: bool


@dataclass(frozen=True, slots=True)
class CombinedExtra:
    """A tensor of the result that is no delta.

    Attributes:
        name: its key.
        adapters: which of the adapters have it.
        rule: ``only`` (one adapter has it), ``same`` (all that have it agree), ``first`` or ``average``.
    """

    name: str
    adapters: tuple[int, ...]
    rule: str


@dataclass(frozen=True, slots=True)
class CombineReport(Report):
    """What ``combine`` did.

    Attributes:
        output: where the result was written; None in memory.
        adapters: as they were named.
        method: by its own name, also where an alias was used.
        options: of the method, with defaults.
        weights: one for each adapter.
        rank: the greatest of the modules' ranks.
        relative_error: ‖written - defined‖ / ‖defined‖ over all modules, before rounding to the output's type; 0
            where the factors express the method's result exactly.
        rounding: ‖stored - computed‖ / ‖computed‖ of the factors, which rounding them to ``dtype`` costs besides; 0 in
            memory, where they are not rounded.
        dtype: of the factors as written.
        modules: one entry each.
        extras: the other tensors, and by which rule each came about.
        bytes: written, all files together.
        seconds: wall time.
        peak_memory: of the whole process so far, in bytes; None where the system does not say.
        warnings: what a careful user should read.
        adapter: the result.
    """

    output: str | None
    adapters: tuple[str, ...]
    method: str
    options: dict[str, Any]
    weights: tuple[float, ...]
    rank: int
    relative_error: float
    rounding: float
    dtype: str
    modules: tuple[CombinedModule, ...]
    extras: tuple[CombinedExtra, ...]
    bytes: int
    seconds: float
    peak_memory: int | None
    warnings: tuple[str, ...] = ()
    adapter: Adapter | None = field(default=None, repr=False, metadata={"json": False})
