"""``normalize``: PEFT computes the same with the plain adapter, and the report says what changed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import loratools as lt
from loratools.cli.normalize import command
from loratools.cli.settings import Settings
from loratools.errors import InputError, Mismatch, NonFinite, OutputExists, OverBudget, Unsupported
from loratools.verbs.normalize import normalize
from tests.helpers import (
    assert_same,
    load_state,
    make_adapter,
    merged_by_peft,
    randomise,
    relative,
    save_state,
    write_adapter,
)
from tests.test_peft_oracle import (
    CASES,
    CHANGED,
    Case,
    Mixture,
    merged_in_place,
    save_adapter,
    small,
    toy,
    train,
    trained,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
    # PEFT does not count a targeted parameter, nor an attention's inputs, among the names it looks patterns up for.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

by_name = {case.name: case for case in CASES}
PLAIN = [case for case in CASES if not case.name.startswith("ia3") and case.name != "trainable-tokens"]


def deltas(adapter: Any) -> dict[str, np.ndarray]:
    """What each module of a plain adapter adds, in float64, from its own tensors."""
    found = {}
    for name, module in adapter.modules.items():
        up, down = (module.tensors[role].load().astype("f8") for role in ("up", "down"))
        found[name] = module.scaling * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    return found


def raw_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def assert_plain(folder: Path) -> None:
    """No field is left that a loader could read in two ways."""
    raw = raw_config(folder)
    assert raw["peft_type"] == "LORA"
    assert raw["init_lora_weights"] is True
    assert not raw["use_rslora"]
    assert not raw.get("use_bdlora")
    assert not raw.get("kasa_config")
    for module in lt.load(folder).modules.values():
        assert module.scaling == 1.0
        assert module.alpha == module.rank


# --- every kind, against PEFT --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_peft_computes_the_same_with_the_plain_adapter(case: Case, tmp_path: Path) -> None:
    folder = trained(case, tmp_path / "adapter", torch.float32, None)
    base = None
    if case.name.startswith(
        ("adalora", "loha", "lokr")
    ):  # whose files do not tell a convolution from a matrix
        base = save_state(toy(torch.float32).state_dict(), tmp_path / "base.safetensors")
    report = normalize(folder, tmp_path / "plain", base=base, sync=False)
    expected, actual = (merged_by_peft(toy(torch.float32), f) for f in (folder, tmp_path / "plain"))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert_same(name, actual[name], value)
    assert report.relative < 2e-7
    if "attention" not in case.name:  # whose scaling counts twice
        assert_plain(tmp_path / "plain")
    before = lt.load(folder)
    assert [m.name for m in report.modules] == list(before.modules)
    assert report.dropped == ()
    saved = {key for key, extra in before.extras.items() if extra.role != "training_only"}
    assert saved <= load_state(tmp_path / "plain").keys()


@pytest.mark.parametrize("name", CHANGED)
def test_what_was_taken_out_of_the_base_becomes_part_of_the_delta(name: str, tmp_path: Path) -> None:
    base = save_state(small().state_dict(), tmp_path / "base.safetensors")
    model = train(get_peft_model(small(), CHANGED[name]()))
    folder = save_adapter(model, tmp_path / "adapter")
    report = normalize(folder, tmp_path / "plain", base=base, sync=False)
    assert_plain(tmp_path / "plain")
    actual, expected = merged_by_peft(small(), tmp_path / "plain"), merged_in_place(model)
    for key, truth in expected.items():
        # PEFT decomposes in float32, whose error in the part taken out is several units of the weight.
        assert relative(actual[key], truth) < 2e-6, key
    ranks = {module.name: module.rank for module in report.modules}
    before = {module.name: module.rank_before for module in report.modules}
    assert all(rank <= 2 * (before[name] or 0) for name, rank in ranks.items())
    assert {module.was for module in report.modules} == {name.partition("-")[0]}
    assert report.relative < 2e-7


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_dora_keeps_its_magnitude_and_gets_its_base_s_part(init: str, tmp_path: Path) -> None:
    base = save_state(small().state_dict(), tmp_path / "base.safetensors")
    config = LoraConfig(
        r=5, lora_alpha=8, init_lora_weights=init, use_dora=True, target_modules=["wide", "tall", "square"]
    )
    model = train(get_peft_model(small(), config))
    folder = save_adapter(model, tmp_path / "adapter")
    normalize(folder, tmp_path / "plain", base=base, sync=False)
    actual, expected = merged_by_peft(small(), tmp_path / "plain"), merged_in_place(model)
    for key, truth in expected.items():
        assert relative(actual[key], truth) < 2e-6, key


def test_an_untrained_pissa_adds_nothing_and_is_said_to(tmp_path: Path) -> None:
    """Its factors are the part that was taken out: a delta of zero but for the rounding of float32."""
    base = save_state(small().state_dict(), tmp_path / "base.safetensors")
    folder = save_adapter(get_peft_model(small(), CHANGED["pissa"]()), tmp_path / "adapter")
    made = deltas(normalize(folder, base=base).adapter)
    weights = small().state_dict()
    assert made
    for name, delta in made.items():
        assert np.linalg.norm(delta) < 2e-6 * weights[f"{name}.weight"].norm().item()


def test_a_residual_needs_its_base(tmp_path: Path) -> None:
    folder = save_adapter(get_peft_model(small(), CHANGED["olora"]()), tmp_path / "adapter")
    with pytest.raises(Unsupported, match=r"starts from a part of its base \(olora\)") as caught:
        normalize(folder)
    assert "--base" in str(caught.value.hint)


def test_the_wrong_base_is_named(tmp_path: Path) -> None:
    folder = save_adapter(get_peft_model(small(), CHANGED["olora"]()), tmp_path / "adapter")
    other = save_state({"somewhere.weight": torch.ones(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(Mismatch):
        normalize(folder, base=other)


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
def test_experts(transposed: bool, tmp_path: Path) -> None:
    def mixture(dtype: torch.dtype = torch.float32) -> Mixture:
        model = Mixture((64, 40), transposed=transposed)
        model.mlp.gate.weight = nn.Parameter(torch.zeros(24, 40))
        model.proj = nn.Linear(40, 24)
        randomise(model, 3, scale=0.08)
        return model.to(dtype)

    def config() -> LoraConfig:
        return LoraConfig(
            r=4, lora_alpha=7, target_modules=["proj"], init_lora_weights=False, use_rslora=True,
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"],
            alpha_pattern={"experts.down_proj": 5}, rank_pattern={"experts.gate_up_proj": 6},
        )  # fmt: skip

    folder = trained(Case("experts", config), tmp_path / "adapter", torch.float32, None, model=mixture)
    for options in ({}, {"pad": True}):
        out = tmp_path / f"plain{len(options)}"
        report = normalize(folder, out, sync=False, **options)
        expected, actual = (merged_by_peft(mixture(), f) for f in (folder, out))
        for name, value in expected.items():
            assert_same(name, actual[name], value)
        assert_plain(out)
        assert report.rank.min == (6 if options else 4)


def test_experts_packed_the_other_way_are_packed_anew(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    key = "base_model.model.mlp.experts"
    up, down = rng.standard_normal((8, 3, 2)).astype("f4"), rng.standard_normal((3, 2, 5)).astype("f4")
    write_adapter(
        tmp_path / "a",
        {f"{key}.lora_A.weight": down.reshape(6, 5), f"{key}.lora_B.weight": up.reshape(8, 6)},
        r=2, lora_alpha=4, target_parameters=["mlp.experts.down_proj"], target_modules=[],
    )  # fmt: skip
    adapter = lt.load(tmp_path / "a", blockwise_experts=True)
    normalize(adapter, tmp_path / "plain", sync=False)
    tensors = load_state(tmp_path / "plain")
    after = tensors[f"{key}.lora_B.weight"].numpy().reshape(8, 2, 3)  # PEFT: the expert is fastest
    for expert in range(3):
        lower = tensors[f"{key}.lora_A.weight"].numpy().reshape(3, 2, 5)[expert]
        np.testing.assert_array_equal(after[:, :, expert] @ lower, 2 * up[:, expert] @ down[expert])


# --- rank ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    alpha=st.sampled_from([1, 3, 7.5, 16]),
    rslora=st.booleans(),
    rank=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_a_rank_gives_the_best_approximation_and_its_error(
    ranks: list[int], alpha: float, rslora: bool, rank: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    factors, patterns, truth = {}, {}, {}
    for i, own in enumerate(ranks):
        down, up = rng.standard_normal((own, 9)).astype("f4"), rng.standard_normal((7, own)).astype("f4")
        factors[f"l.{i}.lora_A.weight"], factors[f"l.{i}.lora_B.weight"] = down, up
        patterns[f"l.{i}"] = own
        truth[f"l.{i}"] = up.astype("f8") @ down * alpha / (own**0.5 if rslora else own)
    adapter = lt.load(
        factors,
        config={
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": alpha,
            "rank_pattern": patterns,
            "use_rslora": rslora,
        },
    )
    report = normalize(adapter, rank=rank)
    assert (report.rank.min, report.rank.max) == (rank, rank)
    square = 0.0
    made = deltas(report.adapter)
    for name, delta in truth.items():
        tail = np.linalg.svd(delta, compute_uv=False)[rank:]
        square += float((tail**2).sum())
        distance = np.linalg.norm(made[name] - delta)
        assert distance == pytest.approx(np.linalg.norm(tail), rel=1e-5, abs=1e-6 * np.linalg.norm(delta))
    whole = np.sqrt(sum(np.linalg.norm(delta) ** 2 for delta in truth.values()))
    assert report.relative == pytest.approx(np.sqrt(square) / whole, rel=1e-5, abs=1e-6)
    raw = report.adapter.config.raw
    assert (raw["r"], raw["rank_pattern"], raw["alpha_pattern"]) == (rank, {}, {})


def test_padding_makes_ranks_uniform_and_changes_no_bit(tmp_path: Path) -> None:
    folder = trained(by_name["rank-pattern"], tmp_path / "adapter", torch.float32, None)
    loose, padded = normalize(folder), normalize(folder, pad=True)
    assert padded.adapter.config.raw["rank_pattern"] == {}
    assert len(loose.adapter.config.raw["rank_pattern"]) > 0
    assert padded.rank.min == padded.rank.max == loose.rank.max
    for name, delta in deltas(loose.adapter).items():
        np.testing.assert_allclose(deltas(padded.adapter)[name], delta, rtol=0, atol=1e-12)


def test_loha_of_more_rank_than_its_weight_is_cut_to_what_there_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((6, 4), (4, 5), (6, 4), (4, 5))
    tensors = {f"fc.{n}": rng.standard_normal(s).astype("f4") for n, s in zip(names, shapes, strict=True)}
    adapter = lt.load(tensors, config={"peft_type": "LOHA", "r": 4, "alpha": 6})
    report = normalize(adapter)
    a, b, c, d = (tensors[f"fc.{name}"].astype("f8") for name in names)
    truth = 1.5 * (a @ b) * (c @ d)
    assert report.modules[0].rank == 5
    np.testing.assert_allclose(deltas(report.adapter)["fc"], truth, rtol=0, atol=1e-6 * np.linalg.norm(truth))


# --- types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "alpha", "rank", "dtype", "exact"),
    [
        ("float32", 8, 4, "F32", True),
        ("float32", 6, 4, "F32", False),
        ("bfloat16", 8, 4, "BF16", True),  # a power of two goes into the factors
        ("bfloat16", 6, 4, "BF16", True),  # one scaling for all stays in the alpha
        ("float16", 6, 4, "F16", True),
    ],
)
def test_16_bits_stay_where_nothing_is_rounded(
    file: str, alpha: float, rank: int, dtype: str, exact: bool, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a", {"l.0.q": (9, 7), "l.1.q": (9, 7)}, rank=rank, alpha=alpha)
    if file != "float32":
        weights = {n: v.to(getattr(torch, file)) for n, v in load_state(folder).items()}
        save_state(weights, folder / "adapter_model.safetensors")
    before = deltas(lt.load(folder))
    report = normalize(folder, tmp_path / "plain", sync=False)
    assert (report.dtype, report.exact) == (dtype, exact)
    for name, delta in deltas(lt.load(tmp_path / "plain")).items():
        difference = np.linalg.norm(delta - before[name]) / np.linalg.norm(before[name])
        assert difference < (1e-15 if exact else 1e-7)


def test_16_bits_become_32_where_they_would_round(tmp_path: Path) -> None:
    folder = make_adapter(
        tmp_path / "a", {"l.0.q": (9, 7), "l.1.q": (9, 7)}, alpha=6, alpha_pattern={"l.1.q": 0.7}
    )
    weights = {name: value.to(torch.bfloat16) for name, value in load_state(folder).items()}
    save_state(weights, folder / "adapter_model.safetensors")
    report = normalize(folder)
    assert report.dtype == "F32"
    assert 0 < report.relative < 1e-7
    asked = normalize(folder, dtype="bf16")
    assert asked.dtype == "BF16"
    assert 1e-4 < asked.relative < 1e-2


def test_a_lower_rank_keeps_its_16_bits(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"l.0.q": (9, 7)}, rank=4, alpha=6)
    weights = {name: value.to(torch.bfloat16) for name, value in load_state(folder).items()}
    save_state(weights, folder / "adapter_model.safetensors")
    assert normalize(folder, rank=2).dtype == "BF16"
    padded = normalize(folder, rank=6)
    assert (padded.dtype, padded.exact, padded.rank.max) == ("BF16", True, 6)


def test_a_module_that_is_nothing_beside_the_rest_may_lose_its_digits() -> None:
    rng = np.random.default_rng(0)
    factors = {}
    for i, size in enumerate((1.0, 1e-42)):  # the second is below float32's normal numbers
        factors[f"l.{i}.lora_A.weight"] = rng.standard_normal((2, 3)).astype("f4")
        factors[f"l.{i}.lora_B.weight"] = (rng.standard_normal((4, 2)) * size).astype("f4")
    report = normalize(lt.load(factors, config={"peft_type": "LORA", "r": 2, "lora_alpha": 1.4}))
    assert report.relative < 1e-7


def test_half_precision_that_would_lose_its_last_bits_becomes_float32() -> None:
    factors = {
        "fc.lora_A.weight": np.ones((1, 3), np.float16),
        "fc.lora_B.weight": np.full((4, 1), 2.0**-24 * 3, np.float16),
    }
    report = normalize(lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 0.25}))
    assert (report.dtype, report.exact) == ("F32", True)


def test_a_factor_that_does_not_fit_is_named() -> None:
    factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.full((4, 1), 6e4, "f4")}
    adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    with pytest.raises(NonFinite, match="fc") as caught:
        normalize(adapter, dtype="f16")
    assert "--dtype" in str(caught.value.hint)


def test_factors_that_cancel_are_balanced() -> None:
    """Two columns of a million that add up to one: folding a scaling into them would round at a million's size."""
    rng = np.random.default_rng(0)
    line = rng.standard_normal((1, 7))
    down = np.concatenate([line, line]).astype("f4")
    column = (rng.standard_normal((9, 1)) * 1e6).astype("f4")
    up = np.concatenate([column, -column + rng.standard_normal((9, 1)).astype("f4")], axis=1)
    adapter = lt.load(
        {"fc.lora_A.weight": down, "fc.lora_B.weight": up},
        config={"peft_type": "LORA", "r": 2, "lora_alpha": 3},
    )
    truth = 1.5 * up.astype("f8") @ down
    report = normalize(adapter)
    difference = np.linalg.norm(deltas(report.adapter)["fc"] - truth) / np.linalg.norm(truth)
    assert difference < 1e-6
    assert report.relative == pytest.approx(difference, rel=0.05)


