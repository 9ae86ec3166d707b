"""The work of ``reduce`` on one module: its singular values, the rank a rule gives it, its nearest delta of a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loratools.adapter import Module, flat_shape
from loratools.deltas.algebra import core, singular_values
from loratools.deltas.likeness import compare
from loratools.deltas.lowrank import LowRank, expert
from loratools.deltas.ranks import joined, rank_above, rank_for_energy, rank_for_error, rounding_variances
from loratools.dtypes import largest, narrow
from loratools.errors import InputError, NonFinite, Unsupported
from loratools.matrices import bias_delta, lora_module, matrices
from loratools.tensors.base import TensorRef, TensorSpec
from loratools.tensors.memory import from_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratools.deltas.algebra import Core
    from loratools.dtypes import Array, Dtype
    from loratools.verbs.reduce_rules import Rule

__all__ = ["Item", "Made", "Outcome", "least_rank", "of_rank", "reduced", "spectrum", "truncated"]

# Roles of a plain LoRA's tensors, and options that leave its two factors what they are.
_PLAIN_ROLES = {"up", "down", "up_bias"}
_PLAIN_OPTIONS = {"embedding", "experts", "blockwise", "parameter", "blocks"}
_HALF = 2  # bytes of the types whose rounding is worth measuring: what float32 loses is a ten-millionth


@dataclass(frozen=True, slots=True)
class Item:
    """One module to work on, and the rank it is to get, where that is known."""

    name: str
    module: Module
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Made:
    """A module of the result.

    Attributes:
        module: as it will be stored.
        distance: ‖before - after‖ of the factors as they are stored; None where the singular values say it.
    """

    module: Module
    distance: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One module, reduced.

    Attributes:
        values: the singular values before, descending; of several experts, the i-th of all together.
        rank: it got.
        made: the result; None where nothing is left.
    """

    values: Array
    rank: int
    made: Made | None


def spectrum(item: Item, device: str = "cpu") -> Array:
    """The singular values of a module's scaled delta."""
    return joined([singular_values(one) for one in _on(matrices(item.module, item.name), device)])


def reduced(item: Item, rule: Rule, dtype: Dtype, device: str = "cpu") -> Outcome:
    """A module by a rule that looks at nothing else."""
    truths = matrices(item.module, item.name)
    cores = [core(one) for one in _on(truths, device)]
    values = joined([one.values for one in cores])
    rank = max(_rank(item, rule, cores, values), least_rank(item.module))
    if not rank:
        return Outcome(values, rank, None)
    item = replace(item, rank=rank)
    whole = _whole(item)
    made = _nearest(item, truths, cores, dtype) if whole is None else _kept(item, whole, dtype)
    return Outcome(values, rank, made)


def truncated(item: Item, dtype: Dtype, device: str = "cpu") -> Made:
    """A module at the rank it was given."""
    truths = matrices(item.module, item.name)  # also where they are kept: it refuses what is not finite
    if (whole := _whole(item)) is not None:
        return _kept(item, whole, dtype)
    return _nearest(item, truths, [core(one) for one in _on(truths, device)], dtype)


def least_rank(module: Module) -> int:
    """1 where a module must stay because it also adds to a bias; else 0."""
    return int(module.changes_bias)


def _on(deltas: Sequence[LowRank], device: str) -> list[LowRank]:
    return [one if device == "cpu" else one.on(device) for one in deltas]


def _rank(item: Item, rule: Rule, cores: Sequence[Core], values: Array) -> int:
    if rule.name == "rank":
        return int(rule.value or 0)
    if rule.name == "energy":
        return rank_for_energy(values, rule.value or 0.0)
    if rule.name == "error":
        return rank_for_error(values, rule.value or 0.0)
    return rank_above(values, joined(_noise(item, cores)))


# --- the noise floor -----------------------------------------------------------------------------------------


