"""Methods that work entry by entry against the same rules on dense float64 matrices, and the registry they stand in."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.deltas.lowrank import LowRank
from loratools.errors import Unsupported
from loratools.methods import METHODS, find, method
from loratools.methods import elementwise as passes
from loratools.methods.base import Approximation, Between, Stack
from loratools.methods.spaces import coordinates
from loratools.methods.sparse import breadcrumbs, dare, della, knots, magnitude_prune, sce, ties

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.dtypes import Array

SPACES = ("weight", "core", "knots")
SPARSE = ("ties", "dare", "dare_ties", "della", "breadcrumbs", "magnitude_prune", "sce")


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
    return delta.up.astype(np.float64) @ delta.down.astype(np.float64) * delta.scaling


def delta_of(found: LowRank | Approximation) -> LowRank:
    return found.delta if isinstance(found, Approximation) else found


def size(stack: Stack) -> float:
    """Σ |wᵢ| ‖ΔWᵢ‖: what errors are measured by."""
    pairs = zip(stack.weights, stack.deltas, strict=True)
    return sum(abs(weight) * float(np.linalg.norm(dense(delta))) for weight, delta in pairs)


# --- the rules, densely ------------------------------------------------------------------------------------


def in_space(stack: Stack, space: str) -> tuple[list[Array], Array, Array]:
    """The deltas' coordinates, and what takes them back: left @ X @ right."""
    deltas = [dense(delta) for delta in stack.deltas]
    out, into = stack.shape
    if space == "weight":
        return deltas, np.eye(out), np.eye(into)
    if space == "knots":
        left, values, _ = np.linalg.svd(np.hstack(deltas), full_matrices=False)
        left = left[:, values > 1e-12 * values[0]]
        return [left.T @ delta for delta in deltas], left, np.eye(into)
    ups = np.hstack([delta.up.astype(np.float64) for delta in stack.deltas])
    downs = np.vstack([delta.down.astype(np.float64) for delta in stack.deltas])
    left, right = np.linalg.svd(ups, full_matrices=False)[0], np.linalg.svd(downs, full_matrices=False)[2]
    return [left.T @ delta @ right.T for delta in deltas], left, right


def trimmed(values: Array, density: float) -> Array:
    kept = max(1, int(density * values.size))
    least = np.sort(np.abs(values), axis=None)[-kept]
    return np.where(np.abs(values) >= least, values, 0.0)


def elected(parts: Sequence[Array], weights: Sequence[float], *, mean: bool = True) -> Array:
    weighted = [weight * part for weight, part in zip(weights, parts, strict=True)]
    plus = sum(weighted) >= 0
    total, count = np.zeros_like(parts[0]), np.zeros_like(parts[0])
    for weight, part in zip(weights, weighted, strict=True):
        agrees = (part > 0) & plus | (part < 0) & ~plus
        total[agrees] += part[agrees]
        count[agrees] += abs(weight)
    return total / np.where(count > 0, count, 1) if mean else total


def summed(parts: Sequence[Array], weights: Sequence[float]) -> Array:
    return sum((w * part for w, part in zip(weights, parts, strict=True)), np.zeros_like(parts[0]))


def uniform(stack: Stack, index: int, shape: tuple[int, ...]) -> Array:
    return stack.generator(index, 7).random(shape, np.float32)


def dropped(stack: Stack, parts: Sequence[Array], density: float) -> list[Array]:
    return [part * (uniform(stack, i, part.shape) < density) / density for i, part in enumerate(parts)]


def dense_ties(stack: Stack, parts: list[Array]) -> Array:
    return 1.5 * elected([trimmed(part, 0.3) for part in parts], stack.weights)


def dense_dare(stack: Stack, parts: list[Array]) -> Array:
    return summed(dropped(stack, parts, 0.6), stack.weights)


def dense_dare_ties(stack: Stack, parts: list[Array]) -> Array:
    return elected(dropped(stack, parts, 0.6), stack.weights, mean=False)


