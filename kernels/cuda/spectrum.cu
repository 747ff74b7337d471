// finish and spectrum: from the blocks' parts to the coefficients and the step length, all of it float64.
//
// finish      K = CAC, b = Ca and the norms, from the sums A over all blocks; C = I − 11ᵀ/m.  A begins at row `top` and
//             column `left` of all products: of Θ, θ̄, G and ḡ, ΘᵀΘ, ΘᵀG and K begin at (0, 0), (0, m + 1), (m + 1, m + 1).
// spectrum    K = V diag(σ²) Vᵀ, j, c = V_j diag(σ_j⁻²) V_jᵀ b and τ; see fastnewton/eigen.py for the equations.
// Shapes      parts: (products, blocks); matrix: (m, m); projection: (m,); scalars: zᵀz and 2·eps·‖ḡ‖; vectors: (m, m),
//             column k is v_k.
// Traffic     finish reads the parts once, 8·products·blocks bytes; spectrum a few (m, m) matrices, which stay in the cache.
// Determinism parts are added in the order of their indices, a lane taking every 32nd; Jacobi's rotations in a fixed order.
// Launch      one block: a warp does without barriers up to 32 workers.
#include "common.cuh"
#include "record.cuh"

__device__ __forceinline__ void sync() {
  if (THREADS == 32)
    __syncwarp();
  else
    __syncthreads();
}

#if KIND == STRAIGHT || KIND == TILED || KIND == JOINT
#ifndef WITH_Z
#define WITH_Z 0
#endif

#if STORAGE == FLOAT32
constexpr double EPS = 1.0 / (1 << 23);
#elif STORAGE == FLOAT64
constexpr double EPS = 1.0 / (1ll << 52);
#elif STORAGE == FLOAT16
constexpr double EPS = 1.0 / (1 << 10);
#else
constexpr double EPS = 1.0 / (1 << 7);
#endif

// Where gram.cu puts the product of rows i and j; row M is the mean, row M + 1 is z or, in JOINT, the first of G.
#if KIND == STRAIGHT
constexpr int PRODUCTS = M * (M + 1) / 2 + M + 1 + WITH_Z;

__device__ __forceinline__ int place(int i, int j) {
  const int low = min(i, j), high = max(i, j), triangle = M * (M + 1) / 2;
  if (high < M) return low * M - low * (low - 1) / 2 + high - low;
  return triangle + low;
}
#else
constexpr int SIDE = 4;
constexpr int LEFT = ((KIND == JOINT) * (M + 1) + M + 1 + WITH_Z + SIDE - 1) / SIDE;
constexpr int PAIRS = LEFT * (LEFT + 1) / 2;
constexpr int PRODUCTS = PAIRS * SIDE * SIDE;

__device__ __forceinline__ int place(int i, int j) {
  int t = i % LEFT, q = i / LEFT, u = j % LEFT, r = j / LEFT;
  if (t > u) {
    const int other_t = t, other_q = q;
    t = u, q = r, u = other_t, r = other_q;
  }
  return (q * SIDE + r) * PAIRS + t * LEFT - t * (t - 1) / 2 + u - t;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    finish(const double* parts, int blocks, int top, int left, double* matrix, double* projection, double* scalars) {
  FN_DYN_SHARED(double, total);
  FN_SHARED(double, row, [M]);
  FN_SHARED(double, column, [M]);
  for (int p = threadIdx.x / 32; p < PRODUCTS; p += THREADS / 32) {
    double sum = 0;
    for (int b = threadIdx.x % 32; b < blocks; b += 32) sum += parts[i64(p) * blocks + b];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) total[p] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < M; i += THREADS) {
    row[i] = column[i] = 0;
#pragma unroll 4
    for (int j = 0; j < M; ++j) {
      row[i] += total[place(top + i, left + j)];
      column[i] += total[place(top + j, left + i)];
    }
  }
  __syncthreads();
  double mean = 0;
#pragma unroll 4
  for (int i = 0; i < M; ++i) mean += row[i];
  mean /= M * M;
  for (int p = threadIdx.x; p < M * M; p += THREADS) {
    const int i = p / M, j = p % M;
    matrix[p] = total[place(top + i, left + j)] - (row[i] + column[j]) / M + mean;
  }
  constexpr int LAST = M + WITH_Z;
  double along = 0;
#pragma unroll 4
  for (int i = 0; i < M; ++i) along += total[place(top + i, left + LAST)];
  for (int i = threadIdx.x; i < M; i += THREADS)
    projection[i] = total[place(top + i, left + LAST)] - along / M;
  if (threadIdx.x == 0) {
    scalars[0] = total[place(top + LAST, left + LAST)];
    scalars[1] = 2 * EPS * sqrt(total[place(top + M, left + M)]);
  }
}
#endif

