"""Which steps of a run are done, written as they are, so that an interrupted run can go on.

A line that identifies the run, then a line for every step whose bytes have been written and for every file that has
been synced. What is not synced yet survives the process but not the machine, so the former count only until the next
boot.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.planning import Plan

__all__ = ["JOURNAL", "Journal", "Progress", "read_journal"]

JOURNAL = ".loratools-journal"


@dataclass(frozen=True, slots=True)
class Progress:
    """What an earlier run has done: steps by their number, and files that are on the disk for good."""

    done: frozenset[int] = frozenset()
    synced: frozenset[int] = frozenset()


class Journal:
    """A journal open for writing.

    Args:
        path: where it lies.
        plan: of the run.
        goes_on: whether the lines of an earlier run stay.
    """

    def __init__(self, path: Path, plan: Plan, *, goes_on: bool) -> None:
        flags = os.O_CREAT | os.O_RDWR | os.O_APPEND
        flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._fd: int | None = os.open(path, flags, 0o666)
        if not goes_on:
            os.ftruncate(self._fd, 0)
            self._write(json.dumps({"plan": plan.digest(), "boot": _boot()}))

    def step(self, index: int) -> None:
        """A step's bytes are written."""
        self._write(f"step {index}")

    def file(self, number: int) -> None:
        """A file's bytes are on the disk."""
        self._write(f"file {number}")

    def _write(self, line: str) -> None:
        assert self._fd is not None
        os.write(self._fd, line.encode() + b"\n")

    def close(self) -> None:
        """Let go of the file; it stays where it is."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def read_journal(path: Path, plan: Plan) -> Progress:
    """What the journal of an earlier run of the same plan vouches for; nothing, if it is of another or damaged."""
    try:
        head, *lines = path.read_text().split("\n")[:-1]  # the last may be half a line
        started = json.loads(head)
    except (OSError, ValueError):
        return Progress()
    if not isinstance(started, dict) or started.get("plan") != plan.digest():
        return Progress()
    same_boot = bool(started.get("boot")) and started["boot"] == _boot()
    done: set[int] = set()
    synced: set[int] = set()
    for line in lines:
        word, _, number = line.partition(" ")
        if word == "step" and same_boot and number.isdigit():
            done.add(int(number))
        elif word == "file" and number.isdigit():
            done |= {i for i, step in enumerate(plan.steps) if step.file == int(number)}
            synced.add(int(number))
    return Progress(frozenset(i for i in done if i < len(plan.steps)), frozenset(synced))


def _boot() -> str:
    """Which boot of the machine this is; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
