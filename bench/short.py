"""Where the microseconds of a short step go, and how soon the first one is done."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np

import fastnewton as fn
from bench import peers
from bench.report import Table
from bench.timing import interleaved
from fastnewton import arrays, checks, decision
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu import step as step_kernel
from fastnewton.kernels.cpu import threads
from fastnewton.kernels.cpu.spectrum import pack_settings
from fastnewton.options import Options
from fastnewton.results import record_size

M, LENGTHS = 8, (650, 16_384)
THREADED = tuple(1 << k for k in range(10, 17))
PAUSE = 0.01  # seconds, after which helping threads are asleep
STARTS = 5
COMPILED = 12  # functions shown by the time of compiling them
START = """
import json, sys, time
start = time.perf_counter()
import numpy, numba
libraries = time.perf_counter()
import fastnewton as fn
imported = time.perf_counter()
rows = numpy.random.default_rng(0).standard_normal((2, 8, 650), dtype=numpy.float32)
from fastnewton.kernels.cpu.jit import compile_times
with compile_times() as compiled:
    begin = time.perf_counter()
    fn.step(*rows, lr=1.0)
    first = time.perf_counter()
fn.step(*rows[:, :7], lr=1.0)
taken = [libraries - start, imported - libraries, first - begin, time.perf_counter() - first]
print(json.dumps([taken, sorted({"cupy", "jax", "mpi4py", "torch"} & sys.modules.keys()), compiled]))
"""


def measure(rounds: int) -> dict:
    """Seconds of the parts of a step, by library and n; of steps on one thread and on all; of `starts`, of one with an
    empty cache, and of its functions that are compiled."""
    libraries: dict[str, Callable[..., Any]] = {"NumPy": np.asarray}
    if find_spec("torch"):
        import torch

        libraries["PyTorch"] = torch.from_numpy
    parts = {
        f"{name}, n = {n:,}": _parts(rounds, *map(convert, (*peers.workers(M, n), np.empty(n, np.float32))))
        for n in LENGTHS
        for name, convert in libraries.items()
    }
    with tempfile.TemporaryDirectory() as empty:
        cold, _, compiled = _start(FASTNEWTON_CACHE_DIR=empty)
    found = {"parts": parts, "threads": _threads(rounds), "start": np.median(starts()[0], axis=0).tolist()}
    return found | {"cold": cold, "compiled": compiled}


def starts() -> tuple[list[list[float]], list[str]]:
    """Seconds of importing NumPy and Numba, fastnewton, of a first step and of one with another m, in STARTS processes
    with warm caches, and which of the optional libraries that loads."""
    taken, loaded, _ = zip(*[_start() for _ in range(1 + STARTS)][1:], strict=True)
    return list(taken), loaded[0]


def _start(**env: str) -> tuple[list[float], list[str], dict[str, float]]:
    command = [sys.executable, "-c", START]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | env
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def _threads(rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of a step on one thread and on all of them, whatever its length, by n."""
    found = {"one thread": {}, "all threads": {}}
    counts = dict(zip(found, (1, threads.thread_count()), strict=True))
    with mock.patch.object(step_kernel, "THREADED_BYTES", 0):
        for n in THREADED:
            step = peers.fastnewton(*peers.workers(M, n))
            tasks = {name: partial(_limited, count, step) for name, count in counts.items()}
            for name, sample in interleaved(tasks, rounds=rounds).items():
                found[name][n] = sample.median
    return found


def _limited(count: int, step: Callable[[], object]) -> None:
    with threads.set_thread_limit(count):
        step()


