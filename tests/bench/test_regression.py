"""The guard of the speed: what it counts as slower, and, with the mark `full`, that it sees slower kernels."""

import itertools
import json
import os
import tomllib

import pytest

from bench import kept, regression, roofline
from bench.__main__ import main

BASELINE = {"a": {"ratio": 2.0, "margin": 0.15}}


def found(ratio, name="a", **invariants):
    return {name: {"ratio": ratio, "invariants": invariants}}


@pytest.mark.parametrize(("ratio", "failed"), [(2.29, False), (2.31, True), (0.1, False)])
def test_a_ratio_counts_beyond_the_margin_of_the_baseline(ratio, failed):
    (verdict,) = regression.judge(found(ratio), BASELINE, {})
    assert verdict.failed is failed


def test_without_a_baseline_only_invariants_count():
    (verdict,) = regression.judge(found(1e9, bytes=1), {}, {"a": {"bytes": 1}})
    assert (verdict.failed, verdict.baseline, verdict.limit) == (False, None, None)


@pytest.mark.parametrize("invariants", [{"bytes": 2}, {}, {"bytes": 1, "copies": 0}])
def test_an_invariant_that_differs_or_is_missing_or_new_counts(invariants):
    (verdict,) = regression.judge(found(1.0, **invariants), BASELINE, {"a": {"bytes": 1}})
    assert verdict.failed
    assert "expected" in verdict.broken


def test_the_limit_is_a_tenth_beyond_what_three_of_five_runs_can_have_as_their_least():
    runs = [found(ratio) for ratio in (1.7, 1.0, 1.2, 9.0, 1.1)]
    (known,) = regression.baseline_of(runs).values()
    assert known["ratio"] == 1.0
    assert known["ratio"] * (1 + known["margin"]) == pytest.approx(1.1 * 1.2)


@pytest.fixture
def asked(monkeypatch):
    """Let runs have these ratios, one after the other; which benchmarks were asked for in each."""

    def runs(*ratios, **invariants):
        names, left = [], iter(ratios)

        def run(chosen=(), without=()):
            names.append(list(chosen))
            return found(next(left), **invariants) | ({} if chosen else found(1.0, "b"))

        monkeypatch.setattr(regression, "run", run)
        return names

    return runs


@pytest.mark.parametrize(
    ("ratios", "failed", "runs"), [((2.0,), False, 1), ((9.0, 9.0, 2.2), False, 3), ((9.0, 4.0, 5.0, 1.0), True, 3)]
)
def test_what_is_too_slow_alone_is_run_again_and_three_runs_decide(asked, ratios, failed, runs):
    names = asked(*ratios)
    verdicts = {one.name: one for one in regression.guard(BASELINE, {})}
    assert names == [[], ["a"], ["a"]][:runs]
    assert verdicts["a"].ratio == min(ratios[:runs])
    assert {name: one.failed for name, one in verdicts.items()} == {"a": failed, "b": False}


def test_a_broken_invariant_counts_at_once(asked):
    names = asked(1.0, bytes=1)
    assert [one.failed for one in regression.guard(BASELINE, {"a": {"bytes": 2}})] == [True, False]
    assert names == [[]]


def test_a_benchmark_that_is_gone_fails(asked):
    asked(1.0)
    assert [one.failed for one in regression.guard(BASELINE, {"gone": {}})] == [False, False, True]


def test_a_baseline_is_that_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "FOLDER", tmp_path)
    monkeypatch.setattr(regression, "INVARIANTS", tmp_path / "invariants.json")
    monkeypatch.setattr(regression, "run", lambda names=(): found(2.0, bytes=1))
    files = regression.update()
    baseline, expected = regression.read()
    assert (baseline["a"]["ratio"], baseline["a"]["margin"]) == (2.0, pytest.approx(regression.SLACK))
    assert expected == {"a": {"bytes": 1}}
    files[0].write_text(files[0].read_text().replace('"cache": ', '"cache": 1'))
    assert regression.read() == ({}, expected)


def test_a_baseline_that_slower_code_could_pass_is_not_written(monkeypatch, tmp_path):
    ratios = itertools.cycle([1.0, 1.0, 1.2, 1.2, 1.2])
    monkeypatch.setattr(kept, "FOLDER", tmp_path)
    monkeypatch.setattr(regression, "run", lambda names=(): found(next(ratios)) | ({} if names else found(1.0, "b")))
    with pytest.raises(SystemExit, match=r"idle machine: a \(0\.32\)$"):
        regression.update()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ratio", [2.0, 9.0])
