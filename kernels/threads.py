"""A few threads that share out the pieces of one pass.

The kernels release the GIL, so Python's own threads are enough: no OpenMP library, no threading layer to choose.
Several callers share one pool, and forked children start with a fresh one.
"""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("fastnewton_thread_limit", default=None)
_pool: ThreadPoolExecutor | None = None


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


def on_threads(task: Callable[[], T], most: int) -> list[T]:
    """Call task() on thread_count() threads, at most `most`, the calling one among them; what they returned.

    The task finds its share of the work by itself: threads may start late, or never where nothing is left to do.
    """
    if most == 1:
        return [task()]
    helpers: list[Future] = []
    try:
        _start(task, min(thread_count(), most) - 1, helpers)
        return [task(), *(helper.result() for helper in helpers if not helper.cancel())]
    finally:
        _outlast(helpers)


def _start(task: Callable[[], T], count: int, helpers: list[Future]) -> None:
    with contextlib.suppress(RuntimeError):  # the interpreter is shutting down, or has no more threads
        for _ in range(count):
            helpers.append(_executor().submit(task))


def _outlast(helpers: list[Future]) -> None:
    """Return when none of them runs any more, whatever interrupts: they write to the caller's memory."""
    interrupt = None
    while running := [helper for helper in helpers if not helper.cancel() and not helper.done()]:
        try:
            wait(running)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(available_cores(), chosen_threads() or 1), "fastnewton")
    return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
