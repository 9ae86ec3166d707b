"""Regular expressions out of files of unknown origin, matched as PEFT does, in bounded time and memory.

A pattern can be written to stall whoever matches it, or to fill the memory of whoever compiles it. Here its length
and its repetitions are limited, plain names (nearly all there are) are looked up without a regular expression, and
the others share a budget of seconds.
"""

from __future__ import annotations

import re
import time
import warnings
from math import prod
from typing import TYPE_CHECKING, Any

from loratools.errors import BadConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["MAX_PATTERN", "Names", "Patterns"]

MAX_PATTERN = 1_000  # characters
MAX_REPEATS = 10_000  # product of all {m,n} in one pattern: the compiled form grows with it
SECONDS = 0.5  # for all matches of one expression, or of one table

# A name, anchored perhaps; an unescaped dot stands for any character.
_PLAIN = re.compile(r"(\^?)((?:[\w.-]|\\[.\-])+)(\$?)")
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_ODD_BRACE = re.compile(r"(?<!\\)\{(?!\d+(?:,\d*)?\}|,\d*\})")


class Patterns:
    r"""PEFT's ``rank_pattern`` or ``alpha_pattern``: the first key, in file order, that ends a name at a dot.

    PEFT's rule (``get_pattern_key``) is ``re.match(rf"(.*\.)?({key})$", name)``.

    >>> Patterns({"q_proj": 4, r"layers\\.0\\.q_proj": 8}).first("model.layers.0.q_proj", 16)
    4
    """

    def __init__(
        self,
        table: Mapping[str, Any] | None = None,
        where: str = "pattern",
        faults: list[BadConfig] | None = None,
    ) -> None:
        self.table = dict(table or {})
        self._keys = tuple(self.table)
        # Plain keys by length and by where their wildcards are; then by their text with dots for wildcards.
        self._plain: dict[int, dict[tuple[tuple[int, ...], bool], dict[str, int]]] = {}
        self._expressions: list[tuple[int, str]] = []
        self._compiled: dict[int, _Expression] = {}
        self._context = _Context(where, faults)
        for place, key in enumerate(self._keys):
            self._file(place, key)

    def __len__(self) -> int:
        return len(self.table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patterns) and self.table == other.table

    __hash__ = None  # type: ignore[assignment]

    def first(self, name: str, default: Any) -> Any:
        """The value of the first key that matches ``name``, or ``default``.

        Raises:
            BadConfig: a pattern takes too long, or is no regular expression.
        """
        key = self.first_key(name)
        return default if key is None else self.table[key]

    def first_key(self, name: str) -> str | None:
        """The first key that matches ``name``."""
        if not self.table:
            return None
        best = min(self._plain_places(name), default=len(self._keys))
        for place, _ in self._expressions:
            if place > best:
                break
            if self._expression(place).matches(name):
                return self._keys[place]
        return self._keys[best] if best < len(self._keys) else None

    def _file(self, place: int, key: str) -> None:
        plain = _PLAIN.fullmatch(key)
        if plain is None:
            self._expressions.append((place, key))
            return
        text, wildcards = "", []
        for letter in re.findall(r"\\.|.", plain[2]):
            if letter == ".":
                wildcards.append(len(text))
            text += letter[-1]
        group = self._plain.setdefault(len(text), {}).setdefault((tuple(wildcards), bool(plain[1])), {})
        group.setdefault(text, place)

    def _plain_places(self, name: str) -> Iterator[int]:
        for start in _starts(name):
            for (wildcards, anchored), group in self._plain.get(len(name) - start, {}).items():
                if anchored and start:
                    continue
                found = group.get(_masked(name[start:], wildcards))
                if found is not None:
                    yield found

    def _expression(self, place: int) -> _Expression:
        if place not in self._compiled:
            self._compiled[place] = _Expression(self._keys[place], r"(.*\.)?({})$", self._context)
        return self._compiled[place]


