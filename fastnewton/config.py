"""Describe the installation for bug reports: versions, devices, threads, MPI and cache folders."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from fastnewton.environment import GPU_MPI, device_memory_to_mpi, foreign_launcher
from fastnewton.kernels.cpu import simd, threads
from fastnewton.kernels.cpu.jit import CACHE_FOLDER
from fastnewton.kernels.cuda import jit

_PACKAGES = ("numpy", "numba", "llvmlite", "torch", "jax", "mpi4py", "cupy-cuda12x", "cupy-cuda13x")


def show_config() -> None:
    """Print versions, devices, threads, the MPI library and cache folders; never raise."""
    for title, describe in _SECTIONS.items():
        try:
            text = describe()
        except Exception as error:
            text = f"unknown ({type(error).__name__}: {error})"
        print(f"{title + ':':<14}{text}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> str:
    packages = (f"{name} {version}" for name in _PACKAGES if (version := _version(name)))
    return ", ".join([f"python {platform.python_version()}", *packages])


def _threads() -> str:
    default = "a thread for each core; FASTNEWTON_NUM_THREADS changes that"
    return f"{threads.thread_count()} ({'set by the environment' if threads.chosen_threads() else default})"


def _cuda() -> str:
    try:
        cuda = jit.cupy().cuda
    except RuntimeError as error:
        return str(error)
    devices = range(cuda.runtime.getDeviceCount())
    names = ", ".join(cuda.runtime.getDeviceProperties(k)["name"].decode() for k in devices)
    versions = f"runtime {cuda.runtime.runtimeGetVersion()}, NVRTC {'.'.join(map(str, cuda.nvrtc.getVersion()))}"
    cache = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    return f"{names}; {versions}; CUDA in {cuda.get_cuda_path()}, kernel cache in {cache}"


def _mpi() -> str:
    if _version("mpi4py") is None:
        return "mpi4py is not installed; pip install 'fastnewton[mpi]'"
    if (mpi := sys.modules.get("mpi4py.MPI")) is not None:
        library, size = mpi.Get_library_version(), mpi.COMM_WORLD.Get_size() if mpi.Is_initialized() else None
    else:  # asked in another process, since importing MPI would initialise it in this one
        command = [sys.executable, "-m", "mpi4py", "--mpi-lib-version"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        library, size = answer.stdout or (answer.stderr.strip().splitlines() or ["no answer"])[-1], None
    library = library.splitlines()[0].strip(" \0")
    warning = foreign_launcher(os.environ, size)
    return f"{library}; {warning}" if warning else library


def _gpu_buffers() -> str:
    mpi, setting = sys.modules.get("mpi4py.MPI"), device_memory_to_mpi(os.environ)
    if setting is None:
        if mpi is None or not mpi.Is_initialized():
            return f"as the library says, once MPI is initialised; {GPU_MPI}=1 (direct) or 0 (staged) decides otherwise"
        from fastnewton.mpi import gpu_aware  # imports MPI, which initialises it

        direct, why = gpu_aware.verdict()
    else:
        direct, why = setting
    if direct:
        return f"handed to MPI directly, {why}; {GPU_MPI}=0 stages them"
    otherwise = "without that, the library decides" if setting else "direct needs an MPI library built with CUDA"
    return f"staged through pinned host memory, {why}; {otherwise}"


_SECTIONS = {
    "fastnewton": lambda: f"{_version('fastnewton')} in {Path(__file__).parent}",
    "versions": _versions,
    "CPU": lambda: f"{platform.machine()}, vectors of {simd.VECTOR_BYTES} bytes, {simd.REGISTERS} registers",
    "threads": _threads,
    "CUDA": _cuda,
    "MPI": _mpi,
    "GPU buffers": _gpu_buffers,
    "kernel cache": lambda: str(CACHE_FOLDER or "none, since no folder can be written: every process compiles"),
}
