"""Launch gram.cu: K and b, and with the parameters ΘᵀΘ, ΘᵀG and Θᵀḡ.

Up to common.WORKER_LIMIT workers a kernel multiplies, beyond that a BLAS.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cuda import common, jit, memory

JOINT_LIMIT = 48  # workers whose joint products fit the shared memory of compute capability 7.5

_UNROLLED_LIMIT = {"float32": 12, "float64": 8}  # workers whose products fit a thread's registers
_UNROLLED_THREADS = 128  # small blocks: little is idle when one ends before another
_PROJECT_THREADS = 512
_SIDE = 4  # of the products per thread, as in gram.cu
_LENGTH = 256  # coordinates per matrix product: terms of a float32 sum of the BLAS
_BATCH_BYTES = 16 << 20  # of centred rows: they stay in the L2 cache


class Products(NamedTuple):
    """What `project` writes, on the device: K (m, m), b (m,) and [zᵀz, 2·eps·‖mean‖]."""

    matrix: Any
    projection: Any
    scalars: Any

    @property
    def norm2(self) -> Any:
        return self.scalars[0:1].reshape(())

    @property
    def floor(self) -> Any:
        return self.scalars[1:2].reshape(())

    @classmethod
    def of(cls, values: Any, m: int) -> "Products":
        """Divide a vector of `size(m)` values among them."""
        return cls(values[: m * m].reshape(m, m), values[m * m : m * m + m], values[m * m + m :])

    @staticmethod
    def size(m: int) -> int:
        """Count the values for m workers."""
        return m * m + m + 2


# -- specialisation and launch shape ------------------------------------------------------------------------


def gram_macros(m: int, compute: str, with_z: bool) -> dict[str, Any]:
    """Return the macros that decide how the products of m workers are formed, and so the order of summation."""
    if m <= _UNROLLED_LIMIT[compute]:
        return {"KIND": "UNROLLED", "WITH_Z": int(with_z), "THREADS": _UNROLLED_THREADS}
    return _tiled("TILED", m + 1 + with_z, 64 if compute == "float32" else 32) | {"WITH_Z": int(with_z)}


def joint_macros(m: int) -> dict[str, Any]:
    """Return the same for the joint products, in float64."""
    return _tiled("JOINT", 2 * (m + 1), 16)


def _tiled(kind: str, rows: int, coordinates: int) -> dict[str, Any]:
    """Share the pairs of groups out over the threads and splits that leave the fewest threads idle."""
    pairs, quads = _pairs(rows), coordinates // _SIDE

    def utilisation(shape: tuple[int, int]) -> float:
        threads, splits = shape
        return pairs * splits / threads * quads / (-(-quads // splits) * splits)

    warps = -(-pairs // 32)
    thread_counts = range(max(128, 32 * warps), max(256, 32 * warps) + 1, 32)
    shapes = [(threads, splits) for threads in thread_counts for splits in range(1, threads // pairs + 1)]
    threads, splits = max(shapes, key=utilisation)
    return {"KIND": kind, "THREADS": threads, "SPLITS": splits, "COORDINATES": coordinates}


def _pairs(rows: int) -> int:
    return math.comb(-(-rows // _SIDE) + 1, 2)


def part_size(m: int, macros: dict[str, Any]) -> int:
    """Count the values in one block's part."""
    if macros["KIND"] == "UNROLLED":
        return m * (m + 1) // 2 + m + 1 + macros["WITH_Z"]
    rows = 2 * (m + 1) if macros["KIND"] == "JOINT" else m + 1 + macros["WITH_Z"]
    return _SIDE**2 * _pairs(rows)


# -- up to 64 workers ---------------------------------------------------------------------------------------


def gram(rows: Any, z: Any, *, compute: str, out: Products) -> None:
    """Write K, b (with z, or the mean where it is None) and the scalars; up to common.WORKER_LIMIT workers."""
    chosen = gram_macros(rows.m, compute, z is not None)
    macros, shift = common.row_macros(rows, compute, z, **chosen)
    arguments = (common.row_addresses(rows), memory.address(z), np.int64(rows.n), shift)
    parts, blocks = _launch("gram", macros, arguments, rows)
    _project(rows, chosen, parts, blocks, (0, 0), out)


