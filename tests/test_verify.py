"""``verify``: what PEFT merges is accepted, whatever it rounds; what is forged is caught and named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools import comparing, planning
from tests.model_helpers import CASES, adapt, load_cleanly, tensors, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.model_helpers import Tensors, Trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

Q = "model.layers.1.self_attn.q_proj.weight"  # square
UP = "model.layers.0.mlp.up_proj.weight"
SCALING = 3.0  # alpha 12, rank 4: what train() gives
DTYPES = [torch.float32, torch.bfloat16]


def wrong(base: Any, adapters: Any, merged: Any, **options: Any) -> dict[str, tuple[str, float | None]]:
    """Verdict and scale of every tensor that is not right."""
    report = lt.verify(base, adapters, merged, **options)
    assert report.ok == all(v.ok for v in report.modules)
    return {v.name: (v.verdict, v.scale) for v in report.modules if not v.ok}


def forge(trained: Trained, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """An honest merge of ours, in one file, tampered with."""
    lt.merge(trained.base, trained.adapter, folder / "honest")
    found = tensors(folder / "honest")
    change(found)
    (folder / "forged").mkdir()
    found = {name: tensor.contiguous() for name, tensor in found.items()}
    save_file(found, folder / "forged" / "model.safetensors")
    return folder / "forged"


def delta(trained: Trained, name: str) -> torch.Tensor:
    """What the adapter adds to a weight, in float64."""
    stored = load_file(trained.adapter / "adapter_model.safetensors")
    path = "base_model.model." + name.removesuffix(".weight")
    up, down = (stored[f"{path}.lora_{letter}.weight"].double() for letter in "BA")
    return SCALING * up @ down


@pytest.fixture(params=DTYPES, ids=["f32", "bf16"])
def llama(request: pytest.FixtureRequest, tmp_path: Path) -> Trained:
    return train(CASES["llama"], tmp_path, request.param)


def test_honest_merge_is_exact(llama: Trained, tmp_path: Path) -> None:
    report = lt.verify(llama.base, llama.adapter, forge(llama, tmp_path, lambda found: None))
    assert report.ok
    assert report.summary == {"exact": len(tensors(llama.base))}


def test_one_tensor_left_unmerged(llama: Trained, tmp_path: Path) -> None:
    base = tensors(llama.base)
    forged = forge(llama, tmp_path, lambda found: found.update({Q: base[Q]}))
    assert wrong(llama.base, llama.adapter, forged) == {Q: ("unmerged", 0.0)}


def test_nothing_merged(llama: Trained) -> None:
    found = wrong(llama.base, llama.adapter, llama.base)
    assert {verdict for verdict, _ in found.values()} == {"unmerged"}
    assert len(found) == 14  # seven in each layer


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0, 4.0, 1 / SCALING, 12 / SCALING, 0.9])
def test_wrong_scale_is_measured(llama: Trained, factor: float, tmp_path: Path) -> None:
    """Twice merged, half, taken away; alpha forgotten, or not divided by the rank."""
    base = tensors(llama.base)

    def scale(found: Tensors) -> None:
        for name in (Q, UP):
            found[name] = (base[name].double() + factor * delta(llama, name)).to(base[name].dtype)

    found = wrong(llama.base, llama.adapter, forge(llama, tmp_path, scale))
    assert {name: verdict for name, (verdict, _) in found.items()} == {Q: "wrong_scale", UP: "wrong_scale"}
    for _, scale_found in found.values():
        assert scale_found == pytest.approx(factor, rel=0.01)


def test_transposed_square(llama: Trained, tmp_path: Path) -> None:
    base = tensors(llama.base)

    def transpose(found: Tensors) -> None:
        found[Q] = (base[Q].double() + delta(llama, Q).T).to(base[Q].dtype)

    assert wrong(llama.base, llama.adapter, forge(llama, tmp_path, transpose)) == {Q: ("different", None)}


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_transposed_square_of_a_conv1d(dtype: torch.dtype, tmp_path: Path) -> None:
    """GPT-2 stores (in, out): the delta as it is would be the wrong way round."""
    trained = train(CASES["gpt2"], tmp_path, dtype)
    base, name = tensors(trained.base), "transformer.h.0.attn.c_proj.weight"

    def keep(found: Tensors) -> None:
        found[name] = (base[name].double() + delta(trained, name)).to(dtype)

    assert wrong(trained.base, trained.adapter, forge(trained, tmp_path, keep)) == {name: ("different", None)}


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("case", "pattern"),
    [("mixtral", "model.layers.1.block_sparse_moe.experts.{}.w3.weight"),
     ("qwen3_moe", "model.layers.1.mlp.experts.{}.down_proj.weight")],
)  # fmt: skip
def test_swapped_experts(case: str, pattern: str, dtype: torch.dtype, tmp_path: Path) -> None:
    trained = train(CASES[case], tmp_path, dtype)
    first, second = pattern.format(0), pattern.format(2)

    def swap(found: Tensors) -> None:
        found[first], found[second] = found[second], found[first]

    found = wrong(trained.base, trained.adapter, forge(trained, tmp_path, swap))
    assert found == {first: ("different", None), second: ("different", None)}


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_swapped_experts_of_a_stack(dtype: torch.dtype, tmp_path: Path) -> None:
    trained = train(CASES["gpt_oss"], tmp_path, dtype)
    base, name = tensors(trained.base), "model.layers.0.mlp.experts.gate_up_proj"

    def swap_deltas(found: Tensors) -> None:
        """Each expert keeps its own weight and gets the other's update."""
        changed = found[name].double() - base[name].double()
        changed[[1, 3]] = changed[[3, 1]]
        found[name] = (base[name].double() + changed).to(dtype)

    found = wrong(trained.base, trained.adapter, forge(trained, tmp_path, swap_deltas))
    assert found == {f"{name}[1]": ("different", None), f"{name}[3]": ("different", None)}


