"""What holds for `fastnewton.mpi` with any number of ranks: run by test_mpi.py under mpiexec, on every rank.

PYTHONPATH=tests mpiexec -n K python -m mpi4py tests/mpi/mpi_checks.py [--limit SECONDS] [check_…]
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import tracemalloc
import warnings
from unittest import mock

import ml_dtypes
import numpy as np
from mpi4py import MPI
from mpi_harness import Skipped, data, expect, expect_error, expect_same, expect_step, fields, main, raised, raw
from problems import DTYPES, Quadratic

import fastnewton as fn
import fastnewton.mpi
from fastnewton import decision
from fastnewton.kernels.cpu import threads
from fastnewton.kernels.cuda import memory
from fastnewton.mpi import Segment, datatypes, gpu_aware
from fastnewton.mpi.buffers import HostBuffers

EXCHANGE = os.environ.get("EXCHANGE", "auto")  # of all checks
DistNewton = functools.partial(fastnewton.mpi.DistNewton, exchange=EXCHANGE)

LENGTHS = (0, 1, 7, 1023, 1025, 5000)  # around the blocks of 1,024 coordinates: fewer than ranks, uneven, cut short

# -- helpers ------------------------------------------------------------------------------------------------


def ranks_of(comm):
    """A few ranks on which something is wrong."""
    return sorted({0, comm.size // 2, comm.size - 1})


def expect_usable(comm, what, newton, n, dtype=np.float64, **options):
    """Fail unless the next step is as it should be."""
    thetas, grads = data(comm, n, dtype, seed=99)
    given = newton.step(thetas[comm.rank], grads[comm.rank])
    expect_step(comm, f"the step after {what}", given, fn.step(thetas, grads, **options))


@contextlib.contextmanager
def duplicates_counted(comm):
    """Count how often the communicator is duplicated and how many duplicates are freed."""
    counts = {"made": 0, "freed": 0}

    def copied(_comm, _key, value):
        counts["made"] += 1
        return value

    def deleted(_comm, _key, _value):
        counts["freed"] += 1

    key = MPI.Comm.Create_keyval(copied, deleted)
    comm.Set_attr(key, "here")
    try:
        yield counts
    finally:
        comm.Delete_attr(key)
        MPI.Comm.Free_keyval(key)


# -- the result ---------------------------------------------------------------------------------------------


def check_bits_are_those_of_one_process(comm):
    for dtype in DTYPES.values():
        for n in LENGTHS:
            thetas, grads = data(comm, n, dtype)
            with DistNewton(comm, lr=0.5) as newton:
                given = newton.step(thetas[comm.rank], grads[comm.rank])
            expect_step(comm, f"{dtype} n={n}", given, fn.step(thetas, grads, lr=0.5))


def check_every_option_has_its_effect(comm):
    every = [
        {"cutoff": 1e-5},
        {"cutoff": 0.9},
        {"max_rank": 0},
        {"max_rank": 1},
        {"lr_rest": 0.0},
        {"lr_rest": 2.0, "max_rank": 1},
        {"lr_cap": "sigma"},
        {"lr_cap": "curvature"},
        {"lr_cap": "curvature", "cutoff": 1e-5, "lr_rest": 0.25},
        {"nonfinite": "drop"},
        {"nonfinite": "propagate"},
        {"precision": "float64"},
        {"precision": "float64", "lr_cap": "curvature", "max_rank": 1},
        {"safeguards": fn.Safeguards()},
        {"safeguards": fn.Safeguards(curvature="abs", max_newton_norm=0.5), "cutoff": 1e-5, "lr_rest": 0.25},
        {"safeguards": fn.Safeguards(max_coefficient=1e-9), "lr_cap": "curvature"},
    ]
    for dtype in (np.float32, np.float64):
        thetas, grads = data(comm, 3000, dtype)
        for options in every:
            with DistNewton(comm, lr=7.0, **options) as newton:
                given = newton.step(thetas[comm.rank], grads[comm.rank])
            expect_step(comm, f"{np.dtype(dtype)} {options}", given, fn.step(thetas, grads, lr=7.0, **options))
            expect(comm, newton.counts != {given[1].reason: 1} and f"{options}: {newton.counts}")


def check_results_outlive_later_steps(comm):
    kept = []
    with DistNewton(comm, lr=0.5, lr_cap="curvature") as newton:
        for seed in range(3):
            thetas, grads = data(comm, 1500, seed=seed)
            given = newton.step(thetas[comm.rank], grads[comm.rank])
            kept.append((given, fn.step(thetas, grads, lr=0.5, lr_cap="curvature")))
    for seed, (given, wanted) in enumerate(kept):
        expect_step(comm, f"step {seed}, looked at after the last", given, wanted)


def check_inputs_are_not_written(comm):
    thetas, grads = data(comm, 2000)
    theta, grad = thetas[comm.rank].copy(), grads[comm.rank].copy()
    theta.flags.writeable = grad.flags.writeable = False
    with DistNewton(comm, lr=0.5) as newton:
        given = newton.step(theta, grad)
    expect_step(comm, "read-only input", given, fn.step(thetas, grads, lr=0.5))
    expect(
        comm, raw(theta) != raw(thetas[comm.rank]) and "θ changed", raw(grad) != raw(grads[comm.rank]) and "g changed"
    )


def check_out_is_what_comes_back(comm):
    thetas, grads = data(comm, 1500, np.float32)
    wanted = fn.step(thetas, grads, lr=0.5)
    with DistNewton(comm, lr=0.5) as newton:
        out = np.full(1500, 7, np.float32)
        given = newton.step(thetas[comm.rank], grads[comm.rank], out=out)
        expect(comm, given[0] is not out and "not out itself")
        expect_step(comm, "out", given, wanted)
        # Each rank's own business: only some hand one over.
        out = out if comm.rank % 2 else None
        expect_step(comm, "out on odd ranks", newton.step(thetas[comm.rank], grads[comm.rank], out=out), wanted)
        theta = thetas[comm.rank].copy()
        given = newton.step(theta, grads[comm.rank], out=theta)
        expect(comm, given[0] is not theta and "not theta itself")
        expect_step(comm, "out=theta", given, wanted)


def check_rows_of_a_larger_array_are_taken(comm):
    thetas, grads = data(comm, 1100)
    wide = np.full((2, 3, 1200), np.nan)
    wide[0, 1, 50:1150], wide[1, 1, 50:1150] = thetas[comm.rank], grads[comm.rank]
    with DistNewton(comm, lr=0.5) as newton:
        given = newton.step(wide[0, 1, 50:1150], wide[1, 1, 50:1150], out=wide[0, 2, 7:1107])
    expect_step(comm, "rows of a larger array", given, fn.step(thetas, grads, lr=0.5))


def check_torch_tensors(comm):
    torch = _library("torch")
    with DistNewton(comm, lr=0.5) as newton:
        for seed in range(2):
            thetas, grads = (torch.from_numpy(rows).bfloat16() for rows in data(comm, 1500, seed=seed))
            out = torch.empty(1500, dtype=torch.bfloat16) if seed else None
            given = newton.step(thetas[comm.rank], grads[comm.rank], out=out)
            expect_step(comm, "bfloat16", given, fn.step(thetas, grads, lr=0.5))
            expect(comm, seed and given[0] is not out and "not out itself")


def check_jax_arrays(comm):
    jax = _library("jax")
    with DistNewton(comm, lr=0.5) as newton:
        for seed in range(2):
            thetas, grads = (jax.numpy.asarray(rows) for rows in data(comm, 1500, np.float32, seed=seed))
            given = newton.step(thetas[comm.rank], grads[comm.rank])
            expect_step(comm, "float32", given, fn.step(thetas, grads, lr=0.5))
            expect(comm, not isinstance(given[0], jax.Array) and f"a {type(given[0])}")


def _library(name):
    if importlib.util.find_spec(name) is None:
        raise Skipped(f"no {name}")
    return importlib.import_module(name)


def check_the_step_length_of_rank_0_counts(comm):
    thetas, grads = data(comm, 1100)
    with DistNewton(comm, lr=0.5) as newton:
        for mine, counts in (
            (0.25 * (1 + comm.rank), 0.25),
            (None, 0.5),
            (None if comm.rank == 0 else 3.0, 0.5),
            (2.0 if comm.rank == 0 else None, 2.0),
            (0, 0.0),
        ):
            given = newton.step(thetas[comm.rank], grads[comm.rank], lr=mine)
            expect_step(comm, f"lr={counts}", given, fn.step(thetas, grads, lr=counts))


SEGMENTS = [Segment(1000, 0.5), Segment(0, 9.0), Segment(37, 2.0, 0.25), Segment(1963, 0.0), Segment(2000, 0.5, 0.0)]


def check_segments_have_lengths_of_their_own(comm):
    """All from the K of whole vectors; lengths that cut blocks and shards anywhere."""
    for dtype in DTYPES.values():
        thetas, grads = data(comm, 5000, dtype)
        with DistNewton(comm, lr=7.0) as newton:
            theta, info = newton.step(thetas[comm.rank], grads[comm.rank], segments=SEGMENTS)
            whole = newton.step(thetas[comm.rank], grads[comm.rank], segments=[Segment(5000, 7.0)])
        expect_step(comm, f"{dtype}, one segment", whole, fn.step(thetas, grads, lr=7.0))
        start, wanted = 0, []
        for length, lr, lr_rest in SEGMENTS:
            stretch = slice(start, start := start + length)
            c = info.coefficients
            wanted.append(fn.combine(thetas[:, stretch], grads[:, stretch], c, lr=lr, lr_rest=lr_rest))
        expect(comm, raw(theta) != b"".join(map(raw, wanted)) and f"{dtype}: not what fn.combine makes of the segments")
        expect(comm, raw(info.coefficients) != raw(fn.step(thetas, grads, lr=1.0)[1].coefficients) and "another c")
        expect_same(comm, f"{dtype}: θ_new", hashlib.sha256(raw(theta)).hexdigest())


def check_a_cap_reduces_all_segments_in_proportion(comm):
    thetas, grads = data(comm, 3000)
    with DistNewton(comm, lr=1.0, lr_cap="sigma") as newton:
        theta, info = newton.step(
            thetas[comm.rank], grads[comm.rank], segments=[Segment(1001, 50.0), Segment(1999, 100.0)]
        )
    (_, wanted), c = fn.step(thetas, grads, lr=100.0, lr_cap="sigma"), info.coefficients
    halves = [
        fn.combine(thetas[:, part], grads[:, part], c, lr=share * wanted.lr)
        for part, share in ((slice(0, 1001), 0.5), (slice(1001, 3000), 1.0))
    ]
    expect(
        comm,
        info.lr != wanted.lr and f"τ {info.lr}, not {wanted.lr}",
        # 50·(τ/100) and 0.5·τ may differ by a rounding
        not np.allclose(theta, np.concatenate(halves), rtol=1e-14, atol=1e-14) and "not in proportion",
    )


def check_segments_fall_back_together(comm):
    """Averaged SGD by `fallback_lr` for the longest τ, in proportion for the others; for all where all τ are 0."""
    if comm.size == 1:
        raise Skipped("a step of one worker is averaged SGD")
    thetas, grads = data(comm, 3000)
    for lr in (0.5, 0.0):
        guards = fn.Safeguards(max_coefficient=1e-99, fallback_lr=0.25, curvature="keep")
        wanted = [
            fn.step(thetas, grads, lr=lr, safeguards=dataclasses.replace(guards, fallback_lr=x)) for x in (0.25, 0.125)
        ]
        with DistNewton(comm, lr=1.0, safeguards=guards) as newton:
            segments = [Segment(1001, lr), Segment(1999, lr / 2)]
            theta, info = newton.step(thetas[comm.rank], grads[comm.rank], segments=segments)
        parts = [wanted[0][0][:1001], wanted[1 if lr else 0][0][1001:]]
        expect(
            comm,
            info.reason != "coefficient" and info.reason,
            raw(theta) != raw(np.concatenate(parts)) and f"lr={lr}: not averaged SGD of fn.step",
        )


def check_segments_must_be_those_of_all_ranks(comm):
    thetas, grads = data(comm, 1100)
    for rank in ranks_of(comm) if comm.size > 1 else []:
        with DistNewton(comm, lr=0.5) as newton:
            mine = [Segment(100, 0.5), Segment(1000, 0.25 if comm.rank == rank else 0.5)]
            task = functools.partial(newton.step, thetas[comm.rank], grads[comm.rank], segments=mine)
            expect_error(comm, "others", task, ValueError, "segments", f"rank {rank or 1}")
            expect_usable(comm, "other segments", newton, 1100, lr=0.5)


def check_one_step_solves_a_quadratic(comm):
    n = comm.size - 1  # as many directions as differences between workers
    quadratic = Quadratic(np.random.default_rng(5), n, condition=10.0)
    theta = quadratic.minimiser + np.random.default_rng([6, comm.rank]).standard_normal(n)
    with DistNewton(comm, lr=1.0, cutoff=1e-6) as newton:
        found, info = newton.step(theta, quadratic.gradient(theta))
    # Random points, Hessian of condition 10: K loses at most 1e7 of float64's 1e16, squares included.
    error = np.abs(found - quadratic.minimiser).max(initial=0.0)
    expect(comm, info.rank != n and f"rank {info.rank}", not error < 1e-9 and f"off by {error}")


def check_values_whose_squares_overflow(comm):
    thetas, grads = data(comm, 1100, np.float32)
    signs = (-1) ** np.arange(comm.size, dtype=np.float32)[:, None]
    for what, first, second in (
        ("g", thetas, grads * np.float32(1e20)),
        ("θ and g", thetas * np.float32(1e20), grads * np.float32(1e20)),
        ("differences of θ", np.full_like(thetas, 3e38) * signs, grads),  # seen by `combine` alone
    ):
        for options in ({}, {"lr_cap": "curvature"}):
            wanted = fn.step(first, second, lr=1e-3, **options)
            with DistNewton(comm, lr=1e-3, **options) as newton:
                given = newton.step(first[comm.rank], second[comm.rank])
                expect_step(comm, f"{what} {options}", given, wanted)
                theta = first[comm.rank].copy()
                expect_step(
                    comm, f"{what} {options} out=theta", newton.step(theta, second[comm.rank], out=theta), wanted
                )
            expect(comm, not np.isfinite(given[0]).all() and f"{what}: not finite")


def check_overflow_of_finite_input_is_an_error(comm):
    thetas, grads = data(comm, 1100)
    signs = (-1.0) ** np.arange(comm.size)[:, None]
    for what, second, lr in (("products", 1.5e308 * signs * np.ones_like(grads), 2.0), ("result", grads, 1.5e308)):
        task = functools.partial(fastnewton.mpi.DistNewton.step, theta=thetas[comm.rank], grad=second[comm.rank], lr=lr)
        with DistNewton(comm, lr=2.0) as newton:
            found = raised(comm, what, functools.partial(task, newton))
            expected = _error_of_one_process(thetas, second, lr=lr)
            expect(comm, found != expected and f"{found}, not {expected}", "overflow" not in found[1] and found[1])
            expect_usable(comm, what, newton, 1100, lr=2.0)


def _error_of_one_process(*arguments, **options):
    try:
        fn.step(*arguments, **options)
    except fn.NonFiniteError as error:
        return type(error), str(error), error.workers
    return None


def check_safeguards_decide_alike_and_count(comm):
    thetas, grads = data(comm, 2500)
    signs = (-1.0) ** np.arange(comm.size)[:, None]
    broken = grads.copy()
    broken[-1, 7] = np.nan
    for what, second, lr in (
        ("as usual", grads, 0.5),
        ("products overflow", 1.5e200 * signs * (1 + abs(grads)), 1e-300),
        ("the result overflows", grads, 1.5e308),
        ("the last rank is dropped", broken, 0.5),
    ):
        if comm.size == 1 and what != "as usual":
            continue  # no product, no other rank
        guards = fn.Safeguards(curvature="abs", fallback_lr=1e-220)
        with DistNewton(comm, lr=0.5, nonfinite="drop", safeguards=guards) as newton:
            given = newton.step(thetas[comm.rank], second[comm.rank], lr=lr)
            expect_step(comm, what, given, fn.step(thetas, second, lr=lr, nonfinite="drop", safeguards=guards))
        expect(
            comm,
            newton.counts != {given[1].reason: 1} and f"{what}: {newton.counts}",
            "overflow" in what and given[1].reason != "nonfinite" and f"{what}: {given[1].reason}",
        )


# -- bad input ----------------------------------------------------------------------------------------------


def _bad_inputs(theta, grad):
    """What one rank may do wrong in any step: arguments of `step`, error, words of its message."""
    longer = np.ones(theta.size + 1)
    frozen = np.ones(theta.size)
    frozen.flags.writeable = False
    return {
        "no array": ({"theta": "parameters"}, TypeError, "theta", "str"),
        "None": ({"grad": None}, TypeError, "grad", "NoneType"),
        "integers": ({"theta": theta.astype(np.int64), "grad": grad.astype(np.int64)}, TypeError, "theta", "int64"),
        "dtypes of two kinds": ({"grad": grad.astype(np.float32)}, TypeError, "grad", "float32"),
        "a matrix": ({"theta": theta[None]}, ValueError, "theta", "one-dimensional"),
        "strided": ({"theta": np.repeat(theta, 2)[::2]}, ValueError, "theta", "unit stride"),
        "g too short": ({"grad": grad[:-1]}, ValueError, "grad", f"{theta.size}", f"{theta.size - 1}"),
        "g too long": ({"grad": longer}, ValueError, "grad", f"{theta.size}", f"{longer.size}"),
        "negative lr": ({"lr": -1.0}, ValueError, "lr"),
        "segments too short": ({"segments": [Segment(1, 0.5)]}, ValueError, "segments", f"{theta.size}", "1"),
        "no segments": ({"segments": []}, ValueError, "segments", f"{theta.size}"),
        "a negative segment": ({"segments": [Segment(-1, 0.5)]}, ValueError, "segments[0].length"),
        "a segment's lr": ({"segments": (Segment(theta.size, np.nan),)}, ValueError, "segments[0].lr"),
        "a segment's rest": ({"segments": [Segment(theta.size, 0.5, -1)]}, ValueError, "segments[0].lr_rest"),
        "pairs": ({"segments": [(theta.size, 0.5)]}, TypeError, "segments[0]", "Segment", "tuple"),
        "a number of segments": ({"segments": 2}, TypeError, "segments", "int"),
        "lr and segments": ({"lr": 0.5, "segments": [Segment(theta.size, 0.5)]}, TypeError, "lr", "segments"),
        "lr that is no number": ({"lr": "fast"}, TypeError, "lr"),
        "out too long": ({"out": longer}, ValueError, "out"),
        "out of another dtype": ({"out": np.ones(theta.size, np.float32)}, TypeError, "out", "float32"),
        "out read-only": ({"out": frozen}, ValueError, "out", "writable"),
        "out is grad": ({"grad": grad, "out": grad}, ValueError, "out", "overlap"),
    }


def _other_agreements(theta, grad):
    """What is wrong only beside the other ranks or the steps before."""
    single = {"theta": theta.astype(np.float32), "grad": grad.astype(np.float32), "out": None}
    return {
        "fewer parameters": ({"theta": theta[:-1], "grad": grad[:-1], "out": None}, ValueError, f"{theta.size - 1}"),
        "no parameters": ({"theta": theta[:0], "grad": grad[:0], "out": None}, ValueError),
        "another dtype": (single, ValueError, "float32", "float64"),
    }


def _expect_refusal(comm, what, newton, rank, case, thetas, grads, named=True):
    """One rank hands over bad input: all raise its error, and nobody's `out` is written."""
    arguments, kind, *words = case
    out = np.full(thetas.shape[1], 7.0)
    given = {"theta": thetas[comm.rank].copy(), "grad": grads[comm.rank].copy(), "out": out}
    if comm.rank == rank:
        given |= arguments
    before = {name: raw(value) for name, value in given.items() if isinstance(value, np.ndarray)}
    words = [f"rank {rank}:" if named else "rank", *words]
    expect_error(comm, f"{what} on rank {rank}", lambda: newton.step(**given), kind, *words)
    expect(comm, *(raw(given[name]) != bits and f"{what}: {name} was written" for name, bits in before.items()))


