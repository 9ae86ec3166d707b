"""The doorway: what each kind of failure prints, and the exit code it gives."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import loratools
from loratools.cli.app import app
from loratools.errors import CorruptFile, Incomplete, OutputExists, OverBudget, Unsupported


def invoke(*arguments: str, **options: object):
    return CliRunner().invoke(app, list(arguments), **options)


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make ``inspect`` raise ``error``."""

    def raising(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loratools, "inspect", raising, raising=False)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CorruptFile("a.safetensors", "header is not JSON"), "a.safetensors: header is not JSON"),
        (Unsupported("a quantised base: gptq"), "a quantised base: gptq"),
        (OutputExists("out exists"), "out exists"),
        (OverBudget(60_000_000, 1_000_000), "this needs 60 MB of memory, 1 MB are allowed"),
        (OverBudget(2_100, 10), "this needs 2.1 kB of memory, 10 bytes are allowed"),
        (Incomplete("out.part: the disk is full"), "out.part: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (
            OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"),
            "a -> b: Invalid cross-device link",
        ),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_can_be_expected_is_one_line_and_exit_code_3(monkeypatch, error, line):
    failing(monkeypatch, error)
    result = invoke("inspect", "x")
    assert result.exit_code == 3
    assert result.stdout == ""
    first, *rest = result.stderr.splitlines()
    assert first == f"Error: {line}"
    assert all(other.startswith("Hint: ") for other in rest)
    assert len(rest) <= 1


def test_a_hint_is_a_line_of_its_own(monkeypatch):
    failing(monkeypatch, Unsupported("no", hint="do this\ninstead"))
    assert invoke("inspect", "x").stderr == "Error: no\nHint: do this\\ninstead\n"


def test_debug_shows_the_traceback_of_an_expected_error_too(monkeypatch):
    failing(monkeypatch, Unsupported("no"))
    result = invoke("inspect", "x", "--debug")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("Error: no\n")


def test_a_bug_keeps_its_traceback_and_asks_for_a_report(monkeypatch):
    failing(monkeypatch, KeyError("q_proj\x1b[2J"))
    result = invoke("inspect", "x")
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "\x1b" not in result.stderr
    assert f"Error: this is a bug in loratools {loratools.__version__} (KeyError)\n" in result.stderr
    assert "report" in result.stderr.splitlines()[-1]


def test_interruption(monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    result = invoke("inspect", "x")
    assert (result.exit_code, result.stderr.strip()) == (130, "Error: interrupted")


def test_an_interrupted_merge_says_how_to_go_on(monkeypatch, demo_files, tmp_path):
    def raising(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loratools, "run_merge", raising, raising=False)
    result = invoke("merge", str(demo_files.base), str(demo_files.adapter), str(tmp_path / "out"))
    assert result.exit_code == 130
    assert "--resume" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge"],
        ["merge", "base"],
        ["merge", "base", "out"],
        ["merge", "base", "-o", "out"],
        ["merge", "base", "a", "out", "-w", "1", "-w", "2"],
        ["merge", "base", "a", "b", "out", "--alpha", "8"],
        ["merge", "base", "a", "b", "out", "--config", "c.json"],
        ["merge", "base", "a", "out", "--jobs", "0"],
        ["merge", "base", "a", "out", "--max-memory", "lots"],
        ["merge", "base", "a", "out", "--shard-size", "0GB"],
        ["merge", "base", "a", "out", "-w", "nan"],
        ["merge", "base", "a", "out", "-w", "inf"],
        ["merge", "base", "a", "out", "--executor", "abacus"],
        ["verify", "base", "merged"],
        ["verify", "base", "a", "merged", "-w", "1", "-w", "1"],
        ["validate", "x", "--format", "xml"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["inspect", ""],
        ["merge", "", "a", "out"],
        ["merge", "base", "", "out"],
        ["merge", "base", "a", ""],
        ["demo", ""],
        ["completion", "tcsh"],
        ["completion", "bash", "--json"],
        ["validate", "x", "--json", "--format", "github"],
        ["validate", "x", "--json", "--format", "sarif"],
        ["merge", "base", "a", "out", "--dtype", "banana"],
        ["merge", "base", "a", "out", "--dtype", "f8_e4m3"],
        ["merge", "base", "a", "out", "--dtype", "i32"],
        ["nothing"],
        ["--nothing"],
    ],
)
def test_a_command_line_that_cannot_be_meant_is_exit_code_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    first, hint = result.stderr.splitlines()
    assert first.startswith("Error: ")
    assert hint.startswith("Hint: ")


