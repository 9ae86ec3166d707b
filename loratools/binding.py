"""Which weights of a base an adapter touches, and which part of which update lands where.

Names are resolved against the base, never guessed: the adapter's modules are looked up among the base's, first as they
are spelled, then under every dialect of :mod:`loratools.naming` and every change of prefix the base's own names
suggest. One spelling must account for the modules better than all others; a tie is an error.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from loratools.adapter import SAVED_EMBEDDING, Module, Part, flat_shape, require_shape
from loratools.deltas.base import Span
from loratools.errors import Mismatch, ShapeMismatch, UnmatchedModules
from loratools.naming import DIALECTS, EXPERT_PARTS, FUSED_EXPERTS, Dialect, spell

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from loratools.adapter import Adapter, Extra
    from loratools.models import BaseModel
    from loratools.tensors.base import TensorRef

__all__ = ["Binding", "Target", "Term", "bind"]


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
        ties: whether the adapter says that tied embeddings were trained as one.
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


_EXPERT = re.compile(r"(?P<owner>.*\.experts)\.(?P<index>\d+)\.(?P<part>[A-Za-z0-9_]+)")
_NATURAL = ".(out, in)"  # no name of a module
_MAX_STRIPPED = 4  # name components that a prefix change may drop


class _Base:
    """The base's names under one dialect: tensors in memory and the modules they belong to."""

    def __init__(self, base: BaseModel, dialect: Dialect) -> None:
        self.dialect = dialect
        self.specs = dict(base.source.specs)
        if (
            base.tie is not None and not base.tie.stored
        ):  # the head exists in memory, as another name of the embedding
            self.specs[base.tie.head] = self.specs[base.tie.embedding]
        self.model_type = base.config.get("model_type")
        self.disk = spell(self.specs, dialect)

    @cached_property
    def first(self) -> dict[str, str]:
        """The first tensor on disk within each module, by the module's path."""
        found: dict[str, str] = {}
        for name in sorted(self.disk, key=self.disk.__getitem__):
            path = name.rpartition(".")[0]
            while path and path not in found:
                found[path] = self.disk[name]
                path = path.rpartition(".")[0]
        return found

    @cached_property
    def modules(self) -> frozenset[str]:
        """Every module path: each proper prefix of a tensor's name."""
        return frozenset(self.first)

    @cached_property
    def prefixes(self) -> list[str]:
        """Module paths near the root, which a name may lack."""
        return sorted({path for path in self.modules if path.count(".") < 3 and not re.search(r"\d", path)})

    def shape(self, memory: str) -> tuple[int, ...]:
        return self.specs[self.disk[memory]].shape

    def holds(self, path: str) -> bool:
        """Whether a module of this path exists, fused with others perhaps."""
        if path in self.modules or path in self.disk:
            return True
        expert = _EXPERT.fullmatch(path)
        if expert is None or expert["part"] not in EXPERT_PARTS:
            return False
        return f"{expert['owner']}.{EXPERT_PARTS[expert['part']].fused}" in self.disk

    def stored_transposed(self, weight: str, flag: object) -> bool:
        """Whether a square weight is stored (in, out), as in GPT-2's Conv1D, which its own shape cannot tell.

        Modules of the same name tell, in all layers; else those beside it. PEFT's ``fan_in_fan_out`` speaks of the
        last layer that was adapted only, so it is heard where no module is seen to be stored (out, in).
        """
        path = weight.removesuffix(".weight")
        parent, _, last = path.rpartition(".")
        vote = self._votes[last] or self._votes[f"{parent}."]
        return vote > 0 or (vote == 0 and flag is True and not self._votes[_NATURAL])

    @cached_property
    def _votes(self) -> Counter[str]:
        """By last component, and by "parent.": modules stored (in, out) minus those stored (out, in).

        Under :data:`_NATURAL`, how many of the latter there are. Seen where a bias has the length of one dimension
        and not of the other.
        """
        votes: Counter[str] = Counter()
        for name in self.disk:
            path, bias = name.removesuffix(".weight"), name.removesuffix("weight") + "bias"
            shape = self.shape(name)
            if name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1] and bias in self.disk:
                parent, _, last = path.rpartition(".")
                vote = 1 if self.shape(bias) == shape[1:] else -1
                votes[last] += vote
                votes[f"{parent}."] += vote
                votes[_NATURAL] += vote < 0
        return votes