# --- zeros, names, extras ------------------------------------------------------------------------------------------


def test_zero_modules_go_and_are_listed(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {f"l.{i}.q": (9, 7) for i in range(3)})
    weights = load_state(folder)
    weights["base_model.model.l.1.q.lora_B.weight"].zero_()
    save_state(weights, folder / "adapter_model.safetensors")
    report = normalize(folder)
    assert report.dropped == ("l.1.q",)
    assert report.adapter.config.raw["target_modules"] == ["l.0.q", "l.2.q"]
    for name in ("l.0.q", "l.2.q"):
        weights[f"base_model.model.{name}.lora_B.weight"].zero_()
    save_state(weights, folder / "adapter_model.safetensors")
    nothing = normalize(folder)
    assert nothing.dropped == ()
    assert any("changes nothing" in warning for warning in nothing.warnings)


def test_names_of_wrappers_are_mended(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"module.l.0._orig_mod.q": (9, 7), "l.1.q": (9, 7)})
    report = normalize(folder, tmp_path / "plain", sync=False)
    assert report.renamed == {"module.l.0._orig_mod.q": "l.0.q"}
    assert set(load_state(tmp_path / "plain")) == {
        f"base_model.model.l.{i}.q.lora_{side}.weight" for i in (0, 1) for side in "AB"
    }


