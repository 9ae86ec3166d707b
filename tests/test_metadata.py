"""Metadata: edits that touch nothing else and cannot be caught half done, hashes, private keys, and the dialects."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

import loratools as lt
from loratools.cli.app import app
from loratools.errors import (
    CorruptFile,
    Incomplete,
    InputError,
    NotFound,
    OutputExists,
    UnknownFormat,
    Unsupported,
)
from loratools.metadata.hashes import HASHES, check_hashes, file_hashes, legacy_hash, recompute_hashes
from loratools.metadata.private import FIELDS, KEYS, NEEDED, shorten_paths, strip_private
from loratools.metadata.surgery import fitted, packed
from loratools.metadata.translation import (
    DIALECTS,
    FACTS,
    ModuleFacts,
    carry_over,
    diffusers_metadata,
    facts,
    kohya_metadata,
    network_metadata,
    say_facts,
)
from loratools.tensors import files
from loratools.tensors.safetensors import SafetensorsFile
from loratools.verbs import metadata_writing
from tests.small import contents, write_base, write_small_adapter

NEEDS_LINKS = pytest.mark.skipif(os.name == "nt", reason="links and modes are POSIX's here")


def tensors(count=3, rows=5, seed=0):
    rng = np.random.default_rng(seed)
    kinds = (np.float32, np.float16, np.int8)
    return {f"m{i}.lora_up.weight": rng.integers(-9, 9, (rows, 3)).astype(kinds[i % 3]) for i in range(count)}


@pytest.fixture
def small(tmp_path):
    """A file whose metadata lie in its first sector."""
    path = tmp_path / "style.safetensors"
    save_file(tensors(), path, metadata={"title": "Ink wash", "note": "x" * 40})
    return path


@pytest.fixture
def large(tmp_path):
    """A file whose metadata take many sectors, with values before and after the long one."""
    path = tmp_path / "trained.safetensors"
    tags = json.dumps({"10_ink": {f"tag {i}": i for i in range(900)}})
    write_plain(path, tensors(40, 300), {"a": "1", "ss_tag_frequency": tags, "z": "2"})
    return path


def write_plain(path, values, metadata, *, pad=8, spare=0):
    """A safetensors file written by hand, with metadata in this order."""
    entries, data = {"__metadata__": metadata} if metadata is not None else {}, b""
    names = {"float32": "F32", "float16": "F16", "int8": "I8"}
    for name, value in values.items():
        end = len(data) + value.nbytes
        entries[name] = {
            "dtype": names[value.dtype.name], "shape": list(value.shape), "data_offsets": [len(data), end]
        }  # fmt: skip
        data += value.tobytes()
    text = json.dumps(entries, ensure_ascii=False).encode()
    text += b" " * (-len(text) % pad + spare)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_metadata(path):
    with safe_open(path, "np") as file:
        return file.metadata() or {}


def split(path):
    """The header's text and the data of a file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return content[8:start], content[start:]


