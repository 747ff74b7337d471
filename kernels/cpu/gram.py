"""The Gram pass on the CPU: K, b and the norms, from centred rows.

Coordinates are walked in blocks of BLOCK.  A strip of a block is centred and multiplied while it is in the cache; each
block gives one float64 part, and the parts are added in the tree of `tree.py`.  Vectors are written out by `simd.py`;
what is compiled for exactly m rows, one dtype and one precision is cached on disk.  Rows are given as tables of
addresses, so that strided arrays and separate vectors are the same thing.
"""

import math
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu import threads, tree, workspace
from fastnewton.kernels.cpu.jit import FLOATS, INT, INTS, INTS_2D, entry, jit, kernel
from fastnewton.kernels.cpu.memory import clear_bytes, copy_rows, itemsize_of, pointer_at
from fastnewton.kernels.cpu.simd import CACHE_LINE, REGISTERS, VECTOR_BYTES, Vectors, lanes
from fastnewton.kernels.cpu.threads import PIECES_PER_THREAD, THREADED_BYTES, THREADED_FLOPS, add, address, keep
from fastnewton.kernels.cpu.tree import BLOCK, blocks

LOG_STRIP = 8
STRIP = 1 << LOG_STRIP  # coordinates of a block whose rows stay in a near cache while the pairs are gone through
STRAIGHT = 16  # up to this many workers, straight-line code for exactly m rows; above, square tiles of pairs
TILE = 5 if REGISTERS == 32 else 3  # TILE² sums, the chains that hide an addition's latency, and TILE + 1 rows
ON_DIAGONAL = TILE * (TILE + 3) // 2  # products of TILE rows with each other and with one more row
GATHERED = 8  # rows that are added to the mean per round
PACE = 8  # binary places of the bytes that are fetched per step
DENSE = 16  # workers per byte of a value beyond which memory is not the limit, and strips are twice as long
ROW_GAP = 64  # bytes between rows of the longest centred strip, or they would all fall into one set of the cache
PARTS_BYTES = 1 << 26  # of the parts of all pieces, which grow with m²


class RawGram(NamedTuple):
    """Sums over coordinates of products of centred rows, not yet projected by C."""

    m: int
    products: np.ndarray  # of m rows, then their mean, then z if it is another
    of_thetas: np.ndarray | None = None  # of the rows of thetas, then their mean
    cross: np.ndarray | None = None  # of the rows of thetas with those of grads and, last, ḡ


def layout() -> tuple[int, int, int]:
    """What ranks must agree on for their parts to be added."""
    return BLOCK, TILE, VECTOR_BYTES


# K = GᵀG (m, m), b = Gᵀz (m,), zᵀz and ‖ḡ‖², where z is ḡ unless given; with thetas also ΘᵀΘ and ‖θ̄‖², in float64
# because the smallest directions of Θ drown in the rounding of float32 products.
# Bytes: m·n·itemsize, twice that with thetas.  Flops: m(m+1)n + 2mn, twice that with thetas.
# The joint Gram has all products of Θ, θ̄, G and ḡ, in float64.  Bytes: 2m·n·itemsize.  Flops: (2m+2)(2m+3)n.
# Bits: a float32 lane takes at most 256 terms, lanes are added pairwise, and from there on all is float64, a block's
# strips in turn, then blocks in the order of the tree: the same for any number of threads or ranks.


def gram(grads, z=None, thetas=None, *, compute: str) -> RawGram:
    """K, b and the norms over all coordinates; arguments as in `gram_parts`."""
    parts = _parts_of_gram(grads, z, thetas, compute, 0, blocks(grads.n))
    return unpacked(_of_all(parts), grads.m, with_z=z is not None, with_thetas=thetas is not None)


def joint_gram(thetas, grads) -> RawGram:
    """All products of Θ, θ̄, G and ḡ over all coordinates."""
    return unpacked_joint(_of_all(joint_parts(thetas, grads, first=0, last=blocks(grads.n))), grads.m)


