"""``convert``: files of real models there and back, what is refused, and what other programs make of the result."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.architectures.base import architecture, architectures
from loratools.cli.app import app
from loratools.errors import Mismatch, NonFinite, OutputExists, ShapeMismatch, UnmatchedModules, Unsupported
from tests.dialects import SD1, kohya_flux, kohya_sd1
from tests.helpers import make_adapter


@pytest.fixture
def sd1(tmp_path: Path) -> Path:
    save_file(kohya_sd1(), tmp_path / "style.safetensors", metadata={"ss_base_model_version": "sd_v1"})
    return tmp_path / "style.safetensors"


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    save_file(kohya_flux(), tmp_path / "flux.safetensors", metadata={"ss_base_model_version": "flux1"})
    return tmp_path / "flux.safetensors"


def run(*words: object) -> Any:
    """The command line."""
    return CliRunner().invoke(app, [str(word) for word in words])


def test_kohya_to_diffusers_and_back_is_the_same_file(sd1: Path, tmp_path: Path) -> None:
    there = lt.convert(sd1, tmp_path / "there.safetensors", to="diffusers", sync=False)
    assert (there.source, there.to, there.architecture) == ("kohya", "diffusers", "sd1")
    assert (there.identical, there.relative) == (len(SD1), 0.0)
    keys = set(load_file(tmp_path / "there.safetensors"))
    assert keys == {f"{name}.lora_{leg}.weight" for name in SD1 for leg in "AB"}
    lt.convert(tmp_path / "there.safetensors", tmp_path / "back.safetensors", to="kohya", sync=False)
    before, after = load_file(sd1), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(
        np.array_equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before
    )


@pytest.mark.parametrize("form", ["diffusers", "comfy", "kohya"])
def test_fused_weights_of_flux_come_back(form: str, flux: Path, tmp_path: Path) -> None:
    there = lt.convert(flux, tmp_path / "there.safetensors", to=form, sync=False)
    assert there.architecture == "flux1"
    assert there.relative == 0.0
    lt.convert(tmp_path / "there.safetensors", tmp_path / "back.safetensors", to="kohya", sync=False)
    before, after = load_file(flux), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_alphas_stay_float32_whatever_the_type(sd1: Path, tmp_path: Path) -> None:
    lt.convert(sd1, tmp_path / "out.safetensors", to="kohya", dtype="bf16", sync=False)
    header = lt.load(tmp_path / "out.safetensors")
    dtypes = {ref.name.endswith(".alpha"): ref.spec.dtype.name for ref in header.tensors}
    assert dtypes == {True: "F32", False: "BF16"}


def test_hashes_that_a_file_states_are_those_of_its_new_bytes(tmp_path: Path) -> None:
    from hashlib import sha256

    stated = {
        "sshs_model_hash": "a" * 64,
        "modelspec.hash_sha256": "0x" + "a" * 64,
        "sshs_legacy_hash": "b" * 8,
    }
    said = {**stated, "ss_tag_frequency": "{}", "ss_network_dim": "64", "modelspec.title": "Ink"}
    save_file(kohya_sd1(), tmp_path / "style.safetensors", metadata=said)
    report = lt.convert(tmp_path / "style.safetensors", tmp_path / "out.safetensors", to="kohya", sync=False)
    raw = (tmp_path / "out.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = json.loads(raw[8:start])["__metadata__"]
    assert found["sshs_model_hash"] == sha256(raw[start:]).hexdigest()
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    assert len(found["sshs_legacy_hash"]) == 8
    assert found["sshs_legacy_hash"] not in {"b" * 8, "0" * 8}
    assert (found["ss_tag_frequency"], found["modelspec.title"]) == ("{}", "Ink")
    assert found["ss_network_dim"] == "2"
    assert not found.keys() & {"ss_network_module", "ss_network_alpha", "ss_base_model_version"}
    assert report.bytes == len(raw)
    in_memory = lt.convert(tmp_path / "style.safetensors", to="diffusers").adapter
    assert not stated.keys() & in_memory.metadata.keys()


def converted(tmp_path: Path, said: dict[str, str], to: str = "kohya", **options: Any) -> dict[str, str]:
    """What a file of Stable Diffusion 1 that says so says when it is converted."""
    save_file(kohya_sd1(), tmp_path / "in.safetensors", metadata=said or None)
    return metadata_of(
        lt.convert(tmp_path / "in.safetensors", tmp_path / f"{to}.safetensors", to=to, sync=False, **options)
    )


def metadata_of(report: Any) -> dict[str, str]:
    """Of a file that was written, without the record of what made it."""
    with safe_open(report.output, "numpy") as file:
        return {key: value for key, value in file.metadata().items() if key != "loratools"}


MINIMAL = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1"}
BLOCK = {
    "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models", "modelspec.title": "Ink",
    "modelspec.resolution": "512x512",
}  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        {**MINIMAL, "ss_base_model_version": "sd_v1_5_custom", "ss_v2": "False"},
        {"ss_network_module": "networks.lora_fa"},
        {"ss_network_module": "networks.dylora", "ss_network_args": '{"unit":"4"}', "ss_network_dim": "2"},
        {"ss_network_alpha": "1.0", "modelspec.architecture": "stable-diffusion-v1-inpainting/lora"},
        {**MINIMAL, **BLOCK},
    ],
)
def test_what_a_file_says_that_is_still_true_stays_as_it_is(said: dict[str, str], tmp_path: Path) -> None:
    assert converted(tmp_path, said) == said
    (tmp_path / "in.safetensors").unlink()
    apart = {key: value for key, value in said.items() if not key.startswith("ss_network_")}
    assert converted(tmp_path, said, "comfy") == apart
    there = converted(tmp_path, said, "diffusers")
    assert {
        key: value for key, value in there.items() if key not in {"format", "lora_adapter_metadata"}
    } == apart


def test_a_file_that_names_no_model_is_not_given_one(tmp_path: Path) -> None:
    assert converted(tmp_path, {}) == MINIMAL
    assert converted(tmp_path, {}, "comfy") == {}
    assert converted(tmp_path, {}, "diffusers").keys() == {"format", "lora_adapter_metadata"}
    back = lt.convert(tmp_path / "diffusers.safetensors", tmp_path / "b.safetensors", to="kohya", sync=False)
    assert metadata_of(back) == MINIMAL


def test_a_model_that_the_user_names_is_written_where_kohyas_tools_look(tmp_path: Path) -> None:
    named = {**MINIMAL, "ss_base_model_version": "sd_v1"}
    assert converted(tmp_path, {}, arch="sd1") == named
    lt.load(tmp_path / "in.safetensors").save(tmp_path / "saved.safetensors", arch="sd1", sync=False)
    with safe_open(tmp_path / "saved.safetensors", "numpy") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1"
    (tmp_path / "kohya.safetensors").unlink()
    assert converted(tmp_path, {"ss_base_model_version": "mine"}, arch="sd1") == {
        **MINIMAL, "ss_base_model_version": "mine",
    }  # fmt: skip


def test_a_model_that_metadata_name_in_other_words_is_written_too(tmp_path: Path) -> None:
    converted(tmp_path, BLOCK, "diffusers")
    back = lt.convert(tmp_path / "diffusers.safetensors", tmp_path / "b.safetensors", to="kohya", sync=False)
    assert metadata_of(back) == {**MINIMAL, **BLOCK, "ss_base_model_version": "sd_v1"}


def test_only_the_name_of_another_model_is_corrected(tmp_path: Path) -> None:
    wrong = {**BLOCK, "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    assert converted(tmp_path, {**wrong, **MINIMAL, "ss_base_model_version": "flux1"}) == {
        **BLOCK, **MINIMAL, "ss_base_model_version": "sd_v1",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["flux-1-schnell/lora", "flux-1-dev/lora"])
def test_flux_keeps_its_variant_and_has_a_trainer_of_its_own(name: str, tmp_path: Path) -> None:
    save_file(kohya_flux(), tmp_path / "f.safetensors", metadata={"modelspec.architecture": name})
    there = lt.convert(tmp_path / "f.safetensors", tmp_path / "d.safetensors", to="diffusers", sync=False)
    back = metadata_of(lt.convert(there.output, tmp_path / "k.safetensors", to="kohya", sync=False))
    assert (back["modelspec.architecture"], back["ss_base_model_version"]) == (name, "flux1")
    assert back["ss_network_module"] == "networks.lora_flux"
    assert "modelspec.sai_model_spec" not in back


def test_reducing_leaves_what_is_true_and_corrects_the_rank(tmp_path: Path) -> None:
    said = {
        "ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_base_model_version": "sd_v1_5_custom",
        "ss_network_args": '{"algo": "locon", "preset": "full"}', "ss_network_alpha": "1.0",
    }  # fmt: skip
    save_file(kohya_sd1(), tmp_path / "in.safetensors", metadata=said)
    report = lt.reduce(tmp_path / "in.safetensors", tmp_path / "out.safetensors", rank=1, sync=False)
    found = metadata_of(report)
    alphas = {float(v) for k, v in load_file(tmp_path / "out.safetensors").items() if k.endswith(".alpha")}
    assert {**found, "ss_network_alpha": ""} == {**said, "ss_network_dim": "1", "ss_network_alpha": ""}
    assert {float(found["ss_network_alpha"])} == alphas


@pytest.mark.parametrize("kinds", [{"loha"}, {"loha", "lora"}, {"full"}, {"lora", "full"}, {"norm"}])
def test_what_only_lycoris_makes_is_said_to_be_its(kinds: set[str], tmp_path: Path) -> None:
    made = {
        "lora": {"lora_down.weight": (2, 320), "lora_up.weight": (320, 2), "alpha": ()}, "full": {"diff": (320, 320)},
        "loha": {f"hada_w{i}_{leg}": (320, 2) if leg == "a" else (2, 320) for i in (1, 2) for leg in "ab"},
        "norm": {"w_norm": (320,)},
    }  # fmt: skip
    where = {"loha": "attn1_to_q", "lora": "attn1_to_k", "full": "attn1_to_v", "norm": "norm1"}
    stem, seeded = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0", np.random.default_rng(0)
    tensors = {
        f"{stem}_{where[kind]}.{suffix}": seeded.random(shape, np.float32) if shape else np.array(1, np.float32)
        for kind in kinds for suffix, shape in made[kind].items()
    }  # fmt: skip
    if "loha" in kinds:
        tensors[f"{stem}_attn1_to_q.alpha"] = np.array(1, np.float32)
    save_file(tensors, tmp_path / "in.safetensors")
    found = metadata_of(
        lt.convert(tmp_path / "in.safetensors", tmp_path / "k.safetensors", to="kohya", sync=False)
    )
    assert found["ss_network_module"] == "lycoris.kohya"
    algo = json.loads(found.get("ss_network_args", "{}")).get("algo")
    alone = {"loha": "loha", "full": "full", "norm": None}
    assert algo == ("locon" if kinds == {"lora", "full"} else alone[min(kinds)] if len(kinds) == 1 else None)
    assert ("ss_network_dim" in found) == bool(kinds & {"lora", "loha"})


def test_where_the_model_is_uncertain_nothing_says_which_trainer_it_was(tmp_path: Path) -> None:
    tensors = {}
    for name, out in (("double_blocks_0_img_attn_qkv", 9216), ("single_blocks_37_linear1", 21504)):
        tensors[f"lora_unet_{name}.lora_down.weight"] = np.ones((1, 3072), np.float32)
        tensors[f"lora_unet_{name}.lora_up.weight"] = np.ones((out, 1), np.float32)
    save_file(tensors, tmp_path / "in.safetensors")
    found = metadata_of(lt.normalize(tmp_path / "in.safetensors", tmp_path / "out.safetensors", sync=False))
    assert found == {"ss_network_dim": "1", "ss_network_alpha": "1"}


def test_in_memory_nothing_is_written_and_the_result_can_be_saved(sd1: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    report = lt.convert(sd1, to="comfy")
    assert sorted(tmp_path.iterdir()) == before
    assert report.output is None
    assert report.adapter.format == "comfy"
    report.adapter.save(tmp_path / "saved.safetensors", sync=False)
    assert any(
        key.startswith("diffusion_model.input_blocks") for key in load_file(tmp_path / "saved.safetensors")
    )


def test_a_peft_folder_of_the_denoiser(sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(
        Unsupported, match=r"lora_te_text_model.*a PEFT adapter is of one model, here the unet"
    ):
        lt.convert(sd1, tmp_path / "peft", to="peft", sync=False)
    assert not (tmp_path / "peft").exists()
    report = lt.convert(sd1, tmp_path / "peft", to="peft", allow_loss=["lora_te_*"], sync=False)
    assert {loss.name.partition("_text_model")[0] for loss in report.lost} == {"lora_te"}
    assert len(report.modules) == 4
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "loratools.json",
    ]  # fmt: skip
    back = lt.convert(tmp_path / "peft", to="kohya")
    assert back.relative == 0.0


@pytest.mark.parametrize(("form", "reason"), [
    ("diffusers", "diffusers has one LoraConfig for a component: DoRA and LoRA cannot be mixed in it"),
    ("peft", "a PEFT adapter has one LoraConfig: DoRA and LoRA cannot be mixed in it"),
])  # fmt: skip
@pytest.mark.parametrize("decomposed", [1, 3])
def test_dora_beside_lora_is_lost_by_leave(form: str, reason: str, decomposed: int, tmp_path: Path) -> None:
    """Whichever there is less of, under its keys in the file; what is left is the plain rest, or all DoRA."""
    tensors = kohya_sd1(np.float32)
    unet = list(dict.fromkeys(key.partition(".")[0] for key in tensors if key.startswith("lora_unet_")))
    assert len(unet) == 4
    for stem in unet[:decomposed]:
        rows = tensors[f"{stem}.lora_up.weight"].shape[0]
        tensors[f"{stem}.dora_scale"] = np.ones((rows, 1), np.float32)
    save_file(tensors, tmp_path / "mixed.safetensors")
    lost = unet[:1] if decomposed == 1 else unet[3:]
    allowed = [f"{lost[0]}.*", *(["lora_te_*"] if form == "peft" else [])]
    with pytest.raises(Unsupported, match=f"{lost[0]}.*{reason}"):
        lt.convert(tmp_path / "mixed.safetensors", to=form, allow_loss=allowed[1:])
    report = lt.convert(tmp_path / "mixed.safetensors", to=form, allow_loss=allowed)
    mine = {loss.name: loss.reason for loss in report.lost if loss.name.startswith("lora_unet")}
    assert mine == {key: reason for key in tensors if key.startswith(f"{lost[0]}.")}
    kinds = {module.kind for name, module in report.adapter.modules.items() if "text" not in name}
    assert kinds == ({"lora"} if decomposed == 1 else {"dora"})
    assert report.relative == 0.0


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_what_multiplies_the_weight_says_so(form: str, tmp_path: Path) -> None:
    tensors = {key: values for key, values in kohya_sd1(np.float32).items() if key.startswith("lora_unet")}
    stem = next(iter(tensors)).partition(".")[0]
    rows = tensors[f"{stem}.lora_up.weight"].shape[0]
    tensors = {key: values for key, values in tensors.items() if not key.startswith(f"{stem}.")}
    tensors |= {f"{stem}.weight": np.ones(rows, np.float32), f"{stem}.on_input": np.array(False)}
    save_file(tensors, tmp_path / "scaled.safetensors", metadata={"ss_base_model_version": "sd_v1"})
    with pytest.raises(Unsupported, match=f"{stem}.*it multiplies the weight: it has no form as two factors"):
        lt.convert(tmp_path / "scaled.safetensors", to=form)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_said(kind: Any, value: float, tmp_path: Path) -> None:
    tensors = kohya_sd1(kind)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    save_file(tensors, tmp_path / "sound.safetensors")
    assert not lt.convert(tmp_path / "sound.safetensors", to="diffusers").warnings
    tensors[key].flat[-1] = value
    save_file(tensors, tmp_path / "broken.safetensors")
    report = lt.convert(tmp_path / "broken.safetensors", to="diffusers")
    assert report.identical == len(SD1)
    assert [text for text in report.warnings if f"{key} holds values that are not finite" in text]


def test_a_difference_is_an_error_and_leaves_nothing(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratools.formats import diffusers
    from loratools.formats.pairs import folded

    honest = diffusers.as_peft

    def doubled(name: str, module: Any, shape: Any = ()) -> Any:
        from dataclasses import replace

        made = honest(name, module, shape)
        return replace(made, tensors={**made.tensors, "up": folded(made.tensors["up"], 2.0)})

    monkeypatch.setattr(diffusers, "as_peft", doubled)
    with pytest.raises(Mismatch, match="would differ by 1 in diffusers"):
        lt.convert(sd1, tmp_path / "out.safetensors", to="diffusers", sync=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["style.safetensors"]


def test_values_that_do_not_fit_the_type_are_an_error(tmp_path: Path) -> None:
    tensors = kohya_sd1(np.float32)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key] = tensors[key] * np.float32(1e6)
    save_file(tensors, tmp_path / "large.safetensors")
    with pytest.raises(NonFinite):
        lt.convert(
            tmp_path / "large.safetensors",
            tmp_path / "half.safetensors",
            to="diffusers",
            dtype="f16",
            sync=False,
        )
    tiny = {k: v * np.float32(1e-9) if k.endswith("weight") else v for k, v in kohya_sd1(np.float32).items()}
    save_file(tiny, tmp_path / "tiny.safetensors")
    with pytest.raises(Mismatch, match="would differ"):
        lt.convert(
            tmp_path / "tiny.safetensors",
            tmp_path / "half.safetensors",
            to="diffusers",
            dtype="f16",
            sync=False,
        )
    assert not (tmp_path / "half.safetensors").exists()


def test_a_device_is_refused_where_nothing_is_multiplied(sd1: Path, tmp_path: Path) -> None:
    result = run("convert", sd1, tmp_path / "out.safetensors", "--to", "comfy", "--device", "mps")
    assert result.exit_code == 3
    assert "leave --device out" in result.stderr


def test_an_output_is_never_an_input(sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExists):
        lt.convert(sd1, sd1, to="diffusers", force=True)
    lt.convert(sd1, tmp_path / "out.safetensors", to="diffusers", sync=False)
    with pytest.raises(OutputExists):
        lt.convert(sd1, tmp_path / "out.safetensors", to="comfy", sync=False)
    assert lt.convert(sd1, tmp_path / "out.safetensors", to="comfy", force=True, sync=False).relative == 0.0


def test_an_adapter_of_no_known_model_needs_its_name(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "llm", {"model.layers.0.self_attn.q_proj": (8, 8)})
    with pytest.raises(Unsupported, match="nothing says which model it belongs to"):
        lt.convert(folder, to="kohya")
    with pytest.raises(Unsupported, match="no architecture 'sd9' is known"):
        lt.convert(folder, to="kohya", arch="sd9")


def test_a_model_of_another_size_is_renamed_with_a_warning_but_never_cut(tmp_path: Path) -> None:
    def write(name: str, out: int) -> Path:
        rng = np.random.default_rng(0)
        up, down = rng.standard_normal((out, 2)).astype("f4"), rng.standard_normal((2, 48)).astype("f4")
        keys = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        save_file(keys, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    whole = write("lora_unet_double_blocks_0_img_attn_proj", 48)
    report = lt.convert(whole, to="diffusers", arch="flux1")
    (name,) = report.adapter.modules
    assert name == "transformer.transformer_blocks.0.attn.to_out.0"
    assert report.relative == 0
    assert any("1 of 1 modules are of another size" in warning for warning in report.warnings)
    for name, out in (("double_blocks_0_img_attn_qkv", 144), ("final_layer_adaLN_modulation_1", 96)):
        with pytest.raises(ShapeMismatch, match=name):
            lt.convert(write(f"lora_unet_{name}", out), to="diffusers", arch="flux1")


def test_the_base_says_the_architecture(sd1: Path, tmp_path: Path) -> None:
    base = {}
    for weight in (w for c in architecture("sd1").components if c.name == "unet" for w in c.weights):
        if len(weight.shape) == 2 and 0 not in weight.shape and weight.shape[0] <= 320:
            base[f"model.diffusion_model.{weight.key}"] = np.zeros(weight.shape, np.float16)
    save_file(base, tmp_path / "model.safetensors")
    report = lt.convert(sd1, to="diffusers", base=tmp_path / "model.safetensors")
    assert report.architecture == "sd1"
    assert "model.safetensors" in report.evidence


# --- the command line ----------------------------------------------------------------------------------------


def test_the_command_prints_the_difference(sd1: Path, tmp_path: Path) -> None:
    result = run("convert", sd1, tmp_path / "out.safetensors", "--to", "diffusers", "--no-sync", "--modules")
    assert result.exit_code == 0, result.output
    assert "none: every bit of the factors is the same" in result.stdout
    assert "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj" in result.stdout


def test_the_json_has_what_the_contract_says(sd1: Path, tmp_path: Path) -> None:
    result = run("convert", sd1, "-o", tmp_path / "out.safetensors", "--to", "comfy", "--no-sync", "--json")
    document = json.loads(result.stdout)
    assert document["schema"] == "loratools.convert/1"
    assert (document["from"], document["to"], document["architecture"]) == ("kohya", "comfy", "sd1")
    assert document["output"] == str(tmp_path / "out.safetensors")
    assert {"relative", "lost", "warnings", "bytes"} <= document.keys()
    assert set(document["modules"][0]) == {"name", "kind", "rank", "relative"}
    assert document["bytes"] == (tmp_path / "out.safetensors").stat().st_size


def test_a_dry_run_touches_nothing_and_foretells_the_bytes(sd1: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    words = ("convert", sd1, out, "--to", "diffusers", "--no-sync", "--json")
    plan = json.loads(run(*words, "--dry-run").stdout)
    assert not out.exists()
    assert plan["dry_run"] is True
    assert json.loads(run(*words).stdout)["architecture"] == plan["architecture"]
    text = load_file(out)
    assert sum(value.nbytes for value in text.values()) <= plan["bytes_written"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("convert", "style.safetensors", "out.safetensors"), 2, "which format to write"),
        (("convert", "style.safetensors", "--to", "comfy"), 2, "where the result goes"),
        (("convert", "style.safetensors", "out", "--to", "cohya"), 2, "is no format"),
        (("convert", "style.safetensors", "out", "--to", "loralib"), 2, "is read, not written"),
        (("convert", "style.safetensors", "out", "--to", "peft"), 3, "peft has no place for"),
        (("convert", "style.safetensors", "out", "--to", "comfy", "--arch", "flux1"), 3, "none of its"),
        (("convert", "style.safetensors", "style.safetensors", "--to", "comfy"), 3, "overlap"),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], code: int, said: str, sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["style.safetensors"]


@pytest.mark.parametrize("verb", ["reduce", "combine", "normalize"])
def test_other_verbs_write_the_format_they_are_told_or_that_of_the_input(
    verb: str, sd1: Path, tmp_path: Path
) -> None:
    own, told = tmp_path / "own.safetensors", tmp_path / "told.safetensors"
    rest = ("--rank", 1) if verb == "reduce" else (sd1,) if verb == "combine" else ()
    for out, to in ((own, ()), (told, ("--to", "diffusers"))):
        result = run(verb, sd1, *rest, "-o", out, "--no-sync", *to)
        assert result.exit_code == 0, result.output
    assert any(key.startswith("lora_unet_") for key in load_file(own))
    assert any(key.startswith("unet.") for key in load_file(told))
    assert lt.convert(own, to="diffusers").relative == 0.0


def language_model(folder: Path) -> Path:
    """A small adapter of a language model, and its base's configuration in a folder beside it."""
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.up_proj": (128, 64)}
    named = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    (folder / "base").mkdir()
    fields = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
    (folder / "base" / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 2}))
    weights = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in named.items()}
    save_file(weights, folder / "base" / "model.safetensors")
    return make_adapter(folder / "llm", named)


