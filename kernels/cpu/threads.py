"""A few threads that share out the pieces of one pass.

Helpers are Python threads that wait inside compiled code, without the GIL: handing them a pass takes about a
microsecond while they still look out for one, and they sleep at a lock when none has come for a while.  A kernel finds
its share of the work by itself, so that helpers may come late, or never where nothing is left to do, and a caller that
finds them busy with another pass goes on alone.  Forked children start with helpers of their own.
"""

import atexit
import contextlib
import contextvars
import ctypes
import os
import threading
from collections.abc import Iterator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastnewton.kernels.cpu.jit import INT, INTS, entry, jit

THREADED_BYTES = 1 << 17  # waking a thread takes about as long as reading this much
THREADED_FLOPS = 1 << 19
PIECES_PER_THREAD = 16  # so that a thread that is held up delays the others little

# The words that all threads watch, each on cache lines of its own: whether a caller has the helpers; the number of a
# pass, odd while it is open; helpers inside it; the pass itself, which is its kernel, how many helpers it takes, how
# many have come, whether one failed, and the kernel's own words.
_BUSY, _NUMBER, _ACTIVE, _PASS, _WORDS = 0, 16, 32, 48, 80
_KERNEL, _WANTED, _COME, _FAILED, _JOB = range(_PASS, _PASS + 5)
_ASLEEP, _LOOKING, _CALLED = range(3)  # a helper
_LOOKS = 1 << 20  # at the number before a helper sleeps, some 0.3 ms; as often a caller looks before it yields its core

_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("fastnewton_thread_limit", default=None)


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def chosen_threads() -> int | None:
    """The user's thread count, from FASTNEWTON_NUM_THREADS or NUMBA_NUM_THREADS; None if neither is set."""
    for name in ("FASTNEWTON_NUM_THREADS", "NUMBA_NUM_THREADS"):
        text = os.environ.get(name, "")
        if text.isdigit() and int(text) > 0:
            return int(text)
        if text:
            raise ValueError(f"{name} must be a positive integer; got {text!r}")
    return None


def thread_count() -> int:
    """Threads that a kernel may use now."""
    return _limit.get() or chosen_threads() or available_cores()


@contextlib.contextmanager
def set_thread_limit(threads: int) -> Iterator[None]:
    """Let kernels called inside the block use this many threads."""
    token = _limit.set(threads)
    try:
        yield
    finally:
        _limit.reset(token)


class Team:
    """The helpers of this process."""

    def __init__(self) -> None:
        self.words = np.zeros(_WORDS, np.int64)
        self._lock = threading.Lock()
        self._helpers: list[_Helper] = []
        self._dismissed = False

    def gather(self, count: int) -> int:
        """Wake so many helpers, started where there are too few; how many there are."""
        with self._lock:
            while len(self._helpers) < count and not self._dismissed:
                try:
                    self._helpers.append(_Helper(self.words))
                except RuntimeError:  # the interpreter has no more threads
                    break
            for helper in self._helpers[:count]:
                helper.wake()
            return min(count, len(self._helpers))

    def is_asleep(self) -> bool:
        """Whether no helper looks out for a pass."""
        return all(helper.asleep for helper in self._helpers)

    def dismiss(self) -> None:
        """End all helpers, before the interpreter does."""
        with self._lock:
            self._dismissed = True
            for helper in self._helpers:
                helper.end()
            self._helpers = []


class _Helper:
    """A thread that never leaves compiled code: on its way back there it would wait for the interpreter's lock, which a
    caller of short passes gives up too briefly for it to be had."""

    def __init__(self, words: np.ndarray):
        self._state = np.array([_CALLED, 0])  # and whether it is to end
        self._bell = _new_lock()
        self._maker = threading.get_native_id()
        self._thread = threading.Thread(target=self._serve, args=(words,), name="fastnewton", daemon=True)
        self._thread.start()

    def _serve(self, words: np.ndarray) -> None:
        if threading.get_native_id() != self._maker:  # a greenlet in a thread's place would block it for good
            entry(_help, INTS, INTS, INT)(words, self._state, self._bell)

    @property
    def asleep(self) -> bool:
        return self._state[0] == _ASLEEP

    def wake(self) -> None:
        if self.asleep:
            self._state[0] = _CALLED
            _python.PyThread_release_lock(self._bell)

    def end(self) -> None:
        self._state[1] = 1
        _python.PyThread_release_lock(self._bell)
        self._thread.join(timeout=1)