def names(folder):
    """What lies in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def entries(path):
    """What the header says of the tensors, in its order."""
    parsed = json.loads(split(path)[0])
    parsed.pop("__metadata__", None)
    return list(parsed.items())


def same_tensors(path, before):
    data = split(path)[1]
    return data == before[1] and entries(path) == before[0]


def state(path):
    return entries(path), split(path)[1]


# --- what an edit does ------------------------------------------------------------------------------------


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
METADATA = st.dictionaries(
    TEXT.filter(lambda key: key not in {"", "__metadata__", "loratools"}), TEXT, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(METADATA, METADATA, st.data())
def test_an_edit_changes_what_was_asked_and_nothing_else(tmp_path_factory, old, new, data):
    path = tmp_path_factory.mktemp("edit") / "x.safetensors"
    write_plain(
        path, tensors(), old, pad=data.draw(st.sampled_from([1, 8])), spare=data.draw(st.integers(0, 90))
    )
    unset = data.draw(st.lists(st.sampled_from(sorted(old)), unique=True)) if old else []
    unset = [key for key in unset if not re.search(r"[*?\[]", key)]
    before, content = state(path), path.read_bytes()
    report = lt.edit_metadata(path, set=new, unset=[key for key in unset if key not in new], sync=False)
    wanted = {key: value for key, value in old.items() if key not in unset} | new
    assert read_metadata(path) == dict(report.metadata) == wanted
    assert same_tensors(path, before)
    assert names(path.parent) == [path.name]
    if report.written == "copy":
        assert len(split(path)[0]) % 8 == 0
    elif report.written == "sector":
        differ = [
            place
            for place, pair in enumerate(zip(content, path.read_bytes(), strict=True))
            if len({*pair}) > 1
        ]
        assert differ[0] // 512 == differ[-1] // 512
        assert report.bytes_written == differ[-1] - differ[0] + 1
    again = lt.edit_metadata(path, set=new)
    assert (again.changed, again.output, again.written) == (False, None, "nothing")


@settings(max_examples=100, deadline=None)
@given(METADATA, METADATA, st.integers(0, 200), st.booleans())
def test_every_way_to_write_a_header_says_the_same(old, new, spare, spaced):
    separators = (" , ", " : ") if spaced else (",", ":")
    rest = {"b.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {"unknown": ["{", '"']}}
    text = (
        json.dumps({**rest, "__metadata__": old}, ensure_ascii=spare % 2 == 0, separators=separators)
        + " " * spare
    )
    ways = [*fitted(text, new), packed(text, new)]
    for way in ways:
        parsed = json.loads(way)
        assert parsed.pop("__metadata__", {}) == new
        assert list(parsed.items()) == list(rest.items())
    assert {len(way.encode()) for way in ways[:-1]} <= {len(text.encode())}
    if len(packed(text, new).encode()) <= len(text.encode()):
        assert len(ways) > 1


def test_a_file_without_metadata_and_one_without_tensors(tmp_path):
    for number, metadata in enumerate((None, {})):
        path = tmp_path / f"{number}.safetensors"
        write_plain(path, tensors() if number else {}, metadata)
        lt.edit_metadata(path, set={"k": "v"})
        assert read_metadata(path) == {"k": "v"}
        lt.edit_metadata(path, unset=["k"])
        assert read_metadata(path) == {}


def test_null_metadata_as_mlx_writes_them(tmp_path):
    path = tmp_path / "adapters.safetensors"
    text = b'{"__metadata__":null,"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\1\2\3\4")
    lt.edit_metadata(path, set={"k": "v"})
    assert read_metadata(path) == {"k": "v"}
    assert split(path)[1] == b"\1\2\3\4"


def test_fields_that_nobody_knows_stay_in_the_header(tmp_path):
    path = tmp_path / "x.safetensors"
    text = (
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"extra":[1, 2]}, "__metadata__" : {"a":"b"}}'
    )
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    lt.edit_metadata(path, set={"a": "something longer"})
    assert b'"extra":[1, 2]' in split(path)[0]
    lt.edit_metadata(path, unset=["a"])
    assert json.loads(split(path)[0])["w"]["extra"] == [1, 2]


def test_unset_takes_patterns_and_warns_of_what_is_not_there(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path, metadata={"ss_a": "1", "ss_b": "2", "c": "3", "[d]*": "4"})
    report = lt.edit_metadata(path, unset=["ss_*", "[d]*", "ghost"])
    assert read_metadata(path) == {"c": "3"}
    assert report.warnings == ("there is no 'ghost' to unset",)
    assert {change.key: change.action for change in report.changes} == dict.fromkeys(
        ["ss_a", "ss_b", "[d]*"], "unset"
    )


def test_set_comes_after_strip_and_unset(small):
    lt.edit_metadata(small, set={"ss_training_comment": "old", "title": "Ink wash"})
    report = lt.edit_metadata(small, set={"ss_training_comment": "new"}, unset=["ti*"], strip_private=True)
    assert dict(report.metadata) == {"note": "x" * 40, "ss_training_comment": "new"}
    again = lt.edit_metadata(small, set={"ss_training_comment": "new"}, strip_private=True)
    assert not again.changed


# --- in place, or whole -----------------------------------------------------------------------------------


@pytest.fixture
def no_copies(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("data were copied")

    monkeypatch.setattr(metadata_writing, "copy_range", refuse)


def test_one_sector_is_written_in_place(small, no_copies):
    inode, before = small.stat().st_ino, small.read_bytes()
    kept = state(small)
    report = lt.edit_metadata(small, unset=["note"])
    assert report.written == "sector"
    assert report.header_before == report.header_after
    assert report.bytes_written <= 512
    lt.edit_metadata(small, set={"title": "Ink wash, second version"})  # into the room that became free
    lt.edit_metadata(small, set={"author": "me"})
    assert read_metadata(small) == {"title": "Ink wash, second version", "author": "me"}
    assert small.stat().st_ino == inode
    assert same_tensors(small, kept)
    after = small.read_bytes()
    assert len(after) == len(before)
    assert after[512:] == before[512:]


def test_spaces_after_the_header_serve_too(tmp_path, no_copies):
    path = tmp_path / "x.safetensors"
    write_plain(path, tensors(1), {"a": "1"}, spare=64)
    report = lt.edit_metadata(path, set={"b": "2"})
    assert report.written == "sector"
    assert read_metadata(path) == {"a": "1", "b": "2"}


def test_what_crosses_a_sector_is_copied_and_renamed(large):
    inode, before = large.stat().st_ino, state(large)
    mode = large.stat().st_mode
    report = lt.edit_metadata(large, unset=["ss_tag_frequency"])
    assert report.written == "copy"
    assert report.bytes_written == large.stat().st_size
    assert large.stat().st_ino != inode
    assert large.stat().st_mode == mode
    assert same_tensors(large, before)
    assert read_metadata(large) == {"a": "1", "z": "2"}


def test_a_small_change_among_large_metadata_is_in_place(large, no_copies):
    """What stands behind the changed value keeps its place, so that one sector is enough."""
    report = lt.edit_metadata(large, set={"a": ""})
    assert report.written == "sector"
    assert report.bytes_written < 16
    assert {key: read_metadata(large)[key] for key in "az"} == {"a": "", "z": "2"}


@pytest.mark.parametrize(("rows", "unit"), [(300, 8), (60_000, 4096)])
def test_many_data_move_by_whole_blocks_so_that_they_can_be_shared(tmp_path, rows, unit):
    path = tmp_path / "x.safetensors"
    write_plain(path, tensors(5, rows), {"a": "1"})
    kept, before = state(path), len(split(path)[0])
    for change in ({"set": {"longer": "y" * 9000}}, {"unset": ["longer"]}):
        assert lt.edit_metadata(path, **change).written == "copy"
        assert same_tensors(path, kept)
        text = split(path)[0]
        assert (len(text) - before) % unit == 0
        assert len(text) - len(text.rstrip()) < unit


def test_an_unaligned_header_is_aligned_by_a_copy(tmp_path):
    path = tmp_path / "x.safetensors"
    write_plain(path, tensors(), {"a": "12"}, pad=1)
    if len(split(path)[0]) % 8 == 0:
        write_plain(path, tensors(), {"a": "123"}, pad=1)
    before = state(path)
    lt.edit_metadata(path, set={"b": "y" * 600})
    assert len(split(path)[0]) % 8 == 0
    assert same_tensors(path, before)


@NEEDS_LINKS
def test_other_names_of_a_file_keep_what_they_have(small):
    other = small.with_name("other.safetensors")
    os.link(small, other)
    before = other.read_bytes()
    report = lt.edit_metadata(small, unset=["note"])
    assert report.written == "copy"
    assert other.read_bytes() == before
    assert "note" not in read_metadata(small)


@NEEDS_LINKS
def test_never_through_a_symbolic_link(small, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(small)
    before = small.read_bytes()
    with pytest.raises(InputError, match=r"link\.safetensors is a symbolic link") as caught:
        lt.edit_metadata(link, set={"a": "1"})
    assert "-o OUT" in caught.value.hint
    assert str(small) in caught.value.hint
    with pytest.raises(InputError, match="symbolic link"):
        lt.edit_metadata(link, set={"a": "1"}, dry_run=True)
    lt.edit_metadata(link, set={"a": "1"}, out=tmp_path / "copy.safetensors")
    assert read_metadata(tmp_path / "copy.safetensors")["a"] == "1"
    assert small.read_bytes() == before
    assert link.is_symlink()


def test_nothing_is_edited_in_the_hubs_cache(tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    save_file(tensors(), folder / "x.safetensors")
    with pytest.raises(InputError, match="Hub's cache"):
        lt.edit_metadata(folder / "x.safetensors", set={"a": "1"})


@NEEDS_LINKS
def test_a_read_only_file(small):
    small.chmod(0o444)
    with pytest.raises(InputError, match="read-only") as caught:
        lt.edit_metadata(small, set={"a": "1"})
    assert "-o OUT" in caught.value.hint


# --- cut short --------------------------------------------------------------------------------------------

_KILLED = """
import os, pathlib, sys
import loratools as lt
from loratools.verbs import metadata_writing
{patch}
lt.edit_metadata(sys.argv[1], unset=["ss_tag_frequency"])
"""
_MOMENTS = {
    "before the data": "metadata_writing.copy_range = lambda *a: os._exit(9)",
    "within the data": (
        "copy = metadata_writing.copy_range\n"
        "def half(s, a, t, b, n):\n    copy(s, a, t, b, n // 2)\n    n > 5000 and os._exit(9)\n"
        "metadata_writing.copy_range = half"
    ),
    "before the rename": "pathlib.Path.replace = lambda *a: os._exit(9)",
    "after the rename": "metadata_writing.sync_folder = lambda *a: os._exit(9)",
}


@pytest.mark.parametrize("moment", _MOMENTS)
def test_killed(large, moment):
    """The file is the old or the new one, whole; the next edit takes over what was left behind."""
    before, kept = large.read_bytes(), state(large)
    program = _KILLED.format(patch=_MOMENTS[moment])
    done = subprocess.run([sys.executable, "-c", program, str(large)], check=False, capture_output=True)
    assert done.returncode == 9, done.stderr
    assert same_tensors(large, kept)
    if moment == "after the rename":
        assert "ss_tag_frequency" not in read_metadata(large)
    else:
        assert large.read_bytes() == before
        assert len(names(large.parent)) == 2
    lt.edit_metadata(large, set={"new": "value"}, unset=["ss_tag_frequency"])
    assert read_metadata(large) == {"a": "1", "z": "2", "new": "value"}
    assert same_tensors(large, kept)
    assert names(large.parent) == [large.name]


@pytest.mark.skipif(not files._POSITIONAL, reason="patches the positional calls")
@pytest.mark.parametrize("kernel", [True, False])
def test_calls_that_move_less_than_asked(large, small, monkeypatch, kernel):
    read, write, copy = os.preadv, os.pwritev, files._copy_file_range
    if not kernel or copy is None:
        monkeypatch.setattr(files, "_copy_file_range", None)
    else:
        monkeypatch.setattr(files, "_copy_file_range", lambda s, t, n, a, b: copy(s, t, min(n, 777), a, b))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, place: read(fd, [parts[0][:999]], place))
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, place: write(fd, [parts[0][:13]], place))
    for path, written in ((large, "copy"), (small, "sector")):
        kept = state(path)
        report = lt.edit_metadata(path, unset=["ss_tag_frequency", "note"], rehash=True)
        assert report.written == written
        assert same_tensors(path, kept)
        assert not {"ss_tag_frequency", "note"} & {*read_metadata(path)}


@pytest.mark.parametrize(("number", "complaint"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "error")])
@pytest.mark.parametrize("copy", [False, True])
def test_a_disk_that_refuses(large, tmp_path, monkeypatch, number, complaint, copy):
    before = contents(tmp_path)
    real = metadata_writing.copy_range

    def fail(source, begin, target, place, count):
        real(source, begin, target, place, count // 2)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(metadata_writing, "copy_range", fail)
    out = tmp_path / "out" if copy else None
    with pytest.raises(Incomplete, match=complaint):
        lt.edit_metadata(large, unset=["ss_tag_frequency"], out=out)
    assert contents(tmp_path) == before


def test_interrupted(large, tmp_path, monkeypatch):
    before = contents(tmp_path)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(metadata_writing, "copy_range", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lt.edit_metadata(large, unset=["ss_tag_frequency"])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["large", "small"])
def test_a_file_that_changes_meanwhile(request, monkeypatch, name):
    path = request.getfixturevalue(name)
    real = metadata_writing.rewrite_in_place

    def edited(file, plan, *, sync):
        content = path.read_bytes().replace(b'"m0.', b'"n0.')
        path.write_bytes(content)
        return real(file, plan, sync=sync)

    monkeypatch.setattr("loratools.verbs.metadata.rewrite_in_place", edited)
    with pytest.raises(Incomplete, match="has changed meanwhile"):
        lt.edit_metadata(path, unset=["ss_tag_frequency", "note"])
    assert "n0.lora_up.weight" in load_file(path)
    assert {"ss_tag_frequency", "note"} & {*read_metadata(path)}


def test_a_file_that_is_replaced_during_the_copy(large, monkeypatch):
    real = metadata_writing.copy_range

    def replaced(*arguments):
        other = large.with_name("new")
        save_file(tensors(1), other, metadata={"other": "file"})
        other.replace(large)
        return real(*arguments)

    monkeypatch.setattr(metadata_writing, "copy_range", replaced)
    with pytest.raises(Incomplete, match="has changed meanwhile"):
        lt.edit_metadata(large, unset=["ss_tag_frequency"])
    assert read_metadata(large) == {"other": "file"}


@NEEDS_LINKS
def test_two_edits_at_once(large):
    import fcntl

    before = large.read_bytes()
    part = large.with_name(f".{large.name}.loratools-part")
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Incomplete, match="another process is writing it"):
            lt.edit_metadata(large, unset=["ss_tag_frequency"])
        assert part.exists()
    assert large.read_bytes() == before
    lt.edit_metadata(large, unset=["ss_tag_frequency"])
    assert not part.exists()


def test_where_files_cannot_be_locked_what_is_left_is_not_taken_over(large, tmp_path, monkeypatch):
    monkeypatch.setattr(metadata_writing, "_lock", lambda fd: False)
    lt.edit_metadata(large, unset=["ss_tag_frequency"])
    part = large.with_name(f".{large.name}.loratools-part")
    part.write_bytes(b"of a run that may be alive")
    before = contents(tmp_path)
    with pytest.raises(OutputExists, match="is in the way"):
        lt.edit_metadata(large, set={"long": "x" * 900})
    assert contents(tmp_path) == before


@NEEDS_LINKS
def test_a_part_that_was_published_a_moment_ago_is_not_emptied(large, monkeypatch):
    """Between opening what seems left over and locking it, its owner may have renamed it over the file."""
    part = large.with_name(f".{large.name}.loratools-part")
    save_file(tensors(1), part, metadata={"other": "edit"})

    def published(fd):
        part.replace(large)
        return True

    monkeypatch.setattr(metadata_writing, "_lock", published)
    with pytest.raises(Incomplete, match="another process"):
        lt.edit_metadata(large, unset=["ss_tag_frequency"])
    assert read_metadata(large) == {"other": "edit"}


@NEEDS_LINKS
@pytest.mark.parametrize("thing", ["folder", "link"])
def test_something_else_under_the_parts_name(large, tmp_path, thing):
    part = large.with_name(f".{large.name}.loratools-part")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    part.mkdir() if thing == "folder" else part.symlink_to(victim)
    with pytest.raises(OutputExists, match="is in the way"):
        lt.edit_metadata(large, unset=["ss_tag_frequency"])
    assert victim.read_text() == "precious"
    assert os.path.lexists(part)


# --- a copy -----------------------------------------------------------------------------------------------


def test_a_copy_carries_its_record(small, tmp_path):
    before, kept = small.read_bytes(), state(small)
    out = tmp_path / "new" / "copy.safetensors"
    report = lt.edit_metadata(small, set={"a": "1"}, out=out)
    assert small.read_bytes() == before
    assert same_tensors(out, kept)
    found = read_metadata(out)
    made = json.loads(found.pop("loratools"))
    assert found == {"title": "Ink wash", "note": "x" * 40, "a": "1"}
    assert (made["verb"], made["parameters"]["set"]) == ("metadata", ["a"])
    assert made["inputs"][0]["name"] == small.name
    assert str(tmp_path) not in out.read_bytes().decode("latin1")
    assert (report.output, report.written) == (str(out), "copy")
    assert report.bytes_written == out.stat().st_size
    assert names(out.parent) == [out.name]


def test_a_copy_without_a_change_is_a_copy(small, tmp_path):
    lt.edit_metadata(small, out=tmp_path / "copy.safetensors")
    assert state(tmp_path / "copy.safetensors") == state(small)


def test_an_existing_output(small, tmp_path):
    out = tmp_path / "out.safetensors"
    save_file(tensors(1), out)
    strangers = out.read_bytes()
    with pytest.raises(OutputExists, match="exists"):
        lt.edit_metadata(small, out=out)
    with pytest.raises(OutputExists, match="was not made by loratools"):
        lt.edit_metadata(small, out=out, force=True)
    assert out.read_bytes() == strangers
    out.unlink()
    lt.edit_metadata(small, out=out)
    with pytest.raises(OutputExists):
        lt.edit_metadata(small, set={"b": "2"}, out=out)
    lt.edit_metadata(small, set={"b": "2"}, out=out, force=True)
    assert read_metadata(out)["b"] == "2"
    for force in (False, True):
        with pytest.raises(OutputExists, match="overlap"):
            lt.edit_metadata(out, set={"b": "3"}, out=out, force=force)


def test_the_record_of_a_file_survives_an_edit_in_place(small, tmp_path):
    out = tmp_path / "out.safetensors"
    lt.edit_metadata(small, out=out)
    made = read_metadata(out)["loratools"]
    lt.edit_metadata(out, set={"c": "3"}, strip_private=True)
    assert read_metadata(out)["loratools"] == made
    with pytest.raises(InputError, match="is the record"):
        lt.edit_metadata(out, set={"loratools": "me"})


def test_an_adapters_folder(tmp_path):
    adapter = write_small_adapter(tmp_path / "lora")
    kept = state(adapter / "adapter_model.safetensors")
    lt.edit_metadata(adapter, set={"title": "Ink"})
    assert same_tensors(adapter / "adapter_model.safetensors", kept)
    assert lt.load(adapter).metadata["title"] == "Ink"
    report = lt.edit_metadata(adapter, set={"title": "Ink 2"}, out=tmp_path / "copy")
    assert names(tmp_path / "copy") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loratools.json",
    ]
    assert report.files == {name: (tmp_path / "copy" / name).stat().st_size for name in report.files}
    assert lt.load(tmp_path / "copy").metadata["title"] == "Ink 2"
    assert lt.diff(adapter, tmp_path / "copy").identical
    with pytest.raises(OutputExists):
        lt.edit_metadata(adapter, out=tmp_path / "copy")
    with pytest.raises(OutputExists, match="overlap"):
        lt.edit_metadata(adapter, out=adapter / "inside", force=True)
    lt.edit_metadata(adapter, set={"title": "Ink 3"}, out=tmp_path / "copy", force=True)
    assert lt.load(tmp_path / "copy").metadata["title"] == "Ink 3"
    assert names(tmp_path) == ["copy", "lora"]
    single = lt.edit_metadata(adapter, out=tmp_path / "one.safetensors")
    assert "adapter_config.json lies beside" in single.warnings[0]


def full(*arguments):
    raise OSError(errno.ENOSPC, "full")


def test_a_folder_cut_short_is_made_again(tmp_path, monkeypatch):
    adapter = write_small_adapter(tmp_path / "lora")
    out = tmp_path / "copy"
    with monkeypatch.context() as patch:
        patch.setattr(metadata_writing, "copy_range", full)
        with pytest.raises(Incomplete, match="disk is full"):
            lt.edit_metadata(adapter, out=out)
    assert names(tmp_path) == ["lora"]
    part = tmp_path / "copy.part"
    part.mkdir()
    (part / "mine").write_text("precious")
    with pytest.raises(OutputExists, match="in the way"):
        lt.edit_metadata(adapter, out=out)
    assert (part / "mine").read_text() == "precious"
    (part / "loratools.json").write_text('{"loratools": "0.1"}')  # what a killed run leaves
    lt.edit_metadata(adapter, out=out)
    assert not part.exists()
    assert lt.load(out).modules


# --- what cannot be edited --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("a", "x\0y", "value contains a NUL"),
        ("a\0", "x", "key contains a NUL"),
        ("a", "\udcff", "value is not UTF-8"),
        ("\ud800", "x", "key is not UTF-8"),
        ("__metadata__", "x", "no key for metadata"),
        ("", "x", "no key for metadata"),
        ("a", 4, "strings"),
        (b"a", "x", "strings"),
    ],
)
def test_what_a_header_cannot_hold(small, key, value, complaint):
    before = small.read_bytes()
    with pytest.raises(InputError, match=complaint) as caught:
        lt.edit_metadata(small, set={key: value})
    assert str(caught.value).isprintable()
    assert small.read_bytes() == before


def test_a_header_that_would_be_too_large(small):
    before = small.read_bytes()
    with pytest.raises(InputError, match=r"would take 16,[\d,]+ bytes, and 16,000,000 are allowed"):
        lt.edit_metadata(small, set={"thumbnail": "x" * 16_000_000})
    assert small.read_bytes() == before


def test_files_without_metadata_are_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises((UnknownFormat, Unsupported), match=r"x\.gguf is (GGUF|not a safetensors file)"):
        lt.edit_metadata(tmp_path / "x.gguf", set={"a": "1"})
    (tmp_path / "x.pt").write_bytes(b"PK\3\4")
    with pytest.raises(Unsupported, match=r"x\.pt is a pickle") as caught:
        lt.edit_metadata(tmp_path / "x.pt")
    assert "--allow-pickle" not in caught.value.hint
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(Unsupported) as caught:
        lt.edit_metadata(tmp_path / "old")
    assert "safetensors" in caught.value.hint
    with pytest.raises(Unsupported, match="state dict"):
        lt.edit_metadata({})
    with pytest.raises(NotFound):
        lt.edit_metadata(tmp_path / "nothing.safetensors")
    (tmp_path / "lfs.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CorruptFile, match="LFS pointer"):
        lt.edit_metadata(tmp_path / "lfs.safetensors")


def test_of_several_files_one_must_be_named(tmp_path):
    base = write_base(tmp_path / "base", shards=2)
    with pytest.raises(Unsupported, match="2 weight files") as caught:
        lt.edit_metadata(base, set={"a": "1"})
    named = Path(caught.value.hint.removeprefix("name one: "))
    lt.edit_metadata(named, set={"a": "1"})
    assert read_metadata(named)["a"] == "1"


# --- hashes -----------------------------------------------------------------------------------------------


def true_hashes(values, metadata):
    """sd-scripts' formulas, on the library's own bytes."""
    content = save(values, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    data = content[8 + int.from_bytes(content[:8], "little") :]
    model = hashlib.sha256(data).hexdigest()
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": model, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{model}"}


@pytest.mark.parametrize("rows", [4, 350_000 // 7, 130_000])
@pytest.mark.parametrize(
    "metadata", [{}, {"ss_a": 'ü "quoted" \n\x7f\x01', "other": "x"}, {"ss_long": "x" * 70_000}]
)
def test_hashes_are_those_of_sd_scripts(tmp_path, rows, metadata):
    """Small, a little over a mebibyte, and over 64 KiB more; the library writes the data in an order of its own."""
    values = tensors(4, rows)
    path = tmp_path / "x.safetensors"
    save_file(values, path, metadata={**metadata, "sshs_model_hash": "0" * 64})
    found = file_hashes(SafetensorsFile(path))
    assert found == true_hashes(values, metadata)
    assert file_hashes(SafetensorsFile(path), keys=["sshs_legacy_hash"]) == {
        "sshs_legacy_hash": found["sshs_legacy_hash"]
    }


def test_the_legacy_hash_of_a_header_longer_than_a_mebibyte(tmp_path):
    values, metadata = tensors(2, 40_000), {"ss_long": "é" * 540_000}
    path = tmp_path / "x.safetensors"
    save_file(values, path, metadata=metadata)
    assert legacy_hash(SafetensorsFile(path)) == true_hashes(values, metadata)["sshs_legacy_hash"]


def test_a_legacy_hash_from_before_headers_were_padded(tmp_path):
    values = tensors(3, 130_000)
    for extra in range(8):
        metadata = {"ss_a": "x" * extra}
        content = save(values, metadata)
        head = content[: 8 + int.from_bytes(content[:8], "little")]
        old = head.rstrip() + content[len(head) :]
        stated = hashlib.sha256(old[0x100000:0x110000]).hexdigest()[:8]
        save_file(values, tmp_path / "x.safetensors", metadata={**metadata, "sshs_legacy_hash": stated})
        [check] = check_hashes(SafetensorsFile(tmp_path / "x.safetensors"))
        assert check.fits
        assert check.stated == stated


def stating(path, values, metadata, **wrong):
    save_file(values, path, metadata={**metadata, **true_hashes(values, metadata), **wrong})


def test_true_hashes_are_said_to_be_true_and_stay_so(tmp_path):
    path, values = tmp_path / "x.safetensors", tensors(3, 130_000)
    metadata = {"ss_session_id": "1" * 3000, "ss_v2": "False"}
    stating(path, values, metadata)
    shown = lt.edit_metadata(path)
    assert [(check.key, check.fits) for check in shown.hashes] == [(key, True) for key in HASHES]
    assert not shown.warnings
    report = lt.edit_metadata(path, strip_private=True)
    found = read_metadata(path)
    assert found == {"ss_v2": "False"} | true_hashes(values, {"ss_v2": "False"})
    assert [change.key for change in report.changes] == ["ss_session_id", "sshs_legacy_hash"]
    assert all(check.fits for check in lt.edit_metadata(path).hashes)


def test_an_edit_reads_no_data(tmp_path, monkeypatch):
    path, values = tmp_path / "x.safetensors", tensors()
    stating(path, values, {"title": "a"})
    monkeypatch.setattr("loratools.metadata.hashes.data_sha256", lambda file: 1 / 0)
    lt.edit_metadata(path, set={"title": "b"})
    with pytest.raises(ZeroDivisionError):
        lt.edit_metadata(path)


def test_wrong_hashes_are_told_and_corrected_when_asked(tmp_path):
    path, values = tmp_path / "x.safetensors", tensors()
    stating(path, values, {}, sshs_model_hash="0" * 64)
    warned = lt.edit_metadata(path).warnings
    assert len(warned) == 1
    assert "sshs_model_hash is 000" in warned[0]
    lt.edit_metadata(path, set={"title": "Ink"})
    assert read_metadata(path)["sshs_model_hash"] == "0" * 64
    report = lt.edit_metadata(path, rehash=True)
    assert [change.action for change in report.changes] == ["rehash"]
    assert not report.warnings
    assert read_metadata(path) == {"title": "Ink", **true_hashes(values, {})}
    assert not lt.edit_metadata(path, rehash=True).changed


def test_rehash_states_no_hash_that_was_not_there(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path, metadata={"modelspec.hash_sha256": "0x" + "0" * 64, "ss_a": "1"})
    lt.edit_metadata(path, rehash=True)
    assert read_metadata(path) == {
        "modelspec.hash_sha256": true_hashes(tensors(), {})["modelspec.hash_sha256"],
        "ss_a": "1",
    }
    assert recompute_hashes(SafetensorsFile(path), {"a": "b"}) == {"a": "b"}


def test_a_hash_that_was_set_by_hand_stays(tmp_path):
    path = tmp_path / "x.safetensors"
    stating(path, tensors(), {})
    lt.edit_metadata(path, set={"sshs_legacy_hash": "12345678"}, rehash=True)
    assert read_metadata(path)["sshs_legacy_hash"] == "12345678"


@pytest.mark.skipif("LORATOOLS_CORPUS" not in os.environ, reason="needs the corpus of real adapters")
def test_hashes_that_a_trainer_wrote():
    """Files of a real trainer, the older of safetensors' paddings included."""
    seen = 0
    for path in Path(os.environ["LORATOOLS_CORPUS"]).rglob("*.safetensors"):
        try:
            file = SafetensorsFile(path)
        except CorruptFile:
            continue
        for check in check_hashes(file):
            seen += 1
            assert check.fits, (path, check)
    assert seen >= 4