#if KIND == SPECTRUM
constexpr int EVEN = M + M % 2;
constexpr int TRIANGLE = EVEN * (EVEN + 1) / 2;
constexpr int MAX_SWEEPS = 15;
__device__ __forceinline__ double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }

enum Cap { NO_CAP, SIGMA, CURVATURE };

__device__ __forceinline__ int at(int i, int j) { return i >= j ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i; }

// The k-th pair of the round: in even − 1 rounds each meets each other once.
__device__ __forceinline__ int2 met(int k, int round, int even) {
  const int others = even - 1;
  if (k == 0) return make_int2(others, round);
  return make_int2((round + k) % others, (round + others - k) % others);
}

struct Rotation {
  double c, s;
};

// Parallel-order Jacobi on the symmetric matrix whose lower triangle is `a`, padded with zeros to an even size; vectors
// (or null) are turned along, vector k beginning at k·EVEN.  Returns the number of sweeps, MAX_SWEEPS + 1 if too few.
__device__ int diagonalise(double* a, double* vectors, int even, Rotation* rotations, int* rotated) {
  const int half = even / 2;
  double negligible = 0;  // against the trace, which itself might overflow
  for (int i = 0; i < even; ++i) negligible += a[at(i, i)] * (1.0 / (1ll << 58));
  for (int sweep = 1; sweep <= MAX_SWEEPS; ++sweep) {
    sync();
    if (threadIdx.x == 0) *rotated = 0;
    sync();
    for (int round = 0; round < even - 1; ++round) {
      for (int k = threadIdx.x; k < half; k += THREADS) {
        const int2 pair = met(k, round, even);
        const double off = a[at(pair.x, pair.y)];
        Rotation turn = {1, 0};
        if (fabs(off) > negligible) {
          const double theta = 0.5 * (a[at(pair.y, pair.y)] - a[at(pair.x, pair.x)]) / off;
          const double t = copysign(1.0, theta) / (fabs(theta) + sqrt(theta * theta + 1));
          turn.c = 1 / sqrt(t * t + 1);
          turn.s = t * turn.c;
          atomicOr(rotated, 1);
        }
        rotations[k] = turn;
      }
      sync();
      for (int item = threadIdx.x; item < half * half; item += THREADS) {
        const int k = item / half, l = item % half;
        if (l > k) continue;
        const int2 p = met(k, round, even), q = met(l, round, even);
        const Rotation left = rotations[k], right = rotations[l];
        if (k == l) {
          const double off = a[at(p.x, p.y)], xx = a[at(p.x, p.x)], yy = a[at(p.y, p.y)];
          if (left.s != 0) {
            const double shift = left.s / left.c * off;
            a[at(p.x, p.x)] = xx - shift;
            a[at(p.y, p.y)] = yy + shift;
            a[at(p.x, p.y)] = 0;
          }
        } else {
          const double xx = a[at(p.x, q.x)], xy = a[at(p.x, q.y)], yx = a[at(p.y, q.x)], yy = a[at(p.y, q.y)];
          const double top_x = left.c * xx - left.s * yx, top_y = left.c * xy - left.s * yy;
          const double low_x = left.s * xx + left.c * yx, low_y = left.s * xy + left.c * yy;
          a[at(p.x, q.x)] = right.c * top_x - right.s * top_y;
          a[at(p.x, q.y)] = right.s * top_x + right.c * top_y;
          a[at(p.y, q.x)] = right.c * low_x - right.s * low_y;
          a[at(p.y, q.y)] = right.s * low_x + right.c * low_y;
        }
      }
      if (vectors)
        for (int item = threadIdx.x; item < half * EVEN; item += THREADS) {
          const int k = item / EVEN, i = item % EVEN;
          const int2 p = met(k, round, even);
          const Rotation turn = rotations[k];
          double *x = vectors + p.x * EVEN + i, *y = vectors + p.y * EVEN + i;
          const double old = *x;
          *x = turn.c * old - turn.s * *y;
          *y = turn.s * old + turn.c * *y;
        }
      sync();
    }
    if (*rotated == 0) return sweep;
  }
  return MAX_SWEEPS + 1;
}

