"""``combine`` against dense float64 sums, against PEFT's own, and in what PEFT makes of the result."""

from __future__ import annotations

import json
import os
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
from loratools.matrices import matrices
from loratools.methods import METHODS
from loratools.planning import RUNTIME_BYTES
from loratools.verbs.combine import combine, plan_combine
from tests.helpers import digest, make_adapter, write_adapter
from tests.small import write_small_adapter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loratools.adapter import Adapter
    from loratools.verbs.combine_report import CombineReport

SHAPES = {
    f"layers.{i}.{name}": shape for i in range(2) for name, shape in {"q": (12, 8), "v": (6, 8)}.items()
}


def factors(seed: int, shapes: dict[str, tuple[int, int]], rank: int, kind: Any = np.float32,
            prefix: str = "base_model.model.") -> dict[str, np.ndarray]:  # fmt: skip
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (out, into) in shapes.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = (rng.standard_normal((rank, into)) * 0.1).astype(kind)
        tensors[f"{prefix}{name}.lora_B.weight"] = (rng.standard_normal((out, rank)) * 0.1).astype(kind)
    return tensors


def small(seed: int = 0, rank: int = 2, alpha: float = 3, shapes: Any = SHAPES, kind: Any = np.float32,
          prefix: str = "base_model.model.", **config: Any) -> Adapter:  # fmt: skip
    raw = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q", "v"], **config}
    return lt.load(factors(seed, shapes, rank, kind, prefix), config=raw)


def dense(adapter: Adapter) -> dict[str, np.ndarray]:
    """Every module's matrices in float64, side by side, by the name without its prefixes."""
    found = {}
    for name, module in adapter.modules.items():
        parts = [m.up @ m.down for m in matrices(module, name, double=True)]
        found[name.removeprefix("model.")] = np.concatenate(parts, axis=1)
    return found


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in dense(adapter).items():
            total[name] = total.get(name, 0.0) + weight * delta
    return total


