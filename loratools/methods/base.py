"""What a method is: a function from a :class:`Stack` to a delta, and a place in :data:`METHODS`.

The function's keyword-only parameters are its options: their annotations and defaults become options of the command
line and rows of the documentation, so that a method of one's own is one decorated function.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import textwrap
import types
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from loratools.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from loratools.deltas.lowrank import LowRank

__all__ = [
    "METHODS", "Approximation", "Between", "Method", "Option", "Positive", "Seed", "Share", "Space", "Stack", "find",
    "method", "seed_of", "takers",
]  # fmt: skip

Space = Literal["weight", "core", "knots"]


@dataclass(frozen=True, slots=True)
class Between:
    """The range an option's number may lie in, as part of its annotation.

    >>> Between(0, 1, low_open=True).holds(0.0), str(Between(0, 1, low_open=True))
    (False, 'above 0 and at most 1')
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range; "not a number" does not."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.low_open else 'at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.high_open else 'at most'} {self.high:g}")
        return " and ".join(parts) or "any number"


Share = Annotated[float, Between(0, 1, low_open=True)]
Positive = Annotated[float, Between(0, low_open=True)]
Seed = Annotated[int, Between(0)]


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """What the adapters add to one matrix: the input of every method.

    >>> import numpy as np
    >>> from loratools.deltas.lowrank import LowRank
    >>> Stack("fc", (LowRank(np.ones((4, 1)), np.ones((1, 3))),), (0.5,)).shape
    (4, 3)

    Attributes:
        name: of the matrix: the module's, and ``name[3]`` for its fourth expert.
        deltas: one for each adapter that has the matrix, all of one shape, scaling folded into ``up`` (so 1.0).
        weights: what each delta is multiplied by.
        tasks: which adapter each delta is from, counted from 0 over all that are combined; seeds go by it.
        rank: that the result is to have; None where nothing was asked. A method whose result has exact factors may
            leave it to :meth:`Method.run`, which finds the best approximation of that rank.
        device: where :meth:`Method.run` forms the long products of that approximation.
    """

    name: str
    deltas: tuple[LowRank, ...]
    weights: tuple[float, ...]
    tasks: tuple[int, ...] = ()
    rank: int | None = None
    device: str = "cpu"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.deltas[0].shape

    @property
    def total_rank(self) -> int:
        """The sum of the ranks of the deltas: that of their exact sum."""
        return sum(delta.down.shape[0] for delta in self.deltas)

    def seed(self, index: int, seed: int = 0) -> int:
        """A seed of 64 bits for the random numbers of ``deltas[index]``.

        It depends on nothing but ``seed``, the matrix's name and which adapter the delta is from: not on the order of
        the work, nor on which other matrices there are.
        """
        task = self.tasks[index] if self.tasks else index
        return seed_of(seed, self.name, task)

    def generator(self, index: int, seed: int = 0) -> np.random.Generator:
        """Random numbers for ``deltas[index]``, from :meth:`seed`."""
        import numpy as np

        return np.random.Generator(np.random.SFC64(self.seed(index, seed)))


