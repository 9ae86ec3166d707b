"""An adapter as its file describes it, before any weight is read: modules, and everything that is not one.

This is where the two worlds meet. A :class:`Module` holds references to tensors by the role they play; ``load`` turns
it into an :class:`~loratools.deltas.base.Update`, which knows only arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from loratools.errors import Mismatch, Unsupported
from loratools.shapes import flat_shape, require_shape
from loratools.updates import BIAS_ROLES, load_bias, load_expert, load_weight

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from loratools.deltas.base import Update
    from loratools.dtypes import Array
    from loratools.tensors.base import TensorRef
    from loratools.verbs.saving import SaveReport

__all__ = [
    "CONSTRAINED", "RANKED", "UNSCALED", "Adapter", "AdapterConfig", "Extra", "ExtraRole", "Module", "Part",
    "flat_shape", "require_shape",
]  # fmt: skip

Part = Literal["weight", "bias"]
# The reason of a "replacement" that PEFT saves beside an adapter without its having been trained.
SAVED_EMBEDDING = "saved embedding"
# "carried" tensors belong to something else that comes in the file, such as a textual inversion: kept as they are.
ExtraRole = Literal["replacement", "base_copy", "token_rows", "training_only", "carried", "unclaimed"]
_DELTAS = {"lora", "adalora", "loha", "lokr", "full", "norm"}
# Which need nothing that says their scaling.
UNSCALED = frozenset({"ia3", "full", "norm", "set", "oft", "oftv2", "boft"})
# Which an alpha over their rank scales, and which take it for a limit.
RANKED = frozenset({"lora", "dora", "loha", "lokr", "glora"})
CONSTRAINED = frozenset({"oft", "boft"})
_NUMBERS = ("alpha", "on_input", "reshape")


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
        return bool(self.tensors.keys() - {"alpha", *BIAS_ROLES})

    @property
    def changes_bias(self) -> bool:
        """Whether it has a part for the bias. PEFT's IA3 of output features scales the bias with the weight."""
        if self.kind == "ia3":
            return not self.options["feedforward"] and not self.options.get("relative")
        return not self.tensors.keys().isdisjoint(BIAS_ROLES)

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
        if self.scaling is None and self.kind not in UNSCALED:
            raise Unsupported(
                f"nothing says how a {self.kind} module is scaled", hint="pass its adapter_config.json"
            )
        if part == "bias":
            return load_bias(self, double)
        return load_weight(self, double) if index is None else load_expert(self, index, double)

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
