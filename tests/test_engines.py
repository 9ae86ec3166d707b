"""Engines: the tables of what each loads and computes, written out here cell by cell, against ``validate``.

The two tables below are a transcription in the tables' own words, made without the engines' files. Each feature is
built as an adapter, and what ``validate`` answers for each engine is compared with the cell.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools.engines.base import BaseFacts, engine, judge
from loratools.verbs.checking.engines import gather
from tests.helpers import write_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from loratools.verbs.reports import ValidationReport

COLUMNS = ("vllm", "sglang", "llama.cpp", "mlx", "lorax", "tensorrt-llm", "ollama", "diffusers")
# Feature x engine: does it load? "if": it depends on something that the adapter alone does not say.
LOADS = {
    "plain":       ("yes", "yes", "yes", "own format", "yes", "yes", "yes", "yes"),
    "rslora":      ("yes", "ignored", "ignored", "n/a", "yes", "yes", "ignored", "yes"),
    "rank":        ("yes", "crash", "yes", "no", "crash or ignored", "yes", "yes", "yes"),
    "alpha":       ("yes", "ignored", "ignored", "no", "ignored", "ignored", "ignored", "yes"),
    "dora":        ("refused", "refused", "refused", "own format", "ignored", "yes", "no", "yes"),
    "bias":        ("refused", "ignored or error", "refused", "no", "ignored", "refused", "no", "partial"),
    "lora-bias":   ("refused", "yes", "refused", "no", "ignored", "refused", "no", "yes"),
    "saved":       ("refused", "ignored or error", "refused", "refused", "ignored", "if", "no", "n/a"),
    "embedding":   ("if", "yes", "yes", "own format", "yes", "ignored", "no", "n/a"),
    "tokens":      ("refused", "refused", "refused", "no", "yes", "if", "no", "n/a"),
    "init":        ("refused", "ignored", "ignored", "n/a", "ignored", "ignored", "ignored", "?"),
    "alora":       ("refused", "ignored", "yes", "n/a", "ignored", "ignored", "ignored", "n/a"),
    "variant":     ("refused", "ignored", "ignored or error", "n/a", "ignored", "ignored", "n/a", "n/a"),
    "experts":     ("if", "yes", "if", "own format", "no", "yes", "no", "n/a"),
    "packed":      ("if", "no", "crash", "n/a", "no", "no", "no", "n/a"),
    "unknown key": ("yes", "warned or refused", "refused", "refused", "ignored", "refused", "?", "yes"),
    "narrower":    ("yes", "refused", "refused", "refused", "crash", "crash", "n/a", "refused"),
    "pickle":      ("yes", "yes", "yes", "no", "no", "yes", "no", "no"),
}  # fmt: skip
# Does it compute the same? NO: silently something else. "-": it does not load.
MATHS = {
    "plain":       ("yes", "yes", "yes", "yes", "yes", "yes", "yes", "yes"),
    "rslora":      ("yes", "NO", "NO", "n/a", "yes", "yes", "NO", "yes"),
    "rank":        ("yes, older NO", "-", "yes", "-", "NO or -", "yes", "yes", "yes"),
    "alpha":       ("yes, older NO", "NO", "NO", "-", "NO", "NO", "NO", "yes"),
    "dora":        ("-", "-", "-", "yes", "NO", "yes", "-", "yes"),
    "bias":        ("-", "NO or -", "-", "-", "NO", "-", "-", "partial"),
    "lora-bias":   ("-", "NO", "-", "-", "NO", "-", "-", "yes"),
    "saved":       ("-", "NO or -", "-", "-", "NO", "if", "-", "n/a"),
    "embedding":   ("yes", "yes", "yes", "yes", "yes", "NO", "-", "n/a"),
    "tokens":      ("-", "-", "-", "-", "?", "if", "-", "n/a"),
    "init":        ("-", "NO", "NO", "n/a", "NO", "NO", "NO", "?"),
    "alora":       ("-", "NO", "yes", "n/a", "NO", "NO", "NO", "n/a"),
    "variant":     ("-", "NO", "NO or -", "n/a", "NO", "NO", "n/a", "n/a"),
    "experts":     ("yes", "yes", "yes", "yes", "-", "yes", "-", "n/a"),
    "packed":      ("if", "-", "-", "n/a", "-", "-", "-", "n/a"),
    "unknown key": ("NO", "no, warned, or -", "-", "-, older NO", "NO", "-", "?", "NO, warned"),
    "narrower":    ("NO", "-", "-", "-", "-", "-", "n/a", "-"),
    "pickle":      ("n/a", "n/a", "n/a", "n/a", "n/a", "n/a", "n/a", "n/a"),
}  # fmt: skip
# What a word of the first table means as an answer, and of the second where it loads.
_LOADS = {
    "yes": "yes", "ignored": "yes", "own format": "yes", "refused": "no", "crash": "no", "no": "no", "?": "unknown",
    "if": "unknown", "partial": "unknown", "ignored or error": "unknown", "crash or ignored": "unknown",
    "warned or refused": "unknown",
}  # fmt: skip
_MATHS = {
    "yes": "yes", "yes, older NO": "yes", "NO": "no", "NO, warned": "no", "no, warned, or -": "no", "NO or -": "no",
    "-": "unknown", "-, older NO": "unknown", "?": "unknown", "if": "unknown", "partial": "unknown",
}  # fmt: skip
CELLS = [
    (feature, name, _LOADS[loads], _MATHS.get(maths, "yes" if loads == "yes" else "unknown"))
    for feature in LOADS
    for name, loads, maths in zip(COLUMNS, LOADS[feature], MATHS[feature], strict=True)
    if loads != "n/a"
]


def test_the_transcription_adds_up() -> None:
    silent = {
        name: sum("NO" in MATHS[feature][column] for feature in MATHS) for column, name in enumerate(COLUMNS)
    }
    assert LOADS.keys() == MATHS.keys()
    assert sum(map(len, LOADS.values())) == 144
    assert silent == {
        "lorax": 10, "sglang": 8, "tensorrt-llm": 5, "llama.cpp": 4, "ollama": 4, "vllm": 4, "diffusers": 1, "mlx": 1,
    }  # fmt: skip
    cells = [cell for row in MATHS.values() for cell in row]
    assert sum(cell.endswith("older NO") for cell in cells) == 3
    assert cells.count("NO or -") == 4


# --- adapters with one feature each --------------------------------------------------------------------------

OUT, INTO, RANK, VOCABULARY = 16, 12, 4, 20
LAYERS = 2
ATTENTION = {
    f"model.layers.{i}.self_attn.{name}": (OUT, INTO) for i in range(LAYERS) for name in ("q_proj", "k_proj", "v_proj")
}  # fmt: skip
FIRST = next(iter(ATTENTION))
PREFIX = "base_model.model."
CONFIG = {
    "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"],
    "base_model_name_or_path": "org/base", "bias": "none",
}  # fmt: skip
_METADATA = "lora_adapter_metadata"


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def factors(shapes: Mapping[str, tuple[int, int]] = ATTENTION, rank: int = RANK) -> dict[str, np.ndarray]:
    made = {}
    for seed, (path, (out, into)) in enumerate(shapes.items()):
        made[f"{PREFIX}{path}.lora_A.weight"] = values(rank, into, seed=seed)
        made[f"{PREFIX}{path}.lora_B.weight"] = values(out, rank, seed=seed)
    return made


def rerank(tensors: dict[str, np.ndarray], path: str, rank: int) -> None:
    tensors[f"{PREFIX}{path}.lora_A.weight"] = values(rank, INTO)
    tensors[f"{PREFIX}{path}.lora_B.weight"] = values(OUT, rank)


def plain(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    pass


def put(**fields: Any) -> Any:
    return lambda tensors, config: config.update(fields)


def ranks(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    rerank(tensors, FIRST, 2)
    # of the same scale as the rest, so that only the ranks differ
    config |= {"rank_pattern": {FIRST: 2}, "lora_alpha": 8, "alpha_pattern": {}}


def magnitudes(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["use_dora"] = True
    tensors |= {f"{PREFIX}{path}.lora_magnitude_vector": values(OUT) for path in ATTENTION}


def biases(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["bias"] = "lora_only"
    tensors |= {f"{PREFIX}{path}.base_layer.bias": values(OUT) for path in ATTENTION}


def factor_biases(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["lora_bias"] = True
    tensors |= {f"{PREFIX}{path}.lora_B.bias": values(OUT) for path in ATTENTION}


def saved(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["modules_to_save"] = ["lm_head"]
    tensors[f"{PREFIX}lm_head.weight"] = values(VOCABULARY, INTO)


def on_embeddings(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["target_modules"] = [*config["target_modules"], "embed_tokens", "lm_head"]
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = values(RANK, VOCABULARY)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = values(INTO, RANK)
    tensors |= factors({"lm_head": (VOCABULARY, INTO)})


def on_the_head(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["target_modules"] = [*config["target_modules"], "lm_head"]
    tensors |= factors({"lm_head": (VOCABULARY, INTO)})


def on_experts(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    names = [
        f"model.layers.0.block_sparse_moe.experts.{i}.{name}" for i in range(2) for name in ("w1", "w2", "w3")
    ]
    config["target_modules"] = [*config["target_modules"], "w1", "w2", "w3"]
    tensors |= factors(dict.fromkeys(names, (OUT, INTO)))


def on_packed_experts(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for path in ("model.layers.0.mlp.experts.base_layer", "model.layers.0.mlp.experts"):
        tensors[f"{PREFIX}{path}.lora_A.weight"] = values(2 * RANK, INTO)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = values(OUT, 2 * RANK)


def strange_key(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    tensors |= factors({"model.layers.7.self_attn.q_proj": (OUT, INTO)})
    tensors |= factors({f"model.layers.7.self_attn.{name}": (OUT, INTO) for name in ("k_proj", "v_proj")})


def narrower(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    tensors |= factors({FIRST: (OUT, INTO - 4)})


PLANTS: dict[str, Any] = {
    "plain": plain, "rslora": put(use_rslora=True), "rank": ranks, "alpha": put(alpha_pattern={FIRST: 2}),
    "dora": magnitudes, "bias": biases, "lora-bias": factor_biases, "saved": saved, "embedding": on_embeddings,
    "tokens": plain, "init": put(init_lora_weights="pissa"), "alora": put(alora_invocation_tokens=[1, 2]),
    "variant": put(layer_replication=[[0, 2], [1, 2]]), "experts": on_experts, "packed": on_packed_experts,
    "unknown key": strange_key, "narrower": narrower, "pickle": plain, "head": on_the_head,
}  # fmt: skip
WITHOUT_BASE = {"packed", "experts", "variant"}  # the base here has no experts, and replication is not bound


def write_model(folder: Path, *, family: str = "gemma2", tied: bool = False, prefix: str = "") -> Path:
    """A base that the adapters fit; of a family that no rule but Ollama's names."""
    folder.mkdir(parents=True)
    tensors = {f"{prefix}{path}.weight": values(*shape) for path, shape in ATTENTION.items()}
    tensors |= {f"{prefix}{path}.bias": values(OUT) for path in ATTENTION}
    tensors[f"{prefix}model.embed_tokens.weight"] = values(VOCABULARY, INTO)
    if not tied:
        tensors["lm_head.weight"] = values(VOCABULARY, INTO)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": family, "tie_word_embeddings": tied, "architectures": ["SomeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peft_folder(feature: str, folder: Path) -> Path:
    tensors, config = factors(), dict(CONFIG)
    PLANTS[feature](tensors, config)
    write_adapter(folder, tensors, **config)
    if feature == "tokens":
        (folder / "added_tokens.json").write_text(json.dumps({"<new>": VOCABULARY + 1}))
    if feature == "pickle":
        import torch

        torch.save(
            {key: torch.from_numpy(value) for key, value in tensors.items()}, folder / "adapter_model.bin"
        )
        (folder / "adapter_model.safetensors").unlink()
    return folder


