"""Shared by the tests: adapters and bases written from seeds, PEFT as an oracle, and what "the same" means.

Torch, PEFT and transformers are imported inside the functions: tests without them do not pay for them.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

# Share of touched elements that may differ after rounding, where the order of two additions is not fixed.
SHARES = {"torch.bfloat16": 2e-5, "torch.float16": 1e-4}
FLOAT32 = 1e-6  # relative Frobenius error per tensor
HANDFUL = 2  # elements that may differ in a tensor too small for a share to mean anything


# --- writing inputs --------------------------------------------------------------------------------------


def randomise(model: torch.nn.Module, seed: int = 0, *, only: str = "", scale: float = 0.05) -> None:
    """Give every trainable parameter whose name contains ``only`` normal values from a seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if only in name and parameter.requires_grad and parameter.is_floating_point():
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(values)


def save_state(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    """Write a state dict as one safetensors file."""
    from safetensors.torch import save_file

    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)
    return path


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file, or of all such files in a folder."""
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: value for file in files for name, value in load_file(file).items()}


def save_adapter(model: Any, folder: Path, *, dtype: torch.dtype | None = None) -> Path:
    """``save_pretrained`` of a PeftModel, with the file's floats cast to ``dtype`` afterwards."""
    model.save_pretrained(folder)
    if dtype is not None:
        file = folder / "adapter_model.safetensors"
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_state(file).items()}
        save_state(cast, file)
    return folder


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    """A PEFT folder from numpy arrays and configuration fields, without PEFT."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    fields = {"peft_type": "LORA", "peft_version": "0.21.2", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2))
    return folder


def make_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], *, rank: int = 4, alpha: float = 6, seed: int = 0,
    **config: Any,
) -> Path:  # fmt: skip
    """A small PEFT LoRA from a seed.

    Args:
        folder: where to write it.
        shapes: (out, in) by module path in the base.
        rank: of every module.
        alpha: of every module.
        seed: of the values.
        config: further fields of ``adapter_config.json``.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for path, (out, into) in shapes.items():
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, into), np.float32) * 0.1
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((out, rank), np.float32) * 0.1
    targets = sorted({path.rpartition(".")[2] for path in shapes})
    return write_adapter(
        folder, tensors, **{"r": rank, "lora_alpha": alpha, "target_modules": targets, **config}
    )


class NoReads:
    """A source whose values must not be read: for tests that a plan is made from headers."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name} was read")

    def read_bytes(self, name: str, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name} was read")


class Flaky:
    """An executor that fails at one of the items: what a crash leaves behind."""

    jobs = 1
    remote = False
    peak_memory = 0

    def __init__(self, fail_at: int, error: BaseException) -> None:
        self.fail_at = fail_at
        self.error = error

    def map(self, function: Any, items: Any) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == self.fail_at:
                raise self.error
            yield function(item)


# --- running the oracle and ourselves --------------------------------------------------------------------


def merged_by_peft(base: Any, folder: Path, *, safe: bool = False, **load: Any) -> dict[str, torch.Tensor]:
    """``merge_and_unload`` of an adapter folder on ``base``, which is changed: pass a copy."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, folder, **load)
    merged = model.merge_and_unload(safe_merge=safe)
    return {name: value.detach().clone() for name, value in merged.state_dict().items()}


def merged_by_us(
    base: Path, adapters: Path | Sequence[Path], out: Path, **options: Any
) -> dict[str, torch.Tensor]:
    """Our merge, from files to a file, read back."""
    import loratools as lt

    lt.merge(base, adapters, out, sync=False, **options)
    return load_state(out)


def digest(path: Path) -> dict[str, str]:
    """sha256 of every file, but for the record of when and how it was made."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- comparing -------------------------------------------------------------------------------------------


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, in float64."""
    wide, truth = actual.double(), expected.double()
    norm = truth.norm().item()
    return (wide - truth).norm().item() / norm if norm else wide.norm().item()


