"""The parts of the method in CPU memory: the passes of `kernels/cpu` around `decision.py`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from fastnewton import arrays, decision
from fastnewton.arrays import Rows
from fastnewton.decision import decide, spectrum
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu import combine as combine_kernel
from fastnewton.kernels.cpu import gram as gram_kernel
from fastnewton.kernels.cpu import step as step_kernel
from fastnewton.kernels.cpu import tree
from fastnewton.kernels.cpu.spectrum import SHORT_LIMIT, pack_settings
from fastnewton.kernels.record import RESULT
from fastnewton.options import Options
from fastnewton.results import Gram, StepInfo, record_size, weights_of

__all__ = ["decide", "spectrum"]


def context(*rows: Rows) -> AbstractContextManager:
    """Enter the device and stream of these arrays; a no-op on the CPU."""
    return nullcontext()


def gram(grads: Rows, z: Rows | None, thetas: Rows | None, compute: str) -> Gram:
    """Form K and b of checked input and, with thetas, all products of both, in one pass."""
    if thetas is None:
        raw = gram_kernel.gram(grads, z, compute=compute)
    else:
        raw = gram_kernel.gram_with_thetas(thetas, grads, z, compute=compute)
    return decision.project(raw, grads.dtype)


def step_gram(thetas: Rows, grads: Rows, options: Options, compute: str) -> Gram:
    """Form the Gram that a step with these options is decided from."""
    if options.safeguards is not None:
        raw = gram_kernel.joint_gram(thetas, grads)
    else:
        raw = gram_kernel.gram(grads, None, thetas if options.reads_thetas else None, compute=compute)
    return decision.project(raw, grads.dtype)


def combine(thetas: Rows, grads: Rows, info: StepInfo, *, out: Rows, compute: str) -> None:
    """Write θ_new of a decided step to `out`, and in the record whether it is finite."""
    weights, lengths = weights_of(info.record), {"tau": info.lr, "beta": info.lr_rest}
    info.record[RESULT] = not combine_kernel.combine(thetas, grads, weights, **lengths, out=out, compute=compute)


def combine_rows(
    thetas: Rows, grads: Rows, coefficients: Any, *, tau: float, beta: float, z: Rows | None, out: Rows, compute: str
) -> None:
    """Write θ̄ − τΘc − β(ḡ − Gc), or z + (Θ − G)c, to `out`."""
    combine_kernel.combine(thetas, grads, coefficients, tau=tau, beta=beta, z=z, out=out, compute=compute)


def fused(
    thetas: Rows, grads: Rows, lr: float, options: Options, out: Rows, *, products: str, sums: str
) -> StepInfo | None:
    """Take a step of few workers in one call of compiled code; None for any other."""
    if options.reads_thetas or grads.m > SHORT_LIMIT:
        return None
    record, settings = np.empty(record_size(grads.m)), pack_settings(grads.m, lr, options)
    call = {"eps": DTYPES[grads.dtype].eps, "guarded": not options.propagates, "products": products, "sums": sums}
    step_kernel.step(thetas, grads, out, record, settings, **call)
    return StepInfo(record)


def short_step(thetas: Any, grads: Any, lr: float, options: Options, out: Any) -> tuple[Any, StepInfo] | None:
    """Take a step of few workers whose arrays are plain and in order, and in which nothing comes up; None for any
    other."""
    plain = None if options.reads_thetas else arrays.view_plain(thetas, grads, out, SHORT_LIMIT)
    if plain is None:
        return None
    dtype, first, second, target, result = plain
    m, n = second.shape
    compute, record = options.compute(dtype), np.empty(record_size(m))
    settings, guarded = pack_settings(m, lr, options), not options.propagates
    taken = step_kernel.step_of_arrays(
        first, second, target, record, settings, eps=DTYPES[dtype].eps, guarded=guarded, dtype=dtype, compute=compute
    )
    info = StepInfo(record)
    return (result, info) if taken and options.accepts(info, compute, m, n) else None


def nonfinite_workers(*matrices: Rows) -> list[int]:
    """Return the workers with a NaN or an infinity in any of their rows."""
    return arrays.nonfinite_workers(*matrices)


# -- parts of K, for several processes ------------------------------------------------------------------------------

BLOCK, blocks, layout = tree.BLOCK, tree.blocks, gram_kernel.layout


def places(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """Return which parts a process sends that has blocks first … last−1 of so many."""
    return tree.subtrees(first, last, count)


def part_size(m: int, options: Options) -> int:
    """Return how many numbers one part holds."""
    if options.safeguards is not None:
        return gram_kernel.joint_size(m)
    return gram_kernel.part_size(m, with_thetas=options.reads_thetas)


def parts(grads: Rows, thetas: Rows | None, options: Options, compute: str, first: int, blocks: int) -> np.ndarray:
    """Compute the parts of Rows that begin at block `first` of so many; shape (places, part_size)."""
    if options.safeguards is not None:
        return gram_kernel.joint_parts(thetas, grads, first=first, blocks=blocks)
    return gram_kernel.gram_parts(grads, thetas, compute=compute, first=first, blocks=blocks)


def total(places: np.ndarray, parts: np.ndarray, m: int, dtype: str, options: Options) -> Gram:
    """Return the Gram, from the parts of all blocks in order, which are overwritten."""
    values = tree.total(places, parts)
    if options.safeguards is not None:
        return decision.project(gram_kernel.unpack_joint(values, m), dtype)
    return decision.project(gram_kernel.unpack(values, m, with_thetas=options.reads_thetas), dtype)
