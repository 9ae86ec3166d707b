"""A state dict as a source: numpy arrays or torch tensors, without copying them and without importing torch.

A torch tensor can only exist where torch is loaded already, so it is found through ``sys.modules``. bfloat16 and the
8-bit floats are viewed as integers to cross into numpy; tensors on a GPU are brought over when they are read.
"""

from __future__ import annotations

import os
import sys
from math import prod
from typing import TYPE_CHECKING, Any

from loratools.dtypes import DTYPES, numpy_dtype, unpack_nibbles
from loratools.errors import Unsupported
from loratools.tensors.base import ByBytes, TensorSpec, span

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.dtypes import Array, Dtype

__all__ = ["MemorySource", "from_bytes", "is_torch"]


def is_torch(value: object) -> bool:
    """Whether this is a torch tensor, asked without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


class MemorySource(ByBytes):
    """Tensors in memory, by name.

    >>> import numpy as np
    >>> MemorySource({"w": np.zeros((2, 3), np.float32)}).specs["w"].shape
    (2, 3)

    Attributes:
        ties: name to the first name that is the same memory (tied embeddings in a state dict).
    """

    def __init__(self, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        self.tensors = dict(tensors)
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.specs: Mapping[str, TensorSpec] = {
            name: _spec(name, value) for name, value in self.tensors.items()
        }
        self.ties = _ties(self.tensors)
        self._token = os.urandom(8).hex()

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        import numpy as np

        value, spec = self.tensors[name], self.specs[name]
        _, size = span(spec, start, stop)
        if not size:
            return np.empty(0, np.uint8)
        stop = spec.count if stop is None else stop
        if is_torch(value):
            if spec.dtype.bits < 8:  # one of torch's elements holds two
                start, stop = start // 2, stop // 2
            torch = sys.modules["torch"]
            run = _run(value.detach(), start, stop).resolve_conj().resolve_neg().cpu()
            if run.stride() != (1,):  # even of one element, which torch calls contiguous whatever its stride
                run = run.clone(memory_format=torch.contiguous_format)
            return np.asarray(run.view(torch.uint8).numpy())
        run = np.ascontiguousarray(_run(value, start, stop)).view(np.uint8)
        if spec.dtype.bits < 8:  # ml_dtypes gives each element a byte
            return run[0::2] & 0xF | run[1::2] << 4
        return run

    def extent(self, name: str) -> None:
        """In memory there is no file to copy from."""

    def identity(self) -> tuple[Any, ...]:
        """Memory does not outlive the process: never the same as before."""
        return ("memory", self._token)


def _spec(name: str, value: Any) -> TensorSpec:
    stored = _stored_dtype(name, value)
    shape = tuple(int(n) for n in value.shape)
    if is_torch(value) and stored.bits == 4:  # torch counts pairs
        shape = (*shape[:-1], shape[-1] * 2)
    if prod(shape) * stored.bits % 8:
        raise Unsupported(f"{name}: {prod(shape)} elements of {stored} do not fill bytes")
    return TensorSpec(stored, shape)


def _run(value: Any, start: int, stop: int) -> Any:
    """Elements of an array in row-major order; of one that is not contiguous, no more than the rows they lie in."""
    contiguous = value.is_contiguous() if is_torch(value) else value.flags.c_contiguous
    if contiguous or not value.ndim:
        return value.reshape(-1)[start:stop]
    width = max(1, prod(value.shape[1:]))
    first, last = start // width, -(-stop // width)
    return value[first:last].reshape(-1)[start - first * width : stop - first * width]


def _stored_dtype(name: str, value: Any) -> Dtype:
    if is_torch(value):
        if value.is_meta or str(value.layout) != "torch.strided":
            kind = "has no values (meta device)" if value.is_meta else f"is {value.layout}, not dense"
            raise Unsupported(f"{name}: the tensor {kind}")
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
    """Names that are the very same tensor as an earlier name: same memory, same shape, same strides."""
    seen: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, value in tensors.items():
        if prod(value.shape) == 0:
            continue
        if is_torch(value):
            key = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        else:
            key = ("numpy", value.__array_interface__["data"][0], value.shape, value.strides, value.dtype)
        first = seen.setdefault(key, name)
        if first != name:
            ties[name] = first
    return ties


def from_bytes(raw: Array, spec: TensorSpec, *, torch_out: bool) -> Any:
    """Stored bytes as an array of their type: a torch tensor on request, else numpy (ml_dtypes for bfloat16)."""
    if not torch_out:
        values = (
            unpack_nibbles(raw, spec.dtype) if spec.dtype.bits == 4 else raw.view(numpy_dtype(spec.dtype))
        )
        return values.reshape(spec.shape)
    torch = sys.modules["torch"]
    if not raw.size:  # which torch cannot view as another type
        kind = torch.float4_e2m1fn_x2 if spec.dtype.bits == 4 else getattr(torch, str(spec.dtype.numpy))
        return torch.empty(spec.shape, dtype=kind)
    if spec.dtype.bits == 4:
        shape = (*spec.shape[:-1], spec.shape[-1] // 2)
        return torch.from_numpy(raw).view(torch.float4_e2m1fn_x2).reshape(shape)
    return torch.from_numpy(raw).view(getattr(torch, str(spec.dtype.numpy))).reshape(spec.shape)
