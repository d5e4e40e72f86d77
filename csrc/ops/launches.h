// What ops made of other ops call: the same checks and kernels, with results in memory of the caller's.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace flexkernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// out = rms_norm(x, weight) with weight [1, d]
void rms_norm_into(const Tensor& x, const Tensor& weight, double eps, const Tensor& out);

// `weight` is not a result of the kernel queued before, which may still run
void skinny_linear_into(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
                        const OptionalTensor& residual, bool swiglu, const Tensor& out);

void kv_append_cpu(const Tensor& qkv, const Tensor& k, const Tensor& v, const Tensor& cache_len, int64_t norm,
                   double eps, OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos, OptionalTensor sin,
                   const Tensor& q);

void decode_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_len,
                          OptionalTensor key_log_weight, double scale, bool causal, const Tensor& out,
                          OptionalTensor lse);

}  // namespace flexkernels
