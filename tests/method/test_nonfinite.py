"""NaN, infinity and overflow: who raises, who propagates, and who is named."""

import numpy as np
import pytest
import reference
import tolerances
from problems import DTYPES, ill_conditioned, workers

import fastnewton as fn

BAD_VALUES = [np.nan, np.inf, -np.inf]
M, N = 3, 2051
PLACES = [0, 1023, 1024, N - 1]  # first and last of a block, and of the short last block


def bits(array):
    return np.ascontiguousarray(array).tobytes()


def filled(n, dtype=np.float64):
    return np.full(n, 7.0, dtype)


@pytest.fixture
def problem(rng):
    return workers(rng, M, N)


def without(rows, dropped):
    return np.delete(rows, list(dropped), axis=0)


# -- step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("which", ["thetas", "grads"])
def test_raise_names_the_worker(rng, dtype, value, place, which):
    arrays = dict(zip(("thetas", "grads"), workers(rng, M, N, DTYPES[dtype]), strict=True))
    arrays[which][1, place] = value
    with pytest.raises(fn.NonFiniteError, match="worker 1") as caught:
        fn.step(**arrays, lr=0.5)
    assert list(caught.value.workers) == [1]


def test_raise_names_all_workers(rng):
    thetas, grads = workers(rng, 5, N)
    thetas[1, 5], grads[4, 1500], grads[2, 0] = np.nan, np.inf, np.nan
    with pytest.raises(fn.NonFiniteError, match="1, 2, 4") as caught:
        fn.step(thetas, grads, lr=0.5)
    assert list(caught.value.workers) == [1, 2, 4]


def test_raise_is_the_default_and_an_arithmetic_error(problem):
    thetas, grads = problem
    grads[0, 0] = np.nan
    with pytest.raises(ArithmeticError) as default:
        fn.step(thetas, grads, lr=0.5)
    with pytest.raises(fn.NonFiniteError) as explicit:
        fn.step(thetas, grads, lr=0.5, nonfinite="raise")
    assert str(default.value) == str(explicit.value)


@pytest.mark.parametrize("nonfinite", ["raise", "drop"])
def test_out_is_untouched_when_gradients_are_at_fault(problem, nonfinite):
    thetas, grads = problem
    grads[:, 7] = np.nan
    out = filled(N)
    with pytest.raises(fn.NonFiniteError):
        fn.step(thetas, grads, lr=0.5, nonfinite=nonfinite, out=out)
    assert (out == 7).all()


DROPPED = [
    {("thetas", 0)},
    {("grads", 2)},
    {("thetas", 1), ("grads", 1)},
    {("thetas", 0), ("grads", 2)},
    {("grads", 0), ("grads", 1)},
    {("thetas", 1), ("thetas", 2)},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("faults", DROPPED)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lr_cap", [None, "curvature"])
def test_drop_has_the_bits_of_a_call_without_the_others(rng, dtype, faults, place, lr_cap):
    thetas, grads = workers(rng, M, N, DTYPES[dtype])
    for which, worker in faults:
        (thetas if which == "thetas" else grads)[worker, place] = np.nan
    dropped = sorted({worker for _, worker in faults})
    options = {"lr": 0.5, "lr_cap": lr_cap}
    expected, expected_info = fn.step(without(thetas, dropped), without(grads, dropped), **options)
    theta, info = fn.step(thetas, grads, nonfinite="drop", **options)
    assert expected_info.rank == (len(dropped) == 1)
    assert bits(theta) == bits(expected)
    assert info.dropped == tuple(dropped)
    assert bits(info.coefficients) == bits(expected_info.coefficients)
    assert bits(info.singular_values) == bits(expected_info.singular_values)
    assert (info.rank, info.lr, info.captured) == (
        expected_info.rank,
        expected_info.lr,
        expected_info.captured,
    )


def test_drop_takes_a_sequence_of_rows_and_out(problem):
    thetas, grads = problem
    thetas[2, 100] = np.inf
    expected, _ = fn.step(without(thetas, [2]), without(grads, [2]), lr=0.5)
    out = filled(N)
    theta, info = fn.step(list(thetas), list(grads), lr=0.5, nonfinite="drop", out=out)
    assert theta is out
    assert bits(out) == bits(expected)
    assert info.dropped == (2,)


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("which", [0, 1])
def test_drop_raises_where_no_worker_is_left(rng, m, which):
    problem = workers(rng, m, 100)
    problem[which][:, 50] = np.nan
    with pytest.raises(fn.NonFiniteError) as caught:
        fn.step(*problem, lr=0.5, nonfinite="drop")
    assert list(caught.value.workers) == list(range(m))


@pytest.mark.parametrize("nonfinite", ["raise", "drop", "propagate"])
def test_finite_input_is_the_same_with_each_choice(problem, nonfinite):
    expected, _ = fn.step(*problem, lr=0.5)
    theta, info = fn.step(*problem, lr=0.5, nonfinite=nonfinite)
    assert bits(theta) == bits(expected)
    assert info.dropped == ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("lr_cap", [None, "sigma", "curvature"])
def test_propagate_lets_gradients_through(rng, dtype, value, lr_cap):
    thetas, grads = workers(rng, M, N, DTYPES[dtype])
    grads[2, 1500] = value
    theta, info = fn.step(thetas, grads, lr=0.5, nonfinite="propagate", lr_cap=lr_cap)
    assert np.isnan(theta.astype(np.float64)).all()  # K is NaN, and with it every coefficient
    assert info.rank == 0
    assert np.isnan(info.coefficients).all()
    assert info.dropped == ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD_VALUES)
