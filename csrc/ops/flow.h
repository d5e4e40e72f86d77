// Tensors of the flow ops, checked and turned into what the kernels take.
#pragma once

#include <vector>

#include "../core/flow.h"
#include "args.h"

namespace flexkernels {

using Tensors = std::vector<Tensor>;
using Weights = std::vector<double>;

// the states x, *more_x and the past velocities with their weights
inline void flow_terms(const Tensor& x, const Tensors& more_x, const Tensors& past, const Weights& a,
                       const Weights& past_b, FlowUpdate& p) {
  STD_TORCH_CHECK(more_x.size() < kFlowMaxTerms, "more_x must hold at most ", kFlowMaxTerms - 1, " tensors, got ",
                  more_x.size());
  STD_TORCH_CHECK(past.size() <= kFlowMaxTerms, "past must hold at most ", kFlowMaxTerms, " tensors, got ",
                  past.size());
  STD_TORCH_CHECK(a.size() == more_x.size() + 1, "a must have ", more_x.size() + 1, " entries, got ", a.size());
  STD_TORCH_CHECK(past_b.size() == past.size(), "past_b must have ", past.size(), " entries, got ", past_b.size());
  p.states = static_cast<int>(a.size());
  p.pasts = static_cast<int>(past.size());
  p.x[0] = x.const_data_ptr();
  for (size_t i = 0; i < more_x.size(); ++i) {
    check_scalar_type("more_x", more_x[i], x.scalar_type());
    check_numel("more_x", more_x[i], x.numel());
    check_layout("more_x", more_x[i], x);
    p.x[i + 1] = more_x[i].const_data_ptr();
  }
  for (size_t i = 0; i < a.size(); ++i) p.a[i] = static_cast<float>(a[i]);
  for (size_t j = 0; j < past.size(); ++j) {
    p.past[j] = read_optional<float>("past", past[j], ScalarType::Float, x.numel(), x);
    p.past_b[j] = static_cast<float>(past_b[j]);
  }
}

inline FlowUpdate flow_update_args(const Tensor& x, const Tensor& v_cond, const OptionalTensor& v_uncond,
                                   const OptionalTensor& momentum_buffer, const OptionalTensor& row_offsets,
                                   const OptionalTensor& prefix, const OptionalTensor& prefix_offsets,
                                   const OptionalTensor& prefix_noise, const Tensors& more_x, const Tensors& past,
                                   int64_t rows, const Weights& a, double b, const Weights& past_b, int64_t guidance,
                                   double scale, double threshold, double eta, double momentum, double rescale,
                                   double prefix_time, const Tensor& x_next, const OptionalTensor& momentum_next,
                                   const OptionalTensor& velocity) {
  FlowUpdate p{};
  const int64_t total = x.numel();
  p.x_dtype = float_dtype("x", x);
  p.v_dtype = float_dtype("v_cond", v_cond);
  check_layout("x", x, x);
  check_layout("v_cond", v_cond, x);
  check_numel("v_cond", v_cond, total);
  check_scalar_type("x_next", x_next, x.scalar_type());
  check_numel("x_next", x_next, total);
  check_layout("x_next", x_next, x);

  STD_TORCH_CHECK(guidance >= kFlowNone && guidance <= kFlowAPG, "guidance must be 0, 1 or 2, got ", guidance);
  STD_TORCH_CHECK(guidance == kFlowNone || v_uncond, "v_uncond must be given when guidance is ", guidance,
                  ", got none");
  STD_TORCH_CHECK(guidance == kFlowAPG || (!momentum_buffer && !momentum_next),
                  "momentum_buffer and momentum_next must be absent unless guidance is 2, got guidance ", guidance);
  STD_TORCH_CHECK(rows >= 0, "rows must not be negative, got ", rows);
  STD_TORCH_CHECK(row_offsets || (rows ? total % rows == 0 : total == 0), "rows must divide the ", total,
                  " elements of x, got ", rows);
  STD_TORCH_CHECK(prefix.has_value() == prefix_offsets.has_value(),
                  "prefix and prefix_offsets must be given together, got one of them");
  STD_TORCH_CHECK(prefix || !prefix_noise, "prefix must be given with prefix_noise, got none");

  flow_terms(x, more_x, past, a, past_b, p);
  p.v_cond = v_cond.const_data_ptr();
  if (v_uncond && guidance != kFlowNone) {
    check_scalar_type("v_uncond", *v_uncond, v_cond.scalar_type());
    check_numel("v_uncond", *v_uncond, total);
    check_layout("v_uncond", *v_uncond, x);
    p.v_uncond = v_uncond->const_data_ptr();
  }
  p.momentum_buffer = read_optional<float>("momentum_buffer", momentum_buffer, ScalarType::Float, total, x);
  p.momentum_next =
      const_cast<float*>(read_optional<float>("momentum_next", momentum_next, ScalarType::Float, total, x));
  p.velocity = const_cast<float*>(read_optional<float>("velocity", velocity, ScalarType::Float, total, x));
  p.row_offsets = read_optional<int64_t>("row_offsets", row_offsets, ScalarType::Long, rows + 1, x);
  p.prefix_offsets = read_optional<int64_t>("prefix_offsets", prefix_offsets, ScalarType::Long, rows + 1, x);
  const int64_t prefix_total = prefix ? prefix->numel() : 0;
  p.prefix = read_optional<float>("prefix", prefix, ScalarType::Float, prefix_total, x);
  p.prefix_noise = read_optional<float>("prefix_noise", prefix_noise, ScalarType::Float, prefix_total, x);
  p.x_next = x_next.mutable_data_ptr();
  p.rows = rows;
  p.row_length = rows ? total / rows : 0;
  p.guidance = static_cast<int>(guidance);
  p.b = static_cast<float>(b);
  p.scale = static_cast<float>(scale);
  p.threshold = static_cast<float>(threshold);
  p.eta = static_cast<float>(eta);
  p.momentum = static_cast<float>(momentum);
  p.rescale = static_cast<float>(rescale);
  p.prefix_time = static_cast<float>(prefix_time);
  return p;
}

}  // namespace flexkernels
