"""Memory on a CUDA device and page-locked memory on the host: workspaces, views and copies."""

import math
import threading
from typing import Any

import numpy as np

from fastnewton.kernels.cuda import jit

_workspaces: dict[tuple[Any, ...], Any] = {}


def workspace(purpose: str, size: int) -> Any:
    """Return float64 memory that is reused by this thread on this stream: work enqueued later waits its turn."""
    stream = jit.cupy().cuda.get_current_stream()
    key = (jit.cupy().cuda.Device().id, stream.ptr, threading.get_ident(), purpose, size)
    if key not in _workspaces:
        _workspaces[key] = jit.cupy().empty(size, np.float64)
    return _workspaces[key]


def keep_for_graph(array: Any) -> None:
    """Keep an array that a captured graph writes to, until `release`."""
    _workspaces[(jit.cupy().cuda.Device().id, "captured", id(array))] = array


def release() -> None:
    """Release the workspaces, and what captured graphs write to: none may be replayed afterwards."""
    _workspaces.clear()


def address(vector: Any) -> int:
    """Return the address of a vector (Rows of one row); 0 for None."""
    return 0 if vector is None else int(vector.table[0])


def view(vector: Any, dtype: Any) -> Any:
    """View a vector on the device as CuPy's array; its owner must outlive the view."""
    cuda = jit.cupy().cuda
    block = cuda.UnownedMemory(address(vector), vector.n * vector.itemsize, vector.owner, cuda.Device().id)
    return jit.cupy().ndarray((vector.n,), dtype, cuda.MemoryPointer(block, 0))


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocate page-locked host memory, which the device copies at full bandwidth."""
    count = math.prod(shape)
    page = jit.cupy().cuda.alloc_pinned_memory(max(1, count * np.dtype(dtype).itemsize))
    return np.frombuffer(page, dtype, count).reshape(shape)


def copy_to_host(vector: Any, target: np.ndarray) -> Any:
    """Enqueue the copy of a vector to pinned memory; return the event that follows it."""
    runtime, stream = jit.cupy().cuda.runtime, jit.cupy().cuda.get_current_stream()
    runtime.memcpyAsync(target.ctypes.data, address(vector), target.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
    return stream.record()


def copy_to_device(source: np.ndarray, vector: Any) -> None:
    """Copy pinned memory to a vector, and wait."""
    runtime, stream = jit.cupy().cuda.runtime, jit.cupy().cuda.get_current_stream()
    runtime.memcpyAsync(address(vector), source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, stream.ptr)
    stream.synchronize()


def upload(source: np.ndarray) -> Any:
    """Enqueue the copy of pinned memory, which must not change before it is done, to a new array on the device."""
    runtime, stream = jit.cupy().cuda.runtime, jit.cupy().cuda.get_current_stream()
    array = jit.cupy().empty(source.shape, source.dtype)
    runtime.memcpyAsync(array.data.ptr, source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, stream.ptr)
    return array
