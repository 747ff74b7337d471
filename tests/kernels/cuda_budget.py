"""The budget of registers and occupancy; `python tests/kernels/cuda_budget.py` rewrites it after an intended change."""

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
from fastnewton.kernels.cuda import combine, gram, jit, memory, spectrum
from fastnewton.kernels.cuda.common import WORKER_LIMIT
from fastnewton.kernels.cuda.finite import finite_rows
from fastnewton.options import Options
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
    """Collect the kernels that all launches compile for m workers, whose rows begin `past` items past a multiple of
    sixteen bytes, each `apart` items more than the one before."""
    kernels = {}

    def kernel(file, name, shared=0, **macros):
        each = Kernel(file, name, shared, tuple(macros.items()))
        kernels[each.key] = each
        return mock.Mock()

    size = DTYPES[dtype].itemsize
    rows = Rows(4096 * size * (1 + np.arange(m)) + (past + apart * np.arange(m)) * size, 1001, dtype, "cupy", None)
    one = rows._replace(table=rows.table[:1])
    c, nowhere = np.zeros(m), gram.Products(None, None, None)
    compute = "float64" if dtype == "float64" else "float32"
    with (
        mock.patch.object(jit, "cupy", return_value=device),
        mock.patch.object(jit, "kernel", kernel),
        mock.patch.object(jit, "grid", return_value=1),
    ):
        try:
            for z in (None, one):
                combine.combine(rows, rows, c, z=z, out=one, compute=compute)
            finite_rows(rows)
            if m > WORKER_LIMIT:
                for z in (None, one):
                    list(gram._centred_batches(rows, z, compute))
                list(gram._centred_batches(rows, None, "float64"))
                return list(kernels.values())
            for z in (None, one):
                gram.gram(rows, z, compute=compute, out=nowhere)
            gram.gram(rows, None, compute="float64", out=nowhere)
            combine.combine(rows, rows, c, out=one, compute="float64")
            if m <= gram.JOINT_LIMIT:
                gram.joint_gram(rows, rows, of_thetas=nowhere, cross=nowhere, of_grads=nowhere)
            spectrum.spectrum(Gram(np.empty((m, m)), np.empty(m), None, None), 1.0, Options(), None)
        finally:
            memory.release()
    return list(kernels.values())


def compile_all(kernels, architectures):
    """Compile with two threads, since NVRTC runs without the GIL: {architecture: {key: Used}}."""

    def compiled(job):
        kernel, architecture = job
        text = (jit.FOLDER / kernel.file).read_text()
        used = nvrtc.compile_source(text, kernel.file, jit.options(**dict(kernel.macros)), architecture)
        return architecture, kernel.key, used.get(kernel.name)

    jobs = [(kernel, architecture) for architecture in architectures for kernel in kernels]
    result = {architecture: {} for architecture in architectures}
    with ThreadPoolExecutor(2) as pool:
        for architecture, key, used in pool.map(compiled, jobs):
            result[architecture][key] = used
    return result


def blocks(kernel, used, architecture):
    """Count the blocks of the kernel that are resident on a multiprocessor at once."""
    warps = -(-kernel.threads // 32)
    registers = -(-used.registers * 32 // 256) * 256 * warps
    shared = used.shared + kernel.shared + architecture.reserved
    limits = [architecture.blocks, architecture.threads // kernel.threads, REGISTERS // registers]
    return min(limits if shared == 0 else [*limits, architecture.shared // shared])


def every_kernel():
    """Collect all kernels that the budget covers."""
    counts = {"float32": MANY, "float64": MANY, "float16": [*FEW, 65], "bfloat16": [*FEW, 65]}
    kernels = [kernel for dtype, workers in counts.items() for m in workers for kernel in launched(dtype, m)]
    for dtype, workers in {"float32": (3, 8, 17), "float64": (8,), "float16": FEW, "bfloat16": (8, 17)}.items():
        for m in workers:  # of no common alignment, and of a common one that is not that of sixteen bytes
            kernels += launched(dtype, m, apart=1) + launched(dtype, m, past=1)
    return list({kernel.key: kernel for kernel in kernels}.values())


def main():
    kernels = every_kernel()
    used = compile_all(kernels, ARCHITECTURES)
    budget = {
        kernel.key: {
            name: [used[name][kernel.key].registers, blocks(kernel, used[name][kernel.key], limits)]
            for name, limits in ARCHITECTURES.items()
        }
        for kernel in kernels
    }
    lines = [f"{json.dumps(key)}: {json.dumps(budget[key])}" for key in sorted(budget)]
    FILE.write_text(f'{{\n"nvrtc": "{nvrtc.release()}",\n' + ",\n".join(lines) + "\n}\n")
    spilled = [key for each in used.values() for key, value in each.items() if value.spilled]
    print(f"{len(kernels)} kernels; with spills: {sorted(set(spilled))}")


if __name__ == "__main__":
    main()
