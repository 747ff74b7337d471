"""Describe where vectors lie: the library and device of an array, its layout in memory, and the rows of m workers.

No library is imported that the caller did not import.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastnewton.dtypes import DTYPES

_CPU, _CUDA = 1, (2, 13)  # kDLCPU; kDLCUDA, kDLCUDAManaged


class Device(NamedTuple):
    """A kind of device, "cpu" or "cuda", and its number."""

    kind: str
    index: int = 0  # pyright: ignore[reportIncompatibleMethodOverride]  (of tuple.index, which nobody needs)

    def __str__(self) -> str:
        return self.kind if self == CPU else f"{self.kind}:{self.index}"


CPU = Device("cpu")


class Layout(NamedTuple):
    """How a caller's array lies in memory."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: str
    library: str
    owner: Any  # on the CPU a NumPy array that views the memory, elsewhere whatever keeps it alive
    device: Device = CPU
    stream: int = 0  # of the caller's library, on a CUDA device


class Rows(NamedTuple):
    """m vectors of length n: their addresses, and what keeps the memory alive."""

    table: np.ndarray  # (m,) int64 addresses
    n: int
    dtype: str
    library: str
    owner: Any  # keeps the memory alive; on the CPU owner[k] is a NumPy array that views row k, perhaps as raw bits
    device: Device = CPU
    stream: int = 0

    @property
    def m(self) -> int:
        return self.table.size

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.table.size * self.n * self.itemsize

    @property
    def raw_bits(self) -> np.ndarray:
        """View the first row in CPU memory as words that MPI can send."""
        return self.owner[0].view(DTYPES[self.dtype].word)

    def only(self, workers: np.ndarray) -> "Rows":
        """Select the rows of these workers."""
        owner = [self.owner[k] for k in workers] if self.device.kind == "cpu" else self.owner
        return self._replace(table=self.table[workers], owner=owner)

    def part(self, start: int, count: int) -> "Rows":
        """Select coordinates start … start + count − 1 of every row."""
        owner = [row[start : start + count] for row in self.owner] if self.device.kind == "cpu" else self.owner
        return self._replace(table=self.table + start * self.itemsize, n=count, owner=owner)


class Output(NamedTuple):
    """Memory for the result, and the function that makes the caller's kind of array of it."""

    rows: Rows
    export: Callable[[], Any]


@lru_cache(maxsize=256)  # the same arrays come step after step
def row_addresses(start: int, stride: int, m: int) -> np.ndarray:
    """Compute the addresses of m rows; shared between calls, so never written to."""
    return start + stride * np.arange(m)


# -- libraries and devices -----------------------------------------------------------------------------------


def identify(value: Any) -> str:
    """Name the library of an array; the type itself where the library is unknown."""
    if isinstance(value, np.ndarray):
        return "numpy"
    for library, kind in (("torch", "Tensor"), ("jax", "Array"), ("cupy", "ndarray")):
        module = sys.modules.get(library)
        if module is not None and isinstance(value, getattr(module, kind, ())):
            return library
    return f"{type(value).__module__}.{type(value).__qualname__}"


def locate(value: Any, name: str) -> tuple[str, Device]:
    """Find the library and the device of an array; raise unless it holds plain numbers in CPU or CUDA memory."""
    library = identify(value)
    if library == "numpy":
        return library, CPU
    find = _locate_torch if library == "torch" else _locate_jax if library == "jax" else _locate_exporter
    device = find(value, name)
    if device.kind not in ("cpu", "cuda"):
        raise TypeError(f"{name} must be in CPU or CUDA memory; got an array on another kind of device")
    return library, device


def check_dtype(dtype: Any, name: str, hint: str = "") -> str:
    """Return the name of a dtype that vectors may have, of NumPy or PyTorch; raise for any other."""
    known = str(dtype).removeprefix("torch.")
    if known not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype}{hint}")
    return known


def _locate_torch(tensor: Any, name: str) -> Device:
    torch = sys.modules["torch"]
    if tensor.requires_grad:
        raise TypeError(f"{name} requires grad; hand over {name}.detach()")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor; got the layout {tensor.layout}")
    if tensor.is_neg():
        raise TypeError(f"{name} is a lazy negation; hand over {name}.resolve_neg()")
    forward = torch.autograd.forward_ad
    has_tangent = forward._current_level >= 0 and forward.unpack_dual(tensor).tangent is not None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or has_tangent:
        raise TypeError(f"{name} is being differentiated or mapped; call fastnewton outside of that")
    check_dtype(tensor.dtype, name)
    return Device(tensor.device.type, tensor.device.index or 0)


def _locate_jax(array: Any, name: str) -> Device:
    if isinstance(array, sys.modules["jax"].core.Tracer):
        raise TypeError(f"{name} is a JAX tracer; call fastnewton outside jit, grad and vmap")
    if not isinstance(array.dtype, np.dtype):  # a key of random numbers
        check_dtype(array.dtype, name)
    if array.is_deleted():
        raise TypeError(f"{name} is a JAX array that was deleted or donated")
    device, *others = array.devices()
    if others:
        raise TypeError(f"{name} must lie on one device; got a JAX array on {1 + len(others)}. Use jax.device_put")
    if device.platform in ("cuda", "gpu"):
        return Device("cuda", array.__dlpack_device__()[1])  # JAX may number devices in its own way
    return Device(device.platform, device.id)


def _locate_exporter(value: Any, name: str) -> Device:
    if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        kinds = "an array with __dlpack__ (NumPy, PyTorch, JAX, CuPy)"
        raise TypeError(f"{name} must be {kinds}; got {type(value).__name__}")
    kind, index = value.__dlpack_device__()
    return CPU if kind == _CPU else Device("cuda" if kind in _CUDA else "other", index)
