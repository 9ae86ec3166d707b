"""Mutate valid safetensors files; each mutant must be refused as corrupt, or be readable to its last byte.

``python attacks/fuzz_header.py [--seed N] [--iterations N]`` exits 1 at the first that is neither.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check", "fuzz", "mutate", "seeds"]

# Values that have broken parsers: boundaries of integer types, the wrong type, numbers that are not numbers.
_VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 1.0, 0.5,
    1e999, float("nan"), True, False, None, "", "F32", "F4", "BF16", "I64", "F6_E2M3", "BOOL", "f32", "\0",
    "\n", "\ud800", [], [0], [0, 0], [[0, 8]], {}, {"a": "b"},
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
)  # fmt: skip


def seeds() -> list[bytes]:
    """Valid files of every dtype that safetensors writes from numpy, with and without metadata."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save

    kinds = [np.float32, np.float16, np.float64, np.int8, np.int64, np.bool_, ml_dtypes.bfloat16]
    many = {f"layers.{i}.weight": np.zeros((2, i), kind) for i, kind in enumerate(kinds)}
    return [
        save({"w": np.zeros(2, np.float32)}),
        save(many),
        save(many, {"format": "pt", "note": "\u00e9"}),
        save({}),
        save({"scalar": np.ones((), np.float32), "empty": np.zeros((0, 3), np.float16)}),
    ]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON document with each of its keys."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from _places(node[key])


def _mutate_tree(rng: random.Random, text: bytes) -> bytes:
    """Change, remove, rename or duplicate something in the header's JSON."""
    tree = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            break
        node, key = rng.choice(places)
        action = rng.randrange(4)
        if action == 0:
            node[key] = copy.deepcopy(rng.choice(_VALUES))
        elif action == 1:
            del node[key]
        elif action == 2 and isinstance(node, dict):
            node[rng.choice(["w", "", "__metadata__", "dtype", "a\u202eb", "x" * 1500])] = node.pop(key)
        elif isinstance(node, list):
            node.append(copy.deepcopy(rng.choice(_VALUES)))
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, remove, insert or repeat bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(changed))
        action = rng.randrange(4)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del changed[at : at + rng.randint(1, 8)]
        elif action == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 40)]
    return bytes(changed)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """One mutant of a valid file."""
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    action = rng.randrange(5)
    if action == 0:
        return _mutate_bytes(rng, data)
    if action == 1:
        return rng.choice([0, 1, 2, length - 1, length + 1, 2**31, 2**63]).to_bytes(8, "little") + text + rest
    if action == 2:
        rest = rest[: rng.randint(0, len(rest))] + bytes(rng.randint(0, 9))
    text = _mutate_bytes(rng, text) if action == 3 else _mutate_tree(rng, text)
    return len(text).to_bytes(8, "little") + text + rest


def check(path: Path) -> bool:
    """Whether a file can be read to its last byte; False where it is refused as corrupt.

    Raises:
        Exception: anything but a clear refusal.
    """
    from loratools.errors import CorruptFile
    from loratools.tensors.safetensors import SafetensorsFile

    try:
        source = SafetensorsFile(path)
    except CorruptFile:
        return False
    position = source.header.data_start
    for name, spec in source.specs.items():
        raw = source.read_bytes(name)
        if raw.size != spec.nbytes or source.header.offsets[name] != position:
            raise AssertionError(f"{name}: {raw.size} bytes at {source.header.offsets[name]}")
        if spec.dtype.numpy is not None and source.read(name).size != spec.count:
            raise AssertionError(f"{name}: not {spec.count} values")
        position += spec.nbytes
    if position != path.stat().st_size:
        raise AssertionError("bytes of no tensor")
    source.file.close()
    return True


def fuzz(iterations: int, seed: int, folder: Path) -> tuple[int, int]:
    """Check valid files, then mutants of them.

    Returns:
        How many mutants were readable, and how many were refused.

    Raises:
        AssertionError: one was neither; its file stays in ``folder``.
    """
    rng, valid, path = random.Random(seed), seeds(), folder / "mutant.safetensors"  # noqa: S311 - no secret
    for data in valid:
        path.write_bytes(data)
        if not check(path):
            raise AssertionError(f"{path}: what safetensors wrote was refused")
    readable = 0
    for number in range(iterations):
        path.unlink()  # some file systems flush a file that is truncated and written anew
        path.write_bytes(mutate(rng, rng.choice(valid)))
        try:
            readable += check(path)
        except Exception as error:
            raise AssertionError(f"seed {seed}, iteration {number}: {error!r}; see {path}") from error
    path.unlink()
    return readable, iterations - readable


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            readable, refused = fuzz(options.iterations, options.seed, Path(folder))
        except AssertionError as error:
            kept = Path("mutant.safetensors")
            kept.write_bytes((Path(folder) / kept.name).read_bytes())
            sys.exit(f"{error}\nkept as {kept}")
    sys.stdout.write(f"{options.iterations} mutants: {refused} refused, {readable} readable\n")


if __name__ == "__main__":
    main()
