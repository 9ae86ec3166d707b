"""Merging into diffusion models: single files under the original names, and pipelines' folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file

import loratools as lt
from loratools.architectures.base import architecture, architectures
from loratools.binding import bind
from loratools.cli.app import app
from loratools.errors import InputError, Mismatch, OutputExists, UnmatchedModules, Unsupported
from loratools.models import open_base
from tests.diffusion_helpers import (
    Arrays,
    checkpoint,
    delta,
    factors,
    pipeline_tensors,
    weights,
    write,
    write_pipeline,
)
from tests.helpers import write_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping

ROUNDING = 2e-6  # of float32 sums, relative to the largest entry

SD1_LORA = {
    **factors("lora_unet_down_blocks_0_attentions_0_proj_in", 10, 10, kernel=(1, 1)),
    **factors("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 20, 24, alpha=3.0),
    **factors("lora_unet_mid_block_resnets_0_conv1", 40, 40, kernel=(3, 3), rank=3),
    **factors("lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj", 320, 40, alpha=None),
    **factors("lora_te_text_model_encoder_layers_3_mlp_fc1", 96, 24),
    **factors("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 24, 24),
}
# Where kohya's modules are in a checkpoint of the original code.
SD1_NATIVE = {
    "lora_unet_down_blocks_0_attentions_0_proj_in": "model.diffusion_model.input_blocks.1.1.proj_in",
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    ),
    "lora_unet_mid_block_resnets_0_conv1": "model.diffusion_model.middle_block.0.in_layers.2",
    "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj": (
        "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "lora_te_text_model_encoder_layers_3_mlp_fc1": (
        "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1"
    ),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    ),
}


def require_sum(before: np.ndarray, change: np.ndarray, after: np.ndarray) -> None:
    """``after`` is ``before`` plus a change, as a matrix, rounded to its type once."""
    wanted = before.reshape(len(before), -1).astype(np.float64) + change
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    error = np.abs(after.reshape(wanted.shape) - wanted).max()
    assert error <= ROUNDING * np.abs(wanted).max()


def changed(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> set[str]:
    """Tensors that are not the same bytes."""
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if value.tobytes() != after[name].tobytes()}


def merged(base: Arrays, adapter: Any, **options: Any) -> dict[str, Any]:
    """The state dict of a merge in memory."""
    found = lt.merge(base, adapter, **options).state_dict
    assert found is not None
    return found


def diffusers_name(stem: str) -> str:
    """Where a kohya module of Stable Diffusion 1 is in diffusers: component and path."""
    place = architecture("sd1").lookup(stem)
    assert place is not None
    return place.names[0]


# --- single files --------------------------------------------------------------------------------------------


def test_a_kohya_file_lands_in_a_single_file_checkpoint(tmp_path: Path) -> None:
    base = checkpoint("sd1") | {"first_stage_model.decoder.conv_in.weight": np.ones((4, 4), np.float32)}
    path = write(tmp_path / "base.safetensors", base, {"modelspec.title": "small"})
    adapter = write(tmp_path / "lora.safetensors", SD1_LORA)
    out = tmp_path / "out.safetensors"
    report = lt.merge(path, adapter, out, verify=True)
    assert report.verified
    assert report.modules == {"bound": 6, "unmatched": []}
    after = load_file(out)
    assert changed(base, after) == {f"{name}.weight" for name in SD1_NATIVE.values()}
    for stem, name in SD1_NATIVE.items():
        require_sum(base[f"{name}.weight"], delta(SD1_LORA, stem), after[f"{name}.weight"])
    with safe_open(path, "numpy") as old, safe_open(out, "numpy") as new:
        assert new.metadata()["modelspec.title"] == "small"
        assert list(new.offset_keys()) == list(old.offset_keys())
    assert lt.verify(path, adapter, out).ok
    assert lt.verify(path, adapter, path).summary["unmerged"] == 6


def test_hashes_of_the_bases_tensors_do_not_stay(tmp_path: Path) -> None:
    stated = {
        "sshs_model_hash": "a" * 64,
        "sshs_legacy_hash": "b" * 8,
        "modelspec.hash_sha256": "0x" + "a" * 64,
    }
    path = write(tmp_path / "base.safetensors", checkpoint("sd1"), {**stated, "modelspec.title": "small"})
    report = lt.merge(path, write(tmp_path / "lora.safetensors", SD1_LORA), tmp_path / "out.safetensors")
    [told] = [warning for warning in report.warnings if "left out" in warning]
    assert all(key in told for key in stated)
    with safe_open(tmp_path / "out.safetensors", "numpy") as new:
        assert new.metadata().keys() == {"loratools", "modelspec.title"}
    assert lt.verify(path, tmp_path / "lora.safetensors", tmp_path / "out.safetensors").ok


def test_a_shard_that_nothing_changes_keeps_its_hash(tmp_path: Path) -> None:
    shards = {letter: f"model-0000{i}-of-00002.safetensors" for i, letter in ((1, "a"), (2, "b"))}
    for letter, file in shards.items():
        (tmp_path / "base").mkdir(exist_ok=True)
        tensors = {f"{letter}.weight": np.ones((4, 3), np.float32)}
        write(tmp_path / "base" / file, tensors, {"sshs_model_hash": letter * 64})
    index = {"weight_map": {f"{letter}.weight": file for letter, file in shards.items()}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "base" / "config.json").write_text("{}")
    lora = {"a.lora_A.weight": np.ones((1, 3), np.float32), "a.lora_B.weight": np.ones((4, 1), np.float32)}
    adapter = lt.load(lora, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    report = lt.merge(tmp_path / "base", adapter, tmp_path / "out", sync=False)
    assert any("sshs_model_hash" in warning for warning in report.warnings)
    hashes = {}
    for letter, file in shards.items():
        with safe_open(tmp_path / "out" / file, "numpy") as written:
            hashes[letter] = (written.metadata() or {}).get("sshs_model_hash")
    assert hashes == {"a": None, "b": "b" * 64}


def test_text_encoders_of_openclip_take_rows_of_one_parameter() -> None:
    family = architecture("sdxl")
    base = checkpoint("sdxl", lambda weight: "text" in weight.component or weight.native.startswith("time"))
    lora = {
        **factors("lora_te1_text_model_encoder_layers_2_mlp_fc2", 24, 96),
        **factors("lora_te2_text_model_encoder_layers_7_self_attn_k_proj", 40, 40),
        **factors("lora_te2_text_model_encoder_layers_7_self_attn_v_proj", 40, 40, alpha=4.0),
        **factors("lora_te2_text_projection", 40, 40),
    }
    after = merged(base, lt.load(lora), arch="sdxl")
    second = "conditioner.embedders.1.model."
    fused = f"{second}transformer.resblocks.7.attn.in_proj_weight"
    first = "conditioner.embedders.0.transformer.text_model.encoder.layers.2.mlp.fc2.weight"
    assert changed(base, after) == {fused, f"{second}text_projection", first}
    rows = np.zeros((120, 40))
    rows[40:80] = delta(lora, "lora_te2_text_model_encoder_layers_7_self_attn_k_proj")
    rows[80:] = delta(lora, "lora_te2_text_model_encoder_layers_7_self_attn_v_proj")
    require_sum(base[fused], rows, after[fused])
    # OpenCLIP multiplies from the left: its parameter is the transpose of a linear layer's weight.
    projection = f"{second}text_projection"
    require_sum(base[projection], delta(lora, "lora_te2_text_projection").T, after[projection])
    require_sum(base[first], delta(lora, "lora_te1_text_model_encoder_layers_2_mlp_fc2"), after[first])
    assert family.lookup("lora_te2_text_projection") is not None


@pytest.mark.parametrize("kernel", [(), (1, 1)])
@pytest.mark.parametrize("flat", [False, True])
def test_a_convolution_of_one_pixel_is_a_linear_layer(kernel: tuple[int, ...], *, flat: bool) -> None:
    base = checkpoint("sd1")
    name = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    if flat:
        base[name] = base[name].reshape(10, 10)
    lora = factors("lora_unet_down_blocks_0_attentions_0_proj_in", 10, 10, kernel=kernel)
    after = merged(base, lt.load(lora), arch="sd1")
    assert changed(base, after) == {name}
    require_sum(base[name], delta(lora, "lora_unet_down_blocks_0_attentions_0_proj_in"), after[name])


def test_a_family_that_the_base_is_not_is_one_clear_error() -> None:
    xl = _full_size(
        "sdxl", ("time_embed", "input_blocks.4", "input_blocks.5", "input_blocks.8", "middle_block")
    )
    lora = _thin(
        "sd1", ("input_blocks.4", "input_blocks.5", "input_blocks.8", "middle_block", "output_blocks.3")
    )
    with pytest.raises(UnmatchedModules, match=r"is for Stable Diffusion 1, and .* is Stable Diffusion XL"):
        lt.merge(xl, lt.load(lora))


def _full_size(family: str, starts: tuple[str, ...]) -> dict[str, Any]:
    """A checkpoint in real sizes that takes no memory: views of one number."""
    return {
        f"model.diffusion_model.{weight.key}": np.broadcast_to(np.float16(0), weight.shape)
        for weight in weights(family, lambda one: one.native.startswith(starts))
    }


def _thin(family: str, starts: tuple[str, ...]) -> Arrays:
    """A LoRA of rank 1 in real sizes, for the attention of some blocks."""
    lora: Arrays = {}
    for weight in weights(family, lambda one: one.native.startswith(starts) and "attn" in one.native):
        if len(weight.shape) == 2:
            lora |= factors(f"lora_unet_{weight.native.replace('.', '_')}", *weight.shape, rank=1)
    return lora


def test_a_module_that_no_weight_answers_to_is_named() -> None:
    base = checkpoint("sd1", lambda weight: weight.component == "unet")
    with pytest.raises(UnmatchedModules, match="lora_te_text_model"):
        lt.merge(base, lt.load(SD1_LORA))
    report = lt.merge(base, lt.load(SD1_LORA), allow_unmatched=["lora_te_*"])
    assert report.modules["bound"] == 4


def test_biases_and_norms_are_added_to() -> None:
    base = checkpoint("sd1")
    rng = np.random.default_rng(1)
    lora = {
        "lora_unet_mid_block_resnets_0_conv1.diff": rng.standard_normal((40, 40, 3, 3)).astype(np.float32),
        "lora_unet_mid_block_resnets_0_conv1.diff_b": rng.standard_normal(40).astype(np.float32),
        "lora_unet_mid_block_resnets_0_norm1.w_norm": rng.standard_normal(40).astype(np.float32),
        "lora_unet_mid_block_resnets_0_norm1.b_norm": rng.standard_normal(40).astype(np.float32),
        **factors("lora_te_text_model_encoder_layers_3_mlp_fc1", 96, 24),
        "lora_te_text_model_encoder_layers_3_mlp_fc1.diff_b": rng.standard_normal(96).astype(np.float32),
    }
    after = merged(base, lt.load(lora), arch="sd1", weights=[0.5])
    block = "model.diffusion_model.middle_block.0.in_layers"
    encoder = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1"
    changes = {
        f"{block}.2.weight": lora["lora_unet_mid_block_resnets_0_conv1.diff"],
        f"{block}.2.bias": lora["lora_unet_mid_block_resnets_0_conv1.diff_b"],
        f"{block}.0.weight": lora["lora_unet_mid_block_resnets_0_norm1.w_norm"],
        f"{block}.0.bias": lora["lora_unet_mid_block_resnets_0_norm1.b_norm"],
        f"{encoder}.weight": delta(lora, "lora_te_text_model_encoder_layers_3_mlp_fc1"),
        f"{encoder}.bias": lora["lora_te_text_model_encoder_layers_3_mlp_fc1.diff_b"],
    }
    assert changed(base, after) == changes.keys()
    for name, change in changes.items():
        require_sum(base[name], 0.5 * change.reshape(len(change), -1), after[name])


def test_a_bias_that_the_base_lacks_is_named() -> None:
    base = checkpoint("sd1")
    del base["model.diffusion_model.middle_block.0.in_layers.2.bias"]
    lora = factors("lora_unet_mid_block_resnets_0_conv1", 40, 40, kernel=(3, 3))
    lora["lora_unet_mid_block_resnets_0_conv1.diff_b"] = np.ones(40, np.float32)
    with pytest.raises(Mismatch, match="adds to a bias"):
        lt.merge(base, lt.load(lora), arch="sd1")


def test_what_widens_an_input_is_refused_by_name() -> None:
    base = checkpoint("flux1", lambda weight: weight.native in {"img_in", "txt_in"})
    lora = {
        "img_in.lora_A.weight": np.ones((2, 8), np.float32),
        "img_in.lora_B.weight": np.ones((96, 2), np.float32),
    }
    with pytest.raises(Unsupported, match=r"widens the input of img_in\.weight from 4 to 8"):
        lt.merge(
            base, lt.load({f"diffusion_model.{key}": value for key, value in lora.items()}), arch="flux1"
        )


def test_a_check_collects_what_a_merge_would_refuse() -> None:
    base = open_base(checkpoint("flux1", lambda weight: weight.native in {"img_in", "txt_in"}))
    lora = factors("diffusion_model.img_in", 96, 8) | factors("diffusion_model.txt_in", 96, 7)
    faults: list[tuple[str, Mismatch]] = []
    binding = bind(lt.load(lora), base, faults, architecture=architecture("flux1"))
    assert binding.bound == ()
    said = {name: str(error) for name, error in faults}
    assert said.keys() == {"diffusion_model.img_in", "diffusion_model.txt_in"}
    assert "widens the input" in said["diffusion_model.img_in"]
    assert "delta [96, 7] does not fit" in said["diffusion_model.txt_in"]


def test_a_textual_inversion_in_the_file_is_left_aside_and_said() -> None:
    lora = SD1_LORA | {"bundle_emb.cat.string_to_param.*": np.ones((2, 24), np.float32)}
    report = lt.merge(checkpoint("sd1"), lt.load(lora))
    assert any("bundle_emb.cat" in warning and "textual inversion" in warning for warning in report.warnings)


# --- fused and split -----------------------------------------------------------------------------------------

ONE_BLOCK = ("double_blocks.0.", "single_blocks.0.", "final_layer", "img_in", "txt_in")


def _flux(weight: Any) -> bool:
    return weight.native.startswith(ONE_BLOCK)


def flux_native() -> Arrays:
    """A small FLUX checkpoint of one block of each kind, as its authors name it."""
    return checkpoint("flux1", _flux)


def flux_split(native: Arrays) -> Arrays:
    """The same weights as diffusers has them: a dense reading of the family's table, by hand."""
    found = {}
    for weight in weights("flux1", _flux):
        for ending in ("weight", "bias"):
            name = weight.key if ending == "weight" else weight.key.removesuffix("weight") + "bias"
            if name not in native:
                continue
            value, unit = native[name], len(native[weight.key]) / weight.shape[0]
            for part in weight.parts:
                rows = value[int(part.start * unit) : int(part.stop * unit)]
                if weight.swapped:
                    rows = np.concatenate([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
                found[f"{part.name}.{ending}"] = rows
    return found


def _kinds() -> dict[str, Arrays]:
    """A module of every kind on ``single_blocks.0.linear1``, 672 by 96, of which q, k and v have 96 rows each."""
    rng = np.random.default_rng(3)

    def values(*shape: int) -> np.ndarray:
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    stem = "lora_unet_single_blocks_0_linear1"
    alpha = {f"{stem}.alpha": np.array(2.0, np.float32)}
    lora = factors(stem, 672, 96, rank=4)
    return {
        "lora": lora,
        "dora": lora | {f"{stem}.dora_scale": 1 + np.abs(values(672, 1))},
        "loha": {
            f"{stem}.hada_w1_a": values(672, 2), f"{stem}.hada_w1_b": values(2, 96),
            f"{stem}.hada_w2_a": values(672, 2), f"{stem}.hada_w2_b": values(2, 96), **alpha,
        },
        "lokr": {f"{stem}.lokr_w1": values(7, 4), f"{stem}.lokr_w2": values(96, 24), **alpha},
        "full": {f"{stem}.diff": values(672, 96), f"{stem}.diff_b": values(672)},
        "set": {f"{stem}.set_weight": values(672, 96)},
        "glora": {
            f"{stem}.a1.weight": values(96, 4), f"{stem}.a2.weight": values(4, 96),
            f"{stem}.b1.weight": values(672, 4), f"{stem}.b2.weight": values(4, 96), **alpha,
        },
        "ia3": {f"{stem}.weight": values(672, 1), f"{stem}.on_input": np.array(False)},
        "ia3 of inputs": {f"{stem}.weight": values(1, 96), f"{stem}.on_input": np.array(True)},
        "oft": {f"{stem}.oft_blocks": values(42, 16, 16)},
    }  # fmt: skip


@pytest.mark.parametrize("kind", _kinds())
def test_a_fused_module_changes_the_parts_as_it_changes_the_whole(kind: str) -> None:
    """Into the original layout, then split by hand, is the same as into the split one."""
    native, adapter = flux_native(), lt.load(_kinds()[kind])
    fused = merged(native, adapter, arch="flux1")
    assert changed(native, fused) <= {"single_blocks.0.linear1.weight", "single_blocks.0.linear1.bias"}
    assert "single_blocks.0.linear1.weight" in changed(native, fused)
    apart = merged(flux_split(native), adapter, arch="flux1")
    wanted = flux_split(fused)
    assert apart.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(apart[name], value, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_taken_apart_is_refused_where_the_base_is_split() -> None:
    lora = factors("lora_unet_single_blocks_0_linear1", 672, 96, rank=4)
    lora["lora_unet_single_blocks_0_linear1.dora_scale"] = np.ones((1, 96), np.float32)
    native, adapter = flux_native(), lt.load(lora)
    assert changed(native, merged(native, adapter, arch="flux1")) == {"single_blocks.0.linear1.weight"}
    with pytest.raises(Unsupported, match="DoRA by input features"):
        lt.merge(flux_split(native), adapter, arch="flux1")


def test_halves_that_diffusers_exchanges_are_exchanged_back() -> None:
    native = flux_native()
    lora = {
        "diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight": np.ones((1, 96), np.float32),
        "diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight": np.arange(192, dtype=np.float32)[
            :, None
        ],
    }
    for adapter in (
        lt.load(lora),
        lt.load(
            lora
            | {"diffusion_model.final_layer.adaLN_modulation.1.dora_scale": np.ones((192, 1), np.float32)}
        ),
    ):
        fused = flux_split(merged(native, adapter, arch="flux1"))
        apart = merged(flux_split(native), adapter, arch="flux1")
        np.testing.assert_allclose(
            apart["norm_out.linear.weight"], fused["norm_out.linear.weight"], rtol=1e-5, atol=1e-5
        )
        assert changed(flux_split(native), apart) == {"norm_out.linear.weight"}


def test_split_modules_land_in_rows_of_the_fused_weight() -> None:
    """Names of diffusers into the original layout: each delta in its rows, which the table gives in thirds."""
    lora = {}
    for part, out in (("attn.to_q", 96), ("attn.to_v", 96), ("proj_mlp", 384)):
        for role, shape in (("lora_A", (2, 96)), ("lora_B", (out, 2))):
            values = np.random.default_rng(len(lora)).standard_normal(shape).astype(np.float32)
            lora[f"transformer.single_transformer_blocks.0.{part}.{role}.weight"] = values
    native = flux_native()
    after = merged(native, lt.load(lora), arch="flux1")
    change = np.zeros((672, 96))
    for part, start, stop in (("attn.to_q", 0, 96), ("attn.to_v", 192, 288), ("proj_mlp", 288, 672)):
        stem = f"transformer.single_transformer_blocks.0.{part}"
        down, up = (lora[f"{stem}.{role}.weight"].astype(np.float64) for role in ("lora_A", "lora_B"))
        change[start:stop] = up @ down
    assert changed(native, after) == {"single_blocks.0.linear1.weight"}
    require_sum(native["single_blocks.0.linear1.weight"], change, after["single_blocks.0.linear1.weight"])


def test_a_fused_module_needs_all_of_its_parts_in_the_base() -> None:
    split = flux_split(flux_native())
    del split["single_transformer_blocks.0.attn.to_k.weight"]
    with pytest.raises(Mismatch, match=r"has no transformer\.single_transformer_blocks\.0\.attn\.to_k"):
        lt.merge(split, lt.load(_kinds()["lora"]), arch="flux1")


def test_a_peft_folder_of_diffusers_names_lands_in_the_original_layout(tmp_path: Path) -> None:
    native, rng = flux_native(), np.random.default_rng(5)
    factors_of = {}
    for role, shape in (("lora_A", (2, 96)), ("lora_B", (96, 2))):
        name = f"base_model.model.transformer_blocks.0.attn.to_k.{role}.weight"
        factors_of[name] = rng.standard_normal(shape).astype(np.float32)
    folder = write_adapter(tmp_path / "adapter", factors_of, r=2, lora_alpha=3, target_modules=["to_k"])
    after = merged(native, folder)
    change = np.zeros((288, 96))
    down, up = (value.astype(np.float64) for value in factors_of.values())
    change[96:192] = 1.5 * up @ down
    assert changed(native, after) == {"double_blocks.0.img_attn.qkv.weight"}
    require_sum(
        native["double_blocks.0.img_attn.qkv.weight"], change, after["double_blocks.0.img_attn.qkv.weight"]
    )


def test_a_weight_that_the_base_has_twice_is_an_error_with_both() -> None:
    native = flux_native()
    native["model.diffusion_model.single_blocks.0.linear1.weight"] = native["single_blocks.0.linear1.weight"]
    with pytest.raises(
        Mismatch, match=r"single_blocks\.0\.linear1\.weight and model\.diffusion_model\.single_blocks"
    ):
        lt.merge(native, lt.load(_kinds()["lora"]), arch="flux1")


# --- models of no known family -------------------------------------------------------------------------------


def test_flattened_names_are_found_in_any_base() -> None:
    rng = np.random.default_rng(0)
    base = {
        f"model.diffusion_model.stages.{i}.mixer_{j}.in_proj.weight": rng.standard_normal((6, 6)).astype(
            np.float32
        )
        for i in range(2)
        for j in range(2)
    }
    lora = factors("lora_unet_stages_1_mixer_0_in_proj", 6, 6) | factors(
        "lora_unet__stages_0_mixer_1_in_proj", 6, 6
    )
    after = merged(base, lt.load(lora))
    names = {
        "lora_unet_stages_1_mixer_0_in_proj": "model.diffusion_model.stages.1.mixer_0.in_proj.weight",
        "lora_unet__stages_0_mixer_1_in_proj": "model.diffusion_model.stages.0.mixer_1.in_proj.weight",
    }
    assert changed(base, after) == set(names.values())
    for stem, name in names.items():
        require_sum(base[name], delta(lora, stem), after[name])


def test_a_flattened_name_that_could_be_two_is_an_error_with_both() -> None:
    base = {
        "stages.0.in.proj.weight": np.ones((6, 6), np.float32),
        "stages.0.in_proj.weight": np.ones((6, 6), np.float32),
    }
    with pytest.raises(UnmatchedModules, match=r"stages\.0\.in\.proj or stages\.0\.in_proj"):
        lt.merge(base, lt.load(factors("lora_unet_stages_0_in_proj", 6, 6)))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "unet.", ""])
def test_dotted_names_are_found_in_any_base(prefix: str) -> None:
    base = {f"net.stages.{i}.in_proj.weight": np.ones((6, 6), np.float32) for i in range(2)}
    stem = f"{prefix}stages.1.in_proj"
    lora = {
        f"{stem}.lora_A.weight": np.ones((1, 6), np.float32),
        f"{stem}.lora_B.weight": np.ones((6, 1), np.float32),
    }
    assert changed(base, merged(base, lt.load(lora, alpha=1.0))) == {"net.stages.1.in_proj.weight"}


# --- pipelines -----------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path) -> tuple[Path, dict[str, Arrays]]:
    """A small Stable Diffusion 1 as a pipeline's folder, and its tensors."""
    components = pipeline_tensors("sd1")
    folder = write_pipeline(tmp_path / "base", components, **{"README.md": b"# small"})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    return folder, components


def read_pipeline(folder: Path) -> dict[str, Arrays]:
    """Every component's tensors."""
    return {one.parent.name: load_file(one) for one in sorted(folder.glob("*/*.safetensors"))}


def require_pipeline_sum(components: dict[str, Arrays], out: Path, lora: Arrays = SD1_LORA) -> None:
    """Each component holds its part of the sum, and nothing else has changed."""
    after = read_pipeline(out)
    stems = {name.split(".")[0] for name in lora}
    homes = {stem: diffusers_name(stem).partition(".") for stem in stems}
    for component, tensors in components.items():
        mine = {stem: f"{path}.weight" for stem, (folder, _, path) in homes.items() if folder == component}
        assert changed(tensors, after[component]) == set(mine.values())
        for stem, name in mine.items():
            require_sum(tensors[name], delta(lora, stem), after[component][name])


def test_a_kohya_file_lands_in_the_components_of_a_pipeline(
    tmp_path: Path, pipeline: tuple[Path, dict[str, Arrays]]
) -> None:
    folder, components = pipeline
    adapter, out = write(tmp_path / "lora.safetensors", SD1_LORA), tmp_path / "out"
    report = lt.merge(folder, adapter, out, verify=True)
    assert report.verified
    assert report.modules == {"bound": 6, "unmatched": []}
    assert report.left_out == ()
    require_pipeline_sum(components, out)
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == files | {
        Path("loratools.json")
    }
    merged_into = {Path("unet/diffusion_pytorch_model.safetensors"), Path("text_encoder/model.safetensors")}
    for path in files - merged_into:
        assert (out / path).read_bytes() == (folder / path).read_bytes(), path
    assert lt.verify(folder, adapter, out).ok
    assert lt.verify(folder, adapter, folder).summary["unmerged"] == 6


def test_a_component_that_nothing_changes_is_copied_to_the_byte(
    tmp_path: Path, pipeline: tuple[Path, dict[str, Arrays]]
) -> None:
    folder, components = pipeline
    lora = {name: value for name, value in SD1_LORA.items() if name.startswith("lora_unet")}
    # A header as another writer might have laid it out: other spaces, other order of keys.
    path = folder / "text_encoder" / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = dict(reversed(json.loads(raw[8 : 8 + size]).items()))
    text = json.dumps(header, indent=1).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    out = tmp_path / "out"
    assert lt.merge(folder, lt.load(lora), out, verify=True).verified
    assert (out / "text_encoder" / "model.safetensors").read_bytes() == path.read_bytes()
    require_pipeline_sum(components, out, lora)


def test_a_pipeline_in_memory_has_its_components_names(pipeline: tuple[Path, dict[str, Arrays]]) -> None:
    folder, components = pipeline
    found = lt.merge(folder, lt.load(SD1_LORA)).state_dict
    assert found is not None
    assert found.keys() == {f"{name}/{key}" for name, tensors in components.items() for key in tensors}


def test_the_only_variant_is_merged_into_and_the_plain_one_goes_before_others(
    tmp_path: Path, pipeline: tuple[Path, dict[str, Arrays]]
) -> None:
    folder, components = pipeline
    encoder = folder / "text_encoder" / "model.safetensors"
    encoder.rename(encoder.with_name("model.fp16.safetensors"))
    write(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", {"x": np.ones(1, np.float16)})
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    out = tmp_path / "out"
    report = lt.merge(folder, lt.load(SD1_LORA), out)
    assert set(report.left_out) == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
    }
    assert sorted(path.name for path in (out / "text_encoder").glob("*.safetensors")) == [
        "model.fp16.safetensors"
    ]
    require_pipeline_sum(components, out)


def test_shards_of_a_component_keep_their_tensors_and_their_index(
    tmp_path: Path, pipeline: tuple[Path, dict[str, Arrays]]
) -> None:
    folder, components = pipeline
    stem, tensors = "diffusion_pytorch_model", components["unet"]
    (folder / "unet" / f"{stem}.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(2):
        shard = f"{stem}-{number + 1:05d}-of-00002.safetensors"
        mine = names[number::2]
        write(folder / "unet" / shard, {name: tensors[name] for name in mine}, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, shard)
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in tensors.values())},
        "weight_map": weight_map,
    }
    (folder / "unet" / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    out = tmp_path / "out"
    assert lt.merge(folder, lt.load(SD1_LORA), out, verify=True).verified
    written = json.loads((out / "unet" / f"{stem}.safetensors.index.json").read_text())
    assert written["weight_map"] == weight_map
    assert written["metadata"]["total_size"] == index["metadata"]["total_size"]
    for shard in set(weight_map.values()):
        assert load_file(out / "unet" / shard).keys() == {
            name for name, home in weight_map.items() if home == shard
        }


def test_links_out_of_a_pipeline_are_left_out_and_named(
    tmp_path: Path, pipeline: tuple[Path, dict[str, Arrays]]
) -> None:
    folder, _ = pipeline
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    (secret / "key").write_text("secret")
    (folder / "tokenizer" / "stolen.json").symlink_to(secret / "key")
    (folder / "safety_checker").symlink_to(secret)
    out = tmp_path / "out"
    report = lt.merge(folder, lt.load(SD1_LORA), out)
    assert set(report.left_out) == {"tokenizer/stolen.json", "safety_checker/"}
    assert not (out / "tokenizer" / "stolen.json").exists()
    assert not (out / "safety_checker").exists()


def test_another_type_is_written_in_every_component(
    tmp_path: Path, pipeline: tuple[Path, dict[str, Arrays]]
) -> None:
    folder, _ = pipeline
    out = tmp_path / "out"
    lt.merge(folder, lt.load(SD1_LORA), out, dtype="f16")
    for component in ("unet", "text_encoder"):
        assert {value.dtype for value in read_pipeline(out)[component].values()} == {np.dtype(np.float16)}
    assert json.loads((out / "text_encoder" / "config.json").read_text()) == {"dtype": "float16"}
    assert json.loads((out / "unet" / "config.json").read_text()) == {}


def test_a_pipeline_takes_processes_and_no_shard_size(
    tmp_path: Path, pipeline: tuple[Path, dict[str, Arrays]]
) -> None:
    folder, components = pipeline
    adapter = write(tmp_path / "lora.safetensors", SD1_LORA)
    lt.merge(folder, adapter, tmp_path / "out", executor="processes", jobs=2)
    require_pipeline_sum(components, tmp_path / "out")
    with pytest.raises(Unsupported, match="shard-size"):
        lt.merge(folder, adapter, tmp_path / "other", shard_size=1000)
    with pytest.raises(OutputExists):
        lt.merge(folder, adapter, tmp_path / "out")


def test_a_pipeline_without_its_denoisers_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "base" / "unet").mkdir(parents=True)
    (tmp_path / "base" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    with pytest.raises(InputError, match="pipeline without safetensors weights"):
        lt.merge(tmp_path / "base", lt.load(SD1_LORA), tmp_path / "out")


def test_an_interrupted_pipeline_goes_on(tmp_path: Path, pipeline: tuple[Path, dict[str, Arrays]]) -> None:
    folder, components = pipeline
    adapter, out = write(tmp_path / "lora.safetensors", SD1_LORA), tmp_path / "out"
    seen = []

    def stop(step: object) -> None:
        seen.append(step)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lt.merge(folder, adapter, out, on_step=stop, jobs=1)
    assert not out.exists()
    report = lt.merge(folder, adapter, out, resume=True, verify=True)
    assert report.resumed > 0
    assert report.verified
    require_pipeline_sum(components, out)


def test_only_a_component_that_is_changed_must_not_be_quantised(
    tmp_path: Path, pipeline: tuple[Path, dict[str, Arrays]]
) -> None:
    folder, _ = pipeline
    (folder / "text_encoder" / "config.json").write_text(
        '{"quantization_config": {"quant_method": "bitsandbytes"}}'
    )
    lora = {name: value for name, value in SD1_LORA.items() if name.startswith("lora_unet")}
    out = tmp_path / "out"
    lt.merge(folder, lt.load(lora), out)
    assert (out / "text_encoder" / "model.safetensors").read_bytes() == (
        folder / "text_encoder" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(Unsupported, match=r"text_encoder is quantised \(bitsandbytes\)"):
        lt.merge(folder, lt.load(SD1_LORA), tmp_path / "other")
    with pytest.raises(Unsupported, match="quantised"):
        lt.merge(folder, lt.load(lora), tmp_path / "other", dtype="bf16")


def test_a_pipeline_of_no_known_family_is_found_by_folder(tmp_path: Path) -> None:
    components = {
        "transformer": {"stages.0.mixer.in_proj.weight": np.ones((6, 6), np.float32)},
        "text_encoder": {"rows.0.in_proj.weight": np.ones((6, 6), np.float32)},
    }
    folder = write_pipeline(tmp_path / "base", components)
    for stem in ("transformer.stages.0.mixer.in_proj", "lora_unet_stages_0_mixer_in_proj"):
        lora = factors(stem, 6, 6)
        after = merged(folder, lt.load(lora))  # type: ignore[arg-type]
        name = "transformer/stages.0.mixer.in_proj.weight"
        require_sum(
            components["transformer"]["stages.0.mixer.in_proj.weight"], delta(lora, stem), after[name]
        )
        assert (after["text_encoder/rows.0.in_proj.weight"] == 1).all()


def test_an_adapter_is_extracted_from_a_component_not_from_a_pipeline(
    pipeline: tuple[Path, dict[str, Arrays]],
) -> None:
    folder, _ = pipeline
    with pytest.raises(Unsupported, match="pipeline of 2 models"):
        lt.extract(folder, folder, rank=2)


# --- block weights -------------------------------------------------------------------------------------------

ATTENTION = "lora_unet_{}_attentions_0_transformer_blocks_0_attn2_to_k"
BLOCKS = {  # kohya's names of one module in some blocks, and the block's short name
    ATTENTION.format("down_blocks_0"): ("IN01", 10),
    ATTENTION.format("down_blocks_2"): ("IN07", 40),
    ATTENTION.format("mid_block"): ("M00", 40),
    ATTENTION.format("up_blocks_1"): ("OUT03", 40),
    ATTENTION.format("up_blocks_3"): ("OUT09", 10),
    "lora_te_text_model_encoder_layers_3_mlp_fc1": ("BASE", 96),
}
VECTOR = ",".join(str(number / 4) for number in range(17))
LBW = ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02}" for i in range(3, 12)))


def _ratios(spec: str) -> dict[str, float]:
    """What each block is multiplied by, written out by hand."""
    return {
        VECTOR: {name: number / 4 for number, name in enumerate(LBW)},
        "OUTALL": {"BASE": 1.0, "IN01": 0.0, "IN07": 0.0, "M00": 0.0, "OUT03": 1.0, "OUT09": 1.0},
        "attn2=0.5": dict.fromkeys(("IN01", "IN07", "M00", "OUT03", "OUT09"), 0.5) | {"BASE": 1.0},
        "IN0[0-9]=0": {"BASE": 1.0, "IN01": 0.0, "IN07": 0.0, "M00": 1.0, "OUT03": 1.0, "OUT09": 1.0},
        "OUTALL; mid_block=2": {
            "BASE": 1.0,
            "IN01": 0.0,
            "IN07": 0.0,
            "M00": 2.0,
            "OUT03": 1.0,
            "OUT09": 1.0,
        },
    }[spec]


def _blocks_lora() -> Arrays:
    lora: Arrays = {}
    for stem, (_, out) in BLOCKS.items():
        lora |= factors(stem, out, 24)
    return lora


@pytest.mark.parametrize("spec", [VECTOR, "OUTALL", "attn2=0.5", "IN0[0-9]=0", "OUTALL; mid_block=2"])
def test_block_weights_multiply_what_is_in_a_block(spec: str) -> None:
    base, lora, ratios = checkpoint("sd1"), _blocks_lora(), _ratios(spec)
    after = merged(base, lt.load(lora), arch="sd1", block_weights=spec, weights=[0.5])
    wanted = set()
    for stem, (block, _) in BLOCKS.items():
        place = architecture("sd1").lookup(stem)
        assert place is not None
        start = (
            "model.diffusion_model." if place.weight.component == "unet" else "cond_stage_model.transformer."
        )
        name = start + place.weight.key
        if ratios[block]:
            wanted.add(name)
        require_sum(base[name], 0.5 * ratios[block] * delta(lora, stem), after[name])
    assert changed(base, after) == wanted


def test_block_weights_of_a_decomposed_module_scale_what_it_does() -> None:
    stem, name = (
        "lora_unet_mid_block_resnets_0_conv1",
        "model.diffusion_model.middle_block.0.in_layers.2.weight",
    )
    lora = factors(stem, 40, 40, kernel=(3, 3)) | {f"{stem}.dora_scale": np.ones((40, 1, 1, 1), np.float32)}
    base = checkpoint("sd1")
    whole = merged(base, lt.load(lora), arch="sd1")[name].astype(np.float64) - base[name]
    half = merged(base, lt.load(lora), arch="sd1", block_weights="M00=0.5")[name]
    require_sum(base[name], 0.5 * whole.reshape(40, -1), half)


def test_block_weights_may_differ_between_adapters() -> None:
    base = checkpoint("sd1")
    stem = ATTENTION.format("mid_block")
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    loras = [factors(stem, 40, 24, seed=seed) for seed in range(2)]
    opened = [lt.load(lora) for lora in loras]
    after = merged(base, opened, arch="sd1", block_weights=["M00=0.25", "M00=3"])
    require_sum(base[name], 0.25 * delta(loras[0], stem) + 3 * delta(loras[1], stem), after[name])
    after = merged(base, opened, arch="sd1", block_weights=["M00=0.25"])
    require_sum(base[name], 0.25 * (delta(loras[0], stem) + delta(loras[1], stem)), after[name])
    with pytest.raises(Unsupported, match="3 block weights for 2 adapters"):
        lt.merge(base, opened, arch="sd1", block_weights=["M00=1"] * 3)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("M00=much", "is not a number"),
        ("M0[=1", "is not a pattern"),
        ("nowhere=1", "speaks of none of the 6 modules"),
        ("1,2,3", "3 ratios"),
        ("MOST", "neither numbers nor a preset"),
    ],
)
def test_block_weights_that_mean_nothing_are_refused(spec: str, says: str) -> None:
    with pytest.raises(lt.LoratoolsError, match=says):
        lt.merge(checkpoint("sd1"), lt.load(_blocks_lora()), arch="sd1", block_weights=spec)


