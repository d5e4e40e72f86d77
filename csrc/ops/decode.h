// Tensors of the decoding ops, checked and turned into what the kernels take.
#pragma once

#include "../core/decode.h"
#include "args.h"

namespace flexkernels {

inline void check_dim(const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

inline void check_size(const char* name, const Tensor& t, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ", t.size(dim));
}

// device, dtype and a last dimension of neighbours; the strides of the others go to `strides`
inline void check_rows(const char* name, const Tensor& t, int64_t dim, const Tensor& like, int64_t* strides) {
  check_dim(name, t, dim);
  check_scalar_type(name, t, like.scalar_type());
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of the first argument (index ",
                  like.get_device_index(), "), got another (index ", t.get_device_index(), ")");
  STD_TORCH_CHECK(t.stride(dim - 1) == 1 || t.size(dim - 1) <= 1, name,
                  " must have stride 1 in its last dimension, got ", t.stride(dim - 1));
  for (int64_t d = 0; d + 1 < dim; ++d) strides[d] = t.stride(d);
}

inline int checked_head_dim(int64_t head_dim) {
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= kDecodeMaxHeadDim, "head_dim must lie between 1 and ", kDecodeMaxHeadDim,
                  ", got ", head_dim);
  return static_cast<int>(head_dim);
}

// k and v [batch, kv_heads, max_len, head_dim]
inline void check_caches(const Tensor& k, const Tensor& v, const Tensor& cache_len, const Tensor& like, int64_t batch,
                         int64_t head_dim, int64_t* k_stride, int64_t* v_stride) {
  check_rows("k_cache", k, 4, like, k_stride);
  check_rows("v_cache", v, 4, like, v_stride);
  check_size("k_cache", k, 0, batch);
  check_size("k_cache", k, 3, head_dim);
  STD_TORCH_CHECK(k.size(1) >= 1, "k_cache must have at least 1 head, got ", k.size(1));
  for (int64_t d = 0; d < 4; ++d) check_size("v_cache", v, d, k.size(d));
  check_scalar_type("cache_len", cache_len, ScalarType::Int);
  check_numel("cache_len", cache_len, batch);
  check_layout("cache_len", cache_len, like);
}

// an output, contiguous and of the first argument's dtype
inline void* output(const char* name, const Tensor& t, int64_t numel, const Tensor& like) {
  check_scalar_type(name, t, like.scalar_type());
  check_numel(name, t, numel);
  check_layout(name, t, like);
  return t.mutable_data_ptr();
}

inline DecodeAttention decode_attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache_len,
                                             const OptionalTensor& key_log_weight, double scale, bool causal,
                                             const Tensor& out, const OptionalTensor& lse) {
  DecodeAttention p{};
  p.dtype = float_dtype("q", q);
  check_rows("q", q, 4, q, p.q_stride);
  p.batch = q.size(0);
  p.head_dim = checked_head_dim(q.size(3));
  check_caches(k, v, cache_len, q, p.batch, p.head_dim, p.k_stride, p.v_stride);
  STD_TORCH_CHECK(q.size(1) >= 1 && q.size(1) <= 16, "q must have 1 to 16 tokens a sequence, got ", q.size(1));
  STD_TORCH_CHECK(q.size(2) >= 1 && q.size(2) % k.size(1) == 0, "q must have a multiple of ", k.size(1), " heads, got ",
                  q.size(2));
  p.n = static_cast<int>(q.size(1));
  p.heads = static_cast<int>(q.size(2));
  p.kv_heads = static_cast<int>(k.size(1));
  p.group = p.heads / p.kv_heads;
  p.rows = p.n * p.group;
  p.max_len = k.size(2);
  p.splits = static_cast<int>((p.max_len + kDecodeSplit - 1) / kDecodeSplit);
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.cache_len = read<int32_t>(cache_len);
  p.key_log_weight = read_optional<float>("key_log_weight", key_log_weight, ScalarType::Float, p.batch * p.max_len, q);
  p.out = output("out", out, q.numel(), q);
  if (lse) {
    check_scalar_type("lse", *lse, ScalarType::Float);
    check_numel("lse", *lse, p.batch * p.n * p.heads);
    check_layout("lse", *lse, q);
    p.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  return p;
}

// room for the sums of every split; none where there is only one
inline OptionalTensor decode_workspace(DecodeAttention& p, const Tensor& like) {
  if (p.splits <= 1) return std::nullopt;
  const int64_t sums = p.batch * p.kv_heads * p.splits * p.rows;
  Tensor partial = torch::stable::new_empty(like, {sums * (p.head_dim + 2)}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  return partial;
}

inline HeadNorm head_norm_args(int64_t kind, double eps, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                               const OptionalTensor& cos, const OptionalTensor& sin, int64_t head_dim,
                               const Tensor& like) {
  HeadNorm p{};
  STD_TORCH_CHECK(kind >= kHeadNormNone && kind <= kHeadNormRms, "norm must be 0, 1 or 2, got ", kind);
  p.kind = static_cast<int>(kind);
  p.eps = static_cast<float>(eps);
  p.head_dim = checked_head_dim(head_dim);
  p.q_weight = read_optional<float>("q_weight", q_weight, ScalarType::Float, head_dim, like);
  p.k_weight = read_optional<float>("k_weight", k_weight, ScalarType::Float, head_dim, like);
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together, got one of them");
  if (!cos) return p;
  STD_TORCH_CHECK(head_dim % 2 == 0, "head_dim must be even for a rotary embedding, got ", head_dim);
  check_dim("cos", *cos, 2);
  p.table_rows = cos->size(0);
  STD_TORCH_CHECK(p.table_rows >= 1, "cos must have at least 1 row, got ", p.table_rows);
  p.cos = read_optional<float>("cos", cos, ScalarType::Float, p.table_rows * (head_dim / 2), like);
  p.sin = read_optional<float>("sin", sin, ScalarType::Float, p.table_rows * (head_dim / 2), like);
  return p;
}

inline KvAppend kv_append_args(const Tensor& qkv, const Tensor& k, const Tensor& v, const Tensor& cache_len,
                               int64_t norm, double eps, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                               const OptionalTensor& cos, const OptionalTensor& sin, const Tensor& q) {
  KvAppend p{};
  p.dtype = float_dtype("qkv", qkv);
  check_rows("qkv", qkv, 3, qkv, p.qkv_stride);
  check_dim("q", q, 4);
  const int64_t head_dim = q.size(3);
  p.norm = head_norm_args(norm, eps, q_weight, k_weight, cos, sin, head_dim, qkv);
  p.batch = qkv.size(0);
  p.n = qkv.size(1);
  check_caches(k, v, cache_len, qkv, p.batch, head_dim, p.k_stride, p.v_stride);
  p.heads = static_cast<int>(q.size(2));
  p.kv_heads = static_cast<int>(k.size(1));
  p.max_len = k.size(2);
  check_size("qkv", qkv, 2, (p.heads + 2 * p.kv_heads) * head_dim);
  p.qkv = qkv.const_data_ptr();
  p.k = k.mutable_data_ptr();
  p.v = v.mutable_data_ptr();
  p.cache_len = read<int32_t>(cache_len);
  p.q = output("q", q, p.batch * p.n * p.heads * head_dim, qkv);
  return p;
}

// what QkNorm and QkNormBackward have in common; heads_q and heads_k [total, heads, head_dim] and [total, kv_heads, ..]
template <typename Args>
Args qk_norm_common(const Tensor& qk, int64_t norm, double eps, const OptionalTensor& q_weight,
                    const OptionalTensor& k_weight, const OptionalTensor& cos, const OptionalTensor& sin,
                    const OptionalTensor& positions, const Tensor& heads_q, const Tensor& heads_k) {
  Args p{};
  p.dtype = float_dtype("qk", qk);
  check_rows("qk", qk, 2, qk, &p.qk_stride);
  check_dim("q", heads_q, 3);
  check_dim("k", heads_k, 3);
  p.total = qk.size(0);
  p.heads = static_cast<int>(heads_q.size(1));
  p.kv_heads = static_cast<int>(heads_k.size(1));
  const int64_t head_dim = heads_q.size(2);
  check_size("k", heads_k, 2, head_dim);
  check_size("qk", qk, 1, (p.heads + p.kv_heads) * head_dim);
  p.norm = head_norm_args(norm, eps, q_weight, k_weight, cos, sin, head_dim, qk);
  STD_TORCH_CHECK(cos.has_value() == positions.has_value(),
                  "cos and positions must be given together, got one of them");
  p.positions = read_optional<int32_t>("positions", positions, ScalarType::Int, p.total, qk);
  p.qk = qk.const_data_ptr();
  return p;
}

inline QkNorm qk_norm_args(const Tensor& qk, int64_t norm, double eps, const OptionalTensor& q_weight,
                           const OptionalTensor& k_weight, const OptionalTensor& cos, const OptionalTensor& sin,
                           const OptionalTensor& positions, const Tensor& q, const Tensor& k) {
  QkNorm p = qk_norm_common<QkNorm>(qk, norm, eps, q_weight, k_weight, cos, sin, positions, q, k);
  p.q = output("q", q, p.total * p.heads * p.norm.head_dim, qk);
  p.k = output("k", k, p.total * p.kv_heads * p.norm.head_dim, qk);
  return p;
}

inline int64_t qk_norm_chunks(const QkNormBackward& p) { return (p.total + kQkNormChunk - 1) / kQkNormChunk; }

inline QkNormBackward qk_norm_backward_args(const Tensor& grad_q, const Tensor& grad_k, const Tensor& qk, int64_t norm,
                                            double eps, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                            const OptionalTensor& cos, const OptionalTensor& sin,
                                            const OptionalTensor& positions, const Tensor& grad_qk,
                                            const OptionalTensor& grad_weight) {
  QkNormBackward p =
      qk_norm_common<QkNormBackward>(qk, norm, eps, q_weight, k_weight, cos, sin, positions, grad_q, grad_k);
  p.grad_q = output("grad_q", grad_q, p.total * p.heads * p.norm.head_dim, qk);
  p.grad_k = output("grad_k", grad_k, p.total * p.kv_heads * p.norm.head_dim, qk);
  p.grad_qk = output("grad_qk", grad_qk, qk.numel(), qk);
  STD_TORCH_CHECK(grad_weight.has_value() == (q_weight || k_weight),
                  "grad_weight must be given with a weight and only then, got ", grad_weight ? "one" : "none");
  if (grad_weight) {
    check_scalar_type("grad_weight", *grad_weight, ScalarType::Float);
    check_numel("grad_weight", *grad_weight, qk_norm_chunks(p) * 2 * p.norm.head_dim);
    check_layout("grad_weight", *grad_weight, qk);
    p.grad_weight = static_cast<float*>(grad_weight->mutable_data_ptr());
  }
  return p;
}

}  // namespace flexkernels
