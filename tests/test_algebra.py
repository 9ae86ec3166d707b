"""The algebra of factors against dense float64: every result is what the matrices themselves would give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loratools.deltas.algebra import (
    add,
    angles,
    core,
    distance,
    factored,
    inner,
    norm,
    overlap,
    singular_values,
)
from loratools.deltas.full import Dense
from loratools.deltas.hadamard import Hadamard
from loratools.deltas.kronecker import Kronecker
from loratools.deltas.likeness import compare
from loratools.deltas.lowrank import LowRank
from loratools.errors import ShapeMismatch, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratools.deltas.base import Delta


def dense(delta: Delta) -> np.ndarray:
    """The matrix itself, in float64, from each kind's own definition."""
    if isinstance(delta, LowRank):
        return delta.scaling * delta.up.astype(np.float64) @ delta.down.astype(np.float64)
    if isinstance(delta, Hadamard):
        return delta.scaling * dense(delta.first) * dense(delta.second)
    if isinstance(delta, Kronecker):
        return delta.scaling * np.kron(delta.left.astype(np.float64), delta.right.astype(np.float64))
    assert isinstance(delta, Dense)
    return delta.scaling * delta.values.astype(np.float64)


@st.composite
def low_ranks(draw: Any, shape: tuple[int, int] | None = None, kind: Any = None) -> LowRank:
    """A delta of any small shape and rank, its columns of sizes that differ by up to a million, some of them zero."""
    out, into = shape or (draw(st.integers(1, 24)), draw(st.integers(1, 24)))
    rank, seed = draw(st.integers(0, 30)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-draw(st.sampled_from([0, 3, 6])), 0, rank)
    sizes *= rng.random(rank) >= draw(st.sampled_from([0, 0.3, 1.0]))
    kind = kind or draw(st.sampled_from([np.float32, np.float64]))
    up, down = rng.standard_normal((out, rank)) * sizes, rng.standard_normal((rank, into))
    if draw(st.booleans()) and rank > 1:  # a column that nearly repeats another
        up[:, -1] = up[:, 0] * (1 + 1e-7 * rng.standard_normal())
    return LowRank(up.astype(kind), down.astype(kind), draw(st.sampled_from([1.0, 0.5, 1.7, -2.0])))


@given(low_ranks())
def test_singular_values_and_truncations_are_those_of_the_matrix(delta):
    wanted = dense(delta)
    found = core(delta)
    values = np.linalg.svd(wanted, compute_uv=False)
    size = np.linalg.norm(wanted) + 1e-300
    np.testing.assert_allclose(singular_values(delta), found.values, rtol=0, atol=1e-6 * size)
    assert found.values.size == min(delta.up.shape[1], *delta.shape)
    np.testing.assert_allclose(found.values, values[: found.values.size], rtol=0, atol=1e-6 * size)
    for rank in {0, 1, found.values.size // 2, found.values.size}:
        kept = found.truncate(rank)
        assert kept.up.shape == (delta.shape[0], rank)
        error = np.linalg.norm(dense(kept) - wanted)
        best = np.linalg.norm(values[rank:])
        assert abs(error - best) <= 1e-6 * size
        assert abs(found.tail(rank) - best) <= 1e-6 * size


@given(low_ranks())
def test_singular_vectors_are_orthonormal_and_give_the_matrix_back(delta):
    found = core(delta)
    kept = int(np.count_nonzero(found.values > 1e-7 * (found.values[:1].sum())))
    left, right = found.left(kept), found.right(kept)
    np.testing.assert_allclose(left.T @ left, np.eye(kept), atol=1e-6)
    np.testing.assert_allclose(right @ right.T, np.eye(kept), atol=1e-6)
    again = (left * found.values[:kept]) @ right
    assert np.linalg.norm(again - dense(delta)) <= 1e-5 * np.linalg.norm(dense(delta))


def test_a_truncation_beyond_the_rank_is_padded_with_zeros():
    delta = LowRank(np.ones((6, 2)), np.arange(8.0).reshape(2, 4))
    padded = core(delta).truncate(5)
    assert padded.up.shape == (6, 5)
    assert not padded.up[:, 2:].any()
    np.testing.assert_allclose(dense(padded), dense(delta))


@given(st.data(), st.lists(st.integers(-200, 200).map(lambda n: n / 100), min_size=1, max_size=4))
def test_a_sum_is_the_sum(data, weights):
    shape = (data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16)))
    deltas = [data.draw(low_ranks(shape)) for _ in weights]
    found = add(list(zip(weights, deltas, strict=True)))
    wanted = sum(w * dense(d) for w, d in zip(weights, deltas, strict=True))
    scale = sum(
        abs(w) * np.linalg.norm(d.up) * np.linalg.norm(d.down) * 2
        for w, d in zip(weights, deltas, strict=True)
    )
    assert np.linalg.norm(dense(found) - wanted) <= 1e-6 * scale


