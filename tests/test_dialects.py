"""Adapters of image models: what each dialect's keys mean, against float64 arithmetic written out here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.architectures.base import architecture, architectures
from loratools.errors import AmbiguousFormat, BadConfig, LoratoolsError, Unsupported
from loratools.formats.dialects import name_modules
from loratools.formats.recognise import recognise
from loratools.formats.suffixes import SUFFIXES, split_key
from loratools.tensors.memory import MemorySource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from loratools.architectures.base import Architecture

    Tensors = dict[str, np.ndarray]

RNG = np.random.default_rng(20)
OUT, IN, RANK = 10, 21, 4


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def stored(path: Path, tensors: Mapping[str, Any], dtype: str = "float64", **metadata: str) -> Tensors:
    """Write a file, its floats as ``dtype``; what they were rounded to, in float64."""
    import torch
    from safetensors.torch import save_file

    cast = {}
    for key, value in tensors.items():
        one = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        cast[key] = one.to(getattr(torch, dtype)) if one.dtype == torch.float64 else one
    save_file(cast, path, metadata or None)
    return {key: value.double().numpy() for key, value in cast.items()}


def delta(module: lt.Module) -> np.ndarray:
    return module.load(double=True).rows(0, module.shape[0])  # type: ignore[attr-defined]


def applied(module: lt.Module, weight: np.ndarray) -> np.ndarray:
    flat = weight.reshape(weight.shape[0], -1).copy()
    return module.load(double=True).apply(flat, 0).reshape(weight.shape)


# --- suffixes ------------------------------------------------------------------------------------------------

# Lower and upper factor, the stem before them, the module's name, the dialect.
PAIRS = {
    "kohya": ("lora_unet_a_b.lora_down.weight", "lora_unet_a_b.lora_up.weight", "lora_unet_a_b", "kohya"),
    "peft factors under kohya names": (
        "lora_unet_a_b.lora_A.weight", "lora_unet_a_b.lora_B.weight", "lora_unet_a_b", "kohya",
    ),
    "lycoris wrapper": ("lycoris_a_b.lora_down.weight", "lycoris_a_b.lora_up.weight", "lora_unet_a_b", "kohya"),
    "hunyuan": (
        "Hunyuan_video_I2V_lora_double_blocks_0_img_mlp_fc1.lora_down.weight",
        "Hunyuan_video_I2V_lora_double_blocks_0_img_mlp_fc1.lora_up.weight",
        "lora_unet_double_blocks_0_img_mlp_fc1", "kohya",
    ),
    "onetrainer": (
        "lora_transformer_x.lora_down.weight", "lora_transformer_x.lora_up.weight", "lora_transformer_x", "onetrainer",
    ),
    "attention processors": (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.processor.to_out_lora.down.weight",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.processor.to_out_lora.up.weight",
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0", "diffusers",
    ),
    "attention processors of a pipeline": (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora.down.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora.up.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k", "diffusers",
    ),
    "a text encoder's processors": (
        "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.down.weight",
        "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.up.weight",
        "text_encoder.text_model.encoder.layers.3.self_attn.out_proj", "diffusers",
    ),
    "diffusers before PEFT": (
        "unet.mid_block.attentions.0.proj_in.lora.down.weight", "unet.mid_block.attentions.0.proj_in.lora.up.weight",
        "unet.mid_block.attentions.0.proj_in", "diffusers",
    ),
    "diffusers' linear layers": (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "diffusers",
    ),
    "diffusers": (
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
        "transformer.transformer_blocks.0.attn.to_q", "diffusers",
    ),
    "diffusers under PEFT's prefix": (
        "base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight",
        "base_model.model.transformer_blocks.0.attn.to_q.lora_B.default.weight",
        "transformer.transformer_blocks.0.attn.to_q", "diffusers",
    ),
    "diffusers' layers": (
        "transformer.layers.0.attention.to_q.lora_A.weight", "transformer.layers.0.attention.to_q.lora_B.weight",
        "transformer.layers.0.attention.to_q", "diffusers",
    ),
    "peft factors of a text encoder under kohya names": (
        "lora_te1_a_b.lora_A.weight", "lora_te1_a_b.lora_B.weight", "lora_te1_a_b", "kohya",
    ),
    "comfy": (
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.lora_B.weight",
        "diffusion_model.blocks.0.self_attn.q", "comfy",
    ),
    "bare names": (
        "blocks.0.self_attn.q.lora_A.default.weight", "blocks.0.self_attn.q.lora_B.default.weight",
        "diffusion_model.blocks.0.self_attn.q", "comfy",
    ),
    "mochi": (
        "diffusion_model.blocks.0.attn.qkv_x.lora_A", "diffusion_model.blocks.0.attn.qkv_x.lora_B",
        "diffusion_model.blocks.0.attn.qkv_x", "comfy",
    ),
    "xlabs": (
        "double_blocks.3.processor.qkv_lora2.down.weight", "double_blocks.3.processor.qkv_lora2.up.weight",
        "diffusion_model.double_blocks.3.processor.qkv_lora2", "xlabs",
    ),
    "xlabs' single blocks": (
        "single_blocks.3.processor.proj_lora.down.weight", "single_blocks.3.processor.proj_lora.up.weight",
        "diffusion_model.single_blocks.3.processor.proj_lora", "xlabs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_every_spelling_of_a_pair_is_one_module(tmp_path: Path, name: str) -> None:
    down, up, module_name, form = PAIRS[name]
    values = stored(tmp_path / "a.safetensors", {down: draw(RANK, IN), up: draw(OUT, RANK)})
    adapter = lt.load(tmp_path / "a.safetensors")
    adapter.require_computable()
    assert (adapter.format, adapter.kinds, dict(adapter.extras)) == (form, ("lora",), {})
    assert list(adapter.modules) == [module_name]
    module = adapter.modules[module_name]
    assert (module.rank, module.alpha, module.scaling, module.shape) == (RANK, RANK, 1.0, (OUT, IN))
    np.testing.assert_allclose(delta(module), values[up] @ values[down], rtol=1e-13, atol=1e-13)
    assert {ref.name for ref in module.tensors.values()} == {down, up}  # messages name the file's keys


ALPHAS = {
    "absent": (None, 1.0),
    "no dimensions": (("float32", ()), 0.5),
    "one element": (("float32", (1,)), 0.5),
    "float16": (("float16", ()), 0.5),
    "bfloat16": (("bfloat16", (1,)), 0.5),
    "float64": (("float64", ()), 0.5),
    "int64": (("int64", ()), 0.5),
    "int32": (("int32", (1, 1)), 0.5),
    "uint8": (("uint8", ()), 0.5),
    "float8": (("float8_e4m3fn", ()), 0.5),
    "zero": (("float32", (), 0.0), 1.0),
    "negative": (("float32", (), -3.0), -0.75),
    "not a whole number": (("float32", (), 5.25), 5.25 / 4),
}


@pytest.mark.parametrize("name", ALPHAS)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_every_form_of_alpha_is_one_number(tmp_path: Path, name: str, pickled: bool) -> None:
    import torch
    from safetensors.torch import save_file

    form, scaling = ALPHAS[name]
    tensors = {
        "lora_unet_q.lora_down.weight": torch.ones(4, 8),
        "lora_unet_q.lora_up.weight": torch.ones(6, 4),
    }
    if form is not None:
        kind, shape, *value = form
        tensors["lora_unet_q.alpha"] = torch.full(shape, *(value or [2.0])).to(getattr(torch, kind))
    path = tmp_path / ("a.pt" if pickled else "a.safetensors")
    torch.save(tensors, path) if pickled else save_file(tensors, path)
    report = lt.inspect(path, allow_pickle=True)
    assert report.modules[0].scaling == scaling
    assert report.modules[0].alpha == scaling * 4
    assert any("no alpha" in warning for warning in report.warnings) == (form is None)


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "is nan"), (float("inf"), "is inf"), ([1.0, 2.0], "shape")]
)
def test_an_alpha_that_is_no_number_is_named(tmp_path: Path, value: Any, said: str) -> None:
    tensors = {"lora_te_q.lora_down.weight": draw(4, 8), "lora_te_q.lora_up.weight": draw(6, 4)}
    stored(tmp_path / "a.safetensors", {**tensors, "lora_te_q.alpha": np.array(value, np.float32)})
    adapter = lt.load(tmp_path / "a.safetensors")
    with pytest.raises(Unsupported, match=rf"lora_te_q\.alpha.*{said}"):
        adapter.require_computable()
    report = lt.validate(tmp_path / "a.safetensors")
    assert next(f.code for f in report.findings if f.severity == "error") == "alpha-invalid"


# --- kinds ---------------------------------------------------------------------------------------------------

ALPHA = 3.0


def kron(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Element by element, so that it is not numpy's."""
    right = right.reshape(right.shape[0], -1)
    out = np.zeros((left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]))
    for i, j in np.ndindex(left.shape):
        rows, columns = right.shape
        out[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = left[i, j] * right
    return out


def tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ijkl,jr,ip->prkl", core, b, a)


# Tensors by suffix, and what they add, of alpha 3; the shape is the delta's.
KINDS: dict[str, tuple[str, Callable[[], Tensors], Callable[[Tensors], np.ndarray]]] = {
    "lora": (
        "lora",
        lambda: {"lora_down.weight": draw(4, 21), "lora_up.weight": draw(10, 4)},
        lambda t: 3 / 4 * t["lora_up.weight"] @ t["lora_down.weight"],
    ),
    "1x1 convolution": (
        "lora",
        lambda: {"lora_down.weight": draw(4, 21, 1, 1), "lora_up.weight": draw(10, 4, 1, 1)},
        lambda t: 3 / 4 * np.einsum("orab,riab->oiab", t["lora_up.weight"], t["lora_down.weight"]),
    ),
    "convolution": (
        "lora",
        lambda: {"lora_down.weight": draw(4, 7, 3, 2), "lora_up.weight": draw(10, 4, 1, 1)},
        lambda t: 3 / 4 * np.einsum("or,rikl->oikl", t["lora_up.weight"][:, :, 0, 0], t["lora_down.weight"]),
    ),
    "convolution over time": (
        "lora",
        lambda: {"lora_down.weight": draw(4, 7, 1, 2, 2), "lora_up.weight": draw(10, 4, 1, 1, 1)},
        lambda t: 3 / 4 * np.einsum("or,riklm->oiklm", t["lora_up.weight"][..., 0, 0, 0], t["lora_down.weight"]),
    ),
    "CP convolution": (
        "lora",
        lambda: {
            "lora_down.weight": draw(4, 7, 1, 1), "lora_mid.weight": draw(4, 4, 3, 3),
            "lora_up.weight": draw(10, 4, 1, 1),
        },
        lambda t: 3 / 4 * np.einsum(
            "mnkl,im,nj->ijkl", t["lora_mid.weight"], t["lora_up.weight"][..., 0, 0], t["lora_down.weight"][..., 0, 0],
        ),
    ),
    "loha": (
        "loha",
        lambda: {
            "hada_w1_a": draw(10, 4), "hada_w1_b": draw(4, 21), "hada_w2_a": draw(10, 4), "hada_w2_b": draw(4, 21),
        },
        lambda t: 3 / 4 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
    ),
    "loha in Tucker form": (
        "loha",
        lambda: {
            "hada_w1_a": draw(4, 10), "hada_w1_b": draw(4, 7), "hada_t1": draw(4, 4, 3, 3),
            "hada_w2_a": draw(4, 10), "hada_w2_b": draw(4, 7), "hada_t2": draw(4, 4, 3, 3),
        },
        lambda t: 3 / 4 * tucker(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"])
        * tucker(t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"]),
    ),
    "lokr, both sides whole: alpha counts for nothing": (
        "lokr",
        lambda: {"lokr_w1": draw(2, 3), "lokr_w2": draw(5, 7)},
        lambda t: kron(t["lokr_w1"], t["lokr_w2"]),
    ),
    "lokr, right side in factors": (
        "lokr",
        lambda: {"lokr_w1": draw(2, 3), "lokr_w2_a": draw(5, 4), "lokr_w2_b": draw(4, 7)},
        lambda t: 3 / 4 * kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
    ),
    "lokr, left side in factors": (
        "lokr",
        lambda: {"lokr_w1_a": draw(5, 4), "lokr_w1_b": draw(4, 7), "lokr_w2": draw(2, 3)},
        lambda t: 3 / 4 * kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2"]),
    ),
    "lokr, both sides in factors": (
        "lokr",
        lambda: {
            "lokr_w1_a": draw(2, 4), "lokr_w1_b": draw(4, 3), "lokr_w2_a": draw(5, 4), "lokr_w2_b": draw(4, 7),
        },
        lambda t: 3 / 4 * kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
    ),
    "lokr in Tucker form": (
        "lokr",
        lambda: {
            "lokr_w1": draw(2, 3), "lokr_t2": draw(4, 4, 3, 3), "lokr_w2_a": draw(4, 5), "lokr_w2_b": draw(4, 7),
        },
        lambda t: 3 / 4 * kron(t["lokr_w1"], tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])),
    ),
    "full": ("full", lambda: {"diff": draw(10, 7, 3, 3)}, lambda t: t["diff"]),
    "norm": ("norm", lambda: {"w_norm": draw(10)}, lambda t: t["w_norm"]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "stem", ["lora_unet_q", "diffusion_model.blocks.0.self_attn.q", "unet.mid_block.resnets.0.conv1"]
)
def test_every_kind_adds_what_its_formula_says(tmp_path: Path, name: str, dtype: str, stem: str) -> None:
    kind, make, formula = KINDS[name]
    given = {f"{stem}.{suffix}": value for suffix, value in make().items()}
    values = stored(tmp_path / "a.safetensors", {**given, f"{stem}.alpha": np.array(ALPHA)}, dtype)
    adapter = lt.load(tmp_path / "a.safetensors")
    adapter.require_computable()
    (module,) = adapter.modules.values()
    wanted = formula({key.removeprefix(stem + "."): value for key, value in values.items()})
    assert (module.kind, adapter.extras) == (kind, {})
    assert int(np.prod(module.shape)) == wanted.size
    assert module.shape[0] == wanted.shape[0]
    np.testing.assert_allclose(delta(module).reshape(wanted.shape), wanted, rtol=1e-11, atol=1e-11)


def decomposed(weight: np.ndarray, change: np.ndarray, magnitude: np.ndarray, axis: int) -> np.ndarray:
    whole = weight + change
    rest = tuple(i for i in range(whole.ndim) if i != axis)
    shape = [-1 if i == axis else 1 for i in range(whole.ndim)]
    return whole * magnitude.reshape(shape) / np.sqrt((whole**2).sum(rest, keepdims=True))


# Suffix of the magnitude, its shape, and the axis of the weight it runs along.
MAGNITUDES = [
    ("dora_scale", (10, 1), 0, False),
    ("dora_scale", (1, 10), 1, False),
    ("dora_scale", (10, 1, 1, 1), 0, True),
    ("dora_scale", (1, 10, 1, 1), 1, True),
    ("lora_magnitude_vector", (10,), 0, False),
    ("lora_magnitude_vector.weight", (10,), 0, False),
    ("lora_magnitude_vector.default.weight", (10,), 0, False),
    ("lora_magnitude_vector", (1, 10, 1, 1), 0, True),  # PEFT's for a convolution looks like the other axis
    ("magnitude", (10, 1), 0, False),
]


@pytest.mark.parametrize(("suffix", "shape", "axis", "convolution"), MAGNITUDES)
def test_a_magnitude_runs_along_the_axis_its_suffix_and_shape_say(
    tmp_path: Path, suffix: str, shape: tuple[int, ...], axis: int, convolution: bool
) -> None:
    """Square layers throughout: the sizes alone tell nothing."""
    kernel, ones = ((3, 3), (1, 1)) if convolution else ((), ())
    stem = "unet.mid_block.resnets.0.conv1"
    given = {f"{stem}.lora_A.weight": draw(4, 10, *kernel), f"{stem}.lora_B.weight": draw(10, 4, *ones)}
    values = stored(tmp_path / "a.safetensors", {**given, f"{stem}.{suffix}": np.abs(draw(*shape))})
    adapter = lt.load(tmp_path / "a.safetensors")
    (module,) = adapter.modules.values()
    assert (module.kind, module.is_delta) == ("dora", False)
    weight = draw(10, 10, *kernel)
    down, up = values[f"{stem}.lora_A.weight"], values[f"{stem}.lora_B.weight"]
    change = (up.reshape(10, 4) @ down.reshape(4, -1)).reshape(weight.shape)
    wanted = decomposed(weight, change, values[f"{stem}.{suffix}"].reshape(-1), axis)
    # Along the inputs LyCORIS adds the epsilon of float32 to the norms.
    np.testing.assert_allclose(applied(module, weight), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3_of_lycoris_is_stored_less_one(tmp_path: Path, on_input: bool) -> None:
    count = IN if on_input else OUT
    flag = np.array(on_input)
    values = stored(
        tmp_path / "a.safetensors", {"lora_unet_q.weight": draw(count), "lora_unet_q.on_input": flag}
    )
    (module,) = lt.load(tmp_path / "a.safetensors").modules.values()
    weight, factors = draw(OUT, IN), 1 + values["lora_unet_q.weight"]
    wanted = weight * factors if on_input else weight * factors[:, None]
    assert (module.kind, module.options["relative"]) == ("ia3", True)
    np.testing.assert_allclose(applied(module, weight), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("old", [False, True])
def test_glora_of_today_and_of_old(tmp_path: Path, old: bool) -> None:
    left, right, up, down = draw(IN, 4), draw(4, IN), draw(OUT, 4), draw(4, IN)
    factors = (right, left, down, up) if old else (left, right, up, down)
    keys = [f"lora_unet_q.{word}.weight" for word in ("a1", "a2", "b1", "b2")]
    stored(
        tmp_path / "a.safetensors",
        {**dict(zip(keys, factors, strict=True)), "lora_unet_q.alpha": np.array(ALPHA)},
    )
    (module,) = lt.load(tmp_path / "a.safetensors").modules.values()
    weight = draw(OUT, IN)
    assert (module.kind, module.rank, module.scaling, module.shape) == ("glora", 4, 0.75, (OUT, IN))
    wanted = weight + 0.75 * (weight @ left @ right + up @ down)
    np.testing.assert_allclose(applied(module, weight), wanted, rtol=1e-11, atol=1e-11)


def test_a_file_may_mix_kinds_and_each_module_has_its_own(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_a.lora_down.weight": draw(4, 8), "lora_unet_a.lora_up.weight": draw(6, 4),
        "lora_unet_a.diff_b": draw(6), "lora_unet_b.lokr_w1": draw(2, 2), "lora_unet_b.lokr_w2": draw(3, 4),
        "lora_unet_c.diff": draw(6, 8), "lora_unet_c.diff_b": draw(6), "lora_unet_d.w_norm": draw(6),
        "lora_unet_d.b_norm": draw(6), "lora_unet_e.set_weight": draw(6, 8), "lora_unet_f.diff_b": draw(6),
        "lora_te_g.oft_blocks": draw(2, 3, 3), "lora_te_h.oft_R.weight": draw(2, 3),
    }  # fmt: skip
    values = stored(tmp_path / "a.safetensors", tensors)
    adapter = lt.load(tmp_path / "a.safetensors")
    adapter.require_computable()
    kinds = {name.rpartition("_")[2]: module.kind for name, module in adapter.modules.items()}
    assert kinds == {
        "a": "lora", "b": "lokr", "c": "full", "d": "norm", "e": "set", "f": "full", "g": "oft", "h": "oftv2",
    }  # fmt: skip
    assert not adapter.extras
    for letter, key in (("a", "diff_b"), ("c", "diff_b"), ("d", "b_norm"), ("f", "diff_b")):
        module = adapter.modules[f"lora_unet_{letter}"]
        bias = module.load("bias", double=True).rows(0, 6).reshape(-1)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(bias, values[f"lora_unet_{letter}.{key}"])
    assert not adapter.modules["lora_unet_f"].changes_weight


def test_a_control_lora_trains_biases_and_replaces_norms(tmp_path: Path) -> None:
    stem = "double_blocks.0.img_attn"
    tensors = {
        f"{stem}.proj.lora_A.weight": draw(4, 8), f"{stem}.proj.lora_B.weight": draw(6, 4),
        f"{stem}.proj.lora_B.bias": draw(6), f"{stem}.norm.key_norm.scale": draw(5),
    }  # fmt: skip
    values = stored(tmp_path / "a.safetensors", tensors)
    adapter = lt.load(tmp_path / "a.safetensors")
    assert (adapter.format, dict(adapter.extras)) == ("bfl-control", {})
    module = adapter.modules[f"diffusion_model.{stem}.proj"]
    bias = module.load("bias", double=True).rows(0, 6).reshape(-1)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(bias, values[f"{stem}.proj.lora_B.bias"])
    norm = adapter.modules[f"diffusion_model.{stem}.norm.key_norm"]
    assert norm.kind == "set"
    np.testing.assert_array_equal(applied(norm, draw(5)).reshape(-1), values[f"{stem}.norm.key_norm.scale"])


# --- LyCORIS as the writer -----------------------------------------------------------------------------------


# Algorithm, layer, options; which need the weight itself.
LYCORIS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "locon": ("LoConModule", "linear", {}),
    "locon, a convolution": ("LoConModule", "conv", {}),
    "locon, CP": ("LoConModule", "conv", {"use_tucker": True}),
    "locon, rs-LoRA": ("LoConModule", "linear", {"rs_lora": True}),
    "locon, DoRA by outputs": ("LoConModule", "linear", {"weight_decompose": True}),
    "locon, DoRA by inputs": ("LoConModule", "linear", {"weight_decompose": True, "wd_on_out": False}),
    "locon, DoRA of a convolution by inputs": (
        "LoConModule",
        "conv",
        {"weight_decompose": True, "wd_on_out": False},
    ),
    "loha": ("LohaModule", "linear", {}),
    "loha, a convolution": ("LohaModule", "conv", {}),
    "loha, Tucker": ("LohaModule", "conv", {"use_tucker": True}),
    "loha, DoRA": ("LohaModule", "linear", {"weight_decompose": True}),
    "lokr": ("LokrModule", "linear", {"factor": 2}),
    "lokr, decomposed": ("LokrModule", "linear", {"factor": 4, "decompose_both": True}),
    "lokr, whole": ("LokrModule", "linear", {"factor": 4, "full_matrix": True}),
    "lokr, a convolution": ("LokrModule", "conv", {"factor": 2}),
    "lokr, Tucker": ("LokrModule", "conv", {"factor": 2, "use_tucker": True}),
    "lokr, DoRA by inputs": (
        "LokrModule",
        "linear",
        {"factor": 2, "weight_decompose": True, "wd_on_out": False},
    ),
    "full": ("FullModule", "linear", {}),
    "ia3": ("IA3Module", "linear", {}),
    "ia3, of inputs": ("IA3Module", "linear", {"train_on_input": True}),
    "ia3, a convolution": ("IA3Module", "conv", {}),
    "glora": ("GLoRAModule", "linear", {}),
    "glora, a convolution": ("GLoRAModule", "conv", {}),
    "oft": ("DiagOFTModule", "linear", {"rescaled": True}),
    "oft, constrained": ("DiagOFTModule", "linear", {"constraint": 0.02}),
    "oft, a convolution": ("DiagOFTModule", "conv", {}),
    "boft": ("ButterflyOFTModule", "linear", {}),
}


def lycoris_layer(name: str) -> tuple[Any, Any]:
    """A layer, and LyCORIS' module for it with values from a seed."""
    import lycoris.modules
    import torch

    algorithm, layer, options = LYCORIS[name]
    torch.manual_seed(3)
    base = torch.nn.Linear(20, 16, bias=False) if layer == "linear" else torch.nn.Conv2d(8, 16, 3, bias=False)
    module = getattr(lycoris.modules, algorithm)("lora_unet_q", base, 1.0, 4, 3.0, **options)
    for parameter_name, parameter in module.named_parameters():
        mean = 1.0 if parameter_name in {"rescale", "dora_scale"} else 0.0
        torch.nn.init.normal_(parameter, mean, 0.3)
    return base, module


@pytest.mark.parametrize("name", LYCORIS)
def test_what_lycoris_writes_acts_as_its_forward_does(tmp_path: Path, name: str) -> None:
    """The forward pass, on inputs that are the identity: LyCORIS' own differences are not all right."""
    pytest.importorskip("lycoris")
    import torch

    base, module = lycoris_layer(name)
    weight = base.weight.detach().numpy().copy()
    module.apply_to()  # before which a full difference is none yet
    state = module.custom_state_dict() or module.state_dict()
    stored(
        tmp_path / "a.safetensors", {f"lora_unet_q.{k}": v.detach().contiguous() for k, v in state.items()}
    )
    adapter = lt.load(tmp_path / "a.safetensors")
    adapter.require_computable()
    assert not adapter.extras
    (found,) = adapter.modules.values()
    with torch.no_grad():
        if weight.ndim == 2:
            wanted = base(torch.eye(20)).T.numpy()
        else:  # one pixel of one channel at each place of the kernel
            wanted = base(torch.eye(8 * 9).reshape(8 * 9, 8, 3, 3)).reshape(8 * 9, 16).T.numpy()
    assert np.abs(wanted - weight.reshape(16, -1)).max() > 1e-2
    np.testing.assert_allclose(
        applied(found, weight.astype(np.float64)).reshape(16, -1), wanted, rtol=5e-5, atol=5e-5
    )


# --- scaling in metadata -------------------------------------------------------------------------------------

TRANSFORMER = "transformer.transformer_blocks.{}.attn.to_{}"


def with_metadata(path: Path, fields: dict[str, Any], ranks: Mapping[str, int], **more: np.ndarray) -> None:
    tensors = dict(more)
    for name, rank in ranks.items():
        tensors |= {f"{name}.lora_A.weight": draw(rank, 8), f"{name}.lora_B.weight": draw(6, rank)}
    metadata = {f"transformer.{key}": value for key, value in fields.items()}
    stored(path, tensors, lora_adapter_metadata=json.dumps(metadata))


def test_diffusers_metadata_scale_as_peft_does(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    fields = {
        "r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {r"transformer_blocks\.1\.attn\.to_q": 2},
        "alpha_pattern": {"to_k": 3, "transformer_blocks.0.attn.to_k": 5}, "target_modules": ["to_q", "to_k"],
    }  # fmt: skip

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 6), "to_k": torch.nn.Linear(8, 6)})

    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleList([Attention(), Attention()])
    wrapped = get_peft_model(model, LoraConfig(**fields))
    layers = {n: m for n, m in wrapped.base_model.model.named_modules() if hasattr(m, "lora_A")}
    ranks = {f"transformer.{name}": layer.r["default"] for name, layer in layers.items()}
    with_metadata(tmp_path / "a.safetensors", fields, ranks)
    adapter = lt.load(tmp_path / "a.safetensors")
    adapter.require_computable()
    assert {name: module.scaling for name, module in adapter.modules.items()} == {
        f"transformer.{name}": pytest.approx(layer.scaling["default"], rel=1e-12)
        for name, layer in layers.items()
    }
    assert not adapter.warnings


def test_metadata_of_another_rank_and_another_alpha_are_not_believed(tmp_path: Path) -> None:
    name = TRANSFORMER.format(0, "q")
    with_metadata(tmp_path / "rank.safetensors", {"r": 8, "lora_alpha": 8}, {name: 4})
    assert lt.load(tmp_path / "rank.safetensors").modules[name].options["config_rank"] == 8
    with_metadata(
        tmp_path / "alpha.safetensors",
        {"r": 4, "lora_alpha": 8},
        {name: 4},
        **{f"{name}.alpha": np.array(2.0)},
    )
    with pytest.raises(Unsupported, match=rf"{name}\.alpha scales by 0.5, and lora_adapter_metadata by 2"):
        lt.load(tmp_path / "alpha.safetensors").require_computable()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is not JSON"), ("[]", "no"), ('{"transformer.r": "four"}', "r is .four., expected")],
)
def test_metadata_that_cannot_be_read_are_a_finding_and_refused(tmp_path: Path, text: str, said: str) -> None:
    name = TRANSFORMER.format(0, "q")
    tensors = {f"{name}.lora_A.weight": draw(4, 8), f"{name}.lora_B.weight": draw(6, 4)}
    stored(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=text)
    with pytest.raises(Unsupported, match=said):
        lt.load(tmp_path / "a.safetensors").require_computable()
    assert "metadata-invalid" in {
        finding.code for finding in lt.validate(tmp_path / "a.safetensors").findings
    }


