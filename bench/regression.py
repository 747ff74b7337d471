"""Guarding the speed: `pytest bench --benchmark-only`, compared with the baseline of this CPU.

A benchmark's figure is its ratio: the least time of its task over the roofline time that follows from the least times
of its ceilings, all from one process and timed in turn.  Others on a machine slow a sample, never speed it up, so that
least times are the machine's, and what throttles them all cancels.  A benchmark beyond its limit is run again, and
counts as too slow when ATTEMPTS runs say so.  The baseline is the least ratio of BASELINE_RUNS runs.  The largest that
the least of ATTEMPTS among these can be, the third smallest of five, is the spread; SLACK beyond it is the limit.
What has a limit 25 % or more beyond its baseline is measured again, and if it keeps that, nothing is written.

What does not depend on time (bytes, memory held, messages) is compared with `results/invariants.json`, which is the
same for all machines, and counts at once.
"""

import json
import math
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from bench import ceilings, kept
from bench.compare import last_level_cache
from bench.kernel_calls import Call, record_kernel_calls
from bench.report import ROOT, Table
from bench.roofline import Pass
from bench.timing import Sample, interleaved
from fastnewton.arrays import allocate
from fastnewton.kernels.cpu import threads

BENCHMARKS, INVARIANTS = "bench/test_speed.py", kept.FOLDER / "invariants.json"
SLACK, MOST_MARGIN = 0.1, 0.25  # so that runs of unchanged code may differ by 13 %
ATTEMPTS = 3
BASELINE_RUNS = 5
SHORTEST = 1e-3  # seconds of a sample: on a busy machine a core is rarely ours for longer
MOST_ROUNDS = 10_000
FIRST_LEVEL, MULTIPLIED = 1 << 14, 64  # bytes read, rows of matrices, in the first-level cache; BLAS takes one thread
CACHED = 1 << 24  # bytes; what is longer is compared with as long a read, since it may come from memory
LEAST_READ = 1 << 18  # bytes, for a call to be much longer than its overhead
COARSE = 300_000  # bytes; widths of vectors and versions of NumPy differ by less, an array of a long row by more


# -- one benchmark ------------------------------------------------------------------------------------------


