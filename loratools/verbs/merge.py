"""``merge``: adapters into a base, streamed, without loading the model."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter
from loratools.arrays import check_device
from loratools.block_weights import block_weights as settle_block_weights
from loratools.checkpoints import component_files, edit_config, index_file, shard_names, small_files
from loratools.dtypes import compatible
from loratools.dtypes import dtype as named_dtype
from loratools.errors import ShapeMismatch, UnknownFormat, Unsupported
from loratools.executors.base import make_executor
from loratools.formats.gguf import with_base
from loratools.formats.opening import open_adapter
from loratools.merging import Conflict, Merged, merge_tensors
from loratools.metadata.hashes import HASHES
from loratools.models import open_base, require_unquantised
from loratools.planning import Output, Plan, SmallFile, describe, plan_steps
from loratools.provenance import METADATA_KEY, RECORD_NAME, identify, record
from loratools.publishing import require_place
from loratools.running import default_jobs, peak_memory, require_files, run
from loratools.sinks import FileSink, MemorySink
from loratools.tensors.memory import is_torch
from loratools.verbs.reports import MergeReport, SurvivalSummary
from loratools.verbs.weighting import settle_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from loratools.models import BaseModel
    from loratools.planning import Step
    from loratools.running import RunResult

__all__ = ["MergePlan", "merge", "plan_merge", "run_merge"]

Ref = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A merge that has not happened yet.

    Attributes:
        base: the base model, opened.
        adapters: the adapters, opened.
        weights: what each is multiplied by.
        merged: what becomes of every tensor.
        plan: files and steps.
        left_out: files of the base that are not carried along.
        output: where the result goes; None for memory.
        force: an output that loratools made may be replaced.
        device: where the products of factors are computed.
    """

    base: BaseModel
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    merged: Merged
    plan: Plan
    left_out: tuple[str, ...]
    output: Path | None
    force: bool = False
    device: str = "cpu"

    def to_dict(self, jobs: int = 1, *, apart: bool = False) -> dict[str, Any]:
        """The plan in numbers, as ``--dry-run`` prints it; ``apart`` for workers that are processes."""
        outputs = self.merged.outputs.values()
        return {
            "schema": "loratools.merge/1",
            "dry_run": True,
            "output": None if self.output is None else str(self.output),
            "tensors": _counts(self.merged, self.base),
            "modules": {"bound": self.merged.bound, "unmatched": list(self.merged.unmatched)},
            "reads": [self.base.name, *(adapter.name for adapter in self.adapters)],
            "bytes_read": sum(o.base.spec.nbytes for o in outputs if o.base is not None),
            **describe(self.plan, jobs, apart=apart),
            "left_out": list(self.left_out),
            "warnings": list(self.merged.warnings),
        }


def plan_merge(
    base: Ref | Mapping[str, Any],
    adapters: Ref | Adapter | Sequence[Ref | Adapter],
    out: Ref | None = None,
    *,
    weights: float | Sequence[float] | None = None,
    dtype: Any = None,
    shard_size: int | None = None,
    allow_unmatched: Iterable[str] = (),
    on_conflict: Conflict = "error",
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
    force: bool = False,
    device: str = "cpu",
    arch: str | None = None,
    block_weights: str | Sequence[str] | None = None,
) -> MergePlan:
    """Decide everything about a merge from headers alone. Arguments and errors are those of :func:`merge`.

    >>> import numpy as np
    >>> import loratools as lt
    >>> factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    >>> adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    >>> planned = lt.plan_merge({"fc.weight": np.zeros((4, 3), "f4")}, adapter)
    >>> planned.to_dict()["tensors"]
    {'total': 1, 'changed': 1, 'copied': 0, 'added': 0}
    """
    device = check_device(device)
    opened = _open_adapters(adapters, allow_pickle=allow_pickle, blockwise=blockwise_experts)
    factors = settle_weights(weights, len(opened))
    dtype = _dtype_name(dtype)
    model = open_base(base)
    _require_base(model)
    opened = tuple(with_base(one, model.config) for one in opened)
    output = None if out is None else Path(out)
    if output is not None:
        inputs = [path for path in (model.path, *(Path(a.name) for a in opened)) if path is not None]
        require_place(output, inputs, force=force)
    wanted = None if dtype is None else named_dtype(dtype)
    if wanted is not None:
        require_unquantised(model)
    merged = _merge_tensors(
        model, opened, factors, dtype=wanted, allow_unmatched=allow_unmatched, on_conflict=on_conflict, arch=arch,
        block_weights=settle_block_weights(block_weights, len(opened)),
    )  # fmt: skip
    provenance = _provenance(model, opened, factors, dtype, block_weights)
    plan, left_out, told = _lay_out(
        model, opened, merged, provenance, shard_size, device, in_memory=output is None
    )
    merged = replace(merged, warnings=(*merged.warnings, *told))
    return MergePlan(model, opened, factors, merged, plan, left_out, output, force, device)


