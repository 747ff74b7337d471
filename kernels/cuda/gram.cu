// gram: K and b, from one pass over the gradients; with ΘᵀΘ, ΘᵀG and Θᵀḡ, from one pass over both arrays.
//
// Formula      gram: A_ij = Σ_c x_i(c)·x_j(c) over the rows x = g_1 − ḡ, …, g_M − ḡ, ḡ (and z, if given);
//              joint: the same over θ_i − θ̄, θ̄, g_i − ḡ, ḡ; centre: the rows x themselves, for a BLAS;
//              project: K = CAC, b = Ca, zᵀz and 2·eps·‖ḡ‖ from A summed over the blocks; C = I − 11ᵀ/M.
// Shapes       rows: M vectors of length n; z: (n,); parts: (PRODUCTS, blocks); matrix: (M, M); projection: (M,)
// Traffic      reads M·n·itemsize bytes once (and z), joint 2M·n·itemsize; writes a part per block; project reads them.
//              centre reads M rows twice, the second time from the cache, and writes M + 1 (and z).
// Rounding     mean and centred values stay in registers; a float32 sum has at most 256 terms, and is then added in
//              float64.  project is float64 throughout.
// Determinism  grid-stride: block b takes tiles b, b + gridDim.x, …; it adds its threads' sums in a fixed order; project
//              adds the parts in the order of their indices, each lane every 32nd.
// Launch       as many blocks as are resident at once: each runs long enough to hide the reduction at its end; project
//              in one block.
#include "common.cuh"

#define UNROLLED 1
#define TILED 2
#define JOINT 3
#define CENTRE 4

// -- layout of a part: where the product of rows i and j lies; row M is the mean, M + 1 is z or, in JOINT, g_1 − ḡ ----

#if KIND == UNROLLED
constexpr int PRODUCTS = M * (M + 1) / 2 + M + 1 + WITH_Z;

__device__ __forceinline__ int place(int i, int j) {
  const int low = min(i, j), high = max(i, j), triangle = M * (M + 1) / 2;
  if (high < M) return low * M - low * (low - 1) / 2 + high - low;
  return triangle + low;
}
#elif KIND != CENTRE
// Rows t, t + GROUPS, … are group t, SIDE of them.  A pair of groups t ≤ u has a block of SIDE × SIDE products.
constexpr int SIDE = 4;
constexpr int BASE = KIND == JOINT ? M + 1 : 0;  // first row of the gradients
constexpr int GROUPS = (BASE + M + 1 + WITH_Z + SIDE - 1) / SIDE;
constexpr int PAIRS = GROUPS * (GROUPS + 1) / 2;
constexpr int PRODUCTS = PAIRS * SIDE * SIDE;

__device__ __forceinline__ int place(int i, int j) {
  int t = i % GROUPS, q = i / GROUPS, u = j % GROUPS, r = j / GROUPS;
  if (t > u) {
    const int other_t = t, other_q = q;
    t = u, q = r, u = other_t, r = other_q;
  }
  return (q * SIDE + r) * PAIRS + t * GROUPS - t * (t - 1) / 2 + u - t;
}
#endif

#ifdef PROJECT
// -- project: the corner of A at (top, left) becomes K; in JOINT also ΘᵀΘ, at (0, 0), and ΘᵀG, at (0, M + 1) ---------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    project(const double* parts, int blocks, int top, int left, double* matrix, double* projection, double* scalars) {
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
  constexpr int Z = M + WITH_Z;
  double sum = 0;
#pragma unroll 4
  for (int i = 0; i < M; ++i) sum += total[place(top + i, left + Z)];
  for (int i = threadIdx.x; i < M; i += THREADS) projection[i] = total[place(top + i, left + Z)] - sum / M;
  if (threadIdx.x == 0) {
    scalars[0] = total[place(top + Z, left + Z)];
    scalars[1] = 2 * EPS * sqrt(total[place(top + M, left + M)]);
  }
}

#elif KIND == UNROLLED
// -- few workers: each thread keeps all products of its coordinates in registers ----------------------------