# --- what the user says --------------------------------------------------------------------------------------


def test_an_alpha_from_the_user_is_for_files_that_have_none(tmp_path: Path) -> None:
    name = TRANSFORMER.format(0, "q")
    tensors = {f"{name}.lora_A.weight": draw(4, 8), f"{name}.lora_B.weight": draw(6, 4)}
    stored(tmp_path / "none.safetensors", tensors)
    assert lt.load(tmp_path / "none.safetensors", alpha=6).modules[name].scaling == 1.5
    stored(tmp_path / "two.safetensors", {**tensors, f"{name}.alpha": np.array(2.0)})
    assert lt.load(tmp_path / "two.safetensors", alpha=2).modules[name].scaling == 0.5
    with pytest.raises(BadConfig, match=rf"{name}\.alpha is 2, and the alpha given is 6"):
        lt.load(tmp_path / "two.safetensors", alpha=6)
    stored(
        tmp_path / "said.safetensors",
        tensors,
        lora_adapter_metadata='{"transformer.r": 4, "transformer.lora_alpha": 2}',
    )
    with pytest.raises(
        BadConfig, match="lora_adapter_metadata of transformer is 2, and the alpha given is 6"
    ):
        lt.load(tmp_path / "said.safetensors", alpha=6)


# --- faults --------------------------------------------------------------------------------------------------

