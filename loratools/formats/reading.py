"""Adapters of image models, in any dialect: keys, the numbers that scale them, and nothing else is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratools.adapter import CONSTRAINED, RANKED, Adapter, AdapterConfig, Extra, Module
from loratools.errors import AmbiguousFormat, BadConfig
from loratools.formats.dialects import BARE, Names, name_modules
from loratools.formats.grouping import group_keys, make
from loratools.formats.numbered import numbered_keys
from loratools.formats.peft import Problem
from loratools.formats.peft_config import PeftConfig, effective_scaling, parse_config
from loratools.formats.refusals import why_broken
from loratools.formats.scalars import numbers
from loratools.formats.suffixes import Key, split_key
from loratools.tensors.base import TensorRef

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.formats.grouping import Made
    from loratools.tensors.base import TensorSource

__all__ = ["DIALECTS", "METADATA_KEY", "NO_ALPHA", "broken_groups", "metadata_faults", "read_dialect"]

# What read_dialect may call a file.
DIALECTS = (
    "kohya",
    "onetrainer",
    "comfy",
    "diffusers",
    "xlabs",
    "bfl-control",
    "cloneofsimo",
    "sam-lora",
    "nameless",
    BARE,
)

NO_ALPHA = "no alpha in the file"  # how the warning begins where nothing says a scaling
METADATA_KEY = "lora_adapter_metadata"  # diffusers' copy of PEFT's configuration, by component
_UNSCALED = {"full", "norm", "set", "oft", "boft", "oftv2", "tlora"}
_SPARSE_BIAS = (".bias_indices", ".bias_values", ".bias_size")
_BUNDLED = ("bundle_emb.", "<")


def read_dialect(
    name: str, source: TensorSource, config: Mapping[str, Any], *, alpha: float | None = None
) -> Adapter:
    """Turn the keys of a file into an adapter.

    Args:
        name: what to call it in messages.
        source: its tensors.
        config: the JSON beside it, or empty.
        alpha: what the modules are scaled by, over their rank, where the file does not say.

    Raises:
        AmbiguousFormat: the names are as much one dialect's as another's.
        BadConfig: the file has an alpha, and another one is given.
    """
    read = _read(name, source, alpha)
    kinds = tuple(sorted({module.kind for module in read.modules.values()})) or read.kinds
    return Adapter(
        name=name,
        format=read.names.format,
        modules=read.modules,
        config=AdapterConfig(None, _base_model(config, source.metadata), dict(config)),
        metadata=source.metadata,
        extras=read.extras,
        evidence=read.names.evidence,
        kinds=kinds,
        warnings=(*read.names.warnings, *read.warnings),
        refusal=_refusal(read),
        tensors=tuple(TensorRef(source, key) for key in source.specs),
    )


def broken_groups(source: TensorSource) -> dict[str, tuple[Problem, tuple[str, ...]]]:
    """Modules that cannot be one: their problem, and the tensors concerned, the one at fault first."""
    try:
        return _read("the file", source, None).broken
    except AmbiguousFormat:  # which whoever opened it has said
        return {}


def metadata_faults(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What is wrong with the configuration that diffusers stores in the header."""
    return _component_configs(metadata)[1]


@dataclass(slots=True)
class _Read:
    """What a file was read as."""

    names: Names
    modules: dict[str, Module] = field(default_factory=dict)
    extras: dict[str, Extra] = field(default_factory=dict)
    broken: dict[str, tuple[Problem, tuple[str, ...]]] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("lora",)
    warnings: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def _read(name: str, source: TensorSource, alpha: float | None) -> _Read:
    keys, names = _keys(name, source)
    read = _Read(names)
    groups = group_keys({key: (parts, TensorRef(source, key)) for key, parts in keys.items()}, names.modules)
    told = ("alpha", "on_input")
    values = numbers(ref for group in groups.values() for role, ref in group.tensors.items() if role in told)
    scales = _Scales(name, names.format, values, alpha, *_component_configs(source.metadata))
    read.faults = scales.faults
    for module_name, group in groups.items():
        for key, (ref, first) in group.twins.items():
            read.extras[key] = Extra(
                ref, module_name, "unclaimed", f"{first} is the same factor under another name"
            )
        made = make(group)
        module = made if isinstance(made, Problem) else scales.module(module_name, made)
        if isinstance(module, Module):
            read.modules[module_name] = module
            continue
        refs = tuple(group.tensors.values())
        read.broken[group.stem] = module, _by_mention(module.text, [ref.name for ref in refs])
        read.extras |= {ref.name: Extra(ref, module_name, "unclaimed", module.text) for ref in refs}
        read.kinds = tuple(group.families) or read.kinds
    for key in source.specs:
        if key not in keys:
            read.extras[key] = _extra(TensorRef(source, key))
    read.warnings = scales.warnings(read.modules)
    return read


