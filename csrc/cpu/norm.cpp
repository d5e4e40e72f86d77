// Row norms and SwiGLU. A row is read again for each pass; it stays in the first-level cache.
#include "../core/norm.h"

#include <math.h>

#include "exp.h"
#include "kernels.h"
#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

#define FLEXKERNELS_INLINE inline __attribute__((always_inline))

// body(i, io) over the elements [begin, end): whole vectors, then the rest
template <typename Body>
FLEXKERNELS_INLINE void for_vectors(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + W <= end; i += W) body(i, Full{});
  if (i < end) body(i, Part{static_cast<int>(end - i)});
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// body(count, i, io) over the elements of a row: N vectors from i on, then one at a time, then the rest
template <int N, typename Body>
FLEXKERNELS_INLINE void for_groups(int64_t d, Body body) {
  int64_t i = 0;
  for (; i + N * W <= d; i += N * W) body(Int<N>{}, i, Full{});
  for_vectors(i, d, [&](int64_t j, auto io) { body(Int<1>{}, j, io); });
}

inline float lane_sum(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int width = W / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// keeps what a partial vector holds and clears the rest
inline vf kept(Full, vf v) { return v; }
inline vf kept(Part part, vf v) {
  float lanes[W] = {};
  store(lanes, v);
  for (int lane = part.count; lane < W; ++lane) lanes[lane] = 0;
  return load(lanes);
}

// sum over i < d of term(i, io), a vector that is zero beyond the row; four chains hide the latency of the addition
template <typename Term>
FLEXKERNELS_INLINE float row_sum(int64_t d, Term term) {
  vf a = {}, b = {}, c = {}, e = {};
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
    a += term(i, Full{});
    b += term(i + W, Full{});
    c += term(i + 2 * W, Full{});
    e += term(i + 3 * W, Full{});
  }
  for_vectors(i, d, [&](int64_t j, auto io) { a += term(j, io); });
  return lane_sum((a + b) + (c + e));
}

// totals of what body(i, io, sums) adds to its Count sums, over i < d
template <int Count, typename Body>
FLEXKERNELS_INLINE void row_sums(int64_t d, float (&totals)[Count], Body body) {
  vf even[Count] = {}, odd[Count] = {};
  int64_t i = 0;
  for (; i + 2 * W <= d; i += 2 * W) {
    body(i, Full{}, even);
    body(i + W, Full{}, odd);
  }
  for_vectors(i, d, [&](int64_t j, auto io) { body(j, io, even); });
  for (int s = 0; s < Count; ++s) totals[s] = lane_sum(even[s] + odd[s]);
}

template <typename M>
inline const M* table_row(const NormTable& table, int64_t s) {
  return table.data ? static_cast<const M*>(table.data) + s * table.stride : nullptr;
}

struct Stats {
  float mean, rstd;
};

inline float rstd_of(float squares, int64_t d, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(d) + eps);
}

// of row v, given the sum of its elements (layer norm) or of their squares (RMS norm)
FLEXKERNELS_INLINE Stats row_stats(const float* v, int64_t d, int kind, float eps, float sum) {
  if (kind == kRmsNorm) return {0.0f, rstd_of(sum, d, eps)};
  const float mean = sum / static_cast<float>(d);
  const float squares = row_sum(d, [&](int64_t i, auto io) {
    const vf c = kept(io, io.load_from(v + i) - mean);
    return c * c;
  });
  return {mean, rstd_of(squares, d, eps)};
}

// what the norm multiplies with: 1 + scale, or the weight of an RMS norm
template <typename M, typename IO>
FLEXKERNELS_INLINE vf factor(const M* scale, int kind, int64_t i, IO io) {
  if (!scale) return vf{} + 1.0f;
  const vf value = io.load_from(scale + i);
  return kind == kLayerNorm ? 1.0f + value : value;
}

struct Itself {
  vf operator()(vf v) const { return v; }
};

struct Squared {
  vf operator()(vf v) const { return v * v; }
};

// rounds v to X, writes it, and returns what was written
template <bool kStream, typename X>
FLEXKERNELS_INLINE vf put(Full, X* to, vf v) {
  X lanes[W];
  store(lanes, v);
  if constexpr (kStream)
    stream(to, lanes);
  else
    memcpy(to, lanes, sizeof lanes);
  return load(lanes);
}

template <bool kStream, typename X>
FLEXKERNELS_INLINE vf put(Part part, X* to, vf v) {
  X lanes[W];
  store(lanes, v);
  memcpy(to, lanes, part.count * sizeof(X));
  return load(lanes);
}

// the modulation of one segment
template <typename M>
struct Modulation {
  const M *gate, *shift, *scale;
};

