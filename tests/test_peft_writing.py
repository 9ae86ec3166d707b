"""What is written for PEFT is what PEFT reads: its own adapters come back unchanged, others load and mean the same."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from torch import nn

import loratools as lt
from loratools.adapter import Adapter, AdapterConfig, Module
from loratools.deltas.lowrank import LowRank
from loratools.errors import Unsupported
from loratools.formats.peft_writing import write_peft
from loratools.matrices import lora_module
from tests.helpers import assert_same, load_state, make_adapter, merged_by_peft, randomise, write_adapter
from tests.test_peft_oracle import CASES, CHANGED, Case, Mixture, save_adapter, small, toy, train, trained

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
]

by_name = {case.name: case for case in CASES}


def rewritten(adapter: Adapter, **changes: Any) -> Adapter:
    """The same adapter as one that was made: nothing of its file is to be given back as it was."""
    return replace(adapter, tensors=(), **changes)


def assert_merges_alike(model: Any, one: Path, other: Path) -> None:
    """PEFT merges two adapters to the same weights; a warning of missing keys would be an error."""
    expected, actual = merged_by_peft(model(), one), merged_by_peft(model(), other)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert_same(name, actual[name], value)


@pytest.mark.parametrize("file", [None, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_adapter_that_peft_saved_comes_back_byte_for_byte(
    case: Case, file: torch.dtype | None, tmp_path: Path
) -> None:
    folder = trained(case, tmp_path / "adapter", torch.float32, file)
    lt.load(folder).save(tmp_path / "copy", sync=False)
    before, after = (load_state(path / "adapter_model.safetensors") for path in (folder, tmp_path / "copy"))
    assert list(before) == list(after)
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)), name
    configs = [json.loads((p / "adapter_config.json").read_text()) for p in (folder, tmp_path / "copy")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_adapter_written_anew_is_to_peft_what_it_was(case: Case, tmp_path: Path) -> None:
    folder = trained(case, tmp_path / "adapter", torch.float32, None)
    rewritten(lt.load(folder)).save(tmp_path / "copy", sync=False)
    assert_merges_alike(lambda: toy(torch.float32), folder, tmp_path / "copy")
    raw = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    assert not raw.get("use_rslora")


@pytest.mark.parametrize("name", CHANGED)
def test_what_started_from_its_base_is_still_read_so(name: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    folder = save_adapter(train(get_peft_model(small(), CHANGED[name]())), tmp_path / "adapter")
    rewritten(lt.load(folder)).save(tmp_path / "copy", sync=False)
    assert_merges_alike(small, folder, tmp_path / "copy")


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    "parameters",
    [
        ["mlp.experts.gate_up_proj"],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"],
    ],
    ids=["one", "nested"],
)
def test_experts_written_anew(parameters: list[str], tmp_path: Path) -> None:
    def mixture(dtype: torch.dtype = torch.float32) -> Mixture:
        model = Mixture((64, 40), transposed=False)
        model.mlp.gate.weight = nn.Parameter(torch.zeros(24, 40))
        model.proj = nn.Linear(40, 24)
        randomise(model, 3, scale=0.08)
        return model.to(dtype)

    config = lambda: LoraConfig(  # noqa: E731
        r=4, lora_alpha=7, target_modules=["proj"], target_parameters=parameters, init_lora_weights=False,
        alpha_pattern={"experts.down_proj": 5}, rank_pattern={"experts.gate_up_proj": 6}, use_rslora=True,
    )  # fmt: skip
    folder = trained(Case("experts", config), tmp_path / "adapter", torch.float32, None, model=mixture)
    rewritten(lt.load(folder)).save(tmp_path / "copy", sync=False)
    assert_merges_alike(mixture, folder, tmp_path / "copy")


# --- exactly these modules -----------------------------------------------------------------------------------


def test_fewer_modules_are_the_only_ones_that_peft_wraps(tmp_path: Path) -> None:
    folder = trained(by_name["mixed-linear-and-gpt2"], tmp_path / "adapter", torch.float32, None)
    adapter = lt.load(folder)
    kept = {
        n: m for n, m in adapter.modules.items() if n not in {"layers.1.attn.c_proj", "wide", "layers.0.up"}
    }
    rewritten(adapter, modules=kept).save(tmp_path / "less", sync=False)
    model = PeftModel.from_pretrained(toy(torch.float32), tmp_path / "less")
    assert set(model.targeted_module_names) == set(kept)
    merged, base = merged_by_peft(toy(torch.float32), tmp_path / "less"), toy(torch.float32).state_dict()
    whole = merged_by_peft(toy(torch.float32), folder)
    for name, value in merged.items():
        expected = whole if name.removesuffix(".weight") in kept else base
        assert torch.equal(value, expected[name]), name


def test_names_given_for_whole_layers_stay_short(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.{name}": (6, 5) for i in range(3) for name in ("q", "v", "up")}
    adapter = lt.load(make_adapter(tmp_path / "a", shapes, use_rslora=True))
    assert write_peft(rewritten(adapter))[1]["target_modules"] == ["q", "up", "v"]
    without = {name: module for name, module in adapter.modules.items() if not name.endswith("up")}
    assert write_peft(rewritten(adapter, modules=without))[1]["target_modules"] == ["q", "v"]
    hole = {name: module for name, module in adapter.modules.items() if name != "layers.1.v"}
    assert write_peft(rewritten(adapter, modules=hole))[1]["target_modules"] == sorted(hole)


def blocks(stem: str) -> nn.Module:
    """Three blocks of two layers, at ``model.layers``, or at ``layers``, where PEFT has to be told what a block is."""

    def named(number: int) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(5, 6) for name in ("q", "v")})

    model = nn.ModuleDict({"layers": nn.ModuleList(named(number) for number in range(3))})
    return randomised(nn.ModuleDict({"model": model}) if stem else model)


def randomised(model: nn.Module) -> nn.Module:
    randomise(model, 0, scale=0.1)
    return model


@pytest.mark.parametrize("stem", ["model.", ""], ids=["in a model", "bare"])
@pytest.mark.parametrize(
    ("kept", "given"),
    [
        (["0.q", "1.q", "2.q"], {"layers_to_transform": [1]}),
        (["0.q", "1.q", "2.q"], {"layers_to_transform": 1}),
        (["0.q", "1.q", "2.q"], {"layers_to_transform": 0}),
        (["1.q", "2.q"], {"layers_to_transform": [0, 1, 2]}),
        (["1.q", "2.q"], {"layers_to_transform": [1, 2]}),
        (["1.q", "2.q"], {"layers_to_transform": [1, 2], "layers_pattern": "h"}),
        (["1.q", "2.q"], {"layers_to_transform": [1, 2], "layers_pattern": ["layers"]}),
        (["1.q", "2.v"], {"layers_to_transform": [1, 2], "layers_pattern": ["layers"]}),
        (["0.q", "1.q"], {"layers_to_transform": None, "layers_pattern": ["layers"]}),
    ],
)
def test_numbers_of_blocks_never_keep_peft_from_a_module(
    kept: list[str], given: dict[str, Any], stem: str, tmp_path: Path
) -> None:
    names = [f"{stem}layers.{name}" for name in kept]
    adapter = lt.load(make_adapter(tmp_path / "a", dict.fromkeys(names, (6, 5))))
    raw = {**adapter.config.raw, "target_modules": ["q", "v"], **given}
    rewritten(adapter, config=replace(adapter.config, raw=raw)).save(tmp_path / "b", sync=False)
    model = PeftModel.from_pretrained(blocks(stem), tmp_path / "b")
    assert set(model.targeted_module_names) == set(names)


def test_numbers_of_blocks_that_say_the_same_are_kept(tmp_path: Path) -> None:
    names = ["model.layers.1.q", "model.layers.2.q"]
    adapter = lt.load(make_adapter(tmp_path / "a", dict.fromkeys(names, (6, 5))))
    raw = {**adapter.config.raw, "target_modules": ["q"], "layers_to_transform": [1, 2]}
    config = write_peft(rewritten(adapter, config=replace(adapter.config, raw=raw)))[1]
    assert (config["target_modules"], config["layers_to_transform"]) == (["q"], [1, 2])


# --- ranks and alphas ------------------------------------------------------------------------------------------

# Names of which some end with others, and some would match others as expressions.
NAMES = [
    "q", "a.q", "b.a.q", "a+b.q", "axq", "layers.1.q", "layers.11.q", "layers.1.q.base", "q-proj", "a.q-proj", "(q)",
]  # fmt: skip


def made(ranks: dict[str, int], scalings: dict[str, float] | None = None) -> Adapter:
    """A plain adapter in memory, from a seed."""
    rng = np.random.default_rng(0)
    modules: dict[str, Module] = {}
    for name, rank in ranks.items():
        like = Module("lora", {}, rank, None, None, (7, 5))
        factors = LowRank(
            rng.standard_normal((7, rank)).astype("f4"), rng.standard_normal((rank, 5)).astype("f4")
        )
        module = lora_module(like, [factors], prefix=name)
        if scalings is not None:
            module = replace(module, scaling=scalings[name], alpha=None)
        modules[name] = module
    return Adapter("made", "peft", modules, AdapterConfig("LORA"), {}, {})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_patterns_give_each_module_its_own_rank_and_scaling(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    ranks = {name: data.draw(st.integers(1, 4), name) for name in names}
    scalings = {name: data.draw(st.sampled_from([1.0, 2.0, 0.3, -1.5, 1 / 3]), name) for name in names}
    config = write_peft(made(ranks, scalings))[1]
    for name in names:  # as PEFT itself looks them up, in the order its saved files have
        patterns = (dict(sorted(config[key].items())) for key in ("rank_pattern", "alpha_pattern"))
        rank, alpha = (
            found.get(get_pattern_key(found.keys(), name), config[usual])
            for found, usual in zip(patterns, ("r", "lora_alpha"), strict=True)
        )
        assert rank == ranks[name]
        assert alpha / rank == pytest.approx(scalings[name], rel=1e-15)
    assert set(config["target_modules"]) == set(names)


def test_one_rank_needs_no_patterns() -> None:
    config = write_peft(made({"layers.0.q": 4, "layers.1.q": 4}))[1]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        4,
        4,
        {},
        {},
    )
    assert isinstance(config["lora_alpha"], int)
    assert config["init_lora_weights"] is True


def test_attention_projections_share_their_alpha_and_keep_their_deltas(tmp_path: Path) -> None:
    """PEFT adds the delta of the output projection twice, and gives both projections one alpha."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4)})
    rng = np.random.default_rng(1)
    modules = {}
    for name, out in (("attention", 48), ("attention.base_layer.out_proj", 16)):
        like = Module("lora", {}, 3, None, None, (out, 16))
        factors = LowRank(
            rng.standard_normal((out, 3)).astype("f4"), rng.standard_normal((3, 16)).astype("f4")
        )
        modules[name] = lora_module(like, [factors], prefix=name)
    Adapter("made", "peft", modules, AdapterConfig("LORA"), {}, {}).save(tmp_path / "a", sync=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = merged_by_peft(model, tmp_path / "a")
    for name, weight in (
        ("attention", "attention.in_proj_weight"),
        ("attention.base_layer.out_proj", "attention.out_proj.weight"),
    ):
        up, down = (torch.from_numpy(modules[name].tensors[role].load()) for role in ("up", "down"))
        torch.testing.assert_close(merged[weight] - before[weight], up @ down, rtol=1e-5, atol=1e-5)


# --- what PEFT cannot say --------------------------------------------------------------------------------------


def test_two_types_in_one_adapter_are_refused(tmp_path: Path) -> None:
    adapter = made({"q": 2})
    loha = Module("loha", adapter.modules["q"].tensors, 2, 2.0, 1.0, (7, 5))
    with pytest.raises(Unsupported, match="v \\(LOHA\\)") as caught:
        write_peft(replace(adapter, modules={**adapter.modules, "v": loha}))
    assert "normalize" in str(caught.value.hint)


def test_another_format_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="kohya"):
        write_peft(replace(made({"q": 2}), format="kohya"))


