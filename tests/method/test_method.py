"""What the method promises, whatever computes it: oracles, invariances, quadratics, convergence, options."""

import dataclasses

import numpy as np
import pytest
import reference
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from problems import DTYPES, Logistic, Quadratic, ill_conditioned, orthonormal, workers
from scipy.optimize._nonlin import Anderson

import fastnewton as fn
from fastnewton import arrays

SOME_M = [2, 3, 5, 8, 13]


def bits(array):
    return np.ascontiguousarray(array).tobytes()


# -- oracles -------------------------------------------------------------------------------------------------


def reference_step(thetas, grads, **options):
    return reference.step(thetas, grads, **options).theta_new


def package_step(thetas, grads, **options):
    return fn.step(thetas, grads, **options)[0]


def anderson_step(thetas, grads, left_out):
    """θ̄ − Anderson's d, from all centred columns but one, which the others determine."""
    q = reference.quantities(grads, thetas)
    jacobian = Anderson(alpha=-1, w0=0, M=len(thetas) - 1)
    for k in range(len(thetas)):
        if k != left_out:
            jacobian._update(None, q.g_bar, q.Theta[:, k], q.G[:, k], None, None)
    return q.theta_bar - jacobian.solve(q.g_bar)


@pytest.mark.parametrize("step", [reference_step, package_step])
@pytest.mark.parametrize("m", SOME_M)
def test_step_is_scipys_anderson(rng, step, m):
    thetas, grads = ill_conditioned(rng, m, 400, np.geomspace(1, 0.3, m - 1), 0.7)
    for left_out in (0, m - 1):
        expected = anderson_step(thetas, grads, left_out)
        found = step(thetas, grads, lr=1.0, cutoff=1e-6)
        # Anderson's normal equations leave a column out: their condition is at most (1/0.3)²·m.
        assert np.linalg.norm(found - expected) <= 100 * m * m * 2.0**-52 * np.linalg.norm(expected)


@pytest.mark.parametrize("cutoff", [0.1, 1e-4])
@pytest.mark.parametrize(
    ("dtype", "m"),
    [
        pytest.param(dtype, m, marks=() if dtype == "float32" or m in (2, 13) else pytest.mark.full)
        for dtype in DTYPES
        for m in (1, 2, 8, 13, 33)
    ],
)
def test_step_has_the_bits_of_gram_spectrum_combine(rng, dtype, m, cutoff):
    thetas, grads = workers(rng, m, 3001, DTYPES[dtype])
    precision = "float64" if cutoff < 1e-3 else None
    theta, info = fn.step(thetas, grads, lr=0.3, lr_rest=0.1, cutoff=cutoff, max_rank=5)
    spectrum = fn.spectrum(fn.gram(grads, precision=precision), cutoff=cutoff, max_rank=5)
    combined = fn.combine(thetas, grads, spectrum.coefficients, lr=0.3, lr_rest=0.1, precision=precision)
    assert bits(theta) == bits(combined)
    assert bits(info.singular_values) == bits(spectrum.singular_values)
    assert bits(info.coefficients) == bits(spectrum.coefficients)
    assert info.rank == spectrum.rank


@pytest.mark.parametrize(
    ("of_thetas", "of_grads", "products", "sums"),
    [
        pytest.param(1, 1e-20, "float64", None, id="products underflow"),
        pytest.param(1, 1e20, "float64", None, id="products overflow"),
        pytest.param(2e38, 1, None, "float64", id="sums overflow"),
    ],
)
def test_what_float32_cannot_hold_is_repeated_in_float64(rng, of_thetas, of_grads, products, sums):
    thetas, grads = rng.uniform(0.5, 1.5, (2, 3, 3001)) * [[[1], [-1], [1]]]  # θ_1 − θ_0 is twice as large
    thetas, grads = (of_thetas * thetas).astype(np.float32), (of_grads * grads).astype(np.float32)

    def composed(products, sums):
        spectrum = fn.spectrum(fn.gram(grads, precision=products))
        with np.errstate(all="ignore"):
            return fn.combine(thetas, grads, spectrum.coefficients, lr=0.3, precision=sums)

    theta, _ = fn.step(thetas, grads, lr=0.3)
    assert np.isfinite(theta).all()
    assert bits(theta) == bits(composed(products, sums)) != bits(composed(None, None))


