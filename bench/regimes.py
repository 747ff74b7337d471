"""Where the step wins: random settings on problems of known minimum, beside tuned first-order methods and L-BFGS.

Every worker evaluates as many gradients in a run.  At equal wall-clock a first-order method takes that many steps with
the mean gradient of all workers; at equal work in total, m times as many with the gradient of one.
"""

import math
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import repeat
from multiprocessing import get_context

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

import fastnewton as fn
from bench import problems
from bench.ceilings import available_cores

EVALUATIONS = 64  # gradients per worker
SHARES = 1.9 * 2.0 ** np.arange(2, -8, -1)  # step lengths that are tried, over the largest curvature at the start
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.97)
LRS, RESTS = (1.0, 0.3), (0.25, 0.5, 1.0, 2.0, 4.0)  # of DistNewton: τ, and β over the best step of gradient descent
LEVELS = ("exact", "large batch", "batch", "mini-batch")  # noise of the gradients
NOISES, BATCHES = (0.0, 0.01, 0.1, 1.0), (0, 1024, 128, 16)  # ‖noise‖/‖∇J(start)‖ on quadratics, else samples
CONDITIONS = (10, 100, 1000, 10_000)
FEW, MANY = (2, 4, 8, 16), (2, 4, 8, 16, 32, 64)
FAMILIES = {  # numbers of workers, share of the settings
    "quadratic, even spectrum": (MANY, 0.22),  # n = 60
    "quadratic, few large": (MANY, 0.22),
    "logistic, three features": (MANY[1:], 0.14),  # n = 40
    "logistic, digits": (FEW, 0.14),  # n = 650
    "logistic, MNIST": (FEW, 0.14),
    "tanh network, digits": (FEW, 0.14),  # n = 750
}
FACTORS = {
    "cutoff": (1e-5, 1e-3, 0.01, 0.1, 0.3, 0.6, 0.9),
    "spread": (0.0, 0.01, 0.1, 1.0, 3.0),
    "relative": ("step", "gradient"),
    "local_steps": (1, 2, 4, 8),
    "shared": (False, True),
}
TARGETS = ("per worker", "total")  # gradients that are equal; gains over the better of the first-order methods
FEATURES = ("captured", "noise_to_secant", "asymmetry", "readback", "conditioning")
EXACTLY = {"maxiter": 20_000, "maxfun": 20_000, "ftol": 0.0, "gtol": 1e-11}
Objective = problems.Quadratic | problems.Multinomial


@dataclass(frozen=True)
class Case:
    """A problem, the noise of its gradients, the number of workers, and DistNewton's settings.

    The workers' spread is a share of the last step, or of lr_rest·‖ḡ‖; shared: all combine gradients of one batch.
    """

    family: str
    condition: int | None
    level: str
    workers: int
    seed: int
    cutoff: float
    spread: float
    relative: str
    local_steps: int
    shared: bool

    @property
    def of(self) -> tuple[str, int | None, int]:
        """Which `problem` it is."""
        return self.family, self.condition, self.seed


@dataclass(frozen=True)
class Problem:
    """An objective, where it starts, its minimum, and how far above it values are told apart."""

    objective: Objective
    start: np.ndarray
    least: float
    resolution: float
    curvature: float

    @classmethod
    def of(cls, objective: Objective, start: np.ndarray, resolution: float = 1e-12) -> "Problem":
        least = 0.0
        if not isinstance(objective, problems.Quadratic):
            least = minimize(objective.value, start, jac=objective.gradient, method="L-BFGS-B", options=EXACTLY).fun
        along, gradient = np.ones(start.size), objective.gradient(start)
        for _ in range(30):  # power iteration
            along = along / np.linalg.norm(along)
            along = (objective.gradient(start + 1e-5 * along) - gradient) / 1e-5
        return cls(objective, start, float(least), resolution, float(np.linalg.norm(along)))

    def excess(self, w: np.ndarray) -> np.ndarray:
        """J above its minimum, of J above it at the start; infinite where a method diverged."""
        found = (self.objective.value(w) - self.least) / (self.objective.value(self.start) - self.least)
        return np.maximum(np.where(np.isfinite(found), found, np.inf), self.resolution)

    def draw(self, rng: np.random.Generator, level: str, shape: tuple[int, ...] = (), workers: int = 1):
        """What makes gradients noisy, for each of `shape` by itself: vectors, or batches; a mean over workers."""
        at = LEVELS.index(level)
        if at == 0:
            return None
        if not isinstance(self.objective, problems.Quadratic):
            return rng.integers(self.objective.samples, size=(*shape, workers * BATCHES[at]))
        length = NOISES[at] * np.linalg.norm(self.objective.gradient(self.start)) / math.sqrt(workers * self.start.size)
        return length * rng.standard_normal((*shape, self.start.size))


