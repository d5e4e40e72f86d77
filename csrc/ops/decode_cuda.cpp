// The CUDA launches of the decoding ops.
#include "cuda.h"
#include "decode.h"

namespace flexkernels {
namespace {

void decode_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_len,
                           OptionalTensor key_log_weight, double scale, bool causal, const Tensor& out,
                           OptionalTensor lse) {
  DecodeAttention args = decode_attention_args(q, k, v, cache_len, key_log_weight, scale, causal, out, lse);
  STD_TORCH_CHECK(args.batch <= 65535, "q must have at most 65535 sequences, got ", args.batch);
  const OptionalTensor workspace = decode_workspace(args, q);
  if (args.batch > 0) launch(cuda::decode_attention_launch, args, q);
}

void kv_append_cuda(const Tensor& qkv, const Tensor& k, const Tensor& v, const Tensor& cache_len, int64_t norm,
                    double eps, OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos,
                    OptionalTensor sin, const Tensor& q) {
  const KvAppend args = kv_append_args(qkv, k, v, cache_len, norm, eps, q_weight, k_weight, cos, sin, q);
  if (args.batch * args.n > 0) launch(cuda::kv_append_launch, args, qkv);
}

void qk_norm_cuda(const Tensor& qk, int64_t norm, double eps, OptionalTensor q_weight, OptionalTensor k_weight,
                  OptionalTensor cos, OptionalTensor sin, OptionalTensor positions, const Tensor& q, const Tensor& k) {
  const QkNorm args = qk_norm_args(qk, norm, eps, q_weight, k_weight, cos, sin, positions, q, k);
  if (args.total > 0) launch(cuda::qk_norm_launch, args, qk);
}

void qk_norm_backward_cuda(const Tensor& grad_q, const Tensor& grad_k, const Tensor& qk, int64_t norm, double eps,
                           OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos, OptionalTensor sin,
                           OptionalTensor positions, const Tensor& grad_qk, OptionalTensor grad_weight) {
  const QkNormBackward args = qk_norm_backward_args(grad_q, grad_k, qk, norm, eps, q_weight, k_weight, cos, sin,
                                                    positions, grad_qk, grad_weight);
  if (args.total > 0) launch(cuda::qk_norm_backward_launch, args, qk);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&flexkernels::decode_attention_cuda));
  m.impl("kv_append_", TORCH_BOX(&flexkernels::kv_append_cuda));
  m.impl("qk_norm", TORCH_BOX(&flexkernels::qk_norm_cuda));
  m.impl("qk_norm_backward", TORCH_BOX(&flexkernels::qk_norm_backward_cuda));
}
