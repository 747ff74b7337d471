// combine: the new parameters from all workers' parameters and gradients, in one pass.
//
// Formula      θ_new = θ̄ − τΘc − β(ḡ − Gc), or z + (Θ − G)c with z given.  c sums to zero, so row 0 can be the origin:
//                  θ_new = θ_0 − βg_0 + Σ_k p_k(θ_k − θ_0) + q_k(g_k − g_0),  p_k = 1/m − τc_k,  q_k = −β(1/m − c_k)
//              and rounding is relative to the spread of the workers, not to θ.
// Shapes       thetas, grads: m vectors of length n; z, out: vectors of length n; c: (m,) float64; what G is multiplied
//              with begins `second` numbers later.
// Traffic      reads 2m·n·itemsize bytes once (and z), writes n·itemsize.
// Determinism  each coordinate is on its own: its bits depend on nothing else.
// Launch       as many blocks as the device holds at once, AT_ONCE of them on a multiprocessor, so that registers hold
//              several loads of 16 bytes a thread; the last coordinates come first, because the end of the gradients is what
//              `gram` has left in the L2 cache.
//
// τ, β and the verdict on K come from `record`, which spectrum.cu wrote, or from the launch where there is none.
#include "common.cuh"
#include "record.cuh"

#ifndef WITH_Z
#define WITH_Z 0
#endif

constexpr int WEIGHTS = M ? M : 1024;
// Items of two bytes that are loaded one by one, and a loop over the workers, take more registers.
constexpr int AT_ONCE = WIDTH == 2 ? 1 : GROUP * sizeof(Real) > 32 || (GROUP == 8 && M == 0) ? 2 : 3;

// The first warp turns c into p and q, once c has been made to sum to zero.
__device__ __forceinline__ void weigh(const double* c, int second, double tau, double beta, int m, Real* p, Real* q) {
  double sum = 0, sum_of_grads = 0;
  for (int k = threadIdx.x; k < m; k += 32) {
    sum += c[k];
    sum_of_grads += c[second + k];
  }
  const double mean = warp_sum(sum) / m, mean_of_grads = warp_sum(sum_of_grads) / m;
  for (int k = threadIdx.x; k < m; k += 32) {
    const double of_theta = c[k] - mean, of_grad = c[second + k] - mean_of_grads;
    p[k] = Real(WITH_Z ? of_theta : 1.0 / m - tau * of_theta);
    q[k] = Real(WITH_Z ? -of_grad : beta * (of_grad - 1.0 / m));
  }
}

__device__ __forceinline__ void add(Real (&sums)[GROUP], Real weight, const Words& row, const Words& origin) {
#pragma unroll
  for (int v = 0; v < GROUP; ++v) sums[v] += weight * (value(row, v) - value(origin, v));
}

// Returns false if a value is not finite.
__device__ __forceinline__ bool store(const Real (&sums)[GROUP], Stored* out, i64 c, i64 n, int wide) {
  Stored values[GROUP];
  bool finite = true;
#pragma unroll
  for (int v = 0; v < GROUP; ++v) {
    values[v] = rounded(sums[v]);
    finite &= is_finite(values[v]) || c + v >= n;
  }
  if (wide && c + GROUP <= n) {
    const Words words = put_together(values);
    *reinterpret_cast<uint4*>(out + c) = make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
  } else {
#pragma unroll
    for (int v = 0; v < GROUP; ++v)
      if (c + v < n) out[c + v] = values[v];
  }
  return finite;
}

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE)
    combine(const __grid_constant__ Rows thetas, const __grid_constant__ Rows grads, const Stored* z, Stored* out,
            int m, i64 n, int shift, int wide, const double* c, int second, double tau, double beta, double* record,
            int guarded) {
  if (guarded && record[STATUS] != GO) return;
  FN_SHARED(Real, p, [WEIGHTS]);
  FN_SHARED(Real, q, [WEIGHTS]);
  const double step = record ? record[LR] : tau, rest = record ? record[LR_REST] : beta;
  const int workers = M ? M : m;
  if (threadIdx.x < 32) weigh(c, second, step, rest, workers, p, q);
  __syncthreads();
  bool finite = true;
  const i64 stretch = i64(THREADS) * GROUP, stretches = (n + stretch - 1) / stretch;
  for (i64 s = stretches - 1 - blockIdx.x; s >= 0; s -= gridDim.x) {
    const i64 at = s * stretch + threadIdx.x * GROUP;
    if (at >= n) continue;
    const Words theta = load(thetas.row[0], at, n, shift), grad = load(grads.row[0], at, n, shift);
    Real sums[GROUP];
    const Words base = WITH_Z ? load(z, at, n, shift) : theta;
#pragma unroll
    for (int v = 0; v < GROUP; ++v) sums[v] = value(base, v) - (WITH_Z ? Real(0) : Real(rest) * value(grad, v));
    if (WITH_Z && M == 1) {  // no difference to carry a NaN of the only worker
      add(sums, Real(1), theta, theta);
      add(sums, Real(1), grad, grad);
    }
#pragma unroll(M && M <= 16 ? M : 8)
    for (int k = 1; k < workers; ++k) {
      add(sums, p[k], load(thetas.row[k], at, n, shift), theta);
      add(sums, q[k], load(grads.row[k], at, n, shift), grad);
    }
    finite &= store(sums, out, at, n, wide);
  }
  if (!finite && record) atomicExch(reinterpret_cast<unsigned long long*>(record + RESULT), BROKEN);
}
