// __half and __nv_bfloat16: storage and conversion, rounded to nearest, ties to even.
#pragma once
#include "arithmetic.h"
#include "kernel.h"
#include "vectors.h"

namespace cudasim {

// One sign bit, as many bits for the fraction as told, the rest for the exponent.
template <int fraction_bits>
struct SmallFloat {
  static constexpr int bias = (1 << (14 - fraction_bits)) - 1;
  static constexpr uint16_t infinity = (2 * bias + 1) << fraction_bits, nan = 0x7fff;

  static uint16_t encode(double x) {
    if (__builtin_isnan(x)) return nan;
    uint16_t sign = __builtin_signbit(x) ? 0x8000 : 0;
    int exponent = static_cast<int>(bits_as<uint64_t>(x) >> 52 & 0x7ff) - 1023;
    if (exponent > bias) return sign | infinity;
    if (exponent < 1 - bias) exponent = 1 - bias;  // that of the subnormal numbers
    double units = __builtin_rint(__builtin_ldexp(fabs(x), fraction_bits - exponent));
    // A fraction that rounds up to the next power of two carries into the exponent, as it should.
    return sign | static_cast<uint16_t>(units + ((exponent + bias - 1) << fraction_bits));
  }

  static double decode(uint16_t bits) {
    int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
    return bits & 0x8000 ? -magnitude(exponent, fraction) : magnitude(exponent, fraction);
  }

 private:
  static double magnitude(int exponent, int fraction) {
    if (exponent == 2 * bias + 1) return fraction ? __builtin_nan("") : __builtin_inf();
    if (exponent == 0) return __builtin_ldexp(fraction, 1 - bias - fraction_bits);
    return __builtin_ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  }
};
using Half = SmallFloat<10>;
using BFloat16 = SmallFloat<7>;

}  // namespace cudasim

#define CUDASIM_SMALL_FLOAT(T, Format)                                                         \
  struct T {                                                                                   \
    uint16_t bits;                                                                             \
    T() = default;                                                                             \
    T(float x) : bits(cudasim::Format::encode(x)) {}                                           \
    T(double x) : bits(cudasim::Format::encode(x)) {}                                          \
    T(int x) : bits(cudasim::Format::encode(x)) {}                                             \
    operator float() const { return static_cast<float>(cudasim::Format::decode(bits)); }       \
  };                                                                                           \
  inline T operator+(T x, T y) { return static_cast<float>(x) + static_cast<float>(y); }       \
  inline T operator-(T x, T y) { return static_cast<float>(x) - static_cast<float>(y); }       \
  inline T operator*(T x, T y) { return static_cast<float>(x) * static_cast<float>(y); }       \
  inline T operator/(T x, T y) { return static_cast<float>(x) / static_cast<float>(y); }       \
  struct alignas(4) T##2 {                                                                     \
    T x, y;                                                                                    \
  };

CUDASIM_SMALL_FLOAT(__half, Half)
CUDASIM_SMALL_FLOAT(__nv_bfloat16, BFloat16)
#undef CUDASIM_SMALL_FLOAT
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

template <>
struct cudasim::TypeOf<__half> {
  static constexpr Type value = {'f', 2};
};

// The two headers spell the same functions differently.
#define CUDASIM_CONVERSIONS(T, short_name, of_float, to_float, two_of_floats, pair_of_floats, pair_to_floats) \
  inline T of_float(float x) { return x; }                                                                    \
  inline T of_float##_rn(float x) { return x; }                                                               \
  inline float to_float(T x) { return x; }                                                                    \
  inline T __double2##short_name(double x) { return x; }                                                      \
  inline T __ushort_as_##short_name(unsigned short bits) { return cudasim::bits_as<T>(bits); }                \
  inline unsigned short __##short_name##_as_ushort(T x) { return x.bits; }                                    \
  inline T##2 two_of_floats(float x, float y) { return {x, y}; }                                              \
  inline T##2 pair_of_floats(float2 v) { return {v.x, v.y}; }                                                 \
  inline float2 pair_to_floats(T##2 v) { return {v.x, v.y}; }                                                 \
  inline float __low2float(T##2 v) { return v.x; }                                                            \
  inline float __high2float(T##2 v) { return v.y; }                                                           \
  inline T __low2##short_name(T##2 v) { return v.x; }                                                         \
  inline T __high2##short_name(T##2 v) { return v.y; }
CUDASIM_CONVERSIONS(__half, half, __float2half, __half2float, __floats2half2_rn, __float22half2_rn, __half22float2)
CUDASIM_CONVERSIONS(__nv_bfloat16, bfloat16, __float2bfloat16, __bfloat162float, __floats2bfloat162_rn,
                    __float22bfloat162_rn, __bfloat1622float2)
#undef CUDASIM_CONVERSIONS
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
