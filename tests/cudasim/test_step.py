"""The CUDA kernels, run on the CPU through the launches of a GPU, against the reference."""

import numpy as np
import pytest
import reference
import tolerances
from problems import DTYPES, ill_conditioned, workers

import fastnewton as fn
from fastnewton.kernels.cuda import spectrum as spectrum_kernel
from fastnewton.kernels.record import NOT_CONVERGED, STATUS

from . import device
from .checks import assert_step, distance, there
from .module import schedule
from .sanitized import assert_clean, run_sanitized

PLAIN = {"float32": [1, 2, 3, 8, 17, 33, 64], "float64": [8], "float16": [8], "bfloat16": [8]}
EVERY_M = [*range(1, 18), 31, 32, 33, 64]
DTYPE_AND_M = [
    pytest.param(dtype, m, marks=() if m in PLAIN[dtype] else pytest.mark.full) for dtype in DTYPES for m in EVERY_M
]
LENGTHS = [0, 1, 5, 2003]  # none, one, fewer than threads, more than the blocks take at once
SANITIZED = [
    pytest.param(kind, dtype, m, marks=() if (dtype, m) in plain else pytest.mark.full)
    for kind, plain in (("address", [("float32", 8)]), ("thread", [("float32", 3)]))
    for dtype, m in [*(("float32", m) for m in (1, 3, 13, 33, 64)), *((dtype, 8) for dtype in DTYPES)]
]

pytestmark = pytest.mark.usefixtures("cupy")


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("dtype", "m"), DTYPE_AND_M)
def test_step_is_the_papers(rng, dtype, m, n):
    if n == 0:
        nothing = there(np.zeros((m, 0), DTYPES[dtype]))
        theta, info = fn.step(nothing, nothing, lr=1.0)
        assert (theta.shape, info.rank, info.captured) == ((0,), 0, 0)
        return
    assert_step(*workers(rng, m, n, DTYPES[dtype]), lr=0.7, lr_rest=0.3)


@pytest.mark.full
@pytest.mark.parametrize(("order", "seed"), [("descending", 0), ("random", 1), ("random", 2)])
@pytest.mark.parametrize("m", EVERY_M)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_order_of_threads_changes_the_bits(rng, dtype, m, order, seed):
    thetas, grads = workers(rng, m, 2003, DTYPES[dtype])
    usual, _ = assert_step(thetas, grads, lr=0.7, lr_cap="curvature")
    with schedule(order, seed):
        found, _ = assert_step(thetas, grads, lr=0.7, lr_cap="curvature")
    assert (found.host == usual.host).all()


@pytest.mark.parametrize(("kind", "dtype", "m"), SANITIZED)
def test_every_kernel_is_clean(kind, dtype, m):
    assert_clean(run_sanitized(kind, "cudasim.checks:every_kernel", m, dtype, timeout=600))


# -- layout -------------------------------------------------------------------------------------------------


def separate(host):
    """Vectors of their own, no two of one alignment."""
    return [there(row, past=k % 4) for k, row in enumerate(host)]


LAYOUTS = {
    "all rows alike mod 16": lambda host: there(host, past=1, apart=-len(host[0]) % 16),
    "strided by an odd number": lambda host: there(host, apart=1 + len(host[0]) % 2),
    "separate vectors": separate,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "m"),
    [("float32", 3), ("float16", 8), *(pytest.param("float32", m, marks=pytest.mark.full) for m in (2, 8, 17, 64))],
)
def test_layout_does_not_change_the_bits(rng, dtype, m, layout):
    thetas, grads = workers(rng, m, 2003, DTYPES[dtype])
    usual, _ = assert_step(thetas, grads, lr=0.7)
    found, _ = assert_step(thetas, grads, lr=0.7, placed=LAYOUTS[layout])
    assert (found.host == usual.host).all()


