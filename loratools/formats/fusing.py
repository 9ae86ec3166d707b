"""Between the modules of diffusers and the weights of original checkpoints, with no more rank than needed.

Several modules become one of the fused weight: where all have the same ``down``, as they have after a fused file was
split, it is that file's module again; elsewhere ``up`` is block-diagonal and the ranks add up. The other way a fused
module is split by rows of ``up``, and what of the rank a part does not use is left out, so that what was fused comes
back as it was. Values are moved, never computed, unless parts are scaled differently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from loratools.adapter import Module, flat_shape
from loratools.canonical import canonical, places, split
from loratools.errors import LoratoolsError, Unsupported
from loratools.formats.pairs import alike, folded
from loratools.tensors.views import joined, picked, placed, reshaped, transposed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from loratools.adapter import Adapter
    from loratools.architectures.base import Architecture, Place, Weight
    from loratools.canonical import Canonical
    from loratools.dtypes import Array
    from loratools.tensors.base import TensorRef

__all__ = [
    "Fused",
    "Kept",
    "Split",
    "as_lora",
    "fitted",
    "fuse",
    "fused",
    "native_name",
    "require_factors",
    "split_adapter",
    "split_kept",
]

_PROBE = 2048  # elements compared before the whole of two factors is
_LORA = {"lora", "dora"}
_LOHA = {"first_a": "first_b", "second_a": "second_b"}
_TOLD = {"config_rank", "magnitude_axis"}  # options that do not change what two factors mean
_FACTORS = {"lora": {"up": "down"}, "loha": _LOHA}
# Roles that hold one value, or one row, for each output feature, and what stands for a part that is not there.
_ROWS = {"full": ("diff", "diff_bias"), "norm": ("diff", "diff_bias"), "set": ("value",)}
# What kinds do that add nothing to a weight that is known without it.
_DOES = {
    "ia3": "it multiplies the weight",
    "glora": "a part of it multiplies the weight",
    "oft": "it rotates the weight",
    "oftv2": "it rotates the weight",
    "boft": "it rotates the weight",
    "set": "it replaces the weight",
}


@dataclass(frozen=True, slots=True)
class Fused:
    """A module under the name it has in the original checkpoint.

    Attributes:
        component: of the pipeline.
        name: of the module, without its component's prefix.
        module: as it is written.
        parts: the canonical names of what it was made of.
    """

    component: str
    name: str
    module: Module
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """A module of a whole weight of the original checkpoint, not taken apart.

    Attributes:
        place: where.
        module: as it was read.
        origin: its name in the file.
    """

    place: Place
    module: Module
    origin: str


@dataclass(frozen=True, slots=True)
class Split:
    """An adapter by the names of its architecture.

    Attributes:
        modules: by canonical name.
        places: of each of them.
        whole: modules of original weights that stay whole, by component and native name: those that were to, and those
            that cannot be taken apart.
        failed: modules that would have to be taken apart and cannot be, by their name in the file, with the reason.
        unmatched: names in the file that the architecture does not have.
    """

    modules: Mapping[str, Module]
    places: Mapping[str, Place]
    whole: Mapping[str, Kept]
    failed: Mapping[str, str]
    unmatched: tuple[str, ...]


# --- fused to split ------------------------------------------------------------------------------------------


def split_adapter(
    adapter: Adapter, architecture: Architecture, *, keep: Callable[[Place], bool] | None = None
) -> Split:
    """An adapter under canonical names, each part of a fused weight at the rank that it uses.

    Args:
        adapter: any.
        architecture: its own.
        keep: says of a module of an original weight whether it is wanted as it is, and not in parts.

    Raises:
        UnmatchedModules: not one of its modules is in the architecture.
        ShapeMismatch: a module does not fit its weight.
        Mismatch: two modules change the same part.
    """
    found = places(adapter, architecture)
    if adapter.modules and not found:
        canonical(adapter, architecture)  # which says so
    kept, failed = _kept(adapter, found, keep)
    rest = {
        name: module for name, module in adapter.modules.items() if name not in kept and name not in failed
    }
    known = {name: module for name, module in rest.items() if name in found}
    canon = canonical(replace(adapter, modules=known), architecture) if known else None
    modules: dict[str, Module] = {}
    if canon is not None:
        for group in _by_origin(canon).values():
            modules |= group if len(group) == 1 else _slim(group)
        modules = {name: modules[name] for name in canon.adapter.modules if name in modules}
    whole = {
        f"{found[name].weight.component}.{found[name].weight.native}": Kept(
            found[name], adapter.modules[name], name
        )
        for name in kept
    }
    unmatched = tuple(name for name in rest if name not in found)
    located = {} if canon is None else {name: canon.places[name] for name in modules}
    return Split(modules, located, whole, failed, unmatched)


def _kept(
    adapter: Adapter, found: Mapping[str, Place], keep: Callable[[Place], bool] | None
) -> tuple[set[str], dict[str, str]]:
    """The modules that stay whole; and those that would have to be split and cannot be, with the reason."""
    kept: set[str] = set()
    failed: dict[str, str] = {}
    for name, place in found.items():
        native = place.native and place.whole
        if native and keep is not None and keep(place):
            kept.add(name)
            continue
        if len(place.parts) == 1 and not place.weight.swapped:
            continue
        try:
            split(name, adapter.modules[name], place)
        except Unsupported as error:
            if native:
                kept.add(name)
            else:
                failed[name] = str(error)
    return kept, failed


def _by_origin(found: Canonical) -> dict[str, dict[str, Module]]:
    groups: dict[str, dict[str, Module]] = {}
    for name, module in found.adapter.modules.items():
        groups.setdefault(found.origin[name], {})[name] = module
    return groups


def _slim(group: Mapping[str, Module]) -> dict[str, Module]:
    """The parts of one fused module without the rank they do not use; a part that uses none is left out."""
    used = {name: _used_rank(module) for name, module in group.items()}
    if all(kept is None or all(kept) for kept in used.values()):
        return dict(group)
    slim = {}
    for name, module in group.items():
        kept = used[name]
        if kept is None or any(kept):
            slim[name] = module if kept is None or all(kept) else _with_rank(module, kept)
    return slim or dict(group)  # one that adds nothing at all is kept as it is


def _used_rank(module: Module) -> list[bool] | None:
    """Which columns of ``up`` are not all zero; None where other tensors of the module count them too."""
    pairs = _FACTORS.get(module.kind)
    known = {"alpha", *(pairs or ()), *(pairs or {}).values()}
    if pairs is None or set(module.tensors) - known or module.options:
        return None
    ups = [module.tensors[role] for role in pairs]
    if len({prod(up.shape[1:]) for up in ups}) > 1:
        return None
    columns = [_words(up).reshape(up.shape[0], -1).any(axis=0) for up in ups]
    return [any(map(bool, values)) for values in zip(*columns, strict=True)]


def _with_rank(module: Module, kept: Sequence[bool]) -> Module:
    runs, rank = _runs(kept), sum(kept)
    tensors = {role: ref for role, ref in module.tensors.items() if role != "alpha"}
    for role, other in _FACTORS[module.kind].items():
        up = tensors[role]
        flat = reshaped(up, (up.shape[0], prod(up.shape[1:])))
        columns = transposed(picked(transposed(flat), runs))
        tensors[role] = reshaped(columns, (up.shape[0], rank, *up.shape[2:]))
        tensors[other] = picked(tensors[other], runs)
    return replace(module, tensors=tensors, rank=rank, alpha=_alpha(module.scaling, rank))


def _runs(kept: Sequence[bool]) -> list[tuple[int, int]]:
    """Where it is true, as ranges.

    >>> _runs([True, True, False, True])
    [(0, 2), (3, 4)]
    """
    runs: list[tuple[int, int]] = []
    for index, keep in enumerate(kept):
        if keep and runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        elif keep:
            runs.append((index, index + 1))
    return runs


def split_kept(name: str, kept: Kept) -> dict[str, Module]:
    """The parts of a module that cannot be taken apart as it is, as plain LoRA.

    Raises:
        Unsupported: it has no such form.
    """
    return _slim(split(name, as_lora(name, kept.module), kept.place))


# --- split to fused ------------------------------------------------------------------------------------------


def fused(modules: Mapping[str, Module], architecture: Architecture) -> tuple[list[Fused], dict[str, str]]:
    """Modules under canonical names as the original checkpoint has them.

    Returns:
        Them, in their order; and what cannot be fused, by canonical name, with the reason.
    """
    groups: dict[tuple[str, str], dict[int, str]] = {}
    weights: dict[tuple[str, str], Weight] = {}
    for name in modules:
        place = architecture.canonical.get(name)
        if place is not None:
            key = (place.weight.component, place.weight.native)
            weights[key] = place.weight
            groups.setdefault(key, {})[place.first] = name
    result: list[Fused] = []
    lost: dict[str, str] = {}
    for key, names in groups.items():
        weight = weights[key]
        try:
            module = fuse(weight, {index: modules[name] for index, name in names.items()})
        except LoratoolsError as error:
            lost |= {name: str(error) for name in names.values()}
            continue
        ordered = tuple(names[index] for index in sorted(names))
        result.append(Fused(weight.component, native_name(weight), module, ordered))
    return result, lost


def native_name(weight: Weight) -> str:
    """What adapters call a weight of the original code: its module; the tensor itself where that is no ``weight``."""
    return weight.native if weight.tensor == "weight" else weight.key


def fuse(weight: Weight, parts: Mapping[int, Module]) -> Module:
    """The modules of some parts of a weight as one module of it.

    Args:
        weight: what they are parts of.
        parts: by their index.

    Raises:
        Unsupported: their kind cannot be fused, or a part that it needs is not there.
    """
    if len(weight.parts) == 1:
        return _swap(weight, parts[0]) if weight.swapped else parts[0]
    kinds = {module.kind for module in parts.values()}
    kind = kinds.pop() if len(kinds) == 1 else ""
    module = None
    if kind == "lokr":
        module = _whole_lokr(weight, parts)
    elif kind == "loha":
        module = _fuse_loha(weight, parts)
    elif kind in _ROWS:
        module = _fuse_rows(weight, parts, kind)
    elif kind in _LORA and not any("mid" in part.tensors for part in parts.values()):
        module = _fuse_lora(weight, parts, kind)
    if module is None:
        plain = {index: as_lora(weight.parts[index].name, part) for index, part in parts.items()}
        if sum(part.rank or 0 for part in plain.values()) > min(flat_shape(weight.shape)):
            raise Unsupported(
                f"{weight.native}: its parts are {', '.join(sorted(kinds | {kind} - {''}))}, and fused they would "
                "take more rank than the weight has"
            )
        module = _fuse_lora(weight, plain, "lora")
    return _swap(weight, module) if weight.swapped else module


def _swap(weight: Weight, module: Module) -> Module:
    """A module with the halves of its rows exchanged."""
    rows = weight.parts[-1].stop
    runs = [(rows // 2, rows), (0, rows // 2)]
    roles = {"lora": ("up", "up_bias"), "loha": ("first_a", "second_a"), **_ROWS}.get(module.kind)
    if module.kind == "dora" and module.options.get("magnitude_axis", 0) == 0:
        roles = ("up", "up_bias", "magnitude")
    if roles is None or "first_core" in module.tensors:
        module, roles = as_lora(weight.native, module), ("up", "up_bias")
    tensors = dict(module.tensors)
    for role in roles:
        if role in tensors:
            ref = tensors[role]
            flat = (rows,) if role == "magnitude" else ref.shape
            tensors[role] = picked(reshaped(ref, flat), runs)
    return replace(module, tensors=tensors)


def _fuse_lora(weight: Weight, parts: Mapping[int, Module], kind: str) -> Module:
    if kind == "dora":
        _require_all(weight, parts, "DoRA")
        if any(part.options.get("magnitude_axis", 0) for part in parts.values()):
            raise Unsupported(f"{weight.native}: a DoRA by input features has no fused form")
    _require_plain(weight, parts)
    scaling, parts = _one_scaling(parts)
    parts = _one_type(parts, ("down", "up"))
    shape = _shape(weight, next(iter(parts.values())))
    downs = [parts[index].tensors["down"] for index in sorted(parts)]
    ups = [parts[index].tensors["up"] for index in sorted(parts)]
    starts = [weight.parts[index].start for index in sorted(parts)]
    tail = ups[0].shape[2:]
    if same(downs):
        down, rank = downs[0], downs[0].shape[0]
        corners = [(start, 0) for start in starts]
        whole = len(parts) == len(weight.parts)
        up = joined(ups) if whole else placed(ups, corners, (shape[0], rank, *tail))
    else:
        down, rank = joined(downs), sum(one.shape[0] for one in downs)
        columns = [sum(one.shape[0] for one in downs[:i]) for i in range(len(downs))]
        up = placed(ups, list(zip(starts, columns, strict=True)), (shape[0], rank, *tail))
    tensors = {"down": down, "up": up}
    for role in ("up_bias", "diff_bias"):
        if any(role in part.tensors for part in parts.values()):
            tensors[role] = _vector(weight, parts, role)
    if kind == "dora":
        flat = [parts[i].tensors["magnitude"] for i in sorted(parts)]
        tensors["magnitude"] = joined([reshaped(ref, (ref.spec.count,)) for ref in flat])
    first = parts[min(parts)]
    return Module(kind, tensors, rank, _alpha(scaling, rank), scaling, shape, first.options)


def _require_plain(weight: Weight, parts: Mapping[int, Module]) -> None:
    for index, part in parts.items():
        if part.options.keys() - {"magnitude_axis"}:
            raise Unsupported(
                f"{weight.parts[index].name}: {', '.join(sorted(part.options))} has no fused form",
                hint="loratools normalize makes it plain",
            )
        if part.scaling is None:
            raise Unsupported(
                f"{weight.parts[index].name}: nothing says how it is scaled", hint="pass --alpha"
            )


def _require_all(weight: Weight, parts: Mapping[int, Module], what: str) -> None:
    missing = [part.name for index, part in enumerate(weight.parts) if index not in parts]
    if missing:
        raise Unsupported(
            f"{weight.native}: {what} of a fused weight needs all its parts, and {missing[0]} is not there"
        )


def _one_scaling(parts: Mapping[int, Module]) -> tuple[float, dict[int, Module]]:
    """One scaling for all parts: theirs, or 1 with each one's own inside its ``up``."""
    scalings = {part.scaling for part in parts.values()}
    if len(scalings) == 1:
        return float(scalings.pop() or 0.0), dict(parts)
    made = {}
    for index, part in parts.items():
        tensors = {role: ref for role, ref in part.tensors.items() if role != "alpha"}
        for role in ("up", "up_bias"):
            if role in tensors:
                tensors[role] = folded(tensors[role], part.scaling or 0.0)
        made[index] = replace(part, tensors=tensors, scaling=1.0, alpha=None)
    return 1.0, made


