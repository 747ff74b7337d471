"""The parameter server in one process; over MPI it is checked by mpi_server_checks.py."""

import threading
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from problems import DTYPES

import fastnewton as fn
from fastnewton import server
from fastnewton.server import ParameterServer


def contents(state):
    return {name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in state.items()}


def write_all(target, thetas, grads):
    return [target.write(k, thetas[k], grads[k]) for k in range(len(thetas))]


def random_rows(rng, m, n, dtype=np.float64):
    return rng.standard_normal((2, m, n)).astype(dtype)


# -- synchronous --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_has_the_bits_of_a_step(rng, dtype):
    thetas, grads = random_rows(rng, 3, 1501, DTYPES[dtype])
    target = ParameterServer(thetas[0], 3, lr=0.5, lr_cap="curvature")
    assert write_all(target, thetas, grads) == [0, 0, 1]
    theta, version = target.read()
    wanted, info = fn.step(thetas, grads, lr=0.5, lr_cap="curvature")
    assert version == 1
    assert theta.tobytes() == wanted.tobytes()
    assert target.info.record.tobytes() == info.record.tobytes()


def test_before_the_first_write_there_is_theta0(rng):
    theta0 = rng.standard_normal(5)
    target = ParameterServer(theta0, 2, "async", lr=1.0)
    theta, version = target.read()
    kept, theta0[:] = theta0.copy(), 0
    assert version == target.version == 0
    assert target.info is None
    np.testing.assert_array_equal(theta, kept)


def test_a_read_waits_for_a_newer_version(rng):
    thetas, grads = random_rows(rng, 2, 7)
    target = ParameterServer(thetas[0], 2, lr=0.5)
    found = []
    reader = threading.Thread(target=lambda: found.append(target.read(after=0)))
    reader.start()
    target.write(1, thetas[1], grads[1])
    reader.join(0.2)
    assert reader.is_alive()
    target.write(0, thetas[0], grads[0])
    reader.join(60)
    assert not reader.is_alive()
    np.testing.assert_array_equal(found[0][0], fn.step(thetas, grads, lr=0.5)[0])
    assert found[0][1] == 1


def test_a_worker_writes_once_in_a_round(rng):
    thetas, grads = random_rows(rng, 2, 7)
    target = ParameterServer(thetas[0], 2, lr=0.5)
    target.write(1, thetas[1], grads[1])
    before = contents(target.state_dict())
    with pytest.raises(ValueError, match="worker 1 must not write twice in a round"):
        target.write(1, thetas[0], grads[0])
    assert contents(target.state_dict()) == before
    target.write(0, thetas[0], grads[0])
    assert target.write(1, thetas[1], grads[1]) == 1


@pytest.mark.parametrize("mode", server.MODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_write_that_is_not_finite_changes_nothing(rng, mode, bad, which):
    thetas, grads = random_rows(rng, 3, 1100)
    target = ParameterServer(thetas[0], 3, mode, lr=0.5)
    write_all(target, thetas[:2], grads[:2])
    before = contents(target.state_dict())
    given = [thetas[2].copy(), grads[2].copy()]
    given[which][77] = bad
    with pytest.raises(fn.NonFiniteError) as caught:
        target.write(2, *given)
    assert caught.value.workers == (2,)
    assert contents(target.state_dict()) == before
    assert target.write(2, thetas[2], grads[2]) == (1 if mode == "sync" else 3)


@pytest.mark.parametrize("mode", server.MODES)
def test_an_update_that_overflows_changes_nothing(rng, mode):
    thetas, grads = random_rows(rng, 2, 9)
    target = ParameterServer(thetas[0], 2, mode, lr=0.5)
    target.write(0, thetas[0], grads[0])
    before = contents(target.state_dict())
    with pytest.raises(fn.NonFiniteError, match="overflow"):
        target.write(1, thetas[1], grads[1] * 1e300)
    assert contents(target.state_dict()) == before
    assert target.write(1, thetas[1], grads[1]) == before["version"] + 1


@pytest.mark.parametrize(
    "options",
    [{"nonfinite": "drop", "precision": "float64"}, {"nonfinite": "drop", "safeguards": fn.Safeguards()}],
)
def test_a_worker_that_is_not_finite_is_dropped(rng, options):
    thetas, grads = random_rows(rng, 3, 1100)
    grads[1, 77] = np.nan
    target = ParameterServer(thetas[0], 3, lr=0.5, **options)
    assert write_all(target, thetas, grads) == [0, 0, 1]
    wanted, info = fn.step(thetas, grads, lr=0.5, **options)
    assert target.read()[0].tobytes() == wanted.tobytes()
    assert target.info.record.tobytes() == info.record.tobytes()
    assert target.info.dropped == (1,)
    again = ParameterServer(thetas[0], 3, lr=0.5, **options)
    again.load_state_dict(target.state_dict())
    assert again.info.dropped == (1,)


def test_a_round_without_a_finite_worker_is_an_error_and_changes_nothing(rng):
    thetas, grads = random_rows(rng, 2, 30)
    target = ParameterServer(thetas[0], 2, lr=0.5, nonfinite="drop")
    target.write(1, thetas[1], grads[1] * np.nan)
    before = contents(target.state_dict())
    with pytest.raises(fn.NonFiniteError) as caught:
        target.write(0, thetas[0], grads[0] * np.inf)
    assert caught.value.workers == (0, 1)
    assert contents(target.state_dict()) == before
    assert target.write(0, thetas[0], grads[0]) == 1


def test_nan_propagates(rng):
    thetas, grads = random_rows(rng, 2, 30)
    thetas[1, 5] = np.nan
    target = ParameterServer(thetas[0], 2, lr=0.5, nonfinite="propagate")
    assert write_all(target, thetas, grads) == [0, 1]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(target.read()[0])), [5])


