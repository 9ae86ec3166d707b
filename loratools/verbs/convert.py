"""``convert``: the same adapter in another format, read back and compared before it appears."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, require_own_rank
from loratools.architectures.base import architecture as named_architecture
from loratools.architectures.detect import detect
from loratools.canonical import fits, places
from loratools.deltas.likeness import ratio
from loratools.errors import Mismatch, NotFound, OverBudget, UnknownFormat, Unsupported
from loratools.executors.base import make_executor
from loratools.formats.fusing import split_adapter
from loratools.formats.gguf import read_gguf_bytes, with_base
from loratools.formats.keys import name_model
from loratools.formats.opening import Opened, interpret, open_adapter
from loratools.formats.peft_config import CONFIG_NAME, read_config
from loratools.formats.registry import find_format
from loratools.models import BaseModel, open_base
from loratools.planning import RUNTIME_BYTES
from loratools.provenance import identify, record
from loratools.publishing import require_place
from loratools.running import default_jobs, gather
from loratools.tensors.memory import MemorySource
from loratools.tensors.safetensors import SafetensorsFile
from loratools.tensors.views import sources
from loratools.verbs.convert_base import require_base
from loratools.verbs.convert_report import ConvertedModule, ConvertReport, Loss
from loratools.verbs.convert_work import Judged, Twin, judge, norm_before
from loratools.verbs.saving import (
    find_naming,
    float_dtype,
    identify_adapter,
    input_paths,
    lay_out_written,
    names_depend,
    require_nothing_lost,
    save_written,
    view_written,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from loratools.adapter import Module
    from loratools.architectures.base import Architecture
    from loratools.dtypes import Dtype
    from loratools.executors.base import Executor
    from loratools.formats.registry import Format, Written
    from loratools.tensors.base import TensorSource

__all__ = ["convert", "plan_convert"]

Ref = str | os.PathLike[str]

# Greatest relative difference that rounding explains: of both factors once to the type, with room for bad luck.
_ROUNDINGS = {"BF16": 2.0**-7, "F16": 2.0**-9}
_ROUNDING = 1e-6
_OUTER = {"base_model", "model", "language_model", "transformer"}  # models that others lie in
_NOTHING = 1e-7  # a module this small beside all others is not held to its own rounding


@dataclass(frozen=True, slots=True)
class _Task:
    """What is asked for, with everything opened and nothing written."""

    adapter: Adapter
    target: Format
    architecture: Architecture | None
    evidence: str
    written: Written
    dtype: Dtype | None
    workers: Executor
    on_step: Callable[[Twin], None] | None

    @property
    def tolerance(self) -> float:
        """The relative difference that the types explain."""
        return _ROUNDING if self.dtype is None else _ROUNDINGS.get(self.dtype.name, _ROUNDING)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The adapter's own, and that its shapes are not those of the architecture it was taken for."""
        known = {} if self.architecture is None else places(self.adapter, self.architecture)
        odd = [name for name, place in known.items() if not fits(self.adapter.modules[name], place)]
        if not odd or self.architecture is None:
            return (*self.adapter.warnings, *self.written.warnings)
        shape = "x".join(map(str, self.adapter.modules[odd[0]].shape))
        told = (
            f"{len(odd)} of {len(known)} modules are of another size than in {self.architecture.title} "
            f"({odd[0]} is {shape}): the names alone were changed"
        )
        return (*self.adapter.warnings, *self.written.warnings, told)


