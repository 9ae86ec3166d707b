"""What ``diff`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratools.verbs.reports import Report

if TYPE_CHECKING:
    from loratools.deltas.likeness import Overlap

__all__ = ["ConfigDifference", "DiffReport", "ModuleDifference", "TensorDifference"]


@dataclass(frozen=True, slots=True)
class ModuleDifference:
    """How far the updates of one module are from each other.

    Attributes:
        name: as the first adapter has it.
        norm_a: Frobenius norm of A's scaled delta, over all experts and with the bias beside it.
        norm_b: of B's.
        distance: ‖A - B‖.
        relative: ‖A - B‖ / ‖A‖; infinite (null in JSON) where only A is zero.
        cosine: of the angle between them; None where one is zero.
        rank_a: of A's delta as stored; None where the kind has none.
        rank_b: of B's.
        overlap: share of the subspaces they act in, phi(rank_a, rank_b) of Hu et al. 2021, section 7: the mean of
            output and input side. None where one is zero or the ranks fill the matrix.
        overlap_null: what random subspaces of these ranks would give.
        outputs: the same for the output side (left singular vectors) alone.
        inputs: for the input side (right singular vectors).
        kind_a: ``lora``, ``loha`` and so on.
        kind_b: the same of B.
        as_stored: the update is no plain sum, so this compares its stored factors' product (ia3: its factors' distance
            from one).
    """

    name: str
    norm_a: float
    norm_b: float
    distance: float
    relative: float
    cosine: float | None
    rank_a: int | None
    rank_b: int | None
    overlap: float | None
    overlap_null: float | None
    outputs: Overlap | None
    inputs: Overlap | None
    kind_a: str
    kind_b: str
    as_stored: bool = False


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor beside the modules that both adapters have: a head, a bias, token rows, a magnitude.

    Attributes:
        name: of what it stands for.
        role: ``replacement``, ``token_rows``, ``base_copy``, ``unclaimed`` or ``magnitude``.
        norm_a: of A's values.
        norm_b: of B's.
        distance: of the values; None where they cannot be compared.
        relative: ‖A - B‖ / ‖A‖; None where they cannot be compared.
        why: they cannot be: other shapes, other tokens; empty where they can.
    """

    name: str
    role: str
    norm_a: float
    norm_b: float
    distance: float | None
    relative: float | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class ConfigDifference:
    """A field of ``adapter_config.json`` that differs; None where one has it not."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class DiffReport(Report):
    """How two adapters differ in what they do.

    Attributes:
        a: the first, as it was given.
        b: the second.
        identical: the same modules and other tensors, none further apart than the tolerance allows.
        distance: ‖A - B‖ of the scaled deltas, over all modules; one that only one adapter has counts in full.
        relative: ‖A - B‖ / ‖A‖; infinite (null in JSON) where A changes nothing and B does.
        cosine: of the angle between all deltas of the one and all of the other; None where one changes nothing.
        norm_a: ‖A‖.
        norm_b: ‖B‖.
        tolerance: the greatest ``relative`` that counts as identical.
        only_in_a: modules and other tensors of A that B lacks.
        only_in_b: of B that A lacks.
        modules: those that both have, in A's order.
        extras: tensors beside the modules that both have.
        config: fields of the configurations that differ; they do not make the adapters different.
        warnings: what a careful user should read.
        seconds: wall time.
        one_sided_modules: whether a module, and not only a tensor, is in one of them alone.
    """

    a: str
    b: str
    identical: bool
    distance: float
    relative: float
    cosine: float | None
    norm_a: float
    norm_b: float
    tolerance: float
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    modules: tuple[ModuleDifference, ...]
    extras: tuple[TensorDifference, ...]
    config: tuple[ConfigDifference, ...]
    warnings: tuple[str, ...]
    seconds: float
    one_sided_modules: bool = field(default=False, metadata={"json": False})

    @property
    def changed_extras(self) -> tuple[TensorDifference, ...]:
        """Those that differ by more than the tolerance."""
        return tuple(e for e in self.extras if e.relative is None or e.relative > self.tolerance)
