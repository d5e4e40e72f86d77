// A few rows of x against all rows of weight. x is widened once; a strip of weight rows is then read once, vector by
// vector, against up to kMostRows rows of x in registers.
#include "../core/linear.h"

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kStrip = 4, kMostRows = 6;
#else
constexpr int kStrip = 2, kMostRows = 4;
#endif

// bytes between the weights in use and those asked for meanwhile, at least
constexpr int64_t kAhead = 8192;

typedef float v4 __attribute__((vector_size(16)));

// the sum of lanes l, l + 4, l + 8, ...
ALWAYS_INLINE v4 fold(vf v) {
#if defined(__AVX512F__)
  const __m256 half =
      _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0), _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1));
  return (v4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  return (v4)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  return v;
#endif
}

ALWAYS_INLINE float lane_sum(vf v) {
  const v4 s = fold(v);
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// How a step of kColumns weights meets x: kParts operands of each, multiplied and added part by part.
template <typename T>
struct Step {
  static constexpr int kColumns = W, kParts = 1;
  using Operand = vf;
  static ALWAYS_INLINE void load_weights(const T* p, Operand (&w)[kParts]) { w[0] = load(p); }
  static ALWAYS_INLINE vf add(Operand w, Operand x, vf sum) { return fma(w, x, sum); }
  template <typename X>
  static void load_x(const X* p, Operand (&x)[kParts]) {
    x[0] = load(p);
  }
};

typedef int8_t vb __attribute__((vector_size(W)));

template <>
ALWAYS_INLINE void Step<int8_t>::load_weights(const int8_t* p, Operand (&w)[kParts]) {
#if defined(__AVX512F__)
  w[0] = (vf)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  w[0] = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vb v;
  memcpy(&v, p, sizeof v);
  w[0] = __builtin_convertvector(v, vf);
#endif
}

#if defined(__AVX512BF16__)
// pairs of bfloat16: products are exact, sums are float32
template <>
struct Step<bf16> {
  static constexpr int kColumns = 2 * W, kParts = 1;
  using Operand = vu;
  static ALWAYS_INLINE void load_weights(const bf16* p, Operand (&w)[kParts]) { memcpy(w, p, sizeof w); }
  static ALWAYS_INLINE vf add(Operand w, Operand x, vf sum) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
  static void load_x(const bf16* p, Operand (&x)[kParts]) { memcpy(x, p, sizeof x); }
};
#else
// even columns, then odd ones: widening is a shift and a mask
template <>
struct Step<bf16> {
  static constexpr int kColumns = 2 * W, kParts = 2;
  using Operand = vf;
  static ALWAYS_INLINE void load_weights(const bf16* p, Operand (&w)[kParts]) {
    vu pairs;
    memcpy(&pairs, p, sizeof pairs);
    w[0] = (vf)(pairs << 16);
    w[1] = (vf)(pairs & 0xffff0000u);
  }
  static ALWAYS_INLINE vf add(Operand w, Operand x, vf sum) { return fma(w, x, sum); }
  static void load_x(const bf16* p, Operand (&x)[kParts]) { load_weights(p, x); }
};
#endif

// x as operands, `steps` of each row of x; zeros after column k
template <typename T>
struct Activations {
  typename Step<T>::Operand* x;
  int64_t steps;

  const typename Step<T>::Operand* at(int row, int64_t step) const {
    return x + (row * steps + step) * Step<T>::kParts;
  }
};

// up to kColumns elements, the others zero
template <typename T, int kColumns>
struct Padded {
  T lanes[kColumns] = {};
  Padded(const T* p, int64_t count) { memcpy(lanes, p, count * sizeof(T)); }
};

// dots[i * kStrip + r] = x[first + i] . weight[r]; the order of each sum depends on k alone
template <typename T, int M>
ALWAYS_INLINE void dots_of(const T* const (&weight)[kStrip], int64_t ahead, int64_t k, const Activations<T>& a,
                           int first, float* dots) {
  using S = Step<T>;
  vf sum[M][kStrip] = {};
  const auto add = [&](const T* p, int r, int64_t step) __attribute__((always_inline)) {
    typename S::Operand w[S::kParts];
    S::load_weights(p, w);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int part = 0; part < S::kParts; ++part) sum[i][r] = S::add(w[part], a.at(first + i, step)[part], sum[i][r]);
    }
  };
  int64_t step = 0;
  for (; (step + 1) * S::kColumns <= k; ++step) {
#pragma GCC unroll 4
    for (int r = 0; r < kStrip; ++r) {
      const T* p = weight[r] + step * S::kColumns;
      __builtin_prefetch(p + ahead);
      add(p, r, step);
    }
  }
  if (step < a.steps) {
    for (int r = 0; r < kStrip; ++r) {
      const Padded<T, S::kColumns> rest(weight[r] + step * S::kColumns, k - step * S::kColumns);
      add(rest.lanes, r, step);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < kStrip; ++r) dots[i * kStrip + r] = lane_sum(sum[i][r]);
  }
}