@pytest.mark.parametrize(
    ("m", "n", "multiprocessors"),
    [
        (3, 150_000, 3),
        (17, 60_000, 3),
        (3, 25_000, 40),
        pytest.param(65, 70_000, 3, marks=pytest.mark.full),
    ],
    ids=["runs that are flushed", "tiles that are flushed", "more blocks than lanes", "several chunks for a BLAS"],
)
def test_long_vectors(rng, monkeypatch, m, n, multiprocessors):
    monkeypatch.setattr(device.Device, "multiprocessors", multiprocessors)
    assert_step(*workers(rng, m, n, np.float32), lr=0.7)


def test_out_of_another_alignment(rng):
    thetas, grads = workers(rng, 3, 1001, np.float32)
    out = there(np.zeros(1001, np.float32), past=3)
    usual, _ = assert_step(thetas, grads, lr=0.7)
    theta, _ = fn.step(there(thetas), there(grads), lr=0.7, out=out)
    assert theta is out
    assert (theta.host == usual.host).all()


def test_more_workers_than_the_kernels_take(rng):
    assert_step(*workers(rng, 65, 700, np.float32), lr=0.7, lr_cap="curvature")
    assert_step(*workers(rng, 65, 701, np.float32), lr=0.7, placed=separate)


# -- what the step is made of -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "m"), [("float32", 3), ("float32", 17), ("float64", 8), ("float64", 65)])
def test_step_is_gram_spectrum_combine(rng, dtype, m):
    thetas, grads = map(there, workers(rng, m, 1001, DTYPES[dtype]))
    gram = fn.gram(grads)
    found = fn.spectrum(gram)
    theta, info = fn.step(thetas, grads, lr=0.7)
    assert (info.coefficients == found.coefficients.host).all()
    assert (info.singular_values == found.singular_values.host).all()
    for coefficients in (found.coefficients, found.coefficients.get()):
        assert (fn.combine(thetas, grads, coefficients, lr=0.7).host == theta.host).all()
    V, K = found.vectors.host, gram.matrix.host
    largest = found.singular_values.host[0] ** 2
    # Jacobi in float64 ends with rotations below eps, of which each vector has seen fewer than a hundred.
    assert np.abs(V.T @ V - np.eye(m)).max() < 1e-13
    assert np.abs(K @ V - V * found.singular_values.host**2).max() < 1e-13 * largest


@pytest.mark.parametrize(("dtype", "m"), [("float32", 3), ("float64", 8), ("float32", 17), ("float32", 65)])
def test_any_vector(rng, dtype, m):
    thetas, grads = workers(rng, m, 1001, DTYPES[dtype])
    z = rng.standard_normal(1001).astype(dtype)
    expected = reference.apply_inverse(thetas, grads, z)
    found = fn.apply_inverse(there(thetas), there(grads), there(z, past=1))
    assert distance(found, expected.d) <= tolerances.of_inverse(expected, DTYPES[dtype], tolerances.computed_in(dtype))


@pytest.mark.parametrize("m", [2, 8, 17, 48, 49])
def test_gram_reads_both_arrays(rng, m):
    thetas, grads = workers(rng, m, 1001, np.float32)
    z = rng.standard_normal(1001).astype(np.float32)
    alone = fn.gram(there(grads), there(z))
    gram = fn.gram(there(grads), there(z), thetas=there(thetas))
    q = reference.quantities(grads, thetas)
    assert (gram.matrix.host == alone.matrix.host).all()
    assert (gram.projection.host == alone.projection.host).all()
    wanted = {
        "theta_matrix": q.Theta.T @ q.Theta,
        "cross_matrix": q.Theta.T @ q.G,
        "cross_projection": q.Theta.T @ q.g_bar,
    }
    for name, matrix in wanted.items():  # in float64: a thousand roundings of numbers below the norms
        scale = np.linalg.norm(q.Theta) * max(np.linalg.norm(array) for array in (q.Theta, q.G, q.g_bar))
        assert np.abs(getattr(gram, name).host - matrix).max() <= 1e-13 * scale
    eps = 2.0**-23  # the floors are norms of means, computed in float32
    assert gram.floor.item() == pytest.approx(2 * eps * np.linalg.norm(q.g_bar), rel=1e-6)
    assert gram.theta_floor.item() == pytest.approx(2 * eps * np.linalg.norm(q.theta_bar), rel=1e-6)
    assert gram.norm2.item() == pytest.approx(z @ z.astype(np.float64), rel=1e-6)


