"""Numba functions that are compiled for literal arguments and cached on disk."""

import contextlib
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

import numba
from numba import types

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

INT, FLOAT = types.int64, types.float64
FLOATS = types.Array(types.float64, 1, "C")
INTS = types.Array(types.int64, 1, "C")
FLOATS_2D, INTS_2D = types.Array(types.float64, 2, "C"), types.Array(types.int64, 2, "C")

# Numba looks only at the file that holds the function; what it calls from other files counts as well.
_BUILD = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
).hexdigest()

_in_process = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child forked while another thread compiles would find Numba's own lock taken
    os.register_at_fork(
        before=_in_process.acquire, after_in_parent=_in_process.release, after_in_child=_in_process.release
    )


def jit(function: Callable) -> Callable:
    """numba.njit(nogil=True, cache=True), with a cache folder that can be written, if there is one."""
    try:
        made = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the installation nor the home folder is writable
        before = numba.config.CACHE_DIR
        try:
            numba.config.CACHE_DIR = _private_folder()
            made = numba.njit(nogil=True, cache=True)(function)
        except (OSError, RuntimeError):
            return numba.njit(nogil=True)(function)
        finally:
            numba.config.CACHE_DIR = before
    if made is function:  # without Numba's compiler, which `_compiled` asks for
        return made
    save = made._cache.save_overload

    def save_if_possible(signature: Any, compiled: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason not to run what was compiled
            save(signature, compiled)

    made._cache.save_overload = save_if_possible
    return made


def entry(function: Callable, *arguments: types.Type) -> Callable:
    """The machine code of `function` for typed arguments, made when it is first called; it checks nothing."""
    compiled = cache(lambda: _compiled(function, arguments).entry_point)
    return lambda *given: compiled()(*given)


def kernel(function: Callable, *literals: str | int) -> int:
    """The address of the machine code of `function(job, *literals)`, for `threads.shared` to call."""
    with _in_process:  # LLVM's own lock must not be held when another thread forks
        found = _compiled(function, (INT, *map(types.literal, literals)))
        return found.library.get_pointer_to_function(found.fndesc.llvm_func_name)


def _compiled(function: Callable, signature: tuple[types.Type, ...]) -> Any:
    if numba.config.DISABLE_JIT:
        raise RuntimeError("fastnewton's kernels need Numba's compiler: unset NUMBA_DISABLE_JIT")
    with _in_process, _one_process_at_a_time(function):
        function.compile(signature)
    return function.overloads[signature]


@contextlib.contextmanager
def _one_process_at_a_time(function: Callable) -> Iterator[None]:
    """Of several processes that start at once, one compiles and the others find its code in the cache."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None and (place := function.stats.cache_path) is not None:
            with contextlib.suppress(OSError):
                folder = Path(place)
                folder.mkdir(parents=True, exist_ok=True)
                # Without a buffer, which a full disk would not let be written when the file is closed.
                lock = stack.enter_context(open(folder / "fastnewton.lock", "ab+", buffering=0))
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Closing would leave it locked where a child was forked meanwhile.
                stack.callback(fcntl.flock, lock, fcntl.LOCK_UN)
                _clear_other_build(folder, lock)
        yield


def _clear_other_build(folder: Path, lock: FileIO) -> None:
    """Delete what another build has left: Numba would use its file names again, and a process killed between
    writing the index and the code would leave an index that points at the old code."""
    lock.seek(0)
    if lock.read() != _BUILD.encode():
        for path in folder.glob("*.nb[ci]"):
            path.unlink(missing_ok=True)
        lock.truncate(0)
        lock.write(_BUILD.encode())


@cache
def _private_folder() -> str:
    """A folder in the temporary directory that only this user can write to: compiled code is loaded from it."""
    user = os.getuid() if hasattr(os, "getuid") else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"fastnewton-{user}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    safe = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022
    if safe and (not hasattr(os, "getuid") or status.st_uid == user):
        return str(folder)
    return tempfile.mkdtemp(prefix="fastnewton-")


def cache_folder() -> str | None:
    """Where compiled kernels are kept; None where no folder can be written."""
    from fastnewton.kernels.cpu.gram import _gram_run

    return getattr(_gram_run, "stats", None) and _gram_run.stats.cache_path  # there are none without Numba's compiler
