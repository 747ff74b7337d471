"""The step beside its roofline and beside what one would write instead.

Ceilings, step and peers are timed in turn; every result is checked before it is timed.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import peers, roofline
from bench.ceilings import available_cores, gemm_ceiling, read_ceiling
from bench.memory import peak_growth
from bench.timing import Sample, interleaved

STEP, READ, GEMM, FLOAT32 = OURS = ("fastnewton", "read ceiling", "gemm ceiling", "fastnewton, float32")
SETTLE = 0.12  # seconds; threads of BLAS and OpenMP spin that long and slow the next task; a read wakes the cores
PEER_BUDGET = 1.5  # seconds that a peer may take for each shape before it is left out of further rounds
CACHE_PER_CORE = 1 << 25  # bytes
LONGEST = 3.0  # seconds; a peer that takes longer for one call is not timed
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Shape:
    """What is measured, and what it is to reach."""

    m: int
    n: int
    dtype: str = "float32"
    target: str = ""  # "roofline", "best peer" or "float32"
    least: float = 0.0  # of the ratio that the target names
    cold: bool = False  # every call gets other arrays, none of them in the cache

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads and writes, each array counted once."""
        return (2 * self.m + 1) * self.n * roofline.ITEMSIZE[self.dtype]

    @property
    def label(self) -> str:
        dtype = "" if self.dtype == "float32" else f"{self.dtype}, "
        power = str(self.n.bit_length() - 1).translate(SUPERSCRIPT)
        n = f"2{power}" if self.n.bit_count() == 1 else f"{self.n:,}"
        return f"{dtype}m = {self.m}, n = {n}" + (", cold" if self.cold else "")


