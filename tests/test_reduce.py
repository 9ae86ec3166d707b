"""``reduce``: the nearest delta of a rank, its exact error, and budgets spent as well as they can be."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.cli.app import app
from loratools.errors import InputError, Mismatch, NonFinite, OutputExists, OverBudget, Unsupported
from tests.helpers import digest, make_adapter, write_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from loratools.adapter import Adapter, Module

RULES = ({"rank": 2}, {"energy": 0.9}, {"error": 0.3}, {"params": 200}, {"size": 1500}, {"noise_floor": True})
SHAPES = {"a.k": (4, 8), "a.q": (12, 8), "b.q": (12, 8), "b.up": (20, 8)}  # in the order of a file


# --- adapters, and what they are in float64 --------------------------------------------------------------------


def lora(
    seed: int, shape: tuple[int, ...], rank: int, kind: Any = np.float32
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Stored factors of a linear layer or a convolution, and B A in float64."""
    rng = np.random.default_rng(seed)
    kernel = shape[2:]
    down = rng.standard_normal((rank, *shape[1:])).astype(kind)
    up = (rng.standard_normal((shape[0], rank)) * np.logspace(0, -2, rank)).astype(kind)
    stored = {"lora_A.weight": down, "lora_B.weight": up.reshape(*up.shape, *(1 for _ in kernel))}
    return stored, up.astype(np.float64) @ down.reshape(rank, -1).astype(np.float64)


