"""Kernels to call as those of a cupy.RawModule, run on the CPU."""

import ctypes
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from . import build

ORDERS = ("ascending", "descending", "random")
_schedule = ("ascending", 0)


class SimError(Exception):
    """A kernel did what it must not: the kind of mistake, file and line, block and thread."""


@contextmanager
def schedule(order, seed=0):
    """In which order the launches within run their blocks and threads."""
    global _schedule
    if order not in ORDERS:
        raise ValueError(f"order is one of {', '.join(ORDERS)}, not {order!r}")
    previous, _schedule = _schedule, (order, seed)
    try:
        yield
    finally:
        _schedule = previous


def source(path=None, options=(), sanitize=None, *, code=None):
    """What SimModule with the same arguments compiles."""
    # In a process that runs under a sanitizer (sanitized.py), modules are built for it.
    sanitize = sanitize or os.environ.get("CUDASIM_SANITIZE")
    return build.Source(None if path is None else Path(path), code, tuple(options), sanitize)


def compile_all(modules, workers=None):
    """Compile at once what `SimModule(**module)` will want for each of the modules."""
    build.compile_all([source(**module) for module in modules], workers)


def poisoned(shape, dtype):
    """An array of NaN, or of another value that catches the eye, for a kernel to write to."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF
    return array


class _Type(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_char), ("size", ctypes.c_uint32))


class _Kernel(ctypes.Structure):
    _fields_ = (("call", ctypes.c_void_p), ("types", ctypes.POINTER(_Type)), ("parameters", ctypes.c_char_p))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("order", ctypes.c_int32),
    )


class SimModule:
    """The kernels of a .cu file, or of its text, compiled with the options -D, -U and -I."""

    def __init__(self, path=None, options=(), sanitize=None, *, code=None):
        self.source = source(path, options, sanitize, code=code)
        if self.source.sanitize != os.environ.get("CUDASIM_SANITIZE"):
            raise RuntimeError(f"call this under run_sanitized({self.source.sanitize!r}, …)")
        # Holds the GIL: a launch is not to meet another one.
        self._library = ctypes.PyDLL(str(self.source.build()))
        self._library.cudasim_launch.restype = ctypes.c_char_p

    def get_function(self, name):
        return SimKernel(self._library, name)


class SimKernel:
    def __init__(self, library, name):
        self.name = name
        self._launch = library.cudasim_launch
        try:
            self._kernel = _Kernel.in_dll(library, f"cudasim_kernel_{name}")
        except ValueError:
            raise AttributeError(f'no kernel `extern "C" __global__ void {name}(…)`') from None
        self._types = []
        while self._kernel.types[len(self._types)].size:
            entry = self._kernel.types[len(self._types)]
            self._types.append((entry.kind.decode(), entry.size))

    def __repr__(self):
        return f"{self.name}({self._kernel.parameters.decode()})"

    def __call__(self, grid, block, args, shared_mem=0, stream=None):
        if len(args) != len(self._types):
            raise TypeError(f"{self!r} takes {len(self._types)} arguments, not {len(args)}")
        values = [self._convert(i, argument) for i, argument in enumerate(args)]
        pointers = (ctypes.c_void_p * (len(values) or 1))(*map(ctypes.addressof, values))
        order, seed = _schedule
        launch = _Launch(_three(grid), _three(block), shared_mem, seed, ORDERS.index(order))
        message = self._launch(ctypes.byref(self._kernel), pointers, ctypes.byref(launch))
        if message is not None:
            raise SimError(f"{self.name}: {message.decode()}")

    def _convert(self, i, argument):
        """The bytes of an argument, as the kernel finds them."""
        kind, size = self._types[i]
        if kind == "p":
            return ctypes.c_void_p(self._address(i, argument))
        # On a GPU a scalar of another width is read as it comes. A structure may also come as an array of its size, and
        # one of a single pointer as what it points to.
        if kind == "V" and size == 8 and hasattr(argument, "data") and hasattr(argument.data, "ptr"):
            argument = np.uint64(argument.data.ptr)
            return (ctypes.c_char * size).from_buffer_copy(argument.tobytes())
        fits = isinstance(argument, np.generic) and (argument.dtype.kind, argument.dtype.itemsize) == (kind, size)
        fits = fits or (kind == "V" and isinstance(argument, np.ndarray) and argument.nbytes == size)
        if not fits:
            wanted = f"a structure of {size} bytes" if kind == "V" else f"numpy.{np.dtype(f'{kind}{size}').name}"
            raise TypeError(f"argument {i} of {self!r}: {wanted} wanted, not {_describe(argument)}")
        return (ctypes.c_char * size).from_buffer_copy(argument.tobytes())

    def _address(self, i, argument):
        if argument is None or type(argument) is int:
            return argument
        if isinstance(argument, np.ndarray):
            return argument.ctypes.data
        try:
            return argument.data.ptr
        except AttributeError:
            raise TypeError(f"argument {i} of {self!r}: an array wanted, not {_describe(argument)}") from None


def _describe(argument):
    return f"numpy.{argument.dtype.name}" if isinstance(argument, np.generic) else type(argument).__name__


def _three(shape):
    shape = tuple(map(int, shape))
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"a grid or block has one to three dimensions, not {len(shape)}")
    return (ctypes.c_uint32 * 3)(*shape, *(1,) * (3 - len(shape)))
