"""Rules of engines beyond the tables: flags, limits, dialects, what a base tells; the data files; the commands."""

from __future__ import annotations

import json
import os
import re
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import loratools as lt
from loratools.cli.annotations import github, sarif
from loratools.cli.app import COMMANDS, app
from loratools.engines.base import NAMES, BaseFacts, engine, known
from loratools.engines.checks import CHECKS
from loratools.errors import Unsupported
from loratools.verbs.checking.engines import gather
from tests.helpers import make_adapter, write_adapter
from tests.test_engines import (
    ATTENTION,
    CONFIG,
    FIRST,
    INTO,
    OUT,
    PLANTS,
    PREFIX,
    RANK,
    VOCABULARY,
    diffusers_folder,
    factors,
    peft_folder,
    values,
    write_model,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratools.engines.base import Facts
    from loratools.verbs.reports import EngineAnswer, Finding


def asked(ref: Path, name: str, **options: Any) -> tuple[EngineAnswer, dict[str, Finding]]:
    """An engine's answer, and its findings by code."""
    report = lt.validate(ref, engines=[name], **options)
    return report.engines[0], {f.code: f for f in report.findings if f.engine == name}


# --- ranks and flags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "served"),
    [(17, 32), (48, 64), (64, 64), (65, 128), (300, 320), (321, 512), (512, 512)],
)
def test_vllm_is_told_the_least_rank_on_its_menu_that_fits(rank: int, served: int, tmp_path: Path) -> None:
    answer, found = asked(
        make_adapter(tmp_path / "a", {"model.q_proj": (4, 4)}, rank=rank, alpha=rank), "vllm"
    )
    assert answer.flags == (f"--max-lora-rank {served}",)
    assert (answer.loads, answer.same_maths) == ("yes", "yes")
    assert found["rank-max"].severity == "info"


@pytest.mark.parametrize("rank", [1, 4, 9, 16])
def test_vllm_is_told_nothing_where_its_default_takes_the_rank(rank: int, tmp_path: Path) -> None:
    answer, found = asked(make_adapter(tmp_path / "a", {"model.q_proj": (4, 4)}, rank=rank), "vllm")
    assert (answer.loads, answer.same_maths, answer.flags) == ("yes", "yes", ())
    assert "rank-max" not in found


def test_above_the_greatest_rank_of_the_menu_only_reduce_helps(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"model.q_proj": (4, 4)}, rank=513, alpha=513)
    answer, found = asked(folder, "vllm")
    assert (answer.loads, answer.flags) == ("no", ())
    assert found["rank-limit"].severity == "error"
    assert found["rank-limit"].hint == f"loratools reduce {folder} OUT --rank 512"
    assert (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "flag"), [("sglang", "--max-lora-rank 48"), ("tensorrt-llm", "max_lora_rank=48")]
)
def test_engines_without_a_menu_are_told_the_rank_itself(name: str, flag: str, tmp_path: Path) -> None:
    folder = make_adapter(
        tmp_path / "a", {f"model.layers.0.self_attn.{n}_proj": (4, 4) for n in "qkv"}, rank=48, alpha=48
    )
    answer, _ = asked(folder, name)
    assert answer.flags == (flag,)
    assert (answer.loads, answer.same_maths) == ("yes", "yes")


def test_packed_experts_are_declared_to_vllm(tmp_path: Path) -> None:
    folder = peft_folder("packed", tmp_path / "a")
    for family, loads in (("gpt_oss", "yes"), ("mixtral", "no")):
        # A base without the experts' weights: names are another matter here.
        base = write_model(tmp_path / family, family=family)
        report = lt.validate(folder, engines=["vllm"], base=base)
        found = [f for f in report.findings if f.code == "experts-packed"]
        assert "is_3d_lora_weight=true" in report.engines[0].flags
        assert (found[0].severity == "error") == (loads == "no")