def loha(seed: int, shape: tuple[int, ...], rank: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    sides = [rng.standard_normal(s) for s in ((shape[0], rank), (rank, shape[1])) * 2]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return dict(zip(names, sides, strict=True)), (sides[0] @ sides[1]) * (sides[2] @ sides[3])


def lokr(seed: int, shape: tuple[int, ...], rank: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    left, a, b = (
        rng.standard_normal((2, 2)),
        rng.standard_normal((shape[0] // 2, rank)),
        rng.standard_normal((rank, shape[1] // 2)),
    )
    return {"lokr_w1": left, "lokr_w2_a": a, "lokr_w2_b": b}, np.kron(left, a @ b)


def loaded(modules: dict[str, dict[str, np.ndarray]], kind: str = "LORA", **config: Any) -> Adapter:
    tensors = {
        f"base_model.model.{path}.{key}": np.ascontiguousarray(value)
        for path, stored in modules.items()
        for key, value in stored.items()
    }
    alpha = {"lora_alpha": 5} if kind == "LORA" else {"alpha": 5}
    fields = {"peft_type": kind, "r": 2, **alpha, "target_modules": list(modules), **config}
    return lt.load(tensors, config=fields)


def dense(module: Module) -> np.ndarray:
    """What a plain module adds, from its stored values alone."""
    up, down = (module.tensors[role].load().astype(np.float64) for role in ("up", "down"))
    return module.scaling * up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)


def several(folder: Path, rank: int = 4, **config: Any) -> Path:
    """Four modules of different sizes and strengths."""
    rng, tensors = np.random.default_rng(1), {}
    for strength, (path, (out, into)) in enumerate(SHAPES.items(), 1):
        tensors[f"base_model.model.{path}.lora_A.weight"] = rng.standard_normal((rank, into), np.float32)
        up = rng.standard_normal((out, rank)) * np.logspace(0, -1, rank) * strength
        tensors[f"base_model.model.{path}.lora_B.weight"] = up.astype(np.float32)
    fields = {"r": rank, "lora_alpha": 6, "target_modules": ["q", "k", "up"], **config}
    return write_adapter(folder, tensors, **fields)


def spectra(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: np.linalg.svd(dense(module), compute_uv=False) for name, module in adapter.modules.items()}


def stored_values(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path / "adapter_model.safetensors" if path.is_dir() else path)


# --- the nearest delta -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["LORA", "LOHA", "LOKR"]),
    st.integers(1, 12).map(lambda n: 2 * n),
    st.integers(1, 12).map(lambda n: 2 * n),
    st.integers(1, 6),
    st.integers(1, 14),
    st.floats(0.01, 100),
)
def test_it_is_the_truncated_decomposition_of_the_dense_matrix(seed, kind, out, into, stored, rank, alpha):
    tensors, plain = {"LORA": lora, "LOHA": loha, "LOKR": lokr}[kind](seed, (out, into), stored)
    name = "lora_alpha" if kind == "LORA" else "alpha"
    adapter = loaded({"fc": tensors}, kind, r=stored, **{name: alpha})
    scaled = plain * adapter.modules["fc"].scaling
    report = lt.reduce(adapter, rank=rank, dtype="f64")
    (told,) = report.modules
    left, values, right = np.linalg.svd(scaled, full_matrices=False)
    norm = np.linalg.norm(scaled)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    made = report.adapter.modules["fc"]
    precision = 1e-6 if kind == "LORA" else 1e-12  # of the factors as they are handed out
    assert abs(np.linalg.norm(scaled - dense(made)) - np.linalg.norm(scaled - best)) <= precision * norm
    assert abs(told.relative_error * norm - np.linalg.norm(values[rank:])) <= 1e-6 * norm
    assert told.relative_error == report.relative_error
    kept = kind == "LORA" and rank >= stored  # as it was stored, its scaling beside it
    assert (made.kind, made.rank, made.scaling) == (
        "lora",
        rank,
        adapter.modules["fc"].scaling if kept else 1.0,
    )
    assert told.norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 5), (6, 4, 1, 1), (6, 4, 3, 3, 2)])
def test_convolutions_are_reduced_as_the_matrices_they_are(shape):
    tensors, plain = lora(0, shape, 4)
    adapter = loaded({"conv": tensors}, r=4)
    report = lt.reduce(adapter, rank=2)
    made, scaled = report.adapter.modules["conv"], plain * 5 / 4
    values = np.linalg.svd(scaled, compute_uv=False)
    assert made.shape == shape
    assert made.tensors["down"].shape == (2, *shape[1:])
    assert made.tensors["up"].shape == (6, 2, *(1 for _ in shape[2:]))
    assert np.linalg.norm(scaled - dense(made)) == pytest.approx(np.linalg.norm(values[2:]), rel=1e-5)


def test_an_embedding_stays_one():
    rng = np.random.default_rng(0)
    stored = {
        "lora_embedding_A": rng.standard_normal((3, 11), np.float32),
        "lora_embedding_B": rng.standard_normal((6, 3), np.float32),
    }
    report = lt.reduce(loaded({"embed": stored}, r=3), rank=2)
    made = report.adapter.modules["embed"]
    values = np.linalg.svd(
        stored["lora_embedding_B"] @ stored["lora_embedding_A"] * (5 / 3), compute_uv=False
    )
    assert made.options["embedding"]
    assert report.relative_error == pytest.approx(values[2] / np.linalg.norm(values), rel=1e-5)


def experts(blockwise: bool = False) -> tuple[Adapter, list[np.ndarray]]:
    """Three experts of rank 3 in one module, as PEFT packs them, and the delta of each."""
    rng = np.random.default_rng(0)
    ups, downs = rng.standard_normal((3, 8, 3)), rng.standard_normal((3, 3, 6))
    ups *= np.array([1.0, 0.3, 0.1])
    order = (1, 0, 2) if blockwise else (1, 2, 0)
    stored = {"lora_A.weight": downs.reshape(9, 6), "lora_B.weight": ups.transpose(order).reshape(8, 9)}
    adapter = loaded(
        {"mlp.experts": stored}, r=3, target_parameters=["mlp.experts.down_proj"], target_modules=None
    )
    if blockwise:
        from loratools.formats.peft import with_blockwise

        adapter = with_blockwise(adapter)
    return adapter, [5 / 3 * up @ down for up, down in zip(ups, downs, strict=True)]


@pytest.mark.parametrize("blockwise", [False, True])
def test_experts_share_a_rank_and_are_judged_together(blockwise):
    adapter, each = experts(blockwise)
    values = [np.linalg.svd(one, compute_uv=False) for one in each]
    report = lt.reduce(adapter, rank=2)
    lost = np.sqrt(sum(np.sum(v[2:] ** 2) for v in values))
    norm = np.sqrt(sum(np.sum(v**2) for v in values))
    assert report.relative_error == pytest.approx(lost / norm)
    made = report.adapter.modules["mlp.experts"]
    assert made.tensors["up"].shape == (8, 6)
    found = [made.load(index=index, double=True).rows(0, 8) for index in range(3)]
    apart = np.sqrt(sum(np.linalg.norm(f - e) ** 2 for f, e in zip(found, each, strict=True)))
    assert apart == pytest.approx(lost, rel=1e-6)
    assert lt.reduce(adapter, error=lost / norm, per_module=True).modules[0].rank == 2
    assert lt.reduce(adapter, params=(8 + 6) * 3 * 2).modules[0].rank == 2


# --- rules -----------------------------------------------------------------------------------------------------


def test_energy_and_error_are_least_ranks_module_by_module(tmp_path):
    adapter = lt.load(several(tmp_path / "a"))
    for rule, keeps in (("energy", lambda v, k: np.sum(v[:k] ** 2) >= 0.97 * np.sum(v**2)),
                        ("error", lambda v, k: np.linalg.norm(v[k:]) <= 0.97 * np.linalg.norm(v))):  # fmt: skip
        report = lt.reduce(adapter, **{rule: 0.97}, per_module=True)
        for one, values in zip(report.modules, spectra(adapter).values(), strict=True):
            assert one.rank == next(k for k in range(1, 9) if keeps(values, k))
        assert report.scope == "per module"


def best(values: dict[str, np.ndarray], fits: Any) -> float:
    """The least relative error of any choice of ranks that ``fits``."""
    every = itertools.product(*(range(5) for _ in values))
    total = sum(np.sum(v**2) for v in values.values())
    lost = (
        sum(np.sum(v[k:] ** 2) for v, k in zip(values.values(), ranks, strict=True))
        for ranks in every
        if fits(ranks)
    )
    return float(np.sqrt(min(lost) / total))


@pytest.mark.parametrize("budget", [20, 61, 100, 150, 229, 300])
def test_parameters_are_spent_as_well_as_they_can_be(budget, tmp_path):
    adapter = lt.load(several(tmp_path / "a"))
    costs = [sum(shape) for shape in SHAPES.values()]
    report = lt.reduce(adapter, params=budget)
    assert report.parameters_after <= budget
    assert lt.inspect(several(tmp_path / "b")).parameters == report.parameters_before
    least = best(
        spectra(adapter), lambda ranks: sum(c * r for c, r in zip(costs, ranks, strict=True)) <= budget
    )
    assert report.relative_error == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_rank_over_all_modules_is_that_many_on_average(rank, tmp_path):
    adapter = lt.load(several(tmp_path / "a"))
    report = lt.reduce(adapter, rank=rank, per_module=False)
    assert sum(one.rank for one in report.modules) == rank * len(SHAPES)
    least = best(spectra(adapter), lambda ranks: sum(ranks) <= rank * len(SHAPES))
    assert report.relative_error == pytest.approx(least, abs=1e-6)
    assert report.relative_error < lt.reduce(adapter, rank=rank).relative_error


@pytest.mark.parametrize("error", [0.05, 0.2, 0.5])
def test_an_error_of_the_whole_is_reached_with_the_fewest_parameters(error, tmp_path):
    adapter = lt.load(several(tmp_path / "a"))
    report = lt.reduce(adapter, error=error)
    assert report.relative_error <= error
    found, costs = spectra(adapter), [sum(shape) for shape in SHAPES.values()]
    total = sum(np.sum(v**2) for v in found.values())
    fewest = min(
        sum(c * r for c, r in zip(costs, ranks, strict=True))
        for ranks in itertools.product(*(range(5) for _ in found))
        if sum(np.sum(v[k:] ** 2) for v, k in zip(found.values(), ranks, strict=True)) <= error**2 * total
    )
    assert report.parameters_after == fewest
    again = lt.reduce(adapter, energy=1 - error**2, per_module=False)
    assert [one.rank for one in again.modules] == [one.rank for one in report.modules]


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("size", [900, 1100, 1300, 1500, 2000])
def test_a_size_is_that_of_the_file_and_no_choice_within_it_is_better(size, dtype, single, tmp_path):
    folder, out = several(tmp_path / "a"), tmp_path / ("r.safetensors" if single else "r")
    adapter, size = lt.load(folder), size + 700 * single  # the record lies in the header
    report = lt.reduce(folder, out, size=size, dtype=dtype, sync=False)
    file = out if single else out / "adapter_model.safetensors"
    assert file.stat().st_size == report.bytes_after <= size
    width = 4 if dtype == "f32" else 2
    (tmp_path / "whole").mkdir()
    whole = lt.reduce(folder, tmp_path / "whole" / out.name, error=0.0, dtype=dtype, sync=False)
    header = whole.bytes_after - width * whole.parameters_after  # no choice has a longer one

    def fits(ranks: tuple[int, ...]) -> bool:
        return (
            header + width * sum(c * r for c, r in zip(map(sum, SHAPES.values()), ranks, strict=True)) <= size
        )

    rounding = 1e-6 if dtype == "f32" else 2 * 2.0**-9  # of one factor and of the other
    assert report.relative_error <= best(spectra(adapter), fits) + rounding


def test_a_budget_that_holds_everything_loses_nothing(tmp_path):
    folder = several(tmp_path / "a")
    for rule in ({"params": 10**6}, {"size": 10**7}, {"error": 0.0}, {"energy": 1.0}):
        report = lt.reduce(folder, **rule)
        assert report.relative_error == 0
        assert [one.rank for one in report.modules] == [4] * 4


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("case", ["both", "up", "down", "padded"])
def test_the_noise_floor_is_what_rounding_the_factors_made(case, kind):
    """A delta of rank 8 whose factors of rank 40 have full rank once they are rounded."""
    rng = np.random.default_rng(0)
    up, down, mix = rng.standard_normal((200, 8)), rng.standard_normal((8, 150)), rng.standard_normal((8, 40))
    ups = {"both": up @ mix, "up": up @ mix, "padded": np.pad(up, ((0, 0), (0, 32)))}
    downs = {"both": np.linalg.pinv(mix) @ down, "down": np.linalg.pinv(mix) @ down}
    wide_up = ups.get(case, rng.standard_normal((200, 40)))
    wide_down = downs.get(case, rng.standard_normal((40, 150)))
    stored = {"lora_A.weight": wide_down.astype(kind), "lora_B.weight": wide_up.astype(kind)}
    report = lt.reduce(loaded({"fc": stored}, r=40), noise_floor=True)
    assert report.modules[0].rank == 8
    assert report.relative_error < float(ml_dtypes.finfo(kind).eps)


def test_the_noise_floor_keeps_what_is_signal():
    stored, _ = lora(0, (200, 150), 40, ml_dtypes.bfloat16)
    assert lt.reduce(loaded({"fc": stored}, r=40), noise_floor=True).modules[0].rank == 40


def test_the_noise_floor_of_experts_is_theirs_together():
    adapter, _ = experts()
    assert lt.reduce(adapter, noise_floor=True).modules[0].rank == 3


def test_the_noise_floor_of_other_kinds_is_not_known():
    with pytest.raises(Unsupported, match=r"fc: the noise floor is known .* it is loha") as raised:
        lt.reduce(loaded({"fc": loha(0, (8, 8), 2)[0]}, "LOHA"), noise_floor=True)
    assert "--energy" in raised.value.hint


# --- ranks that go up, deltas that are nothing -----------------------------------------------------------------


def test_a_higher_rank_is_padding_and_said_to_be(tmp_path):
    folder = several(tmp_path / "a")
    report = lt.reduce(folder, tmp_path / "r", rank=6, sync=False)
    assert report.relative_error == 0
    assert report.warnings == (
        "a.k is raised from rank 4 to 6, with zeros that change nothing (and 3 more are)",
    )
    before, after = lt.load(folder).modules, lt.load(tmp_path / "r").modules
    for name, module in after.items():
        assert module.rank == 6
        assert not module.tensors["up"].load()[:, 4:].any()
        assert not module.tensors["down"].load()[4:].any()
        np.testing.assert_allclose(dense(module), dense(before[name]), atol=1e-5)


def with_zero() -> Adapter:
    stored = {name: lora(seed, (6, 5), 3)[0] for seed, name in enumerate(("a", "b"))}
    stored["b"]["lora_B.weight"] = np.zeros_like(stored["b"]["lora_B.weight"])
    return loaded(stored, r=3)


def test_a_zero_delta_is_kept_by_a_rank_and_said_to_be():
    report = lt.reduce(with_zero(), rank=2)
    assert report.dropped == ()
    assert (report.modules[1].zero, report.modules[1].rank, report.modules[1].relative_error) == (
        True,
        2,
        0.0,
    )
    assert report.warnings == ("b changes nothing; kept, as zeros",)
    assert not dense(report.adapter.modules["b"]).any()


@pytest.mark.parametrize(
    "rule",
    [
        {"energy": 0.9},
        {"error": 0.1},
        {"params": 60},
        {"noise_floor": True},
        {"rank": 2, "per_module": False},
    ],
)
def test_a_zero_delta_is_dropped_by_other_rules_and_listed(rule):
    report = lt.reduce(with_zero(), **rule)
    assert report.dropped == ("b",)
    assert report.modules[1].rank == 0
    assert set(report.adapter.modules) == {"a"}
    assert "b changes nothing; dropped" in report.warnings


def test_a_module_of_which_nothing_is_left_is_dropped_and_listed(tmp_path):
    report = lt.reduce(several(tmp_path / "a"), tmp_path / "r", params=20 + 28, sync=False)
    assert report.dropped
    assert {one.name for one in report.modules if not one.rank} == set(report.dropped)
    assert {one.relative_error for one in report.modules if not one.rank} == {1.0}
    assert set(lt.load(tmp_path / "r").modules) == set(SHAPES) - set(report.dropped)
    assert any(report.dropped[0] in warning and "dropped" in warning for warning in report.warnings)


def test_an_adapter_that_changes_nothing_keeps_only_what_a_rank_asks_for():
    stored, _ = lora(0, (6, 5), 3)
    stored["lora_B.weight"] = np.zeros_like(stored["lora_B.weight"])
    adapter = loaded({"a": stored}, r=3)
    assert lt.reduce(adapter, rank=1).relative_error == 0
    for rule in RULES[1:]:
        with pytest.raises(InputError, match="nothing would be left"):
            lt.reduce(adapter, **rule)


def test_a_module_that_adds_to_a_bias_stays(tmp_path):
    stored = {name: lora(seed, (6, 5), 3)[0] for seed, name in enumerate(("a", "b"))}
    for name, size in (("a", 100), ("b", 1)):
        stored[name]["lora_B.weight"] = stored[name]["lora_B.weight"] * np.float32(size)
        stored[name]["lora_B.bias"] = np.arange(6, dtype=np.float32)
    report = lt.reduce(loaded(stored, r=3, lora_bias=True), tmp_path / "r", params=2 * 6 + 2 * 11, sync=False)
    assert [one.rank for one in report.modules] == [1, 1]
    made = lt.load(tmp_path / "r").modules["b"]
    found = made.tensors["up_bias"].load() * made.scaling
    np.testing.assert_allclose(found, np.arange(6) * 5 / 3, rtol=1e-6)


# --- what is carried over --------------------------------------------------------------------------------------


def test_what_is_no_delta_is_carried_over_as_it_is(tmp_path):
    folder = several(tmp_path / "a")
    kept = {
        "base_model.model.score.weight": np.arange(16, dtype=ml_dtypes.bfloat16).reshape(2, 8),
        "base_model.model.score.bias": np.arange(2, dtype=np.float16),
    }
    write_adapter(folder, {**stored_values(folder), **kept}, r=4, lora_alpha=6,
                  target_modules=["q", "k", "up"], modules_to_save=["score"])  # fmt: skip
    report = lt.reduce(folder, tmp_path / "r", rank=1, sync=False)
    after = stored_values(tmp_path / "r")
    for name, value in kept.items():
        assert after[name].dtype == value.dtype
        assert after[name].tobytes() == value.tobytes()
    assert report.parameters_after == sum(map(sum, SHAPES.values())) + 18
    assert json.loads((tmp_path / "r" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    with pytest.raises(InputError, match="needs 30 at least") as raised:
        lt.reduce(folder, params=20)
    assert raised.value.hint == "18 parameters of them are 2 tensors that are no delta"


@pytest.mark.parametrize("rule", [{"params": 11}, {"size": 200}])
def test_a_budget_too_small_for_anything_says_what_the_least_is(rule, tmp_path):
    folder = several(tmp_path / "a")
    with pytest.raises(InputError, match="at least") as raised:
        lt.reduce(folder, **rule)
    least = int(str(raised.value).rpartition("needs ")[2].split()[0].replace(",", ""))
    (name,) = rule
    report = lt.reduce(folder, **{name: least})
    assert [one.rank for one in report.modules] == [1, 0, 0, 0]


# --- types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_the_result_has_the_widest_type_of_the_factors(kind, tmp_path):
    stored, plain = lora(0, (30, 20), 6, kind)
    report = lt.reduce(loaded({"fc": stored}, r=6), tmp_path / "r", rank=3, sync=False)
    values = stored_values(tmp_path / "r")
    assert {value.dtype for value in values.values()} == {np.dtype(kind)}
    made, scaled = lt.load(tmp_path / "r").modules["fc"], plain * 5 / 6
    apart = np.linalg.norm(scaled - dense(made)) / np.linalg.norm(scaled)
    assert apart == pytest.approx(report.relative_error, rel=4 * float(ml_dtypes.finfo(kind).eps), abs=1e-12)


def test_memory_and_file_hold_the_same_values(tmp_path):
    folder = several(tmp_path / "a")
    report = lt.reduce(folder, tmp_path / "r", rank=2, dtype="bf16", sync=False)
    read = lt.load(tmp_path / "r").modules
    for name, module in lt.reduce(folder, rank=2, dtype="bf16").adapter.modules.items():
        for role, ref in module.tensors.items():
            np.testing.assert_array_equal(ref.load(), read[name].tensors[role].load())
    assert report.dtype == "BF16"


def test_a_value_that_does_not_fit_the_type_is_named():
    stored = {
        "lora_A.weight": np.full((1, 3), 1e6, np.float32),
        "lora_B.weight": np.full((4, 1), 1e6, np.float32),
    }
    adapter = loaded({"fc": stored}, r=1)
    with pytest.raises(NonFinite, match=r"fc: B would hold .* largest F16 is 65504") as raised:
        lt.reduce(adapter, rank=1, dtype="f16")
    assert "--dtype bf16" in raised.value.hint


HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def stored_in(kind: Any, folder: Path, rank: int = 4, **config: Any) -> Path:
    """Two modules of factors in a type of 16 bits."""
    tensors = {
        f"base_model.model.{path}.{key}": value
        for seed, (path, shape) in enumerate({"a.q": (40, 30), "b.up": (50, 30)}.items())
        for key, value in lora(seed, shape, rank, kind)[0].items()
    }
    fields = {"r": rank, "lora_alpha": 6, "target_modules": ["q", "up"], **config}
    return write_adapter(folder, tensors, **fields)


@pytest.mark.parametrize("kind", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q": -5}}], ids=str)
@pytest.mark.parametrize(
    "rule",
    [{"rank": 4}, {"rank": 9}, {"energy": 1.0}, {"error": 0.0}, {"noise_floor": True}, {"params": 10**6}],
    ids=str,
)
def test_where_nothing_is_cut_off_the_stored_factors_stay(rule, config, kind, tmp_path):
    folder, out = stored_in(kind, tmp_path / "a", **config), tmp_path / "r"
    report = lt.reduce(folder, out, **rule, sync=False)
    assert report.relative_error == 0
    before, after = stored_values(folder), stored_values(out)
    for name, value in before.items():
        kept = after[name][:4] if "lora_A" in name else after[name][:, :4]
        rest = after[name][4:] if "lora_A" in name else after[name][:, 4:]
        assert kept.dtype == value.dtype
        assert kept.tobytes() == value.tobytes()
        assert not rest.any()
    found = lt.diff(folder, out)
    assert (found.distance, found.identical) == (0.0, True)


@pytest.mark.parametrize("kind", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("rule", [{"rank": 4}, {"rank": 6}, {"energy": 1.0}, {"error": 0.0}], ids=str)
def test_zeros_that_fill_a_rank_are_cut_off_without_a_decomposition(rule, kind, tmp_path):
    folder = stored_in(kind, tmp_path / "a")
    lt.reduce(folder, tmp_path / "padded", rank=9, sync=False)
    report = lt.reduce(tmp_path / "padded", tmp_path / "r", **rule, sync=False)
    assert report.relative_error == 0
    assert lt.diff(folder, tmp_path / "r").distance == 0
    after = stored_values(tmp_path / "r")
    for name, value in stored_values(folder).items():
        kept = after[name][:4] if "lora_A" in name else after[name][:, :4]
        assert kept.tobytes() == value.tobytes()


@pytest.mark.parametrize("blockwise", [False, True])
def test_experts_of_which_nothing_is_cut_off_keep_their_factors(blockwise):
    adapter, each = experts(blockwise)
    for rank in (3, 5, 30):
        report = lt.reduce(adapter, rank=rank)
        made = report.adapter.modules["mlp.experts"]
        assert (report.relative_error, made.scaling) == (0, 5 / 3)
        for index, one in enumerate(each):
            np.testing.assert_allclose(
                made.load(index=index, double=True).rows(0, 8), one, rtol=1e-12, atol=1e-12
            )


def test_a_bias_of_a_module_that_is_kept_is_scaled_as_it_was(tmp_path):
    stored = lora(0, (6, 5), 3)[0] | {"lora_B.bias": np.arange(6, dtype=np.float32)}
    report = lt.reduce(loaded({"a": stored}, r=3, lora_bias=True), tmp_path / "r", rank=5, sync=False)
    made = lt.load(tmp_path / "r").modules["a"]
    assert (report.relative_error, made.rank) == (0, 5)
    np.testing.assert_allclose(made.load("bias").rows(0, 6).ravel(), np.arange(6) * 5 / 3, rtol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rule", [{"rank": 2}, {"rank": 4}, {"energy": 0.99999}, {"params": 400}], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["from 16 bits", "from 32 bits"])
def test_the_error_counts_the_rounding_to_16_bits(rule, dtype, wide, tmp_path):
    folder, out = stored_in(np.float32 if wide else HALVES[dtype], tmp_path / "a"), tmp_path / "r"
    report = lt.reduce(folder, out, **rule, dtype=dtype, sync=False)
    before, after = lt.load(folder).modules, lt.load(out).modules
    whole = lost = 0.0
    for one in report.modules:
        exact, made = dense(before[one.name]), dense(after[one.name]) if one.rank else 0.0
        norm, apart = np.linalg.norm(exact), np.linalg.norm(exact - made)
        assert one.relative_error == pytest.approx(apart / norm, rel=1e-3)
        whole, lost = np.hypot(whole, norm), np.hypot(lost, apart)
    assert report.relative_error == pytest.approx(lost / whole, rel=1e-3)
    assert lt.diff(folder, out).relative == pytest.approx(report.relative_error, rel=1e-3)


def test_an_error_that_rounding_exceeds_is_said_to_be(tmp_path):
    folder = stored_in(np.float32, tmp_path / "a")
    (warning,) = lt.reduce(folder, error=1e-4, dtype="bf16").warnings
    assert "more than the 0.0001 that was asked for" in warning
    assert not lt.reduce(folder, error=1e-4).warnings
    assert not lt.reduce(folder, error=0.5, dtype="bf16").warnings


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_factor_that_is_not_finite_is_named(bad, rule):
    good, _ = lora(0, (6, 5), 3)
    stored, _ = lora(1, (6, 5), 3)
    stored["lora_B.weight"][2, 1] = bad
    with pytest.raises(
        InputError, match=r"layers\.1\.q: base_model\.model\.layers\.1\.q\.lora_B\.weight holds"
    ):
        lt.reduce(loaded({"layers.0.q": good, "layers.1.q": stored}, r=3), **rule)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "nothing says how far"),
        ({"rank": 1, "energy": 0.5}, "rank and energy says how far"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"rank": True}, "rank is True"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.1}, "energy is 1.1"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"error": 1.0}, "error is 1.0"),
        ({"error": -0.1}, "error is -0.1"),
        ({"params": 0}, "params is 0"),
        ({"size": 0}, "size is 0"),
        ({"size": 100, "per_module": True}, "size is no rule for each module"),
        ({"params": 100, "per_module": True}, "params is no rule for each module"),
        ({"noise_floor": True, "per_module": False}, "noise_floor is no rule for all"),
    ],
)
def test_rules_that_cannot_be(rule, words):
    with pytest.raises(Unsupported, match=words):
        lt.reduce(with_zero(), **rule)


