"""Small transformers models made from configurations and seeds, PEFT adapters for them, comparisons of checkpoints."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SHARD = "15KB"
VOCABULARY, WIDTH = 96, 32
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_MLP = ["gate_proj", "up_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model to build, and what LoRA is trained on it."""

    model: str  # class in transformers
    config: str  # class of its configuration
    fields: dict[str, Any]
    lora: dict[str, Any]
    inputs: str = "tokens"
    nested: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """The model, with weights from a seed: not too small for bfloat16, none of them zero or one."""
        parts = {name: getattr(transformers, kind)(**values) for name, (kind, values) in self.nested.items()}
        config = getattr(transformers, self.config)(**{**self.fields, **parts, **changes})
        torch.manual_seed(7)
        model = getattr(transformers, self.model)(config)
        randomise(model, 0.08, 11)
        model.tie_weights()
        return model.to(dtype).eval()

    def batch(self) -> dict[str, torch.Tensor]:
        """Something to run it on."""
        return BATCHES[self.inputs]()


def randomise(model: Any, scale: float, seed: int, pattern: str = "") -> None:
    """Fill the parameters whose names have ``pattern`` in them from a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(pattern, name):
                values = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(values + (1.0 if parameter.ndim == 1 and "norm" in name.lower() else 0.0))


def _tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(3, VOCABULARY - 8, (2, 10), generator=generator)}


def _speech() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "input_features": torch.randn(2, 8, 32, generator=generator),
        "decoder_input_ids": _tokens()["input_ids"],
    }


def _picture() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


BATCHES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "tokens": _tokens,
    "speech": _speech,
    "picture": _picture,
}
_ALL = {"target_modules": "all-linear"}
_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}

CASES: dict[str, Case] = {
    "llama": Case("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "tie_word_embeddings": False}, _ALL),
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 4},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_TEXT,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        },
        {"target_modules": _ATTENTION, "target_parameters": [*_EXPERTS, "mlp.gate.weight"]},
    ),
    "mixtral": Case(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"target_modules": _ATTENTION, "target_parameters": [*_EXPERTS, "mlp.gate.weight"]},
    ),
    "gpt_oss": Case(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_TEXT,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
            "layer_types": ["full_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
        {"target_modules": _ATTENTION, "target_parameters": _EXPERTS},
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_TEXT, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
        {"target_modules": [*_ATTENTION, *_MLP]},
    ),
    "bert": Case(
        "BertForMaskedLM",
        "BertConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
        },
        {"target_modules": ["query", "key", "value", "dense"]},
    ),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 8,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]},
        "speech",
    ),
    "vit": Case(
        "ViTForImageClassification",
        "ViTConfig",
        {**_VISION, "num_labels": 5},
        {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
        "picture",
    ),
    "gemma3_vision": Case(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92},
        {"target_modules": "all-linear"},
        "tokens",
        {
            "text_config": ("Gemma3TextConfig", {**_TEXT, "query_pre_attn_scalar": 8}),
            "vision_config": ("SiglipVisionConfig", _VISION),
        },
    ),
}


@dataclass(frozen=True)
class Trained:
    """A base and an adapter on disk, and the model they make together."""

    base: Path
    adapter: Path
    model: PeftModel


def train(case: Case, folder: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> Trained:
    """Save the base in many shards, and an adapter with random factors beside it."""
    model = case.build(dtype)
    model.save_pretrained(folder / "base", max_shard_size=SHARD)
    wrapped = adapt(model, **{**case.lora, **lora})
    wrapped.save_pretrained(folder / "adapter")
    return Trained(folder / "base", folder / "adapter", wrapped)


def adapt(model: Any, *, seed: int = 5, **lora: Any) -> PeftModel:
    """Wrap a model, with factors of a size that changes it well beyond rounding."""
    torch.manual_seed(seed)
    fields = {"r": 4, "lora_alpha": 12, "init_lora_weights": False, **lora}
    wrapped = get_peft_model(model, LoraConfig(**fields))
    randomise(wrapped, 0.15, seed, r"lora_(A|B|embedding_A|embedding_B)")
    return wrapped.eval()


def tensors(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, whatever its shards."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def merged_by_peft(trained: Trained, folder: Path, **options: Any) -> Path:
    """What PEFT makes of it. The model is spent afterwards."""
    trained.model.merge_and_unload(**options).save_pretrained(folder, max_shard_size=SHARD)
    return folder


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖."""
    wide, truth = found.double(), wanted.double()
    return float((wide - truth).norm() / max(float(truth.norm()), 1e-30))


def ordered(values: torch.Tensor) -> np.ndarray:
    """Sixteen-bit floats as integers whose differences are counts of representable values."""
    bits = values.contiguous().view(torch.int16).numpy().astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


@dataclass
class Difference:
    """Of two checkpoints in a sixteen-bit type, over the elements an adapter touched."""

    touched: int = 0
    differing: int = 0
    worst: int = 0  # in representable values, among those not tiny

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """Count a tensor."""
        steps = np.abs(ordered(found) - ordered(wanted)).reshape(-1)
        large = np.abs(wanted.float().numpy().reshape(-1)) >= 2**-10
        self.touched += steps.size
        self.differing += int(np.count_nonzero(steps))
        self.worst = max(self.worst, int(steps[large].max(initial=0)))


def assert_same_checkpoint(found: Path, wanted: Path, base: Path) -> None:
    """The same tensors: to 1e-6 in float32; in sixteen bits all but 2e-5 of them equal, the rest one step apart."""
    mine, theirs, before = tensors(found), tensors(wanted), tensors(base)
    assert mine.keys() == theirs.keys()
    difference = Difference()
    for name, truth in theirs.items():
        assert mine[name].shape == truth.shape, name
        assert mine[name].dtype == truth.dtype, name
        if truth.dtype == torch.float32:
            assert relative_error(mine[name], truth) <= 1e-6, name
        elif name in before and torch.equal(truth, before[name]):
            assert torch.equal(mine[name], truth), name
        else:
            difference.add(mine[name], truth)
    assert_few(difference)


def assert_few(difference: Difference) -> None:
    """At most 2e-5 of the elements differ, by one representable value."""
    assert difference.differing <= math.ceil(2e-5 * difference.touched), difference
    assert difference.worst <= 1, difference


def load_cleanly(case: Case, folder: Path, **options: Any) -> Any:
    """The model transformers makes of a folder, which must hold every tensor it asks for and no other."""
    kind = getattr(transformers, case.model)
    model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    assert not report["mismatched_keys"], report["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: Any, case: Case) -> torch.Tensor:
    """What it says, in float32."""
    batch = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in case.batch().items()}
    return model(**batch).logits.float()


def rekey(adapter: Path, folder: Path, spell: Callable[[str], str]) -> Path:
    """The same adapter with its keys spelled another way."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    found = load_file(adapter / "adapter_model.safetensors")
    save_file({spell(key): tensor for key, tensor in found.items()}, folder / "adapter_model.safetensors")
    return folder


def configure(folder: Path, name: str = "adapter_config.json", **changes: Any) -> None:
    """Set fields of a configuration; None removes one."""
    path = folder / name
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(
        json.dumps({key: value for key, value in fields.items() if value is not None or key not in changes})
    )
