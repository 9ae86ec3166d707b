"""Adapters of small language models, for the tests of MLX, GGUF and loralib: from seeds, with what they add."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import loratools as lt
from loratools.matrices import matrices
from loratools.tensors.memory import MemorySource, from_bytes
from loratools.verbs.saving import write

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.adapter import Adapter
    from loratools.formats.registry import Written

HEADS, KEY_HEADS, WIDTH, INNER, VOCABULARY = 4, 2, 16, 24, 20
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH * KEY_HEADS // HEADS, WIDTH),
    "self_attn.v_proj": (WIDTH * KEY_HEADS // HEADS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
CONFIG = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "tie_word_embeddings": False}
PREFIX = "base_model.model."


@dataclass
class Made:
    """A PEFT adapter's state and configuration, and what it adds to each weight, in float64."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    config: dict[str, Any] = field(default_factory=dict)
    deltas: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def adapter(self) -> Adapter:
        return lt.load(self.tensors, config=self.config)


def made(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float] | float = 8,
    *,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    kind: Any = np.float32,
    seed: int = 0,
    use_rslora: bool = False,
    **config: Any,
) -> Made:
    """An adapter with a rank, and perhaps an alpha, for each module; embeddings are told by their name."""
    rng = np.random.default_rng(seed)
    result = Made()
    known = {f"model.layers.{i}.{name}": shape for i in range(4) for name, shape in SHAPES.items()}
    known |= {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH), **(shapes or {})}
    given = alphas if not isinstance(alphas, (int, float)) else dict.fromkeys(ranks, alphas)
    for path, rank in ranks.items():
        out, into = known[path]
        embedding = path.endswith("embed_tokens")
        down = rng.standard_normal((rank, out if embedding else into)).astype(kind)
        up = rng.standard_normal((into if embedding else out, rank)).astype(kind)
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        result.tensors |= {
            f"{PREFIX}{path}.{name}": values for name, values in zip(names, (down, up), strict=True)
        }
        scaling = given[path] / (math.sqrt(rank) if use_rslora else rank)
        delta = scaling * (up.astype(np.float64) @ down.astype(np.float64))
        result.deltas[path] = delta.T if embedding else delta
    first = next(iter(ranks), None)
    result.config = {
        "peft_type": "LORA", "r": ranks[first] if first else 8, "lora_alpha": given[first] if first else 8,
        "rank_pattern": {f"^{path.replace('.', chr(92) + '.')}": rank for path, rank in ranks.items()},
        "alpha_pattern": {f"^{path.replace('.', chr(92) + '.')}": given[path] for path in ranks},
        "use_rslora": use_rslora, "target_modules": sorted({path.rpartition(".")[2] for path in ranks}), **config,
    }  # fmt: skip
    return result


paths = st.sets(
    st.sampled_from(
        [f"model.layers.{i}.{name}" for i in range(3) for name in SHAPES] + ["model.embed_tokens"]
    ),
    min_size=1,
    max_size=5,
).map(sorted)


@st.composite
def adapters(draw: Any) -> tuple[Made, str, bool]:
    """An adapter, its type, and whether all of its modules have one rank and one scale."""
    chosen = draw(paths)
    rank, alpha = st.integers(1, 5), st.sampled_from([1, 2, 3, 8, 16.5, -4, 0, 0.1])
    uniform = draw(st.booleans())
    ranks = dict.fromkeys(chosen, draw(rank)) if uniform else {path: draw(rank) for path in chosen}
    alphas = dict.fromkeys(chosen, draw(alpha)) if uniform else {path: draw(alpha) for path in chosen}
    name = draw(st.sampled_from(sorted(DTYPES)))
    seed, rslora = draw(st.integers(0, 1 << 30)), draw(st.booleans())
    return made(ranks, alphas, kind=DTYPES[name], seed=seed, use_rslora=rslora), name, uniform


def arrays(written: Written) -> dict[str, np.ndarray]:
    """The tensors that would be written, in their own types."""
    return {
        key: from_bytes(ref.source.read_bytes(ref.name), ref.spec, torch_out=False)
        for key, ref in written.tensors.items()
    }


def source(written: Written) -> MemorySource:
    return MemorySource(arrays(written), written.metadata)


def deltas(adapter: Adapter) -> dict[str, np.ndarray]:
    """What each module adds to its weight, in float64; an embedding's the way its weight lies."""
    found = {}
    for path, module in adapter.modules.items():
        (factors,) = matrices(module, path, double=True)
        delta = factors.up @ factors.down
        found[path] = delta.T if module.options.get("embedding") else delta
    return found


def assert_same(
    found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: float = 3e-7
) -> None:
    """The same modules, with the same deltas but for float32 rounding."""
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        error = np.linalg.norm(found[path] - delta)
        assert error <= tolerance * np.linalg.norm(delta) + 1e-30, path


def as_peft(adapter: Adapter) -> Adapter:
    """An adapter written in PEFT's terms and read again."""
    written = write(adapter, "peft")
    return lt.load(arrays(written), config=json.loads(written.files["adapter_config.json"]))


def assert_same_factors(one: Adapter, other: Adapter, tolerance: float = 1e-12) -> None:
    """The same modules, bit for bit, and the same scaling."""
    assert one.modules.keys() == other.modules.keys()
    for path, module in one.modules.items():
        assert math.isclose(module.scaling or 0, other.modules[path].scaling or 0, rel_tol=tolerance), path
        for role, ref in module.tensors.items():
            again = other.modules[path].tensors[role]
            assert ref.spec == again.spec, (path, role)
            assert np.array_equal(ref.source.read_bytes(ref.name), again.source.read_bytes(again.name)), path
