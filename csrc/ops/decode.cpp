// The decoding ops: schemas and CPU launches. Outputs are allocated by the caller; an op only fills them.
#include "decode.h"

#include "cpu.h"
#include "launches.h"

namespace flexkernels {
namespace {

// query rows of a CPU unit of work, as cpu/decode.cpp has them
constexpr int kTile = 8;

}  // namespace

void decode_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_len,
                          OptionalTensor key_log_weight, double scale, bool causal, const Tensor& out,
                          OptionalTensor lse) {
  DecodeAttention args = decode_attention_args(q, k, v, cache_len, key_log_weight, scale, causal, out, lse);
  int64_t longest = 0, splits = 0, keys = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t length = decode_length(args, b);
    longest = length > longest ? length : longest;
    splits += length <= kDecodeSplit ? 1 : (length + kDecodeSplit - 1) / kDecodeSplit;
    keys += length;
  }
  args.splits = static_cast<int>((longest + kDecodeSplit - 1) / kDecodeSplit);
  const OptionalTensor workspace = decode_workspace(args, q);
  const int64_t tiles = (args.rows + kTile - 1) / kTile, units = args.kv_heads * tiles * splits;
  // a unit reads keys and values and multiplies each by its rows
  const int64_t per_unit =
      (keys / (splits + 1) + 1) * args.head_dim * 2 * ((args.rows < kTile ? args.rows : kTile) + 1) / 2;
  launch(FLEXKERNELS_SELECT(decode_attention_kernel), args, units, per_unit);
  if (!workspace) return;
  const int64_t rows = args.batch * args.kv_heads * args.rows;
  launch(FLEXKERNELS_SELECT(decode_merge_kernel), args, rows, args.splits * args.head_dim);
}

void kv_append_cpu(const Tensor& qkv, const Tensor& k, const Tensor& v, const Tensor& cache_len, int64_t norm,
                   double eps, OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos, OptionalTensor sin,
                   const Tensor& q) {
  const KvAppend args = kv_append_args(qkv, k, v, cache_len, norm, eps, q_weight, k_weight, cos, sin, q);
  launch(FLEXKERNELS_SELECT(kv_append_kernel), args, args.batch * args.n, qkv.size(2));
}

namespace {

void qk_norm_cpu(const Tensor& qk, int64_t norm, double eps, OptionalTensor q_weight, OptionalTensor k_weight,
                 OptionalTensor cos, OptionalTensor sin, OptionalTensor positions, const Tensor& q, const Tensor& k) {
  const QkNorm args = qk_norm_args(qk, norm, eps, q_weight, k_weight, cos, sin, positions, q, k);
  launch(FLEXKERNELS_SELECT(qk_norm_kernel), args, args.total, qk.size(1));
}

void qk_norm_backward_cpu(const Tensor& grad_q, const Tensor& grad_k, const Tensor& qk, int64_t norm, double eps,
                          OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos, OptionalTensor sin,
                          OptionalTensor positions, const Tensor& grad_qk, OptionalTensor grad_weight) {
  const QkNormBackward args = qk_norm_backward_args(grad_q, grad_k, qk, norm, eps, q_weight, k_weight, cos, sin,
                                                    positions, grad_qk, grad_weight);
  launch(FLEXKERNELS_SELECT(qk_norm_backward_kernel), args, qk_norm_chunks(args), kQkNormChunk * qk.size(1));
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flexkernels_native, m) {
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_len, Tensor? key_log_weight, "
      "float softmax_scale, bool causal, Tensor(a!) out, Tensor(b!)? lse) -> ()");
  m.def(
      "kv_append_(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_len, int norm, float eps, "
      "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor(c!) q) -> ()");
  m.def(
      "qk_norm(Tensor qk, int norm, float eps, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
      "Tensor? positions, Tensor(a!) q, Tensor(b!) k) -> ()");
  m.def(
      "qk_norm_backward(Tensor grad_q, Tensor grad_k, Tensor qk, int norm, float eps, Tensor? q_weight, "
      "Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor? positions, Tensor(a!) grad_qk, Tensor(b!)? grad_weight) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&flexkernels::decode_attention_cpu));
  m.impl("kv_append_", TORCH_BOX(&flexkernels::kv_append_cpu));
  m.impl("qk_norm", TORCH_BOX(&flexkernels::qk_norm_cpu));
  m.impl("qk_norm_backward", TORCH_BOX(&flexkernels::qk_norm_backward_cpu));
}
