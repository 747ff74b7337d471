"""One MPI rank of `python -m bench exchange`, started by `exchange.py`."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mpi4py import MPI

from bench import memory
from fastnewton.mpi import DistNewton

EXCHANGES = ("sharded", "allgather")


def measure(comm: MPI.Intracomm, n: int, rounds: int, most_bytes: int) -> dict:
    """Seconds, bytes sent and memory of one step by each exchange, beside the all-reduce of the gradient."""
    theta, grad = np.random.default_rng([comm.rank, n]).standard_normal((2, n), dtype=np.float32)
    out = np.empty_like(theta)
    chosen = [kind for kind in EXCHANGES if kind != "allgather" or comm.size * 2 * comm.size * n * 4 <= most_bytes]
    held = {kind: _memory(comm, kind, theta, grad) for kind in chosen}
    steps = {kind: DistNewton(comm, lr=0.1, exchange=kind) for kind in chosen}
    tasks: dict[str, Callable] = {"allreduce": lambda: comm.Allreduce(grad, out)}
    tasks |= {kind: lambda newton=newton: newton.step(theta, grad, out=out) for kind, newton in steps.items()}
    times = {name: [] for name in tasks}
    for number in range(rounds + 2):  # two rounds to warm up
        for name, task in tasks.items():
            comm.Barrier()
            start = time.perf_counter()
            task()
            comm.Barrier()
            if number > 1:
                times[name].append(time.perf_counter() - start)
    sent = {
        kind: sum(bytes_ for _, bytes_ in newton.traffic.values()) // (rounds + 2) for kind, newton in steps.items()
    }
    messages = {
        kind: {name: [count // (rounds + 2) for count in counts] for name, counts in newton.traffic.items()}
        for kind, newton in steps.items()
    }
    for newton in steps.values():
        newton.close()
    return {
        "ranks": comm.size,
        "n": n,
        "seconds": {name: float(np.median(found)) for name, found in times.items()},
        "samples": times,
        "spread": {name: [float(q) for q in np.quantile(found, (0.25, 0.75))] for name, found in times.items()},
        "sent": comm.allreduce(sent, lambda x, y: {kind: max(x[kind], y[kind]) for kind in x}),
        "messages": messages,
        "memory": held,
    }


def _memory(comm: MPI.Intracomm, kind: str, theta: np.ndarray, grad: np.ndarray) -> float | None:
    """The largest growth of a rank over two steps, in arrays of n; None where the system does not tell."""

    def steps() -> None:
        with DistNewton(comm, lr=0.1, exchange=kind) as newton:
            for _ in range(2):
                newton.step(theta, grad)

    grown = memory.peak_growth(steps)
    return None if grown is None else comm.allreduce(grown / theta.nbytes, MPI.MAX)


def main(settings: dict) -> None:
    comm, rows = MPI.COMM_WORLD, []
    measure(comm, 1 << 10, 1, settings["most_bytes"])  # loads what would else count as memory of the first step
    for n in settings["lengths"]:
        rows.append(measure(comm, n, settings["rounds"], settings["most_bytes"]))
        if comm.rank == 0:
            print("done", flush=True)
    if comm.rank == 0:
        Path(settings["result"]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