def dense_della(stack: Stack, parts: list[Array]) -> Array:
    kept = []
    for i, part in enumerate(parts):
        columns = part.shape[1]
        ranks = np.argsort(np.argsort(np.abs(part), axis=1, kind="stable"), axis=1)
        chance = 0.6 + (2 * 0.1 * ranks / (columns - 1) - 0.1 if columns > 1 else 0 * ranks)
        kept.append(np.where(uniform(stack, i, part.shape) < chance, part / chance, 0.0))
    return elected(kept, stack.weights)


def dense_breadcrumbs(stack: Stack, parts: list[Array]) -> Array:
    kept = []
    for part in parts:
        falling = np.sort(np.abs(part), axis=None)[::-1]
        top, count = int(0.1 * part.size), max(1, int(0.5 * part.size))
        low = falling[min(top + count, part.size) - 1]
        high = falling[top - 1] if top else np.inf
        kept.append(np.where((np.abs(part) >= low) & (np.abs(part) < high), part, 0.0))
    return summed(kept, stack.weights)


def dense_prune(stack: Stack, parts: list[Array]) -> Array:
    return summed([trimmed(part, 0.4) for part in parts], stack.weights)


def dense_sce(stack: Stack, parts: list[Array]) -> Array:
    weighted = [weight * part for weight, part in zip(stack.weights, parts, strict=True)]
    variance = np.var(weighted, axis=0)
    if np.count_nonzero(variance):
        kept = max(1, int(0.5 * np.count_nonzero(variance)))
        weighted = [np.where(variance >= np.sort(variance, axis=None)[-kept], y, 0.0) for y in weighted]
    energies = [np.mean(y**2) for y in weighted]
    shares = [energy / sum(energies) if sum(energies) else 0.0 for energy in energies]
    plus = sum(weighted) >= 0
    total, count = np.zeros_like(parts[0]), np.zeros_like(parts[0])
    for share, y in zip(shares, weighted, strict=True):
        agrees = np.where(plus, y > 0, y < 0)
        total += share * np.where(agrees, y, 0.0)
        count += share * agrees
    return total / np.where(count > 0, count, 1)


TWINS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ties": (dense_ties, {"density": 0.3, "scale": 1.5}),
    "dare": (dense_dare, {"density": 0.6, "seed": 7}),
    "dare_ties": (dense_dare_ties, {"density": 0.6, "seed": 7, "normalize": False}),
    "della": (dense_della, {"density": 0.6, "epsilon": 0.1, "seed": 7}),
    "breadcrumbs": (dense_breadcrumbs, {"density": 0.5, "gamma": 0.1}),
    "magnitude_prune": (dense_prune, {"density": 0.4}),
    "sce": (dense_sce, {"density": 0.5}),
}


@st.composite
def stacks(draw: Any) -> Stack:
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    weight = st.sampled_from([1.0, 0.5, 0.7, -1.0, 2.0, 0.1, 0.0])
    weights = draw(st.lists(weight, min_size=len(ranks), max_size=len(ranks)))
    out, into = draw(st.integers(2, 30)), draw(st.integers(2, 30))
    kind = draw(st.sampled_from([np.float32, np.float64]))
    return make(ranks, weights, out=out, into=into, seed=draw(st.integers(0, 2**20)), kind=kind,
                rank=min(out, into))  # fmt: skip


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", SPARSE)
@given(stack=stacks())
@settings(max_examples=25, deadline=None)
def test_a_rule_is_the_rule_on_dense_matrices(name: str, space: str, stack: Stack) -> None:
    twin, options = TWINS[name]
    parts, left, right = in_space(stack, space)
    if name == "della" and space == "core" and sum(d.up.shape[1] for d in stack.deltas) > min(stack.shape):
        return  # a basis as wide as the matrix has rows of rounding, whose ranks mean nothing
    if name in {"dare", "dare_ties", "della"} and coordinates(stack, space).deltas[0].shape != parts[0].shape:
        return  # the same for the masks: the two cut off different directions of rounding
    expected = left @ twin(stack, parts) @ right
    found = METHODS[name].run(stack, **METHODS[name].settle({**options, "space": space}))
    scale = max(size(stack), float(np.linalg.norm(expected)))
    assert np.linalg.norm(dense(found.delta) - expected) <= 1e-6 * scale
    assert found.error <= 1e-6 * scale