def assert_sum(report: CombineReport, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    assert report.adapter is not None
    found, expected = dense(report.adapter), weighted_sum(adapters, weights)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        scale = sum(
            abs(weight) * float(np.linalg.norm(dense(adapter).get(name, 0.0)))
            for adapter, weight in zip(adapters, weights, strict=True)
        )
        assert np.linalg.norm(found[name] - delta) <= 1e-6 * scale, name


def same(one: Adapter, other: Adapter) -> None:
    """Two adapters that do the same, as :func:`loratools.diff` has it."""
    assert dense(one).keys() == dense(other).keys()
    for name, delta in dense(one).items():
        np.testing.assert_allclose(
            dense(other)[name], delta, rtol=0, atol=1e-6 * max(1e-9, np.abs(delta).max())
        )


# --- the exact sum -----------------------------------------------------------------------------------------


@st.composite
def groups(draw: Any) -> tuple[list[Adapter], list[float]]:
    """Adapters of different ranks, scalings, types, prefixes and targets."""
    count = draw(st.integers(1, 4))
    adapters = []
    for index in range(count):
        shapes = {n: s for n, s in SHAPES.items() if index == 0 or draw(st.booleans())}
        if not shapes:
            shapes = {"layers.9.q": (12, 8)}
        kind = draw(st.sampled_from([np.float32, np.float64, np.float16, ml_dtypes.bfloat16]))
        config: dict[str, Any] = {"use_rslora": draw(st.booleans())}
        if draw(st.booleans()):
            config["alpha_pattern"] = {"layers.0.q": 7}
        prefix = draw(st.sampled_from(["base_model.model.", "base_model.model.model.", ""]))
        adapters.append(small(draw(st.integers(0, 99)), draw(st.integers(1, 9)), draw(st.integers(1, 9)), shapes, kind,
                              prefix, **config))  # fmt: skip
    weight = st.sampled_from([1.0, 0.5, 0.7, -1.0, 2.0, 0.1, 0.0, -0.3])
    return adapters, draw(st.lists(weight, min_size=count, max_size=count))


@given(group=groups())
@settings(max_examples=60, deadline=None)
def test_the_default_is_the_exact_weighted_sum(group: tuple[list[Adapter], list[float]]) -> None:
    adapters, weights = group
    report = combine(adapters, weights=weights)
    assert_sum(report, adapters, weights)
    assert report.relative_error == 0.0
    for module in report.modules:
        assert module.rank == sum(_rank(adapters[i], module.name) for i in module.adapters)


def _rank(adapter: Adapter, name: str) -> int:
    stripped = {own.removeprefix("model."): module for own, module in adapter.modules.items()}
    return stripped[name.removeprefix("model.")].rank or 0


@given(group=groups(), rank=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_with_a_rank_it_is_the_best_approximation(
    group: tuple[list[Adapter], list[float]], rank: int
) -> None:
    adapters, weights = group
    report = combine(adapters, weights=weights, rank=rank)
    expected = weighted_sum(adapters, weights)
    lost, whole, size = 0.0, 0.0, sum(np.linalg.norm(d) for a in adapters for d in dense(a).values())
    for module in report.modules:
        assert module.rank == rank
        name = module.name.removeprefix("model.")
        values = np.linalg.svd(expected[name], compute_uv=False)
        best = float(np.linalg.norm(values[rank:]))
        error = float(np.linalg.norm(dense(report.adapter)[name] - expected[name]))
        assert error <= best + 1e-6 * size
        assert module.norm == pytest.approx(float(np.linalg.norm(values)), abs=1e-6 * size)
        assert module.relative_error * module.norm == pytest.approx(best, abs=1e-6 * size)
        lost, whole = lost + best**2, whole + float(np.sum(values**2))
    if whole > 1e-6:
        assert report.relative_error == pytest.approx((lost / whole) ** 0.5, abs=1e-5)


def test_cancelling_weights_leave_nothing() -> None:
    adapter = small()
    report = combine([adapter, adapter], weights=[1, -1], rank=2)
    assert max(np.abs(delta).max() for delta in dense(report.adapter).values()) < 1e-8


def test_one_adapter_is_a_scaled_copy() -> None:
    adapter = small(alpha=5)
    assert_sum(combine(adapter, weights=-0.5), [adapter], [-0.5])
    assert_sum(combine([adapter]), [adapter], [1.0])
    assert combine(adapter).rank == 2


def test_modules_of_some_adapters_come_from_those_with_their_weights() -> None:
    one, two = (
        small(1, shapes={"a.q": (4, 3), "b.q": (4, 3)}),
        small(2, shapes={"b.q": (4, 3), "c.q": (4, 3)}),
    )
    report = combine([one, two], weights=[0.5, 3])
    assert [(m.name, m.adapters, m.rank) for m in report.modules] == [
        ("a.q", (0,), 2), ("b.q", (0, 1), 4), ("c.q", (1,), 2),
    ]  # fmt: skip
    assert_sum(report, [one, two], [0.5, 3])
    assert report.warnings == ()


def test_disjoint_adapters_stand_side_by_side_with_a_warning() -> None:
    one, two = small(1, shapes={"a.q": (4, 3)}), small(2, shapes={"b.q": (4, 3)})
    report = combine([one, two])
    assert_sum(report, [one, two], [1, 1])
    assert any("no module is in more than one adapter" in warning for warning in report.warnings)


def test_zero_deltas_are_said() -> None:
    tensors = factors(0, {"a.q": (4, 3), "b.q": (4, 3)}, 2)
    tensors["base_model.model.a.q.lora_B.weight"][:] = 0
    adapter = lt.load(tensors, config={"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    for rank in (None, 1):
        report = combine([adapter, adapter], rank=rank)
        assert [module.zero for module in report.modules] == [True, False]
        assert "the result is zero in a.q" in report.warnings


def test_other_sums_combine_with_lora() -> None:
    """LoHa and LoKr have factors too; the result is a plain LoRA."""
    rng = np.random.default_rng(0)
    loha = {f"base_model.model.fc.hada_{k}": rng.standard_normal(s).astype("f4")
            for k, s in {"w1_a": (6, 2), "w1_b": (2, 8), "w2_a": (6, 2), "w2_b": (2, 8)}.items()}  # fmt: skip
    lokr = {f"base_model.model.fc.lokr_{k}": rng.standard_normal(s).astype("f4")
            for k, s in {"w1": (2, 2), "w2_a": (3, 2), "w2_b": (2, 4)}.items()}  # fmt: skip
    adapters = [
        lt.load(loha, config={"peft_type": "LOHA", "r": 2, "alpha": 3}),
        small(3, shapes={"fc": (6, 8)}),
        lt.load(lokr, config={"peft_type": "LOKR", "r": 2, "alpha": 3}),
    ]
    assert_sum(combine(adapters, weights=[0.5, 1, -2]), adapters, [0.5, 1, -2])
    assert combine(adapters, rank=3).adapter.kinds == ("lora",)


def test_two_whole_sums_have_no_more_rank_than_their_matrix(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = []
    for _ in range(2):
        sides = {"lokr_w1": rng.standard_normal((2, 2)), "lokr_w2": rng.standard_normal((3, 4))}
        tensors = {f"base_model.model.fc.{key}": values.astype("f4") for key, values in sides.items()}
        whole.append(lt.load(tensors, config={"peft_type": "LOKR", "r": 2, "alpha": 2}))
    beside = [*whole, small(3, rank=5, shapes={"fc": (6, 8)})]
    report = combine(beside, weights=[0.5, 1, -2])
    assert_sum(report, beside, [0.5, 1, -2])
    assert report.rank == 6
    planned = plan_combine(beside, tmp_path / "out").to_dict()
    assert planned["rank"] == 6
    combine(beside, tmp_path / "out", sync=False)
    sizes = {file["name"]: file["bytes"] for file in planned["files"]}
    weights = "adapter_model.safetensors"
    assert sizes[weights] == (tmp_path / "out" / weights).stat().st_size
    assert combine(beside, rank=7).rank == 7  # it was asked for


# --- methods through the verb ------------------------------------------------------------------------------


def test_a_method_and_its_options_reach_every_matrix() -> None:
    adapters = [small(1), small(2, rank=3)]
    report = combine(adapters, method="magnitude_prune", density=1.0, space="knots")
    assert_sum(report, adapters, [1, 1])
    assert report.options == {"density": 1.0, "space": "knots"}
    assert combine(adapters, method="cat").method == "linear"


@pytest.mark.parametrize("rank", [None, 2, 20])
@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].legacy])
def test_every_method_takes_modules_that_not_all_adapters_have(name: str, rank: int | None) -> None:
    one = small(1, shapes={"a.q": (4, 3), "b.q": (6, 3)})
    two = small(2, shapes={"b.q": (6, 3), "c.q": (4, 3)}, rank=3)
    report = combine([one, two], method=name, rank=rank)
    assert [module.adapters for module in report.modules] == [(0,), (0, 1), (1,)]
    assert rank is None or {module.rank for module in report.modules} == {rank}
    for module, delta in dense(report.adapter).items():
        assert np.isfinite(delta).all(), module
        assert np.linalg.norm(delta) > 0, module


def test_the_same_bytes_for_every_executor(tmp_path: Path) -> None:
    paths = [make_adapter(tmp_path / str(seed), SHAPES, seed=seed) for seed in range(3)]
    found = []
    for number, (executor, jobs) in enumerate([("inline", 1), ("threads", 3), ("processes", 2)]):
        out = tmp_path / f"out{number}"
        combine(paths, out, method="dare_ties", rank=3, seed=5, executor=executor, jobs=jobs, sync=False)
        found.append(digest(out))
    assert found[0] == found[1] == found[2]


def test_biases_follow_the_rule_of_their_method() -> None:
    """lora_bias: summed by linear; by TIES elected and averaged, entry by entry."""
    adapters = []
    for seed, bias in enumerate([[1.0, -2.0, 0.5], [3.0, 1.0, 0.5]]):
        tensors = factors(seed, {"fc": (3, 4)}, 1)
        tensors["base_model.model.fc.lora_B.bias"] = np.array(bias, np.float32)
        adapters.append(
            lt.load(tensors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2, "lora_bias": True})
        )

    def bias_of(report: CombineReport) -> list[float]:
        return [round(float(v), 5) for v in report.adapter.modules["fc"].load("bias").rows(0, 3)[:, 0]]

    assert bias_of(combine(adapters, weights=[1, 0.5])) == [5.0, -3.0, 1.5]
    assert bias_of(combine(adapters, method="ties", density=1.0)) == [4.0, -4.0, 1.0]
    assert bias_of(combine(adapters, method="tsv")) == [8.0, -2.0, 2.0]


def test_experts_are_combined_one_by_one(tmp_path: Path) -> None:
    """Three experts; the second adapter also has the other parameter, which PEFT names by how deep a wrapper lies."""
    rng = np.random.default_rng(4)
    prefix = "base_model.model.mlp.experts"

    def packed(name: str, out: int, into: int, rank: int) -> dict[str, np.ndarray]:
        return {f"{name}.lora_A.weight": rng.standard_normal((3 * rank, into)).astype("f4"),
                f"{name}.lora_B.weight": rng.standard_normal((out, 3 * rank)).astype("f4")}  # fmt: skip

    config = {"peft_type": "LORA", "lora_alpha": 4, "peft_version": "0.21.2"}
    one = {**config, "r": 2, "target_parameters": ["mlp.experts.gate_up_proj"]}
    two = {**config, "r": 1, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    paths = [
        write_adapter(tmp_path / "one", packed(prefix, 8, 6, 2), **one),
        write_adapter(tmp_path / "two", packed(f"{prefix}.base_layer", 8, 6, 1) | packed(prefix, 6, 4, 1), **two),
    ]  # fmt: skip
    combine(paths, tmp_path / "out", weights=[0.5, 2], sync=False)
    adapters = [lt.load(path) for path in (*paths, tmp_path / "out")]
    gate = [dense(adapters[0])["mlp.experts"], dense(adapters[1])["mlp.experts.base_layer"]]
    found = dense(adapters[2])
    np.testing.assert_allclose(found["mlp.experts.base_layer"], 0.5 * gate[0] + 2 * gate[1], atol=1e-5)
    np.testing.assert_allclose(found["mlp.experts"], 2 * dense(adapters[1])["mlp.experts"], atol=1e-5)
    assert adapters[2].modules["mlp.experts.base_layer"].rank == 3
    again = combine([tmp_path / "out", paths[0]], weights=[1, -0.5], rank=1)
    np.testing.assert_allclose(dense(again.adapter)["mlp.experts.base_layer"], 2 * gate[1], atol=1e-4)


# --- what is no delta ------------------------------------------------------------------------------------------


def headed(head: Any, seed: int = 0, **config: Any) -> Adapter:
    tensors = factors(seed, {"a.q": (4, 3)}, 1)
    tensors["base_model.model.head.weight"] = np.asarray(head)
    raw = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q"], "modules_to_save": ["head"]}
    return lt.load(tensors, config={**raw, **config})


def head_of(report: CombineReport) -> np.ndarray:
    (extra,) = report.adapter.extras.values()
    return extra.tensor.load()


def test_a_head_of_one_adapter_is_kept_as_it_is() -> None:
    head = np.arange(6, dtype=np.float32).reshape(2, 3)
    for adapters in ([headed(head), small(1, shapes={"a.q": (4, 3)})],
                     [small(1, shapes={"a.q": (4, 3)}), headed(head)]):  # fmt: skip
        report = combine(adapters, weights=[0.5, 2])
        np.testing.assert_array_equal(head_of(report), head)
        assert [(e.name, e.rule) for e in report.extras] == [("head.weight", "only")]
        assert report.adapter.config.raw["modules_to_save"] == ["head"]


def test_heads_that_agree_are_kept_and_others_need_a_rule() -> None:
    head = np.arange(6, dtype=np.float32).reshape(2, 3)
    report = combine([headed(head), headed(head, 1)])
    assert report.extras[0].rule == "same"
    np.testing.assert_array_equal(head_of(report), head)
    pair = [headed(head), headed(head + 4, 1)]
    with pytest.raises(Mismatch, match=r"2 adapters have head\.weight \(modules_to_save\)") as caught:
        combine(pair)
    assert "--extras" in str(caught.value.hint)
    first = combine(pair, extras="first")
    np.testing.assert_array_equal(head_of(first), head)
    assert any("head.weight" in warning for warning in first.warnings)
    mean = combine(pair, extras="average", weights=[1, 3])
    np.testing.assert_allclose(head_of(mean), head + 3, rtol=1e-6)


def test_what_has_no_mean_says_so() -> None:
    head = np.zeros((2, 3), np.float32)
    with pytest.raises(Mismatch, match=r"\[2, 3\] and \[3, 3\]"):
        combine([headed(head), headed(np.zeros((3, 3), np.float32), 1)], extras="average")
    with pytest.raises(Mismatch, match="add up to zero"):
        combine([headed(head), headed(head + 1, 1)], extras="average", weights=[1, -1])
    kept = combine([headed(head), headed(np.ones((3, 3), np.float32), 1)], extras="first")
    assert head_of(kept).shape == (2, 3)


def test_a_weight_that_one_replaces_and_another_changes_is_refused() -> None:
    tensors = factors(0, {"a.q": (4, 3), "head": (2, 3)}, 1)
    other = lt.load(tensors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    with pytest.raises(Mismatch, match=r"replaces head\.weight, to which"):
        combine([headed(np.zeros((2, 3), np.float32)), other])


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1.0], [1, 2, 3], 0.5])
def test_weights_are_one_for_each_adapter(weights: Any) -> None:
    with pytest.raises(Unsupported, match=r"weights? for 2 adapters"):
        combine([small(), small(1)], weights=weights)


