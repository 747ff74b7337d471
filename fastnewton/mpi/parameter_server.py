"""Read and Write of a parameter server over MPI: rank 0 serves, every other rank is a worker."""

from types import TracebackType
from typing import Any

import numpy as np
from mpi4py import MPI

from fastnewton import arrays, checks
from fastnewton.arrays import Rows
from fastnewton.backends import backend
from fastnewton.dtypes import DTYPES
from fastnewton.method import NonFiniteError
from fastnewton.mpi.buffers import buffers
from fastnewton.mpi.datatypes import message
from fastnewton.mpi.errors import Failure
from fastnewton.server import ParameterServer

_REQUEST, _VECTOR, _ANSWER = range(3)  # tags


def serve(server: ParameterServer, comm: MPI.Intracomm) -> None:
    """Answer the Clients on all other ranks, first come first served, until every one of them has closed.

    Parameters
    ----------
    server : ParameterServer
        With as many workers as there are other ranks: rank k is worker k − 1.
    comm : mpi4py.MPI.Intracomm
        Of two ranks or more, this one rank 0.  Duplicated: `serve` and `Client` are collective, once.

    Raises
    ------
    TypeError, ValueError
        Bad arguments, on all ranks.

    Notes
    -----
    A Read that waits delays nobody.  Where every worker that has not closed waits for a new version, none can come:
    they all get a RuntimeError.
    """
    if comm.rank != 0:
        raise ValueError(f"comm must have its rank 0 serve; got rank {comm.rank}")
    failure, like = Failure(), None
    with failure:
        if not isinstance(server, ParameterServer):
            raise TypeError(f"server must be a ParameterServer; got {type(server).__name__}")
        if server.workers != comm.size - 1:
            raise ValueError(f"server must have {comm.size - 1} workers, the other ranks; got {server.workers}")
        like = server.like.n, server.like.dtype
    failure.raise_together(comm)
    comm.bcast(like, root=0)
    private = comm.Dup()
    _Service(server, private).run()
    private.Free()


class _Service:
    """Rank 0's side: requests one after the other."""

    def __init__(self, server: ParameterServer, comm: MPI.Intracomm):
        self._server, self._comm, self._dtype = server, comm, server.like.dtype
        self._vectors = arrays.allocate((2, server.like.n), DTYPES[self._dtype].word)  # θ and g of a Write
        self._open = set(range(1, comm.size))
        self._waiting: dict[int, int] = {}  # rank → the version that it knows

    def run(self) -> None:
        """Serve until every client has closed."""
        status = MPI.Status()
        while self._open:
            kind, version = self._comm.recv(None, MPI.ANY_SOURCE, _REQUEST, status)
            rank = status.source
            if kind == "read":
                self._waiting[rank] = -1 if version is None else version
            elif kind == "write":
                self._comm.send(self._write(rank), rank, _ANSWER)
            else:
                self._open.discard(rank)
            for reader in [rank for rank, version in self._waiting.items() if version < self._server.version]:
                self._answer_read(reader)
            if self._open <= self._waiting.keys():
                error = RuntimeError("no new version can come: every other worker waits or has closed")
                for reader in self._waiting:
                    self._comm.send(error, reader, _ANSWER)
                self._waiting.clear()

    def _write(self, rank: int) -> int | Exception:
        """Receive a Write, and return the version after it or what is wrong."""
        for vector in self._vectors:
            self._comm.Recv(message(vector, self._dtype), rank, _VECTOR)
        theta, grad = (arrays.rows_of(vector[None], self._dtype) for vector in self._vectors)
        try:
            return self._server.write_rows(rank - 1, theta, grad)
        except (ValueError, NonFiniteError, MemoryError) as error:
            return error

    def _answer_read(self, rank: int) -> None:
        del self._waiting[rank]
        raw_bits, version = self._server.latest_bits()
        self._comm.send(version, rank, _ANSWER)
        self._comm.Send(message(raw_bits, self._dtype), rank, _VECTOR)


