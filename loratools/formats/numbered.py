"""Files that number their modules instead of naming them: cloneofsimo's, Segment Anything's, and lists without keys."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from loratools.formats.dialects import Names
from loratools.formats.suffixes import Key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loratools.tensors.base import TensorSource

__all__ = ["TARGETS", "numbered_keys", "orders"]

_CLONEOFSIMO = re.compile(r"(?P<component>unet|text_encoder(?:_\d)?):(?P<index>\d+):(?P<role>up|down|alpha)")
_SAM = re.compile(r"w_(?P<role>[ab])_(?P<index>\d+)")
_SAM_ROLES = {"a": "down", "b": "up"}
# The classes of modules that the trainer looks into, as its metadata list them.
TARGETS = {"unet": ("CrossAttention", "Attention", "GEGLU"), "text_encoder": ("CLIPAttention",)}
_CONTEXTS = (768, 1024)  # of Stable Diffusion 1 and 2
_TEXT_WIDTHS = (768, 1024)
# The order in which diffusers registered the blocks: the middle one is made last.
_BLOCKS = (
    *((f"down_blocks.{i}", 2, width) for i, width in enumerate((320, 640, 1280))),
    *((f"up_blocks.{i}", 3, width) for i, width in ((1, 1280), (2, 640), (3, 320))),
    ("mid_block", 1, 1280),
)


def numbered_keys(source: TensorSource) -> tuple[dict[str, Key], Names] | None:
    """The keys taken apart, and the modules' names where the order proves them; None for files of other kinds."""
    keys = list(source.specs)
    if found := {key: match for key in keys if (match := _CLONEOFSIMO.fullmatch(key))}:
        parts = {
            key: Key(
                key.rpartition(":")[0], "" if m["role"] == "alpha" else "lora", m["role"], f":{m['role']}"
            )
            for key, m in found.items()
        }
        names = _of_cloneofsimo(source, parts)
        return parts, Names("cloneofsimo", f"modules by number: {next(iter(parts))}", names)
    if found := {key: match for key in keys if (match := _SAM.fullmatch(key))}:
        parts = {key: Key(f"w_{m['index']}", "lora", _SAM_ROLES[m["role"]], "") for key, m in found.items()}
        return parts, Names(
            "sam-lora", f"modules by number: {next(iter(parts))}", {p.stem: p.stem for p in parts.values()}
        )
    if keys and all(key.isdigit() for key in keys):
        parts = dict(_in_turns(source))
        names = {part.stem: part.stem for part in parts.values()}
        return parts, Names("nameless", "a list of tensors without names", names)
    return None


def _in_turns(source: TensorSource) -> Iterator[tuple[str, Key]]:
    """A list that holds up and down in turns, as cloneofsimo's first trainer wrote it."""
    shapes = [source.specs[key].shape for key in sorted(source.specs, key=int)]
    for i in range(0, len(shapes) - 1, 2):
        up, down = shapes[i], shapes[i + 1]
        if len(up) > 1 and len(down) > 1 and up[1] == down[0]:
            yield str(i), Key(str(i // 2), "lora", "up", "")
            yield str(i + 1), Key(str(i // 2), "lora", "down", "")


def _of_cloneofsimo(source: TensorSource, parts: Mapping[str, Key]) -> dict[str, str]:
    """Names by the order in which the trainer met the layers, where every shape agrees with it; else the numbers."""
    names = {part.stem: part.stem for part in parts.values()}
    for component, classes in TARGETS.items():
        count = sum(stem.startswith(f"{component}:") for stem in names)
        shapes = [_shape(source, f"{component}:{i}") for i in range(count)]
        if not count or not _targets(source.metadata.get(component)) <= set(classes):
            continue
        for order in orders(component):
            if [shape for _, shape in order] == shapes:
                names |= {f"{component}:{i}": f"{component}.{name}" for i, (name, _) in enumerate(order)}
    return names


def orders(component: str) -> list[Sequence[tuple[str, tuple[int, int]]]]:
    """The orders in which the trainer may have met a component's layers: their paths and shapes, by the model."""
    if component == "unet":
        return [_unet(context) for context in _CONTEXTS]
    return [_text(width, layers) for width in _TEXT_WIDTHS for layers in (12, 23, 24)]


def _targets(said: str | None) -> set[str]:
    """The classes of modules that the trainer looked into, where the metadata say."""
    try:
        listed = json.loads(said or "[]")
    except (ValueError, RecursionError):
        return {"unreadable"}
    return {str(one) for one in listed} if isinstance(listed, list) else {"unreadable"}


def _shape(source: TensorSource, stem: str) -> tuple[int, int] | None:
    up, down = source.specs.get(f"{stem}:up"), source.specs.get(f"{stem}:down")
    if up is None or down is None or len(up.shape) != 2 or len(down.shape) != 2:
        return None
    return up.shape[0], down.shape[1]


def _unet(context: int) -> Sequence[tuple[str, tuple[int, int]]]:
    """The linear layers of the attention and of GEGLU, in the order of ``named_modules`` of diffusers up to 0.12."""
    order = []
    for block, count, width in _BLOCKS:
        for index in range(count):
            inner = f"{block}.attentions.{index}.transformer_blocks.0"
            order += [
                (f"{inner}.attn1.{name}", (width, width)) for name in ("to_q", "to_k", "to_v", "to_out.0")
            ]
            order.append((f"{inner}.ff.net.0.proj", (8 * width, width)))
            order.append((f"{inner}.attn2.to_q", (width, width)))
            order += [(f"{inner}.attn2.{name}", (width, context)) for name in ("to_k", "to_v")]
            order.append((f"{inner}.attn2.to_out.0", (width, width)))
    return order


def _text(width: int, layers: int) -> Sequence[tuple[str, tuple[int, int]]]:
    """The projections of CLIPAttention, in the order in which transformers has always made them."""
    projections = ("k_proj", "v_proj", "q_proj", "out_proj")
    return [
        (f"text_model.encoder.layers.{i}.self_attn.{name}", (width, width))
        for i in range(layers)
        for name in projections
    ]
