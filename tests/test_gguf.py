"""GGUF adapters: what the gguf package reads of ours, what llama.cpp would compute with it, and files made to harm."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import loratools as lt
from loratools.dtypes import DTYPES
from loratools.errors import (
    BadConfig,
    CorruptFile,
    Mismatch,
    NonFinite,
    ShapeMismatch,
    UnknownFormat,
    Unsupported,
)
from loratools.formats import gguf as ours
from loratools.formats.gguf import MODELS, read_gguf, read_gguf_bytes, with_base, write_gguf
from loratools.tensors.gguf import GgufFile
from tests.language_adapters import (
    CONFIG,
    HEADS,
    KEY_HEADS,
    PREFIX,
    VOCABULARY,
    WIDTH,
    Made,
    adapters,
    as_peft,
    assert_same,
    assert_same_factors,
    deltas,
    made,
)

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

if TYPE_CHECKING:
    from pathlib import Path

    from loratools.adapter import Adapter
    from loratools.formats.registry import Written

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"
LLAMA = {**CONFIG, "model_type": "llama"}
QWEN = {**CONFIG, "model_type": "qwen2"}
# The names llama.cpp's documentation and its models use.
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def put(folder: Path, written: Written) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / written.weights
    path.write_bytes(written.files[written.weights])
    return path


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's rule for the rows of q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def ggml_name(path: str) -> str:
    if path == "model.embed_tokens":
        return "token_embd"
    block, module = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path).groups()  # type: ignore[union-attr]
    return f"blk.{block}.{NAMES[module]}"


def as_llama_cpp_computes(path: Path) -> dict[str, np.ndarray]:
    """What the runtime adds to each tensor: alpha over the rank of lora_b (1 for an alpha of 0), times B A."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    values = {tensor.name: _values(tensor) for tensor in reader.tensors}
    found = {}
    for name, a in values.items():
        if name.endswith(".lora_a"):
            b = values[name.replace(".lora_a", ".lora_b")]
            scale = alpha / b.shape[-1] if alpha else 1.0
            stem = name.removesuffix(".weight.lora_a")
            found[stem] = scale * ((b @ a.T).T if stem == "token_embd" else b @ a)
    return found


def _values(tensor: Any) -> np.ndarray:
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float64)
    return np.asarray(tensor.data, np.float64)


def in_ggml_order(one: Made, *, interleaved: bool) -> dict[str, np.ndarray]:
    heads = {"q_proj": HEADS, "k_proj": KEY_HEADS} if interleaved else {}
    return {
        ggml_name(path): permute(delta, heads[last]) if (last := path.rpartition(".")[2]) in heads else delta
        for path, delta in one.deltas.items()
    }


# --- round trips -------------------------------------------------------------------------------------------


@given(drawn=adapters(), config=st.sampled_from([LLAMA, QWEN]))
@settings(deadline=None, max_examples=60)
def test_there_and_back(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[Made, str, bool], config: dict[str, Any]
) -> None:
    one, kind, uniform = drawn
    folder = tmp_path_factory.mktemp("gguf")
    path = put(folder, write_gguf(one.adapter, base_config=config))
    computed = as_llama_cpp_computes(path)
    assert_same(computed, in_ggml_order(one, interleaved=config is LLAMA))
    back = read_gguf("back", path)
    assert back.refusal is None
    assert_same(deltas(back), one.deltas)
    assert_same(deltas(as_peft(back)), one.deltas)
    if uniform and any(one.config["alpha_pattern"].values()):
        same = write_gguf(one.adapter, base_config=config, dtype=DTYPES[kind])
        assert_same_factors(one.adapter, as_peft(read_gguf("same", put(folder, same))), 1e-7)


