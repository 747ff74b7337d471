"""Arrays of other libraries in and out without a copy, and the checks on what a caller hands over.

NumPy, PyTorch and JAX arrays are recognised without importing a library that the caller did not; anything else is
taken through `__dlpack__`.
"""

import math
import numbers
import sys
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from fastnewton.kernels.cpu import addresses

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
MAX_WORKERS = 1024
ALIGNMENT = 64  # JAX adopts memory without a copy only from this alignment on
_PLAIN = {np.dtype(name): name for name in ("float32", "float64")}
_CPU, _CUDA = 1, (2, 13)  # kDLCPU; kDLCUDA, kDLCUDAManaged

_KINDS = "an array with __dlpack__ (NumPy, PyTorch, JAX, CuPy)"


class Memory(NamedTuple):
    """Where a caller's array lies."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: str
    library: str
    owner: Any  # keeps the memory alive and readable
    device: str = "cpu"
    stream: int = 0  # of the caller's library, on a CUDA device


class Rows(NamedTuple):
    """m vectors of length n in memory: where each begins, and what keeps them alive."""

    table: np.ndarray  # (m,) int64 addresses
    n: int
    dtype: str
    library: str
    owner: Any
    device: str = "cpu"
    stream: int = 0

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

    def part(self, start: int, count: int) -> "Rows":
        """So many coordinates of each row; a start below 0 is for memory that holds only the later ones."""
        return self._replace(table=self.table + start * self.itemsize, n=count)


class Output(NamedTuple):
    """Memory for the result, and what makes the caller's kind of array of it."""

    rows: Rows
    finish: Callable[[], Any]


# -- rows in ------------------------------------------------------------------------------------------------


def rows(value: Any, name: str) -> Rows:
    """The workers' vectors: an (m, n) array or a sequence of m arrays of length n."""
    if isinstance(value, (list, tuple)):
        return _rows_of_sequence(value, name)
    given = _memory(value, name)
    if len(given.shape) != 2:
        raise ValueError(
            f"{name} must be an (m, n) array, a row for each worker, or a sequence of m arrays of length n; "
            f"got an array of shape {given.shape}"
        )
    m, n = given.shape
    _check_workers(m, name)
    _check_strides(given, name)
    table = _table(given.address, given.strides[0], m)
    return Rows(table, n, given.dtype, given.library, given.owner, given.device, given.stream)


def vector(value: Any, name: str, like: Rows, what: str) -> Rows:
    """One vector that goes with the rows `like`, called `what` in messages."""
    one = single(value, name)
    check_alike(one, name, like, what)
    if one.n != like.n:
        raise ValueError(f"{name} must have the shape ({like.n},) of a row of {what}; got ({one.n},)")
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
    given = _memory(value, name)
    if len(given.shape) != 1:
        raise ValueError(f"{name} must be a one-dimensional array; got an array of shape {given.shape}")
    _check_strides(given, name)
    table = _table(given.address, 0, 1)
    return Rows(table, given.shape[0], given.dtype, given.library, given.owner, given.device, given.stream)


def rows_of(stack: np.ndarray, dtype: str) -> Rows:
    """Rows of our own C-contiguous (m, n) memory that holds values of `dtype`."""
    table = stack.ctypes.data + stack.strides[0] * np.arange(len(stack), dtype=np.int64)
    return Rows(table, stack.shape[1], dtype, "numpy", stack)


def plain(thetas: Any, grads: Any, out: Any, most: int) -> tuple[str, np.ndarray, np.ndarray, np.ndarray, Any] | None:
    """NumPy arrays or CPU tensors of PyTorch, float32 or float64, of at most so many workers, whose shapes go together:
    the dtype, NumPy's view of each and of the result, and the result; None for anything else.  Strides are not looked
    at."""
    kind = type(grads)
    if not (type(thetas) is kind and (out is None or type(out) is kind)):
        return None
    if kind is np.ndarray:
        first, second, target = thetas, grads, out
    else:
        torch = sys.modules.get("torch")
        if torch is None or kind is not torch.Tensor or not grads.is_cpu:
            return None
        if torch.autograd.forward_ad._current_level >= 0:
            return None
        try:
            first, second, target = thetas.numpy(), grads.numpy(), None if out is None else out.numpy()
        except (RuntimeError, TypeError):  # it requires grad, is elsewhere, or the like
            return None
    dtype, shape = second.dtype, second.shape
    if first.shape != shape or first.dtype != dtype or dtype not in _PLAIN:
        return None
    if len(shape) != 2 or shape[0] > most or not second.size:
        return None
    if target is None:
        out = aligned(shape[1], dtype) if kind is np.ndarray else torch.empty(shape[1], dtype=grads.dtype, device="cpu")
        target = out if kind is np.ndarray else out.numpy()
    elif not (target.dtype == dtype and target.shape == shape[1:] and target.flags.writeable):
        return None
    return _PLAIN[dtype], first, second, target, out


