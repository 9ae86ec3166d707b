"""From what a user typed to an :class:`~loratools.adapter.Adapter`: where the weights are, and what explains them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loratools.errors import AmbiguousFormat, BadConfig, CorruptFile, NotFound, UnknownFormat
from loratools.formats.dialects import is_bare
from loratools.formats.peft import common_config, has_peft_keys, read_peft, with_blockwise
from loratools.formats.peft_config import CONFIG_NAME, parse_config, read_config, require_regular
from loratools.refs import local_path
from loratools.tensors.memory import MemorySource
from loratools.tensors.pickled import SUFFIXES, PickledFile
from loratools.tensors.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratools.adapter import Adapter
    from loratools.formats.peft_config import PeftConfig
    from loratools.tensors.base import TensorSource

__all__ = ["WEIGHT_NAMES", "Opened", "evidence", "explain", "interpret", "open_adapter", "open_parts"]

# In a folder, the weights are the first of these that is there.
WEIGHT_NAMES = (
    "adapter_model.safetensors",
    "adapters.safetensors",
    "adapters.npz",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
_LFS_POINTER = b"version https://git-lfs"
_GGUF = b"GGUF"
_UNREAD = {
    ".onnx": "ONNX",
    ".h5": "HDF5",
    ".msgpack": "Flax msgpack",
}


@dataclass(frozen=True, slots=True)
class Opened:
    """The parts of an adapter, before anything is made of them.

    Attributes:
        name: what to call it in messages.
        source: the tensors' names and shapes.
        raw: the configuration, or empty.
        where: whose fields a message speaks of.
        weights: the file the tensors are in; None in memory.
        config_path: the configuration's file, where one was read.
        faults: what was wrong with the configuration's file, where the caller asked to go on without it.
    """

    name: str
    source: TensorSource
    raw: Mapping[str, Any]
    where: object
    weights: Path | None = None
    config_path: Path | None = None
    faults: tuple[CorruptFile, ...] = ()


def open_adapter(
    ref: str | os.PathLike[str] | Mapping[str, Any],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
    enable_lora: Sequence[bool] | None = None,
) -> Adapter:
    """Open an adapter: headers and configuration only.

    Args:
        ref: a folder, a weight file, or a state dict (where it is PEFT's, with ``config``).
        config: the configuration, where it does not lie beside the weights: a path, or the parsed JSON.
        alpha: the ``lora_alpha``, where no configuration says it.
        allow_pickle: read ``.bin`` and ``.pt`` files.
        blockwise_experts: read the B of fused experts as expert-slowest (unsloth before 2026-09).
        enable_lora: which parts of a fused weight a loralib file has factors for, where no configuration says it.

    Raises:
        NotFound: no such file, or a folder without adapter weights.
        CorruptFile: a file breaks the rules of its format.
        BadConfig: a field of the configuration cannot be, or says another alpha.
        Unsupported: a pickle, without leave to read it.
    """
    opened = open_parts(ref, config=config, allow_pickle=allow_pickle)
    adapter = interpret(opened, alpha=alpha, enable_lora=enable_lora)
    return with_blockwise(adapter) if blockwise_experts else adapter


def open_parts(
    ref: str | os.PathLike[str] | Mapping[str, Any],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    tolerant: bool = False,
) -> Opened:
    """Find and open the weights and the configuration beside them; errors are those of :func:`open_adapter`.

    Args:
        ref: as for :func:`open_adapter`, and so are the others.
        config: see there.
        allow_pickle: see there.
        tolerant: go on without a configuration that lies beside the weights and cannot be read.
    """
    given = None if config is None else _given(config)
    if not isinstance(ref, (str, os.PathLike)):
        return Opened("the state dict", MemorySource(ref), given or {}, "config")
    weights, beside = _locate(local_path(ref))
    source, name = _open_weights(weights, allow_pickle), os.fspath(ref)
    if given is not None:
        where = "config" if not isinstance(config, (str, os.PathLike)) else config
        return Opened(name, source, given, where, weights, Path(where) if where is config else None)
    if beside is None:
        return Opened(name, source, {}, name, weights)
    try:
        return Opened(name, source, read_config(beside), beside, weights, beside)
    except CorruptFile as error:
        if not tolerant:
            raise
        return Opened(name, source, {}, beside, weights, beside, (error,))


def explain(
    opened: Opened, *, alpha: float | None = None, faults: list[BadConfig] | None = None
) -> PeftConfig | None:
    """The PEFT configuration that speaks of these weights; None if they are in another format.

    Args:
        opened: the parts.
        alpha: the ``lora_alpha``, where no configuration says it.
        faults: collects what is wrong with the configuration, and such a field counts as absent; by default the
            first fault is raised.

    Raises:
        BadConfig: a field of the configuration cannot be.
    """
    raw = {name: value for name, value in opened.raw.items() if name != "peft_type" or value is not None}
    if alpha is not None:
        if "peft_type" not in raw and raw.get("r") is None:
            if not is_bare(opened.source):
                return None
            raw = common_config(opened.source) | raw
        _require_silent(raw, alpha, opened.where)
        raw |= {"lora_alpha": alpha, "alpha": alpha, "alpha_pattern": {}}
    if not _is_peft(raw, opened):
        return None
    config = parse_config({"peft_type": "LORA", **raw}, opened.where, faults)
    if "peft_type" not in raw:
        config = replace(
            config, warnings=("the configuration has no peft_type; read as LORA", *config.warnings)
        )
    return config


def _require_silent(raw: Mapping[str, Any], alpha: float, where: object) -> None:
    """Refuse an alpha that a configuration contradicts.

    Raises:
        BadConfig: it says another.
    """
    hints = "edit adapter_config.json, or pass another with --config (config= in Python)"
    for name in ("lora_alpha", "alpha"):
        if raw.get(name) is not None and raw[name] != alpha:
            raise BadConfig(f"{where}: {name} is {raw[name]!r}, and the alpha given is {alpha:g}", hint=hints)
    if raw.get("alpha_pattern"):
        raise BadConfig(
            f"{where}: alpha_pattern gives modules an alpha of their own, and the alpha given is {alpha:g}",
            hint=hints,
        )


def interpret(
    opened: Opened, *, alpha: float | None = None, enable_lora: Sequence[bool] | None = None
) -> Adapter:
    """Make modules of the keys, as the configuration or the dialect explains them.

    Raises:
        BadConfig: a field of the configuration cannot be.
        AmbiguousFormat: two dialects claim the file.
    """
    if opened.weights is not None and _is_gguf(opened):
        from loratools.formats.gguf import read_gguf

        return read_gguf(opened.name, opened.weights, base_config=opened.raw)
    config = explain(opened, alpha=alpha)
    if config is None:
        from loratools.formats.recognise import recognise

        return recognise(opened.name, opened.source, opened.raw, alpha=alpha, enable_lora=enable_lora)
    return read_peft(opened.name, opened.source, config, evidence(opened))


def evidence(opened: Opened) -> str:
    """What says that these weights are PEFT's."""
    field = "peft_type" if opened.raw.get("peft_type") else "r" if opened.raw.get("r") else "--alpha"
    return (
        f"{field} in {Path(str(opened.where)).name}"
        if field != "--alpha"
        else "its keys, and the alpha given"
    )


def _given(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        return read_config(path / CONFIG_NAME if path.is_dir() else path)
    return dict(config)


def _is_peft(raw: Mapping[str, Any], opened: Opened) -> bool:
    """Whether the configuration speaks of these weights: a model may lie in the same folder as an adapter."""
    if raw.get("peft_type") is None and raw.get("r") is None:
        return False
    if opened.weights is None or opened.weights.name in WEIGHT_NAMES:
        return True
    return has_peft_keys(opened.source) and is_bare(opened.source)


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The weight file (or the folder of a whole model), and the configuration beside it if there is one.

    Raises:
        NotFound: neither a file nor a folder with weights.
        AmbiguousFormat: a folder of several adapters.
    """
    if not path.exists():
        raise NotFound(f"{path}: no such file or folder")
    if not path.is_dir():
        require_regular(path)
        if path.suffix == ".json":
            return _locate_by_config(path)
        config = path.parent / CONFIG_NAME
        return path, (config if config.exists() else None)
    config = path / CONFIG_NAME
    beside = config if config.exists() else None
    for name in WEIGHT_NAMES:
        if (path / name).exists():
            return path / name, beside
    return _locate_unnamed(path, beside)


def _locate_unnamed(path: Path, beside: Path | None) -> tuple[Path, Path | None]:
    """A folder whose weights do not have an adapter's name."""
    nested = sorted(config.parent.name for config in path.glob(f"*/{CONFIG_NAME}"))
    if nested and beside is None:
        raise AmbiguousFormat(
            f"{path} holds adapters in folders of their own: {', '.join(nested)}",
            hint=f"name one: {path / nested[0]}",
        )
    loose = sorted(path.glob("*.safetensors"))
    if len(loose) == 1:
        return loose[0], beside
    if any(path.glob("*.safetensors.index.json")):
        return path, beside
    if len(loose) > 1:
        raise AmbiguousFormat(
            f"{path} holds several weight files: {', '.join(p.name for p in loose[:4])}",
            hint=f"name one: {loose[0]}",
        )
    if beside is not None:
        raise NotFound(
            f"{path} has {CONFIG_NAME} but no adapter_model.safetensors", hint="the download is incomplete"
        )
    raise NotFound(f"{path} holds no adapter", hint="an adapter folder has adapter_model.safetensors in it")


def _locate_by_config(path: Path) -> tuple[Path, Path | None]:
    """A configuration was named: the weights beside it are meant.

    Raises:
        BadConfig: it is not the configuration of an adapter.
        UnknownFormat: it is, and lies alone.
    """
    raw = read_config(path)
    if path.name == CONFIG_NAME and any((path.parent / name).exists() for name in WEIGHT_NAMES):
        return _locate(path.parent)
    parse_config(raw, path)
    raise UnknownFormat(
        f"{path} is a configuration, and no adapter weights lie beside it",
        hint="name the weights, or their folder",
    )


def _open_weights(path: Path, allow_pickle: bool) -> TensorSource:
    if path.is_dir():
        from loratools.models import open_weights

        return open_weights(path).source
    require_regular(path)
    if (start := _start(path)) == _LFS_POINTER:
        raise CorruptFile(
            path, "is a Git LFS pointer, not the weights", hint="fetch the real file: git lfs pull"
        )
    if path.suffix in SUFFIXES:
        return cast("TensorSource", PickledFile(path, allow_pickle=allow_pickle))
    if path.suffix in _UNREAD:
        raise UnknownFormat(f"{path} is {_UNREAD[path.suffix]}, which this build does not read")
    if path.suffix == ".npz":
        from loratools.tensors.npz import NpzFile

        return cast("TensorSource", NpzFile(path, allow_pickle=allow_pickle))
    if start.startswith(_GGUF) or (not start and path.suffix == ".gguf"):  # which says that it is empty
        from loratools.tensors.gguf import GgufFile

        return cast("TensorSource", GgufFile(path))
    return SafetensorsFile(path)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER))


def _is_gguf(opened: Opened) -> bool:
    weights = opened.weights
    return weights is not None and weights.is_file() and _start(weights).startswith(_GGUF)