def test_what_is_written_key_by_key(tmp_path: Path) -> None:
    one = made({Q: 4, "model.embed_tokens": 4}, 6, base_model_name_or_path="owner/base")
    reader = gguf.GGUFReader(put(tmp_path, write_gguf(one.adapter, base_config=LLAMA)))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields.pop("loratools") == lt.__version__
    assert fields == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0,
        "general.quantization_version": 2, "general.base_model.count": 1, "general.base_model.0.name": "owner/base",
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KEY_HEADS,
    }  # fmt: skip
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    shapes = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert shapes == {
        "blk.0.attn_q.weight.lora_a": ("F32", [WIDTH, 4]), "blk.0.attn_q.weight.lora_b": ("F32", [4, WIDTH]),
        "token_embd.weight.lora_a": ("F32", [4, VOCABULARY]), "token_embd.weight.lora_b": ("F32", [4, WIDTH]),
    }  # fmt: skip
    values = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(values["blk.0.attn_q.weight.lora_a"], one.tensors[f"{PREFIX}{Q}.lora_A.weight"])
    b = one.tensors[f"{PREFIX}{Q}.lora_B.weight"]
    assert np.array_equal(values["blk.0.attn_q.weight.lora_b"], permute(b, HEADS))
    embedding = one.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"]
    assert np.array_equal(values["token_embd.weight.lora_a"], embedding.T)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_types_are_rounded_once(kind: str, tmp_path: Path) -> None:
    one = made({DOWN: 3}, 3)
    back = read_gguf("it", put(tmp_path, write_gguf(one.adapter, base_config=QWEN, dtype=DTYPES[kind])))
    module = back.modules[DOWN]
    assert {ref.spec.dtype.name for ref in module.tensors.values()} == {kind}
    wanted = one.tensors[f"{PREFIX}{DOWN}.lora_A.weight"]
    if kind == "F16":
        wanted = wanted.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        wanted = gguf.quants.dequantize(
            gguf.quants.quantize(wanted, gguf.GGMLQuantizationType.BF16), gguf.GGMLQuantizationType.BF16
        )
    assert np.array_equal(module.tensors["down"].load(), wanted)


def test_types_that_are_not_written() -> None:
    with pytest.raises(Unsupported, match="F64"):
        write_gguf(made({DOWN: 3}).adapter, base_config=QWEN, dtype=DTYPES["F64"])
    one = made({DOWN: 3})
    one.tensors[f"{PREFIX}{DOWN}.lora_A.weight"] *= np.float32(1e6)
    with pytest.raises(NonFinite, match=r"lora_A"):
        write_gguf(one.adapter, base_config=QWEN, dtype=DTYPES["F16"])


def test_an_alpha_of_nothing_is_never_written(tmp_path: Path) -> None:
    """To llama.cpp it means a scale of 1."""
    path = put(tmp_path, write_gguf(made({Q: 4, DOWN: 2}, 0).adapter, base_config=QWEN))
    assert gguf.GGUFReader(path).fields["adapter.lora.alpha"].contents() != 0
    assert all(not delta.any() for delta in as_llama_cpp_computes(path).values())
    assert all(not delta.any() for delta in deltas(read_gguf("it", path)).values())


def test_the_alpha_most_modules_need_is_written(tmp_path: Path) -> None:
    paths = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    one = made(dict(zip(paths, (4, 2, 8), strict=True)), {paths[0]: 8, paths[1]: 8, paths[2]: 2})
    path = put(tmp_path, write_gguf(one.adapter, base_config=QWEN))
    reader = gguf.GGUFReader(path)
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    values = {tensor.name: tensor.data for tensor in reader.tensors}
    for index, factor in enumerate((1, 1, 0.25)):
        b = one.tensors[f"{PREFIX}{paths[index]}.lora_B.weight"]
        assert np.array_equal(values[f"blk.{index}.ffn_up.weight.lora_b"], b * np.float32(factor))


