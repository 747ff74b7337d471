"""Arrays of other libraries in and out without a copy, and the checks on what a caller hands over.

NumPy, PyTorch and JAX arrays are recognised without importing a library that the caller did not; anything else is
taken through `__dlpack__`.
"""

import math
import numbers
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
MAX_WORKERS = 1024
ALIGNMENT = 64  # JAX adopts memory without a copy only from this alignment on
_CPU = 1  # kDLCPU

_KINDS = "an array with __dlpack__ (NumPy, PyTorch, JAX, CuPy)"


class Rows(NamedTuple):
    """m vectors of length n in memory: where each begins, and what keeps them alive."""

    table: np.ndarray  # (m,) int64 addresses
    n: int
    dtype: str
    library: str
    owner: Any
    device: str = "cpu"

    @property
    def m(self) -> int:
        return self.table.size

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.table.size * self.n * ITEMSIZE[self.dtype]

    def only(self, workers: np.ndarray) -> "Rows":
        """These rows alone."""
        return self._replace(table=self.table[workers])


class Output(NamedTuple):
    """Memory for the result, and what makes the caller's kind of array of it."""

    rows: Rows
    finish: Callable[[], Any]


# -- rows in ------------------------------------------------------------------------------------------------


def rows(value: Any, name: str) -> Rows:
    """The workers' vectors: an (m, n) array or a sequence of m arrays of length n."""
    if isinstance(value, (list, tuple)):
        return _rows_of_sequence(value, name)
    array, dtype, library = _memory(value, name)
    if array.ndim != 2:
        raise ValueError(
            f"{name} must be an (m, n) array, a row for each worker, or a sequence of m arrays of length n; "
            f"got an array of shape {array.shape}"
        )
    m, n = array.shape
    _check_workers(m, name)
    _check_strides(array, name)
    return Rows(_addresses(array), n, dtype, library, value)


def vector(value: Any, name: str, like: Rows, what: str) -> Rows:
    """One vector that goes with the rows `like`, called `what` in messages."""
    array, dtype, library = _memory(value, name)
    one = _row(array, dtype, library, value, name)
    check_alike(one, name, like, what)
    if one.n != like.n:
        raise ValueError(f"{name} must have the shape ({like.n},) of a row of {what}; got {array.shape}")
    return one


def pair(thetas: Any, grads: Any) -> tuple[Rows, Rows]:
    """Thetas and grads of one shape, dtype and library."""
    first, second = rows(thetas, "thetas"), rows(grads, "grads")
    check_pair(first, second)
    return first, second


def check_pair(thetas: Rows, grads: Rows) -> None:
    """Raise unless grads go with thetas."""
    check_alike(grads, "grads", thetas, "thetas")
    if (thetas.m, thetas.n) != (grads.m, grads.n):
        raise ValueError(f"grads must have the shape of thetas, ({thetas.m}, {thetas.n}); got ({grads.m}, {grads.n})")


def single(value: Any, name: str) -> Rows:
    """One vector of its own."""
    array, dtype, library = _memory(value, name)
    return _row(array, dtype, library, value, name)


def _rows_of_sequence(value: Sequence[Any], name: str) -> Rows:
    _check_workers(len(value), name)
    every = [single(item, f"{name}[{k}]") for k, item in enumerate(value)]
    first = every[0]
    for k, one in enumerate(every[1:], 1):
        check_alike(one, f"{name}[{k}]", first, f"{name}[0]")
        if one.n != first.n:
            raise ValueError(f"{name}[{k}] must have the length {first.n} of {name}[0]; got {one.n}")
    table = np.concatenate([one.table for one in every])
    return Rows(table, first.n, first.dtype, first.library, value)


def _row(array: np.ndarray, dtype: str, library: str, owner: Any, name: str) -> Rows:
    if array.ndim != 1:
        raise ValueError(f"{name} must be a one-dimensional array; got an array of shape {array.shape}")
    _check_strides(array, name)
    return Rows(np.array([array.ctypes.data], np.int64), array.size, dtype, library, owner)


def _addresses(matrix: np.ndarray) -> np.ndarray:
    start, step, m = matrix.ctypes.data, matrix.strides[0], matrix.shape[0]
    return np.arange(start, start + m * step, step) if step and m > 1 else np.full(m, start)


