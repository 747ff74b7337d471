"""Arrays as messages: MPI's types for the dtypes, and counts that an older MPI cannot take."""

from functools import cache
from typing import Any

import numpy as np
from mpi4py import MPI

from fastnewton.dtypes import DTYPES

# From version 4 on the library takes larger counts itself.
LARGEST_COUNT = (1 << 63) - 1 if MPI.Get_version() >= (4, 0) else (1 << 31) - 1


def message(words: np.ndarray, dtype: str) -> list[Any]:
    """What mpi4py sends or receives: the values of an array."""
    return [words, *counted(words.size, dtype)]


@cache
def counted(count: int, dtype: str) -> tuple[int, MPI.Datatype]:
    """So many values of a dtype, as a count that the library takes and a type, possibly one of many values."""
    kind = getattr(MPI, DTYPES[dtype].mpi_name)
    if count <= LARGEST_COUNT:
        return count, kind
    pieces, rest = divmod(count, LARGEST_COUNT)
    piece = kind.Create_contiguous(LARGEST_COUNT)
    most, last = piece.Create_contiguous(pieces), kind.Create_contiguous(rest)
    starts = [0, pieces * LARGEST_COUNT * kind.Get_size()]
    whole = MPI.Datatype.Create_struct([1, 1], starts, [most, last]).Commit()
    for part in (piece, most, last):
        part.Free()
    return 1, whole
