"""From adapters and a base to the tensors a merge writes: conflicts, tied and resized embeddings are decided here."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from loratools.binding import bind
from loratools.dtypes import compatible
from loratools.errors import Mismatch, ShapeMismatch, UnmatchedModules, Unsupported
from loratools.planning import Contribution, Output
from loratools.tensors.base import TensorRef, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from loratools.adapter import Adapter, Module
    from loratools.block_weights import BlockWeights
    from loratools.dtypes import Dtype
    from loratools.models import BaseModel, Tie
    from loratools.targets import Binding, Term

__all__ = ["Conflict", "Merged", "merge_tensors"]

Conflict = Literal["error", "first", "last"]
_BLOCK = 1 << 22  # values that are compared at a time
_TIED_SCALE = {"t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct"}


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge writes, before it is laid out in files.

    Attributes:
        outputs: every tensor, by name, in the base's order; new ones at the end.
        homes: new tensors and the base tensor whose file they join.
        config: fields of ``config.json`` to set.
        resized: which adapter resized the vocabulary.
        bound: how many modules found their place.
        unmatched: adapter keys that were allowed to go unused.
        warnings: what a careful user should read.
        component_config: the same as ``config`` for each component of a pipeline.
    """

    outputs: Mapping[str, Output]
    homes: Mapping[str, str | None]
    config: Mapping[str, Any]
    resized: Adapter | None
    bound: int
    unmatched: tuple[str, ...]
    warnings: tuple[str, ...]
    component_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def merge_tensors(
    base: BaseModel,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    dtype: Dtype | None = None,
    allow_unmatched: Iterable[str] = (),
    on_conflict: Conflict = "error",
    arch: str | None = None,
    block_weights: Sequence[BlockWeights] = (),
) -> Merged:
    """Bind every adapter and decide, for each tensor, where its values start from and what changes them.

    Args:
        base: the base, opened.
        adapters: the adapters, opened.
        weights: what each is multiplied by.
        dtype: of the floats written.
        allow_unmatched: globs of adapter keys that may go unused.
        on_conflict: which adapter wins where two replace a tensor.
        arch: the architecture of all, by name; by default it is looked for.
        block_weights: what each adapter's modules are multiplied by besides, one for each adapter or none.

    Raises:
        UnmatchedModules: an adapter key that nothing consumes and no pattern allows.
        Mismatch: adapters that contradict each other or the base.
        Unsupported: an adapter without a meaning as an update, or a weight that has none for it.
    """
    for adapter in adapters:
        adapter.require_computable()
    known = None
    if arch is not None:
        from loratools.architectures.base import architecture

        known = architecture(arch)
    bindings = [bind(adapter, base, architecture=known) for adapter in adapters]
    unmatched = _unmatched(adapters, bindings, tuple(allow_unmatched))
    warnings = [f"{a.name}: bound {b.renamed}" for a, b in zip(adapters, bindings, strict=True) if b.renamed]
    warnings += [f"{a.name}: {w}" for a in adapters for w in a.warnings]
    warnings += [f"{a.name}: {said}" for a in adapters if (said := _carried(a))]
    factors = [
        one.factors(binding.bound, binding.architecture)
        for one, binding in zip(block_weights, bindings, strict=bool(block_weights))
    ]
    sorter = _Sorter(base, adapters, bindings, weights, on_conflict, factors)
    tie = _Tied(base, base.tie, bindings)
    outputs = {name: sorter.output(name, spec) for name, spec in base.source.specs.items()}
    homes: dict[str, str | None] = {}
    for name, home in tie.new_tensors():
        outputs[name], homes[name] = sorter.output(name, base.source.specs[home], start=home), home
    added = sorter.added({*outputs, *tie.shared()})
    for name in added:
        outputs[name], homes[name] = sorter.output(name, None), None
    outputs |= {name: tie.like_embedding(outputs, name) for name in tie.shared()[:1] if name in outputs}
    _require_tokens(base.tie, outputs)
    resized = _resized(base, outputs, sorter)
    if dtype is not None:
        outputs = {name: _cast(output, dtype) for name, output in outputs.items()}
    config = {**tie.config(), **({"vocab_size": resized[1]} if resized else {}), **_dtype_field(base, dtype)}
    return Merged(
        outputs=outputs,
        homes=homes,
        config=config if base.config else {},
        component_config={
            name: _dtype_field(one, dtype) for name, one in base.components.items() if _tells_dtype(one)
        },
        resized=resized[0] if resized else None,
        bound=sum(len(binding.bound) for binding in bindings),
        unmatched=unmatched,
        warnings=tuple(warnings + _additions(added) + tie.warnings() + _removals(adapters, weights, outputs)),
    )


