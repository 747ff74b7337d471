"""The parameter server of Arnold & Wang (2017), arXiv 1709.05069, synchronous or asynchronous, for any transport.

Workers Read θ and Write (θ_k, g_k).  The synchronous server steps when the last of m Writes of a round is there.  The
asynchronous one steps with every Write, from the latest rows of all workers.  One row changes then, so that it
keeps, in float64 and for a reference vector r,

    A_ij = (g_i − r)ᵀ(g_j − r)        p_i = (g_i − r)ᵀr

and a Write recomputes row k of A and p_k: O(mn + m³) flops rather than O(m²n).  It still reads every row, so this
saves flops, not bytes.  With C = I − 11ᵀ/m,

    K = CAC        b = C(A1/m + p)        ‖ḡ‖² = 1ᵀA1/m² + 2·mean(p) + ‖r‖²

and r moves to ḡ, with all of A recomputed, where ‖ḡ − r‖² would drown the differences between workers.
"""

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastnewton import arrays, checks, decision
from fastnewton.arrays import CPU, Output, Rows
from fastnewton.backends import cpu
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu import combine as combine_kernel
from fastnewton.kernels.cpu import gram as gram_kernel
from fastnewton.kernels.cpu import spectrum as small
from fastnewton.kernels.record import GO
from fastnewton.method import LocalSource, NonFiniteError, take_step
from fastnewton.options import Options
from fastnewton.results import Gram, StepInfo

