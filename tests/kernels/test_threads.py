"""Threads that share a pass: interruptions, the end of the interpreter, and targets that Numba is told of."""

import os
import threading
import time

import numpy as np
import pytest

import fastnewton as fn
from fastnewton.kernels.cpu import combine, threads
from fastnewton.kernels.cpu import gram as cpu
from fastnewton.kernels.cpu.simd import CACHE_LINE

HALF = """
import numpy as np
import fastnewton as fn
from fastnewton.kernels.cpu import simd

assert not simd.HALF_IN_HARDWARE
every = np.arange(65536, dtype=np.uint16).view(np.float16)
nothing = np.zeros((1, 65536), np.float16)
back = fn.combine(every[None], nothing, np.zeros(1), lr=0.0)
plain = ~np.isnan(every)
assert (back[plain].view(np.uint16) == every[plain].view(np.uint16)).all()
assert np.isnan(back[~plain]).all()
# Means of neighbours lie half-way: NumPy rounds them to even, as the kernel must; the largest mean is finite.
finite = np.arange(0x7BFF, dtype=np.uint16)
for sign in (0, 0x8000):
    pair = np.stack([finite | sign, finite + 1 | sign]).view(np.float16)
    mean = fn.combine(pair, np.zeros_like(pair), np.zeros(2), lr=0.0)
    expected = pair.astype(np.float64).mean(0).astype(np.float16)
    assert (mean.view(np.uint16) == expected.view(np.uint16)).all()
"""

LATE = """
import atexit, threading, time
import numpy as np
import fastnewton as fn

arrays = np.random.default_rng(0).standard_normal((2, 4, 1 << 19)).astype(np.float32)
expected = fn.step(*arrays, lr=0.5)[0]

def check(where):
    assert (fn.step(*arrays, lr=0.5)[0] == expected).all()
    print(where, flush=True)

atexit.register(check, "at exit")

def later():
    threading.main_thread().join()
    check("after the main thread")

threading.Thread(target=later).start()
"""

AMONG_THREADS = """
import os, signal, threading, time, warnings
import numpy as np
import fastnewton as fn

warnings.simplefilter("ignore", DeprecationWarning)  # Python warns about any fork beside threads
thetas, grads = np.random.default_rng(3).standard_normal((2, 2, 1 << 19), np.float32)  # large enough for threads
expected = fn.step(thetas, grads, lr=0.5)[0].tobytes()
stop = threading.Event()

def stepping():
    while not stop.is_set():
        assert fn.step(thetas, grads, lr=0.5)[0].tobytes() == expected
        time.sleep(0.01)

def compiling():
    fn.gram(np.ones((3, 9)))

def child():
    signal.alarm(100)  # ends what a lock of the parent's holds up
    fn.gram(np.ones((4, 9)))
    return 0 if fn.step(thetas, grads, lr=0.5)[0].tobytes() == expected else 1

others = [threading.Thread(target=task) for task in (stepping, compiling)]
for thread in others:
    thread.start()
children = []
while others[1].is_alive() or len(children) < 3:
    children.append(os.fork())
    if not children[-1]:
        os._exit(child())
    others[1].join(0.5)
ended = {os.waitpid(each, 0)[1] for each in children}
stop.set()
print(ended)
"""


@pytest.fixture
def arrays(rng):
    return rng.standard_normal((2, 4, 1 << 18)).astype(np.float32)


def test_workers_share_a_pass_and_are_fewer_where_the_limit_is_lower(arrays):
    with threads.set_thread_limit(1):
        expected = fn.step(*arrays, lr=0.5)[0]
    for count in (2, 3, 2):
        with threads.set_thread_limit(count):
            assert threads.workers_for(True) == count - 1
            assert (fn.step(*arrays, lr=0.5)[0] == expected).all()
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("fastnewton") >= 2


def test_a_caller_that_finds_the_workers_busy_goes_on_alone(arrays):
    expected = fn.step(*arrays, lr=0.5)[0]
    with threads.set_thread_limit(2):
        state = threads.pool.memory.view(np.int64)
        busy, passes = threads.BUSY // 8, threads.PASS // 8
        state[busy] = 1
        try:
            before = state[passes]
            assert (fn.step(*arrays, lr=0.5)[0] == expected).all()
            assert state[passes] == before
        finally:
            state[busy] = 0
        assert (fn.step(*arrays, lr=0.5)[0] == expected).all()
        assert state[passes] > before


def test_a_worker_sleeps_when_nothing_comes_and_wakes_again(arrays):
    expected = fn.step(*arrays, lr=0.5)[0]
    with threads.set_thread_limit(2):
        for _ in range(3):
            threads.workers_for(True)
            deadline = time.monotonic() + 20
            while not threads.pool.is_asleep() and time.monotonic() < deadline:
                time.sleep(0.001)
            assert threads.pool.is_asleep()
            assert (fn.step(*arrays, lr=0.5)[0] == expected).all()


