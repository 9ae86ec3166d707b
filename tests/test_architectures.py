"""Architectures as data: every spelling of a module leads to one place, and a file's names say whose they are."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loratools.architectures.base import Weight, architecture, architectures, called, flat
from loratools.architectures.blocks import PRESETS, VECTORS, block, blocks, ratios
from loratools.architectures.detect import _families, _spoken_of, detect
from loratools.errors import BadConfig, Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterable

CORPUS = Path(os.environ.get("LORATOOLS_CORPUS", ""))
needs_corpus = pytest.mark.skipif(
    not os.environ.get("LORATOOLS_CORPUS"), reason="LORATOOLS_CORPUS does not name a folder of real adapters"
)

# What trainers and tools write, and the modules of diffusers it stands for.
SPELLINGS = [
    # Flux: sd-scripts, ai-toolkit, diffusers, PEFT's own names, BFL, XLabs, OneTrainer
    ("flux1", "lora_unet_double_blocks_3_img_attn_qkv", "transformer.transformer_blocks.3.attn.{to_q,to_k,to_v}"),
    ("flux1", "diffusion_model.double_blocks.3.txt_attn.qkv", "transformer.transformer_blocks.3.attn.add_{q,k,v}_proj"),
    ("flux1", "transformer.transformer_blocks.3.attn.to_k", "transformer.transformer_blocks.3.attn.to_k"),
    ("flux1", "single_transformer_blocks.37.proj_mlp", "transformer.single_transformer_blocks.37.proj_mlp"),
    ("flux1", "double_blocks.0.img_mod.lin", "transformer.transformer_blocks.0.norm1.linear"),
    ("flux1", "double_blocks.0.processor.qkv_lora2", "transformer.transformer_blocks.0.attn.add_{q,k,v}_proj"),
    ("flux1", "single_blocks.5.processor.qkv_lora", "transformer.single_transformer_blocks.5.attn.{to_q,to_k,to_v}"),
    (
        "flux1", "lora_unet_single_blocks_5_linear1",
        "transformer.single_transformer_blocks.5.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}",
    ),
    ("flux1", "lora_unet_single_blocks_5_linear1.3", "transformer.single_transformer_blocks.5.proj_mlp"),
    ("flux1", "lora_transformer_double_blocks_0_img_attn_qkv.1", "transformer.transformer_blocks.0.attn.to_k"),
    ("flux1", "diffusion_model.double_blocks.0.img_attn.qkv.2", "transformer.transformer_blocks.0.attn.to_v"),
    ("flux1", "lora_transformer_transformer_blocks_0_attn_to_out_0", "transformer.transformer_blocks.0.attn.to_out.0"),
    ("flux1", "lora_transformer_transformer_blocks_0_ff_net_0_proj", "transformer.transformer_blocks.0.ff.net.0.proj"),
    ("flux1", "lycoris_transformer_blocks_0_attn_to_q", "transformer.transformer_blocks.0.attn.to_q"),
    ("flux1", "double_blocks.0.img_attn.norm.key_norm.scale", "transformer.transformer_blocks.0.attn.norm_k"),
    ("flux1", "lora_unet_final_layer_adaLN_modulation_1", "transformer.norm_out.linear"),
    # The second text encoder is T5 to one trainer and CLIP-G to another: the path says which.
    (
        "flux1", "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ),
    (
        "flux1", "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    ),
    (
        "flux1", "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_1",
        "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_1",
    ),
    ("flux1", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj", None),
    (
        "sdxl", "lora_te2_text_model_encoder_layers_31_self_attn_k_proj",
        "text_encoder_2.text_model.encoder.layers.31.self_attn.k_proj",
    ),
    ("sdxl", "lora_te2_encoder_block_0_layer_0_SelfAttention_q", None),
    (
        "sd3", "lora_te3_encoder_block_0_layer_0_SelfAttention_o",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.o",
    ),
    (
        "sd3", "lora_unet_joint_blocks_23_context_block_attn_qkv",
        "transformer.transformer_blocks.23.attn.add_{q,k,v}_proj",
    ),
    # Stable Diffusion: kohya flattens diffusers' names for 1 and 2, and those of SGM for XL.
    (
        "sd1", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ),
    ("sd1", "lora_unet_mid_block_resnets_1_time_emb_proj", "unet.mid_block.resnets.1.time_emb_proj"),
    (
        "sd1", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    ),
    (
        "sd1", "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.processor.to_out_lora",
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0",
    ),
    (
        "sd1", "lora_te_text_model_encoder_layers_11_self_attn_out_proj",
        "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
    ),
    (
        "sd1", "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ),
    (
        "sd1", "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2",
        "text_encoder.text_model.encoder.layers.0.mlp.fc2",
    ),
    ("sd1", "model.diffusion_model.output_blocks.5.2.conv", "unet.up_blocks.1.upsamplers.0.conv"),
    ("sdxl", "lora_unet_input_blocks_4_1_proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
    ("sdxl", "lora_unet_down_blocks_1_attentions_0_proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
    (
        "sdxl", "lora_unet_output_blocks_2_1_transformer_blocks_9_attn2_to_v",
        "unet.up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_v",
    ),
    ("sdxl", "lora_unet_middle_block_2_in_layers_2", "unet.mid_block.resnets.1.conv1"),
    ("sdxl", "diffusion_model.label_emb.0.2", "unet.add_embedding.linear_2"),
    (
        "sdxl", "conditioner.embedders.1.model.transformer.resblocks.7.attn.in_proj_weight",
        "text_encoder_2.text_model.encoder.layers.7.self_attn.{q,k,v}_proj",
    ),
    (
        "sdxl", "text_encoders.clip_g.transformer.text_model.encoder.layers.7.self_attn.v_proj",
        "text_encoder_2.text_model.encoder.layers.7.self_attn.v_proj",
    ),
    (
        "sdxl", "text_encoder_2.encoder.layers.7.self_attn.v_proj",
        "text_encoder_2.text_model.encoder.layers.7.self_attn.v_proj",
    ),
    # Wan, with the doubled underscore of Wan Fun; Z-Image fused and split; and the others
    ("wan-14b", "lora_unet__blocks_39_cross_attn_k_img", "transformer.blocks.39.attn2.add_k_proj"),
    ("wan-14b", "diffusion_model.blocks.0.ffn.2", "transformer.blocks.0.ffn.net.2"),
    ("wan-14b", "transformer_2.blocks.0.attn1.to_q", "transformer_2.blocks.0.attn1.to_q"),
    ("wan-14b", "blocks.0.norm3", "transformer.blocks.0.norm2"),
    ("wan-1.3b", "diffusion_model.blocks.30.ffn.2", None),
    ("z-image", "lora_unet__layers_0_attention_to_q", "transformer.layers.0.attention.to_q"),
    ("z-image", "diffusion_model.layers.29.attention.qkv", "transformer.layers.29.attention.{to_q,to_k,to_v}"),
    ("z-image", "diffusion_model.layers.29.attention.out", "transformer.layers.29.attention.to_out.0"),
    ("lumina2", "lora_unet_layers_3_attention_qkv", "transformer.layers.3.attn.{to_q,to_k,to_v}"),
    ("lumina2", "lora_te_layers_0_mlp_gate_proj", "text_encoder.layers.0.mlp.gate_proj"),
    ("hunyuan-video", "lora_unet_single_blocks_0_linear2", "transformer.single_transformer_blocks.0.proj_out"),
    ("hunyuan-video", "double_blocks.0.img_attn_qkv", "transformer.transformer_blocks.0.attn.{to_q,to_k,to_v}"),
    ("qwen-image", "lora_unet_transformer_blocks_59_img_mod_1", "transformer.transformer_blocks.59.img_mod.1"),
    (
        "qwen-image", "text_encoder.model.layers.0.self_attn.q_proj",
        "text_encoder.model.language_model.layers.0.self_attn.q_proj",
    ),
    ("anima", "lora_unet_blocks_0_self_attn_output_proj", "transformer.transformer_blocks.0.attn1.to_out.0"),
    ("anima", "diffusion_model.llm_adapter.blocks.0.mlp.2", "text_conditioner.blocks.0.mlp.2"),
    ("anima", "lora_unet_llm_adapter_blocks_0_self_attn_o_proj", "text_conditioner.blocks.0.self_attn.o_proj"),
    # Nothing is guessed
    ("flux1", "lora_unet_double_blocks_19_img_attn_qkv", None),
    ("flux1", "lora_unet_double_blocks_0_img_attn_qkv.3", None),
    ("flux1", "lora_unetdouble_blocks_0_img_attn_qkv", None),
    ("sd1", "first_stage_model.decoder.conv_in", None),
    ("sd1", "lllite_unet_down_blocks_0_attentions_0_proj_in", None),
    ("sdxl", "model.layers.0.self_attn.q_proj", None),
]  # fmt: skip


def _expanded(pattern: str) -> tuple[str, ...]:
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        return (pattern,)
    return tuple(pattern[: match.start()] + one + pattern[match.end() :] for one in match[1].split(","))


@pytest.mark.parametrize(("family", "stem", "names"), SPELLINGS)
def test_a_spelling_leads_to_its_modules(family: str, stem: str, names: str | None) -> None:
    place = architecture(family).lookup(stem)
    assert (place.names if place else None) == (_expanded(names) if names else None)


@pytest.mark.parametrize("family", architectures())
def test_flattened_names_are_unambiguous(family: str) -> None:
    """No two names of a component, of the original code or of diffusers, become the same flattened name."""
    for component in architecture(family).components:
        for names in (_native(component.weights), _diffusers(component.weights)):
            assert len({flat(name) for name in names}) == len(names)
        meant = defaultdict(set)
        for weight in component.weights:
            meant[flat(weight.native)].add(weight.native)
            meant[flat(weight.native)].update({weight.native} if len(weight.parts) == 1 else set())
        assert all(len(names) == 1 for names in meant.values())


def _native(weights: Iterable[Weight]) -> list[str]:
    return [weight.native for weight in weights]


def _diffusers(weights: Iterable[Weight]) -> list[str]:
    return [part.name for weight in weights for part in weight.parts]


@pytest.mark.parametrize("family", architectures())
def test_every_spelling_of_a_weight_leads_back_to_it(family: str) -> None:
    """Each prefix with each name: original, flattened, diffusers', and each part by its number."""
    found = architecture(family)
    for component in found.components:
        for weight in component.weights:
            count = len(weight.parts)
            whole = [f"{prefix}.{weight.native}" if prefix else weight.native for prefix in component.native]
            whole += [f"{prefix}_{flat(weight.native)}" for prefix in component.kohya]
            for stem in whole:
                place = found.lookup(stem)
                assert place is not None, stem
                assert (place.weight, place.first, place.last) == (weight, 0, count), stem
                assert place.shape == weight.shape
            for index, part in enumerate(weight.parts):
                stems = [f"{component.name}.{part.name}"]
                stems += [f"{prefix}_{flat(part.name)}" for prefix in component.kohya]
                stems += [f"{stem}.{index}" for stem in whole] if count > 1 else []
                for stem in stems:
                    place = found.lookup(stem)
                    assert place is not None, stem
                    assert (place.weight, place.first, place.last) == (weight, index, index + 1), stem


