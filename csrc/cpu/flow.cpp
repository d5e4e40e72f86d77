// Guided flow update: per row one pass for the sums that some guidance needs, one that writes x_next.
#include "../core/flow.h"

#include "dispatch.h"
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
inline vf difference(const FlowUpdate& p, int64_t i, vf v_cond, IO io) {
  vf d = v_cond - io.load_from(static_cast<const V*>(p.v_uncond) + i);
  if (p.momentum_buffer) d += p.momentum * io.load_from(p.momentum_buffer + i);
  return d;
}

// totals of what body(i, io, partial) adds to its Count float32 sums, which restart with every block
template <int Count, typename Body>
inline void sum_row(int64_t begin, int64_t end, double (&totals)[Count], Body body) {
  Sum sums[Count];
  for (int64_t block = begin; block < end; block += kBlock * W) {
    vf partial[Count] = {};
    for_vectors(block, end - block < kBlock * W ? end : block + kBlock * W,
                [&](int64_t i, auto io) { body(i, io, partial); });
    for (int s = 0; s < Count; ++s) sums[s].add(partial[s]);
  }
  for (int s = 0; s < Count; ++s) totals[s] = sums[s].total();
}

// the second pass finds its own operands on their way
template <typename X>
inline void prefetch(const FlowUpdate& p, int64_t i) {
  __builtin_prefetch(static_cast<const X*>(p.x[0]) + i);
  __builtin_prefetch(static_cast<const X*>(p.x_next) + i, 1);
}

template <typename X, typename V>
inline FlowCoefficients<double> apg(const FlowUpdate& p, int64_t begin, int64_t end) {
  double totals[3];
  sum_row(begin, end, totals, [&](int64_t i, auto io, vf(&partial)[3]) {
    const vf c = io.load_from(static_cast<const V*>(p.v_cond) + i);
    const vf d = difference<V>(p, i, c, io);
    prefetch<X>(p, i);
    partial[0] += d * d;
    partial[1] += d * c;
    partial[2] += c * c;
  });
  return flow_apg<double>(p, totals[0], totals[1], totals[2]);
}

// zero beyond the row, where a load gives zero but a difference does not
inline vf keep(Full, vf v) { return v; }

inline vf keep(Part part, vf v) {
  for (int lane = part.count; lane < W; ++lane) v[lane] = 0;
  return v;
}

template <typename X, typename V>
inline FlowCoefficients<double> rescaled(const FlowUpdate& p, int64_t begin, int64_t end) {
  if (begin == end) return flow_plain<double>(p);
  const float gain = p.scale - 1, first_c = to_float(static_cast<const V*>(p.v_cond)[begin]);
  const float first_g = first_c + gain * (first_c - to_float(static_cast<const V*>(p.v_uncond)[begin]));
  double totals[4];
  sum_row(begin, end, totals, [&](int64_t i, auto io, vf(&partial)[4]) {
    const vf v = io.load_from(static_cast<const V*>(p.v_cond) + i);
    const vf c = keep(io, v - first_c), g = keep(io, v + gain * difference<V>(p, i, v, io) - first_g);
    prefetch<X>(p, i);
    partial[0] += c;
    partial[1] += c * c;
    partial[2] += g;
    partial[3] += g * g;
  });
  return flow_rescaled<double>(p, static_cast<double>(end - begin), totals[0], totals[1], totals[2], totals[3]);
}

template <typename X, typename V>
inline FlowCoefficients<double> coefficients(const FlowUpdate& p, int64_t begin, int64_t end) {
  if (p.guidance == kFlowAPG) return apg<X, V>(p, begin, end);
  return flow_needs_sums(p) ? rescaled<X, V>(p, begin, end) : flow_plain<double>(p);
}

template <typename X>
void write_prefix(const FlowUpdate& p, int64_t row, int64_t begin) {
  if (!p.prefix) return;
  X* out = static_cast<X*>(p.x_next) + begin;
  const int64_t first = flow_prefix_begin(p, row), last = flow_prefix_begin(p, row + 1);
  for (int64_t i = first; i < last; ++i) from_float(flow_prefix(p, i), out + (i - first));
}

// kGuided: there is a direction d. kEuler: one state, no past, nothing but x_next to write.
template <typename X, typename V, bool kGuided, bool kEuler>
inline __attribute__((always_inline)) void update_row(const FlowUpdate& p, int64_t begin, int64_t end,
                                                      FlowCoefficients<double> k) {
  const float alpha = static_cast<float>(k.alpha), beta = static_cast<float>(k.beta), a = p.a[0], b = p.b;
  for_vectors(begin, end, [&](int64_t i, auto io) {
    const vf c = io.load_from(static_cast<const V*>(p.v_cond) + i);
    vf v = alpha * c;
    if constexpr (kGuided) {
      const vf d = difference<V>(p, i, c, io);
      v += beta * d;
      if (!kEuler && p.momentum_next) io.store_to(p.momentum_next + i, d);
    }
    vf x = a * io.load_from(static_cast<const X*>(p.x[0]) + i) + b * v;
    if constexpr (!kEuler) {
      for (int s = 1; s < p.states; ++s) x += p.a[s] * io.load_from(static_cast<const X*>(p.x[s]) + i);
      for (int s = 0; s < p.pasts; ++s) x += p.past_b[s] * io.load_from(p.past[s] + i);
      if (p.velocity) io.store_to(p.velocity + i, v);
    }
    io.store_to(static_cast<X*>(p.x_next) + i, x);
  });
}

// `p` with its scalars as members, less the terms whose number is 0
FlowUpdate with_numbers(FlowUpdate p) {
  if (!p.scalars) return p;
  int states = 0, pasts = 0;
  for (int s = 0; s < p.states; ++s) {
    p.a[states] = flow_a(p, s);
    p.x[states] = p.x[s];
    states += s == 0 || p.a[states] != 0;
  }
  for (int s = 0; s < p.pasts; ++s) {
    p.past_b[pasts] = flow_past_b(p, s);
    p.past[pasts] = p.past[s];
    pasts += p.past_b[pasts] != 0;
  }
  p.states = states;
  p.pasts = pasts;
  p.b = flow_b(p);
  p.scale = flow_scale(p);
  p.prefix_time = flow_prefix_time(p);
  p.scalars = nullptr;
  return p;
}

template <typename X, typename V>
void update_rows(const FlowUpdate& args, int64_t begin, int64_t end) {
  // a copy of our own: the compiler sees that stores to x_next cannot change it
  const FlowUpdate p = with_numbers(args);
  const bool guided = p.guidance != kFlowNone;
  const bool euler = p.states == 1 && p.pasts == 0 && !p.velocity && !p.momentum_next;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = flow_row_begin(p, row), last = flow_row_begin(p, row + 1);
    const FlowCoefficients<double> k = coefficients<X, V>(p, first, last);
    if (guided && euler) update_row<X, V, true, true>(p, first, last, k);
    if (guided && !euler) update_row<X, V, true, false>(p, first, last, k);
    if (!guided && euler) update_row<X, V, false, true>(p, first, last, k);
    if (!guided && !euler) update_row<X, V, false, false>(p, first, last, k);
    write_prefix<X>(p, row, first);
  }
}

}  // namespace

void flow_update_kernel(const FlowUpdate& p, int64_t begin, int64_t end) {
  with_float(p.x_dtype, [&](auto x) {
    with_float(p.v_dtype, [&](auto v) { update_rows<decltype(x), decltype(v)>(p, begin, end); });
  });
}

}  // namespace flexkernels::FLEXKERNELS_ISA
