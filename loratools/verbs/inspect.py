"""``inspect``: what the headers of an adapter say, and on request the singular values of its deltas.

Without the latter no values are read, and numpy is not loaded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratools.adapter import UNSCALED
from loratools.errors import LoratoolsError
from loratools.formats.opening import open_adapter
from loratools.formats.reading import DIALECTS
from loratools.verbs.reports import ExtraInfo, InspectReport, ModuleInfo, Range

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from loratools.adapter import Adapter, Module

__all__ = ["inspect"]

_LORA_KINDS = {"lora", "dora", "adalora", "loha", "lokr"}


def inspect(
    ref: str | os.PathLike[str] | Mapping[str, Any],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
    enable_lora: Sequence[bool] | None = None,
    spectrum: bool = False,
    jobs: int | None = None,
) -> InspectReport:
    """Say what an adapter is: format, kinds, ranks, scaling, modules, and every tensor that belongs to none.

    >>> import numpy as np
    >>> factors = {"fc.lora_A.weight": np.zeros((2, 8), "f4"), "fc.lora_B.weight": np.zeros((4, 2), "f4")}
    >>> report = inspect(factors, config={"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    >>> report.modules[0].shape, report.scaling.max
    ((4, 8), 2.0)

    Args:
        ref: a folder, a weight file, or a state dict.
        config: the configuration, where it does not lie beside the weights: a path, or the parsed JSON.
        alpha: overrides ``lora_alpha``.
        allow_pickle: read ``.bin`` and ``.pt`` files.
        enable_lora: which parts of a fused weight a loralib file has factors for.
        spectrum: read the factors too, for norms, ranks and singular values of each module's scaled delta.
        jobs: workers for that; by default the processors at hand, four at most.

    Returns:
        The report. What is recognised but is no LoRA is reported too, with its kind and a warning.

    Raises:
        NotFound: no such file, or a folder without adapter weights.
        CorruptFile: a file breaks the rules of its format.
        BadConfig: a field of the configuration cannot be.
        Unsupported: a pickle, without leave to read it; a spectrum of deltas that nothing scales.
        InputError: a factor holds values that are not finite, and the spectrum was asked for.
    """
    adapter = open_adapter(
        ref, config=config, alpha=alpha, allow_pickle=allow_pickle, enable_lora=enable_lora
    )
    return with_spectra(report(adapter), adapter, jobs) if spectrum else report(adapter)


def report(adapter: Adapter) -> InspectReport:
    """:func:`inspect`, for an adapter that is open already."""
    modules = tuple(_module(name, module) for name, module in adapter.modules.items())
    specs = [ref.spec for ref in adapter.tensors]
    return InspectReport(
        path=adapter.name,
        format=adapter.format,
        evidence=adapter.evidence,
        kinds=adapter.kinds,
        base_model=adapter.config.base_model,
        rank=Range.of(module.rank for module in modules),
        alpha=Range.of(module.alpha for module in modules),
        scaling=Range.of(module.scaling for module in modules),
        parameters=sum(spec.count for spec in specs),
        bytes=sum(spec.nbytes for spec in specs),
        dtypes=dict(Counter(spec.dtype.name for spec in specs)),
        modules=modules,
        extras=tuple(
            ExtraInfo(key, extra.tensor.shape, extra.tensor.spec.dtype.name, extra.reason)
            for key, extra in adapter.extras.items()
        ),
        metadata=dict(adapter.metadata),
        warnings=tuple(_warnings(adapter)),
        architecture=_architecture(adapter),
    )


def _architecture(adapter: Adapter) -> str | None:
    """The family of image models an adapter belongs to; None for others, and where several fit."""
    if adapter.format not in DIALECTS:
        return None
    from loratools.canonical import find_architecture

    try:
        found = find_architecture(adapter)
    except LoratoolsError:
        return None
    return None if found is None else found.name


@dataclass(frozen=True, slots=True)
class _Item:
    """A module to decompose."""

    name: str
    module: Module


def with_spectra(found: InspectReport, adapter: Adapter, jobs: int | None = None) -> InspectReport:
    """The report, with what the singular values of each module say; modules that are no plain sum have none."""
    from loratools.executors.base import make_executor
    from loratools.running import default_jobs, gather

    items = [_Item(name, module) for name, module in adapter.modules.items() if module.is_delta]
    workers = make_executor("threads", default_jobs() if jobs is None else jobs)
    told = dict(zip((item.name for item in items), gather(_spectrum, items, workers), strict=True))
    modules = tuple(replace(info, **told.get(info.name, {})) for info in found.modules)
    warnings = found.warnings
    if without := [info for info in modules if info.singular_values is None]:
        first, more = without[0], f" (and {len(without) - 1} more)" if without[1:] else ""
        init = adapter.modules[first.name].options.get("init")
        why = f"it starts from a part of its base ({init})" if init else f"{first.kind} is not a plain sum"
        warnings = (*warnings, f"{first.name} has no spectrum: {why}{more}")
    if guessed := [item.name for item in items if "config_rank" in item.module.options]:
        more = f" (and {len(guessed) - 1} more)" if guessed[1:] else ""
        whose = f"norms and singular values of {guessed[0]}{more}"
        why = "the configuration was written for another rank"
        warnings = (*warnings, f"{whose} are by a scaling that is a guess: {why}")
    return replace(found, modules=modules, warnings=warnings, spectrum=True)


def _spectrum(item: _Item) -> dict[str, Any]:
    """What the singular values of a module's matrices say, of several experts together."""
    import numpy as np

    from loratools.deltas.algebra import singular_values
    from loratools.deltas.measures import effective_rank, frobenius_norm, spectral_norm, stable_rank
    from loratools.matrices import matrices

    each = [singular_values(one) for one in matrices(item.module, item.name, fold=False)]
    values = each[0] if len(each) == 1 else np.sort(np.concatenate(each))[::-1]
    return {
        "norm": frobenius_norm(values),
        "spectral_norm": spectral_norm(values),
        "stable_rank": stable_rank(values),
        "effective_rank": effective_rank(values),
        "singular_values": tuple(values.tolist()),
    }


def _module(name: str, module: Module) -> ModuleInfo:
    """Of a fused weight's blocks, the rank and the alpha of one."""
    blocks: int = module.options.get("blocks", 1)
    dtypes = dict.fromkeys(ref.spec.dtype.name for ref in module.factors.values())
    return ModuleInfo(
        name=name,
        kind=module.kind,
        rank=module.rank // blocks if module.rank else module.rank,
        alpha=module.alpha / blocks if module.alpha else module.alpha,
        scaling=module.scaling,
        shape=module.shape,
        parameters=module.parameters,
        dtype="+".join(dtypes),
        experts=module.options.get("experts", 1),
        blocks=blocks,
    )


def _warnings(adapter: Adapter) -> Iterable[str]:
    yield from adapter.warnings
    if adapter.refusal is not None:
        reason, way_out = adapter.refusal
        yield f"cannot be merged: {reason}; {way_out}"
    for kind in adapter.kinds:
        if adapter.format == "peft" and adapter.modules and kind not in _LORA_KINDS:
            yield f"{kind} is not a LoRA"
    unscaled = [n for n, m in adapter.modules.items() if m.scaling is None and m.kind not in UNSCALED]
    if unscaled:
        yield (
            f"nothing read here says how {len(unscaled)} of {len(adapter.modules)} modules are scaled, "
            "so scaling is null; --config or --alpha says it"
        )
    odd = [(n, m) for n, m in adapter.modules.items() if "config_rank" in m.options]
    if odd:
        name, module = odd[0]
        yield (
            f"{name} has rank {module.rank} in the file, {module.options['config_rank']} in the configuration"
            + (f" (and {len(odd) - 1} more differ)" if len(odd) > 1 else "")
        )
    unclaimed = sum(extra.role == "unclaimed" for extra in adapter.extras.values())
    if unclaimed and adapter.format == "peft":
        yield f"{unclaimed} of {len(adapter.tensors)} tensors are explained by nothing in the configuration"
    elif unclaimed and adapter.modules:
        key, extra = next((key, e) for key, e in adapter.extras.items() if e.role == "unclaimed")
        yield f"{unclaimed} of {len(adapter.tensors)} tensors belong to no module: {key} ({extra.reason})"
