"""What a decision asks of ΘᵀΘ and ΘᵀG on the CPU: the curvature cap, and the safeguards.

Formula      τ ≤ σ_min(ΘV_jΣ_j⁻¹); the equations of `fastnewton/safeguards.py`.
Shapes       ΘᵀΘ, ΘᵀG, K, V: (m, m), C-contiguous; Θᵀḡ, b: (m,); record: (HEADER + 3m,), see `kernels/record.py`.
Traffic      a few (m, m) matrices, which stay in the cache; two eigenproblems of size j × j.
Determinism  loops in a fixed order: the same bits on every CPU up to 128 workers.
Launch       one thread, called by the decision in `spectrum.py`; compiled when it is first needed.
"""

import math
from functools import cache

import numpy as np

from fastnewton.kernels import record as slot
from fastnewton.kernels.cpu.eigen import (
    all_finite,
    matrix_at,
    multiply,
    multiply_transposed,
    solve,
    vector_at,
)
from fastnewton.kernels.cpu.jit import INT, code_address, jit
from fastnewton.kernels.cpu.memory import integers

_CURVATURE_CAP = slot.LR_CAPS.index("curvature")
_KEEP, _ABS = slot.CURVATURES.index("keep"), slot.CURVATURES.index("abs")


def guard_code(settings: np.ndarray) -> int:
    """Return the address of this code; 0 where the settings do not need it."""
    return _compiled_guard() if settings[slot.GUARDED] or settings[slot.CAP] == _CURVATURE_CAP else 0


@cache
def _compiled_guard() -> int:
    return code_address(_guard, INT)


@jit
def _guard(block):
    """Cap τ; then accept the step, modify it, or replace it by averaged SGD."""
    fields = integers(block)
    m, solver = fields[slot.M], fields[slot.SOLVER]
    thetas, vectors = matrix_at(fields[slot.THETA_GRAM], m), matrix_at(fields[slot.VECTORS], m)
    options, norms = vector_at(fields[slot.OPTIONS], slot.SETTINGS), vector_at(fields[slot.NORMS], slot.NORM_COUNT)
    record, bound = vector_at(fields[slot.RECORD], slot.HEADER + 3 * m), np.inf
    if record[slot.STATUS] == slot.GO and record[slot.RANK] > 0:
        if math.isfinite(norms[slot.THETA_FLOOR]) and all_finite(thetas):
            bound = _least_stretch(solver, thetas, norms[slot.THETA_FLOOR], vectors, record)
        elif options[slot.CAP] == _CURVATURE_CAP:
            record[slot.STATUS] = slot.NOT_FINITE
    if options[slot.CAP] == _CURVATURE_CAP:
        record[slot.LR] = min(record[slot.LR], bound)
        if math.isnan(options[slot.GIVEN_LR_REST]):
            record[slot.LR_REST] = record[slot.LR]
    if options[slot.GUARDED] == 0:
        return
    shortest, chosen = min(record[slot.LR], record[slot.LR_REST]), options[slot.FALLBACK_LR]
    record[slot.FALLBACK] = min(shortest, bound) if math.isnan(chosen) else chosen
    matrix, cross = matrix_at(fields[slot.GRAM], m), matrix_at(fields[slot.CROSS], m)
    projection, along = vector_at(fields[slot.PROJECTION], m), vector_at(fields[slot.ALONG], m)
    norm2, reason = norms[slot.NORM2], slot.NONFINITE
    if record[slot.STATUS] == slot.GO:
        reason = _bend(solver, cross, projection, norm2, options, record, vectors)
        if reason != slot.NONFINITE:
            reason = _judge(matrix, projection, norm2, thetas, cross, along, options, record, reason)
    record[slot.REASON] = reason
    if reason == slot.NONFINITE and record[slot.STATUS] == slot.GO:
        record[slot.STATUS] = slot.NOT_FINITE  # the rows tell which worker it was
    elif reason in (slot.COEFFICIENT, slot.COSINE):
        _fall_back(record)


@jit
def _least_stretch(solver, thetas, floor, vectors, record):
    """min over unit u in the kept span of ‖ΘV_jΣ_j⁻¹u‖; infinity where no direction was seen to move.

    Below the rounding of the stored thetas, or of their products, a direction was not seen to move.
    """
    m, rank, trace = vectors.shape[0], int(record[slot.RANK]), 0.0
    for i in range(m):
        trace += thetas[i, i]
    least = max(floor, math.sqrt(m * 2.0**-52 * trace))
    kept, moved, seen = np.empty((m, rank)), np.empty((m, rank)), np.empty((rank, rank))
    for i in range(m):
        for k in range(rank):
            kept[i, k] = vectors[i, k]
    multiply(thetas, kept, moved)
    multiply_transposed(kept, moved, seen)
    usable, count = np.empty(rank, np.int64), 0
    for k in range(rank):
        if math.sqrt(max(seen[k, k], 0.0)) > least:
            usable[count] = k
            count += 1
    if count == 0:
        return np.inf
    scaled, squares, rows = np.empty((count, count)), np.empty(count), np.empty((count, count))
    for r in range(count):
        for s in range(count):
            k, l = usable[r], usable[s]
            scaled[r, s] = 1 / record[slot.HEADER + k] * seen[k, l] * (1 / record[slot.HEADER + l])
    if not solve(solver, scaled, squares, rows):
        record[slot.STATUS] = slot.NOT_CONVERGED
        return np.inf
    smallest = squares[0]
    for k in range(count):
        smallest = min(smallest, squares[k])
    return math.sqrt(max(smallest, 0.0))


