"""What the modules of an adapter are multiplied by, each by the block of the model it is in or by its name.

A specification has parts separated by semicolons, and the last that speaks of a module decides: ``PATTERN=RATIO``, a
vector of ratios for the blocks of the family (``1,0,0,...``), or the name of such a vector (``OUTALL``).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.errors import Unsupported, quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loratools.architectures.base import Architecture

__all__ = ["BlockWeights", "block_weights"]


@dataclass(frozen=True, slots=True)
class _Part:
    """One part: a pattern and its ratio, or a vector as it was given."""

    text: str
    pattern: re.Pattern[str] | None = None
    ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """A specification of block weights.

    Attributes:
        parts: in their order; empty for none.
    """

    parts: tuple[_Part, ...] = ()

    @staticmethod
    def parse(text: str) -> BlockWeights:
        """Read a specification.

        >>> BlockWeights.parse("OUTALL; attn2=0.5").parts[1].ratio
        0.5

        Raises:
            Unsupported: a part is neither a pattern with a number nor a vector.
        """
        return BlockWeights(tuple(_part(one.strip()) for one in text.split(";") if one.strip()))

    def factors(self, modules: Iterable[str], family: str) -> dict[str, float]:
        """What each module is multiplied by, where that is not 1.

        Args:
            modules: their names.
            family: the architecture they belong to; empty where none is known.

        Raises:
            Unsupported: a vector for a family that has no blocks, or of another length than its vectors; or a part that
                speaks of no module.
        """
        if not self.parts:
            return {}
        architecture = _architecture(family)
        names = {name: _names(name, architecture) for name in modules}
        found: dict[str, float] = {}
        for part in self.parts:
            mine = _by_pattern(part, names) if part.pattern else _by_vector(part, names, architecture)
            if not mine:
                raise Unsupported(
                    f"block weights: {quoted(part.text)} speaks of none of the {len(names)} modules",
                    hint="a pattern is searched in a module's name, as its file or diffusers has it, or is a block's",
                )
            found |= mine
        return {name: factor for name, factor in found.items() if factor != 1.0}


@dataclass(frozen=True, slots=True)
class _Names:
    """What a module is called: in its file and by diffusers; and the block it is in."""

    names: tuple[str, ...]
    block: str | None  # of the architecture, where it has such


def block_weights(given: str | Sequence[str] | None, count: int) -> tuple[BlockWeights, ...]:
    """One specification for each adapter, as a caller gives them: none, one for all, or one for each.

    Raises:
        Unsupported: another number of them, or one that cannot be read.
    """
    if not given:
        return ()
    listed = [given] if isinstance(given, str) else list(given)
    if count == 1:
        return (BlockWeights.parse(";".join(listed)),)
    if len(listed) not in {1, count}:
        raise Unsupported(
            f"{len(listed)} block weights for {count} adapters",
            hint="give one for all, or one for each in their order; ';' separates the parts of one",
        )
    parsed = [BlockWeights.parse(one) for one in listed]
    return tuple(parsed * count if len(parsed) == 1 else parsed)


def _part(text: str) -> _Part:
    pattern, equals, number = text.rpartition("=")
    if not equals:
        return _Part(text)
    try:
        ratio = float(number)
    except ValueError:
        ratio = math.nan
    if not math.isfinite(ratio):
        raise Unsupported(f"block weights: {quoted(number)} in {quoted(text)} is not a number")
    try:
        return _Part(text, re.compile(pattern), ratio)
    except re.error as error:
        raise Unsupported(f"block weights: {quoted(pattern)} is not a pattern: {error}") from error


def _architecture(family: str) -> Architecture | None:
    if not family:
        return None
    from loratools.architectures.base import architecture

    return architecture(family)


def _names(name: str, architecture: Architecture | None) -> _Names:
    if architecture is None:
        return _Names((name,), None)
    from loratools.architectures.blocks import block
    from loratools.canonical import stem

    place = architecture.lookup(stem(name))
    if place is None:
        return _Names((name,), None)
    return _Names((name, place.weight.native, *place.names), block(architecture, place))


def _by_pattern(part: _Part, modules: dict[str, _Names]) -> dict[str, float]:
    assert part.pattern is not None
    return {
        name: part.ratio
        for name, called in modules.items()
        if any(part.pattern.search(one) for one in called.names)
        or (called.block is not None and part.pattern.fullmatch(called.block))
    }


def _by_vector(
    part: _Part, modules: dict[str, _Names], architecture: Architecture | None
) -> dict[str, float]:
    if architecture is None:
        raise Unsupported(
            f"block weights: {quoted(part.text)} is for the blocks of a known architecture, and this model is of none",
            hint="PATTERN=RATIO speaks of modules by their names",
        )
    from loratools.architectures.blocks import ratios

    found = ratios(architecture, part.text)
    return {name: found[called.block] for name, called in modules.items() if called.block in found}
