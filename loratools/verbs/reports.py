"""What the verbs return: frozen data that can say itself as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "SPECTRAL", "EngineAnswer", "ExtraInfo", "Finding", "InspectReport", "MergeReport", "ModuleInfo", "Range", "Report",
    "SurvivalSummary", "TensorVerdict", "ValidationReport", "VerificationReport", "plain",
]  # fmt: skip


# What a module's entry has only where the singular values were asked for.
SPECTRAL = ("norm", "spectral_norm", "stable_rank", "effective_rank", "singular_values")


def plain(value: Any) -> Any:
    """Data as JSON can hold it: dataclasses as objects, numbers that are not finite as null.

    >>> plain({"a": float("nan"), "b": (1, 2)})
    {'a': None, 'b': [1, 2]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.metadata.get("json", True)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True, slots=True)
class Report:
    """The root of all reports."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it, with its schema."""
        verb = type(self).__name__.removesuffix("Report").lower()
        verb = {"inspection": "inspect", "validation": "validate", "verification": "verify"}.get(verb, verb)
        return {"schema": f"loratools.{verb}/1", **plain(self)}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing ``validate`` noticed."""

    code: str
    severity: str  # error, warning or info
    where: str
    message: str
    hint: str | None = None
    engine: str | None = None  # whose rule it is; None where it holds for every loader


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """What an engine would do with an adapter.

    Attributes:
        name: of the engine.
        loads: ``yes``, ``no`` or ``unknown``.
        same_maths: whether it then computes what PEFT computes: ``yes``, ``no`` or ``unknown``.
        flags: to set when serving.
    """

    name: str
    loads: str
    same_maths: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ValidationReport(Report):
    """What ``validate`` found.

    Attributes:
        ok: no finding counts as an error.
        findings: all of them.
        modules: the names of the modules looked at.
        engines: what each engine asked about would do.
    """

    path: str
    ok: bool
    findings: tuple[Finding, ...]
    modules: tuple[str, ...]
    engines: tuple[EngineAnswer, ...] = ()


@dataclass(frozen=True, slots=True)
class SurvivalSummary:
    """How much of the change is left after rounding to the output's dtype.

    Attributes:
        mean: over the weights, of ⟨actual, intended⟩ / ‖intended‖²; 1 where all survives.
        min: the least of them.
        worst_module: whose it is.
        cosine: between actual and intended change, over all entries seen.
        unchanged: share of the entries seen that rounding put back where they were.
    """

    mean: float | None
    min: float | None
    worst_module: str | None
    cosine: float | None
    unchanged: float | None


@dataclass(frozen=True, slots=True)
class MergeReport(Report):
    """What ``merge`` did.

    Attributes:
        output: where to; None in memory.
        tensors: ``total``, ``changed``, ``copied``, ``added``.
        modules: ``bound`` (a count) and ``unmatched`` (keys allowed to go unused).
        bytes_read: of the base and the adapters.
        bytes_written: of weights, with headers.
        seconds: wall time.
        peak_memory: of the whole process so far and of worker processes, in bytes; None where the system does not say.
        survival: what rounding left of the change.
        resumed: steps an interrupted run had done already.
        left_out: files of the base that would have carried the unmerged model along.
        warnings: what a careful user should read.
        verified: whether ``--verify`` found every tensor right; None where it was not asked.
        state_dict: the merged tensors, where no output was given.
    """

    output: str | None
    tensors: dict[str, int]
    modules: dict[str, Any]
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory: int | None
    survival: SurvivalSummary
    resumed: int = 0
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    verified: bool | None = None
    state_dict: dict[str, Any] | None = field(default=None, repr=False, metadata={"json": False})


@dataclass(frozen=True, slots=True)
class Range:
    """Least and greatest of a quantity over the modules; None where no module has it."""

    min: float | None
    max: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Range:
        """Of the values that are known."""
        known = [value for value in values if value is not None]
        return cls(min(known, default=None), max(known, default=None))


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One module, as the header describes it.

    Attributes:
        name: by which the file calls it.
        kind: ``lora``, ``dora``, ``adalora``, ``ia3``, ``loha``, ``lokr``.
        rank: of the delta as stored; None where the kind has none.
        alpha: as the configuration gives it.
        scaling: multiplies the delta; None where nothing in the files says it.
        shape: of the delta: out, in, and a kernel's dimensions behind them.
        parameters: stored values.
        dtype: of the stored values, joined with "+" where they differ.
        experts: how many experts the module packs; 1 for an ordinary one.
        blocks: how many blocks of this rank lie side by side in one fused module (q and v of a qkv); 1 usually.
        norm: Frobenius, of the scaled delta; it and what follows is None unless the spectrum was asked for, and
            where the module is no plain sum.
        spectral_norm: the greatest singular value.
        stable_rank: norm² / spectral_norm².
        effective_rank: exp of the entropy of the singular values' shares.
        singular_values: of the scaled delta, falling; of all experts together.
    """

    name: str
    kind: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    shape: tuple[int, ...]
    parameters: int
    dtype: str
    experts: int = 1
    blocks: int = 1
    norm: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    singular_values: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class ExtraInfo:
    """A tensor that no module claims."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass(frozen=True, slots=True)
class InspectReport(Report):
    """What the headers of an adapter say.

    Attributes:
        path: as it was given.
        format: ``peft``, or what the file was recognised as.
        evidence: by what.
        kinds: of its modules; of the whole, where it has none.
        base_model: as the configuration names it.
        rank: over the modules, as are ``alpha`` and ``scaling``.
        parameters: stored values, in all tensors.
        bytes: they take, without header and configuration.
        dtypes: how many tensors of each type.
        modules: one entry each.
        extras: every tensor that no module claims, and why it is there.
        metadata: of the weight file.
        warnings: what a careful user should read.
        architecture: the family of image models whose modules these are, where their names and shapes tell.
        spectrum: whether the singular values were asked for.
    """

    path: str
    format: str
    evidence: str
    kinds: tuple[str, ...]
    base_model: str | None
    rank: Range
    alpha: Range
    scaling: Range
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    modules: tuple[ModuleInfo, ...]
    extras: tuple[ExtraInfo, ...]
    metadata: dict[str, str]
    warnings: tuple[str, ...]
    architecture: str | None = None
    spectrum: bool = field(default=False, metadata={"json": False})

    def to_dict(self) -> dict[str, Any]:
        """See :class:`Report`; what the spectrum says is there only where it was asked for."""
        document = Report.to_dict(self)
        if not self.spectrum:
            for module in document["modules"]:
                for name in SPECTRAL:
                    del module[name]
        return document


@dataclass(frozen=True, slots=True)
class TensorVerdict:
    """What ``verify`` says of one tensor (of one expert's matrix, inside a tensor of many).

    Attributes:
        name: of the tensor; ``name[3]`` for its fourth expert.
        verdict: ``exact``, ``rounding`` (each value within one rounding), ``wrong_scale``, ``unmerged``,
            ``different``, ``missing``, ``unexpected`` or ``shape``.
        differing: share of the values that differ from the arithmetic rounded once.
        relative: ‖found - expected‖ / ‖expected‖, both in float32.
        scale: by how much the change is multiplied, for ``wrong_scale``.
    """

    name: str
    verdict: str
    differing: float | None = None
    relative: float | None = None
    scale: float | None = None

    @property
    def ok(self) -> bool:
        """Whether this is what the merge should have given."""
        return self.verdict in {"exact", "rounding"}


@dataclass(frozen=True, slots=True)
class VerificationReport(Report):
    """What ``verify`` found.

    Attributes:
        ok: every tensor is exact or within one rounding, none is missing, none unexpected.
        summary: how many tensors got each verdict.
        modules: the verdicts, worst first.
    """

    merged: str
    ok: bool
    summary: dict[str, int]
    modules: tuple[TensorVerdict, ...]
    seconds: float
