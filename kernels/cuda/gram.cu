// gram: the sums over coordinates of products of centred rows.
//
// Formula      gram: K_ij = Σ_c x_i(c)·x_j(c), b_i = Σ_c x_i(c)·z(c), Σ ḡ², Σ z², with x_i = g_i − ḡ and z = ḡ unless given;
//              joint: all products of θ_i − θ̄, θ̄, g_i − ḡ and ḡ; centre: x_i, ḡ (and z) themselves, for a BLAS.
// Shapes       rows: M vectors of length n; z: a vector of length n; parts: (products, gridDim.x) float64.
// Traffic      reads M·n·itemsize bytes once (and z), joint 2M·n·itemsize; writes a part for each block.  centre reads M rows
//              twice, the second time from the cache, and writes M + 1 (and z).
// Rounding     the mean and the centred values stay in registers; a float32 sum takes at most RUN·GROUP = 256 terms,
//              from there on sums are float64.
// Determinism  block b takes the coordinates of groups b·THREADS …, then every gridDim.x-th such stretch; its threads'
//              sums are added in a fixed order, and spectrum.cu adds the blocks' parts in the order of their indices.
// Launch       as many blocks as the device holds at once, each going through the coordinates in strides: a thread's
//              run is then long enough to make the reduction at its end cheap.
#include "common.cuh"

#ifndef WITH_Z
#define WITH_Z 0
#endif

#if KIND == STRAIGHT
// Few workers: each thread holds all products of its coordinates in registers.
constexpr int RUN = 256 / GROUP;
static_assert(RUN * GROUP <= 256, "terms of a float32 sum");
constexpr int WARPS = THREADS / 32;
constexpr int PRODUCTS = M * (M + 1) / 2 + M + 1 + WITH_Z;

__device__ __forceinline__ void accumulate(Real (&sums)[PRODUCTS], const Words (&words)[M], Real z, int v) {
  Real x[M], mean = 0;
#pragma unroll
  for (int i = 0; i < M; ++i) {
    x[i] = value(words[i], v);
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
  const Real last = WITH_Z ? z : mean;
#pragma unroll
  for (int i = 0; i < M; ++i) sums[p++] += x[i] * last;
  sums[p++] += mean * mean;
  if (WITH_Z) sums[p] += z * z;
}

// Add the threads' sums to the block's and begin anew.
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
    gram(const __grid_constant__ Rows rows, const Stored* z, i64 n, int shift, double* parts) {
  FN_SHARED(double, warps, [WARPS][PRODUCTS]);
  FN_SHARED(double, total, [PRODUCTS]);
  for (int p = threadIdx.x; p < PRODUCTS; p += THREADS) total[p] = 0;
  Real sums[PRODUCTS];
#pragma unroll
  for (int p = 0; p < PRODUCTS; ++p) sums[p] = 0;
  int run = 0;
  const i64 stretch = i64(THREADS) * GROUP;
  for (i64 first = blockIdx.x * stretch; first < n; first += gridDim.x * stretch) {
    const i64 c = first + threadIdx.x * GROUP;
    if (c < n) {
      Words words[M], last = {};
#pragma unroll
      for (int i = 0; i < M; ++i) words[i] = load(rows.row[i], c, n, shift);
      if (WITH_Z) last = load(z, c, n, shift);
#pragma unroll
      for (int v = 0; v < GROUP; ++v) accumulate(sums, words, value(last, v), v);
    }
    if (++run == RUN) {
      flush(sums, warps, total);
      run = 0;
    }
  }
  flush(sums, warps, total);
  for (int p = threadIdx.x; p < PRODUCTS; p += THREADS) parts[i64(p) * gridDim.x + blockIdx.x] = total[p];
}
#endif

#if KIND == TILED || KIND == JOINT
// More workers: a stretch of COORDINATES is centred into shared memory, and its products are split over the threads in
// blocks of SIDE × SIDE on and above the diagonal.  TILED forms those of the rows g_i − ḡ, ḡ (and z) among themselves,
// JOINT those of the rows θ_i − θ̄, θ̄, g_i − ḡ, ḡ.  SPLITS threads share a block of products, each with its own
// coordinates.  A block's products are (q, r) of rows t + q·LEFT and u + r·LEFT: neighbouring threads then read
// neighbouring rows, which PITCH puts into different banks.
constexpr int SIDE = 4;
constexpr int BASE = KIND == JOINT ? M + 1 : 0;  // the first row of the gradients
constexpr int LEFT = (BASE + M + 1 + WITH_Z + SIDE - 1) / SIDE;
constexpr int PAIRS = LEFT * (LEFT + 1) / 2;
constexpr int ROWS = SIDE * LEFT;
constexpr int PITCH = COORDINATES + SIDE;
constexpr int ACROSS = COORDINATES / GROUP;  // threads that load one row
constexpr int DOWN = THREADS / ACROSS < M ? THREADS / ACROSS : M;  // rows that are loaded at once
constexpr int TURNS = (M + DOWN - 1) / DOWN;
constexpr int TERMS = (COORDINATES / SIDE + SPLITS - 1) / SPLITS * SIDE;  // of one sum in one stretch
constexpr int RUN = TERMS < 256 ? 256 / TERMS : 1;
static_assert(PAIRS * SPLITS <= THREADS && COORDINATES <= 256, "launch shape");
static_assert(RUN * TERMS <= 256, "terms of a float32 sum");

struct alignas(16) Quad {
  Real x[SIDE];
};

__device__ __forceinline__ void fetch(Words (&words)[TURNS], const Rows& rows, i64 first, i64 n, int shift) {
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const int i = threadIdx.x / ACROSS + turn * DOWN;
    const i64 c = first + threadIdx.x % ACROSS * GROUP;
    words[turn] = {};
    if (i < M && threadIdx.x < ACROSS * DOWN && c < n) words[turn] = load(rows.row[i], c, n, shift);
  }
}