@pytest.mark.parametrize("weights", ["0.5", ["0.5", 1], [1, None], {"a": 1, "b": 2}, object()])
def test_weights_are_numbers(weights: Any) -> None:
    with pytest.raises(Unsupported, match="is no number"):
        combine([small(), small(1)], weights=weights)


def test_a_single_weight_may_be_of_any_numeric_type() -> None:
    for weight in (2, 2.0, np.float32(2), np.int64(2), np.array([2.0])):
        assert combine([small()], weights=weight).weights == (2.0,)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(weight: float) -> None:
    with pytest.raises(Unsupported, match="weight 2 is"):
        combine([small(), small(1)], weights=[1, weight])


def test_nothing_and_rank_zero() -> None:
    with pytest.raises(Unsupported, match="nothing to combine"):
        combine([])
    with pytest.raises(Unsupported, match="rank 0"):
        combine([small()], rank=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_values_that_are_not_finite_are_named(value: float, method: str) -> None:
    tensors = factors(0, SHAPES, 2)
    tensors["base_model.model.layers.1.v.lora_B.weight"][3, 1] = value
    bad = lt.load(tensors, config={"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    with pytest.raises(InputError, match=r"layers\.1\.v.*lora_B"):
        combine([small(), bad], method=method)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 1}, {"method": "svc"}, {"method": "magnitude_prune", "rank": 1}], ids=str
)
def test_a_result_too_large_for_its_type_is_named(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratools.methods.elementwise._SMALL", 0)  # float32, as for large matrices
    adapter = small()
    with pytest.raises(NonFinite, match=r"layers\.0\.q: the result is too large for float32"):
        combine([adapter, adapter], weights=[1e39, 1], executor="inline", **options)


@pytest.mark.parametrize(
    ("config", "words", "way_out"),
    [
        ({"use_dora": True}, r"layers\.0\.q is dora", "merge"),
        ({"init_lora_weights": "pissa"}, r"layers\.0\.q starts from a part of its base \(pissa\)", "normalize --base"),
    ],
)  # fmt: skip
def test_what_is_no_sum_is_refused_by_name(config: dict[str, Any], words: str, way_out: str) -> None:
    tensors = factors(0, SHAPES, 2)
    if "use_dora" in config:
        for name, (out, _) in SHAPES.items():
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = np.ones(out, np.float32)
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q", "v"], **config}
    with pytest.raises(Unsupported, match=words) as caught:
        combine([small(), lt.load(tensors, config=raw)])
    assert way_out in str(caught.value.hint)


def test_ia3_is_refused_by_name() -> None:
    tensors = {"base_model.model.layers.0.q.ia3_l": np.ones((12, 1), np.float32)}
    adapter = lt.load(
        tensors, config={"peft_type": "IA3", "target_modules": ["q"], "feedforward_modules": []}
    )
    with pytest.raises(Unsupported, match=r"layers\.0\.q is ia3"):
        combine([small(), adapter])


def test_shapes_must_fit() -> None:
    with pytest.raises(Mismatch, match=r"a\.q"):
        combine([small(shapes={"a.q": (4, 3)}), small(shapes={"a.q": (4, 5)})])


def test_different_bases_are_said() -> None:
    adapters = [small(base_model_name_or_path="one/base"), small(1, base_model_name_or_path="two/base")]
    assert any("one/base, two/base" in warning for warning in combine(adapters).warnings)


def test_memory_is_counted_before_anything_is_read() -> None:
    with pytest.raises(OverBudget):
        combine([small(), small(1)], max_memory=1000)


def test_the_memory_counted_covers_the_process() -> None:
    """As every verb counts it: the interpreter and numpy are there before the first array."""
    assert plan_combine([small(), small(1)]).peak_bytes(1) > RUNTIME_BYTES


def test_a_flat_kind_that_may_be_a_convolution_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 27), "hada_w2_a": (4, 2), "hada_w2_b": (2, 27)}
    tensors = {f"conv.{role}": rng.standard_normal(size).astype("f4") for role, size in sizes.items()}
    loha = lt.load(tensors, config={"peft_type": "LOHA", "r": 2, "alpha": 2})
    words = "conv is loha and becomes a plain LoRA; its file does not tell a linear layer from a convolution"
    assert any(words in warning for warning in combine([loha]).warnings)
    for shape in ((4, 3, 3, 3), (4, 27)):
        told = combine([loha], base={"conv.weight": np.zeros(shape, "f4")})
        assert told.adapter.modules["conv"].shape == shape
        assert not any("loha" in warning for warning in told.warnings)
    beside = small(shapes={"conv": (4, 27)})  # which is no convolution
    assert not any("loha" in warning for warning in combine([beside, loha]).warnings)