def convert(
    ref: Ref | Mapping[str, Any] | Adapter,
    out: Ref | None = None,
    *,
    to: str,
    base: Ref | Mapping[str, Any] | None = None,
    arch: str | None = None,
    allow_loss: Iterable[str] = (),
    config: Ref | Mapping[str, Any] | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    allow_pickle: bool = False,
    dtype: object = None,
    jobs: int | None = None,
    executor: str = "threads",
    max_memory: int | None = None,
    force: bool = False,
    sync: bool = True,
    on_step: Callable[[Twin], None] | None = None,
) -> ConvertReport:
    """Write an adapter in another format, and say how far the result is from it.

    Modules are renamed through the architecture's list; what one format fuses and the other splits is split, or joined
    block by block. The result is read back before it appears: what every module adds is compared with what it added
    before, in float64, and a difference that rounding does not explain is an error. So is a key that the new format
    has no place for.

    Args:
        ref: the adapter.
        out: a file, or a folder to make; None keeps the result in memory.
        to: the format: ``kohya``, ``diffusers``, ``comfy``, ``peft``, ``mlx``, ``gguf``.
        base: the base model, which says the architecture by its tensors' names and shapes; GGUF needs its
            ``config.json``, and MLX learns from it whether the embeddings are tied. A language model's adapter must
            fit it.
        arch: the architecture by name; by default, what the modules' names and shapes say.
        allow_loss: keys or modules that may be left out: names, or patterns with ``*``.
        config: the configuration, where it does not lie beside the weights.
        alpha: where nothing says it.
        enable_lora: which parts of a fused weight a loralib file has factors for.
        allow_pickle: read ``.bin`` and ``.pt`` files.
        dtype: of the floats written; by default each keeps its own.
        jobs: workers; by default the processors at hand, four at most.
        executor: ``"threads"`` or ``"inline"``.
        max_memory: bytes it may need.
        force: replace an output that loratools made.
        sync: wait for the disk.
        on_step: called after each module that is compared, for progress.

    Returns:
        What was done; its ``adapter`` is the result.

    Raises:
        InputError: the adapter cannot be read.
        Unsupported: the format cannot hold a part of it; nothing says which model it belongs to.
        Mismatch: the result does something else; the adapter does not fit the architecture, or the base.
        OverBudget: more memory is needed than ``max_memory`` allows.
        OutputExists: ``out`` exists, or overlaps an input.
    """
    model = None if base is None else _base(base, to)
    adapter = _opened(ref, config, alpha, enable_lora, model, allow_pickle=allow_pickle)
    inputs = _inputs(adapter, model)
    if out is not None:
        require_place(Path(out), inputs, force=force)
    workers = _workers(executor, jobs)
    task = _prepare(adapter, find_format(to), model, arch, allow_loss, float_dtype(dtype), workers, on_step)
    _require_memory(task, max_memory)
    seen: list[tuple[Adapter, list[tuple[Twin, Judged]]]] = []

    def check(path: Path | None) -> None:
        back = _read_back(task, path)
        seen.append((back, _compared(task, back)))

    size = 0
    if out is None:
        check(None)
        size = sum(ref.spec.nbytes for ref in task.written.tensors.values())
    else:
        saved = save_written(
            adapter, task.written, Path(out), format=task.target.name, dtype=task.dtype, force=force, sync=sync,
            provenance=_provenance(task, model), check=check,
        )  # fmt: skip
        size = saved.bytes
    return _report(task, *seen[0], output=None if out is None else os.fspath(out), size=size)


