"""A thread pool whose workers share the tasks of one pass.

Workers are Python threads that wait inside compiled code, without the GIL: handing them a pass takes about a
microsecond while they still poll, and they sleep at a semaphore when none has come for a while.  A pass takes its tasks
from a shared counter, so that workers may come late, or never where nothing is left to do, and a caller that finds them
busy with another pass goes on alone.  Forked children start with a pool of their own.
"""

import atexit
import contextlib
import contextvars
import ctypes
import os
import threading
from collections.abc import Iterator

import numpy as np
from numba import types

from fastnewton.kernels.cpu.jit import INT, call, entry, jit
from fastnewton.kernels.cpu.memory import copy, exchange, fetch_and_add, integers, read

THREADED_BYTES = 1 << 17  # waking a thread takes about as long as reading this much
THREADED_FLOPS = 1 << 19
TASKS_PER_THREAD = 16  # so that a thread that is held up delays the others little

# The pool's shared memory, in bytes, each on cache lines of its own: whether a caller has the workers; the number of
# passes begun and ended, odd while one is open; workers inside it; and the pass: its code, the workers it takes, those
# that have come, and its argument block.
BUSY, PASS, ACTIVE, CODE, WANTED, COME, ARGUMENTS = 0, 128, 256, 384, 392, 400, 512
MOST_ARGUMENTS = 32
_ASLEEP, _POLLING, _WOKEN = range(3)  # states of a worker
_POLLS = 1 << 20  # before a worker sleeps, some 0.3 ms; as often a caller polls before it yields its core

_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("fastnewton_thread_limit", default=None)


def allowed_cores() -> set[int]:
    """Return the cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def available_cores() -> int:
    """Count the cores that this process may run on."""
    return len(allowed_cores())


def chosen_threads() -> int | None:
    """Return the user's thread count, from FASTNEWTON_NUM_THREADS or NUMBA_NUM_THREADS; None if neither is set."""
    for name in ("FASTNEWTON_NUM_THREADS", "NUMBA_NUM_THREADS"):
        text = os.environ.get(name, "")
        if text.isdigit() and int(text) > 0:
            return int(text)
        if text:
            raise ValueError(f"{name} must be a positive integer; got {text!r}")
    return None


def thread_count() -> int:
    """Return how many threads a pass may use now."""
    return _limit.get() or chosen_threads() or available_cores()


@contextlib.contextmanager
def set_thread_limit(threads: int) -> Iterator[None]:
    """Let passes inside the block use this many threads."""
    token = _limit.set(threads)
    try:
        yield
    finally:
        _limit.reset(token)


class ThreadPool:
    """The workers of this process."""

    def __init__(self) -> None:
        self.memory = np.zeros(ARGUMENTS + 8 * MOST_ARGUMENTS, np.uint8)
        self.address = self.memory.ctypes.data
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._ended = False

    def start(self, count: int) -> int:
        """Wake so many workers, started where there are too few; return how many there are."""
        with self._lock:
            while len(self._workers) < count and not self._ended:
                try:
                    self._workers.append(_Worker(self))
                except RuntimeError:  # the interpreter has no more threads
                    break
            for worker in self._workers[:count]:
                worker.wake()
            return min(count, len(self._workers))

    def is_asleep(self) -> bool:
        """Return whether no worker polls."""
        return all(worker.asleep for worker in self._workers)

    def shutdown(self) -> None:
        """End all workers, before the interpreter does."""
        with self._lock:
            self._ended = True
            for worker in self._workers:
                worker.end()
            self._workers = []


class _Worker:
    """A thread that never leaves nogil code: re-acquiring the GIL would stall behind a caller of short passes."""

    def __init__(self, pool: ThreadPool):
        self._state = np.array([_WOKEN, 0])  # and whether it is to end
        self._semaphore = _new_semaphore()
        self._starter = threading.get_native_id()
        self._thread = threading.Thread(target=self._run, args=(pool,), name="fastnewton", daemon=True)
        self._thread.start()

    def _run(self, pool: ThreadPool) -> None:
        if threading.get_native_id() != self._starter:  # a greenlet in a thread's place would block it for good
            _run_worker(pool.address, self._state.ctypes.data, self._semaphore)

    @property
    def asleep(self) -> bool:
        return self._state[0] == _ASLEEP

    def wake(self) -> None:
        if self.asleep:
            self._state[0] = _WOKEN
            _python.PyThread_release_lock(self._semaphore)

    def end(self) -> None:
        self._state[1] = 1
        _python.PyThread_release_lock(self._semaphore)
        self._thread.join(timeout=1)


# Locks of the interpreter that are waited for without its global one.
_python = ctypes.pythonapi
_python.PyThread_allocate_lock.restype = ctypes.c_void_p
_python.PyThread_acquire_lock.argtypes = ctypes.c_void_p, ctypes.c_int
_python.PyThread_release_lock.argtypes = (ctypes.c_void_p,)


def _new_semaphore() -> int:
    """Return the address of a lock that is taken."""
    lock = _python.PyThread_allocate_lock()
    _python.PyThread_acquire_lock(lock, 0)
    return lock


def workers_for(large: bool) -> int:
    """Return how many workers there are for a pass, none for one that is over before they have come."""
    count = thread_count() - 1 if large else 0
    return pool.start(count) if count > 0 else 0


pool = ThreadPool()
atexit.register(lambda: pool.shutdown())


def _replace_pool() -> None:
    global pool
    pool = ThreadPool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_replace_pool)


# -- compiled -----------------------------------------------------------------------------------------------


@jit
def run(pool, workers, code, arguments, count):
    """Call the code with an argument block of `count` numbers, in this thread and in workers."""
    if workers == 0 or exchange(pool + BUSY, 1) == 1:
        call(code, arguments)
        return
    shared = integers(pool)
    shared[CODE >> 3], shared[WANTED >> 3], shared[COME >> 3] = code, workers, 0
    copy(pool + ARGUMENTS, arguments, 8 * count)
    fetch_and_add(pool + PASS, 1)
    call(code, pool + ARGUMENTS)
    fetch_and_add(pool + PASS, 1)
    polls = 0
    while read(pool + ACTIVE) > 0:
        polls += 1
        if polls > _POLLS:
            _yield_core()
    copy(arguments, pool + ARGUMENTS, 8 * count)
    exchange(pool + BUSY, 0)


_yield_core = types.ExternalFunction("sched_yield", types.intc())


_wait_for = types.ExternalFunction("PyThread_acquire_lock", types.int32(types.int64, types.int32))


@jit
def _work(pool, state, semaphore):
    """Take part in passes; sleep when none has come for a while, until the semaphore is released."""
    shared, seen = integers(pool), 0
    while read(state + 8) == 0:
        exchange(state, _POLLING)
        polls = 0
        while polls < _POLLS:
            polls += 1
            now = read(pool + PASS)
            if now & 1 == 0 or now == seen:
                if now & 1 and polls == _POLLS:  # others are not done with that pass, and the next may follow at once
                    _yield_core()
                    polls = 0
                continue
            # A caller that closes the pass after this waits, and one that has closed it before is seen to have.
            fetch_and_add(pool + ACTIVE, 1)
            if read(pool + PASS) == now and fetch_and_add(pool + COME, 1) < shared[WANTED >> 3]:
                call(shared[CODE >> 3], pool + ARGUMENTS)
                polls = 0
            fetch_and_add(pool + ACTIVE, -1)
            seen = now
        exchange(state, _ASLEEP)
        _wait_for(semaphore, 1)


_run_worker = entry(_work, INT, INT, INT)
