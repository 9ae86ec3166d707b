"""How an output appears: written beside its place, swapped in whole, and put right again where that was cut short.

Nothing that lies there under one of the working names is touched unless it is this program's own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import Incomplete, LoratoolsError, OutputExists
from loratools.provenance import made_by_loratools

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "allocate",
    "disk_errors",
    "in_the_way",
    "recover",
    "remove",
    "require_place",
    "set_aside",
    "standing",
    "swap",
]

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def set_aside(output: Path) -> tuple[Path, Path]:
    """The names beside an output: what is being written, and what is being replaced."""
    return output.with_name(output.name + ".part"), output.with_name(output.name + ".loratools-old")


def standing(output: Path) -> Path | None:
    """Where an existing output lies: under its name, or aside where a replacement was cut short; None if nowhere."""
    old = set_aside(output)[1]
    return next((path for path in (output, old) if os.path.lexists(path)), None)


def require_place(output: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse an output that would touch an input, or something loratools did not make.

    Args:
        output: the folder or file to be made.
        inputs: what is read for it.
        force: an output that loratools made may be replaced.

    Raises:
        OutputExists: the path, and what is in its way.
    """
    if output.name in {"", ".."}:  # the current folder, its parent or a root, however it was spelled
        raise OutputExists(f"{output} exists", hint="give the result a name of its own")
    for path in inputs:
        if any(_overlap(one, path) for one in (output, *set_aside(output))):
            raise OutputExists(
                f"the output {output} and the input {path} overlap",
                hint="give the result a place of its own",
            )
    found = standing(output)
    if found is None:
        return
    if not force and found != output:
        raise OutputExists(
            f"{output} was being replaced when a run was cut short, and its old state is in {found}",
            hint="--force goes on and replaces it; renaming it back keeps it",
        )
    if not force:
        raise OutputExists(f"{output} exists", hint="--force replaces it, if loratools made it")
    if not made_by_loratools(found):
        raise OutputExists(
            f"{output} exists and was not made by loratools", hint="remove it by hand if it may go"
        )


def _overlap(output: Path, given: Path) -> bool:
    """Whether one of two paths is the other or lies in it, as they are spelled or where their links lead."""
    if output.exists() and given.exists() and output.samefile(given):
        return True
    outputs, inputs = ({Path(os.path.abspath(p)), p.resolve()} for p in (output, given))  # noqa: PTH100
    return any(o == i or o in i.parents or i in o.parents for o in outputs for i in inputs)


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