def merge(
    base: Ref | Mapping[str, Any],
    adapters: Ref | Adapter | Sequence[Ref | Adapter],
    out: Ref | None = None,
    *,
    weights: float | Sequence[float] | None = None,
    dtype: Any = None,
    shard_size: int | None = None,
    verify: bool = False,
    resume: bool = False,
    sync: bool = True,
    allow_unmatched: Iterable[str] = (),
    on_conflict: Conflict = "error",
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
    force: bool = False,
    jobs: int | None = None,
    executor: str = "threads",
    device: str = "cpu",
    max_memory: int | None = None,
    arch: str | None = None,
    block_weights: str | Sequence[str] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> MergeReport:
    """Merge adapters into a base: W + Σ wᵢ (Uᵢ(W) - W), each update against the original base, rounded once.

    In memory here; with paths, everything is streamed from disk to disk:

    >>> import numpy as np
    >>> import loratools as lt
    >>> factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    >>> adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    >>> merged = lt.merge({"fc.weight": np.zeros((4, 3), "f4")}, adapter, weights=[0.5])
    >>> merged.state_dict["fc.weight"].shape, float(merged.state_dict["fc.weight"][0, 0])
    ((4, 3), 1.0)

    Args:
        base: a folder (single or sharded), a safetensors file, a diffusers pipeline's folder, or a state dict of numpy
            arrays or torch tensors.
        adapters: one or several: folders or files of any format, or what :func:`loratools.load` returned.
        out: a folder or file that does not exist yet, of the base's kind; None merges in memory.
        weights: what each adapter is multiplied by; 1 where nothing is given. One number serves one adapter.
        dtype: of the floats written (``"bf16"``, ``torch.bfloat16``); by default each tensor keeps its own.
        shard_size: bytes a file may have; by default the base's files keep their shares.
        verify: read everything back and compare it with the arithmetic.
        resume: go on from the ``.part`` an interrupted run left.
        sync: wait for the disk.
        allow_unmatched: globs of adapter keys that may go unused.
        on_conflict: which adapter wins where two replace the same tensor.
        allow_pickle: read ``.bin`` adapters.
        blockwise_experts: the experts' B is packed expert-slowest.
        force: replace an output that loratools made.
        jobs: workers; by default the processors at hand, four at most.
        executor: ``"threads"``, ``"inline"`` or ``"processes"``, which needs paths rather than tensors in memory, and a
            guard in the script that calls it (see :class:`loratools.executors.processes.Processes`).
        device: where low-rank factors are multiplied: ``"cpu"``, ``"cuda"``, ``"mps"`` or ``"auto"``. All else is
            computed on the processor whatever this says.
        max_memory: bytes the plan may need.
        arch: the architecture of base and adapters, such as ``"sdxl"``, where their names do not tell.
        block_weights: what modules are multiplied by besides, by block or name: ``"OUTALL"``, ``"1,0,0,..."``,
            ``"attn2=0.5"``; one for all adapters or one for each (see :mod:`loratools.block_weights`).
        on_step: called after each step, for progress.

    Returns:
        What was done. With ``out=None`` its ``state_dict`` holds the result.

    Raises:
        InputError: an input cannot be read.
        Mismatch: the adapter does not fit the base.
        Unsupported: a quantised base, or an adapter with no meaning as an update of weights.
        NonFinite: a value overflowed the output's type.
        OverBudget: more memory is needed than ``max_memory``; nothing has been read.
        OutputExists: ``out`` exists, or overlaps an input.
        Incomplete: the disk is full; the ``.part`` stays for ``resume``.
    """
    make_executor(executor, 1)  # a name that does not exist is refused before anything is opened
    planned = plan_merge(
        base, adapters, out, weights=weights, dtype=dtype, shard_size=shard_size, allow_unmatched=allow_unmatched,
        on_conflict=on_conflict, allow_pickle=allow_pickle, blockwise_experts=blockwise_experts, force=force,
        device=device, arch=arch, block_weights=block_weights,
    )  # fmt: skip
    return run_merge(
        planned, verify=verify, resume=resume, sync=sync, jobs=jobs, executor=executor, max_memory=max_memory,
        on_step=on_step,
    )  # fmt: skip


def run_merge(
    planned: MergePlan,
    *,
    verify: bool = False,
    resume: bool = False,
    sync: bool = True,
    jobs: int | None = None,
    executor: str = "threads",
    max_memory: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> MergeReport:
    """Carry out a merge that :func:`plan_merge` has planned. Arguments and errors are those of :func:`merge`.

    >>> import numpy as np
    >>> import loratools as lt
    >>> factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    >>> adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    >>> planned = lt.plan_merge({"fc.weight": np.zeros((4, 3), "f4")}, adapter)
    >>> lt.run_merge(planned).modules
    {'bound': 1, 'unmatched': []}
    """
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    planned.plan.require_memory(max_memory, workers.jobs, apart=workers.remote)
    require_files(workers, planned.base)
    sink: FileSink | MemorySink
    if planned.output is None:
        tensors = getattr(planned.base.source, "tensors", {})
        sink = MemorySink(planned.plan, torch_out=any(is_torch(value) for value in tensors.values()))
    else:
        sink = FileSink(planned.plan, planned.output, resume=resume, sync=sync, replace=planned.force)
    result = run(planned.plan, sink, workers, measure="all" if verify else "first", on_step=on_step)
    merged = _tied_together(planned, sink.tensors) if isinstance(sink, MemorySink) else None
    verified = None
    if verify and planned.output is not None:
        from loratools.verbs.verify import verify_merge

        verified = verify_merge(planned, planned.output, workers, on_step=on_step).ok
    return _report(planned, result, verified, merged, peak_memory(workers))


def _open_adapters(
    adapters: Ref | Adapter | Sequence[Ref | Adapter], *, allow_pickle: bool, blockwise: bool
) -> tuple[Adapter, ...]:
    several = [adapters] if isinstance(adapters, (str, os.PathLike, Adapter)) else adapters
    return tuple(
        open_adapter(one, allow_pickle=allow_pickle, blockwise_experts=blockwise)
        if isinstance(one, (str, os.PathLike))
        else one
        for one in several
    )


def _dtype_name(given: object) -> str | None:
    """A type as loratools names it: of ``torch.bfloat16`` too, or whatever else prints its name last.

    Raises:
        Unsupported: no such type, or none that values can be rounded to.
    """
    if given is None:
        return None
    name = given if isinstance(given, str) else getattr(given, "__name__", str(given))
    found = named_dtype(name.rpartition(".")[2])
    if not compatible(found):
        raise Unsupported(f"a merge cannot write {found}", hint="it writes bf16, f16, f32 and f64")
    return name.rpartition(".")[2] if isinstance(given, str) else found.name


def _require_base(model: BaseModel) -> None:
    if model.path is not None and (model.path / "adapter_config.json").exists() and not model.config:
        raise UnknownFormat(
            f"{model.name} is an adapter, not a base model",
            hint="the base comes first: merge BASE ADAPTER OUT",
        )
    if not model.components:
        require_unquantised(model)


def _merge_tensors(model: BaseModel, adapters: tuple[Adapter, ...], *given: Any, **options: Any) -> Merged:
    """:func:`merge_tensors`; of a pipeline, the components that are changed must not be quantised.

    Raises:
        Unsupported: one is.
    """
    try:
        merged = merge_tensors(model, adapters, *given, **options)
    except ShapeMismatch:  # codes have shapes of their own
        require_unquantised(model)
        raise
    changed = {name.partition("/")[0] for name, output in merged.outputs.items() if not output.is_copy}
    for folder, component in model.components.items():
        if folder in changed:
            require_unquantised(component)
    return merged


def _provenance(
    base: BaseModel,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    dtype: str | None,
    block_weights: str | Sequence[str] | None,
) -> dict[str, Any]:
    from loratools import __version__

    inputs = [identify("base", base.path, base.source)]
    for adapter in adapters:
        path = Path(adapter.name) if adapter.tensors and Path(adapter.name).exists() else None
        source = adapter.tensors[0].source if adapter.tensors else base.source
        inputs.append(identify("adapter", path, source))
    parameters: dict[str, Any] = {"weights": list(weights), "dtype": dtype}
    if block_weights:
        parameters["block_weights"] = (
            [block_weights] if isinstance(block_weights, str) else list(block_weights)
        )
    return record("merge", __version__, parameters, inputs)


def _lay_out(
    base: BaseModel,
    adapters: Sequence[Adapter],
    merged: Merged,
    provenance: dict[str, Any],
    shard_size: int | None,
    device: str,
    *,
    in_memory: bool,
) -> tuple[Plan, tuple[str, ...], tuple[str, ...]]:
    """The plan, the base's files that are not carried along, and what a careful user should read of it."""
    if shard_size is not None and base.kind != "folder":
        raise Unsupported("--shard-size is for folders; the base is a single file")
    if shard_size is not None and base.components:
        raise Unsupported("--shard-size is for one model; a pipeline's components keep their files")
    outputs = _into_files(base, merged) if shard_size is None else _into_shards(merged, shard_size)
    if base.components and in_memory:
        outputs = {"": list(merged.outputs.values())}
    metadata = {name: _metadata(base, name, listed) for name, listed in outputs.items()}
    told = () if in_memory else _unsaid(base, metadata)
    text = json.dumps(provenance, indent=2) + "\n"
    small: list[SmallFile] = []
    left_out: tuple[str, ...] = ()
    if base.kind != "folder" and not in_memory:
        metadata = {name: {**found, METADATA_KEY: text} for name, found in metadata.items()}
    kept = {} if in_memory else _kept_headers(base, outputs)
    files, steps = plan_steps(outputs, metadata, device, kept)
    if base.components and not in_memory:
        beside = small_files(base, base.config, None)
        configs = component_files(base, merged.component_config, outputs, files)
        small = [*(one for one in beside.files if one.name not in {c.name for c in configs}), *configs]
        small, left_out = [*small, SmallFile(RECORD_NAME, content=text.encode())], beside.left_out
    elif base.kind == "folder" and not in_memory:
        config = edit_config(base.config, merged.config) if merged.config else base.config
        resizer = Path(merged.resized.name) if merged.resized is not None else None
        folder = None if resizer is None else resizer if resizer.is_dir() else resizer.parent
        beside = small_files(base, config, folder)
        small, left_out = [*beside.files, SmallFile(RECORD_NAME, content=text.encode())], beside.left_out
        if len(outputs) > 1 or base.index_name is not None:
            weight_map = {output.name: file for file, listed in outputs.items() for output in listed}
            specs = {name: output.spec for name, output in merged.outputs.items()}
            index_name = base.index_name or "model.safetensors.index.json"
            if len(outputs) > 1 or shard_size is None:
                small.append(index_file(index_name, files, weight_map, specs))
    kind = "memory" if in_memory else base.kind
    identity = (base.identity(), *(a.tensors[0].source.identity() for a in adapters if a.tensors))
    return Plan(kind, files, steps, tuple(small), (*identity, text)), left_out, told


def _kept_headers(base: BaseModel, outputs: Mapping[str, list[Output]]) -> dict[str, bytes]:
    """The first bytes of a pipeline's files that nothing changes: each is copied as it is, to the byte."""
    if not base.components:
        return {}
    shards = base.source.shards  # type: ignore[attr-defined]  # a pipeline's source has them
    return {
        name: shards[name].file.read(shards[name].header.data_start, 0)
        for name, listed in outputs.items()
        if all(output.is_copy and _is_own(output) for output in listed)
    }


def _metadata(base: BaseModel, file: str, outputs: Sequence[Output]) -> Mapping[str, str]:
    """What the base says in a file; the hashes of its tensors only where the same ones are in it as they were."""
    found = _stated(base, file)
    whole = {output.name for output in outputs} == set(base.files.get(file, ()))
    if whole and all(output.is_copy and _is_own(output) for output in outputs):
        return found
    return {key: value for key, value in found.items() if key not in HASHES}


def _stated(base: BaseModel, file: str) -> Mapping[str, str]:
    shards = getattr(base.source, "shards", None)
    if shards is not None and file in shards:
        found: Mapping[str, str] = shards[file].metadata
        return found
    return base.source.metadata


def _unsaid(base: BaseModel, metadata: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """That hashes which the base states are left out, since they would be of other tensors."""
    gone = sorted(
        {key for file, kept in metadata.items() for key in _stated(base, file).keys() - kept.keys()}
    )
    told = f"{', '.join(gone)}: left out, since the base's tensors have changed"
    return (told,) if gone else ()


def _into_files(base: BaseModel, merged: Merged) -> dict[str, list[Output]]:
    """Every tensor in the file the base has it in; new ones join the file of their kin, or the last."""
    placed = {file: [merged.outputs[name] for name in names] for file, names in base.files.items()}
    home_of = {name: file for file, names in base.files.items() for name in names}
    last = next(reversed(placed))
    for name, home in merged.homes.items():
        placed[home_of[home] if home is not None else last].append(merged.outputs[name])
    return placed


def _into_shards(merged: Merged, shard_size: int) -> dict[str, list[Output]]:
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in merged.outputs.values():
        if shards[-1] and filled + output.spec.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.spec.nbytes
    return dict(zip(shard_names(len(shards)), shards, strict=True))


def _tied_together(planned: MergePlan, tensors: dict[str, Any]) -> dict[str, Any]:
    """Names that shared a storage share one again, unless the merge does different things to them."""
    ties = getattr(planned.base.source, "ties", {})
    outputs = planned.merged.outputs
    for name, first in ties.items():
        if outputs[name].contributions == outputs[first].contributions:
            tensors[name] = tensors[first]
        else:
            warnings.warn(
                f"{name} and {first} shared their memory, and the merge gave them different values: untie the "
                "model before it loads them, or the last one loaded is both",
                UserWarning,
                stacklevel=4,
            )
    return tensors


def _counts(merged: Merged, base: BaseModel) -> dict[str, int]:
    outputs = merged.outputs.values()
    added = sum(o.name not in base.source.specs for o in outputs)
    copied = sum(o.is_copy and o.name in base.source.specs and _is_own(o) for o in outputs)
    return {"total": len(outputs), "changed": len(outputs) - copied - added, "copied": copied, "added": added}


def _is_own(output: Output) -> bool:
    return output.base is not None and output.base.name == output.name


def _report(
    planned: MergePlan,
    result: RunResult,
    verified: bool | None,
    tensors: dict[str, Any] | None,
    peak: int | None,
) -> MergeReport:
    shares = {name: seen.share for name, seen in result.survival.items()}
    known = {name: share for name, share in shares.items() if share is not None}
    total = _sum_survival(result)
    worst = min(known, key=known.__getitem__) if known else None
    summary = SurvivalSummary(
        mean=sum(known.values()) / len(known) if known else None,
        min=known[worst] if worst is not None else None,
        worst_module=worst,
        cosine=total.cosine,
        unchanged=total.unchanged / total.count if total.count else None,
    )
    merged = planned.merged
    adapters_bytes = sum(ref.spec.nbytes for adapter in planned.adapters for ref in adapter.tensors)
    base_bytes = sum(o.base.spec.nbytes for o in merged.outputs.values() if o.base is not None)
    return MergeReport(
        output=None if planned.output is None else str(planned.output),
        tensors=_counts(merged, planned.base),
        modules={"bound": merged.bound, "unmatched": list(merged.unmatched)},
        bytes_read=base_bytes + adapters_bytes,
        bytes_written=planned.plan.bytes_written,
        seconds=result.seconds,
        peak_memory=peak,
        survival=summary,
        resumed=result.resumed,
        left_out=planned.left_out,
        warnings=merged.warnings,
        verified=verified,
        state_dict=tensors,
    )


def _sum_survival(result: RunResult) -> Any:
    from loratools.computing import Survival

    total = Survival()
    for seen in result.survival.values():
        total.merge(seen)
    return total
