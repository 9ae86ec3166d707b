"""Shapes of weights and deltas."""

from __future__ import annotations

from math import prod

from loratools.errors import ShapeMismatch

__all__ = ["flat_shape", "require_shape"]


def flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight's shape as a matrix: (out, everything else); a vector is one column.

    >>> flat_shape((8, 3, 5, 5)), flat_shape((8,)), flat_shape(())
    ((8, 75), (8, 1), (1, 1))
    """
    return (shape[0] if shape else 1), prod(shape[1:])


def require_shape(name: str, delta: tuple[int, ...], weight: tuple[int, ...]) -> None:
    """Raise :class:`~loratools.errors.ShapeMismatch` unless the two are equal."""
    if delta != weight:
        raise ShapeMismatch(name, delta, weight)
