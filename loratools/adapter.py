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
ExtraRole = Literal["replacement", "base_copy", "token_rows", "training_only", "unclaimed"]


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted weight, as the header describes it.

    Attributes:
        kind: ``lora``, ``dora``, ``adalora``, ``ia3``, ``loha``, ``lokr``.
        tensors: by role: ``down`` (rank, in), ``up`` (out, rank), ``magnitude`` (out,), and so on.
        rank: of the delta as stored; None where the kind has none.
        alpha: as the configuration gives it.
        scaling: multiplies the delta; None when nothing says it.
        shape: of the delta: (out, in), with the kernel behind it for a convolution.
        options: what else the mathematics needs: ``experts``, ``blockwise``, ``embedding``, ``init``, ``indices``...
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
    def is_delta(self) -> bool:
        """Whether the update is a plain sum."""
        return self.kind in _DELTAS and "init" not in self.options

    def rowwise(self, *, transposed: bool) -> bool:
        """Whether blocks of rows can be updated one by one, where the weight is stored transposed or not."""
        return "init" not in self.options and not (self.kind == "dora" and transposed)

    def load(self, part: Part = "weight", index: int | None = None, *, double: bool = False) -> Update:
        """Read the tensors and make the update.

        Args:
            part: the update of the weight, or of the bias beside it.
            index: which expert, where the module packs several.
            double: compute in float64, for a float64 base.

        Raises:
            Unsupported: nothing says the scaling.
        """
        if self.scaling is None and self.kind != "ia3":
            raise Unsupported(
                f"nothing says how a {self.kind} module is scaled", hint="pass its adapter_config.json"
            )
        if part == "bias":
            return _BIASES[self.kind](self, double)
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
        format: str = "peft",  # noqa: A002 - what the command line calls it
        dtype: object = None,
        force: bool = False,
        sync: bool = True,
    ) -> SaveReport:
        """Write the adapter: a folder, or one file where ``path`` ends in ``.safetensors``.

        Arguments and errors are those of :func:`loratools.verbs.saving.save`.
        """
        from loratools.verbs.saving import save

        return save(self, path, format=format, dtype=dtype, force=force, sync=sync)


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
    from loratools.deltas.lowrank import LowRank, block_diagonal

    down, up = module.array("down", double), module.array("up", double)
    down, up = down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)
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


def _dora(module: Module, double: bool) -> Update:
    from loratools.deltas.dora import WeightDecomposed

    return WeightDecomposed(_lora(module, double), module.array("magnitude", double).reshape(-1))


def _adalora(module: Module, double: bool) -> Update:
    from loratools.deltas.lowrank import LowRank

    down = module.array("down", double) * module.array("singular", double)
    return LowRank(module.array("up", double), down, module.scaling or 0.0)


def _ia3(module: Module, double: bool) -> Update:
    from loratools.deltas.scaled import Scaled

    factors = module.array("scale", double).reshape(-1)
    return Scaled(factors, module.options["feedforward"], (factors.size, factors.size))


def _loha(module: Module, double: bool) -> Update:
    from loratools.deltas.hadamard import Hadamard, tucker
    from loratools.deltas.lowrank import LowRank

    def half(which: str) -> LowRank:
        left, right = module.array(f"{which}_a", double), module.array(f"{which}_b", double)
        if (core := f"{which}_core") in module.tensors:
            left, right = tucker(module.array(core, double), left, right)
        return LowRank(left, right)

    return Hadamard(half("first"), half("second"), module.scaling or 0.0)


def _lokr(module: Module, double: bool) -> Update:
    from loratools.deltas.full import Dense
    from loratools.deltas.hadamard import tucker
    from loratools.deltas.kronecker import Kronecker

    def side(which: str) -> Array:
        if which in module.tensors:
            return module.array(which, double)
        left, right = module.array(f"{which}_a", double), module.array(f"{which}_b", double)
        if (core := f"{which}_core") in module.tensors:
            left, right = tucker(module.array(core, double), left, right)
        return left @ right

    left, right = side("left"), side("right")
    if right.ndim == 3:
        # PEFT lets torch.kron pad the left factor of a 1-d convolution in front and reshapes what comes out. The
        # adapter was trained through that, so that is its delta, however odd.
        import numpy as np

        return Dense(np.kron(left, right).reshape(left.shape[0] * right.shape[0], -1), module.scaling or 0.0)
    return Kronecker(left, right.reshape(right.shape[0], -1), module.scaling or 0.0)


def _lora_bias(module: Module, double: bool) -> Update:
    from loratools.deltas.full import Dense

    return Dense(module.array("up_bias", double).reshape(-1, 1), module.scaling or 0.0)


def _ia3_bias(module: Module, double: bool) -> Update:
    from loratools.deltas.scaled import Scaled

    factors = module.array("scale", double).reshape(-1)
    return Scaled(factors, False, (factors.size, 1))


_DELTAS = {"lora", "adalora", "loha", "lokr"}
_LOADERS: dict[str, Callable[[Module, bool], Update]] = {
    "lora": _lora,
    "dora": _dora,
    "adalora": _adalora,
    "ia3": _ia3,
    "loha": _loha,
    "lokr": _lokr,
}
_BIASES: dict[str, Callable[[Module, bool], Update]] = {"lora": _lora_bias, "ia3": _ia3_bias}


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