def _check_workers(m: int, name: str) -> None:
    if not 1 <= m <= MAX_WORKERS:
        raise ValueError(f"{name} must hold 1 to {MAX_WORKERS} workers; got m = {m}")


def _check_strides(array: np.ndarray, name: str) -> None:
    step, n = array.strides[-1], array.shape[-1]
    if n > 1 and step != array.itemsize:
        raise ValueError(
            f"{name} must have unit stride along n; got a stride of {step} bytes for items of {array.itemsize}. "
            f"Make a contiguous copy, such as numpy.ascontiguousarray({name})"
        )
    if array.ndim == 2 and array.shape[0] > 1 and array.strides[0] < n * array.itemsize:
        raise ValueError(
            f"{name} must have rows at least n = {n} items apart; got a row stride of {array.strides[0]} bytes. "
            f"Make a contiguous copy, such as numpy.ascontiguousarray({name})"
        )
    if not array.flags.aligned:
        raise ValueError(f"{name} must be aligned to its items of {array.itemsize} bytes; make a copy")


def check_alike(given: Rows, name: str, like: Rows, what: str) -> None:
    """Raise unless `given` is of the library and dtype of `like`, called `what` in messages."""
    if given.library != like.library:
        raise TypeError(f"{name} must be of the same library as {what}, {like.library}; got {given.library}")
    if given.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {what}, {like.dtype}; got {given.dtype}")


# -- libraries ----------------------------------------------------------------------------------------------


def _memory(value: Any, name: str) -> tuple[np.ndarray, str, str]:
    """A NumPy view of the caller's memory (bfloat16 as uint16), its dtype's name and its library."""
    library = _library(value)
    if library == "numpy":
        return *_checked(value, name), library
    if library == "torch":
        return *_torch_memory(value, name), library
    if library == "jax":
        return *_jax_memory(value, name), library
    if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        raise TypeError(f"{name} must be {_KINDS}; got {type(value).__name__}")
    _check_on_cpu(value.__dlpack_device__()[0] == _CPU, name)
    try:
        view = np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be read through DLPack without a copy: {error}") from error
    return *_checked(view, name), library


