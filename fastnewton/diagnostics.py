"""Does a step follow curvature, or noise?  Figures from the m × m products, before the step is taken."""

import numpy as np

from fastnewton.results import Diagnostics, Gram, Spectrum


def diagnose(gram: Gram, spectrum: Spectrum) -> Diagnostics:
    """Compute the figures from a Gram with the products of the parameters and its Spectrum, in NumPy arrays."""
    sigma, of_thetas, cross = spectrum.singular_values[: spectrum.rank], gram.theta_matrix, gram.cross_matrix
    kept = spectrum.vectors[:, : spectrum.rank]
    scale, theta_scale = (np.abs(products).max() or 1.0 for products in (cross, of_thetas))
    with np.errstate(all="ignore"):  # what is not known is NaN, and what did not move infinite
        seen = kept.T @ (cross / scale) @ kept
        asymmetry = np.linalg.norm(seen - seen.T) / np.linalg.norm(seen + seen.T) if len(seen) > 1 else np.nan
        curvatures = sigma / np.sqrt(np.maximum(np.einsum("ak,ab,bk->k", kept, of_thetas, kept), 0.0))
        noise = _noise_to_secant(of_thetas / theta_scale, cross / scale, gram.theta_floor / np.sqrt(theta_scale))
        return Diagnostics(float(spectrum.captured), float(asymmetry), noise, curvatures)


def _noise_to_secant(of_thetas: np.ndarray, cross: np.ndarray, floor: float) -> float:
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