def test_a_bias_that_may_be_lost_is_left_out_of_the_comparison(tmp_path: Path) -> None:
    folder = language_model(tmp_path)
    values = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in values if key.endswith("lora_B.weight"))
    values[key.replace("weight", "bias")] = np.ones(values[key].shape[0], np.float32)
    save_file(values, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    with pytest.raises(Unsupported, match=r"lora_B\.bias"):
        lt.convert(folder, to="mlx")
    report = lt.convert(folder, to="mlx", allow_loss="*.lora_B.bias")
    assert report.relative == 0.0
    assert [loss.name for loss in report.lost] == [key.replace("weight", "bias")]


@pytest.mark.parametrize(("to", "name"), [("mlx", "mlx"), ("mlx", "mlx.safetensors"), ("gguf", "out.gguf")])
def test_adapters_of_language_models_come_back_from_other_runtimes(
    to: str, name: str, tmp_path: Path
) -> None:
    if to == "gguf":
        pytest.importorskip("gguf", reason="the gguf package writes and reads it")
    folder, out = language_model(tmp_path), tmp_path / "out" / name
    there = lt.convert(folder, out, to=to, base=tmp_path / "base", sync=False)
    back = lt.convert(out, tmp_path / "back", to="peft", sync=False)
    assert there.identical == back.identical == 6
    assert lt.diff(folder, tmp_path / "back").distance == 0.0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    again = lt.convert(folder, out, to=to, base=tmp_path / "base", force=True, sync=False)
    assert again.relative == 0.0


def without_weights(folder: Path) -> None:
    (folder / "base" / "model.safetensors").unlink()


@pytest.mark.parametrize("to", ["mlx", "gguf", "peft"])
@pytest.mark.parametrize("change", ["size", "layers"])
def test_an_adapter_of_another_base_is_refused(change: str, to: str, tmp_path: Path) -> None:
    folder, weights = language_model(tmp_path), tmp_path / "base" / "model.safetensors"
    values = load_file(weights)
    if change == "size":
        values = {key: np.zeros([2 * n for n in value.shape], np.float32) for key, value in values.items()}
    else:
        values = {key: value for key, value in values.items() if ".layers.1." not in key}
    save_file(values, weights)
    with pytest.raises(Mismatch, match=r"model\.layers\.") as raised:
        lt.convert(folder, tmp_path / f"out.{to}", to=to, base=tmp_path / "base")
    assert isinstance(raised.value, ShapeMismatch if change == "size" else UnmatchedModules)
    assert "up_proj" in str(raised.value)
    assert not (tmp_path / f"out.{to}").exists()


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [("hidden_size", 96, ShapeMismatch), ("num_hidden_layers", 1, UnmatchedModules)],
)
@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_a_configuration_alone_tells_another_base(
    field: str, value: int, kind: type[Exception], to: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="the gguf package writes it")
    folder, place = language_model(tmp_path), tmp_path / "base" / "config.json"
    without_weights(tmp_path)
    assert lt.convert(folder, to=to, base=tmp_path / "base").identical == 6
    place.write_text(json.dumps({**json.loads(place.read_text()), field: value}))
    with pytest.raises(kind, match=r"model\.layers\."):
        lt.convert(folder, to=to, base=tmp_path / "base")