@cache
def problem(family: str, condition: int | None, seed: int, samples: int = 600) -> Problem:
    """One of FAMILIES; the seed is that of the starting point."""
    rng = np.random.default_rng(seed)
    if condition:
        large = np.geomspace(1, 0.3, 5) if "few" in family else []
        rest = np.geomspace(3, 1, 55) if "few" in family else np.geomspace(condition, 1, 60)
        return Problem.of(problems.Quadratic(np.array([*large, *rest / condition])), rng.standard_normal(60))
    images = problems.digits(problems.default_folder() if "MNIST" in family else None, samples)
    if "network" in family:
        objective = problems.TanhNetwork(images, 1e-3, hidden=10)
        return Problem.of(objective, 0.3 * rng.standard_normal(objective.n), 1e-3)  # other minima lie about as low
    if "three" in family:
        _, _, axes = np.linalg.svd(images.images - images.images.mean(0), full_matrices=False)
        images = problems.Digits(images.name, images.images @ axes[:3].T, images.labels)
    objective = problems.Multinomial(images, 1e-3)
    return Problem.of(objective, 0.1 * rng.standard_normal(objective.n))


def families() -> list[str]:
    """Those whose images are there."""
    try:
        problems.digits(problems.default_folder(), 1)
    except FileNotFoundError:
        return [name for name in FAMILIES if "MNIST" not in name]
    return list(FAMILIES)


def design(count: int, seed: int, best: dict[str, dict] | None = None) -> list[Case]:
    """Cases at random; with `best`, these settings for exact and noisy gradients, and the rest at random."""
    rng, cases = np.random.default_rng(seed), []
    for family in families():
        workers, share = FAMILIES[family]
        for _ in range(round(count * share)):
            level = LEVELS[max(rng.integers(-1, len(LEVELS)), 0)]  # twice as many are exact
            m, condition = (values[rng.integers(len(values))] for values in (workers, CONDITIONS))
            drawn = {name: values[rng.integers(len(values))] for name, values in FACTORS.items()}
            drawn["shared"] = drawn["shared"] and level != "exact"
            if drawn["spread"] == 0 and (level == "exact" or drawn["local_steps"] == 1):
                drawn["spread"] = 0.1  # something must bring the workers apart
            condition = condition if "quadratic" in family else None
            cases.append(Case(family, condition, level, m, seed, **(best[kind(level)] if best else drawn)))
    return list(dict.fromkeys(cases))


def kind(level: str) -> str:
    """Settings are recommended for exact and for noisy gradients."""
    return "exact" if level == "exact" else "noisy"


def first_order(at: Problem, level: str, workers: int, counts: Collection[int]) -> dict[int, dict]:
    """{steps: {method: (excess, step length)}} of gradient descent and momentum, all step lengths side by side."""
    rng, found = np.random.default_rng(0), {}
    momenta, rates = (each.ravel() for each in np.meshgrid(MOMENTA, SHARES / at.curvature, indexing="ij"))
    points, velocity = np.tile(at.start, (rates.size, 1)), 0.0
    for k in range(1, max(counts) + 1):
        velocity = momenta[:, None] * velocity + at.objective.gradient(points, at.draw(rng, level, workers=workers))
        points = points - rates[:, None] * velocity
        if k in counts:
            ends, plain = list(zip(at.excess(points).tolist(), rates.tolist(), strict=True)), len(SHARES)
            found[k] = {"gradient descent": min(ends[:plain]), "momentum": min(ends[plain:])}
    return found


def lbfgs(at: Problem, counts: Collection[int]) -> dict[int, float]:
    """{gradients: excess} of SciPy's L-BFGS; each gradient comes with its value."""
    seen: list[float] = []

    def both(w: np.ndarray) -> tuple[float, np.ndarray]:
        seen.append(float(at.excess(w)))
        return float(at.objective.value(w)), at.objective.gradient(w)

    minimize(both, at.start, jac=True, method="L-BFGS-B", options=EXACTLY | {"maxfun": max(counts)})
    return {count: min(seen[:count]) for count in counts}


