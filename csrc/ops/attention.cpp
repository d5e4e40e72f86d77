// The attention ops: schemas and CPU launches. Outputs are allocated by the caller; an op only fills them.
#include "attention.h"

#include <math.h>

#include <algorithm>
#include <atomic>

#include "cpu.h"

namespace flexkernels {
namespace {

using Ints = std::vector<int64_t>;

// offsets [batch + 1] must start at 0, never fall, and end within `rows`; returns the longest sequence
int64_t check_cu_seqlens(const char* name, const int32_t* offsets, int64_t batch, int64_t rows, int64_t tokens) {
  STD_TORCH_CHECK(offsets[0] == 0, name, " must start at 0, got ", offsets[0]);
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(offsets[b] <= offsets[b + 1], name, " must not fall, got ", offsets[b], " before ", offsets[b + 1]);
    longest = std::max<int64_t>(longest, offsets[b + 1] - offsets[b]);
  }
  STD_TORCH_CHECK(offsets[batch] <= rows && offsets[batch] <= tokens, name, " must end within the ", rows,
                  " rows and their ", tokens, " frames, got ", offsets[batch]);
  return longest;
}

// query tiles must ascend, and they and their keys stay inside their sequence
void check_plan(const AttentionForward& p, int64_t k_tiles) {
  STD_TORCH_CHECK(p.k_ptr[0] == 0 && p.k_ptr[p.tiles] == k_tiles, "k_ptr must run from 0 to ", k_tiles, ", got ",
                  p.k_ptr[0], " to ", p.k_ptr[p.tiles]);
  int64_t row = 0;
  for (int64_t i = 0; i < p.tiles; ++i) {
    const int32_t* q = p.q_tiles + 4 * i;
    STD_TORCH_CHECK(q[0] >= 0 && q[0] < p.batch, "q_tiles must name one of ", p.batch, " sequences, got ", q[0]);
    STD_TORCH_CHECK(row <= q[1] && q[1] < q[2] && p.cu_seqlens_q[q[0]] <= q[1] && q[2] <= p.cu_seqlens_q[q[0] + 1],
                    "q_tiles must ascend inside their sequences, got rows ", q[1], " to ", q[2], " of sequence ", q[0]);
    row = q[2];
    STD_TORCH_CHECK(p.k_ptr[i] <= p.k_ptr[i + 1], "k_ptr must not fall, got ", p.k_ptr[i], " before ", p.k_ptr[i + 1]);
    for (int64_t j = p.k_ptr[i]; j < p.k_ptr[i + 1] && j < k_tiles; ++j) {
      const int32_t* k = p.k_tiles + 3 * j;
      STD_TORCH_CHECK(p.cu_seqlens_k[q[0]] <= k[0] && k[0] < k[1] && k[1] <= p.cu_seqlens_k[q[0] + 1],
                      "k_tiles must lie inside their sequences, got keys ", k[0], " to ", k[1], " of sequence ", q[0]);
    }
  }
}

void clear_rows(const AttentionForward& p, int64_t begin, int64_t end) {
  const int64_t row = static_cast<int64_t>(p.heads) * p.head_dim * (p.dtype == Dtype::f32 ? 4 : 2);
  memset(static_cast<char*>(p.out) + begin * row, 0, (end - begin) * row);
  if (p.lse) std::fill(p.lse + begin * p.heads, p.lse + end * p.heads, -INFINITY);
}

// rows of no query tile: out 0, lse -inf
void clear_gaps(const AttentionForward& p) {
  int64_t row = 0;
  for (int64_t i = 0; i < p.tiles; ++i) {
    if (row < p.q_tiles[4 * i + 1]) clear_rows(p, row, p.q_tiles[4 * i + 1]);
    row = p.q_tiles[4 * i + 2];
  }
  clear_rows(p, row, p.total_q);
}

// a contiguous gradient like t, all zeros: what no query reaches stays so
void* write_gradient(const char* name, const Tensor& grad, const Tensor& t) {
  check_scalar_type(name, grad, t.scalar_type());
  check_numel(name, grad, t.numel());
  check_layout(name, grad, t);
  void* data = grad.mutable_data_ptr();
  if (grad.numel() > 0) memset(data, 0, grad.numel() * grad.element_size());
  return data;
}

// work of one head's query tile: rows times keys, and a share of what every tile costs
int64_t tile_work(const AttentionForward& p, int64_t tile) {
  int64_t keys = 64;
  for (int32_t j = p.k_ptr[tile]; j < p.k_ptr[tile + 1]; ++j) keys += p.k_tiles[3 * j + 1] - p.k_tiles[3 * j];
  return keys * (p.q_tiles[4 * tile + 2] - p.q_tiles[4 * tile + 1]);
}

// bounds of `parts` runs of items of about equal work
Ints equal_shares(const AttentionForward& p, int64_t parts) {
  Ints work(p.tiles);
  int64_t total = 0;
  for (int64_t i = 0; i < p.tiles; ++i) total += (work[i] = tile_work(p, i)) * p.kv_heads;
  Ints bounds{0};
  int64_t item = 0, done = 0;
  for (int64_t first = 0, last; first < p.tiles; first = last) {
    last = attention_first_tile(p, p.q_tiles[4 * first] + 1);
    for (int head = 0; head < p.kv_heads; ++head) {
      for (int64_t i = first; i < last; ++i, ++item) {
        // a part ends where the middle of the next item lies beyond its share
        while (static_cast<int64_t>(bounds.size()) < parts &&
               (static_cast<double>(done) + work[i] * 0.5) * parts > static_cast<double>(total) * bounds.size()) {
          bounds.push_back(item);
        }
        done += work[i];
      }
    }
  }
  bounds.resize(parts + 1, item);
  return bounds;
}

// threads that are worth starting: each gets at least 2^18 multiply-adds of the forward
int64_t useful_threads(const AttentionForward& p) {
  double work = 0;
  for (int64_t i = 0; i < p.tiles; ++i) work += static_cast<double>(tile_work(p, i)) * p.heads * p.head_dim;
  return std::clamp<int64_t>(static_cast<int64_t>(work / (1 << 18)), 1, torch::stable::get_num_threads());
}

// work(part, scratch) for every part, `bytes` of aligned scratch each
template <typename Work>
void run_parts(int64_t parts, int64_t bytes, const Tensor& like, const Work& work) {
  constexpr int64_t kAlign = 64;
  bytes = (bytes + kAlign - 1) / kAlign * kAlign;
  const Tensor scratch = torch::stable::new_empty(like, {parts * bytes + kAlign}, ScalarType::Byte);
  char* start = static_cast<char*>(scratch.mutable_data_ptr());
  start += (kAlign - reinterpret_cast<uintptr_t>(start) % kAlign) % kAlign;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) work(part, start + part * bytes);
  });
}

