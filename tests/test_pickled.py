"""Pickled adapters: refused unless asked for, and even then nothing in them is run."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratools as lt
from loratools.errors import CorruptFile, InputError, NotFound, Unsupported
from loratools.tensors.pickled import PickledFile
from tests.small import contents, write_base, write_small_adapter

torch.set_num_threads(1)


def into_pickle(folder, **options):
    """An adapter folder as older PEFT wrote it."""
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin", **options)
    weights.unlink()
    return folder


class Command:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (os.mkdir, (self.trace,))


def test_refused_without_leave(tmp_path):
    adapter = into_pickle(write_small_adapter(tmp_path / "lora"))
    with pytest.raises(Unsupported, match=r"adapter_model.bin is a pickle, which can run code") as caught:
        lt.load(adapter)
    assert "allow_pickle" in caught.value.hint
    base = write_base(tmp_path / "base")
    with pytest.raises(Unsupported, match="is a pickle"):
        lt.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_merges_as_its_safetensors_twin(tmp_path, zipped):
    base = write_base(tmp_path / "base")
    twin = write_small_adapter(tmp_path / "twin" / "lora")
    adapter = into_pickle(write_small_adapter(tmp_path / "lora"), _use_new_zipfile_serialization=zipped)
    lt.merge(base, twin, tmp_path / "expected")
    lt.merge(base, adapter, tmp_path / "out", allow_pickle=True)
    name = "model.safetensors"
    assert contents(tmp_path / "out")[name] == contents(tmp_path / "expected")[name]


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"w": bad}, lambda bad: {"w": [bad]}])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, wrap, writer):
    trace, path = tmp_path / "was_run", tmp_path / "adapter.bin"
    with path.open("wb") as file:
        (torch.save if writer == "torch" else pickle.dump)(wrap(Command(trace)), file)
    with pytest.raises(CorruptFile, match="not a readable pickle of tensors"):
        PickledFile(path, allow_pickle=True)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Command(trace)))
    assert trace.exists()  # it would have been noticed


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.zeros(2), 3], "holds a list, not named tensors"),
        ([], "holds a list, not named tensors"),
        (torch.zeros(2), "holds a Tensor, not named tensors"),
        ({}, "no tensors"),
        ({"model": {"w": torch.zeros(2)}}, "'model' is a dict"),
        ({"w": torch.zeros(2), "step": 3}, "'step' is a int"),
        ({0: torch.zeros(2), "0": torch.ones(2)}, "the key 0 is not a name"),
        ({"a\nb": torch.zeros(2)}, r"in the name 'a\\nb'"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, complaint):
    torch.save(content, tmp_path / "adapter.pt")
    with pytest.raises(CorruptFile, match=complaint) as caught:
        PickledFile(tmp_path / "adapter.pt", allow_pickle=True)
    assert str(caught.value).startswith(str(tmp_path / "adapter.pt"))


@pytest.mark.parametrize("data", [b"", b"garbage", b"<html>", b"\x80\x04.", b"PK\x03\x04garbage"])
def test_what_is_no_pickle(tmp_path, data):
    (tmp_path / "adapter.bin").write_bytes(data)
    with pytest.raises(CorruptFile, match="not a readable pickle of tensors"):
        PickledFile(tmp_path / "adapter.bin", allow_pickle=True)


def test_missing_folder_and_pipe(tmp_path):
    with pytest.raises(NotFound, match="no such file"):
        PickledFile(tmp_path / "ghost.bin", allow_pickle=True)
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(CorruptFile, match="not a regular file"):
        PickledFile(tmp_path / "folder.bin", allow_pickle=True)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.bin")
        with pytest.raises(InputError, match="not a regular file"):
            PickledFile(tmp_path / "pipe.bin", allow_pickle=True)


def test_storages_of_a_gpu_land_on_the_cpu(tmp_path, monkeypatch):
    """Pickles name the device of each storage; here one that this machine does not have."""
    tag = torch.serialization.location_tag
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    torch.save({"w": torch.arange(4.0)}, tmp_path / "adapter.bin")
    monkeypatch.setattr(torch.serialization, "location_tag", tag)
    assert b"cuda:3" in (tmp_path / "adapter.bin").read_bytes()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "adapter.bin", weights_only=True)
    source = PickledFile(tmp_path / "adapter.bin", allow_pickle=True)
    assert source.tensors["w"].device.type == "cpu"
    np.testing.assert_array_equal(source.read("w"), [0, 1, 2, 3])


def test_pickled_sources_reopen_their_file(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "adapter.bin")
    source = PickledFile(tmp_path / "adapter.bin", allow_pickle=True)
    again = pickle.loads(pickle.dumps(source))
    assert again.identity() == source.identity()
    np.testing.assert_array_equal(again.read("w"), source.read("w"))


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "adapter.bin").write_bytes(b"x")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("loratools.tensors.pickled.importlib.import_module", missing)
    with pytest.raises(Unsupported, match="torch is not installed") as caught:
        PickledFile(tmp_path / "adapter.bin", allow_pickle=True)
    assert "loratools[torch]" in caught.value.hint


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickled_base_is_refused(tmp_path, suffix):
    torch.save({"w": torch.zeros(2)}, tmp_path / f"model{suffix}")
    with pytest.raises(InputError, match="is a pickle; a base model is read from safetensors"):
        lt.merge(tmp_path / f"model{suffix}", write_small_adapter(tmp_path / "lora"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
