"""Engines and their rules, read from ``data/*.toml``; and :func:`judge`, which puts an adapter to them.

A rule names a check (a function of :mod:`loratools.engines.checks`), its parameters, and what it means where the check
finds something: whether the engine still loads the adapter, whether it computes the same, what to say, which serving
flag to set and which command mends it. What an engine does is told by the version that was read; the file says which.
Nothing here knows a file format: :class:`Facts` are gathered elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from loratools.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from loratools.adapter import Adapter

__all__ = [
    "NAMES",
    "Answer",
    "BaseFacts",
    "Engine",
    "Facts",
    "Found",
    "Hit",
    "Rule",
    "Verdict",
    "engine",
    "judge",
]

Answer = Literal["yes", "no", "unknown"]
# In the order of `loratools engines`: servers of language models, then of images, then the library all came from.
NAMES = (
    "vllm", "sglang", "llama.cpp", "mlx", "ollama", "lorax", "tensorrt-llm", "diffusers", "comfyui", "sd-scripts",
    "peft",
)  # fmt: skip
_ALIASES = {
    "llama-cpp": "llama.cpp", "llamacpp": "llama.cpp", "mlx-lm": "mlx", "trtllm": "tensorrt-llm",
    "trt-llm": "tensorrt-llm", "tensorrt": "tensorrt-llm", "comfy": "comfyui", "kohya": "sd-scripts",
    "sd_scripts": "sd-scripts",
}  # fmt: skip
_DATA = Path(__file__).with_name("data")
_NORMALIZE, _CONVERT, _BASE = "loratools normalize ", "loratools convert ", " --base BASE"
_MERGE = "loratools merge BASE {ref} MERGED"
_MOST = 8_000  # characters of an interpolated value; names come from files


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What a base model's headers and configuration say about an adapter.

    Attributes:
        name: of it.
        family: ``model_type`` of its configuration; empty where it has none.
        architecture: what GGUF calls that family; empty where it is not known.
        layers: of the decoder; None where neither its configuration nor its weights tell.
        tied: whether input and output embedding are one weight.
        vocabulary: rows of its input embedding; None where that is not found.
        unmatched: keys of the adapter that nothing in it answers to.
        renamed: how the adapter's names had to be changed to be found, in words; empty where they fit.
        misfits: by module, the shape of its delta and that of the weight.
    """

    name: str
    family: str = ""
    architecture: str = ""
    layers: int | None = None
    tied: bool = False
    vocabulary: int | None = None
    unmatched: tuple[str, ...] = ()
    renamed: str = ""
    misfits: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """An adapter, and what of its files an engine looks at.

    Attributes:
        adapter: as read.
        ref: what a user would type for it.
        config: its configuration: beside the weights, or in their metadata.
        suffix: of the weight file, such as ``.safetensors``; empty in memory.
        named: keys that carry the adapter's name, as a state dict in memory has them.
        unprefixed: keys without PEFT's prefix, in a PEFT adapter.
        doubled: keys that have it twice.
        unpaired: factors without the one they belong to.
        added_tokens: ids of the tokens that a tokenizer beside the adapter adds.
        beyond_half: tensors with a value that half precision cannot hold.
        base: of the model, where one is given.
    """

    adapter: Adapter
    ref: str
    config: Mapping[str, Any]
    suffix: str = ""
    named: tuple[str, ...] = ()
    unprefixed: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()
    unpaired: tuple[str, ...] = ()
    added_tokens: tuple[int, ...] = ()
    beyond_half: tuple[str, ...] = ()
    base: BaseFacts | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Where a check found what it looks for.

    Attributes:
        where: in the adapter; empty where it is the whole.
        words: for the rule's message.
        mendable: whether the rule's fix can help.
    """

    where: str
    words: Mapping[str, object] = field(default_factory=dict)
    mendable: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """What an engine does with one feature.

    Attributes:
        id: a stable code, the same for a feature in all engines.
        check: a function of :mod:`loratools.engines.checks`.
        parameters: of the check.
        loads: whether the engine loads an adapter with it.
        same_maths: whether it then computes what PEFT computes.
        severity: of the finding.
        message: a sentence; the check's words stand in braces.
        evidence: how it is known: ``source``, ``measured``, ``thread``, ``inferred``.
        source: a URL: of a thread, or of what was read.
        versions: for which versions, where not for all from the one that was read.
        flag: what to set when serving.
        fix: the command that mends it.
        formats: it concerns adapters of these formats only.
    """

    id: str
    check: str
    parameters: Mapping[str, Any]
    loads: Answer
    same_maths: Answer
    severity: str
    message: str
    evidence: str
    source: str
    versions: str = ""
    flag: str = ""
    fix: str = ""
    formats: tuple[str, ...] = ()

    @property
    def silent(self) -> bool:
        """Whether the engine may load it, and computes something else."""
        return self.loads != "no" and self.same_maths == "no"


@dataclass(frozen=True, slots=True)
class Engine:
    """A program that loads adapters.

    Attributes:
        name: as ``--for`` takes it.
        title: as its makers write it.
        version: that was read.
        source: where.
        opens: which files.
        scale: what it multiplies a delta by.
        ranks: its limit.
        formats: dialects it reads.
        convert: what ``convert --to`` takes for it.
        plain: what ``normalize --for`` has to do beyond making factors plain: ``pad``, ``whole_alpha``,
            ``list_targets``, ``drop_copies``.
        rules: in the order of the file.
    """

    name: str
    title: str
    version: str
    source: str
    opens: str
    scale: str
    ranks: str
    formats: tuple[str, ...]
    convert: str
    plain: frozenset[str]
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Hit:
    """A rule that applies to an adapter, in words."""

    rule: Rule
    where: str
    message: str
    fix: str
    flag: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an engine would do with an adapter.

    Attributes:
        engine: which.
        loads: whether it loads.
        same_maths: whether it then computes what PEFT computes; ``unknown`` where it does not load, unless what it
            would compute is known to be something else.
        flags: to set when serving.
        hits: the rules that apply.
    """

    engine: Engine
    loads: Answer
    same_maths: Answer
    flags: tuple[str, ...]
    hits: tuple[Hit, ...]


