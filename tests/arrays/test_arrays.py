"""Arrays of NumPy, PyTorch, JAX and plain DLPack: in and out without a copy."""

import ctypes
import dataclasses
import weakref

import numpy as np
import pytest
from array_libraries import Capsule, Elsewhere, Library, OldCapsule
from problems import DTYPES, workers
from reads import reads

import fastnewton as fn

M, N = 3, 2050


def bits(array):
    return np.ascontiguousarray(array).tobytes()


@pytest.fixture(params=["numpy", "torch", "jax"])
def library(request):
    library = Library(request.param)
    if library.name == "jax":
        with library.module.enable_x64(True):
            yield library
    else:
        yield library


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_of_the_callers_kind(rng, library, dtype):
    thetas, grads = workers(rng, M, N, DTYPES[dtype])
    z = grads[1].copy()
    expected, expected_info = fn.step(thetas, grads, lr=0.5)
    theta, info = fn.step(library.make(thetas), library.make(grads), lr=0.5)
    inverse = fn.apply_inverse(library.make(thetas), library.make(grads), library.make(z))
    combined = fn.combine(library.make(thetas), library.make(grads), info.coefficients, lr=0.5)
    for result, known in (
        (theta, expected),
        (inverse, fn.apply_inverse(thetas, grads, z)),
        (combined, fn.combine(thetas, grads, info.coefficients, lr=0.5)),
    ):
        assert library.is_array(result)
        assert result.dtype == library.dtype(dtype)
        assert tuple(result.shape) == (N,)
        assert library.bits(result) == known.tobytes()
    assert info.coefficients.tobytes() == expected_info.coefficients.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 2050])
def test_result_lies_on_a_cache_line(rng, library, dtype, n):
    thetas, grads = (library.make(a) for a in workers(rng, M, n, DTYPES[dtype]))
    c = np.zeros(M)
    kept = [fn.step(thetas, grads, lr=0.5)[0] for _ in range(5)]
    kept += [fn.combine(thetas, grads, c, lr=0.5), fn.apply_inverse(thetas, grads, grads[0])]
    for result in kept:
        assert library.pointer(result) % 64 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_copy_in_or_out(rng, library, dtype):
    thetas, grads = (library.make(a) for a in workers(rng, M, N, DTYPES[dtype]))
    z = library.make(grads[0]) if library.name != "torch" else grads[0].clone()
    stride = N * DTYPES[dtype].itemsize
    first, second = (tuple(library.pointer(array) + k * stride for k in range(M)) for array in (thetas, grads))
    with reads() as seen:
        theta, _ = fn.step(thetas, grads, lr=0.5)
    assert seen == {"thetas": first, "grads": second, "out": (library.pointer(theta),)}
    with reads() as seen:
        inverse = fn.apply_inverse(thetas, grads, z)
    found = {"z": (library.pointer(z),), "out": (library.pointer(inverse),)}
    assert seen == {"thetas": first, "grads": second} | found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_sequence_of_vectors_is_taken_without_a_copy(rng, library, dtype, kind):
    thetas, grads = workers(rng, M, N, DTYPES[dtype])
    expected, _ = fn.step(thetas, grads, lr=0.5)
    rows = [kind(library.make(row) for row in matrix) for matrix in (thetas, grads)]
    with reads() as seen:
        theta, _ = fn.step(*rows, lr=0.5)
    assert seen["thetas"] == tuple(library.pointer(row) for row in rows[0])
    assert seen["grads"] == tuple(library.pointer(row) for row in rows[1])
    assert library.is_array(theta)
    assert theta.dtype == library.dtype(dtype)
    assert library.bits(theta) == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["numpy", "torch"], indirect=True)
def test_out_is_written_and_returned_itself(rng, library, dtype):
    thetas, grads = workers(rng, M, N, DTYPES[dtype])
    expected, _ = fn.step(thetas, grads, lr=0.5)
    inputs = library.make(thetas), library.make(grads)
    c = fn.spectrum(fn.gram(grads)).coefficients
    for call, known in (
        (lambda out: fn.step(*inputs, lr=0.5, out=out)[0], expected),
        (lambda out: fn.combine(*inputs, c, lr=0.5, out=out), expected),
        (
            lambda out: fn.apply_inverse(*inputs, inputs[0][0], out=out),
            fn.apply_inverse(thetas, grads, thetas[0]),
        ),
    ):
        out = library.make(np.ones(N, DTYPES[dtype]))
        before = library.pointer(out)
        with reads() as seen:
            assert call(out) is out
        assert seen["out"] == (library.pointer(out),) == (before,)
        assert library.bits(out) == known.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["numpy", "torch"], indirect=True)
