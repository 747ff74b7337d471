"""What the tests also run under sanitizers, in child processes."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import tolerances
from problems import DTYPES, workers

import fastnewton as fn
from fastnewton.kernels.cuda import jit, memory
from fastnewton.kernels.cuda.finite import finite_rows

from . import device
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


# -- the package's kernels ----------------------------------------------------------------------------------


@contextlib.contextmanager
def simulated_device():
    """The simulated device as the module `cupy`; its workspaces are full of NaN whenever they are handed out."""
    really, caches = memory.workspace, (jit.cupy, jit._load, jit._resident_blocks)

    def workspace(purpose, size):
        found = really(purpose, size)
        found.host[...] = np.nan
        return found

    for function in caches:
        function.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", device)  # this name alone: what else is imported meanwhile is there to stay
        patch.setattr(memory, "workspace", workspace)
        try:
            yield
        finally:
            fn.clear_caches()
            device.in_flight.clear()
            for function in caches:
                function.cache_clear()


def there(host, past=0, apart=0):
    """A copy on the device that begins `past` items after a multiple of 512 bytes, its rows `apart` items apart."""
    rows = np.atleast_2d(host)
    m, n = rows.shape
    memory = device.empty(m * (n + apart) + past, host.dtype)
    view = memory.host[past:].reshape(m, n + apart)[:, :n]
    view[...] = rows
    return device.ndarray.of(view if host.ndim == 2 else view[0], 0)


def distance(result, expected):
    return np.linalg.norm(result.host.astype(np.float64) - expected)


def assert_step(thetas, grads, *, placed=there, **options):
    """fn.step on the simulated device agrees with the paper; the result and what the step says of itself."""
    expected = reference.step(thetas, grads, **options)
    theta, info = fn.step(placed(thetas), placed(grads), **options)
    dtype = thetas[0].dtype
    compute = tolerances.computed_in(dtype, "float64" if options.get("cutoff", 0.1) < 1e-3 else None)
    assert type(theta) is device.ndarray
    assert (theta.shape, theta.dtype) == (thetas[0].shape, dtype)
    assert info.rank == expected.rank
    assert distance(theta, expected.theta_new) <= tolerances.of_step(expected, dtype, compute)
    for k in range(expected.rank):
        bound = tolerances.of_singular_value(expected.q, k, compute)
        assert abs(info.singular_values[k] - expected.q.sigma[k]) <= bound
    return theta, info


def every_kernel(m, dtype):
    """All kernels once, and each result against the paper: small, because sanitizers are slow."""
    rng = np.random.default_rng(m)
    with simulated_device():
        thetas, grads = workers(rng, m, 515, DTYPES[dtype])
        assert_step(thetas, grads, lr=0.7, lr_cap="curvature")
        unlike = [there(row, past=past % 3) for past, row in enumerate(grads)]
        gram = fn.gram(unlike, there(grads[0], past=1), thetas=there(thetas))
        q = reference.quantities(grads, thetas)
        # The diagonal bounds every entry; products of thetas are formed in float64.
        scale = np.linalg.norm(q.Theta) * np.linalg.norm(q.G)
        assert np.abs(gram.cross_matrix.host - q.Theta.T @ q.G).max() <= 1e-12 * scale
        assert np.isfinite(gram.matrix.host).all()
        assert np.isfinite(fn.apply_inverse(there(thetas), unlike, there(grads[0])).host.astype(np.float64)).all()
        # Blocks for each worker: more would be too many threads for ThreadSanitizer.
        assert finite_rows(fn.arrays.rows(there(grads[:16]), "grads")).host.all()
