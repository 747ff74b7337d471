"""A CUDA device that is not there: host memory and simulated kernels behind the part of CuPy that fastnewton uses."""

import contextlib
import ctypes
import types

import numpy as np

from . import module

CUDA = 2  # kDLCUDA


class Memory:
    def __init__(self, ptr):
        self.ptr = ptr


class ndarray:
    """An array on the simulated device; NumPy cannot read it by accident."""

    def __init__(self, host, device=0):
        self.host = host
        self.device = types.SimpleNamespace(id=device)

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    strides = property(lambda self: self.host.strides)
    nbytes = property(lambda self: self.host.nbytes)
    data = property(lambda self: Memory(self.host.ctypes.data))
    flags = property(lambda self: self.host.flags)

    def _of(self, host):
        return ndarray(np.asarray(host), self.device.id)

    def __len__(self):
        return len(self.host)

    def __getitem__(self, key):
        return self._of(self.host[key])

    def __setitem__(self, key, value):
        self.host[key] = value.host if isinstance(value, ndarray) else value

    def __iadd__(self, other):
        self.host += other.host
        return self

    def __array__(self, *_args, **_kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __dlpack_device__(self):
        return (CUDA, self.device.id)

    def __dlpack__(self, *, stream=None, **_options):
        log.append(("dlpack", stream))
        return posing(self.host, self.device.id)

    def get(self, **_options):
        log.append(("get", self.nbytes))
        return self.host.copy()

    def set(self, host):
        log.append(("set", self.nbytes))
        self.host[...] = host

    def reshape(self, *shape):
        return self._of(self.host.reshape(*shape))

    def view(self, dtype):
        return self._of(self.host.view(dtype))

    def astype(self, dtype):
        return self._of(self.host.astype(dtype))

    def transpose(self, *axes):
        return self._of(self.host.transpose(*axes))

    def sum(self, **options):
        return self._of(self.host.sum(**options))

    def item(self):
        return self.get().item()


log = []  # what a CUDA graph could not capture, and launches

_PyCapsule_GetPointer = ctypes.pythonapi.PyCapsule_GetPointer
_PyCapsule_GetPointer.restype, _PyCapsule_GetPointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def posing(host, device):
    """A DLPack capsule of host memory that says it lies on a CUDA device."""
    kind = np.uint16 if host.dtype.name == "bfloat16" else host.dtype
    capsule = host.view(kind).__dlpack__()
    tensor = _PyCapsule_GetPointer(capsule, b"dltensor")
    # DLTensor: data pointer, device (type, id), number of dimensions, dtype (code, bits, lanes)
    ctypes.c_int32.from_address(tensor + 8).value = CUDA
    ctypes.c_int32.from_address(tensor + 12).value = device
    if host.dtype.name == "bfloat16":
        ctypes.c_uint8.from_address(tensor + 20).value = 4
    return capsule


class _Stream:
    def __init__(self, ptr=0, device_id=0):
        self.ptr, self.device_id = ptr, device_id

    def __enter__(self):
        _streams.append(self)

    def __exit__(self, *_error):
        _streams.pop()

    def synchronize(self):
        log.append(("synchronize", self.ptr))

    def is_capturing(self):
        return capturing


class _Device:
    def __init__(self, id=None):
        self.id = _devices[-1] if id is None else id
        self.attributes = {"MultiProcessorCount": 3}

    def __enter__(self):
        _devices.append(self.id)

    def __exit__(self, *_error):
        _devices.pop()


_streams, _devices = [_Stream()], [0]
capturing = False


class _Kernel:
    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, kernel):
        self._kernel = kernel
        self.kernel = types.SimpleNamespace(ptr=id(self))

    def __call__(self, grid, block, args, *, shared_mem=0):
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise ValueError(f"{shared_mem} bytes of shared memory; only {self.max_dynamic_shared_size_bytes} allowed")
        log.append(("launch", self._kernel.name, _devices[-1], _streams[-1].ptr))
        self._kernel(grid, block, [_argument(value) for value in args], shared_mem=shared_mem)


def _argument(value):
    """CuPy passes NumPy arrays by value, and its own by their address."""
    if isinstance(value, np.ndarray):
        return np.void(value.tobytes())
    return value


class RawModule:
    def __init__(self, *, code, options):
        folder = next(given[2:] for given in options if given.startswith("-I"))
        self._module = module.SimModule(code=code, options=tuple(options))
        self._folder = folder

    def get_function(self, name):
        return _Kernel(self._module.get_function(name))


def empty(shape, dtype=np.float64):
    log.append(("allocate", shape))
    host = _aligned(shape, dtype)
    host.view(np.uint8)[...] = 0xFF
    return ndarray(host, _devices[-1])


def _aligned(shape, dtype):
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 512, np.uint8)
    start = -memory.ctypes.data % 512
    return memory[start : start + size].view(dtype).reshape(shape)


def asarray(values, dtype=None):
    if isinstance(values, ndarray):
        return values
    host = np.asarray(values, dtype)
    array = empty(host.shape, host.dtype)
    array.set(host)
    return array


def zeros(shape, dtype=np.float64):
    return asarray(np.zeros(shape, dtype))


def ones(shape, dtype=np.float64):
    return asarray(np.ones(shape, dtype))


def matmul(left, right):
    """In place of cuBLAS."""
    return left._of(left.host @ right.host)


def _eigh(matrix):
    """In place of cuSOLVER."""
    return tuple(map(matrix._of, np.linalg.eigh(matrix.host)))


linalg = types.SimpleNamespace(eigh=_eigh)
cuda = types.SimpleNamespace(
    is_available=lambda: True,
    Device=_Device,
    ExternalStream=_Stream,
    get_current_stream=lambda: _streams[-1],
    driver=types.SimpleNamespace(occupancyMaxActiveBlocksPerMultiprocessor=lambda _kernel, _threads, _shared: 1),
)


@contextlib.contextmanager
def capture():
    """As a CUDA graph would record it: yields the log of what happens inside."""
    global capturing
    capturing = True
    start = len(log)
    found = []
    try:
        yield found
    finally:
        capturing = False
        found.extend(log[start:])
