// Structured attention.
#include "attention.h"

#include <tuple>

#ifndef FLEXKERNELS_CUDA
#include "attention_parts.h"
#endif

namespace flexkernels {
namespace {

#ifdef FLEXKERNELS_CUDA

void check_device_kernel(const AttentionForward& p) {
  STD_TORCH_CHECK(p.dtype != Dtype::f32, "q must have dtype bfloat16 or float16 for the CUDA kernel, got float32");
  STD_TORCH_CHECK(p.head_dim <= kAttentionMaxCudaHeadDim, "head_dim must be at most ", kAttentionMaxCudaHeadDim,
                  " for the CUDA kernel, got ", p.head_dim);
}

void run_forward(const AttentionForward& p, const Tensor& like) {
  check_device_kernel(p);
  FLEXKERNELS_LAUNCH(attention, p, like, p.total_q, 0);
}

#else

// rows of no sequence: out 0, lse -inf
void clear_rest(const AttentionForward& p) {
  const int64_t used = p.used_q, rest = p.total_q - used;
  if (rest == 0) return;
  const int64_t row = static_cast<int64_t>(p.heads) * p.head_dim * (p.dtype == Dtype::f32 ? 4 : 2);
  memset(static_cast<char*>(p.out) + used * row, 0, rest * row);
  for (int head = 0; head < p.heads; ++head) std::fill_n(p.lse + head * p.total_q + used, rest, -INFINITY);
}

void run_forward(const AttentionForward& p, const Tensor& like) {
  clear_rest(p);
  if (p.tile_count == 0 || p.heads == 0) return;
  const int64_t threads = useful_threads(p);
  const Ints bounds = threads == 1 ? Ints{0, p.tile_count * p.kv_heads} : equal_shares(p, threads);
  const auto kernel = FLEXKERNELS_SELECT(attention_forward_kernel);
  run_parts(threads, FLEXKERNELS_SELECT(attention_scratch_bytes)(p), like, [&](int64_t part, char* scratch) {
    AttentionForward own = p;
    own.scratch = scratch;
    kernel(own, bounds[part], bounds[part + 1]);
  });
}

#endif

// out like q, lse [heads, total_q]
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, Tensors layout,
                                     OptionalTensor key_log_weight, int64_t mask, Ints cross,
                                     std::optional<double> softmax_scale) {
  AttentionArguments given(q, k, v, layout, key_log_weight, mask, cross, softmax_scale);
  AttentionForward& p = given.p;
  const Tensor out = empty(q, {p.total_q, p.heads, p.head_dim}, q.scalar_type());
  const Tensor lse = empty(q, {p.heads, p.total_q}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_forward(p, q);
  return {out, lse};
}

}  // namespace
}  // namespace flexkernels

FLEXKERNELS_OPS(m) { m.impl("attention", TORCH_BOX(&flexkernels::attention)); }
