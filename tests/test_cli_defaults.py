"""Options from the environment and from loratools.toml."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import loratools
from loratools.cli.app import app


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What ``merge`` hands to the library, as the command line, the environment and the file have it."""
    monkeypatch.chdir(tmp_path)
    seen: dict[str, object] = {}

    class Planned:
        steps = ()

        def require_memory(self, allowed: int | None, jobs: int, *, apart: bool) -> None:
            seen.update(max_memory=allowed, workers=jobs)

        @property
        def plan(self) -> Planned:
            return self

    def plan_merge(base: str, adapters: list[object], out: str, **options: object) -> Planned:
        seen.update(options, base=base, adapters=adapters, out=out)
        return Planned()

    def run_merge(_: Planned, **options: object) -> None:
        seen.update(options)
        raise loratools.LoratoolsError("enough")

    monkeypatch.setattr(loratools, "plan_merge", plan_merge, raising=False)
    monkeypatch.setattr(loratools, "run_merge", run_merge, raising=False)
    monkeypatch.setattr(loratools, "load", lambda name, **_: name, raising=False)

    def run(*arguments: str, env: dict[str, str] | None = None) -> dict[str, object]:
        seen.clear()
        result = CliRunner().invoke(app, ["merge", "base", "a", "out", *arguments], env=env)
        assert result.stderr.splitlines()[-1] == "Error: enough", result.stderr
        return dict(seen)

    return run


def test_what_the_library_is_asked_by_default(asked):
    options = asked()
    assert (options["base"], options["adapters"], options["out"]) == ("base", ["a"], "out")
    assert options["weights"] is None
    assert options["sync"] is True
    assert (options["executor"], options["jobs"]) == ("threads", None)
    assert options["max_memory"] is options["shard_size"] is options["dtype"] is None


def test_every_option_arrives(asked):
    options = asked(
        "-w", "-1", "--dtype", "bf16", "--shard-size", "5GB", "--verify", "--resume", "--no-sync",
        "--force", "--allow-unmatched", "lm_head*", "--allow-unmatched", "x", "--on-conflict", "last",
        "--blockwise-experts", "--jobs", "3", "--executor", "inline", "--device", "auto",
        "--max-memory", "1.5GB", "--arch", "sdxl", "--block-weights", "ALL0.5",
    )  # fmt: skip
    assert options == {
        "base": "base", "adapters": ["a"], "out": "out", "weights": (-1.0,), "dtype": "bf16",
        "shard_size": 5_000_000_000, "verify": True, "resume": True, "sync": False, "force": True,
        "allow_unmatched": ("lm_head*", "x"), "on_conflict": "last", "blockwise_experts": True, "jobs": 3,
        "executor": "inline", "device": "auto", "max_memory": 1_500_000_000, "on_step": None, "workers": 1,
        "arch": "sdxl", "block_weights": ("ALL0.5",),
    }  # fmt: skip


def test_negative_weights_in_every_spelling(asked):
    for spelling in (["-w", "-1"], ["-w-1"], ["--weight", "-1"], ["--weight=-1"]):
        assert asked(*spelling)["weights"] == (-1.0,)


def test_out_may_be_an_option_and_several_adapters_come_first(asked):
    options = asked("-o", "elsewhere")
    assert (options["adapters"], options["out"]) == (["a", "out"], "elsewhere")
    options = asked("more", "-w", "1", "-w", "0.5")
    assert (options["adapters"], options["out"], options["weights"]) == (["a", "out"], "more", (1.0, 0.5))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20MB", 20_000_000),
        ("1kb", 1000),
        ("7", 7),
        ("2 GB", 2_000_000_000),
        ("1GiB", 1 << 30),
        ("0.5TB", 5 * 10**11),
    ],
)
def test_sizes_are_decimal(asked, text, count):
    assert asked("--max-memory", text)["max_memory"] == count


def test_the_environment_sets_options_and_the_command_line_wins(asked):
    env = {"LORATOOLS_MERGE_JOBS": "2", "LORATOOLS_MERGE_NO_SYNC": "1", "LORATOOLS_MERGE_WEIGHT": "0.5"}
    options = asked(env=env)
    assert (options["jobs"], options["sync"], options["weights"]) == (2, False, (0.5,))
    assert asked("--jobs", "4", env=env)["jobs"] == 4


