"""``combine``: several adapters as one, computed on their factors, without a model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import flat_shape
from loratools.arrays import check_double
from loratools.block_weights import block_weights as settle_block_weights
from loratools.errors import OverBudget
from loratools.executors.base import make_executor
from loratools.formats.registry import FORMATS
from loratools.matrices import module_cost
from loratools.models import open_base
from loratools.pairing import named_architecture, pair, require_same_shapes
from loratools.planning import RUNTIME_BYTES
from loratools.provenance import record
from loratools.publishing import require_place
from loratools.running import default_jobs, gather, peak_memory
from loratools.verbs.combine_assembly import assemble_modules, make_adapter, name_modules, ratio
from loratools.verbs.combine_extras import combine_extras, plan_extras
from loratools.verbs.combine_planning import (
    block_factors,
    find_warnings,
    list_inputs,
    list_items,
    open_adapters,
    raised_warnings,
    require_apart,
    require_deltas,
    require_rank,
)
from loratools.verbs.combine_report import CombineReport
from loratools.verbs.combine_shapes import shape_module, stored_rank, unread_extras
from loratools.verbs.combine_work import combine_one
from loratools.verbs.saving import describe_save, float_dtype, identify_adapter, save, widest
from loratools.verbs.weighting import settle_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loratools.adapter import Adapter
    from loratools.executors.base import Executor
    from loratools.methods.base import Method
    from loratools.pairing import Pairing
    from loratools.verbs.combine_extras import ExtrasRule
    from loratools.verbs.combine_planning import Ref
    from loratools.verbs.combine_report import CombinedExtra, CombinedModule
    from loratools.verbs.combine_work import Combined, Item

__all__ = ["CombinePlan", "combine", "plan_combine", "run_combine"]


@dataclass(frozen=True, slots=True)
class CombinePlan:
    """A combination that has not been computed yet.

    Attributes:
        adapters: opened.
        weights: one for each.
        method: how.
        options: of the method, settled.
        rank: that is asked for; None for what the method gives.
        items: the modules of the result.
        pairing: which modules and extras of the adapters belong together.
        extras: what becomes of the tensors that are no deltas.
        base: the model that decided which modules belong together, as it was named.
        output: where the result goes; None for memory.
        dtype: of the floats written.
        force: an output that loratools made may be replaced.
        to: the format of the result; None for that of the adapters.
        block_weights: as they were given, for the record.
        base_config: the ``config.json`` of ``base``, for formats that ask for it.
        warnings: what a careful user should read.
    """

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    method: Method
    options: dict[str, Any]
    rank: int | None
    items: tuple[Item, ...]
    pairing: Pairing
    extras: tuple[CombinedExtra, ...]
    base: str | None
    output: Path | None
    dtype: str
    force: bool
    warnings: tuple[str, ...]
    to: str | None = None
    block_weights: tuple[str, ...] = ()
    base_config: Mapping[str, Any] | None = None

    def rank_of(self, item: Item) -> int:
        """The rank a module of the result has: what is asked for, or the sum of the adapters'."""
        if self.rank is not None:
            return self.rank
        total = sum(stored_rank(module) for _, module in item.modules)
        return min(total, *flat_shape(item.like.shape)) if item.capped and not self.method.legacy else total

    def peak_bytes(self, jobs: int) -> int:
        """An upper bound on the memory needed: all results, and one matrix after another for each worker."""
        results = sum(self.rank_of(item) * module_cost(item.like) for item in self.items)
        working = max((self._working(item) for item in self.items), default=0)
        return RUNTIME_BYTES + (4 if self.dtype != "F64" else 8) * results + jobs * working

    def _working(self, item: Item) -> int:
        out, into = flat_shape(item.like.shape)
        factors = 8 * 4 * (out + into) * sum(stored_rank(module) for _, module in item.modules)
        return factors + (3 * 4 * out * into if self.options.get("space") == "weight" else 0)

    def to_dict(self, jobs: int = 1) -> dict[str, Any]:
        """The plan in numbers, as ``--dry-run`` prints it."""
        described = describe_save(
            _as_planned(self), self.output or Path("combined"), verb="combine", reads=self.adapters,
            format=self.to, arch=self.pairing.architecture or None, dtype=self.dtype, force=self.force,
            base_config=self.base_config,
        )  # fmt: skip
        return {
            **described,
            "method": self.method.name,
            "options": self.options,
            "weights": list(self.weights),
            "rank": max(map(self.rank_of, self.items)),
            "modules": [item.name for item in self.items],
            "peak_memory": self.peak_bytes(jobs),
            "warnings": list(self.warnings),
        }


