"""``normalize``: the same update as an adapter that every loader reads the same way."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, AdapterConfig, flat_shape
from loratools.arrays import check_device
from loratools.binding import bind
from loratools.dtypes import DTYPES
from loratools.errors import Mismatch, OverBudget, Unsupported
from loratools.executors.base import make_executor
from loratools.formats.opening import open_adapter
from loratools.formats.peft_writing import write_peft
from loratools.matrices import lora_module, matrices
from loratools.models import open_base, require_unquantised
from loratools.planning import RUNTIME_BYTES
from loratools.provenance import identify, record
from loratools.publishing import require_place
from loratools.refs import local_path
from loratools.running import default_jobs, gather
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource, from_bytes
from loratools.verbs.normalize_report import ConfigChange, NormalizedModule, NormalizeReport
from loratools.verbs.reports import Range
from loratools.verbs.saving import float_dtype, identify_adapter, input_paths, save, widest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from loratools.adapter import Module
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array
    from loratools.models import BaseModel
    from loratools.targets import Target

__all__ = ["Work", "normalize"]

Ref = str | os.PathLike[str]

# Folding a factor that is no power of two rounds each entry of ``up`` once, converting both factors: a share of
# 6e-8 each. What exceeds this is not rounding.
TOLERANCE = 1e-6
_LOOSE = 2.5e-7  # from here on, factors that cancel are replaced by balanced ones
# Singular values of a resolved residual below this share of the whole are what float32 cannot tell from zero.
_NOTHING = 2.0**-26
_HALVES = {"F16", "BF16"}
_FLAT = {"adalora", "loha", "lokr"}  # kinds whose factors may hold a convolution as a matrix
# Fields whose old value would mean something else beside the new factors.
_TOLD = (
    "peft_type", "r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "use_bdlora", "kasa_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "target_parameters", "modules_to_save", "bias", "lora_bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """One module to be made plain.

    Attributes:
        name: of it.
        module: as read.
        base: its weight, where what it started from has to be taken out.
        transposed: whether that is stored (in, out).
    """

    name: str
    module: Module
    base: TensorRef | None = None
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes it reads, for progress."""
        read = sum(ref.spec.nbytes for ref in self.module.tensors.values())
        return read + (0 if self.base is None else self.base.spec.nbytes)


@dataclass(frozen=True, slots=True)
class _Plain:
    """What became of a module: its factors rounded as they will be stored, and how far they are from the truth."""

    name: str
    factors: tuple[LowRank, ...]
    bias: Array | None
    norm: float
    distance: float


