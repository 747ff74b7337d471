"""The benchmarks: what they count, what they train, what they write.  Nothing here asserts a time."""

import gzip
import json
import math
import os
import struct
import subprocess
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import check_grad

import fastnewton as fn
from bench import (
    ceilings,
    compare,
    descent,
    exchange,
    kept,
    kernel_calls,
    network,
    peers,
    plots,
    problems,
    quadratic,
    regression,
    report,
    roofline,
    short,
    timing,
    train,
)
from bench.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
MNIST = os.environ.get("FASTNEWTON_DATA", str(ROOT / "data"))


# -- roofline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "itemsize"), [(1, 1, 4), (8, 1000, 4), (3, 17, 8), (64, 4096, 2)])
def test_bytes_and_flops_are_those_of_the_method(m, n, itemsize):
    gram, combine = roofline.gram(m, n, itemsize), roofline.combine(m, n, itemsize)
    assert gram.bytes + combine.bytes == (3 * m + 1) * n * itemsize == roofline.step(m, n, itemsize).bytes
    assert gram.bytes == m * n * itemsize
    assert gram.flops == m * (m + 1) * n + 2 * m * n
    assert combine.flops == 6 * m * n


def test_roofline_time_is_the_sum_over_the_passes_of_the_slower_resource():
    m, n = 8, 1000
    assert roofline.seconds(m, n, 4, 1e9, 1e30) == pytest.approx((3 * m + 1) * n * 4 / 1e9)
    assert roofline.seconds(m, n, 4, 1e30, 1e9) == pytest.approx((m * (m + 1) + 8 * m) * n / 1e9)
    # Here gram is bound by arithmetic and combine by memory.
    assert roofline.seconds(m, n, 4, 1e9, 2e9) == pytest.approx(
        (m * (m + 1) + 2 * m) * n / 2e9 + (2 * m + 1) * n * 4 / 1e9
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_step_hands_its_kernels_the_bytes_that_the_roofline_counts(rng, dtype):
    """One call of gram with the gradients; one of combine with parameters, gradients and the result; or both in one."""
    m, n = 5, 3000
    thetas, grads = rng.standard_normal((2, m, n)).astype(dtype)
    with kernel_calls.record_kernel_calls() as calls:
        fn.combine(thetas, grads, fn.spectrum(fn.gram(grads)).coefficients, lr=1.0)  # which is what a step is
    assert regression.count_bytes(calls) == {
        name: getattr(roofline, name)(m, n, thetas.itemsize).bytes for name in ("gram", "combine")
    }
    with kernel_calls.record_kernel_calls() as calls:
        fn.step(thetas, grads, lr=1.0)
    assert regression.count_bytes(calls) == {"step": roofline.combine(m, n, thetas.itemsize).bytes}  # each array once


def test_ceilings_count_what_they_do():
    read = ceilings.ReadCeiling(size=1 << 20, rounds=1)
    read()  # asserts that every word was read
    assert read.bytes == 1 << 20
    assert ceilings.GemmCeiling("float32", size=8).flops == 2 * 8**3


def test_cores_are_counted_without_an_affinity_too(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert ceilings.available_cores() == os.cpu_count()


# -- timing and comparison ----------------------------------------------------------------------------------


def test_tasks_are_timed_in_turn_and_a_slow_one_only_once():
    order = []

    def task(name):
        order.append(name)
        time.sleep(2 * timing.SHORTEST)  # so that one call makes a sample

    tasks = {name: partial(task, name) for name in ("a", "b")}
    found = timing.interleaved(tasks, rounds=4, budget=0.0, unlimited={"a"})
    said = "".join(order)
    assert (said[:2], sorted(said[2:4]), said[4:]) == ("ab", ["a", "b"], "aaa")  # a first look, then the rounds
    assert {name: len(sample.seconds) for name, sample in found.items()} == {"a": 4, "b": 1}


def test_a_sample_is_summed_up():
    sample = timing.Sample((1.0, 2.0, 3.0, 4.0, 10.0))
    assert (sample.median, sample.min) == (3.0, 1.0)
    assert sample.spread == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.full if name == "torch.compile" else ())  # compiles for a minute
        for name in ("fastnewton", *peers.ALL)
    ],
)
@pytest.mark.filterwarnings("default")  # those of torch.compile
def test_every_peer_takes_the_same_step(name, dtype):
    prepares = {"fastnewton": peers.fastnewton, **peers.installed()}
    if name not in prepares:
        pytest.skip(f"the library of {name} is not installed")
    given = tuple(array.astype(dtype) for array in peers.workers(5, 2000))
    found = np.asarray(prepares[name](*given)())
    assert found.dtype == dtype
    assert peers.error(found, peers.reference(*given)) < (1e-5 if dtype == "float32" else 1e-12)


