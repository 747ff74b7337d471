"""What holds for a parameter server over MPI, rank 0 serving any number of workers: run by test_mpi.py under mpiexec.

PYTHONPATH=tests mpiexec -n K python -m mpi4py tests/mpi/mpi_server_checks.py [--limit SECONDS] [check_…]
"""

import time
from unittest import mock

import numpy as np
from mpi_harness import Skipped, expect, expect_error, expect_same, main, raw

import fastnewton as fn
from fastnewton.mpi import Client, datatypes, serve
from fastnewton.server import ParameterServer


def rows(comm, n, dtype=np.float32, seed=0):
    """(thetas, grads) of the workers, the same on all ranks."""
    return np.random.default_rng([seed, n]).standard_normal((2, comm.size - 1, n)).astype(dtype)


def served(comm, work, theta0, mode="sync", **options):
    """Serve on rank 0, work(client) elsewhere; the server, or what the work returned or raised."""
    if comm.rank == 0:
        server = ParameterServer(theta0, comm.size - 1, mode, **({"lr": 0.5} | options))
        serve(server, comm)
        return server
    try:
        with Client(comm) as client:
            return work(client)
    except Exception as error:
        return error


def expect_rounds(comm, n, dtype):
    """Two synchronous rounds, with the bits of two steps."""
    every = [rows(comm, n, dtype, seed) for seed in range(2)]

    def work(client):
        found, version = [client.read()], 0
        for thetas, grads in every:
            client.write(thetas[client.worker], grads[client.worker])
            found.append(client.read(after=version))
            version = found[-1][1]
        return found

    found = served(comm, work, every[0][0][0])
    if comm.rank == 0:
        found = [(every[0][0][0], 0), (None, 1), found.read()]
    wanted = [every[0][0][0], *(fn.step(thetas, grads, lr=0.5)[0] for thetas, grads in every)]
    expect(
        comm,
        isinstance(found, Exception) and repr(found),
        [version for _, version in found] != [0, 1, 2] and f"versions of {found}",
        *(
            theta is not None and raw(theta) != raw(step) and f"version {number}: not that of fn.step"
            for number, ((theta, _), step) in enumerate(zip(found, wanted, strict=True))
        ),
    )


def check_rounds_have_the_bits_of_steps(comm):
    for n in (0, 1, 1025):
        expect_rounds(comm, n, np.float32)
    expect_rounds(comm, 700, np.float64)


def check_counts_beyond_the_library(comm):
    with mock.patch.object(datatypes, "LARGEST_COUNT", 7):
        datatypes.count_and_type.cache_clear()
        expect_rounds(comm, 1025, np.float32)
    datatypes.count_and_type.cache_clear()


def check_every_asynchronous_write_is_an_update(comm):
    thetas, grads = rows(comm, 300)

    def work(client):
        return [client.write(thetas[client.worker], grads[client.worker]) for _ in range(7)]

    found = served(comm, work, thetas[0], "async", max_rank=0)
    every = comm.gather(found if comm.rank else [], root=0)
    wrong = []
    if comm.rank == 0:
        versions = sorted(version for each in every for version in each)
        wrong = [versions != list(range(1, 7 * (comm.size - 1) + 1)) and f"versions {versions}"]
        difference = np.abs(found.read()[0] - (thetas - 0.5 * grads).mean(0)).max()
        wrong.append(difference > 1e-6 and f"off by {difference}")  # a few roundings of float32
    expect(comm, *wrong)


def check_a_slow_worker_slows_nobody(comm):
    if comm.size < 3:
        raise Skipped("one worker alone")
    thetas, grads = rows(comm, 300)

    def work(client):
        if client.worker == 0:
            time.sleep(1.0)
            return client.read()[1]
        for _ in range(20):
            client.write(thetas[client.worker], grads[client.worker])
            client.read()
        return None

    found = served(comm, work, thetas[0], "async")
    wanted = 20 * (comm.size - 2)
    expect(comm, comm.rank == 1 and found != wanted and f"{found} writes, not {wanted}, while worker 0 slept")


def check_errors_reach_their_writer_alone(comm):
    thetas, grads = rows(comm, 50)

    def work(client):
        mine, errors = (thetas[client.worker], grads[client.worker]), []
        if client.worker == 0:
            for bad in ((mine[0], mine[1] * np.nan), (mine[0][:3], mine[1]), (None, mine[1])):
                try:
                    client.write(*bad)
                except (TypeError, ValueError, fn.NonFiniteError) as error:
                    errors.append((type(error).__name__, getattr(error, "workers", None)))
        client.write(*mine)
        return errors, raw(client.read(after=0)[0])

    found = served(comm, work, thetas[0])
    wanted = [("NonFiniteError", (0,)), ("ValueError", None), ("TypeError", None)] if comm.rank == 1 else []
    step = raw(fn.step(thetas, grads, lr=0.5)[0])
    expect(comm, comm.rank > 0 and found != (wanted, step) and f"{found}")


def check_a_second_write_in_a_round(comm):
    if comm.size < 3:
        raise Skipped("a round of one worker is over with its Write")
    thetas, grads = rows(comm, 50)

    def work(client):
        if client.worker == 0:
            client.write(thetas[0], grads[0])
            client.write(thetas[0], grads[0])

    found = served(comm, work, thetas[0])
    expect(
        comm,
        comm.rank == 1 and not (isinstance(found, ValueError) and "twice in a round" in str(found)) and repr(found),
    )


def check_waiting_for_nothing_is_an_error(comm):
    found = served(comm, lambda client: client.read(after=0), np.zeros(3))
    told = isinstance(found, RuntimeError) and "no new version" in str(found)
    expect(comm, comm.rank > 0 and not told and repr(found))


def check_a_client_that_fails_closes(comm):
    thetas, grads = rows(comm, 50)

    def work(client):
        if client.worker == 0:
            raise KeyError("its own trouble")
        return client.write(thetas[client.worker], grads[client.worker])

    found = served(comm, work, thetas[0], "async")
    expect(comm, comm.rank == 1 and not isinstance(found, KeyError) and repr(found))
    expect(comm, comm.rank == 0 and found.version != comm.size - 2 and f"version {found.version}")


def check_a_wrong_number_of_workers(comm):
    def task():
        if comm.rank:
            Client(comm)
        else:
            serve(ParameterServer(np.zeros(3), comm.size, lr=1.0), comm)

    expect_error(comm, "too many workers", task, ValueError, "server", f"got {comm.size}")


def check_results_go_where_they_are_wanted(comm):
    thetas, _ = rows(comm, 50)
    out = np.empty(50, np.float32)

    def work(client):
        return client.read(out=out)[0]

    found = served(comm, work, thetas[0])
    expect(comm, comm.rank > 0 and (found is not out or raw(out) != raw(thetas[0])) and f"{found}")
    expect_same(comm, "θ", raw(found.read()[0] if comm.rank == 0 else found))


if __name__ == "__main__":
    main(globals())
