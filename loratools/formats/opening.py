"""From what a user typed to an :class:`~loratools.adapter.Adapter`: which file holds the weights, which one explains them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import AmbiguousFormat, BadConfig, NotFound, UnknownFormat
from loratools.formats.peft import has_peft_keys, read_peft, with_blockwise
from loratools.formats.peft_config import CONFIG_NAME, parse_config, read_config
from loratools.formats.recognise import recognise
from loratools.refs import local_path
from loratools.tensors.memory import MemorySource
from loratools.tensors.pickled import SUFFIXES, PickledFile
from loratools.tensors.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.adapter import Adapter
    from loratools.tensors.base import TensorSource

__all__ = ["open_adapter"]

# In a folder, the weights are the first of these that is there.
WEIGHT_NAMES = (
    "adapter_model.safetensors",
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
)


def open_adapter(
    ref: str | os.PathLike[str] | Mapping[str, Any],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
) -> Adapter:
    """Open an adapter: headers and configuration only.

    Args:
        ref: a folder, a weight file, or a state dict (which needs ``config``).
        config: the configuration, where it does not lie beside the weights: a path, or the parsed JSON.
        alpha: overrides ``lora_alpha``.
        allow_pickle: read ``.bin`` and ``.pt`` files.
        blockwise_experts: read the B of fused experts as expert-slowest (unsloth before 2026-09).

    Raises:
        NotFound: no such file, or a folder without adapter weights.
        CorruptFile: a file breaks the rules of its format.
        BadConfig: a field of the configuration cannot be.
        Unsupported: a pickle, without leave to read it.
    """
    given = (
        dict(config) if hasattr(config, "keys") else read_config(Path(config)) if config is not None else None
    )  # type: ignore[call-overload, arg-type]
    if isinstance(ref, (str, os.PathLike)):
        weights, beside = _locate(local_path(ref))
        source, name = _open_weights(weights, allow_pickle), os.fspath(ref)
        raw = given if given is not None else (read_config(beside) if beside is not None else {})
        where: object = beside or name
    else:
        source, name, raw, where = MemorySource(ref), "the state dict", given or {}, "config"
    if alpha is not None:
        raw = {**raw, "lora_alpha": alpha, "alpha": alpha, "alpha_pattern": {}}
        if "peft_type" not in raw and any(key.endswith(".lora_A.weight") for key in source.specs):
            raw = {"peft_type": "LORA", "r": _common_rank(source), **raw}
    if _is_peft(raw, source, name):
        adapter = read_peft(name, source, parse_config({"peft_type": "LORA", **raw}, where), _evidence(where))
    else:
        adapter = recognise(name, source, raw)
    if blockwise_experts:
        adapter = with_blockwise(adapter)
    return adapter


def _is_peft(raw: Mapping[str, Any], source: TensorSource, name: str) -> bool:
    """Whether the configuration speaks of these weights: a model may lie in the same folder as an adapter."""
    if "peft_type" not in raw and raw.get("r") is None:
        return False
    return not name.endswith(".safetensors") or Path(name).name in WEIGHT_NAMES or has_peft_keys(source)


def _evidence(where: object) -> str:
    return f"peft_type in {Path(str(where)).name}"


def _common_rank(source: TensorSource) -> int:
    ranks = {
        spec.shape[0] for key, spec in source.specs.items() if key.endswith(".lora_A.weight") and spec.shape
    }
    if len(ranks) != 1:
        raise BadConfig(
            f"the file has ranks {sorted(ranks)} and no configuration says which alpha belongs to which",
            hint="pass its adapter_config.json with --config",
        )
    return ranks.pop()


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The weight file, and the configuration beside it if there is one.

    Raises:
        NotFound: neither a file nor a folder with adapter weights.
        AmbiguousFormat: a folder of several adapters.
    """
    if not path.exists():
        raise NotFound(f"{path}: no such file or folder")
    if path.is_file():
        if path.name == CONFIG_NAME:
            return _locate(path.parent)
        config = path.parent / CONFIG_NAME
        return path, (config if config.exists() else None)
    for name in WEIGHT_NAMES:
        if (path / name).exists():
            config = path / CONFIG_NAME
            return path / name, (config if config.exists() else None)
    nested = sorted(config.parent.name for config in path.glob(f"*/{CONFIG_NAME}"))
    if nested:
        raise AmbiguousFormat(
            f"{path} holds adapters in folders of their own: {', '.join(nested)}", hint="name one"
        )
    loose = sorted(path.glob("*.safetensors"))
    if len(loose) == 1:
        return loose[0], (path / CONFIG_NAME if (path / CONFIG_NAME).exists() else None)
    if (path / CONFIG_NAME).exists():
        raise NotFound(
            f"{path} has {CONFIG_NAME} but no adapter_model.safetensors", hint="the download is incomplete"
        )
    raise NotFound(f"{path} holds no adapter", hint="an adapter folder has adapter_model.safetensors in it")


def _open_weights(path: Path, allow_pickle: bool) -> TensorSource:
    if path.suffix in SUFFIXES:
        return PickledFile(path, allow_pickle=allow_pickle)
    if path.suffix == ".gguf":
        raise UnknownFormat(f"{path} is GGUF, which this build does not read")
    if path.suffix == ".npz":
        raise UnknownFormat(f"{path} is a numpy archive, which this build does not read")
    return SafetensorsFile(path)
