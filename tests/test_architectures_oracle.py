"""The tables of architectures against diffusers and transformers: names, shapes, and where each row lands.

Models are made from their configurations on torch's meta device: all names and shapes, no values.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from loratools.architectures.base import Architecture, Component, Weight, architecture, flat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


@pytest.fixture(scope="module")
def diffusers() -> Any:
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import diffusers.loaders.lora_conversion_utils
        import diffusers.loaders.single_file_utils
    return diffusers


SD = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {"caption_projection_dim": 1536, "num_attention_heads": 24, "num_layers": 24, "pos_embed_max_size": 2}
KLEIN = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
    "guidance_embeds": False,
}  # fmt: skip
WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
# Family, component, diffusers' class, and the configurations that together have all of the table's modules.
DENOISERS: list[tuple[str, str, str, list[dict[str, Any]]]] = [
    ("flux1", "transformer", "FluxTransformer2DModel", [{"guidance_embeds": True}]),
    ("chroma", "transformer", "ChromaTransformer2DModel", [{}]),
    ("sd1", "unet", "UNet2DConditionModel", [{**SD, "cross_attention_dim": 768}]),
    ("sd2", "unet", "UNet2DConditionModel", [
        {**SD, "cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)},
    ]),
    ("sdxl", "unet", "UNet2DConditionModel", [SDXL]),
    ("sd3", "transformer", "SD3Transformer2DModel", [SD3]),
    ("sd3.5-medium", "transformer", "SD3Transformer2DModel", [
        {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    ]),
    ("sd3.5-large", "transformer", "SD3Transformer2DModel", [
        {**SD3, "qk_norm": "rms_norm", "num_attention_heads": 38, "num_layers": 38, "caption_projection_dim": 2432},
    ]),
    ("qwen-image", "transformer", "QwenImageTransformer2DModel", [{}]),
    ("z-image", "transformer", "ZImageTransformer2DModel", [{}]),
    ("lumina2", "transformer", "Lumina2Transformer2DModel", [{"cap_feat_dim": 2304}]),
    ("hunyuan-video", "transformer", "HunyuanVideoTransformer3DModel", [{}]),
    ("wan-14b", "transformer", "WanTransformer3DModel", [
        {"image_dim": 1280, "added_kv_proj_dim": 5120},
        {"vace_layers": [0, 5, 10, 15, 20, 25, 30, 35]},
    ]),
    ("wan-1.3b", "transformer", "WanTransformer3DModel", [
        {**WAN_SMALL, "image_dim": 1280, "added_kv_proj_dim": 1536},
        {**WAN_SMALL, "vace_layers": list(range(0, 30, 2))},
    ]),
    ("wan-5b", "transformer", "WanTransformer3DModel", [
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    ]),
    ("flux2-dev", "transformer", "Flux2Transformer2DModel", [{}]),
    ("flux2-klein-4b", "transformer", "Flux2Transformer2DModel", [KLEIN]),
    ("flux2-klein-9b", "transformer", "Flux2Transformer2DModel", [
        {**KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    ]),
    ("ltx-2", "transformer", "LTX2VideoTransformer3DModel", [{}]),
    ("krea2", "transformer", "Krea2Transformer2DModel", [{}]),
    ("hidream-i1", "transformer", "HiDreamImageTransformer2DModel", [
        {
            "patch_size": 2, "in_channels": 16, "num_layers": 16, "num_single_layers": 32, "num_attention_heads": 20,
            "attention_head_dim": 128, "caption_channels": [4096, 4096], "text_emb_dim": 2048,
            "num_routed_experts": 4, "num_activated_experts": 2,
        },
    ]),
    ("ltx-video-2b", "transformer", "LTXVideoTransformer3DModel", [{}]),
    ("ltx-video-13b", "transformer", "LTXVideoTransformer3DModel", [
        {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    ]),
    ("anima", "transformer", "CosmosTransformer3DModel", [{"num_attention_heads": 16, "extra_pos_embed_type": None}]),
    ("anima", "text_conditioner", "AnimaTextConditioner", [{}]),
]  # fmt: skip


def _clip(width: int, mlp: int, layers: int, *, projection: bool) -> Callable[[], dict[str, tuple[int, ...]]]:
    def make() -> dict[str, tuple[int, ...]]:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            projection_dim=width,
        )
        found = _weights((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))
        return {name if projection else f"text_model.{name}": shape for name, shape in found.items()}

    return make


def _t5() -> dict[str, tuple[int, ...]]:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    found = _weights(T5EncoderModel(config))
    found.pop("encoder.embed_tokens", None)  # the same tensor as "shared"
    return found


def _gemma2() -> dict[str, tuple[int, ...]]:
    from transformers import Gemma2Config, Gemma2Model

    return _weights(Gemma2Model(Gemma2Config()))  # the defaults are those of the 2B model


def _qwen3(width: int, mlp: int, layers: int, heads: int) -> Callable[[], dict[str, tuple[int, ...]]]:
    def make() -> dict[str, tuple[int, ...]]:
        from transformers import Qwen3Config, Qwen3Model

        config = Qwen3Config(
            hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, head_dim=128,
        )  # fmt: skip
        return _weights(Qwen3Model(config))

    return make


def _qwen25() -> dict[str, tuple[int, ...]]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    }  # fmt: skip
    found = _weights(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text)))
    return {name: shape for name, shape in found.items() if name.startswith("model.language_model.")}


CLIP_L = _clip(768, 3072, 12, projection=False)
CLIP_L_PROJECTED = _clip(768, 3072, 12, projection=True)
CLIP_G = _clip(1280, 5120, 32, projection=True)
ENCODERS = [
    ("sd1", "text_encoder", CLIP_L),
    ("sd2", "text_encoder", _clip(1024, 4096, 23, projection=False)),
    ("sdxl", "text_encoder", CLIP_L),
    ("sdxl", "text_encoder_2", CLIP_G),
    ("sd3", "text_encoder", CLIP_L_PROJECTED),
    ("sd3", "text_encoder_2", CLIP_G),
    ("sd3", "text_encoder_3", _t5),
    ("flux1", "text_encoder", CLIP_L),
    ("flux1", "text_encoder_2", _t5),
    ("chroma", "text_encoder", _t5),
    ("hunyuan-video", "text_encoder_2", CLIP_L),
    ("lumina2", "text_encoder", _gemma2),
    ("anima", "text_encoder", _qwen3(1024, 3072, 28, 16)),
    ("z-image", "text_encoder", _qwen3(2560, 9728, 36, 32)),
    ("qwen-image", "text_encoder", _qwen25),
]


def _weights(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every module's weight, by the module's name."""
    return {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in model.named_parameters()
        if name.endswith(".weight")
    }


