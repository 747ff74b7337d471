"""Describe where vectors lie in memory: devices, the layout of one array, and the rows of m workers."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastnewton.dtypes import DTYPES


class Device(NamedTuple):
    """A kind of device, "cpu" or "cuda", and its number."""

    kind: str
    index: int = 0  # pyright: ignore[reportIncompatibleMethodOverride]  (of tuple.index, which nobody needs)

    def __str__(self) -> str:
        return self.kind if self == CPU else f"{self.kind}:{self.index}"


CPU = Device("cpu")


class Layout(NamedTuple):
    """How a caller's array lies in memory."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: str
    library: str
    owner: Any  # on the CPU a NumPy array that views the memory, elsewhere whatever keeps it alive
    device: Device = CPU
    stream: int = 0  # of the caller's library, on a CUDA device


class Rows(NamedTuple):
    """m vectors of length n: their addresses, and what keeps the memory alive."""

    table: np.ndarray  # (m,) int64 addresses
    n: int
    dtype: str
    library: str
    owner: Any  # keeps the memory alive; on the CPU owner[k] is a NumPy array that views row k, perhaps as raw bits
    device: Device = CPU
    stream: int = 0

    @property
    def m(self) -> int:
        return self.table.size

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.table.size * self.n * self.itemsize

    @property
    def raw_bits(self) -> np.ndarray:
        """View the first row in CPU memory as words that MPI can send."""
        return self.owner[0].view(DTYPES[self.dtype].word)

    def only(self, workers: np.ndarray) -> "Rows":
        """Select the rows of these workers."""
        owner = [self.owner[k] for k in workers] if self.device.kind == "cpu" else self.owner
        return self._replace(table=self.table[workers], owner=owner)

    def part(self, start: int, count: int) -> "Rows":
        """Select coordinates start … start + count − 1 of every row."""
        owner = [row[start : start + count] for row in self.owner] if self.device.kind == "cpu" else self.owner
        return self._replace(table=self.table + start * self.itemsize, n=count, owner=owner)


class Output(NamedTuple):
    """Memory for the result, and the function that makes the caller's kind of array of it."""

    rows: Rows
    export: Callable[[], Any]


@lru_cache(maxsize=256)  # the same arrays come step after step
def row_addresses(start: int, stride: int, m: int) -> np.ndarray:
    """Compute the addresses of m rows; shared between calls, so never written to."""
    return start + stride * np.arange(m)