def joint_gram(thetas: Any, grads: Any, *, of_thetas: Products, cross: Products, of_grads: Products) -> None:
    """Write ΘᵀΘ, ΘᵀG with Θᵀḡ, and K with b, from one pass in float64; up to JOINT_LIMIT workers."""
    m, chosen = grads.m, joint_macros(grads.m)
    macros, shift = common.row_macros(thetas, "float64", grads, **chosen)
    arguments = (common.row_addresses(thetas), common.row_addresses(grads), np.int64(grads.n), shift)
    parts, blocks = _launch("joint", macros, arguments, grads)
    for corner, out in (((0, 0), of_thetas), ((0, m + 1), cross), ((m + 1, m + 1), of_grads)):
        _project(grads, chosen, parts, blocks, corner, out)


def _launch(name: str, macros: dict[str, Any], arguments: tuple[Any, ...], rows: Any) -> tuple[Any, int]:
    """Launch a kernel that leaves one part per block; return the parts and the number of blocks."""
    size, threads = part_size(rows.m, macros), macros["THREADS"]
    shared = 0 if macros["KIND"] == "UNROLLED" else 8 * size
    tile = macros.get("COORDINATES", threads * 16 // rows.itemsize)
    kernel = jit.kernel("gram.cu", name, shared, **macros)
    blocks = jit.grid(kernel, threads, shared, -(-rows.n // tile))
    parts = memory.workspace("parts", size * blocks)
    kernel((blocks,), (threads,), (*arguments, parts), shared_mem=shared)
    return parts, blocks


def _project(
    rows: Any, chosen: dict[str, Any], parts: Any, blocks: int, corner: tuple[int, int], out: Products
) -> None:
    """Launch the kernel that adds the parts and projects the products in a corner of them by C."""
    shared = 8 * part_size(rows.m, chosen)
    own = {"STORAGE": DTYPES[rows.dtype].macro, "COMPUTE": "double", "M": rows.m, "WIDTH": 16, "SHIFTED": 0}
    own |= chosen | {"THREADS": _PROJECT_THREADS, "PROJECT": 1}
    kernel = jit.kernel("gram.cu", "project", shared, **own)
    arguments = (parts, np.int32(blocks), *map(np.int32, corner), *out)
    kernel((1,), (_PROJECT_THREADS,), arguments, shared_mem=shared)


# -- any number of workers ----------------------------------------------------------------------------------


def large_gram(rows: Any, z: Any, *, compute: str) -> Any:
    """Return the sums of products of the centred rows, their mean (and z), on the device; cuBLAS multiplies."""
    height = rows.m + 1 + (z is not None)
    total = jit.cupy().zeros((height, height), np.float64)
    for centred in _centred_batches(rows, z, compute):
        total += jit.cupy().matmul(centred, centred.transpose(0, 2, 1)).sum(axis=0, dtype=np.float64)
    return total


def large_cross(thetas: Any, grads: Any) -> Any:
    """Return ΘᵀG and, in the last column, Θᵀḡ (m, m + 1), on the device."""
    m = grads.m
    total = jit.cupy().zeros((m, m + 1), np.float64)
    batches = (_centred_batches(rows, None, "float64") for rows in (thetas, grads))
    for left, right in zip(*batches, strict=True):
        total += jit.cupy().matmul(left[:, :m], right.transpose(0, 2, 1)).sum(axis=0, dtype=np.float64)
    return total


def _centred_batches(rows: Any, z: Any, compute: str) -> Iterator[Any]:
    """Yield the centred rows, their mean (and z) as (batch, height, _LENGTH), in memory that the next batch reuses."""
    with_z = int(z is not None)
    height, items = rows.m + 1 + with_z, 16 // rows.itemsize
    macros, shift = common.row_macros(rows, compute, z, KIND="CENTRE", WITH_Z=with_z, THREADS=_LENGTH, LENGTH=_LENGTH)
    kernel = jit.kernel("gram.cu", "centre", **macros)
    tile = _LENGTH * items  # coordinates of one block
    blocks = _BATCH_BYTES // (height * tile * np.dtype(compute).itemsize)
    blocks = max(1, min(blocks, -(-rows.n // tile)))
    centred = jit.cupy().empty((blocks * items, height, _LENGTH), compute)
    addresses = common.row_addresses(rows)
    for start in range(0, rows.n, blocks * tile):
        arguments = (addresses, memory.address(z), np.int32(rows.m), np.int64(start), np.int64(rows.n), shift, centred)
        kernel((blocks,), (_LENGTH,), arguments)
        yield centred
