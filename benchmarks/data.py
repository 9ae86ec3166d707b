"""The models and adapters the benchmarks merge: made from seeds, with numpy alone.

The base has the shapes of a 1.1-billion-parameter Llama (2.2 GB in bfloat16, five shards), the adapter rank 16 on all
linear layers, float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from loratools.dtypes import dtype
from loratools.tensors.base import TensorSpec
from loratools.tensors.header import layout

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions."""

    layers: int = 22
    hidden: int = 2048
    inner: int = 5632
    kv: int = 256
    vocabulary: int = 32000
    shards: int = 5

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module name to (out, in), within a layer."""
        h, i, kv = self.hidden, self.inner, self.kv
        return {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (i, h),
            "mlp.up_proj": (i, h),
            "mlp.down_proj": (h, i),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, in order."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for n in range(self.layers):
            for name, shape in self.linears.items():
                found[f"model.layers.{n}.{name}.weight"] = shape
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{n}.{norm}.weight"] = (self.hidden,)
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found


def write_base(folder: Path, shape: Shape) -> None:
    """Write the base, unless it is there."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: TensorSpec(dtype("BF16"), dims) for name, dims in shape.tensors().items()}
    share = sum(spec.nbytes for spec in specs.values()) / shape.shards
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if filled > share * len(shards) and len(shards) < shape.shards:
            shards.append([])
        shards[-1].append(name)
        filled += spec.nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, _ = layout(((name, specs[name]) for name in names), {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(header)
            for name in names:
                rng = np.random.default_rng(abs(hash_of(name)))
                values = rng.standard_normal(specs[name].count, np.float32) * np.float32(0.02)
                out.write(values.astype(ml_dtypes.bfloat16).tobytes())
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "config.json").write_text(json.dumps(llama_config(shape), indent=2))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def hash_of(name: str) -> int:
    """A seed for a tensor, the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def llama_config(shape: Shape) -> dict[str, object]:
    """The configuration transformers needs to load the base."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": max(1, 32 * shape.kv // shape.hidden),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def write_adapter(folder: Path, shape: Shape, rank: int = 16, alpha: int = 32) -> None:
    """Write the adapter, unless it is there. Its delta is about 2 % of each weight's norm."""
    if (folder / "adapter_config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for n in range(shape.layers):
        for name, (out, into) in shape.linears.items():
            key = f"base_model.model.model.layers.{n}.{name}"
            rng = np.random.default_rng(hash_of(key))
            scale = np.float32((0.02 * 0.02 / (alpha / rank) / rank**0.5) ** 0.5)
            arrays[f"{key}.lora_A.weight"] = rng.standard_normal((rank, into), np.float32) * scale
            arrays[f"{key}.lora_B.weight"] = rng.standard_normal((out, rank), np.float32) * scale
    write_arrays(folder, arrays, shape, rank, alpha)


def write_arrays(folder: Path, arrays: dict[str, np.ndarray], shape: Shape, rank: int, alpha: int) -> None:
    """An adapter folder of these float32 factors."""
    folder.mkdir(parents=True, exist_ok=True)
    header, _ = layout(((k, TensorSpec(dtype("F32"), v.shape)) for k, v in arrays.items()), {"format": "pt"})
    with (folder / "adapter_model.safetensors").open("wb") as out:
        out.write(header)
        for values in arrays.values():
            out.write(values.tobytes())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(name.split(".")[1] for name in shape.linears),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_tuned(base: Path, folder: Path, shape: Shape) -> None:
    """A fine-tune of the base, unless it is there: a signal of rank 64, 3 % of each matrix, and a little noise."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    matrices = {name.removesuffix(".weight") for name in shape.tensors() if name.endswith("_proj.weight")}
    for path in sorted(base.glob("*.safetensors")):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        with (folder / path.name).open("wb") as out:
            out.write(raw[: 8 + size])
            for name, entry in sorted(
                ((n, e) for n, e in header.items() if n != "__metadata__"),
                key=lambda item: item[1]["data_offsets"],
            ):
                first, last = (8 + size + offset for offset in entry["data_offsets"])
                if name.removesuffix(".weight") not in matrices:
                    out.write(raw[first:last])
                    continue
                before = np.frombuffer(raw[first:last], ml_dtypes.bfloat16).astype(np.float32)
                out.write((before + change(name, entry["shape"])).astype(ml_dtypes.bfloat16).tobytes())
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_bytes((base / name).read_bytes())


def change(name: str, shape: tuple[int, int], rank: int = 64) -> np.ndarray:
    """What the fine-tune adds to a matrix, flat."""
    rows, into = shape
    rank = min(rank, rows // 4)
    rng = np.random.default_rng([hash_of(name), 1])
    falling = (np.arange(rank) + 1.0) ** -0.8 * np.exp(-np.arange(rank) / rank)
    size = 0.03 * 0.02 / np.sqrt(np.sum(falling**2))
    up = rng.standard_normal((rows, rank), np.float32) * (falling * size).astype(np.float32)
    signal = up @ rng.standard_normal((rank, into), np.float32)
    signal += rng.standard_normal((rows, into), np.float32) * np.float32(3e-5)
    return signal.reshape(-1)
