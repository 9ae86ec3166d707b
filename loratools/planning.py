"""A plan: every file to be written and every step that writes into it, known before any value is read.

A safetensors layout does not depend on its values, so each step knows the offset it writes at, wherever and whenever
it runs. A step belongs to a weight (or to a run of untouched bytes) and holds references only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.adapter import flat_shape
from loratools.dtypes import accumulator, compatible, dtype
from loratools.errors import OverBudget, Unsupported
from loratools.targets import group_by_index, is_attention
from loratools.tensors.header import layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from loratools.adapter import Extra, Module
    from loratools.dtypes import Dtype
    from loratools.targets import Term
    from loratools.tensors.base import TensorRef, TensorSpec

__all__ = [
    "Contribution",
    "CopyStep",
    "Output",
    "OutputFile",
    "Plan",
    "SmallFile",
    "WeightStep",
    "plan_steps",
]

BLOCK_ELEMENTS = 1 << 19  # float32 values worked on at once; with smaller blocks workers wait for each other
STEP_BYTES = 48 << 20  # of output, about; a larger weight is split so that workers share it
COPY_BYTES = 256 << 20
# What a value of rotations takes while they are inverted, in float64: matrices, and triangles that are half of them.
_INVERTED = {"blocks": 20, "packed": 40}
RUNTIME_BYTES = 48 << 20  # the interpreter, numpy and headers


@dataclass(frozen=True, slots=True)
class Contribution:
    """All that one adapter does to one weight: W + weight · (U(W) - W), with U its terms in turn."""

    weight: float
    terms: tuple[Term, ...] = ()
    replacement: TensorRef | None = None
    rows: Extra | None = None

    @property
    def is_sum(self) -> bool:
        """Whether it is a plain sum, which needs no second copy of the weight."""
        return (
            self.replacement is None
            and self.rows is None
            and all(term.module.adds(term.part) for term in self.terms)
        )


@dataclass(frozen=True, slots=True)
class WeightStep:
    """Some rows of one weight, seen as a matrix: read, updated in float, rounded once, written.

    Attributes:
        name: of the tensor in the output.
        file: index into the plan's files.
        offset: of the tensor's first byte in that file.
        spec: of the tensor as written.
        base: the tensor it starts from; None where a replacement provides every value.
        contributions: what is added.
        columns: of the weight seen as a matrix; of its experts' matrices, where it is a stack of them.
        region: first row of the matrix the terms speak of (an expert's, inside a 3-D tensor).
        region_rows: rows of that matrix.
        start: first row this step covers.
        stop: one past its last.
        block_rows: rows worked on at once.
        peak_bytes: memory needed while it runs.
        device: where the products of factors are computed (see :mod:`loratools.arrays`).
    """

    name: str
    file: int
    offset: int
    spec: TensorSpec
    base: TensorRef | None
    contributions: tuple[Contribution, ...]
    columns: int
    region: int
    region_rows: int
    start: int
    stop: int
    block_rows: int
    peak_bytes: int
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes it writes."""
        return self.spec.dtype.nbytes((self.stop - self.start) * self.columns)

    @property
    def accumulator(self) -> Dtype:
        """The type sums are taken in: float32 as PEFT takes them, float64 where PEFT rounds twice and is no guide."""
        return _accumulator(self.spec, self.base, self.contributions)

    @property
    def sampled(self) -> bool:
        """Whether its first block is measured: once for each matrix that something is added to."""
        changes = any(c.terms for c in self.contributions)
        return (
            self.start == self.region and changes and all(c.replacement is None for c in self.contributions)
        )


@dataclass(frozen=True, slots=True)
class CopyStep:
    """A run of bytes that stay as they are: whole tensors that lie one behind the other in both files.

    Attributes:
        names: the tensors.
        file: index into the plan's files.
        offset: where they go.
        source: the first of them.
        skip: bytes of it that another step copies.
        nbytes: how much to copy.
    """

    names: tuple[str, ...]
    file: int
    offset: int
    source: TensorRef
    skip: int
    nbytes: int
    peak_bytes: int = 1 << 20


Step = WeightStep | CopyStep


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file to be written."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file beside the weights: copied from a path, or given."""

    name: str
    source: Path | None = None
    content: bytes | None = None

    def read(self) -> bytes:
        """Its bytes."""
        return self.content if self.source is None else self.source.read_bytes()  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written, and how. Nothing has been computed yet.

    Attributes:
        kind: ``folder``, ``file`` or ``memory``.
        files: the weights.
        steps: in the order of the bytes they write.
        small: what lies beside them.
        identity: of the inputs; an interrupted run goes on only where it is unchanged.
    """

    kind: str
    files: tuple[OutputFile, ...]
    steps: tuple[Step, ...]
    small: tuple[SmallFile, ...] = ()
    identity: tuple[Any, ...] = ()

    @property
    def bytes_written(self) -> int:
        """Bytes of weights, with headers."""
        return sum(file.size for file in self.files)

    def peak_bytes(self, jobs: int, *, apart: bool = False) -> int:
        """Memory needed with this many workers, in bytes; ``apart`` where each is a process of its own."""
        heaviest = sorted((step.peak_bytes for step in self.steps), reverse=True)[:jobs]
        return RUNTIME_BYTES * (1 + apart * jobs) + sum(heaviest)

    def require_memory(self, allowed: int | None, jobs: int, *, apart: bool = False) -> None:
        """Check the budget before anything is read.

        Raises:
            OverBudget: more is needed than ``allowed`` bytes.
        """
        needed = self.peak_bytes(jobs, apart=apart)
        if allowed is not None and needed > allowed:
            heaviest = max(self.steps, key=lambda step: step.peak_bytes)
            name = heaviest.name if isinstance(heaviest, WeightStep) else heaviest.names[0]
            hint = f"the largest step is {name} ({heaviest.peak_bytes / 1e6:.0f} MB)"
            hint = f"fewer --jobs need less; {hint}" if jobs > 1 else f"allow more: {hint}"
            raise OverBudget(needed, allowed, hint=hint)

    def digest(self) -> str:
        """A fingerprint of the plan and its inputs."""
        content = hashlib.sha256(repr(self.identity).encode())
        for file in self.files:
            content.update(repr((file.name, file.size)).encode() + file.header)
        for step in self.steps:
            content.update(repr(_described(step)).encode())
        content.update(str((BLOCK_ELEMENTS, STEP_BYTES)).encode())
        return content.hexdigest()


def _described(step: Step) -> tuple[Any, ...]:
    """All that decides the bytes a step writes, but for the values it reads."""
    if isinstance(step, CopyStep):
        return ("copy", step.names, step.file, step.offset, step.source.name, step.skip, step.nbytes)
    changes = [
        (
            c.weight,
            [(t.name, t.part, t.target, *_described_module(t.module)) for t in c.terms],
            None if c.replacement is None else c.replacement.name,
            None if c.rows is None else (c.rows.tensor.name, c.rows.indices),
        )
        for c in step.contributions
    ]
    base = None if step.base is None else step.base.name
    place = (
        step.name,
        step.file,
        step.offset,
        step.region,
        step.start,
        step.stop,
        step.block_rows,
        step.device,
    )
    return ("weight", *place, base, changes)


def _described_module(module: Module) -> tuple[Any, ...]:
    roles = sorted((role, ref.name) for role, ref in module.tensors.items())
    return (module.kind, module.scaling, module.rank, sorted(module.options.items()), roles)


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to be written: where its values start from, and what changes them."""

    name: str
    spec: TensorSpec
    base: TensorRef | None
    contributions: tuple[Contribution, ...] = ()

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are the base's, unchanged."""
        return not self.contributions and self.base is not None and self.base.spec == self.spec


def plan_steps(
    outputs: Mapping[str, Iterable[Output]],
    metadata: Mapping[str, Mapping[str, str]],
    device: str = "cpu",
    headers: Mapping[str, bytes] | None = None,
) -> tuple[tuple[OutputFile, ...], tuple[Step, ...]]:
    """Lay out the files and cut the work into steps.

    Args:
        outputs: by file name, in the order of their bytes. In a folder within the output, a tensor's name begins with
            the folder's, which its file does not repeat.
        metadata: by file name.
        device: where the products of factors are computed.
        headers: of files that are to be their base's, byte for byte: its first bytes.
    """
    files: list[OutputFile] = []
    steps: list[Step] = []
    for number, (name, tensors) in enumerate(outputs.items()):
        listed = list(tensors)
        folder = name[: name.rfind("/") + 1]
        stored = {t.name: t.name.removeprefix(folder) for t in listed}
        header, inner = layout(((stored[t.name], t.spec) for t in listed), metadata.get(name, {}))
        kept = (headers or {}).get(name)
        if kept is not None:
            inner = {one: offset + len(kept) - len(header) for one, offset in inner.items()}
            header = kept
        offsets = {whole: inner[short] for whole, short in stored.items()}
        size = len(header) + sum(t.spec.nbytes for t in listed)
        files.append(OutputFile(name, header, size))
        steps.extend(_steps(number, listed, offsets, device))
    return tuple(files), tuple(steps)


def _steps(file: int, outputs: list[Output], offsets: Mapping[str, int], device: str) -> Iterator[Step]:
    run: list[Output] = []
    for output in outputs:
        if output.is_copy and (not run or _adjoins(run[-1], output)):
            run.append(output)
            continue
        yield from _copies(file, run, offsets)
        run = [output] if output.is_copy else []
        if not output.is_copy:
            yield from _weight_steps(file, output, offsets[output.name], device)
    yield from _copies(file, run, offsets)


def _adjoins(before: Output, after: Output) -> bool:
    """Whether two tensors lie one behind the other in one file."""
    assert before.base is not None
    assert after.base is not None
    first, second = (ref.source.extent(ref.name) for ref in (before.base, after.base))
    if first is None or second is None:
        return False
    return first.path == second.path and first.offset + first.nbytes == second.offset


def _copies(file: int, run: list[Output], offsets: Mapping[str, int]) -> Iterator[CopyStep]:
    if not run:
        return
    total, source = sum(output.spec.nbytes for output in run), run[0].base
    assert source is not None
    names, start = tuple(output.name for output in run), offsets[run[0].name]
    for skip in range(0, total, COPY_BYTES):
        yield CopyStep(names, file, start + skip, source, skip, min(COPY_BYTES, total - skip))


def _weight_steps(file: int, output: Output, offset: int, device: str) -> Iterator[WeightStep]:
    if output.spec.count == 0:
        return
    _require_floats(output)
    for region, region_rows, columns, contributions in _regions(output):
        rowwise = all(
            term.module.rowwise(transposed=term.target.transposed) for c in contributions for term in c.terms
        )
        block = min(region_rows, _block_rows(columns)) if rowwise else region_rows
        height = (
            block * max(1, STEP_BYTES // output.spec.dtype.nbytes(columns * block))
            if rowwise
            else region_rows
        )
        peak = _peak_bytes(output, contributions, block, columns, rowwise=rowwise)
        for start in range(region, region + region_rows, height):
            stop = min(start + height, region + region_rows)
            yield WeightStep(
                output.name, file, offset, output.spec, output.base, contributions, columns,
                region, region_rows, start, stop, block, peak, device,
            )  # fmt: skip


def _block_rows(columns: int) -> int:
    """Rows that fit a block: a multiple of eight where there are so many, for the slivers of thin products."""
    rows = max(1, BLOCK_ELEMENTS // columns)
    return rows - rows % 8 if rows > 8 else rows


def _require_floats(output: Output) -> None:
    specs = [output.spec] if output.base is None else [output.spec, output.base.spec]
    for spec in specs:
        if not compatible(spec.dtype):
            raise Unsupported(f"{output.name}: {spec.dtype} values cannot be computed with")


def _regions(output: Output) -> Iterator[tuple[int, int, int, tuple[Contribution, ...]]]:
    """The matrices a tensor consists of, itself or one an expert: first row, rows, columns and what is added."""
    grouped = [(c, group_by_index(c.terms)) for c in output.contributions]
    indices = {index for _, groups in grouped for index in groups}
    if indices <= {None}:
        rows, columns = flat_shape(output.spec.shape)
        yield 0, rows, columns, output.contributions
        return
    if None in indices or any(c.replacement is not None or c.rows is not None for c in output.contributions):
        raise Unsupported(f"{output.name}: single experts and the whole tensor are changed at once")
    experts, height, columns = output.spec.shape
    for index in range(experts):
        mine = tuple(Contribution(c.weight, tuple(groups[index])) for c, groups in grouped if index in groups)
        yield index * height, height, columns, mine


def _accumulator(spec: TensorSpec, base: TensorRef | None, contributions: tuple[Contribution, ...]) -> Dtype:
    """See :attr:`WeightStep.accumulator`; float64 for a base in it too, which must not be rounded twice."""
    terms = [term for c in contributions for term in c.terms]
    wide = any(term.module.kind == "lora" and "embedding" in term.module.options for term in terms)
    if spec.dtype.name == "F16":  # which shows more of float32's rounding than bfloat16 does, and is rarer
        wide = wide or any("experts" in term.module.options or is_attention(term) for term in terms)
    wide = wide or (base is not None and base.spec.dtype.name == "F64")
    return dtype("F64") if wide else accumulator(spec.dtype)


def _peak_bytes(
    output: Output, contributions: tuple[Contribution, ...], block: int, columns: int, *, rowwise: bool
) -> int:
    """Buffers of one block, and the factors, which are held in float."""
    width = _accumulator(output.spec, output.base, contributions).bits // 8
    copies = 4 if all(c.is_sum for c in contributions) else 6
    factors = sum(
        ref.spec.count * width for c in contributions for t in c.terms for ref in t.module.tensors.values()
    )
    factors += sum(
        t.module.tensors[role].spec.count * size
        for c in contributions
        for t in c.terms
        for role, size in _INVERTED.items()
        if role in t.module.tensors
    )
    whole = 0 if rowwise else block * columns * 8 * 4  # decompositions work in float64
    return block * columns * width * copies + 2 * factors + whole + (1 << 20)


def describe(plan: Plan, jobs: int, *, apart: bool = False) -> dict[str, Any]:
    """The plan in numbers, for ``--dry-run``."""
    weights = {step.name for step in plan.steps if isinstance(step, WeightStep)}
    copied = sum(step.nbytes for step in plan.steps if isinstance(step, CopyStep))
    return {
        "files": [{"name": file.name, "bytes": file.size} for file in plan.files],
        "small_files": [small.name for small in plan.small],
        "tensors_computed": len(weights),
        "bytes_copied": copied,
        "bytes_written": plan.bytes_written,
        "peak_memory": plan.peak_bytes(jobs, apart=apart),
        "jobs": jobs,
    }
