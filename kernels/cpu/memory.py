"""Raw memory in compiled code: numbers at addresses, argument blocks, atomic operations, and where arrays lie."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types

from fastnewton.kernels.cpu.jit import INT, INTS, address, entry, intrinsic, jit

_I1, _I8, _I64 = ir.IntType(1), ir.IntType(8), ir.IntType(64)
_BYTES = _I8.as_pointer()


def _pointer(builder: Any, where: Any, pointee: Any = _I64) -> Any:
    return builder.inttoptr(where, pointee.as_pointer())


def _emits(instructions):
    """Return what Numba asks of an intrinsic, from a function of the builder and the arguments."""
    return lambda context, builder, signature, args: instructions(builder, *args)


@intrinsic
def integers(typingctx, where):
    """Return the int64 numbers at an address, to be indexed without checks."""
    return types.CPointer(types.int64)(INT), _emits(_pointer)


@intrinsic
def floats(typingctx, where):
    """Return the float64 numbers at an address, to be indexed without checks."""
    return types.CPointer(types.float64)(INT), _emits(lambda b, where: _pointer(b, where, ir.DoubleType()))


@intrinsic
def pointer_at(typingctx, where):
    """Return an address as `numba.carray` takes it."""
    return types.voidptr(INT), _emits(lambda b, where: _pointer(b, where, _I8))


@intrinsic(prefer_literal=True)
def stack_memory(typingctx, count):
    """Return the address of so many int64 numbers, a constant, in the function's own frame."""

    def allocate(builder, _):
        with builder.goto_entry_block():
            memory = builder.alloca(_I64, count.literal_value)
        return builder.ptrtoint(memory, _I64)

    return INT(count), _emits(allocate)


@intrinsic
def copy(typingctx, target, source, length):
    """Copy so many bytes between addresses; return their number."""

    def move(builder, target, source, length):
        function = builder.module.declare_intrinsic("llvm.memcpy", [_BYTES, _BYTES, _I64])
        builder.call(function, [*(_pointer(builder, where, _I8) for where in (target, source)), length, _I1(0)])
        return length

    return INT(INT, INT, INT), _emits(move)


@intrinsic
def clear(typingctx, where, length):
    """Set so many bytes at an address to zero; return their number."""

    def fill(builder, where, length):
        function = builder.module.declare_intrinsic("llvm.memset", [_BYTES, _I64])
        builder.call(function, [_pointer(builder, where, _I8), _I8(0), length, _I1(0)])
        return length

    return INT(INT, INT), _emits(fill)


@intrinsic
def read(typingctx, where):
    """Read the int64 at an address that other threads write."""
    return INT(INT), _emits(lambda b, where: b.load_atomic(_pointer(b, where), "seq_cst", 8))


@intrinsic
def fetch_and_add(typingctx, where, number):
    """Add to the int64 at an address; return what it was before: no two threads get the same."""
    return INT(INT, INT), _emits(lambda b, where, number: b.atomic_rmw("add", _pointer(b, where), number, "seq_cst"))


@intrinsic
def exchange(typingctx, where, number):
    """Replace the int64 at an address; return what it was before."""
    return INT(INT, INT), _emits(lambda b, where, number: b.atomic_rmw("xchg", _pointer(b, where), number, "seq_cst"))


@jit
def keep_alive(array):
    """Keep an array up to here: Numba frees it after its last use, and the use of its address does not count."""


@jit
def copy_rows(source, target, count, offset, length, stride, buffer):
    """Copy `length` bytes at `offset` of so many rows into zeroed memory, rows `stride` apart; fill in their table."""
    rows, copies = integers(source), integers(target)
    clear(buffer, count * stride)
    for k in range(count):
        copies[k] = buffer + k * stride
        copy(copies[k], rows[k] + offset, length)


# -- from Python ----------------------------------------------------------------------------------------------


def address_of(dtype: np.dtype, ndim: int):
    """Return a function from an array of this kind to its address, in a fraction of the time of `ndarray.ctypes`."""
    if dtype not in (np.float32, np.float64):  # Numba knows the others on some machines only
        return lambda array: array.ctypes.data
    return entry(_address, types.Array(from_dtype(dtype), ndim, "A", readonly=True))


@jit
def _address(array):
    return address(array)


@jit
def overlaps(begin, end, table, length):
    for k in range(table.size):
        if table[k] < end and begin < table[k] + length:
            return 1
    return 0


overlap = entry(overlaps, INT, INT, INTS, INT)
