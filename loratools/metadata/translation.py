"""Metadata in the words of each dialect: what an adapter is, said anew, and what its author said, carried over.

Nothing is invented. What a writer knows (ranks, alphas, an architecture) is stated; what an author wrote (a title, a
trigger, a licence) goes under the name the other dialect has for it; what would no longer be true is left out, with the
reason. All functions are pure, on names and numbers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools.errors import Unsupported
from loratools.metadata.hashes import HASHES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

__all__ = [
    "DIALECTS",
    "FACTS",
    "STRUCTURE",
    "ModuleFacts",
    "carry_over",
    "diffusers_metadata",
    "facts",
    "kohya_metadata",
    "network_metadata",
    "say_facts",
]


class ModuleFacts(NamedTuple):
    """What metadata can say of a module."""

    rank: int
    alpha: float


# A fact that an author states -> its key in each dialect, where there is one. "peft" are fields of
# adapter_config.json and "card" those of a model card; the others are keys of the header.
FACTS: dict[str, dict[str, str]] = {
    "title": {
        "kohya": "modelspec.title", "diffusers": "modelspec.title", "ai-toolkit": "name", "gguf": "general.name",
    },
    "trigger": {
        "kohya": "modelspec.trigger_phrase", "diffusers": "modelspec.trigger_phrase", "card": "instance_prompt",
    },
    "licence": {
        "kohya": "modelspec.license", "diffusers": "modelspec.license", "gguf": "general.license", "card": "license",
    },
    "author": {"kohya": "modelspec.author", "diffusers": "modelspec.author", "gguf": "general.author"},
    "description": {
        "kohya": "modelspec.description", "diffusers": "modelspec.description", "gguf": "general.description",
    },
    "base_model": {
        "kohya": "ss_sd_model_name", "peft": "base_model_name_or_path", "card": "base_model",
        "gguf": "general.base_model.0.name",
    },
}  # fmt: skip
DIALECTS = tuple(sorted({dialect for keys in FACTS.values() for dialect in keys}))

# Keys that describe the tensors as they were -> why another file cannot have them as they are. A trailing colon
# stands for all keys that begin so, and for the word alone.
STRUCTURE = {
    "lora_adapter_metadata": "describes the modules as diffusers names them",
    "ss_network_module": "describes how the modules were stored",
    "ss_network_dim": "describes the ranks as they were stored",
    "ss_network_alpha": "describes the alphas as they were stored",
    "ss_network_args": "describes how the modules were stored",
    "modelspec.implementation": "describes how the modules were named",
    "unet:": "describes cloneofsimo's list of modules",
    "text_encoder:": "describes cloneofsimo's list of modules",
    "loratools": "is the record of what made the file",
    "format": "is written anew",
    **dict.fromkeys(HASHES, "is the hash of other bytes"),
}


def facts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What an author says in metadata, in a configuration or in a card, by the names of :data:`FACTS`.

    >>> facts({"modelspec.title": "Ink", "base_model_name_or_path": "owner/model"})
    {'title': 'Ink', 'base_model': 'owner/model'}
    """
    found = {}
    for fact, keys in FACTS.items():
        values = (metadata.get(key) for key in dict.fromkeys(keys.values()))
        value = next((v for v in values if isinstance(v, str) and v and v != "None"), None)
        if value is not None:
            found[fact] = value
    return found


def say_facts(known: Mapping[str, str], dialect: str) -> dict[str, str]:
    """Facts under the keys of a dialect; those it has no key for are left out.

    >>> say_facts({"title": "Ink", "trigger": "ink style"}, "gguf")
    {'general.name': 'Ink'}
    """
    return {keys[dialect]: known[fact] for fact, keys in FACTS.items() if fact in known and dialect in keys}