MODES = ("sync", "async")
DRIFT, FAR = 1e2, 1e8  # ‖ḡ − r‖² beside the mean ‖g_k − ḡ‖², from which r moves: once per m writes, or at once


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
    lr, cutoff, max_rank, lr_rest, lr_cap
        As in `fastnewton.step`; max_rank=0 is averaged SGD.  lr_cap="curvature" reads all of thetas and is for "sync".
    max_staleness : int, optional
        For "async": a worker takes part in its own update and in so many after it, then no more until it writes
        again.  None is no limit.

    Notes
    -----
    A worker is left out until its first Write: with one worker, the asynchronous update is plain SGD.  The server holds
    (2m + 2)·n items, and with "async" another n for r.
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
        max_staleness: int | None = None,
    ):
        self._mode = checks.choice(mode, "mode", MODES)
        self._lr = checks.real(lr, "lr")
        self._options = Options.check(cutoff, max_rank, lr_rest, lr_cap)
        self._max_staleness = checks.count(max_staleness, "max_staleness")
        if self._mode == "async" and lr_cap == "curvature":
            raise ValueError("lr_cap must be None or 'sigma' with mode='async'; got 'curvature'")
        if self._mode == "sync" and max_staleness is not None:
            raise ValueError("max_staleness must be None with mode='sync', where every worker writes in every round")
        m = checks.count(workers, "workers")
        if m is None or not 1 <= m <= arrays.MAX_WORKERS:
            raise ValueError(f"workers must be 1 to {arrays.MAX_WORKERS}; got {workers!r}")
        given = arrays.single(theta0, "theta0")
        if given.device != CPU:
            raise TypeError(f"theta0 must be in CPU memory; got an array on {given.device}")
        self.like = given._replace(owner=None)
        self._changed = threading.Condition()
        self._allocate(m)
        self._latest = _Latest(self._copied(given.raw_bits), 0, None)

    def _allocate(self, m: int) -> None:
        n, dtype = self.like.n, self.like.dtype
        self._word = np.dtype(f"u{self.like.itemsize}")
        self._stacks = tuple(arrays.allocate((m, n), self._word) for _ in range(2))  # thetas, grads
        for stack in self._stacks:
            stack[:] = 0
        self._rows = tuple(arrays.rows_of(stack, dtype) for stack in self._stacks)
        self._written = np.zeros(m, np.int64)  # the version to which each worker's last Write belongs; 0 for none
        self._gram = RowwiseGram(m, self.like) if self._mode == "async" else None

    def _copied(self, raw_bits: np.ndarray) -> Output:
        target = arrays.output(None, self.like, ())
        target.rows.raw_bits[:] = raw_bits.view(target.rows.raw_bits.dtype)
        return target

    @property
    def version(self) -> int:
        """The number of updates so far."""
        return self._latest.version

    @property
    def info(self) -> StepInfo | None:
        """The latest update, whose entries are those of the workers that took part; None before the first."""
        return self._latest.info

    @property
    def workers(self) -> int:
        """m."""
        return self._written.size

    def latest_words(self) -> tuple[np.ndarray, int]:
        """The bits of the latest parameters, as unsigned integers, and their version."""
        target, version, _ = self._latest
        return target.rows.raw_bits.view(self._word), version

    def read(self, after: int | None = None) -> tuple[Any, int]:
        """The latest parameters and their version.

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
        wanted = checks.count(after, "after")
        if wanted is not None:
            with self._changed:
                self._changed.wait_for(lambda: self.version > wanted)
        target, version, _ = self._latest
        return target.export(), version

    def write(self, worker: int, theta: Any, grad: Any) -> int:
        """Hand in the parameters and gradient of one worker; never waits for another one.

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
            NaN or infinity in theta or grad, or an update that overflows.  Nothing has changed then.
        """
        k = checks.count(worker, "worker")
        if k is None or k >= self.workers:
            raise ValueError(f"worker must be 0 to {self.workers - 1}; got {worker!r}")
        first = arrays.vector(theta, "theta", self.like, "theta0")
        return self.write_rows(k, first, arrays.vector(grad, "grad", self.like, "theta0"))

    def write_rows(self, k: int, theta: Rows, grad: Rows) -> int:
        """A Write of checked input."""
        with self._changed:
            version = self.version + 1
            if self._mode == "sync" and self._written[k] == version:
                raise ValueError(f"worker {k} must not write twice in a round; it has, for version {version}")
            update = (self._round if self._mode == "sync" else self._single)(k, theta, grad, version)
            # Only now that nothing can fail any more is anything changed.
            for stack, given in zip(self._stacks, (theta, grad), strict=True):
                stack[k] = given.raw_bits.view(self._word)
            self._written[k] = version
            if update is not None:
                self._latest = update
                self._changed.notify_all()
            if self._gram is not None:
                self._gram.follow(self._present(k, version), self._rows[1])
            return self.version

    def _round(self, k: int, theta: Rows, grad: Rows, version: int) -> _Latest | None:
        """The update, where this Write is the last of its round."""
        if arrays.nonfinite_workers(theta, grad):
            raise NonFiniteError.of([k])
        if (np.delete(self._written, k) != version).any():
            return None
        target = arrays.output(None, self.like, ())
        source = LocalSource(*self._with(k, theta, grad), self._lr, self._options, target.rows)
        info = take_step(source, self._options)
        return _Latest(target, version, info)

    def _single(self, k: int, theta: Rows, grad: Rows, version: int) -> _Latest:
        """The update that follows one Write."""
        present = self._present(k, version)
        thetas, grads = (rows.only(present) for rows in self._with(k, theta, grad))
        target = arrays.output(None, self.like, ())
        info = decision.decide(self._gram.changed(k, present, grads, grad), self._lr, self._options)
        if info.status == GO:
            cpu.combine(thetas, grads, info, out=target.rows, compute=self._options.compute(self.like.dtype))
        if not info.is_finite:
            raise NonFiniteError.of([k]) if arrays.nonfinite_workers(theta, grad) else NonFiniteError.overflow()
        return _Latest(target, version, info)

    def _present(self, k: int, version: int) -> np.ndarray:
        """The workers that take part in the update to `version` when worker k writes."""
        age = version - self._written
        taking_part = self._written > 0
        if self._max_staleness is not None:
            taking_part &= age <= self._max_staleness
        taking_part[k] = True
        return np.flatnonzero(taking_part)

    def _with(self, k: int, *given: Rows) -> list[Rows]:
        """All rows, those of worker k where its caller has them."""
        changed = []
        for rows, row in zip(self._rows, given, strict=True):
            table, owner = rows.table.copy(), list(rows.owner)
            table[k], owner[k] = row.table[0], row.owner[0]
            changed.append(rows._replace(table=table, owner=owner))
        return changed

    # -- across a restart -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that a server of the same arguments needs to go on with the same bits.

        NumPy arrays and numbers; rows and parameters as the bits of their dtype, in unsigned integers.
        """
        with self._changed:
            state = {
                "mode": self._mode,
                "dtype": self.like.dtype,
                "version": self.version,
                "info": None if self.info is None else self.info.record,
                "theta": self.latest_words()[0],
                "thetas": self._stacks[0],
                "grads": self._stacks[1],
                "written": self._written,
            }
            if self._gram is not None:
                state |= self._gram.state_dict()
            return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in state.items()}

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
            for name in own:
                _check_entry(name, state[name], own[name])
            target = self._copied(state["theta"])
            for stack, name in zip(self._stacks, ("thetas", "grads"), strict=True):
                stack[:] = state[name]
            self._written[:] = state["written"]
            if self._gram is not None:
                self._gram.load_state_dict(state)
            info = None if state["info"] is None else StepInfo(state["info"].copy())
            self._latest = _Latest(target, int(state["version"]), info)
            self._changed.notify_all()


