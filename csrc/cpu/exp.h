// exp and the sigmoid on vectors, and an explicit fused multiply-add. Internal linkage, as in simd.h.
#pragma once

#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

// a * b + c, rounded once where the ISA level has the instruction
inline vf fma_vf(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// p * 2^n for a whole n; overflows to infinity and underflows through the subnormals
inline vf scale_vf(vf p, vf n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  const vi whole = __builtin_convertvector(n, vi);
  const vi half = whole >> 1;
  return p * (vf)((vu)(half + 127) << 23) * (vf)((vu)(whole - half + 127) << 23);
#endif
}

// e^x to less than 2 units in the last place; NaN stays NaN
//   x = n ln2 + r, |r| <= ln2 / 2;  e^x = 2^n e^r, with e^r - 1 - r by a polynomial
inline vf exp_vf(vf x) {
  // beyond these the result is infinity or zero
  x = x > 89.0f ? vf{} + 89.0f : x;
  x = x < -104.0f ? vf{} - 104.0f : x;
  // adding 1.5 * 2^23 rounds to a whole number
  constexpr float kRound = 12582912.0f;
  const vf n = fma_vf(x, vf{} + 1.44269504f, vf{} + kRound) - kRound;
  // ln2 in two parts, the first short enough for n * part to be exact
  vf r = fma_vf(n, vf{} - 0.693359375f, x);
  r = fma_vf(n, vf{} + 2.12194440e-4f, r);
  // Taylor coefficients to r^7: below 2^-27 of the result at |r| = ln2 / 2
  vf p = vf{} + 1.98412698e-4f;
  p = fma_vf(p, r, vf{} + 1.38888889e-3f);
  p = fma_vf(p, r, vf{} + 8.33333333e-3f);
  p = fma_vf(p, r, vf{} + 4.16666667e-2f);
  p = fma_vf(p, r, vf{} + 1.66666667e-1f);
  p = fma_vf(p, r, vf{} + 0.5f);
  p = fma_vf(p, r * r, r) + 1.0f;
  return scale_vf(p, n);
}

// 1 / (1 + e^-x)
inline vf sigmoid_vf(vf x) { return 1.0f / (1.0f + exp_vf(-x)); }

}  // namespace
}  // namespace flexkernels::FLEXKERNELS_ISA
