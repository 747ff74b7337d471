"""Which device, which stream, what waits and what is allocated: with simulated kernels behind real calls."""

import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from problems import DTYPES, workers

import fastnewton as fn
from fastnewton.kernels.cuda import jit, memory
from fastnewton.results import record_size

from . import device
from .checks import there

N = 1001


@pytest.fixture
def problem(rng, cupy):
    return tuple(map(there, workers(rng, 3, N, np.float32)))


class Exported:
    """An array of some library on a CUDA device, of which nothing is known but DLPack."""

    def __init__(self, array):
        self.array, self.streams = array, []

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        return device.posing(self.array.host, self.array.device.id)


def launches(log):
    return [entry for entry in log if entry[0] == "launch"]


# -- without a device ---------------------------------------------------------------------------------------


@pytest.fixture
def lonely(rng, monkeypatch):
    """Arrays on a CUDA device, and nothing to reach it with."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    jit.cupy.cache_clear()
    yield tuple(Exported(there(array)) for array in workers(rng, 3, N, np.float32))
    jit.cupy.cache_clear()


def test_without_cupy_the_error_names_the_extra(lonely):
    for call in (lambda: fn.step(*lonely, lr=0.5), lambda: fn.gram(lonely[1])):
        with pytest.raises(RuntimeError, match=r"pip install 'fastnewton\[cuda13\]'.*cuda12"):
            call()


def test_without_a_driver_the_error_says_so(lonely, monkeypatch):
    absent = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "cupy", absent)
    with pytest.raises(RuntimeError, match=r"no CUDA device.*driver"):
        fn.step(*lonely, lr=0.5)


def test_an_old_driver_is_told_of_the_other_extra(lonely, monkeypatch):
    absent = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "cupy", absent)
    with pytest.raises(RuntimeError, match=r"pip install 'fastnewton\[cuda12\]'"):
        fn.gram(lonely[1])


def test_show_config_says_what_is_missing(capsys, lonely):
    fn.show_config()
    assert "arrays on a CUDA device need CuPy" in capsys.readouterr().out


# -- devices and streams ------------------------------------------------------------------------------------


def test_work_is_on_the_current_stream_of_cupy(problem, recorded):
    with device.Stream(77):
        fn.step(*problem, lr=0.5)
    assert {entry[3] for entry in launches(recorded)} == {77}


def test_the_device_of_the_arrays_is_made_current(problem, recorded):
    elsewhere = [device.ndarray.of(array.host, 1) for array in problem]
    theta, _ = fn.step(*elsewhere, lr=0.5)
    assert {entry[2] for entry in launches(recorded)} == {1}
    assert theta.device.id == 1
    assert device.current_device() == 0


def test_exporters_are_told_the_stream(problem):
    thetas, grads = map(Exported, problem)
    expected, _ = fn.step(*problem, lr=0.5)
    theta, _ = fn.step(thetas, grads, lr=0.5)
    assert type(theta) is device.ndarray
    assert (theta.host == expected.host).all()
    with device.Stream(77):
        fn.step(thetas, grads, lr=0.5)
    assert thetas.streams == grads.streams == [1, 77]  # 1 is DLPack's name for the stream whose handle is 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_exporters_of_every_type(rng, cupy, dtype):
    given = [there(array) for array in workers(rng, 3, N, DTYPES[dtype])]
    expected, _ = fn.step(*given, lr=0.5)
    theta, _ = fn.step(*map(Exported, given), lr=0.5)
    assert theta.dtype == DTYPES[dtype]
    assert (theta.host == expected.host).all()
    rows, _ = fn.step(*([Exported(array[k]) for k in range(3)] for array in given), lr=0.5)
    assert (rows.host == expected.host).all()


class Tensor:
    """As much of a CUDA tensor of PyTorch as is looked at."""

    requires_grad = is_nested = is_cpu = False
    layout = "strided"

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, f"torch.{array.dtype}"
        self.device = types.SimpleNamespace(type="cuda", index=array.device.id)

    def is_neg(self):
        return False

    is_conj = is_neg

    def stride(self):
        return tuple(step // self.array.dtype.itemsize for step in self.array.strides)

    def data_ptr(self):
        return self.array.data.ptr


@pytest.fixture
def torch(monkeypatch):
    """A PyTorch that makes such tensors and works on stream 55."""
    made = types.SimpleNamespace(
        Tensor=Tensor,
        strided="strided",
        float32="float32",
        cuda=types.SimpleNamespace(current_stream=lambda _device: types.SimpleNamespace(cuda_stream=55)),
        autograd=types.SimpleNamespace(forward_ad=types.SimpleNamespace(_current_level=-1)),
        _C=types.SimpleNamespace(_functorch=types.SimpleNamespace(is_functorch_wrapped_tensor=lambda _tensor: False)),
        empty=lambda n, *, dtype, device: Tensor(globals()["device"].empty(n, dtype)),
    )
    monkeypatch.setitem(sys.modules, "torch", made)
    return made


def test_work_is_on_the_current_stream_of_torch(problem, torch, recorded):
    expected, _ = fn.step(*problem, lr=0.5)
    recorded.clear()
    theta, _ = fn.step(*map(Tensor, problem), lr=0.5)
    assert type(theta) is Tensor
    assert {entry[3] for entry in launches(recorded)} == {55}
    assert (theta.array.host == expected.host).all()


def test_coefficients_of_another_stream_are_waited_for(problem, torch, recorded):
    c = device.asarray(np.array([1.0, -2.0, 1.0]))
    expected = fn.combine(*problem, c, lr=0.5)
    recorded.clear()
    found = fn.combine(*map(Tensor, problem), c, lr=0.5)
    assert ("record", 0) in recorded
    assert ("wait", 55) in recorded
    assert (found.array.host == expected.host).all()


def test_memory_of_other_libraries_is_kept_until_the_stream_is_done(problem, monkeypatch):
    from fastnewton.arrays.cuda import _in_use

    thetas, grads = map(Exported, problem)
    monkeypatch.setattr(device.Event, "done", False)
    fn.step(thetas, grads, lr=0.5)
    held = [owner[0] for _, owners in _in_use for owner in owners]
    assert thetas in held
    assert grads in held
    monkeypatch.setattr(device.Event, "done", True)
    fn.step(*problem, lr=0.5)
    assert not _in_use


# -- waiting, allocating and graphs -------------------------------------------------------------------------


@pytest.mark.parametrize("lr_cap", [None, "curvature"])
def test_propagate_never_waits_and_can_be_captured(problem, lr_cap):
    out = there(np.zeros(N, np.float32))
    settings = {"lr": 0.5, "lr_cap": lr_cap, "nonfinite": "propagate", "out": out}
    expected, _ = fn.step(*problem, **settings)
    wanted = expected.host.copy()
    out.host[:] = 0
    with device.capture() as happened:
        _, info = fn.step(*problem, **settings)
    assert (out.host == wanted).all()
    assert sum(int(np.prod(shape)) for what, shape, *_ in happened if what == "allocate") <= record_size(3)
    assert {entry[0] for entry in happened} == {"allocate", "launch"}
    assert info.rank == fn.step(*problem, lr=0.5, lr_cap=lr_cap)[1].rank


@pytest.mark.parametrize("m", [3, pytest.param(33, marks=pytest.mark.full), 64])
@pytest.mark.parametrize("settings", [{}, {"nonfinite": "drop"}, {"lr_cap": "curvature"}])
def test_a_step_that_is_checked_waits_once(rng, recorded, m, settings):
    problem, out = tuple(map(there, workers(rng, m, N, np.float32))), there(np.zeros(N, np.float32))
    fn.step(*problem, lr=0.5, out=out, **settings)
    recorded.clear()
    fn.step(*problem, lr=0.5, out=out, **settings)
    assert [entry[0] for entry in recorded if entry[0] not in ("launch", "allocate")] == ["get"]
    assert sum(int(np.prod(shape)) for what, shape, *_ in recorded if what == "allocate") <= record_size(m)
    with pytest.raises(device.CaptureError), device.capture():
        fn.step(*problem, lr=0.5, out=out, **settings)


def test_info_is_read_when_looked_at_and_stays(problem, recorded):
    _, info = fn.step(*problem, lr=0.5, nonfinite="propagate")
    assert not [entry for entry in recorded if entry[0] == "get"]
    before = info.coefficients
    fn.step(problem[0], there(problem[1].host * 2), lr=0.25, nonfinite="propagate")
    assert (info.coefficients == before).all()
    assert info.lr == 0.5
    assert [entry[0] for entry in recorded].count("get") == 3


def test_threads_share_no_memory(problem):
    """A step is several launches, between which another thread's may come on the same stream."""
    fn.step(*problem, lr=0.5)
    own = len(memory._workspaces)
    thread = threading.Thread(target=fn.step, args=problem, kwargs={"lr": 0.5})
    thread.start()
    thread.join()
    assert len({array.data.ptr for array in memory._workspaces.values()}) == 2 * own > 0


