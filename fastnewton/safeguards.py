"""Guards on a step: what they look at is of size m × m, and what they put in its place is averaged SGD.

A step goes by s = θ̄ − θ_new = τΘp + β(ḡ − Gq), with p = q = c unless curvature says otherwise.  Its length and its
angle to ḡ follow from ΘᵀΘ, ΘᵀG, Θᵀḡ, K, b and ‖ḡ‖² alone:

    sᵀḡ = τ pᵀΘᵀḡ + β(‖ḡ‖² − qᵀb)
    ‖s‖² = τ² pᵀΘᵀΘp + 2τβ pᵀ(Θᵀḡ − ΘᵀGq) + β²(‖ḡ‖² − 2qᵀb + qᵀKq)

With A = V_jΣ_j⁻¹, U = GA is an orthonormal basis of the kept span, and M = ½(AᵀΘᵀGA + AᵀGᵀΘA) the inverse Hessian that
the workers saw in it.  Curvature has the sign of μ_i along Uw_i, where Mw_i = μ_iw_i.  The signs of v_kᵀΘᵀGv_k, M's
diagonal, would not do: M may be indefinite where all of them are positive.
"""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastnewton import checks
from fastnewton.kernels.record import CAPTURED, GO, LR, LR_REST, NOT_FINITE, RANK, REASON, STATUS
from fastnewton.results import ACCEPTED, COEFFICIENT, COSINE, CURVATURE, NEWTON_NORM, NONFINITE, StepInfo, weights_of

CURVATURES = ("keep", "drop", "abs")

_counting = threading.Lock()


@dataclass(frozen=True)
class Safeguards:
    """When a step is to be trusted, and what is done otherwise; None leaves a guard out.

    What is not accepted becomes averaged SGD, θ̄ − fallback_lr·ḡ.

    Attributes
    ----------
    min_cosine : float, optional
        0 ≤ min_cosine < 1: the least cosine of the angle between the step θ̄ − θ_new and ḡ; 0 means no ascent.
    max_coefficient : float, optional
        The largest |c_k|.
    curvature : {"drop", "abs", "keep"}
        What is done about kept directions along which the workers saw a curvature that is not positive: they are left
        to the complement, or their part of Newton's step is reversed, or nothing is done, as in the paper.
    max_newton_norm : float, optional
        The largest ‖τΘc‖, in units of the workers' spread ‖Θ‖_F/√m (the root mean square of ‖θ_k − θ̄‖): a longer Newton
        part is shortened to it, by τ.
    fallback_lr : float, optional
        The step length of averaged SGD; None is the smallest of τ, β and 1/(largest curvature that the workers saw),
        the bound of lr_cap="curvature".
    counts : collections.Counter
        How often each `StepInfo.reason` came up in steps that were given this object, in this process.

    Raises
    ------
    TypeError, ValueError
        Bad arguments.
    """

    min_cosine: float | None = 0.01
    max_coefficient: float | None = 1e4
    curvature: str = "drop"
    max_newton_norm: float | None = 1e3
    fallback_lr: float | None = None
    counts: Counter = field(default_factory=Counter, init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in ("min_cosine", "max_coefficient", "max_newton_norm", "fallback_lr"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else checks.real(given, name))
        if self.min_cosine is not None and self.min_cosine >= 1:
            raise ValueError(f"min_cosine must be below 1; got {self.min_cosine!r}")
        checks.choice(self.curvature, "curvature", CURVATURES)

    def count(self, info: StepInfo) -> None:
        """Count the reason of a step that was taken."""
        with _counting:
            self.counts[info.reason] += 1


def checked(value: Any) -> Safeguards | None:
    """Safeguards from what a caller gave."""
    if value is not None and not isinstance(value, Safeguards):
        raise TypeError(f"safeguards must be a fastnewton.Safeguards or None; got {type(value).__name__}")
    return value


def guard(info: StepInfo, gram: Any, found: Any, guards: Safeguards) -> StepInfo:
    """The step of a decision, a changed one, or averaged SGD, from a Gram that holds all products and its Spectrum."""
    record, reason = info.record, NONFINITE
    with np.errstate(over="ignore", invalid="ignore"):
        basis = found.vectors[:, : found.rank] / found.singular_values[: found.rank]
        inverse = basis.T @ gram.cross_matrix @ basis
        if info.status == GO and np.isfinite(inverse).all():
            bent = guards.curvature != "keep" and _bend(record, gram, basis, inverse, guards.curvature)
            reason = _judge(record, gram, guards, CURVATURE if bent else ACCEPTED)
    record[REASON] = reason
    if reason == NONFINITE:
        record[STATUS] = NOT_FINITE  # the rows will tell whose fault it is
    return info.fallen_back(reason) if reason in (COEFFICIENT, COSINE) else info


def _bend(record: np.ndarray, gram: Any, basis: np.ndarray, inverse: np.ndarray, kind: str) -> bool:
    """Drop or reverse the directions whose curvature is not positive; whether there are any."""
    mu, turn = np.linalg.eigh((inverse + inverse.T) / 2)
    bent = mu <= 0
    if not bent.any():
        return False
    directions = basis @ turn
    along = directions.T @ gram.projection
    straight = np.where(bent, 0.0, along)
    of_thetas, of_grads = weights_of(record).reshape(2, -1)
    if kind == "abs":
        of_thetas[:] = directions @ np.where(bent, -along, along)
    else:
        of_thetas[:] = of_grads[:] = directions @ straight
        record[RANK] -= bent.sum()
        record[CAPTURED] = min(1.0, straight @ straight / gram.norm2) if gram.norm2 != 0 else 0.0
    return True


def _judge(record: np.ndarray, gram: Any, guards: Safeguards, reason: int) -> int:
    """Shorten Newton's part where it is too long; the reason, in the end."""
    p, q = weights_of(record).reshape(2, -1)
    if guards.max_coefficient is not None and max(np.abs(p).max(), np.abs(q).max()) > guards.max_coefficient:
        return COEFFICIENT
    tau, beta = record[LR], record[LR_REST]
    moved = np.sqrt(max(p @ gram.theta_matrix @ p, 0.0))
    rest = max(gram.norm2 - q @ gram.projection, 0.0)  # rounding alone is no ascent
    if guards.max_newton_norm is not None:
        longest = guards.max_newton_norm * np.sqrt(np.trace(gram.theta_matrix) / p.size)
        if tau * moved > longest:
            tau, reason = longest / moved, NEWTON_NORM
    along = tau * (p @ gram.cross_projection) + beta * rest
    rest2 = rest - q @ gram.projection + q @ gram.matrix @ q
    between = p @ (gram.cross_projection - gram.cross_matrix @ q)
    length2 = (tau * moved) ** 2 + 2 * tau * beta * between + beta**2 * rest2
    if not np.isfinite(along + length2):
        return NONFINITE
    least = guards.min_cosine and guards.min_cosine * np.sqrt(max(length2, 0.0)) * np.sqrt(gram.norm2)
    if guards.min_cosine is not None and along < least:
        return COSINE
    record[LR] = tau
    return reason
