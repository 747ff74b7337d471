"""One MPI rank of `python -m bench train`, started by `train.py`.

Two gradients per worker and step: one at the current point, which sets how far the workers spread, and one at
the worker's own point.
"""

import json
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from bench import descent
from bench.problems import Multinomial, digits, spread
from fastnewton.mpi import DistNewton

SPREAD, CUTOFF = 0.1, 0.1


def dist_newton(comm: MPI.Intracomm, problem: Multinomial, rest: float, evaluations: int, seed: int) -> descent.History:
    """Newton's step where the workers saw curvature, a gradient step of length `rest` elsewhere."""
    rng = np.random.default_rng([seed, comm.rank])
    history = descent.History(problem)
    with DistNewton(comm, lr=1.0, lr_rest=rest, cutoff=CUTOFF) as newton:
        for k in range(2, evaluations + 1, 2):
            theta = spread(rng, history.w, SPREAD * history.norms[-1])[0]
            w, _ = newton.step(theta, problem.gradient(theta))
            if not history.add(w, k):
                break
    return history


def main(settings: dict) -> None:
    comm = MPI.COMM_WORLD
    problem = Multinomial(digits(settings["data"], settings["samples"]), settings["l2"])

    def after() -> None:
        if comm.rank == 0:
            print("done", flush=True)

    def run(rest: float) -> descent.History:
        return dist_newton(comm, problem, rest, settings["evaluations"], settings["seed"])

    rest, history = descent.best(run, settings["rests"], after)
    if comm.rank == 0:
        found = history.as_dict("DistNewton", lr=1.0, lr_rest=rest, cutoff=CUTOFF, spread=SPREAD)
        Path(settings["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
