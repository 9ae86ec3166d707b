"""Which weights of a base an adapter touches, and which part of which update lands where.

Names are resolved against the base (:mod:`loratools.spelling`), or through the architecture both belong to
(:mod:`loratools.placing`); orientation is decided by the shapes of its weights and biases, never by what a
configuration claims.
"""

from __future__ import annotations

import difflib
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loratools.adapter import SAVED_EMBEDDING, flat_shape, require_own_rank, require_shape
from loratools.errors import Mismatch, ShapeMismatch, UnmatchedModules, Unsupported
from loratools.experts import ExpertPlaces
from loratools.spelling import EXPERT, Spelling, bare, choose_spelling, finds_all, flattened
from loratools.targets import Binding, Target, Term

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loratools.adapter import Adapter, Extra, Module
    from loratools.architectures.base import Architecture
    from loratools.models import BaseModel
    from loratools.placing import Layout
    from loratools.tensors.base import TensorRef

__all__ = ["bind", "shared_layout", "speaks_of_diffusion"]

# Formats of language models, whose names are looked up as they are unless they speak of something else.
_LANGUAGE = {"peft", "bare-peft", "mlx", "gguf", "loralib"}
# Words that only diffusion models, or the tools around them, have in their names.
_DIFFUSION = re.compile(
    r"(?:^|[._/])(?:lora_(?:unet|te\d?|transformer|prior)|lycoris|oft_unet|diffusion_model|unet|text_encoders?|"
    r"(?:down|up|input|output|double|single|joint)_blocks|(?:single_)?transformer_blocks|(?:context|noise)_refiner)"
    r"(?:[._/]|\d)"
)

# Kinds that never lie transposed to their weight.
_AS_STORED = {"loha", "lokr", "full", "norm", "set", "glora"}


def bind(
    adapter: Adapter,
    base: BaseModel,
    faults: list[tuple[str, Mismatch]] | None = None,
    *,
    architecture: Architecture | None = None,
) -> Binding:
    """Find the place of every module and extra of an adapter in a base; reads no values.

    Args:
        adapter: whose modules.
        base: where they belong.
        faults: collects what does not fit, by the name of the module or tensor, which then stays unbound; by default
            the first fault is raised.
        architecture: that both belong to; by default it is looked for where their names speak of one.

    Raises:
        UnmatchedModules: no module found a place; or two spellings fit equally well.
        ShapeMismatch: a delta does not fit its weight.
        Mismatch: a bias to update that the base does not have, a parameter that cannot be told.
    """
    layout = shared_layout(adapter, base, architecture)
    if layout is not None:
        return _bind_known(adapter, layout, faults)
    flat = flattened(adapter, base)
    paths = [flat.get(name) or bare(name) for name in adapter.modules] or [
        e.target.rpartition(".")[0] for e in adapter.extras.values()
    ]
    besides = [
        e.target.rpartition(".")[0] for e in adapter.extras.values() if e.role not in {"unclaimed", "carried"}
    ]
    spelling = choose_spelling(adapter, base, paths, besides)
    binder = _Binder(adapter, spelling, flat)
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


def shared_layout(
    adapter: Adapter, base: BaseModel, architecture: Architecture | None = None
) -> Layout | None:
    """The base in terms of the architecture it shares with an adapter; None where names are compared as they are.

    A language model's adapter is told by its names, and costs no look at any architecture.
    """
    if architecture is None and not _speaks_of_one(adapter, base):
        return None
    from loratools.placing import find_layout

    return find_layout(adapter, base, architecture)


def speaks_of_diffusion(adapter: Adapter) -> bool:
    """Whether an adapter's format or its names are those of diffusion models."""
    if adapter.format not in _LANGUAGE:
        return True
    return any(_DIFFUSION.search(f"{name}.") for name in adapter.modules)


def _speaks_of_one(adapter: Adapter, base: BaseModel) -> bool:
    if not adapter.modules:
        return False
    if adapter.format not in _LANGUAGE or base.components:
        return True
    if not speaks_of_diffusion(adapter):
        return False
    return not finds_all(base, [bare(name) for name in adapter.modules])