# --- private ----------------------------------------------------------------------------------------------

TRAINED = {
    "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora", "ss_network_dim": "8",
    "ss_network_alpha": "4.0", "ss_network_args": '{"conv_dim": "8"}', "ss_output_name": "ink",
    "ss_dataset_dirs": '{"10_me at home": {"n_repeats": 10}}', "ss_tag_frequency": '{"10_me": {"beach": 4}}',
    "ss_training_comment": "my comment", "ss_session_id": "123", "ss_reg_dataset_dirs": "{}",
    "ss_bucket_info": '{"buckets": {}}', "ss_sd_model_name": "C:\\Users\\anna\\models\\base v2.safetensors",
    "ss_vae_name": "/home/anna/my vae/vae.pt", "ss_learning_rate": "1e-4", "ss_resolution": "(512, 512)",
    "ss_datasets": json.dumps([{"resolution": [512, 512], "tag_frequency": {"10_me": {"beach": 4}}, "subsets": [
        {"image_dir": "10_me", "num_repeats": 10, "metadata_file": "/home/anna/meta.json"}]}]),
    "training_info": json.dumps({"step": 10, "folder": "/root/ai-toolkit/anna/output/ink"}),
    "software": json.dumps({"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit"}),
    "prompt": '{"3": {"class_type": "KSampler"}}', "modelspec.title": "Ink and/or wash", "modelspec.author": "A. N.",
    "modelspec.description": "trained on /mnt/data/anna/set 1/img.png and D:/more/b.png, 3/4 of it",
    "modelspec.date": "2024-01-01T00:00:00", "modelspec.hash_sha256": "0xabc", "modelspec.license": "CC-BY 4.0 / MIT",
    "lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.base_model_name_or_path": "/home/anna/sd15"}),
}  # fmt: skip


