"""``diff``: how far apart two adapters are in what they do, whatever their factors, ranks, kinds and names."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter
from loratools.arrays import check_double
from loratools.deltas.likeness import Likeness, total
from loratools.errors import InputError, OverBudget, Unsupported
from loratools.executors.base import make_executor
from loratools.formats.opening import open_adapter
from loratools.models import BaseModel, open_base
from loratools.pairing import named_architecture, pair, require_same_shapes
from loratools.running import default_jobs, gather
from loratools.verbs.diff_report import ConfigDifference, DiffReport, ModuleDifference, TensorDifference
from loratools.verbs.diff_work import Compared, Pair, compare_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from loratools.adapter import Extra, Module
    from loratools.executors.base import Executor
    from loratools.pairing import Pairing

__all__ = ["DiffPlan", "diff", "plan_diff", "run_diff"]

Ref = str | os.PathLike[str]
# Factors drawn from one seed stay closer than this after training; independent ones are 1.41 apart.
_SAME_START = 0.7
_OTHER_END = 0.7  # and the cosine of factors that start at zero is below this, where the training differed
# Greatest relative error of a value that is rounded to the type.
_ROUNDINGS = {"F16": 2.0**-11, "BF16": 2.0**-9}
# Fields that say nothing of the update, and what a missing field means where that is not false or empty.
_UNTOLD = {"inference_mode"}
_DEFAULTS: dict[str, Any] = {"init_lora_weights": True, "bias": "none", "init_weights": True}


@dataclass(frozen=True, slots=True)
class DiffPlan:
    """What a comparison will look at; nothing has been read yet."""

    a: Adapter
    b: Adapter
    pairing: Pairing
    items: tuple[Pair, ...]
    has_base: bool = False

    def peak_memory(self, jobs: int) -> int:
        """Bytes that the factors of the greatest modules take, as many at a time as there are workers."""
        sizes = sorted((item.memory for item in self.items), reverse=True)
        return sum(sizes[:jobs])

    def require_memory(self, allowed: int | None, jobs: int) -> None:
        """Refuse to start on more memory than is allowed.

        Raises:
            OverBudget: more is needed.
        """
        if allowed is not None and (needed := self.peak_memory(jobs)) > allowed:
            raise OverBudget(needed, allowed, hint="fewer --jobs need less" if jobs > 1 else None)


def diff(
    a: Ref | Mapping[str, Any] | Adapter,
    b: Ref | Mapping[str, Any] | Adapter,
    *,
    base: Ref | Mapping[str, Any] | BaseModel | None = None,
    arch: str | None = None,
    tolerance: float = 1e-6,
    allow_pickle: bool = False,
    jobs: int | None = None,
    executor: str = "threads",
    device: str = "cpu",
    max_memory: int | None = None,
    on_step: Callable[[Pair], None] | None = None,
) -> DiffReport:
    """Compare what two adapters do: their scaled deltas, not how they are factored.

    >>> import numpy as np
    >>> import loratools as lt
    >>> rng = np.random.default_rng(0)
    >>> up, down, turn = (rng.standard_normal(shape) for shape in ((6, 2), (2, 9), (2, 2)))
    >>> def adapter(up, down):
    ...     factors = {"fc.lora_A.weight": down, "fc.lora_B.weight": up}
    ...     return lt.load(factors, config={"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    >>> report = diff(adapter(up, down), adapter(up @ turn, np.linalg.inv(turn) @ down))
    >>> report.identical, report.relative < 1e-12
    (True, True)
    >>> report = diff(adapter(up, down), adapter(2 * up, down))
    >>> report.identical, round(report.relative, 9), report.modules[0].overlap > 0.999
    (False, 1.0, True)

    Args:
        a: a folder, a weight file, or an adapter; the one that errors are relative to.
        b: the other one.
        base: the model both belong to, where their names alone do not match their modules.
        arch: the architecture of that model, such as ``"sdxl"``; by default, what names and shapes say.
        tolerance: the greatest relative distance that counts as identical.
        allow_pickle: read ``.bin`` adapters.
        jobs: workers; by default the processors at hand, four at most.
        executor: what runs them.
        device: where the Gram matrices of the factors are formed: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        max_memory: refuse to start if more is needed, in bytes.
        on_step: called after each module or tensor, for progress.

    Returns:
        The differences, over all and by module. What is not a plain sum (DoRA, IA3, PiSSA) is compared as it is stored
        where both are of that kind; the report says so.

    Raises:
        Mismatch: modules of the same name do not fit each other, or their names do not tell which are the same.
        Unsupported: a module that is not a plain sum against one of another kind.
        InputError: a tensor holds NaN or infinite values.
        OverBudget: more memory is needed than allowed.
    """
    started = time.perf_counter()
    device = check_double(device)
    planned = plan_diff(_opened(a, allow_pickle), _opened(b, allow_pickle), base=base, arch=arch)
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    planned.require_memory(max_memory, workers.jobs)
    return run_diff(planned, workers, tolerance=tolerance, device=device, on_step=on_step, started=started)


def plan_diff(
    a: Adapter,
    b: Adapter,
    *,
    base: Ref | Mapping[str, Any] | BaseModel | None = None,
    arch: str | None = None,
) -> DiffPlan:
    """Match two adapters and decide what to compare with what, from their headers alone.

    Raises:
        LoratoolsError: as :func:`diff`, but for the values.
    """
    for adapter in (a, b):
        adapter.require_computable()
    model = base if isinstance(base, BaseModel) or base is None else open_base(base)
    pairing = pair([a, b], model, named_architecture(arch))
    for name, (one, other) in pairing.modules.items():
        if one is not None and other is not None:
            _require_comparable(name, one[1], other[1])
    require_same_shapes(pairing)
    items = []
    for name, (one, other) in pairing.modules.items():
        items.append(Pair(name, None if one is None else one[1], None if other is None else other[1]))
    for name, slots in pairing.extras.items():
        first, second = slots
        if first is not None and second is not None and not _untold(first[1]):
            tensors = first[1].tensor, second[1].tensor
            items.append(
                Pair(name, tensors=tensors, rows=(first[1].indices, second[1].indices), role=first[1].role)
            )
    items += [
        Pair(f"{item.name}.magnitude", tensors=(item.a.tensors["magnitude"], item.b.tensors["magnitude"]),
             role="magnitude")
        for item in items if item.a is not None and item.b is not None and "magnitude" in item.a.tensors
    ]  # fmt: skip
    return DiffPlan(a, b, pairing, tuple(items), model is not None)


def run_diff(
    planned: DiffPlan,
    executor: Executor,
    *,
    tolerance: float = 1e-6,
    device: str = "cpu",
    on_step: Callable[[Pair], None] | None = None,
    started: float | None = None,
) -> DiffReport:
    """Read and compare what was planned; arguments and errors are those of :func:`diff`."""
    if not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance} is not a number of at least 0")
    started = time.perf_counter() if started is None else started
    results = gather(partial(compare_pair, device=device), planned.items, executor, on_step=on_step)
    whole = total(
        one.likeness for item, one in zip(planned.items, results, strict=True) if item.tensors is None
    )
    found = list(zip(planned.items, results, strict=True))
    modules = tuple(_module(item, item.a, item.b, one) for item, one in found if item.a and item.b)
    extras = tuple(_tensor(item, one) for item, one in found if item.tensors)
    only = [_only(planned.pairing, side) for side in (0, 1)]
    same = all(extra.relative is not None and extra.relative <= tolerance for extra in extras)
    return DiffReport(
        a=planned.a.name,
        b=planned.b.name,
        identical=same and not _missing(planned.pairing, only, found) and whole.relative <= tolerance,
        distance=whole.distance,
        relative=whole.relative,
        cosine=whole.cosine,
        norm_a=whole.norm_a,
        norm_b=whole.norm_b,
        tolerance=tolerance,
        only_in_a=only[0],
        only_in_b=only[1],
        modules=modules,
        extras=extras,
        config=tuple(_config_differences(planned.a, planned.b)),
        warnings=tuple(_warnings(planned, found, whole.relative, tolerance)),
        seconds=time.perf_counter() - started,
        one_sided_modules=any(None in slots for slots in planned.pairing.modules.values()),
    )


def _opened(ref: Ref | Mapping[str, Any] | Adapter, allow_pickle: bool) -> Adapter:
    return ref if isinstance(ref, Adapter) else open_adapter(ref, allow_pickle=allow_pickle)


def _missing(
    pairing: Pairing, only: Sequence[tuple[str, ...]], found: Sequence[tuple[Pair, Compared]]
) -> bool:
    """Whether one adapter has what the other lacks.

    A fused weight has all its parts, also those that were not trained: across dialects, a part that does nothing is
    no difference.
    """
    if not pairing.architecture:
        return any(only)
    idle = {
        item.name
        for item, one in found
        if (item.a is None or item.b is None) and not (one.likeness.norm_a or one.likeness.norm_b)
    }
    return any(name not in idle for names in only for name in names)


def _untold(extra: Extra) -> bool:
    """Whether a tensor says nothing of what the adapter does."""
    return extra.role == "training_only"


def _only(pairing: Pairing, side: int) -> tuple[str, ...]:
    def told(name: str) -> bool:
        slot = pairing.extras[name][side] if name in pairing.extras else None
        return name in pairing.modules or slot is None or not _untold(slot[1])

    return tuple(name for name in pairing.only_in(side) if told(name))


def _require_comparable(name: str, a: Module, b: Module) -> None:
    """Refuse what neither is a plain sum nor, on both sides, the same other thing.

    Raises:
        Unsupported: names the module, both kinds and the way out.
        InputError: they pack different numbers of experts.
    """
    if a.options.get("experts", 1) != b.options.get("experts", 1):
        counts = [module.options.get("experts", 1) for module in (a, b)]
        raise InputError(f"{name}: {counts[0]} experts in A and {counts[1]} in B")
    if a.is_delta and b.is_delta:
        return
    kinds = [_kind(module) for module in (a, b)]
    if kinds[0] != kinds[1]:
        raise Unsupported(
            f"{name} is {kinds[0]} in A and {kinds[1]} in B, and not both are plain sums",
            hint="merge each into the base and compare LoRAs extracted from the two",
        )
    if "init" in a.options and (a.rank, a.scaling) != (b.rank, b.scaling):
        raise Unsupported(
            f"{name} starts from a part of its base ({a.options['init']}), of another rank or scaling in A than in B",
            hint="loratools normalize --base BASE makes plain adapters of them",
        )


def _kind(module: Module) -> str:
    """What the update is, in a word: its kind, and what it was initialised from."""
    words = [module.kind, module.options.get("init", "")]
    if module.kind == "ia3":
        words.append("of inputs" if module.options["feedforward"] else "of outputs")
    return " ".join(filter(None, words))


def _module(item: Pair, a: Module, b: Module, compared: Compared) -> ModuleDifference:
    likeness = compared.likeness
    sides = [side for side in (likeness.outputs, likeness.inputs) if side is not None]
    return ModuleDifference(
        name=item.name,
        norm_a=likeness.norm_a,
        norm_b=likeness.norm_b,
        distance=likeness.distance,
        relative=likeness.relative,
        cosine=likeness.cosine,
        rank_a=a.rank,
        rank_b=b.rank,
        overlap=sum(side.value for side in sides) / len(sides) if sides else None,
        overlap_null=sum(side.null for side in sides) / len(sides) if sides else None,
        outputs=likeness.outputs,
        inputs=likeness.inputs,
        kind_a=a.kind,
        kind_b=b.kind,
        as_stored=not a.is_delta,
    )


def _tensor(item: Pair, compared: Compared) -> TensorDifference:
    likeness = compared.likeness
    distance, relative = (None, None) if compared.why else (likeness.distance, likeness.relative)
    return TensorDifference(
        item.name, item.role, likeness.norm_a, likeness.norm_b, distance, relative, compared.why
    )


def _warnings(
    planned: DiffPlan, found: Sequence[tuple[Pair, Compared]], relative: float, tolerance: float
) -> Iterable[str]:
    a, b, pairing = planned.a, planned.b, planned.pairing
    if _same_file(a, b):
        yield f"A and B are the same: {a.name}"
    yield from (f"{adapter.name}: {warning}" for adapter in (a, b) for warning in adapter.warnings)
    if not pairing.modules and not pairing.extras:
        yield "neither adapter holds anything to compare"
    elif not pairing.common and pairing.modules and not any(m is None for m in (a.modules, b.modules)):
        hint = (
            "" if planned.has_base else "; if they are spelled differently, --base tells which are the same"
        )
        yield f"no module is in both adapters{hint}"
    for adapter, names in zip((a, b), pairing.unplaced, strict=True):
        if names:
            yield f"{adapter.name}: {len(names)} modules are not in the base and were matched by name: {names[0]}"
    stored = [
        (item.name, module)
        for item, _ in found
        if (module := item.a or item.b) is not None and not module.is_delta
    ]
    for kind in dict.fromkeys(_kind(module) for _, module in stored):
        mine = [name for name, module in stored if _kind(module) == kind]
        yield (
            f"{len(mine)} modules are {kind}, which is not a plain sum: their tensors are compared as they are stored "
            f"({mine[0]})"
        )
    if relative > tolerance:
        yield from _rounded(planned.items, relative)
    yield from _same_start([(item, one.likeness) for item, one in found if item.tensors is None])


def _rounded(items: Sequence[Pair], relative: float) -> Iterable[str]:
    """A remark where the distance is what storing one adapter in fewer bits would make."""
    modules = [module for item in items for module in (item.a, item.b) if module is not None]
    names = {ref.spec.dtype.name for module in modules for ref in module.factors.values()}
    coarsest = max(names & _ROUNDINGS.keys(), key=_ROUNDINGS.__getitem__, default=None)
    if coarsest is not None and 0 < relative <= 2 * _ROUNDINGS[coarsest]:
        yield (
            f"a relative distance of {relative:.2g} is no more than rounding to {coarsest} makes of the same update: "
            "one of the two may be the other, stored in another type"
        )


def _same_start(found: Sequence[tuple[Pair, Likeness]]) -> Iterable[str]:
    """A warning where A factors are nearly equal while B factors are not: trained from one seed.

    Adapters that share their initialisation share their row spaces, whatever they learnt.
    """
    known = [
        (likeness.down_change, likeness.up_cosine)
        for item, likeness in found
        if item.a is not None and item.a.kind in {"lora", "dora"} and item.a.rank == (item.b and item.b.rank)
        if likeness.down_change is not None and likeness.up_cosine is not None
    ]
    near = [change for change, cosine in known if change < _SAME_START and cosine < _OTHER_END]
    if known and 2 * len(near) > len(known):
        yield (
            f"the A factors of {len(near)} of {len(known)} modules are nearly the same (relative distance "
            f"{sorted(near)[len(near) // 2]:.2g}; 1.41 if independent) while the B factors are not: both adapters were "
            "trained from one initialisation, so the overlap of their input spaces says nothing of what they learnt"
        )


def _same_file(a: Adapter, b: Adapter) -> bool:
    if a is b:
        return True
    sources = [{ref.source.identity() for ref in adapter.tensors} for adapter in (a, b)]
    return bool(sources[0]) and sources[0] == sources[1]


def _config_differences(a: Adapter, b: Adapter) -> Iterable[ConfigDifference]:
    """Fields that differ, where a missing one is its default and the order of names says nothing."""
    fields = dict.fromkeys(chain(a.config.raw, b.config.raw))
    for name in fields:
        one, other = (_field(adapter, name) for adapter in (a, b))
        if name not in _UNTOLD and one != other and (one or other):
            yield ConfigDifference(name, one, other)


def _field(adapter: Adapter, name: str) -> Any:
    value = adapter.config.raw.get(name)
    if value is None:
        value = _DEFAULTS.get(name)
    if isinstance(value, (list, tuple, set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, dict, type(None))) else str(value)
