"""Show and edit what a file's header says besides its tensors; no tensor is touched."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import InputError, Unsupported, quoted
from loratools.formats.opening import open_parts
from loratools.formats.peft_config import CONFIG_NAME
from loratools.metadata.hashes import HASHES, LEGACY, check_hashes, recompute_hashes
from loratools.metadata.private import shorten_paths, strip_private
from loratools.provenance import METADATA_KEY, RECORD_NAME, identify, made_by_loratools, record
from loratools.publishing import disk_errors, in_the_way, recover, remove, require_place, set_aside, swap
from loratools.refs import local_path
from loratools.tensors.files import sync_folder
from loratools.tensors.pickled import SUFFIXES
from loratools.tensors.safetensors import SafetensorsFile, ShardedCheckpoint
from loratools.verbs.metadata_report import MetadataChange, MetadataReport
from loratools.verbs.metadata_writing import plan_rewrite, require_editable, rewrite_in_place, write_copy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from loratools.formats.opening import Opened
    from loratools.metadata.hashes import HashCheck

__all__ = ["edit_metadata"]

_HUB_CACHE = re.compile(r"models--[^/\\]+[/\\](?:snapshots|blobs)[/\\]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def edit_metadata(
    ref: str | os.PathLike[str],
    *,
    set: Mapping[str, str] | None = None,  # noqa: A002 - what the command line calls it
    unset: Iterable[str] = (),
    strip_private: bool = False,
    rehash: bool = False,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    sync: bool = True,
) -> MetadataReport:
    """Show the metadata of a file, or change them; the tensors' bytes stay what they are.

    Without a change, the hashes that the file states are compared with its bytes. An edit reads the header only.

    >>> import numpy as np, tempfile
    >>> from safetensors.numpy import save_file
    >>> file = tempfile.mkdtemp() + "/style.safetensors"
    >>> save_file({"a.lora_down.weight": np.zeros((1, 2), "f4")}, file, metadata={"ss_session_id": "7"})
    >>> dict(edit_metadata(file, set={"modelspec.title": "Ink"}, strip_private=True).metadata)
    {'modelspec.title': 'Ink'}

    Args:
        ref: a safetensors file, or the folder of an adapter.
        set: values by key; all are strings.
        unset: keys to remove, or patterns such as ``ss_*``.
        strip_private: remove what tells about the author's machine and data
            (:mod:`loratools.metadata.private` has the table). ``unset`` comes after it, and ``set`` last.
        rehash: correct the hashes that the file states.
        out: write a copy there: a folder to make, or a file ending in ``.safetensors``. By default the file is edited.
        force: replace ``out``, if loratools made it.
        dry_run: only say what would be written.
        sync: wait for the disk.

    Raises:
        InputError: a key or a value that cannot be stored, a file that must not be edited in place, a header too large.
        Unsupported: the file is not safetensors, or there are several.
        OutputExists: ``out`` exists, or overlaps the input.
        Incomplete: the disk refused; the file is as it was.
    """
    opened, file = _open(ref)
    wanted = dict(set or {})
    removed = [unset] if isinstance(unset, str) else list(unset)
    before = dict(file.metadata)
    changes, warnings = _requested(before, wanted, removed, strip=strip_private)
    after = _applied(before, changes)
    asked = bool(wanted or removed or strip_private)
    corrected, checks = _hashes(file, after, wanted, rehash=rehash, asked=asked)
    changes += corrected
    after = _applied(after, corrected)
    warnings += [
        f"{check.key} is {check.stated}, and the bytes give {check.computed}"
        + ("" if rehash else "; --rehash corrects it")
        for check in checks
        if not check.fits and after.get(check.key) == check.stated
    ]
    if strip_private:
        warnings += _private_config(opened)
    report = MetadataReport(
        path=os.fspath(ref), file=file.path, output=None, metadata=after, changes=tuple(changes), hashes=checks,
        header_before=file.header.data_start, header_after=file.header.data_start, dry_run=dry_run,
        warnings=tuple(warnings),
    )  # fmt: skip
    if out is not None:
        parameters = {
            "set": sorted(wanted), "unset": sorted(removed), "strip_private": strip_private, "rehash": rehash
        }  # fmt: skip
        return _copy(report, opened, file, Path(out), parameters, force=force, sync=sync)
    if not changes:
        return report
    return _edit(report, file, sync=sync)


def _open(ref: str | os.PathLike[str]) -> tuple[Opened, SafetensorsFile]:
    """The file whose header is meant.

    Raises:
        Unsupported: there is none, or there are several.
    """
    if not isinstance(ref, (str, os.PathLike)):
        raise Unsupported("a state dict has no metadata", hint="give a file or a folder")
    hint = "only safetensors files have metadata that can be edited"
    if local_path(ref).suffix in SUFFIXES:
        raise Unsupported(f"{os.fspath(ref)} is a pickle", hint=hint)
    try:
        opened = open_parts(ref, tolerant=True)
    except Unsupported as error:
        raise Unsupported(str(error), hint=hint) from error
    source = opened.source
    if isinstance(source, ShardedCheckpoint):
        files = list(source.shards.values())
        if len(files) > 1:
            raise Unsupported(
                f"{opened.name} has {len(files)} weight files, each with metadata of its own",
                hint=f"name one: {files[0].path}",
            )
        source = files[0]
    if not isinstance(source, SafetensorsFile):
        raise Unsupported(f"{opened.weights or opened.name} is not a safetensors file", hint=hint)
    return opened, source


# --- what changes --------------------------------------------------------------------------------------------


def _requested(
    before: Mapping[str, str], wanted: Mapping[str, str], unset: list[str], *, strip: bool
) -> tuple[list[MetadataChange], list[str]]:
    """The changes that were asked for, and what to warn of."""
    for key, value in wanted.items():
        _require_storable(key, value)
    changes: dict[str, MetadataChange] = {}
    if strip:
        for one in strip_private(before)[1]:
            changes[one.key] = MetadataChange(one.key, "strip", before[one.key], one.after, one.reason)
    warnings = []
    for pattern in unset:
        found = [pattern] if pattern in before else [key for key in before if fnmatchcase(key, pattern)]
        if not found:
            warnings.append(f"there is no {quoted(pattern)} to unset")
        for key in found:
            if key not in changes or changes[key].after is not None:
                changes[key] = MetadataChange(key, "unset", before[key], None)
    for key, value in wanted.items():
        changes.pop(key, None)
        if before.get(key) != value:
            changes[key] = MetadataChange(key, "set", before.get(key), value)
    return list(changes.values()), warnings


def _applied(before: Mapping[str, str], changes: Iterable[MetadataChange]) -> dict[str, str]:
    after = dict(before)
    for change in changes:
        if change.after is None:
            after.pop(change.key, None)
        else:
            after[change.key] = change.after
    return after


def _require_storable(key: str, value: str) -> None:
    """Refuse what a header cannot hold, or what a reader could take for something else.

    Raises:
        InputError: the key, and what is wrong with it.
    """
    if not all(isinstance(one, str) for one in (key, value)):  # Python callers may give anything
        raise InputError(f"{quoted(key)}: keys and values are strings, and this is {type(value).__name__}")
    if not key or key == "__metadata__":
        raise InputError(f"{quoted(key)} is no key for metadata")
    if key == METADATA_KEY:
        raise InputError(f"{key} is the record of what made a file, and is written by loratools alone")
    for what, text in (("key", key), ("value", value)):
        if "\0" in text:
            raise InputError(f"{quoted(key)}: the {what} contains a NUL character")
        if _SURROGATE.search(text):
            raise InputError(f"{quoted(key)}: the {what} is not UTF-8 text")


def _hashes(
    file: SafetensorsFile, after: Mapping[str, str], wanted: Mapping[str, str], *, rehash: bool, asked: bool
) -> tuple[list[MetadataChange], tuple[HashCheck, ...]]:
    """Corrections of the hashes, and what was compared.

    The legacy hash depends on the metadata: one that was true stays true. The others are of the data, which an edit
    neither changes nor reads.
    """
    before = file.metadata
    stated = {key: before[key] for key in HASHES if key in before}
    if asked and not rehash:
        stated = {key: value for key, value in stated.items() if key == LEGACY}
    training = [{k: v for k, v in some.items() if k.startswith("ss_")} for some in (before, after)]
    checks = check_hashes(file, {**training[0], **stated})
    wrong = {check.key for check in checks if not check.fits}
    due = wrong if rehash else set()
    if training[0] != training[1] and LEGACY in stated and (rehash or LEGACY not in wrong):
        due = due | {LEGACY}
    new = recompute_hashes(file, {**training[1], **{key: after[key] for key in due if key in after}})
    reasons = {True: "is the hash of other bytes", False: "depends on the ss_ metadata"}
    corrections = [
        MetadataChange(key, "rehash", before[key], new[key], reasons[key in wrong])
        for key in HASHES
        if key in due and key in after and key not in wanted and new[key] != after[key]
    ]
    return corrections, checks


def _private_config(opened: Opened) -> list[str]:
    """A path in the configuration beside the weights, which is another file and is left alone."""
    named = opened.raw.get("base_model_name_or_path")
    if not isinstance(named, str) or shorten_paths(named) == named:
        return []
    return [f"{opened.where} names the base model by a path, {named}; this command edits weight files only"]


# --- writing -------------------------------------------------------------------------------------------------


def _edit(report: MetadataReport, file: SafetensorsFile, *, sync: bool) -> MetadataReport:
    path = Path(file.path)
    require_editable(path)
    if _HUB_CACHE.search(str(path.resolve())):
        raise InputError(
            f"{path} belongs to the Hub's cache, where files are what their hash says",
            hint="-o OUT writes a copy",
        )
    plan = plan_rewrite(file, report.metadata)
    written = plan.stop - plan.start if plan.in_place else plan.size
    if not report.dry_run:
        written = rewrite_in_place(file, plan, sync=sync)
    return replace(
        report, output=file.path, written="sector" if plan.in_place else "copy", bytes_written=written,
        header_after=len(plan.head), files={path.name: plan.size},
    )  # fmt: skip


def _copy(
    report: MetadataReport, opened: Opened, file: SafetensorsFile, out: Path, parameters: Mapping[str, object],
    *, force: bool, sync: bool,
) -> MetadataReport:  # fmt: skip
    """Write a copy: one file that carries its record, or a folder with the record beside the weights."""
    from loratools import __version__

    weights, config = Path(file.path), opened.config_path
    given = local_path(report.path)
    require_place(out, [given, weights], force=force)
    made = record("metadata", __version__, dict(parameters), [identify("adapter", weights, file)])
    metadata = {key: value for key, value in report.metadata.items() if key != METADATA_KEY}
    single = out.suffix == ".safetensors"
    if single:
        metadata[METADATA_KEY] = _json(made)
    plan = plan_rewrite(file, metadata, copy=True)
    small = {} if single else {RECORD_NAME: _json(made).encode()}
    if config is not None and not single:
        small[CONFIG_NAME] = config.read_bytes()
    warnings = list(report.warnings)
    if config is not None and single:
        warnings.append(f"{config} lies beside the input and is not copied; a folder as OUT has it too")
    files = {(out if single else weights).name: plan.size} | {name: len(text) for name, text in small.items()}
    if not report.dry_run:
        if single:
            write_copy(file, plan, out, force=force, sync=sync)
        else:
            _write_folder(file, plan, weights.name, small, out, force=force, sync=sync)
    return replace(
        report, output=str(out), metadata=metadata, written="copy", bytes_written=sum(files.values()),
        header_after=len(plan.head), files=files, warnings=tuple(warnings),
    )  # fmt: skip


def _write_folder(
    file: SafetensorsFile,
    plan: object,
    name: str,
    small: Mapping[str, bytes],
    out: Path,
    *,
    force: bool,
    sync: bool,
) -> None:
    """A folder beside its place, the record first so that it is known as ours, then renamed."""
    part, old = set_aside(out)
    with disk_errors(part, kept=False):
        recover(out)
        for leftover in (part, old):
            if os.path.lexists(leftover) and not made_by_loratools(leftover):
                raise in_the_way(leftover)
        remove(part)
        try:
            part.mkdir(parents=True)
            for beside, text in small.items():
                (part / beside).write_bytes(text)
            write_copy(file, plan, part / name, force=False, sync=sync)  # type: ignore[arg-type]
            if sync:
                _sync(part)
            swap(part, out, replace=force)
        except BaseException:
            remove(part)
            raise
        if sync:
            sync_folder(out.absolute().parent)
        remove(old)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    sync_folder(folder)


def _json(document: Mapping[str, object]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False)
