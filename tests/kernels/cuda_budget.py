"""What each kernel may take of a GPU; `python tests/kernels/cuda_budget.py` rewrites it after a deliberate change."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import nvrtc
from cudasim import device

from fastnewton.arrays import Rows
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cuda import launch as cuda
from fastnewton.results import Gram

FILE = Path(__file__).with_suffix(".json")
REGISTERS = 65536  # of a multiprocessor, on all of them
MANY, FEW = [1, 2, 3, 8, 12, 13, 17, 33, 64, 65], [2, 8, 17, 64]


class Architecture(NamedTuple):
    """Limits of a multiprocessor, and of a block's shared memory (CUDA C++ Programming Guide, compute capabilities)."""

    threads: int
    blocks: int
    shared: int
    of_block: int
    reserved: int


ARCHITECTURES = {
    "sm_75": Architecture(1024, 16, 64 << 10, 64 << 10, 0),
    "sm_80": Architecture(2048, 32, 164 << 10, 163 << 10, 1024),
    "sm_90": Architecture(2048, 32, 228 << 10, 227 << 10, 1024),
    "sm_100": Architecture(2048, 32, 228 << 10, 227 << 10, 1024),
    "sm_120": Architecture(1536, 24, 100 << 10, 99 << 10, 1024),
}


class Kernel(NamedTuple):
    """A kernel as it would be launched."""

    file: str
    name: str
    shared: int  # dynamic
    macros: tuple[tuple[str, object], ...]

    @property
    def threads(self):
        return dict(self.macros)["THREADS"]

    @property
    def key(self):
        return " ".join([self.file, self.name, *(f"{name}={value}" for name, value in sorted(self.macros))])


def launched(dtype, m, *, past=0, apart=0):
    """The kernels that all functions of cuda.py launch for m workers, whose rows begin so many items past a multiple of
    sixteen bytes, each so many items more than the one before."""
    found = {}

    def compiled(file, name, shared=0, **macros):
        kernel = Kernel(file, name, shared, tuple(macros.items()))
        found[kernel.key] = kernel
        return mock.Mock()

    size = DTYPES[dtype].itemsize
    rows = Rows(4096 * size * (1 + np.arange(m)) + (past + apart * np.arange(m)) * size, 1001, dtype, "cupy", None)
    one = rows._replace(table=rows.table[:1])
    c, nothing = np.zeros(m), (None, None, None)
    compute = "float64" if dtype == "float64" else "float32"
    with (
        mock.patch.object(cuda, "cupy", return_value=device),
        mock.patch.object(cuda, "_compiled", compiled),
        mock.patch.object(cuda, "_grid", return_value=1),
    ):
        try:
            for z in (None, one):
                cuda.combine(rows, rows, c, z=z, out=one, compute=compute)
            cuda.finite_rows(rows)
            if m > cuda.LIMIT:
                for z in (None, one):
                    list(cuda._centred(rows, z, compute))
                list(cuda._centred(rows, None, "float64"))
                return list(found.values())
            nowhere = {"matrix": None, "projection": None, "scalars": None}
            for z in (None, one):
                cuda.gram(rows, z, compute=compute, **nowhere)
            cuda.gram(rows, None, compute="float64", **nowhere)
            cuda.combine(rows, rows, c, out=one, compute="float64")
            if m <= cuda.JOINT_LIMIT:
                cuda.joint(rows, rows, of_thetas=nothing, cross=nothing, of_grads=nothing)
            gram = Gram(np.empty((m, m)), np.empty(m), None, None)
            cuda.spectrum(gram, cutoff=0.1, max_rank=None, lr=1.0, lr_rest=None, lr_cap=None, record=None)
        finally:
            cuda.clear_caches()
    return list(found.values())


def compile_all(kernels, architectures):
    """{architecture: {key: Used}}, compiled by two threads: NVRTC works without the interpreter's lock."""

    def compiled(job):
        kernel, architecture = job
        text = (cuda.FOLDER / kernel.file).read_text()
        used = nvrtc.compile_source(text, kernel.file, cuda.options(**dict(kernel.macros)), architecture)
        return architecture, kernel.key, used.get(kernel.name)

    jobs = [(kernel, architecture) for architecture in architectures for kernel in kernels]
    found = {architecture: {} for architecture in architectures}
    with ThreadPoolExecutor(2) as pool:
        for architecture, key, used in pool.map(compiled, jobs):
            found[architecture][key] = used
    return found


def blocks(kernel, used, architecture):
    """Blocks of the kernel that a multiprocessor holds at once."""
    warps = -(-kernel.threads // 32)
    registers = -(-used.registers * 32 // 256) * 256 * warps
    shared = used.shared + kernel.shared + architecture.reserved
    held = [architecture.blocks, architecture.threads // kernel.threads, REGISTERS // registers]
    return min(held if shared == 0 else [*held, architecture.shared // shared])


def every_kernel():
    """All that the budget covers."""
    counts = {"float32": MANY, "float64": MANY, "float16": [*FEW, 65], "bfloat16": [*FEW, 65]}
    kernels = [kernel for dtype, workers in counts.items() for m in workers for kernel in launched(dtype, m)]
    for dtype, workers in {"float32": (3, 8, 17), "float64": (8,), "float16": FEW, "bfloat16": (8, 17)}.items():
        for m in workers:  # of no common alignment, and of a common one that is not that of sixteen bytes
            kernels += launched(dtype, m, apart=1) + launched(dtype, m, past=1)
    return list({kernel.key: kernel for kernel in kernels}.values())


def main():
    kernels = every_kernel()
    found = compile_all(kernels, ARCHITECTURES)
    budget = {
        kernel.key: {
            name: [found[name][kernel.key].registers, blocks(kernel, found[name][kernel.key], limits)]
            for name, limits in ARCHITECTURES.items()
        }
        for kernel in kernels
    }
    lines = [f"{json.dumps(key)}: {json.dumps(budget[key])}" for key in sorted(budget)]
    FILE.write_text(f'{{\n"nvrtc": "{nvrtc.release()}",\n' + ",\n".join(lines) + "\n}\n")
    spilled = [key for used in found.values() for key, value in used.items() if value.spilled]
    print(f"{len(kernels)} kernels; with spills: {sorted(set(spilled))}")


if __name__ == "__main__":
    main()
