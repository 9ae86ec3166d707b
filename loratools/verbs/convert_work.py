"""What ``convert`` spreads over workers: one module before and after, compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.adapter import flat_shape
from loratools.deltas.likeness import Likeness, compare, ratio, total
from loratools.errors import ShapeMismatch
from loratools.matrices import matrices
from loratools.tensors.views import sources

if TYPE_CHECKING:
    from loratools.adapter import Module
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array
    from loratools.tensors.base import TensorRef

__all__ = ["Judged", "Twin", "judge", "norm_before"]

_BIASES = {"up_bias", "diff_bias"}
_FACTORED = {"lora", "adalora", "loha", "lokr"}
_TOLD = {"alpha", "on_input"}  # numbers that the module knows already
# Of float types: bytes, and the bits of infinity. Seen as integers, signed and unsigned, finite values are below it.
_INFINITIES = {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F80_0000),
    "F64": (8, 0x7FF0_0000_0000_0000),
}
# Options that say how tensors are stored, not what they do.
_STORAGE = {"config_rank", "parameter", "blocks"}


@dataclass(frozen=True, slots=True)
class Twin:
    """A module before and after.

    Attributes:
        name: of both.
        before: None where only the result has it.
        after: None where only the adapter that was read has it.
    """

    name: str
    before: Module | None
    after: Module | None

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        modules = (module for module in (self.before, self.after) if module is not None)
        return sum(ref.spec.nbytes for module in modules for ref in module.tensors.values())


@dataclass(frozen=True, slots=True)
class Judged:
    """What came out.

    Attributes:
        name: of the module.
        identical: every bit is the same.
        norm: of what it did before; 0 where it was not computed, since nothing differs.
        distance: of what it does now from that, in the norm's unit.
        unbounded: the first tensor read that holds values that are not finite; None where all are.
    """

    name: str
    identical: bool
    norm: float
    distance: float
    unbounded: str | None = None

    @property
    def relative(self) -> float:
        """The one over the other; 0 where both are nothing."""
        return ratio(self.distance, self.norm)


def judge(item: Twin) -> Judged:
    """Compare: bits first, then what they do, in float64."""
    before, after = item.before, item.after
    bad = None if before is None else _unbounded(before)
    if before is not None and after is not None and _identical(before, after):
        return Judged(item.name, True, 0.0, 0.0, bad)
    found = total(_likenesses(item))
    return Judged(item.name, False, found.norm_a, found.distance, bad)


def _unbounded(module: Module) -> str | None:
    """The first tensor of a module that holds a NaN or an infinity, by its key in the file."""
    for ref in module.tensors.values():
        if not _is_finite(ref):
            return next((one.name for one in sources(ref)), ref.name)
    return None


def _is_finite(ref: TensorRef) -> bool:
    """Whether all values are finite: told by their bits, since widening them takes far longer."""
    import numpy as np

    infinity = _INFINITIES.get(ref.spec.dtype.name)
    if infinity is None:
        return True  # no float, or one of 8 bits
    width, bits = infinity
    raw, sign = ref.source.read_bytes(ref.name), 1 << (8 * width - 1)
    positive, negative = raw.view(f"<i{width}"), raw.view(f"<u{width}")
    return int(np.max(positive, initial=0)) < bits and int(np.max(negative, initial=0)) < sign + bits


def norm_before(item: Twin) -> float:
    """The norm of what a module did before: of the product of its factors, or of its values."""
    return 0.0 if item.before is None else total(_likenesses(Twin(item.name, item.before, None))).norm_a


def _likenesses(item: Twin) -> list[Likeness]:
    one, other = _Parts.of(item.name, item.before), _Parts.of(item.name, item.after)
    found = [_of_matrices(one.matrix, other.matrix)] if one.matrix or other.matrix else []
    roles = {**one.vectors, **other.vectors}
    found += [_of_vectors(item.name, one.vectors.get(role), other.vectors.get(role)) for role in roles]
    if one.nature and other.nature and one.nature != other.nature:
        found.append(Likeness(math.inf, math.inf, 0.0, math.inf))
    return found


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a module does, in pieces that can be compared.

    Attributes:
        matrix: what it adds.
        vectors: everything else, by what it is.
        nature: how the pieces work together, where that is more than a sum.
    """

    matrix: LowRank | None
    vectors: dict[str, Array]
    nature: tuple[object, ...] = ()

    @staticmethod
    def of(name: str, module: Module | None) -> _Parts:
        """Take a module apart."""
        if module is None:
            return _Parts(None, {})
        vectors = _biases(module)
        kind = "lora" if module.kind == "dora" else module.kind
        if kind in _FACTORED and module.changes_weight:
            nature: tuple[object, ...] = ()
            tensors = {
                r: ref for r, ref in module.tensors.items() if r not in {*_BIASES, "magnitude", "alpha"}
            }
            if "magnitude" in module.tensors:
                vectors["magnitude"] = module.array("magnitude", True).reshape(-1)
                nature = ("magnitude", module.options.get("magnitude_axis", 0))
            options = {key: value for key, value in module.options.items() if key != "init"}
            if "init" in module.options:
                nature = (*nature, module.options["init"])
            plain = replace(module, kind=kind, tensors=tensors, options=options)
            stored = kind == "lora" and tensors.keys() == {
                "down",
                "up",
            }  # factors as they are, else products of them
            found = matrices(plain, name, fold=False, double=None if stored else True)
            if len(found) == 1:
                return _Parts(found[0], vectors, nature)
            for index, factors in enumerate(found):
                vectors[f"expert {index}"] = (factors.up @ factors.down).reshape(-1) * factors.scaling
            return _Parts(None, vectors, nature)
        scaled = module.kind in {"full", "norm"}
        for role, ref in module.tensors.items():
            if role not in _TOLD | _BIASES:
                vectors[role] = _values(ref) * (module.scaling or 1.0 if scaled else 1.0)
        if module.kind == "ia3" and not module.options.get(
            "relative"
        ):  # what is multiplied by 1 is not changed
            vectors["scale"] -= 1.0
        return _Parts(None, vectors, () if scaled else _nature(module))


