"""W + s (W A + B), A and B of low rank: GLoRA (Chavan et al. 2023, https://arxiv.org/abs/2306.07967) by LyCORIS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from loratools.errors import ShapeMismatch, Unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.deltas.lowrank import LowRank
    from loratools.dtypes import Array

__all__ = ["Generalized", "Layout", "arrangement"]

Layout = Literal["new", "old"]


@dataclass(frozen=True, slots=True, eq=False)
class Generalized:
    """W' = W + scaling · (W · left · right + added), the product over input channels at each place of the kernel."""

    added: LowRank  # B: (out, in * kernel), its scaling inside
    left: Array  # (in, rank)
    right: Array  # (rank, in)
    scaling: float
    stored_transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as stored."""
        return self.added.shape

    @property
    def rowwise(self) -> bool:
        """While the input channels of an output feature lie in its row."""
        return not self.stored_transposed

    def apply(self, weight: Array, start: int) -> Array:
        """See :class:`~loratools.deltas.base.Update`."""
        change = self._mixed(weight.T).T if self.stored_transposed else self._mixed(weight)
        change *= weight.dtype.type(self.scaling)
        weight += change
        weight += self.added.rows(start, start + weight.shape[0])
        return weight

    def _mixed(self, weight: Array) -> Array:
        """W A, (rows, in * kernel)."""
        rows, channels = weight.shape[0], self.left.shape[0]
        if weight.shape[1] == channels:
            product: Array = weight @ self.left @ self.right
            return product
        places = weight.reshape(rows, channels, -1).swapaxes(1, 2) @ self.left @ self.right
        mixed: Array = places.swapaxes(1, 2).reshape(weight.shape)
        return mixed

    def transposed(self) -> Generalized:
        """The same for the weight stored (in, out).

        Raises:
            ShapeMismatch: it is a convolution's, which is stored one way only.
        """
        if self.left.shape[0] != self.shape[0 if self.stored_transposed else 1]:
            raise ShapeMismatch("glora", self.left.shape, self.added.shape)
        return replace(self, added=self.added.transposed(), stored_transposed=not self.stored_transposed)


def arrangement(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layout, int]:
    """How a file holds the four factors, and their rank.

    LyCORIS writes ``a1`` (in, rank), ``a2`` (rank, in), ``b1`` (out, rank), ``b2`` (rank, in, kernel...), and its
    first versions had the first of each pair in the place of the second.

    >>> arrangement({"a1": (8, 2), "a2": (2, 8), "b1": (6, 2), "b2": (2, 8)})
    ('new', 2)
    >>> arrangement({"a1": (2, 8), "a2": (8, 2), "b1": (2, 8), "b2": (6, 2)})
    ('old', 2)

    Args:
        shapes: of ``a1``, ``a2``, ``b1`` and ``b2``.

    Raises:
        ShapeMismatch: the factors do not meet.
        Unsupported: they meet either way, as those of a square weight of full rank do.
    """
    a1, a2, b1, b2 = (shapes[role] for role in ("a1", "a2", "b1", "b2"))
    found: dict[Layout, int] = {}
    if a1[1] == a2[0] == b1[1] == b2[0] and a1[0] == a2[1] == b2[1]:
        found["new"] = a1[1]
    if a1[0] == a2[1] == b1[0] == b2[1] and a1[1] == a2[0] == b1[1]:
        found["old"] = a1[0]
    if not found:
        raise ShapeMismatch("glora factors a1 and a2", a1, a2)
    # Of a square weight both can be read; a rank beyond its side would make no sense.
    layout = min(found, key=lambda name: found[name])
    if len(set(found.values())) < len(found):
        raise Unsupported(
            f"GLoRA factors {list(a1)} are square: their order cannot be told",
            hint="LyCORIS' first versions had it the other way round; merge with the tool that trained it",
        )
    return layout, found[layout]
