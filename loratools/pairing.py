"""Which modules of several adapters are the same one.

Without a base the names must be equal once the known prefixes are stripped, and nothing is guessed. With a base two
modules are the same where they land in the same place of it, however either file spells its names. Adapters of a known
architecture are compared under its names, with fused modules taken apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from loratools.adapter import flat_shape, require_own_rank
from loratools.binding import bind, shared_layout, speaks_of_diffusion
from loratools.errors import Mismatch, ShapeMismatch, Unsupported
from loratools.naming import FUSED_EXPERTS
from loratools.spelling import bare, choose_spelling

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from loratools.adapter import Adapter, Extra, Module
    from loratools.architectures.base import Architecture
    from loratools.models import BaseModel
    from loratools.targets import Target

__all__ = ["PREFIXES", "Pairing", "Slots", "named_architecture", "pair", "require_same_shapes", "strip"]

# What wrappers put before a module's name: PEFT, DataParallel, torch.compile, the model inside its task's head.
PREFIXES = ("base_model.model.", "base_model.", "module.", "_orig_mod.", "model.")
_FIRST_NATURAL = (0, 19, 1)  # the PEFT that began to store experts' deltas (out, in)

T = TypeVar("T")
Slots = tuple[tuple[str, T] | None, ...]


@dataclass(frozen=True, slots=True)
class Pairing:
    """Modules and other tensors of several adapters, side by side.

    Attributes:
        modules: by a name they share, one slot for each adapter: its own name and the module, or None.
        extras: the same for the tensors that belong to no module.
        unplaced: for each adapter, its modules that are not in the base; matched by name as without one.
        architecture: whose names the modules have; empty where they have their own.
    """

    modules: Mapping[str, Slots[Module]]
    extras: Mapping[str, Slots[Extra]]
    unplaced: tuple[tuple[str, ...], ...] = field(default=())
    architecture: str = ""

    @property
    def common(self) -> tuple[str, ...]:
        """Modules that every adapter has."""
        return tuple(name for name, slots in self.modules.items() if None not in slots)

    def only_in(self, index: int) -> tuple[str, ...]:
        """Modules and then extras that this adapter has and no other one."""
        return tuple(
            name
            for slots_of in (self.modules, self.extras)
            for name, slots in slots_of.items()
            if slots[index] is not None and sum(slot is not None for slot in slots) == 1
        )


def pair(
    adapters: Sequence[Adapter], base: BaseModel | None = None, architecture: Architecture | None = None
) -> Pairing:
    """Match the modules of adapters; reads no values.

    >>> import numpy as np
    >>> import loratools as lt
    >>> factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    >>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
    >>> prefixed = {f"base_model.model.model.{key}": value for key, value in factors.items()}
    >>> pairing = pair([lt.load(factors, config=config), lt.load(prefixed, config=config)])
    >>> [(name, [slot[0] for slot in slots]) for name, slots in pairing.modules.items()]
    [('fc', ['fc', 'model.fc'])]

    Args:
        adapters: whose modules; their order is that of the slots.
        base: a model they belong to, where names alone do not match them.
        architecture: theirs; by default it is looked for where their names are those of diffusion models and do not
            match.

    Returns:
        Every module and extra once, in the order of the first adapter that has it. Names are those of the first
        adapter: one that lacks a module lends its prefix to the name. An expert's parameter stands behind the module
        that holds it. That nothing is in common is no error here; see :attr:`Pairing.common`.

    Raises:
        Mismatch: two modules of one adapter could be the same module of another; or a rank in a file is not that of
            its configuration.
        UnmatchedModules: an adapter has no module in the base, or fits it in two ways.
        ShapeMismatch: a module does not fit the base, or the architecture.
    """
    if base is not None:
        return _of_base(adapters, base, architecture)
    if architecture is not None:
        return _by_architecture(adapters, architecture)
    plain = _by_name(adapters)
    if len(plain.common) == len(plain.modules) or not any(speaks_of_diffusion(one) for one in adapters):
        return plain
    known = _shared_architecture(adapters)
    if known is None:
        return plain
    try:
        found = _by_architecture(adapters, known)
    except (Mismatch, Unsupported):
        return plain
    return found if _matches(found) > _matches(plain) else plain


def _matches(pairing: Pairing) -> float:
    """The share of modules that more than one adapter has."""
    shared = sum(sum(slot is not None for slot in slots) > 1 for slots in pairing.modules.values())
    return shared / max(1, len(pairing.modules))


def _shared_architecture(adapters: Sequence[Adapter]) -> Architecture | None:
    """The family every adapter's names and shapes speak of; the likeliest of several."""
    from loratools.canonical import candidates

    found = [candidates(adapter) for adapter in adapters]
    common = [one for one in found[0] if all(one in others for others in found[1:])]
    if not common:
        return None
    from loratools.architectures.base import architecture

    return architecture(common[0])


