"""The simulated device in place of CuPy, and where there is no compiler for it the reason to skip."""

import pytest

from . import build, checks, device


def pytest_collection_modifyitems(items):
    reason = build.why_unavailable()
    for item in items:
        if reason and item.path.parent == build.HERE:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def cupy():
    """The simulated device as the module `cupy`, its workspaces full of NaN whenever they are handed out."""
    with checks.simulated_device():
        yield device


@pytest.fixture
def recorded(cupy):
    """What happens on the device during a test."""
    device.log.clear()
    return device.log
