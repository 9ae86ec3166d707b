"""OneTrainer's older names: diffusers' paths, flattened, behind a prefix that names the component."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.architectures.base import flat
from loratools.formats.keys import Sheet, spell

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.architectures.base import Architecture, Component
    from loratools.formats.registry import Written

__all__ = ["write_onetrainer"]


def write_onetrainer(adapter: Adapter, architecture: Architecture | None) -> Written:
    """An adapter as OneTrainer saved it before it wrote diffusers' keys, every module with its alpha in float32.

    Args:
        adapter: any; its names are those the architecture knows.
        architecture: None where the adapter has these names already and keeps them.

    Raises:
        Unsupported: no architecture gives its modules these names.
    """
    sheet = Sheet("onetrainer")
    spell(sheet, adapter, architecture, stem=_stem, layout=lambda _: "diffusers")
    return sheet.written(adapter, architecture, "lora.safetensors")


def _stem(component: Component, name: str) -> str | None:
    own = [prefix for prefix in component.kohya if prefix == f"lora_{component.name}"]
    return f"{(own or component.kohya)[0]}_{flat(name)}" if component.kohya else None
