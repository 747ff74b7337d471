// spectrum: from K and b to σ, V, j, c and τ, all in float64 (and so compiled for STORAGE=FLOAT64).
//
// Formula      K = V diag(σ²) Vᵀ;  j = #{k < M : σ_k ≥ max(λσ_1, floor), σ_k > 0}, at most max_rank;
//              c = V_j diag(σ_j⁻²) V_jᵀ b, centred;  τ = lr, or min(lr, 1/σ_1), or min(lr, σ_min(ΘV_jΣ_j⁻¹)).
// Shapes       matrix, thetas: (M, M), K and ΘᵀΘ; projection: (M,); record: see record.cuh; vectors_out: (M, M) or null,
//              column k is v_k; scratch: (M, M), for the curvature cap.
// Traffic      a few (M, M) matrices, which stay in the cache; the eigenproblem in shared memory.
// Determinism  one block; rotations in a fixed order, each sum by one thread.
// Launch       one warp up to 32 workers, which needs no barriers; else one block, small enough to spill no registers.
#include "common.cuh"
#include "record.cuh"

constexpr int EVEN = M + M % 2;
constexpr int TRIANGLE = EVEN * (EVEN + 1) / 2;
constexpr int MAX_SWEEPS = 15;

enum Cap { NO_CAP, SIGMA, CURVATURE };

struct Rotation {
  double c, s;
};

__device__ __forceinline__ double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }

__device__ __forceinline__ void sync() {
  if (THREADS == 32)
    __syncwarp();
  else
    __syncthreads();
}

__device__ __forceinline__ bool all_finite(const double* values, int count) {
  int finite = 1;
  for (int k = threadIdx.x; k < count; k += THREADS) finite &= isfinite(values[k]) != 0;
  return THREADS == 32 ? __all_sync(FULL_WARP, finite) : __syncthreads_and(finite);
}

// Index into the packed lower triangle of a symmetric matrix.
__device__ __forceinline__ int packed(int i, int j) { return i >= j ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i; }

// Round-robin schedule: the k-th of the disjoint pairs of this round; even − 1 rounds hold every pair once.
__device__ __forceinline__ int2 scheduled_pair(int k, int round, int even) {
  const int others = even - 1;
  if (k == 0) return make_int2(others, round);
  return make_int2((round + k) % others, (round + others - k) % others);
}

// Parallel-order Jacobi on the packed symmetric matrix `a`, padded with zeros to an even size; rotates `vectors` along
// unless null, vector k at k·EVEN.  Returns the number of sweeps, MAX_SWEEPS + 1 where these did not suffice.
__device__ int diagonalise(double* a, double* vectors, int even, Rotation* rotations, int* rotated) {
  const int half = even / 2;
  double negligible = 0;  // relative to the trace: K itself might overflow when squared
  for (int i = 0; i < even; ++i) negligible += a[packed(i, i)] * (1.0 / (1ll << 58));
  for (int sweep = 1; sweep <= MAX_SWEEPS; ++sweep) {
    sync();
    if (threadIdx.x == 0) *rotated = 0;
    sync();
    for (int round = 0; round < even - 1; ++round) {
      for (int k = threadIdx.x; k < half; k += THREADS) {
        const int2 pair = scheduled_pair(k, round, even);
        const double off = a[packed(pair.x, pair.y)];
        Rotation rotation = {1, 0};
        if (fabs(off) > negligible) {
          const double theta = 0.5 * (a[packed(pair.y, pair.y)] - a[packed(pair.x, pair.x)]) / off;
          const double t = copysign(1.0, theta) / (fabs(theta) + sqrt(theta * theta + 1));
          rotation.c = 1 / sqrt(t * t + 1);
          rotation.s = t * rotation.c;
          atomicOr(rotated, 1);
        }
        rotations[k] = rotation;
      }
      sync();
      // a ← JᵀaJ, one 2 × 2 block per pair of pairs.
      for (int item = threadIdx.x; item < half * half; item += THREADS) {
        const int k = item / half, l = item % half;
        if (l > k) continue;
        const int2 p = scheduled_pair(k, round, even), q = scheduled_pair(l, round, even);
        const Rotation left = rotations[k], right = rotations[l];
        if (k == l) {
          const double off = a[packed(p.x, p.y)], xx = a[packed(p.x, p.x)], yy = a[packed(p.y, p.y)];
          if (left.s != 0) {
            const double shift = left.s / left.c * off;
            a[packed(p.x, p.x)] = xx - shift;
            a[packed(p.y, p.y)] = yy + shift;
            a[packed(p.x, p.y)] = 0;
          }
        } else {
          const double xx = a[packed(p.x, q.x)], xy = a[packed(p.x, q.y)];
          const double yx = a[packed(p.y, q.x)], yy = a[packed(p.y, q.y)];
          const double top_x = left.c * xx - left.s * yx, top_y = left.c * xy - left.s * yy;
          const double low_x = left.s * xx + left.c * yx, low_y = left.s * xy + left.c * yy;
          a[packed(p.x, q.x)] = right.c * top_x - right.s * top_y;
          a[packed(p.x, q.y)] = right.s * top_x + right.c * top_y;
          a[packed(p.y, q.x)] = right.c * low_x - right.s * low_y;
          a[packed(p.y, q.y)] = right.s * low_x + right.c * low_y;
        }
      }
      if (vectors)
        for (int item = threadIdx.x; item < half * EVEN; item += THREADS) {
          const int k = item / EVEN, i = item % EVEN;
          const int2 p = scheduled_pair(k, round, even);
          const Rotation rotation = rotations[k];
          double *x = vectors + p.x * EVEN + i, *y = vectors + p.y * EVEN + i;
          const double old = *x;
          *x = rotation.c * old - rotation.s * *y;
          *y = rotation.s * old + rotation.c * *y;
        }
      sync();
    }
    if (*rotated == 0) return sweep;
  }
  return MAX_SWEEPS + 1;
}