def normalize(
    ref: Ref | Mapping[str, Any] | Adapter,
    out: Ref | None = None,
    *,
    base: Ref | Mapping[str, Any] | None = None,
    rank: int | None = None,
    pad: bool = False,
    engine: str | None = None,
    dtype: object = None,
    allow_pickle: bool = False,
    jobs: int | None = None,
    executor: str = "threads",
    device: str = "cpu",
    max_memory: int | None = None,
    force: bool = False,
    sync: bool = True,
    on_step: Callable[[Work], None] | None = None,
) -> NormalizeReport:
    """Write the same update as a plain adapter.

    Scalings go into the factors (alpha is the rank, no rsLoRA), patterns are resolved, kinds that are products of small
    matrices (LoHa, LoKr, AdaLoRA, BD-LoRA) become LoRA, modules that add nothing are left out. What PiSSA, OLoRA or
    KaSA took out of the base becomes part of the delta, at up to twice the rank; that needs ``base``. DoRA depends on
    its base for good and stays DoRA. Before and after are compared in float64.

    >>> import numpy as np
    >>> import loratools as lt
    >>> factors = {"fc.lora_A.weight": np.ones((2, 3), "f4"), "fc.lora_B.weight": np.ones((4, 2), "f4")}
    >>> adapter = lt.load(factors, config={"peft_type": "LORA", "r": 2, "lora_alpha": 8})
    >>> plain = normalize(adapter)
    >>> plain.adapter.modules["fc"].scaling, plain.exact
    (1.0, True)

    Args:
        ref: the adapter.
        out: a folder to make, or a file; None keeps the result in memory.
        base: the base model; needed for what started from a part of it.
        rank: the rank of every module, by the best approximation, or padded with zeros. Changes the update; the
            report says by how much.
        pad: one rank for all modules, the largest, the others padded with zeros; without it they keep their ranks,
            under patterns that fit one module each.
        engine: whose limits to keep to; none is in this build.
        dtype: of the floats written; by default the widest that is read, and float32 where 16 bits would round what
            is to stay the same.
        allow_pickle: read ``.bin`` and ``.pt`` files.
        jobs: workers; by default the processors at hand, four at most.
        executor: ``"threads"``, ``"inline"`` or ``"processes"``.
        device: ``"cpu"``.
        max_memory: bytes it may need.
        force: replace an output that loratools made.
        sync: wait for the disk.
        on_step: called after each module, for progress.

    Returns:
        What was done; its ``adapter`` is the result.

    Raises:
        InputError: the adapter cannot be read, or holds NaN.
        Unsupported: it has no plain form: IA3, or a residual without its base.
        Mismatch: the adapter does not fit the base; its ranks contradict its configuration.
        NonFinite: a value overflowed ``dtype``.
        OutputExists: ``out`` exists, or overlaps an input.
        OverBudget: more memory is needed than ``max_memory`` allows.
    """
    _require_options(rank, engine, device)
    wanted = float_dtype(dtype)
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    adapter = ref if isinstance(ref, Adapter) else open_adapter(ref, allow_pickle=allow_pickle)
    adapter.require_computable()
    model = _open_base(base)
    inputs = [] if model is None or model.path is None else [model.path]
    if out is not None:
        require_place(Path(out), [*input_paths(adapter), *inputs], force=force)
    renamed, adapter = _mended(adapter)
    warnings = _require_plain(adapter, rank)
    adapter, work = _work(adapter, model, warnings)
    _require_memory(work, max_memory, workers.jobs)
    kind, unit = _stored(adapter, rank, None if wanted is None else wanted.name)
    results = gather(partial(_plain, rank=rank, dtype=kind, unit=unit), work, workers, on_step=on_step)
    rounded = kind in _HALVES and not _approximates(adapter, rank) and any(r.distance for r in results)
    if rounded and wanted is None:
        kind, unit = "F32", 1.0
        results = gather(partial(_plain, rank=rank, dtype=kind, unit=unit), work, workers)
    if rank is None and kind not in _HALVES:
        _require_close(results)
    made, dropped = _assemble(adapter, results, kind, unit, pad=pad)
    saved = None
    if out is not None:
        from loratools import __version__

        parameters = {"rank": rank, "pad": pad, "dtype": kind}
        origins = [identify_adapter(adapter)]
        if model is not None:
            origins.append(identify("base", model.path, model.source))
        made_by = record("normalize", __version__, parameters, origins)
        saved = save(
            made,
            out,
            dtype=wanted,
            force=force,
            sync=sync,
            provenance=made_by,
            inputs=[*input_paths(adapter), *inputs],
        )
    return _report(
        adapter, made, results, dropped, renamed, kind, warnings,
        output=None if out is None else os.fspath(out),
        size=sum(r.spec.nbytes for r in made.tensors) if saved is None else saved.bytes,
    )  # fmt: skip


def _open_base(base: Ref | Mapping[str, Any] | None) -> BaseModel | None:
    if base is None:
        return None
    model = open_base(local_path(base) if isinstance(base, (str, os.PathLike)) else base)
    require_unquantised(model)
    return model


def _require_options(rank: int | None, engine: str | None, device: str) -> None:
    if engine is not None:
        raise Unsupported(
            f"normalize for {engine} is not in this build: it knows no engines",
            hint="leave it out: the result is plain LoRA; pad (--pad) gives every module one rank",
        )
    if rank is not None and (isinstance(rank, bool) or rank < 1):
        raise Unsupported(f"rank {rank} is no rank", hint="1 or more")
    if check_device(device) != "cpu":
        raise Unsupported("normalize computes on the processor", hint="leave --device out")


# --- what there is to do -----------------------------------------------------------------------------------


def _mended(adapter: Adapter) -> tuple[dict[str, str], Adapter]:
    """The adapter without what training wrappers put into its names (torch.compile, DistributedDataParallel)."""
    mended = {name: _mend(name) for name in adapter.modules}
    renamed = {name: better for name, better in mended.items() if better != name}
    if len(set(mended.values())) < len(mended):
        twice = Counter(mended.values()).most_common(1)[0][0]
        raise Mismatch(f"{adapter.name}: two modules would both be called {twice}", hint="remove one of them")
    modules = {mended[name]: module for name, module in adapter.modules.items()}
    extras = {_mend(k): replace(e, target=_mend(e.target)) for k, e in adapter.extras.items()}
    return renamed, replace(adapter, modules=modules, extras=extras)


