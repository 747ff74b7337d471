"""How the workers' vectors travel: the allgather and the sharded exchange."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from fastnewton.arrays import Rows
from fastnewton.backends import backend
from fastnewton.kernels.record import RESULT
from fastnewton.mpi import segments
from fastnewton.mpi.buffers import buffers
from fastnewton.mpi.datatypes import count_and_type, message
from fastnewton.mpi.errors import Failure
from fastnewton.mpi.segments import StepLengths
from fastnewton.results import StepInfo

_FAILED = -1  # in place of what a rank reports, where it could not look or combine


class Exchange(ABC):
    """Receive buffers for θ and g of all workers, and the collectives that fill them.

    Attributes
    ----------
    shards : list of slice
        The coordinates of each rank, whose parts of K it forms: whole blocks, of which this rank's begin at the
        `first_block` of `blocks`.
    places : list of list of (int, int)
        What each rank's parts are of, as the backend names it.
    like : Rows
        What the vectors of the latest step were like; without their memory.
    """

    whole: bool  # whether every rank receives whole vectors, or its own shard of them

    def __init__(self, comm: MPI.Intracomm, like: Rows, count: Callable[[str, int], None]):
        side = backend(like)
        self.blocks = side.blocks(like.n)
        bounds = [self.blocks * rank // comm.size for rank in range(comm.size + 1)]
        self.first_block = bounds[comm.rank]
        self.places = [side.places(*pair, self.blocks) for pair in itertools.pairwise(bounds)]
        self.shards = [slice(*pair) for pair in itertools.pairwise(min(bound * side.BLOCK, like.n) for bound in bounds)]
        self._comm, self.like, self._count = comm, like._replace(owner=None), count
        self._own = self.shards[comm.rank]
        self._pieces = [slice(0, like.n)] if self.whole else self.shards  # as a vector is sent
        self._buffers = buffers(like)
        columns = like.n if self.whole else _length(self._own)
        self._stacks = {name: self._buffers.allocate((comm.size, columns)) for name in ("thetas", "grads")}
        self._rows: dict[str, Rows] = {}  # the stacks as kernels read them
        self._thetas_pending: list[MPI.Request] = []

    def start(self, vectors: tuple[Rows, Rows] | None, like: Rows, failure: Failure) -> None:
        """Post the sends of θ and g, zeros if this rank has failed, and wait for the gradients."""
        self.like, self._rows = like._replace(owner=None), {}
        theta = grad = None
        if vectors is not None:
            with failure:
                grad, theta = (self._buffers.prepare_send(vector, self._pieces) for vector in reversed(vectors))
        if theta is None or grad is None:
            zeros = np.zeros(like.n, self._buffers.word)
            theta = grad = lambda k: zeros[self._pieces[k]]
        grads_pending = self._send(grad, self._stacks["grads"])
        self._thetas_pending = self._send(theta, self._stacks["thetas"])
        MPI.Request.Waitall(grads_pending)

    def wait(self) -> None:
        """Wait for the parameters."""
        MPI.Request.Waitall(self._thetas_pending)
        self._thetas_pending = []

    def shard_of(self, name: str, workers: np.ndarray) -> Rows:
        """Return this rank's coordinates of "thetas" or "grads" of these workers."""
        rows = self._received(name).only(workers)
        return rows.part(self._own.start, _length(self._own)) if self.whole else rows

    @abstractmethod
    def combine(self, workers: np.ndarray, info: StepInfo, target: Rows, compute: str, lengths: StepLengths) -> None:
        """Write θ_new to `target`, and in the record whether it is finite."""

    def nonfinite_workers(self, workers: np.ndarray) -> list[int]:
        """List those of the workers whose θ or g, as it was sent, is not finite; collective."""
        scanned = np.array([self._comm.rank]) if self.whole else np.arange(self._comm.size)
        failure, reports = Failure(), np.zeros((self._comm.size, self._comm.size), np.int8)
        report = np.zeros(self._comm.size, np.int8)
        with failure:
            rows = (self._received(name).only(scanned) for name in ("thetas", "grads"))
            report[scanned[backend(self.like).nonfinite_workers(*rows)]] = 1
        if failure:
            report[:] = _FAILED
        self._comm.Allgather(report, reports)
        if (reports == _FAILED).any():
            failure.raise_together(self._comm)
        return [int(k) for k in workers if reports[:, k].any()]

    def _received(self, name: str) -> Rows:
        if name == "thetas":
            self.wait()
        if name not in self._rows:
            self._rows[name] = self._buffers.make_rows(self._stacks[name], self.like)
        return self._rows[name]

    @abstractmethod
    def _send(self, piece: Callable[[int], Any], stack: Any) -> list[MPI.Request]:
        """Post what moves one vector of every rank into its row of the stack."""


