"""``verify``: replay a merge and say, tensor by tensor, whether the checkpoint holds what the arithmetic gives."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.dtypes import compatible
from loratools.executors.base import make_executor
from loratools.models import open_base
from loratools.planning import CopyStep, plan_steps
from loratools.running import default_jobs, gather, require_files
from loratools.tensors.base import TensorSpec
from loratools.verbs.merge import plan_merge
from loratools.verbs.reports import TensorVerdict, VerificationReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from loratools.adapter import Adapter
    from loratools.comparing import Comparison
    from loratools.executors.base import Executor
    from loratools.merging import Conflict
    from loratools.planning import Output, Step
    from loratools.tensors.base import TensorRef, TensorSource
    from loratools.verbs.merge import MergePlan

__all__ = ["verify", "verify_merge"]

Ref = str | os.PathLike[str]
_SEVERITY = ("different", "shape", "wrong_scale", "unmerged", "missing", "unexpected", "rounding", "exact")


def verify(
    base: Ref | Mapping[str, Any],
    adapters: Ref | Adapter | Sequence[Ref | Adapter],
    merged: Ref | Mapping[str, Any],
    *,
    weights: Sequence[float] | None = None,
    allow_unmatched: Iterable[str] = (),
    on_conflict: Conflict = "error",
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
    jobs: int | None = None,
    executor: str = "threads",
    device: str = "cpu",
    arch: str | None = None,
    block_weights: str | Sequence[str] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> VerificationReport:
    """Compare a merged checkpoint, by whomever it was made, with the arithmetic of the merge.

    >>> import numpy as np
    >>> import loratools as lt
    >>> factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    >>> adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    >>> base = {"fc.weight": np.zeros((4, 3), "f4")}
    >>> lt.verify(base, adapter, lt.merge(base, adapter).state_dict).summary
    {'exact': 1}
    >>> [(verdict.name, verdict.verdict) for verdict in lt.verify(base, adapter, base).modules]
    [('fc.weight', 'unmerged')]

    Args:
        base: as for :func:`loratools.merge`.
        adapters: as for :func:`loratools.merge`.
        merged: the checkpoint in question: a folder, a file or a state dict. Its dtypes and shards are its own affair.
        weights: as for :func:`loratools.merge`.
        allow_unmatched: as for :func:`loratools.merge`.
        on_conflict: as for :func:`loratools.merge`.
        allow_pickle: read ``.bin`` adapters.
        blockwise_experts: the experts' B is packed expert-slowest.
        jobs: workers; by default the processors at hand, four at most.
        executor: as for :func:`loratools.merge`.
        device: as for :func:`loratools.merge`.
        arch: as for :func:`loratools.merge`.
        block_weights: as for :func:`loratools.merge`.
        on_step: called after each step, for progress.

    Returns:
        A verdict for each tensor, worst first.

    Raises:
        LoratoolsError: base and adapters cannot be merged, or a file cannot be read.
    """
    planned = plan_merge(
        base, adapters, weights=weights, allow_unmatched=allow_unmatched, on_conflict=on_conflict,
        allow_pickle=allow_pickle, blockwise_experts=blockwise_experts, device=device, arch=arch,
        block_weights=block_weights,
    )  # fmt: skip
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    return verify_merge(planned, merged, workers, on_step=on_step)


def verify_merge(
    planned: MergePlan,
    merged: Ref | Mapping[str, Any],
    executor: Executor,
    *,
    on_step: Callable[[Step], None] | None = None,
) -> VerificationReport:
    """:func:`verify`, for a merge that has been planned already."""
    started = time.perf_counter()
    model = open_base(merged)
    found = model.source
    for one in (planned.base, model):
        require_files(executor, one)
    verdicts, outputs = _presence(planned, found)
    _, steps = plan_steps({"": outputs}, {}, planned.device)
    starts = {output.name: output.base for output in outputs if output.base is not None}
    seen: dict[str, Comparison] = {}

    compare = partial(_compare, starts=starts, found=found)
    for parts in gather(compare, steps, executor, on_step=on_step):
        for name, part in parts.items():
            seen[name] = seen[name] + part if name in seen else part
    verdicts += [_verdict(name, compared) for name, compared in seen.items()]
    verdicts.sort(key=lambda v: (_SEVERITY.index(v.verdict), v.name))
    label = str(Path(merged)) if isinstance(merged, (str, os.PathLike)) else "the state dict"
    return VerificationReport(
        merged=label,
        ok=all(v.ok for v in verdicts),
        summary=dict(Counter(v.verdict for v in verdicts)),
        modules=tuple(verdicts),
        seconds=time.perf_counter() - started,
    )


def _presence(planned: MergePlan, found: TensorSource) -> tuple[list[TensorVerdict], list[Output]]:
    """Tensors that are missing, unexpected or of another shape; and the others, to be computed in the type found."""
    expected = planned.merged.outputs
    verdicts = [TensorVerdict(name, "unexpected") for name in found.specs if name not in expected]
    outputs = []
    for name, output in expected.items():
        if name not in found.specs:
            verdicts.append(TensorVerdict(name, "missing"))
        elif found.specs[name].shape != output.spec.shape:
            verdicts.append(TensorVerdict(name, "shape"))
        elif output.spec.count == 0:
            verdicts.append(TensorVerdict(name, "exact"))
        else:
            dtype = found.specs[name].dtype
            if dtype != output.spec.dtype and not (compatible(dtype) and compatible(output.spec.dtype)):
                verdicts.append(TensorVerdict(name, "different"))
            else:
                outputs.append(replace(output, spec=TensorSpec(dtype, output.spec.shape)))
    return verdicts, outputs


def _verdict(name: str, compared: Comparison) -> TensorVerdict:
    share = compared.differing / compared.count
    relative = (
        math.sqrt(compared.error / compared.expected) if compared.expected else math.sqrt(compared.error)
    )
    if not compared.differing:
        return TensorVerdict(name, "exact", 0.0, 0.0)
    if compared.is_right:
        return TensorVerdict(name, "rounding", share, relative)
    if compared.is_unmerged:
        return TensorVerdict(name, "unmerged", share, relative, 0.0)
    if compared.scale is not None:
        return TensorVerdict(name, "wrong_scale", share, relative, compared.scale)
    return TensorVerdict(name, "different", share, relative)


def _compare(step: Step, starts: Mapping[str, TensorRef], found: TensorSource) -> dict[str, Comparison]:
    """What a step says of the tensors it makes. An expert of a stack is named by its number."""
    from loratools.comparing import compare_step

    if isinstance(step, CopyStep):
        return _compare_copies(step, starts, found)
    stacked = len(step.spec.shape) == 3 and step.region_rows == step.spec.shape[1]
    number = f"[{step.region // step.region_rows}]" if stacked and step.contributions else ""
    return {step.name + number: compare_step(step, found)}


def _compare_copies(
    step: CopyStep, starts: Mapping[str, TensorRef], found: TensorSource
) -> dict[str, Comparison]:
    """Tensors that should be the same bytes as where they start from: the base, or an adapter that replaces them.

    A step may be a part of one large tensor, or a run of several.
    """
    from loratools.comparing import compare_copy

    compared, position = {}, -step.skip
    for name in step.names:
        ref = starts[name]
        size = ref.spec.nbytes
        first, last = max(0, -position), min(size, step.nbytes - position)
        if first < last:
            per_byte = ref.spec.count / size  # elements: two where they are half a byte
            compared[name] = compare_copy(ref, found, name, (int(first * per_byte), int(last * per_byte)))
        position += size
    return compared
