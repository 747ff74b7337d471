"""How far a result may be from the float64 reference, which sees the same stored numbers.

Every bound is a norm over all coordinates and the sum of three parts: what K's rounding does to the kept
directions, what `combine` rounds, and the rounding of the result to its dtype.
"""

import numpy as np
from reference import Inverse, Step, eps_of

# Half the distance between neighbours of the type that products are formed in.
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}

# Rounding of K relative to σ_1².  In float32 few terms are added before float64 takes over, so that signs
# average out over many sums: σ_k/σ_1 = 1e-3 is promised to 1 %, its square to 2 %, which is 2e-8.
GRAM_32_LONG, LONG = 2e-8, 8192
# Short arrays have few sums to average: √256 roundings of one, since there may be 256 terms in a narrow lane.
GRAM_32_SHORT = 2.0**-20
# Where ‖ḡ‖ ≫ σ_1 the differences g_k − ḡ have few bits: their sums round in ties of one sign, which no length
# averages out.
GRAM_32_COARSE, COARSE = 2.0**-23, 100

# float64: as many roundings as a row of K has terms, and the eigenproblem's own m roundings.
GRAM_64_PER_WORKER = 2.0**-52


def computed_in(dtype, precision=None) -> str:
    return "float64" if precision == "float64" or np.dtype(dtype) == np.float64 else "float32"


def gram_rounding(q, compute: str) -> float:
    """What may be wrong in K, relative to σ_1²."""
    if compute == "float64":
        return GRAM_64_PER_WORKER * (q.sigma.size + 2)
    if q.g_bar.size < LONG:
        return GRAM_32_SHORT
    return GRAM_32_COARSE if np.linalg.norm(q.g_bar) > COARSE * q.sigma[0] else GRAM_32_LONG


def of_inverse(reference: Inverse, dtype, compute: str) -> float:
    """Bound on ‖d − reference‖."""
    d_scale = np.linalg.norm(reference.z) + _sum_scale(reference, 1.0, 1.0)
    return _directions(reference, compute) + _combining(reference, d_scale, compute) + _storing(reference.d, dtype)


def of_step(reference: Step, dtype, compute: str) -> float:
    """Bound on ‖θ_new − reference‖."""
    inverse, q = reference.inverse, reference.q
    scale = np.linalg.norm(q.theta_bar) + reference.lr_rest * np.linalg.norm(q.g_bar)
    scale += _sum_scale(inverse, reference.lr, reference.lr_rest)
    both = reference.lr * _directions(inverse, compute, "theta")
    both += reference.lr_rest * _directions(inverse, compute, "grads")
    return both + _combining(inverse, scale, compute) + _storing(reference.theta_new, dtype)


def of_singular_value(q, k: int, compute: str) -> float:
    """Bound on |σ_k − reference|: half the relative error of its square, and the reference's own rounding."""
    of_the_reference = (q.sigma.size + 2) * 2.0**-52 * q.sigma[0]
    return gram_rounding(q, compute) * q.sigma[0] ** 2 / (2 * q.sigma[k]) + of_the_reference


def _directions(inverse: Inverse, compute: str, side: str = "both") -> float:
    """An error e in K moves 1/σ_k² by e/σ_k² and b_k = σ_kα_k by e·σ_1‖z‖."""
    q, total = inverse.q, 0.0
    rounding = gram_rounding(q, compute)
    for k in range(inverse.rank):
        ratio = q.sigma[k] / q.sigma[0]
        error = abs(inverse.alphas[k]) / ratio**2 + np.linalg.norm(inverse.z) / ratio
        length = {"theta": np.linalg.norm(q.p(k)), "grads": 1.0}
        length["both"] = length["theta"] + length["grads"]
        total += rounding * error * length[side]
    return total


def _sum_scale(inverse: Inverse, tau: float, beta: float) -> float:
    """Size of the sums Σ c_kθ_k and Σ c_kg_k where no two terms cancel, each taken relative to one row."""
    q = inverse.q
    if not q.g_bar.size:
        return 0.0
    weight = 1 + np.abs(inverse.coefficients).sum()
    spreads = [np.linalg.norm(columns, axis=0).max() for columns in (q.Theta, q.G)]
    return 3 * weight * (max(tau, 1) * spreads[0] + beta * spreads[1])


def _combining(inverse: Inverse, scale: float, compute: str) -> float:
    """2m + 2 roundings of independent sign, and their double."""
    return 2 * np.sqrt(2 * inverse.q.sigma.size + 2) * UNIT[compute] * scale


def _storing(result: np.ndarray, dtype) -> float:
    """Half an eps, twice, since what is rounded lies beside the reference; float16 also underflows."""
    smallest = 2.0**-24 if np.dtype(dtype) == np.float16 else 0.0
    return eps_of(dtype) * np.linalg.norm(result) + smallest * np.sqrt(result.size)
