"""The adapter against the programs that are to load it: facts gathered here, rules read from the engines' files."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.binding import bind
from loratools.engines.base import BaseFacts, Facts, engine, judge
from loratools.errors import LoratoolsError, Mismatch, ShapeMismatch, UnmatchedModules, Unsupported
from loratools.formats.peft import PREFIX
from loratools.models import quantisation_scheme
from loratools.tensors.files import read_whole
from loratools.verbs.checking.structure import name_in_key
from loratools.verbs.checking.subject import info
from loratools.verbs.reports import EngineAnswer, Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from loratools.adapter import Adapter
    from loratools.engines.base import Verdict
    from loratools.formats.opening import Opened
    from loratools.models import BaseModel

__all__ = ["answers", "base_facts", "check_engines", "gather", "verdicts"]

_TOKENS = "added_tokens.json"
_MAX_TOKENS = 64_000_000  # bytes
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_LAYER = re.compile(r"\.(\d{1,5})\.")
_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration


def verdicts(
    opened: Opened,
    adapter: Adapter,
    base: BaseModel | None,
    names: Sequence[str],
    *,
    beyond_half: tuple[str, ...] = (),
) -> tuple[Verdict, ...]:
    """What each engine would do with an adapter, in the order asked; ``beyond_half`` as :func:`gather` takes it.

    Raises:
        Unsupported: no such engine is known.
    """
    engines = {one.name: one for one in map(engine, names)}
    if not engines:
        return ()
    facts = gather(
        adapter,
        opened.source.specs,
        ref=_typed(opened),
        suffix="" if opened.weights is None else opened.weights.suffix,
        added_tokens=_added_tokens(opened),
        beyond_half=beyond_half,
        base=None if base is None else base_facts(adapter, base),
    )
    return tuple(judge(one, facts) for one in engines.values())


def check_engines(found: Sequence[Verdict], base: BaseModel | None) -> Iterator[Finding]:
    """What the engines' rules say, rule by rule."""
    if found and base is None:
        yield info(
            "base-not-given", "", "names, shapes and vocabulary are compared with the model's where it is given",
            "give the model: --base BASE",
        )  # fmt: skip
    for verdict in found:
        for hit in verdict.hits:
            yield Finding(
                hit.rule.id, hit.rule.severity, hit.where, hit.message, hit.fix or None, verdict.engine.name
            )


def answers(found: Sequence[Verdict]) -> tuple[EngineAnswer, ...]:
    """The verdicts as a report has them."""
    return tuple(EngineAnswer(v.engine.name, v.loads, v.same_maths, v.flags) for v in found)


def gather(
    adapter: Adapter,
    keys: Iterable[str],
    *,
    ref: str = "REF",
    suffix: str = ".safetensors",
    added_tokens: tuple[int, ...] = (),
    beyond_half: tuple[str, ...] = (),
    base: BaseFacts | None = None,
) -> Facts:
    """What engines look at.

    Args:
        adapter: as read, or as it would be written.
        keys: of its file.
        ref: what a user types for it.
        suffix: of the file.
        added_tokens: ids of the tokens added beside it.
        beyond_half: tensors with a value that half precision cannot hold.
        base: of the model, where one is given.
    """
    listed = list(keys)
    peft = adapter.format in {"peft", "bare-peft"}
    unpaired = [
        e.target
        for e in adapter.extras.values()
        if e.role == "unclaimed" and "without the factor" in e.reason
    ]
    return Facts(
        adapter=adapter,
        ref=ref,
        config=_config(adapter),
        suffix=suffix,
        named=tuple(key for key in listed if peft and name_in_key(key)),
        unprefixed=tuple(key for key in listed if peft and not key.startswith(PREFIX)),
        doubled=tuple(key for key in listed if peft and key.startswith(PREFIX * 2)),
        unpaired=tuple(dict.fromkeys(unpaired)),
        added_tokens=added_tokens,
        beyond_half=beyond_half,
        base=base,
    )


def _config(adapter: Adapter) -> dict[str, Any]:
    """The configuration; of diffusers, without the component's name before each field."""
    if adapter.config.raw or _METADATA not in adapter.metadata:
        return dict(adapter.config.raw)
    try:
        raw = json.loads(adapter.metadata[_METADATA])
    except (ValueError, RecursionError):
        return {}
    return (
        {name.partition(".")[2] or name: value for name, value in raw.items()}
        if isinstance(raw, dict)
        else {}
    )


def _typed(opened: Opened) -> str:
    """What to type for it in a command."""
    return "REF" if opened.weights is None else shlex.quote(opened.name)


def _added_tokens(opened: Opened) -> tuple[int, ...]:
    if opened.weights is None:
        return ()
    folder = opened.weights if opened.weights.is_dir() else opened.weights.parent
    path = folder / _TOKENS
    if not path.is_file() or (opened.config_path is not None and opened.config_path.parent != folder):
        return ()
    try:
        listed = json.loads(read_whole(path, _MAX_TOKENS))
    except (LoratoolsError, OSError, ValueError, RecursionError):
        return ()
    ids = listed.values() if isinstance(listed, dict) else ()
    return tuple(token for token in ids if type(token) is int)


# --- the base ----------------------------------------------------------------------------------------------


def base_facts(adapter: Adapter, base: BaseModel) -> BaseFacts:
    """What a base says about an adapter, from headers alone."""
    kind = str(base.config.get("model_type") or "")
    known = BaseFacts(
        base.name,
        kind,
        architecture=_architecture(kind),
        layers=_layers(base),
        tied=base.tie is not None,
        vocabulary=_vocabulary(base),
    )
    if not adapter.modules or quantisation_scheme(base) is not None:
        return known
    faults: list[tuple[str, Mismatch]] = []
    unmatched: tuple[str, ...] = ()
    words = ""
    try:
        binding = bind(adapter, base, faults)
    except UnmatchedModules as problem:
        unmatched = problem.names
    except (Mismatch, Unsupported):
        pass  # a finding of its own
    else:
        words = binding.renamed
        unclaimed = {key for key, extra in adapter.extras.items() if extra.role == "unclaimed"}
        unmatched = tuple(key for key in binding.unmatched if key not in unclaimed)
    misfits = {name: (f.delta, f.weight) for name, f in faults if isinstance(f, ShapeMismatch)}
    return replace(known, unmatched=unmatched, renamed=words, misfits=misfits)


def _architecture(kind: str) -> str:
    """What GGUF calls a family of models; empty where this build does not write GGUF for it."""
    from loratools.formats.gguf import MODELS

    return next((model.architecture for model in MODELS if kind in model.types), "")


def _layers(base: BaseModel) -> int | None:
    """How many layers its decoder has, by its configuration, else by its weights' names."""
    inner = base.config.get("text_config")
    config = {**base.config, **inner} if isinstance(inner, dict) else base.config
    for field in _LAYER_COUNTS:
        if type(config.get(field)) is int:
            return int(config[field])
    return max(
        (int(found[1]) + 1 for name in base.source.specs if (found := _LAYER.search(name))), default=None
    )


def _vocabulary(base: BaseModel) -> int | None:
    for name, spec in base.source.specs.items():
        owner = Path(name).name.removesuffix(".weight").rpartition(".")[2]
        if owner in _EMBEDDINGS and name.endswith(".weight") and len(spec.shape) == 2:
            return spec.shape[0]
    size = base.config.get("vocab_size")
    return size if type(size) is int else None
