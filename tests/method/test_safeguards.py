"""Safeguards against vectors written out: the reference forms the whole step and measures it."""

import copy
import dataclasses
import functools
import pickle

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, orthonormal, workers

import fastnewton as fn
from fastnewton.kernels.cpu import combine

OFF = {"min_cosine": None, "max_coefficient": None, "curvature": "keep", "max_newton_norm": None}
MARGIN = 1e-9  # of the comparisons: sums over coordinates in float64 are right to it


def only(**guards):
    """Safeguards of which these alone are on."""
    return fn.Safeguards(**(OFF | guards))


@dataclasses.dataclass
class Guarded:
    """What a step with safeguards should be."""

    theta: np.ndarray
    reason: str
    rank: int
    lr: float
    lr_rest: float
    margin: float = np.inf  # how far the closest comparison was from going the other way, relatively


def guarded(thetas, grads, guards, *, lr, lr_rest=None, cutoff=0.1):
    """The step with safeguards, from vectors of length n."""
    q = reference.quantities(grads, thetas)
    inverse = reference.inverse_of(q, q.g_bar, cutoff=cutoff)
    beta, j = lr if lr_rest is None else lr_rest, inverse.rank
    fallback = reference.capped(min(lr, beta), "curvature", q, j) if guards.fallback_lr is None else guards.fallback_lr
    A = q.V[:, :j] / q.sigma[:j]
    U, P = q.G @ A, q.Theta @ A
    margins = []

    def beyond(value, bound):
        margins.append(abs(value - bound) / max(abs(value), abs(bound), 1e-300))
        return value > bound

    mu, W = np.linalg.eigh((U.T @ P + P.T @ U) / 2)
    bent = mu <= 0 if guards.curvature != "keep" else np.zeros(j, bool)
    margins += [*abs(mu) / abs(mu).max()] if guards.curvature != "keep" and j else []
    along = W.T @ U.T @ q.g_bar
    of_thetas = np.where(bent, -along if guards.curvature == "abs" else 0, along)
    of_grads = along if guards.curvature == "abs" else of_thetas
    newton, rest = P @ W @ of_thetas, q.g_bar - U @ W @ of_grads
    rank = j - bent.sum() if guards.curvature == "drop" else j
    reason = "curvature" if bent.any() else "accepted"
    largest = max(np.abs(A @ W @ weights).max(initial=0) for weights in (of_thetas, of_grads))
    sgd = functools.partial(Guarded, q.theta_bar - fallback * q.g_bar, rank=0, lr=fallback, lr_rest=fallback)
    if guards.max_coefficient is not None and beyond(largest, guards.max_coefficient):
        return sgd(reason="coefficient", margin=min(margins))
    tau = lr
    if guards.max_newton_norm is not None:
        spread = np.sqrt(np.mean(np.sum(q.Theta**2, axis=0)))
        longest = guards.max_newton_norm * spread
        if beyond(lr * np.linalg.norm(newton), longest):
            tau, reason = longest / np.linalg.norm(newton), "newton_norm"
    s = tau * newton + beta * rest
    if guards.min_cosine is not None and np.linalg.norm(s) * np.linalg.norm(q.g_bar) > 0:
        cosine = s @ q.g_bar / np.linalg.norm(s) / np.linalg.norm(q.g_bar)
        margins.append(abs(cosine - guards.min_cosine))
        summands = tau * np.linalg.norm(newton) + beta * np.linalg.norm(q.g_bar)
        margins.append((np.linalg.norm(s) / summands) ** 2)  # a step that is all rounding has no direction
        if cosine < guards.min_cosine:
            return sgd(reason="cosine", margin=min(margins))
    return Guarded(q.theta_bar - s, reason, int(rank), tau, beta, min(margins, default=np.inf))


def assert_guarded(thetas, grads, guards, *, tolerance=1e-9, step=fn.step, **options):
    """A step with safeguards is that of the reference, and says so; the reason."""
    wanted = guarded(thetas, grads, guards, **options)
    if wanted.margin < MARGIN:
        return None
    theta, info = step(thetas, grads, safeguards=guards, **options)
    scale = np.abs(wanted.theta).max(initial=0) + np.abs(reference.as_float64(thetas)).max(initial=0)
    assert info.reason == wanted.reason
    assert info.accepted == (wanted.reason in ("accepted", "curvature", "newton_norm"))
    assert np.abs(theta.astype(np.float64) - wanted.theta).max(initial=0) <= tolerance * scale
    assert (info.rank, info.lr_rest) == (wanted.rank, pytest.approx(wanted.lr_rest, rel=1e-6))
    assert info.lr == pytest.approx(wanted.lr, rel=1e-6)
    return wanted.reason


