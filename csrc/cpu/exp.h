// exp on vectors. Internal linkage, as in simd.h.
#pragma once

#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

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

// e^x of N vectors to less than 2 units in the last place; NaN stays NaN
//   x = n ln2 + r, |r| <= ln2 / 2;  e^x = 2^n e^r, with e^r - 1 - r by a polynomial
// The vectors go step by step side by side: one alone waits for every result of its long chain.
template <int N>
inline __attribute__((always_inline)) void exp_vfs(vf (&x)[N]) {
  // adding 1.5 * 2^23 rounds to a whole number
  constexpr float kRound = 12582912.0f;
  // Taylor coefficients from r^7 down to r^2: below 2^-27 of the result at |r| = ln2 / 2
  constexpr float kTaylor[] = {1.98412698e-4f, 1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f};
  vf n[N], r[N], p[N];
  for (int k = 0; k < N; ++k) {
    // beyond these the result is infinity or zero
    x[k] = x[k] > 89.0f ? vf{} + 89.0f : x[k];
    x[k] = x[k] < -104.0f ? vf{} - 104.0f : x[k];
  }
  for (int k = 0; k < N; ++k) n[k] = fma(x[k], vf{} + 1.44269504f, vf{} + kRound) - kRound;
  // ln2 in two parts, the first short enough for n * part to be exact
  for (int k = 0; k < N; ++k) r[k] = fma(n[k], vf{} - 0.693359375f, x[k]);
  for (int k = 0; k < N; ++k) r[k] = fma(n[k], vf{} + 2.12194440e-4f, r[k]);
  for (int k = 0; k < N; ++k) p[k] = vf{} + kTaylor[0];
#pragma GCC unroll 5
  for (int c = 1; c < 6; ++c) {
    for (int k = 0; k < N; ++k) p[k] = fma(p[k], r[k], vf{} + kTaylor[c]);
  }
  for (int k = 0; k < N; ++k) p[k] = fma(p[k], r[k] * r[k], r[k]) + 1.0f;
  for (int k = 0; k < N; ++k) x[k] = scale_vf(p[k], n[k]);
}

}  // namespace
}  // namespace flexkernels::FLEXKERNELS_ISA