def _rows_of_sequence(value: Sequence[Any], name: str) -> Rows:
    _check_workers(len(value), name)
    every = [single(item, f"{name}[{k}]") for k, item in enumerate(value)]
    first = every[0]
    for k, one in enumerate(every[1:], 1):
        check_alike(one, f"{name}[{k}]", first, f"{name}[0]")
        if one.n != first.n:
            raise ValueError(f"{name}[{k}] must have the length {first.n} of {name}[0]; got {one.n}")
    return first._replace(table=np.concatenate([one.table for one in every]), owner=tuple(one.owner for one in every))


@lru_cache(maxsize=256)  # the same arrays come step after step
def _table(start: int, step: int, m: int) -> np.ndarray:
    """Addresses of m rows; nobody writes to it."""
    return start + step * np.arange(m)


def _check_workers(m: int, name: str) -> None:
    if not 1 <= m <= MAX_WORKERS:
        raise ValueError(f"{name} must hold 1 to {MAX_WORKERS} workers; got m = {m}")


def _check_strides(given: Memory, name: str) -> None:
    n, itemsize = given.shape[-1], ITEMSIZE[given.dtype]
    if given.strides == (n * itemsize, itemsize)[-len(given.shape) :] and given.address % itemsize == 0:
        return
    if n > 1 and given.strides[-1] != itemsize:
        raise ValueError(
            f"{name} must have unit stride along n; got a stride of {given.strides[-1]} bytes for items of {itemsize}. "
            f"Make a contiguous copy, such as {_contiguous_copy(given.library, name)}"
        )
    if len(given.shape) == 2 and given.shape[0] > 1 and given.strides[0] < n * itemsize:
        raise ValueError(
            f"{name} must have rows at least n = {n} items apart; got a row stride of {given.strides[0]} bytes. "
            f"Make a contiguous copy, such as {_contiguous_copy(given.library, name)}"
        )
    if given.address % itemsize or (len(given.shape) == 2 and given.strides[0] % itemsize and given.shape[0] > 1):
        copy = f"{name}.clone()" if given.library == "torch" else f"{name}.copy()"
        raise ValueError(f"{name} must be aligned to its items of {itemsize} bytes; make a copy, such as {copy}")


def _contiguous_copy(library: str, name: str) -> str:
    if library == "torch":
        return f"{name}.contiguous()"
    return f"{'cupy' if library == 'cupy' else 'numpy'}.ascontiguousarray({name})"


def check_alike(given: Rows, name: str, like: Rows, what: str) -> None:
    """Raise unless `given` is of the library, device and dtype of `like`, called `what` in messages."""
    if given.library != like.library:
        raise TypeError(f"{name} must be of the same library as {what}, {like.library}; got {given.library}")
    if given.device != like.device:
        raise TypeError(f"{name} must be on the device of {what}, {like.device}; got {given.device}")
    if given.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {what}, {like.dtype}; got {given.dtype}")


# -- libraries ----------------------------------------------------------------------------------------------


def _memory(value: Any, name: str) -> Memory:
    library = _library(value)
    if library == "numpy":
        return _numpy_memory(value, name, library)
    if library == "torch":
        return _torch_memory(value, name)
    if library == "jax":
        return _jax_memory(value, name)
    if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        raise TypeError(f"{name} must be {_KINDS}; got {type(value).__name__}")
    kind = value.__dlpack_device__()[0]
    if kind in _CUDA:
        return _cuda_memory(value, name, library)
    _check_place(kind == _CPU, name)
    try:
        view = _view_through_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be read through DLPack without a copy: {error}") from error
    return _numpy_memory(view, name, library)


