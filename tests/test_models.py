"""Whole models: a merge of folders gives the tensors that PEFT gives, in a checkpoint that transformers loads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import loratools as lt
from loratools.errors import ShapeMismatch, UnmatchedModules
from tests.model_helpers import (
    CASES,
    Case,
    Trained,
    adapt,
    assert_same_checkpoint,
    load_cleanly,
    logits,
    merged_by_peft,
    rekey,
    relative_error,
    tensors,
    train,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::FutureWarning", "ignore:.*pattern keys:RuntimeWarning"
)

# PEFT rounds an expert's delta to the base's type before it adds it; the others are rounded once, as here.
ROUNDED_TWICE = {"qwen3_moe", "mixtral", "gpt_oss"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_merge_equals_peft(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[name]
    trained = train(case, tmp_path, dtype)
    assert len(list(trained.base.glob("*.safetensors"))) > 2
    wanted, plain = logits(trained.model, case), logits(case.build(dtype), case)
    report = lt.merge(trained.base, trained.adapter, tmp_path / "ours")
    assert not report.modules["unmatched"]
    found = logits(load_cleanly(case, tmp_path / "ours", dtype=torch.float32), case)
    if dtype == torch.float32:
        assert relative_error(found, wanted) < 1e-5
    else:
        assert relative_error(found, wanted) < 0.1 * relative_error(plain, wanted)
    theirs = merged_by_peft(trained, tmp_path / "peft")
    if dtype == torch.bfloat16 and name in ROUNDED_TWICE:
        assert_same_checkpoint(tmp_path / "ours", rounded_once(trained, name, tmp_path), trained.base)
    else:
        assert_same_checkpoint(tmp_path / "ours", theirs, trained.base)
    for merged in (tmp_path / "ours", theirs):
        verified = lt.verify(trained.base, trained.adapter, merged)
        assert verified.ok, [v for v in verified.modules if not v.ok]


def rounded_once(trained: Trained, name: str, folder: Path) -> Path:
    """PEFT's merge in float32, rounded to bfloat16 at the end."""
    base = load_cleanly(CASES[name], trained.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, trained.adapter).merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(folder / "once")
    return folder / "once"


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "vit"])
def test_index_names_every_tensor_where_it_is(name: str, tmp_path: Path) -> None:
    trained = train(CASES[name], tmp_path)
    lt.merge(trained.base, trained.adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "out").keys()
    for key, file in index["weight_map"].items():
        assert key in load_file(tmp_path / "out" / file)
    stored = sum(t.numel() * t.element_size() for t in tensors(tmp_path / "out").values())
    assert index["metadata"]["total_size"] == stored


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3_vision"])
def test_other_shards_hold_the_same_tensors(name: str, tmp_path: Path) -> None:
    trained = train(CASES[name], tmp_path)
    lt.merge(trained.base, trained.adapter, tmp_path / "out")
    lt.merge(trained.base, trained.adapter, tmp_path / "fewer", shard_size=100_000)
    fewer, out = tensors(tmp_path / "fewer"), tensors(tmp_path / "out")
    assert len(list((tmp_path / "fewer").glob("*.safetensors"))) < len(
        list((tmp_path / "out").glob("*.safetensors"))
    )
    assert fewer.keys() == out.keys()
    assert all(torch.equal(fewer[name], out[name]) for name in out)
    load_cleanly(CASES[name], tmp_path / "fewer")


# Other names on disk than in memory: every dialect, on a model that speaks it.

