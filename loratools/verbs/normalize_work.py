"""One module of ``normalize`` made plain: its update in float64, as factors of the rank and type that are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from loratools.adapter import flat_shape
from loratools.dtypes import DTYPES
from loratools.matrices import matrices
from loratools.verbs.normalize_planning import HALVES, keeps_factors

if TYPE_CHECKING:
    from loratools.adapter import Module
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array
    from loratools.verbs.normalize_planning import Work

__all__ = ["Plain", "make_plain", "to_rank"]

_LOOSE = 2.5e-7  # from here on, factors that cancel are replaced by balanced ones
# Singular values of a resolved residual below this share of the whole are what float32 cannot tell from zero.
_NOTHING = 2.0**-26


@dataclass(frozen=True, slots=True)
class Plain:
    """What became of a module.

    Attributes:
        name: of it.
        factors: rounded as they will be stored: one pair, or one an expert.
        bias: what is added to the bias, rounded alike.
        norm: of the update, in float64.
        distance: of the rounded update from the true one, in the norm's unit.
    """

    name: str
    factors: tuple[LowRank, ...]
    bias: Array | None
    norm: float
    distance: float


def make_plain(item: Work, *, rank: int | None, dtype: str, unit: float, device: str = "cpu") -> Plain:
    """Make one module plain; see :func:`loratools.verbs.normalize.normalize`."""
    from loratools.deltas.algebra import norm

    truths = _truth(item)
    found = [_rounded(item, truth, rank, dtype, unit, device) for truth in truths]
    bias, off = _bias(item.module, dtype, unit)
    distance = math.hypot(off, *(apart for _, apart in found))
    size = math.hypot(
        0.0 if bias is None else float(_length(bias)) * unit, *(norm(truth.on(device)) for truth in truths)
    )
    return Plain(item.name, tuple(factors for factors, _ in found), bias, size, distance)


def _truth(item: Work) -> tuple[LowRank, ...]:
    """What the module adds, in float64: one delta, or one an expert; of DoRA, before it is scaled to its magnitude."""
    from loratools.deltas.algebra import add, factored
    from loratools.deltas.lowrank import LowRank

    module = item.module
    if item.base is None and module.kind != "dora":
        return matrices(module, item.name, double=True)
    options = {key: value for key, value in module.options.items() if key != "init"}
    tensors = {role: ref for role, ref in module.tensors.items() if role != "magnitude"}
    trained = matrices(replace(module, kind="lora", tensors=tensors, options=options), item.name, double=True)
    if item.base is None:
        return trained
    left, right, factor = _initial(item)
    return (factored(add([(1.0, trained[0]), (-factor, LowRank(left, right))])),)


def _initial(item: Work) -> tuple[Array, Array, float]:
    """The part of the base that training started from, as factors of (out, in)."""
    import numpy as np

    from loratools.deltas.residual import taken_out

    assert item.base is not None
    module, method = item.module, item.module.options["init"]
    weight = item.base.load().astype(np.float64)
    weight = weight.reshape(flat_shape(weight.shape))
    # PEFT decomposes a weight that is stored (in, out) as (out, in) for PiSSA, and as it is stored for OLoRA.
    as_stored = method == "olora" or not item.transposed
    left, right, factor = taken_out(
        weight if as_stored else weight.T, method, module.rank or 0, module.scaling or 0.0
    )
    return (right.T, left.T, factor) if item.transposed and as_stored else (left, right, factor)


def _rounded(
    item: Work, truth: LowRank, rank: int | None, dtype: str, unit: float, device: str
) -> tuple[LowRank, float]:
    """Factors as they will be stored, and how far ``unit`` times their product is from the truth."""
    from loratools.deltas.algebra import core, norm
    from loratools.deltas.lowrank import LowRank

    as_stored = partial(_as_stored, item=item, truth=truth, dtype=dtype, unit=unit, device=device)
    whole = LowRank(truth.up / unit, truth.down) if unit != 1.0 else truth
    stored = truth.up.shape[1]
    if rank is not None and rank < stored:
        return as_stored(core(whole.on(device)).truncate(rank))
    if item.base is not None:
        found = core(whole.on(device))
        limit = _NOTHING * norm(whole)
        kept = next((k for k in range(found.values.size) if found.tail(k) <= limit), found.values.size)
        whole, stored = found.truncate(max(kept, 1)), max(kept, 1)
    elif not keeps_factors(item.module) and stored > min(truth.shape):
        whole, stored = core(whole.on(device)).truncate(min(truth.shape)), min(truth.shape)
    best = as_stored(to_rank(whole, rank or stored))
    if (
        best[1] > _LOOSE * norm(truth) and dtype not in HALVES
    ):  # its terms cancel: balanced factors round better
        other = as_stored(core(whole.on(device)).truncate(rank or stored))
        best = min(best, other, key=lambda pair: pair[1])
    return best


def _as_stored(
    factors: LowRank, item: Work, truth: LowRank, dtype: str, unit: float, device: str
) -> tuple[LowRank, float]:
    from loratools.deltas.likeness import compare
    from loratools.deltas.lowrank import LowRank

    kept = LowRank(_through(item.name, factors.up, dtype), _through(item.name, factors.down, dtype))
    back = LowRank(kept.up.astype("f8") * unit, kept.down.astype("f8"))
    return kept, compare(truth, back, device=device).distance


def _through(name: str, values: Array, dtype: str) -> Array:
    """Values as they come back from a file of this type.

    Raises:
        NonFinite: one does not fit.
    """
    import numpy as np

    from loratools.dtypes import largest, narrow, widen
    from loratools.errors import NonFinite

    stored = DTYPES[dtype]
    flat = np.ascontiguousarray(values).reshape(-1)
    found = widen(narrow(flat, stored, np.empty(stored.nbytes(flat.size), np.uint8)), stored)
    if not np.isfinite(found).all():
        worst = float(np.abs(flat).max())
        raise NonFinite(
            f"{name}: a factor of {worst:g} does not fit {dtype} (largest {largest(stored):g})",
            hint="write a wider type: --dtype bf16 or f32",
        )
    return found.reshape(values.shape)


def to_rank(delta: LowRank, rank: int) -> LowRank:
    """The same delta with zeros up to a rank."""
    import numpy as np

    from loratools.deltas.lowrank import LowRank

    missing = rank - delta.up.shape[1]
    if missing <= 0:
        return delta
    return LowRank(np.pad(delta.up, ((0, 0), (0, missing))), np.pad(delta.down, ((0, missing), (0, 0))))


def _bias(module: Module, dtype: str, unit: float) -> tuple[Array | None, float]:
    """What is added to the bias, over ``unit``, as it will be stored; and the distance that rounding left."""
    if "up_bias" not in module.tensors:
        return None, 0.0
    truth = module.array("up_bias", double=True).reshape(-1) * (module.scaling or 0.0)
    stored = _through("the bias", truth / unit, dtype)
    return stored, float(_length(stored.astype("f8") * unit - truth))


def _length(values: Array) -> Any:
    import numpy as np

    return np.linalg.norm(values.astype(np.float64))