def _mend(name: str) -> str:
    """A name without the marks of wrappers.

    >>> _mend("module.model.layers.0._orig_mod.q_proj")
    'model.layers.0.q_proj'
    """
    lead = re.match(r"(?:base_model\.model\.)*", name)
    start = "" if lead is None else lead[0]
    rest = re.sub(r"(?:^|(?<=\.))_orig_mod\.", "", name[len(start) :])
    while rest.startswith("module."):
        rest = rest.removeprefix("module.")
    return start + rest


def _require_plain(adapter: Adapter, rank: int | None) -> list[str]:
    """Refuse what has no plain form; what keeps some of its own is a warning."""
    for name, module in adapter.modules.items():
        if "config_rank" in module.options:
            raise Mismatch(
                f"{adapter.name}: {name} has rank {module.rank} in the file and {module.options['config_rank']} in "
                "the configuration",
                hint="is this the configuration the weights were saved with?",
            )
        if module.kind == "ia3":
            raise Unsupported(
                f"{adapter.name}: {name} is IA3, which multiplies its weight and is no sum",
                hint="merge it into the base, and extract a LoRA from the two",
            )
    doras = [name for name, module in adapter.modules.items() if module.kind == "dora"]
    if doras and rank is not None:
        raise Unsupported(
            f"{adapter.name}: {doras[0]} is DoRA, whose effect at another rank depends on its base",
            hint="merge it into the base, and extract a LoRA of that rank from the two",
        )
    warnings = []
    if doras:
        warnings.append(
            f"{len(doras)} modules are DoRA and stay DoRA: they scale their weight, which no low-rank sum does; for "
            "a plain LoRA, merge into the base and extract"
        )
    odd = [key for key, extra in adapter.extras.items() if extra.role == "unclaimed"]
    if odd:
        warnings.append(f"{len(odd)} tensors that no field explains are carried along, such as {odd[0]}")
    return warnings


def _work(adapter: Adapter, model: BaseModel | None, warnings: list[str]) -> tuple[Adapter, list[Work]]:
    """Every module, with its weight where what it started from has to be taken out of that.

    Returns:
        The adapter with the shapes of its weights where it does not know them itself, and what there is to do.

    Raises:
        Unsupported: there is no base and one is needed, or the base keeps the weight in parts.
    """
    started = {name: str(m.options["init"]) for name, m in adapter.modules.items() if "init" in m.options}
    if started and model is None:
        name, init = next(iter(started.items()))
        raise Unsupported(
            f"{adapter.name}: {name} starts from a part of its base ({init}), which the file does not hold",
            hint="give the base: --base BASE",
        )
    flat = [name for name, module in adapter.modules.items() if module.kind in _FLAT]
    if model is None:
        if flat:
            warnings.append(
                f"{flat[0]} and its like are taken for linear layers: their file does not tell convolutions; "
                "give the base (--base) if there are any"
            )
        return adapter, [Work(name, module) for name, module in adapter.modules.items()]
    places = _places(adapter, model, warnings)
    modules = {n: _shaped(m, places.get(n, []), model) for n, m in adapter.modules.items()}
    work = []
    for name, module in modules.items():
        mine = places.get(name, [])
        if name not in started:
            work.append(Work(name, module))
            continue
        if len(mine) != 1 or not _is_whole(mine[0]):
            where = "nowhere" if not mine else "in parts"
            raise Unsupported(
                f"{adapter.name}: {name} starts from a part of its base ({started[name]}), and {model.name} has "
                f"that weight {where}",
                hint="give the base it was trained on, with its weights under the names of training",
            )
        weight = TensorRef(model.source, mine[0].weight)
        work.append(Work(name, module, weight, mine[0].transposed))
    return replace(adapter, modules=modules), work


def _places(adapter: Adapter, model: BaseModel, warnings: list[str]) -> dict[str, list[Target]]:
    """Where in the base each module lands."""
    bound = bind(adapter, model)
    if bound.unmatched:
        warnings.append(
            f"{len(bound.unmatched)} tensors have no place in {model.name}, such as {bound.unmatched[0]}"
        )
    if bound.renamed:
        warnings.append(f"{model.name} has other names ({bound.renamed}); the adapter keeps its own")
    places: dict[str, list[Target]] = {}
    for terms in bound.terms.values():
        for term in terms:
            if term.part == "weight":
                places.setdefault(term.name, []).append(term.target)
    return places


