"""From decomposed tensors to an adapter in PEFT's conventions, and the account of what became of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools.adapter import Adapter, AdapterConfig, Extra, Module
from loratools.deltas.lowrank import LowRank
from loratools.formats.peft import PREFIX
from loratools.matrices import lora_module
from loratools.naming import FUSED_EXPERTS
from loratools.verbs.extract_report import ExtractedModule, FullTensor, Skipped

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from loratools.decomposing import Decomposed, Part
    from loratools.dtypes import Array
    from loratools.extracting import Candidate, Survey, Whole
    from loratools.tensors.base import TensorRef

__all__ = ["Assembled", "assemble", "joint"]

# The conventions the adapter is written in: experts as PEFT packs them since 0.19.1.
_PEFT_VERSION = "0.21.0"


@dataclass(slots=True)
class Assembled:
    """What goes into the adapter, and what is said of it, as it is collected."""

    modules: dict[str, Module] = field(default_factory=dict)
    extras: dict[str, Extra] = field(default_factory=dict)
    reports: list[ExtractedModule] = field(default_factory=list)
    full: list[FullTensor] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchanged: int = 0
    whole: tuple[str, ...] = ()  # modules that are saved with everything below them
    tied: bool = False  # input and output embedding are one, and it has changed

    def adapter(self, name: str, base_model: str | None, raw: Mapping[str, Any]) -> Adapter:
        """The adapter, with these fields in its configuration besides what its modules say."""
        config: dict[str, Any] = {"peft_type": "LORA", "peft_version": _PEFT_VERSION, **raw}
        if self.whole:
            config["modules_to_save"] = list(self.whole)
        if self.tied:
            config["ensure_weight_tying"] = True
        refs = [ref for module in self.modules.values() for ref in module.tensors.values()]
        refs += [extra.tensor for extra in self.extras.values()]
        return Adapter(
            name=name,
            format="peft",
            modules=self.modules,
            config=AdapterConfig("LORA", base_model, config),
            metadata={},
            extras=self.extras,
            evidence="extracted from two checkpoints",
            kinds=("lora",),
            tensors=tuple(refs),
        )


def assemble(survey: Survey, results: Sequence[Decomposed]) -> Assembled:
    """Put the adapter together.

    Args:
        survey: what was worked on: the candidates, then the wholes.
        results: of both, in this order.
    """
    made = Assembled(warnings=list(survey.warnings))
    split = len(survey.candidates)
    pairs = list(zip(survey.candidates, results[:split], strict=True))
    nested = _nested(pairs)
    # PEFT has no delta of a bias in an adapter that has modules of these kinds too, nor merges one into a layer
    # without a bias, and gives one to every layer or to none.
    rigid = any(
        (one.form in {"experts", "embedding"} or one.bias is None) and result.factors for one, result in pairs
    )
    for candidate, result in pairs:
        _module(made, candidate, result, nested=candidate.weight in nested, lora_bias=not rigid)
    _wholes(made, survey, results[split:])
    made.warnings += [
        f"{path} is the embedding of an encoder and a decoder: PEFT adapts it under this name alone, and both look "
        "tokens up under others; loratools merge reaches all"
        for path in made.modules
        if path.rpartition(".")[2] == "shared"
    ]
    made.warnings += [
        f"{path} is the embedding of an encoder and a decoder, and goes along whole: PEFT does not reach both of them "
        "under this name, or refuses to load it; loratools merge reaches all"
        for path in made.whole
        if path.rpartition(".")[2] == "shared"
    ]
    return made


def _nested(pairs: Sequence[tuple[Candidate, Decomposed]]) -> set[str]:
    """Weights of expert modules that PEFT wraps first, where a second parameter of the same module is adapted."""
    found: dict[str, list[str]] = {}
    for candidate, result in pairs:
        if candidate.form == "experts" and result.factors:
            found.setdefault(candidate.path, []).append(candidate.weight)
    order = {name: number for number, name in enumerate(FUSED_EXPERTS)}
    inner: set[str] = set()
    for weights in found.values():
        ordered = sorted(weights, key=lambda weight: order[weight.rpartition(".")[2]])
        inner |= set(ordered[:-1])
    return inner


def _module(made: Assembled, one: Candidate, result: Decomposed, *, nested: bool, lora_bias: bool) -> None:
    """Add what became of one candidate."""
    made.parts += result.parts
    if not result.changed:
        made.unchanged += 1
        return
    norm = math.hypot(*(part.norm for part in result.parts))
    if not result.factors and norm:
        made.skipped.append(Skipped(one.weight, f"nothing in it stands out of the noise (norm {norm:.3g})"))
    bias = result.bias
    if bias is not None and one.bias is not None and not lora_bias:
        key = f"{one.path}.base_layer.bias" if result.factors else f"{one.path}.bias"
        _bias(made, key, f"{one.path}.bias", one.bias[1])
        bias = None
    factors = result.factors
    if not factors:
        if bias is None:
            return
        factors = (_nothing(one, bias),)
    name = f"{one.path}.base_layer" if nested else one.path
    made.modules[name] = lora_module(one.like(), factors, prefix=name, bias=bias)
    if one.form == "experts":
        options = {**made.modules[name].options, "parameter": one.parameter}
        made.modules[name] = _with_options(made.modules[name], options)
    made.reports.append(_report(name, one, result, made.modules[name].rank or 0))
    if one.mirror is not None and result.factors:
        _mirror(made, one, result)


def _with_options(module: Module, options: Mapping[str, Any]) -> Module:
    return Module(
        module.kind, module.tensors, module.rank, module.alpha, module.scaling, module.shape, options
    )


def _nothing(one: Candidate, bias: Array) -> LowRank:
    """A delta of zero, for a module of which only the bias has changed."""
    out, into = one.shape[0], math.prod(one.shape[1:])
    return LowRank(np.zeros((out, 1), bias.dtype), np.zeros((1, into), bias.dtype))


def _report(name: str, one: Candidate, result: Decomposed, rank: int) -> ExtractedModule:
    norm, error, optimality = joint(result.parts)
    return ExtractedModule(
        name=name,
        weight=one.weight,
        kind=one.form,
        rank=rank,
        shape=one.shape,
        experts=one.experts,
        norm=norm,
        relative_error=error,
        optimality=optimality,
        noise=result.sigma,
        noise_dtype=result.grid,
        bias=result.bias is not None,
    )


def joint(parts: Sequence[Part]) -> tuple[float, float, float]:
    """Norm, relative error and optimality of several matrices together."""
    norm = math.hypot(*(part.norm for part in parts))
    residual = math.hypot(*(part.residual for part in parts))
    least = math.hypot(*(part.residual / part.optimality for part in parts))
    if not residual:
        return norm, 0.0, 1.0
    return norm, residual / norm, residual / least if least else math.inf


def _mirror(made: Assembled, one: Candidate, result: Decomposed) -> None:
    """The same delta on the output embedding, which PEFT wraps apart from the input embedding it is tied to."""
    assert one.mirror is not None
    made.tied = True
    factors = [LowRank(f.down.T, f.up.T) for f in result.factors]
    like = Module("lora", {}, 1, 1.0, 1.0, one.shape[::-1])
    made.modules[one.mirror] = lora_module(like, factors, prefix=one.mirror)
    made.warnings.append(
        f"{one.path} and {one.mirror} are one weight, and LoRA is on both: PEFT runs the adapter right, but its "
        "merge_and_unload adds the change twice; merge with loratools merge, or take it whole with --exclude and "
        "--full-tensors all"
    )


def _bias(made: Assembled, key: str, name: str, tuned: TensorRef) -> None:
    """A bias that is carried whole, as it belongs to no module that could carry it."""
    made.extras[PREFIX + key] = Extra(tuned, name, "replacement", "bias=all")
    spec = tuned.spec
    made.full.append(FullTensor(tuned.name, spec.shape, spec.dtype.name, spec.nbytes, "a bias"))


def _wholes(made: Assembled, survey: Survey, results: Sequence[Decomposed]) -> None:
    """Add the tensors that go along whole. PEFT saves modules: of one that has changed, everything below it."""
    pairs = list(zip(survey.wholes, results, strict=True))
    made.unchanged += sum(not result.changed for _, result in pairs)
    owners: set[str] = set()
    for whole, result in pairs:
        if not result.changed:
            continue
        if whole.left_out is not None:
            made.skipped.append(Skipped(whole.name, whole.left_out))
        elif (why := _uncarried(made, whole)) is None:
            owners.add(whole.owner)
        elif whole.memory.endswith(".bias"):
            _bias(made, whole.memory, whole.memory, whole.tuned)
        else:
            made.skipped.append(
                Skipped(whole.name, f"{whole.reason}; PEFT cannot carry it along, because {why}")
            )
            made.warnings.append(f"{whole.name} has changed and is not in the adapter: {why}")
    made.whole = tuple(
        sorted(one for one in owners if not any(one.startswith(f"{other}.") for other in owners))
    )
    for memory, tuned, reason in _below(survey, made.whole):
        made.extras[PREFIX + memory] = Extra(tuned, memory, "replacement", "modules_to_save")
        spec = tuned.spec
        made.full.append(FullTensor(tuned.name, spec.shape, spec.dtype.name, spec.nbytes, reason))
    _whole_head(made, survey)


def _whole_head(made: Assembled, survey: Survey) -> None:
    """The output embedding beside the input embedding it is tied to: PEFT copies, and asks for, one of each."""
    whole = next((extra for extra in made.extras.values() if extra.target == survey.tied), None)
    if whole is None or survey.head is None:
        return
    made.tied = True
    for key, tensor in ((survey.head, whole.tensor), *([survey.head_bias] if survey.head_bias else [])):
        made.extras[PREFIX + key] = Extra(tensor, key, "replacement", "modules_to_save")
    owner = survey.head.rpartition(".")[0]
    if not any(owner.startswith(f"{other}.") for other in made.whole):
        made.whole = tuple(sorted((*made.whole, owner)))


def _uncarried(made: Assembled, whole: Whole) -> str | None:
    """Why the module of a tensor cannot be saved whole; None if it can."""
    if not whole.owner:
        return "it belongs to no module"
    inside = next((path for path in made.modules if f"{path}.".startswith(f"{whole.owner}.")), None)
    return None if inside is None else f"{inside} inside {whole.owner} is adapted"


def _below(survey: Survey, owners: Sequence[str]) -> Iterator[tuple[str, TensorRef, str]]:
    """Every tensor of some modules, after training: what it is called in the model, where it is, why it is whole."""

    def inside(memory: str) -> bool:
        return any(memory.startswith(f"{owner}.") for owner in owners)

    for whole in survey.wholes:
        if inside(whole.memory):
            yield whole.memory, whole.tuned, whole.reason
    for one in survey.candidates:
        suffix = one.parameter or "weight"
        if inside(f"{one.path}.{suffix}"):
            yield f"{one.path}.{suffix}", one.tuned, "in a module that goes along whole"
            if one.bias is not None:
                yield f"{one.path}.bias", one.bias[1], "in a module that goes along whole"
