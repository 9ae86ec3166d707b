"""What ``combine`` does to one module: read, stack, combine, matrix by matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from loratools.adapter import flat_shape
from loratools.errors import Mismatch, NonFinite
from loratools.matrices import bias_delta, matrices
from loratools.pairing import strip

if TYPE_CHECKING:
    from loratools.adapter import Module
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array
    from loratools.methods.base import Approximation, Method, Stack

__all__ = ["Combined", "Item", "combine_one"]


_PAIRS = {"lora", "adalora"}


@dataclass(frozen=True, slots=True)
class Item:
    """One module of the result.

    Attributes:
        name: of it.
        modules: the adapters' own names and modules, of those that have it.
        tasks: which adapters these are.
        weights: what their deltas are multiplied by.
        rank: that is asked for; None for what the method gives.
        double: compute and keep float64.
        kernel: of the convolution, where the base model tells it.
        biased: it is to have a bias of zeros where no adapter has one for it.
    """

    name: str
    modules: tuple[tuple[str, Module], ...]
    tasks: tuple[int, ...]
    weights: tuple[float, ...]
    rank: int | None
    double: bool
    kernel: tuple[int, ...] = ()
    biased: bool = False

    @property
    def capped(self) -> bool:
        """Whether its rank is held to its smaller side: not all of its modules are pairs to put side by side."""
        return self.rank is None and any(module.kind not in _PAIRS for _, module in self.modules)

    @property
    def nbytes(self) -> int:
        """Bytes read for it."""
        return sum(ref.spec.nbytes for _, module in self.modules for ref in module.tensors.values())

    @property
    def like(self) -> Module:
        """The module whose shape and place the result takes over: one that knows its kernel, where there is one."""
        found = max((module for _, module in self.modules), key=lambda module: len(module.shape))
        if not self.kernel or len(found.shape) > 2:
            return found
        out, into = found.shape
        return replace(found, shape=(out, into // prod(self.kernel), *self.kernel))


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """A module's matrices, in factors.

    Attributes:
        factors: one delta, or one for each expert.
        bias: what is added to the bias, (out,); None where nothing is.
        norm: Frobenius, over the matrices, of what the method defines; None where it was not needed.
        error: of the factors against that.
        rounding: ‖stored - factors‖ over the matrices, for the type they are stored in.
        size: ‖factors‖; 0 where no type that rounds them was named.
    """

    factors: tuple[LowRank, ...]
    bias: Array | None
    norm: float | None
    error: float
    rounding: float = 0.0
    size: float = 0.0


def combine_one(
    item: Item, *, method: Method, options: dict[str, Any], device: str = "cpu", dtype: str | None = None
) -> Combined:
    """Combine one module.

    Args:
        item: which.
        method: how.
        options: of the method, settled.
        device: where the best approximation of a rank is formed.
        dtype: name of the type the factors will be stored in; None where they stay as they are.

    Raises:
        InputError: a factor holds values that are not finite.
        Mismatch: the adapters pack different numbers of experts.
        NonFinite: the result is too large for its type.
    """
    from loratools.methods.base import Stack

    read = [
        matrices(module, name, double=item.double or None, fold=not method.legacy)
        for name, module in item.modules
    ]
    counts = {len(found) for found in read}
    if len(counts) > 1:
        raise Mismatch(f"{item.name}: the adapters have {' and '.join(map(str, sorted(counts)))} experts")
    results = []
    for index, deltas in enumerate(zip(*read, strict=True)):
        name = strip(item.name) + (f"[{index}]" if len(read[0]) > 1 else "")
        stack = Stack(name, deltas, item.weights, item.tasks, item.rank, device)
        results.append(_run(item.name, stack, method, options))
    norms = [result.norm for result in results]
    factors = tuple(_finite(item.name, result.delta) for result in results)
    if item.capped and not method.legacy:
        factors = tuple(_finite(item.name, _capped(delta)) for delta in factors)
    rounded = [_rounding(delta, dtype) for delta in factors] if dtype is not None else []
    return Combined(
        factors=factors,
        bias=_bias(item, method, options),
        norm=None if None in norms else _length([norm for norm in norms if norm is not None]),
        error=_length([result.error for result in results]),
        rounding=_length([apart for apart, _ in rounded]),
        size=_length([size for _, size in rounded]),
    )


def _capped(delta: LowRank) -> LowRank:
    """The same delta at no more rank than its shape allows: formed in float64, beside an identity."""
    import numpy as np

    from loratools.deltas.algebra import factored
    from loratools.deltas.full import Dense

    if delta.up.shape[1] <= min(delta.shape):
        return delta
    whole = factored(delta)
    values = whole.up.astype(np.float64, copy=False) @ whole.down.astype(np.float64, copy=False)
    return factored(Dense(values.astype(whole.up.dtype, copy=False)))


def _rounding(delta: LowRank, dtype: str) -> tuple[float, float]:
    """How far the factors are from themselves as stored in a type, and their norm; (0, 0) where nothing rounds."""
    import numpy as np

    from loratools.deltas.algebra import factored
    from loratools.deltas.likeness import compare
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import DTYPES, narrow, widen

    stored, whole = DTYPES[dtype], factored(delta)
    if stored.bits >= 8 * whole.up.dtype.itemsize:
        return 0.0, 0.0
    kept = []
    for values in (whole.up, whole.down):
        flat = np.ascontiguousarray(values).reshape(-1)
        raw = narrow(flat, stored, np.empty(stored.nbytes(flat.size), np.uint8))
        kept.append(widen(raw, stored).reshape(values.shape))
        if not np.isfinite(np.dot(kept[-1].reshape(-1), kept[-1].reshape(-1))):
            return 0.0, 0.0  # writing it will say so, and where
    found = compare(whole, LowRank(kept[0], kept[1]), overlap=False)
    return found.distance, found.norm_a


def _run(name: str, stack: Stack, method: Method, options: dict[str, Any]) -> Approximation:
    import numpy as np

    try:
        return method.run(stack, **options)
    except (
        NonFinite,
        np.linalg.LinAlgError,
    ) as error:  # a decomposition fails on nothing but what overflowed
        raise _too_large(name, stack.deltas[0]) from error


def _bias(item: Item, method: Method, options: dict[str, Any]) -> Array | None:
    """What lora_bias adds: a matrix of one column to a rule that works entry by entry, else the weighted sum."""
    import numpy as np

    from loratools.deltas.lowrank import LowRank
    from loratools.methods.base import Stack

    found = [bias_delta(module) for _, module in item.modules]
    out = flat_shape(item.like.shape)[0]
    if all(bias is None for bias in found):
        return np.zeros(out, np.float32) if item.biased else None
    biases = [np.zeros(out, np.float32) if bias is None else bias for bias in found]
    if method.spaces:
        columns = tuple(LowRank(bias.reshape(-1, 1), np.ones((1, 1), bias.dtype)) for bias in biases)
        stack = Stack(f"{strip(item.name)}.bias", columns, item.weights, item.tasks, 1)
        return method.run(stack, **{**options, "space": "weight"}).delta.rows(0, out).reshape(-1)
    terms = (bias * bias.dtype.type(weight) for bias, weight in zip(biases, item.weights, strict=True))
    return sum(terms, np.zeros(out, np.float32))


def _length(values: list[float]) -> float:
    return float(sum(value * value for value in values) ** 0.5)


def _finite(name: str, delta: LowRank) -> LowRank:
    import numpy as np

    flat = (values.reshape(-1) for values in (delta.up, delta.down))
    if all(np.isfinite(np.dot(one, one)) or np.isfinite(one).all() for one in flat):
        return delta
    raise _too_large(name, delta)


def _too_large(name: str, delta: LowRank) -> NonFinite:
    return NonFinite(f"{name}: the result is too large for {delta.up.dtype}", hint="use smaller weights")
