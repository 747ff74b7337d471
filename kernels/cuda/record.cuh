// The numbers that a step leaves on the device for `info`, all float64: this header, then σ, the weights of Θ and
// c, m each.
#pragma once

enum Record {
  STATUS,    // GO, or what is wrong with K
  RANK,      // j
  LR,        // τ after the cap
  LR_REST,   // β
  CAPTURED,  // ‖U_jᵀz‖²/‖z‖²
  SWEEPS,    // of the eigenproblem
  RESULT,    // not zero if θ_new is not finite
  REASON,    // what safeguards found
  FALLBACK,  // the step length of averaged SGD in its place
  HEADER
};

enum Status { GO = 0, NOT_FINITE = 1, NOT_CONVERGED = 2 };

constexpr unsigned long long BROKEN = 0x3ff0000000000000ull;  // 1.0 in bits