def _additions(added: Sequence[str]) -> list[str]:
    """New tensors are right for a new head, and a sign of a wrong base for anything else."""
    if not added:
        return []
    more = f" and {len(added) - 1} more" if len(added) > 1 else ""
    return [f"{added[0]}{more}: not in the base, added; config.json must describe a model that has it"]


def _removals(
    adapters: Sequence[Adapter], weights: Sequence[float], outputs: Mapping[str, Output]
) -> list[str]:
    """A negative weight takes a merged adapter out again; what rounding took with it does not come back."""
    types = sorted(
        {o.spec.dtype.name for o in outputs.values() if o.contributions and o.spec.dtype.bits < 32}
    )
    return [
        f"{adapter.name}: weight {weight:g} takes it out again; in {' and '.join(types)} the values from before "
        "its merge come back to within a rounding, not bit for bit"
        for adapter, weight in zip(adapters, weights, strict=True)
        if weight < 0 and types
    ]


def _unmatched(
    adapters: Sequence[Adapter], bindings: Sequence[Binding], allowed: tuple[str, ...]
) -> tuple[str, ...]:
    """Keys nobody consumed that the user allows.

    Raises:
        UnmatchedModules: the others.
    """
    kept = []
    for adapter, binding in zip(adapters, bindings, strict=True):
        left = [
            key for key in binding.unmatched if not any(fnmatch.fnmatchcase(key, glob) for glob in allowed)
        ]
        kept += [key for key in binding.unmatched if key not in left]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UnmatchedModules(
                f"{adapter.name}: nothing in the base answers to {left[0]}{more}",
                tuple(left),
                hint="--allow-unmatched GLOB merges without such keys; loratools validate --base lists them",
            )
    return tuple(kept)


