// finite: which rows hold a NaN or an infinity; launched only after a step has failed.
//
// Formula      finite_k = 1 if all of row k is finite, else 0.
// Shapes       rows: m vectors of length n; finite: (m,) int32, ones before the launch.
// Traffic      reads m·n·itemsize bytes once.
// Determinism  the only value ever written is 0.
// Launch       grid (blocks, m), grid-stride over coordinates; at most 1,024 blocks per row, since it is not timed.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    finite(const __grid_constant__ Rows rows, i64 n, int shift, int* row_is_finite) {
  const Stored* row = rows.row[blockIdx.y];
  bool all_finite = true;
  for (i64 c = (i64(blockIdx.x) * THREADS + threadIdx.x) * ITEMS; c < n; c += i64(gridDim.x) * THREADS * ITEMS) {
    const Vector vector = load(row, c, n, shift);
#pragma unroll
    for (int v = 0; v < ITEMS; ++v) all_finite &= isfinite(value(vector, v)) != 0;
  }
  if (!all_finite) atomicExch(row_is_finite + blockIdx.y, 0);
}
