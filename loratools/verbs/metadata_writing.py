"""A file with another header: in place where one sector changes, else a copy made by the kernel and renamed.

A header that is half old and half new makes a file that nothing opens, so it must not exist for a moment, whatever is
killed or loses power. What a disk writes whole is a sector, and what a kernel copies whole is a page. Therefore:

- if all bytes that change lie in one sector of 512 bytes, they are written in place by one call, and nothing else is;
- everything else is written beside the file, synced, and renamed over it. The data are copied inside the kernel; file
  systems that can share blocks (Btrfs, XFS, ReFS, APFS) share them, which takes no time and no room.

A file that has other names (hard links) is never written in place: what these names hold is not ours to change.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import Incomplete, InputError
from loratools.metadata.surgery import BLOCK, fitted, header_length, packed
from loratools.publishing import disk_errors, in_the_way
from loratools.tensors.files import File, copy_range, sync_folder
from loratools.tensors.header import MAX_HEADER, parse_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loratools.tensors.safetensors import SafetensorsFile

__all__ = ["Rewrite", "plan_rewrite", "require_editable", "rewrite_in_place", "write_copy"]

SECTOR = 512  # bytes; no disk writes less, or half of one


@dataclass(frozen=True, slots=True)
class Rewrite:
    """How a file gets other metadata.

    Attributes:
        old: the eight bytes and the header as they are.
        head: the eight bytes and the header as they will be.
        start: of the bytes that differ, where they can be written in place; from the start of the file.
        stop: one past the last of them.
        in_place: whether they can.
        size: of the file then, in bytes.
    """

    old: bytes
    head: bytes
    start: int
    stop: int
    in_place: bool
    size: int


def plan_rewrite(file: SafetensorsFile, metadata: Mapping[str, str], *, copy: bool = False) -> Rewrite:
    """Lay out a file with other metadata. Nothing is written.

    Args:
        file: as it is.
        metadata: what its header shall say.
        copy: a copy is made anyway.

    Raises:
        InputError: the header would be larger than this build reads.
    """
    old = _read_head(file)
    text = old[8:].decode()
    links = 2 if copy else Path(file.path).stat().st_nlink
    if links == 1:
        for way in fitted(text, metadata):
            start, stop = _difference(old, new := old[:8] + way.encode())
            if stop - start <= SECTOR and start // SECTOR == (stop - 1) // SECTOR:
                return _checked(
                    file, Rewrite(old, new, start, stop, in_place=True, size=file.header.size), metadata
                )
    least = packed(text, metadata).encode()
    length = header_length(len(least), len(old) - 8, file.header.size - len(old))
    if length > MAX_HEADER:
        raise InputError(
            f"{file.path}: the header would take {length:,} bytes, and {MAX_HEADER:,} are allowed",
            hint="safetensors itself stops at 100 MB; large values such as thumbnails can go with --unset",
        )
    head = length.to_bytes(8, "little") + least.ljust(length)
    size = len(head) + file.header.size - file.header.data_start
    return _checked(file, Rewrite(old, head, 0, 0, in_place=False, size=size), metadata)


def _checked(file: SafetensorsFile, plan: Rewrite, metadata: Mapping[str, str]) -> Rewrite:
    """What would be written is read as any file is: a header that this package would refuse never reaches a disk."""
    new = parse_header(file.path, plan.head[8:], plan.size)
    shift = new.data_start - file.header.data_start
    moved = {name: offset + shift for name, offset in file.header.offsets.items()}
    assert (new.specs, new.offsets, new.metadata) == (file.header.specs, moved, metadata)
    return plan


def _read_head(file: SafetensorsFile) -> bytes:
    with _closed(file):
        return file.file.read(file.header.data_start, 0)


@contextlib.contextmanager
def _closed(file: SafetensorsFile) -> Iterator[None]:
    try:
        yield
    finally:
        file.file.close()


def _difference(old: bytes, new: bytes) -> tuple[int, int]:
    """First byte in which two texts of one length differ, and one past the last."""
    if old == new:
        return 0, 1
    return _agree(old, new), len(old) - _agree(old[::-1], new[::-1])


def _agree(one: bytes, other: bytes) -> int:
    """How many bytes two texts have in common at their beginning."""
    low, high = 0, len(one)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def require_editable(path: Path) -> None:
    """Refuse to change a file under a name that leads elsewhere, or that says it must not be changed.

    Raises:
        InputError: it is a symbolic link, or read-only.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise InputError(
            f"{path} is a symbolic link, and an edit would change the file it leads to",
            hint=f"-o OUT writes a copy; or name the file itself: {path.resolve()}",
        )
    if not found.st_mode & 0o222 or not os.access(path, os.W_OK):
        raise InputError(f"{path} is read-only", hint="-o OUT writes a copy; or make it writable")


