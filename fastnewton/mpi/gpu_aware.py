"""Whether MPI may be handed device memory: as the environment or the library says, and never by trying it."""

import ctypes
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from mpi4py import MPI

from fastnewton.environment import device_memory_to_mpi

_CUDA = 0  # MPIX_GPU_SUPPORT_CUDA


@cache
def verdict() -> tuple[bool, str]:
    """Whether device memory goes to MPI directly, and why; for an MPI that is initialised."""
    return decided(os.environ, ctypes.CDLL(MPI.__file__), _allocation_kinds)


def decided(environment: Mapping[str, str], library: Any, allocation_kinds: Callable[[], str]) -> tuple[bool, str]:
    """The verdict from the environment, then the library's own functions, then the kinds of memory that it names.

    Raises
    ------
    ValueError
        FASTNEWTON_GPU_MPI is neither 0 nor 1.
    """
    if (chosen := device_memory_to_mpi(environment)) is not None:
        return chosen
    if hasattr(library, "MPIX_Query_cuda_support"):
        return bool(library.MPIX_Query_cuda_support()), "as MPIX_Query_cuda_support says"
    if hasattr(library, "MPIX_GPU_query_support"):
        found = ctypes.c_int(0)
        failed = library.MPIX_GPU_query_support(_CUDA, ctypes.byref(found))
        return not failed and bool(found.value), "as MPIX_GPU_query_support says"
    kinds = allocation_kinds().split(",")
    return any(kind.split(":")[0] == "cuda" for kind in kinds), "as mpi_memory_alloc_kinds says"


def _allocation_kinds() -> str:
    info = MPI.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds") or ""
    info.Free()
    return kinds
