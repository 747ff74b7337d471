"""What the small matrices say of a step before it is taken: does it follow curvature, or noise?"""

from dataclasses import dataclass
from typing import Any

import numpy as np


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

    def packed(self, m: int) -> np.ndarray:
        """As packed_size(m) numbers, to be sent."""
        j = self.curvatures.size
        return np.array([self.captured, self.asymmetry, self.noise_to_secant, j, *self.curvatures, *np.zeros(m - j)])

    @classmethod
    def unpacked(cls, numbers: np.ndarray) -> "Diagnostics":
        """What was `packed`."""
        return cls(*numbers[:3].tolist(), numbers[4 : 4 + int(numbers[3])])


def packed_size(m: int) -> int:
    """Numbers that the diagnostics of m workers are sent as."""
    return 4 + m


def diagnosed(gram: Any, spectrum: Any) -> Diagnostics:
    """From a Gram with the products of the parameters and its Spectrum, whose arrays are NumPy's."""
    sigma, of_thetas, cross = spectrum.singular_values[: spectrum.rank], gram.theta_matrix, gram.cross_matrix
    kept = spectrum.vectors[:, : spectrum.rank]
    scale, theta_scale = (np.abs(products).max() or 1.0 for products in (cross, of_thetas))
    with np.errstate(all="ignore"):  # what is not known is NaN, and what did not move infinite
        seen = kept.T @ (cross / scale) @ kept
        asymmetry = np.linalg.norm(seen - seen.T) / np.linalg.norm(seen + seen.T) if len(seen) > 1 else np.nan
        curvatures = sigma / np.sqrt(np.maximum(np.einsum("ak,ab,bk->k", kept, of_thetas, kept), 0.0))
        noise = _noise(of_thetas / theta_scale, cross / scale, gram.theta_floor / np.sqrt(theta_scale))
        return Diagnostics(float(spectrum.captured), float(asymmetry), noise, curvatures)


def _noise(of_thetas: np.ndarray, cross: np.ndarray, floor: float) -> float:
    if not (np.isfinite(of_thetas).all() and np.isfinite(cross).all()):
        return np.nan
    squares, basis = np.linalg.eigh(of_thetas)
    moved = squares > max(floor**2, len(squares) * 2.0**-52 * squares[-1])
    squares, products = squares[moved], basis[:, moved].T @ cross @ basis[:, moved]
    r = len(squares)
    if r < 2:
        return np.nan
    least = ((products - products.T) ** 2 / (squares[:, None] + squares)).sum() / 2
    noise, total = least * 2 * r / (r - 1), (products**2 / squares[:, None]).sum()
    return float(np.sqrt(noise / max(total - noise, 0.0)))
