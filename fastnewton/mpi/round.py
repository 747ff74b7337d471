"""One step over the ranks: K's parts meet on rank 0, which decides for all; every rank combines."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from mpi4py import MPI

from fastnewton import decision
from fastnewton.arrays import Rows
from fastnewton.backends import backend
from fastnewton.kernels.record import GO, STATUS
from fastnewton.mpi.errors import Failure
from fastnewton.mpi.exchanges import Exchange
from fastnewton.mpi.segments import StepLengths
from fastnewton.options import Options
from fastnewton.results import Diagnostics, Gram, StepInfo, packed_size, record_size

_NO_PARTS = -1.0  # in place of the digest of a rank's segments, where the rank has failed
_FAILED = 3  # the status that rank 0 broadcasts where a rank has failed


@dataclass
class Round:
    """The rows of some workers over MPI, as `method.take_step` asks for them; all but `without` is collective."""

    comm: MPI.Intracomm
    exchange: Exchange
    workers: np.ndarray
    like: Rows
    out: Rows | None  # None where this rank has failed
    lengths: StepLengths
    options: Options
    failure: Failure
    count: Callable[[str, int], None]  # of traffic

    def __post_init__(self) -> None:
        self.m, self.n, self.dtype = self.workers.size, self.like.n, self.like.dtype

    def fused(self, products: str, sums: str) -> None:
        """Decline: ranks have no fused step."""

    def gram(self, products: str) -> Gram | None:
        """Gather K's parts and add them up on rank 0; None elsewhere, and where a rank has failed."""
        side, comm, exchange, failure = backend(self.like), self.comm, self.exchange, self.failure
        size = side.part_size(self.m, self.options)
        sizes = [1 + len(places) * size for places in exchange.places]
        message = np.zeros(sizes[comm.rank])
        if not failure:
            with failure:
                thetas = exchange.shard_of("thetas", self.workers) if self.options.reads_thetas else None
                grads = exchange.shard_of("grads", self.workers)
                run = exchange.first_block, exchange.blocks
                message[1:] = side.parts(grads, thetas, self.options, products, *run).ravel()
        message[0] = _NO_PARTS if failure else self.lengths.digest
        exchange.wait()
        messages = np.empty(sum(sizes)) if comm.rank == 0 else None
        comm.Gatherv(message, None if messages is None else [messages, sizes], root=0)
        self.count("Gatherv", message.nbytes * (comm.rank != 0))
        if messages is not None:
            with failure:
                return self._add_up(np.split(messages, np.cumsum(sizes)[:-1]), size)
        return None

    def _add_up(self, messages: list[np.ndarray], size: int) -> Gram | None:
        """Add up the parts of all ranks; None where one has failed."""
        digests = [message[0] for message in messages]
        if _NO_PARTS in digests:
            return None
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                raise ValueError(f"segments must be those of all ranks; got others on rank {rank}")
        places = np.array([*itertools.chain(*self.exchange.places)], np.int64).reshape(-1, 2)
        parts = np.concatenate([message[1:] for message in messages]).reshape(-1, size)
        return backend(self.like).total(places, parts, self.m, self.dtype, self.options)

    def decide(self, gram: Gram | None) -> StepInfo:
        """Decide on rank 0 and broadcast that, or raise together."""
        size, diagnosed = record_size(self.m), self.options.safeguards is not None
        verdict = np.full(size + diagnosed * packed_size(self.m), float(_FAILED))
        if gram is not None:
            with self.failure:
                info = decision.decide(gram, self.lengths.lr, self.options)
                diagnostics = info.diagnostics
                verdict[:] = [*info.record, *(() if diagnostics is None else diagnostics.pack(self.m))]
        self.comm.Bcast(verdict, root=0)
        self.count("Bcast", verdict.nbytes * (self.comm.size - 1) * (self.comm.rank == 0))
        if verdict[STATUS] == _FAILED:
            self.failure.raise_together(self.comm)
        return StepInfo(verdict[:size], diagnose=partial(Diagnostics.unpack, verdict[size:]) if diagnosed else None)

    def combine(self, info: StepInfo, sums: str) -> None:
        """Write θ_new unless K is not finite, then only where NaN is to propagate."""
        if self.out is not None and (info.status == GO or self.options.propagates):
            self.exchange.combine(self.workers, info, self.out, sums, self.lengths)

    def nonfinite_workers(self) -> list[int]:
        """List the workers whose θ or g is not finite."""
        return self.exchange.nonfinite_workers(self.workers)

    def without(self, workers: list[int]) -> "Round":
        """Leave workers out; the others' rows are still there."""
        others = np.setdiff1d(self.workers, workers)
        return dataclasses.replace(self, workers=others, failure=Failure())