def _by_architecture(
    adapters: Sequence[Adapter], architecture: Architecture, *, strict: bool = True
) -> Pairing:
    """Modules by canonical name; those that the architecture does not have keep theirs."""
    from loratools.canonical import canonical

    found = [canonical(adapter, architecture, strict=strict) for adapter in adapters]
    pairing = _by_name([one.adapter for one in found])
    return replace(pairing, unplaced=tuple(one.unmatched for one in found), architecture=architecture.name)


def _of_base(adapters: Sequence[Adapter], base: BaseModel, architecture: Architecture | None) -> Pairing:
    layouts = [shared_layout(adapter, base, architecture) for adapter in adapters]
    known = {layout.architecture.name: layout.architecture for layout in layouts if layout is not None}
    if not known:
        return _by_place(adapters, base)
    if len(known) > 1:
        raise Mismatch(
            f"{' and '.join(adapter.name for adapter in adapters)} are not for the same kind of model "
            f"({', '.join(one.title for one in known.values())})"
        )
    (mine,) = known.values()
    bindings = [bind(adapter, base, architecture=mine) for adapter in adapters]
    try:
        pairing = _by_architecture(adapters, mine, strict=False)
    except Unsupported:  # what cannot be taken apart is matched where it lands, if all have it whole
        return _by_place(adapters, base, mine)
    unplaced = tuple(
        tuple(name for name in adapter.modules if name not in binding.bound)
        for adapter, binding in zip(adapters, bindings, strict=True)
    )
    return replace(pairing, unplaced=unplaced)


def _by_name(adapters: Sequence[Adapter]) -> Pairing:
    for adapter in adapters:
        for name, module in adapter.modules.items():
            require_own_rank(adapter.name, name, module)
    named = [_module_names(adapter) for adapter in adapters]
    modules = _align([a.name for a in adapters], named)
    extras = _align([a.name for a in adapters], [_extra_names(adapter) for adapter in adapters])
    _require_one_orientation(adapters, modules)
    return Pairing(modules, extras, ((),) * len(adapters))


def named_architecture(name: str | None) -> Architecture | None:
    """An architecture by its name, where one is given.

    Raises:
        Unsupported: it is not known.
    """
    if name is None:
        return None
    from loratools.architectures.base import architecture

    return architecture(name)


def require_same_shapes(pairing: Pairing) -> None:
    """Refuse modules that are matched but cannot be added: deltas of different shapes.

    Raises:
        ShapeMismatch: names the module.
    """
    for name, slots in pairing.modules.items():
        shapes = [slot[1].shape for slot in slots if slot is not None]
        for shape in shapes[1:]:
            if flat_shape(shape) != flat_shape(shapes[0]):
                raise ShapeMismatch(
                    name, shape, shapes[0], hint="these adapters were not trained on the same base model"
                )


def strip(name: str) -> str:
    """A name without the known prefixes, however many stand there.

    >>> strip("base_model.model.model.layers.0.q_proj"), strip("model")
    ('layers.0.q_proj', 'model')
    """
    while found := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(found)
    return name


def _module_names(adapter: Adapter) -> dict[str, tuple[str, Module]]:
    """By full name: an expert's parameter by the parameter's name, everything else as the file has it."""
    return {_full_name(adapter, name): (name, module) for name, module in adapter.modules.items()}


def _full_name(adapter: Adapter, name: str) -> str:
    """A module's name, with the parameter behind it where ``target_parameters`` says which one it adapts.

    PEFT wraps a module once for each parameter, the one its module defines first innermost; so the file's names say
    only how deep a wrapper lies.
    """
    path = bare(name)
    listed = [entry.rpartition(".") for entry in adapter.config.raw.get("target_parameters") or ()]
    mine = [last for owner, _, last in listed if path == owner or path.endswith("." + owner)]
    if not mine:
        return name
    order = {last: i for i, last in enumerate(FUSED_EXPERTS)}
    mine = sorted(dict.fromkeys(mine), key=lambda last: (order.get(last, len(order)), last))
    depth = len(mine) - 1 - name.count(".base_layer")
    return f"{path}.{mine[depth]}" if 0 <= depth < len(mine) else name


def _extra_names(adapter: Adapter) -> dict[str, tuple[str, Extra]]:
    """By what they stand for: the tensor replaced, where it is one; the key, where nothing tells more."""
    names: dict[str, tuple[str, Extra]] = {}
    for key, extra in adapter.extras.items():
        name = key
        if extra.role in {"replacement", "base_copy"}:
            name = extra.target
        elif extra.role == "token_rows":
            name = f"{extra.target.removesuffix('.weight')}.trainable_tokens_delta"
        names[key if name in names else name] = (key, extra)
    return names


