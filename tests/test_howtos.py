"""The how-to pages do what they say: every command and every Python block is run, in order, a page a folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from loratools.cli.app import app
from tests.dialects import kohya_flux, kohya_sd1
from tests.diffusion_helpers import checkpoint, factors, pipeline_tensors, write, write_pipeline
from tests.helpers import make_adapter
from tests.small import SHAPES, write_base

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = sorted((Path(__file__).parent.parent / "docs" / "howto").glob("*.md"))
_BLOCK = re.compile(r"```(console|python)\n(.*?)```", re.DOTALL)
LARGE = {f"layers.{i}.proj": (512, 512) for i in range(56)}  # at rank 64, 14.7 MB


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Every command of a page with its kind, and every Python block."""
    for kind, text in _BLOCK.findall(page.read_text()):
        if kind == "python":
            yield kind, text
            continue
        for line in text.splitlines():
            assert line.startswith("$ "), f"{page.name}: {line!r} is no command"
            yield kind, line.removeprefix("$ ")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The adapters and checkpoints the pages speak of."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("ink", "pastel", "step-100", "step-200")):
        make_adapter(tmp_path / name, SHAPES, seed=seed)
    save_file(kohya_sd1(), tmp_path / "ink-kohya.safetensors", metadata={"ss_base_model_version": "sd_v1"})
    save_file(
        kohya_flux(), tmp_path / "poster-kohya.safetensors", metadata={"ss_base_model_version": "flux1"}
    )
    make_adapter(tmp_path / "large", LARGE, rank=64, alpha=64)
    make_adapter(tmp_path / "stabilised", SHAPES, rank=16, alpha=16, use_rslora=True)
    write_base(tmp_path / "base")
    rng = np.random.default_rng(0)
    for name in ("tuned", "tuned-longer"):
        write_base(tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        for path, (out, into) in SHAPES.items():
            change = rng.standard_normal((out, 2)) @ rng.standard_normal((2, into))
            weights[f"{path}.weight"] += (0.1 * change).astype(np.float32)
        save_file(weights, tmp_path / name / "model.safetensors")
    write_diffusion_models(tmp_path)
    return tmp_path


def write_diffusion_models(folder: Path) -> None:
    """A small Stable Diffusion 1, as one file and as a pipeline, and adapters of it in two dialects."""
    write(folder / "sd15.safetensors", checkpoint("sd1"))
    write_pipeline(folder / "sd15-pipeline", pipeline_tensors("sd1"))
    block = "{}_attentions_0_transformer_blocks_0_attn2_to_k"
    for seed, name in enumerate(("style", "ink")):
        found = {}
        for stem, out in (("down_blocks_2", 40), ("mid_block", 40), ("up_blocks_1", 40)):
            found |= factors(f"lora_unet_{block.format(stem)}", out, 24, seed=seed)
        found |= factors("lora_te_text_model_encoder_layers_0_mlp_fc1", 96, 24, seed=seed)
        write(folder / f"{name}.safetensors", found)
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    write(folder / "style-diffusers.safetensors", _dotted(factors(path, 40, 24, alpha=None, seed=1)))
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"  # in the family's own sizes
    kohya = factors(stem, 1280, 768, alpha=None)
    write(folder / "portrait.safetensors", kohya)
    renamed = {name.replace(stem, path): value for name, value in kohya.items()}
    write(folder / "portrait-diffusers.safetensors", _dotted(renamed))
    write(folder / "etching-diffusers.safetensors", _dotted(factors(path, 1280, 768, alpha=None)))


def _dotted(kohya: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): kohya[name] for name in kohya}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, folder: Path) -> None:
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, page.name, "exec"), {})
            continue
        command, _, remark = text.partition("  # exit ")
        words = shlex.split(command)
        assert words[0] == "loratools"
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == int(remark or 0), f"{command}: {result.output}"
        if "--json" in words:
            assert json.loads(result.stdout)["schema"].startswith("loratools.")


def test_the_page_on_size_keeps_to_it(folder: Path) -> None:
    assert (folder / "large" / "adapter_model.safetensors").stat().st_size > 10_000_000
    result = CliRunner().invoke(app, ["reduce", "large", "small", "--size", "10MB"])
    assert result.exit_code == 0, result.output
    assert 9_000_000 < (folder / "small" / "adapter_model.safetensors").stat().st_size <= 10_000_000
