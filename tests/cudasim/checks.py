"""What the tests also run under sanitizers, in child processes."""

from pathlib import Path

import numpy as np

from .module import SimModule, poisoned, schedule

HERE = Path(__file__).parent
THREADS = 64
SCHEDULES = [("ascending", 0), ("descending", 0), ("random", 0), ("random", 1), ("random", 2)]


def bugs_options(bug=None):
    return (f"-DTHREADS={THREADS}", *([f"-DBUG_{bug}"] if bug else []))


def reduction(bug=None, blocks=5, n=1003, shared_bytes=32 * 8):
    """Sum with the kernel of bugs.cu, twice in a row, and return the result."""
    kernel = SimModule(HERE / "bugs.cu", bugs_options(bug)).get_function("sum")
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    partial, ticket, result = poisoned(blocks, np.float64), np.zeros(1, np.uint32), poisoned(1, np.float64)
    for _ in range(2):
        kernel((blocks,), (THREADS,), (x, np.int64(n), partial, ticket, result), shared_mem=shared_bytes)
    return result[0], x.sum(dtype=np.float64)


def reduction_in_every_order(bug=None, **sizes):
    for order, seed in SCHEDULES:
        with schedule(order, seed):
            result, expected = reduction(bug, **sizes)
        assert abs(result - expected) < 1e-9, (order, seed, result, expected)
