"""Start-up: ``--help`` and a header-only ``inspect`` of 1,000 tensors, as milliseconds beyond a bare interpreter.

python benchmarks/startup.py [--rounds 21]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data import Shape, write_adapter

ADAPTER = Shape(layers=72, hidden=64, inner=128, kv=16, vocabulary=64, shards=1)  # 72 * 7 * 2 = 1,008 tensors


def main() -> None:
    """Measure in turn, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder) / "adapter", ADAPTER)
        weights = str(Path(folder) / "adapter")
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "loratools --help": [sys.executable, "-m", "loratools", "--help"],
            "loratools inspect, 1,008 tensors": [sys.executable, "-m", "loratools", "inspect", weights],
            "the same with --json": [sys.executable, "-m", "loratools", "inspect", weights, "--json"],
        }
        seen: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                started = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seen[name].append(time.perf_counter() - started)
    bare = statistics.median(seen["python -c pass"])
    print("| command | ms: median | beyond a bare interpreter |\n|---|---|---|")
    for name, times in seen.items():
        median = statistics.median(times)
        print(f"| {name} | {median * 1e3:.0f} | {(median - bare) * 1e3:.0f} |")
    print(json.dumps({"rounds": rounds}), file=sys.stderr)


if __name__ == "__main__":
    main()
