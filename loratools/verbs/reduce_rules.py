"""The rules by which ``reduce`` chooses ranks, and which of them was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from loratools.errors import Unsupported

__all__ = ["Rule", "chosen_rule"]

# Rule -> may it be for each module on its own, may it be one optimum over all, and is it the former by default.
_SCOPES = {
    "rank": (True, True, True),
    "energy": (True, True, True),
    "error": (True, True, False),
    "params": (False, True, False),
    "size": (False, True, False),
    "noise_floor": (True, False, True),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """How the rank is chosen.

    Attributes:
        name: ``rank``, ``energy``, ``error``, ``params``, ``size`` or ``noise_floor``.
        value: its number.
        per_module: for each module on its own, or one optimum over all.
    """

    name: str
    value: float | None
    per_module: bool


def chosen_rule(
    rank: int | None,
    energy: float | None,
    error: float | None,
    params: int | None,
    size: int | None,
    noise_floor: bool,
    per_module: bool | None,
) -> Rule:
    """The one rule that was given.

    Raises:
        Unsupported: none, or several; a number out of its range; a scope the rule does not have.
    """
    numbers = {"rank": rank, "energy": energy, "error": error, "params": params, "size": size}
    given = {name: value for name, value in numbers.items() if value is not None}
    chosen: dict[str, float | None] = {**given, **({"noise_floor": None} if noise_floor else {})}
    if len(chosen) != 1:
        said = " and ".join(chosen) if chosen else "nothing"
        raise Unsupported(f"{said} says how far to reduce", hint=f"give exactly one of {', '.join(_SCOPES)}")
    name, value = next(iter(chosen.items()))
    _require_in_range(name, value)
    alone, together, usual = _SCOPES[name]
    per_module = usual if per_module is None else per_module
    if not (alone if per_module else together):
        kind = "each module on its own" if per_module else "all modules together"
        raise Unsupported(f"{name} is no rule for {kind}", hint="leave the scope out")
    return Rule(name, value, per_module)


def _require_in_range(name: str, value: float | None) -> None:
    if value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in {"rank", "params", "size"} and not (whole and value >= 1):
        raise Unsupported(
            f"{name} is {value!r}, not a whole number from 1",
            hint="drop a module by leaving it out, not by rank 0",
        )
    if name == "energy" and not 0 < value <= 1:
        raise Unsupported(
            f"energy is {value!r}, not a share above 0 up to 1", hint="0.99 keeps 99% of the energy"
        )
    if name == "error" and not 0 <= value < 1:
        raise Unsupported(
            f"error is {value!r}, not from 0 to below 1", hint="0.1 allows 10%; at 1 nothing is left"
        )