def _noise(item: Item, cores: Sequence[Core]) -> list[Array]:
    """What rounding the factors to their stored type may have made of each component: (k,) for each matrix.

    The delta is off by dB A + B dA. Where the columns of dB and the rows of dA are white noise of deviations b and a,
    that is, along singular vectors u and v, at most (√out + √r) ‖b A v‖ and (√in + √r) ‖a Bᵀ u‖: the edge of white
    noise (Marchenko and Pastur).
    """
    module = item.module
    if (
        module.kind != "lora"
        or {"up_blocks", "down_blocks"} & module.options.keys()
        or "diag" in module.tensors
    ):
        raise Unsupported(
            f"{item.name}: the noise floor is known for the two factors of a plain LoRA, and it is {module.kind}",
            hint="use --energy or --error",
        )
    up, down = module.array("up", double=True), module.array("down", double=True)
    if not all(np.isfinite(values).all() for values in (up, down)):
        raise InputError(f"{item.name}: a factor holds values that are not finite")
    up, down = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
    by_column = np.sqrt(rounding_variances(up, module.tensors["up"].spec.dtype, axis=0))
    by_row = np.sqrt(rounding_variances(down, module.tensors["down"].spec.dtype, axis=1))
    noisy_up, noisy_down = up * by_row, down * by_column[:, None]
    count, blockwise = module.options.get("experts", 1), module.options.get("blockwise", False)
    found = []
    for index, one in enumerate(cores):
        own_up, own_down = noisy_up, noisy_down
        if count > 1:
            own_up, own_down = expert(noisy_up, noisy_down, index, count, blockwise=blockwise)
        rank, scaling = own_down.shape[0], abs(module.scaling or 0.0)
        edges = [(math.sqrt(side) + math.sqrt(rank)) * scaling for side in one.shape]
        by_up = edges[0] * np.linalg.norm(own_down @ one.right().T, axis=0)
        by_down = edges[1] * np.linalg.norm(one.left().T @ own_up, axis=1)
        found.append(np.hypot(by_up, by_down))
    return found


# --- the result ----------------------------------------------------------------------------------------------


def _whole(item: Item) -> list[LowRank] | None:
    """The stored factors of a plain LoRA, unscaled, where they hold all of the result; else None.

    A rank that only zeros fill may be cut off them.
    """
    module = item.module
    plain = module.kind == "lora" and module.factors.keys() <= _PLAIN_ROLES
    if not (plain and module.options.keys() <= _PLAIN_OPTIONS and module.scaling and module.rank):
        return None
    wide = any(ref.spec.dtype.name == "F64" for ref in module.factors.values())
    up, down = (module.array(role, wide) for role in ("up", "down"))
    up, down = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
    count, blockwise = module.options.get("experts", 1), module.options.get("blockwise", False)
    found = [LowRank(up, down)]
    if count > 1:
        found = [LowRank(*expert(up, down, i, count, blockwise=blockwise)) for i in range(count)]
    if item.rank < module.rank:
        used = [one.up.any(axis=0) & one.down.any(axis=1) for one in found]
        if any(np.count_nonzero(mine) > item.rank for mine in used):
            return None
        found = [LowRank(one.up[:, mine], one.down[mine]) for one, mine in zip(found, used, strict=True)]
    return found


def _kept(item: Item, before: Sequence[LowRank], dtype: Dtype) -> Made:
    """The stored factors, value for value, with zeros up to the rank; their scaling stays beside them.

    A decomposition would be another pair of factors for the same delta, and rounding those again would change it.
    """
    module, scaling = item.module, item.module.scaling or 0.0
    before = [_with_zeros(one, item.rank) for one in before]
    after = [_stored(item.name, one, dtype) for one in before]
    bias = None
    if "up_bias" in module.tensors:
        wide = module.tensors["up_bias"].spec.dtype.name == "F64"
        bias = _rounded(f"{item.name}: its bias", module.array("up_bias", wide).reshape(-1), dtype)
    made = lora_module(module, after, prefix=item.name, bias=bias)
    made = replace(made, alpha=scaling * item.rank, scaling=scaling)
    return Made(made, abs(scaling) * _distance(before, after))