class _Sorter:
    """Gathers, for each tensor, what the adapters do to it."""

    def __init__(
        self,
        base: BaseModel,
        adapters: Sequence[Adapter],
        bindings: Sequence[Binding],
        weights: Sequence[float],
        on_conflict: Conflict,
        factors: Sequence[Mapping[str, float]] = (),
    ) -> None:
        self.base = base
        self.adapters = adapters
        self.bindings = bindings
        self.weights = weights
        self.on_conflict = on_conflict
        self.factors = factors or [{}] * len(adapters)  # by module, where they are not 1
        # Of tied embeddings: a copy of one, saved beside its LoRA, is a copy of both.
        tie = base.tie
        self.partners = {} if tie is None else {tie.embedding: tie.head, tie.head: tie.embedding}

    def output(self, name: str, spec: TensorSpec | None, start: str | None = None) -> Output:
        """One tensor of the result.

        Args:
            name: what it is called.
            spec: of the base's tensor; None for one the base does not have.
            start: the base's tensor its values start from, if that has another name.
        """
        base = None if spec is None else TensorRef(self.base.source, start or name)
        contributions, copies = [], []
        changes = zip(self.adapters, self.bindings, self.weights, self.factors, strict=True)
        for adapter, binding, weight, factors in changes:
            one = Contribution(
                weight, binding.terms.get(name, ()), binding.replacements.get(name), binding.rows.get(name)
            )
            for part in _by_factor(one, factors) if factors else [one]:
                if part.terms or part.replacement is not None or part.rows is not None:
                    _require_weight(adapter, name, part)
                    contributions.append(part)
            copy = binding.copies.get(name) or binding.copies.get(self.partners.get(name, ""))
            if copy is not None and spec is not None and copy.shape != spec.shape:
                copies.append(copy)
        contributions = self._settle(name, contributions)
        if copies and spec is not None:  # trained on a resized embedding, which came along: start from that
            base, spec = self._resized_start(name, spec, copies, contributions)
        replacing = next((c.replacement for c in contributions if c.replacement is not None), None)
        if spec is None:
            assert replacing is not None
            return Output(name, replacing.spec, replacing)
        if replacing is not None:
            return self._replaced(name, spec, base, contributions, replacing)
        return Output(name, spec, base, tuple(contributions))

    def _resized_start(
        self, name: str, spec: TensorSpec, copies: list[TensorRef], contributions: list[Contribution]
    ) -> tuple[TensorRef, TensorSpec]:
        if len(copies) > 1 or len(contributions) > 1:
            raise Mismatch(f"{name}: several adapters change an embedding that one of them has resized")
        return copies[0], TensorSpec(spec.dtype, copies[0].shape)

    def _settle(self, name: str, contributions: list[Contribution]) -> list[Contribution]:
        """At most one adapter may replace a tensor, or the same tensor's rows, unless the user says which wins."""
        replacing = [c for c in contributions if c.replacement is not None or c.rows is not None]
        if len(replacing) < 2 or not _collide(replacing):
            return contributions
        if self.on_conflict == "error":
            raise Mismatch(
                f"{name}: {len(replacing)} adapters replace it, and only one can be right",
                hint="--on-conflict first or last says which",
            )
        winner = replacing[0 if self.on_conflict == "first" else -1]
        return [c for c in contributions if c is winner or (c.replacement is None and c.rows is None)]

    def _replaced(
        self,
        name: str,
        spec: TensorSpec,
        base: TensorRef | None,
        contributions: list[Contribution],
        replacing: TensorRef,
    ) -> Output:
        shape = replacing.shape
        if shape != spec.shape and not self._may_resize(spec, shape):
            raise ShapeMismatch(name, shape, spec.shape)
        alone = len(contributions) == 1 and contributions[0] == Contribution(1.0, replacement=replacing)
        if alone and (replacing.spec.dtype == spec.dtype or not compatible(spec.dtype)):
            return Output(name, replacing.spec, replacing)
        if shape != spec.shape:
            if not alone:
                raise Mismatch(
                    f"{name}: resized to {list(shape)} by one adapter and changed by another, or weighted"
                )
            return Output(name, TensorSpec(spec.dtype, shape), replacing)
        return Output(name, spec, base, tuple(contributions))

    def _may_resize(self, spec: TensorSpec, shape: tuple[int, ...]) -> bool:
        """Whether this is a vocabulary that has grown or shrunk: the same but for the number of tokens."""
        rows = spec.shape[:1]
        known = self.base.vocabulary
        return (
            len(shape) == len(spec.shape)
            and shape[1:] == spec.shape[1:]
            and (known is None or rows == (known,))
        )

    def added(self, present: set[str]) -> list[str]:
        """Tensors the base does not have: a new head, a bias."""
        names: dict[str, None] = {}
        for binding in self.bindings:
            names |= dict.fromkeys(name for name in binding.replacements if name not in present)
        return list(names)


def _by_factor(whole: Contribution, factors: Mapping[str, float]) -> list[Contribution]:
    """What one adapter does to a tensor, apart by what its modules are multiplied by; nothing for those at zero."""
    groups: dict[float, list[Term]] = {}
    for term in whole.terms:
        groups.setdefault(factors.get(term.name, 1.0), []).append(term)
    plain = replace(whole, terms=tuple(groups.pop(1.0, ())))
    scaled = [
        Contribution(whole.weight * factor, tuple(terms)) for factor, terms in groups.items() if factor != 0
    ]
    return [plain, *scaled]


def _carried(adapter: Adapter) -> str:
    """In words, what an adapter carries along that a merge leaves aside; empty for nothing."""
    carried = {key: extra.reason for key, extra in adapter.extras.items() if extra.role == "carried"}
    if not carried:
        return ""
    first, reason = next(iter(carried.items()))
    more = f" and {len(carried) - 1} more" if len(carried) > 1 else ""
    return f"{first}{more} left aside: {reason}"


def _tells_dtype(component: BaseModel) -> bool:
    return bool(component.config.keys() & {"torch_dtype", "dtype"})


