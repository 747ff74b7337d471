"""Everything of size m × m, in float64: projection, eigenproblem, cutoff, coefficients, caps on the step length."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastnewton.diagnostics import diagnosed
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu import spectrum as small
from fastnewton.kernels.record import FALLBACK, GO, NOT_FINITE
from fastnewton.results import StepInfo, recorded
from fastnewton.safeguards import guard


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

    matrix: np.ndarray
    projection: np.ndarray
    norm2: float
    floor: float
    theta_matrix: np.ndarray | None = None
    cross_matrix: np.ndarray | None = None
    theta_floor: float = 0.0
    cross_projection: np.ndarray | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the products of the gradients are finite; an infinite floor is an overflow of ‖ḡ‖²."""
        return math.isfinite(self.floor) and small.is_finite(self.matrix)

    @property
    def of_thetas_is_finite(self) -> bool:
        """Whether the products of the thetas are finite; true where none were given."""
        return self.theta_matrix is None or (math.isfinite(self.theta_floor) and small.is_finite(self.theta_matrix))


@dataclass(frozen=True)
class Spectrum:
    """The leading singular directions of G and what they say of z.

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

    singular_values: np.ndarray
    vectors: np.ndarray
    rank: int
    coefficients: np.ndarray
    captured: float


def projected(raw: Any, dtype: str) -> Gram:
    """The kernels' sums as a Gram: K ← CKC, b ← Cb, which removes the rounding of ḡ from the direction (1, …, 1)."""
    matrix, projection, norm2, floor = small.projected(raw.products, raw.m, DTYPES[dtype].eps)
    if raw.of_thetas is None:
        return Gram(matrix, projection, norm2, floor)
    theta_matrix, _, _, theta_floor = small.projected(raw.of_thetas, raw.m, DTYPES[dtype].eps)
    if raw.cross is None:
        return Gram(matrix, projection, norm2, floor, theta_matrix, None, theta_floor)
    cross = small.centred(raw.cross)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found in K
        along = raw.cross[:, -1] - raw.cross[:, -1].mean()
    return Gram(matrix, projection, norm2, floor, theta_matrix, cross, theta_floor, along)


def spectrum(gram: Gram, cutoff: float, max_rank: int | None, eigh: Callable = np.linalg.eigh) -> Spectrum:
    """Eigenpairs of K, the rank j and the coefficients c; see `fastnewton.spectrum`."""
    m = gram.projection.size
    if not gram.is_finite:
        return Spectrum(np.full(m, np.nan), np.full((m, m), np.nan), 0, np.full(m, np.nan), 0.0)
    settings = gram.projection, gram.norm2, cutoff, gram.floor, m if max_rank is None else min(m, max_rank)
    if m <= small.COMPILED_LIMIT:
        return Spectrum(*small.spectrum(gram.matrix, *settings))
    squares, vectors = eigh(gram.matrix)
    return Spectrum(*small.coefficients(squares, vectors.T, *settings))


def on_host(found: Any) -> Any:
    """A Gram or a Spectrum with arrays in CPU memory."""
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return type(found)(**{name: _host_value(value) for name, value in values.items()})


def _host_value(value: Any) -> Any:
    if not hasattr(value, "get"):
        return value
    return value.get() if value.ndim else float(value.get())


def decide(gram: Gram, lr: float, options: Any, eigh: Callable = np.linalg.eigh) -> StepInfo:
    """The coefficients and step length that follow from the small matrices alone."""
    found = spectrum(gram, options.cutoff, options.max_rank, eigh)
    finite = not math.isnan(found.singular_values[0])
    usable = options.lr_cap != "curvature" or found.rank == 0 or gram.of_thetas_is_finite
    tau = capped(lr, options.lr_cap, gram, found) if usable else lr
    status = GO if finite and usable else NOT_FINITE
    beta = tau if options.lr_rest is None else options.lr_rest
    record = recorded(status, found.rank, tau, beta, found.captured, found.singular_values, found.coefficients)
    if options.safeguards is None:
        return StepInfo(record)
    given, least = options.safeguards.fallback_lr, min(tau, beta)
    careful = capped(least, "curvature", gram, found) if status == GO and gram.of_thetas_is_finite else least
    record[FALLBACK] = careful if given is None else given
    return guard(StepInfo(record, tell=partial(diagnosed, gram, found)), gram, found, options.safeguards)


def capped(lr: float, kind: str | None, gram: Gram, found: Spectrum) -> float:
    """τ after `lr_cap`: at most 1/σ_1 ("sigma"), or at most σ_min(ΘV_jΣ_j⁻¹) ("curvature")."""
    if kind is None or found.rank == 0:
        return lr
    if kind == "sigma":
        return min(lr, 1.0 / float(found.singular_values[0]))
    leading = found.vectors[:, : found.rank]
    m = gram.projection.size
    moved = leading.T @ gram.theta_matrix @ leading
    # Below the rounding of the stored thetas, or of their products, a direction was not seen to move.
    floor = max(gram.theta_floor, math.sqrt(m * 2.0**-52 * float(np.trace(gram.theta_matrix))))
    usable = np.sqrt(np.maximum(np.diag(moved), 0.0)) > floor
    if not usable.any():
        return lr
    scale = 1.0 / found.singular_values[: found.rank][usable]
    squares = np.linalg.eigvalsh(scale[:, None] * moved[np.ix_(usable, usable)] * scale)
    return min(lr, float(np.sqrt(max(squares[0], 0.0))))