@given(st.data())
def test_products_norms_and_distances(data):
    shape = (data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16)))
    a, b = data.draw(low_ranks(shape)), data.draw(low_ranks(shape))
    x, y = dense(a), dense(b)
    sizes = np.linalg.norm(x) + np.linalg.norm(y)
    found = compare(a, b)
    assert abs(found.norm_a - np.linalg.norm(x)) <= 1e-6 * sizes
    assert abs(found.norm_b - np.linalg.norm(y)) <= 1e-6 * sizes
    assert abs(found.inner - np.vdot(x, y)) <= 1e-6 * sizes**2
    assert abs(found.distance - np.linalg.norm(x - y)) <= 1e-6 * sizes
    assert abs(inner(a, b) - np.vdot(x, y)) <= 1e-6 * sizes**2
    assert abs(norm(a) - np.linalg.norm(x)) <= 1e-6 * sizes
    assert abs(distance(a, b) - found.distance) <= 1e-6 * sizes


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1e-7, 1e-10]), st.booleans())
def test_a_small_distance_has_its_own_digits(seed, step, rotated):
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((20, 3)), rng.standard_normal((3, 15))
    change_up, change_down = rng.standard_normal((20, 3)) * step, rng.standard_normal((3, 15)) * step
    other = LowRank(up + change_up, down + change_down)
    wanted = np.linalg.norm(change_up @ down + up @ change_down + change_up @ change_down)
    if rotated:
        turn = rng.standard_normal((3, 3)) + 4 * np.eye(3)
        other = LowRank(other.up @ turn, np.linalg.solve(turn, other.down))
    for found in (distance(LowRank(up, down), other), compare(LowRank(up, down), other).distance):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-13 * np.linalg.norm(up @ down))


def test_the_same_update_in_rotated_factors_is_at_no_distance():
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((40, 4)), rng.standard_normal((4, 30))
    turn = rng.standard_normal((4, 4))
    a, b = LowRank(up, down), LowRank(up @ turn, np.linalg.inv(turn) @ down)
    assert max(distance(a, b), compare(a, b).distance) <= 1e-12 * norm(a)
    assert compare(a, a).distance == 0
    assert distance(a, a) <= 1e-14 * norm(a)


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]), st.sampled_from([1.0, -0.3]))
def test_hadamard_and_kronecker_products_have_factors(seed, kind, scaling):
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(kind)

    first, second = LowRank(draw(9, 2), draw(2, 12)), LowRank(draw(9, 3), draw(3, 12), 2.0)
    for delta in (
        Hadamard(first, second, scaling),
        Kronecker(draw(3, 4), draw(5, 2) @ draw(2, 6), scaling),
        Dense(draw(5, 7), scaling),
        Dense(draw(7, 5), scaling),
    ):
        found = factored(delta)
        wanted = dense(delta)
        assert found.scaling == 1.0
        assert np.linalg.norm(dense(found) - wanted) <= 1e-6 * np.linalg.norm(wanted)
    assert factored(Hadamard(first, second, 1.0)).up.shape[1] == 6
    thin = (draw(5, 2).astype(np.float64) @ draw(2, 6)).astype(np.float64)
    assert factored(Kronecker(draw(3, 4).astype(np.float64), thin, 1.0)).up.shape[1] == 6  # 3 x 2