def _collide(replacing: list[Contribution]) -> bool:
    if any(c.replacement is not None for c in replacing):
        return True
    seen: set[int] = set()
    for contribution in replacing:
        rows = set(contribution.rows.indices if contribution.rows is not None else ())
        if seen & rows:
            return True
        seen |= rows
    return False


def _require_weight(adapter: Adapter, name: str, contribution: Contribution) -> None:
    if contribution.weight < 0 and not contribution.is_sum:
        kind = contribution.terms[0].module.kind if contribution.terms else "replaced tensor"
        raise Unsupported(
            f"{adapter.name}: {name} is not a plain sum ({kind}), so it cannot be subtracted",
            hint="a negative weight takes away what a LoRA, LoHa, LoKr or AdaLoRA has added",
        )


def _resized(base: BaseModel, outputs: Mapping[str, Output], sorter: _Sorter) -> tuple[Adapter, int] | None:
    """The adapter that resized the vocabulary, and the new number of tokens.

    Raises:
        Mismatch: the embeddings end up with different numbers of tokens.
    """
    changed = {
        name: output.spec.shape[0]
        for name, output in outputs.items()
        if name in base.source.specs and output.spec.shape != base.source.specs[name].shape
    }
    if not changed:
        return None
    sizes = set(changed.values())
    tie = base.tie
    left = next(
        (
            n
            for n in outputs
            if n.endswith(("lm_head.weight", "embed_tokens.weight"))
            and n not in changed
            and not (tie and n == tie.head)
        ),
        None,
    )
    if len(sizes) > 1 or left is not None:
        listed = ", ".join(f"{name} {size}" for name, size in changed.items())
        rest = f", {left} {outputs[left].spec.shape[0]}" if left else ""
        raise Mismatch(f"the embeddings would have different numbers of tokens: {listed}{rest}")
    tied = {tie.embedding, tie.head} if tie else set()
    names = changed.keys() | (tied if tied & changed.keys() else set())
    for adapter, binding in zip(sorter.adapters, sorter.bindings, strict=True):
        if not names.isdisjoint([*binding.replacements, *binding.copies]):
            return adapter, sizes.pop()
    raise AssertionError(changed)


def _require_tokens(tie: Tie | None, outputs: Mapping[str, Output]) -> None:
    """Refuse to part tied embeddings of which only one has been resized.

    Raises:
        Mismatch: both are named.
    """
    if tie is None or tie.head not in outputs:
        return
    embedding, head = (outputs[name].spec.shape[0] for name in (tie.embedding, tie.head))
    if embedding != head:
        raise Mismatch(
            "the tied embeddings would have different numbers of tokens: "
            f"{tie.embedding} {embedding}, {tie.head} {head}",
            hint="the adapter resizes one of the two; save both with it (modules_to_save)",
        )


def _cast(output: Output, dtype: Dtype) -> Output:
    if not compatible(output.spec.dtype):
        return output
    return replace(output, spec=TensorSpec(dtype, output.spec.shape))


def _dtype_field(base: BaseModel, dtype: Dtype | None) -> dict[str, str]:
    if dtype is None or dtype.numpy is None:
        return {}
    field = "torch_dtype" if "torch_dtype" in base.config else "dtype"
    return {field: dtype.numpy}


