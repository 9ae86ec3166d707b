"""Where a plan's bytes go: files that appear whole or not at all, or memory.

Files are written beside their destination under a name ending in ``.part``, counted against the layout, synced, and
renamed. A journal in the part says which steps are done, so that an interrupted run can go on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools.errors import Incomplete, OutputExists
from loratools.planning import CopyStep
from loratools.tensors.files import File, copy_range, sync_folder
from loratools.tensors.memory import from_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratools.dtypes import Array
    from loratools.planning import Plan, Step, WeightStep

__all__ = ["FileSink", "MemorySink", "recover"]

JOURNAL = ".loratools-journal"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


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
        self.part = output.with_name(output.name + ".part")
        self.folder = plan.kind == "folder"
        self.files: list[File] = []
        self.done: set[int] = set()
        self._lock = threading.Lock()
        self._left = [file.size - len(file.header) for file in plan.files]
        self._sources: dict[str, File] = {}
        self._journal: int | None = None
        self._open(resume=resume)

    def _open(self, *, resume: bool) -> None:
        recover(self.output)
        if resume and self.part.exists():
            self.done = self._read_journal()
        elif self.part.exists():
            self._remove_part()
        self._require_space()
        with _disk_errors(self.part):
            if self.folder:
                self.part.mkdir(parents=True, exist_ok=True)
            self.files = [self._create(number) for number in range(len(self.plan.files))]
            self._start_journal()
        for index in self.done:
            step = self.plan.steps[index]
            self._left[step.file] -= step.nbytes

    def path(self, number: int) -> Path:
        """Where a file of the plan lies while it is written."""
        return self.part / self.plan.files[number].name if self.folder else self.part

    def _journal_path(self) -> Path:
        return self.part / JOURNAL if self.folder else self.part.with_name(self.part.name + JOURNAL)

    def _create(self, number: int) -> File:
        planned, path = self.plan.files[number], self.path(number)
        if not self.done:
            path.unlink(missing_ok=True)
        flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(path, flags, 0o666)
        try:
            _allocate(fd, planned.size)
        finally:
            os.close(fd)
        file = File(path, write=True)
        file.write(memoryview(planned.header), 0)
        return file

    def _require_space(self) -> None:
        parent = next(p for p in (self.part, *self.part.absolute().parents) if p.exists())
        needed = self.plan.bytes_written - sum(self.plan.steps[i].nbytes for i in self.done)
        free = shutil.disk_usage(parent).free
        if not self.done and needed > free:
            raise Incomplete(
                f"{self.output}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                hint="nothing was written",
            )

    # The journal: a line that identifies the run, then the number of every step whose bytes have been written. What is
    # not synced yet survives the process but not the machine, so those lines count only until the next boot.

    def _start_journal(self) -> None:
        flags = os.O_CREAT | os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._journal = os.open(self._journal_path(), flags, 0o666)
        if not self.done:
            os.ftruncate(self._journal, 0)
            head = {"plan": self.plan.digest(), "boot": _boot()}
            os.write(self._journal, json.dumps(head).encode() + b"\n")

    def _read_journal(self) -> set[int]:
        try:
            head, *lines = self._journal_path().read_text().splitlines()
            started = json.loads(head)
        except (OSError, ValueError):
            return self._start_over()
        if started.get("plan") != self.plan.digest():
            return self._start_over()
        same_boot = bool(started.get("boot")) and started["boot"] == _boot()
        done: set[int] = set()
        for line in lines:
            word, _, number = line.partition(" ")
            if word == "step" and same_boot and number.isdigit():
                done.add(int(number))
            elif word == "file" and number.isdigit():
                done |= {i for i, step in enumerate(self.plan.steps) if step.file == int(number)}
        return {i for i in done if i < len(self.plan.steps)} if self._parts_whole() else self._start_over()

    def _parts_whole(self) -> bool:
        return all(
            self.path(n).is_file() and self.path(n).stat().st_size == file.size
            for n, file in enumerate(self.plan.files)
        )

    def _start_over(self) -> set[int]:
        self._remove_part()
        return set()

    def _note(self, line: str) -> None:
        assert self._journal is not None
        os.write(self._journal, line.encode() + b"\n")

    def write(self, step: WeightStep, start: int, raw: Array) -> None:
        """Write some rows of a weight."""
        offset = step.offset + step.spec.dtype.nbytes(start * step.columns)
        with _disk_errors(self.part):
            self.files[step.file].write(memoryview(raw), offset)

    def copy(self, step: CopyStep) -> None:
        """Copy a run of bytes from the base."""
        extent = step.source.source.extent(step.source.name)
        with _disk_errors(self.part):
            if extent is None:
                raw = step.source.source.read_bytes(step.source.name)[step.skip : step.skip + step.nbytes]
                self.files[step.file].write(memoryview(raw), step.offset)
                return
            with self._lock:
                source = self._sources.setdefault(extent.path, File(extent.path))
            copy_range(source, extent.offset + step.skip, self.files[step.file], step.offset, step.nbytes)

    def finish(self, index: int, step: Step) -> None:
        """Note that a step's bytes are written; wait for the disk when its file is whole."""
        with self._lock:
            self._left[step.file] -= step.nbytes
            whole = self._left[step.file] == 0
            self._note(f"step {index}")
        if whole and self.sync:
            with _disk_errors(self.part):
                self.files[step.file].sync()
            with self._lock:
                self._note(f"file {step.file}")

    def publish(self) -> None:
        """Check that every byte came, write what lies beside the weights, and give the whole its name.

        Raises:
            Incomplete: a byte of the layout was never written, or the disk refused.
        """
        missing = [f.name for f, left in zip(self.plan.files, self._left, strict=True) if left]
        if missing:
            raise Incomplete(f"{missing[0]}: {sum(self._left):,} bytes of the layout were never written")
        for file in (*self.files, *self._sources.values()):
            file.close()
        self._close_journal()
        with _disk_errors(self.part):
            self._write_small()
            self._journal_path().unlink()
            if self.sync:
                sync_folder(self.part if self.folder else self.part.absolute().parent)
            self._swap()

    def _write_small(self) -> None:
        for small in self.plan.small:
            path = self.part / small.name
            path.parent.mkdir(parents=True, exist_ok=True)
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

    def _swap(self) -> None:
        """Put the new in the place of the old: old aside, new in, old away. Recovered by the next run if cut short."""
        old = _old(self.output)
        if self.output.exists() or self.output.is_symlink():
            if not self.replace:
                raise OutputExists(
                    f"{self.output} has appeared meanwhile", hint=f"the result is in {self.part}"
                )
            self.output.rename(old)
        self.part.rename(self.output)
        if self.sync:
            sync_folder(self.output.absolute().parent)
        if old.exists():
            _remove(old)

    def abandon(self, *, keep: bool) -> None:
        """Stop early; keep the part for a later run, or remove it."""
        for file in (*self.files, *self._sources.values()):
            file.close()
        self._close_journal()
        if not keep:
            self._remove_part()

    def _close_journal(self) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def _remove_part(self) -> None:
        _remove(self.part)
        self._journal_path().unlink(missing_ok=True)


