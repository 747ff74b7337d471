"""The step as one would otherwise write it, and a reference that all are checked against.

Every peer takes the workers' arrays (m, n) and returns a function without arguments that does one step;
whatever can be done beforehand is done beforehand.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

import fastnewton as fn
from bench.ceilings import available_cores

LR, CUTOFF = 0.5, 0.1
CHUNK = 1 << 16  # coordinates that the reference holds in float64 at a time
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 4e-3}
TOLERANCE_OF_PEERS = 2e-2  # some add 2²⁵ numbers in float32; a wrong formula is wrong by 10 % and more

Prepare = Callable[[np.ndarray, np.ndarray], Callable[[], object]]


def workers(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and gradients in float32; much of the mean gradient lies along differences of workers."""
    rng = np.random.Generator(np.random.SFC64(seed))
    thetas, grads = rng.random((m, n), np.float32), rng.random((m, n), np.float32)
    toward = grads[0] - grads[-1]
    for row in grads:
        row -= np.float32(0.5)
        row += toward
    return thetas, grads


def reference(thetas: Any, grads: Any, xp: Any = np) -> Any:
    """θ_new in float64, chunk by chunk; xp is NumPy or CuPy."""
    m, n = grads.shape
    chunks = [slice(start, start + CHUNK) for start in range(0, n, CHUNK)]
    K, b = xp.zeros((m, m)), xp.zeros(m)
    for chunk in chunks:
        g = grads[:, chunk].astype(np.float64)
        g_bar = g.mean(0)
        G = g - g_bar
        K += G @ G.T
        b += G @ g_bar
    c = _coefficients(K, b, xp)
    theta_new = xp.empty(n)
    for chunk in chunks:
        theta, g = thetas[:, chunk].astype(np.float64), grads[:, chunk].astype(np.float64)
        theta_bar, g_bar = theta.mean(0), g.mean(0)
        theta_new[chunk] = theta_bar - LR * (g_bar + c @ (theta - theta_bar) - c @ (g - g_bar))
    return theta_new


def error(found: Any, expected: Any) -> float:
    """Distance from the reference, relative to its length."""
    difference = sum(
        float(((found[at : at + CHUNK].astype(np.float64) - expected[at : at + CHUNK]) ** 2).sum())
        for at in range(0, expected.size, CHUNK)
    )
    return float(np.sqrt(difference) / (expected**2).sum() ** 0.5)


def check(found: Any, thetas: Any, grads: Any) -> None:
    """ArithmeticError if the step is wrong."""
    off = error(np.asarray(found), reference(thetas, grads))
    if not off <= TOLERANCE[grads.dtype.name]:
        raise ArithmeticError(f"the step is wrong: its relative error is {off:.1e}, m = {len(grads)}")


def _coefficients(K: Any, b: Any, xp: Any = np) -> Any:
    """c = V_j diag(σ_j⁻²) V_jᵀ b, in float64."""
    sigma2, V = xp.linalg.eigh(K.astype(np.float64))
    keep = sigma2 >= CUTOFF**2 * sigma2[-1]
    return V[:, keep] @ ((V[:, keep].T @ b) / sigma2[keep])


def fastnewton(thetas: np.ndarray, grads: np.ndarray) -> Callable[[], np.ndarray]:
    """fn.step with out=."""
    out = np.empty(grads.shape[1], grads.dtype)
    return lambda: fn.step(thetas, grads, lr=LR, cutoff=CUTOFF, out=out)[0]


def numpy_literal(thetas: np.ndarray, grads: np.ndarray) -> Callable[[], np.ndarray]:
    """Equations (2) to (4) as they stand: the u_k and y_k are formed."""

    def step():
        theta_bar, g_bar = thetas.mean(0), grads.mean(0)
        Theta, G = (thetas - theta_bar).T, (grads - g_bar).T
        sigma2, V = np.linalg.eigh(G.T @ G)
        keep = sigma2 >= CUTOFF**2 * sigma2[-1]
        sigma, V = np.sqrt(sigma2[keep]), V[:, keep]
        U, Y = (G @ V) / sigma, Theta @ V
        alpha = U.T @ g_bar
        z_rest = g_bar - U @ alpha
        return theta_bar - np.asarray(LR, grads.dtype) * (z_rest + Y @ (alpha / sigma))

    return step


