"""A header's text with other metadata in it: everything else keeps every character, and where it can, its place.

Rewriting the whole JSON would lose what a parser forgets (the order of entries, fields nobody knows). So the object
under ``__metadata__`` is found in the text and only that is exchanged. The text is one that
:func:`~loratools.tensors.header.parse_header` has accepted: an object in which no key stands twice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["BLOCK", "Entry", "fitted", "header_length", "metadata_span", "packed"]

_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"
ALIGNMENT = 8  # bytes
BLOCK = 4096  # bytes; data that move by whole blocks can be shared between files where the file system can do that
SHARED = 1 << 20  # bytes of data from which that is worth up to a block of spaces


@dataclass(frozen=True, slots=True)
class Entry:
    """A key and its value in an object's text, by their places in characters."""

    key: str
    start: int  # of the key's opening quote
    value: int  # where the value begins
    stop: int  # one past the value's end


def fitted(text: str, metadata: Mapping[str, str]) -> Iterator[str]:
    """The header with other metadata in exactly as many bytes: the ways that change least come first.

    >>> for way in fitted('{"__metadata__":{"a":"1","b":"2"},"w":3}', {"b": "2"}):
    ...     print(f"<{way}>")
    <{"__metadata__":{        "b":"2"},"w":3}>
    <{"__metadata__":{"b":"2"        },"w":3}>
    <{"__metadata__":{"b":"2"},"w":3}        >

    Args:
        text: the JSON, with the spaces after it.
        metadata: what it shall say.

    Yields:
        Texts of the same length in bytes; none where there is not enough room.
    """
    entry = metadata_span(text)
    if entry is not None and metadata:
        old = text[entry.value : entry.stop]
        for new in (_in_places(old, metadata), _packed_within(old, metadata)):
            if new is not None:
                yield text[: entry.value] + new + text[entry.stop :]
    short = packed(text, metadata)
    spare = len(text.encode()) - len(short.encode())
    if spare >= 0:
        yield short + " " * spare


def packed(text: str, metadata: Mapping[str, str]) -> str:
    """The header with other metadata, and no more room than it needs.

    >>> packed('{"w":3}   ', {"a": "1"})
    '{"__metadata__":{"a":"1"},"w":3}'
    >>> packed('{"__metadata__":{"a":"1"},"w":3}', {})
    '{"w":3}'
    """
    text = text.rstrip(_SPACE)
    entry = metadata_span(text)
    if entry is not None:
        if metadata:
            return text[: entry.value] + _json(metadata) + text[entry.stop :]
        return _without(text, entry)
    if not metadata:
        return text
    alone = next(_entries(text), None) is None
    return "{" + f'"__metadata__":{_json(metadata)}' + ("}" if alone else "," + text[1:].lstrip(_SPACE))


def metadata_span(text: str) -> Entry | None:
    """Where a header's metadata stand; None if it has none."""
    return next((entry for entry in _entries(text) if entry.key == "__metadata__"), None)


def _entries(text: str) -> Iterator[Entry]:
    """The entries of an object that is known to be one."""
    place = _skip(text, 1)
    while text[place] != "}":
        start = place
        key, place = _DECODER.raw_decode(text, start)
        value = _skip(text, _skip(text, place) + 1)  # past the colon
        _, place = _DECODER.raw_decode(text, value)
        yield Entry(key, start, value, place)
        place = _skip(text, place)
        if text[place] == ",":
            place = _skip(text, place + 1)


def _skip(text: str, place: int) -> int:
    while text[place] in _SPACE:
        place += 1
    return place


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _bytes(text: str) -> int:
    return len(text.encode())


def _without(text: str, entry: Entry) -> str:
    """An object's text with one entry less, and one comma less if others stay."""
    after = _skip(text, entry.stop)
    if text[after] == ",":
        return text[: entry.start] + text[_skip(text, after + 1) :]
    before = text[: entry.start].rstrip(_SPACE)
    return before.removesuffix(",") + text[entry.stop :]


def _in_places(old: str, metadata: Mapping[str, str]) -> str | None:
    """An object's text in which every entry that stays stands where it stood; None if something has no room there.

    An entry that goes leaves spaces; one that becomes shorter is followed by some; new ones go to the end, if there
    are spaces enough before the closing brace.
    """
    entries = list(_entries(old)) if not old.startswith("null") else []
    stay = [entry for entry in entries if entry.key in metadata]
    if not stay:
        return None
    pieces, place = ["{"], 1
    for number, entry in enumerate(stay):
        room = _bytes(old[entry.start : entry.stop])
        kept = json.loads(old[entry.value : entry.stop]) == metadata[entry.key]
        new = old[entry.start : entry.stop] if kept else _pair(entry.key, metadata[entry.key])
        if _bytes(new) > room:
            return None
        gap = " " * _bytes(old[place : entry.start])
        if number:  # where the old comma was; there is one in every gap between entries
            gap = "," + gap[1:]
        pieces += [gap, new, " " * (room - _bytes(new))]
        place = entry.stop
    known = {entry.key for entry in stay}
    tail = "".join("," + _pair(key, value) for key, value in metadata.items() if key not in known)
    room = _bytes(old[place:-1])
    if _bytes(tail) > room:
        return None
    return "".join([*pieces, tail, " " * (room - _bytes(tail)), "}"])


def _packed_within(old: str, metadata: Mapping[str, str]) -> str | None:
    new = _json(metadata)
    spare = _bytes(old) - _bytes(new)
    return new[:-1] + " " * spare + "}" if spare >= 0 else None


def _pair(key: str, value: str) -> str:
    return f"{_json(key)}:{_json(value)}"


def header_length(least: int, old: int, data: int) -> int:
    """How long to make the header of a copy, in bytes.

    >>> header_length(100, 96, 200), header_length(100, 96, 10**7), header_length(100, 35033, 10**7)
    (104, 4192, 104)

    Args:
        least: what its text needs.
        old: the length of the header that is copied.
        data: how many bytes follow it. Where they are many they move by whole blocks, so that the copy can share them
            with the original if the file system can; unless they were not aligned, which the copy mends.
    """
    if old % ALIGNMENT or data < SHARED:
        return least + -least % ALIGNMENT
    return least + (old - least) % BLOCK