def test_strided_and_shifted_rows_are_taken_without_a_copy(rng, library, dtype):
    thetas, grads = workers(rng, M, N, DTYPES[dtype])
    expected, _ = fn.step(thetas, grads, lr=0.5)
    wide = []
    for matrix in (thetas, grads):
        padded = np.zeros((2 * M, N + 9), DTYPES[dtype])
        padded[::2, 3 : N + 3] = matrix
        wide.append(library.make(padded)[::2, 3 : N + 3])
    with reads() as seen:
        theta, _ = fn.step(*wide, lr=0.5)
    assert seen["thetas"] == tuple(library.pointer(row) for row in wide[0])
    assert library.bits(theta) == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_lie_between_strided_rows(rng, dtype):
    thetas, grads = workers(rng, M, N, DTYPES[dtype])
    expected, _ = fn.step(thetas, grads, lr=0.5)
    table = np.zeros((M, 2 * N), DTYPES[dtype])
    table[:, :N] = grads
    out = table[1, N:]
    assert fn.step(thetas, table[:, :N], lr=0.5, out=out)[0] is out
    assert out.tobytes() == expected.tobytes()


def test_result_is_not_the_memory_of_an_earlier_one(rng, library):
    thetas, grads = (library.make(a) for a in workers(rng, M, N))
    first, _ = fn.step(thetas, grads, lr=0.5)
    before = library.bits(first)
    second, _ = fn.step(grads, thetas, lr=0.25)
    assert library.pointer(first) != library.pointer(second)
    assert library.bits(first) == before


def test_coefficients_come_from_any_library(rng, library):
    thetas, grads = workers(rng, M, N)
    c = fn.spectrum(fn.gram(grads)).coefficients
    expected = fn.combine(thetas, grads, c, lr=0.5)
    assert fn.combine(thetas, grads, library.make(c), lr=0.5).tobytes() == expected.tobytes()
    assert fn.combine(library.make(thetas), library.make(grads), c, lr=0.5).shape == (N,)


def test_small_matrices_are_float64_numpy_whatever_came_in(rng, library):
    thetas, grads = (library.make(a) for a in workers(rng, M, N, np.float32))
    gram = fn.gram(grads, thetas=thetas)
    spectrum = fn.spectrum(gram)
    _, info = fn.step(thetas, grads, lr=0.5)
    arrays = [gram.matrix, gram.projection, gram.theta_matrix, gram.cross_matrix]
    arrays += [spectrum.singular_values, spectrum.vectors, spectrum.coefficients]
    for array in [*arrays, info.singular_values, info.coefficients]:
        assert type(array) is np.ndarray
        assert array.dtype == np.float64
    assert type(gram.norm2) is type(gram.floor) is float
    assert type(spectrum.rank) is int


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_only_numpy_arrays_are_fine(rng, dtype):
    arrays = [*workers(rng, M, N, DTYPES[dtype]), rng.standard_normal(N).astype(DTYPES[dtype]), np.ones(M)]
    for array in arrays:
        array.flags.writeable = False
    thetas, grads, z, c = arrays
    assert np.isfinite(fn.step(thetas, grads, lr=0.5)[0].astype(float)).all()
    assert np.isfinite(fn.apply_inverse(list(thetas), list(grads), z).astype(float)).all()
    assert np.isfinite(fn.combine(thetas, grads, c, lr=0.5).astype(float)).all()
    assert np.isfinite(fn.gram(grads, z, thetas=thetas).matrix).all()


# -- what is only DLPack -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", [Capsule, OldCapsule])
def test_anything_with_dlpack_is_taken_without_a_copy(rng, dtype, kind):
    thetas, grads = workers(rng, M, N, DTYPES[dtype])
    expected, _ = fn.step(thetas, grads, lr=0.5)
    with reads() as seen:
        theta, _ = fn.step(kind(thetas), kind(grads), lr=0.5)
    assert seen["thetas"] == tuple(row.ctypes.data for row in thetas)
    assert seen["grads"] == tuple(row.ctypes.data for row in grads)
    assert np.from_dlpack(theta).tobytes() == expected.tobytes()
    rows, _ = fn.step([kind(row) for row in thetas], [kind(row) for row in grads], lr=0.5)
    assert np.from_dlpack(rows).tobytes() == expected.tobytes()