_TEXT = CASES["llama"].fields
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_MOE = {**_TEXT, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_FUSED = ["experts.gate_up_proj", "experts.down_proj"]
_LINEAR = {"target_modules": "all-linear"}
DIALECTS: dict[str, Case] = {
    "granitemoe": Case("GraniteMoeForCausalLM", "GraniteMoeConfig", _MOE, {**_LINEAR, "target_parameters": _FUSED}),
    "phimoe": Case("PhimoeForCausalLM", "PhimoeConfig", _MOE, {**_LINEAR, "target_parameters": _FUSED}),
    "mixtral": Case("MiniMaxForCausalLM", "MiniMaxConfig", _MOE, {**_LINEAR, "target_parameters": _FUSED}),
    "vit": Case("DeiTForImageClassification", "DeiTConfig", _VISION, _LINEAR),
    "dinov2": Case("Dinov2Model", "Dinov2Config", {**_VISION, "mlp_ratio": 2}, _LINEAR),
    "swin": Case(
        "SwinModel", "SwinConfig",
        {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        _LINEAR,
    ),
    "llava": Case(
        "LlavaForConditionalGeneration", "LlavaConfig", {}, _LINEAR,
        nested={"text_config": ("LlamaConfig", _TEXT), "vision_config": ("CLIPVisionConfig", _VISION)},
    ),
    "qwen2-vl": Case(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {
            "text_config": _TEXT,
            "vision_config": {
                "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4
            },
        },
        _LINEAR,
    ),
    "gpt-neox": Case("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, {"target_modules": ["lm_head", "dense"]}),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_names_in_memory_are_found_on_disk(dialect: str, tmp_path: Path) -> None:
    trained = train(DIALECTS[dialect], tmp_path)
    report = lt.merge(trained.base, trained.adapter, tmp_path / "ours")
    assert any(f"in the {dialect} spelling" in warning for warning in report.warnings)
    assert_same_checkpoint(tmp_path / "ours", merged_by_peft(trained, tmp_path / "peft"), trained.base)
    assert report.modules["bound"] == len(lt.load(trained.adapter).modules)


# Prefixes: an adapter's names are looked up in the base, whatever stands before them.

SPELLINGS: dict[str, Callable[[str], str]] = {
    "adapter name": lambda key: key.replace("lora_A.", "lora_A.default.").replace(
        "lora_B.", "lora_B.default."
    ),
    "doubled": lambda key: "base_model.model." + key,
    "without prefix": lambda key: key.removeprefix("base_model.model."),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "distributed": lambda key: key.replace("base_model.model.", "base_model.model.module."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "whisper", "gemma3_vision"])
def test_odd_prefixes_are_found_in_the_base(name: str, spelling: str, tmp_path: Path) -> None:
    trained = train(CASES[name], tmp_path)
    odd = rekey(trained.adapter, tmp_path / "odd", SPELLINGS[spelling])
    plain = lt.merge(trained.base, trained.adapter, tmp_path / "plain")
    report = lt.merge(trained.base, odd, tmp_path / "out")
    assert report.modules == plain.modules
    wanted, found = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "qwen3_moe", "vit", "gemma3_vision"])
def test_adapter_of_the_headless_model_on_the_whole_one(name: str, tmp_path: Path) -> None:
    """Trained on what AutoModel gives; merged into the checkpoint that has the head."""
    case = CASES[name]
    whole = case.build()
    whole.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    inner = getattr(whole, whole.base_model_prefix)
    lora = {k: v for k, v in case.lora.items() if k != "modules_to_save"}
    adapt(inner, **lora).save_pretrained(tmp_path / "adapter")
    wanted = logits(whole, case)  # the inner model has been adapted in place
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = logits(load_cleanly(case, tmp_path / "out"), case)
    assert relative_error(found, wanted) < 1e-5
    assert relative_error(logits(case.build(), case), wanted) > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "qwen3_moe"])
def test_adapter_of_the_whole_model_on_the_headless_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    whole = case.build()
    inner = getattr(whole, whole.base_model_prefix)
    inner.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    lora = dict(case.lora)
    if name == "bert":  # the head's dense layer is not in the inner model
        lora["target_modules"] = ["query", "key", "value"]
    adapt(whole, **lora).save_pretrained(tmp_path / "adapter")
    tokens = case.batch()
    with torch.no_grad():
        wanted = inner(**tokens).last_hidden_state
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert relative_error(merged(**tokens).last_hidden_state, wanted) < 1e-5


def test_layers_that_could_be_two_models_are_an_error(tmp_path: Path) -> None:
    """Whisper's encoder and decoder both have layers.0.self_attn.q_proj."""
    case = CASES["whisper"]
    model = case.build()
    model.save_pretrained(tmp_path / "base")
    decoder = model.model.decoder
    adapt(decoder, target_modules=r".*self_attn\.(q_proj|v_proj)").save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnmatchedModules) as caught:
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "model.decoder.layers.0.self_attn" in str(caught.value)
    assert "model.encoder.layers.0.self_attn" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_layers_that_only_one_model_has_are_found(tmp_path: Path) -> None:
    """Only Whisper's decoder attends to the encoder."""
    case = CASES["whisper"]
    model = case.build()
    model.save_pretrained(tmp_path / "base")
    adapt(model.model.decoder, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "adapter")
    wanted = logits(model, case)
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert relative_error(logits(load_cleanly(case, tmp_path / "out"), case), wanted) < 1e-5


@pytest.mark.parametrize("other", ["gpt2", "whisper", "vit"])
def test_adapter_of_another_model_is_an_error(other: str, tmp_path: Path) -> None:
    train(CASES["llama"], tmp_path / "llama")
    train(CASES[other], tmp_path / other)
    with pytest.raises((UnmatchedModules, ShapeMismatch)):
        lt.merge(tmp_path / "llama" / "base", tmp_path / other / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
