"""``validate``: each fault is planted in an adapter that is right, and found by its code."""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.errors import CorruptFile, LoratoolsError, NotFound
from loratools.formats.peft import ROLES
from tests.helpers import write_adapter
from tests.small import INTO, LAYERS, OUT, SHAPES, base_tensors, write_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loratools.verbs.reports import ValidationReport

    Tensors = dict[str, np.ndarray]
    Plant = Callable[[Tensors, dict[str, Any]], None]

RANK = 8  # what PEFT takes where the configuration says nothing
KEY = "base_model.model.layers.{}.q_proj.lora_{}.weight"
A0, B0 = KEY.format(0, "A"), KEY.format(0, "B")
CONFIG = {
    "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "org/base", "bias": "none",
}  # fmt: skip


def sound() -> Tensors:
    """The factors of a LoRA with nothing wrong about it."""
    rng = np.random.default_rng(0)
    found = {}
    for i, (out, into) in enumerate(SHAPES.values()):
        found[KEY.format(i, "A")] = rng.standard_normal((RANK, into), np.float32)
        found[KEY.format(i, "B")] = rng.standard_normal((out, RANK), np.float32)
    return found


def checked(folder: Path, plant: Plant | None = None, **options: Any) -> ValidationReport:
    """Write the adapter with a fault in it, and validate it."""
    tensors, config = sound(), dict(CONFIG)
    if plant is not None:
        plant(tensors, config)
    return lt.validate(write_adapter(folder / "adapter", tensors, **config), **options)


def codes(report: ValidationReport) -> set[tuple[str, str]]:
    return {(finding.code, finding.severity) for finding in report.findings}


def test_a_sound_adapter_has_no_findings(tmp_path: Path) -> None:
    report = checked(tmp_path, strict=True)
    assert report.findings == ()
    assert report.ok
    assert set(report.modules) == set(SHAPES)
    assert report.to_dict() == {
        "schema": "loratools.validate/1", "path": str(tmp_path / "adapter"), "ok": True, "findings": [],
        "modules": list(report.modules), "engines": [],
    }  # fmt: skip


def drop(name: str) -> Plant:
    return lambda tensors, config: tensors.pop(name, config.pop(name, None))  # type: ignore[arg-type, return-value]


def put(**fields: Any) -> Plant:
    return lambda tensors, config: config.update(fields)


def add(name: str, value: np.ndarray) -> Plant:
    return lambda tensors, config: tensors.update({name: value})


def one(shape: tuple[int, ...], value: float = 1.0) -> np.ndarray:
    return np.full(shape, value, np.float32)


def rekeyed(spell: Callable[[str], str]) -> Plant:
    def plant(tensors: Tensors, config: dict[str, Any]) -> None:
        kept = dict(tensors)
        tensors.clear()
        tensors.update({spell(key): value for key, value in kept.items()})

    return plant


def several(*plants: Plant) -> Plant:
    def plant(tensors: Tensors, config: dict[str, Any]) -> None:
        for each in plants:
            each(tensors, config)

    return plant