template <typename T, int M>
void dots_of_rows(int rows, const T* const (&weight)[kStrip], int64_t ahead, int64_t k, const Activations<T>& a,
                  int first, float* dots) {
  if (rows == M) return dots_of<T, M>(weight, ahead, k, a, first, dots);
  if constexpr (M > 1) dots_of_rows<T, M - 1>(rows, weight, ahead, k, a, first, dots);
}

template <typename T>
void all_dots(const T* const (&weight)[kStrip], int64_t ahead, int64_t k, int m, const Activations<T>& a, float* dots) {
  const int parts = (m + kMostRows - 1) / kMostRows, most = (m + parts - 1) / parts;
  for (int i = 0; i < m; i += most) {
    // after the first time the weights come from the first-level cache
    const int rows = m - i < most ? m - i : most;
    dots_of_rows<T, kMostRows>(rows, weight, i ? 0 : ahead, k, a, i, dots + i * kStrip);
  }
}

// scale, bias
template <typename X>
inline float finish(const SkinnyLinear& p, int64_t row, float dot) {
  if (p.scale) dot *= p.scale[row];
  if (p.bias) dot += to_float(static_cast<const X*>(p.bias)[row]);
  return dot;
}

template <typename X>
inline void write(const SkinnyLinear& p, int i, int64_t column, float value) {
  if (p.residual) value += to_float(static_cast<const X*>(p.residual)[i * p.residual_stride + column]);
  from_float(value, static_cast<X*>(p.out) + i * p.outputs + column);
}

inline float silu(float x) { return x / (1.0f + expf(-x)); }

// outputs [begin, end): a strip is kStrip weight rows, with swiglu kStrip / 2 of w1 and as many of w3
template <typename T, typename X>
void linear_rows(const SkinnyLinear& p, int64_t begin, int64_t end, const Activations<T>& a) {
  const T* weight = static_cast<const T*>(p.weight);
  const int step = p.swiglu ? kStrip / 2 : kStrip;
  // whole strips: the rows of a strip of short rows are too near
  const int64_t strip_bytes = step * p.k * static_cast<int64_t>(sizeof(T));
  const int64_t strips = strip_bytes > 0 ? (kAhead + strip_bytes - 1) / strip_bytes : 1;
  float dots[kSkinnyMaxRows * kStrip];
  for (int64_t column = begin; column < end; column += step) {
    int64_t rows[kStrip];
    const T* pointers[kStrip];
    for (int r = 0; r < kStrip; ++r) {
      // past the end: the last row again
      const int64_t at = column + r % step;
      rows[r] = (at < end ? at : end - 1) + (r < step ? 0 : p.outputs);
      pointers[r] = weight + rows[r] * p.k;
    }
    const int64_t ahead = column + strips * step < end ? strips * step * p.k : 0;
    all_dots<T>(pointers, ahead, p.k, p.m, a, dots);
    for (int r = 0; r < step && column + r < end; ++r) {
      for (int i = 0; i < p.m; ++i) {
        float value = finish<X>(p, rows[r], dots[i * kStrip + r]);
        if (p.swiglu) value = silu(value) * finish<X>(p, rows[r + step], dots[i * kStrip + r + step]);
        write<X>(p, i, column + r, value);
      }
    }
  }
}

template <typename T, typename X>
void linear(const SkinnyLinear& p, int64_t begin, int64_t end) {
  using S = Step<T>;
  using Operand = typename S::Operand;
  const int64_t steps = (p.k + S::kColumns - 1) / S::kColumns;
  Operand* operands = new Operand[p.m * steps * S::kParts];
  for (int i = 0; i < p.m; ++i) {
    const X* x = static_cast<const X*>(p.x) + i * p.x_stride;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t column = step * S::kColumns, left = p.k - column;
      const Padded<X, S::kColumns> block(x + column, left < S::kColumns ? left : S::kColumns);
      Operand loaded[S::kParts];
      S::load_x(block.lanes, loaded);
      memcpy(operands + (i * steps + step) * S::kParts, loaded, sizeof loaded);
    }
  }
  linear_rows<T, X>(p, begin, end, Activations<T>{operands, steps});
  delete[] operands;
}

template <typename X>
void linear_of_x(const SkinnyLinear& p, int64_t begin, int64_t end) {
  if (p.weight_type == WeightType::int8)
    linear<int8_t, X>(p, begin, end);
  else
    linear<X, X>(p, begin, end);
}

}  // namespace

void skinny_linear_kernel(const SkinnyLinear& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::f32) linear_of_x<float>(p, begin, end);
  if (p.dtype == Dtype::bf16) linear_of_x<bf16>(p, begin, end);
  if (p.dtype == Dtype::f16) linear_of_x<f16>(p, begin, end);
}

}  // namespace flexkernels::FLEXKERNELS_ISA
