"""The method of Arnold & Wang (2017), section 2, written out literally in float64 NumPy.

Rows of the inputs are workers, as in the package; G and Θ are n × m, as in the paper.  Nothing here is fast,
and nothing is shared with the package.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

EPS_64 = 2.0**-52


@dataclass(frozen=True)
class Quantities:
    """What the paper defines, by its own names; columns are workers or singular directions."""

    theta_bar: np.ndarray
    g_bar: np.ndarray
    Theta: np.ndarray
    G: np.ndarray
    sigma: np.ndarray  # (m,), descending, zeros where n < m
    V: np.ndarray  # (m, m)
    floor: float  # σ_k below it is rounding
    eps: float  # of the dtype that the gradients are stored in

    def rank(self, cutoff: float, max_rank: int | None = None) -> int:
        """j = #{k ≤ m−1 : σ_k ≥ max(λσ_1, floor), σ_k > 0}, and at most max_rank."""
        m = self.sigma.size
        least = max(cutoff * self.sigma[0], self.floor)
        j = sum(1 for sigma_k in self.sigma[: m - 1] if sigma_k >= least and sigma_k > 0)
        return j if max_rank is None else min(j, max_rank)

    def u(self, k: int) -> np.ndarray:
        return self.G @ self.V[:, k] / self.sigma[k]

    def y(self, k: int) -> np.ndarray:
        return self.Theta @ self.V[:, k]

    def p(self, k: int) -> np.ndarray:
        return self.y(k) / self.sigma[k]


@dataclass(frozen=True)
class Inverse:
    """Equation (4): d = z⊥ + Σ α_k σ_k⁻¹ y_k."""

    q: Quantities
    z: np.ndarray
    rank: int
    alphas: np.ndarray  # (j,)
    z_perp: np.ndarray
    in_span: np.ndarray  # Σ α_k σ_k⁻¹ y_k
    coefficients: np.ndarray  # (m,), Σ α_k σ_k⁻¹ v_k

    @property
    def d(self) -> np.ndarray:
        return self.z_perp + self.in_span


@dataclass(frozen=True)
class Step:
    """Equation (2), with the step β on the complement."""

    theta_new: np.ndarray
    inverse: Inverse  # applied to ḡ
    lr: float  # τ after its cap
    lr_rest: float  # β
    captured: float

    @property
    def q(self) -> Quantities:
        return self.inverse.q

    @property
    def rank(self) -> int:
        return self.inverse.rank


def eps_of(dtype) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


def as_float64(rows) -> np.ndarray:
    return np.array([np.asarray(row).astype(np.float64) for row in rows])


def quantities(grads, thetas=None) -> Quantities:
    """G, Θ and the singular value decomposition of G, from arrays as they are stored."""
    g = as_float64(grads)
    theta = g if thetas is None else as_float64(thetas)
    m, n = g.shape
    theta_bar, g_bar = theta.mean(0), g.mean(0)
    G, Theta = centred(g - g_bar).T, centred(theta - theta_bar).T
    sigma, V = np.zeros(m), np.eye(m)
    if n:
        _, found, Vh = np.linalg.svd(G, full_matrices=n < m)
        sigma[: found.size], V = found, Vh.T
    eps = eps_of(np.asarray(grads[0]).dtype)
    floor = max(2 * eps * np.linalg.norm(g_bar), np.sqrt(m * EPS_64) * sigma[0])
    return Quantities(theta_bar, g_bar, Theta, G, sigma, V, floor, eps)


def centred(rows: np.ndarray) -> np.ndarray:
    """Rows less what the rounding of a first mean has left in all of them."""
    return rows - rows.mean(0)


def inverse_of(q: Quantities, z, *, cutoff=0.1, max_rank=None) -> Inverse:
    j = q.rank(cutoff, max_rank)
    alphas = np.array([q.u(k) @ z for k in range(j)])
    z_perp, in_span, coefficients = z.copy(), np.zeros_like(z), np.zeros(q.sigma.size)
    for k in range(j):
        z_perp -= alphas[k] * q.u(k)
        in_span += alphas[k] / q.sigma[k] * q.y(k)
        coefficients += alphas[k] / q.sigma[k] * q.V[:, k]
    return Inverse(q, z, j, alphas, z_perp, in_span, coefficients)


def apply_inverse(thetas, grads, z, *, cutoff=0.1, max_rank=None) -> Inverse:
    z = np.asarray(z).astype(np.float64)
    return inverse_of(quantities(grads, thetas), z, cutoff=cutoff, max_rank=max_rank)


def step(thetas, grads, *, lr, cutoff=0.1, max_rank=None, lr_rest=None, lr_cap=None) -> Step:
    q = quantities(grads, thetas)
    inverse = inverse_of(q, q.g_bar, cutoff=cutoff, max_rank=max_rank)
    tau = capped(lr, lr_cap, q, inverse.rank)
    beta = tau if lr_rest is None else lr_rest
    theta_new = q.theta_bar - tau * inverse.in_span - beta * inverse.z_perp
    norm2 = q.g_bar @ q.g_bar
    captured = inverse.alphas @ inverse.alphas / norm2 if norm2 else 0.0
    return Step(theta_new, inverse, tau, beta, float(captured))


def capped(lr: float, lr_cap: str | None, q: Quantities, j: int) -> float:
    """τ after its cap: none where no direction is kept."""
    if lr_cap is None or j == 0:
        return lr
    if lr_cap == "sigma":
        return min(lr, 1 / q.sigma[0])
    theta_seen = 2 * q.eps * np.linalg.norm(q.theta_bar)
    P = [q.p(k) for k in range(j) if np.linalg.norm(q.y(k)) > theta_seen]
    return min(lr, np.linalg.svd(np.array(P), compute_uv=False)[-1]) if P else lr


def averaged_sgd(thetas, grads, beta: float) -> np.ndarray:
    return as_float64(thetas).mean(0) - beta * as_float64(grads).mean(0)
