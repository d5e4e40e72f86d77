// What the ops of attention take, forward and backward: a layout is the list of tensors that flexkernels/layout.py
// names.
#pragma once

#include <math.h>

#include <algorithm>
#include <vector>

#include "../core/attention.h"
#include "op.h"

namespace flexkernels {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// LayoutTensors of flexkernels/layout.py
enum LayoutTensor : int { kCuSeqlens, kFrame, kRank, kCuSeqlensK, kFrameK, kRankK, kReach, kRows, kTiles, kPtr, kRuns };
constexpr size_t kLayoutTensors = 15;

// [rows, heads, head_dim] whose rows and heads may be strided
inline void check_heads(const char* name, const Tensor& t, const Tensor& q) {
  check_dim(name, t, 3);
  check_scalar_type(name, t, q.scalar_type());
  check_device(name, t, q);
  STD_TORCH_CHECK(t.size(2) == q.size(2), name, " must have head_dim ", q.size(2), " like q, got ", t.size(2));
}

inline const int32_t* read_ints(const char* name, const Tensor& t, int64_t dim, int64_t least, const Tensor& like) {
  check_scalar_type(name, t, ScalarType::Int);
  check_dim(name, t, dim);
  check_layout(name, t, like);
  STD_TORCH_CHECK(t.numel() >= least, name, " must have at least ", least, " elements, got ", t.numel());
  return read<int32_t>(t);
}

inline AttentionMask checked_mask(int64_t mask, const Ints& cross) {
  STD_TORCH_CHECK(mask >= kMaskFull && mask <= kMaskFrameCausalPrefix, "mask must be 0, 1, 2 or 3, got ", mask);
  STD_TORCH_CHECK(cross.size() == 4, "cross must have 4 entries, got ", cross.size());
  AttentionMask made{static_cast<int>(mask), {}};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(cross[i] >= kCrossNone && cross[i] <= kCrossCausal, "cross must hold 0, 1 or 2, got ", cross[i]);
    made.cross[i] = static_cast<int>(cross[i]);
  }
  return made;
}

// offsets [batch + 1] must start at 0, never fall, and end at `tokens`, within `rows`; returns the longest sequence
inline int check_cu_seqlens(const char* name, const int32_t* offsets, int64_t batch, int64_t rows, int64_t tokens) {
  STD_TORCH_CHECK(offsets[0] == 0, name, " must start at 0, got ", offsets[0]);
  int longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(offsets[b] <= offsets[b + 1], name, " must not fall, got ", offsets[b], " before ", offsets[b + 1]);
    longest = std::max(longest, offsets[b + 1] - offsets[b]);
  }
  STD_TORCH_CHECK(offsets[batch] == tokens && tokens <= rows, name, " must end with its ", tokens,
                  " frames, within the ", rows, " rows, got ", offsets[batch]);
  return longest;
}

// tiles must ascend and, with their rows and keys, stay inside their sequence; returns the most rows of one
inline int check_plan(const AttentionForward& p, int64_t runs) {
  STD_TORCH_CHECK(p.ptr[0] == 0 && p.ptr[p.tile_count] == runs, "ptr must run from 0 to ", runs, ", got ", p.ptr[0],
                  " to ", p.ptr[p.tile_count]);
  int32_t row = 0, sequence = 0, most = 0;
  for (int64_t i = 0; i < p.tile_count; ++i) {
    const int32_t *tile = p.tile(i), *rows = p.rows + i * p.tile_rows, count = tile[2] - tile[1];
    STD_TORCH_CHECK(sequence <= tile[0] && tile[0] < p.batch, "tiles must ascend among ", p.batch, " sequences, got ",
                    tile[0], " after ", sequence);
    STD_TORCH_CHECK(tile[1] == row && count >= 1 && count <= p.tile_rows, "tiles must have 1 to ", p.tile_rows,
                    " rows, counted on from ", row, ", got ", tile[1], " to ", tile[2]);
    row = tile[2];
    sequence = tile[0];
    most = std::max(most, count);
    const int32_t *q = p.cu_seqlens_q + sequence, *k = p.cu_seqlens_k + sequence;
    for (int32_t r = 0; r < count; ++r) {
      STD_TORCH_CHECK(q[0] <= rows[r] && rows[r] < q[1] && (r == 0 || rows[r - 1] < rows[r]),
                      "rows must ascend inside their sequences, got ", rows[r], " in sequence ", sequence);
    }
    STD_TORCH_CHECK(p.ptr[i] <= p.ptr[i + 1], "ptr must not fall, got ", p.ptr[i], " before ", p.ptr[i + 1]);
    for (int64_t j = p.ptr[i]; j < p.ptr[i + 1] && j < runs; ++j) {
      const int32_t* run = p.runs + 3 * j;
      STD_TORCH_CHECK(k[0] <= run[0] && run[0] < run[1] && run[1] <= k[1],
                      "runs must lie inside their sequences, got keys ", run[0], " to ", run[1], " of sequence ",
                      sequence);
    }
  }
  STD_TORCH_CHECK(row == p.cu_seqlens_q[p.batch], "tiles must hold all ", p.cu_seqlens_q[p.batch], " rows, got ", row);
  return most;
}

