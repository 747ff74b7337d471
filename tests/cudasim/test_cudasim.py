"""The simulator itself: mistakes planted in a kernel, each reported by name, and CUDA's semantics against NumPy."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from . import build, checks
from .module import SimError, SimModule, compile_all, poisoned, schedule, source
from .sanitized import assert_clean, assert_reports, run_sanitized

BUGS = checks.HERE / "bugs.cu"
SEMANTICS = checks.HERE / "semantics.cu"
ALL_LANES = np.uint32(0xFFFFFFFF)

# For each mistake the statements that a report must point at, and words that it must hold.
FOUND_BY_SCHEDULER = {
    "BARRIER": (
        ["__syncthreads();  // for one thread only"],
        ["divergent barrier", "thread (1, 0, 0) waits at bugs.cu:"],
    ),
    "EXIT": (["__shfl_down_sync"], ["exited lane in warp mask", "block (3, 0, 0), thread ("]),
    "MASK": (["__shfl_down_sync"], ["bad warp mask", "0000ffff"]),
    "MISALIGNED": (["__ldg(reinterpret_cast<const float4*>(x + 1)"], ["misaligned access", "__ldg of 16 bytes"]),
}
FOUND_BY_ADDRESS_SANITIZER = {
    "TAIL": (["sum += x[i]"], ["heap-buffer-overflow", "READ of size 4", "4012-byte region"]),
    "SHARED_BOUNDS": (["sum += warps[i]"], ["index 2 out of bounds for type 'double [2]'"]),
    "MISALIGNED_PLAIN": (["(x + 1)[i]"], ["misaligned address", "requires 16 byte alignment"]),
}
FOUND_BY_THREAD_SANITIZER = {
    "SYNCTHREADS": (["if (lane == 0) warps[warp] = value", "sum += warps[i]"], ["data race", "block_sum"]),
    "REUSE": (["if (lane == 0) warps[warp] = value", "sum += warps[i]", "double again"], ["data race"]),
    "SYNCWARP": (["lanes[lane] += other", "lanes[lane + distance]"], ["data race", "first_warp_sum"]),
    "THREADFENCE": (
        ["partial[blockIdx.x] = sum", "total += partial[i]"],
        ["Read of size 8", "Previous write of size 8"],
    ),
    "BLOCK_FENCE": (
        ["partial[blockIdx.x] = sum", "total += partial[i]"],
        ["Read of size 8", "Previous write of size 8"],
    ),
    "ONE_PARTIAL": (
        ["partial[0] = sum"],
        ["Write of size 8", "Previous write of size 8", "'block (0, 0, 0) thread (0"],
    ),
}
SEEN_IN_THE_RESULT = ["UNINITIALISED", "SYNCTHREADS", "REUSE", "ONE_PARTIAL"]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """What most tests run, compiled on all cores."""
    wanted = [(bug, None) for bug in (None, *FOUND_BY_SCHEDULER, *SEEN_IN_THE_RESULT)]
    wanted += [(bug, "address") for bug in (None, *FOUND_BY_ADDRESS_SANITIZER)]
    wanted += [(bug, "thread") for bug in (None, *FOUND_BY_THREAD_SANITIZER)]
    compile_all([{"path": BUGS, "options": checks.bugs_options(bug), "sanitize": kind} for bug, kind in wanted])


@pytest.fixture(scope="module")
def semantics():
    return SimModule(SEMANTICS)


def expected_texts(statements, words):
    lines = BUGS.read_text().splitlines()
    places = [i for statement in statements for i, line in enumerate(lines, 1) if statement in line]
    assert len(places) == len(statements)
    return [*words, *(f"bugs.cu:{place}" for place in places)]


def in_every_order(function, *arguments):
    for order, seed in checks.SCHEDULES:
        with schedule(order, seed):
            yield function(*arguments)


def test_a_correct_kernel_is_right_in_every_order():
    checks.reduction_in_every_order()
    checks.reduction_in_every_order(blocks=1, n=0)
    checks.reduction_in_every_order(blocks=37, n=5)


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_a_correct_kernel_is_clean(kind):
    assert_clean(run_sanitized(kind, "cudasim.checks:reduction_in_every_order"))


@pytest.mark.parametrize("bug", FOUND_BY_SCHEDULER)
def test_the_scheduler_reports(bug):
    for order, seed in checks.SCHEDULES:
        with schedule(order, seed), pytest.raises(SimError) as caught:
            checks.reduction(bug)
        message = str(caught.value)
        assert all(text in message for text in expected_texts(*FOUND_BY_SCHEDULER[bug])), message


@pytest.mark.parametrize("bug", FOUND_BY_ADDRESS_SANITIZER)
def test_address_sanitizer_reports(bug):
    outcome = run_sanitized("address", "cudasim.checks:reduction", bug)
    assert_reports(outcome, *expected_texts(*FOUND_BY_ADDRESS_SANITIZER[bug]))


def test_address_sanitizer_reports_too_little_dynamic_shared_memory():
    outcome = run_sanitized("address", "cudasim.checks:reduction", None, 5, 1003, 31 * 8)
    assert_reports(outcome, "use-after-poison", *expected_texts(["lanes[lane] = value"], ["WRITE of size 8"]))


@pytest.mark.parametrize("bug", FOUND_BY_THREAD_SANITIZER)
def test_thread_sanitizer_reports(bug):
    outcome = run_sanitized("thread", "cudasim.checks:reduction", bug)
    assert_reports(outcome, *expected_texts(*FOUND_BY_THREAD_SANITIZER[bug]))


@pytest.mark.parametrize("bug", SEEN_IN_THE_RESULT)
def test_without_sanitizers_some_order_gives_a_wrong_result(bug):
    results = in_every_order(checks.reduction, bug)
    assert any(not abs(result - expected) < 1e-9 for result, expected in results)


def test_uninitialised_shared_memory_makes_the_result_nan():
    assert all(np.isnan(result) for result, _ in in_every_order(checks.reduction, "UNINITIALISED"))


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_what_the_scheduler_finds_under_a_sanitizer_fails_the_child(kind):
    outcome = run_sanitized(kind, "cudasim.checks:reduction", "MASK")
    assert_reports(outcome, *expected_texts(*FOUND_BY_SCHEDULER["MASK"]), "SimError")


def test_a_deadlock_is_reported():
    code = 'extern "C" __global__ void wait() { if (threadIdx.x) __syncwarp(); else __syncthreads(); }'
    with pytest.raises(SimError, match=r"deadlock at kernel.cu:1, .*: 31 threads wait for their warp, 1 for the block"):
        SimModule(code=code).get_function("wait")((1,), (64,), ())


def test_an_assertion_that_fails_is_reported():
    code = 'extern "C" __global__ void even() { assert(threadIdx.x % 2 == 0); }'
    with pytest.raises(
        SimError, match=r"assertion failed at kernel.cu:1, .*, thread \(1, 0, 0\): threadIdx.x % 2 == 0"
    ):
        SimModule(code=code).get_function("even")((1,), (2,), ())


def test_signals_end_the_launch_and_not_the_process():
    code = """
    extern "C" __global__ void divide(int* x) { x[0] /= threadIdx.x; }
    extern "C" __global__ void stray(int* x) { x[1ll << 60] = 1; }
    __device__ int deeper(int n) { volatile int x = n; return n ? deeper(n - 1) + x : 0; }
    extern "C" __global__ void overflow(int* x) { x[0] = deeper(1 << 20); }
    """
    module = SimModule(code=code)
    x = np.zeros(1, np.int32)
    with pytest.raises(SimError, match=r"integer division by zero, block \(0, 0, 0\), thread \(0, 0, 0\)"):
        module.get_function("divide")((1,), (4,), (x,))
    for name in ("stray", "overflow"):
        with pytest.raises(SimError, match="segmentation fault"):
            module.get_function(name)((1,), (4,), (x,))


# ------------------------------------------------------------------------------------------------------------ Semantics


def source_lane(function, lane, argument, width):
    """The lane that a shuffle reads from, as the CUDA programming guide has it."""
    begin = lane // width * width
    if function == "__shfl_sync":
        return begin + argument % width
    wanted = {
        "__shfl_up_sync": lane - argument,
        "__shfl_down_sync": lane + argument,
        "__shfl_xor_sync": lane ^ argument,
    }
    inside = wanted[function] < begin + width and (function == "__shfl_xor_sync" or wanted[function] >= begin)
    return wanted[function] if inside else lane


@pytest.mark.parametrize("function", ["__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"])
@pytest.mark.parametrize(
    ("type_name", "dtype"), [("int", "i4"), ("double", "f8"), ("unsigned long long", "u8"), ("short4", "i2,i2,i2,i2")]
)
def test_shuffles(function, type_name, dtype, rng):
    shuffle = SimModule(SEMANTICS, (f"-DT={type_name}", f"-DSHUFFLE={function}")).get_function("shuffle")
    values = np.frombuffer(rng.bytes(64 * np.dtype(dtype).itemsize), dtype)
    for width in (2, 8, 32):
        for argument in (0, 1, 3, 7, 16, 31):
            out = poisoned(64, dtype)
            shuffle((2,), (32,), (values, out, np.int32(argument), np.int32(width)))
            sources = [32 * (i // 32) + source_lane(function, i % 32, argument, width) for i in range(64)]
            assert out.tobytes() == values[sources].tobytes()


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x00FF00F1])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_votes(semantics, mask, share, rng):
    values = (rng.random(32) < share).astype(np.int32)
    taking_part = mask >> np.arange(32) & 1 == 1
    ballot, yes, every = np.zeros(32, np.uint32), np.zeros(32, np.int32), np.zeros(32, np.int32)
    for _ in in_every_order(
        semantics.get_function("votes"), (1,), (32,), (values, np.uint32(mask), ballot, yes, every)
    ):
        assert (ballot == np.where(taking_part, sum(int(v) << i for i, v in enumerate(values)) & mask, 0)).all()
        assert (yes == taking_part * values[taking_part].any()).all()
        assert (every == taking_part * values[taking_part].all()).all()


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x00FF00F1])
def test_reductions(semantics, mask, rng):
    values = rng.integers(-(2**20), 2**20, 32, dtype=np.int32)
    taking_part = mask >> np.arange(32) & 1 == 1
    operations = (np.add, np.minimum, np.maximum, np.bitwise_and, np.bitwise_or, np.bitwise_xor)
    out = np.zeros((6, 32), np.int32)
    semantics.get_function("reductions")((1,), (32,), (values, np.uint32(mask), out))
    for operation, results in zip(operations, out, strict=True):
        assert (results == taking_part * operation.reduce(values[taking_part])).all()


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_block_votes(semantics, share, rng):
    values = (rng.random(100) < share).astype(np.int32)
    out = poisoned((3, 100), np.int32)
    for _ in in_every_order(semantics.get_function("block_votes"), (1,), (100,), (values, out)):
        assert (out == np.array([[values.any()], [values.all()], [values.sum()]])).all()


def small_float(name):
    if name == "half":
        return np.float16
    return pytest.importorskip("ml_dtypes").bfloat16


@pytest.mark.parametrize("name", ["half", "bfloat16"])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_conversions_to_and_from_small_floats(semantics, name, rng):
    dtype = small_float(name)
    every = np.arange(65536, dtype=np.uint16)
    numbers = poisoned(65536, np.float32)
    semantics.get_function(f"{name}_to_float")((64,), (1024,), (every, numbers))
    with np.errstate(all="ignore"):
        expected = every.view(dtype).astype(np.float32)
    nan = np.isnan(expected)
    assert (np.isnan(numbers) == nan).all()
    assert (numbers.view(np.uint32)[~nan] == expected.view(np.uint32)[~nan]).all()

    finite = numbers[np.isfinite(numbers)]
    neighbours = np.nextafter(finite, np.float32(0))
    ties = np.float32(0.5) * finite + np.float32(0.5) * np.roll(finite, 1)
    anything = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([numbers, neighbours, ties, anything])
    values = np.resize(values, -(-values.size // 1024) * 1024)
    bits = poisoned(values.size, np.uint16)
    semantics.get_function(f"float_to_{name}")((values.size // 1024,), (1024,), (values, bits))
    nan = np.isnan(values)
    with np.errstate(all="ignore"):
        expected = values.astype(dtype).view(np.uint16)
    assert (bits[~nan] == expected[~nan]).all()
    assert (bits[nan] == 0x7FFF).all()  # CUDA's one NaN


def test_atomics(semantics, rng):
    values = rng.integers(-1000, 1000, 128, dtype=np.int32)
    for order, seed in checks.SCHEDULES:
        out = np.array([0, 0, 0, 0, -1, 0, 0, -5000, 0, -5000], np.int32)
        wrapped, total = np.array([0, 3], np.uint32), np.zeros(1, np.float32)
        with schedule(order, seed):
            semantics.get_function("atomics")((2,), (64,), (values, out, wrapped, total))
        assert out[:2].tolist() == [values.sum(), -values.sum()]
        assert out[2:4].tolist() == [min(values.min(), 0), max(values.max(), 0)]
        bitwise = [np.bitwise_and.reduce(values), np.bitwise_or.reduce(values), np.bitwise_xor.reduce(values)]
        assert out[4:7].tolist() == bitwise
        assert out[7] in values
        assert out[9] == values.max()
        assert wrapped.tolist() == [128 % 10, (3 - 128) % 10]
        assert total == values.sum()


def test_indices_of_grids_and_blocks_of_three_dimensions(semantics):
    out = poisoned(2 * 3 * 4 * 5 * 6 * 7, np.int32)
    semantics.get_function("indices")((4, 3, 2), (7, 6, 5), (out,))
    z, y, x, w, v, u = np.indices((2, 3, 4, 5, 6, 7))
    assert (out == (((z * 10 + y) * 10 + x) * 1000 + (w * 10 + v) * 10 + u).reshape(-1)).all()
    semantics.get_function("indices")((4, 3), (7,), (out,))
    assert out[7 * 11 + 5] == 23 * 1000 + 5


def test_orders(semantics):
    def arrivals(order, seed=0):
        count, out = np.zeros(1, np.int32), poisoned(96, np.int32)
        with schedule(order, seed):
            semantics.get_function("arrivals")((3,), (32,), (count, out))
        return out.tolist()

    assert arrivals("ascending") == list(range(96))
    assert arrivals("descending") == list(range(96))[::-1]
    assert arrivals("random", 1) == arrivals("random", 1) != arrivals("random", 2)
    assert sorted(arrivals("random", 1)) == list(range(96))
    with pytest.raises(ValueError, match="order is one of"), schedule("sideways"):
        pass


def test_shared_memory_is_fresh_for_every_block(semantics, rng):
    values, out = rng.standard_normal(50), poisoned(50, np.float64)
    fresh, addresses = np.zeros(2, np.float32), np.zeros(2, np.uint64)
    semantics.get_function("shared")((3,), (50,), (values, out, fresh, addresses), shared_mem=50 * 8)
    assert (out == values[::-1]).all()
    assert np.isnan(fresh).all()
    # As aligned as the type demands, so that a cast to float4 of float's is found out.
    assert (addresses % 32 == 16)[0]
    assert (addresses % 16 == 8)[1]


# ------------------------------------------------------------------------------------------------ Modules and arguments


def test_arguments_of_all_kinds(semantics):
    half, bfloat16 = np.float16(1.5), pytest.importorskip("ml_dtypes").bfloat16(2.5)
    first, second, out = np.full(1, 7, np.float32), np.full(1, 8, np.float32), np.zeros(8, np.float32)
    pair = np.array([first.ctypes.data, second.ctypes.data], np.uint64)
    scalars = (np.float64(3), np.int8(-4), np.uint64(5), np.bool_(True), half, bfloat16)
    take = semantics.get_function("take")
    for structure in (pair, pair.view("u8,u8")[0]):
        take((1,), (1,), (structure, *scalars, out))
        assert out.tolist() == [7, 8, 3, -4, 5, 2, 1.5, 2.5]


def test_arrays_in_the_manner_of_cupy(semantics):
    class Memory:
        ptr = None

    class Array:
        data = Memory()

    count, out = np.zeros(1, np.int32), poisoned(4, np.int32)
    Memory.ptr = count.ctypes.data
    semantics.get_function("arrivals")((1,), (4,), (Array(), out.ctypes.data), stream=None)
    assert out.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("position", "argument", "complaint"),
    [
        (2, np.int64(1), r"argument 2 of shuffle\(.*\): numpy.int32 wanted, not numpy.int64"),
        (2, np.uint32(1), "argument 2 .* numpy.int32 wanted, not numpy.uint32"),
        (3, 8, "argument 3 .* numpy.int32 wanted, not int"),
        (3, np.ones(1, np.int32), "argument 3 .* numpy.int32 wanted, not ndarray"),
        (0, np.int64(0), "argument 0 .* an array wanted, not numpy.int64"),
        (1, 0.0, "argument 1 .* an array wanted, not float"),
    ],
)
def test_a_wrong_argument_is_named(semantics, position, argument, complaint):
    arguments = [np.zeros(32, np.int32), np.zeros(32, np.int32), np.int32(0), np.int32(32)]
    arguments[position] = argument
    with pytest.raises(TypeError, match=complaint):
        semantics.get_function("shuffle")((1,), (32,), arguments)
    with pytest.raises(TypeError, match="takes 4 arguments, not 3"):
        semantics.get_function("shuffle")((1,), (32,), arguments[:3])


@pytest.mark.parametrize("block", [(0,), (1025,), (32, 33), (1, 1, 65)])
def test_impossible_launches(semantics, block):
    with pytest.raises(SimError, match="block"):
        semantics.get_function("arrivals")((1,), block, (None, None))


def test_errors_that_a_source_brings_about():
    with pytest.raises(build.CompileError, match=r"kernel.cu:1:.*nonsense"):
        SimModule(code='extern "C" __global__ void f() { nonsense(); }')
    with pytest.raises(build.CompileError, match="write FN_SHARED"):
        SimModule(code='extern "C" __global__ void f() { __shared__ int x; }')
    with pytest.raises(AttributeError, match=r"no kernel .* g"):
        SimModule(code='extern "C" __global__ void f() {}').get_function("g")
    with pytest.raises(RuntimeError, match="under run_sanitized"):
        SimModule(BUGS, sanitize="thread")
    with pytest.raises(ValueError, match="sanitize is one of"):
        SimModule(BUGS, sanitize="memory")


def test_a_changed_header_makes_another_library(tmp_path):
    (tmp_path / "kernel.cu").write_text('#include "value.cuh"\nextern "C" __global__ void f(int* x) { *x = VALUE; }')
    for value in (1, 2):
        (tmp_path / "value.cuh").write_text(f"#define VALUE {value}")
        x = np.zeros(1, np.int32)
        SimModule(tmp_path / "kernel.cu").get_function("f")((1,), (1,), (x,))
        assert x == value


def test_processes_may_compile_the_same_at_once(tmp_path):
    program = """if True:
        import sys
        from pathlib import Path
        from cudasim import build, checks
        build.CACHE = Path(sys.argv[1])
        checks.reduction_in_every_order()
    """
    command = [sys.executable, "-c", program, tmp_path / "cache"]
    children = [subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE) for _ in range(3)]
    errors = [child.communicate(timeout=120)[1].decode() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], errors
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".o", ".so"]


def test_the_example_of_the_readme(capsys):
    readme = (checks.HERE / "README.md").read_text()
    program, printed = re.search(r"```python\n(.*?)```\n```text\n(.*?)```", readme, re.DOTALL).groups()
    exec(program, {})
    assert capsys.readouterr().out == printed


def test_what_is_compiled_ahead_is_what_a_module_uses():
    wanted = source(BUGS, checks.bugs_options())
    assert SimModule(BUGS, checks.bugs_options()).source.digest == wanted.digest
    assert wanted.build().exists()


def test_too_much_shared_memory():
    code = """
    extern "C" __global__ void large() { FN_SHARED(float, tile, [12289]); tile[0] = 0; }
    extern "C" __global__ void both() { FN_SHARED(float, tile, [12288]); FN_DYN_SHARED(float, more); *more = *tile; }
    """
    module = SimModule(code=code)
    module.get_function("both")((1,), (1,), (), shared_mem=179 * 1024)
    with pytest.raises(SimError, match=r"too much shared memory at kernel.cu:3, .*: 233472 bytes"):
        module.get_function("both")((1,), (1,), (), shared_mem=180 * 1024)
    with pytest.raises(SimError, match=r"too much shared memory at kernel.cu:2, .*: 49156 bytes, not dynamic"):
        module.get_function("large")((1,), (1,), ())
    with pytest.raises(SimError, match="more than 227 KiB of dynamic shared memory"):
        module.get_function("both")((1,), (1,), (), shared_mem=228 * 1024)
