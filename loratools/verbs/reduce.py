"""``reduce``: an adapter at a lower rank, each module replaced by the nearest delta of its rank."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, require_own_rank
from loratools.arrays import check_double
from loratools.deltas.ranks import tails
from loratools.dtypes import dtype as named_dtype
from loratools.errors import InputError, OverBudget
from loratools.executors.base import make_executor
from loratools.formats.opening import open_adapter
from loratools.matrices import module_cost, require_delta
from loratools.planning import RUNTIME_BYTES
from loratools.publishing import require_place
from loratools.running import default_jobs, gather, peak_memory
from loratools.verbs.reduce_budget import Task, ranks_together, reduced_adapter, written_bytes
from loratools.verbs.reduce_report import ReducedModule, ReduceReport
from loratools.verbs.reduce_rules import chosen_rule
from loratools.verbs.reduce_work import reduced, spectrum, truncated
from loratools.verbs.reports import Range
from loratools.verbs.saving import (
    describe_save,
    float_dtype,
    input_paths,
    save,
    settled,
    widest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from loratools.adapter import Module
    from loratools.dtypes import Array
    from loratools.executors.base import Executor
    from loratools.verbs.reduce_rules import Rule
    from loratools.verbs.reduce_work import Item, Made

__all__ = ["plan_reduce", "reduce"]

Ref = str | os.PathLike[str]
_ROUNDED = 1e-6  # below this, a relative error is that of the arithmetic
_COPIES = 6  # of a module's factors, in float64, that exist at one time


def reduce(
    ref: Ref | Adapter | Mapping[str, Any],
    out: Ref | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    params: int | None = None,
    size: int | None = None,
    noise_floor: bool = False,
    per_module: bool | None = None,
    config: Ref | Mapping[str, Any] | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
    enable_lora: Sequence[bool] | None = None,
    dtype: object = None,
    to: str | None = None,
    force: bool = False,
    sync: bool = True,
    jobs: int | None = None,
    executor: str = "threads",
    device: str = "cpu",
    max_memory: int | None = None,
    on_step: Callable[[Item], None] | None = None,
) -> ReduceReport:
    """Bring an adapter to a lower rank: each module becomes the nearest delta of its rank, and the error is exact.

    >>> import numpy as np
    >>> import loratools as lt
    >>> factors = {"fc.lora_A.weight": np.diag([3.0, 4.0]), "fc.lora_B.weight": np.eye(2)}
    >>> adapter = lt.load(factors, config={"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    >>> report = reduce(adapter, rank=1)
    >>> report.modules[0].rank, round(report.relative_error, 12), report.adapter.modules["fc"].tensors["up"].shape
    (1, 0.6, (2, 1))

    Exactly one of ``rank``, ``energy``, ``error``, ``params``, ``size`` and ``noise_floor`` says how far. A module of
    which nothing is left is dropped and listed, unless it also adds to a bias. The result is a plain LoRA; tensors that
    are no delta are carried over as they are. A module of a plain LoRA of which nothing is cut off keeps its stored
    factors and its scaling; of any other the alpha is its rank. ``relative_error`` is that of the factors as they are
    stored, so :func:`loratools.diff` says the same (in float32 and float64, without their rounding). A greatest
    ``error`` limits what is cut off; where rounding to 16 bits adds more than it allows, a warning says so.

    Args:
        ref: a folder, a weight file, a state dict, or what :func:`loratools.load` returned.
        out: a folder to make, or a file ending in ``.safetensors``; None keeps the result in memory.
        rank: of every module; above its present rank it is padded with zeros. Over all modules, that many ranks a
            module on average, spent where they help most.
        energy: the share of Σ σ² that is kept, above 0 up to 1.
        error: the greatest relative error of the whole adapter (of each module), from 0 to below 1.
        params: how many stored values all tensors may have together.
        size: how many bytes the weight file may have, header and all.
        noise_floor: keep what rounding the factors to their stored type cannot have made.
        per_module: judge each module on its own, or make one optimum over all; by default, each on its own for
            ``rank``, ``energy`` and ``noise_floor``.
        config: the configuration, where it does not lie beside the weights.
        alpha: the ``lora_alpha``, where no configuration says it.
        allow_pickle: read ``.bin`` and ``.pt`` files.
        blockwise_experts: the experts' B is packed expert-slowest.
        enable_lora: which parts of a fused weight a loralib file has factors for.
        dtype: of the result (``"bf16"``, ``torch.bfloat16``); by default the widest of the factors'.
        to: the format of the result; by default that of the adapter, and PEFT's where that is only read.
        force: replace an output that loratools made.
        sync: wait for the disk.
        jobs: workers; by default the processors at hand, four at most.
        executor: ``"threads"``, ``"processes"`` or ``"inline"``.
        device: where the long products are formed: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        max_memory: bytes that may be needed.
        on_step: called after each module, for progress.

    Returns:
        Ranks and errors; ``adapter`` holds the result.

    Raises:
        InputError: the adapter cannot be read, holds values that are not finite, or nothing would be left of it.
        Mismatch: the configuration was written for other weights.
        Unsupported: a rule that cannot be, or a module that is not a plain sum.
        NonFinite: a value does not fit ``dtype``.
        OverBudget: more memory is needed than ``max_memory``.
        OutputExists: ``out`` exists, or overlaps the input.
    """
    started = time.perf_counter()
    device = check_double(device)
    rule = chosen_rule(rank, energy, error, params, size, noise_floor, per_module)
    task = _prepare(
        ref, out, rule, dtype, to=to, force=force, config=config, alpha=alpha, allow_pickle=allow_pickle,
        blockwise_experts=blockwise_experts, enable_lora=enable_lora,
    )  # fmt: skip
    workers = _workers(task, executor, jobs, max_memory)
    work = _carry_out(task, workers, device, on_step)
    if task.out is not None:
        save(
            work.adapter,
            task.out,
            format=task.to,
            force=force,
            sync=sync,
            provenance=task.provenance,
            inputs=task.inputs,
        )
    return _report(task, work, started, workers)


def plan_reduce(
    ref: Ref | Adapter | Mapping[str, Any],
    out: Ref,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    params: int | None = None,
    size: int | None = None,
    noise_floor: bool = False,
    per_module: bool | None = None,
    dtype: object = None,
    to: str | None = None,
    force: bool = False,
    jobs: int | None = None,
    executor: str = "threads",
    device: str = "cpu",
    max_memory: int | None = None,
    **opening: Any,
) -> dict[str, Any]:
    """What :func:`reduce` would do, in numbers, as ``--dry-run`` prints it: everything but the writing is done.

    Arguments and errors are those of :func:`reduce`.
    """
    started = time.perf_counter()
    device = check_double(device)
    rule = chosen_rule(rank, energy, error, params, size, noise_floor, per_module)
    task = _prepare(ref, out, rule, dtype, to=to, force=force, **opening)
    workers = _workers(task, executor, jobs, max_memory)
    work = _carry_out(task, workers, device, None)
    told = _report(task, work, started, workers).to_dict()
    named = ("rule", "value", "scope", "rank", "relative_error", "modules", "dropped", "warnings")
    planned = describe_save(
        work.adapter,
        out,
        verb="reduce",
        reads=[task.adapter],
        format=task.to,
        force=force,
        provenance=task.provenance,
        inputs=task.inputs,
    )
    return {**planned, **{name: told[name] for name in named}, "peak_memory": _peak_bytes(task, 1)}


# --- before anything is computed -----------------------------------------------------------------------------


def _prepare(
    ref: Ref | Adapter | Mapping[str, Any],
    out: Ref | None,
    rule: Rule,
    dtype: object,
    *,
    to: str | None,
    force: bool,
    **opening: Any,
) -> Task:
    """Open the adapter, and refuse what can be refused from its headers."""
    adapter = ref if isinstance(ref, Adapter) else open_adapter(ref, **opening)
    adapter.require_computable()
    if not adapter.modules:
        raise InputError(f"{adapter.name} has no modules to reduce")
    for name, module in adapter.modules.items():
        require_own_rank(adapter.name, name, module)
    for name, module in adapter.modules.items():
        require_delta(name, module)
    inputs = tuple(Path(one) for one in [ref] if isinstance(one, (str, os.PathLike)))
    chosen = float_dtype(dtype) or named_dtype(widest([adapter]))
    task = Task(adapter, rule, chosen, None if out is None else Path(out), inputs, to)
    if task.out is not None:
        require_place(task.out, [*input_paths(adapter), *inputs], force=force)
    return task


def _workers(task: Task, executor: str, jobs: int | None, max_memory: int | None) -> Executor:
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    needed = _peak_bytes(task, workers.jobs)
    if max_memory is not None and needed > max_memory:
        raise OverBudget(needed, max_memory, hint="use --jobs 1, or allow more")
    return workers


def _peak_bytes(task: Task, jobs: int) -> int:
    """An upper bound of the memory needed: the result, and for each worker one module in float64 a few times over."""
    costs = {
        name: module_cost(module) * max(1, module.rank or 1) for name, module in task.adapter.modules.items()
    }
    whole = sum(module.parameters for module in task.adapter.modules.values())
    if task.rule.name == "rank":
        whole = sum(
            module_cost(module) * int(task.rule.value or 0) for module in task.adapter.modules.values()
        )
    return RUNTIME_BYTES + 4 * whole + jobs * 8 * _COPIES * max(costs.values())


# --- computing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """What was computed: the singular values of every module before, the adapter after, and how far it is off.

    Attributes:
        distances: ‖before - after‖ by module, where that was measured.
    """

    spectra: dict[str, Array]
    adapter: Adapter
    distances: dict[str, float]


def _carry_out(task: Task, workers: Executor, device: str, on_step: Callable[[Item], None] | None) -> _Work:
    if task.rule.per_module:
        found = gather(
            partial(reduced, rule=task.rule, dtype=task.dtype, device=device),
            task.items,
            workers,
            on_step=on_step,
        )
        spectra = {item.name: outcome.values for item, outcome in zip(task.items, found, strict=True)}
        made = {
            item.name: one.made for item, one in zip(task.items, found, strict=True) if one.made is not None
        }
        return _work(task, spectra, made)
    spectra = dict(
        zip(task.adapter.modules, gather(partial(spectrum, device=device), task.items, workers), strict=True)
    )
    ranks = ranks_together(task, spectra)
    kept = [replace(item, rank=ranks[item.name]) for item in task.items if ranks[item.name]]
    modules = gather(partial(truncated, dtype=task.dtype, device=device), kept, workers, on_step=on_step)
    return _work(task, spectra, {item.name: one for item, one in zip(kept, modules, strict=True)})


def _work(task: Task, spectra: dict[str, Array], made: Mapping[str, Made]) -> _Work:
    distances = {name: one.distance for name, one in made.items() if one.distance is not None}
    return _Work(spectra, reduced_adapter(task, {name: one.module for name, one in made.items()}), distances)


# --- the result ----------------------------------------------------------------------------------------------


def _bytes_before(task: Task) -> int:
    extents = [ref.source.extent(ref.name) for ref in task.adapter.tensors]
    paths = {extent.path for extent in extents if extent is not None}
    if paths:
        return sum(os.stat(path).st_size for path in paths)  # noqa: PTH116 - as extents name them
    return sum(ref.spec.nbytes for ref in task.adapter.tensors)


def _report(task: Task, work: _Work, started: float, workers: Executor) -> ReduceReport:
    modules = _modules(task, work)
    error = _over_all(modules)
    kept = [one.rank for one in modules if one.rank]
    return ReduceReport(
        output=None if task.out is None else str(task.out),
        rule=task.rule.name,
        value=task.rule.value,
        scope="per module" if task.rule.per_module else "global",
        rank=Range(min(kept), max(kept)),
        relative_error=error,
        dtype=task.dtype.name,
        modules=modules,
        dropped=tuple(one.name for one in modules if not one.rank),
        parameters_before=sum(ref.spec.count for ref in task.adapter.tensors),
        parameters_after=sum(ref.spec.count for ref in work.adapter.tensors),
        bytes_before=_bytes_before(task),
        bytes_after=written_bytes(task, work.adapter),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(workers),
        warnings=tuple(_warnings(task, modules, error)),
        adapter=work.adapter,
    )


def _over_all(modules: tuple[ReducedModule, ...]) -> float:
    whole = math.hypot(*(one.norm for one in modules))
    lost = math.hypot(*(one.norm * one.relative_error for one in modules))
    return lost / whole if whole else 0.0


def _hides_its_kernel(module: Module) -> bool:
    """Whether the file has a convolution's kernel flattened, as it would have a linear layer."""
    return module.kind in {"adalora", "loha", "lokr"} and "embedding" not in module.options


def _modules(task: Task, work: _Work) -> tuple[ReducedModule, ...]:
    found = []
    for name, module in task.adapter.modules.items():
        lost = tails(work.spectra[name])
        made = work.adapter.modules.get(name)
        rank = 0 if made is None else made.rank or 0
        norm = float(lost[0])
        apart = work.distances.get(name, float(lost[min(rank, len(lost) - 1)]))
        error = apart / norm if norm else 0.0
        found.append(ReducedModule(name, module.rank, rank, module.shape, norm, error, norm == 0))
    return tuple(found)


def _warnings(task: Task, modules: tuple[ReducedModule, ...], error: float) -> Iterable[str]:
    worst = max((one.relative_error for one in modules), default=0.0) if task.rule.per_module else error
    if (
        task.rule.name == "error"
        and worst > max(task.rule.value or 0.0, _ROUNDED)
        and task.dtype.nbytes(1) <= 2
    ):
        yield (
            f"the relative error is {worst:.2g} once the factors are rounded to {task.dtype.name}, more than the "
            f"{task.rule.value:g} that was asked for: --dtype f32 keeps to it"
        )
    kernels = [
        (name, module.kind) for name, module in task.adapter.modules.items() if _hides_its_kernel(module)
    ]
    if kernels and settled(task.adapter, task.to) == "peft":  # others tell by the model's own names
        name, kind = kernels[0]
        yield (
            f"{name} is {kind} and becomes a plain LoRA; its file does not tell a linear layer from a convolution, and "
            "on a convolution PEFT will not load the result"
            + (f" (and {len(kernels) - 1} more)" if kernels[1:] else "")
        )
    kinds = {name: module.kind for name, module in task.adapter.modules.items()}
    raised = [m for m in modules if kinds[m.name] == "lora" and m.rank > (m.rank_before or m.rank)]
    if raised:
        one = raised[0]
        yield (
            f"{one.name} is raised from rank {one.rank_before} to {one.rank}, with zeros that change nothing"
            + (f" (and {len(raised) - 1} more are)" if raised[1:] else "")
        )
    zero = [one for one in modules if one.zero]
    if zero:
        fate = "kept, as zeros" if zero[0].rank else "dropped"
        yield f"{zero[0].name} changes nothing; {fate}" + (f" (and {len(zero) - 1} more)" if zero[1:] else "")
    dropped = [one for one in modules if not one.rank and not one.zero]
    if dropped:
        yield (
            f"{dropped[0].name} is dropped: nothing of it is left at this rule"
            + (f" (and {len(dropped) - 1} more are)" if dropped[1:] else "")
        )
