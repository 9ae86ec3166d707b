"""A small model in the manner of Flux, and adapters of it in kohya's keys, each with the matrices it stands for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools.architectures.base import Architecture, Component, Part, Weight, architecture
from loratools.formats.fusing import split_adapter
from loratools.formats.opening import Opened, interpret
from loratools.formats.registry import find_format
from loratools.tensors.memory import MemorySource
from loratools.tensors.views import Gathered

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.adapter import Adapter, Module
    from loratools.formats.registry import Written


def _weight(
    component: str, native: str, shape: tuple[int, ...], *parts: tuple[str, int], swapped: bool = False
) -> Weight:
    stops = np.cumsum([rows for _, rows in parts]).tolist()
    made = tuple(Part(name, stop - rows, stop) for (name, rows), stop in zip(parts, stops, strict=True))
    return Weight(component, native, shape, made, swapped=swapped)


_BLOCK, _SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
FUSED = _weight(
    "transformer", "double_blocks.0.img_attn.qkv", (36, 12),
    (f"{_BLOCK}.to_q", 12), (f"{_BLOCK}.to_k", 12), (f"{_BLOCK}.to_v", 12),
)  # fmt: skip
UNEVEN = _weight(
    "transformer", "single_blocks.0.linear1", (28, 12),
    (f"{_SINGLE}.attn.to_q", 6), (f"{_SINGLE}.attn.to_k", 6), (f"{_SINGLE}.attn.to_v", 6), (f"{_SINGLE}.proj_mlp", 10),
)  # fmt: skip
SWAPPED = _weight(
    "transformer", "final_layer.adaLN_modulation.1", (16, 12), ("norm_out.linear", 16), swapped=True
)
CONV = _weight("transformer", "img_in", (8, 6, 3, 3), ("x_embedder", 8))
PLAIN = _weight("transformer", "double_blocks.0.img_attn.proj", (12, 10), (f"{_BLOCK}.to_out.0", 12))
NORM = _weight("transformer", "double_blocks.0.img_norm", (12,), ("transformer_blocks.0.norm", 12))
_PATH = "text_model.encoder.layers.0.self_attn.q_proj"
TEXT = _weight("text_encoder", _PATH, (8, 6), (_PATH, 8))
SMALL = Architecture(
    "small", "Small Flux", (),
    (
        Component(
            "transformer", ("lora_unet",), "native", ("diffusion_model", "model.diffusion_model", ""),
            (FUSED, UNEVEN, SWAPPED, CONV, PLAIN, NORM), "diffusion_model",
        ),
        Component(
            "text_encoder", ("lora_te1", "lora_te"), "diffusers", ("text_encoders.clip_l.transformer",), (TEXT,),
            "text_encoders.clip_l.transformer", "diffusers",
        ),
    ),
)  # fmt: skip
STEMS = {
    weight.native: ("lora_te1_" if weight is TEXT else "lora_unet_") + weight.native.replace(".", "_")
    for weight in (FUSED, UNEVEN, SWAPPED, CONV, PLAIN, NORM, TEXT)
}


@dataclass
class File:
    """A file in kohya's keys.

    Attributes:
        tensors: by key.
        deltas: what each weight of the original checkpoint gets, seen as a matrix in float64.
    """

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    deltas: dict[str, np.ndarray] = field(default_factory=dict)

    def add(
        self, weight: Weight, kind: str, *, seed: int = 0, rank: int = 2, dtype: Any = np.float32
    ) -> File:
        """A module of a kind, with its matrix computed by the definition of the kind."""
        rng = np.random.default_rng([seed, len(self.tensors)])
        out, into, kernel = weight.shape[0], (weight.shape[1:] or (1,))[0], weight.shape[2:]
        ones = tuple(1 for _ in kernel)

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(dtype)

        made, delta = getattr(self, f"_{kind}")(draw, out, into, kernel, ones, rank)
        self.tensors |= {f"{STEMS[weight.native]}.{key}": value for key, value in made.items()}
        self.deltas[weight.native] = delta
        return self

    @staticmethod
    def _lora(
        draw: Any, out: int, into: int, kernel: tuple[int, ...], ones: tuple[int, ...], rank: int
    ) -> Any:
        down, up = draw(rank, into, *kernel), draw(out, rank, *ones)
        delta = 1.5 * up.reshape(out, rank).astype(float) @ down.reshape(rank, -1).astype(float)
        return {
            "lora_down.weight": down,
            "lora_up.weight": up,
            "alpha": np.array(1.5 * rank, np.float32),
        }, delta

    @staticmethod
    def _cp(draw: Any, out: int, into: int, kernel: tuple[int, ...], ones: tuple[int, ...], rank: int) -> Any:
        down, up, mid = draw(rank, into, *ones), draw(out, rank, *ones), draw(rank, rank, *kernel)
        factors = (
            mid.astype(float),
            up.reshape(out, rank).astype(float),
            down.reshape(rank, into).astype(float),
        )
        delta = np.einsum("mnkl,im,nj->ijkl", *factors).reshape(out, -1)
        return {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid}, delta

    @staticmethod
    def _loha(
        draw: Any, out: int, into: int, kernel: tuple[int, ...], ones: tuple[int, ...], rank: int
    ) -> Any:
        width = into * int(np.prod(kernel))
        made = {"hada_w1_a": draw(out, rank), "hada_w1_b": draw(rank, width)}
        made |= {"hada_w2_a": draw(out, rank), "hada_w2_b": draw(rank, width)}
        one, two = ((made[f"hada_w{i}_a"].astype(float) @ made[f"hada_w{i}_b"].astype(float)) for i in (1, 2))
        return {**made, "alpha": np.array(3.0, np.float32)}, 3.0 / rank * one * two

    @staticmethod
    def _lokr(
        draw: Any, out: int, into: int, kernel: tuple[int, ...], ones: tuple[int, ...], rank: int
    ) -> Any:
        left, a, b = draw(2, 2), draw(out // 2, rank), draw(rank, into // 2 * int(np.prod(kernel)))
        right = (a.astype(float) @ b.astype(float)).reshape(out // 2, into // 2, -1)
        delta = np.einsum("ij,klm->ikjlm", left.astype(float), right).reshape(out, -1) * 3.0 / rank
        return {"lokr_w1": left, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": np.array(3.0, np.float32)}, delta

    @staticmethod
    def _full(
        draw: Any, out: int, into: int, kernel: tuple[int, ...], ones: tuple[int, ...], rank: int
    ) -> Any:
        diff = draw(out, into, *kernel)
        return {"diff": diff}, diff.astype(float).reshape(out, -1)

    @staticmethod
    def _norm(
        draw: Any, out: int, into: int, kernel: tuple[int, ...], ones: tuple[int, ...], rank: int
    ) -> Any:
        diff = draw(out)
        return {"w_norm": diff}, diff.astype(float).reshape(out, 1)

    def adapter(self) -> Adapter:
        """As the reader finds it."""
        return interpret(Opened("file", MemorySource(self.tensors), {}, "file"))


def parts(weight: Weight, delta: np.ndarray) -> dict[str, np.ndarray]:
    """What the modules of diffusers get of a weight's delta."""
    if weight.swapped:
        half = delta.shape[0] // 2
        delta = np.concatenate([delta[half:], delta[:half]])
    return {f"{weight.component}.{part.name}": delta[part.start : part.stop] for part in weight.parts}


