"""Timing several tasks in turn, so that all of them see the same machine."""

import gc
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

SHORTEST = 2e-2  # seconds; quicker tasks are called several times for one sample, since cores need 10 ms to speed up
LEAST_ROUNDS = 3
Name = TypeVar("Name")


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, measured several times."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a share of the median."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float((high - low) / self.median)

    def as_dict(self) -> dict:
        return {"median": self.median, "min": self.min, "spread": self.spread, "samples": len(self.seconds)}


def interleaved(
    tasks: Mapping[Name, Callable[[], object]],
    *,
    rounds: int,
    shortest: float = SHORTEST,
    budget: float = float("inf"),
    limit: float = float("inf"),
    unlimited: Collection[Name] = (),
    before: Callable[[], None] = lambda: None,
    settle: Callable[[], None] = lambda: None,
    after_round: Callable[[], None] = lambda: None,
) -> dict[Name, Sample]:
    """Time every task once a round, in an order drawn for it; each has run before, so nothing is compiled now.

    A sample takes about `shortest` seconds or more.  `before` is called before each task, `settle` before the clock is
    read, `after_round` after each round.  A task that has used up `budget` seconds is left out of further rounds,
    unless it is among the unlimited.  Beyond `limit` seconds in all, further rounds are skipped, except for the first
    LEAST_ROUNDS.
    """
    end, draw = time.perf_counter() + limit, random.Random(0)
    calls = {name: _calls(task, shortest, settle) for name, task in tasks.items()}
    found: dict[Name, list[float]] = {name: [] for name in tasks}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            if number >= LEAST_ROUNDS and time.perf_counter() > end:
                after_round()
                continue
            for name, task in draw.sample(list(tasks.items()), len(tasks)):
                spent = sum(found[name]) * calls[name]
                if not found[name] or spent < budget or name in unlimited:
                    before()
                    found[name].append(_timed(task, calls[name], settle))
            after_round()
    finally:
        if enabled:
            gc.enable()
    return {name: Sample(tuple(values)) for name, values in found.items()}


def _calls(task: Callable[[], object], shortest: float, settle: Callable[[], None]) -> int:
    """How many calls make one sample; the first ones wake threads and fill caches."""
    least = float("inf")
    for _ in range(5):
        least = min(least, _timed(task, 1, settle))
        if least >= shortest:
            break
    return max(1, round(shortest / least))


def _timed(task: Callable[[], object], calls: int, settle: Callable[[], None]) -> float:
    if calls > 1:
        task()  # wakes threads and fills caches after the pause
    settle()
    start = time.perf_counter()
    for _ in range(calls):
        task()
    settle()
    return (time.perf_counter() - start) / calls
