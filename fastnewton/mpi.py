"""The step over MPI: one worker per rank, mpi4py communicators.

    exchange     what moves                         sent per rank    memory per rank beyond θ and g
    allgather    Allgather of θ and g               2n(m−1)          2mn + n

Every rank forms K's parts for its own blocks only and sends their maximal subtrees to rank 0, which completes the
tree, decides, and broadcasts c: the bits of θ_new are the same on every rank and equal to those of `fastnewton.step`
on the stacked rows.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fastnewton import arrays, eigen
from fastnewton.arrays import Rows
from fastnewton.backends import kernels
from fastnewton.kernels import threads, tree
from fastnewton.launch import foreign_launcher
from fastnewton.method import NonFiniteError, Options, StepInfo, decide

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError("fastnewton.mpi needs mpi4py: pip install 'fastnewton[mpi]'") from error

EXCHANGES = ("allgather",)

_MPI_TYPES = {
    "float16": MPI.UINT16_T,
    "bfloat16": MPI.UINT16_T,
    "float32": MPI.FLOAT,
    "float64": MPI.DOUBLE,
}
_WORDS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.float32, "float64": np.float64}

# What rank 0 broadcasts before the coefficients.
_GO, _BAD_INPUT, _NOT_FINITE = 0.0, 1.0, 2.0
_HEADER = 5


class DistNewton:
    """The quasi-Newton step of Arnold & Wang (2017), arXiv 1709.05069, with one worker per MPI rank.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Duplicated, so that the caller's messages are never touched.
    lr, cutoff, max_rank, lr_rest, lr_cap, nonfinite
        As in `fastnewton.step`; the same on all ranks.
    exchange : {"allgather"}
        How data move; see the module.

    Raises
    ------
    TypeError, ValueError
        Bad arguments on any rank: the same error on all of them, naming the rank.

    Notes
    -----
    Creating, stepping and closing are collective.  Leaving a `with` block on an exception is not.  During a step the
    kernels use this rank's share of the node's cores, unless FASTNEWTON_NUM_THREADS or NUMBA_NUM_THREADS is set.
    """

    def __init__(
        self,
        comm: Any,
        *,
        lr: float,
        cutoff: float = 0.1,
        max_rank: int | None = None,
        lr_rest: float | None = None,
        lr_cap: str | None = None,
        nonfinite: str = "raise",
        exchange: str = "allgather",
    ):
        if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
            raise TypeError(f"comm must be an intracommunicator of mpi4py; got {type(comm).__name__}")
        self._comm = comm.Dup()
        self._agreed: tuple[int, str, str] | None = None

        def settle() -> tuple[float, Options]:
            arrays.choice(exchange, "exchange", EXCHANGES)
            return arrays.real(lr, "lr"), Options.checked(cutoff, max_rank, lr_rest, lr_cap, nonfinite)

        settled, problem = _attempt(settle)
        self._raise_first(problem)
        self._lr, self._options = settled
        self._digest = hashlib.sha256(repr((self._lr, self._options, exchange)).encode()).digest()[:8]
        self._threads = _share_of_cores(self._comm)
        if comm.size == 1 and MPI.COMM_WORLD.size == 1 and (note := foreign_launcher(os.environ, 1)):
            warnings.warn(note, RuntimeWarning, stacklevel=2)

    def __enter__(self) -> "DistNewton":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()

    def close(self) -> None:
        """Free the communicator and the buffers."""
        if self._comm != MPI.COMM_NULL:
            self._comm.Free()
        self._stack_g = self._stack_t = None

    def step(self, theta: Any, grad: Any, *, lr: float | None = None, out: Any = None) -> tuple[Any, StepInfo]:
        """One step; θ_new has the same bits on every rank.

        Parameters
        ----------
        theta, grad : array (n,)
            This rank's parameters and gradient; n and dtype are agreed on in the first step.
        lr : float, optional
            τ for this step alone; that of rank 0 counts.
        out : array (n,), optional
            As in `fastnewton.step`; here it may be `theta`.

        Returns
        -------
        theta : array (n,)
            Of this rank's library; `out` itself if given; never one of the object's buffers.
        info : StepInfo
            The same on all ranks.

        Raises
        ------
        TypeError, ValueError
            Bad input on any rank: the same error on all of them, naming the rank, before anything is written.
        NonFiniteError
            As in `fastnewton.step`, on all ranks.
        """
        if self._comm == MPI.COMM_NULL:
            raise ValueError("this DistNewton is closed")
        checked, problem = _attempt(lambda: self._checked(theta, grad, lr, out))
        if self._agreed is None:
            self._agree(checked, problem)
        with threads.set_thread_limit(self._threads):
            return self._allgather_step(checked, problem)

    # -- input ----------------------------------------------------------------------------------------------

    def _checked(self, theta: Any, grad: Any, lr: float | None, out: Any):
        """Rows of one row, the output and this step's lr."""
        first, second = arrays.single(theta, "theta"), arrays.single(grad, "grad")
        arrays.check_alike(second, "grad", first, "theta")
        if self._agreed is not None:
            n, dtype, library = self._agreed
            if (first.n, first.dtype) != (n, dtype):
                raise ValueError(
                    f"theta must keep the length and dtype of the first step, {n} and {dtype}; "
                    f"got {first.n} and {first.dtype}"
                )
        inputs = (second,) if out is theta else (first, second)
        tau = self._lr if lr is None else arrays.real(lr, "lr")
        return first, second, arrays.output(out, first, inputs), tau

    def _agree(self, checked: Any, problem: Exception | None) -> None:
        """Allocate, then make sure that n, dtype, options and kernels are the same on all ranks."""
        size, record = self._comm.size, b""
        if checked is not None:
            first = checked[0]
            _, problem = _attempt(lambda: self._allocate(first))
            record = repr((first.n, first.dtype, kernels(first).layout())).encode()[:64]
        mine = (self._digest + record.ljust(64)) if problem is None else b"\0" * 72
        every = np.zeros((size, 72), np.uint8)
        self._comm.Allgather(np.frombuffer(mine, np.uint8), every)
        if not every.any(axis=1).all():
            self._raise_first(problem)
        for rank in range(1, size):
            if (every[rank, :8] != every[0, :8]).any():
                raise ValueError(f"rank {rank}: the options must be those of rank 0")
            if (every[rank] != every[0]).any():
                given, wanted = (bytes(every[k, 8:]).decode().strip() for k in (rank, 0))
                raise ValueError(
                    f"rank {rank}: theta must have the (length, dtype, kernel layout) of rank 0, {wanted}; "
                    f"got {given}"
                )
        self._agreed = (first.n, first.dtype, first.library)

    def _allocate(self, like: Rows) -> None:
        m, word = self._comm.size, _WORDS[like.dtype]
        self._stack_t, self._stack_g = (arrays.aligned((m, like.n), word) for _ in range(2))
        for stack in (self._stack_t, self._stack_g):
            stack[self._comm.rank] = 0  # what is sent in place of bad input

    def _raise_first(self, problem: Exception | None) -> None:
        """Collective: raise the error of the lowest rank that has one, on all ranks."""
        for rank, found in enumerate(self._comm.allgather(_portable(problem))):
            if found is not None:
                kind, message = found
                raise kind(f"rank {rank}: {message}") from problem

    # -- allgather ------------------------------------------------------------------------------------------

    def _allgather_step(self, checked: Any, problem: Exception | None) -> tuple[Any, StepInfo]:
        n, dtype, _ = self._agreed
        kind, rank = _MPI_TYPES[dtype], self._comm.rank
        if checked is None:
            theta_row, grad_row, tau = self._stack_t[rank].copy(), self._stack_g[rank].copy(), self._lr
        else:
            first, second, target, tau = checked
            theta_row, grad_row = (arrays.memory_at(given, _WORDS[dtype]) for given in (first, second))
        theta_on_its_way = self._comm.Iallgather([theta_row, n, kind], [self._stack_t, n, kind])
        self._comm.Allgather([grad_row, n, kind], [self._stack_g, n, kind])
        theta_on_its_way.Wait()
        thetas, grads = (_stack_rows(stack, dtype) for stack in (self._stack_t, self._stack_g))
        options, dropped = self._options, ()
        compute = options.compute(dtype)
        while True:
            verdict, decided = self._decide(thetas, grads, tau, compute, problem)
            if verdict == _BAD_INPUT:
                self._raise_first(problem)
            if verdict == _GO and self._combine(thetas, grads, decided, target.rows, compute):
                break
            if options.nonfinite == "propagate":
                break
            workers = [] if compute == "float64" and dropped else self._nonfinite_workers(theta_row, grad_row, dtype)
            workers = [k for k in workers if k not in dropped]
            if workers:
                dropped = (*dropped, *workers)
                if options.nonfinite == "raise" or len(dropped) == self._comm.size:
                    raise NonFiniteError.of(list(dropped))
                healthy = np.setdiff1d(np.arange(self._comm.size), dropped)
                thetas, grads = (_stack_rows(stack, dtype).only(healthy) for stack in (self._stack_t, self._stack_g))
            elif compute == "float64":
                raise NonFiniteError.overflow()
            else:
                compute = "float64"
        return target.finish(), decided