def expected(file: File) -> dict[str, np.ndarray]:
    """Every module of diffusers with its matrix."""
    every = {weight.native: weight for component in SMALL.components for weight in component.weights}
    found: dict[str, np.ndarray] = {}
    for native, delta in file.deltas.items():
        found |= parts(every[native], delta)
    return found


def write(adapter: Adapter, form: str) -> Written:
    """In a format, as one of the small model's adapters."""
    return find_format(form).write(adapter, SMALL)


def read(written: Written, config: Mapping[str, Any] | None = None) -> Adapter:
    """As the reader finds what was written."""
    raw = json.loads(written.files.get("adapter_config.json", b"{}")) if config is None else config
    return interpret(Opened("written", Gathered(written.tensors, written.metadata), raw, "written"))


def deltas(adapter: Adapter) -> dict[str, np.ndarray]:
    """What each module of diffusers gets, in float64, computed by the package's own loaders."""
    if adapter.format == "peft":
        from dataclasses import replace

        modules = {f"transformer.{name}": module for name, module in adapter.modules.items()}
        adapter = replace(adapter, modules=modules)
    split = split_adapter(adapter, SMALL)
    found = {name: _matrix(module) for name, module in split.modules.items()}
    for kept in split.whole.values():
        found |= parts(kept.place.weight, _matrix(kept.module))
    return found


def _matrix(module: Module) -> np.ndarray:
    update: Any = module.load(double=True)
    return update.rows(0, module.shape[0])


# --- files of real models, at their real shapes -------------------------------------------------------------

SD1 = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.proj_in",
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.11.mlp.fc1",
)
FLUX = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "single_blocks.0.linear2")


def kohya_sd1(dtype: Any = np.float16) -> dict[str, np.ndarray]:
    """A few modules of Stable Diffusion 1 in kohya's keys, at their real shapes."""
    rng, tensors = np.random.default_rng(0), {}
    for name in SD1:
        place = architecture("sd1").canonical[name]
        prefix = "lora_te" if name.startswith("text_encoder.") else "lora_unet"
        stem = f"{prefix}_{name.partition('.')[2].replace('.', '_')}"
        out, into, *kernel = place.shape
        tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((2, into, *kernel)).astype(dtype)
        tensors[f"{stem}.lora_up.weight"] = rng.standard_normal((out, 2, *(1 for _ in kernel))).astype(dtype)
        tensors[f"{stem}.alpha"] = np.array(1.0, np.float32)
    return tensors


def kohya_flux(rank: int = 2) -> dict[str, np.ndarray]:
    """A few fused modules of FLUX.1 in kohya's keys, at their real shapes."""
    rng, tensors = np.random.default_rng(1), {}
    weights = {
        w.native: w for c in architecture("flux1").components for w in c.weights if c.name == "transformer"
    }
    for name in FLUX:
        stem = f"lora_unet_{name.replace('.', '_')}"
        out, into = weights[name].shape
        tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((rank, into)).astype(np.float16)
        tensors[f"{stem}.lora_up.weight"] = rng.standard_normal((out, rank)).astype(np.float16)
        tensors[f"{stem}.alpha"] = np.array(1.0, np.float32)
    return tensors
