// finite: which workers' vectors hold a NaN or an infinity; only after a step has failed.
//
// Formula      found_k = 1 if all of row k is finite, else 0.
// Shapes       rows: m vectors of length n; found: (m,) int32, ones before the launch.
// Traffic      reads m·n·itemsize bytes once.
// Determinism  the only thing ever written is a zero.
// Launch       a row of blocks for each worker, at most 1,024: more than a device holds at once, since it is not timed.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    finite(const __grid_constant__ Rows rows, i64 n, int shift, int* found) {
  const Stored* row = rows.row[blockIdx.y];
  bool fine = true;
  for (i64 c = (i64(blockIdx.x) * THREADS + threadIdx.x) * GROUP; c < n; c += i64(gridDim.x) * THREADS * GROUP) {
    const Words words = load(row, c, n, shift);
#pragma unroll
    for (int v = 0; v < GROUP; ++v) fine &= isfinite(value(words, v)) != 0;
  }
  if (!fine) atomicExch(found + blockIdx.y, 0);
}
