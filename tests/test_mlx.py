"""MLX adapters: read, written, read again; MLX-LM's own loader and PEFT as oracles."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings

import loratools as lt
from loratools.errors import BadConfig, ShapeMismatch, Unsupported
from loratools.formats.mlx import read_mlx, write_mlx
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource
from loratools.tensors.pieces import slab
from tests.language_adapters import (
    PREFIX,
    WIDTH,
    Made,
    adapters,
    arrays,
    as_peft,
    assert_same,
    assert_same_factors,
    deltas,
    made,
    source,
)

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.formats.registry import Written

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def configuration(written: Written) -> dict[str, Any]:
    return json.loads(written.files["adapter_config.json"])


def again(written: Written) -> Adapter:
    return read_mlx("again", source(written), configuration(written))


def as_mlx_computes(written: Written) -> dict[str, np.ndarray]:
    """What MLX-LM's layers add: scale * (lora_a @ lora_b).T, and for experts scale * lora_b @ lora_a."""
    tensors = {key: value.astype(np.float64) for key, value in arrays(written).items()}
    scale = configuration(written)["lora_parameters"]["scale"]
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_a"):
            path = key.removesuffix(".lora_a")
            b = tensors[f"{path}.lora_b"]
            delta = b @ a if a.ndim == 3 else (a @ b) if path.endswith("embed_tokens") else (a @ b).T
            found[path] = scale * delta
    return found


# --- round trips -------------------------------------------------------------------------------------------


def test_the_smallest_adapter() -> None:
    down, up = np.array([[1, 2, 3]], np.float32), np.array([[4], [5]], np.float32)
    name = f"{PREFIX}model.layers.0.self_attn.q_proj"
    state = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 6, "base_model_name_or_path": "owner/base"}
    written = write_mlx(lt.load(state, config=config))
    found = arrays(written)
    assert found.keys() == {f"{Q}.lora_a", f"{Q}.lora_b"}
    assert found[f"{Q}.lora_a"].tolist() == [[1], [2], [3]]
    assert found[f"{Q}.lora_b"].tolist() == [[4, 5]]
    assert configuration(written) == {
        "fine_tune_type": "lora", "num_layers": -1, "model": "owner/base",
        "lora_parameters": {"rank": 1, "scale": 6.0, "alpha": 6.0, "dropout": 0.0, "keys": [Q]},
    }  # fmt: skip
    assert (written.weights, written.lost) == ("adapters.safetensors", {})


@given(adapters())
@settings(deadline=None, max_examples=60)
def test_there_and_back(drawn: tuple[Made, str, bool]) -> None:
    one, _, uniform = drawn
    written = write_mlx(one.adapter)
    assert written.lost == {}
    assert_same(as_mlx_computes(written), one.deltas)
    assert_same(deltas(again(written)), one.deltas)
    back = as_peft(again(written))
    assert_same(deltas(back), one.deltas)
    if uniform:
        assert_same_factors(one.adapter, back)


def test_a_power_of_two_is_folded_in_the_type_of_the_file() -> None:
    one = made({Q: 4, DOWN: 4}, {Q: 8, DOWN: 2}, kind=np.float16)
    one.adapter.modules[Q].load()
    found = arrays(write_mlx(one.adapter))
    factor = 2.0 if configuration(write_mlx(one.adapter))["lora_parameters"]["scale"] == 2.0 else 0.5
    scaled, kept = (DOWN, Q) if factor == 2.0 else (Q, DOWN)
    ratio = one.tensors[f"{PREFIX}{scaled}.lora_B.weight"].astype(np.float64) * (
        0.25 if scaled == DOWN else 4
    )
    assert found[f"{scaled}.lora_b"].dtype == np.float16
    assert np.array_equal(found[f"{scaled}.lora_b"].T, ratio)
    assert np.array_equal(found[f"{kept}.lora_b"].T, one.tensors[f"{PREFIX}{kept}.lora_B.weight"])


def test_other_ratios_are_rounded_to_float32_once() -> None:
    one = made({Q: 4, DOWN: 4, "lm_head": 4}, {Q: 8, DOWN: 3, "lm_head": 8}, kind=np.float16)
    found = arrays(write_mlx(one.adapter))[f"{DOWN}.lora_b"].T
    wanted = one.tensors[f"{PREFIX}{DOWN}.lora_B.weight"].astype(np.float64) * (3 / 8)
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted.astype(np.float32))


