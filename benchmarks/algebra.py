"""Combine, reduce, diff, inspect --spectrum and extract, whole processes, beside dense SVDs and the tools people use.

    python benchmarks/algebra.py [--rounds 3] [--data DIR] [--peers] [--mergekit EXECUTABLE] [--smoke]

The peers take minutes to hours on the whole model, so they are given one or two of its layers and the time beyond their
start is multiplied: all layers have the same shapes. Such figures are marked x. Extraction is judged by an exact SVD.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from data import Shape, hash_of, write_arrays, write_base, write_tuned
from safetensors import safe_open

SMALL = Shape(layers=2, hidden=128, inner=256, kv=32, vocabulary=512, shards=2)
LORATOOLS = [sys.executable, "-m", "loratools"]

DENSE = """
import sys, time, numpy as np
from safetensors.numpy import load_file
factors = load_file(sys.argv[1] + "/adapter_model.safetensors")
for key in [key for key in factors if ".layers.0." in key and "lora_A" in key]:
    delta = factors[key.replace("lora_A", "lora_B")] @ factors[key]
    np.linalg.svd(delta, full_matrices=False)
"""
PEFT = """
import sys, time, torch
from transformers import AutoConfig, AutoModelForCausalLM
from peft import PeftModel
how, rank, config, *adapters = sys.argv[1:]
config = AutoConfig.from_pretrained(config)
config.num_hidden_layers = 1
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
names = [str(i) for i in range(len(adapters))]
model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
for name, path in zip(names[1:], adapters[1:]):
    model.load_adapter(path, adapter_name=name)
started = time.perf_counter()
extra = {"svd_rank": int(rank)} if "svd" in how else {}
extra |= {"density": 0.5} if "ties" in how else {}
model.add_weighted_adapter(names, [0.4, 0.3, 0.2, 0.1], "sum", combination_type=how, **extra)
print(time.perf_counter() - started)
"""
LYCORIS = """
import sys, time, torch
from safetensors.torch import load_file
from lycoris.utils import extract_linear
base, tuned = (load_file(path) for path in sys.argv[1:3])
started = time.perf_counter()
for name in [n for n in base if ".layers.0." in n and n.endswith("_proj.weight")]:
    extract_linear((tuned[name].float() - base[name].float()), mode="fixed", mode_param=int(sys.argv[3]), device="cpu")
print(time.perf_counter() - started)
"""


# A small process to start others from: what a process has held at most counts what it was forked from.
STOPWATCH = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - started, os.waitstatus_to_exitcode(status), usage.ru_maxrss, file=sys.stderr)
"""


