"""The m × m part of a step around the eigenproblem, compiled: as NumPy calls it takes longer than short passes."""

from functools import cache

import numpy as np
from fastnewton.kernels.compile import FLOAT, INT, jit, specialised
from numba import types

_VECTOR, _MATRIX = (types.Array(types.float64, ndim, "A") for ndim in (1, 2))


def centred(matrix: np.ndarray) -> np.ndarray:
    """CMC with C = I − 11ᵀ/m; a symmetric M stays exactly symmetric."""
    return _compiled(_centred, _MATRIX)(matrix)


def centred_vector(vector: np.ndarray) -> np.ndarray:
    """Cv."""
    return _compiled(_centred_vector, _VECTOR)(vector)


def is_finite(matrix: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity in it."""
    return _compiled(_is_finite, _MATRIX)(matrix)


def coefficients(squares, vectors, projection, norm2: float, cutoff: float, floor: float, largest_rank: int):
    """σ and V in descending order, the rank j, c and the captured share of z, from eigenvalues in ascending order.

    c = V_j diag(σ_j⁻²) V_jᵀ b with j = #{k ≤ m−1 : σ_k ≥ max(λσ_1, floor, √(m·2⁻⁵²)·σ_1), σ_k > 0}, at most
    largest_rank.  Flops: 4jm.
    """
    kernel = _compiled(_coefficients, _VECTOR, _MATRIX, _VECTOR, FLOAT, FLOAT, FLOAT, INT)
    return kernel(squares, vectors, projection, norm2, cutoff, floor, largest_rank)


@cache
def _compiled(function, *arguments):
    return specialised(function, (), arguments)


@jit
def _centred(build, matrix):
    m = matrix.shape[0]
    rows, columns = np.zeros(m), np.zeros(m)
    for i in range(m):
        for j in range(m):
            rows[i] += matrix[i, j]
            columns[i] += matrix[j, i]
    mean = rows.sum() / (m * m)
    result = np.empty((m, m))
    for i in range(m):
        for j in range(m):
            result[i, j] = matrix[i, j] - (rows[i] + columns[j]) / m + mean
    return result


@jit
def _centred_vector(build, vector):
    return vector - vector.sum() / vector.size


@jit
def _is_finite(build, matrix):
    for row in matrix:
        for value in row:
            if not np.isfinite(value):
                return False
    return True


@jit
def _coefficients(build, squares, vectors, projection, norm2, cutoff, floor, largest_rank):
    m = squares.size
    sigma, descending = np.empty(m), np.empty((m, m))
    for k in range(m):
        sigma[k] = np.sqrt(max(squares[m - 1 - k], 0.0))
        for i in range(m):
            descending[i, k] = vectors[i, m - 1 - k]
    least = max(cutoff * sigma[0], floor, np.sqrt(m * 2.0**-52) * sigma[0])
    rank = 0
    while rank < min(m - 1, largest_rank) and sigma[rank] >= least and sigma[rank] > 0:
        rank += 1
    c, along2 = np.zeros(m), 0.0
    for k in range(rank):
        along = 0.0
        for i in range(m):
            along += descending[i, k] * projection[i]
        along /= sigma[k]
        along2 += along * along
        for i in range(m):
            c[i] += descending[i, k] * (along / sigma[k])
    c -= c.sum() / m
    captured = min(1.0, along2 / norm2) if norm2 != 0 else 0.0
    return sigma, descending, rank, c, captured