@pytest.mark.parametrize("name", SPARSE)
def test_large_matrices_are_computed_in_the_type_of_their_factors(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threshold lies between values, so that float32 decides as float64 does."""
    monkeypatch.setattr(passes, "_SMALL", 0)
    stack = make([3, 2, 4], [1.0, 0.5, -0.7], out=40, into=30, rank=30)
    twin, options = TWINS[name]
    expected = twin(stack, [dense(delta) for delta in stack.deltas])
    found = METHODS[name].run(stack, **METHODS[name].settle(options))
    assert coordinates(stack, "weight").deltas[0].up.dtype == np.float32
    assert np.linalg.norm(dense(found.delta) - expected) <= 1e-6 * size(stack)


@pytest.mark.parametrize("name", SPARSE)
def test_blocks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make([3, 2, 4], [1.0, 0.5, -0.7], out=37, into=19, rank=19)
    options = METHODS[name].settle(TWINS[name][1])
    whole = METHODS[name].run(stack, **options)
    monkeypatch.setattr(passes, "_BLOCK", 60)
    assert len(list(passes.spans(stack.shape))) > 5
    pieces = METHODS[name].run(stack, **options)
    np.testing.assert_allclose(dense(pieces.delta), dense(whole.delta), rtol=0, atol=1e-6 * size(stack))


# --- what the papers and known traps say -----------------------------------------------------------------------


def test_ties_by_hand() -> None:
    """Half of four entries each; the signs' sums are 4 - 1, -3 + 0, 0, 2; where both agree, their mean."""
    one = LowRank(np.eye(2), np.array([[4.0, -3.0], [0.5, 1.0]]))
    two = LowRank(np.eye(2), np.array([[-2.0, 1.0], [-1.5, 3.0]]))
    stack = Stack("fc", (one, two), (1.0, 1.0), rank=2)
    np.testing.assert_allclose(
        dense(delta_of(ties(stack, density=0.5))), [[4.0, -3.0], [0.0, 3.0]], atol=1e-12
    )
    np.testing.assert_allclose(
        dense(delta_of(ties(stack, density=1.0))), [[4.0, -3.0], [-1.5, 2.0]], atol=1e-12
    )
    weighted = Stack("fc", (one, two), (1.0, 3.0), rank=2)  # the second now wins the first entry's election
    np.testing.assert_allclose(
        dense(delta_of(ties(weighted, density=1.0))), [[-2.0, 1.0], [-1.5, 2.5]], atol=1e-12
    )


def test_equal_entries_at_the_threshold_are_all_kept() -> None:
    same = LowRank(np.ones((4, 1)), np.ones((1, 5)))
    stack = Stack("fc", (same,), (1.0,), rank=1)
    np.testing.assert_allclose(
        dense(delta_of(magnitude_prune(stack, density=0.1))), np.ones((4, 5)), atol=1e-12
    )


@given(stack=stacks())
@settings(max_examples=25, deadline=None)
def test_linear_in_shared_coordinates_is_the_plain_sum(stack: Stack) -> None:
    """So there is no "KnOTS-linear": coordinates and back lose nothing, whatever the space."""
    expected = summed([dense(delta) for delta in stack.deltas], stack.weights)
    for space in SPACES:
        for found in (
            dare(stack, density=1.0, space=space),
            magnitude_prune(stack, density=1.0, space=space),
        ):
            assert np.linalg.norm(dense(delta_of(found)) - expected) <= 1e-6 * size(stack)


def test_ties_depends_on_its_space() -> None:
    stack = make([4, 4, 4], out=256, into=192, rank=192)
    results = [dense(delta_of(ties(stack, density=0.2, space=space))) for space in SPACES]
    for one, other in itertools.combinations(results, 2):
        assert np.linalg.norm(one - other) > 0.3 * np.linalg.norm(one)


def test_knots_is_ties_in_its_space() -> None:
    stack = make([3, 4], [0.5, 2.0])
    one, other = delta_of(knots(stack, density=0.3)), delta_of(ties(stack, density=0.3, space="knots"))
    np.testing.assert_array_equal(one.up, other.up)
    np.testing.assert_array_equal(one.down, other.down)


@pytest.mark.parametrize("space", ["core", "knots"])
def test_results_in_shared_coordinates_are_exact_at_the_sum_of_the_ranks(space: Any) -> None:
    stack = make([3, 4, 2], out=60, into=50)
    found = METHODS["ties"].run(stack, **METHODS["ties"].settle({"space": space}))
    assert found.error == 0.0
    assert found.delta.up.shape[1] <= 9


def test_weight_space_loses_what_it_says() -> None:
    stack = make([3, 4, 2], out=300, into=280, rank=12)
    found = METHODS["ties"].run(stack, **METHODS["ties"].settle({}))
    exact = elected([trimmed(dense(delta), 0.2) for delta in stack.deltas], stack.weights)
    values = np.linalg.svd(exact, compute_uv=False)
    assert found.delta.up.shape == (300, 12)
    assert found.norm == pytest.approx(float(np.linalg.norm(exact)), rel=1e-6)
    assert found.error == pytest.approx(float(np.linalg.norm(dense(found.delta) - exact)), rel=1e-5)
    assert found.error <= 1.001 * float(np.linalg.norm(values[12:]))


def test_without_a_rank_weight_space_has_that_of_the_sum() -> None:
    assert delta_of(ties(make([3, 4, 2]))).up.shape[1] == 9


def test_a_rank_beyond_the_matrix_is_padded() -> None:
    stack = make([2, 2], out=5, into=4, rank=16)
    found = METHODS["ties"].run(stack, **METHODS["ties"].settle({"density": 1.0}))
    assert found.delta.up.shape == (5, 16)
    expected = elected([dense(delta) for delta in stack.deltas], stack.weights)
    np.testing.assert_allclose(dense(found.delta), expected, atol=1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", SPARSE)
def test_zero_deltas_give_zero(name: str, space: str) -> None:
    zero = LowRank(np.zeros((6, 2), np.float32), np.ones((2, 5), np.float32))
    stack = Stack("fc", (zero, zero), (1.0, 1.0), (0, 1))
    found = METHODS[name].run(stack, **METHODS[name].settle({"space": space}))
    assert not dense(found.delta).any()


def test_breadcrumbs_without_outliers_keeps_the_rest() -> None:
    """A share of the largest that rounds to none must not empty the whole delta."""
    stack = make([2], out=5, into=6, rank=5)
    found = delta_of(breadcrumbs(stack, density=0.9, gamma=0.01))
    assert np.count_nonzero(np.abs(dense(found)) > 1e-6) == 27


def test_della_keeps_by_rank_and_unbiased() -> None:
    """Over many rows, the smallest and the largest entry are kept with their probabilities, and the mean is right."""
    row = np.linspace(1, 2, 8)[None, :]
    stack = Stack("fc", (LowRank(np.ones((20_000, 1)), row),), (1.0,), rank=8)
    found = dense(delta_of(della(stack, density=0.5, epsilon=0.3, elect=False)))
    kept = (np.abs(found) > 1e-6).mean(axis=0)
    np.testing.assert_allclose(kept, 0.2 + 0.6 * np.arange(8) / 7, atol=0.02)
    np.testing.assert_allclose(found.mean(axis=0), row[0], rtol=0.05)


def test_sce_does_not_depend_on_the_size_of_the_deltas() -> None:
    """Small deltas are weighed by their energies as large ones are."""
    stack = make([2, 3], kind=np.float64, rank=18)
    small = Stack("fc", tuple(LowRank(d.up * 1e-6, d.down) for d in stack.deltas), stack.weights, rank=18)
    large, tiny = (dense(delta_of(sce(one, density=0.5))) for one in (stack, small))
    np.testing.assert_allclose(tiny * 1e6, large, rtol=0, atol=1e-9 * size(stack))


# --- random masks ------------------------------------------------------------------------------------------


def test_masks_follow_the_adapter_and_the_matrix_only() -> None:
    stack = make([3, 3, 3], [0.0, 1.0, 0.0], rank=18)
    alone = Stack("fc", stack.deltas[1:2], (1.0,), (1,), 18)
    one, other = delta_of(dare(stack, density=0.5)), delta_of(dare(alone, density=0.5))
    np.testing.assert_allclose(dense(one), dense(other), atol=1e-6)
    for changed in (
        Stack("other", stack.deltas[1:2], (1.0,), (1,), 18),
        Stack("fc", stack.deltas[1:2], (1.0,), (2,), 18),
    ):
        assert not np.allclose(dense(delta_of(dare(changed, density=0.5))), dense(other), atol=1e-3)
    assert not np.allclose(dense(delta_of(dare(alone, density=0.5, seed=1))), dense(other), atol=1e-3)


def test_seeds_are_numbers_that_do_not_change() -> None:
    """The hash of seed, name and task: another one would give other results for the same command."""
    stack = make([1, 1])
    digest = hashlib.sha256(b"5\0fc\0" + b"1").digest()
    assert stack.seed(1, 5) == int.from_bytes(digest[:8], "little")
    assert Stack("fc", stack.deltas[1:], (1.0,), (1,)).seed(0, 5) == stack.seed(1, 5)


# --- order statistics ----------------------------------------------------------------------------------------


def hard_cases() -> dict[str, LowRank]:
    rng = np.random.default_rng(3)
    up, down = rng.standard_normal((600, 4)), rng.standard_normal((4, 500))
    uneven = up * np.exp(rng.standard_normal((600, 1)) * 3)
    sparse = up * (rng.random((600, 1)) < 0.01)
    whole = np.round(up), np.round(down)
    return {"normal": LowRank(up, down), "uneven": LowRank(uneven, down), "mostly zero": LowRank(sparse, down),
            "whole numbers": LowRank(*whole), "constant": LowRank(up * 0 + 1, down * 0 + 1)}  # fmt: skip


@pytest.mark.parametrize("case", hard_cases())
def test_selection_is_exact(case: str) -> None:
    delta = hard_cases()[case]
    places = [1, 2, 60_000, 150_000, 299_999, 300_000]
    blocks = [np.abs(delta.rows(start, stop)) for start, stop in passes.spans(delta.shape)]
    falling = np.sort(np.concatenate([block.reshape(-1) for block in blocks]))[::-1]
    assert falling.size > passes._WHOLE  # so that it does go by a sample
    assert passes.largest(delta, places) == [falling[place - 1] for place in places]


def test_a_misleading_sample_costs_a_pass_and_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = hard_cases()["normal"]
    right = passes.largest(delta, [1000, 90_000])
    monkeypatch.setattr(passes, "entries", lambda delta, rows, columns: np.full(len(rows), 1e9))
    assert passes.largest(delta, [1000, 90_000]) == right


# --- options and the registry ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SPARSE if name != "sce"])
@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), "half", True, None])
def test_a_density_is_a_share(name: str, value: Any) -> None:
    if value is None:
        assert 0 < METHODS[name].settle({"density": None})["density"] <= 1
        return
    with pytest.raises(Unsupported, match="density"):
        METHODS[name].settle({"density": value})


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(Unsupported, match=r"density 0\.95 ± epsilon 0\.1"):
        METHODS["della"].settle({"density": 0.95, "epsilon": 0.1})
    with pytest.raises(Unsupported, match="more than 1"):
        METHODS["breadcrumbs"].settle({"density": 0.95, "gamma": 0.1})


