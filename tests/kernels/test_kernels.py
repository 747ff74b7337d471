"""Both passes against the reference: every number of workers, dtype, layout and thread count."""

import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import reference
import tolerances
from problems import DTYPES, ill_conditioned, workers

import fastnewton as fn
from fastnewton.kernels.cpu import threads as pool
from fastnewton.kernels.cpu.eigen import COMPILED_LIMIT

EVERY_M = [*range(1, 18), 32, 33, 64, 128]
LENGTHS = [1, 2, 7, 1023, 1025, 4099]

# A kernel is compiled for each m up to 12 (`gram`) or 17 (`combine`): by default only float32 has them all.
PLAIN_M = {
    "float32": EVERY_M,
    "float64": [1, 2, 3, 5, 8, 13, 33],
    "float16": [2, 3, 8, 16],
    "bfloat16": [1, 3, 8, 33],
}


def of_every_dtype(*some_m):
    """All dtypes with these numbers of workers; by default where `step` has been compiled already."""
    return [
        pytest.param(dtype, m, marks=() if m in PLAIN_M[dtype] else pytest.mark.full)
        for dtype in DTYPES
        for m in some_m
    ]


DTYPE_AND_M = of_every_dtype(*EVERY_M)


def bits(array):
    return np.ascontiguousarray(array).tobytes()


def distance(result, expected):
    return np.linalg.norm(np.asarray(result).astype(np.float64) - expected)


def assert_separated(q, cutoff):
    """No singular value so near to the cutoff or the floor that rounding may decide about it."""
    least = max(cutoff * q.sigma[0], q.floor)
    near = (q.sigma[:-1] > least / 2) & (q.sigma[:-1] < 2 * least)
    assert not near.any(), f"a problem that rounding decides: {q.sigma / q.sigma[0]}, {least / q.sigma[0]}"


def assert_step(thetas, grads, **options):
    """fn.step agrees with the paper."""
    expected = reference.step(thetas, grads, **options)
    cutoff = options.get("cutoff", 0.1)
    assert_separated(expected.q, cutoff)
    theta, info = fn.step(thetas, grads, **options)
    dtype, m = thetas[0].dtype, len(thetas)
    compute = tolerances.computed_in(dtype, "float64" if cutoff < 1e-3 else None)

    assert theta.shape == thetas[0].shape
    assert theta.dtype == dtype
    assert info.rank == expected.rank
    assert distance(theta, expected.theta_new) <= tolerances.of_step(expected, dtype, compute)
    assert info.singular_values.shape == (m,)
    for k in range(expected.rank):
        bound = tolerances.of_singular_value(expected.q, k, compute)
        assert abs(info.singular_values[k] - expected.q.sigma[k]) <= bound
    return expected


@pytest.mark.parametrize(("dtype", "m"), DTYPE_AND_M)
@pytest.mark.parametrize("n", LENGTHS)
def test_step_is_the_papers(rng, dtype, m, n):
    assert_step(*workers(rng, m, n, DTYPES[dtype]), lr=0.7)


@pytest.mark.parametrize(("dtype", "m"), DTYPE_AND_M)
def test_step_with_its_own_length_on_the_complement(rng, dtype, m):
    assert_step(*workers(rng, m, 1500, DTYPES[dtype]), lr=0.7, lr_rest=0.05)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("m", [129, *(pytest.param(m, marks=pytest.mark.full) for m in (512, 1024))])
def test_step_of_so_many_that_lapack_solves_the_eigenproblem(rng, dtype, m):
    assert m > COMPILED_LIMIT
    assert_step(*workers(rng, m, 1500, DTYPES[dtype]), lr=0.7)


