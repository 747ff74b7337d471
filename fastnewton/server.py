"""The parameter server of Arnold & Wang (2017), arXiv 1709.05069, synchronous or asynchronous, for any transport.

Workers Read θ and Write (θ_k, g_k).  The synchronous server steps with the last of m Writes of a round, the
asynchronous one with every Write, from the latest rows of all workers.  Either way this is the step of
`fastnewton.step` on these rows, bit by bit.
"""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastnewton import arrays, checks
from fastnewton.arrays import CPU, Output, Rows
from fastnewton.dtypes import DTYPES
from fastnewton.method import LocalSource, NonFiniteError, take_step
from fastnewton.options import Options
from fastnewton.results import StepInfo
from fastnewton.safeguards import Safeguards

MODES = ("sync", "async")


class _Latest(NamedTuple):
    """What a Read returns, replaced as a whole."""

    target: Output
    version: int
    info: StepInfo | None


class ParameterServer:
    """Parameters that workers Read and Write; thread-safe, and free of any transport.

    Parameters
    ----------
    theta0 : array (n,)
        Where to begin; in CPU memory, of a library and dtype that `fastnewton.step` takes.  Copied.
    workers : int
        m, 1 to 1024.
    mode : {"sync", "async"}
        Step with the last Write of a round, or with every Write.
    lr, cutoff, max_rank, lr_rest, lr_cap, nonfinite, precision, safeguards
        As in `fastnewton.step`; max_rank=0 is averaged SGD.  With "async" a Write forms no products of the parameters,
        so that safeguards and lr_cap="curvature" are for "sync"; so are "drop" and "propagate".
    max_staleness : int, optional
        For "async": a worker takes part in its own update and in so many after it, then no more until it writes
        again.  None is no limit.

    Attributes
    ----------
    counts : collections.Counter
        How often each `StepInfo.reason` came up.

    Notes
    -----
    A worker is left out until its first Write: with one worker, the asynchronous update is plain SGD.  The server holds
    (2m + 2)·n items.
    """

    def __init__(
        self,
        theta0: Any,
        workers: int,
        mode: str = "sync",
        *,
        lr: float,
        cutoff: float = 0.1,
        max_rank: int | None = None,
        lr_rest: float | None = None,
        lr_cap: str | None = None,
        nonfinite: str = "raise",
        precision: str | None = None,
        safeguards: Safeguards | None = None,
        max_staleness: int | None = None,
    ):
        self._mode = checks.choice(mode, "mode", MODES)
        self._lr = checks.real(lr, "lr")
        self._options = Options.check(cutoff, max_rank, lr_rest, lr_cap, nonfinite, precision, safeguards)
        self._max_age = checks.count(max_staleness, "max_staleness")
        if self._mode == "async" and (self._options.reads_thetas or self._options.nonfinite != "raise"):
            raise ValueError("with mode='async' safeguards must be None, lr_cap None or 'sigma', and nonfinite 'raise'")
        if self._mode == "sync" and max_staleness is not None:
            raise ValueError("max_staleness must be None with mode='sync', where every worker writes in every round")
        m = checks.count(workers, "workers")
        if m is None or not 1 <= m <= arrays.MAX_WORKERS:
            raise ValueError(f"workers must be 1 to {arrays.MAX_WORKERS}; got {workers!r}")
        start = arrays.single(theta0, "theta0")
        if start.device != CPU:
            raise TypeError(f"theta0 must be in CPU memory; got an array on {start.device}")
        self.like = start._replace(owner=None)
        self.counts: Counter[str] = Counter()
        word = DTYPES[start.dtype].word
        self._stacks = [arrays.allocate((m, start.n), word) for _ in range(2)]  # thetas, grads
        for stack in self._stacks:
            stack[:] = 0
        self._rows = [arrays.rows_of(stack, start.dtype) for stack in self._stacks]
        self._versions = np.zeros(m, np.int64)  # to which each worker's last Write belongs; 0 for none
        self._changed = threading.Condition()
        self._latest = _Latest(self._copy(start.raw_bits), 0, None)

    def _copy(self, raw_bits: np.ndarray) -> Output:
        target = arrays.output(None, self.like, ())
        target.rows.raw_bits[:] = raw_bits
        return target

    @property
    def version(self) -> int:
        """Count the updates so far."""
        return self._latest.version

    @property
    def info(self) -> StepInfo | None:
        """Describe the latest update, in entries of the workers that took part; None before the first."""
        return self._latest.info

    @property
    def workers(self) -> int:
        """Count the workers, m."""
        return self._versions.size

    def latest_bits(self) -> tuple[np.ndarray, int]:
        """Return the raw bits of the latest parameters and their version."""
        target, version, _ = self._latest
        return target.rows.raw_bits, version

    def read(self, after: int | None = None) -> tuple[Any, int]:
        """Return the latest parameters and their version.

        Parameters
        ----------
        after : int, optional
            Wait for a version newer than this one; None does not wait.

        Returns
        -------
        theta : array (n,)
            Of the library of theta0.  Shared by all who read this version: not to be written to.
        version : int
            0 for theta0, then one more for each update.
        """
        if (known := checks.count(after, "after")) is not None:
            with self._changed:
                self._changed.wait_for(lambda: self.version > known)
        target, version, _ = self._latest
        return target.export(), version

    def write(self, worker: int, theta: Any, grad: Any) -> int:
        """Replace the parameters and gradient of one worker; never waits for another one.

        Parameters
        ----------
        worker : int
            k, 0 to m − 1.
        theta, grad : array (n,)
            Like theta0.  Copied.

        Returns
        -------
        int
            The latest version after this Write: a new one with "async", or where a round is complete.

        Raises
        ------
        TypeError, ValueError
            Bad input; a second Write of one worker within a round of "sync".
        NonFiniteError
            NaN or infinity in theta or grad with nonfinite="raise", in all rows with "drop", or an update that
            overflows.  Nothing has changed then.
        """
        k = checks.count(worker, "worker")
        if k is None or k >= self.workers:
            raise ValueError(f"worker must be 0 to {self.workers - 1}; got {worker!r}")
        first = arrays.vector(theta, "theta", self.like, "theta0")
        return self.write_rows(k, first, arrays.vector(grad, "grad", self.like, "theta0"))

    def write_rows(self, k: int, theta: Rows, grad: Rows) -> int:
        """Write checked input."""
        with self._changed:
            version = self.version + 1
            if self._mode == "sync" and self._versions[k] == version:
                raise ValueError(f"worker {k} must not write twice in a round; it has, for version {version}")
            update = self._update(k, theta, grad, version)
            # Only now that nothing can fail any more is anything changed.
            for stack, row in zip(self._stacks, (theta, grad), strict=True):
                stack[k] = row.raw_bits
            self._versions[k] = version
            if update is not None:
                target, info = update
                self._latest = _Latest(target, version, info)
                self.counts[info.reason] += 1
                self._changed.notify_all()
            return self.version

    def _update(self, k: int, theta: Rows, grad: Rows, version: int) -> tuple[Output, StepInfo] | None:
        """Step with this Write; None where it does not complete its round."""
        present = self._present(k, version)
        if self._mode == "sync":
            if self._options.nonfinite == "raise" and arrays.nonfinite_workers(theta, grad):
                raise NonFiniteError.of([k])
            if present.size < self.workers:
                return None
        thetas, grads = (
            _with_row(rows, k, row).only(present) for rows, row in zip(self._rows, (theta, grad), strict=True)
        )
        target = arrays.output(None, self.like, ())
        try:
            info = take_step(LocalSource(thetas, grads, self._lr, self._options, target.rows), self._options)
        except NonFiniteError as error:
            raise NonFiniteError.of(present[list(error.workers)].tolist()) if error.workers else error from None
        return target, info

    def _present(self, k: int, version: int) -> np.ndarray:
        """List the workers that take part in the update to `version` when worker k writes."""
        age = version - self._versions
        max_age = 0 if self._mode == "sync" else self._max_age
        taking_part = (self._versions > 0) & (max_age is None or age <= max_age)
        taking_part[k] = True
        return np.flatnonzero(taking_part)

    # -- across a restart -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copy all that a server of the same arguments needs to go on with the same bits.

        NumPy arrays, numbers and strings; 16-bit rows and parameters as raw bits.
        """
        with self._changed:
            info, dropped = self.info, np.zeros(self.workers, bool)
            if info is not None:
                dropped[list(info.dropped)] = True
            return {
                "mode": self._mode,
                "dtype": self.like.dtype,
                "version": self.version,
                "info": np.empty(0) if info is None else info.record.copy(),
                "dropped": dropped,
                "theta": self.latest_bits()[0].copy(),
                "thetas": self._stacks[0].copy(),
                "grads": self._stacks[1].copy(),
                "versions": self._versions.copy(),
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a server with the same n, dtype, workers and mode; nothing is recomputed.

        Raises
        ------
        TypeError, ValueError
            A state of another kind; nothing has changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict, as state_dict returns it; got {type(state).__name__}")
        with self._changed:
            own = self.state_dict()
            if set(state) != set(own):
                raise ValueError(f"state must have the entries {sorted(own)}; got {sorted(state)}")
            for name, value in own.items():
                _check_entry(name, np.asarray(state[name]), np.asarray(value))
            target = self._copy(state["theta"])
            self._stacks[0][:], self._stacks[1][:] = state["thetas"], state["grads"]
            self._versions[:] = state["versions"]
            record, dropped = np.array(state["info"]), tuple(np.flatnonzero(state["dropped"]).tolist())
            self._latest = _Latest(target, int(state["version"]), StepInfo(record, dropped) if record.size else None)
            self._changed.notify_all()


def _with_row(rows: Rows, k: int, row: Rows) -> Rows:
    """Put a caller's row in place of the k-th, without copying it."""
    table, owner = rows.table.copy(), list(rows.owner)
    table[k], owner[k] = row.table[0], row.owner[0]
    return rows._replace(table=table, owner=owner)


def _check_entry(name: str, value: np.ndarray, own: np.ndarray) -> None:
    """Raise unless an entry of a state is of the kind, or for a string the value, of this server's own."""
    if own.dtype.kind == "U":
        alike, wanted, got = str(value) == str(own), repr(str(own)), repr(str(value))
    else:
        alike = value.dtype == own.dtype and (value.ndim == 1 if name == "info" else value.shape == own.shape)
        wanted, got = f"{own.dtype} of shape {own.shape}", f"{value.dtype} of shape {value.shape}"
    if not alike:
        raise ValueError(f"state[{name!r}] must be {wanted}; got {got}")