def test_the_newton_part_is_a_large_part_of_the_step_that_is_checked():
    thetas, grads = peers.workers(8, 5000)
    plain = thetas.mean(0) - peers.LR * grads.mean(0)
    assert peers.error(plain, peers.reference(thetas, grads)) > 5 * peers.TOLERANCE_OF_PEERS


@pytest.mark.parametrize("ratio", [0.79, 0.81])
def test_a_verdict_is_the_ratio_of_medians_against_the_target(ratio):
    shape = compare.Shape(8, 1024, target="roofline", least=0.8)
    samples = {compare.STEP: timing.Sample((2.0, 1.0, 9.0)), "peer": timing.Sample((5.0,))}
    found = compare._verdict(shape, samples, least=2.0 * ratio)
    assert found["ratios"] == {"roofline": pytest.approx(ratio), "best peer": 2.5}
    assert found["reached"] is (ratio > 0.8)


def test_without_a_peer_there_is_no_verdict():
    shape = compare.Shape(8, 1024, target="best peer", least=3.0)
    assert compare._verdict(shape, {compare.STEP: timing.Sample((1.0,))}, 1.0)["reached"] is None


# -- problems -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    return problems.digits()


@pytest.mark.parametrize("kind", [problems.Multinomial, problems.TwoClasses])
def test_gradients_agree_with_finite_differences(kind, bundled, rng):
    problem = kind(problems.Digits("", bundled.images[:200], bundled.labels[:200]), 1e-2)
    for w in (np.zeros(problem.n), 0.3 * rng.standard_normal(problem.n)):
        # Differences of step 1.5e-8 in n coordinates, each with an error of about 1e-8.
        assert check_grad(problem.value, problem.gradient, w) < 1e-6


def test_sizes_are_those_that_are_shown(bundled):
    assert problems.Multinomial(bundled, 1e-2).n == 650
    assert problems.TwoClasses(bundled, 1e-2).n == 20


def test_a_batch_of_all_samples_is_the_full_gradient(bundled, rng):
    problem = problems.Multinomial(bundled, 1e-2)
    w = rng.standard_normal(problem.n)
    np.testing.assert_allclose(problem.gradient(w, np.arange(problem.samples)), problem.gradient(w), rtol=1e-12)


def _idx(array: np.ndarray, code: int) -> bytes:
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("kind", "code"), [("u1", 8), (">i2", 11), (">f4", 13)])
def test_idx_files_are_read(tmp_path, kind, code, suffix):
    array = np.arange(24).reshape(2, 3, 4).astype(kind)
    path, data = tmp_path / f"array{suffix}", _idx(array, code)
    path.write_bytes(gzip.compress(data) if suffix else data)
    found = problems.read_idx(path)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("data", [b"", b"PK\3\4 no such thing", _idx(np.zeros(8, "u1"), 8)[:-1]])
def test_what_is_not_idx_is_refused(tmp_path, data):
    path = tmp_path / "array"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="array"):
        problems.read_idx(path)


@pytest.mark.parametrize("sub", ["", "mnist"])
def test_mnist_is_averaged_to_8_by_8(tmp_path, sub):
    images, labels = np.zeros((3, 28, 28), "u1"), np.array([7, 0, 9], "u1")
    images[0, 2:6, 6:10] = 255  # with the border of 2: exactly one block of 4 × 4
    folder = tmp_path / sub
    folder.mkdir(exist_ok=True)
    (folder / "train-images-idx3-ubyte").write_bytes(_idx(images, 8))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(labels, 8)))
    found = problems.digits(tmp_path)
    expected = np.zeros((3, 8, 8))
    expected[0, 1, 2] = 1
    np.testing.assert_allclose(found.images, expected.reshape(3, 64))
    np.testing.assert_array_equal(found.labels, labels)
    assert len(problems.digits(tmp_path, samples=2).images) == 2


