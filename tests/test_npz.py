"""Archives of numpy as sources of tensors."""

from __future__ import annotations

import pickle
import zipfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.errors import CorruptFile, NotFound, Unsupported
from loratools.tensors.npz import NpzFile

if TYPE_CHECKING:
    from pathlib import Path

NAME = "model.layers.0.self_attn.q_proj.lora_a"


def save(path: Path, *, packed: bool = False, **tensors: Any) -> Path:
    (np.savez_compressed if packed else np.savez)(path, **tensors)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64, np.int8, np.int64, np.bool_])
def test_as_a_source(kind: Any, packed: bool, tmp_path: Path) -> None:
    values = (np.arange(12).reshape(3, 4) % 5).astype(kind)
    source = NpzFile(
        save(tmp_path / "it.npz", packed=packed, **{NAME: values, "order": np.asfortranarray(values)})
    )
    assert source.specs[NAME].shape == (3, 4)
    for name in (NAME, "order"):
        assert source.read(name, 3, 9).tolist() == values.reshape(-1)[3:9].tolist()
        assert source.read_bytes(name).tobytes() == values.tobytes()
    assert source.extent(NAME) is None
    assert source.identity() == NpzFile(tmp_path / "it.npz").identity()
    assert pickle.loads(pickle.dumps(source)).read(NAME).tolist() == values.reshape(-1).tolist()


def test_bfloat16_as_mlx_stores_it(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 3.25], ml_dtypes.bfloat16)
    source = NpzFile(save(tmp_path / "it.npz", w=values.view("V2")))
    assert source.specs["w"].dtype.name == "BF16"
    assert source.read("w").tolist() == [1.5, -2.0, 3.25]
    out = np.empty(3, np.float32)
    assert source.read("w", out=out) is out


def test_an_old_mlx_adapter(tmp_path: Path) -> None:
    a, b = np.ones((3, 2), np.float32), np.ones((2, 4), np.float32)
    save(tmp_path / "adapters.npz", **{NAME: a, NAME.replace("lora_a", "lora_b"): b})
    adapter = lt.load(tmp_path / "adapters.npz", alpha=8)
    assert (adapter.format, adapter.refusal) == ("mlx", None)
    assert adapter.modules["model.layers.0.self_attn.q_proj"].scaling == 4.0


def test_objects_need_leave(tmp_path: Path) -> None:
    path = save(tmp_path / "it.npz", w=np.array([1.5, 2.5], object), whole=np.array(None, object))
    with pytest.raises(Unsupported, match="w is an array of objects") as raised:
        NpzFile(path)
    assert "--allow-pickle" in str(raised.value.hint)
    path = save(tmp_path / "numbers.npz", w=np.array([1.5, 2.5], object))
    source = NpzFile(path, allow_pickle=True)
    assert source.specs["w"].dtype.name == "F64"
    assert source.read("w").tolist() == [1.5, 2.5]
    with pytest.raises(CorruptFile, match="no numbers"):
        NpzFile(save(tmp_path / "text.npz", w=np.array(["a", {}], object)), allow_pickle=True)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "harmed"), "w"))

    save(tmp_path / "it.npz", w=np.array([Harm()], object))
    with pytest.raises(Unsupported):
        NpzFile(tmp_path / "it.npz")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "values", [np.array(["a"]), np.zeros(2, [("x", "f4"), ("y", "f4")]), np.ones(2, ">f4")]
)
def test_types_that_no_tensor_has(values: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="w holds"):
        NpzFile(save(tmp_path / "it.npz", w=values))


def test_what_is_no_archive_of_arrays(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        NpzFile(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(CorruptFile, match="not a readable numpy archive"):
        NpzFile(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(CorruptFile, match=r"readme\.txt"):
        NpzFile(tmp_path / "other.npz")
    with zipfile.ZipFile(tmp_path / "empty.npz", "w") as archive:
        archive.writestr("w.npy", "text")
    with pytest.raises(CorruptFile):
        NpzFile(tmp_path / "empty.npz")
    with zipfile.ZipFile(tmp_path / "bell.npz", "w") as archive:
        archive.writestr("\x07.npy", "text")
    with pytest.raises(CorruptFile, match="control"):
        NpzFile(tmp_path / "bell.npz")


@given(place=st.integers(0, 1 << 20), value=st.integers(0, 255))
@settings(deadline=None, max_examples=150)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_any_changed_byte_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = save(tmp_path_factory.mktemp("npz") / "it.npz", w=np.arange(6, dtype=np.float32).reshape(2, 3))
    whole = bytearray(path.read_bytes())
    whole[place % len(whole)] = value
    path.write_bytes(whole)
    with suppress(lt.LoratoolsError):
        source = NpzFile(path)
        for name, spec in source.specs.items():
            assert source.read(name).size == spec.count
