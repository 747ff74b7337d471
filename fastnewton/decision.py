"""From the small matrices to j, c, τ and β on the CPU: everything of size m × m, in float64."""

from functools import lru_cache, partial
from typing import Any

import numpy as np

from fastnewton.diagnostics import diagnose
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cpu import spectrum as kernel
from fastnewton.kernels.record import CAPTURED, HEADER, RANK
from fastnewton.options import Options
from fastnewton.results import Diagnostics, Gram, Spectrum, StepInfo, record_size


def project(raw: Any, dtype: str) -> Gram:
    """Make a Gram of the kernels' sums: CKC and Cb are free of the rounding of ḡ along (1, …, 1)."""
    matrix, projection, norm2, floor = kernel.project(raw.products, raw.m, DTYPES[dtype].eps)
    if raw.of_thetas is None:
        return Gram(matrix, projection, norm2, floor)
    theta_matrix, _, _, theta_floor = kernel.project(raw.of_thetas, raw.m, DTYPES[dtype].eps)
    if raw.cross is None:
        return Gram(matrix, projection, norm2, floor, theta_matrix, None, theta_floor)
    cross = kernel.centre(raw.cross)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found in K
        along = raw.cross[:, -1] - raw.cross[:, -1].mean()
    return Gram(matrix, projection, norm2, floor, theta_matrix, cross, theta_floor, along)


def decide(gram: Gram, lr: float, options: Options) -> StepInfo:
    """Decide a step: the coefficients and step lengths that follow from the small matrices alone."""
    m = gram.projection.size
    record = np.empty(record_size(m))
    kernel.decide(gram, kernel.pack_settings(m, lr, options), record)
    return StepInfo(record, diagnose=None if options.safeguards is None else partial(_diagnose, gram, options))


def _diagnose(gram: Gram, options: Options) -> Diagnostics:
    return diagnose(gram, spectrum(gram, options.cutoff, options.max_rank))


def spectrum(gram: Gram, cutoff: float, max_rank: int | None) -> Spectrum:
    """Solve the eigenproblem of K for the rank j and the coefficients c; see `fastnewton.spectrum`."""
    m = gram.projection.size
    record = np.empty(record_size(m))
    vectors = kernel.decide(gram, _spectrum_settings(m, cutoff, max_rank), record)
    sigma, _, c = record[HEADER:].reshape(3, -1)
    return Spectrum(sigma, vectors, int(record[RANK]), c, float(record[CAPTURED]))


@lru_cache(maxsize=64)
def _spectrum_settings(m: int, cutoff: float, max_rank: int | None) -> np.ndarray:
    return kernel.pack_settings(m, 0.0, Options(cutoff, max_rank))
