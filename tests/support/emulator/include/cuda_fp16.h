// __half, as far as kernels need it: storage and conversions rounded to nearest even.
#pragma once
#include "cuda_runtime.h"

struct __half {
  unsigned short __x;
};
struct alignas(4) __half2 {
  __half x, y;
};
typedef __half half;
typedef __half2 half2;

EMU_INLINE __half __ushort_as_half(unsigned short bits) { return {bits}; }
EMU_INLINE unsigned short __half_as_ushort(__half h) { return h.__x; }
EMU_INLINE float __half2float(__half h) {
  const unsigned sign = (h.__x & 0x8000u) << 16, magnitude = h.__x & 0x7fffu;
  if (magnitude < 0x0400u) return __uint_as_float(sign | __float_as_uint(static_cast<float>(magnitude) * 0x1p-24f));
  return __uint_as_float(sign | ((magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u)));
}
EMU_INLINE __half __float2half_rn(float f) {
  const unsigned bits = __float_as_uint(f), sign = bits >> 16 & 0x8000u;
  const float size = fabsf(f);
  if (size != size) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00u)};
  // multiples of the spacing at this size: nearbyint rounds ties to even
  const int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
  const unsigned steps = static_cast<unsigned>(nearbyintf(ldexpf(size, 10 - exponent)));
  return {static_cast<unsigned short>(sign | (steps + (exponent + 14) * 1024))};
}
EMU_INLINE __half __float2half(float f) { return __float2half_rn(f); }
EMU_INLINE __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
EMU_INLINE float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