DOWN, UP = "lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight"
FAULTS: dict[str, tuple[Tensors, str, str]] = {
    "no upper factor": ({DOWN: draw(4, 8)}, "unpaired-factor", DOWN),
    "no lower factor": ({UP: draw(6, 4), "lora_unet_q.alpha": np.array(1.0)}, "unpaired-factor", UP),
    "an alpha alone": ({"lora_unet_q.alpha": np.array(1.0)}, "unpaired-factor", r"lora_unet_q\.alpha"),
    "ranks": ({DOWN: draw(4, 8), UP: draw(6, 5)}, "factors-disagree", DOWN),
    "empty": ({DOWN: draw(0, 8), UP: draw(6, 4)}, "empty-factor", DOWN),
    "scalars": ({DOWN: draw(), UP: draw()}, "factor-dimensions", DOWN),
    "kernel in the upper factor": ({DOWN: draw(4, 8, 1, 1), UP: draw(6, 4, 3, 3)}, "factors-disagree", UP),
    "core of another rank": (
        {DOWN: draw(4, 8, 1, 1), UP: draw(6, 4, 1, 1), "lora_unet_q.lora_mid.weight": draw(4, 5, 3, 3)},
        "factors-disagree", "lora_mid",
    ),
    "two kinds": (
        {DOWN: draw(4, 8), UP: draw(6, 4), "lora_unet_q.lokr_w1": draw(2, 2), "lora_unet_q.lokr_w2": draw(3, 4)},
        "mixed-kinds", "two kinds",
    ),
    "loha of two shapes": (
        {"lora_unet_q.hada_w1_a": draw(6, 4), "lora_unet_q.hada_w1_b": draw(4, 8),
         "lora_unet_q.hada_w2_a": draw(5, 4), "lora_unet_q.hada_w2_b": draw(4, 8)},
        "factors-disagree", "hada_w1_a",
    ),
    "lokr without a factor": (
        {"lora_unet_q.lokr_w1": draw(2, 2), "lora_unet_q.lokr_w2_a": draw(3, 4)}, "unpaired-factor", "lokr_w1",
    ),
    "lokr, a side twice": (
        {"lora_unet_q.lokr_w1": draw(2, 2), "lora_unet_q.lokr_w1_a": draw(2, 2), "lora_unet_q.lokr_w2": draw(3, 4)},
        "factors-disagree", "lokr_w1",
    ),
    "magnitude of another length": (
        {DOWN: draw(4, 8), UP: draw(6, 4), "lora_unet_q.dora_scale": draw(7, 1)}, "factors-disagree", "dora_scale",
    ),
    "glora that does not meet": (
        {f"lora_unet_q.{k}.weight": draw(3 + i, 5 + i) for i, k in enumerate(("a1", "a2", "b1", "b2"))},
        "factors-disagree", "a1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_refused_by_its_key(tmp_path: Path, name: str) -> None:
    tensors, code, key = FAULTS[name]
    sound = {"lora_unet_a.lora_down.weight": draw(4, 8), "lora_unet_a.lora_up.weight": draw(6, 4)}
    stored(tmp_path / "a.safetensors", {**sound, **tensors})
    adapter = lt.load(tmp_path / "a.safetensors")
    assert list(adapter.modules) == ["lora_unet_a"]
    assert set(adapter.extras) == set(tensors)
    with pytest.raises(Unsupported, match=key):
        adapter.require_computable()
    errors = [f for f in lt.validate(tmp_path / "a.safetensors").findings if f.severity == "error"]
    assert code in [f.code for f in errors]
    assert {f.where for f in errors} & set(tensors)


@pytest.mark.parametrize(
    ("tensors", "where", "text"),
    [
        ({DOWN: draw(4, 8), UP: draw(6, 5)}, DOWN, f"{DOWN} [4, 8] and {UP} [6, 5] have different ranks"),
        ({DOWN: draw(4, 8)}, DOWN, f"{DOWN} without the factor it belongs to"),
        ({DOWN: draw(4, 8), UP: draw(6, 4), "lora_unet_q.dora_scale": draw(7, 1)}, "lora_unet_q.dora_scale",
         "lora_unet_q.dora_scale [7, 1] should have 6 values by output or 8 by input features"),
    ],
    ids=["ranks", "unpaired", "magnitude"],
)  # fmt: skip
def test_a_fault_is_not_blamed_on_the_alpha(tmp_path: Path, tensors: Tensors, where: str, text: str) -> None:
    stored(tmp_path / "a.safetensors", {"lora_unet_q.alpha": np.array(1.0), **tensors})
    with pytest.raises(Unsupported, match=f"lora_unet_q is broken: {re.escape(text)}"):
        lt.load(tmp_path / "a.safetensors").require_computable()
    (found,) = [f for f in lt.validate(tmp_path / "a.safetensors").findings if f.severity == "error"]
    assert found.where == where


def test_an_alpha_that_is_no_number_is_named_once(tmp_path: Path) -> None:
    alpha = np.array(np.nan, np.float32)
    stored(tmp_path / "a.safetensors", {"lora_unet_q.alpha": alpha, DOWN: draw(4, 8), UP: draw(6, 4)})
    with pytest.raises(Unsupported, match=r"lora_unet_q is broken: lora_unet_q\.alpha is nan"):
        lt.load(tmp_path / "a.safetensors").require_computable()
    found = lt.validate(tmp_path / "a.safetensors").findings
    assert {f.where for f in found if f.code == "alpha-invalid"} == {"lora_unet_q.alpha"}


def test_validate_lists_all_faults_and_keys_of_no_module(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_a.lora_down.weight": draw(4, 8), "lora_unet_b.lora_up.weight": draw(6, 4),
        "lora_unet_c.lora_down.weight": draw(4, 8), "lora_unet_c.lora_up.weight": draw(6, 4),
        "lora_unet_c.lora_A.weight": draw(4, 8), "lora_unet_c.bias_indices": draw(2), "lora_unet_c.strange": draw(2),
    }  # fmt: skip
    stored(tmp_path / "a.safetensors", tensors)
    found = [
        (f.code, f.where) for f in lt.validate(tmp_path / "a.safetensors").findings if f.severity == "error"
    ]
    assert sorted(found) == [
        ("duplicate-factor", "lora_unet_c.lora_down.weight"),
        ("unclaimed-key", "lora_unet_c.bias_indices"),
        ("unclaimed-key", "lora_unet_c.strange"),
        ("unpaired-factor", "lora_unet_a.lora_down.weight"),
        ("unpaired-factor", "lora_unet_b.lora_up.weight"),
    ]


def test_parts_of_a_split_projection_are_no_adapters_names(tmp_path: Path) -> None:
    """Three lower factors, lora_down.0 to lora_down.2, are not one that is stored three times."""
    tensors = {f"lora_unet_q.lora_{side}.{i}.weight": draw(4, 4) for side in ("down", "up") for i in range(3)}
    sound = {"lora_unet_a.lora_down.weight": draw(4, 8), "lora_unet_a.lora_up.weight": draw(6, 4)}
    stored(tmp_path / "a.safetensors", {**sound, **tensors})
    adapter = lt.load(tmp_path / "a.safetensors")
    assert list(adapter.modules) == ["lora_unet_a"]
    assert set(adapter.extras) == set(tensors)
    assert not lt.validate(tmp_path / "a.safetensors").ok


@pytest.mark.parametrize("words", [("a1.weight", "b1.weight"), ("alpha", "beta"), ("weight", "on_inputs")])
def test_a_model_with_words_like_an_adapter_is_a_model(tmp_path: Path, words: tuple[str, ...]) -> None:
    model = {
        f"layers.{i}.{word}": draw(4, 4) for i in range(3) for word in (*words, "proj.weight", "norm.weight")
    }
    stored(tmp_path / "a.safetensors", model)
    assert lt.inspect(tmp_path / "a.safetensors").kinds == ("full model",)


def test_t_lora_is_refused_by_name(tmp_path: Path) -> None:
    words = ("q_layer.weight", "p_layer.weight", "lambda_layer")
    stored(tmp_path / "a.safetensors", {f"lora_unet_q.{word}": draw(4, 4) for word in words})
    adapter = lt.load(tmp_path / "a.safetensors")
    assert adapter.kinds == ("tlora",)
    with pytest.raises(Unsupported, match="lora_unet_q is T-LoRA"):
        adapter.require_computable()


def test_two_dialects_with_as_many_modules_are_ambiguous(tmp_path: Path) -> None:
    def pair(stem: str) -> Tensors:
        return {f"{stem}.lora_down.weight": draw(4, 8), f"{stem}.lora_up.weight": draw(6, 4)}

    one, other = pair("lora_unet_a"), pair("diffusion_model.blocks.0.self_attn.q")
    stored(tmp_path / "a.safetensors", {**one, **other})
    with pytest.raises(
        AmbiguousFormat, match=r"(?s)lora_unet_a.*diffusion_model|diffusion_model.*lora_unet_a"
    ) as caught:
        lt.load(tmp_path / "a.safetensors")
    assert "kohya" in str(caught.value)
    assert "comfy" in str(caught.value)
    stored(tmp_path / "b.safetensors", {**one, **other, **pair("lora_unet_b")})
    adapter = lt.load(tmp_path / "b.safetensors")
    assert (adapter.format, len(adapter.modules)) == ("kohya", 3)
    assert any("diffusion_model" in warning for warning in adapter.warnings)
    assert "names-mixed" in {finding.code for finding in lt.validate(tmp_path / "b.safetensors").findings}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("q.lora_a", "q.lora_b"), ("q.lora_A.weight", "q.lora_B.weight")),
        (("q.lora_A", "q.lora_B"), ("q.lora_down.weight", "q.lora_up.weight")),
        (("q.lora_a", "q.lora_b"), ("k.lora_A", "k.lora_B")),
    ],
)
def test_two_readers_of_one_file_are_ambiguous(
    tmp_path: Path, one: tuple[str, str], other: tuple[str, str]
) -> None:
    stored(tmp_path / "a.safetensors", {key: draw(8, 8) for key in (*one, *other)})
    with pytest.raises(AmbiguousFormat, match=rf"by {one[0]} and .* by {other[0]}"):
        lt.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "stem",
    ["transformer.h.0.attn.c_attn", "model.layers.0.self_attn.q_proj", "transformer.blocks.0.ffn.up_proj"],
)
def test_a_language_model_is_no_diffusion_model(tmp_path: Path, stem: str) -> None:
    stored(
        tmp_path / "a.safetensors", {f"{stem}.lora_A.weight": draw(4, 8), f"{stem}.lora_B.weight": draw(6, 4)}
    )
    adapter = lt.load(tmp_path / "a.safetensors")
    assert adapter.format == "bare-peft"
    assert adapter.modules[stem].scaling is None
    told = lt.load(tmp_path / "a.safetensors", alpha=8)
    assert (told.format, told.modules[stem].scaling) == ("peft", 2.0)


