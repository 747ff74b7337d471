"""The language of the CPU kernels: whole vector registers, written as LLVM IR.

Numba leaves vectorisation to the compiler, which is slow to compile on long straight-line code, picks its own
register width, and decides how often a float32 sum is rounded before it reaches float64.  Here a kernel says all
three.  It is a Python function that runs once, at compile time, on objects whose operators emit instructions:

    @kernel
    def norms(v, count: Constant, table, steps, sums):
        rows = v.rows(table, 0, count, 0)            # the caller's memory, converted from storage to compute
        total = v.sums(range(count))                 # accumulators in registers
        for c in v.range(steps):                     # a loop of the compiled code, one vector after the other
            for k, row in enumerate(rows):           # a loop of the compiler: unrolled
                x = row[c]
                total[k] += x * x                    # a fused multiply-add
        v.store_lane_sums(total.values(), sums)

    norms.address("float32", "float32", 8)           # machine code for these types and constants

Arguments are 64-bit integers, addresses among them.
"""

import inspect
import platform
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar

from llvmlite import ir
from numba import types

from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu.jit import CPU_FEATURES, INT, code_address, intrinsic, jit

I1, I32, I64, BYTE = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_FLOAT: dict[str, Any] = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
_STORED = {**_FLOAT, "float16": ir.IntType(16), "bfloat16": ir.IntType(16)}
CACHE_LINE = 64


def _machine() -> tuple[int, int, bool]:
    """Return the bytes of a vector register, the number of registers, and whether instructions convert float16."""
    features, arm = CPU_FEATURES, platform.machine().lower() in ("arm64", "aarch64")
    if "avx512f" in features:
        return 64, 32, True
    if "avx2" in features:
        return 32, 16, "f16c" in features
    return 16, 32 if arm else 16, arm or "f16c" in features


VECTOR_BYTES, REGISTERS, HALF_IN_HARDWARE = _machine()


def lanes(compute: str) -> int:
    """Return how many values of the type `compute` one vector holds."""
    return VECTOR_BYTES // DTYPES[compute].itemsize


# -- values -------------------------------------------------------------------------------------------------


def _operator(instruction: str, swapped: bool = False) -> Callable:
    def emit(self, other):
        x, y = (_raw(other), _raw(self)) if swapped else (_raw(self), _raw(other))
        return Integer(self.builder, getattr(self.builder, instruction)(x, y))

    return emit


class Integer:
    """A 64-bit integer of the compiled code, with Python's operators; non-negative where it is divided or shifted."""

    def __init__(self, builder: Any, value: Any):
        self.builder, self.value = builder, value

    __add__ = __radd__ = _operator("add")
    __mul__ = __rmul__ = _operator("mul")
    __sub__, __rsub__ = _operator("sub"), _operator("sub", swapped=True)
    __lshift__, __rlshift__ = _operator("shl"), _operator("shl", swapped=True)
    __rshift__, __floordiv__ = _operator("lshr"), _operator("udiv")

    def __lt__(self, other) -> Any:
        return self.builder.icmp_signed("<", self.value, _raw(other))

    def __gt__(self, other) -> Any:
        return self.builder.icmp_signed(">", self.value, _raw(other))


def _raw(number: Integer | int) -> Any:
    return I64(number) if isinstance(number, int) else number.value


class Vector:
    """A register full of `compute` values."""

    def __init__(self, v: "Vectors", value: Any):
        self.v, self.value = v, value

    def __add__(self, other: "Vector") -> "Vector":
        if isinstance(other, Product):
            return self.v.fma(other.x, other.y, self)
        return Vector(self.v, self.v.builder.fadd(self.value, other.value))

    def __sub__(self, other: "Vector") -> "Vector":
        return Vector(self.v, self.v.builder.fsub(self.value, other.value))

    def __mul__(self, other: "Vector") -> "Product":
        return Product(self.v, self, other)


class Product(Vector):
    """x·y, not yet rounded: added to a vector it becomes a fused multiply-add, where the machine has one."""

    def __init__(self, v: "Vectors", x: Vector, y: Vector):
        self.v, self.x, self.y = v, x, y

    @cached_property
    def value(self) -> Any:
        return self.v.builder.fmul(self.x.value, self.y.value)


class Sums:
    """Accumulators, one for each key, that stay in registers while a loop runs."""

    def __init__(self, v: "Vectors", start: dict):
        self._v = v
        self._slots = {key: v.allocate(v.type) for key in start}
        for key, value in start.items():
            self[key] = value

    def __iter__(self) -> Iterator:  # over the keys
        return iter(self._slots)

    def __getitem__(self, key) -> Vector:
        return Vector(self._v, self._v.builder.load(self._slots[key]))

    def __setitem__(self, key, value: Vector) -> None:
        self._v.builder.store(value.value, self._slots[key])

    def values(self) -> list[Vector]:
        return [self[key] for key in self]


