"""The passes on a CUDA device: compiles the .cu files through CuPy and launches them on the current stream.

Kernels are specialised by macros and cached on disk by CuPy.  Its cache does not look into included files, so that a
digest of all sources is one of the options.
"""

import hashlib
import math
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu import workspace as host_workspace

FOLDER = Path(__file__).parent
LIMIT = 64  # workers up to which the kernels do all the work; beyond, a BLAS multiplies and cuSOLVER diagonalises
JOINT_LIMIT = 48  # of the joint Gram, for its products to fit the shared memory of compute capability 7.5
STRAIGHT = {"float32": 12, "float64": 8}  # workers whose products fit into a thread's registers
CAPS = (None, "sigma", "curvature")

_SIDE = 4
_STREAM_THREADS = 128  # small blocks leave little idle when one ends before another
_FINISH_THREADS = 512
_BLOCK_THREADS = 256  # of the eigenproblem above 32 workers; more would spill registers
_LENGTH = 256  # terms of a float32 sum that a BLAS forms
_CHUNK_BYTES = 16 << 20  # of centred rows: they stay in the L2 cache


class Shape(NamedTuple):
    """How a tiled product is laid over a block."""

    threads: int
    splits: int


@cache
def cupy() -> ModuleType:
    """CuPy, where it and a device are there; an error that says what to install, otherwise."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            "arrays on a CUDA device need CuPy; pip install 'fastnewton[cuda13]' (or [cuda12], as the driver supports)"
        ) from error
    if not cupy.cuda.is_available():
        raise RuntimeError(
            "CuPy finds no CUDA device, or a driver that is too old for its CUDA; see nvidia-smi; for a driver "
            "of CUDA 12 pip install 'fastnewton[cuda12]' in place of [cuda13]"
        )
    return cupy


# -- compiling ----------------------------------------------------------------------------------------------


@cache
def digest() -> str:
    """Of all the sources."""
    found = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def options(**macros: Any) -> tuple[str, ...]:
    """What the compiler is told."""
    given = (f"-D{name}={value}" for name, value in sorted(macros.items()))
    return ("-std=c++17", f"-I{FOLDER}", f"-DSOURCES=0x{digest()}", *given)


@cache
def _kernel(device: int, file: str, name: str, shared: int, given: tuple[str, ...]) -> Any:
    module = cupy().RawModule(code=(FOLDER / file).read_text(), options=given)
    kernel = module.get_function(name)
    if shared:  # without being asked for, 48 KiB are the limit of this and the kernel's own arrays together
        kernel.max_dynamic_shared_size_bytes = shared
    return kernel


def _compiled(file: str, name: str, shared: int = 0, **macros: Any) -> Any:
    return _kernel(cupy().cuda.Device().id, file, name, shared, options(**macros))


@cache
def _resident(device: int, kernel: Any, threads: int, shared: int) -> int:
    """Blocks of a kernel that the device holds at once."""
    driver = cupy().cuda.driver
    each = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.kernel.ptr, threads, shared)
    return max(1, each) * cupy().cuda.Device(device).attributes["MultiProcessorCount"]


def _grid(kernel: Any, threads: int, shared: int, pieces: int) -> int:
    return max(1, min(pieces, _resident(cupy().cuda.Device().id, kernel, threads, shared)))


# -- workspaces ---------------------------------------------------------------------------------------------

_workspaces: dict[tuple, Any] = {}


def workspace(purpose: str, size: int) -> Any:
    """Float64 memory that this thread keeps for a purpose on a stream: later work there waits its turn, so that it may
    be reused."""
    stream = cupy().cuda.get_current_stream()
    key = (cupy().cuda.Device().id, stream.ptr, threading.get_ident(), purpose, size)
    if key not in _workspaces:
        _workspaces[key] = cupy().empty(size, np.float64)
    return _workspaces[key]


def keep(array: Any) -> None:
    """Hold an array that a graph being captured will write to, until `clear_caches`."""
    _workspaces[(cupy().cuda.Device().id, "captured", id(array))] = array


def clear_caches() -> None:
    """Release the memory that is kept between calls, on devices too, where captured graphs write to it: none may be
    replayed afterwards."""
    host_workspace.release()
    _workspaces.clear()


# -- host memory --------------------------------------------------------------------------------------------


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Page-locked host memory, which the device copies to and from at full speed."""
    count = math.prod(shape)
    page = cupy().cuda.alloc_pinned_memory(max(1, count * np.dtype(dtype).itemsize))
    return np.frombuffer(page, dtype, count).reshape(shape)


