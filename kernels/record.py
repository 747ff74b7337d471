"""Where numbers stand in what goes into a decision and in what comes out.

The record of a step is its header, then σ, the weights of Θ and c, (m,) each, all float64; record.cuh is the same list.
"""

HEADER = 9
STATUS, RANK, LR, LR_REST, CAPTURED, SWEEPS, RESULT, REASON, FALLBACK = range(HEADER)
GO, NOT_FINITE, NOT_CONVERGED = range(3)  # STATUS of the decision
ACCEPTED, CURVATURE, NEWTON_NORM, COEFFICIENT, COSINE, NONFINITE = range(6)  # REASON: what the safeguards did, and why

# Settings of a decision on the CPU, float64; NaN stands for None.
CUTOFF, MAX_RANK, GIVEN_LR, GIVEN_LR_REST, CAP, GUARDED, BEND = range(7)
MIN_COSINE, MAX_COEFFICIENT, MAX_NEWTON_NORM, FALLBACK_LR, SETTINGS = range(7, 12)
LR_CAPS = (None, "sigma", "curvature")
CURVATURES = ("keep", "drop", "abs")

# Its argument block: m, addresses of code and of arrays; 0 for what there is not.
M, SOLVER, GUARD, GRAM, PROJECTION, NORMS, THETA_GRAM, CROSS, ALONG, OPTIONS, RECORD, VECTORS, FIELDS = range(13)
NORM2, FLOOR, THETA_FLOOR, NORM_COUNT = range(4)
