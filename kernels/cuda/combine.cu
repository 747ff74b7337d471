// combine: the new parameters, from all workers' parameters and gradients in one pass.
//
// Formula      θ_new = θ̄ − τΘc − β(ḡ − Gc), or z + (Θ − G)c with WITH_Z.  c sums to zero, so row 0 can be the origin:
//                  θ_new = θ_0 − βg_0 + Σ_k p_k(θ_k − θ_0) + q_k(g_k − g_0),  p_k = 1/m − τc_k,  q_k = −β(1/m − c_k)
//              and rounding is relative to the spread of the workers, not to θ.
// Shapes       thetas, grads: m rows of length n; z, out: (n,); c: (m,) float64, the weights of Θ; those of G begin
//              `second` values later.
// Traffic      reads 2m·n·itemsize bytes once (and z), writes n·itemsize.
// Determinism  each coordinate depends on its own values alone.
// Launch       grid-stride with as many blocks as are resident at once; the register budget of MIN_BLOCKS blocks per
//              multiprocessor keeps several 16-byte loads per thread in flight.  Tiles in descending order: the end of
//              grads is what `gram` left in the L2 cache.
//
// τ, β and K's status come from `record`, which spectrum.cu wrote; without one, from the arguments.
#include "common.cuh"
#include "record.cuh"

constexpr int MAX_WORKERS = M ? M : 1024;
// 2-byte loads, and a loop over workers of unknown number, need more registers.
constexpr int MIN_BLOCKS = WIDTH == 2 ? 1 : ITEMS * sizeof(Real) > 32 || (ITEMS == 8 && M == 0) ? 2 : 3;

// The first warp: p and q from c, which is centred first so that it sums to zero.
__device__ __forceinline__ void compute_weights(const double* c, int second, double tau, double beta, int m, Real* p,
                                                Real* q) {
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

__device__ __forceinline__ void accumulate(Real (&sums)[ITEMS], Real weight, const Vector& row, const Vector& origin) {
#pragma unroll
  for (int v = 0; v < ITEMS; ++v) sums[v] += weight * (value(row, v) - value(origin, v));
}

// Round and store; false if a value is not finite.
__device__ __forceinline__ bool store(const Real (&sums)[ITEMS], Stored* out, i64 c, i64 n, int out_is_aligned) {
  Stored values[ITEMS];
  bool finite = true;
#pragma unroll
  for (int v = 0; v < ITEMS; ++v) {
    values[v] = round_to_stored(sums[v]);
    finite &= is_finite(values[v]) || c + v >= n;
  }
  if (out_is_aligned && c + ITEMS <= n) {
    const Vector vector = pack(values);
    *reinterpret_cast<uint4*>(out + c) = make_uint4(vector.word[0], vector.word[1], vector.word[2], vector.word[3]);
  } else {
#pragma unroll
    for (int v = 0; v < ITEMS; ++v)
      if (c + v < n) out[c + v] = values[v];
  }
  return finite;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    combine(const __grid_constant__ Rows thetas, const __grid_constant__ Rows grads, const Stored* z, Stored* out,
            int m, i64 n, int shift, int out_is_aligned, const double* c, int second, double tau, double beta,
            double* record, int guarded) {
  if (guarded && record[STATUS] != GO) return;
  FN_SHARED(Real, p, [MAX_WORKERS]);
  FN_SHARED(Real, q, [MAX_WORKERS]);
  const double lr = record ? record[LR] : tau, lr_rest = record ? record[LR_REST] : beta;
  const int workers = M ? M : m;
  if (threadIdx.x < 32) compute_weights(c, second, lr, lr_rest, workers, p, q);
  __syncthreads();
  bool finite = true;
  const i64 tile = i64(THREADS) * ITEMS, tiles = (n + tile - 1) / tile;
  for (i64 t = tiles - 1 - blockIdx.x; t >= 0; t -= gridDim.x) {
    const i64 first = t * tile + threadIdx.x * ITEMS;
    if (first >= n) continue;
    const Vector theta = load(thetas.row[0], first, n, shift), grad = load(grads.row[0], first, n, shift);
    Real sums[ITEMS];
    const Vector base = WITH_Z ? load(z, first, n, shift) : theta;
#pragma unroll
    for (int v = 0; v < ITEMS; ++v) sums[v] = value(base, v) - (WITH_Z ? Real(0) : Real(lr_rest) * value(grad, v));
    if (WITH_Z && M == 1) {  // x − x, so that a NaN of the only worker propagates
      accumulate(sums, Real(1), theta, theta);
      accumulate(sums, Real(1), grad, grad);
    }
#pragma unroll(M && M <= 16 ? M : 8)
    for (int k = 1; k < workers; ++k) {
      accumulate(sums, p[k], load(thetas.row[k], first, n, shift), theta);
      accumulate(sums, q[k], load(grads.row[k], first, n, shift), grad);
    }
    finite &= store(sums, out, first, n, out_is_aligned);
  }
  if (!finite && record) atomicExch(reinterpret_cast<unsigned long long*>(record + RESULT), ONE_BITS);
}
