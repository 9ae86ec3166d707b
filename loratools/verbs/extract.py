"""``extract``: the difference of two checkpoints as an adapter."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from loratools.arrays import check_double
from loratools.decomposing import Rule, Svd, peak_bytes, work
from loratools.errors import OverBudget, UnknownFormat, Unsupported
from loratools.executors.base import make_executor
from loratools.extracting import Candidate, FullTensors, survey
from loratools.models import open_base
from loratools.planning import RUNTIME_BYTES
from loratools.provenance import identify, record
from loratools.publishing import require_place
from loratools.refs import local_path
from loratools.running import default_jobs, gather, peak_memory
from loratools.verbs.extract_assembly import assemble, joint
from loratools.verbs.extract_report import ExtractReport, RankRule
from loratools.verbs.reports import Range
from loratools.verbs.saving import save

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from loratools.extracting import Survey, Whole
    from loratools.models import BaseModel
    from loratools.verbs.extract_assembly import Assembled

__all__ = ["ExtractPlan", "extract", "plan_extract", "run_extract"]

Ref = str | os.PathLike[str]
_FLOAT32 = {"F32", "F64"}


@dataclass(frozen=True, slots=True)
class ExtractPlan:
    """An extraction that has not happened yet.

    Attributes:
        base: before, opened.
        tuned: after, opened.
        survey: what becomes of each tensor.
        rule: how ranks are chosen.
        svd: how matrices are decomposed.
        output: where the adapter goes; None for memory.
        force: an output that loratools made may be replaced.
    """

    base: BaseModel
    tuned: BaseModel
    survey: Survey
    rule: Rule
    svd: Svd
    output: Path | None
    force: bool = False
    to: str = "peft"

    @property
    def items(self) -> tuple[Candidate | Whole, ...]:
        """What there is to work on."""
        return (*self.survey.candidates, *self.survey.wholes)

    @property
    def parameters(self) -> int | None:
        """Of the low-rank modules at most; None where the values choose the rank."""
        if self.rule.kind != "rank":
            return None
        total = 0
        for one in self.survey.candidates:
            rows, columns = one.stored
            total += min(int(self.rule.value), rows, columns) * (rows + columns) * one.experts
        return total

    def peak_bytes(self, jobs: int) -> int:
        """Memory that is needed at most, as far as it is known before ranks are chosen."""
        largest = sorted((peak_bytes(item) for item in self.items), reverse=True)[:jobs]
        return RUNTIME_BYTES + sum(largest) + 4 * (self.parameters or 0)

    def require_memory(self, allowed: int | None, jobs: int) -> None:
        """Refuse to start where more memory is needed than may be used.

        Raises:
            OverBudget: by how much.
        """
        needed = self.peak_bytes(jobs)
        if allowed is not None and needed > allowed:
            raise OverBudget(needed, allowed, hint="fewer --jobs need less")

    def to_dict(self, jobs: int = 1) -> dict[str, Any]:
        """The plan in numbers, as ``--dry-run`` prints it."""
        left_out = [one for one in self.survey.wholes if one.left_out is not None]
        return {
            "schema": "loratools.extract/1",
            "dry_run": True,
            "output": None if self.output is None else str(self.output),
            "reads": [self.base.name, self.tuned.name],
            "rule": {"name": self.rule.kind, "value": _value(self.rule)},
            "modules": len(self.survey.candidates),
            "full_tensors": len(self.survey.wholes) - len(left_out),
            "left_out": [one.name for one in left_out],
            "bytes_read": sum(item.nbytes for item in self.items),
            "parameters": self.parameters,
            "peak_memory": self.peak_bytes(jobs),
            "jobs": jobs,
            "warnings": list(self.survey.warnings),
        }


def extract(
    base: Ref | Mapping[str, Any],
    tuned: Ref | Mapping[str, Any],
    out: Ref | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    noise_floor: bool = False,
    svd: Svd = "auto",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    full_tensors: FullTensors = "auto",
    dtype: object = None,
    to: str = "peft",
    jobs: int | None = None,
    executor: str = "threads",
    device: str = "cpu",
    max_memory: int | None = None,
    force: bool = False,
    sync: bool = True,
    on_step: Callable[[Candidate | Whole], None] | None = None,
) -> ExtractReport:
    """Turn what a fine-tune changed into an adapter: TUNED - BASE, each matrix by its best low-rank approximation.

    >>> import numpy as np
    >>> before = {"fc.weight": np.zeros((6, 5), np.float32)}
    >>> after = {"fc.weight": np.outer(np.arange(6.0), np.ones(5)).astype(np.float32)}
    >>> report = extract(before, after, rank=1)
    >>> report.modules[0].rank, report.modules[0].relative_error < 1e-6
    (1, True)

    Args:
        base: a folder (single or sharded), a safetensors file, or a state dict.
        tuned: the same model after training, likewise.
        out: a folder to make, or a file; None keeps the result in memory.
        rank: of every module.
        energy: the share of Σ σ² each module keeps.
        error: the relative error each module may have, and so the whole.
        noise_floor: what stands out of the noise that rounding to the tuned checkpoint's type has made. This is the
            rule where none is given. Between float32 checkpoints that noise is tiny, and ranks are high.
        svd: ``"auto"``, ``"exact"`` or ``"randomized"``.
        include: patterns of tensor names (:func:`re.search`): only these count.
        exclude: patterns of tensor names that do not.
        full_tensors: what goes along whole: ``"auto"``, what has no low-rank form (norms, resized embeddings, new
            heads); ``"none"``; or ``"all"``, also what the patterns leave out.
        dtype: of the floats written; by default float32 for factors (float64 where an input is), and its own type for
            what goes along whole.
        to: the format of the result: ``"peft"``, ``"kohya"``, ``"diffusers"``...
        jobs: workers; by default the processors at hand, four at most.
        executor: ``"threads"``, ``"inline"`` or ``"processes"``.
        device: where the products with the differences are formed: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        max_memory: bytes it may need.
        force: replace an output that loratools made.
        sync: wait for the disk.
        on_step: called after each tensor, for progress.

    Returns:
        What was found; its ``adapter`` is the result.

    Raises:
        InputError: a checkpoint cannot be read, or holds values that are not finite.
        Mismatch: the two are not checkpoints of one model.
        Unsupported: one is quantised; nothing has changed between them; a rule that makes no sense.
        OverBudget: more memory is needed than ``max_memory``; nothing has been read.
        OutputExists: ``out`` exists, or overlaps an input.
    """
    device = check_double(device)
    make_executor(executor, 1)  # a name that does not exist is refused before anything is opened
    planned = plan_extract(
        base, tuned, out, rank=rank, energy=energy, error=error, noise_floor=noise_floor, svd=svd,
        include=include, exclude=exclude, full_tensors=full_tensors, to=to, force=force,
    )  # fmt: skip
    return run_extract(
        planned, dtype=dtype, jobs=jobs, executor=executor, device=device, max_memory=max_memory, sync=sync,
        on_step=on_step,
    )  # fmt: skip


def plan_extract(
    base: Ref | Mapping[str, Any],
    tuned: Ref | Mapping[str, Any],
    out: Ref | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    noise_floor: bool = False,
    svd: Svd = "auto",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    full_tensors: FullTensors = "auto",
    to: str = "peft",
    force: bool = False,
) -> ExtractPlan:
    """Decide everything that headers decide. Arguments and errors are those of :func:`extract`."""
    rule = _rule(rank, energy, error, noise_floor=noise_floor)
    _require_choice("svd", svd, get_args(Svd))
    _require_choice("full_tensors", full_tensors, get_args(FullTensors))
    models = _open(base), _open(tuned)
    output = None if out is None else Path(out)
    if output is not None:
        require_place(output, [model.path for model in models if model.path is not None], force=force)
    found = survey(*models, include=_several(include), exclude=_several(exclude), full_tensors=full_tensors)
    return ExtractPlan(*models, found, rule, svd, output, force, to)


def run_extract(
    planned: ExtractPlan,
    *,
    dtype: object = None,
    jobs: int | None = None,
    executor: str = "threads",
    device: str = "cpu",
    max_memory: int | None = None,
    sync: bool = True,
    on_step: Callable[[Candidate | Whole], None] | None = None,
) -> ExtractReport:
    """Carry out what :func:`plan_extract` has planned. Arguments and errors are those of :func:`extract`."""
    started = time.perf_counter()
    workers = make_executor(executor, default_jobs() if jobs is None else jobs)
    planned.require_memory(max_memory, workers.jobs)
    results = gather(
        partial(work, rule=planned.rule, svd=planned.svd, device=device),
        planned.items,
        workers,
        on_step=on_step,
    )
    made = assemble(planned.survey, results)
    _require_something(planned, made)
    adapter = made.adapter(
        f"{Path(planned.tuned.name).name} - {Path(planned.base.name).name}",
        _base_name(planned.base),
        {
            "fan_in_fan_out": planned.survey.transposed and not made.tied,
            "task_type": planned.survey.task,
        },
    )
    size = sum(ref.spec.nbytes for ref in adapter.tensors)
    if planned.output is not None:
        size = save(
            adapter, planned.output, format=planned.to, dtype=dtype, force=planned.force, sync=sync,
            provenance=_provenance(planned, dtype), inputs=_paths(planned), base_config=planned.base.config,
        ).bytes  # fmt: skip
    _, error, optimality = joint(made.parts)
    ranks = [module.rank for module in made.reports]
    return ExtractReport(
        base=planned.base.name,
        tuned=planned.tuned.name,
        output=None if planned.output is None else str(planned.output),
        rule=RankRule(planned.rule.kind, _value(planned.rule)),
        rank=Range(min(ranks, default=None), max(ranks, default=None)),
        relative_error=error,
        optimality=optimality,
        modules=tuple(made.reports),
        full_tensors=tuple(made.full),
        skipped=tuple(made.skipped),
        unchanged=made.unchanged,
        parameters=sum(ref.spec.count for ref in adapter.tensors),
        bytes=size,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(workers),
        warnings=(*made.warnings, *_doubts(planned, made)),
        adapter=adapter,
    )


def _require_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise Unsupported(f"{option} {value!r} does not exist", hint=f"it is one of {', '.join(choices)}")


def _rule(rank: int | None, energy: float | None, error: float | None, *, noise_floor: bool) -> Rule:
    """The one rule that was given.

    Raises:
        Unsupported: several, or one out of its range.
    """
    kinds: tuple[tuple[Literal["rank", "energy", "error"], float | None], ...] = (
        ("rank", rank), ("energy", energy), ("error", error),
    )  # fmt: skip
    given = [(kind, value) for kind, value in kinds if value is not None]
    if len(given) + noise_floor > 1:
        names = [f"--{kind}" for kind, _ in given] + ["--noise-floor"] * noise_floor
        raise Unsupported(f"{' and '.join(names)} both choose the rank", hint="give one of them")
    if not given:
        return Rule("noise_floor")
    kind, value = given[0]
    if kind == "rank" and (value < 1 or value != int(value)):
        raise Unsupported(f"a rank of {value:g} is none", hint="ranks are whole numbers from 1")
    if kind != "rank" and not 0 < value < 1:
        raise Unsupported(f"--{kind} {value:g} is no share", hint="give a number between 0 and 1")
    return Rule(kind, float(value))


def _value(rule: Rule) -> float | None:
    return None if rule.kind == "noise_floor" else rule.value


def _several(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _open(given: Ref | Mapping[str, Any]) -> BaseModel:
    if not isinstance(given, (str, os.PathLike, Mapping)):
        raise Unsupported(
            f"a checkpoint is a {type(given).__name__}, not a path or a state dict",
            hint="pass model.state_dict()",
        )
    path = None if isinstance(given, Mapping) else local_path(given)
    if path is not None and (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UnknownFormat(
            f"{path} is an adapter, not a checkpoint",
            hint="extract takes two checkpoints: loratools extract BASE TUNED OUT",
        )
    model = open_base(given if path is None else path)
    if model.components:
        raise Unsupported(
            f"{path} is a pipeline of {len(model.components)} models; an adapter is extracted from one",
            hint=f"name a component's folder: {path / next(iter(model.components))}"
            if path is not None
            else None,
        )
    return model


def _paths(planned: ExtractPlan) -> list[Path]:
    return [model.path for model in (planned.base, planned.tuned) if model.path is not None]


def _base_name(base: BaseModel) -> str | None:
    """What to call the base in the configuration: as it calls itself, else its path's name or Hub id."""
    named = base.config.get("_name_or_path")
    if isinstance(named, str) and named and not os.path.isabs(named):  # noqa: PTH117 - a name, not a path
        return named
    return None if base.path is None else str(identify("base", base.path, base.source)["name"])