def _library(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "numpy"
    for library, kind in (("torch", "Tensor"), ("jax", "Array"), ("cupy", "ndarray")):
        module = sys.modules.get(library)
        if module is not None and isinstance(value, getattr(module, kind, ())):
            return library
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _view_through_dlpack(value: Any) -> np.ndarray:
    try:
        return np.from_dlpack(value, copy=False)
    except TypeError:  # an exporter from before the keyword
        return np.from_dlpack(value)


def _numpy_memory(array: np.ndarray, name: str, library: str) -> Memory:
    dtype, address_of = _described(array.dtype, array.ndim)
    if dtype not in ITEMSIZE:
        swapped = array.dtype.name in ITEMSIZE
        hint = f". Convert it with {name}.astype('={array.dtype.str[1:]}')" if swapped else ""
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {array.dtype}{hint}")
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array; hand over {name}.data or {name}.filled(…)")
    return Memory(address_of(array), array.shape, array.strides, dtype, library, array)


def _address(array: np.ndarray) -> int:
    return _described(array.dtype, array.ndim)[1](array)


@cache  # asking NumPy for the name takes longer than the rest of the checks
def _described(dtype: np.dtype, ndim: int) -> tuple[str | None, Callable[[np.ndarray], int]]:
    """The dtype's name, and a function that takes such an array and returns its address."""
    return dtype.name if dtype.isnative else None, addresses.address_of(dtype, ndim)


def _torch_memory(tensor: Any, name: str) -> Memory:
    torch = sys.modules["torch"]
    if tensor.requires_grad:
        raise TypeError(f"{name} requires grad; hand over {name}.detach()")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor; got the layout {tensor.layout}")
    if tensor.is_neg():
        raise TypeError(f"{name} is a lazy negation; hand over {name}.resolve_neg()")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or _has_tangent(tensor):
        raise TypeError(f"{name} is being differentiated or mapped; call fastnewton outside of that")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}")
    if tensor.device.type == "cuda":
        return _cuda_memory(tensor, name, "torch")
    _check_place(tensor.device.type == "cpu", name)
    try:
        view = tensor.view(torch.int16).numpy() if dtype == "bfloat16" else tensor.numpy()
    except (RuntimeError, TypeError) as error:
        raise TypeError(f"{name} has no memory that can be read: {error}") from error
    return Memory(_address(view), view.shape, view.strides, dtype, "torch", tensor)


def _has_tangent(tensor: Any) -> bool:
    forward = sys.modules["torch"].autograd.forward_ad
    return forward._current_level >= 0 and forward.unpack_dual(tensor).tangent is not None


def _jax_memory(array: Any, name: str) -> Memory:
    if isinstance(array, sys.modules["jax"].core.Tracer):
        raise TypeError(f"{name} is a JAX tracer; call fastnewton outside jit, grad and vmap")
    if not isinstance(array.dtype, np.dtype):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {array.dtype}")
    if array.is_deleted():
        raise TypeError(f"{name} is a JAX array that was deleted or donated")
    devices = array.devices()
    if len(devices) > 1:
        raise TypeError(f"{name} must lie on one device; got a JAX array on {len(devices)}. Use jax.device_put")
    (device,) = devices
    if device.platform in ("cuda", "gpu"):
        return _cuda_memory(array, name, "jax")
    _check_place(device.platform == "cpu", name)
    found = _numpy_memory(np.asarray(array), name, "jax")
    return found._replace(device=f"cpu:{device.id}") if device.id else found


def _cuda_memory(value: Any, name: str, library: str) -> Memory:
    from fastnewton.arrays import cuda

    return cuda.described(value, name, library)


def _check_place(known: bool, name: str) -> None:
    if not known:
        raise TypeError(f"{name} must be in CPU or CUDA memory; got an array on another kind of device")


# -- result out ---------------------------------------------------------------------------------------------


def output(out: Any, like: Rows, inputs: Sequence[Rows]) -> Output:
    """Memory for a vector like a row of `like`: the caller's `out`, checked, or new."""
    if out is None:
        return _new_output(like)
    if _library(out) == "jax":
        raise TypeError("out must be writable; JAX arrays are immutable, leave out=None")
    target = vector(out, "out", like, "thetas")
    if isinstance(target.owner, np.ndarray) and not target.owner.flags.writeable:
        raise ValueError("out must be writable; got a read-only array")
    begin, nbytes = int(target.table[0]), target.nbytes
    for given in inputs:
        if nbytes and addresses.overlap(begin, begin + nbytes, given.table, nbytes):
            raise ValueError("out must not overlap an input; hand over separate memory or leave out=None")
    return Output(target, lambda: out)


def _new_output(like: Rows) -> Output:
    if like.device.startswith("cuda"):
        from fastnewton.arrays import cuda

        return cuda.new_output(like)
    if like.library == "torch":
        torch = sys.modules["torch"]
        tensor = torch.empty(like.n, dtype=getattr(torch, like.dtype), device="cpu")
        return Output(_row_at(tensor.data_ptr(), like, tensor), lambda: tensor)
    array = aligned(like.n, numpy_dtype(like.dtype))
    target = _row_at(_address(array), like, array)
    return Output(target, partial(_as_jax, array, like.device) if like.library == "jax" else lambda: array)


def _row_at(address: int, like: Rows, owner: Any) -> Rows:
    return like._replace(table=_table(address, 0, 1), owner=owner)


def _as_jax(array: np.ndarray, device: str) -> Any:
    jax = sys.modules["jax"]
    number = int(device.partition(":")[2] or 0)
    with jax.enable_x64(True):  # or float64 would become float32
        return jax.device_put(array, jax.devices("cpu")[number])


