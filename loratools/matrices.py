"""A module as the plain matrices it adds to its weight, one or one an expert, and such matrices as a module."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, cast

from loratools.adapter import Module, flat_shape
from loratools.errors import InputError, Unsupported
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.deltas.base import Delta
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["bias_delta", "lora_module", "matrices", "module_cost", "require_delta"]

_EXTRACT = "merge it into the base, and extract a LoRA from the two"
_WHAT_IT_DOES = {
    "ia3": "it multiplies the weight; ",
    "glora": "a part of it multiplies the weight; ",
    "oft": "it rotates the weight; ",
    "oftv2": "it rotates the weight; ",
    "boft": "it rotates the weight; ",
    "set": "it replaces the weight; ",
}
_INITIALISED = "loratools normalize --base BASE makes a plain adapter of it"


def require_delta(name: str, module: Module) -> None:
    """Refuse a module that does not add a fixed matrix to its weight.

    Raises:
        Unsupported: with the module, its kind, and the way out.
    """
    if module.is_delta:
        return
    if init := module.options.get("init"):
        raise Unsupported(f"{name} starts from a part of its base ({init})", hint=_INITIALISED)
    kind = f"{module.kind} with magnitudes (DoRA)" if module.kind in {"loha", "lokr"} else module.kind
    raise Unsupported(
        f"{name} is {kind}, which is not a plain sum",
        hint=_WHAT_IT_DOES.get(module.kind, "") + _EXTRACT,
    )


def matrices(
    module: Module, name: str, *, double: bool | None = None, fold: bool = True
) -> tuple[LowRank, ...]:
    """The matrices a module adds, as factors with the scaling inside ``up``: one, or one an expert.

    Args:
        module: a plain sum.
        name: of it, for messages.
        double: factors in float64; by default where the file holds such.
        fold: put the scaling inside ``up``; without it a LoRA's factors are those stored, the scaling beside them.

    Returns:
        Each (out, rank) and (rank, in), a convolution's kernel flattened into ``in``. A matrix that is stored whole is
        its own factor, beside an identity; where only a bias is changed, the rank is 0.

    Raises:
        Unsupported: it is not a plain sum, or nothing says its scaling.
        InputError: a factor holds NaN or infinite values.
    """
    import numpy as np

    from loratools.deltas.algebra import factored
    from loratools.deltas.lowrank import LowRank, expert

    require_delta(name, module)
    if double is None:
        double = any(ref.spec.dtype.name == "F64" for ref in module.factors.values())
    if not module.changes_weight:
        out, into = flat_shape(module.shape)
        kind = np.float64 if double else np.float32
        return (LowRank(np.zeros((out, 0), kind), np.zeros((0, into), kind)),)
    if (count := module.options.get("experts", 1)) == 1:
        wide = (
            double or module.kind == "lokr"
        )  # a side multiplied out in float32 would seem to have full rank
        loaded = cast("Delta", module.load(double=wide))
        found = loaded if not fold and isinstance(loaded, LowRank) else factored(loaded)
        _require_finite(name, module, _stored_values(loaded, found))
        kind = np.float64 if double else np.float32
        up, down = (values.astype(kind, copy=False) for values in (found.up, found.down))
        return (LowRank(up, down, found.scaling),)
    if module.scaling is None:
        raise Unsupported(f"nothing says how {name} is scaled", hint="pass its adapter_config.json")
    packed = LowRank(module.array("up", double), module.array("down", double))
    _require_finite(name, module, (packed.up, packed.down))
    blockwise = module.options.get("blockwise", False)
    parts = (expert(packed.up, packed.down, index, count, blockwise=blockwise) for index in range(count))
    found_parts = (LowRank(up, down, module.scaling) for up, down in parts)
    return tuple(factored(part) if fold else part for part in found_parts)


def bias_delta(module: Module) -> Array | None:
    """What a module adds to the bias beside its weight, scaled: (out,); None where it adds nothing."""
    if module.kind == "ia3" or not module.changes_bias:
        return None
    values: Array = module.load("bias").rows(0, module.shape[0]).reshape(-1)  # type: ignore[attr-defined]
    return values


def lora_module(
    like: Module,
    factors: Sequence[LowRank],
    *,
    prefix: str,
    bias: Array | None = None,
) -> Module:
    """A plain LoRA module in memory: alpha is the rank, the scaling 1. Of a vector, as of a norm, the sum itself.

    Args:
        like: a module of the same weight, whose shape and place (embedding, convolution, experts) it takes over.
        factors: one delta, or one an expert; smaller ranks are padded with zeros.
        prefix: of the names its tensors get.
        bias: what is added to the bias, (out,).

    >>> import numpy as np
    >>> from loratools.deltas.lowrank import LowRank
    >>> like = Module("lora", {}, 1, 1.0, 1.0, (8, 3, 5, 5))
    >>> made = lora_module(like, [LowRank(np.ones((8, 2)), np.ones((2, 75)))], prefix="conv")
    >>> {role: ref.shape for role, ref in made.tensors.items()}
    {'down': (2, 3, 5, 5), 'up': (8, 2, 1, 1)}
    """
    import numpy as np

    if len(like.shape) < 2:
        return _vector_module(like, factors[0], prefix, bias)
    rank = max(factor.up.shape[1] for factor in factors)
    up, down = _packed(factors, rank)
    kernel = like.shape[2:]
    arrays = {"down": down.reshape(-1, *like.shape[1:]), "up": up.reshape(*up.shape, *(1 for _ in kernel))}
    if bias is not None:
        arrays["up_bias"] = np.asarray(bias, up.dtype)
    source = MemorySource({f"{prefix}.{role}": values for role, values in arrays.items()})
    options: dict[str, Any] = {
        key: like.options[key] for key in ("embedding", "experts") if key in like.options
    }
    refs = {role: TensorRef(source, f"{prefix}.{role}") for role in arrays}
    return Module("lora", refs, rank, float(rank), 1.0, like.shape, options)


def _vector_module(like: Module, factor: LowRank, prefix: str, bias: Array | None) -> Module:
    """What is added to a weight of one dimension, or to a bias alone."""
    import numpy as np

    from loratools.deltas.algebra import factored

    plain = factored(factor)
    arrays = {"diff": (plain.up @ plain.down).reshape(like.shape)} if like.changes_weight else {}
    if bias is not None:
        arrays["diff_bias"] = np.asarray(bias, plain.up.dtype)
    source = MemorySource({f"{prefix}.{role}": values for role, values in arrays.items()})
    refs = {role: TensorRef(source, f"{prefix}.{role}") for role in arrays}
    return Module("norm" if like.kind == "norm" else "full", refs, 1, None, 1.0, like.shape)


def _packed(factors: Sequence[LowRank], rank: int) -> tuple[Array, Array]:
    """The factors of all experts in PEFT's packing: (out, rank * experts), expert fastest, and (experts * rank, in)."""
    import numpy as np

    from loratools.deltas.algebra import factored

    plain, count = [factored(factor) for factor in factors], len(factors)
    kind = np.result_type(*(factor.up.dtype for factor in plain))
    if count == 1:
        return np.ascontiguousarray(plain[0].up, kind), np.ascontiguousarray(plain[0].down, kind)
    out, into = plain[0].shape
    up, down = np.zeros((out, rank * count), kind), np.zeros((count * rank, into), kind)
    for index, factor in enumerate(plain):
        own = factor.up.shape[1]
        up[:, index : own * count : count] = factor.up
        down[index * rank : index * rank + own] = factor.down
    return up, down


def module_cost(like: Module) -> int:
    """Parameters that one unit of rank costs, over all experts."""
    out, into = like.shape[0], prod(like.shape[1:])
    experts: int = like.options.get("experts", 1)
    return (out + into) * experts


def _stored_values(loaded: Delta, found: LowRank) -> tuple[Array, ...]:
    """What of a delta's factors can hold a value that is not finite: not the identity beside a whole matrix."""
    from loratools.deltas.full import Dense

    return (loaded.values,) if isinstance(loaded, Dense) else (found.up, found.down)


def _require_finite(name: str, module: Module, arrays: tuple[Array, ...]) -> None:
    """Refuse values that are not finite.

    Raises:
        InputError: with the first tensor that holds some.
    """
    import numpy as np

    flat = (values.reshape(-1) for values in arrays)
    with np.errstate(over="ignore", invalid="ignore"):
        if all(np.isfinite(np.dot(one, one)) or np.isfinite(one).all() for one in flat):
            return
    bad = [ref.name for ref in module.tensors.values() if not np.isfinite(ref.load()).all()]
    raise InputError(
        f"{name}: {bad[0] if bad else 'the scaled delta'} holds values that are not finite",
        hint="loratools validate lists them",
    )
