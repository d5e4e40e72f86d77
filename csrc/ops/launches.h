// What ops made of other ops call: the same checks and kernels, with results in memory of the caller's.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace flexkernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// out = rms_norm(x, weight) with weight [1, d]
void rms_norm_into(const Tensor& x, const Tensor& weight, double eps, const Tensor& out);

// what skinny_linear takes
struct LinearArgs {
  const Tensor &x, &weight;
  const OptionalTensor &scale, &bias, &residual;
  bool swiglu;
  const OptionalTensor& norm;  // [k] or [1, k]
  double eps;
};

// `weight` is not a result of the kernel queued before, which may still run
void skinny_linear_into(const LinearArgs& a, const Tensor& out);

// appends qkv [batch, n, ..] without a norm; q [batch, n, heads, head_dim]
void kv_append_into(const Tensor& qkv, const Tensor& k, const Tensor& v, const Tensor& cache_len, const Tensor& q);

// out [batch, n, heads, head_dim] with the default scale
void decode_attention_into(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_len, bool causal,
                           const Tensor& out);

}  // namespace flexkernels