def test_an_unknown_option_says_who_has_it() -> None:
    with pytest.raises(Unsupported, match="linear has no option epsilon") as caught:
        METHODS["linear"].settle({"epsilon": 0.1})
    assert caught.value.hint == "della has it"
    with pytest.raises(Unsupported, match="ties has no option desnity") as caught:
        METHODS["ties"].settle({"desnity": 0.1})
    assert "density" in str(caught.value.hint)


def test_choices_and_whole_numbers() -> None:
    with pytest.raises(Unsupported, match="none of weight, core, knots"):
        METHODS["ties"].settle({"space": "factor"})
    with pytest.raises(Unsupported, match="not a whole number"):
        METHODS["dare"].settle({"seed": 1.5})
    with pytest.raises(Unsupported, match="not a bool"):
        METHODS["ties"].settle({"normalize": 1})
    with pytest.raises(Unsupported, match="at least 0"):
        METHODS["dare"].settle({"seed": -1})


def test_methods_are_found_by_name_and_alias() -> None:
    assert find("cat") is METHODS["linear"]
    with pytest.raises(Unsupported, match="did you mean ties"):
        find("tie")


def test_everything_about_a_method_is_said() -> None:
    for known in METHODS.values():
        assert known.summary, known.name
        assert known.formula, known.name
        assert known.when, known.name
        assert known.cost, known.name
        for option in known.options:
            assert option.help, f"{known.name}: {option.name}"


