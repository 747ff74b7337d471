"""Record the rows that the CPU backend hands to its kernels: their bytes, and their addresses, which tell a copy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import isfunction, signature
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from fastnewton.arrays import Rows
from fastnewton.backends import cpu

ARGUMENTS = ("thetas", "grads", "z", "out")


class Call(NamedTuple):
    """A call of a kernel, by its module, with the rows that it reads and writes, by argument."""

    kernel: str
    rows: dict[str, Rows | np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())

    @property
    def addresses(self) -> dict[str, tuple[int, ...]]:
        """The address of each row."""
        return {name: _addresses(rows) for name, rows in self.rows.items()}


@contextmanager
def record_kernel_calls() -> Iterator[list[Call]]:
    """Yield a list of the calls that the CPU backend makes inside the block."""
    calls: list[Call] = []
    kernels = {
        name: _Recorder(module, calls)
        for name, module in vars(cpu).items()
        if isinstance(module, ModuleType) and module.__name__.startswith("fastnewton.kernels.cpu.")
    }
    with mock.patch.dict(vars(cpu), kernels):
        yield calls


class _Recorder:
    """Stands in for a module of kernels."""

    def __init__(self, module: ModuleType, calls: list[Call]):
        self._module, self._calls = module, calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return self._recorded(value) if isfunction(value) else value

    def _recorded(self, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature(function).bind(*args, **kwargs).arguments
            rows = {name: given[name] for name in ARGUMENTS if given.get(name) is not None}
            if rows:
                self._calls.append(Call(self._module.__name__.rpartition(".")[2], rows))
            return function(*args, **kwargs)

        return call


def _addresses(rows: Rows | np.ndarray) -> tuple[int, ...]:
    if isinstance(rows, Rows):
        return tuple(rows.table.tolist())
    return tuple(row.ctypes.data for row in np.atleast_2d(rows))
