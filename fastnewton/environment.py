"""What the environment says of MPI: whether a launcher started several processes, and how device memory travels."""

from collections.abc import Mapping

_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS")
GPU_MPI = "FASTNEWTON_GPU_MPI"


def device_memory_to_mpi(environment: Mapping[str, str]) -> tuple[bool, str] | None:
    """Whether device memory goes to MPI directly, and why; None if the environment leaves that to the library."""
    chosen = environment.get(GPU_MPI, "")
    if chosen not in ("", "0", "1"):
        raise ValueError(f"{GPU_MPI} must be 0 or 1; got {chosen!r}")
    return (chosen == "1", f"{GPU_MPI}={chosen}") if chosen else None


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started several processes, as far as it tells."""
    return foreign_launcher(environment, None) is not None


def foreign_launcher(environment: Mapping[str, str], size: int | None) -> str | None:
    """What to tell a user whose launcher started several processes of which MPI sees one; None if all is well."""
    if size not in (None, 1):
        return None
    for name in _SIZE_VARIABLES:
        text = environment.get(name, "")
        if text.isdigit() and int(text) > 1:
            started = f"{name}={text} says that {text} processes were started"
            remedy = "use the mpiexec of the MPI library that mpi4py was built for"
            if size is None:
                return f"{started}; MPI is not initialised in this one. Should its communicators have 1 rank: {remedy}"
            return f"{started}, but the communicator has 1: {remedy}"
    return None
