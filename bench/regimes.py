"""Where the step wins: random settings on problems of known minimum, beside tuned first-order methods and L-BFGS.

Every worker evaluates as many gradients in a run.  At equal wall-clock a first-order method takes that many steps with
the mean gradient of all workers; at equal work in total, m times as many with the gradient of one.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from scipy.optimize import minimize
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import fastnewton as fn
from bench import problems
from bench.report import Table

EVALUATIONS = 64  # gradients per worker
CONDITIONS = (10, 100, 1000, 10_000)
SHARES = 1.9 * 2.0 ** np.arange(2, -8, -1)  # step lengths that are tried, times the largest curvature at the start
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.97)
LRS, RESTS = (1.0, 0.3), (0.25, 0.5, 1.0, 2.0, 4.0)  # of DistNewton: τ, and β over the best step of gradient descent
LEVELS = ("exact", "low", "mini-batch")  # of gradient noise
NOISES, BATCHES = (0.0, 0.1, 1.0), (None, 128, 16)  # ‖noise‖/‖∇J(start)‖ on quadratics, samples on data
FACTORS = {
    "cutoff": (1e-5, 1e-3, 0.01, 0.1, 0.3, 0.6, 0.9),
    "spread": (0.0, 0.01, 0.1, 1.0, 3.0),
    "relative": ("step", "gradient"),
    "local_steps": (1, 2, 4, 8),
    "shared": (False, True),
}
FIRST_ORDER = ("gradient descent", "momentum")
TARGETS = ("per worker", "total")  # gradients that are equal; each against the better of FIRST_ORDER
FEATURES = ("captured", "noise_to_secant", "asymmetry", "readback", "conditioning")
MARGIN = math.log10(1.1)  # decades: whoever ends 10 % lower wins


@dataclass(frozen=True)
class Setting:
    """Of DistNewton: `spread` of the last step, or of lr_rest·‖ḡ‖; `shared`: all workers take the combine's batch."""

    cutoff: float
    spread: float
    relative: str
    local_steps: int
    shared: bool


@dataclass(frozen=True)
class Case:
    """A problem, the noise of its gradients, the number of workers, and the setting."""

    family: str
    condition: int | None
    level: str
    workers: int
    setting: Setting
    seed: int


