"""``normalize``: the same update as an adapter that every loader reads the same way."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter
from loratools.arrays import check_double
from loratools.engines.base import engine as find_engine
from loratools.errors import Unsupported
from loratools.executors.base import make_executor
from loratools.formats.opening import open_adapter
from loratools.models import open_base, require_unquantised
from loratools.provenance import identify, record
from loratools.publishing import require_place
from loratools.running import default_jobs, gather
from loratools.verbs.normalize_assembly import assemble, make_report, require_close
from loratools.verbs.normalize_engine import (
    adjust,
    facts_of_base,
    require_accepted,
    require_fixable,
    seen_as,
    whole_unit,
)
from loratools.verbs.normalize_planning import (
    HALVES,
    approximates,
    choose_type,
    find_work,
    mend_names,
    require_memory,
    require_plain,
)
from loratools.verbs.normalize_work import make_plain
from loratools.verbs.saving import WEIGHTS_NAME, float_dtype, identify_adapter, input_paths, save, settled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from loratools.models import BaseModel
    from loratools.verbs.normalize_planning import Work
    from loratools.verbs.normalize_report import NormalizeReport

__all__ = ["normalize"]

Ref = str | os.PathLike[str]
_AS_PEFT = {"gguf", "mlx"}  # formats of language models, whose modules PEFT's configuration can name


def normalize(
    ref: Ref | Mapping[str, Any] | Adapter,
    out: Ref | None = None,
    *,
    base: Ref | Mapping[str, Any] | None = None,
    rank: int | None = None,
    pad: bool = False,
    engine: str | None = None,
    dtype: object = None,
    to: str | None = None,
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
        engine: whose rules to keep to, such as ``"vllm"``: one rank for all modules where it needs that, the names it
            looks for, no module left out; and what it cannot take is refused by name.
        dtype: of the floats written; by default the widest that is read, and float32 where 16 bits would round what
            is to stay the same.
        to: the format of the result; by default that of the adapter, and PEFT's where that is only read.
        allow_pickle: read ``.bin`` and ``.pt`` files.
        jobs: workers; by default the processors at hand, four at most.
        executor: ``"threads"``, ``"inline"`` or ``"processes"``.
        device: where the long products are formed: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        max_memory: bytes it may need.
        force: replace an output that loratools made.
        sync: wait for the disk.
        on_step: called after each module, for progress.

    Returns:
        What was done; its ``adapter`` is the result.

    Raises:
        InputError: the adapter cannot be read, or holds NaN.
        Unsupported: it has no plain form: IA3, or a residual without its base; or the engine would still refuse it, or
            compute something else.
        Mismatch: the adapter does not fit the base; its ranks contradict its configuration.
        NonFinite: a value overflowed ``dtype``.
        OutputExists: ``out`` exists, or overlaps an input.
        OverBudget: more memory is needed than ``max_memory`` allows.
    """
    _require_rank(rank)
    target = None if engine is None else find_engine(engine)
    pad = pad or (target is not None and "pad" in target.plain)
    device = check_double(device)
    wanted = float_dtype(dtype)
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    adapter = ref if isinstance(ref, Adapter) else open_adapter(ref, allow_pickle=allow_pickle)
    model = _open_base(base)
    if target is not None:
        require_fixable(target, adapter, facts_of_base(adapter, model), rank=rank, to=to)
    adapter.require_computable()
    inputs = [] if model is None or model.path is None else [model.path]
    inputs += input_paths(adapter)
    if out is not None:
        require_place(Path(out), inputs, force=force)
    read, form = adapter, settled(adapter, to)
    if adapter.format in _AS_PEFT:
        adapter = seen_as(adapter, "peft", None)
    renamed, adapter = mend_names(adapter)
    if target is not None:
        changed, adapter = adjust(target, adapter, model)
        renamed |= changed
    warnings = require_plain(adapter, rank)
    adapter, work = find_work(adapter, model, warnings)
    require_memory(work, max_memory, workers.jobs)
    kind, unit = choose_type(adapter, rank, None if wanted is None else wanted.name)
    if target is not None:
        greatest = rank or max((module.rank or 0 for module in adapter.modules.values()), default=0)
        kind, unit = whole_unit(target, kind, unit, greatest, None if wanted is None else wanted.name)
    plainly = partial(make_plain, rank=rank, device=device)
    results = gather(partial(plainly, dtype=kind, unit=unit), work, workers, on_step=on_step)
    rounded = kind in HALVES and not approximates(adapter, rank) and any(r.distance for r in results)
    if rounded and wanted is None:
        kind, unit = "F32", 1.0
        results = gather(partial(plainly, dtype=kind, unit=unit), work, workers)
    if rank is None and kind not in HALVES:
        require_close(results)
    made, dropped = assemble(adapter, results, kind, unit, pad=pad, whole=target is not None)
    answer = None if target is None else require_accepted(target, read, made, model, form=form)
    saved = None
    if out is not None:
        from loratools import __version__

        parameters = {"rank": rank, "pad": pad, "dtype": kind, "for": None if target is None else target.name}
        origins = [identify_adapter(read)]
        if model is not None:
            origins.append(identify("base", model.path, model.source))
        made_by = record("normalize", __version__, parameters, origins)
        saved = save(
            made,
            out,
            format=form,
            dtype=wanted,
            force=force,
            sync=sync,
            provenance=made_by,
            inputs=inputs,
            base_config=None if model is None else model.config,
        )
    return make_report(
        adapter, made, results, dropped, renamed, kind, warnings,
        engine=answer,
        output=None if out is None else os.fspath(out),
        size=sum(r.spec.nbytes for r in made.tensors) if saved is None else _weights_bytes(Path(saved.path)),
    )  # fmt: skip


def _weights_bytes(saved: Path) -> int:
    if saved.is_dir():
        saved = next(
            (file for file in saved.iterdir() if file.suffix == ".safetensors"), saved / WEIGHTS_NAME
        )
    return saved.stat().st_size


def _open_base(base: Ref | Mapping[str, Any] | None) -> BaseModel | None:
    if base is None:
        return None
    model = open_base(base)
    require_unquantised(model)
    return model


def _require_rank(rank: int | None) -> None:
    if rank is not None and (isinstance(rank, bool) or rank < 1):
        raise Unsupported(f"rank {rank} is no rank", hint="1 or more")
