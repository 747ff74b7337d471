"""Arrays as messages: MPI's types for the dtypes, and counts that an older MPI cannot take."""

from functools import cache
from typing import Any

import numpy as np
from mpi4py import MPI

from fastnewton.dtypes import DTYPES

# From version 4 on the library takes larger counts itself.
LARGEST_COUNT = (1 << 63) - 1 if MPI.Get_version() >= (4, 0) else (1 << 31) - 1


def message(raw_bits: np.ndarray, dtype: str) -> list[Any]:
    """Describe an array to mpi4py, to be sent or received."""
    return [raw_bits, *count_and_type(raw_bits.size, dtype)]


@cache
def count_and_type(count: int, dtype: str) -> tuple[int, MPI.Datatype]:
    """Express so many values of a dtype by a count that the library takes and a type, possibly one of many values."""
    single = getattr(MPI, DTYPES[dtype].mpi_name)
    if count <= LARGEST_COUNT:
        return count, single
    pieces, rest = divmod(count, LARGEST_COUNT)
    piece = single.Create_contiguous(LARGEST_COUNT)
    most, last = piece.Create_contiguous(pieces), single.Create_contiguous(rest)
    starts = [0, pieces * LARGEST_COUNT * single.Get_size()]
    whole = MPI.Datatype.Create_struct([1, 1], starts, [most, last]).Commit()
    for part in (piece, most, last):
        part.Free()
    return 1, whole
