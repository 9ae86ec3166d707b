"""loralib's adapters, and the fused layout of PEFT before 0.3: against the grouped convolution that defines them."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.errors import BadConfig, Unsupported
from loratools.formats.loralib import read_loralib, unfused
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource
from loratools.verbs.saving import write
from tests.language_adapters import arrays, as_peft, assert_same, assert_same_factors, deltas

if TYPE_CHECKING:
    from loratools.adapter import Adapter

QKV, PLAIN = "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"


def grouped(down: np.ndarray, up: np.ndarray, enabled: list[bool]) -> np.ndarray:
    """What MergedLinear adds before it is scaled: a convolution in groups, its rows at the adapted blocks."""
    torch = pytest.importorskip("torch")
    made = torch.nn.functional.conv1d(
        torch.from_numpy(down)[None], torch.from_numpy(up.reshape(*up.shape[:2], 1)), groups=sum(enabled)
    )[0].numpy()
    height = made.shape[0] // sum(enabled)
    whole = np.zeros((height * len(enabled), down.shape[1]))
    for block, place in enumerate(index for index, on in enumerate(enabled) if on):
        whole[place * height : (place + 1) * height] = made[block * height : (block + 1) * height]
    return whole


def read(tensors: dict[str, np.ndarray], **options: Any) -> Adapter:
    return read_loralib("it", MemorySource(tensors), **options)


def plain(rank: int = 2, path: str = PLAIN) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{path}.lora_A": rng.standard_normal((rank, 5)),
        f"{path}.lora_B": rng.standard_normal((4, rank)),
    }


enabled_blocks = st.lists(st.booleans(), min_size=2, max_size=4).filter(any)


@given(enabled_blocks, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_merged_linear(enabled: list[bool], rank: int, height: int, into: int, seed: int) -> None:
    rng, count = np.random.default_rng(seed), sum(enabled)
    down, up = rng.standard_normal((count * rank, into)), rng.standard_normal((height * count, rank))
    wanted = {QKV: 3 / rank * grouped(down, up, enabled)}
    adapter = read({f"{QKV}.lora_A": down, f"{QKV}.lora_B": up}, alpha=3, enable_lora=enabled)
    module = adapter.modules[QKV]
    assert (module.rank, module.alpha, module.scaling) == (count * rank, 3 * count, 3 / rank)
    assert_same(deltas(adapter), wanted, 1e-12)
    assert_same_factors(adapter, as_peft(adapter))

    old = {
        "base_model.model." + QKV + ".lora_A.weight": down,
        "base_model.model." + QKV + ".lora_B.weight": up[..., None],
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "enable_lora": enabled, "fan_in_fan_out": True,
              "merge_weights": False, "target_modules": ["c_attn"]}  # fmt: skip
    legacy = lt.load(old, config=config)
    legacy.require_computable()
    assert_same(deltas(legacy), wanted, 1e-12)
    assert_same_factors(adapter, as_peft(legacy))
    written = json.loads(write(legacy, "peft").files["adapter_config.json"])
    assert not {"enable_lora", "merge_weights"} & written.keys()
    assert written["r"] == count * rank


def test_rows_and_columns_by_hand() -> None:
    up = TensorRef(MemorySource({"up": np.array([[1], [2], [3], [4]], np.float32)}), "up")
    assert unfused(up, [True, False, True]).load().tolist() == [
        [1, 0],
        [2, 0],
        [0, 0],
        [0, 0],
        [0, 3],
        [0, 4],
    ]


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True]])
def test_loralib_itself(enabled: list[bool]) -> None:
    loralib = pytest.importorskip("loralib", reason="loralib is not installed")
    import torch

    torch.manual_seed(0)
    layer = loralib.MergedLinear(6, 12, r=2, lora_alpha=3, enable_lora=enabled, bias=False)
    torch.nn.init.normal_(layer.lora_B)
    state = {f"{QKV}.{name}": value for name, value in loralib.lora_state_dict(layer).items()}
    inputs = torch.randn(5, 6)
    with torch.no_grad():
        wanted = layer(inputs) - torch.nn.functional.linear(inputs, layer.weight)
    delta = deltas(read_loralib("it", MemorySource(state), alpha=3, enable_lora=enabled))[QKV]
    np.testing.assert_allclose(inputs.numpy() @ delta.T, wanted.numpy(), atol=1e-6)


def test_plain_layers_and_embeddings() -> None:
    rng = np.random.default_rng(1)
    embedding = {"wte.lora_A": rng.standard_normal((2, 9)), "wte.lora_B": rng.standard_normal((5, 2))}
    tensors = plain() | embedding
    adapter = read(tensors, alpha=4)
    wanted = {
        PLAIN: 2 * tensors[f"{PLAIN}.lora_B"] @ tensors[f"{PLAIN}.lora_A"],
        "wte": (2 * embedding["wte.lora_B"] @ embedding["wte.lora_A"]).T,
    }
    assert_same(deltas(adapter), wanted, 1e-12)
    assert adapter.refusal is None
    assert_same_factors(adapter, as_peft(adapter))


def test_without_an_alpha() -> None:
    adapter = read(plain())
    assert adapter.modules[PLAIN].scaling is None
    with pytest.raises(Unsupported) as raised:
        adapter.require_computable()
    assert "--alpha" in str(raised.value.hint)
    with pytest.raises(BadConfig):
        read(plain(), alpha=math.nan)


def fused(rank: int = 2, count: int = 2, path: str = QKV) -> dict[str, np.ndarray]:
    return {f"{path}.lora_A": np.ones((rank * count, 5)), f"{path}.lora_B": np.ones((4 * count, rank))}


def test_without_the_blocks() -> None:
    with pytest.raises(Unsupported, match=re.escape(QKV)) as raised:
        read(fused(), alpha=1).require_computable()
    assert "--enable-lora" in str(raised.value.hint)


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(BadConfig, match=rf"{re.escape(QKV)} adapts 2 blocks.*1,1,1"):
        read(fused(), alpha=1, enable_lora=[True, True, True])


def test_plain_layers_beside_fused_ones() -> None:
    adapter = read(fused() | plain(), alpha=1, enable_lora=[True, False, True])
    assert (adapter.modules[QKV].shape, adapter.modules[PLAIN].shape) == ((12, 5), (4, 5))


def test_one_block_alone() -> None:
    """Its factors look like those of a plain layer: only where all layers have one name is it clear what they are."""
    enabled = [False, False, True]
    adapter = read(fused(count=1), alpha=1, enable_lora=enabled)
    assert adapter.modules[QKV].shape == (12, 5)
    assert not deltas(adapter)[QKV][:8].any()
    with pytest.raises(BadConfig, match="c_attn, c_fc"):
        read(fused(count=1) | plain(), alpha=1, enable_lora=enabled)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{PLAIN}.lora_B": None}, f"{PLAIN}.lora_A without"),
        ({f"{PLAIN}.lora_B": np.ones((4, 3))}, "different ranks"),
        ({f"{PLAIN}.lora_B": np.ones((4, 0))}, "expected"),
        ({f"{PLAIN}.lora_B": np.ones(4)}, "expected"),
    ],
)
def test_broken_modules_are_named(change: dict[str, Any], said: str) -> None:
    tensors = {key: value for key, value in (plain() | change).items() if value is not None}
    adapter = read(tensors, alpha=1)
    with pytest.raises(Unsupported, match=re.escape(said)):
        adapter.require_computable()
    assert all(adapter.extras[key].role == "unclaimed" for key in tensors)


def test_what_was_trained_beside_them_goes_along() -> None:
    more = {
        "classifier.weight": np.ones((2, 4)), "classifier.bias": np.ones(2), f"{PLAIN}.bias": np.ones(4),
        "step": np.ones(1),
    }  # fmt: skip
    adapter = read(plain() | more, alpha=1)
    assert {key: (extra.role, extra.reason) for key, extra in adapter.extras.items()} == {
        "classifier.weight": ("replacement", "modules_to_save"),
        "classifier.bias": ("replacement", "modules_to_save"),
        f"{PLAIN}.bias": ("replacement", "bias=lora_only"),
        "step": ("unclaimed", "neither a factor nor a layer's weight"),
    }


@pytest.mark.parametrize(
    ("down", "up"), [((3, 5), (8, 2, 1)), ((4, 5), (7, 2, 1)), ((4, 5), (8, 2, 3)), ((2, 5), (8, 2, 1))]
)
def test_a_fused_layout_that_cannot_be(down: tuple[int, ...], up: tuple[int, ...]) -> None:
    name = f"base_model.model.{QKV}"
    tensors = {f"{name}.lora_A.weight": np.ones(down), f"{name}.lora_B.weight": np.ones(up)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "enable_lora": [True, False, True]}
    with pytest.raises(Unsupported, match=rf"{re.escape(QKV)}.*2 blocks"):
        lt.load(tensors, config=config).require_computable()


# --- adapters of others --------------------------------------------------------------------------------------

CORPUS = os.environ.get("LORATOOLS_CORPUS")
NEEDS_CORPUS = pytest.mark.skipif(not CORPUS, reason="LORATOOLS_CORPUS names no folder of adapters")


@NEEDS_CORPUS
def test_the_fused_bloom() -> None:
    torch = pytest.importorskip("torch")
    folder = Path(str(CORPUS)) / "adapters/wujindou__BLOOM-LORA"
    adapter = lt.load(folder, allow_pickle=True)
    adapter.require_computable()
    assert len(adapter.modules) == 24
    state = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    path = "transformer.h.23.self_attention.query_key_value"
    down, up = (state[f"base_model.model.{path}.lora_{x}.weight"].double().numpy() for x in "AB")
    assert_same({path: deltas(adapter)[path]}, {path: 2 * grouped(down, up, [True, False, True])})
    assert_same_factors(adapter, as_peft(adapter))
    assert arrays(write(adapter, "peft"))[f"base_model.model.{path}.lora_B.weight"].shape == (3072, 16)


@NEEDS_CORPUS
def test_microsofts_roberta() -> None:
    torch = pytest.importorskip("torch")
    file = Path(str(CORPUS)) / "adapters/microsoft__LoRA/examples/NLU/roberta_base_lora_mnli.bin"
    adapter = lt.load(file, allow_pickle=True, alpha=16)
    assert (adapter.format, adapter.refusal, len(adapter.modules)) == ("loralib", None, 24)
    assert {extra.reason for extra in adapter.extras.values()} == {"modules_to_save"}
    state = torch.load(file, map_location="cpu", weights_only=True)
    path = "roberta.encoder.layer.3.attention.self.value"
    down, up = (state[f"{path}.lora_{x}"].double().numpy() for x in "AB")
    assert_same({path: deltas(adapter)[path]}, {path: 2 * up @ down})
    assert_same_factors(adapter, as_peft(adapter))


@NEEDS_CORPUS
def test_a_prefix_is_named_for_what_it_is() -> None:
    folder = Path(str(CORPUS)) / "adapters/chatchat-space__Langchain-Chatchat"
    with pytest.raises(Unsupported, match="PREFIX_TUNING"):
        lt.load(folder, allow_pickle=True).require_computable()


def test_a_fused_weight_is_reported_by_its_blocks(tmp_path) -> None:
    """As the layout stores them: each block has the rank and the alpha of its own."""
    rng = np.random.default_rng(0)
    source = {
        f"{QKV}.lora_A": rng.standard_normal((6, 5)).astype("f4"),
        f"{QKV}.lora_B": rng.standard_normal((8, 3)).astype("f4"),
    }
    report = lt.inspect(source, alpha=6, enable_lora=(True, False, True))
    (module,) = report.modules
    assert (module.rank, module.alpha, module.scaling, module.blocks) == (3, 6, 2, 2)
    assert module.shape == (12, 5)
    assert (report.rank.min, report.alpha.max) == (3, 6)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "enable_lora": [True, False, True]}
    prefixed = {f"base_model.model.{key}.weight": value for key, value in source.items()}
    (module,) = lt.inspect(prefixed, config=config).modules
    assert (module.rank, module.alpha, module.scaling, module.blocks) == (3, 6, 2, 2)