def test_a_method_of_ones_own() -> None:
    @method(formula="t D_1", when="now", cost="none", least=2, most=2)
    def mine(
        stack: Stack,
        *,
        size: Annotated[float, Between(0, 2, high_open=True)] = 1.0,
        how: Literal["up", "down"] = "up",
        twice: bool = False,
    ) -> LowRank:
        """The first one, larger.

        Args:
            stack: what to combine.
            size: by how much,
                over two lines.
            how: which side.
            twice: again.
        """
        return LowRank(stack.deltas[0].up * size, stack.deltas[0].down)

    try:
        found = find("mine")
        assert [(o.name, o.type, o.default, o.choices) for o in found.options] == [
            ("size", float, 1.0, ()), ("how", str, "up", ("up", "down")), ("twice", bool, False, ()),
        ]  # fmt: skip
        assert found.options[0].help == "by how much, over two lines."
        assert str(found.options[0].range) == "at least 0 and below 2"
        assert found.summary == "The first one, larger."
        with pytest.raises(Unsupported, match="exactly 2 adapters, not 3"):
            found.settle({}, 3)
        made = found.run(make([4, 1], rank=1), **found.settle({"size": 0.5}, 2))
        truth = np.linalg.svd(0.5 * dense(make([4, 1]).deltas[0]), compute_uv=False)
        assert made.norm == pytest.approx(np.linalg.norm(truth), rel=1e-6)
        assert made.error == pytest.approx(np.linalg.norm(truth[1:]), rel=1e-6)
    finally:
        METHODS.pop("mine", None)


def test_an_option_needs_a_default_and_a_plain_type() -> None:
    with pytest.raises(TypeError, match="needs a default"):

        @method()
        def first(stack: Stack, *, size: float) -> LowRank:
            return stack.deltas[0]

    with pytest.raises(TypeError, match="float, int, bool, str"):

        @method()
        def second(stack: Stack, *, size: list = []) -> LowRank:  # type: ignore[type-arg]  # noqa: B006
            return stack.deltas[0]

    assert not {"first", "second"} & METHODS.keys()
