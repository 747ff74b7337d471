"""A PyTorch optimizer: every worker descends on batches of its own, and every so often all take the step together."""

import contextlib
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("fastnewton.torch needs PyTorch: pip install 'fastnewton[train]'") from error

from fastnewton import checks
from fastnewton.dtypes import DTYPES
from fastnewton.method import NonFiniteError
from fastnewton.options import EXCHANGES, Options
from fastnewton.results import StepInfo
from fastnewton.safeguards import Safeguards

_SAFEGUARDS = Safeguards()
_KEY = "dist_newton"  # in a state_dict
LENGTHS = ("lr", "lr_rest", "local_lr")  # of a group


class DistNewton(torch.optim.Optimizer):
    """Local SGD, combined every `local_steps` batches by the step of Arnold & Wang (2017), arXiv 1709.05069.

    Calls 1 to local_steps − 1 of `step` are θ_k ← θ_k − local_lr·g_k, without communication.  Call number local_steps
    is the quasi-Newton step from all ranks' (θ_k, g_k), with g_k taken at θ_k: equations (2) and (4), one K over all
    groups, each group with its own τ and β.  All ranks then have the same parameters, bit by bit.  A worker alone does
    SGD, with β at every call number local_steps.

    Parameters
    ----------
    params : iterable of torch.Tensor or dict
        As for any optimizer; groups may have lr, lr_rest and local_lr of their own.  float16, bfloat16, float32 or
        float64, all of one dtype on one device.  What stays frozen is better left out: it is sent with the others.
    lr : float
        τ ≥ 0, the step length of Newton's part.
    cutoff, max_rank, lr_cap, nonfinite, precision, safeguards
        As in `fastnewton.step`; by default a worker that is not finite is left out and takes over the others' step, and
        steps that are not to be trusted become averaged SGD.  The cap holds for the group of the largest lr, and τ of
        the others is reduced in proportion.
    lr_rest : float, optional
        β ≥ 0, the step length outside the kept directions; τ if None.
    local_steps : int
        At least 2, or 1 with `spread`: from one point the workers could see no curvature.
    local_lr : float, optional
        The step length of local SGD; the group's lr if None.
    comm : mpi4py.MPI.Intracomm, optional
        A worker for each rank; None is a worker alone.
    exchange : {"auto", "allgather", "sharded"}
        As in `fastnewton.mpi.DistNewton`.
    spread : float, optional
        After each combine every rank moves its parameters, those that are not frozen, by random noise of length
        spread·‖θ_new − θ_new of the combine before‖.  It follows from the rank, the number of the call and torch's
        initial seed when the optimizer was made, which is kept in the state_dict; torch's generators do not notice.

    Attributes
    ----------
    info : StepInfo or None
        Of the last combine with others.
    counts : collections.Counter
        How often each `StepInfo.reason` came up in combines with others.
    newton : fastnewton.mpi.DistNewton or None
        What the ranks combine with; `newton.traffic` counts what was sent.

    Raises
    ------
    TypeError, ValueError
        Bad arguments; in `step`, groups or step lengths that differ between ranks: the same error on all of them.
    NonFiniteError
        In `step`, where no worker is finite, or with nonfinite="raise".

    Notes
    -----
    Parameters and gradients are views of two flat, contiguous tensors, made in the first `zero_grad` or `step`: no step
    copies them.  `zero_grad` zeroes in place whatever `set_to_none` says.  A gradient found replaced, as after
    `module.zero_grad()`, is copied into the buffer, a missing one is zero there, and `p.grad` is the view again.

    Creating, combining and closing are collective.  Groups, and what schedulers make of them, must be alike on all
    ranks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        cutoff: float = 0.1,
        max_rank: int | None = None,
        lr_rest: float | None = None,
        lr_cap: str | None = None,
        nonfinite: str = "drop",
        precision: str | None = None,
        safeguards: Safeguards | None = _SAFEGUARDS,
        local_steps: int,
        local_lr: float | None = None,
        comm: Any = None,
        exchange: str = "auto",
        spread: float | None = None,
    ):
        self.spread = None if spread is None else checks.real(spread, "spread")
        checks.choice(exchange, "exchange", EXCHANGES)
        self.local_steps = _check_local_steps(local_steps, self.spread)
        self._options = Options.check(cutoff, max_rank, lr_rest, lr_cap, nonfinite, precision, safeguards)
        self._slots: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # parameters, and both views
        self._theta = self._grad = self._center = torch.empty(0)
        self._agreed: tuple[Any, ...] | None = None
        self._count, self._seed = 0, torch.initial_seed() % 2**64
        super().__init__(params, {"lr": lr, "lr_rest": lr_rest, "local_lr": local_lr})
        self.newton, self.counts = None, Counter()
        self.info: StepInfo | None = None
        if comm is not None:
            from fastnewton.mpi import DistNewton

            self._connect = functools.partial(DistNewton, comm, lr=lr, exchange=exchange, **vars(self._options))
            self.newton = self._connect()
        self._rank, self._workers = (0, 1) if comm is None else (comm.rank, comm.size)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`; on all ranks."""
        super().add_param_group(param_group)
        try:
            for name in LENGTHS:
                if self.param_groups[-1][name] is not None or name == "lr":
                    checks.real(self.param_groups[-1][name], name)
            _check_alike(self._parameters())
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._slots = []

    # -- the step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Descend locally or, at every call number local_steps, with all ranks; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if (self._count + 1) % self.local_steps:
            self._collect()
            self._descend("local_lr")
        else:
            self._combine()
            if self.spread:
                self._move_apart(self.spread)
        self._count += 1
        for p, *_ in self._slots:
            torch.autograd.graph.increment_version(p)
        return loss

    def _descend(self, name: str) -> None:
        """Take a step of SGD with the group's step length of that name, or its lr."""
        sizes = self._sizes()
        parts = zip(self.param_groups, self._theta.split(sizes), self._grad.split(sizes), strict=True)
        for group, theta, grad in parts:
            theta.add_(grad, alpha=-checks.real(group["lr"] if group[name] is None else group[name], name))

    def _combine(self) -> None:
        if self.newton is None:
            self._collect()
            finite = all(vector.isfinite().all() for vector in (self._theta, self._grad))
            if not (finite or self._options.propagates):
                raise NonFiniteError.of([0])
            self._descend("lr_rest")
            return
        from fastnewton.mpi import Segment

        self.newton.agree(self._terms)
        like = self._theta.shape, self._theta.dtype, self._theta.device
        if self._agreed not in (None, like):
            self.close()
            self.newton = self._connect()
        self._agreed = like
        lengths = [(group["lr"], group["lr_rest"]) for group in self.param_groups]
        segments = [Segment(size, *pair) for size, pair in zip(self._sizes(), lengths, strict=True)]
        _, self.info = self.newton.step(self._theta, self._grad, segments=segments, out=self._theta)
        self.counts[self.info.reason] += 1

    def _terms(self) -> dict[str, str]:
        """Bring the gradients into the buffer, and say what must be alike on all ranks."""
        self._collect()
        shapes = [[p.shape for p in group["params"]] for group in self.param_groups]
        terms = {
            "shapes in the groups": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
            "step lengths of the groups": [[group[name] for name in LENGTHS] for group in self.param_groups],
            "dtype and kind of device": (self._theta.dtype, self._theta.device.type),
            "local_steps": self.local_steps,
            "spread": self.spread,
            "number of the call": self._count,
        }
        return {name: str(value) for name, value in terms.items()}

    def _move_apart(self, spread: float) -> None:
        """Keep the result of the combine, and put noise on the parameters if there are other workers."""
        length = spread * _norm(self._theta - self._center)
        self._center.copy_(self._theta)
        if self._workers == 1:
            return
        seed = np.random.SeedSequence([self._seed, self._rank, self._count]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(self._theta.device).manual_seed(int(seed))
        noise = torch.empty_like(self._theta).normal_(generator=generator)
        for (p, *_), part in zip(self._slots, noise.split([p.numel() for p, *_ in self._slots]), strict=True):
            part.mul_(p.requires_grad)
        self._theta.add_(noise, alpha=length / (_norm(noise) or 1.0))

    @contextlib.contextmanager
    def combined(self) -> Iterator[None]:
        """Take back the `spread` and local steps since the last combine, within the block."""
        if not self.spread:
            raise ValueError("combined() needs an optimizer with spread=, which keeps the result of the last combine")
        self._attach()
        local = self._theta.clone()
        self._theta.copy_(self._center)
        try:
            yield
        finally:
            self._theta.copy_(local)

    def close(self) -> None:
        """Free what the ranks combine with; collective."""
        if self.newton is not None:
            self.newton.close()

    # -- the buffers ----------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients in place; they remain views of the buffer, whatever `set_to_none` says."""
        self._attach()
        self._grad.zero_()
        for p, _, grad in self._slots:
            p.grad = grad if p.requires_grad else None

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _sizes(self) -> list[int]:
        """Count the coordinates of each group."""
        return [sum(p.numel() for p in group["params"]) for group in self.param_groups]

    def _collect(self) -> None:
        """Bring gradients that are not views of the buffer into it."""
        self._attach()
        for p, _, grad in self._slots:
            if p.grad is grad:
                continue
            if p.grad is None:
                grad.zero_()
            elif p.grad.layout is torch.strided:
                grad.copy_(p.grad)
            else:
                raise TypeError(f"gradients must be dense; got {p.grad.layout} for a parameter of {tuple(p.shape)}")
            if p.requires_grad:
                p.grad = grad

    def _attach(self) -> None:
        """Make all parameters views of the buffer, if any is not."""
        if self._slots and all(p.data_ptr() == theta.data_ptr() for p, theta, _ in self._slots):
            return
        params, previous_center = self._parameters(), self._center
        _check_alike(params)
        sizes, like = [p.numel() for p in params], params[0] if params else torch.empty(0)
        self._theta = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        self._grad = torch.zeros_like(self._theta)
        self._slots = []
        for p, theta, grad in zip(params, self._theta.split(sizes), self._grad.split(sizes), strict=True):
            p.data = theta.view(p.shape).copy_(p.detach())
            self._slots.append((p, theta, grad.view(p.shape)))
        if self.spread:
            self._center = self._theta.clone()
            if previous_center.numel() <= sum(sizes):  # groups are only ever added at the end
                self._center[: previous_center.numel()] = previous_center

    # -- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: with the parameters, all that the next steps depend on."""
        self._attach()
        center = self._center if self.spread else None
        return super().state_dict() | {_KEY: {"count": self._count, "seed": self._seed, "center": center}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, on each rank its own."""
        if (checkpoint := state_dict.get(_KEY)) is None:
            raise ValueError(f"state_dict must be that of a DistNewton; got the entries {sorted(state_dict)}")
        super().load_state_dict(state_dict)
        self._attach()
        self._count, self._seed = checkpoint["count"], checkpoint["seed"]
        if self.spread and checkpoint["center"] is not None:
            self._center.copy_(checkpoint["center"])

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a DistNewton cannot be pickled or copied, since its communicator cannot; use state_dict()")


def _check_local_steps(local_steps: Any, spread: float | None) -> int:
    steps = checks.count(local_steps, "local_steps") or 0
    if steps < (1 if spread else 2):
        raise ValueError(
            f"local_steps must be at least 2, or 1 with a positive spread; got {local_steps!r} and spread={spread!r}: "
            "workers that never move apart see no curvature"
        )
    return steps


def _check_alike(params: list[torch.Tensor]) -> None:
    for p in params:
        what = p.dtype, p.device, p.layout
        if str(p.dtype).removeprefix("torch.") not in DTYPES or p.layout is not torch.strided:
            raise TypeError(f"params must be dense and float16, bfloat16, float32 or float64; got {what}")
        if (wanted := (params[0].dtype, params[0].device, params[0].layout)) != what:
            raise TypeError(f"params must be of one dtype and on one device; got {wanted} and {what}")


def _norm(vector: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
