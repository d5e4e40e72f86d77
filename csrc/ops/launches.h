// CPU launches that ops made of other ops call.
#pragma once

#include "args.h"

namespace flexkernels {

// out = rms_norm(x, weight) with weight [1, d]
void rms_norm_into(const Tensor& x, const Tensor& weight, double eps, const Tensor& out);

void skinny_linear_cpu(const Tensor& x, const Tensor& weight, OptionalTensor scale, OptionalTensor bias,
                       OptionalTensor residual, bool swiglu, const Tensor& out);

// appends qkv [batch, n, ..] without a norm; q [batch, n, heads, head_dim]
void kv_append_into(const Tensor& qkv, const Tensor& k, const Tensor& v, const Tensor& cache_len, const Tensor& q);

// out [batch, n, heads, head_dim] with the default scale
void decode_attention_into(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_len, bool causal,
                           const Tensor& out);

}  // namespace flexkernels
