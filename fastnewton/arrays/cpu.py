"""Take arrays in CPU memory, of NumPy, PyTorch, JAX or any other library with DLPack, and allocate results."""

import math
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from fastnewton.arrays.layout import Device, Layout, Output, Rows, check_dtype, row_addresses
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu.memory import address_of

_ALIGNMENT = 64  # JAX adopts memory without a copy only from this alignment on
_CHUNK = 1 << 18  # values that are searched for NaN at once, to bound the temporary arrays


# -- in -----------------------------------------------------------------------------------------------------


@cache  # asking NumPy for the name takes longer than all the checks
def recognise(dtype: np.dtype, ndim: int) -> tuple[str | None, Callable[[np.ndarray], int]]:
    """Name a dtype of vectors, None for others, and make the function that returns the address of such an array."""
    return dtype.name if dtype.isnative and dtype.name in DTYPES else None, address_of(dtype, ndim)


def describe(value: Any, name: str, library: str, device: Device) -> Layout:
    """Describe an array that `locate` has found in CPU memory."""
    array = value if type(value) is np.ndarray else _VIEWS.get(library, _view_exporter)(value, name)
    dtype, address_of = recognise(array.dtype, array.ndim)
    if library == "torch" and array.dtype == np.int16:
        dtype = "bfloat16"
    if dtype is None:
        hint = f". Convert it with {name}.astype('={array.dtype.str[1:]}')" if array.dtype.name in DTYPES else ""
        dtype = check_dtype(array.dtype, name, hint)
    return Layout(address_of(array), array.shape, array.strides, dtype, library, array, device)


def _view_subclass(array: np.ndarray, name: str) -> np.ndarray:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array; hand over {name}.data or {name}.filled(…)")
    return np.asarray(array)


def _view_torch(tensor: Any, name: str) -> np.ndarray:
    torch = sys.modules["torch"]
    try:
        return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    except (RuntimeError, TypeError) as error:
        raise TypeError(f"{name} has no memory that can be read: {error}") from error


def _view_exporter(value: Any, name: str) -> np.ndarray:
    try:
        try:
            return np.from_dlpack(value, copy=False)
        except TypeError:  # an exporter from before the keyword
            return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be read through DLPack without a copy: {error}") from error


_VIEWS = {"numpy": _view_subclass, "torch": _view_torch, "jax": lambda array, name: np.asarray(array)}


# -- out ----------------------------------------------------------------------------------------------------


def allocate(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocate an uninitialised C-contiguous array that starts on a cache line."""
    dtype = np.dtype(dtype)
    count = shape if isinstance(shape, int) else math.prod(shape)
    buffer = np.empty(count * dtype.itemsize // 8 + _ALIGNMENT // 8 + 1)
    return np.ndarray(shape, dtype, buffer, -_address(buffer) % _ALIGNMENT)


def _address(array: np.ndarray) -> int:
    return recognise(array.dtype, array.ndim)[1](array)


def _allocate_tensor(n: int, dtype: Any) -> Any:
    return sys.modules["torch"].empty(n, dtype=dtype, device="cpu")  # another device may be the default


def new_output(like: Rows) -> Output:
    """Allocate a vector like a row of `like`."""
    if like.library == "torch":
        result = _allocate_tensor(like.n, getattr(sys.modules["torch"], like.dtype))
        array = _view_torch(result, "out")
    else:
        result = array = allocate(like.n, DTYPES[like.dtype].numpy())
    target = like._replace(table=row_addresses(_address(array), 0, 1), owner=(array,))
    return Output(target, partial(_to_jax, array, like.device.index) if like.library == "jax" else lambda: result)


def _to_jax(array: np.ndarray, index: int) -> Any:
    jax = sys.modules["jax"]
    with jax.enable_x64(True):  # or float64 would become float32
        return jax.device_put(array, jax.devices("cpu")[index])


# -- short steps --------------------------------------------------------------------------------------------


def view_plain(thetas: Any, grads: Any, out: Any, most: int) -> tuple[str, Any, Any, Any, Any] | None:
    """View NumPy arrays or tensors of float32 or float64, of at most so many workers, whose shapes go together.

    Returns the dtype, views of thetas, grads and the result, and the result, or None for anything else.  Strides are
    left to the kernel.
    """
    kind, torch = type(grads), sys.modules.get("torch")
    if not (type(thetas) is kind and (out is None or type(out) is kind)):
        return None
    first, second, target = thetas, grads, out
    if kind is not np.ndarray:
        if torch is None or kind is not torch.Tensor or not grads.is_cpu:
            return None
        if torch.autograd.forward_ad._current_level >= 0:
            return None
        try:
            first, second, target = thetas.numpy(), grads.numpy(), None if out is None else out.numpy()
        except (RuntimeError, TypeError):  # it requires grad, is bfloat16, or the like
            return None
    shape, (dtype, _) = second.shape, recognise(second.dtype, second.ndim)
    if first.shape != shape or first.dtype != second.dtype or dtype not in ("float32", "float64"):
        return None
    if len(shape) != 2 or shape[0] > most or not second.size:
        return None
    if target is not None:
        if target.dtype != second.dtype or target.shape != shape[1:] or not target.flags.writeable:
            return None
    elif kind is np.ndarray:
        out = target = allocate(shape[1], second.dtype)
    else:
        out = _allocate_tensor(shape[1], grads.dtype)
        target = out.numpy()
    return dtype, first, second, target, out


# -- search -------------------------------------------------------------------------------------------------


def nonfinite_workers(*matrices: Rows) -> list[int]:
    """List the workers with a NaN or an infinity in any of their rows."""
    return [k for k in range(matrices[0].m) if not all(_is_finite(rows.owner[k], rows.dtype) for rows in matrices)]


def _is_finite(row: np.ndarray, dtype: str) -> bool:
    chunks = (row[start : start + _CHUNK] for start in range(0, row.size, _CHUNK))
    if dtype == "bfloat16":  # which NumPy alone does not know: the bits of its exponent must not all be set
        return all((chunk.view(np.uint16) & 0x7F80 != 0x7F80).all() for chunk in chunks)
    return all(np.isfinite(chunk.view(dtype)).all() for chunk in chunks)
