"""Adapters on mixtures of experts, fused and apart, in every orientation and packing, against float64 arithmetic."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.errors import Mismatch, ShapeMismatch
from tests.model_helpers import CASES, load_cleanly, logits, relative_error, tensors, train

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore:.*pattern keys:RuntimeWarning"
)

EXPERTS, RANK, ALPHA = 4, 3, 7.5
SCALING = ALPHA / RANK

# A model here is the names of its tensors, and where (expert, out, in) deltas of its two parameters land.


@dataclass(frozen=True)
class Shapes:
    """Of one expert: ``hidden`` in, ``inner`` in between."""

    hidden: int
    inner: int

    @property
    def gate_up(self) -> tuple[int, int]:
        return 2 * self.inner, self.hidden

    @property
    def down(self) -> tuple[int, int]:
        return self.hidden, self.inner


OBLONG, SQUARE_FUSED, SQUARE_DOWN = Shapes(20, 14), Shapes(16, 8), Shapes(16, 16)
APART = {
    "qwen3_moe": ("model.layers.{}.mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.{}.weight", ("w1", "w3", "w2")),
}
FUSED = "model.layers.{}.mlp.experts.{}"
LAYERS = 2


def write_base(folder: Path, model: str, shapes: Shapes, *, fused: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint with random values; experts apart unless ``fused`` or gpt-oss."""
    generator = torch.Generator().manual_seed(1)
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (9, shapes.hidden)}
    for layer in range(LAYERS):
        named[f"model.layers.{layer}.self_attn.q_proj.weight"] = (shapes.hidden, shapes.hidden)
        if model == "gpt_oss":
            named[FUSED.format(layer, "gate_up_proj")] = (EXPERTS, *shapes.gate_up[::-1])
            named[FUSED.format(layer, "gate_up_proj_bias")] = (EXPERTS, shapes.gate_up[0])
            named[FUSED.format(layer, "down_proj")] = (EXPERTS, *shapes.down[::-1])
        elif fused:
            named[FUSED.format(layer, "gate_up_proj")] = (EXPERTS, *shapes.gate_up)
            named[FUSED.format(layer, "down_proj")] = (EXPERTS, *shapes.down)
        else:
            pattern, parts = APART[model]
            for index in range(EXPERTS):
                for part in parts:
                    wanted = shapes.down if part == parts[2] else (shapes.inner, shapes.hidden)
                    named[pattern.format(layer, index, part)] = wanted
    values = {name: torch.randn(shape, generator=generator) for name, shape in named.items()}
    folder.mkdir()
    save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model}))
    return values


Factors = dict[
    tuple[int, str], tuple[np.ndarray, np.ndarray]
]  # (E, out, r) and (E, r, in), by layer and parameter


def make_factors(shapes: Shapes, parameters: tuple[str, ...]) -> Factors:
    rng = np.random.default_rng(2)
    found: Factors = {}
    for layer in range(LAYERS):
        for parameter in parameters:
            out, into = shapes.gate_up if parameter == "gate_up_proj" else shapes.down
            found[layer, parameter] = (
                rng.standard_normal((EXPERTS, out, RANK)).astype(np.float32),
                rng.standard_normal((EXPERTS, RANK, into)).astype(np.float32),
            )
    return found


def deltas(factors: Factors) -> dict[tuple[int, str], np.ndarray]:
    """(E, out, in), in float64."""
    return {
        key: SCALING * np.einsum("eor,eri->eoi", up.astype(np.float64), down.astype(np.float64))
        for key, (up, down) in factors.items()
    }


def expected(
    base: dict[str, torch.Tensor], model: str, changes: dict[tuple[int, str], np.ndarray]
) -> dict[str, np.ndarray]:
    """The merged checkpoint, in float64."""
    merged = {name: tensor.double().numpy().copy() for name, tensor in base.items()}
    for (layer, parameter), delta in changes.items():
        fused = FUSED.format(layer, parameter)
        if model == "gpt_oss":
            merged[fused] += delta.transpose(0, 2, 1)
        elif fused in merged:
            merged[fused] += delta
        else:
            pattern, (gate, up, down) = APART[model]
            for index, mine in enumerate(delta):
                if parameter == "down_proj":
                    merged[pattern.format(layer, index, down)] += mine
                else:
                    half = mine.shape[0] // 2
                    merged[pattern.format(layer, index, gate)] += mine[:half]
                    merged[pattern.format(layer, index, up)] += mine[half:]
    return merged