// σ_min(ΘV_jΣ_j⁻¹), without directions v_k whose ‖Θv_k‖ is rounding; infinity where none is left.
__device__ double smallest_stretch(const double* thetas, double floor, const double* sigma, const double* vectors,
                                   const int* order, int rank, double* a, Rotation* rotations, int* flag,
                                   double* scratch) {
  FN_SHARED(int, usable, [M + 1]);  // their number, then their indices
  FN_SHARED(double, length2, [M]);
  for (int item = threadIdx.x; item < rank * M; item += THREADS) {
    const int k = item / M, i = item % M;
    double sum = 0;
    for (int j = 0; j < M; ++j) sum += thetas[i * M + j] * vectors[order[k] * EVEN + j];
    scratch[item] = sum;
  }
  sync();
  for (int k = threadIdx.x; k < rank; k += THREADS) {
    double sum = 0;
    for (int i = 0; i < M; ++i) sum += scratch[k * M + i] * vectors[order[k] * EVEN + i];
    length2[k] = sum;
  }
  sync();
  if (threadIdx.x == 0) {
    double trace = 0;
    for (int i = 0; i < M; ++i) trace += thetas[i * M + i];
    const double least = fmax(floor, sqrt(M * EPS * trace));
    int count = 0;
    for (int k = 0; k < rank; ++k)
      if (sqrt(fmax(length2[k], 0.0)) > least) usable[1 + count++] = k;
    usable[0] = count;
  }
  sync();
  const int count = usable[0], even = count + count % 2;
  if (count == 0) return infinity();
  for (int item = threadIdx.x; item < even * even; item += THREADS) {
    const int r = item / even, s = item % even;
    if (s > r) continue;
    double sum = 0;
    if (r < count) {
      const int k = usable[1 + r], l = usable[1 + s];
      for (int i = 0; i < M; ++i) sum += scratch[l * M + i] * vectors[order[k] * EVEN + i];
      sum /= sigma[k] * sigma[l];
    }
    a[packed(r, s)] = sum;
  }
  sync();
  diagonalise(a, nullptr, even, rotations, flag);
  double least = infinity();
  for (int r = 0; r < count; ++r) least = fmin(least, a[packed(r, r)]);
  return sqrt(fmax(least, 0.0));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    spectrum(const double* matrix, const double* projection, const double* norm2, const double* floor,
             const double* thetas, const double* theta_floor, double cutoff, int max_rank, double lr, double lr_rest,
             int cap, double* record, double* vectors_out, double* scratch) {
  FN_DYN_SHARED(double, eigenproblem);
  FN_SHARED(Rotation, rotations, [EVEN / 2 + 1]);
  FN_SHARED(double, sigma, [M]);
  FN_SHARED(double, along, [M]);  // V_jᵀb/σ
  FN_SHARED(int, order, [M]);     // of the eigenvalues, descending
  FN_SHARED(int, flag, [1]);
  FN_SHARED(int, shared_rank, [1]);
  double *a = eigenproblem, *vectors = eigenproblem + TRIANGLE;
  double *sigma_out = record + HEADER, *weights = sigma_out + M, *c_out = weights + M;

  const bool matrix_is_finite = all_finite(matrix, M * M), floor_is_finite = all_finite(floor, 1);
  if (!matrix_is_finite || !floor_is_finite) {
    const double nan = __longlong_as_double(0x7ff8000000000000ll);
    for (int k = threadIdx.x; k < M; k += THREADS) sigma_out[k] = weights[k] = c_out[k] = nan;
    if (vectors_out)
      for (int p = threadIdx.x; p < M * M; p += THREADS) vectors_out[p] = nan;
    if (threadIdx.x == 0) {
      record[STATUS] = NOT_FINITE;
      record[RANK] = record[CAPTURED] = record[SWEEPS] = record[RESULT] = record[REASON] = record[FALLBACK] = 0;
      record[LR] = lr;
      record[LR_REST] = isnan(lr_rest) ? lr : lr_rest;
    }
    return;
  }

  for (int item = threadIdx.x; item < EVEN * EVEN; item += THREADS) {
    const int i = item / EVEN, j = item % EVEN;
    if (j <= i) a[packed(i, j)] = i < M ? matrix[i * M + j] : 0;
    vectors[item] = i == j;
  }
  sync();
  const int sweeps = M > 1 ? diagonalise(a, vectors, EVEN, rotations, flag) : 1;
  sync();
  for (int k = threadIdx.x; k < M; k += THREADS) {
    int larger = 0;
    for (int l = 0; l < M; ++l) {
      const double square = a[packed(k, k)], other = a[packed(l, l)];
      larger += other > square || (other == square && l < k);
    }
    order[larger] = k;
    sigma[larger] = sqrt(fmax(a[packed(k, k)], 0.0));
  }
  sync();
  for (int k = threadIdx.x; k < M; k += THREADS) {
    double sum = 0;
    for (int i = 0; i < M; ++i) sum += vectors[order[k] * EVEN + i] * projection[i];
    along[k] = sum / sigma[k];
  }
  const double least = fmax(fmax(cutoff * sigma[0], *floor), sqrt(M * EPS) * sigma[0]);
  sync();
  if (threadIdx.x == 0) {
    int rank = 0;
    while (rank < min(M - 1, max_rank) && sigma[rank] >= least && sigma[rank] > 0) ++rank;
    double captured = 0;
    for (int k = 0; k < rank; ++k) captured += along[k] * along[k];
    shared_rank[0] = rank;
    record[STATUS] = sweeps > MAX_SWEEPS ? NOT_CONVERGED : GO;
    record[RANK] = rank;
    record[CAPTURED] = *norm2 != 0 ? fmin(1.0, captured / *norm2) : 0;
    record[SWEEPS] = sweeps;
    record[RESULT] = record[REASON] = record[FALLBACK] = 0;
  }
  sync();
  const int rank = shared_rank[0];
  // c, in place of the triangle, which is used up.
  for (int i = threadIdx.x; i < M; i += THREADS) {
    double sum = 0;
    for (int k = 0; k < rank; ++k) sum += vectors[order[k] * EVEN + i] * (along[k] / sigma[k]);
    a[i] = sum;
  }
  sync();
  double mean = 0;
  for (int i = 0; i < M; ++i) mean += a[i];
  mean /= M;
  for (int i = threadIdx.x; i < M; i += THREADS) {
    weights[i] = c_out[i] = a[i] - mean;
    sigma_out[i] = sigma[i];
  }
  if (vectors_out)
    for (int p = threadIdx.x; p < M * M; p += THREADS) vectors_out[p] = vectors[order[p % M] * EVEN + p / M];
  sync();
  double tau = lr;
  if (cap == SIGMA && rank > 0) tau = fmin(lr, 1 / sigma[0]);
  if (cap == CURVATURE && rank > 0) {
    const bool thetas_are_finite = all_finite(thetas, M * M), their_floor_is = all_finite(theta_floor, 1);
    if (thetas_are_finite && their_floor_is)
      tau = fmin(lr, smallest_stretch(thetas, *theta_floor, sigma, vectors, order, rank, a, rotations, flag, scratch));
    else if (threadIdx.x == 0)
      record[STATUS] = NOT_FINITE;
  }
  if (threadIdx.x == 0) {
    record[LR] = tau;
    record[LR_REST] = isnan(lr_rest) ? tau : lr_rest;
  }
}
