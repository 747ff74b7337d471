"""The fused step on the CPU: gram, decision and combine without a return to Python.

For short vectors the way through Python takes most of the time.
"""

from functools import cache, lru_cache

import numpy as np
from numba import carray, types

from fastnewton.kernels.cpu import threads, tree, workspace
from fastnewton.kernels.cpu.addresses import overlaps
from fastnewton.kernels.cpu.combine import NO_ROW, _combine_kernel, _combine_on_threads
from fastnewton.kernels.cpu.eigen import eigensolver
from fastnewton.kernels.cpu.gram import _gram_kernel, _gram_on_threads, _gram_size, _pieces, _positions, _room
from fastnewton.kernels.cpu.jit import FLOAT, FLOATS, INT, INTS, INTS_2D, entry, jit
from fastnewton.kernels.cpu.memory import pointer_at
from fastnewton.kernels.cpu.spectrum import decision_code, project_gram, run_decision
from fastnewton.kernels.cpu.threads import THREADED_BYTES, address
from fastnewton.kernels.cpu.tree import BLOCK, blocks
from fastnewton.kernels.record import GO, HEADER, LR, LR_REST, RESULT, STATUS


def step(thetas, grads, out, record, settings, *, eps: float, guarded: bool, products: str, sums: str) -> None:
    """Take a step of up to SHORT_LIMIT workers and write its record.

    settings are those of the decision; guarded: only a finite K is acted upon; products and sums are the types in which
    gram and combine compute.
    """
    m, n, itemsize = thetas.m, thetas.n, thetas.itemsize
    helpers = threads.helpers_for(m * n * itemsize >= THREADED_BYTES)
    plan, numbers = _plan(m, n, grads.dtype, products, sums, helpers)
    rows = thetas.table, grads.table, out.table, n, itemsize
    room = workspace.borrowed(numbers)
    if not _run_step(threads.team.words, helpers, room, *plan, *rows, eps, guarded, settings, record):
        raise MemoryError("no memory for the scratch of a kernel")
    workspace.returned(room)


def step_of_arrays(
    thetas, grads, out, record, settings, *, eps: float, guarded: bool, dtype: str, compute: str
) -> bool:
    """Take a step as `step` does, of NumPy arrays of float32 or float64 with n > 0; false unless compiled code found
    their strides and alignment in order."""
    m, n = thetas.shape
    helpers = threads.helpers_for(thetas.nbytes >= THREADED_BYTES)
    plan, numbers = _plan(m, n, dtype, compute, compute, helpers)
    room = workspace.borrowed(numbers)
    run = _step_entry(dtype)
    taken = run(threads.team.words, helpers, room, *plan, thetas, grads, out, eps, guarded, settings, record)
    workspace.returned(room)
    return bool(taken)


@lru_cache(maxsize=256)
def _plan(m: int, n: int, dtype: str, products: str, sums: str, helpers: int):
    """Return the code of a step's parts, its pieces of work and what is in their parts; and its workspace's size."""
    codes = _gram_kernel(m, dtype, products, False), _combine_kernel(m, dtype, sums, "mean")
    size = _gram_size(m, False)
    places = _pieces(0, blocks(n), blocks(n), helpers, size)
    codes = *codes, decision_code(), eigensolver(m)
    return (*codes, places, _positions(m, False), size), _room(len(places), size, m, blocks(n), helpers)


@jit
def _step_on_threads(
    team, helpers, room, gram_code, combine_code, decision, solver, places, positions, size, thetas, grads, out, n,
    itemsize, eps, guarded, settings, record,
):  # fmt: skip
    m = thetas.size
    if not _gram_on_threads(team, helpers, gram_code, m, grads, n, places, (n + BLOCK - 1) // BLOCK, size, room):
        return False
    parts = carray(pointer_at(address(room)), (len(places), size), np.float64)
    values, products = tree.add_up(places, parts), np.empty((m + 1, m + 1))
    for i in range(m + 1):
        for j in range(m + 1):
            products[i, j] = values[positions[i, j]]
    matrix, projection, norm2, floor = project_gram(products, m, eps)
    none, vectors = np.empty((0, 0)), np.empty((m, m))
    run_decision(
        decision, solver, 0, matrix, projection, norm2, floor, none, 0.0, none, projection, settings, record, vectors
    )
    if guarded and record[STATUS] != GO:
        return True
    weights = record[HEADER + m :]
    verdict = _combine_on_threads(
        team, helpers, combine_code, thetas, grads, NO_ROW, weights, record[LR], record[LR_REST], out, n, itemsize
    )
    record[RESULT] = verdict == 0
    return verdict >= 0


@jit
def _step_on_arrays(
    team, helpers, room, gram_code, combine_code, decision, solver, places, positions, size, thetas, grads, out,
    eps, guarded, settings, record,
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
        team, helpers, room, gram_code, combine_code, decision, solver, places, positions, size, first, second, target,
        n, itemsize, eps, guarded, settings, record,
    )  # fmt: skip


@jit
def _tabled(rows, table):
    """Fill in the addresses of rows; false if their strides or their alignment are not what `arrays` asks for."""
    for k in range(table.size):
        table[k] = address(rows) + k * rows.strides[0]
    if rows.strides[1] != rows.itemsize or rows.strides[0] < rows.shape[1] * rows.itemsize:
        return False
    return (rows.strides[0] | address(rows)) % rows.itemsize == 0


_PLAN = FLOATS, INT, INT, INT, INT, INTS_2D, INTS_2D, INT
_SETTINGS = FLOAT, INT, FLOATS, FLOATS
_run_step = entry(_step_on_threads, INTS, INT, *_PLAN, INTS, INTS, INTS, INT, INT, *_SETTINGS)


@cache
def _step_entry(dtype: str):
    rows, row = (types.Array(types.float32 if dtype == "float32" else FLOAT, ndim, "A") for ndim in (2, 1))
    return entry(_step_on_arrays, INTS, INT, *_PLAN, rows, rows, row, *_SETTINGS)