@pytest.mark.parametrize("m", [3, 13])
def test_step_is_minus_lr_times_the_inverse_of_the_mean_gradient(rng, m):
    thetas, grads = workers(rng, m, 2000)
    theta, _ = fn.step(thetas, grads, lr=0.25)
    d = fn.apply_inverse(thetas, grads, grads.mean(0))
    expected = thetas.mean(0) - 0.25 * d
    scale = np.linalg.norm(thetas[0]) + np.linalg.norm(d)
    assert np.linalg.norm(theta - expected) <= 100 * m * 2.0**-52 * scale


# -- invariances ---------------------------------------------------------------------------------------------
#
# In float64, every kept σ_k at least 0.3·σ_1 and ‖ḡ‖ of the size of σ_1: two runs may differ by K's rounding
# over 0.09 and by that of the sums, all of which stays below 1e-12 of the sizes that went in.

CLOSE = 1e-12


@st.composite
def problems(draw, sizes=(2, 3, 5, 8), longest=2100):
    m = draw(st.sampled_from(sizes))
    n = draw(st.integers(m, longest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mean_ratio = draw(st.sampled_from([0.01, 0.5, 3.0]))
    thetas, grads = ill_conditioned(rng, m, n, np.geomspace(1, 0.3, m - 1), mean_ratio)
    return rng, thetas, grads


def size(thetas, grads):
    """Of what is added up in a step: the coefficients are at most 5·‖ḡ‖/σ_1."""
    return sum(np.linalg.norm(a) for a in (thetas, grads))


def assert_close(found, expected, scale):
    assert np.linalg.norm(found - expected) <= CLOSE * scale


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_workers_does_not_matter(problem, random):
    _, thetas, grads = problem
    order = list(range(len(thetas)))
    random.shuffle(order)
    theta, info = fn.step(thetas, grads, lr=0.7)
    shuffled, shuffled_info = fn.step(thetas[order], grads[order], lr=0.7)
    assert_close(shuffled, theta, size(thetas, grads))
    assert_close(shuffled_info.coefficients, info.coefficients[order], np.linalg.norm(info.coefficients) + 1)
    assert shuffled_info.rank == info.rank


@given(problems(), st.floats(-1e3, 1e3))
def test_translation_moves_the_result(problem, length):
    rng, thetas, grads = problem
    shift = length * rng.standard_normal(thetas.shape[1])
    theta, info = fn.step(thetas, grads, lr=0.7)
    moved, moved_info = fn.step(thetas + shift, grads, lr=0.7)
    assert_close(moved, theta + shift, size(thetas, grads) + np.linalg.norm(shift))
    assert bits(moved_info.coefficients) == bits(info.coefficients)


@given(problems(), st.integers(-40, 40))
def test_scaling_the_objective_scales_the_gram(problem, power):
    _, thetas, grads = problem
    s = 2.0**power  # a power of two, so that even the bits are scaled
    gram, scaled = fn.gram(grads), fn.gram(s * grads)
    assert bits(scaled.matrix) == bits(s**2 * gram.matrix)
    assert bits(scaled.projection) == bits(s**2 * gram.projection)
    assert scaled.norm2 == s**2 * gram.norm2
    _, info = fn.step(thetas, grads, lr=0.7)
    theta, scaled_info = fn.step(thetas, s * grads, lr=0.7, lr_rest=0.7 / s)
    assert_close(scaled_info.coefficients, info.coefficients, np.linalg.norm(info.coefficients))
    assert_close(theta, fn.step(thetas, grads, lr=0.7)[0], size(thetas, grads))


@given(problems(longest=60))
def test_orthogonal_coordinates_commute_with_the_step(problem):
    rng, thetas, grads = problem
    Q = orthonormal(rng, thetas.shape[1], thetas.shape[1])
    theta, info = fn.step(thetas, grads, lr=0.7)
    turned, turned_info = fn.step(thetas @ Q, grads @ Q, lr=0.7)
    assert_close(turned, theta @ Q, size(thetas, grads))
    assert turned_info.rank == info.rank


@given(problems(), st.sampled_from([None, 0.01]))
def test_no_direction_is_averaged_sgd(problem, lr_rest):
    _, thetas, grads = problem
    theta, info = fn.step(thetas, grads, lr=0.7, lr_rest=lr_rest, max_rank=0)
    assert_close(theta, reference.averaged_sgd(thetas, grads, lr_rest or 0.7), size(thetas, grads))
    assert info.rank == 0
    assert not info.coefficients.any()


@given(problems(), st.sampled_from([None, 0.01]))
def test_one_worker_is_sgd(problem, lr_rest):
    _, thetas, grads = problem
    theta, info = fn.step(thetas[:1], grads[:1], lr=0.7, lr_rest=lr_rest)
    assert_close(theta, thetas[0] - (lr_rest or 0.7) * grads[0], size(thetas[:1], grads[:1]))
    assert info.rank == 0
    assert info.singular_values.shape == info.coefficients.shape == (1,)


@given(problems(sizes=(2, 13)), st.integers(2, 3))
def test_duplicated_workers_change_nothing(problem, copies):
    _, thetas, grads = problem
    theta, info = fn.step(thetas, grads, lr=0.7)
    again, again_info = fn.step(np.tile(thetas, (copies, 1)), np.tile(grads, (copies, 1)), lr=0.7)
    assert_close(again, theta, size(thetas, grads))
    assert again_info.rank == info.rank


@pytest.mark.parametrize(
    ("dtype", "m"),
    [
        # 3, 6 and 7 are where a mean by division alone is rounded away from equal numbers.
        pytest.param(dtype, m, marks=() if dtype == "float32" or m in (1, 2, 3, 6, 7, 13) else pytest.mark.full)
        for dtype in DTYPES
        for m in range(1, 18)
    ],
)
def test_equal_gradients_are_averaged_sgd(rng, dtype, m):
    """The rounding of ḡ must not become a direction."""
    n = 1100
    theta_0, g = rng.standard_normal((2, n))
    thetas = (theta_0 + 0.1 * rng.standard_normal((m, n))).astype(DTYPES[dtype])
    grads = np.tile(g.astype(DTYPES[dtype]), (m, 1))
    theta, info = fn.step(thetas, grads, lr=0.7)
    assert info.rank == 0
    assert info.captured == 0
    exact = thetas.astype(np.longdouble)  # the mean of 17 in float64 would itself be rounded 17 times
    expected = exact.mean(0) - np.longdouble(0.7) * grads[0].astype(np.longdouble)
    scale = abs(exact).max(0) + 0.7 * abs(grads[0].astype(np.longdouble))
    error = abs(theta.astype(np.longdouble) - expected)
    assert (error <= 4 * reference.eps_of(DTYPES[dtype]) * scale).all()


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 2, 8, 17, 32])
@pytest.mark.parametrize("options", [{}, {"lr_cap": "sigma", "lr_rest": 0.25}, {"max_rank": 1, "cutoff": 1e-4}])
def test_arrays_and_sequences_give_the_same_bits(rng, monkeypatch, library, dtype, m, options):
    """Compiled code looks at the arrays of NumPy and PyTorch itself, and at nothing else."""
    made = getattr(pytest.importorskip(library), {"numpy": "asarray", "torch": "from_numpy"}[library])
    thetas, grads = rng.standard_normal((2, m, 1403)).astype(dtype)
    wide, given = np.zeros((2 * m, 1500), dtype), np.zeros(1403, dtype)
    wide[::2, 3:1406] = grads
    expected, wanted = fn.step(list(thetas), list(grads), lr=0.5, **options)
    monkeypatch.setattr(arrays, "pair", lambda *given: pytest.fail("looked at by Python"))
    for out in (None, made(given)):
        theta, info = fn.step(made(thetas), made(wide)[::2, 3:1406], lr=0.5, out=out, **options)
        assert np.asarray(theta).tobytes() == expected.tobytes()
        assert info.read().tobytes() == wanted.read().tobytes()
        assert type(theta) is type(made(given))
        assert out is None or theta is out
    assert given.tobytes() == expected.tobytes()


