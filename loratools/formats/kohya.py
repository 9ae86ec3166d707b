"""kohya's names, as sd-scripts and LyCORIS write them: a component's prefix, a flattened path, a suffix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.architectures.base import flat
from loratools.formats.keys import Sheet, spell

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.architectures.base import Architecture, Component
    from loratools.formats.registry import Written

__all__ = ["write_kohya"]


def write_kohya(adapter: Adapter, architecture: Architecture | None) -> Written:
    """An adapter as sd-scripts and LyCORIS store it, every module with its alpha in float32.

    Args:
        adapter: any; its names are those the architecture knows.
        architecture: None where the adapter has these names already and keeps them.

    Raises:
        Unsupported: no architecture gives its modules these names.
    """
    sheet = Sheet("kohya")
    spell(sheet, adapter, architecture, stem=_stem, layout=lambda component: component.kohya_layout)
    return sheet.written(adapter, architecture, "lora.safetensors")


def _stem(component: Component, name: str) -> str | None:
    return f"{component.kohya[0]}_{flat(name)}" if component.kohya else None
