"""Take arrays on CUDA devices, of CuPy, PyTorch, JAX or anything with `__dlpack__`, and return results, without a copy.

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

from fastnewton.arrays.layout import Device, Layout, Output, Rows, check_dtype, row_addresses
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cuda import jit

_NAMES = {dtype.dlpack: name for name, dtype in DTYPES.items()}

# Memory that kernels may still be reading, where its library does not know of their stream and would reuse it.
_in_use: list[tuple[Any, list[Any]]] = []


class _Tensor(ctypes.Structure):
    """DLTensor, the beginning of a DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),  # kind and index
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),  # type code, bits, lanes
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
    cupy, owner = jit.cupy(), value
    if library == "torch":
        stream = sys.modules["torch"].cuda.current_stream(value.device).cuda_stream
        dtype, address, shape, strides = check_dtype(value.dtype, name), value.data_ptr(), value.shape, value.stride()
    else:
        stream = cupy.cuda.get_current_stream(device.index).ptr
        if library == "cupy":
            dtype = check_dtype(value.dtype.name, name)
            return Layout(value.data.ptr, value.shape, value.strides, dtype, library, owner, device, stream)
        dtype, address, shape, strides, owner = _read_exporter(value, name, stream)
    strides = tuple(step * DTYPES[dtype].itemsize for step in strides)
    return Layout(address, tuple(shape), strides, dtype, library, owner, device, stream)


def _read_exporter(value: Any, name: str, stream: int) -> tuple[str, int, tuple[int, ...], Any, Any]:
    try:
        capsule = value.__dlpack__(stream=stream or 1)  # DLPack's name for the stream whose handle is 0
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be read through DLPack without a copy: {error}") from error
    tensor = _Tensor.from_address(_pointer_in(capsule, b"dltensor"))
    code, bits, *_ = tensor.dtype
    dtype = check_dtype(_NAMES.get((code, bits), f"DLPack type {code}"), name)
    shape, strides = tuple(tensor.shape[: tensor.ndim]), tensor.strides
    strides = strides[: tensor.ndim] if strides else [math.prod(shape[k + 1 :]) for k in range(tensor.ndim)]
    return dtype, (tensor.data or 0) + tensor.offset, shape, strides, (value, capsule)


def coefficients(layout: Layout, like: Rows) -> Any:
    """Convert a vector to float64 where `like` is, ready on its stream."""
    cupy, vector, index = jit.cupy(), layout.owner, layout.device.index
    stream = cupy.cuda.ExternalStream(layout.stream, index)
    if layout.device.kind == "cuda":
        size = layout.strides[0] * (like.m - 1) + DTYPES[layout.dtype].itemsize
        with cupy.cuda.Device(index), stream:
            block = cupy.cuda.UnownedMemory(layout.address, size, vector, index)
            vector = cupy.ndarray(layout.shape, layout.dtype, cupy.cuda.MemoryPointer(block, 0), layout.strides)
            if like.device.kind == "cpu":
                return vector.get().astype(np.float64)
    with context(like):
        if layout.device == like.device and layout.stream != like.stream:
            cupy.cuda.get_current_stream().wait_event(stream.record())
        return cupy.asarray(vector, np.float64)


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
        _Tensor.from_address(_pointer_in(capsule, b"dltensor")).dtype[:2] = DTYPES["bfloat16"].dlpack
        return capsule
