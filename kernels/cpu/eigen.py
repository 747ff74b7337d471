"""The symmetric eigenproblem of size m × m on the CPU: compiled loops, and LAPACK where it is faster.

Formula      K = V diag(λ) Vᵀ: Householder's tridiagonal form, then implicit QL steps; Golub & Van Loan, Matrix
             Computations, sections 8.3.1 and 8.3.3.
Shapes       K: (m, m); eigenvalues: (m,), in no order; eigenvectors: (m, m), as rows.
Traffic      four (m, m) matrices, which stay in the cache; about 9m³ flops.
Determinism  loops in a fixed order without fused multiply-adds: the same bits on every CPU, up to COMPILED_LIMIT.
Launch       one thread.
"""

import ctypes
import math
import threading
from functools import cache

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from fastnewton.kernels.cpu.jit import INT, address, call, code_address, jit
from fastnewton.kernels.cpu.memory import integers, keep_alive, pointer_at, stack_memory

COMPILED_LIMIT = 128  # workers; LAPACK is faster above, but its threads then spin where the thread pool should run
_MAX_QL_STEPS = 60  # for one eigenvalue; two or three are usual
_failure = threading.local()  # the exception that LAPACK's last call in this thread ended with
_NEGLIGIBLE = 2.0**-100  # of the largest element: changes none of the directions that are kept
_FIELDS = 4  # of its argument block: m, and the addresses of the matrix, the eigenvalues, the eigenvectors as rows


def eigensolver(m: int) -> int:
    """Return the address of the code that solves the eigenproblem of m workers: compiled loops, or LAPACK."""
    if m <= COMPILED_LIMIT:
        return _compiled_eigensolver()
    address = ctypes.cast(_call_lapack, ctypes.c_void_p).value
    assert address is not None
    return address


@cache
def _compiled_eigensolver() -> int:
    return code_address(_eigh, INT)


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64))
def _call_lapack(result, error, block):
    """Solve as `_eigh` does, with its calling convention; ctypes takes the interpreter's lock for that."""
    try:
        m, *places = block[:_FIELDS]
        doubles = [ctypes.cast(place, ctypes.POINTER(ctypes.c_double)) for place in places]
        matrix, rows = (np.ctypeslib.as_array(doubles[k], (m, m)) for k in (0, 2))
        np.ctypeslib.as_array(doubles[1], (m,))[:], vectors = np.linalg.eigh(matrix)
        rows[:] = vectors.T
    except BaseException as error:  # ctypes would print it and go on; a signal's handler may raise here too
        _failure.error = error
        return 1
    return 0


def take_failure() -> BaseException:
    """Return what stopped the last decision of this thread: LAPACK's exception, or want of memory in compiled code."""
    error = getattr(_failure, "error", None) or MemoryError("no memory for a decision")
    _failure.error = None
    return error


@jit
def solve(solver, matrix, squares, rows):
    """Eigenvalues and, as rows, eigenvectors of a symmetric matrix; false if the solver failed."""
    where = stack_memory(_FIELDS)
    block = integers(where)
    block[0], block[1], block[2], block[3] = matrix.shape[0], address(matrix), address(squares), address(rows)
    failed = call(solver, where)
    keep_alive(matrix)
    return failed == 0


@jit
def _eigh(block):
    """Householder's tridiagonal form, from the last row up, then implicit QL steps.

    Golub & Van Loan, Matrix Computations, sections 8.3.1 and 8.3.3.  Loops throughout: they compile in a fraction of
    the time that whole-array expressions take, and into vectors where they begin at 0.
    """
    fields = integers(block)
    m = fields[0]
    matrix, diagonal, a = matrix_at(fields[1], m), vector_at(fields[2], m), matrix_at(fields[3], m)
    scale = 0.0
    for i in range(m):
        for j in range(m):
            scale = max(scale, abs(matrix[i, j]))
    basis, vectors = np.zeros((m, m)), np.zeros((m, m))
    beside, betas, work = np.zeros(m), np.zeros(m), np.zeros(m)
    for i in range(m):
        basis[i, i] = 1.0
        for j in range(m):
            a[i, j] = matrix[i, j] / scale if scale > 0 else 0.0  # squares do not overflow
    for k in range(m - 1, 0, -1):
        betas[k] = _reflect(a, k, vectors, beside, work)
    for k in range(m):
        diagonal[k] = a[k, k]
        if betas[k] > 0:
            _add_rows(basis, k, betas[k], vectors, k, work)
            for i in range(k):
                for j in range(k):
                    basis[i, j] -= vectors[k, i] * work[j]
    for i in range(m):
        for j in range(m):
            a[j, i] = basis[i, j]
    for first in range(m):
        for _step in range(_MAX_QL_STEPS):
            last = _end_of_block(diagonal, beside, first)
            if last == first:
                break
            _ql_step(diagonal, beside, a, first, last)
    for k in range(m):
        diagonal[k] *= scale


