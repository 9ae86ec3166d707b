"""Adapters made by other people, where they are at hand: LORATOOLS_CORPUS names the folder."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import loratools as lt
from loratools.errors import BadConfig, InputError, Unsupported
from loratools.formats.peft_config import parse_config, read_config
from loratools.formats.recognise import recognise
from loratools.tensors.memory import MemorySource

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS = Path(os.environ.get("LORATOOLS_CORPUS", ""))
pytestmark = pytest.mark.skipif(
    not os.environ.get("LORATOOLS_CORPUS"), reason="LORATOOLS_CORPUS does not name a folder of real adapters"
)


def entries() -> list[dict[str, Any]]:
    path = CORPUS / "MANIFEST.json"
    return json.loads(path.read_text()) if os.environ.get("LORATOOLS_CORPUS") and path.exists() else []


# What each file is called here; the manifest has its tensors, types and ranks. By a part of its path.
NAMED = {
    "Inishpy__lerobot": ("stripped", "an adapter without its factors"),
    "LyCORIS": ("kohya", "lokr"),
    "Sam_LoRA": ("sam-lora", "lora"),
    "catundchat": ("diffusers", "lora"),
    "Langchain-Chatchat": ("peft", "prefix_tuning"),
    "cloneofsimo__lora/example": ("cloneofsimo", "lora"),
    "cloneofsimo__lora/lora_disney.pt": ("nameless", "lora"),
    "huggingface__diffusers": ("diffusers", "lora"),
    "IA3": ("peft", "ia3"),
    "peft_mrpc_40_aligned": ("peft", "finegates"),
    "results_glue": ("peft", "unilora"),
    "microsoft__LoRA": ("loralib", "lora"),
    "mlx-lm": ("mlx", "lora"),
    "ollama": ("mlx", "lora"),
    "MLX-CLI": ("mlx", "lora"),
}
# alpha / r as their configurations have them (MLX: the scale; LyCORIS: the tensors), or 1 where nothing says an alpha.
SCALINGS = {
    "BK7195": 32.0, "sift-opf": 2.0, "monteclora": 2.0, "tommyroar": 2.0, "BLOOM": 2.0, "mlx-lm": 20.0, "ollama": 2.0,
    "MLX-CLI": 10.0, "LyCORIS": 1.0, "Sam_LoRA": 1.0, "catundchat": 1.0, "cloneofsimo": 1.0, "text_to_image": 1.0,
}  # fmt: skip
# What inspect has no remark on.
PLAIN = ("BK7195", "sift-opf", "monteclora", "tommyroar", "BLOOM", "mlx-lm", "ollama", "LyCORIS")
SILENT_ON_ALPHA = ("Sam_LoRA", "catundchat", "cloneofsimo", "text_to_image")


def looked_up(table: dict[str, Any], file: str, default: Any) -> Any:
    return next((value for part, value in table.items() if part in file), default)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry["file"])
def test_a_real_file_is_inspected_as_the_manifest_says(entry: dict[str, Any]) -> None:
    report = lt.inspect(CORPUS / entry["file"], allow_pickle=True)
    form, kind = looked_up(NAMED, entry["file"], ("peft", "lora"))
    assert (report.format, report.kinds) == (form, (kind,))
    assert sum(report.dtypes.values()) == entry["tensors"]
    types = {"LongStorage": "I64"}
    assert report.dtypes == {types.get(name, name): count for name, count in entry["dtypes"].items()}
    if entry["ranks"]:
        # Blocks of a fused weight count each for themselves here, and together in the manifest.
        ranks = [module.rank * module.blocks for module in report.modules if module.rank]
        assert {str(r): ranks.count(r) for r in ranks} == entry["ranks"]
        assert 2 * len(report.modules) + len(report.extras) == entry["tensors"]
    scaling = looked_up(SCALINGS, entry["file"], None)
    assert (report.scaling.min, report.scaling.max) == (scaling, scaling)
    assert bool(report.warnings) == (not any(part in entry["file"] for part in PLAIN)), report.warnings
    silent = any("no alpha in the file" in warning for warning in report.warnings)
    assert silent == any(part in entry["file"] for part in SILENT_ON_ALPHA)


# What is named for what it is, and refused by whatever computes; by the reason.
REFUSED = {
    "lerobot": "is no adapter", "Langchain": "PREFIX_TUNING", "lora_disney.pt": "without names",
    "peft_mrpc": "FINEGATES", "results_glue": "UNILORA", "microsoft__LoRA": "nothing says how loralib",
}  # fmt: skip


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry["file"])
def test_a_real_file_is_computed_with_or_refused_by_name(entry: dict[str, Any]) -> None:
    adapter = lt.load(CORPUS / entry["file"], allow_pickle=True)
    reason = looked_up(REFUSED, entry["file"], None)
    if reason is not None:
        with pytest.raises(Unsupported, match=reason):
            adapter.require_computable()
        return
    adapter.require_computable()
    assert adapter.modules
    module = next(iter(adapter.modules.values()))
    if module.is_delta:
        rows = module.load().rows(0, 2)  # type: ignore[attr-defined]
        assert rows.shape == (2, np.prod(module.shape[1:]))
        assert np.isfinite(rows).all()


def test_the_same_kind_of_adapter_under_two_namings_is_compared_module_by_module() -> None:
    """Two LoRAs of Stable Diffusion 1, one by attention processors and one by module names."""
    files = [entry["file"] for entry in entries()]
    one = next(file for file in files if "catundchat" in file and file.endswith(".safetensors"))
    other = next(file for file in files if "text_to_image" in file)
    report = lt.diff(CORPUS / one, CORPUS / other)
    assert (len(report.modules), report.only_in_a, report.only_in_b) == (128, (), ())
    assert lt.diff(CORPUS / one, CORPUS / one).identical


def test_numbered_modules_are_those_of_a_named_file() -> None:
    """cloneofsimo's 144 layers of the U-Net contain the 128 projections that diffusers' trainer names."""
    files = [entry["file"] for entry in entries()]
    numbered = lt.load(CORPUS / next(file for file in files if "analog_svd" in file))
    named = lt.load(CORPUS / next(file for file in files if "text_to_image" in file))
    assert named.modules.keys() <= numbered.modules.keys()
    for name, module in named.modules.items():
        assert numbered.modules[name].shape == module.shape


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry["file"])
def test_a_real_file_is_valid_or_said_to_be_none(entry: dict[str, Any]) -> None:
    report = lt.validate(CORPUS / entry["file"], allow_pickle=True)
    found = {finding.code for finding in report.findings if finding.severity == "error"}
    assert found == ({"format-unknown"} if "lerobot" in entry["file"] else set())
    assert report.ok == (not found)
    codes = {finding.code for finding in report.findings}
    assert ("alpha-not-stored" in codes) == any(part in entry["file"] for part in SILENT_ON_ALPHA)
    refused = {"refused", "format-unknown", "not-an-adapter"}
    assert bool(codes & refused) == (looked_up(REFUSED, entry["file"], None) is not None)


def headers() -> list[Path]:
    folder = CORPUS / "headers"
    found = sorted(folder.glob("*.json")) if os.environ.get("LORATOOLS_CORPUS") else []
    return [path for path in found if path.name != "INDEX.json"]


def configs() -> list[Path]:
    folder = CORPUS / "configs"
    found = sorted(folder.glob("*.json")) if os.environ.get("LORATOOLS_CORPUS") else []
    return [path for path in found if path.name != "INDEX.json"]


def test_every_real_configuration_is_read_or_says_why_not() -> None:
    index = {entry["file"]: entry for entry in json.loads((CORPUS / "configs" / "INDEX.json").read_text())}
    for path in configs():
        raw = read_config(path)
        kind = index[path.name]["peft_type"]
        if raw.get("peft_type") is None:
            with pytest.raises(BadConfig, match="no peft_type"):
                parse_config(raw, path.name)
            continue
        config = parse_config(raw, path.name)
        assert config.peft_type == kind
        if kind == "LORA":
            assert config.rank == (8 if raw.get("r") is None else raw["r"])
            assert config.alpha == (8 if raw.get("lora_alpha") is None else raw["lora_alpha"])


def test_real_configurations_resolve_patterns_as_peft_does() -> None:
    from peft.utils.other import get_pattern_key

    tried = 0
    for path in configs():
        raw = read_config(path)
        patterns = raw.get("rank_pattern") or {}
        if raw.get("peft_type") != "LORA" or not patterns:
            continue
        config = parse_config(raw, path.name)
        for key in list(patterns)[:50]:
            for name in (key, f"model.{key}", f"model.layers.3.{key}x", key.replace(".", "_")):
                wanted = patterns.get(get_pattern_key(list(patterns), name), config.rank)
                assert config.rank_pattern.first(name, config.rank) == wanted
                tried += 1
    assert tried


KNOWN_NEGATIVES = {
    "lfs_pointer_adapter_model.safetensors": "Git LFS pointer",
    "lfs_pointer_adapter_config.json": "Git LFS pointer",
    "smolvla_config_no_peft_type.json": "no peft_type",
    "json_stripped_not_safetensors.safetensors": "JSON text",
}


@pytest.mark.parametrize("name", KNOWN_NEGATIVES)
def test_what_is_no_weight_file_is_refused_by_both_verbs(name: str) -> None:
    for verb in (lt.inspect, lt.validate):
        with pytest.raises(InputError, match=KNOWN_NEGATIVES[name]):
            verb(CORPUS / "negatives" / name)


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("full_model_minicpm3_tiny.safetensors", "full model", "not-an-adapter"),
        ("textual_inversion_embedding.safetensors", "textual inversion", "not-an-adapter"),
        ("safetensors_sample_overall.safetensors", "unknown", "format-unknown"),
    ],
)
def test_what_is_no_adapter_is_named(name: str, kind: str, code: str) -> None:
    report = lt.inspect(CORPUS / "negatives" / name)
    assert report.kinds == (kind,)
    assert report.warnings
    assert [f.code for f in lt.validate(CORPUS / "negatives" / name).findings] == [code]


# Keys and shapes of real image-model files: format, kinds, modules. No key belongs to none.
HEADERS = {
    "flux_peft_base_model_prefix_bf16": ("diffusers", ("lora",), 381),
    "invokeai_anima_lora_kohya_format": ("kohya", ("lora",), 11),
    "invokeai_anima_lora_kohya_with_te_format": ("kohya", ("lora",), 9),
    "invokeai_anima_lora_peft_format": ("comfy", ("lora",), 6),
    "invokeai_flux_control_lora_format": ("bfl-control", ("lora", "set"), 466),
    "invokeai_flux_dora_onetrainer_format": ("onetrainer", ("dora",), 506),
    "invokeai_flux_lokr_bfl_format": ("comfy", ("lokr",), 6),
    "invokeai_flux_lora_aitoolkit_format": ("comfy", ("lora",), 228),
    "invokeai_flux_lora_diffusers_base_model_format": ("diffusers", ("lora",), 381),
    "invokeai_flux_lora_diffusers_format": ("diffusers", ("lora",), 494),
    "invokeai_flux_lora_diffusers_no_proj_mlp_format": ("diffusers", ("lora",), 342),
    "invokeai_flux_lora_kohya_format": ("kohya", ("lora",), 304),
    "invokeai_flux_lora_xlabs_format": ("xlabs", ("lora",), 12),
    "invokeai_qwen_image_lora_diffusers_format": ("diffusers", ("lora",), 3),
    "sd15_kohya_shinkai_makoto_offset_r128_fp16": ("kohya", ("lora",), 264),
    "sdxl_kohya_alien_style": ("kohya", ("lora",), 986),
}


@pytest.mark.parametrize("path", headers(), ids=lambda path: path.stem)
def test_keys_of_image_models_are_all_understood(path: Path) -> None:
    header = json.loads(path.read_text())
    shapes = {key: value["shape"] if isinstance(value, dict) else value for key, value in header.items()}
    source = MemorySource({key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()})
    adapter = recognise(path.stem, source, {})
    adapter.require_computable()
    assert not adapter.extras
    assert {
        ref.name for module in adapter.modules.values() for ref in module.tensors.values()
    } == shapes.keys()
    if path.stem in HEADERS:
        assert (adapter.format, adapter.kinds, len(adapter.modules)) == HEADERS[path.stem]


# --- what PEFT 0.6.1 computed ----------------------------------------------------------------------------


def toy_mlp(state: dict[str, Any], inputs: Any) -> Any:
    """PEFT's regression network: lin0 (10, 20), ReLU, lin1 (20, 2), log-softmax."""
    import torch

    hidden = torch.relu(torch.nn.functional.linear(inputs, state["lin0.weight"], state["lin0.bias"]))
    return torch.nn.functional.linear(hidden, state["lin1.weight"], state["lin1.bias"]).log_softmax(-1)