# -- quadratics and convergence ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [reference_step, package_step])
@pytest.mark.parametrize(
    ("n", "m"), [(50, 2), (50, 5), (50, 13), (50, 25), (50, 100), (200, 8), (200, 100), (200, 400)]
)
@pytest.mark.parametrize(("tau", "beta"), [(1.0, 1.0), (0.3, 0.05)])
def test_gradient_after_a_step_on_a_quadratic(rng, step, n, m, tau, beta):
    problem = Quadratic(rng, n)
    thetas = rng.standard_normal(n) + 0.1 * rng.standard_normal((m, n))
    grads = problem.gradient(thetas)
    theta = step(thetas, grads, lr=tau, lr_rest=beta, cutoff=1e-7)
    q = reference.quantities(grads)
    j = q.rank(1e-7)
    assert j == min(m - 1, n)
    U = np.column_stack([q.u(k) for k in range(j)])
    Pg = U @ (U.T @ q.g_bar)
    expected = q.g_bar - tau * Pg - beta * problem.H @ (q.g_bar - Pg)
    assert np.linalg.norm(problem.gradient(theta) - expected) <= 1e-12 * np.linalg.norm(q.g_bar)


@pytest.mark.parametrize("n", [3, 20, 50, 200])
def test_one_step_to_the_minimiser_of_a_quadratic(rng, n):
    problem = Quadratic(rng, n, condition=100)
    thetas = problem.minimiser + rng.standard_normal(n) + rng.standard_normal((2 * n, n))
    theta, info = fn.step(thetas, problem.gradient(thetas), lr=1.0, cutoff=1e-7)
    assert info.rank == n
    # H⁻¹ with a condition of 100, from K with its square: 1e4 roundings of numbers of size 1, times √n.
    assert np.linalg.norm(theta - problem.minimiser) < 1e-9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("l2", [1e-2, 1e-1])