def test_smaller_ranks_are_padded() -> None:
    written = write_mlx(made({Q: 2, DOWN: 5}, {Q: 2, DOWN: 5}).adapter)
    found = arrays(written)
    assert {value.shape[1] for key, value in found.items() if key.endswith("lora_a")} == {5}
    assert not found[f"{Q}.lora_a"][:, 2:].any()
    assert not found[f"{Q}.lora_b"][2:].any()
    assert configuration(written)["lora_parameters"]["rank"] == 5


def test_a_scale_of_nothing() -> None:
    written = write_mlx(made({Q: 2}, 0).adapter)
    assert configuration(written)["lora_parameters"]["scale"] == 0.0
    mixed = write_mlx(made({Q: 2, DOWN: 2}, {Q: 0, DOWN: 4}).adapter)
    assert configuration(mixed)["lora_parameters"]["scale"] == 2.0
    assert not arrays(mixed)[f"{Q}.lora_b"].any()


# --- kinds -------------------------------------------------------------------------------------------------


def dora(*ranks: tuple[str, int]) -> Made:
    one = made(dict(ranks), use_dora=True)
    for path in one.deltas:
        out = one.deltas[path].shape[0]
        one.tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = np.arange(1, out + 1, dtype=np.float32)
    return one


def test_dora_keeps_its_magnitude() -> None:
    one = dora((Q, 4), (DOWN, 4))
    written = write_mlx(one.adapter)
    assert configuration(written)["fine_tune_type"] == "dora"
    assert arrays(written)[f"{Q}.m"].tolist() == list(range(1, WIDTH + 1))
    assert_same_factors(one.adapter, as_peft(again(written)))
    assert {module.kind for module in again(written).modules.values()} == {"dora"}


def test_dora_beside_lora_has_no_place() -> None:
    one = dora((Q, 4), (DOWN, 4))
    del one.tensors[f"{PREFIX}{DOWN}.lora_magnitude_vector"]
    adapter = replace(one.adapter, refusal=None)
    with pytest.raises(Unsupported, match=re.escape(DOWN)):
        write_mlx(adapter)


def experts(owner: str, parts: tuple[str, ...], count: int = 3, **changes: Any) -> Made:
    names = [f"{owner}.experts.{index}.{part}" for part in parts for index in range(count)]
    return made(dict.fromkeys(names, 3), shapes=dict.fromkeys(names, (6, 4)), **changes)


@pytest.mark.parametrize(
    ("owner", "parts"),
    [
        ("model.layers.0.block_sparse_moe", ("w1", "w2", "w3")),
        ("model.layers.0.mlp", ("gate_proj", "down_proj", "up_proj")),
    ],
)
def test_experts_are_stacked_and_not_transposed(owner: str, parts: tuple[str, ...]) -> None:
    one = experts(owner, parts)
    written = write_mlx(one.adapter)
    found = arrays(written)
    assert found.keys() == {
        f"{owner}.switch_mlp.{part}.lora_{x}" for part in ("gate_proj", "down_proj", "up_proj") for x in "ab"
    }
    assert found[f"{owner}.switch_mlp.down_proj.lora_a"].shape == (3, 3, 4)
    assert found[f"{owner}.switch_mlp.down_proj.lora_b"].shape == (3, 6, 3)
    assert np.array_equal(
        found[f"{owner}.switch_mlp.down_proj.lora_a"][2],
        one.tensors[f"{PREFIX}{owner}.experts.2.{parts[1]}.lora_A.weight"],
    )
    assert_same(deltas(again(written)), one.deltas)
    assert_same_factors(one.adapter, as_peft(again(written)))


def test_experts_on_the_disk(tmp_path: Path) -> None:
    """Each one's factors are copied out of the stack, from file to file."""
    one = experts("model.layers.0.mlp", ("up_proj",), kind=np.float16)
    one.adapter.save(tmp_path / "mlx", format="mlx", sync=False)
    stack = lt.load(tmp_path / "mlx")
    extents = {
        ref.source.extent(ref.name) for module in stack.modules.values() for ref in module.tensors.values()
    }
    assert len(extents) == 6
    assert None not in extents
    stack.save(tmp_path / "peft", format="peft", sync=False)
    assert_same_factors(one.adapter, lt.load(tmp_path / "peft"))