def test_the_command_says_by_its_status_whether_something_is_slower(asked, monkeypatch, capsys, tmp_path, ratio):
    asked(ratio, ratio, ratio)
    monkeypatch.setattr(regression, "read", lambda: (BASELINE, {}))
    with pytest.raises(SystemExit) as ended:
        main(["regression", "--out", str(tmp_path)])
    assert ended.value.code == int(ratio > 3)
    (known,) = BASELINE.values()
    limit = known["ratio"] * (1 + known["margin"])
    verdicts = {one[0]: one[1:] for one in json.loads((tmp_path / "regression.json").read_text())["verdicts"]}
    assert verdicts == {"a": [ratio, known["ratio"], limit, ""], "b": [1.0, None, None, ""]}
    assert ("| TOO SLOW |" in (tmp_path / "regression.md").read_text()) == (ratio > 3)
    assert ("TOO SLOW" in capsys.readouterr().out) == (ratio > 3)


def test_invariants_alone_are_judged_where_no_time_is_to_count(asked, monkeypatch, tmp_path):
    names = asked(9.0, bytes=1)
    monkeypatch.setattr(regression, "read", lambda: (BASELINE, {"a": {"bytes": 1}}))
    with pytest.raises(SystemExit) as ended:
        main(["regression", "--invariants", "--out", str(tmp_path)])
    assert ended.value.code == 0
    assert names == [[]]


def test_what_is_kept_is_what_the_roofline_counts():
    expected = json.loads(regression.INVARIANTS.read_text())
    for name, kernels in expected.items():
        kind, _, shape = name.partition("[")
        if kind in ("test_gram", "test_combine"):
            m, n = int(shape.split("-")[0]), 1 << 19
            part = kind.removeprefix("test_")
            assert kernels["bytes"] == {part: getattr(roofline, part)(m, n, 4).bytes}
    held = {name: seen[key] for name, seen in expected.items() for key in seen if key.startswith("peak")}
    assert {"test_gram[64-2048]", "test_step[524288]", "test_dlpack"} <= held.keys()
    assert all(units * regression.COARSE < 4 << 19 for units in held.values())  # less than one of the long rows
    sent = {kind: sum(nbytes for _, nbytes in expected[f"test_exchange[{kind}]"]["messages"].values()) for kind in SENT}
    for kind, (n, rows) in SENT.items():
        assert sent[kind] == pytest.approx(4 * n * rows, rel=0.01)  # beside vectors: parts of K, c
    for file in kept.FOLDER.glob("*/regression.json"):
        assert json.loads(file.read_text())["ratios"].keys() == expected.keys()


SENT = {"sharded": (1 << 17, 1.5), "allgather": (1 << 12, 2.0)}  # n, and rows that a rank of 2 sends


def test_ordinary_tests_run_no_benchmarks():
    settings = tomllib.loads((regression.ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"]
    assert (regression.ROOT / regression.BENCHMARKS).parent.name == "bench"


# -- that it sees what is slower -----------------------------------------------------------------------------

NAMES = ("test_gram[64-2048]", "test_step[524288]")  # most of their time is the kernels'
SLOWED = """
import time
from fastnewton.kernels.cpu import gram, step

def slowed(kernel):
    def run(*given, **named):
        start = time.perf_counter()
        found = kernel(*given, **named)
        end = start + {factor} * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return found
    return run

gram.gram, step.step_of_arrays = slowed(gram.gram), slowed(step.step_of_arrays)
"""


OF_SEVERAL_PROCESSES = ("test_threaded_step", "test_exchange", "test_first_call")  # half a minute together


@pytest.fixture(scope="module")
def measured():
    """A baseline measured now, and invariants."""
    runs = [regression.run((), OF_SEVERAL_PROCESSES) for _ in range(regression.BASELINE_RUNS)]
    return regression.baseline_of(runs), json.loads(regression.INVARIANTS.read_text())


@pytest.mark.full
@pytest.mark.parametrize("factor", [1.25, 2.0])
def test_slower_kernels_are_seen(measured, monkeypatch, tmp_path, factor):
    (tmp_path / "slowed.py").write_text(SLOWED.format(factor=factor))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p slowed")
    verdicts = regression.guard(*measured, NAMES)
    assert [(one.name, one.failed, one.broken) for one in verdicts] == [(name, True, "") for name in NAMES], verdicts


@pytest.mark.full
def test_ten_runs_of_unchanged_code_pass(measured):
    for _ in range(10):
        verdicts = regression.guard(*measured, list(measured[0]))
        assert not [one for one in verdicts if one.failed]
