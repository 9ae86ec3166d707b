"""What the writers of image models' formats write means what it meant before: every kind, every pair of formats."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import Extra
from loratools.errors import Unsupported
from loratools.formats.fusing import fuse, split_adapter
from loratools.formats.keys import lycoris_tensors
from loratools.formats.registry import FORMATS, find_format
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource
from tests.dialects import (
    CONV,
    FUSED,
    NORM,
    PLAIN,
    SMALL,
    STEMS,
    SWAPPED,
    TEXT,
    UNEVEN,
    File,
    deltas,
    expected,
    parts,
    read,
    write,
)  # fmt: skip

PIPELINE = ("kohya", "comfy", "diffusers")
EVERYWHERE = (FUSED, UNEVEN, SWAPPED, PLAIN)


def require_equal(
    found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-6
) -> None:
    """Every module there, and each within rounding of what it should be."""
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        apart = np.linalg.norm(found[name].reshape(delta.shape) - delta)
        assert apart <= tolerance * np.linalg.norm(delta), name


def plain_file(**options: Any) -> File:
    """A LoRA on every weight that can have one."""
    file = File()
    for weight in (*EVERYWHERE, CONV, TEXT):
        file.add(weight, "lora", **options)
    return file


@pytest.mark.parametrize(("one", "other"), list(itertools.product(PIPELINE, PIPELINE)))
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_any_pair_of_formats_keeps_what_modules_add(kind: str, one: str, other: str) -> None:
    file = File()
    for weight in (*EVERYWHERE, TEXT):
        file.add(weight, kind)
    if kind != "lokr":
        file.add(CONV, kind)
    once = read(write(file.adapter(), one))
    again = read(write(once, other))
    assert again.format == other
    require_equal(deltas(again), expected(file))


def test_peft_holds_the_denoiser_and_names_what_it_cannot() -> None:
    file = plain_file()
    written = write(file.adapter(), "peft")
    assert set(written.lost) == {key for key in file.tensors if key.startswith("lora_te1_")}
    wanted = {name: delta for name, delta in expected(file).items() if name.startswith("transformer.")}
    again = read(written)
    require_equal(deltas(again), wanted)
    back = read(write(again, "kohya"))
    require_equal(deltas(back), wanted)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_kohya_comes_back_from_diffusers_bit_for_bit(dtype: Any) -> None:
    file = plain_file(dtype=dtype)
    there = read(write(file.adapter(), "diffusers"))
    back = write(there, "kohya").tensors
    assert back.keys() == file.tensors.keys()
    for key, value in file.tensors.items():
        assert back[key].shape == value.shape, key
        found = back[key].source.read_bytes(back[key].name)
        assert found.tobytes() == value.tobytes(), key


@pytest.mark.parametrize("through", ["kohya", "comfy"])
def test_split_modules_come_back_from_a_fused_file_bit_for_bit(through: str) -> None:
    rng = np.random.default_rng(0)
    tensors = {}
    for weight in (FUSED, UNEVEN):
        for part in weight.parts:
            rank = 3 if weight is FUSED else int(rng.integers(1, 4))
            name = f"transformer.{part.name}"
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, 12)).astype(np.float16)
            rows = part.stop - part.start
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float16)
    adapter = find_format("diffusers").write(read_plain(tensors), SMALL)
    fused = write(read(adapter), through)
    back = write(read(fused), "diffusers").tensors
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert np.array_equal(back[key].load(), value.astype(np.float32)), key


def read_plain(tensors: dict[str, np.ndarray]) -> Any:
    """A file without metadata."""
    from loratools.formats.opening import Opened, interpret

    return interpret(Opened("file", MemorySource(tensors), {}, "file"))


def test_a_fused_file_that_was_split_collapses_to_its_own_rank() -> None:
    file = File().add(FUSED, "lora", rank=4)
    split = read(write(file.adapter(), "diffusers"))
    assert len(split.modules) == 3
    [module] = read(write(split, "comfy")).modules.values()
    assert module.rank == 4


def test_parts_with_factors_of_their_own_become_blocks_and_alpha_counts_them() -> None:
    tensors = {}
    rng = np.random.default_rng(1)
    for part in FUSED.parts:
        name = f"transformer.{part.name}"
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((2, 12)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((12, 2)).astype(np.float32)
        tensors[f"{name}.alpha"] = np.array(1.0, np.float32)
    written = write(read_plain(tensors), "kohya").tensors
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert written[f"{stem}.alpha"].spec.dtype.name == "F32"
    assert written[f"{stem}.alpha"].shape == ()
    assert float(written[f"{stem}.alpha"].load()) == 3.0  # half of each rank of 2, three times
    up = written[f"{stem}.lora_up.weight"].load()
    assert up.shape == (36, 6)
    for index, part in enumerate(FUSED.parts):
        block = up[12 * index : 12 * index + 12, 2 * index : 2 * index + 2]
        assert np.array_equal(block, tensors[f"transformer.{part.name}.lora_B.weight"])
    assert np.count_nonzero(up) == 3 * 24


def test_a_missing_part_is_zero_rows_and_no_rank() -> None:
    tensors = {}
    rng = np.random.default_rng(2)
    for part in (FUSED.parts[0], FUSED.parts[2]):
        name = f"transformer.{part.name}"
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((2, 12)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((12, 2)).astype(np.float32)
    written = write(read_plain(tensors), "kohya")
    up = written.tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].load()
    assert up.shape == (36, 4)
    assert not up[12:24].any()
    back = read(write(read(written), "diffusers"))
    assert sorted(back.modules) == sorted(f"transformer.{FUSED.parts[i].name}" for i in (0, 2))


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any),
    alphas=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 0.1]), min_size=4, max_size=4),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_ranks_and_alphas_fuse_and_split(
    ranks: list[int], alphas: list[float], half: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tensors, wanted = {}, {}
    for part, rank, alpha in zip(UNEVEN.parts, ranks, alphas, strict=True):
        if not rank:
            continue
        name, rows = f"transformer.{part.name}", part.stop - part.start
        down, up = (
            rng.standard_normal(s).astype(np.float16 if half else np.float32)
            for s in ((rank, 12), (rows, rank))
        )
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
        wanted[name] = float(np.float32(alpha)) / rank * up.astype(float) @ down.astype(float)
    fused = read(write(read_plain(tensors), "kohya"))
    require_equal(deltas(fused), wanted)
    require_equal(deltas(read(write(fused, "diffusers"))), wanted)


@pytest.mark.parametrize("form", ["kohya", "comfy"])
def test_kinds_of_lycoris_go_through(form: str) -> None:
    file = File().add(FUSED, "full").add(CONV, "cp").add(SWAPPED, "loha").add(PLAIN, "lokr").add(NORM, "norm")
    written = write(file.adapter(), form)
    assert not written.lost
    again = read(written)
    assert sorted({module.kind for module in again.modules.values()}) == [
        "full",
        "loha",
        "lokr",
        "lora",
        "norm",
    ]
    assert any("mid" in module.tensors for module in again.modules.values())
    require_equal(deltas(again), expected(file))


def other_kinds() -> dict[str, np.ndarray]:
    """What multiplies or rotates a weight, in LyCORIS' keys, on fused weights too."""
    rng = np.random.default_rng(4)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    plain, fused, swapped, text = (STEMS[weight.native] for weight in (PLAIN, FUSED, SWAPPED, TEXT))
    tensors = {
        f"{plain}.a1.weight": draw(2, 10),
        f"{plain}.a2.weight": draw(10, 2),
        f"{plain}.b1.weight": draw(2, 10),
    }
    tensors |= {f"{plain}.b2.weight": draw(12, 2), f"{plain}.alpha": np.array(1.0, np.float32)}
    tensors |= {f"{fused}.oft_blocks": draw(9, 4, 4), f"{fused}.alpha": np.array(0.25, np.float32)}
    tensors |= {f"{swapped}.oft_blocks": draw(2, 4, 4, 4), f"{swapped}.rescale": draw(16, 1)}
    tensors[f"{swapped}.alpha"] = np.array(0.0, np.float32)
    return tensors | {f"{text}.weight": draw(6), f"{text}.on_input": np.array(True)}


