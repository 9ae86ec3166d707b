"""What makes a folder of weights a checkpoint that loads: configuration, index, tokenizer, and nothing stale."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.planning import SmallFile
from loratools.provenance import RECORD_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from loratools.models import BaseModel
    from loratools.planning import Output, OutputFile
    from loratools.tensors.base import TensorSpec

__all__ = ["Beside", "component_files", "edit_config", "index_file", "shard_names", "small_files"]

CONFIG_NAME = "config.json"

# Files that hold weights, or an unmerged copy of the model in another format.
_WEIGHT_SUFFIXES = {
    ".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".keras",
    ".msgpack", ".ot", ".tflite", ".mlmodel", ".mlpackage", ".npz", ".pkl", ".pickle", ".joblib", ".engine", ".xml",
}  # fmt: skip
_WEIGHT_STARTS = ("consolidated", "pytorch_model", "tf_model", "flax_model", "rust_model", "openvino_model")
_SKIPPED_FOLDERS = {".git", ".cache", ".huggingface", "__pycache__"}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Beside:
    """The files beside the weights.

    Attributes:
        files: to be written.
        left_out: files of the base that would carry the unmerged model along, and links that lead out of it.
    """

    files: tuple[SmallFile, ...]
    left_out: tuple[str, ...]


def small_files(base: BaseModel, config: Mapping[str, Any], tokenizer_from: Path | None) -> Beside:
    """What goes beside the merged weights of a folder; for a pipeline, also the components that no adapter is for.

    Args:
        base: where the files come from.
        config: what ``config.json`` shall say, if that differs from the base's.
        tokenizer_from: the adapter's folder, where the adapter has resized the vocabulary.
    """
    assert base.path is not None
    indexes = {f"{folder}/{model.index_name}" for folder, model in base.components.items()}
    own = {*base.files, *indexes, base.index_name, RECORD_NAME}
    # Links are followed where the weights' own links lead (a Hub cache's blobs), and no further: a folder from a
    # stranger could otherwise carry any file of this machine along.
    inside = [base.path.resolve(), *{(base.path / file).resolve().parent for file in base.files}]
    copied, left_out = {}, []
    for path in _walk(base.path):
        name = path.relative_to(base.path).as_posix()
        if name in own:
            continue
        if (_is_weights(path) and not _is_apart(name, base)) or not any(
            path.resolve().is_relative_to(root) for root in inside
        ):
            left_out.append(name)
        else:
            copied[name] = SmallFile(name, source=path)
    # A link to a folder is not walked into; a pipeline would lack what lies there.
    if base.components:
        left_out += sorted(f"{one.name}/" for one in base.path.iterdir() if one.is_symlink() and one.is_dir())
    if tokenizer_from is not None:
        for name in _TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                copied[name] = SmallFile(name, source=tokenizer_from / name)
    if config != base.config:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        copied[CONFIG_NAME] = SmallFile(CONFIG_NAME, content=text.encode())
    return Beside(tuple(copied.values()), tuple(left_out))


def _is_apart(name: str, base: BaseModel) -> bool:
    """Whether a pipeline's file belongs to a component that is not merged into, and so is needed as it is."""
    folder, _, rest = name.partition("/")
    return bool(base.components) and bool(rest) and folder not in base.components


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(root, name)
            if path.is_file():  # through a link, as a Hub cache has them; never a socket or a pipe
                yield path


def _is_weights(path: Path) -> bool:
    name = path.name.lower()
    if any(name.endswith(suffix) for suffix in _WEIGHT_SUFFIXES) or name.endswith(".index.json"):
        return True
    return name.startswith(_WEIGHT_STARTS)


def edit_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some fields set: where they stand now, in the text model's part if that has them.

    >>> edit_config({"text_config": {"vocab_size": 10}}, {"vocab_size": 12})
    {'text_config': {'vocab_size': 12}}
    """
    edited = dict(config)
    text = config.get("text_config")
    for name, value in changes.items():
        if isinstance(text, dict) and name in text:
            edited["text_config"] = {**edited["text_config"], name: value}
            if name in config:
                edited[name] = value
        else:
            edited[name] = value
    return edited


def index_file(
    name: str, files: Iterable[OutputFile], weight_map: Mapping[str, str], sizes: Mapping[str, TensorSpec]
) -> SmallFile:
    """The index of a sharded checkpoint. ``total_size`` counts the bytes of the tensors."""
    order = [file.name for file in files]
    index = {
        "metadata": {
            "total_parameters": sum(spec.count for spec in sizes.values()),
            "total_size": sum(spec.nbytes for spec in sizes.values()),
        },
        "weight_map": dict(sorted(weight_map.items(), key=lambda item: (order.index(item[1]), item[0]))),
    }
    return SmallFile(name, content=json.dumps(index, indent=2).encode() + b"\n")


def component_files(
    base: BaseModel,
    changes: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, Iterable[Output]],
    files: Iterable[OutputFile],
) -> list[SmallFile]:
    """The configurations and the indexes of a pipeline's components.

    Args:
        base: the pipeline.
        changes: fields to set, by component.
        outputs: the tensors written, by file.
        files: the files laid out.
    """
    made = []
    for folder, model in base.components.items():
        if changes.get(folder):
            config = edit_config(model.config, changes[folder])
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            made.append(SmallFile(f"{folder}/{CONFIG_NAME}", content=text.encode()))
        if model.index_name is not None:
            start = f"{folder}/"
            mine = {file: list(listed) for file, listed in outputs.items() if file.startswith(start)}
            weight_map = {
                output.name.removeprefix(start): file.removeprefix(start)
                for file, listed in mine.items()
                for output in listed
            }
            specs = {output.name: output.spec for listed in mine.values() for output in listed}
            shards = [
                replace(file, name=file.name.removeprefix(start)) for file in files if file.name in mine
            ]
            made.append(
                replace(
                    index_file(model.index_name, shards, weight_map, specs), name=start + model.index_name
                )
            )
    return made


def shard_names(count: int) -> list[str]:
    """File names of a checkpoint in ``count`` shards, as transformers numbers them.

    >>> shard_names(1), shard_names(2)
    (['model.safetensors'], ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'])
    """
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
