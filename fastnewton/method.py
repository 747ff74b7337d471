"""The method of Arnold & Wang (2017), arXiv 1709.05069, equations (1) to (4): gram → spectrum → combine.

m workers hold parameters θ_k and gradients g_k.  G and Θ have the columns g_k − ḡ and θ_k − θ̄.  With K = GᵀG =
V diag(σ²) Vᵀ, b = Gᵀz, j = #{k ≤ m−1 : σ_k ≥ max(λσ_1, floor)} and c = V_j diag(σ_j⁻²) V_jᵀ b, equation (4) is

    H̄⁻¹z = z + (Θ − G)c

since every u_k = Gv_k/σ_k and y_k = Θv_k is a combination of columns; and equation (2) is θ_new = θ̄ − τH̄⁻¹ḡ.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fastnewton import arrays, checks
from fastnewton.arrays import Rows
from fastnewton.backends import backend, cpu
from fastnewton.decision import Gram, Spectrum, on_host
from fastnewton.diagnostics import Diagnostics, diagnosed
from fastnewton.kernels.record import GO
from fastnewton.results import NONFINITE, StepInfo
from fastnewton.safeguards import Safeguards, checked

PRECISE_CUTOFF = 1e-3  # smaller directions drown in the rounding of float32 products
SMALL_SQUARE = 2.0**-100  # a float32 product is off by 2⁻¹⁵⁰ and more, and a kept direction may have 1e-6 of σ_1²

ON_NONFINITE = ("raise", "drop", "propagate")
LR_CAPS = (None, "sigma", "curvature")
EXCHANGES = ("allgather", "sharded", "auto")  # over MPI


class NonFiniteError(ArithmeticError):
    """NaN or infinity where the step needs finite numbers.

    Attributes
    ----------
    workers : tuple of int
        The workers whose parameters or gradients are not finite; empty if finite input overflowed.
    """

    def __init__(self, message: str, workers: tuple[int, ...] = ()):
        super().__init__(message)
        self.workers = workers

    @classmethod
    def of(cls, workers: list[int]) -> "NonFiniteError":
        """The error that names these workers."""
        names = f"worker{'s' * (len(workers) > 1)} {', '.join(map(str, workers))}"
        return cls(f"the parameters or gradients of {names} are not finite", tuple(workers))

    @classmethod
    def overflow(cls) -> "NonFiniteError":
        """The error for finite input whose step is not finite."""
        return cls("overflow: thetas and grads are finite, but the step is not; scale the problem down")


@dataclass(frozen=True)
class Options:
    """The settings of a step, checked."""

    cutoff: float = 0.1
    max_rank: int | None = None
    lr_rest: float | None = None
    lr_cap: str | None = None
    nonfinite: str = "raise"
    safeguards: Safeguards | None = None

    @classmethod
    def checked(
        cls, cutoff: Any, max_rank: Any, lr_rest: Any, lr_cap: Any, nonfinite: Any, safeguards: Any = None
    ) -> "Options":
        """Options from what a caller gave; TypeError or ValueError names the argument."""
        try:
            found = _checked(cutoff, max_rank, lr_rest, lr_cap, nonfinite)
        except TypeError:  # what cannot be hashed is wrong, but not for that reason
            found = _checked.__wrapped__(cutoff, max_rank, lr_rest, lr_cap, nonfinite)
        # Equal safeguards count each for itself.
        return found if safeguards is None else dataclasses.replace(found, safeguards=checked(safeguards))

    def compute(self, dtype: str) -> str:
        """The type in which products are formed."""
        return compute_type(dtype, "float64" if self.cutoff < PRECISE_CUTOFF else None)

    @property
    def reads_thetas(self) -> bool:
        """Whether the Gram pass reads both arrays."""
        return self.lr_cap == "curvature" or self.safeguards is not None

    def least_square(self, products: str, m: int, n: int) -> float:
        """The σ_1² below which products of gradients in that type may have been rounded to zero."""
        return n * SMALL_SQUARE if products == "float32" and m > 1 and self.safeguards is None else 0.0

    def accepts(self, info: StepInfo, products: str, m: int, n: int) -> bool:
        """Whether a step with products in that type counts as it is."""
        if self.nonfinite == "propagate" and self.safeguards is None:
            return True
        return info.is_sound_from(self.least_square(products, m, n))

    def overflowed(self, info: StepInfo, finish: Callable[[StepInfo], None]) -> StepInfo:
        """What becomes of a step that is not finite though its input is: averaged SGD, or an error."""
        if self.safeguards is None:
            raise NonFiniteError.overflow()
        info = info.fallen_back(NONFINITE)
        finish(info)
        if self.nonfinite != "propagate" and not info.is_sound:
            raise NonFiniteError.overflow()
        return info

    def counted(self, info: StepInfo) -> StepInfo:
        """A step that was taken."""
        if self.safeguards is not None:
            self.safeguards.count(info)
        return info


@lru_cache(maxsize=64, typed=True)  # the same settings come step after step
def _checked(cutoff: Any, max_rank: Any, lr_rest: Any, lr_cap: Any, nonfinite: Any) -> Options:
    return Options(
        checks.fraction(cutoff, "cutoff"),
        checks.count(max_rank, "max_rank"),
        None if lr_rest is None else checks.real(lr_rest, "lr_rest"),
        checks.choice(lr_cap, "lr_cap", LR_CAPS),
        checks.choice(nonfinite, "nonfinite", ON_NONFINITE),
    )


def step(
    thetas: Any,
    grads: Any,
    *,
    lr: float,
    cutoff: float = 0.1,
    max_rank: int | None = None,
    lr_rest: float | None = None,
    lr_cap: str | None = None,
    nonfinite: str = "raise",
    safeguards: Safeguards | None = None,
    out: Any = None,
) -> tuple[Any, StepInfo]:
    """One quasi-Newton step from the workers' parameters and gradients.

    θ_new = θ̄ − τΘc − β(ḡ − Gc): equations (2) and (4) of Arnold & Wang (2017), arXiv 1709.05069, with a step length
    of its own on the complement.  With j = 0 this is averaged SGD, θ̄ − βḡ.

    Parameters
    ----------
    thetas, grads : array (m, n), or sequence of m arrays (n,)
        A row for each worker, 1 ≤ m ≤ 1024; float16, bfloat16, float32 or float64; of NumPy, CuPy, PyTorch, JAX or
        anything with `__dlpack__`, in CPU memory or on a CUDA device, both of one library, device, dtype and shape.
        Rows may be strided.  Never copied, never written.
    lr : float
        τ ≥ 0, in units of the parameters (1 is Newton's step).
    cutoff : float
        λ, 0 < λ < 1: directions with σ_k < λσ_1 are left as they are.  Below 1e-3 products are formed in float64.
    max_rank : int, optional
        At most this many directions; 0 is averaged SGD.
    lr_rest : float, optional
        β ≥ 0, the step length outside the kept directions; τ if None.
    lr_cap : {None, "sigma", "curvature"}
        Upper bound for τ: 1/σ_1, or the smallest ‖H̄⁻¹u‖ over unit u in the kept span, without directions v_k whose
        ‖Θv_k‖ is rounding (reads thetas once more).  None where no direction is kept.
    nonfinite : {"raise", "drop", "propagate"}
        What to do about NaN and infinity: an error, a step without those workers, or nothing.
    safeguards : Safeguards, optional
        When to distrust the step, and take averaged SGD instead.  Products are then formed in float64, in one pass over
        both arrays: (4m + 1)·n·itemsize bytes in all, not (3m + 1).  What overflows is averaged SGD, not an error.
    out : array (n,), optional
        Where to write the result: same library, device and dtype, contiguous, writable, apart from the inputs.

    Returns
    -------
    theta : array (n,)
        θ_new, of the caller's library and dtype; `out` itself if given.
    info : StepInfo

    Raises
    ------
    TypeError, ValueError
        Bad input, before anything is written.
    NonFiniteError
        Input that is not finite, or a step that overflows.  Where gradients and their products are finite, `out` is
        then undefined.
    RuntimeError
        Arrays on a CUDA device where CuPy, or the driver, is missing.

    Notes
    -----
    The bits are those of `gram`, `spectrum` and `combine`.  With gradients that are not float64, `gram` is repeated in
    float64 where products overflow or, σ_1² being below n·2⁻¹⁰⁰, may have underflowed; and `combine` where θ_new
    overflows.  "propagate" repeats nothing unless there are safeguards.

    On a CUDA device the work is enqueued on the stream that is current in the caller's library (for JAX and others, in
    CuPy).  Up to 64 workers "propagate" never waits, and with `out` it can be captured in a CUDA graph; "raise" and
    "drop" wait once, at the end.  With safeguards a step waits for the m × m matrices, and cannot be captured.
    """
    lr = checks.real(lr, "lr")
    options = Options.checked(cutoff, max_rank, lr_rest, lr_cap, nonfinite, safeguards)
    if (done := cpu.short_step(thetas, grads, lr, options, out)) is not None:
        return done
    first, second = arrays.pair(thetas, grads)
    with backend(first).context(first, second):
        target = arrays.output(out, first, (first, second))
        info = options.counted(step_rows(first, second, lr, options, target.rows))
        return target.export(), info


def apply_inverse(
    thetas: Any, grads: Any, z: Any, *, cutoff: float = 0.1, max_rank: int | None = None, out: Any = None
) -> Any:
    """The approximate inverse Hessian applied to a vector: H̄⁻¹z = z + (Θ − G)c, c = V_j diag(σ_j⁻²) V_jᵀ Gᵀz.

    Equation (4) of Arnold & Wang (2017), arXiv 1709.05069.  NaN and infinity propagate.

    Parameters
    ----------
    thetas, grads, cutoff, max_rank, out
        As in `step`.
    z : array (n,)
        Same library and dtype as grads.

    Returns
    -------
    array (n,)
        `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        Bad input, before anything is written.
    """
    options = Options.checked(cutoff, max_rank, None, None, "propagate")
    first, second = arrays.pair(thetas, grads)
    vector = arrays.vector(z, "z", second, "grads")
    compute, side = options.compute(second.dtype), backend(first)
    with side.context(first, second, vector):
        target = arrays.output(out, first, (first, second, vector))
        found = side.spectrum(side.gram(second, vector, None, compute), options.cutoff, options.max_rank)
        c = found.coefficients
        side.combine(first, second, c, tau=1.0, beta=1.0, z=vector, out=target.rows, compute=compute)
        return target.export()


def gram(grads: Any, z: Any = None, *, thetas: Any = None, precision: str | None = None) -> Gram:
    """Inner products of the centred gradients: K = GᵀG and b = Gᵀz, in one pass.

    Parameters
    ----------
    grads : array (m, n), or sequence of m arrays (n,)
        As in `step`.
    z : array (n,), optional
        The mean gradient ḡ if None.
    thetas : like grads, optional
        Adds ΘᵀΘ, ΘᵀG and Θᵀḡ.  K and b keep their bits.
    precision : {None, "float64"}
        None forms products of 16- and 32-bit data in float32, short sums in float32, long ones in float64.  Gradients
        below 1e-15 then lose digits, which `step` sees and repeats in float64.

    Returns
    -------
    Gram
        Its arrays are NumPy's or, for input on a CUDA device, CuPy's.  NaN and infinity propagate.

    Raises
    ------
    TypeError, ValueError
        Bad input.
    """
    second = arrays.rows(grads, "grads")
    compute = compute_type(second.dtype, checks.choice(precision, "precision", (None, "float64")))
    vector = None if z is None else arrays.vector(z, "z", second, "grads")
    first = None
    if thetas is not None:
        first = arrays.rows(thetas, "thetas")
        arrays.check_pair(first, second)
    given = [one for one in (second, vector, first) if one is not None]
    with backend(second).context(*given):
        return backend(second).gram(second, vector, first, compute)


def spectrum(gram: Gram, *, cutoff: float = 0.1, max_rank: int | None = None) -> Spectrum:
    """Leading singular directions of G from K, and the coefficients c = V_j diag(σ_j⁻²) V_jᵀ b.

    j = #{k ≤ m−1 : σ_k ≥ max(λσ_1, floor), σ_k > 0}, with floor = max(2·eps·‖ḡ‖, √(m·2⁻⁵²)·σ_1).

    Parameters
    ----------
    gram : Gram
    cutoff, max_rank
        As in `step`.

    Returns
    -------
    Spectrum
        Its arrays are of the kind of those in `gram`.  Rank 0, and NaN in all of them, if K is not finite.

    Raises
    ------
    TypeError, ValueError
        Bad input.
    """
    if not isinstance(gram, Gram):
        raise TypeError(f"gram must be a Gram, as fastnewton.gram returns it; got {type(gram).__name__}")
    where = arrays.check_gram(gram)
    with backend(where).context(where):
        return backend(where).spectrum(gram, checks.fraction(cutoff, "cutoff"), checks.count(max_rank, "max_rank"))


def diagnostics(gram: Gram, spectrum: Spectrum) -> Diagnostics:
    """Does a step follow curvature, or noise?  No pass over the arrays; on a CUDA device it waits for both arguments.

    Parameters
    ----------
    gram : Gram
        With the products of the parameters: `fastnewton.gram(grads, thetas=thetas)`.
    spectrum : Spectrum
        That of `gram`: `fastnewton.spectrum(gram, cutoff=…)`; its kept directions are looked at.

    Returns
    -------
    Diagnostics
        Its array is NumPy's.

    Raises
    ------
    TypeError, ValueError
        Other arguments, a Gram without the products of the parameters, or a Spectrum of another number of workers.
    """
    for value, kind in ((gram, Gram), (spectrum, Spectrum)):
        if not isinstance(value, kind):
            name = kind.__name__.lower()
            raise TypeError(
                f"{name} must be a {kind.__name__}, as fastnewton.{name} returns it; got {type(value).__name__}"
            )
    where = arrays.check_gram(gram)
    if gram.theta_matrix is None or gram.cross_matrix is None:
        raise ValueError("gram must hold the products of the parameters: fastnewton.gram(grads, thetas=thetas)")
    if spectrum.vectors.shape != gram.matrix.shape:
        raise ValueError(f"spectrum is of {spectrum.vectors.shape[0]} workers; gram is of {gram.matrix.shape[0]}")
    with backend(where).context(where):
        return diagnosed(on_host(gram), on_host(spectrum))


def combine(
    thetas: Any,
    grads: Any,
    coefficients: Any,
    *,
    lr: float,
    lr_rest: float | None = None,
    precision: str | None = None,
    out: Any = None,
) -> Any:
    """θ_new = θ̄ − τΘc − β(ḡ − Gc), in one pass; NaN and infinity propagate.

    Parameters
    ----------
    thetas, grads, lr, lr_rest, out
        As in `step`.
    coefficients : array (m,)
        c, float64 or float32, any library; only Cc matters, since Θ and G are centred.
    precision : {None, "float64"}
        As in `gram`.

    Returns
    -------
    array (n,)
        `out` itself if given.

    Raises
    ------
    TypeError, ValueError
        Bad input, before anything is written.
    """
    tau = checks.real(lr, "lr")
    beta = tau if lr_rest is None else checks.real(lr_rest, "lr_rest")
    first, second = arrays.pair(thetas, grads)
    compute = compute_type(first.dtype, checks.choice(precision, "precision", (None, "float64")))
    c = arrays.coefficients(coefficients, first)
    with backend(first).context(first, second):
        target = arrays.output(out, first, (first, second))
        backend(first).combine(first, second, c, tau=tau, beta=beta, z=None, out=target.rows, compute=compute)
        return target.export()


def compute_type(dtype: str, precision: str | None) -> str:
    """The type in which products of `dtype` values are formed."""
    return "float64" if dtype == "float64" or precision == "float64" else "float32"


def step_rows(thetas: Rows, grads: Rows, lr: float, options: Options, out: Rows) -> StepInfo:
    """The step on checked input, written to `out`."""
    side = backend(thetas)

    def of_others(workers: np.ndarray) -> StepInfo:
        return step_rows(thetas.only(workers), grads.only(workers), lr, options, out)

    return settled(
        options,
        np.arange(thetas.m),
        thetas,
        lambda products, sums: side.attempt(thetas, grads, lr, options, out, products=products, sums=sums),
        finish=lambda info: side.finish(thetas, grads, info, out, "float64"),
        nonfinite_workers=lambda: side.nonfinite_workers(thetas, grads),
        of_others=of_others,
    )


def settled(
    options: Options,
    workers: np.ndarray,
    like: Rows,
    attempt: Callable[[str, str], StepInfo],
    *,
    finish: Callable[[StepInfo], None],
    nonfinite_workers: Callable[[], list[int]],
    of_others: Callable[[np.ndarray], StepInfo],
) -> StepInfo:
    """The step of these workers that counts: attempts with products and sums in float64 where they overflow or
    underflow in float32, a step of the others where some are not finite, averaged SGD or an error if nothing helps."""
    products = sums = options.compute(like.dtype)
    while True:
        info = attempt(products, sums)
        if options.accepts(info, products, workers.size, like.n):
            return info
        if info.is_sound:
            products = "float64"
            continue
        if bad := nonfinite_workers():
            if options.nonfinite == "propagate":
                return info
            if options.nonfinite == "raise" or len(bad) == workers.size:
                raise NonFiniteError.of(bad)
            return dataclasses.replace(of_others(np.setdiff1d(workers, bad)), dropped=tuple(bad))
        if (products if info.status != GO else sums) == "float64":
            return options.overflowed(info, finish)
        products, sums = ("float64", sums) if info.status != GO else (products, "float64")
