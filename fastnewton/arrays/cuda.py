"""Arrays on CUDA devices, of CuPy, PyTorch, JAX or anything with `__dlpack__`, in and out without a copy.

Work is enqueued on the stream that is current in the caller's own library; what JAX and others export is made ready on
CuPy's current stream, and a JAX result is handed back through JAX's own import, which waits for that stream.
"""

import ctypes
import math
import sys
from typing import Any

import numpy as np

from fastnewton import arrays
from fastnewton.arrays import ITEMSIZE, Memory, Output, Rows
from fastnewton.backends.cuda import context
from fastnewton.kernels.cuda import launch as cuda

_LEGACY_STREAM = 1  # what DLPack calls the stream whose handle is 0
_BFLOAT = 4
_DTYPES = {(2, 16): "float16", (_BFLOAT, 16): "bfloat16", (2, 32): "float32", (2, 64): "float64"}  # by (code, bits)


class _Tensor(ctypes.Structure):
    """DLTensor, the beginning of a DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_kind", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def described(value: Any, name: str, library: str) -> Memory:
    """Where an array on a CUDA device lies, and the stream on which it is ready."""
    if library == "torch":
        return _torch_memory(value, name)
    if library == "cupy":
        return _cupy_memory(value, name)
    return _exported_memory(value, name, library)


def _torch_memory(tensor: Any, name: str) -> Memory:
    cuda.cupy()
    dtype = _checked_dtype(str(tensor.dtype).removeprefix("torch."), name)
    strides = tuple(step * ITEMSIZE[dtype] for step in tensor.stride())
    stream = sys.modules["torch"].cuda.current_stream(tensor.device).cuda_stream
    where = f"cuda:{tensor.device.index}"
    return Memory(tensor.data_ptr(), tuple(tensor.shape), strides, dtype, "torch", tensor, where, stream)


def _cupy_memory(array: Any, name: str) -> Memory:
    stream = cuda.cupy().cuda.get_current_stream(array.device.id).ptr
    dtype, where = _checked_dtype(array.dtype.name, name), f"cuda:{array.device.id}"
    return Memory(array.data.ptr, array.shape, array.strides, dtype, "cupy", array, where, stream)


def _exported_memory(value: Any, name: str, library: str) -> Memory:
    _, number = value.__dlpack_device__()
    stream = cuda.cupy().cuda.get_current_stream(number).ptr
    try:
        capsule = value.__dlpack__(stream=stream or _LEGACY_STREAM)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be read through DLPack without a copy: {error}") from error
    tensor = _Tensor.from_address(_pointer_in(capsule, b"dltensor"))
    dtype = _checked_dtype(_DTYPES.get((tensor.code, tensor.bits), f"DLPack type {tensor.code}"), name)
    shape = tuple(tensor.shape[: tensor.ndim])
    steps = tensor.strides[: tensor.ndim] if tensor.strides else _contiguous(shape)
    strides = tuple(step * ITEMSIZE[dtype] for step in steps)
    address = (tensor.data or 0) + tensor.offset
    return Memory(address, shape, strides, dtype, library, (value, capsule), f"cuda:{number}", stream)


def _contiguous(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _checked_dtype(dtype: str, name: str) -> str:
    if dtype not in ITEMSIZE:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype}")
    return dtype


# -- result out ---------------------------------------------------------------------------------------------


def new_output(like: Rows) -> Output:
    """New memory on the device of `like`, which must be current."""
    if like.library == "torch":
        torch = sys.modules["torch"]
        tensor = torch.empty(like.n, dtype=getattr(torch, like.dtype), device=like.device)
        return Output(_row_at(tensor.data_ptr(), like, tensor), lambda: tensor)
    words = like.library == "jax" and like.dtype == "bfloat16"
    array = cuda.cupy().empty(like.n, np.uint16 if words else arrays.numpy_dtype(like.dtype))
    target = _row_at(array.data.ptr, like, array)
    return Output(target, lambda: _as_jax(array, like.dtype) if like.library == "jax" else array)


def _row_at(address: int, like: Rows, owner: Any) -> Rows:
    return like._replace(table=np.array([address], np.int64), owner=owner)


def _as_jax(array: Any, dtype: str) -> Any:
    jax = sys.modules["jax"]
    with jax.enable_x64(True):  # or float64 would become float32
        return jax.dlpack.from_dlpack(_Bfloat16(array) if dtype == "bfloat16" else array)


class _Bfloat16:
    """Sixteen-bit words of CuPy, which need not know the type, exported as bfloat16."""

    def __init__(self, words: Any):
        self._words = words

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._words.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._words.__dlpack__(**options)
        _Tensor.from_address(_pointer_in(capsule, b"dltensor")).code = _BFLOAT
        return capsule


# -- coefficients -------------------------------------------------------------------------------------------


def coefficients(given: Memory, like: Rows) -> Any:
    """A vector as float64 where `like` is, ready on its stream."""
    found = arrays.values(given) if given.device == "cpu" else _view(given)
    if like.device == "cpu":
        return found.get().astype(np.float64)
    cupy = cuda.cupy()
    with context(like):
        if given.device == like.device and given.stream != like.stream:
            number = int(like.device.removeprefix("cuda:"))
            ready = cupy.cuda.ExternalStream(given.stream, number).record()
            cupy.cuda.get_current_stream().wait_event(ready)
        return cupy.asarray(found, np.float64)


def _view(given: Memory) -> Any:
    cupy = cuda.cupy()
    number, (m,) = int(given.device.removeprefix("cuda:")), given.shape
    size = given.strides[0] * (m - 1) + ITEMSIZE[given.dtype]
    with cupy.cuda.Device(number), cupy.cuda.ExternalStream(given.stream, number):
        block = cupy.cuda.UnownedMemory(given.address, size, given.owner, number)
        return cupy.ndarray(given.shape, given.dtype, cupy.cuda.MemoryPointer(block, 0), given.strides)
