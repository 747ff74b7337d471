"""Workers' parameters and gradients with a known structure."""

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def ill_conditioned(rng, m, n, sigmas, mean_ratio=1.0, dtype=np.float64, *, scale=None):
    """(thetas, grads), each (m, n), with the singular values scale·sigmas of G (before they are stored).

    ‖ḡ‖ = mean_ratio·σ_1, half of its square in equal parts along the u_k, so that every direction counts.
    The p_k are orthogonal and 0.5 to 2 long: each direction moves θ_new as much as any other.  The default
    scale makes values of order 1.
    """
    r = len(sigmas)
    assert r <= min(m - 1, n)
    scale = np.sqrt(max(n, 1) * m) if scale is None else scale
    s = scale * np.asarray(sigmas, dtype=np.float64)
    U = orthonormal(rng, n, r)
    W = orthonormal(rng, m, r, but=np.ones(m))
    P = orthonormal(rng, n, r) * np.geomspace(0.5, 2, r) if r else np.zeros((n, 0))
    largest = s[0] if r else scale
    along, across = U.sum(1) / np.sqrt(max(r, 1)), rng.standard_normal(n)
    across -= U @ (U.T @ across)
    length = np.linalg.norm(across)
    across = across / length if n > r else np.zeros(n)
    g_bar = mean_ratio * largest * (along + across) / np.sqrt(2)
    theta_bar = rng.standard_normal(n) * largest / np.sqrt(max(n, 1))
    grads = g_bar + (W * s) @ U.T
    thetas = theta_bar + (W * s) @ P.T
    return thetas.astype(dtype), grads.astype(dtype)


def orthonormal(rng, n, r, but=None):
    """n × r, orthonormal columns, orthogonal to the vector `but`."""
    A = rng.standard_normal((n, r))
    if but is not None:
        A = np.column_stack([but, A])
    Q, _ = np.linalg.qr(A)
    return Q if but is None else Q[:, 1:]


def separated(m, n):
    """Singular values for m workers: one half to be kept at cutoff 0.1, the other half far below it."""
    r = min(m - 1, n)
    kept = (r + 1) // 2
    return np.concatenate([np.geomspace(1, 0.4, kept), np.geomspace(0.04, 0.01, r - kept)]) if r else np.zeros(0)


def workers(rng, m, n, dtype=np.float64, mean_ratio=0.5):
    """Well separated at the default cutoff, in any dtype."""
    return ill_conditioned(rng, m, n, separated(m, n), mean_ratio, dtype)


class Quadratic:
    """J(θ) = ½(θ − θ*)ᵀH(θ − θ*), with eigenvalues from 1/condition to 1."""

    def __init__(self, rng, n, condition=1e3):
        Q = orthonormal(rng, n, n)
        self.H = (Q * np.geomspace(1 / condition, 1, n)) @ Q.T
        self.minimiser = rng.standard_normal(n)

    def gradient(self, theta):
        return (theta - self.minimiser) @ self.H


class Logistic:
    """Two classes, an L2 term: J(w) = mean log(1 + exp(−y x·w)) + ½ l2 ‖w‖²."""

    def __init__(self, rng, n=20, samples=400, l2=1e-2):
        X, truth = rng.standard_normal((samples, n)), rng.standard_normal(n)
        y = np.where(X @ truth + 0.5 * rng.standard_normal(samples) > 0, 1.0, -1.0)
        self.signed, self.l2 = X * y[:, None], l2

    def gradient(self, w):
        weights = 1 / (1 + np.exp(self.signed @ w))
        return -(weights @ self.signed) / len(self.signed) + self.l2 * w

    def hessian(self, w):
        p = 1 / (1 + np.exp(self.signed @ w))
        return (self.signed.T * (p * (1 - p))) @ self.signed / len(self.signed) + self.l2 * np.eye(w.size)

    def minimiser(self):
        w = np.zeros(self.signed.shape[1])
        for _ in range(50):
            w = w - np.linalg.solve(self.hessian(w), self.gradient(w))
        return w
