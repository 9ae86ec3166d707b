"""What a user may type for an artefact. This build reads local paths; the others are told apart and refused by name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from loratools.errors import NotFound, Unsupported

__all__ = ["local_path"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?")


def local_path(ref: str | os.PathLike[str]) -> Path:
    """The path a reference means.

    Raises:
        Unsupported: a URL or a Hub reference.
        NotFound: neither a path nor anything else.
    """
    text = os.fspath(ref)
    path = Path(text)
    if path.exists():
        return path
    scheme = _SCHEME.match(text)
    if scheme:
        raise Unsupported(
            f"{text}: {scheme[1]}:// references are not in this build",
            hint="download it first, then give the path",
        )
    if _HUB_ID.fullmatch(text) and not text.endswith((".safetensors", ".bin", ".pt")):
        raise NotFound(
            f"{text}: no such file or folder",
            hint="if this is a Hub repository, download it first: hf download " + text.split("@")[0],
        )
    raise NotFound(f"{text}: no such file or folder")
