"""What the singular values of a delta say about it. Those of a delta that is zero say 0 throughout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from loratools.dtypes import Array

__all__ = ["effective_rank", "frobenius_norm", "spectral_norm", "stable_rank"]


def frobenius_norm(values: Array) -> float:
    """√(Σ σᵢ²), whatever the size of the values.

    >>> frobenius_norm(np.array([4.0, 3.0]))
    5.0
    """
    greatest = spectral_norm(values)
    return greatest * float(np.linalg.norm(values / greatest)) if greatest else 0.0


def spectral_norm(values: Array) -> float:
    """The greatest of them: the most by which the delta lengthens a vector.

    >>> spectral_norm(np.array([4.0, 3.0]))
    4.0
    """
    return float(np.max(values, initial=0.0))


def stable_rank(values: Array) -> float:
    """‖D‖² / σ₁²: how many directions as strong as the strongest would have the same norm.

    >>> stable_rank(np.array([2.0, 2.0, 2.0]))
    3.0
    """
    greatest = spectral_norm(values)
    return float(np.sum((values / greatest) ** 2)) if greatest else 0.0


def effective_rank(values: Array) -> float:
    """exp(-Σ pᵢ log pᵢ) with pᵢ = σᵢ / Σ σᵢ: Roy and Vetterli, "The effective rank" (2007).

    >>> round(effective_rank(np.array([2.0, 2.0, 0.0])), 12)
    2.0
    """
    greatest = spectral_norm(values)
    if not greatest:
        return 0.0
    shares = values[values > 0] / greatest
    shares = shares / shares.sum()
    shares = shares[shares > 0]
    return math.exp(-float(np.sum(shares * np.log(shares))))