def test_a_folder_without_mnist_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        problems.digits(tmp_path)


@pytest.mark.skipif(not Path(MNIST).is_dir(), reason="no MNIST in $FASTNEWTON_DATA or data/")
def test_real_mnist_is_read():
    found = problems.digits(MNIST)
    assert found.images.shape == (found.labels.size, 64)
    assert 0 <= found.images.min() < 0.01 < 0.9 < found.images.max() <= 1
    assert (np.bincount(found.labels, minlength=10) / found.labels.size > 0.08).all()  # ten classes, about equal
    assert found.labels[:5].tolist() == [5, 0, 4, 1, 9]


# -- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_more_workers_than_parameters_converge_quadratically(bundled, seed):
    found = quadratic.solve(bundled, seed=seed)
    low, high = quadratic.TARGET_ORDER
    assert found["workers"] > found["n"] == 20
    assert low <= found["order"] <= high
    assert found["gradient_norms"][-1] <= 1e-13


def test_the_order_of_a_sequence_is_measured():
    assert quadratic.order([1e-1, 1e-2, 1e-4, 1e-8, 1e-16]) == pytest.approx(2)
    assert quadratic.order([0.5**k for k in range(20)]) == pytest.approx(1)


def test_the_rate_of_a_sequence_is_measured():
    assert descent.rate(list(range(0, 40, 2)), [0.9**k for k in range(20)]) == pytest.approx(0.9**0.5)


def test_the_best_step_is_searched_and_divergence_is_not_chosen(bundled):
    problem = problems.Multinomial(bundled, 1e-2)
    step, history = descent.best(
        lambda step: descent.gradient_descent(problem, step, 30), (0.1, 1.0, 1e6), after=lambda: None
    )
    assert step == 1.0
    assert history.evaluations == list(range(31))
    assert history.norms[-1] < history.norms[0]


def test_kinds_of_sgd_agree_where_they_are_the_same_method(bundled):
    problem = problems.Multinomial(bundled, 1e-2)

    def run(method, workers, **more):
        return method(problem, 0.05, 2, workers, np.random.default_rng(3), **more).norms

    # One worker has nobody to be averaged with; with one, sums are formed in another order at most.
    alone = run(descent.stochastic, 1)
    assert run(descent.local, 1) == alone
    assert run(descent.stochastic, 1, momentum=0.0) == alone
    assert run(descent.asynchronous, 1) == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("method", [descent.local, descent.asynchronous])
def test_workers_of_local_and_asynchronous_sgd_learn_from_each_other(bundled, method):
    problem = problems.Multinomial(bundled, 1e-2)
    alone, together = (method(problem, 0.05, 3, m, np.random.default_rng(3)) for m in (1, 4))
    assert together.norms[-1] < together.norms[0]
    assert together.norms != alone.norms


def test_mpiexec_beside_the_interpreter_comes_first(monkeypatch, tmp_path):
    for folder in ("mine", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mpiexec").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "mine" / "python"))
    assert train.mpiexec() == str(tmp_path / "mine" / "mpiexec")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert train.mpiexec() == str(tmp_path / "other" / "mpiexec")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="pip install"):
        train.mpiexec()