def test_textual_inversions_are_carried(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_q.lora_down.weight": draw(4, 8), "lora_unet_q.lora_up.weight": draw(6, 4),
        "bundle_emb.mine.emb_params": draw(2, 8), "bundle_emb.mine.clip_l": draw(2, 8), "_aux.1a2b": draw(3),
    }  # fmt: skip
    stored(tmp_path / "a.safetensors", tensors)
    adapter = lt.load(tmp_path / "a.safetensors")
    adapter.require_computable()
    assert {key: extra.role for key, extra in adapter.extras.items()} == {
        "bundle_emb.mine.emb_params": "carried", "bundle_emb.mine.clip_l": "carried", "_aux.1a2b": "training_only",
    }  # fmt: skip
    assert lt.validate(tmp_path / "a.safetensors").ok


STEMS = st.sampled_from(
    ["lora_unet_q", "lora_te_q", "unet.mid_block.resnets.0.conv1", "diffusion_model.blocks.0.ffn.0", "layers.0.q_proj",
     "base_model.model.q", "double_blocks.0.processor.qkv_lora1", "", "unet:0", "w_a_000", "7"]
)  # fmt: skip
TAILS = st.sampled_from(
    [*SUFFIXES, "_lora.down.weight", ".lora_a", ".lora_b", ":up", ":down", ".weight", ".m", ".scale"]
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6]), max_size=4).map(tuple)
KINDS_OF_NUMBERS = st.sampled_from([np.float32, np.float16, np.float64, np.int64, np.bool_])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shapes=st.dictionaries(st.builds(str.__add__, STEMS, TAILS), st.tuples(SHAPES, KINDS_OF_NUMBERS), max_size=6),
    metadata=st.sampled_from([{}, {"lora_adapter_metadata": '{"unet.r": 3, "unet.rank_pattern": {"(": 2}}'}]),
)  # fmt: skip
def test_whatever_keys_a_file_has_there_is_an_answer(
    shapes: dict[str, tuple[tuple[int, ...], Any]], metadata: dict[str, str]
) -> None:
    source = MemorySource({key: np.ones(shape, kind) for key, (shape, kind) in shapes.items()}, metadata)
    try:
        adapter = recognise("the file", source, {})
    except LoratoolsError:
        return
    claimed = [ref.name for module in adapter.modules.values() for ref in module.tensors.values()]
    assert sorted([*claimed, *adapter.extras]) == sorted(shapes)
    assert adapter.format
    assert adapter.kinds
    tensors = {key: np.ones(shape, kind) for key, (shape, kind) in shapes.items()}
    lt.validate(tensors)
    lt.inspect(tensors)
    if adapter.refusal is None:
        for module in adapter.modules.values():
            assert module.scaling is not None or module.kind == "ia3"
            if module.is_delta and module.changes_weight:
                rows = module.load(double=True).rows(0, module.shape[0])  # type: ignore[attr-defined]
                assert rows.size == np.prod(module.shape)


