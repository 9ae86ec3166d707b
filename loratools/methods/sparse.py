"""Methods that keep some entries of each delta and drop the others: TIES and its relatives.

All of them work entry by entry, so the coordinates matter: ``space`` names them, and a result in one space is not that
in another. The documentation of each function says what exactly it does; where published programs differ from the
paper, the paper is followed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from loratools.errors import Unsupported
from loratools.methods.base import Between, Seed, Share, Space, method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.deltas.lowrank import LowRank
    from loratools.methods.base import Approximation, Stack
    from loratools.methods.elementwise import Fuser, Sparsifier
    from loratools.methods.spaces import Coordinates

__all__ = ["breadcrumbs", "dare", "dare_ties", "della", "knots", "magnitude_prune", "sce", "ties"]

_COST = "In weight space two passes over the dense deltas by blocks of rows and a randomized SVD; in core or knots "
_COST += "space a QR of the factors and small matrices."


@method(
    paper="https://arxiv.org/abs/2306.01708",
    formula="x_t = D_t where |D_t| is among its largest `density` share, else 0; g = sign(sum_t w_t x_t);\n"
    "D = scale * sum_t [w_t x_t g > 0] w_t x_t / sum_t [w_t x_t g > 0] |w_t|",
    when="Adapters for different tasks that disagree in sign. The result is a mean, of the size of one adapter.",
    cost=_COST,
)
def ties(
    stack: Stack,
    *,
    density: Share = 0.2,
    scale: float = 1.0,
    normalize: bool = True,
    space: Space = "weight",
) -> LowRank | Approximation:
    """TIES: trim each delta, elect a sign for each entry, and average the adapters that agree with it.

    The largest int(density * entries) entries of each matrix are kept, one at least, and all that equal the last of
    them. Weights count in the election; a sum of zero counts as plus. With weights of 1 this is the paper's method.

    Args:
        stack: what to combine.
        density: share of the entries that each adapter keeps.
        scale: what the result is multiplied by (the paper's lambda).
        normalize: divide by the weights of the adapters that agree; without it they are added up.
        space: the coordinates whose entries are trimmed and elected.
    """
    return _ties(stack, density, scale, normalize=normalize, space=space)


@method(
    paper="https://arxiv.org/abs/2410.19735",
    formula="[D_1 .. D_T] = U S [V_1 .. V_T]^T; D = U TIES(S V_1^T, .., S V_T^T)",
    when="Adapters for different tasks, where TIES on the weights does little: deltas align better in a shared basis.",
    cost="QR decompositions of the factors and passes over matrices of R x in entries.",
)
def knots(
    stack: Stack, *, density: Share = 0.2, scale: float = 1.0, normalize: bool = True
) -> LowRank | Approximation:
    """KnOTS-TIES: TIES on the coefficients of the deltas in a basis that all adapters share.

    The coefficients carry the singular values, as in the authors' program. The same as ``ties`` with ``--space knots``.

    Args:
        stack: what to combine.
        density: share of the entries that each adapter keeps.
        scale: what the result is multiplied by (the paper's lambda).
        normalize: divide by the weights of the adapters that agree; without it they are added up.
    """
    return _ties(stack, density, scale, normalize=normalize, space="knots")


@method(
    paper="https://arxiv.org/abs/2311.03099",
    formula="D = sum_t w_t m_t D_t / density, each entry of m_t being 1 with probability `density`, else 0",
    when="Many adapters at once: fewer of their entries meet. On its own it adds noise to the exact sum.",
    cost=_COST,
)
def dare(
    stack: Stack,
    *,
    density: Share = 0.5,
    seed: Seed = 0,
    rescale: bool = True,
    space: Space = "weight",
) -> LowRank | Approximation:
    """DARE: drop entries at random, make up for them by size, and add up.

    Args:
        stack: what to combine.
        density: probability with which an entry is kept.
        seed: of the masks, which depend on it, on the matrix's name and on the adapter's place in the list.
        rescale: divide what is kept by the density.
        space: the coordinates whose entries are dropped.
    """
    from loratools.methods.elementwise import Summed

    found = _coordinates(stack, space)
    return _merged(found, _dropouts(found, density, seed, rescale=rescale), Summed(stack.weights))


@method(
    paper="https://arxiv.org/abs/2311.03099",
    formula="x_t = m_t D_t / density as in DARE, then elected and averaged as in TIES",
    when="As TIES, with the entries drawn at random rather than by size.",
    cost=_COST,
)
def dare_ties(
    stack: Stack,
    *,
    density: Share = 0.5,
    seed: Seed = 0,
    rescale: bool = True,
    scale: float = 1.0,
    normalize: bool = True,
    space: Space = "weight",
) -> LowRank | Approximation:
    """DARE, then TIES' election: drop entries at random, then average those that agree with the elected sign.

    Args:
        stack: what to combine.
        density: probability with which an entry is kept.
        seed: of the masks, which depend on it, on the matrix's name and on the adapter's place in the list.
        rescale: divide what is kept by the density.
        scale: what the result is multiplied by.
        normalize: divide by the weights of the adapters that agree; without it they are added up.
        space: the coordinates whose entries are dropped and elected.
    """
    from loratools.methods.elementwise import Elected

    found = _coordinates(stack, space)
    fuse = Elected(stack.weights, mean=normalize)
    return _merged(found, _dropouts(found, density, seed, rescale=rescale), fuse, scale)


def _check_della(*, density: float, epsilon: float, **_: object) -> None:
    if not (density - epsilon > 0 and density + epsilon <= 1):
        raise Unsupported(
            f"della: density {density:g} ± epsilon {epsilon:g} must lie above 0 and at most at 1",
            hint="a smaller epsilon, such as 0.05, leaves room",
        )


@method(
    paper="https://arxiv.org/abs/2406.11617",
    formula="p = density - epsilon + 2 epsilon (rank of |D_t| in its row - 1) / (in - 1); x_t = m_t D_t / p, each\n"
    "entry of m_t being 1 with probability p; then elected and averaged as in TIES",
    when="As DARE, but small entries are dropped more often than large ones.",
    cost="As DARE, and a sort of every row of every delta.",
    validate=_check_della,
)
def della(
    stack: Stack,
    *,
    density: Share = 0.7,
    epsilon: Annotated[float, Between(0, 1)] = 0.05,
    seed: Seed = 0,
    rescale: bool = True,
    elect: bool = True,
    scale: float = 1.0,
    normalize: bool = True,
    space: Space = "weight",
) -> LowRank | Approximation:
    """DELLA: drop entries at random, small ones more often, then average those that agree with the elected sign.

    Args:
        stack: what to combine.
        density: mean probability with which an entry is kept.
        epsilon: how far the probabilities of a row's smallest and largest entry are from that.
        seed: of the masks, which depend on it, on the matrix's name and on the adapter's place in the list.
        rescale: divide each entry that is kept by its probability.
        elect: elect signs; without it the weighted entries are added up.
        scale: what the result is multiplied by.
        normalize: divide by the weights of the adapters that agree; without it they are added up.
        space: the coordinates whose entries are dropped and elected.
    """
    from loratools.methods.elementwise import RankedDropout

    found = _coordinates(stack, space)
    sparsify = [
        RankedDropout(density, epsilon, stack.generator(index, seed), rescale=rescale)
        for index in range(len(found.deltas))
    ]
    return _merged(found, sparsify, _fuser(stack, elect=elect, normalize=normalize), scale)


def _check_breadcrumbs(*, density: float, gamma: float, **_: object) -> None:
    if density + gamma > 1:
        raise Unsupported(
            f"breadcrumbs: density {density:g} and gamma {gamma:g} add up to more than 1",
            hint="they are shares of the same entries: those kept, and the largest ones, which are not",
        )


@method(
    paper="https://arxiv.org/abs/2312.06795",
    formula="x_t = D_t without its largest `gamma` share, and of the rest the largest up to `density` of all entries;\n"
    "D = scale * sum_t w_t x_t (or elected and averaged as in TIES)",
    when="Many adapters, some of which have outliers that would take over.",
    cost=_COST,
    validate=_check_breadcrumbs,
)
def breadcrumbs(
    stack: Stack,
    *,
    density: Share = 0.9,
    gamma: Annotated[float, Between(0, 1, high_open=True)] = 0.01,
    elect: bool = False,
    scale: float = 1.0,
    normalize: bool = True,
    space: Space = "weight",
) -> LowRank | Approximation:
    """Model Breadcrumbs: drop the largest entries of each delta and the smallest ones, and add up.

    Args:
        stack: what to combine.
        density: share of the entries that each adapter keeps.
        gamma: share of the largest entries that are dropped.
        elect: elect signs as TIES does; without it the weighted entries are added up.
        scale: what the result is multiplied by.
        normalize: with ``elect``, divide by the weights of the adapters that agree.
        space: the coordinates whose entries are dropped.
    """
    from loratools.methods.elementwise import Between as Window
    from loratools.methods.elementwise import largest

    found = _coordinates(stack, space)
    count = found.deltas[0].up.shape[0] * found.deltas[0].down.shape[1]
    top, kept = int(gamma * count), max(1, int(density * count))
    last = min(top + kept, count)
    sparsify: list[Sparsifier | None] = []
    for delta in found.deltas:
        places = [last, top] if top else [last]
        least, *limit = largest(delta, places)
        sparsify.append(Window(least, limit[0] if limit else float("inf")))
    return _merged(found, sparsify, _fuser(stack, elect=elect, normalize=normalize), scale)


@method(
    paper="https://arxiv.org/abs/2306.01708",
    formula="x_t = D_t where |D_t| is among its largest `density` share, else 0; D = sum_t w_t x_t",
    when="To see what TIES' trimming alone does.",
    cost=_COST,
)
def magnitude_prune(
    stack: Stack, *, density: Share = 0.5, space: Space = "weight"
) -> LowRank | Approximation:
    """Keep the largest entries of each delta, and add up.

    Args:
        stack: what to combine.
        density: share of the entries that each adapter keeps.
        space: the coordinates whose entries are kept.
    """
    from loratools.methods.elementwise import Summed

    found = _coordinates(stack, space)
    return _merged(found, _trims(found, density), Summed(stack.weights))


@method(
    paper="https://arxiv.org/abs/2408.07990",
    formula="y_t = w_t D_t at the `density` share of the entries that vary most between the adapters, else 0;\n"
    "c_t = mean(y_t^2) / sum_s mean(y_s^2); g = sign(sum_t y_t);\n"
    "D = sum_t c_t [y_t g > 0] y_t / sum_t c_t [y_t g > 0]",
    when="Adapters of one kind and different quality: those that changed more count more, with nothing to be tuned.",
    cost="As TIES, with a pass more.",
)
def sce(stack: Stack, *, density: Share = 1.0, space: Space = "weight") -> LowRank | Approximation:
    """SCE: select the entries that vary most, weigh the adapters by their energy in these, and erase minorities.

    Args:
        stack: what to combine.
        density: share of the entries that vary at all which is kept.
        space: the coordinates whose entries are compared.
    """
    from loratools.methods.selecting import energies, most_varying

    found = _coordinates(stack, space)
    weighted = [_times(delta, weight) for delta, weight in zip(found.deltas, stack.weights, strict=True)]
    least = most_varying(weighted, density)
    merged = energies(weighted, least)
    return found.lift(merged)


# --- what they share -------------------------------------------------------------------------------------------


def _coordinates(stack: Stack, space: Space) -> Coordinates:
    from loratools.methods.spaces import coordinates

    return coordinates(stack, space)


def _ties(
    stack: Stack, density: float, scale: float, *, normalize: bool, space: Space
) -> LowRank | Approximation:
    from loratools.methods.elementwise import Elected

    found = _coordinates(stack, space)
    return _merged(found, _trims(found, density), Elected(stack.weights, mean=normalize), scale)


def _fuser(stack: Stack, *, elect: bool, normalize: bool) -> Fuser:
    from loratools.methods.elementwise import Elected, Summed

    return Elected(stack.weights, mean=normalize) if elect else Summed(stack.weights)


def _trims(found: Coordinates, density: float) -> list[Sparsifier | None]:
    from loratools.methods.elementwise import Trim, largest

    rows, columns = found.deltas[0].shape
    kept = max(1, int(density * (rows * columns)))
    if kept == rows * columns:
        return [None] * len(found.deltas)
    return [Trim(largest(delta, [kept])[0]) for delta in found.deltas]


def _dropouts(found: Coordinates, density: float, seed: int, *, rescale: bool) -> list[Sparsifier | None]:
    from loratools.methods.elementwise import Dropout

    return [
        Dropout(density, found.stack.generator(index, seed), rescale=rescale)
        for index in range(len(found.deltas))
    ]


def _merged(
    found: Coordinates, sparsify: Sequence[Sparsifier | None], fuse: Fuser, scale: float = 1.0
) -> LowRank | Approximation:
    from loratools.methods.elementwise import combine

    merged = combine(found.deltas, sparsify, fuse)
    if scale != 1.0:
        merged *= merged.dtype.type(scale)
    return found.lift(merged)


def _times(delta: LowRank, weight: float) -> LowRank:
    from loratools.deltas.lowrank import LowRank

    return LowRank(delta.up * delta.up.dtype.type(weight), delta.down)