@pytest.mark.parametrize("through", ["kohya", "comfy"])
def test_what_multiplies_or_rotates_a_weight_goes_through_as_it_is(through: str) -> None:
    tensors = other_kinds()
    adapter = read_plain(tensors)
    assert {module.kind for module in adapter.modules.values()} == {"glora", "oft", "boft", "ia3"}
    there = write(adapter, through)
    assert not there.lost
    back = write(read(there), "kohya").tensors
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert np.array_equal(back[key].load().reshape(value.shape), value), key
    assert set(write(adapter, "diffusers").lost) == set(tensors)


def test_factors_that_lycoris_stores_otherwise_are_computed() -> None:
    from loratools.adapter import Module

    def refs(**values: np.ndarray) -> dict[str, TensorRef]:
        source = MemorySource(values)
        return {role: TensorRef(source, role) for role in values}

    scale = np.array([1.5, 0.25, 1.0], np.float32)
    ia3 = Module("ia3", refs(scale=scale), None, None, None, (3,), {"feedforward": False})
    made = lycoris_tensors("x", ia3)
    assert made["x.weight"].load().tolist() == [0.5, -0.75, 0.0]
    assert made["x.on_input"].load().tolist() in (0, False)
    left, right = np.full((2, 2), 3.0, np.float32), np.ones((3, 4), np.float32)
    lokr = Module("lokr", refs(left=left, right=right), 2, 1.0, 0.5, (6, 8))
    made = lycoris_tensors("x", lokr)
    assert set(made) == {"x.lokr_w1", "x.lokr_w2"}  # without an alpha, which LyCORIS would not use
    assert made["x.lokr_w1"].load().tolist() == [[1.5, 1.5], [1.5, 1.5]]