def test_a_module_of_rank_zero_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="q has rank 0"):
        write_peft(made({"q": 0}))


def test_some_dora_and_some_not_are_refused(tmp_path: Path) -> None:
    folder = trained(by_name["dora-linear"], tmp_path / "adapter", torch.float32, None)
    adapter = lt.load(folder)
    plain = replace(
        adapter.modules["wide"],
        kind="lora",
        tensors={r: t for r, t in adapter.modules["wide"].tensors.items() if r != "magnitude"},
    )
    mixed = rewritten(adapter, modules={**adapter.modules, "wide": plain})
    with pytest.raises(Unsupported, match="wide has no magnitude"):
        write_peft(mixed)


def test_experts_packed_the_other_way_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    key = "base_model.model.mlp.experts"
    write_adapter(
        tmp_path / "a",
        {
            f"{key}.lora_A.weight": rng.standard_normal((6, 5)).astype("f4"),
            f"{key}.lora_B.weight": rng.standard_normal((8, 6)).astype("f4"),
        },
        r=2, lora_alpha=2, target_parameters=["mlp.experts.down_proj"], target_modules=[],
    )  # fmt: skip
    with pytest.raises(Unsupported, match="blockwise"):
        write_peft(lt.load(tmp_path / "a", blockwise_experts=True))
