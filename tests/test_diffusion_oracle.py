"""Merges into diffusers' own small models, against what diffusers does with the same files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt
from tests.diffusion_helpers import factors, write

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("diffusers", reason="its pipelines are the oracle")
pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # of diffusers and transformers, about what they will change

ROUNDING = 2e-6  # of float32 sums, relative to the largest entry of a tensor


def require_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """The same tensors, but for the order in which float32 was summed."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() <= ROUNDING * max(1.0, float(np.abs(value).max())), name


def arrays(model: Any) -> dict[str, np.ndarray]:
    """A model's tensors, under the names it has in memory."""
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of Stable Diffusion 1's structure, small, with random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    attended = ("CrossAttnDownBlock2D",) * 3
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16, 16), layers_per_block=2, cross_attention_dim=12,
        attention_head_dim=2, norm_num_groups=4, down_block_types=(*attended, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    )  # fmt: skip
    encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sd") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


def load_pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        folder, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


# One alpha for all, and no attention of the text encoder: diffusers 0.42 spells the names of other alphas in a way that
# PEFT does not find, and of kohya's text encoders it applies the MLP alone.
KOHYA = {
    **factors("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q", 8, 8),
    **factors("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 16, 12),
    **factors("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0", 16, 16),
    **factors("lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj", 64, 8),
    **factors("lora_unet_down_blocks_2_attentions_0_proj_in", 16, 16, kernel=(1, 1)),
    **factors("lora_te_text_model_encoder_layers_1_mlp_fc2", 12, 24),
}


def dotted() -> dict[str, np.ndarray]:
    """A file in diffusers' own spelling, attention of the text encoder included."""
    found = {}
    for name, out, into in (
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v", 16, 16),
        ("text_encoder.text_model.encoder.layers.0.self_attn.v_proj", 12, 12),
        ("text_encoder.text_model.encoder.layers.1.self_attn.out_proj", 12, 12),
    ):
        made = factors(name, out, into, alpha=None)
        found |= {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): made[key] for key in made}
    return found


@pytest.mark.parametrize("lora", [KOHYA, dotted()], ids=["kohya", "diffusers"])
def test_a_merged_pipeline_is_what_diffusers_fuses(
    stable_diffusion: Path, tmp_path: Path, lora: dict[str, np.ndarray]
) -> None:
    adapter, out = write(tmp_path / "pytorch_lora_weights.safetensors", lora), tmp_path / "merged"
    report = lt.merge(stable_diffusion, adapter, out, verify=True)
    assert report.verified
    assert report.modules["unmatched"] == []
    theirs = load_pipeline(stable_diffusion)
    theirs.load_lora_weights(adapter)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    ours = load_pipeline(out)  # it loads as it is
    plain = load_pipeline(stable_diffusion)
    moved = 0
    for component in ("unet", "text_encoder"):
        before, after = arrays(getattr(plain, component)), arrays(getattr(ours, component))
        require_close(after, arrays(getattr(theirs, component)))
        moved += sum((value != before[name]).any() for name, value in after.items())
    assert moved == report.modules["bound"]


def test_a_flux_transformer_is_what_diffusers_fuses(tmp_path: Path) -> None:
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "transformer")
    rng = np.random.default_rng(0)
    lora = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ("attn" in name or "mlp" in name or "norm_out" in name):
            lora[f"transformer.{name}.lora_A.weight"] = rng.standard_normal((2, module.in_features)).astype(
                "f4"
            )
            lora[f"transformer.{name}.lora_B.weight"] = rng.standard_normal((module.out_features, 2)).astype(
                "f4"
            )
    adapter = write(tmp_path / "pytorch_lora_weights.safetensors", lora)
    report = lt.merge(tmp_path / "transformer", adapter, tmp_path / "merged", verify=True)
    assert report.verified
    assert report.modules == {"bound": len(lora) // 2, "unmatched": []}
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    theirs.load_lora_adapter(str(adapter.parent), weight_name=adapter.name)
    theirs.fuse_lora()
    theirs.unload_lora()
    ours = FluxTransformer2DModel.from_pretrained(tmp_path / "merged")
    require_close(arrays(ours), arrays(theirs))
    file = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    assert file.keys() == arrays(theirs).keys()