def test_read_only_dlpack_is_taken_as_input_and_refused_as_out(rng):
    thetas, grads = workers(rng, M, N)
    expected, _ = fn.step(thetas, grads, lr=0.5)
    out = np.full(N, 7.0)
    for array in (thetas, grads):
        array.flags.writeable = False
    writable = Capsule(out)
    assert fn.step(Capsule(thetas), Capsule(grads), lr=0.5, out=writable)[0] is writable
    assert out.tobytes() == expected.tobytes()
    out[:] = 7
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out"):
        fn.step(Capsule(thetas), Capsule(grads), lr=0.5, out=Capsule(out))
    assert (out == 7).all()


@pytest.mark.parametrize("name", ["thetas", "grads"])
def test_dlpack_on_another_device_is_a_type_error(rng, name):
    arrays = dict(zip(("thetas", "grads"), map(Capsule, workers(rng, M, N)), strict=True))
    arrays[name] = Elsewhere(arrays[name]._array)
    with pytest.raises(TypeError, match=f"{name} must be in CPU or CUDA memory"):
        fn.step(**arrays, lr=0.5)


# -- what other libraries need -----------------------------------------------------------------------------


def test_tensor_that_requires_grad_is_told_to_detach(rng):
    torch = pytest.importorskip("torch")
    thetas, grads = (torch.tensor(a) for a in workers(rng, M, N))
    thetas.requires_grad_()
    for argument in (
        thetas,
        list(thetas.unbind()),
        [torch.nn.Parameter(row.detach().clone()) for row in thetas],
    ):
        with pytest.raises(TypeError, match=r"thetas.*\.detach\(\)"):
            fn.step(argument, grads, lr=0.5)
    with pytest.raises(TypeError, match=r"grads.*\.detach\(\)"):
        fn.gram(thetas)
    with pytest.raises(TypeError, match=r"z.*\.detach\(\)"):
        fn.apply_inverse(grads, grads, thetas[0])
    out = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match=r"out.*\.detach\(\)"):
        fn.step(grads, grads, lr=0.5, out=out)
    assert not out.detach().any()
    assert fn.step(thetas.detach(), grads, lr=0.5)[0].requires_grad is False


def test_result_under_no_grad_and_inference_mode(rng):
    torch = pytest.importorskip("torch")
    thetas, grads = workers(rng, M, N)
    expected, _ = fn.step(thetas, grads, lr=0.5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            theta, _ = fn.step(torch.tensor(thetas), torch.tensor(grads), lr=0.5)
            assert theta.numpy().tobytes() == expected.tobytes()


def test_tensors_without_plain_memory_are_type_errors(rng):
    torch = pytest.importorskip("torch")
    thetas, grads = (torch.tensor(a) for a in workers(rng, M, N))
    for odd in (torch.empty((M, N), dtype=torch.float64, device="meta"), grads.to_sparse()):
        with pytest.raises(TypeError, match="grads"):
            fn.step(thetas, odd, lr=0.5)


def test_tracers_are_told_to_stay_outside_jit(rng):
    jax = pytest.importorskip("jax")
    thetas, grads = (jax.numpy.asarray(a) for a in workers(rng, M, N, np.float32))
    calls = [
        lambda traced: fn.step(traced, grads, lr=0.5)[0],
        lambda traced: fn.step(thetas, list(traced), lr=0.5)[0],
        lambda traced: fn.gram(traced).matrix.sum(),
        lambda traced: fn.apply_inverse(thetas, grads, traced[0]),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="outside jit"):
            jax.jit(call)(thetas)
        with pytest.raises(TypeError, match="outside jit"):
            jax.grad(lambda traced, call=call: call(traced).sum())(thetas)


def test_random_keys_of_jax_are_a_type_error(rng):
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match="grads must be float16"):
        fn.step(jax.numpy.ones((3, 2)), jax.random.split(jax.random.key(0), (3, 2)), lr=0.5)


