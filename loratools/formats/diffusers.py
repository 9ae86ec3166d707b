"""diffusers' names as its pipelines save them: component, path, PEFT's factors; ranks and alphas in the metadata."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.adapter import AdapterConfig
from loratools.errors import LoratoolsError, Unsupported
from loratools.formats.fusing import as_lora, fitted, require_factors, split_adapter, split_kept
from loratools.formats.keys import Sheet, require_dialect, without_alpha
from loratools.formats.pairs import folded
from loratools.formats.peft import PREFIX
from loratools.formats.peft_writing import write_peft
from loratools.metadata.translation import ModuleFacts, diffusers_metadata
from loratools.tensors.views import reshaped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.adapter import Adapter, Module
    from loratools.architectures.base import Architecture
    from loratools.formats.registry import Written

__all__ = ["WEIGHTS_NAME", "as_peft", "components", "denoiser", "unmixed", "write_diffusers"]

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
# The folders of pipelines that adapters speak of, in the order in which one is preferred.
_COMPONENTS = (
    "transformer",
    "unet",
    "transformer_2",
    "prior",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)


def write_diffusers(adapter: Adapter, architecture: Architecture | None) -> Written:
    """An adapter as diffusers' pipelines save and load it.

    What is a product of small matrices becomes a LoRA of its exact rank. Fused weights are split into diffusers' own
    modules. Each component's LoraConfig goes into the metadata, where diffusers looks for ranks and alphas.

    Args:
        adapter: any; its names are those the architecture knows.
        architecture: None where the adapter has diffusers' names already.

    Raises:
        Unsupported: no architecture gives its modules these names.
    """
    sheet = Sheet("diffusers")
    sheet.carry(adapter)
    named: dict[str, Module] = {}
    for component, modules in components(sheet, adapter, architecture).items():
        if not modules:
            continue
        part = replace(
            adapter, format="peft", modules={path: without_alpha(module) for path, module in modules.items()},
            extras={}, tensors=(), refusal=None, config=AdapterConfig(None, adapter.config.base_model, {}),
        )  # fmt: skip
        tensors, _ = write_peft(part)
        sheet.add({f"{component}.{key.removeprefix(PREFIX)}": ref for key, ref in tensors.items()})
        named |= {f"{component}.{path}": module for path, module in modules.items()}
    return sheet.written(adapter, architecture, WEIGHTS_NAME, {**_configs(named), "format": "pt"})


def _configs(modules: Mapping[str, Module]) -> dict[str, str]:
    """The LoraConfig of each component, where diffusers looks for it."""
    told = {}
    for name, module in modules.items():
        rank, scaling = module.rank or 0, module.scaling or 0.0
        exact = module.alpha is not None and module.alpha / rank == scaling
        told[name] = ModuleFacts(rank, module.alpha if exact and module.alpha else scaling * rank)
    return diffusers_metadata(
        told,
        dora=[name for name, module in modules.items() if "magnitude" in module.tensors],
        biased=[name for name, module in modules.items() if "up_bias" in module.tensors],
    )


def components(
    sheet: Sheet, adapter: Adapter, architecture: Architecture | None
) -> dict[str, dict[str, Module]]:
    """The modules of each component as PEFT has them, by their path in it; what has no such form is noted as lost.

    Raises:
        Unsupported: there is no architecture, and the names are those of another dialect.
    """
    found: dict[str, dict[str, Module]] = {}
    if architecture is None:
        if adapter.format != "diffusers":
            require_dialect("diffusers", adapter)
        for name, module in adapter.modules.items():
            component, _, path = name.partition(".")
            if component not in _COMPONENTS:
                sheet.lose(name, module, "its name says no component of a pipeline")
                continue
            _note(sheet, found.setdefault(component, {}), name, path, module, ())
        return {name: unmixed(sheet, name, modules) for name, modules in found.items()}
    split = split_adapter(adapter, architecture)
    for name in split.unmatched:
        sheet.lose(name, adapter.modules[name], f"{architecture.title} has no such module")
    for name, reason in split.failed.items():
        sheet.lose(name, adapter.modules[name], reason)
    for component in (one.name for one in architecture.components):
        found[component] = {}
    modules = dict(split.modules)
    for kept in split.whole.values():
        try:
            modules |= split_kept(kept.origin, kept)
        except LoratoolsError as error:
            sheet.lose(kept.origin, kept.module, str(error))
    for name, module in modules.items():
        weight, path = architecture.canonical[name].weight, architecture.canonical[name].parts[0].name
        _note(sheet, found[weight.component], name, path, module, weight.shape)
    return {name: unmixed(sheet, name, modules) for name, modules in found.items() if modules}


def unmixed(sheet: Sheet, component: str, modules: Mapping[str, Module]) -> dict[str, Module]:
    """The modules of one component that one LoraConfig can describe: DoRA or LoRA, whichever is of more modules.

    What is left out is noted as lost.

    Args:
        sheet: where.
        component: its name; empty where there is only one.
        modules: as PEFT has them, by their path in it.
    """
    decomposed = {path for path, module in modules.items() if module.kind == "dora"}
    rest = modules.keys() - decomposed
    fewer = decomposed if len(decomposed) <= len(rest) else rest
    whose = (
        "a PEFT adapter has one LoraConfig"
        if sheet.dialect == "peft"
        else "diffusers has one LoraConfig for a component"
    )
    for path in modules:
        if path in fewer:
            sheet.lose(
                f"{component}.{path}" if component else path,
                modules[path],
                f"{whose}: DoRA and LoRA cannot be mixed in it",
            )
    return {path: module for path, module in modules.items() if path not in fewer}


def _note(
    sheet: Sheet, modules: dict[str, Module], name: str, path: str, module: Module, shape: tuple[int, ...]
) -> None:
    try:
        modules[path] = as_peft(name, module, shape)
    except LoratoolsError as error:
        sheet.lose(name, module, str(error))


def as_peft(name: str, module: Module, shape: tuple[int, ...] = ()) -> Module:
    """A module as a LoRA or a DoRA of PEFT's.

    Args:
        name: for messages.
        module: of any kind.
        shape: of its weight, which its factors get the dimensions of; empty where it is not known.

    Raises:
        Unsupported: it has no such form.
    """
    if module.kind != "dora":
        require_factors(name, module)
    if module.scaling is None:
        raise Unsupported(
            f"nothing says how {name} is scaled", hint="pass its adapter_config.json, or --alpha"
        )
    if module.kind == "dora" and module.options.get("magnitude_axis", 0) == 1:
        raise Unsupported(f"{name} is a DoRA by input features, and PEFT's is by output features")
    if module.kind != "dora":
        module = as_lora(name, module)
    options = {key: value for key, value in module.options.items() if key != "magnitude_axis"}
    module = fitted(replace(module, options=options), shape)
    tensors = dict(module.tensors)
    if "diff_bias" in tensors:
        if not module.scaling:
            raise Unsupported(f"{name} has a bias and the scaling 0")
        tensors["up_bias"] = folded(tensors.pop("diff_bias"), 1 / module.scaling)
    if "magnitude" in tensors:
        ones = tuple(1 for _ in module.shape[2:])
        count = tensors["magnitude"].spec.count
        tensors["magnitude"] = reshaped(tensors["magnitude"], (1, count, *ones) if ones else (count,))
    return replace(module, tensors=tensors)


def denoiser(found: Mapping[str, dict[str, Module]]) -> str | None:
    """The component of a pipeline that a single PEFT adapter is of."""
    return next((name for name in _COMPONENTS if found.get(name)), None)