def joint_parts(thetas, grads, *, first: int, last: int) -> np.ndarray:
    """As `gram_parts`, of the joint Gram."""
    table = np.concatenate([thetas.table, grads.table])
    passes = [(_gram_kernel_of("joint", grads.dtype), table, joint_size(grads.m))]
    return _over_blocks(passes, grads.m, grads.n, grads.itemsize, first, last)


def gram_parts(grads, thetas=None, *, compute: str, first: int, last: int) -> np.ndarray:
    """The parts of blocks first … last−1, as the maximal subtrees of that run; without z.

    grads and thetas are Rows of one shape and dtype; compute is "float32" or "float64", the type in which products of
    gradients are formed.
    """
    return _parts_of_gram(grads, None, thetas, compute, first, last)


def _parts_of_gram(grads, z, thetas, compute: str, first: int, last: int):
    m = grads.m
    with_z, with_thetas = z is not None, thetas is not None
    table = np.concatenate([grads.table, z.table]) if with_z else grads.table
    passes = [(_gram_kernel(m, grads.dtype, compute, with_z), table, _gram_size(m, with_z))]
    if with_thetas:
        passes.append((_gram_kernel(m, grads.dtype, "float64", False), thetas.table, _gram_size(m, False)))
    return _over_blocks(passes, m, grads.n, grads.itemsize, first, last)


def _over_blocks(passes, m: int, n: int, itemsize: int, first: int, last: int) -> np.ndarray:
    """The parts of the maximal subtrees of a run of blocks; a pass is a kernel, its table of rows, and the numbers in
    its parts."""
    helpers = threads.helpers_for(m * n * itemsize >= THREADED_BYTES or m * m * n >= THREADED_FLOPS)
    places = _pieces(first, last, blocks(n), helpers, sum(size for *_, size in passes))
    words, found = threads.team.words, []
    for code, table, size in passes:
        room = workspace.borrowed(_room(len(places), size, table.size, last, helpers))
        if not _run_gram(words, helpers, code, m, table, n, places, last, size, room):
            raise MemoryError("no memory for the scratch of a kernel")
        found.append(tree.merged(places, _sums(places, size, room), first, last, blocks(n)))
        workspace.returned(room)
    return found[0] if len(found) == 1 else np.hstack(found)


def _of_all(parts: np.ndarray) -> np.ndarray:
    """The one part of all blocks; zeros where there are no blocks."""
    return parts[0] if len(parts) else np.zeros(parts.shape[1])


