"""``normalize --for``: what an engine computes with the result, by its own rule, is what the adapter meant."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.cli.app import app
from loratools.errors import Unsupported
from loratools.verbs.normalize import normalize
from loratools.verbs.saving import save
from tests.helpers import make_adapter, write_adapter
from tests.test_engines import (
    ATTENTION,
    CONFIG,
    FIRST,
    INTO,
    OUT,
    PREFIX,
    RANK,
    factors,
    mlx_folder,
    peft_folder,
    values,
    write_model,
)

if TYPE_CHECKING:
    from pathlib import Path

# How an engine that reads PEFT folders scales a factor pair of rank k: by the configuration, and the rank stored.
SCALES: dict[str, Any] = {
    "vllm": lambda config, k: config["lora_alpha"] / config["r"],  # older releases, which know no patterns
    "sglang": lambda config, k: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, k: config["lora_alpha"] / k or 1.0,
    "ollama": lambda config, k: config["lora_alpha"] / k,
    "lorax": lambda config, k: config["lora_alpha"] / config["r"],
    "tensorrt-llm": lambda config, k: config["lora_alpha"] / k,
}
ENGINES = tuple(SCALES)


def as_an_engine_reads(folder: Path, name: str) -> dict[str, np.ndarray]:
    """What each module of a folder adds, as an engine computes it that knows plain LoRA only."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not any(config.get(field) for field in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"))
    assert config["init_lora_weights"] is True
    assert config["bias"] == "none"
    assert isinstance(config["target_modules"], list) or name != "sglang"
    assert type(config["lora_alpha"]) is int or name != "ollama"
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            assert key.endswith(".lora_B.weight")
            continue
        assert key.startswith(PREFIX)
        path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        up = tensors[key.replace("lora_A", "lora_B")]
        assert down.shape[0] == up.shape[1] == config["r"]
        deltas[path] = SCALES[name](config, down.shape[0]) * up.astype("f8") @ down.astype("f8")
    return deltas


def assert_accepted(folder: Path, name: str, **options: Any) -> None:
    report = lt.validate(folder, engines=[name], **options)
    errors = [finding for finding in report.findings if finding.severity == "error"]
    assert report.ok, errors
    assert report.engines[0].loads != "no"
    assert report.engines[0].same_maths != "no"


def assert_same_deltas(actual: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.linalg.norm(actual[name] - value) <= 3e-7 * np.linalg.norm(value), name


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Any]:
    """What may be unusual about an adapter, and normalising mends."""
    return {
        "ranks": draw(
            st.lists(st.sampled_from([1, 2, 3, 4]), min_size=len(ATTENTION), max_size=len(ATTENTION))
        ),
        "alphas": draw(
            st.lists(st.sampled_from([1, 2.5, 8, 16]), min_size=len(ATTENTION), max_size=len(ATTENTION))
        ),
        "rslora": draw(st.booleans()),
        "spelling": draw(st.sampled_from(["plain", "named", "bare", "doubled"])),
        "targets": draw(st.sampled_from(["list", "pattern", "missing"])),
        "dtype": draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64])),
    }


