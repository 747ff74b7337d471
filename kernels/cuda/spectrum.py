"""Launch spectrum.cu: σ, V, j, c and τ from K and b."""

import math
from typing import Any

import numpy as np

from fastnewton.kernels.cuda import jit, memory
from fastnewton.kernels.record import LR_CAPS

_BLOCK_THREADS = 256  # above 32 workers; more would spill registers


def launch_shape(m: int) -> tuple[int, int]:
    """Return the threads of the block, and its bytes of dynamic shared memory: packed triangle and vectors."""
    even = m + m % 2
    return 32 if m <= 32 else _BLOCK_THREADS, 8 * (even * (even + 1) // 2 + even * even)


def spectrum(gram: Any, lr: float, options: Any, record: Any, vectors: Any = None) -> None:
    """Write the record of a step with these options, and V (m, m) if given room; all arrays are on the device."""
    m = gram.projection.size
    threads, shared = launch_shape(m)
    kernel = jit.kernel(
        "spectrum.cu", "spectrum", shared, M=m, THREADS=threads, STORAGE="FLOAT64", COMPUTE="double", WIDTH=8, SHIFTED=0
    )
    max_rank = m if options.max_rank is None else min(m, options.max_rank)
    lr_rest = math.nan if options.lr_rest is None else options.lr_rest
    arguments = (
        gram.matrix, gram.projection, gram.norm2, gram.floor,
        gram.theta_matrix, None if gram.theta_matrix is None else gram.theta_floor,
        np.float64(options.cutoff), np.int32(max_rank), np.float64(lr), np.float64(lr_rest),
        np.int32(LR_CAPS.index(options.lr_cap)), record, vectors,
        memory.workspace("scratch", m * m) if options.lr_cap == "curvature" else None,
    )  # fmt: skip
    kernel((1,), (threads,), arguments, shared_mem=shared)
