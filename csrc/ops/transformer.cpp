// One token a row through a whole stack of transformer blocks. Its parts are the ops it is made of, so that each result
// equals theirs bit by bit; what it saves is everything between them.
#include <math.h>

#include <vector>

#include "../core/decode.h"
#include "../core/linear.h"
#include "launches.h"
#include "op.h"
#include "transformer_one.h"

namespace flexkernels {
namespace {

// the parts of a step, each with the next of its weights; `check_step` has counted them
class Stack {
 public:
  Stack(const Tensor& x, const Tensors& norms, const Tensors& weights, const Tensors& scales, double eps)
      : norm_(norms.begin()), weight_(weights.begin()), scale_(scales.begin()), scaled_(!scales.empty()), eps_(eps) {
    if (!kCuda) normed_ = empty_like(x, x.scalar_type());
  }

  void linear(const Tensor& x, const OptionalTensor& residual, const Tensor& out) {
    product(x, residual, false, {}, out);
  }

  // of x normed: by the layer's own kernel, or in one buffer for all layers, where that kernel would need a new one
  void normed_linear(const Tensor& x, bool swiglu, const Tensor& out) {
    const Tensor& weight = *norm_++;
    if (!normed_) return product(x, {}, swiglu, weight, out);
    rms_norm_into(x, weight, eps_, *normed_);
    product(*normed_, {}, swiglu, {}, out);
  }

  // x += w2 (silu(w1 norm(x)) * w3 norm(x))
  void feed_forward(const Tensor& x) {
    const Tensor hidden = empty(x, {x.size(0), weight_->size(0) / 2}, x.scalar_type());
    normed_linear(x, true, hidden);
    linear(hidden, x, x);
  }

 private:
  void product(const Tensor& x, const OptionalTensor& residual, bool swiglu, const OptionalTensor& norm,
               const Tensor& out) {
    const OptionalTensor scale = scaled_ ? OptionalTensor(*scale_++) : std::nullopt;
    skinny_linear_into({x, *weight_++, scale, {}, residual, swiglu, norm, eps_}, out);
  }

  Tensors::const_iterator norm_, weight_, scale_;
  bool scaled_;
  double eps_;
  OptionalTensor normed_;
};

// row i of q [rows, width] sees context i % contexts; returns [rows, width]
Tensor attend_contexts(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cross_len) {
  const int64_t rows = q.size(0), contexts = k.size(0), heads = k.size(1), head_dim = k.size(3);
  const Tensor queries =
      torch::stable::transpose(torch::stable::view(q, {rows / contexts, contexts, heads, head_dim}), 0, 1);
  const Tensor out = empty(q, {contexts, rows / contexts, heads, head_dim}, q.scalar_type());
  decode_attention_into(queries, k, v, cross_len, false, out);
  return torch::stable::reshape(torch::stable::transpose(out, 0, 1), {rows, q.size(1)});
}

// on a GPU looking at the values would wait
void check_lengths(const char* name, const Tensor& lengths, int64_t count, int64_t low, int64_t high, const Tensor& x) {
  check_tensor(name, lengths, ScalarType::Int, {count}, x);
  if (kCuda) return;
  const Tensor values = as_contiguous(lengths);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t length = read<int32_t>(values)[i];
    STD_TORCH_CHECK(length >= low && length <= high, name, " must lie between ", low, " and ", high, ", got ", length);
  }
}

void check_pair(const char* name, const Tensor& k, const Tensor& v, std::initializer_list<int64_t> sizes,
                const Tensor& x) {
  check_tensor(name, k, x.scalar_type(), sizes, x);
  check_tensor(name, v, x.scalar_type(), sizes, x);
  const int64_t last = k.dim() - 1;
  STD_TORCH_CHECK(k.size(last) <= 1 || (k.stride(last) == 1 && v.stride(last) == 1), name,
                  " must have stride 1 in its last dimension, got ", k.stride(last), " and ", v.stride(last));
}

// what could raise after the first change; the parts check the rest
void check_step(const Tensor& x, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cache_len,
                const Tensors& norms, const Tensors& weights, const Tensors& scales, const Tensors& cross,
                const OptionalTensor& cross_len) {
  check_dim("x", x, 2);
  float_dtype("x", x);
  check_layout("x", x, x);
  const int64_t rows = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(rows <= kSkinnyMaxRows, "x must have at most ", kSkinnyMaxRows, " rows, got ", rows);
  check_dim("k_cache", k_cache, 5);
  const int64_t layers = k_cache.size(0), heads = k_cache.size(2), max_len = k_cache.size(3),
                head_dim = k_cache.size(4);
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= kDecodeMaxHeadDim, "head_dim must lie between 1 and ", kDecodeMaxHeadDim,
                  ", got ", head_dim);
  STD_TORCH_CHECK(heads * head_dim == width, "k_cache must have heads of ", width, " channels in all, got ", heads,
                  " of ", head_dim);
  check_pair("k_cache and v_cache", k_cache, v_cache, {layers, rows, heads, max_len, head_dim}, x);
  check_lengths("cache_len", cache_len, rows, 1, max_len, x);
  const int64_t each = cross_len ? 3 : 2, blocks = static_cast<int64_t>(norms.size()) / each;
  STD_TORCH_CHECK(layers >= 1 && layers == blocks && norms.size() % each == 0, "k_cache must have ", blocks,
                  " layers like the weights, got ", layers);
  for (const Tensor& norm : norms) check_tensor("a norm", norm, x.scalar_type(), {1, width}, x);
  STD_TORCH_CHECK(weights.size() == 2 * norms.size(), "weights must hold ", 2 * norms.size(), " tensors, got ",
                  weights.size());
  STD_TORCH_CHECK(scales.empty() || scales.size() == weights.size(), "scales must hold ", weights.size(),
                  " tensors, got ", scales.size());
  const size_t contexts_held = cross_len ? 2 * layers : 0;
  STD_TORCH_CHECK(cross.size() == contexts_held, "cross must hold ", contexts_held, " tensors, got ", cross.size());
  if (!cross_len) return;
  check_dim("cross_len", *cross_len, 1);
  const int64_t contexts = cross_len->size(0);
  STD_TORCH_CHECK(contexts > 0 && rows % contexts == 0, "cross_len must have as many entries as divide ", rows,
                  " rows, got ", contexts);
  for (size_t i = 0; i < cross.size(); i += 2) {
    check_dim("cross", cross[i], 4);
    const int64_t length = cross[i].size(2);
    check_pair("cross", cross[i], cross[i + 1], {contexts, heads, length, head_dim}, x);
    check_lengths("cross_len", *cross_len, contexts, 0, length, x);
  }
}