def carry_over(metadata: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Divide metadata into what is true of an adapter in any format, and what is not, with the reasons.

    Returns:
        The first with its values, the second by key with the reason it cannot go along.
    """
    kept, left = {}, {}
    for key, value in metadata.items():
        reason = next((why for name, why in STRUCTURE.items() if _matches(key, name)), None)
        if reason is None:
            kept[key] = value
        else:
            left[key] = reason
    return kept, left


def _matches(key: str, name: str) -> bool:
    return key.startswith(name) or key == name[:-1] if name.endswith(":") else key == name


def kohya_metadata(
    modules: Mapping[str, ModuleFacts],
    *,
    convolutions: Mapping[str, ModuleFacts] | None = None,
    network_module: str | None = None,
    base_model_version: str | None = None,
    v2: bool | None = None,
    algo: str | None = None,
) -> dict[str, str]:
    """The minimal ``ss_*`` set, from the modules that are there.

    >>> kohya_metadata({"lora_unet_a": ModuleFacts(8, 4.0)}, network_module="networks.lora")
    {'ss_network_module': 'networks.lora', 'ss_network_dim': '8', 'ss_network_alpha': '4'}

    Args:
        modules: linear ones and 1x1 convolutions, by name.
        convolutions: those with larger kernels, whose rank and alpha LyCORIS calls conv_dim and conv_alpha.
        network_module: of the trainer that reads such files; by default ``networks.lora``, and ``lycoris.kohya`` where
            there is an ``algo``.
        base_model_version: such as ``sd_v1``, where it is known.
        v2: whether the base is Stable Diffusion 2, where it is known.
        algo: LyCORIS' name of the kind of the modules, if they are not plain LoRA.

    Returns:
        Keys and values; ranks and alphas that differ are "Dynamic", as kohya's own tools write them.
    """
    convolutions = convolutions or {}
    module = network_module or ("lycoris.kohya" if algo is not None else "networks.lora")
    found = {} if v2 is None else {"ss_v2": str(v2)}
    if base_model_version is not None:
        found["ss_base_model_version"] = base_model_version
    found["ss_network_module"] = module
    first = modules or convolutions
    if first:
        found["ss_network_dim"] = _same(module.rank for module in first.values())
        found["ss_network_alpha"] = _same(module.alpha for module in first.values())
    if algo is None:
        return found
    arguments = {"algo": algo}
    if convolutions:
        arguments["conv_dim"] = _same(module.rank for module in convolutions.values())
        arguments["conv_alpha"] = _same(module.alpha for module in convolutions.values())
    found["ss_network_args"] = json.dumps(arguments)
    return found


_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
_DYNAMIC = "Dynamic"
# What trainers call an algorithm -> the kind of the modules it makes. Those not named here make plain LoRA.
_ALGORITHMS = {
    "loha": "loha", "lokr": "lokr", "ia3": "ia3", "glora": "glora", "full": "full", "oft": "oft", "diag-oft": "oft",
    "boft": "boft",
}  # fmt: skip
_ROUNDED = 2.0**-8  # relative: an alpha stored in bfloat16 is still the one that was said


def network_metadata(
    metadata: Mapping[str, str],
    modules: Mapping[str, ModuleFacts],
    *,
    convolutions: Mapping[str, ModuleFacts] | None = None,
    kinds: Collection[str] = (),
) -> dict[str, str]:
    """What a file says of its network, as far as it is true of these modules; ranks and alphas are made true.

    >>> network_metadata({"ss_network_module": "networks.lora_fa", "ss_network_dim": "8"}, {"a": ModuleFacts(4, 4.0)})
    {'ss_network_module': 'networks.lora_fa', 'ss_network_dim': '4'}

    Args:
        metadata: of the file that was read.
        modules: linear ones and 1x1 convolutions that will be written, by name.
        convolutions: those with larger kernels.
        kinds: of all modules that will be written; none where they are not known.

    Returns:
        Keys and values; none where nothing is said, or where the algorithm that is said made other modules.
    """
    convolutions = convolutions or {}
    said = {key: metadata[key] for key in _NETWORK if key in metadata}
    arguments = _arguments(said.get("ss_network_args", ""))
    module = said.get("ss_network_module", "")
    algorithm = module.rpartition(".")[2] if module.startswith("networks.") else arguments.get("algo")
    made = _ALGORITHMS.get(str(algorithm).lower())
    if made is not None and kinds and made not in kinds:
        return {}
    first = (modules or convolutions).values()
    ranks, alphas = [one.rank for one in first], [one.alpha for one in first]
    for key, values in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
        if key in said:
            said[key] = _restated(said[key], values)
    told: dict[str, Sequence[float]] = {
        "dim": ranks,
        "conv_dim": [one.rank for one in convolutions.values()],
        "conv_alpha": [one.alpha for one in convolutions.values()],
    }
    true = {key: _restated(str(arguments[key]), values) for key, values in told.items() if key in arguments}
    if changed := {key: text for key, text in true.items() if text != str(arguments[key])}:
        said["ss_network_args"] = json.dumps({**arguments, **changed})
    return said


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a network, which are JSON; none where they are something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _restated(text: str, values: Sequence[float]) -> str:
    """A rank or an alpha as it was said, where most modules have it; else what is true."""
    distinct = {*values}
    if not distinct or (text == _DYNAMIC and len(distinct) > 1):
        return text
    try:
        number = float(text)
    except ValueError:
        return _same(values) if text == _DYNAMIC else text
    return text if math.isclose(number, _most(values), rel_tol=_ROUNDED) else _same(values)


def _same(values: Iterable[float]) -> str:
    """The value all have, as text; "Dynamic" where they differ."""
    distinct = {*values}
    return _number(distinct.pop()) if len(distinct) == 1 else _DYNAMIC


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def diffusers_metadata(
    modules: Mapping[str, ModuleFacts], *, dora: Collection[str] = (), biased: Collection[str] = ()
) -> dict[str, str]:
    """``lora_adapter_metadata`` as diffusers writes and reads it: the LoraConfig of each component, in one JSON.

    >>> json.loads(diffusers_metadata({"unet.a": ModuleFacts(8, 4)})["lora_adapter_metadata"])["unet.lora_alpha"]
    4

    Args:
        modules: by component and path, such as ``transformer.transformer_blocks.0.attn.to_q``.
        dora: those that have a magnitude.
        biased: those whose up matrix has a bias.

    Returns:
        One key, or none where there are no modules.

    Raises:
        Unsupported: in a component some modules have a magnitude and others do not, which a LoraConfig cannot say.
    """
    components: dict[str, dict[str, ModuleFacts]] = {}
    for name, module in modules.items():
        component, _, path = name.partition(".")
        components.setdefault(component, {})[path] = module
    packed: dict[str, Any] = {}
    with_magnitude, with_bias = frozenset(dora), frozenset(biased)
    for component, paths in components.items():
        weighted = {path for path in paths if f"{component}.{path}" in with_magnitude}
        if weighted and len(weighted) < len(paths):
            plain = next(path for path in paths if path not in weighted)
            raise Unsupported(
                f"{component}.{plain} has no DoRA magnitude and others have; diffusers knows all or none",
                hint="normalize, or convert to a format that says it for each module",
            )
        config = _lora_config(paths)
        config["use_dora"] = bool(weighted)
        config["lora_bias"] = any(f"{component}.{path}" in with_bias for path in paths)
        packed |= {f"{component}.{field}": value for field, value in config.items()}
    if not packed:
        return {}
    return {"lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)}


def _lora_config(paths: Mapping[str, ModuleFacts]) -> dict[str, Any]:
    """Rank and alpha that most modules have, and patterns for the others."""
    rank = _most(module.rank for module in paths.values())
    alpha = _most(module.alpha for module in paths.values())
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {_pattern(path): m.rank for path, m in paths.items() if m.rank != rank},
        "alpha_pattern": {_pattern(path): _plain(m.alpha) for path, m in paths.items() if m.alpha != alpha},
        "target_modules": sorted(_target(path) for path in paths),
    }


_TEXT_MODEL = "text_model."  # transformers 5 has no module of this name, older versions and most files have


def _target(path: str) -> str:
    """A module as a LoraConfig names it: PEFT looks for modules that end so."""
    return path.removeprefix(_TEXT_MODEL)


def _pattern(path: str) -> str:
    """The same for the patterns; anchored where the whole path is known, so that it is not the end of another."""
    return _target(path) if path.startswith(_TEXT_MODEL) else f"^{path}"


def _most(values: Iterable[Any]) -> Any:
    """The most frequent value; of equally frequent ones, the first."""
    return Counter(values).most_common(1)[0][0]


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value
