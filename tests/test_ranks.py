"""Rules on singular values: against their definitions, brute force, and noise whose size is known."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.ranks import (
    gavish_donoho,
    global_ranks,
    joined,
    mp_edge,
    rank_above,
    rank_for_energy,
    rank_for_error,
    rounding_variance,
    tails,
)
from loratools.dtypes import dtype

values = st.lists(st.just(0.0) | st.floats(1e-3, 100), max_size=12).map(
    lambda v: np.array(sorted(v, reverse=True))
)
# Few different values and costs, so that ties and exact fits are common.
spectra = st.lists(
    st.tuples(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]) | st.floats(0.1, 4), max_size=4),
        st.integers(1, 7),
    ),
    min_size=1,
    max_size=4,
)


def choices(found):
    return itertools.product(*(range(len(squares) + 1) for squares, _ in found))


def lost(found, ranks):
    return sum(float(np.sum(squares[rank:])) for (squares, _), rank in zip(found, ranks, strict=True))


def spent(found, ranks):
    return sum(cost * rank for (_, cost), rank in zip(found, ranks, strict=True))


def unpacked(drawn):
    ordered = [(np.array(sorted(v, reverse=True)), cost) for v, cost in drawn]
    names = [str(i) for i in range(len(ordered))]
    return (
        dict(zip(names, (v for v, _ in ordered), strict=True)),
        dict(zip(names, (c for _, c in ordered), strict=True)),
        [(v**2, c) for v, c in ordered],
    )


@given(values)
def test_tails_are_the_norms_of_what_is_left(found):
    assert tails(found) == pytest.approx([np.linalg.norm(found[k:]) for k in range(len(found) + 1)])


def test_tails_neither_overflow_nor_vanish():
    assert tails(np.array([3e200, 4e200])[::-1])[0] == pytest.approx(5e200)
    assert tails(np.array([4e-200, 3e-200]))[0] == pytest.approx(5e-200)


@given(values, st.floats(0.01, 1))
def test_energy_is_the_least_rank_that_keeps_the_share(found, share):
    rank, total = rank_for_energy(found, share), float(np.sum(found**2))
    assert np.sum(found[:rank] ** 2) >= share * total * (1 - 1e-9)
    assert rank == 0 or np.sum(found[: rank - 1] ** 2) < share * total or total == 0


@given(values, st.floats(0, 0.99))
def test_error_is_the_least_rank_that_loses_no_more(found, relative):
    rank, norm = rank_for_error(found, relative), np.linalg.norm(found)
    assert np.linalg.norm(found[rank:]) <= relative * norm * (1 + 1e-9)
    assert rank == 0 or np.linalg.norm(found[rank - 1 :]) > relative * norm * (1 - 1e-9)


def test_nothing_is_kept_of_nothing():
    zero = np.zeros(3)
    assert rank_for_energy(zero, 1.0) == rank_for_error(zero, 0.0) == rank_above(zero, 0.0) == 0
    assert rank_for_energy(np.zeros(0), 0.9) == 0


def test_experts_are_judged_together():
    first, second = np.array([3.0, 2.0]), np.array([4.0, 1.0, 1.0])
    together = joined([first, second])
    for rank in range(4):
        apart = math.hypot(np.linalg.norm(first[rank:]), np.linalg.norm(second[rank:]))
        assert tails(together)[rank] == pytest.approx(apart)


@given(spectra, st.integers(0, 60))
def test_a_budget_is_spent_as_well_as_it_can_be(drawn, budget):
    named, costs, found = unpacked(drawn)
    ranks = tuple(global_ranks(named, costs, budget=budget).values())
    assert spent(found, ranks) <= budget
    best = min(lost(found, one) for one in choices(found) if spent(found, one) <= budget)
    assert lost(found, ranks) <= best + 1e-9


@given(spectra, st.floats(0, 0.99))
def test_an_error_is_reached_as_cheaply_as_it_can_be(drawn, error):
    named, costs, found = unpacked(drawn)
    total = lost(found, [0] * len(found))
    ranks = tuple(global_ranks(named, costs, error=error).values())
    assert lost(found, ranks) <= error**2 * total + 1e-9
    allowed = error**2 * total * (1 - 1e-9)
    best = min(spent(found, one) for one in choices(found) if lost(found, one) <= allowed)
    assert spent(found, ranks) <= best


@given(spectra, st.integers(0, 30))
def test_a_minimum_is_kept_and_the_rest_still_best(drawn, extra):
    named, costs, found = unpacked(drawn)
    least = [min(1, len(squares)) for squares, _ in found]
    budget = spent(found, least) + extra
    ranks = tuple(global_ranks(named, costs, budget=budget, minimum=1).values())
    allowed = [
        one
        for one in choices(found)
        if spent(found, one) <= budget and all(r >= m for r, m in zip(one, least, strict=True))
    ]
    assert ranks in allowed
    assert lost(found, ranks) <= min(lost(found, one) for one in allowed) + 1e-9


def test_energy_over_all_modules_is_the_error_it_leaves():
    named, costs = {"a": np.array([4.0, 3.0]), "b": np.array([2.0, 1.0])}, {"a": 2, "b": 2}
    assert (
        global_ranks(named, costs, energy=0.96) == global_ranks(named, costs, error=0.2) == {"a": 2, "b": 1}
    )


def test_the_greedy_choice_is_not_the_best_one_here():
    """One of 6 for the price of 5 is the best bargain, and leaves no room for the two of 4.6 for 4 each."""
    named = {"a": np.sqrt([6.0]), "b": np.sqrt([4.6, 4.6])}
    assert global_ranks(named, {"a": 5, "b": 4}, budget=8) == {"a": 0, "b": 2}


@pytest.mark.parametrize("rules", [{}, {"budget": 3, "error": 0.1}])
def test_exactly_one_rule(rules):
    with pytest.raises(ValueError, match="one of"):
        global_ranks({"a": np.ones(2)}, {"a": 1}, **rules)


def test_a_budget_below_the_minimum_is_refused():
    with pytest.raises(ValueError, match="below the least, 5"):
        global_ranks({"a": np.ones(2)}, {"a": 5}, budget=4, minimum=1)


def test_the_threshold_of_gavish_and_donoho():
    """4/√3 of square matrices gave their paper its name; the other value is their equation 11 by hand."""
    assert gavish_donoho((100, 100), 1.0) / 10 == pytest.approx(4 / math.sqrt(3))
    assert gavish_donoho((50, 100), 2.0) / 20 == pytest.approx(1.9786, abs=1e-4)
    assert gavish_donoho((100, 50), 2.0) == gavish_donoho((50, 100), 2.0)


def test_white_noise_ends_at_its_edge():
    noise = np.linalg.svd(np.random.default_rng(0).standard_normal((400, 300)) * 0.1, compute_uv=False)
    assert noise[0] == pytest.approx(mp_edge((400, 300), 0.1), rel=0.03)
    assert rank_above(noise, gavish_donoho((400, 300), 0.1)) == 0


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_the_variance_of_rounding_is_that_of_the_errors_made(name):
    exact = np.random.default_rng(0).standard_normal(200_000) * 0.02
    kind = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[name]
    rounded = exact.astype(kind).astype(np.float64)
    assert rounding_variance(rounded, dtype(name)) == pytest.approx(np.mean((rounded - exact) ** 2), rel=0.02)


def test_the_smallest_numbers_of_a_type_have_the_ulp_of_its_least_normal():
    tiny = np.array([2.0**-24, 0.0], np.float32)
    assert rounding_variance(tiny, dtype("F16")) == pytest.approx((2.0**-24) ** 2 / 12)


def test_noise_rules_find_the_rank_that_bfloat16_hides_from_the_energy_rule():
    rng = np.random.default_rng(0)
    base = (rng.standard_normal((512, 384)) * 0.02).astype(ml_dtypes.bfloat16).astype(np.float64)
    delta = rng.standard_normal((512, 16)) @ rng.standard_normal((16, 384)) * (2.5e-4 / 4)
    tuned = (base + delta).astype(ml_dtypes.bfloat16).astype(np.float64)
    found = np.linalg.svd(tuned - base, compute_uv=False)
    sigma = math.sqrt(rounding_variance(tuned, dtype("BF16")))
    assert rank_above(found, gavish_donoho(base.shape, sigma)) == 16
    assert rank_above(found, mp_edge(base.shape, sigma)) == 16
    assert rank_for_energy(found, 0.99) > 4 * 16