def write_drawn(folder: Path, drawn: dict[str, Any]) -> dict[str, np.ndarray]:
    """Write the adapter; returns what each module adds, from the numbers it was made of."""
    spell = {
        "plain": lambda key: PREFIX + key,
        "named": lambda key: PREFIX + key.replace(".weight", ".default.weight"),
        "bare": lambda key: key,
        "doubled": lambda key: PREFIX * 2 + key,
    }[drawn["spelling"]]
    tensors, truth = {}, {}
    for seed, (path, rank, alpha) in enumerate(zip(ATTENTION, drawn["ranks"], drawn["alphas"], strict=True)):
        down, up = (values(*shape, seed=seed).astype(drawn["dtype"]) for shape in ((rank, INTO), (OUT, rank)))
        tensors[spell(f"{path}.lora_A.weight")], tensors[spell(f"{path}.lora_B.weight")] = down, up
        scale = alpha / (math.sqrt(rank) if drawn["rslora"] else rank)
        truth[path] = scale * up.astype("f8") @ down.astype("f8")
    config = {
        **CONFIG, "r": drawn["ranks"][0], "lora_alpha": drawn["alphas"][0], "use_rslora": drawn["rslora"],
        "rank_pattern": dict(zip(ATTENTION, drawn["ranks"], strict=True)),
        "alpha_pattern": dict(zip(ATTENTION, drawn["alphas"], strict=True)),
        "target_modules": {"list": CONFIG["target_modules"], "pattern": r".*\.(q|k|v)_proj", "missing": None}[
            drawn["targets"]
        ],
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return truth


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=adapters())
def test_an_engine_computes_what_was_meant(name: str, drawn: dict[str, Any], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("case")
    truth = write_drawn(folder / "adapter", drawn)
    report = normalize(folder / "adapter", folder / "plain", engine=name, sync=False, jobs=1)
    assert_same_deltas(as_an_engine_reads(folder / "plain", name), truth)
    assert_accepted(folder / "plain", name)
    assert report.engine is not None
    assert report.engine.name == name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=adapters())
