"""Rendering: tables, lines, annotations, progress."""

from __future__ import annotations

import io
import sys

import pytest
from click.testing import CliRunner

from loratools.cli import tables
from loratools.cli.annotations import github, sarif
from loratools.cli.app import app
from loratools.cli.progress import progress
from loratools.cli.settings import Settings
from loratools.cli.text import percent, plain_output, size, warn
from loratools.verbs.reports import Finding, ValidationReport


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, name: str = "stdout", **variables: str) -> Terminal:
    """Put a terminal, 40 columns wide, in the place of a stream. Not a fixture: capturing would undo it."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for variable, value in {"TERM": "xterm-256color", "COLUMNS": "40", **variables}.items():
        monkeypatch.setenv(variable, value)
    stream = Terminal()
    monkeypatch.setattr(sys, name, stream)
    return stream


def test_a_table_on_a_terminal_keeps_names_whole_and_brackets_as_they_are(monkeypatch):
    terminal = on_terminal(monkeypatch)
    name = "model.layers.*.self_attn.q_proj[bold]" * 3
    tables.show_table(["module", ">rank"], [(name, 8), ("\x1b[2Jx", None)])
    text = terminal.getvalue()
    assert name in text
    assert "\\x1b[2Jx" in text
    assert "\x1b[2J" not in text
    assert "\x1b[1m" in text  # the title is bold


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_color_means_no_escape_codes(monkeypatch, variables):
    terminal = on_terminal(monkeypatch, **variables)
    assert plain_output()
    tables.show_table(["module", ">rank"], [("q_proj", 8)])
    assert "q_proj" in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()


def test_no_color_holds_for_errors_and_fields(monkeypatch, demo_files):
    for variables, coloured in (({"NO_COLOR": None, "TERM": "xterm"}, True), ({"NO_COLOR": "1"}, False)):
        inspected = CliRunner().invoke(app, ["inspect", str(demo_files.adapter)], env=variables, color=True)
        failed = CliRunner().invoke(app, ["inspect", "nowhere"], env=variables, color=True)
        assert ("\x1b" in inspected.stdout) is coloured
        assert ("\x1b" in failed.stderr) is coloured


def test_there_is_no_bar_without_a_terminal():
    with progress("Merging", 10, Settings()) as on_step:
        assert on_step is None


def test_a_bar_on_a_terminal_and_none_with_quiet(monkeypatch):
    class Step:
        nbytes = 5

    stream = on_terminal(monkeypatch, "stderr", COLUMNS="100")
    with progress("Merging", 10, Settings(), then="Verifying") as on_step:
        on_step(Step())
        on_step(Step())
    assert "Verifying" in stream.getvalue()
    with progress("Merging", 10, Settings(quiet=True)) as on_step:
        assert on_step is None


def test_warnings_are_lines_on_stderr(capsys):
    warn(["one\ntwo", "\x1b[2J"], Settings())
    warn(["unseen"], Settings(quiet=True))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Warning: one\\ntwo\nWarning: \\x1b[2J\n")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (999_600, "1 MB"),
        (1_234, "1.23 kB"),
        (2_200_000_000, "2.2 GB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0%"), (1e-6, "<0.1%"), (0.5, "50.0%"), (0.99999, ">99.9%"), (1.0, "100%"), (-0.25, "-25.0%")],
)
def test_percentages(share, text):
    assert percent(share) == text


NASTY = ValidationReport(
    path="a,b:c",
    ok=False,
    findings=(
        Finding("nan", "error", "x\n::error::forged", "50% of\r\nit", "see, there"),
        Finding("odd", "info", "", "fine"),
    ),
    modules=("x",),
)


def test_github_annotations_cannot_be_forged():
    first, second = (github(NASTY, finding) for finding in NASTY.findings)
    assert "\n" not in first
    assert "\r" not in first
    assert first.startswith(
        "::error file=a%2Cb%3Ac,title=nan::x%0A::error::forged: 50%25 of%0D%0Ait (see, there)"
    )
    assert second == "::notice file=a%2Cb%3Ac,title=odd::fine"


def test_sarif_has_what_its_schema_requires():
    said = sarif(NASTY)
    (run,) = said["runs"]
    assert [result["level"] for result in run["results"]] == ["error", "note"]
    assert all(result["message"]["text"] for result in run["results"])
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["nan", "odd"]
    assert (
        run["results"][0]["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]
        == NASTY.findings[0].where
    )
    assert "logicalLocations" not in run["results"][1]["locations"][0]


@pytest.mark.parametrize(
    ("severities", "strict", "code"),
    [
        ([], False, 0),
        (["info"], True, 0),
        (["warning"], False, 0),
        (["warning"], True, 1),
        (["error"], False, 1),
    ],
)
def test_exit_codes_of_validate(monkeypatch, severities, strict, code):
    import loratools

    findings = tuple(Finding("code", severity, "x", "text", "hint") for severity in severities)
    report = ValidationReport("x", "error" not in severities, findings, ("m",))
    monkeypatch.setattr(loratools, "validate", lambda ref, **_: report, raising=False)
    result = CliRunner().invoke(app, ["validate", "x", *(["--strict"] if strict else [])])
    assert result.exit_code == code
    assert all(severity in result.stdout for severity in severities)
    quiet = CliRunner().invoke(app, ["validate", "x", "--quiet"])
    assert quiet.stdout.count("text") == severities.count("error")


def test_a_survival_that_is_not_a_number_is_not_a_percentage():
    from loratools.cli.merge import _survival
    from loratools.verbs.reports import SurvivalSummary

    nan = float("nan")
    told = _survival(SurvivalSummary(nan, nan, "q", nan, 0.0))
    assert "%" not in told
    assert "overflow" in told
