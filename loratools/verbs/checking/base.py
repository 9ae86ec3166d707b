"""The adapter against the model it is meant for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.binding import bind
from loratools.errors import LoratoolsError, Mismatch, ShapeMismatch, UnmatchedModules
from loratools.merging import merge_tensors
from loratools.models import quantisation_scheme
from loratools.verbs.checking.subject import error, info, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratools.models import BaseModel
    from loratools.targets import Binding
    from loratools.verbs.checking.subject import Subject
    from loratools.verbs.reports import Finding

__all__ = ["check_base"]


def check_base(subject: Subject, base: BaseModel) -> Iterator[Finding]:
    """Whether every module is there and fits, and what a merge into this base would mean."""
    scheme = quantisation_scheme(base)
    if scheme is not None:
        yield warning(
            "base-quantised", base.name, f"quantised ({scheme}): shapes cannot be compared, and merge refuses it",
            "give the original 16-bit checkpoint",
        )  # fmt: skip
        return
    if subject.config is None and subject.adapter.refusal is not None:
        yield warning(
            "base-not-checked", base.name, "what cannot be computed with cannot be compared with a base"
        )
        return
    faults: list[tuple[str, Mismatch]] = []
    try:
        binding = bind(subject.adapter, base, faults)
    except UnmatchedModules as problem:
        yield error("base-unmatched", base.name, str(problem), problem.hint)
        return
    except Mismatch as problem:
        yield error("base-mismatch", base.name, str(problem), problem.hint)
        return
    for name, fault in faults:
        code = "shape-mismatch" if isinstance(fault, ShapeMismatch) else "base-mismatch"
        yield error(code, name, str(fault), fault.hint)
    yield from _binding(subject, base, binding)
    if not faults and not binding.unmatched and subject.adapter.refusal is None:
        yield from _merged(subject, base)


def _binding(subject: Subject, base: BaseModel, binding: Binding) -> Iterator[Finding]:
    for key in binding.unmatched:
        extra = subject.adapter.extras.get(key)
        if extra is None or extra.role != "unclaimed":  # those are reported whatever the base
            yield error("base-unmatched", key, f"nothing in {base.name} answers to it")
    if binding.renamed:
        yield info("renamed", base.name, f"its names fit {binding.renamed}")
    new = [name for name in binding.replacements if name not in base.source.specs]
    for name in new:
        yield info("new-tensor", name, f"{base.name} does not have it; a merge adds it")
    for name, ref in binding.copies.items():
        spec = base.source.specs.get(name)
        if spec is not None and spec.shape != ref.shape:
            yield info(
                "vocabulary-resized",
                name,
                f"{list(spec.shape)} in the base, {list(ref.shape)} in the adapter",
            )
    yield from _ties(base, binding)


def _ties(base: BaseModel, binding: Binding) -> Iterator[Finding]:
    tie = base.tie
    if tie is None:
        return
    touched = [n for n in (tie.embedding, tie.head) if n in binding.terms or n in binding.replacements]
    if not touched:
        return
    where = ", ".join(touched)
    if binding.keeps_tie:
        yield info(
            "tied-embeddings", where, "input and output embedding are one weight, and were trained as one"
        )
    else:
        yield warning(
            "tied-embeddings", where,
            f"{tie.embedding} and {tie.head} are one weight, and the adapter changes only what one of them does",
            "merge writes them apart and says so in config.json; tools that keep the tie change both",
        )  # fmt: skip


def _merged(subject: Subject, base: BaseModel) -> Iterator[Finding]:
    """What only the plan of a whole merge shows: embeddings of different lengths, families that cannot be untied."""
    try:
        merge_tensors(base, [subject.adapter], [1.0])
    except LoratoolsError as problem:
        yield error("merge-refused", base.name, str(problem), problem.hint)
