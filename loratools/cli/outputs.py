"""What the commands that write an adapter share: where it goes, in which type and format, and what a dry run says."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loratools.cli.doorway import Misuse
from loratools.cli.options import FLOATS, REF
from loratools.cli.text import fields, listed, one_line, say_json, size, warn
from loratools.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.shell_completion import CompletionItem

    from loratools.cli.settings import Settings

__all__ = ["resolve_out", "show_dry_run", "writing"]

F = TypeVar("F", bound="Callable[..., Any]")


class FormatName(click.ParamType[str]):
    """The name of a format that is written, or one of its other names."""

    name = "format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See :class:`click.ParamType`."""
        from loratools.formats.registry import find_format, writable

        try:
            found = find_format(str(value))
        except Unsupported:
            self.fail(f"{str(value)!r} is no format; {', '.join(writable())} are written.", param, ctx)
        if not found.writer:
            self.fail(f"{found.name} is read, not written; {', '.join(writable())} are.", param, ctx)
        return found.name

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """The formats that are written."""
        from click.shell_completion import CompletionItem

        from loratools.formats.registry import writable

        return [CompletionItem(name) for name in writable() if name.startswith(incomplete)]


def writing(command: F) -> F:
    """The options ``-o``, ``--dtype``, ``--to``, ``--force``, ``--dry-run`` and ``--no-sync`` of a command.

    The command gets ``output: str | None``, ``dtype: str | None``, ``to: str | None``, ``force: bool``,
    ``dry_run: bool`` and ``no_sync: bool``; it declares the argument ``out`` itself, and passes both to
    :func:`resolve_out`.
    """
    options = (
        click.option("-o", "--output", type=REF, help=_place_help(command)),
        click.option(
            "--dtype",
            type=FLOATS,
            metavar="TYPE",
            help=f"Type of the floats written, such as bf16.  [default: {_default_type(command)}]",
        ),
        click.option(
            "--to",
            type=FormatName(),
            metavar="FORMAT",
            help=f"Format to write, such as kohya, diffusers or peft.{_default_format(command)}",
        ),
        click.option("--force", is_flag=True, help="Replace OUT, if loratools made it."),
        click.option(
            "--dry-run", is_flag=True, help="Say what would be read and written, and touch nothing."
        ),
        click.option(
            "--no-sync", is_flag=True, help="Do not wait for the disk: faster, not safe against power cuts."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _place_help(command: Callable[..., Any]) -> str:
    """What ``-o`` is to a command that takes ``OUT`` as its last argument too, and to one that does not."""
    if "out" in inspect.signature(command).parameters:
        return "OUT, where it is not the last argument."
    return "OUT: a folder to make, or a file ending in .safetensors."


def _default_format(command: Callable[..., Any]) -> str:
    """What a command writes without ``--to``."""
    parameters = inspect.signature(command).parameters
    if "allow_loss" in parameters:
        return ""
    return (
        "  [default: peft]"
        if "tuned" in parameters
        else "  [default: that of the input, where it is written]"
    )


def _default_type(command: Callable[..., Any]) -> str:
    """What a command writes without ``--dtype``: of checkpoints the factors are computed, not read."""
    if "tuned" in inspect.signature(command).parameters:
        return "float32; what goes along whole keeps its own"
    if "allow_loss" in inspect.signature(command).parameters:
        return "each tensor's own"
    return "the widest that is read"


def resolve_out(out: str | None, output: str | None, usage: str, *, last: bool = True) -> str:
    """Where the result goes: the last argument, or what ``-o`` says.

    Args:
        out: the argument, where the command has one.
        output: the option.
        usage: how the command is typed, for the hint: ``loratools reduce REF OUT``.
        last: whether the command takes it as its last argument.

    Raises:
        Misuse: neither is given, or both.
    """
    if out is not None and output is not None:
        raise Misuse(f"the result has two places, {out} and {output}", hint=f"{usage}, or -o OUT")
    place = out if out is not None else output
    if place is None:
        raise Misuse("nothing says where the result goes", hint=f"{usage}, or -o OUT" if last else usage)
    return place


def show_dry_run(plan: dict[str, Any], settings: Settings) -> None:
    """Print what :func:`loratools.verbs.saving.describe_save` returned, or a document with more in it."""
    warn(plan.get("warnings", ()), settings)
    if settings.json:
        say_json(plan)
        return
    files = [f"{file['name']} ({size(file['bytes'])})" for file in plan["files"]]
    click.echo(f"Would write {one_line(plan['output'])}; nothing has been touched")
    fields(
        [
            ("reads", ", ".join(plan["reads"])),
            ("files", listed(files, settings)),
            ("bytes", f"{size(plan['bytes_read'])} to read, {size(plan['bytes_written'])} to write"),
            ("memory", f"{size(plan['peak_memory'])} at most"),
        ]
    )