def _bind_known(adapter: Adapter, layout: Layout, faults: list[tuple[str, Mismatch]] | None) -> Binding:
    """:func:`bind`, for an adapter and a base of one architecture."""
    terms: dict[str, list[Term]] = {}
    bound: list[str] = []
    unmatched: list[str] = []
    for name, module in adapter.modules.items():
        landed: list[Term] = []
        with _collected(name, faults):
            require_own_rank(adapter.name, name, module)
            landed = _landed(name, module, adapter, layout, faults is not None)
            if not landed:
                unmatched += [ref.name for ref in module.tensors.values()]
        if landed:
            bound.append(name)
        for term in landed:
            with _collected(name, faults):
                _join(adapter.name, terms, term)
    if adapter.modules and not bound and not faults:
        raise _strange(adapter, layout, None)
    ignored: dict[str, str] = {}
    replacements: dict[str, TensorRef] = {}
    for key, extra in adapter.extras.items():
        if extra.role in {"training_only", "carried"}:
            ignored[key] = extra.reason
        elif extra.role == "replacement" and (replaced := layout.tensor(extra.target)) is not None:
            replacements[replaced] = extra.tensor
        else:
            unmatched.append(key)
    return Binding(
        terms={weight: tuple(mine) for weight, mine in terms.items()},
        replacements=replacements,
        rows={},
        copies={},
        saved=frozenset(),
        bound=tuple(bound),
        unmatched=tuple(unmatched),
        ignored=ignored,
        architecture=layout.architecture.name,
    )


def _landed(name: str, module: Module, adapter: Adapter, layout: Layout, collecting: bool) -> list[Term]:
    """What a module adds; where faults are collected, each says what is wrong with its own module.

    Raises:
        Mismatch: it does not fit.
        Unsupported: it would have to be split and cannot be; a mismatch where faults are collected.
    """
    from loratools.canonical import stem
    from loratools.placing import land

    place = layout.architecture.lookup(stem(name))
    try:
        return [] if place is None else land(name, module, place, layout)
    except ShapeMismatch as error:
        if collecting:
            raise
        raise _strange(adapter, layout, error) from error
    except Unsupported as error:
        if not collecting:
            raise
        raise Mismatch(str(error), hint=error.hint) from error


def _strange(adapter: Adapter, layout: Layout, error: ShapeMismatch | None) -> Mismatch:
    """What to say of an adapter that does not fit: that the base is of another family, where it is."""
    from loratools.architectures.base import architecture

    base, mine, other = layout.base, layout.architecture, layout.family
    if other is not None and other != mine.name:
        return UnmatchedModules(
            f"{adapter.name} is for {mine.title}, and {base.name} is {architecture(other).title}",
            tuple(adapter.modules),
            hint="is this the base it was trained on?",
        )
    return error or UnmatchedModules(
        f"{adapter.name}: none of its {len(adapter.modules)} modules is in {base.name}, which has "
        f"{len(layout.homes)} of {mine.title}",
        tuple(adapter.modules),
        hint="is this the base it was trained on?",
    )


def _join(adapter: str, terms: dict[str, list[Term]], term: Term) -> None:
    """Put a term with the others of its weight.

    Raises:
        Mismatch: the adapter has the same module under another name.
    """
    others = terms.setdefault(term.target.weight, [])
    for other in others:
        if other.name != term.name and other.part == term.part and _same_place(other.target, term.target):
            raise Mismatch(
                f"{adapter}: {other.name} and {term.name} both change {term.target.weight}",
                hint="one module under two names; take one of them out of the file",
            )
    others.append(term)


def _same_place(one: Target, other: Target) -> bool:
    """Whether two targets in a weight are the same rows and columns of it, read the same way round."""
    return (one.index, one.rows, one.cols, one.transposed) == (
        other.index,
        other.rows,
        other.cols,
        other.transposed,
    )


