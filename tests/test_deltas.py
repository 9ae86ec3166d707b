"""The mathematics of updates, each against the same thing written out densely in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.deltas.base import Delta, Span
from loratools.deltas.dora import WeightDecomposed
from loratools.deltas.full import Dense, Replacement, Rows
from loratools.deltas.hadamard import Hadamard, tucker
from loratools.deltas.kronecker import Kronecker
from loratools.deltas.lowrank import LowRank, block_diagonal, expert, product
from loratools.deltas.residual import Residual
from loratools.deltas.scaled import Scaled
from loratools.errors import ShapeMismatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratools.dtypes import Array

sizes = st.integers(1, 24)
seeds = st.integers(0, 2**32 - 1)
scalings = st.sampled_from([1.0, 2.0, 0.5, 16 / 6, -0.7, 0.0])
KINDS = ("lowrank", "hadamard", "kronecker", "dense")


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def make(kind: str, out: int, into: int, rank: int, scaling: float, seed: int) -> tuple[Any, Array]:
    """A delta in float32, and the matrix it stands for, formed in float64 from the same values."""
    rng = np.random.default_rng(seed)

    def pair() -> tuple[LowRank, Array]:
        up, down = normal(rng, out, rank), normal(rng, rank, into)
        return LowRank(up, down), up.astype(np.float64) @ down.astype(np.float64)

    if kind == "lowrank":
        delta, dense = pair()
        return LowRank(delta.up, delta.down, scaling), scaling * dense
    if kind == "hadamard":
        (first, one), (second, two) = pair(), pair()
        return Hadamard(first, second, scaling), scaling * one * two
    if kind == "kronecker":
        a, c = next(n for n in (4, 3, 2, 1) if out % n == 0), next(n for n in (3, 2, 1) if into % n == 0)
        left, right = normal(rng, a, c), normal(rng, out // a, into // c)
        return Kronecker(left, right, scaling), scaling * np.kron(left.astype(np.float64), right)
    values = normal(rng, out, into)
    return Dense(values, scaling), scaling * values.astype(np.float64)


def close(actual: Array, dense: Array, whole: Array | None = None) -> None:
    """Equal up to float32's error in sums of a few dozen terms of the size of the whole matrix."""
    assert actual.shape == dense.shape
    assert actual.dtype == np.float32
    scale = np.abs(dense if whole is None else whole).max(initial=0) + 1e-3
    np.testing.assert_allclose(actual, dense, rtol=0, atol=2e-5 * scale)


@st.composite
def spans(draw: Any, length: int) -> Span:
    """A strided range that holds at least one index below ``length``."""
    start = draw(st.integers(0, length - 1))
    return Span(start, draw(st.integers(start + 1, length)), draw(st.integers(1, 3)))


@pytest.mark.parametrize("kind", KINDS)
@given(out=sizes, into=sizes, rank=st.integers(1, 8), scaling=scalings, seed=seeds, data=st.data())
@settings(deadline=None, max_examples=40)
def test_any_rows_of_a_delta(
    kind: str, out: int, into: int, rank: int, scaling: float, seed: int, data: st.DataObject
) -> None:
    delta, dense = make(kind, out, into, rank, scaling, seed)
    assert isinstance(delta, Delta)
    assert delta.shape == (out, into)
    assert delta.rowwise
    start = data.draw(st.integers(0, out - 1))
    stop = data.draw(st.integers(start + 1, out))
    close(delta.rows(start, stop), dense[start:stop], dense)
    buffer = np.full((stop - start, into), np.nan, np.float32)
    close(delta.rows(start, stop, buffer), dense[start:stop], dense)


@pytest.mark.parametrize("kind", KINDS)
@given(out=sizes, into=sizes, scaling=scalings, seed=seeds, data=st.data())
@settings(deadline=None, max_examples=30)
def test_parts_and_transposes_of_a_delta(
    kind: str, out: int, into: int, scaling: float, seed: int, data: st.DataObject
) -> None:
    delta, dense = make(kind, out, into, 3, scaling, seed)
    rows = data.draw(st.none() | spans(out))
    cols = data.draw(st.none() | spans(into))
    wanted = dense[slice(None) if rows is None else rows.slice, slice(None) if cols is None else cols.slice]
    part = delta.part(rows, cols)
    assert part.shape == wanted.shape
    close(part.rows(0, part.shape[0]), wanted, dense)
    turned = part.transposed()
    assert turned.shape == wanted.T.shape
    close(turned.rows(0, turned.shape[0]), wanted.T, dense)


