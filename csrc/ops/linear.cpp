// The skinny linear op.
#include "../core/linear.h"

#include "launches.h"
#include "op.h"

namespace flexkernels {
namespace {

// a GPU's kernels count columns in 32 bits
constexpr int64_t kSkinnyMaxColumns = int64_t{1} << 30;

// wrong input raises here; returns the columns of the result
int64_t check_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
                     const OptionalTensor& residual, bool swiglu) {
  check_dim("x", x, 2);
  float_dtype("x", x);
  const ScalarType type = x.scalar_type();
  const int64_t m = x.size(0), k = x.size(1);
  STD_TORCH_CHECK(m <= kSkinnyMaxRows, "x must have at most ", kSkinnyMaxRows, " rows, got ", m);
  STD_TORCH_CHECK(!kCuda || k < kSkinnyMaxColumns, "x must have fewer than ", kSkinnyMaxColumns, " columns, got ", k);
  check_dim("weight", weight, 2);
  const int64_t n = weight.size(0);
  const bool int8 = weight.scalar_type() == ScalarType::Char;
  check_tensor("weight", weight, int8 ? ScalarType::Char : type, {n, k}, x);
  STD_TORCH_CHECK(!swiglu || n % 2 == 0, "weight must have an even number of rows with swiglu, got ", n);
  STD_TORCH_CHECK(int8 == scale.has_value(), "weight_scale must be given with an int8 weight alone, got ",
                  scale ? "one" : "none");
  const int64_t outputs = swiglu ? n / 2 : n;
  if (scale) check_tensor("weight_scale", *scale, ScalarType::Float, {n}, x);
  if (bias) check_tensor("bias", *bias, type, {n}, x);
  if (residual) check_tensor("residual", *residual, type, {m, outputs}, x);
  return outputs;
}

// fills out [m, outputs] from checked tensors
void fill(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
          const OptionalTensor& residual, bool swiglu, bool constant_weight, const Tensor& out) {
  if (out.numel() == 0) return;
  const Tensor rows = dense_rows(x), weights = as_contiguous(weight);
  const OptionalTensor scales = as_contiguous(scale), biases = as_contiguous(bias), added = dense_rows(residual);
  SkinnyLinear p{};
  p.x = rows.const_data_ptr();
  p.weight = weights.const_data_ptr();
  p.scale = static_cast<const float*>(data_of(scales));
  p.bias = data_of(biases);
  p.residual = data_of(added);
  p.out = out.mutable_data_ptr();
  p.m = static_cast<int>(x.size(0));
  p.k = x.size(1);
  p.outputs = out.size(1);
  p.x_stride = rows.stride(0);
  p.residual_stride = added ? added->stride(0) : 0;
  p.swiglu = swiglu;
  p.constant_weight = constant_weight;
  p.dtype = float_dtype("x", x);
  p.weight_type = scale ? WeightType::int8 : WeightType::like_x;
  FLEXKERNELS_LAUNCH(skinny_linear, p, x, p.outputs, p.k);
}

Tensor skinny_linear(const Tensor& x, const Tensor& weight, OptionalTensor scale, OptionalTensor bias,
                     OptionalTensor residual, bool swiglu) {
  const int64_t outputs = check_linear(x, weight, scale, bias, residual, swiglu);
  const Tensor out = empty(x, {x.size(0), outputs}, x.scalar_type());
  fill(x, weight, scale, bias, residual, swiglu, false, out);
  return out;
}

}  // namespace

void skinny_linear_into(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
                        const OptionalTensor& residual, bool swiglu, const Tensor& out) {
  const int64_t outputs = check_linear(x, weight, scale, bias, residual, swiglu);
  check_tensor("out", out, x.scalar_type(), {x.size(0), outputs}, x);
  check_layout("out", out, x);
  fill(x, weight, scale, bias, residual, swiglu, true, out);
}

}  // namespace flexkernels

FLEXKERNELS_OPS(m) { m.impl("skinny_linear", TORCH_BOX(&flexkernels::skinny_linear)); }
