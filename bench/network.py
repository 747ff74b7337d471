"""A model of a step over MPI: latency, bandwidth, memory and arithmetic, fitted to measurements or given.

    t = o + α·messages + bytes sent/β + roofline of gram and combine + d·m³

for one rank.  Ranks of one machine share its bandwidth, its memory and its cores; ranks of a cluster share nothing.
Messages of the tree collectives are counted as 2·log₂m, those of the others as m − 1 each.
"""

import math
import statistics
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import EngFormatter
from scipy.optimize import nnls

import fastnewton as fn
from bench import ceilings, roofline, timing
from bench.report import Table

KINDS = ("allreduce", "sharded", "allgather")
ITEMSIZE = 4
TOLD_FROM = 1 << 24  # bytes of an exchange beside which MPI's own are few
_TIME, _BYTES = EngFormatter("s", places=1), EngFormatter("B", places=1)


@dataclass(frozen=True)
class Network:
    """Seconds of a step outside the exchange, seconds of a message, bytes/s, bytes/s of memory, flops/s, seconds/m³."""

    overhead: float
    latency: float
    bandwidth: float
    memory: float
    flops: float
    cubic: float
    cores: int | None = None  # of the one machine that all ranks share


# The nominal rates of the links; memory and arithmetic of one socket; the eigenproblem as LAPACK solves it.
NAMED = {
    "10 Gb/s Ethernet": Network(2e-4, 3e-5, 1.25e9, 2e11, 3e12, 1e-9),
    "100 Gb/s InfiniBand": Network(2e-4, 2e-6, 1.25e10, 2e11, 3e12, 1e-9),
    "400 Gb/s InfiniBand": Network(2e-4, 2e-6, 5e10, 2e11, 3e12, 1e-9),
}


def sent(kind: str, m: int, n: int) -> float:
    """Bytes that each rank sends."""
    shards = {"allreduce": 2, "sharded": 3, "allgather": 2 * m}[kind]
    return shards * n * ITEMSIZE * (m - 1) / m


def messages(kind: str, m: int) -> float:
    """Messages that each rank waits for, one after the other."""
    tree = 2 * math.log2(m)
    return {"allreduce": tree, "sharded": 3 * (m - 1) + tree, "allgather": 2 * (m - 1) + tree}[kind]


def held(kind: str, m: int, n: int) -> float:
    """Bytes on each rank beside its own θ and g."""
    return {"allreduce": 1, "sharded": 3, "allgather": 2 * m + 1}[kind] * n * ITEMSIZE


