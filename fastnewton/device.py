"""The parts of the method on a CUDA device: up to 64 workers all of it is enqueued there, nothing waits.

Beyond, the m × m part runs as on the host, with the eigenproblem alone on the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from fastnewton import eigen
from fastnewton.arrays import Rows
from fastnewton.eigen import Gram, Spectrum
from fastnewton.info import StepInfo
from fastnewton.kernels import cuda
from fastnewton.kernels.cpu import BLOCK, RawGram, blocks  # noqa: F401  (the same blocks on both sides)
from fastnewton.kernels.record import GO, HEADER, NOT_CONVERGED, RESULT

# Memory that kernels may still be reading, where its library does not know of their stream and would use it again.
_in_use: list[tuple[Any, list[Any]]] = []


@contextmanager
def context(*given: Rows) -> Iterator[None]:
    """Make the arrays' device and the stream that their library works on current, and keep them until it is done."""
    cupy, like = cuda.cupy(), given[0]
    number = int(like.device.removeprefix("cuda:"))
    with cupy.cuda.Device(number), cupy.cuda.ExternalStream(like.stream, number) as stream:
        _in_use[:] = [entry for entry in _in_use if not entry[0].done]
        try:
            yield
        finally:
            if like.library not in ("cupy", "torch"):
                _in_use.append((stream.record(), [one.owner for one in given]))


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


def gram(grads: Rows, z: Rows | None, thetas: Rows | None, compute: str, *, cross: bool = True) -> Gram:
    """The Gram of checked input, in arrays of its own on the device."""
    m = grads.m
    if m > cuda.LIMIT:
        return _on_device(_large_gram(grads, z, thetas, compute, cross))
    empty = cuda.cupy().empty
    of_grads, of_thetas = (_products(empty(_size(m)), m) for _ in range(2))
    matrix = None
    if thetas is not None and cross:
        matrix = empty((m, m))
        cuda.cross(thetas, grads, compute="float64", matrix=matrix)
    return _measured(of_grads, of_thetas, grads, z, thetas, compute, matrix)


def _size(m: int) -> int:
    return m * m + m + 2


def _products(memory: Any, m: int) -> Products:
    return Products(memory[: m * m].reshape(m, m), memory[m * m : m * m + m], memory[m * m + m :])


def _measured(
    of_grads: Products, of_thetas: Products, grads: Rows, z: Rows | None, thetas: Rows | None, compute: str, cross: Any
) -> Gram:
    cuda.gram(grads, z, compute=compute, **of_grads._asdict())
    norm2, floor = (of_grads.scalars[k : k + 1].reshape(()) for k in range(2))
    if thetas is None:
        return Gram(of_grads.matrix, of_grads.projection, norm2, floor)
    # ΘᵀΘ is for the step length, whose smallest directions products in float32 would lose.
    cuda.gram(thetas, None, compute="float64", **of_thetas._asdict())
    theta_floor = of_thetas.scalars[1:2].reshape(())
    return Gram(of_grads.matrix, of_grads.projection, norm2, floor, of_thetas.matrix, cross, theta_floor)


def _large_gram(grads: Rows, z: Rows | None, thetas: Rows | None, compute: str, cross: bool) -> Gram:
    """The Gram of any number of workers, on the host."""
    raw = RawGram(grads.m, cuda.large_gram(grads, z, compute=compute).get())
    if thetas is not None:
        raw = raw._replace(of_thetas=cuda.large_gram(thetas, None, compute="float64").get())
    if thetas is not None and cross:
        raw = raw._replace(cross=cuda.large_cross(thetas, grads).get())
    return eigen.projected(raw, grads.dtype)


def _on_device(found: Gram) -> Gram:
    """The same with arrays on the device."""
    put = cuda.cupy().asarray
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return Gram(**{name: None if value is None else put(value) for name, value in values.items()})


def _on_host(found: Gram) -> Gram:
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return Gram(**{name: _host_value(value) for name, value in values.items()})


def _host_value(value: Any) -> Any:
    if value is None or isinstance(value, (float, np.ndarray)):
        return value
    return value.get() if value.ndim else float(value.get())


# -- spectrum, combine --------------------------------------------------------------------------------------


def spectrum(gram: Gram, cutoff: float, max_rank: int | None) -> Spectrum:
    """As `fastnewton.spectrum`, with the arrays on the device; waits for the rank."""
    cupy = cuda.cupy()
    m = gram.projection.size
    if m <= cuda.LIMIT:
        record, vectors = cupy.empty(HEADER + 2 * m), cupy.empty((m, m))
        cuda.spectrum(
            gram, cutoff=cutoff, max_rank=max_rank, lr=0.0, lr_rest=None, lr_cap=None, record=record, vectors=vectors
        )
        info = StepInfo(record.get())
        if info.status != NOT_CONVERGED:
            sigma, c = record[HEADER : HEADER + m], record[HEADER + m :]
            return Spectrum(sigma, vectors, info.rank, c, info.captured)
    found = eigen.spectrum(_on_host(gram), cutoff, max_rank, _eigh)
    put = cupy.asarray
    return Spectrum(put(found.singular_values), put(found.vectors), found.rank, put(found.coefficients), found.captured)


