"""How the workers' vectors travel: the allgather and the sharded exchange."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from fastnewton.arrays import Rows
from fastnewton.backends import backend
from fastnewton.kernels.record import RESULT
from fastnewton.mpi.buffers import buffers
from fastnewton.mpi.datatypes import counted, message
from fastnewton.mpi.errors import attempt, raise_first
from fastnewton.mpi.segments import Lengths, finish
from fastnewton.results import StepInfo

_FAILED = -1  # in place of what a rank found, where it could not look or combine


def block_bounds(comm: MPI.Intracomm, like: Rows) -> list[int]:
    """The blocks of each rank are those from one bound to the next."""
    blocks = backend(like).blocks(like.n)
    return [blocks * rank // comm.size for rank in range(comm.size + 1)]


class _Received:
    """Two stacks of rows, parameters and gradients, that a collective fills; θ may still be on its way."""

    def __init__(
        self, comm: MPI.Intracomm, like: Rows, count: Callable[[str, int], None], columns: int, pieces: list[slice]
    ):
        self._comm, self._count, self._dtype, self._pieces = comm, count, like.dtype, pieces
        self._buffers = buffers(like)
        self._thetas, self._grads = (self._buffers.receiving((comm.size, columns)) for _ in range(2))
        self._on_its_way: list[MPI.Request] = []
        self._rows: dict[str, Rows] = {}

    def outgoing(self, *given: Rows) -> list[Callable[[int], Any]]:
        """This rank's g and θ, if it has them, as MPI can send them."""
        return [self._buffers.outgoing(one, self._pieces) for one in reversed(given)]

    def start(self, sending: list[Callable[[int], Any]] | None, like: Rows) -> None:
        """Send g and θ, or zeros for want of them; the gradients are there when this returns."""
        self._rows = {}
        zeros = np.zeros(0 if sending else like.n, self._buffers.word)
        grad, theta = sending or [lambda k: zeros[self._pieces[k]]] * 2
        grads_on_their_way = self._send(grad, self._grads)
        self._on_its_way = self._send(theta, self._thetas)
        MPI.Request.Waitall(grads_on_their_way)

    def _received(self, name: str, stack: Any, like: Rows) -> Rows:
        if name not in self._rows:
            self._rows[name] = self._buffers.rows(stack, like)
        return self._rows[name]

    def wait(self) -> None:
        """Return when the parameters are there."""
        MPI.Request.Waitall(self._on_its_way)
        self._on_its_way = []

    def nonfinite_workers(self, workers: np.ndarray, like: Rows) -> list[int]:
        """Collective: those of the workers whose θ or g, as it was sent, is not finite."""
        stacks = {"thetas": self._thetas, "grads": self._grads}
        own = self._to_scan()

        def scanned() -> list[int]:
            here = [self._received(name, stack, like)._replace(n=stack.shape[1]) for name, stack in stacks.items()]
            return backend(like).nonfinite_workers(*(rows.only(own) for rows in here))

        bad, problem = attempt(scanned)
        found = np.zeros((self._comm.size, self._comm.size), np.int8)
        mine = np.full(self._comm.size, 0 if problem is None else _FAILED, np.int8)
        if bad:
            mine[own[bad]] = 1
        self._comm.Allgather(mine, found)
        if (found == _FAILED).any():
            raise_first(self._comm, problem)
        return [int(k) for k in workers if found[:, k].any()]


class AllgatherExchange(_Received):
    """Every rank gets all rows, and combines all of them."""

    def __init__(self, comm: MPI.Intracomm, like: Rows, count: Callable[[str, int], None]):
        super().__init__(comm, like, count, like.n, [slice(0, like.n)])

    def _send(self, piece: Callable[[int], Any], stack: Any) -> list[MPI.Request]:
        vector = piece(0)
        self._count("Allgather", vector.nbytes * (self._comm.size - 1))
        one = counted(vector.size, self._dtype)
        return [self._comm.Iallgather([vector, *one], [stack, *one])]

    def grads(self, like: Rows) -> Rows:
        """The gradients of all workers, whole."""
        return self._received("grads", self._grads, like)

    def thetas(self, like: Rows) -> Rows:
        """The parameters of all workers, whole; waits for them."""
        self.wait()
        return self._received("thetas", self._thetas, like)

    def finish(self, workers: np.ndarray, info: StepInfo, target: Rows, compute: str, lengths: Lengths) -> None:
        """Write θ_new to `target`, and in the record whether it is finite."""
        thetas, grads = self.thetas(target).only(workers), self.grads(target).only(workers)
        finish(thetas, grads, info, target, compute, lengths, 0)

    def _to_scan(self) -> np.ndarray:
        return np.array([self._comm.rank])