def _one_type(parts: Mapping[int, Module], roles: Sequence[str]) -> dict[int, Module]:
    """The parts with all tensors of a role in one type."""
    found = dict(parts)
    for role in roles:
        refs = alike(part.tensors[role] for part in found.values())
        for (index, part), ref in zip(list(found.items()), refs, strict=True):
            if ref is not part.tensors[role]:
                found[index] = replace(part, tensors={**part.tensors, role: ref})
    return found


def _vector(weight: Weight, parts: Mapping[int, Module], role: str) -> TensorRef:
    """The rows of one role behind one another, zero where a part has none."""
    given = {index: part.tensors[role] for index, part in parts.items() if role in part.tensors}
    refs, corners = zip(
        *((ref, (weight.parts[index].start, 0)) for index, ref in sorted(given.items())), strict=True
    )
    if len(given) == len(weight.parts):
        return joined(refs)
    tail = refs[0].shape[1:]
    return placed(refs, corners, (weight.parts[-1].stop, *tail))


def _fuse_rows(weight: Weight, parts: Mapping[int, Module], kind: str) -> Module:
    if kind == "set":
        _require_all(weight, parts, "a replacement")
    first = parts[min(parts)]
    if len({part.scaling for part in parts.values()}) > 1:
        raise Unsupported(f"{weight.native}: its parts are scaled differently")
    roles = [role for role in _ROWS[kind] if any(role in part.tensors for part in parts.values())]
    tensors = {role: _vector(weight, parts, role) for role in roles}
    return replace(first, tensors=tensors, shape=_shape(weight, first))


