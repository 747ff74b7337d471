"""Which side serves which device: the same function names on both."""

from types import ModuleType

from fastnewton.arrays import Rows
from fastnewton.backends import cpu, cuda


def backend(like: Rows) -> ModuleType:
    """The side that these arrays are on."""
    return cuda if like.device.kind == "cuda" else cpu
