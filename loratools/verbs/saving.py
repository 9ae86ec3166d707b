"""Adapters on disk, in any format that is written: a folder, or one file with its configuration beside it."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.architectures.base import architecture as named_architecture
from loratools.canonical import find_architecture
from loratools.dtypes import compatible
from loratools.dtypes import dtype as named_dtype
from loratools.errors import Incomplete, LoratoolsError, Mismatch, OutputExists, Unsupported
from loratools.executors.base import make_executor
from loratools.formats.keys import BLANK_HASHES, name_model
from loratools.formats.peft_config import CONFIG_NAME
from loratools.formats.registry import FORMATS, find_format, is_diffusion
from loratools.metadata.hashes import file_hashes
from loratools.planning import Output, OutputFile, Plan, SmallFile, plan_steps
from loratools.provenance import METADATA_KEY, RECORD_NAME, identify, made_by_loratools, record
from loratools.publishing import disk_errors, require_place, standing
from loratools.running import run
from loratools.sinks import FileSink
from loratools.tensors.base import TensorSpec
from loratools.tensors.files import sync_folder
from loratools.tensors.safetensors import SafetensorsFile
from loratools.tensors.views import Gathered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from loratools.adapter import Adapter
    from loratools.architectures.base import Architecture
    from loratools.dtypes import Dtype
    from loratools.formats.registry import Format, Written
    from loratools.tensors.base import TensorSource

__all__ = [
    "SaveReport",
    "describe_save",
    "find_naming",
    "float_dtype",
    "identify_adapter",
    "input_paths",
    "lay_out",
    "lay_out_written",
    "names_depend",
    "plan_save",
    "require_nothing_lost",
    "save",
    "save_written",
    "settled",
    "view_written",
    "widest",
    "write",
]

WEIGHTS_NAME = "adapter_model.safetensors"
_NAMED = 3  # keys and reasons spelled out in a message
_FILE_ENDINGS = frozenset({".safetensors", ".gguf", ".npz", ".ckpt", ".bin", ".pt", ".pth"})
_BESIDE = "config_sha256"  # in a single file's record: the configuration that was written beside it


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What was written.

    Attributes:
        path: the folder or file.
        bytes: of all files together.
        files: their names, in the order they were written.
    """

    path: str
    bytes: int
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {"path": self.path, "bytes": self.bytes, "files": list(self.files)}


def save(
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - what the command line calls it
    arch: str | None = None,
    allow_loss: Iterable[str] = (),
    dtype: object = None,
    force: bool = False,
    sync: bool = True,
    provenance: Mapping[str, Any] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    base_config: Mapping[str, Any] | None = None,
) -> SaveReport:
    """Write an adapter.

    >>> import numpy as np
    >>> import loratools as lt
    >>> factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    >>> adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(adapter, folder + "/copy", sync=False).files
    ('adapter_model.safetensors', 'adapter_config.json', 'loratools.json')

    Args:
        adapter: any; its tensors are read now.
        out: a folder to make; or, where the name ends as the format's weight files do (``.safetensors``), one file,
            with its configuration beside it.
        format: ``"peft"``, ``"kohya"``, ``"diffusers"``, ``"comfy"`` or another that is written; by default the
            adapter's own, and PEFT's where that is only read.
        arch: the architecture, where the format's names depend on it; by default, what the modules' names and shapes
            say.
        allow_loss: what may be left out, by key or module: names, or patterns with ``*``.
        dtype: of the floats written (``"bf16"``, ``torch.bfloat16``); by default each keeps its own.
        force: replace an output that loratools made.
        sync: wait for the disk.
        provenance: the record of what made it, as :func:`~loratools.provenance.record` makes it; by default, that it
            was saved from ``adapter``.
        inputs: paths the adapter was made of, which ``out`` must not touch; those its tensors lie in are known.
        base_config: the base's ``config.json``, for formats that ask for it (GGUF, MLX).

    Raises:
        OutputExists: ``out`` exists, or overlaps an input.
        NonFinite: a value does not fit the type it is rounded to.
        Unsupported: the format cannot express the adapter; names what it cannot.
        Incomplete: the disk refused; nothing was published.
    """
    output = Path(out)
    require_place(output, [*input_paths(adapter), *map(Path, inputs)], force=force)
    format = settled(adapter, format)  # noqa: A001
    written = write(adapter, format, arch=arch, allow_loss=allow_loss, base_config=base_config)
    if arch is not None and provenance is None and is_diffusion(format):  # else nobody named it, it was found
        written = replace(written, metadata=name_model(written.metadata, format, named_architecture(arch)))
    return save_written(
        adapter, written, output, format=format, dtype=dtype, force=force, sync=sync, provenance=provenance
    )