def fetch(one: Any, target: np.ndarray) -> Any:
    """Begin to copy a vector to pinned memory; an event to wait for."""
    runtime, stream = cupy().cuda.runtime, cupy().cuda.get_current_stream()
    runtime.memcpyAsync(target.ctypes.data, _address(one), target.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
    return stream.record()


def view(one: Any, word: Any) -> Any:
    """A vector on the device as CuPy's array; the vector's owner must outlive it."""
    block = cupy().cuda.UnownedMemory(_address(one), one.n * one.itemsize, one.owner, cupy().cuda.Device().id)
    return cupy().ndarray((one.n,), word, cupy().cuda.MemoryPointer(block, 0))


def written(source: np.ndarray, one: Any) -> None:
    """Copy pinned memory to a vector, and wait for it."""
    runtime, stream = cupy().cuda.runtime, cupy().cuda.get_current_stream()
    runtime.memcpyAsync(_address(one), source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, stream.ptr)
    stream.synchronize()


def sent(source: np.ndarray) -> Any:
    """An array on the device with what pinned memory holds; the memory must stay as it is until the stream is done."""
    runtime, stream = cupy().cuda.runtime, cupy().cuda.get_current_stream()
    array = cupy().empty(source.shape, source.dtype)
    runtime.memcpyAsync(array.data.ptr, source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, stream.ptr)
    return array


# -- launch arguments ---------------------------------------------------------------------------------------


def _table(rows: Any) -> Any:
    """Addresses by value, or in device memory where there are too many."""
    if rows.m <= LIMIT:
        return np.void(rows.table.astype(np.uint64).tobytes())  # CuPy takes no array of more than one item by value
    return cupy().asarray(rows.table.astype(np.uint64))


def _address(one: Any) -> int:
    return 0 if one is None else int(one.table[0])


def alignment(addresses: np.ndarray) -> tuple[int, int, int]:
    """WIDTH, SHIFTED and shift: sixteen bytes at a time where all rows are alike, else what suits every row."""
    past = addresses % 16
    if (past == past[0]).all():
        return 16, int(past[0] > 0), int(past[0])
    every = int(np.bitwise_or.reduce(past))
    return every & -every, 0, 0


def _macros(rows: Any, compute: str, tables: list[np.ndarray], **more: Any) -> tuple[dict[str, Any], np.int32]:
    width, shifted, shift = alignment(np.concatenate(tables))
    macros = {
        "STORAGE": DTYPES[rows.dtype].macro,
        "COMPUTE": DTYPES[compute].c_name,
        "M": rows.m if rows.m <= LIMIT else 0,
        "WIDTH": width,
        "SHIFTED": shifted,
    }
    return macros | more, np.int32(shift)


# -- gram ---------------------------------------------------------------------------------------------------


def shape_of_tiles(pairs: int, coordinates: int) -> Shape:
    """The threads and splits that leave the fewest threads idle, pairs of tiles being shared out evenly."""

    def busy(shape: Shape) -> float:
        quads = coordinates // _SIDE
        turns = -(-quads // shape.splits)
        return pairs * shape.splits / shape.threads * quads / (turns * shape.splits)

    threads = range(max(128, -(-pairs // 32) * 32), max(256, -(-pairs // 32) * 32) + 1, 32)
    shapes = [Shape(t, s) for t in threads for s in range(1, t // pairs + 1)]
    return max(shapes, key=busy)


def gram_kind(m: int, compute: str, with_z: bool) -> dict[str, Any]:
    """The macros that decide how the products of m workers are formed, and hence their order."""
    if m <= STRAIGHT[compute]:
        return {"KIND": "STRAIGHT", "WITH_Z": int(with_z), "THREADS": _STREAM_THREADS}
    tiles = -(-(m + 1 + with_z) // _SIDE)
    pairs, coordinates = math.comb(tiles + 1, 2), 64 if compute == "float32" else 32
    shape = shape_of_tiles(pairs, coordinates)
    return {
        "KIND": "TILED",
        "WITH_Z": int(with_z),
        "THREADS": shape.threads,
        "SPLITS": shape.splits,
        "COORDINATES": coordinates,
    }


def joint_kind(m: int) -> dict[str, Any]:
    """As `gram_kind`, for the products of Θ, θ̄, G and ḡ in float64."""
    coordinates = 16
    shape = shape_of_tiles(math.comb(-(-2 * (m + 1) // _SIDE) + 1, 2), coordinates)
    return {"KIND": "JOINT", "THREADS": shape.threads, "SPLITS": shape.splits, "COORDINATES": coordinates}


def products(m: int, kind: dict[str, Any]) -> int:
    """Numbers in one block's part."""
    if kind["KIND"] == "STRAIGHT":
        return m * (m + 1) // 2 + m + 1 + kind["WITH_Z"]
    rows = 2 * (m + 1) if kind["KIND"] == "JOINT" else m + 1 + kind["WITH_Z"]
    return _SIDE**2 * math.comb(-(-rows // _SIDE) + 1, 2)


def gram(rows: Any, z: Any, *, compute: str, matrix: Any, projection: Any, scalars: Any) -> None:
    """Write K (m, m), b (m,) and [zᵀz, 2·eps·‖ḡ‖] of up to 64 workers."""
    kind = gram_kind(rows.m, compute, z is not None)
    macros, shift = _macros(rows, compute, [rows.table] if z is None else [rows.table, z.table], **kind)
    arguments = (_table(rows), _address(z), np.int64(rows.n), shift)
    parts, blocks = _parts("gram", macros, arguments, rows)
    _finish(rows, kind, parts, blocks, (0, 0), (matrix, projection, scalars))


def joint(thetas: Any, grads: Any, *, of_thetas: Any, cross: Any, of_grads: Any) -> None:
    """Write, as `gram` does, ΘᵀΘ, ΘᵀG with Θᵀḡ, and K with b of up to JOINT_LIMIT workers, from one pass."""
    m, kind = grads.m, joint_kind(grads.m)
    macros, shift = _macros(grads, "float64", [thetas.table, grads.table], **kind)
    arguments = (_table(thetas), _table(grads), np.int64(grads.n), shift)
    parts, blocks = _parts("joint", macros, arguments, grads)
    for corner, target in (((0, 0), of_thetas), ((0, m + 1), cross), ((m + 1, m + 1), of_grads)):
        _finish(grads, kind, parts, blocks, corner, target)


def _parts(name: str, macros: dict[str, Any], arguments: tuple, rows: Any) -> tuple[Any, int]:
    """Launch a kernel that leaves a part for each block."""
    count = products(rows.m, macros)
    shared = 0 if macros["KIND"] == "STRAIGHT" else 8 * count
    threads = macros["THREADS"]
    stretch = macros.get("COORDINATES", threads * 16 // rows.itemsize)
    kernel = _compiled("gram.cu", name, shared, **macros)
    blocks = _grid(kernel, threads, shared, -(-rows.n // stretch))
    parts = workspace("parts", count * blocks)
    kernel((blocks,), (threads,), (*arguments, parts), shared_mem=shared)
    return parts, blocks


def _finish(
    rows: Any, kind: dict[str, Any], parts: Any, blocks: int, corner: tuple[int, int], target: tuple[Any, Any, Any]
) -> None:
    macros, _ = _macros(rows, "float64", [np.zeros(1, np.int64)], **kind | {"THREADS": _FINISH_THREADS})
    shared = 8 * products(rows.m, kind)
    kernel = _compiled("spectrum.cu", "finish", shared, **macros)
    arguments = (parts, np.int32(blocks), *map(np.int32, corner), *target)
    kernel((1,), (_FINISH_THREADS,), arguments, shared_mem=shared)


def large_gram(rows: Any, z: Any, *, compute: str) -> Any:
    """The sums of products of the centred rows, ḡ (and z) of any number of workers, on the device.

    Through cuBLAS, which the tests replace by NumPy: this way has not been verified on hardware.
    """
    height = rows.m + 1 + (z is not None)
    total = cupy().zeros((height, height), np.float64)
    for centred in _centred(rows, z, compute):
        total += cupy().matmul(centred, centred.transpose(0, 2, 1)).sum(axis=0, dtype=np.float64)
    return total


def large_cross(thetas: Any, grads: Any) -> Any:
    """ΘᵀG and, in the last column, Θᵀḡ (m, m + 1) of any number of workers, on the device."""
    m = grads.m
    total = cupy().zeros((m, m + 1), np.float64)
    for left, right in zip(_centred(thetas, None, "float64"), _centred(grads, None, "float64"), strict=True):
        total += cupy().matmul(left[:, :m], right.transpose(0, 2, 1)).sum(axis=0, dtype=np.float64)
    return total


def _centred(rows: Any, z: Any, compute: str) -> Iterator[Any]:
    """The centred rows, their mean (and z), stretch by stretch as (batch, height, _LENGTH) in memory that is reused."""
    with_z = int(z is not None)
    height, group = rows.m + 1 + with_z, 16 // rows.itemsize
    tables = [rows.table] if z is None else [rows.table, z.table]
    macros, shift = _macros(rows, compute, tables, KIND="CENTRE", WITH_Z=with_z, THREADS=_LENGTH, LENGTH=_LENGTH)
    kernel = _compiled("gram.cu", "centre", **macros)
    step = _LENGTH * group  # coordinates of one block
    fitting = _CHUNK_BYTES // (height * step * np.dtype(compute).itemsize)
    blocks = max(1, min(fitting, -(-rows.n // step)))
    centred = cupy().empty((blocks * group, height, _LENGTH), compute)
    table = _table(rows)
    for first in range(0, rows.n, blocks * step):
        arguments = (table, _address(z), np.int32(rows.m), np.int64(first), np.int64(rows.n), shift, centred)
        kernel((blocks,), (_LENGTH,), arguments)
        yield centred


# -- spectrum -----------------------------------------------------------------------------------------------


def spectrum_shape(m: int) -> tuple[int, int]:
    """Threads and bytes of shared memory of the eigenproblem."""
    even = m + m % 2
    return 32 if m <= 32 else _BLOCK_THREADS, 8 * (even * (even + 1) // 2 + even * even)


def spectrum(
    gram: Any, *, cutoff: float, max_rank: int | None, lr: float, lr_rest, lr_cap, record, vectors=None
) -> None:
    """Write the record of a step, and V (m, m) where wanted; gram holds arrays on the device."""
    m = gram.projection.size
    threads, shared = spectrum_shape(m)
    kernel = _compiled(
        "spectrum.cu", "spectrum", shared, KIND="SPECTRUM", M=m, THREADS=threads,
        STORAGE="FLOAT64", COMPUTE="double", WIDTH=8, SHIFTED=0,
    )  # fmt: skip
    scratch = workspace("scratch", m * m) if lr_cap == "curvature" else None
    theta_floor = None if gram.theta_matrix is None else gram.theta_floor
    limit = m if max_rank is None else min(m, max_rank)
    arguments = (
        gram.matrix, gram.projection, gram.norm2, gram.floor, gram.theta_matrix, theta_floor,
        np.float64(cutoff), np.int32(limit), np.float64(lr), np.float64(math.nan if lr_rest is None else lr_rest),
        np.int32(CAPS.index(lr_cap)), record, vectors, scratch,
    )  # fmt: skip
    kernel((1,), (threads,), arguments, shared_mem=shared)


# -- combine ------------------------------------------------------------------------------------------------


def combine(
    thetas, grads, c, *, tau=0.0, beta=0.0, z=None, out, compute: str, record=None, guarded: bool = False
) -> None:
    """Write the combination to `out`, with c (m,) or two of them for Θ and G.

    τ and β come from the record where there is one, which then takes the verdict.
    """
    tables = [thetas.table, grads.table] if z is None else [thetas.table, grads.table, z.table]
    threads = _STREAM_THREADS * 2
    macros, shift = _macros(thetas, compute, tables, WITH_Z=int(z is not None), THREADS=threads)
    kernel = _compiled("combine.cu", "combine", **macros)
    stretch = threads * 16 // thetas.itemsize
    if thetas.n == 0:
        return
    blocks = _grid(kernel, threads, 0, -(-thetas.n // stretch))
    wide = np.int32(_address(out) % 16 == 0)
    arguments = (
        _table(thetas), _table(grads), _address(z), _address(out), np.int32(thetas.m), np.int64(thetas.n), shift, wide,
        c, np.int32(c.size - thetas.m), np.float64(tau), np.float64(beta), record, np.int32(guarded),
    )  # fmt: skip
    kernel((blocks,), (threads,), arguments)


def finite_rows(rows: Any) -> Any:
    """Whether each of the rows is finite: (m,) int32 on the device."""
    found = cupy().ones(rows.m, np.int32)
    wide_enough = "float64" if rows.dtype == "float64" else "float32"
    macros, shift = _macros(rows, wide_enough, [rows.table], THREADS=_STREAM_THREADS)
    kernel = _compiled("finite.cu", "finite", **macros)
    stretch = _STREAM_THREADS * 16 // rows.itemsize
    blocks = min(-(-rows.n // stretch), 1024)
    if blocks:
        kernel((blocks, rows.m), (_STREAM_THREADS,), (_table(rows), np.int64(rows.n), shift, found))
    return found
