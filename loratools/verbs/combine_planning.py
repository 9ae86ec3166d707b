"""What ``combine`` combines with what: adapters, weights and modules, what it refuses and what it warns of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, flat_shape
from loratools.errors import Mismatch, Unsupported
from loratools.formats.opening import open_adapter
from loratools.matrices import require_delta
from loratools.pairing import strip
from loratools.refs import local_path
from loratools.verbs.combine_shapes import hides_kernel, stored_rank
from loratools.verbs.combine_work import Item
from loratools.verbs.saving import input_paths, widest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loratools.adapter import Module
    from loratools.block_weights import BlockWeights
    from loratools.models import BaseModel
    from loratools.pairing import Pairing
    from loratools.verbs.combine_report import CombinedExtra

__all__ = [
    "Ref",
    "block_factors",
    "find_warnings",
    "list_inputs",
    "list_items",
    "open_adapters",
    "raised_warnings",
    "require_apart",
    "require_deltas",
    "require_rank",
]

Ref = str | os.PathLike[str]


def open_adapters(
    adapters: Ref | Adapter | Sequence[Ref | Adapter], *, allow_pickle: bool, blockwise: bool
) -> tuple[Adapter, ...]:
    """Open each that is not open yet.

    Raises:
        Unsupported: there is none, or one is not a plain sum.
    """
    several = [adapters] if isinstance(adapters, (str, os.PathLike, Adapter)) else list(adapters)
    if not several:
        raise Unsupported("there is nothing to combine", hint="name one adapter or more")
    opened = tuple(
        open_adapter(one, allow_pickle=allow_pickle, blockwise_experts=blockwise)
        if isinstance(one, (str, os.PathLike))
        else one
        for one in several
    )
    for adapter in opened:
        adapter.require_computable()
    return opened


def require_rank(rank: int | None) -> None:
    """Refuse a rank that leaves nothing."""
    if rank is not None and rank < 1:
        raise Unsupported(f"rank {rank} leaves nothing", hint="a rank is 1 or more")


def list_inputs(adapters: Sequence[Adapter], base: Ref | Mapping[str, Any] | None) -> list[Path]:
    """What an output must not touch."""
    found = [path for adapter in adapters for path in input_paths(adapter)]
    return found if base is None or isinstance(base, Mapping) else [*found, local_path(base)]


def require_deltas(adapters: tuple[Adapter, ...], pairing: Pairing) -> None:
    """Refuse a module that is more than an added delta."""
    for slots in pairing.modules.values():
        for adapter, slot in zip(adapters, slots, strict=True):
            if slot is not None:
                require_delta(f"{adapter.name}: {slot[0]}", slot[1])


def list_items(
    adapters: tuple[Adapter, ...],
    pairing: Pairing,
    weights: tuple[float, ...],
    rank: int | None,
    base: BaseModel | None,
    by_block: Sequence[Mapping[str, float]] = (),
) -> tuple[Item, ...]:
    """The modules of the result, each with the adapters' own and their weights.

    Args:
        adapters: all of them.
        pairing: of their modules.
        weights: of the adapters.
        rank: of the result, if one is asked for.
        base: the model they belong to, if it is at hand.
        by_block: for each adapter, what its modules are multiplied by besides; empty for nothing.

    Raises:
        Mismatch: a module has another number of experts in another adapter, or is an embedding in one only.
        Unsupported: there are none.
    """
    double = widest(adapters) == "F64"
    biased = _is_biased(pairing)
    items = []
    for name, slots in pairing.modules.items():
        having = [(task, slot) for task, slot in enumerate(slots) if slot is not None]
        modules = tuple(slot for _, slot in having)
        _require_experts(name, [module for _, module in modules])
        tasks = tuple(task for task, _ in having)
        factors = tuple(
            weights[task] * (by_block[task].get(name, 1.0) if by_block else 1.0) for task in tasks
        )
        kernel = _kernel(name, modules[0][1], base)
        zeros = biased and _takes_bias(modules[0][1])
        items.append(Item(name, modules, tasks, factors, rank, double, kernel, zeros))
    if not items:
        raise Unsupported(
            f"{adapters[0].name} has no modules; there is nothing to combine",
            hint="loratools inspect says what it holds",
        )
    return tuple(items)


def block_factors(
    adapters: tuple[Adapter, ...], pairing: Pairing, given: tuple[BlockWeights, ...]
) -> list[dict[str, float]]:
    """For each adapter, what the modules of the result are multiplied by, by block weights.

    Raises:
        Unsupported: they mean nothing for these modules.
    """
    if not given:
        return []
    from loratools.canonical import candidates

    family = pairing.architecture or next(iter(candidates(adapters[0])), "")
    return [
        one.factors([name for name, slots in pairing.modules.items() if slots[task] is not None], family)
        for task, one in enumerate(given)
    ]


def _is_biased(pairing: Pairing) -> bool:
    """Whether any module of any adapter adds to a bias: the field ``lora_bias`` then holds for all of the result."""
    return any("up_bias" in slot[1].tensors for slots in pairing.modules.values() for slot in slots if slot)


def _takes_bias(module: Module) -> bool:
    return not {"embedding", "experts"} & module.options.keys()


def _kernel(name: str, module: Module, base: BaseModel | None) -> tuple[int, ...]:
    """A convolution's kernel, from the base: AdaLoRA, LoHa and LoKr may store its factors flat."""
    spec = None if base is None else base.source.specs.get(f"{name}.weight")
    if spec is None or "experts" in module.options or flat_shape(spec.shape) != flat_shape(module.shape):
        return ()
    return spec.shape[2:]