def _starts(name: str) -> Iterator[int]:
    """Where a key may begin: at the start of the name, and behind each dot."""
    yield 0
    position = name.find(".")
    while position >= 0:
        yield position + 1
        position = name.find(".", position + 1)


def _masked(text: str, wildcards: tuple[int, ...]) -> str:
    if not wildcards:
        return text
    letters = list(text)
    for position in wildcards:
        letters[position] = "."
    return "".join(letters)


class Names:
    r"""PEFT's ``target_modules`` and its like: a list of names, or one regular expression for whole names.

    >>> Names(["q_proj"]).matches("model.layers.0.q_proj"), Names(r".*\.q_proj").matches("q_proj")
    (True, False)
    """

    def __init__(
        self,
        value: tuple[str, ...] | list[str] | str | None,
        where: str = "names",
        faults: list[BadConfig] | None = None,
    ) -> None:
        self.value = value
        self.names = frozenset() if value is None or isinstance(value, str) else frozenset(value)
        self._expression: _Expression | None = None
        self._context = _Context(where, faults)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]

    def matches(self, name: str) -> bool:
        """Whether ``name`` is meant.

        Raises:
            BadConfig: the expression takes too long, or is none.
        """
        if isinstance(self.value, str):
            if self._expression is None:
                self._expression = _Expression(self.value, "(?:{})", self._context)
            return self._expression.matches(name)
        return self.name(name) is not None

    def name(self, name: str) -> str | None:
        """Which of the listed names it is, or ends in at a dot; the longest, if several do."""
        return next((name[start:] for start in _starts(name) if name[start:] in self.names), None)


class _Context:
    """What expressions of one field share: its name, the seconds left for matching, and where faults go.

    Without a list for the faults the first one is raised; with it, a faulty expression matches nothing.
    """

    def __init__(self, where: str, faults: list[BadConfig] | None) -> None:
        self.where = where
        self.faults = faults
        self.left = SECONDS

    def fault(self, pattern: str, problem: str, cause: Exception | None = None) -> None:
        error = BadConfig(
            f"{self.where}: {pattern[:60]!r} {problem}",
            hint="write the pattern in a simpler way, or list the modules by name",
        )
        if self.faults is None:
            raise error from cause
        self.faults.append(error)


class _Expression:
    """One regular expression, compiled.

    Args:
        pattern: as it stands in the file.
        frame: what it is put into, in place of ``{}``; the whole must match.
        context: see there.
    """

    def __init__(self, pattern: str, frame: str, context: _Context) -> None:
        self.pattern = pattern
        self.context = context
        self._compiled = self._compile(frame)  # None once it has failed

    def _compile(self, frame: str) -> Any:
        repeats = prod(max(int(n or 1) for n in pair) or 1 for pair in _REPEAT.findall(self.pattern))
        if repeats > MAX_REPEATS:
            self.context.fault(self.pattern, f"repeats up to {repeats:,} times")
            return None
        import regex

        # What re takes for a plain brace would be a fuzzy match to regex.
        literal = _ODD_BRACE.sub(r"\\{", self.pattern)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of set notation that may change its meaning one day
                re.compile(frame.replace("{}", self.pattern))
                return regex.compile(frame.replace("{}", literal))
        except (re.error, regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
            self.context.fault(self.pattern, f"is no regular expression: {error}", error)
            return None

    def matches(self, name: str) -> bool:
        """Whether it matches the whole of ``name``.

        Raises:
            BadConfig: the time is spent, and faults are not collected.
        """
        if self._compiled is None:
            return False
        started = time.perf_counter()
        try:
            if self.context.left <= 0:
                raise TimeoutError
            return self._compiled.fullmatch(name, timeout=self.context.left) is not None
        except TimeoutError as error:
            self._compiled = None
            self.context.fault(self.pattern, f"takes too long to match {name[:120]}", error)
            return False
        finally:
            self.context.left -= time.perf_counter() - started