def _is_whole(target: Target) -> bool:
    return target.index is None and target.rows is None and target.cols is None


def _shaped(module: Module, places: Sequence[Target], model: BaseModel) -> Module:
    """A module whose file has a convolution's kernel flattened, with the shape that its weight has."""
    if module.kind not in _FLAT or len(places) != 1 or not _is_whole(places[0]) or places[0].transposed:
        return module
    shape = model.source.specs[places[0].weight].shape
    return replace(module, shape=shape) if flat_shape(shape) == flat_shape(module.shape) else module


def _stored(adapter: Adapter, rank: int | None, wanted: str | None) -> tuple[str, float]:
    """The type to try, and the scaling every module is to have.

    In 32 bits and more the scaling is 1. In 16 bits only powers of two can be folded without rounding; one scaling
    that all modules share, up to such a power, stays in the alpha then.
    """
    kind = wanted or widest([adapter])
    if kind not in _HALVES:
        return kind, 1.0
    scalings = Counter(m.scaling for m in adapter.modules.values() if m.scaling)
    if _approximates(adapter, rank):
        return kind, 1.0
    if not scalings or not all(_keeps_factors(module) for module in adapter.modules.values()):
        return wanted or "F32", 1.0
    for unit in (1.0, scalings.most_common(1)[0][0]):
        if all(abs(math.frexp(scaling / unit)[0]) == 0.5 for scaling in scalings):
            return kind, unit
    return wanted or "F32", 1.0


def _approximates(adapter: Adapter, rank: int | None) -> bool:
    """Whether a rank was asked for that some delta exceeds, so that the result is another one."""
    return rank is not None and any(rank < (module.rank or 0) for module in adapter.modules.values())


def _keeps_factors(module: Module) -> bool:
    """Whether its factors stay what they are, but for the scaling."""
    changed = {"init", "up_blocks", "down_blocks"} & module.options.keys()
    return module.kind in {"lora", "dora"} and not changed


def _require_memory(work: Sequence[Work], allowed: int | None, jobs: int) -> None:
    """Check the budget: the result, and float64 copies of the largest modules (their weights, where needed)."""
    steps = sorted((_peak(item) for item in work), reverse=True)
    result = sum(4 * item.module.parameters for item in work)
    needed = RUNTIME_BYTES + 2 * result + sum(steps[:jobs])
    if allowed is not None and needed > allowed:
        raise OverBudget(needed, allowed, hint="fewer --jobs need less" if jobs > 1 else "allow more")


def _peak(item: Work) -> int:
    out, into = flat_shape(item.module.shape)
    weight = 0 if item.base is None else 8 * (3 * out * into + 3 * min(out, into) ** 2)
    return 8 * 4 * item.module.parameters + weight


# --- one module --------------------------------------------------------------------------------------------


def _plain(item: Work, *, rank: int | None, dtype: str, unit: float) -> _Plain:
    """Make one module plain; see :func:`normalize`."""
    from loratools.deltas.algebra import norm

    truths = _truth(item)
    found = [_rounded(item, truth, rank, dtype, unit) for truth in truths]
    bias, off = _bias(item.module, dtype, unit)
    distance = math.hypot(off, *(apart for _, apart in found))
    size = math.hypot(
        0.0 if bias is None else float(_length(bias)) * unit, *(norm(truth) for truth in truths)
    )
    return _Plain(item.name, tuple(factors for factors, _ in found), bias, size, distance)


def _truth(item: Work) -> tuple[LowRank, ...]:
    """What the module adds, in float64: one delta, or one an expert; of DoRA, before it is scaled to its magnitude."""
    from loratools.deltas.algebra import add, factored
    from loratools.deltas.lowrank import LowRank

    module = item.module
    if item.base is None and module.kind != "dora":
        return matrices(module, item.name, double=True)
    options = {key: value for key, value in module.options.items() if key != "init"}
    trained = matrices(replace(module, kind="lora", options=options), item.name, double=True)
    if item.base is None:
        return trained
    left, right, factor = _initial(item)
    return (factored(add([(1.0, trained[0]), (-factor, LowRank(left, right))])),)


