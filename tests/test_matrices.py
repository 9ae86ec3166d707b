"""A module as matrices and back: the same delta for every kind of layer, with the oracle that merging is."""

from __future__ import annotations

import numpy as np
import pytest

import loratools as lt
from loratools.deltas.lowrank import LowRank
from loratools.errors import InputError, Unsupported
from loratools.matrices import bias_delta, lora_module, matrices, module_cost

rng = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def loaded(tensors: dict[str, np.ndarray], **config: object) -> lt.Adapter:
    return lt.load(tensors, config={"peft_type": "LORA", "r": 2, "lora_alpha": 5, **config})


LAYERS = {
    "linear": ({"fc.lora_A.weight": values(2, 6), "fc.lora_B.weight": values(4, 2)}, (4, 6)),
    "conv2d": (
        {"fc.lora_A.weight": values(2, 6, 3, 3), "fc.lora_B.weight": values(4, 2, 1, 1)},
        (4, 6, 3, 3),
    ),
    "conv1d": ({"fc.lora_A.weight": values(2, 6, 5), "fc.lora_B.weight": values(4, 2, 1)}, (4, 6, 5)),
    "embedding": ({"fc.lora_embedding_A": values(2, 11), "fc.lora_embedding_B": values(6, 2)}, (11, 6)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_matrix_is_what_a_merge_adds(layer: str, rslora: bool) -> None:
    tensors, shape = LAYERS[layer]
    adapter = loaded(tensors, use_rslora=rslora)
    (delta,) = matrices(adapter.modules["fc"], "fc")
    base = {"fc.weight": np.zeros(shape, np.float32)}
    added = lt.merge(base, adapter).state_dict["fc.weight"]
    wanted = added.T if layer == "embedding" else added.reshape(shape[0], -1)
    np.testing.assert_allclose(delta.up @ delta.down, wanted, rtol=1e-5, atol=1e-5)
    made = lora_module(adapter.modules["fc"], [delta], prefix="fc")
    assert made.shape == adapter.modules["fc"].shape
    assert {role: ref.shape for role, ref in made.tensors.items()} == {
        role: ref.shape for role, ref in adapter.modules["fc"].tensors.items()
    }
    (again,) = matrices(made, "fc")
    np.testing.assert_array_equal(again.up @ again.down, delta.up @ delta.down)
    assert module_cost(adapter.modules["fc"]) == sum(v.size for v in tensors.values()) // 2


def test_experts_are_a_matrix_each_and_go_back_into_one_module() -> None:
    experts, rank = 3, 2
    tensors = {
        "experts.lora_A.weight": values(experts * rank, 6),
        "experts.lora_B.weight": values(4, rank * experts),
    }
    adapter = loaded(tensors, target_parameters=["experts.down_proj"], target_modules=[])
    ((name, module),) = adapter.modules.items()
    found = matrices(module, name)
    assert len(found) == experts
    down, up = tensors["experts.lora_A.weight"], tensors["experts.lora_B.weight"]
    for index, delta in enumerate(found):
        # PEFT: B as (out, rank, experts), A as (experts, rank, in)
        wanted = up.reshape(4, rank, experts)[:, :, index] @ down.reshape(experts, rank, 6)[index] * 2.5
        np.testing.assert_allclose(delta.up @ delta.down, wanted, rtol=1e-5)
    smaller = [LowRank(f.up[:, : 1 + i % 2], f.down[: 1 + i % 2]) for i, f in enumerate(found)]
    made = lora_module(module, smaller, prefix=name)
    for one, two in zip(matrices(made, name), smaller, strict=True):
        np.testing.assert_allclose(one.up @ one.down, two.up @ two.down, rtol=1e-6)


def test_other_sums_have_factors_too() -> None:
    loha = {f"fc.hada_w{i}_{ab}": values(*((4, 2) if ab == "a" else (2, 6))) for i in (1, 2) for ab in "ab"}
    lokr = {"fc.lokr_w1": values(2, 3), "fc.lokr_w2_a": values(2, 2), "fc.lokr_w2_b": values(2, 2)}
    for kind, tensors, rank in (("LOHA", loha, 4), ("LOKR", lokr, 4)):
        adapter = lt.load(tensors, config={"peft_type": kind, "r": 2, "alpha": 5})
        (delta,) = matrices(adapter.modules["fc"], "fc")
        added = lt.merge({"fc.weight": np.zeros((4, 6), np.float32)}, adapter).state_dict["fc.weight"]
        np.testing.assert_allclose(delta.up @ delta.down, added, rtol=1e-4, atol=1e-5)
        assert delta.up.shape[1] == rank
        assert delta.up.dtype == np.float32


def test_a_bias_comes_scaled_and_goes_back() -> None:
    tensors = {**LAYERS["linear"][0], "fc.lora_B.bias": values(4)}
    module = loaded(tensors, lora_bias=True).modules["fc"]
    found = bias_delta(module)
    assert found is not None
    np.testing.assert_allclose(found, 2.5 * tensors["fc.lora_B.bias"])
    made = lora_module(module, matrices(module, "fc"), prefix="fc", bias=found)
    np.testing.assert_array_equal(bias_delta(made), found)
    assert bias_delta(loaded(LAYERS["linear"][0]).modules["fc"]) is None


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({**LAYERS["linear"][0], "fc.lora_magnitude_vector": values(4)}, {"use_dora": True}, "fc is dora"),
        (LAYERS["linear"][0], {"init_lora_weights": "pissa"}, "part of its base"),
        ({"fc.ia3_l": values(4, 1)}, {"peft_type": "IA3", "feedforward_modules": []}, "fc is ia3"),
    ],
)
def test_what_is_no_sum_is_refused_by_name_with_the_way_out(tensors, config, words) -> None:
    module = loaded(tensors, **config).modules["fc"]
    with pytest.raises(Unsupported, match=words) as caught:
        matrices(module, "fc")
    assert caught.value.hint


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("role", ["A", "B"])
def test_values_that_are_not_finite_are_named(bad: float, role: str) -> None:
    tensors = {key: value.copy() for key, value in LAYERS["linear"][0].items()}
    tensors[f"fc.lora_{role}.weight"][0, 0] = bad
    with pytest.raises(InputError, match=rf"fc: fc\.lora_{role}\.weight holds"):
        matrices(loaded(tensors).modules["fc"], "fc")


def test_large_values_are_not_taken_for_infinite_ones() -> None:
    tensors = {
        "fc.lora_A.weight": np.full((2, 6), 1e30, "f4"),
        "fc.lora_B.weight": np.full((4, 2), 1e-30, "f4"),
    }
    (delta,) = matrices(loaded(tensors).modules["fc"], "fc")
    np.testing.assert_allclose(delta.up @ delta.down, 5, rtol=1e-5)


def test_float64_stays_float64() -> None:
    tensors = {key: value.astype(np.float64) for key, value in LAYERS["linear"][0].items()}
    (delta,) = matrices(loaded(tensors).modules["fc"], "fc")
    assert delta.up.dtype == np.float64