def rewrite_in_place(file: SafetensorsFile, plan: Rewrite, *, sync: bool = True) -> int:
    """Give a file another header.

    Args:
        file: as it was when the plan was made.
        plan: what to do.
        sync: wait for the disk.

    Returns:
        Bytes written.

    Raises:
        InputError: see :func:`require_editable`.
        Incomplete: the disk refused, or the file has changed meanwhile; it is as it was.
    """
    path = Path(file.path)
    require_editable(path)
    before = _identity(path)
    with disk_errors(path, kept=False):
        if plan.in_place:
            return _write_sector(path, plan, before, sync=sync)
        with _part(path) as part:
            written = _write_part(file, plan, part, sync=sync)
            shutil.copymode(path, part)
            _keep_owner(path, part)
            if _identity(path) != before:
                raise _changed(path)
            part.replace(path)
        if sync:
            sync_folder(path.absolute().parent)
        return written


def _write_sector(path: Path, plan: Rewrite, before: tuple[int, ...], *, sync: bool) -> int:
    target = File(path, write=True)
    try:
        found = os.fstat(target.fd)
        if target.read(len(plan.old), 0) != plan.old:
            raise _changed(path)
        if (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) != before or found.st_nlink != 1:
            raise _changed(path)
        new = plan.head[plan.start : plan.stop]
        target.write(memoryview(new), plan.start)
        if sync:
            target.sync()
        return len(new)
    finally:
        target.close()


def write_copy(file: SafetensorsFile, plan: Rewrite, output: Path, *, force: bool, sync: bool = True) -> int:
    """Write a copy with another header; it appears whole or not at all.

    Returns:
        Bytes written.

    Raises:
        OutputExists: something has appeared under the name meanwhile, and ``force`` is not given.
        Incomplete: the disk refused; there is no copy.
    """
    with disk_errors(output, kept=False):
        output.parent.mkdir(parents=True, exist_ok=True)
        with _part(output) as part:
            written = _write_part(file, plan, part, sync=sync)
            if not force and os.path.lexists(output):
                raise in_the_way(output)
            part.replace(output)
        if sync:
            sync_folder(output.absolute().parent)
    return written


def _identity(path: Path) -> tuple[int, ...]:
    found = path.lstat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _changed(path: Path) -> Incomplete:
    return Incomplete(f"{path} has changed meanwhile", hint="run again; nothing was written")


def _write_part(file: SafetensorsFile, plan: Rewrite, part: Path, *, sync: bool) -> int:
    source, target = File(file.path), File(part, write=True)
    begin, place = file.header.data_start, len(plan.head)
    count = file.header.size - begin
    try:
        if source.read(begin, 0) != plan.old or source.size() != file.header.size:
            raise _changed(Path(file.path))
        target.write(memoryview(plan.head), 0)
        # From the first whole block on, the file system can share the data, if they lie alike in both files.
        lead = min(-begin % BLOCK, count) if (begin - place) % BLOCK == 0 else 0
        copy_range(source, begin, target, place, lead)
        copy_range(source, begin + lead, target, place + lead, count - lead)
        if target.size() != plan.size:
            raise Incomplete(f"{part}: {target.size():,} bytes were written, {plan.size:,} were to be")
        if sync:
            target.sync()
        return plan.size
    finally:
        source.close()
        target.close()


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A new, empty file beside a path, ours alone; gone at the end unless it was renamed.

    One that a killed run left under the name is emptied and used again, unless that run is alive.
    """
    part = path.with_name(f".{path.name}.loratools-part")
    fd = _claim(part)
    try:
        os.ftruncate(fd, 0)
        if os.name == "nt":  # an open file cannot be renamed there
            os.close(fd)
            fd = -1
        yield part
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        if fd >= 0:
            os.close(fd)


def _claim(part: Path) -> int:
    """Make a file, or take over one that a dead run left; a descriptor whose lock lasts as long as it is open.

    Raises:
        OutputExists: something is there that cannot be known for a dead run's.
        Incomplete: another process is writing it.
    """
    flags = (
        os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        fd, made = os.open(part, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        if part.is_symlink() or not part.is_file():
            raise in_the_way(part) from None
        fd, made = os.open(part, flags), False
    try:
        if not _lock(fd) and not made:
            raise in_the_way(part)
        if not part.exists() or part.stat().st_ino != os.fstat(fd).st_ino:  # renamed a moment ago
            raise BlockingIOError
    except BaseException as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            hint = "run again when it is done"
            raise Incomplete(f"{part}: another process is writing it", hint=hint) from error
        raise
    return fd


def _lock(fd: int) -> bool:
    """Lock a file; False where there is no way to.

    Raises:
        BlockingIOError: another process has locked it.
    """
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return False
    return True


def _keep_owner(path: Path, part: Path) -> None:
    """Give a part the owner of the file it replaces, where that is allowed."""
    if hasattr(os, "chown"):
        found = path.stat()
        with contextlib.suppress(OSError):
            os.chown(part, found.st_uid, found.st_gid)
