"""Which kernels serve which device: the same function names on every side."""

from types import ModuleType

from fastnewton.arrays import Rows
from fastnewton.kernels import cpu


def kernels(like: Rows) -> ModuleType:
    """The module with `gram` and `combine` for arrays on this device."""
    return {"cpu": cpu}[like.device]
