"""What a step did, as it is kept: a record of float64 numbers, on the host or still on a device."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastnewton.diagnostics import Diagnostics
from fastnewton.kernels.record import CAPTURED, FALLBACK, GO, HEADER, LR, LR_REST, RANK, REASON, RESULT, STATUS

REASONS = ("accepted", "curvature", "newton_norm", "coefficient", "cosine", "nonfinite")
ACCEPTED, CURVATURE, NEWTON_NORM, COEFFICIENT, COSINE, NONFINITE = range(len(REASONS))


@dataclass(frozen=True, eq=False, repr=False)
class StepInfo:
    """What a step did.

    On a CUDA device each look reads the record back and waits for the step; in a replayed graph it shows the latest
    replay.

    Attributes
    ----------
    rank : int
        j, the number of directions along which the inverse Hessian was applied.
    singular_values : (m,) float64
        σ_1 ≥ … ≥ σ_m of G, without the workers left out.
    coefficients : (m,) float64
        c, one for each worker that was not left out.
    lr : float
        τ after `lr_cap`.
    captured : float
        ‖U_jᵀḡ‖²/‖ḡ‖², the share of the mean gradient in the kept directions; 0 when ḡ = 0.
    accepted : bool
        Whether this is a quasi-Newton step, and not the averaged SGD that `Safeguards` put in its place.
    reason : str
        What `Safeguards` found: "accepted"; "curvature" or "newton_norm" where the step was changed; "coefficient",
        "cosine" or "nonfinite" where it was not accepted.
    dropped : tuple of int
        The workers left out because they were not finite.
    diagnostics : Diagnostics or None
        Whether the step follows curvature, or noise, before `safeguards` changed it; None without them.  Computed when
        looked at.
    """

    record: Any  # array (HEADER + 3m,), or what `get()` makes one of
    dropped: tuple[int, ...] = ()
    tell: Callable[[], Diagnostics] | None = None

    @property
    def rank(self) -> int:
        return int(self.read()[RANK])

    @property
    def singular_values(self) -> np.ndarray:
        return self.read()[HEADER:].reshape(3, -1)[0]

    @property
    def coefficients(self) -> np.ndarray:
        return self.read()[HEADER:].reshape(3, -1)[2]

    @property
    def lr(self) -> float:
        return float(self.read()[LR])

    @property
    def captured(self) -> float:
        return float(self.read()[CAPTURED])

    @property
    def lr_rest(self) -> float:
        """β, τ where it was not given."""
        return float(self.read()[LR_REST])

    @property
    def accepted(self) -> bool:
        return self.read()[REASON] <= NEWTON_NORM

    @property
    def reason(self) -> str:
        return REASONS[int(self.read()[REASON])]

    @property
    def diagnostics(self) -> Diagnostics | None:
        return self.tell and self.tell()

    @property
    def status(self) -> int:
        """What was found of K: GO, NOT_FINITE or NOT_CONVERGED."""
        return int(self.read()[STATUS])

    @property
    def is_sound(self) -> bool:
        """Whether K and θ_new are finite."""
        return self.is_sound_from(0.0)

    def is_sound_from(self, least: float) -> bool:
        """Whether K and θ_new are finite, and σ_1² is not below that; NaN, after a fall back, is not."""
        record = self.read()
        return record[STATUS] == GO and record[RESULT] == 0 and not record[HEADER] ** 2 < least

    def fallen_back(self, reason: int) -> "StepInfo":
        """The averaged SGD in place of this step, for that reason."""
        record = self.read().copy()
        record[STATUS], record[REASON] = GO, reason
        record[RANK] = record[CAPTURED] = record[RESULT] = 0
        record[LR] = record[LR_REST] = record[FALLBACK]
        weights_of(record)[:] = 0
        return dataclasses.replace(self, record=record)

    def read(self) -> np.ndarray:
        """The record as a NumPy array."""
        return self.record if isinstance(self.record, np.ndarray) else self.record.get()

    def __repr__(self) -> str:
        return (
            f"StepInfo(rank={self.rank}, lr={self.lr:.6g}, captured={self.captured:.6g}, "
            f"singular_values={_shown(self.singular_values)}, coefficients={_shown(self.coefficients)}, "
            f"reason={self.reason!r}, "
            f"dropped={self.dropped})"
        )


def _shown(numbers: np.ndarray) -> str:
    return np.array2string(numbers, threshold=16)


def recorded(
    status: int, rank: int, lr: float, lr_rest: float, captured: float, sigma: np.ndarray, c: np.ndarray
) -> np.ndarray:
    """The record of a decision, before its result is there."""
    record = np.zeros(size_of(sigma.size))
    record[STATUS], record[RANK], record[LR], record[LR_REST], record[CAPTURED] = status, rank, lr, lr_rest, captured
    record[HEADER : HEADER + sigma.size] = sigma
    weights_of(record).reshape(2, -1)[:] = c
    return record


def size_of(m: int) -> int:
    """Numbers in the record of m workers."""
    return HEADER + 3 * m


def weights_of(record: Any) -> Any:
    """What the kernels multiply Θ and then G with, (2m,)."""
    return record[HEADER + (record.size - HEADER) // 3 :]