def quadratic(rng, m, eigenvalues, spread=1.0):
    """(thetas, grads, H) of workers around a random point, J = ½θᵀHθ."""
    n = len(eigenvalues)
    Q = orthonormal(rng, n, n)
    H = (Q * eigenvalues) @ Q.T
    thetas = rng.standard_normal(n) + spread * rng.standard_normal((m, n))
    return thetas, thetas @ H, H


def value(H, theta):
    return theta @ H @ theta / 2


INDEFINITE = np.array([-2.0, -0.5, 0.4, 1.0, 1.5, 3.0])
QUADRATIC = {"lr": 1.0, "cutoff": 1e-4}  # all six directions are kept

# -- against the reference ----------------------------------------------------------------------------------

bound = st.none() | st.floats(0.01, 10)
GUARDS = st.builds(
    fn.Safeguards,
    min_cosine=st.none() | st.floats(0, 0.95),
    max_coefficient=bound,
    curvature=st.sampled_from(["keep", "drop", "abs"]),
    max_newton_norm=bound,
    fallback_lr=st.none() | st.floats(0, 1),
)


@settings(max_examples=150)
@given(
    guards=GUARDS,
    m=st.integers(1, 12),
    n=st.integers(1, 40),
    seed=st.integers(0, 1 << 30),
    lr=st.floats(0, 2),
    lr_rest=st.none() | st.floats(0, 2),
    cutoff=st.sampled_from([0.9, 0.1, 1e-3]),
)
def test_any_guards_on_any_step(guards, m, n, seed, lr, lr_rest, cutoff):
    rng = np.random.default_rng(seed)
    eigenvalues = rng.choice([-1, 1], n, p=[0.3, 0.7]) * np.exp(rng.uniform(-2, 2, n))
    thetas, grads, _ = quadratic(rng, m, eigenvalues)
    assert_guarded(thetas, grads, guards, lr=lr, lr_rest=lr_rest, cutoff=cutoff)


def test_those_examples_meet_every_reason(rng):
    guards = [only(), only(curvature="abs"), only(max_newton_norm=0.1), only(max_coefficient=0.1), only(min_cosine=0.9)]
    thetas, grads, _ = quadratic(rng, 8, INDEFINITE)
    reasons = [assert_guarded(thetas, grads, each, **QUADRATIC) for each in guards]
    assert reasons == ["accepted", "curvature", "newton_norm", "coefficient", "cosine"]


