"""The two passes over the workers' arrays on the CPU: `gram` and `combine`.

Coordinates are walked in blocks of BLOCK.  `gram` centres a strip of a block and multiplies it while it is in the
cache; each block gives one float64 part, and the parts are added in the tree of `tree.py`.  `combine` walks the blocks
in the opposite order, since the end of the gradients is then still in the cache.

Vectors are written out by `simd.py`; what is compiled for exactly m rows, one dtype and one precision is cached on
disk.  Rows are given as tables of addresses, so that strided arrays and separate vectors are the same thing.
"""

import math
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from fastnewton.kernels import memory, spectrum, threads, tree
from fastnewton.kernels.addresses import overlaps
from fastnewton.kernels.compile import FLOAT, FLOATS, INT, INTS, INTS_2D, entry, jit, kernel
from fastnewton.kernels.record import GO, HEADER, LR, LR_REST, RESULT, STATUS
from fastnewton.kernels.simd import CACHE_LINE, ITEMSIZE, REGISTERS, VECTOR_BYTES, Vectors, lanes
from fastnewton.kernels.threads import add, address, keep
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

BLOCK = 1024  # coordinates of one part; a float32 accumulator is one lane, so it takes BLOCK/lanes ≤ 256 terms
LOG_STRIP = 8
STRIP = 1 << LOG_STRIP  # coordinates of a block whose rows stay in a near cache while the pairs are gone through
STRAIGHT = 16  # up to this many workers, straight-line code for exactly m rows; above, square tiles of pairs
TILE = 5 if REGISTERS == 32 else 3  # TILE² sums, the chains that hide an addition's latency, and TILE + 1 rows
ON_DIAGONAL = TILE * (TILE + 3) // 2  # products of TILE rows with each other and with one more row
GATHERED = 8  # rows that are added to the mean per round
PACE = 8  # binary places of the bytes that are fetched per step
DENSE = 16  # workers per byte of a value beyond which memory is not the limit, and strips are twice as long
ROW_GAP = 64  # bytes between rows of the longest centred strip, or they would all fall into one set of the cache
UNROLLED = 8  # rows beside the first whose combination is one straight line
GROUP = 4  # rows that are added per round above that: more at one spacing fight for the ways of the caches

THREADED_BYTES = 1 << 17  # waking a thread takes about as long as reading this much
THREADED_FLOPS = 1 << 19
STREAMED_BYTES = 1 << 24  # a larger result bypasses the cache, which would read each line before overwriting it
PARTS_BYTES = 1 << 26  # of the parts of all pieces, which grow with m²
PIECES_PER_THREAD = 16  # so that a thread that is held up delays the others little


class RawGram(NamedTuple):
    """Sums over coordinates of products of centred rows, not yet projected by C."""

    m: int
    products: np.ndarray  # of m rows, then their mean, then z if it is another
    of_thetas: np.ndarray | None = None  # of the rows of thetas, then their mean
    cross: np.ndarray | None = None  # of the rows of thetas with those of grads and, last, ḡ