def _provenance(planned: ExtractPlan, dtype: object) -> dict[str, Any]:
    from loratools import __version__

    parameters = {
        "rule": planned.rule.kind,
        "value": _value(planned.rule),
        "svd": planned.svd,
        "dtype": None if dtype is None else str(dtype),
    }
    inputs = [
        identify("base", planned.base.path, planned.base.source),
        identify("tuned", planned.tuned.path, planned.tuned.source),
    ]
    return record("extract", __version__, parameters, inputs)


def _require_something(planned: ExtractPlan, made: Assembled) -> None:
    """Refuse to write an adapter that would do nothing.

    Raises:
        Unsupported: nothing has changed, or nothing of it is to be in the adapter.
    """
    if made.modules or made.extras:
        return
    if not made.skipped:
        raise Unsupported(
            f"{planned.base.name} and {planned.tuned.name} hold the same values: there is nothing to extract"
        )
    raise Unsupported(
        f"nothing of what has changed is to be in the adapter: {made.skipped[0].name} "
        f"({made.skipped[0].reason})" + (f" and {len(made.skipped) - 1} more" if made.skipped[1:] else ""),
        hint="--rank keeps what lies below the noise floor too"
        if planned.rule.kind == "noise_floor"
        else None,
    )


def _doubts(planned: ExtractPlan, made: Assembled) -> list[str]:
    """What the result depends on, or why it is large."""
    doubts = []
    if planned.rule.kind == "noise_floor" and any(m.noise_dtype in _FLOAT32 for m in made.reports):
        doubts.append(
            "the noise floor of a float32 checkpoint is the rounding of float32: all that a full fine-tune did stands "
            "out of it; --rank or --energy makes a smaller adapter"
        )
    heavy = [
        module.name
        for module in made.reports
        if module.rank * (module.shape[0] + math.prod(module.shape[1:])) > math.prod(module.shape)
        and module.rank > 1
    ]
    if heavy:
        doubts.append(
            f"{heavy[0]}{f' and {len(heavy) - 1} more' if heavy[1:] else ''}: the factors hold more values than "
            "the weight itself; a smaller rank, or --exclude with --full-tensors all"
        )
    return doubts
