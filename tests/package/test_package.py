"""The sdist, the wheel made from it, and editable installations: what they hold, and that a step runs from each."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import fastnewton as fn

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md")
FOLDERS = ("fastnewton", "kernels", "bench", "tests")
UNWANTED = ("__pycache__", ".cache", "out")

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
"""
WITHOUT_MPI = """
try:
    import fastnewton.mpi
except ImportError as error:
    print(error)
"""


SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def _run(*command, env=None, **options):
    unwanted = ("PYTHONPATH", "PYTHONHOME", "PIP_NO_INDEX")
    env = {name: value for name, value in os.environ.items() if name not in unwanted} | (env or {})
    command = [str(word) for word in command]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False, **options)


def _lines(*command, **options):
    done = _run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def _pip(*arguments):
    done = _run(sys.executable, "-m", "pip", "--retries", "1", "--disable-pip-version-check", *arguments)
    printed = done.stdout + done.stderr
    if done.returncode and ("NewConnectionError" in printed or "NameResolutionError" in printed):
        pytest.skip("no package index within reach")
    assert done.returncode == 0, printed


def _check_step(printed, folder):
    """Compare what PROGRAM prints with what it should print where fastnewton is loaded from `folder`."""
    package, kernels, *theta, loaded = printed
    assert Path(package) == folder / "fastnewton" / "__init__.py"
    assert Path(kernels) == folder / "fastnewton" / "kernels" / "cpu" / "gram.py"
    # Values up to 20 and a K of condition 1e3 in float64: 1e-12 is a hundred times the rounding.
    np.testing.assert_allclose([float(value) for value in theta], [1, -2, 3], rtol=0, atol=1e-12)
    assert loaded == "[]"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the clone in a folder named fastnewton: setuptools leaves folders beside the sources."""
    copy = tmp_path_factory.mktemp("work") / "fastnewton"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns(*UNWANTED))
    return copy


@pytest.fixture(scope="module")
def sdist(clone, tmp_path_factory):
    built = tmp_path_factory.mktemp("sdist")
    _lines(sys.executable, "-c", SDIST, built, cwd=clone)
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    built = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, sdist)
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def _environment(folder):
    """Make an environment without pip, and return its interpreter and its folder of packages."""
    _lines(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    (packages,) = _lines(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    return python, Path(packages)


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """The interpreter and the folder of packages of an environment with the wheel and whatever it asks for."""
    python, packages = _environment(tmp_path_factory.mktemp("fresh"))
    _pip("--python", python, "install", "--quiet", wheel)
    return python, packages


@pytest.fixture(scope="module")
def beside(clone, tmp_path_factory):
    """The interpreter of an environment in which the clone is installed as editable."""
    python, packages = _environment(tmp_path_factory.mktemp("editable"))
    # All else is borrowed. What is installed here as editable is not, since .pth files count in `packages` alone.
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    _pip("--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", clone)
    return python


def test_wheel_holds_the_packages_and_nothing_else(wheel, unpacked):
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        others = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    wanted = {
        str(path.relative_to(unpacked)): path.read_bytes()
        for path in (unpacked / "fastnewton").rglob("*")
        if path.is_file()
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


def test_sdist_holds_what_its_tests_need(clone, unpacked):
    held = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    made = {path for path in held if path.name in ("PKG-INFO", "setup.cfg") or path.parts[0].endswith(".egg-info")}
    wanted = {path.relative_to(clone) for path in clone.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    modules = {path for path in wanted if path.parts[0] == "kernels" and path.suffix != ".md"}
    wanted |= {Path("fastnewton") / path for path in modules}  # through the link
    assert held - made == {path for path in wanted if not path.parts[0].endswith(".egg-info")}


def test_tests_of_the_sdist_run_in_it(unpacked):
    some = ("tests/package/test_import.py", "-k", "public_names or show_config_prints")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *some)
    assert "2 passed" in _lines(*command, cwd=unpacked)[-1]


@pytest.mark.full
def test_the_sdist_and_its_extra_are_all_that_its_tests_need(unpacked, tmp_path):
    python, _ = _environment(tmp_path / "sdist")
    _pip("--python", python, "install", "--quiet", f"{unpacked}[test]")
    tests = ("tests/method/test_errors.py", "tests/optimizer", "tests/bench/test_scaling.py")
    assert " passed" in _lines(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=unpacked)[-1]


def test_wheel_works_where_only_its_requirements_are(fresh, tmp_path):
    python, packages = fresh
    before = sorted(packages.rglob("*"))
    *step, mpi = _lines(python, "-W", "error", "-c", PROGRAM + WITHOUT_MPI, cwd=tmp_path)
    _check_step(step, packages)
    assert mpi == "fastnewton.mpi needs mpi4py: pip install 'fastnewton[mpi]'"
    # Compiled kernels are kept elsewhere, so that `pip uninstall` leaves nothing behind.
    assert sorted(packages.rglob("*")) == before


def test_configuration_is_printed_there(fresh, tmp_path):
    python, packages = fresh
    env = {"FASTNEWTON_CACHE_DIR": str(tmp_path)}
    printed = _lines(python, "-W", "error", "-m", "fastnewton", cwd=tmp_path, env=env)
    assert printed[0].split()[:2] == ["fastnewton:", fn.__version__]
    assert str(packages) in printed[0]
    assert any(line.startswith("MPI:") and "pip install" in line for line in printed)
    assert any(line.startswith("kernel cache:") and str(tmp_path) in line for line in printed)


@pytest.mark.parametrize("inside", ["..", ".", "tests"])
def test_editable_installation_works_beside_a_folder_named_fastnewton(beside, clone, inside):
    """Python looks in the current folder first, where the clone must not be taken for the package."""
    _check_step(_lines(beside, "-c", PROGRAM, cwd=clone / inside), clone)


def test_clone_works_where_it_is(clone):
    _check_step(_lines(sys.executable, "-c", PROGRAM, cwd=clone), clone)