def _align(labels: Sequence[str], named: Sequence[Mapping[str, tuple[str, T]]]) -> dict[str, Slots[T]]:
    """Slots by canonical name, from each adapter's names.

    Raises:
        Mismatch: the prefixes of an adapter's names tell its own modules apart, and those of another do not match.
    """
    groups: dict[str, list[list[str]]] = {}
    for index, names in enumerate(named):
        for name in names:
            groups.setdefault(strip(name), [[] for _ in named])[index].append(name)
    prefixes = _prefixes(groups)
    aligned: dict[str, Slots[T]] = {}
    for stripped, candidates in groups.items():
        if all(len(names) <= 1 for names in candidates):
            full = _canonical(stripped, candidates, prefixes)
            aligned[full] = tuple(
                named[index][names[0]] if names else None for index, names in enumerate(candidates)
            )
            continue
        longest: list[str] = max(candidates, key=len)
        most = set(longest)
        strange = next((i for i, names in enumerate(candidates) if not most.issuperset(names)), None)
        if strange is not None:
            raise _ambiguous(labels, candidates, strange)
        for name in dict.fromkeys(n for names in candidates for n in names):  # exact names match, and do tell
            aligned[name] = tuple(mine.get(name) for mine in named)
    return aligned


def _ambiguous(labels: Sequence[str], candidates: list[list[str]], strange: int) -> Mismatch:
    most = max(range(len(candidates)), key=lambda index: len(candidates[index]))
    others = [name for name in candidates[strange] if name not in candidates[most]]
    return Mismatch(
        f"{labels[strange]}: {others[0]} could be {' or '.join(candidates[most])} of {labels[most]}",
        hint="pass --base, so that the base model decides",
    )


def _prefixes(groups: Mapping[str, list[list[str]]]) -> dict[tuple[int, str], str]:
    """What stands in the first adapter's names where another one has a certain prefix, from modules both have."""
    seen: dict[tuple[int, str], set[str]] = {}
    for stripped, candidates in groups.items():
        if len(candidates[0]) != 1:
            continue
        first = candidates[0][0].removesuffix(stripped)
        for index, names in enumerate(candidates[1:], 1):
            for name in names:
                seen.setdefault((index, name.removesuffix(stripped)), set()).add(first)
    return {key: found.pop() for key, found in seen.items() if len(found) == 1}


def _canonical(stripped: str, candidates: list[list[str]], prefixes: Mapping[tuple[int, str], str]) -> str:
    index = next(i for i, names in enumerate(candidates) if names)
    own = candidates[index][0]
    if index == 0:
        return own
    prefix = own.removesuffix(stripped)
    return prefixes.get((index, prefix), prefix) + stripped


def _require_one_orientation(adapters: Sequence[Adapter], modules: Mapping[str, Slots[Module]]) -> None:
    """Refuse square experts of which one may be the other's transpose: PEFT changed its mind, and no shape tells.

    Raises:
        Mismatch: names the module.
    """
    old = [_transposes_experts(adapter) for adapter in adapters]
    for name, slots in modules.items():
        square = {
            old[index]
            for index, slot in enumerate(slots)
            if slot is not None and "experts" in slot[1].options and len(set(slot[1].shape)) == 1
        }
        if len(square) > 1:
            raise Mismatch(
                f"{name}: square experts saved by PEFT before 0.19.1 and since, so one may be the other's transpose",
                hint="pass --base, whose tensors tell which way each is stored",
            )


def _transposes_experts(adapter: Adapter) -> bool | None:
    version = str(adapter.config.raw.get("peft_version") or "")
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    return numbers < _FIRST_NATURAL if numbers else None


# A place in a base: the tensor, and which part of which expert. Whether it is stored transposed is part of it only
# for whole tensors, where a tied embedding and head are one tensor and two modules.
_Place = tuple["Target", ...]


@dataclass(frozen=True, slots=True)
class _Placed:
    """An adapter's modules by their place, and what each is called in the base."""

    adapter: Adapter
    at: Mapping[_Place, str]
    spelled: Mapping[str, str]
    unplaced: tuple[str, ...]
    extras: Mapping[str, tuple[str, Extra]]


