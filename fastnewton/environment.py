"""Read from the environment how many processes a launcher started, and how device memory reaches MPI."""

from collections.abc import Mapping

_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS")
GPU_MPI = "FASTNEWTON_GPU_MPI"


def device_memory_to_mpi(environment: Mapping[str, str]) -> tuple[bool, str] | None:
    """Return whether device memory goes to MPI directly, and why; None leaves that to the MPI library."""
    setting = environment.get(GPU_MPI, "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"{GPU_MPI} must be 0 or 1; got {setting!r}")
    return (setting == "1", f"{GPU_MPI}={setting}") if setting else None


def foreign_launcher(environment: Mapping[str, str], size: int | None) -> str | None:
    """Return a warning if a launcher started several processes but `size`, the communicator's, is 1.

    A size of None says that MPI is not initialised: the warning then is conditional.
    """
    for name in _SIZE_VARIABLES if size in (None, 1) else ():
        count = environment.get(name, "")
        if count.isdigit() and int(count) > 1:
            seen = ", but the communicator has 1" if size else "; if communicators turn out to have 1 rank"
            remedy = "use the mpiexec of the MPI library that mpi4py was built for"
            return f"{name}={count} says that {count} processes were started{seen}: {remedy}"
    return None
