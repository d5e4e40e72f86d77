// A step of transformer blocks as the arguments of the persistent kernel (cuda/transformer.cu).
#pragma once

#include <string>
#include <vector>

#include "../core/transformer.h"
#include "op.h"

namespace flexkernels {

using Tensors = std::vector<Tensor>;

// a checked step; `persistent`: whether one kernel must or must not serve it
struct Step {
  const Tensor &x, &k_cache, &v_cache, &cache_len;
  const Tensors &norms, &weights, &scales, &cross;
  const OptionalTensor& cross_len;
  double eps;

  int64_t layers() const { return k_cache.size(0); }
};

// whole 16 bytes lie together, wherever a head's channels begin
inline bool in_packs(const Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16) return false;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    if (t.size(d) > 1 && t.stride(d) * static_cast<int64_t>(t.element_size()) % 16) return false;
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  }
  return true;
}

// what tensors alone say against one kernel: where they lie. Empty: nothing
inline std::string step_layout_refusal(const Step& s) {
  const auto all = {&s.norms, &s.weights, &s.cross};
  for (const Tensor* t : {&s.x, &s.k_cache, &s.v_cache}) {
    if (!in_packs(*t)) return "x and the caches must begin on 16 bytes, as every position of a head must";
  }
  for (const Tensors* list : all) {
    for (const Tensor& t : *list) {
      if (!in_packs(t)) return "weights and contexts must begin on 16 bytes, as every position of a head must";
    }
  }
  for (size_t i = 0; i < s.cross.size(); ++i) {
    if (!same_strides(s.cross[i], s.cross[i % 2])) return "contexts of all layers must have the same strides";
  }
  return "";
}

inline StepKeys step_keys(const Tensor& k, const Tensor& v, int64_t first_dim, const Tensor& length) {
  StepKeys keys{};
  for (int64_t d = 0; d < 3; ++d) {
    keys.k_stride[d] = k.stride(first_dim + d);
    keys.v_stride[d] = v.stride(first_dim + d);
  }
  keys.max_len = k.size(first_dim + 2);
  keys.length = read<int32_t>(length);
  return keys;
}

// all but the layers and the words; lengths must be contiguous
inline TransformerStep step_shape(const Step& s) {
  TransformerStep p{};
  p.x = s.x.mutable_data_ptr();
  p.k = s.k_cache.mutable_data_ptr();
  p.v = s.v_cache.mutable_data_ptr();
  p.k_layer = s.k_cache.stride(0);
  p.v_layer = s.v_cache.stride(0);
  p.keys = step_keys(s.k_cache, s.v_cache, 1, s.cache_len);
  p.rows = static_cast<int>(s.x.size(0));
  p.width = static_cast<int>(s.x.size(1));
  p.hidden = static_cast<int>(s.weights.back().size(1));
  p.heads = static_cast<int>(s.k_cache.size(2));
  p.head_dim = static_cast<int>(s.k_cache.size(4));
  if (s.cross_len) {
    p.contexts = static_cast<int>(s.cross_len->size(0));
    p.cross = step_keys(s.cross[0], s.cross[1], 0, *s.cross_len);
  }
  p.eps = static_cast<float>(s.eps);
  p.dtype = float_dtype("x", s.x);
  p.int8 = !s.scales.empty();
  return p;
}

// layers first .. first + kStepLayers - 1, as many as there are
inline void step_layers(const Step& s, int64_t first, TransformerStep& p) {
  const size_t norms = s.norms.size() / s.layers(), matrices = s.weights.size() / s.layers();
  const int64_t left = s.layers() - first;
  p.layers = static_cast<int>(left < kStepLayers ? left : kStepLayers);
  for (int i = 0; i < p.layers; ++i) {
    const size_t at = first + i;
    size_t norm = at * norms, matrix = at * matrices;
    const auto next_norm = [&] { return s.norms[norm++].const_data_ptr(); };
    const auto next = [&] {
      const float* scale = p.int8 ? read<float>(s.scales[matrix]) : nullptr;
      return StepMatrix{s.weights[matrix++].const_data_ptr(), scale};
    };
    StepLayer& layer = p.layer[i];
    layer = {};
    layer.norm_attn = next_norm();
    layer.qkv = next();
    layer.proj = next();
    if (p.contexts) {
      layer.norm_cross = next_norm();
      layer.cross_q = next();
      layer.cross_proj = next();
      layer.cross_k = s.cross[2 * at].const_data_ptr();
      layer.cross_v = s.cross[2 * at + 1].const_data_ptr();
    }
    layer.norm_mlp = next_norm();
    layer.w13 = next();
    layer.w2 = next();
  }
}

}  // namespace flexkernels
