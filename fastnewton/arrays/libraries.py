"""Tell which library an array is of, and whether its values can be read, without importing what the caller did not."""

import sys
from typing import Any

import numpy as np

from fastnewton.arrays.layout import CPU, Device
from fastnewton.dtypes import DTYPES

_CPU, _CUDA = 1, (2, 13)  # kDLCPU; kDLCUDA, kDLCUDAManaged


def identify(value: Any) -> str:
    """Name the library of an array; the type itself where the library is unknown."""
    if isinstance(value, np.ndarray):
        return "numpy"
    for library, kind in (("torch", "Tensor"), ("jax", "Array"), ("cupy", "ndarray")):
        module = sys.modules.get(library)
        if module is not None and isinstance(value, getattr(module, kind, ())):
            return library
    return f"{type(value).__module__}.{type(value).__qualname__}"


def locate(value: Any, name: str, library: str) -> Device:
    """Find the device of an array; raise unless it holds plain numbers in CPU or CUDA memory."""
    if library == "numpy":
        return CPU
    device = {"torch": _locate_torch, "jax": _locate_jax}.get(library, _locate_exporter)(value, name)
    if device.kind not in ("cpu", "cuda"):
        raise TypeError(f"{name} must be in CPU or CUDA memory; got an array on another kind of device")
    return device


def check_dtype(dtype: Any, name: str, hint: str = "") -> str:
    """Return the name of a dtype that vectors may have; raise for any other."""
    if str(dtype) not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype}{hint}")
    return str(dtype)


def torch_dtype(tensor: Any) -> str:
    """Name the dtype of a tensor as NumPy does."""
    return str(tensor.dtype).removeprefix("torch.")


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
    check_dtype(torch_dtype(tensor), name)
    return Device(tensor.device.type, tensor.device.index or 0)


def _locate_jax(array: Any, name: str) -> Device:
    if isinstance(array, sys.modules["jax"].core.Tracer):
        raise TypeError(f"{name} is a JAX tracer; call fastnewton outside jit, grad and vmap")
    if not isinstance(array.dtype, np.dtype):  # a key of random numbers
        check_dtype(array.dtype, name)
    if array.is_deleted():
        raise TypeError(f"{name} is a JAX array that was deleted or donated")
    devices = array.devices()
    if len(devices) > 1:
        raise TypeError(f"{name} must lie on one device; got a JAX array on {len(devices)}. Use jax.device_put")
    (device,) = devices
    if device.platform in ("cuda", "gpu"):
        return Device("cuda", array.__dlpack_device__()[1])  # JAX may number devices in its own way
    return Device(device.platform, device.id)


def _locate_exporter(value: Any, name: str) -> Device:
    if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        kinds = "an array with __dlpack__ (NumPy, PyTorch, JAX, CuPy)"
        raise TypeError(f"{name} must be {kinds}; got {type(value).__name__}")
    kind, index = value.__dlpack_device__()
    return CPU if kind == _CPU else Device("cuda" if kind in _CUDA else "other", index)
