"""What this machine can do: how fast it reads memory, and how fast it multiplies matrices.

Both are tasks that a benchmark times in turn with what it measures, because a shared machine changes from
second to second.  Memory is read by all cores, in a few ways; the fastest of them here is the ceiling.
"""

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numba
import numpy as np

from bench import timing
from fastnewton.arrays import allocate

READ_BYTES = 1 << 29  # twice that length is read no slower (on 2 cores): compare.own_cache
STREAMS = 8
GEMM_SIZE = 1536
LIBRARIES = ("numpy", "numba", "scipy", "torch", "jax", "mpi4py")


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def machine() -> dict:
    """What a reader has to know about the machine behind the figures; load is that before the run."""
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES if find_spec(name)},
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    }


# Integers, because their sums may be reordered, and so vectorised, without further leave.
@numba.njit(nogil=True)
def _sum_of_1(words):
    total = 0
    for value in words:
        total += value
    return total


@numba.njit(nogil=True)
def _sum_of_8(words):
    size = words.size // 8
    a, b, c, d = words[:size], words[size : 2 * size], words[2 * size : 3 * size], words[3 * size : 4 * size]
    e, f, g, h = (
        words[4 * size : 5 * size],
        words[5 * size : 6 * size],
        words[6 * size : 7 * size],
        words[7 * size :],
    )
    total = 0
    for i in range(size):
        total += a[i] + b[i] + c[i] + d[i] + e[i] + f[i] + g[i] + h[i]
    return total


class ReadCeiling:
    """Reading memory with all cores; called, it reads `bytes` once."""

    def __init__(self, size: int = READ_BYTES, rounds: int = 5):
        cores = available_cores()
        self.bytes = size
        self._words = np.ones(size // 8, np.int64)
        self._pool = ThreadPoolExecutor(cores)
        ways = {
            f"{streams} per core, {pieces} pieces": partial(self._read, kernel, cores * pieces)
            for streams, kernel in ((1, _sum_of_1), (STREAMS, _sum_of_8))
            for pieces in (1, 8)
        }
        samples = timing.interleaved(ways, rounds=rounds)
        self.way = min(samples, key=lambda name: samples[name].median)
        self._run = ways[self.way]

    def __call__(self) -> None:
        self._run()

    def _read(self, kernel: Callable[[np.ndarray], int], pieces: int) -> None:
        found = sum(self._pool.map(kernel, np.split(self._words, pieces)))
        assert found == self._words.size


class GemmCeiling:
    """Multiplying square matrices through NumPy's BLAS; called, it does `flops` operations."""

    def __init__(self, dtype: str, size: int = GEMM_SIZE):
        rng = np.random.default_rng(0)
        self._left, self._right, self._out = (allocate((size, size), dtype) for _ in range(3))
        self._left[:], self._right[:] = rng.random((2, size, size))
        self.flops = 2 * size**3

    def __call__(self) -> None:
        np.matmul(self._left, self._right, out=self._out)


@cache
def read_ceiling() -> ReadCeiling:
    """One buffer for the whole run."""
    return ReadCeiling()


@cache
def gemm_ceiling(dtype: str) -> GemmCeiling:
    """16-bit types are multiplied in float32."""
    return GemmCeiling("float64" if dtype == "float64" else "float32")
