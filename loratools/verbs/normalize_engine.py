"""What an engine needs beyond plain factors, for ``normalize --for``; what it cannot take is refused by name."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools.binding import bind
from loratools.engines.base import judge
from loratools.engines.checks import layer_holes
from loratools.errors import Unsupported
from loratools.formats.gguf import read_gguf_bytes
from loratools.formats.opening import Opened, interpret
from loratools.formats.peft_config import CONFIG_NAME
from loratools.formats.peft_writing import write_peft
from loratools.formats.registry import find_format
from loratools.tensors.base import TensorRef, TensorSpec
from loratools.verbs.checking.engines import base_facts, gather
from loratools.verbs.checking.values import beyond_half
from loratools.verbs.normalize_planning import HALVES
from loratools.verbs.reports import EngineAnswer
from loratools.verbs.saving import input_paths, settled, view_written, write

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loratools.adapter import Adapter, Module
    from loratools.engines.base import BaseFacts, Engine, Facts, Hit
    from loratools.models import BaseModel
    from loratools.targets import Binding

__all__ = ["adjust", "facts_of_base", "require_accepted", "require_fixable", "seen_as", "whole_unit"]

_MENDS, _WITH_BASE = "loratools normalize ", " --base BASE"
_NUMBER = re.compile(r"\.\d{1,5}\.")


def facts_of_base(adapter: Adapter, model: BaseModel | None) -> BaseFacts | None:
    """What the base says about an adapter, where one is given."""
    return None if model is None else base_facts(adapter, model)


def seen_as(adapter: Adapter, form: str, base_config: Mapping[str, Any] | None) -> Adapter:
    """The adapter as a reader finds it when it is written in another format.

    Raises:
        Unsupported: that format cannot express it.
    """
    if adapter.format == form:
        return adapter
    made = write(adapter, form, base_config=base_config)
    whole = made.files.get(made.weights)
    if whole is not None:
        return replace(read_gguf_bytes(adapter.name, whole), name=adapter.name)
    raw = json.loads(made.files.get(CONFIG_NAME, b"{}"))
    return interpret(Opened(adapter.name, view_written(made), raw, "its configuration"))


def require_fixable(
    engine: Engine, adapter: Adapter, base: BaseFacts | None, *, rank: int | None, to: str | None
) -> None:
    """Refuse what the engine refuses or gets wrong and no plain form changes, before anything is computed.

    Raises:
        Unsupported: the first such thing, and the way out; or it does not read the format that is asked for.
    """
    if to is not None and find_format(to).name not in engine.formats:
        raise Unsupported(f"{engine.title} does not read {to}", hint=f"it reads {', '.join(engine.formats)}")
    judged = replace(adapter, format=settled(adapter, to))
    facts = gather(judged, [ref.name for ref in adapter.tensors], ref=_typed(adapter), base=base)
    for hit in _errors(engine, facts):
        lowered = hit.rule.check == "rank_above" and rank is not None
        padded = hit.rule.check == "mixed_rank" and "pad" in engine.plain
        if not lowered and not padded and not hit.fix.startswith(_MENDS):
            raise _refusal(engine, adapter, hit)


def adjust(engine: Engine, adapter: Adapter, model: BaseModel | None) -> tuple[dict[str, str], Adapter]:
    """The adapter with the names and the list of targets that the engine looks for.

    Returns:
        Modules whose name changed, old to new; and the adapter.
    """
    binding = None if model is None else bind(adapter, model)
    renamed = {} if binding is None else dict(_renamed(adapter, binding))
    modules = {renamed.get(name, name): module for name, module in adapter.modules.items()}
    if binding is not None and model is not None:
        for name, place, like in _lacking(engine, adapter, binding, model):
            found = place.removesuffix(".weight") if renamed else name
            modules[found] = _zeros(like, found, _shape(place, like, model))
    extras = adapter.extras
    if "drop_copies" in engine.plain:
        extras = {key: extra for key, extra in extras.items() if extra.role != "base_copy"}
    raw = dict(adapter.config.raw)
    targets = raw.get("target_modules")
    if "list_targets" in engine.plain and isinstance(targets, str) and targets not in {"all", "all-linear"}:
        raw["target_modules"] = sorted({name.rpartition(".")[2] for name in modules})
    config = replace(adapter.config, raw=raw)
    return renamed, replace(adapter, modules=modules, extras=extras, config=config)


def _lacking(
    engine: Engine, adapter: Adapter, binding: Binding, model: BaseModel
) -> Iterator[tuple[str, str, Module]]:
    """What an engine cannot do without: projections it stacks with others, modules that only some layers have.

    Yields:
        The name of a module, its weight, and a module that it is to be like.
    """
    weights = {term.name: weight for weight, terms in binding.terms.items() for term in terms}
    for rule in engine.rules:
        if rule.check != "packed_partly":
            continue
        for name, module in adapter.modules.items():
            owner, _, last = name.rpartition(".")
            weight = weights.get(name, "")
            if last not in rule.parameters["members"] or module.kind != "lora" or not module.rank:
                continue
            for needed in rule.parameters["needed"]:
                place = f"{weight.removesuffix(f'{last}.weight')}{needed}.weight"
                if f"{owner}.{needed}" not in adapter.modules and place in model.source.specs:
                    yield f"{owner}.{needed}", place, module
    if not any(rule.check == "layers_missing" for rule in engine.rules):
        return
    for example, layers in layer_holes(gather(adapter, (), base=facts_of_base(adapter, model))).values():
        module = adapter.modules[example]
        if module.kind != "lora" or not module.rank or example not in weights:
            continue
        for layer in layers:
            place = _NUMBER.sub(f".{layer}.", weights[example], count=1)
            if place in model.source.specs:
                yield _NUMBER.sub(f".{layer}.", example, count=1), place, module


def _shape(place: str, like: Module, model: BaseModel) -> tuple[int, ...]:
    """The shape of a weight as (out, in): stored the other way round where that is how it fits a like one."""
    shape = model.source.specs[place].shape
    return shape[::-1] if shape != like.shape and shape[::-1] == like.shape else shape


def _zeros(like: Module, name: str, shape: tuple[int, ...]) -> Module:
    """A module that adds nothing, of the rank, scaling and type of another."""
    import numpy as np

    from loratools.tensors.memory import MemorySource, from_bytes

    rank = like.rank or 1
    specs = {
        role: TensorSpec(like.tensors[role].spec.dtype, size)
        for role, size in (("down", (rank, shape[1])), ("up", (shape[0], rank)))
    }
    source = MemorySource(
        {
            f"{name}.{role}": from_bytes(np.zeros(spec.nbytes, np.uint8), spec, torch_out=False)
            for role, spec in specs.items()
        }
    )
    tensors = {role: TensorRef(source, f"{name}.{role}") for role in specs}
    return replace(like, tensors=tensors, shape=shape, options={})


def _renamed(adapter: Adapter, binding: Binding) -> Iterator[tuple[str, str]]:
    """Names as the base has them, where they fit it only when changed and each module is one whole weight."""
    if not binding.renamed or adapter.extras:
        return
    places: dict[str, set[str]] = {}
    for terms in binding.terms.values():
        for term in terms:
            target = term.target
            if (target.index, target.rows, target.cols) == (None, None, None) and term.part == "weight":
                places.setdefault(term.name, set()).add(target.weight.removesuffix(".weight"))
    if all(len(places.get(name, ())) == 1 for name in adapter.modules):
        for name in adapter.modules:
            (place,) = places[name]
            if place != name:
                yield name, place


def whole_unit(engine: Engine, kind: str, unit: float, rank: int, wanted: str | None) -> tuple[str, float]:
    """The type and the shared scaling, where the engine reads alpha as a whole number: else all is folded."""
    if "whole_alpha" not in engine.plain or (unit * rank).is_integer():
        return kind, unit
    return ("F32" if wanted is None and kind in HALVES else kind), 1.0


def require_accepted(
    engine: Engine, read: Adapter, made: Adapter, model: BaseModel | None, *, form: str
) -> EngineAnswer:
    """Put the result to the engine's rules, in the format that it will have.

    Args:
        engine: that is to load it.
        read: the adapter as it was.
        made: the result.
        model: the base, where one is given.
        form: the format that the result is written in.

    Raises:
        Unsupported: it would still refuse it, or compute something else; the format cannot express it.
    """
    seen = seen_as(made, form, None if model is None else model.config)
    keys = write_peft(seen)[0] if seen.format == "peft" else ()
    rounds = any(rule.check == "beyond_half" for rule in engine.rules)
    facts = gather(
        seen,
        keys,
        ref=_typed(read),
        beyond_half=beyond_half(seen.tensors) if rounds else (),
        base=facts_of_base(made, model),
    )
    for hit in _errors(engine, facts):
        raise _refusal(engine, seen, hit, given=model is not None)
    verdict = judge(engine, facts)
    return EngineAnswer(engine.name, verdict.loads, verdict.same_maths, verdict.flags)


def _typed(adapter: Adapter) -> str:
    """What to type for it in a command."""
    return shlex.quote(adapter.name) if input_paths(adapter) else "REF"


def _errors(engine: Engine, facts: Facts) -> Iterator[Hit]:
    yield from (hit for hit in judge(engine, facts).hits if hit.rule.severity == "error")


def _refusal(engine: Engine, adapter: Adapter, hit: Hit, *, given: bool = False) -> Unsupported:
    """The error; its hint is the rule's fix, unless that is what was just tried (``given``: with a base)."""
    known = adapter.refusal[1] if adapter.refusal is not None else None
    tried = hit.fix.startswith(_MENDS) and (given or not hit.fix.endswith(_WITH_BASE))
    way_out = known if not hit.fix or tried else hit.fix
    return Unsupported(f"{adapter.name} cannot be made right for {engine.title}: {hit.message}", hint=way_out)