// `row_floats` is room for a row of narrow elements as float, which three passes then read
template <typename X, typename M, bool kStream>
FLEXKERNELS_INLINE void forward_row(const NormForward& p, int64_t row, Modulation<M> table, float* row_floats) {
  constexpr bool kBuffer = kStream || sizeof(X) < sizeof(float);
  const int64_t d = p.d;
  const X* x = static_cast<const X*>(p.x) + row * p.x_stride;
  const X* y = p.y ? static_cast<const X*>(p.y) + row * p.y_stride : nullptr;
  X* sum = p.y ? static_cast<X*>(p.sum) + row * d : nullptr;
  // x, or what is written as sum
  const auto value = [&](int64_t i, auto io) {
    const vf base = io.load_from(x + i);
    if (!y) return base;
    const vf other = io.load_from(y + i);
    return put<kStream>(io, sum + i, table.gate ? fma(io.load_from(table.gate + i), other, base) : base + other);
  };
  if (!p.out) {
    for_vectors(0, d, [&](int64_t i, auto io) { value(i, io); });
    return;
  }
  const auto first_pass = [&](auto term) {
    return row_sum(d, [&](int64_t i, auto io) {
      const vf v = value(i, io);
      if (kBuffer) io.store_to(row_floats + i, v);
      return term(v);
    });
  };
  const float total = p.kind == kLayerNorm ? first_pass(Itself{}) : first_pass(Squared{});
  const float* v = row_floats;
  if constexpr (!kBuffer) v = y ? sum : x;
  const Stats stats = row_stats(v, d, p.kind, p.eps, total);
  X* out = static_cast<X*>(p.out) + row * d;
  for_vectors(0, d, [&](int64_t i, auto io) {
    const vf normed = (io.load_from(v + i) - stats.mean) * stats.rstd, by = factor(table.scale, p.kind, i, io);
    put<kStream>(io, out + i, table.shift ? fma(normed, by, io.load_from(table.shift + i)) : normed * by);
  });
}

template <typename M>
const float* widened(const M* from, int64_t d, float* to) {
  if (!from) return nullptr;
  for_vectors(0, d, [&](int64_t i, auto io) { io.store_to(to + i, io.load_from(from + i)); });
  return to;
}

template <typename X, typename M, bool kStream>
void forward_rows(const NormForward& args, int64_t begin, int64_t end) {
  // a copy of our own: the compiler sees that stores cannot change it
  const NormForward p = args;
  constexpr bool kNarrow = sizeof(M) < sizeof(float);
  float* room = new float[4 * p.d];
  Modulation<float> wide{};
  int64_t held = -1;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t s = norm_segment(p.segment, row, p.segments);
    const Modulation<M> table{table_row<M>(p.gate, s), table_row<M>(p.shift, s), table_row<M>(p.scale, s)};
    if (kNarrow && s != held && row + 1 < end && norm_segment(p.segment, row + 1, p.segments) == s) {
      // the rows that follow read it too
      wide = {widened(table.gate, p.d, room + p.d), widened(table.shift, p.d, room + 2 * p.d),
              widened(table.scale, p.d, room + 3 * p.d)};
      held = s;
    }
    if (kNarrow && s == held)
      forward_row<X, float, kStream>(p, row, wide, room);
    else
      forward_row<X, M, kStream>(p, row, table, room);
  }
  delete[] room;
  if (kStream) stream_fence();
}

template <typename X, typename M>
void forward(const NormForward& p, int64_t begin, int64_t end) {
  const bool aligned = can_stream(p.sum) && can_stream(p.out) && p.d * sizeof(X) % kStreamAlign == 0;
  (p.past_cache && aligned ? forward_rows<X, M, true> : forward_rows<X, M, false>)(p, begin, end);
}

// sums over the rows of one segment, [d] each and whole vectors long; null where not wanted
struct ColumnSums {
  float *gate, *shift, *scale;
};

FLEXKERNELS_INLINE void add_to(float* sum, vf value) { store(sum, load(sum) + value); }

