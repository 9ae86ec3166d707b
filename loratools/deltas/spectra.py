"""The leading singular values and vectors of a dense matrix, and a certificate of how good a truncation is.

A randomized range finder with re-orthogonalised power iterations (Halko, Martinsson and Tropp 2011,
https://arxiv.org/abs/0909.4061), or the exact decomposition where the matrix is small. Large products are taken in the
matrix's own type, Gram matrices and the certificate in float64. The same seed gives the same bits on one machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loratools.deltas.streams import buffer, pieces, times, times_transposed, whole
from loratools.errors import NonFinite

if TYPE_CHECKING:
    from loratools.deltas.streams import Matrix
    from loratools.dtypes import Array

__all__ = ["Approximation", "Majorant", "Spectrum", "exact", "randomized", "sketch"]

_EXTRA = 32  # columns beyond the rank: cheaper than another iteration
_SMALL = 256  # a side up to which the exact decomposition is as fast
_PROBES = 8  # random vectors that bound what the range finder has missed: all of them fail with 10^-8
_PROBE_FACTOR = 10 * math.sqrt(2 / math.pi)
# Condition of a block of columns up to which its float64 Gram matrix serves to orthonormalise it: float32 products
# with the inverse root lose as many digits.
_GRAM_CONDITION = 1e4
# Share of ‖D‖² that float32 products may be wrong by, all errors of the certificate's sums together.
_SLACK = {4: 1e-6, 8: 1e-14}


@dataclass(frozen=True, slots=True, eq=False)
class Approximation:
    """A matrix D as two balanced factors, and what they lose.

    Attributes:
        up: (m, rank), the left singular vectors times the roots of the singular values.
        down: (rank, n), likewise.
        values: (count,) float64, the singular values found, in descending order; at least ``rank`` of them.
        norm: ‖D‖ in the Frobenius norm.
        residual: ‖D - up @ down‖, summed over the entries.
        spectral_bound: at least the spectral norm of D - up @ down (fails with probability 10⁻⁸; exact: never).
        optimality: at least ``residual`` / the least residual that any matrix of this rank has; infinite where
            nothing can be certified.
    """

    up: Array
    down: Array
    values: Array
    norm: float
    residual: float
    spectral_bound: float
    optimality: float

    @property
    def rank(self) -> int:
        """Of the factors."""
        return int(self.up.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Majorant:
    """What is known of D Dᵀ = [[Θ, Eᵀ], [E, F]] in a basis whose first columns were found: a bound from above.

    For every t > 0 the matrix lies below diag(Θ + EᵀE / t, F + t), so that the sum of its k greatest eigenvalues is
    at most that of this one.

    Attributes:
        inner: Θ, (width, width).
        coupling: EᵀE, (width, width).
        outside: at least ‖F‖, the squared spectral norm of what the basis misses.
    """

    inner: Array
    coupling: Array
    outside: float

    def largest(self, rank: int) -> float:
        """At least the sum of the ``rank`` greatest eigenvalues of D Dᵀ, as tight as trying a few t makes it."""
        own = np.sort(np.linalg.eigvalsh(self.inner))[::-1]
        best = float(own[:rank].sum()) + rank * self.outside
        for step in range(12):
            t = float(own[min(rank, len(own)) - 1]) * 0.5**step
            if t <= 0:
                break
            top = np.linalg.eigvalsh(self.inner + self.coupling / t)[::-1][:rank]
            best = min(best, float(np.maximum(top, self.outside + t).sum()))
        return best


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Leading singular values of a matrix D with singular vectors of one side, ready to be truncated.

    Attributes:
        matrix: D, (m, n).
        values: (width,) float64, in descending order.
        norm: ‖D‖.
        basis: (n, width) right singular vectors, or (m, width) left ones.
        image: D @ basis, or Dᵀ @ basis; None where it has not been computed.
        left: whether the basis is that of the left side.
        majorant: what bounds the rest; None where the decomposition is exact.
    """

    matrix: Matrix
    values: Array
    norm: float
    basis: Array
    image: Array | None
    left: bool
    majorant: Majorant | None

    @property
    def complete(self) -> bool:
        """Whether these are all singular values."""
        return self.majorant is None

    @property
    def remainder(self) -> float:
        """√(‖D‖² - Σ values²): the norm of all singular values that are not among them."""
        if self.complete:
            return 0.0
        return math.sqrt(max(0.0, self.norm**2 - float((self.values**2).sum())))

    def truncate(self, rank: int) -> Approximation:
        """The approximation of this rank, its residual summed over all entries.

        Args:
            rank: at most the number of values.
        """
        matrix, kind = self.matrix, self.matrix.dtype.type
        vectors = self.basis[:, :rank]
        if self.image is not None:
            image = self.image[:, :rank]
        else:
            image = (times_transposed if self.left else times)(matrix, vectors, "image")
        roots = np.sqrt(np.where(self.values[:rank] > 0, self.values[:rank], 1.0))
        near, far = image * (1 / roots).astype(kind), vectors * roots.astype(kind)
        up, down = (far, near.T) if self.left else (near, far.T)
        up, down = np.ascontiguousarray(up), np.ascontiguousarray(down)
        residual = _residual(matrix, up, down)
        following = float(self.values[rank]) if rank < len(self.values) else 0.0
        outside = 0.0 if self.majorant is None else self.majorant.outside
        return Approximation(
            up=up,
            down=down,
            values=self.values,
            norm=self.norm,
            residual=residual,
            spectral_bound=math.hypot(following, math.sqrt(outside)),
            optimality=self._optimality(rank, residual),
        )

    def _optimality(self, rank: int, residual: float) -> float:
        """What is lost / √(what no matrix of this rank can be without).

        The kept part is an orthogonal projection of D, so ‖D‖² = kept² + residual², and the best of this rank loses
        ‖D‖² less the greatest eigenvalues of D Dᵀ. Two bounds on these, of which the better counts: kept² and
        ``rank`` times the spectral norm of what was missed, and the majorant, whose sums are known to a rounding only.
        """
        if self.majorant is None or rank == 0 or residual == 0.0:
            return 1.0
        kept = float((self.values[:rank] ** 2).sum())
        slack = _SLACK[self.matrix.dtype.itemsize] * self.norm**2
        least = max(
            residual**2 - rank * self.majorant.outside,
            residual**2 - max(0.0, self.majorant.largest(rank) - kept) - slack,
        )
        return residual / math.sqrt(least) if least > 0 else math.inf


