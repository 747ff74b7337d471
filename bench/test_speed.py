"""Benchmarks of each part: `pytest bench --benchmark-only`; `python -m bench regression` judges them.

Passes are timed beside what one core reads and multiplies in its first-level cache, for long arrays beside its read of
as many bytes; the roofline is that of a core, and all but one of them, which is held to what all cores read, run on one
core.  That keeps ratios stable on a shared machine: a core is undisturbed now and then however busy the machine is, all
cores together rarely are, and the rates of the other caches depend on where in memory the arrays happen to be.

spectrum: 9m³ flops are LAPACK's count for all eigenvectors.  Exchanges: the roofline is what they send, at the bytes a
second of the all-reduce of the gradient.  DLPack and first call: in place of a roofline, NumPy's own import of the
arrays, and the import of NumPy and Numba; a round trip has no bytes to move.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastnewton as fn
from bench import ceilings, exchange, peers, regression, roofline, short, train
from fastnewton import arrays
from fastnewton.kernels.cpu.threads import set_thread_limit

SHORT, LONG = 1 << 14, 1 << 19
FEW, MANY = (8, SHORT), (64, SHORT // 8)
DLPACK = ("__dlpack__", "__dlpack_device__")


@pytest.fixture
def seconds(request):
    return float(request.config.getoption("benchmark_max_time"))


@pytest.fixture
def one_core():
    with set_thread_limit(1):
        yield


@pytest.mark.benchmark(group="gram")
@pytest.mark.parametrize(("m", "n"), [FEW, MANY])
def test_gram(benchmark, seconds, one_core, m, n):
    gram, gram_of_long = (partial(fn.gram, peers.workers(m, length)[1]) for length in (n, LONG))
    invariants = regression.invariants_of(gram_of_long)
    regression.time_passes(benchmark, gram, [roofline.gram(m, n, 4)], seconds, invariants)


@pytest.mark.benchmark(group="spectrum")
@pytest.mark.parametrize("m", [8, 32])
def test_spectrum(benchmark, seconds, m):
    spectrum = partial(fn.spectrum, fn.gram(peers.workers(m, SHORT)[1]))
    work = roofline.Pass(2 * 8 * m * m, 9 * m**3)
    regression.time_passes(benchmark, spectrum, [work], seconds, regression.invariants_of(spectrum))


@pytest.mark.benchmark(group="combine")
@pytest.mark.parametrize(("m", "n"), [FEW, MANY])
def test_combine(benchmark, seconds, one_core, m, n):
    def prepared(n):
        given, out = peers.workers(m, n), np.empty(n, np.float32)
        return partial(fn.combine, *given, fn.spectrum(fn.gram(given[1])).coefficients, lr=0.5, out=out)

    invariants = regression.invariants_of(prepared(LONG))
    regression.time_passes(benchmark, prepared(n), [roofline.combine(m, n, 4)], seconds, invariants)


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("n", [650, SHORT, LONG])
def test_step(benchmark, seconds, one_core, n):
    time_step(benchmark, seconds, n)


@pytest.mark.benchmark(group="step")
def test_threaded_step(benchmark, seconds):
    time_step(benchmark, seconds, LONG, ceilings.ReadCeiling(1 << 26))


def time_step(benchmark, seconds, n, read=None):
    step, passes = peers.fastnewton(*peers.workers(8, n)), [part(8, n, 4) for part in (roofline.gram, roofline.combine)]
    regression.time_passes(benchmark, step, passes, seconds, regression.invariants_of(step), read)


@pytest.fixture(scope="module")
def exchanged():
    """A row for each n, of many rounds, since each is one call and others disturb it."""
    settings = {"lengths": [1 << 12, 1 << 17], "rounds": 300, "most_bytes": exchange.MOST_BYTES}
    return train.run_ranks("bench.exchange_rank", 2, settings, after=lambda: None)


@pytest.mark.benchmark(group="exchange")
@pytest.mark.parametrize(("kind", "which"), [("allgather", 0), ("sharded", 1)], ids=["allgather", "sharded"])
def test_exchange(benchmark, exchanged, kind, which):
    row = exchanged[which]
    sent, bandwidth = row["sent"][kind], 4 * row["n"] / min(row["samples"]["allreduce"])
    invariants = {"messages": row["messages"][kind]}
    work, samples = roofline.Pass(sent, 0), row["samples"][kind]
    regression.record(benchmark, samples, sent / bandwidth, invariants, work, bandwidth=bandwidth)


@pytest.mark.benchmark(group="DLPack round trip")
def test_dlpack(benchmark, seconds):
    given = np.zeros((2, 8, 650), np.float32)
    only_dlpack = [{name: getattr(array, name) for name in DLPACK} for array in given]
    foreign: list[Any] = [SimpleNamespace(**methods) for methods in only_dlpack]

    def round_trip():
        thetas, grads = arrays.pair(*foreign)
        result = arrays.output(None, thetas, (thetas, grads)).export()
        return thetas, grads, result, np.from_dlpack(result)

    def reference():
        return [np.from_dlpack(one) for one in (*foreign, given[0, 0])]

    thetas, grads, result, found = round_trip()
    places = [(thetas.table[0], given[0]), (grads.table[0], given[1]), (found.ctypes.data, result)]
    invariants = {"copies": sum(int(place != array.ctypes.data) for place, array in places)}
    invariants |= regression.invariants_of(round_trip)
    samples = regression.in_turn({"ours": round_trip, "reference": reference}, seconds)
    regression.record(benchmark, samples["ours"].seconds, samples["reference"].min, invariants)


@pytest.mark.benchmark(group="first call, warm cache")
def test_first_call(benchmark):
    taken, loaded = short.starts()
    libraries, imports, steps, _ = zip(*taken, strict=True)
    calls = [sum(each) for each in zip(imports, steps, strict=True)]
    work = roofline.step(8, 650, 4)
    regression.record(benchmark, calls, min(libraries), {"libraries": loaded}, work)