def _require_experts(name: str, modules: list[Module]) -> None:
    counts = {module.options.get("experts", 1) for module in modules}
    if len(counts) > 1:
        raise Mismatch(f"{name}: the adapters have {' and '.join(map(str, sorted(counts)))} experts")
    kinds = {bool(module.options.get("embedding")) for module in modules}
    if len(kinds) > 1:
        raise Mismatch(f"{name}: one adapter has it as an embedding and another one does not")


def require_apart(adapters: tuple[Adapter, ...], pairing: Pairing) -> None:
    """Refuse a weight that one adapter adds to and another one replaces, all of it or some rows.

    The order would matter; and PEFT cannot wrap one embedding for both.
    """
    owners = {strip(name): name for name in pairing.modules} | {name: name for name in pairing.modules}
    for name, slots in pairing.extras.items():
        for index, slot in enumerate(slots):
            if slot is None or slot[1].role not in {"replacement", "token_rows"}:
                continue
            rows = slot[1].role == "token_rows"
            owner = name.removesuffix(".trainable_tokens_delta" if rows else ".weight")
            module = pairing.modules.get(owners.get(owner, owners.get(strip(owner), "")))
            if owner == name or module is None or (module[index] is not None and not rows):
                continue
            other = next(task for task, one in enumerate(module) if one is not None)
            what = f"token rows of {owner}" if rows else name
            raise Mismatch(
                f"{adapters[index].name} replaces {what}, to which {adapters[other].name} adds a delta",
                hint="merge them into the base one after the other",
            )


def find_warnings(
    adapters: tuple[Adapter, ...],
    pairing: Pairing,
    extras: tuple[CombinedExtra, ...],
    items: Sequence[Item],
    base: BaseModel | None,
) -> tuple[str, ...]:
    """What a careful user should read: the adapters' own warnings, then those of their combination."""
    found = [f"{adapter.name}: {warning}" for adapter in adapters for warning in adapter.warnings]
    for adapter, strange in zip(adapters, pairing.unplaced, strict=True):
        if strange:
            rest = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            found.append(f"{adapter.name}: {strange[0]}{rest} not found in the base; matched by name")
    bases = {adapter.config.base_model for adapter in adapters if adapter.config.base_model}
    if len(bases) > 1:
        found.append(f"the adapters name different base models: {', '.join(sorted(bases))}")
    if len(adapters) > 1 and not pairing.common:
        shared = sum(sum(slot is not None for slot in slots) > 1 for slots in pairing.modules.values())
        if not shared:
            found.append("no module is in more than one adapter; the result has them side by side")
    for rule, taken in (
        ("first", "the first adapter's were taken"),
        ("average", "their weighted mean was taken"),
    ):
        if names := [extra.name for extra in extras if extra.rule == rule]:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"the adapters differ in {names[0]}{rest}: {taken}")
    return (*found, *_kernel_warnings(items, base), *_bias_warnings(items, base))


def _kernel_warnings(items: Sequence[Item], base: BaseModel | None) -> list[str]:
    """On modules that may be convolutions, where neither a file nor the base tells."""
    hidden = [
        (item.name, item.modules[0][1].kind)
        for item in items
        if all(hides_kernel(module) for _, module in item.modules)
        and len(item.like.shape) == 2
        and (base is None or f"{item.name}.weight" not in base.source.specs)
    ]
    if not hidden:
        return []
    name, kind = hidden[0]
    return [
        f"{name} is {kind} and becomes a plain LoRA; its file does not tell a linear layer from a convolution, and "
        "on a convolution PEFT will not load the result"
        + (f" (and {len(hidden) - 1} more)" if hidden[1:] else "")
        + ("; give the base (--base) if there are any" if base is None else "")
    ]


def _bias_warnings(items: Sequence[Item], base: BaseModel | None) -> list[str]:
    """On modules for which ``lora_bias`` comes to hold although no adapter had it for them."""
    having = [any("up_bias" in module.tensors for _, module in item.modules) for item in items]
    if not any(having):
        return []
    without = [item for item, has in zip(items, having, strict=True) if not has]
    unable = [item.name for item in without if not _takes_bias(item.like)]
    spread = [
        item.name
        for item in without
        if _takes_bias(item.like) and (base is None or f"{item.name}.bias" not in base.source.specs)
    ]
    found = []
    if unable:
        rest = f" and {len(unable) - 1} more" if unable[1:] else ""
        found.append(
            f"lora_bias holds for a whole file, and PEFT has none for {unable[0]}{rest}: it will not load the result"
        )
    if spread:
        rest = f" and {len(spread) - 1} more" if spread[1:] else ""
        condition = "" if base is not None else " where the base has no bias"
        found.append(
            f"lora_bias holds for a whole file, so one of zeros is written for {spread[0]}{rest}; PEFT loads it, "
            f"and will not merge it{condition}"
        )
    return found


def raised_warnings(items: Sequence[Item], rank: int | None, *, dense: bool) -> list[str]:
    """On modules that a rank was asked for that nothing in them can have.

    Args:
        items: of the result.
        rank: that was asked for.
        dense: the method gives more than the sum of the ranks, up to what the shape allows.
    """
    if rank is None:
        return []
    most = {item.name: _most(item, dense=dense) for item in items}
    raised = [name for name, limit in most.items() if limit < rank]
    if not raised:
        return []
    return [
        f"{raised[0]} is raised from rank {most[raised[0]]} to {rank}, with zeros that change nothing"
        + (f" (and {len(raised) - 1} more are)" if raised[1:] else "")
    ]


def _most(item: Item, *, dense: bool) -> int:
    limit = min(flat_shape(item.like.shape))
    return limit if dense else min(limit, sum(stored_rank(module) for _, module in item.modules))
