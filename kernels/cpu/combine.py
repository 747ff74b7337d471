"""The combine pass on the CPU: θ_new from all rows, last blocks first: the end of grads is then still in the cache."""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray
from numba.extending import intrinsic, overload

from fastnewton.kernels.cpu import threads
from fastnewton.kernels.cpu.jit import FLOAT, FLOATS, INT, INTS, entry, jit, kernel
from fastnewton.kernels.cpu.memory import copy_bytes, copy_rows, itemsize_of, lanes_of, pointer_at
from fastnewton.kernels.cpu.simd import VECTOR_BYTES, Vectors, lanes
from fastnewton.kernels.cpu.threads import PIECES_PER_THREAD, THREADED_BYTES, add, address, keep
from fastnewton.kernels.cpu.tree import BLOCK

UNROLLED = 8  # rows beside the first whose combination is one straight line
GROUP = 4  # rows that are added per round above that: more at one spacing fight for the ways of the caches
STREAMED_BYTES = 1 << 24  # a larger result bypasses the cache, which would read each line before overwriting it

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
    words, size, width = carray(pointer_at(job), (11,), np.int64), itemsize_of(storage), lanes_of(compute)
    m, rows, factors, out, n = words[0], words[1], words[3], words[4], words[5]
    early, count, pieces, state, streamed = words[6], words[7], words[8], words[9], words[10]
    table = carray(pointer_at(rows), (words[2],), np.int64)
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
                copy_rows(table, here, (offset + done) * size, rest * size, 64, padded)
                rounded = address(padded) + table.size * 64
                finite &= _combine_block(
                    others, storage, compute, base, "out", m, address(here), factors, 0, rest, rounded, scratch
                )
                copy_bytes(target + done * size, rounded, rest * size)
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
