"""The paper's experiment: what is run, over how many MPI ranks, and what all runs of a setting sum up to.

Gradients are counted per worker: one of its share of a batch of 256, so that an epoch is samples / 256 of them
whatever m is.  Step lengths are searched first, with a seed of their own.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.ceilings import available_cores
from bench.problems import training_files
from bench.train import run_ranks

BATCH = 256
LOCAL_STEPS = 2  # p, gradients per worker from one combination to the next
MOMENTUM = 0.9
PAPER_LRS = (0.01, 0.0003)
WORKERS = (1, 2, 4, 8)
GRID = (0.03, 0.1, 0.3, 1.0, 3.0)
TUNING_SEED = 100
PROBLEMS = (("mnist", "tanh", 8), ("cifar10", "tanh", 8), ("cifar10", "relu", 4))  # with the most workers
APART = ("own", "diff")  # protocols that are run with everything beside them
OTHERS = ("probe", "spread-step", "spread-gradient")  # with m = 4, on CIFAR-10
SECONDS = {1: 0.009, 2: 0.009, 4: 0.014, 8: 0.022}  # a gradient of all workers, jobs side by side, 2 cores
LIMIT = 7 * 86_400.0


@dataclass(frozen=True)
class Run:
    """One training run."""

    data: str
    activation: str
    samples: int
    epochs: int
    protocol: str
    workers: int
    lr: float
    momentum: float = 0.0
    cutoff: float = 0.1
    max_rank: int | None = None
    lr_cap: str | None = None
    ablation: bool = False
    seed: int = 0

    @property
    def evaluations(self) -> int:
        """Gradients per worker."""
        return self.epochs * (self.samples // BATCH)

    @property
    def options(self) -> dict:
        """Of the step.  The ablation is c = 0 on the span: τ = 0 deletes Θc, and θ̄ − lr (ḡ − Gc) is left."""
        rates = {"lr": 0.0, "lr_rest": self.lr} if self.ablation else {"lr": self.lr}
        return {**rates, "cutoff": self.cutoff, "max_rank": self.max_rank, "lr_cap": self.lr_cap}

    @property
    def name(self) -> str:
        """What the run is called in file names."""
        return "-".join(f"{key}={value}" for key, value in asdict(self).items())


@dataclass(frozen=True)
class Scale:
    """How much is run: images and epochs of each data set; seeds with m = 1 and 8, and with other m."""

    mnist: tuple[int, int]
    cifar10: tuple[int, int]
    seeds: int
    fewer_seeds: int

    def size(self, data: str) -> tuple[int, int]:
        """Return the images and epochs of a data set."""
        return {"mnist": self.mnist, "cifar10": self.cifar10}[data]


SCALES = {
    "quick": Scale((1024, 4), (1024, 4), 1, 1),
    "default": Scale((8192, 10), (4864, 15), 5, 3),
    "full": Scale((59_904, 50), (49_920, 50), 5, 3),
}


def tuning(scale: Scale) -> list[Run]:
    """Each method with each step length; DistNewton with the most workers."""
    found = []
    for data, activation, most in PROBLEMS:
        samples, epochs = scale.size(data)
        for lr in GRID:
            sgd = Run(data, activation, samples, epochs, "sgd", 1, lr, seed=TUNING_SEED)
            newton = [replace(sgd, protocol=protocol, workers=most) for protocol in APART]
            found += [sgd, replace(sgd, momentum=MOMENTUM), *newton]
    return found


def tuned(settings: list[dict]) -> dict[str, float]:
    """The step length that ended lowest, for each "data activation method"."""
    best: dict[str, tuple[float, float]] = {}
    for setting in settings:
        run, (nll,) = setting["run"], setting["final"].values()
        key = " ".join([run["data"], run["activation"], "momentum" if run["momentum"] else run["protocol"]])
        best[key] = min(best.get(key, (math.inf, GRID[0])), (math.inf if nll is None else nll, run["lr"]))
    return {key: lr for key, (_, lr) in best.items()}


def plan(scale: Scale, tuned: dict[str, float]) -> list[Run]:
    """The runs that are compared, each setting with its seeds.

    With j = 0 it is local SGD; with two workers one direction is kept, whatever the cutoff.
    """
    found = []
    for data, activation, most in PROBLEMS:
        samples, epochs = scale.size(data)
        best = {method: tuned[f"{data} {activation} {method}"] for method in ("sgd", "momentum", *APART)}
        sgd = Run(data, activation, samples, epochs, "sgd", 1, best["sgd"])
        found += [*(replace(sgd, lr=lr) for lr in (best["sgd"], *PAPER_LRS))]
        found.append(replace(sgd, lr=best["momentum"], momentum=MOMENTUM))
        for protocol, m in itertools.product(APART, WORKERS if activation == "tanh" else (1, most)):
            newton = replace(sgd, protocol=protocol, workers=m, lr=best[protocol])
            for lr in (best[protocol], *(PAPER_LRS if m in (1, most) else PAPER_LRS[:1])):
                variants = ({}, {"ablation": True}, {"max_rank": 0}, {"lr_cap": "sigma"})
                found += [replace(newton, lr=lr, **variant) for variant in (variants if m > 1 else variants[:1])]
            if activation == "tanh":
                found += [replace(newton, max_rank=j) for j in (1, 3) if j < m - 1]
                found += [replace(newton, cutoff=cutoff) for cutoff in (0.5, 0.9) if m > 2]
        if data == "cifar10" and activation == "tanh":
            found += [replace(sgd, protocol=protocol, workers=4, lr=best["own"]) for protocol in OTHERS]
    return [
        replace(run, seed=seed)
        for run in dict.fromkeys(found)
        for seed in range(scale.seeds if run.workers in (1, 8) else scale.fewer_seeds)
    ]


def execute(runs: list[Run], folder: Path, data: str, command: str, after: Callable[[], None]) -> None:
    """Train, all runs of as many workers in one MPI job; with few workers several groups of ranks side by side."""
    for name in {run.data for run in runs}:
        training_files(name, data)  # what is missing is told before ranks start
    for workers, some in itertools.groupby(sorted(runs, key=lambda run: run.workers), lambda run: run.workers):
        settings = {"runs": [asdict(run) for run in some], "folder": str(folder), "data": data, "command": command}
        ranks = workers * max(1, min(available_cores() // workers, len(settings["runs"])))
        run_ranks("bench.figure1_rank", ranks, settings, after, LIMIT)


def missing(runs: list[Run], folder: Path) -> list[Run]:
    """Those that have left no file."""
    return [run for run in runs if not (folder / f"{run.name}.json").exists()]


def summary(runs: list[Run], folder: Path) -> list[dict]:
    """For each setting the curve over its seeds, and where each seed ended: None is a run that diverged."""
    settings: dict[Run, list[dict]] = {}
    for run in runs:
        found = json.loads((folder / f"{run.name}.json").read_text())
        settings.setdefault(replace(run, seed=0), []).append(found)
    return [_summed(found) for found in settings.values()]


def _summed(found: list[dict]) -> dict:
    longest = max((one["evaluations"] for one in found), key=len)
    points = list(itertools.zip_longest(*(one["nll"] for one in found)))
    sound = [[nll for nll in point if nll is not None] for point in points]
    return {
        "run": {key: value for key, value in found[0]["run"].items() if key != "seed"},
        "final": {str(one["run"]["seed"]): one["nll"][-1] for one in found},
        "evaluations": longest,
        "mean": [round(statistics.fmean(point), 4) if point else None for point in sound],
        "spread": [round(statistics.stdev(point), 4) if len(point) > 1 else 0.0 for point in sound],
        **{key: round(statistics.fmean(one[key] for one in found), 3) for key in ("rank", "captured", "capped")},
        "seconds": round(sum(one["seconds"] for one in found), 1),
    }


def estimate(runs: list[Run]) -> float:
    """Seconds that the runs take on two cores like those on which SECONDS was measured."""
    return sum(run.evaluations * SECONDS[run.workers] for run in runs)