// Centre the fetched rows into the tile, and leave their mean.
__device__ __forceinline__ void centre(const Words (&words)[TURNS], Real (&parts)[DOWN][COORDINATES],
                                       Real (&mean)[COORDINATES], Real (*tile)[PITCH]) {
  const int column = threadIdx.x % ACROSS * GROUP, top = threadIdx.x / ACROSS;
  const bool loads = threadIdx.x < ACROSS * DOWN;
  if (loads) {
#pragma unroll
    for (int v = 0; v < GROUP; ++v) {
      Real sum = 0;
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) sum += value(words[turn], v);
      parts[top][column + v] = sum;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < COORDINATES; c += THREADS) {
    Real sum = 0;
    for (int d = 0; d < DOWN; ++d) sum += parts[d][c];
    mean[c] = sum * Real(1.0 / M);
  }
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const int i = top + turn * DOWN;
    if (loads && i < M) {
#pragma unroll
      for (int v = 0; v < GROUP; ++v) tile[i][column + v] = value(words[turn], v) - mean[column + v];
    }
  }
}

__device__ __forceinline__ Quad quad(const Real* from) { return *reinterpret_cast<const Quad*>(from); }

__device__ __forceinline__ void multiply(Real (&sums)[SIDE][SIDE], const Real (*left)[PITCH], const Real (*right)[PITCH],
                                         int split) {
  for (int c = split * SIDE; c < COORDINATES; c += SPLITS * SIDE) {
    Quad a[SIDE], b[SIDE];
#pragma unroll
    for (int q = 0; q < SIDE; ++q) {
      a[q] = quad(&left[q * LEFT][c]);
      b[q] = quad(&right[q * LEFT][c]);
    }
#pragma unroll
    for (int q = 0; q < SIDE; ++q)
#pragma unroll
      for (int r = 0; r < SIDE; ++r)
#pragma unroll
        for (int v = 0; v < SIDE; ++v) sums[q][r] += a[q].x[v] * b[r].x[v];
  }
}

