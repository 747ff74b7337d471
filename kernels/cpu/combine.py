"""combine: the new parameters from all workers' parameters and gradients, in one pass.

Formula      θ_new = θ̄ − τΘc − β(ḡ − Gc), or z + (Θ − G)c with z given.  c sums to zero, so row 0 can be the origin:
                 θ_new = θ_0 − βg_0 + Σ_k p_k(θ_k − θ_0) + q_k(g_k − g_0),  p_k = 1/m − τc_k,  q_k = −β(1/m − c_k)
             and rounding is relative to the spread of the workers, not to θ.
Shapes       thetas, grads: m vectors of length n; z, out: vectors of length n; c: (m,) float64, or (2m,) with one for Θ
             and one for G.
Traffic      reads 2m·n·itemsize bytes once (and z), writes n·itemsize.
Rounding     a float32 sum has up to 2(m − 1) terms; relative to float64 the errors seen are 1.9e-7 with m = 64 and
             8.1e-7 with m = 1,024.
Determinism  each coordinate is on its own: its bits depend on nothing else.
Launch       tasks are runs of blocks; the threads take them from a shared counter, in descending order, because the
             end of the gradients is what `gram` has left in L3.
"""

import numpy as np

from fastnewton.kernels.cpu import threads
from fastnewton.kernels.cpu.jit import FLOAT, FLOATS, INT, INTS, address, call, code_address, entry, jit
from fastnewton.kernels.cpu.memory import copy, copy_rows, fetch_and_add, floats, integers, stack_memory
from fastnewton.kernels.cpu.simd import CACHE_LINE, Constant, kernel, lanes
from fastnewton.kernels.cpu.threads import TASKS_PER_THREAD, THREADED_BYTES
from fastnewton.kernels.cpu.tree import BLOCK

UNROLLED = 8  # rows beside the first whose combination is one straight line
ROWS_PER_PASS = 4  # above that: more streams at equal stride exceed L1 associativity
STREAMED_BYTES = 1 << 24  # a larger result bypasses the cache, which would read each line before overwriting it

NO_ROW = np.empty(0, np.int64)


def combine(thetas, grads, coefficients, *, tau: float, beta: float, z=None, out, compute: str) -> bool:
    """Write the combination to `out` (Rows of one row); return False if any value written is not finite."""
    m, n, itemsize = thetas.m, thetas.n, thetas.itemsize
    workers = threads.workers_for(2 * m * n * itemsize >= THREADED_BYTES)
    codes = kernels(m, n * itemsize, thetas.dtype, compute, "mean" if z is None else "z")
    memory = np.empty(memory_size(m, workers))
    arguments = thetas.table, grads.table, NO_ROW if z is None else z.table, coefficients, tau, beta, out.table
    return bool(_run_combine(threads.pool.address, workers, codes, *arguments, n, itemsize, memory))


def kernels(m: int, size: int, storage: str, compute: str, base: str = "mean") -> np.ndarray:
    """Return what `combine_on_threads` calls for m workers and a result of so many bytes, and the lanes of a vector."""
    rows = m - 1 if m - 1 <= UNROLLED else UNROLLED + 1
    block = _block.address(storage, compute, rows, base, 0)
    streamed = _block.address(storage, compute, rows, base, 1) if size >= STREAMED_BYTES else 0
    return np.array([code_address(_combine_blocks, INT), block, streamed, lanes(compute)])


def memory_size(m: int, workers: int) -> int:
    """Return the float64 numbers that the memory of `combine_on_threads` must hold."""
    return 2 * (2 * m + 2) + 2 * CACHE_LINE // 8 + (workers + 1) * thread_bytes.py_func(2 * m + 1) // 8


