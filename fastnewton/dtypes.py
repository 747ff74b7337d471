"""Name the four dtypes of vectors as NumPy, C, CUDA, MPI and DLPack do."""

import importlib
from typing import NamedTuple

import numpy as np


class DType(NamedTuple):
    """A storage type; 16-bit values travel and rest as raw bits, since neither C nor MPI knows them."""

    name: str
    itemsize: int
    eps: float  # spacing of the values from 1 on
    c_name: str
    word: np.dtype  # NumPy's, for the raw bits
    mpi_name: str  # of the word
    macro: str  # STORAGE of the CUDA kernels
    dlpack: tuple[int, int]  # type code and bits

    def numpy(self) -> np.dtype:
        """Look up NumPy's dtype; that of bfloat16 is made by ml_dtypes, which its arrays come with."""
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if self.name == "bfloat16" else self.name)


_UINT16, _FLOAT, _DOUBLE = np.dtype(np.uint16), np.dtype(np.float32), np.dtype(np.float64)

DTYPES = {
    "float16": DType("float16", 2, 2.0**-10, "unsigned short", _UINT16, "UINT16_T", "FLOAT16", (2, 16)),
    "bfloat16": DType("bfloat16", 2, 2.0**-7, "unsigned short", _UINT16, "UINT16_T", "BFLOAT16", (4, 16)),
    "float32": DType("float32", 4, 2.0**-23, "float", _FLOAT, "FLOAT", "FLOAT32", (2, 32)),
    "float64": DType("float64", 8, 2.0**-52, "double", _DOUBLE, "DOUBLE", "FLOAT64", (2, 64)),
}
