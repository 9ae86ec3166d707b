"""``combine``: several adapters as one, computed on their factors, without a model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loratools.adapter import Adapter, AdapterConfig, Extra, Module, flat_shape
from loratools.arrays import check_double
from loratools.dtypes import DTYPES
from loratools.errors import Mismatch, OverBudget, Unsupported
from loratools.executors.base import make_executor
from loratools.formats.opening import open_adapter
from loratools.matrices import lora_module, module_cost, require_delta
from loratools.models import open_base
from loratools.naming import FUSED_EXPERTS
from loratools.pairing import pair, require_same_shapes
from loratools.provenance import record
from loratools.publishing import require_place
from loratools.refs import local_path
from loratools.running import default_jobs, gather, peak_memory
from loratools.spelling import bare
from loratools.tensors.base import TensorRef, TensorSpec
from loratools.verbs.combine_extras import combine_extras, plan_extras
from loratools.verbs.combine_report import CombinedExtra, CombinedModule, CombineReport
from loratools.verbs.combine_work import Item, combine_one
from loratools.verbs.saving import describe_save, float_dtype, identify_adapter, input_paths, save, widest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loratools.methods.base import Method
    from loratools.models import BaseModel
    from loratools.pairing import Pairing
    from loratools.tensors.base import TensorSource
    from loratools.verbs.combine_extras import ExtrasRule
    from loratools.verbs.combine_work import Combined

__all__ = ["CombinePlan", "combine", "plan_combine", "run_combine"]

Ref = str | os.PathLike[str]


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

    def rank_of(self, item: Item) -> int:
        """The rank a module of the result has: what is asked for, or the sum of the adapters'."""
        return self.rank or sum(_stored_rank(module) for _, module in item.modules)

    def peak_bytes(self, jobs: int) -> int:
        """An upper bound on what the arrays take: all results, and one matrix after another for each worker."""
        results = sum(self.rank_of(item) * module_cost(item.like) for item in self.items)
        working = max((self._working(item) for item in self.items), default=0)
        return (4 if self.dtype != "F64" else 8) * results + jobs * working

    def _working(self, item: Item) -> int:
        out, into = flat_shape(item.like.shape)
        factors = 8 * 4 * (out + into) * sum(_stored_rank(module) for _, module in item.modules)
        return factors + (3 * 4 * out * into if self.options.get("space") == "weight" else 0)

    def to_dict(self, jobs: int = 1) -> dict[str, Any]:
        """The plan in numbers, as ``--dry-run`` prints it."""
        described = describe_save(
            _as_planned(self), self.output or Path("combined"), verb="combine", reads=self.adapters,
            dtype=self.dtype, force=self.force,
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
    extras: ExtrasRule = "error",
    dtype: object = None,
    force: bool = False,
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
    **options: Any,
) -> CombinePlan:
    """Decide everything about a combination from headers; only extras are compared by value.

    Arguments and errors are those of :func:`combine`.
    """
    from loratools.methods import find

    opened = _open(adapters, allow_pickle=allow_pickle, blockwise=blockwise_experts)
    factors = _weights(weights, len(opened))
    chosen = find(method)
    settled = chosen.settle(options, len(opened))
    _require_rank(rank)
    wanted = float_dtype(dtype)
    output = None if out is None else Path(out)
    if output is not None:
        require_place(output, _inputs(opened, base), force=force)
    model = None if base is None else _open_base(base)
    pairing = pair(opened, model)
    _require_deltas(opened, pairing)
    require_same_shapes(pairing)
    items = _items(opened, pairing, factors, rank, model)
    planned_extras = plan_extras(pairing.extras, extras, factors)
    _require_apart(opened, pairing)
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
        warnings=_warnings(opened, pairing, planned_extras),
    )