@pytest.mark.parametrize("family", architectures())
def test_the_parts_of_a_weight_are_all_of_its_rows(family: str) -> None:
    for component in architecture(family).components:
        assert component.kohya_layout in {"native", "diffusers"}
        assert component.comfy_layout in {"native", "diffusers"}
        for weight in component.weights:
            stops = [0, *(part.stop for part in weight.parts)]
            assert [part.start for part in weight.parts] == stops[:-1]
            assert stops[-1] == weight.shape[0]
            assert weight.swapped is False or (len(weight.parts) == 1 and weight.shape[0] % 2 == 0)


def test_rows_that_diffusers_exchanges_are_known() -> None:
    """Only the last modulation of FLUX, HunyuanVideo and SD3, and that of SD3's last text block."""
    swapped = {
        (family, weight.native)
        for family in architectures()
        for component in architecture(family).components
        for weight in component.weights
        if weight.swapped
    }
    last = "final_layer.adaLN_modulation.1"
    assert swapped == {
        ("flux1", last),
        ("flux2-dev", last), ("flux2-klein-4b", last), ("flux2-klein-9b", last),
        ("hunyuan-video", last), ("sd3", last), ("sd3.5-medium", last), ("sd3.5-large", last),
        ("sd3", "joint_blocks.23.context_block.adaLN_modulation.1"),
        ("sd3.5-medium", "joint_blocks.23.context_block.adaLN_modulation.1"),
        ("sd3.5-large", "joint_blocks.37.context_block.adaLN_modulation.1"),
    }  # fmt: skip


