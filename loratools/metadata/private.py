"""What in metadata tells about somebody's machine and data: a table of keys, one of fields, and paths anywhere.

What tools need to use an adapter (:data:`NEEDED`) is never removed; a path in it is shortened like any other.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FIELDS", "KEYS", "NEEDED", "Stripped", "shorten_paths", "strip_private"]

# Keys whose values are nothing but private -> why.
KEYS = {
    "ss_dataset_dirs": "names of the training folders",
    "ss_reg_dataset_dirs": "names of the regularisation folders",
    "ss_tag_frequency": "the captions of the training data",
    "ss_bucket_info": "the sizes of the training images",
    "ss_training_comment": "a comment of the author's",
    "ss_session_id": "identifies a training run",
    "*sample_prompt*": "prompts of the author's",
    "prompt": "a ComfyUI graph, with its prompts and files",
    "workflow": "a ComfyUI graph, with its prompts and files",
    "ot_config": "OneTrainer's whole configuration: folders, concepts and prompts",
}

# Fields of JSON values, at any depth, and keys of these names -> why.
FIELDS = {
    "image_dir": "a training folder",
    "video_directory": "a training folder",
    "image_directory": "a training folder",
    "control_directory": "a training folder",
    "cache_directory": "a training folder",
    "image_jsonl_file": "a file of captions",
    "video_jsonl_file": "a file of captions",
    "metadata_file": "a file of captions",
    "tag_frequency": "the captions of the training data",
    "dataset_dirs": "names of the training folders",
    "reg_dataset_dirs": "names of the regularisation folders",
    "bucket_info": "the sizes of the training images",
    "sample_prompts": "prompts of the author's",
    "prompts": "prompts of the author's",
    "wandb_api_key": "a secret",
    "api_key": "a secret",
    "hf_token": "a secret",
    "huggingface_token": "a secret",
}

# https://github.com/kohya-ss/sd-scripts: build_minimum_network_metadata
NEEDED = frozenset(
    {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }
)

# Part of a path: spaces and apostrophes are inside it only, and what ends one in a sentence is not.
_PART = r"[^/\\\n\r\t\"`,;:<>|*?\[\]{}=]*[^/\\\s\"'`,;:<>|*?\[\]{}=~]"
_SEP = r"[/\\]+"
_ROOT = r"""
    (?:file:/{1,3}(?:[A-Za-z]:/)?)                    # a file URL
  | (?:(?:\\\\[?.]\\)?(?<![A-Za-z0-9])[A-Za-z]:[/\\]+)   # a drive; there is a prefix for long paths
  | (?:(?<![\\\w])\\\\[\w.$-]+\\+(?=[\w$]))           # a server and its share
  | (?:(?<![\w~])~[\w.-]*[/\\]+)                      # a home
  | (?:(?<![\w./\\:~@%)\]}>+-])/(?=PART/+[^/\s]))     # /one/two; a single name after a slash says nothing
