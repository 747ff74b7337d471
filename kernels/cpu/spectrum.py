"""The m × m part of a step, compiled: as NumPy calls it takes longer than short passes."""

import math

import numpy as np
from numba import types

from fastnewton.kernels.cpu.jit import FLOAT, INT, entry, jit
from fastnewton.kernels.record import CAPTURED, GO, HEADER, LR, LR_REST, NOT_FINITE, RANK, STATUS

COMPILED_LIMIT = 128  # workers; LAPACK is faster above, but its threads then spin on where helpers should run
SHORT_LIMIT = 32  # up to here it is over before helpers sleep, so that a step can be one call
_MOST_STEPS = 60  # for one eigenvalue; two or three are usual
_NEGLIGIBLE = 2.0**-100  # of the largest element: changes none of the directions that are kept

_VECTOR, _MATRIX = (types.Array(types.float64, ndim, "A") for ndim in (1, 2))


def projected(products: np.ndarray, m: int, eps: float):
    """CKC, Cb, zᵀz and 2·eps·‖ḡ‖ with C = I − 11ᵀ/m, from the products of m rows, their mean, and z if it is another.

    A symmetric K stays exactly symmetric.
    """
    return _project(products, m, eps)


def centred(matrix: np.ndarray) -> np.ndarray:
    """CMC."""
    return _centre(matrix, len(matrix))