@pytest.mark.parametrize(
    ("options", "limit"),
    [({}, 4), ({"method": "ties", "space": "weight"}, 8), ({"method": "ties", "space": "core"}, 4)],
    ids=["linear", "ties, weights", "ties, core"],
)
def test_a_rank_that_nothing_has_is_said(options: dict[str, Any], limit: int) -> None:
    shapes = {"q": (12, 8), "k": (12, 8)}
    adapters = [small(shapes=shapes), small(1, shapes=shapes)]
    over = combine(adapters, rank=limit + 1, **options)
    assert (
        f"q is raised from rank {limit} to {limit + 1}, with zeros that change nothing (and 1 more are)"
        in (over.warnings)
    )
    assert np.linalg.matrix_rank(dense(over.adapter)["q"]) <= limit
    assert not any("raised" in warning for warning in combine(adapters, rank=limit, **options).warnings)


@pytest.mark.parametrize(
    ("asked", "least", "most"), [("bf16", 1e-4, 1e-2), ("f16", 1e-5, 1e-3), ("f32", 0, 0)]
)
def test_what_rounding_to_the_written_type_costs_is_what_a_diff_finds(
    asked: str, least: float, most: float, tmp_path: Path
) -> None:
    adapters = [small(), small(1)]
    assert combine(adapters, weights=[0.7, 0.3], dtype=asked).rounding == 0.0  # in memory nothing is rounded
    report = combine(adapters, tmp_path / "out", weights=[0.7, 0.3], dtype=asked, sync=False)
    wanted, got = weighted_sum(adapters, [0.7, 0.3]), dense(lt.load(tmp_path / "out"))
    apart = sum(np.linalg.norm(got[name] - delta) ** 2 for name, delta in wanted.items()) ** 0.5
    whole = sum(np.linalg.norm(delta) ** 2 for delta in wanted.values()) ** 0.5
    assert report.rounding == pytest.approx(apart / whole, rel=1e-2, abs=1e-12 if most else 1)
    assert least <= report.rounding <= most


