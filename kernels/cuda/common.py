"""The macros and arguments of common.cuh: types, alignment, and where the workers' rows begin."""

from typing import Any

import numpy as np

from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cuda import jit

WORKER_LIMIT = 64  # kernels are compiled for each m up to it; beyond, a BLAS multiplies and the host decides


def row_macros(rows: Any, compute: str, *vectors: Any, **macros: object) -> tuple[dict[str, Any], np.int32]:
    """Return the macros of a kernel that reads these rows and other vectors (or None), and its argument `shift`."""
    tables = [rows.table, *(vector.table for vector in vectors if vector is not None)]
    width, shifted, shift = alignment(np.concatenate(tables))
    common = {
        "STORAGE": DTYPES[rows.dtype].macro,
        "COMPUTE": DTYPES[compute].c_name,
        "M": rows.m if rows.m <= WORKER_LIMIT else 0,
        "WIDTH": width,
        "SHIFTED": shifted,
    }
    return common | macros, np.int32(shift)


def alignment(addresses: np.ndarray) -> tuple[int, int, int]:
    """Return WIDTH, SHIFTED and `shift`: 16-byte loads where all rows are alike modulo 16, else the widest load that
    suits every row."""
    offsets = addresses % 16
    if (offsets == offsets[0]).all():
        return 16, int(offsets[0] > 0), int(offsets[0])
    all_bits = int(np.bitwise_or.reduce(offsets))
    return all_bits & -all_bits, 0, 0


def row_addresses(rows: Any) -> Any:
    """Return the argument `Rows`: by value, or in device memory where there are too many."""
    if rows.m <= WORKER_LIMIT:
        return np.void(rows.table.astype(np.uint64).tobytes())  # CuPy takes no array of more than one item by value
    return jit.cupy().asarray(rows.table.astype(np.uint64))