def randomized(
    matrix: Matrix, rank: int, *, seed: int | bytes, extra: int | None = None, iterations: int = 2
) -> Approximation:
    """Approximate a matrix by one of low rank, nearly as well as any of that rank can.

    >>> made = randomized(np.outer(np.ones(300), np.ones(200)).astype(np.float32), 2, seed=0)
    >>> made.up.shape, made.down.shape, round(float(made.values[0])), made.residual < 1e-3
    ((300, 2), (2, 200), 245, True)

    Args:
        matrix: (m, n), float32 or float64.
        rank: of the result; at most min(m, n).
        seed: of the random directions.
        extra: columns beyond the rank; by default as many as the rank, 32 at least.
        iterations: passes over the matrix and back after the first.

    Returns:
        Factors in the matrix's type, and their certificate.
    """
    width = rank + (max(_EXTRA, rank) if extra is None else extra)
    return sketch(matrix, width, seed=seed, iterations=iterations).truncate(rank)


def sketch(
    matrix: Matrix, width: int, *, seed: int | bytes, iterations: int = 2, gram: bool | None = None
) -> Spectrum:
    """The leading ``width`` singular values, nearly; all of them, exactly, where the matrix is not much larger.

    >>> sketch(np.eye(6, dtype=np.float32), 4, seed=1).complete
    True

    Args:
        matrix: (m, n), float32 or float64.
        width: columns of the random block. The last few of the values are less exact than the others.
        seed: of the random directions.
        iterations: at least one; each is a pass over the matrix and one over its transpose.
        gram: see :func:`exact`.
    """
    shorter = min(matrix.shape)
    if shorter <= _SMALL or 2 * width >= shorter:
        return exact(matrix, gram=gram)
    norm = _norm(matrix)
    if norm == 0.0:
        return exact(matrix, gram=gram)
    if not math.isfinite(norm):
        raise NonFinite("the matrix has values that are not finite")
    left, probes = _range(matrix, width, np.random.Generator(np.random.PCG64(_number(seed))), iterations)
    return _by_range(matrix, norm, left, probes)


