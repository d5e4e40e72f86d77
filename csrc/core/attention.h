// Attention over packed ragged sequences: what forward and backward take, and the mask predicate.
#pragma once

#include "dtype.h"

namespace flexkernels {

constexpr int kAttentionMaxHeadDim = 256;

enum AttentionMaskCode : int { kMaskFull, kMaskCausal, kMaskFrameCausal, kMaskFrameCausalPrefix };
enum AttentionCrossCode : int { kCrossNone, kCrossFull, kCrossCausal };

struct AttentionMask {
  int code;
  // how a query of an earlier frame's (prefix, register) keys sees them: [2 * query is register + key is register]
  int cross[4];
};

// a query token; position counts from the first key: causal masks are aligned at the last query and the last key
struct AttentionQuery {
  int32_t position, frame, rank;
};

// (query, key) of one sequence; Ints is int32_t or a vector of them, the result nonzero where the query sees the key
template <typename Ints>
FLEXKERNELS_HD auto attention_visible(const AttentionMask& mask, const AttentionQuery& q, Ints k_position, Ints k_frame,
                                      Ints k_rank) -> decltype((k_frame <= k_rank) & 1) {
  if (mask.code == kMaskFull) return (k_position == k_position) & -1;
  if (mask.code == kMaskCausal) return (k_position <= q.position) & -1;
  if (mask.code == kMaskFrameCausal) return (k_frame <= q.frame) & -1;
  const int* cross = mask.cross + (q.rank >= 0 ? 2 : 0);
  const auto not_later = k_rank <= q.rank;
  const auto prefix = (not_later | -int{cross[0] == kCrossFull}) & -int{cross[0] != kCrossNone};
  const auto suffix = (not_later | -int{cross[1] == kCrossFull}) & -int{cross[1] != kCrossNone};
  const auto earlier = ((k_rank < 0) & prefix) | ((k_rank >= 0) & suffix);
  return ((k_frame == q.frame) & not_later) | ((k_frame < q.frame) & earlier);
}

struct AttentionForward {
  const void *q, *k, *v;  // [total_q, heads, head_dim], [total_k, kv_heads, head_dim]: rows and heads strided
  void* out;              // [total_q, heads, head_dim]
  float* lse;             // [total_q, heads] or null
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides in elements
  int64_t total_q, total_k, batch, tiles;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;          // [batch + 1]
  const int32_t *q_frame, *q_rank, *k_frame, *k_rank;  // a token each
  const int32_t* q_tiles;                              // [tiles, 4] sequence, first row, end row, 0
  const int32_t* k_ptr;                                // [tiles + 1]
  const int32_t* k_tiles;                              // [k_ptr[tiles], 3] first key, end key, full
  const float* key_log_weight;                         // [total_k] or null
  AttentionMask mask;
  int heads, kv_heads, head_dim;
  int max_keys;  // of one sequence
  float softmax_scale;
  Dtype dtype;
  char* scratch;  // a thread's own, 64-byte aligned
};

struct AttentionBackward {
  AttentionForward forward;  // with its results
  const void* grad_out;      // [total_q, heads, head_dim]: rows and heads strided
  int64_t grad_row, grad_head;
  void *dq, *dk, *dv;  // like q, k, v, contiguous
};

// item i of [0, tiles * kv_heads): sequence by sequence, key head by key head, query tile by query tile
struct AttentionItem {
  int64_t tile;
  int kv_head;
};

// the first query tile of sequence `sequence` or a later one
FLEXKERNELS_HD int64_t attention_first_tile(const AttentionForward& p, int64_t sequence) {
  int64_t low = 0, high = p.tiles;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.q_tiles[4 * middle] < sequence) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

FLEXKERNELS_HD AttentionItem attention_item(const AttentionForward& p, int64_t item) {
  const int64_t sequence = p.q_tiles[item / p.kv_heads * 4];
  const int64_t first = attention_first_tile(p, sequence), tiles = attention_first_tile(p, sequence + 1) - first;
  const int64_t local = item - first * p.kv_heads;
  return {first + local % tiles, static_cast<int>(local / tiles)};
}

}  // namespace flexkernels
