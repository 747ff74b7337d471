"""Errors that all ranks raise together: a rank that fails still takes part, until the others know."""

from collections.abc import Mapping
from types import TracebackType

from mpi4py import MPI


class Failure:
    """Keep the first exception raised in its `with` blocks; it is not raised there."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> "Failure":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = self.error or error
        return True

    def __bool__(self) -> bool:
        return self.error is not None

    def raise_together(self, comm: MPI.Intracomm, terms: Mapping[str, str] | None = None) -> None:
        """Raise the error of the lowest rank that has one, or of terms that are not those of rank 0; collective."""
        ranks = comm.allgather((self._portable(), dict(terms or {})))
        for rank, (error, _) in enumerate(ranks):
            if error is not None:
                kind, message = error
                raise kind(f"rank {rank}: {message}") from self.error
        wanted = ranks[0][1]
        for rank, (_, values) in enumerate(ranks):
            for name, value in values.items():
                if value != wanted[name]:
                    raise ValueError(f"rank {rank}: {name} must be as on rank 0, {wanted[name]}; got {value}")

    def _portable(self) -> tuple[type[Exception], str] | None:
        """Describe the error so that other ranks can raise it."""
        if self.error is None:
            return None
        known = (kind for kind in (TypeError, ValueError, MemoryError) if isinstance(self.error, kind))
        return next(known, RuntimeError), str(self.error)
