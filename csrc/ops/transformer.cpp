// One token a row through a whole stack of transformer blocks: schema and CPU launch. Its parts are the launches of the
// ops it is made of, so that each result equals theirs bit by bit; what it saves is everything between them.
#include <math.h>

#include <vector>

#include "../core/decode.h"
#include "../core/norm.h"
#include "launches.h"

namespace flexkernels {
namespace {

using Tensors = std::vector<Tensor>;

// hands out the tensors of a list in order
class Cursor {
 public:
  Cursor(const char* name, const Tensors& list) : name_(name), list_(list) {}

  const Tensor& peek() const {
    STD_TORCH_CHECK(at_ < list_.size(), name_, " must hold more than ", list_.size(), " tensors");
    return list_[at_];
  }

  const Tensor& next() {
    const Tensor& tensor = peek();
    ++at_;
    return tensor;
  }

  void finish() const {
    STD_TORCH_CHECK(at_ == list_.size(), name_, " must hold ", at_, " tensors, got ", list_.size());
  }

 private:
  const char* name_;
  const Tensors& list_;
  size_t at_ = 0;
};

class Stack {
 public:
  Stack(const Tensors& norms, const Tensors& weights, const Tensors& scales, const Tensors& cross, double eps)
      : norms_("norms", norms),
        weights_("weights", weights),
        scales_("scales", scales),
        cross_("cross", cross),
        scaled_(!scales.empty()),
        eps_(eps) {}

  void norm(const Tensor& x, const Tensor& out) { rms_norm_into(x, norms_.next(), eps_, out); }

  void linear(const Tensor& x, OptionalTensor residual, bool swiglu, const Tensor& out) {
    OptionalTensor scale;
    if (scaled_) scale = scales_.next();
    skinny_linear_cpu(x, weights_.next(), scale, {}, residual, swiglu, out);
  }

  // x += w2 (silu(w1 normed) * w3 normed)
  void feed_forward(const Tensor& normed, const Tensor& x) {
    const Tensor& w13 = weights_.peek();
    const Tensor hidden = torch::stable::new_empty(x, {x.size(0), w13.size(0) / 2});
    linear(normed, {}, true, hidden);
    linear(hidden, x, false, x);
  }

  const Tensor& next_cross() { return cross_.next(); }

  void finish() const {
    for (const Cursor* list : {&norms_, &weights_, &scales_, &cross_}) list->finish();
  }

 private:
  Cursor norms_, weights_, scales_, cross_;
  bool scaled_;
  double eps_;
};

// row i of q [rows, width] sees context i % contexts; returns [rows, width]
Tensor attend_contexts(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cross_len) {
  const int64_t rows = q.size(0), contexts = k.size(0), heads = k.size(1), head_dim = k.size(3);
  STD_TORCH_CHECK(contexts > 0 && rows % contexts == 0, "cross must have a divisor of ", rows, " contexts, got ",
                  contexts);
  const Tensor queries =
      torch::stable::transpose(torch::stable::view(q, {rows / contexts, contexts, heads, head_dim}), 0, 1);
  const Tensor out = torch::stable::new_empty(q, {contexts, rows / contexts, heads, head_dim});
  decode_attention_into(queries, k, v, cross_len, false, out);
  return torch::stable::reshape(torch::stable::transpose(out, 0, 1), {rows, q.size(1)});
}

// x += attention(norm x); x += cross attention(norm x), where there are contexts; x += w2 swiglu(w13 norm x)
void transformer_step_cpu(const Tensor& x, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cache_len,
                          Tensors norms, Tensors weights, Tensors scales, Tensors cross, OptionalTensor cross_len,
                          double eps) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(k_cache.dim() == 5 && v_cache.dim() == 5, "caches must have 5 dimensions, got ", k_cache.dim(),
                  " and ", v_cache.dim());
  STD_TORCH_CHECK(v_cache.size(0) == k_cache.size(0), "v_cache must have ", k_cache.size(0), " layers, got ",
                  v_cache.size(0));
  const int64_t layers = k_cache.size(0), rows = x.size(0), width = x.size(1);
  const int64_t heads = k_cache.size(2), head_dim = k_cache.size(4);
  STD_TORCH_CHECK(heads * head_dim == width, "k_cache must have heads of ", width, " channels in all, got ", heads,
                  " of ", head_dim);
  Stack stack(norms, weights, scales, cross, eps);
  const Tensor normed = torch::stable::new_empty(x, {rows, width});
  const Tensor qkv = torch::stable::new_empty(x, {rows, 3 * width}), tokens = torch::stable::unsqueeze(qkv, 1);
  const Tensor q = torch::stable::new_empty(x, {rows, width}), attended = torch::stable::new_empty(x, {rows, width});
  const std::vector<int64_t> by_head = {rows, 1, heads, head_dim};
  const Tensor q_heads = torch::stable::view(q, by_head), attended_heads = torch::stable::view(attended, by_head);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Tensor k = torch::stable::select(k_cache, 0, layer), v = torch::stable::select(v_cache, 0, layer);
    stack.norm(x, normed);
    stack.linear(normed, {}, false, qkv);
    kv_append_into(tokens, k, v, cache_len, q_heads);
    decode_attention_into(q_heads, k, v, cache_len, true, attended_heads);
    stack.linear(attended, x, false, x);
    if (cross_len) {
      stack.norm(x, normed);
      stack.linear(normed, {}, false, q);
      const Tensor &cross_k = stack.next_cross(), &cross_v = stack.next_cross();
      stack.linear(attend_contexts(q, cross_k, cross_v, *cross_len), x, false, x);
    }
    stack.norm(x, normed);
    stack.feed_forward(normed, x);
  }
  stack.finish();
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flexkernels_native, m) {
  m.def(
      "transformer_step_(Tensor(a!) x, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor cache_len, Tensor[] norms, "
      "Tensor[] weights, Tensor[] scales, Tensor[] cross, Tensor? cross_len, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CPU, m) {
  m.impl("transformer_step_", TORCH_BOX(&flexkernels::transformer_step_cpu));
}
