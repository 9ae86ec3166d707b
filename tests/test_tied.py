"""Embeddings that are input and output at once: the merged model says what the adapted one said.

PEFT's own merge is no oracle here: it adds the delta of one to the weight of both. The model before merging is.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import Mismatch, Unsupported
from tests.model_helpers import (
    CASES,
    VOCABULARY,
    adapt,
    configure,
    load_cleanly,
    logits,
    randomise,
    relative_error,
    tensors,
)

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel

    from tests.model_helpers import Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# The case, the input embedding, the output embedding, and something else to adapt.
TIED: dict[str, tuple[Case, str, str, str]] = {
    "llama": (
        replace(CASES["llama"], fields={**CASES["llama"].fields, "tie_word_embeddings": True}),
        "embed_tokens", "lm_head", "q_proj",
    ),
    "gpt2": (CASES["gpt2"], "wte", "lm_head", "c_attn"),
    "gemma3": (CASES["gemma3"], "embed_tokens", "lm_head", "q_proj"),
    "bert": (CASES["bert"], "word_embeddings", "decoder", "query"),
    "gemma3_vision": (CASES["gemma3_vision"], "embed_tokens", "lm_head", "q_proj"),
    "whisper": (CASES["whisper"], "embed_tokens", "proj_out", "q_proj"),
}  # fmt: skip


def change(model: PeftModel) -> None:
    """Move everything that is trained whole, as an optimiser would."""
    randomise(model, 0.2, 17, r"modules_to_save|trainable_tokens_delta")


def targets(name: str, which: str) -> dict[str, Any]:
    """What is adapted: LoRA on something else always, and the embeddings as ``which`` says."""
    _, embedding, head, other = TIED[name]
    ends = {"embedding": [embedding], "head": [head], "both": [embedding, head]}
    if which == "both of a tie":
        return {"target_modules": [*ends["both"], other], "ensure_weight_tying": True}
    if which == "whole both of a tie":
        return {"target_modules": [other], "modules_to_save": ends["both"], "ensure_weight_tying": True}
    if which in ends:
        return {"target_modules": [*ends[which], other]}
    if which == "tied lora":
        return {"target_modules": [embedding, other], "ensure_weight_tying": True}
    if which == "tied whole":
        return {"target_modules": [other], "modules_to_save": [embedding], "ensure_weight_tying": True}
    if which == "tokens":
        return {"target_modules": [other], "trainable_token_indices": {embedding: [3, 11, 40]}}
    if which == "listed tokens":
        return {"target_modules": [other], "trainable_token_indices": [3, 11, 40]}
    return {"target_modules": [other], "modules_to_save": ends[which.removeprefix("whole ")]}


WAYS = [
    "embedding", "head", "both", "tied lora", "tied whole", "whole embedding", "whole head", "whole both", "tokens",
    "listed tokens", "both of a tie", "whole both of a tie",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TIED)
def test_merged_says_what_the_adapter_said(name: str, way: str, tmp_path: Path) -> None:
    case = TIED[name][0]
    model = case.build()
    model.save_pretrained(tmp_path / "base", max_shard_size="15KB")
    wrapped = adapt(model, **targets(name, way))
    change(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    # PEFT's tied token rows forget the bias of an output embedding that has one; there its merge is right.
    tokens = way.endswith("tokens")
    wanted = logits(wrapped.merge_and_unload() if tokens and name == "bert" else wrapped, case)
    assert relative_error(logits(case.build(), case), wanted) > 0.05
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_cleanly(case, tmp_path / "out")
    assert relative_error(logits(merged, case), wanted) < 1e-5
    assert lt.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").ok
    # PEFT ties where one is called embed_tokens or lm_head; elsewhere ensure_weight_tying has no effect.
    _, embedding, head, _ = TIED[name]
    known = embedding == "embed_tokens" or (way.endswith("of a tie") and head == "lm_head")
    stays_tied = tokens or ("tie" in way and known)
    assert is_tied(merged) == stays_tied
    added = tensors(tmp_path / "out").keys() - tensors(tmp_path / "base").keys()
    assert bool(added) == (not stays_tied)


def is_tied(model: Any) -> bool:
    """Whether input and output embedding are one tensor."""
    return model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


# Resized vocabularies.

GROWN = VOCABULARY + 5
UNTIED = CASES["llama"]
RESIZED: dict[str, dict[str, Any]] = {
    "elsewhere": {"target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
TOKENIZER = {
    "tokenizer.json": '{"grown": true}',
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ grown }}",
}


@pytest.mark.parametrize("way", RESIZED)
@pytest.mark.parametrize(
    "case", [UNTIED, TIED["llama"][0], TIED["gemma3"][0]], ids=["untied", "tied", "gemma3"]
)
def test_resized_vocabulary(case: Case, way: str, tmp_path: Path) -> None:
    model = case.build()
    model.save_pretrained(tmp_path / "base", max_shard_size="15KB")
    for name in TOKENIZER:
        (tmp_path / "base" / name).write_text("{}")
    (tmp_path / "base" / "generation_config.json").write_text("{}")
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    wrapped = adapt(model, **RESIZED[way])
    change(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    for name, text in TOKENIZER.items():
        (tmp_path / "adapter" / name).write_text(text)
    wanted = logits(wrapped, case)
    assert wanted.shape[-1] == GROWN
    if case is UNTIED and way in {
        "embedding",
        "head",
    }:  # PEFT saves the one that LoRA is on, and the other is lost
        with pytest.raises(Mismatch, match="different numbers of tokens"):
            lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        return
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_cleanly(case, tmp_path / "out")
    assert merged.config.vocab_size == GROWN
    assert relative_error(logits(merged, case), wanted) < 1e-5
    assert is_tied(merged) == (case is not UNTIED and way == "elsewhere")
    for name, text in TOKENIZER.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert (tmp_path / "out" / "generation_config.json").read_text() == "{}"
    assert lt.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").ok


def test_tokenizer_of_the_base_stays_where_nothing_was_resized(tmp_path: Path) -> None:
    model = UNTIED.build()
    model.save_pretrained(tmp_path / "base")
    adapt(model, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    (tmp_path / "base" / "tokenizer.json").write_text('{"whose": "base"}')
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"whose": "adapter"}')
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"whose": "base"}
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


def test_only_one_embedding_resized_is_an_error(tmp_path: Path) -> None:
    model = UNTIED.build()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    wrapped = adapt(model, target_modules=["q_proj"])
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    del stored["base_model.model.lm_head.weight"]
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(Mismatch, match="different numbers of tokens") as caught:
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert f"{GROWN}" in str(caught.value)
    assert f"{VOCABULARY}" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_only_one_of_tied_embeddings_resized_is_an_error(saved: str, tmp_path: Path) -> None:
    case = TIED["llama"][0]
    model = case.build()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    wrapped = adapt(model, target_modules=["q_proj"], modules_to_save=[saved])
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(Mismatch, match="different numbers of tokens") as caught:
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    sizes = {"embed_tokens": VOCABULARY, "lm_head": VOCABULARY} | {saved: GROWN}
    assert f"model.embed_tokens.weight {sizes['embed_tokens']}" in str(caught.value)
    assert f"lm_head.weight {sizes['lm_head']}" in str(caught.value)
    assert not (tmp_path / "out").exists()


# In memory: torch finds the tie in the storage.


@pytest.mark.parametrize("way", ["embedding", "head", "both", "tied lora", "tokens", "elsewhere"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "whisper"])
def test_state_dict_with_a_shared_storage(name: str, way: str, tmp_path: Path) -> None:
    case, embedding, head, other = TIED[name]
    model = case.build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    lora = {"target_modules": [other]} if way == "elsewhere" else targets(name, way)
    wrapped = adapt(case.build(), **lora)
    change(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = logits(wrapped, case)
    merged = lt.merge(model.state_dict(), tmp_path / "adapter").state_dict
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    stays = way in {"tied lora", "tokens", "elsewhere"}
    first, second = (next(k for k in merged if k.endswith(f"{end}.weight")) for end in (embedding, head))
    assert (merged[first].data_ptr() == merged[second].data_ptr()) == stays
    fresh = case.build(tie_word_embeddings=stays)
    fresh.load_state_dict(merged)
    assert relative_error(logits(fresh, case), wanted) < 1e-5
    assert lt.verify(model.state_dict(), tmp_path / "adapter", merged).ok


# T5 multiplies what goes into a tied output embedding; untied, it would not.


def make_t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("lora", [{"target_modules": ["shared", "q"]}, {"target_modules": ["lm_head", "q"]}])
def test_t5_is_refused(lora: dict[str, Any], tmp_path: Path) -> None:
    model = make_t5()
    model.save_pretrained(tmp_path / "base")
    adapt(model, **lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(Unsupported, match=r"shared\.weight") as caught:
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "keep it as an adapter" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_t5_without_its_embedding_is_merged(tmp_path: Path) -> None:
    model = make_t5()
    model.save_pretrained(tmp_path / "base")
    wrapped = adapt(model, target_modules=["q", "v", "wi", "wo"])
    wrapped.save_pretrained(tmp_path / "adapter")
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = wrapped(input_ids=tokens, decoder_input_ids=tokens).logits
        assert relative_error(merged(input_ids=tokens, decoder_input_ids=tokens).logits, wanted) < 1e-5


@pytest.mark.parametrize("says", [None, True])
def test_a_stored_head_is_believed(says: bool | None, tmp_path: Path) -> None:
    """Both weights on disk. Where the configuration calls them tied, transformers does not read the second."""
    case = TIED["llama"][0]
    model = case.build()
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    wrapped = adapt(model, **targets("llama", "head"))
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = logits(wrapped, case)
    configure(tmp_path / "base", "config.json", tie_word_embeddings=says)
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_cleanly(case, tmp_path / "out")
    assert relative_error(logits(merged, case), wanted) < 1e-5


def test_an_embedding_that_encoder_decoder_and_head_share_is_refused(tmp_path):
    """Untied, transformers would look for three tensors, and start the two that are not there at random."""
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(Unsupported, match="serves encoder, decoder and head at once"):
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