def check_bad_input_in_the_first_step(comm):
    thetas, grads = data(comm, 1100)
    for rank in ranks_of(comm):
        with DistNewton(comm, lr=0.5) as newton:
            for what, case in _bad_inputs(thetas[comm.rank].copy(), grads[comm.rank].copy()).items():
                _expect_refusal(comm, what, newton, rank, case, thetas, grads)
            expect_usable(comm, "bad input", newton, 1100, lr=0.5)


def check_bad_input_in_a_later_step(comm):
    thetas, grads = data(comm, 1100)
    theta, grad = thetas[comm.rank], grads[comm.rank]
    with DistNewton(comm, lr=0.5) as newton:
        expect_usable(comm, "nothing", newton, 1100, lr=0.5)
        for rank in ranks_of(comm):
            for what, case in {**_bad_inputs(theta.copy(), grad.copy()), **_other_agreements(theta, grad)}.items():
                _expect_refusal(comm, what, newton, rank, case, thetas, grads)
            expect_usable(comm, "bad input", newton, 1100, lr=0.5)


def check_disagreement_in_the_first_step(comm):
    thetas, grads = data(comm, 1100)
    for rank in ranks_of(comm):
        for what, case in _other_agreements(thetas[comm.rank], grads[comm.rank]).items():
            with DistNewton(comm, lr=0.5) as newton:
                if comm.size > 1:
                    # Rank 0 sets the measure: where it is the odd one out, another rank is named.
                    _expect_refusal(comm, what, newton, rank, case, thetas, grads, named=rank > 0)
                expect_usable(comm, what, newton, 1100, lr=0.5)