def test_convergence_is_quadratic_with_more_workers_than_parameters(seed, l2):
    n, m, rng = 20, 24, np.random.default_rng(seed)
    problem = Logistic(rng, n, l2=l2)
    minimiser = problem.minimiser()
    theta = minimiser + 0.3 * rng.standard_normal(n) / np.sqrt(n)
    errors, lengths = [], []
    for _ in range(12):
        length = np.linalg.norm(problem.gradient(theta))
        errors.append(np.linalg.norm(theta - minimiser))
        lengths.append(length)
        if length <= 1e-13:
            break
        thetas = theta + 0.1 * length * rng.standard_normal((m, n)) / np.sqrt(n)
        grads = np.array([problem.gradient(row) for row in thetas])
        theta, _ = fn.step(thetas, grads, lr=1.0, cutoff=1e-6)
    assert lengths[-1] <= 1e-13
    # Where the gradient is no longer above 1e-13, the error is the gradient's rounding over l2.
    usable = [error for error, length in zip(errors, lengths, strict=True) if length > 1e-13]
    before, after = np.log(usable[:-1]), np.log(usable[1:])
    assert len(before) >= 2
    order = np.polyfit(before, after, 1)[0]
    assert 1.8 <= order <= 2.2


# -- options and what is reported ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 3, 8, 13])
@pytest.mark.parametrize("lr_cap", ["sigma", "curvature"])
@pytest.mark.parametrize("lr_rest", [None, 3.0])
def test_lr_cap_bounds_lr_and_not_lr_rest(rng, dtype, m, lr_cap, lr_rest):
    # Gradients so small that 1/σ_1 is of the size of a step.
    scale = np.sqrt(1500 * m) if lr_cap == "curvature" else 0.5
    thetas, grads = ill_conditioned(rng, m, 1500, np.geomspace(1, 0.3, m - 1), 0.5, DTYPES[dtype], scale=scale)
    expected = reference.step(thetas, grads, lr=9.0, lr_rest=lr_rest, lr_cap=lr_cap)
    theta, info = fn.step(thetas, grads, lr=9.0, lr_rest=lr_rest, lr_cap=lr_cap)
    compute = tolerances.computed_in(DTYPES[dtype])
    assert expected.lr < 9.0
    # Squares of p_k from 0.25 to 4 and of σ_k from 0.09 to 1 are subtracted: 4/0.25/0.09 roundings of K.
    assert info.lr == pytest.approx(expected.lr, rel=200 * tolerances.gram_rounding(expected.q, compute))
    bound = tolerances.of_step(expected, DTYPES[dtype], compute)
    moved = abs(info.lr - expected.lr) * np.linalg.norm(expected.inverse.d)
    assert np.linalg.norm(theta.astype(np.float64) - expected.theta_new) <= bound + moved
    assert fn.step(thetas, grads, lr=expected.lr / 2, lr_cap=lr_cap)[1].lr == expected.lr / 2


