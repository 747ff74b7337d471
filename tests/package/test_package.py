"""The wheel: what is in it, and that it works where only what it asks for is installed."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fastnewton as fn

ROOT = Path(__file__).parents[2]
COPIED = ("fastnewton", "kernels", "bench", "tests")

# A quadratic and four workers in three dimensions: with all directions kept, a step of length 1 ends at the minimiser.
PROGRAM = """
import sys
import numpy as np
import fastnewton as fn
from fastnewton.kernels.cpu import gram

thetas = np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, -3.0, 0.0], [1.0, 1.0, 5.0]])
grads = (thetas - [1.0, -2.0, 3.0]) * [1.0, 2.0, 4.0]
theta, _ = fn.step(thetas, grads, lr=1.0, cutoff=1e-2)
print(fn.__file__, gram.__file__, *theta, sep="\\n")
print(sorted({"kernels", "bench", "tests"} & set(sys.modules)))
try:
    import fastnewton.mpi
except ImportError as error:
    print(error)
"""


def _run(*command, **options):
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, **options)


def _pip(*arguments):
    done = _run(sys.executable, "-m", "pip", "--retries", "1", "--disable-pip-version-check", *arguments)
    printed = done.stdout + done.stderr
    if done.returncode and ("NewConnectionError" in printed or "NameResolutionError" in printed):
        pytest.skip("no package index within reach")
    assert done.returncode == 0, printed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves folders beside the sources, and takes up what an earlier build has left."""
    copy, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, copy)
    for name in COPIED:
        unwanted = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unwanted)
    try:
        here = Version(importlib.metadata.version("setuptools")) >= Version("77")
    except importlib.metadata.PackageNotFoundError:
        here = False  # from Python 3.12 on a new environment has none: pip then fetches it
    _pip("wheel", "--no-deps", *(["--no-build-isolation"] if here else []), "--wheel-dir", built, copy)
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """A new environment with the wheel and whatever it asks for: `run` starts its interpreter elsewhere."""
    place = tmp_path_factory.mktemp("fresh")
    made = _run(sys.executable, "-m", "venv", "--without-pip", place / "venv")
    assert made.returncode == 0, made.stdout + made.stderr
    python = place / "venv" / "bin" / "python"
    _pip("--python", python, "install", "--quiet", wheel)
    unwanted = ("PYTHONPATH", "PYTHONHOME", "NUMBA_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in unwanted}

    def run(*arguments):
        done = _run(python, "-W", "error", *arguments, cwd=place, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    run.folder = (place / "venv").resolve()
    return run


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        others = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    package = [*(ROOT / "fastnewton").rglob("*"), *(ROOT / "fastnewton" / "kernels").rglob("*")]  # a symbolic link
    wanted = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for path in package
        if path.is_file() and path.suffix not in (".md", ".pyc", ".nbi", ".nbc", ".lock")
    }
    assert set(held) == set(wanted)
    assert held == wanted
    assert {
        "fastnewton/py.typed",
        "fastnewton/mpi/newton.py",
        "fastnewton/kernels/cpu/gram.py",
        "fastnewton/kernels/cuda/gram.cu",
    } <= set(held)
    assert "licenses/LICENSE" in others
    assert wheel.name == f"fastnewton-{fn.__version__}-py3-none-any.whl"


def test_numpy_and_numba_are_all_that_is_required(metadata):
    every = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    core = {each.name for each in every if each.marker is None or each.marker.evaluate({"extra": ""})}
    assert core == {"numpy", "numba"}
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Version"] == fn.__version__


@pytest.mark.parametrize(
    ("extra", "platform", "wanted"),
    [
        ("mpi", "linux", {"mpi4py"}),
        ("cuda12", "linux", {"cupy-cuda12x"}),
        ("cuda13", "linux", {"cupy-cuda13x"}),
        ("cuda12", "darwin", set()),
        ("cuda13", "darwin", set()),
        ("bench", "darwin", {"mpi4py", "mpich", "scikit-learn", "matplotlib"}),
        ("test", "darwin", {"mpi4py", "mpich", "pytest", "hypothesis"}),
    ],
)
def test_extras_bring_what_they_are_for(metadata, extra, platform, wanted):
    assert extra in metadata.get_all("Provides-Extra")
    every = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    environment = {"extra": extra, "sys_platform": platform}
    brought = {each.name for each in every if each.marker and each.marker.evaluate(environment)}
    assert (brought >= wanted) if wanted else (brought == set())
    assert extra in ("bench", "test") or brought == wanted
    assert platform == "linux" or not any(name.startswith("nvidia-") for name in brought)


def test_wheel_works_where_only_its_requirements_are(fresh):
    package, kernels, *theta, loaded, mpi = fresh("-c", PROGRAM)
    assert Path(package).is_relative_to(fresh.folder)
    assert Path(kernels).is_relative_to(fresh.folder)
    # Values up to 20 and a K of condition 1e3 in float64: 1e-12 is a hundred times the rounding.
    np.testing.assert_allclose([float(value) for value in theta], [1, -2, 3], rtol=0, atol=1e-12)
    assert loaded == "[]"
    assert mpi == "fastnewton.mpi needs mpi4py: pip install 'fastnewton[mpi]'"


def test_configuration_is_printed_there(fresh):
    printed = fresh("-m", "fastnewton")
    assert printed[0].split()[:2] == ["fastnewton:", fn.__version__]
    assert str(fresh.folder) in printed[0]
    assert any(line.startswith("MPI:") and "pip install" in line for line in printed)
    assert any(line.startswith("kernel cache:") and str(fresh.folder) in line for line in printed)