def test_another_device_is_refused() -> None:
    with pytest.raises(Unsupported):
        combine([small()], device="cuda")


# --- files -------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_was_returned(tmp_path: Path) -> None:
    paths = [make_adapter(tmp_path / str(s), SHAPES, seed=s, rank=2 + s, alpha=5) for s in range(2)]
    report = combine(paths, tmp_path / "out", weights=[0.7, 0.3], sync=False)
    same(report.adapter, lt.load(tmp_path / "out"))
    assert_sum(report, [lt.load(path) for path in paths], [0.7, 0.3])
    record = json.loads((tmp_path / "out" / "loratools.json").read_text())
    assert record["verb"] == "combine"
    assert record["parameters"]["weights"] == [0.7, 0.3]
    assert [entry["name"] for entry in record["inputs"]] == ["0", "1"]


def test_the_type_is_the_widest_that_is_read_or_the_one_asked_for(tmp_path: Path) -> None:
    halves = [small(s, kind=ml_dtypes.bfloat16) for s in range(2)]
    cases = [(halves, None, "BF16"), ([*halves, small(2)], None, "F32"),
             ([*halves, small(2, kind=np.float16)], None, "F32"), ([halves[0], small(3, kind=np.float64)], None, "F64"),
             (halves, "f16", "F16")]  # fmt: skip
    for number, (adapters, asked, expected) in enumerate(cases):
        report = combine(adapters, tmp_path / str(number), dtype=asked, sync=False)
        stored = {ref.spec.dtype.name for ref in lt.load(tmp_path / str(number)).tensors}
        assert (report.dtype, stored) == (expected, {expected})


