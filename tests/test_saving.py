"""``Adapter.save``: whole or not at all, never over anything that is not ours, every value rounded once."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools.errors import Incomplete, NonFinite, OutputExists, Unsupported
from loratools.provenance import record
from loratools.verbs import saving
from loratools.verbs.saving import describe_save, input_paths, save, widest
from tests.helpers import digest, load_state, make_adapter, rounded_once, save_state

if TYPE_CHECKING:
    from loratools.adapter import Adapter

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "loratools.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "in" / "adapter", {f"l.{i}.q": (9, 7) for i in range(3)})


@pytest.fixture
def adapter(folder: Path) -> Adapter:
    return lt.load(folder)


def in_memory(**tensors: np.ndarray) -> Adapter:
    """An adapter of one module from its two factors."""
    keys = {"fc.lora_A.weight": tensors["down"], "fc.lora_B.weight": tensors["up"]}
    return lt.load(keys, config={"peft_type": "LORA", "r": len(tensors["down"]), "lora_alpha": 2})


# --- what is written ---------------------------------------------------------------------------------------------


def test_a_folder_holds_weights_configuration_and_record(adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = adapter.save(out, sync=False)
    assert report.files == (WEIGHTS, CONFIG, RECORD)
    assert sorted(path.name for path in out.iterdir()) == sorted(report.files)
    assert report.bytes == sum(path.stat().st_size for path in out.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_the_record_names_the_input_by_its_header_and_no_path(
    adapter: Adapter, folder: Path, tmp_path: Path
) -> None:
    adapter.save(tmp_path / "out", sync=False)
    found = json.loads((tmp_path / "out" / RECORD).read_text())
    raw = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    assert found["loratools"] == lt.__version__
    assert found["inputs"] == [
        {
            "role": "adapter",
            "name": "adapter",
            "bytes": len(raw),
            "header_sha256": hashlib.sha256(raw[:header]).hexdigest(),
        }
    ]
    assert str(tmp_path) not in json.dumps(found)


def test_a_record_of_a_verb_is_kept(adapter: Adapter, tmp_path: Path) -> None:
    made = record("reduce", "1.2.3", {"rank": 4}, [])
    save(adapter, tmp_path / "out", provenance=made, sync=False)
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == made


def test_one_file_carries_its_record_and_has_its_configuration_beside_it(
    adapter: Adapter, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "one.safetensors"
    report = adapter.save(out, sync=False)
    assert report.files == ("one.safetensors", CONFIG)
    assert report.bytes == out.stat().st_size + (tmp_path / CONFIG).stat().st_size
    again = lt.load(out)
    assert json.loads(again.metadata["loratools"])["verb"] == "save"
    assert again.config.raw == adapter.config.raw
    for name, value in load_state(folder).items():
        assert torch.equal(load_state(out)[name], value)


def test_files_get_the_modes_that_the_umask_leaves(adapter: Adapter, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        adapter.save(tmp_path / "out", sync=False)
        adapter.save(tmp_path / "one" / "x.safetensors", sync=False)
    finally:
        os.umask(before)
    written = [*(tmp_path / "out").iterdir(), *(tmp_path / "one").iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o640}


def test_memory_can_be_saved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((4, 2)).astype("f4"), rng.standard_normal((2, 3)).astype("f4")
    in_memory(up=up, down=down).save(tmp_path / "out", sync=False)
    found = load_state(tmp_path / "out")
    np.testing.assert_array_equal(found["fc.lora_B.weight"].numpy(), up)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["inputs"][0]["name"] == "in memory"


def test_saving_a_copy_of_a_copy_gives_the_same_bytes(adapter: Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "one", sync=False)
    lt.load(tmp_path / "one").save(tmp_path / "two", sync=False)
    one, two = digest(tmp_path / "one"), digest(tmp_path / "two")
    assert (one[WEIGHTS], one[CONFIG]) == (two[WEIGHTS], two[CONFIG])


# --- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["f2", "f4", "f8"])
@pytest.mark.parametrize("target", ["bf16", "f16", "f32", "f64"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_value_is_rounded_once(
    source: str, target: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    up = (rng.standard_normal((40, 2)) * 10.0 ** rng.integers(-3, 2, (40, 2))).astype(source)
    if source == "f8":  # values that a stop at float32 would move across the middle between two of the target
        low = rng.standard_normal(40).astype(ml_dtypes.bfloat16).astype("f8")
        up[:, 0] = low * (1 + 2.0**-8 + np.where(rng.random(40) < 0.5, -1, 1) * 2.0**-40)
    place = tmp_path_factory.mktemp("types")
    down = np.ones((2, 3), source)
    in_memory(up=up, down=down).save(place / "out", dtype=target, sync=False)
    found = load_state(place / "out")["fc.lora_B.weight"]
    names = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
    assert found.dtype == names[target]
    wide = torch.from_numpy(up.astype("f8"))
    expected = wide if target == "f64" else rounded_once(wide, torch.empty(0, dtype=names[target]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("given_type", ["bf16", "BF16", "bfloat16", torch.bfloat16, ml_dtypes.bfloat16])
def test_a_type_goes_by_any_of_its_names(given_type: Any, adapter: Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "out", dtype=given_type, sync=False)
    assert {value.dtype for value in load_state(tmp_path / "out").values()} == {torch.bfloat16}


def test_integers_keep_their_type(folder: Path, tmp_path: Path) -> None:
    weights = load_state(folder)
    weights["base_model.model.l.0.q.ranknum"] = torch.tensor([3])
    save_state(weights, folder / WEIGHTS)
    lt.load(folder).save(tmp_path / "out", dtype="bf16", sync=False)
    found = load_state(tmp_path / "out")["base_model.model.l.0.q.ranknum"]
    assert torch.equal(found, torch.tensor([3]))


def test_a_value_that_does_not_fit_names_its_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    up = np.ones((4, 2), "f4")
    up[2, 1] = 1e5
    with pytest.raises(NonFinite, match=r"fc\.lora_B\.weight\[2, 1\]: 100000 does not fit F16"):
        in_memory(up=up, down=np.ones((2, 3), "f4")).save(tmp_path / "out", dtype="f16", sync=False)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_rounded_to_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="F8_E4M3"):
        adapter.save(tmp_path / "out", dtype="F8_E4M3")
    with pytest.raises(Unsupported, match="kohya"):
        adapter.save(tmp_path / "out", format="kohya")
    assert not (tmp_path / "out").exists()


def test_the_widest_type_covers_all_factors() -> None:
    def of(up: Any, down: Any) -> Adapter:
        return in_memory(up=np.ones((4, 2), up), down=np.ones((2, 3), down))

    assert widest([of("f2", "f2")]) == "F16"
    assert widest([of("f2", ml_dtypes.bfloat16)]) == "F32"
    assert widest([of("f2", "f2"), of("f4", "f4")]) == "F32"
    assert widest([of("f4", "f8")]) == "F64"


# --- places --------------------------------------------------------------------------------------------------------


def test_what_is_there_stays_unless_forced(adapter: Adapter, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapter.save(out, sync=False)
    with pytest.raises(OutputExists, match="exists") as caught:
        adapter.save(out)
    assert "--force" in str(caught.value.hint)
    adapter.save(out, dtype="bf16", force=True, sync=False)
    assert {value.dtype for value in load_state(out).values()} == {torch.bfloat16}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_force_replaces_only_what_loratools_made(adapter: Adapter, tmp_path: Path) -> None:
    theirs = make_adapter(tmp_path / "theirs", {"l.0.q": (9, 7)})
    before = digest(theirs)
    with pytest.raises(OutputExists, match="not made by loratools"):
        adapter.save(theirs, force=True)
    single = save_state({"a": torch.ones(2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(OutputExists, match="not made by loratools"):
        adapter.save(single, force=True)
    assert digest(theirs) == before


@pytest.mark.parametrize("place", ["adapter", "adapter/deeper", ".", f"adapter/{WEIGHTS}", "link"])
def test_an_input_is_never_touched(place: str, adapter: Adapter, folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    before = digest(folder)
    with pytest.raises(OutputExists):
        adapter.save(folder.parent / place, force=True)
    assert digest(folder) == before


def test_the_files_of_a_changed_adapter_are_inputs_too(adapter: Adapter, folder: Path) -> None:
    changed = replace(adapter, name="made", tensors=())
    assert folder / WEIGHTS in input_paths(changed)
    with pytest.raises(OutputExists, match="overlap"):
        changed.save(folder, force=True)


def test_further_inputs_are_named_by_the_caller(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(OutputExists, match="overlap"):
        save(adapter, tmp_path / "base" / "out", inputs=[tmp_path / "base"])


def test_a_part_of_somebody_else_stays(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExists, match="did not leave it there"):
        adapter.save(tmp_path / "out")
    assert (tmp_path / "out.part" / "thesis.txt").read_text() == "mine"


def test_a_link_is_replaced_and_not_written_through(adapter: Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "real", sync=False)
    before = digest(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    adapter.save(tmp_path / "out", dtype="bf16", force=True, sync=False)
    assert digest(tmp_path / "real") == before
    assert not (tmp_path / "out").is_symlink()


def test_a_replacement_cut_short_is_finished(adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapter.save(out, sync=False)
    out.rename(tmp_path / "out.loratools-old")  # where it stands between the two renames
    with pytest.raises(OutputExists, match="cut short"):
        adapter.save(out)
    adapter.save(out, force=True, sync=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_save_cut_short_leaves_nothing(
    error: BaseException, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratools.sinks import FileSink

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(FileSink, "_write_small", fail)
    with pytest.raises(Incomplete if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        adapter.save(tmp_path / "out", sync=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    if isinstance(error, OSError):
        assert "--resume" not in str(caught.value.hint)


# --- one file and its configuration ----------------------------------------------------------------------------------


def test_a_configuration_of_something_else_stays(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    for force in (False, True):
        with pytest.raises(OutputExists, match="belongs to something else"):
            adapter.save(tmp_path / "one.safetensors", force=force)
    assert (tmp_path / CONFIG).read_text() == "{}"
    assert not (tmp_path / "one.safetensors").exists()


def test_one_file_is_replaced_with_its_own_configuration(adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / "one.safetensors"
    adapter.save(out, sync=False)
    adapter.save(out, dtype="bf16", force=True, sync=False)
    assert {value.dtype for value in load_state(out).values()} == {torch.bfloat16}
    (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text() + "\n")  # somebody has changed it
    with pytest.raises(OutputExists, match="belongs to something else"):
        adapter.save(out, force=True)


def test_a_configuration_that_is_a_link_is_not_written_through(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CONFIG).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(OutputExists):
        adapter.save(tmp_path / "out" / "one.safetensors", force=True)
    assert (tmp_path / "elsewhere.json").read_text() == "{}"


# --- dry runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["out", "one.safetensors"])
def test_a_dry_run_knows_every_file_and_its_size(place: str, adapter: Adapter, tmp_path: Path) -> None:
    planned = describe_save(adapter, tmp_path / place, verb="normalize", dtype="bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    report = adapter.save(tmp_path / place, dtype="bf16", sync=False)
    assert planned["bytes_written"] == report.bytes
    assert [file["name"] for file in planned["files"]] == list(report.files)
    assert planned["bytes_read"] == sum(ref.spec.nbytes for ref in adapter.tensors)


def test_an_adapter_of_nothing_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no tensors"):
        replace(adapter, modules={}, tensors=(), extras={}).save(tmp_path / "out")


def test_torch_is_not_needed(folder: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, loratools as lt;"
        f"lt.load({str(folder)!r}).save({str(tmp_path / 'out')!r}, dtype='bf16', sync=False);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert saving.WEIGHTS_NAME in {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(("count", "words"), [(1, "; and 1 other reason"), (2, "; and 2 other reasons")])
def test_reasons_beyond_the_first_are_counted(count: int, words: str) -> None:
    from loratools.verbs import saving

    lost = {f"k{i}": f"reason {i}" for i in range(saving._NAMED + count)}
    with pytest.raises(Unsupported) as raised:
        saving.require_nothing_lost("it", "peft", lost, ())
    assert str(raised.value).partition("\n")[0].endswith(words)


@pytest.mark.parametrize("name", ["out.gguf", "out.ckpt", "out.bin", "out.pt", "out.npz"])
def test_a_folder_is_not_called_like_a_file(name: str, tmp_path: Path) -> None:
    adapter = lt.load(make_adapter(tmp_path / "in", {"model.layers.0.mlp.up_proj": (9, 7)}))
    for style in ("peft", "mlx"):
        with pytest.raises(Unsupported, match=rf"{style} has no {Path(name).suffix} files") as raised:
            adapter.save(tmp_path / name, format=style)
        assert str(tmp_path / "out") in str(raised.value.hint)
    assert not (tmp_path / name).exists()