def is_finite(matrix: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity in it."""
    return _all_finite(matrix)


def spectrum(matrix, projection, norm2: float, cutoff: float, floor: float, largest_rank: int):
    """Eigenpairs of a finite K of up to COMPILED_LIMIT workers, and what `coefficients` makes of them."""
    return _solve(matrix, projection, norm2, cutoff, floor, largest_rank)


def coefficients(squares, rows, projection, norm2: float, cutoff: float, floor: float, largest_rank: int):
    """σ and V in descending order, the rank j, c and the captured share of z, from eigenvalues and -vectors as rows.

    c = V_j diag(σ_j⁻²) V_jᵀ b with j = #{k ≤ m−1 : σ_k ≥ max(λσ_1, floor, √(m·2⁻⁵²)·σ_1), σ_k > 0}, at most
    largest_rank.  Flops: 4jm.
    """
    return _finish(squares, rows, projection, norm2, cutoff, floor, largest_rank)


@jit
def project(products, m, eps):
    last, projection, mean = products.shape[0] - 1, np.zeros(m), 0.0
    for i in range(m):
        mean += products[i, last] / m
    for i in range(m):
        projection[i] = products[i, last] - mean
    floor = 2 * eps * math.sqrt(products[m, m])
    return _centred(products, m), projection, products[last, last], floor


@jit
def _centred(matrix, m):
    rows, columns = np.zeros(m), np.zeros(m)
    for i in range(m):
        for j in range(m):
            rows[i] += matrix[i, j]
            columns[i] += matrix[j, i]
    mean = 0.0
    for i in range(m):
        mean += rows[i] / (m * m)
    result = np.empty((m, m))
    for i in range(m):
        for j in range(m):
            result[i, j] = matrix[i, j] - (rows[i] + columns[j]) / m + mean
    return result


@jit
def _is_finite(matrix):
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            if not math.isfinite(matrix[i, j]):
                return False
    return True


@jit
def decide(matrix, projection, norm2, floor, cutoff, largest_rank, lr, lr_rest, sigma_cap, record):
    """Write what follows from K alone to the record of a step, as `eigen.decide` does; a NaN for lr_rest means τ."""
    m, tau = projection.size, lr
    sigma, c = record[HEADER : HEADER + m], record[HEADER + 2 * m :]
    record[:] = 0
    if math.isfinite(floor) and _is_finite(matrix):
        sigma[:], _, rank, c[:], record[CAPTURED] = _spectrum(matrix, projection, norm2, cutoff, floor, largest_rank)
        record[STATUS], record[RANK] = GO, rank
        if sigma_cap and rank > 0:
            tau = min(lr, 1 / sigma[0])
    else:
        sigma[:], c[:], record[STATUS] = np.nan, np.nan, NOT_FINITE
    record[HEADER + m : HEADER + 2 * m] = c
    record[LR], record[LR_REST] = tau, tau if math.isnan(lr_rest) else lr_rest


@jit
def _spectrum(matrix, projection, norm2, cutoff, floor, largest_rank):
    squares, rows = _eigh(matrix)
    return _coefficients(squares, rows, projection, norm2, cutoff, floor, largest_rank)


@jit
def _eigh(matrix):
    """Eigenvalues and, as rows, eigenvectors of a symmetric matrix: Householder's tridiagonal form, from the last row
    up, then implicit QL steps.

    Golub & Van Loan, Matrix Computations, sections 8.3.1 and 8.3.3.  Loops throughout: they compile in a fraction of
    the time that whole-array expressions take, and into vectors where they begin at 0.
    """
    m = matrix.shape[0]
    scale = 0.0
    for i in range(m):
        for j in range(m):
            scale = max(scale, abs(matrix[i, j]))
    a, basis, vectors = np.zeros((m, m)), np.zeros((m, m)), np.zeros((m, m))
    diagonal, beside, betas, work = np.zeros(m), np.zeros(m), np.zeros(m), np.zeros(m)
    for i in range(m):
        basis[i, i] = 1.0
        for j in range(m):
            a[i, j] = matrix[i, j] / scale if scale > 0 else 0.0  # squares do not overflow
    for k in range(m - 1, 0, -1):
        betas[k], beside[k - 1] = _reflect(a, k, vectors[k], work)
    for k in range(m):
        diagonal[k] = a[k, k]
        if betas[k] > 0:
            _add_rows(basis, k, betas[k], vectors[k], work)
            for i in range(k):
                for j in range(k):
                    basis[i, j] -= vectors[k, i] * work[j]
    for i in range(m):
        for j in range(m):
            a[j, i] = basis[i, j]
    for first in range(m):
        for _step in range(_MOST_STEPS):
            last = _end_of_block(diagonal, beside, first)
            if last == first:
                break
            _ql_step(diagonal, beside, a, first, last)
    for k in range(m):
        diagonal[k] *= scale
    return diagonal, a


@jit
def _reflect(a, k, v, w):
    """Clear row k left of the element beside the diagonal: the block before it ← H·block·H with H = I − βvvᵀ.

    β, 0 where there is nothing to clear, and what the element becomes.
    """
    below, head = 0.0, a[k, k - 1]
    for i in range(k - 1):
        v[i] = a[k, i]
        below += v[i] * v[i]
    if below < _NEGLIGIBLE**2:  # β would overflow
        return 0.0, head
    length = math.copysign(math.sqrt(head * head + below), head)
    v[k - 1] = head + length
    beta = 2 / (v[k - 1] * v[k - 1] + below)
    _add_rows(a, k, beta, v, w)
    half = 0.0
    for i in range(k):
        half += beta / 2 * v[i] * w[i]
    for i in range(k):
        w[i] -= half * v[i]
    for i in range(k):
        for j in range(k):
            a[i, j] -= v[i] * w[j] + w[i] * v[j]
    return beta, -length


@jit
def _add_rows(a, size, beta, v, w):
    """w = βvᵀA for the leading block, four rows at a time, so that w is loaded and stored less often."""
    for j in range(size):
        w[j] = 0.0
    whole = size - size % 4
    for i in range(0, whole, 4):
        first, second, third, fourth = beta * v[i], beta * v[i + 1], beta * v[i + 2], beta * v[i + 3]
        for j in range(size):
            w[j] += (first * a[i, j] + second * a[i + 1, j]) + (third * a[i + 2, j] + fourth * a[i + 3, j])
    for i in range(whole, size):
        factor = beta * v[i]
        for j in range(size):
            w[j] += factor * a[i, j]


@jit
def _end_of_block(diagonal, beside, first):
    """The last index that a chain of elements beside the diagonal connects with the first."""
    last = first
    while last < diagonal.size - 1:
        if abs(beside[last]) <= max(2.0**-53 * (abs(diagonal[last]) + abs(diagonal[last + 1])), _NEGLIGIBLE):
            break
        last += 1
    return last


@jit
def _ql_step(diagonal, beside, rows, first, last):
    """One implicit QL step with Wilkinson's shift on a block, by rotations from its end to its beginning."""
    gap = (diagonal[first + 1] - diagonal[first]) / (2 * beside[first])
    shift = diagonal[first] - beside[first] / (gap + math.copysign(math.sqrt(gap * gap + 1), gap))
    bulge, sine, cosine, taken = diagonal[last] - shift, 1.0, 1.0, 0.0
    for k in range(last - 1, first - 1, -1):
        off, above = sine * beside[k], cosine * beside[k]
        length = math.sqrt(off * off + bulge * bulge)
        beside[k + 1] = length
        if length == 0:  # the block has come apart
            diagonal[k + 1] -= taken
            beside[last] = 0.0
            return
        sine, cosine = off / length, bulge / length
        bulge = diagonal[k + 1] - taken
        length = (diagonal[k] - bulge) * sine + 2 * cosine * above
        taken = sine * length
        diagonal[k + 1] = bulge + taken
        bulge = cosine * length - above
        for i in range(diagonal.size):
            x, y = rows[k, i], rows[k + 1, i]
            rows[k, i], rows[k + 1, i] = cosine * x - sine * y, sine * x + cosine * y
    diagonal[first] -= taken
    beside[first] = bulge
    beside[last] = 0.0


@jit
def _coefficients(squares, rows, projection, norm2, cutoff, floor, largest_rank):
    m = squares.size
    sigma, descending, taken = np.zeros(m), np.zeros((m, m)), np.zeros(m)
    for k in range(m):
        largest = -1
        for i in range(m):
            if taken[i] == 0 and (largest < 0 or squares[i] > squares[largest]):
                largest = i
        taken[largest] = 1
        sigma[k] = math.sqrt(max(squares[largest], 0.0))
        for i in range(m):
            descending[i, k] = rows[largest, i]
    least = max(cutoff * sigma[0], floor, math.sqrt(m * 2.0**-52) * sigma[0])
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
    mean = 0.0
    for i in range(m):
        mean += c[i] / m
    for i in range(m):
        c[i] -= mean
    captured = min(1.0, along2 / norm2) if norm2 != 0 else 0.0
    return sigma, descending, rank, c, captured


_project = entry(project, _MATRIX, INT, FLOAT)
_centre = entry(_centred, _MATRIX, INT)
_all_finite = entry(_is_finite, _MATRIX)
_solve = entry(_spectrum, _MATRIX, _VECTOR, FLOAT, FLOAT, FLOAT, INT)
_finish = entry(_coefficients, _VECTOR, _MATRIX, _VECTOR, FLOAT, FLOAT, FLOAT, INT)