@jit
def _fall_back(record):
    """Replace a decision by averaged SGD with the step length FALLBACK."""
    m = (record.size - slot.HEADER) // 3
    record[slot.RANK] = record[slot.CAPTURED] = 0.0
    record[slot.LR] = record[slot.LR_REST] = record[slot.FALLBACK]
    for k in range(slot.HEADER + m, record.size):
        record[k] = 0.0


@jit
def _bend(solver, cross, projection, norm2, options, record, vectors):
    """Drop or reverse the directions whose curvature is not positive; return CURVATURE if there are any."""
    m, rank = projection.size, int(record[slot.RANK])
    basis, half, inverse = np.empty((m, rank)), np.empty((m, rank)), np.empty((rank, rank))
    for i in range(m):
        for k in range(rank):
            basis[i, k] = vectors[i, k] / record[slot.HEADER + k]
    multiply(cross, basis, half)
    multiply_transposed(basis, half, inverse)
    if not all_finite(inverse):
        return slot.NONFINITE
    if options[slot.BEND] == _KEEP or rank == 0:
        return slot.ACCEPTED
    symmetric, mu, turn = np.empty((rank, rank)), np.empty(rank), np.empty((rank, rank))
    for r in range(rank):
        for s in range(rank):
            symmetric[r, s] = (inverse[r, s] + inverse[s, r]) / 2
    if not solve(solver, symmetric, mu, turn):
        record[slot.STATUS] = slot.NOT_CONVERGED
        return slot.NONFINITE
    bent = 0
    for r in range(rank):
        bent += mu[r] <= 0
    if bent == 0:
        return slot.ACCEPTED
    p, q, captured = slot.HEADER + m, slot.HEADER + 2 * m, 0.0
    reverse = options[slot.BEND] == _ABS
    for i in range(m):
        record[p + i] = 0.0
        if not reverse:
            record[q + i] = 0.0
    direction = np.empty(m)
    for r in range(rank):
        if mu[r] <= 0 and not reverse:
            continue
        alpha = 0.0
        for i in range(m):
            direction[i] = 0.0
            for k in range(rank):
                direction[i] += basis[i, k] * turn[r, k]
            alpha += direction[i] * projection[i]
        captured += alpha * alpha
        for i in range(m):
            if not reverse:
                record[q + i] += direction[i] * alpha
            record[p + i] += direction[i] * (-alpha if mu[r] <= 0 else alpha)
    if not reverse:
        record[slot.RANK] -= bent
        record[slot.CAPTURED] = min(1.0, captured / norm2) if norm2 != 0 else 0.0
    return slot.CURVATURE


@jit
def _judge(matrix, projection, norm2, thetas, cross, along, options, record, reason):
    """Shorten Newton's part where it is too long; return the reason in the end."""
    m, limit = projection.size, options[slot.MAX_COEFFICIENT]
    p, q = slot.HEADER + m, slot.HEADER + 2 * m
    for k in range(p, record.size):
        if abs(record[k]) > limit:
            return slot.COEFFICIENT
    tau, beta, trace = record[slot.LR], record[slot.LR_REST], 0.0
    moved2 = newton = b_q = q_k_q = between = 0.0
    for i in range(m):
        theta_p = cross_q = k_q = 0.0
        for j in range(m):
            theta_p += thetas[i, j] * record[p + j]
            cross_q += cross[i, j] * record[q + j]
            k_q += matrix[i, j] * record[q + j]
        moved2 += record[p + i] * theta_p
        newton += record[p + i] * along[i]
        between += record[p + i] * (along[i] - cross_q)
        b_q += record[q + i] * projection[i]
        q_k_q += record[q + i] * k_q
        trace += thetas[i, i]
    moved = math.sqrt(_clamp(moved2))
    rest = _clamp(norm2 - b_q)  # rounding alone is no ascent
    longest = options[slot.MAX_NEWTON_NORM] * math.sqrt(trace / m)
    if tau * moved > longest:
        tau, reason = longest / moved, slot.NEWTON_NORM
    step_along = tau * newton + beta * rest
    length2 = (tau * moved) * (tau * moved) + 2 * tau * beta * between + beta * beta * (rest - b_q + q_k_q)
    if not math.isfinite(step_along + length2):
        return slot.NONFINITE
    if step_along < options[slot.MIN_COSINE] * math.sqrt(_clamp(length2)) * math.sqrt(norm2):
        return slot.COSINE
    record[slot.LR] = tau
    return reason


@jit
def _clamp(x):
    """max(x, 0), which lets NaN through."""
    return 0.0 if x < 0 else x
