"""How an output appears: written beside its place, swapped in whole, and put right again where that was cut short.

Nothing that lies there under one of the working names is touched unless it is this program's own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from typing import TYPE_CHECKING

from loratools.errors import Incomplete, LoratoolsError, OutputExists
from loratools.provenance import made_by_loratools

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["allocate", "disk_errors", "in_the_way", "recover", "remove", "set_aside", "standing", "swap"]

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def set_aside(output: Path) -> tuple[Path, Path]:
    """The names beside an output: what is being written, and what is being replaced."""
    return output.with_name(output.name + ".part"), output.with_name(output.name + ".loratools-old")


def standing(output: Path) -> Path | None:
    """Where an existing output lies: under its name, or aside where a replacement was cut short; None if nowhere."""
    old = set_aside(output)[1]
    return next((path for path in (output, old) if os.path.lexists(path)), None)


def in_the_way(path: Path) -> OutputExists:
    """The error for something under one of these names that is not this program's."""
    return OutputExists(
        f"{path} is in the way, and loratools did not leave it there",
        hint="remove it by hand if it may go, or give the output another name",
    )


def recover(output: Path) -> None:
    """Finish or undo a replacement that was cut short between its two renames."""
    old = set_aside(output)[1]
    if not made_by_loratools(old):
        return
    if os.path.lexists(output):
        remove(old)
    else:
        old.rename(output)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def swap(part: Path, output: Path, *, replace: bool) -> None:
    """Put the new in the place of the old: old aside, new in, old away. Recovered by the next run if cut short.

    Raises:
        OutputExists: there is an old one, and it may not be replaced.
    """
    old = set_aside(output)[1]
    if os.path.lexists(output):
        if not replace:
            raise OutputExists(f"{output} has appeared meanwhile", hint=f"the result is in {part}")
        output.rename(old)
    try:
        part.rename(output)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(output):
            old.rename(output)
        raise


def allocate(fd: int, size: int) -> None:
    """Give a file its size, with the disk blocks set aside where the file system can."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno in _FULL:
                raise
    os.ftruncate(fd, size)


@contextlib.contextmanager
def disk_errors(part: Path, *, kept: bool = True) -> Iterator[None]:
    """What the disk refuses, said as one sentence; ``kept`` says whether the part stays for a later run."""
    try:
        yield
    except LoratoolsError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            problem, way_out = "the disk is full", "make room and run again"
        else:
            problem, way_out = error.strerror or str(error), "run again when this is mended"
        way_out = f"{way_out}, with --resume" if kept else way_out
        raise Incomplete(f"{part}: {problem}", hint=f"{way_out}; nothing was published") from error
