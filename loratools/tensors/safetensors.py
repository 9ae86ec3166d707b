"""Safetensors on disk: one file, or a folder of shards with an index, as one source of tensors."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.dtypes import accumulator, widen
from loratools.errors import CorruptFile, NotFound
from loratools.tensors.base import Extent, TensorSpec
from loratools.tensors.files import File
from loratools.tensors.header import Header, parse_header, read_length

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.dtypes import Array

__all__ = ["SafetensorsFile", "ShardedCheckpoint", "read_index"]

MAX_INDEX = 64_000_000  # bytes
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_scratch = threading.local()


def _scratch_bytes(count: int) -> Array:
    """A buffer of this thread, reused: a fresh allocation costs ten times what the conversion does."""
    import numpy as np

    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.size < count:
        buffer = np.empty(count, np.uint8)
        if count <= 1 << 22:
            _scratch.buffer = buffer
    return buffer[:count]


class SafetensorsFile:
    """One safetensors file.

    Raises:
        NotFound: no such file.
        CorruptFile: its header breaks a rule (see :mod:`loratools.tensors.header`).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.file = File(path)
        self.header = self._read_header()
        self.specs: Mapping[str, TensorSpec] = self.header.specs
        self.metadata: Mapping[str, str] = self.header.metadata

    def _read_header(self) -> Header:
        size = self.file.size()
        start = self.file.read(min(size, 1024), 0)
        length = read_length(self.path, start, size)
        return parse_header(self.path, self.file.read(length, 8), size)

    def read(self, name: str, start: int = 0, stop: int | None = None, *, out: Array | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        import numpy as np

        spec = self.specs[name]
        offset, count = self._range(name, start, stop)
        if out is not None and spec.dtype == accumulator(spec.dtype):
            self.file.read_into(memoryview(out).cast("B"), offset)
            return out
        if out is not None:
            raw = _scratch_bytes(count)
        else:
            raw = np.empty(count, np.uint8)
        self.file.read_into(memoryview(raw), offset)
        values = widen(raw, spec.dtype, None if out is None else out.reshape(-1))
        return values if out is None else out

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        import numpy as np

        offset, count = self._range(name, start, stop)
        raw = np.empty(count, np.uint8)
        self.file.read_into(memoryview(raw), offset)
        return raw

    def _range(self, name: str, start: int, stop: int | None) -> tuple[int, int]:
        """Offset and length, in bytes, of some elements."""
        spec = self.specs[name]
        stop = spec.count if stop is None else stop
        return self.header.offsets[name] + spec.dtype.nbytes(start), spec.dtype.nbytes(stop - start)

    def extent(self, name: str) -> Extent:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        return Extent(self.path, self.header.offsets[name], self.specs[name].nbytes)

    def identity(self) -> tuple[Any, ...]:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        found = Path(self.path).stat()
        return (self.path, found.st_size, found.st_mtime_ns)


class ShardedCheckpoint:
    """A folder of shards named by ``*.safetensors.index.json``, read as one.

    Args:
        folder: where the shards lie. Symbolic links (a Hub cache) are followed for reading.
        weight_map: tensor name to shard file name.
        metadata: what the index says besides.
    """

    def __init__(self, folder: Path, weight_map: Mapping[str, str], index_path: Path) -> None:
        self.folder = folder
        self.shards: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(weight_map.values())):
            try:
                self.shards[shard] = SafetensorsFile(folder / shard)
            except NotFound as error:
                raise NotFound(
                    f"{index_path.name} names {shard}, which is missing from {folder}",
                    hint="the download is incomplete",
                ) from error
        self.shard_of = dict(weight_map)
        self.specs: Mapping[str, TensorSpec] = self._collect(index_path)
        self.metadata: Mapping[str, str] = next((s.metadata for s in self.shards.values() if s.metadata), {})

    def _collect(self, index_path: Path) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for shard, file in self.shards.items():
            for name, spec in file.specs.items():
                if self.shard_of.get(name) != shard:
                    where = self.shard_of.get(name, "nowhere")
                    raise CorruptFile(index_path, f"{name} lies in {shard}, the index says {where}")
                specs[name] = spec
        missing = [name for name in self.shard_of if name not in specs]
        if missing:
            raise CorruptFile(index_path, f"names {missing[0]}, which no shard holds ({len(missing)} such)")
        return specs

    def read(self, name: str, start: int = 0, stop: int | None = None, *, out: Array | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        return self.shards[self.shard_of[name]].read(name, start, stop, out=out)

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        return self.shards[self.shard_of[name]].read_bytes(name, start, stop)

    def extent(self, name: str) -> Extent:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        return self.shards[self.shard_of[name]].extent(name)

    def identity(self) -> tuple[Any, ...]:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        return tuple(file.identity() for file in self.shards.values())


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index, with every shard name checked: a plain name in the same folder, nothing else.

    An index decides which paths are read and, for a merge, which are written; one that is absolute or climbs
    would reach outside the folder.

    Raises:
        CorruptFile: not JSON, no ``weight_map``, or a shard name that is not a plain ``*.safetensors`` name.
    """
    if path.stat().st_size > MAX_INDEX:
        raise CorruptFile(path, f"index of {path.stat().st_size:,} bytes; {MAX_INDEX:,} are allowed")
    try:
        index = json.loads(path.read_bytes())
        weight_map = index["weight_map"]
        pairs = list(weight_map.items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(path, "is not an index: no readable weight_map") from error
    for name, shard in pairs:
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CorruptFile(path, f"{name}: shard name {shard!r} is not a plain file name")
    if not pairs:
        raise CorruptFile(path, "weight_map is empty")
    return dict(pairs)
