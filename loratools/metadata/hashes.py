"""The hashes of itself that a file states in its metadata, and what they should be.

``sshs_model_hash`` is the SHA-256 of the bytes after the header (A1111 calls its beginning AutoV3; model sites look
files up by it). ``sshs_legacy_hash`` is eight digits of the SHA-256 of 64 KiB at offset 1 MiB of the file as it would
be with no other metadata than ``ss_*``; where the file ends before that, it is the hash of nothing.
``modelspec.hash_sha256`` is the first with ``0x`` before it. The data are taken in the order the file has them.
https://github.com/kohya-ss/sd-scripts (``precalculate_safetensors_hashes``), https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from loratools.tensors.header import Header
    from loratools.tensors.safetensors import SafetensorsFile

__all__ = [
    "HASHES",
    "HashCheck",
    "check_hashes",
    "data_sha256",
    "file_hashes",
    "legacy_hash",
    "recompute_hashes",
]

MODEL, LEGACY, MODELSPEC = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"
HASHES = (MODEL, LEGACY, MODELSPEC)
_BUFFER = 1 << 20  # bytes
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000


@dataclass(frozen=True, slots=True)
class HashCheck:
    """A hash that a file states, and what it is.

    Attributes:
        key: of the metadata.
        stated: there.
        computed: from the bytes.
        fits: whether they agree, letter case aside.
    """

    key: str
    stated: str
    computed: str
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {"key": self.key, "stated": self.stated, "computed": self.computed, "fits": self.fits}


def data_sha256(file: SafetensorsFile) -> str:
    """The SHA-256 of a file's bytes after the header, read once in pieces of a megabyte."""
    digest, place, size = hashlib.sha256(), file.header.data_start, file.header.size
    buffer = memoryview(bytearray(_BUFFER))
    try:
        while place < size:
            part = buffer[: min(_BUFFER, size - place)]
            file.file.read_into(part, place)
            digest.update(part)
            place += len(part)
    finally:
        file.file.close()
    return digest.hexdigest()


def legacy_hash(file: SafetensorsFile, metadata: Mapping[str, str] | None = None, *, pad: bool = True) -> str:
    """The ``sshs_legacy_hash`` of a file.

    Args:
        file: whose data.
        metadata: which it has or shall have; by default its own.
        pad: whether the header is padded to eight bytes, as safetensors does since its version 0.3.
    """
    metadata = file.metadata if metadata is None else metadata
    head = _training_header(file.header, metadata, pad=pad)
    header, size = file.header, len(head) + file.header.size - file.header.data_start
    start, stop = min(_LEGACY_START, size), min(_LEGACY_START + _LEGACY_BYTES, size)
    digest = hashlib.sha256(head[start:stop])
    begin = max(start, len(head))
    if begin < stop:
        digest.update(file.file.read(stop - begin, header.data_start + begin - len(head)))
        file.file.close()
    return digest.hexdigest()[:8]


def _training_header(header: Header, metadata: Mapping[str, str], *, pad: bool) -> bytes:
    """The first bytes the safetensors library would write with only the metadata that training wrote.

    The library's order of metadata is not fixed, and only the length counts.
    """
    entries: dict[str, Any] = {
        "__metadata__": {key: value for key, value in metadata.items() if key.startswith("ss_")}
    }
    for name, spec in header.specs.items():
        begin = header.offsets[name] - header.data_start
        entries[name] = {
            "dtype": spec.dtype.name, "shape": list(spec.shape), "data_offsets": [begin, begin + spec.nbytes]
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    return len(text).to_bytes(8, "little") + text


def file_hashes(
    file: SafetensorsFile, metadata: Mapping[str, str] | None = None, keys: Collection[str] = HASHES
) -> dict[str, str]:
    """What the hashes of a file are.

    Args:
        file: whose data.
        metadata: which it has or shall have; by default its own. Only the legacy hash depends on them.
        keys: which hashes; the data are read only where one needs them.
    """
    data = data_sha256(file) if {MODEL, MODELSPEC} & {*keys} else ""
    found = {MODEL: data, MODELSPEC: "0x" + data}
    if LEGACY in keys:
        found[LEGACY] = legacy_hash(file, metadata)
    return {key: found[key] for key in HASHES if key in keys}


def recompute_hashes(file: SafetensorsFile, metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata for a file, with the hashes it states made true; one that it does not state is not added.

    All hashes have a fixed length, so a file can be written with old ones and corrected in place.
    """
    return {**metadata, **file_hashes(file, metadata, [key for key in HASHES if key in metadata])}


def check_hashes(file: SafetensorsFile, metadata: Mapping[str, str] | None = None) -> tuple[HashCheck, ...]:
    """Compare the hashes that a file states with its bytes.

    A legacy hash from before safetensors padded its headers is true as well.
    """
    metadata = file.metadata if metadata is None else metadata
    true = file_hashes(file, metadata, [key for key in HASHES if key in metadata])
    checks = []
    for key, computed in true.items():
        stated = metadata[key]
        fits = stated.lower() == computed
        if key == LEGACY and not fits:
            fits = stated.lower() == legacy_hash(file, metadata, pad=False)
        checks.append(HashCheck(key, stated, computed, fits))
    return tuple(checks)