def write(
    adapter: Adapter,
    format: str | None = None,  # noqa: A002
    *,
    arch: str | None = None,
    allow_loss: Iterable[str] = (),
    base_config: Mapping[str, Any] | None = None,
) -> Written:
    """An adapter in the terms of a format; arguments and errors are those of :func:`save`."""
    wanted = find_format(settled(adapter, format))
    options = {"base_config": base_config} if wanted.needs_base else {}
    written = wanted.write(adapter, find_naming(adapter, wanted, arch), **options)
    require_nothing_lost(adapter.name, wanted.name, written.lost, allow_loss)
    return written


def settled(adapter: Adapter, format: str | None) -> str:  # noqa: A002
    """The format to write: the one asked for, the adapter's own, or PEFT's where that is only read."""
    if format is not None:
        return find_format(format).name
    own = FORMATS.get(adapter.format)
    return own.name if own is not None and own.writer else "peft"


def find_naming(adapter: Adapter, wanted: Format, arch: str | None = None) -> Architecture | None:
    """The architecture whose names a format is written in; None where the names stay as they are.

    In its own dialect an adapter keeps its names where several families have such modules.

    Raises:
        Mismatch: several have, and the names are to be translated.
        Unsupported: no architecture is called ``arch``.
    """
    if not names_depend(adapter, wanted):
        if arch is not None:
            named_architecture(arch)  # refused where there is none of this name
        return None
    try:
        return find_architecture(adapter, arch)
    except Mismatch:
        if wanted.name != adapter.format:
            raise
        return None


def names_depend(adapter: Adapter, wanted: Format) -> bool:
    """Whether only an architecture tells how the modules are named: in what is written, or in what was read."""
    return wanted.diffusion or (wanted.name != adapter.format and is_diffusion(adapter.format))


def require_nothing_lost(name: str, format: str, lost: Mapping[str, str], allowed: Iterable[str]) -> None:  # noqa: A002
    """Refuse to leave out what nobody allowed to be left out.

    Raises:
        Unsupported: names it, with the reason.
    """
    patterns = (allowed,) if isinstance(allowed, str) else tuple(allowed)
    found = {
        key: why for key, why in lost.items() if not any(fnmatchcase(key, pattern) for pattern in patterns)
    }
    if not found:
        return
    reasons: dict[str, list[str]] = {}
    for key, why in found.items():
        reasons.setdefault(why, []).append(key)
    each = 1 if len(reasons) > 1 else _NAMED
    listed = [f"{_some(keys, each)}: {why}" for why, keys in list(reasons.items())[:_NAMED]]
    rest = len(reasons) - _NAMED
    more = f"; and {rest} other reason{'s' if rest > 1 else ''}" if rest > 0 else ""
    raise Unsupported(
        f"{name}: {format} has no place for {'; '.join(listed)}{more}",
        hint="--allow-loss NAME leaves a key out; NAME may have * in it",
    )


def _some(keys: list[str], count: int) -> str:
    """The first few of some keys, and how many there are besides."""
    more = f" and {len(keys) - count:,} more" if len(keys) > count else ""
    return f"{', '.join(keys[:count])}{more}"