def passes(kind: str, m: int, n: int) -> list[roofline.Pass]:
    """What each rank reads, writes and computes."""
    if kind == "allreduce":
        return [roofline.Pass(int(3 * n * ITEMSIZE * (m - 1) / m), n)]
    combined = n if kind == "allgather" else n // m
    return [roofline.gram(m, n // m, ITEMSIZE), roofline.combine(m, combined, ITEMSIZE)]


def seconds(network: Network, kind: str, m: int, n: int) -> float:
    """The predicted time of a step, or of the all-reduce of a gradient."""
    on_a_core = max(1.0, m / network.cores) if network.cores else 1.0
    sharing = m if network.cores else 1
    found = network.latency * messages(kind, m) * on_a_core + sharing * sent(kind, m, n) / network.bandwidth
    found += sharing * sum(part.seconds(network.memory, network.flops) for part in passes(kind, m, n))
    return found + (kind != "allreduce") * (network.overhead * on_a_core + network.cubic * m**3)


def fitted(rows: list[dict], cores: int, flops: float, cubic: float) -> Network:
    """The network whose predictions come nearest, by non-negative least squares on relative errors."""
    unit = {"overhead": 0.0, "latency": 0.0, "bandwidth": math.inf, "memory": math.inf, "flops": math.inf, "cubic": 0.0}
    ones = [Network(**unit | {name: 1.0}, cores=cores) for name in ("overhead", "latency", "bandwidth", "memory")]
    cases = [(kind, row["ranks"], row["n"], row["seconds"][kind]) for row in rows for kind in _timed(row)]
    design = np.array([[seconds(one, kind, m, n) / taken for one in ones] for kind, m, n, taken in cases])
    overhead, latency, per_byte, per_byte_of_memory = nnls(design, np.ones(len(cases)))[0]
    bandwidth, memory = (1 / slowness if slowness else math.inf for slowness in (per_byte, per_byte_of_memory))
    return Network(overhead, latency, bandwidth, memory, flops, cubic, cores)


def measured(rows: list[dict]) -> Network:
    """This machine: arithmetic and eigenproblem measured by themselves, the rest fitted to every other n."""
    gemm, m = ceilings.gemm_ceiling("float32"), 128
    gram = fn.gram(np.random.default_rng(0).standard_normal((m, 2 * m)))
    found = timing.interleaved({"gemm": gemm, "spectrum": lambda: fn.spectrum(gram)}, rounds=5)
    chosen = [row for row in rows if is_for_the_fit(row)]
    cores = ceilings.available_cores()
    return fitted(chosen, cores, gemm.flops / found["gemm"].median, found["spectrum"].median / m**3)


def is_for_the_fit(row: dict) -> bool:
    """Every other n; the rest, the longest among them, is for the check."""
    return (row["n"].bit_length() - 15) % 4 == 0


def errors(network: Network, rows: list[dict]) -> dict[str, list[float]]:
    """|predicted/measured − 1| of each kind, where the network was not fitted."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for row in rows:
        for kind in _timed(row) if not is_for_the_fit(row) else ():
            found[kind].append(abs(seconds(network, kind, row["ranks"], row["n"]) / row["seconds"][kind] - 1))
    return found


def memory_errors(rows: list[dict]) -> list[float]:
    """|predicted/measured − 1| of the memory of each exchange, where that is more than what MPI itself takes."""
    cases = [(kind, row, grown) for row in rows for kind, grown in row["memory"].items() if grown is not None]
    predicted = [(held(kind, row["ranks"], row["n"]), grown * row["n"] * ITEMSIZE) for kind, row, grown in cases]
    return [abs(bytes_ / grown - 1) for bytes_, grown in predicted if bytes_ >= TOLD_FROM]


def _timed(row: dict) -> list[str]:
    return [kind for kind in KINDS if kind in row["seconds"]]


def check(network: Network, rows: list[dict]) -> Table:
    """How well the model predicts what it was not fitted to."""
    lines = [
        (kind, str(len(found)), f"{100 * statistics.median(found):.0f} %", f"{100 * max(found):.0f} %")
        for kind, found in errors(network, rows).items()
        if found
    ]
    if of_memory := memory_errors(rows):
        largest = max(of_memory)
        lines.append(
            ("memory", str(len(of_memory)), f"{100 * statistics.median(of_memory):.0f} %", f"{100 * largest:.0f} %")
        )
    note = (
        f"Fitted to n = 2^14, 2^18, 2^22: a step's overhead {1e6 * network.overhead:.0f} µs, a message "
        f"{1e6 * network.latency:.0f} µs, {network.bandwidth / 1e9:.1f} GB/s between ranks and "
        f"{network.memory / 1e9:.1f} GB/s of memory, both shared by all ranks. Errors are for the other n; "
        f"of memory, not fitted, where it is {_BYTES(TOLD_FROM)} and more."
    )
    return Table("The model beside measurements", ("", "points", "median error", "largest"), lines, note)


def predictions() -> Table:
    """What the model says of networks and sizes beyond this machine."""
    lines = [
        _prediction(name, network, m, n)
        for name, network in NAMED.items()
        for n in (10**6, 10**9, 10**11)
        for m in (16, 256)
    ]
    columns = ("network", "m", "n", "all-reduce", "sharded", "ratio", "allgather")
    note = (
        "float32; by the model, with nominal rates: 30 or 2 µs a message, memory at 200 GB/s, 3 Tflop/s, one rank "
        "per socket and link. Memory on each rank beside its own θ and g; without out=."
    )
    return Table("Predicted steps", (*columns, "memory, sharded", "allgather"), lines, note)


def _prediction(name: str, network: Network, m: int, n: int) -> tuple[str, ...]:
    plain, sharded, allgather = (seconds(network, kind, m, n) for kind in KINDS)
    times = [_TIME(taken) for taken in (plain, sharded, allgather)]
    ratio = f"{sharded / plain:.2f}"
    memory = [_BYTES(held(kind, m, n)) for kind in ("sharded", "allgather")]
    return (name, str(m), f"1e{round(math.log10(n))}", *times[:2], ratio, times[2], *memory)
