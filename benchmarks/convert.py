"""Conversions of adapters of about 150 MB: whole processes, medians; prints a table.

    python benchmarks/convert.py [--rounds 3] [--smoke]

Files are made from a seed, of the linear layers that the architectures' tables list. The disk sync is included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from algebra import STOPWATCH
from data import Shape, write_adapter
from safetensors.numpy import save_file

from loratools.architectures.base import architecture, flat

SMALL = Shape(layers=2, hidden=128, inner=256, kv=32, vocabulary=512, shards=1)
LLAMA = Shape(layers=22)


def main() -> None:
    """Parse, make the files, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--smoke", action="store_true", help="small files, one round: does the benchmark work?"
    )
    options = parser.parse_args()
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), 1 if options.smoke else options.rounds, small=options.smoke)


def measure(data: Path, rounds: int, *, small: bool) -> None:
    """Every conversion in turn."""
    flux, sdxl, lora = data / "flux.safetensors", data / "sdxl.safetensors", data / "adapter"
    write_kohya(flux, "flux1", 1 if small else 16)
    write_kohya(sdxl, "sdxl", 1 if small else 24)
    shape = SMALL if small else LLAMA
    write_adapter(lora, shape, rank=8 if small else 48)
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": shape.hidden}
    base = data / "base"
    base.mkdir()
    config = {
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocabulary,
        **heads,
    }
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": shape.inner}))
    split = data / "flux-diffusers.safetensors"
    run(["convert", str(flux), str(split), "--to", "diffusers"])
    commands = {
        "SDXL, kohya to diffusers": [sdxl, "out.safetensors", "--to", "diffusers"],
        "Flux, kohya to diffusers (split)": [flux, "out.safetensors", "--to", "diffusers"],
        "Flux, diffusers to kohya (fused)": [split, "out.safetensors", "--to", "kohya"],
        "Llama, PEFT to MLX": [lora, "out", "--to", "mlx"],
        "Llama, PEFT to GGUF": [lora, "out.gguf", "--to", "gguf", "--base", base],
    }
    print("| conversion | MB read | seconds: median [min-max] | peak MB |")
    print("|---|---|---|---|")
    for title, (source, out, *rest) in commands.items():
        seconds, peak = [], 0
        for index in range(rounds):
            place = data / str(index) / out
            place.parent.mkdir(exist_ok=True)
            taken, held = run(["convert", str(source), str(place), *map(str, rest), "--force"])
            seconds.append(taken)
            peak = max(peak, held)
        size = source.stat().st_size if source.is_file() else sum(p.stat().st_size for p in source.iterdir())
        spread = f"{statistics.median(seconds):.2f} [{min(seconds):.2f}-{max(seconds):.2f}]"
        print(f"| {title} | {size / 1e6:.0f} | {spread} | {peak} |", flush=True)


def write_kohya(path: Path, family: str, rank: int) -> None:
    """A LoRA of the denoiser's linear layers, half precision, alpha the rank."""
    rng, tensors = np.random.default_rng(0), {}
    component = architecture(family).components[0]
    for weight in component.weights:
        if len(weight.shape) != 2 or 0 in weight.shape or weight.tensor != "weight":
            continue
        stem = f"{component.kohya[0]}_{flat(weight.native)}"
        tensors[f"{stem}.lora_down.weight"] = rng.standard_normal((rank, weight.shape[1]), "f4").astype("f2")
        tensors[f"{stem}.lora_up.weight"] = rng.standard_normal((weight.shape[0], rank), "f4").astype("f2")
        tensors[f"{stem}.alpha"] = np.array(float(rank), "f4")
    save_file(tensors, path)


def run(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak memory (MB) of a command of its own."""
    command = [sys.executable, "-c", STOPWATCH, sys.executable, "-m", "loratools", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, status, held = done.stderr.split()[-3:]
    if int(status):
        raise SystemExit(f"{arguments} failed: {done.stderr}")
    unit = 1 if sys.platform == "darwin" else 1024
    return float(seconds), int(held) * unit // 1_000_000


if __name__ == "__main__":
    main()