@pytest.mark.parametrize("to", ["mlx", "gguf", "peft"])
def test_an_architecture_that_is_not_known_is_refused_where_none_is_needed(to: str, tmp_path: Path) -> None:
    folder = language_model(tmp_path)
    with pytest.raises(Unsupported, match="nonsense"):
        lt.convert(folder, to=to, arch="nonsense", base=tmp_path / "base")
    with pytest.raises(Unsupported, match="nonsense"):
        lt.load(folder).save(tmp_path / "out", format=to, arch="nonsense")


@pytest.mark.parametrize("verb", ["normalize", "combine"])
def test_the_base_of_other_verbs_is_that_of_gguf(verb: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf package writes and reads it")
    folder, base, out = language_model(tmp_path), tmp_path / "base", tmp_path / "out.gguf"
    if verb == "normalize":
        lt.normalize(folder, out, to="gguf", base=base, sync=False)
    else:
        lt.combine([folder, folder], out, weights=[0.5, 0.5], to="gguf", base=base, sync=False)
    assert lt.diff(folder, out).relative < 1e-6


def test_a_verb_without_a_base_names_the_way_to_gguf(tmp_path: Path) -> None:
    folder = language_model(tmp_path)
    with pytest.raises(Unsupported, match="family") as raised:
        lt.reduce(folder, tmp_path / "out.gguf", rank=1, to="gguf")
    assert "loratools convert OUT x.gguf --to gguf --base BASE" in str(raised.value.hint)


def kohya_of(name: str) -> dict[str, np.ndarray]:
    """One module of each sort that a family has, in kohya's keys: of its blocks, the first."""
    rng, tensors, seen = np.random.default_rng(2), {}, set()
    for component in architecture(name).components:
        for weight in component.weights:
            sort = (component.name, re.sub(r"\d+", "#", weight.native))
            if len(weight.shape) < 2 or 0 in weight.shape or weight.tensor != "weight" or sort in seen:
                continue
            seen.add(sort)
            split = component.kohya_layout == "diffusers"
            named = (
                [(p.name, p.stop - p.start) for p in weight.parts]
                if split
                else [(weight.native, weight.shape[0])]
            )
            for path, rows in named if component.kohya else ():
                stem = f"{component.kohya[0]}_{path.replace('.', '_')}"
                tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((1, *weight.shape[1:])).astype(
                    np.float16
                )
                up = rng.standard_normal((rows, 1, *(1 for _ in weight.shape[2:]))).astype(np.float16)
                tensors[f"{stem}.lora_up.weight"] = up
                tensors[f"{stem}.alpha"] = np.array(1.0, np.float32)
    return tensors


@pytest.mark.parametrize("name", architectures())
def test_every_family_goes_through_all_formats_unchanged(name: str) -> None:
    given = kohya_of(name)
    adapter = lt.load(given)
    for to in ("diffusers", "comfy", "diffusers", "kohya"):
        report = lt.convert(adapter, to=to, arch=name)
        assert report.identical == len(report.modules)
        adapter = report.adapter
    found = {ref.name: ref.load() for ref in adapter.tensors}
    assert found.keys() == given.keys()
    assert all(np.array_equal(found[key], given[key].astype(np.float32)) for key in given)


def test_a_control_adapter_tells_comfyui_how_wide_its_input_is() -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "img_in.lora_A.weight": rng.standard_normal((2, 128)).astype(np.float32),
        "img_in.lora_B.weight": rng.standard_normal((3072, 2)).astype(np.float32),
        "img_in.lora_B.bias": rng.standard_normal(3072).astype(np.float32),
        "double_blocks.0.img_attn.norm.key_norm.scale": rng.standard_normal(128).astype(np.float32),
        "double_blocks.0.img_attn.proj.lora_A.weight": rng.standard_normal((2, 3072)).astype(np.float32),
        "double_blocks.0.img_attn.proj.lora_B.weight": rng.standard_normal((3072, 2)).astype(np.float32),
    }
    report = lt.convert(lt.load(tensors), to="comfy", arch="flux1")
    found = {ref.name: ref.load() for ref in report.adapter.tensors}
    assert found["diffusion_model.img_in.reshape_weight"].tolist() == [3072, 128]
    assert "diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale.set_weight" in found
    assert np.array_equal(found["diffusion_model.img_in.diff_b"], tensors["img_in.lora_B.bias"])


