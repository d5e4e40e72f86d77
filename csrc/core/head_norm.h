// Norm and rotary embedding of query and key heads: the append to a key-value cache, and the same for packed tokens.
#pragma once

#include <math.h>

#include "dtype.h"

namespace flexkernels {

constexpr int kHeadNormMaxDim = 256;
// tokens that share one partial sum of the weights' gradients
constexpr int kQkNormChunk = 32;

enum HeadNormKind : int { kHeadNormNone = 0, kHeadNormLayer = 1, kHeadNormRms = 2 };

// x_hat = (x - mean) / sqrt(var + eps) or x / sqrt(mean(x^2) + eps); y = weight * x_hat;
// z_i = y_i cos_i - y_{i + half} sin_i,  z_{i + half} = y_{i + half} cos_i + y_i sin_i  for i < half = head_dim / 2
struct HeadNorm {
  const float* q_weight;  // [head_dim] or null
  const float* k_weight;
  const float* cos;  // [table_rows, head_dim / 2] or null
  const float* sin;
  int64_t table_rows;
  int kind, head_dim;
  float eps;
};

// a position outside the table is moved to its nearest row
FLEXKERNELS_HD int64_t rotary_row(const HeadNorm& p, int64_t position) {
  const int64_t row = position < 0 ? 0 : position >= p.table_rows ? p.table_rows - 1 : position;
  return row * (p.head_dim / 2);
}

FLEXKERNELS_HD float head_rstd(const HeadNorm& p, float sum_of_squares) {
  return p.kind == kHeadNormNone ? 1.0f : 1.0f / sqrtf(sum_of_squares / static_cast<float>(p.head_dim) + p.eps);
}

struct KvAppend {
  HeadNorm norm;
  const void* qkv;  // [batch, n, (heads + 2 * kv_heads) * head_dim]
  void* k;          // [batch, kv_heads, max_len, head_dim]
  void* v;
  const int32_t* cache_len;  // [batch]
  void* q;                   // [batch, n, heads, head_dim]
  int64_t qkv_stride[2], k_stride[3], v_stride[3];
  int64_t batch, n, max_len;
  int heads, kv_heads;
  Dtype dtype;
};

// cache position of new token i of sequence b, or -1 where the sequence does not fit its cache
FLEXKERNELS_HD int64_t append_position(const KvAppend& p, int64_t b, int64_t i) {
  const int64_t length = p.cache_len[b];
  return length < p.n || length > p.max_len ? -1 : length - p.n + i;
}

struct QkNorm {
  HeadNorm norm;
  const void* qk;            // [total, (heads + kv_heads) * head_dim], rows qk_stride apart
  const int32_t* positions;  // [total] or null
  void* q;                   // [total, heads, head_dim]
  void* k;                   // [total, kv_heads, head_dim]
  int64_t total, qk_stride;
  int heads, kv_heads;
  Dtype dtype;
};

// with y and z as above: dy = dz turned back, dx_hat = weight * dy, d weight = sum of dy * x_hat,
// dx = rstd * (dx_hat - mean(dx_hat) - x_hat * mean(dx_hat * x_hat)); root mean square: without mean(dx_hat)
struct QkNormBackward {
  HeadNorm norm;
  const void* qk;
  const int32_t* positions;
  const void* grad_q;  // [total, heads, head_dim]
  const void* grad_k;  // [total, kv_heads, head_dim]
  void* grad_qk;       // [total, (heads + kv_heads) * head_dim]
  float* grad_weight;  // [ceil(total / kQkNormChunk), 2, head_dim], the parts of q_weight and k_weight, or null
  int64_t total, qk_stride;
  int heads, kv_heads;
  Dtype dtype;
};

}  // namespace flexkernels
