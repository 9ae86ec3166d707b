"""ComfyUI's names, which ai-toolkit and SimpleTuner share: a model's prefix and its original path, PEFT's factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.formats.keys import Sheet, spell
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.architectures.base import Architecture, Component
    from loratools.formats.registry import Written

__all__ = ["write_comfy"]


def write_comfy(adapter: Adapter, architecture: Architecture | None) -> Written:
    """An adapter as ComfyUI names it, every module with its alpha in float32.

    Args:
        adapter: any; its names are those the architecture knows.
        architecture: None where the adapter has these names already and keeps them.

    Raises:
        Unsupported: no architecture gives its modules these names.
    """
    sheet = Sheet("comfy")
    spell(sheet, adapter, architecture, stem=_stem, layout=lambda component: component.comfy_layout)
    _reshape(sheet, adapter)
    return sheet.written(adapter, architecture, "lora.safetensors")


def _reshape(sheet: Sheet, adapter: Adapter) -> None:
    """Say how wide a control adapter makes the input layer: ComfyUI pads the base's with zeros before it adds to it."""
    import numpy as np

    key = "diffusion_model.img_in"
    down, up = (sheet.tensors.get(f"{key}.lora_{leg}.weight") for leg in "AB")
    if adapter.format == "bfl-control" and down is not None and up is not None:
        name = f"{key}.reshape_weight"
        shape = np.array([up.shape[0], down.shape[1]], np.int64)
        sheet.tensors.setdefault(name, TensorRef(MemorySource({name: shape}), name))


def _stem(component: Component, name: str) -> str | None:
    prefix = component.comfy or next((prefix for prefix in component.native if prefix), "")
    return f"{prefix}.{name}" if prefix else None
