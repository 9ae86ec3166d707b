"""Files of tensors: ranges, shards, links; and positional I/O that survives short counts and its absence."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import loratools as lt
from loratools.errors import CorruptFile
from loratools.tensors import files
from loratools.tensors.base import TensorRef, TensorSpec
from loratools.tensors.files import File, copy_range, read_whole
from loratools.tensors.safetensors import SafetensorsFile, ShardedCheckpoint, read_index
from tests.small import base_tensors, contents, write_base, write_small_adapter


@pytest.fixture(params=["positional", "seeking"])
def io(request, monkeypatch):
    """Both ways of reading and writing at an offset; Windows has only the second."""
    if request.param == "seeking":
        monkeypatch.setattr(files, "_POSITIONAL", False)
        monkeypatch.setattr(files, "_copy_file_range", None)
    elif not files._POSITIONAL:
        pytest.skip("this platform has no positional I/O")
    return request.param


def _random(count, seed=0):
    return np.random.default_rng(seed).bytes(count)


# --- sources --------------------------------------------------------------------------------------------


@given(st.integers(0, 96), st.integers(0, 96))
def test_any_range_of_elements(tmp_path_factory, start, stop):
    path = tmp_path_factory.getbasetemp() / "ranges.safetensors"
    values = np.arange(96, dtype=np.float32).reshape(8, 3, 4)
    if not path.exists():
        save_file({"before": np.ones(3, np.float32), "w": values, "z": np.ones(5, np.float16)}, path)
    source = SafetensorsFile(path)
    if start > stop:
        with pytest.raises(IndexError, match="elements"):
            source.read("w", start, stop)
        return
    np.testing.assert_array_equal(source.read("w", start, stop), values.reshape(-1)[start:stop])
    np.testing.assert_array_equal(
        source.read_bytes("w", start, stop), values.reshape(-1)[start:stop].view(np.uint8)
    )


@pytest.mark.parametrize(("start", "stop"), [(0, 97), (-1, 4), (97, None), (5, 2)])
def test_a_range_never_reaches_into_the_next_tensor(tmp_path, start, stop):
    save_file({"a": np.zeros(96, np.float32), "b": np.ones(96, np.float32)}, tmp_path / "w")
    with pytest.raises(IndexError, match="of a tensor of 96"):
        SafetensorsFile(tmp_path / "w").read("a", start, stop)


def test_out_that_is_not_contiguous_is_refused(tmp_path):
    save_file({"w": np.arange(6, dtype=np.float32)}, tmp_path / "w")
    with pytest.raises(ValueError, match="w: out must be contiguous"):
        SafetensorsFile(tmp_path / "w").read("w", out=np.empty((6, 2), np.float32)[:, 0])


def test_scalars_and_empty_tensors(tmp_path):
    save_file({"s": np.array(2.5, np.float16), "e": np.zeros((3, 0), np.float32)}, tmp_path / "w")
    source = SafetensorsFile(tmp_path / "w")
    assert TensorRef(source, "s").load().shape == ()
    assert TensorRef(source, "s").load() == 2.5
    assert TensorRef(source, "e").load().shape == (3, 0)
    out = np.empty((3, 0), np.float32)
    assert source.read("e", out=out) is out


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_are_one_source(tmp_path, shards):
    base = write_base(tmp_path / "base", shards=shards, kind=np.float16)
    index = base / "model.safetensors.index.json"
    source = ShardedCheckpoint(base, read_index(index), index)
    expected = base_tensors(np.float16)
    assert set(source.specs) == set(expected)
    assert source.metadata == {"format": "pt"}
    for name, values in expected.items():
        np.testing.assert_array_equal(source.read(name), values.reshape(-1).astype(np.float32))
        np.testing.assert_array_equal(source.read(name, 1, 5), values.reshape(-1)[1:5].astype(np.float32))
        np.testing.assert_array_equal(source.read_bytes(name), values.reshape(-1).view(np.uint8))
        path, offset, size = source.extent(name)
        with Path(path).open("rb") as file:
            file.seek(offset)
            assert file.read(size) == values.tobytes()


def test_sources_pickle_and_open_their_own_handle(tmp_path):
    save_file({"w": np.arange(6, dtype=np.float32)}, tmp_path / "w")
    source = SafetensorsFile(tmp_path / "w")
    source.read("w")
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.read("w"), np.arange(6))
    assert again.file.fd != source.file.fd


def test_many_shards_do_not_hold_a_file_each(tmp_path):
    resource = pytest.importorskip("resource", reason="this platform has no limit on open files to lower")
    tensors = {f"w{i}": np.full(4, i, np.float32) for i in range(60)}
    for name, value in tensors.items():
        save_file({name: value}, tmp_path / f"{name}.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    listed = Path("/proc/self/fd")
    taken = len(list(listed.iterdir())) if listed.is_dir() else 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 20, limits[1]))
    try:
        weight_map = {name: f"{name}.safetensors" for name in tensors}
        source = ShardedCheckpoint(tmp_path, weight_map, tmp_path / "i.json")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(source.specs) == 60


def test_identity_changes_with_the_file(tmp_path):
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "w")
    before = SafetensorsFile(tmp_path / "w").identity()
    assert SafetensorsFile(tmp_path / "w").identity() == before
    found = (tmp_path / "w").stat()
    os.utime(tmp_path / "w", ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000))
    assert SafetensorsFile(tmp_path / "w").identity() != before


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    save_file({"w": np.zeros(100, np.float32)}, tmp_path / "w")
    source = SafetensorsFile(tmp_path / "w")
    os.truncate(tmp_path / "w", source.header.data_start + 200)
    with pytest.raises(
        CorruptFile, match=rf"ends at byte {source.header.data_start + 200}; more was expected"
    ):
        source.read("w")


# --- a Hub cache ----------------------------------------------------------------------------------------


def into_hub_cache(folder, cache, name):
    """Move a folder's files into the layout of a Hub cache; returns the snapshot."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0123456789" * 4)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = repo / "blobs" / f"{number:064x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shards", [1, 3])
