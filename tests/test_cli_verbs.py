"""The verbs end to end: exit codes, which stream says what, and the JSON that scripts rely on."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from loratools.cli.app import app
from tests.helpers import write_adapter


def invoke(*arguments: object, **options: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def document(result) -> dict[str, object]:
    """The one JSON document on stdout, with no number that is not finite."""

    def refuse(name: str) -> float:
        raise AssertionError(name)

    return json.loads(result.stdout, parse_constant=refuse)


@pytest.fixture(scope="session")
def merged(demo_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    assert invoke("merge", demo_files.base, demo_files.adapter, out).exit_code == 0
    return out


def test_inspect_as_json(demo_files):
    result = invoke("inspect", demo_files.adapter, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    said = document(result)
    assert said["schema"] == "loratools.inspect/1"
    assert {
        "path", "format", "evidence", "kinds", "base_model", "rank", "alpha", "scaling", "parameters",
        "bytes", "dtypes", "modules", "extras", "metadata", "warnings",
    } <= said.keys()  # fmt: skip
    assert (said["format"], said["kinds"]) == ("peft", ["lora"])
    assert said["rank"] == {"min": 8, "max": 8}
    assert said["alpha"] == {"min": 16, "max": 16}
    assert said["scaling"] == {"min": 2, "max": 2}
    assert len(said["modules"]) == 28
    query = next(m for m in said["modules"] if m["name"].endswith("layers.0.mlp.down_proj"))
    assert query["shape"] == [256, 704]
    assert {"name", "kind", "rank", "alpha", "scaling", "shape", "parameters", "dtype"} <= query.keys()
    values = load_file(demo_files.adapter / "adapter_model.safetensors").values()
    assert said["parameters"] == sum(value.size for value in values)
    assert said["bytes"] == sum(value.nbytes for value in values)


def test_inspect_as_text_groups_modules_unless_asked(demo_files):
    text = invoke("inspect", demo_files.adapter).stdout
    assert "model.layers.*.self_attn.q_proj" in text
    assert "model.layers.3.self_attn.q_proj" not in text
    text = invoke("inspect", demo_files.adapter, "--modules").stdout
    assert sum("self_attn.q_proj" in line for line in text.splitlines()) == 4
    assert "format  pt" in invoke("inspect", demo_files.adapter, "--metadata").stdout


def test_inspect_never_cuts_or_wraps_a_name(tmp_path):
    name = "model." + "very_long_name_" * 30 + "q_proj"
    adapter = write_adapter(
        tmp_path / "a",
        {f"base_model.model.{name}.lora_A.weight": np.ones((2, 8), "f4"),
         f"base_model.model.{name}.lora_B.weight": np.ones((8, 2), "f4")},
        r=2, lora_alpha=2,
    )  # fmt: skip
    for arguments in (["--modules"], []):
        result = invoke("inspect", adapter, *arguments, env={"COLUMNS": "20"})
        assert any(name in line for line in result.stdout.splitlines())


def test_names_in_files_are_never_markup_nor_escape_codes(tmp_path):
    adapter = write_adapter(
        tmp_path / "a",
        {"base_model.model.[bold]x.lora_A.weight": np.ones((2, 8), "f4"),
         "base_model.model.[bold]x.lora_B.weight": np.ones((8, 2), "f4")},
        r=2, lora_alpha=2, base_model_name_or_path="\x1b]0;owned\x07[red]",
    )  # fmt: skip
    result = invoke("inspect", adapter)
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "\x07" not in result.output
    assert "[bold]x" in result.stdout
    assert "\\x1b]0;owned\\x07[red]" in result.stdout
    assert document(invoke("inspect", adapter, "--json"))["base_model"] == "\x1b]0;owned\x07[red]"
    assert "\x1b" not in invoke("inspect", adapter, "--json").output


def test_what_is_no_lora_is_named_with_a_warning_on_stderr(demo_files):
    shard = demo_files.base / "model-00001-of-00003.safetensors"
    result = invoke("inspect", shard)
    assert result.exit_code == 0
    assert "full model" in result.stdout
    assert result.stderr.startswith("Warning: ")
    assert "Warning" not in result.stdout
    assert invoke("inspect", shard, "--quiet").stderr == ""


def test_a_bare_file_takes_config_or_alpha(demo_files, tmp_path):
    bare = tmp_path / "bare.safetensors"
    shutil.copy(demo_files.adapter / "adapter_model.safetensors", bare)
    config = demo_files.adapter / "adapter_config.json"
    assert document(invoke("inspect", bare, "--json"))["scaling"] == {"min": None, "max": None}
    assert document(invoke("inspect", bare, "--json", "--config", config))["scaling"]["max"] == 2
    assert document(invoke("inspect", bare, "--json", "--alpha", 4))["scaling"]["max"] == 0.5
    assert invoke("merge", demo_files.base, bare, tmp_path / "no").exit_code == 3
    assert not (tmp_path / "no").exists()
    result = invoke("merge", demo_files.base, bare, tmp_path / "out", "--alpha", 16)
    assert result.exit_code == 0, result.stderr
    assert invoke("verify", demo_files.base, demo_files.adapter, tmp_path / "out").exit_code == 0
    assert invoke("verify", demo_files.base, bare, tmp_path / "out", "--config", config).exit_code == 0


def test_merge_as_json(demo_files, tmp_path):
    out = tmp_path / "out"
    result = invoke("merge", demo_files.base, demo_files.adapter, out, "--json", "--verify")
    assert (result.exit_code, result.stderr) == (0, "")
    said = document(result)
    assert said["schema"] == "loratools.merge/1"
    assert {
        "output", "tensors", "modules", "bytes_read", "bytes_written", "seconds", "peak_memory", "survival"
    } <= said.keys()  # fmt: skip
    assert said["output"] == str(out)
    assert said["tensors"] == {"total": 39, "changed": 28, "copied": 11, "added": 0}
    assert said["modules"] == {"bound": 28, "unmatched": []}
    assert {"mean", "min", "worst_module", "cosine", "unchanged"} <= said["survival"].keys()
    assert said["verified"] is True
    assert said["bytes_written"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))


def test_merge_as_text_is_a_few_lines(demo_files, tmp_path):
    result = invoke("merge", demo_files.base, demo_files.adapter, tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"Merged adapter into base: {tmp_path / 'out'}"
    assert 3 <= len(lines) <= 8
    assert "28 changed, 11 copied, 39 in all" in result.stdout
    assert "%" in result.stdout


def test_merge_names_what_it_leaves_out(demo_files, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(demo_files.base, base)
    (base / "pytorch_model.bin").write_bytes(b"the unmerged model")
    result = invoke("merge", base, demo_files.adapter, tmp_path / "out")
    assert result.exit_code == 0
    assert "pytorch_model.bin" in result.stdout
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_quiet_prints_nothing(demo_files, tmp_path):
    result = invoke("merge", demo_files.base, demo_files.adapter, tmp_path / "out", "-q")
    assert (result.exit_code, result.output) == (0, "")
    result = invoke("verify", demo_files.base, demo_files.adapter, tmp_path / "out", "-q")
    assert (result.exit_code, result.output) == (0, "")


def test_a_dry_run_touches_nothing(demo_files, tmp_path):
    out = tmp_path / "out"
    said = document(invoke("merge", demo_files.base, demo_files.adapter, out, "--dry-run", "--json"))
    assert said["schema"] == "loratools.merge/1"
    assert said["dry_run"] is True
    assert said["output"] == str(out)
    assert said["peak_memory"] > 0
    text = invoke("merge", demo_files.base, demo_files.adapter, out, "--dry-run")
    assert text.exit_code == 0
    assert "nothing has been touched" in text.stdout
    assert not list(tmp_path.iterdir())
    invoke("merge", demo_files.base, demo_files.adapter, out)
    assert said["bytes_written"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))


def test_a_budget_is_checked_before_anything_is_read(demo_files, tmp_path):
    for extra in ([], ["--dry-run"]):
        result = invoke(
            "merge", demo_files.base, demo_files.adapter, tmp_path / "out", "--max-memory", "1MB", *extra
        )
        assert result.exit_code == 3
        assert "1 MB are allowed" in result.stderr
        assert not list(tmp_path.iterdir())
    result = invoke("verify", demo_files.base, demo_files.adapter, demo_files.base, "--max-memory", "1MB")
    assert result.exit_code == 3


def test_an_output_that_exists_is_replaced_only_if_loratools_made_it(demo_files, tmp_path):
    out = tmp_path / "out"
    arguments = ("merge", demo_files.base, demo_files.adapter, out)
    assert invoke(*arguments).exit_code == 0
    result = invoke(*arguments)
    assert (result.exit_code, "--force" in result.stderr) == (3, True)
    assert invoke(*arguments, "--force").exit_code == 0
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("ten years")
    assert invoke("merge", demo_files.base, demo_files.adapter, theirs, "--force").exit_code == 3
    assert (theirs / "thesis.txt").read_text() == "ten years"


def test_a_forgotten_out_cannot_eat_an_adapter(demo_files):
    before = (demo_files.adapter / "adapter_model.safetensors").read_bytes()
    result = invoke("merge", demo_files.base, demo_files.adapter, demo_files.adapter, "--force")
    assert result.exit_code == 3
    assert (demo_files.adapter / "adapter_model.safetensors").read_bytes() == before


def test_taking_an_adapter_out_again_says_that_rounding_stays(demo_files, merged, tmp_path):
    result = invoke("merge", merged, demo_files.adapter, tmp_path / "back", "-w", "-1")
    assert result.exit_code == 0
    assert "not bit for bit" in result.stderr
    assert "weight -1" in result.stdout


def test_verify_as_json(demo_files, merged):
    result = invoke("verify", demo_files.base, demo_files.adapter, merged, "--json")
    assert result.exit_code == 0
    said = document(result)
    assert said["schema"] == "loratools.verify/1"
    assert said["ok"] is True
    assert len(said["modules"]) == 39


def test_verify_names_the_tensor_that_is_wrong(demo_files, merged, tmp_path):
    forged = tmp_path / "forged"
    shutil.copytree(merged, forged)
    file = "model-00002-of-00003.safetensors"
    shutil.copy(demo_files.base / file, forged / file)  # one shard of the base: unmerged
    result = invoke("verify", demo_files.base, demo_files.adapter, forged)
    assert result.exit_code == 1
    assert "not merged" in result.stdout
    assert "not ok" in result.stdout
    result = invoke("verify", demo_files.base, demo_files.adapter, merged, "-w", "0.5", "--json")
    assert result.exit_code == 1
    wrong = [m for m in document(result)["modules"] if m["verdict"] == "wrong_scale"]
    assert len(wrong) == 28
    assert all(math.isclose(m["scale"], 2, rel_tol=1e-2) for m in wrong)


def test_merge_verify_reports_a_failure_by_exit_code(demo_files, tmp_path, monkeypatch):
    from dataclasses import replace

    import loratools

    right = loratools.run_merge

    def wrong(*arguments: object, **options: object):
        return replace(right(*arguments, **options), verified=False)

    monkeypatch.setattr(loratools, "run_merge", wrong)
    result = invoke("merge", demo_files.base, demo_files.adapter, tmp_path / "out", "--verify")
    assert result.exit_code == 1
    assert "NOT right" in result.stdout


def test_the_same_bytes_for_every_number_of_workers(demo_files, merged, tmp_path):
    assert invoke("merge", demo_files.base, demo_files.adapter, tmp_path / "x", "--jobs", 3).exit_code == 0
    assert (
        invoke("merge", demo_files.base, demo_files.adapter, tmp_path / "y", "--executor", "inline").exit_code
        == 0
    )
    for name in ("x", "y"):
        for file in merged.glob("*.safetensors"):
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()


def test_validate_of_a_sound_adapter(demo_files):
    result = invoke("validate", demo_files.adapter, "--base", demo_files.base)
    assert (result.exit_code, result.stderr) == (0, "")
    assert ": ok, 28 modules" in result.stdout
    said = document(invoke("validate", demo_files.adapter, "--json"))
    assert said["schema"] == "loratools.validate/1"
    assert {"ok", "findings", "engines", "modules"} <= said.keys()
    assert said["ok"] is True
    assert document(invoke("validate", demo_files.adapter, "--format", "json")) == said


def test_validate_finds_nan_in_every_form(tmp_path):
    adapter = write_adapter(
        tmp_path / "a",
        {"base_model.model.x.lora_A.weight": np.full((2, 8), np.nan, "f4"),
         "base_model.model.x.lora_B.weight": np.ones((8, 2), "f4")},
        r=2, lora_alpha=2,
    )  # fmt: skip
    result = invoke("validate", adapter)
    assert result.exit_code == 1
    assert result.stdout.startswith("error")
    said = document(invoke("validate", adapter, "--json"))
    errors = [finding for finding in said["findings"] if finding["severity"] == "error"]
    assert said["ok"] is False
    assert errors
    assert all({"code", "severity", "where", "message", "hint"} <= finding.keys() for finding in errors)
    sarif = document(invoke("validate", adapter, "--format", "sarif"))
    assert sarif["version"] == "2.1.0"
    (run,) = sarif["runs"]
    assert run["tool"]["driver"]["name"] == "loratools"
    assert len(run["results"]) == len(said["findings"])
    for entry in run["results"]:
        assert run["tool"]["driver"]["rules"][entry["ruleIndex"]]["id"] == entry["ruleId"]
    github = invoke("validate", adapter, "--format", "github").stdout
    assert len(github.splitlines()) == len(said["findings"])
    assert sum(line.startswith("::error file=") for line in github.splitlines()) == len(errors)


def test_a_corrupt_file_is_an_error_of_inspect(tmp_path):
    save_file({"x": np.ones(4, "f4")}, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-3])
    result = invoke("inspect", tmp_path / "cut.safetensors")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "cut.safetensors" in result.stderr