def test_what_is_no_plain_sum_is_refused_with_the_way_out():
    stored, _ = lora(0, (6, 5), 3)
    dora = loaded({"fc": {**stored, "lora_magnitude_vector": np.ones(6, np.float32)}}, r=3, use_dora=True)
    with pytest.raises(Unsupported, match="fc is dora, which is not a plain sum") as raised:
        lt.reduce(dora, rank=1)
    assert "merge it into the base" in raised.value.hint
    with pytest.raises(Unsupported, match="fc is ia3"):
        lt.reduce(
            loaded({"fc": {"ia3_l": np.ones((6, 1), np.float32)}}, "IA3", feedforward_modules=[]), rank=1
        )
    with pytest.raises(Unsupported, match="starts from a part of its base") as raised:
        lt.reduce(loaded({"fc": stored}, r=3, init_lora_weights="pissa"), rank=1)
    assert "normalize --base" in raised.value.hint


def test_a_configuration_of_other_weights_is_refused_as_diff_refuses_it(tmp_path):
    folder = write_adapter(
        tmp_path / "a", {f"q.{key}": value for key, value in lora(0, (6, 5), 4)[0].items()}, r=8, lora_alpha=8
    )
    with pytest.raises(Mismatch) as told:
        lt.diff(folder, folder)
    with pytest.raises(Mismatch, match="q has rank 4 in the file and 8 in the configuration") as raised:
        lt.reduce(folder, rank=2)
    assert (str(raised.value), raised.value.hint) == (str(told.value), told.value.hint)


