"""Devices: torch through the array namespace gives what numpy gives, and a device that is not there is named.

Torch's own processor stands in for a graphics card: no user can ask for it, but it takes the same path.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools import arrays
from loratools.deltas.base import Span
from loratools.deltas.likeness import compare
from loratools.deltas.lowrank import LowRank
from loratools.deltas.spectra import sketch
from loratools.deltas.streams import Mirrored, mirrored
from loratools.errors import Unsupported
from loratools.matrices import matrices
from loratools.planning import WeightStep
from tests.helpers import make_adapter
from tests.small import base_tensors, contents, write_base, write_small_adapter

STAND_IN = "torch-cpu"
EPSILON = {np.float32: np.finfo(np.float32).eps, np.float64: np.finfo(np.float64).eps}


@pytest.fixture
def stand_in(monkeypatch):
    """A device that torch computes on and every machine has."""
    monkeypatch.setitem(arrays._TORCH_DEVICES, STAND_IN, "cpu")
    return STAND_IN


def without(monkeypatch, *names):
    """As where these packages are not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


# --- which device is meant ----------------------------------------------------------------------------------


def test_the_processor_needs_nothing(monkeypatch):
    without(monkeypatch, "torch", "array_api_compat")
    assert arrays.check_device("cpu") == arrays.check_device("auto") == "cpu"
    assert arrays.namespace("cpu") is np


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("missing", ["torch", "array_api_compat"])
def test_a_device_without_its_package_is_refused_with_the_way_to_get_it(monkeypatch, device, missing):
    without(monkeypatch, missing)
    with pytest.raises(Unsupported, match=f"'{device}' needs {missing}") as caught:
        arrays.check_device(device)
    assert "loratools[torch]" in caught.value.hint


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_torch_does_not_see_is_refused(monkeypatch, device):
    monkeypatch.setattr(arrays, "_available", lambda name: False)
    with pytest.raises(Unsupported, match=f"'{device}' is not there") as caught:
        arrays.check_device(device)
    assert "--device cpu" in caught.value.hint
    assert "\n" not in str(caught.value)
    assert arrays.check_device("auto") == "cpu"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_what_is_there_is_what_torch_says(monkeypatch, device):
    import torch

    module = torch.cuda if device == "cuda" else torch.backends.mps
    for answer in (True, False):
        monkeypatch.setattr(module, "is_available", lambda answer=answer: answer)
        assert arrays._available(device) is answer


def test_auto_takes_cuda_where_it_is(monkeypatch):
    monkeypatch.setattr(arrays, "_available", lambda name: True)
    assert arrays.check_device("auto") == arrays.check_device("cuda") == "cuda"
    assert arrays.check_device("mps") == "mps"


@pytest.mark.parametrize("device", [STAND_IN, "tpu", "cuda:1", "CPU", ""])
def test_other_names_are_refused(device):
    with pytest.raises(Unsupported, match="is not in this build"):
        arrays.check_device(device)


def test_the_merge_refuses_before_it_opens_anything(monkeypatch, tmp_path):
    without(monkeypatch, "torch")
    places = [tmp_path / name for name in ("nowhere", "nothing", "out")]
    for call in (lt.merge, lt.plan_merge, lt.verify):
        with pytest.raises(Unsupported, match="needs torch"):
            call(*places, device="cuda")
    assert not list(tmp_path.iterdir())


# --- crossing over ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["plain", "transposed", "reversed", "constant", "empty"])
def test_values_go_and_come_back_unchanged(stand_in, kind, layout):
    values = np.random.default_rng(0).standard_normal((6, 4)).astype(kind)
    values = {"transposed": values.T, "reversed": values[::-1], "empty": values[:0]}.get(layout, values)
    values.flags.writeable = layout != "constant"
    there = arrays.to_device(values, stand_in)
    assert type(there).__module__ == "torch"
    np.testing.assert_array_equal(arrays.from_device(there), values)
    out = np.empty_like(values, order="C")
    assert arrays.from_device(there, out) is out
    np.testing.assert_array_equal(out, values)
    assert arrays.from_device(there).dtype == kind


def test_on_the_processor_nothing_is_copied():
    values = np.ones((2, 3))
    assert arrays.to_device(values, "cpu") is values
    assert arrays.from_device(values) is values
    assert arrays.from_device(values, values) is values
    out = np.zeros((2, 3))
    assert arrays.from_device(values, out) is out
    np.testing.assert_array_equal(out, values)


