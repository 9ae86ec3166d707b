"""Where arrays are computed on: numpy on the processor, torch on a graphics card, both through the Python array API.

Mathematics asks :func:`namespace_of` for the functions of the arrays it was given, and so runs wherever they lie::

    xp = namespace_of(up)
    product = xp.matmul(up, down)

Values cross over in three places only: :func:`to_device`, :func:`beside` and :func:`from_device`. numpy (2 and later)
is such a namespace itself; ``array_api_compat.torch`` makes torch one. Neither is imported before it is needed, and
torch never for the processor.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from loratools.errors import Unsupported

if TYPE_CHECKING:
    from types import ModuleType

    from loratools.dtypes import Array

__all__ = [
    "beside",
    "check_device",
    "check_double",
    "from_device",
    "has_double",
    "namespace",
    "namespace_of",
    "on_processor",
    "to_device",
]

_TORCH_DEVICES = {"cuda": "cuda", "mps": "mps"}  # our name to torch's
_SINGLE_ONLY = {"mps"}  # has no float64


def check_device(device: str) -> str:
    """The device meant, if it is there.

    >>> check_device("cpu")
    'cpu'

    Args:
        device: ``"cpu"``; ``"cuda"`` or ``"mps"``, which need torch; or ``"auto"``: CUDA where torch is installed
            and has it, else the processor.

    Returns:
        One of the first three.

    Raises:
        Unsupported: no such device, torch is not installed, or it does not see the device.
    """
    if device == "cpu":
        return device
    if device == "auto":
        if not all(importlib.util.find_spec(name) for name in ("torch", "array_api_compat")):
            return "cpu"
        return "cuda" if _available("cuda") else "cpu"
    if device not in _TORCH_DEVICES:
        raise Unsupported(f"device {device!r} is not in this build", hint="use cpu, cuda, mps or auto")
    _torch_namespace(device)
    if not _available(device):
        raise Unsupported(f"device {device!r} is not there: torch does not see it", hint="use --device cpu")
    return device


def check_double(device: str) -> str:
    """:func:`check_device`, for what is computed in float64.

    >>> check_double("cpu")
    'cpu'

    Raises:
        Unsupported: the device is not there, or has no float64.
    """
    found = check_device(device)
    if not has_double(found):
        raise Unsupported(
            f"device {found!r} has no float64, which this is computed in", hint="use --device cpu"
        )
    return found


def namespace(device: str) -> Any:
    """The array namespace that computes on a device: numpy itself, or torch's.

    >>> namespace("cpu").__name__
    'numpy'

    Raises:
        Unsupported: torch is not installed.
    """
    if device == "cpu":
        import numpy as np

        return np
    return _torch_namespace(device)


def namespace_of(array: Any) -> Any:
    """The namespace an array belongs to.

    >>> import numpy as np
    >>> namespace_of(np.ones(3)) is np
    True
    """
    import numpy as np

    if isinstance(array, np.ndarray | np.generic):
        return np
    return importlib.import_module("array_api_compat").array_namespace(array)


def has_double(device: str) -> bool:
    """Whether a device computes in float64."""
    return device not in _SINGLE_ONLY


def on_processor(array: Any) -> bool:
    """Whether an array is numpy's."""
    import numpy as np

    return isinstance(array, np.ndarray)


def to_device(array: Array, device: str) -> Any:
    """An array's values where they are to be computed on; the array itself on the processor.

    Args:
        array: float32, or float64 where :func:`has_double`.
        device: as :func:`check_device` returns it.
    """
    if device == "cpu":
        return array
    import numpy as np

    torch = importlib.import_module("torch")
    whole = np.require(
        array, requirements=["C", "W"]
    )  # torch takes no negative strides and warns of constants
    return torch.from_numpy(whole).to(_TORCH_DEVICES[device])


def beside(array: Array, like: Any) -> Any:
    """A numpy array where another array lies, in its own type."""
    if on_processor(like):
        return array
    return importlib.import_module("torch").from_numpy(array.copy()).to(like.device)


def from_device(array: Any, out: Array | None = None) -> Array:
    """An array's values as numpy has them: into ``out`` where it is given, the array itself where it is numpy's."""
    import numpy as np

    if isinstance(array, np.ndarray):
        if out is None or out is array:
            return array
        out[...] = array
        return out
    if out is None:
        values: Array = array.detach().cpu().numpy()
        return values
    importlib.import_module("torch").from_numpy(out).copy_(array)
    return out


def _torch_namespace(device: str) -> Any:
    for name in ("torch", "array_api_compat"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Unsupported(
                f"device {device!r} needs {name}, which is not installed",
                hint="pip install 'loratools[torch]', or use --device cpu",
            ) from error
    return importlib.import_module("array_api_compat.torch")


def _available(device: str) -> bool:
    """Whether torch sees a device."""
    torch: ModuleType = importlib.import_module("torch")
    kind = torch.backends.mps if device == "mps" else getattr(torch, _TORCH_DEVICES[device])
    return bool(kind.is_available())