def _eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    squares, vectors = cuda.cupy().linalg.eigh(cuda.cupy().asarray(matrix))
    return squares.get(), vectors.get()


def combine(
    thetas: Rows, grads: Rows, coefficients: Any, *, tau: float, beta: float, z: Rows | None, out: Rows, compute: str
) -> None:
    """θ̄ − τΘc − β(ḡ − Gc), or z + (Θ − G)c, written to `out`."""
    cuda.combine(thetas, grads, coefficients, tau=tau, beta=beta, z=z, out=out, compute=compute)


# -- step ---------------------------------------------------------------------------------------------------


def attempt(thetas: Rows, grads: Rows, lr: float, options: Any, out: Rows, *, products: str, sums: str) -> StepInfo:
    """A step with products and sums in those types; unless NaN is to propagate, only a finite K is acted upon."""
    cupy = cuda.cupy()
    m, guarded = grads.m, options.nonfinite != "propagate"
    measured = thetas if options.lr_cap == "curvature" else None
    if m > cuda.LIMIT:
        return _decided_on_host(
            _large_gram(grads, None, measured, products, False), thetas, grads, lr, options, out, sums
        )
    of_grads, of_thetas = (_products(cuda.workspace(name, _size(m)), m) for name in ("grads", "thetas"))
    found = _measured(of_grads, of_thetas, grads, None, measured, products, None)
    record = cupy.empty(HEADER + 2 * m)
    settings = {
        "cutoff": options.cutoff,
        "max_rank": options.max_rank,
        "lr_rest": options.lr_rest,
        "lr_cap": options.lr_cap,
    }
    cuda.spectrum(found, lr=lr, record=record, **settings)
    cuda.combine(thetas, grads, record[HEADER + m :], out=out, compute=sums, record=record, guarded=guarded)
    if cupy.cuda.get_current_stream().is_capturing():
        cuda.keep(record)
    if not guarded:
        return StepInfo(Record(record, grads._replace(owner=None)))
    info = StepInfo(record.get())
    if info.status == NOT_CONVERGED:
        return _decided_on_host(_on_host(found), thetas, grads, lr, options, out, sums)
    return info


def _decided_on_host(
    found: Gram, thetas: Rows, grads: Rows, lr: float, options: Any, out: Rows, compute: str
) -> StepInfo:
    info = eigen.decide(found, lr, options, _eigh)
    if info.status == GO or options.nonfinite == "propagate":
        finish(thetas, grads, info, out, compute)
    return info


def finish(thetas: Rows, grads: Rows, info: StepInfo, out: Rows, compute: str) -> None:
    """Write θ_new to `out`, and in the record whether it is finite; waits."""
    record = cuda.cupy().asarray(info.record)
    cuda.combine(thetas, grads, record[(HEADER + record.size) // 2 :], out=out, compute=compute, record=record)
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


def part_size(m: int, with_thetas: bool) -> int:
    """Numbers in one part."""
    return (1 + with_thetas) * _size(m)


def parts(grads: Rows, thetas: Rows | None, compute: str, first: int, last: int) -> np.ndarray:
    """The parts of those places (places, size)."""
    if first == last:
        return np.empty((0, part_size(grads.m, thetas is not None)))
    start = first * BLOCK
    own = [rows.part(start, min(last * BLOCK, rows.n) - start) for rows in (grads, thetas) if rows is not None]
    found = _on_host(gram(own[0], None, own[1] if thetas is not None else None, compute, cross=False))
    values = [*found.matrix.ravel(), *found.projection, found.norm2, found.floor**2]
    if thetas is not None:
        values += [*found.theta_matrix.ravel(), *np.zeros(grads.m + 1), found.theta_floor**2]
    return np.array([values])


def total(places: np.ndarray, parts: np.ndarray, m: int, dtype: str, with_thetas: bool) -> Gram:
    """The Gram, from the parts of all processes in order."""
    sums = np.zeros(part_size(m, with_thetas))
    for part in parts:  # one after the other: the order is what makes the bits
        sums += part
    of_grads = _products(sums[: _size(m)], m)
    norm2, floor2 = of_grads.scalars
    if not with_thetas:
        return Gram(of_grads.matrix, of_grads.projection, float(norm2), float(np.sqrt(floor2)))
    of_thetas = _products(sums[_size(m) :], m)
    theta_floor = float(np.sqrt(of_thetas.scalars[1]))
    return Gram(
        of_grads.matrix, of_grads.projection, float(norm2), float(np.sqrt(floor2)), of_thetas.matrix, None, theta_floor
    )