def check_errors_of_several_ranks_are_one(comm):
    thetas, grads = data(comm, 1100)
    lowest = min(1, comm.size - 1)
    theta = thetas[comm.rank] if comm.rank < lowest else f"of rank {comm.rank}"
    options = {} if comm.rank <= lowest else {"lr": -1.0}
    with DistNewton(comm, lr=0.5) as newton:
        for when in ("first", "later"):
            task = functools.partial(newton.step, theta, grads[comm.rank], **options)
            expect_error(comm, f"several errors in the {when} step", task, TypeError, f"rank {lowest}:", "str")
            expect_usable(comm, "several errors", newton, 1100, lr=0.5)


def check_options_must_agree(comm):
    thetas, grads = data(comm, 100)
    for name, common, other in (
        ("lr", 0.5, 0.25),
        ("cutoff", 0.1, 0.2),
        ("max_rank", None, 1),
        ("lr_rest", None, 0.5),
        ("lr_cap", "sigma", "curvature"),
        ("nonfinite", "drop", "raise"),
        ("precision", None, "float64"),
        ("exchange", "allgather", "sharded"),
        ("safeguards", None, fn.Safeguards()),
        ("safeguards", fn.Safeguards(), fn.Safeguards(min_cosine=0.02)),
    ):
        mine = other if comm.rank == comm.size - 1 and comm.size > 1 else common
        with DistNewton(comm, **{"lr": 0.5, name: mine}) as newton:
            task = functools.partial(newton.step, thetas[comm.rank], grads[comm.rank])
            if comm.size == 1:
                task()
                continue
            for _ in range(2):  # it stays an error
                expect_error(comm, name, task, ValueError, f"rank {comm.size - 1}: {name}", *map(repr, (common, other)))
    # The same numbers written differently agree.
    with DistNewton(comm, lr=1 if comm.rank else 1.0, max_rank=np.int64(1) if comm.rank else 1) as newton:
        expect_usable(comm, "agreement", newton, 100, lr=1, max_rank=1)


