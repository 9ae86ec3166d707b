"""``peft_linear`` and ``peft_ties`` against PEFT itself, bit for bit."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loratools.deltas.algebra import add, distance, norm
from loratools.deltas.lowrank import LowRank
from loratools.errors import Mismatch, Unsupported
from loratools.methods import METHODS, find
from loratools.methods.base import Stack
from loratools.methods.legacy import peft_linear, peft_ties

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.dtypes import Array

OUT, INTO, RANK = 37, 29, 4  # odd, so that vectorised sums have a remainder


def oracle(kind: str, alphas: Sequence[float], weights: Sequence[float], **options: Any) -> tuple[Any, Stack]:
    """PEFT's combination of random adapters on one module, and the same adapters as a stack."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = torch.nn.Sequential()
    if kind == "linear":
        model.add_module("fc", torch.nn.Linear(INTO, OUT))
    elif kind == "embedding":
        model.add_module("fc", torch.nn.Embedding(OUT, INTO))
    else:
        model.add_module("fc", torch.nn.Conv2d(INTO, OUT, 3))
    for i, alpha in enumerate(alphas):
        config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["fc"], use_rslora=False)
        if i:
            model.add_adapter(f"a{i}", config)
        else:
            model = get_peft_model(model, config, adapter_name="a0")
    layer = model.base_model.model.fc
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for n, p in layer.named_parameters() if "lora_" in n):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    names = [f"a{i}" for i in range(len(alphas))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density .* no pruning will be performed")
        model.add_weighted_adapter(names, list(weights), "merged", **options)
    deltas = tuple(LowRank(*sides(layer, name), layer.scaling[name]) for name in names)
    return layer, Stack("fc", deltas, tuple(weights), tuple(range(len(names))))


def sides(layer: Any, name: str) -> tuple[Array, Array]:
    """``up`` (out, rank) and ``down`` (rank, in) as PEFT holds them."""
    if name in layer.lora_embedding_A:
        down, up = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    up, down = up.detach().numpy(), down.detach().numpy()
    return up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)


def same(found: LowRank, layer: Any) -> None:
    up, down = sides(layer, "merged")
    assert layer.scaling["merged"] == found.scaling == 1.0
    for ours, theirs in ((found.up, up), (found.down, down)):
        assert ours.dtype == theirs.dtype == np.float32
        assert np.array_equal(ours, theirs)  # each bit, but for the sign of a zero


KINDS = ["linear", "embedding", "conv"]
CASES = [
    ([6], [0.7]),
    ([8, 8], [0.7, 0.3]),
    ([6, 3], [1.0, -1.0]),
    ([5, 7, 11], [0.3, -0.45, 1.7]),
    ([4, 6, 8, 10], [1.0, 0.1, 0.0, -2.0]),
]


@pytest.mark.parametrize(("alphas", "weights"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_pefts(kind: str, alphas: list[float], weights: list[float]) -> None:
    layer, stack = oracle(kind, alphas, weights, combination_type="linear")
    same(peft_linear(stack), layer)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize(("alphas", "weights"), CASES[1:])
def test_ties_is_pefts(alphas: list[float], weights: list[float], majority: Any, density: float) -> None:
    layer, stack = oracle("linear", alphas, weights, combination_type="ties", density=density,
                          majority_sign_method=majority)  # fmt: skip
    same(peft_ties(stack, density=density, majority_sign=majority), layer)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_ties_is_pefts_on_other_layers(kind: str) -> None:
    layer, stack = oracle(kind, *CASES[3], combination_type="ties", density=0.3)
    same(peft_ties(stack, density=0.3), layer)


def random(seed: int, rank: int = RANK) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.standard_normal((64, rank), np.float32), rng.standard_normal((rank, 48), np.float32))


@pytest.mark.parametrize(("weights", "error"), [((0.7, 0.3), 0.75), ((1.0, -1.0), 1.0)])
def test_it_is_not_the_sum(weights: tuple[float, float], error: float) -> None:
    """What is known of random adapters: 75% off for 0.7 and 0.3, and about as much for a difference."""
    deltas = (random(0, 16), random(1, 16))
    found = peft_linear(Stack("fc", deltas, weights))
    wanted = add(list(zip(weights, deltas, strict=True)))
    assert distance(found, wanted) / norm(wanted) == pytest.approx(error, abs=0.15)


def test_a_single_adapter_is_exact() -> None:
    one = random(0)
    found = peft_linear(Stack("fc", (LowRank(one.up, one.down, 1.5),), (-0.7,)))
    wanted = add([(-0.7 * 1.5, one)])
    assert distance(found, wanted) <= 1e-6 * norm(wanted)


@pytest.mark.parametrize("name", ["peft_linear", "peft_ties"])
def test_unequal_ranks_are_refused_by_name(name: str) -> None:
    with pytest.raises(Mismatch, match=r"layers\.0\.fc.*equal ranks, not 3, 4"):
        METHODS[name].function(Stack("layers.0.fc", (random(0, 4), random(1, 3)), (1.0, 1.0)))


def test_ties_of_one_adapter_is_refused() -> None:
    with pytest.raises(Unsupported, match="peft_ties combines 2 or more adapters, not 1"):
        find("peft_ties").settle({}, 1)


def test_they_are_marked_as_what_they_are() -> None:
    assert {name for name, known in METHODS.items() if known.legacy} == {"peft_linear", "peft_ties"}


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    ones = LowRank(np.ones((2, 2), np.float32), np.ones((2, 3), np.float32))
    found = peft_ties(Stack("fc", (ones, ones), (1.0, 1.0)), density=0.5)
    assert found.down.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert found.up.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("alphas", [(6, 7), (8, 2)])  # scalings 1.5 and 1.75; powers of two
@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_combine_gives_pefts_tensors_from_file_to_memory(
    kind: str, method: str, alphas: tuple[int, int], tmp_path: Any
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from loratools.verbs.combine import combine
    from tests.helpers import load_state

    torch.manual_seed(0)
    layers = {"linear": torch.nn.Linear(INTO, OUT), "embedding": torch.nn.Embedding(OUT, INTO),
              "conv": torch.nn.Conv2d(INTO, OUT, 3)}  # fmt: skip
    model: Any = torch.nn.Sequential()
    model.add_module("fc", layers[kind])
    weights = (0.7, -0.45)
    for name, alpha in zip(("one", "two"), alphas, strict=True):
        config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["fc"])
        if name == "one":
            model = get_peft_model(model, config, adapter_name="one")
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape)
    options = {"density": 0.3} if method == "ties" else {}
    model.add_weighted_adapter(["one", "two"], list(weights), "merged", combination_type=method, **options)
    model.save_pretrained(tmp_path, selected_adapters=["one", "two", "merged"], save_embedding_layers=False)
    report = combine(
        [tmp_path / "one", tmp_path / "two"], weights=weights, method=f"peft_{method}", **options
    )
    ((_, module),) = report.adapter.modules.items()
    theirs = load_state(tmp_path / "merged")
    ours = {"A": module.tensors["down"].load(), "B": module.tensors["up"].load()}
    for side, values in ours.items():
        (expected,) = (
            value.numpy()
            for key, value in theirs.items()
            if f"lora_{side}" in key or f"_embedding_{side}" in key
        )
        assert np.array_equal(values, expected)