class Row:
    """A row in the caller's memory: row[c] is its c-th vector, of `storage` values in memory and of `compute` here."""

    def __init__(self, v: "Vectors", address: Integer):
        self.v, self.address, self.itemsize = v, address, DTYPES[v.storage].itemsize

    def at(self, c) -> Integer:
        """Return the address of the c-th vector."""
        return self.address + c * (self.v.lanes * self.itemsize)

    def moved(self, items) -> "Row":
        """Return the row from its item number `items` on."""
        return type(self)(self.v, self.address + items * self.itemsize)

    def __getitem__(self, c) -> Vector:
        v = self.v
        stored = ir.VectorType(_STORED[v.storage], v.lanes)
        return Vector(v, v.widen(v.builder.load(v.pointer(self.at(c), stored), align=self.itemsize)))

    def store(self, c, value: Vector, nontemporal: bool = False) -> Vector:
        """Round a vector to `storage` and store it; return what a reader will see."""
        v = self.v
        raw = v.narrow(value.value)
        align = v.stride if nontemporal else self.itemsize
        instruction = v.builder.store(raw, v.pointer(self.at(c), raw.type), align=align)
        if nontemporal:
            instruction.set_metadata("nontemporal", v.builder.module.add_metadata([I32(1)]))
        return Vector(v, v.widen(raw))


class Scratch(Row):
    """A row of `compute` values in aligned memory of our own."""

    def __init__(self, v: "Vectors", address: Integer):
        super().__init__(v, address)
        self.itemsize = DTYPES[v.compute].itemsize

    def __getitem__(self, c) -> Vector:
        return Vector(self.v, self.v.builder.load(self.v.pointer(self.at(c), self.v.type), align=VECTOR_BYTES))

    def __setitem__(self, c, value: Vector) -> None:
        self.v.builder.store(value.value, self.v.pointer(self.at(c), self.v.type), align=VECTOR_BYTES)


# -- the machine --------------------------------------------------------------------------------------------


