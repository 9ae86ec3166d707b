"""Methods that need no more than the angles between deltas: SLERP and Model Stock. Exact on the factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from loratools.methods.base import Between, Stack, method

if TYPE_CHECKING:
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["model_stock", "slerp"]

_PARALLEL = 0.9995  # beyond this cosine the arc is a straight line to seven digits, and sin(theta) no divisor


@method(
    formula="d_0 = w_1 D_1, d_1 = w_2 D_2, theta the angle between them;\n"
    "D = sin((1-t) theta) / sin(theta) d_0 + sin(t theta) / sin(theta) d_1;\n"
    "linear, (1-t) d_0 + t d_1, where abs(cos(theta)) > 0.9995 or one of them is zero",
    paper="https://doi.org/10.1145/325165.325242",
    when="Two adapters of one kind (two characters, two styles), to go from one to the other without the loss of "
    "strength that an average has halfway.",
    cost="Gram matrices of the factors.",
    least=2,
    most=2,
)
def slerp(stack: Stack, *, t: Annotated[float, Between(0, 1)] = 0.5) -> LowRank:
    """The point at t on the arc from one delta to another, on each matrix by itself.

    The weights multiply the deltas before; t says how far to go. A matrix that only one of the adapters has goes
    linearly to or from zero.

    >>> import numpy as np
    >>> from loratools.deltas.lowrank import LowRank
    >>> one, other = LowRank(np.eye(2, 1), np.eye(1, 2)), LowRank(np.eye(2, 1), np.eye(1, 2)[:, ::-1])
    >>> slerp(Stack("fc", (one, other), (1.0, 1.0))).rows(0, 1).round(4).tolist()
    [[0.7071, 0.7071]]

    Args:
        stack: what to combine.
        t: 0 is the first adapter, 1 the second.
    """
    from loratools.deltas.algebra import add

    if len(stack.deltas) == 1:
        second = bool(stack.tasks) and stack.tasks[0] == 1
        return add([((t if second else 1 - t) * stack.weights[0], stack.deltas[0])])
    cosine = _cosine(stack, 0, 1)
    start, end = 1 - t, t
    if cosine is not None and abs(cosine) <= _PARALLEL:
        angle = math.acos(cosine)
        start, end = math.sin(start * angle) / math.sin(angle), math.sin(end * angle) / math.sin(angle)
    factors = (start * stack.weights[0], end * stack.weights[1])
    return add(list(zip(factors, stack.deltas, strict=True)))


@method(
    formula="d_i = w_i D_i, cos = mean of cos(d_i, d_j) over all pairs, t = N cos / (1 + (N-1) cos);\n"
    "D = t mean(d_i), t between 0 and 1",
    paper="https://arxiv.org/abs/2403.19522",
    when="Several trainings of one task on the same data, from different seeds: what they have in common is kept. "
    "Adapters for different tasks are nearly orthogonal, and nearly nothing of them is left.",
    cost="Gram matrices of the factors; by rows as well.",
    least=2,
)
def model_stock(stack: Stack, *, by: Literal["matrix", "row"] = "matrix") -> LowRank:
    """The mean of the deltas, drawn towards zero (the base model) by how little they agree.

    The weights multiply the deltas before; N counts the adapters that have the matrix, and where it is one alone its
    delta stays as it is. With nothing in common, a mean cosine of zero or below, nothing is left: the formula would
    turn the mean round and be without bound near cos = -1/(N-1). A zero delta has a cosine of 0 with any other.

    Args:
        stack: what to combine.
        by: whether t is of the whole matrix, or of each row (a filter, in the paper).
    """
    from loratools.deltas.algebra import add

    count = len(stack.deltas)
    if count == 1:
        return add([(stack.weights[0], stack.deltas[0])])
    mean = add([(weight / count, delta) for weight, delta in zip(stack.weights, stack.deltas, strict=True)])
    if by == "row":
        from loratools.deltas.lowrank import LowRank

        shares = _shares(_row_cosines(stack), count)
        return LowRank((mean.up * shares[:, None]).astype(mean.up.dtype), mean.down)
    pairs = [_cosine(stack, i, j) or 0.0 for j in range(count) for i in range(j)]
    return add([(float(_shares(sum(pairs) / len(pairs), count)), mean)])


def _shares(cosine: Array | float, count: int) -> Array:
    """The share of the mean that is kept: N cos / (1 + (N-1) cos), between 0 and 1."""
    import numpy as np

    kept = np.clip(cosine, 0.0, 1.0)
    shares: Array = count * kept / (1 + (count - 1) * kept)
    return shares


def _cosine(stack: Stack, i: int, j: int) -> float | None:
    """Between two of the weighted deltas; None where one is zero."""
    from loratools.deltas.algebra import inner, norm

    first, second = stack.deltas[i], stack.deltas[j]
    size = stack.weights[i] * norm(first) * stack.weights[j] * norm(second)
    if size == 0:
        return None
    signed = stack.weights[i] * stack.weights[j] * inner(first, second)
    return max(-1.0, min(1.0, signed / abs(size)))


def _row_cosines(stack: Stack) -> Array:
    """The mean cosine over all pairs, for each row: (out,). A row of zeros has 0 with any other."""
    import numpy as np

    pairs = zip(stack.weights, stack.deltas, strict=True)
    ups = [weight * delta.up.astype(np.float64) for weight, delta in pairs]
    downs = [delta.down.astype(np.float64) for delta in stack.deltas]

    def products(i: int, j: int) -> Array:
        rows: Array = np.sum((ups[i] @ (downs[i] @ downs[j].T)) * ups[j], axis=1)
        return rows

    count = len(ups)
    norms = [np.sqrt(np.maximum(products(i, i), 0.0)) for i in range(count)]
    total = np.zeros(stack.shape[0])
    for j in range(count):
        for i in range(j):
            sizes = norms[i] * norms[j]
            total += np.divide(products(i, j), sizes, out=np.zeros_like(sizes), where=sizes > 0)
    return total / (count * (count - 1) / 2)
