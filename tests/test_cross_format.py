"""The same adapter in two dialects is the same to diff and combine: by name, by base or by architecture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import loratools as lt
from loratools.architectures.base import architecture
from loratools.cli.app import app
from loratools.errors import Mismatch, Unsupported
from loratools.models import open_base
from loratools.pairing import pair
from tests.diffusion_helpers import (
    Arrays,
    checkpoint,
    delta,
    factors,
    pipeline_tensors,
    write,
    write_pipeline,
)
from tests.helpers import write_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from loratools.adapter import Adapter

ATTENTION = "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn{}_to_{}"


def sd1_kohya(seed: int = 0, alpha: float = 2.0) -> Arrays:
    """A LoRA of Stable Diffusion 1 in real sizes and rank 2, UNet and text encoder."""
    return {
        **factors(ATTENTION.format(0, 1, "q"), 320, 320, seed=seed, alpha=alpha),
        **factors(ATTENTION.format(1, 2, "k"), 640, 768, seed=seed, alpha=alpha),
        **factors(
            "lora_unet_down_blocks_2_attentions_0_proj_in", 1280, 1280, kernel=(1, 1), seed=seed, alpha=alpha
        ),
        **factors("lora_unet_mid_block_resnets_0_conv1", 1280, 1280, kernel=(3, 3), seed=seed, alpha=alpha),
        **factors("lora_te_text_model_encoder_layers_3_mlp_fc1", 3072, 768, seed=seed, alpha=alpha),
    }


def as_diffusers(kohya: Arrays, family: str = "sd1") -> Arrays:
    """The same under diffusers' dotted names, the alpha within the factors; parts of fused modules by their rows."""
    found = {}
    for stem in dict.fromkeys(name.partition(".")[0] for name in kohya):
        place = architecture(family).lookup(stem)
        assert place is not None
        down, up = kohya[f"{stem}.lora_down.weight"], kohya[f"{stem}.lora_up.weight"]
        scale = float(kohya[f"{stem}.alpha"]) / len(down)
        start = place.parts[0].start
        for name, part in zip(place.names, place.parts, strict=True):
            found[f"{name}.lora_A.weight"] = down
            found[f"{name}.lora_B.weight"] = (up[part.start - start : part.stop - start] * scale).astype("f4")
    return found