constexpr int RUN = 256 / ITEMS;  // tiles between flushes
static_assert(RUN * ITEMS <= 256, "terms of a float32 sum");
constexpr int WARPS = THREADS / 32;

__device__ __forceinline__ void accumulate(Real (&sums)[PRODUCTS], const Vector (&vectors)[M], Real z, int v) {
  Real x[M], mean = 0;
#pragma unroll
  for (int i = 0; i < M; ++i) {
    x[i] = value(vectors[i], v);
    mean += x[i];
  }
  mean *= Real(1.0 / M);
#pragma unroll
  for (int i = 0; i < M; ++i) x[i] -= mean;
  int p = 0;
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = i; j < M; ++j) sums[p++] += x[i] * x[j];
  const Real right = WITH_Z ? z : mean;
#pragma unroll
  for (int i = 0; i < M; ++i) sums[p++] += x[i] * right;
  sums[p++] += mean * mean;
  if (WITH_Z) sums[p] += z * z;
}

// Add the threads' sums to the block's, and reset them.
__device__ __forceinline__ void flush(Real (&sums)[PRODUCTS], double (&warps)[WARPS][PRODUCTS], double* total) {
#pragma unroll
  for (int p = 0; p < PRODUCTS; ++p) {
    const double sum = warp_sum(double(sums[p]));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][p] = sum;
    sums[p] = 0;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < PRODUCTS; p += THREADS)
    for (int w = 0; w < WARPS; ++w) total[p] += warps[w][p];
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gram(const __grid_constant__ Rows grads, const Stored* z, i64 n, int shift, double* parts) {
  FN_SHARED(double, warps, [WARPS][PRODUCTS]);
  FN_SHARED(double, total, [PRODUCTS]);
  for (int p = threadIdx.x; p < PRODUCTS; p += THREADS) total[p] = 0;
  Real sums[PRODUCTS];
#pragma unroll
  for (int p = 0; p < PRODUCTS; ++p) sums[p] = 0;
  int run = 0;
  const i64 tile = i64(THREADS) * ITEMS;
  for (i64 first = blockIdx.x * tile; first < n; first += gridDim.x * tile) {
    const i64 c = first + threadIdx.x * ITEMS;
    if (c < n) {
      Vector vectors[M], z_vector = {};
#pragma unroll
      for (int i = 0; i < M; ++i) vectors[i] = load(grads.row[i], c, n, shift);
      if (WITH_Z) z_vector = load(z, c, n, shift);
#pragma unroll
      for (int v = 0; v < ITEMS; ++v) accumulate(sums, vectors, value(z_vector, v), v);
    }
    if (++run == RUN) {
      flush(sums, warps, total);
      run = 0;
    }
  }
  flush(sums, warps, total);
  for (int p = threadIdx.x; p < PRODUCTS; p += THREADS) parts[i64(p) * gridDim.x + blockIdx.x] = total[p];
}

