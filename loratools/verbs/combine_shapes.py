"""The result of ``combine`` as far as headers tell: ranks and shapes without values, for a dry run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from loratools.adapter import Extra, Module, flat_shape
from loratools.dtypes import DTYPES
from loratools.tensors.base import TensorRef, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratools.pairing import Slots
    from loratools.tensors.base import TensorSource
    from loratools.verbs.combine_report import CombinedExtra
    from loratools.verbs.combine_work import Item

__all__ = ["hides_kernel", "shape_module", "stored_rank", "unread_extras"]


@dataclass(frozen=True, slots=True)
class _Headers:
    """A source that can say what its tensors will be, and no more."""

    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]

    def extent(self, name: str) -> None:
        """Nowhere yet."""


def hides_kernel(module: Module) -> bool:
    """Whether the file has a convolution's kernel flattened, as it would have a linear layer."""
    flat = module.kind in {"adalora", "loha", "lokr"} and len(module.shape) == 2
    return flat and "embedding" not in module.options


def stored_rank(module: Module) -> int:
    """The rank of a module's factors as they will be: that of a LoHa is squared, of a LoKr not known exactly."""
    out, into = flat_shape(module.shape)
    rank = module.rank or min(out, into)
    if module.kind == "loha":
        rank *= rank
    if module.kind == "lokr" and "left" in module.tensors:
        rank *= min(module.tensors["left"].shape)
    return rank


def shape_module(item: Item, rank: int, dtype: str) -> Module:
    """A module of the result at this rank, in the dtype of this name: tensors that have a shape and no values."""
    like = item.like
    out, _ = flat_shape(like.shape)
    count = like.options.get("experts", 1)
    shapes: dict[str, tuple[int, ...]] = {
        "down": (rank * count, *like.shape[1:]),
        "up": (out, rank * count, *(1 for _ in like.shape[2:])),
    }
    if item.biased or any("up_bias" in module.tensors for _, module in item.modules):
        shapes["up_bias"] = (out,)
    source = cast(
        "TensorSource",
        _Headers({role: TensorSpec(DTYPES[dtype], shape) for role, shape in shapes.items()}, {}),
    )
    options = {key: like.options[key] for key in ("embedding", "experts") if key in like.options}
    refs = {role: TensorRef(source, role) for role in shapes}
    return Module("lora", refs, rank, float(rank), 1.0, like.shape, options)


def unread_extras(extras: Sequence[CombinedExtra], slots: Mapping[str, Slots[Extra]]) -> dict[str, Extra]:
    """The extras as the first adapter that has them stores them: a mean has the same shape."""
    found = {}
    for entry in extras:
        key, extra = next(slot for slot in slots[entry.name] if slot is not None)
        found[key] = extra
    return found