@pytest.mark.parametrize("m", [2, 8, 20, pytest.param(40, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_number_of_workers(rng, dtype, m):
    thetas, grads = workers(rng, m, 3001, DTYPES[dtype])
    tolerance = 8 * reference.eps_of(DTYPES[dtype])  # of the sum in `combine`, and of storing
    for curvature in ("keep", "drop", "abs"):
        assert_guarded(thetas, grads, only(curvature=curvature), lr=0.7, lr_rest=0.3, tolerance=tolerance)
    reason = assert_guarded(thetas, grads, only(max_newton_norm=1e-3), lr=0.7, lr_rest=0.3, tolerance=tolerance)
    assert reason == "newton_norm"


def test_large_curvature_is_judged_right(rng):
    """The complement is then all rounding beside ḡ, and yet longer than Newton's part in float32."""
    thetas, grads, _ = quadratic(rng, 12, np.geomspace(1e5, 1e6, 8))
    thetas, grads = thetas.astype(np.float32), grads.astype(np.float32)
    _, info = fn.step(thetas, grads, lr=1.0, cutoff=1e-2, safeguards=only(min_cosine=0.1))
    assert (info.reason, info.rank) == ("accepted", 8)


def test_rounding_is_no_ascent():
    """With one coordinate all of ḡ is captured, and the step is zero but for rounding, of either sign."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        thetas, grads, _ = quadratic(rng, 2, rng.uniform(0.5, 2, 1))
        _, info = fn.step(thetas, grads, lr=0.0, lr_rest=1.0, cutoff=0.9, safeguards=only(min_cosine=0.0))
        assert (info.reason, info.rank) == ("accepted", 1)


# -- the saddle ---------------------------------------------------------------------------------------------


def test_keep_goes_to_the_saddle_and_abs_descends(rng):
    thetas, grads, H = quadratic(rng, 8, INDEFINITE)
    start, g_bar = thetas.mean(0), grads.mean(0)
    kept, info = fn.step(thetas, grads, safeguards=only(), **QUADRATIC)
    assert (info.reason, info.rank) == ("accepted", 6)
    np.testing.assert_allclose(kept, 0, atol=1e-9)  # the saddle, from either side
    unguarded, _ = fn.step(thetas, grads, **QUADRATIC)
    np.testing.assert_allclose(unguarded, 0, atol=1e-9)  # the paper's step does not take absolute values by itself
    theta, info = fn.step(thetas, grads, safeguards=only(curvature="abs"), **QUADRATIC)
    mu, Q = np.linalg.eigh(H)
    np.testing.assert_allclose(start - theta, Q @ ((Q.T @ g_bar) / abs(mu)), atol=1e-9)  # |H|⁻¹ḡ
    assert (info.reason, info.rank) == ("curvature", 6)
    assert value(H, theta) < min(value(H, start), value(H, kept))
    theta, info = fn.step(thetas, grads, safeguards=only(curvature="drop"), **QUADRATIC)
    positive = mu > 0
    wanted = Q @ np.where(positive, (Q.T @ g_bar) / mu, Q.T @ g_bar)
    np.testing.assert_allclose(start - theta, wanted, atol=1e-9)  # gradient descent where J bends down
    assert (info.reason, info.rank) == ("curvature", 4)
    assert value(H, theta) < min(value(H, start), value(H, kept))


def test_repeated_steps_stay_at_the_saddle_or_leave_it(rng):
    H = np.diag(INDEFINITE)
    found = {}
    for curvature in ("keep", "abs"):
        w = np.full(6, 1e-3)
        for _ in range(12):
            thetas = w + 0.1 * np.linalg.norm(H @ w) * rng.standard_normal((8, 6))
            w, _ = fn.step(thetas, thetas @ H, safeguards=only(curvature=curvature), **QUADRATIC)
        found[curvature] = value(H, w)
    assert abs(found["keep"]) < 1e-15
    assert found["abs"] < -1e-3  # an unbounded J: the way down doubles with each step


def test_negative_curvature_that_no_singular_direction_shows(rng):
    """M = [[1, 2], [2, 1]] has a positive diagonal, v_kᵀΘᵀGv_k > 0, and a direction of curvature −1."""
    n, sigma = 5, np.array([1.0, 0.8])
    U, W = orthonormal(rng, n, 2), orthonormal(rng, 3, 2, but=np.ones(3))
    G, Theta = (U * sigma) @ W.T, U @ np.array([[1.0, 2], [2, 1]]) @ (W * sigma).T
    assert (np.diag(W.T @ Theta.T @ G @ W) > 0).all()
    g_bar = U @ np.array([1.0, -1.0])
    thetas, grads = Theta.T.copy(), G.T + g_bar[None]
    grads = np.ascontiguousarray(grads)
    kept, _ = fn.step(thetas, grads, lr=1.0)
    theta, info = fn.step(thetas, grads, lr=1.0, safeguards=only(curvature="abs"))
    np.testing.assert_allclose(kept, g_bar, atol=1e-12)  # along +ḡ: uphill
    np.testing.assert_allclose(theta, -g_bar, atol=1e-12)
    assert info.reason == "curvature"
    assert fn.step(thetas, grads, lr=1.0, safeguards=only(curvature="drop"))[1].rank == 1


# -- fall-back and caps -------------------------------------------------------------------------------------


def test_fall_back_is_averaged_sgd(rng):
    thetas, grads, _ = quadratic(rng, 8, INDEFINITE)
    for guards, reason in ((only(min_cosine=0.99), "cosine"), (only(max_coefficient=1e-3), "coefficient")):
        theta, info = fn.step(thetas, grads, safeguards=dataclasses.replace(guards, fallback_lr=0.05), **QUADRATIC)
        np.testing.assert_allclose(theta, reference.averaged_sgd(thetas, grads, 0.05), rtol=1e-14)
        assert (info.accepted, info.reason, info.rank, info.captured) == (False, reason, 0, 0)
        assert (info.lr, info.lr_rest) == (0.05, 0.05)
        assert not info.coefficients.any()
        theta, info = fn.step(thetas, grads, safeguards=guards, **QUADRATIC)
        assert info.lr == pytest.approx(1 / 3, rel=1e-9)  # 1/(largest curvature)
        np.testing.assert_allclose(theta, reference.averaged_sgd(thetas, grads, info.lr), rtol=1e-12)
        assert fn.step(thetas, grads, lr=1.0, lr_rest=0.01, cutoff=1e-4, safeguards=guards)[1].lr == 0.01


def test_newton_part_is_no_longer_than_told(rng):
    thetas, grads, _ = quadratic(rng, 8, abs(INDEFINITE))
    _, full = fn.step(thetas, grads, lr_rest=0.2, **QUADRATIC)
    Theta = (thetas - thetas.mean(0)).T
    spread = np.linalg.norm(Theta) / np.sqrt(8)
    theta, info = fn.step(thetas, grads, lr_rest=0.2, safeguards=only(max_newton_norm=0.25), **QUADRATIC)
    newton = info.lr * Theta @ info.coefficients
    assert np.linalg.norm(newton) == pytest.approx(0.25 * spread, rel=1e-12)
    np.testing.assert_array_equal(
        info.coefficients, fn.step(thetas, grads, safeguards=only(), **QUADRATIC)[1].coefficients
    )
    assert (info.accepted, info.reason, info.lr_rest) == (True, "newton_norm", 0.2)
    assert info.lr < full.lr
    rest = grads.mean(0) - (grads - grads.mean(0)).T @ info.coefficients
    np.testing.assert_allclose(theta, thetas.mean(0) - newton - 0.2 * rest, atol=1e-12)


def test_what_lies_within_the_bounds_is_the_step_without(rng):
    thetas, grads = workers(rng, 8, 4001, np.float64)
    for options in (
        {"lr": 0.7},
        {"lr": 50.0, "lr_cap": "sigma"},
        {"lr": 50.0, "lr_cap": "curvature"},
        {"lr": 0.7, "max_rank": 2},
    ):
        theta, info = fn.step(thetas, grads, safeguards=only(), **options)
        wanted, without = fn.step(thetas, grads, **options)
        np.testing.assert_allclose(theta, wanted, atol=1e-12)  # K is summed in another order
        assert (info.rank, info.reason) == (without.rank, without.reason) == (without.rank, "accepted")
        assert (info.accepted, without.accepted) == (True, True)
        assert info.lr == pytest.approx(without.lr, rel=1e-12)


@pytest.mark.parametrize("curvature", ["keep", "drop", "abs"])
def test_nothing_to_judge_is_accepted(rng, curvature):
    guards = fn.Safeguards(min_cosine=0.99, curvature=curvature)
    point, gradient = rng.standard_normal((2, 1, 7))
    cases = {
        "one worker": (point, gradient, 0.5),
        "one point": (np.tile(point, (4, 1)), np.tile(gradient, (4, 1)), 0.5),
        "no gradient": (rng.standard_normal((4, 7)), np.zeros((4, 7)), 0.5),
        "no coordinates": (np.zeros((4, 0)), np.zeros((4, 0)), 0.5),
        "no step": (*rng.standard_normal((2, 4, 7)), 0.0),
    }
    for what, (thetas, grads, lr) in cases.items():
        theta, info = fn.step(thetas, grads, lr=lr, safeguards=guards)
        assert info.accepted, what
        np.testing.assert_allclose(theta, reference.averaged_sgd(thetas, grads, lr), atol=1e-12, err_msg=what)


def test_two_equal_vectors_of_coefficients_are_one(rng):
    for m in (3, 20):
        thetas, grads = workers(rng, m, 3001, np.float32)
        given = [fn.arrays.rows(array, "array") for array in (thetas, grads)]
        found, c = [], rng.standard_normal(m)
        for weights in (c, np.tile(c, 2)):
            out = np.empty(3001, np.float32)
            combine.combine(*given, weights, tau=0.7, beta=0.3, out=fn.arrays.single(out, "out"), compute="float32")
            found.append(out)
        np.testing.assert_array_equal(*found)


# -- not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", ["raise", "drop", "propagate"])
def test_a_direction_that_overflows_falls_back(rng, nonfinite):
    signs = (-1.0) ** np.arange(4)[:, None]
    thetas, grads = rng.standard_normal((2, 4, 50))
    guards = fn.Safeguards(fallback_lr=1e-200)
    cases = {
        "K": (thetas, 1e200 * signs * (1 + abs(grads)), 1.0),
        "ΘᵀΘ": (1e200 * thetas, grads, 1.0),
        "the result": (thetas, grads, 1.5e308),
    }
    for what, (first, second, lr) in cases.items():
        theta, info = fn.step(first, second, lr=lr, nonfinite=nonfinite, safeguards=guards)
        assert (info.accepted, info.reason, info.dropped) == (False, "nonfinite", ()), what
        np.testing.assert_allclose(theta, reference.averaged_sgd(first, second, 1e-200), rtol=1e-12, atol=1e-13)
    with pytest.raises(fn.NonFiniteError, match="overflow"):
        fn.step(*cases["K"][:2], lr=1.0)


def test_averaged_sgd_that_overflows_is_an_error(rng):
    thetas, grads = rng.standard_normal((2, 4, 50))
    guards = fn.Safeguards(fallback_lr=1e308)
    with pytest.raises(fn.NonFiniteError, match="overflow"):
        fn.step(thetas, 1e200 * grads, lr=1.0, safeguards=guards)


@pytest.mark.parametrize("where", [0, 1])
def test_input_that_is_not_finite_is_treated_as_without(rng, where):
    given = rng.standard_normal((2, 5, 50))
    given[where, 2, 7] = np.nan
    guards = fn.Safeguards()
    with pytest.raises(fn.NonFiniteError) as raised:
        fn.step(*given, lr=0.5, safeguards=guards)
    assert raised.value.workers == (2,)
    theta, info = fn.step(*given, lr=0.5, nonfinite="drop", safeguards=guards)
    healthy = np.delete(given, 2, axis=1)
    wanted, others = fn.step(*healthy, lr=0.5, safeguards=fn.Safeguards())
    np.testing.assert_array_equal(theta, wanted)
    assert (info.dropped, info.reason) == ((2,), others.reason)
    theta, info = fn.step(*given, lr=0.5, nonfinite="propagate", safeguards=guards)
    assert np.isnan(theta[7])
    assert not info.accepted


# -- the object ---------------------------------------------------------------------------------------------


def test_one_set_of_guards_gives_several_reasons(rng):
    thetas, grads, _ = quadratic(rng, 8, INDEFINITE)
    guards = fn.Safeguards(min_cosine=0.5, curvature="abs", max_newton_norm=1.5, max_coefficient=None)
    reasons = {
        fn.step(thetas, grads, cutoff=cutoff, lr=lr, lr_rest=1.0, safeguards=guards)[1].reason
        for cutoff in (1e-4, 0.5)
        for lr in (1e-3, 0.1, 1.0, 10.0)
    }
    assert len(reasons) > 1


def test_it_is_a_value(rng):
    guards, same = fn.Safeguards(), fn.Safeguards()
    fn.step(*workers(rng, 3, 10), lr=0.5, safeguards=guards)
    assert guards == same
    assert hash(guards) == hash(same)
    assert repr(guards) == repr(same)
    assert guards != fn.Safeguards(curvature="abs")
    with pytest.raises(dataclasses.FrozenInstanceError):
        guards.min_cosine = 0.5
    for other in (copy.deepcopy(guards), pickle.loads(pickle.dumps(guards))):
        assert other == guards
    assert fn.Safeguards(min_cosine=np.float32(0.5)) == fn.Safeguards(min_cosine=0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"min_cosine": 1.0}, ValueError, ["min_cosine", "below 1", "1.0"]),
        ({"min_cosine": -0.1}, ValueError, ["min_cosine", "-0.1"]),
        ({"min_cosine": "small"}, TypeError, ["min_cosine", "str"]),
        ({"max_coefficient": np.nan}, ValueError, ["max_coefficient", "nan"]),
        ({"max_newton_norm": np.inf}, ValueError, ["max_newton_norm", "inf"]),
        ({"max_newton_norm": -1}, ValueError, ["max_newton_norm", "-1"]),
        ({"fallback_lr": True}, TypeError, ["fallback_lr", "bool"]),
        ({"curvature": "flip"}, ValueError, ["curvature", "flip", "keep", "drop", "abs"]),
        ({"curvature": None}, TypeError, ["curvature", "None"]),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as raised:
        fn.Safeguards(**arguments)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("given", [True, "on", {"min_cosine": 0.1}, fn.Safeguards])
def test_what_is_no_safeguards(given):
    out = np.full(3, 7.0)
    with pytest.raises(TypeError, match=r"safeguards must be a fastnewton\.Safeguards or None"):
        fn.step(np.ones((2, 3)), np.ones((2, 3)), lr=0.5, safeguards=given, out=out)
    assert (out == 7).all()


def test_a_subclass_that_cannot_be_hashed_guards_as_its_base_does(rng):
    @dataclasses.dataclass(frozen=True)
    class Named(fn.Safeguards):
        names: list = dataclasses.field(default_factory=list)

    thetas, grads, _ = quadratic(rng, 8, INDEFINITE)
    theta, info = fn.step(thetas, grads, lr=0.5, safeguards=Named(min_cosine=0.5))
    expected, wanted = fn.step(thetas, grads, lr=0.5, safeguards=fn.Safeguards(min_cosine=0.5))
    np.testing.assert_array_equal(theta, expected)
    assert info.reason == wanted.reason