def main() -> None:
    """Parse, make the data, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--peers", action="store_true", help="time PEFT and dense SVDs too: a few minutes")
    parser.add_argument(
        "--mergekit",
        type=Path,
        help="mergekit-extract-lora, from an environment of its own that has LyCORIS too",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, one round: does the benchmark itself work?"
    )
    options = parser.parse_args()
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), SMALL, 1, (16, 4, 8), peers=False, mergekit=None)
    else:
        measure(
            options.data,
            Shape(),
            options.rounds,
            (128, 32, 48),
            peers=options.peers,
            mergekit=options.mergekit,
        )


def measure(
    data: Path, shape: Shape, rounds: int, ranks: tuple[int, int, int], *, peers: bool, mergekit: Path | None
) -> None:
    """Every workload in turn; ``ranks`` are those before and after reducing, and of the pair that is compared."""
    high, low, middle = ranks
    base, tuned, out = data / f"base-{shape.layers}", data / f"tuned-{shape.layers}", data / "out-algebra"
    write_base(base, shape)
    write_tuned(base, tuned, shape)
    wide = adapter(data, shape, high, 0)
    four = [adapter(data, shape, low // 2, seed) for seed in range(4)]
    pair = [adapter(data, shape, middle, seed) for seed in range(2)]
    weights = ["-w", "0.4", "-w", "0.3", "-w", "0.2", "-w", "0.1"]
    rank = str(low // 2)
    combine = ["combine", *map(str, four), *weights, "-o", str(out)]
    commands = {
        f"reduce {high} to {low}": ["reduce", str(wide), str(out), "--rank", str(low)],
        "combine four, exactly": combine,
        f"combine four to rank {rank}": [*combine, "--rank", rank],
        f"combine four by TIES to rank {rank}": [
            *combine,
            "--method",
            "ties",
            "--density",
            "0.5",
            "--rank",
            rank,
        ],
        "diff": ["diff", *map(str, pair)],
        "inspect --spectrum": ["inspect", str(pair[0]), "--spectrum"],
        f"extract rank {low}": ["extract", str(base), str(tuned), str(out), "--rank", str(low)],
    }
    print("| workload | seconds: median [min-max] | peak MB |")
    print("|---|---|---|")
    for name, arguments in commands.items():
        times, peak = [], 0.0
        for _ in range(1 if "TIES" in name else rounds):
            shutil.rmtree(out, ignore_errors=True)
            seconds, held = timed([*LORATOOLS, *arguments, "--quiet"], allowed=(0, 1))
            times.append(seconds)
            peak = max(peak, held)
        print(
            f"| {name} | {statistics.median(times):.2f} [{min(times):.2f}-{max(times):.2f}] | {peak:.0f} |",
            flush=True,
        )
    print(f"\nextraction, error over the exact SVD's (layer 0): {excess(base, tuned, out, low)}\n")
    if peers:
        time_peers(shape, base, wide, four, rank)
    if mergekit is not None:
        time_extractors(mergekit, data, shape, low)


def adapter(data: Path, shape: Shape, rank: int, seed: int) -> Path:
    """An adapter whose singular values fall as trained ones do; written unless it is there."""
    folder = data / f"adapter-{shape.layers}-r{rank}-{seed}"
    if (folder / "adapter_config.json").exists():
        return folder
    arrays = {}
    falling = ((np.arange(rank) + 1.0) ** -0.8 * np.exp(-np.arange(rank) / rank)).astype(np.float32)
    for n in range(shape.layers):
        for name, (rows, into) in shape.linears.items():
            key = f"base_model.model.model.layers.{n}.{name}"
            rng = np.random.default_rng([hash_of(key), seed])
            arrays[f"{key}.lora_A.weight"] = rng.standard_normal((rank, into), np.float32) / np.float32(
                into**0.5
            )
            arrays[f"{key}.lora_B.weight"] = (
                rng.standard_normal((rows, rank), np.float32) * falling * np.float32(0.01)
            )
    write_arrays(folder, arrays, shape, rank, 2 * rank)
    return folder


def timed(command: list[str], allowed: tuple[int, ...] = (0,)) -> tuple[float, float]:
    """Seconds of a whole process, and the megabytes it held at most."""
    done = subprocess.run(
        [sys.executable, "-c", STOPWATCH, *command], capture_output=True, text=True, check=False
    )
    *errors, last = done.stderr.splitlines()
    seconds, code, held = last.split()
    if int(code) not in allowed:
        raise SystemExit(f"{' '.join(command[:4])} failed: {' '.join(errors)[-800:]}")
    return float(seconds), float(held) * (1 if sys.platform == "darwin" else 1024) / 1e6


def excess(base: Path, tuned: Path, out: Path, rank: int) -> str:
    """How much larger the error of the extracted adapter is than the best possible, over the matrices of layer 0."""
    weights = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    found = []
    with safe_open(out / "adapter_model.safetensors", "np") as factors:
        for name in (n for n in weights if n.startswith("model.layers.0.") and n.endswith("_proj.weight")):
            delta = read(tuned / weights[name], name) - read(base / weights[name], name)
            key = f"base_model.model.{name.removesuffix('.weight')}"
            product = factors.get_tensor(f"{key}.lora_B.weight") @ factors.get_tensor(f"{key}.lora_A.weight")
            best = np.linalg.norm(np.linalg.svd(delta.astype(np.float64), compute_uv=False)[rank:])
            found.append(np.linalg.norm(delta - product.astype(np.float64)) / best - 1)
    return f"mean {np.mean(found):.1e}, worst {max(found):.1e}"


def read(path: Path, name: str) -> np.ndarray:
    """A bfloat16 tensor of a shard, in float32."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        first, last = entry["data_offsets"]
        file.seek(8 + size + first)
        raw = np.frombuffer(file.read(last - first), ml_dtypes.bfloat16)
    return raw.astype(np.float32).reshape(entry["shape"])


def time_peers(shape: Shape, base: Path, wide: Path, four: list[Path], rank: str) -> None:
    """Dense SVDs and PEFT on one layer, multiplied."""
    print("| peer | seconds on one layer | whole model, x |")
    print("|---|---|---|")
    seconds, _ = timed([sys.executable, "-c", DENSE, str(wide)])
    print(f"| dense SVD of each delta (numpy) | {seconds:.1f} | {seconds * shape.layers:.0f} |", flush=True)
    for how in ("cat", "svd", "ties_svd"):
        spent = inside([sys.executable, "-c", PEFT, how, rank, str(base), *map(str, four)])
        print(f"| PEFT add_weighted_adapter {how} | {spent:.1f} | {spent * shape.layers:.0f} |", flush=True)


def inside(command: list[str]) -> float:
    """Seconds a script measured itself, its start left out; NaN where the peer is not installed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")


def time_extractors(executable: Path, data: Path, shape: Shape, rank: int) -> None:
    """mergekit on one layer and on two, whose difference is a layer; and LyCORIS, from the same environment."""
    spent = []
    for layers in (1, 2):
        part = replace(shape, layers=layers, shards=1)
        base, tuned, out = data / f"base-{layers}", data / f"tuned-{layers}", data / "out-mergekit"
        write_base(base, part)
        write_tuned(base, tuned, part)
        shutil.rmtree(out, ignore_errors=True)
        options = [f"--model={tuned}", f"--base-model={base}", f"--out-path={out}", f"--max-rank={rank}"]
        exclude = ["--exclude-regex=embed_tokens|lm_head"]
        spent.append(timed([str(executable), *options, *exclude])[0])
    layer = spent[1] - spent[0]
    print(f"| mergekit-extract-lora | {layer:.1f} | {spent[0] + layer * (shape.layers - 1):.0f} |")
    files = [str(data / f"{name}-1" / "model-00001-of-00001.safetensors") for name in ("base", "tuned")]
    seconds = inside([str(executable.parent / "python"), "-c", LYCORIS, *files, str(rank)])
    print(f"| LyCORIS extract_linear | {seconds:.1f} | {seconds * shape.layers:.0f} |", flush=True)


if __name__ == "__main__":
    main()