class ShardedExchange(_Received):
    """Every rank gets its own blocks of all rows, combines them, and hands its shard of θ_new to all."""

    def __init__(self, comm: MPI.Intracomm, like: Rows, count: Callable[[str, int], None]):
        block = backend(like).BLOCK
        bounds = np.minimum(np.array(block_bounds(comm, like)) * block, like.n).tolist()
        shards = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self._start, self._own = shards[comm.rank].start, shards[comm.rank].stop - shards[comm.rank].start
        super().__init__(comm, like, count, self._own, shards)

    # Point to point: the collectives that take shards of different lengths were measured at half the speed.

    def _send(self, piece: Callable[[int], Any], stack: Any) -> list[MPI.Request]:
        requests = self._passed_on(piece, lambda rank: stack[rank])
        own = piece(self._comm.rank)
        stack[self._comm.rank] = own
        every = self._pieces[-1].stop * own.dtype.itemsize
        self._count("Alltoall", every - own.nbytes)
        return requests

    def _passed_on(self, outgoing: Callable[[int], Any], incoming: Callable[[int], Any]) -> list[MPI.Request]:
        """Send to each other rank, the next one first, and receive from each, the one before first."""
        comm, requests = self._comm, []
        for away in range(1, comm.size):
            source, to = (comm.rank - away) % comm.size, (comm.rank + away) % comm.size
            here, there = incoming(source), outgoing(to)
            requests.append(comm.Irecv(message(here, self._dtype), source))
            requests.append(comm.Isend(message(there, self._dtype), to))
        return requests

    def grads(self, like: Rows) -> Rows:
        """The gradients of all workers, of which this rank's blocks can be read."""
        return self._received("grads", self._grads, like).part(-self._start, like.n)

    def thetas(self, like: Rows) -> Rows:
        """The parameters of all workers, of which this rank's blocks can be read; waits for them."""
        self.wait()
        return self._received("thetas", self._thetas, like).part(-self._start, like.n)

    def finish(self, workers: np.ndarray, info: StepInfo, target: Rows, compute: str, lengths: Lengths) -> None:
        """Write θ_new to `target`, and in the record whether it is finite anywhere."""
        piece = self._pieces[self._comm.rank]

        def combined(out: Rows) -> None:
            both = self.thetas(target), self.grads(target)
            own = [rows.only(workers).part(self._start, self._own) for rows in both]
            finish(*own, info, out, compute, lengths, self._start)

        whole, problem = attempt(lambda: self._buffers.collecting(target))
        if problem is None:
            _, problem = attempt(lambda: self._buffers.finish(combined, target, piece, whole))
        else:
            whole = np.empty(target.n, self._buffers.word)  # the others' shards must go somewhere
        broken = np.zeros(self._comm.size)
        mine = info.record[RESULT : RESULT + 1].copy() if problem is None else np.array([float(_FAILED)])
        verdicts = self._comm.Iallgather(mine, broken)
        shard = whole[piece]
        MPI.Request.Waitall(self._passed_on(lambda _rank: shard, lambda rank: whole[self._pieces[rank]]))
        self._count("Allgather", shard.nbytes * (self._comm.size - 1))
        verdicts.Wait()
        if (broken == _FAILED).any():
            raise_first(self._comm, problem)
        info.record[RESULT] = broken.any()
        self._buffers.deliver(whole, target)

    def _to_scan(self) -> np.ndarray:
        return np.arange(self._comm.size)