def test_what_the_main_job_lacks_is_told_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "measure", lambda *given, **more: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="no train-images"):
        main(["--quick", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="--out must be a folder"):
        main(["--quick", "--out", str(tmp_path / "file")])


def test_a_job_that_takes_too_long_is_ended():
    settings = {"data": None, "samples": 50, "l2": 0.1, "evaluations": 10**7, "seed": 0, "rests": [0.1]}
    with pytest.raises(RuntimeError, match="longer than 2 s"):
        train.run_ranks("bench.train_rank", 2, settings, after=lambda: None, limit=2)


LONG = 20 * 3 * 4 * 1024  # divides into blocks and ranks


@pytest.fixture(scope="module")
def exchanged():
    settings = {"lengths": [5000, LONG], "rounds": 1, "most_bytes": 1 << 23}
    return train.run_ranks("bench.exchange_rank", 3, settings, after=lambda: None)


def test_exchanges_are_measured_beside_the_all_reduce(exchanged):
    short, long = exchanged
    assert (short["ranks"], short["n"], long["n"]) == (3, 5000, LONG)
    assert set(short["seconds"]) == {"allreduce", "sharded", "allgather"}
    assert set(long["seconds"]) == {"allreduce", "sharded"}  # the other would not fit
    ring = 2 * 4 * long["n"] * 2 / 3
    # Vectors 1.5 times; shards differ by a block of 1,024; the parts of K and c are O(m² log n).
    assert ring * 1.5 <= long["sent"]["sharded"] <= ring * 1.5 + 3 * 4 * 1024 + 8 * 200
    if long["memory"]["sharded"] is not None:
        assert 2.5 < long["memory"]["sharded"] < 12  # 3 n, and what MPI takes for 1 MiB messages


def test_the_table_of_exchanges_has_a_row_for_each_measurement(exchanged):
    found = exchange.table(exchanged)
    assert len(found.rows) == 2
    assert {len(row) for row in found.rows} == {len(found.columns)}
    assert found.rows[1][5] == "" != found.rows[0][5]


def test_the_crossover_lies_between_measured_lengths():
    def row(n, sharded, allgather, ranks=4):
        seconds = {"allreduce": 1.0, "sharded": sharded, "allgather": allgather}
        return {"ranks": ranks, "n": n, "seconds": seconds, "sent": {"sharded": 1}, "memory": {}}

    rows = [row(1 << 14, 2.0, 1.0), row(1 << 16, 1.0, 2.0), row(1 << 22, 1.76, 9.0)]
    assert exchange.crossover(rows) == pytest.approx(1 << 15)  # twice as slow, twice as fast: half way
    assert exchange.crossover(rows[:1]) == math.inf
    note = exchange.table([*rows, row(1 << 14, 1.0, 2.0, ranks=2)]).note
    assert "4 ranks: sharded is faster from n = 3.3e+04 on." in note
    assert "2 ranks: sharded is faster throughout." in note
    assert "1.76 times the all-reduce; target 1.75: not reached." in note
    assert "target 1.75: reached." in exchange.table([row(1 << 22, 1.75, 9.0)]).note


def test_the_model_of_memory_is_checked_where_mpi_takes_little():
    rows = [{"ranks": 4, "n": n, "memory": {"sharded": 6.0, "allgather": None}} for n in (1 << 14, 1 << 22)]
    assert network.memory_errors(rows) == [0.5]  # 3n predicted, 6n seen
    here = network.Network(4e-4, 3e-5, 9e9, 2.5e10, 1e12, 1e-9, cores=2)
    timed = [row | {"seconds": {"allreduce": 1.0}} for row in rows]
    assert network.check(here, timed).rows[-1] == ("memory", "1", "50 %", "50 %")


# -- the command line ---------------------------------------------------------------------------------------


def test_the_model_of_a_network_is_found_again_from_its_own_times():
    true = network.Network(4e-4, 3e-5, 9e9, 2.5e10, 1e12, 1e-9, cores=2)
    rows = [
        {"ranks": m, "n": n, "seconds": {kind: network.seconds(true, kind, m, n) for kind in network.KINDS}}
        for m in (2, 4, 8)
        for n in (1 << 14, 1 << 18, 1 << 22)
    ]
    found = network.fitted(rows, cores=2, flops=1e12, cubic=1e-9)
    # The fit leaves out m³ and arithmetic, here 0.1 % of a step at most.
    for name in ("overhead", "latency", "bandwidth", "memory"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.02)
    assert all(map(network.is_for_the_fit, rows))
    assert network.errors(found, rows) == {kind: [] for kind in network.KINDS}
    between = [dict(row, n=1 << 16) for row in rows[::3]]
    between = [
        row | {"seconds": {kind: network.seconds(true, kind, row["ranks"], row["n"]) for kind in network.KINDS}}
        for row in between
    ]
    assert max(max(errors) for errors in network.errors(found, between).values()) < 0.02


def test_the_model_counts_what_the_exchanges_count(exchanged):
    for row in exchanged:
        for kind, nbytes in row["sent"].items():
            # Beside the vectors: parts of K, c, and blocks that do not divide evenly.
            assert network.sent(kind, row["ranks"], row["n"]) == pytest.approx(nbytes, rel=0.1)


def test_predictions_tell_of_bytes_and_of_latency():
    slow, fast = (network.NAMED[name] for name in ("10 Gb/s Ethernet", "400 Gb/s InfiniBand"))
    plain, sharded, allgather = (network.seconds(slow, kind, 16, 10**11) for kind in network.KINDS)
    assert sharded / plain == pytest.approx(1.5, abs=0.02)
    assert allgather / plain == pytest.approx(16, rel=0.01)
    assert network.seconds(fast, "sharded", 256, 10**4) > 255 * 3 * fast.latency
    assert network.held("sharded", 256, 10**11) == 3 * 4 * 10**11
    assert len(network.predictions().rows) == 18


def test_what_was_fitted_is_shown(exchanged, tmp_path):
    here = network.Network(4e-4, 3e-5, 9e9, 2.5e10, 1e12, 1e-9, cores=2)
    row = exchanged[0] | {"ranks": 4, "n": 1 << 16}
    assert [line[1] for line in network.check(here, [row]).rows] == ["1", "1", "1"]
    assert (tmp_path / plots.exchanges([row], here, tmp_path)).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [[], *([name] for name in ["peers", "train", "exchange", "figure1", "scaling", "regression", "regimes", "report"])],
)
def test_help_names_every_option(capsys, arguments):
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--help"])
    said = capsys.readouterr().out
    options = {
        "peers": ("--shapes", "--rounds", "--peers"),
        "train": ("--data", "--evaluations", "--ranks"),
        "exchange": ("--quick", "--rounds"),
        "figure1": ("--quick", "--full", "--resume", "--data"),
        "scaling": ("--quick", "--device"),
        "regression": ("--invariants", "--update"),
        "regimes": ("--quick",),
        "report": ("--readme",),
    }
    for name in ("--out", *options.get(arguments[0] if arguments else "train", ())):
        assert name in said
    assert arguments or all(name in said for name in options)


