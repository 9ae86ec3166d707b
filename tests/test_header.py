"""The header as hostile input: every fault a CorruptFile that names file and tensor, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save, save_file

import loratools as lt
from attacks.crafted import ATTACKS, INDEXES, entry, pack, write_all
from attacks.fuzz_header import fuzz
from loratools.dtypes import DTYPES
from loratools.errors import CorruptFile, InputError, LoratoolsError, NotFound
from loratools.tensors.base import TensorSpec
from loratools.tensors.header import MAX_HEADER, MAX_TENSORS, layout, parse_header
from loratools.tensors.safetensors import SafetensorsFile, ShardedCheckpoint, read_index
from tests.small import contents, write_base, write_small_adapter

_BY_NAME = {attack.name: attack for attack in ATTACKS}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_small_adapter(tmp_path_factory.mktemp("adapter") / "lora")


def refused(base, adapter, tmp_path):
    """Merge onto ``base``, which must fail as corrupt and leave the disk as it was; returns the message."""
    out = tmp_path / "elsewhere" / "out"
    with pytest.raises(CorruptFile) as caught:
        lt.merge(base, adapter, out)
    assert not out.parent.exists(), list(out.parent.iterdir())
    assert isinstance(caught.value, InputError)  # the class that the command line answers with exit code 3
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


@pytest.mark.parametrize("name", _BY_NAME)
def test_attack_is_refused(name, tmp_path, adapter):
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(_BY_NAME[name].make())
    message = refused(path, adapter, tmp_path)
    assert message.startswith(f"{path}: ")
    assert _BY_NAME[name].complaint in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400
    path.unlink()


@pytest.mark.parametrize("name", [name for name in _BY_NAME if name != "tensors_300000"])
def test_what_the_reference_reader_says_of_it(name, tmp_path):
    # tensors_300000 takes it three seconds and hundreds of megabytes.
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(_BY_NAME[name].make())
    try:
        with safe_open(path, "np"):
            accepted = True
    except Exception:
        accepted = False
    assert accepted == _BY_NAME[name].accepted
    path.unlink()


def test_every_attack_can_be_written(tmp_path, monkeypatch):
    small = [attack for attack in ATTACKS if not attack.name.startswith(("header_over", "tensors_"))]
    monkeypatch.setattr("attacks.crafted.ATTACKS", tuple(small))
    written = write_all(tmp_path / "all")
    assert len(written) == len(small) + len(INDEXES)
    assert all(path.is_file() for path in written)


@pytest.mark.parametrize("name", INDEXES)
def test_index_that_leaves_its_folder(name, tmp_path, adapter):
    base = write_base(tmp_path / "base", shards=2)
    index = base / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["embed.weight"] = INDEXES[name]
    index.write_text(json.dumps(listed))
    shutil.copy(next(base.glob("*.safetensors")), tmp_path / "model.safetensors")  # something to climb to
    before = contents(tmp_path)
    message = refused(base, adapter, tmp_path)
    assert message.startswith(f"{index}: embed.weight: shard name")
    assert "is not a plain file name" in message
    assert message.isprintable()
    assert contents(tmp_path) == before


def test_missing_shard(tmp_path, adapter):
    base = write_base(tmp_path / "base", shards=3)
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        NotFound, match=r"index.json names model-00002-of-00003.safetensors, which is missing"
    ):
        lt.merge(base, adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def _edit(index, change):
    listed = json.loads(index.read_text())
    change(listed)
    index.write_text(json.dumps(listed))


_DISAGREEMENTS = {
    "swapped": (
        lambda m: m.__setitem__("embed.weight", next(v for v in m.values() if v != m["embed.weight"])),
        "embed.weight lies in",
    ),
    "left_out": (lambda m: m.pop("embed.weight"), "embed.weight lies in"),
    "invented": (lambda m: m.__setitem__("ghost", m["embed.weight"]), "names ghost, which no shard holds"),
    "bidi": (lambda m: m.__setitem__("a\u202eb", m["embed.weight"]), r"characters in the name 'a\u202eb'"),
    "empty": (lambda m: m.clear(), "weight_map is empty"),
    "number": (lambda m: m.__setitem__("embed.weight", 3), "embed.weight: shard name 3 is not a plain"),
}


@pytest.mark.parametrize("name", _DISAGREEMENTS)
def test_index_that_disagrees_with_the_shards(name, tmp_path, adapter):
    base = write_base(tmp_path / "base", shards=2)
    index = base / "model.safetensors.index.json"
    change, complaint = _DISAGREEMENTS[name]
    _edit(index, lambda listed: change(listed["weight_map"]))
    message = refused(base, adapter, tmp_path)
    assert message.startswith(f"{index}: ")
    assert complaint in message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "index is not a JSON object"),
        ("{}", "weight_map is not a map"),
        ('{"weight_map": ["w"]}', "weight_map is not a map"),
        ('{"weight_map": null}', "weight_map is not a map"),
        ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "'w' stands twice in the index"),
        ("{", "index is not JSON"),
        ("", "index is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("\ufffe", "index is not JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_index_that_is_none(text, complaint, tmp_path, adapter):
    base = write_base(tmp_path / "base", shards=2)
    (base / "model.safetensors.index.json").write_text(text)
    assert complaint in refused(base, adapter, tmp_path)


def test_index_over_its_cap(tmp_path, monkeypatch):
    monkeypatch.setattr("loratools.tensors.safetensors.MAX_INDEX", 100)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(" " * 101)
    with pytest.raises(CorruptFile, match="101 bytes; 100 are allowed"):
        read_index(path)


def test_same_tensor_in_two_shards(tmp_path):
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({"w": np.zeros(2, np.float32)}, tmp_path / shard)
    save_file({"v": np.zeros(2, np.float32), "w": np.ones(2, np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(CorruptFile, match=r"w lies in b.safetensors, the index says a.safetensors"):
        ShardedCheckpoint(tmp_path, {"w": "a.safetensors", "v": "b.safetensors"}, tmp_path / "i.json")


# --- things that are not files --------------------------------------------------------------------------


def test_a_folder_in_place_of_a_file(tmp_path, adapter):
    (tmp_path / "base" / "model.safetensors").mkdir(parents=True)
    assert "model.safetensors: not a regular file" in refused(tmp_path / "base", adapter, tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes")
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.safetensors.index.json", "config.json", "model-00001-of-00002.safetensors"],
)
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(name, tmp_path, adapter):
    base = write_base(tmp_path / "base", shards=2 if "0000" in name else 1)
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    assert f"{name}: not a regular file" in refused(base, adapter, tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(NotFound, match="no such file"):
        SafetensorsFile(tmp_path / "ghost.safetensors")


def test_link_to_nothing(tmp_path):
    (tmp_path / "w.safetensors").symlink_to(tmp_path / "ghost")
    with pytest.raises(NotFound, match="no such file"):
        SafetensorsFile(tmp_path / "w.safetensors")


def test_circle_of_links(tmp_path):
    (tmp_path / "w.safetensors").symlink_to(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="cannot be opened"):
        SafetensorsFile(tmp_path / "w.safetensors")


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    # The permission itself would not stop a test that runs as root.
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(InputError, match=r"cannot be opened \(Permission denied\)"):
        SafetensorsFile(tmp_path / "w.safetensors")


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be opened"):
        SafetensorsFile(tmp_path / "file" / "w.safetensors")


def test_descriptors_are_closed_after_a_refusal(tmp_path):
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("open files are counted through /proc")
    path = tmp_path / "w.safetensors"
    path.write_bytes(pack("{not json"))
    before = len(list(descriptors.iterdir()))
    kept = []
    for name in (path, tmp_path):
        for _ in range(5):
            with pytest.raises(CorruptFile) as caught:
                SafetensorsFile(name)
            kept.append(caught.value)
    assert len(list(descriptors.iterdir())) == before


# --- what must be accepted ------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", ["", '"__metadata__":null,', '"__metadata__":{},'])
def test_no_metadata(metadata, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(pack("{" + metadata + '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)))
    assert SafetensorsFile(path).metadata == {}
    assert SafetensorsFile(path).specs["w"].shape == (2,)


def test_data_that_is_not_aligned(tmp_path):
    # Neither the header's length nor the tensor before it is a multiple of eight.
    values = np.array([1.5, -2.25], np.float32)
    path = tmp_path / "w.safetensors"
    header = {"odd": entry("U8", [3], 0, 3), "w": entry("F32", [2], 3, 11)}
    text = json.dumps(header)
    text += " " * (-(len(text) + 1) % 8)
    path.write_bytes(pack(text, b"\1\2\3" + values.tobytes()))
    source = SafetensorsFile(path)
    assert source.header.data_start % 8 == 7
    np.testing.assert_array_equal(source.read("w"), values)
    np.testing.assert_array_equal(source.read("w", out=np.empty(2, np.float32)), values)
    np.testing.assert_array_equal(source.read("odd"), [1, 2, 3])


def test_order_of_entries_does_not_matter(tmp_path):
    path = tmp_path / "w.safetensors"
    header = {"b": entry("U8", [1], 1, 2), "empty": entry("U8", [0], 1, 1), "a": entry("U8", [1], 0, 1)}
    path.write_bytes(pack(header, b"\1\2"))
    source = SafetensorsFile(path)
    assert list(source.specs) == ["a", "empty", "b"]
    assert source.read("a").tolist() == [1]
    assert source.read("b").tolist() == [2]
    assert source.read("empty").tolist() == []


def test_unknown_fields_and_unicode_names(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(pack({"poids.\u00e9t\u00e9": {**entry("U8", [1], 0, 1), "note": "x"}}, b"\1"))
    assert list(SafetensorsFile(path).specs) == ["poids.\u00e9t\u00e9"]


def test_path_like_name_is_only_a_name(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(pack({"../../etc/passwd": entry("U8", [1], 0, 1)}, b"\1"))
    assert list(SafetensorsFile(path).specs) == ["../../etc/passwd"]


def test_limits_leave_room_for_real_models():
    assert MAX_HEADER >= 128 * MAX_TENSORS
    assert MAX_TENSORS >= 61 * 384 * 3  # the experts of the largest open model, in one file


_SPECS = st.builds(
    TensorSpec,
    st.sampled_from([t for t in DTYPES.values() if t.bits >= 8]),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
)
_NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@given(st.dictionaries(_NAMES, _SPECS, max_size=6), st.dictionaries(_NAMES, _NAMES, max_size=3))
def test_what_we_lay_out_both_readers_accept(specs, metadata):
    header, offsets = layout(specs.items(), metadata)
    size = len(header) + sum(spec.nbytes for spec in specs.values())
    assert len(header) % 8 == 0
    parsed = parse_header("made", header[8:], size)
    assert parsed.specs == specs
    assert parsed.offsets == offsets
    assert parsed.metadata == metadata


@settings(max_examples=30)
@given(st.dictionaries(_NAMES, _SPECS, max_size=6), st.dictionaries(_NAMES, _NAMES, max_size=3))
def test_the_reference_reader_agrees(tmp_path_factory, specs, metadata):
    header, _ = layout(specs.items(), metadata)
    path = tmp_path_factory.mktemp("layout") / "w.safetensors"
    path.write_bytes(header + bytes(sum(spec.nbytes for spec in specs.values())))
    with safe_open(path, "np") as file:
        assert (file.metadata() or {}) == metadata
        assert sorted(file.keys()) == sorted(specs)
        for name, spec in specs.items():
            part = file.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (spec.dtype.name, spec.shape)


@given(st.dictionaries(_NAMES, st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=6))
def test_what_the_reference_writer_writes_is_accepted(shapes):
    kinds = (np.float32, np.float16, np.int8, np.bool_, np.uint64)
    tensors = {name: np.zeros(shape, kinds[i % 5]) for i, (name, shape) in enumerate(shapes.items())}
    data = save(tensors, {"format": "pt"})
    length = int.from_bytes(data[:8], "little")
    header = parse_header("saved", data[8 : 8 + length], len(data))
    assert {name: spec.shape for name, spec in header.specs.items()} == shapes


@pytest.mark.parametrize("name", ["", "__metadata__", "a\nb", "a\u202eb", "x" * 2_000])
def test_we_write_no_name_that_we_would_refuse(name):
    with pytest.raises(CorruptFile, match="the output: "):
        layout([(name, TensorSpec(DTYPES["U8"], (1,)))], {})


def test_mutants_are_refused_or_readable(tmp_path):
    readable, refusals = fuzz(3_000, seed=0, folder=tmp_path)
    assert readable > 50  # the mutants are close enough to valid files to be worth trying
    assert refusals > 1_000


def test_fuzzing_reports_what_is_neither(tmp_path, monkeypatch):
    def planted(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("loratools.tensors.header.quoted", planted)  # called where a message is made
    with pytest.raises(AssertionError, match=r"seed 0, iteration \d+: ZeroDivisionError"):
        fuzz(3_000, seed=0, folder=tmp_path)
    assert (tmp_path / "mutant.safetensors").exists()


def test_attack_on_an_adapter_file(tmp_path):
    folder = write_small_adapter(tmp_path / "lora")
    (folder / "adapter_model.safetensors").write_bytes(_BY_NAME["key_twice"].make())
    base = write_base(tmp_path / "base")
    message = refused(base, folder, tmp_path)
    assert message.startswith(f"{folder / 'adapter_model.safetensors'}: 'w' stands twice")


def test_messages_are_one_printable_line():
    for error in (CorruptFile("f\x1b[2J", "p\u202e"), LoratoolsError("\x07", hint="\x9b")):
        assert str(error).isprintable()
    assert sys.getrecursionlimit() < 200_000  # what the nesting attack relies on
