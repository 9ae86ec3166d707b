"""Two spellings that only Flux has: XLabs' attention processors, and Black Forest Labs' control adapters.

Neither stores an alpha, so the scaling is put inside ``up``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.canonical import pick_rows
from loratools.errors import Unsupported
from loratools.formats.fusing import as_lora, native_name
from loratools.formats.keys import Sheet, spell
from loratools.formats.pairs import folded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.adapter import Adapter, Module
    from loratools.architectures.base import Architecture, Component
    from loratools.formats.registry import Written
    from loratools.tensors.base import TensorRef

__all__ = ["write_control", "write_xlabs"]

_PROCESSOR = ".processor."


def write_xlabs(adapter: Adapter, architecture: Architecture | None) -> Written:
    """An adapter as x-flux stores it: the projections of the attention, and nothing else.

    Args:
        adapter: any; of a Flux.
        architecture: None where the adapter has these names already and keeps them.

    Raises:
        Unsupported: no architecture gives its modules these names.
    """
    sheet = Sheet("xlabs", spelled=_xlabs_tensors)
    spell(sheet, adapter, architecture, stem=_xlabs_stem, layout=lambda _: "native")
    return sheet.written(adapter, architecture, "lora.safetensors")


def write_control(adapter: Adapter, architecture: Architecture | None) -> Written:
    """An adapter as Black Forest Labs store theirs: the original code's names, PEFT's factors and biases, whole norms.

    Args:
        adapter: any; of a model with one denoiser.
        architecture: None where the adapter has these names already and keeps them.

    Raises:
        Unsupported: no architecture gives its modules these names.
    """
    sheet = Sheet("bfl-control", spelled=_control_tensors)
    spell(sheet, adapter, architecture, stem=_control_stem, layout=lambda _: "native")
    return sheet.written(adapter, architecture, "lora.safetensors")


def _xlabs_stem(component: Component, name: str) -> str | None:
    weight = next((one for one in component.weights if native_name(one) == name), None)
    aliases = () if weight is None else weight.aliases
    return next((alias for alias, _, _ in aliases if _PROCESSOR in alias), None)


def _xlabs_tensors(stem: str, module: Module, _: str) -> Mapping[str, TensorRef]:
    stem = stem.removeprefix("diffusion_model.")
    if stem.endswith("qkv_lora"):
        module = _attention_only(stem, module)
    return _pair(stem, module, ".down.weight", ".up.weight")


def _attention_only(stem: str, module: Module) -> Module:
    """The rows of q, k and v, of a weight that holds the MLP's behind them.

    Raises:
        Unsupported: the module changes those too.
    """
    width, rows = module.shape[1], module.shape[0]
    if rows <= 3 * width:
        return module
    module = as_lora(stem, module)
    if module.tensors["up"].load().reshape(rows, -1)[3 * width :].any():
        raise Unsupported(f"{stem}: XLabs has no key for the part of linear1 that belongs to the MLP")
    return pick_rows(stem, module, [(0, 3 * width)])


def _control_stem(component: Component, name: str) -> str | None:
    return name if "" in component.native else None


def _control_tensors(stem: str, module: Module, _: str) -> Mapping[str, TensorRef]:
    if module.kind == "set" and module.tensors.keys() == {"value"}:
        return {f"{stem.removesuffix('.scale')}.scale": module.tensors["value"]}
    biases = {role: module.tensors[role] for role in ("up_bias", "diff_bias") if role in module.tensors}
    bare = {role: ref for role, ref in module.tensors.items() if role not in biases}
    made = dict(_pair(stem, replace(module, tensors=bare), ".lora_A.weight", ".lora_B.weight"))
    if "up_bias" in biases:
        made[f"{stem}.lora_B.bias"] = folded(biases["up_bias"], module.scaling or 0.0)
    elif "diff_bias" in biases:
        made[f"{stem}.lora_B.bias"] = biases["diff_bias"]
    return made


def _pair(stem: str, module: Module, down: str, up: str) -> Mapping[str, TensorRef]:
    """Two factors whose product is the update.

    Raises:
        Unsupported: it is not such a product.
    """
    if module.scaling is None:
        raise Unsupported(f"nothing says how {stem} is scaled", hint="pass --alpha")
    module = as_lora(stem, module)
    if odd := module.tensors.keys() - {"down", "up", "alpha"} or module.options.keys() - {
        "config_rank",
        "blocks",
    }:
        raise Unsupported(f"{stem}: there is no key for {', '.join(sorted(odd))}")
    return {
        f"{stem}{down}": module.tensors["down"],
        f"{stem}{up}": folded(module.tensors["up"], module.scaling or 0.0),
    }
