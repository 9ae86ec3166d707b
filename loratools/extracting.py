"""Two checkpoints of one model, and what becomes of each tensor in an adapter: decided from headers alone.

A matrix, a kernel, an embedding or fused experts can be low-rank modules; everything else that has changed is carried
whole, as ``modules_to_save``, or named as left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal

from loratools.adapter import Module
from loratools.errors import Mismatch, Unsupported
from loratools.models import quantisation_scheme
from loratools.naming import DIALECTS, FUSED_EXPERTS, TRANSPOSED_EXPERTS, Dialect, spell
from loratools.spelling import BaseNames
from loratools.tensors.base import TensorRef

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loratools.models import BaseModel

__all__ = ["Candidate", "FullTensors", "Survey", "Whole", "survey"]

FullTensors = Literal["auto", "none", "all"]
Form = Literal["linear", "convolution", "embedding", "experts"]

# What an nn.Embedding is called, as far as names tell: the last component of its path.
_EMBEDDING = re.compile(r"(embed_?(tokens|in)?|.*embeddings?|w[tp]e|(tokens|positions)_embed|shared)")
_EMBEDDING_MORE = {"tok_embeddings", "relative_attention_bias", "embed_position", "position_embed"}
# An output embedding, whose rows are tokens too.
_HEADS = {"lm_head", "embed_out", "proj_out", "decoder", "vocab_projector", "generator_lm_head", "output"}
_ROUTERS = {"gate", "router"}
# Model types whose tensors transformers renames as it loads them, and the dialect that says how.
_RENAMED = {
    "mixtral": "mixtral", "phimoe": "phimoe", "granitemoe": "granitemoe", "vit": "vit", "dinov2": "dinov2",
    "swin": "swin", "llava": "llava", "llava_next": "llava", "llava_onevision": "llava", "gemma3": "llava",
    "paligemma": "llava", "mistral3": "llava", "internvl": "llava", "aya_vision": "llava", "qwen2_vl": "qwen2-vl",
    "qwen2_5_vl": "qwen2-vl", "gpt_neox": "gpt-neox",
}  # fmt: skip
# Model types of which checkpoints without a head are called what the model around them calls otherwise: the prefix.
_PREFIXES = {"gpt2": "transformer", "bloom": "transformer"}
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip
# What PEFT saves whole of its own accord, by task: every module whose name ends so.
_SAVED = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip
_NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A weight whose change can be a low-rank module.

    Attributes:
        path: of the module, as the model calls it in memory.
        weight: the tensor's name, as stored.
        base: before.
        tuned: after.
        form: of module that it is in PEFT.
        transposed: the delta of the module is the transpose of what is stored.
        parameter: of the module that packs experts, which one.
        bias: the module's bias before and after, where it has one.
        mirror: another module that shares the weight: the output embedding tied to it.
    """

    path: str
    weight: str
    base: TensorRef
    tuned: TensorRef
    form: Form
    transposed: bool = False
    parameter: str | None = None
    bias: tuple[TensorRef, TensorRef] | None = None
    mirror: str | None = None

    @property
    def nbytes(self) -> int:
        """To be read."""
        return self.base.spec.nbytes + self.tuned.spec.nbytes

    @property
    def experts(self) -> int:
        """How many matrices it packs."""
        return self.base.shape[0] if self.form == "experts" else 1

    @property
    def stored(self) -> tuple[int, int]:
        """(rows, columns) of one matrix as it is stored, a kernel flattened."""
        shape = self.base.shape[1:] if self.form == "experts" else self.base.shape
        return shape[0], prod(shape[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the module's delta, with the kernel behind it for a convolution."""
        if self.form == "convolution":
            return self.base.shape
        rows, columns = self.stored
        return (columns, rows) if self.transposed else (rows, columns)

    def like(self) -> Module:
        """The module without its factors."""
        options: dict[str, object] = {}
        if self.form == "embedding":
            options["embedding"] = True
        if self.form == "experts":
            options |= {"experts": self.experts, "parameter": self.parameter}
        return Module("lora", {}, 1, 1.0, 1.0, self.shape, options)


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor without a low-rank form, or one that is left out.

    Attributes:
        name: of the tensor, as stored.
        memory: what it is called in the model, and so in the adapter.
        base: before; None for one that the base does not have.
        tuned: after.
        reason: why it is not low-rank.
        left_out: why it does not become part of the adapter, if it has changed; None where it does.
    """

    name: str
    memory: str
    base: TensorRef | None
    tuned: TensorRef
    reason: str
    left_out: str | None = None

    @property
    def nbytes(self) -> int:
        """To be read, at most."""
        return self.tuned.spec.nbytes + (self.base.spec.nbytes if self.base is not None else 0)

    @property
    def owner(self) -> str:
        """The module it is a parameter of."""
        return self.memory.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Survey:
    """What two checkpoints have in common, and how.

    Attributes:
        candidates: weights whose change can be low-rank.
        wholes: everything else that may have changed.
        task: what PEFT calls it, as far as the name of the model's class tells.
        tied: what the input embedding is called that is the output embedding too, in both; None if there is none.
        head: what that output embedding is called.
        head_bias: what its bias is called, and the bias after training, where it is another name of one elsewhere.
        transposed: every linear weight is stored (in, out).
        warnings: what a careful user should read.
    """

    candidates: tuple[Candidate, ...]
    wholes: tuple[Whole, ...]
    task: str | None
    tied: str | None
    head: str | None
    head_bias: tuple[str, TensorRef] | None
    transposed: bool
    warnings: tuple[str, ...] = field(default=())


def survey(
    base: BaseModel,
    tuned: BaseModel,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    full_tensors: FullTensors = "auto",
) -> Survey:
    """Pair the tensors of two checkpoints and say what each could become; reads no values.

    Args:
        base: before.
        tuned: after.
        include: patterns of tensor names; one must be found in a name for the tensor to count. None: all count.
        exclude: patterns of tensor names that do not count.
        full_tensors: what is carried whole: what has no low-rank form; nothing; or also what does not count.

    Raises:
        Unsupported: a checkpoint is quantised; the scheme is named.
        Mismatch: a tensor is missing, or shapes differ in more than the number of tokens.
    """
    for model in (base, tuned):
        _require_floats(model)
    names = _Pairs(base, tuned, _patterns("include", include), _patterns("exclude", exclude))
    names.require_common()
    if full_tensors != "all":
        names.require_included()
    sorter = _Sorter(names, full_tensors)
    for path, group in names.by_owner().items():
        sorter.module(path, group)
    linear = [one for one in sorter.candidates if one.form == "linear"]
    return Survey(
        candidates=tuple(sorter.candidates),
        wholes=tuple(sorter.wholes),
        task=names.task,
        tied=None if names.embedding is None else names.memory(names.embedding),
        head=None if names.head is None else names.memory(names.head),
        head_bias=names.head_bias,
        transposed=bool(linear) and all(one.transposed for one in linear),
        warnings=tuple(sorter.warnings),
    )


def _require_floats(model: BaseModel) -> None:
    scheme = quantisation_scheme(model)
    if scheme is not None:
        raise Unsupported(
            f"{model.name} is quantised ({scheme}); the difference of codes means nothing",
            hint="extract from the checkpoints before they were quantised",
        )


def _architecture(model: BaseModel) -> str:
    """The name of the model's class; empty where nothing says it."""
    names = model.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _task(model: BaseModel) -> str | None:
    return next((task for ending, task in _TASKS.items() if _architecture(model).endswith(ending)), None)


def _dialect(base: BaseModel) -> Dialect:
    """How the model's names in memory, which adapters use, follow from those that are stored."""
    kind = str(base.config.get("model_type"))
    prefix, headed = _PREFIXES.get(kind), _task(base) is not None
    if prefix and headed and not any(name.startswith(f"{prefix}.") for name in base.source.specs):
        heads = "|".join(sorted(_HEADS | {"score", "classifier", "qa_outputs"}))
        return Dialect(f"{kind} without its head", ((rf"^(?!({heads})\.)", f"{prefix}."),))
    name = _RENAMED.get(kind)
    return next((dialect for dialect in DIALECTS if dialect.name == name), DIALECTS[0])


def _patterns(option: str, patterns: Iterable[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise Unsupported(f"--{option} {error.pattern!r} is not a regular expression: {error}") from error


class _Pairs:
    """The tensors of both checkpoints by name, one standing for two where embeddings are tied."""

    def __init__(
        self,
        base: BaseModel,
        tuned: BaseModel,
        include: list[re.Pattern[str]],
        exclude: list[re.Pattern[str]],
    ) -> None:
        self.base, self.tuned = base, tuned
        self.include, self.exclude = include, exclude
        self.task = _task(tuned) or _task(base)
        self.dialect = _dialect(base)
        self.spelling = BaseNames(base, self.dialect)
        ties = base.tie, tuned.tie
        self.tied = ties[0] is not None and ties[1] is not None
        self.head = ties[0].head if self.tied and ties[0] is not None else None
        self.embedding = ties[0].embedding if self.tied and ties[0] is not None else None

    @property
    def names(self) -> list[str]:
        """Of all tensors, in the order of the base; those that only the tuned has at the end."""
        both = dict.fromkeys([*self.base.source.specs, *self.tuned.source.specs])
        return [name for name in both if name != self.head]

    def counts(self, name: str) -> bool:
        """Whether the patterns let a tensor be part of the adapter."""
        if any(pattern.search(name) for pattern in self.exclude):
            return False
        return not self.include or any(pattern.search(name) for pattern in self.include)

    def before(self, name: str) -> TensorRef | None:
        """A tensor of the base."""
        return _find(self.base, name)

    def after(self, name: str) -> TensorRef | None:
        """A tensor of the tuned checkpoint."""
        return _find(self.tuned, name)

    def require_common(self) -> None:
        """Refuse checkpoints of two models."""
        base, tuned = self.base.source.specs, self.tuned.source.specs
        if not base.keys() & tuned.keys():
            raise Mismatch(
                f"{self.base.name} and {self.tuned.name} have no tensor in common "
                f"(for example {next(iter(base), 'nothing')} and {next(iter(tuned), 'nothing')})",
                hint="are these checkpoints of one model, saved the same way?",
            )
        missing = [name for name in base if self.after(name) is None and self.counts(name)]
        if missing:
            raise Mismatch(
                f"{self.tuned.name} has no {_some(missing)}, which {self.base.name} has",
                hint="is this the base it was trained from? --exclude leaves tensors out",
            )
        extra = [name for name in tuned if self.before(name) is None and self.counts(name)]
        layers = [name for name in extra if _NUMBERED.search(name)]
        if layers:
            raise Mismatch(
                f"{self.base.name} has no {_some(layers)}, which {self.tuned.name} has",
                hint="is this the base it was trained from? --exclude leaves tensors out",
            )

    def require_included(self) -> None:
        """Refuse an expression that was meant to choose tensors and is found in none of their names."""
        for pattern in self.include:
            if not any(pattern.search(name) for name in self.names):
                raise Unsupported(
                    f"--include {pattern.pattern!r} is found in no tensor's name",
                    hint=f"names are such as {next(iter(self.names))}",
                )

    def by_owner(self) -> dict[str, dict[str, str]]:
        """For each module the names of its parameters, by their last component."""
        groups: dict[str, dict[str, str]] = {}
        for name in self.names:
            if self.after(name) is not None:
                owner, _, last = self.memory(name).rpartition(".")
                groups.setdefault(owner, {})[last] = name
        return groups

    def memory(self, name: str) -> str:
        """What a stored tensor is called in the model."""
        return next(iter(spell([name], self.dialect)))

    @property
    def head_bias(self) -> tuple[str, TensorRef] | None:
        """The bias that is tied along with the output embedding: its name in the model, and its values after."""
        tie = self.base.tie
        if not self.tied or tie is None or tie.bias is None:
            return None
        name, stored = tie.bias
        after = self.after(stored)
        return None if after is None else (self.memory(name), after)

    def has_experts(self, parent: str) -> bool:
        """Whether a module keeps experts beside the one in question."""
        return f"{parent}.experts" in self.spelling.modules


def _find(model: BaseModel, name: str) -> TensorRef | None:
    if name in model.source.specs:
        return TensorRef(model.source, name)
    tie = model.tie
    return TensorRef(model.source, tie.embedding) if tie is not None and name == tie.head else None


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


class _Sorter:
    """Collects what becomes of each module's tensors."""

    def __init__(self, pairs: _Pairs, full_tensors: FullTensors) -> None:
        self.pairs = pairs
        self.full_tensors = full_tensors
        self.candidates: list[Candidate] = []
        self.wholes: list[Whole] = []
        self.warnings: list[str] = []

    def module(self, path: str, group: dict[str, str]) -> None:
        """Sort the parameters of one module."""
        weight = group.get("weight")
        reason = None if weight is None else self._why_whole(path, weight)
        adapted = weight is not None and reason is None
        for last, name in group.items():
            if adapted and last == "weight":
                self._candidate(path, name, self._form(path, name), bias=group.get("bias"))
            elif adapted and last == "bias" and self._bias(name) is not None:
                continue  # with its weight
            elif last in FUSED_EXPERTS and len(self._shape(name)) == 3 and self._why_unequal(name) is None:
                self._candidate(path, name, "experts", parameter=last)
            else:
                self._whole(name, (reason if last == "weight" else None) or self._why_vector(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        found = self.pairs.after(name)
        assert found is not None
        return found.shape

    def _candidate(
        self, path: str, name: str, form: Form, *, bias: str | None = None, parameter: str | None = None
    ) -> None:
        before, after = self.pairs.before(name), self.pairs.after(name)
        assert before is not None
        assert after is not None
        if not self.pairs.counts(name):
            self._whole(name, "left out of the low-rank part")
            if bias is not None:
                self._whole(bias, "left out of the low-rank part")
            return
        pair = None if bias is None else self._bias(bias)
        tied = self.pairs.tied and name == self.pairs.embedding
        mirror = (
            self.pairs.memory(self.pairs.head).removesuffix(".weight") if tied and self.pairs.head else None
        )
        self.candidates.append(
            Candidate(path, name, before, after, form, self._transposed(name, form), parameter, pair, mirror)
        )

    def _bias(self, name: str) -> tuple[TensorRef, TensorRef] | None:
        """A bias before and after, where it may be part of the adapter and has a difference."""
        before, after = self.pairs.before(name), self.pairs.after(name)
        if before is None or after is None or not self.pairs.counts(name) or self._why_unequal(name):
            return None
        return before, after

    def _form(self, path: str, name: str) -> Form:
        if len(self._shape(name)) > 2:
            return "convolution"
        return "embedding" if _is_embedding(path) else "linear"

    def _transposed(self, name: str, form: Form) -> bool:
        if form == "embedding":
            return True
        if form == "linear":
            memory = self.pairs.memory(name)
            return memory in self.pairs.spelling.disk and self.pairs.spelling.stored_transposed(memory, None)
        model_type = self.pairs.base.config.get("model_type")
        if model_type is None:
            return (
                form == "experts"
                and f"{name.rpartition('.')[0]}.gate_up_proj_bias" in self.pairs.spelling.disk
            )
        return form == "experts" and model_type in TRANSPOSED_EXPERTS

    def _why_whole(self, path: str, weight: str) -> str | None:
        """Why the weight of a module has no low-rank form; None if it has."""
        unequal = self._why_unequal(weight)
        if unequal is not None:
            return unequal
        shape = self._shape(weight)
        parent, _, last = path.rpartition(".")
        if len(shape) < 2:
            return "a vector"
        if path.endswith(_SAVED.get(str(self.pairs.task), ())):
            return "a head, which PEFT saves whole"
        if last == "embed_positions":
            return "a table of positions, which models look up in ways of their own"
        if last in _ROUTERS and self.pairs.has_experts(parent):
            return "a router of experts"
        if len(shape) > 2 and shape[1] == 1 and shape[0] > 1:
            return "a depthwise convolution"
        after = self.pairs.after(weight)
        assert after is not None
        return None if after.spec.dtype.kind == "float" else f"{after.spec.dtype} values"

    def _why_vector(self, name: str) -> str:
        unequal = self._why_unequal(name)
        if unequal is not None:
            return unequal
        return "a vector" if len(self._shape(name)) < 2 else "a parameter of its own"

    def _why_unequal(self, name: str) -> str | None:
        """Why a tensor has no difference; None if it has one.

        Raises:
            Mismatch: its shapes differ in more than the number of tokens.
        """
        before = self.pairs.before(name)
        if before is None:
            return "not in the base"
        shape, was = self._shape(name), before.shape
        if shape == was:
            return None
        if not self._may_resize(name, was, shape):
            if not self.pairs.counts(name):
                return "another shape than in the base"
            raise Mismatch(
                f"{name}: {list(was)} in {self.pairs.base.name}, {list(shape)} in {self.pairs.tuned.name}",
                hint="is this the base it was trained from?",
            )
        return f"resized from {was[0]:,} to {shape[0]:,} tokens"

    def _may_resize(self, name: str, was: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether two shapes are those of a vocabulary that has grown or shrunk."""
        path = name.rpartition(".")[0]
        if len(was) != len(shape) or was[1:] != shape[1:]:
            return False
        known = self.pairs.base.vocabulary
        return was[0] == known or _is_embedding(path) or path.rpartition(".")[2] in _HEADS

    def _whole(self, name: str, reason: str) -> None:
        before, after = self.pairs.before(name), self.pairs.after(name)
        assert after is not None
        left_out = None
        if not self.pairs.counts(name) and self.full_tensors != "all":
            left_out = "excluded"
        elif after.spec.dtype.kind != "float":
            left_out = f"{after.spec.dtype} values"
        elif self.full_tensors == "none":
            left_out = f"{reason}, and full tensors are not wanted"
        self.wholes.append(Whole(name, self.pairs.memory(name), before, after, reason, left_out))
        if reason.startswith("resized") and left_out is None:
            self.warnings.append(
                f"{name} was {reason}: it goes along whole, and PEFT loads it only into a model whose embeddings "
                "were resized first (resize_token_embeddings)"
            )


def _is_embedding(path: str) -> bool:
    last = path.rpartition(".")[2]
    return _EMBEDDING.fullmatch(last) is not None or last in _EMBEDDING_MORE
