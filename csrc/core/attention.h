// Attention over packed ragged sequences: what forward and backward take, and the mask predicate.
#pragma once

#include "dtype.h"

namespace flexkernels {

constexpr int kAttentionMaxHeadDim = 256;
constexpr int kAttentionMaxCudaHeadDim = 128;

enum AttentionMaskCode : int { kMaskFull, kMaskCausal, kMaskFrameCausal, kMaskFrameCausalPrefix };
enum AttentionCrossCode : int { kCrossNone, kCrossFull, kCrossCausal };

struct AttentionMask {
  int code;
  // how a query of an earlier frame's (prefix, register) keys sees them: [2 * query is register + key is register]
  int cross[4];
};

// (query, key) of one sequence under frame_causal_prefix with its switches; every other mask is a reach. Ints is
// int32_t or a vector of them, the result nonzero where the query sees the key.
template <typename Ints>
FLEXKERNELS_HD auto attention_visible(const AttentionMask& mask, int32_t q_frame, int32_t q_rank, Ints k_frame,
                                      Ints k_rank) -> decltype((k_frame <= k_rank) & 1) {
  const int* cross = mask.cross + (q_rank >= 0 ? 2 : 0);
  const auto not_later = k_rank <= q_rank;
  const auto prefix = (not_later | -int{cross[0] == kCrossFull}) & -int{cross[0] != kCrossNone};
  const auto suffix = (not_later | -int{cross[1] == kCrossFull}) & -int{cross[1] != kCrossNone};
  const auto earlier = ((k_rank < 0) & prefix) | ((k_rank >= 0) & suffix);
  return ((k_frame == q_frame) & not_later) | ((k_frame < q_frame) & earlier);
}

// columns of a tile, as core/plan.h lists them
constexpr int kAttentionTileColumns = 8;

struct AttentionForward {
  const void *q, *k, *v;  // [total_q, heads, head_dim], [total_k, kv_heads, head_dim]: rows and heads strided
  void* out;              // [total_q, heads, head_dim]
  float* lse;             // [heads, total_q]
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides in elements
  int64_t total_q, total_k, batch, tile_count;
  int64_t used_q;                                      // rows of queries that the layout holds, the first of total_q
  const int32_t *cu_seqlens_q, *cu_seqlens_k;          // [batch + 1]
  const int32_t *q_frame, *q_rank, *k_frame, *k_rank;  // a token each
  const int32_t* reach;         // [total_q] end of the keys that a row sees; null with cross-frame switches
  const int32_t* rows;          // [tile_count, tile_rows] the rows of each tile
  const int32_t* tiles;         // [tile_count, 8] sequence, first row (counted tile by tile), end row, ...
  const int32_t* ptr;           // [tile_count + 1]
  const int32_t* runs;          // [ptr[tile_count], 3] first key, end key, full
  const float* key_log_weight;  // [total_k] or null
  AttentionMask mask;
  int heads, kv_heads, head_dim;
  int tile_rows;
  int max_keys, max_rows;  // of one sequence, of one tile
  float softmax_scale;
  Dtype dtype;
  char* scratch;  // a thread's own, 64-byte aligned

  FLEXKERNELS_HD_MEMBER const int32_t* tile(int64_t i) const { return tiles + kAttentionTileColumns * i; }
  FLEXKERNELS_HD_MEMBER int rows_of(int64_t i) const { return tile(i)[2] - tile(i)[1]; }
};

struct AttentionBackward {
  AttentionForward forward;  // with its results
  const void* grad_out;      // [total_q, heads, head_dim]: rows and heads strided
  int64_t grad_row, grad_head;
  void *dq, *dk, *dv;  // like q, k, v, contiguous
};

// item i of [0, tile_count * kv_heads): sequence by sequence, key head by key head, query tile by query tile
struct AttentionItem {
  int64_t tile;
  int kv_head;
};

// the first query tile of sequence `sequence` or a later one
FLEXKERNELS_HD int64_t attention_first_tile(const AttentionForward& p, int64_t sequence) {
  int64_t low = 0, high = p.tile_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.tile(middle)[0] < sequence) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

FLEXKERNELS_HD AttentionItem attention_item(const AttentionForward& p, int64_t item) {
  const int64_t sequence = p.tile(item / p.kv_heads)[0];
  const int64_t first = attention_first_tile(p, sequence), tiles = attention_first_tile(p, sequence + 1) - first;
  const int64_t local = item - first * p.kv_heads;
  return {first + local % tiles, static_cast<int>(local / tiles)};
}

}  // namespace flexkernels
