"""What a merge refuses, before it reads, before it writes; and what it does with awkward but legal inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.errors import (
    BadConfig,
    CorruptFile,
    Incomplete,
    InputError,
    LoratoolsError,
    Mismatch,
    NonFinite,
    NotFound,
    OutputExists,
    OverBudget,
    ShapeMismatch,
    UnknownFormat,
    UnmatchedModules,
    Unsupported,
)
from loratools.models import BaseModel, open_base
from loratools.tensors.safetensors import SafetensorsFile
from loratools.verbs import merge as merging
from tests.helpers import NoReads, make_adapter, write_adapter
from tests.small import INTO, OUT, SHAPES, base_tensors, contents, write_base, write_small_adapter


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path):
    return write_small_adapter(tmp_path / "lora")


@pytest.fixture
def no_reads(monkeypatch):
    """Files whose headers may be read and whose values may not."""

    def refuse(source, name, *args, **kwargs):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsFile, "read", refuse)
    monkeypatch.setattr(SafetensorsFile, "read_bytes", refuse)
    monkeypatch.setattr("loratools.sinks.copy_range", refuse)


def fails(kind, complaint, tmp_path, *arguments, **options):
    """The merge raises, says so, and leaves the disk as it was; returns the error."""
    before = contents(tmp_path)
    with pytest.raises(kind, match=complaint) as caught:
        lt.merge(*arguments, tmp_path / "out", **options)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out.part").exists()
    assert str(caught.value).isprintable()
    return caught.value


# --- planned from headers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_plan_reads_no_values_and_writes_nothing(tmp_path, adapter, no_reads, shards):
    base = write_base(tmp_path / "model", shards=shards)
    before = contents(tmp_path)
    planned = lt.plan_merge(base, adapter, tmp_path / "out")
    numbers = planned.to_dict()
    assert numbers["tensors"]["changed"] == len(SHAPES)
    assert numbers["bytes_written"] == sum(file.size for file in planned.plan.files)
    assert contents(tmp_path) == before


def test_a_plan_needs_no_file_at_all(base, adapter, monkeypatch):
    opened = open_base(base)
    model = BaseModel(None, "memory", NoReads(opened.source), opened.files)
    monkeypatch.setattr(merging, "open_base", lambda given: model)
    planned = lt.plan_merge(base_tensors(), lt.load(adapter))
    assert len(planned.merged.outputs) == len(opened.source.specs)
    with pytest.raises(AssertionError, match="was read"):  # the source would have told
        planned.merged.outputs["embed.weight"].base.load()


def test_over_budget_before_anything_is_read(tmp_path, base, adapter, no_reads):
    error = fails(OverBudget, r"this needs [\d.]+ [kM]B of memory, 1 MB are allowed", tmp_path, base, adapter,
                  max_memory=1_000_000)  # fmt: skip
    assert error.needed > error.allowed == 1_000_000
    assert "the largest step is" in error.hint
    assert isinstance(error, MemoryError)


def test_over_budget_in_memory(base, adapter, no_reads):
    with pytest.raises(OverBudget, match="1 MB are allowed"):
        lt.merge(base, adapter, max_memory=1_000_000)


def test_the_planned_peak_is_enough_of_a_budget(tmp_path, base, adapter):
    peak = lt.plan_merge(base, adapter, tmp_path / "out").plan.peak_bytes(2)
    lt.merge(base, adapter, tmp_path / "out", max_memory=peak, jobs=2)
    with pytest.raises(OverBudget):
        lt.merge(base, adapter, tmp_path / "other", max_memory=peak - 1, jobs=2)


def test_no_command_line_no_exit_codes_in_the_library():
    """Every error a user can cause has the one root that the command line answers."""
    for kind in (InputError, Mismatch, Unsupported, NonFinite, OverBudget, Incomplete, OutputExists):
        assert issubclass(kind, LoratoolsError)
    for kind in (CorruptFile, UnknownFormat, BadConfig, NotFound):
        assert issubclass(kind, InputError)


# --- adapters that do not fit -----------------------------------------------------------------------------


def test_nothing_in_the_adapter_fits(tmp_path, base):
    stranger = make_adapter(tmp_path / "stranger", {"blocks.0.query": (OUT, INTO)})
    error = fails(LoratoolsError, r"stranger.*blocks\.0\.query", tmp_path, base, stranger)
    assert isinstance(error, Mismatch)
    fails(Mismatch, "stranger", tmp_path, base, stranger, allow_unmatched=["*"])


def test_a_key_that_nothing_consumes(tmp_path, base):
    shapes = {**SHAPES, "layers.9.q_proj": (OUT, INTO)}
    adapter = make_adapter(tmp_path / "more", shapes)
    error = fails(
        UnmatchedModules, r"nothing in the base answers to .*layers\.9\.q_proj", tmp_path, base, adapter
    )
    assert all("layers.9" in name for name in error.names)
    report = lt.merge(base, adapter, tmp_path / "out", allow_unmatched=["*layers.9.*"])
    assert report.modules["unmatched"]


@pytest.mark.parametrize("shape", [(OUT, INTO + 1), (OUT + 1, INTO), (INTO, OUT + 1)])
def test_a_shape_that_does_not_fit(tmp_path, base, shape):
    adapter = make_adapter(tmp_path / "odd", {**SHAPES, "layers.1.q_proj": shape})
    error = fails(ShapeMismatch, r"layers\.1\.q_proj", tmp_path, base, adapter)
    assert f"{list(shape)} does not fit weight [{OUT}, {INTO}]" in str(error)


def test_factors_of_different_ranks(tmp_path, base, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.layers.1.q_proj.lora_A.weight"
    weights[key] = np.ones((3, INTO), np.float32)
    save_file(weights, adapter / "adapter_model.safetensors")
    fails(LoratoolsError, r"layers\.1\.q_proj", tmp_path, base, adapter)


def test_half_a_module(tmp_path, base, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    del weights["base_model.model.layers.1.q_proj.lora_B.weight"]
    save_file(weights, adapter / "adapter_model.safetensors")
    fails(LoratoolsError, r"layers\.1\.q_proj", tmp_path, base, adapter)


def test_a_rank_that_would_be_a_bomb(tmp_path, base):
    """A delta is never formed before its factors are known to fit."""
    wide = write_adapter(
        tmp_path / "bomb",
        {
            "base_model.model.layers.0.q_proj.lora_A.weight": np.zeros((1, 1_000_000), np.float32),
            "base_model.model.layers.0.q_proj.lora_B.weight": np.zeros((1_000_000, 1), np.float32),
        },
        r=1,
        lora_alpha=1,
    )
    error = fails(ShapeMismatch, r"\[1000000, 1000000\] does not fit", tmp_path, base, wide)
    assert error.weight == (OUT, INTO)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "[" * 100_000, "\x00", "version https://git-lfs.github.com/spec/v1\n"],
    ids=["empty", "cut", "list", "null", "text", "nested", "nul", "pointer"],
)
def test_an_adapter_configuration_that_is_none(tmp_path, base, adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    error = fails(InputError, "adapter_config.json", tmp_path, base, adapter)
    assert isinstance(error, CorruptFile)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000])
def test_a_base_configuration_that_is_none(tmp_path, base, adapter, text):
    (base / "config.json").write_text(text)
    fails(CorruptFile, r"config\.json: is not", tmp_path, base, adapter)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": "LlamaForCausalLM"}, {"architectures": []}, {"architectures": [3]}, {"model_type": []},
        {"text_config": []}, {"vocab_size": "many"}, {"tie_word_embeddings": "yes"}, {"quantization_config": []},
    ],
)  # fmt: skip
def test_a_base_configuration_of_odd_types_does_no_harm(tmp_path, base, adapter, config):
    (base / "config.json").write_text(json.dumps(config))
    lt.merge(base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_missing_paths(tmp_path, base, adapter):
    fails(NotFound, "ghost", tmp_path, tmp_path / "ghost", adapter)
    fails(NotFound, "ghost", tmp_path, base, tmp_path / "ghost")
    (tmp_path / "empty").mkdir()
    fails(UnknownFormat, "holds no safetensors weights", tmp_path, tmp_path / "empty", adapter)
    fails(InputError, "empty", tmp_path, base, tmp_path / "empty")


def test_arguments_in_the_wrong_order(tmp_path, base, adapter):
    fails(LoratoolsError, "lora|base", tmp_path, adapter, base)


def test_weights_of_another_number(tmp_path, base, adapter):
    fails(Unsupported, "2 weights for 1 adapter", tmp_path, base, adapter, weights=[1, 2])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(tmp_path, base, adapter, weight):
    fails(LoratoolsError, "nan|inf|NaN|finite", tmp_path, base, adapter, weights=[weight])


# --- values that are no numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_with_a_value_that_is_none(tmp_path, base, adapter, value):
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.layers.3.q_proj.lora_B.weight"][5, 0] = value
    save_file(weights, adapter / "adapter_model.safetensors")
    error = fails(NonFinite, r"layers\.3\.q_proj\.weight\[5, \d\] became", tmp_path, base, adapter)
    assert "validate" in error.hint


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_what_was_not_finite_before_may_stay(tmp_path, adapter, kind):
    base = write_base(tmp_path / "model", kind=kind)
    tensors = load_file(base / "model.safetensors")
    tensors["layers.0.q_proj.weight"][0, :3] = [np.nan, np.inf, -np.inf]
    save_file(tensors, base / "model.safetensors")
    lt.merge(base, adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["layers.0.q_proj.weight"]
    np.testing.assert_array_equal(merged[0, :3], [np.nan, np.inf, -np.inf])
    assert np.isfinite(merged[0, 3:]).all()


def test_overflow_through_a_narrower_type(tmp_path, base, adapter):
    tensors = load_file(base / "model.safetensors")
    tensors["layers.1.norm.weight"][2] = 1e6  # not touched by the adapter, but cast
    save_file(tensors, base / "model.safetensors")
    fails(
        NonFinite,
        r"layers\.1\.norm\.weight\[2, 0\]: 1e\+06 does not fit F16",
        tmp_path,
        base,
        adapter,
        dtype="f16",
    )
    lt.merge(base, adapter, tmp_path / "out", dtype="bf16")


def test_large_values_in_float64(tmp_path, adapter):
    base = write_base(tmp_path / "model", kind=np.float64)
    tensors = load_file(base / "model.safetensors")
    tensors["layers.0.q_proj.weight"][0, 0] = 1e300
    save_file(tensors, base / "model.safetensors")
    lt.merge(base, adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["layers.0.q_proj.weight"]
    assert merged[0, 0] == 1e300
    assert merged.dtype == np.float64


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.bool_])
def test_a_weight_that_is_no_float(tmp_path, base, adapter, kind):
    tensors = load_file(base / "model.safetensors")
    tensors["layers.1.q_proj.weight"] = np.zeros((OUT, INTO), kind)
    save_file(tensors, base / "model.safetensors")
    fails(
        Unsupported, r"layers\.1\.q_proj\.weight: \w+ values cannot be computed with", tmp_path, base, adapter
    )


# --- awkward but legal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_empty_scalar_and_odd_tensors_come_through(tmp_path, adapter, shards):
    base = write_base(tmp_path / "model", shards=shards)
    extra = {
        "scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float32), "bytes": np.ones(3, np.uint8),
        "gap": np.zeros((2, 0, 3), np.float16), "after": np.ones(5, np.float64),
    }  # fmt: skip
    name = next(path.name for path in sorted(base.glob("*.safetensors")))
    tensors = load_file(base / name)
    save_file({**tensors, **extra}, base / name)
    if shards > 1:
        index = base / "model.safetensors.index.json"
        listed = json.loads(index.read_text())
        listed["weight_map"] |= dict.fromkeys(extra, name)
        index.write_text(json.dumps(listed))
    report = lt.merge(base, adapter, tmp_path / "out", verify=True)
    assert report.verified
    merged = load_file(tmp_path / "out" / name)
    for key, value in extra.items():
        np.testing.assert_array_equal(merged[key], value)
        assert merged[key].dtype == value.dtype
    in_memory = lt.merge(base, adapter).state_dict
    for key, value in extra.items():
        np.testing.assert_array_equal(in_memory[key], value)


def test_a_file_of_empty_tensors_only(tmp_path, adapter):
    base = write_base(tmp_path / "model", shards=2)
    index = base / "model.safetensors.index.json"
    save_file({"nothing": np.zeros(0, np.float32)}, base / "extra.safetensors")
    listed = json.loads(index.read_text())
    listed["weight_map"]["nothing"] = "extra.safetensors"
    index.write_text(json.dumps(listed))
    lt.merge(base, adapter, tmp_path / "out")
    assert load_file(tmp_path / "out" / "extra.safetensors")["nothing"].shape == (0,)


def test_an_adapter_saved_without_gathering_it(tmp_path):
    """DeepSpeed ZeRO-3 leaves empty factors behind."""
    base = tmp_path / "model"
    base.mkdir()
    save_file({"q.weight": np.zeros((0, INTO), np.float32), "v.weight": np.zeros((4, INTO), np.float32)},
              base / "model.safetensors")  # fmt: skip
    adapter = make_adapter(tmp_path / "lora", {"q": (0, INTO), "v": (4, INTO)})
    fails(Unsupported, r"q is broken: up is empty \[0, 4\]", tmp_path, base, adapter)


_MEASURED = """
import sys
import loratools as lt
from loratools.running import peak_memory
base, adapter, out = sys.argv[1:]
planned = lt.plan_merge(base, adapter, out)
lt.merge(base, adapter, out, jobs=2)
print(peak_memory(), planned.plan.peak_bytes(2))
"""


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.skipif(sys.platform == "win32", reason="the system does not say how much memory was used")
def test_measured_peak_is_within_the_planned_one(tmp_path, kind):
    """A base of 200 MB, most of it touched, in a process of its own."""
    width, layers = 1024, 200 * 10**6 // (1024 * 1024 * np.dtype(kind).itemsize)
    rng = np.random.default_rng(0)
    base = tmp_path / "big"
    base.mkdir()
    block = rng.standard_normal((width, width), np.float32).astype(kind)
    save_file({f"layers.{i}.q_proj.weight": block for i in range(layers)}, base / "model.safetensors")
    assert (base / "model.safetensors").stat().st_size > 190_000_000
    adapter = make_adapter(
        tmp_path / "lora", {f"layers.{i}.q_proj": (width, width) for i in range(layers)}, rank=16
    )
    arguments = [sys.executable, "-c", _MEASURED, str(base), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    measured, planned = map(int, done.stdout.split())
    assert measured <= planned


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_out_of_the_base_is_not_carried_along(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("private")
    base = write_base(tmp_path / "base")
    (base / "README.md").symlink_to(secret)
    (base / "notes.md").symlink_to("tokenizer.json")  # within the folder: fine
    report = lt.merge(base, write_small_adapter(tmp_path / "a"), tmp_path / "out")
    assert "README.md" in report.left_out
    assert not (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "notes.md").read_text() == "{}"