def test_training_runs_over_ranks_and_writes_what_it_says(tmp_path, run_python):
    said = run_python(
        *(
            "-m",
            "bench",
            "train",
            "--out",
            tmp_path / "out",
            "--evaluations",
            "20",
            "--ranks",
            "2",
            "--samples",
            "300",
        ),
        env={"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    found = json.loads((tmp_path / "out" / "train.json").read_text())
    page = (tmp_path / "out" / "train.md").read_text()
    assert {method["name"] for method in found["training"]["methods"]} == {
        "DistNewton",
        "gradient descent",
        "SGD",
        "momentum SGD",
        "local SGD",
        "asynchronous SGD",
    }
    for method in found["training"]["methods"]:
        assert method["evaluations"][-1] == 20
        assert len(method["evaluations"]) == len(method["gradient_norms"])
        assert method["gradient_norms"][-1] < method["gradient_norms"][0]
        assert f"| {method['name']} |" in page
        assert f"{method['gradient_norms'][-1]:.1e}" in page
    assert found["training"]["workers"] == 2
    assert f"{found['quadratic']['order']:.2f}" in page
    for name in ("training.png", "quadratic.png"):
        assert f"({name})" in page
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert name in said.replace("\n", "")


@pytest.fixture
def small_ceilings(monkeypatch):
    monkeypatch.setattr(compare, "read_ceiling", lambda: ceilings.ReadCeiling(size=1 << 20, rounds=1))
    monkeypatch.setattr(compare, "gemm_ceiling", lambda dtype: ceilings.GemmCeiling(dtype, size=64))
    monkeypatch.setattr("bench.__main__.read_ceiling", lambda: None)


def test_the_main_job_measures_trains_on_given_data_and_ends_with_the_report(
    tmp_path, monkeypatch, small_ceilings, bundled
):
    images = np.kron(bundled.images[:300].reshape(-1, 8, 8), np.ones((4, 4)))[:, 2:-2, 2:-2]
    (tmp_path / "train-images-idx3-ubyte").write_bytes(_idx((255 * images).astype("u1"), 8))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(_idx(bundled.labels[:300].astype("u1"), 8))
    monkeypatch.setattr(compare, "curve", lambda largest: [compare.Shape(8, 650), compare.Shape(8, 4096)])
    monkeypatch.setattr(peers, "QUICK", ("NumPy, BLAS",))
    monkeypatch.setitem(plots.STYLE, "figure.dpi", 30)  # drawn sooner
    out = tmp_path / "out"
    main(["--quick", "--data", str(tmp_path), "--evaluations", "20", "--ranks", "2", "--out", str(out)])
    found = json.loads((out / "bench.json").read_text())
    assert [row["n"] for row in found["steps"]] == [650, 4096]
    assert str(tmp_path) in found["command"]
    for method in found["training"]["methods"]:
        assert method["gradient_norms"][-1] < method["gradient_norms"][0]
    for name in ("bench.html", "report.html", "step_time.png", "training.png"):
        assert (out / name).stat().st_size > 1000
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "results")
    copies = kept.keep({"bench": out / "bench.json"})
    assert copies == [kept.folder(found["machine"]) / "bench.json", tmp_path / "results" / "step_time.png"]
    assert [copy.read_bytes() for copy in copies] == [(out / copy.name).read_bytes() for copy in copies]


def test_peers_are_compared_and_written(tmp_path, monkeypatch, small_ceilings, capsys):
    monkeypatch.setattr(
        short,
        "_start",
        lambda **env: (
            [0.1, 0.2, 30.0 if env else 0.3, 4.0],
            [],
            {"fastnewton.kernels.gram": 20.0, "numba.empty": 5.0},
        ),
    )
    monkeypatch.setattr(short, "THREADED", (1 << 10, 1 << 16))
    main(["peers", "--shapes", "small", "--rounds", "3", "--peers", "numpy", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "peers.json").read_text())
    (row,) = found["steps"]
    assert found["command"] == f"python -m bench peers --shapes small --rounds 3 --peers numpy --out {tmp_path}"
    assert (row["m"], row["n"], row["dtype"]) == (8, 16_384, "float32")
    assert row["bytes"] == roofline.step(8, 16_384, 4).bytes
    assert set(row["others"]) == {"NumPy, literal", "NumPy, BLAS"}
    assert row["reached"] == (row["ratios"]["best peer"] >= 4.5)
    page = (tmp_path / "peers.md").read_text()
    assert f"| {row['ratios']['best peer']:.2f} |" in page
    assert f"| {report.milliseconds(row['step']['median'])} |" in page
    assert row["memory"].keys() == {"fastnewton", *row["others"]}
    assert "| gram | 20.00 |" in page
    assert "| 1 of Numba's own | 5.00 |" in page
    assert "a first step from the disk cache 300 ms. With an empty cache it compiles for 30 s" in page
    assert all(f"| {1e6 * taken:.1f} |" in page for taken in found["short"]["threads"]["one thread"].values())
    assert "Targets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("every", "said"),
    [([9, 2, 3, 1], "from n = 2,048 on"), ([1, 2, 9, 1], "from n = 8,192 on"), ([1, 1, 1, 9], "at none of these n")],
)
def test_the_crossover_of_threads_is_where_all_are_faster_from_there_on(monkeypatch, every, said):
    monkeypatch.setattr(short, "THREADED", (1024, 2048, 4096, 8192))
    times = {"one thread": [4, 4, 4, 4], "all threads": every}
    found = {"threads": {name: dict(zip(short.THREADED, given, strict=True)) for name, given in times.items()}}
    assert f"All threads are faster {said};" in short.threads_table(found).note