// with xhat = (v - mean) * rstd and a = grad_out * factor:
//   layer: dv = rstd * (a - mean(a) - xhat * mean(a * xhat));  rms: without mean(a)
// `ahead`: elements from this row to the next one, which is fetched meanwhile
template <typename X, typename M, bool kStream>
FLEXKERNELS_INLINE void backward_row(const NormBackward& p, const void* ys, int64_t row, int64_t ahead,
                                     const ColumnSums& sums) {
  const int64_t d = p.d, s = norm_segment(p.segment, row, p.segments);
  const auto rows_of = [&](const void* data) { return static_cast<const X*>(data) + (data ? row * d : 0); };
  const X *v = rows_of(p.v), *grad_out = rows_of(p.grad_out), *grad_sum = rows_of(p.grad_sum), *y = rows_of(ys);
  const M *gate = table_row<M>(p.gate, s), *scale = table_row<M>(p.scale, s);
  X *grad_x = const_cast<X*>(rows_of(p.grad_x)), *grad_y = const_cast<X*>(rows_of(p.grad_y));
  float mean = 0, rstd = 0, mean_a = 0, along = 0;
  if (grad_out) {
    const bool layer = p.kind == kLayerNorm;
    const float per = 1.0f / static_cast<float>(d);
    if (layer) mean = per * row_sum(d, [&](int64_t i, auto io) { return io.load_from(v + i); });
    // squares, a, a * (v - mean)
    float totals[3];
    row_sums(d, totals, [&](int64_t i, auto io, vf(&partial)[3]) {
      const vf c = kept(io, io.load_from(v + i) - mean);
      const vf a = io.load_from(grad_out + i) * factor(scale, p.kind, i, io);
      partial[0] = fma(c, c, partial[0]);
      partial[1] += a;
      partial[2] = fma(a, c, partial[2]);
    });
    rstd = rstd_of(totals[0], d, p.eps);
    if (layer) mean_a = per * totals[1];
    along = rstd * (rstd * (per * totals[2]));
  }
  for_vectors(0, d, [&](int64_t i, auto io) {
    vf dv = {};
    if (grad_out) {
      const vf grad = io.load_from(grad_out + i), c = io.load_from(v + i) - mean;
      dv = rstd * fma(-c, vf{} + along, grad * factor(scale, p.kind, i, io) - mean_a);
      if (sums.shift) add_to(sums.shift + i, grad);
      if (sums.scale) add_to(sums.scale + i, grad * (c * rstd));
      __builtin_prefetch(grad_out + i + ahead);
      __builtin_prefetch(v + i + ahead);
    }
    if (grad_sum) {
      dv += io.load_from(grad_sum + i);
      __builtin_prefetch(grad_sum + i + ahead);
    }
    if (sums.gate) {
      add_to(sums.gate + i, dv * io.load_from(y + i));
      __builtin_prefetch(y + i + ahead);
    }
    if (grad_x) put<kStream>(io, grad_x + i, dv);
    if (grad_y) put<kStream>(io, grad_y + i, gate ? dv * io.load_from(gate + i) : dv);
  });
}

// an item is a run of rows
template <typename X, typename M, bool kStream>
void backward_runs(const NormGradients& args, int64_t begin, int64_t end) {
  const NormBackward p = args.rows;
  const NormSums s = args.sums;
  const int64_t padded = (p.d + W - 1) / W * W, runs = (p.n + kNormRows - 1) / kNormRows;
  float* const room = new float[3 * padded]();
  void* const wanted[] = {s.grad_gate, s.grad_shift, s.grad_scale};
  float* sums[3];
  for (int which = 0; which < 3; ++which) sums[which] = wanted[which] ? room + which * padded : nullptr;
  for (int64_t run = begin; run < end; ++run) {
    const int64_t first = run * kNormRows, last = first + kNormRows < p.n ? first + kNormRows : p.n;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = norm_row(s, i), next = i + 1 < p.n ? norm_row(s, i + 1) : row;
      backward_row<X, M, kStream>(p, s.y, row, (next - row) * p.d, {sums[0], sums[1], sums[2]});
      const int64_t segment = norm_segment(p.segment, row, p.segments);
      if (i + 1 < last && norm_segment(p.segment, next, p.segments) == segment) continue;
      for (int which = 0; which < 3; ++which) {
        if (!sums[which]) continue;
        memcpy(norm_slot(s, which, run, segment, runs), sums[which], p.d * sizeof(float));
        memset(sums[which], 0, padded * sizeof(float));
      }
    }
  }
  delete[] room;
  if (kStream) stream_fence();
}

template <typename X, typename M>
void backward(const NormGradients& p, int64_t begin, int64_t end) {
  const NormBackward& r = p.rows;
  const bool aligned = can_stream(r.grad_x) && can_stream(r.grad_y) && r.d * sizeof(X) % kStreamAlign == 0;
  (r.past_cache && aligned ? backward_runs<X, M, true> : backward_runs<X, M, false>)(p, begin, end);
}

// adds the slots of segment `s` for `count` columns
void merge(const NormSums& p, int which, int64_t s, int64_t column, int64_t count, float* to) {
  memset(to, 0, count * sizeof(float));
  const int64_t begin = norm_begin(p, s), end = norm_begin(p, s + 1), runs = (p.n + kNormRows - 1) / kNormRows;
  if (begin >= end) return;
  for (int64_t run = begin / kNormRows; run <= (end - 1) / kNormRows; ++run) {
    const float* from = norm_slot(p, which, run, s, runs) + column;
    for_vectors(0, count,
                [&](int64_t j, auto io) { io.store_to(to + j, io.load_from(to + j) + io.load_from(from + j)); });
  }
}