def test_a_family_is_found_by_what_metadata_call_it() -> None:
    assert architecture("stable-diffusion-xl-v1-base/lora") is architecture("sdxl")
    assert architecture("Flux.1-dev/lora") is architecture("flux1")
    assert architecture("sd_v1").name == "sd1"
    assert called("Wan 2.1") == ("wan-1.3b", "wan-14b")
    with pytest.raises(Unsupported, match="several architectures"):
        architecture("wan2.1")
    with pytest.raises(Unsupported, match="no architecture 'gpt-2' is known") as raised:
        architecture("gpt-2")
    assert "sdxl" in str(raised.value.hint)


@pytest.mark.parametrize("family", architectures())
def test_what_is_written_as_a_familys_name_is_read_as_such(family: str) -> None:
    metadata = architecture(family).metadata
    assert set(metadata) == {"modelspec", "base_model"}
    for value in metadata.values():
        assert family in called(value)


def test_no_two_families_share_a_hint_but_the_sizes_of_one() -> None:
    for family in architectures():
        for hint in architecture(family).hints:
            others = called(hint)
            assert family in others
            assert len({name.partition("-")[0] for name in others}) == 1, hint


def test_families_that_are_chosen_instead_of_others_have_the_same_names() -> None:
    """What both have is the same place in both, so that it makes no difference which is named."""
    pairs = [(name, other) for name in architectures() for other in architecture(name).instead_of]
    assert pairs
    for name, other in pairs:
        chosen, rest = architecture(name), architecture(other)
        assert {one.name for one in rest.components} <= {one.name for one in chosen.components}
        ours, theirs = chosen.canonical, rest.canonical
        for full in ours.keys() & theirs.keys():
            a, b = ours[full], theirs[full]
            assert a.weight.native == b.weight.native or a.weight.component != "transformer", full
            assert (a.parts, a.weight.swapped) == (b.parts, b.weight.swapped) or a.shape != b.shape, full


