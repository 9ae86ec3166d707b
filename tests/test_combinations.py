"""Features of PEFT that meet in one adapter, against the model as PEFT runs it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import Unsupported
from tests.model_helpers import randomise, tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.arange(12).reshape(2, 6)


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def outputs(model):
    return model(input_ids=IDS).logits


def save_adapter(model, folder, seed=3):
    randomise(model, 0.05, seed, "lora_|modules_to_save")
    model.save_pretrained(folder)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_dora_starts_from_what_the_initialisation_left_of_the_base(tmp_path, init):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=True, init_lora_weights=init
    )
    adapted = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                value.add_(
                    0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    adapted.save_pretrained(tmp_path / "adapter")
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(outputs(merged), outputs(adapted), atol=2e-5, rtol=1e-4)


def test_a_trained_module_follows_the_spelling_of_the_checkpoint(tmp_path):
    """Mixtral's router is mlp.gate in memory and block_sparse_moe.gate on disk; the adapted modules do not tell."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp.gate"])
    )
    save_adapter(adapted, tmp_path / "adapter")
    report = lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.tensors["added"] == 0
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.block_sparse_moe.gate.weight"
    assert torch.equal(
        tensors(tmp_path / "out")[name], saved["base_model.model.model.layers.0.mlp.gate.weight"]
    )


def test_modules_to_save_names_the_end_of_a_name(tmp_path):
    """PEFT saves every module whose name ends with an entry: norm is post_attention_layernorm too."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    ).eval()
    save_adapter(adapted, tmp_path / "adapter")
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(outputs(merged), outputs(adapted), atol=1e-5, rtol=1e-4)


def test_dora_without_its_magnitudes_is_refused(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    save_adapter(adapted, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {key: value for key, value in load_file(weights).items() if "magnitude" not in key}
    save_file(kept, weights)
    with pytest.raises(Unsupported, match=r"use_dora, and .*q_proj has no magnitude vector"):
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("declared", ["IA3", "LOHA", "ADALORA"])
def test_a_type_that_contradicts_the_tensors_is_said(tmp_path, declared):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    save_adapter(
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "adapter"
    )
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": declared}))
    with pytest.raises(Unsupported, match=f"declared as {declared}, with the tensors of another type"):
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_new_tensor_is_named(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "num_labels": 3, "pad_token_id": 0})
    classifier = transformers.LlamaForSequenceClassification(config)
    adapted = peft.get_peft_model(
        classifier, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    )
    save_adapter(adapted, tmp_path / "adapter")
    report = lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.tensors["added"] == 1
    assert any(warning.startswith("score.weight: not in the base, added") for warning in report.warnings)
