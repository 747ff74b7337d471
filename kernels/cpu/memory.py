"""Raw memory in compiled code: by address, with sizes that follow from a type's name."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu.jit import INT, jit
from fastnewton.kernels.cpu.simd import lanes
from fastnewton.kernels.cpu.threads import address


@intrinsic
def pointer_at(typingctx, where):
    """An address as `carray` takes it."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(INT), codegen


@jit
def copy_rows(source, target, offset, length, stride, buffer):
    """Copy `length` bytes at `offset` of every row into zeroed memory, rows `stride` apart."""
    for k in range(source.size):
        target[k] = address(buffer) + k * stride
        copy_bytes(target[k], source[k] + offset, length)


@intrinsic
def copy_bytes(typingctx, target, source, length):
    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, byte) for address in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)

    return types.void(INT, INT, INT), codegen


@intrinsic
def clear_bytes(typingctx, address, length):
    def codegen(context, builder, signature, args):
        cgutils.memset(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), args[1], 0)

    return types.void(address, length), codegen


def itemsize_of(storage):
    """Bytes of a stored value; this and the next are only ever called from compiled code."""


@overload(itemsize_of, prefer_literal=True)
def _itemsize_compiled(storage):
    size = DTYPES[storage.literal_value].itemsize
    return lambda storage: size


def lanes_of(compute):
    """Values of that type in a vector."""


@overload(lanes_of, prefer_literal=True)
def _lanes_compiled(compute):
    width = lanes(compute.literal_value)
    return lambda compute: width
