// The skinny linear op.
#include "../core/linear.h"

#include "launches.h"
#include "op.h"

namespace flexkernels {
namespace {

// a GPU's kernels count columns in 32 bits
constexpr int64_t kSkinnyMaxColumns = int64_t{1} << 30;

// wrong input raises here; returns the columns of the result
int64_t check_linear(const LinearArgs& a) {
  const Tensor &x = a.x, &weight = a.weight;
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
  STD_TORCH_CHECK(!a.swiglu || n % 2 == 0, "weight must have an even number of rows with swiglu, got ", n);
  STD_TORCH_CHECK(int8 == a.scale.has_value(), "weight_scale must be given with an int8 weight alone, got ",
                  a.scale ? "one" : "none");
  const int64_t outputs = a.swiglu ? n / 2 : n;
  if (a.scale) check_tensor("weight_scale", *a.scale, ScalarType::Float, {n}, x);
  if (a.bias) check_tensor("bias", *a.bias, type, {n}, x);
  if (a.residual) check_tensor("residual", *a.residual, type, {m, outputs}, x);
  if (a.norm) {
    const bool wide = a.norm->scalar_type() == ScalarType::Float;
    check_scalar_type("norm_weight", *a.norm, wide ? ScalarType::Float : type);
    check_numel("norm_weight", *a.norm, k);
    check_device("norm_weight", *a.norm, x);
    check_eps(a.eps);
  }
  return outputs;
}

// Whether the kernel norms x itself, which spares a launch. On the CPU the few rows of x stay in the first cache
// between the two kernels.
bool kernel_norms([[maybe_unused]] const SkinnyLinear& p) {
#ifdef FLEXKERNELS_CUDA
  return cuda::skinny_linear_norms(p);
#else
  return false;
#endif
}

// fills out [m, outputs] from checked tensors
void fill(const LinearArgs& a, bool constant_weight, const Tensor& out) {
  if (out.numel() == 0) return;
  const Tensor weights = as_contiguous(a.weight);
  const OptionalTensor scales = as_contiguous(a.scale), biases = as_contiguous(a.bias);
  const OptionalTensor added = dense_rows(a.residual), norm = as_contiguous(a.norm);
  Tensor rows = dense_rows(a.x);
  SkinnyLinear p{};
  p.x = rows.const_data_ptr();
  p.weight = weights.const_data_ptr();
  p.scale = static_cast<const float*>(data_of(scales));
  p.bias = data_of(biases);
  p.residual = data_of(added);
  p.norm = data_of(norm);
  p.eps = static_cast<float>(a.eps);
  p.out = out.mutable_data_ptr();
  p.m = static_cast<int>(rows.size(0));
  p.k = rows.size(1);
  p.outputs = out.size(1);
  p.x_stride = rows.stride(0);
  p.residual_stride = added ? added->stride(0) : 0;
  p.swiglu = a.swiglu;
  p.constant_weight = constant_weight;
  p.dtype = float_dtype("x", rows);
  p.weight_type = scales ? WeightType::int8 : WeightType::like_x;
  if (norm && (norm->scalar_type() != rows.scalar_type() || !kernel_norms(p))) {
    const Tensor normed = empty(rows, {rows.size(0), rows.size(1)}, rows.scalar_type());
    rms_norm_into(rows, norm->dim() == 1 ? torch::stable::unsqueeze(*norm, 0) : *norm, a.eps, normed);
    rows = normed;
    p.x = rows.const_data_ptr();
    p.x_stride = rows.stride(0);
    p.norm = nullptr;
  }
  FLEXKERNELS_LAUNCH(skinny_linear, p, rows, p.outputs, p.k);
}

Tensor skinny_linear(const Tensor& x, const Tensor& weight, OptionalTensor scale, OptionalTensor bias,
                     OptionalTensor residual, bool swiglu, OptionalTensor norm, double eps) {
  if (norm) check_dim("norm_weight", *norm, 1);
  const LinearArgs a{x, weight, scale, bias, residual, swiglu, norm, eps};
  const int64_t outputs = check_linear(a);
  const Tensor out = empty(x, {x.size(0), outputs}, x.scalar_type());
  fill(a, false, out);
  return out;
}

}  // namespace

void skinny_linear_into(const LinearArgs& a, const Tensor& out) {
  const int64_t outputs = check_linear(a);
  check_tensor("out", out, a.x.scalar_type(), {a.x.size(0), outputs}, a.x);
  check_layout("out", out, a.x);
  fill(a, true, out);
}

}  // namespace flexkernels

FLEXKERNELS_OPS(m) { m.impl("skinny_linear", TORCH_BOX(&flexkernels::skinny_linear)); }
