"""Reduced adapters in PEFT: every kind of layer and option loads, and merges to the weights it merged to before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import loratools as lt
from loratools.errors import InputError, Unsupported
from tests.helpers import assert_same, merged_by_peft
from tests.test_peft_oracle import CASES, Case, lora, toy, trained

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
]


# Their files have kernels flattened, or a dimension that a 1-d convolution has not.
KERNELS = {"adalora", "loha-conv", "loha-conv-effective", "lokr-conv", "lokr-conv-effective"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_loses_nothing_is_to_peft_what_it_was(case: Case, tmp_path: Path) -> None:
    folder, out = trained(case, tmp_path / "adapter", torch.float32, None), tmp_path / "reduced"
    if not all(module.is_delta for module in lt.load(folder).modules.values()):
        with pytest.raises(Unsupported) as raised:
            lt.reduce(folder, out, rank=1)
        assert raised.value.hint
        return
    if not lt.load(folder).modules:
        with pytest.raises(InputError, match="no modules to reduce"):
            lt.reduce(folder, out, rank=1)
        return
    report = lt.reduce(folder, out, error=1e-7, per_module=True, sync=False)
    assert report.relative_error <= 1e-7
    if case.name in KERNELS:
        assert any("PEFT will not load" in warning for warning in report.warnings)
        with pytest.raises(RuntimeError, match=r"size mismatch for base_model.model.(line|point)"):
            merged_by_peft(toy(torch.float32), out)
        return
    expected, actual = merged_by_peft(toy(torch.float32), folder), merged_by_peft(toy(torch.float32), out)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert_same(name, actual[name], value)


@pytest.mark.parametrize("rule", [{"rank": 2}, {"params": 8_000}, {"energy": 0.8}, {"rank": 12}])
def test_what_peft_adds_is_the_nearest_of_its_rank(rule: dict[str, float], tmp_path: Path) -> None:
    targets = ["wide", "bare", "c_fc", "up", "plane"]
    case = Case("several", lora(target_modules=targets, rank_pattern={"wide": 9, "c_fc": 3}))
    folder = trained(case, tmp_path / "adapter", torch.float32, None)
    report = lt.reduce(folder, tmp_path / "reduced", sync=False, **rule)
    base = toy(torch.float32).double().state_dict()
    before = merged_by_peft(toy(torch.float32).double(), folder)
    after = merged_by_peft(toy(torch.float32).double(), tmp_path / "reduced")
    lost = whole = 0.0
    for one in report.modules:
        name = f"{one.name}.weight"
        delta, left = ((state[name] - base[name]).numpy() for state in (before, after))
        delta, left = delta.reshape(len(delta), -1), left.reshape(len(left), -1)
        values = np.linalg.svd(delta, compute_uv=False)
        best, norm = np.linalg.norm(values[one.rank :]), np.linalg.norm(values)
        assert abs(np.linalg.norm(delta - left) - best) <= 1e-6 * norm
        assert abs(one.relative_error * norm - best) <= 1e-6 * norm
        lost, whole = lost + best**2, whole + norm**2
    assert report.relative_error == pytest.approx(np.sqrt(lost / whole), abs=1e-6)