def test_peft_keeps_ranks_and_computes_what_was_meant(drawn: dict[str, Any], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("case")
    truth = write_drawn(folder / "adapter", drawn)
    normalize(folder / "adapter", folder / "plain", engine="peft", sync=False, jobs=1)
    assert_accepted(folder / "plain", "peft")
    found = lt.load(folder / "plain").modules
    assert {path: module.rank for path, module in found.items()} == dict(
        zip(ATTENTION, drawn["ranks"], strict=True)
    )
    deltas = {}
    for path, module in found.items():
        up, down = (module.tensors[role].load().astype("f8") for role in ("up", "down"))
        deltas[path] = module.scaling * up @ down  # type: ignore[operator]
    assert_same_deltas(deltas, truth)


@pytest.mark.parametrize("name", ENGINES)
def test_factors_in_16_bits_stay_so_where_the_scale_allows(name: str, tmp_path: Path) -> None:
    drawn = {
        "ranks": [4] * len(ATTENTION), "alphas": [16] * len(ATTENTION), "rslora": True, "spelling": "plain",
        "targets": "list", "dtype": ml_dtypes.bfloat16,
    }  # fmt: skip
    truth = write_drawn(tmp_path / "adapter", drawn)
    report = normalize(tmp_path / "adapter", tmp_path / "plain", engine=name, sync=False)
    assert (report.dtype, report.exact) == ("BF16", True)  # 16 / sqrt(4) is a power of two
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert_same_deltas(as_an_engine_reads(tmp_path / "plain", name), truth)


@pytest.mark.parametrize("name", ENGINES)
def test_what_was_taken_out_of_the_base_is_put_back(name: str, tmp_path: Path) -> None:
    """PiSSA: the delta is B A less the leading part of the base, which training took out of it."""
    base = write_model(tmp_path / "base", family="gemma2")
    folder = peft_folder("init", tmp_path / "adapter")
    normalize(folder, tmp_path / "plain", engine=name, base=base, sync=False)
    assert_accepted(tmp_path / "plain", name, base=base)
    weights, raw = load_file(base / "model.safetensors"), load_file(folder / "adapter_model.safetensors")
    truth = {}
    for path in ATTENTION:
        left, sizes, right = np.linalg.svd(weights[f"{path}.weight"].astype("f8"))
        scale = CONFIG["lora_alpha"] / RANK  # type: ignore[operator]
        leading = (left[:, :RANK] * sizes[:RANK]) @ right[:RANK]
        trained = (
            scale * raw[f"{PREFIX}{path}.lora_B.weight"].astype("f8") @ raw[f"{PREFIX}{path}.lora_A.weight"]
        )
        truth[path] = trained - leading
    actual = as_an_engine_reads(tmp_path / "plain", name)
    for path, value in truth.items():
        assert np.linalg.norm(actual[path] - value) < 1e-5 * np.linalg.norm(value)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("feature", ["dora", "bias", "lora-bias", "saved", "packed", "alora", "variant"])
def test_what_an_engine_cannot_take_is_refused_by_name(feature: str, name: str, tmp_path: Path) -> None:
    folder = peft_folder(feature, tmp_path / "a")
    takes = (name, feature) in {("tensorrt-llm", "dora"), ("tensorrt-llm", "saved"), ("vllm", "packed")}
    if takes:
        normalize(folder, tmp_path / "b", engine=name, sync=False)
        assert_accepted(tmp_path / "b", name)
        return
    with pytest.raises(Unsupported) as caught:
        normalize(folder, tmp_path / "b", engine=name, sync=False)
    assert not (tmp_path / "b").exists()
    if feature in {"dora", "bias", "lora-bias", "saved"}:
        assert caught.value.hint == f"loratools merge BASE {folder} MERGED"


@pytest.mark.parametrize(
    ("name", "target"), [("mlx", "mlx"), ("diffusers", "diffusers"), ("sd-scripts", "kohya")]
)
def test_an_engine_with_a_format_of_its_own_is_for_convert(name: str, target: str, tmp_path: Path) -> None:
    folder = peft_folder("plain", tmp_path / "a")
    with pytest.raises(Unsupported) as caught:
        normalize(folder, tmp_path / "b", engine=name)
    assert caught.value.hint == f"loratools convert {folder} OUT --to {target}"


def test_another_format_is_for_convert_too(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="vLLM loads PEFT folders"):
        normalize(mlx_folder("plain", tmp_path / "a"), tmp_path / "b", engine="vllm")


@pytest.mark.parametrize("kind", ["loha", "lokr", "adalora"])
def test_other_kinds_become_lora(kind: str, tmp_path: Path) -> None:
    key = f"{PREFIX}{FIRST}"
    made = {
        "loha": {f"{key}.hada_w{i}_{half}": values(*shape, seed=i) for i in (1, 2)
                 for half, shape in (("a", (OUT, 2)), ("b", (2, INTO)))},
        "lokr": {f"{key}.lokr_w1": values(4, 3), f"{key}.lokr_w2": values(4, 4)},
        "adalora": {f"{key}.lora_A": values(2, INTO), f"{key}.lora_B": values(OUT, 2), f"{key}.lora_E": values(2, 1)},
    }[kind]  # fmt: skip
    config = {
        "peft_type": kind.upper(),
        "r": 2,
        "init_r": 2,
        "alpha": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
    }
    folder = write_adapter(tmp_path / "a", made, **config)
    assert lt.validate(folder, engines=["llama.cpp"]).engines[0].loads == "no"
    normalize(folder, tmp_path / "b", engine="llama.cpp", sync=False)
    assert_accepted(tmp_path / "b", "llama.cpp")
    truth = {
        "loha": lambda: (
            (made[f"{key}.hada_w1_a"] @ made[f"{key}.hada_w1_b"])
            * (made[f"{key}.hada_w2_a"] @ made[f"{key}.hada_w2_b"])
        ),
        "lokr": lambda: np.kron(made[f"{key}.lokr_w1"], made[f"{key}.lokr_w2"]),
        "adalora": lambda: (
            made[f"{key}.lora_B"] @ (made[f"{key}.lora_A"] * made[f"{key}.lora_E"]) * (2 / (2 + 1e-5))
        ),
    }[kind]()
    actual = as_an_engine_reads(tmp_path / "b", "llama.cpp")[FIRST]
    assert np.linalg.norm(actual - truth) < 1e-6 * np.linalg.norm(truth)


def test_a_rank_beyond_the_menu_is_for_reduce_unless_a_rank_is_given(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", {"l.0.q_proj": (4, 4)}, rank=513, alpha=513)
    with pytest.raises(Unsupported) as caught:
        normalize(folder, engine="vllm")
    assert caught.value.hint == f"loratools reduce {folder} OUT --rank 512"
    report = normalize(folder, tmp_path / "b", engine="vllm", rank=4, sync=False)
    assert report.engine is not None
    assert report.engine.flags == ()


@pytest.mark.parametrize(
    ("name", "adapted"),
    [("sglang", "q"), ("sglang", "k"), ("sglang", "v"), ("tensorrt-llm", "qv"), ("sglang", "qv")],
)
def test_projections_that_are_stacked_are_filled_with_zeros(name: str, adapted: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    shapes = {path: shape for path, shape in ATTENTION.items() if path[-6] in adapted}
    folder = make_adapter(tmp_path / "a", shapes)
    raw = {
        key.removeprefix(PREFIX): value
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    before = {path: 1.5 * raw[f"{path}.lora_B.weight"] @ raw[f"{path}.lora_A.weight"] for path in shapes}
    normalize(folder, tmp_path / "b", engine=name, base=base, sync=False)
    assert_accepted(tmp_path / "b", name, base=base)
    made = as_an_engine_reads(tmp_path / "b", name)
    filled = made.keys() - shapes.keys()
    missing = {"q": "v", "k": "qv", "v": "q", "qv": "k" if name == "tensorrt-llm" else ""}[adapted]
    assert filled == {path for path in ATTENTION if path[-6] in missing}
    assert not any(made[path].any() for path in filled)
    for path, value in before.items():
        np.testing.assert_allclose(made[path], value, rtol=1e-4, atol=1e-6)


def test_without_a_base_what_lacks_a_projection_is_refused(tmp_path: Path) -> None:
    shapes = {path: shape for path, shape in ATTENTION.items() if path.endswith("q_proj")}
    folder = make_adapter(tmp_path / "a", shapes)
    with pytest.raises(Unsupported, match="lacks v_proj") as caught:
        normalize(folder, engine="sglang")
    assert caught.value.hint == f"loratools normalize {folder} OUT --for sglang --base BASE"


def test_layers_that_lorax_wants_are_filled_with_zeros(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    shapes = {path: shape for path, shape in ATTENTION.items() if ".0." in path or "q_proj" in path}
    folder = write_adapter(tmp_path / "a", factors(shapes), **CONFIG)
    with pytest.raises(Unsupported, match="not adapted in every layer") as caught:
        normalize(folder, tmp_path / "b", engine="lorax")
    assert caught.value.hint == f"loratools normalize {folder} OUT --for lorax --base BASE"
    normalize(folder, tmp_path / "b", engine="lorax", base=base, sync=False)
    answer = lt.validate(tmp_path / "b", engines=["lorax"], base=base).engines[0]
    assert (answer.loads, answer.same_maths) == ("yes", "yes")
    made = as_an_engine_reads(tmp_path / "b", "lorax")
    assert made.keys() == ATTENTION.keys()
    assert not any(made[path].any() for path in made.keys() - shapes.keys())
    raw = factors(shapes)
    truth = {
        path: 2.0 * raw[f"{PREFIX}{path}.lora_B.weight"].astype("f8") @ raw[f"{PREFIX}{path}.lora_A.weight"]
        for path in shapes
    }
    assert_same_deltas({path: made[path] for path in shapes}, truth)


def test_a_layer_under_another_name_is_filled_under_that_name(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", prefix="language_model.")
    shapes = {path: shape for path, shape in ATTENTION.items() if path != FIRST}
    folder = write_adapter(tmp_path / "a", factors(shapes), **CONFIG)
    normalize(folder, tmp_path / "b", engine="lorax", base=base, sync=False)
    assert set(lt.load(tmp_path / "b").modules) == {f"language_model.{path}" for path in ATTENTION}
    assert lt.validate(tmp_path / "b", engines=["lorax"], base=base).engines[0].same_maths == "yes"


@pytest.mark.parametrize("feature", ["plain", "rslora", "rank", "alpha"])
@pytest.mark.parametrize("name", ["mlx", "llama.cpp"])
def test_the_format_that_is_written_is_judged(name: str, feature: str, tmp_path: Path) -> None:
    form = {"mlx": "mlx", "llama.cpp": "gguf"}[name]
    base = write_model(tmp_path / "base")
    folder = peft_folder(feature, tmp_path / "a")
    out = tmp_path / ("b.gguf" if form == "gguf" else "b")
    report = normalize(folder, out, engine=name, to=form, base=base, sync=False)
    assert report.engine is not None
    assert (report.engine.loads, report.engine.same_maths) == ("yes", "yes")
    back = lt.load(out)
    assert back.format == form
    assert_same_deltas(as_read(back), as_read(lt.load(folder)))
    assert lt.validate(out, engines=[name], base=base).ok


@pytest.mark.parametrize("form", ["mlx", "gguf"])
def test_what_was_in_another_format_is_written_for_an_engine_of_peft(form: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    source = tmp_path / ("a.gguf" if form == "gguf" else "a")
    config = json.loads((base / "config.json").read_text())
    save(lt.load(peft_folder("rslora", tmp_path / "p")), source, format=form, base_config=config, sync=False)
    normalize(source, tmp_path / "b", engine="sglang", to="peft", base=base, sync=False)
    assert_accepted(tmp_path / "b", "sglang", base=base)
    assert_same_deltas(as_an_engine_reads(tmp_path / "b", "sglang"), as_read(lt.load(tmp_path / "p")))


def as_read(adapter: lt.Adapter) -> dict[str, np.ndarray]:
    """What each module adds, by its factors and scaling."""
    return {
        path: m.scaling * m.tensors["up"].load().astype("f8") @ m.tensors["down"].load().astype("f8")  # type: ignore[operator]
        for path, m in adapter.modules.items()
    }


def test_copies_of_the_base_are_left_out_for_sglang(tmp_path: Path) -> None:
    tensors = factors({**ATTENTION, "lm_head": (20, INTO)})
    tensors[f"{PREFIX}lm_head.base_layer.weight"] = values(20, INTO)
    folder = write_adapter(tmp_path / "a", tensors, **{**CONFIG, "target_modules": ["q_proj", "lm_head"]})
    normalize(folder, tmp_path / "b", engine="sglang", sync=False)
    assert_accepted(tmp_path / "b", "sglang")
    assert not any("base_layer" in key for key in load_file(tmp_path / "b" / "adapter_model.safetensors"))
    assert set(lt.load(tmp_path / "b").modules) == {*ATTENTION, "lm_head"}


@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
def test_names_are_made_those_of_the_base(name: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", prefix="language_model.")
    folder = peft_folder("plain", tmp_path / "a")
    assert lt.validate(folder, engines=[name], base=base).ok is False
    report = normalize(folder, tmp_path / "b", engine=name, base=base, sync=False)
    assert_accepted(tmp_path / "b", name, base=base)
    assert report.renamed[FIRST] == f"language_model.{FIRST}"
    assert set(lt.load(tmp_path / "b").modules) == {f"language_model.{path}" for path in ATTENTION}


def test_a_module_of_zeros_stays_where_an_engine_stacks_it(tmp_path: Path) -> None:
    tensors = factors()
    for path in ATTENTION:
        if path.endswith("v_proj"):
            tensors[f"{PREFIX}{path}.lora_B.weight"][:] = 0
    folder = write_adapter(tmp_path / "a", tensors, **CONFIG)
    report = normalize(folder, tmp_path / "b", engine="sglang", sync=False)
    assert report.dropped == ()
    assert_accepted(tmp_path / "b", "sglang")


def test_the_command(tmp_path: Path) -> None:
    folder = peft_folder("rslora", tmp_path / "a")
    result = CliRunner().invoke(app, ["normalize", str(folder), str(tmp_path / "b"), "--for", "sglang"])
    assert result.exit_code == 0, result.output
    assert "sglang" in result.stdout
    assert "loads, computes the same, set --max-lora-rank 4" in result.stdout
    said = CliRunner().invoke(
        app, ["normalize", str(folder), str(tmp_path / "c"), "--for", "SGLang", "--json"]
    )
    assert json.loads(said.stdout)["engine"] == {
        "name": "sglang", "loads": "yes", "same_maths": "yes", "flags": ["--max-lora-rank 4"],
    }  # fmt: skip
    refused = CliRunner().invoke(
        app, ["normalize", str(peft_folder("dora", tmp_path / "d")), "x", "--for", "vllm"]
    )
    assert refused.exit_code == 3
    assert "Hint: loratools merge BASE" in refused.stderr
