"""What ``combine`` makes of tensors that are no deltas: heads, biases, token rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from loratools.errors import Mismatch
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource
from loratools.verbs.combine_report import CombinedExtra

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratools.adapter import Extra
    from loratools.pairing import Slots

__all__ = ["ExtrasRule", "combine_extras", "plan_extras"]

ExtrasRule = Literal["error", "first", "average"]
_HINT = "--extras first takes the first adapter's, --extras average the weighted mean"
_CHUNK = 1 << 22  # elements compared at once


def plan_extras(
    slots: Mapping[str, Slots[Extra]], rule: ExtrasRule, weights: Sequence[float]
) -> tuple[CombinedExtra, ...]:
    """By which rule each comes about. Under ``error`` and ``average`` tensors may have to be compared.

    A tensor that one adapter alone has is taken as it is, whatever the adapter's weight: it replaces one of the base.

    Args:
        slots: by their name in the result, one slot for each adapter.
        rule: what to do where several adapters have the tensor and do not agree.
        weights: of the adapters.

    Raises:
        Mismatch: they do not agree and the rule is ``error``, or cannot be averaged.
    """
    return tuple(_plan(name, found, rule, weights) for name, found in slots.items())


def _plan(name: str, slots: Slots[Extra], rule: ExtrasRule, weights: Sequence[float]) -> CombinedExtra:
    having = tuple(index for index, slot in enumerate(slots) if slot is not None)
    extras = [slot[1] for slot in slots if slot is not None]
    if len(extras) == 1:
        return CombinedExtra(name, having, "only")
    if all(_same(extras[0], other) for other in extras[1:]):
        return CombinedExtra(name, having, "same")
    if rule == "error":
        raise Mismatch(
            f"{len(extras)} adapters have {name} ({extras[0].reason}) and differ in it", hint=_HINT
        )
    if rule == "average":
        _require_mean(name, extras, [weights[index] for index in having])
    return CombinedExtra(name, having, rule)


def _same(one: Extra, other: Extra) -> bool:
    """Whether two tensors say the same, bit for bit."""
    import numpy as np

    first, second = one.tensor, other.tensor
    if first.spec != second.spec or one.indices != other.indices:
        return False
    count = first.spec.count
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        mine, theirs = (ref.source.read_bytes(ref.name, start, stop) for ref in (first, second))
        if not np.array_equal(mine, theirs):
            return False
    return True


def _require_mean(name: str, extras: list[Extra], weights: list[float]) -> None:
    shapes = {extra.tensor.shape for extra in extras}
    if len(shapes) > 1:
        listed = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise Mismatch(
            f"{name} is {listed} in different adapters and has no mean",
            hint="--extras first takes the first adapter's",
        )
    if len({extra.indices for extra in extras}) > 1:
        raise Mismatch(
            f"{name} stands for different token rows in different adapters and has no mean",
            hint="--extras first takes the first adapter's",
        )
    if any(extra.tensor.spec.dtype.kind != "float" for extra in extras):
        raise Mismatch(
            f"{name} holds no floats and has no mean", hint="--extras first takes the first adapter's"
        )
    if abs(sum(weights)) <= 1e-9 * sum(map(abs, weights)):
        raise Mismatch(
            f"the weights of the adapters that have {name} add up to zero, so it has no weighted mean",
            hint="--extras first takes the first adapter's",
        )


def combine_extras(
    slots: Mapping[str, Slots[Extra]], planned: Sequence[CombinedExtra], weights: Sequence[float]
) -> dict[str, Extra]:
    """The tensors themselves, by the key of the first adapter that has them."""
    combined = {}
    for entry in planned:
        found = [slot for slot in slots[entry.name] if slot is not None]
        key, first = found[0]
        if entry.rule == "average":
            first = _mean(key, [extra for _, extra in found], [weights[index] for index in entry.adapters])
        combined[key] = first
    return combined


def _mean(key: str, extras: list[Extra], weights: list[float]) -> Extra:
    """Σ wᵢ Xᵢ / Σ wᵢ, summed in float64 and rounded once, to the widest of the inputs' types."""
    import numpy as np

    from loratools.dtypes import narrow
    from loratools.tensors.memory import from_bytes

    total = np.zeros(extras[0].tensor.shape, np.float64)
    for extra, weight in zip(extras, weights, strict=True):
        total += extra.tensor.load() * np.float64(weight / sum(weights))
    spec = max((extra.tensor.spec for extra in extras), key=lambda spec: spec.dtype.bits)
    raw = narrow(total, spec.dtype, np.empty(spec.nbytes, np.uint8))
    source = MemorySource({key: from_bytes(raw, spec, torch_out=False)})
    return replace(extras[0], tensor=TensorRef(source, key))