class Quadratic:
    """J(w) = ½ Σ h_i w_i²; the axes are those of the Hessian, since no method here sees another rotation."""

    def __init__(self, curvatures: np.ndarray):
        self.curvatures, self.n = curvatures, curvatures.size

    def value(self, w: np.ndarray) -> np.ndarray:
        return 0.5 * (self.curvatures * w**2).sum(-1)

    def gradient(self, w: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        return self.curvatures * w + (0.0 if noise is None else noise)


@dataclass(frozen=True)
class Problem:
    """An objective, where it starts, its minimum, and how far above it values are told apart."""

    objective: Quadratic | problems.Multinomial
    start: np.ndarray
    least: float
    resolution: float
    curvature: float

    @classmethod
    def of(cls, objective: Quadratic | problems.Multinomial, start: np.ndarray, resolution: float = 1e-12) -> "Problem":
        least = 0.0
        if not isinstance(objective, Quadratic):
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
        if not isinstance(self.objective, Quadratic):
            return rng.integers(self.objective.samples, size=(*shape, workers * BATCHES[at]))
        length = NOISES[at] * np.linalg.norm(self.objective.gradient(self.start)) / math.sqrt(workers * self.start.size)
        return length * rng.standard_normal((*shape, self.start.size))


EXACTLY = {"maxiter": 20_000, "maxfun": 20_000, "ftol": 0.0, "gtol": 1e-11}


@cache
def problem(family: str, condition: int | None, seed: int, samples: int = 600) -> Problem:
    """One of FAMILIES; the seed is that of the starting point."""
    rng = np.random.default_rng(seed)
    if condition:
        large = np.geomspace(1, 0.3, 5) if "few" in family else []
        rest = np.geomspace(3, 1, 55) if "few" in family else np.geomspace(condition, 1, 60)
        return Problem.of(Quadratic(np.array([*large, *rest / condition])), rng.standard_normal(60))
    images = problems.digits(problems.default_folder() if "MNIST" in family else None, samples)
    if "network" in family:
        objective = problems.TanhNetwork(images, 1e-3, hidden=10)
        return Problem.of(objective, 0.3 * rng.standard_normal(objective.n), 1e-3)  # other minima lie about as low
    if "three" in family:
        _, _, axes = np.linalg.svd(images.images - images.images.mean(0), full_matrices=False)
        images = problems.Digits(images.name, images.images @ axes[:3].T, images.labels)
    objective = problems.Multinomial(images, 1e-3)
    return Problem.of(objective, 0.1 * rng.standard_normal(objective.n))


FAMILIES = {  # numbers of workers, share of the settings
    "quadratic, even spectrum": ((2, 4, 8, 16, 32, 64), 0.22),
    "quadratic, few large": ((2, 4, 8, 16, 32, 64), 0.22),
    "logistic, three features": ((4, 8, 16, 32, 64), 0.14),
    "logistic, digits": ((2, 4, 8, 16), 0.14),
    "logistic, MNIST": ((2, 4, 8, 16), 0.14),
    "tanh network, digits": ((2, 4, 8, 16), 0.14),
}


def families() -> list[str]:
    """Those whose images are there."""
    try:
        problems.digits(problems.default_folder(), 1)
    except FileNotFoundError:
        return [name for name in FAMILIES if "MNIST" not in name]
    return list(FAMILIES)


def design(count: int, seed: int, best: dict[str, Setting] | None = None) -> list[Case]:
    """Cases at random, or with these settings for exact and for noisy gradients."""
    rng, cases = np.random.default_rng(seed), []
    for family in families():
        workers, share = FAMILIES[family]
        for _ in range(round(count * share)):
            level = LEVELS[rng.integers(3)]
            drawn = {name: values[rng.integers(len(values))] for name, values in FACTORS.items()}
            drawn["shared"] = drawn["shared"] and level != "exact"
            if drawn["spread"] == 0 and (level == "exact" or drawn["local_steps"] == 1):
                drawn["spread"] = 0.1  # something must bring the workers apart
            condition = CONDITIONS[rng.integers(4)] if "quadratic" in family else None
            setting = best["exact" if level == "exact" else "noisy"] if best else Setting(**drawn)
            cases.append(Case(family, condition, level, workers[rng.integers(len(workers))], setting, seed))
    return cases


def first_order(problem: Problem, level: str, workers: int, counts: list[int], seed: int = 0) -> dict[int, dict]:
    """{steps: {method: (excess, step length)}} of gradient descent and momentum, all step lengths side by side."""
    rng = np.random.default_rng(seed)
    momenta, rates = (each.ravel() for each in np.meshgrid(MOMENTA, SHARES / problem.curvature, indexing="ij"))
    points, velocity, found = np.tile(problem.start, (rates.size, 1)), 0.0, {}
    for k in range(1, max(counts) + 1):
        noise = problem.draw(rng, level, workers=workers)
        velocity = momenta[:, None] * velocity + problem.objective.gradient(points, noise)
        points = points - rates[:, None] * velocity
        if k in counts:
            ends = problem.excess(points)
            groups = zip(FIRST_ORDER, (momenta == 0, momenta > 0), strict=True)
            found[k] = {name: min(zip(ends[group], rates[group], strict=True)) for name, group in groups}
    return found


def lbfgs(problem: Problem, counts: list[int]) -> dict[int, float]:
    """{gradients: excess} of SciPy's L-BFGS; each gradient comes with its value."""
    seen: list[float] = []

    def both(w: np.ndarray) -> tuple[float, np.ndarray]:
        seen.append(float(problem.excess(w)))
        return problem.objective.value(w), problem.objective.gradient(w)

    minimize(both, problem.start, jac=True, method="L-BFGS-B", options=EXACTLY | {"maxfun": max(counts)})
    return {count: min(seen[:count]) for count in counts}


def newton(problem: Problem, case: Case, rate: float, evaluations: int, lrs=LRS, rests=RESTS) -> dict:
    """DistNewton with all its step lengths side by side: the best of them, and its diagnostics in its first quarter."""
    rng, setting, n, m = np.random.default_rng(case.seed), case.setting, problem.start.size, case.workers
    lrs, rests = (each.ravel() for each in np.meshgrid(lrs, rate * np.array(rests)))
    centre, gradient = np.tile(problem.start, (lrs.size, 1)), problem.objective.gradient
    moved = rests * np.linalg.norm(gradient(problem.start))
    rounds = evaluations // setting.local_steps
    early, guards = [], [fn.Safeguards() for _ in lrs]
    for k in range(rounds):
        thetas = centre[:, None] + (setting.spread * moved / math.sqrt(n))[:, None, None] * rng.standard_normal((m, n))
        for _ in range(setting.local_steps - 1):
            thetas -= rests[:, None, None] * gradient(thetas, problem.draw(rng, case.level, (m,)))
        grads = gradient(thetas, problem.draw(rng, case.level, () if setting.shared else (m,)))
        before, along = thetas.mean(1), grads.mean(1)
        seen = np.full((lrs.size, len(FEATURES)), np.nan)
        for i in np.flatnonzero(np.isfinite(thetas).all((1, 2)) & np.isfinite(grads).all((1, 2))):
            options = {"lr": lrs[i], "lr_rest": rests[i], "cutoff": setting.cutoff, "safeguards": guards[i]}
            try:
                centre[i], _ = fn.step(thetas[i], grads[i], **options)
            except fn.NonFiniteError:
                centre[i] = np.inf
            if k < max(rounds // 4, 1):
                seen[i] = features(thetas[i], grads[i], setting.cutoff, rests[i])
        length = np.linalg.norm(before - centre, axis=1)
        moved = length if setting.relative == "step" else rests * np.linalg.norm(along, axis=1)
        if k < max(rounds // 4, 1):
            plain = before - (length / np.linalg.norm(along, axis=1))[:, None] * along
            lower = problem.objective.value(centre) < problem.objective.value(plain)
            early.append(np.column_stack([seen, lower]))
    ends = problem.excess(centre)
    best = int(ends.argmin())
    told = np.ma.masked_invalid(np.where(np.isinf(early), 1e3, early)[:, best])
    *found, lower = *np.ma.median(told[:, :-1], axis=0).filled(np.nan), told[:, -1].mean()
    taken = guards[best].counts
    rejected = sum(taken[reason] for reason in ("cosine", "coefficient", "nonfinite")) / rounds
    told = {"lr": lrs[best], "lr_rest": rests[best] / rate, "rejected": rejected, "lower": lower}
    return {"excess": ends[best], **told, **dict(zip(FEATURES, found, strict=True))}


def features(thetas: np.ndarray, grads: np.ndarray, cutoff: float, local_lr: float) -> list[float]:
    """Of FEATURES, from `fn.diagnostics`: `readback` is the median of apparent curvature · local_lr."""
    gram = fn.gram(grads, thetas=thetas)
    found = fn.diagnostics(gram, fn.spectrum(gram, cutoff=cutoff))
    seen = found.curvatures if found.curvatures.size else np.array([np.nan])
    told = (found.noise_to_secant, found.asymmetry, np.median(seen) * local_lr, seen.max() / seen.min())
    return [found.captured, *told]


def run(cases: list[Case], evaluations: int, after: Callable[[], None]) -> list[dict]:
    """A row for each case: how it was set, where everyone ended, and what the diagnostics said."""
    rows = []
    with np.errstate(all="ignore"), threadpool_limits(1):  # step lengths that diverge are tried; arrays are small
        for case in cases:
            rows.append(_row(case, evaluations))
            after()
    return rows


@cache
def _peers(family: str, condition: int | None, level: str, workers: int, seed: int, evaluations: int) -> tuple:
    """First-order methods per worker and in total, and L-BFGS where gradients are exact."""
    at = problem(family, condition, seed)
    most = {evaluations * m for m in FAMILIES[family][0]} | {evaluations}
    if workers == 1:
        return first_order(at, level, 1, most), lbfgs(at, most) if level == "exact" else {}
    alone, exactly = _peers(family, condition, level, 1, seed, evaluations)
    together = alone if level == "exact" else first_order(at, level, workers, [evaluations])
    return together[evaluations], alone[workers * evaluations], exactly


def _row(case: Case, evaluations: int) -> dict:
    at = problem(case.family, case.condition, case.seed)
    key = case.family, case.condition, case.level
    together, alone, exactly = _peers(*key, case.workers, case.seed, evaluations)
    found = newton(at, case, together["gradient descent"][1], evaluations)
    ends = {"per worker": [end for end, _ in together.values()], "total": [end for end, _ in alone.values()]}
    ends |= {"GD per worker": ends["per worker"][:1], "GD total": ends["total"][:1]}
    if exactly:
        ends |= {"L-BFGS per worker": [exactly[evaluations]], "L-BFGS total": [exactly[evaluations * case.workers]]}
    gains = {name: math.log10(min(end)) - math.log10(found["excess"]) for name, end in ends.items()}
    case = {k: v for k, v in asdict(case).items() if k != "setting"} | asdict(case.setting) | {"n": at.start.size}
    return case | {name: float(f"{value:.3g}") for name, value in (found | gains).items()}


# -- what the rows say ----------------------------------------------------------------------------------------


def kind(row: dict) -> str:
    """Settings are recommended for exact and for noisy gradients."""
    return "exact" if row["level"] == "exact" else "noisy"


def effects(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """{kind: {factor: {value: [mean gain over that of the same family and noise, cases]}}}, per worker, in decades."""
    usual = {(row["family"], row["level"]): [] for row in rows}
    for row in rows:
        usual[row["family"], row["level"]].append(row["per worker"])
    found: dict = {"exact": {}, "noisy": {}}
    for name, factor, value in ((k, f, v) for k, (f, vs) in itertools.product(found, FACTORS.items()) for v in vs):
        chosen = [row for row in rows if kind(row) == name and row[factor] == value]
        over = [row["per worker"] - np.mean(usual[row["family"], row["level"]]) for row in chosen]
        if over:
            found[name].setdefault(factor, {})[str(value)] = [float(np.mean(over)), len(over)]
    return found


def recommended(found: dict) -> dict[str, Setting]:
    """The best value of each factor."""
    best = {}
    for name, factors in found.items():
        values = {str(value): value for choices in FACTORS.values() for value in choices}
        picked = {factor: values[max(told, key=lambda value: told[value][0])] for factor, told in factors.items()}
        best[name] = Setting(**picked)
    return best


def predictor() -> Pipeline:
    """Logistic regression on the diagnostics; a figure that two workers cannot give is its own answer."""
    return make_pipeline(SimpleImputer(add_indicator=True), StandardScaler(), LogisticRegression())


def inputs(rows: list[dict]) -> np.ndarray:
    """(rows, FEATURES): the captured share, and logarithms of the others from 1e-3 to 1e3."""
    values = np.array([[row[name] for name in FEATURES] for row in rows], float)
    return np.column_stack([values[:, 0], np.log10(np.clip(values[:, 1:], 1e-3, 1e3))])


def prediction(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """{target: {family left out: figures}}; "all" pools what was predicted of each when it was left out."""
    x, of = inputs(rows), np.array([row["family"] for row in rows])
    found: dict = {}
    for target in (*TARGETS, "GD per worker"):
        won = np.array([row[target] > MARGIN for row in rows])
        odds = np.full(len(rows), np.nan)
        for family in dict.fromkeys(of.tolist()):
            out = of == family
            if 0 < won[~out].sum() < (~out).sum():
                odds[out] = predictor().fit(x[~out], won[~out]).predict_proba(x[out])[:, 1]
        groups = {family: of == family for family in dict.fromkeys(of.tolist())} | {"all": np.full(len(of), True)}
        found[target] = {name: _power(won[some], odds[some]) for name, some in groups.items()}
        found[target] |= {f"{name} alone": _power(won, x[:, k]) for k, name in enumerate(FEATURES)}
    return found


def _power(won: np.ndarray, odds: np.ndarray) -> dict:
    known = np.isfinite(odds)
    won, odds = won[known], odds[known]
    auc = float(roc_auc_score(won, odds)) if 0 < won.sum() < won.size else None
    share = float(won.mean()) if won.size else 0.0
    accuracy = float(((odds > 0.5) == won).mean()) if won.size else 0.0
    return {"cases": int(won.size), "won": share, "auc": auc, "accuracy": accuracy, "majority": max(share, 1 - share)}


def winners(found: dict) -> Table:
    """Who wins with the recommended settings, on starting points and noise that they were not chosen on."""
    names = ("GD per worker", "per worker", "L-BFGS per worker", "GD total", "total", "L-BFGS total")
    rows, fresh = [], found["confirmed"]
    for family, level in itertools.product(FAMILIES, LEVELS):
        some = [row for row in fresh if (row["family"], row["level"]) == (family, level)]
        if some:
            rows.append((f"{family}: {level}", str(len(some)), *(_share(some, name) for name in names)))
    note = (
        "Share of the cases that DistNewton ends at least 10 % lower, J above its minimum, and the median of the others' "
        f"over its, after {found['evaluations']} gradients per worker; settings as recommended below. Per worker: equal "
        "wall-clock; in total: m times as many steps of the others. Step lengths are the best for every case and method."
    )
    columns = ("problem: gradients", "cases", "GD /worker", "GD, mom. /worker", "L-BFGS /worker", "GD total")
    return Table("Where it wins", (*columns, "GD, mom. total", "L-BFGS total"), rows, note)


def _share(rows: list[dict], name: str) -> str:
    gains = [row[name] for row in rows if name in row]
    return f"{np.mean(np.array(gains) > MARGIN):.0%}, × {10 ** np.median(gains):.2g}" if gains else ""


def settings(found: dict) -> Table:
    """What each value of each setting gains."""
    rows = []
    for (name, factors), best in zip(found["effects"].items(), found["recommended"].values(), strict=True):
        for factor, told in factors.items():
            cells = ", ".join(f"{value}: {gain:+.2f} ({count})" for value, (gain, count) in told.items())
            rows.append((f"{name}: {factor}", str(best[factor]), cells))
    note = (
        "Mean gain in decades per worker over the mean of the same family and noise, and the cases. The spread is a "
        "share of the last step or of lr_rest·‖ḡ‖ of the last combine; shared: all workers combine gradients of one batch."
    )
    return Table("Settings", ("gradients: setting", "recommended", "gain of each value"), rows, note)


def predictions(found: dict) -> Table:
    """What the diagnostics are worth on families that were left out of the fit."""
    rows = []
    for target, told in found["prediction"].items():
        for name, power in told.items():
            auc = "" if power["auc"] is None else f"{power['auc']:.2f}"
            fitted = [] if "alone" in name else [f"{power['accuracy']:.0%}", f"{power['majority']:.0%}"]
            rows.append((f"{target}: {name}", str(power["cases"]), f"{power['won']:.0%}", auc, *(fitted or ["", ""])))
    note = (
        "Logistic regression on the diagnostics of the first quarter of a run; each family is predicted from the others. "
        "Majority: the accuracy of always saying the more frequent. Alone: one diagnostic without a fit; below 0.5 a "
        "small value speaks for the step."
    )
    columns = ("DistNewton wins: left out", "cases", "won", "AUC", "accuracy", "majority")
    return Table("What fn.diagnostics predicts", columns, rows, note)
