"""The oldest and the newest Numba that pyproject.toml allows run the core of the suite."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
CORE = ("tests/method/test_method.py", "tests/method/test_nonfinite.py", "tests/kernels/test_threads.py")
NEEDED = ("pytest", "hypothesis", "scipy", "ml_dtypes")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"]]
TESTED = [text for text in PROJECT["optional-dependencies"]["test"] if Requirement(text).name in NEEDED]


def _oldest(requirement):
    (least,) = (each.version for each in requirement.specifier if each.operator == ">=")
    return f"{requirement.name}=={least}.*" if requirement.name == "numpy" else f"{requirement.name}=={least}"


def _newest(requirement):
    return str(requirement)


def test_numba_has_an_upper_bound():
    (numba,) = (each for each in REQUIRED if each.name == "numba")
    assert {each.operator for each in numba.specifier} == {">=", "<"}


@pytest.mark.full
@pytest.mark.parametrize("wanted", [_oldest, _newest])
def test_core_of_the_suite_runs_with_the_oldest_and_the_newest_numba(wanted, tmp_path):
    if wanted is _oldest and sys.version_info >= (3, 14):
        pytest.skip("the oldest Numba has no wheel for this Python")
    folder, python = tmp_path / "venv", tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--retries", "1"]
    done = subprocess.run([*install, *map(wanted, REQUIRED), *TESTED], capture_output=True, text=True, check=False)
    if "NewConnectionError" in done.stderr or "NameResolutionError" in done.stderr:
        pytest.skip("no package index within reach")
    assert done.returncode == 0, done.stderr
    show = "import numba; print(numba.__version__)"
    numba = Version(subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout)
    (allowed,) = (each.specifier for each in REQUIRED if each.name == "numba")
    assert numba in allowed
    env = {**os.environ, "FASTNEWTON_CACHE_DIR": str(tmp_path / "cache")}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CORE]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
