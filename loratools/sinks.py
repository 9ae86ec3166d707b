"""Where a plan's bytes go: files that appear whole or not at all, or memory.

Files are written beside their destination under a name ending in ``.part``, counted against the layout,
synced, and renamed.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from loratools.errors import Incomplete, Unsupported, size
from loratools.journal import JOURNAL, Journal, Progress, read_journal
from loratools.planning import CopyStep
from loratools.provenance import made_by_loratools
from loratools.publishing import allocate, disk_errors, in_the_way, recover, remove, set_aside, swap
from loratools.tensors.files import File, copy_range, sync_folder
from loratools.tensors.header import parse_header
from loratools.tensors.memory import from_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loratools.dtypes import Array
    from loratools.planning import Plan, Step, WeightStep
    from loratools.tensors.base import TensorSpec

__all__ = ["FileSink", "FileWriter", "MemorySink"]


class FileSink:
    """Files on disk: a folder, or one file.

    Args:
        plan: what will be written.
        output: the folder or file it becomes.
        resume: go on from a part that an interrupted run of the same plan left.
        sync: wait for the disk before anything counts as written.
        replace: an output that exists may be replaced.
    """

    def __init__(
        self, plan: Plan, output: Path, *, resume: bool = False, sync: bool = True, replace: bool = False
    ) -> None:
        self.plan = plan
        self.output = output
        self.sync = sync
        self.replace = replace
        self.part = set_aside(output)[0]
        self.folder = plan.kind == "folder"
        self.files: list[File] = []
        self.done: set[int] = set()
        self._lock = threading.Lock()
        self._left = [file.size - len(file.header) for file in plan.files]
        self._synced: set[int] = set()
        self._sources: dict[str, File] = {}
        self._journal: Journal | None = None
        try:
            self._open(resume=resume)
        except BaseException:
            self.abandon(keep=bool(self.done) or self._journal is None)
            raise

    def _open(self, *, resume: bool) -> None:
        recover(self.output)
        if os.path.lexists(old := set_aside(self.output)[1]):
            raise in_the_way(old)
        if os.path.lexists(self.part):
            self._require_own_part()
            if resume:
                found = self._progress()
                self.done, self._synced = set(found.done), set(found.synced)
            else:
                self._remove_part()
        self._require_space()
        with disk_errors(self.part, kept=bool(self.done)):
            (self.part if self.folder else self.part.parent).mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self._journal_path(), self.plan, goes_on=bool(self.done))
            self.files = [self._create(number) for number in range(len(self.plan.files))]
        for index in self.done:
            step = self.plan.steps[index]
            self._left[step.file] -= step.nbytes
        self._uses = Counter(
            path
            for i, step in enumerate(self.plan.steps)
            if i not in self.done and (path := _copied_from(step))
        )

    def _require_own_part(self) -> None:
        """What lies under the part's name may be somebody's folder: only a journal or a record makes it ours."""
        real = self.part.is_dir() if self.folder else self.part.is_file()
        own = self._journal_path().is_file() or made_by_loratools(self.part)
        own = own or (real and self.folder and not any(self.part.iterdir()))
        if not real or self.part.is_symlink() or not own:
            raise in_the_way(self.part)

    def path(self, number: int) -> Path:
        """Where a file of the plan lies while it is written."""
        return self.part / self.plan.files[number].name if self.folder else self.part

    def _journal_path(self) -> Path:
        return self.part / JOURNAL if self.folder else self.part.with_name(self.part.name + JOURNAL)

    def _create(self, number: int) -> File:
        planned, path = self.plan.files[number], self.path(number)
        path.parent.mkdir(exist_ok=True)  # a pipeline's component
        if not self.done:
            path.unlink(missing_ok=True)
        flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(path, flags, 0o666)
        try:
            allocate(fd, planned.size)
        finally:
            os.close(fd)
        file = File(path, write=True)
        file.write(memoryview(planned.header), 0)
        file.close()  # until its first step: there may be more files than a process may have open
        return file

    def _require_space(self) -> None:
        parent = next(p for p in (self.part, *self.part.absolute().parents) if p.exists())
        if parent != self.part and not parent.is_dir():
            raise Incomplete(
                f"{self.output}: {parent} is a file, not a folder", hint="give the result a place in a folder"
            )
        needed = self.plan.bytes_written - sum(self.plan.steps[i].nbytes for i in self.done)
        free = shutil.disk_usage(parent).free
        if not self.done and needed > free:
            raise Incomplete(
                f"{self.output}: needs {size(needed)}, {size(free)} are free",
                hint="nothing was written",
            )

    def _progress(self) -> Progress:
        """What the part holds already; a part that is not whole, or of another plan, is removed."""
        found = read_journal(self._journal_path(), self.plan)
        whole = all(
            self.path(n).is_file() and self.path(n).stat().st_size == file.size
            for n, file in enumerate(self.plan.files)
        )
        if found.done and whole:
            return found
        self._remove_part()
        return Progress()

    def writer(self) -> FileWriter:
        """What other processes write with."""
        return FileWriter(self.part, tuple(file.path for file in self.files))

    def write(self, step: WeightStep, start: int, raw: Array) -> None:
        """Write some rows of a weight."""
        with disk_errors(self.part):
            _write_rows(self.files[step.file], step, start, raw)

    def copy(self, step: CopyStep) -> None:
        """Copy a run of bytes from the base."""
        with disk_errors(self.part):
            _copy_run(self.files[step.file], step, self._source)

    def _source(self, path: str) -> File:
        with self._lock:
            return self._sources.setdefault(path, File(path))

    def finish(self, index: int, step: Step) -> None:
        """Note that a step's bytes are written; start on the disk with them, and wait for it when the file is whole."""
        if self.sync:
            self.files[step.file].start_sync(*_written(step))
        with self._lock, disk_errors(self.part):
            self._left[step.file] -= step.nbytes
            whole = self._left[step.file] == 0
            self._note().step(index)
            self._release(_copied_from(step))
        if whole:
            self._complete(step.file)

    def _note(self) -> Journal:
        assert self._journal is not None
        return self._journal

    def _release(self, path: str | None) -> None:
        """Close a source once the last step that copies from it is done."""
        if path is not None:
            self._uses[path] -= 1
            if not self._uses[path] and path in self._sources:
                self._sources.pop(path).close()

    def _complete(self, number: int) -> None:
        """A file is whole: wait for the disk, say so in the journal."""
        if self.sync:
            with disk_errors(self.part):
                self.files[number].sync()
            with self._lock, disk_errors(self.part):
                self._synced.add(number)
                self._note().file(number)
        self.files[number].close()

    def publish(self) -> None:
        """Check that every byte came, write what lies beside the weights, and give the whole its name.

        Raises:
            Incomplete: a byte of the layout was never written, or the disk refused.
        """
        missing = [f.name for f, left in zip(self.plan.files, self._left, strict=True) if left]
        if missing:
            raise Incomplete(f"{missing[0]}: {sum(self._left):,} bytes of the layout were never written")
        for number in range(len(self.files)):
            if number not in self._synced:  # without a step, or finished by a run that did not get to sync it
                self._complete(number)
        self._close()
        with disk_errors(self.part):
            self._write_small()
            self._journal_path().unlink()
            if self.sync:
                for folder in dict.fromkeys(
                    self.path(number).absolute().parent for number in range(len(self.files))
                ):
                    sync_folder(folder)
                sync_folder(self.part if self.folder else self.part.absolute().parent)
            swap(self.part, self.output, replace=self.replace)
            if self.sync:
                sync_folder(self.output.absolute().parent)
            remove(set_aside(self.output)[1])

    def _write_small(self) -> None:
        """The record last: a part that has it needs no journal to be known as ours."""
        folders = set()
        for small in self.plan.small:
            path = self.part / small.name
            path.parent.mkdir(parents=True, exist_ok=True)
            folders.add(path.parent)
            path.unlink(missing_ok=True)
            with path.open("xb") as file:
                if small.source is not None:
                    with small.source.open("rb") as source:
                        shutil.copyfileobj(source, file)
                else:
                    file.write(small.read())
                if self.sync:
                    file.flush()
                    os.fsync(file.fileno())
        if self.sync:
            for folder in folders:
                sync_folder(folder)

    def abandon(self, *, keep: bool) -> None:
        """Stop early; keep the part for a later run, or remove it."""
        self._close()
        if not keep:
            self._remove_part()

    def _close(self) -> None:
        for file in (*self.files, *self._sources.values()):
            file.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _remove_part(self) -> None:
        remove(self.part)
        self._journal_path().unlink(missing_ok=True)


