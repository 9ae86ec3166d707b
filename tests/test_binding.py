"""Places: what the base's shapes decide, and what they forbid."""

from __future__ import annotations

import numpy as np
import pytest

import loratools as lt
from loratools.errors import Mismatch, ShapeMismatch
from tests.helpers import write_adapter

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["proj"]}


def factors(out: int, into: int, path: str = "layer.proj") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(out * 100 + into)
    return {
        f"base_model.model.{path}.lora_A.weight": rng.standard_normal((2, into)).astype(np.float32),
        f"base_model.model.{path}.lora_B.weight": rng.standard_normal((out, 2)).astype(np.float32),
    }


def test_factors_the_wrong_way_round_are_refused_and_not_transposed(tmp_path):
    adapter = write_adapter(tmp_path / "a", factors(6, 4), **CONFIG)
    base = {"layer.proj.weight": np.zeros((4, 6), np.float32)}
    with pytest.raises(ShapeMismatch) as caught:
        lt.merge(base, adapter)
    assert str(caught.value) == "layer.proj: delta [6, 4] does not fit weight [4, 6]"


def test_a_bias_of_the_last_dimension_says_that_a_weight_is_stored_in_out(tmp_path):
    adapter = write_adapter(tmp_path / "a", factors(6, 4), **CONFIG)
    base = {"layer.proj.weight": np.zeros((4, 6), np.float32), "layer.proj.bias": np.zeros(6, np.float32)}
    merged = lt.merge(base, adapter).state_dict["layer.proj.weight"]
    down, up = (factors(6, 4)[f"base_model.model.layer.proj.lora_{which}.weight"] for which in "AB")
    np.testing.assert_allclose(merged, 2 * (up @ down).T, rtol=1e-5)


def test_the_flag_is_heard_where_no_bias_speaks(tmp_path):
    adapter = write_adapter(tmp_path / "a", factors(6, 4), **CONFIG, fan_in_fan_out=True)
    merged = lt.merge({"layer.proj.weight": np.zeros((4, 6), np.float32)}, adapter).state_dict
    assert merged["layer.proj.weight"].any()


def test_a_rank_that_contradicts_the_configuration_names_the_module(tmp_path):
    adapter = write_adapter(tmp_path / "a", factors(4, 6), **{**CONFIG, "r": 3})
    with pytest.raises(Mismatch, match=r"layer\.proj has rank 2 in the file and 3 in the configuration"):
        lt.merge({"layer.proj.weight": np.zeros((4, 6), np.float32)}, adapter)