# --- numbers instead of names --------------------------------------------------------------------------------


def numbered(context: int = 768, layers: int = 12) -> dict[str, tuple[int, int]]:
    """The names and shapes in the trainer's order, from the modules that diffusers and transformers make."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=context)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=layers))
    names: dict[str, tuple[int, int]] = {}
    for component, model in (("unet", unet), ("text_encoder.text_model", getattr(text, "text_model", text))):
        blocks: dict[str, dict[str, tuple[int, int]]] = {}
        for name, module in model.named_modules():
            words = name.split(".")
            if isinstance(module, torch.nn.Linear) and {"attn1", "attn2", "self_attn", "ff"} & set(words):
                last = next(word for word in ("attn1", "attn2", "self_attn", "ff") if word in words)
                if last == "ff" and not name.endswith("net.0.proj"):
                    continue
                owner = name[: name.index(last)]
                blocks.setdefault(owner, {})[name] = (module.out_features, module.in_features)
        for found in blocks.values():  # in the diffusers of that time the feed-forward stood between the two
            order = sorted(
                found, key=lambda n: next(i for i, w in enumerate(("attn1", "ff", "attn2", "self")) if w in n)
            )
            names |= {f"{component}.{name}": found[name] for name in order}
    return names


def test_cloneofsimo_numbers_are_names_in_the_order_of_the_modules(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import torch
    from safetensors.torch import save_file

    wanted = numbered()
    tensors, counts = {}, {"unet": 0, "text_encoder": 0}
    for name, (out, into) in wanted.items():
        component = name.partition(".")[0]
        stem = f"{component}:{counts[component]}"
        tensors |= {f"{stem}:up": torch.zeros(out, 1), f"{stem}:down": torch.zeros(1, into)}
        counts[component] += 1
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = lt.load(tmp_path / "a.safetensors")
    adapter.require_computable()
    named = {module.tensors["up"].name.removesuffix(":up"): name for name, module in adapter.modules.items()}
    place = {"unet": 0, "text_encoder": 0}
    for name in wanted:
        component = name.partition(".")[0]
        assert named[f"{component}:{place[component]}"] == name
        place[component] += 1


def test_numbers_that_prove_no_order_stay_numbers(tmp_path: Path) -> None:
    tensors = {
        f"unet:{i}:{side}": draw(*shape) for i in (0, 1) for side, shape in (("up", (6, 1)), ("down", (1, 8)))
    }
    stored(tmp_path / "a.safetensors", {**tensors, "<s1>": draw(8)})
    adapter = lt.load(tmp_path / "a.safetensors")
    assert list(adapter.modules) == ["unet:0", "unet:1"]
    assert adapter.extras["<s1>"].role == "carried"
    adapter.require_computable()


def test_vectors_are_factors_of_rank_one(tmp_path: Path) -> None:
    values = stored(tmp_path / "a.safetensors", {"unet:0:up": draw(6), "unet:0:down": draw(8)})
    (module,) = lt.load(tmp_path / "a.safetensors").modules.values()
    np.testing.assert_allclose(
        delta(module), np.outer(values["unet:0:up"], values["unet:0:down"]), rtol=1e-13
    )


def spellings(family: Architecture) -> Iterator[tuple[str, str]]:
    """Every name of a denoiser's modules, and what stands before it: nothing, or each known prefix."""
    for component in family.components:
        if component.name not in {"unet", "transformer"}:
            continue
        for weight in component.weights:
            for prefix in ("", *component.native):
                yield (f"{prefix}.{weight.native}" if prefix else weight.native), weight.native
            for prefix in component.kohya:
                yield f"{prefix}_{weight.native.replace('.', '_')}", weight.native
            for part in weight.parts:
                yield part.name, weight.native
                yield f"{component.name}.{part.name}", weight.native
                yield f"base_model.model.{part.name}", weight.native