# --- other programs ------------------------------------------------------------------------------------------


def test_diffusers_own_converter_finds_the_same_modules_and_products(flux: Path, tmp_path: Path) -> None:
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils", reason="diffusers is the oracle")
    import torch

    given = {key: torch.from_numpy(value) for key, value in kohya_flux().items()}
    theirs = utils._convert_kohya_flux_lora_to_diffusers(given)
    lt.convert(flux, tmp_path / "ours.safetensors", to="diffusers", sync=False)
    ours = lt.load(tmp_path / "ours.safetensors").modules
    names = {key.rpartition(".lora_")[0] for key in theirs}
    assert names == set(ours)
    for name in names:
        up, down = (theirs[f"{name}.lora_{leg}.weight"].double().numpy() for leg in "BA")
        mine = ours[name]
        rows = slice(0, 64)
        wanted = up[rows] @ down
        found = mine.scaling * mine.array("up", True)[rows] @ mine.array("down", True)
        assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted), (
            name
        )  # theirs rounds in float16


# --- adapters of other people --------------------------------------------------------------------------------

CORPUS = os.environ.get("LORATOOLS_CORPUS")
REAL = (
    "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.safetensors",
    "cloneofsimo__lora/example_loras/analog_svd_rank4.safetensors",
    "KohakuBlueleaf__LyCORIS/result/smart_falcon_4_lokr.safetensors",
)


@pytest.mark.skipif(CORPUS is None, reason="LORATOOLS_CORPUS names the folder of real adapters")
@pytest.mark.parametrize("name", REAL)
def test_real_adapters_go_through_all_formats(name: str, tmp_path: Path) -> None:
    file = Path(str(CORPUS)) / "adapters" / name
    first = lt.convert(file, tmp_path / "kohya.safetensors", to="kohya", sync=False)
    for to, source in (("comfy", "kohya"), ("diffusers", "comfy"), ("kohya", "diffusers")):
        out = tmp_path / f"{to}-from-{source}.safetensors"
        given = tmp_path / (
            "kohya.safetensors" if source == "kohya" else next(tmp_path.glob(f"{source}-from-*")).name
        )
        report = lt.convert(given, out, to=to, sync=False)
        assert report.relative <= 1e-6
        assert len(report.modules) == len(first.modules)