def numpy_dtype(dtype: str) -> np.dtype:
    """NumPy's dtype of that name."""
    if dtype != "bfloat16":
        return np.dtype(dtype)
    import ml_dtypes  # there wherever an array of this type came from

    return np.dtype(ml_dtypes.bfloat16)


def aligned(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised C-contiguous array that starts on a cache line."""
    dtype = np.dtype(dtype)
    count = shape if isinstance(shape, int) else math.prod(shape)
    buffer = np.empty(count * dtype.itemsize // 8 + ALIGNMENT // 8 + 1)
    return np.ndarray(shape, dtype, buffer, -_address(buffer) % ALIGNMENT)


# -- small arrays -------------------------------------------------------------------------------------------


def coefficient_vector(value: Any, like: Rows) -> Any:
    """The m coefficients in float64 where `like` is: NumPy's array or, on a CUDA device, CuPy's."""
    given = _memory(value, "coefficients")
    if given.dtype not in ("float32", "float64"):
        raise TypeError(f"coefficients must be float64 or float32; got {given.dtype}")
    if given.shape != (like.m,):
        raise ValueError(f"coefficients must have the shape ({like.m},), one for each worker; got {given.shape}")
    if given.device.startswith("cpu") and like.device.startswith("cpu"):
        return values(given).astype(np.float64)
    from fastnewton.arrays import cuda

    return cuda.coefficients(given, like)


def small_matrices(gram: Any) -> Rows:
    """Where the arrays of a Gram are, which may be made by hand, once they are known to fit together."""
    where = _memory(gram.projection, "gram.projection")
    m = where.shape[0] if len(where.shape) == 1 else 0
    _check_workers(m, "gram.projection")
    of_thetas = [name for name in ("theta_matrix", "cross_matrix") if getattr(gram, name) is not None]
    shapes = {"projection": (m,), "matrix": (m, m)} | dict.fromkeys(of_thetas, (m, m))
    if where.device != "cpu":
        shapes |= {"norm2": (), "floor": ()} | ({"theta_floor": ()} if of_thetas else {})
    for name, shape in shapes.items():
        given = _memory(getattr(gram, name), f"gram.{name}")
        if given.library not in ("numpy", "cupy") or (given.dtype, given.device) != ("float64", where.device):
            raise TypeError(
                f"gram.{name} must be a float64 array of NumPy or CuPy, where gram.projection is, {where.device}; "
                f"got {given.dtype} of {given.library} on {given.device}"
            )
        if given.shape != shape or not _is_contiguous(given):
            raise ValueError(f"gram.{name} must be contiguous and have the shape {shape}; got {given.shape}")
    if where.device == "cpu":
        for name in ("norm2", "floor", "theta_floor"):
            _number(getattr(gram, name), f"gram.{name}")
    return Rows(np.full(m, where.address), 0, "float64", where.library, gram, where.device, where.stream)


def _is_contiguous(given: Memory) -> bool:
    steps = [ITEMSIZE[given.dtype] * math.prod(given.shape[axis + 1 :]) for axis in range(len(given.shape))]
    return all(
        size == 1 or step == wanted for size, step, wanted in zip(given.shape, given.strides, steps, strict=True)
    )


def nonfinite_workers(*matrices: Rows) -> list[int]:
    """The workers with a NaN or an infinity in any of their rows."""
    return [k for k in range(matrices[0].m) if not all(_row_is_finite(given, k) for given in matrices)]


def _row_is_finite(given: Rows, k: int) -> bool:
    chunk = 1 << 18
    for start in range(0, given.n, chunk):
        address, count = int(given.table[k]) + start * given.itemsize, min(chunk, given.n - start)
        part = values(Memory(address, (count,), (given.itemsize,), given.dtype, given.library, given.owner))
        if not np.isfinite(part).all():
            return False
    return True


def memory(one: Rows, dtype: Any, *, read_only: bool = True) -> np.ndarray:
    """The bits of a single row in host memory, as words of `dtype`; its owner must outlive the result."""
    return _at(int(one.table[0]), (one.n,), (one.itemsize,), dtype, read_only)


def values(given: Memory) -> np.ndarray:
    """An array in host memory as NumPy's, bfloat16 widened to float32; its owner must outlive the result."""
    if given.dtype == "bfloat16":
        return (_at(given.address, given.shape, given.strides, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return _at(given.address, given.shape, given.strides, given.dtype)


def _at(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, read_only: bool = True
) -> np.ndarray:
    typestr = np.dtype(dtype).str
    interface = {"shape": shape, "strides": strides, "typestr": typestr, "data": (address, read_only), "version": 3}
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
    if type(value) is float:
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number; got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be within the range of float64; got {type(value).__name__} beyond it") from None


def _words(allowed: tuple[str | None, ...]) -> str:
    return ", ".join(repr(word) for word in allowed[:-1]) + f" or {allowed[-1]!r}"