def scipy_anderson(thetas: np.ndarray, grads: np.ndarray) -> Callable[[], object]:
    """SciPy's Anderson mixing, from all centred rows but one, which the others determine; it has no cutoff."""
    from scipy.optimize._nonlin import Anderson

    def step():
        theta_bar, g_bar = thetas.mean(0), grads.mean(0)
        mixing = Anderson(alpha=-1, w0=0, M=len(grads) - 1)
        for theta, grad in zip(thetas[1:], grads[1:], strict=True):
            mixing._update(None, g_bar, theta - theta_bar, grad - g_bar, None, None)
        return theta_bar - np.asarray(LR, grads.dtype) * mixing.solve(g_bar)

    return step


def numpy_blas(thetas: np.ndarray, grads: np.ndarray) -> Callable[[], np.ndarray]:
    """Weights for the rows instead of vectors of length n, through BLAS."""
    return lambda: composed(thetas, grads, np)


def composed(theta: Any, grad: Any, xp: Any) -> Any:
    """Weights for the rows instead of vectors of length n; xp is NumPy or CuPy."""
    m, dtype = len(grad), grad.dtype
    g_bar = grad.mean(0)
    G = grad - g_bar
    c = _coefficients(G @ G.T, G @ g_bar, xp)
    c -= c.mean()
    return (1 / m - LR * c).astype(dtype) @ theta - (LR * (1 / m - c)).astype(dtype) @ grad


def torch_eager(thetas: np.ndarray, grads: np.ndarray) -> Callable[[], object]:
    """The same in PyTorch."""
    import torch

    torch.set_num_threads(available_cores())
    theta, grad = torch.from_numpy(thetas), torch.from_numpy(grads)
    return lambda: torch_composed(theta, grad)


def torch_compiled(thetas: np.ndarray, grads: np.ndarray) -> Callable[[], object]:
    """The same through torch.compile, on the CPU with a C++ compiler."""
    import torch

    torch.set_num_threads(available_cores())
    theta, grad, compiled = torch.from_numpy(thetas), torch.from_numpy(grads), _torch_compiled()
    return lambda: compiled(theta, grad)


@cache
def _torch_compiled() -> Callable:
    import torch

    return torch.compile(torch_composed, dynamic=True)  # once for all shapes of a dtype


def torch_composed(theta: Any, grad: Any) -> Any:
    """The same for tensors on any device."""
    import torch

    m = len(grad)
    g_bar = grad.mean(0)
    G = grad - g_bar
    K, b = (G @ G.T).double(), (G @ g_bar).double()
    sigma2, V = torch.linalg.eigh(K)
    inverse = torch.where(sigma2 >= CUTOFF**2 * sigma2[-1], 1 / sigma2, 0)
    c = V @ ((V.T @ b) * inverse)
    c = c - c.mean()
    return (1 / m - LR * c).to(grad.dtype) @ theta - (LR * (1 / m - c)).to(grad.dtype) @ grad


def jax_jit(thetas: np.ndarray, grads: np.ndarray) -> Callable[[], object]:
    """The same in JAX, compiled as a whole."""
    import jax

    with jax.enable_x64(grads.dtype == np.float64), jax.default_device(jax.devices("cpu")[0]):
        arrays = jax.numpy.asarray(thetas), jax.numpy.asarray(grads)
        run = _jax_compiled(*grads.shape, grads.dtype.name)
    return lambda: run(*arrays).block_until_ready()


@cache
def _jax_compiled(m: int, n: int, dtype: str) -> Callable:
    import jax

    rows = jax.ShapeDtypeStruct((m, n), dtype)
    return jax.jit(jax_composed).lower(rows, rows).compile()


def jax_composed(theta: Any, grad: Any) -> Any:
    """The same for JAX to compile."""
    import jax.numpy as jnp

    m = len(grad)
    g_bar = grad.mean(0)
    G = grad - g_bar
    sigma2, V = jnp.linalg.eigh(G @ G.T)
    inverse = jnp.where(sigma2 >= CUTOFF**2 * sigma2[-1], 1 / sigma2, 0)
    c = V @ ((V.T @ (G @ g_bar)) * inverse)
    c = c - c.mean()
    return (1 / m - LR * c) @ theta - (LR * (1 / m - c)) @ grad


ALL: dict[str, tuple[str, Prepare]] = {
    "NumPy, literal": ("numpy", numpy_literal),
    "NumPy, BLAS": ("numpy", numpy_blas),
    "SciPy, Anderson": ("scipy", scipy_anderson),
    "PyTorch": ("torch", torch_eager),
    "torch.compile": ("torch", torch_compiled),
    "JAX, jit": ("jax", jax_jit),
}


QUICK = ("NumPy, literal", "NumPy, BLAS", "PyTorch", "JAX, jit")  # without long compilation and long loops


def installed() -> dict[str, Prepare]:
    """The peers whose library can be imported."""
    return {name: prepare for name, (library, prepare) in ALL.items() if find_spec(library)}