def save_written(
    adapter: Adapter,
    written: Written,
    output: Path,
    *,
    format: str,  # noqa: A002
    dtype: object = None,
    force: bool = False,
    sync: bool = True,
    provenance: Mapping[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
) -> SaveReport:
    """Put on disk what :func:`write` returned. Arguments and errors are those of :func:`save`.

    Args:
        adapter: what was written.
        written: in the terms of its format.
        output: a place that is known to be free.
        format: see there, and so are those that follow.
        dtype: see there.
        force: see there.
        sync: see there.
        provenance: see there.
        check: called with the weight file before anything appears under the output's name; what it raises
            leaves nothing behind.
    """
    plan, config = lay_out_written(
        adapter, written, output, format=format, dtype=dtype, provenance=provenance
    )
    beside = output.parent / CONFIG_NAME if plan.kind == "file" and config else None
    if beside is not None:
        _require_no_other_config(beside, output, force=force)
    sink = _CheckedSink(plan, output, sync=sync, replace=force)
    sink.check = check
    try:
        run(plan, sink, make_executor("inline", 1), measure="none")
    except BaseException as error:
        sink.abandon(keep=False)  # it takes a second to do again
        if isinstance(error, Incomplete):
            raise Incomplete(
                str(error), hint="nothing was published; run again when this is mended"
            ) from error
        raise
    files = [file.name for file in plan.files] + [small.name for small in plan.small]
    total = plan.bytes_written + sum(len(small.read()) for small in plan.small)
    if beside is not None:
        _write_beside(beside, config, sync=sync)
        files.append(beside.name)
        total += len(config)
    return SaveReport(str(output), total, tuple(files))


def _write_whole(path: Path, content: bytes, *, sync: bool) -> None:
    with path.open("xb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


class _CheckedSink(FileSink):
    """A sink that shows what it has written before it gives it its name."""

    check: Callable[[Path], None] | None = None

    def publish(self) -> None:
        """See :class:`~loratools.sinks.FileSink`."""
        [file] = self.plan.files
        path = self.part / file.name if self.folder else self.part
        if self.check is not None:
            self.check(path)
        if self.plan.steps:
            with disk_errors(self.part):
                _fill_in_hashes(path, sync=self.sync)
        super().publish()


def _fill_in_hashes(path: Path, *, sync: bool) -> None:
    """State the hashes of what was written, where the adapter that was read stated its own."""
    file = SafetensorsFile(path)
    blank = {key: value for key, value in BLANK_HASHES.items() if file.metadata.get(key) == value}
    if not blank:
        return
    true = file_hashes(file, file.metadata, tuple(blank))
    with path.open("r+b") as written:
        header = written.read(file.header.data_start)
        for key, value in blank.items():
            header = header.replace(f'"{key}":"{value}"'.encode(), f'"{key}":"{true[key]}"'.encode(), 1)
        written.seek(0)
        written.write(header)
        if sync:
            written.flush()
            os.fsync(written.fileno())


def plan_save(
    adapter: Adapter,
    output: Path,
    *,
    format: str | None = None,  # noqa: A002
    arch: str | None = None,
    allow_loss: Iterable[str] = (),
    dtype: object = None,
    force: bool = False,
    provenance: Mapping[str, Any] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    base_config: Mapping[str, Any] | None = None,
) -> tuple[Plan, bytes]:
    """What :func:`save` would write, and the configuration's bytes. Arguments and errors are those of :func:`save`."""
    require_place(output, [*input_paths(adapter), *map(Path, inputs)], force=force)
    format = settled(adapter, format)  # noqa: A001
    written = write(adapter, format, arch=arch, allow_loss=allow_loss, base_config=base_config)
    return lay_out_written(adapter, written, output, format=format, dtype=dtype, provenance=provenance)


def lay_out(
    adapter: Adapter,
    output: Path,
    *,
    format: str | None = None,  # noqa: A002
    arch: str | None = None,
    dtype: object = None,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[Plan, bytes]:
    """:func:`plan_save` for a place that is known to be free: it looks at nothing on the disk."""
    format = settled(adapter, format)  # noqa: A001
    written = write(adapter, format, arch=arch)
    return lay_out_written(adapter, written, output, format=format, dtype=dtype, provenance=provenance)


def view_written(written: Written, dtype: Dtype | None = None) -> TensorSource:
    """What a reader would find in the weight file, without one: every float rounded as it would be stored."""
    from loratools.formats.pairs import as_type

    refs = {}
    for key, ref in written.tensors.items():
        spec = _spec(key, ref.spec, dtype)
        refs[key] = ref if spec == ref.spec else as_type(ref, spec.dtype)
    said = {key: value for key, value in written.metadata.items() if value != BLANK_HASHES.get(key)}
    return Gathered(refs, said)


def lay_out_written(
    adapter: Adapter,
    written: Written,
    output: Path,
    *,
    format: str,  # noqa: A002
    dtype: object = None,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[Plan, bytes]:
    """The plan of a file or a folder, and the bytes of the configuration that goes with it; empty where none does."""
    if written.weights in written.files:
        raw, ending = written.files[written.weights], Path(written.weights).suffix
        if output.suffix != ending:
            raise Unsupported(f"{output}: a {format} adapter is one file", hint=f"call it {output}{ending}")
        return Plan("file", (OutputFile(output.name, raw, len(raw)),), (), (), (str(output),)), b""
    if not written.tensors:
        raise Unsupported(f"{adapter.name} holds no tensors; there is nothing to write")
    _require_ending(output, Path(written.weights).suffix, format)
    config = written.files.get(CONFIG_NAME, b"")
    wanted = float_dtype(dtype)
    outputs = [Output(name, _spec(name, ref.spec, wanted), ref) for name, ref in written.tensors.items()]
    made = dict(provenance) if provenance is not None else _saved_from(adapter, format, wanted)
    single = output.suffix == Path(written.weights).suffix
    metadata = dict(written.metadata)
    if single:
        if config:
            made[_BESIDE] = hashlib.sha256(config).hexdigest()
        metadata[METADATA_KEY] = _json(made).decode()
    name = output.name if single else written.weights
    files, steps = plan_steps({name: outputs}, {name: metadata})
    beside = [SmallFile(small, content=content) for small, content in written.files.items()]
    small = () if single else (*beside, SmallFile(RECORD_NAME, content=_json(made)))
    return Plan("file" if single else "folder", files, steps, small, (str(output), config)), config


def _require_ending(output: Path, ending: str, format: str) -> None:  # noqa: A002
    """Refuse a folder that would be called like a file of another kind.

    Raises:
        Unsupported: it would.
    """
    if output.suffix != ending and output.suffix.lower() in _FILE_ENDINGS:
        raise Unsupported(
            f"{output}: {format} has no {output.suffix} files; it would be a folder of that name",
            hint=f"call it {output.with_suffix('')}, for a folder, or {output.with_suffix(ending)}",
        )


def describe_save(
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    verb: str,
    reads: Iterable[Adapter | str | os.PathLike[str]] = (),
    **options: Any,
) -> dict[str, Any]:
    """What writing an adapter would do, in numbers, as ``--dry-run`` prints it.

    Args:
        adapter: what would be written.
        out: where.
        verb: whose dry run it is.
        reads: what it is made of; by default, itself.
        options: ``format``, ``arch``, ``allow_loss``, ``dtype``, ``force``, ``inputs``, ``base_config`` of
            :func:`save`.

    Raises:
        OutputExists: ``out`` exists, or overlaps an input.
    """
    plan, config = plan_save(adapter, Path(out), **options)
    sources = list(reads) or [adapter]
    opened = [one for one in sources if not isinstance(one, (str, os.PathLike))]
    small = [{"name": one.name, "bytes": len(one.read())} for one in plan.small]
    if plan.kind == "file" and config:
        small = [{"name": CONFIG_NAME, "bytes": len(config)}]
    files = [*({"name": file.name, "bytes": file.size} for file in plan.files), *small]
    return {
        "schema": f"loratools.{verb}/1",
        "dry_run": True,
        "output": str(out),
        "reads": [one.name if not isinstance(one, (str, os.PathLike)) else os.fspath(one) for one in sources],
        "bytes_read": sum(ref.spec.nbytes for one in opened for ref in one.tensors),
        "files": files,
        "bytes_written": sum(int(str(file["bytes"])) for file in files),
        "peak_memory": plan.peak_bytes(1),
        "warnings": [],
    }


def input_paths(adapter: Adapter) -> list[Path]:
    """The files an adapter's tensors lie in, and the path it was opened by: no output may touch them."""
    refs = [ref for module in adapter.modules.values() for ref in module.tensors.values()]
    refs += [*adapter.tensors, *(extra.tensor for extra in adapter.extras.values())]
    sources = {id(ref.source): ref for ref in refs}
    extents = [ref.source.extent(ref.name) for ref in sources.values()]
    found = [Path(extent.path) for extent in extents if extent is not None]
    named = Path(adapter.name)
    with suppress(OSError, ValueError):
        if found and named.exists():
            found.append(named)
    return found


def float_dtype(given: object) -> Dtype | None:
    """A type to round to, by any name it goes under: of ``torch.bfloat16`` too, which prints its name last.

    Raises:
        Unsupported: no such type, or none that values can be rounded to.
    """
    if given is None:
        return None
    name = given if isinstance(given, str) else getattr(given, "__name__", str(given))
    found = named_dtype(name.rpartition(".")[2])
    if not compatible(found):
        raise Unsupported(
            f"an adapter cannot be written in {found}", hint="bf16, f16, f32 and f64 are possible"
        )
    return found


def widest(adapters: Iterable[Adapter]) -> str:
    """The widest float type among the factors of some adapters; of two that are equally wide, F32 covers both.

    Returns:
        The name of a type that can be rounded to: F16, BF16, F32 or F64.
    """
    names = {
        ref.spec.dtype.name
        for adapter in adapters
        for module in adapter.modules.values()
        for ref in module.factors.values()
        if compatible(ref.spec.dtype)
    }
    if len(names) == 1:
        return names.pop()
    return "F64" if "F64" in names else "F32"


def _spec(key: str, stored: TensorSpec, wanted: Dtype | None) -> TensorSpec:
    if wanted is None or not compatible(stored.dtype) or key.endswith(".alpha"):  # a number, not a weight
        return stored
    return TensorSpec(wanted, stored.shape)


def _saved_from(adapter: Adapter, format: str, dtype: Dtype | None) -> dict[str, Any]:  # noqa: A002
    from loratools import __version__

    parameters = {"format": format, "dtype": None if dtype is None else dtype.name}
    return record("save", __version__, parameters, [identify_adapter(adapter)])


def identify_adapter(adapter: Adapter) -> dict[str, Any]:
    """An adapter as a record names its inputs."""
    if not adapter.tensors:
        return {"role": "adapter", "name": "in memory"}
    path = Path(adapter.name)
    return identify("adapter", path if path.exists() else None, adapter.tensors[0].source)


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n").encode()


# --- one file, and its configuration beside it ---------------------------------------------------------------


def _require_no_other_config(beside: Path, output: Path, *, force: bool) -> None:
    """The configuration beside a single file must be none, or the one that was written with the file replaced."""
    if not os.path.lexists(beside):
        return
    if force and _is_own_config(beside, output):
        return
    raise OutputExists(
        f"{beside} belongs to something else, and {output.name} needs one of its own",
        hint="give the result a folder of its own",
    )


def _is_own_config(beside: Path, output: Path) -> bool:
    found = standing(output)
    if found is None or not made_by_loratools(found) or beside.is_symlink():
        return False
    try:
        made = json.loads(SafetensorsFile(found).metadata.get(METADATA_KEY, "{}"))
        return bool(made.get(_BESIDE) == hashlib.sha256(beside.read_bytes()).hexdigest())
    except (LoratoolsError, OSError, ValueError, AttributeError, RecursionError):
        return False


def _write_beside(beside: Path, content: bytes, *, sync: bool) -> None:
    """Write whole, then rename: a link under the name is replaced, never written through."""
    part = beside.with_name(f".{beside.name}.{os.getpid()}.part")
    try:
        _write_whole(part, content, sync=sync)
        part.replace(beside)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(beside.absolute().parent)