def _library(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "numpy"
    for library, kind in (("torch", "Tensor"), ("jax", "Array")):
        module = sys.modules.get(library)
        if module is not None and isinstance(value, getattr(module, kind, ())):
            return library
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _checked(array: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    dtype = _dtype_name(array.dtype)
    if dtype not in ITEMSIZE:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {array.dtype}")
    return (array.view(np.uint16) if dtype == "bfloat16" and array.ndim else array), dtype


@cache  # asking NumPy for the name takes longer than the rest of the checks
def _dtype_name(dtype: np.dtype) -> str | None:
    return dtype.name if dtype.isnative else None


def _torch_memory(tensor: Any, name: str) -> tuple[np.ndarray, str]:
    torch = sys.modules["torch"]
    if tensor.requires_grad:
        raise TypeError(f"{name} requires grad; hand over {name}.detach()")
    _check_on_cpu(tensor.device.type == "cpu", name)
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got the layout {tensor.layout}")
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    if tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}")
    return _checked(tensor.numpy(), name)


def _jax_memory(array: Any, name: str) -> tuple[np.ndarray, str]:
    if isinstance(array, sys.modules["jax"].core.Tracer):
        raise TypeError(f"{name} is a JAX tracer; call fastnewton outside jit, grad and vmap")
    _check_on_cpu(all(device.platform == "cpu" for device in array.devices()), name)
    return _checked(np.asarray(array), name)


def _check_on_cpu(on_cpu: bool, name: str) -> None:
    if not on_cpu:
        raise TypeError(f"{name} must be in CPU memory; got an array on another device")


# -- result out ---------------------------------------------------------------------------------------------


def output(out: Any, like: Rows, inputs: Sequence[Rows]) -> Output:
    """Memory for a vector like a row of `like`: the caller's `out`, checked, or new."""
    if out is None:
        return _new_output(like)
    if _library(out) == "jax":
        raise TypeError("out must be writable; JAX arrays are immutable, leave out=None")
    target = vector(out, "out", like, "thetas")
    if not _writable(out):
        raise ValueError("out must be writable; got a read-only array")
    begin = int(target.table[0])
    if any(_overlap(begin, begin + target.nbytes, given) for given in inputs):
        raise ValueError("out must not overlap an input; hand over separate memory or leave out=None")
    return Output(target, lambda: out)


def _overlap(begin: int, end: int, given: Rows) -> bool:
    length = given.n * given.itemsize
    return begin < end and any(row < end and begin < row + length for row in given.table.tolist())


def _writable(out: Any) -> bool:
    if isinstance(out, np.ndarray):
        return bool(out.flags.writeable)
    return _library(out) == "torch" or bool(np.from_dlpack(out).flags.writeable)


def _new_output(like: Rows) -> Output:
    first = like.owner[0] if isinstance(like.owner, (list, tuple)) else like.owner
    if like.library == "torch":
        tensor = sys.modules["torch"].empty(like.n, dtype=first.dtype)
        return Output(
            Rows(np.array([tensor.data_ptr()], np.int64), like.n, like.dtype, "torch", tensor), lambda: tensor
        )
    array = aligned(like.n, np.dtype(first.dtype) if hasattr(first, "dtype") else np.dtype(like.dtype))
    target = Rows(np.array([array.ctypes.data], np.int64), like.n, like.dtype, like.library, array)
    if like.library == "jax":
        (device,) = first.devices()
        return Output(target, lambda: sys.modules["jax"].device_put(array, device))
    return Output(target, lambda: array)


def aligned(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised C-contiguous array that starts on a cache line."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def coefficient_vector(value: Any, m: int) -> np.ndarray:
    """The m coefficients in float64."""
    library = _library(value)
    if library != "numpy" and not hasattr(value, "__dlpack__"):
        raise TypeError(f"coefficients must be {_KINDS}; got {type(value).__name__}")
    array, dtype, _ = _memory(value, "coefficients")
    if dtype not in ("float32", "float64"):
        raise TypeError(f"coefficients must be float64 or float32; got {dtype}")
    if array.shape != (m,):
        raise ValueError(f"coefficients must have the shape ({m},), one for each worker; got {array.shape}")
    return array.astype(np.float64)


def nonfinite_workers(*matrices: Rows) -> list[int]:
    """The workers with a NaN or an infinity in any of their rows."""
    return [k for k in range(matrices[0].m) if not all(_row_is_finite(given, k) for given in matrices)]


def _row_is_finite(given: Rows, k: int) -> bool:
    kind = np.uint16 if given.dtype == "bfloat16" else np.dtype(given.dtype)
    chunk = 1 << 18
    for start in range(0, given.n, chunk):
        values = _at(int(given.table[k]) + start * given.itemsize, min(chunk, given.n - start), kind)
        if given.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(values).all():
            return False
    return True


def memory(one: Rows, dtype: Any) -> np.ndarray:
    """The single row as a one-dimensional array; its owner must outlive the result."""
    return _at(int(one.table[0]), one.n, dtype)


def _at(address: int, count: int, dtype: Any) -> np.ndarray:
    """The memory at an address as an array; whoever owns it must outlive the result."""
    interface = {"shape": (count,), "typestr": np.dtype(dtype).str, "data": (address, True), "version": 3}
    return np.asarray(type("Memory", (), {"__array_interface__": interface})())


# -- numbers and words --------------------------------------------------------------------------------------


def real(value: Any, name: str) -> float:
    """A finite number that is not negative, as a Python float."""
    number = _number(value, name)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and at least 0; got {value!r}")
    return number


def fraction(value: Any, name: str) -> float:
    """A number strictly between 0 and 1."""
    number = _number(value, name)
    if not 0 < number < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1; got {value!r}")
    return number


def count(value: Any, name: str) -> int | None:
    """None, or an integer that is not negative."""
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer or None; got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0; got {value}")
    return int(value)


def choice(value: Any, name: str, allowed: tuple[str | None, ...]) -> Any:
    """One of a few words, or None where it is among them."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be {_words(allowed)}; got {type(value).__name__}")
    if value not in allowed:
        kind = TypeError if value is None else ValueError
        raise kind(f"{name} must be {_words(allowed)}; got {value!r}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number; got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be within the range of float64; got {type(value).__name__} beyond it") from None


def _words(allowed: tuple[str | None, ...]) -> str:
    return ", ".join(repr(word) for word in allowed[:-1]) + f" or {allowed[-1]!r}"
