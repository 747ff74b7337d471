// Arithmetic functions and reinterpretation of bits. Of the C library the double functions are declared by hand.
#pragma once
#include "scheduler.h"

#define CUDASIM_UNARY(name)                    \
  extern "C" double name(double) noexcept;     \
  extern "C" float name##f(float) noexcept;    \
  inline float name(float x) { return name##f(x); }
#define CUDASIM_BINARY(name)                           \
  extern "C" double name(double, double) noexcept;     \
  extern "C" float name##f(float, float) noexcept;     \
  inline float name(float x, float y) { return name##f(x, y); }
CUDASIM_UNARY(sqrt)
CUDASIM_UNARY(cbrt)
CUDASIM_UNARY(fabs)
CUDASIM_UNARY(exp)
CUDASIM_UNARY(exp2)
CUDASIM_UNARY(expm1)
CUDASIM_UNARY(log)
CUDASIM_UNARY(log2)
CUDASIM_UNARY(log10)
CUDASIM_UNARY(log1p)
CUDASIM_UNARY(sin)
CUDASIM_UNARY(cos)
CUDASIM_UNARY(tanh)
CUDASIM_UNARY(floor)
CUDASIM_UNARY(ceil)
CUDASIM_UNARY(round)
CUDASIM_UNARY(trunc)
CUDASIM_UNARY(rint)
CUDASIM_BINARY(fmin)
CUDASIM_BINARY(fmax)
CUDASIM_BINARY(fmod)
CUDASIM_BINARY(pow)
CUDASIM_BINARY(hypot)
CUDASIM_BINARY(copysign)
#undef CUDASIM_UNARY
#undef CUDASIM_BINARY

extern "C" double fma(double, double, double) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
extern "C" double ldexp(double, int) noexcept;
extern "C" float ldexpf(float, int) noexcept;
inline float ldexp(float x, int exponent) { return ldexpf(x, exponent); }
extern "C" int abs(int) noexcept;
extern "C" long long llabs(long long) noexcept;
inline long long abs(long long x) { return llabs(x); }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }

inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float rsqrtf(float x) { return static_cast<float>(1 / sqrt(static_cast<double>(x))); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __saturatef(float x) { return x > 1 ? 1 : x > 0 ? x : 0; }

template <class T> bool isnan(T x) { return __builtin_isnan(x); }
template <class T> bool isinf(T x) { return __builtin_isinf(x); }
template <class T> bool isfinite(T x) { return __builtin_isfinite(x); }
template <class T> bool signbit(T x) { return __builtin_signbit(x); }
inline bool __isnan(double x) { return __builtin_isnan(x); }
inline bool __isnanf(float x) { return __builtin_isnan(x); }
inline bool __isinf(double x) { return __builtin_isinf(x); }
inline bool __isinff(float x) { return __builtin_isinf(x); }
inline bool __finite(double x) { return __builtin_isfinite(x); }
inline bool __finitef(float x) { return __builtin_isfinite(x); }

template <class A, class B> constexpr auto min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr auto max(A a, B b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// Rounded to nearest and never contracted; the approximate ones are exact here.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

namespace cudasim {
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cudasim

inline int __float_as_int(float x) { return cudasim::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cudasim::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return cudasim::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cudasim::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return cudasim::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return cudasim::bits_as<double>(x); }
inline double __hiloint2double(int high, int low) {
  const uint64_t upper = static_cast<unsigned>(high), lower = static_cast<unsigned>(low);
  return cudasim::bits_as<double>(upper << 32 | lower);
}
inline int __double2hiint(double x) { return static_cast<int>(cudasim::bits_as<uint64_t>(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(cudasim::bits_as<uint64_t>(x)); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32); }

#define __trap() ::cudasim::fail(::cudasim::here(), "trap")
#define assert(condition) \
  ((condition) ? (void)0 : ::cudasim::fail(::cudasim::here(), "assertion failed", "%s", #condition))
