"""Updates that carry whole values: a dense delta, a replacement, replaced rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratools.deltas.base import Span
    from loratools.dtypes import Array

__all__ = ["Dense", "Replacement", "Rows"]


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """D given in full: a bias's delta, or a matrix that has no factors."""

    values: Array  # (out, in), unscaled
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def rowwise(self) -> bool:
        """Always."""
        return True

    def rows(self, start: int, stop: int, out: Array | None = None) -> Array:  # noqa: ARG002 - nothing to fill
        """See :class:`~loratools.deltas.base.Delta`."""
        block = self.values[start:stop]
        return block if self.scaling == 1.0 else block * block.dtype.type(self.scaling)

    def apply(self, weight: Array, start: int) -> Array:
        """``weight`` + D."""
        weight += self.rows(start, start + weight.shape[0])
        return weight

    def part(self, rows: Span | None, cols: Span | None) -> Dense:
        """See :class:`~loratools.deltas.base.Delta`."""
        values = self.values if rows is None else self.values[rows.slice]
        return replace(self, values=values if cols is None else values[:, cols.slice])

    def transposed(self) -> Dense:
        """Dᵀ."""
        return replace(self, values=self.values.T)


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """W' = T, read as it is needed: a trained head, bias or embedding saved whole, a weight that is set."""

    read: Callable[[int, int], Array]  # rows start to stop of T: (stop - start, in)
    shape: tuple[int, int]

    @property
    def rowwise(self) -> bool:
        """Always."""
        return True

    def apply(self, weight: Array, start: int) -> Array:
        """T, whatever ``weight`` was."""
        weight[...] = self.read(start, start + weight.shape[0])
        return weight

    def transposed(self) -> Replacement:
        """A whole tensor is saved in the orientation it is stored in."""
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some rows replaced, the others kept (PEFT's trainable tokens)."""

    indices: Array  # (n,), integers
    values: Array  # (n, in)
    shape: tuple[int, int]

    @property
    def rowwise(self) -> bool:
        """Always."""
        return True

    def apply(self, weight: Array, start: int) -> Array:
        """``weight`` with its own of the rows replaced."""
        mine = (self.indices >= start) & (self.indices < start + weight.shape[0])
        weight[self.indices[mine] - start] = self.values[mine]
        return weight

    def transposed(self) -> Rows:
        """Rows of an embedding are rows as stored."""
        return self