def test_hub_snapshot_opens_and_merges_into_regular_files(tmp_path, shards):
    plain = write_base(tmp_path / "plain", shards=shards)
    adapter = write_small_adapter(tmp_path / "lora")
    lt.merge(plain, adapter, tmp_path / "expected")
    snapshot = into_hub_cache(plain, tmp_path / "hub", "owner/model")
    cached = into_hub_cache(adapter, tmp_path / "hub", "owner/lora")
    blobs = contents(tmp_path / "hub")
    report = lt.merge(snapshot, cached, tmp_path / "out", verify=True)
    assert report.verified
    assert contents(tmp_path / "hub") == blobs
    assert all(path.is_symlink() for path in snapshot.iterdir())
    made = list((tmp_path / "out").iterdir())
    assert all(path.is_file() and not path.is_symlink() for path in made)
    got, expected = contents(tmp_path / "out"), contents(tmp_path / "expected")
    assert b'"owner/model"' in got["loratools.json"]
    for record in (got, expected):
        record.pop("loratools.json")
    assert got == expected


@pytest.mark.skipif(os.name == "nt", reason="file modes are a matter of POSIX")
@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_modes_follow_the_umask(tmp_path, umask, file_mode, folder_mode, kind):
    base = write_base(tmp_path / "base", shards=2 if kind == "folder" else 1)
    adapter = write_small_adapter(tmp_path / "lora")
    for path in base.iterdir():
        path.chmod(0o640)
    before = os.umask(umask)
    try:
        lt.merge(base if kind == "folder" else base / "model.safetensors", adapter, tmp_path / "out")
    finally:
        os.umask(before)
    made = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {file_mode}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} <= {folder_mode}


# --- files at offsets -----------------------------------------------------------------------------------


def test_reads_and_writes(tmp_path, io):
    (tmp_path / "f").write_bytes(bytes(1_000))
    file = File(tmp_path / "f", write=True)
    data = _random(300)
    file.write(memoryview(data), 500)
    assert file.read(300, 500) == data
    assert file.read(0, 1_000) == b""
    assert file.size() == 1_000
    file.sync()
    file.close()
    assert (tmp_path / "f").read_bytes() == bytes(500) + data + bytes(200)
    assert file.read(10, 500) == data[:10]  # opened anew


