// float4, uint2, dim3 and the like, aligned as CUDA aligns them.
#pragma once

#define CUDASIM_VECTORS(T, name)                                                                           \
  struct name##1 { T x; };                                                                                 \
  struct alignas(sizeof(T) < 8 ? 2 * sizeof(T) : 16) name##2 { T x, y; };                                  \
  struct name##3 { T x, y, z; };                                                                           \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };                            \
  inline name##1 make_##name##1(T x) { return {x}; }                                                       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                               \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                       \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDASIM_VECTORS(signed char, char)
CUDASIM_VECTORS(unsigned char, uchar)
CUDASIM_VECTORS(short, short)
CUDASIM_VECTORS(unsigned short, ushort)
CUDASIM_VECTORS(int, int)
CUDASIM_VECTORS(unsigned, uint)
CUDASIM_VECTORS(long long, longlong)
CUDASIM_VECTORS(unsigned long long, ulonglong)
CUDASIM_VECTORS(float, float)
CUDASIM_VECTORS(double, double)
#undef CUDASIM_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
