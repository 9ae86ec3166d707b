"""What the tests of executors give to workers: functions of a module, so that another process can import them."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from loratools.errors import CorruptFile, OverBudget, ShapeMismatch, UnmatchedModules

if TYPE_CHECKING:
    import numpy as np

    from loratools.tensors.base import TensorRef


def square(number: int) -> int:
    return number * number


def scaled(number: int, by: float) -> np.ndarray:
    import numpy as np

    return np.full((3, number + 1), by, np.float32) * number


def process_id(number: int) -> int:
    return os.getpid()


def source_id(ref: TensorRef) -> int:
    return id(ref.source)


def blas_threads(number: int) -> list[int]:
    from threadpoolctl import threadpool_info

    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


class Stubborn(Exception):
    """An error that does not survive a pickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


ERRORS: dict[str, Any] = {
    "corrupt": lambda: CorruptFile("a.safetensors", "ends early", hint="download it again"),
    "shape": lambda: ShapeMismatch("q_proj", (3, 4), (4, 3), hint="another base"),
    "unmatched": lambda: UnmatchedModules("nothing answers to 'x'", ("x",)),
    "budget": lambda: OverBudget(2_000_000, 1_000_000),
    "full": lambda: OSError(28, "No space left on device", "somewhere"),
    "value": lambda: ValueError("not so"),
    "key": lambda: KeyError("name"),
    "pipe": lambda: ConnectionResetError("of the function's own"),
    "end": lambda: EOFError("of the function's own"),
    "stopped": lambda: SystemExit(3),
    "stubborn": lambda: Stubborn("this", "that"),
}


def fail(what: str | None) -> str:
    if what is None:
        return "fine"
    error = ERRORS[what]()
    raise error


def unsendable(number: int) -> Any:
    return lambda: number


def die(how: str) -> None:
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def start_workers(number: int) -> None:
    from loratools.executors.processes import Processes

    Processes(2)
