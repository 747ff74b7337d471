"""On a real CUDA device, `pytest -m gpu`: the step against the reference, and arrays of each library in and out."""

import importlib.util

import numpy as np
import pytest

import fastnewton as fn

pytestmark = pytest.mark.gpu

LIBRARIES = ("cupy", "torch", "jax")
DTYPES = ("float32", "float64", "float16", "bfloat16")
# Of the distance between θ_new and θ̄; half a unit in the last place of what is stored, and the rounding of K.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="module", autouse=True)
def cupy():
    found = pytest.importorskip("cupy")
    if not found.cuda.is_available():
        pytest.skip("no CUDA device")
    return found


def problem(m, n, seed=0):
    rng = np.random.default_rng(seed)
    thetas, grads = rng.standard_normal((2, m, n))
    return thetas, grads + rng.standard_normal(n)


def made(library, dtype, values):
    """The values as an array of a library on the device, and as they were rounded in float64."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if library == "torch":
        import torch

        tensor = torch.tensor(values).to(getattr(torch, dtype)).cuda()
        return tensor, tensor.double().cpu().numpy()
    if library == "jax":
        import jax

        with jax.enable_x64(True):
            array = jax.device_put(jax.numpy.asarray(values).astype(dtype), jax.devices("gpu")[0])
        return array, np.asarray(array).astype(np.float64)
    if dtype == "bfloat16":
        pytest.skip("CuPy has no bfloat16 of its own")
    import cupy

    array = cupy.asarray(values.astype(dtype))
    return array, array.get().astype(np.float64)


def fetched(array):
    if type(array).__module__.startswith("torch"):
        return array.double().cpu().numpy()
    return (array.get() if hasattr(array, "get") else np.asarray(array)).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("m", [1, 2, 8, 13, 33, 64, 65])
def test_step_is_that_on_the_cpu(library, dtype, m):
    values = problem(m, 4099)
    (thetas, theta_values), (grads, grad_values) = (made(library, dtype, given) for given in values)
    expected, wanted = fn.step(theta_values, grad_values, lr=0.5)
    theta, info = fn.step(thetas, grads, lr=0.5)
    assert type(theta) is type(thetas)
    assert str(theta.dtype).removeprefix("torch.") == dtype
    scale = np.abs(expected).max()
    np.testing.assert_allclose(fetched(theta), expected, rtol=0, atol=TOLERANCE[dtype] * scale)
    assert info.rank == wanted.rank
    np.testing.assert_allclose(info.singular_values[: info.rank], wanted.singular_values[: info.rank], rtol=1e-4)


@pytest.mark.parametrize("m", [2, 8, 13, 33, 64])
def test_the_same_bits_in_every_run_and_alignment(cupy, m):
    thetas, grads = (cupy.asarray(given.astype(np.float32)) for given in problem(m, 100_003))
    first = fn.step(thetas, grads, lr=0.5)[0]
    shifted = [cupy.empty((m, 100_003 + 5), np.float32)[:, 5:] for _ in range(2)]
    for target, source in zip(shifted, (thetas, grads), strict=True):
        target[...] = source
    for again in (fn.step(thetas, grads, lr=0.5)[0], fn.step(*shifted, lr=0.5)[0]):
        assert (again == first).all()


def test_parts_of_the_step(cupy):
    values = problem(8, 5001)
    thetas, grads = (cupy.asarray(given) for given in values)
    for lr_cap in (None, "sigma", "curvature"):
        found, wanted = (fn.step(*given, lr=0.5, lr_cap=lr_cap)[1].lr for given in ((thetas, grads), values))
        assert found == pytest.approx(wanted, rel=1e-9)
    gram, wanted = fn.gram(grads, thetas=thetas), fn.gram(values[1], thetas=values[0])
    for name in ("matrix", "projection", "theta_matrix", "cross_matrix", "cross_projection"):
        cupy.testing.assert_allclose(getattr(gram, name), getattr(wanted, name), rtol=1e-9, atol=1e-9)
    spectrum = fn.spectrum(gram)
    step = fn.step(thetas, grads, lr=0.5)[0]
    assert (fn.combine(thetas, grads, spectrum.coefficients, lr=0.5) == step).all()
    z = grads[3].copy()
    inverse = fn.apply_inverse(thetas, grads, z)
    cupy.testing.assert_allclose(inverse, fn.apply_inverse(*values, values[1][3]), rtol=1e-9, atol=1e-9)


def test_nonfinite_input_is_found(cupy):
    thetas, grads = (cupy.asarray(given) for given in problem(5, 1000))
    grads[2, 7] = np.nan
    with pytest.raises(fn.NonFiniteError) as raised:
        fn.step(thetas, grads, lr=0.5)
    assert raised.value.workers == (2,)
    theta, info = fn.step(thetas, grads, lr=0.5, nonfinite="drop")
    keep = [0, 1, 3, 4]
    assert info.dropped == (2,)
    assert (theta == fn.step(list(thetas[keep]), list(grads[keep]), lr=0.5)[0]).all()
    thetas[1, 3] = np.inf
    assert fn.step(thetas, grads, lr=0.5, nonfinite="drop")[1].dropped == (1, 2)


def test_a_graph_replays_the_step(cupy):
    thetas, grads = (cupy.asarray(given) for given in problem(8, 20_000))
    out = cupy.empty(20_000)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        fn.step(thetas, grads, lr=0.5, nonfinite="propagate", out=out)
        stream.synchronize()
        stream.begin_capture()
        _, info = fn.step(thetas, grads, lr=0.5, nonfinite="propagate", out=out)
        graph = stream.end_capture()
        grads *= 2
        graph.launch(stream)
        stream.synchronize()
        expected, wanted = fn.step(thetas, grads, lr=0.5)
        assert (out == expected).all()
        np.testing.assert_array_equal(info.coefficients, wanted.coefficients)
    fn.clear_caches()


def test_work_is_on_the_stream_of_torch(cupy):
    torch = pytest.importorskip("torch")
    thetas, grads = (torch.tensor(given).cuda() for given in problem(8, 1 << 20))
    expected = fn.step(thetas, grads, lr=0.5)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.empty_like(grads)
        torch.cuda._sleep(50_000_000)
        late.copy_(grads)  # a step on another stream would read this memory before it is written
        found = fn.step(thetas, late, lr=0.5, nonfinite="propagate")[0]
    stream.synchronize()
    assert torch.equal(found, expected)


def test_out_and_errors(cupy):
    thetas, grads = (cupy.asarray(given) for given in problem(4, 100))
    out = cupy.full(100, 7.0)
    assert fn.step(thetas, grads, lr=0.5, out=out)[0] is out
    out = cupy.full(100, 7.0)
    for given in (grads.get(), grads.astype(np.float32), grads[:, ::2], grads[:3]):
        with pytest.raises((TypeError, ValueError), match="grads"):
            fn.step(thetas, given, lr=0.5, out=out)
    with pytest.raises(ValueError, match="overlap"):
        fn.step(thetas, grads, lr=0.5, out=grads[0])
    assert (out == 7).all()
