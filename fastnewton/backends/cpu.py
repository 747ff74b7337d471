"""The parts of the method in CPU memory: the passes of `kernels/cpu` around `decision.py`."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from fastnewton import arrays, decision
from fastnewton.arrays import Rows
from fastnewton.decision import Gram, Spectrum
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu import combine as combine_kernel
from fastnewton.kernels.cpu import gram as gram_kernel
from fastnewton.kernels.cpu import spectrum as small
from fastnewton.kernels.cpu import step as step_kernel
from fastnewton.kernels.cpu import tree
from fastnewton.kernels.record import GO, RESULT
from fastnewton.results import StepInfo, size_of, weights_of


def context(*given: Rows) -> AbstractContextManager:
    """What must be current while there is work for these arrays."""
    return nullcontext()


def gram(grads: Rows, z: Rows | None, thetas: Rows | None, compute: str) -> Gram:
    """The Gram of checked input."""
    raw = gram_kernel.gram(grads, z, compute=compute)
    if thetas is not None:
        raw = gram_kernel.joint_gram(thetas, grads)._replace(products=raw.products)
    return decision.projected(raw, grads.dtype)


def spectrum(gram: Gram, cutoff: float, max_rank: int | None) -> Spectrum:
    """As `fastnewton.spectrum`."""
    return decision.spectrum(gram, cutoff, max_rank)


def combine(
    thetas: Rows, grads: Rows, coefficients: Any, *, tau: float, beta: float, z: Rows | None, out: Rows, compute: str
) -> None:
    """θ̄ − τΘc − β(ḡ − Gc), or z + (Θ − G)c, written to `out`."""
    combine_kernel.combine(thetas, grads, coefficients, tau=tau, beta=beta, z=z, out=out, compute=compute)


def attempt(thetas: Rows, grads: Rows, lr: float, options: Any, out: Rows, *, products: str, sums: str) -> StepInfo:
    """A step with products and sums in those types; unless NaN is to propagate, only a finite K is acted upon."""
    if options.safeguards is not None:
        raw = gram_kernel.joint_gram(thetas, grads)
    elif thetas.m <= small.SHORT_LIMIT and options.lr_cap != "curvature":
        record = np.empty(size_of(thetas.m))
        step_kernel.step(
            thetas, grads, out, record, settings(thetas.m, grads.dtype, lr, options), products=products, sums=sums
        )
        return StepInfo(record)
    else:
        raw = gram_kernel.gram(grads, None, thetas if options.lr_cap == "curvature" else None, compute=products)
    info = decision.decide(decision.projected(raw, grads.dtype), lr, options)
    if info.status == GO or options.nonfinite == "propagate":
        finish(thetas, grads, info, out, sums)
    return info


def short_step(thetas: Any, grads: Any, lr: float, options: Any, out: Any) -> tuple[Any, StepInfo] | None:
    """A step of few workers whose arrays are plain and in order, and in which nothing comes up; None for any other."""
    plain = None if options.reads_thetas else arrays.view_plain(thetas, grads, out, small.SHORT_LIMIT)
    if plain is None:
        return None
    dtype, first, second, target, result = plain
    m, n = second.shape
    compute, record = options.compute(dtype), np.empty(size_of(m))
    given = settings(m, dtype, lr, options)
    taken = step_kernel.step_of_arrays(first, second, target, record, given, dtype=dtype, compute=compute)
    info = StepInfo(record)
    return (result, info) if taken and options.accepts(info, compute, m, n) else None


def settings(m: int, dtype: str, lr: float, options: Any) -> tuple:
    """What the compiled step is told."""
    rank = m if options.max_rank is None else min(m, options.max_rank)
    rest = math.nan if options.lr_rest is None else options.lr_rest
    guarded = options.nonfinite != "propagate"
    return DTYPES[dtype].eps, options.cutoff, rank, lr, rest, options.lr_cap == "sigma", guarded


def finish(thetas: Rows, grads: Rows, info: StepInfo, out: Rows, compute: str) -> None:
    """Write θ_new to `out`, and in the record whether it is finite."""
    tau, beta, weights = info.lr, info.lr_rest, weights_of(info.record)
    finite = combine_kernel.combine(thetas, grads, weights, tau=tau, beta=beta, out=out, compute=compute)
    info.record[RESULT] = not finite


def nonfinite_workers(*matrices: Rows) -> list[int]:
    """The workers with a NaN or an infinity in any of their rows."""
    return arrays.nonfinite_workers(*matrices)


# -- parts of K, for several processes ----------------------------------------------------------------------

BLOCK, blocks, layout = tree.BLOCK, tree.blocks, gram_kernel.layout


def places(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """Which parts a process sends that has blocks first … last−1 of so many."""
    return tree.subtrees(first, last, count)


def part_size(m: int, options: Any) -> int:
    """Numbers in one part."""
    if options.safeguards is not None:
        return gram_kernel.joint_size(m)
    return gram_kernel.part_size(m, with_z=False, with_thetas=options.reads_thetas)


def parts(grads: Rows, thetas: Rows | None, options: Any, compute: str, first: int, last: int) -> np.ndarray:
    """The parts of those places (places, size)."""
    if options.safeguards is not None:
        return gram_kernel.joint_parts(thetas, grads, first=first, last=last)
    return gram_kernel.gram_parts(grads, thetas, compute=compute, first=first, last=last)


def total(places: np.ndarray, parts: np.ndarray, m: int, dtype: str, options: Any) -> Gram:
    """The Gram, from the parts of all blocks in order, which are overwritten."""
    values = tree.total(places, parts)
    if options.safeguards is not None:
        return decision.projected(gram_kernel.unpacked_joint(values, m), dtype)
    return decision.projected(gram_kernel.unpacked(values, m, with_z=False, with_thetas=options.reads_thetas), dtype)