@pytest.mark.parametrize(("dtype", "m"), of_every_dtype(2, 3, 8))
@pytest.mark.parametrize("max_rank", [0, 1, 2, 100])
def test_max_rank_keeps_the_largest(rng, dtype, m, max_rank):
    sigmas = np.geomspace(1, 0.25, m - 1)
    expected = assert_step(*ill_conditioned(rng, m, 1030, sigmas, 0.5, DTYPES[dtype]), lr=1.0, max_rank=max_rank)
    assert expected.rank == min(max_rank, m - 1)


@pytest.mark.parametrize(("dtype", "m"), of_every_dtype(1, 3, 8, 33))
def test_no_coordinates(dtype, m):
    nothing = np.zeros((m, 0), DTYPES[dtype])
    theta, info = fn.step(nothing, nothing, lr=1.0)
    assert theta.shape == (0,)
    assert theta.dtype == DTYPES[dtype]
    assert (info.rank, info.captured) == (0, 0)
    assert not info.singular_values.any()
    assert not info.coefficients.any()


# -- ill-conditioned data ------------------------------------------------------------------------------------


def spectrum_down_to(least, m):
    """m − 2 values from 1 to a bit above `least`, and one as far below."""
    return np.append(np.geomspace(1, 2.5 * least, m - 2), least / 2.5)


MANY_M = [4, 8, *(pytest.param(m, marks=pytest.mark.full) for m in (3, 5, 12, 13, 17, 33, 64))]
MEAN_RATIOS = [0.0, 1.0, 1e2, 1e4]


@pytest.mark.parametrize("m", MANY_M)
@pytest.mark.parametrize("mean_ratio", MEAN_RATIOS)
@pytest.mark.parametrize(("dtype", "cutoff"), [("float64", 4e-7), ("float32", 4e-7), ("float32", 1e-3)])
def test_small_singular_values_are_kept_down_to_the_cutoff(rng, m, mean_ratio, dtype, cutoff):
    n = 16387
    least = max(cutoff, 2 * reference.eps_of(dtype) * mean_ratio, np.sqrt(m * 2.0**-52))
    problem = ill_conditioned(rng, m, n, spectrum_down_to(least, m), mean_ratio, DTYPES[dtype])
    expected = assert_step(*problem, lr=1.0, cutoff=cutoff)
    assert expected.rank == m - 2


@pytest.mark.parametrize("m", MANY_M)
@pytest.mark.parametrize("n", [9001, 131075])
@pytest.mark.parametrize("mean_ratio", [0.0, 1.0, 1e3])
def test_a_thousandth_of_the_largest_is_right_to_one_percent_in_float32(rng, m, n, mean_ratio):
    thetas, grads = ill_conditioned(rng, m, n, np.geomspace(1, 1e-3, m - 1), mean_ratio, np.float32)
    expected = reference.step(thetas, grads, lr=1.0, cutoff=4e-4)
    spectrum = fn.spectrum(fn.gram(grads), cutoff=4e-4)
    theta = fn.combine(thetas, grads, spectrum.coefficients, lr=1.0)
    sigma = expected.q.sigma[: m - 1]
    assert spectrum.rank == expected.rank == m - 1
    assert (abs(spectrum.singular_values[: m - 1] - sigma) <= 0.01 * sigma).all()
    assert distance(theta, expected.theta_new) <= tolerances.of_step(expected, np.float32, "float32")


@pytest.mark.parametrize("m", MANY_M)
def test_a_ten_millionth_of_the_largest_is_right_to_one_percent_in_float64(rng, m):
    smallest = max(1e-7, 4 * np.sqrt(m * 2.0**-52))
    _, grads = ill_conditioned(rng, m, 9001, np.geomspace(1, smallest, m - 1), 1e-2, np.float64)
    sigma = reference.quantities(grads).sigma[: m - 1]
    spectrum = fn.spectrum(fn.gram(grads, precision="float64"), cutoff=smallest / 4)
    assert spectrum.rank == m - 1
    # K's rounding relative to the smallest square: more than a percent only where the floor is already near.
    bound = max(0.01, (m + 2) * 2.0**-53 / smallest**2)
    assert (abs(spectrum.singular_values[: m - 1] - sigma) <= bound * sigma).all()