class Client:
    """A worker's side of `serve`; the same Read and Write as the ParameterServer.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        As given to `serve`; this rank is worker comm.rank − 1.

    Raises
    ------
    TypeError, ValueError
        What `serve` raises.

    Notes
    -----
    Leaving a `with` block closes, on an exception too: the server then goes on with the others.  A rank that dies
    without that leaves the server waiting, unless the program runs as `python -m mpi4py`, which then ends the job.
    """

    def __init__(self, comm: MPI.Intracomm):
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm must be an intracommunicator of mpi4py; got {type(comm).__name__}")
        if comm.size < 2 or comm.rank == 0:
            raise ValueError(f"comm must have a rank 0 that serves, and others; got rank {comm.rank} of {comm.size}")
        Failure().raise_together(comm)
        n, dtype = comm.bcast(None, root=0)
        self._like = Rows(np.zeros(1, np.int64), n, dtype, "numpy", None)
        self._comm = comm.Dup()
        self.worker = comm.rank - 1

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Tell the server that this worker is done."""
        if self._comm != MPI.COMM_NULL:
            self._ask("close")
            self._comm.Free()

    def read(self, after: int | None = None, *, out: Any = None) -> tuple[Any, int]:
        """Return the latest parameters and their version.

        Parameters
        ----------
        after : int, optional
            Wait for a version newer than this one; None does not wait.
        out : array (n,), optional
            Where to write the parameters, of any library that `fastnewton.step` takes.

        Returns
        -------
        theta : array (n,)
            `out` itself if given, else a new NumPy array.
        version : int

        Raises
        ------
        TypeError, ValueError
            Bad input; nothing was asked for then.
        RuntimeError
            No newer version can come.
        """
        self._check_open()
        known, like = checks.count(after, "after"), self._like
        if out is not None:
            row = arrays.single(out, "out")
            like = like._replace(library=row.library, device=row.device, stream=row.stream)
        with backend(like).context(like):
            target, memory = arrays.output(out, like, ()), buffers(like)
            result = memory.open_result(target.rows)
            self._ask("read", known)
            version = self._answer()
            self._comm.Recv(message(result, like.dtype), 0, _VECTOR)
            memory.deliver(result, target.rows)
        return target.export(), version

    def write(self, theta: Any, grad: Any) -> int:
        """Write this worker's parameters and gradient; blocks only until the server acknowledges.

        Parameters
        ----------
        theta, grad : array (n,)
            Of the length and dtype of the server's parameters, and any library that `fastnewton.step` takes.

        Returns
        -------
        int
            The latest version after this Write.

        Raises
        ------
        TypeError, ValueError
            Bad input; nothing was sent then.  A second Write within a round of a synchronous server.
        NonFiniteError
            As from `ParameterServer.write`.
        """
        self._check_open()
        rows = {"theta": arrays.single(theta, "theta"), "grad": arrays.single(grad, "grad")}
        n, dtype = self._like.n, self._like.dtype
        for name, row in rows.items():
            if (row.n, row.dtype) != (n, dtype):
                raise ValueError(
                    f"{name} must have the length and dtype of the server's parameters, {n} and {dtype}; "
                    f"got {row.n} and {row.dtype}"
                )
        with backend(rows["theta"]).context(*rows.values()):
            pieces = [buffers(row).prepare_send(row, [slice(0, n)]) for row in rows.values()]
            self._ask("write")
            for piece in pieces:
                self._comm.Send(message(piece(0), dtype), 0, _VECTOR)
        return self._answer()

    def _check_open(self) -> None:
        if self._comm == MPI.COMM_NULL:
            raise ValueError("this Client is closed")

    def _ask(self, kind: str, version: int | None = None) -> None:
        self._comm.send((kind, version), 0, _REQUEST)

    def _answer(self) -> int:
        answer = self._comm.recv(source=0, tag=_ANSWER)
        if isinstance(answer, Exception):
            raise answer
        return answer
