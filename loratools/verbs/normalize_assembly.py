"""The result of ``normalize``: plain modules put together as an adapter, and the report on them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import AdapterConfig
from loratools.dtypes import DTYPES
from loratools.errors import Unsupported
from loratools.formats.peft_writing import write_peft
from loratools.formats.registry import is_diffusion
from loratools.matrices import lora_module
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource, from_bytes
from loratools.verbs.normalize_report import ConfigChange, NormalizedModule, NormalizeReport
from loratools.verbs.normalize_work import to_rank
from loratools.verbs.reports import Range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratools.adapter import Adapter, Module
    from loratools.verbs.normalize_work import Plain
    from loratools.verbs.reports import EngineAnswer

__all__ = ["TOLERANCE", "assemble", "make_report", "require_close"]

# Folding a factor that is no power of two rounds each entry of ``up`` once, converting both factors: a share of
# 6e-8 each. What exceeds this is not rounding.
TOLERANCE = 1e-6
# Fields whose old value would mean something else beside the new factors.
_TOLD = (
    "peft_type", "r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "use_bdlora", "kasa_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "target_parameters", "modules_to_save", "bias", "lora_bias",
)  # fmt: skip


def require_close(results: Sequence[Plain]) -> None:
    """Refuse a difference that is no rounding: of a module by its own norm, unless that is nothing beside the rest."""
    whole = math.hypot(*(result.norm for result in results))
    worst = max(results, key=lambda r: r.distance / r.norm if r.norm else 0.0, default=None)
    if worst is not None and worst.distance > TOLERANCE * max(worst.norm, TOLERANCE * whole):
        raise Unsupported(
            f"{worst.name}: the plain factors differ by {worst.distance / worst.norm:.2g}, more than rounding "
            "explains",
            hint="its factors cancel; dtype f64 (--dtype f64) keeps them, a rank (--rank) approximates them",
        )


def assemble(
    adapter: Adapter, results: Sequence[Plain], dtype: str, unit: float, *, pad: bool, whole: bool = False
) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter of plain modules, and the names of those that add nothing; none is left out if ``whole``."""
    zeros = [r.name for r in results if r.norm == 0.0 and _may_go(r.name, adapter) and not whole]
    if len(zeros) == len(results):
        zeros = []
    kept = [result for result in results if result.name not in zeros]
    rank = max((factors.up.shape[1] for r in kept for factors in r.factors), default=0) if pad else 0
    modules = {r.name: _module(adapter.modules[r.name], r, rank, dtype, unit) for r in kept}
    extras = {key: extra for key, extra in adapter.extras.items() if extra.role != "training_only"}
    peft_type = "LORA" if modules else adapter.config.peft_type  # token rows alone are a type of their own
    config = AdapterConfig(peft_type, adapter.config.base_model, dict(adapter.config.raw))
    made = replace(
        adapter, modules=modules, extras=extras, config=config, tensors=(), warnings=(),
        kinds=tuple(sorted({module.kind for module in modules.values()})),
        evidence="normalised", metadata={"format": "pt"}, refusal=None,
    )  # fmt: skip
    if is_diffusion(made.format):  # which has no configuration; its names are checked when it is written
        refs = [ref for module in modules.values() for ref in module.tensors.values()]
        refs += [extra.tensor for extra in extras.values()]
        return replace(made, metadata=adapter.metadata, tensors=tuple(refs)), tuple(zeros)
    tensors, raw = write_peft(made)
    return replace(made, config=replace(config, raw=raw), tensors=tuple(tensors.values())), tuple(zeros)


def _may_go(name: str, adapter: Adapter) -> bool:
    """Whether a module can be left out: a wrapper that others lie in decides how those are called."""
    module = adapter.modules[name]
    nested = ".base_layer" in name or any(other.startswith(f"{name}.base_layer") for other in adapter.modules)
    return module.kind != "dora" and "experts" not in module.options and not nested


