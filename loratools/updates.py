"""From a module's tensors to the update they make: one small function for each kind.

A module says its kind and has its tensors by role; here they are read and put into the mathematics of
:mod:`loratools.deltas`. :meth:`loratools.adapter.Module.load` is the way in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.shapes import flat_shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratools.adapter import Module
    from loratools.deltas.base import Delta, Update
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["BIAS_ROLES", "load_bias", "load_expert", "load_weight"]

BIAS_ROLES = ("up_bias", "diff_bias")


def load_weight(module: Module, double: bool) -> Update:
    """The update of the weight, in float32 or float64."""
    return _LOADERS[module.kind](module, double)


def load_bias(module: Module, double: bool) -> Update:
    """The update of the bias beside the weight, as a matrix of one column."""
    return _ia3_bias(module, double) if module.kind == "ia3" else _bias(module, double)


def _low_rank(module: Module, double: bool) -> LowRank:
    """Roles ``down`` (rank, in, kernel...), ``up`` (out, rank); ``mid`` (rank, rank, kernel...) of a CP convolution."""
    from loratools.deltas.hadamard import expanded
    from loratools.deltas.lowrank import LowRank, block_diagonal

    down, up = module.array("down", double), module.array("up", double)
    down, up = down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)
    if "mid" in module.tensors:
        down = expanded(module.array("mid", double), down)
    if blocks := module.options.get("down_blocks"):
        down = block_diagonal(down, blocks)
    if blocks := module.options.get("up_blocks"):
        up = block_diagonal(up, blocks)
    if "diag" in module.tensors:
        up = up * module.array("diag", double)
    return LowRank(up, down, module.scaling or 0.0)


def _lora(module: Module, double: bool) -> Update:
    from loratools.deltas.residual import Residual

    if init := module.options.get("init"):  # the part taken out and the delta nearly cancel: in float64
        return Residual(_low_rank(module, True), init, module.rank or 0, module.scaling or 0.0)
    return _low_rank(module, double)


def load_expert(module: Module, index: int, double: bool) -> Delta:
    """The update of one expert, of a module that packs several."""
    from loratools.deltas.lowrank import LowRank, expert

    up, down = expert(
        module.array("up", double),
        module.array("down", double),
        index,
        module.options.get("experts", 1),
        blockwise=module.options.get("blockwise", False),
    )
    return LowRank(up, down, module.scaling or 0.0)


def _decomposed(module: Module, delta: Update, double: bool) -> Update:
    """With role ``magnitude``, in any shape; option ``magnitude_axis`` 0 (output features) or 1 (input channels).

    Option ``epsilon`` is added to the norms: LyCORIS' where magnitudes are of input channels, else nothing.
    """
    if "magnitude" not in module.tensors:
        return delta
    from loratools.deltas.dora import EPSILON, WeightDecomposed

    by_input = module.options.get("magnitude_axis", 0) == 1
    epsilon = module.options.get("epsilon", EPSILON if by_input else 0.0)
    return WeightDecomposed(delta, module.array("magnitude", double).reshape(-1), by_input, epsilon)


def _dora(module: Module, double: bool) -> Update:
    return _decomposed(module, _lora(module, double), double)


def _adalora(module: Module, double: bool) -> Update:
    from loratools.deltas.lowrank import LowRank

    down = module.array("down", double) * module.array("singular", double)
    return LowRank(module.array("up", double), down, module.scaling or 0.0)


def _ia3(module: Module, double: bool) -> Update:
    """Role ``scale``; option ``feedforward`` for inputs, ``relative`` where 1 is to be added (LyCORIS)."""
    from loratools.deltas.scaled import Scaled

    factors = _factors(module, double)
    return Scaled(factors, module.options["feedforward"], (factors.size, factors.size))


def _factors(module: Module, double: bool) -> Array:
    factors = module.array("scale", double).reshape(-1)
    return factors + factors.dtype.type(1) if module.options.get("relative") else factors


def _loha(module: Module, double: bool) -> Update:
    """Roles ``first_a`` (out, rank), ``first_b`` (rank, in * kernel), and the same for ``second``.

    In Tucker form ``first_core`` (rank, rank, kernel...), ``first_a`` (rank, out), ``first_b`` (rank, in).
    """
    from loratools.deltas.hadamard import Hadamard, tucker
    from loratools.deltas.lowrank import LowRank

    def half(which: str) -> LowRank:
        left, right = _flat(module, f"{which}_a", double), _flat(module, f"{which}_b", double)
        if (core := f"{which}_core") in module.tensors:
            left, right = tucker(module.array(core, double), left, right)
        return LowRank(left, right)

    return _decomposed(module, Hadamard(half("first"), half("second"), module.scaling or 0.0), double)


def _flat(module: Module, role: str, double: bool) -> Array:
    values = module.array(role, double)
    return values.reshape(values.shape[0], -1)


def _lokr(module: Module, double: bool) -> Update:
    """Roles ``left`` (a, c) or its factors ``left_a``, ``left_b``; ``right`` (b, d, kernel...) or its factors.

    In Tucker form with ``right_core``. Option ``rows``: (first, stop), the rows of the product that are the delta.
    """
    from loratools.deltas.base import Span
    from loratools.deltas.full import Dense
    from loratools.deltas.hadamard import tucker
    from loratools.deltas.kronecker import Kronecker

    def side(which: str) -> Array:
        if which in module.tensors:
            return module.array(which, double)
        left, right = _flat(module, f"{which}_a", double), _flat(module, f"{which}_b", double)
        if (core := f"{which}_core") in module.tensors:
            left, right = tucker(module.array(core, double), left, right)
        return left @ right

    left, right = side("left"), side("right")
    delta: Delta = Kronecker(left, right.reshape(right.shape[0], -1), module.scaling or 0.0)
    if right.ndim == 3 and module.options.get("padded_kernel"):
        # PEFT lets torch.kron pad the left factor of a 1-d convolution in front and reshapes what comes out. The
        # adapter was trained through that, so that is its delta, however odd.
        import numpy as np

        values = np.kron(left, right).reshape(left.shape[0] * right.shape[0], -1)
        delta = Dense(values, module.scaling or 0.0)
    if rows := module.options.get("rows"):
        delta = delta.part(Span(*rows), None)
    return _decomposed(module, delta, double)


def _full(module: Module, double: bool) -> Update:
    """Role ``diff``, in the weight's shape."""
    from loratools.deltas.full import Dense

    values = module.array("diff", double)
    return Dense(values.reshape(flat_shape(values.shape)), 1.0 if module.scaling is None else module.scaling)