def ulps(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Distance of two tensors of a 16-bit float in steps of that type (a sign change counts through zero)."""
    import torch

    def ordered(value: torch.Tensor) -> torch.Tensor:
        bits = value.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(actual) - ordered(expected)).abs()


def differing(name: str, actual: torch.Tensor, expected: torch.Tensor) -> int:
    """How many elements of a 16-bit tensor differ, none by more than one step where the value is at least 2^-10.

    Next to zero a difference of one float32 rounding may be many steps. A float32 tensor must be equal to its
    tolerance, and any other tensor exactly; they count as no difference.
    """
    import torch

    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)}, expected {list(expected.shape)}"
    if actual.dtype == torch.float32:
        error = relative(actual, expected)
        assert error <= FLOAT32, f"{name}: relative error {error:.2e}"
        return 0
    if str(actual.dtype) not in SHARES:
        assert torch.equal(actual, expected), name
        return 0
    steps = ulps(actual, expected)
    large = steps[expected.float().abs() >= 2.0**-10]
    assert not (large > 1).any(), (
        f"{name}: off by {int(large.max())} steps, relative error {relative(actual, expected):.2e}, "
        f"{int((steps > 0).sum())} of {steps.numel()} elements differ"
    )
    return int((steps > 0).sum())


def assert_same(name: str, actual: torch.Tensor, expected: torch.Tensor, *, slack: int = 1) -> None:
    """One tensor, equal to float32's tolerance; in 16 bits, all but the allowed share of its elements."""
    _assert_few(name, differing(name, actual, expected), actual.numel(), actual, slack)


def assert_same_tensors(
    actual: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    before: Mapping[str, torch.Tensor],
    *,
    slack: int = 1,
) -> None:
    """The same names and the same values, where ``before`` says which tensors are touched.

    Untouched ones must be equal bit for bit; a share of all elements of the touched ones may differ, and ``slack``
    times that where ``expected`` comes from other arithmetic than float32's.
    """
    import torch

    assert set(actual) == set(expected), f"only one side has {sorted(set(actual) ^ set(expected))}"
    touched = changed_names(expected, before)
    assert touched, "the oracle changed nothing"
    for name in set(expected) - touched:
        assert torch.equal(actual[name], expected[name]), f"{name} was to stay as it is"
    counts = {name: differing(name, actual[name], expected[name]) for name in touched}
    elements = sum(actual[name].numel() for name in touched)
    worst = max(counts, key=counts.__getitem__)
    _assert_few(f"{worst} and others", sum(counts.values()), elements, actual[worst], slack)


def _assert_few(name: str, different: int, elements: int, like: torch.Tensor, slack: int = 1) -> None:
    allowed = slack * max(HANDFUL, int(SHARES.get(str(like.dtype), 0) * elements))
    assert different <= allowed, f"{name}: {different} of {elements} elements differ, {allowed} may"


def changed_names(after: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> set[str]:
    """Tensors that are not what they were, bit for bit."""
    import torch

    return {
        name
        for name, value in after.items()
        if name not in before or value.shape != before[name].shape or not torch.equal(value, before[name])
    }


def rounded_once(wide: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Float64 values rounded to nearest even in the type of ``like``, once.

    Conversions to bfloat16 go through float32 and round twice; rounding to odd on the way makes it harmless.
    """
    import ml_dtypes
    import torch

    values = wide.detach().double().numpy()
    if like.dtype == torch.float16:
        return torch.from_numpy(values.astype(np.float16))
    single = values.astype(np.float32)
    if like.dtype == torch.float32:
        return torch.from_numpy(single)
    assert like.dtype == torch.bfloat16, like.dtype
    single = np.where(np.abs(single) > np.abs(values), np.nextafter(single, np.float32(0)), single)
    odd = single.view(np.int32) | (single != values)
    narrow = odd.view(np.float32).astype(ml_dtypes.bfloat16)
    return torch.from_numpy(narrow.view(np.int16)).view(torch.bfloat16)