def check_bad_options_on_one_rank(comm):
    for rank in ranks_of(comm):
        for name, value, kind in (
            ("lr", "fast", TypeError),
            ("lr", float("nan"), ValueError),
            ("cutoff", 1.5, ValueError),
            ("max_rank", 1.0, TypeError),
            ("lr_rest", -1, ValueError),
            ("lr_cap", "none", ValueError),
            ("nonfinite", "ignore", ValueError),
            ("precision", "float32", ValueError),
            ("exchange", "carrier pigeon", ValueError),
        ):
            options = {"lr": 0.5} | ({name: value} if comm.rank == rank else {})
            task = functools.partial(DistNewton, comm, **options)
            expect_error(comm, f"{name}={value!r} on rank {rank}", task, kind, f"rank {rank}:", name)
        with mock.patch.dict(os.environ, {"FASTNEWTON_NUM_THREADS": "all"} if comm.rank == rank else {}):
            task = functools.partial(DistNewton, comm, lr=0.5)
            expect_error(comm, "threads", task, ValueError, f"rank {rank}:", "FASTNEWTON_NUM_THREADS", "'all'")
    with DistNewton(comm, lr=0.5) as newton:
        expect_usable(comm, "bad options", newton, 100, lr=0.5)


def check_what_is_no_communicator(comm):
    freed = comm.Dup()
    freed.Free()
    for given in (None, 0, "world", MPI, MPI.COMM_NULL):
        expect_error(comm, repr(given), lambda given=given: DistNewton(given, lr=0.5), TypeError, "comm")
    expect_error(comm, "freed", lambda: DistNewton(freed, lr=0.5), ValueError, "comm", "null communicator")
    if comm.size > 1:
        group = comm.Split(comm.rank % 2)
        between = group.Create_intercomm(0, comm, 1 - comm.rank % 2)
        expect_error(comm, "two groups", lambda: DistNewton(between, lr=0.5), TypeError, "comm", "Intercomm")
        between.Free()
        group.Free()