def test_the_environment_of_another_verb_is_not_read(asked):
    assert asked(env={"LORATOOLS_VERIFY_JOBS": "2"})["jobs"] is None


def test_a_bad_value_in_the_environment_names_the_variable():
    result = CliRunner().invoke(app, ["merge", "a", "b", "c"], env={"LORATOOLS_MERGE_JOBS": "many"})
    assert result.exit_code == 2
    assert "LORATOOLS_MERGE_JOBS" in result.stderr


def test_the_file_sets_options_below_environment_and_command_line(asked, tmp_path):
    (tmp_path / "loratools.toml").write_text(
        "[merge]\njobs = 2\nno-sync = true\nmax_memory = '2GB'\nshard-size = 1000\nweight = -1\n"
        "allow-unmatched = ['a', 'b']\n[verify]\njobs = 7\n"
    )
    options = asked()
    assert (options["jobs"], options["sync"], options["max_memory"]) == (2, False, 2_000_000_000)
    assert (options["shard_size"], options["weights"]) == (1000, (-1.0,))
    assert options["allow_unmatched"] == ("a", "b")
    env = {"LORATOOLS_MERGE_JOBS": "3"}
    assert asked(env=env)["jobs"] == 3
    assert asked("--jobs", "4", env=env)["jobs"] == 4


def test_another_file_by_variable_and_none_at_all(asked, tmp_path):
    (tmp_path / "loratools.toml").write_text("[merge]\njobs = 2\n")
    (tmp_path / "mine.toml").write_text("[merge]\njobs = 5\nforce = true\n")
    options = asked(env={"LORATOOLS_CONFIG": "mine.toml"})
    assert (options["jobs"], options["force"]) == (5, True)
    assert asked(env={"LORATOOLS_CONFIG": ""})["jobs"] is None


def test_flags_of_the_program_itself_can_be_set(tmp_path, monkeypatch, demo_files):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loratools.toml").write_text("[inspect]\njson = true\nverbose = true\n")
    result = CliRunner().invoke(app, ["inspect", str(demo_files.adapter)])
    assert json.loads(result.stdout)["schema"] == "loratools.inspect/1"
    assert "loratools.toml" in result.stderr


