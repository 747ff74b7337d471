"""gram: K, b and the norms, from centred rows.

Formula      K_ij = Σ_c x_i(c)·x_j(c), b_i = Σ_c x_i(c)·z(c), Σ ḡ², Σ z², with x_i = g_i − ḡ and z = ḡ unless given;
             with thetas (for `lr_cap`) also those of t_i = θ_i − θ̄, in float64: the smallest directions of Θ drown in
             the rounding of float32 products; joint: all products of t_i, θ̄, x_i and ḡ, in float64.
Shapes       rows: m vectors of length n, as a table of addresses, so that strided arrays and separate vectors are the
             same thing; z: a vector of length n; parts: (subtrees of blocks, products) float64.
Traffic      reads m·n·itemsize bytes once (and z), with thetas or joint 2m·n·itemsize.
Rounding     the mean and the centred values stay in registers, or in L1; a float32 lane takes at most 256 terms, lanes
             are added pairwise, and from there on sums are float64.
Determinism  a block's strips are added in turn, then blocks in the order of `tree.py`: the same bits for any number of
             threads or ranks.
Launch       tasks are subtrees of blocks; the threads take them from a shared counter.  A block is centred and
             multiplied strip by strip, a strip being what stays in L1 and L2 while its products are formed.
"""

import itertools
import math
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu import threads, tree
from fastnewton.kernels.cpu.jit import FLOATS, INT, INTS, INTS_2D, address, call, code_address, entry, jit
from fastnewton.kernels.cpu.memory import copy, copy_rows, fetch_and_add, integers, stack_memory
from fastnewton.kernels.cpu.simd import CACHE_LINE, REGISTERS, VECTOR_BYTES, Constant, kernel
from fastnewton.kernels.cpu.threads import TASKS_PER_THREAD, THREADED_BYTES, THREADED_FLOPS
from fastnewton.kernels.cpu.tree import BLOCK

STRIP = 256  # coordinates of a block whose rows stay in L1 and L2 while their products are formed
UNROLLED = 16  # up to this many workers, straight-line code for exactly m rows; above, square tiles of products
TILE = 5 if REGISTERS == 32 else 3  # TILE² sums, the chains that hide an addition's latency, and TILE + 1 rows
ON_DIAGONAL = TILE * (TILE + 3) // 2  # products of TILE rows with each other and with one more row
ROWS_PER_MEAN_PASS = 8  # rows that are added to the mean at once
COMPUTE_BOUND_ROWS = 16  # rows per byte of a value above which the Gram is compute-bound, and strips are twice as long
ROW_PADDING = 64  # bytes between rows of the longest centred strip: avoids L1 set conflicts
PREFETCH_SHIFT = 8  # fixed-point bits of the bytes that are prefetched per step
PARTS_BYTES = 1 << 26  # of the parts of all tasks, which grow with m²


class RawGram(NamedTuple):
    """Sums over coordinates of products of centred rows, not yet projected by C."""

    m: int
    products: np.ndarray  # of m rows, then their mean, then z if it is another
    of_thetas: np.ndarray | None = None  # of the rows of thetas, then their mean
    cross: np.ndarray | None = None  # of the rows of thetas with those of grads and, last, ḡ


class Pass(NamedTuple):
    """One kernel's share of a block: its code, the first row that it reads, and the numbers in its part."""

    code: int
    first_row: int
    size: int


# -- from Python ----------------------------------------------------------------------------------------------


def layout() -> tuple[int, int, int]:
    """Return what ranks must agree on for their parts to be added."""
    return BLOCK, TILE, VECTOR_BYTES


def gram(grads, z=None, thetas=None, *, compute: str) -> RawGram:
    """Form K, b and the norms over all coordinates.

    grads, thetas and z are Rows of one dtype, z one row; compute is "float32" or "float64", the type in which products
    of gradients are formed.
    """
    values = _total((plain_pass(grads.m, grads.dtype, compute, z is not None),), grads, z)
    if thetas is not None:  # in turn: two streams of rows at once would be slower
        values = np.append(values, _total((plain_pass(grads.m, grads.dtype, "float64"),), thetas))
    return unpack(values, grads.m, with_z=z is not None, with_thetas=thetas is not None)