void run_forward(const AttentionForward& p, const Tensor& like) {
  if (p.tiles == 0 || p.heads == 0) return;
  const int64_t threads = useful_threads(p);
  const Ints bounds = equal_shares(p, threads);
  const auto kernel = FLEXKERNELS_SELECT(attention_forward_kernel);
  run_parts(threads, FLEXKERNELS_SELECT(attention_scratch_bytes)(p), like, [&](int64_t part, char* scratch) {
    AttentionForward own = p;
    own.scratch = scratch;
    kernel(own, bounds[part], bounds[part + 1]);
  });
}

// threads take (sequence, key head) as they become free: no item depends on another
void run_backward(const AttentionBackward& p, const Tensor& like) {
  if (p.forward.tiles == 0 || p.forward.heads == 0) return;
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

// the forward's arguments, with what only values can tell checked too
AttentionForward checked_args(AttentionForward p, const Tensor& q_frame, const Tensor& k_frame, const Tensor& k_tiles) {
  check_cu_seqlens("cu_seqlens_q", p.cu_seqlens_q, p.batch, p.total_q, q_frame.numel());
  const int64_t longest = check_cu_seqlens("cu_seqlens_k", p.cu_seqlens_k, p.batch, p.total_k, k_frame.numel());
  p.max_keys = static_cast<int>(longest);
  check_plan(p, k_tiles.size(0));
  return p;
}

void attention_forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                           const Tensor& cu_seqlens_k, const Tensor& q_frame, const Tensor& q_rank,
                           const Tensor& k_frame, const Tensor& k_rank, const Tensor& q_tiles, const Tensor& k_ptr,
                           const Tensor& k_tiles, OptionalTensor key_log_weight, int64_t mask, Ints cross,
                           double softmax_scale, const Tensor& out, OptionalTensor lse) {
  const AttentionForward p = checked_args(
      attention_forward_args(q, k, v, cu_seqlens_q, cu_seqlens_k, q_frame, q_rank, k_frame, k_rank, q_tiles, k_ptr,
                             k_tiles, key_log_weight, mask, cross, softmax_scale, out, lse),
      q_frame, k_frame, k_tiles);
  clear_gaps(p);
  run_forward(p, q);
}

void attention_backward_cpu(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const Tensor& q_frame,
                            const Tensor& q_rank, const Tensor& k_frame, const Tensor& k_rank, const Tensor& q_tiles,
                            const Tensor& k_ptr, const Tensor& k_tiles, OptionalTensor key_log_weight, int64_t mask,
                            Ints cross, double softmax_scale, const Tensor& out, const Tensor& lse, const Tensor& dq,
                            const Tensor& dk, const Tensor& dv) {
  AttentionBackward p{};
  p.forward = checked_args(
      attention_forward_args(q, k, v, cu_seqlens_q, cu_seqlens_k, q_frame, q_rank, k_frame, k_rank, q_tiles, k_ptr,
                             k_tiles, key_log_weight, mask, cross, softmax_scale, out, lse),
      q_frame, k_frame, k_tiles);
  check_heads("grad_out", grad_out, q);
  STD_TORCH_CHECK(grad_out.size(0) == q.size(0) && grad_out.size(1) == q.size(1), "grad_out must have q's ", q.size(0),
                  " rows and ", q.size(1), " heads, got ", grad_out.size(0), " and ", grad_out.size(1));
  p.grad_out = grad_out.const_data_ptr();
  p.grad_row = grad_out.stride(0);
  p.grad_head = grad_out.stride(1);
  p.dq = write_gradient("dq", dq, q);
  p.dk = write_gradient("dk", dk, k);
  p.dv = write_gradient("dv", dv, v);
  run_backward(p, q);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flexkernels_native, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor q_frame, "
      "Tensor q_rank, Tensor k_frame, Tensor k_rank, Tensor q_tiles, Tensor k_ptr, Tensor k_tiles, "
      "Tensor? key_log_weight, int mask, int[] cross, float softmax_scale, Tensor(a!) out, Tensor(b!)? lse) -> ()");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "Tensor q_frame, Tensor q_rank, Tensor k_frame, Tensor k_rank, Tensor q_tiles, Tensor k_ptr, Tensor k_tiles, "
      "Tensor? key_log_weight, int mask, int[] cross, float softmax_scale, Tensor out, Tensor lse, Tensor(a!) dq, "
      "Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&flexkernels::attention_forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&flexkernels::attention_backward_cpu));
}