@pytest.mark.parametrize("lr_cap", ["sigma", "curvature"])
def test_lr_cap_does_nothing_where_no_direction_is_kept(rng, lr_cap):
    thetas, grads = workers(rng, 3, 500)
    for options in ({"max_rank": 0}, {}):
        given_grads = grads if options else np.tile(grads[0], (3, 1))
        _, info = fn.step(thetas, given_grads, lr=1e6, lr_cap=lr_cap, **options)
        assert (info.rank, info.lr) == (0, 1e6)


def test_curvature_cap_leaves_out_directions_in_which_thetas_do_not_differ(rng):
    m, n = 4, 1000
    W, U = orthonormal(rng, m, 3, but=np.ones(m)), orthonormal(rng, n, 3)
    sigmas, lengths = np.array([1.0, 0.7, 0.5]), np.array([0.25, 0.0, 0.5])
    grads = (W * sigmas) @ U.T + rng.standard_normal(n)
    thetas = (W * (sigmas * lengths)) @ U.T + rng.standard_normal(n)
    expected = reference.step(thetas, grads, lr=9.0, lr_cap="curvature")
    assert expected.rank == 3
    assert expected.lr == pytest.approx(0.25)
    assert fn.step(thetas, grads, lr=9.0, lr_cap="curvature")[1].lr == pytest.approx(0.25)
    _, info = fn.step(np.tile(thetas[0], (m, 1)), grads, lr=9.0, lr_cap="curvature")
    assert (info.rank, info.lr) == (3, 9.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 3, 8, 13])
@pytest.mark.parametrize("mean_ratio", [0.1, 3.0])
def test_captured_is_the_share_of_the_mean_gradient_in_the_kept_span(rng, dtype, m, mean_ratio):
    thetas, grads = ill_conditioned(rng, m, 2000, np.geomspace(1, 0.3, m - 1), mean_ratio, DTYPES[dtype])
    expected = reference.step(thetas, grads, lr=1.0)
    _, info = fn.step(thetas, grads, lr=1.0)
    rounding = tolerances.gram_rounding(expected.q, tolerances.computed_in(DTYPES[dtype]))
    assert 0.3 < expected.captured < 0.7
    assert info.captured == pytest.approx(expected.captured, abs=m * rounding / 0.3**2)


def test_nothing_is_captured_of_a_mean_gradient_that_is_zero(rng):
    thetas, grads = rng.standard_normal((2, 100)), rng.standard_normal((2, 100))
    grads[1] = -grads[0]
    theta, info = fn.step(thetas, grads, lr=1.0)
    assert (info.rank, info.captured) == (1, 0)
    assert np.linalg.norm(theta - thetas.mean(0)) <= 4 * 2.0**-52 * np.linalg.norm(thetas)