# --- what a base tells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "tied", "loads"),
    [
        ("vllm", "llama", False, "yes"), ("vllm", "qwen2", False, "no"), ("vllm", "mistral", False, "no"),
        ("vllm", "other", False, "unknown"), ("llama.cpp", "llama", False, "yes"), ("llama.cpp", "llama", True, "no"),
        ("lorax", "llama", False, "yes"), ("ollama", "llama", False, "no"),
    ],
)  # fmt: skip
def test_a_lora_on_embeddings_depends_on_the_model(
    name: str, family: str, tied: bool, loads: str, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", family=family, tied=tied)
    answer, found = asked(peft_folder("embedding", tmp_path / "a"), name, base=base)
    assert answer.loads == loads, found
    assert (answer.same_maths == "no") == (name == "lorax")  # which leaves the input embedding unused


@pytest.mark.parametrize(
    ("name", "layer", "tied", "loads", "maths"),
    [
        ("mlx", "embed_tokens", True, "yes", "no"), ("mlx", "embed_tokens", False, "yes", "yes"),
        ("mlx", "embed_tokens", None, "yes", "unknown"), ("mlx", "lm_head", True, "no", "unknown"),
        ("mlx", "lm_head", False, "yes", "yes"), ("mlx", "lm_head", None, "unknown", "unknown"),
        ("llama.cpp", "embed_tokens", True, "yes", "unknown"), ("llama.cpp", "embed_tokens", False, "yes", "yes"),
        ("llama.cpp", "embed_tokens", None, "yes", "unknown"), ("llama.cpp", "lm_head", True, "no", "unknown"),
        ("llama.cpp", "lm_head", False, "yes", "yes"), ("llama.cpp", "lm_head", None, "unknown", "unknown"),
    ],
)  # fmt: skip
def test_a_tied_embedding_is_one_weight_in_two_places(
    name: str, layer: str, tied: bool | None, loads: str, maths: str, tmp_path: Path
) -> None:
    """MLX-LM's tied head goes through the embedding's LoRA, as an execution showed; PEFT's does not."""
    base = None if tied is None else write_model(tmp_path / "base", tied=tied)
    tensors = factors()
    if layer == "embed_tokens":
        tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = values(RANK, VOCABULARY)
        tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = values(INTO, RANK)
    else:
        tensors |= factors({"lm_head": (VOCABULARY, INTO)})
    folder = write_adapter(tmp_path / "a", tensors, **{**CONFIG, "target_modules": ["q_proj", layer]})
    if name == "mlx":
        lt.load(folder).save(tmp_path / "b", format="mlx", sync=False)
        folder = tmp_path / "b"
    answer, found = asked(folder, name, base=base)
    assert (answer.loads, answer.same_maths) == (loads, maths), found


def gguf_file(path: Path, architecture: str, *, stray: str = "") -> Path:
    """A GGUF adapter of one module, made by llama.cpp's own package."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_tensor("blk.0.attn_k.weight.lora_a", values(RANK, INTO))
    writer.add_tensor("blk.0.attn_k.weight.lora_b", values(OUT, RANK))
    if stray:
        writer.add_tensor(stray, values(OUT, RANK))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama.cpp", "ollama"])
@pytest.mark.parametrize(
    ("said", "family", "loads"),
    [
        ("qwen2", "qwen2", "yes"), ("qwen2", "gemma2", "no"), ("gemma2", "mistral", "no"),
        ("qwen2", "unheard", "unknown"),
    ],
)  # fmt: skip
def test_a_gguf_adapter_is_for_one_architecture(
    name: str, said: str, family: str, loads: str, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", family=family)
    answer, found = asked(gguf_file(tmp_path / "a.gguf", said), name, base=base)
    assert answer.loads == loads
    assert ("architecture" in found) == (loads != "yes")


@pytest.mark.parametrize("name", ["llama.cpp", "ollama"])
@pytest.mark.parametrize(
    ("stray", "loads"),
    [("blk.0.attn_q.weight.lora_c", "no"), ("blk.0.attn_norm.weight", "yes"), ("", "yes")],
)
def test_a_key_with_an_unknown_suffix(name: str, stray: str, loads: str, tmp_path: Path) -> None:
    answer, _ = asked(gguf_file(tmp_path / "a.gguf", "qwen2", stray=stray), name)
    assert answer.loads == loads


@pytest.mark.parametrize(
    ("dropped", "based", "maths"),
    [
        ((), True, "yes"), ((), False, "unknown"), (("1.self_attn.q_proj",), True, "no"),
        (("1.self_attn.q_proj",), False, "no"), (("0.self_attn.v_proj",), False, "no"),
        (("1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"), True, "no"),
        (("1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"), False, "unknown"),
    ],
)  # fmt: skip
def test_lorax_skips_a_kind_that_a_layer_lacks(
    dropped: tuple[str, ...], based: bool, maths: str, tmp_path: Path
) -> None:
    shapes = {path: shape for path, shape in ATTENTION.items() if not path.endswith(dropped or ("none",))}
    folder = write_adapter(tmp_path / "a", factors(shapes), **CONFIG)
    base = write_model(tmp_path / "base") if based else None
    answer, _ = asked(folder, "lorax", base=base)
    assert (answer.loads, answer.same_maths) == ("yes", maths)


def test_lorax_looks_for_the_names_of_the_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", prefix="language_model.")
    answer, found = asked(peft_folder("plain", tmp_path / "a"), "lorax", base=base)
    assert answer.same_maths == "no"
    assert found["key-prefix"].severity == "error"


@pytest.mark.parametrize(
    ("fields", "loads", "maths"),
    [
        ({"init_lora_weights": "pissa"}, "yes", "yes"), ({"init_lora_weights": "pissa_niter_4"}, "yes", "unknown"),
        ({"init_lora_weights": "corda"}, "no", "unknown"), ({"init_lora_weights": "loftq"}, "no", "unknown"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "yes", "unknown"),
    ],
)  # fmt: skip
def test_what_peft_makes_of_an_initialisation(
    fields: dict[str, Any], loads: str, maths: str, tmp_path: Path
) -> None:
    answer, _ = asked(write_adapter(tmp_path / "a", factors(), **CONFIG, **fields), "peft")
    assert (answer.loads, answer.same_maths) == (loads, maths)


def test_another_adapter_name_is_not_found_by_peft(tmp_path: Path) -> None:
    tensors = renamed(lambda key: key.replace(".weight", ".other.weight"))
    answer, _ = asked(write_adapter(tmp_path / "a", tensors, **CONFIG), "peft")
    assert answer.same_maths == "no"


@pytest.mark.parametrize(
    ("largest", "dtype", "maths"),
    [
        (65504.0, np.float32, "yes"),
        (65505.0, np.float32, "no"),
        (-7e4, np.float32, "no"),
        (6e4, np.float16, "yes"),
    ],
)
def test_ollama_writes_16_bits(largest: float, dtype: Any, maths: str, tmp_path: Path) -> None:
    tensors = {key: value.astype(dtype) for key, value in factors().items()}
    tensors[f"{PREFIX}{FIRST}.lora_B.weight"][0, 0] = largest
    answer, found = asked(
        write_adapter(tmp_path / "a", tensors, **CONFIG), "ollama", base=write_model(tmp_path / "base")
    )
    assert (answer.loads, answer.same_maths) == ("yes", maths)
    cast = found["dtype"].hint if "dtype" in found else None
    assert (cast is not None) == (dtype is np.float32 and maths == "yes")  # which would be infinite else


def test_a_copy_of_the_base_is_taken_for_a_factor_by_sglang(tmp_path: Path) -> None:
    tensors = factors({**ATTENTION, "lm_head": (VOCABULARY, INTO)})
    tensors[f"{PREFIX}lm_head.base_layer.weight"] = values(VOCABULARY, INTO)
    folder = write_adapter(tmp_path / "a", tensors, **{**CONFIG, "target_modules": ["q_proj", "lm_head"]})
    answer, found = asked(folder, "sglang")
    assert (answer.loads, answer.same_maths) == ("unknown", "no")
    assert found["base-copy"].hint == f"loratools normalize {folder} OUT --for sglang"
    assert asked(folder, "vllm")[0].same_maths == "yes"  # which passes over it


@pytest.mark.parametrize(
    "feature", ["init", "bias", "lora-bias", "saved", "packed", "dora", "plain", "rslora"]
)
@pytest.mark.parametrize("name", ["mlx", "ollama"])
def test_no_conversion_is_advised_that_would_be_refused(name: str, feature: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", family="qwen2")  # for which Ollama takes GGUF only
    folder = peft_folder(feature, tmp_path / "a")
    _, found = asked(folder, name, base=base)
    converts = [f.hint for f in found.values() if f.hint and f.hint.startswith("loratools convert")]
    refused = feature in {"init", "bias", "lora-bias", "saved", "packed"} or (name, feature) == (
        "ollama",
        "dora",
    )
    assert bool(converts) != refused
    if refused:
        assert f"loratools merge BASE {folder} MERGED" in {f.hint for f in found.values()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_is_merged_and_not_converted(tied: bool, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tied=tied)
    folder = peft_folder("head", tmp_path / "a")
    _, found = asked(folder, "mlx", base=base)
    verb = f"merge BASE {folder} MERGED" if tied else f"convert {folder} OUT --to mlx"
    assert found["format"].hint == f"loratools {verb}"


def test_fixes_that_need_the_base_all_say_so(tmp_path: Path) -> None:
    shapes = {path: shape for path, shape in ATTENTION.items() if path.endswith("q_proj")}
    folder = write_adapter(tmp_path / "a", factors(shapes), **CONFIG, use_rslora=True)
    _, found = asked(folder, "sglang")
    wanted = f"loratools normalize {folder} OUT --for sglang --base BASE"
    assert {found[code].hint for code in ("scale-rslora", "packed-partly")} == {wanted}


@pytest.mark.parametrize(
    ("family", "loads", "maths"),
    [
        ("gemma2", "yes", "yes"),
        ("mistral", "unknown", "unknown"),
        ("llama", "yes", "unknown"),
        ("qwen2", "no", "unknown"),
        (None, "unknown", "yes"),
    ],
)
def test_ollama_reads_safetensors_of_two_families(
    family: str | None, loads: str, maths: str, tmp_path: Path
) -> None:
    base = None if family is None else write_model(tmp_path / "base", family=family)
    answer, _ = asked(peft_folder("plain", tmp_path / "a"), "ollama", base=base)
    assert (answer.loads, answer.same_maths) == (loads, maths)


def test_a_prefix_that_only_the_base_has_is_a_silent_error_of_vllm(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", prefix="language_model.")
    answer, found = asked(peft_folder("plain", tmp_path / "a"), "vllm", base=base)
    assert (answer.loads, answer.same_maths) == ("yes", "no")
    assert found["key-prefix"].severity == "error"
    assert "language_model" in found["key-prefix"].message


def test_a_wider_delta_does_not_load_where_a_narrower_one_does(tmp_path: Path) -> None:
    tensors = factors() | factors({FIRST: (OUT, INTO + 4)})
    folder = write_adapter(tmp_path / "a", tensors, **CONFIG)
    answer, _ = asked(folder, "vllm", base=write_model(tmp_path / "base"))
    assert answer.loads == "no"


@pytest.mark.parametrize("name", ["vllm", "sglang", "llama.cpp"])
def test_an_embedding_of_another_length_is_a_matter_of_the_vocabulary(name: str, tmp_path: Path) -> None:
    tensors = factors() | factors({"lm_head": (VOCABULARY - 4, INTO)})
    folder = write_adapter(tmp_path / "a", tensors, **CONFIG)
    answer, found = asked(folder, name, base=write_model(tmp_path / "base", family="llama"))
    assert (answer.loads, answer.same_maths) == ("no", "unknown")
    assert str(VOCABULARY) in found["vocabulary"].message
    assert "shape" not in found


@pytest.mark.parametrize("name", ["sglang", "llama.cpp", "tensorrt-llm"])
def test_engines_that_look_at_tensors_do_not_mind_what_only_the_configuration_says(
    name: str, tmp_path: Path
) -> None:
    config = {**CONFIG, "bias": "all", "lora_bias": True, "modules_to_save": ["lm_head"]}
    answer, _ = asked(write_adapter(tmp_path / "a", factors(), **config), name)
    assert (answer.loads, answer.same_maths) == ("yes", "yes")


def test_without_a_base_it_is_said_that_names_were_not_compared(tmp_path: Path) -> None:
    report = lt.validate(peft_folder("plain", tmp_path / "a"), engines=["vllm", "peft"])
    assert [f.code for f in report.findings if f.engine is None] == ["base-not-given"]
    assert [answer.name for answer in report.engines] == ["vllm", "peft"]


# --- other dialects ------------------------------------------------------------------------------------------


def kohya_file(path: Path, **extra: np.ndarray) -> Path:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{stem}.lora_down.weight": values(RANK, INTO),
        f"{stem}.lora_up.weight": values(OUT, RANK),
        f"{stem}.alpha": np.array(RANK, np.float32),
    }
    save_file(tensors | {f"{stem}.{name}": value for name, value in extra.items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "target"),
    [("vllm", "peft"), ("sglang", "peft"), ("lorax", "peft"), ("tensorrt-llm", "peft"), ("peft", "peft"),
     ("llama.cpp", "gguf"), ("ollama", "gguf"), ("mlx", "mlx")],
)  # fmt: skip
def test_another_dialect_does_not_load_and_is_converted(name: str, target: str, tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "style.safetensors")
    answer, found = asked(file, name)
    assert answer.loads == "no"
    base = " --base BASE" if target == "gguf" else ""  # which names the architecture
    assert found["format"].hint == f"loratools convert {file} OUT --to {target}{base}"


def test_image_programs_read_kohya_files(tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "style.safetensors")
    said = {a.name: a for a in lt.validate(file, engines=["diffusers", "comfyui", "sd-scripts"]).engines}
    assert {(a.loads, a.same_maths) for a in said.values()} == {("yes", "yes")}


@pytest.mark.parametrize(
    ("name", "loads", "maths"),
    [("diffusers", "yes", "no"), ("comfyui", "yes", "no"), ("sd-scripts", "yes", "no")],
)
def test_magnitudes_in_kohya_files_are_left_out_or_misread(
    name: str, loads: str, maths: str, tmp_path: Path
) -> None:
    answer, found = asked(kohya_file(tmp_path / "a.safetensors", dora_scale=values(OUT, 1)), name)
    assert (answer.loads, answer.same_maths) == (loads, maths)
    assert found["dora"].severity == "error"


def test_sd_scripts_knows_no_diffusers_names(tmp_path: Path) -> None:
    folder = diffusers_folder("plain", tmp_path / "a")
    answer, found = asked(folder / "pytorch_lora_weights.safetensors", "sd-scripts")
    assert answer.loads == "no"
    assert found["format"].hint.endswith("OUT --to kohya")


def test_mixed_ranks_without_any_alpha_were_misread_by_diffusers(tmp_path: Path) -> None:
    folder = diffusers_folder("rank", tmp_path / "a")
    from safetensors.numpy import load_file

    file = folder / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)  # without the metadata
    _, found = asked(file, "diffusers")
    assert found["rank-mixed"].severity == "warning"


# --- spelling, and parts that are missing --------------------------------------------------------------------


def renamed(change: Any) -> dict[str, np.ndarray]:
    return {change(key): value for key, value in factors().items()}


@pytest.mark.parametrize(
    ("name", "loads", "maths"),
    [("vllm", "no", "unknown"), ("sglang", "unknown", "unknown"), ("llama.cpp", "no", "unknown"),
     ("lorax", "yes", "no"), ("tensorrt-llm", "no", "unknown"), ("peft", "yes", "unknown")],
)  # fmt: skip
def test_an_adapter_name_left_in_the_keys(name: str, loads: str, maths: str, tmp_path: Path) -> None:
    tensors = renamed(lambda key: key.replace(".weight", ".default.weight"))
    answer, found = asked(write_adapter(tmp_path / "a", tensors, **CONFIG), name)
    assert (answer.loads, answer.same_maths) == (loads, maths)
    assert found["adapter-name"].hint == f"loratools normalize {tmp_path / 'a'} OUT --for {name}"


@pytest.mark.parametrize(("name", "loads", "maths"), [("llama.cpp", "no", "unknown"), ("peft", "yes", "no")])
def test_a_missing_prefix(name: str, loads: str, maths: str, tmp_path: Path) -> None:
    tensors = renamed(lambda key: key.removeprefix(PREFIX))
    answer, _ = asked(write_adapter(tmp_path / "a", tensors, **CONFIG), name)
    assert (answer.loads, answer.same_maths) == (loads, maths)


def test_a_factor_without_its_partner(tmp_path: Path) -> None:
    tensors = factors()
    del tensors[f"{PREFIX}{FIRST}.lora_B.weight"]
    folder = write_adapter(tmp_path / "a", tensors, **CONFIG)
    assert asked(folder, "vllm")[0].loads == "no"
    assert asked(folder, "peft")[0].same_maths == "no"


@pytest.mark.parametrize(
    ("adapted", "loads", "maths"),
    [
        ("qkv", "yes", "yes"), ("qv", "yes", "yes"), ("k", "no", "unknown"), ("v", "no", "unknown"),
        ("q", "no", "unknown"),
    ],
)  # fmt: skip
def test_sglang_stacks_q_k_and_v(adapted: str, loads: str, maths: str, tmp_path: Path) -> None:
    shapes = {f"model.layers.0.self_attn.{letter}_proj": (OUT, INTO) for letter in adapted}
    answer, _ = asked(make_adapter(tmp_path / "a", shapes), "sglang")
    assert (answer.loads, answer.same_maths) == (loads, maths)


def test_experts_of_vllm_have_all_their_projections(tmp_path: Path) -> None:
    whole = {f"l.0.experts.{i}.w{j}": (OUT, INTO) for i in range(2) for j in (1, 2, 3)}
    partly = {name: shape for name, shape in whole.items() if name != "l.0.experts.1.w3"}
    assert asked(make_adapter(tmp_path / "a", whole), "vllm")[0].loads == "unknown"
    answer, found = asked(make_adapter(tmp_path / "b", partly), "vllm")
    assert (answer.loads, found["experts-partly"].where) == ("no", "l.0")


@pytest.mark.parametrize("feature", ["plain", "rslora", "rank", "alpha", "dora"])
def test_what_is_written_for_mlx_loads_there(feature: str, tmp_path: Path) -> None:
    lt.load(peft_folder(feature, tmp_path / "a")).save(tmp_path / "b", format="mlx", sync=False)
    answer, found = asked(tmp_path / "b", "mlx", base=write_model(tmp_path / "base"))
    assert (answer.loads, answer.same_maths) == ("yes", "yes"), found


def test_a_classification_head_is_the_one_whole_tensor_vllm_takes(tmp_path: Path) -> None:
    tensors = factors() | {f"{PREFIX}score.weight": values(3, INTO)}
    folder = write_adapter(tmp_path / "a", tensors, **CONFIG, modules_to_save=["score"])
    assert asked(folder, "vllm")[0].loads == "yes"
    assert asked(folder, "tensorrt-llm")[0].loads == "no"


@pytest.mark.parametrize(
    ("config", "name", "code"),
    [
        ({"target_modules": ".*_proj"}, "sglang", "targets-pattern"),
        ({"lora_alpha": 8.0}, "ollama", "alpha-float"),
        ({"lora_alpha": 0}, "llama.cpp", "alpha-zero"),
        ({"lora_alpha": 0}, "ollama", "alpha-zero"),
        ({"lora_alpha": -8}, "ollama", "alpha-negative"),
        ({"init_lora_weights": "corda"}, "peft", "init-base"),
        ({"init_lora_weights": "loftq"}, "peft", "init-base"),
        ({"target_modules": None}, "vllm", "config-fields"),
        ({"lora_alpha": None}, "ollama", "config-fields"),
        ({"bias": "all"}, "vllm", "bias"),
        ({"lora_bias": True}, "vllm", "lora-bias"),
        ({"modules_to_save": ["lm_head"]}, "vllm", "saved-modules"),
        ({"r": 8}, "vllm", "rank-config"),
    ],
)
def test_a_field_that_one_engine_minds(config: dict[str, Any], name: str, code: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", factors(), **{**CONFIG, **config})
    answer, found = asked(folder, name)
    assert found[code].severity == "error"
    assert "no" in (answer.loads, answer.same_maths)


def test_a_pattern_that_changes_nothing_is_no_finding(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "a", factors(), **CONFIG, alpha_pattern={"q_proj": 8}, rank_pattern={"k_proj": 4}
    )
    answer, found = asked(folder, "sglang")
    assert (answer.loads, answer.same_maths, set(found)) == ("yes", "yes", {"rank-max"})


def test_rslora_of_rank_one_is_plain(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", ATTENTION, rank=1, alpha=3, use_rslora=True)
    assert asked(folder, "sglang")[0].same_maths == "yes"


# --- the data ------------------------------------------------------------------------------------------------

RULES = [(name, rule) for name in NAMES for rule in engine(name).rules]
FIXES = [(name, rule) for name, rule in RULES if rule.fix]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_of_an_engine_is_complete(name: str) -> None:
    one = engine(name)
    assert one.rules
    for rule in one.rules:
        assert rule.check in CHECKS
        assert {rule.loads, rule.same_maths} <= {"yes", "no", "unknown"}
        assert rule.severity in {"error", "warning", "info"}
        assert set(re.split(r", ", rule.evidence)) <= {"source", "measured", "thread", "inferred"}
        assert rule.source.startswith("https://")
        assert (rule.severity == "error") == ("no" in (rule.loads, rule.same_maths)), rule


@pytest.mark.parametrize(("name", "rule"), FIXES, ids=lambda one: getattr(one, "id", one))
def test_a_fix_is_a_command_there_is(name: str, rule: Any) -> None:
    words = rule.fix.split()
    assert words[0] == "loratools"
    assert words[1] in {*COMMANDS, "convert"}
    if words[1] in COMMANDS:
        options = {o for p in app.get_command(None, words[1]).params for o in p.opts}  # type: ignore[union-attr,arg-type]
        assert {word for word in words if word.startswith("--")} <= options
    if "--for" in words:
        assert words[words.index("--for") + 1] == name


# Rule x engine, written out here: E refuses or crashes, S silently wrong, W a warning, ? not known, ok no
# fault, - nothing said (or said of files that do not load there at all).
_COLUMNS = ("vllm", "sglang", "llama.cpp", "mlx", "tensorrt-llm", "ollama", "diffusers")
_TABLE = {
    "scale-rslora": "ok S S - ok S ok",
    "scale-pattern": "W S S - S S ok",
    "rank-mixed": "W E ok E ok ok W",
    "rank-config": "E E ok - ok ok -",
    "dora": "E E E ok - E S",
    "init-base": "E S S - S S ?",
    "bias": "E S E E E E ?",
    "lora-bias": "E S E E E E ok",
    "saved-modules": "E S E E E E ok",
    "vocabulary": "E E E E ? E ok",
    "embedding": "E ok E S S E ok",
    "adapter-name": "E ? E - E E -",
    "key-prefix": "S - E - - - S",
    "prefix-missing": "? W E - E - -",
    "unpaired": "E E E - - - W",
    "shape": "S E E E E - E",
    "targets-pattern": "ok E ok - - - -",
    "packed-partly": "ok E - - ? - -",
    "experts-packed": "E E E - E E -",
    "transposed": "? S S - - - ok",
    "dtype": "ok - - - - W -",
    "alpha-float": "ok ok ok - ok E ok",
}


@pytest.mark.parametrize("code", _TABLE)
def test_the_table_of_rules(code: str) -> None:
    for name, cell in zip(_COLUMNS, _TABLE[code].split(), strict=True):
        rules = [rule for rule in engine(name).rules if rule.id == code]
        fits = {
            "E": any(rule.loads == "no" for rule in rules),
            "S": any(rule.silent for rule in rules),
            "W": any(rule.severity == "warning" for rule in rules),
            "?": any("unknown" in (rule.loads, rule.same_maths) for rule in rules),
            "ok": all(rule.severity != "error" for rule in rules),
            "-": True,
        }[cell]
        assert fits, (name, cell, rules)


def test_every_rule_can_make_its_message(tmp_path: Path) -> None:
    """Each check is brought to find something, and gives all the words that the rules which name it use."""
    given: dict[str, set[str]] = {}
    for facts in troubled(tmp_path):
        for _, rule in RULES:
            for found in CHECKS[rule.check](facts, **rule.parameters):
                given.setdefault(rule.check, set(found.words)).intersection_update(found.words)
    assert given.keys() == {rule.check for _, rule in RULES}
    for name, rule in RULES:
        texts = (rule.message, rule.fix, rule.flag)
        used = {field for text in texts for _, field, _, _ in string.Formatter().parse(text) if field}
        assert used <= {"ref", *given[rule.check]}, (name, rule.id)


def troubled(folder: Path) -> Iterator[Facts]:
    """Adapters with every trouble there is a check for."""
    base = BaseFacts(
        "base", "llama", tied=True, vocabulary=300_000, unmatched=("x",), renamed="a to b",
        misfits={"x": ((2, 2), (3, 3)), "y": ((4, 4), (3, 3))},
    )  # fmt: skip
    for number, feature in enumerate(PLANTS):
        adapter = lt.load(peft_folder(feature, folder / feature), allow_pickle=True)
        yield gather(
            adapter, ["a.lora_A.default.weight", PREFIX * 2], suffix=".bin", base=base if number % 2 else None
        )
        yield gather(adapter, [], added_tokens=(400_000,), base=replace(base, family="qwen2", tied=False))
        yield gather(adapter, ["a.lora_A.other.weight"], beyond_half=("x",), base=replace(base, layers=9))
    yield gather(lt.load(kohya_file(folder / "k.safetensors", dora_scale=values(OUT, 1))), [])
    yield gather(lt.load(diffusers_folder("rank", folder / "d")), [])
    experts = {f"model.layers.0.mlp.experts.{i}.gate_proj": (OUT, INTO) for i in range(2)}
    tensors = factors(experts) | factors({"vision_tower.layers.0.q_proj": (OUT, INTO)}, rank=600)
    tensors[f"{PREFIX}{next(iter(experts))}.lora_magnitude_vector"] = values(OUT)
    odd = {
        **CONFIG, "r": 600, "rank_pattern": {"experts": RANK, "experts.0.gate_proj": 2}, "fan_in_fan_out": True,
        "lora_alpha": 0.0, "target_modules": ".*", "use_bdlora": None, "base_model_name_or_path": None,
    }  # fmt: skip
    tensors |= factors({next(iter(experts)): (OUT, INTO)}, rank=2)
    tensors |= {
        f"{PREFIX}conv.lora_A.weight": values(600, 3, 3, 3),
        f"{PREFIX}conv.lora_B.weight": values(5, 600, 1, 1),
    }
    yield gather(lt.load(write_adapter(folder / "odd", tensors, **odd)), [])
    lone = factors()
    del lone[f"{PREFIX}{FIRST}.lora_A.weight"]
    yield gather(lt.load(write_adapter(folder / "lone", lone, **{**CONFIG, "r": 3, "peft_type": "LORA"})), [])
    yield gather(lt.load(write_adapter(folder / "ia3", {}, peft_type="IA3", r=2)), [])
    for kind in ("oft", "boft", "lokr"):
        adapter = lt.load(folder / "k.safetensors")
        modules = {name: replace(module, kind=kind) for name, module in adapter.modules.items()}
        mid = {n: replace(m, tensors={**m.tensors, "mid": m.tensors["up"]}) for n, m in modules.items()}
        yield gather(replace(adapter, modules=mid), [])
    copied = factors() | {f"{PREFIX}lm_head.base_layer.weight": values(VOCABULARY, INTO)}
    yield gather(lt.load(write_adapter(folder / "copied", copied, **{**CONFIG, "lora_alpha": -1})), [])
    stray = lt.load(gguf_file(folder / "stray.gguf", "qwen2", stray="blk.0.attn_q.weight.lora_c"))
    for architecture in ("llama", ""):
        yield gather(stray, [], base=replace(base, family="mixtral_next", architecture=architecture))
    rest = replace(next(iter(stray.extras.values())), reason="its factors do not fit; is no module of qwen2")
    yield gather(replace(stray, extras={"x": rest}), [])
    adapter = lt.load(diffusers_folder("bias", folder / "b"))
    yield gather(replace(adapter, format="mlx"), [])


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 700)
    | st.floats()
    | st.sampled_from(["q_proj", "pissa", "", "all"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["q_proj", "(", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
_FIELDS = (
    "r", "lora_alpha", "use_rslora", "use_dora", "bias", "lora_bias", "rank_pattern", "alpha_pattern", "target_modules",
    "modules_to_save", "init_lora_weights", "target_parameters", "layer_replication", "use_bdlora", "fan_in_fan_out",
    "alora_invocation_tokens", "peft_type", "base_model_name_or_path",
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(config=st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=6))
def test_a_configuration_of_any_shape_is_judged(config: dict[str, Any]) -> None:
    report = lt.validate(factors(), config={**CONFIG, **config}, engines=NAMES)
    assert [answer.name for answer in report.engines] == list(NAMES)
    for finding in report.findings:
        assert finding.message


def test_what_is_no_adapter_is_not_to_be_converted(tmp_path: Path) -> None:
    save_file(
        {"model.embed.weight": values(4, 4), "model.norm.weight": values(4)}, tmp_path / "model.safetensors"
    )
    for name in NAMES:
        answer, found = asked(tmp_path / "model.safetensors", name)
        assert answer.loads == "no"
        assert found["format"].hint is None


def test_names_are_completed() -> None:
    from loratools.cli.engines import ENGINES

    context = click.Context(click.Command("validate"))
    found = [item.value for item in ENGINES.shell_complete(context, click.Option(["--for"]), "vllm,s")]
    assert found == ["vllm,sglang", "vllm,sd-scripts"]


def test_engines_by_other_names() -> None:
    assert [known(name) for name in ("VLLM", "llama-cpp", " trtllm", "kohya", "nothing")] == [
        "vllm", "llama.cpp", "tensorrt-llm", "sd-scripts", None,
    ]  # fmt: skip
    with pytest.raises(Unsupported, match="no engine 'nothing'") as caught:
        engine("nothing")
    assert "tensorrt-llm" in str(caught.value.hint)


def test_engines_are_judged_without_numpy(tmp_path: Path) -> None:
    folder = peft_folder("plain", tmp_path / "a")
    program = f"""
import sys
import loratools as lt
from loratools.engines.base import NAMES, engine, judge
from loratools.verbs.checking.engines import gather
adapter = lt.load({str(folder)!r})
for name in NAMES:
    judge(engine(name), gather(adapter, [ref.name for ref in adapter.tensors]))
assert not {{"numpy", "torch", "click", "rich"}} & {{name.partition(".")[0] for name in sys.modules}}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


# --- the commands --------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_exits_with_findings(tmp_path: Path) -> None:
    folder = peft_folder("rslora", tmp_path / "a")
    silent = invoke("validate", folder, "--for", "vllm,sglang")
    assert silent.exit_code == 1
    assert "sglang: loads, computes something else" in silent.stdout
    assert "vllm: loads, computes the same\n" in silent.stdout
    assert invoke("validate", folder, "--for", "vllm").exit_code == 0
    said = json.loads(invoke("validate", folder, "--for", "sglang, vllm,sglang", "--json").stdout)
    assert said["ok"] is False
    assert said["engines"] == [
        {"name": "sglang", "loads": "yes", "same_maths": "no", "flags": ["--max-lora-rank 4"]},
        {"name": "vllm", "loads": "yes", "same_maths": "yes", "flags": []},
    ]
    (error,) = [f for f in said["findings"] if f["severity"] == "error"]
    assert (error["code"], error["engine"]) == ("scale-rslora", "sglang")


@pytest.mark.parametrize("names", ["nothing", "vllm,nothing", ","])
def test_an_unknown_engine_is_a_usage_error_that_lists_the_known(names: str, tmp_path: Path) -> None:
    result = invoke("validate", peft_folder("plain", tmp_path / "a"), "--for", names)
    assert result.exit_code == 2
    assert all(name in result.stderr for name in NAMES)
    assert invoke("normalize", tmp_path / "a", tmp_path / "b", "--for", "nothing").exit_code == 2


def test_the_engines_can_be_set_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = peft_folder("rslora", tmp_path / "a")
    assert invoke("validate", folder).exit_code == 0
    monkeypatch.setenv("LORATOOLS_VALIDATE_FOR", "sglang")
    assert invoke("validate", folder).exit_code == 1
    assert invoke("validate", folder, "--for", "vllm").exit_code == 0
    monkeypatch.delenv("LORATOOLS_VALIDATE_FOR")
    (tmp_path / "loratools.toml").write_text('[validate]\nfor = "vllm,llama.cpp"\n')
    assert "llama.cpp: loads, computes something else" in invoke("validate", folder).stdout


def test_annotations_name_the_engine(tmp_path: Path) -> None:
    report = lt.validate(peft_folder("rslora", tmp_path / "a"), engines=["sglang", "llama.cpp"])
    (run,) = sarif(report)["runs"]
    errors = [result for result in run["results"] if result["level"] == "error"]
    assert [result["ruleId"] for result in errors] == ["sglang/scale-rslora", "llama.cpp/scale-rslora"]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    lines = [github(report, finding) for finding in report.findings]
    assert any(line.startswith("::error ") and "title=sglang/scale-rslora::" in line for line in lines)
    result = invoke("validate", tmp_path / "a", "--for", "sglang", "--format", "sarif")
    assert (result.exit_code, json.loads(result.stdout)["version"]) == (1, "2.1.0")


def test_the_list_of_engines() -> None:
    said = json.loads(invoke("engines", "--json").stdout)
    assert said["schema"] == "loratools.engines/1"
    assert [one["name"] for one in said["engines"]] == list(NAMES)
    assert all(one["rules"] and one["version"] for one in said["engines"])
    table = invoke("engines").stdout
    assert all(name in table for name in NAMES)
    assert "scale-rslora" in invoke("engines", "-v").stdout


@pytest.mark.skipif(
    "LORATOOLS_CORPUS" not in os.environ, reason="LORATOOLS_CORPUS names no folder of real adapters"
)
def test_real_configurations_are_judged() -> None:
    paths = sorted((Path(os.environ["LORATOOLS_CORPUS"]) / "configs").rglob("*.json"))
    configs = [json.loads(path.read_text()) for path in paths if path.name != "INDEX.json"]
    assert len(configs) > 100
    for config in configs:
        if isinstance(config, dict):
            report = lt.validate(factors(), config=config, engines=NAMES)
            assert len(report.engines) == len(NAMES)


def test_plants_are_all_in_the_tables() -> None:
    from tests.test_engines import LOADS

    assert set(PLANTS) - {"head"} == set(LOADS)
