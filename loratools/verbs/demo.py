"""A small Llama-shaped model and a LoRA for it, made from a seed with numpy alone, to try the verbs on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter import Adapter, AdapterConfig, Module
from loratools.checkpoints import index_file, shard_names
from loratools.dtypes import DTYPES, narrow
from loratools.errors import OutputExists
from loratools.formats.peft_writing import write_peft
from loratools.planning import OutputFile
from loratools.tensors.base import TensorRef, TensorSpec
from loratools.tensors.header import layout
from loratools.tensors.memory import MemorySource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from loratools.dtypes import Array

__all__ = ["Demo", "build_demo", "require_empty"]

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 256, 704, 4, 8, 4, 1024
SHARDS = 3
RANK, ALPHA = 8, 16
# Name -> (out, in), for every linear layer of a block.
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


@dataclass(frozen=True, slots=True)
class Demo:
    """Where a demonstration's files are.

    Attributes:
        base: a sharded bf16 checkpoint.
        adapter: a PEFT folder.
        merged: where a merge may go; not there yet.
    """

    base: Path
    adapter: Path
    merged: Path


def require_empty(folder: Path) -> None:
    """Refuse a folder that has something in it.

    Raises:
        OutputExists: it has, or is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise OutputExists(
            f"{folder} exists and is not an empty folder", hint="name one that is not there yet"
        )


def build_demo(folder: Path, *, seed: int = 0) -> Demo:
    """Write a model and an adapter.

    Args:
        folder: must be empty; ``base`` and ``adapter`` appear in it.
        seed: the same seed gives the same files on one machine.

    Raises:
        OutputExists: the folder is not empty.
    """
    import numpy as np

    require_empty(folder)
    random = np.random.default_rng(seed)
    made = Demo(folder / "base", folder / "adapter", folder / "merged")
    for path in (made.base, made.adapter):
        path.mkdir(parents=True)
    _write_base(made.base, random)
    _write_adapter(made.adapter, random)
    return made


def _write_base(folder: Path, random: np.random.Generator) -> None:
    shapes = _base_shapes()
    specs = {name: TensorSpec(DTYPES["BF16"], shape) for name, shape in shapes.items()}
    per_shard = math.ceil(len(shapes) / SHARDS)
    names = list(shapes)
    files: list[OutputFile] = []
    weight_map: dict[str, str] = {}
    for number, file in enumerate(shard_names(SHARDS)):
        inside = names[number * per_shard : (number + 1) * per_shard]
        values = {name: _base_values(shapes[name], random) for name in inside}
        files.append(_write_safetensors(folder / file, {name: specs[name] for name in inside}, values))
        weight_map |= dict.fromkeys(inside, file)
    index = index_file("model.safetensors.index.json", files, weight_map, specs)
    (folder / index.name).write_bytes(index.read())
    _write_json(folder / "config.json", _config())


def _base_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (HIDDEN,)
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in LINEAR.items()}
        shapes[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN,)
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _base_values(shape: Sequence[int], random: np.random.Generator) -> Array:
    """Ones for a norm, and for a matrix what a fresh model has: a standard deviation of 0.02."""
    import numpy as np

    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return random.standard_normal(shape, np.float32) * np.float32(0.02)


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _write_adapter(folder: Path, random: np.random.Generator) -> None:
    """Factors as a short training leaves them: A as it was drawn, B small."""
    modules = {}
    for layer in range(LAYERS):
        for name, shape in LINEAR.items():
            path = f"model.layers.{layer}.{name}"
            bound = 1 / math.sqrt(shape[1])
            factors = {
                "down": random.uniform(-bound, bound, (RANK, shape[1])).astype("float32"),
                "up": random.normal(0, 0.01, (shape[0], RANK)).astype("float32"),
            }
            source = MemorySource({f"{path}.{role}": values for role, values in factors.items()})
            refs = {role: TensorRef(source, f"{path}.{role}") for role in factors}
            modules[path] = Module("lora", refs, RANK, ALPHA, ALPHA / RANK, shape)
    targets = {"target_modules": [name.rpartition(".")[2] for name in LINEAR], "task_type": "CAUSAL_LM"}
    config = AdapterConfig("LORA", "base", {"peft_type": "LORA", **targets})
    tensors, raw = write_peft(Adapter("the demonstration", "peft", modules, config, {}, {}))
    values = {key: ref.load() for key, ref in tensors.items()}
    _write_safetensors(
        folder / "adapter_model.safetensors", {key: ref.spec for key, ref in tensors.items()}, values
    )
    _write_json(folder / "adapter_config.json", raw)


def _write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], values: Mapping[str, Array]
) -> OutputFile:
    """Write one file whole, and say what it is for an index."""
    import numpy as np

    header, _ = layout(specs.items(), {"format": "pt"})
    with path.open("xb") as file:
        file.write(header)
        for name, spec in specs.items():
            file.write(narrow(values[name], spec.dtype, np.empty(spec.nbytes, np.uint8)).tobytes())
        return OutputFile(path.name, header, file.tell())


def _write_json(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
