"""What ``normalize`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratools.verbs.reports import Range, Report

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.verbs.reports import EngineAnswer

__all__ = ["ConfigChange", "NormalizeReport", "NormalizedModule"]


@dataclass(frozen=True, slots=True)
class NormalizedModule:
    """One module, before and after.

    Attributes:
        name: in the result.
        was: its kind before; ``pissa``, ``olora`` or ``kasa`` where it started from a part of its base.
        kind: ``lora``, or ``dora``, which stays one.
        rank_before: as stored.
        rank: as written.
        scaling_before: what multiplied its factors.
        alpha: as written.
        shape: of the delta.
        relative: ‖after - before‖ / ‖before‖ of what it adds, in float64; null for a zero delta.
    """

    name: str
    was: str
    kind: str
    rank_before: int | None
    rank: int
    scaling_before: float | None
    alpha: float
    shape: tuple[int, ...]
    relative: float | None


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """A field of the configuration whose meaning has moved elsewhere, or that was wrong."""

    field: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class NormalizeReport(Report):
    """What ``normalize`` did.

    Attributes:
        path: what was read.
        output: where the result is; null in memory.
        relative: ‖after - before‖ / ‖before‖ over all modules, in float64.
        exact: nothing was rounded: the two are equal to the last bit.
        rank: least and greatest, of what is written.
        rank_before: of what was read.
        dtype: of the factors as written.
        modules: one each.
        dropped: modules whose delta is zero, left out.
        dropped_tensors: tensors that were of use in training only, left out.
        renamed: modules whose name was mended, old to new.
        config: fields that changed.
        bytes_before: of the weight file read, or of the tensors where they lie in none.
        bytes: of the weight file written, or of the tensors in memory.
        warnings: what the result still depends on.
        engine: what the engine it was made for does with it; null where none was named.
        adapter: the result.
    """

    path: str
    output: str | None
    relative: float
    exact: bool
    rank: Range
    rank_before: Range
    dtype: str
    modules: tuple[NormalizedModule, ...]
    dropped: tuple[str, ...]
    dropped_tensors: tuple[str, ...]
    renamed: dict[str, str]
    config: tuple[ConfigChange, ...]
    bytes_before: int
    bytes: int
    warnings: tuple[str, ...]
    engine: EngineAnswer | None
    adapter: Adapter = field(repr=False, compare=False, metadata={"json": False})
