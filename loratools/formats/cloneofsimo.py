"""cloneofsimo's files: attention layers of Stable Diffusion 1 and 2 by number, in the order they are met."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from loratools.errors import Unsupported
from loratools.formats.diffusers import components
from loratools.formats.keys import Sheet
from loratools.formats.numbered import TARGETS, orders
from loratools.formats.pairs import folded
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource
from loratools.tensors.views import reshaped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratools.adapter import Adapter, Module
    from loratools.architectures.base import Architecture
    from loratools.formats.registry import Written

__all__ = ["write_cloneofsimo"]


def write_cloneofsimo(adapter: Adapter, architecture: Architecture | None) -> Written:
    """An adapter as the first trainer for Stable Diffusion stored it.

    Every layer has its number whether it was trained or not, so the others are there with the rank 1 and zeros. There
    is no alpha: the scaling goes into ``up``.

    Args:
        adapter: of Stable Diffusion 1 or 2.
        architecture: which of them.

    Raises:
        Unsupported: it belongs to another model, or nothing says to which.
    """
    if architecture is None or architecture.name not in {"sd1", "sd2"}:
        raise Unsupported(
            f"{adapter.name}: cloneofsimo's numbers are those of Stable Diffusion 1 and 2",
            hint="--arch sd1 or --arch sd2, where it is one",
        )
    sheet, metadata = Sheet("cloneofsimo"), {}
    sheet.carry(adapter)
    for component, modules in components(sheet, adapter, architecture).items():
        order = _order(component, modules, architecture)
        for name, module in modules.items():
            if name not in dict(order):
                sheet.lose(
                    f"{component}.{name}", module, "cloneofsimo numbers the layers of the attention alone"
                )
        if not order:
            continue
        metadata[component] = json.dumps(sorted(TARGETS[component]))
        for index, (name, shape) in enumerate(order):
            up, down = _pair(f"{component}:{index}", modules.get(name), shape)
            sheet.add({f"{component}:{index}:up": up, f"{component}:{index}:down": down})
            metadata[f"{component}:{index}:rank"] = str(down.shape[0])
    return sheet.written(adapter, architecture, "lora.safetensors", metadata)


def _order(
    component: str, modules: Mapping[str, Module], architecture: Architecture
) -> Sequence[tuple[str, tuple[int, int]]]:
    """The layers of a component by their numbers; none where it is not numbered, or none of them is adapted."""
    if component not in TARGETS:
        return ()
    known = architecture.canonical
    for order in orders(component):
        places = [known.get(f"{component}.{name}") for name, _ in order]
        if all(
            place is not None and place.shape[:2] == shape
            for place, (_, shape) in zip(places, order, strict=True)
        ):
            return order if not modules.keys().isdisjoint(dict(order)) else ()
    return ()


def _pair(stem: str, module: Module | None, shape: tuple[int, int]) -> tuple[TensorRef, TensorRef]:
    """(out, rank) and (rank, in)."""
    import numpy as np

    if module is None:
        source = MemorySource(
            {f"{stem}:up": np.zeros((shape[0], 1), "f4"), f"{stem}:down": np.zeros((1, shape[1]), "f4")}
        )
        return TensorRef(source, f"{stem}:up"), TensorRef(source, f"{stem}:down")
    if odd := module.tensors.keys() - {"up", "down", "alpha"}:
        raise Unsupported(f"{stem}: there is no key for {', '.join(sorted(odd))}")
    up, down = module.tensors["up"], module.tensors["down"]
    rank = down.shape[0]
    return folded(reshaped(up, (shape[0], rank)), module.scaling or 0.0), reshaped(down, (rank, shape[1]))
