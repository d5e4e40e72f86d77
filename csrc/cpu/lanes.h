// Vectors lane by lane: constants, sums of many vectors at once, and loops over rows that end in part of a vector.
#pragma once

#include "simd.h"

#define INLINE inline __attribute__((always_inline))

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

// lanes of a and b by number: 0 .. W-1 and W .. 2W-1
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

// sums of neighbouring lanes, within each block of four
INLINE vf add_pairs(vf a, vf b) {
#if defined(__AVX512F__)
  return SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif defined(__AVX2__)
  return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
  return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

INLINE vf add_quads(vf a, vf b, vf c, vf d) { return add_pairs(add_pairs(a, b), add_pairs(c, d)); }

// lane 4 i + j = sum of the lanes of row 4 i + j, of which quads[i] is what add_quads makes
INLINE vf join_quads(const vf (&quads)[W / 4]) {
#if defined(__AVX512F__)
  const vf xy = SHUFFLE(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                SHUFFLE(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  const vf zw = SHUFFLE(quads[2], quads[3], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                SHUFFLE(quads[2], quads[3], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  return SHUFFLE(xy, zw, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         SHUFFLE(xy, zw, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif defined(__AVX2__)
  return SHUFFLE(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         SHUFFLE(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return quads[0];
#endif
}

// lane j = sum of the lanes of rows[j]
INLINE vf sum_rows(const vf (&rows)[W]) {
  vf quads[W / 4];
#pragma GCC unroll 4
  for (int i = 0; i < W / 4; ++i) quads[i] = add_quads(rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]);
  return join_quads(quads);
}

INLINE vf splat(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}

INLINE vi lane_numbers() {
  vi lanes;
  for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
  return lanes;
}

constexpr int round_up(int n) { return (n + W - 1) / W * W; }

// body(i, io) over the elements [0, n): whole vectors, then the rest
template <typename Body>
INLINE void for_vectors(int n, Body body) {
  int i = 0;
  for (; i + W <= n; i += W) body(i, Full{});
  if (i < n) body(i, Part{n - i});
}

}  // namespace
}  // namespace flexkernels::FLEXKERNELS_ISA
