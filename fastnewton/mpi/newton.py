"""The step over MPI, one worker per rank: what the ranks agree on, decide together and raise together."""

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from fastnewton import arrays, checks
from fastnewton.arrays import Output, Rows
from fastnewton.backends import backend
from fastnewton.environment import foreign_launcher
from fastnewton.kernels.cpu import threads
from fastnewton.method import take_step
from fastnewton.mpi.errors import Failure
from fastnewton.mpi.exchanges import AllgatherExchange, Exchange, ShardedExchange
from fastnewton.mpi.round import Round
from fastnewton.mpi.segments import Segment, StepLengths
from fastnewton.options import EXCHANGES, Options
from fastnewton.results import StepInfo
from fastnewton.safeguards import Safeguards

SHARDED_FROM = 1 << 18  # bytes of a gradient; measured: equal at 160 KiB with 4 ranks of one node, 800 KiB with 2


class StepInput(NamedTuple):
    """A rank's arguments of one step, checked."""

    theta: Rows
    grad: Rows
    target: Output
    lengths: StepLengths


class DistNewton:
    """The quasi-Newton step of Arnold & Wang (2017), arXiv 1709.05069, with one worker per MPI rank.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Duplicated, so that the caller's messages are never touched.
    lr, cutoff, max_rank, lr_rest, lr_cap, nonfinite, precision, safeguards
        As in `fastnewton.step`; the same on all ranks.
    exchange : {"auto", "allgather", "sharded"}
        How data move; see `fastnewton.mpi`.  "auto" shards gradients of 256 KiB and more.

    Attributes
    ----------
    counts : collections.Counter
        How often each `StepInfo.reason` came up.
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
        comm: MPI.Intracomm,
        *,
        lr: float,
        cutoff: float = 0.1,
        max_rank: int | None = None,
        lr_rest: float | None = None,
        lr_cap: str | None = None,
        nonfinite: str = "raise",
        precision: str | None = None,
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
        self._exchange: Exchange | None = None  # once its sizes are agreed on
        self.counts: Counter[str] = Counter()
        self.traffic: dict[str, tuple[int, int]] = {}
        failure, chosen = Failure(), None
        with failure:
            self._kind = checks.choice(exchange, "exchange", EXCHANGES)
            self._lr = checks.real(lr, "lr")
            self._options = Options.check(cutoff, max_rank, lr_rest, lr_cap, nonfinite, precision, safeguards)
            chosen = threads.chosen_threads()
        try:
            failure.raise_together(self._comm)
        except Exception:
            self._comm.Free()  # all ranks are here
            raise
        share = _share_of_cores(self._comm)
        self._threads = chosen or share
        if comm.size == 1 and MPI.COMM_WORLD.size == 1 and (note := foreign_launcher(os.environ, 1)):
            warnings.warn(note, RuntimeWarning, stacklevel=2)

    def __enter__(self) -> "DistNewton":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
        """Take one step; θ_new has the same bits on every rank.

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
        failure, inputs = Failure(), None
        with failure:
            inputs = self._check(theta, grad, lr, segments, out)
        self._exchange = self._exchange or self._agree(inputs, failure)
        with threads.set_thread_limit(self._threads):
            return self._step(self._exchange, inputs, failure)

    def agree(self, terms: Callable[[], dict[str, str]]) -> None:
        """Raise the same error on all ranks unless they have the same terms, or where these raise; collective."""
        failure, values = Failure(), {}
        with failure:
            values = terms()
        failure.raise_together(self._comm, values)

    # -- input ----------------------------------------------------------------------------------------------

    def _check(self, theta: Any, grad: Any, lr: float | None, segments: Any, out: Any) -> StepInput:
        first = arrays.single(theta, "theta")
        second = arrays.vector(grad, "grad", first, "theta")
        like = first if self._exchange is None else self._exchange.like
        if (first.n, first.dtype, first.device) != (like.n, like.dtype, like.device):
            raise ValueError(
                f"theta must keep the length, dtype and device of the first step, {like.n}, {like.dtype} and "
                f"{like.device}; got {first.n}, {first.dtype} and {first.device}"
            )
        lengths = self._lengths(lr, segments, first.n)
        apart = (second,) if out is theta else (first, second)
        with backend(first).context(first):
            return StepInput(first, second, arrays.output(out, first, apart), lengths)

    def _lengths(self, lr: float | None, segments: Any, n: int) -> StepLengths:
        if segments is None:
            return StepLengths(self._lr if lr is None else checks.real(lr, "lr"), self._options.lr_rest)
        if lr is not None:
            raise TypeError("lr must be left out where segments are given, which have their own")
        return StepLengths.of_segments(segments, n)

    def _agree(self, inputs: StepInput | None, failure: Failure) -> Exchange:
        """Allocate, and raise together unless n, dtype, kernels and options are the same on all ranks; collective."""
        options = {"lr": self._lr, **vars(self._options), "exchange": self._kind}
        terms, exchange = {name: repr(value) for name, value in options.items()}, None
        if inputs is not None:
            like = inputs.theta
            whole = self._kind == "allgather" or (self._kind == "auto" and like.n * like.itemsize < SHARDED_FROM)
            with failure, backend(like).context(like):
                exchange = (AllgatherExchange if whole else ShardedExchange)(self._comm, like, self._count)
                terms["(length, dtype, kernel layout) of theta"] = repr((like.n, like.dtype, backend(like).layout()))
        failure.raise_together(self._comm, terms)
        assert exchange is not None  # or a rank has failed, and all have raised
        return exchange

    def _count(self, collective: str, nbytes: int) -> None:
        calls, before = self.traffic.get(collective, (0, 0))
        self.traffic[collective] = calls + 1, before + nbytes

    # -- the step -------------------------------------------------------------------------------------------

    def _step(self, exchange: Exchange, inputs: StepInput | None, failure: Failure) -> tuple[Any, StepInfo]:
        like, lengths = (inputs.theta, inputs.lengths) if inputs else (exchange.like, StepLengths(0.0, None))
        options = dataclasses.replace(self._options, lr_rest=lengths.lr_rest)
        with backend(like).context(like):
            exchange.start(inputs and (inputs.theta, inputs.grad), like, failure)
            workers, out = np.arange(self._comm.size), inputs and inputs.target.rows
            source = Round(self._comm, exchange, workers, like, out, lengths, options, failure, self._count)
            info = take_step(source, options)
            assert inputs is not None  # or this rank has failed, and all have raised
            self.counts[info.reason] += 1
            return inputs.target.export(), info


def _share_of_cores(comm: MPI.Intracomm) -> int:
    """Divide the node's cores among its ranks; collective."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores = set().union(*node.allgather(threads.allowed_cores()))
    share = max(1, min(threads.available_cores(), len(cores) // node.size))
    node.Free()
    return share
