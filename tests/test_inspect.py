"""``inspect``: what it reports, from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools.errors import BadConfig, CorruptFile, NotFound, Unsupported
from loratools.verbs.inspect import report
from tests.helpers import NoReads, make_adapter, write_adapter

if TYPE_CHECKING:
    from pathlib import Path


def ones(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


FIELDS = [
    "schema", "path", "format", "evidence", "kinds", "base_model", "rank", "alpha", "scaling", "parameters", "bytes",
    "dtypes", "modules", "extras", "metadata", "warnings", "architecture",
]  # fmt: skip


def test_the_whole_report_of_a_small_adapter(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.layers.0.q_proj.lora_A.weight": ones(2, 8, dtype=np.float16),
        "base_model.model.layers.0.q_proj.lora_B.weight": ones(6, 2, dtype=np.float16),
        "base_model.model.layers.0.k_proj.lora_A.weight": ones(4, 8),
        "base_model.model.layers.0.k_proj.lora_B.weight": ones(6, 4),
        "base_model.model.score.weight": ones(3, 8),
        "base_model.model.stray": ones(1),
    }
    folder = write_adapter(
        tmp_path / "a", tensors, r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, modules_to_save=["score"],
        base_model_name_or_path="org/base",
    )  # fmt: skip
    found = lt.inspect(folder).to_dict()
    assert list(found) == FIELDS
    modules = {module.pop("name"): module for module in found.pop("modules")}
    assert modules == {
        "layers.0.q_proj": {
            "kind": "lora", "rank": 2, "alpha": 8, "scaling": 4.0, "shape": [6, 8], "parameters": 28, "dtype": "F16",
            "experts": 1, "blocks": 1,
        },
        "layers.0.k_proj": {
            "kind": "lora", "rank": 4, "alpha": 8, "scaling": 2.0, "shape": [6, 8], "parameters": 56, "dtype": "F32",
            "experts": 1, "blocks": 1,
        },
    }  # fmt: skip
    extras = {extra.pop("name"): extra for extra in found.pop("extras")}
    assert extras["base_model.model.score.weight"] == {
        "shape": [3, 8],
        "dtype": "F32",
        "reason": "modules_to_save",
    }
    assert set(extras) == {"base_model.model.score.weight", "base_model.model.stray"}
    assert found == {
        "schema": "loratools.inspect/1",
        "path": str(folder),
        "format": "peft",
        "evidence": "peft_type in adapter_config.json",
        "kinds": ["lora"],
        "base_model": "org/base",
        "rank": {"min": 2, "max": 4},
        "alpha": {"min": 8, "max": 8},
        "scaling": {"min": 2.0, "max": 4.0},
        "parameters": 28 + 56 + 24 + 1,
        "bytes": 28 * 2 + (56 + 24 + 1) * 4,
        "dtypes": {"F16": 2, "F32": 4},
        "metadata": {"format": "pt"},
        "architecture": None,
        "warnings": ["1 of 6 tensors are explained by nothing in the configuration"],
    }
    json.dumps(found)


def test_no_value_is_read(tmp_path: Path) -> None:
    from loratools.formats.opening import interpret, open_parts
    from loratools.formats.peft import read_peft
    from loratools.formats.peft_config import parse_config

    folder = make_adapter(tmp_path / "a", {"q": (6, 8)})
    opened = open_parts(folder)
    unread = read_peft("a", NoReads(opened.source), parse_config(opened.raw), "")
    assert report(unread).modules == report(interpret(opened)).modules


def test_neither_numpy_nor_torch_is_loaded_and_the_header_is_read_once(tmp_path: Path) -> None:
    make_adapter(
        tmp_path / "a", {f"layers.{i}.q_proj": (6, 8) for i in range(20)}, rank_pattern={"0.q_proj": 4}
    )
    script = """
