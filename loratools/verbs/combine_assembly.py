"""The result of ``combine`` as an adapter: its modules, their names in the file, its configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.adapter import Adapter, AdapterConfig, Extra, Module
from loratools.canonical import HINTS
from loratools.formats.registry import is_diffusion
from loratools.matrices import lora_module
from loratools.naming import FUSED_EXPERTS
from loratools.spelling import bare
from loratools.verbs.combine_report import CombinedModule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from loratools.verbs.combine_work import Combined, Item

__all__ = ["assemble_modules", "make_adapter", "name_modules", "ratio"]


def assemble_modules(
    items: Sequence[Item], results: Sequence[Combined], names: Mapping[str, str]
) -> tuple[dict[str, Module], tuple[CombinedModule, ...]]:
    """The modules that were computed, by their names in the file, and a line of the report on each."""
    modules: dict[str, Module] = {}
    lines = []
    for item, result in zip(items, results, strict=True):
        name = names[item.name]
        made = lora_module(item.like, result.factors, prefix=name, bias=result.bias)
        modules[name] = made
        lines.append(
            CombinedModule(
                name=name,
                rank=made.rank or 0,
                shape=made.shape,
                adapters=item.tasks,
                relative_error=ratio(result.error, result.norm),
                norm=result.norm,
                zero=not any(factor.up.any() and factor.down.any() for factor in result.factors),
            )
        )
    return modules, tuple(lines)


def make_adapter(
    adapters: Sequence[Adapter],
    output: Path | None,
    modules: Mapping[str, Module],
    extras: Mapping[str, Extra],
) -> Adapter:
    """An adapter of these modules and extras; what is said nowhere else is as in the first adapter."""
    first = adapters[0]
    name = "combined" if output is None else str(output)
    return replace(
        first,
        name=name,
        format=first.format if is_diffusion(first.format) else "peft",
        modules=modules,
        config=_config(adapters),
        metadata={key: first.metadata[key] for key in HINTS if _agreed(adapters, key)},
        extras=extras,
        evidence="combined",
        kinds=("lora",),
        warnings=(),
        tensors=tuple(ref for module in modules.values() for ref in module.tensors.values()),
    )


def _agreed(adapters: Sequence[Adapter], key: str) -> bool:
    """Whether all metadata have a key, and say the same."""
    said = {adapter.metadata.get(key) for adapter in adapters}
    return len(said) == 1 and None not in said


def _config(adapters: Sequence[Adapter]) -> AdapterConfig:
    """The first adapter's, with everything that another one has trained besides."""
    raw = dict(adapters[0].config.raw)
    for field in ("target_parameters", "modules_to_save"):
        listed = [name for adapter in adapters for name in adapter.config.raw.get(field) or ()]
        if listed:
            raw[field] = list(dict.fromkeys(listed))
    base = next((one.config.base_model for one in adapters if one.config.base_model), None)
    return AdapterConfig("LORA", base, raw)


def name_modules(adapters: Sequence[Adapter], items: Sequence[Item]) -> dict[str, str]:
    """What each module is called in the file: its own name, but for parameters of experts.

    PEFT wraps the module that holds them once for each parameter; which one a wrapper adapts follows from how many are
    targeted, and that may be more than any one adapter did.
    """
    targeted = dict.fromkeys(
        name for adapter in adapters for name in adapter.config.raw.get("target_parameters") or ()
    )
    return {item.name: _file_name(item, list(targeted)) for item in items}


def _file_name(item: Item, targeted: Sequence[str]) -> str:
    path, _, parameter = item.name.rpartition(".")
    owned = {
        last
        for owner, _, last in (name.rpartition(".") for name in targeted)
        if path == owner or path.endswith("." + owner)
    }
    if parameter not in owned or bare(item.modules[0][0]).endswith("." + parameter):
        return item.name
    order = {last: index for index, last in enumerate(FUSED_EXPERTS)}
    ordered = sorted(owned, key=lambda last: (order.get(last, len(order)), last))
    return path + ".base_layer" * (len(ordered) - 1 - ordered.index(parameter))


def ratio(error: float, norm: float | None) -> float:
    """An error relative to a norm; 0 where there is none."""
    return error / norm if norm else 0.0