def newton(at: Problem, case: Case, rate: float, evaluations: int) -> dict:
    """DistNewton with all its step lengths side by side: the best of them, and what its first quarter showed."""
    rng, n, gradient = np.random.default_rng(case.seed), at.start.size, at.objective.gradient
    lrs, rests = (each.ravel() for each in np.meshgrid(LRS, rate * np.array(RESTS)))
    centre, moved = np.tile(at.start, (lrs.size, 1)), rests * np.linalg.norm(gradient(at.start))
    rounds = evaluations // case.local_steps
    early, guards = [], fn.Safeguards()
    for k in range(rounds):
        width = case.spread * moved / math.sqrt(n)
        thetas = centre[:, None] + width[:, None, None] * rng.standard_normal((case.workers, n))
        for _ in range(case.local_steps - 1):
            thetas -= rests[:, None, None] * gradient(thetas, at.draw(rng, case.level, (case.workers,)))
        grads = gradient(thetas, at.draw(rng, case.level, () if case.shared else (case.workers,)))
        before, along, seen = thetas.mean(1), grads.mean(1), np.full((lrs.size, len(FEATURES)), np.nan)
        centre[:] = np.inf  # a run that has diverged
        for i in np.flatnonzero((np.abs(thetas) + np.abs(grads) < 1e100).all((1, 2))):
            options = {"lr": lrs[i], "lr_rest": rests[i], "cutoff": case.cutoff, "safeguards": guards}
            centre[i], _ = fn.step(thetas[i], grads[i], **options)
            if k < max(rounds // 4, 1):
                seen[i] = features(thetas[i], grads[i], case.cutoff, rests[i])
        length, slope = np.linalg.norm(before - centre, axis=1), np.linalg.norm(along, axis=1)
        moved = length if case.relative == "step" else rests * slope
        plain = before - (length / slope)[:, None] * along
        if k < max(rounds // 4, 1):
            early.append(np.column_stack([seen, at.objective.value(centre) < at.objective.value(plain)]))
    ends = at.excess(centre)
    best = int(ends.argmin())
    told = np.ma.median(np.ma.masked_invalid(np.array(early)[:, best, :-1]), axis=0).filled(np.nan)
    lower = np.mean(np.array(early)[:, best, -1])
    found = {"excess": ends[best], "lr": lrs[best], "lr_rest": rests[best] / rate, "lower": lower}
    return found | dict(zip(FEATURES, told, strict=True))


def features(thetas: np.ndarray, grads: np.ndarray, cutoff: float, local_lr: float) -> list[float]:
    """Of FEATURES; `readback`: the median apparent curvature · local_lr; `conditioning`: the largest over the least."""
    gram = fn.gram(grads, thetas=thetas)
    found = fn.diagnostics(gram, fn.spectrum(gram, cutoff=cutoff))
    seen = found.curvatures if found.curvatures.size else np.array([np.nan])
    told = (found.noise_to_secant, found.asymmetry, np.median(seen) * local_lr, seen.max() / seen.min())
    return [found.captured, *np.where(np.isinf(told), 1e3, told)]


def run(cases: list[Case], evaluations: int, after: Callable[[], None]) -> list[dict]:
    """A row for each case; cases of the same problem and noise in one process, where they share what is beside them."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.of, case.level), []).append(case)
    found = {}
    with ProcessPoolExecutor(available_cores(), mp_context=get_context("spawn")) as pool:
        for rows, group in zip(pool.map(rows_of, groups.values(), repeat(evaluations)), groups.values(), strict=True):
            found |= dict(zip(group, rows, strict=True))
            for _ in group:
                after()
    return [found[case] for case in cases]


def rows_of(cases: list[Case], evaluations: int) -> list[dict]:
    """A row for each case: how it was set, where everyone ended, and what the diagnostics said."""
    with np.errstate(all="ignore"), threadpool_limits(1):  # step lengths that diverge are tried; arrays are small
        return [row(case, evaluations) for case in cases]


def row(case: Case, evaluations: int) -> dict:
    """Where all end after as many gradients; gains are the decades by which DistNewton ends lower than the others."""
    at, total = problem(*case.of), evaluations * case.workers
    together, alone, exactly = peers(case.of, case.level, case.workers, evaluations)
    found = newton(at, case, together[evaluations]["gradient descent"][1], evaluations)
    for name, runs in (("per worker", [together[evaluations]]), ("total", [together[evaluations], alone[total]])):
        found["GD " + name] = min(each["gradient descent"][0] for each in runs)
        found[name] = min(end for each in runs for end, _ in each.values())
    excess = found["excess"]
    if exactly:
        found |= {"L-BFGS per worker": exactly[evaluations], "L-BFGS total": exactly[total]}
    gains = {name: math.log10(max(end / excess, 1e-99)) for name, end in found.items() if name.endswith(TARGETS)}
    return asdict(case) | {"n": at.start.size} | {name: float(f"{x:.3g}") for name, x in (found | gains).items()}


@cache
def peers(of: tuple, level: str, workers: int, evaluations: int) -> tuple[dict, dict, dict]:
    """First-order methods with the mean gradient of all workers and with that of one, and L-BFGS if it is exact."""
    at, most = problem(*of), {evaluations * m for m in (1, *FAMILIES[of[0]][0])}
    if workers == 1:
        return {}, first_order(at, level, 1, most), lbfgs(at, most) if level == "exact" else {}
    _, alone, exactly = peers(of, level, 1, evaluations)
    return alone if level == "exact" else first_order(at, level, workers, {evaluations}), alone, exactly


def packed(rows: list[dict]) -> dict[str, list]:
    """The same as columns, which take less room; what is not known is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [None if row.get(name) != row.get(name) else row.get(name) for row in rows] for name in names}


def unpacked(columns: dict[str, list]) -> list[dict]:
    """The rows again, without what is not known."""
    rows = zip(*columns.values(), strict=True)
    return [{name: x for name, x in zip(columns, row, strict=True) if x is not None} for row in rows]
