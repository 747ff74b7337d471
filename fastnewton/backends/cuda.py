"""The parts of the method on a CUDA device: up to 64 workers a step without safeguards is all enqueued there.

The host decides for more workers, with safeguards, and where the device's eigenproblem does not converge.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastnewton import decision
from fastnewton.arrays import Rows
from fastnewton.arrays.cuda import context
from fastnewton.decision import decide
from fastnewton.kernels.cpu.gram import RawGram
from fastnewton.kernels.cpu.tree import BLOCK, blocks
from fastnewton.kernels.cuda import combine as combine_kernel
from fastnewton.kernels.cuda import gram as gram_kernel
from fastnewton.kernels.cuda import jit, memory
from fastnewton.kernels.cuda import spectrum as spectrum_kernel
from fastnewton.kernels.cuda.common import WORKER_LIMIT
from fastnewton.kernels.cuda.finite import finite_rows
from fastnewton.kernels.cuda.gram import JOINT_LIMIT, Products
from fastnewton.kernels.record import GO, HEADER, NOT_CONVERGED, RESULT
from fastnewton.options import Options
from fastnewton.results import Gram, Spectrum, StepInfo, record_size, to_host, weights_of

__all__ = ["BLOCK", "blocks", "context", "decide"]  # the same on both sides, or found elsewhere

Allocate = Callable[[str, int], Any]  # by purpose and size


# -- gram ---------------------------------------------------------------------------------------------------


def gram(grads: Rows, z: Rows | None, thetas: Rows | None, compute: str) -> Gram:
    """Form K and b in new arrays on the device; with thetas also all products of both, in a pass of their own."""
    if grads.m > WORKER_LIMIT:
        return _to_device(_large_gram(grads, z, thetas, compute, cross=True))
    plain = _plain_gram(grads, z, None, compute, _allocate)
    if thetas is None:
        return plain
    own = {name: getattr(plain, name) for name in ("matrix", "projection", "norm2", "floor")}
    return _to_device(dataclasses.replace(_joint_gram(thetas, grads, _allocate), **own))


def step_gram(thetas: Rows | None, grads: Rows, options: Options, compute: str) -> Gram:
    """Form the Gram that a step with these options is decided from, in host memory."""
    if thetas is not None and options.safeguards is not None:
        return to_host(_joint_gram(thetas, grads, memory.workspace))
    thetas = thetas if options.reads_thetas else None
    if grads.m > WORKER_LIMIT:
        return _large_gram(grads, None, thetas, compute, cross=False)
    return to_host(_plain_gram(grads, None, thetas, compute, memory.workspace))


def _allocate(_purpose: str, size: int) -> Any:
    return jit.cupy().empty(size)


def _plain_gram(grads: Rows, z: Rows | None, thetas: Rows | None, compute: str, allocate: Allocate) -> Gram:
    """Form K and b, and ΘᵀΘ for the curvature cap: in float64, since the cap is set by its smallest directions."""
    m = grads.m
    out = Products.of(allocate("grads", Products.size(m)), m)
    gram_kernel.gram(grads, z, compute=compute, out=out)
    plain = Gram(out.matrix, out.projection, out.norm2, out.floor)
    if thetas is None:
        return plain
    of_thetas = Products.of(allocate("thetas", Products.size(m)), m)
    gram_kernel.gram(thetas, None, compute="float64", out=of_thetas)
    return dataclasses.replace(plain, theta_matrix=of_thetas.matrix, theta_floor=of_thetas.floor)


def _joint_gram(thetas: Rows, grads: Rows, allocate: Allocate) -> Gram:
    """Form all products in float64; above JOINT_LIMIT workers in host memory."""
    m = grads.m
    if m > JOINT_LIMIT:
        return _large_gram(grads, None, thetas, "float64", cross=True)
    of_thetas, cross, own = (Products.of(allocate(name, Products.size(m)), m) for name in ("thetas", "cross", "grads"))
    gram_kernel.joint_gram(thetas, grads, of_thetas=of_thetas, cross=cross, of_grads=own)
    return Gram(*own[:2], own.norm2, own.floor, of_thetas.matrix, cross.matrix, of_thetas.floor, cross.projection)


def _large_gram(grads: Rows, z: Rows | None, thetas: Rows | None, compute: str, cross: bool) -> Gram:
    """Form the Gram of any number of workers, in host memory."""
    raw = RawGram(grads.m, gram_kernel.large_gram(grads, z, compute=compute).get())
    if thetas is not None:
        raw = raw._replace(of_thetas=gram_kernel.large_gram(thetas, None, compute="float64").get())
    if thetas is not None and cross:
        raw = raw._replace(cross=gram_kernel.large_cross(thetas, grads).get())
    return decision.project(raw, grads.dtype)


def _to_device(gram: Gram) -> Gram:
    put, values = jit.cupy().asarray, vars(gram).items()
    return Gram(**{name: value if value is None else put(value) for name, value in values})


# -- spectrum, combine --------------------------------------------------------------------------------------


def spectrum(gram: Gram, cutoff: float, max_rank: int | None) -> Spectrum:
    """Solve for the Spectrum in new arrays on the device; waits for the rank."""
    m, put = gram.projection.size, jit.cupy().asarray
    if m <= WORKER_LIMIT:
        record, vectors = jit.cupy().empty(record_size(m)), jit.cupy().empty((m, m))
        spectrum_kernel.spectrum(gram, 0.0, Options(cutoff, max_rank), record, vectors)
        info = StepInfo(record.get())
        if info.status != NOT_CONVERGED:
            return Spectrum(record[HEADER : HEADER + m], vectors, info.rank, weights_of(record)[m:], info.captured)
    host = decision.spectrum(to_host(gram), cutoff, max_rank)
    return Spectrum(put(host.singular_values), put(host.vectors), host.rank, put(host.coefficients), host.captured)


combine_rows = combine_kernel.combine


def combine(thetas: Rows, grads: Rows, info: StepInfo, *, out: Rows, compute: str) -> None:
    """Write θ_new of a step that the host decided to `out`, and in the record whether it is finite; waits."""
    record = jit.cupy().asarray(info.record)
    combine_kernel.combine(thetas, grads, weights_of(record), out=out, compute=compute, record=record)
    info.record[RESULT] = record.get()[RESULT]


def nonfinite_workers(*matrices: Rows) -> list[int]:
    """Return the workers with a NaN or an infinity in any of their rows."""
    finite = np.logical_and.reduce([finite_rows(rows).get() != 0 for rows in matrices])
    return np.flatnonzero(~finite).tolist()


# -- step ---------------------------------------------------------------------------------------------------


class DeviceRecord:
    """The record of a step in device memory: each look waits for the step and reads it."""

    def __init__(self, array: Any):
        self._array = array
        self._stream = jit.cupy().cuda.get_current_stream()  # held, or CuPy would destroy a stream of its own

    def get(self) -> np.ndarray:
        """Return a copy in host memory."""
        with self._array.device, self._stream:
            return self._array.get()


def fused(
    thetas: Rows, grads: Rows, lr: float, options: Options, out: Rows, *, products: str, sums: str
) -> StepInfo | None:
    """Enqueue a whole step of up to 64 workers without safeguards; None for any other.

    Nothing waits in between: `combine` sees the status of K on the device.  Unless NaN is to propagate, the step waits
    for its record at the end.
    """
    m, guarded = grads.m, not options.propagates
    if options.safeguards is not None or m > WORKER_LIMIT:
        return None
    gram = _plain_gram(grads, None, thetas if options.reads_thetas else None, products, memory.workspace)
    record = jit.cupy().empty(record_size(m))
    spectrum_kernel.spectrum(gram, lr, options, record)
    combine_kernel.combine(thetas, grads, weights_of(record), out=out, compute=sums, record=record, guarded=guarded)
    if jit.cupy().cuda.get_current_stream().is_capturing():
        memory.keep_for_graph(record)
    if not guarded:
        return StepInfo(DeviceRecord(record))
    info = StepInfo(record.get())
    if info.status == NOT_CONVERGED:
        info = decide(to_host(gram), lr, options)
        if info.status == GO:
            combine(thetas, grads, info, out=out, compute=sums)
    return info


# -- parts of K, for several processes ----------------------------------------------------------------------
#
# A process sends one part, laid out as Products: K, b, ‖ḡ‖² and the square of the floor over its own coordinates, which
# add up; then the same of ΘᵀΘ, then of ΘᵀG, where a step reads them.


def layout() -> tuple[str, str, int]:
    """Return what processes must agree on for their parts to be added."""
    return "cuda", jit.digest(), BLOCK


def places(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """Return the places of the parts that a process with blocks first … last−1 of `count` sends."""
    return [(first, 0)] if first < last else []


def part_size(m: int, options: Options) -> int:
    """Count the numbers in one part."""
    return (1 + options.reads_thetas + (options.safeguards is not None)) * Products.size(m)


def parts(grads: Rows, thetas: Rows | None, options: Options, compute: str, first: int, blocks: int) -> np.ndarray:
    """Compute the part of Rows that hold a process's own coordinates; shape (places, part_size)."""
    if grads.n == 0:
        return np.empty((0, part_size(grads.m, options)))
    gram = step_gram(thetas, grads, options, compute)
    values = [gram.matrix, gram.projection, gram.norm2, gram.floor**2]
    if thetas is not None:
        values += [gram.theta_matrix, np.zeros(grads.m + 1), gram.theta_floor**2]
    if options.safeguards is not None:
        values += [gram.cross_matrix, gram.cross_projection, np.zeros(2)]
    return np.concatenate([np.ravel(value) for value in values])[None]


def total(places: np.ndarray, parts: np.ndarray, m: int, dtype: str, options: Options) -> Gram:
    """Add up the Gram, from the parts of all processes in order."""
    sums = np.zeros(3 * Products.size(m))  # what a step does not read stays zero
    for part in parts:  # one after the other: the order decides the bits
        sums[: part.size] += part
    own, of_thetas, cross = (Products.of(values, m) for values in sums.reshape(3, -1))
    floors = math.sqrt(own.floor), math.sqrt(of_thetas.floor)
    return Gram(*own[:2], float(own.norm2), floors[0], of_thetas.matrix, cross.matrix, floors[1], cross.projection)