def test_an_output_is_refused_before_anything_is_computed(tmp_path):
    folder = several(tmp_path / "a")
    with pytest.raises(OutputExists):
        lt.reduce(folder, folder, rank=1)
    with pytest.raises(OutputExists):
        lt.reduce(folder, folder / "inside", rank=1)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_memory_that_is_not_allowed_is_not_used(tmp_path):
    with pytest.raises(OverBudget):
        lt.reduce(several(tmp_path / "a"), rank=1, max_memory=1000)


# --- workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))
def test_any_workers_write_the_same_bytes(rule, tmp_path):
    folder = several(tmp_path / "a")
    written = []
    for number, how in enumerate(
        ({"executor": "inline"}, {"jobs": 1}, {"jobs": 3}, {"executor": "processes", "jobs": 2})
    ):
        lt.reduce(folder, tmp_path / str(number), **rule, **how, sync=False)
        written.append(digest(tmp_path / str(number)))
    assert all(one == written[0] for one in written)


def test_no_torch_is_loaded(tmp_path):
    folder = make_adapter(tmp_path / "a", {"q": (12, 8)})
    script = (
        "import sys; from loratools.cli.app import main; "
        f"main(['reduce', {str(folder)!r}, {str(tmp_path / 'r')!r}, '--rank', '2'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    script = script.replace("from loratools.cli.app import main", "from loratools.cli.app import app as main")
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert (tmp_path / "r" / "adapter_model.safetensors").exists()


# --- the command -----------------------------------------------------------------------------------------------


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["reduce", *map(str, arguments)])


