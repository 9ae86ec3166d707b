"""The command line: text becomes objects at the edge, then one library call, then its report is shown."""

from __future__ import annotations

import os

__all__ = ["main"]


def main() -> None:
    """The ``loratools`` program."""
    # Workers share the cores, so BLAS threads are not wanted; numpy also loads faster when it starts none.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from loratools.cli.app import app

    app.main(prog_name="loratools")