def _set(module: Module, double: bool) -> Update:
    """Role ``value``, in the weight's shape: what the weight becomes."""
    from loratools.deltas.full import Replacement

    values = module.array("value", double)
    flat = values.reshape(flat_shape(values.shape))
    return Replacement(lambda start, stop: flat[start:stop], (flat.shape[0], flat.shape[1]))


def _glora(module: Module, double: bool) -> Update:
    """Roles ``a1``, ``a2``, ``b1``, ``b2``, in the order of old files or of new ones; a CP core ``bm``."""
    from loratools.deltas.glora import Generalized, arrangement
    from loratools.deltas.hadamard import expanded
    from loratools.deltas.lowrank import LowRank

    roles = ("a1", "a2", "b1", "b2")
    layout, _ = arrangement({role: module.tensors[role].shape for role in roles})
    left, right, up, down = (_flat(module, role, double) for role in roles)
    if layout == "old":
        left, right, up, down = right, left, down, up
    if "bm" in module.tensors:
        down = expanded(module.array("bm", double), down)
    scaling = module.scaling or 0.0
    return Generalized(LowRank(up, down, scaling), left, right, scaling)


def _oft(module: Module, double: bool) -> Update:
    """Role ``blocks`` (blocks, size, size), with ``rescale`` (out,) and option ``constraint`` on ‖Q‖: alpha · out.

    Or role ``packed`` (blocks, size (size - 1) / 2), of input features; option ``neumann`` is the number of terms, 5
    where nothing says it and 0 for the exact inverse; ``coft`` is PEFT's epsilon.
    """
    from loratools.deltas.oft import Rotated, Stage, cayley, constrained, neumann, projected, skew, unpacked

    if "packed" not in module.tensors:
        rotations = constrained(skew(module.array("blocks", True)), module.options.get("constraint") or 0.0)
        stage = Stage(_as(double, cayley(-rotations)))
        return Rotated((stage,), rescale=_rescale(module, double))
    rotations = unpacked(module.array("packed", True))
    if coft := module.options.get("coft"):
        rotations = projected(rotations, coft)
    terms = module.options.get("neumann", 5)
    stage = Stage(_as(double, neumann(rotations, terms) if terms else cayley(-rotations)))
    return Rotated((stage,), on_input=True)


def _boft(module: Module, double: bool) -> Update:
    """Role ``blocks`` (stages, blocks, size, size), with ``rescale`` (out,); ``constraint``, or ``on_input`` (PEFT)."""
    from loratools.deltas.boft import butterfly, input_butterfly

    blocks, rescale = module.array("blocks", True), _rescale(module, double)
    if module.rotates_input:
        return input_butterfly(blocks, rescale)
    return butterfly(blocks, rescale, module.options.get("constraint") or 0.0)


def _rescale(module: Module, double: bool) -> Array | None:
    return module.array("rescale", double).reshape(-1) if "rescale" in module.tensors else None


def _as(double: bool, values: Array) -> Array:
    import numpy as np

    return values.astype(np.float64 if double else np.float32, copy=False)


def _bias(module: Module, double: bool) -> Update:
    """Roles ``up_bias``, scaled as the factors are, and ``diff_bias``, which is scaled as ``diff`` is.

    LyCORIS and ComfyUI put a ``diff_b`` beside factors of any kind too, where nothing scales it.
    """
    from loratools.deltas.full import Dense

    scaling = 1.0 if module.scaling is None else module.scaling
    scales = {"up_bias": scaling, "diff_bias": scaling if module.kind in {"full", "norm"} else 1.0}
    terms = [
        Dense(module.array(role, double).reshape(-1, 1), scales[role])
        for role in BIAS_ROLES
        if role in module.tensors
    ]
    if len(terms) == 1:
        return terms[0]
    one, other = (term.rows(0, term.shape[0]) for term in terms)
    return Dense(one + other)


def _ia3_bias(module: Module, double: bool) -> Update:
    from loratools.deltas.scaled import Scaled

    factors = _factors(module, double)
    return Scaled(factors, False, (factors.size, 1))


_LOADERS: dict[str, Callable[[Module, bool], Update]] = {
    "lora": _lora,
    "dora": _dora,
    "adalora": _adalora,
    "ia3": _ia3,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
    "norm": _full,
    "set": _set,
    "glora": _glora,
    "oft": _oft,
    "oftv2": _oft,
    "boft": _boft,
}