# Detection


def _flattened(family: str, component: str, only: str, prefix: int = 0) -> dict[str, tuple[int, ...]]:
    """Modules of a table under kohya's names, in its layout."""
    found = architecture(family).component(component)
    modules = {}
    for weight in found.weights:
        if not re.search(only, weight.native) or len(weight.shape) < 2:
            continue
        if found.kohya_layout == "native":
            modules[f"{found.kohya[prefix]}_{flat(weight.native)}"] = weight.shape
        else:
            for part in weight.parts:
                rows = part.stop - part.start
                modules[f"{found.kohya[prefix]}_{flat(part.name)}"] = (rows, *weight.shape[1:])
    return modules


BLOCKS = r"blocks?\.|layers\.|refiner"
DETECTED = [
    *((family, "unet", "attn|ff", family) for family in ("sd1", "sd2", "sdxl")),
    *((family, "unet", r"attn2\.to_k", family) for family in ("sd1", "sd2", "sdxl")),
    ("sdxl", "unet", r"output_blocks\.0\.1.*attn1", "sdxl"),
    ("sd1", "unet", "attn1", None),
    ("ltx-2", "transformer", r"\.attn1\.", None),  # LTX-Video 13B has the same
    ("ltx-video-13b", "transformer", r"blocks\.", None),
    ("ltx-video-13b", "transformer", "", "ltx-video-13b"),
    ("flux1", "transformer", BLOCKS, "flux1"),
    ("flux1", "transformer", "attn.qkv", "flux1"),
    ("chroma", "transformer", "", "chroma"),
    *(
        (family, "transformer", BLOCKS, family)
        for family in (
            "hunyuan-video", "qwen-image", "z-image", "lumina2", "wan-14b", "wan-1.3b", "wan-5b", "anima", "sd3",
            "flux2-dev", "flux2-klein-4b", "flux2-klein-9b", "krea2", "ltx-video-2b", "ltx-2", "hidream-i1",
            "sd3.5-medium", "sd3.5-large",
        )
    ),
    ("sd2", "text_encoder", "", "sd2"),
    ("sdxl", "text_encoder_2", "", None),  # the same as that of SD3
    ("lumina2", "text_encoder", "", "lumina2"),
    ("anima", "text_encoder", "", "anima"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "component", "only", "expected"), DETECTED)