@jit
def thread_bytes(rows):
    """Return the bytes of a thread's own memory: scratch; a table of rows; a vector of each row and of the result.

    Whole cache lines, or a thread's memory would reach into the next one's, which begins on a line.
    """
    return (8 * BLOCK + (rows + 1) * (8 + CACHE_LINE) + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


# -- over all blocks, compiled once -----------------------------------------------------------------------------

# The argument block.
(
    M, TABLE, ROWS, WEIGHTS, OUT, N, ITEM_BYTES, LANES, KERNEL, STREAMED, SHIFT, BLOCKS,
    THREADS_MEMORY, PER_THREAD, TASK_COUNT, NEXT_TASK, THREADS_COME, NONFINITE, ARGUMENTS,
) = range(19)  # fmt: skip


@jit
def combine_on_threads(
    pool, workers, codes, thetas, grads, last, c, tau, beta, out, n, itemsize, memory
):  # fmt: skip
    """Run a combine kernel over all blocks; 1 if all values are finite, else 0."""
    m, rows = thetas.size, 2 * thetas.size + last.size
    where = stack_memory(ARGUMENTS)
    block = integers(where)
    block[M], block[TABLE], block[ROWS] = m, address(memory), rows
    block[WEIGHTS] = block[TABLE] + 8 * rows
    block[THREADS_MEMORY] = (block[WEIGHTS] + 8 * (2 * m + 1) + 63) & ~63
    block[PER_THREAD] = thread_bytes(rows)
    copy(block[TABLE], address(thetas), 8 * m)
    copy(block[TABLE] + 8 * m, address(grads), 8 * m)
    copy(block[TABLE] + 16 * m, address(last), 8 * last.size)
    _weigh(last.size == 0, m, c, tau, beta, block[WEIGHTS])
    block[OUT], block[N], block[ITEM_BYTES], block[LANES] = out[0], n, itemsize, codes[3]
    block[KERNEL], block[STREAMED] = codes[1], codes[2]
    # Stores that bypass the cache must be aligned: blocks then begin on cache lines, the first one before the array.
    block[SHIFT] = out[0] // itemsize % (64 // itemsize) if codes[2] else 0
    block[BLOCKS] = (n + block[SHIFT] + BLOCK - 1) // BLOCK
    block[TASK_COUNT] = min(block[BLOCKS], TASKS_PER_THREAD * (workers + 1) if workers else 1)
    block[NEXT_TASK], block[THREADS_COME], block[NONFINITE] = 0, 0, 0
    threads.run(pool, workers, codes[0], where, ARGUMENTS)
    return 1 if block[NONFINITE] == 0 else 0


_run_combine = entry(
    combine_on_threads, INT, INT, INTS, INTS, INTS, INTS, FLOATS, FLOAT, FLOAT, INTS, INT, INT, FLOATS
)  # fmt: skip


@jit
def _weigh(of_mean, m, c, tau, beta, weights):
    """Write p, q and the factor of g_0, after c has been made to sum to zero."""
    p, q, second = floats(weights), floats(weights + 8 * m), c.size - m
    mean, mean_of_grads = 0.0, 0.0
    for k in range(m):
        mean += c[k]
        mean_of_grads += c[second + k]
    mean, mean_of_grads = mean / m, mean_of_grads / m
    for k in range(m):
        if of_mean:
            p[k], q[k] = 1 / m - tau * (c[k] - mean), beta * (c[second + k] - mean_of_grads - 1 / m)
        else:
            p[k], q[k] = c[k] - mean, mean_of_grads - c[second + k]
    q[m] = -beta


@jit
def _combine_blocks(where):
    """Combine blocks, task by task."""
    block = integers(where)
    m, table, rows, weights, out, n = block[M], block[TABLE], block[ROWS], block[WEIGHTS], block[OUT], block[N]
    itemsize, shift, blocks, tasks = block[ITEM_BYTES], block[SHIFT], block[BLOCKS], block[TASK_COUNT]
    scratch = (block[THREADS_MEMORY] + block[PER_THREAD] * fetch_and_add(where + 8 * THREADS_COME, 1) + 63) & ~63
    padded, finite = scratch + 8 * BLOCK, 1
    task = fetch_and_add(where + 8 * NEXT_TASK, 1)
    while task < tasks:
        for k in range(blocks - task * blocks // tasks - 1, blocks - (task + 1) * blocks // tasks - 1, -1):
            offset = max(0, k * BLOCK - shift)
            length = min(n, (k + 1) * BLOCK - shift) - offset
            target = out + offset * itemsize
            rest = length % block[LANES] if length < BLOCK else 0
            if rest:  # of a vector: copied, since what follows it is not ours
                length -= rest
                copies, size = padded + CACHE_LINE * (rows + 1), rest * itemsize
                copy_rows(table, copies, rows, (offset + length) * itemsize, size, CACHE_LINE, padded)
                result = padded + CACHE_LINE * rows
                finite &= call(block[KERNEL], m, copies, weights, 0, rest, result, scratch)
                copy(target + length * itemsize, result, size)
            if length:
                code = block[STREAMED] if length == BLOCK and block[STREAMED] else block[KERNEL]
                finite &= call(code, m, table, weights, offset, length, target, scratch)
        task = fetch_and_add(where + 8 * NEXT_TASK, 1)
    if finite == 0:
        fetch_and_add(where + 8 * NONFINITE, 1)


# -- one block, compiled for each kind of rows --------------------------------------------------------------------


@kernel
def _block(v, rows: Constant, base: Constant, streamed: Constant, m, table, weights, offset, length, out, scratch):
    """Combine one block; return 1 if all that was stored is finite, else 0.

    The table holds the addresses of thetas, grads and z; the weights are p, q and the factor of g_0.  `rows` is their
    number beside the first, or more than UNROLLED: then sums are in scratch while rows are added in passes.
    """
    steps, checked = (length + (v.lanes - 1)) // v.lanes, v.sums([0])
    tables, factors = (table, table + m * 8), (weights, weights + m * 8)
    theta_0, grad_0 = (v.rows(side, 0, 1, offset)[0] for side in tables)
    work, target, minus_beta = v.scratch(scratch), v.row(out), v.broadcast(factors[1] + m * 8)
    z = v.rows(tables[1] + m * 8, 0, base == "z", offset)  # one row, or none

    def start(c, theta, grad):
        """The combination before any row but the first is added."""
        if base == "mean":
            return theta + minus_beta * grad
        # With one worker there is no difference that would carry a NaN of it.
        return z[0][c] if rows else z[0][c] + (theta - theta) + (grad - grad)

    def finish(c, value):
        stored = target.store(c, value, nontemporal=bool(streamed))
        checked[0] += stored * v.constant(0.0)

    def add_rows(first, count: int, begin, end) -> None:
        """Add p_k(θ_k − θ_0) + q_k(g_k − g_0) for so many rows, and prefetch the next ones."""
        last = first + 2 * count > m
        ahead = v.select(last, 1, first + count), v.select(last, offset - BLOCK, offset)
        added = [row for side in tables for row in v.rows(side, first, count, offset)]
        ahead = [row for side in tables for row in v.rows(side, ahead[0], count, ahead[1])]
        scales = [v.broadcast(side + (first + k) * 8) for side in factors for k in range(count)]
        for c in v.range(steps):
            origins = [theta_0[c]] * count + [grad_0[c]] * count
            value = begin(c, theta_0[c], grad_0[c])
            terms = [row[c] for row in added]
            for row in ahead:
                v.prefetch(row.at(c))
            for scale, term, origin in zip(scales, terms, origins, strict=True):
                value += scale * (term - origin)
            end(c, value)

    first = v.integer(1)
    if rows <= UNROLLED:
        add_rows(first, rows, start, finish)
        return v.all_zero(checked[0])

    def resume(c, *_):
        return work[c]

    add_rows(first, ROWS_PER_PASS, start, work.__setitem__)
    passes = (m - 1) // ROWS_PER_PASS
    for k in v.range(1, passes):
        add_rows(1 + k * ROWS_PER_PASS, ROWS_PER_PASS, resume, work.__setitem__)
    for k in v.range(1 + passes * ROWS_PER_PASS, m):
        add_rows(k, 1, resume, work.__setitem__)
    for c in v.range(steps):
        finish(c, work[c])
    return v.all_zero(checked[0])
