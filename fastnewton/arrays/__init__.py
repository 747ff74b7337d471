"""Take the caller's arrays as rows in memory, checked and never copied, and allocate results of the caller's kind.

NumPy, PyTorch, JAX and CuPy arrays are recognised without importing a library that the caller did not; anything else is
taken through `__dlpack__`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastnewton import checks
from fastnewton.arrays import cpu, cuda
from fastnewton.arrays.cpu import allocate, nonfinite_workers, view_plain  # noqa: F401  (for other modules)
from fastnewton.arrays.layout import CPU, Layout, Output, Rows, identify, locate, row_addresses
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu.memory import overlap

MAX_WORKERS = 1024


# -- rows in ------------------------------------------------------------------------------------------------


def rows(value: Any, name: str) -> Rows:
    """Take the workers' vectors: an (m, n) array or a sequence of m arrays of length n."""
    if isinstance(value, (list, tuple)):
        return _rows_of_sequence(value, name)
    return _take(value, name, 2, "an (m, n) array, a row for each worker, or a sequence of m arrays of length n")


def single(value: Any, name: str) -> Rows:
    """Take one vector on its own."""
    return _take(value, name, 1, "a one-dimensional array")


def vector(value: Any, name: str, like: Rows, what: str) -> Rows:
    """Take one vector that goes with the rows `like`, called `what` in messages."""
    one = single(value, name)
    _check_alike(one, name, like, what)
    return one


def pair(thetas: Any, grads: Any) -> tuple[Rows, Rows]:
    """Take thetas and grads of one shape, dtype and library."""
    first, second = rows(thetas, "thetas"), rows(grads, "grads")
    _check_alike(second, "grads", first, "thetas")
    if first.m != second.m:
        raise ValueError(f"grads must have the shape of thetas, with {first.m} rows; got {second.m}")
    return first, second


def rows_of(stack: np.ndarray, dtype: str) -> Rows:
    """Take the rows of our own C-contiguous (m, n) memory, which holds values of `dtype` or their raw bits."""
    table = stack.ctypes.data + stack.strides[0] * np.arange(len(stack), dtype=np.int64)
    return Rows(table, stack.shape[1], dtype, "numpy", stack)


def _take(value: Any, name: str, ndim: int, kinds: str) -> Rows:
    layout = _describe(value, name)
    if len(layout.shape) != ndim:
        raise ValueError(f"{name} must be {kinds}; got an array of shape {layout.shape}")
    m, stride, owner = (layout.shape[0], layout.strides[0], layout.owner) if ndim == 2 else (1, 0, (layout.owner,))
    _check_workers(m, name)
    _check_strides(layout, name)
    table = row_addresses(layout.address, stride, m)
    return Rows(table, layout.shape[-1], layout.dtype, layout.library, owner, layout.device, layout.stream)


def _rows_of_sequence(value: Sequence[Any], name: str) -> Rows:
    _check_workers(len(value), name)
    first = single(value[0], f"{name}[0]")
    vectors = [first, *(vector(value[k], f"{name}[{k}]", first, f"{name}[0]") for k in range(1, len(value)))]
    table = np.concatenate([one.table for one in vectors])
    return first._replace(table=table, owner=[one.owner[0] for one in vectors])


def _describe(value: Any, name: str) -> Layout:
    library, device = locate(value, name)
    return (cpu if device.kind == "cpu" else cuda).describe(value, name, library, device)


# -- checks -------------------------------------------------------------------------------------------------


def _check_alike(one: Rows, name: str, like: Rows, what: str) -> None:
    """Raise unless `one` is of the library, device, dtype and length of `like`, called `what` in messages."""
    if one.library != like.library:
        raise TypeError(f"{name} must be of the same library as {what}, {like.library}; got {one.library}")
    if one.device != like.device:
        raise TypeError(f"{name} must be on the device of {what}, {like.device}; got {one.device}")
    if one.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {what}, {like.dtype}; got {one.dtype}")
    if one.n != like.n:
        raise ValueError(f"{name} must have the length n = {like.n} of {what}; got {one.n}")


def _check_workers(m: int, name: str) -> None:
    if not 1 <= m <= MAX_WORKERS:
        raise ValueError(f"{name} must hold 1 to {MAX_WORKERS} workers; got m = {m}")


