"""Adapters as PEFT stores them: the keys of ``adapter_model.safetensors`` and the ``adapter_config.json``.

The reader's table of keys (:data:`~loratools.formats.peft.ROLES`), turned round. What was loaded from PEFT and is
unchanged is given back key for key; what was made is written with full names: patterns that only one module can
match, and targets that name every module. Whatever is written has been read back by the reader first, and means the
same.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from loratools.adapter import SAVED_EMBEDDING, AdapterConfig
from loratools.errors import BadConfig, Unsupported
from loratools.formats.patterns import Names
from loratools.formats.peft import (
    INNER_PROJECTION,
    PREFIX,
    ROLES,
    adds_twice,
    layer_name,
    pattern_name,
    read_peft,
    within,
)
from loratools.formats.peft_config import CONFIG_NAME, parse_config
from loratools.formats.registry import FORMATS, Written
from loratools.tensors.base import TensorRef

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from loratools.adapter import Adapter, Extra, Module
    from loratools.architectures.base import Architecture
    from loratools.tensors.base import TensorSource, TensorSpec

__all__ = ["write_peft", "written"]

# (kind, role) -> key suffix; of two spellings, the newer.
_SUFFIXES = {meaning: suffix for suffix, meaning in reversed(ROLES.items())}
_FAMILIES = {
    "lora": "LORA", "dora": "LORA", "adalora": "ADALORA", "ia3": "IA3", "loha": "LOHA", "lokr": "LOKR",
}  # fmt: skip
_DIFFUSION = {one.name for one in FORMATS.values() if one.diffusion}
# What every PEFT type's configuration has and a change of type leaves true.
_SHARED = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "modules_to_save", "peft_version", "revision", "target_modules", "task_type",
)  # fmt: skip
_PLAIN: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "lora_bias": False, "lora_dropout": 0.0, "modules_to_save": None, "revision": None,
    "task_type": None,
}  # fmt: skip
# Fields of the fused layout of PEFT before 0.3, whose factors are written as plain ones.
_GONE = ("enable_lora", "merge_weights")
# Fields of variants, and what they are in a plain adapter. Only those that are there are set.
_VARIANTS: dict[str, Any] = {
    "arrow_config": None, "corda_config": None, "eva_config": None, "kasa_config": None, "loftq_config": {},
    "lora_ga_config": None, "monteclora_config": None, "use_bdlora": None, "velora_config": None,
}  # fmt: skip


def write_peft(adapter: Adapter) -> tuple[dict[str, TensorRef], dict[str, Any]]:
    """The tensors by the key they get, in the order of the file, and the configuration. Reads no values.

    Raises:
        Unsupported: PEFT has no way to say this: kinds of several types at once, modules of another format.
    """
    _require_peft(adapter)
    if _is_unchanged(adapter):
        return {ref.name: ref for ref in adapter.tensors}, dict(adapter.config.raw)
    family = _family(adapter)
    config = _lora_config(adapter) if family == "LORA" else dict(adapter.config.raw)
    modules = _paired(adapter.modules, config) if family == "LORA" else dict(adapter.modules)
    tensors = {}
    for path, module in modules.items():
        for role, ref in module.tensors.items():
            tensors[f"{PREFIX}{path}.{_suffix(path, module, role)}"] = ref
    tensors |= {_full_key(key): extra.tensor for key, extra in adapter.extras.items()}
    _require_same(adapter, modules, tensors, config)
    return tensors, config


def written(adapter: Adapter, architecture: Architecture | None) -> Written:
    """An adapter of any format as a PEFT folder: of a pipeline, the one component that PEFT can hold.

    Raises:
        Unsupported: PEFT has no way to say this; no architecture says what its names mean.
    """
    from loratools.formats.diffusers import components, denoiser, unmixed
    from loratools.formats.keys import Sheet, without_alpha

    sheet = Sheet("peft")
    if adapter.format != "peft":
        extras: dict[str, Extra] = {}
        if architecture is None and adapter.format not in _DIFFUSION:
            modules = unmixed(sheet, "", adapter.modules)
            extras = {key: extra for key, extra in adapter.extras.items() if extra.role == "replacement"}
        else:
            found = components(sheet, adapter, architecture)
            chosen = denoiser(found)
            modules = found.pop(chosen or "", {})
            for component, others in found.items():
                for path, module in others.items():
                    sheet.lose(
                        f"{component}.{path}", module, f"a PEFT adapter is of one model, here the {chosen}"
                    )
        sheet.carry(replace(adapter, extras={k: e for k, e in adapter.extras.items() if k not in extras}))
        adapter = replace(
            adapter, format="peft", modules={path: without_alpha(module) for path, module in modules.items()},
            extras=extras, tensors=(), refusal=None,
            config=AdapterConfig(None, adapter.config.base_model, {}),
        )  # fmt: skip
    tensors, config = write_peft(adapter)
    raw = (json.dumps(config, indent=2, ensure_ascii=False, default=str) + "\n").encode()
    metadata = {**sheet.metadata(adapter, architecture), "format": "pt"}
    return Written({**tensors, **sheet.tensors}, metadata, {CONFIG_NAME: raw}, lost=sheet.lost)


def _require_peft(adapter: Adapter) -> None:
    if adapter.format != "peft":
        raise Unsupported(
            f"{adapter.name} is in the {adapter.format} format, which this build cannot turn into PEFT's",
            hint="convert it with the program it came from",
        )


def _is_unchanged(adapter: Adapter) -> bool:
    """Whether this is what reading its own file gives."""
    sources = {id(ref.source): ref.source for ref in adapter.tensors}
    if len(sources) != 1 or not adapter.config.raw.get("peft_type"):
        return False
    source = next(iter(sources.values()))
    read = read_peft(adapter.name, source, parse_config(adapter.config.raw, adapter.name), "")
    return (read.modules, read.extras, read.tensors) == (adapter.modules, adapter.extras, adapter.tensors)


def _family(adapter: Adapter) -> str:
    families = {_FAMILIES.get(module.kind, module.kind): path for path, module in adapter.modules.items()}
    if len(families) > 1:
        listed = " and ".join(f"{path} ({family})" for family, path in families.items())
        raise Unsupported(
            f"{adapter.name}: one PEFT adapter is of one type, and {listed} are not",
            hint="loratools normalize turns them into plain LoRA first",
        )
    return next(iter(families), str(adapter.config.peft_type or "LORA"))


def _suffix(path: str, module: Module, role: str) -> str:
    kind = "lora" if module.kind == "dora" else module.kind
    named = f"embedding_{role}" if module.options.get("embedding") and role in {"down", "up"} else role
    suffix = _SUFFIXES.get((kind, named))
    if suffix is None:
        raise Unsupported(f"{path}: PEFT has no key for the {role} of a {module.kind} module")
    return suffix


def _full_key(key: str) -> str:
    """A key with PEFT's prefix, once."""
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return PREFIX + key


