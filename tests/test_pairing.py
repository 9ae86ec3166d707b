"""Which modules of several adapters are the same one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import loratools as lt
from loratools.errors import Mismatch, ShapeMismatch, UnmatchedModules
from loratools.models import open_base
from loratools.pairing import PREFIXES, pair, require_same_shapes, strip
from tests.helpers import NoReads, make_adapter, write_adapter

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from loratools.adapter import Adapter


def adapter(names: Iterable[str], *, out: int = 4, into: int = 3, rank: int = 1, **config: Any) -> Adapter:
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_A.weight"] = np.ones((rank, into), "f4")
        tensors[f"{name}.lora_B.weight"] = np.ones((out, rank), "f4")
    return lt.load(tensors, config={"peft_type": "LORA", "r": rank, "lora_alpha": 1, **config})


def own_names(adapters: list[Adapter], base: Any = None) -> dict[str, tuple[str | None, ...]]:
    pairing = pair(adapters, None if base is None else open_base(base))
    return {name: tuple(s and s[0] for s in slots) for name, slots in pairing.modules.items()}


@pytest.mark.parametrize("prefix", [*PREFIXES, "base_model.model.model.", "module.model."])
def test_known_prefixes_do_not_count(prefix):
    plain, prefixed = adapter(["layers.0.q_proj"]), adapter([f"{prefix}layers.0.q_proj"])
    for pairing in (pair([plain, prefixed]), pair([prefixed, plain])):
        assert len(pairing.modules) == len(pairing.common) == 1


def test_nothing_else_is_guessed():
    found = own_names([adapter(["layers.0.q"]), adapter(["transformer.layers.0.q"])])
    assert found == {
        "layers.0.q": ("layers.0.q", None),
        "transformer.layers.0.q": (None, "transformer.layers.0.q"),
    }


def test_different_target_sets_take_the_spelling_of_the_first():
    first = adapter(["model.layers.0.q", "model.layers.0.k", "head"])
    second = adapter(["layers.0.q", "layers.0.v"])
    found = own_names([first, second])
    assert found == {
        "model.layers.0.q": ("model.layers.0.q", "layers.0.q"),
        "model.layers.0.k": ("model.layers.0.k", None),
        "head": ("head", None),
        "model.layers.0.v": (None, "layers.0.v"),
    }
    pairing = pair([first, second])
    assert pairing.common == ("model.layers.0.q",)
    assert pairing.only_in(0) == ("model.layers.0.k", "head")
    assert pairing.only_in(1) == ("model.layers.0.v",)


def test_names_that_only_a_prefix_tells_apart_match_exactly_or_not_at_all():
    both = adapter(["model.fc", "fc"])
    assert own_names([both, adapter(["model.fc"])]) == {
        "model.fc": ("model.fc", "model.fc"),
        "fc": ("fc", None),
    }
    assert own_names([adapter(["fc"]), both]) == {"fc": ("fc", "fc"), "model.fc": (None, "model.fc")}
    assert len(pair([both, both]).common) == 2
    for order in (1, -1):
        with pytest.raises(Mismatch, match=r"module\.fc could be model\.fc or fc") as caught:
            pair([both, adapter(["module.fc"])][::order])
        assert "--base" in (caught.value.hint or "")


def test_nothing_in_common_is_seen_and_no_error():
    pairing = pair([adapter(["a"]), adapter(["b"]), adapter(["c"])])
    assert pairing.common == ()
    assert [pairing.only_in(index) for index in range(3)] == [("a",), ("b",), ("c",)]


def test_what_two_of_three_have_is_in_common_to_none_and_only_in_none():
    pairing = pair([adapter(["a", "b"]), adapter(["a"]), adapter(["b"])])
    assert pairing.common == ()
    assert pairing.only_in(0) == ()


def test_no_values_are_read():
    one = adapter(["model.fc"])
    module = one.modules["model.fc"]
    guarded = {role: replace(ref, source=NoReads(ref.source)) for role, ref in module.tensors.items()}
    one = replace(one, modules={"model.fc": replace(module, tensors=guarded)})
    base = open_base({"model.fc.weight": np.zeros((4, 3), "f4")})
    assert pair([one, one]).common == pair([one, one], base).common == ("model.fc",)


def test_a_rank_that_is_not_the_configurations_is_refused():
    wrong = lt.load(
        {"fc.lora_A.weight": np.ones((2, 3), "f4"), "fc.lora_B.weight": np.ones((4, 2), "f4")},
        config={"peft_type": "LORA", "r": 4, "lora_alpha": 4},
    )
    with pytest.raises(Mismatch, match="fc has rank 2 in the file and 4 in the configuration"):
        pair([adapter(["fc"]), wrong])


def test_shapes_are_compared_on_request():
    pairing = pair([adapter(["fc"]), adapter(["fc"], into=5)])
    with pytest.raises(ShapeMismatch, match=r"fc: delta \[4, 5\] does not fit weight \[4, 3\]"):
        require_same_shapes(pairing)


names = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join)
prefixed = st.tuples(st.sampled_from(["", "model.", "module.", "base_model.model."]), names).map("".join)


@given(st.lists(st.sets(prefixed, min_size=1, max_size=5), min_size=1, max_size=3))
def test_every_module_has_one_slot_and_its_names_are_equal_but_for_prefixes(sets):
    adapters = [adapter(sorted(chosen)) for chosen in sets]
    try:
        pairing = pair(adapters)
    except Mismatch:  # only where prefixes alone tell an adapter's modules apart
        assert any(len({strip(name) for name in one.modules}) < len(one.modules) for one in adapters)
        return
    for index, one in enumerate(adapters):
        held = [slots[index][0] for slots in pairing.modules.values() if slots[index] is not None]
        assert sorted(held) == sorted(one.modules)
    for name, slots in pairing.modules.items():
        assert {strip(slot[0]) for slot in slots if slot is not None} == {strip(name)}


# --- tensors beside the modules ----------------------------------------------------------------------------


def with_extras(prefix: str, tensors: dict[str, Any], **config: Any) -> Adapter:
    factors = {
        "model.fc.lora_A.weight": np.ones((1, 3), "f4"),
        "model.fc.lora_B.weight": np.ones((4, 1), "f4"),
    }
    return lt.load(
        {f"{prefix}{name}": value for name, value in {**factors, **tensors}.items()},
        config={"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config},
    )


def test_extras_are_matched_by_what_they_stand_for():
    head = {"score.weight": np.ones((2, 3), "f4")}
    saved = {"score.modules_to_save.default.weight": np.ones((2, 3), "f4")}
    pairing = pair(
        [
            with_extras("base_model.model.", head, modules_to_save=["score"]),
            with_extras("", saved, modules_to_save=["score"]),
        ]
    )
    ((name, slots),) = pairing.extras.items()
    assert name == "score.weight"
    assert [slot and slot[0] for slot in slots] == [
        "base_model.model.score.weight",
        "score.modules_to_save.default.weight",
    ]


def test_token_rows_and_the_embedding_they_belong_to_are_two_things():
    rows = {"embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 3), "f4")}
    config = {"trainable_token_indices": {"embed_tokens": [1, 5]}}
    whole = {"model.embed_tokens.weight": np.ones((9, 3), "f4")}
    rowwise = with_extras("base_model.model.model.", rows, **config)
    pairing = pair([rowwise, with_extras("base_model.model.", whole)])
    assert [name for name, slots in pairing.extras.items() if None not in slots] == []
    assert len(pairing.extras) == 2
    again = pair(
        [rowwise, with_extras("", {"embed_tokens.trainable_tokens_delta": rows.popitem()[1]}, **config)]
    )
    assert [None in slots for slots in again.extras.values()] == [False]


# --- experts ------------------------------------------------------------------------------------------------


def packed(parameters: list[str], shapes: dict[str, tuple[int, int]], *, version: str = "0.21.2") -> Adapter:
    """As PEFT nests its wrappers: the parameter defined last is outermost."""
    owner, count, tensors = "model.layers.0.mlp.experts", 2, {}
    for depth, parameter in enumerate(reversed(parameters)):
        out, into = shapes[parameter]
        path = owner + ".base_layer" * depth
        tensors[f"{path}.lora_A.weight"] = np.ones((count, into), "f4")
        tensors[f"{path}.lora_B.weight"] = np.ones((out, count), "f4")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "peft_version": version,
              "target_parameters": [f"mlp.experts.{parameter}" for parameter in parameters]}  # fmt: skip
    return lt.load(tensors, config=config)


OBLONG = {"gate_up_proj": (8, 3), "down_proj": (3, 4)}


def test_an_experts_parameter_is_matched_by_its_name_however_deep_its_wrapper_lies():
    both, gate = packed(["gate_up_proj", "down_proj"], OBLONG), packed(["gate_up_proj"], OBLONG)
    owner = "model.layers.0.mlp.experts"
    assert own_names([both, gate]) == {
        f"{owner}.down_proj": (owner, None),
        f"{owner}.gate_up_proj": (f"{owner}.base_layer", owner),
    }


def test_square_experts_of_two_orientations_are_not_mixed_up():
    square = {"gate_up_proj": (4, 4)}
    old, new = packed(["gate_up_proj"], square, version="0.18.0"), packed(["gate_up_proj"], square)
    assert len(pair([old, old]).common) == 1
    with pytest.raises(Mismatch, match=r"gate_up_proj: square experts"):
        pair([old, new])
    base = open_base({"model.layers.0.mlp.experts.gate_up_proj": np.zeros((2, 4, 4), "f4")})
    assert len(pair([new, new], base).common) == 1
    with pytest.raises(Mismatch, match="both change"):
        pair([old, new], base)


def test_packed_and_separate_experts_are_refused_by_name():
    base = {
        f"model.layers.0.mlp.experts.{index}.{part}.weight": np.zeros((4, 3), "f4")
        for index in range(2)
        for part in ("gate_proj", "up_proj")
    }
    apart = adapter([name.removesuffix(".weight") for name in base])
    together = packed(["gate_up_proj"], OBLONG)
    assert len(pair([together, together], open_base(base)).common) == 1
    with pytest.raises(Mismatch, match=r"experts.* and .*experts\.0\.gate_proj both change"):
        pair([together, apart], open_base(base))


def test_halves_of_a_fused_tensor_are_two_modules():
    base = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((2, 8, 3), "f4")}
    paths = [f"model.layers.0.mlp.experts.{index}" for index in range(2)]
    gate, up = (adapter([f"{path}.{part}" for path in paths]) for part in ("gate_proj", "up_proj"))
    assert pair([gate, up], open_base(base)).common == ()
    assert len(pair([gate, gate], open_base(base)).common) == 2


# --- with a base --------------------------------------------------------------------------------------------

LLAMA = {
    f"model.layers.{layer}.self_attn.{name}.weight": np.zeros((4, 3), "f4")
    for layer in range(2)
    for name in ("q_proj", "k_proj")
}


def test_a_base_matches_what_names_alone_do_not():
    paths = [name.removesuffix(".weight") for name in LLAMA]
    one, other = adapter(paths), adapter([f"language.{path}" for path in paths])
    assert pair([one, other]).common == ()
    pairing = pair([one, other], open_base(LLAMA))
    assert pairing.common == tuple(paths)
    assert pair([other, one], open_base(LLAMA)).common == tuple(paths)  # in the base's spelling


def test_a_dialect_of_the_base_is_told_by_it():
    base = {"model.layers.0.block_sparse_moe.gate.weight": np.zeros((4, 3), "f4"),
            "model.layers.0.self_attn.q_proj.weight": np.zeros((4, 3), "f4")}  # fmt: skip
    old = adapter(["model.layers.0.block_sparse_moe.gate", "model.layers.0.self_attn.q_proj"])
    new = adapter(["model.layers.0.mlp.gate", "model.layers.0.self_attn.q_proj"])
    assert len(pair([old, new]).common) == 1
    assert len(pair([old, new], open_base(base)).common) == 2


def test_a_tied_embedding_and_its_head_are_two_modules(tmp_path: Path):
    save_file({"model.embed_tokens.weight": np.zeros((9, 3), "f4")}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
        )
    )
    head = adapter(["lm_head"], out=9)
    embedding = lt.load(
        {
            "model.embed_tokens.lora_embedding_A": np.ones((1, 9), "f4"),
            "model.embed_tokens.lora_embedding_B": np.ones((3, 1), "f4"),
        },
        config={"peft_type": "LORA", "r": 1, "lora_alpha": 1},
    )
    pairing = pair([head, embedding], open_base(tmp_path))
    assert pairing.common == ()
    assert set(pairing.modules) == {"lm_head", "model.embed_tokens"}
    assert pair([head, head], open_base(tmp_path)).common == ("lm_head",)


def test_modules_that_a_base_lacks_are_matched_by_name_and_said():
    paths = [name.removesuffix(".weight") for name in LLAMA]
    pairing = pair([adapter([*paths, "odd"]), adapter(["odd", *paths])], open_base(LLAMA))
    assert pairing.unplaced == (("odd",), ("odd",))
    assert set(pairing.common) == {*paths, "odd"}


def test_an_adapter_that_is_not_the_bases_is_refused(tmp_path: Path):
    fits = lt.load(make_adapter(tmp_path / "a", {name.removesuffix(".weight"): (4, 3) for name in LLAMA}))
    with pytest.raises(UnmatchedModules):
        pair([fits, adapter(["elsewhere.fc"])], open_base(LLAMA))
    with pytest.raises(ShapeMismatch):
        pair([fits, adapter([next(iter(LLAMA)).removesuffix(".weight")], into=7)], open_base(LLAMA))


def test_extras_follow_the_bases_spelling(tmp_path: Path):
    paths = [name.removesuffix(".weight") for name in LLAMA]
    base = {**LLAMA, "score.weight": np.zeros((2, 3), "f4")}

    def with_head(folder: str, prefix: str) -> Adapter:
        tensors = {f"base_model.model.{prefix}score.weight": np.ones((2, 3), "f4")}
        for path in paths:
            tensors[f"base_model.model.{prefix}{path}.lora_A.weight"] = np.ones((1, 3), "f4")
            tensors[f"base_model.model.{prefix}{path}.lora_B.weight"] = np.ones((4, 1), "f4")
        return lt.load(
            write_adapter(tmp_path / folder, tensors, r=1, lora_alpha=1, modules_to_save=["score"])
        )

    pairing = pair([with_head("a", ""), with_head("b", "wrapped.")], open_base(base))
    assert {name: None in slots for name, slots in pairing.extras.items()} == {"score.weight": False}
