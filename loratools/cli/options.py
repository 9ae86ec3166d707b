"""Options that several commands share, declared once."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loratools.cli.settings import Settings
from loratools.cli.text import one_line
from loratools.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "FINITE",
    "FLOATS",
    "REF",
    "SIZE",
    "architecture",
    "block_weights",
    "computing",
    "enabling",
    "pickles",
    "reading",
    "shared",
    "traced",
    "weighting",
]

F = TypeVar("F", bound="Callable[..., Any]")

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


class Size(click.ParamType[int]):
    """A number of bytes: ``20MB`` is 20,000,000 of them; ``GiB`` is there for who means it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See :class:`click.ParamType`."""
        found = _SIZE.fullmatch(str(value).strip())
        unit = None if found is None else _UNITS.get(found[2].upper())
        if found is None or unit is None:
            self.fail(f"{str(value)!r} is not a size, such as 500MB or 2GB.", param, ctx)
        count = int(float(found[1]) * unit)
        if count < 1:
            self.fail(f"{str(value)!r} is no room at all.", param, ctx)
        return count


class Flags(click.ParamType[tuple[bool, ...]]):
    """Which parts of a whole are meant, as ``1,0,1``."""

    name = "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[bool, ...]:
        """See :class:`click.ParamType`."""
        words = str(value).replace(" ", "").lower().split(",")
        meanings = {"1": True, "true": True, "0": False, "false": False}
        if not any(meanings.get(word) for word in words) or not meanings.keys() >= set(words):
            self.fail(f"{str(value)!r} does not say which parts, such as 1,0,1.", param, ctx)
        return tuple(meanings[word] for word in words)


class Finite(click.ParamType[float]):
    """A number that is neither infinite nor "nan"."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See :class:`click.ParamType`."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{str(value)!r} is not a number.", param, ctx)
        return number


class Floats(click.ParamType[str]):
    """The name of a type that a merge can write."""

    name = "type"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See :class:`click.ParamType`."""
        from loratools.dtypes import compatible, dtype

        try:
            known = compatible(dtype(str(value)))
        except Unsupported:
            known = False
        if not known:
            self.fail(
                f"{str(value)!r} is not a type that can be written: bf16, f16, f32 and f64 are.", param, ctx
            )
        return str(value)


class Ref(click.Path):
    """A path or a reference. Whether it is there is for the library to say, but nothing is not a name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See :class:`click.ParamType`."""
        if not os.fspath(value):
            self.fail("it is empty; is a variable not set?", param, ctx)
        return super().convert(value, param, ctx)


SIZE = Size()
FINITE = Finite()
FLOATS = Floats()
REF = Ref()


def _chain(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator of several; --help shows them in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _setting(*names: str, help: str) -> Callable[[F], F]:
    """A flag that fills in :class:`Settings` and is no argument of the command."""
    field = names[-1].lstrip("-")

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: ARG001
        settings = ctx.ensure_object(Settings)
        setattr(settings, field, value)
        if settings.verbose and field == "verbose" and settings.defaults_from is not None:
            click.echo(f"Defaults from {one_line(settings.defaults_from)}", err=True)

    return click.option(
        *names,
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        help=help,
        show_default=False,
    )


traced = _setting("--debug", help="Show a traceback for expected errors too.")

shared = _chain(
    _setting("--json", help="Print one JSON document."),
    _setting("-q", "--quiet", help="No progress, no warnings, no summary."),
    _setting("-v", "--verbose", help="Show lists in full, and where defaults came from."),
    traced,
)

enabling = click.option(
    "--enable-lora",
    type=Flags(),
    metavar="LIST",
    help="Which parts of a fused weight a loralib file adapts, such as 1,0,1.",
)

pickles = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read .bin and .pt files (needs torch; weights only, no code is run).",
)

reading = _chain(
    click.option(
        "--config", type=click.Path(dir_okay=False), metavar="FILE",
        help="The adapter_config.json of a bare weight file.",
    ),
    click.option("--alpha", type=FINITE, metavar="NUMBER", help="The lora_alpha of a bare weight file."),
    enabling,
    click.option(
        "--blockwise-experts", is_flag=True,
        help="The B of fused experts is packed expert by expert (unsloth before September 2026).",
    ),
    pickles,
)  # fmt: skip

computing = _chain(
    click.option(
        "--jobs",
        type=click.IntRange(min=1),
        metavar="N",
        help="Workers.  [default: one a core, four at most]",
    ),
    click.option(
        "--executor",
        type=click.Choice(["inline", "threads", "processes", "ray"]),
        default="threads",
        help="What runs the work; ray is not in this build.",
    ),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda", "mps", "auto"]),
        default="cpu",
        help="Where low-rank factors are multiplied; cuda and mps need torch.",
    ),
    click.option("--max-memory", type=SIZE, help="Refuse to start if more is needed, such as 2GB."),
)


def _known_architecture(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:  # noqa: ARG001
    """Refuse a name that no architecture has, as the wrong use of an option."""
    from loratools.architectures.base import architecture as find
    from loratools.cli.doorway import Misuse

    if value is not None:
        try:
            find(value)
        except Unsupported as error:
            raise Misuse(str(error), hint=error.hint) from error
    return value


architecture = click.option(
    "--arch",
    metavar="NAME",
    callback=_known_architecture,
    help="The architecture, such as sdxl or flux1.  [default: what names and shapes say]",
)

block_weights = click.option(
    "--block-weights",
    multiple=True,
    metavar="SPEC",
    help="What blocks or modules are multiplied by besides: a preset such as OUTALL, a vector 1,0,0,..., or "
    "'REGEX=RATIO'; ';' between several. Once for all adapters, or once for each.",
)

weighting = _chain(
    click.option(
        "-w", "--weight", "weight", type=FINITE, multiple=True, metavar="NUMBER",
        help="What an adapter is multiplied by; once for each, in their order. "
        "-w -1 takes one out again.  [default: 1]",
    ),
    click.option(
        "--config", type=click.Path(dir_okay=False), metavar="FILE",
        help="The adapter_config.json of a bare weight file.",
    ),
    click.option("--alpha", type=FINITE, metavar="NUMBER", help="The lora_alpha of a bare weight file."),
    enabling,
    click.option(
        "--allow-unmatched", multiple=True, metavar="GLOB",
        help="Adapter keys that may go unused, such as 'lm_head*'. Can be repeated.",
    ),
    click.option(
        "--on-conflict", type=click.Choice(["error", "first", "last"]), default="error",
        help="Which adapter wins where two replace the same tensor.",
    ),
    block_weights,
    architecture,
    click.option(
        "--blockwise-experts", is_flag=True,
        help="The B of fused experts is packed expert by expert (unsloth before September 2026).",
    ),
    pickles,
)  # fmt: skip