def toy_convolution(state: dict[str, Any], inputs: Any) -> Any:
    """Its convolutional sister: conv2d (5, 10, 3), ReLU, flatten, lin0 (10, 2), log-softmax."""
    import torch

    hidden = torch.nn.functional.conv2d(inputs, state["conv2d.weight"], state["conv2d.bias"])
    hidden = torch.relu(hidden).flatten(1)
    return torch.nn.functional.linear(hidden, state["lin0.weight"], state["lin0.bias"]).log_softmax(-1)


GOLDEN: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "lora_mlp": (toy_mlp, (9, 10)),
    "lora_mlp_modules_to_save": (toy_mlp, (9, 10)),
    "adalora_mlp": (toy_mlp, (9, 10)),
    "ia3_mlp": (toy_mlp, (9, 10)),
    "lora_conv2d": (toy_convolution, (2, 5, 3, 3)),
}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "state dict"])
def test_merged_weights_give_the_output_of_peft_0_6_1(name: str, from_file: bool) -> None:
    import torch
    from safetensors.torch import load_file

    folder = CORPUS / "golden_peft_0.6.1" / name
    network, shape = GOLDEN[name]
    base = load_file(folder / "base.safetensors")
    report = lt.merge(folder / "base.safetensors" if from_file else base, folder)
    assert report.state_dict is not None
    state = {key: torch.as_tensor(np.asarray(value)) for key, value in report.state_dict.items()}
    assert any(not torch.equal(state[key], base[key]) for key in base)
    found = network(state, torch.arange(90.0).reshape(shape))
    wanted = torch.tensor(json.loads((folder / "expected.json").read_text())["output"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_adapters_are_valid_for_their_base(name: str) -> None:
    folder = CORPUS / "golden_peft_0.6.1" / name
    report = lt.validate(folder, base=folder / "base.safetensors")
    assert report.ok, report.findings
    kind = name.partition("_")[0]
    inspected = lt.inspect(folder)
    assert inspected.kinds == (kind,)
    rank = {"lora": 8, "adalora": 12, "ia3": None}[kind]  # AdaLoRA's init_r, as stored
    assert (inspected.rank.min, inspected.rank.max) == (rank, rank)


def test_the_pickle_beside_a_golden_adapter_is_the_same_adapter() -> None:
    for name in GOLDEN:
        folder = CORPUS / "golden_peft_0.6.1" / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages, from old pickles
            pickled = lt.load(folder / "adapter_model.bin", allow_pickle=True)
        plain = lt.load(folder)
        assert {r.name: hashlib.sha256(r.load().tobytes()).digest() for r in pickled.tensors} == {
            r.name: hashlib.sha256(r.load().tobytes()).digest() for r in plain.tensors
        }
        assert {n: (m.rank, m.scaling) for n, m in pickled.modules.items()} == {
            n: (m.rank, m.scaling) for n, m in plain.modules.items()
        }
