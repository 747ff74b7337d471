"""What a step is told by its small matrices, against the vectors of length n written out."""

import dataclasses

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from problems import DTYPES, orthonormal, workers

import fastnewton as fn


def diagnosed(thetas, grads, **options):
    gram = fn.gram(grads, thetas=thetas)
    return fn.diagnostics(gram, fn.spectrum(gram, **options))


def literal(thetas, grads, cutoff=0.1):
    """(captured, asymmetry, noise to secant, curvatures) from G, Θ and an orthonormal basis of Θ's span."""
    q = reference.quantities(grads, thetas)
    j, V = q.rank(cutoff), q.V[:, : q.rank(cutoff)]
    U = q.G @ V / q.sigma[:j]
    A = V.T @ q.Theta.T @ q.G @ V
    Q, s, Wh = np.linalg.svd(q.Theta, full_matrices=False)
    r = int((s > 1e-7 * s[0]).sum())
    X, D = Q[:, :r].T @ q.G @ Wh[:r].T, np.zeros((r, r))
    for a in range(r):
        for b in range(r):
            D[a, b] = (s[a] * X[a, b] - s[b] * X[b, a]) / np.hypot(s[a], s[b])
    least = sum(D[a, b] ** 2 for a in range(r) for b in range(a))  # the least ‖E‖² with Θᵀ(G − E) symmetric
    noise = least * 2 * r / (r - 1)
    return (
        np.sum((U.T @ q.g_bar) ** 2) / (q.g_bar @ q.g_bar),
        np.linalg.norm(A - A.T) / np.linalg.norm(A + A.T),
        np.sqrt(noise / (np.linalg.norm(X) ** 2 - noise)) if np.linalg.norm(X) ** 2 > noise else np.inf,
        np.array([q.sigma[k] / np.linalg.norm(q.y(k)) for k in range(j)]),
    )


def noisy(rng, m, n, noise, condition=100.0):
    """(thetas, grads, secants, noise) of workers at random around a point of a quadratic."""
    thetas, curvatures = rng.standard_normal((m, n)), np.geomspace(1, 1 / condition, n)
    secants, errors = thetas * curvatures, noise * rng.standard_normal((m, n))
    return thetas, secants + errors, secants, errors