def test_an_output_in_the_way_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    paths = [make_adapter(tmp_path / str(seed), SHAPES, seed=seed) for seed in range(2)]
    for place in (paths[0], paths[1] / "inside", tmp_path):
        with pytest.raises(OutputExists):
            plan_combine(paths, place)
    base = write_adapter(
        tmp_path / "base", {f"{name}.weight": np.zeros(s, "f4") for name, s in SHAPES.items()}
    )
    (base / "adapter_config.json").unlink()
    (base / "adapter_model.safetensors").rename(base / "model.safetensors")
    with pytest.raises(OutputExists, match="base"):
        plan_combine(paths, base / "inside", base=base)
    assert plan_combine(paths, tmp_path / "out", base=base).items[0].name == "layers.0.q"
    combine(paths, tmp_path / "out", sync=False)
    with pytest.raises(OutputExists) as caught:
        combine(paths, tmp_path / "out", sync=False)
    assert "--force" in str(caught.value.hint)
    combine(paths, tmp_path / "out", force=True, rank=1, sync=False)
    assert lt.load(tmp_path / "out").modules["layers.0.q"].rank == 1


# --- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def pair_of(tmp_path: Path) -> list[str]:
    return [str(make_adapter(tmp_path / name, SHAPES, seed=s, rank=2 + s)) for s, name in enumerate("ab")]


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["combine", *args])