__device__ __forceinline__ bool all_finite(const double* values, int count) {
  int finite = 1;
  for (int k = threadIdx.x; k < count; k += THREADS) finite &= isfinite(values[k]) != 0;
  return THREADS == 32 ? __all_sync(WARP, finite) : __syncthreads_and(finite);
}

// min over unit u in the kept span of ‖ΘV_jΣ_j⁻¹u‖, or infinity where no direction was seen to move.
__device__ double least_stretch(const double* thetas, double floor, const double* sigma, const double* vectors,
                                const int* order, int rank, double* a, Rotation* rotations, int* flag, double* scratch) {
  FN_SHARED(int, usable, [M + 1]);
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
    const double least = fmax(floor, sqrt(M * (1.0 / (1ll << 52)) * trace));
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
    a[at(r, s)] = sum;
  }
  sync();
  diagonalise(a, nullptr, even, rotations, flag);
  double least = infinity();
  for (int r = 0; r < count; ++r) least = fmin(least, a[at(r, r)]);
  return sqrt(fmax(least, 0.0));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    spectrum(const double* matrix, const double* projection, const double* norm2, const double* floor,
             const double* thetas, const double* theta_floor, double cutoff, int max_rank, double lr, double lr_rest,
             int cap, double* record, double* vectors_out, double* scratch) {
  FN_DYN_SHARED(double, memory);
  FN_SHARED(Rotation, rotations, [EVEN / 2 + 1]);
  FN_SHARED(double, sigma, [M]);
  FN_SHARED(double, along, [M]);
  FN_SHARED(int, order, [M]);
  FN_SHARED(int, flag, [1]);
  FN_SHARED(int, kept, [1]);
  double *a = memory, *vectors = memory + TRIANGLE;
  double *sigma_out = record + HEADER, *weights = sigma_out + M, *c_out = weights + M;

  const bool finite = all_finite(matrix, M * M), floor_is_finite = all_finite(floor, 1);
  if (!finite || !floor_is_finite) {
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
    if (j <= i) a[at(i, j)] = i < M ? matrix[i * M + j] : 0;
    vectors[item] = i == j;
  }
  sync();
  const int sweeps = M > 1 ? diagonalise(a, vectors, EVEN, rotations, flag) : 1;
  sync();
  for (int k = threadIdx.x; k < M; k += THREADS) {
    int larger = 0;
    for (int l = 0; l < M; ++l) {
      const double mine = a[at(k, k)], other = a[at(l, l)];
      larger += other > mine || (other == mine && l < k);
    }
    order[larger] = k;
    sigma[larger] = sqrt(fmax(a[at(k, k)], 0.0));
  }
  sync();
  for (int k = threadIdx.x; k < M; k += THREADS) {
    double sum = 0;
    for (int i = 0; i < M; ++i) sum += vectors[order[k] * EVEN + i] * projection[i];
    along[k] = sum / sigma[k];
  }
  const double least = fmax(fmax(cutoff * sigma[0], *floor), sqrt(M * (1.0 / (1ll << 52))) * sigma[0]);
  sync();
  if (threadIdx.x == 0) {
    int rank = 0;
    while (rank < min(M - 1, max_rank) && sigma[rank] >= least && sigma[rank] > 0) ++rank;
    double captured = 0;
    for (int k = 0; k < rank; ++k) captured += along[k] * along[k];
    kept[0] = rank;
    record[STATUS] = sweeps > MAX_SWEEPS ? NOT_CONVERGED : GO;
    record[RANK] = rank;
    record[CAPTURED] = *norm2 != 0 ? fmin(1.0, captured / *norm2) : 0;
    record[SWEEPS] = sweeps;
    record[RESULT] = record[REASON] = record[FALLBACK] = 0;
  }
  sync();
  const int rank = kept[0];
  // In the place of the triangle, which is not needed any more.
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
    const bool known = all_finite(thetas, M * M), floor_known = all_finite(theta_floor, 1);
    if (known && floor_known)
      tau = fmin(lr, least_stretch(thetas, *theta_floor, sigma, vectors, order, rank, a, rotations, flag, scratch));
    else if (threadIdx.x == 0)
      record[STATUS] = NOT_FINITE;
  }
  if (threadIdx.x == 0) {
    record[LR] = tau;
    record[LR_REST] = isnan(lr_rest) ? tau : lr_rest;
  }
}
#endif
