"""Read and Write of a parameter server over MPI: rank 0 serves, every other rank is a worker."""

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
from fastnewton.server import ParameterServer

_READ, _WRITE, _CLOSE = range(3)
_REQUEST, _VECTOR, _ANSWER, _ERROR = range(4)  # tags
_NO_VERSION = -1  # where a Read does not wait, and where an answer is an error


def serve(server: ParameterServer, comm: Any) -> None:
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
    problem = None
    if not isinstance(server, ParameterServer):
        problem = TypeError(f"server must be a ParameterServer; got {type(server).__name__}")
    elif comm.rank != 0:
        problem = ValueError(f"comm must have its rank 0 serve; got rank {comm.rank}")
    elif server.workers != comm.size - 1:
        problem = ValueError(
            f"server must have a worker for each of the {comm.size - 1} other ranks; got {server.workers}"
        )
    like = None if problem else server.like
    comm.bcast((problem, like and (like.n, like.dtype)), root=0)
    if problem is not None:
        raise problem
    transport = comm.Dup()
    _Service(server, transport).run()
    transport.Free()


class _Service:
    """Requests one after the other."""

    def __init__(self, server: ParameterServer, comm: MPI.Intracomm):
        self._server, self._comm = server, comm
        self._dtype = server.like.dtype
        self._arrived = arrays.allocate((2, server.like.n), DTYPES[self._dtype].word)
        self._rows = arrays.rows_of(self._arrived, self._dtype)
        self._open = set(range(1, comm.size))
        self._waiting: dict[int, int] = {}  # rank → the version that it knows

    def run(self) -> None:
        """Return when every client has closed."""
        request, status = np.empty(2, np.int64), MPI.Status()
        while self._open:
            self._comm.Recv(request, MPI.ANY_SOURCE, _REQUEST, status)
            rank, (kind, known) = status.source, request.tolist()
            if kind == _READ:
                self._waiting[rank] = known
            elif kind == _WRITE:
                self._write(rank)
            else:
                self._open.discard(rank)
            for reader in [rank for rank, known in self._waiting.items() if known < self._server.version]:
                self._hand_out(reader)
            if self._open <= self._waiting.keys():
                for reader in list(self._waiting):
                    del self._waiting[reader]
                    self._refuse(
                        reader, RuntimeError("no new version can come: every other worker waits or has closed")
                    )

    def _write(self, rank: int) -> None:
        for vector in self._arrived:
            self._comm.Recv(message(vector, self._dtype), rank, _VECTOR)
        try:
            version = self._server.write_rows(rank - 1, *(self._rows.only(np.array([k])) for k in range(2)))
        except (ValueError, NonFiniteError, MemoryError) as error:
            self._refuse(rank, error)
        else:
            self._comm.Send(np.array([version]), rank, _ANSWER)

    def _hand_out(self, rank: int) -> None:
        del self._waiting[rank]
        words, version = self._server.latest_bits()
        self._comm.Send(np.array([version]), rank, _ANSWER)
        self._comm.Send(message(words.view(self._arrived.dtype), self._dtype), rank, _VECTOR)

    def _refuse(self, rank: int, error: Exception) -> None:
        self._comm.Send(np.array([_NO_VERSION]), rank, _ANSWER)
        self._comm.send(error, rank, _ERROR)


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

    def __init__(self, comm: Any):
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm must be an intracommunicator of mpi4py; got {type(comm).__name__}")
        if comm.size < 2 or comm.rank == 0:
            raise ValueError(f"comm must have a rank 0 that serves, and others; got rank {comm.rank} of {comm.size}")
        problem, agreed = comm.bcast(None, root=0)
        if problem is not None:
            raise problem
        n, dtype = agreed
        self._like = Rows(np.zeros(1, np.int64), n, dtype, "numpy", None)
        self._comm = comm.Dup()
        self.worker = comm.rank - 1

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close()

    def close(self) -> None:
        """Tell the server that this worker is done."""
        if self._comm != MPI.COMM_NULL:
            self._ask(_CLOSE)
            self._comm.Free()

    def read(self, after: int | None = None, *, out: Any = None) -> tuple[Any, int]:
        """The latest parameters and their version.

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
        known = checks.count(after, "after")
        like = self._like
        if out is not None:
            given = arrays.single(out, "out")
            like = like._replace(library=given.library, device=given.device, stream=given.stream)
        with backend(like).context(like):
            target = arrays.output(out, like, ())
            own = buffers(like)
            words = own.open_result(target.rows)
            self._ask(_READ, _NO_VERSION if known is None else known)
            version = self._answer()
            self._comm.Recv(message(words, self._like.dtype), 0, _VECTOR)
            own.deliver(words, target.rows)
        return target.export(), version

    def write(self, theta: Any, grad: Any) -> int:
        """Hand in this worker's parameters and gradient, and wait for nothing but the server's word.

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
        given = [arrays.single(theta, "theta"), arrays.single(grad, "grad")]
        for name, one in zip(("theta", "grad"), given, strict=True):
            if (one.n, one.dtype) != (self._like.n, self._like.dtype):
                raise ValueError(
                    f"{name} must have the length and dtype of the server's parameters, {self._like.n} and "
                    f"{self._like.dtype}; got {one.n} and {one.dtype}"
                )
        with backend(given[0]).context(*given):
            words = [buffers(one).prepare_send(one, [slice(0, one.n)]) for one in given]
            self._ask(_WRITE)
            for vector in words:
                self._comm.Send(message(vector(0), self._like.dtype), 0, _VECTOR)
        return self._answer()

    def _check_open(self) -> None:
        if self._comm == MPI.COMM_NULL:
            raise ValueError("this Client is closed")

    def _ask(self, kind: int, known: int = 0) -> None:
        self._comm.Send(np.array([kind, known]), 0, _REQUEST)

    def _answer(self) -> int:
        version = np.empty(1, np.int64)
        self._comm.Recv(version, 0, _ANSWER)
        if version[0] == _NO_VERSION:
            raise self._comm.recv(source=0, tag=_ERROR)
        return int(version[0])
