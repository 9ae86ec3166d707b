"""What PEFT computes, bit for bit, for those who need its numbers. None of it is a merge of deltas.

``add_weighted_adapter`` combines all A and all B separately, each with the root of weight times scaling. The product of
two sums has cross terms B_i A_j of adapters that have nothing to do with each other: for two random adapters with
weights 0.7 and 0.3 the result is 75% away from the sum that was meant. ``linear`` and ``ties`` are the methods to use.

The deltas of the stack must carry the factors as they are stored and their scaling beside them: B times the scaling
rounds otherwise, and differs where the scalings do. Equal to PEFT 0.21.2 on the CPU for float32 factors and up to four
adapters (beyond, torch adds in another order); where equal magnitudes compete for the last places that a density
leaves, PEFT takes what ``torch.topk`` happens to return, and this the first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from loratools.errors import Mismatch
from loratools.methods.base import Between, Stack, method

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["peft_linear", "peft_ties"]

_PAPER = "https://huggingface.co/docs/peft/main/en/package_reference/lora#peft.LoraModel.add_weighted_adapter"
_WHEN = "Only to repeat a result made with PEFT. Use {} instead."


@method(
    legacy=True,
    formula="c_t = sqrt(abs(w_t s_t)); A = sum_t sign(w_t s_t) c_t A_t; B = sum_t c_t B_t; D = B A",
    paper=_PAPER,
    when=_WHEN.format("linear"),
    cost="Adds up the factors.",
)
def peft_linear(stack: Stack) -> LowRank:
    """PEFT's add_weighted_adapter("linear"): A and B added up separately, with cross terms; not a sum of deltas.

    The weights enter as their roots on either side, a sign on the side of A. All ranks must be equal.
    """
    return _separately(stack, _sum)


@method(
    legacy=True,
    formula="c_t as in peft_linear; for A and B each: x_t trimmed to the int(density n) largest; sign = that of\n"
    "sum_t x_t, + where it is 0; sum of the c_t x_t with that sign / number of them; D = B A",
    paper=_PAPER,
    when=_WHEN.format("ties"),
    cost="A partial sort of each factor.",
    least=2,
)
def peft_ties(
    stack: Stack,
    *,
    density: Annotated[float, Between(0, 1)] = 0.2,
    majority_sign: Literal["total", "frequency"] = "total",
) -> LowRank:
    """PEFT's add_weighted_adapter("ties"): the rule applied to A and B separately; not TIES of deltas.

    The weights have no vote in the election, and divide nothing: 0.5 and 0.5 give half of what 1 and 1 give. All ranks
    must be equal. PEFT turns to linear for a single adapter; here that is refused.

    Args:
        stack: what to combine.
        density: share of the entries of each factor that is kept; PEFT has no default.
        majority_sign: elect by the sum of the values, or by the number of adapters on either side.
    """

    def rule(parts: Sequence[Array], weights: Sequence[float]) -> Array:
        return _ties(parts, weights, density, majority_sign)

    return _separately(stack, rule)


def _separately(stack: Stack, rule: Callable[[Sequence[Array], Sequence[float]], Array]) -> LowRank:
    """Apply a rule to all A and to all B."""
    from loratools.deltas.lowrank import LowRank

    ranks = {delta.down.shape[0] for delta in stack.deltas}
    if len(ranks) > 1:
        raise Mismatch(
            f"{stack.name}: PEFT's factor-wise methods need equal ranks, not {', '.join(map(str, sorted(ranks)))}",
            hint="--method linear combines any ranks, exactly",
        )
    products = [weight * delta.scaling for weight, delta in zip(stack.weights, stack.deltas, strict=True)]
    roots = [math.sqrt(abs(product)) for product in products]
    signed = [root if product >= 0 else -root for root, product in zip(roots, products, strict=True)]
    down = rule([delta.down for delta in stack.deltas], signed)
    return LowRank(rule([delta.up for delta in stack.deltas], roots), down)


def _sum(parts: Sequence[Array], weights: Sequence[float]) -> Array:
    """Σ w_t x_t, the weights rounded to float32 as torch does, from left to right."""
    import numpy as np

    total = np.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total += part * part.dtype.type(np.float32(weight))
    return total


def _ties(parts: Sequence[Array], weights: Sequence[float], density: float, majority_sign: str) -> Array:
    import numpy as np

    kept = [_trimmed(part, density) for part in parts]
    votes = kept if majority_sign == "total" else [np.sign(part) for part in kept]
    elected = np.where(_sum(votes, [1.0] * len(votes)) >= 0, 1, -1).astype(kept[0].dtype)
    agree = [np.sign(part) == elected for part in kept]
    total = _sum([np.where(mask, part, 0) for mask, part in zip(agree, kept, strict=True)], weights)
    count: Array = np.maximum(np.sum(agree, axis=0), 1).astype(kept[0].dtype)
    return total / count


def _trimmed(part: Array, density: float) -> Array:
    """The int(density n) entries of largest magnitude, zeros elsewhere; the first in order where several are equal."""
    import numpy as np

    if density >= 1:
        return part
    sizes = np.abs(part).ravel()
    order = np.argsort(-sizes, kind="stable")[: int(density * sizes.size)]
    result = np.zeros_like(sizes)
    result[order] = part.ravel()[order]
    return result.reshape(part.shape)