def write_fused_adapter(
    folder: Path, factors: Factors, *, exchanged: bool, blockwise: bool = False, **config: Any
) -> None:
    """What PEFT writes for ``target_parameters``; ``exchanged`` where it takes the parameter's rows for its inputs."""
    parameters = sorted({parameter for _, parameter in factors})
    stored = {}
    for (layer, parameter), pair in factors.items():
        # (B A)ᵀ = Aᵀ Bᵀ
        up, down = (factor.transpose(0, 2, 1) for factor in reversed(pair)) if exchanged else pair
        wrapped = ".base_layer" if parameter == "gate_up_proj" and len(parameters) == 2 else ""
        owner = f"base_model.model.model.layers.{layer}.mlp.experts{wrapped}"
        order = (1, 0, 2) if blockwise else (1, 2, 0)
        packed = up.transpose(order).reshape(up.shape[1], -1)
        stored[f"{owner}.lora_A.weight"] = torch.from_numpy(down.reshape(-1, down.shape[2]).copy())
        stored[f"{owner}.lora_B.weight"] = torch.from_numpy(packed.copy())
    write_adapter(folder, stored, target_parameters=[f"mlp.experts.{p}" for p in parameters], **config)


def write_adapter(folder: Path, stored: dict[str, torch.Tensor], **config: Any) -> None:
    folder.mkdir()
    save_file(stored, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def assert_equal(found: Path, wanted: dict[str, np.ndarray]) -> None:
    mine = tensors(found)
    assert mine.keys() == wanted.keys()
    for name, truth in wanted.items():
        assert relative_error(mine[name], torch.from_numpy(truth)) < 1e-6, name


PARAMETERS = [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)]
SHAPES = {"oblong": OBLONG, "square gate_up": SQUARE_FUSED, "square down": SQUARE_DOWN}


@pytest.mark.parametrize("blockwise", [False, True], ids=["interleaved", "blockwise"])
@pytest.mark.parametrize("version", ["0.18.0", "0.19.0", "0.19.1", "0.21.2"])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_fused_adapter(model: str, shapes: str, version: str, blockwise: bool, tmp_path: Path) -> None:
    """PEFT exchanged in and out for all models before 0.19.1, and since then only for those stored (in, out)."""
    base = write_base(tmp_path / "base", model, SHAPES[shapes])
    old = tuple(map(int, version.split("."))) < (0, 19, 1)
    for number, parameters in enumerate(PARAMETERS):
        factors = make_factors(SHAPES[shapes], parameters)
        # gpt-oss stores (in, out), so that its rows are its inputs: nothing is exchanged.
        write_fused_adapter(
            tmp_path / f"adapter{number}", factors, exchanged=old and model != "gpt_oss", blockwise=blockwise,
            peft_version=version,
        )  # fmt: skip
        out = tmp_path / f"out{number}"
        lt.merge(tmp_path / "base", tmp_path / f"adapter{number}", out, blockwise_experts=blockwise)
        assert_equal(out, expected(base, model, deltas(factors)))
        assert lt.verify(
            tmp_path / "base", tmp_path / f"adapter{number}", out, blockwise_experts=blockwise
        ).ok
        if len(parameters) == 2:
            other = lt.verify(
                tmp_path / "base", tmp_path / f"adapter{number}", out, blockwise_experts=not blockwise
            )
            assert not other.ok