class _Tied:
    """What becomes of tied embeddings: kept tied where one change serves both, else written apart."""

    def __init__(self, base: BaseModel, tie: Tie | None, bindings: Sequence[Binding]) -> None:
        self.base = base
        self.tie = tie
        self.apart = tie is not None and self._must_part(tie, bindings)

    def _must_part(self, tie: Tie, bindings: Sequence[Binding]) -> bool:
        embedding = [b for b in bindings if _touches(b, tie.embedding)]
        head = [b for b in bindings if _touches(b, tie.head)]
        if not embedding and not head:
            return False
        if all(_shares(b, tie) for b in bindings):
            return False
        if (
            tie.embedding.endswith("shared.weight")
            and str(self.base.config.get("model_type")) not in _TIED_SCALE
        ):
            raise Unsupported(
                f"{tie.embedding} serves encoder, decoder and head at once; to change one means to part all three",
                hint="an adapter on the shared embedding of this family cannot be merged; keep it as an adapter",
            )
        if str(self.base.config.get("model_type")) in _TIED_SCALE:
            raise Unsupported(
                f"{tie.embedding} and the head are one weight, and this architecture scales its output only while "
                "they are",
                hint="an adapter on tied embeddings of this family cannot be merged; keep it as an adapter",
            )
        return True

    def new_tensors(self) -> list[tuple[str, str]]:
        """Tensors to be written that the base does not hold: their names, and whose values they start from."""
        if self.tie is None or not self.apart:
            return []
        new = [] if self.tie.stored else [(self.tie.head, self.tie.embedding)]
        return new + ([self.tie.bias] if self.tie.bias else [])

    def shared(self) -> list[str]:
        """The output embedding and its bias, where they go on being other names of tensors elsewhere."""
        if self.tie is None or self.apart:
            return []
        return [self.tie.head, *self.tie.bias[:1]] if self.tie.bias else [self.tie.head]

    def like_embedding(self, outputs: Mapping[str, Output], head: str) -> Output:
        """The output embedding, where the checkpoint stores it although it is one with the input embedding."""
        assert self.tie is not None
        embedding, kept = outputs[self.tie.embedding], outputs[head]
        return kept if embedding.is_copy and kept.is_copy else replace(embedding, name=head)

    def config(self) -> dict[str, bool]:
        """The configuration must say so."""
        return {"tie_word_embeddings": False} if self.apart else {}

    def warnings(self) -> list[str]:
        """In words."""
        if not self.apart or self.tie is None:
            return []
        where = (
            "config.json says so" if self.base.config else "set tie_word_embeddings to false in its config"
        )
        return [
            f"input and output embedding were one weight and now differ: {self.tie.head} is written apart, and {where}"
        ]


def _shares(binding: Binding, tie: Tie) -> bool:
    """Whether one tensor goes on serving both: their changes were trained as one, or they were saved untrained."""
    touched = {name for name in (tie.embedding, tie.head) if _touches(binding, name)}
    trained = {name for name in touched if name in binding.terms or name not in binding.saved}
    if not trained:
        return True
    return binding.keeps_tie and len(touched) == 2 and (_tied_by_peft(tie) or _equal(binding, tie))


def _tied_by_peft(tie: Tie) -> bool:
    """Whether PEFT heeds ``ensure_weight_tying``: it goes by what one of the two is called."""
    return any(
        name.split(".")[-2:-1] in (["embed_tokens"], ["lm_head"]) for name in (tie.embedding, tie.head)
    )


def _equal(binding: Binding, tie: Tie) -> bool:
    """Whether an adapter changes both alike, by its values."""
    whole = [binding.replacements.get(name) for name in (tie.embedding, tie.head)]
    if whole[0] is not None and whole[1] is not None:
        return _same_bytes(whole[0], whole[1])
    terms = [binding.terms.get(name, ()) for name in (tie.embedding, tie.head)]
    if any(len(one) != 1 for one in terms):
        return False
    return _mirrored(terms[0][0].module, terms[1][0].module)


def _same_bytes(one: TensorRef, other: TensorRef) -> bool:
    if one.spec != other.spec:
        return False
    stops = range(_BLOCK, one.spec.count + _BLOCK, _BLOCK)
    spans = [(stop - _BLOCK, min(stop, one.spec.count)) for stop in stops]
    return all(
        (one.source.read_bytes(one.name, *span) == other.source.read_bytes(other.name, *span)).all()
        for span in spans
    )


def _mirrored(embedding: Module, head: Module) -> bool:
    """Whether two LoRAs have the same factors, in the order an input and an output embedding have them."""
    pairs = (("down", "up"), ("up", "down"))
    if len(embedding.tensors) != 2 or len(head.tensors) != 2 or embedding.scaling != head.scaling:
        return False
    for one, other in pairs:
        if one not in embedding.tensors or other not in head.tensors:
            return False
        mine, theirs = embedding.tensors[one].load(), head.tensors[other].load().T
        if mine.shape != theirs.shape or not (mine == theirs).all():
            return False
    return True


def _touches(binding: Binding, name: str) -> bool:
    """Whether an adapter changes a tensor in a way that a tied partner would not share. Token rows are shared."""
    return name in binding.terms or name in binding.replacements
