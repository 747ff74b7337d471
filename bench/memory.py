"""Memory of this process, as far as the system tells: on Linux; elsewhere all is None."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fastnewton as fn

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str = "VmRSS") -> int | None:
    """Bytes in memory now; with VmHWM, the most since the last reset."""
    found = re.search(rf"{name}:\s+(\d+)", STATUS.read_text()) if STATUS.exists() else None
    return int(found[1]) << 10 if found else None


def peak_growth(task: Callable[[], object]) -> int | None:
    """Bytes that the process held while the task ran, at the most, beyond what it held before."""
    if not RESET.exists():
        return None
    RESET.write_text("5")
    before = resident()
    task()
    most = resident("VmHWM")
    return None if before is None or most is None else max(0, most - before)


def growth_over_steps(first: int, last: int, m: int = 8, n: int = 650) -> int | None:
    """Bytes that the process holds after step `last` beyond those after step `first`."""
    thetas, grads = np.random.default_rng(0).standard_normal((2, m, n))
    held = {}
    for number in range(1, last + 1):
        fn.step(thetas, grads, lr=0.5)
        if number in (first, last):
            held[number] = resident()
    return None if held[first] is None else held[last] - held[first]


def peak_of_step(m: int, n: int) -> int | None:
    """Bytes that a first step of that size takes beside the caller's arrays, in float32 with out=."""
    rng = np.random.default_rng(0)
    arrays = [rng.random((m, n), np.float32) for _ in range(2)]
    out = np.ones(n, np.float32)
    fn.step(*(given[:, :2048] for given in arrays), lr=0.5)  # compiles
    fn.clear_caches()
    return peak_growth(lambda: fn.step(*arrays, lr=0.5, out=out))
