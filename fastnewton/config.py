"""What `fastnewton.show_config` prints: versions, devices, threads, MPI and caches.  Nothing here ever raises."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_PACKAGES = ("numpy", "numba", "llvmlite", "torch", "jax", "mpi4py", "cupy-cuda12x", "cupy-cuda13x")

# Loading MPI would initialise it in this process, which a mere question must not do.
_ASK_MPI = (
    "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
    "print(MPI.Get_library_version().splitlines()[0].strip(' \\0'))"
)


def show_config() -> None:
    """Print versions, devices, threads, the MPI library and cache folders."""
    for title, describe in _SECTIONS.items():
        print(f"{title + ':':<14}{_tried(describe)}")


def _tried(describe: Callable[[], str]) -> str:
    try:
        return describe()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _package() -> str:
    return f"{importlib.metadata.version('fastnewton')} in {Path(__file__).parent}"


def _cpu() -> str:
    from fastnewton.kernels.cpu import simd

    return f"{platform.machine()}, vectors of {simd.VECTOR_BYTES} bytes, {simd.REGISTERS} registers"


def _threads() -> str:
    from fastnewton.kernels.cpu import threads

    chosen = threads.chosen_threads()
    why = "set by the environment" if chosen else "a thread for each core; FASTNEWTON_NUM_THREADS changes that"
    return f"{threads.thread_count()} ({why})"


def _cuda() -> str:
    from fastnewton.kernels.cuda import jit

    try:
        cupy = jit.cupy()
    except RuntimeError as error:
        return str(error)
    runtime = cupy.cuda.runtime
    names = [runtime.getDeviceProperties(k)["name"].decode() for k in range(runtime.getDeviceCount())]
    compiler = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    cache = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    where = f"CUDA in {cupy.cuda.get_cuda_path()}, kernel cache in {cache}"
    return f"{', '.join(names)}; runtime {runtime.runtimeGetVersion()}, NVRTC {compiler}; {where}"


def _mpi() -> str:
    try:
        importlib.metadata.version("mpi4py")
    except importlib.metadata.PackageNotFoundError:
        return "mpi4py is not installed; pip install 'fastnewton[mpi]'"
    loaded = sys.modules.get("mpi4py.MPI")
    if loaded is not None:
        library = loaded.Get_library_version().splitlines()[0].strip(" \0")
    else:
        command = [sys.executable, "-c", _ASK_MPI]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        library = asked.stdout.strip() or (asked.stderr.strip().splitlines() or ["no answer"])[-1]
    from fastnewton.environment import foreign_launcher

    size = loaded.COMM_WORLD.Get_size() if loaded is not None and loaded.Is_initialized() else None
    note = foreign_launcher(os.environ, size)
    return library + (f"; {note}" if note else "")


def _gpu_buffers() -> str:
    from fastnewton.environment import GPU_MPI, device_memory_to_mpi

    loaded, chosen = sys.modules.get("mpi4py.MPI"), device_memory_to_mpi(os.environ)
    if chosen is None and (loaded is None or not loaded.Is_initialized()):
        return f"as the library says, once MPI is initialised; {GPU_MPI}=1 (direct) or 0 (staged) decides otherwise"
    direct, why = chosen or _library_choice()
    how = "handed to MPI directly" if direct else "staged through pinned host memory"
    without = "without that, the library decides" if chosen else "direct needs an MPI library built with CUDA"
    return f"{how}, {why}; {f'{GPU_MPI}=0 stages them' if direct else without}"


def _library_choice() -> tuple[bool, str]:
    from fastnewton.mpi import gpu_aware  # initialises MPI

    return gpu_aware.verdict()


def _cache() -> str:
    from fastnewton.kernels.cpu.jit import CACHE_FOLDER

    return str(CACHE_FOLDER or "none, since no folder can be written: every process compiles")


_SECTIONS = {
    "fastnewton": _package,
    "versions": _versions,
    "CPU": _cpu,
    "threads": _threads,
    "CUDA": _cuda,
    "MPI": _mpi,
    "GPU buffers": _gpu_buffers,
    "kernel cache": _cache,
}
