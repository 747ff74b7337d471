"""The fused step on the CPU: gram, decision and combine without a return to Python.

For short vectors the way through Python takes most of the time.
"""

from functools import cache, lru_cache

import numpy as np
from numba import types

from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu import combine, gram, threads, tree
from fastnewton.kernels.cpu.combine import NO_ROW, combine_on_threads
from fastnewton.kernels.cpu.eigen import eigensolver, take_failure
from fastnewton.kernels.cpu.gram import gram_on_threads
from fastnewton.kernels.cpu.jit import FLOAT, FLOATS, INT, INTS, INTS_2D, address, entry, jit
from fastnewton.kernels.cpu.memory import overlaps
from fastnewton.kernels.cpu.spectrum import decision_code, project_gram, run_decision
from fastnewton.kernels.cpu.threads import THREADED_BYTES
from fastnewton.kernels.cpu.tree import blocks
from fastnewton.kernels.record import GO, HEADER, LR, LR_REST, NOT_CONVERGED, RESULT, STATUS


def step(thetas, grads, out, record, settings, *, eps: float, guarded: bool, products: str, sums: str) -> None:
    """Take a step of up to SHORT_LIMIT workers and write its record.

    settings are those of the decision; guarded: only a finite K is acted upon; products and sums are the types in which
    gram and combine compute.
    """
    m, n, itemsize = thetas.m, thetas.n, thetas.itemsize
    workers = threads.workers_for(m * n * itemsize >= THREADED_BYTES)
    plan, memory = _plan(m, n, grads.dtype, products, sums, workers)
    rows = thetas.table, grads.table, out.table, n, itemsize
    _run_step(threads.pool.address, workers, np.empty(memory), *plan, *rows, eps, guarded, settings, record)
    if record[STATUS] == NOT_CONVERGED:
        raise take_failure()


def step_of_arrays(
    thetas, grads, out, record, settings, *, eps: float, guarded: bool, dtype: str, compute: str
) -> bool:
    """Take a step as `step` does, of NumPy arrays of float32 or float64 with n > 0; false unless compiled code found
    their strides and alignment in order."""
    m, n = thetas.shape
    workers = threads.workers_for(thetas.nbytes >= THREADED_BYTES)
    plan, memory = _plan(m, n, dtype, compute, compute, workers)
    run, arrays = _step_entry(dtype), (thetas, grads, out)
    taken = run(threads.pool.address, workers, np.empty(memory), *plan, *arrays, eps, guarded, settings, record)
    if taken and record[STATUS] == NOT_CONVERGED:
        raise take_failure()
    return bool(taken)


@lru_cache(maxsize=256)
def _plan(m: int, n: int, dtype: str, products: str, sums: str, workers: int):
    """Return the code of a step's parts, the tasks of its Gram and what is in their parts; and its memory's size."""
    itemsize = DTYPES[dtype].itemsize
    passes = (gram.plain_pass(m, dtype, products),)
    *of_gram, memory = gram.plan(passes, m, n, itemsize, 0, blocks(n), workers)
    codes = combine.kernels(m, n * itemsize, dtype, sums), decision_code(), eigensolver(m)
    return (*of_gram, gram.positions(m), *codes), max(memory, combine.memory_size(m, workers))


@jit
def _step_on_threads(
    pool, workers, memory, tasks, passes, size, scratch, per_thread, positions, combine_codes, decision, solver,
    thetas, grads, out, n, itemsize, eps, guarded, settings, record,
):  # fmt: skip
    m = thetas.size
    gram_on_threads(pool, workers, passes, m, grads, n, itemsize, 0, tasks, size, scratch, per_thread, memory)
    tree.add_up(tasks, address(memory), size)
    products = np.empty((m + 1, m + 1))
    for i in range(m + 1):
        for j in range(m + 1):
            products[i, j] = memory[positions[i, j]] if n > 0 else 0.0
    matrix, projection, norm2, floor = project_gram(products, m, eps)
    none, vectors = np.empty((0, 0)), np.empty((m, m))
    run_decision(
        decision, solver, 0, matrix, projection, norm2, floor, none, 0.0, none, projection, settings, record, vectors
    )
    if record[STATUS] == NOT_CONVERGED or (guarded and record[STATUS] != GO):
        return True
    weights = record[HEADER + m :]
    tau, beta = record[LR], record[LR_REST]
    finite = combine_on_threads(
        pool, workers, combine_codes, thetas, grads, NO_ROW, weights, tau, beta, out, n, itemsize, memory
    )
    record[RESULT] = finite == 0
    return True


@jit
def _step_on_arrays(
    pool, workers, memory, tasks, passes, size, scratch, per_thread, positions, combine_codes, decision, solver,
    thetas, grads, out, eps, guarded, settings, record,
):  # fmt: skip
    m, n, itemsize = thetas.shape[0], thetas.shape[1], thetas.itemsize
    first, second, target = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(1, np.int64)
    target[0] = address(out)
    if not _tabled(thetas, first) or not _tabled(grads, second) or out.strides[0] != itemsize or target[0] % itemsize:
        return False
    end = target[0] + n * itemsize
    if overlaps(target[0], end, first, n * itemsize) or overlaps(target[0], end, second, n * itemsize):
        return False
    return _step_on_threads(
        pool, workers, memory, tasks, passes, size, scratch, per_thread, positions, combine_codes, decision, solver,
        first, second, target, n, itemsize, eps, guarded, settings, record,
    )  # fmt: skip


@jit
def _tabled(rows, table):
    """Fill in the addresses of rows; false if their strides or their alignment are not what `arrays` asks for."""
    for k in range(table.size):
        table[k] = address(rows) + k * rows.strides[0]
    if rows.strides[1] != rows.itemsize or rows.strides[0] < rows.shape[1] * rows.itemsize:
        return False
    return (rows.strides[0] | address(rows)) % rows.itemsize == 0


_PLAN = FLOATS, INTS_2D, INTS, INT, INT, INT, INTS_2D, INTS, INT, INT
_SETTINGS = FLOAT, INT, FLOATS, FLOATS
_run_step = entry(_step_on_threads, INT, INT, *_PLAN, INTS, INTS, INTS, INT, INT, *_SETTINGS)


@cache
def _step_entry(dtype: str):
    rows, row = (types.Array(types.float32 if dtype == "float32" else FLOAT, ndim, "A") for ndim in (2, 1))
    return entry(_step_on_arrays, INT, INT, *_PLAN, rows, rows, row, *_SETTINGS)