class MemorySink:
    """Tensors in memory, of the kind the base came in."""

    def __init__(self, plan: Plan, *, torch_out: bool) -> None:
        self.plan = plan
        self.torch_out = torch_out
        self.done: set[int] = set()
        self.raw: dict[str, Array] = {}
        self.specs: dict[str, Any] = {}

    def _buffer(self, name: str, spec: Any) -> Array:
        self.specs[name] = spec
        return self.raw.setdefault(name, np.zeros(spec.nbytes, np.uint8))

    def write(self, step: WeightStep, start: int, raw: Array) -> None:
        """Keep some rows of a weight."""
        offset = step.spec.dtype.nbytes(start * step.columns)
        self._buffer(step.name, step.spec)[offset : offset + raw.size] = raw

    def copy(self, step: CopyStep) -> None:
        """Keep a tensor as it is."""
        (name,) = step.names
        part = slice(step.skip, step.skip + step.nbytes)
        self._buffer(name, step.source.spec)[part] = step.source.source.read_bytes(step.source.name)[part]

    def finish(self, index: int, step: Step) -> None:
        """Nothing to note."""

    def publish(self) -> None:
        """Nothing to do: see :attr:`tensors`."""

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


def recover(output: Path) -> None:
    """Finish or undo a replacement that was cut short between its two renames."""
    old = _old(output)
    if not old.exists():
        return
    if output.exists():
        _remove(old)
    else:
        old.rename(output)


def _old(output: Path) -> Path:
    return output.with_name(output.name + ".old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _allocate(fd: int, size: int) -> None:
    """Give a file its size, with the disk blocks set aside where the file system can."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno in _FULL:
                raise
    os.ftruncate(fd, size)


def _boot() -> str:
    """Which boot of the machine this is; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@contextlib.contextmanager
def _disk_errors(part: Path) -> Iterator[None]:
    """A full disk, said as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise Incomplete(
            f"{part}: the disk is full", hint="make room and run again with --resume; nothing was published"
        ) from error
