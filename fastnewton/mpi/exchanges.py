"""How the workers' vectors travel: the allgather and the sharded exchange."""

from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from fastnewton import arrays
from fastnewton.arrays import Rows
from fastnewton.backends import backend
from fastnewton.info import RESULT, StepInfo
from fastnewton.mpi.messages import WORDS, counted, message


def block_bounds(comm: MPI.Intracomm, like: Rows) -> list[int]:
    """The blocks of each rank are those from one bound to the next."""
    blocks = backend(like).blocks(like.n)
    return [blocks * rank // comm.size for rank in range(comm.size + 1)]


class _Received:
    """Two stacks of rows, parameters and gradients, that a collective fills; θ may still be on its way."""

    def __init__(self, comm: MPI.Intracomm, like: Rows, count: Callable[[str, int], None], columns: int):
        self._comm, self._count, self._dtype = comm, count, like.dtype
        shape, word = (comm.size, columns), WORDS[like.dtype]
        self._thetas, self._grads = (backend(like).receiving(shape, word) for _ in range(2))
        self._on_its_way: list[MPI.Request] = []
        self._rows: dict[str, Rows] = {}

    def start(self, theta: np.ndarray, grad: np.ndarray) -> None:
        """Send this rank's vectors; the gradients are there when this returns."""
        self._rows = {}
        grads_on_their_way = self._send(grad, self._grads)
        self._sent = theta  # must live until it is sent
        self._on_its_way = self._send(theta, self._thetas)
        MPI.Request.Waitall(grads_on_their_way)

    def _received(self, name: str, stack: np.ndarray, like: Rows) -> Rows:
        if name not in self._rows:
            self._rows[name] = backend(like).received(stack, like)
        return self._rows[name]

    def wait(self) -> None:
        """Return when the parameters are there."""
        MPI.Request.Waitall(self._on_its_way)
        self._on_its_way, self._sent = [], None

    def nonfinite_workers(self, workers: np.ndarray, like: Rows) -> list[int]:
        """Collective: those of the workers whose θ or g, as it was sent, is not finite."""
        here = [arrays.rows_of(stack, like.dtype) for stack in (self._thetas, self._grads)]
        found = np.zeros((self._comm.size, self._comm.size), np.int8)
        mine = np.zeros(self._comm.size, np.int8)
        mine[self._scanned(here)] = 1
        self._comm.Allgather(mine, found)
        return [int(k) for k in workers if found[:, k].any()]


class AllgatherExchange(_Received):
    """Every rank gets all rows, and combines all of them."""

    def __init__(self, comm: MPI.Intracomm, like: Rows, count: Callable[[str, int], None]):
        super().__init__(comm, like, count, like.n)

    def _send(self, vector: np.ndarray, stack: np.ndarray) -> list[MPI.Request]:
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

    def finish(self, workers: np.ndarray, info: StepInfo, target: Rows, compute: str) -> None:
        """Write θ_new to `target`, and in the record whether it is finite."""
        thetas, grads = self.thetas(target).only(workers), self.grads(target).only(workers)
        backend(target).finish(thetas, grads, info, target, compute)

    def _scanned(self, stacks: list[Rows]) -> list[int]:
        own = np.array([self._comm.rank])
        return [self._comm.rank] if arrays.nonfinite_workers(*(stack.only(own) for stack in stacks)) else []


class ShardedExchange(_Received):
    """Every rank gets its own blocks of all rows, combines them, and hands its shard of θ_new to all."""

    def __init__(self, comm: MPI.Intracomm, like: Rows, count: Callable[[str, int], None]):
        block = backend(like).BLOCK
        bounds = np.minimum(np.array(block_bounds(comm, like)) * block, like.n)
        self._counts, self._starts = np.diff(bounds), bounds[:-1]
        self._own, self._start = int(self._counts[comm.rank]), int(self._starts[comm.rank])
        super().__init__(comm, like, count, self._own)

    # Point to point: the collectives that take shards of different lengths were measured at half the speed.

    def _send(self, vector: np.ndarray, stack: np.ndarray) -> list[MPI.Request]:
        self._count("Alltoall", vector.nbytes - self._own * vector.itemsize)
        stack[self._comm.rank] = self._shard(vector, self._comm.rank)
        return self._passed_on(lambda rank: self._shard(vector, rank), lambda rank: stack[rank])

    def _shard(self, vector: np.ndarray, rank: int) -> np.ndarray:
        return vector[self._starts[rank] : self._starts[rank] + self._counts[rank]]

    def _passed_on(
        self, outgoing: Callable[[int], np.ndarray], incoming: Callable[[int], np.ndarray]
    ) -> list[MPI.Request]:
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

    def finish(self, workers: np.ndarray, info: StepInfo, target: Rows, compute: str) -> None:
        """Write θ_new to `target`, and in the record whether it is finite anywhere."""
        side, word = backend(target), WORDS[target.dtype]
        own = [rows.only(workers).part(self._start, self._own) for rows in (self.thetas(target), self.grads(target))]
        whole = side.collecting(target, word)
        side.finish_shard(*own, info, target, compute, self._start, whole)
        broken = np.zeros(self._comm.size)
        verdicts = self._comm.Iallgather(info.record[RESULT : RESULT + 1].copy(), broken)
        own = self._shard(whole, self._comm.rank)
        MPI.Request.Waitall(self._passed_on(lambda _rank: own, lambda rank: self._shard(whole, rank)))
        self._count("Allgather", self._own * whole.itemsize * (self._comm.size - 1))
        verdicts.Wait()
        info.record[RESULT] = broken.any()
        side.deliver(whole, target)

    def _scanned(self, stacks: list[Rows]) -> list[int]:
        return arrays.nonfinite_workers(*stacks)