def table(log2: int = 26) -> dict[str, Shape]:
    """The shapes of `python -m bench peers` by name: m·n = 2**log2 in float32."""
    total = 1 << log2
    least = dict.fromkeys((2, 4, 8), 0.90) | dict.fromkeys((16, 32, 64, 128), 0.75)
    shapes = {f"m{m}": Shape(m, total // m, target="roofline", least=share) for m, share in least.items()}
    shapes["float64"] = Shape(8, total // 16, "float64", "roofline", 0.75)
    shapes["bfloat16"] = Shape(8, total // 8, "bfloat16", "float32", 1.3)
    shapes["tiny"] = Shape(8, 650, target="best peer", least=2.2)
    shapes["small"] = Shape(8, 16_384, target="best peer", least=4.5)
    shapes["small-cold"] = Shape(8, 16_384, cold=True)
    return shapes


def curve(m: int = 8, largest: int = 23) -> list[Shape]:
    """Shapes over a range of n, for the plot of time against n."""
    sizes = [650, *(1 << k for k in (12, 14, 16, 18, 20, 23) if k <= largest)]
    return [Shape(m, n) for n in sizes]


def measure(shape: Shape, *, rounds: int, limit: float, chosen: Iterable[str], after_round: Callable[[], None]) -> dict:
    """Time the step, the ceilings and the chosen peers in turn; a row of the table as a dictionary.

    Beyond `limit` seconds there are fewer rounds.
    """
    read, gemm = read_ceiling(), gemm_ceiling(shape.dtype)
    runs, errors, left_out = _prepared(shape, chosen)
    memory = {}
    for name, run in list(runs.items()):
        start = time.perf_counter()
        memory[name] = peak_growth(run)
        if (taken := time.perf_counter() - start) > LONGEST and name not in OURS:
            del runs[name]
            left_out[name] = f"{taken:.0f} s a call, {shape.label}"
    tasks = {READ: read, STEP: runs.pop(STEP), GEMM: gemm} | runs

    def before() -> None:
        time.sleep(SETTLE)
        read()

    samples = interleaved(
        tasks,
        rounds=rounds,
        budget=PEER_BUDGET,
        limit=limit,
        unlimited=OURS,
        before=before,
        after_round=after_round,
    )
    bandwidth, rate = read.bytes / samples[READ].median, gemm.flops / samples[GEMM].median
    least = roofline.seconds(shape.m, shape.n, roofline.ITEMSIZE[shape.dtype], bandwidth, rate)
    row = {
        "shape": shape.label,
        "m": shape.m,
        "n": shape.n,
        "dtype": shape.dtype,
        "bytes": roofline.step(shape.m, shape.n, roofline.ITEMSIZE[shape.dtype]).bytes,
        "bandwidth": bandwidth,
        "flops_per_second": rate,
        "roofline": least,
        "step": samples[STEP].as_dict(),
        "others": {name: sample.as_dict() for name, sample in samples.items() if name not in (READ, GEMM, STEP)},
        "errors": errors,
        "left_out": left_out,
        "memory": memory,
    }
    return row | _verdict(shape, samples, least)


def _verdict(shape: Shape, samples: dict[str, Sample], least: float) -> dict:
    """The ratios, and whether the target is reached: None where there was no peer to compare with."""
    ours = samples[STEP].median
    others = {name: sample.median for name, sample in samples.items() if name not in OURS}
    best = min(others, key=others.__getitem__) if others else None
    ratios = {"roofline": least / ours}
    if best:
        ratios["best peer"] = others[best] / ours
    if FLOAT32 in samples:
        ratios["float32"] = samples[FLOAT32].median / ours
    reached = ratios[shape.target] >= shape.least if shape.target in ratios else None
    wanted = {"roofline": f"roofline/{shape.least:.2f}", "": ""}.get(shape.target, f"{shape.least:g} × {shape.target}")
    return {
        "best_peer": best,
        "ratios": ratios,
        "target": wanted,
        "target_ratio": shape.target,
        "least": shape.least,
        "reached": reached,
    }


def _prepared(
    shape: Shape, chosen: Iterable[str]
) -> tuple[dict[str, Callable[[], object]], dict[str, float], dict[str, str]]:
    """What is timed besides the ceilings, the errors of the results, and why a peer is not timed."""
    thetas, grads = peers.workers(shape.m, shape.n)
    dtype = _numpy_dtype(shape.dtype)
    given = (thetas.astype(dtype, copy=False), grads.astype(dtype, copy=False))
    prepares = {STEP: peers.fastnewton}
    if shape.dtype in ("float32", "float64"):
        prepares |= {name: peers.installed()[name] for name in chosen}
    expected, runs, errors, left_out = peers.reference(*given), {}, {}, {}
    for name, prepare in prepares.items():
        try:
            runs[name] = prepare(*given)
            errors[name] = peers.error(np.asarray(runs[name]()), expected)
        except Exception as problem:  # of a library that is installed and does not work here
            if name == STEP:
                raise
            runs.pop(name, None)
            left_out[name] = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"[:120]
    if shape.target == "float32":
        runs[FLOAT32] = peers.fastnewton(thetas, grads)
        errors[FLOAT32] = peers.error(runs[FLOAT32](), peers.reference(thetas, grads))
    if errors[STEP] > peers.TOLERANCE[shape.dtype]:
        raise ArithmeticError(f"the step is wrong: its relative error is {errors[STEP]:.1e} ({shape.label})")
    for name in [name for name in runs if name not in OURS and not errors[name] <= peers.TOLERANCE_OF_PEERS]:
        del runs[name]
        left_out[name] = f"wrong by {errors[name]:.0e}, {shape.label}"
    if shape.cold:
        runs = {name: _rotating(prepares[name], given, shape.nbytes) for name in runs}
    return runs, errors, left_out


def _numpy_dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _rotating(prepare: peers.Prepare, given: tuple[np.ndarray, np.ndarray], nbytes: int) -> Callable[[], object]:
    """The same step on one set of arrays after another; when the first returns, no cache holds it."""
    copies = 2 + 4 * own_cache() // nbytes
    runs = [prepare(*(array.copy() for array in given)) for _ in range(copies)]
    for run in runs:
        run()  # the first call also pays for the page faults of its result
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def own_cache() -> int:
    """Bytes of the last-level cache that this process may count on.

    A virtual machine reports the whole cache of its host, which others fill as well: where 480 MiB are reported to two
    cores, the rate of reads falls between 64 and 256 MiB, and no further beyond.
    """
    return min(last_level_cache(), available_cores() * CACHE_PER_CORE)


def last_level_cache() -> int:
    """Bytes of the largest cache as the system reports it, or a large guess."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes), default=1 << 26)
