"""What importing costs and loads, and that the configuration can always be printed."""

import pytest

import fastnewton as fn

OTHERS = ("cupy", "torch", "jax", "jaxlib", "mpi4py", "matplotlib")
LOADED = f"""
import sys
before = set(sys.modules)
import fastnewton
print(sorted((set(sys.modules) - before) & {{"scipy.optimize", *{OTHERS}}}))
"""

# Compiled code is kept by Numba's dispatchers and written to the cache folder: both are empty after the
# import, and neither is after a pass over gradients.
COMPILED = """
import os, sys
import numpy, numba
import fastnewton
from numba.core.dispatcher import Dispatcher

def compiled():
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "fastnewton"]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)}
    files = [name for _, _, names in os.walk(os.environ["FASTNEWTON_CACHE_DIR"]) for name in names]
    return sum(len(each.signatures) for each in found), sum(name.endswith(".nbc") for name in files)

print(compiled())
ones = numpy.ones((2, 5))
fastnewton.gram(ones)
signatures, files = compiled()
print(signatures > 0, files > 0)
"""

BROKEN_PACKAGE = """
raise OSError("cannot open shared object file")
"""


def test_import_loads_no_other_array_library_and_no_mpi(run_python, tmp_path):
    for name in OTHERS:  # empty, so that importing them works, and is seen, where they are not installed
        (tmp_path / f"{name}.py").touch()
    assert run_python("-c", LOADED, env={"PYTHONPATH": str(tmp_path)}).strip() == "[]"


def test_import_compiles_nothing(run_python, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    assert run_python("-c", COMPILED, env={"FASTNEWTON_CACHE_DIR": str(cache)}).splitlines() == [
        "(0, 0)",
        "True True",
    ]


def test_public_names():
    assert set(fn.__all__) == {
        "Diagnostics",
        "Gram",
        "NonFiniteError",
        "Safeguards",
        "Spectrum",
        "StepInfo",
        "apply_inverse",
        "clear_caches",
        "combine",
        "diagnostics",
        "gram",
        "show_config",
        "spectrum",
        "step",
    }
    assert all(getattr(fn, name).__doc__ for name in fn.__all__)
    assert fn.__version__.count(".") >= 2


def test_show_config_prints_what_a_report_needs(capsys):
    assert fn.show_config() is None
    printed = capsys.readouterr().out
    for word in (fn.__version__, "python", "numpy", "numba", "threads", "CUDA", "MPI", "cache"):
        assert word in printed


def test_module_prints_the_configuration(run_python):
    printed = run_python("-m", "fastnewton")
    assert fn.__version__ in printed
    assert "numpy" in printed


def test_show_config_says_how_many_threads(run_python):
    printed = run_python("-m", "fastnewton", env={"NUMBA_NUM_THREADS": "1", "FASTNEWTON_NUM_THREADS": None})
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("threads")] == ["1"]


@pytest.mark.parametrize("name", ["mpi4py", "cupy", "torch", "jax"])
def test_show_config_survives_a_library_that_cannot_be_loaded(run_python, tmp_path, name):
    (tmp_path / "broken" / name).mkdir(parents=True)
    (tmp_path / "broken" / name / "__init__.py").write_text(BROKEN_PACKAGE)
    printed = run_python("-m", "fastnewton", env={"PYTHONPATH": str(tmp_path / "broken")})
    assert fn.__version__ in printed
    assert "MPI" in printed


def test_show_config_and_a_step_need_no_home_and_no_path(run_python, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    env = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "PATH": "", "OMPI_COMM_WORLD_SIZE": "four"}
    assert fn.__version__ in run_python("-m", "fastnewton", env=env)
    program = "import numpy, fastnewton; o = numpy.ones((2, 5)); print(fastnewton.step(o, o, lr=0.25)[0][0])"
    assert run_python("-c", program, env=env).strip() == "0.75"