def joint_gram(thetas, grads) -> RawGram:
    """Form all products of Θ, θ̄, G and ḡ over all coordinates."""
    return unpack_joint(_total((_joint_pass(grads),), thetas, grads), grads.m)


def gram_with_thetas(thetas, grads, z=None, *, compute: str) -> RawGram:
    """Form `gram` of the gradients, bit by bit, and the other products of `joint_gram`, in one pass."""
    plain = plain_pass(grads.m, grads.dtype, compute, z is not None, first_row=grads.m)
    values = _total((plain, _joint_pass(grads)), thetas, grads, z)
    raw = unpack(values, grads.m, with_z=z is not None)
    return unpack_joint(values[plain.size :], grads.m)._replace(products=raw.products)


def gram_parts(grads, thetas=None, *, compute: str, first: int, blocks: int) -> np.ndarray:
    """Form the parts of `gram` of Rows that begin at block `first` of so many, as the maximal subtrees of their run."""
    parts = _parts((plain_pass(grads.m, grads.dtype, compute),), (grads,), first, blocks)
    if thetas is None:
        return parts
    return np.hstack([parts, _parts((plain_pass(grads.m, grads.dtype, "float64"),), (thetas,), first, blocks)])


def joint_parts(thetas, grads, *, first: int, blocks: int) -> np.ndarray:
    """Form the parts of `joint_gram`, as `gram_parts`."""
    return _parts((_joint_pass(grads),), (thetas, grads), first, blocks)


def _joint_pass(grads) -> Pass:
    return Pass(_tiled_block.address(grads.dtype, "float64", 1, 0), 0, joint_size(grads.m))


def plain_pass(m: int, storage: str, compute: str, with_z: bool = False, *, first_row: int = 0) -> Pass:
    """Return the pass of exactly m rows up to UNROLLED, of any number of them above; z is the row after them."""
    if m <= UNROLLED:
        code = _unrolled_block.address(storage, compute, m, int(with_z))
    else:
        code = _tiled_block.address(storage, compute, 0, int(with_z))
    return Pass(code, first_row, _size(m, with_z))


def _total(passes: tuple[Pass, ...], *matrices) -> np.ndarray:
    """Form the one part of all blocks, zeros where there is none; `matrices` are the Rows that the passes read."""
    parts = _parts(passes, matrices, 0, tree.blocks(matrices[0].n))
    return parts[0] if len(parts) else np.zeros(parts.shape[1])


def _parts(passes: tuple[Pass, ...], matrices, first: int, blocks: int) -> np.ndarray:
    """Form the parts of the maximal subtrees of a run of blocks."""
    m, n, itemsize = matrices[0].m, matrices[0].n, matrices[0].itemsize
    tables = [rows.table for rows in matrices if rows is not None]
    table = np.concatenate(tables) if len(tables) > 1 else tables[0]
    workers = threads.workers_for(m * n * itemsize >= THREADED_BYTES or m * m * n >= THREADED_FLOPS)
    tasks, passes, *sizes, memory = plan(passes, len(table), n, itemsize, first, blocks, workers)
    memory = np.empty(memory)
    _run_gram(threads.pool.address, workers, passes, m, table, n, itemsize, first, tasks, *sizes, memory)
    parts = memory[: len(tasks) * sizes[0]].reshape(len(tasks), sizes[0])
    return tree.merge(tasks, parts, first, first + tree.blocks(n), blocks)