class FileWriter:
    """Writes into files that a :class:`FileSink` of another process has made, one step after another.

    It pickles as their paths, and holds one of them open at a time, and one to copy from: a checkpoint may have more
    shards than a process may have open files.

    Args:
        part: what the sink is writing, for messages.
        paths: of its files, in the plan's order.
    """

    def __init__(self, part: Path, paths: tuple[str, ...]) -> None:
        self.part = part
        self.paths = paths
        self._opened: dict[bool, File] = {}  # by whether it is written

    def __reduce__(self) -> tuple[Any, ...]:
        return (FileWriter, (self.part, self.paths))

    def write(self, step: WeightStep, start: int, raw: Array) -> None:
        """Write some rows of a weight."""
        with disk_errors(self.part):
            _write_rows(self._open(self.paths[step.file], write=True), step, start, raw)

    def copy(self, step: CopyStep) -> None:
        """Copy a run of bytes from the base."""
        with disk_errors(self.part):
            _copy_run(self._open(self.paths[step.file], write=True), step, self._open)

    def _open(self, path: str, *, write: bool = False) -> File:
        file = self._opened.get(write)
        if file is None or file.path != path:
            if file is not None:
                file.close()
            file = self._opened[write] = File(path, write=write)
        return file


def _write_rows(file: File, step: WeightStep, start: int, raw: Array) -> None:
    file.write(raw.data, step.offset + step.spec.dtype.nbytes(start * step.columns))