def test_a_peer_that_does_not_work_or_is_wrong_is_named_with_the_reason(monkeypatch):
    def broken(thetas, grads):
        raise OSError("no compiler\nlong story")

    monkeypatch.setattr(peers, "installed", lambda: {"broken": broken, "wrong": lambda t, g: lambda: 2 * t[0]})
    runs, errors, left_out = compare._prepared(compare.Shape(3, 2000), ["broken", "wrong"])
    assert set(runs) == {"fastnewton"}
    assert errors["wrong"] > peers.TOLERANCE_OF_PEERS
    assert left_out["broken"] == "OSError: no compiler"
    assert left_out["wrong"].startswith("wrong by")


def test_the_spread_of_few_samples_says_how_many_and_that_of_one_is_none():
    samples = (timing.Sample(seconds).as_dict() for seconds in ((1.0,), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0, 4.0)))
    assert [report.spread(sample) for sample in samples] == ["– of 1", "50 % of 3", "60 %"]


def test_the_shapes_where_a_peer_is_as_fast_are_said():
    def row(shape, ratio):
        return {"shape": shape, "best_peer": "P", "ratios": {"best peer": ratio}}

    (said,) = report.losses([row("small", 0.9), row("large", 1.2)]).paragraphs
    assert said == "small: P takes 0.90 of our time."
    assert report.losses([row("large", 1.2)]).paragraphs == ["Nowhere: the step is the fastest at all 1 shapes."]