@pytest.mark.parametrize("lr_cap", ["sigma", "curvature"])
@pytest.mark.parametrize("m", [3, 8, 17])
def test_caps_on_the_step_length(rng, m, lr_cap):
    thetas, grads = ill_conditioned(rng, m, 1001, np.geomspace(1, 0.2, m - 1), scale=3.0)
    _, info = assert_step(thetas, grads, lr=50.0, lr_cap=lr_cap)
    assert info.lr == pytest.approx(reference.step(thetas, grads, lr=50.0, lr_cap=lr_cap).lr, rel=1e-10)
    assert info.lr < 50


SAFEGUARDS = {
    "accepted": {"curvature": "keep"},
    "dropped": {"curvature": "drop"},
    "reversed": {"curvature": "abs"},
    "newton_norm": {"curvature": "abs", "max_newton_norm": 0.05},
    "coefficient": {"max_coefficient": 1e-3},
    "cosine": {"min_cosine": 0.999},
}


@pytest.mark.parametrize("guards", SAFEGUARDS)
@pytest.mark.parametrize(("dtype", "m"), [("float32", 3), ("float16", 8), ("float64", 17), ("float32", 49)])
def test_safeguards_decide_as_on_the_cpu(rng, dtype, m, guards):
    thetas = rng.standard_normal((m, 700))
    grads = thetas * rng.choice([-1.0, 1.0, 2.0], 700)  # an indefinite Hessian
    thetas, grads = (given.astype(DTYPES[dtype]) for given in (thetas, grads))
    guards = fn.Safeguards(**({"min_cosine": None} | SAFEGUARDS[guards]))
    options = {"lr": 0.7, "lr_rest": 0.3, "safeguards": guards}
    theta, info = fn.step(there(thetas), there(grads), **options)
    expected, wanted = fn.step(thetas, grads, **options)
    assert (info.reason, info.rank) == (wanted.reason, wanted.rank)
    np.testing.assert_allclose(info.coefficients, wanted.coefficients, rtol=0, atol=1e-12)
    assert (info.lr, info.lr_rest) == pytest.approx((wanted.lr, wanted.lr_rest), rel=1e-12)
    # Decided in float64 on both sides; `combine` then adds 2m terms in other orders, and stores.
    off = np.abs(theta.host.astype(np.float64) - expected.astype(np.float64)).max()
    assert off <= (8 + 2 * m) * reference.eps_of(expected.dtype) * np.abs(thetas).max()


def test_safeguards_fall_back_from_what_is_not_finite(rng):
    thetas, grads = rng.standard_normal((2, 4, 300))
    for second, lr in ((1e200 * (-1.0) ** np.arange(4)[:, None] * (1 + abs(grads)), 1.0), (grads, 1.5e308)):
        guards = fn.Safeguards(fallback_lr=1e-200)
        theta, info = fn.step(there(thetas), there(second), lr=lr, safeguards=guards)
        assert info.reason == "nonfinite"
        assert distance(theta, reference.averaged_sgd(thetas, second, 1e-200)) <= 1e-12
    grads[2, 7] = np.nan
    with pytest.raises(fn.NonFiniteError, match="worker 2"):
        fn.step(there(thetas), there(grads), lr=0.5, safeguards=fn.Safeguards())


@pytest.mark.parametrize("max_rank", [0, 1, 3])
def test_max_rank(rng, max_rank):
    _, info = assert_step(*ill_conditioned(rng, 8, 1001, np.geomspace(1, 0.25, 7)), lr=0.5, max_rank=max_rank)
    assert info.rank == max_rank


# -- data that is hard --------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [3, 8, 17])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_singular_values(rng, dtype, m):
    least = {"float32": 1e-3, "float64": 1e-6}[dtype]
    sigmas = np.append(np.geomspace(1, 2.5 * least, m - 2), least / 2.5)
    problem = ill_conditioned(rng, m, 4099, sigmas, 1.0, DTYPES[dtype])
    _, info = assert_step(*problem, lr=1.0, cutoff=least)
    assert info.rank == m - 2


