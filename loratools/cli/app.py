"""The program: its commands by name, each imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from loratools import __version__
from loratools.cli.doorway import doorway
from loratools.cli.settings import Settings
from loratools.cli.text import plain_output

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMANDS", "App", "app"]

# Name -> the module that holds it as ``command``, and what --help says of it. --help needs nothing else,
# so it loads no command; the order is that of a user's first day.
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("loratools.cli.inspect", "Say what an adapter is, from its headers alone."),
    "validate": ("loratools.cli.validate", "Check an adapter and list every fault found."),
    "merge": ("loratools.cli.merge", "Merge adapters into a base model, streamed from disk to disk."),
    "verify": ("loratools.cli.verify", "Replay a merge and compare a checkpoint with it, tensor by tensor."),
    "diff": ("loratools.cli.diff", "Compare what two adapters do, however they are factored."),
    "combine": ("loratools.cli.combine", "Combine adapters in one: the exact weighted sum, or a method."),
    "reduce": ("loratools.cli.reduce", "Lower an adapter's ranks, with the exact error of it."),
    "extract": ("loratools.cli.extract", "Make an adapter of the difference between two checkpoints."),
    "normalize": ("loratools.cli.normalize", "Write a plain adapter that every loader reads the same way."),
    "convert": ("loratools.cli.convert", "Write an adapter in another format, and compare the two."),
    "metadata": ("loratools.cli.metadata", "Show or edit the metadata in a file's header."),
    "methods": ("loratools.cli.methods", "List the methods of combine, their papers and parameters."),
    "engines": ("loratools.cli.engines", "List the programs that load adapters, and what each accepts."),
    "formats": ("loratools.cli.formats", "List the formats and number types this build knows."),
    "completion": ("loratools.cli.completion", "Print the completion script of a shell."),
    "demo": ("loratools.cli.demo", "Show the main job on a small model made on the spot, offline."),
}


class App(click.Group):
    """A group whose commands are a table until one is called, and whose errors leave by one doorway."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """The names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module, summary = COMMANDS[cmd_name]
        command: click.Command = importlib.import_module(module).command
        command.short_help = summary
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list in --help, from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command and, unless its help is wanted, the defaults that ``loratools.toml`` gives it."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.exceptions.NoSuchCommand(name, possibilities=COMMANDS, ctx=ctx)
        found, command, rest = super().resolve_command(ctx, args)
        wants_help = any(arg in {"-h", "--help"} for arg in rest)
        if found is not None and command is not None and not wants_help and not ctx.resilient_parsing:
            from loratools.cli.defaults import read_defaults

            settings = ctx.ensure_object(Settings)
            settings.defaults_from, values = read_defaults(found, command, tuple(COMMANDS))
            ctx.default_map = {found: values}
        return found, command, rest

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """See click; a context without colour where colour is unwelcome, which click does not look for."""
        if plain_output():
            extra.setdefault("color", False)
        return super().make_context(info_name, args, parent, **extra)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = False,  # noqa: ARG002 - a glob is for --allow-unmatched, not for the shell
        **extra: Any,
    ) -> Any:
        """Run, and leave with an exit code.

        Returns:
            The exit code, where ``standalone_mode`` is off.
        """
        name = prog_name or "loratools"
        arguments = list(sys.argv[1:] if args is None else args)
        settings = extra.setdefault("obj", Settings())
        _require_streams()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(
                stream, "reconfigure"
            ):  # a name the terminal cannot spell is shown, not a reason to stop
                stream.reconfigure(errors="backslashreplace")
        self._main_shell_completion(extra, name, complete_var)

        def action() -> int:
            with self.make_context(name, arguments, **extra) as ctx:
                result = self.invoke(ctx)
            sys.stdout.flush()
            return result if isinstance(result, int) else 0

        code = doorway(action, settings)
        if standalone_mode:
            sys.exit(code)
        return code


def _require_streams() -> None:
    """Where a standard stream was closed, print to nowhere, and keep its number from becoming some file's."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115


@click.group(
    cls=App,
    name="loratools",
    context_settings={
        "auto_envvar_prefix": "LORATOOLS",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
    epilog="Every option can be set as LORATOOLS_<COMMAND>_<OPTION>, or in a loratools.toml in the current "
    "folder (a table for each command; LORATOOLS_CONFIG names another file). "
    "Exit codes: 0 done, 1 findings, 2 usage, 3 cannot read or compute, 70 a bug, 130 interrupted.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def app() -> None:
    """Inspect, validate, merge and verify LoRA adapters: exact, streamed, without loading the model."""