def blocks(n: int) -> int:
    """Number of blocks that n coordinates are cut into."""
    return -(-n // BLOCK)


def layout() -> tuple[int, int, int]:
    """What ranks must agree on for their parts to be added."""
    return BLOCK, TILE, VECTOR_BYTES


# -- gram ---------------------------------------------------------------------------------------------------
#
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
        room = memory.borrowed(_room(len(places), size, table.size, last, helpers))
        if not _run_gram(words, helpers, code, m, table, n, places, last, size, room):
            raise MemoryError("no memory for the scratch of a kernel")
        found.append(tree.merged(places, _sums(places, size, room), first, last, blocks(n)))
        memory.returned(room)
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
    words = carray(_at(job), (12,), np.int64)
    m, rows, n, last, itemsize = words[0], words[2], words[3], words[4], _itemsize(storage)
    table, pieces = carray(_at(words[1]), (rows,), np.int64), carray(_at(words[5]), (words[6], 2), np.int64)
    size, depth, own = words[9], _digits(last) + 1, words[10] + words[11] * add(words[7] + 8, 1)
    sums, scratch = carray(_at(words[8]), (words[6], size), np.float64), (own + 63) & ~63
    stack = carray(_at(own + words[11] - 8 * depth * size), (depth, size), np.float64)
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
                _copy_rows(table, here, offset * itemsize, length * itemsize, strips * STRIP * itemsize, padded)
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


@intrinsic
def _at(typingctx, where):
    """An address as `carray` takes it."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(INT), codegen


@jit
def _digits(number):
    digits = 1
    while number > 1:
        number >>= 1
        digits += 1
    return digits


@jit
def _copy_rows(source, target, offset, length, stride, buffer):
    """Copy `length` bytes at `offset` of every row into zeroed memory, rows `stride` apart."""
    for k in range(source.size):
        target[k] = address(buffer) + k * stride
        _copy(target[k], source[k] + offset, length)


@intrinsic
def _copy(typingctx, target, source, length):
    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, byte) for address in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)

    return types.void(INT, INT, INT), codegen


def _itemsize(storage):
    """Bytes of a stored value; this and the next are only ever called from compiled code."""


@overload(_itemsize, prefer_literal=True)
def _itemsize_compiled(storage):
    size = ITEMSIZE[storage.literal_value]
    return lambda storage: size


def _lanes(compute):
    """Values of that type in a vector."""


@overload(_lanes, prefer_literal=True)
def _lanes_compiled(compute):
    width = lanes(compute.literal_value)
    return lambda compute: width


def _row_bytes(compute: str) -> int:
    return 2 * STRIP * ITEMSIZE[compute] + ROW_GAP


def _gram_block(kind, exactly, storage, compute, with_z, m, table, offset, strips, scratch, sums):
    """The products of one block, written to `sums`; only ever called from compiled code."""


@overload(_gram_block, prefer_literal=True)
def _gram_block_compiled(kind, exactly, storage, compute, with_z, m, table, offset, strips, scratch, sums):
    if kind.literal_value == "straight":

        def block(kind, exactly, storage, compute, with_z, m, table, offset, strips, scratch, sums):
            _straight_block(exactly, storage, compute, with_z, table, offset, strips, scratch, sums)

        return block

    row, size, width = _row_bytes(compute.literal_value), ITEMSIZE[storage.literal_value], lanes(compute.literal_value)
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
        _clear(sums, norms + 8 * (1 + extra) - sums)
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
        _clear(sums, 8 * (m + 1))
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
        slots = v.at(scratch, registers * STRIP * ITEMSIZE[v.compute])
        slot = {pair: v.at(slots, k * VECTOR_BYTES) for k, pair in enumerate(pairs)}
        for pair in pairs:
            v.store_work(v.constant(0.0), slot[pair])

        def centred(step_bytes, here):
            values = [v.load(v.at(start, step_bytes)) for start in here]
            mean = v.mul(v.pairwise(values[:rows]), v.constant(1 / rows))
            return [v.sub(value, mean) for value in values[:rows]] + [mean] + values[rows:]

        with v.loop(strips) as strip:
            here = [v.at(start, strip.index, STRIP * ITEMSIZE[v.storage]) for start in starts]
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
                        v.prefetch(v.at(v.at(start, step_bytes), BLOCK * ITEMSIZE[v.storage]))
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


@intrinsic
def _clear(typingctx, address, length):
    def codegen(context, builder, signature, args):
        cgutils.memset(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), args[1], 0)

    return types.void(address, length), codegen


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


# -- combine ------------------------------------------------------------------------------------------------
#
# θ_new = θ̄ − τΘc − β(ḡ − Gc), or z + (Θ − G)c with z given.  c (m,) sums to zero, so Θc = Σ c_k(θ_k − θ_0): with
# row 0 as the origin one reading is enough, and rounding is relative to the spread of the workers, not to θ:
#     θ_new = θ_0 − βg_0 + Σ_k p_k(θ_k − θ_0) + q_k(g_k − g_0),   p_k = 1/m − τc_k,   q_k = −β(1/m − c_k)
# Bytes: (2m + 1)·n·itemsize.  Flops: 8mn of the 6mn that the formula needs.  Each coordinate is on its own, so the
# bits depend on nothing else.  The limit of 256 terms is the Gram's: here a float32 sum has up to 2(m − 1), and the
# errors seen, relative to float64, are 1.9e-7 with m = 64 and 8.1e-7 with m = 1,024.


def combine(thetas, grads, coefficients, *, tau: float, beta: float, z=None, out, compute: str) -> bool:
    """Write the combination to `out` (Rows of one row); False if any value written is not finite."""
    m, n, itemsize = thetas.m, thetas.n, thetas.itemsize
    code = _combine_kernel(m, thetas.dtype, compute, "mean" if z is None else "z")
    helpers = threads.helpers_for(2 * m * n * itemsize >= THREADED_BYTES)
    last = NO_ROW if z is None else z.table
    given = thetas.table, grads.table, last, coefficients, tau, beta, out.table
    verdict = _run_combine(threads.team.words, helpers, code, *given, n, itemsize)
    if verdict < 0:
        raise MemoryError("no memory for the scratch of a kernel")
    return verdict == 1


NO_ROW = np.empty(0, np.int64)


@cache
def _combine_kernel(m: int, storage: str, compute: str, base: str) -> int:
    """Compiled for exactly m rows up to UNROLLED beside the first, for any number of them above."""
    return _any_combine_kernel(m - 1 if m - 1 <= UNROLLED else -1, storage, compute, base)


@cache
def _any_combine_kernel(others: int, storage: str, compute: str, base: str) -> int:
    return kernel(_combine_run, storage, compute, base, others)


@jit
def _combine_on_threads(team, helpers, code, thetas, grads, last, c, tau, beta, out, n, itemsize):
    """Run a combine kernel over all blocks: 1 if all values are finite, 0 if not, −1 if it failed."""
    m = thetas.size
    table = np.empty(2 * m + last.size, np.int64)
    table[:m], table[m : 2 * m], table[2 * m :] = thetas, grads, last
    weights = _weights(last.size == 0, m, c, tau, beta)
    state = np.zeros(2, np.int64)  # pieces taken, whether a value is not finite
    streamed = n * itemsize >= STREAMED_BYTES
    # Stores that bypass the cache must be aligned: blocks then begin on cache lines, the first one before the array.
    early = out[0] // itemsize % (64 // itemsize) if streamed else 0
    count = (n + early + BLOCK - 1) // BLOCK
    pieces = min(count, PIECES_PER_THREAD * (helpers + 1)) if helpers else min(count, 1)
    job = np.empty(11, np.int64)
    job[0], job[1], job[2], job[3], job[4] = m, address(table), table.size, address(weights), out[0]
    job[5], job[6], job[7], job[8], job[9], job[10] = n, early, count, pieces, address(state), streamed
    done = threads.shared(team, code, helpers, job)
    keep(table)
    keep(weights)
    return (1 if state[1] == 0 else 0) if done else -1


_run_combine = entry(_combine_on_threads, INTS, INT, INT, INTS, INTS, INTS, FLOATS, FLOAT, FLOAT, INTS, INT, INT)


@jit
def _combine_run(job, storage, compute, base, others):
    """Those pieces of the blocks that no other thread has taken, the last first."""
    words, size, width = carray(_at(job), (11,), np.int64), _itemsize(storage), _lanes(compute)
    m, rows, factors, out, n = words[0], words[1], words[3], words[4], words[5]
    early, count, pieces, state, streamed = words[6], words[7], words[8], words[9], words[10]
    table = carray(_at(rows), (words[2],), np.int64)
    work = np.empty(BLOCK * 8 + 64, np.uint8)
    scratch = (address(work) + 63) & ~63
    finite = 1
    index = add(state, 1)
    while index < pieces:
        for block in range(count - index * count // pieces - 1, count - (index + 1) * count // pieces - 1, -1):
            offset = max(0, block * BLOCK - early)
            length = min(n, (block + 1) * BLOCK - early) - offset
            target = out + offset * size
            rest = length % width if length < BLOCK else 0
            if rest:  # of a vector: copied, since what follows it is not ours
                done = length - rest
                here, padded = np.empty_like(table), np.zeros((table.size + 1) * 64, np.uint8)
                _copy_rows(table, here, (offset + done) * size, rest * size, 64, padded)
                rounded = address(padded) + table.size * 64
                finite &= _combine_block(
                    others, storage, compute, base, "out", m, address(here), factors, 0, rest, rounded, scratch
                )
                _copy(target + done * size, rounded, rest * size)
                keep(here)
                keep(padded)
                length = done
            if length == 0:
                continue
            if streamed and length == BLOCK:
                finite &= _combine_block(
                    others, storage, compute, base, "stream", m, rows, factors, offset, BLOCK, target, scratch
                )
            else:
                finite &= _combine_block(
                    others, storage, compute, base, "out", m, rows, factors, offset, length, target, scratch
                )
        index = add(state, 1)
    if finite == 0:
        add(state + 8, 1)
    keep(work)


@jit
def _weights(of_mean, m, c, tau, beta):
    """p, q and the factor of g_0, after c has been made to sum to zero; c (2m,) holds one for Θ and one for G."""
    of_thetas, of_grads = c[:m], c[c.size - m :]
    mean, mean_of_grads = of_thetas.sum() / m, of_grads.sum() / m
    weights = np.empty(2 * m + 1)
    for k in range(m):
        if of_mean:
            weights[k] = 1 / m - tau * (of_thetas[k] - mean)
            weights[m + k] = beta * (of_grads[k] - mean_of_grads - 1 / m)
        else:
            weights[k] = of_thetas[k] - mean
            weights[m + k] = mean_of_grads - of_grads[k]
    weights[2 * m] = -beta
    return weights


def _combine_block(others, storage, compute, base, target, m, table, weights, offset, length, out, scratch):
    """One block of the combination; only ever called from compiled code."""


@overload(_combine_block, prefer_literal=True)
def _combine_block_compiled(others, storage, compute, base, target, m, table, weights, offset, length, out, scratch):
    width = lanes(compute.literal_value)

    def straight(others, storage, compute, base, target, m, table, weights, offset, length, out, scratch):
        steps = (length + width - 1) // width
        return _combine_rows(others, storage, compute, base, target, m, table, weights, 1, offset, steps, out)

    def grouped(others, storage, compute, base, target, m, table, weights, offset, length, out, scratch):
        steps = (length + width - 1) // width
        _combine_rows(GROUP, storage, compute, base, "work", m, table, weights, 1, offset, steps, scratch)
        k = 1 + GROUP
        while k + GROUP <= m:
            _combine_rows(GROUP, storage, compute, "work", "work", m, table, weights, k, offset, steps, scratch)
            k += GROUP
        while k < m:
            _combine_rows(1, storage, compute, "work", "work", m, table, weights, k, offset, steps, scratch)
            k += 1
        return _store_rounded(storage, compute, target, scratch, steps, out)

    return straight if others.literal_value >= 0 else grouped


@intrinsic(prefer_literal=True)
def _combine_rows(typingctx, count, storage, compute, source, target, m, table, weights, first, offset, steps, out):
    """source + Σ p_k(θ_k − θ_0) + q_k(g_k − g_0) over `count` rows; 1 if all that was stored is finite, else 0.

    The table holds the addresses of thetas, grads and z; the weights are p, q and that of g_0 in the base.  Where
    source or target is "work", `out` is aligned scratch.
    """
    rows, source_, target_ = count.literal_value, source.literal_value, target.literal_value

    def codegen(context, builder, signature, args):
        v = Vectors(builder, storage.literal_value, compute.literal_value)
        m, table, weights, first, offset, steps, out = args[5:]
        grads, factors = v.at(table, m, 8), v.at(weights, m, 8)
        origin = v.pointers(table, 0, 1, offset) + v.pointers(grads, 0, 1, offset)
        starts = v.pointers(table, first, rows, offset) + v.pointers(grads, first, rows, offset)
        following = builder.add(first, ir.Constant(first.type, rows))
        is_last = builder.icmp_signed(">", v.at(following, rows), m)
        following = builder.select(is_last, ir.Constant(first.type, 1), following)
        at_following = builder.select(is_last, v.at(offset, -BLOCK), offset)
        ahead = [start for side in (table, grads) for start in v.pointers(side, following, rows, at_following)]
        firsts = [v.at(side, first, 8) for side in (weights, factors)]
        scales = [v.broadcast(v.at(side, 8 * k)) for side in firsts for k in range(rows)]
        step_to = v.pointers(v.at(grads, m, 8), 0, 1, offset)[0] if source_ == "z" else None
        minus_beta = v.broadcast(v.at(factors, m, 8)) if source_ == "mean" else None
        checked = v.variable()
        builder.store(v.constant(0.0), checked)
        with v.loop(steps) as step:
            at_step = builder.mul(step.index, ir.Constant(step.index.type, v.stride))
            theta_0, grad_0 = (v.load(v.at(start, at_step)) for start in origin)
            if source_ == "mean":
                value = v.fma(minus_beta, grad_0, theta_0)
            elif source_ == "z":
                value = v.load(v.at(step_to, at_step))
                if not rows:  # no difference to carry a NaN of the only worker
                    for origin_value in (theta_0, grad_0):
                        value = v.add(value, v.sub(origin_value, origin_value))
            else:
                value = v.load_work(v.at(out, step.index, VECTOR_BYTES))
            terms = [v.load(v.at(start, at_step)) for start in starts]
            for start in ahead:
                v.prefetch(v.at(start, at_step))
            for k, (term, scale) in enumerate(zip(terms, scales, strict=True)):
                value = v.fma(scale, v.sub(term, theta_0 if k < rows else grad_0), value)
            if target_ == "work":
                v.store_work(value, v.at(out, step.index, VECTOR_BYTES))
            else:
                stored = v.store(value, v.at(out, at_step), nontemporal=target_ == "stream")
                builder.store(v.fma(stored, v.constant(0.0), builder.load(checked)), checked)
        return v.all_zero(builder.load(checked))

    return INT(count, storage, compute, source, target, m, table, weights, first, offset, steps, out), codegen


@intrinsic(prefer_literal=True)
def _store_rounded(typingctx, storage, compute, target, work, steps, out):
    """Round scratch to `storage` in `out`; 1 if all that was stored is finite, else 0."""

    def codegen(context, builder, signature, args):
        v = Vectors(builder, storage.literal_value, compute.literal_value)
        work, steps, out = args[3:]
        checked = v.variable()
        builder.store(v.constant(0.0), checked)
        with v.loop(steps) as step:
            value = v.load_work(v.at(work, step.index, VECTOR_BYTES))
            there = v.at(out, step.index, v.stride)
            stored = v.store(value, there, nontemporal=target.literal_value == "stream")
            builder.store(v.fma(stored, v.constant(0.0), builder.load(checked)), checked)
        return v.all_zero(builder.load(checked))

    return INT(storage, compute, target, work, steps, out), codegen


# -- step ---------------------------------------------------------------------------------------------------
#
# gram, spectrum and combine one after the other without a return to Python: for short vectors that is most of the time.


def step(thetas, grads, out, record, settings, *, products: str, sums: str) -> None:
    """A step of up to `spectrum.SHORT_LIMIT` workers and its record.

    settings are eps and those of `spectrum.decide`, and whether only a finite K is acted upon; products and sums are
    the types in which gram and combine compute.
    """
    m, n, itemsize = thetas.m, thetas.n, thetas.itemsize
    helpers = threads.helpers_for(m * n * itemsize >= THREADED_BYTES)
    plan, numbers = _plan(m, n, grads.dtype, products, sums, helpers)
    given = *plan, thetas.table, grads.table, out.table, n, itemsize
    room = memory.borrowed(numbers)
    if not _run_step(threads.team.words, helpers, room, *given, *settings, record):
        raise MemoryError("no memory for the scratch of a kernel")
    memory.returned(room)


def step_of_arrays(thetas, grads, out, record, settings, *, dtype: str, compute: str) -> bool:
    """As `step`, for NumPy arrays of float32 or float64 with n > 0; false unless compiled code has found them in
    order, and has taken the step."""
    m, n = thetas.shape
    helpers = threads.helpers_for(thetas.nbytes >= THREADED_BYTES)
    plan, numbers = _plan(m, n, dtype, compute, compute, helpers)
    room = memory.borrowed(numbers)
    taken = _step_entry(dtype)(threads.team.words, helpers, room, *plan, thetas, grads, out, *settings, record)
    memory.returned(room)
    return bool(taken)


@lru_cache(maxsize=256)
def _plan(m: int, n: int, dtype: str, products: str, sums: str, helpers: int):
    """The kernels of a step, its pieces of work, and what is in their parts; the numbers that it needs room for."""
    codes = _gram_kernel(m, dtype, products, False), _combine_kernel(m, dtype, sums, "mean")
    size = _gram_size(m, False)
    places = _pieces(0, blocks(n), blocks(n), helpers, size)
    return (*codes, places, _positions(m, False), size), _room(len(places), size, m, blocks(n), helpers)


@jit
def _step_on_threads(
    team, helpers, room, gram_code, combine_code, places, positions, size, thetas, grads, out, n, itemsize,
    eps, cutoff, largest_rank, lr, lr_rest, sigma_cap, guarded, record,
):  # fmt: skip
    m = thetas.size
    if not _gram_on_threads(team, helpers, gram_code, m, grads, n, places, (n + BLOCK - 1) // BLOCK, size, room):
        return False
    parts = carray(_at(address(room)), (len(places), size), np.float64)
    values, products = tree.add_up(places, parts), np.empty(positions.shape)
    for i in range(m + 1):
        for j in range(m + 1):
            products[i, j] = values[positions[i, j]]
    found = spectrum.project(products, m, eps)
    spectrum.decide(*found, cutoff, largest_rank, lr, lr_rest, sigma_cap, record)
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
    team, helpers, room, gram_code, combine_code, places, positions, size, thetas, grads, out,
    eps, cutoff, largest_rank, lr, lr_rest, sigma_cap, guarded, record,
):  # fmt: skip
    m, n, itemsize = thetas.shape[0], thetas.shape[1], thetas.itemsize
    first, second, target = np.empty(m, np.int64), np.empty(m, np.int64), np.full(1, address(out))
    if not _tabled(thetas, first) or not _tabled(grads, second) or out.strides[0] != itemsize or target[0] % itemsize:
        return False
    end = target[0] + n * itemsize
    if overlaps(target[0], end, first, n * itemsize) or overlaps(target[0], end, second, n * itemsize):
        return False
    return _step_on_threads(
        team, helpers, room, gram_code, combine_code, places, positions, size, first, second, target, n, itemsize,
        eps, cutoff, largest_rank, lr, lr_rest, sigma_cap, guarded, record,
    )  # fmt: skip


@jit
def _tabled(rows, table):
    """Fill in the addresses of rows; false if their strides or their alignment are not what `arrays` asks for."""
    for k in range(table.size):
        table[k] = address(rows) + k * rows.strides[0]
    if rows.strides[1] != rows.itemsize or rows.strides[0] < rows.shape[1] * rows.itemsize:
        return False
    return (rows.strides[0] | address(rows)) % rows.itemsize == 0


_PLAN = FLOATS, INT, INT, INTS_2D, INTS_2D, INT
_SETTINGS = FLOAT, FLOAT, INT, FLOAT, FLOAT, INT, INT
_run_step = entry(_step_on_threads, INTS, INT, *_PLAN, INTS, INTS, INTS, INT, INT, *_SETTINGS, FLOATS)


@cache
def _step_entry(dtype: str):
    rows, row = (types.Array(types.float32 if dtype == "float32" else FLOAT, ndim, "A") for ndim in (2, 1))
    return entry(_step_on_arrays, INTS, INT, *_PLAN, rows, rows, row, *_SETTINGS, FLOATS)


def cache_folder() -> str | None:
    """Where compiled kernels are kept; None where no folder can be written."""
    return getattr(_gram_run, "stats", None) and _gram_run.stats.cache_path  # there are none without Numba's compiler
