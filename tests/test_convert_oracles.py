"""What diffusers and PEFT make of converted files: loaded into small models, they change the weights as they should."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.architectures.base import Architecture, Component, Part, Weight
from loratools.formats.opening import Opened, interpret
from loratools.tensors.memory import MemorySource

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

torch = pytest.importorskip("torch", reason="diffusers needs it")
pytest.importorskip("diffusers", reason="diffusers is the oracle")
HIDDEN, MLP = 12, 48
# Native name, inputs, and diffusers' modules with their rows, of a Flux of this size.
FUSED: dict[str, tuple[int, tuple[tuple[str, int], ...]]] = {
    "double_blocks.0.img_attn.qkv": (HIDDEN, tuple((f"transformer_blocks.0.attn.to_{x}", HIDDEN) for x in "qkv")),
    "double_blocks.0.txt_attn.qkv": (
        HIDDEN, tuple((f"transformer_blocks.0.attn.add_{x}_proj", HIDDEN) for x in "qkv"),
    ),
    "single_blocks.0.linear1": (
        HIDDEN,
        (*((f"single_transformer_blocks.0.attn.to_{x}", HIDDEN) for x in "qkv"),
         ("single_transformer_blocks.0.proj_mlp", MLP)),
    ),
    "single_blocks.0.linear2": (HIDDEN + MLP, (("single_transformer_blocks.0.proj_out", HIDDEN),)),
    "final_layer.adaLN_modulation.1": (HIDDEN, (("norm_out.linear", 2 * HIDDEN),)),
}  # fmt: skip


def small_flux() -> Architecture:
    """FLUX.1 with one block of each sort, at a width of 12."""
    weights = []
    for native, (into, named) in FUSED.items():
        starts = np.cumsum([0, *(rows for _, rows in named)]).tolist()
        parts = tuple(Part(name, starts[i], starts[i + 1]) for i, (name, _) in enumerate(named))
        weights.append(
            Weight("transformer", native, (starts[-1], into), parts, swapped=native.startswith("final"))
        )
    component = Component("transformer", ("lora_unet",), "native", ("diffusion_model", ""), tuple(weights))
    return Architecture("tiny", "Tiny Flux", (), (component,))


def kohya_file(*, dora: bool = False) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every fused weight adapted, and what each module of diffusers should get."""
    rng, tensors, wanted = np.random.default_rng(0), {}, {}
    for weight in small_flux().components[0].weights:
        stem = f"lora_unet_{weight.native.replace('.', '_')}"
        down, up = (
            rng.standard_normal(s).astype(np.float32) for s in ((2, weight.shape[1]), (weight.shape[0], 2))
        )
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = np.array(3.0, np.float32)
        if dora:
            tensors[f"{stem}.dora_scale"] = rng.random((weight.shape[0], 1)).astype(np.float32) + 0.5
        delta = 1.5 * up.astype(float) @ down.astype(float)
        if weight.swapped:
            delta = np.concatenate([delta[HIDDEN:], delta[:HIDDEN]])
        wanted |= {part.name: delta[part.start : part.stop] for part in weight.parts}
    return tensors, wanted


def written(form: str, folder: Path, *, dora: bool = False) -> Path:
    """The file in a format, in a folder as its readers expect it."""
    from loratools.formats.registry import find_format

    tensors, _ = kohya_file(dora=dora)
    adapter = interpret(Opened("file", MemorySource(tensors), {}, "file"))
    made = find_format(form).write(adapter, small_flux())
    assert not made.lost
    folder.mkdir()
    values = {key: ref.load() for key, ref in made.tensors.items()}
    save_file(values, folder / made.weights, metadata=dict(made.metadata))
    for name, content in made.files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def transformer() -> Iterator[Any]:
    """The model in diffusers, with weights from a seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own, on deprecated names
        from diffusers import FluxTransformer2DModel

        torch.manual_seed(0)
        yield FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=6, num_attention_heads=2,
            joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 2),
        )  # fmt: skip


def weights(model: Any, names: Any) -> dict[str, np.ndarray]:
    """The weights of some modules."""
    return {name: model.get_submodule(name).weight.detach().double().numpy().copy() for name in names}


def require_changed(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray], wanted: dict[str, np.ndarray]
) -> None:
    """Every weight changed by just what it should."""
    for name, delta in wanted.items():
        apart = np.linalg.norm(after[name] - before[name] - delta)
        assert apart <= 1e-6 * np.linalg.norm(delta), name


def test_diffusers_loads_and_fuses_what_was_fused_in_kohyas_file(transformer: Any, tmp_path: Path) -> None:
    folder = written("diffusers", tmp_path / "lora")
    _, wanted = kohya_file()
    before = weights(transformer, wanted)
    transformer.load_lora_adapter(
        str(folder), weight_name="pytorch_lora_weights.safetensors", prefix="transformer"
    )
    transformer.fuse_lora()
    transformer.unload_lora()
    require_changed(before, weights(transformer, wanted), wanted)


def test_diffusers_applies_the_magnitudes(transformer: Any, tmp_path: Path) -> None:
    folder = written("diffusers", tmp_path / "lora", dora=True)
    tensors, wanted = kohya_file(dora=True)
    before = weights(transformer, wanted)
    transformer.load_lora_adapter(
        str(folder), weight_name="pytorch_lora_weights.safetensors", prefix="transformer"
    )
    transformer.fuse_lora()
    transformer.unload_lora()
    after = weights(transformer, wanted)
    for weight in small_flux().components[0].weights:
        scale = tensors[f"lora_unet_{weight.native.replace('.', '_')}.dora_scale"].astype(float)
        if weight.swapped:
            scale = np.concatenate([scale[HIDDEN:], scale[:HIDDEN]])
        for part in weight.parts:
            moved = before[part.name] + wanted[part.name]
            norms = np.linalg.norm(moved, axis=1, keepdims=True)
            expected = scale[part.start : part.stop] * moved / norms
            assert np.allclose(after[part.name], expected, rtol=1e-4, atol=1e-6), part.name


def test_peft_loads_and_merges_it(transformer: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = written("peft", tmp_path / "peft")
    _, wanted = kohya_file()
    before = weights(transformer, wanted)
    merged = PeftModel.from_pretrained(transformer, str(folder)).merge_and_unload()
    require_changed(before, weights(merged, wanted), wanted)


def test_diffusers_own_converter_takes_apart_what_was_fused_from_factors_of_their_own() -> None:
    """Blocks in one factor, and an alpha for them all. Its rows of ``linear1`` are those of the full size only."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as theirs

    from loratools.formats.registry import find_format

    rng, tensors, wanted = np.random.default_rng(1), {}, {}
    for native in ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv"):
        for name, rows in FUSED[native][1]:
            down, up = (rng.standard_normal(s).astype(np.float32) for s in ((3, HIDDEN), (rows, 3)))
            tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
            tensors[f"transformer.{name}.alpha"] = np.array(1.5, np.float32)
            wanted[name] = 0.5 * up.astype(float) @ down.astype(float)
    adapter = interpret(Opened("file", MemorySource(tensors), {}, "file"))
    made = find_format("kohya").write(adapter, small_flux()).tensors
    found = theirs({key: torch.from_numpy(ref.load().reshape(ref.shape)) for key, ref in made.items()})
    assert {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in found} == set(wanted)
    for name, delta in wanted.items():
        up, down = (found[f"transformer.{name}.lora_{leg}.weight"].double().numpy() for leg in "BA")
        assert np.linalg.norm(up @ down - delta) <= 1e-6 * np.linalg.norm(delta), name
