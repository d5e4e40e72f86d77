// __nv_bfloat16, as far as kernels need it: storage and conversions rounded to nearest even.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short __x;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

EMU_INLINE __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
EMU_INLINE unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.__x; }
EMU_INLINE float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float(static_cast<unsigned>(b.__x) << 16); }
EMU_INLINE __nv_bfloat16 __float2bfloat16_rn(float f) {
  const unsigned bits = __float_as_uint(f);
  if (f != f) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
EMU_INLINE __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
EMU_INLINE __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
EMU_INLINE float2 __bfloat1622float2(__nv_bfloat162 b) { return {__bfloat162float(b.x), __bfloat162float(b.y)}; }