@lru_cache(maxsize=256)
def plan(passes: tuple[Pass, ...], rows: int, n: int, itemsize: int, first: int, blocks: int, workers: int) -> tuple:
    """Return the tasks, the passes and the sizes of a part and a thread's memory, for `gram_on_threads`; and the
    float64 numbers that its memory must hold."""
    size, count = sum(each.size for each in passes), tree.blocks(n)
    tasks = _tasks(first, first + count, blocks, workers, size)
    unrolled = (UNROLLED + 2) * STRIP * 8 + (len(_pairs(UNROLLED, True)) + 1) * VECTOR_BYTES
    tiled = (rows + 2 * TILE) * _row_bytes("float64")  # whole tiles, and two means
    scratch = -(-max(unrolled, tiled) // CACHE_LINE) * CACHE_LINE
    per_thread = scratch + 8 * size * (count.bit_length() + 1)
    per_thread += -per_thread % CACHE_LINE
    tail = rows * (8 + BLOCK * itemsize)
    memory = len(tasks) * size + ((workers + 1) * per_thread + tail + CACHE_LINE) // 8
    codes = np.array([code_address(_add_blocks, INT), *itertools.chain(*passes)])
    return tasks, codes, size, scratch, per_thread, memory


@lru_cache(maxsize=256)
def _tasks(first: int, last: int, blocks: int, workers: int, size: int) -> np.ndarray:
    """Return the tasks, as subtrees of the tree over all blocks: one for one thread, several for each of more."""
    level = (last - first).bit_length()
    if workers:
        level = max(0, ((last - first) // (TASKS_PER_THREAD * (workers + 1))).bit_length() - 1)
    level = max(level, ((last - first) * size * 8 // PARTS_BYTES).bit_length())  # so that the parts of all tasks fit
    return np.array(tree.subtrees(first, last, blocks, level), np.int64).reshape(-1, 2)


# -- where products stand in a part -----------------------------------------------------------------------------


def unpack(values: np.ndarray, m: int, *, with_z: bool = False, with_thetas: bool = False) -> RawGram:
    """Return the products of `gram`, from the part of all blocks."""
    raw = RawGram(m, values[positions(m, with_z)])
    return raw._replace(of_thetas=values[_size(m, with_z) :][positions(m)]) if with_thetas else raw


def unpack_joint(values: np.ndarray, m: int) -> RawGram:
    """Return the products of `joint_gram`, from the part of all blocks."""
    every = values[positions(m, joint=True)]
    return RawGram(m, every[m + 1 :, m + 1 :], every[: m + 1, : m + 1], every[:m, m + 1 :])


def part_size(m: int, *, with_thetas: bool) -> int:
    """Count the numbers in one part of `gram_parts`."""
    return (1 + with_thetas) * _size(m)


def joint_size(m: int) -> int:
    """Count the numbers in one part of `joint_parts`."""
    return _size(m, joint=True)


def _size(m: int, with_z: bool = False, joint: bool = False) -> int:
    if m <= UNROLLED and not joint:
        return len(_pairs(m, with_z))
    panels = (1 + joint) * _tiles(m)
    return ON_DIAGONAL * panels + TILE * TILE * math.comb(panels, 2) + 1 + (with_z or joint)


def _tiles(rows: int) -> int:
    return -(-rows // TILE)


@cache
def _pairs(m: int, with_z: bool) -> list[tuple[int, int]]:
    """Return the products that straight-line code forms; row m is the mean, row m + 1 is z."""
    last = m + with_z
    within = [(i, j) for i in range(m) for j in range(i, m)]
    return within + [(i, last) for i in range(m)] + [(m, m)] + ([(last, last)] if with_z else [])


@lru_cache(maxsize=64)
def positions(m: int, with_z: bool = False, joint: bool = False) -> np.ndarray:
    """Return where the product of rows i and j stands in a part, 0 for those not formed, of a mean beside another last
    row: rows, their mean, then z; joint: the rows of Θ, θ̄, the rows of G, ḡ."""
    height = (1 + joint) * (m + 1) + with_z
    places, last = np.zeros((height, height), np.intp), height - 1
    if m <= UNROLLED and not joint:
        i, j = np.transpose(_pairs(m, with_z))
        places[i, j] = np.arange(i.size)
        return np.maximum(places, places.T)
    # Row k of a stack is row x of a panel of TILE rows; a panel's own products come first, then those of two panels.
    panels = (1 + joint) * _tiles(m)
    within, pairs = np.zeros((TILE, TILE + 1), np.intp), np.zeros((panels, panels), np.intp)
    within[np.triu_indices(TILE, 0, TILE + 1)] = np.arange(ON_DIAGONAL)
    pairs[np.triu_indices(panels, 1)] = ON_DIAGONAL * panels + TILE * TILE * np.arange(math.comb(panels, 2))
    rows = np.r_[:m, m + 1 : 2 * m + 1] if joint else np.arange(m)
    panel, x = np.divmod(np.tile(np.arange(m), 1 + joint), TILE)
    panel += np.repeat(np.arange(1 + joint), m) * _tiles(m)
    i, j = panel[:, None], panel
    inside = np.where(i == j, ON_DIAGONAL * i + within[x[:, None], x], pairs[i, j] + TILE * x[:, None] + x)
    places[np.ix_(rows, rows)], places[rows, last] = np.triu(inside), ON_DIAGONAL * panel + within[x, TILE]
    places[[m, last], [m, last]] = _size(m, with_z, joint) - 1 - (with_z or joint), _size(m, with_z, joint) - 1
    return np.maximum(places, places.T)


# -- over all blocks, compiled once -----------------------------------------------------------------------------

# The argument block.  A pass is three numbers, as in `Pass`; a thread's memory is scratch and then a stack of parts.
(
    M, TABLE, ROWS, N, ITEM_BYTES, FIRST, TASKS, TASK_COUNT, PASSES, PASS_COUNT, SIZE, PARTS,
    THREADS_MEMORY, PER_THREAD, SCRATCH_BYTES, TAIL, NEXT_TASK, THREADS_COME, ARGUMENTS,
) = range(19)  # fmt: skip


@jit
def gram_on_threads(
    pool, workers, passes, m, table, n, itemsize, first, tasks, size, scratch, per_thread, memory
):  # fmt: skip
    """Run the passes over all tasks, whose parts come first in `memory`; passes[0] is the code of `_add_blocks`."""
    where = stack_memory(ARGUMENTS)
    block = integers(where)
    block[M], block[TABLE], block[ROWS], block[N] = m, address(table), table.size, n
    block[ITEM_BYTES], block[FIRST] = itemsize, first
    block[TASKS], block[TASK_COUNT] = address(tasks), tasks.shape[0]
    block[PASSES], block[PASS_COUNT] = address(passes) + 8, passes.size // 3
    block[SIZE], block[PARTS] = size, address(memory)
    block[THREADS_MEMORY] = (address(memory) + 8 * size * tasks.shape[0] + 63) & ~63
    block[PER_THREAD], block[SCRATCH_BYTES] = per_thread, scratch
    block[TAIL] = block[THREADS_MEMORY] + (workers + 1) * per_thread
    block[NEXT_TASK], block[THREADS_COME] = 0, 0
    threads.run(pool, workers, passes[0], where, ARGUMENTS)


@jit
def _add_blocks(where):
    """Add up the parts of blocks, task by task, in a binary counter whose digits are complete subtrees."""
    block = integers(where)
    m, table, n, itemsize, size = block[M], block[TABLE], block[N], block[ITEM_BYTES], block[SIZE]
    scratch = block[THREADS_MEMORY] + fetch_and_add(where + 8 * THREADS_COME, 1) * block[PER_THREAD]
    stack, blocks = scratch + block[SCRATCH_BYTES], (n + BLOCK - 1) // BLOCK
    tasks, passes, count = integers(block[TASKS]), integers(block[PASSES]), block[PASS_COUNT]
    task = fetch_and_add(where + 8 * NEXT_TASK, 1)
    while task < block[TASK_COUNT]:
        first, top = tasks[2 * task] - block[FIRST], stack
        for k in range(first, min(first + (1 << tasks[2 * task + 1]), blocks)):
            rows, offset, strips = table, k * BLOCK, BLOCK // STRIP
            if n - offset < BLOCK:  # padded with zeros to whole strips
                rows, strips = block[TAIL], (n - offset + STRIP - 1) // STRIP
                length, stride = (n - offset) * itemsize, strips * STRIP * itemsize
                copy_rows(table, rows, block[ROWS], offset * itemsize, length, stride, rows + 8 * block[ROWS])
                offset = 0
            part = top
            for index in range(0, 3 * count, 3):
                call(passes[index], m, rows + 8 * passes[index + 1], offset, strips, scratch, part)
                part += 8 * passes[index + 2]
            top += 8 * size
            digit = k - first
            while digit & 1:
                top -= 8 * size
                tree.add_to(top - 8 * size, top, size)
                digit >>= 1
        while top > stack + 8 * size:
            top -= 8 * size
            tree.add_to(top - 8 * size, top, size)
        copy(block[PARTS] + 8 * size * task, stack, 8 * size)
        task = fetch_and_add(where + 8 * NEXT_TASK, 1)


_run_gram = entry(gram_on_threads, INT, INT, INTS, INT, INTS, INT, INT, INT, INTS_2D, INT, INT, INT, FLOATS)


# -- one block, compiled for each kind of rows --------------------------------------------------------------------


def _row_bytes(compute: str) -> int:
    """Return the bytes from one row of a centred strip to the next."""
    return 2 * STRIP * DTYPES[compute].itemsize + ROW_PADDING


@kernel
def _unrolled_block(v, m: Constant, with_z: Constant, _m, table, offset, strips, scratch, sums):
    """Form all products of exactly m rows: values, mean and as many sums as fit stay in registers.

    What does not fit is summed in further rounds over the strip, from a centred copy in L1.
    """
    pairs, height = _pairs(m, with_z), m + 1 + with_z
    rounds = _rounds(pairs, height)
    rows, centred = v.rows(table, 0, m + with_z, offset), v.scratch(scratch)
    totals = v.scratch(scratch + height * STRIP * DTYPES[v.compute].itemsize)
    place = {pair: k for k, pair in enumerate(pairs)}
    for k in place.values():
        totals[k] = v.constant(0.0)
    for strip in v.range(strips):
        here = [row.moved(strip * STRIP) for row in rows]
        for number, members in enumerate(rounds):
            total = v.sums({pair: totals[place[pair]] for pair in members})
            for c in v.range(STRIP // v.lanes):
                copy = centred.moved(c * (height * v.lanes))
                if number == 0:
                    x = _centre(v, [row[c] for row in here], m)
                    for k in range(height) if len(rounds) > 1 else ():
                        copy[k] = x[k]
                else:
                    x = {k: copy[k] for k in sorted({k for pair in members for k in pair})}
                for row in here[number :: len(rounds)]:
                    v.prefetch(row.at(c) + BLOCK * row.itemsize)
                for i, j in members:
                    total[i, j] += x[i] * x[j]
            for pair in members:
                totals[place[pair]] = total[pair]
    v.store_lane_sums([totals[k] for k in place.values()], sums)


def _centre(v, values, m: int) -> list:
    """Return x_1 … x_m, their mean, and the other values."""
    mean = v.pairwise_sum(values[:m]) * v.constant(1 / m)
    return [value - mean for value in values[:m]] + [mean] + values[m:]


def _rounds(pairs: list[tuple[int, int]], rows: int) -> list[list[tuple[int, int]]]:
    """Share out the pairs over rounds whose sums fit the registers: the first beside all rows and a spare."""
    spare = 1
    if len(pairs) + rows + spare <= REGISTERS + 2:
        return [pairs]
    waiting = sorted(pairs, key=lambda pair: (pair[0] // TILE, pair[1] // TILE, pair))
    first = max(0, REGISTERS + 1 - rows - spare)
    rounds, waiting, members = [waiting[:first]], waiting[first:], []
    for pair in waiting:
        used = {k for other in (*members, pair) for k in other}
        if members and len(members) + 1 + len(used) > REGISTERS + 1:
            rounds.append(members)
            members = []
        members.append(pair)
    return [*rounds, members]


@kernel
def _tiled_block(v, joint: Constant, with_z: Constant, m, table, offset, strips, scratch, sums):
    """Form all products of one stack of m rows, or of two: within panels of TILE rows, then of pairs of panels."""
    size, pitch, stacks = DTYPES[v.storage].itemsize, _row_bytes(v.compute), 1 + joint
    side = (m + (TILE - 1)) // TILE
    count = side * stacks
    tiles = (count * (count + 1)) >> 1
    off_diagonal = sums + count * (8 * ON_DIAGONAL)
    norms, panels = off_diagonal + (tiles - count) * (8 * TILE * TILE), scratch + 2 * pitch
    v.clear(sums, norms + 8 * (1 + (joint or with_z)) - sums)

    longer = v.select(m > COMPUTE_BOUND_ROWS * size, 1, 0)
    length, end = STRIP << longer, offset + strips * STRIP
    for strip in v.range((strips + longer) >> longer):
        start = offset + strip * length
        steps = v.minimum(length, end - start) // v.lanes
        ahead = _Prefetch(v, table, start + length, longer, steps, m * stacks, tiles)
        last = _mean(v, m, table, 0, start, steps, scratch, norms)
        if joint or with_z:
            last = _mean(v, m if joint else 1, table, m, start, steps, scratch + pitch, norms + 8)
        for i in v.range(count):
            stack = i // side
            rows, first = table + m * stack * 8, (i - stack * side) * TILE
            mean, panel = v.scratch(scratch + stack * pitch), panels + i * (TILE * pitch)
            _diagonal_tile(v, m, rows, first, start, steps, mean, last, panel, ahead, i, sums + i * (8 * ON_DIAGONAL))
        for i in v.range(count):
            before = (i * (2 * count - i - 3) >> 1) - 1  # tiles above row i, and left of its first column
            for j in v.range(i + 1, count):
                left, right = panels + i * (TILE * pitch), panels + j * (TILE * pitch)
                tile = before + j
                _tile(v, left, right, steps, ahead, tile + count, off_diagonal + tile * (8 * TILE * TILE))


class _Prefetch:
    """Prefetches the next strip: its rows laid end to end, `rate` bytes per step in fixed point.

    Evenly over all tiles: the few buffers for lines on their way from memory are full otherwise, and loads wait.  With
    fewer tiles than rows some lines are left to the hardware.
    """

    def __init__(self, v, table, offset, longer, steps, rows, tiles):
        self._v, self._table, self._offset, self._steps = v, table, offset, steps
        self._log_bytes = longer + (STRIP * DTYPES[v.storage].itemsize).bit_length() - 1
        self._rate = rows * (v.stride << PREFETCH_SHIFT) // tiles

    def step(self, tile, c) -> None:
        """Prefetch what is due at step c of the tile with that number."""
        v = self._v
        position = ((tile * self._steps) * self._rate + c * self._rate) >> PREFETCH_SHIFT
        row = position >> self._log_bytes
        (ahead,) = v.rows(self._table, row, 1, self._offset)
        v.prefetch(ahead.address + (position - (row << self._log_bytes)))


def _mean(v, m, table, first, offset, steps, where, norm2):
    """Write the mean of m rows from `first` on to scratch, and add its norm squared to norm2; return it."""
    mean = v.scratch(where)

    def add(count: int, k) -> None:
        rows = v.rows(table, first + k, count, offset)
        for c in v.range(steps):
            total = v.pairwise_sum([row[c] for row in rows])
            mean[c] = v.select(k < 1, v.constant(0.0), mean[c]) + total

    whole = v.integer(m) // ROWS_PER_MEAN_PASS
    for k in v.range(whole):
        add(ROWS_PER_MEAN_PASS, k * ROWS_PER_MEAN_PASS)
    for k in v.range(whole * ROWS_PER_MEAN_PASS, m):
        add(1, k)
    inverse, total = v.reciprocal(m), v.sums([0])
    for c in v.range(steps):
        x = mean[c] * inverse
        mean[c] = x
        total[0] += x * x
    v.add_lane_sums(total.values(), norm2)
    return mean


def _diagonal_tile(v, m, rows, first, offset, steps, mean, last, panel, ahead, tile, sums):
    """Centre TILE rows into scratch; add their products with each other and with the `last` row, row after row.

    Rows beyond the m-th repeat it: nobody reads what comes of them.
    """
    final, pitch = m - 1, _row_bytes(v.compute)
    starts = [v.rows(rows, v.minimum(first + k, final), 1, offset)[0] for k in range(TILE)]
    centred = [v.scratch(panel + k * pitch) for k in range(TILE)]
    total = v.sums((i, j) for i in range(TILE) for j in range(i, TILE + 1))
    for c in v.range(steps):
        centre, one_more = mean[c], last[c]
        x = [row[c] - centre for row in starts]
        for row, value in zip(centred, x, strict=True):
            v.prefetch(row.at(c) + 2 * VECTOR_BYTES, to_write=True)
            row[c] = value
        ahead.step(tile, c)
        x.append(one_more)
        for i, j in total:
            total[i, j] += x[i] * x[j]
    v.add_lane_sums(total.values(), sums)


def _tile(v, left, right, steps, ahead, tile, sums):
    """Add the TILE² products of two panels of centred rows."""
    pitch = _row_bytes(v.compute)
    rows, columns = ([v.scratch(side + k * pitch) for k in range(TILE)] for side in (left, right))
    total = v.sums((i, j) for i in range(TILE) for j in range(TILE))
    for c in v.range(steps):
        x, y = [row[c] for row in rows], [row[c] for row in columns]
        ahead.step(tile, c)
        for i, j in total:
            total[i, j] += x[i] * y[j]
    v.add_lane_sums(total.values(), sums)
