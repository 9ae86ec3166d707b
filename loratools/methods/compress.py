"""Compress, then merge: one pair of low-rank bases for all adapters, and any rule on the small matrices in them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from loratools.methods.base import Between, Seed, Stack, method
from loratools.methods.frames import components, frame
from loratools.methods.rules import Rule, apply, check_rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["ctm"]

_ROUNDS = 1000
_TOLERANCE = 1e-6


@method(
    name="ctm",
    aliases=("compress_then_merge",),
    formula="N_t = (beta ||w_t D_t|| + (1-beta) mean_t ||w_t D_t||) w_t D_t / ||w_t D_t||;\n"
    "U, V: the orthonormal bases of r columns that keep most of sum_t ||U^T N_t V||^2 (Tucker-2 by HOOI);\n"
    "D = scale U rule(U^T D_1 V, .., U^T D_T V) V^T",
    paper="https://github.com/ZhengbaoHe/compress-then-merge",
    when="An elementwise rule (ties, dare_ties) whose result must have a rank chosen beforehand: it loses less than "
    "merging first and truncating afterwards.",
    cost="Two QR decompositions of (out, R) and (in, R), some ten to a hundred pairs of SVDs of R x (T r) matrices, "
    "and the rule on r x r matrices.",
    validate=check_rule,
)
def ctm(
    stack: Stack,
    *,
    rule: Rule = "ties",
    beta: Annotated[float, Between(0, 1)] = 0.0,
    density: Annotated[float, Between(0, 1)] = 0.0,
    seed: Seed = 0,
    scale: float = 1.0,
) -> LowRank:
    """CtM: bases of the output's rank for all adapters together, then another rule on r x r matrices.

    The rank is that of --rank, or the largest among the adapters. The bases serve w_t D_t; the rule gets the D_t, whose
    sizes are their own, and the weights.

    Args:
        stack: what to combine.
        rule: the method inside this one; where it works entry by entry, in the bases that the adapters share.
        beta: how much of their different sizes the adapters keep while the bases are chosen; 0 treats all alike.
        density: of the rule; 0 for its own default.
        seed: of the rule.
        scale: what the result is multiplied by.
    """
    import numpy as np

    from loratools.deltas.lowrank import LowRank

    shared = frame(stack.deltas)
    rank = stack.rank or max(delta.down.shape[0] for delta in stack.deltas)
    left, right = tucker(_levelled(shared.weighted(stack.weights), beta), rank)
    if not left.size or not right.size:  # nothing but zeros
        return shared.lift(left[:, :0], right[:, :0].T)
    small = tuple(LowRank(left.T @ core @ right, np.eye(right.shape[1])) for core in shared.cores)
    merged = apply(
        rule, replace(stack, deltas=small, rank=None), space="weight", density=density or None, seed=seed
    )
    found = components(merged.rows(0, left.shape[1]))
    return shared.lift_spectrum(scale * (left @ found.left), found.values, found.right @ right.T)


def _levelled(cores: Sequence[Array], beta: float) -> list[Array]:
    """The deltas at sizes between their own (beta 1) and their mean (beta 0)."""
    import numpy as np

    norms = [float(np.linalg.norm(core)) for core in cores]
    mean = sum(norms) / len(norms)
    return [
        core * ((beta * norm + (1 - beta) * mean) / norm) if norm else core
        for core, norm in zip(cores, norms, strict=True)
    ]


def tucker(matrices: Sequence[Array], rank: int) -> tuple[Array, Array]:
    """Bases U (k, r) and V (l, r) that keep most of Σ ‖Uᵀ N_t V‖², by alternating from the HOSVD.

    Higher-order orthogonal iteration (De Lathauwer et al. 2000, https://doi.org/10.1137/S0895479898346995) on two of
    three modes, until the relative error falls by less than 1e-6. A basis has fewer columns where there is less.

    >>> import numpy as np
    >>> left, right = tucker([np.diag([2.0, 1.0, 0.0]), np.diag([1.0, 1.0, 0.0])], 2)
    >>> left.shape, bool(np.allclose(left @ left.T, np.diag([1, 1, 0])))
    ((3, 2), True)
    """
    import numpy as np

    left = components(np.concatenate(matrices, axis=1)).left[:, :rank]
    right = components(np.concatenate(matrices)).right[:rank].T
    total = float(sum(np.sum(matrix**2) for matrix in matrices))
    before = np.inf
    for _ in range(_ROUNDS if total else 0):
        left = components(np.concatenate([matrix @ right for matrix in matrices], axis=1)).left[:, :rank]
        found = components(np.concatenate([left.T @ matrix for matrix in matrices]))
        right = found.right[:rank].T
        error = float(np.sqrt(max(0.0, 1 - np.sum(found.values[:rank] ** 2) / total)))
        if before - error < _TOLERANCE:
            break
        before = error
    return left, right