// Add the threads' sums to the block's, one split after the other, and begin anew.
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
  FN_SHARED(Quad, memory, [ROWS][PITCH / SIDE]);
  FN_SHARED(Real, sums_down, [DOWN][COORDINATES]);
  FN_SHARED(Real, mean, [COORDINATES]);
  Real(*tile)[PITCH] = reinterpret_cast<Real(*)[PITCH]>(&memory[0][0]);
  for (int p = threadIdx.x; p < PAIRS * SIDE * SIDE; p += THREADS) total[p] = 0;
  for (int p = threadIdx.x; p < ROWS * PITCH; p += THREADS) tile[p / PITCH][p % PITCH] = 0;
  __syncthreads();

  const int pair = threadIdx.x % PAIRS, split = threadIdx.x / PAIRS;
  int t = 0, u = pair;
  for (; u >= LEFT - t; ++t) u -= LEFT - t;
  u += t;
  const Real(*left)[PITCH] = tile + t, (*right)[PITCH] = tile + u;

  Real sums[SIDE][SIDE] = {};
  int run = 0;
  Words words[TURNS];
  fetch(words, grads, i64(blockIdx.x) * COORDINATES, n, shift);
#if KIND == JOINT
  Words others[TURNS];
  fetch(others, thetas, i64(blockIdx.x) * COORDINATES, n, shift);
#endif
  for (i64 first = i64(blockIdx.x) * COORDINATES; first < n; first += i64(gridDim.x) * COORDINATES) {
    const i64 next = first + i64(gridDim.x) * COORDINATES;
#if KIND == JOINT
    centre(others, sums_down, mean, tile);
    for (int c = threadIdx.x; c < COORDINATES; c += THREADS) tile[M][c] = mean[c];
    __syncthreads();
    fetch(others, thetas, next, n, shift);
#endif
    centre(words, sums_down, mean, tile + BASE);
    for (int c = threadIdx.x; c < COORDINATES; c += THREADS) tile[BASE + M][c] = mean[c];
#if WITH_Z
    if (threadIdx.x < ACROSS) {
      const i64 c = first + threadIdx.x * GROUP;
      const Words last = c < n ? load(z, c, n, shift) : Words{};
#pragma unroll
      for (int v = 0; v < GROUP; ++v) tile[M + 1][threadIdx.x * GROUP + v] = value(last, v);
    }
#endif
    fetch(words, grads, next, n, shift);
    __syncthreads();
    if (split < SPLITS) multiply(sums, left, right, split);
    __syncthreads();
    if (++run == RUN) {
      flush(sums, pair, split, total);
      run = 0;
    }
  }
  flush(sums, pair, split, total);
  for (int p = threadIdx.x; p < PAIRS * SIDE * SIDE; p += THREADS) parts[i64(p) * gridDim.x + blockIdx.x] = total[p];
}
#endif

#if KIND == CENTRE
// More than 64 workers: the centred rows, the mean (and z) of a stretch of coordinates as (batch, rows, LENGTH) matrices,
// whose products a BLAS forms while they are in the L2 cache.  A thread goes through the workers twice.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    centre(const __grid_constant__ Rows rows, const Stored* z, int m, i64 first, i64 n, int shift, Real* centred) {
  const int height = m + 1 + WITH_Z;
  const i64 at = (i64(blockIdx.x) * THREADS + threadIdx.x) * GROUP, c = first + at;
  Real* column = centred + at / LENGTH * LENGTH * height + at % LENGTH;
  Real mean[GROUP] = {};
  for (int i = 0; i < m; ++i) {
    const Words words = load(rows.row[i], c, n, shift);
#pragma unroll
    for (int v = 0; v < GROUP; ++v) mean[v] += value(words, v);
  }
#pragma unroll
  for (int v = 0; v < GROUP; ++v) mean[v] /= m;
  for (int i = 0; i < m; ++i) {
    const Words words = load(rows.row[i], c, n, shift);
#pragma unroll
    for (int v = 0; v < GROUP; ++v) column[i64(i) * LENGTH + v] = value(words, v) - mean[v];
  }
#pragma unroll
  for (int v = 0; v < GROUP; ++v) column[i64(m) * LENGTH + v] = mean[v];
#if WITH_Z
  const Words last = load(z, c, n, shift);
#pragma unroll
  for (int v = 0; v < GROUP; ++v) column[i64(m + 1) * LENGTH + v] = value(last, v);
#endif
}
#endif
