"""Errors that all ranks raise together: a rank with a problem still takes part, until the others know."""

from collections.abc import Callable
from typing import Any

from mpi4py import MPI


def attempt(task: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The task's result and its error, one of them None."""
    try:
        return task(), None
    except Exception as error:
        return None, error


def raise_first(comm: MPI.Intracomm, problem: Exception | None) -> None:
    """Collective: raise the error of the lowest rank that has one, on all ranks."""
    for rank, found in enumerate(comm.allgather(_portable(problem))):
        if found is not None:
            kind, message = found
            raise kind(f"rank {rank}: {message}") from problem


def _portable(problem: Exception | None) -> tuple[type, str] | None:
    """An error as other ranks can raise it."""
    if problem is None:
        return None
    kind = next((kind for kind in (TypeError, ValueError, MemoryError) if isinstance(problem, kind)), RuntimeError)
    return kind, str(problem)
