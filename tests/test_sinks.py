"""Outputs that appear whole or not at all: crashes, kills, full disks, resumption, replacement."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools import journal as journals
from loratools import planning, publishing, sinks
from loratools.errors import (
    Incomplete,
    LoratoolsError,
    NonFinite,
    NotFound,
    OutputExists,
    OverBudget,
    Unsupported,
)
from loratools.executors.inline import Inline
from loratools.planning import CopyStep
from loratools.publishing import set_aside, standing
from loratools.running import run
from loratools.sinks import FileSink, MemorySink
from loratools.tensors import files
from tests.small import LAYERS, base_tensors, contents, write_base, write_small_adapter


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", shards=2)


@pytest.fixture
def adapter(tmp_path):
    return write_small_adapter(tmp_path / "lora")


@pytest.fixture
def expected(tmp_path, base, adapter):
    lt.merge(base, adapter, tmp_path / "expected")
    return contents(tmp_path / "expected")


_KEY = "base_model.model.layers.2.q_proj"


class Stop(Exception):
    pass


def stopping(after, error=Stop):
    """An ``on_step`` that raises once so many steps are done."""
    seen = []

    def on_step(step):
        seen.append(step)
        if len(seen) == after:
            raise error

    return on_step


def beside(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out"))


# --- interruption and resumption -------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["inline", "threads"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("after", [1, 3, 6])
def test_interrupted_then_resumed(tmp_path, base, adapter, expected, executor, error, after):
    out = tmp_path / "out"
    with pytest.raises(error):
        lt.merge(base, adapter, out, on_step=stopping(after, error), executor=executor)
    assert beside(tmp_path) == ["out.part"]
    report = lt.merge(base, adapter, out, resume=True, executor=executor)
    assert report.resumed >= after
    assert contents(out) == expected
    assert beside(tmp_path) == ["out"]


def test_interrupted_again_and_again(tmp_path, base, adapter, expected):
    for count in range(1, 4):
        with pytest.raises(Stop):
            lt.merge(base, adapter, tmp_path / "out", resume=True, on_step=stopping(1), executor="inline")
        done = (tmp_path / "out.part" / journals.JOURNAL).read_text().count("step")
        assert done == count
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed == 3
    assert contents(tmp_path / "out") == expected


def test_interrupted_then_started_anew(tmp_path, base, adapter, expected):
    with pytest.raises(Stop):
        lt.merge(base, adapter, tmp_path / "out", on_step=stopping(2))
    assert lt.merge(base, adapter, tmp_path / "out").resumed == 0
    assert contents(tmp_path / "out") == expected
    assert beside(tmp_path) == ["out"]


def test_resume_with_nothing_to_resume(tmp_path, base, adapter, expected):
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed == 0
    assert contents(tmp_path / "out") == expected


def test_single_file_interrupted_then_resumed(tmp_path, base, adapter):
    single = write_base(tmp_path / "single") / "model.safetensors"
    lt.merge(single, adapter, tmp_path / "expected.safetensors")
    with pytest.raises(Stop):
        lt.merge(single, adapter, tmp_path / "out.safetensors", on_step=stopping(2), executor="inline")
    assert beside(tmp_path) == ["out.safetensors.part", f"out.safetensors.part{journals.JOURNAL}"]
    assert lt.merge(single, adapter, tmp_path / "out.safetensors", resume=True).resumed == 2
    assert beside(tmp_path) == ["out.safetensors"]
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_what_was_done_is_not_done_again(tmp_path, base, adapter, expected):
    with pytest.raises(Stop):
        lt.merge(base, adapter, tmp_path / "out", on_step=stopping(4), executor="inline")
    steps = []
    lt.merge(base, adapter, tmp_path / "out", resume=True, on_step=steps.append)
    whole = []
    lt.merge(base, adapter, tmp_path / "again", on_step=whole.append)
    assert len(steps) == len(whole) - 4
    assert contents(tmp_path / "out") == expected


_KILLED = """
import sys, time
import loratools as lt
base, adapter, out = sys.argv[1:]
def slow(step):
    print("step", flush=True)
    time.sleep(0.2)
