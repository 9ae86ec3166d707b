"""Adapters of loralib, and the fused layout that PEFT before 0.3 took over from it.

A file holds bare factors, ``<module>.lora_A`` and ``<module>.lora_B``, and nothing says how they are scaled.
``MergedLinear`` adapts some of the equal blocks of a fused weight (q and v of qkv): ``lora_A`` has the factors of each
below one another, so has ``lora_B``, and block j adds B_j @ A_j to its own rows. That is one pair of n times the rank,
with the blocks of B on a diagonal.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, AdapterConfig, Extra, Module
from loratools.errors import BadConfig
from loratools.formats.refusals import why_broken
from loratools.tensors.base import TensorRef
from loratools.tensors.pieces import slab
from loratools.tensors.views import placed, reshaped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratools.tensors.base import TensorSource

__all__ = ["read_loralib", "unfused"]

_SUFFIXES = {".lora_A": "down", ".lora_B": "up"}
_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embeddings",
    "embedding",
    "embed_in",
)


def unfused(up: TensorRef, enabled: Sequence[bool]) -> TensorRef:
    """The upper factor of a fused weight as one matrix: each adapted block's rows in its place, and its own columns.

    Args:
        up: (out / len(enabled) * n, rank), with a convolution's 1 behind it perhaps, for n enabled blocks.
        enabled: of the blocks of the weight, which are adapted.

    Returns:
        (out, n * rank), zero outside the blocks.

    Raises:
        ShapeMismatch: its rows cannot be shared among the blocks.
    """
    count, rank = sum(enabled), up.shape[1]
    flat = reshaped(up, (up.shape[0], rank))
    height = up.shape[0] // count
    places = [index for index, on in enumerate(enabled) if on]
    blocks = [slab(flat, index, (height, rank)) for index in range(count)]
    corners = [(place * height, index * rank) for index, place in enumerate(places)]
    return placed(blocks, corners, (height * len(enabled), count * rank))


def read_loralib(
    name: str,
    source: TensorSource,
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> Adapter:
    """Turn bare factors into modules; reads no values.

    Args:
        name: what to call it in messages.
        source: the tensors.
        alpha: what the modules are scaled by, over their rank: loralib writes it nowhere.
        enable_lora: which blocks of a fused weight are adapted.

    Raises:
        BadConfig: ``alpha`` is no number, or ``enable_lora`` does not fit the factors.
    """
    if alpha is not None and not math.isfinite(alpha):
        raise BadConfig(f"{name}: the alpha given is {alpha}, expected a number")
    groups, others = _grouped(source)
    extras = {key: _extra(ref, groups, others) for key, ref in others.items()}
    modules: dict[str, Module] = {}
    broken: dict[str, str] = {}
    fused: list[str] = []
    alone = _alone(groups, enable_lora)
    for path, tensors in groups.items():
        problem = _problem(tensors)
        if problem is not None:
            broken[path] = problem
            extras |= {ref.name: Extra(ref, path, "unclaimed", problem) for ref in tensors.values()}
            continue
        count = tensors["down"].shape[0] // tensors["up"].shape[1]
        if count > 1 or alone:
            fused.append(path)
        enabled = enable_lora if enable_lora and (count > 1 or alone) else None
        modules[path] = _module(name, path, tensors, alpha, enabled)
    return Adapter(
        name=name,
        format="loralib",
        modules=modules,
        config=AdapterConfig(None, None, {}),
        metadata=source.metadata,
        extras=extras,
        evidence="lora_A and lora_B without .weight",
        kinds=("lora",),
        warnings=(),
        refusal=_refusal(alpha, fused, enable_lora) or why_broken(broken),
        tensors=tuple(TensorRef(source, key) for key in source.specs),
    )


def _grouped(source: TensorSource) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
    groups: dict[str, dict[str, TensorRef]] = {}
    others: dict[str, TensorRef] = {}
    for key in source.specs:
        role = _SUFFIXES.get(key[-7:])
        if role is None or len(key) == 7:
            others[key] = TensorRef(source, key)
        else:
            groups.setdefault(key[:-7], {})[role] = TensorRef(source, key)
    return groups, others


def _extra(ref: TensorRef, groups: Mapping[str, object], others: Mapping[str, TensorRef]) -> Extra:
    """What was trained beside the factors: whole layers, or biases alone."""
    owner, _, last = ref.name.rpartition(".")
    if last == "bias" and f"{owner}.weight" not in others:
        return Extra(ref, ref.name, "replacement", "bias=lora_only" if owner in groups else "bias=all")
    if last in {"weight", "bias"} and owner:
        return Extra(ref, ref.name, "replacement", "modules_to_save")
    return Extra(ref, ref.name, "unclaimed", "neither a factor nor a layer's weight")


def _problem(tensors: Mapping[str, TensorRef]) -> str | None:
    """Why these make no module; None where they do."""
    if tensors.keys() != {"down", "up"}:
        return f"{', '.join(ref.name for ref in tensors.values())} without the factor it belongs to"
    down, up = tensors["down"].shape, tensors["up"].shape
    if len(down) != 2 or len(up) != 2 or 0 in (*down, *up):
        return f"lora_A {list(down)} and lora_B {list(up)}, expected (rank, in) and (out, rank)"
    if down[0] % up[1] or up[0] % (down[0] // up[1]):
        return f"lora_A {list(down)} and lora_B {list(up)} have different ranks"
    return None


def _alone(groups: Mapping[str, Mapping[str, TensorRef]], enable_lora: Sequence[bool] | None) -> bool:
    """Whether one block of several is adapted, where the factors look like those of a plain layer.

    Raises:
        BadConfig: they do, and lie in layers of several names, some of which may well be plain.
    """
    if not enable_lora or sum(enable_lora) != 1 or len(enable_lora) == 1:
        return False
    names = sorted({path.rpartition(".")[2] for path in groups})
    if len(names) > 1:
        raise BadConfig(
            f"enable_lora names one block, and nothing says which of {', '.join(names)} are fused",
            hint="split the file into one for each",
        )
    return True


def _module(
    name: str,
    path: str,
    tensors: Mapping[str, TensorRef],
    alpha: float | None,
    enabled: Sequence[bool] | None,
) -> Module:
    down, up = tensors["down"], tensors["up"]
    rank = up.shape[1]
    count = down.shape[0] // rank
    if enabled is not None:
        if sum(enabled) != count:
            listed = ",".join(str(int(on)) for on in enabled)
            raise BadConfig(
                f"{name}: {path} adapts {count} blocks (lora_A {list(down.shape)}, lora_B {list(up.shape)}), and "
                f"enable_lora {listed} enables {sum(enabled)}"
            )
        up = unfused(up, enabled)
    options: dict[str, Any] = {"embedding": True} if path.rpartition(".")[2] in _EMBEDDINGS else {}
    options |= {"blocks": count} if count > 1 else {}
    shape = (up.shape[0], down.shape[1])
    whole = None if alpha is None else alpha * count
    scaling = None if alpha is None else alpha / rank
    return Module("lora", {"down": down, "up": up}, down.shape[0], whole, scaling, shape, options)


def _refusal(
    alpha: float | None, fused: Sequence[str], enable_lora: Sequence[bool] | None
) -> tuple[str, str] | None:
    if fused and not enable_lora:
        return (
            f"{fused[0]} adapts blocks of a fused weight (MergedLinear), and nothing says which",
            "--enable-lora says it, 1,0,1 for q and v of qkv",
        )
    if alpha is None:
        return (
            "nothing says how loralib's factors are scaled",
            "--alpha says it: the lora_alpha of the training",
        )
    return None
