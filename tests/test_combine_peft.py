"""``combine`` next to PEFT's own ``add_weighted_adapter``, and its results loaded by PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import loratools as lt
from loratools.errors import Mismatch
from loratools.verbs.combine import combine
from tests.helpers import load_state, make_adapter, merged_by_peft, randomise, relative, save_state
from tests.test_peft_oracle import CASES, Case, Mixture, lora, toy, trained

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter '.*'. .* LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:.*pattern keys:RuntimeWarning"),
]

by_name = {case.name: case for case in CASES}
# What is combined: cases of the oracle, two or more at a time, of different ranks, scalings, targets and kinds.
GROUPS = {
    "ranks and scalings": ["linear", "rank-pattern", "alpha-pattern-first-match", "rslora"],
    "gpt2": ["conv1d-of-gpt2", "mixed-linear-and-gpt2"],
    "embedding": ["embedding", "rslora-embedding"],
    "convolutions": ["convolutions", "rank-pattern"],
    "attention": ["attention", "attention-patterns"],
    "biases of the factors": ["lora-bias", "conv1d-of-gpt2"],
    "left-out modules": ["exclude-modules", "linear"],
    "all of it": ["convolutions", "embedding", "rslora", "mixed-linear-and-gpt2", "attention"],
}
WEIGHTS = (0.7, -0.3, 1.5, 0.2, 0.9)


def folders(names: list[str], tmp_path: Path) -> list[Path]:
    return [
        trained(by_name[name], tmp_path / name, torch.float32, None, seed=seed + 1)
        for seed, name in enumerate(names)
    ]


def deltas(model: Any, folder: Path, **load: Any) -> dict[str, torch.Tensor]:
    """What an adapter changes, merged by PEFT into a float64 model."""
    before = model(torch.float64).state_dict()
    after = merged_by_peft(model(torch.float64), folder, autocast_adapter_dtype=False, **load)
    return {name: after[name].double() - before[name].double() for name in after}


def assert_sums(model: Any, parts: list[Path], weights: tuple[float, ...], combined: Path) -> None:
    each = [deltas(model, folder) for folder in parts]
    found = deltas(model, combined)
    changed = 0
    for name in found:
        terms = [weight * one[name] for weight, one in zip(weights, each, strict=False)]
        expected, size = sum(terms), sum(term.norm().item() for term in terms)
        changed += size > 0
        assert (found[name] - expected).norm().item() <= 1e-6 * size, name
    assert changed


@pytest.mark.parametrize("group", GROUPS)
def test_what_peft_loads_is_the_weighted_sum(group: str, tmp_path: Path) -> None:
    parts = folders(GROUPS[group], tmp_path)
    combine(parts, tmp_path / "out", weights=WEIGHTS[: len(parts)], sync=False)
    assert_sums(toy, parts, WEIGHTS, tmp_path / "out")


@pytest.mark.parametrize(
    "kinds", [["loha", "lokr"], ["loha-conv", "lokr-conv"], ["adalora", "convolutions"]], ids=" and ".join
)
def test_other_kinds_become_lora(kinds: list[str], tmp_path: Path) -> None:
    names = [next(case.name for case in CASES if case.name.startswith(kind)) for kind in kinds]
    parts = folders(names, tmp_path)
    base = toy(torch.float32).state_dict()  # which knows the kernels that some kinds store flat
    combine(parts, tmp_path / "out", weights=WEIGHTS[:2], base=base, sync=False)
    assert_sums(toy, parts, WEIGHTS, tmp_path / "out")


def test_experts(tmp_path: Path) -> None:
    def mixture(dtype: torch.dtype = torch.float32) -> nn.Module:
        model = Mixture((64, 40), transposed=False)
        model.proj = nn.Linear(40, 24)
        randomise(model, 3, scale=0.08)
        return model.to(dtype)

    parts = []
    for seed, parameters in enumerate(
        (
            ["mlp.experts.gate_up_proj"],
            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            ["mlp.experts.down_proj"],
        )
    ):
        config = lora(r=2 + seed, target_modules=["proj"], target_parameters=parameters)
        case = Case("experts", config)
        parts.append(trained(case, tmp_path / str(seed), torch.float32, None, seed=seed + 1, model=mixture))
    combine(parts, tmp_path / "out", weights=WEIGHTS[:3], sync=False)
    assert_sums(mixture, parts, WEIGHTS, tmp_path / "out")


def combined_by_peft(parts: list[Path], weights: list[float], kind: str, **options: Any) -> dict[str, Any]:
    model = PeftModel.from_pretrained(toy(torch.float32), parts[0], adapter_name="0")
    for number, part in enumerate(parts[1:], 1):
        model.load_adapter(part, adapter_name=str(number))
    names = [str(number) for number in range(len(parts))]
    model.add_weighted_adapter(names, weights, "sum", combination_type=kind, **options)
    model.set_adapter("sum")
    merged = model.merge_and_unload(adapter_names=["sum"])
    before = toy(torch.float32).state_dict()
    return {name: value.double() - before[name].double() for name, value in merged.state_dict().items()}


@pytest.mark.parametrize("options", [{"kind": "cat"}, {"kind": "svd", "svd_rank": 40}], ids=["cat", "svd"])
def test_peft_agrees_where_it_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    parts = folders(["linear", "linear-power-of-two"], tmp_path)
    combine(parts, tmp_path / "out", weights=[0.7, 0.3], sync=False)
    ours, theirs = deltas(toy, tmp_path / "out"), combined_by_peft(parts, [0.7, 0.3], **options)
    for name, delta in theirs.items():
        if delta.norm().item() > 1e-3:
            assert relative(ours[name], delta) <= 2e-6, name


def test_a_layer_number_of_the_first_adapter_does_not_bind_the_others(tmp_path: Path) -> None:
    everywhere = {f"model.layers.{i}.q": (6, 5) for i in range(2)}
    one = make_adapter(
        tmp_path / "one", {"model.layers.1.q": (6, 5)}, target_modules=["q"], layers_to_transform=[1]
    )
    two = make_adapter(tmp_path / "two", everywhere, seed=1, target_modules=["q"])

    def model(dtype: torch.dtype) -> nn.Module:
        layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(5, 6)}) for _ in range(2))
        made = nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})
        randomise(made, 0, scale=0.1)
        return made.to(dtype)

    combine([one, two], tmp_path / "out", weights=[0.7, 0.3], sync=False)
    assert_sums(model, [one, two], (0.7, 0.3), tmp_path / "out")


def biased(folder: Path, names: list[str], seed: int, **config: Any) -> Path:
    """An adapter with lora_bias on these modules."""
    make_adapter(folder, dict.fromkeys(names, (6, 5)), seed=seed, lora_bias=True, **config)
    path = folder / "adapter_model.safetensors"
    state = load_state(path)
    extra = {f"base_model.model.{name}.lora_B.bias": torch.full((6,), 0.5) for name in names}
    save_state({**state, **extra}, path)
    return folder


def test_a_bias_of_the_factors_comes_to_modules_without_one(tmp_path: Path) -> None:
    """PEFT loads the zeros without missing a key; whether it can merge them depends on the base, which is said."""
    one = biased(tmp_path / "one", ["a"], 0, target_modules=["a"])
    two = make_adapter(tmp_path / "two", {"b": (6, 5)}, seed=1, target_modules=["b"])

    def model(dtype: torch.dtype) -> nn.Module:
        made = nn.ModuleDict({name: nn.Linear(5, 6) for name in "ab"})
        randomise(made, 0, scale=0.1)
        return made.to(dtype)

    report = combine([one, two], tmp_path / "out", weights=[0.7, 0.3], sync=False)
    assert any("one of zeros is written for b" in warning for warning in report.warnings)
    assert_sums(model, [one, two], (0.7, 0.3), tmp_path / "out")
    known = combine([one, two], base=model(torch.float32).state_dict())
    assert not any("lora_bias" in warning for warning in known.warnings)
    without = {name: value for name, value in model(torch.float32).state_dict().items() if name != "b.bias"}
    told = combine([one, two], base=without)
    assert any("one of zeros is written for b; PEFT loads it, and will not merge" in w for w in told.warnings)


def test_token_rows_beside_a_lora_on_the_embedding_are_refused(tmp_path: Path) -> None:
    parts = folders(["tokens-and-head", "embedding"], tmp_path)
    for order in (parts, parts[::-1]):
        with pytest.raises(Mismatch, match=r"replaces token rows of embed, to which .* adds a delta"):
            combine(order)


def test_heads_and_token_rows_reach_peft(tmp_path: Path) -> None:
    """One adapter has a head and token rows, the other none: they arrive as they were."""
    parts = folders(["tokens-and-head", "linear"], tmp_path)
    combine(parts, tmp_path / "out", weights=[1.0, 0.5], sync=False)
    each, found = [deltas(toy, folder) for folder in parts], deltas(toy, tmp_path / "out")
    for name in ("head.weight", "embed.weight"):
        assert each[0][name].norm().item() > 0
        assert torch.equal(found[name], each[0][name]), name
    assert lt.load(tmp_path / "out").extras.keys() == lt.load(parts[0]).extras.keys()
