// What the kernels share: storage types, rows of workers, loads of sixteen bytes, sums over a warp.
//
// Macros given by the launcher (kernels/cuda.py):
//   STORAGE  FLOAT32, FLOAT64, FLOAT16 or BFLOAT16: the type of the arrays
//   COMPUTE  float or double: the type of products and short sums
//   M        workers, known to the compiler; 0 leaves the number to the launch
//   WIDTH    bytes of one load, 16, 8, 4 or 2: every row is aligned to it, except with
//   SHIFTED  1: every row begins `shift` bytes after a multiple of 16; loads are of 16 bytes all the same
//   THREADS  threads of a block
//
// A thread always takes the GROUP coordinates of one 16-byte load, however wide the loads really are: the order of
// summation, and with it every bit, does not depend on alignment.
#pragma once

#ifndef FN_SHARED
#define FN_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define FN_DYN_SHARED(T, name) extern __shared__ T name[]
#endif

#define FLOAT32 1
#define FLOAT64 2
#define FLOAT16 3
#define BFLOAT16 4

#define STRAIGHT 1
#define TILED 2
#define JOINT 3
#define CENTRE 4
#define SPECTRUM 5

#if STORAGE == FLOAT32
typedef float Stored;
#elif STORAGE == FLOAT64
typedef double Stored;
#elif STORAGE == FLOAT16
#include <cuda_fp16.h>
typedef unsigned short Stored;
#elif STORAGE == BFLOAT16
#include <cuda_bf16.h>
typedef unsigned short Stored;
#endif

typedef COMPUTE Real;
typedef long long i64;

constexpr int GROUP = 16 / sizeof(Stored);
constexpr unsigned WARP = 0xffffffffu;

// Where each worker's vector begins: by value up to 64 workers, so that a launch needs no copy of its own.
#if M
struct Rows {
  const Stored* row[M];
};
#else
struct Rows {
  const Stored* const* row;
};
#endif

// GROUP stored values as they lie in memory.
struct Words {
  unsigned word[4];
};

__device__ __forceinline__ Real value(const Words& words, int v) {
#if STORAGE == FLOAT32
  return Real(__uint_as_float(words.word[v]));
#elif STORAGE == FLOAT64
  return Real(__hiloint2double(words.word[2 * v + 1], words.word[2 * v]));
#elif STORAGE == FLOAT16
  return Real(__half2float(__ushort_as_half((unsigned short)(words.word[v / 2] >> 16 * (v % 2)))));
#else
  return Real(__uint_as_float(v % 2 ? words.word[v / 2] & 0xffff0000u : words.word[v / 2] << 16));
#endif
}

__device__ __forceinline__ Stored rounded(Real x) {
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

__device__ __forceinline__ Words put_together(const Stored (&values)[GROUP]) {
  Words words;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#if STORAGE == FLOAT32
    words.word[w] = __float_as_uint(values[w]);
#elif STORAGE == FLOAT64
    words.word[w] = w % 2 ? __double2hiint(values[w / 2]) : __double2loint(values[w / 2]);
#else
    words.word[w] = values[2 * w] | unsigned(values[2 * w + 1]) << 16;
#endif
  }
  return words;
}

__device__ __forceinline__ Words load_wide(const Stored* from) {
  Words words;
#if WIDTH == 16
  const uint4 all = __ldg(reinterpret_cast<const uint4*>(from));
  words = {all.x, all.y, all.z, all.w};
#elif WIDTH == 8
  const uint2* parts = reinterpret_cast<const uint2*>(from);
  const uint2 low = __ldg(parts), high = __ldg(parts + 1);
  words = {low.x, low.y, high.x, high.y};
#elif WIDTH == 4
  const unsigned* parts = reinterpret_cast<const unsigned*>(from);
#pragma unroll
  for (int w = 0; w < 4; ++w) words.word[w] = __ldg(parts + w);
#else
  const unsigned short* parts = reinterpret_cast<const unsigned short*>(from);
#pragma unroll
  for (int w = 0; w < 4; ++w) words.word[w] = __ldg(parts + 2 * w) | unsigned(__ldg(parts + 2 * w + 1)) << 16;
#endif
  return words;
}

// Sixteen bytes that begin `shift` bytes into the first of two neighbouring words of sixteen.
__device__ __forceinline__ Words shifted(const uint4& low, const uint4& high, int shift) {
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

// The GROUP values from coordinate c on; beyond the end they are zero.
__device__ __forceinline__ Words load(const Stored* row, i64 c, i64 n, int shift) {
#if SHIFTED
  if (c > 0 && c + 2 * GROUP <= n) {
    const uint4* from = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row + c) - shift);
    return shifted(__ldg(from), __ldg(from + 1), shift);
  }
#else
  if (c + GROUP <= n) return load_wide(row + c);
#endif
  Stored values[GROUP];
#pragma unroll
  for (int v = 0; v < GROUP; ++v) values[v] = c + v < n ? __ldg(row + c + v) : Stored(0);
  return put_together(values);
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(WARP, x, distance);
  return x;
}