@pytest.mark.parametrize("prefix", ["module.base_model.model.", "module.module.base_model.model.module.",
                                    "base_model.model.module.base_model.model."])  # fmt: skip
def test_a_wrapper_around_peft_s_own_prefix_is_mended(prefix: str, tmp_path: Path) -> None:
    plain = make_adapter(tmp_path / "plain", {"l.0.q": (9, 7)}, alpha=4, target_modules=["q"])
    tensors = load_state(plain / "adapter_model.safetensors")
    wrapped = {
        prefix + key.removeprefix("base_model.model."): value.numpy() for key, value in tensors.items()
    }
    config = {key: value for key, value in raw_config(plain).items() if key != "peft_type"}
    folder = write_adapter(tmp_path / "wrapped", wrapped, **config)
    report = normalize(folder, tmp_path / "mended", sync=False)
    assert list(report.renamed.values()) == ["l.0.q"]
    assert load_state(tmp_path / "mended").keys() == tensors.keys()
    np.testing.assert_array_equal(deltas(report.adapter)["l.0.q"], deltas(lt.load(plain))["l.0.q"])


def test_weight_files_are_compared_with_weight_files(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"l.0.q": (9, 7)})
    for out in (tmp_path / "b", tmp_path / "c" / "alone.safetensors"):
        report = normalize(folder, out, sync=False)
        file = out if out.suffix else out / "adapter_model.safetensors"
        assert report.bytes == file.stat().st_size
        assert report.bytes_before == (folder / "adapter_model.safetensors").stat().st_size


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"module.q": (9, 7), "q": (9, 7)})
    with pytest.raises(Mismatch, match="called q"):
        normalize(folder)


