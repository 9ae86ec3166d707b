"""Small bases and adapters with the real names of a diffusion family, for tests of what is merged where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from loratools.architectures.base import architecture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from loratools.architectures.base import Weight

Arrays = dict[str, np.ndarray]
SHRINK = 32  # what the widths of a family are divided by
# What stands before the names of each component in a single-file checkpoint.
CHECKPOINTS = {
    "sd1": {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."},
    "sdxl": {
        "unet": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "flux1": {"transformer": ""},
}


def small(shape: tuple[int, ...], shrink: int = SHRINK) -> tuple[int, ...]:
    """A shape of the family with its widths divided; kernels stay, and inputs of several sizes have four channels."""
    return tuple(
        size if axis > 1 else max(1, size // shrink) if size else 4 for axis, size in enumerate(shape)
    )


def weights(family: str, keep: Callable[[Weight], bool] = lambda _: True) -> Iterable[Weight]:
    """The weights of a family's components that its checkpoints hold."""
    for component in architecture(family).components:
        if component.name in CHECKPOINTS[family]:
            yield from (weight for weight in component.weights if keep(weight))


def checkpoint(family: str, keep: Callable[[Weight], bool] = lambda _: True, seed: int = 0) -> Arrays:
    """A small single-file checkpoint, under the original names, with biases beside the matrices."""
    rng = np.random.default_rng(seed)
    found = {}
    for weight in weights(family, keep):
        prefix, shape = CHECKPOINTS[family][weight.component], small(weight.shape)
        found[prefix + weight.key] = rng.standard_normal(shape).astype(np.float32)
        if weight.tensor in {"weight", "in_proj_weight"}:
            bias = weight.key.removesuffix("weight") + "bias"
            found[prefix + bias] = rng.standard_normal(shape[0]).astype(np.float32)
    return found


def pipeline_tensors(
    family: str, keep: Callable[[Weight], bool] = lambda _: True, seed: int = 0
) -> dict[str, Arrays]:
    """The same weights as diffusers stores them: by component, each part by itself."""
    rng = np.random.default_rng(seed)
    found: dict[str, Arrays] = {}
    for weight in weights(family, keep):
        mine = found.setdefault(weight.component, {})
        for part in weight.parts:
            shape = (small((part.stop - part.start,))[0], *small(weight.shape)[1:])
            mine[f"{part.name}.weight"] = rng.standard_normal(shape).astype(np.float32)
            mine[f"{part.name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
    return found


def factors(
    stem: str, out: int, into: int, *, rank: int = 2, alpha: float | None = 1.0, kernel: tuple[int, ...] = (),
    seed: int = 0,
) -> Arrays:  # fmt: skip
    """One LoRA module as kohya's scripts write it."""
    rng = np.random.default_rng([seed, *stem.encode()])
    found = {
        f"{stem}.lora_down.weight": rng.standard_normal((rank, into, *kernel)).astype(np.float32),
        f"{stem}.lora_up.weight": rng.standard_normal((out, rank, *(1 for _ in kernel))).astype(np.float32),
    }
    if alpha is not None:
        found[f"{stem}.alpha"] = np.array(alpha, np.float32)
    return found


def delta(tensors: Mapping[str, np.ndarray], stem: str) -> np.ndarray:
    """What kohya's scripts add for a module: alpha / rank times up times down, in float64, as a matrix."""
    down, up = (tensors[f"{stem}.lora_{role}.weight"].astype(np.float64) for role in ("down", "up"))
    rank = down.shape[0]
    alpha = float(tensors.get(f"{stem}.alpha", np.array(rank)))
    return up.reshape(up.shape[0], -1) @ down.reshape(rank, -1) * (alpha / rank)


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata=metadata)
    return path


def write_pipeline(folder: Path, components: Mapping[str, Arrays], **besides: bytes) -> Path:
    """A pipeline's folder: its components with a configuration each, an autoencoder and what else is given."""
    import json

    listed = {name: ["diffusers", "Model"] for name in [*components, "vae"]}
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **listed}))
    for name, tensors in components.items():
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        write(folder / name / f"{stem}.safetensors", tensors, {"format": "pt"})
        (folder / name / "config.json").write_text(
            '{"dtype": "float32"}' if name.startswith("text") else "{}"
        )
    write(
        folder / "vae" / "diffusion_pytorch_model.safetensors", {"conv.weight": np.ones((2, 2), np.float32)}
    )
    for name, content in besides.items():
        (folder / name).write_bytes(content)
    return folder
