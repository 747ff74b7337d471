"""Every CUDA kernel through NVRTC: it compiles, spills nothing, and takes no more of a GPU than its budget."""

import json
import re

import cuda_budget
import nvrtc
import pytest
from cuda_budget import ARCHITECTURES, FILE

from fastnewton.kernels import record
from fastnewton.kernels.cuda import jit

SLACK = 8  # registers: a compiler's next release counts otherwise
PLAIN = [("float32", 8), ("float32", 17), ("float32", 64), ("float16", 8)]

pytestmark = pytest.mark.skipif(not nvrtc.is_expected(), reason="the test extra brings NVRTC to Linux on x86-64 only")


@pytest.fixture(scope="module")
def budget():
    return json.loads(FILE.read_text())


def assert_within(budget, kernels, name):
    limits = ARCHITECTURES[name]
    compiled = cuda_budget.compile_all(kernels, [name])[name]
    for kernel in kernels:
        used = compiled[kernel.key]
        assert used.spilled == 0, f"{kernel.key} spills {used.spilled} bytes on {name}"
        assert used.shared + kernel.shared <= limits.of_block, f"{kernel.key}: shared memory of {name}"
        registers, blocks = budget[kernel.key][name]
        assert used.registers <= registers + SLACK, f"{kernel.key} on {name}: {used.registers} registers"
        if nvrtc.release() == budget["nvrtc"]:
            assert cuda_budget.blocks(kernel, used, limits) >= blocks, f"{kernel.key} on {name}: fewer blocks at once"
        assert cuda_budget.blocks(kernel, used, limits) >= 1


def test_kernels_of_common_shapes(budget):
    kernels = {kernel.key: kernel for dtype, m in PLAIN for kernel in cuda_budget.launched(dtype, m)}
    assert_within(budget, list(kernels.values()), "sm_90")


@pytest.mark.full
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kernel(budget, name):
    kernels = cuda_budget.every_kernel()
    assert {kernel.key for kernel in kernels} | {"nvrtc"} == set(budget)
    assert_within(budget, kernels, name)


@pytest.mark.full
def test_architectures_to_come():
    """PTX, which a driver compiles for devices that are newer than the compiler."""
    cuda_budget.compile_all(cuda_budget.launched("float32", 8), ["compute_120"])


def test_errors_of_the_compiler_are_told():
    with pytest.raises(nvrtc.CompileError, match="expected"):
        nvrtc.compile_source("__global__ void broken( {", "broken.cu", (), "sm_90")


@pytest.mark.parametrize("enum", ["Record", "Status"])
def test_record_has_the_same_fields_in_python(enum):
    text = re.sub(r"//.*", "", (jit.FOLDER / "record.cuh").read_text())
    names = re.search(rf"enum {enum} {{(.*?)}}", text, re.S)[1].replace(",", " ").split()
    assert [getattr(record, name) for name in names] == list(range(len(names)))
