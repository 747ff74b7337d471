"""Which side serves which device: the same function names on both."""

from types import ModuleType

from fastnewton.arrays import Rows
from fastnewton.backends import cpu, cuda
from fastnewton.kernels.cuda import memory


def backend(like: Rows) -> ModuleType:
    """The side that these arrays are on."""
    return cuda if like.device.kind == "cuda" else cpu


def clear_caches() -> None:
    """Release the memory kept between calls on CUDA devices; captured graphs write to it, and may not be replayed
    afterwards."""
    memory.release()