def test_the_switch_to_qr_is_where_gram_matrices_lose_too_much(monkeypatch):
    """Factors whose columns nearly agree: squared, their differences would be gone."""
    from loratools.deltas import algebra

    called: list[str] = []
    by_qr = algebra._by_qr
    monkeypatch.setattr(algebra, "_by_qr", lambda *given: called.append("qr") or by_qr(*given))
    rng = np.random.default_rng(0)
    base = rng.standard_normal((60, 1))
    for gap, expected in ((1e-1, 0), (1e-7, 1)):
        called.clear()
        up = base + gap * rng.standard_normal((60, 4))
        down = rng.standard_normal((4, 50))
        found = core(LowRank(up, down)).values
        wanted = np.linalg.svd(up @ down, compute_uv=False)[:4]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert len(called) == expected


def test_factors_of_very_different_sizes_need_no_qr(monkeypatch):
    from loratools.deltas import algebra

    monkeypatch.setattr(algebra, "_by_qr", lambda *given: pytest.fail("a QR decomposition was needed"))
    rng = np.random.default_rng(0)
    sizes = 10.0 ** np.arange(0, -8, -1)
    up, down = rng.standard_normal((60, 8)) * sizes, rng.standard_normal((8, 50))
    wanted = np.linalg.svd(up @ down, compute_uv=False)[:8]
    np.testing.assert_allclose(core(LowRank(up, down)).values, wanted, rtol=1e-6)


def test_overlap_is_one_within_a_subspace_and_its_null_value_between_random_ones():
    rng = np.random.default_rng(0)
    n, i, j = 400, 4, 10
    a = core(LowRank(rng.standard_normal((n, i)), rng.standard_normal((i, 50))))
    shares = []
    for _ in range(40):
        b = core(LowRank(rng.standard_normal((n, j)), rng.standard_normal((j, 50))))
        shares.append(overlap(a, b, i, j))
    assert np.mean(shares) == pytest.approx(max(i, j) / n, rel=0.15)
    assert overlap(a, a, i, i) == pytest.approx(1)
    assert overlap(a, a, 2, 4, "right") == pytest.approx(1)


def test_principal_angles_of_planes_turned_by_a_known_angle():
    turn = 0.3
    x = np.eye(6)[:, :2]
    y = np.stack([np.eye(6)[0], np.cos(turn) * np.eye(6)[1] + np.sin(turn) * np.eye(6)[2]], axis=1)
    weights = np.diag([2.0, 1.0])
    a, b = core(LowRank(x @ weights, np.eye(2, 9))), core(LowRank(y @ weights, np.eye(2, 9)))
    np.testing.assert_allclose(angles(a, b, 2, 2), [0, turn], atol=1e-7)


@pytest.mark.parametrize("operation", [inner, compare, distance, lambda a, b: add([(1, a), (1, b)])])
def test_shapes_that_differ_are_refused(operation: Callable[[LowRank, LowRank], Any]):
    with pytest.raises(ShapeMismatch):
        operation(LowRank(np.ones((3, 1)), np.ones((1, 4))), LowRank(np.ones((4, 1)), np.ones((1, 3))))


def test_what_has_no_factors_says_so():
    with pytest.raises(Unsupported, match="no factors"):
        factored(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no shape"):
        add([])


@given(low_ranks(kind=np.float32))
def test_factors_come_out_in_the_type_they_came_in(delta):
    assume(delta.up.shape[1])
    assert core(delta).truncate(1).up.dtype == np.float32
    assert add([(0.3, delta), (1, delta)]).up.dtype == np.float32


@pytest.mark.parametrize("gap", [1.0, 1e-7, 0.0], ids=["grams", "qr", "padding"])
def test_torch_gives_what_numpy_gives(gap):
    """The long products are formed where the factors lie; here, by torch on the processor."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((60, 5)).astype("f4"), rng.standard_normal((5, 50)).astype("f4")
    up[:, 1:] = up[:, :1] + gap * up[:, 1:] if gap else 0
    wanted = core(LowRank(up, down))
    found = core(LowRank(torch.from_numpy(up), torch.from_numpy(down)))
    size = float(wanted.values[0])
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-6 * size)
    kept = found.truncate(3)
    assert isinstance(kept.up, np.ndarray)
    assert np.linalg.norm(dense(kept) - dense(wanted.truncate(3))) <= 1e-5 * size
