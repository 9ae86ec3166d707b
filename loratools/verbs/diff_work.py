"""What ``diff`` spreads over workers: one module of two adapters, or one tensor beside them, read and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from loratools.adapter import flat_shape
from loratools.deltas.likeness import Likeness, compare, total
from loratools.errors import InputError, ShapeMismatch
from loratools.matrices import bias_delta, matrices

if TYPE_CHECKING:
    from loratools.adapter import Module
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array
    from loratools.tensors.base import TensorRef

__all__ = ["Compared", "Pair", "compare_pair"]

_CHUNK = 1 << 20  # elements of a tensor that are compared at a time
_FLOAT32, _FLOAT64 = 4, 8
_WITHOUT_PRODUCT = {"glora", "oft", "oftv2", "boft", "set"}  # kinds that store no matrix that they add
_CANCELLED = 2.0**-46  # norm over the sum of its terms' norms: below it, there is only rounding


@dataclass(frozen=True, slots=True)
class Pair:
    """What is compared with what.

    Attributes:
        name: of both.
        a: A's module; None where only B has it, or where tensors are compared.
        b: B's.
        tensors: A's and B's, for what belongs to no module.
        rows: the token rows they replace.
        role: of the tensors.
    """

    name: str
    a: Module | None = None
    b: Module | None = None
    tensors: tuple[TensorRef, TensorRef] | None = None
    rows: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    role: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        modules = (module for module in (self.a, self.b) if module is not None)
        refs = self.tensors or tuple(ref for module in modules for ref in module.tensors.values())
        return sum(ref.spec.nbytes for ref in refs)

    @property
    def memory(self) -> int:
        """Bytes the values take once they are read, with the factors of a product of kinds spelled out."""
        if self.tensors is not None:
            return 2 * _CHUNK * (_FLOAT32 + 2 * _FLOAT64)
        return sum(_spread(module) for module in (self.a, self.b) if module is not None)


@dataclass(frozen=True, slots=True)
class Compared:
    """What came out, and why it could not be told more."""

    likeness: Likeness
    why: str = ""


def compare_pair(item: Pair, *, device: str = "cpu") -> Compared:
    """Read and compare; the Gram matrices of factors are formed on ``device``.

    Raises:
        InputError: a value is not finite; names the module or the tensor.
    """
    if item.tensors is not None:
        return _compare_tensors(item, *item.tensors)
    one, other = _parts(item.name, item.a), _parts(item.name, item.b)
    return Compared(_likeness(item.name, one, other, device))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a module adds, or what stands for it."""

    matrices: tuple[LowRank, ...] = ()
    vectors: tuple[
        Array, ...
    ] = ()  # one at most: the bias, ia3's factors, or all values of what has no product


def _parts(name: str, module: Module | None) -> _Parts:
    """What a module adds; of what is no plain sum, the product that it stores and that a plain sum would add."""
    if module is None:
        return _Parts()
    if module.kind == "ia3":
        double = module.tensors["scale"].spec.dtype.name == "F64"
        factors = module.array("scale", double).reshape(-1)
        factors = factors if module.options.get("relative") else factors - 1
        return _Parts(vectors=(_finite(name, factors, module.tensors["scale"]),))
    if module.kind in _WITHOUT_PRODUCT:
        return _Parts(vectors=(_stored(name, module),))
    if not module.is_delta:
        tensors = {role: ref for role, ref in module.tensors.items() if role != "magnitude"}
        options = {key: value for key, value in module.options.items() if key != "init"}
        kind = "lora" if module.kind == "dora" else module.kind
        module = replace(module, kind=kind, tensors=tensors, options=options)
    bias = bias_delta(module)
    if bias is None:
        return _Parts(matrices(module, name, fold=False))
    ref = next(module.tensors[role] for role in ("up_bias", "diff_bias") if role in module.tensors)
    return _Parts(matrices(module, name, fold=False), (_finite(name, bias, ref),))


def _stored(name: str, module: Module) -> Array:
    """Every value of a module one behind the other, by role."""
    import numpy as np

    refs = [ref for role, ref in sorted(module.tensors.items()) if role != "alpha"]
    return np.concatenate([_finite(name, ref.load().reshape(-1).astype(np.float64), ref) for ref in refs])


