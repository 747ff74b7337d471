"""What is asked of CuPy is there in CuPy itself, not only in its stand-in; no device is needed to see that."""

import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from cudasim import build, checks, device
from problems import workers

import fastnewton as fn

cupy = pytest.importorskip("cupy")

ROOT = Path(fn.__file__).parents[1]
SOURCES = [*ROOT.glob("fastnewton/**/*.py"), *ROOT.glob("kernels/**/*.py")]
BEGINNINGS = {
    r"\bcupy(?:\(\))?": cupy,
    r"\bruntime": cupy.cuda.runtime,
    r"\bdriver": cupy.cuda.driver,
    r"\bstream": cupy.cuda.ExternalStream,
}


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_names_of_cupy(beginning):
    names = {name for path in SOURCES for name in re.findall(rf"{beginning}\.([A-Za-z_.]*\w)\b", path.read_text())}
    assert names
    for name in sorted(names):
        found = BEGINNINGS[beginning]
        for part in name.split("."):
            if found is cupy.cuda.ExternalStream and part == "ptr":  # set when one is made
                break
            assert hasattr(found, part), f"{name}: there is no {part}"
            found = getattr(found, part)


@pytest.mark.skipif(build.why_unavailable() is not None, reason=str(build.why_unavailable()))
@pytest.mark.parametrize("m", [1, 3, pytest.param(17, marks=pytest.mark.full)])
def test_arguments_of_kernels(rng, m):
    """CuPy looks at them before it finds that there is no such kernel, or no device."""
    given, launch = [], device._Kernel.__call__

    def noted(self, grid, block, args, **options):
        given.append([None if isinstance(value, device.ndarray) else value for value in args])
        return launch(self, grid, block, args, **options)

    with checks.simulated_device(), mock.patch.object(device._Kernel, "__call__", noted):
        thetas, grads = map(checks.there, workers(rng, m, 300, np.float32))
        fn.step(thetas, grads, lr=0.5, lr_cap="curvature")
        fn.apply_inverse(thetas, grads, grads[0])
        fn.gram(grads, thetas=thetas)
    assert len(given) >= 8
    function = cupy.cuda.function.Function.__new__(cupy.cuda.function.Function)
    for args in given:
        with pytest.raises((cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)):
            function((1,), (1,), args, 0, SimpleNamespace(ptr=0))
    with pytest.raises(TypeError, match="size one"):
        function((1,), (1,), [np.zeros(2)], 0, SimpleNamespace(ptr=0))
