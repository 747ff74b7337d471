"""First-order methods beside which the step is shown, and the search for their step lengths.

Work is counted in full-batch gradients per worker: a stochastic gradient from a batch counts as its share.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from bench.problems import Multinomial
from fastnewton.server import ParameterServer

MOMENTUM = 0.9
PERIOD = 8  # steps of local SGD between two averages
BATCH = 32  # samples of a stochastic gradient, on each worker
DIVERGED = 1e6  # ‖∇J‖ beyond this is not followed further


class History:
    """‖∇J‖ against the gradients that each worker has evaluated; starts from zero."""

    def __init__(self, problem: Multinomial):
        self.problem = problem
        self.evaluations: list[int] = []
        self.norms: list[float] = []
        self.add(np.zeros(problem.n), 0)

    def add(self, w: np.ndarray, evaluations: int) -> bool:
        """Record a point; False if the method has diverged."""
        self.w, self.gradient = w, self.problem.gradient(w)
        self.evaluations.append(evaluations)
        self.norms.append(float(np.linalg.norm(self.gradient)))
        return self.norms[-1] < DIVERGED

    def as_dict(self, name: str, **settings) -> dict:
        return {
            "name": name,
            "settings": settings,
            "evaluations": self.evaluations,
            "gradient_norms": self.norms,
            "rate": rate(self.evaluations, self.norms),
            "value": self.problem.value(self.w),
            "accuracy": self.problem.accuracy(self.w),
        }


def rate(evaluations: Sequence[float], norms: Sequence[float]) -> float:
    """The factor by which ‖∇J‖ changes per evaluation, fitted to the second half of a run."""
    half = len(norms) // 2
    return float(np.exp(np.polyfit(evaluations[half:], np.log(norms[half:]), 1)[0]))


def gradient_descent(problem: Multinomial, step: float, evaluations: int) -> History:
    """w ← w − step·∇J(w), one evaluation a step."""
    history = History(problem)
    for k in range(1, evaluations + 1):
        if not history.add(history.w - step * history.gradient, k):
            break
    return history


def stochastic(
    problem: Multinomial, step: float, evaluations: int, workers: int, rng: np.random.Generator, momentum: float = 0.0
) -> History:
    """SGD: every worker draws a batch, gradients are averaged; recorded once an evaluation per worker."""
    history, velocity = History(problem), np.zeros(problem.n)
    for k in range(1, evaluations + 1):
        w = history.w
        for _ in range(_batches(problem)):
            velocity = momentum * velocity + problem.gradient(w, _drawn(problem, rng, workers))
            w = w - step * velocity
        if not history.add(w, k):
            break
    return history


def local(problem: Multinomial, step: float, evaluations: int, workers: int, rng: np.random.Generator) -> History:
    """Local SGD: every worker steps by itself; all are averaged after each PERIOD steps."""
    history = History(problem)
    points, taken = np.tile(history.w, (workers, 1)), 0
    for k in range(1, evaluations + 1):
        for _ in range(_batches(problem)):
            for w in points:
                w -= step * problem.gradient(w, _drawn(problem, rng))
            taken += 1
            if taken % PERIOD == 0:
                points[:] = points.mean(0)
        if not history.add(points.mean(0), k):
            break
    return history


def asynchronous(
    problem: Multinomial, step: float, evaluations: int, workers: int, rng: np.random.Generator
) -> History:
    """Asynchronous SGD through the parameter server: in random order, each worker Writes from where it last Read."""
    history = History(problem)
    server = ParameterServer(history.w, workers, "async", lr=step, max_rank=0)
    latest = history.w
    held = [latest] * workers
    for k in range(1, evaluations + 1):
        for _ in range(_batches(problem)):
            for worker in rng.permutation(workers).tolist():
                server.write(worker, held[worker], problem.gradient(held[worker], _drawn(problem, rng)))
                held[worker] = latest = server.read()[0]
        if not history.add(latest, k):
            break
    return history


def _batches(problem: Multinomial) -> int:
    """That are together one evaluation."""
    return max(1, problem.samples // BATCH)


def _drawn(problem: Multinomial, rng: np.random.Generator, workers: int = 1) -> np.ndarray:
    return rng.integers(problem.samples, size=workers * BATCH)


def best(run: Callable[[float], History], steps: Iterable[float], after: Callable[[], None]) -> tuple[float, History]:
    """The step length that ends with the smallest ‖∇J‖, and its run."""
    found = []
    for step in steps:
        found.append((step, run(step)))
        after()
    return min(found, key=lambda pair: np.nan_to_num(pair[1].norms[-1], nan=np.inf))
