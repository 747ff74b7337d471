"""Compiled kernels on disk: several processes at once, and installations that cannot be written to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastnewton as fn
from fastnewton import kernels

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
    env = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
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
    printed = run_python("-m", "pytest", "-n", "2", "-p", "no:cacheprovider", some, env={"NUMBA_CACHE_DIR": cache})
    assert "2 workers" in printed
    assert "4 passed" in printed


def test_a_warm_cache_is_not_written_again(run_python, warm):
    printed, folder = warm
    before = {path: (folder / path).stat().st_mtime_ns for path in kernels_in(folder)}
    assert before
    assert run_python("-c", PROGRAM, env={"NUMBA_CACHE_DIR": str(folder)}) == printed
    assert {path: (folder / path).stat().st_mtime_ns for path in kernels_in(folder)} == before


def test_code_of_another_build_is_deleted(run_python, warm):
    printed, folder = warm
    env = {"NUMBA_CACHE_DIR": str(folder)}
    (lock,) = folder.rglob("fastnewton.lock")
    build, compiled = lock.read_text(), kernels_in(folder)
    assert build
    left = lock.with_name("left-over.1.nbc")
    left.write_bytes(b"code of another build")
    assert run_python("-c", PROGRAM, env=env) == printed
    assert left.exists()
    lock.write_text("another build")
    assert run_python("-c", PROGRAM, env=env) == printed
    assert lock.read_text() == build
    assert kernels_in(folder) == compiled  # all but the left-over are back


@pytest.fixture
def unwritable(tmp_path):
    """The environment of an installation that cannot be written to, without a home."""
    site = tmp_path / "site"
    no_cache = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(Path(fn.__file__).parent, site / "fastnewton", ignore=no_cache)
    shutil.copytree(
        Path(kernels.__file__).parent,
        site / "fastnewton" / "kernels",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for folder in ("fastnewton", "fastnewton/arrays", "fastnewton/kernels", "fastnewton/kernels/cpu"):
        (site / folder / "__pycache__").write_text("a file, so that even root cannot make the folder")
    nowhere = str(site / "fastnewton" / "__pycache__" / "home")
    return {
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": nowhere,
        "XDG_CACHE_HOME": nowhere,
        "NUMBA_CACHE_DIR": None,
    }


def test_an_installation_that_cannot_be_written_to_still_caches(run_python, unwritable, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = {**unwritable, "TMPDIR": str(temporary)}
    printed = run_python("-c", PROGRAM, env=env)
    assert printed.splitlines()[0] == str(tmp_path / "site" / "fastnewton" / "__init__.py")
    (cache,) = temporary.iterdir()
    assert kernels_in(cache)
    assert not cache.stat().st_mode & 0o022  # compiled code is loaded from there
    assert str(temporary) in run_python("-m", "fastnewton", env=env)


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
    assert run_python("-c", FULL + PROGRAM, env={"NUMBA_CACHE_DIR": str(tmp_path / "full")}) == warm[0]
    assert not kernels_in(tmp_path / "full")