def test_safeguards_decide_as_in_a_step_and_reasons_are_counted(rng):
    target = ParameterServer(np.zeros(60), 3, lr=0.5, safeguards=(guards := fn.Safeguards(max_coefficient=1e-9)))
    for _ in range(2):
        thetas, grads = random_rows(rng, 3, 60)
        write_all(target, thetas, thetas + grads / 100)
        wanted, info = fn.step(thetas, thetas + grads / 100, lr=0.5, safeguards=guards)
        assert target.read()[0].tobytes() == wanted.tobytes()
        assert target.info.reason == info.reason == "coefficient"
    assert target.counts == {"coefficient": 2}


# -- asynchronous -------------------------------------------------------------------------------------------


def test_no_direction_is_averaged_sgd(rng):
    thetas, grads = random_rows(rng, 4, 50)
    target = ParameterServer(thetas[0], 4, "async", lr=0.5, max_rank=0)
    write_all(target, thetas, grads)
    np.testing.assert_allclose(target.read()[0], thetas.mean(0) - 0.5 * grads.mean(0), atol=1e-14)


def test_a_single_worker_takes_plain_gradient_steps(rng):
    target = ParameterServer(np.zeros(11), 3, "async", lr=0.25)
    for version in range(1, 4):
        theta, grad = rng.standard_normal((2, 11))
        assert target.write(2, theta, grad) == version
        np.testing.assert_allclose(target.read()[0], theta - 0.25 * grad, rtol=1e-15, atol=1e-15)
    assert target.info.rank == 0


@pytest.mark.parametrize(("dtype", "m"), [*((name, 3) for name in DTYPES), ("float32", 8), ("float64", 17)])
def test_every_write_has_the_bits_of_a_step_of_the_rows_so_far(rng, dtype, m):
    thetas, grads = random_rows(rng, m, 1300, DTYPES[dtype])
    options = {"lr": 0.5, "cutoff": 0.3, "lr_cap": "sigma", "lr_rest": 0.25, "max_rank": 5, "precision": "float64"}
    target, written = ParameterServer(thetas[0], m, "async", **options), set()
    for k in [*range(m), *rng.integers(m, size=m)]:
        thetas[k], grads[k] = random_rows(rng, 1, 1300, DTYPES[dtype])[:, 0]
        target.write(int(k), thetas[k], grads[k])
        present = sorted(written := written | {int(k)})
        wanted, info = fn.step(thetas[present], grads[present], **options)
        assert target.read()[0].tobytes() == wanted.tobytes()
        assert target.info.record.tobytes() == info.record.tobytes()


def test_a_stale_worker_is_left_out_until_it_writes(rng):
    thetas, grads = random_rows(rng, 3, 80)
    target = ParameterServer(thetas[0], 3, "async", lr=0.5, max_staleness=2)
    write_all(target, thetas, grads)
    for k, present in ((0, [0, 1, 2]), (1, [0, 1, 2]), (0, [0, 1]), (1, [0, 1]), (2, [0, 1, 2])):
        thetas[k], grads[k] = rng.standard_normal((2, 80))
        target.write(k, thetas[k], grads[k])
        assert target.info.coefficients.size == len(present)
        np.testing.assert_array_equal(target.read()[0], fn.step(thetas[present], grads[present], lr=0.5)[0])


# -- restart and threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", server.MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_server_goes_on_with_the_same_bits(rng, mode, dtype):
    thetas, grads = random_rows(rng, 3, 1030, DTYPES[dtype])
    first = ParameterServer(thetas[0], 3, mode, lr=0.5)
    write_all(first, thetas, grads)
    first.write(1, thetas[1], grads[0])  # in the middle of a round
    state = first.state_dict()
    second = ParameterServer(thetas[1], 3, mode, lr=0.5)
    with mock.patch.object(server, "take_step") as take_step:
        second.load_state_dict(state)
    assert take_step.call_count == 0
    for k in (2, 0):
        for each in (first, second):
            each.write(k, thetas[2 - k], grads[k])
    assert contents(second.state_dict()) == contents(first.state_dict())
    assert second.info.record.tobytes() == first.info.record.tobytes()