def test_threads_do_not_share_a_position(tmp_path, io):
    data = _random(1 << 16)
    (tmp_path / "f").write_bytes(data)
    (tmp_path / "g").write_bytes(bytes(1 << 16))
    source, target = File(tmp_path / "f"), File(tmp_path / "g", write=True)
    wrong = []

    def work(worker):
        for start in range(worker * 64, 1 << 16, 64 * 4):
            copy_range(source, start, target, start, 64)
            if source.read(64, start) != data[start : start + 64]:
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (tmp_path / "g").read_bytes() == data


def test_files_pickle_as_their_path(tmp_path, io):
    (tmp_path / "f").write_bytes(b"abc")
    file = File(tmp_path / "f", write=True)
    file.write(memoryview(b"x"), 0)
    again = pickle.loads(pickle.dumps(file))
    again.write(memoryview(b"y"), 1)
    assert again.read(3, 0) == b"xyc"


def test_read_beyond_the_end(tmp_path, io):
    (tmp_path / "f").write_bytes(bytes(10))
    with pytest.raises(CorruptFile, match="ends at byte 10; more was expected"):
        File(tmp_path / "f").read(5, 8)
    with pytest.raises(CorruptFile, match="ends at byte 10; more was expected"):
        copy_range(File(tmp_path / "f"), 8, File(tmp_path / "f", write=True), 0, 5)


