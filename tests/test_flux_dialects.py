"""Writing the spellings that only Flux has, and OneTrainer's: products against dense float64 arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.errors import Unsupported

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, RANK, ALPHA = 3072, 2, 6.0
PARTS = ("attn.to_q", "attn.to_k", "attn.to_v")


def _factors(rng, out: int, into: int = HIDDEN) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal((out, RANK)).astype("f4"), rng.standard_normal((RANK, into)).astype("f4")


def _diffusers(path: Path, modules: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """A file with an alpha of its own, and the matrices it stands for."""
    rng = np.random.default_rng(0)
    tensors, dense = {}, {}
    for name, (out, into) in modules.items():
        up, down = _factors(rng, out, into)
        tensors |= {f"transformer.{name}.lora_B.weight": up, f"transformer.{name}.lora_A.weight": down}
        tensors[f"transformer.{name}.alpha"] = np.array(ALPHA, "f4")
        dense[name] = ALPHA / RANK * up.astype("f8") @ down.astype("f8")
    save_file(tensors, path)
    return dense


def test_xlabs_has_no_alpha_and_only_the_attention_of_a_single_block(tmp_path: Path) -> None:
    names = {f"single_transformer_blocks.3.{part}": (HIDDEN, HIDDEN) for part in PARTS}
    names |= {
        f"transformer_blocks.1.{part}": (HIDDEN, HIDDEN) for part in ("attn.to_out.0", "attn.to_add_out")
    }
    dense = _diffusers(tmp_path / "in.safetensors", names)
    report = lt.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to="xlabs", arch="flux1")
    assert report.relative < 1e-6
    found = load_file(tmp_path / "out.safetensors")
    stems = {
        "single_blocks.3.processor.qkv_lora": np.concatenate(
            [dense[f"single_transformer_blocks.3.{part}"] for part in PARTS]
        ),
        "double_blocks.1.processor.proj_lora1": dense["transformer_blocks.1.attn.to_out.0"],
        "double_blocks.1.processor.proj_lora2": dense["transformer_blocks.1.attn.to_add_out"],
    }
    assert found.keys() == {f"{stem}.{leg}.weight" for stem in stems for leg in ("down", "up")}
    for stem, expected in stems.items():
        up, down = (found[f"{stem}.{leg}.weight"].astype("f8") for leg in ("up", "down"))
        assert np.linalg.norm(up @ down - expected) <= 1e-6 * np.linalg.norm(expected), stem


def test_xlabs_has_no_place_for_the_rest(tmp_path: Path) -> None:
    names = {f"single_transformer_blocks.0.{part}": (HIDDEN, HIDDEN) for part in PARTS}
    _diffusers(tmp_path / "a.safetensors", {**names, "single_transformer_blocks.0.proj_mlp": (12288, HIDDEN)})
    with pytest.raises(Unsupported, match="part of linear1 that belongs to the MLP"):
        lt.convert(tmp_path / "a.safetensors", to="xlabs", arch="flux1")
    _diffusers(tmp_path / "b.safetensors", {"x_embedder": (HIDDEN, 64), **names})
    with pytest.raises(Unsupported, match="x_embedder"):
        lt.convert(tmp_path / "b.safetensors", to="xlabs", arch="flux1")
    report = lt.convert(tmp_path / "b.safetensors", to="xlabs", arch="flux1", allow_loss=["*x_embedder*"])
    assert [loss.name for loss in report.lost] == [
        f"transformer.x_embedder.{key}" for key in ("alpha", "lora_A.weight", "lora_B.weight")
    ]


def test_a_control_adapter_keeps_biases_and_norms(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    up, down = _factors(rng, HIDDEN)
    given = {
        "double_blocks.0.img_attn.proj.lora_A.weight": down,
        "double_blocks.0.img_attn.proj.lora_B.weight": up,
        "double_blocks.0.img_attn.proj.lora_B.bias": rng.standard_normal(HIDDEN).astype("f4"),
        "double_blocks.0.img_attn.norm.key_norm.scale": rng.standard_normal(128).astype("f4"),
    }
    save_file(given, tmp_path / "in.safetensors")
    there = lt.convert(tmp_path / "in.safetensors", tmp_path / "comfy.safetensors", to="comfy", arch="flux1")
    assert there.identical == len(there.modules)
    lt.convert(tmp_path / "comfy.safetensors", tmp_path / "back.safetensors", to="bfl-control", arch="flux1")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == given.keys()
    assert all(np.array_equal(back[key], given[key]) for key in given)


def test_a_control_adapter_has_its_scaling_in_the_factors(tmp_path: Path) -> None:
    dense = _diffusers(tmp_path / "in.safetensors", {"transformer_blocks.0.attn.to_out.0": (HIDDEN, HIDDEN)})
    lt.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to="bfl-control", arch="flux1")
    found = load_file(tmp_path / "out.safetensors")
    stem = "double_blocks.0.img_attn.proj"
    assert found.keys() == {f"{stem}.lora_{leg}.weight" for leg in "AB"}
    product = found[f"{stem}.lora_B.weight"].astype("f8") @ found[f"{stem}.lora_A.weight"].astype("f8")
    (expected,) = dense.values()
    assert np.linalg.norm(product - expected) <= 1e-6 * np.linalg.norm(expected)


def test_onetrainers_names_are_diffusers_flattened(tmp_path: Path) -> None:
    names = {f"single_transformer_blocks.3.{part}": (HIDDEN, HIDDEN) for part in PARTS}
    _diffusers(tmp_path / "in.safetensors", names)
    there = lt.convert(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", to="onetrainer", arch="flux1"
    )
    assert there.identical == 3
    found = load_file(tmp_path / "out.safetensors")
    stems = {f"lora_transformer_{name.replace('.', '_')}" for name in names}
    assert found.keys() == {
        f"{s}.{role}" for s in stems for role in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert lt.load(tmp_path / "out.safetensors").format == "onetrainer"
    back = lt.convert(tmp_path / "out.safetensors", to="diffusers", arch="flux1")
    assert back.identical == 3
