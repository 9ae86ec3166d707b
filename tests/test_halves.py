"""float16 conversions by integers, against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.halves import from_half, to_half

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


def bits(values):
    return values.view(np.uint32 if values.dtype == np.float32 else np.uint16)


def rounded(values):
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float16)


@pytest.mark.parametrize("stored", [FINITE, EVERY, EVERY[:0]], ids=["finite", "every", "none"])
def test_every_half_becomes_the_same_single(stored):
    with np.errstate(invalid="ignore"):
        widened, expected = from_half(stored, np.empty(stored.size, np.float32)), stored.astype(np.float32)
    np.testing.assert_array_equal(bits(widened), bits(expected))


@pytest.mark.parametrize("step", [0, 1, -1], ids=["tie", "above", "below"])
def test_between_any_two_neighbours_the_nearest_or_the_even_one_is_chosen(step):
    ordered = np.sort(FINITE.astype(np.float32))
    middle = ((ordered[1:].astype(np.float64) + ordered[:-1]) / 2).astype(np.float32)
    values = np.nextafter(middle, np.float32(np.inf * step)) if step else middle
    half = to_half(values, np.empty(values.size, np.float16))
    np.testing.assert_array_equal(bits(half), bits(rounded(values)))


@given(st.lists(st.floats(width=32), max_size=40))
def test_any_single_rounds_as_numpy_rounds_it(listed):
    values = np.array(listed, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        half = to_half(values, np.empty(values.size, np.float16))
    expected = rounded(values)
    np.testing.assert_array_equal(np.isnan(half), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(half)[number], bits(expected)[number])