# -- gram ----------------------------------------------------------------------------------------------------

# One accumulator's terms times the unit of its roundings; what is added after that is float64.
ENTRY = {"float32": 2.0**-18, "float64": 2.0**-46}
PLAIN_GRAMS = {(dtype, None, m) for dtype in DTYPES for m in (3, 13) if (dtype, m) != ("float16", 13)}
PLAIN_GRAMS |= {("float32", None, 1), ("float32", None, 8), ("float64", None, 8), ("float32", "float64", 2)}
PLAIN_GRAMS |= {("bfloat16", "float64", 8), ("float16", "float64", 13)}
GRAM_CASES = [
    pytest.param(*case, marks=() if case in PLAIN_GRAMS else pytest.mark.full)
    for case in itertools.product(DTYPES, (None, "float64"), EVERY_M)
]


@pytest.mark.parametrize(("dtype", "precision", "m"), GRAM_CASES)
@pytest.mark.parametrize("n", [7, 1025, 4099])
@pytest.mark.parametrize("mean_ratio", [0.5, 100.0])
def test_gram_holds_all_products(rng, dtype, precision, m, n, mean_ratio):
    thetas, grads = workers(rng, m, n, DTYPES[dtype], mean_ratio)
    z = rng.standard_normal(n).astype(DTYPES[dtype])
    q = reference.quantities(grads, thetas)
    entry = ENTRY[tolerances.computed_in(DTYPES[dtype], precision)]
    for vector, z_given in ((q.g_bar, {}), (z.astype(np.float64), {"z": z})):
        gram = fn.gram(grads, thetas=thetas, precision=precision, **z_given)
        products = {
            "matrix": (q.G, q.G),
            "theta_matrix": (q.Theta, q.Theta),
            "cross_matrix": (q.Theta, q.G),
            "projection": (q.G, vector[:, None]),
        }
        for name, (left, right) in products.items():
            found = getattr(gram, name)
            sizes = np.outer(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=0))
            expected = left.T @ right
            assert type(found) is np.ndarray
            assert found.dtype == np.float64
            assert found.shape == ((m,) if name == "projection" else (m, m))
            assert (abs(found.reshape(expected.shape) - expected) <= entry * (sizes + sizes.max())).all(), name
        assert abs(gram.norm2 - vector @ vector) <= entry * (vector @ vector)
        floor = 2 * q.eps * np.linalg.norm(q.g_bar)
        assert abs(gram.floor - floor) <= entry * floor


def test_gram_without_thetas_has_none(rng):
    gram = fn.gram(workers(rng, 3, 100)[1])
    assert gram.theta_matrix is None
    assert gram.cross_matrix is None


@pytest.mark.parametrize(("dtype", "m"), of_every_dtype(1, 3, 8, 13))
def test_gram_is_projected(rng, dtype, m):
    thetas, grads = workers(rng, m, 1100, DTYPES[dtype], 100.0)
    gram = fn.gram(grads, thetas=thetas)
    for matrix in (gram.matrix, gram.theta_matrix, gram.cross_matrix, gram.projection[:, None]):
        size = m * abs(matrix).max()
        assert (abs(matrix.sum(0)) <= m * 2.0**-50 * size).all()
    assert (gram.matrix == gram.matrix.T).all()


@pytest.mark.parametrize(("dtype", "m"), of_every_dtype(1, 2, 3, 8, 13, 33))
@pytest.mark.parametrize("n", [0, 5, 1024, 3001])
def test_gram_bits_do_not_depend_on_thetas(rng, dtype, m, n):
    thetas, grads = workers(rng, m, n, DTYPES[dtype])
    alone, both = fn.gram(grads), fn.gram(grads, thetas=thetas)
    assert bits(alone.matrix) == bits(both.matrix)
    assert bits(alone.projection) == bits(both.projection)
    assert (alone.norm2, alone.floor) == (both.norm2, both.floor)


