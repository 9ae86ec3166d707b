"""Telling formats apart, and finding the weights and what explains them."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.errors import AmbiguousFormat, BadConfig, CorruptFile, NotFound, UnknownFormat, Unsupported
from loratools.formats.opening import open_adapter
from tests.helpers import make_adapter, write_adapter

if TYPE_CHECKING:
    from pathlib import Path


def values(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


# Keys of each dialect, and what they are: format, kinds, rank, shape of the first module, keys of no module.
DIALECTS = {
    "kohya": (
        {"lora_unet_down_blocks_0_to_q.lora_down.weight": values(4, 8), "lora_unet_down_blocks_0_to_q.alpha": values(),
         "lora_unet_down_blocks_0_to_q.lora_up.weight": values(6, 4)},
        ("kohya", ("lora",), 4, (6, 8), 0),
    ),
    "kohya convolution with a core": (
        {"lora_unet_conv.lora_down.weight": values(4, 8, 1, 1), "lora_unet_conv.lora_mid.weight": values(4, 4, 3, 3),
         "lora_unet_conv.lora_up.weight": values(6, 4, 1, 1)},
        ("kohya", ("lora",), 4, (6, 8, 3, 3), 0),
    ),
    "kohya dora": (
        {"lora_te1_fc1.lora_down.weight": values(4, 8), "lora_te1_fc1.lora_up.weight": values(6, 4),
         "lora_te1_fc1.dora_scale": values(1, 8)},
        ("kohya", ("dora",), 4, (6, 8), 0),
    ),
    "lokr": (
        {"lora_unet_q.lokr_w1": values(2, 3),
         "lora_unet_q.lokr_w2_a": values(5, 2), "lora_unet_q.lokr_w2_b": values(2, 7),
         "lora_unet_q.alpha": values()},
        ("kohya", ("lokr",), 2, (10, 21), 0),
    ),
    "loha": (
        {f"lora_unet_q.hada_w{i}_{s}": values(*shape) for i in (1, 2) for s, shape in (("a", (6, 4)), ("b", (4, 8)))},
        ("kohya", ("loha",), 4, (6, 8), 0),
    ),
    "diffusers": (
        {"unet.mid.to_q_lora.down.weight": values(4, 8), "unet.mid.to_q_lora.up.weight": values(6, 4)},
        ("diffusers", ("lora",), 4, (6, 8), 0),
    ),
    "diffusers with peft factors": (
        {"transformer.x.to_k.lora_A.weight": values(4, 8), "transformer.x.to_k.lora_B.weight": values(6, 4)},
        ("diffusers", ("lora",), 4, (6, 8), 0),
    ),
    "comfy": (
        {"diffusion_model.x.lora_A.weight": values(4, 8), "diffusion_model.x.lora_B.weight": values(6, 4)},
        ("comfy", ("lora",), 4, (6, 8), 0),
    ),
    "xlabs": (
        {"double_blocks.0.processor.qkv_lora1.down.weight": values(4, 8),
         "double_blocks.0.processor.qkv_lora1.up.weight": values(6, 4)},
        ("xlabs", ("lora",), 4, (6, 8), 0),
    ),
    "cloneofsimo": (
        {"unet:0:down": values(4, 8), "unet:0:up": values(6, 4), "<s1>": values(8)},
        ("cloneofsimo", ("lora",), 4, (6, 8), 1),
    ),
    "mlx": (
        {"model.q_proj.lora_a": values(8, 4), "model.q_proj.lora_b": values(4, 6)}, ("mlx", ("lora",), 4, (6, 8), 0),
    ),
    "loralib": (
        {"roberta.query.lora_A": values(4, 8), "roberta.query.lora_B": values(6, 4), "classifier.bias": values(3)},
        ("loralib", ("lora",), 4, (6, 8), 1),
    ),
    "sam": ({"w_a_000": values(4, 8), "w_b_000": values(6, 4)}, ("sam-lora", ("lora",), 4, (6, 8), 0)),
    "peft without its configuration": (
        {"base_model.model.q.lora_A.weight": values(4, 8), "base_model.model.q.lora_B.weight": values(6, 4)},
        ("bare-peft", ("lora",), 4, (6, 8), 0),
    ),
    "ia3 without its configuration": (
        {"base_model.model.q.ia3_l": values(8, 1)}, ("bare-peft", ("ia3",), None, None, 1),
    ),
    "unilora": ({"base_model.unilora_theta_d": values(8)}, ("unilora", ("unilora",), None, None, 1)),
    "finegates": ({"base_model.model.q.finegates_row": values(8)}, ("finegates", ("finegates",), None, None, 1)),
    "lllite": (
        {"lllite_unet_q.down.0.weight": values(4, 8), "lllite_unet_q.up.0.weight": values(6, 4)},
        ("lllite", ("lllite",), None, None, 2),
    ),
    "control lora": (
        {"lora_controlnet": values(), "input_blocks.1.0.down": values(4, 8), "input_blocks.1.0.up": values(6, 4)},
        ("control-lora", ("control-lora",), None, None, 3),
    ),
    "ip-adapter with factors": (
        {"image_proj.proj.weight": values(4, 8), "ip_adapter.1.to_q_lora.down.weight": values(4, 8),
         "ip_adapter.1.to_q_lora.up.weight": values(6, 4)},
        ("ip-adapter", ("ip-adapter",), None, None, 3),
    ),
    "controlnet": ({"control_model.out.weight": values(4, 8)}, ("controlnet", ("controlnet",), None, None, 1)),
    "hypernetwork": ({"320.0.weight": values(8, 4)}, ("hypernetwork", ("hypernetwork",), None, None, 1)),
    "soft prompt": ({"prompt_embeddings": values(8, 4)}, ("bare-peft", ("soft prompt",), None, None, 1)),
    "textual inversion": ({"emb_params": values(2, 8)}, ("textual-inversion", ("textual inversion",), None, None, 1)),
    "full model": (
        {f"layers.{i}.weight": values(4, 4) for i in range(3)}, ("full-model", ("full model",), None, None, 3),
    ),
    "only the alphas": (
        {"q.alpha": values(), "q.dropout_p": values()},
        ("stripped", ("an adapter without its factors",), None, None, 2),
    ),
    "anything": ({"a": values(2)}, ("unknown", ("unknown",), None, None, 1)),
}  # fmt: skip


# What is read, and computed with as it is.
COMPUTED = {
    "kohya", "kohya convolution with a core", "kohya dora", "lokr", "loha", "diffusers", "diffusers with peft factors",
    "comfy", "xlabs", "cloneofsimo", "sam",
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_is_told_by_its_keys(name: str, tmp_path: Path) -> None:
    tensors, (form, kinds, rank, shape, extras) = DIALECTS[name]
    save_file(tensors, tmp_path / "weights.safetensors")
    adapter = open_adapter(tmp_path / "weights.safetensors")
    assert (adapter.format, adapter.kinds) == (form, kinds)
    modules = list(adapter.modules.values())
    found = (modules[0].rank, modules[0].shape) if modules else (None, None)
    assert found == (rank, shape)
    assert len(adapter.extras) == extras
    claimed = {ref.name for module in modules for ref in module.tensors.values()}
    assert claimed.isdisjoint(adapter.extras)
    assert claimed | set(adapter.extras) == set(tensors)  # nothing is dropped in silence
    if name in COMPUTED:
        adapter.require_computable()
        assert {module.scaling for module in modules} == (
            {1 / rank} if "alpha" in modules[0].tensors else {1.0}
        )
    else:
        with pytest.raises(Unsupported):
            adapter.require_computable()


def test_mlx_writes_its_scale_down(tmp_path: Path) -> None:
    save_file(
        {"m.q_proj.lora_a": values(8, 4), "m.q_proj.lora_b": values(4, 6)}, tmp_path / "adapters.safetensors"
    )
    config = {"lora_parameters": {"rank": 4, "scale": 20.0}, "model": "some/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = open_adapter(tmp_path)
    assert adapter.config.base_model == "some/model"
    assert [(m.scaling, m.alpha) for m in adapter.modules.values()] == [(20.0, 80.0)]


def test_alpha_says_what_a_bare_file_does_not(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.a.lora_A.weight": values(4, 8), "base_model.model.a.lora_B.weight": values(6, 4),
        "base_model.model.b.lora_A.weight": values(2, 8), "base_model.model.b.lora_B.weight": values(6, 2),
    }  # fmt: skip
    save_file(tensors, tmp_path / "weights.safetensors")
    bare = open_adapter(tmp_path / "weights.safetensors")
    assert {module.scaling for module in bare.modules.values()} == {None}
    told = open_adapter(tmp_path / "weights.safetensors", alpha=8)
    told.require_computable()
    assert {name: module.scaling for name, module in told.modules.items()} == {"a": 2.0, "b": 4.0}


def test_an_alpha_that_the_configuration_contradicts_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", {"q": (6, 8)}, rank=4, alpha=8, alpha_pattern={"q": 4})
    assert open_adapter(tmp_path / "a").modules["q"].scaling == 1.0
    with pytest.raises(BadConfig, match="lora_alpha is 8, and the alpha given is 12"):
        open_adapter(tmp_path / "a", alpha=12)
    with pytest.raises(BadConfig, match="alpha_pattern"):
        open_adapter(tmp_path / "a", alpha=8)


def test_a_configuration_from_elsewhere(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", {"q": (6, 8)}, rank=4, alpha=8)
    weights = (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "loose.safetensors")
    config = tmp_path / "a" / "adapter_config.json"
    for given in (config, tmp_path / "a", json.loads(config.read_text())):
        assert open_adapter(weights, config=given).modules["q"].scaling == 2.0


def test_the_configuration_of_an_adapter_does_not_explain_a_model_beside_it(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", {"q": (6, 8)})
    save_file({f"layers.{i}.weight": values(4, 4) for i in range(3)}, tmp_path / "a" / "model.safetensors")
    assert open_adapter(tmp_path / "a").format == "peft"
    assert open_adapter(tmp_path / "a" / "model.safetensors").format == "full-model"


def test_a_sharded_model_is_named_for_what_it_is(tmp_path: Path) -> None:
    save_file({"layers.0.weight": values(4, 4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"layers.1.weight": values(4, 4)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {f"layers.{i}.weight": f"model-0000{i + 1}-of-00002.safetensors" for i in (0, 1)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert open_adapter(tmp_path).kinds == ("full model",)


def test_a_snapshot_of_links_opens(tmp_path: Path) -> None:
    real = make_adapter(tmp_path / "blobs", {"q": (6, 8)}, rank=4, alpha=8)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(real.iterdir())):
        blob = file.rename(real / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    assert open_adapter(snapshot).modules["q"].scaling == 2.0
    assert open_adapter(snapshot / "adapter_model.safetensors").modules["q"].scaling == 2.0


def test_a_pickle_is_read_only_with_leave(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "weights.pt"
    torch.save([torch.ones(6, 4), torch.ones(4, 8), torch.ones(5, 2), torch.ones(2, 3)], path)
    with pytest.raises(Unsupported, match="pickle"):
        open_adapter(path)
    adapter = open_adapter(path, allow_pickle=True)
    assert adapter.format == "nameless"
    assert [(m.rank, m.shape) for m in adapter.modules.values()] == [(4, (6, 8)), (2, (5, 3))]
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(CorruptFile):
        open_adapter(tmp_path / "evil.bin", allow_pickle=True)


def test_what_cannot_be_found_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        open_adapter(tmp_path / "nowhere.safetensors")
    with pytest.raises(NotFound, match="holds no adapter"):
        open_adapter(tmp_path)
    make_adapter(tmp_path / "run" / "first", {"q": (6, 8)})
    make_adapter(tmp_path / "run" / "second", {"q": (6, 8)})
    with pytest.raises(AmbiguousFormat, match="first, second"):
        open_adapter(tmp_path / "run")
    (tmp_path / "run" / "first" / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFound, match="but no adapter_model"):
        open_adapter(tmp_path / "run" / "first")
    with pytest.raises(UnknownFormat, match="is a configuration"):
        open_adapter(tmp_path / "run" / "first" / "adapter_config.json")
    assert open_adapter(tmp_path / "run" / "second" / "adapter_config.json").format == "peft"
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"a": values(2)}, tmp_path / "run" / "first" / name)
    with pytest.raises(AmbiguousFormat, match=r"a\.safetensors, b\.safetensors"):
        open_adapter(tmp_path / "run" / "first")


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "adapter_config.json"])
def test_a_pointer_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CorruptFile, match="Git LFS pointer") as caught:
        open_adapter(tmp_path / name, allow_pickle=True)
    assert "git lfs pull" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["w.onnx", "w.h5", "w.msgpack"])
def test_formats_this_build_does_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(64))
    with pytest.raises(UnknownFormat, match="does not read"):
        open_adapter(tmp_path / name)


@pytest.mark.parametrize("name", ["w.gguf", "w.safetensors"])
def test_gguf_is_told_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CorruptFile, match="GGUF"):
        open_adapter(tmp_path / name)


def test_a_configuration_without_a_type(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model": "x/y"}')
    with pytest.raises(BadConfig, match="no peft_type"):
        open_adapter(tmp_path / "adapter_config.json")


# --- PEFT keys -------------------------------------------------------------------------------------------

CONFIG = {"r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("prefix", "infix"),
    [
        ("base_model.model.", ""), ("", ""), ("base_model.model.base_model.model.", ""),
        ("base_model.model.", ".default"),
        ("base_model.model.", ".my-adapter"),
    ],
)  # fmt: skip
def test_odd_prefixes_name_the_same_module(tmp_path: Path, prefix: str, infix: str) -> None:
    tensors = {
        f"{prefix}model.layers.0.q_proj.lora_A{infix}.weight": values(4, 8),
        f"{prefix}model.layers.0.q_proj.lora_B{infix}.weight": values(6, 4),
        f"{prefix}model.embed.lora_embedding_A{infix}": values(4, 10),
        f"{prefix}model.embed.lora_embedding_B{infix}": values(8, 4),
    }
    patterns = {"^model.layers.0.q_proj": 2}
    adapter = open_adapter(write_adapter(tmp_path / "a", tensors, **CONFIG, alpha_pattern=patterns))
    shapes = {name: module.shape for name, module in adapter.modules.items()}
    assert shapes == {"model.layers.0.q_proj": (6, 8), "model.embed": (8, 10)}
    assert adapter.modules["model.layers.0.q_proj"].scaling == 0.5
    assert not adapter.extras


def test_the_merged_linear_layout_is_blocks_of_its_rank(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((8, 16)), rng.standard_normal((32, 4, 1))
    tensors = {"base_model.model.h.0.qkv.lora_A.weight": down, "base_model.model.h.0.qkv.lora_B.weight": up}
    folder = write_adapter(tmp_path / "a", tensors, **CONFIG, enable_lora=[True, False, True])
    adapter = open_adapter(folder)
    module = adapter.modules["h.0.qkv"]
    told = module.rank, module.options["blocks"], module.shape, module.scaling
    assert told == (8, 2, (48, 16), 2.0)
    adapter.require_computable()
    wanted = np.zeros((48, 16))
    wanted[:16], wanted[32:] = up[:16, :, 0] @ down[:4], up[16:, :, 0] @ down[4:]
    np.testing.assert_allclose(module.load(double=True).rows(0, 48), 2 * wanted, rtol=1e-12, atol=1e-12)


BROKEN = {
    "empty": ({"lora_A": (0,), "lora_B": (0,)}, "empty"),
    "flat": ({"lora_A": (32,), "lora_B": (24,)}, "expected 2 dimensions"),
    "half": ({"lora_A": (4, 8)}, "without the factor"),
    "ranks": ({"lora_A": (4, 8), "lora_B": (6, 2)}, "different ranks"),
    "scalar": ({"lora_A": (), "lora_B": ()}, "expected 2 dimensions"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_factors_open_and_cannot_be_computed_with(tmp_path: Path, name: str) -> None:
    shapes, said = BROKEN[name]
    tensors = {f"base_model.model.q.{factor}.weight": values(*shape) for factor, shape in shapes.items()}
    adapter = open_adapter(write_adapter(tmp_path / "a", tensors, **CONFIG))
    assert not adapter.modules
    assert set(adapter.extras) == set(tensors)
    assert said in adapter.extras["base_model.model.q.lora_A.weight"].reason
    with pytest.raises(Unsupported, match="q is broken"):
        adapter.require_computable()


def test_two_tensors_for_one_factor(tmp_path: Path) -> None:
    tensors = {f"base_model.model.q.lora_{f}{n}.weight": values(4, 4) for f in "AB" for n in ("", ".default")}
    adapter = open_adapter(write_adapter(tmp_path / "a", tensors, **CONFIG))
    assert len(adapter.modules) == 1
    assert len(adapter.extras) == 2
    assert all("under another name" in extra.reason for extra in adapter.extras.values())


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "ADALORA", "IA3"])
def test_ranks_of_other_kinds_come_from_the_file(tmp_path: Path, kind: str) -> None:
    import peft
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(12, 18))
    fields = {"LOHA": {"r": 3, "alpha": 6}, "LOKR": {"r": 2, "alpha": 6}, "IA3": {"feedforward_modules": []}}
    given = fields.get(kind, {"init_r": 5, "target_r": 3, "lora_alpha": 6, "total_step": 10})
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](target_modules=["0"], **given)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "a")
    adapter = open_adapter(tmp_path / "a")
    module = adapter.modules["0"]
    layer = wrapped.base_model.model[0]
    assert adapter.kinds == (kind.lower(),)
    assert not adapter.extras
    if kind == "IA3":
        assert (module.rank, module.scaling) == (None, None)
    else:
        assert module.shape == (18, 12)
        assert module.rank == layer.r["default"]
        # AdaLoRA divides by the ranks left, when it merges.
        wanted = 6 / (5 + 1e-5) if kind == "ADALORA" else layer.scaling["default"]
        assert module.scaling == pytest.approx(wanted, rel=1e-9)
    assert module.parameters == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def test_the_rank_that_adalora_repeats_is_kept_in_view(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.q.lora_A": values(3, 8), "base_model.model.q.lora_B": values(6, 3),
        "base_model.model.q.lora_E": values(3, 1), "base_model.model.q.ranknum": values(),
    }  # fmt: skip
    folder = write_adapter(tmp_path / "a", tensors, peft_type="ADALORA", init_r=3, lora_alpha=6)
    adapter = open_adapter(folder)
    assert adapter.modules["q"].scaling == pytest.approx(6 / (3 + 1e-5), rel=1e-12)
    assert {key: extra.role for key, extra in adapter.extras.items()} == {
        "base_model.model.q.ranknum": "training_only"
    }
