"""``loratools completion``."""

from __future__ import annotations

import click

from loratools.cli.options import traced
from loratools.errors import Unsupported

__all__ = ["command"]

_SHELLS = ("bash", "zsh", "fish", "powershell")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@traced
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Examples:
      eval "$(loratools completion bash)"                     # in ~/.bashrc
      eval "$(loratools completion zsh)"                      # in ~/.zshrc
      loratools completion fish | source                      # in ~/.config/fish/config.fish
      loratools completion powershell | Out-String | Invoke-Expression
    """  # noqa: D301 - \b is click's
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise Unsupported(f"the installed click cannot complete in {shell}", hint="pip install -U click")
    click.echo(found(ctx.find_root().command, {}, "loratools", "_LORATOOLS_COMPLETE").source())
