"""Element types: the same values as torch and ml_dtypes read, and one rounding to nearest even."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools.dtypes import DTYPES, accumulator, compatible, dtype, largest, narrow, numpy_dtype, widen
from loratools.errors import Unsupported
from loratools.tensors.safetensors import SafetensorsFile

torch.set_num_threads(1)

_TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
_FLOATS = ["F16", "BF16", "F32", "F64"]


def random_bytes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def in_torch(name, raw):
    return torch.from_numpy(raw.copy()).view(_TORCH[name])


def assert_values(actual, expected):
    """Equal, with every NaN a NaN, every zero with its sign."""
    np.testing.assert_array_equal(actual, expected)
    if actual.dtype.kind == "f":
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(actual[number]), np.signbit(expected[number]))


def test_every_type_of_torch_is_here():
    assert set(_TORCH) | {"F4", "F6_E2M3", "F6_E3M2"} == set(DTYPES)


@pytest.mark.parametrize("name", DTYPES)
def test_reference_reader_knows_the_type_and_its_size(name, tmp_path):
    size = DTYPES[name].nbytes(8)
    text = json.dumps({"w": {"dtype": name, "shape": [8], "data_offsets": [0, size]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.get_slice("w").get_dtype() == name
    assert SafetensorsFile(tmp_path / "w.safetensors").specs["w"].nbytes == size


@pytest.mark.parametrize("name", _TORCH)
def test_written_by_torch_read_by_us(name, tmp_path):
    size = DTYPES[name].bits // 8
    raw = random_bytes(size * 240) if name != "BOOL" else random_bytes(240) % 2
    tensor = in_torch(name, raw).reshape(4, 60)
    path = tmp_path / "w.safetensors"
    save_file({"w": tensor}, path)
    source = SafetensorsFile(path)
    assert (source.specs["w"].dtype.name, source.specs["w"].shape) == (name, (4, 60))
    np.testing.assert_array_equal(source.read_bytes("w"), raw)
    if DTYPES[name].kind == "float":
        expected = tensor.reshape(-1).to(torch.float64 if name == "F64" else torch.float32).numpy()
    else:
        expected = tensor.reshape(-1).numpy()
    values = source.read("w")
    assert values.dtype == expected.dtype
    assert_values(values, expected)
    for start, stop in ((0, 0), (0, 1), (7, 8), (59, 181), (100, None), (240, 240)):
        assert_values(source.read("w", start, stop), expected[start:stop])
        out = np.empty(expected[start:stop].shape, expected.dtype)
        assert source.read("w", start, stop, out=out) is out
        assert_values(out, expected[start:stop])


def test_float4_written_by_torch_read_by_us(tmp_path):
    raw = random_bytes(120)
    save_file({"w": torch.from_numpy(raw.copy()).view(torch.float4_e2m1fn_x2).reshape(4, 30)}, tmp_path / "w")
    source = SafetensorsFile(tmp_path / "w")
    assert source.specs["w"].shape == (4, 60)
    nibbles = np.stack([raw & 15, raw >> 4], 1).reshape(-1)
    expected = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert set(np.abs(expected)) == {0, 0.5, 1, 1.5, 2, 3, 4, 6}  # what the type can say
    np.testing.assert_array_equal(source.read("w"), expected)
    np.testing.assert_array_equal(source.read("w", 2, 100), expected[2:100])
    np.testing.assert_array_equal(source.read_bytes("w", 2, 100), raw[1:50])
    assert load_file(tmp_path / "w")["w"].view(torch.uint8).reshape(-1).tolist() == raw.tolist()
    with pytest.raises(IndexError, match="share a byte"):
        source.read("w", 1, 3)


@pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2"])
def test_six_bit_floats_are_copied_but_not_computed_with(name, tmp_path):
    text = json.dumps({"w": {"dtype": name, "shape": [8], "data_offsets": [0, 6]}}).encode()
    (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(6)))
    source = SafetensorsFile(tmp_path / "w")
    assert source.read_bytes("w").tolist() == list(range(6))
    with pytest.raises(Unsupported, match=f"{name} can be copied but not computed with"):
        source.read("w")


@pytest.mark.parametrize("name", ["F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_every_code_of_eight_bits(name):
    codes = np.arange(256, dtype=np.uint8)
    expected = in_torch(name, codes).float().numpy()
    assert_values(widen(codes, DTYPES[name]), expected)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_code_of_sixteen_bits_there_and_back(name):
    codes = np.arange(1 << 16, dtype=np.uint16)
    wide = widen(codes.view(np.uint8), DTYPES[name])
    assert_values(wide, in_torch(name, codes.view(np.uint8)).float().numpy())
    back = narrow(wide, DTYPES[name], np.empty(codes.nbytes, np.uint8)).view(np.uint16)
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(back[number], codes[number])
    assert np.isnan(widen(back.view(np.uint8), DTYPES[name])[~number]).all()


_HARD = np.array(
    [
        0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-11,
        1 + 3 * 2**-11, 65504, 65519.996, 65520, -65520, 3.3895314e38, 3.4e38, -3.4028235e38, 2**-14, 2**-24,
        2**-25, 2**-25 * 1.01,
        3 * 2**-25, 1e-40, -1e-40, 1.1754942e-38, 2**-133, 2**-134, 2**-134 * 1.01, 1e-45, -1e-45,
    ],
    np.float32,
)  # fmt: skip


def assert_rounds_as_torch(values, name):
    ours = narrow(values, DTYPES[name], np.empty(DTYPES[name].nbytes(values.size), np.uint8))
    expected = torch.from_numpy(values.copy()).to(_TORCH[name])
    theirs = expected.view(torch.uint8).numpy().reshape(-1)
    nan = np.isnan(values)
    width = DTYPES[name].bits // 8
    np.testing.assert_array_equal(ours.reshape(-1, width)[~nan], theirs.reshape(-1, width)[~nan])
    assert np.isnan(widen(ours, DTYPES[name])[nan]).all()


@pytest.mark.parametrize("name", _FLOATS)
def test_rounding_of_hard_cases(name):
    assert_rounds_as_torch(_HARD, name)


@pytest.mark.parametrize("name", ["F16", "BF16"])
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_rounding_of_any_float32(name, bits):
    assert_rounds_as_torch(np.array(bits, np.uint32).view(np.float32), name)


@pytest.mark.parametrize("name", ["F16", "BF16"])
@given(code=st.integers(0, 2**15 - 1), nudge=st.sampled_from([-1, 0, 1]))
def test_ties_go_to_the_even_neighbour(name, code, nudge):
    """Around the middle of two neighbours, against exact arithmetic."""
    pair = widen(np.array([code, code + 1], np.uint16).view(np.uint8), DTYPES[name])
    if not np.isfinite(pair).all():
        return
    pair = pair.astype(np.float64)
    middle = np.float32((pair[0] + pair[1]) / 2)
    if Fraction(float(middle)) * 2 != Fraction(pair[0]) + Fraction(pair[1]):
        return  # beyond float32: no value lies in the middle
    value = np.nextafter(middle, np.float32(nudge * np.inf)) if nudge else middle
    rounded = narrow(np.array([value], np.float32), DTYPES[name], np.empty(2, np.uint8)).view(np.uint16)[0]
    expected = code + (code & 1) if not nudge else code + (nudge > 0)
    assert rounded == expected


@given(st.floats(width=64))
def test_float64_to_float32_rounds_once(value):
    out = narrow(np.array([value], np.float64), DTYPES["F32"], np.empty(4, np.uint8)).view(np.float32)
    expected = torch.tensor([value], dtype=torch.float64).float().numpy()
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", [name for name in DTYPES if name not in _FLOATS])
def test_no_rounding_to_other_types(name):
    assert not compatible(DTYPES[name])
    with pytest.raises(Unsupported, match=f"cannot be rounded to {name}"):
        narrow(np.zeros(2, np.float32), DTYPES[name], np.empty(16, np.uint8))


@pytest.mark.parametrize("name", [n for n in _TORCH if DTYPES[n].kind == "float"])
def test_largest_is_torchs(name):
    assert largest(DTYPES[name]) == torch.finfo(_TORCH[name]).max
    assert math.isfinite(largest(DTYPES[name]))


def test_accumulators():
    assert {name for name in DTYPES if accumulator(DTYPES[name]).name == "F32"} == {
        name for name, one in DTYPES.items() if one.kind == "float" and name != "F64"
    }
    assert accumulator(DTYPES["F64"]).name == "F64"
    assert accumulator(DTYPES["I64"]).name == "I64"


def test_views_cost_nothing():
    raw = random_bytes(64)
    assert widen(raw, DTYPES["F32"]).base is not None
    assert np.shares_memory(widen(raw, DTYPES["F64"]), raw)
    assert not np.shares_memory(widen(raw, DTYPES["BF16"]), raw)


@pytest.mark.parametrize(
    ("said", "meant"),
    [("bf16", "BF16"), ("bfloat16", "BF16"), ("FP16", "F16"), ("half", "F16"), ("float", "F32"),
     ("f64", "F64"),
     ("F8_E4M3", "F8_E4M3"), ("i8", "I8"), ("double", "F64")],
)  # fmt: skip
def test_what_users_call_them(said, meant):
    assert dtype(said).name == meant


def test_a_type_nobody_knows():
    with pytest.raises(Unsupported, match="unknown dtype 'fp7'"):
        dtype("fp7")


def test_numpy_types_have_the_stored_size():
    for stored in DTYPES.values():
        if stored.numpy is not None:
            assert numpy_dtype(stored).itemsize == max(1, stored.bits // 8)


def test_float64_is_rounded_to_bfloat16_once():
    """A value just above a tie, which float32 would round onto the tie and bfloat16 then down."""
    tie = 1 + 2.0**-8
    values = np.array(
        [tie + 2.0**-40, tie - 2.0**-40, tie, -tie - 2.0**-40, np.inf, -np.inf, np.nan, 1e300, 0.0]
    )
    raw = narrow(values, dtype("BF16"), np.empty(2 * values.size, np.uint8))
    rounded = raw.view(ml_dtypes.bfloat16).astype(np.float64)
    above = 1 + 2.0**-7
    np.testing.assert_array_equal(rounded, [above, 1, 1, -above, np.inf, -np.inf, np.nan, np.inf, 0])