def test_every_shape_of_the_table_is_as_large_as_it_says():
    table = compare.table()
    for name in ("m2", "m4", "m8", "m16", "m32", "m64", "m128"):
        assert table[name].m * table[name].n == 1 << 26
    assert table["float64"].nbytes == table["m8"].nbytes
    assert table["bfloat16"].n == table["m8"].n
    least = {"m8": 0.90, "m16": 0.75, "m32": 0.75, "m64": 0.75, "m128": 0.75, "tiny": 2.2, "small": 4.5}
    assert {name: table[name].least for name in least} == least
    assert {table[name].target for name in least} == {"roofline", "best peer"}


def test_a_table_reads_the_same_in_markdown():
    table = report.Table("Times", ("n", "ms"), [("1", "2.0")], "A note.")
    assert table.markdown() == "### Times\n\n| n | ms |\n| :-- | --: |\n| 1 | 2.0 |\n\nA note."


# -- on a GPU ------------------------------------------------------------------------------------------------


GPU_SCRIPT = ROOT / "bench" / "gpu.sh"

# In place of CuPy: a device as far as it says, on which nothing works.
BROKEN_CUPY = """
class cuda:
    is_available = staticmethod(lambda: True)

class random:
    def default_rng(seed):
        import fastnewton
        raise RuntimeError("no generator for " + fastnewton.kernels.__file__)
"""


def gpu_script(*arguments, **env):
    command = ["bash", str(GPU_SCRIPT), *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_gpu_script_without_a_gpu_says_so(tmp_path):
    done = gpu_script("--out", str(tmp_path), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "nothing to measure" in done.stdout
    assert "usage" in gpu_script("--help").stdout
    assert gpu_script("--only", "nothing").returncode == 2


def test_gpu_script_lays_out_the_package(tmp_path):
    """Without an installation, and where a stage fails the others go on."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without .pth files, so without this checkout
    bare.chmod(0o755)
    (tmp_path / "cupy.py").write_text(BROKEN_CUPY)
    paths = f"{tmp_path}:{sysconfig.get_path('purelib')}"
    out = tmp_path / "out"
    for stage in ("smoke", "ranks"):
        done = gpu_script("--only", stage, "--out", str(out), PYTHON=str(bare), PYTHONPATH=paths)
        assert done.returncode == 0, done.stdout + done.stderr
    said = (out / "smoke.txt").read_text()
    assert "no generator for" in said
    assert str(ROOT) not in said.partition("no generator for")[2]
    stages = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [stage["stage"] for stage in stages] == ["smoke", "ranks"]
    assert stages[0]["exit"] == 1
    assert json.loads((out / "gpu.json").read_text()) == stages


def test_gpu_shapes():
    from bench import gpu

    assert {case.m for case in gpu.headline()} == {2, 4, 8, 12, 16, 24, 32, 48, 64}
    assert all(case.m * case.n > 2**27 for case in gpu.headline() if case.dtype == "float32")
    assert len(set(gpu.grid())) == len(gpu.grid())
    assert {case.dtype for case in gpu.grid()} == {"float32", "float64", "float16", "bfloat16"}
    assert gpu.headline()[2].nbytes == 17 * 2**25 * 4
