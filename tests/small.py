"""A base of a few kilobytes and an adapter that fits it, for tests about files rather than mathematics."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from tests.helpers import make_adapter

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, OUT, INTO = 4, 12, 8
SHAPES = {f"layers.{i}.q_proj": (OUT, INTO) for i in range(LAYERS)}


def base_tensors(kind: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """For each layer a weight the adapter changes, and a norm it does not; and an embedding."""
    rng = np.random.default_rng(seed)
    shapes = {f"{path}.weight": shape for path, shape in SHAPES.items()}
    shapes |= {f"layers.{i}.norm.weight": (INTO,) for i in range(LAYERS)}
    shapes["embed.weight"] = (20, INTO)
    return {name: rng.standard_normal(shape, np.float32).astype(kind) for name, shape in shapes.items()}


def write_base(folder: Path, *, shards: int = 1, kind: Any = np.float32, seed: int = 0) -> Path:
    """A model folder, single or sharded, with a configuration beside the weights."""
    folder.mkdir(parents=True)
    tensors = base_tensors(kind, seed)
    (folder / "config.json").write_text(json.dumps({"model_type": "small", "hidden_size": INTO}))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_small_adapter(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """A LoRA on every ``q_proj`` of the base."""
    return make_adapter(folder, SHAPES, seed=seed, **config)


def contents(path: Path) -> dict[str, bytes]:
    """Every file under a folder, or the file itself, by its relative name."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
