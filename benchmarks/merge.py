"""Merge against ``cp -r`` and PEFT: whole processes, interleaved, medians; prints a table.

    python benchmarks/merge.py [--rounds 5] [--data DIR] [--no-peft] [--smoke]

Modes: *warm*, inputs in the page cache, nothing synced; *durable*, the same with a sync inside the time of both;
*cold*, inputs evicted from the page cache before each run (needs no privilege: ``posix_fadvise``). Before every run the
output is removed and the disk is quiet.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from data import Shape, write_adapter, write_base

PEFT_SCRIPT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="500MB")
"""
SMALL = Shape(layers=2, hidden=128, inner=256, kv=32, vocabulary=512, shards=2)


@dataclass
class Tool:
    """A command under test, and what was seen of it."""

    name: str
    command: list[str]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: int = 0


def main() -> None:
    """Parse, make the data, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--layers", type=int, default=22, help="88 makes the base four times as large")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, one round: does the benchmark itself work?"
    )
    options = parser.parse_args()
    for name in (
        "OPENBLAS_CORETYPE",
        "OPENBLAS_L2_SIZE",
        "PYTHONDONTWRITEBYTECODE",
    ):  # they slow the start, where set
        os.environ.pop(name, None)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), SMALL, rounds=1, peft=False)
    else:
        measure(options.data, Shape(layers=options.layers), options.rounds, peft=not options.no_peft)


def measure(data: Path, shape: Shape, rounds: int, *, peft: bool) -> None:
    """Run every tool in turn, in every mode, and print the table."""
    base, adapter, out = data / f"base-{shape.layers}", data / f"adapter-{shape.layers}", data / "out"
    write_base(base, shape)
    write_adapter(adapter, shape)
    ours = [sys.executable, "-m", "loratools", "merge", str(base), str(adapter), str(out), "--quiet"]
    tools = [
        Tool("cp -r", ["cp", "-r", str(base), str(out)]),
        Tool("loratools merge", [*ours, "--no-sync"]),
        Tool("loratools merge (sync)", ours),
    ]
    if peft:
        command = [sys.executable, "-c", PEFT_SCRIPT, str(base), str(adapter), str(out)]
        tools.append(Tool("PEFT merge_and_unload", command))
    modes = {"warm": tools[:2] + tools[3:], "durable": [tools[0], tools[2]], "cold": tools[:2]}
    for mode, chosen in modes.items():
        for _ in range(rounds):
            for tool in chosen:
                tool.seconds.setdefault(mode, []).append(one_run(tool, base, out, mode))
    print_table(tools, modes)


def one_run(tool: Tool, base: Path, out: Path, mode: str) -> float:
    """Seconds of one run, of the whole process."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for file in base.iterdir():
        if mode == "cold":
            evict(file)
        else:
            file.read_bytes()
    started = time.perf_counter()
    process = subprocess.Popen(tool.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, errors = process.communicate()
    if mode == "durable":
        os.sync()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{tool.name} failed: {errors.decode()[-500:]}")
    tool.peak = max(tool.peak, peak_of(tool.command, out) if not tool.peak else 0)
    return seconds


def peak_of(command: list[str], out: Path) -> int:
    """Peak resident bytes of a command, from a process that runs nothing else."""
    shutil.rmtree(out, ignore_errors=True)
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, capture_output=True, text=True
    )
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def evict(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def print_table(tools: list[Tool], modes: dict[str, list[Tool]]) -> None:
    """Medians, ranges, and ratios to ``cp -r`` taken round by round."""
    print("| mode | tool | seconds: median [min-max] | ratio to cp -r: median | peak MB |")
    print("|---|---|---|---|---|")
    for mode, chosen in modes.items():
        copy = tools[0].seconds[mode]
        for tool in chosen:
            times = tool.seconds[mode]
            ratio = statistics.median(mine / theirs for mine, theirs in zip(times, copy, strict=True))
            spread = f"{statistics.median(times):.2f} [{min(times):.2f}-{max(times):.2f}]"
            print(f"| {mode} | {tool.name} | {spread} | {ratio:.2f} | {tool.peak / 1e6:.0f} |")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