def _likeness(name: str, one: _Parts, other: _Parts, device: str) -> Likeness:
    found = [_of_matrices(a, b, device) for a, b in zip_longest(one.matrices, other.matrices)]
    found += [_of_vectors(a, b) for a, b in zip_longest(one.vectors, other.vectors)]
    likeness = total(found)
    if not all(map(math.isfinite, (likeness.norm_a, likeness.norm_b, likeness.distance))):
        raise InputError(f"{name}: the delta is beyond what float64 can hold")
    return likeness


def _of_matrices(a: LowRank | None, b: LowRank | None, device: str) -> Likeness:
    present = a or b
    assert present is not None
    nothing = replace(present, up=present.up[:, :0], down=present.down[:0])
    found = compare(a or nothing, b or nothing, device=device)
    zero_a, zero_b = _cancels(a, found.norm_a), _cancels(b, found.norm_b)
    if zero_a or zero_b:
        pair = nothing if zero_a else a or nothing, nothing if zero_b else b or nothing
        found = compare(*pair, device=device)
    return found


def _cancels(delta: LowRank | None, norm: float) -> bool:
    """Whether its terms cancel, and its norm is no more than the rounding of their sum in float64: that is zero."""
    import numpy as np

    if delta is None or not norm:
        return False
    flat = (values.reshape(-1) for values in (delta.up, delta.down))
    at_most = (
        math.prod(float(np.dot(one, one)) for one in flat) ** 0.5
    )  # the terms' sizes, by Cauchy and Schwarz
    if norm > _CANCELLED * abs(delta.scaling) * at_most:
        return False
    lengths = [
        np.linalg.norm(values.astype(np.float64), axis=axis)
        for axis, values in enumerate((delta.up, delta.down))
    ]
    return norm <= _CANCELLED * abs(delta.scaling) * float(lengths[0] @ lengths[1]) < math.inf


def _of_vectors(a: Array | None, b: Array | None) -> Likeness:
    import numpy as np

    present = a if a is not None else b
    assert present is not None
    one, other = (
        np.zeros(present.shape) if values is None else values.astype(np.float64) for values in (a, b)
    )
    if one.shape != other.shape:
        raise ShapeMismatch("two vectors to compare", other.shape, one.shape)
    change = one - other
    norms = [float(np.linalg.norm(values)) for values in (one, other, change)]
    return Likeness(norms[0], norms[1], float(one @ other), norms[2])


def _compare_tensors(item: Pair, one: TensorRef, other: TensorRef) -> Compared:
    """Values, a piece at a time: a head or an embedding may be as large as all modules together."""
    import numpy as np

    why = ""
    if one.shape != other.shape:
        why = f"{list(one.shape)} in A, {list(other.shape)} in B"
    elif item.rows[0] != item.rows[1]:
        why = "they replace other tokens"
    sums = np.zeros(4)
    for start in range(0, max(one.spec.count, other.spec.count), _CHUNK):
        first, second = (_piece(ref, start) for ref in (one, other))
        sums[:2] += first @ first, second @ second
        if not why:
            change = first - second
            sums[2:] += first @ second, change @ change
    square_a, square_b, inner, squared = map(float, sums)
    return Compared(Likeness(math.sqrt(square_a), math.sqrt(square_b), inner, math.sqrt(squared)), why)


def _piece(ref: TensorRef, start: int) -> Array:
    import numpy as np

    count = ref.spec.count
    start = min(start, count)
    values = ref.source.read(ref.name, start, min(start + _CHUNK, count)).reshape(-1).astype(np.float64)
    return _finite(ref.name, values, ref)


def _finite(name: str, values: Array, ref: TensorRef) -> Array:
    import numpy as np

    if np.isfinite(values).all():
        return values
    where = ref.name if ref.name == name else f"{name}: {ref.name}"
    raise InputError(f"{where} holds values that are not finite", hint="loratools validate lists them")


def _spread(module: Module) -> int:
    """Bytes of a module's factors as they are computed with."""
    wide = any(ref.spec.dtype.name == "F64" for ref in module.factors.values())
    count = module.parameters
    if module.kind == "loha":
        count = sum(flat_shape(module.shape)) * (module.rank or 1) ** 2
    return count * (_FLOAT64 if wide else _FLOAT32)
