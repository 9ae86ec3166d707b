"""Everything loratools raises on purpose.

Each error carries its facts as attributes, makes its own sentence, and is also the builtin exception it resembles,
so that ``except FileNotFoundError`` works as a caller would expect. ``hint`` says what to do next, where there is
something to do.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AmbiguousFormat",
    "BadConfig",
    "CorruptFile",
    "Incomplete",
    "InputError",
    "LoratoolsError",
    "Mismatch",
    "NonFinite",
    "NotFound",
    "OutputExists",
    "OverBudget",
    "ShapeMismatch",
    "UnknownFormat",
    "UnmatchedModules",
    "Unsupported",
    "printable",
    "quoted",
    "size",
]


def printable(text: str) -> str:
    r"""Escape what could move a terminal's cursor or reverse its text.

    >>> printable("model.layers\x1b[2J.q_proj")
    'model.layers\\x1b[2J.q_proj'
    """
    if text.isprintable():  # also false for the bidirectional controls, which Unicode counts as formatting
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )


def quoted(value: object, limit: int = 80) -> str:
    """A value from a file, as its ``repr``, cut to a length that fits a message.

    >>> quoted("F32"), quoted("A" * 100, 10)
    ("'F32'", "'AAAAAAAAA...")
    """
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def size(count: float) -> str:
    """Bytes in decimal units.

    >>> size(999), size(2_200_000_000), size(20_000_000)
    ('999 bytes', '2.2 GB', '20 MB')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor * 0.9995:
            return f"{count / factor:.3g} {unit}"
    return f"{int(count)} byte{'' if int(count) == 1 else 's'}"


class LoratoolsError(Exception):
    """The root: a sentence, perhaps a ``hint``, and the facts as attributes."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(printable(message))
        self.hint = None if hint is None else printable(hint)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its sentence and its facts: the classes take different arguments to make theirs."""
        return (_again, (type(self), self.args), self.__dict__.copy())


def _again(kind: type[LoratoolsError], said: tuple[Any, ...]) -> LoratoolsError:
    # The two builtins that make all others of these; a class of several bases may name one that cannot make it.
    maker = OSError if issubclass(kind, OSError) else Exception
    error: LoratoolsError = maker.__new__(kind, *said)
    error.args = said
    return error


class InputError(LoratoolsError):
    """Something given as input cannot be read for what it should be."""


class CorruptFile(InputError, ValueError):
    """A file whose bytes break the rules of its format."""

    def __init__(self, path: object, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"{path}: {problem}", hint=hint)
        self.path = str(path)
        self.problem = problem


class UnknownFormat(InputError, ValueError):
    """A readable file that no reader of this build recognises as an adapter."""


class AmbiguousFormat(InputError, ValueError):
    """More than one reading is possible and nothing in the file decides."""


class BadConfig(InputError, ValueError):
    """An ``adapter_config.json`` or ``loratools.toml`` with a field that cannot be."""


class NotFound(InputError, FileNotFoundError):
    """A path that does not exist."""


class OutputExists(LoratoolsError, FileExistsError):
    """The output is there already, or overlaps an input."""


class Mismatch(LoratoolsError, ValueError):
    """Two inputs that do not belong together."""


class ShapeMismatch(Mismatch):
    """A delta whose shape does not fit its weight."""

    def __init__(
        self, name: str, delta: tuple[int, ...], weight: tuple[int, ...], *, hint: str | None = None
    ) -> None:
        super().__init__(f"{name}: delta {list(delta)} does not fit weight {list(weight)}", hint=hint)
        self.name = name
        self.delta = delta
        self.weight = weight


class UnmatchedModules(Mismatch, KeyError):
    """Adapter keys that nothing in the base answers to."""

    def __init__(self, message: str, names: tuple[str, ...], *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.names = names

    # KeyError would print the repr of its argument.
    __str__ = Exception.__str__


class Unsupported(LoratoolsError, NotImplementedError):
    """Well formed, but the operation has no meaning for it, or this build does not have it."""


class NonFinite(LoratoolsError, ArithmeticError):
    """A finite value became infinite or not a number through the operation."""


class OverBudget(LoratoolsError, MemoryError):
    """The plan needs more memory than ``max_memory`` allows; nothing has been read."""

    def __init__(self, needed: int, allowed: int, *, hint: str | None = None) -> None:
        super().__init__(f"this needs {size(needed)} of memory, {size(allowed)} are allowed", hint=hint)
        self.needed = needed
        self.allowed = allowed


class Incomplete(LoratoolsError, OSError):
    """Stopped before the end; nothing was published."""