def test_cli_writes_and_says_what(pair_of: list[str], tmp_path: Path) -> None:
    result = run(*pair_of, "-o", str(tmp_path / "out"), "-w", "0.5", "-w", "2", "--json", "--no-sync")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["schema"] == "loratools.combine/1"
    assert document["weights"] == [0.5, 2.0]
    assert (document["method"], document["rank"], document["relative_error"]) == ("linear", 5, 0.0)
    assert [module["name"] for module in document["modules"]] == list(SHAPES)
    expected = weighted_sum([lt.load(path) for path in pair_of], [0.5, 2])
    for name, delta in dense(lt.load(tmp_path / "out")).items():
        np.testing.assert_allclose(delta, expected[name], atol=1e-7)


def test_cli_tells_people(pair_of: list[str], tmp_path: Path) -> None:
    result = run(*pair_of, "-o", str(tmp_path / "out"), "--rank", "2", "--modules", "--no-sync")
    assert result.exit_code == 0, result.stderr
    assert "Combined a and b" in result.stdout
    assert "of the result's norm is lost at this rank" in result.stdout
    assert "layers.1.v" in result.stdout


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([], "none: the factors hold the result"),
        (["--method", "ties", "--density", "1", "--rank", "8"], "none: the factors hold the result"),
        (["--dtype", "bf16"], "none before rounding to BF16, which changes the result by 0."),
        (["--rank", "1", "--dtype", "bf16"], "; rounding to BF16 changes it by 0."),
    ],
)  # fmt: skip
def test_cli_says_what_is_lost(pair_of: list[str], tmp_path: Path, extra: list[str], words: str) -> None:
    result = run(*pair_of, "-o", str(tmp_path / "out"), "--no-sync", *extra)
    assert result.exit_code == 0, result.stderr
    assert words in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--density", "0.5"], "--density is no option of the method linear"),
        (["--method", "ties", "--density", "0"], "density is 0.0; it must be above 0 and at most 1"),
        (["--method", "ties", "--density", "1.5"], "it must be above 0"),
        (["--method", "tis"], "'tis' is none of linear, cat, ties"),
        (["--method", "ties", "--space", "factor"], "'factor' is not one of"),
        (["--rank", "0"], "0 is not in the range"),
        (["-w", "1"], "-w was given 1 time for 2 adapters"),
        (["--arch", "llama"], "no architecture 'llama' is known"),
    ],
)  # fmt: skip
def test_cli_misuse(pair_of: list[str], tmp_path: Path, extra: list[str], words: str) -> None:
    result = run(*pair_of, "-o", str(tmp_path / "out"), *extra)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_cli_an_option_of_other_methods_names_them(pair_of: list[str], tmp_path: Path) -> None:
    result = run(*pair_of, "-o", str(tmp_path / "out"), "--epsilon", "0.1")
    assert "Hint: della has it" in result.stderr
    nowhere = run(*pair_of)
    assert nowhere.exit_code == 2
    assert nowhere.stderr.rstrip().endswith("Hint: loratools combine REF... -o OUT")
    assert "last argument" not in run("--help").stdout