def test_what_is_private_goes_and_the_rest_stays():
    kept, done = strip_private(TRAINED)
    text = json.dumps(kept)
    for private in ("anna", "10_me", "beach", "my comment", "KSampler", "home", "mnt", "C:", "D:"):
        assert private not in text, private
    gone = {one.key for one in done if one.after is None}
    assert gone == {
        "ss_dataset_dirs", "ss_tag_frequency", "ss_training_comment", "ss_session_id", "ss_reg_dataset_dirs",
        "ss_bucket_info", "prompt",
    }  # fmt: skip
    shortened = {one.key: one.after for one in done if one.after is not None}
    assert shortened["ss_sd_model_name"] == "base v2.safetensors"
    assert shortened["ss_vae_name"] == "vae.pt"
    assert json.loads(shortened["training_info"]) == {"step": 10, "folder": "ink"}
    assert json.loads(shortened["lora_adapter_metadata"])["unet.base_model_name_or_path"] == "sd15"
    assert json.loads(shortened["ss_datasets"]) == [
        {"resolution": [512, 512], "subsets": [{"num_repeats": 10}]}
    ]
    assert shortened["modelspec.description"] == "trained on img.png and b.png, 3/4 of it"
    untouched = set(TRAINED) - gone - set(shortened)
    assert {key: kept[key] for key in untouched} == {key: TRAINED[key] for key in untouched}
    assert {*NEEDED, "ss_output_name", "software", "modelspec.title", "modelspec.license"} <= untouched
    assert all(one.reason for one in done)
    assert strip_private(kept) == (kept, ())