def test_keys_without_a_prefix_or_with_two_get_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5)).astype("f4"), rng.standard_normal((4, 2)).astype("f4")
    twice = "base_model.model.base_model.model."
    tensors = {
        "l.0.q.lora_A.default.weight": a, "l.0.q.lora_B.default.weight": b,
        f"{twice}l.1.q.lora_A.weight": a, f"{twice}l.1.q.lora_B.weight": b,
    }  # fmt: skip
    folder = write_adapter(tmp_path / "a", tensors, r=2, lora_alpha=2, target_modules=["q"])
    normalize(folder, tmp_path / "plain", sync=False)
    model = nn.ModuleDict({"l": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(5, 4)}) for _ in range(2)])})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = merged_by_peft(model, tmp_path / "plain")
    for i in (0, 1):
        weight = f"l.{i}.q.weight"
        torch.testing.assert_close(
            after[weight] - before[weight], torch.from_numpy(b @ a), rtol=1e-5, atol=1e-6
        )


def test_token_rows_alone_stay_what_they_are(tmp_path: Path) -> None:
    folder = trained(by_name["trainable-tokens"], tmp_path / "adapter", torch.float32, None)
    normalize(folder, tmp_path / "plain", sync=False)
    expected, actual = (merged_by_peft(toy(torch.float32), f) for f in (folder, tmp_path / "plain"))
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