# -- spectrum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 8, 33, 128])
def test_spectrum_solves_the_eigenproblem(rng, m):
    _, grads = workers(rng, m, 700)
    gram = fn.gram(grads)
    spectrum = fn.spectrum(gram)
    sigma, V = spectrum.singular_values, spectrum.vectors
    rounding = 4 * m * 2.0**-52
    assert sigma.shape == (m,)
    assert V.shape == (m, m)
    assert (sigma >= 0).all()
    assert (np.diff(sigma) <= 0).all()
    assert abs(V.T @ V - np.eye(m)).max() <= rounding
    assert abs(gram.matrix @ V - V * sigma**2).max() <= rounding * max(sigma[0] ** 2, 1e-300)


KINDS_OF_WORKERS = {
    "two groups": lambda rng, m: rng.standard_normal((2, 50))[np.arange(m) % 2],
    "few copies": lambda rng, m: rng.standard_normal((m // 4 + 1, 50))[np.arange(m) % (m // 4 + 1)],
    "one stands out": lambda rng, m: np.where(np.arange(m) == m // 3, 1.0, 0.0)[:, None] * rng.standard_normal(50),
    "signs": lambda rng, m: rng.integers(-1, 2, (m, 3)).astype(float),
    "one-hot": lambda rng, m: np.eye(5)[rng.integers(0, 5, m)],
    "one is tiny": lambda rng, m: rng.standard_normal((m, 50)) * np.geomspace(1, 1e-155, m)[:, None],
    "one coordinate": lambda rng, m: rng.standard_normal((m, 1)),
}


@pytest.mark.parametrize("m", [3, 8, 24, 40, 128])
@pytest.mark.parametrize("kind", KINDS_OF_WORKERS)
def test_spectrum_of_workers_that_are_alike(rng, kind, m):
    """K has few directions, and what is left of it after each reflection is rounding of rounding."""
    for _ in range(20):
        grads = KINDS_OF_WORKERS[kind](rng, m)
        matrix = fn.gram(grads).matrix
        spectrum = fn.spectrum(fn.Gram(matrix, np.ones(m), float(m), 0.0))
        squares, V = spectrum.singular_values**2, spectrum.vectors
        rounding = 4 * m * 2.0**-52
        assert abs(V.T @ V - np.eye(m)).max() <= rounding
        assert abs(matrix @ V - V * squares).max() <= rounding * abs(matrix).max(initial=1e-300) * m
        with np.errstate(under="ignore"):
            assert abs(squares - np.linalg.eigvalsh(matrix)[::-1].clip(0)).max() <= rounding * max(squares[0], 1e-300)


@pytest.mark.parametrize("m", [2, 3, 8, 33])
@pytest.mark.parametrize(("cutoff", "max_rank"), [(0.1, None), (1e-4, None), (0.1, 1), (0.9, None), (0.1, 0)])
def test_spectrum_gives_the_coefficients(rng, m, cutoff, max_rank):
    thetas, grads = ill_conditioned(rng, m, 900, np.geomspace(1, 0.3, m - 1), 2.0)
    expected = reference.step(thetas, grads, lr=1.0, cutoff=cutoff, max_rank=max_rank)
    spectrum = fn.spectrum(fn.gram(grads), cutoff=cutoff, max_rank=max_rank)
    c = expected.inverse.coefficients
    assert spectrum.rank == expected.rank
    assert spectrum.coefficients.shape == (m,)
    # K's rounding over the smallest square kept, 0.09; α_k and ‖ḡ‖ are of one size.
    assert np.linalg.norm(spectrum.coefficients - c) <= (m + 2) * 2.0**-52 / 0.09 * m * np.linalg.norm(c)
    assert abs(spectrum.coefficients.sum()) <= m * 2.0**-52 * abs(c).sum()


def test_a_direction_is_never_kept_below_the_rounding_of_the_stored_gradients(rng):
    thetas, grads = ill_conditioned(rng, 5, 3000, [1, 0.7, 5e-5, 2e-5], 1e3, np.float32)
    q = reference.quantities(grads)
    assert q.sigma[2] < q.floor / 2
    assert q.sigma[1] > q.floor * 2
    assert fn.spectrum(fn.gram(grads, precision="float64"), cutoff=1e-6).rank == 2
    assert_step(thetas, grads, lr=1.0, cutoff=1e-6)


@pytest.mark.parametrize("m", [3, 8, 33])
def test_a_direction_is_never_kept_below_the_rounding_of_the_gram_matrix(rng, m):
    """√(m·2⁻⁵²)·σ_1 is where σ_k² drowns in K's own rounding, however small the cutoff."""
    floor = np.sqrt(m * 2.0**-52)
    thetas, grads = ill_conditioned(rng, m, 2000, [1, *[0.5] * (m - 3), floor / 4], 1e-3)
    expected = assert_step(thetas, grads, lr=1.0, cutoff=1e-12)
    assert expected.rank == m - 2


@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_last_direction_is_never_kept(m):
    gram = fn.Gram(np.eye(m), np.ones(m), 1.0, 0.0)
    assert fn.spectrum(gram).rank == m - 1


# -- combine and apply_inverse -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "m"), of_every_dtype(1, 2, 3, 8, 33))
@pytest.mark.parametrize("precision", [None, "float64"])
@pytest.mark.parametrize("n", [1, 1023, 2051])
def test_combine_takes_any_coefficients(rng, dtype, precision, m, n):
    thetas, grads = (rng.standard_normal((m, n)).astype(DTYPES[dtype]) for _ in range(2))
    c, tau, beta = rng.standard_normal(m), 0.3, 0.02
    q = reference.quantities(grads, thetas)
    expected = q.theta_bar - tau * q.Theta @ c - beta * (q.g_bar - q.G @ c)
    found = fn.combine(thetas, grads, c, lr=tau, lr_rest=beta, precision=precision)
    unit = tolerances.UNIT[tolerances.computed_in(DTYPES[dtype], precision)]
    terms = abs(thetas.astype(np.float64)).max(0) + abs(grads.astype(np.float64)).max(0)
    # Each of 2m + 2 sums is no larger than all of its terms; then half an eps, and a float16 underflow.
    bound = (2 * m + 2) * unit * 2 * (1 + abs(c - c.mean()).sum()) * terms
    assert (abs(found.astype(np.float64) - expected) <= bound + q.eps * abs(expected) + 2.0**-24).all()


@pytest.mark.parametrize("m", [1, 3, 8, 33])
def test_combine_without_lr_rest_takes_lr_for_both(rng, m):
    thetas, grads = workers(rng, m, 1500, np.float32)
    c = rng.standard_normal(m)
    both = fn.combine(thetas, grads, c, lr=0.3, lr_rest=0.3)
    assert bits(fn.combine(thetas, grads, c, lr=0.3)) == bits(both)


WITH_Z_BESIDE_3 = [*(("float32", m) for m in (1, 8, 16, 33)), ("bfloat16", 33)]
WITH_Z = [
    pytest.param(dtype, m, marks=() if m == 3 or (dtype, m) in WITH_Z_BESIDE_3 else pytest.mark.full)
    for dtype in DTYPES
    for m in (1, 2, 3, 8, 16, 17, 33)
]


@pytest.mark.parametrize(("dtype", "m"), WITH_Z)
@pytest.mark.parametrize("n", [1, 1023, 4099])
def test_apply_inverse_is_equation_4(rng, dtype, m, n):
    thetas, grads = workers(rng, m, n, DTYPES[dtype])
    z = (rng.standard_normal(n) + 0.3 * (grads[0] - grads[-1]).astype(np.float64)).astype(DTYPES[dtype])
    expected = reference.apply_inverse(thetas, grads, z)
    assert_separated(expected.q, 0.1)
    d = fn.apply_inverse(thetas, grads, z)
    assert d.shape == (n,)
    assert d.dtype == DTYPES[dtype]
    assert distance(d, expected.d) <= tolerances.of_inverse(expected, DTYPES[dtype], tolerances.computed_in(d.dtype))


@pytest.mark.parametrize(("cutoff", "max_rank"), [(1e-6, None), (0.1, 1), (0.1, 0)])
def test_apply_inverse_takes_the_options_of_step(rng, cutoff, max_rank):
    thetas, grads = ill_conditioned(rng, 5, 3001, [1, 0.4, 1e-2, 1e-4], 1.0, np.float32)
    z = rng.standard_normal(3001).astype(np.float32)
    expected = reference.apply_inverse(thetas, grads, z, cutoff=cutoff, max_rank=max_rank)
    d = fn.apply_inverse(thetas, grads, z, cutoff=cutoff, max_rank=max_rank)
    compute = "float64" if cutoff < 1e-3 else "float32"
    assert distance(d, expected.d) <= tolerances.of_inverse(expected, np.float32, compute)


# -- layouts -------------------------------------------------------------------------------------------------


def strided(rows):
    wide = np.zeros((rows.shape[0], rows.shape[1] + 13), rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


def every_second_row(rows):
    tall = np.zeros((2 * rows.shape[0], rows.shape[1]), rows.dtype)
    tall[::2] = rows
    return tall[::2]


def off_by_one_element(rows):
    flat = np.zeros(rows.size + 1, rows.dtype)
    flat[1:] = rows.reshape(-1)
    return flat[1:].reshape(rows.shape)


def separate(rows):
    return [row.copy() for row in rows]


def tuple_of_shifted(rows):
    return tuple(off_by_one_element(row[None])[0] for row in rows)


def read_only(rows):
    rows = rows.copy()
    rows.flags.writeable = False
    return rows


LAYOUTS = [strided, every_second_row, off_by_one_element, separate, tuple_of_shifted, read_only]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "m"), WITH_Z)
@pytest.mark.parametrize("n", [1, 1025, 3001])
def test_bits_do_not_depend_on_the_layout(rng, layout, dtype, m, n):
    thetas, grads = workers(rng, m, n, DTYPES[dtype])
    z = grads[0].copy()
    expected, _ = fn.step(thetas, grads, lr=0.5)
    found, _ = fn.step(layout(thetas), layout(grads), lr=0.5)
    assert bits(found) == bits(expected)
    mixed, _ = fn.step(thetas, layout(grads), lr=0.5)
    assert bits(mixed) == bits(expected)
    assert bits(fn.gram(layout(grads), z).matrix) == bits(fn.gram(grads, z).matrix)
    inverse = fn.apply_inverse(layout(thetas), layout(grads), z)
    assert bits(inverse) == bits(fn.apply_inverse(thetas, grads, z))


@pytest.mark.parametrize("m", [2, 8])
@pytest.mark.parametrize("shift", [1, 3])
def test_bits_do_not_depend_on_where_out_lies(rng, m, shift):
    n = 2**22 + 1029  # beyond the size from which a result is written past the cache
    thetas, grads = (rng.standard_normal((m, n), dtype=np.float32) for _ in range(2))
    out = np.zeros(n + shift + 1, np.float32)
    expected, _ = fn.step(thetas, grads, lr=0.5)
    fn.step(thetas, grads, lr=0.5, out=out[shift:-1])
    assert bits(out[shift:-1]) == bits(expected)
    assert not out[:shift].any()
    assert out[-1] == 0


# -- threads -------------------------------------------------------------------------------------------------

THREADED = [
    ("float32", 2, 2**22 + 1029),
    ("float32", 8, 2**19 + 77),
    ("float64", 8, 2**18 + 77),
    ("bfloat16", 8, 2**19 + 77),
    ("float32", 33, 2**16 + 5),
    pytest.param("float16", 3, 2**20 + 1, marks=pytest.mark.full),
    pytest.param("float32", 128, 2**15 + 5, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("dtype", "m", "n"), THREADED)
def test_bits_do_not_depend_on_the_number_of_threads(rng, dtype, m, n):
    assert m * n >= 2**21
    thetas, grads = (rng.standard_normal((m, n), dtype=np.float32).astype(DTYPES[dtype]) for _ in range(2))
    z = grads[0].copy()
    found = set()
    for threads in (1, 2, 3, 7):
        with pool.set_thread_limit(threads):
            theta, _ = fn.step(thetas, grads, lr=0.5)
            gram = fn.gram(grads, z, thetas=thetas)
            found.add((bits(theta), bits(gram.matrix), bits(gram.projection), gram.norm2, bits(gram.cross_matrix)))
    assert len(found) == 1
    # ‖θ_new‖ alone would be the same for a piece of work that was forgotten in every run.
    expected = reference.step(thetas, grads, lr=0.5)
    assert distance(theta, expected.theta_new) <= tolerances.of_step(
        expected, DTYPES[dtype], tolerances.computed_in(DTYPES[dtype])
    )


THREAD_PROGRAM = """
import hashlib, threading
import numpy as np
import fastnewton as fn

rng = np.random.default_rng(7)
for dtype, m, n in (("float32", 8, 2**19 + 77), ("float64", 8, 2**18 + 77), ("float32", 33, 2**16 + 5)):
    thetas, grads = (rng.standard_normal((m, n)).astype(dtype) for _ in range(2))
    theta, info = fn.step(thetas, grads, lr=0.5)
    print(hashlib.sha256(theta.tobytes() + info.coefficients.tobytes()).hexdigest())
print("threads", threading.active_count())
"""


def test_bits_do_not_depend_on_the_thread_count_of_the_environment(run_python):
    def run(threads):
        return run_python(
            "-c", THREAD_PROGRAM, env={"NUMBA_NUM_THREADS": str(threads), "FASTNEWTON_NUM_THREADS": None}
        ).splitlines()

    (*one, threads_of_one), (*two, threads_of_two) = run(1), run(2)
    assert len(one) == 3
    assert one == two
    assert threads_of_one == "threads 1"
    assert threads_of_two == "threads 2"


def test_concurrent_callers_do_not_disturb_each_other(rng):
    thetas, grads = workers(rng, 8, 2**18 + 3, np.float32)
    expected = bits(fn.step(thetas, grads, lr=0.5)[0])
    found = []
    callers = [threading.Thread(target=lambda: found.append(bits(fn.step(thetas, grads, lr=0.5)[0]))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [expected] * 4


FORKING = """
import os, warnings
import numpy as np
import fastnewton as fn

rng = np.random.default_rng(3)
thetas, grads = rng.standard_normal((2, 8, 2**18), np.float32)  # large enough for threads
expected = fn.step(thetas, grads, lr=0.5)[0].tobytes()
warnings.simplefilter("ignore", DeprecationWarning)  # Python warns about any fork beside threads
child = os.fork()
if child == 0:
    os._exit(0 if fn.step(thetas, grads, lr=0.5)[0].tobytes() == expected else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own(run_python):
    assert run_python("-c", FORKING, env={"FASTNEWTON_NUM_THREADS": "2"}, timeout=120) == "0\n"


# -- more than 2³¹ elements ----------------------------------------------------------------------------------


@pytest.mark.full
def test_more_elements_than_32_bits_count(run_python):
    root = Path(__file__).parents[2]
    run_python(Path(__file__).with_name("many_elements.py"), env={"PYTHONPATH": str(root)}, timeout=600)
