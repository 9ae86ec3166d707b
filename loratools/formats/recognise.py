"""Files of other formats, named for what they are. This build reads their headers; it computes with PEFT alone.

Each :class:`Sign` is a pattern that only one dialect's keys fit. Pairs of factors are found by suffix so that ranks and
shapes can be shown; what scales them lies in tensors or metadata and stays unread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter import Adapter, AdapterConfig, Extra, Module
from loratools.tensors.base import TensorRef

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from loratools.tensors.base import TensorSource

__all__ = ["SIGNS", "Sign", "recognise"]


@dataclass(frozen=True, slots=True)
class Sign:
    """A format, the kind of module it holds, and the key that gives it away."""

    format: str
    kind: str
    pattern: re.Pattern[str]
    what: str


# In this order: the first that fits any key wins.
SIGNS = (
    Sign("unilora", "unilora", re.compile(r".*unilora_theta_d"), "Uni-LoRA vector"),
    Sign("finegates", "finegates", re.compile(r".*\.finegates_\w+"), "FineGates gates"),
    Sign("lllite", "lllite", re.compile(r"lllite_.*"), "ControlNet-LLLite, not a LoRA"),
    Sign("lycoris", "lokr", re.compile(r".*\.lokr_\w+"), "LyCORIS LoKr factors"),
    Sign("lycoris", "loha", re.compile(r".*\.hada_\w+"), "LyCORIS LoHa factors"),
    Sign("lycoris", "oft", re.compile(r".*\.oft_(?:blocks|diag|R\.weight)"), "OFT blocks"),
    Sign("kohya", "lora", re.compile(r"lora_(?:unet|te\d?|prior_\w+|transformer)_+.*\.lora_down\.weight"), "kohya names"),
    Sign("xlabs", "lora", re.compile(r".*\.processor\.(?:qkv|proj)_lora\d?\.down\.weight"), "XLabs Flux names"),
    Sign("diffusers", "lora", re.compile(r".*(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight"), "diffusers names"),
    Sign("comfy", "lora", re.compile(r"diffusion_model\..*\.lora_(?:A|down)\.weight"), "ComfyUI names"),
    Sign(
        "diffusers", "lora",
        re.compile(r"(?:unet|transformer|text_encoder)(?:_\d)?\..*\.lora_A\.weight"), "diffusers names, PEFT factors",
    ),
    Sign("kohya", "lora", re.compile(r".*\.lora_down\.weight"), "kohya factors under dotted names"),
    Sign("cloneofsimo", "lora", re.compile(r"(?:unet|text_encoder):\d+:(?:up|down)"), "cloneofsimo numbering"),
    Sign("mlx", "lora", re.compile(r".*\.lora_a"), "MLX factors"),
    Sign("loralib", "lora", re.compile(r".*\.lora_A"), "loralib factors"),
    Sign("bare-peft", "lora", re.compile(r".*\.lora_A(?:\.[^.]+)?\.weight"), "PEFT factors without their configuration"),
    Sign("sam-lora", "lora", re.compile(r"w_a_\d+"), "SAM LoRA numbering"),
    Sign("textual-inversion", "textual inversion", re.compile(r"emb_params|clip_[lg]|string_to_param.*"), "an embedding"),
)  # fmt: skip

# Suffix of a factor, its partner's, and whether the factor comes as (in, rank) rather than (rank, in).
_PAIRS = (
    (".lora_down.weight", ".lora_up.weight", False),
    (".lora.down.weight", ".lora.up.weight", False),
    ("_lora.down.weight", "_lora.up.weight", False),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", False),
    (".lora_A.weight", ".lora_B.weight", False),
    (".lora_A.default.weight", ".lora_B.default.weight", False),
    (".down.weight", ".up.weight", False),
    (".lora_A", ".lora_B", False),
    (".lora_a", ".lora_b", True),
    (":down", ":up", False),
)
_NUMBERED = re.compile(r"w_a_(\d+)")


def recognise(name: str, source: TensorSource, config: Mapping[str, object]) -> Adapter:
    """Say what a file is that PEFT's reader does not claim.

    Args:
        name: what to call it.
        source: its header.
        config: the JSON beside it, or empty.
    """
    sign = next((s for s in SIGNS if any(s.pattern.fullmatch(key) for key in source.specs)), None)
    modules = dict(_pairs(source, sign.kind)) if sign is not None else {}
    claimed = {ref.name for module in modules.values() for ref in module.tensors.values()}
    extras = {
        key: Extra(TensorRef(source, key), key, "unclaimed", "not part of a pair this build reads")
        for key in source.specs
        if key not in claimed
    }
    if sign is None:
        form, kinds, evidence = _stranger(source.specs)
    else:
        form, kinds, evidence = sign.format, (sign.kind,), sign.what
    base = config.get("base_model_name_or_path") or config.get("model")
    way_out = "this build computes with PEFT adapters; convert it to PEFT first"
    return Adapter(
        name=name,
        format=form,
        modules=modules,
        config=AdapterConfig(None, base if isinstance(base, str) else None, dict(config)),
        metadata=source.metadata,
        extras=extras,
        evidence=evidence,
        kinds=kinds,
        warnings=(f"{form}: recognised from the header, not computed with",),
        refusal=(f"is {'a ' if sign is None else 'in format '}{form}: {evidence}", way_out),
        tensors=tuple(TensorRef(source, key) for key in source.specs),
    )


def _pairs(source: TensorSource, kind: str) -> Iterable[tuple[str, Module]]:
    specs = source.specs
    for key in specs:
        found = _partner(key, specs)
        if found is None:
            continue
        stem, partner, rank_last = found
        down, up = specs[key].shape, specs[partner].shape
        if not down or not up:
            continue
        if rank_last:
            rank, shape = down[-1], (up[-1], down[0])
        elif len(down) == 1:  # rank 1, stored as vectors
            rank, shape = 1, (up[0], down[0])
        else:
            rank, shape = down[0], (up[0], *down[1:])
        yield (
            stem,
            Module(
                kind,
                {"down": TensorRef(source, key), "up": TensorRef(source, partner)},
                rank,
                None,
                None,
                shape,
            ),
        )


def _partner(key: str, specs: Mapping[str, object]) -> tuple[str, str, bool] | None:
    for down, up, rank_last in _PAIRS:
        if key.endswith(down) and key.removesuffix(down) + up in specs:
            stem = key.removesuffix(down)
            return stem, stem + up, rank_last
    numbered = _NUMBERED.fullmatch(key)
    if numbered and f"w_b_{numbered[1]}" in specs:
        return numbered[1], f"w_b_{numbered[1]}", False
    return None


def _stranger(specs: Mapping[str, object]) -> tuple[str, tuple[str, ...], str]:
    weights = [name for name in specs if name.endswith((".weight", ".bias"))]
    if len(weights) >= max(2, len(specs) // 2):
        return "full-model", ("full model",), f"{len(specs)} tensors, none of them a factor"
    return "unknown", ("unknown",), f"{len(specs)} tensors, none of them a factor"