def test_a_family_is_told_from_the_others(
    family: str, component: str, only: str, expected: str | None
) -> None:
    modules = _flattened(family, component, only)
    assert modules
    found = detect(modules)
    assert found.architecture == expected, found
    assert family in found.candidates


@pytest.mark.parametrize("family", architectures())
def test_no_word_of_a_family_rules_it_out(family: str) -> None:
    """The families that names speak of are loaded; each spelling of all of a family's names speaks of it."""
    for component in architecture(family).components:
        native = [weight.native for weight in component.weights]
        diffusers = [part.name for weight in component.weights for part in weight.parts]
        spelled = [[f"{component.name}.{name}" for name in diffusers]]
        spelled += [
            [f"{prefix}.{name}" if prefix else name for name in native] for prefix in component.native
        ]
        spelled += [
            [f"{prefix}_{flat(name)}" for name in names]
            for prefix in component.kohya
            for names in (native, diffusers)
        ]
        for names in spelled:
            assert all(family in families for families in _spoken_of(names)), names[0]
            assert _spoken_of(names), names[0]


def test_names_that_only_some_families_have_leave_the_others_unread() -> None:
    assert _families(_flattened("sdxl", "unet", "")) == ["sdxl"]
    assert _families(_flattened("qwen-image", "transformer", BLOCKS)) == ["qwen-image"]
    assert _families(_flattened("z-image", "transformer", BLOCKS)) == ["z-image", "lumina2"]
    assert _families(["model.layers.0.self_attn.q_proj"]) == []


def test_the_shape_of_a_convolution_may_be_that_of_a_matrix() -> None:
    modules = {"lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320)} | _flattened(
        "sd1", "unet", r"attn2\.to_k"
    )
    assert detect(modules).architecture == "sd1"


def test_a_hint_breaks_a_tie_and_nothing_else() -> None:
    attention = _flattened("sd1", "unet", "attn1")
    assert detect(attention).candidates == ("sd1", "sd2")
    assert detect(attention, ["sd_v2"]).architecture == "sd2"
    assert detect(attention, ["sd_v1"]).architecture == "sd1"
    qkv = _flattened("flux1", "transformer", "attn.qkv")
    assert detect(qkv).candidates == ("flux1", "chroma")
    assert detect(qkv, ["chroma/lora"]).architecture == "chroma"
    wrong = detect(_flattened("sdxl", "unet", "attn2"), ["stable-diffusion-v1/lora"])
    assert wrong.architecture == "sdxl"
    assert "metadata say sd1, which the modules contradict" in wrong.evidence
    assert (
        "metadata"
        not in detect(_flattened("sdxl", "unet", "attn2"), ["sdxl_base_v1-0", "", "my-own-merge"]).evidence
    )


