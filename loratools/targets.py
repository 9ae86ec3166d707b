"""Where updates land: a place in a checkpoint, a module's part in it, and all of an adapter's places together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from loratools.adapter import Extra, Module, Part
    from loratools.deltas.base import Span
    from loratools.tensors.base import TensorRef

__all__ = ["Binding", "Target", "Term", "group_by_index", "is_attention"]


@dataclass(frozen=True, slots=True)
class Target:
    """One place where a module lands in a base checkpoint, and the part of the update that lands there.

    Attributes:
        weight: the tensor's name on disk.
        index: one expert of a 3-D tensor.
        rows: some output features of the weight as stored (of the expert's matrix, where ``index`` is given).
        cols: some columns of it.
        transposed: the weight is stored (in, out).
        delta_index: which expert of a module that packs several.
        delta_rows: which output features of the delta (gate or up out of a fused gate_up).
        delta_cols: which columns of it, where its in and out are exchanged.
    """

    weight: str
    index: int | None = None
    rows: Span | None = None
    cols: Span | None = None
    transposed: bool = False
    delta_index: int | None = None
    delta_rows: Span | None = None
    delta_cols: Span | None = None


@dataclass(frozen=True, slots=True)
class Term:
    """One module's update of one place: of the weight, or of the bias beside it."""

    name: str  # of the module, for messages
    module: Module
    target: Target
    part: Part = "weight"


@dataclass(frozen=True, slots=True)
class Binding:
    """What an adapter does to a base, by the base's tensor names.

    Attributes:
        terms: updates to compute.
        replacements: tensors whose values come from the adapter, by the name they get.
        rows: token rows to replace.
        copies: saved base embeddings, by the name of the embedding.
        saved: replacements that were saved along rather than trained: the base's own embeddings, resized perhaps.
        bound: modules of the adapter that found their place.
        unmatched: keys of the adapter that nothing in the base answers to.
        ignored: keys that a merge leaves aside, with the reason.
        keeps_tie: whether the adapter says that tied embeddings were trained as one.
        renamed: how the adapter's names had to be changed to be found, in words.
        architecture: whose names adapter and base were matched by; empty where they were compared as they are.
    """

    terms: Mapping[str, tuple[Term, ...]]
    replacements: Mapping[str, TensorRef]
    rows: Mapping[str, Extra]
    copies: Mapping[str, TensorRef]
    saved: frozenset[str]
    bound: tuple[str, ...]
    unmatched: tuple[str, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    keeps_tie: bool = False
    renamed: str = ""
    architecture: str = ""


def is_attention(term: Term) -> bool:
    """Whether it is a part of torch's MultiheadAttention, which PEFT wraps as a whole."""
    return term.target.weight.endswith(".in_proj_weight") or term.name.endswith(".base_layer.out_proj")


def group_by_index(terms: Iterable[Term]) -> dict[int | None, list[Term]]:
    """The terms of a weight by the expert they touch; None is the whole weight."""
    groups: dict[int | None, list[Term]] = {}
    for term in terms:
        groups.setdefault(term.target.index, []).append(term)
    return groups
