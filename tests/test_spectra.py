"""Singular values of dense matrices, truncations, and the certificate that says how good they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.deltas import spectra
from loratools.deltas.spectra import exact, randomized, sketch
from loratools.deltas.streams import Streamed
from loratools.errors import NonFinite


def matrix(
    shape: tuple[int, int], values: np.ndarray, seed: int = 0, noise: float = 0.0, kind: type = np.float32
) -> np.ndarray:
    """A matrix with these singular values, and white noise on top."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((shape[0], len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], len(values))))[0]
    return ((left * values) @ right.T + noise * rng.standard_normal(shape)).astype(kind)


def truth(given_matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(given_matrix.astype(np.float64), compute_uv=False)


def loss(given_matrix: np.ndarray, made: spectra.Approximation) -> np.ndarray:
    """D - up @ down in float64."""
    return given_matrix.astype(np.float64) - made.up.astype(np.float64) @ made.down.astype(np.float64)


SHAPES = [(400, 300), (300, 700), (900, 280)]
DECAYS = {
    "signal and noise": lambda n: (np.geomspace(1, 0.05, min(40, n)), 3e-4),
    "slow decay": lambda n: (1 / np.arange(1.0, n + 1), 0.0),
    "flat": lambda n: (np.ones(n), 0.0),
    "steep": lambda n: (10.0 ** -np.arange(0, 12, 0.25)[:n], 0.0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rank", [4, 24])
def test_what_is_said_of_a_truncation_is_true(shape: tuple[int, int], decay: str, rank: int) -> None:
    values, noise = DECAYS[decay](min(shape))
    given_matrix = matrix(shape, values, noise=noise)
    made = randomized(given_matrix, rank, seed=5)
    found, lost = truth(given_matrix), loss(given_matrix, made)
    best = float(np.sqrt((found[rank:] ** 2).sum()))
    rounding = 3e-7 * float(np.linalg.norm(given_matrix))
    assert made.residual == pytest.approx(np.linalg.norm(lost), rel=1e-5, abs=rounding)
    assert made.norm == pytest.approx(np.linalg.norm(given_matrix.astype(np.float64)), rel=1e-6)
    assert made.spectral_bound >= np.linalg.norm(lost, 2) - rounding
    assert made.optimality >= made.residual / (best + rounding) * (1 - 1e-6)
    assert made.residual <= 1.001 * best + rounding


@pytest.mark.parametrize("shape", SHAPES)
def test_the_certificate_says_something_where_a_signal_stands_out(shape: tuple[int, int]) -> None:
    made = randomized(matrix(shape, np.geomspace(1, 0.1, 16), noise=3e-4), 16, seed=5)
    assert made.optimality < 1.5
    made = randomized(matrix(shape, np.geomspace(1, 0.1, 40), noise=3e-4), 20, seed=5)
    assert made.optimality < 1.01


@given(
    st.integers(257, 420), st.integers(257, 420), st.integers(1, 20), st.integers(0, 3), st.integers(0, 2**32)
)
@settings(max_examples=25, deadline=None)
def test_the_certificate_holds_for_a_poor_approximation_too(
    rows: int, columns: int, rank: int, extra: int, seed: int
) -> None:
    given_matrix = matrix((rows, columns), np.arange(1.0, 257.0) ** -0.5, seed % 1000)
    made = randomized(given_matrix, rank, seed=seed, extra=extra, iterations=1)
    found, lost = truth(given_matrix), loss(given_matrix, made)
    best = float(np.sqrt((found[rank:] ** 2).sum()))
    assert np.linalg.norm(lost) / best <= made.optimality * (1 + 1e-6)
    assert made.spectral_bound >= np.linalg.norm(lost, 2) * (1 - 1e-6)
    assert found[: len(made.values)] == pytest.approx(
        np.maximum(made.values, found[: len(made.values)]), rel=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_low_rank_comes_back(shape: tuple[int, int]) -> None:
    given_matrix = matrix(shape, np.geomspace(3, 0.01, 12))
    made = randomized(given_matrix, 12, seed=1)
    assert np.linalg.norm(loss(given_matrix, made)) <= 1e-6 * np.linalg.norm(given_matrix)
    double = matrix(shape, np.geomspace(3, 1e-7, 12), kind=np.float64)
    made = randomized(double, 12, seed=1)
    assert made.up.dtype == np.float64
    assert np.linalg.norm(double - made.up @ made.down) <= 1e-13 * np.linalg.norm(double)


def test_factors_are_balanced_and_sorted() -> None:
    given_matrix = matrix((500, 400), np.geomspace(5, 1, 30), noise=1e-3)
    made = randomized(given_matrix, 10, seed=3)
    values = np.diag(made.values[:10])
    assert (np.diff(made.values) <= 0).all()
    assert made.up.T @ made.up == pytest.approx(values, abs=2e-5)
    assert made.down @ made.down.T == pytest.approx(values, abs=2e-5)
    assert made.values[:10] == pytest.approx(truth(given_matrix)[:10], rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_very_small_and_very_large_values_change_nothing_but_the_scale(scale: float) -> None:
    plain = matrix((400, 300), np.geomspace(1, 0.1, 40), noise=3e-4)
    here, there = (randomized(plain * np.float32(s), 8, seed=2) for s in (1.0, scale))
    assert there.values / scale == pytest.approx(here.values, rel=1e-4)
    assert there.optimality == pytest.approx(here.optimality, rel=1e-3)
    assert there.residual / scale == pytest.approx(here.residual, rel=1e-5)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (260, 500), (1, 4), (3, 3)])
def test_exact_is_exact(shape: tuple[int, int], kind: type) -> None:
    given_matrix = np.random.default_rng(0).standard_normal(shape).astype(kind)
    found = exact(given_matrix)
    assert found.complete
    assert found.values == pytest.approx(truth(given_matrix), rel=1e-6)
    rank = max(1, min(shape) // 2)
    made = found.truncate(rank)
    assert made.optimality == 1.0
    best = np.sqrt((truth(given_matrix)[rank:] ** 2).sum())
    assert np.linalg.norm(loss(given_matrix, made)) <= best * (1 + 1e-6) + 1e-6
    whole = found.truncate(min(shape))
    assert whole.up @ whole.down == pytest.approx(given_matrix, abs=1e-5)


def test_a_small_matrix_is_decomposed_exactly_and_a_large_one_is_not() -> None:
    small, large = np.eye(20, dtype=np.float32), matrix((600, 500), np.ones(80))
    assert sketch(small, 4, seed=0).complete
    found = sketch(large, 40, seed=0)
    assert not found.complete
    assert found.remainder == pytest.approx(np.sqrt(40), rel=1e-3)


def test_the_switch_from_gram_matrices_to_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    given_matrix = matrix((500, 400), np.geomspace(1, 0.01, 60), noise=1e-4)
    by_gram = randomized(given_matrix, 16, seed=4)
    monkeypatch.setattr(spectra, "_GRAM_CONDITION", 0.0)
    by_qr = randomized(given_matrix, 16, seed=4)
    assert by_qr.values[:16] == pytest.approx(by_gram.values[:16], rel=1e-5)
    assert by_qr.residual == pytest.approx(by_gram.residual, rel=1e-5)
    # Columns that a Gram matrix cannot tell apart in float64 still span what they span.
    columns = np.random.default_rng(0).standard_normal((300, 5)) * 10.0 ** -np.arange(0, 15, 3)
    columns = columns @ np.random.default_rng(1).standard_normal((5, 5))
    monkeypatch.undo()
    q, triangle = spectra._orthonormal(columns)
    assert q.T @ q == pytest.approx(np.eye(5), abs=1e-12)
    assert q @ triangle == pytest.approx(columns, abs=1e-12)


def test_the_seed_decides_every_bit() -> None:
    given_matrix = matrix((400, 300), np.geomspace(1, 0.1, 40), noise=1e-3)
    first, again, other = (randomized(given_matrix, 8, seed=s) for s in (b"one", b"one", 7))
    assert first.up.tobytes() == again.up.tobytes()
    assert first.down.tobytes() == again.down.tobytes()
    assert first.up.tobytes() != other.up.tobytes()


def test_nothing_and_what_is_no_number() -> None:
    made = randomized(np.zeros((400, 300), np.float32), 4, seed=0)
    assert not made.up.any()
    assert (made.norm, made.residual, made.optimality) == (0.0, 0.0, 1.0)
    for size in (40, 400):
        bad = np.ones((size, size), np.float32)
        bad[3, 5] = np.nan
        with pytest.raises(NonFinite):
            randomized(bad, 4, seed=0)


def test_a_rank_of_zero_loses_everything() -> None:
    given_matrix = matrix((400, 300), np.geomspace(1, 0.1, 40))
    made = sketch(given_matrix, 30, seed=0).truncate(0)
    assert made.rank == 0
    assert made.residual == pytest.approx(made.norm)


@pytest.mark.parametrize("shape", [(9000, 280), (300, 400), (3000, 200), (100, 90)])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_matrix_made_a_few_rows_at_a_time_is_the_same_matrix(shape: tuple[int, int], kind: type) -> None:
    held = matrix(shape, np.geomspace(1, 0.05, 40), noise=3e-4, kind=kind)
    buffer = np.empty(shape, kind)
    largest = 0

    def rows(start: int, stop: int) -> np.ndarray:
        nonlocal largest
        largest = max(largest, stop - start)
        buffer[: stop - start] = held[start:stop]
        return buffer[: stop - start]

    streamed = Streamed(shape, held.dtype, rows)
    here, there = (randomized(one, 8, seed=6) for one in (held, streamed))
    assert largest <= max(1, (1 << 19) // shape[1])
    assert there.values[:8] == pytest.approx(here.values[:8], rel=1e-5)
    assert there.residual == pytest.approx(here.residual, rel=1e-5)
    assert there.residual == pytest.approx(np.linalg.norm(loss(held, there)), rel=1e-4)
    assert there.optimality == pytest.approx(here.optimality, rel=1e-2)
