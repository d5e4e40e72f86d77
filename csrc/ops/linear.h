// Tensors of the skinny linear op, checked and turned into what the kernels take.
#pragma once

#include "../core/linear.h"
#include "args.h"

namespace flexkernels {

inline SkinnyLinear skinny_linear_args(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                       const OptionalTensor& bias, const OptionalTensor& residual, bool swiglu,
                                       const Tensor& out) {
  SkinnyLinear p{};
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x and weight must have 2 dimensions, got ", x.dim(), " and ",
                  weight.dim());
  const int64_t m = x.size(0), n = weight.size(0);
  p.k = x.size(1);
  STD_TORCH_CHECK(m <= kSkinnyMaxRows, "x must have at most ", kSkinnyMaxRows, " rows, got ", m);
  STD_TORCH_CHECK(weight.size(1) == p.k, "weight must have ", p.k, " columns like x, got ", weight.size(1));
  STD_TORCH_CHECK(!swiglu || n % 2 == 0, "weight must have an even number of rows with swiglu, got ", n);
  STD_TORCH_CHECK(p.k <= 1 || x.stride(1) == 1, "x must have contiguous rows, got stride ", x.stride(1));
  p.dtype = float_dtype("x", x);
  p.weight_type = weight.scalar_type() == ScalarType::Char ? WeightType::int8 : WeightType::like_x;
  STD_TORCH_CHECK((p.weight_type == WeightType::int8) == scale.has_value(),
                  "weight_scale must be given with an int8 weight alone, got ", scale ? "one" : "none");
  if (p.weight_type == WeightType::like_x) check_scalar_type("weight", weight, x.scalar_type());
  check_layout("weight", weight, x);
  p.outputs = swiglu ? n / 2 : n;
  p.scale = read_optional<float>("weight_scale", scale, ScalarType::Float, n, x);
  if (bias) {
    check_scalar_type("bias", *bias, x.scalar_type());
    check_numel("bias", *bias, n);
    check_layout("bias", *bias, x);
    p.bias = bias->const_data_ptr();
  }
  if (residual) {
    check_scalar_type("residual", *residual, x.scalar_type());
    STD_TORCH_CHECK(residual->dim() == 2 && residual->size(0) == m && residual->size(1) == p.outputs,
                    "residual must have the shape of the result, got another");
    STD_TORCH_CHECK(p.outputs <= 1 || residual->stride(1) == 1, "residual must have contiguous rows, got stride ",
                    residual->stride(1));
    p.residual = residual->const_data_ptr();
    p.residual_stride = residual->stride(0);
  }
  check_scalar_type("out", out, x.scalar_type());
  check_numel("out", out, m * p.outputs);
  check_layout("out", out, x);
  p.x = x.const_data_ptr();
  p.x_stride = x.stride(0);
  p.weight = weight.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.m = static_cast<int>(m);
  p.swiglu = swiglu;
  return p;
}

}  // namespace flexkernels
