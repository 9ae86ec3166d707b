"""Methods inside methods: which rule a calibration or a compression hands its deltas to, and with which options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from loratools.methods.base import Approximation, find

if TYPE_CHECKING:
    from loratools.deltas.lowrank import LowRank
    from loratools.methods.base import Stack

__all__ = ["Rule", "apply", "check_rule"]

Rule = Literal["linear", "magnitude_prune", "ties", "dare", "dare_ties", "della", "breadcrumbs", "sce"]


def check_rule(*, rule: str, density: float, seed: int, **_: object) -> None:
    """Refuse options that the rule does not have, or that it refuses: what a method's ``validate`` is for.

    Raises:
        Unsupported: naming the rule and the option.
    """
    find(rule).settle({"density": density or None, "seed": seed or None})


def apply(rule: str, stack: Stack, *, space: str, **wanted: Any) -> LowRank:
    """What another method makes of a stack.

    Args:
        rule: its name.
        stack: for it.
        space: the coordinates, where the rule has a choice.
        wanted: options; those that the rule does not have are left out, and None is its default.
    """
    method = find(rule)
    has = {option.name for option in method.options}
    given = {name: value for name, value in {"space": space, **wanted}.items() if name in has}
    found = method.function(stack, **method.settle(given))
    return found.delta if isinstance(found, Approximation) else found