@given(
    m=st.integers(3, 12),
    n=st.integers(2, 60),
    noise=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    cutoff=st.sampled_from([0.01, 0.1, 0.5]),
    seed=st.integers(0, 1 << 30),
)
def test_diagnostics_are_those_of_the_vectors(m, n, noise, cutoff, seed):
    thetas, grads, *_ = noisy(np.random.default_rng(seed), m, n, noise)
    found, (captured, asymmetry, ratio, curvatures) = (
        diagnosed(thetas, grads, cutoff=cutoff),
        literal(thetas, grads, cutoff),
    )
    # Products of float64: K squares σ_k/σ_1 ≥ 0.01, and Θ's condition, 1e3 here at most, enters squared.
    assert found.captured == pytest.approx(captured, rel=1e-8, abs=1e-10)
    if len(curvatures) > 1:
        assert found.asymmetry == pytest.approx(asymmetry, rel=1e-7, abs=1e-9)
    # Within 1e-6 of all noise the ratio is the rounding of a difference.
    if ratio < 1e3:
        assert found.noise_to_secant == pytest.approx(ratio, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(found.curvatures, curvatures, rtol=1e-8)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_noise_is_measured_within_the_span(rng, noise):
    thetas, grads, secants, errors = noisy(rng, 40, 400, noise)
    Q, _ = np.linalg.qr((thetas - thetas.mean(0)).T[:, :-1])
    inside = [np.linalg.norm((each - each.mean(0)) @ Q) for each in (errors, secants)]
    # 39·38/2 squares are summed up: 4 % of their sum is its standard deviation, 2 % that of the root.
    assert diagnosed(thetas, grads).noise_to_secant == pytest.approx(inside[0] / inside[1], rel=0.1)


def test_without_noise_a_quadratic_is_symmetric_and_shows_its_curvature(rng):
    found = diagnosed(*noisy(rng, 12, 50, 0.0)[:2])
    assert found.asymmetry < 1e-12
    assert found.noise_to_secant < 1e-12
    assert (found.curvatures <= 1 + 1e-12).all()
    assert (found.curvatures >= 0.01).all()


def test_a_local_step_on_batches_of_their_own_reads_back_its_length(rng):
    """θ_k = θ − lr·(ḡ + noise), and then a gradient with as much noise, whatever the curvature."""
    local_lr, n, m = 0.05, 2000, 8
    first, second = rng.standard_normal((2, m, n))
    thetas = -local_lr * first
    found = diagnosed(thetas, second + 0.1 * thetas)
    np.testing.assert_allclose(found.curvatures, 1 / local_lr, rtol=0.15)  # √(2/n) and √(m/n), 6 %, from chance
    assert found.asymmetry > 0.5
    assert found.noise_to_secant > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype(rng, dtype):
    thetas, grads = workers(rng, 6, 3001, DTYPES[dtype])
    found, (captured, _, _, curvatures) = diagnosed(thetas, grads), literal(thetas, grads)
    assert found.captured == pytest.approx(captured, rel=1e-4)  # K in float32
    np.testing.assert_allclose(found.curvatures, curvatures, rtol=1e-4)


def test_on_a_device_they_are_the_same(rng):
    from cudasim import build, checks

    if reason := build.why_unavailable():
        pytest.skip(reason)
    thetas, grads, *_ = noisy(rng, 6, 300, 0.1)
    here = dataclasses.astuple(diagnosed(thetas, grads))
    with checks.simulated_device():
        import cupy

        there = dataclasses.astuple(diagnosed(cupy.asarray(thetas), cupy.asarray(grads)))
    assert isinstance(there[-1], np.ndarray)
    np.testing.assert_allclose(np.hstack(there), np.hstack(here), rtol=1e-9)  # sums in another order


def test_what_cannot_be_known_is_nan(rng):
    two = diagnosed(*rng.standard_normal((2, 2, 30)))
    assert np.isnan([two.asymmetry, two.noise_to_secant]).all()
    assert np.isfinite(two.curvatures).all()
    assert two.curvatures.shape == (1,)
    still = diagnosed(np.ones((3, 5)), rng.standard_normal((3, 5)))
    assert np.isinf(still.curvatures).all()
    assert np.isnan([still.asymmetry, still.noise_to_secant]).all()
    alike = diagnosed(rng.standard_normal((3, 5)), np.ones((3, 5)))
    assert (alike.captured, alike.curvatures.size) == (0.0, 0)
    lost = diagnosed(rng.standard_normal((3, 5)), np.full((3, 5), np.nan))
    assert np.isnan([lost.asymmetry, lost.noise_to_secant]).all()


def test_an_orthogonal_change_of_coordinates_changes_nothing(rng):
    thetas, grads, *_ = noisy(rng, 9, 40, 0.1)
    Q = orthonormal(rng, 40, 40)
    one, other = (dataclasses.astuple(diagnosed(*pair)) for pair in ((thetas, grads), (thetas @ Q, grads @ Q)))
    np.testing.assert_allclose(np.hstack(other), np.hstack(one), rtol=1e-9)


def test_bad_input_is_named(rng):
    thetas, grads = rng.standard_normal((2, 4, 20))
    gram = fn.gram(grads, thetas=thetas)
    spectrum = fn.spectrum(gram)
    for wrong in (None, gram.matrix, spectrum, "gram"):
        with pytest.raises(TypeError, match="gram must be a Gram"):
            fn.diagnostics(wrong, spectrum)
    with pytest.raises(TypeError, match="spectrum must be a Spectrum"):
        fn.diagnostics(gram, gram)
    with pytest.raises(ValueError, match="thetas=thetas"):
        fn.diagnostics(fn.gram(grads), spectrum)
    with pytest.raises(ValueError, match="3 workers"):
        fn.diagnostics(gram, fn.spectrum(fn.gram(grads[:3])))
    with pytest.raises(ValueError, match=r"gram\.theta_matrix"):
        fn.diagnostics(dataclasses.replace(gram, theta_matrix=np.eye(3)), spectrum)
    with pytest.raises(TypeError, match=r"gram\.cross_matrix"):
        fn.diagnostics(dataclasses.replace(gram, cross_matrix=np.eye(4, dtype=np.float32)), spectrum)


@pytest.mark.parametrize("curvature", ["drop", "keep"])
def test_a_guarded_step_tells_its_diagnostics(rng, curvature):
    thetas, grads, *_ = noisy(rng, 6, 40, 1.0)
    _, info = fn.step(thetas, grads, lr=1.0, safeguards=fn.Safeguards(curvature=curvature))
    found = dataclasses.astuple(info.diagnostics)
    for told, wanted in zip(found, dataclasses.astuple(diagnosed(thetas, grads)), strict=True):
        np.testing.assert_allclose(told, wanted, rtol=1e-9)  # K is formed in another order, in float64
    assert fn.step(thetas, grads, lr=1.0)[1].diagnostics is None
