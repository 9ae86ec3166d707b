"""What an update is: a map from a weight to a weight.

Every weight is seen as a matrix here, (out, in): a convolution's trailing dimensions are flattened into ``in``, a bias
is a matrix of one column. A :class:`Delta` is an update that is a plain sum, W + D, and can say any block of rows of D
without forming the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from loratools.dtypes import Array

__all__ = ["Delta", "Fitting", "Span", "Update"]


@dataclass(frozen=True, slots=True)
class Span:
    """A strided range of rows or columns (slices cannot be hashed before Python 3.12).

    >>> len(Span(1, 8, 2)), Span(0, 4).slice
    (4, slice(0, 4, 1))
    """

    start: int
    stop: int
    step: int = 1

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))

    @property
    def slice(self) -> slice:
        """The same as a slice."""
        return slice(self.start, self.stop, self.step)


class Update(Protocol):
    """A map from a weight to a weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weights it applies to."""
        ...

    @property
    def rowwise(self) -> bool:
        """Whether a block of rows of the result needs only the same rows of the weight."""
        ...

    def apply(self, weight: Array, start: int) -> Array:
        """Rows ``start`` and following of the updated weight, from the same rows of ``weight`` (rows, in).

        May overwrite ``weight``. An update that is not row-wise is given all rows at once.
        """
        ...

    def transposed(self) -> Update:
        """The same update for the weight stored as (in, out)."""
        ...


@runtime_checkable
class Delta(Update, Protocol):
    """An update that is a plain sum."""

    def rows(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows of D, scaled: (stop - start, in). Fills ``out`` where it is given and can be filled in place."""
        ...

    def part(self, rows: Span | None, cols: Span | None) -> Delta:
        """The delta of a sub-matrix (gate and up inside a fused gate_up)."""
        ...

    def transposed(self) -> Delta:
        """The same delta for the weight stored as (in, out)."""
        ...


@runtime_checkable
class Fitting(Update, Protocol):
    """An update whose file does not say the shape of its weight: it is fitted to the one it lands on."""

    def fitted(self, shape: tuple[int, int]) -> Update:
        """The same update of a weight of this shape, as stored.

        Raises:
            ShapeMismatch: it cannot be one of such a weight.
        """
        ...