def test_a_namespace_is_that_of_its_arrays(stand_in):
    there = arrays.to_device(np.ones((2, 2)), stand_in)
    assert arrays.namespace_of(there) is arrays.namespace(stand_in)
    assert arrays.namespace_of(np.ones(2)) is arrays.namespace_of(np.float32(1)) is np
    assert not arrays.on_processor(there)
    assert arrays.has_double("cpu")
    assert arrays.has_double("cuda")
    assert not arrays.has_double("mps")


# --- the arithmetic -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    out=st.integers(1, 40),
    into=st.integers(1, 40),
    rank=st.integers(1, 12),
    scaling=st.sampled_from([1.0, 0.5, -1.7]),
    kind=st.sampled_from([np.float32, np.float64]),
    shape=st.sampled_from(["plain", "transposed", "part"]),
)
def test_a_product_is_numpys_to_its_rounding(seed, out, into, rank, scaling, kind, shape):
    rng = np.random.default_rng(seed)
    up, down = (rng.standard_normal(size).astype(kind) for size in ((out, rank), (rank, into)))
    delta = LowRank(up, down, scaling)
    if shape == "transposed":
        delta = delta.transposed()
    if shape == "part":
        delta = delta.part(Span(0, out, 2), Span(into // 2, into))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(arrays._TORCH_DEVICES, STAND_IN, "cpu")
        there = delta.on(STAND_IN)
    assert there.shape == delta.shape
    start, stop = delta.shape[0] // 3, delta.shape[0]
    exact = abs(scaling) * np.abs(delta.up).astype(np.float64) @ np.abs(delta.down).astype(np.float64)
    tolerance = (rank + 3) * EPSILON[kind] * exact[start:stop]
    filled = np.empty((stop - start, delta.shape[1]), kind)
    for block in (there.rows(start, stop), there.rows(start, stop, filled)):
        assert block.dtype == kind
        assert (np.abs(block - delta.rows(start, stop)) <= tolerance).all()
    weight = rng.standard_normal((stop - start, delta.shape[1])).astype(kind)
    expected = delta.apply(weight.copy(), start)
    assert (
        np.abs(there.apply(weight, start) - expected) <= tolerance + EPSILON[kind] * np.abs(expected)
    ).all()


def _merged(monkeypatch, base, adapter, device, out=None, **options):
    """A merge on a device, without asking whether it is there."""
    monkeypatch.setattr("loratools.verbs.merge.check_device", lambda name: name)
    return lt.merge(base, adapter, out, device=device, **options)


def _products(monkeypatch):
    """Counts what is multiplied on the device."""
    seen = []
    namespace_of = arrays.namespace_of

    def counted(array):
        seen.append(type(array).__module__)
        return namespace_of(array)

    monkeypatch.setattr("loratools.deltas.lowrank.namespace_of", counted)
    return seen


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_merge_on_a_device_is_that_of_the_processor_to_its_rounding(
    tmp_path, monkeypatch, stand_in, kind, jobs
):
    base = write_base(tmp_path / "base", kind=kind)
    adapters = [write_small_adapter(tmp_path / f"lora{seed}", seed=seed) for seed in (1, 2)]
    options = {"weights": [0.7, -1.5], "jobs": jobs}
    expected = lt.merge(base, adapters, **options).state_dict
    products = _products(monkeypatch)
    found = _merged(monkeypatch, base, adapters, stand_in, **options).state_dict
    assert products == ["torch"] * 8  # a block of each of four weights, for each adapter
    original = base_tensors(kind)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        bound = 8 * EPSILON[kind] * np.linalg.norm(value)
        assert np.linalg.norm(found[name] - value) <= bound, name
        if "q_proj" in name:
            assert np.linalg.norm(found[name] - original[name]) > 1e-2 * np.linalg.norm(value)


def test_a_device_without_float64_leaves_that_to_the_processor(tmp_path, monkeypatch, stand_in):
    monkeypatch.setattr(arrays, "_SINGLE_ONLY", {stand_in})
    base = write_base(tmp_path / "base", kind=np.float64)
    adapter = write_small_adapter(tmp_path / "lora")
    products = _products(monkeypatch)
    found = _merged(monkeypatch, base, adapter, stand_in).state_dict
    assert not products
    for name, value in lt.merge(base, adapter).state_dict.items():
        np.testing.assert_array_equal(found[name], value)


def test_what_is_no_plain_product_is_computed_by_numpy(tmp_path, monkeypatch, stand_in):
    base = write_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "pissa", {"layers.0.q_proj": (12, 8)}, init_lora_weights="pissa")
    products = _products(monkeypatch)
    found = _merged(monkeypatch, base, adapter, stand_in).state_dict
    assert not products
    for name, value in lt.merge(base, adapter).state_dict.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_merge_on_a_device_passes_its_verification(tmp_path, monkeypatch, stand_in):
    base, adapter = write_base(tmp_path / "base"), write_small_adapter(tmp_path / "lora")
    out = tmp_path / "out"
    assert _merged(monkeypatch, base, adapter, stand_in, out, verify=True).verified
    assert lt.verify(base, adapter, out).ok  # and that of the processor
    products = _products(monkeypatch)
    assert lt.verify(base, adapter, out, device=stand_in, executor="inline").summary == {"exact": 9}
    assert set(products) == {"torch"}
    assert not lt.verify(base, adapter, base, device=stand_in).ok


def test_an_interrupted_merge_does_not_go_on_on_another_device(tmp_path, monkeypatch, stand_in):
    base, adapter = write_base(tmp_path / "base"), write_small_adapter(tmp_path / "lora")
    monkeypatch.setattr("loratools.verbs.merge.check_device", lambda name: name)
    plans = [lt.plan_merge(base, adapter, tmp_path / "out", device=name).plan for name in ("cpu", stand_in)]
    assert plans[0].digest() != plans[1].digest()
    steps = [step for step in plans[1].steps if isinstance(step, WeightStep)]
    assert {step.device for step in steps} == {stand_in}
    back = tuple(replace(s, device="cpu") if isinstance(s, WeightStep) else s for s in plans[1].steps)
    assert replace(plans[1], steps=back).digest() == plans[0].digest()


def test_auto_writes_the_processors_bytes_where_there_is_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_available", lambda name: False)
    base, adapter = write_base(tmp_path / "base"), write_small_adapter(tmp_path / "lora")
    lt.merge(base, adapter, tmp_path / "cpu")
    lt.merge(base, adapter, tmp_path / "auto", device="auto")
    assert contents(tmp_path / "auto") == contents(tmp_path / "cpu")


def test_the_processor_never_loads_torch(tmp_path):
    base, adapter = write_base(tmp_path / "base"), write_small_adapter(tmp_path / "lora")
    program = (
        "import sys, loratools as lt\n"
        "lt.merge(*sys.argv[1:4], device='cpu')\n"
        "lt.verify(*sys.argv[1:4], device='cpu')\n"
        "assert not {'torch', 'array_api_compat'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", program, base, adapter, tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- the verbs on adapters ----------------------------------------------------------------------------------


def _truncations(tmp_path, device):
    """Adapters of rank 2 from every verb that decomposes, by the verb, as dense deltas by module."""
    paths = [write_small_adapter(tmp_path / f"lora{seed}", seed=seed) for seed in (1, 2)]
    base = write_base(tmp_path / "base")
    tuned = tmp_path / "tuned"
    if not tuned.exists():
        lt.merge(base, paths, tuned)
    reports = {
        "reduce": lt.reduce(paths[0], rank=2, device=device),
        "reduce --global": lt.reduce(paths[0], rank=2, per_module=False, device=device),
        "combine": lt.combine(paths, rank=2, device=device),
        "extract": lt.extract(base, tuned, rank=2, device=device),
        "normalize": lt.normalize(paths[0], rank=2, device=device),
    }
    return {
        verb: {
            name: delta.up @ delta.down
            for name, module in report.adapter.modules.items()
            for delta in matrices(module, name)
        }
        for verb, report in reports.items()
    }


def test_verbs_that_decompose_give_the_same_on_a_device(tmp_path, monkeypatch, stand_in):
    for verb in ("reduce", "combine", "extract", "normalize"):
        monkeypatch.setattr(f"loratools.verbs.{verb}.check_double", lambda name: name)
    expected = _truncations(tmp_path, "cpu")
    shutil.rmtree(tmp_path / "base")
    for seed in (1, 2):
        shutil.rmtree(tmp_path / f"lora{seed}")
    moved = []
    to_device = arrays.to_device
    monkeypatch.setattr(
        "loratools.deltas.lowrank.to_device", lambda *given: moved.append(given[1]) or to_device(*given)
    )
    found = _truncations(tmp_path, stand_in)
    assert moved.count(stand_in) >= 2 * 4 * 4  # both factors, four modules, four verbs at least
    for verb, deltas in expected.items():
        assert found[verb].keys() == deltas.keys()
        for name, delta in deltas.items():
            assert np.linalg.norm(found[verb][name] - delta) <= 1e-6 * np.linalg.norm(delta), (verb, name)


@pytest.mark.parametrize("case", ["other", "close", "turned", "padded", "wide", "equal"])
def test_a_comparison_on_a_device_is_that_of_the_processor(monkeypatch, stand_in, case):
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((30, 4)), rng.standard_normal((4, 50))
    turn = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    others = {
        "other": (rng.standard_normal((30, 3)), rng.standard_normal((3, 50))),
        "close": (up * (1 + 1e-9), down),
        "turned": (up @ turn, turn.T @ down),
        "padded": (np.pad(up, ((0, 0), (0, 2))), np.pad(down, ((0, 2), (0, 0)))),
        "wide": (rng.standard_normal((30, 70)), rng.standard_normal((70, 50))),
        "equal": (up, down),
    }
    a, b = LowRank(up, down, 0.5), LowRank(*others[case], 0.5)
    sent = []
    to_device = arrays.to_device
    monkeypatch.setattr(
        "loratools.deltas.likeness.to_device", lambda *given: sent.append(given[1]) or to_device(*given)
    )
    expected, found = compare(a, b), compare(a, b, device=stand_in)
    assert set(sent) == (set() if case == "wide" else {stand_in})  # there the matrix is less than the Grams
    size = np.linalg.norm(0.5 * up @ down)
    truth = np.linalg.norm(0.5 * (up @ down - others[case][0] @ others[case][1]))
    assert abs(found.distance - truth) <= 1e-14 * size + 1e-9 * truth
    assert found.norm_a == pytest.approx(size, rel=1e-12)
    assert found.inner == pytest.approx(expected.inner, rel=1e-12)
    if case != "wide":
        assert found.outputs.value == pytest.approx(expected.outputs.value, rel=1e-9)


@pytest.mark.parametrize("executor", ["inline", "threads"])
def test_a_diff_on_a_device_reports_what_the_processor_does(tmp_path, monkeypatch, stand_in, executor):
    monkeypatch.setattr("loratools.verbs.diff.check_double", lambda name: name)
    paths = [write_small_adapter(tmp_path / f"lora{seed}", seed=seed) for seed in (1, 2)]
    expected, found = (lt.diff(*paths, device=name, executor=executor) for name in ("cpu", stand_in))
    assert found.relative == pytest.approx(expected.relative, rel=1e-12)
    assert found.relative > 0.1
    for mine, theirs in zip(expected.modules, found.modules, strict=True):
        assert theirs.name == mine.name
        assert theirs.distance == pytest.approx(mine.distance, rel=1e-12)
    assert lt.diff(paths[0], paths[0], device=stand_in, executor=executor).relative == 0


def test_products_with_a_mirrored_matrix_are_formed_on_the_device(stand_in):
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((400, 6)) @ rng.standard_normal((6, 300))).astype(np.float32)
    there = mirrored(matrix, stand_in)
    assert isinstance(there, Mirrored)
    assert mirrored(matrix, "cpu") is matrix
    expected, found = (sketch(one, 8, seed=3) for one in (matrix, there))
    np.testing.assert_allclose(found.values[:6], expected.values[:6], rtol=1e-5)
    one, other = expected.truncate(6), found.truncate(6)
    assert np.linalg.norm(one.up @ one.down - other.up @ other.down) <= 1e-5 * np.linalg.norm(matrix)


def test_what_is_computed_in_float64_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(arrays, "check_device", lambda name: name)
    with pytest.raises(Unsupported, match="'mps' has no float64"):
        arrays.check_double("mps")
    assert arrays.check_double("cuda") == "cuda"


@pytest.mark.parametrize("verb", ["reduce", "combine", "extract", "diff", "normalize"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_opened(monkeypatch, tmp_path, verb):
    without(monkeypatch, "torch")
    two = ["nowhere", "nothing"]
    places = {"reduce": ["nowhere"], "normalize": ["nowhere"], "combine": [two], "extract": two, "diff": two}
    with pytest.raises(Unsupported, match="needs torch"):
        getattr(lt, verb)(*places[verb], device="cuda")
