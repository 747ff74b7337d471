"""The m × m part of a step on the CPU: from the Gram to j, c, τ and β.

Formula      K = V diag(σ²) Vᵀ, j = #{k ≤ m−1 : σ_k ≥ max(λσ_1, floor, √(m·2⁻⁵²)·σ_1), σ_k > 0}, at most max_rank;
             c = V_j diag(σ_j⁻²) V_jᵀ b; lr_cap bounds τ; the safeguards are those of `fastnewton/safeguards.py`.
Shapes       K, ΘᵀΘ, ΘᵀG, V: (m, m), C-contiguous; b, Θᵀḡ: (m,); record: (HEADER + 3m,), see `kernels/record.py`.
Traffic      a few (m, m) matrices, which stay in the cache; about 9m³ flops for the eigenproblem.
Determinism  loops in a fixed order without fused multiply-adds: the same bits on every CPU up to 128 workers.
Launch       one thread.
"""

import math
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numba import types

from fastnewton.kernels import record as slot
from fastnewton.kernels.cpu.eigen import (
    all_finite,
    eigensolver,
    matrix_at,
    solve,
    take_failure,
    vector_at,
)
from fastnewton.kernels.cpu.jit import FLOAT, FLOATS, FLOATS_2D, INT, address, call, code_address, entry, jit
from fastnewton.kernels.cpu.memory import integers, keep_alive, stack_memory
from fastnewton.kernels.cpu.safeguards import guard_code

_FIELDS = slot.FIELDS  # a constant of this module is one to Numba too
_SIGMA = slot.LR_CAPS.index("sigma")
SHORT_LIMIT = 32  # up to here the eigenproblem is done before the thread pool sleeps, so that a step is one call

_NO_MATRIX, _NO_VECTOR = np.empty((0, 0)), np.empty(0)


@lru_cache(maxsize=64)  # the same settings come step after step
def pack_settings(m: int, lr: float, options: Any) -> np.ndarray:
    """Pack the settings of a decision, (SETTINGS,) float64, of `fastnewton.options.Options`; nobody writes to them."""
    guards, rank = options.safeguards, m if options.max_rank is None else min(m, options.max_rank)
    settings = [options.cutoff, rank, lr, options.lr_rest, slot.LR_CAPS.index(options.lr_cap), guards is not None]
    if guards is not None:
        settings += [slot.CURVATURES.index(guards.curvature), guards.min_cosine, guards.max_coefficient]
        settings += [guards.max_newton_norm, guards.fallback_lr]
    settings += [None] * (slot.SETTINGS - len(settings))
    return np.array([np.nan if one is None else one for one in settings], np.float64)


def decide(gram: Any, settings: np.ndarray, record: np.ndarray) -> np.ndarray:
    """Write the record of a step and return V, from a `fastnewton.Gram` of C-contiguous NumPy arrays.

    Raises
    ------
    BaseException
        What LAPACK raised, or a MemoryError.
    """
    vectors, guard = np.empty(gram.matrix.shape), guard_code(settings)
    of_thetas = _NO_MATRIX, 0.0, _NO_MATRIX, _NO_VECTOR
    if guard:  # only then are they looked at, or need be there
        cross = (_NO_MATRIX, _NO_VECTOR) if gram.cross_matrix is None else (gram.cross_matrix, gram.cross_projection)
        of_thetas = gram.theta_matrix, gram.theta_floor, *cross
    of_grads = gram.matrix, gram.projection, gram.norm2, gram.floor
    codes = decision_code(), eigensolver(gram.projection.size), guard
    _run(*codes, *of_grads, *of_thetas, settings, record, vectors)
    if record[slot.STATUS] == slot.NOT_CONVERGED:
        raise take_failure()
    return vectors


def project(products: np.ndarray, m: int, eps: float):
    """Return CKC, Cb, zᵀz and 2·eps·‖ḡ‖ with C = I − 11ᵀ/m, from the products of m rows, their mean, and z if given.

    A symmetric K stays exactly symmetric.
    """
    return _project(products, m, eps)


def centre(matrix: np.ndarray) -> np.ndarray:
    """Return CMC."""
    return _centre(matrix, len(matrix))


# -- projection -----------------------------------------------------------------------------------------------------


@jit
def project_gram(products, m, eps):
    last, projection, mean = products.shape[0] - 1, np.zeros(m), 0.0
    for i in range(m):
        mean += products[i, last] / m
    for i in range(m):
        projection[i] = products[i, last] - mean
    floor = 2 * eps * math.sqrt(products[m, m])
    return centre_matrix(products, m), projection, products[last, last], floor


@jit
def centre_matrix(matrix, m):
    rows, columns, mean = np.zeros(m), np.zeros(m), 0.0
    for i in range(m):
        for j in range(m):
            rows[i] += matrix[i, j]
            columns[i] += matrix[j, i]
    for i in range(m):
        mean += rows[i] / (m * m)
    result = np.empty((m, m))
    for i in range(m):
        for j in range(m):
            result[i, j] = matrix[i, j] - (rows[i] + columns[j]) / m + mean
    return result


# -- decision: equations (3) and (4), the caps, the safeguards ------------------------------------------------------