def test_half_of_a_tensor_left_unmerged(llama: Trained, tmp_path: Path) -> None:
    base = tensors(llama.base)

    def half(found: Tensors) -> None:
        found[Q][16:] = base[Q][16:]

    assert wrong(llama.base, llama.adapter, forge(llama, tmp_path, half)) == {Q: ("different", None)}


def test_missing_and_unexpected_tensors(llama: Trained, tmp_path: Path) -> None:
    def rename(found: Tensors) -> None:
        found["model.layers.1.self_attn.query.weight"] = found.pop(Q)

    assert wrong(llama.base, llama.adapter, forge(llama, tmp_path, rename)) == {
        Q: ("missing", None),
        "model.layers.1.self_attn.query.weight": ("unexpected", None),
    }


def test_another_shape(llama: Trained, tmp_path: Path) -> None:
    forged = forge(llama, tmp_path, lambda found: found.update({UP: found[UP].reshape(32, 48)}))
    assert wrong(llama.base, llama.adapter, forged) == {UP: ("shape", None)}


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_one_flipped_bit_where_nothing_changes(llama: Trained, name: str, tmp_path: Path) -> None:
    def flip(found: Tensors) -> None:
        kind = torch.int16 if found[name].dtype == torch.bfloat16 else torch.int32
        found[name].view(kind).view(-1)[5] ^= 1

    found = wrong(llama.base, llama.adapter, forge(llama, tmp_path, flip))
    assert found == {name: ("different", None)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e30])
@pytest.mark.parametrize("name", [Q, "model.norm.weight"])
def test_one_value_broken(llama: Trained, name: str, value: float, tmp_path: Path) -> None:
    def spoil(found: Tensors) -> None:
        found[name].view(-1)[7] = value

    found = wrong(llama.base, llama.adapter, forge(llama, tmp_path, spoil))
    assert found == {name: ("different", None)}


def test_a_report_with_nan_is_json(llama: Trained, tmp_path: Path) -> None:
    forged = forge(llama, tmp_path, lambda found: found[Q].fill_(float("nan")))
    report = lt.verify(llama.base, llama.adapter, forged)
    assert not report.ok
    json.loads(json.dumps(report.to_dict(), allow_nan=False))


# Two adapters.


