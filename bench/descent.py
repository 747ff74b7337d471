"""First-order methods beside which the step is shown, and the search for their step lengths.

Work is counted in full-batch gradients per worker: a stochastic gradient from a batch counts as its share.
"""

from collections.abc import Callable, Iterable

import numpy as np

from bench.problems import Multinomial

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


def rate(evaluations: list[float], norms: list[float]) -> float:
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


def stochastic(problem: Multinomial, step: float, evaluations: int, workers: int, rng: np.random.Generator) -> History:
    """SGD: every worker draws a batch, gradients are averaged; recorded once an evaluation per worker."""
    history = History(problem)
    for k in range(1, evaluations + 1):
        w = history.w
        for _ in range(max(1, problem.samples // BATCH)):
            w = w - step * problem.gradient(w, rng.integers(problem.samples, size=workers * BATCH))
        if not history.add(w, k):
            break
    return history


def best(run: Callable[[float], History], steps: Iterable[float], after: Callable[[], None]) -> tuple[float, History]:
    """The step length that ends with the smallest ‖∇J‖, and its run."""
    found = []
    for step in steps:
        found.append((step, run(step)))
        after()
    return min(found, key=lambda pair: np.nan_to_num(pair[1].norms[-1], nan=np.inf))
