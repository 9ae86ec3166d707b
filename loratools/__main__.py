"""``python -m loratools``."""

from __future__ import annotations

from loratools.cli import main

if __name__ == "__main__":
    main()