def test_propagate_lets_thetas_through_where_they_are(rng, dtype, value):
    thetas, grads = workers(rng, M, N, DTYPES[dtype])
    expected, _ = fn.step(thetas, grads, lr=0.5)
    thetas[2, 1500] = value
    theta, info = fn.step(thetas, grads, lr=0.5, nonfinite="propagate")
    elsewhere = np.arange(N) != 1500
    assert not np.isfinite(theta.astype(np.float64)[1500])
    assert bits(theta[elsewhere]) == bits(expected[elsewhere])
    assert info.rank == 1


@pytest.mark.parametrize("nonfinite", ["raise", "drop", "propagate"])
@pytest.mark.parametrize("value", BAD_VALUES)
def test_curvature_cap_with_thetas_that_are_not_finite(problem, nonfinite, value):
    thetas, grads = problem
    thetas[2, 1500] = value
    options = {"lr": 0.5, "lr_cap": "curvature"}
    if nonfinite == "raise":
        with pytest.raises(fn.NonFiniteError) as caught:
            fn.step(thetas, grads, **options)
        assert list(caught.value.workers) == [2]
        return
    theta, info = fn.step(thetas, grads, nonfinite=nonfinite, **options)
    if nonfinite == "propagate":
        assert not np.isfinite(theta[1500])
    else:
        assert info.dropped == (2,)
        assert np.isfinite(theta).all()


# -- overflow ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 3, 13])
@pytest.mark.parametrize("nonfinite", ["raise", "drop"])
@pytest.mark.parametrize("lr_cap", [None, "sigma", "curvature"])
def test_gradients_whose_products_overflow_are_multiplied_in_float64(rng, m, nonfinite, lr_cap):
    thetas, grads = ill_conditioned(rng, m, N, np.geomspace(1, 0.3, m - 1), 0.5, np.float32)
    grads *= np.float32(1e20)
    options = {"lr": 0.5, "lr_rest": 1e-20, "lr_cap": lr_cap}
    expected = reference.step(thetas, grads, **options)
    assert not np.isfinite(fn.gram(grads).matrix).all()
    theta, info = fn.step(thetas, grads, nonfinite=nonfinite, **options)
    assert info.rank == expected.rank == m - 1
    assert info.dropped == ()
    assert info.lr == pytest.approx(expected.lr, rel=1e-6)
    bound = tolerances.of_step(expected, np.float32, "float32")
    assert np.linalg.norm(theta - expected.theta_new) <= bound


@pytest.mark.parametrize("factor", [1e-25, 3e-23, 1e-21])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("nonfinite", ["raise", "drop"])
def test_gradients_whose_products_underflow_are_multiplied_in_float64(rng, factor, dtype, nonfinite):
    thetas, grads = workers(rng, 5, 400, DTYPES[dtype])
    grads = (grads.astype(np.float64) * factor).astype(DTYPES[dtype])
    theta, info = fn.step(thetas, grads, lr=0.5, cutoff=0.3, nonfinite=nonfinite)
    exact = [each.astype(np.float64) for each in (thetas, grads)]
    expected, precise = fn.step(*exact, lr=0.5, cutoff=0.3)
    assert info.rank == precise.rank
    np.testing.assert_allclose(info.coefficients, precise.coefficients, rtol=1e-9)  # only sums in another order
    # Rounding of a stored value, and of sums in float32.
    np.testing.assert_allclose(theta.astype(np.float64), expected, atol=8 * reference.eps_of(DTYPES[dtype]) * 8)


def test_thetas_whose_products_overflow_do_not_spoil_the_curvature_cap(rng):
    thetas, grads = ill_conditioned(rng, 3, N, [1, 0.5], 0.5, np.float32)
    thetas *= np.float32(1e20)
    grads *= np.float32(1e17)  # whose products do not overflow
    assert np.isfinite(fn.gram(grads).matrix).all()
    expected = reference.step(thetas, grads, lr=1e4, lr_cap="curvature")
    theta, info = fn.step(thetas, grads, lr=1e4, lr_cap="curvature")
    assert expected.lr < 1e4
    assert info.lr == pytest.approx(expected.lr, rel=1e-4)
    assert np.linalg.norm(theta - expected.theta_new) <= 1e-3 * np.linalg.norm(expected.theta_new)


