"""An adapter as plain pairs of factors: what formats can hold that know one scale and nothing else.

Their writers ask for the pairs, choose the scale that most modules have, and fold the rest into the upper factors.
What is no such pair is listed with the reason; nothing is left out in silence.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.dtypes import DTYPES
from loratools.errors import BadConfig, NonFinite, Unsupported
from loratools.tensors.base import TensorRef, TensorSpec
from loratools.tensors.memory import MemorySource, from_bytes
from loratools.tensors.views import reshaped

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loratools.adapter import Adapter, Module
    from loratools.dtypes import Array, Dtype

__all__ = ["Pair", "alike", "as_type", "commonest", "folded", "plain_pairs"]

# Extras that say nothing the base does not say, and that change nothing where they are left out.
_SILENT = ("base_copy", "training_only")
_REDUCE = "loratools reduce makes a LoRA of it"
_EXTRACT = "merge it into the base and extract a LoRA from the two"


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight's delta, ``scaling * up @ down``.

    Attributes:
        down: (rank, in).
        up: (out, rank).
        scaling: multiplies the product.
        magnitude: (out,), of a DoRA.
        embedding: whether the weight is an embedding: the delta is added transposed.
    """

    down: TensorRef
    up: TensorRef
    scaling: float
    magnitude: TensorRef | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Of the factors as stored."""
        return self.down.shape[0]


def plain_pairs(adapter: Adapter, *, dora: bool) -> tuple[dict[str, Pair], dict[str, str]]:
    """The modules that are such pairs; and what is not, by module or key, with the reason.

    Reads values only of modules that are stored as something else (AdaLoRA, block-diagonal factors).

    Args:
        adapter: any.
        dora: whether a pair may come with a magnitude.

    Raises:
        Unsupported: the adapter cannot be computed with, or nothing says how a module is scaled.
        BadConfig: a module's scaling is not a number.
    """
    adapter.require_computable()
    pairs: dict[str, Pair] = {}
    lost: dict[str, str] = {}
    for name, module in adapter.modules.items():
        reason = _why_not(module, dora=dora)
        if reason is not None:
            lost[name] = reason
            continue
        _require_scaling(name, module)
        if module.rank:  # AdaLoRA may have pruned a module away
            pairs[name] = _pair(name, module)
        if (bias := module.tensors.get("up_bias")) is not None:
            lost[bias.name] = "a bias of the LoRA itself (lora_bias)"
    for key, extra in adapter.extras.items():
        if extra.role not in _SILENT:
            lost[key] = f"{extra.reason}: no factor of a LoRA"
    return pairs, lost


def _why_not(module: Module, *, dora: bool) -> str | None:
    if module.kind not in {"lora", "dora", "adalora"}:
        way_out = _REDUCE if module.is_delta else _EXTRACT
        return f"is {module.kind}, not a pair of factors: {way_out}"
    if init := module.options.get("init"):
        return f"starts from a part of its base ({init}): loratools normalize --base BASE makes a plain LoRA of it"
    if "experts" in module.options:
        return "packs several experts in one pair of factors"
    if len(module.shape) != 2 or "mid" in module.tensors:
        return "is a convolution"
    if module.kind == "dora" and (not dora or module.options.get("magnitude_axis", 0) != 0):
        return f"is a DoRA, whose magnitude has no place here: {_EXTRACT}"
    if module.kind == "dora" and module.options.get("embedding"):
        return f"is a DoRA of an embedding, which this format norms along the other axis: {_EXTRACT}"
    return None


def _require_scaling(name: str, module: Module) -> None:
    if module.scaling is None:
        raise Unsupported(
            f"nothing says how {name} is scaled", hint="pass its adapter_config.json, or --alpha"
        )
    if not math.isfinite(module.scaling):
        raise BadConfig(f"{name} is scaled by {module.scaling}", hint="alpha must be a finite number")


def _pair(name: str, module: Module) -> Pair:
    plain = module.kind != "adalora" and not {"down_blocks", "up_blocks"} & module.options.keys()
    if plain:
        down, up, scaling = module.tensors["down"], module.tensors["up"], module.scaling
    else:
        down, up, scaling = _computed(name, module)
    rank, magnitude = down.shape[0], module.tensors.get("magnitude")
    return Pair(
        reshaped(down, (rank, module.shape[1])),
        reshaped(up, (module.shape[0], rank)),
        scaling or 0.0,
        None if magnitude is None else reshaped(magnitude, (module.shape[0],)),
        bool(module.options.get("embedding")),
    )


def _computed(name: str, module: Module) -> tuple[TensorRef, TensorRef, float]:
    from loratools.matrices import matrices

    if module.kind == "dora":
        plain = replace(
            module, kind="lora", tensors={r: t for r, t in module.tensors.items() if r != "magnitude"}
        )
        return _computed(name, plain)
    (factors,) = matrices(module, name, fold=False)
    source = MemorySource({f"{name}.down": factors.down, f"{name}.up": factors.up})
    return TensorRef(source, f"{name}.down"), TensorRef(source, f"{name}.up"), factors.scaling


def commonest(values: Iterable[float]) -> float:
    """The value that most modules share, leaving zeros aside; 0 where all are zero."""
    counted = Counter(value for value in values if value)
    return counted.most_common(1)[0][0] if counted else 0.0


def folded(ref: TensorRef, factor: float) -> TensorRef:
    """A tensor times a number: in its own type where no bit is lost (powers of two), else rounded once to float32.

    Raises:
        NonFinite: a product is not finite.
    """
    if factor == 1.0:
        return ref
    import numpy as np

    values = ref.load()
    product = values.astype(np.float64) * factor
    kept = _stored(product, ref.spec.dtype)
    if ref.spec.dtype.name != "F64" and not np.array_equal(
        _values(kept, ref.spec.dtype), product.reshape(-1), equal_nan=True
    ):
        return _made(ref, _stored(product, DTYPES["F32"]), DTYPES["F32"], values)
    return _made(ref, kept, ref.spec.dtype, values)


def as_type(ref: TensorRef, wanted: Dtype) -> TensorRef:
    """A tensor rounded once to a type; itself where it has it.

    Raises:
        NonFinite: a value does not fit the type.
    """
    if ref.spec.dtype == wanted:
        return ref
    values = ref.load()
    return _made(ref, _stored(values, wanted), wanted, values)


def _stored(values: Array, wanted: Dtype) -> Array:
    import numpy as np

    from loratools.dtypes import narrow

    return narrow(values, wanted, np.empty(wanted.nbytes(values.size), np.uint8))


def _values(raw: Array, stored: Dtype) -> Array:
    from loratools.dtypes import widen

    return widen(raw, stored)


def _made(ref: TensorRef, raw: Array, stored: Dtype, before: Array) -> TensorRef:
    import numpy as np

    after = _values(raw, stored)
    if not np.isfinite(after).all() and np.isfinite(before).all():
        raise NonFinite(f"{ref.name}: a value does not fit {stored}", hint="write f32")
    spec = TensorSpec(stored, ref.shape)
    return TensorRef(MemorySource({ref.name: from_bytes(raw, spec, torch_out=False)}), ref.name)


def alike(refs: Iterable[TensorRef]) -> list[TensorRef]:
    """Tensors in one type: their own where they share it, else float32."""
    listed = list(refs)
    if len({ref.spec.dtype.name for ref in listed}) == 1:
        return listed
    return [as_type(ref, DTYPES["F32"]) for ref in listed]