def flux_kohya(seed: int = 0) -> Arrays:
    """A LoRA of FLUX in real sizes, fused weights as the original code has them."""
    return {
        **factors("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072, seed=seed),
        **factors("lora_unet_single_blocks_0_linear1", 21504, 3072, seed=seed),
        **factors("lora_unet_single_blocks_3_linear2", 3072, 15360, seed=seed),
    }


FAMILIES = {"sd1": sd1_kohya(), "flux1": flux_kohya()}


@pytest.fixture(params=FAMILIES)
def both(request: pytest.FixtureRequest) -> tuple[str, Arrays, Arrays]:
    """A family, and one adapter of it in two dialects."""
    return request.param, FAMILIES[request.param], as_diffusers(FAMILIES[request.param], request.param)


def test_two_dialects_of_one_adapter_are_identical(both: tuple[str, Arrays, Arrays]) -> None:
    family, kohya, diffusers = both
    for arch in (None, family):
        report = lt.diff(lt.load(kohya), lt.load(diffusers), arch=arch)
        assert report.identical, report.relative
        assert len(report.modules) == len(diffusers) // 2
        assert (report.only_in_a, report.only_in_b) == ((), ())


def test_a_change_in_one_part_is_found_in_that_part() -> None:
    kohya = flux_kohya()
    diffusers = as_diffusers(kohya, "flux1")
    name = "transformer.single_transformer_blocks.0.attn.to_k"
    diffusers[f"{name}.lora_B.weight"] = 3 * diffusers[f"{name}.lora_B.weight"]
    report = lt.diff(lt.load(kohya), lt.load(diffusers))
    moved = {one.name: one.relative for one in report.modules if one.relative > 1e-6}
    assert moved.keys() == {name}
    assert moved[name] == pytest.approx(2.0)


def test_names_of_comfyui_match_those_of_kohya_and_diffusers() -> None:
    kohya = flux_kohya()
    comfy = {}
    for stem, name in (
        ("lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"),
        ("lora_unet_single_blocks_0_linear1", "diffusion_model.single_blocks.0.linear1"),
        ("lora_unet_single_blocks_3_linear2", "diffusion_model.single_blocks.3.linear2"),
    ):
        for old, new in (("lora_down", "lora_A"), ("lora_up", "lora_B")):
            comfy[f"{name}.{new}.weight"] = kohya[f"{stem}.{old}.weight"]
        comfy[f"{name}.alpha"] = kohya[f"{stem}.alpha"]
    for other in (kohya, as_diffusers(kohya, "flux1")):
        assert lt.diff(lt.load(comfy), lt.load(other)).identical


def test_other_families_have_nothing_in_common() -> None:
    report = lt.diff(lt.load(sd1_kohya()), lt.load(flux_kohya()))
    assert not report.modules
    assert not report.identical


def test_an_architecture_that_is_not_theirs_is_refused() -> None:
    with pytest.raises(Mismatch):
        lt.diff(lt.load(sd1_kohya()), lt.load(flux_kohya()), arch="sd1")
    with pytest.raises(Unsupported, match="no architecture 'sd9'"):
        lt.diff(lt.load(sd1_kohya()), lt.load(sd1_kohya()), arch="sd9")


def dense(adapter: Adapter) -> dict[str, np.ndarray]:
    """What each module of a LoRA adds, as a matrix in float64."""
    found = {}
    for name, module in adapter.modules.items():
        down, up = (module.tensors[role].load().astype(np.float64) for role in ("down", "up"))
        found[name] = (module.scaling or 0) * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    return found


def test_dialects_are_combined_into_the_first_ones(tmp_path: Path) -> None:
    one, other = sd1_kohya(0), sd1_kohya(1)
    first = write(tmp_path / "one.safetensors", one)
    second = write(tmp_path / "other.safetensors", as_diffusers(other))
    out = tmp_path / "both.safetensors"
    report = lt.combine([first, second], out, weights=[0.7, 0.3])
    assert report.relative_error < 1e-6
    found = lt.load(out)
    assert found.format == "kohya"
    stems = {name.partition(".")[0] for name in one}
    assert found.modules.keys() == stems
    for stem, values in dense(found).items():
        wanted = 0.7 * delta(one, stem) + 0.3 * delta(other, stem)
        assert np.linalg.norm(values - wanted) <= 1e-6 * np.linalg.norm(wanted)
    report = lt.combine([second, first], tmp_path / "turned.safetensors", weights=[0.3, 0.7])
    assert lt.load(tmp_path / "turned.safetensors").format == "diffusers"
    assert lt.diff(out, tmp_path / "turned.safetensors").identical


def test_what_is_only_read_is_combined_into_diffusers_format(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stem = "double_blocks.0.processor.qkv_lora1"
    xlabs = {
        f"{stem}.down.weight": rng.standard_normal((2, 3072)).astype(np.float32),
        f"{stem}.up.weight": rng.standard_normal((9216, 2)).astype(np.float32),
    }
    kohya = factors("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072)
    lt.combine([lt.load(xlabs), lt.load(kohya)], tmp_path / "out.safetensors")
    found = lt.load(tmp_path / "out.safetensors")
    assert found.format == "diffusers"
    whole = xlabs[f"{stem}.up.weight"].astype(np.float64) @ xlabs[f"{stem}.down.weight"]
    whole += delta(kohya, "lora_unet_double_blocks_0_img_attn_qkv")
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        values = dense(found)[f"transformer.transformer_blocks.0.attn.{part}"]
        wanted = whole[3072 * number : 3072 * (number + 1)]
        assert np.linalg.norm(values - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_block_weights_multiply_an_adapters_modules_before_they_are_combined() -> None:
    one, other = sd1_kohya(0), sd1_kohya(1)
    combined = lt.combine(
        [lt.load(one), lt.load(as_diffusers(other))], arch="sd1", weights=[1.0, 0.5],
        block_weights=["M00=0.25", "attn2=0;BASE=3"],
    ).adapter  # fmt: skip
    assert combined is not None
    ratios = {
        "lora_unet_mid_block_resnets_0_conv1": (0.25, 0.5),
        ATTENTION.format(1, 2, "k"): (1.0, 0.0),
        ATTENTION.format(0, 1, "q"): (1.0, 0.5),
        "lora_te_text_model_encoder_layers_3_mlp_fc1": (1.0, 1.5),
    }
    found = dense(combined)
    for stem, (first, second) in ratios.items():
        place = architecture("sd1").lookup(stem)
        assert place is not None
        wanted = first * delta(one, stem) + second * delta(other, stem)
        assert np.linalg.norm(found[place.names[0]] - wanted) <= 1e-6 * np.linalg.norm(wanted)


# --- with a base ---------------------------------------------------------------------------------------------


def small_kohya(seed: int) -> Arrays:
    """For the small bases: names of one family, a thirty-second of its sizes."""
    return {
        **factors(ATTENTION.format(0, 1, "q"), 10, 10, seed=seed),
        **factors(ATTENTION.format(1, 2, "k"), 20, 24, seed=seed),
        **factors("lora_te_text_model_encoder_layers_3_mlp_fc1", 96, 24, seed=seed),
    }


@pytest.mark.parametrize("layout", ["checkpoint", "pipeline"])
def test_a_base_tells_which_modules_are_the_same(layout: str, tmp_path: Path) -> None:
    if layout == "checkpoint":
        base = write(tmp_path / "base.safetensors", checkpoint("sd1"))
    else:
        base = write_pipeline(tmp_path / "base", pipeline_tensors("sd1"))
    kohya = small_kohya(0)
    report = lt.diff(lt.load(kohya), lt.load(as_diffusers(kohya)), base=base)
    assert report.identical
    assert len(report.modules) == 3
    combined = lt.combine([lt.load(kohya), lt.load(as_diffusers(small_kohya(1)))], base=base)
    assert combined.adapter is not None
    assert len(combined.adapter.modules) == 3


def test_a_peft_folder_matches_a_kohya_file_by_the_base_they_share(tmp_path: Path) -> None:
    base = write(
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors", pipeline_tensors("sd1")["unet"]
    ).parent
    stem, path = ATTENTION.format(0, 1, "q"), "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    kohya = factors(stem, 10, 10, alpha=2.0)
    peft = {
        f"base_model.model.{path}.{role}.weight": kohya[f"{stem}.{own}.weight"]
        for own, role in (("lora_down", "lora_A"), ("lora_up", "lora_B"))
    }
    folder = write_adapter(tmp_path / "adapter", peft, r=2, lora_alpha=2, target_modules=["to_q"])
    for pair_of in ([lt.load(folder), lt.load(kohya)], [lt.load(kohya), lt.load(folder)]):
        report = lt.diff(*pair_of, base=base)
        assert report.identical
        assert [one.name for one in report.modules] == [f"unet.{path}"]


def test_modules_that_cannot_be_taken_apart_are_compared_whole() -> None:
    """LoKr with a magnitude on a fused weight: the same place of a base that has it fused."""
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    rng = np.random.default_rng(0)
    one = factors(stem, 288, 96, rank=2) | {f"{stem}.dora_scale": 1 + rng.random((1, 96)).astype(np.float32)}
    base = checkpoint("flux1", lambda weight: weight.native.startswith("double_blocks.0"))
    dotted = {name.replace("lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"): v
              for name, v in one.items()}  # fmt: skip
    report = lt.diff(lt.load(one), lt.load(dotted), base=base)
    assert report.identical
    assert len(report.modules) == 1


def test_an_adapter_of_another_family_does_not_fit_the_base() -> None:
    base = checkpoint("sd1")
    with pytest.raises(Mismatch):
        pair([lt.load(small_kohya(0)), lt.load(flux_kohya())], open_base(base))


# --- the command line ----------------------------------------------------------------------------------------


def test_the_commands_take_an_architecture(tmp_path: Path) -> None:
    kohya = write(tmp_path / "kohya.safetensors", sd1_kohya())
    diffusers = write(tmp_path / "diffusers.safetensors", as_diffusers(sd1_kohya()))
    runner = CliRunner()
    result = runner.invoke(app, ["diff", str(kohya), str(diffusers), "--arch", "sd1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["identical"]
    out = tmp_path / "out.safetensors"
    result = runner.invoke(
        app, ["combine", str(kohya), str(diffusers), "-o", str(out), "--arch", "sd1", "--rank", "2"]
    )
    assert result.exit_code == 0, result.output
    stem = ATTENTION.format(1, 2, "k")
    found = load_file(out)
    np.testing.assert_allclose(delta(found, stem), 2 * delta(sd1_kohya(), stem), rtol=1e-3, atol=1e-4)


def ambiguous(seed: int = 0) -> Arrays:
    """Names and sizes that Flux, Chroma and HunyuanVideo share."""
    return {
        **factors("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072, seed=seed),
        **factors("lora_unet_single_blocks_3_linear1", 21504, 3072, seed=seed),
    }


def test_in_its_own_dialect_an_adapter_needs_no_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "in.safetensors", ambiguous())
    with pytest.raises(Mismatch, match="could belong to"):
        lt.convert(path, to="diffusers")
    lt.reduce(path, tmp_path / "reduced.safetensors", rank=1)
    stems = {name.partition(".")[0] for name in ambiguous()}
    assert {name.partition(".")[0] for name in load_file(tmp_path / "reduced.safetensors")} == stems
    assert lt.diff(path, tmp_path / "reduced.safetensors").relative < 1
    assert lt.convert(path, to="kohya").relative == 0
    lt.combine([path, path], out=tmp_path / "both.safetensors", weights=[0.5, 0.5])
    assert {name.partition(".")[0] for name in load_file(tmp_path / "both.safetensors")} == stems
    assert lt.diff(path, tmp_path / "both.safetensors").relative < 1e-6


def test_what_all_metadata_say_of_the_model_is_heard_by_combine(tmp_path: Path) -> None:
    said = {"ss_base_model_version": "flux1"}
    paths = [write(tmp_path / f"{seed}.safetensors", ambiguous(seed), said) for seed in (0, 1)]
    report = lt.combine(paths, out=tmp_path / "both.safetensors", to="diffusers")
    assert report.adapter is not None
    names = {name.partition(".lora_")[0] for name in load_file(tmp_path / "both.safetensors")}
    assert "transformer.transformer_blocks.0.attn.to_q" in names


def test_shapes_and_metadata_that_contradict_each_other_decide_nothing(tmp_path: Path) -> None:
    tensors = {
        f"transformer.transformer_blocks.0.attn2.to_{leg}.lora_{half}.weight": np.ones(shape, "f4")
        for leg in "qk"
        for half, shape in (("A", (2, 2048)), ("B", (2048, 2)))
    }
    path = write(tmp_path / "a.safetensors", tensors, {"modelspec.architecture": "anima-preview/lora"})
    with pytest.raises(Mismatch, match="metadata say anima") as caught:
        lt.convert(path, to="kohya")
    assert "--arch" in caught.value.hint
    assert lt.convert(path, to="kohya", arch="anima").architecture == "anima"


def test_across_dialects_a_part_that_does_nothing_is_no_difference() -> None:
    one, stem = sd1_kohya(), ATTENTION.format(0, 2, "q")
    other = as_diffusers(one)
    idle = factors(stem, 320, 320, seed=5)
    silent = {**idle, f"{stem}.lora_up.weight": np.zeros((320, 2), "f4")}
    for sides in (({**one, **silent}, other), (other, {**one, **silent})):
        report = lt.diff(*sides)
        assert report.identical
        assert len(report.only_in_a) + len(report.only_in_b) == 1
    assert not lt.diff({**one, **idle}, other).identical
    assert not lt.diff({**one, **silent}, one).identical  # of one dialect, modules are what they are called


def test_one_module_under_two_names_is_refused_by_all() -> None:
    stem = ATTENTION.format(0, 1, "q")
    dotted = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    kohya = factors(stem, 320, 320)
    other = {
        f"{dotted}.lora_A.weight": kohya[f"{stem}.lora_down.weight"],
        f"{dotted}.lora_B.weight": kohya[f"{stem}.lora_up.weight"],
    }
    more = factors(ATTENTION.format(0, 1, "k"), 320, 320)
    adapter = lt.load({**kohya, **more, **other})
    with pytest.raises(Mismatch, match="both change"):
        lt.convert(adapter, to="diffusers", arch="sd1")
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_{}.weight"
    base = {name.format(leg): np.zeros((320, 320), "f4") for leg in "qkv"}
    with pytest.raises(Mismatch, match="both change"):
        lt.merge(base, adapter, arch="sd1")