@pytest.mark.parametrize(
    ("text", "complaint", "hint"),
    [
        ("[merge]\njob = 2\n", "unknown option [merge] job", "did you mean jobs?"),
        ("[merge]\nzzz = 2\n", "unknown option [merge] zzz", "there are: "),
        ("[merge]\nhelp = true\n", "unknown option [merge] help", None),
        ("[merge]\nadapters = ['x']\n", "unknown option [merge] adapters", None),
        ("[marge]\njobs = 2\n", "unknown table [marge]", "did you mean merge?"),
        ("jobs = 2\n", "unknown table [jobs]", None),
        ("merge = 2\n", "merge must be a table", "write [merge]"),
        ("[merge]\njobs = '2'\n", "[merge] jobs must be a whole number, not '2'", None),
        ("[merge]\njobs = true\n", "[merge] jobs must be a whole number, not True", None),
        ("[merge]\njobs = 0\n", "[merge] jobs: 0 is not in the range", None),
        ("[merge]\nverify = 1\n", "[merge] verify must be true or false, not 1", None),
        ("[merge]\nweight = ['a']\n", "[merge] weight must be a number, not 'a'", None),
        ("[merge]\nweight = nan\n", "[merge] weight: 'nan' is not a number", None),
        ("[merge]\nmax-memory = 1.5\n", '[merge] max-memory must be a size such as "2GB", not 1.5', None),
        ("[merge]\nmax-memory = 'big'\n", "[merge] max-memory: 'big' is not a size", None),
        ("[merge]\nexecutor = 'abacus'\n", "[merge] executor: ", None),
        ("[merge]\ndtype = ['bf16']\n", "[merge] dtype must be text", None),
        (
            "[merge]\nallow-pickle = true\n",
            "[merge] allow-pickle cannot be set by a file",
            "LORATOOLS_CONFIG",
        ),
        ("[merge]\nforce = true\n", "[merge] force cannot be set by a file", "LORATOOLS_CONFIG"),
        ("[merge\n", "is not TOML", None),
        ("x = " + "[" * 100_000, "is not TOML", None),
    ],
)
def test_a_file_with_a_fault_is_exit_code_3(tmp_path, monkeypatch, text, complaint, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loratools.toml").write_text(text)
    result = CliRunner().invoke(app, ["merge", "base", "a", "out"])
    assert result.exit_code == 3
    first, *rest = result.stderr.splitlines()
    assert first.startswith("Error: loratools.toml: ")
    assert complaint in first
    if hint is not None:
        assert hint in rest[0]


def test_help_is_there_even_with_a_broken_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loratools.toml").write_text("[merge\n")
    assert CliRunner().invoke(app, ["merge", "--help"]).exit_code == 0


def test_a_file_that_is_not_there_or_not_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["formats"], env={"LORATOOLS_CONFIG": "gone.toml"})
    assert (result.exit_code, result.stderr.splitlines()[0]) == (3, "Error: gone.toml: no such file")
    (tmp_path / "loratools.toml").write_bytes(b"\xff\xfe")
    result = CliRunner().invoke(app, ["formats"])
    assert result.exit_code == 3
    assert "is not TOML" in result.stderr


# --- options that exclude each other ---------------------------------------------------------------------------


@pytest.fixture
def reduced(monkeypatch, tmp_path, demo_files):
    """What ``reduce`` says of itself, with a file of defaults, an environment and what is typed."""
    monkeypatch.chdir(tmp_path)

    def run(*typed: str, file: str = "", **env: str):
        (tmp_path / "loratools.toml").write_text(file)
        variables = {f"LORATOOLS_REDUCE_{name}": value for name, value in env.items()}
        arguments = ["reduce", str(demo_files.adapter), "out", "--dry-run", "--json", *typed]
        return CliRunner().invoke(app, arguments, env=variables)

    return run


@pytest.mark.parametrize(
    ("typed", "file", "env", "expected"),
    [
        (["--energy", "0.9"], "", {"RANK": "2"}, ("energy", 0.9, "per module")),
        (["--error", "0"], "rank = 2", {"ENERGY": "0.5"}, ("error", 0.0, "global")),
        (["--rank", "1"], "noise-floor = true", {}, ("rank", 1, "per module")),
        (["--noise-floor"], "rank = 1\nper-module = false", {}, ("noise_floor", None, "per module")),
        (["--size", "1MB"], "per-module = true", {}, ("size", 1_000_000, "global")),
        ([], "energy = 0.5", {"SIZE": "1MB"}, ("size", 1_000_000, "global")),
        ([], "rank = 2\nper-module = false", {}, ("rank", 2, "global")),
    ],
)
def test_what_is_typed_displaces_defaults_of_its_alternatives(reduced, typed, file, env, expected):
    result = reduced(*typed, file=f"[reduce]\n{file}\n", **env)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["rule"], document["value"], document["scope"]) == expected


def test_defaults_that_exclude_each_other_are_named_with_their_origin(reduced):
    result = reduced(file="[reduce]\nrank = 2\nenergy = 0.5\n")
    assert result.exit_code == 2
    assert "--rank (from loratools.toml) and --energy (from loratools.toml) say how far" in result.stderr
    result = reduced(RANK="2", ENERGY="0.5")
    assert "--rank (from the environment: LORATOOLS_REDUCE_RANK) and --energy (from" in result.stderr
    assert "(from" not in reduced("--rank", "2", "--energy", "0.5").stderr
    result = reduced(file="[reduce]\nsize = '1MB'\nper-module = true\n")
    assert "leave --per-module (from loratools.toml) out" in result.stderr


def test_weights_from_a_file_are_said_to_be_from_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loratools.toml").write_text("[merge]\nweight = [0.7, 0.3]\n")
    result = CliRunner().invoke(app, ["merge", "base", "a", "out"])
    assert result.exit_code == 2
    assert "-w was given 2 times (from loratools.toml) for 1 adapter" in result.stderr