def plan_combine(
    adapters: Ref | Adapter | Sequence[Ref | Adapter],
    out: Ref | None = None,
    *,
    weights: float | Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    base: Ref | Mapping[str, Any] | None = None,
    arch: str | None = None,
    block_weights: str | Sequence[str] | None = None,
    extras: ExtrasRule = "error",
    dtype: object = None,
    to: str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
    **options: Any,
) -> CombinePlan:
    """Decide everything about a combination from headers; only extras are compared by value.

    Arguments and errors are those of :func:`combine`.
    """
    from loratools.methods import find

    opened = open_adapters(adapters, allow_pickle=allow_pickle, blockwise=blockwise_experts)
    factors = settle_weights(weights, len(opened))
    chosen = find(method)
    settled = chosen.settle(options, len(opened))
    require_rank(rank)
    wanted = float_dtype(dtype)
    output = None if out is None else Path(out)
    if output is not None:
        require_place(output, list_inputs(opened, base), force=force)
    model = None if base is None else open_base(base)
    pairing = pair(opened, model, named_architecture(arch))
    require_deltas(opened, pairing)
    require_same_shapes(pairing)
    by_block = block_factors(opened, pairing, settle_block_weights(block_weights, len(opened)))
    items = list_items(opened, pairing, factors, rank, model, by_block)
    planned_extras = plan_extras(pairing.extras, extras, factors)
    require_apart(opened, pairing)
    return CombinePlan(
        adapters=opened,
        weights=factors,
        method=chosen,
        options=settled,
        rank=rank,
        items=items,
        pairing=pairing,
        extras=planned_extras,
        base=None if base is None or isinstance(base, Mapping) else os.fspath(base),
        output=output,
        dtype=widest(opened) if wanted is None else wanted.name,
        force=force,
        warnings=(
            *find_warnings(opened, pairing, planned_extras, items, model),
            *raised_warnings(items, rank, dense=settled.get("space") == "weight"),
        ),
        to=_settled_format(opened[0], pairing, to),
        block_weights=(block_weights,) if isinstance(block_weights, str) else tuple(block_weights or ()),
        base_config=None if model is None else model.config,
    )


def _settled_format(first: Adapter, pairing: Pairing, to: str | None) -> str | None:
    """What is written: what is asked for; under an architecture's names, diffusers' format where the first is not."""
    if to is not None or not pairing.architecture:
        return to
    own = FORMATS.get(first.format)
    keeps = own is not None and own.writer and own.diffusion and not own.narrow
    return None if keeps else "diffusers"


def combine(
    adapters: Ref | Adapter | Sequence[Ref | Adapter],
    out: Ref | None = None,
    *,
    weights: float | Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    base: Ref | Mapping[str, Any] | None = None,
    arch: str | None = None,
    block_weights: str | Sequence[str] | None = None,
    extras: ExtrasRule = "error",
    dtype: object = None,
    to: str | None = None,
    force: bool = False,
    sync: bool = True,
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
    jobs: int | None = None,
    executor: str = "threads",
    device: str = "cpu",
    max_memory: int | None = None,
    on_step: Callable[[Item], None] | None = None,
    **options: Any,
) -> CombineReport:
    """Combine adapters into one: by default their exact weighted sum, Σ wᵢ sᵢ Bᵢ Aᵢ.

    Adapters may differ in rank, alpha, targets, kind (LoRA, AdaLoRA, LoHa, LoKr) and type. A module that only some of
    them have is combined from those.

    >>> import numpy as np
    >>> import loratools as lt
    >>> factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    >>> adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    >>> report = lt.combine([adapter, adapter], weights=[0.5, 0.25])
    >>> report.rank, float(report.adapter.modules["fc"].load().rows(0, 1)[0, 0])
    (2, 1.5)

    Args:
        adapters: PEFT folders or files, or what :func:`loratools.load` returned; one is allowed.
        out: a folder that does not exist yet, or a file ending in ``.safetensors``; None keeps the result in memory.
        weights: what each adapter's delta is multiplied by; 1 where nothing is given.
        method: one of :data:`loratools.methods.METHODS`.
        rank: of every module of the result; by default what the method gives, for a sum the sum of the ranks (of
            LoHa, LoKr and whole matrices no more than the smaller side).
        base: a model both belong to, where their names alone do not match them.
        arch: the architecture of that model, such as ``"sdxl"``; by default, what names and shapes say.
        block_weights: what modules are multiplied by besides, by block or name, as for :func:`loratools.merge`.
        extras: what to do with heads, biases and token rows that several adapters have and differ in: refuse, take the
            first adapter's, or their weighted mean. One that a single adapter has is kept as it is.
        dtype: of the floats written (``"bf16"``, ``torch.bfloat16``); by default the widest that is read.
        to: the format of the result; by default that of the adapters, and PEFT's where that is only read.
        force: replace an output that loratools made.
        sync: wait for the disk.
        allow_pickle: read ``.bin`` adapters.
        blockwise_experts: the experts' B is packed expert-slowest.
        jobs: workers; by default the processors at hand, four at most.
        executor: ``"threads"``, ``"processes"`` or ``"inline"``.
        device: where the best approximation of a rank is formed: ``"cpu"``, ``"cuda"`` or ``"auto"``. What a method
            does with entries or small matrices stays on the processor.
        max_memory: bytes that may be needed.
        on_step: called after each module, for progress.
        options: of the method, such as ``density`` and ``space`` of ``ties``.

    Returns:
        What was done; its ``adapter`` is the result.

    Raises:
        InputError: an input cannot be read, or holds values that are not finite.
        Mismatch: the adapters do not belong together: shapes or extras differ.
        Unsupported: an adapter is not a plain sum (DoRA, IA3, PiSSA), or an option cannot be.
        NonFinite: a value overflowed its type.
        OverBudget: more memory is needed than ``max_memory``; nothing has been read.
        OutputExists: ``out`` exists, or overlaps an input.
    """
    device = check_double(device)
    make_executor(executor, 1)  # a name that does not exist is refused before anything is opened
    planned = plan_combine(
        adapters, out, weights=weights, method=method, rank=rank, base=base, arch=arch,
        block_weights=block_weights, extras=extras, dtype=dtype,
        to=to, force=force, allow_pickle=allow_pickle, blockwise_experts=blockwise_experts, **options,
    )  # fmt: skip
    return run_combine(
        planned,
        sync=sync,
        jobs=jobs,
        executor=executor,
        device=device,
        max_memory=max_memory,
        on_step=on_step,
    )