import builtins, os, sys
reads = []
import loratools as lt
from loratools.tensors.files import File
original = File.read
File.read = lambda self, count, offset: reads.append((offset, count)) or original(self, count, offset)
found = lt.inspect(sys.argv[1])
assert len(found.modules) == 20
assert not {"numpy", "torch", "click", "rich", "safetensors", "ml_dtypes"} & set(sys.modules), "imports"
size = os.path.getsize(sys.argv[1] + "/adapter_model.safetensors")
assert len(reads) <= 2 and sum(count for _, count in reads) < size, reads
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=True)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "prefix_tuning"),
        ({"peft_type": "OFT", "r": 0}, "oft"),
        ({"peft_type": "SOMETHING_NEW"}, "something_new"),
    ],
)  # fmt: skip
def test_what_is_no_lora_is_reported_with_its_kind(
    tmp_path: Path, config: dict[str, object], kind: str
) -> None:
    found = lt.inspect(write_adapter(tmp_path / "a", {"prompt_embeddings": ones(4, 8)}, **config))
    assert (found.kinds, found.modules, found.rank.max, found.scaling.max) == ((kind,), (), None, None)
    assert any(str(config["peft_type"]) in warning for warning in found.warnings)


def test_ia3_has_no_rank_and_says_that_it_is_no_lora(tmp_path: Path) -> None:
    tensors = {"base_model.model.q.ia3_l": ones(6, 1)}
    found = lt.inspect(write_adapter(tmp_path / "a", tensors, peft_type="IA3", feedforward_modules=[]))
    assert found.kinds == ("ia3",)
    assert (found.rank.min, found.scaling.min, found.modules[0].rank) == (None, None, None)
    assert "ia3 is not a LoRA" in found.warnings


def test_scaling_is_null_with_a_warning_where_nothing_says_it(tmp_path: Path) -> None:
    tensors = {"base_model.model.q.lora_A.weight": ones(4, 8), "base_model.model.q.lora_B.weight": ones(6, 4)}
    save_file(tensors, tmp_path / "loose.safetensors")
    found = lt.inspect(tmp_path / "loose.safetensors")
    assert found.to_dict()["scaling"] == {"min": None, "max": None}
    assert any("scaling is null" in warning for warning in found.warnings)
    told = lt.inspect(tmp_path / "loose.safetensors", alpha=2)
    assert (told.scaling.max, told.format, told.warnings) == (0.5, "peft", ())


@pytest.mark.parametrize("given", [{"r": 8}, {"lora_alpha": 8}, {}])
def test_missing_fields_are_peft_s_defaults_with_a_warning(tmp_path: Path, given: dict[str, int]) -> None:
    tensors = {"base_model.model.q.lora_A.weight": ones(8, 8), "base_model.model.q.lora_B.weight": ones(6, 8)}
    found = lt.inspect(write_adapter(tmp_path / "a", tensors, **given))
    assert found.scaling.max == 1.0
    assert len(found.warnings) == 2 - len(given)


def test_a_rank_that_the_configuration_denies(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"q": (6, 8), "k": (6, 8)}, rank=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    found = lt.inspect(folder)
    assert found.rank.max == 4
    assert any("rank 4 in the file, 8 in the configuration (and 1 more" in w for w in found.warnings)


def test_fused_experts_have_the_rank_of_one(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.mlp.experts.base_layer.lora_A.weight": ones(3 * 4, 8),
        "base_model.model.mlp.experts.base_layer.lora_B.weight": ones(10, 4 * 3),
    }
    folder = write_adapter(
        tmp_path / "a", tensors, r=4, lora_alpha=8, target_parameters=["mlp.experts.gate_up_proj"], target_modules=[]
    )  # fmt: skip
    module = lt.inspect(folder).modules[0]
    assert (module.rank, module.experts, module.shape, module.scaling) == (4, 3, (10, 8), 2.0)


def test_corrupt_input_raises(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"q": (6, 8)})
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good = config.read_text()
    config.write_text("{")
    with pytest.raises(CorruptFile, match="not JSON"):
        lt.inspect(folder)
    config.write_text(good.replace('"r": 4', '"r": 0'))
    with pytest.raises(BadConfig, match="r is 0"):
        lt.inspect(folder)
    config.write_text(good)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptFile):
        lt.inspect(folder)
    with pytest.raises(NotFound):
        lt.inspect(tmp_path / "nowhere")
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(Unsupported, match="pickle"):
        lt.inspect(folder)
