"""Describe the installation for bug reports: versions, devices, threads, MPI and cache folders."""

import importlib.metadata
import os
import platform
import subprocess
import sys

from fastnewton.environment import GPU_MPI, device_memory_to_mpi, foreign_launcher
from fastnewton.kernels.cpu import jit, simd, threads
from fastnewton.kernels.cuda.jit import cupy

_PACKAGES = ("numpy", "numba", "llvmlite", "torch", "jax", "mpi4py", "cupy-cuda12x", "cupy-cuda13x")


def show_config() -> None:
    """Print versions, devices, threads, the MPI library and cache folders; never raise."""
    for title, describe in _SECTIONS.items():
        try:
            text = describe()
        except Exception as error:
            text = str(error) if type(error) is RuntimeError else f"unknown ({type(error).__name__}: {error})"
        print(f"{title + ':':<14}{text}")


def _version(package: str) -> str | None:
    return next((found.version for found in importlib.metadata.distributions(name=package)), None)


def _versions() -> str:
    packages = (f"{name} {version}" for name in _PACKAGES if (version := _version(name)))
    return ", ".join([f"python {platform.python_version()}", *packages])


def _threads() -> str:
    default = "a thread for each core; FASTNEWTON_NUM_THREADS changes that"
    return f"{threads.thread_count()} ({'set by the environment' if threads.chosen_threads() else default})"


def _cuda() -> str:
    cuda, runtime = cupy().cuda, cupy().cuda.runtime
    names = ", ".join(runtime.getDeviceProperties(k)["name"].decode() for k in range(runtime.getDeviceCount()))
    versions = f"runtime {runtime.runtimeGetVersion()}, NVRTC {'.'.join(map(str, cuda.nvrtc.getVersion()))}"
    cache = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    return f"{names}; {versions}; CUDA in {cuda.get_cuda_path()}, kernel cache in {cache}"


def _mpi() -> str:
    if _version("mpi4py") is None:
        return "mpi4py is not installed; pip install 'fastnewton[mpi]'"
    if (mpi := sys.modules.get("mpi4py.MPI")) is not None:
        library, size = mpi.Get_library_version(), mpi.COMM_WORLD.Get_size() if mpi.Is_initialized() else None
    else:  # asked in another process, since importing MPI would initialise it in this one
        ask = [sys.executable, "-m", "mpi4py", "--mpi-lib-version"]
        run = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=False)
        library, size = run.stdout or (run.stderr.strip().splitlines() or ["no answer"])[-1], None
    library = library.splitlines()[0].strip(" \0")
    return "; ".join(filter(None, (library, foreign_launcher(os.environ, size))))


def _gpu_buffers() -> str:
    verdict = setting = device_memory_to_mpi(os.environ)
    if verdict is None:
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is None or not mpi.Is_initialized():
            return f"as the library says, once MPI is initialised; {GPU_MPI}=1 (direct) or 0 (staged) decides otherwise"
        from fastnewton.mpi import gpu_aware  # imports MPI, which initialises it

        verdict = gpu_aware.verdict()
    direct, why = verdict
    if direct:
        return f"handed to MPI directly, {why}; {GPU_MPI}=0 stages them"
    otherwise = "without that, the library decides" if setting else "direct needs an MPI library built with CUDA"
    return f"staged through pinned host memory, {why}; {otherwise}"


_SECTIONS = {
    "fastnewton": lambda: f"{_version('fastnewton') or 'not installed,'} in {os.path.dirname(__file__)}",
    "versions": _versions,
    "CPU": lambda: f"{platform.machine()}, vectors of {simd.VECTOR_BYTES} bytes, {simd.REGISTERS} registers",
    "threads": _threads,
    "CUDA": _cuda,
    "MPI": _mpi,
    "GPU buffers": _gpu_buffers,
    "kernel cache": lambda: str(jit.CACHE_FOLDER or "none, since no folder can be written: every process compiles"),
}
