"""A CUDA device that is not there: host memory and simulated kernels behind the part of CuPy that fastnewton uses.

Used in place of the module `cupy`.  `log` holds what happened on the device, in order; in a `capture()`, what a CUDA
graph could not record raises.  An asynchronous copy is made when something waits for it, or a kernel is launched.
"""

import contextlib
import ctypes
import math
import types

import numpy as np

from . import module

CUDA = 2  # kDLCUDA

log = []
in_flight = []  # copies
capturing = False


class CaptureError(RuntimeError):
    """What cannot be recorded was tried while a graph was being captured."""


def _happened(what, *details, recordable=False):
    if capturing and not recordable:
        raise CaptureError(f"{what} while a graph is captured")
    log.append((what, *details))


@contextlib.contextmanager
def capture():
    """As while a CUDA graph is captured; yields the log of what happens inside."""
    global capturing
    capturing, start, found = True, len(log), []
    try:
        yield found
    finally:
        capturing = False
        found.extend(log[start:])


# -- arrays -------------------------------------------------------------------------------------------------


class Pointer:
    def __init__(self, memory, offset=0):
        self.memory, self.ptr = memory, memory.ptr + offset


class ndarray:
    """An array on the simulated device; NumPy cannot read it by accident."""

    def __init__(self, shape, dtype=float, memptr=None, strides=None):
        interface = {"shape": tuple(shape), "typestr": np.dtype(dtype).str, "data": (memptr.ptr, False), "version": 3}
        if strides is not None:
            interface["strides"] = tuple(strides)
        owner = type("Memory", (), {"__array_interface__": interface, "memory": memptr.memory})()
        self.host, self.device = np.asarray(owner), Device()

    @classmethod
    def of(cls, host, device):
        """The array whose values are in this host memory."""
        array = cls.__new__(cls)
        array.host, array.device = np.asarray(host), Device(device)
        return array

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    strides = property(lambda self: self.host.strides)
    nbytes = property(lambda self: self.host.nbytes)
    data = property(lambda self: types.SimpleNamespace(ptr=self.host.ctypes.data))
    flags = property(lambda self: self.host.flags)

    def _of(self, host):
        return ndarray.of(host, self.device.id)

    def __len__(self):
        return len(self.host)

    def __getitem__(self, key):
        # NumPy makes a number of a single element; CuPy an array without dimensions.
        return self._of(self.host[key] if np.ndim(self.host[key]) else self.host[..., None][key].reshape(()))

    def __setitem__(self, key, value):
        self.host[key] = value.host if isinstance(value, ndarray) else value

    def __iadd__(self, other):
        self.host += other.host
        return self

    def __array__(self, *_args, **_kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __dlpack_device__(self):
        return (CUDA, self.device.id)

    def __dlpack__(self, *, stream=None):
        log.append(("dlpack", stream))
        return posing(self.host, self.device.id)

    def get(self, **_options):
        _happened("get", self.nbytes)
        _arrive()
        return self.host.copy()

    def item(self):
        return self.get().item()

    def reshape(self, *shape):
        return self._of(self.host.reshape(*shape))

    def view(self, dtype):
        return self._of(self.host.view(dtype))

    def astype(self, dtype, copy=True):
        return self._of(self.host.astype(dtype, copy=copy))

    def transpose(self, *axes):
        return self._of(self.host.transpose(*axes))

    def sum(self, **options):
        return self._of(self.host.sum(**options))


_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def posing(host, device):
    """A DLPack capsule of host memory that says it lies on a CUDA device."""
    bfloat16 = host.dtype.name == "bfloat16"
    capsule = (host.view(np.uint16) if bfloat16 else host).__dlpack__()
    tensor = _pointer_in(capsule, b"dltensor")
    # DLTensor: data pointer, device (kind, number), number of dimensions, dtype (code, bits, lanes)
    ctypes.c_int32.from_address(tensor + 8).value = CUDA
    ctypes.c_int32.from_address(tensor + 12).value = device
    if bfloat16:
        ctypes.c_uint8.from_address(tensor + 20).value = 4
    return capsule


def empty(shape, dtype=np.float64):
    """From a pool in which there is always room: allocating can be recorded."""
    _happened("allocate", shape, recordable=True)
    host = _aligned(shape, dtype)
    host.reshape(-1).view(np.uint8)[...] = 0xFF
    return ndarray.of(host, current_device())


def _aligned(shape, dtype):
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 512, np.uint8)
    start = -memory.ctypes.data % 512
    return memory[start : start + size].view(dtype).reshape(shape)


