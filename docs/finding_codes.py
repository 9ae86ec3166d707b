"""The table of docs/findings.md: codes and severities from the source of the checks, the words from findings.toml."""

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEVERITIES = ("error", "warning", "info")


def table() -> str:
    """The rows, gravest first.

    Raises:
        ValueError: a code has no words, or words have no code.
    """
    found, words = codes(), tomllib.loads((ROOT / "docs" / "findings.toml").read_text(encoding="utf-8"))
    if unlike := found.keys() ^ words.keys():
        raise ValueError(
            f"in the source or in docs/findings.toml, but not in both: {', '.join(sorted(unlike))}"
        )
    rows = sorted((min(map(SEVERITIES.index, found[code])), code) for code in found)
    lines = ["| code | severity | when | what to do |", "|---|---|---|---|"]
    for _, code in rows:
        severity = " or ".join(sorted(found[code], key=SEVERITIES.index))
        lines.append(f"| `{code}` | {severity} | {words[code]['when']} | {words[code]['do']} |")
    return "\n".join(lines)


def codes() -> dict[str, set[str]]:
    """Every code that a check may yield, and how grave it is then."""
    found: dict[str, set[str]] = defaultdict(set)
    problems = _problems()
    for path in [*(ROOT / "loratools/verbs/checking").glob("*.py"), ROOT / "loratools/verbs/validate.py"]:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                for severity, code in _yielded(function, problems):
                    found[code].add(severity)
    return found


def _yielded(function: ast.FunctionDef, problems: set[str]) -> Iterator[tuple[str, str]]:
    assigned = (node for node in ast.walk(function) if isinstance(node, ast.Assign))
    chosen = {
        code for node in assigned if ast.unparse(node.targets[0]) == "code" for code in _strings(node.value)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SEVERITIES:
            first = node.args[0]
            source = ast.unparse(first)
            given = chosen if source == "code" else problems if source == "problem.code" else _strings(first)
            if not given and function.name not in SEVERITIES:
                raise ValueError(f"{function.name}, line {node.lineno}: cannot tell the code of this finding")
            yield from ((node.func.id, code) for code in given)


def _problems() -> set[str]:
    """Codes of what is wrong with a module, which the readers of the formats give."""
    files = [ROOT / f"loratools/formats/{name}.py" for name in ("peft", "grouping", "reading")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    calls = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {word for call in calls if ast.unparse(call.func) == "Problem" for word in _strings(call.args[0])}


def _strings(node: ast.expr) -> set[str]:
    """The strings that an expression may be."""
    if isinstance(node, ast.IfExp):
        return _strings(node.body) | _strings(node.orelse)
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