# --- the configuration of a LoRA ---------------------------------------------------------------------------


def _lora_config(adapter: Adapter) -> dict[str, Any]:
    given = adapter.config.raw
    was_lora = str(given.get("peft_type") or "").upper().removeprefix("PEFTTYPE.") == "LORA"
    carried = dict(given) if was_lora else {name: given[name] for name in _SHARED if name in given}
    config = {**_PLAIN, **carried, "peft_type": "LORA", "use_rslora": False}
    if adapter.config.base_model is not None:
        config["base_model_name_or_path"] = adapter.config.base_model
    config |= _variant(adapter, given)
    config |= _targets(adapter, given)
    config |= _scaling(adapter, config)
    config |= _saved(adapter, given)
    return {name: value for name, value in sorted(config.items()) if name not in _GONE}


def _variant(adapter: Adapter, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say what is special about the factors."""
    modules = adapter.modules.values()
    fields = {name: plain for name, plain in _VARIANTS.items() if name in given}
    inits = {module.options.get("init") for module in modules}
    if any({"up_blocks", "down_blocks"} & module.options.keys() for module in modules):
        fields["use_bdlora"] = given.get("use_bdlora")
    if "kasa" in inits:
        fields["kasa_config"] = given.get("kasa_config")
    return {
        **fields,
        "init_lora_weights": given.get("init_lora_weights", True) if inits & {"pissa", "olora"} else True,
        "use_dora": any(module.kind == "dora" for module in modules),
        "lora_bias": any("up_bias" in module.tensors for module in modules),
    }


def _targets(adapter: Adapter, given: Mapping[str, Any]) -> dict[str, Any]:
    """Which modules PEFT is to wrap: exactly those that are there."""
    parameters = [name for name in given.get("target_parameters") or () if isinstance(name, str)]
    layers: list[str] = []
    used: set[str] = set()
    for path, module in adapter.modules.items():
        owned = [name for name in parameters if _owns(layer_name(path), name)]
        if owned or "experts" in module.options or "parameter" in module.options:
            used |= set(owned) or {_parameter(path, module)}
        else:
            layers.append(layer_name(path))
    listed = list(dict.fromkeys([*(name for name in parameters if name in used), *sorted(used)]))
    fields = _selection(sorted(set(layers)), given)
    return fields | ({"target_parameters": listed or None} if listed or "target_parameters" in given else {})


def _owns(layer: str, parameter: str) -> bool:
    owner = parameter.rpartition(".")[0]
    return layer == owner or layer.endswith("." + owner)


def _parameter(path: str, module: Module) -> str:
    name = module.options.get("parameter")
    if name is None:
        raise Unsupported(
            f"{path}: nothing says which parameter of the experts it adapts",
            hint="name it in target_parameters of the configuration, such as mlp.experts.gate_up_proj",
        )
    return f"{layer_name(path)}.{name}"


def _selection(layers: list[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """``target_modules`` and its like: as given where that selects these layers alone, else their full names."""
    wanted = given.get("target_modules")
    if layers and _selects(layers, given):
        if isinstance(wanted, list):
            chosen = Names(wanted)
            used = {chosen.name(layer) for layer in layers}
            wanted = [name for name in wanted if name in used]
        return {"target_modules": wanted}
    cleared = ["layers_to_transform", "layers_pattern"]
    if not _spares(
        layers, given
    ):  # else it may still keep PEFT from a layer that ends with one of these names
        cleared.append("exclude_modules")
    return {"target_modules": layers or None, **{name: None for name in cleared if name in given}}


def _selects(layers: list[str], given: Mapping[str, Any]) -> bool:
    """Whether the given fields select these layers, and, as far as names can tell, no others."""
    wanted = given.get("target_modules")
    if not isinstance(wanted, (list, str)) or not _is_regular(layers, given) or not _keeps(layers, given):
        return False
    try:
        chosen = Names(wanted)
        return all(chosen.matches(layer) for layer in layers) and _spares(layers, given)
    except BadConfig:
        return False


def _keeps(layers: list[str], given: Mapping[str, Any]) -> bool:
    """Whether ``layers_to_transform`` lets PEFT wrap all of these layers, and in every kind of block no others."""
    wanted, indices = given.get("target_modules"), given.get("layers_to_transform")
    if indices is None or indices == []:
        return not given.get("layers_pattern")  # which PEFT refuses alone
    listed = set(indices) if isinstance(indices, list) else {indices}
    if not isinstance(wanted, list) or not all(isinstance(index, int) for index in listed):
        return False
    blocks: dict[str, set[int | None]] = {}
    for layer in layers:
        if layer not in wanted:  # a full name is wrapped whatever its block
            kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer)
            blocks.setdefault(kind, set()).add(_block(layer, given.get("layers_pattern")))
    return all(found == listed for found in blocks.values())


def _block(layer: str, stems: object) -> int | None:
    """The number of the block a layer lies in, as PEFT finds it for ``layers_to_transform``; None where it does not.

    >>> _block("model.layers.3.q", None), _block("layers.3.q", None), _block("layers.3.q", "layers")
    (3, None, 3)
    """
    if not stems:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", layer)
        return int(found[1]) if found else None
    names = [stems] if isinstance(stems, str) else stems
    if not isinstance(names, list) or not all(
        isinstance(name, str) and re.fullmatch(r"\w+", name) for name in names
    ):
        return None  # an expression, which full names make unnecessary
    matches = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", layer) for name in names)
    return next((int(found[1]) for found in matches if found), None)


def _spares(layers: list[str], given: Mapping[str, Any]) -> bool:
    """Whether the given ``exclude_modules`` excludes none of these layers."""
    unwanted = given.get("exclude_modules")
    if not isinstance(unwanted, (list, str)) or not unwanted:
        return not unwanted
    try:
        excluded = Names(unwanted)
        return not any(excluded.matches(layer) for layer in layers)
    except BadConfig:
        return False


def _is_regular(layers: list[str], given: Mapping[str, Any]) -> bool:
    """Whether every block has the same layers, and no block between the first and the last is left out."""
    kinds: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    for layer in layers:
        owner, _, last = layer.rpartition(".")
        indices = tuple(int(number) for number in re.findall(r"(?<![^.])\d+(?![^.])", owner))
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", owner)
        kinds.setdefault(pattern, {}).setdefault(last, set()).add(indices)
    depths: dict[str, int] = {}  # blocks under each stem, such as model.layers
    for pattern, named in kinds.items():
        blocks = next(iter(named.values()))
        if any(other != blocks for other in named.values()):
            return False
        single = sorted(index[0] for index in blocks if len(index) == 1)
        if single and given.get("layers_to_transform") in (None, []):
            depth = depths.setdefault(pattern.partition("*")[0], len(single))
            if single != list(range(depth)):
                return False
    return True


def _scaling(adapter: Adapter, config: Mapping[str, Any]) -> dict[str, Any]:
    """The commonest rank and alpha, and a pattern for every module that has another."""
    read = parse_config({**config, "rank_pattern": {}, "alpha_pattern": {}, "r": 1, "lora_alpha": 1})
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, module in adapter.modules.items():
        name, inner = pattern_name(path, read), path.endswith(INNER_PROJECTION)
        if inner and path.removesuffix(INNER_PROJECTION) in adapter.modules:
            continue  # the output projection of an attention, which shares them with its inputs
        ranks[name] = _rank(path, module)
        alphas[name] = _alpha(path, module, halved=inner and adds_twice(read))
    rank, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns(alphas)
    return {"r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    r"""The commonest value; and those that differ, under an expression that fits one full name and no other.

    >>> _patterns({"layers.0.q": 4, "layers.1.q": 8, "layers.2.q": 8})
    (8, {'^layers\\.0\\.q': 4})
    """
    if not values:
        return 8, {}
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _rank(path: str, module: Module) -> int:
    if not module.rank:
        raise Unsupported(f"{path} has rank {module.rank}, which PEFT cannot load", hint="drop the module")
    return module.rank


def _alpha(path: str, module: Module, *, halved: bool) -> float:
    """The alpha that gives this scaling as alpha / rank; a whole number where there is one."""
    if module.scaling is None:
        raise Unsupported(
            f"{path}: nothing says how it is scaled", hint="pass its adapter_config.json, or --alpha"
        )
    rank, scaling = _rank(path, module), module.scaling / 2 if halved else module.scaling
    product = scaling * rank
    for whole in (module.alpha, round(product)):
        if whole is not None and whole / rank == scaling:
            return int(whole) if whole == int(whole) else whole
    return product


def _saved(adapter: Adapter, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that explain what is no module: whole layers, biases and token rows."""
    extras = adapter.extras.values()
    owners = [e.target.rpartition(".")[0] for e in extras if _is_saved_module(e)]
    listed = [
        name for name in given.get("modules_to_save") or () if any(within(owner, name) for owner in owners)
    ]
    listed += dict.fromkeys(owner for owner in owners if not any(within(owner, name) for name in listed))
    biases = {e.reason.removeprefix("bias=") for e in extras if e.reason.startswith("bias=")}
    fields: dict[str, Any] = {
        "modules_to_save": listed or None,
        "bias": "all" if "all" in biases else next(iter(biases), "none"),
    }
    rows = [extra for extra in extras if extra.role == "token_rows"]
    if rows:
        fields["trainable_token_indices"] = _token_indices(rows, given)
    elif "trainable_token_indices" in given:
        fields["trainable_token_indices"] = None
    return fields


def _is_saved_module(extra: Extra) -> bool:
    """Whether only ``modules_to_save`` can say why it is there: no bias, no embedding that PEFT saves unasked."""
    explained = extra.reason.startswith(("bias=", "tied to ")) or extra.reason == SAVED_EMBEDDING
    return extra.role == "replacement" and not explained


def _token_indices(rows: list[Extra], given: Mapping[str, Any]) -> Any:
    """As given, where that says the same; else by the full name of each embedding."""
    before = given.get("trainable_token_indices")
    if isinstance(before, list) and all(list(extra.indices) == before for extra in rows):
        return before
    owners = {extra.target.removesuffix(".weight"): list(extra.indices) for extra in rows}
    if isinstance(before, dict):
        kept = {
            name: indices
            for name, indices in before.items()
            if any(_ends(owner, name) and indices == owners[owner] for owner in owners)
        }
        owners = {o: i for o, i in owners.items() if not any(_ends(o, name) for name in kept)}
        return kept | owners
    return owners


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


# --- modules that share their pattern ----------------------------------------------------------------------


def _paired(modules: Mapping[str, Module], config: Mapping[str, Any]) -> dict[str, Module]:
    """The modules, with the output projections of attentions scaled to the alpha they share with their inputs."""
    read = parse_config(config)
    written = dict(modules)
    for path, module in modules.items():
        partner = modules.get(path.removesuffix(INNER_PROJECTION))
        if not path.endswith(INNER_PROJECTION) or partner is None or module.scaling is None:
            continue
        shared = _alpha(path, partner, halved=False) / _rank(path, partner) * (2 if adds_twice(read) else 1)
        factor = module.scaling / shared if shared else 0.0
        if factor != 1.0 and abs(math.frexp(factor)[0]) == 0.5:  # a power of two: no bit is lost
            tensors = {**module.tensors, "up": _scaled(module.tensors["up"], factor)}
            written[path] = replace(module, tensors=tensors, scaling=shared)
    return written


def _scaled(ref: TensorRef, factor: float) -> TensorRef:
    """A tensor times a power of two, in its own type."""
    import numpy as np

    from loratools.dtypes import narrow
    from loratools.tensors.memory import MemorySource, from_bytes

    values = ref.load()
    raw = narrow(values * values.dtype.type(factor), ref.spec.dtype, np.empty(ref.spec.nbytes, np.uint8))
    return TensorRef(MemorySource({ref.name: from_bytes(raw, ref.spec, torch_out=False)}), ref.name)


# --- reading back ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Written:
    """What a reader would see of a file that is not written yet."""

    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]


