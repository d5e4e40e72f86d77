// Flash-attention forward. A work item is (sequence, key head, query tile), tiles of one key head side by side: K and V
// of a key head are packed once, then every query block of at most kBlockRows rows walks over its keys in blocks of at
// most kBlockKeys:
//   S = scale * Q K^T + w,  m' = max(m, rowmax S),  P = exp(S - m'),  l = l * exp(m - m') + rowsum P,
//   O = O * exp(m - m') + P V,  and at the end out = O / l, lse = m + log l.
#include "attention.h"

#include "kernels.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

struct ForwardBuffers : Buffers {
  float* v;        // [keys / kPack, width]
  float* sum;      // [kBlockRows, width]: O
  float* partial;  // [kBlockRows, W]: l, lane by lane
  float* most;     // [kBlockRows]: m
  int64_t bytes;
};

ForwardBuffers buffers(const AttentionForward& p) {
  ForwardBuffers b;
  Room room{p.scratch};
  take_shared(p, room, &b);
  b.v = room.take(padded_keys(p) * padded_width(p));
  b.sum = room.take(block_rows(p) * padded_width(p));
  b.partial = room.take(block_rows(p) * W);
  b.most = room.take(block_rows(p));
  b.bytes = room.lanes * 4;
  return b;
}

// the maximum of a row of `vectors` vectors, at least `most`
inline float row_maximum(const float* row, int vectors, float scale, float most) {
  vf m[4] = {load(row), load(row), load(row), load(row)};
  int i = 1;
  for (; i + 4 <= vectors; i += 4) {
    for (int j = 0; j < 4; ++j) m[j] = largest(load(row + (i + j) * W), m[j]);
  }
  for (; i < vectors; ++i) m[0] = largest(load(row + i * W), m[0]);
  const float here = scale * largest_lane(largest(largest(m[0], m[1]), largest(m[2], m[3])));
  return here > most ? here : most;
}

// scale * S to P in place, with l and O brought to the new maximum
template <typename Plan>
void softmax(const Plan& w, const KeyBlock& keys, int rows, float scale) {
  using Math = typename Plan::Math;
  const vf factor = splat(scale);
  for (int r = 0; r < rows; ++r) {
    float* row = w.b.score + r * kScoreRow;
    const float before = w.b.most[r], most = row_maximum(row, keys.vectors, scale, before);
    // of a row that sees nothing yet, every weight is exp(-inf - 0)
    const vf shift = splat(most == kHidden ? 0.0f : most);
    vf sum = load(w.b.partial + r * W), odd = {};
    if (most > before) {
      const vf decay = Math::exp(splat(before) - shift);
      sum *= decay;
      float* o = w.b.sum + r * w.width;
      for (int i = 0; i < w.width; i += W) store(o + i, load(o + i) * decay);
    }
    w.b.most[r] = most;
    const auto weight = [&](int i) { return Math::exp(fma(load(row + i * W), factor, -shift)); };
    int i = 0;
    for (; i + 2 <= keys.vectors; i += 2) {
      const vf low = weight(i), high = weight(i + 1);
      sum += low;
      odd += high;
      Math::store_two(row, i, low, high);
    }
    if (i < keys.vectors) {
      const vf low = weight(i);
      sum += low;
      Math::store_two(row, i, low, vf{});
    }
    store(w.b.partial + r * W, sum + odd);
  }
}

template <typename Plan>
void write_rows(const Plan& w, const QueryBlock& block) {
  using T = typename Plan::T;
  const AttentionForward& p = w.p;
  for (int r = 0; r < block.count; ++r) {
    const int64_t row = block.rows[r];
    const float total = sum_of_lanes(load(w.b.partial + r * W)), most = w.b.most[r];
    const bool nothing = total == 0.0f;
    p.lse[block.head * p.total_q + row] = nothing ? kHidden : most / Plan::Math::kUnit + logf(total);
    T* out = static_cast<T*>(p.out) + (row * p.heads + block.head) * p.head_dim;
    const float* o = w.b.sum + r * w.width;
    const vf divisor = splat(nothing ? 1.0f : total);
    int i = 0;
    for (; i + W <= p.head_dim; i += W) store(out + i, load(o + i) / divisor);
    if (i < p.head_dim) Part{p.head_dim - i}.store_to(out + i, load(o + i) / divisor);
  }
}

template <typename Plan>
void attend_rows(const Plan& w, int64_t tile, const QueryBlock& block) {
  const int rows = block.count;
  pack_queries(w, block);
  memset(w.b.sum, 0, sizeof(float) * rows * w.width);
  memset(w.b.partial, 0, sizeof(float) * rows * W);
  for (int r = 0; r < rows; ++r) w.b.most[r] = kHidden;
  visit_keys(w, tile, block, [&](const KeyBlock& keys) {
    softmax(w, keys, rows, w.p.key_log_weight ? 1.0f : w.scale);
    add_rows(w, keys, rows, w.b.score, w.b.v, w.b.sum);
  });
  write_rows(w, block);
}

template <typename Math, typename T>
void attend(const AttentionForward& p, int64_t begin, int64_t end) {
  const ForwardBuffers b = buffers(p);
  int packed_sequence = -1, packed_head = -1;
  for (int64_t item = begin; item < end; ++item) {
    const AttentionItem at = attention_item(p, item);
    const int sequence = p.tile(at.tile)[0];
    const auto w = walk_sequence<Math, T>(p, b, sequence);
    if (sequence != packed_sequence) pack_tokens(w);
    if (sequence != packed_sequence || at.kv_head != packed_head) {
      pack_panels(w, keys_of<T>(p, w.k_base, at.kv_head), p.k_row, b.k);
      pack_rows(w, values_of<T>(p, w.k_base, at.kv_head), p.v_row, w.k_count, round_up(w.k_count, kPanel), b.v);
    }
    packed_sequence = sequence;
    packed_head = at.kv_head;
    const int group = p.heads / p.kv_heads;
    for (int head = at.kv_head * group; head < (at.kv_head + 1) * group; ++head) {
      for_blocks(p, at.tile, head, [&](const QueryBlock& block) { attend_rows(w, at.tile, block); });
    }
  }
}

}  // namespace

int64_t attention_scratch_bytes(const AttentionForward& p) { return buffers(p).bytes; }

void attention_forward_kernel(const AttentionForward& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    attend<MathOf<T>, T>(p, begin, end);
  });
}

}  // namespace flexkernels::FLEXKERNELS_ISA