// why one kernel does not serve a step of at least one row; empty where it does
std::string one_kernel_refusal(const Step& s) {
#ifdef FLEXKERNELS_CUDA
  const std::string layout = step_layout_refusal(s);
  if (!layout.empty()) return layout;
  const OnDevice guard(s.x);
  const char* reason = cuda::transformer_step_refusal(step_shape(s));
  return reason ? reason : "";
#else
  (void)s;
  return "the CPU has no such kernel";
#endif
}

void in_one_kernel(const Step& s) {
#ifdef FLEXKERNELS_CUDA
  TransformerStep p = step_shape(s);
  const Tensor words = empty(s.x, {step_words(p)}, ScalarType::Int);
  p.words = static_cast<uint32_t*>(words.mutable_data_ptr());
  for (int64_t first = 0; first < s.layers(); first += kStepLayers) {
    step_layers(s, first, p);
    FLEXKERNELS_LAUNCH(transformer_step, p, s.x, p.rows, p.width);
    p.k = static_cast<uint16_t*>(p.k) + p.layers * p.k_layer;
    p.v = static_cast<uint16_t*>(p.v) + p.layers * p.v_layer;
  }
#else
  (void)s;
#endif
}

// x += attention(norm x); x += cross attention(norm x), where there are contexts; x += w2 swiglu(w13 norm x)
void in_parts(const Step& s) {
  const auto& [x, k_cache, v_cache, lengths, norms, weights, scales, cross, cross_len, eps] = s;
  const int64_t layers = s.layers(), rows = x.size(0), width = x.size(1);
  const int64_t heads = k_cache.size(2), head_dim = k_cache.size(4);
  Stack stack(x, norms, weights, scales, eps);
  const auto room = [&](int64_t columns) { return empty(x, {rows, columns}, x.scalar_type()); };
  const Tensor qkv = room(3 * width), q = room(width), attended = room(width);
  const Tensor tokens = torch::stable::unsqueeze(qkv, 1);
  const std::vector<int64_t> by_head = {rows, 1, heads, head_dim};
  const Tensor q_heads = torch::stable::view(q, by_head), attended_heads = torch::stable::view(attended, by_head);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Tensor k = torch::stable::select(k_cache, 0, layer), v = torch::stable::select(v_cache, 0, layer);
    stack.normed_linear(x, false, qkv);
    kv_append_into(tokens, k, v, lengths, q_heads);
    decode_attention_into(q_heads, k, v, lengths, true, attended_heads);
    stack.linear(attended, x, x);
    if (cross_len) {
      stack.normed_linear(x, false, q);
      const Tensor &cross_k = cross[2 * layer], &cross_v = cross[2 * layer + 1];
      stack.linear(attend_contexts(q, cross_k, cross_v, *cross_len), x, x);
    }
    stack.feed_forward(x);
  }
}

// persistent: whether one kernel must (true) or must not (false) serve the step; none: it does where it can
void transformer_step(const Tensor& x, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cache_len,
                      Tensors norms, Tensors weights, Tensors scales, Tensors cross, OptionalTensor cross_len,
                      double eps, std::optional<bool> persistent) {
  check_step(x, k_cache, v_cache, cache_len, norms, weights, scales, cross, cross_len);
  check_eps(eps);
  if (x.size(0) == 0) return;
  const Tensor lengths = as_contiguous(cache_len);
  cross_len = as_contiguous(cross_len);
  const Step step{x, k_cache, v_cache, lengths, norms, weights, scales, cross, cross_len, eps};
  if (persistent.value_or(kCuda)) {
    const std::string reason = one_kernel_refusal(step);
    if (reason.empty()) return in_one_kernel(step);
    STD_TORCH_CHECK(!persistent, "persistent must not be True here: ", reason);
  }
  in_parts(step);
}

// why `persistent` cannot be true, empty where it can
std::string transformer_step_refusal(const Tensor& x, const Tensor& k_cache, const Tensor& v_cache,
                                     const Tensor& cache_len, Tensors norms, Tensors weights, Tensors scales,
                                     Tensors cross, OptionalTensor cross_len) {
  check_step(x, k_cache, v_cache, cache_len, norms, weights, scales, cross, cross_len);
  if (x.size(0) == 0) return "x has no rows";
  return one_kernel_refusal({x, k_cache, v_cache, cache_len, norms, weights, scales, cross, cross_len, 0});
}

}  // namespace
}  // namespace flexkernels

FLEXKERNELS_OPS(m) {
  m.impl("transformer_step_", TORCH_BOX(&flexkernels::transformer_step));
  m.impl("transformer_step_refusal", TORCH_BOX(&flexkernels::transformer_step_refusal));
}