def _check_entry(name: str, given: Any, own: Any) -> None:
    what = f"state[{name!r}]"
    if name == "info":
        if given is not None and not (isinstance(given, np.ndarray) and given.dtype == np.float64 and given.ndim == 1):
            raise ValueError(f"{what} must be None or a float64 array, a record; got {given!r}")
    elif isinstance(own, np.ndarray):
        found = (given.shape, given.dtype.name) if isinstance(given, np.ndarray) else type(given).__name__
        if found != (own.shape, own.dtype.name):
            raise ValueError(f"{what} must be an array with {(own.shape, own.dtype.name)}; got {found}")
    elif isinstance(own, str):
        if str(given) != own:
            raise ValueError(f"{what} must be {own!r}; got {given!r}")
    elif not (
        isinstance(given, (int, float, np.number, np.ndarray))
        and np.ndim(given) == 0
        and type(own)(given) == given >= 0
    ):
        raise ValueError(f"{what} must be a number of type {type(own).__name__}, 0 or more; got {given!r}")


class RowwiseGram:
    """K and b of rows that change one at a time, by A, p and r of the module."""

    def __init__(self, m: int, like: Rows):
        word = np.dtype(f"u{like.itemsize}")
        self._dtype = like.dtype
        self._reference, self._norm2 = np.zeros((1, like.n), word), 0.0
        self._products, self._along = np.zeros((m, m)), np.zeros(m)
        self._pending = (self._products, self._along)
        self._since_rebuild = m  # r = 0 is a first guess

    def changed(self, k: int, present: np.ndarray, grads: Rows, grad: Rows) -> Gram:
        """The Gram of the rows of the present workers, after that of worker k has become `grad`."""
        products, along = self._products.copy(), self._along.copy()
        values, along[k] = gram_kernel.row_products(grads, grad, self._reference_rows())
        products[k, present] = products[present, k] = values
        self._pending = (products, along)
        return self._gram(products[np.ix_(present, present)], along[present])

    def _gram(self, products: np.ndarray, along: np.ndarray) -> Gram:
        m = along.size
        every = np.empty((m + 1, m + 1))  # the products of the rows and, last, of ḡ
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found in K
            to_mean = products.mean(axis=1)  # (g_i − r)ᵀ(ḡ − r)
            every[:m, :m], every[:m, m], every[m, :m] = products, to_mean + along, to_mean + along
            every[m, m] = max(0.0, to_mean.mean() + 2 * along.mean() + self._norm2)
        return Gram(*small.project(every, m, DTYPES[self._dtype].eps))

    def follow(self, present: np.ndarray, grads: Rows) -> None:
        """Take the change, and move r to ḡ where it has become too far from the rows."""
        self._products, self._along = self._pending
        self._since_rebuild += 1
        products = self._products[np.ix_(present, present)]
        away, spread = products.mean(), small.centre(products).trace() / present.size
        due = away > (DRIFT if self._since_rebuild >= self._along.size else FAR) * spread
        if due and spread > 0:
            self._rebuild(present, grads.only(present))

    def _rebuild(self, present: np.ndarray, grads: Rows) -> None:
        reference = np.empty_like(self._reference)
        mean = arrays.rows_of(reference, self._dtype)
        combine_kernel.combine(grads, grads, np.zeros(grads.m), tau=0.0, beta=0.0, out=mean, compute="float64")
        products, along = np.zeros_like(self._products), np.zeros_like(self._along)
        for number, k in enumerate(present):
            values, along[k] = gram_kernel.row_products(grads, grads.only(np.array([number])), mean)
            products[k, present] = values
        self._reference, self._norm2 = reference, float(gram_kernel.gram(mean, compute="float64").products[1, 1])
        self._products, self._along, self._since_rebuild = products, along, 0

    def _reference_rows(self) -> Rows:
        return arrays.rows_of(self._reference, self._dtype)

    def state_dict(self) -> dict[str, Any]:
        """r, ‖r‖², A, p and the writes since r moved."""
        return {
            "reference": self._reference,
            "reference_norm2": self._norm2,
            "products": self._products,
            "along": self._along,
            "since_rebuild": self._since_rebuild,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._reference, self._products = state["reference"].copy(), state["products"].copy()
        self._along, self._norm2 = state["along"].copy(), float(state["reference_norm2"])
        self._since_rebuild = int(state["since_rebuild"])
