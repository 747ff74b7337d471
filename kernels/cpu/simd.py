"""Whole vector registers for Numba kernels, written as LLVM IR.

Numba leaves vectorisation to the compiler, which is slow to compile on long straight-line code, picks its own
register width, and decides how often a float32 sum is rounded before it reaches float64.  Here a kernel says all
three: a `Vectors` object emits loads, arithmetic and reductions on vectors of VECTOR_BYTES inside an
`numba.extending.intrinsic`.  Addresses are plain 64-bit integers throughout.
"""

import platform

from llvmlite import ir
from numba.core import cgutils

from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu.jit import CPU_FEATURES

I32, I64 = ir.IntType(32), ir.IntType(64)
_FLOAT = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
_STORED = {**_FLOAT, "float16": ir.IntType(16), "bfloat16": ir.IntType(16)}


def _machine() -> tuple[int, int, bool]:
    """Bytes in a vector register, how many of them there are, and whether float16 is converted by instructions."""
    features, arm = CPU_FEATURES, platform.machine().lower() in ("arm64", "aarch64")
    if "avx512f" in features:
        return 64, 32, True
    if "avx2" in features:
        return 32, 16, "f16c" in features
    return 16, 32 if arm else 16, arm or "f16c" in features


VECTOR_BYTES, REGISTERS, HALF_IN_HARDWARE = _machine()
CACHE_LINE = 64


def lanes(compute: str) -> int:
    """Values of the type `compute` in one vector."""
    return VECTOR_BYTES // DTYPES[compute].itemsize


