"""Where NumPy arrays lie in memory, at a fraction of the time that `ndarray.ctypes` takes."""

import numpy as np
from numba import types
from numba.np.numpy_support import from_dtype

from fastnewton.kernels.cpu.jit import INT, INTS, entry, jit
from fastnewton.kernels.cpu.threads import address


def address_of(dtype: np.dtype, ndim: int):
    """A function that takes an array of this kind and returns its address."""
    if dtype not in (np.float32, np.float64):  # Numba knows the others on some machines only
        return lambda array: array.ctypes.data
    return entry(_address, types.Array(from_dtype(dtype), ndim, "A", readonly=True))


@jit
def _address(array):
    return address(array)


@jit
def overlaps(begin, end, table, length):
    for row in table:
        if row < end and begin < row + length:
            return 1
    return 0


overlap = entry(overlaps, INT, INT, INTS, INT)
