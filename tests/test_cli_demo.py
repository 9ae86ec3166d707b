"""The demonstration: its files are a real model and a real adapter, and every verb has its say."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from loratools.cli.app import app
from loratools.errors import OutputExists
from loratools.verbs.demo import build_demo


def test_demo_shows_every_verb_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = CliRunner().invoke(app, ["demo"])
    assert (result.exit_code, result.stderr) == (0, "")
    commands = [line for line in result.stdout.splitlines() if line.startswith("$ ")]
    assert commands == [
        "$ loratools inspect adapter",
        "$ loratools validate adapter --base base",
        "$ loratools merge base adapter merged",
        "$ loratools verify base adapter merged",
    ]
    assert "Merged adapter into base: merged" in result.stdout
    assert "merged: ok, 39 tensors" in result.stdout
    assert not list(tmp_path.iterdir())
    assert Path.cwd() == tmp_path


def test_the_commands_it_shows_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", "playground"])
    assert result.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "playground").iterdir()) == ["adapter", "base", "merged"]
    monkeypatch.chdir(tmp_path / "playground")
    for line in result.stdout.splitlines():
        if line.startswith("$ loratools "):
            arguments = line.removeprefix("$ loratools ").split()
            again = CliRunner().invoke(app, [*arguments, *(["--force"] if arguments[0] == "merge" else [])])
            assert again.exit_code == 0, again.stderr


def test_demo_as_json(tmp_path):
    result = CliRunner().invoke(app, ["demo", str(tmp_path / "new"), "--json"])
    said = json.loads(result.stdout)
    assert said["schema"] == "loratools.demo/1"
    assert [step["report"]["schema"] for step in said["steps"]] == [
        f"loratools.{verb}/1" for verb in ("inspect", "validate", "merge", "verify")
    ]


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    result = CliRunner().invoke(app, ["demo", str(tmp_path / "mine")])
    assert result.exit_code == 3
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    with pytest.raises(OutputExists):
        build_demo(tmp_path / "mine")


def test_the_same_seed_gives_the_same_files(demo_files, tmp_path):
    again, other = build_demo(tmp_path / "again"), build_demo(tmp_path / "other", seed=1)
    files = [
        path.relative_to(demo_files.base.parent)
        for path in demo_files.base.parent.rglob("*")
        if path.is_file()
    ]
    assert len(files) == 7
    for file in files:
        assert (again.base.parent / file).read_bytes() == (demo_files.base.parent / file).read_bytes()
    changed = "adapter/adapter_model.safetensors"
    assert (other.base.parent / changed).read_bytes() != (again.base.parent / changed).read_bytes()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # inside PEFT
def test_transformers_and_peft_load_it_and_merge_it_the_same(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = build_demo(tmp_path)
    assert (
        CliRunner().invoke(app, ["merge", str(made.base), str(made.adapter), str(made.merged)]).exit_code == 0
    )
    base, loading = AutoModelForCausalLM.from_pretrained(
        made.base, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    expected = PeftModel.from_pretrained(base, made.adapter).merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(made.merged, dtype=torch.bfloat16).state_dict()
    assert expected.keys() == ours.keys()
    for name, value in expected.items():  # one rounding of float32 arithmetic
        torch.testing.assert_close(ours[name].float(), value, rtol=2**-8, atol=1e-9, msg=name)