def test_products_become_loras_of_their_exact_rank() -> None:
    file = File().add(PLAIN, "loha", rank=2).add(SWAPPED, "lokr", rank=3).add(CONV, "cp", rank=2)
    adapter = read(write(file.adapter(), "diffusers"))
    ranks = {name.partition(".")[2]: module.rank for name, module in adapter.modules.items()}
    assert ranks == {"transformer_blocks.0.attn.to_out.0": 4, "norm_out.linear": 6, "x_embedder": 2}
    require_equal(deltas(adapter), expected(file))


def test_what_has_no_factors_is_lost_by_key_and_not_in_silence() -> None:
    file = File().add(PLAIN, "full").add(NORM, "norm").add(SWAPPED, "lora")
    written = write(file.adapter(), "diffusers")
    lost = {key for key in file.tensors if "img_attn_proj" in key or "img_norm" in key}
    assert set(written.lost) == lost
    require_equal(deltas(read(written)), parts(SWAPPED, file.deltas[SWAPPED.native]))


def dora_file(axis: int) -> dict[str, np.ndarray]:
    """A DoRA on a fused weight and on a convolution, its magnitudes of outputs (0) or of inputs (1)."""
    file = File().add(FUSED if axis == 0 else PLAIN, "lora").add(CONV, "lora")
    rng = np.random.default_rng(3)
    tensors = dict(file.tensors)
    for key in [key for key in tensors if key.endswith("lora_up.weight")]:
        stem = key.removesuffix(".lora_up.weight")
        ones = tuple(1 for _ in tensors[key].shape[2:])
        count = tensors[key].shape[0] if axis == 0 else tensors[f"{stem}.lora_down.weight"].shape[1]
        shape = (count, 1, *ones) if axis == 0 else (1, count, *ones)
        tensors[f"{stem}.dora_scale"] = rng.random(shape).astype(np.float32) + 1
    return tensors


def test_magnitudes_of_outputs_go_to_peft_and_back() -> None:
    tensors = dora_file(0)
    there = read(write(read_plain(tensors), "diffusers"))
    shapes = {name: module.tensors["magnitude"].shape for name, module in there.modules.items()}
    assert shapes["transformer.x_embedder"] == (1, 8, 1, 1)
    assert shapes["transformer.transformer_blocks.0.attn.to_q"] == (12,)
    back = write(there, "kohya").tensors
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].shape == value.shape, key
        assert np.array_equal(back[key].load(), value), key


