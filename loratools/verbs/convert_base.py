"""Whether the adapter of a language model belongs to the base it is converted for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from loratools.binding import bind, speaks_of_diffusion
from loratools.errors import Mismatch, ShapeMismatch, UnmatchedModules
from loratools.models import quantisation_scheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loratools.adapter import Adapter, Module
    from loratools.models import BaseModel

__all__ = ["require_base"]

_LAYER = re.compile(r"(?:.*\.)?layers\.(?P<block>\d+)\.")
_NAMED = 3  # modules spelled out in a message
# Modules whose input, and whose output, is as wide as the hidden states.
_READS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "lm_head")
_WRITES = ("o_proj", "down_proj")


def require_base(adapter: Adapter, base: BaseModel, leave: Mapping[str, str]) -> None:
    """Refuse a language model's adapter that is not of this base; reads no values. Others are not looked at.

    Where the base has no tensors to compare with, or packed ones, its configuration is asked: for the number of
    layers, and the width of the hidden states.

    Args:
        adapter: under Hugging Face's names.
        base: opened.
        leave: modules that are left out anyway.

    Raises:
        ShapeMismatch: a module is of another size than its weight.
        UnmatchedModules: modules that the base does not have.
    """
    if speaks_of_diffusion(adapter):
        return
    if base.source.specs and quantisation_scheme(base) is None and "quantization" not in base.config:
        _require_bound(adapter, base, leave)
        return
    text = base.config.get("text_config")
    config = {**base.config, **text} if isinstance(text, dict) else base.config
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int):
        beyond = [name for name in adapter.modules if _block(name) >= layers and name not in leave]
        if beyond:
            raise _unmatched(adapter, base, beyond, f"which has {layers} layers")
    for name, module in adapter.modules.items():
        for wanted in _fitting(name, module, config):
            if wanted != module.shape and name not in leave:
                raise ShapeMismatch(
                    name, module.shape, wanted, hint=f"is {base.name} the base it was trained on?"
                )


def _require_bound(adapter: Adapter, base: BaseModel, leave: Mapping[str, str]) -> None:
    faults: list[tuple[str, Mismatch]] = []
    found = bind(adapter, base, faults)
    for name, fault in faults:
        if isinstance(fault, ShapeMismatch) and name not in leave:  # others are of merging, not of belonging
            raise fault
    apart = {*found.bound, *leave, *(name for name, _ in faults)}
    strange = [name for name in adapter.modules if name not in apart]
    if strange:
        raise _unmatched(adapter, base, strange, "which has no such modules")


def _unmatched(adapter: Adapter, base: BaseModel, names: list[str], why: str) -> UnmatchedModules:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return UnmatchedModules(
        f"{adapter.name}: {', '.join(names[:_NAMED])}{more} cannot be of {base.name}, {why}",
        tuple(names),
        hint="is this the base it was trained on?",
    )


def _block(name: str) -> int:
    found = _LAYER.match(name)
    return -1 if found is None else int(found["block"])


def _fitting(name: str, module: Module, config: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    """The module's shape as a configuration has it, as far as that says it."""
    width, last = config.get("hidden_size"), name.rpartition(".")[2]
    if not isinstance(width, int) or len(module.shape) != 2 or ".experts." in name:
        return
    if last in _READS:
        yield (module.shape[0], width)
    elif last in _WRITES:
        yield (width, module.shape[1])