@jit
def _reflect(a, k, vectors, beside, w):
    """Clear row k left of the element beside the diagonal: the block before it ← H·block·H with H = I − βvvᵀ.

    Return β, 0 where there is nothing to clear; v is row k of `vectors`.
    """
    below, head = 0.0, a[k, k - 1]
    for i in range(k - 1):
        vectors[k, i] = a[k, i]
        below += a[k, i] * a[k, i]
    if below < _NEGLIGIBLE**2:  # β would overflow
        beside[k - 1] = head
        return 0.0
    length = math.copysign(math.sqrt(head * head + below), head)
    vectors[k, k - 1] = head + length
    beta = 2 / (vectors[k, k - 1] * vectors[k, k - 1] + below)
    _add_rows(a, k, beta, vectors, k, w)
    half = 0.0
    for i in range(k):
        half += beta / 2 * vectors[k, i] * w[i]
    for i in range(k):
        w[i] -= half * vectors[k, i]
    for i in range(k):
        for j in range(k):
            a[i, j] -= vectors[k, i] * w[j] + w[i] * vectors[k, j]
    beside[k - 1] = -length
    return beta


@jit
def _add_rows(a, size, beta, vectors, k, w):
    """w = βvᵀA for the leading block, four rows at a time, so that w is loaded and stored less often."""
    for j in range(size):
        w[j] = 0.0
    whole = size - size % 4
    for i in range(0, whole, 4):
        first, second = beta * vectors[k, i], beta * vectors[k, i + 1]
        third, fourth = beta * vectors[k, i + 2], beta * vectors[k, i + 3]
        for j in range(size):
            w[j] += (first * a[i, j] + second * a[i + 1, j]) + (third * a[i + 2, j] + fourth * a[i + 3, j])
    for i in range(whole, size):
        factor = beta * vectors[k, i]
        for j in range(size):
            w[j] += factor * a[i, j]


@jit
def _end_of_block(diagonal, beside, first):
    """Return the last index that a chain of elements beside the diagonal connects with the first."""
    last = first
    while last < diagonal.size - 1:
        if abs(beside[last]) <= max(2.0**-53 * (abs(diagonal[last]) + abs(diagonal[last + 1])), _NEGLIGIBLE):
            break
        last += 1
    return last


@jit
def _ql_step(diagonal, beside, rows, first, last):
    """Take one implicit QL step with Wilkinson's shift on a block, by rotations from its end to its beginning."""
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
def matrix_at(where, m):
    return carray(pointer_at(where), (m, m), np.float64)


@jit
def vector_at(where, size):
    return carray(pointer_at(where), (size,), np.float64)


@jit
def all_finite(matrix):
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            if not math.isfinite(matrix[i, j]):
                return False
    return True


@jit
def multiply(left, right, result):
    """result = left·right; rows of `result` are added to, which compiles into vectors."""
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            result[i, j] = 0.0
        for k in range(right.shape[0]):
            factor = left[i, k]
            for j in range(result.shape[1]):
                result[i, j] += factor * right[k, j]


@jit
def multiply_transposed(left, right, result):
    """result = leftᵀ·right."""
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            result[i, j] = 0.0
    for k in range(left.shape[0]):
        for i in range(result.shape[0]):
            factor = left[k, i]
            for j in range(result.shape[1]):
                result[i, j] += factor * right[k, j]