def test_magnitudes_of_inputs_stay_where_their_axis_is_known() -> None:
    tensors = dora_file(1)
    again = write(read(write(read_plain(tensors), "comfy")), "kohya").tensors
    for key, value in tensors.items():
        assert np.array_equal(again[key].load(), value), key
    assert set(write(read_plain(tensors), "diffusers").lost) == set(tensors)


def test_a_bundled_embedding_goes_along() -> None:
    tensors = {**plain_file().tensors, "bundle_emb.face.emb_params": np.ones((2, 8), np.float32)}
    for form in PIPELINE:
        assert "bundle_emb.face.emb_params" in write(read_plain(tensors), form).tensors


def test_what_nobody_knows_is_lost_by_name_except_where_the_dialect_stays() -> None:
    adapter = plain_file().adapter()
    ref = TensorRef(MemorySource({"odd": np.ones(3, np.float32)}), "odd")
    from dataclasses import replace

    adapter = replace(adapter, extras={"odd": Extra(ref, "odd", "unclaimed", "no factor of a known kind")})
    assert write(adapter, "comfy").lost == {"odd": "no factor of a known kind"}
    assert "odd" in write(adapter, "kohya").tensors


def test_a_module_the_architecture_lacks_is_lost_by_name() -> None:
    tensors = plain_file().tensors
    tensors |= {f"lora_unet_double_blocks_9_img_attn_proj.lora_{leg}.weight": np.ones(shape, np.float32)
                for leg, shape in (("down", (1, 10)), ("up", (12, 1)))}  # fmt: skip
    lost = write(read_plain(tensors), "diffusers").lost
    assert set(lost) == {key for key in tensors if "blocks_9" in key}
    assert all("Small Flux has no such module" in reason for reason in lost.values())


def test_without_an_architecture_names_are_not_invented() -> None:
    adapter = plain_file().adapter()
    for form in ("comfy", "diffusers", "peft"):
        with pytest.raises(Unsupported, match="which model it belongs to"):
            find_format(form).write(adapter, None)
    kept = find_format("kohya").write(adapter, None)
    assert kept.tensors.keys() >= {key for key in plain_file().tensors if not key.endswith("alpha")}


def test_diffusers_metadata_say_ranks_and_alphas_of_each_component() -> None:
    file = File().add(PLAIN, "lora", rank=2).add(SWAPPED, "lora", rank=4).add(TEXT, "lora", rank=3)
    fields = json.loads(write(file.adapter(), "diffusers").metadata["lora_adapter_metadata"])
    assert fields["text_encoder.r"] == 3
    assert fields["text_encoder.lora_alpha"] == 4.5
    assert {fields["transformer.r"], *fields["transformer.rank_pattern"].values()} == {2, 4}
    assert {fields["transformer.lora_alpha"], *fields["transformer.alpha_pattern"].values()} == {3.0, 6.0}


def test_a_replacement_of_a_fused_weight_needs_all_its_parts() -> None:
    adapter = File().add(FUSED, "full").adapter()
    split = split_adapter(adapter, SMALL).modules
    from dataclasses import replace

    wanted = {
        index: replace(module, kind="set", tensors={"value": module.tensors["diff"]})
        for index, module in enumerate(split.values())
    }
    assert fuse(FUSED, wanted).tensors["value"].shape == (36, 12)
    del wanted[1]
    with pytest.raises(Unsupported, match="needs all its parts"):
        fuse(FUSED, wanted)


def test_tensors_lie_in_the_order_of_the_safetensors_library() -> None:
    from safetensors.numpy import save

    written = write(plain_file(dtype=np.float16).adapter(), "kohya")
    values = {key: ref.source.read_bytes(ref.name).view(ref.spec.dtype.numpy).reshape(ref.shape)
              for key, ref in written.tensors.items()}  # fmt: skip
    raw = save(values)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert sorted(header, key=lambda key: header[key]["data_offsets"]) == list(written.tensors)


def test_every_format_that_says_it_is_written_has_a_writer() -> None:
    from importlib import import_module

    for form in FORMATS.values():
        if form.writer:
            module, _, function = form.writer.partition(":")
            assert callable(getattr(import_module(module), function)), form.name
