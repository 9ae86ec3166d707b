"""The record every output carries of what made it: names and hashes of headers, no absolute path and no time."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from loratools.errors import LoratoolsError
from loratools.tensors.files import read_whole
from loratools.tensors.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from pathlib import Path

    from loratools.tensors.base import TensorSource

__all__ = ["METADATA_KEY", "RECORD_NAME", "identify", "made_by_loratools", "record"]

RECORD_NAME = "loratools.json"
METADATA_KEY = "loratools"
MAX_RECORD = 16_000_000  # bytes
_SNAPSHOT = re.compile(
    r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})"
)


def record(
    verb: str, version: str, parameters: dict[str, Any], inputs: list[dict[str, Any]]
) -> dict[str, Any]:
    """What made an output."""
    return {"loratools": version, "verb": verb, "parameters": parameters, "inputs": inputs}


def identify(role: str, path: Path | None, source: TensorSource) -> dict[str, Any]:
    """An input by its name (or Hub id and commit, in a Hub cache), its size and the hash of its headers."""
    entry: dict[str, Any] = {"role": role, "name": "in memory" if path is None else path.resolve().name}
    if path is not None:
        entry["name"] = path.name or path.resolve().name
        snapshot = _SNAPSHOT.search(str(path.absolute()))
        if snapshot:
            entry["name"] = f"{snapshot['owner']}/{snapshot['name']}"
            entry["revision"] = snapshot["commit"]
    shards = _shards(source)
    if shards:
        entry["bytes"] = sum(shard.header.size for shard in shards)
        entry["header_sha256"] = _header_hash(shards)
    return entry


def _shards(source: TensorSource) -> list[SafetensorsFile]:
    if isinstance(source, SafetensorsFile):
        return [source]
    return list(getattr(source, "shards", {}).values())


def _header_hash(shards: list[SafetensorsFile]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(shard.file.read(shard.header.data_start, 0))
        shard.file.close()
    return digest.hexdigest()


def made_by_loratools(path: Path) -> bool:
    """Whether an existing output says that this program wrote it."""
    try:
        if path.is_dir():
            found = json.loads(read_whole(path / RECORD_NAME, MAX_RECORD))
            return isinstance(found, dict) and "loratools" in found
        if path.suffix == ".gguf":
            from loratools.tensors.gguf import GgufFile

            return METADATA_KEY in GgufFile(path).metadata
        return METADATA_KEY in SafetensorsFile(path).metadata
    except (LoratoolsError, OSError, ValueError, RecursionError):
        return False
