"""What is done before or after another rule: Pico calibrates the deltas, SVC the singular values of their merge.

Both set the size of the result by themselves, so that only the ratios of the weights matter; ``scale`` sets the size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from loratools.methods.base import Between, Positive, Seed, Stack, method
from loratools.methods.frames import CANCELLED, ROUNDING, components, frame
from loratools.methods.rules import Rule, apply, check_rule

if TYPE_CHECKING:
    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["pico", "svc"]


@method(
    formula="[B_1 .. B_T] = U S V^T; c_j = S_j^2 / sum S^2; a_j = 1 / (1 + (T-1) c_j);\n"
    "B_t <- B_t + U diag(a - 1) U^T B_t; M = rule(w_1 B_1 A_1, .., w_T B_T A_T);\n"
    "D = scale (sum_t |w_t| ||D_t|| / sum_t |w_t|) M / ||M||",
    paper="https://arxiv.org/abs/2604.16826",
    when="Adapters for different fields (mathematics, code, medicine) whose outputs crowd into the same few "
    "directions: those are turned down before the merge.",
    cost="Two QR decompositions of (out, R) and (in, R), an SVD of an R x R matrix, and the rule.",
    validate=check_rule,
)
def pico(
    stack: Stack,
    *,
    rule: Rule = "linear",
    basis: Literal["stored", "delta"] = "stored",
    density: Annotated[float, Between(0, 1)] = 0.0,
    seed: Seed = 0,
    scale: float = 1.0,
) -> LowRank:
    """Pico: directions of the output that all adapters crowd into are turned down, then another rule merges.

    The norms ||D_t|| are those before calibration, the scaling of each adapter is in its B_t. The weights go to the
    rule, and the size of the result to their weighted mean: 0.5 and 0.5 give what 1 and 1 give.

    Args:
        stack: what to combine.
        rule: the method inside this one; where it works entry by entry, in the bases that the adapters share.
        basis: the B_t as they are stored, which is the paper's, or the columns of D_t itself, U_t S_t, which do not
            depend on how D_t is split into factors.
        density: of the rule; 0 for its own default.
        seed: of the rule.
        scale: what the result is multiplied by.
    """
    import numpy as np

    from loratools.deltas.algebra import add
    from loratools.deltas.lowrank import LowRank

    shared = frame(stack.deltas)
    ups = _columns(shared.ups, shared.downs, basis)
    left, values, _ = components(np.concatenate(ups, axis=1))
    shares = values**2 / max(float(np.sum(values**2)), np.finfo(float).tiny)
    turned = 1 / (1 + (len(ups) - 1) * shares) - 1
    calibrated = []
    for delta, up in zip(stack.deltas, shared.ups, strict=True):
        high = up + left @ (turned[:, None] * (left.T @ up))
        wide = high if shared.left is None else shared.left @ high
        calibrated.append(LowRank(wide, delta.down.astype(np.float64)))
    merged = apply(
        rule, replace(stack, deltas=tuple(calibrated), rank=None),
        space="core", density=density or None, seed=seed,
    )  # fmt: skip
    norms = np.array([np.linalg.norm(core) for core in shared.cores])
    weights = np.abs(np.array(stack.weights, np.float64))
    size, wanted = float(np.linalg.norm(shared.coordinates(merged))), float(weights @ norms)
    nothing = size <= CANCELLED * wanted
    factor = 0.0 if nothing else scale * wanted / float(weights.sum()) / size
    found = add([(factor, merged)])
    return LowRank(found.up.astype(shared.dtype), found.down.astype(shared.dtype))


def _columns(ups: tuple[Array, ...], downs: tuple[Array, ...], basis: str) -> list[Array]:
    """What the crowded directions are found from, for each delta: (k, r_t)."""
    if basis == "stored":
        return list(ups)
    import numpy as np

    # A_t^T = Q R, so B_t R^T has the same left singular vectors and values as B_t A_t.
    return [up @ np.linalg.qr(down.T)[1].T for up, down in zip(ups, downs, strict=True)]


@method(
    formula="M = rule(w_1 D_1, .., w_T D_T) = U S V^T; v_t = w_t / mean |w|; a_rt = u_r^T v_t D_t; a_r = u_r^T M;\n"
    "g_rt = <a_r, a_rt> / ||a_rt||^2; gamma_r = T / sum_t max(floor, g_rt);\n"
    "D = scale U diag(gamma S) V^T",
    paper="https://arxiv.org/abs/2602.05536",
    when="After a sum of adapters that share directions, which count once for each of them: the excess is taken back. "
    "It also makes up for what a mean loses.",
    cost="Two QR decompositions of (out, R) and (in, R), an SVD of an R x R matrix, T products of such, and the rule.",
    validate=check_rule,
)
def svc(
    stack: Stack,
    *,
    rule: Rule = "linear",
    floor: Positive = 0.1,
    density: Annotated[float, Between(0, 1)] = 0.0,
    seed: Seed = 0,
    scale: float = 1.0,
) -> LowRank:
    """SVC: another rule merges, then each singular value is divided by how often the adapters count it.

    Where every g_rt is above the floor (the paper's alpha), the size of the merge does not matter: a mean and a sum
    give one result, and so do weights of 0.5 and 0.5, and 1 and 1. Unequal weights keep their ratios: that is what v_t
    is for. An adapter without any part in a direction (below float32's rounding of its norm) is left out of that
    direction's mean.

    Args:
        stack: what to combine.
        rule: the method inside this one; where it works entry by entry, in the bases that the adapters share.
        floor: least that a direction counts as; the larger, the more cautious.
        density: of the rule; 0 for its own default.
        seed: of the rule.
        scale: what the result is multiplied by.
    """
    import numpy as np

    shared = frame(stack.deltas)
    merged = apply(rule, replace(stack, rank=None), space="core", density=density or None, seed=seed)
    mean = float(np.mean(np.abs(stack.weights)))
    tasks = shared.weighted([weight / mean if mean else 0.0 for weight in stack.weights])
    size = mean * sum(float(np.linalg.norm(task)) for task in tasks)
    left, values, right = components(shared.coordinates(merged), size)
    counted, adapters = np.zeros_like(values), np.zeros_like(values)
    for task in tasks:
        part = left.T @ task  # (r, l): what this adapter does along each direction of the merge
        squares = np.sum(part**2, axis=1)
        takes = squares > (ROUNDING * np.linalg.norm(task)) ** 2
        shares = values * np.sum(part * right, axis=1)
        np.divide(shares, squares, out=shares, where=takes)
        counted += np.where(takes, np.maximum(floor, shares), 0.0)
        adapters += takes
    gamma = np.divide(adapters, counted, out=np.ones_like(counted), where=counted > 0)
    found = shared.lift_spectrum(left, gamma * values, right)
    return found if scale == 1.0 else replace(found, up=(scale * found.up).astype(shared.dtype))
