"""What a map of the regimes says: who wins, with which settings, and whether the diagnostics tell beforehand."""

import itertools
import math

import numpy as np
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bench.regimes import FACTORS, FAMILIES, FEATURES, LEVELS, TARGETS, kind, unpacked
from bench.report import Table

MARGIN = math.log10(1.1)  # decades: who ends 10 % lower has won


def effects(rows: list[dict]) -> dict[str, dict[str, dict[str, list]]]:
    """{kind: {factor: {value: [gain, cases]}}}: mean gain per worker over the mean of the same family and noise.

    Gains beyond two decades count as two: a few runs that end at the minimum would decide otherwise.
    """
    gains = np.clip([row["per worker"] for row in rows], -2, 2)
    of = np.array([row["family"] + row["level"] for row in rows])
    gains = gains - [gains[of == one].mean() for one in of]
    found: dict = {"exact": {}, "noisy": {}}
    for name, (factor, values) in itertools.product(found, FACTORS.items()):
        told = found[name][factor] = {}
        for value in values:
            some = [kind(row["level"]) == name and row[factor] == value for row in rows]
            told |= {str(value): [float(gains[some].mean()), sum(some)]} if any(some) else {}
    return found


def recommended(found: dict) -> dict[str, dict]:
    """The best value of each factor, for exact and for noisy gradients."""
    values = {str(value): value for choices in FACTORS.values() for value in choices}
    return {
        name: {factor: values[max(told, key=lambda value: told[value][0])] for factor, told in factors.items()}
        for name, factors in found.items()
    }


def prediction(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """{target: {family left out: figures}}; "all" pools what was predicted of each when it was left out."""
    values, of = np.array([[row[name] for name in FEATURES] for row in rows]), np.array([row["family"] for row in rows])
    x, found = np.column_stack([values[:, 0], np.log10(np.clip(values[:, 1:], 1e-3, 1e3))]), {}
    for target in (*TARGETS, "GD per worker"):
        won, odds = np.array([row[target] > MARGIN for row in rows]), np.full(len(rows), np.nan)
        out = {family: of == family for family in dict.fromkeys(of.tolist())}
        for left in out.values():
            if len(set(won[~left])) == 2:  # two workers cannot give some figures, which is an answer too
                fit = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler(), LogisticRegression())
                odds[left] = fit.fit(x[~left], won[~left]).predict_proba(x[left])[:, 1]
        found[target] = {name: power(won[some], odds[some]) for name, some in (out | {"all": odds == odds}).items()}
        found[target] |= {f"{name} alone": power(won, x[:, k]) for k, name in enumerate(FEATURES)}
    return found


def power(won: np.ndarray, odds: np.ndarray) -> dict:
    """How well odds tell who won, where they are known."""
    won, odds = won[np.isfinite(odds)], odds[np.isfinite(odds)]
    if not won.size:
        return {"cases": 0}
    auc = float(roc_auc_score(won, odds)) if len(set(won)) == 2 else None
    right, share = float(np.mean((odds > 0.5) == won)), float(won.mean())
    return {"cases": won.size, "won": share, "auc": auc, "accuracy": right, "majority": max(share, 1 - share)}


def winners(found: dict) -> Table:
    """Who wins with the recommended settings, from starting points and with noise that they were not chosen on."""
    names = ("GD per worker", "per worker", "L-BFGS per worker", "GD total", "total", "L-BFGS total")
    lines = []
    for family, level in itertools.product(FAMILIES, LEVELS):
        some = [row for row in unpacked(found["confirmed"]) if (row["family"], row["level"]) == (family, level)]
        if some:
            gains = [[row[name] for row in some if name in row] for name in names]
            cells = [f"{np.mean(np.array(g) > MARGIN):.0%}, × {10 ** np.median(g):.2g}" if g else "" for g in gains]
            lower = f"{np.mean([row['lower'] for row in some]):.0%}"
            lines.append((f"{family}: {level}", str(len(some)), *cells, lower))
    note = (
        "Share of the cases in which DistNewton ends at least 10 % lower, by J above its minimum, and the median of "
        f"the other's over its, after {found['evaluations']} gradients per worker, with the recommended settings. "
        "Worker: equal wall-clock; total: or m times as many steps of the others, alone. Every method has the best of "
        "the step lengths tried in each case. Equal length: share of the first quarter's steps that end lower than one "
        "as long along −ḡ."
    )
    columns = ("problem: gradients", "cases", "GD, worker", "GD, mom., worker", "L-BFGS, worker", "GD, total")
    return Table("Where it wins", (*columns, "GD, mom., total", "L-BFGS, total", "equal length"), lines, note)


def settings(found: dict) -> Table:
    """What each value of each setting gains."""
    lines = []
    for (name, factors), best in zip(found["effects"].items(), found["recommended"].values(), strict=True):
        for factor, told in factors.items():
            cells = ", ".join(f"{value}: {gain:+.2f} ({count})" for value, (gain, count) in told.items())
            lines.append((f"{name}: {factor}", str(best[factor]), cells))
    note = (
        "Mean gain in decades, at most two, per worker against the better of gradient descent and momentum, over that "
        "of the same family and noise, and the cases. The spread is a share of the last step, or of lr_rest·‖ḡ‖; "
        "shared: the gradients that are combined are of one batch."
    )
    return Table("Settings", ("gradients: setting", "recommended", "gain of each value"), lines, note)


def predictions(found: dict) -> Table:
    """What the diagnostics are worth on families that were left out of the fit."""
    lines = []
    for target, told in found["prediction"].items():
        for name, one in told.items():
            auc = "" if one.get("auc") is None else f"{one['auc']:.2f}"
            shares = [f"{one[key]:.0%}" if key in one else "" for key in ("won", "accuracy", "majority")]
            shares[1:] = ["", ""] if "alone" in name else shares[1:]
            lines.append((f"{target}: {name}", str(one["cases"]), shares[0], auc, *shares[1:]))
    note = (
        "Logistic regression on the diagnostics of the first quarter of a run: each family predicted from the others. "
        "Majority: the accuracy of always saying the more frequent. Alone: one diagnostic without a fit; an AUC below "
        "0.5 says that small values speak for the step."
    )
    columns = ("DistNewton wins: left out", "cases", "won", "AUC", "accuracy", "majority")
    return Table("What fn.diagnostics predicts", columns, lines, note)
