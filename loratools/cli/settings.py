"""What a run of the program was told about itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(slots=True)
class Settings:
    """Filled in while the options are read, which is why it is the one thing here that is not frozen.

    Attributes:
        json: print one JSON document instead of text.
        quiet: results only.
        verbose: lists in full, and where settings came from.
        debug: tracebacks for expected errors too.
        defaults_from: the ``loratools.toml`` that was read.
        on_interrupt: what to do next if the user stops the program now.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    defaults_from: str | None = None
    on_interrupt: str | None = None