def test_every_rule_of_the_tables_is_kept():
    for pattern in KEYS:
        key = pattern.replace("*", "x")
        assert strip_private({key: "v"})[0] == {}, key
    for field in FIELDS:
        value = json.dumps({"a": [{field: "v", "b": 1}]})
        assert json.loads(strip_private({"config": value})[0]["config"]) == {"a": [{"b": 1}]}
    assert not any(re.fullmatch(pattern.replace("*", ".*"), key) for pattern in KEYS for key in NEEDED)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/home/me/x.safetensors", "x.safetensors"),
        ("/home/o'brien, j/loras [v2]/x.safetensors", "x.safetensors"),
        ("/home/me/loras/", "loras"),
        ("/workspace/x", "x"),
        ("/home/anna", "~"),
        ("/mnt/c/Users/anna", "~"),
        ("/c/Users/anna/x", "x"),
        ("C:\\Users\\Jane Doe\\", "~"),
        ("in /Users/anna, and C:\\Users\\anna is where", "in ~, and ~ is where"),
        ("\\\\?\\C:\\Users\\anna\\x", "x"),
        ("\\\\wsl$\\Ubuntu\\home\\anna\\x", "x"),
        ("file:/home/anna/x", "x"),
        ("file:///C:/Users/anna/x", "x"),
        (
            "see data:image/jpeg;base64,/9j/4AAQ+/a/b= in /home/anna/x",
            "see data:image/jpeg;base64,/9j/4AAQ+/a/b= in x",
        ),
        ("~/models/x", "x"),
        ("~anna/models/x", "x"),
        ("C:/x", "x"),
        ("\\\\server\\share\\anna\\x", "x"),
        ("file:///home/me/x y/z", "z"),
        ("--output=/home/me/out --seed=1", "--output=out --seed=1"),
        ('{"a": "/home/me/b"', '{"a": "b"'),
        ("from /home/me/a and /home/you/b", "from a and b"),
        ("D:\\a\\b\\c.png", "c.png"),
    ],
)
def test_paths_are_shortened(text, short):
    assert shorten_paths(text) == short


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/owner/name/resolve/main/x.safetensors", "owner/name", "and/or", "1/2/3", "./a/b",
        "stable-diffusion-xl-v1-base/lora", "smart falcon \\(umamusume\\)", "s/he", "a:b", "</s>", "/", "//", "~",
        "lion_pytorch.lion_pytorch.Lion(weight_decay=0.1)", "data:image/png;base64,/9j/+/w/b/c",
        "sha256-a/b+/c/d=", "16:9", "blue / green / red", "http://home/me/a", "https://x.org/home/me/a",
        "2024-01-01T00:00:00", "(:.*/)?x", "",
    ],
)  # fmt: skip
def test_what_is_no_path_is_left_alone(text):
    assert shorten_paths(text) == text


