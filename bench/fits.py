"""Models of time against m and n: non-negative least squares on relative errors, cross-validated and bootstrapped.

Of a mn and a m²n term a model adds both, or takes the larger: max(b·mn, c·m²n) = mn·max(b, c·m), whose branches part
at m = b/c, so that trying every measured m as the border finds the best fit.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

TERMS = {
    "a": lambda m, n: np.ones_like(m),
    "b·mn": lambda m, n: m * n,
    "c·m²n": lambda m, n: m * m * n,
    "d·m³": lambda m, n: m**3,
}
DRAWS = 400
CONFIDENCE = (0.025, 0.975)


@dataclass(frozen=True)
class Model:
    """The terms that make up a time; with `larger`, of b·mn and c·m²n only the larger counts."""

    terms: tuple[str, ...]
    larger: bool = False

    def __str__(self) -> str:
        if not self.larger:
            return " + ".join(self.terms)
        return " + ".join([term for term in self.terms if "mn" not in term and "m²n" not in term] + [LARGER])

    def columns(self, m: np.ndarray, n: np.ndarray) -> np.ndarray:
        """(points, terms)"""
        return np.stack([TERMS[term](m, n) for term in self.terms], axis=1)

    def seconds(self, factors: np.ndarray, m: np.ndarray, n: np.ndarray) -> np.ndarray:
        """Predicted times, for m and n as arrays of float64."""
        times = self.columns(m, n) * factors
        if not self.larger:
            return times.sum(axis=1)
        b, c = (self.terms.index(term) for term in ("b·mn", "c·m²n"))
        return times.sum(axis=1) - np.minimum(times[:, b], times[:, c])

    def fitted(self, m: np.ndarray, n: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """The factors of the terms, none negative, that make the sum of squared relative errors least."""
        columns = self.columns(m, n) / seconds[:, None]
        if not self.larger:
            return _least_squares(columns)
        b, c = (self.terms.index(term) for term in ("b·mn", "c·m²n"))
        found = []
        for border in (0.0, *np.unique(m)):
            chosen = columns.copy()
            chosen[m > border, b] = chosen[m <= border, c] = 0
            found.append(_least_squares(chosen))
        return min(found, key=lambda factors: np.square(self.errors(factors, m, n, seconds)).sum())

    def errors(self, factors: np.ndarray, m: np.ndarray, n: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """predicted/measured − 1"""
        return self.seconds(factors, m, n) / seconds - 1


LARGER = "max(b·mn, c·m²n)"
GRAM = Model(("a", "b·mn", "c·m²n"), larger=True)
ADDITIVE = Model(GRAM.terms)
COMBINE = Model(("a", "b·mn"))
SPECTRUM = Model(("a", "d·m³"))
WRITE = Model(("a", "b·mn", "d·m³"))
WRITE_OF_ALL = Model(tuple(TERMS))


def farthest(found: dict[str, dict], part: str) -> tuple[dict, str]:
    """The fit of a pass beyond the cache, or of one within it and words that say so where no point was larger."""
    if beyond := found.get(f"{part}, beyond"):
        return beyond, ""
    return found[f"{part}, in cache"], " within the cache (too few shapes were beyond it to be fitted)"


def _least_squares(columns: np.ndarray) -> np.ndarray:
    scale = np.linalg.norm(columns, axis=0)
    scale[scale == 0] = 1
    return nnls(columns / scale, np.ones(len(columns)))[0] / scale


def described(model: Model, other: Model, points: np.ndarray) -> dict:
    """A fit to the points (3, count), of m, n and seconds, with its confidence intervals and residuals.

    Both models are cross-validated by leaving out each point: the root mean square of the relative errors.
    """
    m, n, seconds = points
    factors = model.fitted(m, n, seconds)
    errors = model.errors(factors, m, n, seconds)
    rng, count = np.random.default_rng(0), m.size
    draws = np.array([model.fitted(*points[:, rng.integers(count, size=count)]) for _ in range(DRAWS)])
    found = {
        "model": str(model),
        "points": count,
        "factors": dict(zip(model.terms, map(_interval, factors, draws.T), strict=True)),
        "median error": float(np.median(np.abs(errors))),
        "largest error": float(np.abs(errors).max()),
        "residuals": [[int(a), int(b), float(error)] for a, b, error in zip(m, n, errors, strict=True)],
        "left out": {str(each): _left_out(each, points) for each in (model, other)},
    }
    if model.larger:
        with np.errstate(divide="ignore", invalid="ignore"):
            found["crossover"] = _interval(factors[1] / factors[2], draws[:, 1] / draws[:, 2])
    return found


def _interval(value: float, drawn: np.ndarray) -> list[float | None]:
    """The value and the bounds of its confidence interval; None where there is no finite one."""
    drawn = np.where(np.isnan(drawn), np.inf, drawn)
    bounds = np.quantile(drawn, CONFIDENCE, method="nearest")
    return [float(number) if np.isfinite(number) else None for number in (value, *bounds)]


def _left_out(model: Model, points: np.ndarray) -> float:
    errors = []
    for k in range(points.shape[1]):
        factors = model.fitted(*np.delete(points, k, axis=1))
        errors.append(model.errors(factors, *points[:, k : k + 1])[0])
    return float(np.sqrt(np.mean(np.square(errors))))