def test_the_command_says_what_the_library_returns(tmp_path):
    folder = several(tmp_path / "a")
    result = invoke(folder, tmp_path / "r", "--rank", 2, "--json", "--no-sync")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    expected = lt.reduce(folder, rank=2).to_dict()
    assert document["schema"] == "loratools.reduce/1"
    changing = ("output", "seconds", "peak_memory")
    assert {k: v for k, v in document.items() if k not in changing} == {
        k: v for k, v in expected.items() if k not in changing
    }
    assert document["bytes_after"] == (tmp_path / "r" / "adapter_model.safetensors").stat().st_size
    assert document["bytes_before"] == (folder / "adapter_model.safetensors").stat().st_size
    assert [one["rank"] for one in document["modules"]] == [2] * 4


def test_the_command_for_people(tmp_path):
    result = invoke(several(tmp_path / "a"), "-o", tmp_path / "r", "--size", "1300", "--modules")
    assert result.exit_code == 0, result.stderr
    assert "relative error" in result.stdout
    assert " (320 before)" in result.stdout
    assert " as F32 (" in result.stdout
    assert all(name in result.stdout for name in SHAPES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))
def test_a_dry_run_touches_nothing_and_says_what_would_be(rule, tmp_path):
    folder = several(tmp_path / "a")
    name, value = next(iter(rule.items()))
    typed = [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    result = invoke(folder, tmp_path / "r", *typed, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "r").exists()
    planned, report = (
        json.loads(result.stdout),
        lt.reduce(folder, tmp_path / "r", **rule, sync=False).to_dict(),
    )
    for name in ("relative_error", "modules", "dropped", "rule", "scope", "warnings"):
        assert planned[name] == report[name]
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "r").iterdir()}
    assert {file["name"]: file["bytes"] for file in planned["files"]} == sizes


@pytest.mark.parametrize(
    "typed",
    [
        [], ["--rank", 2, "--energy", 0.5], ["--rank", 0], ["--energy", 0], ["--energy", 1.5], ["--error", 1],
        ["--size", "5MB", "--per-module"], ["--noise-floor", "--global"], ["--rank", 2, "-o", "elsewhere"],
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_misuse(typed, tmp_path):
    result = invoke(several(tmp_path / "a"), tmp_path / "r", *typed)
    assert result.exit_code == 2
    assert not (tmp_path / "r").exists()


def test_a_kernel_that_a_file_hides_is_a_doubt_only_of_peft() -> None:
    factors, _ = loha(0, (12, 8), 2)
    hidden = loaded({"a.q": factors}, "LOHA")
    assert any("does not tell a linear layer" in text for text in lt.reduce(hidden, rank=1).warnings)
    named = lt.load({f"lora_unet_q.{key}": values for key, values in factors.items()})
    assert named.format == "kohya"
    assert not any("PEFT" in text for text in lt.reduce(named, rank=1).warnings)