def _fuse_loha(weight: Weight, parts: Mapping[int, Module]) -> Module | None:
    """Block by block in both products; None where that is not exact without computing."""
    first = parts[min(parts)]
    if any("first_core" in part.tensors or "magnitude" in part.tensors for part in parts.values()):
        return None
    if len({(part.scaling, part.tensors["first_b"].spec.dtype) for part in parts.values()}) > 1:
        return None
    order = sorted(parts)
    rights = {b: [parts[i].tensors[b] for i in order] for b in _LOHA.values()}
    shape = _shape(weight, first)
    once = all(same(refs) for refs in rights.values())
    tensors = {}
    rank = 0
    for a, b in _LOHA.items():
        lefts = [parts[i].tensors[a] for i in order]
        widths = [ref.shape[1] for ref in lefts]
        rank = widths[0] if once else sum(widths)
        columns = [0 if once else sum(widths[:i]) for i in range(len(widths))]
        corners = [(weight.parts[i].start, column) for i, column in zip(order, columns, strict=True)]
        tensors[a] = placed(lefts, corners, (shape[0], rank))
        tensors[b] = rights[b][0] if once else joined(rights[b])
    return Module("loha", tensors, rank, _alpha(first.scaling, rank), first.scaling, shape, first.options)


def _whole_lokr(weight: Weight, parts: Mapping[int, Module]) -> Module | None:
    """The LoKr that all parts are rows of; None where they are not."""
    first = parts[min(parts)]
    rows = [(weight.parts[i].start, weight.parts[i].stop) for i in range(len(weight.parts))]
    if len(parts) != len(rows) or [parts[i].options.get("rows") for i in sorted(parts)] != rows:
        return None
    if any(part.tensors != first.tensors or part.scaling != first.scaling for part in parts.values()):
        return None
    options = {key: value for key, value in first.options.items() if key != "rows"}
    return replace(first, shape=_shape(weight, first), options=options)