def _require_same(
    adapter: Adapter, modules: Mapping[str, Module], tensors: Mapping[str, TensorRef], config: dict[str, Any]
) -> None:
    """Refuse to write what would be read as something else.

    Raises:
        Unsupported: it would; the first module or tensor is named.
    """
    view = cast("TensorSource", _Written({key: ref.spec for key, ref in tensors.items()}, {}))
    read = read_peft(adapter.name, view, parse_config(config, "the configuration to be written"), "")
    if read.refusal is not None and adapter.refusal is None:
        raise Unsupported(
            f"{adapter.name} cannot be written for PEFT: {read.refusal[0]}", hint=read.refusal[1]
        )
    for path, module in modules.items():
        differing = _difference(module, read.modules.get(path))
        if differing is not None:
            raise Unsupported(
                f"{adapter.name}: {path} cannot be written for PEFT: it would be read with {differing}",
                hint="loratools normalize makes it plain",
            )
    for path in read.modules.keys() - modules.keys():
        raise Unsupported(f"{adapter.name}: {path} would be read as a module, and is none")
    extras = {_full_key(key): extra for key, extra in adapter.extras.items()}
    for key, extra in extras.items():
        found = read.extras.get(key)
        if found is None or (found.role, found.indices) != (extra.role, extra.indices):
            role = "a factor" if found is None else found.role
            raise Unsupported(f"{adapter.name}: {key} ({extra.reason}) would be read as {role}")


def _difference(module: Module, read: Module | None) -> str | None:
    """What of a module would not survive being written, in words."""
    if read is None:
        return "its factors apart"
    same = ((name, getattr(module, name), getattr(read, name)) for name in ("kind", "rank", "shape"))
    for name, wanted, got in same:
        if wanted != got:
            return f"{name} {got} for {wanted}"
    if module.scaling is not None and not _close(module.scaling, read.scaling):
        return f"scaling {read.scaling} for {module.scaling}"
    for name in _meaningful(module.options) | _meaningful(read.options):
        if module.options.get(name) != read.options.get(name):
            return f"{name} {read.options.get(name)} for {module.options.get(name)}"
    return None


def _meaningful(options: Iterable[str]) -> set[str]:
    return set(options) - {"config_rank", "parameter", "blocks"}


def _close(wanted: float, got: float | None) -> bool:
    return got is not None and math.isclose(wanted, got, rel_tol=1e-12, abs_tol=0.0)