@dataclass(frozen=True, slots=True)
class _Spelling:
    """A way to turn the adapter's module paths into the base's: a dialect, components dropped, a prefix added."""

    base: _Base
    stripped: int = 0
    prefix: str = ""

    def __call__(self, path: str) -> str:
        if self.stripped:
            path = path.split(".", self.stripped)[-1] if path.count(".") >= self.stripped else path
        return f"{self.prefix}.{path}" if self.prefix else path

    @property
    def words(self) -> str:
        changes = []
        if self.stripped:
            changes.append(f"without {self.stripped} leading component{'s' * (self.stripped > 1)}")
        if self.prefix:
            changes.append(f"under {self.prefix}")
        if self.base.dialect.rules:
            changes.append(f"in the {self.base.dialect.name} spelling")
        return ", ".join(changes)


def bind(adapter: Adapter, base: BaseModel, faults: list[tuple[str, Mismatch]] | None = None) -> Binding:
    """Find the place of every module and extra of an adapter in a base; reads no values.

    Args:
        adapter: whose modules.
        base: where they belong.
        faults: collects what does not fit, by the name of the module or tensor, which then stays unbound; by default
            the first fault is raised.

    Raises:
        UnmatchedModules: no module found a place; or two spellings fit equally well.
        ShapeMismatch: a delta does not fit its weight.
        Mismatch: a bias to update that the base does not have, a parameter that cannot be told.
    """
    paths = [_clean(name) for name in adapter.modules] or [
        e.target.rpartition(".")[0] for e in adapter.extras.values()
    ]
    spelling = _choose(adapter, base, paths)
    binder = _Binder(adapter, spelling)
    for name, module in adapter.modules.items():
        with _collected(name, faults):
            binder.module(name, module)
    if adapter.modules and not binder.bound and not faults:
        raise _nothing_bound(adapter, base, paths)
    for key, extra in adapter.extras.items():
        with _collected(key, faults):
            binder.extra(key, extra)
    if not binder.bound and not binder.replacements and not binder.rows and not faults:
        raise _nothing_bound(adapter, base, paths)
    return Binding(
        terms={weight: tuple(terms) for weight, terms in binder.terms.items()},
        replacements=binder.replacements,
        rows=binder.rows,
        copies=binder.copies,
        saved=frozenset(binder.saved),
        bound=tuple(binder.bound),
        unmatched=tuple(binder.unmatched),
        ignored=binder.ignored,
        keeps_tie=bool(adapter.config.raw.get("ensure_weight_tying")),
        renamed=spelling.words,
    )


@contextmanager
def _collected(name: str, faults: list[tuple[str, Mismatch]] | None) -> Iterator[None]:
    try:
        yield
    except Mismatch as error:
        if faults is None:
            raise
        faults.append((name, error))


def _clean(name: str) -> str:
    """A module path without the layers PEFT wraps around it."""
    return name.replace(".base_layer", "")


def _choose(adapter: Adapter, base: BaseModel, paths: list[str]) -> _Spelling:
    plain = _Spelling(_Base(base, DIALECTS[0]))
    paths = list(dict.fromkeys(paths))
    best = sum(map(plain.base.holds, paths))
    if best == len(paths):
        return plain
    found = [plain] if best else []
    for spelling in _spellings(base, paths):
        # Distinct places: a spelling that puts the encoder's modules on top of the decoder's explains only half.
        count = len({there for path in paths if spelling.base.holds(there := spelling(path))})
        if count > best:
            best, found = count, [spelling]
        elif count == best and best:
            found.append(spelling)
    if not found:
        return plain
    # A name that fits as it is, but for what stands before it, is not looked for elsewhere under half of itself.
    least = min(spelling.stripped for spelling in found)
    return _single(adapter, [spelling for spelling in found if spelling.stripped == least], paths)


def _spellings(base: BaseModel, paths: list[str]) -> Iterator[_Spelling]:
    seen: set[frozenset[str]] = set()
    for dialect in DIALECTS:
        names = _Base(base, dialect)
        key = frozenset(names.disk)
        if key in seen:
            continue  # the dialect changes nothing here
        seen.add(key)
        for stripped in range(min(_MAX_STRIPPED, max(p.count(".") for p in paths)) + 1):
            for prefix in ("", *names.prefixes):
                yield _Spelling(names, stripped, prefix)


def _single(adapter: Adapter, found: list[_Spelling], paths: list[str]) -> _Spelling:
    """The one spelling, where those that fit agree on what they mean; the plainest of equals.

    Raises:
        UnmatchedModules: they disagree.
    """
    meanings: dict[tuple[str, ...], _Spelling] = {}
    for spelling in found:
        meant = tuple(spelling(p) if spelling.base.holds(spelling(p)) else "" for p in paths)
        resolved = tuple(_place(spelling.base, m) for m in meant)
        meanings.setdefault(resolved, spelling)
    candidates = list(meanings.values())
    if len(candidates) > 1 and not (candidates[0].stripped == 0 and not candidates[0].prefix):
        example = next(p for p in paths if len({s(p) for s in candidates}) > 1)
        where = ", ".join(sorted({s(example) for s in candidates if s.base.holds(s(example))})[:4])
        raise UnmatchedModules(
            f"{adapter.name}: {example} could be {where}", (example,),
            hint="rename the adapter's modules so that they carry the base's full path",
        )  # fmt: skip
    return candidates[0]


