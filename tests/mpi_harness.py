"""Checks that several ranks run together, and what they find wrong told in good order.

    PYTHONPATH=tests mpiexec -n K python -m mpi4py tests/…/mpi_….py [--limit SECONDS] [check_…]

Every check takes a communicator.  What a rank finds wrong it tells the others first (`expect`), so that all ranks leave
a failing check together and the next one can run.
"""

import argparse
import faulthandler
import hashlib
import json
import sys
import traceback

import numpy as np
from mpi4py import MPI

STRAGGLE = 30  # seconds that the others get to finish a check in which one rank has failed


class Skipped(Exception):
    """A check that this environment cannot run."""


def expect(comm, *wrong):
    """Fail on all ranks if one of them says what is wrong: a false value is nothing wrong."""
    every = comm.allgather([str(each) for each in wrong if each])
    found = [f"rank {rank}: {'; '.join(own)}" for rank, own in enumerate(every) if own]
    assert not found, "\n".join(found)


def expect_same(comm, what, value):
    """Fail on all ranks unless the value is the same on all of them."""
    every = comm.allgather(value)
    assert every.count(every[0]) == len(every), f"{what} differs between ranks: {every}"


def data(comm, n, dtype=np.float64, seed=0, m=None):
    """(thetas, grads), each (m, n), the same on all ranks; the gradients' sizes fall by 8, so that cutoffs matter."""
    m = comm.size if m is None else m
    thetas, grads = np.random.default_rng([seed, n]).standard_normal((2, m, n))
    return thetas.astype(dtype), (grads * 8.0 ** -np.arange(m)[:, None]).astype(dtype)


def raw(array):
    """The bytes of an array of any library."""
    if type(array).__module__ == "torch":
        array = array.view(getattr(sys.modules["torch"], f"uint{8 * array.element_size()}")).numpy()
    return np.asarray(array).tobytes()


def fields(info):
    """What a StepInfo holds, numbers as bytes: NaN equals itself."""
    told = info.diagnostics and info.diagnostics.pack(info.coefficients.size).tobytes()
    return {"record": info.read().tobytes(), "dropped": info.dropped, "diagnostics": told}


def expect_step(comm, what, given, wanted):
    """Fail unless (θ_new, info) is `wanted`, bit by bit, here and on every other rank."""
    (theta, info), (wanted_theta, wanted_info) = given, wanted
    mine, reference = fields(info), fields(wanted_info)
    differ = [name for name in reference if mine[name] != reference[name]]
    expect(
        comm,
        type(theta) is not type(wanted_theta) and f"{what}: a {type(theta)}",
        (theta.dtype, theta.shape) != (wanted_theta.dtype, wanted_theta.shape)
        and f"{what}: shape {theta.shape}, {theta.dtype}",
        raw(theta) != raw(wanted_theta) and f"{what}: θ_new is not that of fn.step",
        differ and f"{what}: {differ} not those of fn.step: {info}, {wanted_info}",
    )
    expect_same(comm, f"{what}: θ_new", hashlib.sha256(raw(theta)).hexdigest())
    expect_same(comm, f"{what}: info", repr(mine))


def raised(comm, what, task):
    """The error that the task raises: type and message, the same on all ranks."""
    try:
        task()
    except Exception as error:
        found = type(error), str(error), getattr(error, "workers", None)
    else:
        found = None
    every = comm.allgather(found)
    assert None not in every, f"{what}: no error on ranks {[k for k, each in enumerate(every) if each is None]}"
    expect_same(comm, what, found)
    return found


def expect_error(comm, what, task, kind, *words):
    """Fail unless the task raises this error on all ranks, with these words in the message."""
    found, message, _ = raised(comm, what, task)
    missing = [word for word in words if word not in message]
    assert found is kind, f"{what}: {found.__name__}: {message}"
    assert not missing, f"{what}: {missing} not in {message!r}"


# -- running them -------------------------------------------------------------------------------------------


def run(harness, name, check):
    """Run one check on all ranks; on rank 0 a line that says how it went.  True unless a rank failed."""
    comm = harness.Dup()  # a check that went wrong leaves its messages behind
    told, skipped, failure = None, None, None
    try:
        told = check(comm)
    except Skipped as reason:
        skipped = str(reason)
    except Exception:
        failure = traceback.format_exc()
        print(f"{name} failed on rank {harness.rank}:\n{failure}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(STRAGGLE, exit=True)
    failures = harness.allgather(failure)
    if failure:
        faulthandler.cancel_dump_traceback_later()
    if harness.rank == 0:
        failed = {rank: text for rank, text in enumerate(failures) if text}
        print(json.dumps({"check": name, "failed": failed, "skipped": skipped, "told": told}), flush=True)
    return not any(failures)


def main(names):
    """Run the functions check_… among these names, all or those of the command line."""
    checks = {name: value for name, value in names.items() if name.startswith("check_")}
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=float, default=240.0)
    parser.add_argument("checks", nargs="*", default=list(checks))
    arguments = parser.parse_args()
    harness = MPI.COMM_WORLD.Dup()
    started = MPI.Wtime()
    results = []
    for name in arguments.checks or checks:
        faulthandler.dump_traceback_later(max(1.0, arguments.limit - (MPI.Wtime() - started)), exit=True)
        results.append(run(harness, name, checks[name]))
    faulthandler.cancel_dump_traceback_later()
    harness.Barrier()
    sys.exit(0 if all(results) else 1)