def _table(component: Component) -> dict[str, tuple[int, ...]]:
    """The same as the table has it: 0 where any size will do."""
    return {
        part.name: (part.stop - part.start, *weight.shape[1:])
        for weight in component.weights
        for part in weight.parts
    }


def _require_equal(table: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]]) -> None:
    assert table.keys() == model.keys()
    unlike = {
        name: (shape, model[name])
        for name, shape in table.items()
        if len(shape) != len(model[name])
        or any(a not in (0, b) for a, b in zip(shape, model[name], strict=True))
    }
    assert not unlike


@pytest.mark.parametrize(("family", "component", "name", "configs"), DENOISERS)
def test_a_denoiser_has_exactly_the_modules_of_diffusers(
    diffusers: Any, family: str, component: str, name: str, configs: list[dict[str, Any]]
) -> None:
    """Linear layers, convolutions, embeddings and norms, by name and shape, and no others."""
    model: dict[str, tuple[int, ...]] = {}
    for config in configs:
        made = getattr(diffusers, "WanVACETransformer3DModel" if "vace_layers" in config else name)
        with torch.device("meta"):
            model.update(_weights(made(**config)))
    _require_equal(_table(architecture(family).component(component)), model)


@pytest.mark.parametrize(("family", "component", "make"), ENCODERS)
def test_a_text_encoder_has_exactly_the_modules_of_transformers(
    family: str, component: str, make: Callable[[], dict[str, tuple[int, ...]]]
) -> None:
    """The same for text encoders."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    _require_equal(_table(architecture(family).component(component)), model)


def test_two_components_of_one_kind_have_the_same_weights() -> None:
    """What has no oracle of its own is a copy of what has one."""
    for family, component, other, like in (
        ("wan-14b", "transformer_2", "wan-14b", "transformer"),
        ("sd3.5-medium", "text_encoder", "sd3", "text_encoder"),
        ("sd3.5-large", "text_encoder_2", "sd3", "text_encoder_2"),
        ("sd3.5-large", "text_encoder_3", "sd3", "text_encoder_3"),
    ):
        assert _table(architecture(family).component(component)) == _table(
            architecture(other).component(like)
        )


# Every row of an original checkpoint carries a number of its own; diffusers' converters move the rows.


def _checkpoint(
    component: Component, prefix: str, *, skip: str = r"$."
) -> Iterator[tuple[Weight, str, torch.Tensor]]:
    number = 0
    for weight in component.weights:
        if re.match(skip, weight.native):
            continue
        rows = weight.shape[0]
        tagged = torch.arange(number, number + rows, dtype=torch.int64)
        number += rows
        yield weight, f"{prefix}{weight.key}", tagged if len(weight.shape) == 1 else tagged[:, None]


def _expected(weight: Weight, tagged: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for part in weight.parts:
        rows = tagged.flatten()[part.start : part.stop]
        if weight.swapped:
            half = len(rows) // 2
            rows = torch.cat([rows[half:], rows[:half]])
        yield part.name, rows


def _state_dict(found: list[tuple[Weight, str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    state = {}
    for weight, key, tagged in found:
        state[key] = tagged
        if len(weight.shape) > 1 and weight.tensor:
            state[re.sub("weight$", "bias", key)] = tagged.flatten()
    return state


UNET_XL = {
    "layers_per_block": 2, "class_embed_type": None, "addition_embed_type": "text_time",
}  # fmt: skip
UNET_SD = {**UNET_XL, "addition_embed_type": None}
CONVERTERS: list[tuple[str, str, str, str, dict[str, Any]]] = [
    (
        "flux1",
        "transformer",
        "model.diffusion_model.",
        "convert_flux_transformer_checkpoint_to_diffusers",
        {},
    ),
    (
        "chroma",
        "transformer",
        "model.diffusion_model.",
        "convert_chroma_transformer_checkpoint_to_diffusers",
        {},
    ),
    ("sd1", "unet", "model.diffusion_model.", "convert_ldm_unet_checkpoint", {"config": UNET_SD}),
    ("sd2", "unet", "model.diffusion_model.", "convert_ldm_unet_checkpoint", {"config": UNET_SD}),
    ("sdxl", "unet", "model.diffusion_model.", "convert_ldm_unet_checkpoint", {"config": UNET_XL}),
    ("sd3", "transformer", "model.diffusion_model.", "convert_sd3_transformer_checkpoint_to_diffusers", {}),
    ("sd3.5-medium", "transformer", "", "convert_sd3_transformer_checkpoint_to_diffusers", {}),
    ("sd3.5-large", "transformer", "", "convert_sd3_transformer_checkpoint_to_diffusers", {}),
    (
        "z-image",
        "transformer",
        "model.diffusion_model.",
        "convert_z_image_transformer_checkpoint_to_diffusers",
        {},
    ),
    ("lumina2", "transformer", "", "convert_lumina2_to_diffusers", {}),
    ("hunyuan-video", "transformer", "", "convert_hunyuan_video_transformer_to_diffusers", {}),
    ("wan-14b", "transformer", "model.diffusion_model.", "convert_wan_transformer_to_diffusers", {}),
    ("wan-1.3b", "transformer", "", "convert_wan_transformer_to_diffusers", {}),
    ("wan-5b", "transformer", "", "convert_wan_transformer_to_diffusers", {}),
    ("flux2-dev", "transformer", "", "convert_flux2_transformer_checkpoint_to_diffusers", {}),
    ("flux2-klein-4b", "transformer", "", "convert_flux2_transformer_checkpoint_to_diffusers", {}),
    ("flux2-klein-9b", "transformer", "", "convert_flux2_transformer_checkpoint_to_diffusers", {}),
    (
        "krea2",
        "transformer",
        "model.diffusion_model.",
        "convert_krea2_transformer_checkpoint_to_diffusers",
        {},
    ),
    ("ltx-video-2b", "transformer", "", "convert_ltx_transformer_checkpoint_to_diffusers", {}),
    ("ltx-video-13b", "transformer", "", "convert_ltx_transformer_checkpoint_to_diffusers", {}),
    ("ltx-2", "transformer", "", "convert_ltx2_transformer_to_diffusers", {}),
    ("anima", "transformer", "net.", "convert_cosmos_transformer_checkpoint_to_diffusers", {}),
]


@pytest.mark.parametrize(("family", "component", "prefix", "converter", "options"), CONVERTERS)
def test_each_row_of_an_original_checkpoint_lands_where_diffusers_puts_it(
    diffusers: Any, family: str, component: str, prefix: str, converter: str, options: dict[str, Any]
) -> None:
    """Names, fused and split rows, and exchanged halves, at full size."""
    found = list(_checkpoint(architecture(family).component(component), prefix))
    state = _state_dict(found)
    if family.startswith("sd3"):
        state[f"{prefix}pos_embed"] = torch.zeros(1)
    converted = getattr(diffusers.loaders.single_file_utils, converter)(state, **options)
    for weight, _, tagged in found:
        for name, rows in _expected(weight, tagged):
            ending = weight.tensor if f"{name}.weight" not in converted else "weight"
            assert torch.equal(converted[f"{name}.{ending}"].flatten(), rows), name


@pytest.mark.parametrize(
    ("family", "component", "prefix"),
    [
        ("sdxl", "text_encoder_2", "conditioner.embedders.1.model."),
        ("sd2", "text_encoder", "cond_stage_model.model."),
    ],
)
def test_open_clip_is_taken_apart_as_diffusers_does(
    diffusers: Any, family: str, component: str, prefix: str
) -> None:
    """q, k and v of one parameter, and the projection that is stored transposed."""
    table = architecture(family).component(component)
    found = list(_checkpoint(table, prefix))
    state = {key: tagged for _, key, tagged in found}
    width = table.weights[0].shape[1]

    class Model:
        class config:  # noqa: N801
            hidden_size = width

    converted = diffusers.loaders.single_file_utils.convert_open_clip_checkpoint(Model, state, prefix=prefix)
    for weight, _, tagged in found:
        assert weight.transposed == (weight.native == "text_projection")
        for name, rows in _expected(weight, tagged):
            key = name if f"{name}.weight" not in converted else f"{name}.weight"
            assert torch.equal(converted[key].flatten(), rows), name


@pytest.mark.parametrize("family", ["qwen-image", "hidream-i1"])
def test_some_families_have_one_set_of_names(family: str) -> None:
    """diffusers only takes the prefix off: nothing is to convert."""
    for weight in architecture(family).component("transformer").weights:
        assert [part.name for part in weight.parts] == [weight.native]


# LoRA converters: each row of each up matrix carries its number, as above. The rank is 2, so that halves can be taken.

BLOCKS = r"(double_blocks|single_blocks|joint_blocks|transformer_blocks|blocks|layers|noise_refiner|context_refiner)\."


def _lora(
    family: str, spell: Callable[[Weight], str], up: str, down: str, only: str
) -> tuple[dict[str, torch.Tensor], list[tuple[Weight, torch.Tensor]]]:
    state: dict[str, torch.Tensor] = {}
    found = []
    for weight, key, tagged in _checkpoint(architecture(family).component("transformer"), ""):
        if weight.tensor == "scale" and spell is _bare:  # the control LoRA carries these norms whole
            state[key] = tagged
        if len(weight.shape) != 2 or not re.match(only, weight.native):
            continue
        stem = spell(weight)
        state[f"{stem}.{down}.weight"] = torch.zeros(2, weight.shape[1] or 128, dtype=torch.float64)
        state[f"{stem}.{up}.weight"] = tagged.to(torch.float64).expand(-1, 2)
        if down == "lora_down":
            state[f"{stem}.alpha"] = torch.tensor(2.0, dtype=torch.float64)
        found.append((weight, tagged))
    return state, found


def _kohya(weight: Weight) -> str:
    return f"lora_unet_{flat(weight.native)}"


def _comfy(weight: Weight) -> str:
    return f"diffusion_model.{weight.native}"


def _bare(weight: Weight) -> str:
    return weight.native


LORA_CONVERTERS = [
    ("flux1", _kohya, "lora_up", "lora_down", "_convert_kohya_flux_lora_to_diffusers", BLOCKS),
    ("flux1", _bare, "lora_B", "lora_A", "_convert_bfl_flux_control_lora_to_diffusers", r""),
    ("wan-14b", _kohya, "lora_up", "lora_down", "_convert_musubi_wan_lora_to_diffusers", r"blocks.*\.(?!\w*_img$)"),
    ("wan-1.3b", _comfy, "lora_B", "lora_A", "_convert_non_diffusers_wan_lora_to_diffusers", r"blocks\.(?!.*_img$)"),
    ("lumina2", _comfy, "lora_B", "lora_A", "_convert_non_diffusers_lumina2_lora_to_diffusers", BLOCKS),
    ("z-image", _kohya, "lora_up", "lora_down", "_convert_non_diffusers_z_image_lora_to_diffusers", BLOCKS),
    ("hunyuan-video", _bare, "lora_B", "lora_A", "_convert_hunyuan_video_lora_to_diffusers", r"(double|single)_blocks"),
    ("anima", _comfy, "lora_B", "lora_A", "_convert_non_diffusers_anima_lora_to_diffusers", r"blocks"),
    ("flux2-klein-4b", _comfy, "lora_B", "lora_A", "_convert_non_diffusers_flux2_lora_to_diffusers", r"(?!.*adaLN)"),
    ("krea2", _comfy, "lora_B", "lora_A", "_convert_non_diffusers_krea2_lora_to_diffusers", r""),
    ("qwen-image", _kohya, "lora_up", "lora_down", "_convert_non_diffusers_qwen_lora_to_diffusers", BLOCKS),
]  # fmt: skip


@pytest.mark.parametrize(("family", "spell", "up", "down", "converter", "only"), LORA_CONVERTERS)
def test_each_row_of_a_lora_lands_where_diffusers_puts_it(
    diffusers: Any, family: str, spell: Callable[[Weight], str], up: str, down: str, converter: str, only: str
) -> None:
    """The name diffusers gives leads to the same part, and our split of the native module has the same rows."""
    state, found = _lora(family, spell, up, down, only)
    converted = getattr(diffusers.loaders.lora_conversion_utils, converter)(dict(state))
    expected = {
        f"transformer.{name}": rows for weight, tagged in found for name, rows in _expected(weight, tagged)
    }
    ours: Architecture = architecture(family)
    seen = {
        key.removesuffix(".lora_B.weight"): value
        for key, value in converted.items()
        if key.endswith(".lora_B.weight")
    }
    full = {
        name if name.startswith("transformer.") else f"transformer.{name}": value
        for name, value in seen.items()
    }
    assert full.keys() == expected.keys()
    for name, value in full.items():
        assert torch.equal(value[:, 0].to(torch.int64), expected[name]), name
        place = ours.lookup(name)
        assert place is not None
        assert place.names == (name,)


def test_the_modules_of_xlabs_land_where_diffusers_puts_them(diffusers: Any) -> None:
    """Among them the three quarters of ``linear1`` that ``qkv_lora`` covers."""
    flux = architecture("flux1")
    state, expected, number = {}, {}, 0
    for weight in flux.component("transformer").weights:
        for alias, first, last in weight.aliases:
            rows = weight.parts[last - 1].stop - weight.parts[first].start
            tagged = torch.arange(number, number + rows, dtype=torch.float64)[:, None]
            number += rows
            state[f"{alias}.up.weight"] = tagged
            state[f"{alias}.down.weight"] = torch.zeros(1, weight.shape[1], dtype=torch.float64)
            for part in weight.parts[first:last]:
                expected[f"transformer.{part.name}"] = tagged[part.start : part.stop]
            place = flux.lookup(alias)
            assert place is not None
            assert (place.first, place.last, place.rows) == (first, last, rows)
    assert len(state) == 2 * (4 * 19 + 2 * 38)
    converted = diffusers.loaders.lora_conversion_utils._convert_xlabs_flux_lora_to_diffusers(state)
    seen = {key.removesuffix(".lora_B.weight"): value for key, value in converted.items() if "lora_B" in key}
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in seen)


# sd-mecha's lists of the keys of real files, with shapes.

MECHA = [
    ("sd1", "sd1-ldm"),
    ("sd1", "sd1-kohya"),
    ("sdxl", "sdxl-sgm"),
    ("sdxl", "sdxl-kohya"),
    ("sdxl", "sdxl-kohya_but_diffusers"),
    ("sdxl", "sdxl-diffusers_unet_only"),
    ("sd3", "sd3-comfyui"),
    ("flux1", "flux-flux"),
]
LINE = re.compile(r"^    ([\w.]+): \{(?:shape: \[([\d, ]*)\])?", re.MULTILINE)


@pytest.mark.parametrize(("family", "name"), MECHA)
def test_the_key_lists_of_sd_mecha_are_known(family: str, name: str) -> None:
    """Each tensor of a module's weight is found, and has the shape of the table."""
    spec = importlib.util.find_spec("sd_mecha")
    if spec is None or spec.origin is None:
        pytest.skip("sd-mecha is not installed")
    text = (Path(spec.origin).parent / f"extensions/builtin/model_configs/{name}.yaml").read_text("utf-8")
    keys = {
        match[1]: tuple(int(n) for n in (match[2] or "").split(",") if n.strip())
        for match in LINE.finditer(text)
    }
    skip = re.compile(
        r"first_stage_model|vae|bias$|position_ids|logit_scale|\.alpha$|sigma|model_ema|^[a-z_]+$|pos_embed$|alphas|posterior|betas"
    )
    found = architecture(family)
    stems = {_stem(key, kohya="kohya" in name): shape for key, shape in keys.items() if not skip.search(key)}
    assert len(stems) > 250
    places = {stem: found.lookup(stem) for stem in stems}
    assert not [stem for stem, place in places.items() if place is None]
    assert not [stem for stem, place in places.items() if place is not None and not place.fits(stems[stem])]


def _stem(key: str, *, kohya: bool) -> str:
    """The list spells kohya's names with dots: te.text_model.encoder for lora_te_text_model_encoder."""
    stem = key.removesuffix(".weight")
    return f"lora_{flat(stem)}" if kohya else stem