def _range(matrix: Matrix, width: int, random: np.random.Generator, iterations: int) -> tuple[Array, Array]:
    """Orthonormal columns that nearly span what D does most, (m, width); and D times vectors they know nothing of."""
    block = random.standard_normal((matrix.shape[1], width + _PROBES), dtype=matrix.dtype.type)
    image = times(matrix, block, "image")
    left, _ = _orthonormal(image[:, :width])
    probes = np.ascontiguousarray(image[:, width:])
    for _ in range(1, iterations):
        right, _ = _orthonormal(times_transposed(matrix, left, "back"))
        left, _ = _orthonormal(times(matrix, right, "image"))
    return _orthonormal(left)[0], probes


def _by_range(matrix: Matrix, norm: float, left: Array, probes: Array) -> Spectrum:
    """The spectrum of D on the span of Dᵀ @ left: half an iteration more, the probes carried along.

    In the basis of ``left``, D Dᵀ has the blocks Θ = C Cᵀ and E = (1 - Q Qᵀ) D Cᵀ, with C = Qᵀ D. The products that
    give the singular values give these too.
    """
    width, chain = left.shape[1], _Chain(left)
    both = times_transposed(matrix, np.hstack([left, chain.projected(probes)]), "back")
    right, first = _orthonormal(np.ascontiguousarray(both[:, :width]))
    right, second = _orthonormal(right)
    root = second @ first  # Cᵀ = right @ root
    both = times(matrix, np.hstack([right, chain.scaled(both[:, width:])]), "image")
    image = np.ascontiguousarray(both[:, :width])
    outside = chain.bound(times_transposed(matrix, chain.projected(both[:, width:]), "back"))
    triangle, _, _ = _root(image)
    _, values, rotation = np.linalg.svd(triangle)
    coupling = root.T @ (triangle.T @ triangle - root @ root.T) @ root
    turn = rotation.T.astype(matrix.dtype)
    return Spectrum(
        matrix=matrix,
        values=values,
        norm=norm,
        basis=right @ turn,
        image=image @ turn,
        left=False,
        majorant=Majorant(root.T @ root, coupling, outside**2),
    )


def exact(matrix: Matrix, *, gram: bool | None = None) -> Spectrum:
    """All singular values, from the float64 Gram matrix of the shorter side or from the matrix itself.

    >>> exact(np.diag([3.0, 4.0]).astype(np.float32)).values.tolist()
    [4.0, 3.0]

    Args:
        matrix: (m, n), float32 or float64.
        gram: by the Gram matrix: many times faster, and values below 1e-8 of the greatest are not exact. By default
            for float32, which knows no smaller ones.
    """
    norm = _norm(matrix)
    if not math.isfinite(norm):
        raise NonFinite("the matrix has values that are not finite")
    left = matrix.shape[0] <= matrix.shape[1]
    if not (matrix.dtype == np.float32 if gram is None else gram):
        u, values, vt = np.linalg.svd(whole(matrix), full_matrices=False)
        basis = u if left else vt.T
    else:
        tall = whole(matrix).T if left else matrix
        square = np.zeros((tall.shape[1],) * 2)
        for _, _, part in pieces(tall):
            rows = part.astype(np.float64, order="C")
            square += rows.T @ rows
        squares, vectors = np.linalg.eigh(square)
        values = np.sqrt(np.maximum(squares[::-1], 0.0))
        basis = vectors[:, ::-1].astype(matrix.dtype)
    return Spectrum(matrix, values, norm, basis, None, left, None)


