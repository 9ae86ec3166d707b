"""The configuration by itself, and against the modules in the file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from loratools.formats.patterns import Names
from loratools.formats.peft import layer_name, pattern_name, split_key
from loratools.formats.peft_config import COMPUTED
from loratools.verbs.checking.subject import error, few, info, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loratools.adapter import Module
    from loratools.formats.patterns import Patterns
    from loratools.formats.peft_config import PeftConfig
    from loratools.verbs.checking.subject import Subject
    from loratools.verbs.reports import Finding

__all__ = ["check_configuration"]

# The types PEFT has had up to 0.21.
_TYPES = {
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA",
    "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA",
    "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT",
    "PVERA", "P_TUNING", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA",
    "VERA", "WAVEFT", "XLORA",
}  # fmt: skip
_ABSURD_ALPHA = 1e6
_SCALINGS = (1e-4, 1e3)  # beyond these a scaling is more likely a slip than a choice
_BIASES = {"none", "all", "lora_only"}
_LOCAL = re.compile(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:")
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
_REDONE = {"pissa": "PiSSA", "olora": "OLoRA"}
_MOVED_BASES = ("pissa_niter", "corda", "lora_ga", "loftq")
_DEFAULT_MEGATRON = "megatron.core"


def check_configuration(subject: Subject) -> Iterator[Finding]:
    """Everything ``adapter_config.json`` says that cannot be, is probably not meant, or is worth knowing."""
    config = subject.config
    if config is None:
        return
    yield from _identity(subject, config)
    yield from _foreign(subject, config)
    if config.peft_type in COMPUTED:
        yield from _strength(subject, config)
        yield from _mutated_base(subject, config)
    if subject.adapter.modules:
        yield from _targets(subject, config)
        yield from _patterns(subject, config)
        yield from _ranks(subject)
        yield from _dora(subject, config)
        yield from _biases(subject, config)
    yield from _saved(subject, config)
    yield from _tokens(subject, config)


def _identity(subject: Subject, config: PeftConfig) -> Iterator[Finding]:
    if not subject.opened.raw:
        return
    if subject.opened.raw.get("peft_type") is None:
        yield error(
            "peft-type-missing", subject.field("peft_type"), "no peft_type, so PEFT cannot load it; read as LORA here",
            'add "peft_type": "LORA" if that is what it is',
        )  # fmt: skip
    elif config.peft_type not in _TYPES:
        yield warning(
            "peft-type-unknown", subject.field("peft_type"), f"{config.peft_type} is no type PEFT is known to have"
        )  # fmt: skip
    path = config.base_model
    if not path:
        yield info(
            "base-model-missing", subject.field("base_model_name_or_path"),
            "does not say which model it was trained on", "name the base model, for whoever loads it",
        )  # fmt: skip
    elif _LOCAL.match(path):
        yield warning(
            "base-model-local", subject.field("base_model_name_or_path"),
            f"{path} is a path on the machine it was trained on", "name the base model by its Hub id",
        )  # fmt: skip


def _foreign(subject: Subject, config: PeftConfig) -> Iterator[Finding]:
    """Names of Python modules that other tools import when they load the adapter."""
    mapping = config.raw.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if isinstance(library, str) and library:
        yield info(
            "foreign-code", subject.field("auto_mapping.parent_library"),
            f"names the module {library}, which PEFT may import; loratools never does",
        )  # fmt: skip
    core = config.raw.get("megatron_core")
    if core and (config.raw.get("megatron_config") or core != _DEFAULT_MEGATRON):
        yield info(
            "foreign-code", subject.field("megatron_core"),
            f"names the module {core}, which PEFT may import; loratools never does",
        )  # fmt: skip
    for name in ("trust_remote_code", "auto_map", "custom_code"):
        if config.raw.get(name):
            yield info(
                "foreign-code", subject.field(name), "asks for code of its own; loratools never runs any"
            )


def _strength(subject: Subject, config: PeftConfig) -> Iterator[Finding]:
    """Rank, alpha and what becomes of them."""
    field = "alpha" if config.peft_type in {"LOHA", "LOKR"} else "lora_alpha"
    for name, default in (("r", config.rank), (field, config.alpha)):
        if config.raw.get(name) is None and config.peft_type != "ADALORA":
            code = "rank-missing" if name == "r" else "alpha-missing"
            yield warning(
                code, subject.field(name), f"no {name}; PEFT takes its default, {default:g}",
                "add the value it was trained with",
            )  # fmt: skip
    alphas = {field: config.alpha} | {
        f"alpha_pattern[{k!r}]": v for k, v in config.alpha_pattern.table.items()
    }
    for name, alpha in alphas.items():
        if alpha == 0:
            yield error("alpha-zero", subject.field(name), "is 0, so that the adapter does nothing")
        elif alpha < 0:
            yield warning("alpha-negative", subject.field(name), f"is {alpha:g}: the change is subtracted")
        elif alpha > _ABSURD_ALPHA:
            yield warning("alpha-absurd", subject.field(name), f"is {alpha:g}")
    low, high = _SCALINGS
    modules = subject.adapter.modules
    odd = {n: m.scaling for n, m in modules.items() if m.scaling and not low <= abs(m.scaling) <= high}
    if odd:
        name, scaling = next(iter(odd.items()))
        yield warning(
            "scaling-extreme", few(odd), f"scaled by {scaling:g} ({name}): rank and alpha do not fit together"
        )


def _mutated_base(subject: Subject, config: PeftConfig) -> Iterator[Finding]:
    """Initialisations that took something out of the base before training."""
    init = config.init.lower() if isinstance(config.init, str) else ""
    if init in _REDONE:
        yield warning(
            "base-mutated", subject.field("init_lora_weights"),
            f"{_REDONE[init]} trained it against a base without its leading part: merge takes that out first, "
            "which gives the right weights only with the very base it was trained on",
            "adding the delta to the plain base would be wrong, and most other tools do just that",
        )  # fmt: skip
    elif init.startswith(_MOVED_BASES):
        reason, way_out = subject.adapter.refusal or ("was trained against another base", "")
        yield warning(
            "base-mutated", subject.field("init_lora_weights"), f"{reason}; merge refuses it", way_out or None
        )  # fmt: skip
    if config.raw.get("kasa_config"):
        yield warning(
            "base-mutated", subject.field("kasa_config"),
            "KaSA trained it against a base without its smallest singular components: merge takes them out first",
        )  # fmt: skip


def _targets(subject: Subject, config: PeftConfig) -> Iterator[Finding]:
    """``target_modules`` against the modules that are there."""
    modules = list(dict.fromkeys(layer_name(name) for name in subject.adapter.modules))
    owners = {entry.rpartition(".")[0] for entry in config.target_parameters}
    by_parameter = Names(tuple(owners))
    plain = [name for name in modules if not (owners and by_parameter.matches(name))]
    targets = config.target_modules
    if targets and targets.value != "all-linear":
        unnamed = [name for name in plain if not _is_target(name, config)]
        if unnamed:
            yield warning(
                "module-not-targeted", few(unnamed),
                f"{len(unnamed)} of {len(modules)} modules are not named by target_modules: PEFT leaves them out",
                "add them to target_modules",
            )  # fmt: skip
        if not isinstance(targets.value, str):
            ends = {name[start:] for name in plain for start in _starts(name)}
            missing = sorted(set(targets.names) - ends)
            if missing:
                yield warning(
                    "target-unmatched", subject.field("target_modules"), f"no module in the file is {few(missing)}",
                    "were their weights lost, or never trained?",
                )  # fmt: skip
    if config.exclude_modules:
        excluded = [name for name in plain if config.exclude_modules.matches(name)]
        if excluded:
            yield warning("module-excluded", few(excluded), "excluded by exclude_modules, yet in the file")
    unfound = [
        entry for entry in sorted(owners) if not any(Names((entry,)).matches(name) for name in modules)
    ]
    if unfound:
        yield warning(
            "target-unmatched", subject.field("target_parameters"), f"no module in the file is {few(unfound)}"
        )


def _starts(name: str) -> Iterator[int]:
    yield 0
    yield from (found.end() for found in re.finditer(r"\.", name))


def _is_target(name: str, config: PeftConfig) -> bool:
    """PEFT's ``check_target_module_exists``, but for what it excludes."""
    if not config.target_modules.matches(name):
        return False
    indices, patterns = config.raw.get("layers_to_transform"), config.raw.get("layers_pattern")
    exact = not isinstance(config.target_modules.value, str) and name in config.target_modules.names
    if exact or isinstance(config.target_modules.value, str) or indices in (None, []):
        return True
    if patterns:  # a pattern of layers: not followed here
        return True
    layer = _LAYER.match(name)
    wanted = indices if isinstance(indices, list) else [indices]
    return layer is not None and int(layer["index"]) in wanted