# -- NaN and infinity ---------------------------------------------------------------------------------------


def _spoilt(comm, dtype, where, ranks, value, n=1100):
    """The data with a value that is not finite in θ or g of some ranks."""
    thetas, grads = data(comm, n, dtype)
    for rank in ranks:
        (thetas if where == "θ" else grads)[rank, n - 1 - rank] = value
    return thetas, grads


def _spoilt_problems(comm):
    for dtype in (np.dtype(np.float32), DTYPES["bfloat16"]):
        for where in ("θ", "g"):
            for rank in ranks_of(comm):
                for value in (np.nan, -np.inf):
                    yield (
                        f"{dtype} {value} in {where} of rank {rank}",
                        rank,
                        *_spoilt(comm, dtype, where, [rank], value),
                    )


def check_nonfinite_input_is_an_error_that_names_the_rank(comm):
    for what, rank, thetas, grads in _spoilt_problems(comm):
        with DistNewton(comm, lr=0.5) as newton:
            for place in ("new", "out=theta"):
                theta = thetas[comm.rank].copy()
                out = theta if place == "out=theta" else None
                found = raised(comm, what, functools.partial(newton.step, theta, grads[comm.rank], out=out))
                expected = _error_of_one_process(thetas, grads, lr=0.5)
                expect(comm, found != expected and f"{what}, {place}: {found}, not {expected}")
                expect(comm, found[2] != (rank,) and f"{what}, {place}: {found[2]}")
            expect_usable(comm, what, newton, thetas.shape[1], thetas.dtype, lr=0.5)


def check_nonfinite_ranks_are_dropped(comm):
    options = {"lr": 0.5, "nonfinite": "drop"}
    for what, rank, thetas, grads in _spoilt_problems(comm):
        healthy = [k for k in range(comm.size) if k != rank]
        with DistNewton(comm, **options) as newton:
            for place in ("new", "out=theta"):
                theta = thetas[comm.rank].copy()
                task = functools.partial(
                    newton.step, theta, grads[comm.rank], out=theta if place == "out=theta" else None
                )
                if comm.size == 1:
                    expect(comm, raised(comm, what, task)[0] is not fn.NonFiniteError and what)
                    continue
                given, info = task()
                alone, info_alone = fn.step(thetas[healthy], grads[healthy], lr=0.5)
                wanted = alone, dataclasses.replace(info_alone, dropped=(rank,))
                expect_step(comm, f"{what}, {place}", (given, info), wanted)
            expect_usable(comm, what, newton, thetas.shape[1], thetas.dtype, lr=0.5)


def check_several_ranks_are_dropped(comm):
    options = {"lr": 0.5, "nonfinite": "drop", "lr_cap": "curvature"}
    for where in ("θ", "g"):
        bad = list(range(comm.size - 1))  # all but the last
        thetas, grads = _spoilt(comm, np.float64, where, bad, np.nan)
        with DistNewton(comm, **options) as newton:
            given = newton.step(thetas[comm.rank], grads[comm.rank])
        expect_step(comm, where, given, fn.step(thetas, grads, **options))
        expect(comm, given[1].dropped != tuple(bad) and f"{where}: {given[1].dropped}")


def check_nothing_is_left_when_all_are_dropped(comm):
    for where in ("θ", "g"):
        thetas, grads = _spoilt(comm, np.float64, where, range(comm.size), np.nan)
        with DistNewton(comm, lr=0.5, nonfinite="drop") as newton:
            task = functools.partial(newton.step, thetas[comm.rank], grads[comm.rank])
            kind, _, workers = raised(comm, where, task)
            expect(comm, kind is not fn.NonFiniteError and kind, workers != tuple(range(comm.size)) and workers)
            expect_usable(comm, "all ranks were bad", newton, thetas.shape[1], lr=0.5)


def check_nan_propagates(comm):
    options = {"lr": 0.5, "nonfinite": "propagate"}
    for what, _, thetas, grads in _spoilt_problems(comm):
        wanted, wanted_info = fn.step(thetas, grads, **options)
        with DistNewton(comm, **options) as newton:
            given, info = newton.step(thetas[comm.rank], grads[comm.rank])
        lost, wanted_lost = np.isnan(given.astype(np.float64)), np.isnan(wanted.astype(np.float64))
        expect(
            comm,
            (lost != wanted_lost).any() and f"{what}: {lost.sum()} NaN, not {wanted_lost.sum()}",
            raw(given[~lost]) != raw(wanted[~wanted_lost]) and f"{what}: finite values differ",
            info.rank != wanted_info.rank and f"{what}: rank {info.rank}",
            info.dropped and f"{what}: dropped {info.dropped}",
            np.isfinite(given.astype(np.float64)).all() and f"{what}: nothing propagated",
        )


# -- communicators ------------------------------------------------------------------------------------------


def check_messages_of_the_caller_arrive(comm):
    thetas, grads = data(comm, 1100)
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    tags = (0, 1, 17, 32767)  # the standard's smallest upper bound
    with DistNewton(comm, lr=0.5) as newton:
        inbox = np.full(1, -1.0)
        anything = comm.Irecv(inbox, MPI.ANY_SOURCE, MPI.ANY_TAG)  # would take a message of the step's own
        given = newton.step(thetas[comm.rank], grads[comm.rank])
        early = anything.Test()
        comm.Barrier()  # all have looked
        sent = comm.Isend(np.array([100.0 + comm.rank]), after, 3)
        MPI.Request.Waitall([anything, sent])
        pending = [comm.isend((comm.rank, tag), after, tag) for tag in tags]
        again = newton.step(thetas[comm.rank], grads[comm.rank])
    received = [comm.recv(source=before, tag=tag) for tag in reversed(tags)]
    MPI.Request.waitall(pending)
    wanted = fn.step(thetas, grads, lr=0.5)
    expect(
        comm,
        early and "the caller's receive took a message of the step",
        inbox[0] != 100.0 + before and f"{inbox[0]} in place of the caller's message",
        received != [(before, tag) for tag in reversed(tags)] and f"received {received}",
    )
    expect_step(comm, "beside an open receive", given, wanted)
    expect_step(comm, "beside open sends", again, wanted)


