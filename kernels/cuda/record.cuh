// The record of a step, all float64: this header, then σ, the weights of Θ, and c, m values each; record.py names the
// same fields.
#pragma once

enum Record {
  STATUS,    // GO, or why K is not used
  RANK,      // j
  LR,        // τ after the cap
  LR_REST,   // β
  CAPTURED,  // ‖U_jᵀz‖²/‖z‖²
  SWEEPS,    // Jacobi sweeps
  RESULT,    // nonzero if θ_new is not finite
  REASON,    // outcome of the safeguards
  FALLBACK,  // step length of averaged SGD, should the step be refused
  HEADER     // length of the header
};

enum Status { GO, NOT_FINITE, NOT_CONVERGED };

constexpr unsigned long long ONE_BITS = 0x3ff0000000000000ull;  // 1.0: RESULT is set by an integer atomic