def _by_place(
    adapters: Sequence[Adapter], base: BaseModel, architecture: Architecture | None = None
) -> Pairing:
    placed = [_place(adapter, base, architecture) for adapter in adapters]
    _require_same_pieces(placed)
    modules: dict[str, Slots[Module]] = {}
    for place in dict.fromkeys(place for one in placed for place in one.at):
        slots = tuple(
            None if (name := one.at.get(place)) is None else (name, one.adapter.modules[name])
            for one in placed
        )
        called = next(one.spelled[one.at[place]] for one in placed if place in one.at)
        modules[called if called not in modules else f"{called} ({place[0].weight})"] = slots
    rest = _align(
        [one.adapter.name for one in placed],
        [{one.spelled[name]: (name, one.adapter.modules[name]) for name in one.unplaced} for one in placed],
    )
    extras = _align([one.adapter.name for one in placed], [one.extras for one in placed])
    return Pairing({**modules, **rest}, extras, tuple(one.unplaced for one in placed))


def _place(adapter: Adapter, base: BaseModel, architecture: Architecture | None) -> _Placed:
    binding = bind(adapter, base, architecture=architecture)
    targets: dict[str, list[Target]] = {}
    for terms in binding.terms.values():
        for term in terms:
            if term.part == "weight":
                targets.setdefault(term.name, []).append(term.target)
    at: dict[_Place, str] = {}
    for name, found in targets.items():
        if (twin := at.setdefault(tuple(sorted(found, key=_order)), name)) != name:
            raise Mismatch(f"{adapter.name}: {twin} and {name} are one weight in {base.name}, adapted twice")
    if architecture is not None:
        return _placed_as_named(adapter, at, targets)
    paths = [bare(name) for name in adapter.modules] or [_owner(e) for e in adapter.extras.values()]
    besides = [
        _owner(extra) for extra in adapter.extras.values() if extra.role not in {"unclaimed", "carried"}
    ]
    spelling = choose_spelling(adapter, base, paths, besides)

    def spelled(name: str) -> str:
        owner, _, last = name.rpartition(".")
        return f"{spelling(owner)}.{last}" if owner else last

    calls = {
        name: spelling(full) if full == name else spelled(full)
        for full, (name, _) in _module_names(adapter).items()
    }
    return _Placed(
        adapter=adapter,
        at=at,
        spelled=calls,
        unplaced=tuple(name for name in adapter.modules if name not in targets),
        extras={
            key if name == key else spelled(name): (key, extra)
            for name, (key, extra) in _extra_names(adapter).items()
        },
    )


def _placed_as_named(
    adapter: Adapter, at: Mapping[_Place, str], targets: Mapping[str, list[Target]]
) -> _Placed:
    """Modules that are called in the result what their file calls them."""
    unplaced = tuple(name for name in adapter.modules if name not in targets)
    return _Placed(adapter, at, {name: name for name in adapter.modules}, unplaced, _extra_names(adapter))


def _owner(extra: Extra) -> str:
    return extra.target.rpartition(".")[0]


def _order(target: Target) -> tuple[str, int, int]:
    start = target.rows.start if target.rows else target.cols.start if target.cols else 0
    return target.weight, -1 if target.index is None else target.index, start


def _require_same_pieces(placed: Sequence[_Placed]) -> None:
    """Refuse modules that share a part of their place: one adapter packs what another keeps apart.

    Raises:
        Mismatch: names two such modules.
    """
    owner: dict[tuple[str, int | None], list[tuple[_Placed, _Place, Target]]] = {}
    for one in placed:
        for place in one.at:
            for target in place:
                owner.setdefault((target.weight, target.index), []).append((one, place, target))
    for (weight, _), entries in owner.items():
        for (one, place, target), (other, there, theirs) in _pairs(entries):
            # A tied embedding and head: one tensor, adapted through two modules.
            tied = len(place) == len(there) == 1 and target.transposed != theirs.transposed
            tied = tied and target.index is None and target.delta_index is None
            if one is other or place == there or tied or not _overlap(target, theirs):
                continue
            raise Mismatch(
                f"{one.adapter.name}: {one.at[place]} and {other.adapter.name}: {other.at[there]} both change {weight} "
                "and cover different parts, or the same ones stored the other way round",
                hint="merge each into the base and compare or extract from the checkpoints",
            )


def _pairs(entries: Sequence[T]) -> Iterator[tuple[T, T]]:
    return ((a, b) for i, a in enumerate(entries) for b in entries[i + 1 :])


def _overlap(one: Target, other: Target) -> bool:
    for mine, theirs in ((one.rows, other.rows), (one.cols, other.cols)):
        if mine is not None and theirs is not None and not _meet(mine.slice, theirs.slice):
            return False
    return True


def _meet(one: slice, other: slice) -> bool:
    spans: Iterable[range] = (range(s.start, s.stop, s.step) for s in (one, other))
    first, second = spans
    return not set(first).isdisjoint(second)
