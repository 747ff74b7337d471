"""Compile the .cu files through CuPy, specialised by macros, and ask how many blocks of a kernel are resident at once.

CuPy caches compiled kernels on disk by a key without the included files: hence a digest of all sources in the options.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@cache
def cupy() -> Any:
    """Import CuPy; raise a RuntimeError that says what to install where it, or a device, is missing."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            "arrays on a CUDA device need CuPy; pip install 'fastnewton[cuda13]' (or [cuda12], as the driver supports)"
        ) from error
    if not cupy.cuda.is_available():
        raise RuntimeError(
            "CuPy finds no CUDA device, or a driver that is too old for its CUDA; see nvidia-smi; for a driver "
            "of CUDA 12 pip install 'fastnewton[cuda12]' in place of [cuda13]"
        )
    return cupy


@cache
def digest() -> str:
    """Hash all sources."""
    hashed = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")]):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


def options(**macros: object) -> tuple[str, ...]:
    """Return the compiler's options for these macros."""
    defined = (f"-D{name}={value}" for name, value in sorted(macros.items()))
    return ("-std=c++17", f"-I{FOLDER}", f"-DSOURCES=0x{digest()}", *defined)


def kernel(file: str, name: str, dynamic_shared: int = 0, **macros: object) -> Any:
    """Compile a kernel for the current device, or take it from the cache."""
    return _load(cupy().cuda.Device().id, file, name, dynamic_shared, options(**macros))


@cache
def _load(device: int, file: str, name: str, dynamic_shared: int, options: tuple[str, ...]) -> Any:
    function = cupy().RawModule(code=(FOLDER / file).read_text(), options=options).get_function(name)
    if dynamic_shared:  # beyond 48 KiB, static arrays included, a kernel must opt in
        function.max_dynamic_shared_size_bytes = dynamic_shared
    return function


def grid(function: Any, threads: int, dynamic_shared: int, tiles: int) -> int:
    """Return the blocks of a grid-stride launch: one per tile, but no more than are resident at once."""
    return max(1, min(tiles, _resident_blocks(cupy().cuda.Device().id, function, threads, dynamic_shared)))


@cache
def _resident_blocks(device: int, function: Any, threads: int, dynamic_shared: int) -> int:
    occupancy = cupy().cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
    per_multiprocessor = max(1, occupancy(function.kernel.ptr, threads, dynamic_shared))
    return per_multiprocessor * cupy().cuda.Device(device).attributes["MultiProcessorCount"]
