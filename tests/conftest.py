"""What all tests share."""

import contextlib
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

if importlib.util.find_spec("hypothesis"):  # `pytest -m gpu` does without it
    from hypothesis import settings

    # The first example compiles kernels, and a run is to be repeatable.
    settings.register_profile("fastnewton", deadline=None, derandomize=True, max_examples=30, print_blob=False)
    settings.load_profile("fastnewton")


@pytest.fixture
def rng(request):
    """Numbers that differ from test to test and not from run to run."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture
def x64():
    """float64 is float64 in JAX too, where it is installed."""
    installed = importlib.util.find_spec("jax") is not None
    with pytest.importorskip("jax").enable_x64(True) if installed else contextlib.nullcontext():
        yield


@pytest.fixture
def run_python(tmp_path):
    """Run a program in a fresh interpreter, warnings as errors, and return what it prints."""

    def run(*arguments, env=None, timeout=300):
        variables = {**os.environ, **(env or {})}
        done = subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            env={name: value for name, value in variables.items() if value is not None},
            cwd=tmp_path,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
