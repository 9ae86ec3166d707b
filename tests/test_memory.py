"""State dicts as source and sink: numpy and torch, packed types, ties, views; the bytes that files give."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.dtypes import DTYPES
from loratools.errors import CorruptFile, Unsupported
from loratools.tensors.base import TensorSpec
from loratools.tensors.memory import MemorySource, from_bytes, is_torch
from loratools.tensors.safetensors import SafetensorsFile
from tests.small import LAYERS, SHAPES, base_tensors, write_base, write_small_adapter

torch.set_num_threads(1)

_TORCH = [
    torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int16, torch.uint16, torch.float16, torch.bfloat16,
    torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64, torch.uint64,
]  # fmt: skip
_NUMPY = [t for t in DTYPES.values() if t.numpy is not None and t.bits >= 8]


def torch_values(kind, shape=(4, 6)):
    size = torch.empty((), dtype=kind).element_size()
    count = int(np.prod(shape)) * size
    raw = np.random.default_rng(0).integers(0, 2 if kind == torch.bool else 256, count, np.uint8)
    return torch.from_numpy(raw).view(kind).reshape(shape)


def same_bytes(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return bytes(a.contiguous().reshape(-1).view(torch.uint8).numpy()) == bytes(
        b.contiguous().reshape(-1).view(torch.uint8).numpy()
    )


@pytest.mark.parametrize("kind", _TORCH, ids=str)
def test_torch_as_the_file_has_it(kind, tmp_path):
    tensor = torch_values(kind)
    save_file({"w": tensor}, tmp_path / "w")
    file, memory = SafetensorsFile(tmp_path / "w"), MemorySource({"w": tensor})
    assert dict(memory.specs) == dict(file.specs)
    for start, stop in ((0, None), (3, 17), (5, 5), (23, 24)):
        np.testing.assert_array_equal(memory.read_bytes("w", start, stop), file.read_bytes("w", start, stop))
        np.testing.assert_array_equal(memory.read("w", start, stop), file.read("w", start, stop))
    out = np.empty(24, memory.read("w").dtype)
    assert memory.read("w", out=out) is out
    back = from_bytes(file.read_bytes("w"), file.specs["w"], torch_out=True)
    assert same_bytes(back, tensor)


@pytest.mark.parametrize("stored", _NUMPY, ids=str)
def test_numpy_as_the_file_has_it(stored):
    kind = np.dtype(getattr(ml_dtypes, stored.numpy, None) or stored.numpy)
    top = 2 if stored.name == "BOOL" else 256
    values = np.random.default_rng(0).integers(0, top, 24 * kind.itemsize, np.uint8).view(kind).reshape(4, 6)
    source = MemorySource({"w": values})
    assert source.specs["w"] == TensorSpec(stored, (4, 6))
    assert source.read_bytes("w", 3, 17).tobytes() == values.reshape(-1)[3:17].tobytes()
    back = from_bytes(source.read_bytes("w"), source.specs["w"], torch_out=False)
    assert (back.dtype, back.shape, back.tobytes()) == (kind, (4, 6), values.tobytes())


def test_float4_packs_as_torch_packs_it(tmp_path):
    packed = torch.arange(48, dtype=torch.uint8).mul(5).reshape(4, 12).view(torch.float4_e2m1fn_x2)
    save_file({"w": packed}, tmp_path / "w")
    file, memory = SafetensorsFile(tmp_path / "w"), MemorySource({"w": packed})
    assert memory.specs["w"] == file.specs["w"] == TensorSpec(DTYPES["F4"], (4, 24))
    np.testing.assert_array_equal(memory.read_bytes("w", 2, 40), file.read_bytes("w", 2, 40))
    np.testing.assert_array_equal(memory.read("w"), file.read("w"))
    unpacked = from_bytes(file.read_bytes("w"), file.specs["w"], torch_out=False)
    assert (unpacked.dtype.name, unpacked.shape) == ("float4_e2m1fn", (4, 24))
    assert MemorySource({"w": unpacked}).read_bytes("w").tobytes() == file.read_bytes("w").tobytes()
    again = from_bytes(file.read_bytes("w"), file.specs["w"], torch_out=True)
    assert again.dtype == packed.dtype
    assert torch.equal(again.view(torch.uint8), packed.view(torch.uint8))
    with pytest.raises(Unsupported, match="w: 3 elements of F4 do not fill bytes"):
        MemorySource({"w": np.zeros(3, ml_dtypes.float4_e2m1fn)})


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t[1:],
        lambda t: t.reshape(2, 3, 4)[:, 1],
        lambda t: t[2, 3],
    ],
    ids=["transposed", "strided", "offset", "middle", "scalar"],
)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_views(view, library):
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = np.asarray(view(whole))
    value = view(torch.from_numpy(whole)) if library == "torch" else expected
    source = MemorySource({"w": value})
    assert source.specs["w"].shape == expected.shape
    np.testing.assert_array_equal(source.read("w"), expected.reshape(-1))
    for start in range(expected.size + 1):
        for stop in range(start, expected.size + 1):
            np.testing.assert_array_equal(source.read("w", start, stop), expected.reshape(-1)[start:stop])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3)])
def test_scalars_and_empty_tensors(shape):
    for value in (np.ones(shape, np.float16), torch.ones(shape, dtype=torch.bfloat16)):
        source = MemorySource({"w": value})
        assert source.specs["w"].shape == shape
        assert source.read("w").shape == (int(np.prod(shape)),)
        assert from_bytes(source.read_bytes("w"), source.specs["w"], torch_out=is_torch(value)).shape == shape


def test_parameters_that_require_gradients_and_lazy_conjugates():
    parameter = torch.nn.Parameter(torch.arange(4.0))
    np.testing.assert_array_equal(MemorySource({"w": parameter}).read("w"), [0, 1, 2, 3])
    conjugate = torch.tensor([1 + 2j], dtype=torch.complex64).conj()
    assert MemorySource({"w": conjugate}).read("w").tolist() == [1 - 2j]


@pytest.mark.parametrize(("start", "stop"), [(0, 25), (-1, 3), (9, 3)])
def test_ranges_are_checked_as_in_a_file(start, stop):
    with pytest.raises(IndexError, match="of a tensor of 24"):
        MemorySource({"w": np.zeros((4, 6), np.float32)}).read("w", start, stop)


def test_out_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match="w: out must be contiguous"):
        MemorySource({"w": np.zeros(4, np.float32)}).read("w", out=np.empty((4, 2), np.float32)[:, 0])


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([1.0], "w: list is neither a numpy array nor a torch tensor"),
        (np.zeros(2, ">f4"), "w: no safetensors type for >f4"),
        (np.array(["a"]), "w: no safetensors type for <U1"),
        (np.zeros(2, np.complex128), "w: no safetensors type for complex128"),
        (torch.zeros(2, dtype=torch.complex128), "w: no safetensors type for complex128"),
        (torch.zeros(2, device="meta"), "w: the tensor has no values"),
        (torch.eye(2).to_sparse(), "w: the tensor is torch.sparse_coo, not dense"),
    ],
)
def test_what_cannot_be_a_tensor_is_refused_by_name(value, complaint):
    with pytest.raises(Unsupported, match=complaint):
        MemorySource({"w": value})


def test_ties_are_the_same_memory():
    whole = torch.arange(24.0).reshape(4, 6)
    ties = MemorySource(
        {
            "a": whole,
            "b": whole,
            "view": whole[:2],
            "copy": whole.clone(),
            "turned": whole.T,
            "c": whole.view(4, 6),
        }
    ).ties
    assert ties == {"b": "a", "c": "a"}
    array = np.zeros((4, 6), np.float32)
    assert MemorySource({"a": array, "b": array, "row": array[0], "copy": array.copy()}).ties == {"b": "a"}
    empty = torch.zeros(0)
    assert MemorySource({"a": empty, "b": empty}).ties == {}


def test_two_sources_are_never_the_same_run():
    tensors = {"w": np.zeros(2, np.float32)}
    assert MemorySource(tensors).identity() != MemorySource(tensors).identity()


# --- merging in memory --------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    return write_small_adapter(tmp_path / "lora")


@pytest.mark.parametrize(
    "kind", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16], ids=lambda k: k.__name__
)
@pytest.mark.parametrize("executor", ["inline", "threads"])
def test_memory_and_file_give_the_same_bytes(tmp_path, adapter, kind, executor):
    base = write_base(tmp_path / "base", kind=np.float32 if kind is ml_dtypes.bfloat16 else kind)
    tensors = base_tensors(kind)
    if kind is ml_dtypes.bfloat16:
        save_file(
            {k: torch.from_numpy(base_tensors()[k]).bfloat16() for k in tensors}, base / "model.safetensors"
        )
    lt.merge(base, adapter, tmp_path / "out", executor=executor)
    through_file = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    from_numpy = lt.merge(tensors, adapter, executor=executor).state_dict
    torch_base = {
        name: torch.from_numpy(value.view(np.int16)).view(torch.bfloat16) if kind is ml_dtypes.bfloat16
        else torch.from_numpy(value) for name, value in tensors.items()
    }  # fmt: skip
    from_torch = lt.merge(torch_base, adapter, executor=executor).state_dict
    assert set(from_numpy) == set(from_torch) == set(through_file.specs)
    for name in from_numpy:
        expected = through_file.read_bytes(name).tobytes()
        assert isinstance(from_numpy[name], np.ndarray)
        assert from_numpy[name].dtype == kind
        assert from_numpy[name].tobytes() == expected
        assert isinstance(from_torch[name], torch.Tensor)
        assert from_torch[name].dtype == torch_base[name].dtype
        assert from_torch[name].reshape(-1).view(torch.uint8).numpy().tobytes() == expected
    changed = {n for n in tensors if from_numpy[n].tobytes() != tensors[n].tobytes()}
    assert changed == {f"{path}.weight" for path in SHAPES}


def test_the_base_is_left_alone_and_not_aliased(adapter):
    tensors = base_tensors()
    before = {name: value.copy() for name, value in tensors.items()}
    merged = lt.merge(tensors, adapter).state_dict
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, before[name])
        assert not np.shares_memory(merged[name], value)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_merged_into_memory(tmp_path, adapter, shards):
    base = write_base(tmp_path / "base", shards=shards)
    merged = lt.merge(base, adapter).state_dict
    expected = lt.merge(base_tensors(), adapter).state_dict
    assert set(merged) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(merged[name], expected[name])


def test_a_state_dict_merged_into_a_file(tmp_path, adapter):
    tensors = {"odd": np.ones(3, np.uint8), **base_tensors(), "empty": np.zeros((0, 4), np.float32)}
    lt.merge(tensors, adapter, tmp_path / "out.safetensors")
    expected = lt.merge(tensors, adapter).state_dict
    found = load_numpy(tmp_path / "out.safetensors")
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    assert set(load_file(tmp_path / "out.safetensors")) == set(expected)
    lt.merge(tensors, adapter, tmp_path / "out.safetensors", force=True)  # it says that loratools made it


def test_empty_and_scalar_tensors_come_through(adapter):
    extra = {"s": torch.tensor(2.0), "e": torch.zeros(0, 3), "flags": torch.tensor([True, False, True])}
    tensors = {name: torch.from_numpy(value) for name, value in base_tensors().items()} | extra
    merged = lt.merge(tensors, adapter).state_dict
    assert list(merged) == list(tensors)
    for name, value in extra.items():
        assert torch.equal(merged[name], value)
        assert merged[name].dtype == value.dtype


def test_names_that_no_file_may_have(tmp_path, adapter):
    with pytest.raises(CorruptFile, match=r"in the name 'a\\nb'"):
        lt.merge({**base_tensors(), "a\nb": np.zeros(1, np.float32)}, adapter, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_untouched_ties_stay_ties(adapter, library):
    tensors = base_tensors()
    if library == "torch":
        tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}
    tensors["lm_head.weight"] = tensors["embed.weight"]
    merged = lt.merge(tensors, adapter).state_dict
    assert merged["lm_head.weight"] is merged["embed.weight"]


@pytest.mark.filterwarnings("ignore:.*shared their memory:UserWarning")
@pytest.mark.parametrize("which", range(3))
def test_a_change_to_one_of_several_names_of_a_tensor_is_never_lost(adapter, which):
    """Three names of one tensor, one of them adapted: its delta is in the result, or the merge is refused."""
    tensors = base_tensors()
    names = [f"layers.{i}.q_proj.weight" for i in range(3)]
    for name in names:
        tensors[name] = tensors[names[0]]
    loaded = lt.load(adapter)
    target = f"layers.{which}.q_proj"
    modules = {name: module for name, module in loaded.modules.items() if target in name}
    assert len(modules) == 1
    import dataclasses

    alone = dataclasses.replace(loaded, modules=modules)
    apart = lt.merge({n: v.copy() for n, v in tensors.items()}, alone).state_dict
    try:
        merged = lt.merge(tensors, alone).state_dict
    except lt.LoratoolsError:
        return
    np.testing.assert_array_equal(merged[names[which]], apart[names[which]])


def test_torch_is_not_imported_for_numpy_state_dicts(tmp_path, adapter):
    program = f"""
import sys
import numpy as np
import loratools as lt
base = {{f"layers.{{i}}.q_proj.weight": np.zeros((12, 8), np.float32) for i in range({LAYERS})}}
merged = lt.merge(base, {str(adapter)!r}).state_dict
assert all(isinstance(value, np.ndarray) for value in merged.values())
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
