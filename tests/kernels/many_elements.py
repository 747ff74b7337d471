"""A step of more than 2³¹ elements against NumPy, in a process of its own, since it holds 9 GB.

Four overlapping rows of one buffer, so that memory holds two of them: 4.3 GB each.
"""

import numpy as np

import fastnewton as fn


def main():
    n, rng = 2**31 + 1029, np.random.default_rng(5)
    period = rng.standard_normal(1_000_003).astype(np.float16)  # prime: no block of coordinates repeats
    buffer = np.empty(n + 3, np.float16)
    for start in range(0, buffer.size, period.size):
        piece = buffer[start : start + period.size]
        piece[:] = period[: piece.size]
    thetas, grads = [buffer[:n], buffer[1 : n + 1]], [buffer[2 : n + 2], buffer[3 : n + 3]]
    theta, info = fn.step(thetas, grads, lr=0.5, lr_rest=0.25)

    K, b, norm2 = np.zeros((2, 2)), np.zeros(2), 0.0
    for start in range(0, n, 2**24):
        g = np.array([row[start : start + 2**24] for row in grads], dtype=np.float64)
        g_bar = g.mean(0)
        G = g - g_bar
        K, b, norm2 = K + G @ G.T, b + G @ g_bar, norm2 + g_bar @ g_bar
    sigma = np.sqrt(np.linalg.eigvalsh(K)[-1])
    v = np.array([1, -1]) / np.sqrt(2)
    c = v * (v @ b) / sigma**2
    assert info.rank == 1
    assert abs(info.singular_values[0] - sigma) <= 1e-6 * sigma
    # Signs cancel in b: its rounding is relative to σ_1‖ḡ‖, averaged over n terms.
    assert abs(info.coefficients - c).max() <= 1e-6 * np.sqrt(norm2) / sigma

    for start in (0, 2**30 - 512, 2**31 - 512, n - 1024):
        t, g = (np.array([row[start : start + 1024] for row in rows], dtype=np.float64) for rows in (thetas, grads))
        t_bar, g_bar = t.mean(0), g.mean(0)
        expected = t_bar - 0.5 * (info.coefficients @ (t - t_bar)) - 0.25 * (g_bar - info.coefficients @ (g - g_bar))
        assert abs(theta[start : start + 1024] - expected).max() <= 2.0**-10 * abs(expected).max()


if __name__ == "__main__":
    main()