def mlx_folder(feature: str, folder: Path) -> Path:
    """As MLX-LM writes it: factors transposed, one rank, one scale."""
    folder.mkdir()
    shapes: dict[str, tuple[int, int]] = dict(ATTENTION)
    if feature == "unknown key":
        shapes["model.layers.7.self_attn.q_proj"] = (OUT, INTO)
    if feature == "embedding":
        shapes["model.embed_tokens"] = (INTO, VOCABULARY)
    tensors = {}
    for path, (out, into) in shapes.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = values(into, RANK), values(RANK, out)
        if feature == "dora":
            tensors[f"{path}.m"] = values(out)
    if feature == "rank":
        tensors[f"{FIRST}.lora_a"], tensors[f"{FIRST}.lora_b"] = values(INTO, 2), values(2, OUT)
    if feature == "narrower":
        tensors[f"{FIRST}.lora_a"] = values(INTO - 4, RANK)
    if feature == "experts":
        path = "model.layers.0.mlp.switch_mlp.gate_proj"
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = values(2, RANK, INTO), values(2, OUT, RANK)
    save_file(tensors, folder / "adapters.safetensors")
    config = {
        "fine_tune_type": "dora" if feature == "dora" else "lora", "num_layers": LAYERS,
        "lora_parameters": {"rank": RANK, "scale": 2.0, "dropout": 0.0},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


UNET = [
    f"unet.down_blocks.0.attentions.0.transformer_blocks.{i}.attn1.{n}"
    for i in range(2)
    for n in ("to_q", "to_v")
]


def diffusers_folder(feature: str, folder: Path) -> Path:
    """PEFT's factors under diffusers' names, and the configuration in the metadata."""
    folder.mkdir()
    tensors = {}
    for path in UNET:
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = (
            values(RANK, INTO),
            values(OUT, RANK),
        )
        if feature == "dora":
            tensors[f"{path}.lora_magnitude_vector"] = values(OUT)
        if feature == "lora-bias":
            tensors[f"{path}.lora_B.bias"] = values(OUT)
    if feature == "rank":
        tensors[f"{UNET[0]}.lora_A.weight"], tensors[f"{UNET[0]}.lora_B.weight"] = (
            values(2, INTO),
            values(OUT, 2),
        )
    short = UNET[0].removeprefix("unet.")
    fields: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": ["to_q", "to_v"]}
    fields |= {
        "rslora": {"use_rslora": True},
        "rank": {"rank_pattern": {short: 2}, "alpha_pattern": {short: 2}},
        "alpha": {"alpha_pattern": {short: 2}},
        "dora": {"use_dora": True},
        "bias": {"bias": "all"},
        "lora-bias": {"lora_bias": True},
        "init": {"init_lora_weights": "pissa"},
    }.get(feature, {})
    metadata = {
        "format": "pt",
        _METADATA: json.dumps({f"unet.{name}": value for name, value in fields.items()}),
    }
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata=metadata)
    if feature == "pickle":
        import torch

        torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, folder / "pytorch_lora_weights.bin")
        (folder / "pytorch_lora_weights.safetensors").unlink()
    return folder