def test_cli_dry_run_touches_nothing(pair_of: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run(*pair_of, "-o", str(tmp_path / "out"), "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    planned = json.loads(result.stdout)
    assert sorted(tmp_path.rglob("*")) == before
    run(*pair_of, "-o", str(tmp_path / "out"), "--no-sync")
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    promised = {file["name"]: file["bytes"] for file in planned["files"]}
    assert promised["adapter_model.safetensors"] == written["adapter_model.safetensors"]
    assert promised.keys() == written.keys()
    assert planned["rank"] == 5


def test_torch_is_not_loaded(pair_of: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, loratools.cli.app as cli\n"
        f"cli.app.main(['combine', *{pair_of!r}, '-o', {str(tmp_path / 'out')!r}, '--method', 'ties', '--rank', '2'],"
        " standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_module_named_by_the_environment_adds_its_methods(pair_of: list[str], tmp_path: Path) -> None:
    (tmp_path / "my_methods.py").write_text(
        "from loratools.methods import method\n\n\n"
        "@method()\n"
        "def only_one(stack, *, which: int = 0):\n"
        '    """One of them.\n\n    Args:\n        which: of them.\n    """\n'
        "    return stack.deltas[which]\n"
    )
    code = (
        "import loratools.cli.app as cli, sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"cli.app.main(['combine', *{pair_of!r}, '-o', {str(tmp_path / 'out')!r}, '--method', 'only_one',"
        " '--which', '1'], standalone_mode=False)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                   env={**os.environ, "LORATOOLS_METHODS": "my_methods"})  # fmt: skip
    same(lt.load(tmp_path / "out"), lt.load(pair_of[1]))


def test_what_is_typed_displaces_a_default_that_goes_with_another_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loratools.toml").write_text('[combine]\nmethod = "ties"\ndensity = 0.5\nrank = 2\n')
    path = write_small_adapter(tmp_path / "one")
    run = CliRunner().invoke(app, ["combine", str(path), "--method", "linear", "-o", "out"])
    assert run.exit_code == 0, run.output
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    run = CliRunner().invoke(
        app, ["combine", str(path), "--method", "linear", "--density", "0.5", "-o", "other"]
    )
    assert run.exit_code == 2
    assert "--density is no option of the method linear" in run.output