def check_a_block_frees_and_a_closed_object_refuses(comm):
    thetas, grads = data(comm, 100)
    mine = thetas[comm.rank], grads[comm.rank]
    with duplicates_counted(comm) as counts:
        for _ in range(3):
            with DistNewton(comm, lr=0.5) as newton:
                newton.step(*mine)
            expect_error(comm, "a step after the block", lambda newton=newton: newton.step(*mine), ValueError, "closed")
            newton.close()  # once more is no error
        expect(comm, counts != {"made": 3, "freed": 3} and counts)
        unused = DistNewton(comm, lr=0.5)
        unused.close()
        expect(comm, counts != {"made": 4, "freed": 4} and counts)


def check_a_failed_constructor_frees(comm):
    with duplicates_counted(comm) as counts:
        raised(comm, "cutoff", lambda: DistNewton(comm, lr=0.5, cutoff=2.0 if comm.rank == comm.size - 1 else 0.1))
        expect(comm, counts != {"made": 1, "freed": 1} and counts)


def check_an_exception_in_the_block_waits_for_nobody(comm):
    class Stop(Exception):
        pass

    with duplicates_counted(comm) as counts:
        try:
            with DistNewton(comm, lr=0.5) as newton:
                expect_usable(comm, "nothing", newton, 100, lr=0.5)
                raise Stop
        except Stop:
            pass
        expect(comm, counts["freed"] and "freed, which is collective")
        expect_usable(comm, "the exception", newton, 100, lr=0.5)
        newton.close()
        expect(comm, not counts["freed"] and "not freed")


def check_groups_and_objects_are_independent(comm):
    group = comm.Split(comm.rank % 2, comm.rank)
    with DistNewton(comm, lr=0.5) as whole, DistNewton(comm, lr=1.0) as other, DistNewton(group, lr=2.0) as part:
        for seed in range(2):
            for newton, among, n, lr in ((whole, comm, 1100, 0.5), (part, group, 50, 2.0), (other, comm, 300, 1.0)):
                thetas, grads = data(among, n, seed=seed)
                given = newton.step(thetas[among.rank], grads[among.rank])
                expect_step(among, f"n={n}", given, fn.step(thetas, grads, lr=lr))
    group.Free()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one rank of a proper job is no job started by a foreign launcher
        with DistNewton(MPI.COMM_SELF, lr=0.5) as newton:
            thetas, grads = data(MPI.COMM_SELF, 100, seed=comm.rank)
            given = newton.step(thetas[0], grads[0])
    expect(comm, raw(given[0]) != raw(fn.step(thetas, grads, lr=0.5)[0]) and "COMM_SELF")


# -- a rank that fails ---------------------------------------------------------------------------------------


def check_a_rank_that_fails_inside_a_step(comm):
    thetas, grads = data(comm, 3000)
    spoilt = grads.copy()
    spoilt[0, 7] = np.nan
    places = [(HostBuffers, "prepare_send"), (HostBuffers, "make_rows"), (fastnewton.backends.cpu, "parts")]
    places += [
        (fastnewton.backends.cpu, "nonfinite_workers"),
        (fastnewton.backends.cpu, "combine"),
        (HostBuffers, "open_result"),
    ]
    for rank in ranks_of(comm):
        for place, name in [*places, (fastnewton.backends.cpu, "total"), (decision, "decide")]:
            if name in ("total", "decide") and rank > 0:
                continue  # rank 0 does that alone
            if name in ("combine", "open_result") and EXCHANGE == "allgather":
                continue  # nothing is sent after that
            second = spoilt if name == "nonfinite_workers" else grads
            with DistNewton(comm, lr=0.5) as newton:
                for _ in range(2):
                    out = np.full(3000, 7.0)
                    step = functools.partial(newton.step, thetas[comm.rank], second[comm.rank], out=out)
                    failing = mock.patch.object(place, name, side_effect=MemoryError(f"no room for {name}"))
                    with failing if comm.rank == rank else contextlib.nullcontext():
                        expect_error(comm, name, step, MemoryError, f"rank {rank}:", f"no room for {name}")
                    # The others write their shards while one cannot.
                    expect(comm, name not in ("combine", "open_result") and (out != 7).any() and f"{name}: out written")
                    expect_usable(comm, name, newton, 3000, lr=0.5)


# -- what moves --------------------------------------------------------------------------------------------


