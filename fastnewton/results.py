"""What the method returns: Gram, Spectrum, StepInfo and Diagnostics."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastnewton.kernels.record import (
    CAPTURED,
    FALLBACK,
    GO,
    HEADER,
    LR,
    LR_REST,
    NEWTON_NORM,
    RANK,
    REASON,
    RESULT,
    STATUS,
)

REASONS = ("accepted", "curvature", "newton_norm", "coefficient", "cosine", "nonfinite")  # by their number in a record


@dataclass(frozen=True)
class Gram:
    """Inner products of the centred gradients, already projected by C = I − 11ᵀ/m.

    NumPy arrays and numbers for arrays in CPU memory, CuPy arrays for those on a CUDA device.

    Attributes
    ----------
    matrix : (m, m) float64
        K = GᵀG.
    projection : (m,) float64
        b = Gᵀz, where z is the mean gradient ḡ unless another was given.
    norm2 : float
        zᵀz.
    floor : float
        2·eps·‖ḡ‖ with eps of the stored dtype: a σ below it is the rounding of the stored gradients.
    theta_matrix, cross_matrix : (m, m) float64 or None
        ΘᵀΘ and ΘᵀG, where thetas were given.
    cross_projection : (m,) float64 or None
        Θᵀḡ, where thetas were given.
    theta_floor : float
        2·eps·‖θ̄‖, where thetas were given.
    """

    matrix: Any
    projection: Any
    norm2: Any
    floor: Any
    theta_matrix: Any = None
    cross_matrix: Any = None
    theta_floor: Any = 0.0
    cross_projection: Any = None


@dataclass(frozen=True)
class Spectrum:
    """The leading singular directions of G and the coefficients that follow for z.

    Attributes
    ----------
    singular_values : (m,) float64
        σ_1 ≥ … ≥ σ_m ≥ 0, NaN if K was not finite.
    vectors : (m, m) float64
        The columns v_k with K = V diag(σ²) Vᵀ.
    rank : int
        j, the number of directions kept.
    coefficients : (m,) float64
        c = V_j diag(σ_j⁻²) V_jᵀ b, which sum to zero.
    captured : float
        ‖U_jᵀz‖²/zᵀz, the share of z that lies in the kept directions; 0 when z = 0.
    """

    singular_values: Any
    vectors: Any
    rank: int
    coefficients: Any
    captured: float


def to_host(result: Any) -> Any:
    """Return a Gram or a Spectrum with arrays in CPU memory."""
    return dataclasses.replace(result, **{name: _host_value(value) for name, value in vars(result).items()})


def _host_value(value: Any) -> Any:
    if not hasattr(value, "get"):
        return value
    return value.get() if value.ndim else float(value.get())


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Figures of a step, all from products of size m × m; NaN where they cannot be known.

    Attributes
    ----------
    captured : float
        ‖Pḡ‖²/‖ḡ‖², the share of the mean gradient in the kept directions; 0 when ḡ = 0.
    asymmetry : float
        ‖A − Aᵀ‖_F/‖A + Aᵀ‖_F of A = V_jᵀΘᵀGV_j: 0 for differences of a quadratic's gradients, about 1 for noise.
        Needs two kept directions.
    noise_to_secant : float
        Within the span of Θ, the noise in G over the rest, in Frobenius norm; infinite where all of it looks like
        noise.  With Θ = QSWᵀ, X = QᵀGW and D = SX − XᵀS, the least change of G after which equation (1) has a symmetric
        solution is, squared, Σ_a<b D_ab²/(s_a² + s_b²); of white noise in r directions it is a share (r − 1)/2r.
        Needs r ≥ 2.
    curvatures : (j,) float64
        σ_k/‖Θv_k‖, what the workers saw along each kept direction, in 1/`lr`; infinite where they did not move.  About
        1/local_lr in all of them after a local step of SGD on batches of their own: the step would read back noise.
    """

    captured: float
    asymmetry: float
    noise_to_secant: float
    curvatures: np.ndarray

    def pack(self, m: int) -> np.ndarray:
        """Return packed_size(m) numbers, to be sent."""
        j = self.curvatures.size
        return np.array([self.captured, self.asymmetry, self.noise_to_secant, j, *self.curvatures, *np.zeros(m - j)])

    @classmethod
    def unpack(cls, numbers: np.ndarray) -> "Diagnostics":
        """Rebuild what `pack` returned."""
        captured, asymmetry, noise_to_secant, j = numbers[:4].tolist()
        return cls(captured, asymmetry, noise_to_secant, numbers[4 : 4 + int(j)])


def packed_size(m: int) -> int:
    """Return how many numbers the diagnostics of m workers are sent as."""
    return 4 + m


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
    lr_rest : float
        β, τ where it was not given.
    captured : float
        ‖U_jᵀḡ‖²/‖ḡ‖², the share of the mean gradient in the kept directions; 0 when ḡ = 0.
    accepted : bool
        Whether this is a quasi-Newton step, and not the averaged SGD that `Safeguards` put in its place.
    reason : str
        What `Safeguards` did: "accepted"; "curvature" or "newton_norm" where the step was modified; "coefficient",
        "cosine" or "nonfinite" where it was replaced by averaged SGD.
    dropped : tuple of int
        The workers left out because they were not finite.
    diagnostics : Diagnostics or None
        Whether the step follows curvature, or noise, before `safeguards` modified it; None without them.  Computed when
        looked at.
    """

    record: Any  # array (HEADER + 3m,), or an object whose `get()` returns one
    dropped: tuple[int, ...] = ()
    diagnose: Callable[[], Diagnostics] | None = None

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
    def lr_rest(self) -> float:
        return float(self.read()[LR_REST])

    @property
    def captured(self) -> float:
        return float(self.read()[CAPTURED])

    @property
    def accepted(self) -> bool:
        return bool(self.read()[REASON] <= NEWTON_NORM)

    @property
    def reason(self) -> str:
        return REASONS[int(self.read()[REASON])]

    @property
    def diagnostics(self) -> Diagnostics | None:
        return self.diagnose and self.diagnose()

    @property
    def status(self) -> int:
        """Status of the decision: GO, NOT_FINITE or NOT_CONVERGED."""
        return int(self.read()[STATUS])

    @property
    def is_finite(self) -> bool:
        """Whether K and θ_new are finite."""
        record = self.read()
        return bool(record[STATUS] == GO and record[RESULT] == 0)

    def fall_back(self, reason: int) -> "StepInfo":
        """Return the averaged SGD in place of this step, for that reason."""
        record = self.read().copy()
        record[STATUS], record[REASON] = GO, reason
        record[RANK] = record[CAPTURED] = record[RESULT] = 0
        record[LR] = record[LR_REST] = record[FALLBACK]
        weights_of(record)[:] = 0
        return dataclasses.replace(self, record=record)

    def read(self) -> np.ndarray:
        """Return the record as a NumPy array."""
        return self.record if isinstance(self.record, np.ndarray) else self.record.get()

    def __repr__(self) -> str:
        sigma, c = (np.array2string(one, threshold=16) for one in (self.singular_values, self.coefficients))
        return (
            f"StepInfo(rank={self.rank}, lr={self.lr:.6g}, captured={self.captured:.6g}, "
            f"singular_values={sigma}, coefficients={c}, reason={self.reason!r}, dropped={self.dropped})"
        )


def record_size(m: int) -> int:
    """Return how many numbers the record of m workers holds."""
    return HEADER + 3 * m


def weights_of(record: Any) -> Any:
    """Return what the kernels multiply Θ and then G with, (2m,)."""
    return record[HEADER + (record.size - HEADER) // 3 :]