def test_hostile_values_take_no_time():
    """Each would take minutes if a search went over it more than once for every character."""
    for text in (
        "/" * 200_000,
        "/a" * 100_000,
        "~a" * 100_000,
        "/" + " " * 200_000,
        "C:\\" * 70_000,
        "\\\\a" * 60_000,
    ):
        strip_private({"a": text, "b": json.dumps([text])})
    deep = "[" * 900 + "]" * 900
    strip_private({"a": deep, "b": "[" * 100_000})


def test_a_key_that_is_a_path():
    kept, done = strip_private(
        {"/home/me/a.png": "caption", "b": json.dumps({"/home/me/x": 1, "/home/you/x": 2})}
    )
    assert json.loads(kept["b"]) == {"x": 1, "x_": 2}
    assert [one.key for one in done] == ["/home/me/a.png", "b"]


def test_a_path_in_the_configuration_is_told(tmp_path):
    adapter = write_small_adapter(tmp_path / "lora", base_model_name_or_path="/home/anna/llama")
    report = lt.edit_metadata(adapter, strip_private=True)
    assert "/home/anna/llama" in report.warnings[0]
    assert (
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "/home/anna/llama"
    )


# --- the command line -------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["metadata", *map(str, arguments)])


def test_showing(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path, metadata={**TRAINED, "evil": "a\x1b[2J\nb", **true_hashes(tensors(), TRAINED)})
    before = path.read_bytes()
    result = run(path)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert '"n_repeats": 10' in result.stdout
    assert "sshs_model_hash fits the data" in result.stdout
    document = json.loads(run(path, "--json").stdout)
    assert document["metadata"] == read_metadata(path)
    assert [check["fits"] for check in document["hashes"]] == [True] * 3
    assert path.read_bytes() == before


