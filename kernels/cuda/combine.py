"""Launch combine.cu: θ_new from all workers' parameters and gradients."""

from typing import Any

import numpy as np

from fastnewton.kernels.cuda import common, jit
from fastnewton.kernels.cuda.memory import address

_THREADS = 256


def combine(
    thetas: Any,
    grads: Any,
    c: Any,
    *,
    tau: float = 0.0,
    beta: float = 0.0,
    z: Any = None,
    out: Any,
    compute: str,
    record: Any = None,
    guarded: bool = False,
) -> None:
    """Write θ̄ − τΘc − β(ḡ − Gc), or z + (Θ − G)c, to `out`.

    c holds m weights, or 2m where those of G are others.  With a record, τ and β come from it, RESULT goes to it, and
    guarded, nothing is written unless its STATUS is GO.
    """
    if thetas.n == 0:
        return
    macros, shift = common.row_macros(thetas, compute, grads, z, WITH_Z=int(z is not None), THREADS=_THREADS)
    kernel = jit.kernel("combine.cu", "combine", **macros)
    blocks = jit.grid(kernel, _THREADS, 0, -(-thetas.n // (_THREADS * 16 // thetas.itemsize)))
    out_is_aligned = np.int32(address(out) % 16 == 0)
    arguments = (
        common.row_addresses(thetas), common.row_addresses(grads), address(z), address(out), np.int32(thetas.m),
        np.int64(thetas.n), shift, out_is_aligned, c, np.int32(c.size - thetas.m), np.float64(tau), np.float64(beta),
        record, np.int32(guarded),
    )  # fmt: skip
    kernel((blocks,), (_THREADS,), arguments)
