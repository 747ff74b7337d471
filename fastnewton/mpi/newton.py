"""The step over MPI, one worker per rank: what the ranks agree on, decide together and raise together."""

import dataclasses
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from fastnewton import arrays, checks, decision
from fastnewton.arrays import Rows
from fastnewton.backends import backend
from fastnewton.environment import foreign_launcher
from fastnewton.kernels.cpu import threads
from fastnewton.kernels.record import GO, STATUS
from fastnewton.method import take_step
from fastnewton.mpi.errors import attempt, raise_first
from fastnewton.mpi.exchanges import AllgatherExchange, ShardedExchange, block_bounds
from fastnewton.mpi.segments import Lengths, Segment
from fastnewton.options import EXCHANGES, Options
from fastnewton.results import Diagnostics, Gram, StepInfo, packed_size, record_size
from fastnewton.safeguards import Safeguards

SHARDED_FROM = 1 << 18  # bytes of a gradient; measured: equal at 160 KiB with 4 ranks of one node, 800 KiB with 2

_PROBLEM = -1.0  # in place of the digest of a rank's segments
_FAILED = 3  # the status that rank 0 broadcasts where a rank cannot go on


class DistNewton:
    """The quasi-Newton step of Arnold & Wang (2017), arXiv 1709.05069, with one worker per MPI rank.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Duplicated, so that the caller's messages are never touched.
    lr, cutoff, max_rank, lr_rest, lr_cap, nonfinite, safeguards
        As in `fastnewton.step`; the same on all ranks, each of which counts for itself.
    exchange : {"auto", "allgather", "sharded"}
        How data move; see `fastnewton.mpi`.  "auto" shards gradients of 256 KiB and more.

    Attributes
    ----------
    traffic : dict of str to (int, int)
        For each exchange that carries vectors, parts of K or c: calls, and bytes that this rank had for others.  Not
        counted are the verdict beside each shard, 8 bytes, and the messages of the first step and of failures.

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
        safeguards: Safeguards | None = None,
        exchange: str = "auto",
    ):
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm must be an intracommunicator of mpi4py; got {type(comm).__name__}")
        if comm == MPI.COMM_NULL:
            raise ValueError("comm must be a valid communicator; got the null communicator, as after Free()")
        if comm.size > arrays.MAX_WORKERS:
            raise ValueError(f"comm must have at most {arrays.MAX_WORKERS} ranks; got {comm.size}")
        self._comm = comm.Dup()
        self._like: Rows | None = None  # what a rank's arrays are like, once agreed on
        self._exchange: Any = None
        self.traffic: dict[str, tuple[int, int]] = {}

        def settle() -> tuple[float, Options, int | None]:
            checks.choice(exchange, "exchange", EXCHANGES)
            options = Options.check(cutoff, max_rank, lr_rest, lr_cap, nonfinite, None, safeguards)
            return checks.real(lr, "lr"), options, threads.chosen_threads()

        settled, problem = attempt(settle)
        try:
            raise_first(self._comm, problem)
        except Exception:
            self._comm.Free()  # all ranks are here
            raise
        self._lr, self._options, chosen = settled
        self._kind = exchange
        terms = {"lr": self._lr, **vars(self._options), "exchange": exchange}
        self._terms = {name: repr(value) for name, value in terms.items()}
        share = _share_of_cores(self._comm)
        self._threads = chosen or share
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
        self._exchange = None

    def step(
        self,
        theta: Any,
        grad: Any,
        *,
        lr: float | None = None,
        segments: Sequence[Segment] | None = None,
        out: Any = None,
    ) -> tuple[Any, StepInfo]:
        """One step; θ_new has the same bits on every rank.

        Parameters
        ----------
        theta, grad : array (n,)
            This rank's parameters and gradient; n, dtype and kind of memory are agreed on in the first step.  Arrays on
            a CUDA device are staged through pinned host memory.
        lr : float, optional
            τ for this step alone; that of rank 0 counts.
        segments : sequence of Segment, optional
            Stretches of the vectors, in order, with τ and β of their own instead of `lr` and `lr_rest`, the same on all
            ranks; K is that of whole vectors.  The step is decided, and `lr_cap` set, for the segment of the largest τ;
            the others' are then reduced in proportion.  Where that segment has a β of its own and `max_newton_norm`
            shortens its τ, β of segments without one is shortened too.
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
        MemoryError, RuntimeError
            A rank that cannot go on: the same error on all of them, naming the rank.  `out` is undefined if it was
            combining.  Nothing is sent after the combine of the allgather exchange, nor after a result goes back to a
            device: a rank that fails there raises alone, and `python -m mpi4py` ends the job.
        """
        if self._comm == MPI.COMM_NULL:
            raise ValueError("this DistNewton is closed")
        checked, problem = attempt(lambda: self._checked(theta, grad, lr, segments, out))
        if self._like is None:
            self._agree(checked, problem)
        with threads.set_thread_limit(self._threads):
            return self._step(checked, problem)

    def agree(self, terms: Callable[[], str], what: str) -> None:
        """Collective: unless the terms are the same, or where they raise, the same error on all ranks."""
        mine, problem = attempt(terms)
        raise_first(self._comm, problem)
        every = self._comm.allgather(mine)
        for rank, given in enumerate(every):
            if given != every[0]:
                raise ValueError(f"rank {rank}: {what} must be those of rank 0")

    # -- input ----------------------------------------------------------------------------------------------

    def _checked(self, theta: Any, grad: Any, lr: float | None, segments: Any, out: Any):
        """Rows of one row, the output and this step's lengths."""
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
        lengths = self._lengths(lr, segments, first.n)
        with backend(first).context(first):
            return first, second, arrays.output(out, first, inputs), lengths

    def _lengths(self, lr: float | None, segments: Any, n: int) -> Lengths:
        if segments is None:
            return Lengths(self._lr if lr is None else checks.real(lr, "lr"), self._options.lr_rest)
        if lr is not None:
            raise TypeError("lr must be left out where segments are given, which have their own")
        return Lengths.of(segments, n)

    def _agree(self, checked: Any, problem: Exception | None) -> None:
        """Allocate, then make sure that n, dtype, options and kernels are the same on all ranks."""
        size, record = self._comm.size, b""
        if checked is not None:
            first = checked[0]
            _, problem = attempt(lambda: self._allocate(first))
            record = repr((first.n, first.dtype, backend(first).layout())).encode()[:64]
        digest = hashlib.sha256(repr(self._terms).encode()).digest()[:8]
        mine = (digest + record.ljust(64)) if problem is None else b"\0" * 72
        every = np.zeros((size, 72), np.uint8)
        self._comm.Allgather(np.frombuffer(mine, np.uint8), every)
        if not every.any(axis=1).all():
            raise_first(self._comm, problem)
        if (every[:, :8] != every[0, :8]).any():
            self._raise_other_options()
        for rank in range(1, size):
            if (every[rank] != every[0]).any():
                given, wanted = (bytes(every[k, 8:]).decode().strip() for k in (rank, 0))
                raise ValueError(
                    f"rank {rank}: theta must have the (length, dtype, kernel layout) of rank 0, {wanted}; got {given}"
                )
        self._like = first._replace(owner=None)

    def _raise_other_options(self) -> None:
        """Collective: say which option is not that of rank 0."""
        wanted, *others = self._comm.allgather(self._terms)
        for rank, given in enumerate(others, 1):
            for name, value in given.items():
                if value != wanted[name]:
                    raise ValueError(f"rank {rank}: {name} must be that of rank 0, {wanted[name]}; got {value}")

    def _allocate(self, like: Rows) -> None:
        sharded = self._kind == "sharded" or (self._kind == "auto" and like.n * like.itemsize >= SHARDED_FROM)
        with backend(like).context(like):
            self._exchange = (ShardedExchange if sharded else AllgatherExchange)(self._comm, like, self._count)

    def _count(self, collective: str, nbytes: int) -> None:
        calls, before = self.traffic.get(collective, (0, 0))
        self.traffic[collective] = calls + 1, before + nbytes

    # -- the step -------------------------------------------------------------------------------------------

    def _step(self, checked: Any, problem: Exception | None) -> tuple[Any, StepInfo]:
        *given, target, lengths = checked or (None, self._lengths(None, None, 0))
        like = given[0] if given else self._like
        with backend(like).context(like):
            sending, failure = attempt(lambda: self._exchange.outgoing(*given))
            problem = problem or failure
            self._exchange.start(sending, like)
            workers = np.arange(self._comm.size)
            info = take_step(_Round(self, workers, lengths, target, like, problem), self._options)
            return target.export(), info

    def _decide(self, workers: np.ndarray, lengths: Lengths, gram: Gram | None, problem: Exception | None) -> StepInfo:
        """Rank 0's decision, on all ranks."""
        size, guarded = record_size(workers.size), self._options.safeguards is not None

        def decided() -> np.ndarray:
            options = dataclasses.replace(self._options, lr_rest=lengths.lr_rest)
            info = decision.decide(gram, lengths.lr, options)
            return np.concatenate([info.record, info.diagnostics.pack(workers.size)]) if guarded else info.record

        verdict = None
        if gram is not None:
            verdict, problem = attempt(decided)
        if verdict is None:  # here a rank has failed, or this is not rank 0
            verdict = np.full(size + guarded * packed_size(workers.size), float(_FAILED))
        self._comm.Bcast(verdict, root=0)
        self._count("Bcast", verdict.nbytes * (self._comm.size - 1) * (self._comm.rank == 0))
        if verdict[STATUS] == _FAILED:
            raise_first(self._comm, problem)
        return StepInfo(verdict[:size], diagnose=partial(Diagnostics.unpack, verdict[size:]) if guarded else None)

    def _summed(
        self, workers: np.ndarray, compute: str, like: Rows, agreed: float, problem: Exception | None
    ) -> tuple[tuple[np.ndarray, np.ndarray] | None, Exception | None]:
        """On rank 0 places and parts of all ranks, or None if a rank has a problem; and this rank's problem."""
        side, comm, options = backend(like), self._comm, self._options
        bounds = block_bounds(comm, like)
        places = [side.places(*run, side.blocks(like.n)) for run in itertools.pairwise(bounds)]
        width = side.part_size(workers.size, options)
        mine = np.zeros(1 + len(places[comm.rank]) * width)

        def parts() -> np.ndarray:
            thetas = self._exchange.thetas(like).only(workers) if options.reads_thetas else None
            grads = self._exchange.grads(like).only(workers)
            return side.parts(grads, thetas, options, compute, *bounds[comm.rank : comm.rank + 2])

        if problem is None:
            found, problem = attempt(parts)
        if problem is None:
            mine[1:] = found.ravel()
        mine[0] = agreed if problem is None else _PROBLEM
        self._exchange.wait()
        counts = [1 + len(own) * width for own in places]
        every = np.empty(sum(counts)) if comm.rank == 0 else None
        comm.Gatherv(mine, [every, counts] if comm.rank == 0 else None, root=0)
        self._count("Gatherv", mine.nbytes * (comm.rank != 0))
        if comm.rank != 0:
            return None, problem
        pieces = np.split(every, np.cumsum(counts)[:-1])
        if others := [rank for rank, piece in enumerate(pieces) if piece[0] != agreed]:
            if problem is None and all(piece[0] != _PROBLEM for piece in pieces):
                problem = ValueError(f"segments must be those of all ranks; got others on rank {others[0]}")
            return None, problem
        parts = np.concatenate([piece[1:] for piece in pieces]).reshape(-1, width)
        return (np.array([*itertools.chain(*places)], np.int64).reshape(-1, 2), parts), problem