HEADS = (
    "base_model.model.", "lora_unet_", "lora_transformer_", "lycoris_", "oft_unet_", "Hunyuan_video_I2V_lora_", "unet.",
    "transformer.",
)  # fmt: skip


@pytest.mark.parametrize("family", architectures())
def test_every_name_of_an_architecture_leads_to_its_weight(family: str) -> None:
    """Whole files of names under one prefix, as tools write them, without their prefix too."""
    known = architecture(family)
    files: dict[str, dict[str, str]] = {}
    for name, native in spellings(known):
        head = next((prefix for prefix in HEADS if name.startswith(prefix)), "")
        whose = "native" if name.endswith((native, native.replace(".", "_"))) else "diffusers"
        files.setdefault(f"{head} {whose} {name.removesuffix(native) if whose == 'native' else ''}", {})[
            name
        ] = native
    for names in files.values():
        keys = {f"{name}.lora_down.weight": split_key(f"{name}.lora_down.weight") for name in names}
        read = name_modules({key: parts for key, parts in keys.items() if parts is not None})
        lost = [
            name
            for name in names
            if (place := known.lookup(read.modules[name])) is None or place.weight.native != names[name]
        ]
        assert not lost, (read.format, lost[:3], [read.modules[name] for name in lost[:3]])


# --- the verbs -----------------------------------------------------------------------------------------------