def _copy_run(file: File, step: CopyStep, source: Callable[[str], File]) -> None:
    extent = step.source.source.extent(step.source.name)
    if extent is None:
        raw = step.source.source.read_bytes(step.source.name)[step.skip : step.skip + step.nbytes]
        file.write(raw.data, step.offset)
    else:
        copy_range(source(extent.path), extent.offset + step.skip, file, step.offset, step.nbytes)


class MemorySink:
    """Tensors in memory, of the kind the base came in."""

    def __init__(self, plan: Plan, *, torch_out: bool) -> None:
        import numpy as np

        self.torch_out = torch_out
        self.done: set[int] = set()
        self.specs: dict[str, TensorSpec] = {}
        self.raw: dict[str, Array] = {}
        self._left = 0  # bytes still to come
        self._lock = threading.Lock()
        for file in plan.files:
            specs = parse_header("the result", file.header[8:], file.size).specs
            self.specs.update(specs)
            self.raw.update((name, np.empty(spec.nbytes, np.uint8)) for name, spec in specs.items())
            self._left += file.size - len(file.header)

    def writer(self) -> FileWriter:
        """Nothing another process writes would arrive here.

        Raises:
            Unsupported: always.
        """
        raise Unsupported(
            "executor 'processes' cannot make a result in memory: its workers share nothing but files",
            hint="use threads, or give the result a path",
        )

    def write(self, step: WeightStep, start: int, raw: Array) -> None:
        """Keep some rows of a weight."""
        offset = step.spec.dtype.nbytes(start * step.columns)
        self.raw[step.name][offset : offset + raw.size] = raw

    def copy(self, step: CopyStep) -> None:
        """Keep tensors as they are: a part of one, or a run of several."""
        position = -step.skip  # of the tensor's first byte, within what this step copies
        for name in step.names:
            size = self.specs[name].nbytes
            first, last = max(0, -position), min(size, step.nbytes - position)
            if first < last:
                self._fetch(step, self.raw[name][first:last], step.skip + position + first)
            position += size

    @staticmethod
    def _fetch(step: CopyStep, into: Array, offset: int) -> None:
        """Bytes from ``offset``, counted from the first byte of the first tensor a step speaks of."""
        source, name = step.source.source, step.source.name
        extent = source.extent(name)
        if extent is None:  # in memory, where a step speaks of one tensor
            into[...] = source.read_bytes(name)[offset : offset + into.size]
        else:
            File(extent.path).read_into(into.data, extent.offset + offset)

    def finish(self, index: int, step: Step) -> None:  # noqa: ARG002 - the sink's seam
        """Count the step's bytes."""
        with self._lock:
            self._left -= step.nbytes

    def publish(self) -> None:
        """Check that every byte came.

        Raises:
            Incomplete: one did not.
        """
        if self._left:
            raise Incomplete(f"{self._left:,} bytes of the layout were never written")

    def abandon(self, *, keep: bool) -> None:  # noqa: ARG002 - nothing outlives the call
        """Forget everything."""
        self.raw.clear()

    @property
    def tensors(self) -> dict[str, Any]:
        """The result: torch tensors where the base had them, else numpy arrays."""
        return {
            name: from_bytes(raw, self.specs[name], torch_out=self.torch_out)
            for name, raw in self.raw.items()
        }


def _written(step: Step) -> tuple[int, int]:
    """Where in its file a step writes, and how much."""
    if isinstance(step, CopyStep):
        return step.offset, step.nbytes
    return step.offset + step.spec.dtype.nbytes(step.start * step.columns), step.nbytes


def _copied_from(step: Step) -> str | None:
    """The file a step copies from, if it copies from one."""
    extent = step.source.source.extent(step.source.name) if isinstance(step, CopyStep) else None
    return None if extent is None else extent.path
