"""Methods that work on singular values and vectors: TSV-M, Iso-C and Iso-CTS.

All see w_t D_t in place of the paper's task matrices, a weight of 0 leaves an adapter out, and a negative one turns it
round. All work in the common frame, on the numerical components of each matrix alone: the singular vectors that a
decomposition returns for the null space of a LoRA are noise, and these methods would give them full weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from loratools.methods.base import Between, Share, Stack, method
from loratools.methods.frames import Components, components, frame, polar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["iso", "iso_cts", "tsv"]


@method(
    formula="w_t D_t = U_t S_t V_t^T with k = r_t components;\n"
    "D = scale polar([U_1 .. U_T]) diag(S_1 .. S_T) polar([V_1 .. V_T])^T",
    paper="https://arxiv.org/abs/2412.00081",
    when="Adapters for different tasks that disturb each other: it makes their singular directions orthogonal before "
    "it adds them up.",
    cost="Two QR decompositions of (out, R) and (in, R) and SVDs of R x R matrices, R the sum of the ranks.",
)
def tsv(stack: Stack, *, scale: float = 1.0, task_rank: Annotated[int, Between(0)] = 0) -> LowRank:
    """TSV-M: the singular directions of all adapters made orthogonal to each other, then added up.

    The weights multiply the singular values. Each adapter gives all its own components, not min(out, in) / T of them
    as for full matrices, of which most would be noise. The result has the sum of the ranks.

    >>> import numpy as np
    >>> from loratools.deltas.lowrank import LowRank
    >>> one = LowRank(np.eye(5, 2), np.eye(2, 4))
    >>> bool(np.allclose(tsv(Stack("fc", (one, one), (1.0, 1.0))).rows(0, 5), one.rows(0, 5)))
    True

    Args:
        stack: what to combine.
        scale: what the result is multiplied by.
        task_rank: components taken from each adapter; 0 for all it has.
    """
    shared = frame(stack.deltas)
    parts = [components(core) for core in shared.weighted(stack.weights)]
    left, values, right = _joined([part.top(task_rank) if task_rank else part for part in parts])
    return _scaled(shared.lift_spectrum(polar(left), values, polar(right)), scale)


@method(
    formula="sum_t w_t D_t = U S V^T, numerical components only;\nD = scale mean(S) U V^T",
    paper="https://arxiv.org/abs/2502.04959",
    when="Several tasks at once, where a few directions of the sum would drown the others. A rank given afterwards "
    "hurts it more than others, for all its singular values are equal.",
    cost="Two QR decompositions of (out, R) and (in, R) and one SVD of an R x R matrix.",
)
def iso(stack: Stack, *, scale: float = 1.0) -> LowRank:
    """Iso-C: the weighted sum with all its singular values replaced by their mean.

    The mean is over the components that the sum has, as many as the sum of the ranks where nothing is in common; the
    result stays within the span of the factors. The weights act in the sum, before its spectrum is flattened.

    Args:
        stack: what to combine.
        scale: what the result is multiplied by; the paper searches 0 to 3.
    """
    import numpy as np

    shared = frame(stack.deltas)
    left, values, right = _sum(shared.weighted(stack.weights))
    flat = np.full_like(values, values.mean() if values.size else 0.0)
    return _scaled(shared.lift_spectrum(left, flat, right), scale)


@method(
    formula="sum_t w_t D_t = U S V^T of rank r; s = round((r - int(common r)) / T); k = r - T s;\n"
    "U_k, S_k, V_k: the first k of them; u_t, s_t, v_t: the first s components of (I - U_k U_k^T) w_t D_t;\n"
    "D = scale mean(S_k, s_1 .. s_T) polar([U_k, u_1 .. u_T]) polar([V_k, v_1 .. v_T])^T",
    paper="https://arxiv.org/abs/2502.04959",
    when="Like iso, with many adapters: directions that only one of them has keep a place of their own.",
    cost="As iso, and an SVD of an R x R matrix for each adapter.",
)
def iso_cts(stack: Stack, *, scale: float = 1.0, common: Share = 0.8) -> LowRank:
    """Iso-CTS: the common directions of the sum, those that each adapter has to itself, and one singular value for all.

    r is the numerical rank of the sum, or --rank where that is lower; never the size of the matrix. The weights act in
    the sum and on each adapter's own part.

    Args:
        stack: what to combine.
        scale: what the result is multiplied by.
        common: share of the directions that comes from the sum; the rest is divided among the adapters.
    """
    import numpy as np

    shared = frame(stack.deltas)
    cores = shared.weighted(stack.weights)
    total = _sum(cores)
    rank = total.values.size if stack.rank is None else min(stack.rank, total.values.size)
    specific = min(round((rank - int(common * rank)) / len(cores)), rank // len(cores))
    first = total.top(rank - len(cores) * specific)
    parts = [first]
    for core in cores:
        rest = core - first.left @ (first.left.T @ core)
        parts.append(components(rest, float(np.linalg.norm(core))).top(specific))
    left, values, right = _joined(parts)
    left, right = polar(left), polar(right)
    size = scale * values.mean() if values.size else 0.0
    return shared.lift(size * left, right)


def _sum(cores: Sequence[Array]) -> Components:
    """The components of a sum; what is left where the terms cancel is none."""
    import numpy as np

    return components(sum(cores[1:], cores[0]), sum(float(np.linalg.norm(core)) for core in cores))


def _joined(parts: Sequence[Components]) -> Components:
    """The components of several matrices side by side: left (k, Σr), values (Σr,), right (Σr, l)."""
    import numpy as np

    return Components(
        np.concatenate([part.left for part in parts], axis=1),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.right for part in parts]),
    )


def _scaled(delta: LowRank, scale: float) -> LowRank:
    from loratools.deltas.algebra import add

    return delta if scale == 1.0 else add([(scale, delta)])
