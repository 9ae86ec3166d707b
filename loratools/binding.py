"""Which weights of a base an adapter touches, and which part of which update lands where.

Names are resolved against the base (:mod:`loratools.spelling`); orientation is decided by the shapes of its weights
and biases, never by what a configuration claims.
"""

from __future__ import annotations

import difflib
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

from loratools.adapter import SAVED_EMBEDDING, flat_shape, require_own_rank, require_shape
from loratools.errors import Mismatch, ShapeMismatch, UnmatchedModules
from loratools.experts import ExpertPlaces
from loratools.spelling import EXPERT, Spelling, bare, choose_spelling
from loratools.targets import Binding, Target, Term

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratools.adapter import Adapter, Extra, Module
    from loratools.models import BaseModel
    from loratools.tensors.base import TensorRef

__all__ = ["bind"]


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
    paths = [bare(name) for name in adapter.modules] or [
        e.target.rpartition(".")[0] for e in adapter.extras.values()
    ]
    besides = [e.target.rpartition(".")[0] for e in adapter.extras.values() if e.role != "unclaimed"]
    spelling = choose_spelling(adapter, base, paths, besides)
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

    def __init__(self, adapter: Adapter, spelling: Spelling) -> None:
        self.adapter = adapter
        self.spelling = spelling
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
        path = self.spelling(bare(name))
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
        if module.kind == "ia3":
            return self._scaled(name, weight, module)
        if len(shape) > 2 or module.kind in {"loha", "lokr"}:
            fits = flat_shape(module.shape) == flat_shape(shape) and module.shape[:1] == shape[:1]
            require_shape(name, shape if fits else module.shape, shape)
            return Target(disk)
        transposed = self._is_transposed(weight) if module.shape in {shape, shape[::-1]} else False
        require_shape(name, module.shape[::-1] if transposed else module.shape, shape)
        return Target(disk, transposed=transposed)

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
        transposed = self._is_transposed(weight) if all(fits) else fits[1]
        return Target(self.base.disk[weight], transposed=transposed)

    def _is_transposed(self, weight: str) -> bool:
        return self.base.stored_transposed(weight, self.adapter.config.raw.get("fan_in_fan_out"))

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
