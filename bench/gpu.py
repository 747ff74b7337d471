"""The step on a CUDA device; `bench/gpu.sh` runs the stages, and each appends its results to results.jsonl.

Times are those of many calls between two synchronisations of the device, in turn with a device-to-device copy, whose
bandwidth is the ceiling.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import fastnewton as fn
from bench import peers, roofline, timing
from fastnewton.kernels.cuda import spectrum as spectrum_kernel
from fastnewton.kernels.cuda.common import WORKER_LIMIT
from fastnewton.options import Options
from fastnewton.results import record_size

COPIED = 1 << 30  # bytes, far beyond the L2 cache
SHARE_OF_MEMORY = 0.6
L2_BYTES = 128 << 20  # at least that of any device
TOLERANCE = peers.TOLERANCE | {"float16": 1e-3}

# A chain of fused multiply-adds in each of eight registers, which keeps every pipeline busy.
FMA = """
extern "C" __global__ void fma_chain(REAL* out, REAL a, int rounds)
{
    REAL x[8];
    for (int k = 0; k < 8; ++k) x[k] = threadIdx.x + k;
    for (int i = 0; i < rounds; ++i)
        for (int k = 0; k < 8; ++k) x[k] = x[k] * a + a;
    REAL sum = 0;
    for (int k = 0; k < 8; ++k) sum += x[k];
    if (sum == a) out[0] = sum;
}
"""


@dataclass(frozen=True)
class Case:
    """A shape to measure, what else is measured at it, and the share of the roofline that it is to reach."""

    m: int
    n: int
    dtype: str = "float32"
    with_peers: bool = False
    least: float = 0.0

    @property
    def nbytes(self) -> int:
        return (2 * self.m + 1) * self.n * roofline.ITEMSIZE[self.dtype]


def headline(log2: int = 28) -> list[Case]:
    """The shapes with something to reach."""
    total = 1 << log2
    aims = {2: 0.90, 4: 0.90, 8: 0.90, 12: 0.90, 16: 0.85, 24: 0.70, 32: 0.70, 48: 0.55, 64: 0.55}
    cases = [Case(m, total // m, with_peers=m in (8, 32), least=least) for m, least in aims.items()]
    return cases + [Case(8, total // 8, dtype, least=0.80) for dtype in ("bfloat16", "float16", "float64")]


def grid() -> list[Case]:
    """All shapes, the important ones first."""
    of_size = [
        Case(m, 1 << k, with_peers=m in (8, 64) and k in (14, 24))
        for k in (24, 14, 20, 26, 17, 28, 22, 12, 10)
        for m in (8, 2, 32, 4, 16, 64, 128, 12, 24, 48, 256, 3, 6)
    ]
    others = [
        Case(m, 1 << k, dtype)
        for k in (22, 16, 26)
        for dtype in ("bfloat16", "float16", "float64")
        for m in (2, 4, 8, 12, 16, 32, 64)
    ]
    return of_size[:26] + others + of_size[26:]


def available() -> bool:
    """Whether there is CuPy and a device."""
    return find_spec("cupy") is not None and _cupy().cuda.is_available()


# -- measuring ----------------------------------------------------------------------------------------------


@cache
def _cupy() -> Any:
    import cupy

    return cupy


def settle() -> None:
    """Wait for all work on the device, of whatever library."""
    _cupy().cuda.Device().synchronize()


@cache
def copy() -> Callable[[], None]:
    """Copies COPIED bytes on the device."""
    source, target = (_cupy().empty(COPIED // 4, np.float32) for _ in range(2))
    source.fill(1)
    return lambda: _cupy().copyto(target, source)


@cache
def fma_rate(dtype: str) -> float:
    """Measured flops per second of multiply-adds in float32, or float64."""
    cupy = _cupy()
    real = "double" if dtype == "float64" else "float"
    kernel = cupy.RawKernel(FMA.replace("REAL", real), "fma_chain")
    out, number = cupy.empty(1, real), np.dtype(real).type(1.0000001)
    blocks, threads, rounds = 32 * cupy.cuda.Device().attributes["MultiProcessorCount"], 256, 2048
    run = {"fma": lambda: kernel((blocks,), (threads,), (out, number, np.int32(rounds)))}
    return 2 * 8 * rounds * blocks * threads / timing.interleaved(run, rounds=5, settle=settle)["fma"].min


def workers(case: Case) -> tuple[Any, Any]:
    """As `peers.workers`, on the device; bfloat16 as PyTorch tensors, others as CuPy arrays."""
    cupy = _cupy()
    rng = cupy.random.default_rng(case.m)
    thetas, grads = (rng.random((case.m, case.n), dtype=np.float32) for _ in range(2))
    grads -= np.float32(0.5)
    grads += (grads[0] - grads[-1]).copy()
    if case.dtype == "bfloat16":
        import torch

        return torch.from_dlpack(thetas).to(torch.bfloat16), torch.from_dlpack(grads).to(torch.bfloat16)
    return thetas.astype(case.dtype, copy=False), grads.astype(case.dtype, copy=False)


def stepped(thetas: Any, grads: Any) -> Callable[[], Any]:
    """The step, without waiting for it."""
    out = thetas[0] * 0
    settings = {"lr": peers.LR, "cutoff": peers.CUTOFF, "nonfinite": "propagate"}
    return lambda: fn.step(thetas, grads, out=out, **settings)[0]


def checked(case: Case, thetas: Any, grads: Any, found: Any) -> float:
    """The error of the result; ArithmeticError if it is wrong."""
    if case.dtype == "bfloat16":
        thetas, grads, found = (_cupy().from_dlpack(given.float()) for given in (thetas, grads, found))
    error = peers.error(found, peers.reference(thetas, grads, _cupy()))
    if not error <= TOLERANCE[case.dtype]:
        raise ArithmeticError(f"the step is wrong: its relative error is {error:.1e} ({case})")
    return error


def measure(case: Case) -> dict:
    """Time the step, its passes, the copy and the peers at one shape."""
    cupy = _cupy()
    thetas, grads = workers(case)
    step = stepped(thetas, grads)
    error = checked(case, thetas, grads, step())
    c, out = cupy.full(case.m, 1 / case.m), thetas[0] * 0
    tasks = {
        "copy": copy(),
        "step": step,
        "gram": lambda: fn.gram(grads),
        "combine": lambda: fn.combine(thetas, grads, c, lr=peers.LR, out=out),
        "waiting": lambda: fn.step(thetas, grads, lr=peers.LR, out=out),
    }
    if case.nbytes < L2_BYTES:
        tasks["cold"] = _rotating(case, thetas, grads)
        if case.m <= WORKER_LIMIT and case.dtype != "bfloat16":  # above it waits; PyTorch has a stream of its own
            tasks["graph"] = _captured(step)
    if case.m <= WORKER_LIMIT:
        tasks["spectrum"] = _spectrum(grads)
    failed: dict[str, str] = {}
    if case.with_peers:
        tasks |= _peers(thetas, grads, failed)
    seconds = {name: sample.median for name, sample in timing.interleaved(tasks, rounds=7, settle=settle).items()}
    bandwidth, rate = 2 * COPIED / seconds["copy"], fma_rate(case.dtype)
    least = roofline.seconds(case.m, case.n, roofline.ITEMSIZE[case.dtype], bandwidth, rate)
    moved = roofline.step(case.m, case.n, roofline.ITEMSIZE[case.dtype]).bytes
    used = cupy.cuda.runtime.memGetInfo()
    return asdict(case) | {
        "seconds": seconds,
        "bandwidth": bandwidth,
        "rate": rate,
        "roofline": least,
        "of_copy": moved / seconds["step"] / bandwidth,
        "of_roofline": least / seconds["step"],
        "error": error,
        "failed": failed,
        "memory_in_use": used[1] - used[0],
    }


def _captured(step: Callable[[], Any]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    stream = _cupy().cuda.Stream(non_blocking=True)
    with stream:
        step()
        stream.synchronize()
        stream.begin_capture()
        step()
        graph = stream.end_capture()
    return lambda: graph.launch(stream)


def _rotating(case: Case, thetas: Any, grads: Any) -> Callable[[], Any]:
    """The step on one copy of the arrays after another: none is in the L2 cache when its turn comes."""
    turns = itertools.cycle([stepped(thetas + 0, grads + 0) for _ in range(2 + L2_BYTES // case.nbytes)])
    return lambda: next(turns)()


def _spectrum(grads: Any) -> Callable[[], None]:
    """The m × m part alone, as a step launches it."""
    gram, record = fn.gram(grads), _cupy().empty(record_size(len(grads)))
    options = Options(peers.CUTOFF)
    return lambda: spectrum_kernel.spectrum(gram, peers.LR, options, record)


def _peers(thetas: Any, grads: Any, failed: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """What one would otherwise write, compiled and checked; what does not run is named with its reason."""
    made = {"CuPy": lambda: lambda: peers.composed(thetas, grads, _cupy())}
    if find_spec("torch"):
        made |= {"PyTorch": lambda: _torch(thetas, grads, False), "torch.compile": lambda: _torch(thetas, grads, True)}
    if find_spec("jax"):
        made["JAX, jit"] = lambda: _jax(thetas, grads)
    expected, found = peers.reference(thetas, grads, _cupy()), {}
    for name, make in made.items():
        try:
            run = make()
            error = peers.error(_cupy().from_dlpack(run()), expected)
        except Exception as problem:
            failed[name] = f"{type(problem).__name__}: {problem}"[:200]
            continue
        if error <= peers.TOLERANCE_OF_PEERS:
            found[name] = run
        else:
            failed[name] = f"wrong by {error:.1e}"
    return found


def _torch(thetas: Any, grads: Any, compiled: bool) -> Callable[[], Any]:
    import torch

    given = [torch.from_dlpack(one) for one in (thetas, grads)]
    step = torch.compile(peers.torch_composed) if compiled else peers.torch_composed
    return lambda: step(*given)


def _jax(thetas: Any, grads: Any) -> Callable[[], Any]:
    import jax

    given, step = [jax.dlpack.from_dlpack(one) for one in (thetas, grads)], jax.jit(peers.jax_composed)
    return lambda: step(*given)


# -- stages -------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> Iterator[dict]:
    """Results at small shapes, for a sanitizer to watch."""
    shapes = [(3, 1001), (8, 20_011), (13, 4097), (33, 1000), (64, 777), (65, 515)]
    for m, n in shapes[: options.shapes]:
        for dtype in ("float32", "float64", "float16"):
            case = Case(m, n, dtype)
            thetas, grads = workers(case)
            yield asdict(case) | {"error": checked(case, thetas, grads, stepped(thetas, grads)())}


def smoke(options: argparse.Namespace) -> Iterator[dict]:
    """Correctness at a few shapes, then the headline table."""
    for row in check(options):
        print(f"m = {row['m']}, n = {row['n']}, {row['dtype']}: error {row['error']:.1e}", flush=True)
    yield device()
    yield from _measured([Case(8, 16_384, with_peers=True), *headline()])


def run_grid(options: argparse.Namespace) -> Iterator[dict]:
    """The grid, as far as time and memory allow."""
    yield device()
    yield from _measured(grid(), options.seconds)


def _measured(cases: list[Case], seconds: float = 1e9) -> Iterator[dict]:
    end = time.monotonic() + seconds
    for number, case in enumerate(cases):
        if time.monotonic() > end:
            print(f"out of time: {len(cases) - number} of {len(cases)} shapes left out")
            return
        _cupy().get_default_memory_pool().free_all_blocks()
        if case.nbytes > SHARE_OF_MEMORY * _cupy().cuda.runtime.memGetInfo()[0]:
            continue
        try:
            row = measure(case)
        except Exception as problem:
            row = asdict(case) | {"problem": f"{type(problem).__name__}: {problem}"[:500]}
        fn.clear_caches()
        print(described(row), flush=True)
        yield row


def rank(options: argparse.Namespace) -> Iterator[dict]:
    """A step over MPI with every rank on this device, checked on all of them."""
    from mpi4py import MPI

    from fastnewton.mpi import DistNewton, gpu_aware

    comm, n = MPI.COMM_WORLD, 1 << 22
    thetas, grads = workers(Case(comm.size, n))
    expected = fn.step(thetas, grads, lr=peers.LR, cutoff=peers.CUTOFF)[0]
    way = "direct" if gpu_aware.verdict()[0] else "staged"
    for exchange in ("sharded", "allgather"):
        with DistNewton(comm, lr=peers.LR, cutoff=peers.CUTOFF, exchange=exchange) as newton:
            theta, _ = newton.step(thetas[comm.rank], grads[comm.rank])
            start = time.perf_counter()
            for _ in range(5):
                newton.step(thetas[comm.rank], grads[comm.rank], out=theta)
            seconds = (time.perf_counter() - start) / 5
        same = comm.allreduce(bool((theta == expected).all()), MPI.LAND)
        close = comm.allreduce(peers.error(theta, expected), MPI.MAX)
        row = {"ranks": comm.size, "n": n, "exchange": exchange, "way": way, "seconds": {"step": seconds}}
        if comm.rank == 0:
            print(f"{comm.size} ranks, {exchange}, {way}, n = {n}: {1e3 * seconds:.1f} ms, off by {close:.1e}")
            yield row | {"same_bits": same, "difference": close}


def device() -> dict:
    """The device and the software behind the figures."""
    cupy = _cupy()
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "device": properties["name"].decode(),
        "memory": properties["totalGlobalMem"],
        "l2": properties["l2CacheSize"],
        "cupy": cupy.__version__,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "rates": {dtype: fma_rate(dtype) for dtype in ("float32", "float64")},
    }


def described(row: dict) -> str:
    """One line about one shape."""
    name = f"m = {row['m']:3}, n = {row['n']:9}, {row['dtype']:8}"
    if "problem" in row:
        return f"{name}  {row['problem']}"
    times = "  ".join(f"{key} {1e6 * value:.1f}" for key, value in row["seconds"].items() if key != "copy")
    return f"{name}  {row['of_copy']:.2f} of copy  {row['of_roofline']:.2f} of roofline  µs: {times}"


def run_report(options: argparse.Namespace) -> Iterator[dict]:
    """One JSON of all stages, the plots where matplotlib is there, and the short table."""
    rows = [json.loads(line) for line in (options.out / "results.jsonl").read_text().splitlines()]
    (options.out / "gpu.json").write_text(json.dumps(rows, indent=1))
    measured = [row for row in rows if "of_copy" in row]
    if measured and find_spec("matplotlib"):
        from bench import plots

        plots.gpu(measured, options.out)
    for row in measured:
        if row["least"] or row["with_peers"]:
            print(described(row))
    for row in rows:
        if "stage" in row:
            print(f"stage {row['stage']}: exit {row['exit']} after {row['seconds']} s")
    yield from ()


STAGES = {"check": check, "smoke": smoke, "grid": run_grid, "rank": rank, "report": run_report}


def main() -> None:
    """Run a stage, and write its results as they come."""
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further shape after so many")
    parser.add_argument("--shapes", type=int, help="only so many of the small shapes")
    options = parser.parse_args()
    for row in STAGES[options.stage](options):
        with open(options.out / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
