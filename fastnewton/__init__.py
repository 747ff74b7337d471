"""The distributed quasi-Newton step of Arnold & Wang (2017), arXiv 1709.05069, at the speed of memory."""

from fastnewton.backends import clear_caches
from fastnewton.config import show_config
from fastnewton.method import NonFiniteError, apply_inverse, combine, diagnostics, gram, spectrum, step
from fastnewton.results import Diagnostics, Gram, Spectrum, StepInfo
from fastnewton.safeguards import Safeguards

__version__ = "0.1.0"

__all__ = [
    "Diagnostics",
    "Gram",
    "NonFiniteError",
    "Safeguards",
    "Spectrum",
    "StepInfo",
    "apply_inverse",
    "clear_caches",
    "combine",
    "diagnostics",
    "gram",
    "show_config",
    "spectrum",
    "step",
]
