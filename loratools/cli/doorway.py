"""The one way out for errors: a line that says what is wrong, one that says what to do, and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from loratools.cli.text import one_line, plain_output
from loratools.errors import LoratoolsError, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratools.cli.settings import Settings

__all__ = ["BUG", "CANNOT", "CLOSED_PIPE", "INTERRUPTED", "USAGE", "Misuse", "doorway"]

USAGE = 2
CANNOT = 3
BUG = 70
INTERRUPTED = 130
CLOSED_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


class Misuse(click.UsageError):
    """A command line that cannot be meant, with what to type instead."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def doorway(action: Callable[[], int], settings: Settings) -> int:
    """Run ``action``; turn what it raises into lines on stderr and an exit code."""
    try:
        return action()
    except click.exceptions.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        return CLOSED_PIPE
    except (KeyboardInterrupt, Exception) as error:
        return _explain(error, settings)
    finally:
        _settle(sys.stdout)
        _settle(sys.stderr)


def _explain(error: BaseException, settings: Settings) -> int:
    """Say what happened. The order matters: most of what loratools raises is also a builtin."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        _say(error.format_message())
        return USAGE
    if isinstance(error, click.ClickException):
        _complain(error.format_message(), _usage_hint(error))
        return USAGE if isinstance(error, click.UsageError) else CANNOT
    if isinstance(error, (KeyboardInterrupt, EOFError, click.Abort)):
        _say()
        _complain("interrupted", settings.on_interrupt)
        return INTERRUPTED
    if isinstance(error, (LoratoolsError, OSError, MemoryError)):
        if settings.debug:
            _write_traceback()
        _complain(*_sentences(error))
        return CANNOT
    return _bug(error)


def _sentences(error: LoratoolsError | OSError | MemoryError) -> tuple[str, str | None]:
    """What an expected error says, and its hint."""
    if isinstance(error, LoratoolsError):
        return str(error), error.hint
    if isinstance(error, OSError):
        if error.filename is None and _in_printing(error):
            return (
                f"the result could not be printed: {_system(error)}",
                "the work itself did not fail; files that were written are whole",
            )
        return _system(error), None
    return "out of memory", "fewer --jobs need less; merge --dry-run says how much"


def _usage_hint(error: click.ClickException) -> str | None:
    if isinstance(error, Misuse) and error.hint is not None:
        return error.hint
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return None
    if isinstance(error, click.BadParameter) and isinstance(error.param, click.Option):
        variable = f"{context.auto_envvar_prefix}_{str(error.param.name).upper()}"
        if context.get_parameter_source(str(error.param.name)) is ParameterSource.ENVIRONMENT:
            return f"it comes from the environment: {variable}"
    return f"{context.command_path} --help lists what can be given"


def _bug(error: BaseException) -> int:
    from loratools import __version__

    _write_traceback()
    _complain(
        f"this is a bug in loratools {__version__} ({type(error).__name__})",
        "please report it, with the command and the traceback above",
    )
    return BUG


def _system(error: OSError) -> str:
    """What the operating system refused, and where.

    >>> _system(PermissionError(13, "Permission denied", "out/model.safetensors"))
    'out/model.safetensors: Permission denied'
    """
    names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes))]
    reason = error.strerror or str(error) or type(error).__name__
    return f"{' -> '.join(names)}: {reason}" if names else reason


def _in_printing(error: OSError) -> bool:
    """Whether it was raised by writing to a standard stream rather than by the work."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in {"click", "rich"} or module == "loratools.cli.app"


def _write_traceback() -> None:
    import traceback

    _say(printable(traceback.format_exc().rstrip("\n")))


def _complain(message: str, hint: str | None) -> None:
    _say(f"{_bold('Error:', 'red')} {one_line(message)}")
    if hint:
        _say(f"{_bold('Hint:', 'cyan')} {one_line(hint)}")


def _bold(text: str, colour: str) -> str:
    return text if plain_output() else click.style(text, fg=colour, bold=True)


def _say(text: str = "") -> None:
    with contextlib.suppress(OSError):  # nobody is listening
        click.echo(text, err=True)


def _settle(stream: object) -> None:
    """Flush for the last time. What cannot be written must not be tried again at the interpreter's end."""
    try:
        stream.flush()  # type: ignore[attr-defined]
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # type: ignore[attr-defined]
            os.close(nowhere)
