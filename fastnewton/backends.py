"""Which side serves which device: the same function names on both."""

from types import ModuleType

from fastnewton import device, host
from fastnewton.arrays import Rows


def backend(like: Rows) -> ModuleType:
    """The side that these arrays are on."""
    return device if like.device.startswith("cuda") else host
