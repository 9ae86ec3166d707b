"""The values: read in pieces of a few megabytes, whatever the size of a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.verbs.checking.subject import error, few, warning

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from loratools.tensors.base import TensorRef
    from loratools.verbs.checking.subject import Subject
    from loratools.verbs.reports import Finding

__all__ = ["beyond_half", "check_values"]

_PIECE = 1 << 20  # elements read at once; even, so that packed 4-bit types split between bytes
_LARGEST_F16 = 65504.0
# A module whose factor of one of these roles is all zeros does nothing.
_FACTORS = {
    "down", "up", "embedding_down", "embedding_up", "first_a", "first_b", "second_a", "second_b", "left", "left_a",
    "left_b", "right", "right_a", "right_b", "singular", "mid", "first_core", "second_core", "right_core", "diff",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the values of one tensor are like."""

    nans: int = 0
    infinities: int = 0
    largest: float = 0.0  # of the magnitudes of finite values


def check_values(subject: Subject) -> Iterator[Finding]:
    """NaN and Inf, factors of zeros, values that half precision cannot hold."""
    zero: set[str] = set()
    for ref in subject.adapter.tensors:
        if ref.spec.dtype.kind != "float" or ref.spec.count == 0 or ref.spec.dtype.numpy is None:
            continue
        seen = _read(ref)
        if seen.nans or seen.infinities:
            yield error(
                "non-finite", ref.name,
                f"{seen.nans:,} NaN and {seen.infinities:,} infinite values among {ref.spec.count:,}",
                "training diverged, or the file was cast to a type too small; nothing merged from it can be right",
            )  # fmt: skip
        elif seen.largest == 0.0:
            zero.add(ref.name)
        if seen.largest > _LARGEST_F16:
            yield warning(
                "overflows-fp16", ref.name, f"holds {seen.largest:.3g}, which half precision cannot",
                "keep it in bfloat16 or float32",
            )  # fmt: skip
    yield from _idle(subject, zero)


def beyond_half(refs: Iterable[TensorRef]) -> tuple[str, ...]:
    """The tensors with a finite value that half precision cannot hold."""
    floats = [ref for ref in refs if ref.spec.dtype.kind == "float" and ref.spec.dtype.numpy is not None]
    return tuple(ref.name for ref in floats if ref.spec.count and _read(ref).largest > _LARGEST_F16)


def _read(ref: TensorRef) -> _Seen:
    import numpy as np

    nans, infinities, largest = 0, 0, 0.0
    for start in range(0, ref.spec.count, _PIECE):
        values = ref.source.read(ref.name, start, min(start + _PIECE, ref.spec.count))
        low, high = float(values.min()), float(values.max())
        if math.isfinite(low) and math.isfinite(high):  # NaN is passed on by min
            largest = max(largest, -low, high)
            continue
        nans += int(np.count_nonzero(np.isnan(values)))
        infinities += int(np.count_nonzero(np.isinf(values)))
        finite = np.abs(values[np.isfinite(values)])
        largest = max(largest, float(finite.max(initial=0.0)))
    return _Seen(nans, infinities, largest)


def _idle(subject: Subject, zero: set[str]) -> Iterator[Finding]:
    """Modules that do nothing, because a factor is all zeros."""
    modules = subject.adapter.modules
    roles: Mapping[str, list[str]] = {
        name: [r for r, ref in module.tensors.items() if ref.name in zero and r in _FACTORS]
        for name, module in modules.items()
    }
    idle = [name for name, found in roles.items() if found]
    hint = "was it trained? A fresh adapter's up factor (lora_B) is zero"
    if len(idle) > 1 and len(idle) == len(modules):
        yield warning(
            "all-zero", few(idle), f"all {len(idle)} modules have a factor of zeros: the adapter does nothing", hint
        )  # fmt: skip
        return
    for name in idle:
        role = roles[name][0]
        key = modules[name].tensors[role].name
        yield warning(
            "all-zero", key, f"the {role} factor of {name} is all zeros, so that it does nothing", hint
        )
