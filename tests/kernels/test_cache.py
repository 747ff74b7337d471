"""Compiled kernels on disk: several processes at once, and installations that cannot be written to."""

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastnewton as fn
from fastnewton.kernels.cpu.cache import FOLDER, KEPT_BUILDS

PROGRAM = """
import hashlib, sys
import numpy as np
import fastnewton as fn

rng = np.random.default_rng(3)
grads = rng.standard_normal((3, 2000)).astype(np.float32)
print(fn.__file__)
print(hashlib.sha256(fn.gram(grads).matrix.tobytes()).hexdigest())
"""


def kernels_in(folder):
    return sorted(path.relative_to(folder) for path in Path(folder).rglob("*.nbc"))


@pytest.fixture(scope="module")
def started_at_once(tmp_path_factory):
    """What three processes printed that found no cache, and the cache that they left."""
    folder = tmp_path_factory.mktemp("cache")
    env = {**os.environ, FOLDER: str(folder)}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, env=env, **pipes) for _ in range(3)]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], printed
    return printed, folder


@pytest.fixture
def warm(started_at_once, tmp_path):
    """What the program prints, and a copy of the cache that it has filled."""
    printed, folder = started_at_once
    return printed[0], Path(shutil.copytree(folder, tmp_path / "warm"))


def test_processes_that_start_at_once_share_a_cold_cache(started_at_once):
    printed, folder = started_at_once
    assert len(set(printed)) == 1
    assert kernels_in(folder)


@pytest.mark.full
def test_workers_of_xdist_run_tests_of_kernels(run_python, warm):
    pytest.importorskip("xdist")
    cache = str(warm[1])
    some = f"{Path(__file__).with_name('test_kernels.py')}::test_combine_without_lr_rest_takes_lr_for_both"
    printed = run_python("-m", "pytest", "-n", "2", "-p", "no:cacheprovider", some, env={FOLDER: cache})
    assert "2 workers" in printed
    assert "4 passed" in printed


def test_a_warm_cache_is_not_written_again(run_python, warm):
    printed, folder = warm
    before = {path: (folder / path).stat().st_mtime_ns for path in kernels_in(folder)}
    assert before
    assert run_python("-c", PROGRAM, env={FOLDER: str(folder)}) == printed
    assert {path: (folder / path).stat().st_mtime_ns for path in kernels_in(folder)} == before


def test_only_the_builds_used_last_are_kept(run_python, tmp_path):
    others = [tmp_path / f"kernels-{k}" for k in range(KEPT_BUILDS + 1)]
    for age, other in enumerate(others):
        other.mkdir()
        (other / "fastnewton.lock").touch()
        (other / "left-over.1.nbc").touch()
        os.utime(other, (0, 10**9 - age))
    unknown = tmp_path / "kernels-of-somebody-else"
    unknown.mkdir()
    run_python("-c", "import fastnewton", env={FOLDER: str(tmp_path)})
    assert unknown.exists()
    assert [other.exists() for other in others] == [True] * (KEPT_BUILDS - 1) + [False] * 2