class AllgatherExchange(Exchange):
    """Every rank gets all rows, and combines all of them."""

    whole = True

    def combine(self, workers: np.ndarray, info: StepInfo, target: Rows, compute: str, lengths: StepLengths) -> None:
        thetas, grads = (self._received(name).only(workers) for name in ("thetas", "grads"))
        segments.combine(thetas, grads, info, target, compute, lengths, slice(0, target.n))

    def _send(self, piece: Callable[[int], Any], stack: Any) -> list[MPI.Request]:
        vector = piece(0)
        self._count("Allgather", vector.nbytes * (self._comm.size - 1))
        count = count_and_type(vector.size, self.like.dtype)
        return [self._comm.Iallgather([vector, *count], [stack, *count])]


class ShardedExchange(Exchange):
    """Every rank gets its own blocks of all rows, combines them, and hands its shard of θ_new to all."""

    whole = False

    def combine(self, workers: np.ndarray, info: StepInfo, target: Rows, compute: str, lengths: StepLengths) -> None:
        def write(out: Rows) -> None:
            thetas, grads = (self.shard_of(name, workers) for name in ("thetas", "grads"))
            segments.combine(thetas, grads, info, out, compute, lengths, self._own)

        failure = Failure()
        whole = None
        with failure:
            whole = self._buffers.open_result(target)
            self._buffers.write_shard(write, target, self._own, whole)
        if whole is None:
            whole = np.empty(target.n, self._buffers.word)  # the others' shards must go somewhere
        verdicts = np.zeros(self._comm.size)
        verdict = np.full(1, float(_FAILED) if failure else info.record[RESULT])
        verdicts_pending = self._comm.Iallgather(verdict, verdicts)
        shard = whole[self._own]
        MPI.Request.Waitall(self._post(lambda _rank: shard, lambda rank: whole[self.shards[rank]]))
        self._count("Allgather", shard.nbytes * (self._comm.size - 1))
        verdicts_pending.Wait()
        if (verdicts == _FAILED).any():
            failure.raise_together(self._comm)
        info.record[RESULT] = verdicts.any()
        self._buffers.deliver(whole, target)

    # Point to point: the collectives that take shards of different lengths were measured at half the speed.

    def _send(self, piece: Callable[[int], Any], stack: Any) -> list[MPI.Request]:
        requests = self._post(piece, lambda rank: stack[rank])
        own = stack[self._comm.rank] = piece(self._comm.rank)
        self._count("Alltoall", self.like.n * self.like.itemsize - own.nbytes)
        return requests

    def _post(self, outgoing: Callable[[int], Any], incoming: Callable[[int], Any]) -> list[MPI.Request]:
        """Send to each other rank, the next one first, and receive from each, the one before first."""
        comm, dtype, requests = self._comm, self.like.dtype, []
        for distance in range(1, comm.size):
            source, destination = (comm.rank - distance) % comm.size, (comm.rank + distance) % comm.size
            here, there = incoming(source), outgoing(destination)
            requests.append(comm.Irecv(message(here, dtype), source))
            requests.append(comm.Isend(message(there, dtype), destination))
        return requests


def _length(piece: slice) -> int:
    return piece.stop - piece.start