def judge(engine: Engine, facts: Facts) -> Verdict:
    """Put an adapter to an engine's rules."""
    hits = _advised(engine, facts, [hit for rule in engine.rules for hit in _hits(rule, facts)])
    loads = _worst(hit.rule.loads for hit in hits)
    maths = _worst(hit.rule.same_maths for hit in hits)
    if loads == "no" and maths == "yes":
        maths = "unknown"
    flags = tuple(dict.fromkeys(hit.flag for hit in hits if hit.flag))
    return Verdict(engine, loads, maths, flags, tuple(hits))


def _hits(rule: Rule, facts: Facts) -> list[Hit]:
    from loratools.engines.checks import CHECKS

    if rule.formats and facts.adapter.format not in rule.formats:
        return []
    hits = []
    for found in CHECKS[rule.check](facts, **rule.parameters):
        words = {"ref": facts.ref, **found.words}
        message, flag = _fill(rule.message, words), _fill(rule.flag, words)
        fix = _fill(rule.fix, words) if found.mendable else ""
        hits.append(Hit(rule, found.where, message, fix, flag))
    return hits


def _advised(engine: Engine, facts: Facts, hits: list[Hit]) -> list[Hit]:
    """The hits with fixes that work together: one that needs the base makes all need it; none that is refused."""
    from loratools.engines.checks import has_no_place

    needs_base = any(hit.fix.startswith(_NORMALIZE) and hit.fix.endswith(_BASE) for hit in hits)
    stuck = has_no_place(facts, engine.convert)
    advised = []
    for hit in hits:
        fix = hit.fix
        if needs_base and fix.startswith(_NORMALIZE) and not fix.endswith(_BASE):
            fix += _BASE
        elif stuck and fix.startswith(_CONVERT):
            fix = _fill(_MERGE, {"ref": facts.ref})
        advised.append(replace(hit, fix=fix))
    return advised


def _fill(text: str, words: Mapping[str, object]) -> str:
    return text.format_map({name: str(word)[:_MOST] for name, word in words.items()}) if text else ""


def _worst(answers: Iterable[Answer]) -> Answer:
    order: tuple[Answer, ...] = ("yes", "unknown", "no")
    return max(answers, key=order.index, default="yes")


# --- the data ----------------------------------------------------------------------------------------------


def known(name: str) -> str | None:
    """An engine's name by any of its names; None where there is none.

    >>> known("llama-cpp"), known("vLLM"), known("triton")
    ('llama.cpp', 'vllm', None)
    """
    lower = name.strip().lower()
    found = _ALIASES.get(lower, lower)
    return found if found in NAMES else None


def engine(name: str) -> Engine:
    """An engine by its name, or another of its names.

    >>> engine("vllm").title, [rule.id for rule in engine("sglang").rules if rule.check == "rslora"]
    ('vLLM', ['scale-rslora'])

    Raises:
        Unsupported: there is none; lists those that are.
    """
    found = known(name)
    if found is None:
        raise Unsupported(f"no engine {name!r} is known", hint=f"known are {', '.join(NAMES)}")
    return _read(found)


@cache
def _read(name: str) -> Engine:
    import tomllib

    raw = tomllib.loads((_DATA / f"{name}.toml").read_text(encoding="utf-8"))
    return Engine(
        name=name,
        title=raw["title"],
        version=raw["version"],
        source=raw["source"],
        opens=raw["opens"],
        scale=raw["scale"],
        ranks=raw["ranks"],
        formats=tuple(raw["formats"]),
        convert=raw["convert"],
        plain=frozenset(raw.get("plain", ())),
        rules=tuple(_rule(entry, raw["source"]) for entry in raw["rule"]),
    )


_FIELDS = {
    "id", "check", "loads", "same_maths", "severity", "message", "evidence", "source", "versions", "flag", "fix",
    "formats",
}  # fmt: skip


def _rule(entry: Mapping[str, Any], source: str) -> Rule:
    """A rule of the file; what is no field of its own is a parameter of its check."""
    loads, maths = (cast("Answer", entry.get(name, "yes")) for name in ("loads", "same_maths"))
    return Rule(
        id=entry["id"],
        check=entry["check"],
        parameters={name: value for name, value in entry.items() if name not in _FIELDS},
        loads=loads,
        same_maths=maths,
        severity=entry.get("severity") or _severity(loads, maths),
        message=entry["message"],
        evidence=entry.get("evidence", "source"),
        source=entry.get("source", source),
        versions=entry.get("versions", ""),
        flag=entry.get("flag", ""),
        fix=entry.get("fix", ""),
        formats=tuple(entry.get("formats", ())),
    )


def _severity(loads: Answer, maths: Answer) -> str:
    if "no" in (loads, maths):
        return "error"
    return "warning" if "unknown" in (loads, maths) else "info"
