"""Training over real MPI ranks: DistNewton beside gradient descent and kinds of SGD, at equal numbers of gradients.

The first-order methods run in this process, where averaging over workers is arithmetic; mpiexec starts the
ranks of DistNewton (`train_rank.py`).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import descent
from bench.problems import Multinomial, digits

RANKS, EVALUATIONS, L2 = 4, 400, 1e-2
TIME_LIMIT = 600.0
STEPS = tuple(float(step) for step in np.sqrt(2.0) ** np.arange(-2, 9))  # 0.5 … 16
SGD_STEPS = (0.0025, 0.01, 0.04, 0.16, 0.64)  # here and below: of the best step of gradient descent
REST_STEPS = (0.5, 0.71, 1.0, 1.19, 1.41)
MOMENTUM_STEPS = (0.03, 0.1, 0.3)  # of the best step of SGD

ROOT = Path(__file__).resolve().parent.parent
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def runs(baselines: bool) -> int:
    """How many runs `train` makes."""
    return len(STEPS) + len(SGD_STEPS) + len(REST_STEPS) + baselines * (len(MOMENTUM_STEPS) + 2)


def train(
    *,
    data: str | None = None,
    samples: int | None = None,
    evaluations: int = EVALUATIONS,
    ranks: int = RANKS,
    l2: float = L2,
    seed: int = 0,
    baselines: bool = True,
    after: Callable[[], None] = lambda: None,
) -> dict:
    """Train with each method, with the distributed ones beside SGD too; `after` is called when a run is finished."""
    images = digits(data, samples)
    problem = Multinomial(images, l2)
    step, plain = descent.best(lambda step: descent.gradient_descent(problem, step, evaluations), STEPS, after)

    def drawn(method: Callable, **more: Any) -> Callable[[float], descent.History]:
        return lambda step: method(problem, step, evaluations, ranks, np.random.default_rng(seed), **more)

    sgd_step, sgd = descent.best(drawn(descent.stochastic), [share * step for share in SGD_STEPS], after)
    others = []
    if baselines:
        momentum = {"momentum": descent.MOMENTUM}
        steps = [share * sgd_step for share in MOMENTUM_STEPS]
        best, found = descent.best(drawn(descent.stochastic, **momentum), steps, after)
        others.append(found.as_dict("momentum SGD", step=best, **momentum))
        for name, method in (("local SGD", descent.local), ("asynchronous SGD", descent.asynchronous)):
            _, found = descent.best(drawn(method), [sgd_step], after)
            others.append(found.as_dict(name, step=sgd_step))
    rests = [share * step for share in REST_STEPS]
    settings = {
        "data": data,
        "samples": samples,
        "l2": l2,
        "evaluations": evaluations,
        "seed": seed,
        "rests": rests,
    }
    newton = run_ranks("bench.train_rank", ranks, settings, after)
    return {
        "problem": f"{images.name}, multinomial logistic regression",
        "samples": problem.samples,
        "n": problem.n,
        "workers": ranks,
        "l2": l2,
        "evaluations": evaluations,
        "runs": runs(baselines),
        "methods": [
            newton,
            plain.as_dict("gradient descent", step=step),
            sgd.as_dict("SGD", step=sgd_step, batch=descent.BATCH),
            *others,
        ],
    }


def run_ranks(module: str, ranks: int, settings: dict, after: Callable[[], None], limit: float = TIME_LIMIT) -> Any:
    """Start ranks of a module, call `after` for each run that they finish, and return the result of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [mpiexec(), "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", module]
        _watch([*command, json.dumps({**settings, "result": str(result)})], after, limit)
        return json.loads(result.read_text())


def mpiexec() -> str:
    """The launcher beside this interpreter, or else the one on the PATH."""
    found = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if found is None:
        raise SystemExit("no mpiexec beside this Python or on the PATH: pip install 'fastnewton[bench]' brings one")
    return found


def _watch(command: list[str], after: Callable[[], None], limit: float) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **dict.fromkeys(_THREADS, "1"), "PYTHONPATH": path}
    said, pipe = [], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as job:
        timer = threading.Timer(limit, job.terminate)
        timer.start()
        try:
            for line in job.stdout or ():
                said.append(line)
                if line.startswith("done"):
                    after()
            code = job.wait()
        except BaseException:
            job.terminate()
            raise
        finally:
            in_time = timer.is_alive()
            timer.cancel()
    if code or not in_time:
        reason = f"failed with {code}" if in_time else f"took longer than {limit:.0f} s"
        raise RuntimeError(f"the MPI job {reason}:\n{''.join(said[-30:])}")
