"""``inspect --spectrum``: measures against their definitions, singular values against dense matrices."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import loratools as lt
from loratools.cli.app import app
from loratools.deltas.measures import effective_rank, frobenius_norm, spectral_norm, stable_rank
from loratools.errors import InputError, Unsupported
from tests.helpers import make_adapter, write_adapter

FIELDS = {"norm", "spectral_norm", "stable_rank", "effective_rank", "singular_values"}
values = st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=20).map(
    lambda found: np.array(sorted(found, reverse=True))
)


@given(values, st.sampled_from([1.0, 1e-180, 1e180]))
def test_measures_are_what_they_are_called(found, scale):
    norm, greatest, total = np.linalg.norm(found), found.max(), found.sum()
    measured = [f(found * scale) for f in (frobenius_norm, spectral_norm, stable_rank, effective_rank)]
    if not total:
        assert measured == [0, 0, 0, 0]
        return
    shares = found[found > 0] / total
    entropy = float(-(shares * np.log(shares)).sum())
    assert measured == pytest.approx(
        [norm * scale, greatest * scale, (norm / greatest) ** 2, np.exp(entropy)], rel=1e-9, abs=0
    )


@given(st.integers(1, 12), st.floats(0.1, 10))
def test_equal_values_have_the_rank_they_look_like(count, value):
    found = np.full(count, value)
    assert stable_rank(found) == pytest.approx(count)
    assert effective_rank(found) == pytest.approx(count)


def factors(kind: str, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """Stored tensors of one module, its configuration, and its delta without the scaling."""
    draw = rng.standard_normal
    if kind == "lora":
        down, up = draw((3, 10)), draw((7, 3))
        return {"lora_A.weight": down, "lora_B.weight": up}, {"peft_type": "LORA", "lora_alpha": 5}, up @ down
    if kind == "conv":
        down, up = draw((3, 4, 3, 3)), draw((7, 3, 1, 1))
        delta = up.reshape(7, 3) @ down.reshape(3, 36)
        return {"lora_A.weight": down, "lora_B.weight": up}, {"peft_type": "LORA", "lora_alpha": 5}, delta
    if kind == "loha":
        a, b, c, d = draw((7, 3)), draw((3, 10)), draw((7, 3)), draw((3, 10))
        stored = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
        return stored, {"peft_type": "LOHA", "alpha": 5}, (a @ b) * (c @ d)
    left, right = draw((2, 2)), draw((4, 5))
    return {"lokr_w1": left, "lokr_w2": right}, {"peft_type": "LOKR", "alpha": 5}, np.kron(left, right)


@pytest.mark.parametrize("kind", ["lora", "conv", "loha", "lokr"])
def test_singular_values_are_those_of_the_scaled_dense_delta(kind):
    stored, config, delta = factors(kind, np.random.default_rng(0))
    tensors = {f"base_model.model.fc.{key}": value for key, value in stored.items()}
    report = lt.inspect(tensors, config={"r": 3, "target_modules": ["fc"], **config}, spectrum=True)
    (module,) = report.modules
    expected = np.linalg.svd(delta * module.scaling, compute_uv=False)
    found = np.array(module.singular_values)
    assert list(found) == sorted(found, reverse=True)
    size = max(len(found), len(expected))
    padded = [np.pad(v, (0, size - len(v))) for v in (found, expected)]
    assert padded[0] == pytest.approx(padded[1], abs=1e-6 * expected[0])
    assert module.norm == pytest.approx(np.linalg.norm(delta) * module.scaling, rel=1e-6)
    assert module.spectral_norm == pytest.approx(expected[0], rel=1e-6)


def test_the_spectrum_of_experts_is_that_of_all_of_them():
    rng = np.random.default_rng(0)
    ups, downs = rng.standard_normal((3, 8, 2)), rng.standard_normal((3, 2, 6))
    tensors = {
        "base_model.model.mlp.experts.lora_A.weight": downs.reshape(6, 6),
        "base_model.model.mlp.experts.lora_B.weight": ups.transpose(1, 2, 0).reshape(8, 6),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["mlp.experts.down_proj"]}
    (module,) = lt.inspect(tensors, config=config, spectrum=True).modules
    apart = [np.linalg.svd(2 * up @ down, compute_uv=False)[:2] for up, down in zip(ups, downs, strict=True)]
    assert module.singular_values == pytest.approx(sorted(np.concatenate(apart), reverse=True))


def test_a_delta_of_zero_measures_nothing():
    tensors = {"fc.lora_A.weight": np.ones((2, 5), "f4"), "fc.lora_B.weight": np.zeros((4, 2), "f4")}
    (module,) = lt.inspect(
        tensors, config={"peft_type": "LORA", "r": 2, "lora_alpha": 2}, spectrum=True
    ).modules
    assert [getattr(module, name) for name in sorted(FIELDS)] == [0.0, 0.0, (0.0, 0.0), 0.0, 0.0]


def test_what_is_no_plain_sum_has_none_and_says_so():
    tensors = {
        "fc.lora_A.weight": np.ones((2, 5), "f4"),
        "fc.lora_B.weight": np.ones((4, 2), "f4"),
        "fc.lora_magnitude_vector": np.ones(4, "f4"),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True}
    report = lt.inspect(tensors, config=config, spectrum=True)
    assert report.modules[0].singular_values is None
    assert "fc has no spectrum: dora is not a plain sum" in report.warnings
    assert report.to_dict()["modules"][0]["norm"] is None


def test_values_that_are_not_finite_are_named():
    tensors = {"fc.lora_A.weight": np.full((2, 5), np.nan, "f4"), "fc.lora_B.weight": np.ones((4, 2), "f4")}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    with pytest.raises(InputError, match=r"fc: fc\.lora_A\.weight holds values that are not finite"):
        lt.inspect(tensors, config=config, spectrum=True)
    assert lt.inspect(tensors, config=config).modules[0].norm is None


def test_deltas_that_nothing_scales_have_no_spectrum(tmp_path):
    folder = write_adapter(
        tmp_path / "a", {"q.lora_A.weight": np.ones((2, 5)), "q.lora_B.weight": np.ones((4, 2))}
    )
    (folder / "adapter_config.json").unlink()
    with pytest.raises(Unsupported, match="scaled"):
        lt.inspect(folder, spectrum=True)


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_the_document_has_the_fields_only_when_asked(tmp_path):
    folder = make_adapter(tmp_path / "a", {"layers.0.q": (12, 8), "layers.1.q": (12, 8)})
    plain, asked = (json.loads(invoke(folder, "--json", *more).stdout) for more in ([], ["--spectrum"]))
    assert all(not FIELDS & set(module) for module in plain["modules"])
    assert all(set(module) >= FIELDS for module in asked["modules"])
    assert all(len(module["singular_values"]) == 4 for module in asked["modules"])
    assert asked["schema"] == "loratools.inspect/1"
    for module in asked["modules"]:
        for name in FIELDS:
            del module[name]
    assert asked == plain


def test_the_table_shows_the_measures(tmp_path):
    folder = make_adapter(tmp_path / "a", {"layers.0.q": (12, 8), "layers.1.q": (12, 8)})
    grouped, each = invoke(folder, "--spectrum").stdout, invoke(folder, "--spectrum", "--modules").stdout
    for shown in (grouped, each):
        assert all(title in shown for title in ("norm", "stable rank", "effective rank"))
    assert "layers.*.q" in grouped
    norms = [f"{module.norm:.3g}" for module in lt.inspect(folder, spectrum=True).modules]
    assert f"{min(norms)} to {max(norms)}" in grouped
    assert all(norm in each for norm in norms)


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [([], ("numpy", "torch")), (["--spectrum"], ("torch",))],
    ids=["headers", "spectrum"],
)
def test_no_more_is_loaded_than_is_needed(arguments, absent, tmp_path):
    folder = make_adapter(tmp_path / "a", {"q": (12, 8)})
    script = (
        f"import sys; from loratools.cli.app import app; app(['inspect', {str(folder)!r}, *{arguments!r}], "
        f"standalone_mode=False); print([name for name in {absent!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_starts_from_its_base_is_named_by_that():
    tensors = {"fc.lora_A.weight": np.ones((2, 5), "f4"), "fc.lora_B.weight": np.ones((6, 2), "f4")}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": "pissa"}
    report = lt.inspect(tensors, config=config, spectrum=True)
    assert "fc has no spectrum: it starts from a part of its base (pissa)" in report.warnings


def test_a_scaling_that_is_a_guess_is_said_beside_the_spectrum():
    tensors = {"fc.lora_A.weight": np.ones((4, 5), "f4"), "fc.lora_B.weight": np.ones((6, 4), "f4")}
    for rank, guess in ((8, True), (4, False)):
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8}
        report = lt.inspect(tensors, config=config, spectrum=True)
        assert any("values of fc are by a scaling that is a guess" in one for one in report.warnings) is guess
        assert not any("guess" in one for one in lt.inspect(tensors, config=config).warnings)