def asarray(values, dtype=None):
    if isinstance(values, ndarray):
        return values if dtype is None or values.dtype == dtype else values.astype(dtype)
    host = np.asarray(values, dtype)
    array = empty(host.shape, host.dtype)
    _happened("send", host.nbytes)
    array.host[...] = host
    return array


def _filled(value, shape, dtype):
    array = empty(shape, dtype)
    array.host[...] = value
    return array


def zeros(shape, dtype=np.float64):
    return _filled(0, shape, dtype)


def ones(shape, dtype=np.float64):
    return _filled(1, shape, dtype)


def matmul(left, right):
    """In place of cuBLAS."""
    return left._of(left.host @ right.host)


# -- devices and streams ------------------------------------------------------------------------------------


class Device:
    multiprocessors = 3

    def __init__(self, id=None):
        self.id = current_device() if id is None else id
        self.attributes = {"MultiProcessorCount": self.multiprocessors}

    def __enter__(self):
        _devices.append(self.id)
        return self

    def __exit__(self, *_error):
        _devices.pop()


class Event:
    done = True

    def __init__(self):
        self._after = len(log)

    def synchronize(self):
        _happened("synchronize event")
        _arrive(self._after)


class Stream:
    def __init__(self, ptr=0, device_id=0):
        self.ptr, self.device_id = ptr, device_id

    def __enter__(self):
        _streams.append(self)
        return self

    def __exit__(self, *_error):
        _streams.pop()

    def synchronize(self):
        _happened("synchronize", self.ptr)
        _arrive()

    def record(self):
        _happened("record", self.ptr, recordable=True)
        return Event()

    def wait_event(self, _event):
        _happened("wait", self.ptr, recordable=True)

    def is_capturing(self):
        return capturing


_streams, _devices = [Stream()], [0]


def current_device():
    return _devices[-1]


class UnownedMemory:
    def __init__(self, ptr, _size, owner, _device_id):
        self.ptr, self.owner = ptr, owner


def _copied(target, source, size, kind, stream):
    _happened("copy", kind, size, stream)
    in_flight.append((len(log), target, source, size))


def _arrive(before=math.inf):
    """Make the copies that were begun before that place in the log."""
    while in_flight and in_flight[0][0] <= before:
        ctypes.memmove(*in_flight.pop(0)[1:])


cuda = types.SimpleNamespace(
    is_available=lambda: True,
    Device=Device,
    ExternalStream=Stream,
    get_current_stream=lambda _device=0: _streams[-1],
    UnownedMemory=UnownedMemory,
    MemoryPointer=Pointer,
    alloc_pinned_memory=lambda size: np.full(size, 0xFF, np.uint8),
    driver=types.SimpleNamespace(occupancyMaxActiveBlocksPerMultiprocessor=lambda _kernel, _threads, _shared: 1),
    runtime=types.SimpleNamespace(memcpyAsync=_copied, memcpyDeviceToHost=2, memcpyHostToDevice=1),
)


# -- kernels ------------------------------------------------------------------------------------------------


class RawModule:
    def __init__(self, *, code, options):
        self._module = module.SimModule(code=code, options=tuple(options))

    def get_function(self, name):
        return _Kernel(self._module.get_function(name))


class _Kernel:
    max_dynamic_shared_size_bytes = 0  # there is more, but it is unknown here how much the kernel's own arrays take

    def __init__(self, kernel):
        self._kernel = kernel
        self.kernel = types.SimpleNamespace(ptr=id(self))

    def __call__(self, grid, block, args, *, shared_mem=0):
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise ValueError(f"{shared_mem} bytes of shared memory; only {self.max_dynamic_shared_size_bytes} allowed")
        _happened("launch", self._kernel.name, current_device(), _streams[-1].ptr, recordable=True)
        _arrive()
        self._kernel(grid, block, [_argument(value) for value in args], shared_mem=shared_mem)


def _argument(value):
    """CuPy passes NumPy's values as they are, its own arrays by their address, and refuses other arrays."""
    if isinstance(value, np.ndarray):
        raise TypeError(f"a numpy.ndarray of shape {value.shape} as a kernel parameter")
    return value