def test_read_whole(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert read_whole(tmp_path / "f", 3) == b"abc"
    with pytest.raises(CorruptFile, match="3 bytes; 2 are allowed"):
        read_whole(tmp_path / "f", 2)
    with pytest.raises(CorruptFile, match="not a regular file"):
        read_whole(tmp_path, 3)


def _few(real, seed=0):
    """The call, moving fewer bytes than asked, as it may."""
    rng = np.random.default_rng(seed)

    def preadv(fd, buffers, offset):
        (buffer,) = buffers
        return real(fd, [buffer[: rng.integers(1, 8)]], offset)

    return preadv


def _few_copied(real):
    def copy_file_range(source, target, count, at, to):
        return real(source, target, min(count, 5), at, to)

    return copy_file_range


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this platform has no positional I/O")
@pytest.mark.parametrize("kernel", ["short", "none"])
def test_merge_with_short_counts_everywhere(tmp_path, monkeypatch, kernel):
    base = write_base(tmp_path / "base", shards=2, kind=np.float16)
    adapter = write_small_adapter(tmp_path / "lora")
    lt.merge(base, adapter, tmp_path / "expected")
    monkeypatch.setattr(os, "preadv", _few(os.preadv))
    monkeypatch.setattr(os, "pwritev", _few(os.pwritev))
    real = files._copy_file_range
    monkeypatch.setattr(files, "_copy_file_range", _few_copied(real) if kernel == "short" and real else None)
    lt.merge(base, adapter, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_merge_without_positional_io(tmp_path, io):
    base = write_base(tmp_path / "base", shards=2)
    adapter = write_small_adapter(tmp_path / "lora")
    lt.merge(base, adapter, tmp_path / "out", jobs=4)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(files, "_POSITIONAL", hasattr(os, "preadv"))
        lt.merge(base, adapter, tmp_path / "expected", jobs=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize(
    "answer",
    ["zero", "EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EPERM", "zero after a while", "EXDEV after a while"],
)
def test_copies_where_the_kernel_declines(tmp_path, monkeypatch, answer):
    data = _random(3 << 20)
    (tmp_path / "f").write_bytes(data)
    (tmp_path / "g").write_bytes(bytes(len(data) + 7))
    calls = []

    def declines(source, target, count, at, to):
        calls.append(count)
        if "after" in answer and len(calls) < 3:
            part = os.pread(source, 1_000, at)
            return os.pwrite(target, part, to)
        if answer.startswith("zero"):
            return 0
        raise OSError(getattr(errno, answer.split()[0]), "no")

    monkeypatch.setattr(files, "_copy_file_range", declines)
    copy_range(File(tmp_path / "f"), 5, File(tmp_path / "g", write=True), 12, len(data) - 5)
    assert (tmp_path / "g").read_bytes() == bytes(12) + data[5:] + bytes(0)
    assert calls


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EFBIG"])
def test_copies_that_fail_fail(tmp_path, monkeypatch, name):
    (tmp_path / "f").write_bytes(bytes(10))

    def fails(*args):
        raise OSError(getattr(errno, name), "no")

    monkeypatch.setattr(files, "_copy_file_range", fails)
    with pytest.raises(OSError, match="no") as caught:
        copy_range(File(tmp_path / "f"), 0, File(tmp_path / "f", write=True), 0, 10)
    assert caught.value.errno == getattr(errno, name)


def test_a_write_that_moves_nothing_ends(tmp_path, monkeypatch, io):
    (tmp_path / "f").write_bytes(bytes(10))
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: 0, raising=False)
    with pytest.raises(OSError, match="moved no bytes"):
        File(tmp_path / "f", write=True).write(memoryview(b"abc"), 0)


# --- beyond four gigabytes ------------------------------------------------------------------------------

_BIG = (4 << 30) + (1 << 20)  # bytes: more than 32 bits count


def _sparse(path, tail):
    """A file with one tensor of over 4 GB, all hole but its last bytes, and a small one behind it."""
    from loratools.dtypes import DTYPES
    from loratools.tensors.header import layout

    specs = {"big": TensorSpec(DTYPES["U8"], (_BIG,)), "small": TensorSpec(DTYPES["F32"], (2,))}
    header, offsets = layout(specs.items(), {})
    with path.open("wb") as file:
        file.write(header)
        file.seek(offsets["big"] + _BIG - len(tail))
        file.write(tail + np.array([1.5, 2.5], np.float32).tobytes())
    if path.stat().st_blocks * 512 > 1 << 24:
        pytest.skip("this file system has no sparse files")


def test_reads_beyond_four_gigabytes(tmp_path, io):
    tail = _random(64)
    _sparse(tmp_path / "w", tail)
    source = SafetensorsFile(tmp_path / "w")
    assert source.read_bytes("big", _BIG - 64).tobytes() == tail
    assert source.read_bytes("big", _BIG - 65, _BIG - 63).tobytes() == b"\0" + tail[:1]
    assert source.read("small").tolist() == [1.5, 2.5]
    assert source.extent("small").offset > 4 << 30


def test_copies_beyond_four_gigabytes(tmp_path, io):
    tail = _random(64)
    _sparse(tmp_path / "w", tail)
    extent = SafetensorsFile(tmp_path / "w").extent("big")
    with (tmp_path / "out").open("wb") as file:
        file.truncate(extent.nbytes)
    target, last = File(tmp_path / "out", write=True), 1 << 16
    copy_range(File(extent.path), extent.offset + _BIG - last, target, _BIG - last, last)
    assert target.read(64, _BIG - 64) == tail
    assert target.read(64, _BIG - 128) == bytes(64)


def test_a_copy_of_over_four_gigabytes_is_many_calls(tmp_path, monkeypatch):
    """The kernel moves less than 2 GiB a call; a stand-in counts the bytes and moves only the last."""
    tail = _random(64)
    _sparse(tmp_path / "w", tail)
    extent = SafetensorsFile(tmp_path / "w").extent("big")
    with (tmp_path / "out").open("wb") as file:
        file.truncate(extent.nbytes)
    calls = []

    def counts(source, target, count, at, to):
        moved = min(count, 0x7FFFF000)
        assert (at, to) == (extent.offset + sum(calls), sum(calls))
        os.pwrite(target, os.pread(source, 64, at + moved - 64), to + moved - 64)
        calls.append(moved)
        return moved

    monkeypatch.setattr(files, "_copy_file_range", counts)
    copy_range(File(extent.path), extent.offset, File(tmp_path / "out", write=True), 0, extent.nbytes)
    assert sum(calls) == _BIG
    assert max(calls) < 2 << 30
    assert File(tmp_path / "out").read(64, _BIG - 64) == tail