lt.merge(base, adapter, out, on_step=slow, executor="inline")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no kill -9")
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_killed_then_resumed(tmp_path, base, adapter, expected, kind):
    if kind == "file":
        base = write_base(tmp_path / "single") / "model.safetensors"
        lt.merge(base, adapter, tmp_path / "whole")
        expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", _KILLED, str(base), str(adapter), str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        for _ in range(3):
            assert process.stdout.readline() == b"step\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert lt.merge(base, adapter, out, resume=True).resumed >= 3
    found = contents(out)
    assert list(found.values()) == list(expected.values())
    assert beside(tmp_path) == ["out"]


def interrupted(base, adapter, out, **options):
    with pytest.raises(Stop):
        lt.merge(base, adapter, out, on_step=stopping(3), executor="inline", **options)


def touch(path):
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10_000_000))


def _other_alpha(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 7}))


_CHANGES = {
    "base_time": lambda base, adapter: touch(next(base.glob("*.safetensors"))),
    "base_values": lambda base, adapter: shutil.copytree(
        write_base(base.parent / "other", shards=2, seed=1), base, dirs_exist_ok=True
    ),
    "adapter_time": lambda base, adapter: touch(adapter / "adapter_model.safetensors"),
    "adapter_values": lambda base, adapter: write_small_adapter(adapter, seed=1),
    "adapter_alpha": _other_alpha,
}


