"""PEFT's configuration: fields, and the patterns that give each module its rank and alpha, against PEFT itself."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import BadConfig, CorruptFile
from loratools.formats.patterns import MAX_PATTERN, Names, Patterns
from loratools.formats.peft_config import effective_scaling, first_match, parse_config, read_config

WORDS = st.sampled_from(
    ["model", "layers", "0", "1", "10", "q_proj", "proj", "v_proj", "mlp", "a-b", "experts"]
)
NAMES = st.lists(WORDS, min_size=1, max_size=5).map(".".join)
# What people write: a suffix, an anchored name, escaped or not, and real expressions.
PIECES = st.one_of(
    WORDS,
    NAMES,
    NAMES.map(re.escape),
    st.sampled_from(
        [
            ".*",
            r"\d+",
            "[qv]_proj",
            "(q|v)_proj",
            "(?:0|1)",
            r".*\.",
            "q_.",
            "laye.s",
            "(^mlp)",
            "x{2}",
            "p{e}",
        ]
    ),
)
PATTERNS = st.builds(
    lambda start, pieces, end: start + ".".join(pieces) + end,
    st.sampled_from(["", "", "^"]),
    st.lists(PIECES, min_size=1, max_size=3),
    st.sampled_from(["", "", "$"]),
)


@settings(max_examples=400, deadline=None)
@given(patterns=st.lists(PATTERNS, max_size=6, unique=True), name=NAMES)
def test_first_match_is_peft_s_get_pattern_key(patterns: list[str], name: str) -> None:
    from peft.utils.other import get_pattern_key

    table = {pattern: number for number, pattern in enumerate(patterns)}
    wanted = table.get(get_pattern_key(patterns, name), "default")
    if wanted == "default" and name in table:  # PEFT returns the name itself where nothing matches
        wanted = table[name]
    assert first_match(table, name, "default") == wanted


@settings(max_examples=200, deadline=None)
@given(
    ranks=st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4),
    alphas=st.dictionaries(PATTERNS, st.floats(0.5, 64), max_size=4),
    rank=st.integers(1, 64), alpha=st.floats(0.5, 64), rslora=st.booleans(), name=NAMES,
)  # fmt: skip
def test_scaling_is_that_of_a_peft_layer(
    ranks: dict[str, int], alphas: dict[str, float], rank: int, alpha: float, rslora: bool, name: str
) -> None:
    from peft.utils.other import get_pattern_key

    raw = {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    found = effective_scaling(parse_config({"peft_type": "LORA", **raw}), name)
    # tuners/lora/model.py: r and alpha are looked up independently; layer.py divides.
    r = ranks.get(get_pattern_key(list(ranks), name), rank)
    a = alphas.get(get_pattern_key(list(alphas), name), alpha)
    assert found == (r, a, a / math.sqrt(r) if rslora else a / r)


def test_scaling_of_a_real_peft_model_with_patterns() -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential()
    for name in ("q_proj", "k_proj", "v_proj"):
        model.add_module(name, torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)))
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["0", "1"], use_rslora=True,
        rank_pattern={"^q_proj.0": 2, "v_proj.*": 3}, alpha_pattern={"1": 5, "q_proj.1": 9},
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    raw = {k: v for k, v in config.to_dict().items() if not isinstance(v, set)} | {"peft_type": "LORA"}
    ours = parse_config(raw)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules() if hasattr(m, "lora_A")
    }
    layers = {n: m for n, m in layers.items() if hasattr(m, "scaling")}
    assert len(layers) == 6
    for name, layer in layers.items():
        rank, alpha, scaling = effective_scaling(ours, name)
        assert (rank, alpha) == (layer.r["default"], layer.lora_alpha["default"]), name
        assert scaling == pytest.approx(layer.scaling["default"], rel=1e-12)


@settings(max_examples=300, deadline=None)
@given(value=st.one_of(st.lists(NAMES, max_size=4), PATTERNS), name=NAMES)
def test_names_match_as_peft_targets_modules(value: Any, name: str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=value)
    assert Names(value).matches(name) == bool(check_target_module_exists(config, name))


# Patterns that an engine without bounds does not come back from, or that need gigabytes to compile; and what is said.
BOMBS = {
    "x*(?:a|a|aa)+y": "takes too long",
    "x*(?:a{0,99}){0,99}y": "takes too long",
    "(?:(?:(?:a{1000}){1000}){1000}){1000}": "repeats up to",
    "(?:a{0,5000}){0,5000}": "repeats up to",
    "(" * 400 + "a" + ")" * 400: "is no regular expression",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pattern_cannot_stall_or_fill_the_memory(bomb: str) -> None:
    names = [f"y.{i}." + "x" * 40 + "a" * 60 for i in range(200)]
    faults: list[BadConfig] = []
    patterns = Patterns({bomb: 4}, "rank_pattern", faults)
    assert {patterns.first(name, None) for name in names} == {None}
    (fault,) = faults
    assert BOMBS[bomb] in str(fault)
    assert str(fault).startswith("rank_pattern: ")
    with pytest.raises(BadConfig, match=BOMBS[bomb]):
        Patterns({bomb: 4}).first(names[0], None)


def test_many_slow_patterns_share_one_budget() -> None:
    slow = {"x*(?:a|a|aa){0," + str(i) + "}y": 4 for i in range(20, 60)}
    faults: list[BadConfig] = []
    patterns = Patterns(slow, "rank_pattern", faults)
    name = "y." + "x" * 40 + "a" * 60
    assert {patterns.first(name + str(i), None) for i in range(100)} == {None}
    assert 0 < len(faults) <= len(slow)
    assert all("takes too long" in str(fault) for fault in faults)


@pytest.mark.parametrize("pattern", ["(", "[a", "*x", "a{3}{4}{", "(?P<n>a)(?P<n>b)", r"\g", "(?<=a+)b"])
def test_what_is_no_expression_is_said(pattern: str) -> None:
    with pytest.raises(re.error):
        re.compile(rf"(.*\.)?({pattern})$")
    with pytest.raises(BadConfig, match="no regular expression"):
        first_match({pattern: 4}, "model.q_proj", 8)


def test_an_earlier_match_spares_a_broken_pattern() -> None:
    assert first_match({"q_proj": 4, "(": 8}, "model.q_proj", 1) == 4


GOOD = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("r", 0, "r is 0"), ("r", -1, "r is -1"), ("r", "8", "r is '8'"), ("r", 8.5, "r is 8.5"),
        ("r", True, "r is true"),
        ("r", 10**7, "r is 10000000"), ("lora_alpha", "16", "lora_alpha is '16'"),
        ("lora_alpha", math.nan, "lora_alpha is NaN"),
        ("lora_alpha", math.inf, "lora_alpha is Infinity"), ("lora_alpha", [1], "lora_alpha is"),
        ("use_rslora", "yes", "use_rslora"), ("use_dora", 1, "use_dora"), ("bias", 3, "bias"),
        ("rank_pattern", ["q_proj"], "rank_pattern"), ("rank_pattern", {"q_proj": 0}, "rank_pattern"),
        ("rank_pattern", {"q_proj": 2.5}, "rank_pattern"), ("alpha_pattern", {"q_proj": "8"}, "alpha_pattern"),
        ("alpha_pattern", {"x" * (MAX_PATTERN + 1): 8}, "1,001 characters"),
        ("modules_to_save", [1], "modules_to_save"), ("target_modules", {"a": 1}, "target_modules"),
        ("target_modules", "x" * 200_000, "shorter"), ("target_parameters", 3, "target_parameters"),
        ("trainable_token_indices", {"embed": [-1]}, "token indices"),
        ("trainable_token_indices", "all", "token indices"),
        ("use_bdlora", {"nblocks": 0}, "use_bdlora"), ("use_bdlora", True, "use_bdlora"),
        ("base_model_name_or_path", 5, "base_model_name_or_path"), ("peft_type", 5, "peft_type"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_named(field: str, value: Any, said: str) -> None:
    with pytest.raises(BadConfig, match=re.escape(said)):
        parse_config({**GOOD, field: value}, "adapter_config.json")


def test_all_faults_are_collected_and_the_rest_is_read() -> None:
    faults: list[BadConfig] = []
    raw = {**GOOD, "r": 0, "bias": 3, "alpha_pattern": {"a": "x", "b": 4}, "modules_to_save": ["score"]}
    config = parse_config(raw, faults=faults)
    assert len(faults) == 3
    assert config.rank == 8
    assert config.alpha_pattern.table == {"b": 4}
    assert config.modules_to_save == ("score",)


def test_absent_fields_mean_what_peft_takes() -> None:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    config = parse_config({"peft_type": "LORA"})
    assert (config.rank, config.alpha) == (LoraConfig().r, LoraConfig().lora_alpha)
    assert len(config.warnings) == 2
    for kind, theirs in (("LOHA", LoHaConfig()), ("LOKR", LoKrConfig())):
        config = parse_config({"peft_type": kind})
        assert (config.rank, config.alpha) == (theirs.r, theirs.alpha)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "LFS pointer"), (b"[1]", "not a JSON object"),
        (b'{"r": 8', "not JSON"), (b"\xff\xfe", "not JSON"), (b"[" * 100_000, "not JSON"), (b"", "not JSON"),
        (b'"' + b"x" * 9_000_000 + b'"', "are allowed"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration(tmp_path: Any, text: bytes, problem: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(text)
    with pytest.raises(CorruptFile, match=problem):
        read_config(path)