# --- what has no plain form ----------------------------------------------------------------------------------------


def test_ia3_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = trained(by_name["ia3"], tmp_path / "adapter", torch.float32, None)
    with pytest.raises(Unsupported, match="is IA3") as caught:
        normalize(folder)
    assert "extract" in str(caught.value.hint)


def test_dora_stays_dora_and_says_so(tmp_path: Path) -> None:
    folder = trained(by_name["dora-linear"], tmp_path / "adapter", torch.float32, None)
    report = normalize(folder)
    assert {module.kind for module in report.modules} == {"dora"}
    assert any("stay DoRA" in warning for warning in report.warnings)
    with pytest.raises(Unsupported, match="DoRA"):
        normalize(folder, rank=2)


def test_nan_is_an_error_that_names_module_and_tensor() -> None:
    factors = {"fc.lora_A.weight": np.full((1, 3), np.nan, "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    with pytest.raises(InputError, match=r"fc: fc\.lora_A\.weight holds"):
        normalize(lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2}))


def test_a_rank_that_the_configuration_contradicts_is_named(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"q": (9, 7)}, rank=4, r=8)
    with pytest.raises(Mismatch, match="q has rank 4 in the file and 8"):
        normalize(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "nothing"}, "nothing"),
        ({"engine": "vllm", "to": "kohya"}, "kohya"),
        ({"rank": 0}, "rank 0"),
        ({"device": "tpu"}, "tpu"),
        ({"executor": "x"}, "x"),
    ],
)
def test_what_this_build_does_not_have_is_refused_by_name(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=message):
        normalize(make_adapter(tmp_path / "a", {"q": (9, 7)}), **options)


def test_memory_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(OverBudget):
        normalize(make_adapter(tmp_path / "a", {"q": (9, 7)}), max_memory=1000)


