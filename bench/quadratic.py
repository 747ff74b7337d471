"""The quadratic regime: with more workers than parameters the step converges like Newton's method.

Each step spends two gradients per worker: one at the current point, which sets how far the workers spread,
and one at the worker's own point.
"""

import numpy as np

import fastnewton as fn
from bench.problems import Digits, TwoClasses, spread

WORKERS, L2, CUTOFF = 24, 1e-2, 1e-6
SPREAD = 0.1  # of ‖∇J‖
SMALLEST = 1e-13  # gradients below it are rounding
TARGET_ORDER = (1.8, 2.2)


def solve(data: Digits, *, workers: int = WORKERS, seed: int = 0, steps: int = 30) -> dict:
    """Train the two-class problem until ‖∇J‖ ≤ 1e-13; the norms and the measured order."""
    problem = TwoClasses(data, L2)
    rng = np.random.default_rng(seed)
    w = np.zeros(problem.n)
    norms = [float(np.linalg.norm(problem.gradient(w)))]
    while norms[-1] > SMALLEST and len(norms) <= steps:
        thetas = spread(rng, w, SPREAD * norms[-1], workers)
        grads = np.array([problem.gradient(theta) for theta in thetas])
        w, _ = fn.step(thetas, grads, lr=1.0, cutoff=CUTOFF)
        norms.append(float(np.linalg.norm(problem.gradient(w))))
    return {
        "problem": f"{data.name}, 3 against 8",
        "samples": problem.samples,
        "n": problem.n,
        "workers": workers,
        "l2": L2,
        "cutoff": CUTOFF,
        "gradient_norms": norms,
        "order": order(norms),
        "reached": norms[-1] <= SMALLEST,
    }


def order(errors: list[float], pairs: int = 3) -> float:
    """Slope of log e₊ against log e over the last pairs of which both are above 1e-13."""
    logs = np.log([e for e in errors if e > SMALLEST])[-pairs - 1 :]
    return float(np.polyfit(logs[:-1], logs[1:], 1)[0])