def _module(like: Module, result: Plain, rank: int, dtype: str, unit: float) -> Module:
    """Plain factors as a module, its tensors in the type they will have."""
    factors = [to_rank(one, rank) for one in result.factors]
    made = lora_module(like, factors, prefix=result.name, bias=result.bias)
    arrays = {role: _packed(ref, dtype) for role, ref in made.tensors.items()}
    source = MemorySource({f"{result.name}.{role}": values for role, values in arrays.items()})
    tensors = {role: TensorRef(source, f"{result.name}.{role}") for role in arrays}
    made = replace(made, tensors=tensors, scaling=unit, alpha=unit * (made.rank or 0))
    if like.kind == "dora":
        magnitude = {"magnitude": like.tensors["magnitude"]}
        meant = {key: like.options[key] for key in ("magnitude_axis", "epsilon") if key in like.options}
        return replace(made, kind="dora", tensors={**tensors, **magnitude}, options={**made.options, **meant})
    return made


def _packed(ref: TensorRef, dtype: str) -> Any:
    import numpy as np

    from loratools.dtypes import narrow
    from loratools.tensors.base import TensorSpec

    spec = TensorSpec(DTYPES[dtype], ref.shape)
    return from_bytes(narrow(ref.load(), spec.dtype, np.empty(spec.nbytes, np.uint8)), spec, torch_out=False)


def make_report(
    before: Adapter,
    made: Adapter,
    results: Sequence[Plain],
    dropped: tuple[str, ...],
    renamed: dict[str, str],
    dtype: str,
    warnings: list[str],
    *,
    engine: EngineAnswer | None,
    output: str | None,
    size: int,
) -> NormalizeReport:
    """What was done, module by module: the adapter as it was read beside the one that was made."""
    modules = []
    for result in results:
        if result.name not in made.modules:
            continue
        old, new = before.modules[result.name], made.modules[result.name]
        modules.append(
            NormalizedModule(
                result.name, str(old.options.get("init", old.kind)), new.kind, old.rank, new.rank or 0,
                old.scaling, new.alpha or 0.0, new.shape,
                result.distance / result.norm if result.norm else None,
            )
        )  # fmt: skip
    norm, distance = (math.hypot(*(getattr(r, name) for r in results)) for name in ("norm", "distance"))
    gone = [key for key, extra in before.extras.items() if extra.role == "training_only"]
    if results and norm == 0.0:
        warnings = [*warnings, "every module is zero: the adapter changes nothing"]
    return NormalizeReport(
        path=before.name,
        output=output,
        relative=distance / norm if norm else 0.0,
        exact=distance == 0.0,
        rank=Range.of([m.rank for m in modules]),
        rank_before=Range.of([m.rank for m in before.modules.values()]),
        dtype=dtype,
        modules=tuple(modules),
        dropped=dropped,
        dropped_tensors=tuple(gone),
        renamed=renamed,
        config=_changes(before.config.raw, made.config.raw),
        bytes_before=_stored_bytes(before),
        bytes=size,
        warnings=(*before.warnings, *warnings),
        engine=engine,
        adapter=made,
    )


def _stored_bytes(adapter: Adapter) -> int:
    """Of the files an adapter's tensors lie in, headers and all; of the tensors, where they lie in memory."""
    extents = [ref.source.extent(ref.name) for ref in adapter.tensors]
    if extents and None not in extents:
        return sum(Path(path).stat().st_size for path in {e.path for e in extents if e is not None})
    refs = [ref for module in adapter.modules.values() for ref in module.tensors.values()]
    return sum(ref.spec.nbytes for ref in [*refs, *(extra.tensor for extra in adapter.extras.values())])


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[ConfigChange, ...]:
    return tuple(
        ConfigChange(name, before.get(name), after.get(name))
        for name in _TOLD
        if _said(before.get(name)) != _said(after.get(name))
    )


def _said(value: Any) -> Any:
    """A field's value, None for every way to say nothing: absent, null, empty, false, ``"none"``."""
    return None if not value or value == "none" else value
