"""What a step did, as it is kept in memory: float64 numbers before σ, the weights of Θ and c, (m,) each.

record.cuh is the same list.
"""

HEADER = 9
STATUS, RANK, LR, LR_REST, CAPTURED, SWEEPS, RESULT, REASON, FALLBACK = range(HEADER)
GO, NOT_FINITE, NOT_CONVERGED = range(3)  # what STATUS says of K