@pytest.mark.parametrize(
    ("option", "value"), [("--device", "cuda"), ("--device", "mps"), ("--executor", "ray")]
)
@pytest.mark.parametrize("verb", ["merge", "verify"])
def test_devices_that_are_not_there_and_executors_of_another_build_are_refused_by_name(
    demo_files, tmp_path, monkeypatch, verb, option, value
):
    monkeypatch.setattr("loratools.arrays._available", lambda device: False)
    out = tmp_path / "out"
    result = invoke(verb, str(demo_files.base), str(demo_files.adapter), str(out), option, value)
    assert result.exit_code == 3
    assert repr(value) in result.stderr
    assert "Hint: " in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["inspect", "validate"])
@pytest.mark.parametrize("ref", ["hf://owner/name", "owner/name", "s3://bucket/adapter", "not there"])
def test_references_that_cannot_be_read_are_named(tmp_path, monkeypatch, verb, ref):
    monkeypatch.chdir(tmp_path)
    result = invoke(verb, ref)
    assert result.exit_code == 3
    assert result.stderr.startswith(f"Error: {ref}: ")


def test_names_cannot_play_with_the_terminal(tmp_path):
    name = "\x1b[2J\u202eevil\n[bold red]"
    result = invoke("inspect", str(tmp_path / name))
    assert result.exit_code == 3
    assert "\x1b" not in result.stderr
    assert "\u202e" not in result.stderr
    assert "\\x1b[2J\\u202eevil\\n[bold red]" in result.stderr
    result = invoke("merge", "a", "b", "c", "--" + name)
    assert "\x1b" not in result.stderr
    result = invoke(name)
    assert "\x1b" not in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes close in another way on Windows")
@pytest.mark.parametrize("arguments", [["--help"], ["formats"], ["inspect", "{adapter}", "--json"]])
def test_a_closed_pipe_ends_quietly(demo_files, arguments):
    filled = [argument.format(adapter=demo_files.adapter) for argument in arguments]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "loratools", *filled],
            stdout=write, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    finally:
        os.close(write)
    assert done.stderr == b""
    assert done.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")  # noqa: PTH110
@pytest.mark.parametrize("verb", ["formats", "merge"])
def test_a_full_disk_under_stdout_is_said(demo_files, tmp_path, verb):
    places = [str(demo_files.base), str(demo_files.adapter), str(tmp_path / "out")]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "loratools", verb, *(places if verb == "merge" else [])],
            stdout=full, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.startswith(b"Error: the result could not be printed: No space left on device\n")


@pytest.mark.skipif(os.name == "nt", reason="descriptors close in another way on Windows")
@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)])
def test_a_stream_that_is_closed_from_the_start_is_no_reason_to_stop(demo_files, tmp_path, closed):
    def close() -> None:
        for number in closed:
            os.close(number)

    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "merge", str(demo_files.base), str(demo_files.adapter), str(out)],
        capture_output=True, check=False, timeout=60, preexec_fn=close,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    loratools.merge(demo_files.base, demo_files.adapter, tmp_path / "again")
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_wrong_type_names_the_option():
    assert "'--dtype'" in invoke("merge", "base", "a", "out", "--dtype", "banana").stderr


def test_an_alpha_beside_a_configuration_is_refused(demo_files, tmp_path):
    result = invoke(
        "merge", str(demo_files.base), str(demo_files.adapter), str(tmp_path / "o"), "--alpha", "77"
    )
    assert result.exit_code == 3
    assert "the alpha given is 77" in result.stderr
    assert "adapter_config.json" in result.stderr.splitlines()[1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(demo_files, tmp_path, name):
    for other in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / other).write_bytes((demo_files.adapter / other).read_bytes())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    for ref in (tmp_path, tmp_path / name):
        result = invoke("inspect", str(ref))
        assert result.exit_code == 3
        assert f"{name}: not a regular file" in result.stderr


def test_an_output_encoding_that_lacks_a_character_is_no_reason_to_stop(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "inspect", str(tmp_path / "\u0436")],
        capture_output=True, env=environment, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    assert b"\\u0436: no such file" in done.stderr


def test_errors_stay_on_stderr_with_json_too():
    result = invoke("inspect", "nowhere", "--json")
    assert (result.exit_code, result.stdout) == (3, "")
    with pytest.raises(json.JSONDecodeError):
        json.loads(result.stderr)
