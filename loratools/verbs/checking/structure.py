"""Keys and shapes: what is there that should not be, and what is missing from it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loratools.formats.dialects import BARE
from loratools.formats.peft import PREFIX, ROLES, broken_modules
from loratools.formats.reading import DIALECTS, NO_ALPHA, broken_groups, metadata_faults
from loratools.tensors.pickled import SUFFIXES
from loratools.verbs.checking.subject import error, few, info, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratools.formats.peft_config import PeftConfig
    from loratools.verbs.checking.subject import Subject
    from loratools.verbs.reports import Finding

__all__ = ["check_format", "check_siblings", "check_structure", "name_in_key"]

_NAMED = re.compile(
    rf"\.(?:{'|'.join(sorted({k.split('.')[0] for k in ROLES}))})\.(?!weight$|bias$)(?P<name>[^.]+)"
)
_LANGUAGE = ("mlx", "gguf", "loralib")
_TRAINER = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "trainer_state")
_PICKLES = (*SUFFIXES, ".pkl", ".pickle", ".joblib")
_ZERO3_HINT = "save again with the parameters gathered, as zero3_save_16bit_model does"


def check_format(subject: Subject) -> Iterator[Finding]:
    """What the file is, where it is not an adapter this build computes with."""
    adapter = subject.adapter
    if adapter.refusal is None or (subject.config is not None and not _refused_as_a_whole(subject)):
        return
    reason, way_out = adapter.refusal
    if adapter.format == BARE:
        yield error(
            "config-missing", adapter.name,
            "PEFT factors without adapter_config.json: nothing says how they are scaled",
            "put its adapter_config.json beside it, or pass --config",
        )  # fmt: skip
    elif adapter.format in {"unknown", "stripped"}:
        yield error("format-unknown", adapter.name, f"{adapter.kinds[0]}: {adapter.evidence}")
    elif "is broken" in reason:
        if adapter.format not in DIALECTS:  # those tell every fault below
            yield error("factors-broken", adapter.name, reason, way_out)
    elif adapter.modules or adapter.format in {"peft", *DIALECTS}:
        yield warning("refused", adapter.name, reason, way_out)
    else:
        yield warning(
            "not-an-adapter", adapter.name,
            f"{adapter.kinds[0]} ({adapter.evidence}), not a LoRA; this build checks its values and no more",
        )  # fmt: skip


def _refused_as_a_whole(subject: Subject) -> bool:
    """Whether the refusal is of the kind of adapter, and not of a broken part or a base, reported elsewhere."""
    config = subject.config
    assert config is not None
    init = config.init.lower() if isinstance(config.init, str) else ""
    moved = init.startswith(("pissa_niter", "corda", "lora_ga", "loftq"))
    return not moved and "is broken" not in (subject.adapter.refusal or ("",))[0]


def check_structure(subject: Subject) -> Iterator[Finding]:
    """The tensors of the file."""
    source = subject.opened.source
    if not source.specs:
        yield error(
            "no-tensors",
            subject.adapter.name,
            "the file holds no tensors",
            "was it saved by all processes at once?",
        )
        return
    yield from _dtypes(subject)
    config = subject.config
    if config is None:
        if subject.adapter.format in DIALECTS:
            yield from _dialect(subject)
        elif subject.adapter.format in _LANGUAGE:
            yield from _left_over(subject)
        return
    broken = broken_modules(source, config)
    for path, (problem, keys) in broken.items():
        hint = _ZERO3_HINT if problem.code in {"empty-factor", "factor-dimensions"} else None
        yield error(problem.code, path, problem.text + f" ({few(keys)})", hint)
    yield from _unclaimed(subject, {key for _, keys in broken.values() for key in keys})
    yield from _prefixes(subject)
    if subject.adapter.kinds == ("ia3",):
        yield info("not-a-lora", subject.adapter.name, "IA3 multiplies weights rather than adding to them")
    if not subject.adapter.modules and not broken and _expects_modules(config):
        yield error(
            "no-modules", subject.adapter.name,
            f"none of {len(source.specs)} tensors is a factor of a {config.peft_type}"
        )  # fmt: skip


def _dialect(subject: Subject) -> Iterator[Finding]:
    """Modules that cannot be one, keys of no module, and what nothing in the file says."""
    adapter = subject.adapter
    faults = metadata_faults(adapter.metadata)
    if not adapter.modules and not faults and "is broken" not in (adapter.refusal or ("",))[0]:
        return  # something else that PEFT writes
    broken = broken_groups(subject.opened.source)
    for problem, keys in broken.values():
        hint = _ZERO3_HINT if problem.code == "empty-factor" else None
        yield error(problem.code, keys[0], problem.text, hint)
    for fault in faults:
        yield error("metadata-invalid", adapter.name, fault, "correct the metadata, or remove them")
    known = {key for _, keys in broken.values() for key in keys}
    for key, extra in adapter.extras.items():
        if extra.role == "unclaimed" and key not in known:
            code = "duplicate-factor" if "under another name" in extra.reason else "unclaimed-key"
            yield error(code, key, extra.reason, "loaders would leave it out unseen")
    for text in adapter.warnings:
        if text.startswith(NO_ALPHA):
            yield info("alpha-not-stored", adapter.name, text)
        else:
            yield warning("names-mixed", adapter.name, text)


def _left_over(subject: Subject) -> Iterator[Finding]:
    """Keys of no module, in formats whose readers say why."""
    for key, extra in subject.adapter.extras.items():
        if extra.role == "unclaimed":
            yield error("unclaimed-key", key, extra.reason, "loaders would leave it out unseen")


def _expects_modules(config: PeftConfig) -> bool:
    return config.peft_type in {"LORA", "ADALORA", "IA3", "LOHA", "LOKR"}


def _unclaimed(subject: Subject, broken: set[str]) -> Iterator[Finding]:
    if subject.config is None or not _expects_modules(subject.config):
        return
    for key, extra in subject.adapter.extras.items():
        if extra.role != "unclaimed" or key in broken:
            continue
        if "under another name" in extra.reason:
            yield error("duplicate-factor", key, extra.reason, "remove one of them")
        else:
            yield error(
                "unclaimed-key", key, extra.reason,
                "merge refuses it unless --allow-unmatched names it; PEFT would leave it out unseen",
            )  # fmt: skip


def name_in_key(key: str) -> str | None:
    """The adapter's name, where a key carries it.

    >>> name_in_key("base_model.model.fc.lora_A.default.weight"), name_in_key("base_model.model.fc.lora_A.weight")
    ('default', None)
    """
    found = _NAMED.search(key)
    return None if found is None else found["name"]


def _prefixes(subject: Subject) -> Iterator[Finding]:
    """How keys depart from what PEFT writes; all of it is understood."""
    keys = list(subject.opened.source.specs)
    plain = [key for key in keys if not key.startswith(PREFIX)]
    doubled = [key for key in keys if key.startswith(PREFIX * 2)]
    named = sorted({name for key in keys if (name := name_in_key(key))})
    if plain:
        code = "prefix-missing" if len(plain) == len(keys) else "prefix-mixed"
        yield info(
            code,
            few(plain, 2),
            f"{len(plain)} of {len(keys)} keys do not begin with {PREFIX}; PEFT expects it",
        )
    if doubled:
        yield info(
            "prefix-doubled", few(doubled, 2), f"{len(doubled)} of {len(keys)} keys begin with {PREFIX} twice"
        )
    if named:
        yield info(
            "adapter-name-in-keys", few(named), "keys carry the adapter's name; PEFT drops it when it saves"
        )


def _dtypes(subject: Subject) -> Iterator[Finding]:
    factors = [
        (name, role, ref)
        for name, module in subject.adapter.modules.items()
        for role, ref in module.factors.items()
    ]
    for name, role, ref in factors:
        if ref.spec.dtype.kind != "float":
            yield error("factor-dtype", ref.name, f"{role} of {name} is {ref.spec.dtype}, expected a float")
    names = {ref.spec.dtype.name for _, _, ref in factors}
    if len(names) > 1:
        yield info(
            "mixed-dtypes", subject.adapter.name, f"factors of several types: {', '.join(sorted(names))}"
        )


def check_siblings(subject: Subject) -> Iterator[Finding]:
    """What lies beside the weights that other tools may run."""
    weights = subject.opened.weights
    if weights is None:
        return
    if weights.suffix in SUFFIXES:
        yield warning(
            "pickled-weights", weights.name, "a pickle can run code when it is opened", "save it as safetensors"
        )  # fmt: skip
    folder = weights if weights.is_dir() else weights.parent
    if subject.opened.config_path is None and not weights.is_dir():
        return  # a file among others: what lies beside it is not part of it
    beside = sorted(path.name for path in folder.iterdir() if path.name != weights.name)
    pickles = [name for name in beside if name.endswith(_PICKLES)]
    trainers = [name for name in pickles if name.startswith(_TRAINER)]
    others = [name for name in pickles if name not in trainers]
    code = [name for name in beside if name.endswith(".py")]
    if others:
        yield warning(
            "pickle-beside", few(others), "pickles beside the weights can run code when they are opened"
        )
    if trainers:
        yield info(
            "trainer-state-beside", few(trainers), "a trainer's own pickles: not needed to load the adapter"
        )
    if code:
        yield warning("code-beside", few(code), "Python files beside the weights; loratools never runs them")