def combine(
    adapters: Ref | Adapter | Sequence[Ref | Adapter],
    out: Ref | None = None,
    *,
    weights: float | Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    base: Ref | Mapping[str, Any] | None = None,
    extras: ExtrasRule = "error",
    dtype: object = None,
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
        rank: of every module of the result; by default what the method gives, for a sum the sum of the ranks.
        base: a model both belong to, where their names alone do not match them.
        extras: what to do with heads, biases and token rows that several adapters have and differ in: refuse, take the
            first adapter's, or their weighted mean. One that a single adapter has is kept as it is.
        dtype: of the floats written (``"bf16"``, ``torch.bfloat16``); by default the widest that is read.
        force: replace an output that loratools made.
        sync: wait for the disk.
        allow_pickle: read ``.bin`` adapters.
        blockwise_experts: the experts' B is packed expert-slowest.
        jobs: workers; by default the processors at hand, four at most.
        executor: ``"threads"``, ``"processes"`` or ``"inline"``.
        device: where the best approximation of a rank is formed: ``"cpu"``, ``"cuda"`` or ``"auto"``. What a method
            does with entries or small matrices stays on the processor.
        max_memory: bytes the arrays may take.
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
        adapters, out, weights=weights, method=method, rank=rank, base=base, extras=extras, dtype=dtype, force=force,
        allow_pickle=allow_pickle, blockwise_experts=blockwise_experts, **options,
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
    work = partial(combine_one, method=planned.method, options=planned.options, device=device)
    results = gather(work, planned.items, workers, on_step=on_step)
    adapter, modules = _assemble(planned, results)
    written = 0
    if planned.output is not None:
        saved = save(
            adapter, planned.output, dtype=planned.dtype, force=planned.force, sync=sync,
            provenance=_provenance(planned),
            inputs=_inputs(planned.adapters, planned.base),
        )  # fmt: skip
        written = saved.bytes
    return _report(planned, results, adapter, modules, written, started)


# --- before: what is combined with what --------------------------------------------------------------------------


def _open(
    adapters: Ref | Adapter | Sequence[Ref | Adapter], *, allow_pickle: bool, blockwise: bool
) -> tuple[Adapter, ...]:
    several = [adapters] if isinstance(adapters, (str, os.PathLike, Adapter)) else list(adapters)
    if not several:
        raise Unsupported("there is nothing to combine", hint="name one adapter or more")
    opened = tuple(
        open_adapter(one, allow_pickle=allow_pickle, blockwise_experts=blockwise)
        if isinstance(one, (str, os.PathLike))
        else one
        for one in several
    )
    for adapter in opened:
        adapter.require_computable()
    return opened


def _weights(weights: float | Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite number for each adapter.

    Raises:
        Unsupported: another count of them, or one that is not finite.
    """
    if weights is None:
        return (1.0,) * count
    given = [float(one) for one in ([weights] if isinstance(weights, (int, float)) else weights)]
    if given and len(given) != count:
        raise Unsupported(
            f"{len(given)} weight{'s' * (len(given) != 1)} for {count} adapter{'s' * (count != 1)}",
            hint="give one for each, in their order",
        )
    for number, weight in enumerate(given, 1):
        if not math.isfinite(weight):
            raise Unsupported(f"weight {number} is {weight}, not a finite number")
    return tuple(given) or (1.0,) * count


def _require_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise Unsupported(f"rank {rank} leaves nothing", hint="a rank is 1 or more")


def _inputs(adapters: Sequence[Adapter], base: Ref | Mapping[str, Any] | None) -> list[Path]:
    """What an output must not touch."""
    found = [path for adapter in adapters for path in input_paths(adapter)]
    return found if base is None or isinstance(base, Mapping) else [*found, local_path(base)]


def _open_base(base: Ref | Mapping[str, Any]) -> BaseModel:
    return open_base(base if isinstance(base, Mapping) else local_path(base))


def _require_deltas(adapters: tuple[Adapter, ...], pairing: Pairing) -> None:
    for slots in pairing.modules.values():
        for adapter, slot in zip(adapters, slots, strict=True):
            if slot is not None:
                require_delta(f"{adapter.name}: {slot[0]}", slot[1])


def _items(
    adapters: tuple[Adapter, ...],
    pairing: Pairing,
    weights: tuple[float, ...],
    rank: int | None,
    base: BaseModel | None,
) -> tuple[Item, ...]:
    double = widest(adapters) == "F64"
    items = []
    for name, slots in pairing.modules.items():
        having = [(task, slot) for task, slot in enumerate(slots) if slot is not None]
        modules = tuple(slot for _, slot in having)
        _require_experts(name, [module for _, module in modules])
        tasks = tuple(task for task, _ in having)
        factors = tuple(weights[task] for task in tasks)
        kernel = _kernel(name, modules[0][1], base)
        items.append(Item(name, modules, tasks, factors, rank, double, kernel))
    if not items:
        raise Unsupported(
            f"{adapters[0].name} has no modules; there is nothing to combine",
            hint="loratools inspect says what it holds",
        )
    return tuple(items)


def _kernel(name: str, module: Module, base: BaseModel | None) -> tuple[int, ...]:
    """A convolution's kernel, from the base: AdaLoRA, LoHa and LoKr may store its factors flat."""
    spec = None if base is None else base.source.specs.get(f"{name}.weight")
    if spec is None or "experts" in module.options or flat_shape(spec.shape) != flat_shape(module.shape):
        return ()
    return spec.shape[2:]


def _require_experts(name: str, modules: list[Module]) -> None:
    counts = {module.options.get("experts", 1) for module in modules}
    if len(counts) > 1:
        raise Mismatch(f"{name}: the adapters have {' and '.join(map(str, sorted(counts)))} experts")
    kinds = {bool(module.options.get("embedding")) for module in modules}
    if len(kinds) > 1:
        raise Mismatch(f"{name}: one adapter has it as an embedding and another one does not")


def _require_apart(adapters: tuple[Adapter, ...], pairing: Pairing) -> None:
    """Refuse a weight that one adapter adds to and another one replaces: the order would matter."""
    owners = {f"{name}.weight": name for name in pairing.modules}
    for name, slots in pairing.extras.items():
        for index, slot in enumerate(slots):
            module = pairing.modules.get(owners.get(name, ""))
            if slot is None or slot[1].role != "replacement" or module is None or module[index] is not None:
                continue
            other = next(task for task, one in enumerate(module) if one is not None)
            raise Mismatch(
                f"{adapters[index].name} replaces {name}, to which {adapters[other].name} adds a delta",
                hint="merge them into the base one after the other",
            )


def _warnings(
    adapters: tuple[Adapter, ...], pairing: Pairing, extras: tuple[CombinedExtra, ...]
) -> tuple[str, ...]:
    found = [f"{adapter.name}: {warning}" for adapter in adapters for warning in adapter.warnings]
    for adapter, strange in zip(adapters, pairing.unplaced, strict=True):
        if strange:
            rest = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            found.append(f"{adapter.name}: {strange[0]}{rest} not found in the base; matched by name")
    bases = {adapter.config.base_model for adapter in adapters if adapter.config.base_model}
    if len(bases) > 1:
        found.append(f"the adapters name different base models: {', '.join(sorted(bases))}")
    if len(adapters) > 1 and not pairing.common:
        shared = sum(sum(slot is not None for slot in slots) > 1 for slots in pairing.modules.values())
        if not shared:
            found.append("no module is in more than one adapter; the result has them side by side")
    for rule, taken in (
        ("first", "the first adapter's were taken"),
        ("average", "their weighted mean was taken"),
    ):
        if names := [extra.name for extra in extras if extra.rule == rule]:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"the adapters differ in {names[0]}{rest}: {taken}")
    return tuple(found)


def _stored_rank(module: Module) -> int:
    """The rank of a module's factors as they will be: that of a LoHa is squared, of a LoKr not known exactly."""
    out, into = flat_shape(module.shape)
    rank = module.rank or min(out, into)
    if module.kind == "loha":
        rank *= rank
    if module.kind == "lokr" and "left" in module.tensors:
        rank *= min(module.tensors["left"].shape)
    return rank


# --- after: the result as an adapter -------------------------------------------------------------------------------


def _assemble(
    planned: CombinePlan, results: Sequence[Combined]
) -> tuple[Adapter, tuple[CombinedModule, ...]]:
    names = _names(planned)
    modules: dict[str, Module] = {}
    lines = []
    for item, result in zip(planned.items, results, strict=True):
        name = names[item.name]
        made = lora_module(item.like, result.factors, prefix=name, bias=result.bias)
        modules[name] = made
        lines.append(
            CombinedModule(
                name=name,
                rank=made.rank or 0,
                shape=made.shape,
                adapters=item.tasks,
                relative_error=_ratio(result.error, result.norm),
                norm=result.norm,
                zero=not any(factor.up.any() and factor.down.any() for factor in result.factors),
            )
        )
    extras = combine_extras(planned.pairing.extras, planned.extras, planned.weights)
    return _adapter(planned, modules, extras), tuple(lines)


def _adapter(planned: CombinePlan, modules: Mapping[str, Module], extras: Mapping[str, Extra]) -> Adapter:
    first = planned.adapters[0]
    name = "combined" if planned.output is None else str(planned.output)
    return replace(
        first,
        name=name,
        format="peft",
        modules=modules,
        config=_config(planned.adapters),
        metadata={},
        extras=extras,
        evidence="combined",
        kinds=("lora",),
        warnings=(),
        tensors=tuple(ref for module in modules.values() for ref in module.tensors.values()),
    )


def _config(adapters: Sequence[Adapter]) -> AdapterConfig:
    """The first adapter's, with everything that another one has trained besides."""
    raw = dict(adapters[0].config.raw)
    for field in ("target_parameters", "modules_to_save"):
        listed = [name for adapter in adapters for name in adapter.config.raw.get(field) or ()]
        if listed:
            raw[field] = list(dict.fromkeys(listed))
    base = next((one.config.base_model for one in adapters if one.config.base_model), None)
    return AdapterConfig("LORA", base, raw)


def _names(planned: CombinePlan) -> dict[str, str]:
    """What each module is called in the file: its own name, but for parameters of experts.

    PEFT wraps the module that holds them once for each parameter; which one a wrapper adapts follows from how many are
    targeted, and that may be more than any one adapter did.
    """
    targeted = dict.fromkeys(
        name for adapter in planned.adapters for name in adapter.config.raw.get("target_parameters") or ()
    )
    return {item.name: _file_name(item, list(targeted)) for item in planned.items}


def _file_name(item: Item, targeted: Sequence[str]) -> str:
    path, _, parameter = item.name.rpartition(".")
    owned = {
        last
        for owner, _, last in (name.rpartition(".") for name in targeted)
        if path == owner or path.endswith("." + owner)
    }
    if parameter not in owned or bare(item.modules[0][0]).endswith("." + parameter):
        return item.name
    order = {last: index for index, last in enumerate(FUSED_EXPERTS)}
    ordered = sorted(owned, key=lambda last: (order.get(last, len(order)), last))
    return path + ".base_layer" * (len(ordered) - 1 - ordered.index(parameter))


def _ratio(error: float, norm: float | None) -> float:
    return error / norm if norm else 0.0


def _report(
    planned: CombinePlan,
    results: Sequence[Combined],
    adapter: Adapter,
    modules: tuple[CombinedModule, ...],
    written: int,
    started: float,
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
        relative_error=_ratio(errors, norms),
        dtype=planned.dtype,
        modules=modules,
        extras=planned.extras,
        bytes=written,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        warnings=warnings,
        adapter=adapter,
    )


def _provenance(planned: CombinePlan) -> dict[str, Any]:
    from loratools import __version__

    parameters = {
        "method": planned.method.name,
        "options": planned.options,
        "weights": list(planned.weights),
        "rank": planned.rank,
        "dtype": planned.dtype,
    }
    return record("combine", __version__, parameters, [identify_adapter(one) for one in planned.adapters])


# --- a dry run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Headers:
    """A source that can say what its tensors will be, and no more."""

    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]

    def extent(self, name: str) -> None:
        """Nowhere yet."""