def _check_strides(layout: Layout, name: str) -> None:
    n, itemsize, strides = layout.shape[-1], DTYPES[layout.dtype].itemsize, layout.strides
    if strides == (n * itemsize, itemsize)[-len(strides) :] and layout.address % itemsize == 0:
        return
    row_stride = strides[0] if len(strides) == 2 and layout.shape[0] > 1 else n * itemsize
    remedies = {"torch": f"{name}.contiguous()", "cupy": f"cupy.ascontiguousarray({name})"}
    remedy = "a contiguous copy, such as " + remedies.get(layout.library, f"numpy.ascontiguousarray({name})")
    if n > 1 and strides[-1] != itemsize:
        fault = f"have unit stride along n; got a stride of {strides[-1]} bytes for items of {itemsize}"
    elif row_stride < n * itemsize:
        fault = f"have rows at least n = {n} items apart; got a row stride of {row_stride} bytes"
    elif layout.address % itemsize or row_stride % itemsize:
        fault = f"be aligned to its items of {itemsize} bytes"
        remedy = f"a copy, such as {name}.{'clone' if layout.library == 'torch' else 'copy'}()"
    else:
        return
    raise ValueError(f"{name} must {fault}. Make {remedy}")


# -- result out ---------------------------------------------------------------------------------------------


def output(out: Any, like: Rows, inputs: Sequence[Rows]) -> Output:
    """Take the caller's `out`, checked, or allocate a vector like a row of `like`."""
    if out is None:
        return (cpu if like.device.kind == "cpu" else cuda).new_output(like)
    if identify(out) == "jax":
        raise TypeError("out must be writable; JAX arrays are immutable, leave out=None")
    target = vector(out, "out", like, "thetas")
    if target.device == CPU and not target.owner[0].flags.writeable:
        raise ValueError("out must be writable; got a read-only array")
    begin, nbytes = int(target.table[0]), target.nbytes
    for one in inputs:
        if nbytes and overlap(begin, begin + nbytes, one.table, nbytes):
            raise ValueError("out must not overlap an input; hand over separate memory or leave out=None")
    return Output(target, lambda: out)


# -- small arrays -------------------------------------------------------------------------------------------


def coefficients(value: Any, like: Rows) -> Any:
    """Convert the m coefficients to float64 where `like` is: NumPy's array or, on a CUDA device, CuPy's."""
    layout = _describe(value, "coefficients")
    if layout.dtype not in ("float32", "float64"):
        raise TypeError(f"coefficients must be float64 or float32; got {layout.dtype}")
    if layout.shape != (like.m,):
        raise ValueError(f"coefficients must have the shape ({like.m},), one for each worker; got {layout.shape}")
    if layout.device.kind == like.device.kind == "cpu":
        return layout.owner.astype(np.float64)
    return cuda.coefficients(layout, like)


def check_gram(gram: Any) -> Rows:
    """Check that the arrays of a Gram, which may be made by hand, fit together; rows without length say where."""
    where = _describe(gram.projection, "gram.projection")
    m = where.shape[0] if len(where.shape) == 1 else 0
    _check_workers(m, "gram.projection")
    of_thetas = [name for name in ("theta_matrix", "cross_matrix") if getattr(gram, name) is not None]
    shapes: dict[str, tuple[int, ...]] = {"projection": (m,), "matrix": (m, m)}
    shapes |= dict.fromkeys(of_thetas, (m, m))
    for name in ("norm2", "floor", "theta_floor"):
        if where.device == CPU:
            checks.number(getattr(gram, name), f"gram.{name}")
        elif name != "theta_floor" or of_thetas:
            shapes[name] = ()
    for name, shape in shapes.items():
        layout = _describe(getattr(gram, name), f"gram.{name}")
        if layout.library not in ("numpy", "cupy") or (layout.dtype, layout.device) != ("float64", where.device):
            kind = f"{layout.dtype} of {layout.library} on {layout.device}"
            raise TypeError(f"gram.{name} must be a float64 array of NumPy or CuPy on {where.device}; got {kind}")
        if layout.shape != shape or not layout.owner.flags.c_contiguous:
            raise ValueError(f"gram.{name} must be contiguous and have the shape {shape}; got {layout.shape}")
    return Rows(np.full(m, where.address), 0, "float64", where.library, gram, where.device, where.stream)
