"""Findings for machines that show them beside code: SARIF 2.1.0 and GitHub's workflow commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools import __version__
from loratools.cli.text import say_json
from loratools.errors import printable

if TYPE_CHECKING:
    from loratools.verbs.reports import Finding, ValidationReport

__all__ = ["github", "sarif", "show_github", "show_sarif"]

_SARIF_LEVEL = {"error": "error", "warning": "warning", "info": "note"}
_GITHUB_LEVEL = {"error": "error", "warning": "warning", "info": "notice"}


def sarif(report: ValidationReport) -> dict[str, Any]:
    """The findings as SARIF (https://docs.oasis-open.org/sarif/sarif/v2.1.0/)."""
    codes = sorted({_code(finding) for finding in report.findings})
    rules = [{"id": code} for code in codes]
    driver = {"name": "loratools", "version": __version__, "rules": rules}
    results = [_result(report, finding, codes) for finding in report.findings]
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _result(report: ValidationReport, finding: Finding, codes: list[str]) -> dict[str, Any]:
    location: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": {"uri": Path(report.path).as_posix()}}
    }
    if finding.where:
        location["logicalLocations"] = [{"fullyQualifiedName": finding.where}]
    return {
        "ruleId": _code(finding),
        "ruleIndex": codes.index(_code(finding)),
        "level": _SARIF_LEVEL[finding.severity],
        "message": {"text": _sentence(finding)},
        "locations": [location],
    }


def _code(finding: Finding) -> str:
    """A finding's code; of an engine's rule, with the engine before it, as a feature means something else to each."""
    return finding.code if finding.engine is None else f"{finding.engine}/{finding.code}"


def _sentence(finding: Finding) -> str:
    return f"{finding.message} ({finding.hint})" if finding.hint else finding.message


def github(report: ValidationReport, finding: Finding) -> str:
    """One finding as a workflow command: a newline or a comma in a name cannot start another."""
    where = f"{finding.where}: " if finding.where else ""
    file, title = _property(report.path), _property(_code(finding))
    return (
        f"::{_GITHUB_LEVEL[finding.severity]} file={file},title={title}::{_data(where + _sentence(finding))}"
    )


def _data(text: str) -> str:
    return printable(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def show_sarif(report: ValidationReport) -> None:
    """Print the findings as SARIF."""
    say_json(sarif(report))


def show_github(report: ValidationReport) -> None:
    """Print the findings as workflow commands."""
    for finding in report.findings:
        click.echo(github(report, finding))
