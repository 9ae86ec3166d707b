"""What ``convert`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratools.verbs.reports import Report, plain

if TYPE_CHECKING:
    from loratools.adapter import Adapter

__all__ = ["ConvertReport", "ConvertedModule", "Loss"]


@dataclass(frozen=True, slots=True)
class ConvertedModule:
    """One module of the model, before and after.

    Attributes:
        name: by component and path where an architecture is known, else as both files have it.
        kind: as written.
        rank: as written, of this module; a fused weight holds the ranks of all its parts.
        relative: ‖after - before‖ / ‖before‖ of what it does, in float64; 0 where every bit is the same.
    """

    name: str
    kind: str
    rank: int | None
    relative: float | None


@dataclass(frozen=True, slots=True)
class Loss:
    """What the new format has no place for, and was allowed to be left out."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ConvertReport(Report):
    """What ``convert`` did.

    Attributes:
        path: what was read.
        output: where the result is; null in memory.
        source: the format that was read; ``from`` in JSON.
        to: the format that was written.
        architecture: whose names were used; null where none was needed.
        evidence: what says so.
        relative: ‖after - before‖ / ‖before‖ over all modules, in float64.
        greatest: the largest of the modules' own.
        identical: modules whose factors are the same bits before and after.
        modules: one for each module of the model.
        lost: what was left out, by leave.
        dropped: tensors that were of use in training only, left out.
        warnings: what to know before the result is used.
        bytes: of what was written, or of the tensors in memory.
        adapter: the result, read back.
    """

    path: str
    output: str | None
    source: str
    to: str
    architecture: str | None
    evidence: str
    relative: float
    greatest: float
    identical: int
    modules: tuple[ConvertedModule, ...]
    lost: tuple[Loss, ...]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]
    bytes: int
    adapter: Adapter = field(repr=False, compare=False, metadata={"json": False})

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it, with its schema."""
        found = {"schema": "loratools.convert/1", **plain(self)}
        return {"from" if key == "source" else key: value for key, value in found.items()}