def seed_of(*parts: object) -> int:
    """64 bits from a hash of the parts, the same in every process."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


@dataclass(frozen=True, slots=True, eq=False)
class Approximation:
    """A delta in factors, and how far it is from what the method defines.

    Attributes:
        delta: with scaling 1.0.
        norm: Frobenius, of what the method defines; None where nobody needs it because the error is 0.
        error: Frobenius, of ``delta`` against it.
    """

    delta: LowRank
    norm: float | None = None
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Option:
    """One keyword-only parameter of a method.

    Attributes:
        name: as in Python; ``--with-dashes`` on the command line.
        type: ``float``, ``int``, ``bool`` or ``str``.
        default: its value where nothing is said.
        choices: the only values, for a ``Literal``.
        range: that a number must lie in.
        help: from the ``Args`` section of the function's docstring.
    """

    name: str
    type: type
    default: Any
    choices: tuple[str, ...] = ()
    range: Between = field(default_factory=Between)
    help: str = ""

    @property
    def flag(self) -> str:
        """As the command line spells it."""
        return "--" + self.name.replace("_", "-")

    def check(self, method: str, value: Any) -> Any:
        """The value in its type.

        Raises:
            Unsupported: it is of another type, or out of range.
        """
        where = f"{method}: {self.name} is {value!r}"
        if self.choices:
            if value not in self.choices:
                raise Unsupported(f"{where}, which is none of {', '.join(self.choices)}")
            return value
        if self.type in {int, float}:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or (self.type is int and value != int(value)):
                raise Unsupported(f"{where}, not {'a whole' if self.type is int else 'a'} number")
            if not (math.isfinite(value) and self.range.holds(value)):
                raise Unsupported(f"{where}; it must be {self.range}")
            return self.type(value)
        if not isinstance(value, self.type):
            raise Unsupported(f"{where}, not a {self.type.__name__}")
        return value


@dataclass(frozen=True, slots=True)
class Method:
    """A way of combining deltas, and what there is to say about it.

    Attributes:
        name: as ``--method`` takes it.
        function: from a :class:`Stack` and the options to a delta, or to an :class:`Approximation` of one.
        summary: one sentence.
        formula: in plain text.
        paper: the address of where it comes from.
        when: one should use it.
        cost: in words.
        options: its keyword-only parameters.
        aliases: other names for it.
        legacy: it repeats what another tool computes, for those who need its numbers.
        least: adapters it needs.
        most: adapters it takes; None for any number.
        validate: looks at options that only together make sense, and raises Unsupported.
    """

    name: str
    function: Callable[..., LowRank | Approximation]
    summary: str
    formula: str = ""
    paper: str = ""
    when: str = ""
    cost: str = ""
    options: tuple[Option, ...] = ()
    aliases: tuple[str, ...] = ()
    legacy: bool = False
    least: int = 1
    most: int | None = None
    validate: Callable[..., None] | None = None

    @property
    def spaces(self) -> tuple[str, ...]:
        """The coordinates it can work in, where it works on each entry by itself."""
        return next((option.choices for option in self.options if option.name == "space"), ())

    def settle(self, given: Mapping[str, Any], adapters: int | None = None) -> dict[str, Any]:
        """All options with their values, checked.

        Args:
            given: the values that are not the defaults; None counts as not given.
            adapters: how many are combined.

        Raises:
            Unsupported: an option the method does not have, a value that cannot be, or a wrong number of adapters.
        """
        known = {option.name: option for option in self.options}
        for name in given:
            if name not in known and given[name] is not None:
                raise Unsupported(f"{self.name} has no option {name}", hint=_who_takes(name, self))
        settled = {}
        for option in self.options:
            value = given.get(option.name)
            settled[option.name] = option.check(self.name, option.default if value is None else value)
        if self.validate is not None:
            self.validate(**settled)
        if adapters is not None:
            self._require_count(adapters)
        return settled

    def _require_count(self, adapters: int) -> None:
        few, many = adapters < self.least, self.most is not None and adapters > self.most
        if few or many:
            wanted = f"exactly {self.most}" if self.most == self.least else f"{self.least} or more"
            raise Unsupported(
                f"{self.name} combines {wanted} adapters, not {adapters}",
                hint="--method linear combines any number",
            )

    def run(self, stack: Stack, **options: Any) -> Approximation:
        """The method's result for one matrix, at the stack's rank where one is asked.

        Args:
            stack: what to combine.
            options: as :meth:`settle` returned them.
        """
        found = self.function(stack, **options)
        if isinstance(found, Approximation):
            return found
        if stack.rank is None:
            return Approximation(found)
        from loratools.deltas.algebra import core

        spectrum = core(found if stack.device == "cpu" else found.on(stack.device))
        return Approximation(spectrum.truncate(stack.rank), spectrum.tail(0), spectrum.tail(stack.rank))


METHODS: dict[str, Method] = {}


def method(
    *,
    paper: str = "",
    formula: str = "",
    when: str = "",
    cost: str = "",
    aliases: Sequence[str] = (),
    legacy: bool = False,
    least: int = 1,
    most: int | None = None,
    validate: Callable[..., None] | None = None,
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into :data:`METHODS`; it stays an ordinary function.

    Its keyword-only parameters become options: ``float``, ``int``, ``bool``, ``str`` or a ``Literal`` of strings, each
    with a default; a range is given as ``Annotated[float, Between(0, 1)]``. The first line of the docstring is the
    summary, and the ``Args`` section describes the options.

    >>> from loratools.methods import METHODS
    >>> @method(formula="D_1", when="never")
    ... def only_the_first(stack, *, scale: float = 1.0):
    ...     '''The first adapter alone.'''
    ...     return stack.deltas[0]
    >>> METHODS["only_the_first"].options[0].flag, METHODS.pop("only_the_first").summary
    ('--scale', 'The first adapter alone.')

    Args:
        paper: the address of where it comes from.
        formula: in plain text.
        when: one should use it.
        cost: in words.
        aliases: other names for it.
        legacy: it repeats what another tool computes.
        least: adapters it needs.
        most: adapters it takes; None for any number.
        validate: is given all options and raises Unsupported where they do not go together.
        name: of the method, where it is not the function's.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        doc = inspect.getdoc(function) or ""
        title = name or function.__name__
        METHODS[title] = Method(
            title, function, " ".join(doc.partition("\n\n")[0].split()), formula, paper, when, cost,
            _options(function, doc), tuple(aliases), legacy, least, most, validate,
        )  # fmt: skip
        return function

    return enter


def find(name: str) -> Method:
    """A method by its name or one of its aliases.

    Raises:
        Unsupported: there is none; the message names the nearest.
    """
    for known in METHODS.values():
        if name == known.name or name in known.aliases:
            return known
    from difflib import get_close_matches

    near = get_close_matches(name, METHODS, 3)
    raise Unsupported(
        f"there is no method {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
        hint=f"the methods are {', '.join(METHODS)}",
    )


def takers(option: str) -> list[str]:
    """The methods that have an option of this name."""
    return [known.name for known in METHODS.values() if any(one.name == option for one in known.options)]


def _who_takes(option: str, asked: Method) -> str:
    if names := takers(option):
        return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} it"
    if asked.options:
        return f"its options are {', '.join(one.name for one in asked.options)}"
    return "it has no options"


def _options(function: Callable[..., Any], doc: str) -> tuple[Option, ...]:
    """The keyword-only parameters of a function."""
    parameters = [
        one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY
    ]
    # Only these annotations are evaluated: the others may name what is imported for type checkers alone.
    bare = types.SimpleNamespace(__annotations__={one.name: one.annotation for one in parameters})
    hints = typing.get_type_hints(bare, function.__globals__, include_extras=True)
    described = _described(doc)
    return tuple(_option(one, hints[one.name], described.get(one.name, "")) for one in parameters)


def _option(parameter: inspect.Parameter, hint: Any, text: str) -> Option:
    if parameter.default is parameter.empty:
        raise TypeError(f"the option {parameter.name} of a method needs a default")
    extras: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rest = typing.get_args(hint)
        extras = tuple(rest)
    allowed = next((one for one in extras if isinstance(one, Between)), Between())
    if typing.get_origin(hint) is Literal:
        return Option(parameter.name, str, parameter.default, typing.get_args(hint), allowed, text)
    if hint not in {float, int, bool, str}:
        raise TypeError(f"option {parameter.name} is a {hint}; float, int, bool, str or a Literal serve")
    return Option(parameter.name, hint, parameter.default, (), allowed, text)


def _described(doc: str) -> dict[str, str]:
    """What the ``Args`` section of a docstring says of each parameter, as one line."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    if section is None:
        return {}
    body = textwrap.dedent(section[1])
    return {
        name: " ".join(text.split())
        for name, text in re.findall(r"^(\w+):[ ]*((?:.*)(?:\n[ \t]+.*)*)", body, re.MULTILINE)
    }