@pytest.mark.parametrize("version", ["0.18.0", "0.21.2"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_fused_adapter_on_a_fused_checkpoint(shapes: str, version: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3_moe", SHAPES[shapes], fused=True)
    factors = make_factors(SHAPES[shapes], ("gate_up_proj", "down_proj"))
    write_fused_adapter(tmp_path / "adapter", factors, exchanged=version == "0.18.0", peft_version=version)
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_equal(tmp_path / "out", expected(base, "qwen3_moe", deltas(factors)))


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_square_experts_without_a_version_are_an_error(fused: bool, tmp_path: Path) -> None:
    write_base(tmp_path / "base", "qwen3_moe", SQUARE_DOWN, fused=fused)
    write_fused_adapter(tmp_path / "adapter", make_factors(SQUARE_DOWN, ("down_proj",)), exchanged=False)
    with pytest.raises(Mismatch, match="peft_version") as caught:
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "0.19.1" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_shapes_tell_the_orientation_where_they_can(tmp_path: Path) -> None:
    """Files made by one PEFT and relabelled, or patched by transformers: the version is not trusted then."""
    base = write_base(tmp_path / "base", "qwen3_moe", OBLONG)
    factors = make_factors(OBLONG, ("gate_up_proj", "down_proj"))
    write_fused_adapter(tmp_path / "adapter", factors, exchanged=True, peft_version="0.21.2")
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_equal(tmp_path / "out", expected(base, "qwen3_moe", deltas(factors)))


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_more_experts_than_the_base_has(fused: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "whole", "qwen3_moe", OBLONG, fused=fused)
    last = f".experts.{EXPERTS - 1}."
    fewer = {
        name: tensor[: EXPERTS - 1].clone() if ".experts." in name and fused else tensor
        for name, tensor in base.items()
        if last not in name
    }
    (tmp_path / "base").mkdir()
    save_file(fewer, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    factors = make_factors(OBLONG, ("gate_up_proj", "down_proj"))
    write_fused_adapter(tmp_path / "adapter", factors, exchanged=False, peft_version="0.21.2")
    with pytest.raises(ShapeMismatch if fused else Mismatch, match="experts"):
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Experts with a module each, as before transformers 5.

PARTS = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", None)}


def write_separate_adapter(
    folder: Path,
    shapes: Shapes,
    owner: str,
    names: tuple[str, str, str],
    experts: tuple[int, ...],
    *,
    interleaved: bool,
) -> dict[tuple[int, str], np.ndarray]:
    """An adapter with a module for each matrix of each of ``experts``; its deltas as those of the fused parameters."""
    rng = np.random.default_rng(4)
    stored: dict[str, torch.Tensor] = {}
    changes: dict[tuple[int, str], np.ndarray] = {}
    for layer in range(LAYERS):
        changes[layer, "gate_up_proj"] = np.zeros((EXPERTS, *shapes.gate_up))
        changes[layer, "down_proj"] = np.zeros((EXPERTS, *shapes.down))
        for index in experts:
            for name, (parameter, half) in zip(names, PARTS.values(), strict=True):
                out, into = shapes.down if half is None else (shapes.inner, shapes.hidden)
                up = rng.standard_normal((out, RANK)).astype(np.float32)
                down = rng.standard_normal((RANK, into)).astype(np.float32)
                path = f"base_model.model.model.layers.{layer}.{owner}.experts.{index}.{name}"
                stored |= {
                    f"{path}.lora_A.weight": torch.from_numpy(down),
                    f"{path}.lora_B.weight": torch.from_numpy(up),
                }
                delta = SCALING * up.astype(np.float64) @ down.astype(np.float64)
                where: slice | None = None
                if half is not None:
                    where = slice(half, None, 2) if interleaved else slice(half * out, (half + 1) * out)
                changes[layer, parameter][index][where or slice(None)] += delta
    write_adapter(folder, stored, target_modules=list(names))
    return changes


@pytest.mark.parametrize("experts", [(0, 1, 2, 3), (1, 3)], ids=["all", "some"])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    ("model", "owner", "names", "fused"),
    [
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj"), False),
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2"), False),
        ("mixtral", "mlp", ("w1", "w3", "w2"), False),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj"), True),
        ("mixtral", "mlp", ("w1", "w3", "w2"), True),
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2"), True),
        ("gpt_oss", "mlp", ("gate_proj", "up_proj", "down_proj"), True),
    ],
)
def test_separate_adapter(
    model: str, owner: str, names: tuple[str, str, str], fused: bool, shapes: str, experts: tuple[int, ...],
    tmp_path: Path,
) -> None:  # fmt: skip
    base = write_base(tmp_path / "base", model, SHAPES[shapes], fused=fused)
    changes = write_separate_adapter(
        tmp_path / "adapter", SHAPES[shapes], owner, names, experts, interleaved=model == "gpt_oss"
    )
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_equal(tmp_path / "out", expected(base, model, changes))
    report = lt.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.ok


def test_separate_and_fused_adapters_add_up(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3_moe", OBLONG, fused=True)
    factors = make_factors(OBLONG, ("gate_up_proj", "down_proj"))
    write_fused_adapter(tmp_path / "one", factors, exchanged=False, peft_version="0.21.2")
    changes = write_separate_adapter(
        tmp_path / "two", OBLONG, "mlp", ("gate_proj", "up_proj", "down_proj"), (2,), interleaved=False
    )
    lt.merge(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], tmp_path / "out", weights=[0.5, -2.0])
    both = {key: 0.5 * delta - 2.0 * changes[key] for key, delta in deltas(factors).items()}
    assert_equal(tmp_path / "out", expected(base, "qwen3_moe", both))


# PEFT's own files, and its own reading of older ones.


@pytest.mark.parametrize(
    "fields", [{}, {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}}]
)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_files_written_by_peft(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Read here with numpy alone: rank 4 and alpha 12 but for the patterns."""
    trained = train(CASES[name], tmp_path, **fields)
    stored = {
        key: tensor.double().numpy()
        for key, tensor in load_file(trained.adapter / "adapter_model.safetensors").items()
    }
    base, changes = tensors(trained.base), {}
    for layer in range(2):
        for parameter, wrapped in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            rank = 2 if fields and parameter == "down_proj" else 4
            alpha = 5 if fields and parameter == "gate_up_proj" else 12
            owner = f"base_model.model.model.layers.{layer}.mlp.experts{wrapped}"
            down = stored[f"{owner}.lora_A.weight"].reshape(4, rank, -1)
            up = stored[f"{owner}.lora_B.weight"].reshape(-1, rank, 4)
            changes[layer, parameter] = alpha / rank * np.einsum("ore,eri->eoi", up, down)
    lt.merge(trained.base, trained.adapter, tmp_path / "out")
    wanted, found = expected(base, name, changes), tensors(tmp_path / "out")
    for key in wanted:
        if ".experts." in key:
            assert relative_error(found[key], torch.from_numpy(wanted[key])) < 1e-6, key


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_separate_adapter_as_peft_reads_it(name: str, tmp_path: Path) -> None:
    """transformers 5 fuses the experts; PEFT then fuses what an older adapter has for each of them."""
    case = CASES[name]
    case.build().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    owner, names = ("block_sparse_moe", ("w1", "w3", "w2")) if name == "mixtral" else ("mlp", tuple(PARTS))
    inner = 48 if name == "mixtral" else 24
    write_separate_adapter(
        tmp_path / "adapter", Shapes(32, inner), owner, names, (0, 1, 2, 3), interleaved=False
    )
    base = load_cleanly(case, tmp_path / "base")
    PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(
        tmp_path / "peft"
    )
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "peft")
    assert found.keys() == wanted.keys()
    for key, truth in wanted.items():
        assert relative_error(found[key], truth) < 1e-6, key
    assert any(not torch.equal(found[key], tensor) for key, tensor in tensors(tmp_path / "base").items())


def test_parameters_beside_the_experts(tmp_path: Path) -> None:
    """gpt-oss has biases between its matrices, and PEFT nests its wrappers in the order of definition."""
    experts = [
        f"mlp.experts.{p}" for p in ("down_proj_bias", "gate_up_proj", "down_proj", "gate_up_proj_bias")
    ]
    trained = train(CASES["gpt_oss"], tmp_path, target_parameters=experts)
    lt.merge(trained.base, trained.adapter, tmp_path / "out")
    trained.model.merge_and_unload().save_pretrained(tmp_path / "peft")
    found, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "peft")
    assert found.keys() == wanted.keys()
    for key, truth in wanted.items():
        assert relative_error(found[key], truth) < 1e-6, key


def test_a_single_expert(tmp_path: Path) -> None:
    """Its factors look like those of an ordinary layer."""
    case = replace(
        CASES["qwen3_moe"], fields={**CASES["qwen3_moe"].fields, "num_experts": 1, "num_experts_per_tok": 1}
    )
    trained = train(case, tmp_path)
    wanted = logits(trained.model, case)
    lt.merge(trained.base, trained.adapter, tmp_path / "out")
    assert relative_error(logits(load_cleanly(case, tmp_path / "out"), case), wanted) < 1e-5
