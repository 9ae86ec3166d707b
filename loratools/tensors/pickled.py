"""``.bin`` and ``.pt`` files: pickles, which can run code when they are opened. Read only where the user asks for it.

Even then torch's restricted unpickler is used (``weights_only=True``), and storages of any device land on the CPU.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import CorruptFile, NotFound, Unsupported, quoted
from loratools.tensors.header import check_name
from loratools.tensors.memory import MemorySource, is_torch

if TYPE_CHECKING:
    import os

__all__ = ["SUFFIXES", "PickledFile"]

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class PickledFile(MemorySource):
    """A pickled state dict, in memory.

    Raises:
        NotFound: no such file.
        Unsupported: pickles were not allowed, or torch is not installed.
        CorruptFile: not a pickle of named tensors.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_pickle: bool = False) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise NotFound(f"{path}: no such file")
        if not self.path.is_file():
            raise CorruptFile(path, "not a regular file")
        if not allow_pickle:
            raise Unsupported(
                f"{path} is a pickle, which can run code when it is opened",
                hint="pass --allow-pickle (allow_pickle=True) if you trust where it comes from",
            )
        super().__init__(_unpickle(self.path))

    def identity(self) -> tuple[Any, ...]:
        """The file's path, size and time."""
        found = self.path.stat()
        return (str(self.path), found.st_size, found.st_mtime_ns)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (str(self.path),))


def _reopen(path: str) -> PickledFile:
    return PickledFile(path, allow_pickle=True)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise Unsupported(
            f"{path} is a torch pickle, and torch is not installed", hint="pip install 'loratools[torch]'"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the pickle made it meet
        first_line = str(error).strip().split("\n")[0]
        raise CorruptFile(path, f"not a readable pickle of tensors: {first_line}") from error
    if isinstance(state, list) and state and all(is_torch(value) for value in state):
        return {str(place): value for place, value in enumerate(state)}  # nameless, as old trainers wrote it
    if not isinstance(state, dict):
        raise CorruptFile(
            path,
            f"holds a {type(state).__name__}, not named tensors",
            hint="its keys are lost: save a state dict",
        )
    for name, value in state.items():
        if not isinstance(name, str):
            raise CorruptFile(path, f"not a plain state dict: the key {quoted(name)} is not a name")
        if not is_torch(value):
            raise CorruptFile(path, f"not a plain state dict: {quoted(name)} is a {type(value).__name__}")
        check_name(path, name)
    if not state:
        raise CorruptFile(path, "not a plain state dict: no tensors")
    return state