def test_one_adapter_under_two_namings_is_identical(tmp_path: Path) -> None:
    """By diffusers' attention processors, and as diffusers wrote them later."""
    down, up = draw(4, 8), draw(6, 4)
    head = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    stored(
        tmp_path / "a.safetensors",
        {f"{head}.processor.to_q_lora.down.weight": down, f"{head}.processor.to_q_lora.up.weight": up},
    )
    turn = draw(4, 4)
    stored(
        tmp_path / "b.safetensors",
        {
            f"unet.{head}.to_q.lora.down.weight": turn @ down,
            f"unet.{head}.to_q.lora.up.weight": up @ np.linalg.inv(turn),
        },
    )
    report = lt.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert report.identical, report
    assert len(report.modules) == 1


@pytest.mark.parametrize("name", ["lora", "CP convolution", "loha", "lokr, both sides in factors"])
def test_the_verbs_take_every_kind_of_delta(tmp_path: Path, name: str) -> None:
    stem, (_, make, formula) = "lora_unet_q", KINDS[name]
    values = stored(
        tmp_path / "a.safetensors",
        {f"{stem}.{k}": v for k, v in make().items()} | {f"{stem}.alpha": np.array(ALPHA)},
    )
    wanted = formula({key.removeprefix(stem + "."): value for key, value in values.items()})
    flat = wanted.reshape(wanted.shape[0], -1)
    report = lt.inspect(tmp_path / "a.safetensors", spectrum=True)
    expected = np.linalg.svd(flat, compute_uv=False)
    found = np.zeros(len(expected))
    kept = [value for value in report.modules[0].singular_values if value > 1e-9][: len(found)]
    found[: len(kept)] = kept
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    lowered = lt.reduce(tmp_path / "a.safetensors", rank=2)
    left = next(iter(lowered.adapter.modules.values()))
    error = np.linalg.norm(flat - left.load(double=True).rows(0, len(flat)))  # type: ignore[attr-defined]
    assert error == pytest.approx(np.sqrt((expected[2:] ** 2).sum()), rel=1e-4)
    summed = lt.combine([tmp_path / "a.safetensors", tmp_path / "a.safetensors"], weights=[0.5, 2.0])
    both = next(iter(summed.adapter.modules.values())).load(double=True)
    np.testing.assert_allclose(both.rows(0, len(flat)), 2.5 * flat, rtol=1e-4, atol=1e-4)  # type: ignore[attr-defined]


