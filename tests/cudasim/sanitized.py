"""Functions run in a child process under AddressSanitizer and UndefinedBehaviorSanitizer, or under ThreadSanitizer.

A sanitizer must be in a process from its start, so the test stays outside and hands the work to a child.
"""

import ctypes
import importlib
import os
import pickle
import subprocess
import sys
from typing import NamedTuple

from .build import run

RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python frees little at its end; modules of other options define the same kernels.
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # Only the modules are instrumented; what NumPy does is no race between CUDA threads.
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}
ADDR_NO_RANDOMIZE = 0x0040000


class Outcome(NamedTuple):
    returncode: int
    stderr: str


def run_sanitized(kind, target, *args, timeout=300):
    """Call `target`, written "module:function", with picklable arguments under kind "address" or "thread"."""
    # AddressSanitizer looks for libstdc++ when it starts, and Python brings it later.
    libraries = [run(["g++", f"-print-file-name={name}"]).strip() for name in (RUNTIME[kind], "libstdc++.so.6")]
    done = subprocess.run(
        _python("_start", " ".join(libraries)),
        input=pickle.dumps((target, args)),
        env=_environment(kind),
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stderr.decode(errors="replace"))


def assert_clean(outcome):
    """The child found nothing and raised nothing."""
    assert outcome.returncode == 0, outcome.stderr


def assert_reports(outcome, *texts):
    """The child failed, and its report holds each of the texts."""
    assert outcome.returncode != 0, f"nothing was reported\n{outcome.stderr}"
    missing = [text for text in texts if text not in outcome.stderr]
    assert not missing, f"not in the report: {missing}\n{outcome.stderr}"


def _environment(kind):
    return {
        **os.environ,
        **OPTIONS,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OPENBLAS_NUM_THREADS": "1",
        "CUDASIM_SANITIZE": kind,
    }


def _python(function, *arguments):
    call = f"{function}({', '.join(map(repr, arguments))})"
    return [sys.executable, "-c", f"from cudasim.sanitized import {function}; {call}"]


def _start(libraries):
    # ThreadSanitizer cannot start at some of the addresses that the kernel picks at random.
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)
    os.execve(sys.executable, _python("_serve"), {**os.environ, "LD_PRELOAD": libraries})


def _serve():
    # The programs that Python starts from here, g++ above all, need no sanitizer.
    os.environ.pop("LD_PRELOAD", None)
    target, args = pickle.load(sys.stdin.buffer)
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(*args)