def check_each_rank_forms_the_parts_of_its_own_blocks(comm):
    for n in (0, 1, 5000, 1024 * comm.size + 1):
        for options in ({}, {"safeguards": fn.Safeguards()}):
            thetas, grads = data(comm, n, np.float32)
            with (
                mock.patch.object(fastnewton.backends.cpu, "parts", wraps=fastnewton.backends.cpu.parts) as parts,
                DistNewton(comm, lr=0.5, **options) as newton,
            ):
                newton.step(thetas[comm.rank], grads[comm.rank])
            runs, blocks = [(call.args[0].n, *call.args[-2:]) for call in parts.call_args_list], -(-n // 1024)
            first, last = (blocks * rank // comm.size for rank in (comm.rank, comm.rank + 1))
            wanted = [(min(1024 * last, n) - min(1024 * first, n), first, blocks)]
            expect(comm, runs != wanted and f"n={n}, {options}: coordinates and blocks {runs}, not {wanted}")


def check_traffic_is_that_of_the_table(comm):
    """Bytes of vectors that a rank sends, from the sizes of the shards alone."""
    m = comm.size
    for n in (0, 1, 1024 * m + 17, 16_384, 50_000):
        thetas, grads = data(comm, n, np.float32)
        with DistNewton(comm, lr=0.5) as newton:
            for _ in range(2):
                newton.step(thetas[comm.rank], grads[comm.rank])
            traffic = dict(newton.traffic)
        blocks = -(-n // 1024)
        bounds = [min(n, 1024 * (blocks * rank // m)) for rank in range(m + 1)]
        own = bounds[comm.rank + 1] - bounds[comm.rank]
        if EXCHANGE == "allgather":
            wanted = {"Allgather": (4, 2 * 2 * 4 * n * (m - 1))}
        else:
            wanted = {"Alltoall": (4, 2 * 2 * 4 * (n - own)), "Allgather": (2, 2 * 4 * own * (m - 1))}
            total = sum(comm.allgather(sum(nbytes for _, nbytes in wanted.values())))
            # 1.5 times a ring all-reduce of the gradient, 2n(m − 1)/m on each rank, in two steps; none is rounded up.
            assert total == 2 * 3 * 4 * n * (m - 1)
        found = {name: traffic[name] for name in ("Allgather", "Alltoall") if name in traffic}
        expect(comm, found != wanted and f"n={n}: {found}, not {wanted}")
        parts = traffic["Gatherv"][1] + traffic["Bcast"][1]
        # A part has m² numbers and 2m + 2 more at most, in tiles of 5²; a rank has two subtrees for each level.
        most = 2 * 8 * (1 + 2 * max(1, blocks).bit_length() * (m + 7) ** 2) + 2 * 8 * (8 + 2 * m) * m
        expect(comm, parts > most and f"n={n}: {parts} bytes of parts, more than {most}")


def check_memory_is_that_of_the_table(comm):
    """What a first step allocates beside θ and g, as tracemalloc sees it; few workers are the hardest case."""
    m, n = comm.size, 1 << 22
    theta, grad = np.random.default_rng(comm.rank).standard_normal((2, n), dtype=np.float32)
    with DistNewton(comm, lr=0.5) as newton:
        newton.step(theta[:5000], grad[:5000])  # compiles
    for out in (None, np.empty(n, np.float32)):
        # Sharded: 2n of shards and n of result; K's parts and scratch, some 0.5 MB, are small beside 0.1n.
        most = (3.1 if out is None else 2.1) if EXCHANGE != "allgather" else 2 * m + (1.1 if out is None else 0.1)
        with DistNewton(comm, lr=0.5) as newton:
            tracemalloc.start()
            newton.step(theta, grad, out=out)
            peak = tracemalloc.get_traced_memory()[1] / (4 * n)
            tracemalloc.stop()
        expect(comm, peak > most and f"{peak:.2f}n, more than {most}n")


def check_counts_beyond_the_library(comm):
    """An MPI that takes seven values at a time gets types of seven values."""
    thetas, grads = data(comm, 5003, np.float32)
    with mock.patch.object(datatypes, "LARGEST_COUNT", 7):
        datatypes.count_and_type.cache_clear()
        with DistNewton(comm, lr=0.5) as newton:
            given = newton.step(thetas[comm.rank], grads[comm.rank])
        composed = datatypes.count_and_type(5003, "float32")[0] == 1
    datatypes.count_and_type.cache_clear()
    expect(comm, not composed and "no composed type was made")
    expect_step(comm, "few values at a time", given, fn.step(thetas, grads, lr=0.5))


def check_auto_shards_long_vectors(comm):
    for n, kind in ((1000, "Allgather"), (70_000, "Alltoall")):
        thetas, grads = data(comm, n, np.float32)
        with fastnewton.mpi.DistNewton(comm, lr=0.5) as newton:
            given = newton.step(thetas[comm.rank], grads[comm.rank])
            expect(comm, (kind == "Alltoall") != ("Alltoall" in newton.traffic) and f"{n}: {newton.traffic}")
        expect_step(comm, kind, given, fn.step(thetas, grads, lr=0.5))


# -- arrays on a CUDA device --------------------------------------------------------------------------------


@contextlib.contextmanager
def _simulated_device():
    from cudasim import build, checks

    if build.why_unavailable():
        raise Skipped(build.why_unavailable())
    with checks.simulated_device():
        yield checks


def check_arrays_on_a_device(comm):
    """Staged through pinned memory; the kernels are those of a GPU, simulated."""
    with _simulated_device() as simulated:
        for dtype, n, options in (
            (np.dtype(np.float32), 3001, {}),
            (np.dtype(np.float64), 7, {"lr_cap": "curvature"}),
            (DTYPES["bfloat16"], 2000, {"lr_rest": 0.1}),
            (np.dtype(np.float32), 0, {}),
            (np.dtype(np.float64), 2000, {"safeguards": fn.Safeguards(curvature="abs"), "cutoff": 1e-3}),
            (np.dtype(np.float32), 2000, {"safeguards": fn.Safeguards(max_coefficient=1e-9), "lr_rest": 0.1}),
        ):
            what = f"{dtype} n={n} {options}"
            thetas, grads = data(comm, n, dtype)
            theta, grad = simulated.there(thetas[comm.rank]), simulated.there(grads[comm.rank], past=1)
            with DistNewton(comm, lr=0.5, **options) as newton:
                for out in (None, simulated.there(np.zeros(n, dtype)), theta):
                    new, info = newton.step(theta, grad, out=out)
                    expected, wanted = fn.step(thetas, grads, lr=0.5, **options)
                    # The arithmetic is that of the other side, in another order: K is off by eps·σ_1², which counts
                    # for (σ_1/σ_j)² in the smallest direction kept; results are stored in this dtype.
                    kept = wanted.singular_values[: wanted.rank]
                    scale = np.abs(expected.astype(np.float64)).max(initial=0) * (
                        (kept[0] / kept[-1]) ** 2 if len(kept) else 1
                    )
                    error = np.abs(new.host.astype(np.float64) - expected.astype(np.float64)).max(initial=0)
                    expect(
                        comm,
                        type(new) is not type(theta) and f"{what}: a {type(new)}",
                        out is not None and new is not out and f"{what}: not out",
                        error > 16 * float(ml_dtypes.finfo(dtype).eps) * scale and f"{what}: off by {error}",
                        info.rank != wanted.rank and f"{what}: rank {info.rank}, not {wanted.rank}",
                    )
                    expect_same(comm, what, raw(new.host))
                    expect_same(comm, what, fields(info))


def check_segments_on_a_device(comm):
    with _simulated_device() as simulated:
        thetas, grads = data(comm, 5000, np.float32)
        given = simulated.there(thetas[comm.rank]), simulated.there(grads[comm.rank])
        with DistNewton(comm, lr=1.0) as newton:
            new, info = newton.step(*given, segments=SEGMENTS)
        start = 0
        for length, lr, lr_rest in SEGMENTS:
            stretch = slice(start, start := start + length)
            lengths = {"lr": lr, "lr_rest": lr_rest}
            wanted = fn.combine(thetas[:, stretch], grads[:, stretch], info.coefficients, **lengths)
            # The arithmetic is that of the other side, in another order.
            right = np.allclose(new.host[stretch], wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max(initial=0))
            expect(comm, not right and f"{length}, {lengths}")
        expect_same(comm, "θ_new", raw(new.host))


class _Recording:
    """A communicator that notes what its vectors are, and what the device did last before MPI was called."""

    def __init__(self, comm, log, calls):
        self._comm, self._log, self._calls = comm, log, calls

    def __getattr__(self, name):
        found = getattr(self._comm, name)
        if name not in ("Iallgather", "Isend", "Irecv"):
            return found

        def recorded(*arguments):
            vectors = [each[0] for each in arguments if isinstance(each, list)]
            last = [what for what, *_ in self._log if what in ("launch", "copy", "synchronize", "get")][-1:]
            self._calls.extend((name, type(vector), last) for vector in vectors)
            return found(*arguments)

        return recorded


def check_device_memory_goes_to_mpi_where_it_may(comm):
    """Simulated device memory is host memory, so that any MPI can read it when it is handed the pointer."""
    with _simulated_device():
        from cudasim import device

        n = 4097
        for dtype in (np.dtype(np.float32), DTYPES["bfloat16"]):
            mine = [memory.pinned((n,), dtype) for _ in range(2)]
            for words, rows in zip(mine, data(comm, n, dtype), strict=True):
                words[:] = rows[comm.rank]
            found = {}
            for direct in (False, True):
                given = [memory.upload(words) for words in mine]  # still on their way when the step is called
                calls, start = [], len(device.log)
                with (
                    mock.patch.object(gpu_aware, "verdict", lambda direct=direct: (direct, "")),
                    DistNewton(comm, lr=0.5) as newton,
                ):
                    newton._comm = _Recording(newton._comm, device.log, calls)
                    new, _ = newton.step(*given)
                found[direct] = raw(new.host)
                copies = [event for event in device.log[start:] if event[0] == "copy"]
                kinds = {kind for _, kind, _ in calls}
                expect(
                    comm,
                    direct and copies and f"{dtype}: {copies}",
                    not direct and not copies and f"{dtype}: nothing was staged",
                    kinds - {device.ndarray if direct else np.ndarray} and f"{dtype}, direct={direct}: {kinds}",
                    direct
                    and [call for call in calls if call[2] not in (["synchronize"], ["get"])]
                    and f"{dtype}: work was in flight: {calls}",
                )
            expect(comm, found[True] != found[False] and f"{dtype}: the bits differ")


def check_nonfinite_arrays_on_a_device(comm):
    with _simulated_device() as simulated:
        for where in ("θ", "g"):
            for rank in ranks_of(comm):
                thetas, grads = _spoilt(comm, np.dtype(np.float32), where, [rank], np.nan)
                given = simulated.there(thetas[comm.rank]), simulated.there(grads[comm.rank])
                with DistNewton(comm, lr=0.5) as newton:
                    found = raised(comm, where, functools.partial(newton.step, *given))
                    expect(comm, (found[0], found[2]) != (fn.NonFiniteError, (rank,)) and f"{where}: {found}")
                if comm.size > 1:
                    with DistNewton(comm, lr=0.5, nonfinite="drop") as newton:
                        new, info = newton.step(*given)
                    expect(comm, info.dropped != (rank,) and f"{info.dropped}", np.isnan(new.host).any() and "NaN")
                    expect_same(comm, where, raw(new.host))


def check_every_rank_has_the_same_kind_of_memory(comm):
    with _simulated_device() as simulated:
        thetas, grads = data(comm, 100, np.float32)
        here = thetas[comm.rank], grads[comm.rank]
        there = tuple(map(simulated.there, here))
        last = comm.rank == comm.size - 1
        if comm.size > 1:
            with DistNewton(comm, lr=0.5) as newton:
                step = functools.partial(newton.step, *(there if last else here))
                expect_error(comm, "mixed", step, ValueError, f"rank {comm.size - 1}", "kernel layout", "cuda")
        with DistNewton(comm, lr=0.5) as newton:
            newton.step(*there)
            step = functools.partial(newton.step, *(here if last else there))
            expect_error(comm, "moved", step, ValueError, f"rank {comm.size - 1}", "device of the first step", "cuda:0")


# -- threads ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _threads_seen():
    """The number of threads that the kernels may use, whenever a step runs them."""
    seen = []
    really = fastnewton.backends.cpu.combine

    def looking(*arguments, **options):
        seen.append(threads.thread_count())
        return really(*arguments, **options)

    with mock.patch.object(fastnewton.backends.cpu, "combine", looking):
        yield seen


def check_a_rank_uses_its_share_of_the_cores(comm):
    thetas, grads = data(comm, 1100)
    share = threads.chosen_threads() or max(1, threads.available_cores() // comm.size)
    for outside in (None, share + 3):
        with _threads_seen() as seen, threads.set_thread_limit(outside), DistNewton(comm, lr=0.5) as newton:
            before = threads.thread_count()
            newton.step(thetas[comm.rank], grads[comm.rank])
            after = threads.thread_count()
            raised(comm, "bad input", lambda newton=newton: newton.step(None, None))
            expect(
                comm,
                seen != [share] and f"{seen} threads, not {share}",
                after != before and f"{after} threads after a step, {before} before",
                threads.thread_count() != before and f"{threads.thread_count()} threads after an error",
            )


def check_a_long_step(comm):
    """Long enough for several threads; the digest is compared between runs with different numbers of them."""
    thetas, grads = data(comm, 400_000, np.float32)
    with _threads_seen() as seen, DistNewton(comm, lr=0.5) as newton:
        given = newton.step(thetas[comm.rank], grads[comm.rank])
    expect_step(comm, f"{seen} threads", given, fn.step(thetas, grads, lr=0.5))
    return {"threads": seen[0], "digest": hashlib.sha256(raw(given[0])).hexdigest()}


if __name__ == "__main__":
    main(globals())
