"""What adapters are multiplied by, as a caller gives it."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING

from loratools.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["settle_weights"]


def settle_weights(weights: float | Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite number for each adapter.

    Raises:
        Unsupported: another count of them, or one that is no finite number.
    """
    if weights is None:
        return (1.0,) * count
    given = _numbers(weights)
    if given and len(given) != count:
        raise Unsupported(
            f"{len(given)} weight{'s' * (len(given) != 1)} for {count} adapter{'s' * (count != 1)}",
            hint="give one for each, in their order",
        )
    for number, weight in enumerate(given, 1):
        if not math.isfinite(weight):
            raise Unsupported(f"weight {number} is {weight}, not a finite number")
    return tuple(given) or (1.0,) * count


def _numbers(weights: object) -> list[float]:
    several = [weights] if isinstance(weights, (str, Real)) else weights
    try:
        found = list(several)  # type: ignore[call-overload]
    except TypeError:
        found = [weights]
    for one in found:
        if not isinstance(one, Real):
            raise Unsupported(
                f"weights: {one!r} is no number", hint="give one for each adapter, such as weights=[0.7, 0.3]"
            )
    return [float(one) for one in found]