# --- architectures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for model in MODELS for kind in model.types])
def test_every_family_names_its_modules(kind: str, tmp_path: Path) -> None:
    model = next(model for model in MODELS if kind in model.types)
    shape = (4 * HEADS, 16)
    paths = [f"model.layers.{i}.{name}" for i in (0, 3) for name in model.modules]
    one = made(dict.fromkeys(paths, 2), shapes=dict.fromkeys(paths, shape))
    config = {**CONFIG, "model_type": kind, "num_key_value_heads": HEADS}
    written = write_gguf(one.adapter, base_config=config)
    if kind != "mixtral":
        assert not {name for name in written.lost if "block_sparse_moe" not in name}
    path = put(tmp_path, written)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == model.architecture
    back = read_gguf("it", path)
    assert_same_factors(replace(one.adapter, modules={p: one.adapter.modules[p] for p in back.modules}), back)
    assert len(back.modules) + len(written.lost) == len(paths)
    b = {tensor.name: tensor.data for tensor in reader.tensors}.get("blk.3.attn_q.weight.lora_b")
    if b is not None:
        stored = one.tensors[f"{PREFIX}model.layers.3.self_attn.q_proj.lora_B.weight"]
        turned = kind in {"llama", "mistral", "mixtral"}
        assert np.array_equal(b, permute(stored, HEADS) if turned else stored)
        assert turned is not np.array_equal(b, stored)


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="qwen3_moe"):
        write_gguf(made({Q: 2}).adapter, base_config={**CONFIG, "model_type": "qwen3_moe"})


def test_the_family_and_the_heads_are_asked_for() -> None:
    with pytest.raises(Unsupported, match="family") as raised:
        write_gguf(made({Q: 2}).adapter)
    assert "--base" in str(raised.value.hint)
    with pytest.raises(Unsupported, match=f"{re.escape(Q)} needs the base's number of heads"):
        write_gguf(made({Q: 2}).adapter, base_config={"model_type": "llama"})
    assert write_gguf(made({DOWN: 2}).adapter, base_config={"model_type": "llama"}).lost == {}
    with pytest.raises(BadConfig, match="num_attention_heads"):
        write_gguf(made({Q: 2}).adapter, base_config={"model_type": "llama", "num_attention_heads": "4"})
    with pytest.raises(ShapeMismatch, match=re.escape(Q)):
        write_gguf(made({Q: 2}).adapter, base_config={"model_type": "llama", "num_attention_heads": 3})


def test_a_vision_models_language_model(tmp_path: Path) -> None:
    given = "model.language_model.layers.0.self_attn.q_proj"
    one = made({given: 2}, shapes={given: (WIDTH, WIDTH)})
    config = {"model_type": "gemma3", "text_config": {**CONFIG, "model_type": "gemma3_text"}}
    back = read_gguf("it", put(tmp_path, write_gguf(one.adapter, base_config=config)))
    assert back.modules.keys() == {Q}


def test_two_names_for_one_tensor() -> None:
    one = made({Q: 2, Q.removeprefix("model."): 2}, shapes={Q.removeprefix("model."): (WIDTH, WIDTH)})
    with pytest.raises(Mismatch, match="attn_q"):
        write_gguf(one.adapter, base_config=QWEN)


def experts(ranks: tuple[int, ...], alphas: tuple[float, ...] | None = None) -> Made:
    names = [f"model.layers.1.block_sparse_moe.experts.{index}.w2" for index in range(len(ranks))]
    given = dict(zip(names, alphas or (8,) * len(ranks), strict=True))
    return made(dict(zip(names, ranks, strict=True)), given, shapes=dict.fromkeys(names, (6, 4)))


MIXTRAL = {**CONFIG, "model_type": "mixtral"}


def test_experts_are_stacked(tmp_path: Path) -> None:
    one = experts((3, 3, 3))
    path = put(tmp_path, write_gguf(one.adapter, base_config=MIXTRAL))
    values = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert {name: value.shape for name, value in values.items()} == {
        "blk.1.ffn_down_exps.weight.lora_a": (3, 3, 4), "blk.1.ffn_down_exps.weight.lora_b": (3, 6, 3),
    }  # fmt: skip
    assert_same_factors(one.adapter, as_peft(read_gguf("it", path)))


