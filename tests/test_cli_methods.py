"""``loratools methods``: every registered method, as a table and as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loratools.cli.methods import command
from loratools.cli.settings import Settings
from loratools.methods import METHODS
from loratools.methods.base import Stack, method

FIELDS = {
    "name", "aliases", "summary", "formula", "paper", "when", "cost", "spaces", "legacy", "adapters", "parameters",
}  # fmt: skip
PARAMETER = {"name", "option", "type", "default", "choices", "range", "help"}


def call(*arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, obj=Settings(), catch_exceptions=False)
    assert result.exit_code == 0
    assert not result.stderr
    return result.stdout


def test_the_table_has_a_line_for_each_method() -> None:
    lines = call().splitlines()
    assert lines[0].split()[:2] == ["method", "options"]
    assert [line.split()[0].rstrip(",") for line in lines[1:]] == list(METHODS)
    assert any("cat" in line for line in lines)
    assert any("--scale 1.0" in line for line in lines)


def test_verbose_explains_each_option() -> None:
    text = call("-v")
    for known in METHODS.values():
        for option in known.options:
            assert f"  {option.flag} (" in text
            assert option.help in text


def test_json_has_every_method_with_its_parameters() -> None:
    document = json.loads(call("--json"))
    assert document["schema"] == "loratools.methods/1"
    assert [entry["name"] for entry in document["methods"]] == list(METHODS)
    for entry in document["methods"]:
        assert set(entry) == FIELDS
        assert all(set(parameter) == PARAMETER for parameter in entry["parameters"])
    by_name: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in document["methods"]}
    assert by_name["linear"]["aliases"] == ["cat"]
    assert by_name["peft_linear"]["legacy"] is True
    assert by_name["slerp"]["adapters"] == {"least": 2, "most": 2}
    assert by_name["slerp"]["parameters"] == [
        {"name": "t", "option": "--t", "type": "float", "default": 0.5, "choices": [],
         "range": "at least 0 and at most 1", "help": "0 is the first adapter, 1 the second."}
    ]  # fmt: skip
    (basis,) = [p for p in by_name["pico"]["parameters"] if p["name"] == "basis"]
    assert (basis["type"], basis["choices"], basis["range"]) == ("str", ["stored", "delta"], None)


@pytest.mark.parametrize("name", list(METHODS))
def test_nothing_is_left_unsaid(name: str) -> None:
    known = METHODS[name]
    assert known.summary.endswith(".")
    assert known.formula
    assert known.when.endswith(".")
    assert known.cost.endswith(".")
    assert known.paper.startswith("https://")
    for option in known.options:
        assert option.help.endswith("."), option.name


def test_a_method_of_ones_own_is_listed() -> None:
    @method(formula="D_1", paper="https://example.org", when="Never.", cost="None.")
    def only_the_first(stack: Any, *, share: float = 1.0) -> Any:
        """The first adapter alone.

        Args:
            share: of it.
        """
        return stack.deltas[0]

    try:
        assert "only_the_first" in call()
        (entry,) = [e for e in json.loads(call("--json"))["methods"] if e["name"] == "only_the_first"]
        assert entry["parameters"][0]["option"] == "--share"
    finally:
        del METHODS["only_the_first"]


def test_the_documentations_own_method_works() -> None:
    import numpy as np

    from loratools.deltas.lowrank import LowRank

    page = Path(__file__).parents[1] / "docs" / "methods.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    try:
        exec(example, {})
        known = METHODS["crossfade"]
        ones = LowRank(np.ones((3, 1)), np.ones((1, 2)))
        twos = LowRank(2 * np.ones((3, 1)), np.ones((1, 2)))
        found = known.run(Stack("fc", (ones, twos), (1.0, 1.0)), **known.settle({"share": 0.25}, 2)).delta
        assert found.rows(0, 3).tolist() == [[1.75, 1.75]] * 3
    finally:
        METHODS.pop("crossfade", None)


def test_listing_loads_no_mathematics() -> None:
    program = """
import sys
from click.testing import CliRunner
from loratools.cli.methods import command
from loratools.cli.settings import Settings
assert CliRunner().invoke(command, ["--json"], obj=Settings()).exit_code == 0
assert not {"numpy", "torch"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
