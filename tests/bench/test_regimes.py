"""The map of the regimes: how cases are drawn, what is counted, and what is made of it."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import check_grad

from bench import plots, problems, regimes, verdict
from bench.__main__ import main


@pytest.fixture(autouse=True)
def without_mnist(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTNEWTON_DATA", str(tmp_path))


def case(**changes):
    """Exact gradients of a quadratic, more workers than parameters."""
    drawn = {"cutoff": 1e-5, "spread": 0.1, "relative": "step", "local_steps": 1, "shared": False}
    return replace(regimes.Case("quadratic, even spectrum", 10, "exact", 64, 0, **drawn), **changes)


def test_the_design_is_the_same_for_the_same_seed_and_holds_every_family():
    one, again, other = (regimes.design(60, seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert {each.family for each in one} == set(regimes.FAMILIES) - {"logistic, MNIST"}  # whose images are not there
    for each in one:
        assert each.workers in regimes.FAMILIES[each.family][0]
        assert each.spread > 0 or (each.level != "exact" and each.local_steps > 1)
        assert not (each.shared and each.level == "exact")


def test_recommended_settings_are_used_for_their_kind_of_gradients():
    best = {
        name: {"cutoff": 0.1, "spread": spread, "relative": "step", "local_steps": 2, "shared": False}
        for name, spread in (("exact", 0.01), ("noisy", 3.0))
    }
    cases = regimes.design(60, 0, best)
    assert {(each.level == "exact", each.spread) for each in cases} == {(True, 0.01), (False, 3.0)}


def test_quadratics_have_the_condition_that_they_are_said_to_have():
    for condition, family in ((10, "quadratic, even spectrum"), (1000, "quadratic, few large")):
        at = regimes.problem(family, condition, 0)
        curvatures = at.objective.curvatures
        assert curvatures.max() / curvatures.min() == pytest.approx(condition)
        assert at.curvature == pytest.approx(1, rel=0.01)  # found by 30 power iterations
        assert (at.excess(at.start), at.excess(np.zeros(60)), at.excess(np.full(60, np.nan))) == (1, 1e-12, np.inf)


def test_gradients_of_the_network_agree_with_finite_differences(rng):
    images = problems.digits(None, 100)
    network = problems.TanhNetwork(images, 1e-2, hidden=3)
    w = rng.standard_normal((2, 4, network.n))
    assert check_grad(network.value, network.gradient, w[0, 0]) < 1e-6  # differences of step 1.5e-8
    for problem in (network, problems.Multinomial(images, 1e-2)):
        w, batches = rng.standard_normal((2, 4, problem.n)), rng.integers(100, size=(4, 7))
        many, values = problem.gradient(w, batches), problem.value(w)
        for i, k in np.ndindex(2, 4):  # every row by itself
            np.testing.assert_allclose(many[i, k], problem.gradient(w[i, k], batches[k]), atol=1e-13)
            assert values[i, k] == pytest.approx(problem.value(w[i, k]), rel=1e-13)


def test_noise_has_the_length_that_it_is_said_to_have_and_averages_out(rng):
    at = regimes.problem("quadratic, even spectrum", 10, 0)
    slope = np.linalg.norm(at.objective.gradient(at.start))
    for workers in (1, 16):
        drawn = at.draw(rng, "mini-batch", (500,), workers)
        # 500 · 60 squares of normal numbers: 0.8 % of their sum, 0.4 % of its root.
        assert np.sqrt((drawn**2).sum(1).mean()) == pytest.approx(slope / math.sqrt(workers), rel=0.03)
    assert at.draw(rng, "exact", (3,)) is None


def test_everyone_evaluates_as_many_gradients(monkeypatch):
    """Rows of points that the gradient is asked for: m of DistNewton for each step length, one of the others."""
    at, asked = regimes.problem("quadratic, even spectrum", 10, 3), []
    gradient = problems.Quadratic.gradient
    monkeypatch.setattr(
        problems.Quadratic,
        "gradient",
        lambda self, w, noise=None: asked.append(w.shape[:-1]) or gradient(self, w, noise),
    )
    lengths = len(regimes.LRS) * len(regimes.RESTS)
    for local_steps in (1, 4):
        asked.clear()
        regimes.newton(at, case(workers=8, local_steps=local_steps, spread=0.1), 0.5, 16)
        assert asked.count((lengths, 8)) == 16
    asked.clear()
    regimes.first_order(at, "exact", 1, {16, 128})
    assert asked == [(len(regimes.MOMENTA) * len(regimes.SHARES),)] * 128
    assert regimes.lbfgs(at, {5})[5] == regimes.lbfgs(at, {5, 50})[5]  # SciPy ends its line search, uncounted


def test_more_workers_than_parameters_solve_a_quadratic_that_first_order_methods_do_not():
    (row,) = regimes.rows_of([case(condition=1000)], 16)
    assert row["excess"] == 1e-12  # Newton's step with all curvatures, to the resolution
    assert min(row["per worker"], row["GD per worker"], row["L-BFGS per worker"]) > 1
    assert row["noise_to_secant"] < 1e-6
    assert row["n"] == 60


def test_noise_that_swamps_the_secants_is_told_by_the_diagnostics():
    cases = [case(level=level, spread=0.01, workers=8) for level in ("exact", "mini-batch")]
    quiet, loud = regimes.rows_of(cases, 8)
    assert quiet["asymmetry"] < 1e-6 < 0.3 < loud["asymmetry"]
    assert quiet["per worker"] > loud["per worker"]


def rows_of(gain):
    """What `run` gives, with gains that follow the cutoff and the noise ratio."""
    rows = []
    for k, each in enumerate(regimes.design(80, 0)):
        told = {"captured": 0.5, "asymmetry": 0.1, "readback": 1.0, "conditioning": 3.0, "lower": 1.0}
        told["noise_to_secant"] = 0.01 if k % 2 else 10.0
        gains = dict.fromkeys((*regimes.TARGETS, "GD per worker", "GD total"), gain(each, told))
        rows.append(vars(each) | told | gains)
    return rows


def test_the_best_value_of_a_setting_is_found_whatever_the_family():
    rows = rows_of(lambda each, told: len(each.family) / 30 + 0.5 * (each.cutoff == 0.3) - 0.5 * (each.spread == 1.0))
    found = verdict.effects(rows)
    assert max(gain for gain, _ in found["noisy"]["cutoff"].values()) == found["noisy"]["cutoff"]["0.3"][0] > 0
    assert sum(count for _, count in found["exact"]["spread"].values()) == sum(row["level"] == "exact" for row in rows)
    best = verdict.recommended(found)
    assert best["exact"]["cutoff"] == best["noisy"]["cutoff"] == 0.3
    assert best["exact"]["spread"] != 1.0 != best["noisy"]["spread"]


def test_what_decides_is_predicted_and_chance_is_not(rng):
    told = verdict.prediction(rows_of(lambda each, told: 1.0 if told["noise_to_secant"] < 1 else -1.0))["per worker"]
    assert told["all"]["auc"] == told["all"]["accuracy"] == 1.0
    assert told["noise_to_secant alone"]["auc"] == 0.0
    assert told["logistic, digits"]["cases"] == 11
    chance = verdict.prediction(rows_of(lambda each, told: rng.choice([-1.0, 1.0])))["total"]
    assert abs(chance["all"]["auc"] - 0.5) < 0.3  # of 69 cases: 0.07 is the standard deviation
    never = verdict.prediction(rows_of(lambda each, told: -1.0))["total"]
    assert never["all"]["cases"] == 0


def test_tables_and_the_picture_are_made_of_the_rows(tmp_path):
    rows = rows_of(lambda each, told: 0.5)
    effects = verdict.effects(rows)
    columns = regimes.packed(rows)
    assert regimes.unpacked(columns) == [{k: x for k, x in row.items() if x is not None} for row in rows]
    found = {"rows": columns, "confirmed": columns, "evaluations": 8, "effects": effects}
    found |= {"recommended": verdict.recommended(effects), "prediction": verdict.prediction(rows)}
    for table in (verdict.winners(found), verdict.settings(found), verdict.predictions(found)):
        assert {len(line) for line in table.rows} == {len(table.columns)}
    assert verdict.winners(found).rows[0][2:5] == ("100%, × 3.2", "100%, × 3.2", "")
    assert (tmp_path / plots.regimes(found, tmp_path)).read_bytes().startswith(b"\x89PNG")


def test_readme_says_what_the_committed_map_found():
    root = Path(regimes.__file__).resolve().parents[1]
    section = (root / "README.md").read_text(encoding="utf-8").partition("## Where it wins")[2].partition("\n## ")[0]
    found = json.loads((root / "bench" / "results" / "regimes.json").read_text())
    fresh = regimes.unpacked(found["confirmed"])
    exact, noisy = ([row for row in fresh if regimes.kind(row["level"]) == kind] for kind in ("exact", "noisy"))
    many = [row for row in exact if row["workers"] >= row["n"] / 4]
    quadratic = [row for row in many if row["family"].startswith("quadratic")]
    some = [
        [row for row in quadratic if row["condition"] >= 1000],
        [row for row in quadratic if row["condition"] <= 100],
        [row for row in many if row not in quadratic],
        [row for row in exact if row not in many],
        [row for row in noisy if row["family"].startswith("quadratic")],
        [row for row in noisy if not row["family"].startswith("quadratic")],
    ]
    told = re.findall(r"^\| (?:exact|noisy), .*", section, re.MULTILINE)
    for line, cases in zip(told, some, strict=True):
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert int(cells[0]) == len(cases)
        for cell, name in zip(cells[1:], ("GD per worker", "per worker", "L-BFGS per worker", "total"), strict=True):
            gains = [row[name] for row in cases if name in row]
            share = [round(100 * np.mean(np.array(gains) > verdict.MARGIN))] if gains else []
            assert [int(number) for number in re.findall(r"^\d+", cell)] == share, line
            for factor, way in re.findall(r"× ([\d.]+) (lower|higher)", cell):
                assert f"{10 ** abs(np.median(gains)):.2g}" == f"{float(factor):.2g}", line
                assert (np.median(gains) > 0) == (way == "lower")

    rows = [*regimes.unpacked(found["rows"]), *fresh]
    wins = {target: sum(row[target] > verdict.MARGIN for row in rows) for target in regimes.TARGETS}
    rule = [row["conditioning"] >= 10 and row["readback"] < 0.1 for row in rows]
    right = sum(row["per worker"] > verdict.MARGIN for row, said in zip(rows, rule, strict=True) if said)
    momentum, descent = found["prediction"]["per worker"], found["prediction"]["GD per worker"]["all"]
    aucs = [momentum[name]["auc"] for name in regimes.FAMILIES if momentum[name]["auc"] is not None]
    pooled = momentum["all"]
    for words in (
        f"for {['no', 'one', 'two'][wins['total']]} case of {len(rows)};",
        f"draws {len(rows) - len(fresh)} settings",
        f"{len(fresh)} fresh cases",
        f"{found['evaluations']} gradients per worker",
        f"it wins {np.mean([row['per worker'] > verdict.MARGIN for row in noisy]):.0%} of the cases".replace("%", " %"),
        f"an AUC of {min(aucs):.2f} to {max(aucs):.2f} on the {['no', 'one', 'two', 'three'][len(aucs)]} that",
        f"(pooled {pooled['auc']:.2f}; accuracy {100 * pooled['accuracy']:.0f} %, ",
        f"always “no” {100 * pooled['majority']:.0f} %)",
        f"gradient descent ({descent['auc']:.2f})",
        f"without a fit: {momentum['conditioning alone']['auc']:.2f}.",
        f"{right} of {sum(rule)} runs won; of the {len(rows) - sum(rule)} others {wins['per worker'] - right}.",
    ):
        assert words in " ".join(section.split())


@pytest.mark.full
def test_the_quick_map_is_written(tmp_path):
    main(["regimes", "--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "regimes.json").read_text())
    assert set(found["confirmed"]["family"]) == set(regimes.FAMILIES) - {"logistic, MNIST"}
    assert np.isfinite(found["rows"]["per worker"]).all()
    assert len(found["rows"]["per worker"]) == len(regimes.design(24, seed=0))
    assert "Where it wins" in (tmp_path / "regimes.md").read_text(encoding="utf-8")
