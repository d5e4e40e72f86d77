// Attention of a few new tokens over a key-value cache.
#pragma once

#include <math.h>

#include "dtype.h"

namespace flexkernels {

constexpr int kDecodeMaxHeadDim = 256;
// keys of one split; a constant, so that a row's arithmetic depends on its own length alone
constexpr int kDecodeSplit = 256;
// the same on tensor cores, where a block holds a split's keys and values in registers
FLEXKERNELS_HD int decode_mma_split(int head_dim) { return head_dim <= 64 ? 256 : 128; }
// floats that a row's sums take there: whole packs of 4
FLEXKERNELS_HD int decode_pitch(int head_dim) { return (head_dim + 3) / 4 * 4; }
// query rows that share one pass over keys and values on the CPU
constexpr int kDecodeTile = 8;

// row r of a kv head is query r / group of its query head r % group
struct DecodeAttention {
  const void* q;  // [batch, n, heads, head_dim]
  const void* k;  // [batch, kv_heads, max_len, head_dim]
  const void* v;
  const int32_t* cache_len;     // [batch]
  const float* key_log_weight;  // [batch, max_len] or null
  float* partial;               // per row and split: sums, then (after all of those) maximum and total
  void* out;                    // [batch, n, heads, head_dim]
  float* lse;                   // [batch, n, heads] or null
  int32_t* done;                // on the CPU, [batch, kv_heads, tiles]: how many splits are, from 0
  int64_t q_stride[3], k_stride[3], v_stride[3];  // in elements; the last dimension has stride 1
  int64_t batch, max_len;
  int n, heads, kv_heads, group, head_dim, rows, splits;  // group = heads / kv_heads, rows = n * group
  float scale;
  bool causal;
  Dtype dtype;
};

// keys that any query of sequence b may see; a length outside the cache is cut to it
FLEXKERNELS_HD int64_t decode_length(const DecodeAttention& p, int64_t b) {
  const int64_t length = p.cache_len[b];
  return length < 0 ? 0 : length > p.max_len ? p.max_len : length;
}

// splits of a sequence; one without keys has one, for its results
FLEXKERNELS_HD int decode_splits(int64_t length) {
  return length <= kDecodeSplit ? 1 : static_cast<int>((length + kDecodeSplit - 1) / kDecodeSplit);
}

// tiles of the rows of a kv head on the CPU
inline int decode_tiles(const DecodeAttention& p) { return (p.rows + kDecodeTile - 1) / kDecodeTile; }

// keys that row r sees: the first `decode_visible`
FLEXKERNELS_HD int64_t decode_visible(const DecodeAttention& p, int64_t length, int r) {
  return p.causal ? length - p.n + 1 + r / p.group : length;
}

FLEXKERNELS_HD int64_t decode_query(const DecodeAttention& p, int64_t b, int kv_head, int r) {
  return b * p.q_stride[0] + r / p.group * p.q_stride[1] + (kv_head * p.group + r % p.group) * p.q_stride[2];
}

// index of (b, query, head) in lse; times head_dim, in out
FLEXKERNELS_HD int64_t decode_out(const DecodeAttention& p, int64_t b, int kv_head, int r) {
  return (b * p.n + r / p.group) * p.heads + kv_head * p.group + r % p.group;
}

// exp(score - maximum), where no key at all has maximum -inf; NaN stays NaN
FLEXKERNELS_HD float decode_exp(float score, float maximum) {
  return expf(score - (maximum == -INFINITY ? 0.0f : maximum));
}

FLEXKERNELS_HD float decode_lse(float maximum, float total) {
  return total == 0.0f ? -INFINITY : maximum + logf(total);
}

}  // namespace flexkernels