@pytest.mark.parametrize("m", [2, 3, 8, 17])
def test_equal_gradients_are_averaged_sgd(rng, m):
    thetas = rng.standard_normal((m, 1001)).astype(np.float32)
    grads = np.tile(rng.standard_normal(1001).astype(np.float32), (m, 1))
    theta, info = fn.step(there(thetas), there(grads), lr=0.5)
    assert info.rank == 0
    expected = reference.averaged_sgd(thetas, grads, 0.5)
    assert np.abs(theta.host - expected).max() <= 4 * 2.0**-23 * np.abs(expected).max()


def test_twins_are_left_out(rng):
    thetas, grads = workers(rng, 4, 1001)
    once, info = assert_step(thetas, grads, lr=0.5)
    twice, twin_info = fn.step(there(np.tile(thetas, (2, 1))), there(np.tile(grads, (2, 1))), lr=0.5)
    assert twin_info.rank == info.rank
    np.testing.assert_allclose(twice.host, once.host, rtol=0, atol=1e-12)


def test_products_that_overflow_are_formed_again(rng):
    thetas, grads = workers(rng, 3, 1001, np.float32)
    theta, info = fn.step(there(thetas), there(grads * np.float32(1e25)), lr=1e-25)
    expected = reference.step(thetas, grads * np.float32(1e25), lr=1e-25)
    assert info.rank == expected.rank
    assert distance(theta, expected.theta_new) <= 1e-5 * np.linalg.norm(expected.theta_new)
    with pytest.raises(fn.NonFiniteError, match="overflow"):
        fn.step(there(thetas), there(grads * np.float32(1e35)), lr=1e30)


def test_workers_that_are_not_finite(rng):
    thetas, grads = workers(rng, 4, 1001, np.float32)
    healthy, _ = fn.step(there(thetas[[0, 1, 3]]), there(grads[[0, 1, 3]]), lr=0.5)
    for array, value in ((grads, np.nan), (thetas, np.inf)):
        kept, array[2, 700] = array[2, 700], value
        out = there(np.full(1001, 7, np.float32))
        with pytest.raises(fn.NonFiniteError) as raised:
            fn.step(there(thetas), there(grads), lr=0.5, out=out)
        assert raised.value.workers == (2,)
        assert array is thetas or (out.host == 7).all()
        found, info = fn.step(there(thetas), there(grads), lr=0.5, nonfinite="drop")
        assert info.dropped == (2,)
        assert (found.host == healthy.host).all()
        found, _ = fn.step(there(thetas), there(grads), lr=0.5, nonfinite="propagate")
        assert not np.isfinite(found.host[700])
        array[2, 700] = kept
    grads[:] = np.nan
    with pytest.raises(fn.NonFiniteError, match="0, 1, 2, 3"):
        fn.step(there(thetas), there(grads), lr=0.5, nonfinite="drop")
    found = fn.spectrum(fn.gram(there(grads)))
    assert found.rank == 0
    assert np.isnan(found.coefficients.host).all()


def test_what_does_not_converge_is_decided_by_the_host(rng, monkeypatch):
    thetas, grads = workers(rng, 8, 1001)
    usual, _ = assert_step(thetas, grads, lr=0.7)
    really = spectrum_kernel.spectrum

    def unconverged(gram, lr, options, record, vectors=None):
        really(gram, lr, options, record, vectors)
        record.host[:] = np.nan
        record.host[STATUS] = NOT_CONVERGED

    monkeypatch.setattr(spectrum_kernel, "spectrum", unconverged)
    found, _ = assert_step(thetas, grads, lr=0.7)
    np.testing.assert_allclose(found.host, usual.host, rtol=0, atol=1e-12)
    assert fn.spectrum(fn.gram(there(grads))).rank == reference.step(thetas, grads, lr=0.7).rank