def _place(base: _Base, path: str) -> str:
    """A tensor on disk that stands for a module, however its experts are packed."""
    for tail in (".weight", "", ".in_proj_weight"):
        if path + tail in base.disk:
            return base.disk[path + tail]
    return base.first.get(path, path)


def _nothing_bound(adapter: Adapter, base: BaseModel, paths: list[str]) -> UnmatchedModules:
    example = paths[0] if paths else "nothing"
    known = [name.removesuffix(".weight") for name in base.source.specs if name.endswith(".weight")]
    near = difflib.get_close_matches(example, known, 1, 0.3)
    hint = f"the nearest name in the base is {near[0]}" if near else "is this the base it was trained on?"
    return UnmatchedModules(
        f"{adapter.name}: none of its {len(paths)} modules is in {base.name} (for example {example})",
        tuple(paths),
        hint=hint,
    )


class _Binder:
    """Collects what :func:`bind` finds."""

    def __init__(self, adapter: Adapter, spelling: _Spelling) -> None:
        self.adapter = adapter
        self.spelling = spelling
        self.base = spelling.base
        self.terms: dict[str, list[Term]] = {}
        self.replacements: dict[str, TensorRef] = {}
        self.rows: dict[str, Extra] = {}
        self.copies: dict[str, TensorRef] = {}
        self.saved: set[str] = set()
        self.resized = {
            self._memory(extra): extra.tensor.shape
            for extra in adapter.extras.values()
            if extra.role == "base_copy"
        }
        self.bound: list[str] = []
        self.unmatched: list[str] = []
        self.ignored: dict[str, str] = {}

    def module(self, name: str, module: Module) -> None:
        if "config_rank" in module.options:
            wanted = module.options["config_rank"]
            raise Mismatch(
                f"{self.adapter.name}: {name} has rank {module.rank} in the file and {wanted} in the configuration",
                hint="is this the configuration the weights were saved with?",
            )
        path = self.spelling(_clean(name))
        targets = list(self._targets(name, path, module)) if self.base.holds(path) else []
        if not targets:
            self.unmatched.extend(ref.name for ref in module.tensors.values())
            return
        self.bound.append(name)
        for target in targets:
            self._add(Term(name, module, target))
        self._bias(name, path, module)

    def _add(self, term: Term) -> None:
        self.terms.setdefault(term.target.weight, []).append(term)

    def _bias(self, name: str, path: str, module: Module) -> None:
        trained = "up_bias" in module.tensors
        scaled = module.kind == "ia3" and not module.options["feedforward"]
        bias = f"{path}.bias"
        if bias in self.base.disk and (trained or scaled):
            self._add(Term(name, module, Target(self.base.disk[bias]), "bias"))
        elif trained:
            raise Mismatch(
                f"{self.adapter.name}: {name} trains a bias (lora_bias), and {path} has none in the base",
                hint="a merged checkpoint could not hold it; keep the adapter unmerged",
            )

    def _targets(self, name: str, path: str, module: Module) -> Iterator[Target]:
        weight = next(
            (path + tail for tail in (".weight", ".in_proj_weight") if path + tail in self.base.disk), None
        )
        if weight is not None and "experts" not in module.options:
            yield self._whole(name, weight, module)
        elif path in self.base.disk and "experts" not in module.options:
            yield self._whole(name, path, module)  # a bare parameter
        elif expert := _EXPERT.fullmatch(path):
            yield from self._into_fused(name, expert, module)
        else:
            yield from self._parameter(name, path, module)

    def _shape(self, memory: str) -> tuple[int, ...]:
        """Of a weight as the adapter saw it: with the vocabulary it brings along, where that was resized."""
        shape, resized = self.base.shape(memory), self.resized.get(memory, ())
        return resized if len(resized) == len(shape) and resized[1:] == shape[1:] else shape

    def _whole(self, name: str, weight: str, module: Module) -> Target:
        shape, disk = self._shape(weight), self.base.disk[weight]
        if module.options.get("embedding"):
            require_shape(name, module.shape[::-1], shape)
            return Target(disk, transposed=True)
        if module.kind == "ia3":
            return self._scaled(name, weight, module)
        if len(shape) > 2 or module.kind in {"loha", "lokr"}:
            fits = flat_shape(module.shape) == flat_shape(shape) and module.shape[:1] == shape[:1]
            require_shape(name, shape if fits else module.shape, shape)
            return Target(disk)
        if module.shape == shape:
            square = shape[0] == shape[-1]
            return Target(disk, transposed=square and self._square_is_transposed(weight))
        require_shape(name, module.shape[::-1] if module.shape[::-1] == shape else module.shape, shape)
        return Target(disk, transposed=True)

    def _scaled(self, name: str, weight: str, module: Module) -> Target:
        """IA3 scales output features, or inputs of a feed-forward; its vector is stored as (out, 1) or (1, in)."""
        shape = self.base.shape(weight)
        along = 1 if module.options["feedforward"] else 0
        fits = [
            prod(module.shape) == shape[along],
            prod(module.shape) == shape[1 - along] and len(shape) == 2,
        ]
        if not any(fits):
            raise ShapeMismatch(name, module.shape, shape)
        transposed = self._square_is_transposed(weight) if all(fits) else fits[1]
        return Target(self.base.disk[weight], transposed=transposed)

    def _square_is_transposed(self, weight: str) -> bool:
        return self.base.stored_transposed(weight, self.adapter.config.raw.get("fan_in_fan_out"))

    def _parameter(self, name: str, path: str, module: Module) -> Iterator[Target]:
        """A parameter named by ``target_parameters``; a fused expert tensor, or the checkpoint's separate experts."""
        parameter = self._which_parameter(name, path, module)
        if parameter is None:
            return
        experts = module.options.get("experts", 1)
        memory = f"{path}.{parameter}"
        if memory in self.base.disk:
            yield from self._fused(name, memory, module, experts)
            return
        for part, place in EXPERT_PARTS.items():
            if place.fused != parameter or f"{path}.0.{part}.weight" not in self.base.disk:
                continue
            for index in range(experts):
                yield self._separate(name, f"{path}.{index}.{part}.weight", module, place.half, index)

    def _which_parameter(self, name: str, path: str, module: Module) -> str | None:
        """The parameter a wrapper adapts: the innermost wrapper has the one its module defines first."""
        listed = [entry.rpartition(".") for entry in self.adapter.config.raw.get("target_parameters") or ()]
        mine: list[str] = [last for owner, _, last in listed if path == owner or path.endswith("." + owner)]
        order = {last: i for i, last in enumerate(FUSED_EXPERTS)}
        mine = sorted(dict.fromkeys(mine), key=lambda last: (order.get(last, len(order)), last))
        if not mine:
            return None
        depth = name.count(".base_layer")
        chosen = mine[len(mine) - 1 - depth] if depth < len(mine) else None
        fitting = [last for last in mine if self._fits(f"{path}.{last}", module)]
        if len(fitting) == 1:
            return fitting[0]
        if (
            chosen is None
            or (fitting and chosen not in fitting)
            or any(last not in order for last in mine if len(mine) > 1)
        ):
            raise Mismatch(f"{self.adapter.name}: cannot tell which of {', '.join(mine)} {name} adapts")
        return chosen

    def _fits(self, memory: str, module: Module) -> bool:
        if memory not in self.base.disk:
            return False
        shape = self.base.shape(memory)
        return sorted(shape[-2:]) == sorted(module.shape) and (
            len(shape) < 3 or shape[0] == module.options.get("experts", 1)
        )

    def _fused(self, name: str, memory: str, module: Module, experts: int) -> Iterator[Target]:
        shape, disk = self.base.shape(memory), self.base.disk[memory]
        if len(shape) == 2:
            yield self._whole(name, memory, module)
            return
        if len(shape) != 3 or shape[0] != experts:
            raise ShapeMismatch(name, (experts, *module.shape), shape)
        transposed = self._stored_transposed(name, shape, module)
        for index in range(experts):
            yield Target(disk, index=index, transposed=transposed, delta_index=index)

    def _stored_transposed(
        self, name: str, shape: tuple[int, ...], module: Module, *, fused: bool = True
    ) -> bool:
        """Whether the delta is the transpose of the matrices in ``shape`` (experts, first, last).

        PEFT's orientation has changed over its versions; the shapes tell, unless they are square.
        """
        out, into = module.shape
        if (out, into) != shape[1:] and (into, out) != shape[1:]:
            raise ShapeMismatch(name, (shape[0], *module.shape), shape)
        if out != into:
            return (into, out) == shape[1:]
        version = str(self.adapter.config.raw.get("peft_version") or "")
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
        if not numbers:
            raise Mismatch(
                f"{self.adapter.name}: {name} adapts square experts {list(shape)}, and no peft_version says which way",
                hint="PEFT before 0.19.1 wrote (in, out), later (out, in): set peft_version in adapter_config.json",
            )
        return numbers < (0, 19, 1) or (fused and self._interleaved())

    def _interleaved(self) -> bool:
        """gpt-oss: experts stored (in, out), gate and up in turns. Its fused tensor has a bias beside it."""
        return self.spelling.base.model_type == "gpt_oss" or any(
            memory.endswith(".experts.gate_up_proj_bias") for memory in self.base.disk
        )

    def _halves(self, half: int | None, features: int) -> Span | None:
        if half is None:
            return None
        if self._interleaved():
            return Span(half, features, 2)
        return Span(half * (features // 2), (half + 1) * (features // 2))

    def _separate(self, name: str, memory: str, module: Module, half: int | None, index: int) -> Target:
        """One expert's matrix in a checkpoint that keeps experts apart, from a module that packs them."""
        if memory not in self.base.disk:
            raise Mismatch(
                f"{self.adapter.name}: {name} adapts {module.options.get('experts', 1)} experts, {memory} is missing"
            )
        shape, disk = self.base.shape(memory), self.base.disk[memory]
        together = (
            shape[0] * (1 if half is None else 2),
            shape[1],
        )  # of the parameter the module was trained on
        if self._stored_transposed(name, (module.options.get("experts", 1), *together), module, fused=False):
            return Target(
                disk, transposed=True, delta_index=index, delta_cols=self._halves(half, together[0])
            )
        return Target(disk, delta_index=index, delta_rows=self._halves(half, together[0]))

    def _into_fused(self, name: str, expert: re.Match[str], module: Module) -> Iterator[Target]:
        """One expert's module on a checkpoint that packs all experts in one tensor."""
        place = EXPERT_PARTS.get(expert["part"])
        if place is None or (memory := f"{expert['owner']}.{place.fused}") not in self.base.disk:
            return
        shape, index = self.base.shape(memory), int(expert["index"])
        if len(shape) != 3 or index >= shape[0]:
            raise ShapeMismatch(name, module.shape, shape)
        fused = (module.shape[0] * (1 if place.half is None else 2), module.shape[1])
        transposed = fused != shape[1:] or (fused[0] == fused[1] and self._interleaved())
        require_shape(name, fused[::-1] if transposed else fused, shape[1:])
        span = self._halves(place.half, fused[0])
        disk = self.base.disk[memory]
        if transposed:
            yield Target(disk, index=index, cols=span, transposed=True)
        else:
            yield Target(disk, index=index, rows=span)

    def _memory(self, extra: Extra) -> str:
        owner, _, last = extra.target.rpartition(".")
        return f"{self.spelling(owner)}.{last}" if owner else last

    def extra(self, key: str, extra: Extra) -> None:
        memory = self._memory(extra)
        disk = self.base.disk.get(memory)
        if extra.role == "training_only":
            self.ignored[key] = extra.reason
        elif extra.role == "token_rows" and disk is not None:
            self._token_rows(key, extra, disk)
        elif extra.role == "base_copy":
            self.copies[disk or memory] = extra.tensor
        elif extra.role == "replacement":
            name = disk or self._new_name(memory)
            self.replacements[name] = extra.tensor
            if extra.reason == SAVED_EMBEDDING:
                self.saved.add(name)
        else:
            self.unmatched.append(key)

    def _token_rows(self, key: str, extra: Extra, disk: str) -> None:
        shape, weight = extra.tensor.shape, self.base.specs[disk].shape
        if len(shape) != 2 or shape[1:] != weight[1:]:
            raise ShapeMismatch(key, shape, weight)
        if len(extra.indices) != shape[0]:
            raise Mismatch(
                f"{self.adapter.name}: {key} has {shape[0]} rows, the configuration names {len(extra.indices)} tokens"
            )
        if max(extra.indices, default=0) >= weight[0]:
            raise Mismatch(
                f"{self.adapter.name}: token {max(extra.indices)} is beyond the {weight[0]} rows of {disk}"
            )
        self.rows[disk] = extra

    def _new_name(self, memory: str) -> str:
        """The name on disk of a tensor the base does not have: a new head."""
        return memory


def group_by_index(terms: Iterable[Term]) -> dict[int | None, list[Term]]:
    """The terms of a weight by the expert they touch; None is the whole weight."""
    groups: dict[int | None, list[Term]] = {}
    for term in terms:
        groups.setdefault(term.target.index, []).append(term)
    return groups
