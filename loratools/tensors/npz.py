"""Archives of numpy (``.npz``), as MLX once wrote adapters. An array of objects is a pickle, and needs leave."""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from loratools.dtypes import DTYPES
from loratools.errors import CorruptFile, Unsupported, quoted
from loratools.tensors.base import ByBytes, TensorSpec, span
from loratools.tensors.files import File
from loratools.tensors.header import check_name

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from loratools.dtypes import Array, Dtype

__all__ = ["NpzFile"]

MAX_MEMBERS = 1_000_000
MAX_ELEMENTS = 1 << 40
_SUFFIX = ".npy"


class NpzFile(ByBytes):
    """A numpy archive: headers are read at once, an array when it is asked for.

    Args:
        path: of the archive.
        allow_pickle: open arrays of objects, which can run code.

    Raises:
        NotFound: no such file.
        CorruptFile: no archive of arrays.
        Unsupported: an array of objects, without leave; or of a type that holds no numbers.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_pickle: bool = False) -> None:
        self.path = str(path)
        self.allow_pickle = allow_pickle
        file = File(path)
        try:
            file.size()  # refuses what is not there, and what is no regular file
        finally:
            file.close()
        self.metadata: Mapping[str, str] = {}
        self.specs: Mapping[str, TensorSpec] = self._headers()

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`. Unpacks the whole array each time."""
        import numpy as np

        offset, count = span(self.specs[name], start, stop)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(name + _SUFFIX) as member:
                values = np.lib.format.read_array(member, allow_pickle=self.allow_pickle)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise CorruptFile(self.path, f"{name} cannot be read: {error}") from error
        if values.dtype.hasobject:
            values = _numbers(self.path, name, values)
        raw: Array = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        return raw[offset : offset + count]

    def extent(self, name: str) -> None:
        """Its bytes may be packed."""

    def identity(self) -> tuple[Any, ...]:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        found = Path(self.path).stat()
        return (self.path, found.st_size, found.st_mtime_ns)

    def _headers(self) -> dict[str, TensorSpec]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                listed = archive.namelist()
                if len(listed) > MAX_MEMBERS or len(set(listed)) != len(listed):
                    self._fail("holds too many arrays, or one twice")
                return dict(self._header(archive, member) for member in listed)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            if isinstance(error, (CorruptFile, Unsupported)):
                raise
            raise CorruptFile(self.path, f"not a readable numpy archive: {error}") from error

    def _header(self, archive: zipfile.ZipFile, member: str) -> tuple[str, TensorSpec]:
        import numpy as np

        if not member.endswith(_SUFFIX):
            self._fail(f"holds {quoted(member)}, which is no array")
        name = member.removesuffix(_SUFFIX)
        check_name(self.path, name)
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            if version not in {(1, 0), (2, 0)}:
                self._fail(f"{name} is of version {version} of numpy's format; 1.0 and 2.0 are read")
            one = version == (1, 0)
            head = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
            shape, _, kind = head(file)
        if kind.hasobject:
            return name, self._object_spec(name)
        spec = TensorSpec(self._dtype(name, kind), tuple(shape))
        if prod(n or 1 for n in shape) > MAX_ELEMENTS:
            self._fail(f"{name}: shape {quoted(shape)} is absurd")
        return name, spec

    def _dtype(self, name: str, kind: Any) -> Dtype:
        if kind.kind == "V" and kind.itemsize == 2 and kind.names is None:  # what MLX makes of bfloat16
            return DTYPES["BF16"]
        found = next((stored for stored in DTYPES.values() if stored.numpy == kind.name), None)
        if found is None or kind.byteorder == ">":
            raise Unsupported(f"{self.path}: {name} holds {kind.str}, which is no type of safetensors")
        return found

    def _object_spec(self, name: str) -> TensorSpec:
        import numpy as np

        if not self.allow_pickle:
            raise Unsupported(
                f"{self.path}: {name} is an array of objects, a pickle, which can run code when it is opened",
                hint="pass --allow-pickle (allow_pickle=True) if you trust where it comes from",
            )
        with zipfile.ZipFile(self.path) as archive, archive.open(name + _SUFFIX) as member:
            values = _numbers(self.path, name, np.lib.format.read_array(member, allow_pickle=True))
        return TensorSpec(self._dtype(name, values.dtype), values.shape)

    def _fail(self, problem: str) -> NoReturn:
        raise CorruptFile(self.path, problem)


def _numbers(path: str, name: str, values: Any) -> Array:
    """What an array of objects holds: one array (in no dimension), or numbers."""
    import numpy as np

    try:
        plain = np.asarray(values.item() if values.ndim == 0 else values.tolist())
    except ValueError as error:
        raise CorruptFile(path, f"{name}: its objects are no numbers") from error
    if plain.dtype.kind not in "biuf":
        raise CorruptFile(path, f"{name}: its objects are no numbers")
    return plain
