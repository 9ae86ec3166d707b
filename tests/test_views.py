"""Views of tensors: numpy's own reshape, transpose, take and concatenate of the stored bits are the oracle."""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loratools.dtypes import DTYPES, numpy_dtype
from loratools.errors import ShapeMismatch, Unsupported
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource
from loratools.tensors.safetensors import SafetensorsFile
from loratools.tensors.views import joined, permuted, picked, reshaped, stacked, transposed

KINDS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "U8"]


def _values(kind, shape, seed=0):
    """Random bits of a type: NaNs and subnormals among them."""
    dtype = numpy_dtype(DTYPES[kind])
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


def _ref(kind, shape, seed=0, name="w"):
    return TensorRef(MemorySource({name: _values(kind, shape, seed)}), name)


def _bits(ref):
    return ref.source.read_bytes(ref.name).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_changes(kind):
    ref, values = _ref(kind, (6, 4)), _values(kind, (6, 4))
    other = _values(kind, (6, 4), 1)
    both = [ref, _ref(kind, (6, 4), 1)]
    expected = {
        "transposed": (transposed(ref), values.T),
        "reshaped": (reshaped(ref, (2, 12)), values.reshape(2, 12)),
        "permuted": (
            permuted(ref, (2, 3, 4), (1, 0, 2), (6, 4)),
            values.reshape(2, 3, 4).transpose(1, 0, 2).reshape(6, 4),
        ),
        "picked": (picked(ref, [(3, 6), (0, 3)]), np.concatenate([values[3:], values[:3]])),
        "joined": (joined(both), np.concatenate([values, other])),
        "stacked": (stacked(both), np.stack([values, other])),
        "of a view": (
            transposed(picked(transposed(ref), [(1, 3)])),
            values[:, 1:3],
        ),
    }
    for what, (view, twin) in expected.items():
        assert view.shape == twin.shape, what
        assert view.spec.dtype.name == kind, what
        assert _bits(view) == np.ascontiguousarray(twin).tobytes(), what
        assert view.name == "w"


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 5)),
    data=st.data(),
)
def test_any_run_of_elements_reads_as_part_of_the_whole(shape, data):
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    view = transposed(TensorRef(MemorySource({"w": values}), "w"))
    start = data.draw(st.integers(0, values.size))
    stop = data.draw(st.integers(start, values.size))
    expected = values.T.reshape(-1)[start:stop]
    np.testing.assert_array_equal(view.source.read("w", start, stop), expected)
    out = np.empty(stop - start, np.float32)
    assert view.source.read("w", start, stop, out=out) is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(view.load(), values.T)


def test_a_view_of_a_file_goes_to_another_process(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"w": values}, tmp_path / "w.safetensors")
    view = transposed(TensorRef(SafetensorsFile(tmp_path / "w.safetensors"), "w"))
    again = pickle.loads(pickle.dumps(view))
    np.testing.assert_array_equal(again.load(), values.T)
    assert view.source.extent("w") is None
    assert view.source.identity() == again.source.identity()


def test_what_changes_nothing_is_the_tensor_itself():
    ref = _ref("F32", (4, 3))
    assert picked(ref, [(0, 4)]) is ref
    assert reshaped(ref, (4, 3)) is ref


def test_what_does_not_fit_is_refused():
    ref = _ref("F32", (4, 3))
    for call in (
        lambda: permuted(ref, (5, 3), (0, 1), (5, 3)),
        lambda: picked(ref, [(2, 5)]),
        lambda: joined([ref, _ref("F32", (4, 2))]),
        lambda: joined([ref, _ref("F16", (4, 3))]),
        lambda: stacked([ref, _ref("F32", (3, 3))]),
    ):
        with pytest.raises(ShapeMismatch):
            call()
    with pytest.raises(Unsupported, match="4 bits"):
        transposed(TensorRef(MemorySource({"w": np.ones((4, 4), ml_dtypes.float4_e2m1fn)}), "w"))