@jit
def run_decision(
    decision, solver, guard, matrix, projection, norm2, floor, thetas, theta_floor, cross, along, options, record,
    vectors,
):  # fmt: skip
    """Call the compiled decision, which is compiled once for all steps since it is not inlined."""
    norms, where = np.empty(slot.NORM_COUNT), stack_memory(_FIELDS)
    block = integers(where)
    norms[slot.NORM2], norms[slot.FLOOR], norms[slot.THETA_FLOOR] = norm2, floor, theta_floor
    block[slot.M], block[slot.SOLVER], block[slot.GUARD] = projection.size, solver, guard
    block[slot.GRAM], block[slot.PROJECTION], block[slot.NORMS] = address(matrix), address(projection), address(norms)
    block[slot.THETA_GRAM], block[slot.CROSS], block[slot.ALONG] = address(thetas), address(cross), address(along)
    block[slot.OPTIONS], block[slot.RECORD], block[slot.VECTORS] = address(options), address(record), address(vectors)
    if call(decision, where) != 0:
        record[slot.STATUS] = slot.NOT_CONVERGED
    keep_alive(norms)


@jit
def _decide(block):
    """σ, V, j, c, and τ and β under the caps; the guard, if any, then looks at ΘᵀΘ and ΘᵀG."""
    fields = integers(block)
    m = fields[slot.M]
    matrix, vectors = matrix_at(fields[slot.GRAM], m), matrix_at(fields[slot.VECTORS], m)
    options, norms = vector_at(fields[slot.OPTIONS], slot.SETTINGS), vector_at(fields[slot.NORMS], slot.NORM_COUNT)
    record = vector_at(fields[slot.RECORD], slot.HEADER + 3 * m)
    is_finite = math.isfinite(norms[slot.FLOOR]) and all_finite(matrix)
    for k in range(record.size):
        record[k] = 0.0 if is_finite or k < slot.HEADER else np.nan
    record[slot.LR], record[slot.STATUS] = options[slot.GIVEN_LR], slot.NOT_FINITE
    if is_finite:
        squares, rows = np.empty(m), np.empty((m, m))
        record[slot.STATUS] = slot.GO if solve(fields[slot.SOLVER], matrix, squares, rows) else slot.NOT_CONVERGED
        projection = vector_at(fields[slot.PROJECTION], m)
        _select(squares, rows, projection, norms[slot.NORM2], norms[slot.FLOOR], options, record, vectors)
        if options[slot.CAP] == _SIGMA and record[slot.RANK] > 0:
            record[slot.LR] = min(record[slot.LR], 1 / record[slot.HEADER])
    else:
        for i in range(m):
            for j in range(m):
                vectors[i, j] = np.nan
    rest = options[slot.GIVEN_LR_REST]
    record[slot.LR_REST] = record[slot.LR] if math.isnan(rest) else rest
    if fields[slot.GUARD] != 0 and call(fields[slot.GUARD], block) != 0:
        record[slot.STATUS] = slot.NOT_CONVERGED


@jit
def _select(squares, rows, projection, norm2, floor, options, record, vectors):
    """σ in descending order, V, j, c and the captured share of z."""
    m = squares.size
    taken = np.zeros(m, np.uint8)
    for k in range(m):
        largest = -1
        for i in range(m):
            if taken[i] == 0 and (largest < 0 or squares[i] > squares[largest]):
                largest = i
        taken[largest] = 1
        record[slot.HEADER + k] = math.sqrt(max(squares[largest], 0.0))
        for i in range(m):
            vectors[i, k] = rows[largest, i]
    sigma_1, rank = record[slot.HEADER], 0
    least = max(options[slot.CUTOFF] * sigma_1, floor, math.sqrt(m * 2.0**-52) * sigma_1)
    most = min(m - 1, int(options[slot.MAX_RANK]))
    while rank < most and record[slot.HEADER + rank] >= least and record[slot.HEADER + rank] > 0:
        rank += 1
    c, captured, mean = slot.HEADER + 2 * m, 0.0, 0.0
    for k in range(rank):
        sigma, alpha = record[slot.HEADER + k], 0.0
        for i in range(m):
            alpha += vectors[i, k] * projection[i]
        alpha /= sigma
        captured += alpha * alpha
        for i in range(m):
            record[c + i] += vectors[i, k] * (alpha / sigma)
    for i in range(m):
        mean += record[c + i] / m
    for i in range(m):
        record[c + i] -= mean
        record[slot.HEADER + m + i] = record[c + i]
    record[slot.RANK], record[slot.CAPTURED] = rank, min(1.0, captured / norm2) if norm2 != 0 else 0.0


@cache
def decision_code() -> int:
    """Return the address of the compiled decision."""
    return code_address(_decide, INT)


_STRIDED = types.Array(types.float64, 2, "A")
_project = entry(project_gram, _STRIDED, INT, FLOAT)
_centre = entry(centre_matrix, _STRIDED, INT)
_CODES, _OF_THETAS = (INT, INT, INT), (FLOATS_2D, FLOAT, FLOATS_2D, FLOATS)
_run = entry(run_decision, *_CODES, FLOATS_2D, FLOATS, FLOAT, FLOAT, *_OF_THETAS, FLOATS, FLOATS, FLOATS_2D)