@pytest.mark.parametrize("kind", KINDS)
@given(out=sizes, into=sizes, scaling=scalings, seed=seeds, block=st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_a_delta_applied_block_by_block(
    kind: str, out: int, into: int, scaling: float, seed: int, block: int
) -> None:
    delta, dense = make(kind, out, into, 3, scaling, seed)
    weight = normal(np.random.default_rng(seed + 1), out, into)
    wanted = weight + dense
    found = [delta.apply(weight[i : i + block].copy(), i) for i in range(0, out, block)]
    close(np.concatenate(found), wanted, np.maximum(np.abs(weight), np.abs(dense)))  # the two may cancel


@given(
    rows=st.integers(1, 70),
    rank=st.integers(1, 40),
    columns=st.integers(1, 70),
    seed=seeds,
    out=st.booleans(),
)
@settings(deadline=None)
def test_slivers_are_the_plain_product(rows: int, rank: int, columns: int, seed: int, out: bool) -> None:
    rng = np.random.default_rng(seed)
    up, down = normal(rng, rows, rank), normal(rng, rank, columns)
    buffer = np.empty((rows, columns), np.float32) if out else None
    found = product(up, down, buffer)
    close(found, up.astype(np.float64) @ down)
    if buffer is not None:
        np.testing.assert_array_equal(buffer, found)


@pytest.mark.parametrize(
    ("rows", "rank", "columns"), [(64, 16, 4096), (64, 300, 4096), (8, 16, 512), (36, 16, 2048)]
)
def test_slivers_of_real_sizes_are_the_plain_product(rows: int, rank: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    up, down = normal(rng, rows, rank), normal(rng, rank, columns)
    close(product(up, down), up.astype(np.float64) @ down)
    close(product(up[::2], down), up[::2].astype(np.float64) @ down)


@given(rank=st.integers(1, 6), experts=st.integers(1, 5), out=sizes, into=sizes, seed=seeds)
@settings(deadline=None)
def test_experts_are_packed_as_peft_packs_them(
    rank: int, experts: int, out: int, into: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ups, downs = normal(rng, experts, out, rank), normal(rng, experts, rank, into)
    down = downs.reshape(experts * rank, into)  # expert slowest
    fastest = ups.transpose(1, 2, 0).reshape(out, rank * experts)
    slowest = ups.transpose(1, 0, 2).reshape(out, experts * rank)
    for index in range(experts):
        for packed, blockwise in ((fastest, False), (slowest, True)):
            one, other = expert(packed, down, index, experts, blockwise=blockwise)
            np.testing.assert_array_equal(one, ups[index])
            np.testing.assert_array_equal(other, downs[index])


@given(blocks=st.integers(1, 5), height=st.integers(1, 5), width=st.integers(1, 5), seed=seeds)
def test_block_diagonal_places_the_chunks(blocks: int, height: int, width: int, seed: int) -> None:
    compressed = normal(np.random.default_rng(seed), blocks * height, width)
    found = block_diagonal(compressed, blocks)
    assert found.shape == (blocks * height, blocks * width)
    for i in range(blocks):
        for j in range(blocks):
            cell = found[i * height : (i + 1) * height, j * width : (j + 1) * width]
            chunk = compressed[i * height : (i + 1) * height]
            np.testing.assert_array_equal(cell, chunk if i == j else np.zeros_like(chunk))


@given(
    rank=st.integers(1, 4),
    out=sizes,
    into=sizes,
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=seeds,
)
@settings(deadline=None)
def test_tucker_factors_are_the_contraction(
    rank: int, out: int, into: int, kernel: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    core, left, right = normal(rng, rank, rank, *kernel), normal(rng, rank, out), normal(rng, rank, into)
    up, down = tucker(core, left, right)
    dense = np.einsum("ijkl,ip,jr->prkl", core, left, right, dtype=np.float64).reshape(out, -1)
    close(np.asarray(up @ down), dense)


@given(scaling=st.sampled_from([2.0, 0.25, -4.0, 1.0, 1.5, 0.0]), seed=seeds)
def test_folding_changes_no_bit(scaling: float, seed: int) -> None:
    delta, _ = make("lowrank", 6, 5, 3, scaling, seed)
    np.testing.assert_array_equal(delta.folded().rows(0, 6), delta.rows(0, 6))


def test_factors_that_do_not_meet_are_an_error() -> None:
    with pytest.raises(ShapeMismatch):
        LowRank(np.ones((3, 2)), np.ones((4, 5)))


@given(out=sizes, into=sizes, seed=seeds, transposed=st.booleans(), block=st.integers(1, 9))
@settings(deadline=None)
def test_dora_has_the_norms_it_was_told(out: int, into: int, seed: int, transposed: bool, block: int) -> None:
    rng = np.random.default_rng(seed)
    delta, dense = make("lowrank", out, into, 3, 0.5, seed)
    magnitude, weight = np.abs(normal(rng, out)) + 0.1, normal(rng, out, into)
    wide = weight + dense
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    wanted = magnitude[:, None] * wide / norms
    update: Any = WeightDecomposed(delta, magnitude)
    if transposed:
        turned = update.transposed()
        assert turned.shape == (into, out)
        assert not turned.rowwise
        found = turned.apply(weight.T.copy(), 0).T
    else:
        assert update.rowwise
        blocks = [update.apply(weight[i : i + block].copy(), i) for i in range(0, out, block)]
        found = np.concatenate(blocks)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@given(out=sizes, channels=sizes, kernel=st.integers(1, 9), seed=seeds, inputs=st.booleans())
def test_ia3_scales_rows_or_the_columns_of_a_channel(
    out: int, channels: int, kernel: int, seed: int, inputs: bool
) -> None:
    rng = np.random.default_rng(seed)
    weight = normal(rng, out, channels, kernel)
    factors = normal(rng, channels if inputs else out)
    wanted = weight * (factors[None, :, None] if inputs else factors[:, None, None])
    update = Scaled(factors, inputs, (factors.size, factors.size)).fitted((out, channels * kernel))
    flat = weight.reshape(out, -1)
    np.testing.assert_array_equal(update.apply(flat.copy(), 0), wanted.reshape(out, -1))
    last = out // 2
    np.testing.assert_array_equal(update.apply(flat[last:].copy(), last), wanted.reshape(out, -1)[last:])
    np.testing.assert_array_equal(update.transposed().apply(flat.T.copy(), 0), wanted.reshape(out, -1).T)


@pytest.mark.parametrize(
    ("factors", "inputs", "shape"), [(4, True, (3, 6)), (4, False, (8, 6)), (0, True, (2, 2))]
)
def test_ia3_factors_that_do_not_fit_are_an_error(factors: int, inputs: bool, shape: tuple[int, int]) -> None:
    with pytest.raises(ShapeMismatch):
        Scaled(np.ones(factors, np.float32), inputs, (factors, factors)).fitted(shape)


def _pissa(weight: Array, rank: int, scaling: float) -> Array:
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def _kasa(weight: Array, rank: int, scaling: float) -> Array:
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    kept = len(s) - rank
    return (u[:, kept:] * s[kept:]) @ v[kept:]


def _olora(weight: Array, rank: int, scaling: float) -> Array:
    q, r = np.linalg.qr(weight)
    return scaling * q[:, :rank] @ r[:rank]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
@pytest.mark.parametrize(("method", "taken"), [("pissa", _pissa), ("kasa", _kasa), ("olora", _olora)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_residual_is_the_weight_without_its_part(
    method: Any, taken: Callable[..., Array], shape: tuple[int, int], transposed: bool
) -> None:
    rng = np.random.default_rng(sum(shape))
    weight = normal(rng, *shape)
    delta = LowRank(normal(rng, shape[0], 3), normal(rng, 3, shape[1]), 1.5)
    dense = 1.5 * delta.up.astype(np.float64) @ delta.down
    update: Any = Residual(delta, method, 3, 1.5)
    assert not update.rowwise
    if transposed and method == "olora":  # decomposed as it is stored
        stored = weight.T.astype(np.float64)
        wanted = (stored - taken(stored, 3, 1.5)).T + dense
    else:
        wanted = weight - taken(weight.astype(np.float64), 3, 1.5) + dense
    found = update.transposed().apply(weight.T.copy(), 0).T if transposed else update.apply(weight.copy(), 0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@given(rows=st.integers(2, 20), columns=sizes, seed=seeds, block=st.integers(1, 9), data=st.data())
def test_replaced_rows_and_tensors_block_by_block(
    rows: int, columns: int, seed: int, block: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    weight, whole = normal(rng, rows, columns), normal(rng, rows, columns)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), unique=True))
    values = normal(rng, len(chosen), columns)
    wanted = weight.copy()
    wanted[chosen] = values
    update = Rows(np.asarray(chosen, np.int64), values, (rows, columns))
    replaced = Replacement(lambda start, stop: whole[start:stop], (rows, columns))
    starts = range(0, rows, block)
    found = np.concatenate([update.apply(weight[i : i + block].copy(), i) for i in starts])
    np.testing.assert_array_equal(found, wanted)
    found = np.concatenate([replaced.apply(weight[i : i + block].copy(), i) for i in starts])
    np.testing.assert_array_equal(found, whole)