@pytest.mark.parametrize(
    ("platform", "variable", "inside"),
    [
        ("linux", FOLDER, ""),
        ("linux", "NUMBA_CACHE_DIR", ""),
        ("linux", "XDG_CACHE_HOME", "fastnewton"),
        ("linux", "HOME", ".cache/fastnewton"),
        ("darwin", "HOME", "Library/Caches/fastnewton"),
    ],
)
def test_the_folder_follows_the_platform_and_the_environment(run_python, tmp_path, platform, variable, inside):
    names = (FOLDER, "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
    later = names[names.index(variable) + 1 :]
    env = dict.fromkeys(names) | {name: str(tmp_path / "later") for name in later} | {variable: str(tmp_path / "here")}
    program = f"import numba, sys; sys.platform = {platform!r}; from fastnewton.kernels.cpu import jit"
    printed = run_python("-c", f"{program}; print(jit.CACHE_FOLDER)", env=env)
    folder = Path(printed.strip())
    assert folder.parent == tmp_path / "here" / inside
    assert folder.is_dir()
    assert not (tmp_path / "later").exists()


def test_another_cpu_has_another_folder(run_python, tmp_path):
    program = "from fastnewton.kernels.cpu.jit import CACHE_FOLDER; print(CACHE_FOLDER)"
    env = {FOLDER: str(tmp_path)}
    assert run_python("-c", program, env=env) != run_python("-c", program, env={**env, "NUMBA_CPU_NAME": "generic"})


@pytest.fixture
def site(tmp_path):
    """A copy of the installation."""
    copy = tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__", "README.md")
    shutil.copytree(Path(fn.__file__).parent, copy / "fastnewton", ignore=ignored)
    return copy


@pytest.fixture
def unwritable(site):
    """The environment of an installation that cannot be written to, without a home."""
    file = site / "file"
    file.write_text("a file, so that even root cannot make a folder in it")
    nowhere = str(file / "home")
    return {
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": nowhere,
        "XDG_CACHE_HOME": nowhere,
        FOLDER: None,
        "NUMBA_CACHE_DIR": None,
    }


def test_without_a_home_the_cache_is_in_the_temporary_folder(run_python, unwritable, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = {**unwritable, "TMPDIR": str(temporary)}
    printed = run_python("-c", PROGRAM, env=env)
    assert printed.splitlines()[0] == str(tmp_path / "site" / "fastnewton" / "__init__.py")
    (cache,) = temporary.iterdir()
    assert kernels_in(cache)
    assert not cache.stat().st_mode & 0o022  # compiled code is loaded from there
    assert str(temporary) in run_python("-m", "fastnewton", env=env)


def test_an_installation_of_bytecode_compiles_once_and_nothing_is_written_into_it(run_python, site, tmp_path, warm):
    assert compileall.compile_dir(site, legacy=True, quiet=1)
    for source in site.rglob("*.py"):
        source.unlink()
    before = sorted(site.rglob("*"))
    env = {"PYTHONPATH": str(site), FOLDER: str(tmp_path / "cache")}
    printed = run_python("-c", PROGRAM, env=env)
    assert printed.splitlines() == [str(site / "fastnewton" / "__init__.pyc"), warm[0].splitlines()[1]]
    (build,) = (tmp_path / "cache").iterdir()
    written = {path: path.stat().st_mtime_ns for path in build.glob("*.nb[ci]")}
    assert written
    assert run_python("-c", PROGRAM, env=env) == printed
    assert {path: path.stat().st_mtime_ns for path in build.glob("*.nb[ci]")} == written
    assert sorted(site.rglob("*")) == before
    with (site / "fastnewton" / "kernels" / "record.pyc").open("ab") as file:
        file.write(b"another build")
    run_python("-c", "import fastnewton", env=env)
    assert len(list((tmp_path / "cache").iterdir())) == 2


NOWHERE = """
import tempfile

def nowhere():
    raise FileNotFoundError("No usable temporary directory found")

tempfile.gettempdir = nowhere
"""
FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # as on a full disk, files can be made and not be written
"""


def test_where_no_folder_can_be_written_kernels_are_compiled_all_the_same(run_python, unwritable, warm):
    printed = run_python("-c", f"{NOWHERE}{PROGRAM}\nfn.show_config()", env=unwritable).splitlines()
    assert printed[1] == warm[0].splitlines()[1]
    assert any(line.startswith("kernel cache:") and "none" in line for line in printed)


def test_a_full_disk_does_not_stop_what_was_compiled(run_python, warm, tmp_path):
    pytest.importorskip("resource")
    assert run_python("-c", FULL + PROGRAM, env={FOLDER: str(tmp_path / "full")}) == warm[0]
    assert not kernels_in(tmp_path / "full")