def test_long_values_are_cut_unless_asked(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path, metadata={"a": "y" * 500, "b": json.dumps({str(i): i for i in range(50)})})
    short, whole = run(path).stdout, run(path, "--verbose").stdout
    assert "400 more characters" in short
    assert "more lines" in short
    assert "y" * 500 in whole
    assert '"49": 49' in whole


def test_editing(small):
    result = run(small, "--set", "title=a=b", "--set", "empty=", "--unset", "note", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == "loratools.metadata/1"
    assert document["metadata"] == read_metadata(small) == {"title": "a=b", "empty": ""}
    assert document["changed"] is True
    assert document["output"] == str(small)
    result = run(small, "--set", "title=a=b")
    assert "nothing to change" in result.stdout
    assert run(small, "--set", "title=c", "-q").stdout == ""
    assert read_metadata(small)["title"] == "c"


def test_many_changes_are_counted_and_none_leaves_no_table(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path, metadata={f"unet:{i}:rank": "4" for i in range(60)} | {"a": "1"})
    short = run(path, "--unset", "unet:*", "--dry-run").stdout
    assert "and 40 more" in short
    assert "unet:59:rank" in run(path, "--unset", "unet:*", "--dry-run", "--verbose").stdout
    assert len(run(path, "-o", tmp_path / "copy.safetensors").stdout.splitlines()) == 1
    document = json.loads(run(path, "--unset", "unet:*", "--json").stdout)
    assert len(document["changes"]) == 60


def test_a_dry_run_touches_nothing(large, tmp_path):
    before = contents(tmp_path)
    result = run(large, "--strip-private", "--dry-run")
    assert result.exit_code == 0
    assert "Would write" in result.stdout
    assert "the captions of the training data" in result.stdout
    document = json.loads(run(large, "--strip-private", "--dry-run", "--json", "-o", tmp_path / "out").stdout)
    assert document["dry_run"] is True
    assert [change["action"] for change in document["changes"]] == ["strip"]
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "novalue"],
        ["--set", "=x"],
        ["--set", "a=1", "--set", "a=2"],
        ["--set", "a=1", "--unset", "a"],
        ["--force"],
    ],
)
def test_command_lines_that_cannot_be_meant(small, arguments):
    result = run(small, *arguments)
    assert result.exit_code == 2
    assert "Hint:" in result.stderr


def test_exit_codes(small, tmp_path):
    assert run(tmp_path / "nothing.safetensors").exit_code == 3
    assert run(small, "--set", "__metadata__=x").exit_code == 3
    result = run(small, "-o", small, "--set", "a=1")
    assert result.exit_code == 3
    assert "overlap" in result.stderr


