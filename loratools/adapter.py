"""An adapter as its file describes it, before any weight is read: modules, and everything that is not one.

This is where the two worlds meet. A :class:`Module` holds references to tensors by the role they play; ``load`` turns
it into an :class:`~loratools.deltas.base.Update`, which knows only arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from loratools.errors import Mismatch, ShapeMismatch, Unsupported

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from loratools.deltas.base import Delta, Update
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array
    from loratools.tensors.base import TensorRef
    from loratools.verbs.saving import SaveReport

__all__ = ["Adapter", "AdapterConfig", "Extra", "ExtraRole", "Module", "Part", "flat_shape", "require_shape"]

Part = Literal["weight", "bias"]
# The reason of a "replacement" that PEFT saves beside an adapter without its having been trained.
SAVED_EMBEDDING = "saved embedding"
# "carried" tensors belong to something else that comes in the file, such as a textual inversion: kept as they are.
ExtraRole = Literal["replacement", "base_copy", "token_rows", "training_only", "carried", "unclaimed"]


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted weight, as the header describes it.

    Attributes:
        kind: ``lora``, ``dora``, ``adalora``, ``loha``, ``lokr``, ``full``, ``norm``; ``ia3``, ``glora``, ``oft``,
            ``oftv2``, ``boft``, ``set``, which need the weight itself.
        tensors: by role: ``down`` (rank, in), ``up`` (out, rank), ``magnitude`` (out,), and so on; see the loaders
            below. ``alpha`` is listed where a file has it, and has had its effect on ``scaling``.
        rank: of the delta as stored; None where the kind has none.
        alpha: as the configuration gives it.
        scaling: multiplies the delta; None when nothing says it.
        shape: of the delta: (out, in), with the kernel behind it for a convolution. What scales or rotates features
            knows their number only, (out,) or (in,), and perhaps ones beside it.
        options: what else the mathematics needs: ``experts``, ``blockwise``, ``embedding``, ``init``, ``indices``,
            ``magnitude_axis``, ``constraint``, ``on_input``...
    """

    kind: str
    tensors: Mapping[str, TensorRef]
    rank: int | None
    alpha: float | None
    scaling: float | None
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(ref.spec.count for ref in self.tensors.values())

    @property
    def factors(self) -> Mapping[str, TensorRef]:
        """Its tensors by role, without the numbers beside them: an alpha, and what says how the others are meant."""
        return {role: ref for role, ref in self.tensors.items() if role not in _NUMBERS}

    @property
    def is_delta(self) -> bool:
        """Whether the update of the weight is a plain sum."""
        return self.kind in _DELTAS and "init" not in self.options and "magnitude" not in self.tensors

    def adds(self, part: Part) -> bool:
        """Whether the update of the weight, or of the bias beside it, is a plain sum."""
        return self.is_delta if part == "weight" else self.kind != "ia3"

    @property
    def changes_weight(self) -> bool:
        """Whether it has a part for the weight: a trained bias may come alone."""
        return bool(self.tensors.keys() - {"alpha", *_BIAS_ROLES})

    @property
    def changes_bias(self) -> bool:
        """Whether it has a part for the bias. PEFT's IA3 of output features scales the bias with the weight."""
        if self.kind == "ia3":
            return not self.options["feedforward"] and not self.options.get("relative")
        return not self.tensors.keys().isdisjoint(_BIAS_ROLES)

    @property
    def rotates_input(self) -> bool:
        """Whether it is a rotation of input features, as those of PEFT are."""
        return "packed" in self.tensors or bool(self.options.get("on_input"))

    @property
    def by_feature(self) -> bool:
        """Whether it scales or rotates features, so that ``shape`` says no more than how many of them."""
        return self.kind in {"ia3", "oft", "oftv2", "boft"}

    def fits_features(self, weight: tuple[int, ...]) -> bool:
        """Whether a weight of this shape has as many features as it scales or rotates; see ``by_feature``."""
        if not (self.rotates_input or self.options.get("feedforward")):
            along = weight[0] if weight else 1
        elif self.kind == "ia3":
            along = weight[1] if len(weight) > 1 else 1
        else:  # inputs are rotated with their kernel
            along = flat_shape(weight)[1]
        count = prod(self.shape)
        shared = "packed" in self.tensors and self.tensors["packed"].shape[0] == 1
        return along % count == 0 if shared and count else along == count

    def rowwise(self, *, transposed: bool) -> bool:
        """Whether blocks of rows can be updated one by one, where the weight is stored transposed or not."""
        if "init" in self.options:
            return False
        if "magnitude" in self.tensors:
            by_input = bool(self.options.get("magnitude_axis", 0) == 1)
            return by_input == transposed
        if self.kind in {"oft", "oftv2", "boft"}:
            return self.rotates_input != transposed
        return self.kind != "glora" or not transposed

    def load(self, part: Part = "weight", index: int | None = None, *, double: bool = False) -> Update:
        """Read the tensors and make the update.

        Args:
            part: the update of the weight, or of the bias beside it.
            index: which expert, where the module packs several.
            double: compute in float64, for a float64 base.

        Raises:
            Unsupported: nothing says the scaling.
        """
        if self.scaling is None and self.kind not in _UNSCALED:
            raise Unsupported(
                f"nothing says how a {self.kind} module is scaled", hint="pass its adapter_config.json"
            )
        if part == "bias":
            return _ia3_bias(self, double) if self.kind == "ia3" else _bias(self, double)
        if index is not None:
            return _load_expert(self, index, double)
        return _LOADERS[self.kind](self, double)

    def array(self, role: str, double: bool = False) -> Array:
        """One tensor's values, in float32 or float64."""
        import numpy as np

        return self.tensors[role].load().astype(np.float64 if double else np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Extra:
    """A tensor no module claims: kept, counted, and consumed or refused by a merge, never dropped in silence.

    Attributes:
        tensor: where it is.
        target: the name it would have in the base.
        role: what to do with it; see ``reason``.
        reason: in words, for a person.
        indices: the rows it replaces, for ``token_rows``.
    """

    tensor: TensorRef
    target: str
    role: ExtraRole
    reason: str
    indices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What is known beside the weights."""

    peft_type: str | None = None
    base_model: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Modules by the name the file uses, and everything else in the file.

    Attributes:
        name: what to call it in messages: its path as given.
        format: ``peft``, or what the file was recognised as.
        evidence: why.
        refusal: why it cannot be computed with, and the way out; None where it can.
    """

    name: str
    format: str
    modules: Mapping[str, Module]
    config: AdapterConfig
    metadata: Mapping[str, str]
    extras: Mapping[str, Extra]
    evidence: str = ""
    kinds: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    refusal: tuple[str, str] | None = None
    tensors: tuple[TensorRef, ...] = ()

    def require_computable(self) -> None:
        """Refuse by name what has no meaning as an update of weights.

        Raises:
            Unsupported: with the reason, and the way out as its hint.
        """
        if self.refusal is not None:
            reason, way_out = self.refusal
            raise Unsupported(f"{self.name}: {reason}", hint=way_out)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,  # noqa: A002 - what the command line calls it
        arch: str | None = None,
        dtype: object = None,
        force: bool = False,
        sync: bool = True,
    ) -> SaveReport:
        """Write the adapter: a folder, or one file where ``path`` ends in ``.safetensors``.

        Arguments and errors are those of :func:`loratools.verbs.saving.save`.
        """
        from loratools.verbs.saving import save

        return save(self, path, format=format, arch=arch, dtype=dtype, force=force, sync=sync)