// gates, and e^-gate of each
template <int N, typename X, typename IO>
FLEXKERNELS_INLINE void load_gates(const X* a, IO io, vf (&gate)[N], vf (&decay)[N]) {
  for (int k = 0; k < N; ++k) {
    gate[k] = io.load_from(a + k * W);
    decay[k] = -gate[k];
  }
  exp_vfs(decay);
}

template <typename X>
void swiglu_rows(const Swiglu& args, int64_t begin, int64_t end) {
  const Swiglu p = args;
  for (int64_t row = begin; row < end; ++row) {
    const X *a = static_cast<const X*>(p.x) + row * p.x_stride, *b = a + p.h;
    X* out = static_cast<X*>(p.out) + row * p.h;
    for_groups<4>(p.h, [&](auto count, int64_t i, auto io) {
      constexpr int N = decltype(count)::value;
      vf gate[N], decay[N];
      load_gates(a + i, io, gate, decay);
      for (int k = 0; k < N; ++k) {
        io.store_to(out + i + k * W, gate[k] * io.load_from(b + i + k * W) / (1.0f + decay[k]));
      }
    });
  }
}

// d silu(a) / da = s * (1 + a * (1 - s)) with s = sigmoid(a)
template <typename X>
void swiglu_backward_rows(const Swiglu& args, int64_t begin, int64_t end) {
  const Swiglu p = args;
  for (int64_t row = begin; row < end; ++row) {
    const X *a = static_cast<const X*>(p.x) + row * p.x_stride, *b = a + p.h;
    const X* grad_out = static_cast<const X*>(p.grad_out) + row * p.h;
    X *grad_a = static_cast<X*>(p.out) + row * 2 * p.h, *grad_b = grad_a + p.h;
    for_groups<4>(p.h, [&](auto count, int64_t i, auto io) {
      constexpr int N = decltype(count)::value;
      vf gate[N], decay[N];
      load_gates(a + i, io, gate, decay);
      for (int k = 0; k < N; ++k) {
        const vf grad = io.load_from(grad_out + i + k * W), s = 1.0f / (1.0f + decay[k]);
        io.store_to(grad_a + i + k * W, grad * io.load_from(b + i + k * W) * s * (1.0f + gate[k] * (1.0f - s)));
        io.store_to(grad_b + i + k * W, grad * gate[k] * s);
      }
    });
  }
}

}  // namespace

void norm_forward_kernel(const NormForward& p, int64_t begin, int64_t end) {
  const bool wide = p.table_dtype == Dtype::f32;
  if (p.dtype == Dtype::f32) forward<float, float>(p, begin, end);
  if (p.dtype == Dtype::bf16) (wide ? forward<bf16, float> : forward<bf16, bf16>)(p, begin, end);
  if (p.dtype == Dtype::f16) (wide ? forward<f16, float> : forward<f16, f16>)(p, begin, end);
}

void norm_backward_kernel(const NormGradients& p, int64_t begin, int64_t end) {
  const bool wide = p.rows.table_dtype == Dtype::f32;
  if (p.rows.dtype == Dtype::f32) backward<float, float>(p, begin, end);
  if (p.rows.dtype == Dtype::bf16) (wide ? backward<bf16, float> : backward<bf16, bf16>)(p, begin, end);
  if (p.rows.dtype == Dtype::f16) (wide ? backward<f16, float> : backward<f16, f16>)(p, begin, end);
}

// an item is one block of columns of one segment
void norm_sums_kernel(const NormSums& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.d + kNormColumns - 1) / kNormColumns;
  void* const sums[] = {p.grad_gate, p.grad_shift, p.grad_scale};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t s = item / blocks, column = item % blocks * kNormColumns;
    const int64_t count = p.d - column < kNormColumns ? p.d - column : kNormColumns;
    for (int which = 0; which < 3; ++which) {
      if (sums[which]) merge(p, which, s, column, count, static_cast<float*>(sums[which]) + s * p.d + column);
    }
  }
}

void swiglu_kernel(const Swiglu& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::f32) swiglu_rows<float>(p, begin, end);
  if (p.dtype == Dtype::bf16) swiglu_rows<bf16>(p, begin, end);
  if (p.dtype == Dtype::f16) swiglu_rows<f16>(p, begin, end);
}

void swiglu_backward_kernel(const Swiglu& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::f32) swiglu_backward_rows<float>(p, begin, end);
  if (p.dtype == Dtype::bf16) swiglu_backward_rows<bf16>(p, begin, end);
  if (p.dtype == Dtype::f16) swiglu_backward_rows<f16>(p, begin, end);
}

}  // namespace flexkernels::FLEXKERNELS_ISA
