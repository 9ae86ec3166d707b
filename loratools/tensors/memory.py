"""A state dict as a source: numpy arrays or torch tensors, without copying them and without importing torch.

A torch tensor can only exist where torch is loaded already, so it is found through ``sys.modules``. bfloat16 and the
8-bit floats are viewed as integers to cross into numpy; tensors on a GPU are brought over when they are read.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from loratools.dtypes import DTYPES, Dtype, numpy_dtype, widen
from loratools.errors import Unsupported
from loratools.tensors.base import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.dtypes import Array

__all__ = ["MemorySource", "from_bytes", "is_torch"]


def is_torch(value: object) -> bool:
    """Whether this is a torch tensor, asked without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


class MemorySource:
    """Tensors in memory, by name.

    >>> import numpy as np
    >>> MemorySource({"w": np.zeros((2, 3), np.float32)}).specs["w"].shape
    (2, 3)

    Attributes:
        ties: name to the first name that shares its storage (tied embeddings in a torch state dict).
    """

    def __init__(self, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        self.tensors = dict(tensors)
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(_stored_dtype(name, value), tuple(int(n) for n in value.shape))
            for name, value in self.tensors.items()
        }
        self.ties = _ties(self.tensors)

    def read(self, name: str, start: int = 0, stop: int | None = None, *, out: Array | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        raw = self.read_bytes(name, start, stop)
        values = widen(raw, self.specs[name].dtype, None if out is None else out.reshape(-1))
        return values if out is None else out

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        import numpy as np

        value, spec = self.tensors[name], self.specs[name]
        if spec.dtype.bits < 8:  # packed: one stored element holds two
            start, stop = start // 2, None if stop is None else stop // 2
        if is_torch(value):
            torch = sys.modules["torch"]
            run = value.detach().reshape(-1)[start:stop].cpu()
            return np.asarray(run.view(torch.uint8).numpy())
        return np.ascontiguousarray(value.reshape(-1)[start:stop]).view(np.uint8)

    def extent(self, name: str) -> None:
        """In memory there is no file to copy from."""

    def identity(self) -> tuple[Any, ...]:
        """Memory does not outlive the process: never the same as before."""
        return ("memory", id(self.tensors))


def _stored_dtype(name: str, value: Any) -> Dtype:
    if is_torch(value):
        wanted = str(value.dtype).removeprefix("torch.")
        wanted = {"float4_e2m1fn_x2": "float4_e2m1fn"}.get(wanted, wanted)
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        wanted = str(value.dtype)
    else:
        raise Unsupported(f"{name}: {type(value).__name__} is neither a numpy array nor a torch tensor")
    for stored in DTYPES.values():
        if stored.numpy == wanted:
            return stored
    raise Unsupported(f"{name}: no safetensors type for {wanted}")


def _ties(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Names whose torch storage is the very one of an earlier name: same memory, same shape, same strides."""
    seen: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, value in tensors.items():
        if not is_torch(value) or value.numel() == 0:
            continue
        key = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        first = seen.setdefault(key, name)
        if first != name:
            ties[name] = first
    return ties


def from_bytes(raw: Array, spec: TensorSpec, *, torch_out: bool) -> Any:
    """Stored bytes as an array of their type: a torch tensor on request, else numpy (ml_dtypes for bfloat16)."""
    if not torch_out:
        return raw.view(numpy_dtype(spec.dtype)).reshape(spec.shape)
    torch = sys.modules["torch"]
    return torch.from_numpy(raw).view(getattr(torch, str(spec.dtype.numpy))).reshape(spec.shape)