def test_jax_array_still_being_computed_is_waited_for(rng):
    jax = pytest.importorskip("jax")
    thetas, grads = workers(rng, M, 2**18, np.float32)
    slow = jax.jit(lambda a: jax.lax.fori_loop(0, 50, lambda _, x: x * 1.0000001 - x * 1e-7, a))
    traced = slow(grads)
    theta, _ = fn.step(jax.numpy.asarray(thetas), traced, lr=0.5)
    expected, _ = fn.step(thetas, np.asarray(traced), lr=0.5)
    assert np.asarray(theta).tobytes() == expected.tobytes()


def test_jax_result_keeps_its_values_when_the_inputs_are_gone(rng):
    jax = pytest.importorskip("jax")
    thetas, grads = (jax.numpy.asarray(a) for a in workers(rng, M, N, np.float32))
    theta, _ = fn.step(thetas, grads, lr=0.5)
    before = np.asarray(theta).tobytes()
    device = theta.devices()
    assert device == thetas.devices()
    del thetas, grads
    waste = [np.full(N, 9, np.float32) for _ in range(100)]  # would take the memory if it had been freed
    assert np.asarray(theta).tobytes() == before
    assert np.asarray(jax.jit(lambda a: a + 0)(theta)).tobytes() == before
    assert all((other == 9).all() for other in waste)


# -- libraries are not mixed -------------------------------------------------------------------------------


def all_libraries():
    return [Library("numpy"), Library("torch"), Library("jax")]


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)])
def test_libraries_are_not_mixed(rng, pair):
    one, other = (all_libraries()[k] for k in pair)
    arrays = workers(rng, M, N, np.float32)
    thetas, grads = one.make(arrays[0]), one.make(arrays[1])
    foreign = other.make(arrays[1])
    with pytest.raises(TypeError, match="grads"):
        fn.step(thetas, foreign, lr=0.5)
    with pytest.raises(TypeError, match="grads"):
        fn.step(thetas, [grads[0], other.make(arrays[1][1]), grads[2]], lr=0.5)
    with pytest.raises(TypeError, match="grads"):
        fn.gram(foreign, thetas=thetas)
    with pytest.raises(TypeError, match="z"):
        fn.apply_inverse(thetas, grads, other.make(arrays[1][0]))
    with pytest.raises(TypeError, match="z"):
        fn.gram(grads, other.make(arrays[1][0]))
    out = other.make(np.ones(N, np.float32))
    with pytest.raises(TypeError, match="out"):
        fn.step(thetas, grads, lr=0.5, out=out)
    assert other.bits(out) == np.ones(N, np.float32).tobytes()


# -- unusual arrays ------------------------------------------------------------------------------------------


class Freeing:
    """An exporter whose memory is gone with the capsule."""

    def __init__(self, array):
        self._array, self.alive = array, 0

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **options):
        copy = self._array.copy()
        self.alive += 1
        weakref.finalize(copy, self._freed, copy.ctypes.data, copy.nbytes)
        return copy.__dlpack__(**{key: value for key, value in options.items() if key in ("max_version", "stream")})

    def _freed(self, address, nbytes):
        ctypes.memset(address, 0xFF, nbytes)
        self.alive -= 1


def test_exported_memory_is_kept_while_it_is_read(rng):
    thetas, grads = workers(rng, M, N)
    expected, _ = fn.step(thetas, grads, lr=0.5)
    given = [Freeing(array) for array in (thetas, grads)]
    assert bits(fn.step(*given, lr=0.5)[0]) == bits(expected)
    rows = [[Freeing(row) for row in array] for array in (thetas, grads)]
    assert bits(fn.step(*rows, lr=0.5)[0]) == bits(expected)
    assert not any(each.alive for each in (*given, *rows[0], *rows[1]))


def test_items_that_a_list_makes_anew_are_kept(rng):
    class Fresh(list):
        def __iter__(self):
            return (item.copy() for item in super().__iter__())

    thetas, grads = workers(rng, M, N)
    expected, _ = fn.step(thetas, grads, lr=0.5)
    assert bits(fn.step(Fresh(thetas), Fresh(grads), lr=0.5)[0]) == bits(expected)