class _Round:
    """One step of these workers as `take_step` sees it; every method is collective."""

    def __init__(
        self, newton: DistNewton, workers: np.ndarray, lengths: Lengths, target: Any, like: Rows, problem: Any
    ):
        self._newton, self._workers, self._lengths, self._target = newton, workers, lengths, target
        self._like, self._problem = like, problem
        self.m, self.n, self.dtype = workers.size, like.n, like.dtype

    def fused(self, products: str, sums: str) -> None:
        return None

    def gram(self, products: str) -> Gram | None:
        newton, like = self._newton, self._like
        total, self._problem = newton._summed(self._workers, products, like, self._lengths.digest, self._problem)
        if total is None:
            return None
        gram, self._problem = attempt(lambda: backend(like).total(*total, self.m, self.dtype, newton._options))
        return gram

    def decide(self, gram: Gram | None) -> StepInfo:
        return self._newton._decide(self._workers, self._lengths, gram, self._problem)

    def combine(self, info: StepInfo, sums: str) -> None:
        if info.status == GO or self._newton._options.propagates:
            self._newton._exchange.finish(self._workers, info, self._target.rows, sums, self._lengths)

    def nonfinite_workers(self) -> list[int]:
        return self._newton._exchange.nonfinite_workers(self._workers, self._like)

    def without(self, workers: list[int]) -> "_Round":
        left = np.setdiff1d(self._workers, workers)
        return _Round(self._newton, left, self._lengths, self._target, self._like, None)


def _share_of_cores(comm: MPI.Intracomm) -> int:
    """Threads for this rank, from the node's cores divided among its ranks; collective."""
    mine = set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores = set().union(*node.allgather(mine))
    share = max(1, min(len(mine), len(cores) // node.size))
    node.Free()
    return share
