// The gradient of structured attention, on the CPU alone.
#include <algorithm>
#include <atomic>
#include <tuple>

#include "attention_parts.h"

namespace flexkernels {
namespace {

// threads take (sequence, key head) as they become free: no item depends on another
void run_backward(const AttentionBackward& p, const Tensor& like) {
  if (p.forward.tile_count == 0 || p.forward.heads == 0) return;
  const int64_t items = p.forward.batch * p.forward.kv_heads;
  const int64_t threads = std::min(useful_threads(p.forward), items);
  const auto kernel = FLEXKERNELS_SELECT(attention_backward_kernel);
  std::atomic<int64_t> next{0};
  run_parts(threads, FLEXKERNELS_SELECT(attention_backward_scratch_bytes)(p), like, [&](int64_t, char* scratch) {
    AttentionBackward own = p;
    own.forward.scratch = scratch;
    for (int64_t item; (item = next.fetch_add(1)) < items;) kernel(own, item, item + 1);
  });
}

// a contiguous gradient like t, all zeros: what no query reaches stays so
Tensor zeros(const Tensor& t) {
  const Tensor made = empty(t, {t.size(0), t.size(1), t.size(2)}, t.scalar_type());
  if (made.numel() > 0) memset(made.mutable_data_ptr(), 0, bytes_of(made));
  return made;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      Tensors layout, OptionalTensor key_log_weight, int64_t mask,
                                                      Ints cross, std::optional<double> softmax_scale) {
  const AttentionArguments given(q, k, v, layout, key_log_weight, mask, cross, softmax_scale);
  AttentionBackward p{};
  p.forward = given.p;
  check_like("grad_out", grad_out, q);
  check_like("out", out, q);
  check_layout("out", out, q);
  const Tensor grad = dense_rows(grad_out);
  p.grad_out = grad.const_data_ptr();
  p.grad_row = grad.stride(0);
  p.grad_head = grad.stride(1);
  p.forward.out = const_cast<void*>(out.const_data_ptr());
  const int64_t rows = p.forward.total_q * p.forward.heads;
  p.forward.lse = const_cast<float*>(read_optional<float>("lse", lse, ScalarType::Float, rows, q));
  const Tensor dq = zeros(q), dk = zeros(k), dv = zeros(v);
  p.dq = dq.mutable_data_ptr();
  p.dk = dk.mutable_data_ptr();
  p.dv = dv.mutable_data_ptr();
  run_backward(p, q);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace flexkernels

FLEXKERNELS_OPS(m) { m.impl("attention_backward", TORCH_BOX(&flexkernels::attention_backward)); }