def _as_planned(planned: CombinePlan) -> Adapter:
    """The result as far as headers tell: shapes without values."""
    modules = {}
    names = _names(planned)
    for item in planned.items:
        modules[names[item.name]] = _shapes(item, planned.rank_of(item), planned.dtype)
    return _adapter(planned, modules, _unread_extras(planned))


def _shapes(item: Item, rank: int, dtype: str) -> Module:
    like = item.like
    out, _ = flat_shape(like.shape)
    count = like.options.get("experts", 1)
    shapes: dict[str, tuple[int, ...]] = {
        "down": (rank * count, *like.shape[1:]),
        "up": (out, rank * count, *(1 for _ in like.shape[2:])),
    }
    if any("up_bias" in module.tensors for _, module in item.modules):
        shapes["up_bias"] = (out,)
    source = cast(
        "TensorSource",
        _Headers({role: TensorSpec(DTYPES[dtype], shape) for role, shape in shapes.items()}, {}),
    )
    options = {key: like.options[key] for key in ("embedding", "experts") if key in like.options}
    refs = {role: TensorRef(source, role) for role in shapes}
    return Module("lora", refs, rank, float(rank), 1.0, like.shape, options)


def _unread_extras(planned: CombinePlan) -> dict[str, Extra]:
    """The extras as the first adapter that has them stores them: a mean has the same shape."""
    found = {}
    for entry in planned.extras:
        key, extra = next(slot for slot in planned.pairing.extras[entry.name] if slot is not None)
        found[key] = extra
    return found