def _by_mention(text: str, keys: list[str]) -> tuple[str, ...]:
    """Keys in the order in which a text names them, then those that it does not.

    >>> _by_mention("q.up and q.down differ", ["q.alpha", "q.down", "q.up"])
    ('q.up', 'q.down', 'q.alpha')
    """
    order = {key: text.find(key) for key in keys}
    return tuple(sorted(keys, key=lambda key: (order[key] < 0, order[key], -len(key))))


def _keys(name: str, source: TensorSource) -> tuple[dict[str, Key], Names]:
    """Every key of a module, taken apart, and the names of the modules."""
    counted = numbered_keys(source)
    if counted is not None:
        return counted
    keys = {key: parts for key in source.specs if (parts := split_key(key)) is not None and not _aside(key)}
    stems = {parts.stem for parts in keys.values() if parts.role == "on_input"}
    keys |= {
        f"{stem}.weight": Key(stem, "ia3", "scale", ".weight")
        for stem in stems
        if f"{stem}.weight" in source.specs
    }
    names = name_modules(keys, whole=name)
    if names.format == "bfl-control":
        norms = {
            key: Key(key.removesuffix(".scale"), "set", "value", ".scale")
            for key in source.specs
            if _is_norm(key)
        }
        keys |= norms
        names = name_modules(keys, whole=name)
    return {key: keys[key] for key in source.specs if key in keys}, names


def _is_norm(key: str) -> bool:
    return key.endswith((".query_norm.scale", ".key_norm.scale"))


def _aside(key: str) -> bool:
    return key.startswith(_BUNDLED) or "_aux." in key


def _extra(ref: TensorRef) -> Extra:
    key = ref.name
    if key.startswith(_BUNDLED):
        return Extra(ref, key, "carried", "a textual inversion that comes with the adapter")
    if "_aux." in key:
        return Extra(ref, key, "training_only", "a slider tool's own notes")
    if key.endswith(_SPARSE_BIAS):
        return Extra(ref, key, "unclaimed", "a sparse bias of LyCORIS, which this build does not add")
    return Extra(ref, key, "unclaimed", "no factor of a known kind")


def _refusal(read: _Read) -> tuple[str, str] | None:
    if read.faults:
        return read.faults[0], "correct the metadata, or remove them and pass --alpha"
    late = next((name for name, module in read.modules.items() if module.kind == "tlora"), None)
    if late is not None:
        return (
            f"{late} is T-LoRA: its rank depends on the step of the sampler, so that there is no one delta",
            "keep it as an adapter, and load it with the tool that trained it",
        )
    if read.names.format == BARE and not read.broken:
        return "PEFT factors without their configuration: nothing says how it is scaled", (
            "pass its adapter_config.json with --config, or the alpha it was trained with, with --alpha"
        )
    if read.names.format == "nameless":
        return "is a list of tensors without names: nothing says what they belong to", (
            "loratools inspect --spectrum shows what is in it"
        )
    return why_broken({key: problem.text for key, (problem, _) in read.broken.items()})