@pytest.fixture(params=DTYPES, ids=["f32", "bf16"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base, and two adapters of different rank on the same weights."""
    base = train(CASES["llama"], tmp_path, request.param).base
    other = adapt(CASES["llama"].build(request.param), seed=6, r=8, target_modules=["q_proj", "up_proj"])
    other.save_pretrained(tmp_path / "second")
    return base, [tmp_path / "adapter", tmp_path / "second"]


def test_one_adapter_twice(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, both = pair
    lt.merge(base, [both[0], both[0]], tmp_path / "out")
    found = wrong(base, both, tmp_path / "out")
    shared = {name for name in found if "q_proj" in name or "up_proj" in name}
    assert {found[name][0] for name in shared} == {"different"}
    assert {found[name][0] for name in found.keys() - shared} == {"wrong_scale"}
    assert all(found[name][1] == pytest.approx(2.0, rel=0.01) for name in found.keys() - shared)
    assert len(found) == 14


def test_one_adapter_left_out(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, both = pair
    lt.merge(base, both[0], tmp_path / "out")
    found = wrong(base, both, tmp_path / "out")
    assert found.keys() == {n for n in tensors(base) if "q_proj" in n or "up_proj" in n}
    assert {verdict for verdict, _ in found.values()} == {"different"}


def test_weights_exchanged(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, both = pair
    lt.merge(base, both, tmp_path / "out", weights=[0.25, 0.75])
    assert not wrong(base, both, tmp_path / "out", weights=[0.25, 0.75])
    found = wrong(base, both, tmp_path / "out", weights=[0.75, 0.25])
    assert found[Q] == ("different", None)
    assert found["model.layers.0.mlp.gate_proj.weight"] == ("wrong_scale", pytest.approx(1 / 3, rel=0.01))


# Merges by PEFT, which rounds once, twice, or after each adapter.


@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama", "gpt2", "mixtral"])
def test_peft_is_accepted(case: str, dtype: torch.dtype, safe: bool, tmp_path: Path) -> None:
    trained = train(CASES[case], tmp_path, dtype)
    trained.model.merge_and_unload(safe_merge=safe).save_pretrained(tmp_path / "peft")
    report = lt.verify(trained.base, trained.adapter, tmp_path / "peft")
    assert report.ok, report.summary
    if safe and dtype != torch.float32:
        assert report.summary["rounding"] > 0  # it does round twice: this is not the trivial case


@pytest.mark.parametrize("opposed", [False, True], ids=["independent", "opposed"])
@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sequential_merges_by_peft_are_accepted(
    dtype: torch.dtype, safe: bool, opposed: bool, tmp_path: Path
) -> None:
    """Opposed: the second takes away nearly all that the first adds, so that what is between is far from the result."""
    trained = train(CASES["llama"], tmp_path, dtype)
    stored = load_file(trained.adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for key, tensor in stored.items():
        noise = torch.randn(tensor.shape, generator=generator)
        stored[key] = tensor + 0.01 * noise if opposed else noise * 0.1
        if opposed and "lora_B" in key:
            stored[key] = -stored[key]
    (tmp_path / "second").mkdir()
    save_file(stored, tmp_path / "second" / "adapter_model.safetensors")
    config = (trained.adapter / "adapter_config.json").read_text()
    (tmp_path / "second" / "adapter_config.json").write_text(config)
    model = PeftModel.from_pretrained(
        load_cleanly(CASES["llama"], trained.base), trained.adapter, adapter_name="one"
    )
    model.load_adapter(tmp_path / "second", adapter_name="two")
    merged = model.merge_and_unload(safe_merge=safe, adapter_names=["one", "two"])
    merged.save_pretrained(tmp_path / "peft")
    both = [trained.adapter, tmp_path / "second"]
    report = lt.verify(trained.base, both, tmp_path / "peft")
    assert report.ok, report.summary
    assert not lt.verify(trained.base, both[:1], tmp_path / "peft").ok


# Deltas smaller than what the type can hold: no entry tells, all of them together do.

SIZE = 128


def write(path: Path, weight: torch.Tensor) -> Path:
    save_file({"layer.weight": weight.contiguous()}, path)
    return path


def small_adapter(folder: Path, share: float, seed: int, size: int = SIZE) -> torch.Tensor:
    """An adapter whose delta is ``share`` of the weights; the delta."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(4, size, generator=generator)
    up = torch.randn(size, 4, generator=generator) * 0.05 * share / 2
    folder.mkdir()
    keys = {"base_model.model.layer.lora_A.weight": down, "base_model.model.layer.lora_B.weight": up}
    save_file(keys, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["layer"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return up.double() @ down.double()


@dataclass(frozen=True)
class Small:
    """A base of one weight, two adapters, and their deltas in float64."""

    folder: Path
    wide: torch.Tensor
    one: torch.Tensor
    two: torch.Tensor

    def verdict(self, values: torch.Tensor, *names: str) -> tuple[str, float | None]:
        """On some values rounded once to bfloat16, as the merge of the adapters named."""
        merged = write(self.folder / "merged.safetensors", values.bfloat16())
        adapters = [self.folder / name for name in names]
        (found,) = lt.verify(self.folder / "base.safetensors", adapters, merged).modules
        return found.verdict, found.scale

    def assert_honest_ones_pass(self) -> None:
        wide, one, two = self.wide, self.one, self.two
        assert self.verdict(wide + one, "one")[0] in {"exact", "rounding"}
        assert self.verdict(wide + rounded(one), "one")[0] == "rounding"
        assert self.verdict(wide + one + two, "one", "two")[0] in {"exact", "rounding"}
        assert self.verdict(rounded(wide + one) + two, "one", "two")[0] == "rounding"
        assert self.verdict(rounded(wide + rounded(one)) + rounded(two), "one", "two")[0] == "rounding"
        assert self.verdict(wide + rounded(one + two), "one", "two")[0] == "rounding"


def rounded(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().double()


def make_small(folder: Path, weight: torch.Tensor, share: float) -> Small:
    write(folder / "base.safetensors", weight)
    one, two = (
        small_adapter(folder / name, share, seed, len(weight)) for seed, name in enumerate(("one", "two"))
    )
    return Small(folder, weight.double(), one, two)


@pytest.mark.parametrize("share", [1e-1, 1e-2, 3e-3, 1e-3, 3e-4])
def test_small_deltas(share: float, tmp_path: Path) -> None:
    """Some weights are near zero, and hold even the smallest delta."""
    weight = (torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()
    small = make_small(tmp_path, weight, share)
    small.assert_honest_ones_pass()
    wide, one, two = small.wide, small.one, small.two
    assert small.verdict(wide, "one") == ("unmerged", 0.0)
    assert small.verdict(wide, "one", "two") == ("unmerged", 0.0)
    for factor in (0.5, 0.9, 2.0, 4.0):
        found = small.verdict(wide + factor * one, "one")
        assert found == ("wrong_scale", pytest.approx(factor, rel=0.02))
    assert small.verdict(wide + one.T, "one") == ("different", None)
    assert small.verdict(wide + two, "one") == ("different", None)
    assert small.verdict(wide + one, "one", "two") == ("different", None)
    assert small.verdict(rounded(wide + one) + one, "one", "two") == ("different", None)


@pytest.mark.parametrize("share", [5e-3, 3e-3, 1.5e-3])
def test_deltas_below_every_spacing(share: float, tmp_path: Path) -> None:
    """No weight is near zero: most of the delta is lost, and every entry is within a rounding of any merge."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (SIZE, SIZE), generator=generator) * 2 - 1
    weight = ((0.05 + 0.05 * torch.rand(SIZE, SIZE, generator=generator)) * signs).bfloat16()
    small = make_small(tmp_path, weight, share)
    small.assert_honest_ones_pass()
    wide, one, two = small.wide, small.one, small.two
    assert small.verdict(wide, "one") == ("unmerged", 0.0)
    assert small.verdict(wide, "one", "two") == ("unmerged", 0.0)
    for values in (0.5 * one, 2 * one, -one, one.T, two):
        assert small.verdict(wide + values, "one")[0] in {"different", "wrong_scale"}
    for values in (one, two, 2 * one):
        assert small.verdict(wide + values, "one", "two")[0] in {"different", "wrong_scale"}


def test_a_merge_in_a_wider_type_is_accepted(tmp_path: Path) -> None:
    trained = train(CASES["llama"], tmp_path, torch.bfloat16)
    model = load_cleanly(CASES["llama"], trained.base, dtype=torch.float32)
    PeftModel.from_pretrained(model, trained.adapter).merge_and_unload().save_pretrained(tmp_path / "wide")
    report = lt.verify(trained.base, trained.adapter, tmp_path / "wide")
    assert report.ok, report.summary


# A few values rounded to the other side: judged by themselves. LARGE² / 1000 and more are not few.

LARGE = 512
FEW = 20


def without_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("a few elements were no reason to look at all of them")

    monkeypatch.setattr(comparing, "_compare_all", refuse)


def large_weight(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(LARGE, LARGE, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)


def moved(small: Small, names: list[str], ulps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A merge of ours, and the same with FEW of its values moved on, past the exact one, by so many last places.

    Of values that grew, so that no larger one was met on the way; that rounding made smaller; in the last rows.
    """
    out = small.folder / f"honest{ulps}.safetensors"
    lt.merge(small.folder / "base.safetensors", [small.folder / name for name in names], out)
    merged = load_file(out)["layer.weight"]
    exact = small.wide + small.one + (small.two if "two" in names else 0.0)
    found = merged.double().abs()
    away = (found > small.wide.abs()) & (exact.abs() > found)
    away[: LARGE // 8 * 7] = False
    order = torch.randperm(exact.numel(), generator=torch.Generator().manual_seed(3))
    chosen = order[away.view(-1)[order]][:FEW]
    assert len(chosen) == FEW
    forged = merged.clone()
    forged.view(torch.int16).view(-1)[chosen] += ulps
    return merged, forged


def only(base: Path, adapters: list[Path], merged: torch.Tensor) -> Any:
    """The verdict on a checkpoint of one tensor."""
    (found,) = lt.verify(base, adapters, write(base.with_name("merged.safetensors"), merged)).modules
    return found


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=["one", "two"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_few_roundings_to_the_other_side(
    dtype: torch.dtype, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make_small(tmp_path, large_weight(dtype), 0.1)
    merged, forged = moved(small, names, 1)
    # Two steps of many blocks, so that there are sums to be put together.
    monkeypatch.setattr(planning, "STEP_BYTES", LARGE * LARGE)
    monkeypatch.setattr(planning, "BLOCK_ELEMENTS", 8 * LARGE)
    without_sums(monkeypatch)
    found = only(tmp_path / "base.safetensors", [tmp_path / name for name in names], forged)
    assert (found.verdict, found.differing) == ("rounding", FEW / LARGE**2)
    distance = (forged.double() - merged.double()).norm() / merged.double().norm()
    assert found.relative == pytest.approx(float(distance), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_few_values_off_by_more_than_a_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    """As many, each by two units: too few for another scale, and no rounding."""
    small = make_small(tmp_path, large_weight(dtype), 0.1)
    base, adapters = tmp_path / "base.safetensors", [tmp_path / "one"]
    assert only(base, adapters, moved(small, ["one"], 1)[1]).verdict == "rounding"
    found = only(base, adapters, moved(small, ["one"], 2)[1])
    assert (found.verdict, found.scale) == ("different", None)


def test_one_value_off_by_more_than_a_rounding(tmp_path: Path) -> None:
    small = make_small(tmp_path, large_weight(torch.bfloat16), 0.1)
    merged = (small.wide + small.one).bfloat16()
    merged[300, 20] *= 1.5
    found = only(tmp_path / "base.safetensors", [tmp_path / "one"], merged)
    assert (found.verdict, found.scale) == ("different", None)


@pytest.mark.parametrize("held", ["near zero", "between values"])
def test_few_values_are_all_that_a_tiny_delta_changes(held: str, tmp_path: Path) -> None:
    """A thousandth of the spacing: so few values change that those which differ are few among all.

    Those near zero, whose own spacing is small; or, of a base in a wider type, those that lie near the middle.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * LARGE, 2 * LARGE, generator=generator) * 0.05
    near_zero = held == "near zero"
    small = make_small(
        tmp_path,
        weight.bfloat16() if near_zero else weight + 0.07 * weight.sign(),
        1e-6 if near_zero else 1e-5,
    )
    wide, one, base = small.wide, small.one, tmp_path / "base.safetensors"
    assert only(base, [tmp_path / "one"], (wide + one).bfloat16()).ok
    for factor in (0.5, 1.5):
        found = only(base, [tmp_path / "one"], (wide + factor * one).bfloat16())
        assert found.verdict in {"wrong_scale", "different"}
        assert 0 < found.differing < 1 / comparing._FEW


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-5])
def test_the_short_way_says_what_the_long_one_says(
    share: float, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a few values left as they were, of all sizes of delta; at random, and where most of the change was meant."""
    small = make_small(tmp_path, large_weight(dtype), share)
    forgeries = []
    order = torch.randperm(LARGE**2, generator=torch.Generator().manual_seed(3))
    for positions in (order, small.one.abs().view(-1).argsort(descending=True)):
        for count in (1, 60, 200):
            merged = (small.wide + small.one).to(dtype)
            merged.view(-1)[positions[:count]] = small.wide.to(dtype).view(-1)[positions[:count]]
            forgeries.append(merged)

    def verdicts() -> list[Any]:
        return [only(tmp_path / "base.safetensors", [tmp_path / "one"], merged) for merged in forgeries]

    short = verdicts()
    monkeypatch.setattr(comparing, "_compare_few", lambda *_: None)
    for mine, theirs in zip(short, verdicts(), strict=True):
        assert (mine.verdict, mine.differing, mine.scale) == (theirs.verdict, theirs.differing, theirs.scale)
        assert mine.relative == pytest.approx(theirs.relative, rel=1e-3)
