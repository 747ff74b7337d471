"""What it would bring to cut the sharded exchange into chunks, each one's Gram formed while the next is on its way.

The exchange of gradients and parameters and the Gram pass alone, whole and in chunks, with the package's own kernel.
"""

from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from fastnewton import arrays
from fastnewton.kernels.cpu import gram, threads

CHUNKS = 4


def exchange(comm: MPI.Intracomm, grad: np.ndarray, theta: np.ndarray, chunks: int) -> Callable[[], None]:
    """A function that moves shards of both vectors, m·BLOCK | n, and forms each chunk's Gram when it is there."""
    own = grad.size // comm.size
    blocks = own // gram.BLOCK
    bounds = [blocks * chunk // chunks for chunk in range(chunks + 1)]
    stacks = [arrays.allocate((comm.size, own), grad.dtype) for _ in range(2)]
    rows = arrays.rows_of(stacks[0], grad.dtype.name)

    def sent(vector: np.ndarray, stack: np.ndarray, chunk: int) -> list[MPI.Request]:
        here = slice(bounds[chunk] * gram.BLOCK, bounds[chunk + 1] * gram.BLOCK)
        shards = vector.reshape(comm.size, own)
        stack[comm.rank, here] = shards[comm.rank, here]
        requests = []
        for away in range(1, comm.size):
            source, to = (comm.rank - away) % comm.size, (comm.rank + away) % comm.size
            requests += [comm.Irecv(stack[source, here], source), comm.Isend(shards[to, here], to)]
        return requests

    def run() -> None:
        on_their_way = [
            [sent(vector, stack, chunk) for chunk in range(chunks)]
            for vector, stack in zip((grad, theta), stacks, strict=True)
        ]
        with threads.set_thread_limit(max(1, threads.available_cores() // comm.size)):
            for chunk, requests in enumerate(on_their_way[0]):
                MPI.Request.Waitall(requests)
                first, last = bounds[chunk], bounds[chunk + 1]
                gram.gram_parts(rows, compute="float32", first=first, last=last)
        for requests in on_their_way[1]:
            MPI.Request.Waitall(requests)

    return run