def test_experts_of_several_ranks_types_and_scales() -> None:
    owner = "model.layers.0.mlp"
    names = [f"{owner}.experts.{index}.up_proj" for index in range(3)]
    one = made(
        dict(zip(names, (2, 3, 1), strict=True)), dict(zip(names, (2, 7, 3), strict=True)),
        shapes=dict.fromkeys(names, (6, 4)),
    )  # fmt: skip
    half = f"{PREFIX}{names[1]}.lora_A.weight"
    one.tensors[half] = one.tensors[half].astype(np.float16)
    wanted = deltas(one.adapter)
    written = write_mlx(one.adapter)
    stacked = as_mlx_computes(written)[f"{owner}.switch_mlp.up_proj"]
    assert_same(dict(zip(names, stacked, strict=True)), wanted)
    assert_same(deltas(again(written)), wanted)


def test_a_missing_expert_is_named() -> None:
    one = experts("model.layers.0.mlp", ("up_proj",))
    one.tensors = {key: value for key, value in one.tensors.items() if "experts.1." not in key}
    one.tensors |= made({Q: 2}).tensors
    lost = write_mlx(one.adapter).lost
    assert lost.keys() == {f"model.layers.0.mlp.experts.{index}.up_proj" for index in (0, 2)}
    assert "expert 1" in lost["model.layers.0.mlp.experts.0.up_proj"]


def test_experts_as_they_were_stored_once() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 5)), rng.standard_normal((3, 4, 2))
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{path}.lora_a": a, f"{path}.lora_b": b}
    found = read_mlx("old", MemorySource(tensors), {"lora_parameters": {"scale": 2}})
    wanted = {f"model.layers.0.mlp.experts.{i}.up_proj": 2 * b[i] @ a.reshape(3, 2, 5)[i] for i in range(3)}
    assert_same(deltas(found), wanted, 1e-12)


def test_a_slab_reads_its_own_elements_only() -> None:
    class Counting(MemorySource):
        read_elements = 0

        def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Any:
            self.read_elements += (self.specs[name].count if stop is None else stop) - start
            return super().read_bytes(name, start, stop)

    counting = Counting({"w": np.arange(24, dtype=np.float32).reshape(4, 3, 2)})
    piece = slab(TensorRef(counting, "w"), 2, (3, 2))
    assert piece.load().tolist() == [[12, 13], [14, 15], [16, 17]]
    assert piece.source.read("w", 2, 4).tolist() == [14, 15]
    assert counting.read_elements == 8
    with pytest.raises(IndexError):
        piece.source.read("w", 0, 7)
    with pytest.raises(ShapeMismatch):
        slab(TensorRef(counting, "w"), 4, (3, 2))


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("model.language_model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"),
        ("language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"),
        ("language_model.lm_head", "language_model.lm_head"),
    ],
)
def test_names_of_larger_and_smaller_models(given: str, written: str) -> None:
    one = made({given: 2}, shapes={given: (4, 4)})
    assert arrays(write_mlx(one.adapter)).keys() == {f"{written}.lora_a", f"{written}.lora_b"}


def test_names_that_mlx_may_not_have_are_lost() -> None:
    stranger = "transformer.h.0.attn.c_attn"
    one = made({stranger: 2, Q: 2}, shapes={stranger: (4, 4)})
    assert write_mlx(one.adapter).lost.keys() == {stranger}
    with pytest.raises(Unsupported, match="none of its modules"):
        write_mlx(made({stranger: 2}, shapes={stranger: (4, 4)}).adapter)


# --- what is left out --------------------------------------------------------------------------------------


def test_what_has_no_place_is_named() -> None:
    one = made({Q: 2}, lora_bias=True, modules_to_save=["score"])
    one.tensors[f"{PREFIX}{Q}.lora_B.bias"] = np.ones(WIDTH, np.float32)
    one.tensors[f"{PREFIX}score.weight"] = np.ones((2, 2), np.float32)
    lost = write_mlx(one.adapter).lost
    assert lost.keys() == {f"{PREFIX}{Q}.lora_B.bias", f"{PREFIX}score.weight"}
    assert "bias" in lost[f"{PREFIX}{Q}.lora_B.bias"]
    with pytest.raises(Unsupported, match=r"score\.weight"):
        one.adapter.save("never-written", format="mlx")


