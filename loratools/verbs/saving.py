"""Adapters on disk: a PEFT folder, or one file with its configuration beside it, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.dtypes import compatible
from loratools.dtypes import dtype as named_dtype
from loratools.errors import Incomplete, LoratoolsError, OutputExists, Unsupported
from loratools.executors.base import make_executor
from loratools.formats.peft_config import CONFIG_NAME
from loratools.formats.peft_writing import write_peft
from loratools.planning import Output, Plan, SmallFile, plan_steps
from loratools.provenance import METADATA_KEY, RECORD_NAME, identify, made_by_loratools, record
from loratools.publishing import require_place, standing
from loratools.running import run
from loratools.sinks import FileSink
from loratools.tensors.base import TensorSpec
from loratools.tensors.files import sync_folder
from loratools.tensors.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from loratools.adapter import Adapter
    from loratools.dtypes import Dtype

__all__ = [
    "SaveReport",
    "describe_save",
    "float_dtype",
    "identify_adapter",
    "input_paths",
    "lay_out",
    "plan_save",
    "save",
    "widest",
]

WEIGHTS_NAME = "adapter_model.safetensors"
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
    format: str = "peft",  # noqa: A002 - what the command line calls it
    dtype: object = None,
    force: bool = False,
    sync: bool = True,
    provenance: Mapping[str, Any] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
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
        out: a folder to make; or, where the name ends in ``.safetensors``, one file, with its configuration beside it.
        format: ``"peft"``.
        dtype: of the floats written (``"bf16"``, ``torch.bfloat16``); by default each keeps its own.
        force: replace an output that loratools made.
        sync: wait for the disk.
        provenance: the record of what made it, as :func:`~loratools.provenance.record` makes it; by default, that it
            was saved from ``adapter``.
        inputs: paths the adapter was made of, which ``out`` must not touch; those its tensors lie in are known.

    Raises:
        OutputExists: ``out`` exists, or overlaps an input.
        NonFinite: a value does not fit the type it is rounded to.
        Unsupported: the format cannot express the adapter.
        Incomplete: the disk refused; nothing was published.
    """
    output = Path(out)
    plan, config = plan_save(
        adapter, output, format=format, dtype=dtype, force=force, provenance=provenance, inputs=inputs
    )
    beside = output.parent / CONFIG_NAME if plan.kind == "file" else None
    if beside is not None:
        _require_no_other_config(beside, output, force=force)
    sink = FileSink(plan, output, sync=sync, replace=force)
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


def plan_save(
    adapter: Adapter,
    output: Path,
    *,
    format: str = "peft",  # noqa: A002
    dtype: object = None,
    force: bool = False,
    provenance: Mapping[str, Any] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> tuple[Plan, bytes]:
    """What :func:`save` would write, and the configuration's bytes. Arguments and errors are those of :func:`save`."""
    if format != "peft":
        raise Unsupported(f"writing {format} is not in this build", hint="it writes peft")
    require_place(output, [*input_paths(adapter), *map(Path, inputs)], force=force)
    return lay_out(adapter, output, dtype=dtype, provenance=provenance)


def lay_out(
    adapter: Adapter, output: Path, *, dtype: object = None, provenance: Mapping[str, Any] | None = None
) -> tuple[Plan, bytes]:
    """:func:`plan_save` for a place that is known to be free: it looks at nothing on the disk."""
    tensors, raw = write_peft(adapter)
    if not tensors:
        raise Unsupported(f"{adapter.name} holds no tensors; there is nothing to write")
    config = _json(raw)
    wanted = float_dtype(dtype)
    outputs = [Output(name, _spec(ref.spec, wanted), ref) for name, ref in tensors.items()]
    made = dict(provenance) if provenance is not None else _saved_from(adapter, wanted)
    single = output.suffix == ".safetensors"
    metadata = {**_metadata(adapter), "format": "pt"}
    if single:
        made[_BESIDE] = hashlib.sha256(config).hexdigest()
        metadata[METADATA_KEY] = _json(made).decode()
    name = output.name if single else WEIGHTS_NAME
    files, steps = plan_steps({name: outputs}, {name: metadata})
    small = (
        ()
        if single
        else (SmallFile(CONFIG_NAME, content=config), SmallFile(RECORD_NAME, content=_json(made)))
    )
    return Plan("file" if single else "folder", files, steps, small, (str(output), config)), config


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
        options: ``dtype``, ``force``, ``inputs`` of :func:`save`.

    Raises:
        OutputExists: ``out`` exists, or overlaps an input.
    """
    plan, config = plan_save(adapter, Path(out), **options)
    sources = list(reads) or [adapter]
    opened = [one for one in sources if not isinstance(one, (str, os.PathLike))]
    small = [{"name": one.name, "bytes": len(one.read())} for one in plan.small]
    if plan.kind == "file":
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
        for ref in module.tensors.values()
        if compatible(ref.spec.dtype)
    }
    if len(names) == 1:
        return names.pop()
    return "F64" if "F64" in names else "F32"


def _spec(stored: TensorSpec, wanted: Dtype | None) -> TensorSpec:
    return TensorSpec(wanted, stored.shape) if wanted is not None and compatible(stored.dtype) else stored


def _metadata(adapter: Adapter) -> dict[str, str]:
    return {key: value for key, value in adapter.metadata.items() if key != METADATA_KEY}


def _saved_from(adapter: Adapter, dtype: Dtype | None) -> dict[str, Any]:
    from loratools import __version__

    parameters = {"format": "peft", "dtype": None if dtype is None else dtype.name}
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
        with part.open("xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.replace(beside)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(beside.absolute().parent)
