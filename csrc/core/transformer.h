// One token a row through a stack of transformer blocks, as one persistent kernel takes it.
#pragma once

#include "dtype.h"

namespace flexkernels {

// layers of one launch, whose pointers are kernel arguments (4 KB); a deeper stack takes several launches
constexpr int kStepLayers = 24;
constexpr int kStepMaxRows = 8, kStepMaxWidth = 2048, kStepMaxHidden = 6144;
// ranges of keys of one head, each a unit of attention; a constant, so that a row's bits depend on its own keys alone
constexpr int kStepSplits = 2;

struct StepMatrix {
  const void* weight;  // [n, k]
  const float* scale;  // [n] of int8, or null
};

// norms [width]; qkv [3 width, width]; proj, cross_q, cross_proj [width, width]; w13 [2 hidden, width]; w2 [width,
// hidden]; cross_k, cross_v [contexts, heads, cross_max, head_dim]
struct StepLayer {
  const void *norm_attn, *norm_cross, *norm_mlp;
  StepMatrix qkv, proj, cross_q, cross_proj, w13, w2;
  const void *cross_k, *cross_v;
};

// strides in elements; the last dimension of every cache has stride 1
struct StepKeys {
  int64_t k_stride[3], v_stride[3];  // of a row, a head, a position
  int64_t max_len;
  const int32_t* length;  // a row's, or a context's
};

struct TransformerStep {
  void* x;                   // [rows, width], in place
  uint32_t* words;           // `step_words` of them, see transformer.cu
  void *k, *v;               // caches of the first layer
  int64_t k_layer, v_layer;  // strides from layer to layer
  StepKeys keys, cross;
  int layers, rows, width, hidden, heads, head_dim, contexts;  // contexts 0: no cross-attention
  float eps;
  Dtype dtype;
  bool int8;
  StepLayer layer[kStepLayers];
};

// words of a result of attention: head_dim values, then the logarithm of its weight (four words, whole 16 bytes)
FLEXKERNELS_HD int step_part(int head_dim) { return head_dim + 4; }

// what the blocks tell each other: x [rows, width], q k v [rows, 3 width], hidden [rows, hidden], attention [rows,
// heads, splits, step_part]
FLEXKERNELS_HD int64_t step_words(const TransformerStep& p) {
  const int64_t part = static_cast<int64_t>(p.heads) * kStepSplits * step_part(p.head_dim);
  return p.rows * (4 * static_cast<int64_t>(p.width) + p.hidden + part);
}

}  // namespace flexkernels