@pytest.mark.parametrize("change", _CHANGES)
def test_a_changed_input_starts_over(tmp_path, base, adapter, change):
    interrupted(base, adapter, tmp_path / "out")
    _CHANGES[change](base, adapter)
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed == 0
    lt.merge(base, adapter, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("options", [{"weights": [0.5]}, {"dtype": "bf16"}, {"shard_size": 400}])
def test_another_plan_starts_over(tmp_path, base, adapter, options):
    interrupted(base, adapter, tmp_path / "out")
    assert lt.merge(base, adapter, tmp_path / "out", resume=True, **options).resumed == 0
    lt.merge(base, adapter, tmp_path / "expected", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_another_adapter_starts_over(tmp_path, base, adapter):
    second = write_small_adapter(tmp_path / "second", seed=5)
    interrupted(base, [adapter, second], tmp_path / "out")
    touch(second / "adapter_model.safetensors")
    assert lt.merge(base, [adapter, second], tmp_path / "out", resume=True).resumed == 0


def test_another_block_size_starts_over(tmp_path, base, adapter, expected, monkeypatch):
    interrupted(base, adapter, tmp_path / "out")
    monkeypatch.setattr(planning, "BLOCK_ELEMENTS", 40)
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed == 0
    found = contents(tmp_path / "out")
    assert set(found) == set(expected)


def test_an_adapter_in_memory_is_never_resumed(tmp_path, base, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    interrupted(base, lt.load(tensors, config=config), tmp_path / "out")
    assert lt.merge(base, lt.load(tensors, config=config), tmp_path / "out", resume=True).resumed == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "{",
        lambda text: "[]\n" + text.partition("\n")[2],
        lambda text: "null\nstep 0\n",
        lambda text: text.replace('"plan": "', '"plan": "0'),
        lambda text: "\x00\n" + text,
    ],
)
def test_a_damaged_journal_starts_over(tmp_path, base, adapter, expected, damage):
    interrupted(base, adapter, tmp_path / "out")
    journal = tmp_path / "out.part" / journals.JOURNAL
    journal.write_text(damage(journal.read_text()))
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed == 0
    assert contents(tmp_path / "out") == expected


def test_half_a_line_of_the_journal_does_not_count(tmp_path, base, adapter, expected):
    """Step 12 written as "step 1" must not pass for step 1."""
    interrupted(base, adapter, tmp_path / "out")
    journal = tmp_path / "out.part" / journals.JOURNAL
    head, *steps = journal.read_text().splitlines()
    journal.write_text("\n".join([head, "step 99", "step x", "nonsense", steps[0], "step 5"]))
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed == 1
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("damage", ["missing", "shorter", "folder"])
def test_a_damaged_part_starts_over(tmp_path, base, adapter, expected, damage):
    interrupted(base, adapter, tmp_path / "out")
    weights = next((tmp_path / "out.part").glob("*.safetensors"))
    if damage == "shorter":
        os.truncate(weights, 100)
    else:
        weights.unlink()
    if damage == "folder":
        weights.mkdir()
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed == 0
    assert contents(tmp_path / "out") == expected


def test_after_a_reboot_only_synced_files_count(tmp_path, base, adapter, expected, monkeypatch):
    monkeypatch.setattr(journals, "_boot", lambda: "first")
    steps = lt.plan_merge(base, adapter, tmp_path / "out").plan.steps
    first = [step.file for step in steps].count(0)
    copies = sum(isinstance(step, CopyStep) for step in steps if step.file != 0)  # done early
    with pytest.raises(Stop):  # one file whole and synced, the other begun
        lt.merge(base, adapter, tmp_path / "out", on_step=stopping(first + copies + 1), executor="inline")
    monkeypatch.setattr(journals, "_boot", lambda: "second")
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed == first
    assert contents(tmp_path / "out") == expected


def test_without_sync_a_reboot_starts_over(tmp_path, base, adapter, expected, monkeypatch):
    monkeypatch.setattr(journals, "_boot", lambda: "first")
    interrupted(base, adapter, tmp_path / "out", sync=False)
    monkeypatch.setattr(journals, "_boot", lambda: "second")
    assert lt.merge(base, adapter, tmp_path / "out", resume=True, sync=False).resumed == 0
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("sync", [True, False])
def test_every_file_is_synced_before_it_has_its_name(tmp_path, base, adapter, monkeypatch, sync):
    """Also one that an earlier run filled and was killed before syncing."""
    synced = set()
    real = files.File.sync

    def noted(file):
        synced.add(Path(file.path).name)
        real(file)

    monkeypatch.setattr(files.File, "sync", lambda file: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        lt.merge(base, adapter, tmp_path / "out", executor="inline")
    monkeypatch.setattr(files.File, "sync", noted)
    assert lt.merge(base, adapter, tmp_path / "out", resume=True, sync=sync).resumed > 0
    assert len(synced) == (2 if sync else 0)


# --- full disks ---------------------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_full_while_space_is_set_aside(tmp_path, base, adapter, expected, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(Incomplete, match=r"out.part: the disk is full") as caught:
        lt.merge(base, adapter, tmp_path / "out")
    assert "nothing was published" in caught.value.hint
    assert beside(tmp_path) == []  # nothing computed yet, nothing worth keeping
    monkeypatch.undo()
    lt.merge(base, adapter, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("executor", ["inline", "threads"])
def test_disk_refuses_in_the_middle(tmp_path, base, adapter, expected, monkeypatch, number, executor):
    real, calls = FileSink.write, []

    def write(sink, step, start, raw):
        calls.append(step)
        if len(calls) == LAYERS:
            with publishing.disk_errors(sink.part):
                raise OSError(number, os.strerror(number))
        real(sink, step, start, raw)

    monkeypatch.setattr(FileSink, "write", write)
    problem = "the disk is full" if number in {errno.ENOSPC, errno.EDQUOT} else os.strerror(number)
    with pytest.raises(Incomplete, match=problem):
        lt.merge(base, adapter, tmp_path / "out", executor=executor)
    assert beside(tmp_path) == ["out.part"]
    monkeypatch.undo()
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed > 0
    assert contents(tmp_path / "out") == expected


@pytest.mark.skipif(not hasattr(os, "pwritev"), reason="this platform has no positional I/O")
def test_disk_full_in_the_system_call(tmp_path, base, adapter, expected, monkeypatch):
    real, calls = os.pwritev, []

    def pwritev(fd, buffers, offset):
        calls.append(offset)
        return full() if len(calls) > 4 else real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(Incomplete, match="the disk is full"):
        lt.merge(base, adapter, tmp_path / "out", executor="inline")
    monkeypatch.undo()
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed > 0
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("owner", "name"), [(FileSink, "_write_small"), (sinks, "swap"), (journals.Journal, "step")]
)
def test_disk_full_at_the_end(tmp_path, base, adapter, expected, monkeypatch, owner, name):
    def fails(*args, **_):
        with publishing.disk_errors(tmp_path / "out.part"):
            full()

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(Incomplete, match="the disk is full"):
        lt.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    lt.merge(base, adapter, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == expected


def test_too_little_space_is_said_before_anything_is_written(tmp_path, base, adapter, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(Incomplete, match=r"out: needs .* are free") as caught:
        lt.merge(base, adapter, tmp_path / "out")
    assert caught.value.hint == "nothing was written"
    assert beside(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("this sandbox mounts nothing")
    yield place
    subprocess.run([shutil.which("umount"), place], check=True)


def test_a_disk_that_is_really_full(tmp_path, adapter, small_disk, monkeypatch):
    big = tmp_path / "big"
    write_base(big)
    save_file({**base_tensors(), "pad": np.ones(1 << 19, np.float32)}, big / "model.safetensors")
    with pytest.raises(Incomplete, match=r"needs [\d.]+ [kM]?B"):
        lt.merge(big, adapter, small_disk / "out")
    monkeypatch.setattr(FileSink, "_require_space", lambda sink: None)
    with pytest.raises(Incomplete, match="the disk is full"):
        lt.merge(big, adapter, small_disk / "out")
    monkeypatch.setattr(sinks, "allocate", os.ftruncate)
    with pytest.raises(Incomplete, match="the disk is full"):
        lt.merge(big, adapter, small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["out.part"]


# --- replacing ------------------------------------------------------------------------------------------------


def test_output_exists(tmp_path, base, adapter, expected):
    lt.merge(base, adapter, tmp_path / "out")
    with pytest.raises(OutputExists, match="out exists") as caught:
        lt.merge(base, adapter, tmp_path / "out", weights=[2])
    assert "--force" in caught.value.hint
    assert contents(tmp_path / "out") == expected


def test_force_replaces_what_loratools_made(tmp_path, base, adapter):
    lt.merge(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("old")
    lt.merge(base, adapter, tmp_path / "out", weights=[2], force=True)
    lt.merge(base, adapter, tmp_path / "expected", weights=[2])
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert beside(tmp_path) == ["out"]


@pytest.mark.parametrize("record", [None, "{", "[]", '["loratools"]', '"loratools"', "{}", '{"other": 1}'])
def test_force_replaces_nothing_else(tmp_path, base, adapter, record):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    if record is not None:
        (tmp_path / "out" / "loratools.json").write_text(record)
    before = contents(tmp_path / "out")
    with pytest.raises(OutputExists, match="was not made by loratools"):
        lt.merge(base, adapter, tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == before
    assert beside(tmp_path) == ["out"]


def test_force_on_single_files(tmp_path, base, adapter):
    single = write_base(tmp_path / "single") / "model.safetensors"
    shutil.copy(single, tmp_path / "out.safetensors")
    with pytest.raises(OutputExists, match="was not made by loratools"):
        lt.merge(single, adapter, tmp_path / "out.safetensors", force=True)
    (tmp_path / "out.safetensors").write_text("thesis")
    with pytest.raises(OutputExists, match="was not made by loratools"):
        lt.merge(single, adapter, tmp_path / "out.safetensors", force=True)
    (tmp_path / "out.safetensors").unlink()
    lt.merge(single, adapter, tmp_path / "out.safetensors")
    lt.merge(single, adapter, tmp_path / "out.safetensors", weights=[2], force=True)
    lt.merge(single, adapter, tmp_path / "expected.safetensors", weights=[2])
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_a_failed_replacement_leaves_the_old(tmp_path, base, adapter, expected, monkeypatch):
    lt.merge(base, adapter, tmp_path / "out")
    with pytest.raises(Stop):
        lt.merge(base, adapter, tmp_path / "out", weights=[2], force=True, on_step=stopping(2))
    assert contents(tmp_path / "out") == expected
    real = Path.rename

    def rename(path, target):
        if path.name == "out.part":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Incomplete, match="Input/output error"):
        lt.merge(base, adapter, tmp_path / "out", weights=[2], force=True)
    assert contents(tmp_path / "out") == expected
    assert beside(tmp_path) == ["out", "out.part"]


def test_replacement_cut_short_between_its_renames(tmp_path, base, adapter, expected):
    out = tmp_path / "out"
    part, old = set_aside(out)
    lt.merge(base, adapter, out)
    lt.merge(base, adapter, tmp_path / "new", weights=[2])
    new = contents(tmp_path / "new")
    out.rename(old)  # killed here: the old is aside, the new still has its working name
    (tmp_path / "new").rename(part)
    for attempt in (lt.plan_merge, lt.merge):
        with pytest.raises(OutputExists, match="was being replaced when a run was cut short") as caught:
            attempt(base, adapter, out)
        assert "renaming it back keeps it" in caught.value.hint
        assert contents(old) == expected
        assert beside(tmp_path) == sorted([old.name, part.name])
    lt.merge(base, adapter, out, weights=[2], force=True)
    assert contents(out) == new
    assert beside(tmp_path) == ["out"]


def test_replacement_cut_short_before_the_old_is_gone(tmp_path, base, adapter, expected):
    out = tmp_path / "out"
    lt.merge(base, adapter, out)
    lt.merge(base, adapter, set_aside(out)[1], weights=[2])
    with pytest.raises(OutputExists, match="out exists"):
        lt.merge(base, adapter, out)
    assert contents(out) == expected
    lt.merge(base, adapter, out, weights=[3], force=True)
    assert beside(tmp_path) == ["out"]


def test_replacement_cut_short_then_undone_by_a_run_that_fails(tmp_path, base, adapter, expected):
    out = tmp_path / "out"
    lt.merge(base, adapter, out)
    out.rename(set_aside(out)[1])
    with pytest.raises(Stop):
        lt.merge(base, adapter, out, weights=[2], force=True, on_step=stopping(2))
    assert contents(out) == expected
    assert beside(tmp_path) == ["out", "out.part"]


@pytest.mark.parametrize("suffix", [".part", ".old", ".loratools-old", ".bak"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_users_own_neighbours_are_never_touched(tmp_path, base, adapter, suffix, exists):
    """A folder that a user called OUT.part or OUT.old is theirs, whatever they keep in it."""
    theirs = tmp_path / f"out{suffix}"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    if exists:
        lt.merge(base, adapter, tmp_path / "elsewhere")
        (tmp_path / "elsewhere").rename(tmp_path / "out")
    for options in ({}, {"force": True}, {"resume": True, "force": True}):
        with contextlib.suppress(OutputExists):
            lt.merge(base, adapter, tmp_path / "out", **options)
        assert contents(theirs) == {"thesis.txt": b"years of work"}
    assert theirs.is_dir()


def test_a_users_own_file_beside_a_single_file(tmp_path, base, adapter):
    single = write_base(tmp_path / "single") / "model.safetensors"
    (tmp_path / "out.part").write_text("years of work")
    with pytest.raises(OutputExists, match=r"out\.part is in the way"):
        lt.merge(single, adapter, tmp_path / "out")
    assert (tmp_path / "out.part").read_text() == "years of work"


def test_a_part_that_is_a_link_is_not_followed(tmp_path, base, adapter):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / journals.JOURNAL).write_text("{}\n")
    (theirs / "thesis.txt").write_text("years of work")
    (tmp_path / "out.part").symlink_to(theirs)
    before = contents(theirs)
    with pytest.raises(OutputExists, match=r"out\.part is in the way"):
        lt.merge(base, adapter, tmp_path / "out", resume=True)
    assert contents(theirs) == before


def test_an_output_that_appears_meanwhile_is_kept(tmp_path, base, adapter):
    def appear(step):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(OutputExists, match="has appeared meanwhile") as caught:
        lt.merge(base, adapter, tmp_path / "out", on_step=appear)
    assert "out.part" in caught.value.hint
    assert contents(tmp_path / "out") == {"theirs": b"x"}
    (tmp_path / "out" / "theirs").unlink()
    (tmp_path / "out").rmdir()
    lt.merge(base, adapter, tmp_path / "out", resume=True)


# --- where an output may not be ---------------------------------------------------------------------------


def _overlaps(tmp_path):
    """How an output can lie on an input, by name."""
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "to_base").symlink_to(tmp_path / "base")
    (tmp_path / "links" / "to_lora").symlink_to(tmp_path / "lora")
    (tmp_path / "links" / "to_all").symlink_to(tmp_path)
    return {
        "base": tmp_path / "base",
        "adapter": tmp_path / "lora",
        "inside_base": tmp_path / "base" / "merged",
        "deep_inside_base": tmp_path / "base" / "a" / "b",
        "inside_adapter": tmp_path / "lora" / "merged",
        "around": tmp_path,
        "weights_of_adapter": tmp_path / "lora" / "adapter_model.safetensors",
        "through_link": tmp_path / "links" / "to_base",
        "inside_through_link": tmp_path / "links" / "to_base" / "merged",
        "through_link_and_back": tmp_path / "links" / "to_all" / "base" / "x",
        "link_to_adapter": tmp_path / "links" / "to_lora",
        "with_dots": tmp_path / "links" / ".." / "base" / "x",
        "relative": Path("base"),
        "relative_inside": Path("base") / "x",
        "relative_with_dots": Path("links") / ".." / "base",
        "here": Path(),
        "parent": Path(".."),
    }


@pytest.mark.parametrize("name", [
    "base", "adapter", "inside_base", "deep_inside_base", "inside_adapter", "around", "weights_of_adapter",
    "through_link", "inside_through_link", "through_link_and_back", "link_to_adapter", "with_dots", "relative",
    "relative_inside", "relative_with_dots", "here", "parent",
])  # fmt: skip
@pytest.mark.parametrize("force", [False, True])
def test_output_over_an_input(tmp_path, base, adapter, monkeypatch, name, force):
    lt.merge(base, adapter, tmp_path / "made")
    shutil.rmtree(base)
    (tmp_path / "made").rename(base)  # even where loratools made the base itself
    monkeypatch.chdir(tmp_path)
    out = _overlaps(tmp_path)[name]
    before = contents(tmp_path)
    with pytest.raises(OutputExists, match=r"overlap|exists"):
        lt.merge(base, adapter, out, force=force)
    assert contents(tmp_path) == before


def test_an_input_reached_through_a_link(tmp_path, base, adapter):
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(OutputExists, match="overlap"):
        lt.merge(tmp_path / "link", adapter, base / "merged")
    with pytest.raises(OutputExists, match="overlap"):
        lt.merge(tmp_path / "link", adapter, tmp_path / "link", force=True)
    assert not (base / "merged").exists()


@pytest.mark.parametrize("suffix", [".part", ".loratools-old"])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_an_input_under_a_working_name(tmp_path, base, adapter, suffix, which):
    lt.merge(base, adapter, tmp_path / f"out{suffix}")  # made by loratools, and now an input
    given = tmp_path / f"out{suffix}"
    if which == "adapter":
        shutil.rmtree(given)
        shutil.copytree(adapter, given)
    before = contents(tmp_path)
    arguments = (given, adapter) if which == "base" else (base, given)
    with pytest.raises((OutputExists, NotFound), match=r"overlap|no such"):
        lt.plan_merge(*arguments, tmp_path / "out", force=True)
    assert contents(tmp_path) == before
    with pytest.raises((OutputExists, LoratoolsError)):
        lt.merge(*arguments, tmp_path / "out", force=True)
    assert contents(given) == {
        name.removeprefix(f"{given.name}/"): data
        for name, data in before.items()
        if name.startswith(given.name)
    }


@pytest.mark.parametrize("force", [False, True])
def test_output_is_a_link_to_nothing(tmp_path, base, adapter, force):
    (tmp_path / "out").symlink_to(tmp_path / "target")
    with pytest.raises(OutputExists, match="exists"):
        lt.merge(base, adapter, tmp_path / "out", force=force)
    assert not (tmp_path / "target").exists()
    assert (tmp_path / "out").is_symlink()


def test_replacing_a_link_leaves_its_target(tmp_path, base, adapter, expected):
    lt.merge(base, adapter, tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    lt.merge(base, adapter, tmp_path / "out", weights=[2], force=True)
    assert not (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "real") == expected
    assert beside(tmp_path) == ["out"]


def test_parents_of_an_output_are_made(tmp_path, base, adapter):
    single = write_base(tmp_path / "single") / "model.safetensors"
    lt.merge(single, adapter, tmp_path / "a" / "b" / "out.safetensors")
    lt.merge(base, adapter, tmp_path / "c" / "d" / "out")
    assert (tmp_path / "a" / "b" / "out.safetensors").is_file()
    assert (tmp_path / "c" / "d" / "out").is_dir()


def test_standing(tmp_path):
    out = tmp_path / "out"
    assert standing(out) is None
    set_aside(out)[1].mkdir()
    assert standing(out) == set_aside(out)[1]
    out.symlink_to("nowhere")
    assert standing(out) == out


# --- every byte counted -----------------------------------------------------------------------------------


class Forgetful(Inline):
    """Loses one of the steps."""

    def __init__(self, lost):
        self.lost = lost

    def map(self, function, items):
        for number, item in enumerate(items):
            if number != self.lost:
                yield function(item)


@pytest.mark.parametrize("lost", [0, 2, 5])
@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_lost_step_is_noticed(tmp_path, base, adapter, lost, where):
    out = tmp_path / "out" if where == "file" else None
    plan = lt.plan_merge(base, adapter, out).plan
    sink = FileSink(plan, out) if out else MemorySink(plan, torch_out=False)
    with pytest.raises(Incomplete, match="bytes of the layout were never written"):
        run(plan, sink, Forgetful(lost))
    assert not (tmp_path / "out").exists()


def test_a_lost_step_is_made_good_by_resuming(tmp_path, base, adapter, expected):
    plan = lt.plan_merge(base, adapter, tmp_path / "out").plan
    with pytest.raises(Incomplete):
        run(plan, FileSink(plan, tmp_path / "out"), Forgetful(2))
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed == len(plan.steps) - 1
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, base, adapter, expected, jobs, sync):
    lt.merge(base, adapter, tmp_path / "out", jobs=jobs, sync=sync)
    assert contents(tmp_path / "out") == expected


def test_descriptors_are_closed(tmp_path, base, adapter):
    listed = Path("/proc/self/fd")
    if not listed.is_dir():
        pytest.skip("open files are counted through /proc")
    lt.merge(base, adapter, tmp_path / "first")
    before = len(list(listed.iterdir()))
    for number in range(3):
        lt.merge(base, adapter, tmp_path / f"out{number}")
        with pytest.raises(Stop) as caught:
            lt.merge(base, adapter, tmp_path / f"part{number}", on_step=stopping(2))
        del caught  # whose traceback holds the sources
    assert len(list(listed.iterdir())) == before


def test_more_shards_than_open_files(tmp_path, adapter):
    resource = pytest.importorskip("resource", reason="this platform has no limit on open files to lower")
    base = tmp_path / "many"
    base.mkdir()
    tensors = base_tensors() | {f"pad{i}": np.full(4, i, np.float32) for i in range(60)}
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(tensors)}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    lt.merge(base, adapter, tmp_path / "expected")
    listed = Path("/proc/self/fd")
    taken = len(list(listed.iterdir())) if listed.is_dir() else 60
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 24, limits[1]))
    try:
        lt.merge(base, adapter, tmp_path / "out", jobs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overflow_leaves_nothing_behind(tmp_path, adapter, kind):
    base = write_base(tmp_path / "base16", kind=np.float16)
    tensors = load_file(base / "model.safetensors")
    tensors["layers.2.q_proj.weight"][3, 4] = 65504
    factors = load_file(adapter / "adapter_model.safetensors")
    delta = 1.5 * factors[f"{_KEY}.lora_B.weight"] @ factors[f"{_KEY}.lora_A.weight"]
    weight = 100 / float(delta[3, 4])  # in float16, 65504 + 100 is too much, and nothing else comes near
    save_file(tensors, base / "model.safetensors")
    source = base if kind == "folder" else base / "model.safetensors"
    with pytest.raises(
        NonFinite, match=r"^layers\.2\.q_proj\.weight\[3, 4\]: 65604 does not fit F16"
    ) as caught:
        lt.merge(source, adapter, tmp_path / "out", weights=[weight])
    assert "--dtype" in caught.value.hint
    assert beside(tmp_path) == []


def test_a_slow_disk_is_waited_for(tmp_path, base, adapter, expected, monkeypatch):
    """Syncs of one file and steps of another may overlap in any order."""
    real = files.File.sync

    def slow(file):
        time.sleep(0.05)
        real(file)

    monkeypatch.setattr(files.File, "sync", slow)
    lt.merge(base, adapter, tmp_path / "out", jobs=4)
    assert contents(tmp_path / "out") == expected


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path, base, adapter):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Incomplete, match="file is a file, not a folder") as caught:
        lt.merge(base, adapter, tmp_path / "file" / "out")
    assert "--resume" not in str(caught.value.hint)


@pytest.mark.parametrize("kept", [True, False])
def test_resumption_is_offered_only_where_there_is_something_to_resume(tmp_path, kept):
    with pytest.raises(Incomplete) as caught, publishing.disk_errors(tmp_path / "part", kept=kept):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert ("--resume" in str(caught.value.hint)) == kept


def test_a_budget_too_small_for_one_worker_does_not_ask_for_fewer(tmp_path, base, adapter):
    for jobs in (1, 2):
        with pytest.raises(OverBudget) as caught:
            lt.merge(base, adapter, tmp_path / "out", jobs=jobs, max_memory=1)
        assert ("fewer --jobs" in str(caught.value.hint)) == (jobs > 1)


@pytest.mark.parametrize("given", ["bf16", "torch.bfloat16"])
def test_types_and_weights_as_people_write_them(base, adapter, given):
    planned = lt.plan_merge(base, adapter, weights=0.5, dtype=given)
    assert planned.weights == (0.5,)
    assert {output.spec.dtype.name for output in planned.merged.outputs.values()} == {"BF16"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"dtype": "banana"}, "banana"),
        ({"dtype": 7}, "7"),
        ({"dtype": "torch.int32"}, "int32"),
        ({"dtype": "I32"}, "cannot write I32"),
        ({"weights": [1.0, 2.0]}, "2 weights for 1 adapter"),
        ({"weights": float("nan")}, "weight 1 is nan"),
        ({"weights": [float("inf")]}, "weight 1 is inf"),
    ],
)
def test_arguments_without_a_meaning_are_named(base, adapter, wrong, named):
    with pytest.raises(Unsupported, match=named):
        lt.plan_merge(base, adapter, **wrong)


def test_a_model_is_not_a_state_dict(adapter):
    with pytest.raises(Unsupported) as caught:
        lt.plan_merge(object(), adapter)
    assert caught.value.hint == "pass model.state_dict()"


def test_ties_that_a_merge_tells_apart_are_a_warning_in_memory(tmp_path):
    factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    shared = np.ones((4, 3), "f4")
    with pytest.warns(UserWarning, match=r"other\.weight and fc\.weight shared their memory"):
        merged = lt.merge({"fc.weight": shared, "other.weight": shared}, adapter).state_dict
    assert merged["fc.weight"][0, 0] == 3
    assert merged["other.weight"][0, 0] == 1


def test_a_value_that_overflows_points_at_the_weight_and_alpha_too():
    factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    with pytest.raises(NonFinite) as caught:
        lt.merge({"fc.weight": np.ones((4, 3), "f4")}, adapter, weights=3e38)
    assert "weight" in str(caught.value.hint)
    assert "alpha" in str(caught.value.hint)