def build(feature: str, name: str, folder: Path) -> Path:
    """The feature in the format that the cell of the table is about."""
    own = LOADS[feature][COLUMNS.index(name)] == "own format" or feature in {
        "rank",
        "unknown key",
        "narrower",
    }
    if name == "mlx" and own:
        return mlx_folder(feature, folder)
    if name == "lorax" and feature == "embedding":  # of which the table says: lm_head only
        feature = "head"
    return diffusers_folder(feature, folder) if name == "diffusers" else peft_folder(feature, folder)


def asked(ref: Path, name: str, **options: Any) -> ValidationReport:
    return lt.validate(ref, engines=[name], allow_pickle=True, **options)


@pytest.mark.parametrize(("feature", "name", "loads", "maths"), CELLS)
def test_a_cell(feature: str, name: str, loads: str, maths: str, tmp_path: Path) -> None:
    ref = build(feature, name, tmp_path / "adapter")
    if name == "diffusers" and feature in {"unknown key", "narrower"}:
        answer = against_a_base(ref, feature)
        assert (answer.loads, answer.same_maths) == (loads, maths)
        return
    base = None if feature in WITHOUT_BASE or name == "diffusers" else write_model(tmp_path / "base")
    report = asked(ref, name, base=base)
    (said,) = report.engines
    mine = [finding for finding in report.findings if finding.engine == name]
    assert (said.name, said.loads, said.same_maths) == (name, loads, maths), mine
    # A silent error is an error, and so is what does not load.
    assert any(finding.severity == "error" for finding in mine) == ("no" in (loads, maths))
    if "older" in MATHS[feature][COLUMNS.index(name)] and loads == "yes":
        assert any("older" in finding.message for finding in mine)


def against_a_base(ref: Path, feature: str) -> Any:
    """For names that are not bound to a base here: what the base would say is put in by hand."""
    facts = gather(lt.load(ref), [], base=BaseFacts(
        "base", unmatched=("x",) if feature == "unknown key" else (),
        misfits={"x": ((OUT, INTO - 4), (OUT, INTO))} if feature == "narrower" else {},
    ))  # fmt: skip
    return judge(engine("diffusers"), facts)