def _initial(item: Work) -> tuple[Array, Array, float]:
    """The part of the base that training started from, as factors of (out, in)."""
    import numpy as np

    from loratools.deltas.residual import taken_out

    assert item.base is not None
    module, method = item.module, item.module.options["init"]
    weight = item.base.load().astype(np.float64)
    weight = weight.reshape(flat_shape(weight.shape))
    # PEFT decomposes a weight that is stored (in, out) as (out, in) for PiSSA, and as it is stored for OLoRA.
    as_stored = method == "olora" or not item.transposed
    left, right, factor = taken_out(
        weight if as_stored else weight.T, method, module.rank or 0, module.scaling or 0.0
    )
    return (right.T, left.T, factor) if item.transposed and as_stored else (left, right, factor)


def _rounded(item: Work, truth: LowRank, rank: int | None, dtype: str, unit: float) -> tuple[LowRank, float]:
    """Factors as they will be stored, and how far ``unit`` times their product is from the truth."""
    from loratools.deltas.algebra import core, norm
    from loratools.deltas.lowrank import LowRank

    whole = LowRank(truth.up / unit, truth.down) if unit != 1.0 else truth
    stored = truth.up.shape[1]
    if rank is not None and rank < stored:
        return _as_stored(item, core(whole).truncate(rank), truth, dtype, unit)
    if item.base is not None:
        found = core(whole)
        limit = _NOTHING * norm(whole)
        kept = next((k for k in range(found.values.size) if found.tail(k) <= limit), found.values.size)
        whole, stored = found.truncate(max(kept, 1)), max(kept, 1)
    elif not _keeps_factors(item.module) and stored > min(truth.shape):
        whole, stored = core(whole).truncate(min(truth.shape)), min(truth.shape)
    best = _as_stored(item, _to_rank(whole, rank or stored), truth, dtype, unit)
    if (
        best[1] > _LOOSE * norm(truth) and dtype not in _HALVES
    ):  # its terms cancel: balanced factors round better
        other = _as_stored(item, core(whole).truncate(rank or stored), truth, dtype, unit)
        best = min(best, other, key=lambda pair: pair[1])
    return best


def _as_stored(
    item: Work, factors: LowRank, truth: LowRank, dtype: str, unit: float
) -> tuple[LowRank, float]:
    from loratools.deltas.likeness import compare
    from loratools.deltas.lowrank import LowRank

    kept = LowRank(_through(item.name, factors.up, dtype), _through(item.name, factors.down, dtype))
    return kept, compare(truth, LowRank(kept.up.astype("f8") * unit, kept.down.astype("f8"))).distance


def _through(name: str, values: Array, dtype: str) -> Array:
    """Values as they come back from a file of this type.

    Raises:
        NonFinite: one does not fit.
    """
    import numpy as np

    from loratools.dtypes import largest, narrow, widen
    from loratools.errors import NonFinite

    stored = DTYPES[dtype]
    flat = np.ascontiguousarray(values).reshape(-1)
    found = widen(narrow(flat, stored, np.empty(stored.nbytes(flat.size), np.uint8)), stored)
    if not np.isfinite(found).all():
        worst = float(np.abs(flat).max())
        raise NonFinite(
            f"{name}: a factor of {worst:g} does not fit {dtype} (largest {largest(stored):g})",
            hint="write a wider type: --dtype bf16 or f32",
        )
    return found.reshape(values.shape)


def _to_rank(delta: LowRank, rank: int) -> LowRank:
    """The same delta with zeros up to a rank."""
    import numpy as np

    from loratools.deltas.lowrank import LowRank

    missing = rank - delta.up.shape[1]
    if missing <= 0:
        return delta
    return LowRank(np.pad(delta.up, ((0, 0), (0, missing))), np.pad(delta.down, ((0, missing), (0, 0))))


def _bias(module: Module, dtype: str, unit: float) -> tuple[Array | None, float]:
    """What is added to the bias, over ``unit``, as it will be stored; and the distance that rounding left."""
    if "up_bias" not in module.tensors:
        return None, 0.0
    truth = module.array("up_bias", double=True).reshape(-1) * (module.scaling or 0.0)
    stored = _through("the bias", truth / unit, dtype)
    return stored, float(_length(stored.astype("f8") * unit - truth))