inline void check_weights(const float* weights, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(isfinite(weights[i]), "key_log_weight must be finite, got ", weights[i]);
  }
}

// the arguments of a call, checked, and what keeps their pointers alive
class AttentionArguments {
 public:
  AttentionArguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensors& layout,
                     const OptionalTensor& key_log_weight, int64_t mask, const Ints& cross,
                     std::optional<double> softmax_scale)
      : kept_{dense_rows(q), dense_rows(k), dense_rows(v)}, weight_(as_contiguous(key_log_weight)) {
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
    p.q = kept_[0].const_data_ptr();
    p.k = kept_[1].const_data_ptr();
    p.v = kept_[2].const_data_ptr();
    p.q_row = kept_[0].stride(0);
    p.q_head = kept_[0].stride(1);
    p.k_row = kept_[1].stride(0);
    p.k_head = kept_[1].stride(1);
    p.v_row = kept_[2].stride(0);
    p.v_head = kept_[2].stride(1);
    p.mask = checked_mask(mask, cross);
    const double scale = softmax_scale ? *softmax_scale : 1 / sqrt(static_cast<double>(p.head_dim));
    STD_TORCH_CHECK(isfinite(scale), "softmax_scale must be finite, got ", scale);
    p.softmax_scale = static_cast<float>(scale);
    if (weight_) check_dim("key_log_weight", *weight_, 1);
    p.key_log_weight = read_optional<float>("key_log_weight", weight_, ScalarType::Float, p.total_k, q);
    if (const OptionalTensor values = readable(weight_)) check_weights(read<float>(*values), p.total_k);
    take(layout, q);
  }

  AttentionForward p{};

 private:
  void take(const Tensors& layout, const Tensor& q) {
    STD_TORCH_CHECK(layout.size() == kLayoutTensors, "layout must hold ", kLayoutTensors, " tensors, got ",
                    layout.size());
    p.cu_seqlens_q = read_ints("cu_seqlens", layout[kCuSeqlens], 1, 1, q);
    p.batch = layout[kCuSeqlens].numel() - 1;
    p.cu_seqlens_k = read_ints("cu_seqlens_k", layout[kCuSeqlensK], 1, p.batch + 1, q);
    const int64_t rows = layout[kFrame].numel(), keys = layout[kFrameK].numel();
    p.q_frame = read_ints("frame", layout[kFrame], 1, 0, q);
    p.q_rank = read_ints("rank", layout[kRank], 1, rows, q);
    p.k_frame = read_ints("frame_k", layout[kFrameK], 1, 0, q);
    p.k_rank = read_ints("rank_k", layout[kRankK], 1, keys, q);
    p.used_q = rows;
    p.reach = read_ints("reach", layout[kReach], 1, 0, q);
    const bool switched = p.mask.code == kMaskFrameCausalPrefix &&
                          std::any_of(p.mask.cross, p.mask.cross + 4, [](int rule) { return rule != kCrossFull; });
    check_numel("reach", layout[kReach], switched ? 0 : rows);
    if (switched) p.reach = nullptr;
    p.tiles = read_ints("tiles", layout[kTiles], 2, 0, q);
    p.tile_count = layout[kTiles].size(0);
    check_size("tiles", layout[kTiles], 1, kAttentionTileColumns);
    p.rows = read_ints("rows", layout[kRows], 2, 0, q);
    check_size("rows", layout[kRows], 0, p.tile_count);
    p.tile_rows = static_cast<int>(layout[kRows].size(1));
    p.ptr = read_ints("ptr", layout[kPtr], 1, 0, q);
    check_numel("ptr", layout[kPtr], p.tile_count + 1);
    p.runs = read_ints("runs", layout[kRuns], 2, 0, q);
    check_size("runs", layout[kRuns], 1, 3);
    if (values_are_checked()) check_values(layout, rows, keys);
    STD_TORCH_CHECK(rows <= p.total_q && keys <= p.total_k, "q and k must have at least the layout's ", rows, " and ",
                    keys, " rows, got ", p.total_q, " and ", p.total_k);
  }

  // in the host's memory; finds out what the CPU's kernels need room for
  void check_values(const Tensors& layout, int64_t rows, int64_t keys) {
    const auto host = [&](LayoutTensor which) { return on_host(layout[which]); };
    const Tensor kept[] = {host(kCuSeqlens), host(kCuSeqlensK), host(kTiles), host(kRows), host(kPtr), host(kRuns)};
    AttentionForward seen = p;
    seen.cu_seqlens_q = read<int32_t>(kept[0]);
    seen.cu_seqlens_k = read<int32_t>(kept[1]);
    seen.tiles = read<int32_t>(kept[2]);
    seen.rows = read<int32_t>(kept[3]);
    seen.ptr = read<int32_t>(kept[4]);
    seen.runs = read<int32_t>(kept[5]);
    check_cu_seqlens("cu_seqlens", seen.cu_seqlens_q, p.batch, p.total_q, rows);
    p.max_keys = check_cu_seqlens("cu_seqlens_k", seen.cu_seqlens_k, p.batch, p.total_k, keys);
    p.max_rows = check_plan(seen, layout[kRuns].size(0));
  }

  Tensor kept_[3];
  OptionalTensor weight_;
};

}  // namespace flexkernels