class CoreReadCeiling:
    """Reading with one core; called, it reads `bytes`, in passes over a buffer of the given size."""

    def __init__(self, size: int):
        self._words, self._passes = allocate(max(size // 64, 1) * 8, np.int64), -(-LEAST_READ // size)
        self._words[:] = 1
        self.bytes = self._words.nbytes * self._passes

    def __call__(self) -> None:
        assert _read(self._words, self._passes) == self._words.size * self._passes


@numba.njit(nogil=True)
def _read(words, passes):
    total = 0
    for _ in range(passes):
        total += ceilings._sum_of_8(words)
    return total


def time_passes(
    benchmark: Any,
    task: Callable,
    passes: Sequence[Pass],
    seconds: float,
    invariants: Mapping,
    read: CoreReadCeiling | ceilings.ReadCeiling | None = None,
) -> None:
    """Time a task of these passes in turn with both ceilings of a core, or another of reading, for so many seconds."""
    work = Pass(sum(part.bytes for part in passes), sum(part.flops for part in passes))
    read = read or CoreReadCeiling(work.bytes if work.bytes > CACHED else FIRST_LEVEL)
    multiply = ceilings.GemmCeiling("float32", MULTIPLIED)
    samples = in_turn({"task": task, "read": read, "multiply": multiply}, seconds)
    rates = {"bandwidth": read.bytes / samples["read"].min, "rate": multiply.flops / samples["multiply"].min}
    roofline = sum(part.seconds(**rates) for part in passes)
    record(benchmark, samples["task"].seconds, roofline, invariants, work, **rates)


def in_turn(tasks: Mapping[str, Callable], seconds: float) -> dict[str, Sample]:
    """Short samples of all tasks, for so many seconds."""
    for task in tasks.values():
        task()  # nothing is to be compiled later
    return interleaved(tasks, rounds=MOST_ROUNDS, shortest=SHORTEST, limit=seconds)


NOTHING = Pass(0, 0)


def record(
    benchmark: Any, seconds: Sequence[float], roofline: float, invariants: Mapping, work: Pass = NOTHING, **rates: float
) -> None:
    """Hand samples to pytest-benchmark, and what they are compared with; without rates, another task's time."""
    benchmark.pedantic(lambda: None, rounds=len(seconds))
    benchmark.stats.stats.data[:] = seconds
    benchmark.extra_info.update(bytes=work.bytes, flops=work.flops, ceiling=rates or {"seconds": roofline})
    benchmark.extra_info.update(roofline=roofline, ratio=min(seconds) / roofline, invariants=invariants)


def invariants_of(task: Callable) -> dict:
    """Bytes of the caller's rows that one call hands to each kernel, and how much it holds at most, in units of COARSE.

    With one thread, since there are more parts of K with more.
    """
    with threads.set_thread_limit(1):
        with record_kernel_calls() as calls:
            task()
        task()  # loads code
        tracemalloc.start()
        try:
            task()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    return {"bytes": count_bytes(calls), f"peak // {COARSE}": peak // COARSE}


def count_bytes(calls: Iterable[Call]) -> dict[str, int]:
    """Add up the bytes of the caller's rows that each kernel was handed."""
    handed = Counter()
    for call in calls:
        handed[call.kernel] += call.nbytes
    return dict(handed)


# -- all of them, and what is to be thought of them -----------------------------------------------------------


class Verdict(NamedTuple):
    """A benchmark's least ratio, that of the baseline and its limit, where there is one, and what else is wrong."""

    name: str
    ratio: float | None
    baseline: float | None
    limit: float | None
    broken: str = ""

    @property
    def failed(self) -> bool:
        if self.ratio is None or self.limit is None:
            return bool(self.broken)
        return bool(self.broken) or self.ratio > self.limit


def run(names: Iterable[str] = (), without: Iterable[str] = ()) -> dict[str, dict]:
    """Return the extra_info of all benchmarks, or of these, by name, from a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        chosen = [f"{BENCHMARKS}::{name}" for name in names] or [BENCHMARKS]
        left_out = [f"--deselect={BENCHMARKS}::{name}" for name in without]
        options = ["-q", "--benchmark-only", f"--benchmark-json={file}"]
        command = [sys.executable, "-m", "pytest", *options, *left_out, *chosen]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the benchmarks failed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
        return {one["name"]: one["extra_info"] for one in json.loads(file.read_text())["benchmarks"]}


def guard(baseline: Mapping, expected: Mapping, names: Iterable[str] = ()) -> list[Verdict]:
    """Judge each benchmark; rerun those that are too slow, ATTEMPTS times in all."""
    verdicts, least, left = {}, {}, names
    for _ in range(ATTEMPTS):
        found = run(left)
        for name, info in found.items():
            info["ratio"] = least[name] = min(info["ratio"], least.get(name, math.inf))
        verdicts |= {one.name: one for one in judge(found, baseline, expected)}
        left = [one.name for one in verdicts.values() if one.failed and not one.broken]
        if not left:
            break
    gone = [Verdict(name, None, None, None, "was not run") for name in names or expected if name not in verdicts]
    return [*verdicts.values(), *gone]


def judge(found: Mapping[str, dict], baseline: Mapping, expected: Mapping) -> list[Verdict]:
    """Judge one run; an empty baseline allows any ratio."""
    verdicts = []
    for name, info in found.items():
        known, seen, wanted = baseline.get(name), info["invariants"], expected.get(name, {})
        limit = known["ratio"] * (1 + known["margin"]) if known else None
        wrong = [key for key in sorted(seen.keys() | wanted.keys()) if seen.get(key) != wanted.get(key)]
        broken = "; ".join(f"{key}: {seen.get(key)}, expected {wanted.get(key)}" for key in wrong)
        verdicts.append(Verdict(name, info["ratio"], known and known["ratio"], limit, broken))
    return verdicts


def baseline_of(runs: Sequence[Mapping[str, dict]]) -> dict[str, dict]:
    """Ratio and margin of each benchmark, from several runs."""
    ratios = {name: sorted(one[name]["ratio"] for one in runs) for name in runs[0]}
    return {
        name: {"ratio": found[0], "margin": (1 + SLACK) * found[-ATTEMPTS] / found[0] - 1, "runs": found}
        for name, found in ratios.items()
    }


def update() -> list[Path]:
    """Write the baseline of this CPU and the invariants; the files."""
    runs = [run() for _ in range(BASELINE_RUNS)]
    ratios = baseline_of(runs)
    for _ in range(ATTEMPTS):
        if wide := [name for name, known in ratios.items() if known["margin"] >= MOST_MARGIN]:
            ratios |= baseline_of([run(wide) for _ in range(BASELINE_RUNS)])
    if wide := [f"{name} ({known['margin']:.2f})" for name, known in ratios.items() if known["margin"] >= MOST_MARGIN]:
        raise SystemExit(f"nothing written: margins of {MOST_MARGIN} and more, try an idle machine: {', '.join(wide)}")
    written = {
        _baseline_file(): {"machine": _this_machine(), "ratios": ratios},
        INVARIANTS: {name: info["invariants"] for name, info in runs[0].items()},
    }
    for file, content in written.items():
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(json.dumps(content, indent=1) + "\n")
    return list(written)


def read() -> tuple[dict, dict]:
    """The baseline of this CPU, empty if there is none, and the invariants."""
    file = _baseline_file()
    known = json.loads(file.read_text()) if file.exists() else {}
    return known["ratios"] if known.get("machine") == _this_machine() else {}, json.loads(INVARIANTS.read_text())


def _baseline_file() -> Path:
    return kept.folder(ceilings.machine()) / "regression.json"


def _this_machine() -> dict:
    """What a baseline is good for; processors of several kinds bear the same model name in virtual machines."""
    return {key: ceilings.machine()[key] for key in ("cpu", "cores")} | {"cache": last_level_cache()}


def table(verdicts: list[Verdict]) -> Table:
    """Each benchmark beside its baseline."""
    rows = []
    for one in verdicts:
        known = (f"{one.baseline:.3g}", f"{one.limit:.3g}") if one.baseline else ("none", "")
        said = one.broken or ("TOO SLOW" if one.failed else "as it was")
        rows.append((one.name, f"{one.ratio:.3g}" if one.ratio else "", *known, said))
    note = f"Ratio: least time over roofline time; the least of up to {ATTEMPTS} runs where one was beyond the limit."
    return Table("Speed and invariants", ("benchmark", "ratio", "baseline", "limit", "verdict"), rows, note)