def _with_zeros(factors: LowRank, rank: int) -> LowRank:
    missing = rank - factors.up.shape[1]
    return LowRank(np.pad(factors.up, ((0, 0), (0, missing))), np.pad(factors.down, ((0, missing), (0, 0))))


def _nearest(item: Item, truths: Sequence[LowRank], cores: Sequence[Core], dtype: Dtype) -> Made:
    """The nearest delta of the rank, its scaling in the factors."""
    factors = [_stored(item.name, one.truncate(item.rank), dtype) for one in cores]
    bias = bias_delta(item.module)
    if bias is not None:
        bias = _rounded(f"{item.name}: its bias", bias, dtype)
    made = lora_module(item.module, factors, prefix=item.name, bias=bias)
    return Made(made, _distance(truths, factors) if dtype.nbytes(1) <= _HALF else None)


def _distance(before: Sequence[LowRank], after: Sequence[LowRank]) -> float:
    """‖before - after‖ over all matrices of a module."""
    pairs = [(one, _widened(other)) for one, other in zip(before, after, strict=True)]
    if all(np.array_equal(a.up, b.up) and np.array_equal(a.down, b.down) for a, b in pairs):
        return 0.0  # also where a sum of many ranks, padded or not, would be rounded in two ways
    return math.hypot(*(compare(one, other, overlap=False).distance for one, other in pairs))


def _widened(factors: LowRank) -> LowRank:
    """Factors of 16 bits as float32, which holds them all: numpy has no arithmetic of its own for BF16."""
    kind = np.float64 if factors.up.dtype == np.float64 else np.float32
    return LowRank(factors.up.astype(kind), factors.down.astype(kind))


def _stored(name: str, factors: LowRank, dtype: Dtype) -> LowRank:
    """The factors, rounded once to the type they are to be stored in."""
    return LowRank(_rounded(f"{name}: B", factors.up, dtype), _rounded(f"{name}: A", factors.down, dtype))


def _rounded(what: str, values: Array, dtype: Dtype) -> Array:
    spec = TensorSpec(dtype, values.shape)
    greatest = float(np.max(np.abs(values), initial=0.0))
    if not greatest <= largest(dtype):  # and where it is not a number
        raise NonFinite(
            f"{what} would hold {greatest:g}, and the largest {dtype} is {largest(dtype):g}",
            hint="write a wider type: --dtype bf16 or f32",
        )
    raw = narrow(np.ascontiguousarray(values), dtype, np.empty(spec.nbytes, np.uint8))
    rounded: Array = from_bytes(raw, spec, torch_out=False)
    return rounded


class _Shapes:
    """A source that knows what tensors there will be, and none of their values."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs
        self.metadata: Mapping[str, str] = {}

    def extent(self, name: str) -> None:
        """Nowhere."""


def of_rank(item: Item, dtype: Dtype) -> Module:
    """What :func:`truncated` would make, without its values: to see how large a file would be."""
    out, into = flat_shape(item.module.shape)
    thin = LowRank(np.zeros((out, 1), np.float32), np.zeros((1, into), np.float32))
    bias = np.zeros(out, np.float32) if least_rank(item.module) else None
    made = lora_module(
        item.module, [thin] * item.module.options.get("experts", 1), prefix=item.name, bias=bias
    )
    specs = {}
    for role, ref in made.tensors.items():
        shape = list(ref.shape)
        if role in {"up", "down"}:
            shape[role == "up"] *= item.rank
        specs[ref.name] = TensorSpec(dtype, tuple(shape))
    source = _Shapes(specs)
    refs = {role: TensorRef(source, ref.name) for role, ref in made.tensors.items()}  # type: ignore[arg-type]
    return Module("lora", refs, item.rank, float(item.rank), 1.0, made.shape, made.options)
