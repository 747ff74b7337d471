"""Arrays on CUDA devices, of CuPy, PyTorch, JAX or anything with `__dlpack__`, in and out without a copy.

Work is enqueued on the stream that is current in the caller's own library; what JAX and others export is made ready on
CuPy's current stream, and a JAX result is handed back through JAX's own import, which waits for that stream.
"""

import ctypes
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastnewton.arrays.layout import Device, Layout, Output, Rows, row_addresses
from fastnewton.arrays.libraries import check_dtype, torch_dtype
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cuda import jit

_LEGACY_STREAM = 1  # DLPack's name for the stream whose handle is 0
_NAMES = {dtype.dlpack: name for name, dtype in DTYPES.items()}

# Memory that kernels may still be reading, where its library does not know of their stream and would reuse it.
_in_use: list[tuple[Any, list[Any]]] = []


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


@contextmanager
def context(*inputs: Rows) -> Iterator[None]:
    """Enter the device and stream of these arrays, and keep the arrays alive until the stream is done."""
    cupy, like = jit.cupy(), inputs[0]
    current = cupy.cuda.get_current_stream(like.device.index)
    own = current if current.ptr == like.stream else cupy.cuda.ExternalStream(like.stream, like.device.index)
    with cupy.cuda.Device(like.device.index), own as stream:
        _in_use[:] = [entry for entry in _in_use if not entry[0].done]
        try:
            yield
        finally:
            if like.library not in ("cupy", "torch"):
                _in_use.append((stream.record(), [one.owner for one in inputs]))


# -- in -----------------------------------------------------------------------------------------------------


def describe(value: Any, name: str, library: str, device: Device) -> Layout:
    """Describe an array on a CUDA device, and name the stream on which it is ready."""
    if library == "torch":
        return _describe_torch(value, device)
    stream = jit.cupy().cuda.get_current_stream(device.index).ptr
    if library == "cupy":
        dtype = check_dtype(value.dtype.name, name)
        return Layout(value.data.ptr, value.shape, value.strides, dtype, library, value, device, stream)
    return _describe_exporter(value, name, library, device, stream)


def _describe_torch(tensor: Any, device: Device) -> Layout:
    jit.cupy()
    dtype, stream = torch_dtype(tensor), sys.modules["torch"].cuda.current_stream(tensor.device).cuda_stream
    strides = _in_bytes(tensor.stride(), dtype)
    return Layout(tensor.data_ptr(), tuple(tensor.shape), strides, dtype, "torch", tensor, device, stream)


def _describe_exporter(value: Any, name: str, library: str, device: Device, stream: int) -> Layout:
    try:
        capsule = value.__dlpack__(stream=stream or _LEGACY_STREAM)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be read through DLPack without a copy: {error}") from error
    tensor = _Tensor.from_address(_pointer_in(capsule, b"dltensor"))
    dtype = check_dtype(_NAMES.get((tensor.code, tensor.bits), f"DLPack type {tensor.code}"), name)
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        strides = tensor.strides[: tensor.ndim]
    else:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    address = (tensor.data or 0) + tensor.offset
    return Layout(address, shape, _in_bytes(strides, dtype), dtype, library, (value, capsule), device, stream)


def _in_bytes(strides: Any, dtype: str) -> tuple[int, ...]:
    return tuple(step * DTYPES[dtype].itemsize for step in strides)


def coefficients(layout: Layout, like: Rows) -> Any:
    """Convert a vector to float64 where `like` is, ready on its stream."""
    vector = layout.owner if layout.device.kind == "cpu" else _view(layout)
    if like.device.kind == "cpu":
        return vector.get().astype(np.float64)
    cupy = jit.cupy()
    with context(like):
        if layout.device == like.device and layout.stream != like.stream:
            ready = cupy.cuda.ExternalStream(layout.stream, like.device.index).record()
            cupy.cuda.get_current_stream().wait_event(ready)
        return cupy.asarray(vector, np.float64)


def _view(layout: Layout) -> Any:
    cupy, index, (m,) = jit.cupy(), layout.device.index, layout.shape
    size = layout.strides[0] * (m - 1) + DTYPES[layout.dtype].itemsize
    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(layout.stream, index):
        block = cupy.cuda.UnownedMemory(layout.address, size, layout.owner, index)
        return cupy.ndarray(layout.shape, layout.dtype, cupy.cuda.MemoryPointer(block, 0), layout.strides)


# -- out ----------------------------------------------------------------------------------------------------


def new_output(like: Rows) -> Output:
    """Allocate a vector like a row of `like`, whose device must be current."""
    if like.library == "torch":
        torch = sys.modules["torch"]
        result = torch.empty(like.n, dtype=getattr(torch, like.dtype), device=str(like.device))
        address = result.data_ptr()
    else:
        raw = like.library == "jax" and like.dtype == "bfloat16"
        result = jit.cupy().empty(like.n, DTYPES[like.dtype].word if raw else DTYPES[like.dtype].numpy())
        address = result.data.ptr
    target = like._replace(table=row_addresses(address, 0, 1), owner=result)
    return Output(target, lambda: _to_jax(result, like.dtype) if like.library == "jax" else result)


def _to_jax(array: Any, dtype: str) -> Any:
    jax = sys.modules["jax"]
    with jax.enable_x64(True):  # or float64 would become float32
        return jax.dlpack.from_dlpack(_Bfloat16(array) if dtype == "bfloat16" else array)


class _Bfloat16:
    """Raw bits in an array of CuPy, which need not know the type, exported as bfloat16."""

    def __init__(self, raw_bits: Any):
        self._raw_bits = raw_bits

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._raw_bits.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._raw_bits.__dlpack__(**options)
        _Tensor.from_address(_pointer_in(capsule, b"dltensor")).code, _ = DTYPES["bfloat16"].dlpack
        return capsule