""".replace("PART", _PART)
_FOLDERS = re.compile(rf"(?:{_ROOT})(?:{_PART}{_SEP})*(?=[^/\\\s])", re.VERBOSE)
_ABSOLUTE = re.compile(rf"\s*(?:{_ROOT})", re.VERBOSE)
# A home whose last part is somebody's name.
_DRIVE = r"(?:\\\\[?.]\\)?(?<![A-Za-z0-9])[A-Za-z]:"
_MOUNT = r"(?<![\w./\\:~@%)\]}>+-])(?:/(?:mnt/)?[a-z](?=/))?"  # of a drive, in WSL and Git Bash; or none
_HOMES = rf"(?:file:/{{0,2}}(?:/[A-Za-z]:)?|{_DRIVE}|{_MOUNT})[/\\]+(?:home|Users)[/\\]+"
_HOME = re.compile(rf"{_HOMES}(?:{_PART}(?=[/\\])|[^/\\\s\"'`,;:<>|*?\[\]{{}}=]+)")
_HOME_ALONE = re.compile(rf"\s*{_HOMES}{_PART}[/\\]*\s*")
# A picture, in letters that look like paths.
_EMBEDDED = re.compile(r"(data:[\w/+.-]*;base64,[A-Za-z0-9+/=_-]*)")
_REASON = "a path of the author's machine"


@dataclass(frozen=True, slots=True)
class Stripped:
    """What was done to one key.

    Attributes:
        key: of the metadata.
        after: its value now; None where it was removed.
        reason: why, with the fields inside the value where only these were touched.
    """

    key: str
    after: str | None
    reason: str


def strip_private(metadata: Mapping[str, str]) -> tuple[dict[str, str], tuple[Stripped, ...]]:
    """Metadata without what tells about the author's machine and data.

    >>> strip_private({"ss_sd_model_name": "/home/me/models/base.safetensors", "ss_v2": "False"})[0]
    {'ss_sd_model_name': 'base.safetensors', 'ss_v2': 'False'}

    Returns:
        What stays, in its order; and what was done, key by key.
    """
    kept: dict[str, str] = {}
    done: list[Stripped] = []
    for key, value in metadata.items():
        reason = None if key in NEEDED else _whole(key)
        if reason is not None:
            done.append(Stripped(key, None, reason))
            continue
        new, reasons = _clean(value)
        if shorten_paths(key) != key:
            done.append(Stripped(key, None, f"{_REASON}, in its name"))
            continue
        if reasons:
            done.append(Stripped(key, new, "; ".join(dict.fromkeys(reasons))))
        kept[key] = new
    return kept, tuple(done)


def _whole(key: str) -> str | None:
    return next((reason for pattern, reason in (KEYS | FIELDS).items() if fnmatchcase(key, pattern)), None)


def _clean(value: str) -> tuple[str, list[str]]:
    """A value without its private parts, and why; the same text where there are none."""
    nested = nested_json(value)
    if nested is None:
        short = shorten_paths(value)
        return short, [_REASON] if short != value else []
    reasons: list[str] = []
    try:
        clean = _walk(nested, reasons)
    except RecursionError:  # the parser goes deeper than a walk can; what it says there is no use to anybody
        return "", ["JSON nested beyond reading"]
    if not reasons:
        return value, []
    return json.dumps(clean, ensure_ascii=value.isascii()), reasons


def nested_json(value: str) -> Any:
    """The object or list that a value is the JSON of; None if it is something else."""
    if value[:1] not in {"{", "["}:
        return None
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, (dict, list)) else None


def _walk(value: Any, reasons: list[str]) -> Any:
    if isinstance(value, str):
        short = shorten_paths(value)
        if short != value:
            reasons.append(_REASON)
        return short
    if isinstance(value, list):
        return [_walk(one, reasons) for one in value]
    if not isinstance(value, dict):
        return value
    clean: dict[str, Any] = {}
    for key, inner in value.items():
        if key in FIELDS:
            reasons.append(f"{key}: {FIELDS[key]}")
            continue
        name = _walk(key, reasons)
        while name in clean:  # two folders of one name
            name += "_"
        clean[name] = _walk(inner, reasons)
    return clean


def shorten_paths(text: str) -> str:
    r"""A text in which only the last component of every absolute path is left.

    >>> shorten_paths("/home/me/my loras/x.safetensors"), shorten_paths(r"C:\Users\me\x.ckpt")
    ('x.safetensors', 'x.ckpt')
    >>> shorten_paths("/home/me")
    '~'
    >>> shorten_paths("https://huggingface.co/owner/name, 1/2, and/or")
    'https://huggingface.co/owner/name, 1/2, and/or'
    """
    pieces = _EMBEDDED.split(text) if "base64," in text else [text]
    return "".join(piece if number % 2 else _shortened(piece) for number, piece in enumerate(pieces))


def _shortened(text: str) -> str:
    if _HOME_ALONE.fullmatch(text):
        return "~"
    short = _FOLDERS.sub("", _HOME.sub("~", text))
    if short != text and "\n" not in text and re.search(r"[/\\]", short) and _ABSOLUTE.match(text):
        return re.split(_SEP, short.rstrip("/\\"))[
            -1
        ]  # one path, with characters that end others in a sentence
    return short