def require_own_rank(adapter: str, name: str, module: Module) -> None:
    """Refuse a module whose configuration was written for other weights: the scaling it gives would be a guess.

    Raises:
        Mismatch: its rank in the file is not that of the configuration.
    """
    if "config_rank" in module.options:
        wanted = module.options["config_rank"]
        raise Mismatch(
            f"{adapter}: {name} has rank {module.rank} in the file and {wanted} in the configuration",
            hint="is this the configuration the weights were saved with?",
        )


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


def _load_expert(module: Module, index: int, double: bool) -> Delta:
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
        for role in _BIAS_ROLES
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


_DELTAS = {"lora", "adalora", "loha", "lokr", "full", "norm"}
# Which need nothing that says their scaling.
_UNSCALED = {"ia3", "full", "norm", "set", "oft", "oftv2", "boft"}
_NUMBERS = ("alpha", "on_input", "reshape")
_BIAS_ROLES = ("up_bias", "diff_bias")
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


def flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight's shape as a matrix: (out, everything else); a vector is one column.

    >>> flat_shape((8, 3, 5, 5)), flat_shape((8,)), flat_shape(())
    ((8, 75), (8, 1), (1, 1))
    """
    return (shape[0] if shape else 1), prod(shape[1:])


def require_shape(name: str, delta: tuple[int, ...], weight: tuple[int, ...]) -> None:
    """Raise :class:`~loratools.errors.ShapeMismatch` unless the two are equal."""
    if delta != weight:
        raise ShapeMismatch(name, delta, weight)
