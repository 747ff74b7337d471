"""The paper's experiment: what is read, how workers come apart, what is run and what is made of it."""

import gzip
import json
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import reference

import fastnewton as fn
from bench import claims, figure1, plots, problems
from bench.__main__ import main

DATA = Path(os.environ.get("FASTNEWTON_DATA", Path(__file__).resolve().parents[2] / "data"))
LR, M, N = 0.1, 4, 50
RUN = figure1.Run("mnist", "tanh", 1024, 2, "own", M, LR)


# -- the data -----------------------------------------------------------------------------------------------


def cifar_bytes(rng, count):
    records = rng.integers(256, size=(count, problems.CIFAR_RECORD), dtype=np.uint8)
    records[:, 0] %= problems.CLASSES
    return records


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_cifar_files_are_read(tmp_path, rng, suffix):
    every = []
    for k in range(1, 6):
        every.append(cifar_bytes(rng, k))
        data = every[-1].tobytes()
        (tmp_path / f"data_batch_{k}.bin{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    images, labels = problems.training_set("cifar10", tmp_path)
    records = np.concatenate(every)
    assert images.shape == (15, 3, 32, 32)
    np.testing.assert_array_equal(labels, records[:, 0])
    # A label, then red, green and blue, each row by row.
    assert images[7, 2, 5, 9] == records[7, 1 + 2 * 1024 + 5 * 32 + 9]


@pytest.mark.parametrize("data", [b"", bytes(problems.CIFAR_RECORD - 1), b"\x0a" + bytes(problems.CIFAR_RECORD - 1)])
def test_what_is_not_cifar_is_refused(tmp_path, data):
    (tmp_path / "batch.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"batch\.bin"):
        problems.read_cifar(tmp_path / "batch.bin")


@pytest.mark.skipif(not DATA.is_dir(), reason="no $FASTNEWTON_DATA or data/")
@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_real_images_are_read(name, shape):
    convnet = pytest.importorskip("bench.convnet")
    images, labels = problems.training_set(name, DATA)
    assert images.shape == (len(labels), *shape)
    assert (np.bincount(labels, minlength=10) / len(labels) > 0.08).all()  # ten classes, about equal
    x, y = convnet.images(name, DATA, 1000)
    assert y.tolist() == labels[:1000].tolist()
    np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=1e-5)  # float32 sums of 10⁶ values of size 1
    np.testing.assert_allclose(x.std((0, 2, 3)), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="samples must be at most"):
        convnet.images(name, DATA, len(labels) + 1)


# -- the network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape", "count"), [("mnist", (1, 28, 28), 15_858), ("cifar10", (3, 32, 32), 15_650)])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_network_has_five_layers_and_the_parameters_it_says(name, shape, count, activation):
    torch = pytest.importorskip("torch")
    from bench.convnet import ConvNet

    x, labels = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10
    net = ConvNet(name, activation, x, labels, seed=1)
    assert net.start.shape == (count,)
    assert sum(hasattr(layer, "weight") for layer in net._net) == 5
    assert net.total_loss(net.start, 0, 40) / 40 == pytest.approx(np.log(10), abs=0.2)  # knows nothing yet
    gradient = net.gradient(net.start, np.arange(40))
    step = 2e-3 * gradient / gradient.norm()
    change = (net.total_loss(net.start + step, 0, 40) - net.total_loss(net.start - step, 0, 40)) / 40
    # A central difference in float32: losses of 2.3 are right to 2e-7, their difference is about 4e-4; ReLU has kinks.
    assert change == pytest.approx(4e-3 * float(gradient.norm()), rel=3e-2)


# -- how workers come apart, against what the protocols say, literally --------------------------------------


class ThreadComm:
    """One of M workers that are threads: as much of a communicator as a protocol needs."""

    size = M

    def __init__(self, rank, barrier, shared):
        self.rank, self._barrier, self._shared = rank, barrier, shared

    def Allreduce(self, mine, total):
        self._barrier.wait()
        self._shared[self.rank] = mine
        self._barrier.wait()
        total[:] = np.sum(self._shared, axis=0)


class Bowl:
    """½(θ − mean of the chosen points)ᵀ H (θ − that mean), with a diagonal H: gradients differ from batch to batch."""

    def __init__(self, torch):
        rng = np.random.default_rng(0)
        self.torch, self.curvature = torch, rng.uniform(0.5, 2, N)
        self.points, self.theta = rng.standard_normal((RUN.samples, N)), rng.standard_normal(N)
        self.start = torch.from_numpy(self.theta.astype("f4"))

    def literal(self, theta, chosen):
        return self.curvature * (theta - self.points[chosen].mean(0))

    def gradient(self, theta, chosen):
        return self.torch.from_numpy(self.literal(theta.numpy().astype("f8"), chosen).astype("f4"))


@pytest.fixture
def bowl():
    return Bowl(pytest.importorskip("torch"))


def rows_of(bowl, protocol, run=RUN, lengths=None):
    """θ_k and the row of every worker, and gradients that each has evaluated."""
    from bench.figure1_rank import PROTOCOLS, Worker

    barrier, shared = threading.Barrier(M), [None] * M
    workers = [Worker(ThreadComm(rank, barrier, shared), bowl, replace(run, protocol=protocol)) for rank in range(M)]
    for worker in workers:
        worker.lengths |= lengths or {}
    with ThreadPoolExecutor(M) as pool:
        found = list(pool.map(lambda worker: PROTOCOLS[protocol](worker, bowl.start), workers))
    thetas, rows = (np.array([one.numpy() for one in part], "f8") for part in zip(*found, strict=True))
    return thetas, rows, {worker.evaluations for worker in workers}


def shares(count):
    """The shares of the workers in each of the first batches of 256, and what is left of the order."""
    order = np.random.default_rng(RUN.seed).permutation(RUN.samples)
    batches = [order[256 * k : 256 * (k + 1)] for k in range(count)]
    return [[batch[rank::M] for rank in range(M)] for batch in batches], order[256 * count :]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32 numbers of size 1


def one_step_apart(bowl, first):
    return np.array([bowl.theta - LR * bowl.literal(bowl.theta, share) for share in first])


def gradients(bowl, thetas, chosen):
    return np.array([bowl.literal(theta, each) for theta, each in zip(thetas, chosen, strict=True)])


def test_own_is_a_local_step_and_the_gradient_of_a_fresh_share(bowl):
    (first, second), _ = shares(2)
    thetas, rows, evaluations = rows_of(bowl, "own")
    close(thetas, one_step_apart(bowl, first))
    close(rows, gradients(bowl, thetas, second))
    assert evaluations == {2}


def test_probe_takes_secants_from_a_shared_batch_and_the_mean_from_all(bowl):
    (first, second), rest = shares(2)
    thetas, rows, evaluations = rows_of(bowl, "probe")
    close(thetas, one_step_apart(bowl, first))
    probes = gradients(bowl, thetas, [rest[: 256 // M]] * M)
    close(rows - rows.mean(0), probes - probes.mean(0))
    close(rows - rows.mean(0), (thetas - thetas.mean(0)) * bowl.curvature)  # without noise
    close(rows.mean(0), gradients(bowl, thetas, second).mean(0))
    assert evaluations == {3}


def test_diff_takes_secants_over_the_same_share_and_the_mean_from_all(bowl):
    (first,), _ = shares(1)
    thetas, rows, evaluations = rows_of(bowl, "diff")
    close(thetas, one_step_apart(bowl, first))
    after = gradients(bowl, thetas, first)
    secants = after - gradients(bowl, [bowl.theta] * M, first)
    close(rows - rows.mean(0), secants - secants.mean(0))
    close(rows.mean(0), after.mean(0))
    assert evaluations == {2}


@pytest.mark.parametrize(("of", "factor"), [("step", 1.0), ("gradient", 0.1)])
def test_spread_is_as_long_as_it_says(bowl, of, factor):
    (first,), _ = shares(1)
    thetas, rows, evaluations = rows_of(bowl, f"spread-{of}", lengths={of: 3.0})
    lengths = np.linalg.norm(thetas - bowl.theta, axis=1)
    np.testing.assert_allclose(lengths, factor * 3.0, rtol=0.5)  # random: ‖z‖²/n has a deviation of √(2/50)
    assert len(set(lengths)) == M
    close(rows, gradients(bowl, thetas, first))
    assert evaluations == {1}


def test_sgd_and_momentum_are_those_of_torch(bowl):
    torch, run = bowl.torch, replace(RUN, protocol="sgd", workers=1, momentum=0.9)
    from mpi4py import MPI

    from bench.figure1_rank import train

    seen = []
    bowl.total_loss = lambda theta, first, last: seen.append(theta.numpy().copy()) or 0.0
    found = train(MPI.COMM_SELF, bowl, run)
    assert found["evaluations"] == [0, 4, 8]
    theta, order = bowl.start.clone(), []
    optimizer, rng = torch.optim.SGD([theta], lr=LR, momentum=0.9), np.random.default_rng(run.seed)
    for k in range(8):
        order = order if len(order) else rng.permutation(run.samples)
        theta.grad, order = bowl.gradient(theta, order[:256]), order[256:]
        optimizer.step()
        if k % 4 == 3:
            close(seen[k // 4 + 1], theta.numpy())


def test_ablation_deletes_what_newton_moves_inside_the_span(rng):
    thetas, grads = rng.standard_normal((2, M, N))
    grads *= 4.0 ** -np.arange(M)[:, None]
    run = replace(RUN, lr=0.3, cutoff=0.5)
    found, _ = fn.step(thetas, grads, **replace(run, ablation=True).options)
    whole, _ = fn.step(thetas, grads, **run.options)
    expected = reference.step(thetas, grads, lr=0.3, cutoff=0.5)
    assert 0 < expected.rank < M - 1
    np.testing.assert_allclose(whole, expected.theta_new, rtol=1e-10)
    np.testing.assert_allclose(found, expected.q.theta_bar - 0.3 * expected.inverse.z_perp, rtol=1e-10)


# -- what is run --------------------------------------------------------------------------------------------


TINY = figure1.Scale((512, 2), (512, 2), 2, 1)


def test_every_setting_is_run_once_and_with_its_seeds():
    best = {f"{data} {act} {method}": 0.3 for data, act, _ in figure1.PROBLEMS for method in METHODS}
    runs = figure1.plan(TINY, best)
    assert len(set(runs)) == len(runs) == len({run.name for run in runs})
    assert {run.workers for run in runs} == {1, 2, 4, 8}
    assert {run.evaluations for run in runs} == {4}
    kinds = {(run.protocol, run.workers) for run in runs if (run.data, run.activation) == ("cifar10", "tanh")}
    assert kinds == {
        ("sgd", 1),
        *((protocol, m) for protocol in ("own", "diff") for m in (1, 2, 4, 8)),
        *((protocol, 4) for protocol in ("probe", "spread-step", "spread-gradient")),
    }
    base = replace(runs[0], protocol="own", workers=8, lr=0.3)
    changes = [{}, {"lr": 0.01}, {"ablation": True}, {"lr_cap": "sigma"}, {"cutoff": 0.9}, {"max_rank": 1}]
    for change in (*changes, {"max_rank": 0}, {"workers": 4}, {"workers": 2}):
        seeds = [run.seed for run in runs if replace(run, seed=0) == replace(base, **change)]
        assert seeds == ([0] if "workers" in change else [0, 1])


def test_beside_every_curve_stands_what_it_is_compared_with():
    rates = dict(zip(METHODS, (0.3, 0.1, 1.0, 3.0), strict=True))
    best = {f"{data} {act} {method}": rates[method] for data, act, _ in figure1.PROBLEMS for method in METHODS}
    runs = {replace(run, seed=0) for run in figure1.plan(TINY, best)}
    plain = [run for run in runs if run.protocol in figure1.APART and run.max_rank is None and run.cutoff == 0.1]
    curves = [run for run in plain if not run.ablation and run.lr_cap is None]
    for data, activation, most in figure1.PROBLEMS:
        some = {run for run in curves if (run.data, run.activation) == (data, activation)}
        kinds = {(run.protocol, run.workers, run.lr) for run in some}
        wanted = [(way, m, lr) for way in figure1.APART for m in (1, most) for lr in (rates[way], *figure1.PAPER_LRS)]
        assert kinds >= set(wanted)
    for run in curves:
        alone = replace(run, workers=1)
        sgd = [replace(alone, protocol="sgd", lr=lr) for lr in (rates["sgd"], *figure1.PAPER_LRS)]
        momentum = replace(alone, protocol="sgd", lr=rates["momentum"], momentum=0.9)
        changes = [{"ablation": True}, {"max_rank": 0}, {"lr_cap": "sigma"}] if run.workers > 1 else []
        assert runs >= {alone, *sgd, momentum, *(replace(run, **change) for change in changes)}


METHODS = ("sgd", "momentum", "own", "diff")


def leave(folder, runs, nll):
    """Files as the ranks leave them, with what the runs end at."""
    folder.mkdir(exist_ok=True)
    for run in runs:
        found = {"run": asdict(run), "command": "made up", "evaluations": [0, 2, 4], "nll": [2.3, 2.0, nll(run)]}
        found |= {"rank": 1.0, "captured": 0.1, "capped": 0.0, "seconds": 1.0}
        (folder / f"{run.name}.json").write_text(json.dumps(found))


def test_the_step_length_that_ended_lowest_is_tuned(tmp_path):
    runs = figure1.tuning(TINY)
    ends = dict(zip(figure1.GRID, (1.0, 0.5, 0.2, 0.3, None), strict=True))
    leave(tmp_path, runs, lambda run: ends[run.lr] and ends[run.lr] * (run.lr if run.momentum else 1))
    best = figure1.tuned(figure1.summary(runs, tmp_path))
    assert len(best) == 12
    assert best["mnist tanh momentum"] == 0.03
    assert {lr for key, lr in best.items() if "momentum" not in key} == {0.3}


def test_a_setting_is_summed_up_over_its_seeds(tmp_path):
    runs = [replace(RUN, seed=seed) for seed in range(3)]
    leave(tmp_path, runs, lambda run: (1.0, 2.0, None)[run.seed])
    (one,) = figure1.summary(runs, tmp_path)
    assert one["final"] == {"0": 1.0, "1": 2.0, "2": None}
    assert one["mean"] == [2.3, 2.0, 1.5]
    assert one["spread"] == [0.0, 0.0, pytest.approx(0.5**0.5, abs=1e-4)]
    assert one["seconds"] == 3


@pytest.fixture
def made_up(tmp_path, rng):
    """MNIST's file format with 512 images of noise."""
    for kind, shape in (("images-idx3", (512, 28, 28)), ("labels-idx1", (512,))):
        array = rng.integers(10, size=shape, dtype=np.uint8)
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *shape)
        (tmp_path / f"train-{kind}-ubyte").write_bytes(header + array.tobytes())
    return tmp_path


def test_ranks_train_and_only_what_is_missing_is_run_again(made_up):
    pytest.importorskip("torch")
    runs = [replace(RUN, samples=512, workers=2, seed=seed) for seed in range(2)]
    runs.append(replace(runs[0], max_rank=0, lr=1e30))
    finished = []
    figure1.execute(runs, made_up, str(made_up), "the command", lambda: finished.append(1))
    assert len(finished) == 3
    assert figure1.missing(runs, made_up) == []
    first, second, wild = (json.loads((made_up / f"{run.name}.json").read_text()) for run in runs)
    assert (first["run"], first["command"], first["evaluations"]) == (asdict(runs[0]), "the command", [0, 2, 4])
    assert first["nll"][2] < first["nll"][0] == pytest.approx(np.log(10), abs=0.2)
    assert first["nll"] != second["nll"]
    assert first["rank"] == 1 > first["captured"] > 0 == wild["rank"]
    assert wild["nll"][-1] is None or wild["nll"][-1] > 50
    (made_up / f"{runs[1].name}.json").unlink()
    assert figure1.missing(runs, made_up) == [runs[1]]


# -- what is made of it -------------------------------------------------------------------------------------


def ends(*values):
    return {"final": {str(seed): value for seed, value in enumerate(values)}}


def test_a_claim_holds_only_for_every_seed_by_a_margin_and_along_the_chain():
    assert claims.falls([ends(1.0, 2.0), ends(0.9, 1.9)])
    assert not claims.falls([ends(1.0, 2.0), ends(0.99, 1.5)])  # one seed by less than 2 %
    assert not claims.falls([ends(1.0, 1.0), ends(0.5, 1.1)])
    assert claims.falls([ends(1.0), ends(0.8), ends(0.6)])
    assert not claims.falls([ends(1.0), ends(0.5), ends(0.6)])
    assert claims.falls([ends(None), ends(1.0)])
    assert not claims.falls([ends(1.0), ends(None)])
    assert not claims.falls([ends(None), ends(None)])


def test_only_seeds_that_all_compared_have_count():
    chain = claims.common([ends(1.0, 1.0, 1.0), ends(0.95, 1.1), ends(0.9, 0.9, 2.0)])
    assert chain == [ends(1.0, 1.0), ends(0.95, 1.1), ends(0.9, 0.9)]
    assert not claims.falls(chain)  # the mean of the second is higher than the first's


def as_the_paper_says(run):
    """Ends as they would have to be for every claim."""
    if run.activation == "relu":
        return 1.0 if run.protocol == "sgd" else None
    if run.protocol == "sgd":
        return 1.5 + run.momentum / 10 - run.lr / 10
    if run.lr == figure1.GRID[-1]:
        return None
    worse = run.ablation + (run.max_rank is not None) * (4 - run.max_rank if run.max_rank else 4) / 4
    return {1: 2.0, 2: 1.9, 4: 1.1, 8: 0.9}[run.workers] + worse - 0.2 * (run.lr_cap is not None)


def as_if_nothing_mattered(run):
    return 2.3


def mixed(run):
    return as_the_paper_says(run) if run.data == "mnist" or run.activation == "relu" else 1.5


@pytest.mark.parametrize("world", [as_the_paper_says, as_if_nothing_mattered, mixed])
def test_the_command_tells_what_reproduces(world, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setitem(figure1.SCALES, "quick", TINY)
    monkeypatch.setattr(figure1, "execute", lambda runs, folder, *more: leave(folder, runs, world))
    main(["figure1", "--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "figure1.json").read_text())
    rows = claims.table(found).rows
    verdicts = {(quote, rate): verdict for quote, _, rate, verdict, *_ in rows}
    assert len(verdicts) == len(rows) == 23
    if world is as_the_paper_says:
        assert set(verdicts.values()) == {"reproduces"}
    elif world is as_if_nothing_mattered:
        assert set(verdicts.values()) == {"does not reproduce"}
    else:
        assert verdicts[("“an improvement in convergence as m increases”", "tuned")] == "in 2 of 4"
    page = (tmp_path / "figure1.md").read_text()
    assert "2.000 → 1.900 → 1.100 → 0.900" in page or world is as_if_nothing_mattered
    assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")
    assert "--full" in capsys.readouterr().out


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setitem(figure1.SCALES, "quick", TINY)
    ran = []
    (tmp_path / "figure1.png").write_bytes(b"")
    monkeypatch.setattr(plots, "figure1", lambda found, folder: "figure1.png")
    monkeypatch.setattr(
        figure1, "execute", lambda runs, folder, *more: ran.append(len(runs)) or leave(folder, runs, mixed)
    )
    for arguments in ([], ["--resume"], []):
        main(["figure1", "--quick", "--out", str(tmp_path), *arguments])
    assert ran[0] == ran[4] == 60 < ran[1] == ran[5]
    assert ran[2:4] == [0, 0]


def test_without_pytorch_the_command_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"fastnewton\[train\]"):
        main(["figure1", "--out", str(tmp_path)])


COMMITTED = Path(figure1.__file__).parent / "results" / "figure1.json"


@pytest.mark.skipif(not COMMITTED.exists(), reason="no committed run")
def test_readme_says_what_the_committed_run_found():
    readme = Path(__file__).resolve().parents[2] / "README.md"
    assert claims.table(json.loads(COMMITTED.read_text())).markdown() in readme.read_text(encoding="utf-8")