def run_combine(
    planned: CombinePlan,
    *,
    sync: bool = True,
    jobs: int | None = None,
    executor: str = "threads",
    device: str = "cpu",
    max_memory: int | None = None,
    on_step: Callable[[Item], None] | None = None,
) -> CombineReport:
    """Carry out what :func:`plan_combine` has planned. Arguments and errors are those of :func:`combine`."""
    started = time.perf_counter()
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    needed = planned.peak_bytes(workers.jobs)
    if max_memory is not None and needed > max_memory:
        raise OverBudget(needed, max_memory, hint="fewer --jobs or a smaller --rank need less")
    stored = None if planned.output is None else planned.dtype
    work = partial(combine_one, method=planned.method, options=planned.options, device=device, dtype=stored)
    results = gather(work, planned.items, workers, on_step=on_step)
    adapter, modules = _assemble(planned, results)
    written = 0
    if planned.output is not None:
        saved = save(
            adapter, planned.output, format=planned.to, arch=planned.pairing.architecture or None,
            dtype=planned.dtype, force=planned.force, sync=sync, provenance=_provenance(planned),
            inputs=list_inputs(planned.adapters, planned.base), base_config=planned.base_config,
        )  # fmt: skip
        written = saved.bytes
    return _report(planned, results, adapter, modules, written, started, workers)


def _assemble(
    planned: CombinePlan, results: Sequence[Combined]
) -> tuple[Adapter, tuple[CombinedModule, ...]]:
    names = name_modules(planned.adapters, planned.items)
    modules, lines = assemble_modules(planned.items, results, names)
    extras = combine_extras(planned.pairing.extras, planned.extras, planned.weights)
    return make_adapter(planned.adapters, planned.output, modules, extras), lines


def _report(
    planned: CombinePlan,
    results: Sequence[Combined],
    adapter: Adapter,
    modules: tuple[CombinedModule, ...],
    written: int,
    started: float,
    workers: Executor,
) -> CombineReport:
    errors = math.sqrt(sum(result.error**2 for result in results))
    norms = math.sqrt(sum((result.norm or 0.0) ** 2 for result in results))
    zero = [module.name for module in modules if module.zero]
    warnings = planned.warnings
    if zero:
        rest = f" and {len(zero) - 1} more" if len(zero) > 1 else ""
        warnings = (*warnings, f"the result is zero in {zero[0]}{rest}")
    return CombineReport(
        output=None if planned.output is None else str(planned.output),
        adapters=tuple(one.name for one in planned.adapters),
        method=planned.method.name,
        options=planned.options,
        weights=planned.weights,
        rank=max(module.rank for module in modules),
        relative_error=ratio(errors, norms),
        rounding=ratio(*(math.hypot(*(getattr(r, part) for r in results)) for part in ("rounding", "size"))),
        dtype=planned.dtype,
        modules=modules,
        extras=planned.extras,
        bytes=written,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(workers),
        warnings=warnings,
        adapter=adapter,
    )


def _provenance(planned: CombinePlan) -> dict[str, Any]:
    from loratools import __version__

    parameters: dict[str, Any] = {
        "method": planned.method.name,
        "options": planned.options,
        "weights": list(planned.weights),
        "rank": planned.rank,
        "dtype": planned.dtype,
    }
    if planned.block_weights:
        parameters["block_weights"] = list(planned.block_weights)
    return record("combine", __version__, parameters, [identify_adapter(one) for one in planned.adapters])


def _as_planned(planned: CombinePlan) -> Adapter:
    """The result as far as headers tell: shapes without values."""
    names = name_modules(planned.adapters, planned.items)
    modules = {
        names[item.name]: shape_module(item, planned.rank_of(item), planned.dtype) for item in planned.items
    }
    extras = unread_extras(planned.extras, planned.pairing.extras)
    return make_adapter(planned.adapters, planned.output, modules, extras)
