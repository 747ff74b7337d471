"""What a step did, as it is kept in memory: float64 numbers before σ (m,) and c (m,); record.cuh is the same list."""

HEADER = 8
STATUS, RANK, LR, LR_REST, CAPTURED, SWEEPS, RESULT = range(7)
GO, NOT_FINITE, NOT_CONVERGED = range(3)  # what STATUS says of K
