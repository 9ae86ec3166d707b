"""Writing cloneofsimo's numbered files: the numbers are those the reader proves, the products dense float64's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.errors import Unsupported

if TYPE_CHECKING:
    from pathlib import Path

# Numbered by hand from the trainer's walk: nine layers in each attention block, the middle block after all others.
NUMBERED = {
    "unet:0": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", (320, 320)),
    "unet:4": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", (2560, 320)),
    "unet:15": ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k", (320, 768)),
    "unet:143": ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", (1280, 1280)),
    "text_encoder:0": ("text_encoder.text_model.encoder.layers.0.self_attn.k_proj", (768, 768)),
    "text_encoder:47": ("text_encoder.text_model.encoder.layers.11.self_attn.out_proj", (768, 768)),
}


@pytest.fixture
def style(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Some layers in kohya's keys at alpha 6 and rank 2, and the matrices they stand for."""
    rng, tensors, dense = np.random.default_rng(0), {}, {}
    for number, (name, (out, into)) in NUMBERED.items():
        component, _, path = name.partition(".")
        stem = f"lora_{'unet' if component == 'unet' else 'te'}_{path.replace('.', '_')}"
        up, down = rng.standard_normal((out, 2)).astype("f4"), rng.standard_normal((2, into)).astype("f4")
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        tensors[f"{stem}.alpha"] = np.array(6.0, "f4")
        dense[number] = 3 * up.astype("f8") @ down.astype("f8")
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors", dense


def test_every_layer_has_its_number_and_the_scaling_in_its_factors(style, tmp_path: Path) -> None:
    path, dense = style
    out = tmp_path / "out.safetensors"
    assert lt.convert(path, out, to="cloneofsimo", arch="sd1").relative < 1e-6
    found = load_file(out)
    assert len(found) == 2 * (144 + 48)
    for stem in {key.rpartition(":")[0] for key in found}:
        product = found[f"{stem}:up"].astype("f8") @ found[f"{stem}:down"].astype("f8")
        if stem in dense:
            assert np.linalg.norm(product - dense[stem]) <= 1e-6 * np.linalg.norm(dense[stem]), stem
        else:
            assert not product.any()
    with safe_open(out, "np") as file:
        told = file.metadata()
    assert json.loads(told["text_encoder"]) == ["CLIPAttention"]
    assert (told["unet:0:rank"], told["unet:1:rank"]) == ("2", "1")
    assert lt.load(out).format == "cloneofsimo"
    assert lt.diff(path, out, tolerance=1e-6).relative < 1e-6


def test_layers_without_a_number_and_other_models_are_refused(style, tmp_path: Path) -> None:
    path, _ = style
    rng = np.random.default_rng(0)
    stem = "lora_unet_down_blocks_0_attentions_0_proj_out"
    more = {
        f"{stem}.lora_up.weight": rng.standard_normal((320, 2, 1, 1)).astype("f4"),
        f"{stem}.lora_down.weight": rng.standard_normal((2, 320, 1, 1)).astype("f4"),
    }
    save_file({**load_file(path), **more}, tmp_path / "more.safetensors")
    with pytest.raises(Unsupported, match=rf"{stem}.*layers of the attention alone"):
        lt.convert(tmp_path / "more.safetensors", to="cloneofsimo", arch="sd1")
    allowed = lt.convert(tmp_path / "more.safetensors", to="cloneofsimo", arch="sd1", allow_loss=[f"{stem}*"])
    assert {loss.name for loss in allowed.lost} == more.keys()
    with pytest.raises(Unsupported, match="Stable Diffusion 1 and 2"):
        lt.convert(path, to="cloneofsimo", arch="sdxl")