class Vectors:
    """Emits instructions on vectors of `compute` values that the caller's memory keeps as `storage` values."""

    def __init__(self, builder: Any, storage: str, compute: str):
        self.builder, self.storage, self.compute = builder, storage, compute
        self.lanes = lanes(compute)
        self.scalar = _FLOAT[compute]
        self.type = ir.VectorType(self.scalar, self.lanes)
        self.stride = self.lanes * DTYPES[storage].itemsize  # bytes of one vector in the caller's memory

    def range(self, start, stop=None) -> Iterator[Integer]:
        """Emit a loop, whose body is what the caller's `for` does with the one counter that this yields."""
        b = self.builder
        start, stop = (0, start) if stop is None else (start, stop)
        before = b.block
        condition, body, end = (b.append_basic_block(name) for name in ("condition", "body", "end"))
        b.branch(condition)
        b.position_at_end(condition)
        index = b.phi(I64)
        b.cbranch(b.icmp_signed("<", index, _raw(stop)), body, end)
        b.position_at_end(body)
        yield Integer(b, index)
        following = b.add(index, I64(1), flags=["nsw"])
        index.add_incoming(_raw(start), before)
        index.add_incoming(following, b.block)
        b.branch(condition)
        b.position_at_end(end)

    def integer(self, number: Integer | int) -> Integer:
        """Return an Integer for a Python int."""
        return Integer(self.builder, _raw(number))

    def select(self, condition: Any, x: Any, y: Any) -> Any:
        """Return x, an integer or a Vector, where the condition holds, else y."""
        if isinstance(x, Vector):
            return Vector(self, self.builder.select(condition, x.value, y.value))
        return Integer(self.builder, self.builder.select(condition, _raw(x), _raw(y)))

    def minimum(self, x, y) -> Integer:
        """Return the smaller integer."""
        return self.select(x < y, x, y)

    # -- memory ---------------------------------------------------------------------------------------------

    def pointer(self, address: Integer, pointee: Any) -> Any:
        return self.builder.inttoptr(address.value, pointee.as_pointer())

    def allocate(self, kind: ir.Type) -> Any:
        """Return a variable of the function, which becomes a register."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(kind)

    def rows(self, table: Integer, first, count: int, offset) -> list[Row]:
        """Return rows first … first+count−1 of a table of row addresses, from their item number `offset` on."""
        entry = table + first * 8
        starts = [self.builder.load(self.pointer(entry + 8 * k, I64)) for k in range(count)]
        return [Row(self, Integer(self.builder, start)).moved(offset) for start in starts]

    def row(self, address: Integer) -> Row:
        return Row(self, address)

    def scratch(self, address: Integer) -> Scratch:
        return Scratch(self, address)

    def clear(self, address: Integer, length: Integer) -> None:
        """Set so many bytes to zero."""
        function = self.builder.module.declare_intrinsic("llvm.memset", [BYTE, I64])
        start = self.builder.inttoptr(address.value, BYTE)
        self.builder.call(function, [start, ir.IntType(8)(0), length.value, I1(0)])

    def prefetch(self, address: Integer, to_write: bool = False) -> None:
        """Bring a cache line into L2, since L1 is too small for all that is ahead; one to be written soon into L1."""
        function = self._declared("llvm.prefetch.p0", ir.VoidType(), [BYTE, I32, I32, I32])
        how = [I32(int(to_write)), I32(2 + to_write), I32(1)]
        self.builder.call(function, [self.builder.inttoptr(address.value, BYTE), *how])

    # -- conversions ----------------------------------------------------------------------------------------

    def widen(self, raw: Any) -> Any:
        """Convert stored values to `compute`."""
        if self.storage == self.compute:
            return raw
        if self.storage == "bfloat16":
            bits = self.builder.zext(raw, self._ints())
            raw = self.builder.bitcast(self.builder.shl(bits, self._ints(16)), self._singles())
        elif self.storage == "float16":
            raw = self._single_of_half(raw)  # to float64 there is no instruction, so no direct way
        return raw if raw.type == self.type else self.builder.fpext(raw, self.type)

    def narrow(self, value: Any) -> Any:
        """Round `compute` values to storage: to nearest, ties to even."""
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
        rounded = b.add(bits, b.add(odd, self._ints(0x7FFF)))
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
        b, halves = self.builder, ir.VectorType(ir.IntType(16), self.lanes)
        if HALF_IN_HARDWARE:
            return b.bitcast(b.fptrunc(value, ir.VectorType(ir.HalfType(), self.lanes)), halves)
        bits = b.bitcast(value, self._ints())
        magnitude = b.and_(bits, self._ints(0x7FFFFFFF))
        odd = b.and_(b.lshr(magnitude, self._ints(13)), self._ints(1))
        rebiased = b.sub(magnitude, self._ints(112 << 23))
        ordinary = b.lshr(b.add(rebiased, b.add(odd, self._ints(0xFFF))), self._ints(13))
        # Added to ½, a number below 2⁻¹⁴ has its last bit where a half's would be.
        one_half = ir.Constant(self._singles(), [0.5] * self.lanes)
        lifted = b.bitcast(b.fadd(b.bitcast(magnitude, self._singles()), one_half), self._ints())
        tiny = b.sub(lifted, self._ints(0x3F000000))
        half = b.select(b.icmp_unsigned("<", magnitude, self._ints(113 << 23)), tiny, ordinary)
        half = b.select(b.icmp_unsigned(">=", magnitude, self._ints(143 << 23)), self._ints(0x7C00), half)
        half = b.select(b.icmp_unsigned(">", magnitude, self._ints(0x7F800000)), self._ints(0x7E00), half)
        return b.trunc(b.or_(half, b.lshr(b.and_(bits, self._ints(0x80000000)), self._ints(16))), halves)

    def _singles(self):
        return ir.VectorType(ir.FloatType(), self.lanes)

    def _ints(self, value: int | None = None):
        kind = ir.VectorType(I32, self.lanes)
        return kind if value is None else ir.Constant(kind, [value] * self.lanes)

    # -- arithmetic -----------------------------------------------------------------------------------------

    def constant(self, value: float) -> Vector:
        """Return the number in every lane."""
        return Vector(self, ir.Constant(self.type, [value] * self.lanes))

    def broadcast(self, address: Integer) -> Vector:
        """Return the float64 at `address`, rounded to compute, in every lane."""
        scalar = self.builder.load(self.pointer(address, ir.DoubleType()))
        return self._splat(scalar if self.compute == "float64" else self.builder.fptrunc(scalar, self.scalar))

    def reciprocal(self, number) -> Vector:
        """Return 1/number in every lane."""
        one = ir.Constant(self.scalar, 1.0)
        return self._splat(self.builder.fdiv(one, self.builder.sitofp(_raw(number), self.scalar)))

    def _splat(self, scalar) -> Vector:
        empty = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(empty, scalar, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return Vector(self, self.builder.shuffle_vector(first, empty, zeros))

    def fma(self, x: Vector, y: Vector, z: Vector) -> Vector:
        """Return x·y + z, fused where the machine can."""
        name = f"llvm.fmuladd.v{self.lanes}f{8 * DTYPES[self.compute].itemsize}"
        function = self._declared(name, self.type, [self.type] * 3)
        return Vector(self, self.builder.call(function, [x.value, y.value, z.value]))

    def sums(self, start: Iterable) -> Sums:
        """Return accumulators that begin with the values of a dict, or with zero for those keys."""
        return Sums(self, start if isinstance(start, dict) else dict.fromkeys(start, self.constant(0.0)))

    def pairwise_sum(self, values: Iterable[Vector]) -> Vector:
        """Return the sum of the values, added in a balanced tree."""
        values = list(values)
        while len(values) > 1:
            pairs = [x + y for x, y in zip(values[::2], values[1::2], strict=False)]
            values = pairs + values[len(values) & ~1 :]
        return values[0]

    def store_lane_sums(self, values: list[Vector], address: Integer, add: bool = False) -> None:
        """Store each vector's sum over lanes, as consecutive float64: transposed while adding, as many at a time as
        there are lanes."""
        for start in range(0, len(values), self.lanes):
            batch = values[start : start + self.lanes]
            order, total = self._transposed_sum(batch + [self.constant(0.0)] * (self.lanes - len(batch)))
            sums = self._shuffled(total, total, [order.index(k) for k in range(len(batch))]).value
            if self.compute != "float64":
                sums = self.builder.fpext(sums, ir.VectorType(ir.DoubleType(), len(batch)))
            target = self.pointer(address + 8 * start, sums.type)
            sums = self.builder.fadd(self.builder.load(target, align=8), sums) if add else sums
            self.builder.store(sums, target, align=8)

    def add_lane_sums(self, values: list[Vector], address: Integer) -> None:
        """Add each vector's sum over lanes to consecutive float64."""
        self.store_lane_sums(values, address, add=True)

    def _transposed_sum(self, vectors: list[Vector]) -> tuple[list[int], Vector]:
        """Return one vector that holds every input's lane sum, and which input each lane belongs to."""
        owners = [[k] * self.lanes for k in range(len(vectors))]
        segment = self.lanes
        while len(vectors) > 1:
            half = segment // 2
            low = [s + k for s in range(0, self.lanes, segment) for k in range(half)]
            low = low + [k + self.lanes for k in low]
            high = [k + half for k in low]
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            vectors = [self._shuffled(x, y, low) + self._shuffled(x, y, high) for x, y in pairs]
            owners = [[(x + y)[k] for k in low] for x, y in zip(owners[::2], owners[1::2], strict=True)]
            segment = half
        return owners[0], vectors[0]

    def _shuffled(self, x: Vector, y: Vector, picks: list[int]) -> Vector:
        mask = ir.Constant(ir.VectorType(I32, len(picks)), picks)
        return Vector(self, self.builder.shuffle_vector(x.value, y.value, mask))

    def all_zero(self, x: Vector) -> Integer:
        """Return 1 if every lane is zero, 0 if any is something else or NaN."""
        ordered = self.builder.fcmp_ordered("==", x.value, self.constant(0.0).value)
        mask = self.builder.bitcast(ordered, ir.IntType(self.lanes))
        full = ir.Constant(ir.IntType(self.lanes), (1 << self.lanes) - 1)
        return Integer(self.builder, self.builder.zext(self.builder.icmp_unsigned("==", mask, full), I64))

    def _declared(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        module = self.builder.module
        return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


# -- kernels ------------------------------------------------------------------------------------------------


Constant = Annotated[Any, "constant"]  # an argument that a kernel is compiled for, int or str, before all others


class Kernel:
    """A function of a `Vectors`, constants and Integers that emits a kernel; it may return an Integer."""

    by_name: ClassVar[dict[str, "Kernel"]] = {}

    def __init__(self, function: Callable):
        self._function = function
        _, *parameters = inspect.signature(function).parameters.values()
        self._integers = sum(each.annotation is not Constant for each in parameters)
        self.name = f"{function.__module__}.{function.__name__}"
        self.by_name[self.name] = self
        self.address = cache(self._address)

    def _address(self, storage: str, compute: str, *constants: int | str) -> int:
        """Return the address of machine code for these types and constants, for `jit.call`."""
        specialisation = types.literal(" ".join(map(str, (self.name, storage, compute, *constants))))
        return code_address(_kernel, *[INT] * 7, specialisation)

    def emit(self, builder: Any, storage: str, compute: str, constants: list, arguments: list) -> Any:
        """Emit the kernel's instructions."""
        integers = [Integer(builder, value) for value in arguments[: self._integers]]
        result = self._function(Vectors(builder, storage, compute), *constants, *integers)
        return I64(0) if result is None else result.value


kernel = Kernel


@intrinsic(prefer_literal=True)
def _emit(typingctx, a, b, c, d, e, f, g, specialisation):
    def codegen(context, builder, signature, args):
        name, storage, compute, *constants = specialisation.literal_value.split()
        constants = [int(each) if each.isdigit() else each for each in constants]
        return Kernel.by_name[name].emit(builder, storage, compute, constants, args[:7])

    return INT(a, b, c, d, e, f, g, specialisation), codegen


@jit
def _kernel(a, b, c, d, e, f, g, specialisation):
    return _emit(a, b, c, d, e, f, g, specialisation)