def _parts(rounds: int, thetas, grads, out) -> dict[str, float]:
    options, gram = Options.check(), fn.gram(grads)
    views = arrays.view_plain(thetas, grads, out, M)
    assert views is not None, "the arrays of a short step"
    dtype, first, second, target, _ = views
    arguments = first, second, target, np.empty(record_size(M)), pack_settings(M, 1.0, options)
    named = {"eps": DTYPES[dtype].eps, "guarded": True, "dtype": dtype, "compute": dtype}
    tasks: dict[str, Callable[[], object]] = {
        "the whole step": lambda: fn.step(thetas, grads, lr=1.0, out=out),
        "arrays looked at": lambda: arrays.view_plain(thetas, grads, out, M),
        "settings checked": lambda: (checks.real(1.0, "lr"), Options.check()),
        "gram, spectrum, combine": lambda: step_kernel.step_of_arrays(*arguments, **named),
        "of it the eigenproblem": lambda: decision.spectrum(gram, 0.1, None),
    }
    found = {name: sample.median for name, sample in interleaved(tasks, rounds=rounds).items()}
    whole, *taken = found.values()
    found["between these"] = whole - sum(taken[:-1])
    guarded = {"the step with Safeguards": lambda: fn.step(thetas, grads, lr=1.0, out=out, safeguards=fn.Safeguards())}
    found |= {name: sample.median for name, sample in interleaved(guarded, rounds=rounds).items()}
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
    parts, (libraries, own, first, _), (_, _, cold, another) = found["parts"], found["start"], found["cold"]
    names = next(iter(parts.values()))
    rows = [(name, *(f"{1e6 * column[name]:.1f}" for column in parts.values())) for name in names]
    note = (
        f"Microseconds, m = {M}, float32, medians of rounds in turn, `out` reused. After a pause caches are colder, "
        "the core has slowed down, and other threads sleep. Importing NumPy and Numba takes "
        f"{1e3 * libraries:.0f} ms, fastnewton {1e3 * own:.0f} ms more, a first step from the disk cache "
        f"{1e3 * first:.0f} ms. With an empty cache it compiles for {cold:.0f} s, and another m for {another:.1f} s."
    )
    return Table("Where the microseconds go", ("part", *parts), rows, note)


def compile_table(found: dict) -> Table:
    """Seconds of the first step from an empty cache, by function compiled."""
    longest = sorted(found["compiled"].items(), key=lambda item: item[1], reverse=True)
    ours = [
        (name.removeprefix("fastnewton.kernels."), taken) for name, taken in longest if name.startswith("fastnewton.")
    ]
    numbas = [taken for name, taken in longest if not name.startswith("fastnewton.")]
    rest = [taken for _, taken in ours[COMPILED:]]
    sums = [(f"{len(rest)} more", sum(rest)), (f"{len(numbas)} of Numba's own", sum(numbas))]
    rows = [(name, f"{taken:.2f}") for name, taken in ours[:COMPILED] + sums]
    compiling, whole = sum(taken for _, taken in longest), found["cold"][2]
    note = f"Each without the functions that it calls: {compiling:.1f} s of {whole:.1f}, the rest is keeping the code."
    return Table("Where the first step from an empty cache goes", ("function", "seconds"), rows, note)


def threads_table(found: dict) -> Table:
    """Microseconds on one thread and on all, and from which n on all are faster."""
    one, every = (list(found["threads"][name].values()) for name in ("one thread", "all threads"))
    slower = [k for k, (alone, together) in enumerate(zip(one, every, strict=True)) if together >= alone]
    first = slower[-1] + 1 if slower else 0
    crossover = f"from n = {THREADED[first]:,} on" if first < len(THREADED) else "at none of these n"
    rows = [(name, *(f"{1e6 * taken:.1f}" for taken in times.values())) for name, times in found["threads"].items()]
    note = (
        f"Microseconds, NumPy arrays, m = {M}. All threads are faster {crossover}; the step takes them where an array "
        f"has {threads.THREADED_BYTES >> 10} KiB, n = {threads.THREADED_BYTES // (4 * M):,} here."
    )
    return Table("One thread or all", ("", *(f"n = {n:,}" for n in THREADED)), rows, note)
