"""When a step is to be trusted: the settings; `kernels/cpu/safeguards.py` applies them to products of size m × m.

A step goes by s = θ̄ − θ_new = τΘp + β(ḡ − Gq), with p = q = c unless curvature says otherwise.  Its length and its
angle to ḡ follow from ΘᵀΘ, ΘᵀG, Θᵀḡ, K, b and ‖ḡ‖² alone:

    sᵀḡ = τ pᵀΘᵀḡ + β(‖ḡ‖² − qᵀb)
    ‖s‖² = τ² pᵀΘᵀΘp + 2τβ pᵀ(Θᵀḡ − ΘᵀGq) + β²(‖ḡ‖² − 2qᵀb + qᵀKq)

With A = V_jΣ_j⁻¹, U = GA is an orthonormal basis of the kept span, and M = ½(AᵀΘᵀGA + AᵀGᵀΘA) the inverse Hessian that
the workers saw in it.  Curvature has the sign of μ_i along Uw_i, where Mw_i = μ_iw_i.  The signs of v_kᵀΘᵀGv_k, M's
diagonal, would not do: M may be indefinite where all of them are positive.
"""

from dataclasses import dataclass

from fastnewton import checks
from fastnewton.kernels.record import CURVATURES


@dataclass(frozen=True)
class Safeguards:
    """When a step is to be trusted, and what is done otherwise; None leaves a guard out.

    A step that is not accepted becomes averaged SGD, θ̄ − fallback_lr·ḡ; `StepInfo.reason` says why.

    Attributes
    ----------
    min_cosine : float, optional
        0 ≤ min_cosine < 1: the least cosine of the angle between the step θ̄ − θ_new and ḡ; 0 means no ascent.
    max_coefficient : float, optional
        The largest |c_k|.
    curvature : {"drop", "abs", "keep"}
        What is done about kept directions along which the workers saw a curvature that is not positive: they are left
        to the complement, or their part of Newton's step is reversed, or nothing is done, as in the paper.
    max_newton_norm : float, optional
        The largest ‖τΘc‖, in units of the workers' spread ‖Θ‖_F/√m (the root mean square of ‖θ_k − θ̄‖): a longer Newton
        part is shortened to it, by τ.
    fallback_lr : float, optional
        The step length of averaged SGD; None is the smallest of τ, β and 1/(largest curvature that the workers saw),
        the bound of lr_cap="curvature".

    Raises
    ------
    TypeError, ValueError
        Bad arguments.
    """

    min_cosine: float | None = 0.01
    max_coefficient: float | None = 1e4
    curvature: str = "drop"
    max_newton_norm: float | None = 1e3
    fallback_lr: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_cosine", "max_coefficient", "max_newton_norm", "fallback_lr"):
            limit = getattr(self, name)
            object.__setattr__(self, name, None if limit is None else checks.real(limit, name))
        if self.min_cosine is not None and self.min_cosine >= 1:
            raise ValueError(f"min_cosine must be below 1; got {self.min_cosine!r}")
        checks.choice(self.curvature, "curvature", CURVATURES)