#elif KIND == TILED || KIND == JOINT
// -- more workers: tiles of centred rows in shared memory, register blocking of SIDE × SIDE products ---------
//
// A tile holds COORDINATES coordinates of all rows.  A thread has the products of one pair of groups, which SPLITS
// threads share, by coordinates.  Neighbouring threads read neighbouring rows: PITCH puts them into different banks.
constexpr int ROWS = SIDE * GROUPS;
constexpr int PITCH = COORDINATES + SIDE;
constexpr int THREADS_PER_ROW = COORDINATES / ITEMS;
constexpr int ROWS_AT_ONCE = THREADS / THREADS_PER_ROW < M ? THREADS / THREADS_PER_ROW : M;
constexpr int LOADS = (M + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;  // per thread and tile
constexpr int TERMS = (COORDINATES / SIDE + SPLITS - 1) / SPLITS * SIDE;  // of one sum per tile
constexpr int RUN = TERMS < 256 ? 256 / TERMS : 1;  // tiles between flushes
static_assert(PAIRS * SPLITS <= THREADS && COORDINATES <= 256, "launch shape");
static_assert(RUN * TERMS <= 256, "terms of a float32 sum");

struct alignas(16) Quad {
  Real x[SIDE];
};

// Load this thread's share of the tile that begins at coordinate `first`.
__device__ __forceinline__ void fetch(Vector (&vectors)[LOADS], const Rows& rows, i64 first, i64 n, int shift) {
#pragma unroll
  for (int l = 0; l < LOADS; ++l) {
    const int i = threadIdx.x / THREADS_PER_ROW + l * ROWS_AT_ONCE;
    const i64 c = first + threadIdx.x % THREADS_PER_ROW * ITEMS;
    vectors[l] = {};
    if (i < M && threadIdx.x < THREADS_PER_ROW * ROWS_AT_ONCE && c < n) vectors[l] = load(rows.row[i], c, n, shift);
  }
}

// Centre the fetched rows into the tile, and leave their mean in `mean`.
__device__ __forceinline__ void centre(const Vector (&vectors)[LOADS], Real (&partial)[ROWS_AT_ONCE][COORDINATES],
                                       Real (&mean)[COORDINATES], Real (*tile)[PITCH]) {
  const int column = threadIdx.x % THREADS_PER_ROW * ITEMS, top = threadIdx.x / THREADS_PER_ROW;
  const bool loads = threadIdx.x < THREADS_PER_ROW * ROWS_AT_ONCE;
  if (loads) {
#pragma unroll
    for (int v = 0; v < ITEMS; ++v) {
      Real sum = 0;
#pragma unroll
      for (int l = 0; l < LOADS; ++l) sum += value(vectors[l], v);
      partial[top][column + v] = sum;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < COORDINATES; c += THREADS) {
    Real sum = 0;
    for (int d = 0; d < ROWS_AT_ONCE; ++d) sum += partial[d][c];
    mean[c] = sum * Real(1.0 / M);
  }
  __syncthreads();
#pragma unroll
  for (int l = 0; l < LOADS; ++l) {
    const int i = top + l * ROWS_AT_ONCE;
    if (loads && i < M) {
#pragma unroll
      for (int v = 0; v < ITEMS; ++v) tile[i][column + v] = value(vectors[l], v) - mean[column + v];
    }
  }
}

__device__ __forceinline__ Quad load_quad(const Real* from) { return *reinterpret_cast<const Quad*>(from); }

__device__ __forceinline__ void multiply(Real (&sums)[SIDE][SIDE], const Real (*left)[PITCH],
                                         const Real (*right)[PITCH], int split) {
  for (int c = split * SIDE; c < COORDINATES; c += SPLITS * SIDE) {
    Quad a[SIDE], b[SIDE];
#pragma unroll
    for (int q = 0; q < SIDE; ++q) {
      a[q] = load_quad(&left[q * GROUPS][c]);
      b[q] = load_quad(&right[q * GROUPS][c]);
    }
#pragma unroll
    for (int q = 0; q < SIDE; ++q)
#pragma unroll
      for (int r = 0; r < SIDE; ++r)
#pragma unroll
        for (int v = 0; v < SIDE; ++v) sums[q][r] += a[q].x[v] * b[r].x[v];
  }
}

// Add the threads' sums to the block's, one split after the other, and reset them.
__device__ __forceinline__ void flush(Real (&sums)[SIDE][SIDE], int pair, int split, double* total) {
  for (int turn = 0; turn < SPLITS; ++turn) {
    if (split == turn) {
#pragma unroll
      for (int e = 0; e < SIDE * SIDE; ++e) {
        total[e * PAIRS + pair] += double(sums[e / SIDE][e % SIDE]);
        sums[e / SIDE][e % SIDE] = 0;
      }
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
#if KIND == TILED
    gram(const __grid_constant__ Rows grads, const Stored* z, i64 n, int shift, double* parts) {
#else
    joint(const __grid_constant__ Rows thetas, const __grid_constant__ Rows grads, i64 n, int shift, double* parts) {
#endif
  FN_DYN_SHARED(double, total);
  FN_SHARED(Quad, quads, [ROWS][PITCH / SIDE]);
  FN_SHARED(Real, partial, [ROWS_AT_ONCE][COORDINATES]);
  FN_SHARED(Real, mean, [COORDINATES]);
  Real(*tile)[PITCH] = reinterpret_cast<Real(*)[PITCH]>(&quads[0][0]);
  for (int p = threadIdx.x; p < PRODUCTS; p += THREADS) total[p] = 0;
  for (int p = threadIdx.x; p < ROWS * PITCH; p += THREADS) tile[p / PITCH][p % PITCH] = 0;
  __syncthreads();

  const int pair = threadIdx.x % PAIRS, split = threadIdx.x / PAIRS;
  int t = 0, u = pair;
  for (; u >= GROUPS - t; ++t) u -= GROUPS - t;
  u += t;
  const Real(*left)[PITCH] = tile + t, (*right)[PITCH] = tile + u;

  Real sums[SIDE][SIDE] = {};
  int run = 0;
  Vector vectors[LOADS];
  fetch(vectors, grads, i64(blockIdx.x) * COORDINATES, n, shift);
#if KIND == JOINT
  Vector of_thetas[LOADS];
  fetch(of_thetas, thetas, i64(blockIdx.x) * COORDINATES, n, shift);
#endif
  for (i64 first = i64(blockIdx.x) * COORDINATES; first < n; first += i64(gridDim.x) * COORDINATES) {
    const i64 next = first + i64(gridDim.x) * COORDINATES;  // fetched while this tile is multiplied
#if KIND == JOINT
    centre(of_thetas, partial, mean, tile);
    for (int c = threadIdx.x; c < COORDINATES; c += THREADS) tile[M][c] = mean[c];
    __syncthreads();
    fetch(of_thetas, thetas, next, n, shift);
#endif
    centre(vectors, partial, mean, tile + BASE);
    for (int c = threadIdx.x; c < COORDINATES; c += THREADS) tile[BASE + M][c] = mean[c];
#if WITH_Z
    if (threadIdx.x < THREADS_PER_ROW) {
      const i64 c = first + threadIdx.x * ITEMS;
      const Vector z_vector = c < n ? load(z, c, n, shift) : Vector{};
#pragma unroll
      for (int v = 0; v < ITEMS; ++v) tile[M + 1][threadIdx.x * ITEMS + v] = value(z_vector, v);
    }
#endif
    fetch(vectors, grads, next, n, shift);
    __syncthreads();
    if (split < SPLITS) multiply(sums, left, right, split);
    __syncthreads();
    if (++run == RUN) {
      flush(sums, pair, split, total);
      run = 0;
    }
  }
  flush(sums, pair, split, total);
  for (int p = threadIdx.x; p < PRODUCTS; p += THREADS) parts[i64(p) * gridDim.x + blockIdx.x] = total[p];
}

#elif KIND == CENTRE
// -- more than 64 workers: a BLAS multiplies ----------------------------------------------------------------
//
// The rows x as matrices (batch, rows, LENGTH), which stay in the L2 cache until they are multiplied.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    centre(const __grid_constant__ Rows rows, const Stored* z, int m, i64 start, i64 n, int shift, Real* centred) {
  const int height = m + 1 + WITH_Z;
  const i64 offset = (i64(blockIdx.x) * THREADS + threadIdx.x) * ITEMS, c = start + offset;
  Real* column = centred + offset / LENGTH * LENGTH * height + offset % LENGTH;
  Real mean[ITEMS] = {};
  for (int i = 0; i < m; ++i) {
    const Vector vector = load(rows.row[i], c, n, shift);
#pragma unroll
    for (int v = 0; v < ITEMS; ++v) mean[v] += value(vector, v);
  }
#pragma unroll
  for (int v = 0; v < ITEMS; ++v) mean[v] /= m;
  for (int i = 0; i < m; ++i) {
    const Vector vector = load(rows.row[i], c, n, shift);
#pragma unroll
    for (int v = 0; v < ITEMS; ++v) column[i64(i) * LENGTH + v] = value(vector, v) - mean[v];
  }
#pragma unroll
  for (int v = 0; v < ITEMS; ++v) column[i64(m) * LENGTH + v] = mean[v];
#if WITH_Z
  const Vector z_vector = load(z, c, n, shift);
#pragma unroll
  for (int v = 0; v < ITEMS; ++v) column[i64(m + 1) * LENGTH + v] = value(z_vector, v);
#endif
}
#endif
