// Tensors of the flow ops, checked and turned into what the kernels take.
#pragma once

#include "../core/flow.h"
#include "args.h"

namespace flexkernels {

inline FlowStep flow_step_args(const Tensor& x, const Tensor& v_cond, const OptionalTensor& v_uncond,
                               const OptionalTensor& momentum_buffer, const OptionalTensor& row_offsets, int64_t rows,
                               double dt, int64_t guidance, double scale, double threshold, double eta, double momentum,
                               const OptionalTensor& prefix, const OptionalTensor& prefix_offsets,
                               const OptionalTensor& prefix_noise, double prefix_time, const Tensor& x_next,
                               const OptionalTensor& momentum_next) {
  FlowStep p{};
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

  p.x = x.const_data_ptr();
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
  p.row_offsets = read_optional<int64_t>("row_offsets", row_offsets, ScalarType::Long, rows + 1, x);
  p.prefix_offsets = read_optional<int64_t>("prefix_offsets", prefix_offsets, ScalarType::Long, rows + 1, x);
  const int64_t prefix_total = prefix ? prefix->numel() : 0;
  p.prefix = read_optional<float>("prefix", prefix, ScalarType::Float, prefix_total, x);
  p.prefix_noise = read_optional<float>("prefix_noise", prefix_noise, ScalarType::Float, prefix_total, x);
  p.x_next = x_next.mutable_data_ptr();
  p.rows = rows;
  p.row_length = rows ? total / rows : 0;
  p.guidance = static_cast<int>(guidance);
  p.dt = static_cast<float>(dt);
  p.scale = static_cast<float>(scale);
  p.threshold = static_cast<float>(threshold);
  p.eta = static_cast<float>(eta);
  p.momentum = static_cast<float>(momentum);
  p.prefix_time = static_cast<float>(prefix_time);
  return p;
}

}  // namespace flexkernels