def _room(pieces: int, size: int, rows: int, last: int, helpers: int) -> int:
    """Numbers that `_gram_on_threads` needs room for: the parts of all pieces, and each thread's own."""
    straight = (STRAIGHT + 2) * STRIP * 8 + (len(_pairs(STRAIGHT, True)) + 1) * VECTOR_BYTES
    tiled = (rows + 2 * TILE) * _row_bytes("float64")  # whole tiles, and two means
    work = max(straight, tiled) + CACHE_LINE
    return pieces * size + (helpers + 1) * (work // 8 + (last.bit_length() + 1) * size)


@lru_cache(maxsize=256)
def _pieces(first: int, last: int, count: int, helpers: int, numbers: int) -> np.ndarray:
    """Pieces of work, as subtrees of the tree over all blocks: one of them for one thread, several for each of more."""
    level = (last - first).bit_length()
    if helpers:
        level = max(0, ((last - first) // (PIECES_PER_THREAD * (helpers + 1))).bit_length() - 1)
    pieces = tree.subtrees(first, last, count, max(level, _level_that_fits(numbers, last - first)))
    return np.array(pieces, np.int64).reshape(-1, 2)


def unpacked(values: np.ndarray, m: int, *, with_z: bool, with_thetas: bool) -> RawGram:
    """K, b and the norms, from the part of all blocks."""
    size = _gram_size(m, with_z)
    raw = RawGram(m, _unpacked(values[:size], m, with_z))
    if not with_thetas:
        return raw
    return raw._replace(of_thetas=_unpacked(values[size:], m, False))


def unpacked_joint(values: np.ndarray, m: int) -> RawGram:
    """As `unpacked`, of the joint Gram."""
    every = values[_joint_positions(m)]
    return RawGram(m, every[m + 1 :, m + 1 :], every[: m + 1, : m + 1], every[:m, m + 1 :])


def row_products(grads, row, reference) -> tuple[np.ndarray, float]:
    """(g_i − r)ᵀ(g − r) for every row g_i, and (g − r)ᵀr, for Rows g and r of one row, in float64.

    Bytes: (m + 2)·n·itemsize.  Flops: 3mn.  The same bits for any number of threads.
    """
    table = np.concatenate([grads.table, row.table, reference.table])
    passes = [(_gram_kernel_of("row", grads.dtype), table, grads.m + 1)]
    values = _of_all(_over_blocks(passes, grads.m, grads.n, grads.itemsize, 0, blocks(grads.n)))
    return values[:-1], float(values[-1])


def part_size(m: int, *, with_z: bool, with_thetas: bool) -> int:
    """Numbers in one part."""
    return _gram_size(m, with_z) + with_thetas * _gram_size(m, False)


def joint_size(m: int) -> int:
    """Numbers in one part of the joint Gram."""
    side = 2 * _tiles(m)
    return ON_DIAGONAL * side + TILE * TILE * math.comb(side, 2) + 2


def _level_that_fits(numbers: int, count: int) -> int:
    """log₂ of the blocks in a piece of work whose part has so many numbers, for the parts of all pieces to fit."""
    return (count * numbers * 8 // PARTS_BYTES).bit_length()


def _tiles(rows: int) -> int:
    return -(-rows // TILE)


@cache
def _pairs(m: int, with_z: bool) -> list[tuple[int, int]]:
    """The products that straight-line code forms; row m is the mean, row m + 1 is z."""
    last = m + with_z
    within = [(i, j) for i in range(m) for j in range(i, m)]
    return within + [(i, last) for i in range(m)] + [(m, m)] + ([(last, last)] if with_z else [])


def _sums(places, size: int, room: np.ndarray) -> np.ndarray:
    """The parts that `_gram_on_threads` has put there."""
    return room[: len(places) * size].reshape(-1, size)


def _gram_size(m: int, with_z: bool) -> int:
    if m <= STRAIGHT:
        return len(_pairs(m, with_z))
    return ON_DIAGONAL * _tiles(m) + TILE * TILE * math.comb(_tiles(m), 2) + 1 + with_z


def _unpacked(values: np.ndarray, m: int, with_z: bool) -> np.ndarray:
    """The symmetric matrix of products, rows of the mean and of z last."""
    return values[_positions(m, with_z)]


@lru_cache(maxsize=64)
def _positions(m: int, with_z: bool) -> np.ndarray:
    """Where the product of rows i and j stands in a part; 0 for those that are not formed, of the mean beside z."""
    found = np.zeros((m + 1 + with_z, m + 1 + with_z), np.intp)
    if m <= STRAIGHT:
        i, j = np.transpose(_pairs(m, with_z))
        found[i, j] = np.arange(i.size)
        return np.maximum(found, found.T)
    last = m + with_z
    found[:m, :m], found[:m, last] = _in_tiles(m, 1)
    found[[m, last], [m, last]] = _gram_size(m, with_z) - 1 - with_z, _gram_size(m, with_z) - 1
    return np.maximum(found, found.T)


@lru_cache(maxsize=8)
def _joint_positions(m: int) -> np.ndarray:
    """As `_positions`, for the rows of Θ, θ̄, the rows of G, ḡ; 0 too for those of θ̄ beside its own norm."""
    found = np.zeros((2 * m + 2, 2 * m + 2), np.intp)
    rows = np.r_[:m, m + 1 : 2 * m + 1]
    found[np.ix_(rows, rows)], found[rows, -1] = _in_tiles(m, 2)
    found[[m, -1], [m, -1]] = joint_size(m) - 2, joint_size(m) - 1
    return np.maximum(found, found.T)


def _in_tiles(m: int, stacks: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the products of the rows of stacks stand, on and above the diagonal, and those with the last row."""
    side = stacks * _tiles(m)
    on_diagonal = np.zeros((TILE, TILE + 1), np.intp)
    on_diagonal[np.triu_indices(TILE, 0, TILE + 1)] = np.arange(ON_DIAGONAL)
    tiles = np.zeros((side, side), np.intp)
    tiles[np.triu_indices(side, 1)] = ON_DIAGONAL * side + TILE * TILE * np.arange(math.comb(side, 2))
    panel, x = np.divmod(np.arange(m), TILE)
    panel, x = np.concatenate([panel + k * _tiles(m) for k in range(stacks)]), np.tile(x, stacks)
    i, j = panel[:, None], panel[None, :]
    inside = np.where(i == j, ON_DIAGONAL * i + on_diagonal[x[:, None], x], tiles[i, j] + TILE * x[:, None] + x)
    return np.triu(inside), ON_DIAGONAL * panel + on_diagonal[x, TILE]


@cache
def _gram_kernel(m: int, storage: str, compute: str, with_z: bool) -> int:
    """Compiled for exactly m rows up to STRAIGHT, for any number of them above."""
    if m <= STRAIGHT:
        return kernel(_gram_run, "straight", m, storage, compute, int(with_z))
    return _tiled_kernel(storage, compute, with_z)


@cache
def _tiled_kernel(storage: str, compute: str, with_z: bool) -> int:
    return kernel(_gram_run, "tiled", 0, storage, compute, int(with_z))


@cache
def _gram_kernel_of(kind: str, storage: str) -> int:
    """Compiled for any number of rows: the "joint" products of two stacks, or those of one "row" with the others."""
    return kernel(_gram_run, kind, 0, storage, "float64", 0)


@jit
def _gram_on_threads(team, helpers, code, m, table, n, places, last, size, room):
    """Run a gram kernel over the pieces, whose parts come first in `room`; false if it failed."""
    counters = np.zeros(2, np.int64)  # pieces taken, threads that have come
    own = address(room) + 8 * len(places) * size
    job = np.empty(12, np.int64)
    job[0], job[1], job[2], job[3], job[4] = m, address(table), table.size, n, last
    job[5], job[6], job[7] = address(places), len(places), address(counters)
    job[8], job[9], job[10], job[11] = address(room), size, own, (address(room) + 8 * room.size - own) // (helpers + 1)
    done = threads.shared(team, code, helpers, job)
    keep(counters)
    return done


_run_gram = entry(_gram_on_threads, INTS, INT, INT, INT, INTS, INT, INTS_2D, INT, INT, FLOATS)


@jit
def _gram_run(job, kind, exactly, storage, compute, with_z):
    """The sums over those pieces, (start, level) of subtrees, that no other thread has taken.

    The blocks' parts are added in a binary counter, whose digits are complete subtrees.
    """
    words = carray(pointer_at(job), (12,), np.int64)
    m, rows, n, last, itemsize = words[0], words[2], words[3], words[4], itemsize_of(storage)
    table, pieces = (
        carray(pointer_at(words[1]), (rows,), np.int64),
        carray(pointer_at(words[5]), (words[6], 2), np.int64),
    )
    size, depth, own = words[9], _digits(last) + 1, words[10] + words[11] * add(words[7] + 8, 1)
    sums, scratch = carray(pointer_at(words[8]), (words[6], size), np.float64), (own + 63) & ~63
    stack = carray(pointer_at(own + words[11] - 8 * depth * size), (depth, size), np.float64)
    padded = np.empty(0, np.uint8)
    index = add(words[7], 1)
    while index < len(pieces):
        first, level = pieces[index]
        height = 0
        for block in range(first, min(first + (1 << level), last)):
            here, offset, length = table, block * BLOCK, n - block * BLOCK
            if length < BLOCK:
                strips = (length + STRIP - 1) // STRIP
                here, padded = np.empty_like(table), np.zeros(rows * strips * STRIP * itemsize, np.uint8)
                copy_rows(table, here, offset * itemsize, length * itemsize, strips * STRIP * itemsize, padded)
                offset, length = 0, strips * STRIP
            strips = min(length, BLOCK) // STRIP
            part = address(stack[height])
            _gram_block(kind, exactly, storage, compute, with_z, m, address(here), offset, strips, scratch, part)
            keep(here)
            keep(padded)
            height += 1
            digit = block - first
            while digit & 1:
                height -= 1
                tree.add_to(stack[height - 1], stack[height])
                digit >>= 1
        while height > 1:
            height -= 1
            tree.add_to(stack[height - 1], stack[height])
        sums[index] = stack[0]
        index = add(words[7], 1)


@jit
def _digits(number):
    digits = 1
    while number > 1:
        number >>= 1
        digits += 1
    return digits


def _row_bytes(compute: str) -> int:
    return 2 * STRIP * DTYPES[compute].itemsize + ROW_GAP


def _gram_block(kind, exactly, storage, compute, with_z, m, table, offset, strips, scratch, sums):
    """The products of one block, written to `sums`; only ever called from compiled code."""


@overload(_gram_block, prefer_literal=True)
def _gram_block_compiled(kind, exactly, storage, compute, with_z, m, table, offset, strips, scratch, sums):
    if kind.literal_value == "straight":

        def block(kind, exactly, storage, compute, with_z, m, table, offset, strips, scratch, sums):
            _straight_block(exactly, storage, compute, with_z, table, offset, strips, scratch, sums)

        return block

    row, size, width = (
        _row_bytes(compute.literal_value),
        DTYPES[storage.literal_value].itemsize,
        lanes(compute.literal_value),
    )
    joint, log_size = kind.literal_value == "joint", size.bit_length() - 1
    stacks, extra = 1 + joint, joint or with_z.literal_value

    def tiled(kind, exactly, storage, compute, with_z, m, table, offset, strips, scratch, sums):
        side = (m + TILE - 1) // TILE
        count = stacks * side
        tiles = count * (count + 1) // 2
        norms = sums + 8 * (ON_DIAGONAL * count + TILE * TILE * (tiles - count))
        panels, pace = scratch + 2 * row, stacks * m * (width * size << PACE) // tiles
        dense, end = m > DENSE * size, offset + strips * STRIP
        length, log_bytes = STRIP << dense, LOG_STRIP + dense + log_size
        clear_bytes(sums, norms + 8 * (1 + extra) - sums)
        while offset < end:
            steps, following = min(length, end - offset) // width, offset + length
            products, last, fetched = sums, scratch, 0
            _mean(storage, compute, m, table, 0, offset, steps, last, norms)
            if extra:
                last += row
                _mean(storage, compute, m if joint else 1, table, m, offset, steps, last, norms + 8)
            for i in range(count):
                stack = i // side
                rows, first, mean = table + 8 * m * stack, (i - stack * side) * TILE, scratch + stack * row
                panel, ahead = panels + i * TILE * row, (table, following, log_bytes, fetched, pace)
                _diagonal(storage, compute, m, rows, first, offset, steps, mean, last, panel, ahead, products)
                products += 8 * ON_DIAGONAL
                fetched += steps * pace
            for i in range(count):
                for j in range(i + 1, count):
                    left, right = panels + i * TILE * row, panels + j * TILE * row
                    ahead = (table, following, log_bytes, fetched, pace)
                    _tile(storage, compute, left, right, steps, ahead, products)
                    products += 8 * TILE * TILE
                    fetched += steps * pace
            offset = following

    def of_row(kind, exactly, storage, compute, with_z, m, table, offset, strips, scratch, sums):
        difference, reference, steps = scratch, scratch + row, STRIP // width
        clear_bytes(sums, 8 * (m + 1))
        for start in range(offset, offset + strips * STRIP, STRIP):
            _subtract_reference(storage, compute, m, table, start, steps, difference, reference, sums)
            k = 0
            while k + 4 <= m:
                _multiply_rows(4, storage, compute, table, k, start, steps, difference, reference, sums)
                k += 4
            while k < m:
                _multiply_rows(1, storage, compute, table, k, start, steps, difference, reference, sums)
                k += 1

    return of_row if kind.literal_value == "row" else tiled


@intrinsic(prefer_literal=True)
def _straight_block(typingctx, m, storage, compute, with_z, table, offset, strips, scratch, sums):
    """All pairs of exactly m rows: values, mean and as many sums as fit stay in registers.

    What does not fit is summed in further rounds over the strip, from a centred copy in the first-level cache.
    """
    rows, with_z_ = m.literal_value, with_z.literal_value
    pairs = _pairs(rows, with_z_)
    registers = rows + 1 + with_z_
    rounds = _rounds(pairs, registers)

    def codegen(context, builder, signature, args):
        v = Vectors(builder, storage.literal_value, compute.literal_value)
        table, offset, strips, scratch, sums = args[4:]
        starts = v.pointers(table, 0, rows + with_z_, offset)
        slots = v.at(scratch, registers * STRIP * DTYPES[v.compute].itemsize)
        slot = {pair: v.at(slots, k * VECTOR_BYTES) for k, pair in enumerate(pairs)}
        for pair in pairs:
            v.store_work(v.constant(0.0), slot[pair])

        def centred(step_bytes, here):
            values = [v.load(v.at(start, step_bytes)) for start in here]
            mean = v.mul(v.pairwise(values[:rows]), v.constant(1 / rows))
            return [v.sub(value, mean) for value in values[:rows]] + [mean] + values[rows:]

        with v.loop(strips) as strip:
            here = [v.at(start, strip.index, STRIP * DTYPES[v.storage].itemsize) for start in starts]
            for number, members in enumerate(rounds):
                running = {pair: v.variable() for pair in members}
                for pair in members:
                    builder.store(v.load_work(slot[pair]), running[pair])
                with v.loop(STRIP // v.lanes) as step:
                    step_bytes = builder.mul(step.index, ir.Constant(step.index.type, v.stride))
                    copies = v.at(scratch, step.index, registers * VECTOR_BYTES)
                    if number == 0:
                        x = dict(enumerate(centred(step_bytes, here)))
                        for k in x if len(rounds) > 1 else ():
                            v.store_work(x[k], v.at(copies, k * VECTOR_BYTES))
                    else:
                        used = sorted({k for pair in members for k in pair})
                        x = {k: v.load_work(v.at(copies, k * VECTOR_BYTES)) for k in used}
                    for start in here[number :: len(rounds)]:
                        v.prefetch(v.at(v.at(start, step_bytes), BLOCK * DTYPES[v.storage].itemsize))
                    for i, j in members:
                        sum_ = running[i, j]
                        builder.store(v.fma(x[i], x[j], builder.load(sum_)), sum_)
                for pair in members:
                    v.store_work(builder.load(running[pair]), slot[pair])
        v.store_lane_sums([v.load_work(slot[pair]) for pair in pairs], sums)

    return types.void(m, storage, compute, with_z, table, offset, strips, scratch, sums), codegen


def _rounds(pairs: list[tuple[int, int]], rows: int) -> list[list[tuple[int, int]]]:
    """The pairs shared out over rounds whose sums fit the registers: the first beside all rows and a spare."""
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


@jit
def _mean(storage, compute, m, table, first, offset, steps, mean, norm2):
    """The mean of m rows from `first` on, as `compute` values in scratch; its norm squared is added to norm2."""
    k = 0
    while k + GATHERED <= m:
        _gather(GATHERED, storage, compute, table, first + k, k, offset, steps, mean)
        k += GATHERED
    while k < m:
        _gather(1, storage, compute, table, first + k, k, offset, steps, mean)
        k += 1
    _scale(compute, m, steps, mean, norm2)


@intrinsic(prefer_literal=True)
def _gather(typingctx, count, storage, compute, table, first, before, offset, steps, sum_):
    """Add `count` rows to those `before`, whose sum is in scratch."""

    def codegen(context, builder, signature, args):
        v = Vectors(builder, storage.literal_value, compute.literal_value)
        table, first, before, offset, steps, sum_ = args[3:]
        starts = v.pointers(table, first, count.literal_value, offset)
        fresh = builder.icmp_signed("==", before, ir.Constant(before.type, 0))
        with v.loop(steps) as step:
            here = v.at(sum_, step.index, VECTOR_BYTES)
            so_far = builder.select(fresh, v.constant(0.0), v.load_work(here))
            added = v.pairwise(v.load(v.at(start, step.index, v.stride)) for start in starts)
            v.store_work(v.add(so_far, added), here)

    return types.void(count, storage, compute, table, first, before, offset, steps, sum_), codegen


@intrinsic(prefer_literal=True)
def _scale(typingctx, compute, m, steps, row, norm2):
    """Divide the row in scratch by m and add its norm squared to norm2."""

    def codegen(context, builder, signature, args):
        v = Vectors(builder, compute.literal_value, compute.literal_value)
        _, m, steps, row, norm2 = args
        inverse = v.reciprocal(m)
        running = v.variable()
        builder.store(v.constant(0.0), running)
        with v.loop(steps) as step:
            here = v.at(row, step.index, VECTOR_BYTES)
            value = v.mul(v.load_work(here), inverse)
            v.store_work(value, here)
            builder.store(v.fma(value, value, builder.load(running)), running)
        v.add_lane_sums([builder.load(running)], norm2)

    return types.void(compute, m, steps, row, norm2), codegen


def _fetch(v, ahead, index):
    """Prefetch from the next strip: its rows laid end to end, at `fetched` + index·pace in 2⁻ᴾᴬᶜᴱ bytes.

    Evenly over all tiles: the few buffers for lines on their way from memory are full otherwise, and loads wait.  With
    fewer tiles than rows some lines are left to the hardware.
    """
    table, offset, log_bytes, fetched, pace = cgutils.unpack_tuple(v.builder, ahead)
    position = v.builder.lshr(v.at(fetched, index, pace), ir.Constant(pace.type, PACE))
    row = v.builder.lshr(position, log_bytes)
    within = v.builder.sub(position, v.builder.shl(row, log_bytes))
    (start,) = v.pointers(table, row, 1, offset)
    v.prefetch(v.at(start, within))


@intrinsic(prefer_literal=True)
def _diagonal(typingctx, storage, compute, m, rows, first, offset, steps, mean, last, panel, ahead, sums):
    """Centre TILE rows into scratch; their products with each other and with the `last` row, row after row.

    Rows beyond the m-th repeat it: nobody reads what comes of them.
    """

    def codegen(context, builder, signature, args):
        v = Vectors(builder, storage.literal_value, compute.literal_value)
        m, rows, first, offset, steps, mean, last, panel, ahead, sums = args[2:]
        final = builder.sub(m, ir.Constant(m.type, 1))
        starts = []
        for k in range(TILE):
            index = v.at(first, k)
            index = builder.select(builder.icmp_signed("<", index, final), index, final)
            starts += v.pointers(rows, index, 1, offset)
        pairs = [(i, j) for i in range(TILE) for j in range(i, TILE + 1)]
        running = {pair: v.variable() for pair in pairs}
        for sum_ in running.values():
            builder.store(v.constant(0.0), sum_)
        with v.loop(steps) as step:
            centre, one_more = (v.load_work(v.at(row, step.index, VECTOR_BYTES)) for row in (mean, last))
            x = [v.sub(v.load(v.at(start, step.index, v.stride)), centre) for start in starts]
            for k in range(TILE):
                there = v.at(v.at(panel, k * _row_bytes(v.compute)), step.index, VECTOR_BYTES)
                v.prefetch(v.at(there, 2 * VECTOR_BYTES), to_write=True)
                v.store_work(x[k], there)
            _fetch(v, ahead, step.index)
            x.append(one_more)
            for (i, j), sum_ in running.items():
                builder.store(v.fma(x[i], x[j], builder.load(sum_)), sum_)
        v.add_lane_sums([builder.load(sum_) for sum_ in running.values()], sums)

    arguments = (storage, compute, m, rows, first, offset, steps, mean, last, panel, ahead, sums)
    return types.void(*arguments), codegen


@intrinsic(prefer_literal=True)
def _tile(typingctx, storage, compute, left, right, steps, ahead, sums):
    """The TILE² products of two groups of centred rows."""

    def codegen(context, builder, signature, args):
        v = Vectors(builder, storage.literal_value, compute.literal_value)
        left, right, steps, ahead, sums = args[2:]
        row = _row_bytes(v.compute)
        running = [[v.variable() for _ in range(TILE)] for _ in range(TILE)]
        for sum_ in (sum_ for line in running for sum_ in line):
            builder.store(v.constant(0.0), sum_)
        with v.loop(steps) as step:
            here = [v.at(side, step.index, VECTOR_BYTES) for side in (left, right)]
            x, y = ([v.load_work(v.at(address, k * row)) for k in range(TILE)] for address in here)
            _fetch(v, ahead, step.index)
            for i in range(TILE):
                for j in range(TILE):
                    builder.store(v.fma(x[i], y[j], builder.load(running[i][j])), running[i][j])
        v.add_lane_sums([builder.load(sum_) for line in running for sum_ in line], sums)

    return types.void(storage, compute, left, right, steps, ahead, sums), codegen


@intrinsic(prefer_literal=True)
def _subtract_reference(typingctx, storage, compute, m, table, offset, steps, difference, reference, sums):
    """g − r and r, rows m and m + 1, in scratch; their product is added to sums[m]."""

    def codegen(context, builder, signature, args):
        v = Vectors(builder, storage.literal_value, compute.literal_value)
        m, table, offset, steps, difference, reference, sums = args[2:]
        row, shift = v.pointers(table, m, 2, offset)
        running = v.variable()
        builder.store(v.constant(0.0), running)
        with v.loop(steps) as step:
            r = v.load(v.at(shift, step.index, v.stride))
            d = v.sub(v.load(v.at(row, step.index, v.stride)), r)
            v.store_work(r, v.at(reference, step.index, VECTOR_BYTES))
            v.store_work(d, v.at(difference, step.index, VECTOR_BYTES))
            builder.store(v.fma(d, r, builder.load(running)), running)
        v.add_lane_sums([builder.load(running)], v.at(sums, m, 8))

    return types.void(storage, compute, m, table, offset, steps, difference, reference, sums), codegen


@intrinsic(prefer_literal=True)
def _multiply_rows(typingctx, count, storage, compute, table, first, offset, steps, difference, reference, sums):
    """(g_k − r)ᵀ(g − r) for `count` rows from `first` on, added to sums[k]."""

    def codegen(context, builder, signature, args):
        v = Vectors(builder, storage.literal_value, compute.literal_value)
        table, first, offset, steps, difference, reference, sums = args[3:]
        starts = v.pointers(table, first, count.literal_value, offset)
        running = [v.variable() for _ in starts]
        for sum_ in running:
            builder.store(v.constant(0.0), sum_)
        with v.loop(steps) as step:
            d, r = (v.load_work(v.at(side, step.index, VECTOR_BYTES)) for side in (difference, reference))
            for start, sum_ in zip(starts, running, strict=True):
                x = v.sub(v.load(v.at(start, step.index, v.stride)), r)
                builder.store(v.fma(x, d, builder.load(sum_)), sum_)
        v.add_lane_sums([builder.load(sum_) for sum_ in running], v.at(sums, first, 8))

    return types.void(count, storage, compute, table, first, offset, steps, difference, reference, sums), codegen