def test_streams_share_no_memory_and_caches_are_cleared(problem):
    for stream in (5, 6):
        with device.Stream(stream):
            fn.step(*problem, lr=0.5)
    assert {key[1] for key in memory._workspaces} == {5, 6}
    places = [array.data.ptr for array in memory._workspaces.values()]
    assert len(set(places)) == len(places)
    fn.clear_caches()
    assert not memory._workspaces


# -- what must not be mixed ---------------------------------------------------------------------------------


def test_errors_name_the_argument(problem):
    thetas, grads = problem
    out = there(np.full(N, 7, np.float32))
    wrong = {
        "grads must be of the same library": (thetas, grads.get()),
        "thetas must be of the same library|grads must be of the same library": (thetas.get(), grads),
        "grads must be on the device of thetas, cuda:0; got cuda:1": (thetas, device.ndarray.of(grads.host, 1)),
        "grads must have the dtype": (thetas, grads.astype(np.float64)),
        "grads must be float16": (thetas, grads.astype(np.int32)),
        "grads must have unit stride.*cupy.ascontiguousarray": (thetas, grads[:, ::2]),
        "grads must have the shape": (thetas, grads[:2]),
    }
    for message, given in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            fn.step(*given, lr=0.5, out=out)
    for message, target in {
        "out must be of the same library": np.zeros(N, np.float32),
        "out must be on the device": device.ndarray.of(out.host, 1),
        "out must not overlap": grads[0],
        "out must have the length": out[:5],
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            fn.step(thetas, grads, lr=0.5, out=target)
    assert (out.host == 7).all()


def test_hand_made_grams_are_checked(problem):
    gram = fn.gram(problem[1])
    mixed = fn.Gram(gram.matrix.get(), gram.projection, gram.norm2, gram.floor)
    with pytest.raises(TypeError, match=r"gram\.matrix must be a float64 array.*cuda:0"):
        fn.spectrum(mixed)


def test_without_a_compiler_the_tests_skip(tmp_path):
    program = "from cudasim import build; print(build.why_unavailable())"
    paths = ":".join(filter(None, sys.path))
    told = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": str(tmp_path), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "g++ not found"