def test_experts_of_several_ranks_and_scales(tmp_path: Path) -> None:
    one = experts((2, 4, 1), (2, 8, 3))
    path = put(tmp_path, write_gguf(one.adapter, base_config=MIXTRAL))
    found = as_llama_cpp_computes(path)["blk.1.ffn_down_exps"]
    assert_same(dict(zip(one.deltas, found, strict=True)), one.deltas)
    assert_same(deltas(read_gguf("it", path)), one.deltas)


def test_a_missing_expert_is_named() -> None:
    one = experts((3, 3, 3))
    one.tensors = {key: value for key, value in one.tensors.items() if ".experts.0." not in key}
    with pytest.raises(Unsupported) as raised:
        write_gguf(one.adapter, base_config=MIXTRAL)
    assert "expert 0" in str(raised.value.hint)


# --- what is left out --------------------------------------------------------------------------------------


def test_what_has_no_place_is_named() -> None:
    one = made({Q: 2, DOWN: 2}, lora_bias=True, modules_to_save=["score"], use_dora=True)
    one.tensors[f"{PREFIX}{Q}.lora_magnitude_vector"] = np.ones(WIDTH, np.float32)
    one.tensors[f"{PREFIX}{DOWN}.lora_B.bias"] = np.ones(WIDTH, np.float32)
    one.tensors[f"{PREFIX}score.weight"] = np.ones((2, 2), np.float32)
    lost = write_gguf(replace(one.adapter, refusal=None), base_config=QWEN).lost
    assert lost.keys() == {Q, f"{PREFIX}{DOWN}.lora_B.bias", f"{PREFIX}score.weight"}
    assert "DoRA" in lost[Q]


@pytest.mark.parametrize(
    ("kind", "said"), [("qwen2", None), ("gemma2", None), ("gemma3", None), ("qwen2", True)]
)
def test_the_head_of_a_tied_model(kind: str, said: bool | None) -> None:
    config = {"model_type": kind} | ({} if said is None else {"tie_word_embeddings": said})
    lost = write_gguf(made({DOWN: 2, "lm_head": 2}).adapter, base_config=config).lost
    assert lost.keys() == ({"lm_head"} if said or kind != "qwen2" else set())


# --- reading -----------------------------------------------------------------------------------------------


def store(path: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    """A GGUF file by the package; fields replace the usual ones, None leaves one out."""
    given = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0, **fields}
    writer = gguf.GGUFWriter(path, given.pop("general.architecture", "llama"))
    for name, value in given.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name: str = "blk.0.ffn_up", rank: int = 2) -> dict[str, np.ndarray]:
    a, b = np.ones((rank, 8), np.float32), np.ones((16, rank), np.float32)
    return {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}


UP = "model.layers.0.mlp.up_proj"


def test_scales_as_llama_cpp_has_them(tmp_path: Path) -> None:
    module = read_gguf("it", store(tmp_path / "four.gguf", pair())).modules[UP]
    assert (module.rank, module.alpha, module.scaling, module.shape) == (2, 4.0, 2.0, (16, 8))
    for alpha in (0.0, None):
        adapter = read_gguf("it", store(tmp_path / f"{alpha}.gguf", pair(), **{"adapter.lora.alpha": alpha}))
        assert (adapter.modules[UP].alpha, adapter.modules[UP].scaling) == (2.0, 1.0)
        said = "is missing" if alpha is None else "is 0"
        assert adapter.warnings == (f"adapter.lora.alpha {said}, which llama.cpp takes as a scale of 1",)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, "four"])
def test_an_alpha_that_is_no_number(alpha: Any, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"adapter\.lora\.alpha"):
        read_gguf("it", store(tmp_path / "it.gguf", pair(), **{"adapter.lora.alpha": alpha}))