def test_steps_after_the_main_thread_and_at_exit(run_python):
    printed = run_python("-c", LATE, env={"FASTNEWTON_NUM_THREADS": "2"})
    assert sorted(printed.splitlines()) == ["after the main thread", "at exit"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_processes_forked_while_others_step_and_compile(run_python, tmp_path):
    env = {"FASTNEWTON_NUM_THREADS": "2", "FASTNEWTON_CACHE_DIR": str(tmp_path)}
    assert run_python("-c", AMONG_THREADS, env=env, timeout=200) == "{0}\n"


def test_threads_with_problems_of_their_own_get_the_serial_bits(rng):
    """Each has its own m, dtype, options and `out`, all long enough for the workers, which one of them has."""
    problems = []
    for dtype, m, n, options in (
        (np.float32, 8, 1 << 18, {}),
        (np.float64, 3, 1 << 18, {"lr_cap": "sigma"}),
        (np.float32, 3, (1 << 19) + 77, {"max_rank": 1}),
        (np.float32, 8, (1 << 18) + 1029, {"lr_rest": 0.1}),
    ):
        thetas, grads = rng.standard_normal((2, m, n)).astype(dtype)
        expected, info = fn.step(thetas, grads, lr=0.5, **options)
        problems.append((thetas, grads, options, expected.tobytes(), info.record.tobytes()))
    wrong, together = [], threading.Barrier(len(problems))

    def caller(thetas, grads, options, expected, record):
        out = np.empty_like(thetas[0])
        for number in range(10):
            out.fill(7)
            together.wait(60)
            with threads.set_thread_limit(2):
                theta, info = fn.step(thetas, grads, lr=0.5, out=out, **options)
            if theta is not out or out.tobytes() != expected or info.record.tobytes() != record:
                wrong.append((number, options))
        wrong.append("ended")

    callers = [threading.Thread(target=caller, args=problem) for problem in problems]
    for each in callers:
        each.start()
    for each in callers:
        each.join(120)
    assert wrong == ["ended"] * 4


def test_float16_where_no_instruction_converts_it(run_python, tmp_path):
    run_python("-c", HALF, env={"NUMBA_CPU_NAME": "generic", "FASTNEWTON_CACHE_DIR": str(tmp_path)})


def test_without_the_compiler_the_error_says_so(run_python):
    program = """
import numpy as np, fastnewton as fn
try:
    fn.step(np.ones((2, 3)), np.ones((2, 3)), lr=0.5)
except RuntimeError as error:
    print(error)
"""
    assert "unset NUMBA_DISABLE_JIT" in run_python("-c", program, env={"NUMBA_DISABLE_JIT": "1"})


def test_parts_of_many_workers_stay_small():
    m, count = 1024, 1 << 20
    size = cpu.part_size(m, with_thetas=True)
    tasks = cpu._tasks(0, count, count, 63, size)
    assert len(tasks) * size * 8 <= max(cpu.PARTS_BYTES, 2 * size * 8)


@pytest.mark.parametrize("place", ["thetas", "grads"])
@pytest.mark.parametrize("m", [1, 2, 20])
def test_apply_inverse_propagates_nan(rng, m, place):
    given = dict(zip(("thetas", "grads"), rng.standard_normal((2, m, 50)), strict=True))
    given[place][0, 7] = np.nan
    assert np.isnan(fn.apply_inverse(**given, z=np.ones(50))[7])


@pytest.mark.parametrize("name", ["FASTNEWTON_NUM_THREADS", "NUMBA_NUM_THREADS"])
@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_thread_count_that_is_none_is_refused(monkeypatch, name, text):
    monkeypatch.delenv("FASTNEWTON_NUM_THREADS", raising=False)
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name} must be a positive integer; got '{text}'"):
        fn.step(np.ones((2, 1 << 20), np.float32), np.ones((2, 1 << 20), np.float32), lr=1.0)


@pytest.mark.parametrize("m", [2, 9, 10, 11, 13, 14, 17, 33])
def test_threads_of_combine_have_memory_of_their_own(m):
    """A thread starts on a cache line: what is not whole lines would reach into the next thread's."""
    size = combine.thread_bytes.py_func(2 * m + 1)
    assert size % CACHE_LINE == 0
    assert size >= 8 * combine.BLOCK + (2 * m + 2) * (8 + CACHE_LINE)
    for workers in (0, 1, 3, 7):
        table_and_weights = 8 * ((2 * m + 1) + (2 * m + 1))
        assert 8 * combine.memory_size(m, workers) >= table_and_weights + (workers + 1) * size + 2 * (CACHE_LINE - 1)


@pytest.mark.parametrize("m", [10, 13, 17, 33])
def test_many_threads_write_vectors_that_begin_off_a_cache_line(rng, monkeypatch, m):
    monkeypatch.setattr(combine, "STREAMED_BYTES", 1 << 14)  # the first block is then cut short on any thread
    n = (1 << 15) + 5
    thetas, grads = rng.standard_normal((2, m, n), np.float32)
    c = rng.standard_normal(m)
    with threads.set_thread_limit(1):
        expected = fn.combine(thetas, grads, c, lr=0.5)
    out = np.empty(n + 3, np.float32)[3:]
    with threads.set_thread_limit(8):
        for _ in range(200):
            out[:] = np.nan
            fn.combine(thetas, grads, c, lr=0.5, out=out)
            assert np.array_equal(out, expected)
