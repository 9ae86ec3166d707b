"""Safetensors on disk: one file, or a folder of shards with an index, as one source of tensors."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.dtypes import accumulator, widen
from loratools.errors import CorruptFile, NotFound, quoted
from loratools.tensors.base import Extent, span
from loratools.tensors.files import File, read_whole
from loratools.tensors.header import check_name, parse_header, read_json, read_length

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.dtypes import Array
    from loratools.tensors.base import TensorSpec
    from loratools.tensors.header import Header

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
        try:
            self.header = self._read_header()
        finally:
            self.file.close()  # a checkpoint may have more shards than a process may have open files
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
        if out is not None and not out.flags.c_contiguous:
            raise ValueError(f"{name}: out must be contiguous")
        if out is not None and spec.dtype == accumulator(spec.dtype):
            self.file.read_into(out.reshape(-1).view(np.uint8).data, offset)
            return out
        raw = np.empty(count, np.uint8) if out is None else _scratch_bytes(count)
        self.file.read_into(raw.data, offset)
        values = widen(raw, spec.dtype, None if out is None else out.reshape(-1))
        return values if out is None else out

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        import numpy as np

        offset, count = self._range(name, start, stop)
        raw = np.empty(count, np.uint8)
        self.file.read_into(raw.data, offset)
        return raw

    def _range(self, name: str, start: int, stop: int | None) -> tuple[int, int]:
        """Offset in the file and length, in bytes, of some elements."""
        offset, count = span(self.specs[name], start, stop)
        return self.header.offsets[name] + offset, count

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
    index = read_json(path, read_whole(path, MAX_INDEX), "index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CorruptFile(path, "is not an index: weight_map is not a map from tensors to files")
    for name, shard in weight_map.items():
        check_name(path, name)
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CorruptFile(path, f"{name}: shard name {quoted(shard)} is not a plain file name")
    if not weight_map:
        raise CorruptFile(path, "weight_map is empty")
    return weight_map
