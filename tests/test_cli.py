"""The program as a whole: help, names, start-up, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import loratools
from loratools.cli.app import COMMANDS, app

HEAVY = ("numpy", "torch", "rich", "huggingface_hub", "ml_dtypes", "safetensors")


def commands() -> dict[str, click.Command]:
    context = click.Context(app)
    found = {name: app.get_command(context, name) for name in app.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def program(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORATOOLS_")}
    environment |= options.pop("env", {})  # type: ignore[operator]
    return subprocess.run(
        [sys.executable, "-m", "loratools", *arguments],
        capture_output=True, text=True, env=environment, check=False, timeout=120, **options,
    )  # fmt: skip


def loaded(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after running ``code``."""
    tail = f"\nimport sys, json\nprint(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_lists_every_command_with_its_summary():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for name, (_, summary) in COMMANDS.items():
        assert f"{name} {summary}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    command = commands()[name]
    assert command.help
    assert "Examples:" in command.help
    assert f"loratools {name}" in command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"
            assert parameter.help.rstrip().endswith((".", "]")), f"{name} {parameter.opts}"
    for flag in ("-h", "--help"):
        result = CliRunner().invoke(app, [name, flag])
        assert result.exit_code == 0
        assert result.stdout.startswith(f"Usage: loratools {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_shared_options(name):
    spelled = {spelling for parameter in commands()[name].params for spelling in parameter.opts}
    if name == "completion":  # prints a script, of which there is one kind
        assert spelled == {"--debug", "shell"}
    else:
        assert {"--json", "-q", "--quiet", "-v", "--verbose", "--debug"} <= spelled


def test_verbs_that_compute_have_the_options_for_it():
    for name in ("merge", "verify"):
        spelled = {spelling for parameter in commands()[name].params for spelling in parameter.opts}
        assert {"--jobs", "--executor", "--device", "--max-memory", "-w", "--weight"} <= spelled
    merge = {spelling for parameter in commands()["merge"].params for spelling in parameter.opts}
    assert {
        "-o", "--output", "--force", "--dry-run", "--dtype", "--shard-size", "--verify", "--resume",
        "--no-sync", "--allow-unmatched", "--on-conflict", "--allow-pickle", "--blockwise-experts",
        "--config", "--alpha",
    } <= merge  # fmt: skip


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"loratools {loratools.__version__}\n")


def test_without_arguments_the_help_goes_to_stderr():
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Commands:" in result.stderr


def test_python_dash_m_and_the_program_say_the_same():
    done = program("--version")
    assert (done.returncode, done.stdout) == (0, f"loratools {loratools.__version__}\n")


def test_help_loads_nothing_heavy():
    run = "from loratools.cli.app import app\napp.main(['--help'], standalone_mode=False)"
    assert loaded(run) == set()
    assert loaded(run.replace("'--help'", "'merge', '--help'")) == set()


def test_header_verbs_load_neither_numpy_nor_torch_nor_rich(demo_files):
    run = "from loratools.cli.app import app\napp.main(['inspect', {!r}{}], standalone_mode=False)"
    assert loaded(run.format(str(demo_files.adapter), "")) == set()
    assert loaded(run.format(str(demo_files.adapter), ", '--json'")) == set()
    assert loaded("from loratools.cli.app import app\napp.main(['formats'], standalone_mode=False)") == set()


def test_merging_never_loads_torch(demo_files, tmp_path):
    arguments = ["merge", str(demo_files.base), str(demo_files.adapter), str(tmp_path / "out"), "--verify"]
    run = f"from loratools.cli.app import app\napp.main({arguments!r}, standalone_mode=False)"
    assert not {"torch", "huggingface_hub", "rich"} & loaded(run)


def test_blas_is_told_to_start_no_threads_before_numpy_is_there():
    code = (
        "import os, sys\nos.environ.pop('OPENBLAS_NUM_THREADS', None)\n"
        "sys.argv = ['loratools', '--version']\n"
        "from loratools.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'numpy' not in sys.modules\nprint(os.environ['OPENBLAS_NUM_THREADS'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1"


def test_a_mistyped_command_or_option_is_put_right():
    result = CliRunner().invoke(app, ["merg"])
    assert result.exit_code == 2
    assert "'merg'" in result.stderr
    assert "'merge'" in result.stderr
    result = CliRunner().invoke(app, ["merge", "--shard-sise", "1GB"])
    assert result.exit_code == 2
    assert "--shard-size" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_scripts(shell):
    result = CliRunner().invoke(app, ["completion", shell])
    assert result.exit_code == 0, result.stderr
    assert "_LORATOOLS_COMPLETE" in result.stdout
    assert "loratools" in result.stdout


def test_completion_answers_what_its_script_asks():
    words = {"_LORATOOLS_COMPLETE": "bash_complete", "COMP_WORDS": "loratools mer", "COMP_CWORD": "1"}
    done = program(env=words)
    assert done.stdout.strip() == "plain,merge"
    words |= {"COMP_WORDS": "loratools merge --shard", "COMP_CWORD": "2"}
    assert program(env=words).stdout.strip() == "plain,--shard-size"


def test_formats_as_json():
    result = CliRunner().invoke(app, ["formats", "--json"])
    document = json.loads(result.stdout)
    assert document["schema"] == "loratools.formats/1"
    by_name = {entry["name"]: entry for entry in document["formats"]}
    assert len(by_name) == len(document["formats"])
    assert by_name["peft"]["compute"] is True
    assert {"lora", "dora", "ia3", "loha", "lokr", "adalora"} <= set(by_name["peft"]["kinds"])
    assert {"lora", "dora", "loha", "lokr", "full", "norm"} <= set(by_name["kohya"]["kinds"])
    assert [by_name["kohya"][use] for use in ("inspect", "compute", "write")] == [True, True, True]
    assert by_name["lllite"] == {
        "name": "lllite", "kinds": ["lllite"], "signs": ["ControlNet-LLLite"],
        "inspect": True, "compute": False, "write": False,
    }  # fmt: skip
    dtypes = {entry["name"]: entry["compute"] for entry in document["dtypes"]}
    assert dtypes["BF16"] is True
    assert dtypes["F8_E4M3"] is False


def test_formats_as_text():
    result = CliRunner().invoke(app, ["formats"])
    assert result.exit_code == 0
    assert "kohya" in result.stdout
    assert "BF16" in result.stdout
    assert result.stderr == ""