def test_names_that_fit_with_shapes_that_do_not_are_no_family() -> None:
    """A model of the same code with another width."""
    modules = {
        name: (shape[0] // 2, shape[1] // 2)
        for name, shape in _flattened("flux1", "transformer", "blocks").items()
    }
    found = detect(modules)
    assert (found.architecture, found.candidates) == (None, ())
    assert "fit its shapes" in found.evidence


def test_unknown_shapes_count_by_name() -> None:
    modules = dict.fromkeys(_flattened("sdxl", "unet", "attn2"), ())
    assert detect(modules).architecture == "sdxl"


@pytest.mark.parametrize(
    "modules",
    [
        {},
        {"model.layers.0.self_attn.q_proj": (4096, 4096)},
        {"base_model.model.model.layers.0.mlp.gate_proj": (14336, 4096)},
        {"encoder.block.0.layer.0.SelfAttention.q": (4096, 4096)},
        {"text_model.encoder.layers.0.self_attn.q_proj": (768, 768)},
        {"transformer.h.0.attn.c_attn": (2304, 768)},
        {"roberta.encoder.layer.0.attention.self.query": (768, 768)},
    ],
)
def test_language_models_belong_to_no_family(modules: dict[str, tuple[int, ...]]) -> None:
    found = detect(modules)
    assert (found.architecture, found.candidates) == (None, ())


def test_detection_loads_neither_numpy_nor_torch() -> None:
    """Headers are enough: inspect stays quick."""
    code = (
        "import sys; from loratools.architectures.detect import _families, _spoken_of, detect; "
        "assert detect({'lora_unet_single_blocks_0_modulation_lin': (9216, 3072)}).architecture == 'flux1'; "
        "sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Block weights


@pytest.mark.parametrize(
    ("family", "stem", "expected"),
    [
        ("sd1", "lora_unet_down_blocks_0_attentions_1_proj_in", "IN02"),
        ("sd1", "lora_unet_down_blocks_2_downsamplers_0_conv", "IN09"),
        ("sd1", "lora_unet_mid_block_resnets_1_conv1", "M00"),
        ("sd1", "lora_unet_up_blocks_1_attentions_0_proj_out", "OUT03"),
        ("sd1", "lora_unet_up_blocks_3_attentions_2_proj_out", "OUT11"),
        ("sd1", "lora_te_text_model_encoder_layers_0_mlp_fc1", "BASE"),
        ("sd1", "lora_unet_time_embedding_linear_1", "BASE"),
        ("sd1", "lora_unet_conv_in", "IN00"),
        ("sdxl", "lora_unet_input_blocks_7_1_proj_in", "IN07"),
        ("sdxl", "unet.up_blocks.0.attentions.0.proj_in", "OUT00"),
        ("sdxl", "lora_te2_text_model_encoder_layers_0_mlp_fc1", "BASE"),
        ("flux1", "lora_unet_double_blocks_18_img_mlp_0", "D018"),
        ("flux1", "transformer.single_transformer_blocks.37.proj_out", "S037"),
        ("flux1", "lora_te1_text_model_encoder_layers_0_mlp_fc1", "CLIP"),
        ("flux1", "lora_te2_encoder_block_0_layer_0_SelfAttention_q", "T5"),
        ("flux1", "diffusion_model.img_in", "IN"),
        ("flux1", "diffusion_model.final_layer.linear", "OUT"),
        ("qwen-image", "transformer.transformer_blocks.0.attn.to_q", None),
    ],
)
def test_a_weight_is_in_its_block(family: str, stem: str, expected: str | None) -> None:
    found = architecture(family)
    place = found.lookup(stem)
    assert place is not None
    assert block(found, place) == expected


@pytest.mark.parametrize("family", sorted(VECTORS))
def test_the_blocks_of_a_family_are_those_its_weights_are_in(family: str) -> None:
    found = architecture(family)
    seen = {
        block(found, place)
        for component in found.components
        for place in (
            found.lookup(f"{component.name}.{weight.parts[0].name}") for weight in component.weights
        )
        if place is not None
    }
    extra = {"CLIP"} if family == "chroma" else set()  # Chroma has no CLIP, its vector has
    assert seen | extra == set(blocks(found))


def test_vectors_have_the_lengths_of_the_convention() -> None:
    assert {len(vector) for vectors in VECTORS.values() for vector in vectors} == {12, 17, 20, 26, 61}
    assert VECTORS["sd1"][0][1:7] == ("IN01", "IN02", "IN04", "IN05", "IN07", "IN08")
    assert VECTORS["sdxl"][0] == (
        "BASE", "IN04", "IN05", "IN07", "IN08", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05",
    )  # fmt: skip
    assert VECTORS["flux1"][0][:4] == ("CLIP", "T5", "IN", "D000")
    assert {len(preset) for preset in PRESETS.values()} == {17, 61}


def test_ratios_come_from_a_preset_or_from_numbers() -> None:
    sd1 = architecture("sd1")
    for family in VECTORS:
        for preset, ratio in (("ALL", 1.0), ("none", 0.0), ("ALL0.5", 0.5)):
            assert set(ratios(architecture(family), preset).values()) == {ratio}
    assert {name for name, ratio in ratios(sd1, "MIDD").items() if not ratio} == {
        "IN01", "IN02", "IN04", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11",
    }  # fmt: skip
    outs = ratios(sd1, "outs")
    assert [name for name in VECTORS["sd1"][0] if outs[name]] == [
        "BASE",
        "OUT07",
        "OUT08",
        "OUT09",
        "OUT10",
        "OUT11",
    ]
    numbers = ",".join(str(n) for n in range(26))
    assert list(ratios(sd1, numbers).values()) == [float(n) for n in range(26)]
    short = ratios(architecture("sdxl"), "0.5, 1,1,1,1, 2, 3,3,3,3,3,3")
    assert (short["IN00"], short["IN04"], short["M00"], short["OUT05"], short["OUT08"]) == (0.5, 1, 2, 3, 0.5)
    assert set(ratios(architecture("flux1"), "FLUXALL").values()) == {1}


def test_ratios_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadConfig, match="17 ratios, but Stable Diffusion XL has 12 or 20"):
        ratios(architecture("sdxl"), "INS")
    with pytest.raises(BadConfig, match="neither numbers nor a preset"):
        ratios(architecture("sdxl"), "0,1,much")
    with pytest.raises(Unsupported, match="Qwen-Image has no block weights"):
        ratios(architecture("qwen-image"), "ALL")


def test_the_data_are_in_the_wheel() -> None:
    """Hatch is asked which files it would pack."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    root = Path(__file__).parent.parent
    packed = {entry.distribution_path for entry in wheel.WheelBuilder(str(root)).recurse_included_files()}
    data = {
        path.relative_to(root).as_posix() for path in (root / "loratools/architectures/data").rglob("*.toml")
    }
    assert data
    assert data <= packed


# Real files, by their headers

SUFFIXES = re.compile(
    r"(\.alpha|\.dora_scale|(\.lora_[AB]\.bias)|\.lora_(up|down|mid|A|B)(\.weight)?|_lora\.(up|down)\.weight"
    r"|\.lora\.(up|down)\.weight|\.(up|down)\.weight|\.lokr_\w+|\.scale)$"
)
FAMILIES = {
    "flux": "flux1",
    "anima": "anima",
    "qwen": "qwen-image",
    "krea2": "krea2",
    "sd15": "sd1",
    "sdxl": "sdxl",
}
# Some lists are samples written by hand. These modules have the sizes of no model: Anima's modulation has 256 rows, its
# Qwen3 has 2048 rows of queries and an MLP of 3072, and no weight of FLUX is the product of those LoKr factors.
NO_MODEL = {
    "invokeai_anima_lora_kohya_format": r"lora_unet_blocks_0_adaln_modulation_cross_attn_1",
    "invokeai_anima_lora_kohya_with_te_format": r"lora_te_layers_0_(self_attn_[qo]_proj|mlp_\w+_proj)",
    "invokeai_flux_lokr_bfl_format": r".*",
}
# And three modules of two blocks, transformer_blocks.N.attn.to_q and to_k, are in every family that has such blocks.
UNSURE = {"invokeai_flux_lokr_bfl_format", "invokeai_qwen_image_lora_diffusers_format"}


def _shapes(tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of each module's delta in a header; empty where it takes more than factors to say."""
    by_stem: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, shape in tensors.items():
        stem = SUFFIXES.sub("", key.removeprefix("base_model.model."))
        by_stem[stem][key.removeprefix("base_model.model.")[len(stem) :]] = shape
    return {stem: _shape(roles) for stem, roles in by_stem.items()}


def _shape(roles: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    if ".scale" in roles:
        return roles[".scale"]
    up = next((shape for role, shape in roles.items() if re.search(r"(up|B)(\.weight)?$", role)), ())
    down = next((shape for role, shape in roles.items() if re.search(r"(down|A)(\.weight)?$", role)), ())
    if up and down:
        return (up[0], *down[1:])
    sizes = [
        (roles.get(f".lokr_w{i}") or (roles[f".lokr_w{i}_a"][0], math.prod(roles[f".lokr_w{i}_b"][1:])))
        for i in (1, 2)
    ]
    return sizes[0][0] * sizes[1][0], sizes[0][1] * math.prod(sizes[1][1:])


def _headers() -> list[Path]:
    found = sorted((CORPUS / "headers").glob("*.json")) if os.environ.get("LORATOOLS_CORPUS") else []
    return [path for path in found if path.name != "INDEX.json"]


def _require_bound(family: str, modules: dict[str, tuple[int, ...]], no_model: str = "$.") -> None:
    found = architecture(family)
    places = {stem: found.lookup(stem) for stem in modules}
    assert not [stem for stem, place in places.items() if place is None]
    unlike = [stem for stem, place in places.items() if place is not None and not place.fits(modules[stem])]
    assert not [stem for stem in unlike if not re.fullmatch(no_model, stem)]


@needs_corpus
@pytest.mark.parametrize("path", _headers(), ids=lambda path: path.stem)
def test_every_module_of_a_real_header_is_in_its_architecture(path: Path) -> None:
    raw = json.loads(path.read_text("utf-8"))
    modules = _shapes(
        {key: tuple(one["shape"] if isinstance(one, dict) else one) for key, one in raw.items()}
    )
    family = next(name for part, name in FAMILIES.items() if part in path.stem)
    _require_bound(family, modules, NO_MODEL.get(path.stem, "$."))
    found = detect(modules)
    assert found.architecture == (None if path.stem in UNSURE else family), found
    assert detect(modules, [family]).architecture == (family if "lokr" not in path.stem else None)


@needs_corpus
@pytest.mark.parametrize(
    "name",
    [
        "huggingface__diffusers/examples/text_to_image/sd-pokemon-model-lora/pytorch_lora_weights.safetensors",
        "KohakuBlueleaf__LyCORIS/result/smart_falcon_4_lokr.safetensors",
        "KohakuBlueleaf__LyCORIS/result/smart_falcon_8_lokr.safetensors",
        "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.safetensors",
    ],
)
def test_every_module_of_a_real_adapter_is_in_its_architecture(name: str) -> None:
    path = CORPUS / "adapters" / name
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    shapes = {key: tuple(spec["shape"]) for key, spec in header.items() if key != "__metadata__"}
    modules = _shapes(shapes)
    _require_bound("sd1", modules)
    assert detect(modules).architecture == "sd1"
