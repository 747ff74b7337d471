"""The step over MPI: one worker per rank, mpi4py communicators.

    exchange     what moves                         sent per rank    memory per rank beyond θ and g
    allgather    Allgather of θ and g               2n(m−1)          2mn + n

Every rank forms K's parts for its own blocks only and sends their maximal subtrees to rank 0, which completes the
tree, decides, and broadcasts c: the bits of θ_new are the same on every rank and equal to those of `fastnewton.step`
on the stacked rows.
"""

import dataclasses
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fastnewton import arrays, eigen
from fastnewton.arrays import Rows
from fastnewton.backends import backend
from fastnewton.info import GO, HEADER, STATUS, StepInfo
from fastnewton.kernels import threads, tree
from fastnewton.launch import foreign_launcher
from fastnewton.method import NonFiniteError, Options

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

_BAD_INPUT = 3  # the status that rank 0 broadcasts where a rank has nothing to step with


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
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm must be an intracommunicator of mpi4py; got {type(comm).__name__}")
        if comm == MPI.COMM_NULL:
            raise ValueError("comm must be a valid communicator; got the null communicator, as after Free()")
        if comm.size > arrays.MAX_WORKERS:
            raise ValueError(f"comm must have at most {arrays.MAX_WORKERS} ranks; got {comm.size}")
        self._comm = comm.Dup()
        self._like: Rows | None = None  # what a rank's arrays are like, once agreed on

        def settle() -> tuple[float, Options]:
            arrays.choice(exchange, "exchange", EXCHANGES)
            return arrays.real(lr, "lr"), Options.checked(cutoff, max_rank, lr_rest, lr_cap, nonfinite)

        settled, problem = _attempt(settle)
        try:
            self._raise_first(problem)
        except Exception:
            self._comm.Free()  # all ranks are here
            raise
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
        self._stacks = self._gathered = None

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
        if self._like is None:
            self._agree(checked, problem)
        with threads.set_thread_limit(self._threads):
            return self._allgather_step(checked, problem)

    # -- input ----------------------------------------------------------------------------------------------

    def _checked(self, theta: Any, grad: Any, lr: float | None, out: Any):
        """Rows of one row, the output and this step's lr."""
        first, second = arrays.single(theta, "theta"), arrays.single(grad, "grad")
        arrays.check_alike(second, "grad", first, "theta")
        if second.n != first.n:
            raise ValueError(f"grad must have the length {first.n} of theta; got {second.n}")
        if self._like is not None:
            wanted = self._like
            if (first.n, first.dtype, first.device) != (wanted.n, wanted.dtype, wanted.device):
                raise ValueError(
                    f"theta must keep the length, dtype and device of the first step, {wanted.n}, {wanted.dtype} and "
                    f"{wanted.device}; got {first.n}, {first.dtype} and {first.device}"
                )
        inputs = (second,) if out is theta else (first, second)
        tau = self._lr if lr is None else arrays.real(lr, "lr")
        with backend(first).context(first):
            return first, second, arrays.output(out, first, inputs), tau

    def _agree(self, checked: Any, problem: Exception | None) -> None:
        """Allocate, then make sure that n, dtype, options and kernels are the same on all ranks."""
        size, record = self._comm.size, b""
        if checked is not None:
            first = checked[0]
            _, problem = _attempt(lambda: self._allocate(first))
            record = repr((first.n, first.dtype, backend(first).layout())).encode()[:64]
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
                    f"rank {rank}: theta must have the (length, dtype, kernel layout) of rank 0, {wanted}; got {given}"
                )
        self._like = first._replace(owner=None)

    def _allocate(self, like: Rows) -> None:
        shape, word = (self._comm.size, like.n), _WORDS[like.dtype]
        with backend(like).context(like):
            self._stacks = [backend(like).receiving(shape, word) for _ in range(2)]
        for stack in self._stacks:
            stack[self._comm.rank] = 0  # what is sent in place of bad input

    def _raise_first(self, problem: Exception | None) -> None:
        """Collective: raise the error of the lowest rank that has one, on all ranks."""
        for rank, found in enumerate(self._comm.allgather(_portable(problem))):
            if found is not None:
                kind, message = found
                raise kind(f"rank {rank}: {message}") from problem

    # -- allgather ------------------------------------------------------------------------------------------

    def _allgather_step(self, checked: Any, problem: Exception | None) -> tuple[Any, StepInfo]:
        n, dtype = self._like.n, self._like.dtype
        kind = _MPI_TYPES[dtype]
        if checked is None:
            mine = [stack[self._comm.rank].copy() for stack in self._stacks]
            target, tau = None, self._lr
        else:
            *given, target, tau = checked
            mine = [backend(one).sendable(one, _WORDS[dtype]) for one in given]
        theta_on_its_way = self._comm.Iallgather([mine[0], n, kind], [self._stacks[0], n, kind])
        self._comm.Allgather([mine[1], n, kind], [self._stacks[1], n, kind])
        theta_on_its_way.Wait()
        like = self._like if checked is None else given[0]
        with backend(like).context(like):
            self._gathered = [backend(like).received(stack, like) for stack in self._stacks]
            info = self._round(np.arange(self._comm.size), tau, target, problem)
            return target.finish(), info

    def _round(self, workers: np.ndarray, tau: float, target: Any, problem: Any) -> StepInfo:
        """The step of these workers, as `fastnewton.method` takes it; collective."""
        options = self._options
        thetas, grads = (given.only(workers) for given in self._gathered)
        products = sums = options.compute(grads.dtype)
        while True:
            info = self._decide(thetas, grads, tau, products, problem)
            if info.status == GO or options.nonfinite == "propagate":
                backend(grads).finish(thetas, grads, info, target.rows, sums)
            if options.nonfinite == "propagate" or info.is_sound:
                return info
            if bad := self._nonfinite_workers(workers):
                return self._without(bad, workers, tau, target)
            if (products if info.status != GO else sums) == "float64":
                raise NonFiniteError.overflow()
            products, sums = ("float64", sums) if info.status != GO else (products, "float64")

    def _decide(self, thetas: Rows, grads: Rows, tau: float, compute: str, problem: Exception | None) -> StepInfo:
        """Rank 0's decision from the parts of all ranks."""
        m, with_thetas = grads.m, self._options.lr_cap == "curvature"
        total = self._summed(grads, thetas if with_thetas else None, compute, problem)
        record = np.zeros(HEADER + 2 * m)
        if total is not None:
            gram = backend(grads).total(total, m, grads.dtype, with_thetas)
            record = eigen.decide(gram, tau, self._options).record
        elif self._comm.rank == 0:
            record[STATUS] = _BAD_INPUT
        self._comm.Bcast(record, root=0)
        if record[STATUS] == _BAD_INPUT:
            self._raise_first(problem)
        return StepInfo(record)

    def _summed(
        self, grads: Rows, thetas: Rows | None, compute: str, problem: Exception | None
    ) -> list[tree.Part] | None:
        """On rank 0 the parts of all ranks in order, or None if a rank has a problem; None elsewhere."""
        side, comm = backend(grads), self._comm
        blocks = side.blocks(grads.n)
        bounds = [blocks * rank // comm.size for rank in range(comm.size + 1)]
        places = [side.places(*run, blocks) for run in itertools.pairwise(bounds)]
        width = side.part_size(grads.m, thetas is not None)
        mine = np.zeros(1 + len(places[comm.rank]) * width)
        mine[0] = problem is not None
        if problem is None:
            mine[1:] = side.parts(grads, thetas, compute, *bounds[comm.rank : comm.rank + 2])
        counts = [1 + len(own) * width for own in places]
        every = np.empty(sum(counts)) if comm.rank == 0 else None
        comm.Gatherv(mine, [every, counts] if comm.rank == 0 else None, root=0)
        if comm.rank != 0:
            return None
        pieces = np.split(every, np.cumsum(counts)[:-1])
        if any(piece[0] for piece in pieces):
            return None
        return [
            tree.Part(*place, values)
            for own, piece in zip(places, pieces, strict=True)
            for place, values in zip(own, piece[1:].reshape(len(own), width), strict=True)
        ]

    def _nonfinite_workers(self, workers: np.ndarray) -> list[int]:
        """Collective: those of the workers whose own θ or g is not finite."""
        # The rows as they were sent: with out=theta the caller's θ may be overwritten by now.
        here = slice(self._comm.rank, self._comm.rank + 1)
        own = [arrays.rows_of(stack[here], self._like.dtype) for stack in self._stacks]
        flags = np.zeros(self._comm.size, np.int8)
        self._comm.Allgather(np.array([bool(arrays.nonfinite_workers(*own))], np.int8), flags)
        return [int(k) for k in workers if flags[k]]

    def _without(self, bad: list[int], workers: np.ndarray, tau: float, target: Any) -> StepInfo:
        if self._options.nonfinite == "raise" or len(bad) == workers.size:
            raise NonFiniteError.of(bad)
        info = self._round(np.setdiff1d(workers, bad), tau, target, None)
        return dataclasses.replace(info, dropped=tuple(bad))


def _attempt(task: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The task's result and its error, one of them None: a rank with a problem must still take part."""
    try:
        return task(), None
    except Exception as error:
        return None, error


def _portable(problem: Exception | None) -> tuple[type, str] | None:
    """An error as other ranks can raise it."""
    if problem is None:
        return None
    kind = next((kind for kind in (TypeError, ValueError, MemoryError) if isinstance(problem, kind)), RuntimeError)
    return kind, str(problem)


def _share_of_cores(comm: MPI.Intracomm) -> int:
    """Threads for this rank: the user's number, or the node's cores divided among its ranks; collective."""
    mine = set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores = set().union(*node.allgather(mine))
    share = max(1, min(len(mine), len(cores) // node.size))
    node.Free()
    return threads.chosen_threads() or share
