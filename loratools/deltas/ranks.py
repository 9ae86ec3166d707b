"""Which rank to keep: rules on singular values, as pure functions of float64 arrays.

Every rule answers with the least rank that meets it, and 0 where nothing is worth keeping: what then becomes of the
module is for the caller to say. Singular values come in descending order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.dtypes import numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loratools.dtypes import Array, Dtype

__all__ = [
    "gavish_donoho", "global_ranks", "joined", "mp_edge", "rank_above", "rank_for_energy", "rank_for_error",
    "rounding_variance", "rounding_variances", "tails",
]  # fmt: skip

_STATES = (
    20_000  # partial sums the search for the last few components may hold; then the greedy choice stands
)
_NOTHING = 1e-200  # σ² in units of the greatest: no component at all
_SLACK = 1e-12  # of what is to be spent or lost: the rounding of sums of many squares


def tails(values: Array) -> Array:
    """What each rank loses: √(Σ_{i>k} σᵢ²) for k = 0, 1, ..., (count + 1,). Summed from the least, so exact.

    >>> import numpy as np
    >>> tails(np.array([12.0, 4.0, 3.0])).tolist()
    [13.0, 5.0, 3.0, 0.0]
    """
    import numpy as np

    values = np.asarray(values, np.float64)
    unit = float(values.max(initial=0.0)) or 1.0  # so that no square overflows, or vanishes
    squares = np.append((values / unit) ** 2, 0.0)
    tail: Array = unit * np.sqrt(np.cumsum(squares[::-1])[::-1])
    return tail


def joined(spectra: Sequence[Array]) -> Array:
    """The spectrum of several matrices that are truncated to one rank (experts): the i-th is √(Σ σᵢ²) over them.

    >>> import numpy as np
    >>> joined([np.array([3.0, 1.0]), np.array([4.0])]).tolist()
    [5.0, 1.0]
    """
    import numpy as np

    if len(spectra) == 1:
        return np.asarray(spectra[0], np.float64)
    padded = np.zeros((len(spectra), max(map(len, spectra), default=0)))
    for row, values in zip(padded, spectra, strict=True):
        row[: len(values)] = values
    unit = float(padded.max(initial=0.0)) or 1.0
    together: Array = unit * np.sqrt(((padded / unit) ** 2).sum(axis=0))
    return together


def rank_for_energy(values: Array, share: float) -> int:
    """The least k with Σ_{i≤k} σᵢ² ≥ ``share`` · Σ σᵢ².

    >>> import numpy as np
    >>> rank_for_energy(np.array([3.0, 1.0, 0.0]), 0.9), rank_for_energy(np.array([3.0, 1.0, 0.0]), 1.0)
    (1, 2)
    """
    return rank_for_error(values, math.sqrt(max(0.0, 1.0 - share)))


def rank_for_error(values: Array, relative: float) -> int:
    """The least k with √(Σ_{i>k} σᵢ²) ≤ ``relative`` · √(Σ σᵢ²).

    >>> import numpy as np
    >>> rank_for_error(np.array([12.0, 4.0, 3.0]), 5 / 13)
    1
    """
    import numpy as np

    lost = tails(values)
    return int(np.argmax(lost <= relative * (1 + _SLACK) * lost[0]))


def rank_above(values: Array, threshold: float | Array) -> int:
    """How many leading values lie above a threshold (one for all, or one each).

    >>> import numpy as np
    >>> rank_above(np.array([5.0, 2.0, 1.0]), 1.5)
    2
    """
    import numpy as np

    above = np.append(np.asarray(values) > threshold, False)
    return int(np.argmin(above))


def gavish_donoho(shape: tuple[int, int], sigma: float) -> float:
    """The best hard threshold for singular values under white noise of known standard deviation ``sigma``.

    ``sigma`` λ(β) √max(m, n) with β = min/max: Gavish and Donoho, "The optimal hard threshold for singular values is
    4/√3" (2014), equation 11.

    >>> round(gavish_donoho((100, 100), 1.0), 6) == round(4 / 3**0.5 * 10, 6)
    True
    """
    low, high = sorted(shape)
    beta = low / high if high else 1.0
    inner = beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)
    return math.sqrt(2 * (beta + 1) + 8 * beta / inner) * math.sqrt(high) * sigma


def mp_edge(shape: tuple[int, int], sigma: float) -> float:
    """Where the singular values of white noise end: ``sigma`` (√m + √n), the Marchenko-Pastur edge.

    >>> mp_edge((9, 16), 0.5)
    3.5
    """
    return sigma * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def rounding_variance(values: Array, dtype: Dtype) -> float:
    """The mean variance of the error that rounding to ``dtype`` makes: mean of ulp² / 12.

    >>> import numpy as np
    >>> from loratools.dtypes import dtype
    >>> rounding_variance(np.ones(4, np.float32), dtype("bf16")) == (2**-7) ** 2 / 12
    True
    """
    import numpy as np

    if not values.size:
        return 0.0
    exponents = _ulp_exponents(values, dtype)
    # By counts of exponents: one pass over small integers instead of a power of two for every value.
    least = int(exponents.min())
    counts = np.bincount((exponents - least).reshape(-1))
    return float(counts @ 4.0 ** (np.arange(len(counts)) + least)) / values.size / 12


def rounding_variances(values: Array, dtype: Dtype, axis: int) -> Array:
    """:func:`rounding_variance` of each row (``axis`` 1) or each column (``axis`` 0) of a matrix."""
    import numpy as np

    squares = np.ldexp(1.0, 2 * _ulp_exponents(values, dtype))
    means: Array = squares.mean(axis=axis) / 12
    return means


def _ulp_exponents(values: Array, dtype: Dtype) -> Array:
    """The distance from each value to the next that ``dtype`` has, as a power of two."""
    import ml_dtypes
    import numpy as np

    info = ml_dtypes.finfo(numpy_dtype(dtype))
    _, exponents = np.frexp(values)  # values = m 2^e with m in [1/2, 1)
    least = int(info.minexp) + 1
    exponents = np.where(values == 0, least, np.maximum(exponents, least))
    ulps: Array = exponents - (1 + int(info.nmant))
    return ulps


def global_ranks(
    spectra: Mapping[str, Array],
    costs: Mapping[str, int],
    *,
    budget: int | None = None,
    error: float | None = None,
    energy: float | None = None,
    minimum: int | Mapping[str, int] = 0,
) -> dict[str, int]:
    """The ranks of all modules that together are best: the least error for a budget, or the least cost for an error.

    Components are taken in the order of σ² / cost. That is the optimum where one more component would break the
    budget exactly; the few components around the break are searched, so that it is the optimum elsewhere too.

    >>> import numpy as np
    >>> global_ranks({"a": np.array([9.0, 8.0]), "b": np.array([2.0, 1.0])}, {"a": 1, "b": 1}, budget=3)
    {'a': 2, 'b': 1}

    Args:
        spectra: singular values of each module, in descending order.
        costs: what one component of it costs, in the unit of ``budget``.
        budget: what all may cost together.
        error: the greatest relative error of the whole, √(Σ dropped σ²) / √(Σ σ²).
        energy: the least share of Σ σ² that is kept.
        minimum: components a module keeps in any case, where it has as many; one for all, or for each.

    Returns:
        A rank for each module. Values of zero are never kept for their own sake.

    Raises:
        ValueError: not exactly one of budget, error and energy; or a budget too small for the minimum.
    """
    if sum(rule is not None for rule in (budget, error, energy)) != 1:
        raise ValueError("one of budget, error and energy")
    items = _items(spectra, costs, minimum)
    if budget is not None:
        left = budget - sum(costs[name] * rank for name, rank in items.fixed.items())
        if left < 0:
            raise ValueError(f"a budget of {budget} is below the least, {budget - left}")
        kept = _best_subset(items.squares, items.costs, float(left))
    else:
        relative = math.sqrt(max(0.0, 1.0 - energy)) if energy is not None else error or 0.0
        allowed = (relative * (1 + _SLACK)) ** 2 * items.total
        kept = ~_best_subset(items.costs, items.squares, allowed)
    return items.ranks(kept)


@dataclass(frozen=True, slots=True)
class _Items:
    """Components one may keep or drop, of all modules."""

    fixed: dict[str, int]  # components of each module that are kept in any case
    owners: Array  # (count,) index of the module
    squares: Array  # (count,) σ² in units of the greatest
    costs: Array  # (count,) float64
    total: float  # Σ σ² of everything, in the same unit

    def ranks(self, kept: Array) -> dict[str, int]:
        """How many of each module are kept: they are its greatest, since all of them cost the same."""
        import numpy as np

        counts = np.bincount(self.owners[kept], minlength=len(self.fixed))
        return {name: rank + int(n) for (name, rank), n in zip(self.fixed.items(), counts, strict=True)}


def _items(
    spectra: Mapping[str, Array], costs: Mapping[str, int], minimum: int | Mapping[str, int]
) -> _Items:
    import numpy as np

    unit = max((float(np.max(values, initial=0.0)) for values in spectra.values()), default=0.0) or 1.0
    fixed, owners, squares, prices = {}, [], [], []
    total = 0.0
    for number, (name, values) in enumerate(spectra.items()):
        least = minimum if isinstance(minimum, int) else minimum[name]
        fixed[name] = min(least, len(values))
        scaled = (np.asarray(values, np.float64) / unit) ** 2
        total += float(scaled[::-1].sum())
        free = scaled[fixed[name] :]
        free = free[free > _NOTHING]
        squares.append(free)
        owners.append(np.full(len(free), number))
        prices.append(np.full(len(free), float(costs[name])))
    empty = [np.zeros(0)]
    return _Items(
        fixed,
        np.concatenate(owners or empty).astype(np.intp),
        np.concatenate(squares or empty),
        np.concatenate(prices or empty),
        total,
    )


def _best_subset(gains: Array, weights: Array, capacity: float) -> Array:
    """Which items to take so that Σ gains is greatest with Σ weights ≤ capacity: (count,) bool.

    Greedily by gain / weight; then what cannot be otherwise in any better choice is fixed (by the bound of the
    fractional problem: Balas and Zemel 1980), and the rest is searched.
    """
    import numpy as np

    order = np.lexsort((weights, -gains / weights))
    spent = np.cumsum(weights[order])
    fits = int(np.searchsorted(spent, capacity, side="right"))
    taken = np.zeros(len(gains), bool)
    taken[order[:fits]] = True
    if fits == len(order):
        return taken
    left = capacity - (float(spent[fits - 1]) if fits else 0.0)
    price = float(gains[order[fits]] / weights[order[fits]])
    spare, greedy = left, taken.copy()
    for item in order[fits:]:  # smaller things may fit into what is left
        if weights[item] <= spare:
            greedy[item] = True
            spare -= float(weights[item])
            if spare <= 0:
                break
    gap = left * price - float(gains[greedy & ~taken].sum())  # no choice is better than this one by more
    loss = np.abs(gains - price * weights)  # at least this is lost by choosing otherwise for an item
    open_items = order[loss[order] < gap]
    better = _search(gains, weights, open_items, taken, left, gap=gap, price=price)
    return greedy if better is None else better


def _search(
    gains: Array, weights: Array, open_items: Array, taken: Array, left: float, *, gap: float, price: float
) -> Array | None:
    """The best change of ``taken`` that gives up less than ``gap`` of the fractional optimum; None if there is none.

    The open items are decided one by one, those that matter least first, keeping every partial choice that none
    beats in both gain and weight. A better choice found on the way lowers the gap, and with it what is open at all.
    """
    import numpy as np

    spent, gained = np.zeros(1), np.zeros(1)  # of each partial choice, against ``taken``
    history: list[tuple[int, Array, Array]] = []  # item, the choice each choice came from, whether it changed
    best: tuple[int, int] | None = None  # after how many items, and which choice
    loss = np.abs(gains - price * weights)
    for item in open_items[np.argsort(loss[open_items], kind="stable")].tolist():
        if loss[item] >= gap or len(spent) > _STATES:
            break
        sign = -1.0 if taken[item] else 1.0
        spent = np.concatenate([spent, spent + sign * weights[item]])
        gained = np.concatenate([gained, gained + sign * gains[item]])
        order = np.lexsort((-gained, spent))
        record = np.maximum.accumulate(gained[order])
        order = order[np.append(True, record[1:] > record[:-1])]
        order = order[price * spent[order] - gained[order] < gap]
        history.append((item, order % (len(spent) // 2), order >= len(spent) // 2))
        spent, gained = spent[order], gained[order]
        found = int(np.searchsorted(spent, left, side="right")) - 1  # the heaviest that fits gains most
        if found >= 0 and price * left - gained[found] < gap:
            gap, best = float(price * left - gained[found]), (len(history), found)
    if best is None:
        return None
    better, (depth, state) = taken.copy(), best
    for item, parents, changed in reversed(history[:depth]):
        if changed[state]:
            better[item] = not better[item]
        state = int(parents[state])
    return better