def _patterns(subject: Subject, config: PeftConfig) -> Iterator[Finding]:
    names = [pattern_name(name, config) for name in subject.adapter.modules]
    fields: Mapping[str, Patterns] = {
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    for field, patterns in fields.items():
        used = {patterns.first_key(name) for name in names} if len(patterns) else set()
        unused = [key for key in patterns.table if key not in used]
        if unused:
            yield warning(
                "pattern-unmatched", subject.field(field),
                f"decides for no module (it matches none, or an earlier one matches first): {few(unused)}",
            )  # fmt: skip


def _ranks(subject: Subject) -> Iterator[Finding]:
    for name, module in subject.adapter.modules.items():
        wanted = module.options.get("config_rank")
        if wanted is not None:
            yield error(
                "rank-mismatch", name, f"has rank {module.rank} in the file and {wanted} in the configuration",
                "is this the configuration the weights were saved with?",
            )  # fmt: skip


def _dora(subject: Subject, config: PeftConfig) -> Iterator[Finding]:
    """``use_dora`` against the magnitude vectors."""
    if config.peft_type != "LORA":
        return
    modules = subject.adapter.modules
    without = [name for name, module in modules.items() if module.kind == "lora"]
    having = [name for name, module in modules.items() if module.kind == "dora"]
    if config.use_dora and without:
        yield error(
            "dora-without-magnitude", few(without),
            f"use_dora, and {len(without)} of {len(modules)} modules have no magnitude vector",
        )  # fmt: skip
    if not config.use_dora and having:
        yield error(
            "magnitude-without-dora", few(having),
            f"{len(having)} modules have magnitude vectors, and use_dora is off: PEFT would not apply them",
            "set use_dora to true",
        )  # fmt: skip


def _biases(subject: Subject, config: PeftConfig) -> Iterator[Finding]:
    modules: Mapping[str, Module] = subject.adapter.modules
    having = [name for name, module in modules.items() if "up_bias" in module.tensors]
    said = bool(config.raw.get("lora_bias"))
    if said and not having:
        yield warning("bias-missing", subject.field("lora_bias"), "lora_bias, and no module has a bias")
    if having and not said:
        yield error(
            "bias-not-declared", few(having), "lora_B has a bias, and lora_bias is off: PEFT would not load it",
            "set lora_bias to true",
        )  # fmt: skip
    if config.peft_type == "LORA" and config.bias not in _BIASES:
        yield warning(
            "bias-unknown", subject.field("bias"), f"{config.bias!r} is none of {', '.join(sorted(_BIASES))}"
        )
    if config.bias in {"all", "lora_only"}:
        trained = any(
            e.role == "replacement" and e.reason.startswith("bias=") for e in subject.adapter.extras.values()
        )
        if not trained:
            yield warning(
                "bias-missing", subject.field("bias"), f"bias={config.bias}, and the file holds no bias"
            )


def _saved(subject: Subject, config: PeftConfig) -> Iterator[Finding]:
    """``modules_to_save`` against the tensors that are no factors."""
    listed = list(config.modules_to_save)
    if twice := sorted({name for name in listed if listed.count(name) > 1}):
        yield info("duplicate-entry", subject.field("modules_to_save"), f"{few(twice)} stands there twice")
    replaced = [extra.target for extra in subject.adapter.extras.values() if extra.role == "replacement"]
    missing = [
        name for name in dict.fromkeys(listed) if not any(f".{name}." in f".{target}" for target in replaced)
    ]
    if not missing:
        return
    # PEFT lists both names a classification head may have; one of them is there.
    usual = {"classifier", "score"} >= set(missing) and len(missing) < len(set(listed))
    message = f"no tensor of {few(missing)} is in the file"
    if usual:
        yield info("saved-module-absent", subject.field("modules_to_save"), message)
    else:
        yield warning(
            "saved-module-absent", subject.field("modules_to_save"), message,
            "without it the base's own values are used, untrained",
        )  # fmt: skip


def _tokens(subject: Subject, config: PeftConfig) -> Iterator[Finding]:
    """``trainable_token_indices`` against the rows."""
    rows: dict[str, Any] = {k: e for k, e in subject.adapter.extras.items() if e.role == "token_rows"}
    for key, extra in rows.items():
        shape, indices = extra.tensor.shape, extra.indices
        count = shape[0] if shape else 0
        if len(indices) != count:
            yield error(
                "token-rows-mismatch", key, f"{count} rows, and the configuration names {len(indices)} tokens",
                "trainable_token_indices must be those of training, in their order",
            )  # fmt: skip
        elif len(set(indices)) != len(indices):
            yield warning("token-twice", key, "a token is named twice: the last of its rows wins")
    if config.token_indices and not rows:
        yield warning(
            "token-rows-missing", subject.field("trainable_token_indices"), "names tokens, and the file holds no rows"
        )  # fmt: skip
    strange = [key for key in rows if split_key(key) is not None]
    if strange:
        yield error("token-rows-mismatch", few(strange), "both rows of tokens and a factor")