def test_torch_results_are_in_cpu_memory_whatever_the_default_device(rng):
    torch = pytest.importorskip("torch")
    thetas, grads = (torch.tensor(a) for a in workers(rng, M, N))
    with torch.device("meta"):
        theta, _ = fn.step(thetas, grads, lr=0.5)
    assert theta.device.type == "cpu"
    assert torch.equal(theta, fn.step(thetas, grads, lr=0.5)[0])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of PyTorch's own
def test_lazy_and_differentiated_tensors_are_type_errors(rng):
    torch = pytest.importorskip("torch")
    from torch.autograd import forward_ad

    thetas, grads = (torch.tensor(a) for a in workers(rng, M, N))
    for strange in (torch._neg_view(grads), torch._efficientzerotensor((M, N), dtype=torch.float64), grads.to("meta")):
        with pytest.raises(TypeError, match="grads"):
            fn.step(thetas, strange, lr=0.5)
    with forward_ad.dual_level(), pytest.raises(TypeError, match="grads is being differentiated"):
        fn.step(thetas, forward_ad.make_dual(grads, torch.ones_like(grads)), lr=0.5)
    with pytest.raises(TypeError, match="grads is being differentiated or mapped"):
        torch.vmap(lambda given: fn.step(thetas, given, lr=0.5)[0])(grads[None])


def test_jax_float64_stays_float64(rng):
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        thetas, grads = (jax.numpy.asarray(a) for a in workers(rng, M, N))
    theta, _ = fn.step(thetas, grads, lr=0.5)
    assert theta.dtype == np.float64
    assert bits(theta) == bits(fn.step(np.asarray(thetas), np.asarray(grads), lr=0.5)[0])


def test_deleted_jax_arrays_are_type_errors(rng):
    jax = pytest.importorskip("jax")
    thetas, grads = (jax.numpy.asarray(a, np.float32) for a in workers(rng, M, N))
    grads.delete()
    with pytest.raises(TypeError, match="grads is a JAX array that was deleted"):
        fn.step(thetas, grads, lr=0.5)


def test_jax_arrays_of_several_devices(run_python):
    pytest.importorskip("jax")
    program = """
import jax, numpy as np, pytest
import fastnewton as fn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

first, second = jax.devices("cpu")
values = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
here, there = (jax.device_put(values, device) for device in (first, second))
with pytest.raises(TypeError, match="grads must be on the device of thetas, cpu; got cpu:1"):
    fn.step(here, there, lr=0.5)
assert fn.step(there, there, lr=0.5)[0].devices() == {second}
halves = jax.device_put(values, NamedSharding(Mesh([first, second], "x"), PartitionSpec("x")))
with pytest.raises(TypeError, match="grads must lie on one device; got a JAX array on 2"):
    fn.step(here, halves, lr=0.5)
"""
    run_python("-c", program, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"})


def test_masked_arrays_are_type_errors(rng):
    thetas, grads = workers(rng, M, N)
    with pytest.raises(TypeError, match="grads must not be a masked array"):
        fn.step(thetas, np.ma.masked_array(grads, grads > 1), lr=0.5)


def test_the_remedy_is_that_of_the_library(rng):
    torch = pytest.importorskip("torch")
    thetas, grads = workers(rng, M, 2 * N)
    with pytest.raises(ValueError, match=r"numpy\.ascontiguousarray\(thetas\)"):
        fn.step(thetas[:, ::2], grads[:, ::2], lr=0.5)
    with pytest.raises(ValueError, match=r"thetas\.contiguous\(\)"):
        fn.step(torch.tensor(thetas)[:, ::2], torch.tensor(grads)[:, ::2], lr=0.5)


def test_grams_made_by_hand(rng):
    found = fn.gram(workers(rng, 4, N)[1])
    made = fn.Gram(found.matrix.copy(), found.projection.copy(), 1.0, 0.0)
    assert fn.spectrum(made).rank == fn.spectrum(found).rank
    wrong = {
        "matrix": [found.matrix.tolist(), found.matrix.astype(np.float32), found.matrix[:3], found.matrix[:, ::-1]],
        "projection": [found.projection[:3], found.projection[None], found.projection.astype(">f8")],
        "norm2": ["1", None, np.ones(2)],
        "floor": ["1", None],
        "theta_matrix": [np.eye(3)],
        "cross_matrix": [np.eye(5)],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=r"gram\."):
                fn.spectrum(dataclasses.replace(made, **{name: value}))
