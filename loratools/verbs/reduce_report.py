"""What ``reduce`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratools.verbs.reports import Range, Report

if TYPE_CHECKING:
    from loratools.adapter import Adapter

__all__ = ["ReduceReport", "ReducedModule"]


@dataclass(frozen=True, slots=True)
class ReducedModule:
    """One module of the adapter that was reduced.

    Attributes:
        name: of it.
        rank_before: as the file has it.
        rank: of the result; 0 where the module was dropped.
        shape: of the delta.
        norm: Frobenius, of the delta before.
        relative_error: ‖before - after‖ / ‖before‖ of the weight's delta, with the rounding to an output of 16 bits;
            in wider types from the singular values alone. Exactly 0 where the stored factors are kept as they are, or
            the delta is zero.
        zero: the delta is zero.
    """

    name: str
    rank_before: int | None
    rank: int
    shape: tuple[int, ...]
    norm: float
    relative_error: float
    zero: bool


@dataclass(frozen=True, slots=True)
class ReduceReport(Report):
    """What ``reduce`` did.

    Attributes:
        output: where the result was written; None in memory.
        rule: ``rank``, ``energy``, ``error``, ``params``, ``size`` or ``noise_floor``.
        value: of the rule; None for the noise floor, which has none.
        scope: ``per module``, or ``global``: one optimum over all modules.
        rank: least and greatest over the modules of the result.
        relative_error: ‖before - after‖ / ‖before‖ over all modules, as theirs. A bias that a module adds is not
            counted, which ``diff`` does.
        dtype: of the factors of the result.
        modules: one entry each, also for those that were dropped.
        dropped: modules of which nothing is left, and which the result does not have.
        parameters_before: stored values, in all tensors, as ``parameters_after``.
        bytes_before: of the weight file with its header, as ``bytes_after``.
        seconds: wall time.
        peak_memory: of the whole process so far, in bytes; None where the system does not say.
        warnings: what a careful user should read.
        adapter: the result.
    """

    output: str | None
    rule: str
    value: float | None
    scope: str
    rank: Range
    relative_error: float
    dtype: str
    modules: tuple[ReducedModule, ...]
    dropped: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory: int | None
    warnings: tuple[str, ...] = ()
    adapter: Adapter | None = field(default=None, repr=False, metadata={"json": False})