# Locks of the interpreter that are waited for without its global one.
_python = ctypes.pythonapi
_python.PyThread_allocate_lock.restype = ctypes.c_void_p
_python.PyThread_acquire_lock.argtypes = ctypes.c_void_p, ctypes.c_int
_python.PyThread_release_lock.argtypes = (ctypes.c_void_p,)


def _new_lock() -> int:
    """The address of a lock that is taken."""
    lock = _python.PyThread_allocate_lock()
    _python.PyThread_acquire_lock(lock, 0)
    return lock


def helpers_for(large: bool) -> int:
    """How many helpers there are for a pass, none for one that is over before they have come."""
    count = thread_count() - 1 if large else 0
    return team.gather(count) if count > 0 else 0


team = Team()
atexit.register(lambda: team.dismiss())


def _fresh_team() -> None:
    global team
    team = Team()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh_team)


# -- compiled -----------------------------------------------------------------------------------------------


@jit
def shared(words, kernel, helpers, job):
    """Run the kernel on the words of a job, in this thread and in helpers; true if none has failed."""
    if helpers == 0 or exchange(address(words), 1) == 1:
        return call(kernel, address(job)) == 0
    words[_KERNEL], words[_WANTED], words[_COME], words[_FAILED] = kernel, helpers, 0, 0
    for k in range(job.size):
        words[_JOB + k] = job[k]
    add(address(words) + 8 * _NUMBER, 1)
    failed = call(kernel, address(words) + 8 * _JOB)
    add(address(words) + 8 * _NUMBER, 1)
    looks = 0
    while read(address(words) + 8 * _ACTIVE) > 0:
        looks += 1
        if looks > _LOOKS:
            _yield_core()
    failed += words[_FAILED]
    exchange(address(words), 0)
    return failed == 0


_yield_core = types.ExternalFunction("sched_yield", types.intc())


_wait_for = types.ExternalFunction("PyThread_acquire_lock", types.int32(types.int64, types.int32))


@jit
def _help(words, state, bell):
    """Take part in passes; sleep when none has come for a while, until the bell rings."""
    number, active, seen = address(words) + 8 * _NUMBER, address(words) + 8 * _ACTIVE, 0
    while read(address(state) + 8) == 0:
        exchange(address(state), _LOOKING)
        looks = 0
        while looks < _LOOKS:
            looks += 1
            now = read(number)
            if now & 1 == 0 or now == seen:
                if now & 1 and looks == _LOOKS:  # others are not done with that pass, and the next may follow at once
                    _yield_core()
                    looks = 0
                continue
            # A caller that closes the pass after this waits, and one that has closed it before is seen to have.
            add(active, 1)
            if read(number) == now and add(address(words) + 8 * _COME, 1) < words[_WANTED]:
                if call(words[_KERNEL], address(words) + 8 * _JOB) != 0:
                    words[_FAILED] = 1
                looks = 0
            add(active, -1)
            seen = now
        exchange(address(state), _ASLEEP)
        _wait_for(bell, 1)


@jit
def address(array):
    return np.int64(array.ctypes.data)


@jit
def keep(array):
    """Numba frees an array after its last use, and the use of its address does not count."""


def _pointer(builder, where, pointee=None):
    return builder.inttoptr(where, (pointee or ir.IntType(64)).as_pointer())


@intrinsic
def call(typingctx, kernel, job):
    """Call the machine code at an address, compiled by `compile.kernel`; 0 unless it has raised."""

    def codegen(context, builder, signature, args):
        word, byte = ir.IntType(64), ir.IntType(8).as_pointer()
        # Numba's convention: results and exceptions through pointers; the literals that follow are never read.
        kind = ir.FunctionType(ir.IntType(32), [byte, byte, word])
        slots = [builder.bitcast(cgutils.alloca_once(builder, word), byte) for _ in range(2)]
        status = builder.call(_pointer(builder, args[0], kind), [*slots, args[1]])
        return builder.zext(status, word)

    return INT(kernel, job), codegen


@intrinsic
def read(typingctx, where):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0]), "seq_cst", 8)

    return INT(where), codegen


@intrinsic
def add(typingctx, where, number):
    """Add to the word at an address; what it was before: no two threads get the same."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "seq_cst")

    return INT(where, INT), codegen


@intrinsic
def exchange(typingctx, where, number):
    """Replace the word at an address; what it was before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("xchg", _pointer(builder, args[0]), args[1], "seq_cst")

    return INT(where, INT), codegen