class _Chain:
    """Random vectors carried through R, Rᵀ, R, Rᵀ for R = (1 - Q Qᵀ) D: how they grow bounds the spectral norm of R.

    ‖R‖⁴ = ‖RᵀR RᵀR‖, and for a matrix B and eight Gaussian vectors ‖B‖ ≤ 10 √(2/π) max ‖B w‖ but for a probability
    of 10⁻⁸ (Halko, Martinsson and Tropp, lemma 4.1). The fourth root of a bound on the power is what brings it near.
    The vectors must not have had a part in Q.
    """

    def __init__(self, basis: Array) -> None:
        self.basis = basis
        self.logarithm = 0.0

    def projected(self, vectors: Array) -> Array:
        """Without their part in Q (twice, as the first leaves a rounding of what it took away), and scaled."""
        for _ in range(2):
            vectors = vectors - self.basis @ (self.basis.T @ vectors)
        return self.scaled(vectors)

    def scaled(self, vectors: Array) -> Array:
        """To length one, the longest of them; by how much is remembered."""
        length = _longest(vectors)
        if length == 0.0:
            self.logarithm = -math.inf
            return vectors
        self.logarithm += math.log(length)
        shorter: Array = vectors / vectors.dtype.type(length)
        return shorter

    def bound(self, vectors: Array) -> float:
        """On ‖R‖, from the vectors after the fourth product."""
        length = _longest(vectors)
        if length == 0.0 or self.logarithm == -math.inf:
            return 0.0
        return math.exp((self.logarithm + math.log(length * _PROBE_FACTOR)) / 4)


def _longest(vectors: Array) -> float:
    """The greatest length of a column."""
    return float(np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=0)).max(initial=0.0))


def _number(seed: int | bytes) -> int:
    return int.from_bytes(seed, "big") if isinstance(seed, bytes) else seed


def _root(columns: Array) -> tuple[Array, Array | None, Array | None]:
    """A square root T of the Gram matrix, float64: columns = Q @ T with orthonormal Q.

    Returns:
        T, and its inverse where that is well conditioned, or else Q itself.
    """
    wide = columns.astype(np.float64)
    values, vectors = np.linalg.eigh(wide.T @ wide)
    if values[0] * _GRAM_CONDITION**2 > values[-1]:
        roots = np.sqrt(values)
        return roots[:, None] * vectors.T, vectors / roots, None
    q, r = np.linalg.qr(wide)
    return r, None, q


def _orthonormal(columns: Array) -> tuple[Array, Array]:
    """Orthonormal columns that span the same, and the matrix that leads back: columns = result @ matrix."""
    triangle, inverse, q = _root(columns)
    if q is not None:
        return q.astype(columns.dtype), triangle
    assert inverse is not None
    return columns @ inverse.astype(columns.dtype), triangle


def _length(block: Array) -> float:
    """‖block‖: each row in the array's own type and the rows in float64, unless squares would vanish or overflow."""
    total = float(np.einsum("ij,ij->i", block, block).astype(np.float64).sum())
    if 1e-30 < total < math.inf:
        return math.sqrt(total)
    greatest = float(np.abs(block).max(initial=0.0))
    if greatest == 0.0 or not math.isfinite(greatest):
        return greatest
    return greatest * math.sqrt(float(((block.astype(np.float64) / greatest) ** 2).sum()))


def _norm(matrix: Matrix) -> float:
    """‖D‖."""
    return math.hypot(*(_length(rows) for _, _, rows in pieces(matrix)))


def _residual(matrix: Matrix, up: Array, down: Array) -> float:
    """‖D - up @ down‖ a block of rows at a time."""
    lengths = []
    for start, stop, rows in pieces(matrix):
        block = buffer("residual", rows.shape, matrix.dtype)
        np.matmul(up[start:stop], down, out=block)
        np.subtract(rows, block, out=block)
        lengths.append(_length(block))
    return math.hypot(*lengths)
