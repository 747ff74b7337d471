// What the kernels share: storage types, the workers' rows, 16-byte loads, warp reductions.
//
// Macros, set by common.py:
//   STORAGE  FLOAT32, FLOAT64, FLOAT16 or BFLOAT16: type of the arrays
//   COMPUTE  float or double: type of products and short sums
//   M        number of workers at compile time; 0 passes it as an argument
//   WIDTH    bytes per load instruction, 16, 8, 4 or 2: every row is aligned to it, except with
//   SHIFTED  1: every row begins `shift` bytes past a 16-byte boundary; loads are still 16 bytes wide
//   THREADS  threads per block
//
// Whatever WIDTH is, a thread takes the ITEMS coordinates of one 16-byte vector: the order of summation, and so every
// bit, is independent of alignment.
#pragma once

#ifndef FN_SHARED
#define FN_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define FN_DYN_SHARED(T, name) extern __shared__ T name[]
#endif

#ifndef WITH_Z
#define WITH_Z 0
#endif

#define FLOAT32 1
#define FLOAT64 2
#define FLOAT16 3
#define BFLOAT16 4

#if STORAGE == FLOAT32
typedef float Stored;
constexpr double EPS = 1.0 / (1 << 23);
#elif STORAGE == FLOAT64
typedef double Stored;
constexpr double EPS = 1.0 / (1ll << 52);
#elif STORAGE == FLOAT16
#include <cuda_fp16.h>
typedef unsigned short Stored;
constexpr double EPS = 1.0 / (1 << 10);
#elif STORAGE == BFLOAT16
#include <cuda_bf16.h>
typedef unsigned short Stored;
constexpr double EPS = 1.0 / (1 << 7);
#endif

typedef COMPUTE Real;
typedef long long i64;

constexpr int ITEMS = 16 / sizeof(Stored);
constexpr unsigned FULL_WARP = 0xffffffffu;

// The address of each worker's row: by value while the kernel is compiled for M, so that a launch copies nothing.
#if M
struct Rows {
  const Stored* row[M];
};
#else
struct Rows {
  const Stored* const* row;
};
#endif

// ITEMS stored values as raw bits.
struct Vector {
  unsigned word[4];
};

__device__ __forceinline__ Real value(const Vector& vector, int v) {
#if STORAGE == FLOAT32
  return Real(__uint_as_float(vector.word[v]));
#elif STORAGE == FLOAT64
  return Real(__hiloint2double(vector.word[2 * v + 1], vector.word[2 * v]));
#elif STORAGE == FLOAT16
  return Real(__half2float(__ushort_as_half((unsigned short)(vector.word[v / 2] >> 16 * (v % 2)))));
#else
  return Real(__uint_as_float(v % 2 ? vector.word[v / 2] & 0xffff0000u : vector.word[v / 2] << 16));
#endif
}

__device__ __forceinline__ Stored round_to_stored(Real x) {
#if STORAGE == FLOAT16
  return __half_as_ushort(__float2half_rn(float(x)));
#elif STORAGE == BFLOAT16
  return __bfloat16_as_ushort(__float2bfloat16_rn(float(x)));
#else
  return Stored(x);
#endif
}

__device__ __forceinline__ bool is_finite(Stored x) {
#if STORAGE == FLOAT16
  return (x & 0x7c00) != 0x7c00;
#elif STORAGE == BFLOAT16
  return (x & 0x7f80) != 0x7f80;
#else
  return isfinite(x);
#endif
}

__device__ __forceinline__ Vector pack(const Stored (&values)[ITEMS]) {
  Vector vector;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#if STORAGE == FLOAT32
    vector.word[w] = __float_as_uint(values[w]);
#elif STORAGE == FLOAT64
    vector.word[w] = w % 2 ? __double2hiint(values[w / 2]) : __double2loint(values[w / 2]);
#else
    vector.word[w] = values[2 * w] | unsigned(values[2 * w + 1]) << 16;
#endif
  }
  return vector;
}

// Load a vector whose address is a multiple of WIDTH.
__device__ __forceinline__ Vector load_aligned(const Stored* from) {
  Vector vector;
#if WIDTH == 16
  const uint4 all = __ldg(reinterpret_cast<const uint4*>(from));
  vector = {all.x, all.y, all.z, all.w};
#elif WIDTH == 8
  const uint2* parts = reinterpret_cast<const uint2*>(from);
  const uint2 low = __ldg(parts), high = __ldg(parts + 1);
  vector = {low.x, low.y, high.x, high.y};
#elif WIDTH == 4
  const unsigned* parts = reinterpret_cast<const unsigned*>(from);
#pragma unroll
  for (int w = 0; w < 4; ++w) vector.word[w] = __ldg(parts + w);
#else
  const unsigned short* parts = reinterpret_cast<const unsigned short*>(from);
#pragma unroll
  for (int w = 0; w < 4; ++w) vector.word[w] = __ldg(parts + 2 * w) | unsigned(__ldg(parts + 2 * w + 1)) << 16;
#endif
  return vector;
}

// The 16 bytes that begin `shift` bytes into two consecutive aligned vectors: a funnel shift.
__device__ __forceinline__ Vector funnel_shift(const uint4& low, const uint4& high, int shift) {
  unsigned all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (shift & 8) {
#pragma unroll
    for (int w = 0; w < 6; ++w) all[w] = all[w + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (int w = 0; w < 5; ++w) all[w] = all[w + 1];
  }
  if (shift & 2) {
#pragma unroll
    for (int w = 0; w < 4; ++w) all[w] = all[w] >> 16 | all[w + 1] << 16;
  }
  return {all[0], all[1], all[2], all[3]};
}

// Load coordinates c … c + ITEMS − 1 of a row, zeros from n on.
__device__ __forceinline__ Vector load(const Stored* row, i64 c, i64 n, int shift) {
#if SHIFTED
  if (c > 0 && c + 2 * ITEMS <= n) {
    const uint4* from = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row + c) - shift);
    return funnel_shift(__ldg(from), __ldg(from + 1), shift);
  }
#else
  if (c + ITEMS <= n) return load_aligned(row + c);
#endif
  Stored values[ITEMS];
#pragma unroll
  for (int v = 0; v < ITEMS; ++v) values[v] = c + v < n ? __ldg(row + c + v) : Stored(0);
  return pack(values);
}

// The sum over a warp, on every lane.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL_WARP, x, distance);
  return x;
}
