"""Positional reads, writes and kernel copies that survive short counts and platforms without them.

One system call moves less than 2 GiB, and any of them may move less than asked; every function here loops. Where
the platform has no positional I/O (Windows), each thread seeks on a descriptor of its own.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from typing import TYPE_CHECKING

from loratools.errors import CorruptFile, InputError, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["File", "copy_range", "read_whole", "sync_folder"]

_CHUNK = 1 << 30
_BUFFER = 1 << 20
_POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwritev")
_copy_file_range: Callable[[int, int, int, int, int], int] | None = getattr(os, "copy_file_range", None)
# The kernel's answers that mean "not between these two", after which bytes go through a buffer.
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


class File:
    """A regular file read and written at offsets, from any thread. Pickles as its path."""

    def __init__(self, path: str | os.PathLike[str], *, write: bool = False) -> None:
        self._opened: list[int] = []
        self.path = os.fspath(path)
        self.write_mode = write
        self._shared: int | None = None
        self._local = threading.local()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Callable[..., File], tuple[str, bool]]:
        return (_reopen, (self.path, self.write_mode))

    def __del__(self) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """A descriptor this thread may use: one for all where reads take an offset, else one per thread."""
        if _POSITIONAL:
            if self._shared is None:
                with self._lock:
                    if self._shared is None:
                        self._shared = self._open()
            return self._shared
        if not hasattr(self._local, "fd"):
            with self._lock:
                self._local.fd = self._open()
        return int(self._local.fd)

    def _open(self) -> int:
        flags = (os.O_RDWR if self.write_mode else os.O_RDONLY) | getattr(os, "O_BINARY", 0)
        try:
            fd = os.open(self.path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise _not_opened(self.path, error) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CorruptFile(self.path, "not a regular file")
        self._opened.append(fd)
        return fd

    def close(self) -> None:
        """Close every descriptor; the next use opens anew."""
        opened, self._opened = self._opened, []
        self._shared, self._local = None, threading.local()
        for fd in opened:
            os.close(fd)

    def size(self) -> int:
        """Bytes in the file now."""
        return os.fstat(self.fd).st_size

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` (bytes) from ``offset``.

        Raises:
            CorruptFile: the file ends first.
        """
        fd, done = self.fd, 0
        while done < len(view):
            part = view[done : done + _CHUNK]
            got = os.preadv(fd, [part], offset + done) if _POSITIONAL else _seek_read(fd, part, offset + done)
            if got == 0:
                raise CorruptFile(self.path, f"ends at byte {offset + done}; more was expected")
            done += got

    def read(self, count: int, offset: int) -> bytes:
        """``count`` bytes from ``offset``."""
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of ``view`` (bytes) at ``offset``."""
        fd, done = self.fd, 0
        while done < len(view):
            part = view[done : done + _CHUNK]
            moved = (
                os.pwritev(fd, [part], offset + done) if _POSITIONAL else _seek_write(fd, part, offset + done)
            )
            if moved <= 0:  # no error and no progress: a loop would never end
                raise OSError(errno.EIO, "a write moved no bytes", self.path)
            done += moved

    def start_sync(self, offset: int, count: int) -> None:
        """Ask for a range to be written to the disk soon, without waiting; a no-op where there is no way to ask.

        "Don't need" makes Linux start writing what is dirty and drop only what is clean already.
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, count, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Wait until the file's bytes are on the disk."""
        getattr(os, "fdatasync", os.fsync)(self.fd)


def _reopen(path: str, write: bool) -> File:
    return File(path, write=write)


def _not_opened(path: str, error: OSError) -> Exception:
    """Why a file could not be opened, as one of this package's errors where it says something of the input."""
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{path}: no such file")
    if isinstance(error, IsADirectoryError):
        return CorruptFile(path, "not a regular file")
    if error.errno in {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}:
        return InputError(f"{path}: cannot be opened ({os.strerror(error.errno)})")
    return error


def read_whole(path: str | os.PathLike[str], limit: int) -> bytes:
    """All of a small file; never a pipe or a device, which could block or have no end.

    Raises:
        NotFound: no such file.
        CorruptFile: not a regular file, or more than ``limit`` bytes.
    """
    file = File(path)
    try:
        size = file.size()
        if size > limit:
            raise CorruptFile(file.path, f"{size:,} bytes; {limit:,} are allowed")
        return file.read(size, 0)
    finally:
        file.close()


def _seek_read(fd: int, view: memoryview, offset: int) -> int:
    os.lseek(fd, offset, os.SEEK_SET)
    data = os.read(fd, min(len(view), _BUFFER))
    view[: len(data)] = data
    return len(data)


def _seek_write(fd: int, view: memoryview, offset: int) -> int:
    os.lseek(fd, offset, os.SEEK_SET)
    return os.write(fd, view)


def copy_range(source: File, source_offset: int, target: File, target_offset: int, count: int) -> None:
    """Copy bytes between files, in the kernel where it can, through a small buffer where it cannot."""
    done = _kernel_copy(source, source_offset, target, target_offset, count)
    if done == count:
        return
    buffer = memoryview(bytearray(min(count - done, _BUFFER)))
    while done < count:
        part = buffer[: min(len(buffer), count - done)]
        source.read_into(part, source_offset + done)
        target.write(part, target_offset + done)
        done += len(part)


def _kernel_copy(source: File, source_offset: int, target: File, target_offset: int, count: int) -> int:
    """Bytes the kernel copied before it declined; less than ``count`` is no error."""
    done = 0
    while _copy_file_range is not None and done < count:
        try:
            moved = _copy_file_range(
                source.fd, target.fd, min(count - done, _CHUNK), source_offset + done, target_offset + done
            )
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                break
            raise
        if moved == 0:  # the end, or a file system that answers 0 for "cannot": reading will tell
            break
        done += moved
    return done


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