def _length(values: Array) -> Any:
    import numpy as np

    return np.linalg.norm(values.astype(np.float64))


# --- the result --------------------------------------------------------------------------------------------


def _require_close(results: Sequence[_Plain]) -> None:
    """Refuse a difference that is no rounding: of a module by its own norm, unless that is nothing beside the rest."""
    whole = math.hypot(*(result.norm for result in results))
    worst = max(results, key=lambda r: r.distance / r.norm if r.norm else 0.0, default=None)
    if worst is not None and worst.distance > TOLERANCE * max(worst.norm, TOLERANCE * whole):
        raise Unsupported(
            f"{worst.name}: the plain factors differ by {worst.distance / worst.norm:.2g}, more than rounding "
            "explains",
            hint="its factors cancel; dtype f64 (--dtype f64) keeps them, a rank (--rank) approximates them",
        )


def _assemble(
    adapter: Adapter, results: Sequence[_Plain], dtype: str, unit: float, *, pad: bool
) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter of plain modules, and the names of those that add nothing."""
    zeros = [r.name for r in results if r.norm == 0.0 and _may_go(r.name, adapter)]
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
    tensors, raw = write_peft(made)
    return replace(made, config=replace(config, raw=raw), tensors=tuple(tensors.values())), tuple(zeros)


def _may_go(name: str, adapter: Adapter) -> bool:
    """Whether a module can be left out: a wrapper that others lie in decides how those are called."""
    module = adapter.modules[name]
    nested = ".base_layer" in name or any(other.startswith(f"{name}.base_layer") for other in adapter.modules)
    return module.kind != "dora" and "experts" not in module.options and not nested


def _module(like: Module, result: _Plain, rank: int, dtype: str, unit: float) -> Module:
    """Plain factors as a module, its tensors in the type they will have."""
    factors = [_to_rank(one, rank) for one in result.factors]
    made = lora_module(like, factors, prefix=result.name, bias=result.bias)
    arrays = {role: _packed(ref, dtype) for role, ref in made.tensors.items()}
    source = MemorySource({f"{result.name}.{role}": values for role, values in arrays.items()})
    tensors = {role: TensorRef(source, f"{result.name}.{role}") for role in arrays}
    made = replace(made, tensors=tensors, scaling=unit, alpha=unit * (made.rank or 0))
    if like.kind == "dora":
        magnitude = {"magnitude": like.tensors["magnitude"]}
        return replace(made, kind="dora", tensors={**tensors, **magnitude})
    return made


def _packed(ref: TensorRef, dtype: str) -> Any:
    import numpy as np

    from loratools.dtypes import narrow
    from loratools.tensors.base import TensorSpec

    spec = TensorSpec(DTYPES[dtype], ref.shape)
    return from_bytes(narrow(ref.load(), spec.dtype, np.empty(spec.nbytes, np.uint8)), spec, torch_out=False)


def _report(
    before: Adapter,
    made: Adapter,
    results: Sequence[_Plain],
    dropped: tuple[str, ...],
    renamed: dict[str, str],
    dtype: str,
    warnings: list[str],
    *,
    output: str | None,
    size: int,
) -> NormalizeReport:
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
        rank=_range([m.rank for m in modules]),
        rank_before=_range([m.rank for m in before.modules.values()]),
        dtype=dtype,
        modules=tuple(modules),
        dropped=dropped,
        dropped_tensors=tuple(gone),
        renamed=renamed,
        config=_changes(before.config.raw, made.config.raw),
        bytes_before=_stored_bytes(before),
        bytes=size,
        warnings=(*before.warnings, *warnings),
        adapter=made,
    )


def _stored_bytes(adapter: Adapter) -> int:
    refs = [ref for module in adapter.modules.values() for ref in module.tensors.values()]
    return sum(ref.spec.nbytes for ref in [*refs, *(extra.tensor for extra in adapter.extras.values())])


def _range(values: Sequence[int | None]) -> Range:
    known = [value for value in values if value is not None]
    return Range(min(known, default=None), max(known, default=None))


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[ConfigChange, ...]:
    return tuple(
        ConfigChange(name, before.get(name), after.get(name))
        for name in _TOLD
        if _said(before.get(name)) != _said(after.get(name))
    )


def _said(value: Any) -> Any:
    """A field's value, None for every way to say nothing: absent, null, empty, false, ``"none"``."""
    return None if not value or value == "none" else value