def test_headers_are_read_without_numpy(tmp_path: Path) -> None:
    tensors = {DOWN: draw(4, 8), UP: draw(6, 4), "lora_unet_q.alpha": np.array(2.0)}
    stored(tmp_path / "a.safetensors", tensors, "bfloat16", ss_base_model_version="sd_v1")
    code = (
        "import sys; import loratools as lt; "
        f"report = lt.inspect({str(tmp_path / 'a.safetensors')!r}); "
        "assert report.modules[0].scaling == 0.5; assert 'numpy' not in sys.modules, 'numpy was loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_reads_a_dialect(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from loratools.cli.app import app

    stored(tmp_path / "a.safetensors", {DOWN: draw(4, 8), UP: draw(6, 4), "lora_unet_q.alpha": np.array(2.0)})
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.safetensors"), "--json"])
    document = json.loads(result.stdout)
    assert (result.exit_code, document["format"]) == (0, "kohya")
    assert document["scaling"] == {"min": 0.5, "max": 0.5}
    same = CliRunner().invoke(app, ["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "a.safetensors")])
    assert same.exit_code == 0, same.output


@pytest.mark.parametrize(
    ("said", "known"), [("1,0,1", True), ("true,false", True), ("0,0", False), ("2", False)]
)
def test_parts_of_a_fused_weight_are_said_as_a_list(tmp_path: Path, said: str, known: bool) -> None:
    from click.testing import CliRunner

    from loratools.cli.app import app

    count = sum(word in {"1", "true"} for word in said.split(","))
    tensors = {"q.lora_A": draw(2 * max(count, 1), 8), "q.lora_B": draw(6 * max(count, 1), 2)}
    stored(tmp_path / "a.safetensors", tensors)
    arguments = ["inspect", str(tmp_path / "a.safetensors"), "--alpha", "4", "--enable-lora", said, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code == 0) == known, result.output
    if known:
        assert json.loads(result.stdout)["modules"][0]["shape"] == [6 * len(said.split(",")), 8]


def test_a_scaled_oft_is_refused_by_its_key() -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{stem}.oft_R.weight": np.zeros((10, 496), "f4"),
        f"{stem}.oft_R.scaled_oft": np.ones((), "f4"),
    }
    adapter = lt.load(tensors)
    with pytest.raises(Unsupported, match=r"oft_R\.scaled_oft"):
        adapter.require_computable()
