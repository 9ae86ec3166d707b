"""A quantised base is refused by the name of its scheme; a learnt scale is not mistaken for one."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.errors import Unsupported
from loratools.models import _MARKS, open_base, quantisation_scheme
from tests.small import base_tensors, contents, write_base, write_small_adapter

_I8, _U8, _I32, _U32 = (np.zeros((12, 8), kind) for kind in (np.int8, np.uint8, np.int32, np.uint32))
_F32, _F16 = np.ones((12, 1), np.float32), np.ones((12, 1), np.float16)
_F8 = np.zeros((12, 8), ml_dtypes.float8_e4m3fn)
_W = "layers.0.mlp.up_proj.weight"
_STEM = "layers.0.mlp.up_proj"

# By scheme: the tensors that its checkpoints have for one linear layer.
_SCHEMES = {
    "bitsandbytes 4-bit": {
        _W: _U8, f"{_W}.absmax": _F32, f"{_W}.quant_map": _F32, f"{_W}.quant_state.bitsandbytes__nf4": _U8,
    },
    "bitsandbytes 8-bit": {_W: _I8, f"{_STEM}.SCB": _F32, f"{_STEM}.weight_format": np.zeros((), np.uint8)},
    "mxfp4": {"layers.0.mlp.experts.down_proj_blocks": _U8, "layers.0.mlp.experts.down_proj_scales": _U8},
    "nvfp4": {_W: _U8, f"{_W}_scale": _F8, f"{_W}_scale_2": _F32, f"{_STEM}.input_scale": _F32},
    "compressed-tensors": {f"{_W}_packed": _I32, f"{_W}_scale": _F16, f"{_W}_shape": np.zeros(2, np.int64)},
    "GPTQ or AWQ": {f"{_STEM}.qweight": _I32, f"{_STEM}.qzeros": _I32, f"{_STEM}.scales": _F16},
    "AQLM": {f"{_STEM}.codes": _I8, f"{_STEM}.codebooks": _F16, f"{_STEM}.scales": _F16},
    "HQQ": {f"{_STEM}.W_q": _U8, f"{_STEM}.scale": _F16, f"{_STEM}.zero": _F16},
    "quanto": {f"{_W}._data": _I8, f"{_W}._scale": _F16},
    "torchao": {f"{_STEM}._weight_qdata": _I8, f"{_STEM}._weight_scale": _F16},
    "MLX": {_W: _U32, f"{_STEM}.scales": _F16, f"{_STEM}.biases": _F16},
    "fp8 blocks": {_W: _F8, f"{_W}_scale_inv": _F32},
    "scaled integers or fp8": {_W: _I8, f"{_W}_scale": _F32},
}  # fmt: skip


def with_tensors(folder, extra):
    """A plain base, with some tensors more."""
    base = write_base(folder)
    tensors = {**load_file(base / "model.safetensors"), **extra}
    lt_bytes = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(lt_bytes, base / "model.safetensors")
    return base


def test_every_scheme_has_a_case():
    assert {scheme for scheme, _, _ in _MARKS} == set(_SCHEMES)


@pytest.mark.parametrize("scheme", _SCHEMES)
def test_scheme_is_refused_by_name(tmp_path, scheme):
    base = with_tensors(tmp_path / "base", _SCHEMES[scheme])
    adapter = write_small_adapter(tmp_path / "lora")
    before = contents(tmp_path)
    with pytest.raises(Unsupported) as caught:
        lt.merge(base, adapter, tmp_path / "out")
    assert str(caught.value) == f"{base} is quantised ({scheme}); a delta cannot be added to its codes"
    assert "original 16-bit checkpoint" in caught.value.hint
    assert contents(tmp_path) == before


def test_scheme_is_refused_in_memory_too(tmp_path):
    adapter = write_small_adapter(tmp_path / "lora")
    with pytest.raises(Unsupported, match=r"the state dict is quantised \(mxfp4\)"):
        lt.merge({**base_tensors(), **_SCHEMES["mxfp4"]}, adapter)


@pytest.mark.parametrize("suffix", ["_scale", "_scales", "_scale_inv"])
@pytest.mark.parametrize(
    "codes", [_F8, _I8, _U8, np.zeros((12, 8), ml_dtypes.float8_e5m2)], ids=lambda c: c.dtype.name
)
def test_scaled_codes_of_any_kind(tmp_path, suffix, codes):
    base = with_tensors(tmp_path / "base", {_W: codes, _W + suffix: _F32})
    expected = "fp8 blocks" if suffix == "_scale_inv" else "scaled integers or fp8"
    assert quantisation_scheme(open_base(base)) == expected


@pytest.mark.parametrize(
    "kind",
    ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn"],
)
def test_weights_of_eight_bits_or_fewer_without_a_scale(kind):
    tensors = {**base_tensors(), _W: np.zeros((12, 8), getattr(ml_dtypes, kind))}
    assert quantisation_scheme(open_base(tensors)).endswith(f"weights ({_W})")


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "FP8"),
        ({"quantization_config": {"bits": 4}}, "an unnamed scheme"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "an unnamed scheme"),
    ],
)
def test_what_the_configuration_declares(tmp_path, config, scheme):
    base = write_base(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=rf"is quantised \({scheme}\)"):
        lt.merge(base, write_small_adapter(tmp_path / "lora"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Names that look like a scheme's, and are the model's own.
_INNOCENT = {
    "logit_scale": np.ones((), np.float32),  # CLIP
    "logit_bias": np.ones((), np.float32),  # SigLIP
    "encoder.layer.0.layer_scale_parameter": np.ones(8, np.float32),  # ConvNeXt
    "encoder.layer.0.lambda_1": np.ones(8, np.float32),  # BEiT
    "model.embed_scale": np.ones(1, np.float32),  # Gemma's and BART's buffer
    "model.embed_tokens.embed_scale": np.ones((), np.float32),
    "layers.0.attn.q_scale": np.ones(8, np.float32),
    "layers.0.attn.q": np.ones((8, 8), np.float32),  # a weight with a learnt gain beside it
    "layers.0.attn.out": np.ones((8, 8), np.float16),
    "layers.0.attn.out_scale": np.ones(8, np.float16),
    "layers.0.mlp.fc.weight": np.ones((8, 8), np.float32),
    "layers.0.mlp.fc.weight_scale": np.ones(8, np.float32),
    "layers.0.mlp.fc.scales": np.ones(8, np.float32),
    "layers.0.ssm_blocks": np.ones((8, 8), np.float32),
    "layers.0.ssm_scales": np.ones(8, np.float32),
    "layers.0.attn.W_q": np.ones((8, 8), np.float32),
    "quantizer.codebooks": np.ones((8, 8), np.float32),  # an audio codec
    "model.embeddings.position_ids": np.arange(8),
    "mask": np.ones(8, np.bool_),
    "norm.absmax": np.ones(8, np.float32),
}


@pytest.mark.parametrize("name", _INNOCENT)
def test_innocent_names(name):
    assert quantisation_scheme(open_base({**base_tensors(), name: _INNOCENT[name]})) is None


def test_a_base_with_all_of_them_merges(tmp_path):
    base = with_tensors(tmp_path / "base", _INNOCENT)
    lt.merge(base, write_small_adapter(tmp_path / "lora"), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in _INNOCENT.items():
        np.testing.assert_array_equal(merged[name], value)


@pytest.mark.parametrize(
    "config", [{"quantization_config": None}, {"quantization_config": {}}, {"text_config": 3}]
)
def test_an_empty_declaration_declares_nothing(tmp_path, config):
    base = write_base(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    assert quantisation_scheme(open_base(base)) is None
