// CPU launches that ops made of other ops call.
#pragma once

#include "args.h"

namespace flexkernels {

// out = rms_norm(x, weight) with weight [1, d]
void rms_norm_into(const Tensor& x, const Tensor& weight, double eps, const Tensor& out);

void skinny_linear_cpu(const Tensor& x, const Tensor& weight, OptionalTensor scale, OptionalTensor bias,
                       OptionalTensor residual, bool swiglu, const Tensor& out);

void kv_append_cpu(const Tensor& qkv, const Tensor& k, const Tensor& v, const Tensor& cache_len, int64_t norm,
                   double eps, OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos, OptionalTensor sin,
                   const Tensor& q);

void decode_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_len,
                          OptionalTensor key_log_weight, double scale, bool causal, const Tensor& out,
                          OptionalTensor lse);

}  // namespace flexkernels
