// Guided flow step: per row one pass for the sums APG needs, one that writes x_next.
#include "../core/flow.h"

#include "kernels.h"
#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

// body(i, io) over the elements [begin, end): whole vectors, then the rest
template <typename Body>
inline void for_vectors(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + W <= end; i += W) body(i, Full{});
  if (i < end) body(i, Part{static_cast<int>(end - i)});
}

// a float64 total of float32 partial sums, each of at most kBlock terms a lane
constexpr int64_t kBlock = 8;

struct Sum {
  vd low = {}, high = {};

  void add(vf partial) {
    vd partial_low, partial_high;
    widen<vd, vf_half>(partial, &partial_low, &partial_high);
    low += partial_low;
    high += partial_high;
  }

  double total() const {
    const vd both = low + high;
    double sum = 0;
    for (int lane = 0; lane < W / 2; ++lane) sum += both[lane];
    return sum;
  }
};

// d = v_cond - v_uncond (+ momentum * buffer)
template <typename V, typename IO>
inline vf difference(const FlowStep& p, int64_t i, vf v_cond, IO io) {
  vf d = v_cond - io.load_from(static_cast<const V*>(p.v_uncond) + i);
  if (p.momentum_buffer) d += p.momentum * io.load_from(p.momentum_buffer + i);
  return d;
}

template <typename X, typename V>
inline __attribute__((always_inline)) FlowCoefficients<double> coefficients(const FlowStep& p, int64_t begin,
                                                                            int64_t end) {
  if (p.guidance != kFlowAPG) return flow_plain<double>(p);
  Sum dd, dc, cc;
  for (int64_t block = begin; block < end; block += kBlock * W) {
    vf block_dd = {}, block_dc = {}, block_cc = {};
    for_vectors(block, end - block < kBlock * W ? end : block + kBlock * W, [&](int64_t i, auto io) {
      const vf c = io.load_from(static_cast<const V*>(p.v_cond) + i);
      const vf d = difference<V>(p, i, c, io);
      // the second pass finds its own operands on their way
      __builtin_prefetch(static_cast<const X*>(p.x) + i);
      __builtin_prefetch(static_cast<const X*>(p.x_next) + i, 1);
      block_dd += d * d;
      block_dc += d * c;
      block_cc += c * c;
    });
    dd.add(block_dd);
    dc.add(block_dc);
    cc.add(block_cc);
  }
  return flow_apg<double>(p, dd.total(), dc.total(), cc.total());
}

template <typename X>
void write_prefix(const FlowStep& p, int64_t row, int64_t begin) {
  if (!p.prefix) return;
  X* out = static_cast<X*>(p.x_next) + begin;
  const int64_t first = p.prefix_offsets[row], last = p.prefix_offsets[row + 1];
  for (int64_t i = first; i < last; ++i) from_float(flow_prefix(p, i), out + (i - first));
}

template <typename X, typename V>
inline __attribute__((always_inline)) void step_row(const FlowStep& p, int64_t row) {
  const int64_t begin = flow_row_begin(p, row), end = flow_row_begin(p, row + 1);
  const FlowCoefficients<double> k = coefficients<X, V>(p, begin, end);
  const float alpha = static_cast<float>(k.alpha), beta = static_cast<float>(k.beta), dt = p.dt;
  for_vectors(begin, end, [&](int64_t i, auto io) {
    const vf c = io.load_from(static_cast<const V*>(p.v_cond) + i);
    vf v = alpha * c;
    if (p.guidance != kFlowNone) {
      const vf d = difference<V>(p, i, c, io);
      v += beta * d;
      if (p.momentum_next) io.store_to(p.momentum_next + i, d);
    }
    const vf x = io.load_from(static_cast<const X*>(p.x) + i);
    io.store_to(static_cast<X*>(p.x_next) + i, x + dt * v);
  });
  write_prefix<X>(p, row, begin);
}

template <typename X, typename V>
void step_rows(const FlowStep& args, int64_t begin, int64_t end) {
  // a copy of our own: the compiler sees that stores to x_next cannot change it
  const FlowStep p = args;
  for (int64_t row = begin; row < end; ++row) step_row<X, V>(p, row);
}

template <typename X>
void step_of_v(const FlowStep& p, int64_t begin, int64_t end) {
  if (p.v_dtype == Dtype::f32) step_rows<X, float>(p, begin, end);
  if (p.v_dtype == Dtype::bf16) step_rows<X, bf16>(p, begin, end);
  if (p.v_dtype == Dtype::f16) step_rows<X, f16>(p, begin, end);
}

}  // namespace

void flow_step_kernel(const FlowStep& p, int64_t begin, int64_t end) {
  if (p.x_dtype == Dtype::f32) step_of_v<float>(p, begin, end);
  if (p.x_dtype == Dtype::bf16) step_of_v<bf16>(p, begin, end);
  if (p.x_dtype == Dtype::f16) step_of_v<f16>(p, begin, end);
}

}  // namespace flexkernels::FLEXKERNELS_ISA
