// Vectors as wide as the ISA level this unit is compiled for (FLEXKERNELS_ISA). Everything here has internal linkage:
// an inline function with external linkage, compiled for AVX-512, could be the copy that the linker keeps for all.
#pragma once

#include "../core/dtype.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

// half the lanes, in twice the precision
typedef float vf_half __attribute__((vector_size(2 * W)));
typedef int32_t vi_half __attribute__((vector_size(2 * W)));
typedef double vd __attribute__((vector_size(4 * W)));
typedef int64_t vl __attribute__((vector_size(4 * W)));

inline vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// a * b + c, rounded once where the ISA level has the instruction
inline __attribute__((always_inline)) vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// the compiler converts between these two in halves on AVX2
inline vu widen(vh v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, vu);
#endif
}

// of values below 2^16
inline vh narrow(vu v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, vh);
#endif
}

inline vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(widen(h) << 16);
}

inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  // the instruction rounds to nearest even too, but takes subnormal numbers (class 0x20) for zero
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0, 1)) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &rounded, sizeof rounded);
    return;
  }
#endif
  const vu bits = (vu)v;
  const vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u), quiet = bits | 0x00400000u;
  const vh h = narrow((v != v ? quiet : rounded) >> 16);
  memcpy(p, &h, sizeof h);
}

inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int lane = 0; lane < W; ++lane) v[lane] = to_float(p[lane]);
  return v;
#endif
}

inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < W; ++lane) from_float(v[lane], p + lane);
#endif
}

// Stores past the caches, for results that these cannot hold: an ordinary store reads its line first.
constexpr int kStreamAlign = 64;

inline bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % kStreamAlign == 0; }

template <typename T>
inline void stream(T* p, const T (&lanes)[W]) {
#if defined(__AVX512F__)
  if constexpr (sizeof lanes == 64) return _mm512_stream_si512((__m512i*)p, _mm512_loadu_si512(lanes));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof lanes == 32) {
    return _mm256_stream_si256((__m256i*)p, _mm256_loadu_si256((const __m256i*)lanes));
  }
  if constexpr (sizeof lanes == 16) return _mm_stream_si128((__m128i*)p, _mm_loadu_si128((const __m128i*)lanes));
#endif
  memcpy(p, lanes, sizeof lanes);
}

// streamed stores become visible in any order until then
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

struct Full {
  template <typename T>
  vf load_from(const T* p) const {
    return load(p);
  }
  template <typename T>
  void store_to(T* p, vf v) const {
    store(p, v);
  }
};

// the first `count` lanes; the others read as zero
struct Part {
  int count;
  template <typename T>
  vf load_from(const T* p) const {
    T lanes[W] = {};
    memcpy(lanes, p, count * sizeof(T));
    return load(lanes);
  }
  template <typename T>
  void store_to(T* p, vf v) const {
    T lanes[W];
    store(lanes, v);
    memcpy(p, lanes, count * sizeof(T));
  }
};

template <typename Wide, typename Half, typename Narrow>
inline void widen(Narrow v, Wide* low, Wide* high) {
  Half parts[2];
  memcpy(parts, &v, sizeof v);
  *low = __builtin_convertvector(parts[0], Wide);
  *high = __builtin_convertvector(parts[1], Wide);
}

}  // namespace
}  // namespace flexkernels::FLEXKERNELS_ISA