@pytest.mark.parametrize("nonfinite", ["raise", "drop"])
def test_products_that_overflow_in_float64_are_an_error_without_workers(rng, nonfinite):
    thetas, grads = workers(rng, 3, N)
    out = filled(N)
    with pytest.raises(fn.NonFiniteError, match="overflow") as caught:
        fn.step(thetas, 1e200 * grads, lr=0.5, nonfinite=nonfinite, out=out)
    assert len(caught.value.workers) == 0
    assert (out == 7).all()


@pytest.mark.parametrize("nonfinite", ["raise", "drop"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_that_overflows_is_an_error_without_workers(rng, dtype, nonfinite):
    thetas, grads = workers(rng, 3, 100, DTYPES[dtype])
    largest = float(reference.ml_dtypes.finfo(DTYPES[dtype]).max)
    with pytest.raises(fn.NonFiniteError, match="overflow") as caught:
        fn.step(thetas, grads, lr=largest, nonfinite=nonfinite)
    assert len(caught.value.workers) == 0
    theta, _ = fn.step(thetas, grads, lr=largest, nonfinite="propagate")
    assert not np.isfinite(theta.astype(np.float64)).all()


def test_propagate_does_not_repeat_products_that_overflow(rng):
    thetas, grads = workers(rng, 3, 100, np.float32)
    theta, info = fn.step(thetas, grads * np.float32(1e20), lr=0.5, nonfinite="propagate")
    assert np.isnan(theta).all()
    assert info.rank == 0


def test_largest_finite_values_of_each_type_are_finite(rng):
    for dtype in DTYPES.values():
        largest = float(reference.ml_dtypes.finfo(dtype).max)
        thetas = np.full((2, 3), largest, dtype)
        theta, info = fn.step(thetas, np.zeros((2, 3), dtype), lr=0.5)
        assert bits(theta) == bits(thetas[0])
        assert info.rank == 0


# -- the parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("m", [1, 2, 3, 13])
def test_gram_propagates(rng, dtype, value, place, m):
    _, grads = workers(rng, m, N, DTYPES[dtype])
    bad = grads.copy()
    bad[m - 1, place] = value
    gram = fn.gram(bad)
    assert not np.isfinite(gram.norm2)
    assert not np.isfinite(gram.projection).any()
    assert not np.isfinite(gram.matrix).any()
    # What does not see the bad value keeps its bits.
    beside = fn.gram(grads, bad[m - 1])
    assert bits(beside.matrix) == bits(fn.gram(grads, grads[0]).matrix)
    assert not np.isfinite(beside.norm2)
    assert not np.isfinite(beside.projection).all()
    both = fn.gram(grads, thetas=bad)
    assert not np.isfinite(both.theta_matrix).any()
    assert bits(both.matrix) == bits(fn.gram(grads).matrix)


@pytest.mark.parametrize("m", [1, 2, 3, 13])
@pytest.mark.parametrize("value", BAD_VALUES)
def test_spectrum_of_what_is_not_finite_has_rank_0_and_nan_coefficients(rng, m, value):
    _, grads = workers(rng, m, 100)
    grads[0, 3] = value
    spectrum = fn.spectrum(fn.gram(grads))
    assert spectrum.rank == 0
    assert spectrum.coefficients.shape == spectrum.singular_values.shape == (m,)
    assert spectrum.vectors.shape == (m, m)
    assert np.isnan(spectrum.coefficients).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("m", [1, 2, 3, 33])
def test_combine_propagates_to_the_coordinate(rng, dtype, value, which, m):
    problem = workers(rng, m, N, DTYPES[dtype])
    c = rng.standard_normal(m)
    expected = fn.combine(*problem, c, lr=0.5)
    problem[which][m - 1, 1500] = value
    theta = fn.combine(*problem, c, lr=0.5)
    assert not np.isfinite(theta.astype(np.float64)[1500])
    elsewhere = np.arange(N) != 1500
    assert bits(theta[elsewhere]) == bits(expected[elsewhere])


def test_combine_propagates_coefficients(problem):
    theta = fn.combine(*problem, np.array([np.nan, 0, 0]), lr=0.5)
    assert np.isnan(theta).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize(("which", "m"), [(0, 3), (0, 33), (1, 3), (1, 33), (2, 1), (2, 3), (2, 33)])
def test_apply_inverse_propagates(rng, dtype, value, which, m):
    arrays = [*workers(rng, m, N, DTYPES[dtype]), rng.standard_normal((1, N)).astype(DTYPES[dtype])]
    arrays[which][0, 1500] = value
    thetas, grads, z = arrays
    d = fn.apply_inverse(thetas, grads, z[0])
    assert not np.isfinite(d.astype(np.float64)[1500])
