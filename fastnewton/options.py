"""The settings of a step: names, defaults and checks, alike for `step`, over MPI, for the server and the optimizer."""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from fastnewton import checks
from fastnewton.kernels.record import GO, HEADER, LR_CAPS, RESULT, STATUS
from fastnewton.safeguards import Safeguards

NONFINITE_MODES = ("raise", "drop", "propagate")
PRECISIONS = (None, "float64")
EXCHANGES = ("allgather", "sharded", "auto")  # over MPI

PRECISE_CUTOFF = 1e-3  # smaller directions drown in the rounding of float32 products
SMALL_SQUARE = 2.0**-100  # a float32 product is off by 2⁻¹⁵⁰ and more, and a kept direction may have 1e-6 of σ_1²


@dataclass(frozen=True)
class Options:
    """The settings of a step beside its length, as `fastnewton.step` describes them; made by `check`."""

    cutoff: float = 0.1
    max_rank: int | None = None
    lr_rest: float | None = None
    lr_cap: str | None = None
    nonfinite: str = "raise"
    precision: str | None = None
    safeguards: Safeguards | None = None

    @classmethod
    def check(
        cls,
        cutoff: Any = 0.1,
        max_rank: Any = None,
        lr_rest: Any = None,
        lr_cap: Any = None,
        nonfinite: Any = "raise",
        precision: Any = None,
        safeguards: Any = None,
    ) -> "Options":
        """Make Options of what a caller gave; a TypeError or ValueError names the argument."""
        settings = cutoff, max_rank, lr_rest, lr_cap, nonfinite, precision, safeguards
        try:
            return _check(*settings)
        except TypeError:  # an unhashable setting is wrong, but not for that reason
            return _check.__wrapped__(*settings)

    def compute(self, dtype: str) -> str:
        """Return the type in which products are formed."""
        return compute_type(dtype, "float64" if self.cutoff < PRECISE_CUTOFF else self.precision)

    @property
    def reads_thetas(self) -> bool:
        """Whether the Gram pass reads both arrays."""
        return self.lr_cap == "curvature" or self.safeguards is not None

    def accepts(self, info: Any, products: str, m: int, n: int) -> bool:
        """Tell whether a step counts as it is: K and θ_new are finite, and products did not underflow."""
        if self.propagates and self.safeguards is None:
            return True
        record = info.read()
        if record[STATUS] != GO or record[RESULT] != 0:
            return False
        may_underflow = products == "float32" and m > 1 and self.safeguards is None
        return not (may_underflow and record[HEADER] ** 2 < n * SMALL_SQUARE)

    @property
    def propagates(self) -> bool:
        """Whether a step is taken though K is not finite."""
        return self.nonfinite == "propagate"


@lru_cache(maxsize=64, typed=True)  # the same settings come step after step
def _check(
    cutoff: Any, max_rank: Any, lr_rest: Any, lr_cap: Any, nonfinite: Any, precision: Any, safeguards: Any
) -> Options:
    if safeguards is not None and not isinstance(safeguards, Safeguards):
        raise TypeError(f"safeguards must be a fastnewton.Safeguards or None; got {type(safeguards).__name__}")
    if type(safeguards) not in (Safeguards, type(None)):  # a subclass need not be hashable
        safeguards = Safeguards(**{one.name: getattr(safeguards, one.name) for one in fields(Safeguards)})
    return Options(
        checks.fraction(cutoff, "cutoff"),
        checks.count(max_rank, "max_rank"),
        None if lr_rest is None else checks.real(lr_rest, "lr_rest"),
        checks.choice(lr_cap, "lr_cap", LR_CAPS),
        checks.choice(nonfinite, "nonfinite", NONFINITE_MODES),
        check_precision(precision),
        safeguards,
    )


def check_precision(precision: Any) -> str | None:
    """Return the precision of products that a caller gave."""
    return checks.choice(precision, "precision", PRECISIONS)


def compute_type(dtype: str, precision: str | None) -> str:
    """Return the type in which products of `dtype` values are formed."""
    return "float64" if dtype == "float64" or precision == "float64" else "float32"
