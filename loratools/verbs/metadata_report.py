"""What :func:`loratools.edit_metadata` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.metadata.hashes import HashCheck

__all__ = ["MetadataChange", "MetadataReport"]


@dataclass(frozen=True, slots=True)
class MetadataChange:
    """One key that is different.

    Attributes:
        key: of the metadata.
        action: ``set``, ``unset``, ``strip`` or ``rehash``.
        before: its value, or None where it was not there.
        after: its value, or None where it is no longer there.
        reason: why, where it was not asked for by name.
    """

    key: str
    action: str
    before: str | None
    after: str | None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {
            "key": self.key, "action": self.action, "before": self.before, "after": self.after,
            "reason": self.reason or None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class MetadataReport:
    """The metadata of a file, and what was changed in them.

    Attributes:
        path: as it was given.
        file: the file the metadata are in.
        output: what was written: the file itself, or the copy; None where nothing was.
        metadata: as they are now, in the file's order.
        changes: in the order they were made.
        hashes: those the file states that were compared: all without a change, else what depends on metadata.
        written: ``nothing``, ``sector`` (one sector of the file, in place) or ``copy`` (a new header, and the data
            copied by the kernel).
        header_before: bytes, the eight before it included.
        header_after: the same.
        bytes_written: into the file or the copy; of a copy the data count, also where the file system shared them.
        files: what the output consists of, by name and bytes, where a copy is made.
        dry_run: nothing was written, this is what would be.
        warnings: what to look at.
    """

    path: str
    file: str
    output: str | None
    metadata: Mapping[str, str]
    changes: tuple[MetadataChange, ...] = ()
    hashes: tuple[HashCheck, ...] = ()
    written: str = "nothing"
    header_before: int = 0
    header_after: int = 0
    bytes_written: int = 0
    files: Mapping[str, int] | None = None
    dry_run: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything is different."""
        return bool(self.changes)

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {
            "schema": "loratools.metadata/1",
            "path": self.path,
            "file": self.file,
            "output": self.output,
            "dry_run": self.dry_run,
            "changed": self.changed,
            "written": self.written,
            "bytes_written": self.bytes_written,
            "header_bytes": {"before": self.header_before, "after": self.header_after},
            "files": [{"name": name, "bytes": count} for name, count in (self.files or {}).items()],
            "changes": [change.to_dict() for change in self.changes],
            "hashes": [check.to_dict() for check in self.hashes],
            "metadata": dict(self.metadata),
            "warnings": list(self.warnings),
        }