@pytest.mark.parametrize("mode", server.MODES)
def test_a_state_of_another_kind_changes_nothing(rng, mode):
    thetas, grads = random_rows(rng, 3, 20)
    target, other = (ParameterServer(thetas[0], 3, kind, lr=0.5) for kind in (mode, server.MODES[mode == "sync"]))
    write_all(target, thetas, grads)
    before = contents(target.state_dict())
    good = target.state_dict()
    short = ParameterServer(thetas[0, :19], 3, mode, lr=0.5).state_dict()
    single = ParameterServer(thetas[0].astype(np.float32), 3, mode, lr=0.5).state_dict()
    for bad in (other.state_dict(), short, single, {}, good | {"grads": [1]}, good | {"mode": "other"}):
        with pytest.raises(ValueError, match="state"):
            target.load_state_dict(bad)
        assert contents(target.state_dict()) == before


@pytest.mark.parametrize("mode", server.MODES)
def test_threads_may_write_and_read_at_once(mode):
    m, rounds, n = 4, 30, 2000
    target = ParameterServer(np.zeros(n), m, mode, lr=0.5)
    torn = []

    def work(k):
        version = 0
        for _ in range(rounds):
            theta = np.full(n, float(k))  # all coordinates alike, so that a torn parameter vector shows
            target.write(k, theta, theta + 1)
            found, version = target.read(after=version if mode == "sync" else None)
            torn.append(np.ptp(found))

    workers = [threading.Thread(target=work, args=(k,)) for k in range(m)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert target.version == (rounds if mode == "sync" else rounds * m)
    assert len(torn) == m * rounds
    assert max(torn) == 0


# -- libraries and bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", server.MODES)
def test_tensors_come_back_as_tensors(mode):
    torch = pytest.importorskip("torch")
    rows = torch.randn(2, 3, 40, dtype=torch.bfloat16)
    target = ParameterServer(rows[0, 0], 3, mode, lr=0.5)
    write_all(target, *rows)
    theta, _ = target.read()
    assert isinstance(theta, torch.Tensor)
    wanted = fn.step(rows[0], rows[1], lr=0.5)[0]
    # One unit in the last place of bfloat16, of the largest.
    assert (theta.float() - wanted.float()).abs().max() <= 2.0**-7 * wanted.float().abs().max()


@pytest.mark.parametrize(
    ("arguments", "kind", "name"),
    [
        ({"theta0": [1.0, 2.0]}, TypeError, "theta0"),
        ({"theta0": np.zeros((2, 2))}, ValueError, "theta0"),
        ({"theta0": np.zeros(3, int)}, TypeError, "theta0"),
        ({"workers": 0}, ValueError, "workers"),
        ({"workers": None}, ValueError, "workers"),
        ({"workers": 1025}, ValueError, "workers"),
        ({"workers": 2.0}, TypeError, "workers"),
        ({"mode": "both"}, ValueError, "mode"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": "1"}, TypeError, "lr"),
        ({"cutoff": 1.0}, ValueError, "cutoff"),
        ({"max_rank": -1}, ValueError, "max_rank"),
        ({"lr_rest": np.nan}, ValueError, "lr_rest"),
        ({"lr_cap": "tau"}, ValueError, "lr_cap"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite"),
        ({"precision": "float32"}, ValueError, "precision"),
        ({"safeguards": True}, TypeError, "safeguards"),
        ({"mode": "async", "lr_cap": "curvature"}, ValueError, "mode='async'.* lr_cap None or 'sigma'"),
        ({"mode": "async", "safeguards": fn.Safeguards()}, ValueError, "mode='async' safeguards must be None"),
        ({"mode": "async", "nonfinite": "drop"}, ValueError, "mode='async'.* nonfinite 'raise'"),
        ({"max_staleness": 3}, ValueError, "max_staleness"),
        ({"mode": "async", "max_staleness": -3}, ValueError, "max_staleness"),
    ],
)
def test_bad_arguments_are_named(arguments, kind, name):
    with pytest.raises(kind, match=name):
        ParameterServer(**{"theta0": np.zeros(3), "workers": 2, "lr": 1.0} | arguments)


@pytest.mark.parametrize("mode", server.MODES)
def test_bad_writes_and_reads_change_nothing(mode):
    target = ParameterServer(np.zeros(3), 2, mode, lr=1.0)
    good, before = np.ones(3), contents(target.state_dict())
    for bad, kind, name in (
        ((2, good, good), ValueError, "worker"),
        ((None, good, good), ValueError, "worker"),
        (("0", good, good), TypeError, "worker"),
        ((0, good[:2], good), ValueError, "theta"),
        ((0, good, good.astype(np.float32)), TypeError, "grad"),
        ((0, good, None), TypeError, "grad"),
    ):
        with pytest.raises(kind, match=name):
            target.write(*bad)
    with pytest.raises(TypeError, match="after"):
        target.read(after=0.5)
    assert contents(target.state_dict()) == before


def test_bfloat16_of_numpy_comes_back_as_such():
    target = ParameterServer(np.zeros(4, ml_dtypes.bfloat16), 1, lr=1.0)
    target.write(0, np.ones(4, ml_dtypes.bfloat16), np.full(4, 0.5, ml_dtypes.bfloat16))
    theta, _ = target.read()
    assert theta.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(theta.astype(np.float32), 0.5)
