"""Launch finite.cu: which rows hold a NaN or an infinity."""

from typing import Any

import numpy as np

from fastnewton.kernels.cuda import common, jit

_THREADS = 128
_MAX_BLOCKS = 1024  # per row


def finite_rows(rows: Any) -> Any:
    """Return whether each row is finite, (m,) int32 on the device."""
    finite = jit.cupy().ones(rows.m, np.int32)
    compute = "float64" if rows.dtype == "float64" else "float32"
    macros, shift = common.row_macros(rows, compute, THREADS=_THREADS)
    kernel = jit.kernel("finite.cu", "finite", **macros)
    blocks = min(-(-rows.n // (_THREADS * 16 // rows.itemsize)), _MAX_BLOCKS)
    if blocks:
        kernel((blocks, rows.m), (_THREADS,), (common.row_addresses(rows), np.int64(rows.n), shift, finite))
    return finite