def test_an_input_is_never_the_output(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"q": (9, 7)})
    for place in (folder, folder / "inside", tmp_path):
        with pytest.raises(OutputExists):
            normalize(folder, place, force=True)
    base = (
        save_state({"q.weight": torch.ones(9, 7)}, tmp_path / "base" / "model.safetensors")
        if ((tmp_path / "base").mkdir() is None)
        else None
    )
    with pytest.raises(OutputExists, match="overlap"):
        normalize(folder, tmp_path / "base" / "out", base=tmp_path / "base")
    assert base is not None


@pytest.mark.parametrize("executor", ["inline", "threads", "processes"])
def test_any_number_of_workers_writes_the_same_bytes(executor: str, tmp_path: Path) -> None:
    folder = trained(by_name["loha-linear"], tmp_path / "adapter", torch.float32, None)
    normalize(folder, tmp_path / "one", jobs=1, sync=False)
    normalize(folder, tmp_path / "many", jobs=3, executor=executor, sync=False)
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_twice_is_once(tmp_path: Path) -> None:
    folder = trained(by_name["alpha-pattern-first-match"], tmp_path / "adapter", torch.float32, None)
    normalize(folder, tmp_path / "once", sync=False)
    again = normalize(tmp_path / "once", tmp_path / "twice", sync=False)
    assert again.exact
    assert again.config == ()
    name = "adapter_model.safetensors"
    assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_one_document(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"l.0.q": (9, 7)}, use_rslora=True)
    out = tmp_path / "plain"
    result = CliRunner().invoke(
        command, [str(folder), "-o", str(out), "--json", "--no-sync"], obj=Settings(), catch_exceptions=False
    )
    found = json.loads(result.output)
    assert found["schema"] == "loratools.normalize/1"
    assert found["output"] == str(out)
    assert found["modules"][0]["name"] == "l.0.q"
    assert {"field": "use_rslora", "before": True, "after": False} in found["config"]
    record = json.loads((out / "loratools.json").read_text())
    assert record["verb"] == "normalize"
    assert record["inputs"][0]["name"] == "a"


def test_the_command_prints_the_difference(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"l.0.q": (9, 7)}, rank=4)
    result = CliRunner().invoke(
        command, [str(folder), str(tmp_path / "b"), "--rank", "2"], obj=Settings(), catch_exceptions=False
    )
    difference = normalize(folder, rank=2).relative
    assert f"{difference:.2e} relative" in result.output
    assert "4 before, 2 now" in result.output


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"l.0.q": (9, 7)})
    arguments = [str(folder), str(tmp_path / "b"), "--dry-run", "--json"]
    result = CliRunner().invoke(command, arguments, obj=Settings(), catch_exceptions=False)
    planned = json.loads(result.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    normalize(folder, tmp_path / "b", sync=False)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "b").iterdir()}
    weights = {file["name"]: file["bytes"] for file in planned["files"]}
    assert weights["adapter_model.safetensors"] == sizes["adapter_model.safetensors"]
    assert weights["adapter_config.json"] == sizes["adapter_config.json"]


def test_the_command_reads_a_bare_file_by_what_it_is_told(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"l.0.q": (9, 7)}, rank=4)
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((folder / "adapter_model.safetensors").read_bytes())
    before = deltas(lt.load(bare, alpha=2))["l.0.q"]
    arguments = [str(bare), "-o", str(tmp_path / "b"), "--alpha", "2", "--no-sync"]
    CliRunner().invoke(command, arguments, obj=Settings(), catch_exceptions=False)
    made = lt.load(tmp_path / "b")
    assert (made.modules["l.0.q"].rank, made.modules["l.0.q"].scaling) == (4, 1.0)
    np.testing.assert_array_equal(deltas(made)["l.0.q"], before)


@pytest.mark.parametrize("option", ["--for", "--to"])
def test_the_command_refuses_by_name(option: str, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"q": (9, 7)})
    result = CliRunner().invoke(
        command, [str(folder), str(tmp_path / "b"), option, "nothing"], obj=Settings()
    )
    assert result.exit_code == 2
    assert "'nothing'" in result.stderr


def test_a_changed_copy_is_compared_with_what_was_given(tmp_path: Path) -> None:
    """An adapter object that was changed in Python is normalised as it is, not as its file is."""
    adapter = lt.load(make_adapter(tmp_path / "a", {"l.0.q": (9, 7), "l.1.q": (9, 7)}))
    one = replace(adapter, modules={"l.0.q": adapter.modules["l.0.q"]})
    report = normalize(one)
    assert list(report.adapter.modules) == ["l.0.q"]
