"""The parts of the method on a CUDA device: up to 64 workers all of it is enqueued there, nothing waits.

Beyond, the m × m part runs as on the host, with the eigenproblem alone on the device.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from fastnewton import decision
from fastnewton.arrays import Rows
from fastnewton.arrays.cuda import context
from fastnewton.decision import decide
from fastnewton.kernels.cpu.gram import RawGram
from fastnewton.kernels.cpu.tree import BLOCK, blocks  # noqa: F401  (the same blocks on both sides)
from fastnewton.kernels.cuda import launch as cuda
from fastnewton.kernels.record import GO, HEADER, NOT_CONVERGED, RESULT
from fastnewton.results import Gram, Spectrum, StepInfo, record_size, to_host, weights_of


class Record(NamedTuple):
    """The record of a step on its device, and the stream that writes it."""

    array: Any
    like: Rows

    def get(self) -> np.ndarray:
        """Wait for the step, and read."""
        with context(self.like):
            return self.array.get()


# -- gram ---------------------------------------------------------------------------------------------------


class Products(NamedTuple):
    """What `kernels/cuda.py` writes of one array: K, b, and [zᵀz, 2·eps·‖mean‖]."""

    matrix: Any
    projection: Any
    scalars: Any


def gram(grads: Rows, z: Rows | None, thetas: Rows | None, compute: str) -> Gram:
    """The Gram of checked input, in arrays of its own on the device."""
    m = grads.m
    if m > cuda.LIMIT:
        return _on_device(_large_gram(grads, z, thetas, compute, cross=True))
    found = _measured(*_new_products(m, 2), grads, z, None, compute)
    if thetas is None:
        return found
    own = {name: getattr(found, name) for name in ("matrix", "projection", "norm2", "floor")}
    return dataclasses.replace(_joint_gram(thetas, grads), **own)


def _joint_gram(thetas: Rows, grads: Rows) -> Gram:
    """The Gram with all products in float64, in arrays of its own on the device."""
    m = grads.m
    if m > cuda.JOINT_LIMIT:
        return _on_device(_large_gram(grads, None, thetas, "float64", cross=True))
    of_thetas, cross, of_grads = _new_products(m, 3)
    cuda.joint(thetas, grads, of_thetas=of_thetas, cross=cross, of_grads=of_grads)
    theta_floor = of_thetas.scalars[1:2].reshape(())
    return Gram(*_parted(of_grads), of_thetas.matrix, cross.matrix, theta_floor, cross.projection)


def _size(m: int) -> int:
    return m * m + m + 2


def _new_products(m: int, count: int) -> list[Products]:
    return [_products(cuda.cupy().empty(_size(m)), m) for _ in range(count)]


def _parted(found: Products) -> tuple[Any, Any, Any, Any]:
    """K, b, zᵀz and the floor."""
    return found.matrix, found.projection, *(found.scalars[k : k + 1].reshape(()) for k in range(2))


def _products(memory: Any, m: int) -> Products:
    return Products(memory[: m * m].reshape(m, m), memory[m * m : m * m + m], memory[m * m + m :])


def _measured(
    of_grads: Products, of_thetas: Products, grads: Rows, z: Rows | None, thetas: Rows | None, compute: str
) -> Gram:
    cuda.gram(grads, z, compute=compute, **of_grads._asdict())
    if thetas is None:
        return Gram(*_parted(of_grads))
    # ΘᵀΘ is for the step length, whose smallest directions products in float32 would lose.
    cuda.gram(thetas, None, compute="float64", **of_thetas._asdict())
    return Gram(*_parted(of_grads), of_thetas.matrix, None, of_thetas.scalars[1:2].reshape(()))


def _large_gram(grads: Rows, z: Rows | None, thetas: Rows | None, compute: str, cross: bool) -> Gram:
    """The Gram of any number of workers, on the host."""
    raw = RawGram(grads.m, cuda.large_gram(grads, z, compute=compute).get())
    if thetas is not None:
        raw = raw._replace(of_thetas=cuda.large_gram(thetas, None, compute="float64").get())
    if thetas is not None and cross:
        raw = raw._replace(cross=cuda.large_cross(thetas, grads).get())
    return decision.project(raw, grads.dtype)


def _on_device(found: Gram) -> Gram:
    """The same with arrays on the device."""
    put = cuda.cupy().asarray
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return Gram(**{name: None if value is None else put(value) for name, value in values.items()})


# -- spectrum, combine --------------------------------------------------------------------------------------


def spectrum(gram: Gram, cutoff: float, max_rank: int | None) -> Spectrum:
    """As `fastnewton.spectrum`, with the arrays on the device; waits for the rank."""
    cupy = cuda.cupy()
    m = gram.projection.size
    if m <= cuda.LIMIT:
        record, vectors = cupy.empty(record_size(m)), cupy.empty((m, m))
        cuda.spectrum(
            gram, cutoff=cutoff, max_rank=max_rank, lr=0.0, lr_rest=None, lr_cap=None, record=record, vectors=vectors
        )
        info = StepInfo(record.get())
        if info.status != NOT_CONVERGED:
            sigma, c = record[HEADER : HEADER + m], weights_of(record)[m:]
            return Spectrum(sigma, vectors, info.rank, c, info.captured)
    found = decision.spectrum(to_host(gram), cutoff, max_rank)
    put = cupy.asarray
    return Spectrum(put(found.singular_values), put(found.vectors), found.rank, put(found.coefficients), found.captured)


def combine_rows(
    thetas: Rows, grads: Rows, coefficients: Any, *, tau: float, beta: float, z: Rows | None, out: Rows, compute: str
) -> None:
    """θ̄ − τΘc − β(ḡ − Gc), or z + (Θ − G)c, written to `out`."""
    cuda.combine(thetas, grads, coefficients, tau=tau, beta=beta, z=z, out=out, compute=compute)


# -- step -----------------------------------------------------------------------------------------------------------


def fused(
    thetas: Rows, grads: Rows, lr: float, options: Any, out: Rows, *, products: str, sums: str
) -> StepInfo | None:
    """Enqueue a whole step of up to 64 workers without safeguards; None for any other."""
    cupy = cuda.cupy()
    m, guarded = grads.m, not options.propagates
    if options.safeguards is not None or m > cuda.LIMIT:
        return None
    of_grads, of_thetas = (_products(cuda.workspace(name, _size(m)), m) for name in ("grads", "thetas"))
    measured = thetas if options.lr_cap == "curvature" else None
    gram = _measured(of_grads, of_thetas, grads, None, measured, products)
    record = cupy.empty(record_size(m))
    settings = {
        "cutoff": options.cutoff,
        "max_rank": options.max_rank,
        "lr_rest": options.lr_rest,
        "lr_cap": options.lr_cap,
    }
    cuda.spectrum(gram, lr=lr, record=record, **settings)
    cuda.combine(thetas, grads, weights_of(record), out=out, compute=sums, record=record, guarded=guarded)
    if cupy.cuda.get_current_stream().is_capturing():
        cuda.keep(record)
    if not guarded:
        stream = cupy.cuda.get_current_stream()  # kept, since CuPy destroys a stream of its own that nobody holds
        return StepInfo(Record(record, grads._replace(owner=stream)))
    info = StepInfo(record.get())
    if info.status == NOT_CONVERGED:
        info = decide(to_host(gram), lr, options)
        if info.status == GO:
            combine(thetas, grads, info, out=out, compute=sums)
    return info


def step_gram(thetas: Rows, grads: Rows, options: Any, compute: str) -> Gram:
    """Form the Gram that a step with these options is decided from, on the host."""
    if options.safeguards is not None:
        return to_host(_joint_gram(thetas, grads))
    return _large_gram(grads, None, thetas if options.reads_thetas else None, compute, cross=False)


def combine(thetas: Rows, grads: Rows, info: StepInfo, *, out: Rows, compute: str) -> None:
    """Write θ_new of a decided step to `out`, and in the record whether it is finite; waits."""
    record = cuda.cupy().asarray(info.record)
    cuda.combine(thetas, grads, weights_of(record), out=out, compute=compute, record=record)
    info.record[RESULT] = record.get()[RESULT]


def nonfinite_workers(*matrices: Rows) -> list[int]:
    """The workers with a NaN or an infinity in any of their rows."""
    finite = np.logical_and.reduce([cuda.finite_rows(given).get() != 0 for given in matrices])
    return np.flatnonzero(~finite).tolist()


# -- parts of K, for several processes ----------------------------------------------------------------------
#
# A process sends one part, the projected sums over its own coordinates: K, b, ‖ḡ‖² and the square of the floor add up.


def layout() -> tuple[str, str, int]:
    """What ranks must agree on for their parts to be added."""
    return "cuda", cuda.digest(), BLOCK


def places(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """Which parts a process sends that has blocks first … last−1 of so many."""
    return [(first, 0)] if first < last else []


def part_size(m: int, options: Any) -> int:
    """Numbers in one part."""
    return (1 + options.reads_thetas + (options.safeguards is not None)) * _size(m)


def parts(grads: Rows, thetas: Rows | None, options: Any, compute: str, first: int, last: int) -> np.ndarray:
    """The parts of those places (places, size)."""
    if first == last:
        return np.empty((0, part_size(grads.m, options)))
    start = first * BLOCK
    own = [rows and rows.part(start, min(last * BLOCK, rows.n) - start) for rows in (grads, thetas)]
    found = to_host(_part_of_gram(*own, options, compute))
    values = [*found.matrix.ravel(), *found.projection, found.norm2, found.floor**2]
    if thetas is not None:
        values += [*found.theta_matrix.ravel(), *np.zeros(grads.m + 1), found.theta_floor**2]
    if options.safeguards is not None:
        values += [*found.cross_matrix.ravel(), *found.cross_projection, 0, 0]
    return np.array([values])


def _part_of_gram(grads: Rows, thetas: Rows | None, options: Any, compute: str) -> Gram:
    if options.safeguards is not None:
        return _joint_gram(thetas, grads)
    if grads.m > cuda.LIMIT:
        return _large_gram(grads, None, thetas, compute, cross=False)
    return _measured(*_new_products(grads.m, 2), grads, None, thetas, compute)


def total(places: np.ndarray, parts: np.ndarray, m: int, dtype: str, options: Any) -> Gram:
    """The Gram, from the parts of all processes in order."""
    sums = np.zeros((3, _size(m)))  # what was not measured stays zero
    for part in parts:  # one after the other: the order is what makes the bits
        sums.ravel()[: part.size] += part
    of_grads, of_thetas, cross = (_products(row, m) for row in sums)
    (norm2, floor2), (_, theta_floor2) = of_grads.scalars.tolist(), of_thetas.scalars.tolist()
    of_both = of_thetas.matrix, cross.matrix, math.sqrt(theta_floor2), cross.projection
    return Gram(of_grads.matrix, of_grads.projection, norm2, math.sqrt(floor2), *of_both)