def plan_convert(
    adapter: Adapter,
    out: Ref,
    *,
    to: str,
    base: Ref | Mapping[str, Any] | None = None,
    arch: str | None = None,
    allow_loss: Iterable[str] = (),
    dtype: object = None,
    max_memory: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """What :func:`convert` would write, in numbers, as ``--dry-run`` prints it.

    Arguments and errors are those of :func:`convert`.
    """
    model = None if base is None else _base(base, to)
    if model is not None:
        adapter = with_base(adapter, model.config)
    adapter.require_computable()
    require_place(Path(out), _inputs(adapter, model), force=force)
    task = _prepare(
        adapter,
        find_format(to),
        model,
        arch,
        allow_loss,
        float_dtype(dtype),
        _workers("inline", 1),
        None,
    )
    _require_memory(task, max_memory)
    plan, config = lay_out_written(adapter, task.written, Path(out), format=to, dtype=task.dtype)
    small = {one.name: len(one.read()) for one in plan.small}
    if plan.kind == "file" and config:
        small[CONFIG_NAME] = len(config)
    files = [{"name": file.name, "bytes": file.size} for file in plan.files]
    files += [{"name": name, "bytes": count} for name, count in small.items()]
    return {
        "schema": "loratools.convert/1",
        "dry_run": True,
        "output": os.fspath(out),
        "reads": [adapter.name, *([] if model is None else [model.name])],
        "bytes_read": sum(ref.spec.nbytes for ref in adapter.tensors),
        "files": files,
        "bytes_written": sum(int(str(file["bytes"])) for file in files),
        "peak_memory": _peak_bytes(task),
        "from": adapter.format,
        "to": task.target.name,
        "architecture": None if task.architecture is None else task.architecture.name,
        "lost": [{"name": name, "reason": reason} for name, reason in task.written.lost.items()],
        "warnings": list(task.warnings),
    }


def _inputs(adapter: Adapter, model: BaseModel | None) -> list[Path]:
    return [*input_paths(adapter), *([] if model is None or model.path is None else [model.path])]


def _workers(executor: str, jobs: int | None) -> Executor:
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    if workers.remote:
        raise Unsupported(
            f"convert cannot use executor {executor!r}: what is compared is made as it is read",
            hint="threads are as fast",
        )
    return workers


def _peak_bytes(task: _Task) -> int:
    """The factors of the largest modules, twice in float64, one for each worker; and what is held in memory anyway."""
    largest = sorted((module.parameters for module in task.adapter.modules.values()), reverse=True)
    held = sum(len(content) for content in task.written.files.values())
    held += sum(
        ref.spec.nbytes for ref in task.written.tensors.values() if isinstance(ref.source, MemorySource)
    )
    return RUNTIME_BYTES + held + 4 * 8 * sum(largest[: task.workers.jobs])


def _require_memory(task: _Task, allowed: int | None) -> None:
    needed = _peak_bytes(task)
    if allowed is not None and needed > allowed:
        raise OverBudget(needed, allowed, hint="fewer --jobs need less")


def _base(base: Ref | Mapping[str, Any], to: str) -> BaseModel:
    """The base; for formats that ask for its configuration alone, a folder without weights will do."""
    try:
        return open_base(base)
    except (NotFound, UnknownFormat):
        beside = Path(base) / "config.json" if isinstance(base, (str, os.PathLike)) else None
        if beside is None or not find_format(to).needs_base or not beside.is_file():
            raise
        return BaseModel(beside.parent, "folder", MemorySource({}), {}, config=read_config(beside))


def _opened(
    ref: Ref | Mapping[str, Any] | Adapter,
    config: Ref | Mapping[str, Any] | None,
    alpha: float | None,
    enable_lora: Sequence[bool] | None,
    model: BaseModel | None,
    *,
    allow_pickle: bool,
) -> Adapter:
    if isinstance(ref, Adapter):
        adapter = ref
    else:
        adapter = open_adapter(
            ref, config=config, alpha=alpha, allow_pickle=allow_pickle, enable_lora=enable_lora
        )
    if model is not None:
        adapter = with_base(adapter, model.config)
    adapter.require_computable()
    return adapter


# --- before ----------------------------------------------------------------------------------------------------


def _prepare(
    adapter: Adapter,
    target: Format,
    model: BaseModel | None,
    arch: str | None,
    allow_loss: Iterable[str],
    dtype: Dtype | None,
    workers: Executor,
    on_step: Callable[[Twin], None] | None,
) -> _Task:
    for name, module in adapter.modules.items():
        require_own_rank(adapter.name, name, module)
    architecture, evidence = None, "the names are the same in both formats"
    if arch is not None:
        named_architecture(arch)  # refused where there is none of this name, though the format needs none
    if names_depend(adapter, target):
        architecture, evidence = _architecture(adapter, target, model, arch)
    options: dict[str, Any] = {}
    if target.needs_base:
        options["base_config"] = None if model is None else model.config
    if target.name == "gguf":
        options["dtype"] = dtype
    written = target.write(adapter, architecture, **options)
    written = replace(written, lost={**written.lost, **_unread(adapter)})
    if target.diffusion and architecture is not None and (arch is not None or model is not None):
        written = replace(written, metadata=name_model(written.metadata, target.name, architecture))
    require_nothing_lost(adapter.name, target.name, written.lost, allow_loss)
    if model is not None and architecture is None:
        require_base(adapter, model, leave=written.lost)
    if not written.tensors and not written.files:
        raise Unsupported(f"{adapter.name}: {target.name} has no place for any of its modules")
    return _Task(adapter, target, architecture, evidence, written, dtype, workers, on_step)


def _architecture(
    adapter: Adapter, target: Format, model: BaseModel | None, arch: str | None
) -> tuple[Architecture | None, str]:
    """The architecture, and what says so; None where only names that stay can be written."""
    if arch is not None:
        return named_architecture(arch), "it was named"
    if model is not None:
        shapes = {
            name.removesuffix(".weight"): spec.shape
            for name, spec in model.source.specs.items()
            if name.endswith(".weight")
        }
        found = detect(shapes)
        if found.architecture is None:
            raise Mismatch(
                f"{model.name}: {found.evidence}",
                hint="--arch says which it is, of those loratools formats lists",
            )
        return named_architecture(found.architecture), f"{model.name}: {found.evidence}"
    own = find_naming(adapter, target)
    return own, "the names and shapes of its modules" if own is not None else "its names stay as they are"


def _unread(adapter: Adapter) -> dict[str, str]:
    """Keys of the file that reading it left unexplained."""
    known = {
        one.name
        for module in adapter.modules.values()
        for ref in module.tensors.values()
        for one in sources(ref)
    }
    known |= {one.name for extra in adapter.extras.values() for one in sources(extra.tensor)}
    return {ref.name: "nothing says what it is" for ref in adapter.tensors if ref.name not in known}


def _provenance(task: _Task, model: BaseModel | None) -> dict[str, Any]:
    from loratools import __version__

    parameters = {
        "to": task.target.name,
        "architecture": None if task.architecture is None else task.architecture.name,
        "dtype": None if task.dtype is None else task.dtype.name,
    }
    origins = [identify_adapter(task.adapter)]
    if model is not None:
        origins.append(identify("base", model.path, model.source))
    return record("convert", __version__, parameters, origins)


# --- after -----------------------------------------------------------------------------------------------------


def _read_back(task: _Task, path: Path | None) -> Adapter:
    """The result as a reader finds it: from the file that was written, or from what would be."""
    source: TensorSource
    whole = task.written.files.get(task.written.weights)
    if path is None and whole is not None:
        return read_gguf_bytes("the result", whole)
    if path is None:
        source = view_written(task.written, task.dtype)
    elif path.name.removesuffix(".part").endswith(".gguf"):
        return open_adapter(path)
    else:
        source = SafetensorsFile(path)
    raw = json.loads(task.written.files.get(CONFIG_NAME, b"{}"))
    return interpret(Opened("the result", source, raw, "its configuration"))


def _compared(task: _Task, back: Adapter) -> list[tuple[Twin, Judged]]:
    """Every module before and after.

    Raises:
        Mismatch: a module is missing, or does something else.
    """
    back.require_computable()
    before, after = _known(task.adapter, task.architecture), _known(back, task.architecture)
    before = {name: _kept(task, module) for name, module in before.items()}
    if task.architecture is None:
        after = _matched(before, after)
    twins = [Twin(name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]
    twins = [twin for twin in twins if twin.after is not None or not _is_lost(task, twin)]
    found = gather(judge, twins, task.workers, on_step=task.on_step)
    if not all(judged.identical for judged in found):
        norms = gather(norm_before, twins, task.workers)
        found = [replace(judged, norm=norm) for judged, norm in zip(found, norms, strict=True)]
    _require_same(task, found)
    return list(zip(twins, found, strict=True))


def _matched(before: Mapping[str, Module], after: Mapping[str, Module]) -> dict[str, Module]:
    """The modules of the result under the names of what was read, where only the head of a name was added or left out.

    MLX and GGUF name modules from the outermost model on, and an adapter may have been trained inside it.
    """
    known: dict[str, list[str]] = {}
    for name in before.keys() - after.keys():
        known.setdefault(_bare(name), []).append(name)
    found = {}
    for name, module in after.items():
        same = known.get(_bare(name), []) if name not in before else []
        found[same[0] if len(same) == 1 else name] = module
    return found if len(found) == len(after) else dict(after)


def _bare(name: str) -> str:
    """A module's name without the names of the models it lies in.

    >>> _bare("language_model.model.layers.0.q_proj"), _bare("layers.0.q_proj")
    ('layers.0.q_proj', 'layers.0.q_proj')
    """
    while (head := name.partition("."))[0] in _OUTER and head[2]:
        name = head[2]
    return name


def _known(adapter: Adapter, architecture: Architecture | None) -> dict[str, Module]:
    """The modules by the names that both sides have."""
    if architecture is None:
        return dict(adapter.modules)
    if adapter.format == "peft":
        adapter = replace(
            adapter, modules={_placed(name, architecture): m for name, m in adapter.modules.items()}
        )
    split = split_adapter(adapter, architecture)
    apart = {name: kept.module for name, kept in split.whole.items()}
    apart |= {name: adapter.modules[name] for name in (*split.failed, *split.unmatched)}
    return {**split.modules, **apart}


def _placed(name: str, architecture: Architecture) -> str:
    """A module of a PEFT adapter by its canonical name: its component is not in it."""
    full = (f"{component.name}.{name}" for component in architecture.components)
    return next((one for one in full if one in architecture.canonical), name)


def _kept(task: _Task, module: Module) -> Module:
    """A module without those of its tensors that were left out by leave, such as a bias."""
    kept = {role: ref for role, ref in module.tensors.items() if ref.name not in task.written.lost}
    return replace(module, tensors=kept) if 0 < len(kept) < len(module.tensors) else module


def _is_lost(task: _Task, twin: Twin) -> bool:
    """Whether a module is missing by leave."""
    if twin.before is None:
        return False
    keys = {one.name for ref in twin.before.tensors.values() for one in sources(ref)}
    return twin.name in task.written.lost or bool(keys & task.written.lost.keys())


def _require_same(task: _Task, found: list[Judged]) -> None:
    whole = math.hypot(*(judged.norm for judged in found))
    floor = _NOTHING * whole
    for judged in found:
        if judged.distance > task.tolerance * max(judged.norm, floor):
            raise Mismatch(
                f"{judged.name} would differ by {judged.relative:.2g} in {task.target.name}: rounding is less",
                hint="nothing was written"
                if task.dtype is None
                else f"values do not fit {task.dtype.name}; a wider --dtype keeps them",
            )


def _report(
    task: _Task, back: Adapter, found: list[tuple[Twin, Judged]], *, output: str | None, size: int
) -> ConvertReport:
    modules = tuple(_module(twin, judged) for twin, judged in found)
    judged = [one for _, one in found]
    dropped = [key for key, extra in task.adapter.extras.items() if extra.role == "training_only"]
    return ConvertReport(
        path=task.adapter.name,
        output=output,
        source=task.adapter.format,
        to=task.target.name,
        architecture=None if task.architecture is None else task.architecture.name,
        evidence=task.evidence,
        relative=ratio(
            math.hypot(*(one.distance for one in judged)), math.hypot(*(one.norm for one in judged))
        ),
        greatest=max((one.relative for one in judged), default=0.0),
        identical=sum(one.identical for one in judged),
        modules=modules,
        lost=tuple(Loss(name, reason) for name, reason in task.written.lost.items()),
        dropped=tuple(key for key in dropped if key not in task.written.tensors),
        warnings=(*task.warnings, *_unbounded(judged)),
        bytes=size,
        adapter=back,
    )


def _unbounded(found: list[Judged]) -> tuple[str, ...]:
    """That some values are not finite, which a change of names carries over."""
    keys = [judged.unbounded for judged in found if judged.unbounded is not None]
    if not keys:
        return ()
    more = f" (and so do {len(keys) - 1} more modules)" if keys[1:] else ""
    return (f"{keys[0]} holds values that are not finite{more}; loratools validate lists them",)


def _module(twin: Twin, judged: Judged) -> ConvertedModule:
    module = twin.after or twin.before
    assert module is not None
    return ConvertedModule(twin.name, module.kind, module.rank, judged.relative)
