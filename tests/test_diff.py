"""``diff`` against dense float64, on every kind, on what cannot be compared, and from the command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.cli.app import app
from loratools.deltas.likeness import compare
from loratools.deltas.lowrank import LowRank
from loratools.errors import InputError, Mismatch, OverBudget, ShapeMismatch, Unsupported
from loratools.pairing import strip
from tests.helpers import make_adapter, write_adapter
from tests.small import SHAPES, write_base, write_small_adapter

Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def adapter(factors: Factors, *, alpha: float | None = None, kind: Any = None, **extra: Any) -> lt.Adapter:
    """A LoRA of factors (up, down) in memory; scaling 1 unless ``alpha`` is given. Config behind ``config=``."""
    tensors: dict[str, Any] = dict(extra.pop("tensors", {}))
    rank = next(iter(factors.values()))[1].shape[0] if factors else 1
    ranks = {name: down.shape[0] for name, (_, down) in factors.items()}
    for name, (up, down) in factors.items():
        tensors[f"{name}.lora_A.weight"] = down if kind is None else down.astype(kind)
        tensors[f"{name}.lora_B.weight"] = up if kind is None else up.astype(kind)
    odd = {f"^{name}": own for name, own in ranks.items() if own != rank}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank if alpha is None else alpha,
              "rank_pattern": odd, "alpha_pattern": odd if alpha is None else {}}  # fmt: skip
    return lt.load(tensors, config={**config, **extra})


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def factors(seed: int, out: int = 12, into: int = 9, rank: int = 3) -> tuple[np.ndarray, np.ndarray]:
    return normal(seed, out, rank), normal(seed + 1000, rank, into)


def subspace_overlap(one: np.ndarray, other: np.ndarray, i: int, j: int) -> tuple[float, float]:
    """phi of the left and of the right singular vectors, from full decompositions."""
    (u, _, v), (x, _, y) = np.linalg.svd(one), np.linalg.svd(other)
    left, right = u[:, :i].T @ x[:, :j], v[:i] @ y[:j].T
    return float((left**2).sum()) / min(i, j), float((right**2).sum()) / min(i, j)


# --- against dense float64 -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    out=st.integers(1, 30),
    into=st.integers(1, 30),
    ranks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    scales=st.tuples(st.sampled_from([-3.0, 0.1, 1.0, 2.0]), st.sampled_from([0.5, 1.0, 7.0])),
    closeness=st.sampled_from([None, 1e-2, 1e-5, 1e-8]),
    kind=st.sampled_from(["f4", "f8"]),
)
def test_two_deltas_are_their_dense_twins(seed, out, into, ranks, scales, closeness, kind):
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((out, ranks[0])), rng.standard_normal((ranks[0], into))
    if closeness is None:
        other_up, other_down = rng.standard_normal((out, ranks[1])), rng.standard_normal((ranks[1], into))
    else:  # the same in other factors, of a higher rank, and something small
        turn = np.linalg.qr(rng.standard_normal((ranks[0], ranks[0])))[0]
        other_up = np.hstack([up @ turn, closeness * rng.standard_normal((out, ranks[1]))])
        other_down = np.vstack([turn.T @ down, rng.standard_normal((ranks[1], into))])
        scales = (scales[0], scales[0])
    a = LowRank(up.astype(kind), down.astype(kind), scales[0])
    b = LowRank(other_up.astype(kind), other_down.astype(kind), scales[1])
    found = compare(a, b)
    dense_a, dense_b = (d.scaling * (d.up.astype("f8") @ d.down.astype("f8")) for d in (a, b))
    apart = dense_a - dense_b
    size = float(sum(abs(d.scaling) * np.linalg.norm(d.up) * np.linalg.norm(d.down) for d in (a, b)))
    assert found.norm_a == pytest.approx(np.linalg.norm(dense_a), rel=1e-9, abs=1e-13 * size)
    assert found.norm_b == pytest.approx(np.linalg.norm(dense_b), rel=1e-9, abs=1e-13 * size)
    assert found.inner == pytest.approx(float((dense_a * dense_b).sum()), rel=1e-9, abs=1e-13 * size**2)
    assert found.distance == pytest.approx(np.linalg.norm(apart), rel=1e-6, abs=1e-13 * size)
    assert found.cosine is None or -1 <= found.cosine <= 1


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    padded=st.booleans(),
)
def test_overlap_is_that_of_the_singular_vectors(seed, ranks, padded):
    rng = np.random.default_rng(seed)
    out, into = 20, 15
    pair = [(rng.standard_normal((out, r)), rng.standard_normal((r, into))) for r in ranks]
    dense = [up @ down for up, down in pair]
    if padded:  # rank that is not there: a row that was never trained, a direction said twice
        pair = [
            (np.hstack([up, up[:, :1], 0 * up[:, :1]]), np.vstack([down, down[:1], down[:1]]))
            for up, down in pair
        ]
        dense = [up @ down for up, down in pair]
    found = compare(*(LowRank(up, down) for up, down in pair))
    left, right = subspace_overlap(*dense, *ranks)
    assert found.outputs.value == pytest.approx(left, abs=1e-6)
    assert found.inputs.value == pytest.approx(right, abs=1e-6)
    assert (found.outputs.null, found.inputs.null) == (max(ranks) / out, max(ranks) / into)


def test_the_null_of_an_overlap_is_the_mean_of_random_subspaces():
    found = [
        compare(LowRank(*factors(seed, 60, 40, 4)), LowRank(*factors(seed + 500, 60, 40, 7)))
        for seed in range(60)
    ]
    for side in ("outputs", "inputs"):
        values = [getattr(one, side).value for one in found]
        assert np.mean(values) == pytest.approx(getattr(found[0], side).null, rel=0.1)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(st.tuples(st.integers(2, 14), st.integers(2, 14)), min_size=2, max_size=4),
    kinds=st.tuples(st.sampled_from(["f4", "f2", ml_dtypes.bfloat16, "f8"]), st.sampled_from(["f4", "f8"])),
    alphas=st.tuples(st.sampled_from([1.0, 16.0]), st.sampled_from([0.3, 8.0])),
    prefix=st.sampled_from(["", "base_model.model.", "base_model.model.model."]),
)
def test_a_whole_adapter_is_its_dense_twin(seed, shapes, kinds, alphas, prefix):
    """Different ranks, types, scalings and prefixes; the first module is only in A, the last only in B."""
    rng = np.random.default_rng(seed)
    dense: list[dict[str, np.ndarray]] = []
    loaded = []
    for side, rank in ((0, 2), (1, 5)):
        mine = dict(enumerate(shapes))
        mine.pop((len(shapes) - 1) if side == 0 else 0)
        made = {
            f"fc{number}": (rng.standard_normal((out, rank)), rng.standard_normal((rank, into)))
            for number, (out, into) in mine.items()
        }
        made = {name: tuple(v.astype(kinds[side]) for v in pair) for name, pair in made.items()}
        dense.append({
            name: alphas[side] / rank * (up.astype("f8") @ down.astype("f8")) for name, (up, down) in made.items()
        })  # fmt: skip
        named = {(prefix if side else "") + name: pair for name, pair in made.items()}
        loaded.append(adapter(named, alpha=alphas[side]))
    report = lt.diff(*loaded)
    everywhere = sorted({*dense[0], *dense[1]})
    stacked = [
        np.concatenate([np.ravel(d.get(name, 0 * (dense[0] | dense[1])[name])) for name in everywhere])
        for d in dense
    ]
    assert report.distance == pytest.approx(np.linalg.norm(stacked[0] - stacked[1]), rel=1e-6)
    assert report.relative == pytest.approx(report.distance / np.linalg.norm(stacked[0]), rel=1e-6)
    cosine = stacked[0] @ stacked[1] / np.linalg.norm(stacked[0]) / np.linalg.norm(stacked[1])
    assert report.cosine == pytest.approx(cosine, abs=1e-6)
    assert report.only_in_a == ("fc0",)
    assert [strip(name) for name in report.only_in_b] == [f"fc{len(shapes) - 1}"]
    for module in report.modules:
        apart = np.linalg.norm(dense[0][module.name] - dense[1][module.name])
        assert module.distance == pytest.approx(apart, rel=1e-6)
        assert module.relative == pytest.approx(apart / np.linalg.norm(dense[0][module.name]), rel=1e-6)
    assert not report.identical


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_factors_turned_by_any_invertible_matrix_are_the_same_update(kind):
    up, down = factors(0, 40, 30, 6)
    turn = np.linalg.qr(normal(5, 6, 6))[0] * [8, 4, 2, 1, 0.5, 0.1]  # that leaves float32 its digits
    one = adapter({"fc": (up, down)}, kind=kind)
    other = adapter({"fc": (up @ turn, np.linalg.solve(turn, down))}, kind=kind, alpha=6)
    report = lt.diff(one, other)
    assert report.identical
    assert report.relative < (1e-6 if kind == "f4" else 1e-13)
    assert report.modules[0].overlap == pytest.approx(1)


@pytest.mark.parametrize("share", [1e-4, 1e-7, 1e-10, 1e-12])
@pytest.mark.parametrize("same_factors", [True, False])
def test_small_differences_have_their_own_digits(share, same_factors):
    """A Gram matrix alone would lose everything below 1e-8."""
    up, down = factors(0, 50, 40, 5)
    turn = np.eye(5) if same_factors else normal(7, 5, 5)
    strange = normal(8, 50, 1), normal(9, 1, 40)
    step = share * np.linalg.norm(up @ down) / np.linalg.norm(strange[0] @ strange[1])
    a = LowRank(up, down)
    b = LowRank(
        np.hstack([up @ turn, step * strange[0]]), np.vstack([np.linalg.solve(turn, down), strange[1]])
    )
    assert compare(a, b).relative == pytest.approx(share, rel=1e-3 if share > 1e-11 else 0.05)
    assert compare(b, a).relative == pytest.approx(share, rel=1e-3 if share > 1e-11 else 0.05)
    moved = LowRank(up + share * normal(10, 50, 5), down)
    assert compare(a, moved).distance == pytest.approx(
        share * np.linalg.norm(normal(10, 50, 5) @ down), rel=1e-3
    )


def test_another_scaling_is_a_difference_and_not_another_direction():
    pair = factors(1)
    report = lt.diff(adapter({"fc": pair}, alpha=3), adapter({"fc": pair}, alpha=4.5))
    assert report.relative == pytest.approx(0.5)
    assert report.cosine == pytest.approx(1)
    assert report.modules[0].overlap == pytest.approx(1)
    assert [(c.field, c.a, c.b) for c in report.config] == [("lora_alpha", 3, 4.5)]


def test_the_difference_is_that_of_the_merged_weights(tmp_path):
    """What the adapters do to a model is what is compared: the merge is the oracle."""
    base = write_base(tmp_path / "base", kind=np.float64)
    one = write_small_adapter(tmp_path / "a", seed=1, alpha=6, use_rslora=True)
    other = write_small_adapter(tmp_path / "b", seed=2, rank=2, alpha_pattern={"layers.1.q_proj": 5})
    before = [lt.merge(base, path, dtype="f64").state_dict for path in (one, other)]
    report = lt.diff(one, other)
    for module in report.modules:
        merged = [state[f"{module.name}.weight"] for state in before]
        assert module.distance == pytest.approx(np.linalg.norm(merged[0] - merged[1]), rel=1e-6)


def test_deltas_of_other_shapes_are_not_compared():
    with pytest.raises(ShapeMismatch):
        compare(LowRank(*factors(0)), LowRank(*factors(0, into=8)))


def test_a_small_difference_of_factors_that_say_something_twice():
    """The Gram matrix of ``down`` is singular, so nothing can be fitted to it."""
    up, down = np.ones((6, 2)), np.ones((2, 5))
    a, b = LowRank(up, down), LowRank(up + np.outer(np.ones(6), [1e-9, 0]), down)
    assert compare(a, b).distance == pytest.approx(1e-9 * math.sqrt(30), rel=1e-6)


# --- kinds ---------------------------------------------------------------------------------------------------


def lokr(left: np.ndarray, right: np.ndarray) -> lt.Adapter:
    tensors = {"fc.lokr_w1": left, "fc.lokr_w2": right}
    return lt.load(tensors, config={"peft_type": "LOKR", "r": 4, "alpha": 4})


def loha(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> lt.Adapter:
    tensors = {
        "fc.hada_w1_a": first[0],
        "fc.hada_w1_b": first[1],
        "fc.hada_w2_a": second[0],
        "fc.hada_w2_b": second[1],
    }
    return lt.load(tensors, config={"peft_type": "LOHA", "r": first[1].shape[0], "alpha": first[1].shape[0]})


def as_lora(dense: np.ndarray) -> lt.Adapter:
    left, values, right = np.linalg.svd(dense, full_matrices=False)
    rank = int((values > values[0] * 1e-12).sum())
    return adapter({"fc": (left[:, :rank] * values[:rank], right[:rank])})


def test_a_loha_is_the_lora_of_the_same_delta():
    first, second = factors(0, 30, 25, 2), factors(1, 30, 25, 2)
    report = lt.diff(loha(first, second), as_lora((first[0] @ first[1]) * (second[0] @ second[1])))
    assert report.identical
    assert report.relative < 1e-12
    module = report.modules[0]
    assert (module.kind_a, module.kind_b, module.rank_a, module.rank_b) == ("loha", "lora", 2, 4)
    assert module.overlap == pytest.approx(1)


def test_a_lokr_is_the_lora_of_the_same_delta():
    left, right = normal(0, 4, 3), normal(1, 5, 6)
    report = lt.diff(lokr(left, right), as_lora(np.kron(left, right)))
    assert report.identical
    assert report.relative < 1e-12


def test_ranks_that_fill_the_matrix_are_compared_without_an_overlap():
    first, second = factors(0, 6, 5, 3), factors(1, 6, 5, 3)
    dense = (first[0] @ first[1]) * (second[0] @ second[1])
    other = factors(9, 6, 5, 4)
    report = lt.diff(loha(first, second), adapter({"fc": other}))
    assert report.distance == pytest.approx(np.linalg.norm(dense - other[0] @ other[1]), rel=1e-9)
    assert report.modules[0].overlap is None


def test_convolutions_embeddings_and_adalora():
    up, down = factors(0, 8, 3 * 25, 2)
    conv = adapter({"conv": (up.reshape(8, 2, 1, 1), down.reshape(2, 3, 5, 5))})
    other = adapter({"conv": ((2 * up).reshape(8, 2, 1, 1), down.reshape(2, 3, 5, 5))})
    assert lt.diff(conv, other).distance == pytest.approx(np.linalg.norm(up @ down), rel=1e-9)
    # an embedding's factors stand the other way round
    tensors = {
        "embed_tokens.lora_embedding_A": normal(1, 2, 30),
        "embed_tokens.lora_embedding_B": normal(2, 7, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    one = lt.load(tensors, config=config)
    two = lt.load(
        {**tensors, "embed_tokens.lora_embedding_A": -tensors["embed_tokens.lora_embedding_A"]}, config=config
    )
    assert lt.diff(one, two).relative == pytest.approx(2)
    # AdaLoRA's singular values stand between the factors
    up, down, values = normal(3, 8, 4), normal(4, 4, 6), normal(5, 4, 1)
    tensors = {"fc.lora_A": down, "fc.lora_B": up, "fc.lora_E": values}
    ada = lt.load(tensors, config={"peft_type": "ADALORA", "init_r": 4, "r": 4, "lora_alpha": 4})
    plain = adapter({"fc": (up, values * down)}, alpha=4 / (1 + 1e-5 / 4))
    assert lt.diff(ada, plain).relative < 1e-12


@pytest.mark.parametrize("experts", [2, 5])
def test_every_expert_counts(experts):
    owner, rank = "model.layers.0.mlp.experts", 2
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_parameters": ["mlp.experts.down_proj"]}
    made, dense = [], []
    for seed in (0, 1):
        down, up = normal(seed, experts * rank, 6), normal(seed + 9, 5, rank * experts)
        made.append(lt.load({f"{owner}.lora_A.weight": down, f"{owner}.lora_B.weight": up}, config=config))
        dense.append(
            np.stack([2 * up[:, e::experts] @ down[e * rank : (e + 1) * rank] for e in range(experts)])
        )
    report = lt.diff(*made)
    assert report.modules[0].name == f"{owner}.down_proj"
    assert report.distance == pytest.approx(np.linalg.norm(dense[0] - dense[1]), rel=1e-9)
    assert report.norm_a == pytest.approx(np.linalg.norm(dense[0]), rel=1e-9)
    phi = [subspace_overlap(a, b, rank, rank) for a, b in zip(*dense, strict=True)]
    assert report.modules[0].overlap == pytest.approx(np.mean(phi), abs=1e-9)


def test_other_numbers_of_experts_are_refused():
    owner, config = "mlp.experts", {"peft_type": "LORA", "r": 1, "lora_alpha": 1,
                                    "target_parameters": ["mlp.experts.down_proj"]}  # fmt: skip
    made = [
        lt.load(
            {f"{owner}.lora_A.weight": np.ones((n, 6)), f"{owner}.lora_B.weight": np.ones((5, n))},
            config=config,
        )
        for n in (2, 3)
    ]
    with pytest.raises(InputError, match="2 experts in A and 3 in B"):
        lt.diff(*made)


def test_a_trained_bias_belongs_to_the_update():
    pair, bias = factors(0), normal(4, 12)
    config = {"lora_bias": True, "alpha": 6}
    one = adapter({"fc": pair}, tensors={"fc.lora_B.bias": bias}, **config)
    other = adapter({"fc": pair}, tensors={"fc.lora_B.bias": bias / 2}, **config)
    without = adapter({"fc": pair}, alpha=6)
    assert lt.diff(one, other).distance == pytest.approx(2 * np.linalg.norm(bias / 2))
    assert lt.diff(one, without).distance == pytest.approx(2 * np.linalg.norm(bias))
    assert lt.diff(without, one).distance == pytest.approx(2 * np.linalg.norm(bias))
    assert lt.diff(one, one).identical


def dora(pair: tuple[np.ndarray, np.ndarray], magnitude: np.ndarray) -> lt.Adapter:
    return adapter({"fc": pair}, tensors={"fc.lora_magnitude_vector": magnitude}, use_dora=True)


def test_dora_is_compared_tensor_by_tensor_and_says_so():
    pair, magnitude, turn = factors(0), 1 + abs(normal(3, 12)), normal(4, 3, 3)
    turned = (pair[0] @ turn, np.linalg.solve(turn, pair[1]))
    same = lt.diff(dora(pair, magnitude), dora(turned, magnitude))
    assert same.identical
    assert same.modules[0].as_stored
    assert any("dora, which is not a plain sum" in warning for warning in same.warnings)
    other = lt.diff(dora(pair, magnitude), dora(turned, 1.5 * magnitude))
    assert not other.identical
    assert other.relative < 1e-12
    (extra,) = other.changed_extras
    assert (extra.name, extra.role) == ("fc.magnitude", "magnitude")
    assert extra.relative == pytest.approx(0.5)


def test_dora_against_lora_is_refused_with_the_way_out():
    pair = factors(0)
    with pytest.raises(Unsupported, match="fc is dora in A and lora in B") as caught:
        lt.diff(dora(pair, np.ones(12)), adapter({"fc": pair}))
    assert "merge" in (caught.value.hint or "")


def test_ia3_is_compared_by_what_its_factors_change():
    def ia3(values: np.ndarray) -> lt.Adapter:
        return lt.load({"fc.ia3_l": values}, config={"peft_type": "IA3", "target_modules": ["fc"]})

    one, other = 1 + 0.1 * normal(0, 12, 1), 1 + 0.1 * normal(1, 12, 1)
    report = lt.diff(ia3(one), ia3(other))
    assert report.norm_a == pytest.approx(np.linalg.norm(one - 1))
    assert report.distance == pytest.approx(np.linalg.norm(one - other))
    assert any("ia3" in warning for warning in report.warnings)
    with pytest.raises(Unsupported, match="ia3 of outputs in A and ia3 of inputs in B"):
        lt.diff(ia3(one), ia3(other.T))


def test_a_start_from_a_part_of_the_base_is_compared_where_both_take_the_same_part():
    pair, turn = factors(0), normal(4, 3, 3)
    turned = (pair[0] @ turn, np.linalg.solve(turn, pair[1]))
    report = lt.diff(
        adapter({"fc": pair}, init_lora_weights="pissa"), adapter({"fc": turned}, init_lora_weights="pissa")
    )
    assert report.identical
    assert any("lora pissa" in warning for warning in report.warnings)
    other = adapter({"fc": factors(1, rank=2)}, init_lora_weights="pissa")
    with pytest.raises(Unsupported, match="another rank or scaling") as caught:
        lt.diff(adapter({"fc": pair}, init_lora_weights="pissa"), other)
    assert "normalize --base" in (caught.value.hint or "")
    with pytest.raises(Unsupported, match="fc is lora pissa in A and lora in B"):
        lt.diff(adapter({"fc": pair}, init_lora_weights="pissa"), adapter({"fc": pair}))


# --- what lies beside the modules --------------------------------------------------------------------------------


def test_heads_are_compared_by_value():
    def with_head(values: np.ndarray, **more: Any) -> lt.Adapter:
        return adapter(
            {"fc": factors(0)}, tensors={"score.weight": values, **more}, modules_to_save=["score"]
        )

    head = normal(2, 3, 12)
    assert lt.diff(with_head(head), with_head(head)).identical
    report = lt.diff(with_head(head), with_head(1.25 * head))
    assert not report.identical
    assert report.relative == 0
    (extra,) = report.changed_extras
    assert (extra.name, extra.role, extra.relative) == ("score.weight", "replacement", pytest.approx(0.25))
    assert lt.diff(with_head(head), with_head(1.25 * head), tolerance=0.3).identical
    (extra,) = lt.diff(with_head(head), with_head(normal(3, 4, 12))).changed_extras
    assert (extra.distance, extra.why) == (None, "[3, 12] in A, [4, 12] in B")
    report = lt.diff(with_head(head, **{"score.bias": np.ones(3)}), with_head(head))
    assert (report.only_in_a, report.identical) == (("score.bias",), False)


def test_a_large_head_is_read_in_pieces(monkeypatch):
    monkeypatch.setattr("loratools.verbs.diff_work._CHUNK", 7)
    one, other = normal(2, 5, 12), normal(3, 5, 12)
    made = [
        adapter({"fc": factors(0)}, tensors={"score.weight": head}, modules_to_save=["score"])
        for head in (one, other)
    ]
    (extra,) = lt.diff(*made).extras
    assert extra.distance == pytest.approx(np.linalg.norm(one - other))
    assert extra.norm_b == pytest.approx(np.linalg.norm(other))


def test_token_rows_count_with_the_tokens_they_replace():
    def with_rows(tokens: list[int], rows: np.ndarray) -> lt.Adapter:
        key = "embed_tokens.token_adapter.trainable_tokens_delta"
        return adapter(
            {"fc": factors(0)}, tensors={key: rows}, trainable_token_indices={"embed_tokens": tokens}
        )

    rows = normal(3, 2, 9)
    assert lt.diff(with_rows([1, 4], rows), with_rows([1, 4], rows)).identical
    (extra,) = lt.diff(with_rows([1, 4], rows), with_rows([1, 5], rows)).changed_extras
    assert (extra.role, extra.relative, extra.why) == ("token_rows", None, "they replace other tokens")


def test_what_is_used_in_training_only_does_not_count():
    sampler = {"fc.lora_monteclora_sampler.weight": np.ones(3)}
    one, other = adapter({"fc": factors(0)}, tensors=sampler), adapter({"fc": factors(0)})
    assert lt.diff(one, other).identical
    assert lt.diff(one, other).only_in_a == ()
    sampler = {"fc.lora_monteclora_sampler.weight": np.zeros(3)}
    assert lt.diff(one, adapter({"fc": factors(0)}, tensors=sampler)).identical


def test_configurations_are_compared_field_by_field():
    one = adapter(
        {"fc": factors(0)}, target_modules=["a", "b"], lora_dropout=0.0, bias="none", inference_mode=True
    )
    other = adapter(
        {"fc": factors(0)}, target_modules=["b", "a"], init_lora_weights=True, base_model_name_or_path="x/y"
    )
    report = lt.diff(one, other)
    assert [(c.field, c.a, c.b) for c in report.config] == [("base_model_name_or_path", None, "x/y")]
    assert report.identical


# --- warnings ------------------------------------------------------------------------------------------------


def warned(report: lt.DiffReport, words: str) -> bool:
    return any(words in warning for warning in report.warnings)


def trained(start: np.ndarray, seed: int, moved: float = 0.13) -> tuple[np.ndarray, np.ndarray]:
    """B from zero, A from its start: what training makes of an initialisation."""
    return 0.01 * normal(seed, 40, 4), start + moved * np.std(start) * normal(seed + 50, *start.shape)


def test_a_shared_initialisation_is_seen_and_nothing_else_is_taken_for_one():
    start, other_start = normal(0, 4, 30), normal(1, 4, 30)
    one = adapter({"fc": trained(start, 2)})
    report = lt.diff(one, adapter({"fc": trained(start, 3)}))
    assert warned(report, "trained from one initialisation")
    assert report.modules[0].inputs.value > 0.9  # the trap
    assert report.modules[0].outputs.value < 3 * report.modules[0].outputs.null
    assert not warned(lt.diff(one, adapter({"fc": trained(other_start, 3)})), "initialisation")
    up, down = trained(start, 2)
    later = adapter({"fc": (up + 0.005 * normal(7, 40, 4), down + 0.05 * normal(8, 4, 30))})
    assert not warned(lt.diff(one, later), "initialisation")  # two checkpoints of one run


@pytest.mark.parametrize(("kind", "name"), [(ml_dtypes.bfloat16, "BF16"), ("f2", "F16")])
def test_a_distance_that_rounding_explains_is_explained(kind, name):
    pair = factors(0, 60, 50, 4)
    wide = adapter({"fc": pair}, kind="f4")
    report = lt.diff(wide, adapter({"fc": pair}, kind=kind))
    assert not report.identical
    assert warned(report, f"no more than rounding to {name}")
    assert not warned(lt.diff(wide, adapter({"fc": (1.01 * pair[0], pair[1])}, kind=kind)), "rounding")
    assert not warned(lt.diff(wide, wide), "rounding")
    narrow = adapter({"fc": pair}, kind=kind)
    assert not warned(lt.diff(wide, narrow, tolerance=0.1), "rounding")  # they are the same, then


def test_what_cancels_is_zero():
    up, down = factors(0)
    for kind in ("f4", "f8"):
        one = adapter({"fc": (up, down)}, kind=kind)
        both = [np.hstack([up, up / 3, -up, -up / 3]).astype(kind), np.vstack([down] * 4).astype(kind)]
        nothing = adapter({"fc": tuple(both)})
        zero = adapter({"fc": (0 * up, down)}, kind=kind)
        report = lt.diff(zero, nothing)
        assert (report.identical, report.norm_b, report.relative) == (True, 0.0, 0.0)
        report = lt.diff(nothing, one)
        assert (report.norm_a, report.relative) == (0.0, math.inf)
        assert lt.diff(one, nothing).relative == 1.0
        assert lt.diff(nothing, nothing).identical
    small = adapter({"fc": (np.hstack([up, -up * (1 - 1e-9)]), np.vstack([down, down]))})
    assert lt.diff(zero, small).norm_b == pytest.approx(1e-9 * np.linalg.norm(up @ down), rel=1e-5)


def test_no_module_in_common_is_a_difference_with_a_hint():
    report = lt.diff(adapter({"a": factors(0)}), adapter({"b": factors(1)}))
    assert not report.identical
    assert (report.only_in_a, report.only_in_b, report.modules) == (("a",), ("b",), ())
    assert warned(report, "--base")
    assert report.distance == pytest.approx(math.hypot(report.norm_a, report.norm_b))


def test_the_same_file_twice_is_identical_and_named(tmp_path):
    path = write_small_adapter(tmp_path / "a")
    report = lt.diff(path, path)
    assert (report.identical, report.distance, report.relative) == (True, 0, 0)
    assert report.cosine == pytest.approx(1)
    assert warned(report, "A and B are the same")
    assert not warned(lt.diff(path, write_small_adapter(tmp_path / "b")), "are the same")


# --- bad input -------------------------------------------------------------------------------------------------


def test_zero_deltas():
    up, down = factors(0)
    zero, full = adapter({"fc": (0 * up, down)}), adapter({"fc": (up, down)})
    both = lt.diff(zero, zero)
    assert (both.identical, both.relative, both.cosine) == (True, 0, None)
    assert (both.modules[0].overlap, both.modules[0].cosine) == (None, None)
    report = lt.diff(zero, full)
    assert (report.identical, report.relative) == (False, math.inf)
    assert report.to_dict()["relative"] is None
    assert report.to_dict()["modules"][0]["relative"] is None
    assert lt.diff(full, zero).relative == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("only_one_has_it", [False, True])
def test_values_that_are_not_finite_are_named(bad, only_one_has_it):
    up, down = factors(0)
    down[1, 2] = bad
    broken = adapter({"layer.fc": (up, down)})
    other = adapter({"x": factors(1)} if only_one_has_it else {"layer.fc": factors(1)})
    for pair in ((broken, other), (other, broken)):
        with pytest.raises(InputError, match=r"layer\.fc.*lora_A\.weight holds values that are not finite"):
            lt.diff(*pair)


def test_a_head_that_is_not_finite_is_named():
    made = [
        adapter(
            {"fc": factors(0)}, tensors={"score.weight": np.full((2, 3), value)}, modules_to_save=["score"]
        )
        for value in (1.0, math.nan)
    ]
    with pytest.raises(InputError, match=r"score\.weight holds values that are not finite"):
        lt.diff(*made)


def test_an_empty_adapter(tmp_path):
    empty = write_adapter(tmp_path / "empty", {}, r=2, lora_alpha=2)
    full = write_small_adapter(tmp_path / "full")
    report = lt.diff(empty, full)
    assert (report.identical, report.relative, len(report.only_in_b)) == (False, math.inf, 4)
    assert lt.diff(full, empty).relative == 1
    both = lt.diff(empty, empty)
    assert both.identical
    assert warned(both, "neither adapter holds anything")


def test_other_shapes_under_one_name_are_refused():
    with pytest.raises(ShapeMismatch, match=r"fc: delta \[12, 7\]") as caught:
        lt.diff(adapter({"fc": factors(0)}), adapter({"fc": factors(0, into=7)}))
    assert "same base model" in (caught.value.hint or "")


def test_what_is_no_lora_and_what_is_not_there(tmp_path):
    fits = write_small_adapter(tmp_path / "a")
    with pytest.raises(Unsupported):
        lt.diff(fits, write_base(tmp_path / "base"))
    with pytest.raises(FileNotFoundError):
        lt.diff(fits, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="tolerance"):
        lt.diff(fits, fits, tolerance=-1)


def test_names_that_could_be_two_modules_are_refused():
    one = adapter({"model.fc": factors(0), "fc": factors(1)})
    with pytest.raises(Mismatch, match="could be"):
        lt.diff(one, adapter({"module.fc": factors(0)}))


def test_a_base_matches_other_spellings(tmp_path):
    base = write_base(tmp_path / "base")
    one = make_adapter(tmp_path / "a", SHAPES)
    other = make_adapter(tmp_path / "b", {f"wrapped.{name}": shape for name, shape in SHAPES.items()})
    assert not lt.diff(one, other).modules
    report = lt.diff(one, other, base=base)
    assert report.identical
    assert [module.name for module in report.modules] == list(SHAPES)


def test_modules_outside_the_base_are_compared_by_name_and_said(tmp_path):
    paths = [
        make_adapter(tmp_path / name, {**SHAPES, "odd": (3, 2)}, seed=seed) for seed, name in enumerate("ab")
    ]
    report = lt.diff(*paths, base=write_base(tmp_path / "base"))
    assert len(report.modules) == len(SHAPES) + 1
    assert sum("not in the base" in warning for warning in report.warnings) == 2


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    path = write_small_adapter(tmp_path / "a")
    monkeypatch.setattr("loratools.arrays._available", lambda device: False)
    with pytest.raises(Unsupported, match="'cuda' is not there"):
        lt.diff(path, path, device="cuda")
    assert invoke(path, path, "--device", "cuda").exit_code == 3


def test_memory_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    one, other = write_small_adapter(tmp_path / "a"), write_small_adapter(tmp_path / "b", seed=1)
    monkeypatch.setattr("loratools.verbs.diff.gather", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(OverBudget):
        lt.diff(one, other, max_memory=100)


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_every_executor_says_the_same(tmp_path, executor):
    one, other = write_small_adapter(tmp_path / "a"), write_small_adapter(tmp_path / "b", seed=1)
    seen: list[str] = []
    inline = lt.diff(one, other, executor="inline", on_step=lambda item: seen.append(item.name))
    found = lt.diff(one, other, executor=executor, jobs=2)
    assert replace(found, seconds=0) == replace(inline, seconds=0)
    assert seen == list(SHAPES)


# --- the command -----------------------------------------------------------------------------------------------


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


@pytest.fixture
def pair(tmp_path):
    return write_small_adapter(tmp_path / "one", seed=1), write_small_adapter(
        tmp_path / "two", seed=2, rank=2
    )


def test_json_has_the_fields_of_the_contract(pair):
    result = invoke(*pair, "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    said = json.loads(result.stdout)
    assert said["schema"] == "loratools.diff/1"
    assert {
        "identical",
        "distance",
        "relative",
        "cosine",
        "only_in_a",
        "only_in_b",
        "modules",
        "config",
    } <= said.keys()
    for module in said["modules"]:
        assert {
            "name", "norm_a", "norm_b", "distance", "relative", "cosine", "rank_a", "rank_b", "overlap", "overlap_null",
        } <= module.keys()  # fmt: skip
        assert (module["rank_a"], module["rank_b"]) == (4, 2)
    assert len(said["modules"]) == len(SHAPES)
    assert {"field": "r", "a": 4, "b": 2} in said["config"]


def test_exit_codes_follow_the_tolerance(pair):
    assert invoke(pair[0], pair[0]).exit_code == 0
    assert invoke(*pair).exit_code == 1
    assert invoke(*pair, "--tolerance", 10).exit_code == 0
    assert invoke(*pair, "--tolerance", -1).exit_code == 2
    assert invoke(*pair, "--tolerance", "nan").exit_code == 2
    assert invoke(pair[0]).exit_code == 2
    assert invoke(pair[0], "nowhere").exit_code == 3


def test_an_architecture_that_is_not_known_is_refused_with_a_hint(pair):
    result = invoke(*pair, "--arch", "llama")
    assert result.exit_code == 2
    assert "no architecture 'llama' is known" in result.stderr
    assert "Hint: known: " in result.stderr


def test_the_verdict_stands_first(pair):
    lines = invoke(*pair).stdout.splitlines()
    assert lines[0].startswith("They differ by ")
    assert lines[0].endswith(" % of A")
    assert any("by chance" in line and "overlap" in line for line in lines)
    assert sum("q_proj" in line for line in lines) >= len(SHAPES)
    assert invoke(pair[0], pair[0]).stdout.startswith("The same update\n")
    assert invoke(*pair, "--quiet").stdout.count("\n") == 1


def test_a_distance_of_many_times_is_not_a_share(tmp_path):
    shapes = {"x.fc": (6, 5)}
    one = make_adapter(tmp_path / "a", shapes, alpha=4)
    for alpha, told in ((52, "12 times A"), (4e12, "1e+12 times A"), (24, "500 % of A")):
        other = make_adapter(tmp_path / f"{alpha:g}", shapes, alpha=alpha)
        assert invoke(one, other).stdout.startswith(f"They differ by {told}\n")


def test_the_worst_modules_stand_first_and_all_on_request(tmp_path):
    shapes = {f"layers.{number}.fc": (6, 5) for number in range(25)}
    one = make_adapter(tmp_path / "a", shapes, alpha=4)
    patterns = {f"^layers.{number}.fc": 4 + number for number in range(25)}
    other = make_adapter(tmp_path / "b", shapes, alpha=4, alpha_pattern=patterns)
    rows = [line.split()[0] for line in invoke(one, other).stdout.splitlines() if line.startswith("layers.")]
    assert rows == [f"layers.{number}.fc" for number in range(24, 14, -1)]
    text = invoke(one, other, "--modules").stdout
    assert sum(line.startswith("layers.") for line in text.splitlines()) == 25


def test_heads_and_missing_modules_are_shown(tmp_path):
    shapes = dict(list(SHAPES.items())[:2])
    one = make_adapter(tmp_path / "a", SHAPES)
    result = invoke(one, make_adapter(tmp_path / "b", shapes))
    assert result.exit_code == 1
    assert "only in A" in result.stdout
    assert "layers.3.q_proj" in result.stdout
    heads = [
        write_adapter(tmp_path / name, {"base_model.model.score.weight": np.full((2, 2), value, "f4")}, r=2,
                      lora_alpha=2, modules_to_save=["score"])
        for name, value in (("c", 1), ("d", 2))
    ]  # fmt: skip
    result = invoke(*heads)
    assert result.exit_code == 1
    assert "other tensors differ" in result.stdout
    assert "score.weight" in result.stdout
    assert "100 %" in result.stdout


def test_what_can_be_said_of_adapters_that_have_little_in_common(tmp_path):
    one = make_adapter(tmp_path / "a", {"x.fc": (6, 5)})
    nothing = invoke(one, make_adapter(tmp_path / "b", {"y.fc": (6, 5)}))
    assert nothing.stdout.startswith("Nothing in common to compare\n")
    assert "Warning: no module is in both adapters" in nothing.stderr
    zeros = {f"base_model.model.x.fc.lora_{letter}.weight": np.zeros(shape, "f4")
             for letter, shape in (("A", (4, 5)), ("B", (6, 4)))}  # fmt: skip
    zero = write_adapter(tmp_path / "zero", zeros, r=4, lora_alpha=6)
    assert invoke(zero, one).stdout.startswith("A changes no weight, B does\n")
    assert "all (A is zero)" in invoke(zero, one).stdout
    assert json.loads(invoke(zero, one, "--json").stdout)["relative"] is None
    assert "100 %" in invoke(one, zero).stdout
    heads = {**zeros, "base_model.model.score.weight": np.ones((2, 2), "f4")}
    with_head = write_adapter(tmp_path / "d", heads, r=4, lora_alpha=6, modules_to_save=["score"])
    result = invoke(zero, with_head)
    assert result.stdout.startswith(
        "The same update where both have a module, but not the same tensors beside them\n"
    )
    two = {**zeros, **{key.replace("x.fc", "y.fc"): value for key, value in zeros.items()}}
    more = invoke(zero, write_adapter(tmp_path / "more", two, r=4, lora_alpha=6))
    assert more.stdout.startswith("The same update where both have a module, but not the same modules\n")
    assert "only in B  1: score.weight" in result.stdout
    heads["base_model.model.score.weight"] = np.ones((3, 2), "f4")
    other = write_adapter(tmp_path / "e", heads, r=4, lora_alpha=6, modules_to_save=["score"])
    assert "[2, 2] in A, [3, 2] in B" in invoke(with_head, other).stdout


def test_torch_is_not_loaded(pair):
    program = (
        "import sys, loratools.cli.app as cli\n"
        f"code = cli.app(['diff', {str(pair[0])!r}, {str(pair[1])!r}, '--json'], standalone_mode=False)\n"
        "assert code == 1, code\n"
        "assert 'numpy' in sys.modules and 'torch' not in sys.modules\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


# --- adapters of other people ------------------------------------------------------------------------------------

CORPUS = Path(os.environ.get("LORATOOLS_CORPUS", "")) / "adapters"
RUNS = {
    "monteclora": (
        "huggingface__peft/examples/monteclora_finetuning/monteclora-roberta-mrpc/checkpoint-230",
        "huggingface__peft/examples/monteclora_finetuning/monteclora-roberta-mrpc/checkpoint-460",
    ),
    "convnext": (
        "tommyroar__is-the-mountain-out/checkpoints_v1_binary",
        "tommyroar__is-the-mountain-out/train/checkpoints",
    ),
}


@pytest.mark.skipif(
    not os.environ.get("LORATOOLS_CORPUS"), reason="LORATOOLS_CORPUS does not name a folder of real adapters"
)
@pytest.mark.parametrize("run", RUNS)
def test_real_adapters_of_one_base_are_their_dense_twins(run):
    paths = [CORPUS / path for path in RUNS[run]]
    loaded = [lt.load(path) for path in paths]
    report = lt.diff(*paths)
    assert report.only_in_a == report.only_in_b == ()
    assert len(report.modules) == len(loaded[0].modules) > 0
    totals = np.zeros(2)
    for module in report.modules:
        dense = []
        for one in loaded:
            found = one.modules[module.name]
            up, down = (found.array(role, True) for role in ("up", "down"))
            dense.append(found.scaling * up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1))
        apart = np.linalg.norm(dense[0] - dense[1])
        totals += apart**2, np.linalg.norm(dense[0]) ** 2
        assert module.distance == pytest.approx(apart, rel=1e-6)
        cosine = (dense[0] * dense[1]).sum() / np.linalg.norm(dense[0]) / np.linalg.norm(dense[1])
        assert module.cosine == pytest.approx(cosine, abs=1e-6)
    assert report.relative == pytest.approx(math.sqrt(totals[0] / totals[1]), rel=1e-6)
    # Two checkpoints of one run lie close together; two runs do not, and share no more than chance has them share.
    related = [module.overlap / module.overlap_null for module in report.modules]
    assert (min(related) > 10) if run == "monteclora" else (np.mean(related) < 2)
    assert lt.diff(paths[0], paths[0]).identical