def _shape(weight: Weight, part: Module) -> tuple[int, ...]:
    return (weight.parts[-1].stop, *part.shape[1:])


def _alpha(scaling: float | None, rank: int) -> float | None:
    return None if scaling is None else scaling * rank


# --- the same module otherwise -------------------------------------------------------------------------------


def as_lora(name: str, module: Module) -> Module:
    """A module that adds a matrix as a plain LoRA with the same product, in float32; one that is plain, as it is.

    Raises:
        Unsupported: it is no plain sum, or would take more numbers than the matrix itself.
    """
    import numpy as np

    from loratools.deltas.algebra import core
    from loratools.matrices import bias_delta, lora_module, matrices

    if (
        module.kind == "lora"
        and not module.tensors.keys() & {"mid", "diag"}
        and module.options.keys() <= _TOLD
    ):
        return module
    require_factors(name, module)
    [factors] = matrices(module, name)
    if factors.up.shape[1] > min(factors.shape):
        factors = core(factors).truncate(min(factors.shape))
    if not factors.up.shape[1]:  # it adds nothing, and no format has modules of rank 0
        factors = replace(factors, up=np.zeros_like(factors.up, shape=(factors.shape[0], 1)),
                          down=np.zeros_like(factors.down, shape=(1, factors.shape[1])))  # fmt: skip
    return lora_module(module, [factors], prefix=name, bias=bias_delta(module))