def test_the_heads_of_llama_are_asked_for(tmp_path: Path) -> None:
    path = store(tmp_path / "it.gguf", pair("blk.0.attn_q"))
    with pytest.raises(Unsupported, match=f"{re.escape(Q)}.*heads") as raised:
        read_gguf("it", path).require_computable()
    assert "--base" in str(raised.value.hint)
    assert read_gguf("it", path, base_config=LLAMA).refusal is None
    assert with_base(read_gguf("it", path), LLAMA).refusal is None
    other = store(tmp_path / "other.gguf", pair("blk.0.attn_q"), **{"general.architecture": "qwen2"})
    assert read_gguf("it", other).refusal is None
    with pytest.raises(ShapeMismatch, match=re.escape(Q)):
        read_gguf("it", path, base_config={"num_attention_heads": 3})


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"blk.0.ffn_up.weight.lora_a": np.ones((2, 8), np.float32)}, "blk.0.ffn_up.weight.lora_a without"),
        (pair() | {"blk.0.ffn_up.weight.lora_b": np.ones((16, 3), np.float32)}, "different ranks"),
        (pair() | {"blk.0.ffn_up.weight.lora_b": np.ones((1, 16, 2), np.float32)}, "do not fit"),
        (pair("blk.0.attn_qkv"), "blk.0.attn_qkv is no module of llama"),
    ],
)
def test_broken_modules_are_named(tensors: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    adapter = read_gguf("it", store(tmp_path / "it.gguf", tensors))
    assert adapter.modules == {}
    with pytest.raises(Unsupported, match=re.escape(said)):
        adapter.require_computable()


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    path = store(tmp_path / "it.gguf", pair("blk.0.ffn_up"), **{"general.architecture": "rwkv6"})
    adapter = read_gguf("it", path)
    assert adapter.modules.keys() == {"blk.0.ffn_up"}
    with pytest.raises(Unsupported, match="rwkv6"):
        adapter.require_computable()


def test_other_tensors_are_kept(tmp_path: Path) -> None:
    more = {"blk.0.attn_norm.weight": np.ones(8, np.float32), "blk.0.ffn_up.lora_c": np.ones(8, np.float32)}
    adapter = read_gguf("it", store(tmp_path / "it.gguf", pair() | more))
    assert {key: extra.role for key, extra in adapter.extras.items()} == {
        "blk.0.attn_norm.weight": "unclaimed", "blk.0.ffn_up.lora_c": "unclaimed",
    }  # fmt: skip
    lost = write_gguf(adapter).lost
    assert lost.keys() == more.keys()
    assert "llama.cpp passes over" in lost["blk.0.attn_norm.weight"]


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    path = store(tmp_path / "it.gguf", pair(), **{"general.type": "model"})
    with pytest.raises(UnknownFormat, match="GGUF model"):
        read_gguf("it", path)


def test_adapters_of_other_types_are_named_by_their_key(tmp_path: Path) -> None:
    path = store(tmp_path / "it.gguf", pair(), **{"adapter.type": "control"})
    with pytest.raises(UnknownFormat, match=r"adapter\.type 'control'"):
        read_gguf("it", path)


def test_an_activated_lora_is_refused(tmp_path: Path) -> None:
    path = store(tmp_path / "it.gguf", pair(), **{"adapter.alora.invocation_tokens": [7, 8]})
    with pytest.raises(Unsupported, match="some tokens only"):
        read_gguf("it", path).require_computable()


def test_quantised_factors_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "it.gguf", "llama")
    writer.add_string("general.type", "adapter")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(
        "blk.0.ffn_up.weight.lora_a", gguf.quants.quantize(np.ones((2, 32), np.float32), kind), raw_dtype=kind
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Unsupported, match=r"blk\.0\.ffn_up\.weight\.lora_a is quantised \(Q8_0\)"):
        GgufFile(tmp_path / "it.gguf")