def _base_model(config: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    said = config.get("base_model_name_or_path") or metadata.get("ss_sd_model_name")
    return said if isinstance(said, str) and said not in {"", "None"} else None


# --- what scales them ----------------------------------------------------------------------------------------


def _component_configs(metadata: Mapping[str, str]) -> tuple[dict[str, PeftConfig], tuple[str, ...]]:
    """PEFT's configuration of each component, as diffusers stores it; and what is wrong with it."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}, ()
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, (f"{METADATA_KEY} is not JSON: {error}",)
    if not isinstance(raw, dict):
        return {}, (f"{METADATA_KEY} is not a JSON object",)
    fields: dict[str, dict[str, Any]] = {}
    for key, value in raw.items():
        component, _, name = key.partition(".")
        fields.setdefault(component, {})[name] = value
    found, faults = {}, list[BadConfig]()
    for component, values in fields.items():
        where = f"{METADATA_KEY} of {component}"
        found[component] = parse_config({**values, "peft_type": "LORA"}, where, faults)
    return found, tuple(str(fault) for fault in faults)


@dataclass(slots=True)
class _Scales:
    """What scales modules: alphas among the tensors, diffusers' metadata, or what the user says; else nothing does."""

    adapter: str
    form: str
    values: Mapping[str, float]
    given: float | None
    configs: Mapping[str, PeftConfig]
    faults: tuple[str, ...]
    silent: list[str] = field(default_factory=list)  # modules of which nothing says the scaling

    def module(self, name: str, made: Made) -> Module | Problem:
        """A module with its alpha and scaling, or why it has none.

        Raises:
            BadConfig: the file has an alpha, and the user says another.
        """
        options = dict(made.options)
        if made.kind == "ia3":
            options["feedforward"] = bool(self.values[made.tensors["on_input"].name])
            return Module("ia3", made.tensors, None, None, None, made.shape, options)
        stored = self._stored(made)
        if isinstance(stored, Problem):
            return stored
        if made.kind in CONSTRAINED:
            options["constraint"] = (stored or 0.0) * made.shape[0]
        if made.kind in _UNSCALED or (made.kind == "lokr" and made.rank is None):
            return Module(made.kind, made.tensors, made.rank, stored, 1.0, made.shape, options)
        rank = made.rank or 1
        said = self._by_config(name)
        if said is not None and stored is not None and not math.isclose(said[1], stored / rank, rel_tol=1e-6):
            ref = made.tensors["alpha"]
            text = f"{ref.name} scales by {stored / rank:g}, and {METADATA_KEY} by {said[1]:g}"
            return Problem("alpha-contradicted", text)
        if said is not None and stored is None:
            options |= {} if said[2] == rank else {"config_rank": said[2]}
            return Module(made.kind, made.tensors, rank, said[0], said[1], made.shape, options)
        alpha = self._agreed(made, stored)
        if alpha is None and self.form == BARE:
            return Module(made.kind, made.tensors, rank, None, None, made.shape, options)
        if alpha is None:
            self.silent.append(name)
        alpha = alpha or float(rank)  # kohya's scripts read an alpha of 0 as the rank
        return Module(made.kind, made.tensors, rank, alpha, alpha / rank, made.shape, options)

    def _stored(self, made: Made) -> float | Problem | None:
        ref = made.tensors.get("alpha")
        if ref is None:
            return None
        if ref.name not in self.values:
            return Problem("alpha-invalid", f"{ref.name} has shape {list(ref.shape)}, expected one number")
        value = self.values[ref.name]
        if not math.isfinite(value):
            return Problem("alpha-invalid", f"{ref.name} is {value}, expected a number")
        return value

    def _by_config(self, name: str) -> tuple[float, float, int] | None:
        component, _, path = name.partition(".")
        config = self.configs.get(component)
        if config is None:
            return None
        wanted, alpha, scaling = effective_scaling(config, path)
        if self.given is not None and alpha != self.given:
            raise self._contradiction(f"{METADATA_KEY} of {component}", alpha)
        return alpha, scaling, wanted

    def _agreed(self, made: Made, stored: float | None) -> float | None:
        if self.given is None or made.kind not in RANKED:
            return stored
        if stored is not None and stored != self.given:
            raise self._contradiction(made.tensors["alpha"].name, stored)
        return self.given

    def _contradiction(self, where: str, value: float) -> BadConfig:
        return BadConfig(
            f"{self.adapter}: {where} is {value:g}, and the alpha given is {self.given:g}",
            hint="leave --alpha (alpha= in Python) out: the file says it",
        )

    def warnings(self, modules: Mapping[str, Module]) -> tuple[str, ...]:
        """That nothing says how some modules are scaled, where that is so."""
        if not self.silent:
            return ()
        scaled = sum(module.kind in RANKED for module in modules.values())
        some = "any module" if len(self.silent) == scaled else f"{len(self.silent)} of {scaled} modules"
        return (f"{NO_ALPHA} for {some} (for example {self.silent[0]}): taken as the rank, so scaled by 1",)