def _nature(module: Module) -> tuple[object, ...]:
    options = sorted((k, str(v)) for k, v in module.options.items() if k not in {*_STORAGE, "relative"})
    return (module.kind, module.scaling if module.kind == "glora" else None, *options)


def _biases(module: Module) -> dict[str, Array]:
    """What is added to the bias, by whichever role."""
    if module.tensors.keys().isdisjoint(_BIASES):
        return {}
    return {"bias": module.load("bias", double=True).rows(0, module.shape[0]).reshape(-1)}  # type: ignore[attr-defined]


def _values(ref: TensorRef) -> Array:
    import numpy as np

    values: Array = ref.load().astype(np.float64, copy=False).reshape(-1)
    return values


def _of_matrices(a: LowRank | None, b: LowRank | None) -> Likeness:
    present = a or b
    assert present is not None
    nothing = replace(present, up=present.up[:, :0], down=present.down[:0])
    return compare(a or nothing, b or nothing, overlap=False)


def _of_vectors(name: str, a: Array | None, b: Array | None) -> Likeness:
    import numpy as np

    present = a if a is not None else b
    assert present is not None
    one, other = (np.zeros(present.shape) if values is None else values for values in (a, b))
    if one.shape != other.shape:
        raise ShapeMismatch(name, other.shape, one.shape)
    norms = [float(np.linalg.norm(values)) for values in (one, other, one - other)]
    return Likeness(norms[0], norms[1], float(one @ other), norms[2])


def _identical(before: Module, after: Module) -> bool:
    """Whether two modules are the same bits under the same meaning; a bias of the same values may have another role."""
    import numpy as np

    if before.kind != after.kind or flat_shape(before.shape) != flat_shape(after.shape):
        return False
    if before.scaling != after.scaling or _meaning(before) != _meaning(after):
        return False
    mine, theirs = (
        {role: ref for role, ref in module.tensors.items() if role not in _TOLD | _BIASES}
        for module in (before, after)
    )
    if mine.keys() != theirs.keys() or not all(_same_bits(mine[role], theirs[role]) for role in mine):
        return False
    one, other = _biases(before), _biases(after)
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def _meaning(module: Module) -> dict[str, object]:
    return {
        key: value for key, value in module.options.items() if key not in _STORAGE and value not in (0, None)
    }


def _same_bits(one: TensorRef, other: TensorRef) -> bool:
    import numpy as np

    if one.spec.dtype != other.spec.dtype or one.spec.count != other.spec.count:
        return False
    return bool(np.array_equal(one.source.read_bytes(one.name), other.source.read_bytes(other.name)))