def test_a_language_model_takes_patterns_and_no_blocks() -> None:
    base = {f"layers.{i}.q.weight": np.zeros((4, 3), np.float32) for i in range(2)}
    lora = {}
    for i in range(2):
        lora |= {f"layers.{i}.q.lora_A.weight": np.ones((1, 3), np.float32)}
        lora |= {f"layers.{i}.q.lora_B.weight": np.ones((4, 1), np.float32)}
    adapter = lt.load(lora, config={"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    after = merged(base, adapter, block_weights=r"layers\.1\.=0.5")
    assert (after["layers.0.q.weight"] == 1).all()
    assert (after["layers.1.q.weight"] == 0.5).all()
    with pytest.raises(Unsupported, match="known architecture"):
        lt.merge(base, adapter, block_weights="OUTALL")


# --- the command line ----------------------------------------------------------------------------------------


def test_the_command_merges_verifies_and_weighs_blocks(
    tmp_path: Path, pipeline: tuple[Path, dict[str, Arrays]]
) -> None:
    folder, components = pipeline
    adapter, out = write(tmp_path / "lora.safetensors", SD1_LORA), tmp_path / "out"
    runner = CliRunner()
    options = ["--block-weights", "mid_block=0.5;lora_te=1", "--arch", "sd1"]
    result = runner.invoke(app, ["merge", str(folder), str(adapter), str(out), *options, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["modules"] == {"bound": 6, "unmatched": []}
    halved = dict(SD1_LORA)
    halved["lora_unet_mid_block_resnets_0_conv1.alpha"] = np.array(0.5, np.float32)
    require_pipeline_sum(components, out, halved)
    result = runner.invoke(app, ["verify", str(folder), str(adapter), str(out), *options])
    assert result.exit_code == 0, result.output
    result = runner.invoke(app, ["verify", str(folder), str(adapter), str(out)])
    assert result.exit_code == 1
    record = json.loads((out / "loratools.json").read_text())
    assert record["parameters"]["block_weights"] == ["mid_block=0.5;lora_te=1"]
    result = runner.invoke(app, ["merge", str(folder), str(adapter), str(tmp_path / "dry"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "dry").exists()


# --- every family --------------------------------------------------------------------------------------------


def _prefix(component: Any) -> str:
    """What stands before a component's names in a checkpoint that holds several."""
    return next((f"{one}." for one in component.native if one), f"{component.name}.")


def _spelled(component: Any, weight: Any, dialect: str) -> list[tuple[str, int]]:
    """A weight's modules as a dialect names them, and how many rows each has."""
    layout = {"diffusers": "diffusers", "kohya": component.kohya_layout, "comfy": component.comfy_layout}[
        dialect
    ]
    parts = [(weight.native, weight.shape[0])]
    if layout == "diffusers":
        parts = [(part.name, part.stop - part.start) for part in weight.parts]
    if dialect == "kohya" and not component.kohya:
        return []
    if dialect == "kohya":
        return [(f"{component.kohya[0]}_{name.replace('.', '_')}", rows) for name, rows in parts]
    prefix = component.name if dialect == "diffusers" else component.comfy
    return [(f"{prefix}.{name}", rows) for name, rows in parts] if prefix else []


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "comfy"])
@pytest.mark.parametrize("family", architectures())
def test_every_module_of_a_family_lands_in_both_layouts(family: str, dialect: str) -> None:
    """Names and rows alone: views of one number stand for the weights, whatever their sizes."""
    value = np.zeros(1, np.float32)
    native, split, lora = {}, {}, {}
    for component in architecture(family).components:
        for weight in component.weights:
            shape = tuple(size or 4 for size in weight.shape)
            stored = shape[::-1] if weight.transposed else shape
            native[_prefix(component) + weight.key] = np.broadcast_to(value, stored)
            for part in weight.parts:
                rows = (part.stop - part.start, *shape[1:])
                split[f"{component.name}.{part.name}.weight"] = np.broadcast_to(value, rows)
            if len(shape) < 2 or not (weight.tensor or dialect == "diffusers"):
                continue
            for name, count in _spelled(component, weight, dialect):
                lora[f"{name}.lora_down.weight"] = np.broadcast_to(value, (1, *shape[1:]))
                lora[f"{name}.lora_up.weight"] = np.broadcast_to(value, (count, 1, *(1 for _ in shape[2:])))
    adapter = lt.load(lora)
    assert len(adapter.modules) == len(lora) // 2
    for base in (native, split):
        binding = bind(adapter, open_base(base))
        assert binding.architecture == family
        assert binding.unmatched == ()
        rows = dict.fromkeys(adapter.modules, 0)
        for term in (term for terms in binding.terms.values() for term in terms):
            span = term.target.delta_rows
            rows[term.name] += term.module.shape[0] if span is None else len(span)
        assert rows == {name: module.shape[0] for name, module in adapter.modules.items()}


def test_a_language_model_costs_no_look_at_any_family() -> None:
    script = """
import sys
import numpy as np
import loratools as lt
stem = "model.layers.0.q"
factors = {f"{stem}.lora_A.weight": np.ones((1, 3), "f4"), f"{stem}.lora_B.weight": np.ones((4, 1), "f4")}
adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
lt.merge({"model.layers.0.q.weight": np.zeros((4, 3), "f4")}, adapter)
print([name for name in sys.modules if name.startswith(("loratools.architectures", "loratools.placing"))])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
