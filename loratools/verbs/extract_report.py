"""What ``extract`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratools.verbs.reports import Range, Report

if TYPE_CHECKING:
    from loratools.adapter import Adapter

__all__ = ["ExtractReport", "ExtractedModule", "FullTensor", "RankRule", "Skipped"]


@dataclass(frozen=True, slots=True)
class RankRule:
    """How ranks were chosen.

    Attributes:
        name: ``rank``, ``energy``, ``error`` or ``noise_floor``.
        value: of the first three; null for the last.
    """

    name: str
    value: float | None


@dataclass(frozen=True, slots=True)
class ExtractedModule:
    """One low-rank module.

    Attributes:
        name: in the adapter.
        weight: the tensor it is the change of.
        kind: ``linear``, ``convolution``, ``embedding`` or ``experts``.
        rank: of it; of experts, the greatest.
        shape: of the delta, (out, in).
        experts: how many matrices it packs.
        norm: ‖TUNED - BASE‖.
        relative_error: what the truncation loses, as a share of the norm.
        optimality: at least that error / the least possible at this rank; null where nothing is certified.
        noise: standard deviation of the rounding noise per entry, where the rank was chosen by it.
        noise_dtype: the type whose rounding that is.
        bias: whether the module's bias has changed and goes along.
    """

    name: str
    weight: str
    kind: str
    rank: int
    shape: tuple[int, ...]
    experts: int
    norm: float
    relative_error: float
    optimality: float
    noise: float | None = None
    noise_dtype: str | None = None
    bias: bool = False


@dataclass(frozen=True, slots=True)
class FullTensor:
    """A tensor that goes along whole."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tensor that has changed and is not in the adapter, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ExtractReport(Report):
    """What ``extract`` found and wrote.

    Attributes:
        base: before.
        tuned: after.
        output: where the adapter is; null in memory.
        rule: how ranks were chosen.
        rank: least and greatest.
        relative_error: ‖lost‖ / ‖TUNED - BASE‖ over all matrices that were decomposed.
        optimality: at least ‖lost‖ / the least loss at these ranks, over the same.
        modules: the low-rank ones.
        full_tensors: what goes along whole.
        skipped: what has changed and was left out.
        unchanged: how many tensors are the same in both.
        parameters: of the adapter.
        bytes: of its files; of its tensors, in memory.
        seconds: taken.
        peak_memory: of the process, in bytes; null where the system does not say.
        warnings: what a careful user should read.
        adapter: the result.
    """

    base: str
    tuned: str
    output: str | None
    rule: RankRule
    rank: Range
    relative_error: float
    optimality: float
    modules: tuple[ExtractedModule, ...]
    full_tensors: tuple[FullTensor, ...]
    skipped: tuple[Skipped, ...]
    unchanged: int
    parameters: int
    bytes: int
    seconds: float
    peak_memory: int | None
    warnings: tuple[str, ...]
    adapter: Adapter = field(repr=False, compare=False, metadata={"json": False})