def test_as_a_source(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float16).reshape(4, 6)
    source = GgufFile(
        store(tmp_path / "it.gguf", {"blk.0.ffn_up.weight.lora_a": values, **pair("blk.1.ffn_up")})
    )
    name = "blk.0.ffn_up.weight.lora_a"
    assert (source.specs[name].dtype.name, source.specs[name].shape) == ("F16", (4, 6))
    assert source.read(name, 7, 11).tolist() == [7, 8, 9, 10]
    assert source.read(name, out=np.empty((4, 6), np.float32)).tolist() == values.tolist()
    extent = source.extent(name)
    assert (tmp_path / "it.gguf").read_bytes()[extent.offset :][: extent.nbytes] == values.tobytes()
    assert pickle.loads(pickle.dumps(source)).read(name).tolist() == source.read(name).tolist()
    assert source.metadata["adapter.lora.alpha"] == "4.0"


def test_a_file_in_memory() -> None:
    one = made({Q: 3, DOWN: 3})
    written = write_gguf(one.adapter, base_config=LLAMA)
    assert_same_factors(one.adapter, read_gguf_bytes("it", written.files[written.weights]))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import loratools.tensors.gguf as module

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(Unsupported) as raised:
        write_gguf(made({DOWN: 2}).adapter, base_config=QWEN)
    assert "pip install" in str(raised.value.hint)


# --- files made to harm --------------------------------------------------------------------------------------


def sound(tmp_path: Path) -> bytes:
    return store(tmp_path / "sound.gguf", pair()).read_bytes()


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = sound(tmp_path)
    path = tmp_path / "cut.gguf"
    used = len(whole) - (-GgufFile(tmp_path / "sound.gguf").specs["blk.0.ffn_up.weight.lora_b"].nbytes % 32)
    for length in range(used):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match="is truncated: " if length else "is empty") as raised:
            GgufFile(path)
        assert raised.value.hint
    path.write_bytes(b"")
    with pytest.raises(CorruptFile, match="is empty"):
        lt.load(path)


@pytest.mark.parametrize("alignment", [8, 64])
def test_another_alignment_is_no_cut(alignment: int, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "it.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_custom_alignment(alignment)
    for name, value in pair().items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufFile(tmp_path / "it.gguf")
    assert all(np.array_equal(source.read(name), value.reshape(-1)) for name, value in pair().items())


@given(place=st.integers(0, 1 << 20), value=st.integers(0, 255))
@settings(deadline=None, max_examples=200)
def test_any_changed_byte_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    whole = bytearray(sound(folder))
    whole[place % len(whole)] = value
    path = folder / "changed.gguf"
    path.write_bytes(whole)
    with suppress(lt.LoratoolsError):
        assert read_gguf("it", path, base_config=LLAMA).format == "gguf"


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"GGML" + bytes(20), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "most significant byte first"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata fields"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62), "header ends"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 1 << 62), "items"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1), "array of type 9"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77), "type 77"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 99), "99 dimensions"),
        (
            b"GGUF"
            + struct.pack("<IQQQ", 3, 1, 0, 1)
            + b"t"
            + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0),
            "does not fit",
        ),
    ],
)
def test_headers_that_lead_astray(header: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "it.gguf"
    path.write_bytes(header)
    with pytest.raises(CorruptFile, match=said):
        GgufFile(path)


# --- oracles -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_peft_loads_what_was_gguf(tmp_path: Path) -> None:
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
        r=4, lora_alpha=8, use_rslora=True, rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 3},
        target_modules=["q_proj", "k_proj", "down_proj"],
    )  # fmt: skip
    model = get_peft_model(base, lora)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_()
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    path = put(tmp_path / "gguf", write_gguf(lt.load(tmp_path / "peft"), base_config=config.to_dict()))
    adapter: Adapter = read_gguf("it", path)
    adapter.save(tmp_path / "back", format="peft", sync=False)

    def merged(folder: Path) -> dict[str, Any]:
        fresh = transformers.LlamaForCausalLM(config)
        fresh.load_state_dict(state)
        return PeftModel.from_pretrained(fresh, folder).merge_and_unload().state_dict()

    wanted, found = merged(tmp_path / "peft"), merged(tmp_path / "back")
    assert any(not torch.equal(wanted[name], state[name]) for name in state)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-6, atol=1e-6)