def spoilt(value: float, key: str = B0) -> Plant:
    def plant(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[key][1, 1] = value

    return plant


MAGNITUDES = [add(f"base_model.model.{path}.lora_magnitude_vector", one((OUT,))) for path in SHAPES]
TOKENS = "base_model.model.embed.token_adapter.trainable_tokens_delta"

# What is planted, the code it is found by, how grave it is, and what ``where`` names.
FAULTS: dict[str, tuple[Plant, str, str, str]] = {
    "rank": (put(r=16), "rank-mismatch", "error", "layers.0.q_proj"),
    "r missing": (drop("r"), "rank-missing", "warning", "r"),
    "alpha missing": (drop("lora_alpha"), "alpha-missing", "warning", "lora_alpha"),
    "r zero": (put(r=0), "config-invalid", "error", "adapter_config.json"),
    "alpha zero": (put(lora_alpha=0), "alpha-zero", "error", "lora_alpha"),
    "alpha zero for one": (put(alpha_pattern={"0.q_proj": 0}), "alpha-zero", "error", "alpha_pattern"),
    "alpha negative": (put(lora_alpha=-8), "alpha-negative", "warning", "lora_alpha"),
    "alpha absurd": (put(lora_alpha=1e7), "alpha-absurd", "warning", "lora_alpha"),
    "scaling large": (put(lora_alpha=1e5), "scaling-extreme", "warning", "layers.0.q_proj"),
    "scaling small": (put(lora_alpha=1e-6), "scaling-extreme", "warning", "layers.0.q_proj"),
    "target absent": (put(target_modules=["q_proj", "v_proj"]), "target-unmatched", "warning", "target_modules"),
    "module not named": (put(target_modules=["v_proj"]), "module-not-targeted", "warning", "layers.0.q_proj"),
    "module not in the pattern": (
        put(target_modules=r".*[012]\.q_proj"), "module-not-targeted", "warning", "layers.3.q_proj",
    ),
    "layer not transformed": (
        several(put(layers_to_transform=[0, 1, 2]), rekeyed(lambda k: k.replace("layers", "model.layers"))),
        "module-not-targeted", "warning", "model.layers.3.q_proj",
    ),
    "module excluded": (put(exclude_modules=["0.q_proj"]), "module-excluded", "warning", "layers.0.q_proj"),
    "saved module absent": (put(modules_to_save=["head"]), "saved-module-absent", "warning", "modules_to_save"),
    "saved twice": (
        several(put(modules_to_save=["head", "head"]), add("base_model.model.head.weight", one((3, INTO)))),
        "duplicate-entry", "info", "modules_to_save",
    ),
    "stray key": (add("base_model.model.norm.weight", one((8,))), "unclaimed-key", "error", "norm.weight"),
    "A without B": (drop(B0), "unpaired-factor", "error", "layers.0.q_proj"),
    "B without A": (drop(A0), "unpaired-factor", "error", "layers.0.q_proj"),
    "ZeRO-3, empty": (several(add(A0, one((0,))), add(B0, one((0,)))), "empty-factor", "error", "layers.0.q_proj"),
    "ZeRO-3, flat": (several(add(A0, one((32,))), add(B0, one((48,)))), "factor-dimensions", "error", "0.q_proj"),
    "ranks of the factors": (add(B0, one((OUT, 2))), "factors-disagree", "error", "layers.0.q_proj"),
    "integers": (add(A0, np.ones((RANK, INTO), np.int32)), "factor-dtype", "error", A0),
    "mixed types": (add(A0, np.ones((RANK, INTO), np.float16)), "mixed-dtypes", "info", ""),
    "no prefix": (rekeyed(lambda k: k.removeprefix("base_model.model.")), "prefix-missing", "info", "layers.0.q_proj"),
    "a prefix missing": (
        rekeyed(lambda k: k.removeprefix("base_model.model.") if "layers.0" in k else k), "prefix-mixed", "info",
        "layers.0.q_proj",
    ),
    "prefix twice": (rekeyed(lambda k: "base_model.model." + k), "prefix-doubled", "info", "base_model.model"),
    "adapter name": (rekeyed(lambda k: k.replace(".weight", ".mine.weight")), "adapter-name-in-keys", "info", "mine"),
    "factor twice": (
        add(A0.replace(".weight", ".default.weight"), one((RANK, INTO))), "duplicate-factor", "error", A0[:-7],
    ),
    "dora without magnitudes": (put(use_dora=True), "dora-without-magnitude", "error", "layers.0.q_proj"),
    "dora with some": (several(put(use_dora=True), *MAGNITUDES[1:]), "dora-without-magnitude", "error", "0.q_proj"),
    "magnitudes without dora": (several(*MAGNITUDES), "magnitude-without-dora", "error", "layers.0.q_proj"),
    "magnitude of another length": (
        several(put(use_dora=True), *MAGNITUDES, add(f"{KEY.format(0, 'x')[:-14]}.lora_magnitude_vector", one((3,)))),
        "factors-disagree", "error", "layers.0.q_proj",
    ),
    "lora_bias without biases": (put(lora_bias=True), "bias-missing", "warning", "lora_bias"),
    "biases without lora_bias": (add(B0[:-6] + "bias", one((OUT,))), "bias-not-declared", "error", "layers.0.q_proj"),
    "bias without biases": (put(bias="all"), "bias-missing", "warning", "bias"),
    "bias unknown": (put(bias="some"), "bias-unknown", "warning", "bias"),
    "fewer rows than tokens": (
        several(put(trainable_token_indices=[1, 2, 3]), add(TOKENS, one((2, INTO)))), "token-rows-mismatch", "error",
        TOKENS,
    ),
    "a token twice": (
        several(put(trainable_token_indices=[1, 1]), add(TOKENS, one((2, INTO)))), "token-twice", "warning", TOKENS,
    ),
    "tokens without rows": (put(trainable_token_indices=[1]), "token-rows-missing", "warning", "token_indices"),
    "pattern for nothing": (put(rank_pattern={"v_proj": 8}), "pattern-unmatched", "warning", "rank_pattern"),
    "pattern too late": (
        put(alpha_pattern={"q_proj": 4, "0.q_proj": 8}), "pattern-unmatched", "warning", "alpha_pattern",
    ),
    "pattern broken": (put(rank_pattern={"(": 8}), "config-invalid", "error", "adapter_config.json"),
    "pattern that stalls": (
        several(put(alpha_pattern={"(?:a|a|aa)+q": 8}), rekeyed(lambda k: k.replace("layers", "a" * 40))),
        "config-invalid", "error", "adapter_config.json",
    ),
    "targets that stall": (
        several(put(target_modules="(?:a|a|aa)+q"), rekeyed(lambda k: k.replace("layers", "a" * 60))),
        "config-invalid", "error", "adapter_config.json",
    ),
    "pattern that fills the memory": (
        put(rank_pattern={"(?:(?:(?:q{1000}){1000}){1000})": 8}), "config-invalid", "error", "adapter_config.json",
    ),
    "type missing": (put(peft_type=None), "peft-type-missing", "error", "peft_type"),
    "type unknown": (put(peft_type="NEW_TUNER"), "peft-type-unknown", "warning", "peft_type"),
    "a type that is not computed with": (put(peft_type="VERA"), "refused", "warning", "adapter"),
    "no factor of its type": (put(peft_type="LOHA"), "no-modules", "error", "adapter"),
    "pissa": (put(init_lora_weights="pissa"), "base-mutated", "warning", "init_lora_weights"),
    "olora": (put(init_lora_weights="olora"), "base-mutated", "warning", "init_lora_weights"),
    "pissa_niter": (put(init_lora_weights="pissa_niter_4"), "base-mutated", "warning", "init_lora_weights"),
    "corda": (put(init_lora_weights="corda"), "base-mutated", "warning", "init_lora_weights"),
    "lora_ga": (put(init_lora_weights="lora_ga"), "base-mutated", "warning", "init_lora_weights"),
    "loftq": (put(init_lora_weights="loftq"), "base-mutated", "warning", "init_lora_weights"),
    "kasa": (put(kasa_config={"beta": 1e-4}), "base-mutated", "warning", "kasa_config"),
    "alora": (put(alora_invocation_tokens=[1]), "refused", "warning", "adapter"),
    "arrow": (put(arrow_config={"top_k": 2}), "refused", "warning", "adapter"),
    "qalora": (put(use_qalora=True), "refused", "warning", "adapter"),
    "replicated layers": (put(layer_replication=[[0, 2]]), "refused", "warning", "adapter"),
    "a library": (put(auto_mapping={"parent_library": "os"}), "foreign-code", "info", "auto_mapping"),
    "a megatron": (put(megatron_core="evil.core"), "foreign-code", "info", "megatron_core"),
    "remote code": (put(trust_remote_code=True), "foreign-code", "info", "trust_remote_code"),
    "a local base": (put(base_model_name_or_path="/home/me/model"), "base-model-local", "warning", "base_model"),
    "a base on Windows": (put(base_model_name_or_path="C:\\m"), "base-model-local", "warning", "base_model"),
    "no base": (put(base_model_name_or_path=None), "base-model-missing", "info", "base_model_name_or_path"),
    "NaN": (spoilt(np.nan), "non-finite", "error", B0),
    "Inf": (spoilt(-np.inf, A0), "non-finite", "error", A0),
    "a head that diverged": (
        several(put(modules_to_save=["head"]), add("base_model.model.head.weight", one((3, 8), np.nan))),
        "non-finite", "error", "base_model.model.head.weight",
    ),
    "one untrained": (add(B0, one((OUT, RANK), 0.0)), "all-zero", "warning", B0),
    "all untrained": (
        several(*(add(KEY.format(i, "B"), one((OUT, RANK), 0.0)) for i in range(LAYERS))), "all-zero", "warning",
        "layers.0.q_proj, layers.1.q_proj",
    ),
    "too large for fp16": (spoilt(1e5), "overflows-fp16", "warning", B0),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    plant, code, severity, where = FAULTS[name]
    report = checked(tmp_path, plant)
    found = [finding for finding in report.findings if finding.code == code]
    assert found, codes(report)
    assert {finding.severity for finding in found} == {severity}
    assert any(where in finding.where for finding in found)
    assert all(finding.message and "\n" not in finding.message for finding in found)
    assert report.ok == all(finding.severity != "error" for finding in report.findings)
    strict = lt.validate(tmp_path / "adapter", strict=True)
    assert strict.ok == all(finding.severity == "info" for finding in report.findings)
    graver = {"error": (), "warning": ("error",), "info": ("error", "warning")}[severity]
    assert not [finding for finding in report.findings if finding.severity in graver], codes(report)


def test_every_fault_is_found_at_once(tmp_path: Path) -> None:
    everything = several(
        put(r=16, lora_alpha=0, modules_to_save=["head"], use_dora=True, alpha_pattern={"(": 1}), spoilt(np.nan, A0),
        drop(KEY.format(1, "B")), add("stray", one((1,))), add(KEY.format(2, "A"), one((0,))),
    )  # fmt: skip
    found = {code for code, _ in codes(checked(tmp_path, everything))}
    assert found >= {
        "rank-mismatch", "alpha-zero", "saved-module-absent", "dora-without-magnitude", "config-invalid", "non-finite",
        "unpaired-factor", "unclaimed-key", "empty-factor",
    }  # fmt: skip


def test_a_non_finite_value_is_found_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratools.verbs.checking import values

    sizes: list[int] = []

    def read(self: Any, name: str, start: int = 0, stop: int | None = None, **kwargs: Any) -> Any:
        sizes.append((stop or 0) - start)
        return original(self, name, start, stop, **kwargs)

    original = lt.load(write_adapter(tmp_path / "x", sound(), **CONFIG)).tensors[0].source.__class__.read
    monkeypatch.setattr(lt.load(tmp_path / "x").tensors[0].source.__class__, "read", read)
    monkeypatch.setattr(values, "_PIECE", 6)
    for place in range(0, OUT * RANK, 7):
        tensors = sound()
        tensors[B0].flat[place] = np.inf
        report = lt.validate(write_adapter(tmp_path / f"at {place}", tensors, **CONFIG))
        assert [(f.code, f.where) for f in report.findings] == [("non-finite", B0)]
        assert "1 infinite" in report.findings[0].message
    assert max(sizes) == 6  # a tensor is never read whole


def test_a_configuration_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", sound(), **CONFIG)
    (folder / "adapter_config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert {("config-unreadable", "error"), ("config-missing", "error")} <= codes(lt.validate(folder))
    (folder / "adapter_config.json").unlink()
    assert codes(lt.validate(folder)) == {("config-missing", "error")}
    assert lt.validate(folder, config={"peft_type": "LORA", **CONFIG}).ok


def test_weights_that_cannot_be_read_raise(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", sound(), **CONFIG)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CorruptFile):
        lt.validate(folder)
    with pytest.raises(NotFound):
        lt.validate(tmp_path / "nowhere")


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", sound(), **CONFIG)
    for name in ("adapter_model.bin", "modeling.py", "training_args.bin", "optimizer.pt", "README.md"):
        (folder / name).write_bytes(b"x")
    found = {finding.code: finding.where for finding in lt.validate(folder).findings}
    assert found == {
        "pickle-beside": "adapter_model.bin", "trainer-state-beside": "optimizer.pt, training_args.bin",
        "code-beside": "modeling.py",
    }  # fmt: skip


def test_pickled_weights_are_a_warning(tmp_path: Path) -> None:
    import torch

    folder = write_adapter(tmp_path / "a", sound(), **CONFIG)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(
        {name: torch.from_numpy(value) for name, value in tensors.items()}, folder / "adapter_model.bin"
    )
    assert codes(lt.validate(folder, allow_pickle=True)) == {("pickled-weights", "warning")}


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert ("no-tensors", "error") in codes(lt.validate(write_adapter(tmp_path / "a", {}, **CONFIG)))


@pytest.mark.parametrize(
    ("tensors", "code", "severity"),
    [
        ({"lora_unet_q.lora_down.weight": one((4, 8)), "lora_unet_q.lora_up.weight": one((6, 4))},
         "alpha-not-stored", "info"),
        ({f"layers.{i}.weight": one((4, 4)) for i in range(3)}, "not-an-adapter", "warning"),
        ({"a": one((4,))}, "format-unknown", "error"),
    ],
)  # fmt: skip
def test_another_format_is_named_and_its_values_are_checked(
    tmp_path: Path, tensors: Tensors, code: str, severity: str
) -> None:
    save_file(tensors, tmp_path / "weights.safetensors")
    assert codes(lt.validate(tmp_path / "weights.safetensors")) == {(code, severity)}
    save_file({name: value * np.nan for name, value in tensors.items()}, tmp_path / "weights.safetensors")
    assert ("non-finite", "error") in codes(lt.validate(tmp_path / "weights.safetensors"))


# --- with a base -----------------------------------------------------------------------------------------


def test_a_sound_adapter_fits_its_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=2)
    assert checked(tmp_path, base=base, strict=True).findings == ()
    assert lt.validate(tmp_path / "adapter", base=base_tensors()).findings == ()


def test_everything_that_does_not_fit_is_named(tmp_path: Path) -> None:
    def plant(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[A0] = one((RANK, INTO + 1))
        for factor, shape in (("A", (RANK, INTO)), ("B", (OUT, RANK))):
            tensors[KEY.format(9, factor)] = one(shape)
        tensors[KEY.format(2, "B")] = one((OUT - 1, RANK))
        tensors[TOKENS] = one((1, INTO))
        config["trainable_token_indices"] = {"embed": [99]}

    report = checked(tmp_path, plant, base=write_base(tmp_path / "base"))
    found = {(finding.code, finding.where) for finding in report.findings}
    assert found == {
        ("shape-mismatch", "layers.0.q_proj"), ("shape-mismatch", "layers.2.q_proj"), ("base-mismatch", TOKENS),
        ("base-unmatched", KEY.format(9, "A")), ("base-unmatched", KEY.format(9, "B")),
    }  # fmt: skip
    assert not report.ok


def test_the_wrong_base_is_one_finding(tmp_path: Path) -> None:
    save_file({"other.thing.weight": one((3, 3))}, tmp_path / "base.safetensors")
    report = checked(tmp_path, base=tmp_path / "base.safetensors")
    assert codes(report) == {("base-unmatched", "error")}


def test_names_that_fit_under_a_prefix_are_said(tmp_path: Path) -> None:
    tensors = {f"model.{name}": value for name, value in base_tensors().items()}
    save_file(tensors, tmp_path / "base.safetensors")
    report = checked(tmp_path, base=tmp_path / "base.safetensors")
    assert codes(report) == {("renamed", "info")}
    assert "under model" in report.findings[0].message


def test_a_quantised_base_is_named_by_its_scheme(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    report = checked(tmp_path, base=base)
    assert codes(report) == {("base-quantised", "warning")}
    assert "gptq" in report.findings[0].message


def tied_base(folder: Path) -> Path:
    folder.mkdir()
    save_file(
        {"model.embed_tokens.weight": one((20, 8)), "model.norm.weight": one((8,))}, folder / "model.safetensors"
    )  # fmt: skip
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "vocab_size": 20,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(("together", "severity"), [(False, "warning"), (True, "info")])
def test_tied_embeddings_are_said(tmp_path: Path, together: bool, severity: str) -> None:
    def plant(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors.clear()
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = one((RANK, 20))
        tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = one((8, RANK))
        if together:
            tensors["base_model.model.lm_head.lora_A.weight"] = one((RANK, 8))
            tensors["base_model.model.lm_head.lora_B.weight"] = one((20, RANK))
        config |= {
            "target_modules": ["embed_tokens", "lm_head"][: 1 + together],
            "ensure_weight_tying": together,
        }

    report = checked(tmp_path, plant, base=tied_base(tmp_path / "base"))
    assert codes(report) == {("tied-embeddings", severity)}


def test_a_resized_vocabulary_is_said(tmp_path: Path) -> None:
    def plant(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors["base_model.model.embed.base_layer.weight"] = one((24, INTO))
        tensors["base_model.model.embed.lora_embedding_A"] = one((RANK, 24))
        tensors["base_model.model.embed.lora_embedding_B"] = one((INTO, RANK))
        config["target_modules"] = ["q_proj", "embed"]

    assert ("vocabulary-resized", "info") in codes(
        checked(tmp_path, plant, base=write_base(tmp_path / "base"))
    )


def test_a_new_head_is_said(tmp_path: Path) -> None:
    plant = several(put(modules_to_save=["score"]), add("base_model.model.score.weight", one((3, INTO))))
    assert codes(checked(tmp_path, plant, base=write_base(tmp_path / "base"))) == {("new-tensor", "info")}


def test_another_format_is_not_bound(tmp_path: Path) -> None:
    save_file({"m.q.lora_a": one((8, 4)), "m.q.lora_b": one((4, 6))}, tmp_path / "adapters.safetensors")
    report = lt.validate(tmp_path / "adapters.safetensors", base=write_base(tmp_path / "base"))
    assert ("base-not-checked", "warning") in codes(report)


# --- what PEFT itself saves has nothing wrong with it ----------------------------------------------------


def _toy() -> Any:
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 6)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 8))
            self.down_proj = nn.Parameter(torch.randn(3, 8, 5))

        def forward(self, x: Any) -> Any:
            return x

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.experts, self.conv = Attention(), Experts(), nn.Conv2d(3, 4, 3)
            self.mha = nn.MultiheadAttention(8, 2)

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.score = nn.Embedding(20, 8), nn.Linear(8, 3)
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: Any) -> Any:
            return self.score(self.embed(x))

        def get_input_embeddings(self) -> Any:
            return self.embed

    torch.manual_seed(0)
    return Toy()


PEFT_ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LORA", {"target_modules": ["q_proj", "v_proj"]}),
    "expression": ("LORA", {"target_modules": r".*\.(q|v)_proj"}),
    "patterns": (
        "LORA",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.attention.q_proj": 2},
         "alpha_pattern": {r"^layers\.0\..*": 3}, "use_rslora": True},
    ),
    "layers": ("LORA", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ("LORA", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.attention.q_proj"]}),
    "embedding and convolution": ("LORA", {"target_modules": ["embed", "conv"]}),
    "attention": ("LORA", {"target_modules": ["mha"], "rank_pattern": {"0.mha": 2}, "alpha_pattern": {"mha": 3}}),
    "dora": ("LORA", {"target_modules": ["q_proj", "v_proj", "conv", "embed"], "use_dora": True}),
    "lora_bias": ("LORA", {"target_modules": ["q_proj", "conv"], "lora_bias": True}),
    "bias of all": ("LORA", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias of its own": ("LORA", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "head": ("LORA", {"target_modules": ["q_proj"], "modules_to_save": ["score"]}),
    "tokens": ("LORA", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "experts": (
        "LORA",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
         "rank_pattern": {"experts.down_proj": 2}},
    ),
    "adalora": ("ADALORA", {"target_modules": ["q_proj", "v_proj"], "total_step": 10}),
    "ia3": ("IA3", {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": ["v_proj"]}),
    "loha": ("LOHA", {"target_modules": ["q_proj", "conv"], "rank_pattern": {"conv": 2}}),
    "lokr": ("LOKR", {"target_modules": ["q_proj", "conv"], "alpha_pattern": {"conv": 2}}),
    "tokens alone": ("TRAINABLE_TOKENS", {"target_modules": ["embed"], "token_indices": [3, 5]}),
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT_ADAPTERS)
def test_what_peft_saves_is_valid_and_fits(name: str, tmp_path: Path) -> None:
    import peft
    import torch

    kind, fields = PEFT_ADAPTERS[name]
    model = _toy()
    save_file(
        {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}, tmp_path / "base.safetensors"
    )
    if kind in {"LORA", "LOHA", "LOKR"}:
        fields = {"r": 4, {"LORA": "lora_alpha"}.get(kind, "alpha"): 6, **fields}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**fields)
    with warnings.catch_warnings():
        # PEFT warns of patterns for parameters, and of lora_bias as if ZeRO-3 had flattened it; both are in order.
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        wrapped.save_pretrained(tmp_path / "adapter")
    report = lt.validate(tmp_path / "adapter", base=tmp_path / "base.safetensors")
    usual = {"base-model-missing", "foreign-code", "not-a-lora"}
    assert [finding for finding in report.findings if finding.code not in usual] == []
    assert lt.inspect(tmp_path / "adapter").parameters == sum(
        value.size for value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    )


# --- whatever a file says, the answer is a report or an error made on purpose ----------------------------

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.floats(),
    st.sampled_from(["", "q_proj", "(", ".*", "all-linear"]),
    st.lists(st.sampled_from(["q_proj", "", 3, None, True]), max_size=3),
    st.dictionaries(st.sampled_from(["q_proj", "(", "", "nblocks"]), st.integers(-1, 5), max_size=2),
)  # fmt: skip
ALL_FIELDS = [
    "peft_type", "r", "lora_alpha", "alpha", "use_rslora", "use_dora", "bias", "init_lora_weights", "rank_pattern",
    "alpha_pattern", "modules_to_save", "target_modules", "exclude_modules", "target_parameters", "feedforward_modules",
    "trainable_token_indices", "token_indices", "use_bdlora", "ensure_weight_tying", "enable_lora", "lora_bias",
    "layers_to_transform", "layers_pattern", "layer_replication", "auto_mapping", "megatron_core", "kasa_config",
    "loftq_config", "base_model_name_or_path", "peft_version",
]  # fmt: skip
TYPES = st.sampled_from(["LORA", "ADALORA", "IA3", "LOHA", "LOKR", "TRAINABLE_TOKENS", "VERA", None, 3])
SUFFIXES = [*sorted(ROLES), "base_layer.weight", "weight", "bias", "token_adapter.trainable_tokens_delta"]
ODD_KEYS = st.builds(
    lambda prefix, path, suffix: prefix + path + suffix,
    st.sampled_from(["base_model.model.", "", "base_model.model.base_model.model."]),
    st.sampled_from(["q_proj.", "layers.0.q_proj.", "mlp.experts.base_layer.", "", "embed_tokens."]),
    st.sampled_from(SUFFIXES),
)
ODD_SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 8]), max_size=4).map(tuple)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=TYPES, fields=st.dictionaries(st.sampled_from(ALL_FIELDS[1:]), JUNK, max_size=6),
    shapes=st.dictionaries(ODD_KEYS, ODD_SHAPES, max_size=6),
)  # fmt: skip
def test_whatever_a_file_says_there_is_an_answer(
    kind: Any, fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    config = {"peft_type": kind, **fields}
    report = lt.validate(tensors, config=config, base={"layers.0.q_proj.weight": one((4, 8))})
    json.dumps(report.to_dict())
    with contextlib.suppress(LoratoolsError):
        inspected = lt.inspect(tensors, config=config)
        claimed = sum(module.parameters for module in inspected.modules)
        extras = sum(int(np.prod(extra.shape)) for extra in inspected.extras)
        assert claimed + extras == inspected.parameters  # nothing is dropped in silence
        json.dumps(inspected.to_dict())
