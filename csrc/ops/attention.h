// Tensors of the attention ops, checked and turned into what the kernels take.
#pragma once

#include <vector>

#include "../core/attention.h"
#include "args.h"

namespace flexkernels {

// [rows, heads, head_dim] whose rows and heads may be strided
inline void check_heads(const char* name, const Tensor& t, const Tensor& q) {
  STD_TORCH_CHECK(t.dim() == 3, name, " must have shape [rows, heads, head_dim], got ", t.dim(), " dimensions");
  check_scalar_type(name, t, q.scalar_type());
  STD_TORCH_CHECK(t.device() == q.device(), name, " must be on the device of q (index ", q.get_device_index(),
                  "), got another (index ", t.get_device_index(), ")");
  STD_TORCH_CHECK(t.size(2) == q.size(2), name, " must have head_dim ", q.size(2), " like q, got ", t.size(2));
  STD_TORCH_CHECK(t.stride(2) == 1 || t.size(2) == 1, name, " must have a contiguous last dimension, got stride ",
                  t.stride(2));
}

// int32 [n] or [n, columns]
inline const int32_t* read_int32(const char* name, const Tensor& t, int64_t least, const Tensor& like) {
  check_scalar_type(name, t, ScalarType::Int);
  check_layout(name, t, like);
  STD_TORCH_CHECK(t.numel() >= least, name, " must have at least ", least, " elements, got ", t.numel());
  return read<int32_t>(t);
}

inline int64_t plan_rows(const char* name, const Tensor& t, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == columns, name, " must have shape [n, ", columns, "], got ", t.dim(),
                  " dimensions and ", t.numel(), " elements");
  return t.size(0);
}

inline AttentionMask attention_mask(int64_t mask, const std::vector<int64_t>& cross) {
  STD_TORCH_CHECK(mask >= kMaskFull && mask <= kMaskFrameCausalPrefix, "mask must be 0, 1, 2 or 3, got ", mask);
  STD_TORCH_CHECK(cross.size() == 4, "cross must have 4 entries, got ", cross.size());
  AttentionMask made{static_cast<int>(mask), {}};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(cross[i] >= kCrossNone && cross[i] <= kCrossCausal, "cross must hold 0, 1 or 2, got ", cross[i]);
    made.cross[i] = static_cast<int>(cross[i]);
  }
  return made;
}

// what can be told without looking at values
inline AttentionForward attention_forward_args(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                               const Tensor& q_frame, const Tensor& q_rank, const Tensor& k_frame,
                                               const Tensor& k_rank, const Tensor& q_tiles, const Tensor& k_ptr,
                                               const Tensor& k_tiles, const OptionalTensor& key_log_weight,
                                               int64_t mask, const std::vector<int64_t>& cross, double softmax_scale,
                                               const Tensor& out, const OptionalTensor& lse) {
  AttentionForward p{};
  p.dtype = float_dtype("q", q);
  check_heads("q", q, q);
  check_heads("k", k, q);
  check_heads("v", v, q);
  STD_TORCH_CHECK(q.size(2) >= 1 && q.size(2) <= kAttentionMaxHeadDim, "head_dim must lie between 1 and ",
                  kAttentionMaxHeadDim, ", got ", q.size(2));
  STD_TORCH_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1), "v must have k's ", k.size(0), " rows and ",
                  k.size(1), " heads, got ", v.size(0), " and ", v.size(1));
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q must have a multiple of k's ", k.size(1),
                  " heads, got ", q.size(1));
  STD_TORCH_CHECK(q.size(0) <= INT32_MAX && k.size(0) <= INT32_MAX, "q and k must have fewer than 2**31 rows, got ",
                  q.size(0), " and ", k.size(0));
  p.total_q = q.size(0);
  p.total_k = k.size(0);
  p.heads = static_cast<int>(q.size(1));
  p.kv_heads = static_cast<int>(k.size(1));
  p.head_dim = static_cast<int>(q.size(2));
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_row = q.stride(0);
  p.q_head = q.stride(1);
  p.k_row = k.stride(0);
  p.k_head = k.stride(1);
  p.v_row = v.stride(0);
  p.v_head = v.stride(1);

  STD_TORCH_CHECK(cu_seqlens_q.numel() >= 1 && cu_seqlens_q.numel() == cu_seqlens_k.numel(),
                  "cu_seqlens_q and cu_seqlens_k must have batch + 1 elements, got ", cu_seqlens_q.numel(), " and ",
                  cu_seqlens_k.numel());
  p.batch = cu_seqlens_q.numel() - 1;
  p.cu_seqlens_q = read_int32("cu_seqlens_q", cu_seqlens_q, 1, q);
  p.cu_seqlens_k = read_int32("cu_seqlens_k", cu_seqlens_k, 1, q);
  p.q_frame = read_int32("q_frame", q_frame, 0, q);
  p.q_rank = read_int32("q_rank", q_rank, q_frame.numel(), q);
  p.k_frame = read_int32("k_frame", k_frame, 0, q);
  p.k_rank = read_int32("k_rank", k_rank, k_frame.numel(), q);
  p.tiles = plan_rows("q_tiles", q_tiles, 4);
  plan_rows("k_tiles", k_tiles, 3);
  p.q_tiles = read_int32("q_tiles", q_tiles, 0, q);
  p.k_tiles = read_int32("k_tiles", k_tiles, 0, q);
  check_numel("k_ptr", k_ptr, p.tiles + 1);
  p.k_ptr = read_int32("k_ptr", k_ptr, 0, q);
  p.key_log_weight = read_optional<float>("key_log_weight", key_log_weight, ScalarType::Float, p.total_k, q);
  p.mask = attention_mask(mask, cross);
  p.softmax_scale = static_cast<float>(softmax_scale);
  check_scalar_type("out", out, q.scalar_type());
  check_numel("out", out, q.numel());
  check_layout("out", out, q);
  p.out = out.mutable_data_ptr();
  p.lse = const_cast<float*>(read_optional<float>("lse", lse, ScalarType::Float, p.total_q * p.heads, q));
  return p;
}

}  // namespace flexkernels