class Vectors:
    """Emits IR for vectors of `compute` values that are kept in memory as `storage` values."""

    def __init__(self, builder, storage: str, compute: str):
        self.builder, self.storage, self.compute = builder, storage, compute
        self.lanes = lanes(compute)
        self.scalar = _FLOAT[compute]
        self.type = ir.VectorType(self.scalar, self.lanes)
        self.stride = self.lanes * DTYPES[storage].itemsize  # bytes of one vector in memory

    # -- integers and loops ---------------------------------------------------------------------------------

    def at(self, address, offset, scale: int = 1):
        """address + offset·scale, where offset and scale are Python ints or IR values."""
        if isinstance(offset, int):
            return self.builder.add(address, I64(offset * scale))
        return self.builder.add(address, self.builder.mul(offset, I64(scale) if isinstance(scale, int) else scale))

    def pointers(self, table, first, count: int, offset):
        """Addresses of element `offset` in the rows first … first+count−1 of a table of row addresses."""
        entry = self.at(table, first, 8)
        size = DTYPES[self.storage].itemsize
        return [
            self.at(self.builder.load(self._pointer(self.at(entry, 8 * k), I64)), offset, size) for k in range(count)
        ]

    def loop(self, count):
        """A counted loop; use as `with v.loop(count) as step:` where step.index is the counter."""
        return cgutils.for_range(self.builder, I64(count) if isinstance(count, int) else count)

    def variable(self):
        """A register that lives across a loop's iterations."""
        return cgutils.alloca_once(self.builder, self.type)

    def _pointer(self, address, pointee):
        return self.builder.inttoptr(address, pointee.as_pointer())

    # -- memory ---------------------------------------------------------------------------------------------

    def load(self, address):
        """One vector from caller's memory, converted from storage to compute."""
        stored = ir.VectorType(_STORED[self.storage], self.lanes)
        raw = self.builder.load(self._pointer(address, stored), align=DTYPES[self.storage].itemsize)
        return self._widened(raw)

    def store(self, value, address, nontemporal: bool = False):
        """One vector to caller's memory, rounded to storage; returns what a reader will see."""
        raw = self._narrowed(value)
        align = self.stride if nontemporal else DTYPES[self.storage].itemsize
        instruction = self.builder.store(raw, self._pointer(address, raw.type), align=align)
        if nontemporal:
            instruction.set_metadata("nontemporal", self.builder.module.add_metadata([I32(1)]))
        return self._widened(raw)

    def load_work(self, address):
        """One vector of compute values from aligned scratch memory."""
        return self.builder.load(self._pointer(address, self.type), align=VECTOR_BYTES)

    def store_work(self, value, address):
        """One vector of compute values to aligned scratch memory."""
        self.builder.store(value, self._pointer(address, self.type), align=VECTOR_BYTES)

    def prefetch(self, address, to_write: bool = False):
        """Bring a cache line into the second-level cache, since the first is too small for all that is ahead; one that
        is about to be written, into the first."""
        byte = ir.IntType(8).as_pointer()
        function = self._declared("llvm.prefetch.p0", ir.VoidType(), [byte, I32, I32, I32])
        how = [I32(int(to_write)), I32(2 + to_write), I32(1)]
        self.builder.call(function, [self.builder.inttoptr(address, byte), *how])

    def _widened(self, raw):
        if self.storage == self.compute:
            return raw
        if self.storage == "bfloat16":
            bits = self.builder.zext(raw, self._ints())
            raw = self.builder.bitcast(self.builder.shl(bits, self._ints(16)), self._singles())
        elif self.storage == "float16":
            raw = self._single_of_half(raw)  # to float64 there is no instruction, so no direct way
        return raw if raw.type == self.type else self.builder.fpext(raw, self.type)

    def _narrowed(self, value):
        b = self.builder
        if self.storage == self.compute:
            return value
        if self.compute == "float64":
            value = b.fptrunc(value, self._singles())
        if self.storage == "float32":
            return value
        if self.storage == "float16":
            return self._half_of_single(value)
        bits = b.bitcast(value, self._ints())
        odd = b.and_(b.lshr(bits, self._ints(16)), self._ints(1))
        rounded = b.add(bits, b.add(odd, self._ints(0x7FFF)))  # to nearest, ties to even
        quiet = b.or_(bits, self._ints(0x400000))  # rounding must not carry a NaN into infinity
        bits = b.select(b.fcmp_unordered("uno", value, value), quiet, rounded)
        return b.trunc(b.lshr(bits, self._ints(16)), ir.VectorType(ir.IntType(16), self.lanes))

    def _single_of_half(self, raw):
        b = self.builder
        if HALF_IN_HARDWARE:
            return b.fpext(b.bitcast(raw, ir.VectorType(ir.HalfType(), self.lanes)), self._singles())
        # The exponent moves from a bias of 15 to one of 127 by a product, which denormals survive.
        bits = b.zext(raw, self._ints())
        magnitude = b.shl(b.and_(bits, self._ints(0x7FFF)), self._ints(13))
        scaled = b.fmul(b.bitcast(magnitude, self._singles()), ir.Constant(self._singles(), [2.0**112] * self.lanes))
        special = b.icmp_unsigned(">=", magnitude, self._ints(0x7C00 << 13))
        ordinary = b.bitcast(scaled, self._ints())
        magnitude = b.select(special, b.or_(magnitude, self._ints(0x7F800000)), ordinary)
        sign = b.shl(b.and_(bits, self._ints(0x8000)), self._ints(16))
        return b.bitcast(b.or_(magnitude, sign), self._singles())

    def _half_of_single(self, value):
        b, words = self.builder, ir.VectorType(ir.IntType(16), self.lanes)
        if HALF_IN_HARDWARE:
            return b.bitcast(b.fptrunc(value, ir.VectorType(ir.HalfType(), self.lanes)), words)
        bits = b.bitcast(value, self._ints())
        magnitude = b.and_(bits, self._ints(0x7FFFFFFF))
        odd = b.and_(b.lshr(magnitude, self._ints(13)), self._ints(1))
        rebiased = b.sub(magnitude, self._ints(112 << 23))
        ordinary = b.lshr(b.add(rebiased, b.add(odd, self._ints(0xFFF))), self._ints(13))  # to nearest, ties to even
        # Added to ½, a number below 2⁻¹⁴ has its last bit where a half's would be.
        half = ir.Constant(self._singles(), [0.5] * self.lanes)
        lifted = b.bitcast(b.fadd(b.bitcast(magnitude, self._singles()), half), self._ints())
        tiny = b.sub(lifted, self._ints(0x3F000000))
        found = b.select(b.icmp_unsigned("<", magnitude, self._ints(113 << 23)), tiny, ordinary)
        found = b.select(b.icmp_unsigned(">=", magnitude, self._ints(143 << 23)), self._ints(0x7C00), found)
        found = b.select(b.icmp_unsigned(">", magnitude, self._ints(0x7F800000)), self._ints(0x7E00), found)
        return b.trunc(b.or_(found, b.lshr(b.and_(bits, self._ints(0x80000000)), self._ints(16))), words)

    def _singles(self):
        return ir.VectorType(ir.FloatType(), self.lanes)

    def _ints(self, value: int | None = None):
        kind = ir.VectorType(I32, self.lanes)
        return kind if value is None else ir.Constant(kind, [value] * self.lanes)

    # -- arithmetic -----------------------------------------------------------------------------------------

    def constant(self, value: float):
        return ir.Constant(self.type, [value] * self.lanes)

    def broadcast(self, address):
        """The float64 at `address`, rounded to compute, in every lane."""
        scalar = self.builder.load(self._pointer(address, ir.DoubleType()))
        return self._splat(scalar if self.compute == "float64" else self.builder.fptrunc(scalar, self.scalar))

    def reciprocal(self, number):
        """1/number in every lane, for an IR integer."""
        one = ir.Constant(self.scalar, 1.0)
        return self._splat(self.builder.fdiv(one, self.builder.sitofp(number, self.scalar)))

    def _splat(self, scalar):
        empty = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(empty, scalar, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, empty, zeros)

    def add(self, x, y):
        return self.builder.fadd(x, y)

    def sub(self, x, y):
        return self.builder.fsub(x, y)

    def mul(self, x, y):
        return self.builder.fmul(x, y)

    def fma(self, x, y, z):
        """x·y + z, fused where the machine can."""
        suffix = f"v{self.lanes}f{8 * DTYPES[self.compute].itemsize}"
        return self.builder.call(self._declared(f"llvm.fmuladd.{suffix}", self.type, [self.type] * 3), [x, y, z])

    def pairwise(self, values):
        """The sum of the values, added in a balanced tree."""
        values = list(values)
        while len(values) > 1:
            pairs = [self.add(x, y) for x, y in zip(values[::2], values[1::2], strict=False)]
            values = pairs + values[len(values) & ~1 :]
        return values[0]

    def add_lane_sums(self, values, address):
        """As `store_lane_sums`, added to what is there."""
        self.store_lane_sums(values, address, added=True)

    def store_lane_sums(self, values, address, added: bool = False):
        """Each vector's sum over lanes, as consecutive float64: transposed while adding, as many at a time as lanes."""
        for start in range(0, len(values), self.lanes):
            batch = values[start : start + self.lanes]
            order, total = self._transposed_sum(batch + [self.constant(0.0)] * (self.lanes - len(batch)))
            sums = self._shuffled(total, total, [order.index(k) for k in range(len(batch))])
            if self.compute != "float64":
                sums = self.builder.fpext(sums, ir.VectorType(ir.DoubleType(), len(batch)))
            target = self._pointer(self.at(address, 8 * start), sums.type)
            sums = self.add(self.builder.load(target, align=8), sums) if added else sums
            self.builder.store(sums, target, align=8)

    def _transposed_sum(self, vectors):
        """One vector that holds every input's lane sum, and which input each lane belongs to."""
        owners = [[k] * self.lanes for k in range(len(vectors))]
        segment = self.lanes
        while len(vectors) > 1:
            half = segment // 2
            low = [s + k for s in range(0, self.lanes, segment) for k in range(half)]
            low = low + [k + self.lanes for k in low]
            high = [k + half for k in low]
            vectors = [
                self.add(self._shuffled(x, y, low), self._shuffled(x, y, high))
                for x, y in zip(vectors[::2], vectors[1::2], strict=True)
            ]
            owners = [[(x + y)[k] for k in low] for x, y in zip(owners[::2], owners[1::2], strict=True)]
            segment = half
        return owners[0], vectors[0]

    def _shuffled(self, x, y, picks):
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(picks)), picks))

    def all_zero(self, value):
        """An IR int64: 1 if every lane is zero, 0 if any is something else or NaN."""
        ordered = self.builder.fcmp_ordered("==", value, self.constant(0.0))
        mask = self.builder.bitcast(ordered, ir.IntType(self.lanes))
        full = ir.Constant(ir.IntType(self.lanes), (1 << self.lanes) - 1)
        return self.builder.zext(self.builder.icmp_unsigned("==", mask, full), I64)

    def _declared(self, name, result, arguments):
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)
