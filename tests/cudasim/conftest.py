"""The simulated device in place of CuPy, and where there is no compiler for it the reason to skip."""

import sys

import pytest

import fastnewton as fn
from fastnewton.kernels import cuda

from . import build, device


def pytest_collection_modifyitems(items):
    reason = build.why_unavailable()
    for item in items:
        if reason and item.path.parent == build.HERE:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def cupy(monkeypatch):
    """The simulated device as the module `cupy`, with nothing compiled or allocated for another one."""
    monkeypatch.setitem(sys.modules, "cupy", device)
    cuda.cupy.cache_clear()
    cuda._kernel.cache_clear()
    cuda._resident.cache_clear()
    device.log.clear()
    yield device
    fn.clear_caches()
    cuda.cupy.cache_clear()
    cuda._kernel.cache_clear()
