"""Where the microseconds of a short step go, and how soon the first one is done."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
from fastnewton.kernels import spectrum

import fastnewton as fn
from bench import peers
from bench.report import Table
from bench.timing import interleaved
from fastnewton import arrays, host
from fastnewton.method import Options

M, LENGTHS = 8, (650, 16_384)
PAUSE = 0.01  # seconds, after which helping threads are asleep
STARTS = 5
START = """
import json, sys, time
start = time.perf_counter()
import numpy, numba
libraries = time.perf_counter()
import fastnewton as fn
imported = time.perf_counter()
fn.step(*numpy.random.default_rng(0).standard_normal((2, 8, 650), dtype=numpy.float32), lr=1.0)
taken = [libraries - start, imported - libraries, time.perf_counter() - imported]
print(json.dumps([taken, sorted({"cupy", "jax", "mpi4py", "torch"} & sys.modules.keys())]))
"""


def measure(rounds: int) -> dict:
    """Seconds of the parts of a step, by library and n; of importing NumPy and Numba, fastnewton, and a first step."""
    libraries = {"NumPy": np.asarray}
    if find_spec("torch"):
        import torch

        libraries["PyTorch"] = torch.from_numpy
    parts = {
        f"{name}, n = {n:,}": _parts(*map(convert, (*peers.workers(M, n), np.empty(n, np.float32))), rounds)
        for n in LENGTHS
        for name, convert in libraries.items()
    }
    return {"parts": parts, "start": np.median(starts()[0], axis=0).tolist()}


def starts() -> tuple[list[list[float]], list[str]]:
    """Seconds of importing NumPy and Numba, fastnewton, and of a first step, in STARTS processes with warm caches, and
    which of the optional libraries that loads."""
    command = [sys.executable, "-c", START]
    told = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(1 + STARTS)]
    taken, loaded = zip(*map(json.loads, told[1:]), strict=True)
    return list(taken), loaded[0]


def _parts(thetas, grads, out, rounds: int) -> dict[str, float]:
    first, second = arrays.pair(thetas, grads)
    rows = arrays.output(out, first, (first, second)).rows
    given = (0.1, None, None, None, "raise")
    options, gram = Options.checked(*given), fn.gram(grads)
    small = (gram.matrix, gram.projection, gram.norm2, 0.1, gram.floor, M)
    tasks: dict[str, Callable[[], object]] = {
        "the whole step": lambda: fn.step(thetas, grads, lr=1.0, out=out),
        "thetas and grads taken in": lambda: arrays.pair(thetas, grads),
        "out taken in": lambda: arrays.output(out, first, (first, second)),
        "settings checked": lambda: (arrays.real(1.0, "lr"), Options.checked(*given)),
        "gram, spectrum, combine": lambda: host.attempt(
            first, second, 1.0, options, rows, products="float32", sums="float32"
        ),
        "of it the eigenproblem": lambda: spectrum.spectrum(*small),
    }
    found = {name: sample.median for name, sample in interleaved(tasks, rounds=rounds).items()}
    whole, *taken = found.values()
    found["between these"] = whole - sum(taken[:-1])
    return found | {f"the step after {PAUSE * 1e3:.0f} ms": _after_pause(tasks["the whole step"])}


def _after_pause(step: Callable[[], object]) -> float:
    taken = []
    for _ in range(100):
        time.sleep(PAUSE)
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def table(found: dict) -> Table:
    """Microseconds."""
    parts, (libraries, own, first) = found["parts"], found["start"]
    names = next(iter(parts.values()))
    rows = [(name, *(f"{1e6 * column[name]:.1f}" for column in parts.values())) for name in names]
    note = (
        f"Microseconds, m = {M}, float32, medians of rounds in turn, `out` reused. After a pause caches are colder, "
        "the core has slowed down, and other threads sleep. Importing NumPy and Numba takes "
        f"{1e3 * libraries:.0f} ms, fastnewton {1e3 * own:.0f} ms more, a first step from the disk cache "
        f"{1e3 * first:.0f} ms."
    )
    return Table("Where the microseconds go", ("part", *parts), rows, note)
