"""The folder of compiled kernels: outside the installation, one for each build, CPU, Numba and Python."""

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

FOLDER = "FASTNEWTON_CACHE_DIR"
KEPT_BUILDS = 8  # a cluster's kinds of CPU share one home, and a developer switches branches
_LOCK = "fastnewton.lock"
_COMPILED_FROM = ("kernels", "dtypes.py", "dtypes.pyc")  # Numba itself looks at one function's file only


def cache_folder(compiler: str, target: str, default: str = "") -> Path | None:
    """Make the folder for code that `compiler` makes of these sources for `target`; None where none can be written.

    It is in FASTNEWTON_CACHE_DIR, else in `default`, else in the user's folder, else in the temporary one."""
    digest = hashlib.sha256(target.encode())
    sources = [source for name in _COMPILED_FROM for source in _sources(files("fastnewton") / name)]
    for source in sources:
        digest.update(source)
    name = f"kernels-{sys.implementation.cache_tag}-{compiler}-{digest.hexdigest()[:16]}"
    for root in (partial(_user_folder, default), _private_folder) if sources else ():
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home
            folder = root() / name
            is_new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            if is_new:
                _delete_old_builds(folder)
            return folder
    return None


@contextlib.contextmanager
def one_process_at_a_time(folder: Path | None) -> Iterator[None]:
    """Hold the folder's lock: of several processes that start at once one compiles, and the others load its code."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None and folder is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(folder / _LOCK, "ab"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Closing would leave it locked where a child was forked meanwhile.
                stack.callback(fcntl.flock, lock, fcntl.LOCK_UN)
                os.utime(folder)  # `_delete_old_builds` goes by the last use
        yield


def _sources(item: Traversable) -> Iterator[bytes]:
    """Read all modules below `item`, in the order of their names: sources, or bytecode in an installation of that."""
    if item.is_dir():
        for inner in sorted(item.iterdir(), key=lambda inner: inner.name):
            if inner.name != "__pycache__":
                yield from _sources(inner)
    elif item.name.endswith((".py", ".pyc")) and item.is_file():
        yield item.read_bytes()


def _user_folder(default: str) -> Path:
    """Choose the folder that the user asks for, or the platform's for caches."""
    if chosen := os.environ.get(FOLDER) or default:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastnewton"
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "fastnewton"


def _private_folder() -> Path:
    """Make a folder in the temporary directory that only this user can write to: compiled code is loaded from it."""
    user = os.getuid() if hasattr(os, "getuid") else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"fastnewton-{user}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    safe = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022
    if safe and (not hasattr(os, "getuid") or status.st_uid == user):
        return folder
    return Path(tempfile.mkdtemp(prefix="fastnewton-"))


def _delete_old_builds(folder: Path) -> None:
    """Delete all but the KEPT_BUILDS folders used last; a process that still runs from one compiles again."""
    with contextlib.suppress(OSError):
        builds = [lock.parent for lock in folder.parent.glob(f"kernels-*/{_LOCK}")]
        for build in sorted(builds, key=lambda build: build.stat().st_mtime)[: 1 - KEPT_BUILDS]:
            for path in (*build.glob("*.nb[ci]*"), build / _LOCK):
                path.unlink(missing_ok=True)
            build.rmdir()
