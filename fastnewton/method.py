"""The method of Arnold & Wang (2017), arXiv 1709.05069, equations (1) to (4): gram → spectrum → combine.

m workers hold parameters θ_k and gradients g_k.  G and Θ have the columns g_k − ḡ and θ_k − θ̄.  With K = GᵀG =
V diag(σ²) Vᵀ, b = Gᵀz, j = #{k ≤ m−1 : σ_k ≥ max(λσ_1, floor)} and c = V_j diag(σ_j⁻²) V_jᵀ b, equation (4) is

    H̄⁻¹z = z + (Θ − G)c

since every u_k = Gv_k/σ_k and y_k = Θv_k is a combination of columns; and equation (2) is θ_new = θ̄ − τH̄⁻¹ḡ.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastnewton import arrays, checks
from fastnewton.arrays import Rows
from fastnewton.backends import backend, cpu
from fastnewton.diagnostics import diagnose
from fastnewton.kernels.record import GO, NONFINITE
from fastnewton.options import Options, check_precision, compute_type
from fastnewton.results import Diagnostics, Gram, Spectrum, StepInfo, to_host
from fastnewton.safeguards import Safeguards


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
    precision: str | None = None,
    safeguards: Safeguards | None = None,
    out: Any = None,
) -> tuple[Any, StepInfo]:
    """Take one quasi-Newton step from the workers' parameters and gradients.

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
    precision : {None, "float64"}
        As in `gram`; "float64" is implied by cutoff < 1e-3.
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
    options = Options.check(cutoff, max_rank, lr_rest, lr_cap, nonfinite, precision, safeguards)
    if (done := cpu.short_step(thetas, grads, lr, options, out)) is not None:
        return done
    first, second = arrays.pair(thetas, grads)
    with backend(first).context(first, second):
        target = arrays.output(out, first, (first, second))
        info = take_step(LocalSource(first, second, lr, options, target.rows), options)
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
    options = Options.check(cutoff, max_rank)
    first, second = arrays.pair(thetas, grads)
    vector = arrays.vector(z, "z", second, "grads")
    compute, side = options.compute(second.dtype), backend(first)
    with side.context(first, second, vector):
        target = arrays.output(out, first, (first, second, vector))
        spectrum = side.spectrum(side.gram(second, vector, None, compute), options.cutoff, options.max_rank)
        c = spectrum.coefficients
        side.combine_rows(first, second, c, tau=1.0, beta=1.0, z=vector, out=target.rows, compute=compute)
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
    first, second = (None, arrays.rows(grads, "grads")) if thetas is None else arrays.pair(thetas, grads)
    compute = compute_type(second.dtype, check_precision(precision))
    vector = None if z is None else arrays.vector(z, "z", second, "grads")
    rows = [one for one in (second, vector, first) if one is not None]
    with backend(second).context(*rows):
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
        return diagnose(to_host(gram), to_host(spectrum))


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
    compute = compute_type(first.dtype, check_precision(precision))
    c = arrays.coefficients(coefficients, first)
    with backend(first).context(first, second):
        target = arrays.output(out, first, (first, second))
        backend(first).combine_rows(first, second, c, tau=tau, beta=beta, z=None, out=target.rows, compute=compute)
        return target.export()


class Source(Protocol):
    """The rows of a step: where they come from, where the parts of K are added, and where θ_new goes."""

    @property
    def m(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def dtype(self) -> str: ...

    def fused(self, products: str, sums: str) -> StepInfo | None:
        """Take the step in one call of compiled code; None where there is none for it."""

    def gram(self, products: str) -> Gram | None:
        """Form K and b, and what else the options ask for, with products in that type; None where others decide."""

    def decide(self, gram: Gram | None) -> StepInfo:
        """Decide j, c, τ and β."""
        ...

    def combine(self, info: StepInfo, sums: str) -> None:
        """Write θ_new, and in the record whether it is finite; nothing if K is not finite, unless NaN propagates."""

    def nonfinite_workers(self) -> list[int]:
        """Return the workers whose parameters or gradients are not finite."""
        ...

    def without(self, workers: list[int]) -> "Source":
        """Return the same without these workers."""
        ...


def take_step(source: Source, options: Options) -> StepInfo:
    """Take the step that counts: in float64 where products or sums leave the range of float32, without the workers
    that are not finite, or averaged SGD."""
    products = sums = options.compute(source.dtype)
    while True:
        info = source.fused(products, sums)
        if info is None:
            info = source.decide(source.gram(products))
            source.combine(info, sums)
        if options.accepts(info, products, source.m, source.n):
            return info
        if info.is_finite:  # but products may have underflowed
            products = "float64"
        elif bad := source.nonfinite_workers():
            return _drop(source, bad, info, options)
        elif info.status != GO and products == "float32":
            products = "float64"
        elif info.status == GO and sums == "float32":
            sums = "float64"
        else:
            return _fall_back(source, info, options)


def _drop(source: Source, bad: list[int], info: StepInfo, options: Options) -> StepInfo:
    if options.propagates:
        return info
    if options.nonfinite == "raise" or len(bad) == source.m:
        raise NonFiniteError.of(bad)
    return dataclasses.replace(take_step(source.without(bad), options), dropped=tuple(bad))


def _fall_back(source: Source, info: StepInfo, options: Options) -> StepInfo:
    """Take averaged SGD in place of a step that overflows in float64 too."""
    if options.safeguards is None:
        raise NonFiniteError.overflow()
    info = info.fall_back(NONFINITE)
    source.combine(info, "float64")
    if not (options.propagates or info.is_finite):
        raise NonFiniteError.overflow()
    return info


@dataclass(frozen=True)
class LocalSource:
    """Rows in the memory of this process; θ_new is written to `out`."""

    thetas: Rows
    grads: Rows
    lr: float
    options: Options
    out: Rows

    @property
    def m(self) -> int:
        return self.grads.m

    @property
    def n(self) -> int:
        return self.grads.n

    @property
    def dtype(self) -> str:
        return self.grads.dtype

    def fused(self, products: str, sums: str) -> StepInfo | None:
        side = backend(self.grads)
        return side.fused(self.thetas, self.grads, self.lr, self.options, self.out, products=products, sums=sums)

    def gram(self, products: str) -> Gram:
        return backend(self.grads).step_gram(self.thetas, self.grads, self.options, products)

    def decide(self, gram: Gram | None) -> StepInfo:
        return backend(self.grads).decide(gram, self.lr, self.options)

    def combine(self, info: StepInfo, sums: str) -> None:
        if info.status == GO or self.options.propagates:
            backend(self.grads).combine(self.thetas, self.grads, info, out=self.out, compute=sums)

    def nonfinite_workers(self) -> list[int]:
        return backend(self.grads).nonfinite_workers(self.thetas, self.grads)

    def without(self, workers: list[int]) -> "LocalSource":
        left = np.setdiff1d(np.arange(self.m), workers)
        return dataclasses.replace(self, thetas=self.thetas.only(left), grads=self.grads.only(left))
