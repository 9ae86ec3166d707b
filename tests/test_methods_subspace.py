"""The subspace methods against the same formulas on dense float64 matrices, and the traps they are known for."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.deltas.lowrank import LowRank
from loratools.errors import Unsupported
from loratools.methods import METHODS, find
from loratools.methods.base import Stack
from loratools.methods.calibration import pico, svc
from loratools.methods.compress import ctm, tucker
from loratools.methods.frames import components, frame, polar
from loratools.methods.geometric import model_stock, slerp
from loratools.methods.spectral import iso, iso_cts, tsv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.dtypes import Array

NAMES = ("tsv", "iso", "iso_cts", "ctm", "pico", "svc", "slerp", "model_stock")
TOLERANCE = 1e-6


# --- making stacks ---------------------------------------------------------------------------------------


def normal(seed: int, out: int, into: int, rank: int, kind: Any = np.float32) -> LowRank:
    rng = np.random.default_rng(seed)
    up = rng.standard_normal((out, rank)).astype(kind)
    return LowRank(up, rng.standard_normal((rank, into)).astype(kind))


def make(ranks: Sequence[int], weights: Sequence[float] | None = None, *, out: int = 24, into: int = 18,
         seed: int = 0, kind: Any = np.float32, rank: int | None = None) -> Stack:  # fmt: skip
    deltas = tuple(normal(seed + i, out, into, r, kind) for i, r in enumerate(ranks))
    chosen = tuple(weights) if weights is not None else (1.0,) * len(deltas)
    return Stack("fc", deltas, chosen, tuple(range(len(deltas))), rank)


def dense(delta: LowRank) -> Array:
    return delta.scaling * (delta.up.astype(np.float64) @ delta.down.astype(np.float64))


def unweighted(stack: Stack) -> Stack:
    return replace(stack, weights=(1.0,) * len(stack.deltas))


def size(stack: Stack) -> float:
    """Σ |wᵢ| ‖ΔWᵢ‖: what errors are measured by."""
    pairs = zip(stack.weights, stack.deltas, strict=True)
    return sum(abs(weight) * float(np.linalg.norm(dense(delta))) for weight, delta in pairs)


def close(found: LowRank, expected: Array, stack: Stack, tolerance: float = TOLERANCE) -> None:
    assert found.scaling == 1.0
    scale = max(size(stack), float(np.linalg.norm(expected)))
    assert np.linalg.norm(dense(found) - expected) <= tolerance * scale


@st.composite
def stacks(draw: Any, least: int = 1, most: int = 4) -> Stack:
    count = draw(st.integers(least, most))
    ranks = draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    weight = st.sampled_from([1.0, 0.5, 0.7, -1.0, 2.0, 0.1, 0.0])
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    return make(ranks, weights, out=draw(st.integers(1, 20)), into=draw(st.integers(1, 20)),
                seed=draw(st.integers(0, 2**20)))  # fmt: skip


# --- the formulas, densely -------------------------------------------------------------------------------


def svd(matrix: Array, floor: float = 0.0) -> tuple[Array, Array, Array]:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.sum(values > max(2.0**-23 * values[0], floor)))
    return left[:, :rank], values[:rank], right[:rank]


def nearest(matrix: Array) -> Array:
    if not matrix.size:
        return matrix
    left, _, right = svd(matrix)
    return left @ right


def weighted(stack: Stack) -> list[Array]:
    return [weight * dense(delta) for weight, delta in zip(stack.weights, stack.deltas, strict=True)]


def total(stack: Stack) -> tuple[Array, Array, Array]:
    return svd(np.sum(weighted(stack), axis=0), 1e-12 * size(stack))


def dense_tsv(stack: Stack, scale: float = 1.0, task_rank: int = 0) -> Array:
    parts = [svd(matrix) for matrix in weighted(stack)]
    cut = [(u[:, : task_rank or None], s[: task_rank or None], v[: task_rank or None]) for u, s, v in parts]
    left = nearest(np.hstack([u for u, _, _ in cut]))
    right = nearest(np.vstack([v for _, _, v in cut]))
    return scale * left @ np.diag(np.concatenate([s for _, s, _ in cut])) @ right


def dense_iso(stack: Stack, scale: float = 1.0) -> Array:
    left, values, right = total(stack)
    return scale * (values.mean() if values.size else 0.0) * left @ right


def dense_iso_cts(stack: Stack, scale: float = 1.0, common: float = 0.8) -> Array:
    u, s, v = total(stack)
    count, rank = len(stack.deltas), s.size if stack.rank is None else min(s.size, stack.rank)
    specific = min(round((rank - int(common * rank)) / count), rank // count)
    k = rank - count * specific
    u, s, v = u[:, :k], s[:k], v[:k]
    lefts, values, rights = [u], [s], [v]
    for matrix in weighted(stack):
        a, b, c = svd(matrix - u @ (u.T @ matrix), 1e-12 * float(np.linalg.norm(matrix)))
        lefts.append(a[:, :specific])
        values.append(b[:specific])
        rights.append(c[:specific])
    sigma = np.concatenate(values)
    flat = sigma.mean() if sigma.size else 0.0
    return scale * flat * nearest(np.hstack(lefts)) @ nearest(np.vstack(rights))


def dense_ctm(stack: Stack, rank: int, beta: float = 0.0) -> Array:
    """With the linear rule; the Tucker iteration written on the whole matrices."""
    matrices = weighted(stack)
    norms = [float(np.linalg.norm(matrix)) for matrix in matrices]
    mean = float(np.mean(norms))
    level = [x * (beta * n + (1 - beta) * mean) / n if n else x for x, n in zip(matrices, norms, strict=True)]
    square = sum(float(np.sum(x**2)) for x in level)
    if not square:
        return np.zeros(stack.shape)
    u, v = svd(np.hstack(level))[0][:, :rank], svd(np.vstack(level))[2][:rank].T
    before = math.inf
    for _ in range(1000):
        u = svd(np.hstack([x @ v for x in level]))[0][:, :rank]
        _, s, right = svd(np.vstack([u.T @ x for x in level]))
        v = right[:rank].T
        error = math.sqrt(max(0.0, 1 - float(np.sum(s[:rank] ** 2)) / square))
        if before - error < 1e-6:
            break
        before = error
    return u @ np.sum([u.T @ x @ v for x in matrices], axis=0) @ v.T


def dense_pico(stack: Stack, scale: float = 1.0) -> Array:
    """With the linear rule."""
    ups = [delta.scaling * delta.up.astype(np.float64) for delta in stack.deltas]
    u, s, _ = svd(np.hstack(ups))
    turned = 1 / (1 + (len(ups) - 1) * s**2 / np.sum(s**2))
    merged = np.zeros(stack.shape)
    for weight, up, delta in zip(stack.weights, ups, stack.deltas, strict=True):
        merged += weight * (up + u @ np.diag(turned - 1) @ u.T @ up) @ delta.down.astype(np.float64)
    norms = np.array([np.linalg.norm(dense(delta)) for delta in stack.deltas])
    weights = np.abs(stack.weights)
    if np.linalg.norm(merged) <= 1e-12 * (weights @ norms):
        return np.zeros(stack.shape)
    return scale * float(weights @ norms / weights.sum()) * merged / np.linalg.norm(merged)


def dense_svc(stack: Stack, floor: float = 0.1, merged: Array | None = None) -> Array:
    """Of the weighted sum, or of any other merge."""
    u, s, v = total(stack) if merged is None else svd(merged)
    mean = float(np.mean(np.abs(stack.weights))) or 1.0
    result = np.zeros(stack.shape)
    for r in range(s.size):
        counts = []
        for matrix in weighted(stack):
            part, along = u[:, r] @ matrix / mean, s[r] * v[r]
            if np.linalg.norm(part) > 2.0**-23 * np.linalg.norm(matrix) / mean:
                counts.append(max(floor, float(along @ part / (part @ part))))
        result += len(counts) / sum(counts) * s[r] * np.outer(u[:, r], v[r])
    return result


def dense_slerp(stack: Stack, t: float) -> Array:
    first, second = weighted(stack)
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    if not norms or abs(np.vdot(first, second)) > 0.9995 * norms:
        return (1 - t) * first + t * second
    theta = math.acos(np.vdot(first, second) / norms)
    return (math.sin((1 - t) * theta) * first + math.sin(t * theta) * second) / math.sin(theta)


def dense_model_stock(stack: Stack, by: str = "matrix") -> Array:
    """Along the last axis, where a matrix is one long row."""
    matrices, count = weighted(stack), len(stack.deltas)
    if count == 1:
        return matrices[0]
    rows = [x if by == "row" else x.reshape(1, -1) for x in matrices]
    cosines = np.zeros(rows[0].shape[0])
    for a, b in itertools.combinations(rows, 2):
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        with np.errstate(invalid="ignore"):
            cosines += np.where(norms > 0, np.sum(a * b, axis=1) / norms, 0.0)
    cosines = np.clip(cosines / (count * (count - 1) / 2), 0.0, 1.0)
    share = count * cosines / (1 + (count - 1) * cosines)
    return (share[:, None] * np.mean(rows, axis=0)).reshape(stack.shape)


# --- every method equals its dense twin ------------------------------------------------------------------


@given(stacks(), st.sampled_from([1.0, 0.3, -2.0]), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_tsv_is_the_dense_one(stack: Stack, scale: float, task_rank: int) -> None:
    close(tsv(stack, scale=scale, task_rank=task_rank), dense_tsv(stack, scale, task_rank), stack)


@given(stacks(), st.sampled_from([1.0, 0.3, -2.0]))
@settings(deadline=None, max_examples=60)
def test_iso_is_the_dense_one(stack: Stack, scale: float) -> None:
    close(iso(stack, scale=scale), dense_iso(stack, scale), stack)


@given(stacks(), st.sampled_from([0.8, 0.5, 0.1, 1.0]), st.sampled_from([None, 1, 3]))
@settings(deadline=None, max_examples=60)
def test_iso_cts_is_the_dense_one(stack: Stack, common: float, rank: int | None) -> None:
    asked = replace(stack, rank=rank)
    close(iso_cts(asked, common=common), dense_iso_cts(asked, 1.0, common), stack)


@given(stacks(), st.integers(1, 5), st.sampled_from([0.0, 0.25, 1.0]))
@settings(deadline=None, max_examples=40)
def test_ctm_is_the_dense_one(stack: Stack, rank: int, beta: float) -> None:
    found = ctm(replace(stack, rank=rank), rule="linear", beta=beta)
    assert found.up.shape[1] <= rank
    close(found, dense_ctm(stack, rank, beta), stack)


@given(stacks(), st.sampled_from([1.0, 0.3]))
@settings(deadline=None, max_examples=60)
def test_pico_is_the_dense_one(stack: Stack, scale: float) -> None:
    close(pico(stack, scale=scale), dense_pico(stack, scale), unweighted(stack))


@given(stacks(), st.sampled_from([0.1, 1.0]))
@settings(deadline=None, max_examples=60)
def test_svc_is_the_dense_one(stack: Stack, floor: float) -> None:
    close(svc(stack, floor=floor), dense_svc(stack, floor), stack)


@given(stacks(2, 2), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_slerp_is_the_dense_one(stack: Stack, t: float) -> None:
    close(slerp(stack, t=t), dense_slerp(stack, t), stack)


@given(stacks(), st.sampled_from(["matrix", "row"]))
@settings(deadline=None, max_examples=60)
def test_model_stock_is_the_dense_one(stack: Stack, by: Any) -> None:
    close(model_stock(stack, by=by), dense_model_stock(stack, by), stack)


# --- the traps -------------------------------------------------------------------------------------------

PAGE: Any = {"out": 256, "into": 192, "seed": 7, "kind": np.float64}


@pytest.mark.parametrize(
    ("name", "twin"), [("tsv", dense_tsv), ("iso", dense_iso), ("iso_cts", dense_iso_cts), ("svc", dense_svc)]
)
def test_in_float64_the_core_is_the_whole_matrix_to_its_last_digits(name: str, twin: Any) -> None:
    stack = make([4, 4, 4], **PAGE)
    found = METHODS[name].function(stack)
    assert found.up.dtype == np.float64
    close(found, twin(stack), stack, 1e-13)


def full(matrix: Array) -> LowRank:
    """A matrix as a delta of full rank."""
    return LowRank(matrix, np.eye(matrix.shape[1]))


@pytest.mark.parametrize("name", ["tsv", "iso", "iso_cts", "ctm", "svc"])
def test_noise_in_the_null_space_is_no_component(name: str) -> None:
    stack = make([4, 4, 4], **PAGE)
    rng = np.random.default_rng(0)
    noisy = [dense(delta) for delta in stack.deltas]
    noisy = [x + 1e-13 * np.linalg.norm(x) * rng.standard_normal(x.shape) / math.sqrt(x.size) for x in noisy]
    options = {"rule": "linear"} if name == "ctm" else {}
    clean = METHODS[name].function(replace(stack, rank=4), **options)
    found = METHODS[name].function(replace(stack, deltas=tuple(map(full, noisy)), rank=4), **options)
    close(found, dense(clean), stack, 1e-11)


def test_tsv_of_an_adapter_with_itself_is_that_adapter() -> None:
    one = normal(0, 12, 10, 3)
    stack = Stack("fc", (one, one), (0.5, 0.5))
    close(tsv(stack), 0.5 * dense(one), stack)


def test_tsv_of_adapters_that_share_their_first_matrix() -> None:
    first, second = normal(0, 30, 40, 4), normal(1, 30, 40, 4)
    near = LowRank(second.up, (first.down + 0.1 * second.down).astype(np.float32))
    stack = Stack("fc", (first, near), (1.0, 1.0))
    close(tsv(stack), dense_tsv(stack), stack)


def test_iso_puts_all_its_energy_inside_the_span_of_the_factors() -> None:
    stack = make([4, 4, 4], **PAGE)
    found = dense(iso(stack))
    left, _ = np.linalg.qr(np.hstack([delta.up for delta in stack.deltas]))
    right, _ = np.linalg.qr(np.vstack([delta.down for delta in stack.deltas]).T)
    assert np.linalg.norm(left.T @ found @ right) == pytest.approx(np.linalg.norm(found), rel=1e-12)
    values = np.linalg.svd(found, compute_uv=False)
    expected = np.linalg.svd(np.sum(weighted(stack), axis=0), compute_uv=False)[:12].mean()
    np.testing.assert_allclose(values[:12], expected, rtol=1e-12)
    assert values[12] < 1e-12 * expected


@pytest.mark.parametrize("name", ["iso", "iso_cts", "tsv", "pico", "svc", "ctm"])
def test_adapters_that_cancel_leave_nothing_to_blow_up(name: str) -> None:
    one = normal(0, 12, 10, 3)
    options = {"rule": "linear"} if name == "ctm" else {}
    found = METHODS[name].function(Stack("fc", (one, one), (1.0, -1.0)), **options)
    assert np.linalg.norm(dense(found)) <= 1e-6 * np.linalg.norm(dense(one))


@pytest.mark.parametrize("name", ["svc", "pico"])
def test_a_mean_and_a_sum_calibrate_to_one_result(name: str) -> None:
    sum_ = make([4, 4, 4], **PAGE)
    mean = replace(sum_, weights=(1 / 3,) * 3)
    function = METHODS[name].function
    close(function(mean), dense(function(sum_)), sum_, 1e-13)


def test_svc_where_the_bound_acts_depends_on_the_size() -> None:
    stack = make([4, 4], **PAGE)
    halves = dense_svc(stack, 2.0, np.sum(weighted(stack), axis=0) / 2)
    assert np.linalg.norm(halves - dense(svc(stack, floor=2.0))) > 0.1 * np.linalg.norm(halves)


def test_svc_takes_back_what_is_counted_twice_and_keeps_the_ratio_of_weights() -> None:
    one = normal(0, 12, 10, 3)
    twice = Stack("fc", (one, one), (1.0, 1.0))
    close(svc(twice), dense(one), twice)
    apart = (LowRank(np.eye(4, 1), np.eye(1, 5)), LowRank(np.eye(4)[:, 1:2], np.eye(5)[1:2]))
    found = dense(svc(Stack("fc", apart, (0.9, 0.3))))  # no direction in common, and so nothing to take back
    np.testing.assert_allclose(np.diag(found), [1.5, 0.5, 0, 0], atol=1e-12)


def test_pico_leaves_one_adapter_alone_and_has_the_mean_norm() -> None:
    one = make([3], [-0.5])
    close(pico(one), -dense(one.deltas[0]), make([3]))
    stack = make([4, 2, 3], [1.0, 1.0, 2.0])
    first, second, third = (float(np.linalg.norm(dense(delta))) for delta in stack.deltas)
    found = np.linalg.norm(dense(pico(stack)))
    assert found == pytest.approx((first + second + 2 * third) / 4, rel=1e-6)


def regauged(delta: LowRank, seed: int) -> LowRank:
    """The same matrix from other factors."""
    gauge = np.random.default_rng(seed).standard_normal((delta.up.shape[1],) * 2)
    return LowRank(delta.up @ gauge, np.linalg.solve(gauge, delta.down))


@pytest.mark.parametrize("name", [*(n for n in NAMES if n != "pico"), "pico of the delta"])
def test_what_counts_is_the_delta_and_not_how_it_is_factored(name: str) -> None:
    stack = make([4, 3], [1.0, -0.5], kind=np.float64)
    special: dict[str, Any] = {"ctm": {"rule": "linear"}, "pico of the delta": {"basis": "delta"}}
    options = special.get(name, {})
    function = METHODS[name.partition(" ")[0]].function
    other = replace(stack, deltas=tuple(regauged(delta, i) for i, delta in enumerate(stack.deltas)))
    close(function(other, **options), dense(function(stack, **options)), stack, 1e-11)


def test_pico_of_the_delta_is_pico_of_its_columns() -> None:
    stack = make([4, 3], kind=np.float64)
    thin = [svd(dense(delta)) for delta in stack.deltas]
    columns = replace(stack, deltas=tuple(LowRank(u * s, v) for u, s, v in thin))
    close(pico(stack, basis="delta"), dense_pico(columns), stack, 1e-11)


# --- angles ----------------------------------------------------------------------------------------------


def test_slerp_keeps_the_norm_and_meets_its_ends() -> None:
    stack = make([3, 3], kind=np.float64)
    unit = [LowRank(delta.up / np.linalg.norm(dense(delta)), delta.down) for delta in stack.deltas]
    even = replace(stack, deltas=tuple(unit))
    for t in (0.0, 0.25, 0.5, 1.0):
        assert np.linalg.norm(dense(slerp(even, t=t))) == pytest.approx(1.0, rel=1e-12)
    close(slerp(stack, t=0.0), dense(stack.deltas[0]), stack)
    close(slerp(stack, t=1.0), dense(stack.deltas[1]), stack)


@pytest.mark.parametrize("factor", [1.0, -1.0, -0.5, 0.0])
def test_slerp_along_a_line_is_linear(factor: float) -> None:
    one = normal(0, 6, 5, 2)
    stack = Stack("fc", (one, LowRank((factor * one.up).astype(np.float32), one.down)), (1.0, 1.0), (0, 1))
    close(slerp(stack, t=0.25), (0.75 + 0.25 * factor) * dense(one), stack)


def test_slerp_of_a_matrix_that_one_adapter_has() -> None:
    one = normal(0, 6, 5, 2)
    close(slerp(Stack("fc", (one,), (1.0,), (0,)), t=0.25), 0.75 * dense(one), make([1]))
    close(slerp(Stack("fc", (one,), (2.0,), (1,)), t=0.25), 0.5 * dense(one), make([1]))


@pytest.mark.parametrize(("name", "count"), [("slerp", 1), ("slerp", 3), ("model_stock", 1)])
def test_a_number_of_adapters_that_has_no_angle_is_refused(name: str, count: int) -> None:
    with pytest.raises(Unsupported, match=name):
        find(name).settle({}, count)


def corner(*row: float) -> LowRank:
    return LowRank(np.ones((1, 1)), np.array([row]))


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        ((corner(1, 0), corner(1, 0)), [1.0, 0.0]),  # agreement: the mean
        (
            (corner(1, 0), corner(0.5, math.sqrt(0.75))),
            [2 / 3 * 0.75, 2 / 3 * math.sqrt(0.75) / 2],
        ),  # 60 degrees
        ((corner(1, 0), corner(0, 1)), [0.0, 0.0]),  # nothing in common
        ((corner(1, 0), corner(-1, 0)), [0.0, 0.0]),  # cos = -1/(N-1), where the formula has no bound
        ((corner(1, 0), corner(-0.6, 0.8)), [0.0, 0.0]),  # near it
        ((corner(1, 0), corner(-0.5, math.sqrt(0.75)), corner(-0.5, -math.sqrt(0.75))), [0.0, 0.0]),
        ((corner(1, 0), corner(0, 0)), [0.0, 0.0]),  # a zero delta agrees with nobody
    ],
)
@pytest.mark.parametrize("by", ["matrix", "row"])
def test_model_stock_by_hand(deltas: tuple[LowRank, ...], expected: list[float], by: Any) -> None:
    found = dense(model_stock(Stack("fc", deltas, (1.0,) * len(deltas)), by=by))
    np.testing.assert_allclose(found, [expected], atol=1e-12)


# --- what holds of all -----------------------------------------------------------------------------------


def run(name: str, stack: Stack, **options: Any) -> LowRank:
    known = find(name)
    return known.run(stack, **known.settle(options)).delta


@pytest.mark.parametrize("name", NAMES)
def test_zero_deltas_and_zero_weights_give_zeros(name: str) -> None:
    nothing = LowRank(np.zeros((6, 2), np.float32), np.ones((2, 5), np.float32))
    for stack in (Stack("fc", (nothing, nothing), (1.0, 1.0)), make([2, 3], [0.0, 0.0])):
        found = run(name, stack)
        assert found.shape == stack.shape
        assert found.up.shape[1] >= 1
        assert not dense(found).any()


@pytest.mark.parametrize("name", ["tsv", "iso_cts", "svc", "pico", "ctm", "iso"])
def test_a_zero_delta_beside_another_does_no_harm(name: str) -> None:
    one = normal(0, 6, 5, 2)
    nothing = LowRank(np.zeros((6, 2), np.float32), one.down)
    found = run(name, Stack("fc", (one, nothing), (1.0, 1.0), (0, 1)))
    assert np.isfinite(dense(found)).all()
    assert np.linalg.norm(dense(found)) > 0.1 * np.linalg.norm(dense(one))


@pytest.mark.parametrize("name", ["tsv", "ctm"])
def test_one_adapter_alone_stays_what_it_is(name: str) -> None:
    stack = make([3], [0.7])
    options = {"rule": "linear"} if name == "ctm" else {}
    close(run(name, stack, **options), 0.7 * dense(stack.deltas[0]), stack)


@pytest.mark.parametrize("name", NAMES)
def test_the_opposite_weights_give_the_opposite(name: str) -> None:
    stack = make([3, 2], [1.0, -0.5], kind=np.float64)
    options = {"rule": "linear"} if name == "ctm" else {}
    opposite = replace(stack, weights=(-1.0, 0.5))
    close(run(name, opposite, **options), -dense(run(name, stack, **options)), stack, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_large_matrix_is_formed(name: str) -> None:
    import tracemalloc

    stack = make([2, 2], out=6000, into=6000)  # 144 MB in float32
    run(name, stack, **({"rule": "linear"} if name == "ctm" else {}))  # numpy's parts are loaded
    tracemalloc.start()
    try:
        run(name, stack, **({"rule": "linear"} if name == "ctm" else {}))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "slerp"])
def test_a_rank_is_kept_to(name: str) -> None:
    found = run(name, replace(make([4, 3, 2]), rank=3))
    assert found.up.shape[1] == 3
    assert 1 <= np.linalg.matrix_rank(dense(found)) <= 3


# --- the parts -------------------------------------------------------------------------------------------


@given(stacks())
@settings(deadline=None, max_examples=30)
def test_a_frame_holds_every_delta_exactly(stack: Stack) -> None:
    shared = frame(stack.deltas)
    for delta, core in zip(stack.deltas, shared.cores, strict=True):
        assert max(core.shape) <= max(min(n, stack.total_rank) for n in stack.shape)
        close(shared.lift(core, np.eye(core.shape[1])), dense(delta), unweighted(stack))
        np.testing.assert_allclose(shared.coordinates(delta), core, atol=1e-10)


def test_bases_of_full_rank_keep_everything() -> None:
    stack = make([3, 2, 4], kind=np.float64)
    close(ctm(replace(stack, rank=9), rule="linear"), np.sum(weighted(stack), axis=0), stack, 1e-13)


def test_the_tucker_bases_keep_more_than_where_they_start() -> None:
    matrices = [dense(delta) for delta in make([6, 6, 6], kind=np.float64).deltas]

    def kept(left: Array, right: Array) -> float:
        return sum(float(np.sum((left.T @ matrix @ right) ** 2)) for matrix in matrices)

    start = components(np.hstack(matrices)).left[:, :3], components(np.vstack(matrices)).right[:3].T
    left, right = tucker(matrices, 3)
    np.testing.assert_allclose(left.T @ left, np.eye(3), atol=1e-12)
    assert kept(left, right) > kept(*start)
    for side in (left, right):  # nowhere near a direction in which it would rise by more than the tolerance
        assert side.shape[1] == 3
    again = components(np.hstack([matrix @ right for matrix in matrices])).left[:, :3]
    assert kept(again, right) <= kept(left, right) * (1 + 1e-4)


def test_a_polar_factor_shares_a_direction_that_columns_have_in_common() -> None:
    column = np.array([[3.0], [4.0]]) / 5
    np.testing.assert_allclose(polar(np.hstack([column, column])), np.hstack([column, column]) / math.sqrt(2))


# --- a method inside a method ----------------------------------------------------------------------------


def dense_ties(matrices: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    """Trim, elect and average, entry by entry."""
    kept: list[Array] = []
    if not matrices[0].size:
        return matrices[0]
    for matrix, weight in zip(matrices, weights, strict=True):
        sizes = np.sort(np.abs(matrix), axis=None)[::-1]
        kept.append(
            weight * np.where(np.abs(matrix) >= sizes[max(1, int(density * matrix.size)) - 1], matrix, 0.0)
        )
    sign = np.where(np.sum(kept, axis=0) >= 0, 1, -1)
    agree = [part * sign > 0 for part in kept]
    shares = np.sum([abs(weight) * mask for weight, mask in zip(weights, agree, strict=True)], axis=0)
    return np.sum([part * mask for part, mask in zip(kept, agree, strict=True)], axis=0) / np.where(
        shares, shares, 1
    )


@given(stacks(2, 3), st.integers(1, 4), st.sampled_from([0.25, 0.6]), st.sampled_from([0.0, 0.25]))
@settings(deadline=None, max_examples=40)
def test_ctm_of_ties_is_ties_in_its_bases(stack: Stack, rank: int, density: float, beta: float) -> None:
    matrices = weighted(stack)
    norms = [float(np.linalg.norm(x)) for x in matrices]
    level = [
        x * (beta * n + (1 - beta) * np.mean(norms)) / n if n else x
        for x, n in zip(matrices, norms, strict=True)
    ]
    u, v = tucker(level, rank)  # in the coordinates of the weight
    expected = (
        u @ dense_ties([u.T @ dense(delta) @ v for delta in stack.deltas], stack.weights, density) @ v.T
    )
    found = ctm(replace(stack, rank=rank), rule="ties", density=density, beta=beta, scale=0.75)
    close(found, 0.75 * expected, stack)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_svc_and_pico_hand_over_to_ties_in_core_coordinates(density: float) -> None:
    stack = make([4, 3, 2], [1.0, -0.5, 0.7], kind=np.float64)
    merged = METHODS["ties"].function(stack, density=density, space="core")
    close(svc(stack, rule="ties", density=density), dense_svc(stack, 0.1, dense(merged)), stack, 1e-11)
    ups = np.hstack([delta.up for delta in stack.deltas])
    u, s, _ = svd(ups)
    turned = np.eye(len(u)) + u @ np.diag(1 / (1 + 2 * s**2 / np.sum(s**2)) - 1) @ u.T
    calibrated = replace(
        stack, deltas=tuple(LowRank(turned @ delta.up, delta.down) for delta in stack.deltas)
    )
    merged = METHODS["ties"].function(calibrated, density=density, space="core")
    norms = [float(np.linalg.norm(dense(delta))) for delta in stack.deltas]
    length = np.average(norms, weights=np.abs(stack.weights))
    expected = length * dense(merged) / np.linalg.norm(dense(merged))
    close(pico(stack, rule="ties", density=density), expected, stack, 1e-11)


@pytest.mark.parametrize("rule", ["dare", "dare_ties", "della"])
@pytest.mark.parametrize("name", ["ctm", "pico", "svc"])
def test_a_seed_reaches_the_rule(name: str, rule: str) -> None:
    stack = make([4, 3])
    first, again, other = (dense(run(name, stack, rule=rule, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("name", ["ctm", "pico", "svc"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "linear", "density": 0.5}, "linear has no option density"),
        ({"rule": "ties", "seed": 1}, "ties has no option seed"),
        ({"rule": "della", "density": 0.01}, "della: density 0.01"),
        ({"rule": "tsv"}, "none of linear"),
    ],
)
def test_what_the_rule_cannot_do_is_refused_before_the_work(name: str, options: Any, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        find(name).settle(options)


def test_every_rule_that_can_be_named_is_there() -> None:
    for name in ("ctm", "pico", "svc"):
        (rule,) = [option for option in METHODS[name].options if option.name == "rule"]
        assert all(find(choice).name == choice for choice in rule.choices)