def require_factors(name: str, module: Module) -> None:
    """Refuse a module that two factors cannot hold.

    Raises:
        Unsupported: with the reason, the same for all modules of its kind.
    """
    if module.kind in _DOES:
        raise Unsupported(f"{_DOES[module.kind]}: it has no form as two factors")
    if module.kind in _ROWS or not module.is_delta:
        raise Unsupported(f"{name} is {module.kind}, which has no form as two factors")


def fitted(module: Module, shape: tuple[int, ...]) -> Module:
    """A plain LoRA whose factors have as many dimensions as their weight: a 1x1 convolution is often stored without."""
    if module.kind not in _LORA or "mid" in module.tensors or len(shape) < 2:
        return module
    up, down = module.tensors["up"], module.tensors["down"]
    flat = prod(down.shape[1:])
    kernel = shape[2:]
    if len(down.shape) == len(shape) or 0 in shape or flat != prod(shape[1:]):
        return module
    wanted = {
        "down": reshaped(down, (down.shape[0], *shape[1:])),
        "up": reshaped(up, (*up.shape[:2], *(1 for _ in kernel))),
    }
    return replace(module, tensors={**module.tensors, **wanted}, shape=(module.shape[0], *shape[1:]))


def same(refs: Sequence[TensorRef]) -> bool:
    """Whether all hold the same bits: told by where they lie, by their beginnings, by their whole, in this order."""
    import numpy as np

    first = refs[0]
    for ref in refs[1:]:
        if ref.source is first.source and ref.name == first.name:
            continue
        if ref.spec != first.spec:
            return False
        probe = min(_PROBE, first.spec.count)
        for stop in (probe, first.spec.count):
            one, other = (r.source.read_bytes(r.name, 0, stop) for r in (first, ref))
            if not np.array_equal(one, other):
                return False
    return True


def _words(ref: TensorRef) -> Array:
    """A tensor's bits as integers of its width, without the sign: zero where a value is."""
    import numpy as np

    raw = ref.source.read_bytes(ref.name)
    width = ref.spec.dtype.bits // 8
    words: Array = raw.view(np.dtype(f"<u{width}"))
    unsigned: Array = words & words.dtype.type((1 << (8 * width - 1)) - 1)
    return unsigned