class _Binder:
    """Collects what :func:`bind` finds."""

    def __init__(self, adapter: Adapter, spelling: Spelling, flat: Mapping[str, str]) -> None:
        self.adapter = adapter
        self.spelling = spelling
        self.flat = flat  # paths in the base, of names that have no dots left
        self.base = spelling.base
        self.experts = ExpertPlaces(adapter.name, adapter.config.raw, spelling.base)
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
        require_own_rank(self.adapter.name, name, module)
        path = self.flat.get(name) or self.spelling(bare(name))
        if not module.changes_weight and f"{path}.bias" in self.base.disk:
            self.bound.append(name)
            self._bias(name, path, module)
            return
        targets = list(self._targets(name, path, module)) if self.base.holds(path) else []
        if not targets:
            self.unmatched.extend(ref.name for ref in module.tensors.values())
            return
        self.bound.append(name)
        for target in targets:
            self._add(Term(name, module, target))
        self._bias(name, path, module)

    def _add(self, term: Term) -> None:
        _join(self.adapter.name, self.terms, term)

    def _bias(self, name: str, path: str, module: Module) -> None:
        bias = f"{path}.bias"
        if bias in self.base.disk and module.changes_bias:
            self._add(Term(name, module, Target(self.base.disk[bias]), "bias"))
        elif module.changes_bias and module.kind != "ia3":
            word = " (lora_bias)" if "up_bias" in module.tensors else ""
            raise Mismatch(
                f"{self.adapter.name}: {name} trains a bias{word}, and {path} has none in the base",
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
        elif expert := EXPERT.fullmatch(path):
            yield from self.experts.into_fused(name, expert, module)
        else:
            yield from self.experts.parameter(name, path, module)

    def _shape(self, memory: str) -> tuple[int, ...]:
        """Of a weight as the adapter saw it: with the vocabulary it brings along, where that was resized."""
        shape, resized = self.base.shape(memory), self.resized.get(memory, ())
        return resized if len(resized) == len(shape) and resized[1:] == shape[1:] else shape

    def _whole(self, name: str, weight: str, module: Module) -> Target:
        shape, disk = self._shape(weight), self.base.disk[weight]
        if module.options.get("embedding"):
            require_shape(name, module.shape[::-1], shape)
            return Target(disk, transposed=True)
        if module.by_feature:
            return self._along(name, weight, module)
        if len(shape) != 2 or len(module.shape) != 2 or module.kind in _AS_STORED:
            fits = flat_shape(module.shape) == flat_shape(shape) and module.shape[:1] == shape[:1]
            require_shape(name, shape if fits else module.shape, shape)
            return Target(disk)
        transposed = self._is_transposed(weight) if module.shape in {shape, shape[::-1]} else False
        require_shape(name, module.shape[::-1] if transposed else module.shape, shape)
        return Target(disk, transposed=transposed)

    def _along(self, name: str, weight: str, module: Module) -> Target:
        """The place of what scales or rotates features and knows no more than their number."""
        shape = self.base.shape(weight)
        fits = (module.fits_features(shape), len(shape) == 2 and module.fits_features(shape[::-1]))
        if not any(fits):
            raise ShapeMismatch(name, module.shape, shape)
        return Target(
            self.base.disk[weight], transposed=self._is_transposed(weight) if all(fits) else fits[1]
        )

    def _is_transposed(self, weight: str) -> bool:
        return self.base.stored_transposed(weight, self.adapter.config.raw.get("fan_in_fan_out"))

    def _memory(self, extra: Extra) -> str:
        owner, _, last = extra.target.rpartition(".")
        return f"{self.spelling(owner)}.{last}" if owner else last

    def extra(self, key: str, extra: Extra) -> None:
        memory = self._memory(extra)
        disk = self.base.disk.get(memory)
        if extra.role in {"training_only", "carried"}:
            self.ignored[key] = extra.reason
        elif extra.role == "token_rows" and disk is not None:
            self._token_rows(key, extra, disk)
        elif extra.role == "base_copy":
            self.copies[disk or memory] = extra.tensor
        elif extra.role == "replacement":
            name = disk or memory  # a tensor the base does not have: a new head
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