@pytest.mark.parametrize("dtype", DTYPES)
def test_info_holds_plain_numbers(rng, dtype):
    _, info = fn.step(*workers(rng, 3, 50, DTYPES[dtype]), lr=1, lr_rest=np.float32(0.5), max_rank=np.int64(1))
    assert type(info) is fn.StepInfo
    assert type(info.rank) is int
    assert type(info.lr) is float
    assert type(info.captured) is float
    assert type(info.dropped) is tuple
    assert info.dropped == ()
    for values in (info.singular_values, info.coefficients):
        assert type(values) is np.ndarray
        assert values.dtype == np.float64
        assert values.shape == (3,)


def test_info_is_frozen_and_outlives_later_steps(rng):
    thetas, grads = workers(rng, 3, 50)
    _, info = fn.step(thetas, grads, lr=1.0)
    before = [bits(info.singular_values), bits(info.coefficients)]
    for field in dataclasses.fields(info):
        with pytest.raises(AttributeError):
            setattr(info, field.name, None)
    fn.step(2 * thetas, 3 * grads[::-1], lr=0.5)
    assert [bits(info.singular_values), bits(info.coefficients)] == before


def test_inputs_are_never_written(rng):
    thetas, grads = workers(rng, 8, 3001, np.float32)
    z = grads[0].copy()
    before = [bits(a) for a in (thetas, grads, z)]
    fn.step(thetas, grads, lr=1.0, lr_cap="curvature")
    fn.apply_inverse(thetas, grads, z)
    fn.combine(thetas, grads, np.ones(8), lr=1.0)
    assert [bits(a) for a in (thetas, grads, z)] == before


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("cutoff", 0.1),
        ("max_rank", None),
        ("lr_rest", None),
        ("lr_cap", None),
        ("nonfinite", "raise"),
        ("out", None),
    ],
)
def test_defaults(rng, name, default):
    thetas, grads = workers(rng, 5, 1030)
    expected, expected_info = fn.step(thetas, grads, lr=0.7)
    theta, info = fn.step(thetas, grads, lr=0.7, **{name: default})
    assert bits(theta) == bits(expected)
    assert info.rank == expected_info.rank


# -- small matrices that overflow, or drown ------------------------------------------------------------------


def test_the_curvature_cap_of_float32_is_that_of_float64(rng):
    m, n = 6, 5000
    grads = rng.standard_normal((m, n)).astype(np.float32)
    thetas = (1 + 1e-4 * rng.standard_normal((m, n))).astype(np.float32)
    thetas[0] += np.float32(3.0) * rng.standard_normal(n).astype(np.float32)
    _, info = fn.step(thetas, grads, lr=50.0, lr_cap="curvature", cutoff=0.01)
    expected = reference.step(thetas, grads, lr=50.0, lr_cap="curvature", cutoff=0.01)
    assert info.lr == pytest.approx(expected.lr, rel=1e-3)  # of the vectors v_k, from products in float32


def test_an_overflow_of_the_mean_gradient_is_found():
    thetas = np.array([[1.0, 2.0], [2.0, 1.0], [0.0, 0.5]])
    grads = np.array([[1e200, 1.0], [1e200, 2.0], [1e200, 4.0]])
    with pytest.raises(fn.NonFiniteError, match="overflow"):
        fn.step(thetas, grads, lr=1e-3)
    assert fn.spectrum(fn.gram(grads)).rank == 0


def test_an_overflow_of_z_does_not_reach_the_result(rng):
    thetas, grads = rng.standard_normal((2, 4, 30))
    z = rng.standard_normal(30)
    expected = fn.apply_inverse(thetas, grads, z)
    np.testing.assert_allclose(fn.apply_inverse(thetas, grads, 1e200 * z) / 1e200, expected, rtol=1e-12)


def test_thetas_that_overflow_do_not_matter_where_no_direction_is_kept(rng):
    thetas = 1e200 * rng.standard_normal((3, 20))
    theta, info = fn.step(thetas, np.ones((3, 20)), lr=0.5, lr_cap="curvature")
    assert info.rank == 0
    np.testing.assert_allclose(theta, thetas.mean(0), rtol=1e-14)
    with pytest.raises(fn.NonFiniteError, match="overflow"):
        fn.step(thetas, rng.standard_normal((3, 20)), lr=0.5, lr_cap="curvature")