def test_what_an_author_says_goes_along(tmp_path: Path) -> None:
    adapter = replace(
        made({DOWN: 2}).adapter, metadata={"modelspec.title": "Ink", "modelspec.license": "MIT"}
    )
    back = read_gguf("it", put(tmp_path, write_gguf(adapter, base_config=QWEN)))
    assert (back.metadata["general.name"], back.metadata["general.license"]) == ("Ink", "MIT")
    assert write_gguf(back).files == write_gguf(adapter, base_config=QWEN).files


def test_the_table_is_of_the_package() -> None:
    """Every module of every family has a tensor in it, but for the experts of dense models."""
    for model in MODELS:
        names = ours._tensor_names(model, 1)
        missing = {f"model.layers.0.{name}" for name in (*model.modules, *model.experts)} - names.keys()
        assert not missing, model.architecture
        assert len(set(names.values())) == len(names)


# --- through the verbs ---------------------------------------------------------------------------------------


def base_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A configuration without weights, which is all that writing GGUF needs."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_converted_and_back(tmp_path: Path) -> None:
    one = made({Q: 3, DOWN: 2}, 5)
    base = base_folder(tmp_path / "base", LLAMA)
    report = lt.convert(one.adapter, tmp_path / "it.gguf", to="gguf", base=base, sync=False)
    assert report.relative <= 1e-7
    back = lt.convert(tmp_path / "it.gguf", tmp_path / "peft", to="peft", sync=False)
    assert_same(deltas(lt.load(tmp_path / "peft")), one.deltas)
    assert back.identical == 2
    in_memory = lt.convert(one.adapter, None, to="gguf", base=base)
    assert_same(deltas(in_memory.adapter), one.deltas)
    with pytest.raises(Unsupported, match="one file") as raised:
        lt.convert(one.adapter, tmp_path / "folder", to="gguf", base=base)
    assert str(raised.value.hint).endswith("folder.gguf")


def test_the_base_gives_the_heads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, WIDTH), np.float32), rng.standard_normal((WIDTH, 2), np.float32)
    tensors = {"blk.0.attn_q.weight.lora_a": a, "blk.0.attn_q.weight.lora_b": permute(b, HEADS)}
    path = store(tmp_path / "it.gguf", tensors)
    base = base_folder(tmp_path / "base", LLAMA)
    weight = rng.standard_normal((WIDTH, WIDTH), np.float32)
    save_file({f"{Q}.weight": weight}, base / "model.safetensors")
    with pytest.raises(Unsupported, match="heads"):
        lt.convert(path, tmp_path / "peft", to="peft")
    lt.convert(path, tmp_path / "peft", to="peft", base=base, sync=False)
    assert_same(deltas(lt.load(tmp_path / "peft")), {Q: 2.0 * (b.astype(np.float64) @ a)})
    assert lt.load(path, config=base / "config.json").refusal is None
    merged = lt.merge(base, path, None)
    np.testing.assert_allclose(merged.state_dict[f"{Q}.weight"], weight + 2 * (b @ a), rtol=1e-5, atol=1e-6)
    assert {finding.code for finding in lt.validate(path).findings} == {"refused"}
    assert not lt.validate(path, base=base).findings


def test_validate_names_what_is_left_over(tmp_path: Path) -> None:
    path = store(tmp_path / "it.gguf", pair() | {"blk.0.ffn_up.lora_c": np.ones(8, np.float32)})
    report = lt.validate(path)
    assert [(finding.code, finding.where) for finding in report.findings] == [
        ("unclaimed-key", "blk.0.ffn_up.lora_c")
    ]