def test_other_kinds_are_named() -> None:
    state = {
        f"{PREFIX}{Q}.hada_{name}": np.ones((4, 4), np.float32) for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    adapter = lt.load(state, config={"peft_type": "LOHA", "r": 4, "alpha": 4})
    with pytest.raises(Unsupported) as raised:
        write_mlx(adapter)
    assert "loha" in str(raised.value.hint)


def test_adalora_becomes_a_plain_pair() -> None:
    rng = np.random.default_rng(3)
    down, up, singular = (rng.standard_normal(shape, np.float32) for shape in ((3, 6), (5, 3), (3, 1)))
    state = {f"{PREFIX}{Q}.lora_A": down, f"{PREFIX}{Q}.lora_B": up, f"{PREFIX}{Q}.lora_E": singular}
    adapter = lt.load(state, config={"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 6, "r": 3})
    wanted = 6 / (3 + 1e-5) * (up.astype(np.float64) @ (down * singular))
    assert_same(as_mlx_computes(write_mlx(adapter)), {Q: wanted})


def test_an_initialisation_that_changed_the_base_is_named() -> None:
    adapter = made({Q: 2}, init_lora_weights="pissa").adapter
    with pytest.raises(Unsupported) as raised:
        write_mlx(adapter)
    assert "normalize" in str(raised.value.hint)


# --- reading -----------------------------------------------------------------------------------------------

PLAIN = {"lora_parameters": {"rank": 2, "scale": 4.0}}


def pair(path: str = Q, rank: int = 2, out: int = 4, into: int = 3) -> dict[str, np.ndarray]:
    a, b = np.ones((into, rank), np.float32), np.ones((rank, out), np.float32)
    return {f"{path}.lora_a": a, f"{path}.lora_b": b}


def read(tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None, **options: Any) -> Adapter:
    return read_mlx("it", MemorySource(tensors), PLAIN if config is None else config, **options)


def test_the_scale_is_final() -> None:
    module = read(pair()).modules[Q]
    assert (module.rank, module.alpha, module.scaling, module.shape) == (2, 8.0, 4.0, (4, 3))


def test_an_alpha_that_mlx_ignores_is_a_warning() -> None:
    adapter = read(pair(), {"lora_layers": 2, "lora_parameters": {"rank": 2, "alpha": 16, "scale": 10.0}})
    assert adapter.modules[Q].scaling == 10.0
    assert "alpha 16" in adapter.warnings[0]
    assert not read(pair(), {"lora_parameters": {"rank": 2, "alpha": 20, "scale": 10.0}}).warnings


def test_without_a_scale_the_alpha_is_asked_for() -> None:
    adapter = read(pair(), {})
    assert adapter.modules[Q].scaling is None
    with pytest.raises(Unsupported, match="nothing says its scale"):
        adapter.require_computable()
    given = read(pair(), {}, alpha=8.0)
    assert (given.modules[Q].scaling, given.refusal) == (4.0, None)
    vision = read(pair(), {"rank": 2, "alpha": 8})
    assert "mlx-vlm" in str(vision.refusal)


def test_an_alpha_that_contradicts_the_scale_is_refused() -> None:
    with pytest.raises(BadConfig, match=re.escape(Q)):
        read(pair(), alpha=9.0)
    assert read(pair(), alpha=8.0).modules[Q].scaling == 4.0


@pytest.mark.parametrize("scale", [math.nan, math.inf, "4", True, [4]])
def test_a_scale_that_is_no_number(scale: Any) -> None:
    with pytest.raises(BadConfig, match=r"lora_parameters\.scale"):
        read(pair(), {"lora_parameters": {"scale": scale}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{Q}.lora_b": None}, f"{Q}.lora_a without"),
        ({f"{Q}.lora_b": np.ones((3, 4))}, "different ranks"),
        ({f"{Q}.lora_b": np.ones((0, 4))}, "empty"),
        ({f"{Q}.lora_b": np.ones(4)}, "expected"),
        ({f"{Q}.m": np.ones(5)}, "should have 4 values"),
        ({f"{Q}.lora_b": np.ones((2, 2, 4))}, "called in Hugging Face"),
    ],
)
def test_broken_modules_are_named(change: dict[str, Any], said: str) -> None:
    tensors = {key: value for key, value in (pair() | change).items() if value is not None}
    adapter = read(tensors | pair(DOWN))
    assert adapter.modules.keys() == {DOWN}
    with pytest.raises(Unsupported, match=re.escape(said)):
        adapter.require_computable()
    assert all(adapter.extras[key].role == "unclaimed" for key in tensors)


def test_an_unknown_suffix_is_kept_and_unclaimed() -> None:
    adapter = read(pair() | {f"{Q}.lora_a_scales": np.ones(3)})
    assert adapter.extras[f"{Q}.lora_a_scales"].role == "unclaimed"
    assert write_mlx(adapter).lost.keys() == {f"{Q}.lora_a_scales"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"fine_tune_type": "full"}, "full fine-tune"),
        ({"fine_tune_type": "prompt"}, "prompt"),
        ({**PLAIN, "fine_tune_type": "dora"}, "has no m"),
        ({**PLAIN, "use_dora": True}, "has no m"),
    ],
)
def test_what_is_no_lora(config: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        read(pair(), config).require_computable()


def test_the_dora_of_an_embedding_is_refused() -> None:
    path = "model.embed_tokens"
    adapter = read(
        pair(path, into=7) | {f"{path}.m": np.ones(7, np.float32)}, {**PLAIN, "fine_tune_type": "dora"}
    )
    with pytest.raises(Unsupported, match="embedding"):
        adapter.require_computable()


def test_data_that_is_not_aligned(tmp_path: Path) -> None:
    """MLX pads no header, so that numbers begin at any byte."""
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((3, 2), np.float32), rng.standard_normal((2, 4), np.float32)
    entries = {
        f"{Q}.lora_a": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
        f"{Q}.lora_b": {"dtype": "F32", "shape": [2, 4], "data_offsets": [24, 56]},
    }
    text = json.dumps(entries).encode()
    text += b" " * (3 - len(text) % 4)
    assert len(text) % 2
    (tmp_path / "adapters.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + a.tobytes() + b.tobytes()
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    adapter = lt.load(tmp_path)
    assert adapter.format == "mlx"
    assert_same(deltas(adapter), {Q: 4.0 * (a.astype(np.float64) @ b).T})


# --- oracles -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_peft_loads_what_was_mlx(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    lora = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, use_dora=True, rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 3},
        target_modules=["q_proj", "k_proj", "down_proj"],
    )  # fmt: skip
    model = get_peft_model(base, lora)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.uniform_(0.1, 1.0)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    lt.load(tmp_path / "peft").save(tmp_path / "mlx", format="mlx", sync=False)
    lt.load(tmp_path / "mlx").save(tmp_path / "back", format="peft", sync=False)

    def merged(folder: Path) -> dict[str, Any]:
        fresh = transformers.LlamaForCausalLM(config)
        fresh.load_state_dict(state)
        return PeftModel.from_pretrained(fresh, folder).merge_and_unload().state_dict()

    wanted, found = merged(tmp_path / "peft"), merged(tmp_path / "back")
    assert any(not torch.equal(wanted[name], state[name]) for name in state)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama", "dora", "mixtral"])
def test_mlx_itself_loads_it(kind: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    tuner = pytest.importorskip("mlx_lm.tuner.utils", reason="MLX-LM is not installed")
    from importlib import import_module

    from mlx.utils import tree_flatten, tree_unflatten

    family = "mixtral" if kind == "mixtral" else "llama"
    fields = {
        "model_type": family, "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "num_local_experts": 3,
        "num_experts_per_tok": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    module = import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict(fields))
    before = {key: np.array(value, np.float64) for key, value in tree_flatten(model.parameters())}
    paths = {f"model.layers.{i}.self_attn.{name}": 2 + i for i in (1, 2) for name in ("q_proj", "k_proj")}
    shapes = {}
    if kind == "mixtral":
        names = [f"model.layers.1.block_sparse_moe.experts.{i}.w1" for i in range(3)]
        paths, shapes = paths | dict.fromkeys(names, 2), dict.fromkeys(names, (24, 16))
    if kind == "llama":
        paths["model.embed_tokens"] = 3
    one = made(paths, 5, shapes=shapes, use_rslora=True) if kind != "dora" else dora(*paths.items())
    one.adapter.save(tmp_path / "mlx", format="mlx", sync=False)
    tuner.load_adapters(model, str(tmp_path / "mlx"))
    fused = [(name, layer.fuse()) for name, layer in model.named_modules() if hasattr(layer, "fuse")]
    model.update_modules(tree_unflatten(fused))
    after = {key: np.array(value, np.float64) for key, value in tree_flatten(model.parameters())}
    mx.eval(model.parameters())
    wanted = dict(before)
    for path, delta in one.deltas.items():
        expert = re.fullmatch(r"(.*)\.experts\.(\d+)\.w1", path)
        if expert:
            name = f"{expert[1]}.switch_mlp.gate_proj.weight"
            wanted[name] = wanted[name].copy()
            wanted[name][int(expert[2])] += delta
            continue
        total = before[f"{path}.weight"] + delta
        if kind == "dora":
            magnitude = one.tensors[f"{PREFIX}{path}.lora_magnitude_vector"]
            total *= (magnitude / np.linalg.norm(total, axis=1))[:, None]
        wanted[f"{path}.weight"] = total
    assert_same(after, wanted, 1e-6)


# --- adapters of others --------------------------------------------------------------------------------------

CORPUS = os.environ.get("LORATOOLS_CORPUS")
NEEDS_CORPUS = pytest.mark.skipif(not CORPUS, reason="LORATOOLS_CORPUS names no folder of adapters")


@NEEDS_CORPUS
@pytest.mark.parametrize(
    ("path", "scale", "count"),
    [
        ("ml-explore__mlx-lm/test_dpo_adapters", 20.0, 4),
        ("ollama__ollama/convert/testdata/adapters/discollama", 2.0, 4),
        ("wyek1n__MLX-CLI/adapters/0000200_adapters.safetensors", 10.0, 8),
    ],
)
def test_adapters_of_others(path: str, scale: float, count: int) -> None:
    from safetensors.numpy import load_file

    place = Path(str(CORPUS)) / "adapters" / path
    adapter = lt.load(place)
    assert (adapter.format, adapter.refusal, adapter.extras) == ("mlx", None, {})
    assert len(adapter.modules) == count
    tensors = load_file(place if place.is_file() else place / "adapters.safetensors")
    wanted = {
        key.removesuffix(".lora_a"): scale
        * (a.astype(np.float64) @ tensors[key.replace("lora_a", "lora_b")].astype(np.float64)).T
        for key, a in tensors.items()
        if key.endswith(".lora_a")
    }
    assert_same(deltas(adapter), wanted)
    back = as_peft(adapter)
    assert_same_factors(adapter, back)
    assert arrays(write_mlx(back)).keys() == tensors.keys()
    for key, value in arrays(write_mlx(back)).items():
        assert np.array_equal(value, tensors[key])


# --- through the verbs ---------------------------------------------------------------------------------------


def test_converted_and_back(tmp_path: Path) -> None:
    one = dora((Q, 3), (DOWN, 2))
    there = lt.convert(one.adapter, tmp_path / "mlx", to="mlx", sync=False)
    assert there.relative <= 1e-7
    back = lt.convert(tmp_path / "mlx", tmp_path / "peft", to="peft", sync=False)
    assert back.identical == 2
    assert {module.kind for module in lt.load(tmp_path / "peft").modules.values()} == {"dora"}


TIED = {"model_type": "qwen2", "tie_word_embeddings": True}


@pytest.mark.parametrize(
    "config",
    [TIED, {"model_type": "gemma2"}, {"model_type": "x", "text_config": {"tie_word_embeddings": True}}],
)
def test_the_head_of_a_tied_model_is_lost(config: dict[str, Any]) -> None:
    written = write_mlx(made({DOWN: 2, "lm_head": 2}).adapter, base_config=config)
    assert written.lost.keys() == {"lm_head"}
    assert "tied" in written.lost["lm_head"]
    assert {key.rpartition(".")[0] for key in written.tensors} == {DOWN}
    assert written.warnings == ()


def test_an_embedding_of_a_tied_model_is_a_warning() -> None:
    adapter = made({DOWN: 2, "model.embed_tokens": 2}).adapter
    [warning] = write_mlx(adapter, base_config=TIED).warnings
    assert warning.startswith("model.embed_tokens: MLX adds it to the output")
    assert write_mlx(adapter, base_config={**TIED, "tie_word_embeddings": False}).warnings == ()
    assert write_mlx(adapter, base_config=TIED).lost == {}


def test_without_a_base_nobody_knows_of_ties() -> None:
    adapter = made({DOWN: 2, "model.embed_tokens": 2, "lm_head": 2}).adapter
    written = write_mlx(adapter)
    assert written.lost == {}
    assert [warning.partition(":")[0] for warning in written.warnings] == ["model.embed_tokens", "lm_head"]
    assert all("if the base's embeddings are tied" in warning for warning in written.warnings)
    assert lt.convert(adapter, None, to="mlx").warnings == written.warnings
    assert write_mlx(made({DOWN: 2}).adapter).warnings == ()


def test_validate_names_what_is_wrong(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = pair() | {
        f"{DOWN}.lora_a": np.ones((3, 2), np.float32),
        f"{Q}.lora_a_scales": np.ones(3, np.float32),
    }
    save_file(tensors, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    report = lt.validate(tmp_path)
    assert not report.ok
    assert {f"{DOWN}.lora_a", f"{Q}.lora_a_scales"} <= {finding.where for finding in report.findings}