def test_neither_numpy_nor_torch_is_needed(small):
    code = (
        "import sys\nfrom loratools.cli.app import app\n"
        f"app.main(['metadata', {str(small)!r}, *sys.argv[1:]], standalone_mode=False)\n"
        "assert not {'numpy', 'torch', 'ml_dtypes', 'rich', 'safetensors'} & set(sys.modules), sorted(sys.modules)"
    )
    for arguments in (
        [],
        ["--json"],
        ["--set", "a=1"],
        ["--strip-private", "-o", str(small.with_name("copy"))],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert not done.returncode, done.stderr


# --- dialects ---------------------------------------------------------------------------------------------


def test_the_minimal_set_of_kohya():
    even = {f"lora_unet_{i}": ModuleFacts(8, 4.0) for i in range(3)}
    assert kohya_metadata(even, base_model_version="sd_v1", v2=False) == {
        "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
        "ss_network_dim": "8", "ss_network_alpha": "4",
    }  # fmt: skip
    mixed, convolutions = {**even, "x": ModuleFacts(4, 4.5)}, {"c": ModuleFacts(2, 0.5)}
    assert "ss_network_args" not in kohya_metadata(mixed, convolutions=convolutions)
    uneven = kohya_metadata(mixed, convolutions=convolutions, algo="locon")
    assert (uneven["ss_network_dim"], uneven["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert json.loads(uneven["ss_network_args"]) == {"algo": "locon", "conv_dim": "2", "conv_alpha": "0.5"}
    lokr = kohya_metadata(even, algo="lokr")
    assert lokr["ss_network_module"] == "lycoris.kohya"
    assert json.loads(lokr["ss_network_args"]) == {"algo": "lokr"}
    assert kohya_metadata({}) == {"ss_network_module": "networks.lora"}
    assert set(uneven) | {"ss_v2", "ss_base_model_version"} == NEEDED


def told(*ranks: int) -> dict[str, ModuleFacts]:
    return {f"lora_unet_{i}": ModuleFacts(rank, rank / 2) for i, rank in enumerate(ranks)}


@pytest.mark.parametrize(
    ("said", "ranks", "kinds", "true"),
    [
        ({"ss_network_alpha": "2.0"}, (4, 4), {"lora"}, {"ss_network_alpha": "2.0"}),
        (
            {"ss_network_alpha": "2.001"},
            (4, 4),
            {"lora"},
            {"ss_network_alpha": "2.001"},
        ),  # rounded to bfloat16
        ({"ss_network_alpha": "3"}, (4, 4), {"lora"}, {"ss_network_alpha": "2"}),
        ({"ss_network_dim": "8"}, (4, 4), {"lora"}, {"ss_network_dim": "4"}),
        ({"ss_network_dim": "8"}, (4, 2), {"lora"}, {"ss_network_dim": "Dynamic"}),
        ({"ss_network_dim": "4"}, (4, 4, 2), {"lora"}, {"ss_network_dim": "4"}),
        ({"ss_network_dim": "Dynamic"}, (4, 2), {"lora"}, {"ss_network_dim": "Dynamic"}),
        ({"ss_network_dim": "Dynamic"}, (4, 4), {"lora"}, {"ss_network_dim": "4"}),
        ({"ss_network_dim": "None"}, (4, 4), {"lora"}, {"ss_network_dim": "None"}),
        ({"ss_network_dim": "8"}, (), {"full"}, {"ss_network_dim": "8"}),
        ({"ss_network_module": "networks.loha"}, (4,), {"lora"}, {}),
        ({"ss_network_module": "networks.dylora"}, (4,), {"lora"}, {"ss_network_module": "networks.dylora"}),
        ({"ss_title": "Ink"}, (4,), {"lora"}, {}),
    ],
)
def test_what_a_file_says_of_its_network_stays_while_it_is_true(said, ranks, kinds, true):
    assert network_metadata(said, told(*ranks), kinds=kinds) == true


def test_arguments_of_a_network_stay_as_they_are_written_but_for_ranks_and_alphas():
    text = '{"algo":"loha",  "preset": "full", "conv_dim": "4", "conv_alpha": 2.0}'
    said = {"ss_network_module": "lycoris.kohya", "ss_network_args": text}
    small = {"c": ModuleFacts(2, 1.0)}
    assert network_metadata(said, told(8), kinds={"loha", "full"}) == said
    assert network_metadata(said, told(8), convolutions={"c": ModuleFacts(4, 2.0)}, kinds={"loha"}) == said
    changed = network_metadata(said, told(8), convolutions=small, kinds={"loha"})["ss_network_args"]
    assert json.loads(changed) == {"algo": "loha", "preset": "full", "conv_dim": "2", "conv_alpha": "1"}
    assert network_metadata(said, told(8), kinds={"lora"}) == {}
    for odd in ("unit=4", "[4]", "", "{"):
        assert network_metadata({"ss_network_args": odd}, told(8), kinds={"lora"}) == {"ss_network_args": odd}


def test_facts_are_translated_and_not_invented():
    said = {
        "modelspec.title": "Ink",
        "modelspec.trigger_phrase": "ink style",
        "modelspec.license": "MIT",
        "x": "y",
    }
    known = facts(said)
    assert known == {"title": "Ink", "trigger": "ink style", "licence": "MIT"}
    for dialect in DIALECTS:
        words = say_facts(known, dialect)
        assert facts(words) == {fact: value for fact, value in known.items() if dialect in FACTS[fact]}
    assert facts({"ss_sd_model_name": "None", "modelspec.title": ""}) == {}


def test_what_is_no_longer_true_is_left_with_a_reason():
    said = {
        "ss_output_name": "ink", "ss_network_dim": "8", "lora_adapter_metadata": "{}", "sshs_model_hash": "0",
        "unet:0:rank": "4", "unet": "[]", "<s1>": "<embed>", "modelspec.title": "Ink", "loratools": "{}",
        "format": "pt",
    }  # fmt: skip
    kept, left = carry_over(said)
    assert kept == {"ss_output_name": "ink", "<s1>": "<embed>", "modelspec.title": "Ink"}
    assert set(left) == set(said) - set(kept)
    assert all(left.values())


def flux():
    """A transformer of one block of each kind."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 0),
    )  # fmt: skip


MODULES = {
    "transformer.transformer_blocks.0.attn.to_q": ModuleFacts(4, 8.0),
    "transformer.transformer_blocks.0.attn.to_k": ModuleFacts(2, 8.0),
    "transformer.single_transformer_blocks.0.attn.to_q": ModuleFacts(4, 8.0),
    "transformer.single_transformer_blocks.0.proj_out": ModuleFacts(4, 2.5),
    "transformer.proj_out": ModuleFacts(3, 8.0),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": ModuleFacts(16, 16.0),
}


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_gives_every_module_the_scale_we_say(tmp_path, dora):
    """Written by us, read by the functions with which diffusers loads an adapter into a model."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata
        from safetensors.torch import save_file as save_torch

        model = flux()
        inner = {
            n.removeprefix("transformer."): m for n, m in MODULES.items() if n.startswith("transformer.")
        }
        values = {}
        for path, module in inner.items():
            out, into = model.get_submodule(path).weight.shape
            values[f"transformer.{path}.lora_A.weight"] = torch.randn(module.rank, into)
            values[f"transformer.{path}.lora_B.weight"] = torch.randn(out, module.rank)
            if dora:
                values[f"transformer.{path}.lora_magnitude_vector"] = torch.ones(out)
        said = diffusers_metadata(MODULES, dora=[f"transformer.{path}" for path in inner] if dora else ())
        save_torch(values, tmp_path / "x.safetensors", metadata={"format": "pt", **said})
        packed = _load_sft_state_dict_metadata(tmp_path / "x.safetensors")
        model.load_lora_adapter(tmp_path, weight_name="x.safetensors", prefix="transformer", adapter_name="x")
    config = model.peft_config["x"]
    assert (config.use_dora, config.lora_bias) == (dora, False)
    for path, module in inner.items():
        layer = model.get_submodule(path)
        assert layer.r["x"] == module.rank
        assert layer.scaling["x"] == module.alpha / module.rank
        assert torch.equal(layer.lora_B["x"].weight, values[f"transformer.{path}.lora_B.weight"])
    loaded = [name for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    assert sorted(loaded) == sorted(inner)
    assert packed["text_encoder.r"] == packed["text_encoder.lora_alpha"] == 16


def test_diffusers_gives_every_module_of_a_text_encoder_the_scale_we_say(tmp_path):
    """With or without "text_model" in the model's own names, which transformers 5 dropped."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders.lora_base import _load_lora_into_text_encoder
        from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata
        from safetensors.torch import save_file as save_torch
        from transformers import CLIPTextConfig, CLIPTextModel

        small = CLIPTextConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2, vocab_size=10,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = CLIPTextModel(small)
        inner = {
            f"encoder.layers.{layer}.self_attn.{name}": ModuleFacts(4 if layer == 1 else 2, layer + 0.5)
            for layer in (0, 1, 10, 11)
            for name in ("q_proj", "out_proj")
        }
        values = {}
        for path, module in inner.items():
            values[f"text_encoder.text_model.{path}.lora_A.weight"] = torch.randn(module.rank, 8)
            values[f"text_encoder.text_model.{path}.lora_B.weight"] = torch.randn(8, module.rank)
        said = diffusers_metadata({f"text_encoder.text_model.{path}": m for path, m in inner.items()})
        save_torch(values, tmp_path / "x.safetensors", metadata={"format": "pt", **said})
        _load_lora_into_text_encoder(
            values, None, model, prefix="text_encoder", adapter_name="x",
            metadata=_load_sft_state_dict_metadata(tmp_path / "x.safetensors"),
        )  # fmt: skip
    start = "text_model." if hasattr(model, "text_model") else ""
    for path, module in inner.items():
        layer = model.get_submodule(start + path)
        assert layer.r["x"] == module.rank
        assert layer.scaling["x"] == module.alpha / module.rank
        assert torch.equal(layer.lora_B["x"].weight, values[f"text_encoder.text_model.{path}.lora_B.weight"])
    loaded = [name.removeprefix(start) for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    assert sorted(loaded) == sorted(inner)


def test_what_a_lora_config_cannot_say():
    with pytest.raises(Unsupported, match=r"transformer\.proj_out has no DoRA magnitude"):
        diffusers_metadata(
            {"transformer.proj_out": ModuleFacts(4, 4), "transformer.proj_in": ModuleFacts(4, 4)},
            dora=["transformer.proj_in"],
        )
    assert diffusers_metadata({}) == {}
    biased = json.loads(diffusers_metadata(MODULES, biased=["transformer.proj_out"])["lora_adapter_metadata"])
    assert (biased["transformer.lora_bias"], biased["text_encoder.lora_bias"]) == (True, False)
