"""The array namespace of a device. This build computes on the CPU with numpy, which is such a namespace itself."""

from __future__ import annotations

from loratools.errors import Unsupported

__all__ = ["check_device"]


def check_device(device: str) -> None:
    """Refuse, by name, a device this build cannot compute on.

    Raises:
        Unsupported: anything but ``"cpu"`` (or ``"auto"``, which means the CPU here).
    """
    if device not in {"cpu", "auto"}:
        raise Unsupported(
            f"device {device!r} is not in this build", hint="it computes on the CPU: --device cpu"
        )
