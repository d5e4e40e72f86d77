// Flash-attention backward. A work item is (sequence, key head): one thread walks over all its query blocks, so that
// the gradients of keys are summed in one place and in one order. With the log-sum-exp of the forward, block by block:
//   P = exp(scale * Q K^T + w - lse),  dP = dO V^T,  dS = P (dP - rowsum(dO O)),
//   dV += P^T dO,  dK += scale dS^T Q,  dQ += scale dS K
#include "attention.h"

#include "kernels.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

struct BackwardBuffers : Buffers {
  float* v;            // [panels, depth, kPanel], as k
  float* k_rows;       // [keys / kPack, width]
  float *dk, *dv;      // [keys, width]
  float* grad;         // [kBlockRows, depth]: dO
  float* grad_rows;    // [kBlockRows / kPack, width]
  float* q_rows;       // [kBlockRows / kPack, width]
  float* slope;        // [kBlockRows, kScoreRow]: dP, then dS
  float* weight_rows;  // [kBlockRows / 2, kScoreRow]: P with rows in pairs, where kPack is 2
  float* slope_rows;   // dS, likewise
  float* dq;           // [kBlockRows, width]
  float* shift;        // [kBlockRows]: lse in units of 1 / kUnit
  float* mean;         // [kBlockRows]: rowsum(dO O)
  int64_t bytes;
};

BackwardBuffers buffers(const AttentionBackward& p) {
  BackwardBuffers b;
  Room room{p.forward.scratch};
  const int64_t keys = padded_keys(p.forward), width = padded_width(p.forward);
  take_shared(p.forward, room, &b);
  float** const of_keys[] = {&b.v, &b.k_rows, &b.dk, &b.dv};
  for (float** rows : of_keys) *rows = room.take(keys * width);
  float** const of_queries[] = {&b.grad, &b.grad_rows, &b.q_rows, &b.dq};
  const int64_t block = block_rows(p.forward);
  for (float** rows : of_queries) *rows = room.take(block * width);
  b.slope = room.take(block * kScoreRow);
  b.weight_rows = room.take(block / 2 * kScoreRow);
  b.slope_rows = room.take(block / 2 * kScoreRow);
  b.shift = room.take(block);
  b.mean = room.take(block);
  b.bytes = room.lanes * 4;
  return b;
}

template <typename Plan>
void pack_block(const AttentionBackward& all, const Plan& w, const QueryBlock& block) {
  using Math = typename Plan::Math;
  using T = typename Plan::T;
  const AttentionForward& p = w.p;
  pack_queries(w, block);
  const auto grad_of = [&](int64_t row) {
    return static_cast<const T*>(all.grad_out) + row * all.grad_row + block.head * all.grad_head;
  };
  T signed_q[Math::kPack][kAttentionMaxHeadDim];
  for (int r = 0; r < block.count; r += Math::kPack) {
    const T *q[Math::kPack], *grad[Math::kPack];
    for (int i = 0; i < Math::kPack; ++i) {
      const bool exists = r + i < block.count;
      q[i] = exists ? signed_query(w, block.rows[r + i], block.head, signed_q[i]) : nullptr;
      grad[i] = exists ? grad_of(block.rows[r + i]) : nullptr;
    }
    const int64_t to = r / Math::kPack * w.width;
    for (int t = 0; t < w.width; t += W) {
      store(w.b.q_rows + to + t, Math::column(q, t, p.head_dim));
      store(w.b.grad_rows + to + t, Math::column(grad, t, p.head_dim));
    }
  }
  for (int r = 0; r < block.count; ++r) {
    const int64_t row = block.rows[r];
    const T* grad = grad_of(row);
    for (int t = 0; t < w.depth; t += W) store(w.b.grad + r * w.width + t, Math::lanes(grad, t, p.head_dim));
    const float lse = p.lse[block.head * p.total_q + row];
    // a row that sees nothing has -inf, and weights exp(-inf - 0)
    w.b.shift[r] = lse == kHidden ? 0.0f : lse * Math::kUnit;
    const T* out = static_cast<const T*>(p.out) + (row * p.heads + block.head) * p.head_dim;
    vf sum = {};
    for (int t = 0; t < p.head_dim; t += W) {
      const Part part{least(W, p.head_dim - t)};
      sum = fma(part.load_from(grad + t), part.load_from(out + t), sum);
    }
    w.b.mean[r] = sum_of_lanes(sum);
  }
}

struct Weights {
  vf factor, shift, mean;

  template <typename Math>
  void make(const float* score, const float* slope, vf* p, vf* ds) const {
    *p = Math::exp(fma(load(score), factor, -shift));
    *ds = *p * (load(slope) - mean);
  }
};

// scores to P and dP to dS, in place
template <typename Plan>
void weights_in_place(const Plan& w, const KeyBlock& keys, int rows, float scale) {
  for (int r = 0; r < rows; ++r) {
    const Weights row{splat(scale), splat(w.b.shift[r]), splat(w.b.mean[r])};
    float *score = w.b.score + r * kScoreRow, *slope = w.b.slope + r * kScoreRow;
    for (int i = 0; i < keys.vectors * W; i += W) {
      vf p, ds;
      row.make<typename Plan::Math>(score + i, slope + i, &p, &ds);
      store(score + i, p);
      store(slope + i, ds);
    }
  }
}

#if defined(__AVX512BF16__)
// lane i holds lane i of both, rounded to bfloat16
inline vf pair_lanes(vf low, vf high) {
  const __m256bh a = _mm512_cvtneps_pbh((__m512)low), b = _mm512_cvtneps_pbh((__m512)high);
  vh halves[2];
  memcpy(&halves[0], &a, sizeof a);
  memcpy(&halves[1], &b, sizeof b);
  return (vf)(__builtin_convertvector(halves[0], vu) | (__builtin_convertvector(halves[1], vu) << 16));
}

// P with rows in pairs, and dS with keys in pairs (in place of dP) and with rows in pairs
template <typename Plan>
void weights_in_pairs(const Plan& w, const KeyBlock& keys, int rows, float scale) {
  using Math = typename Plan::Math;
  for (int r = 0; r < rows; r += 2) {
    const int count = least(2, rows - r);
    float *score = w.b.score + r * kScoreRow, *slope = w.b.slope + r * kScoreRow;
    float *p_rows = w.b.weight_rows + r / 2 * kScoreRow, *ds_rows = w.b.slope_rows + r / 2 * kScoreRow;
    for (int i = 0; i < keys.vectors; i += 2) {
      vf p[2][2] = {}, ds[2][2] = {};
      for (int j = 0; j < count; ++j) {
        const Weights row{splat(scale), splat(w.b.shift[r + j]), splat(w.b.mean[r + j])};
        for (int k = 0; k < least(2, keys.vectors - i); ++k) {
          const int64_t at = j * kScoreRow + (i + k) * W;
          row.make<Math>(score + at, slope + at, &p[j][k], &ds[j][k]);
        }
        Math::store_two(slope + j * kScoreRow, i, ds[j][0], ds[j][1]);
      }
      for (int k = 0; k < least(2, keys.vectors - i); ++k) {
        store(p_rows + (i + k) * W, pair_lanes(p[0][k], p[1][k]));
        store(ds_rows + (i + k) * W, pair_lanes(ds[0][k], ds[1][k]));
      }
    }
  }
}
#endif

// sum [keys, width] += weights^T [keys, rows] times the packed query rows
template <typename Plan>
void add_keys(const Plan& w, const KeyBlock& keys, int rows, const float* weights, const float* packed, float* sum) {
  const int depth = static_cast<int>(round_up(rows, Plan::Math::kPack)) / Plan::Math::kPack;
  float* to = sum + static_cast<int64_t>(keys.column) * w.width;
  for (int i = 0; i < w.width; i += kPanel) {
    multiply<typename Plan::Math, true>(keys.vectors * W, least(kPanel, w.width - i) / W, weights, kScoreRow,
                                        packed + i, w.width, depth, to + i, w.width, true);
  }
}

template <typename T>
void write_row(const float* from, float factor, int size, T* to) {
  for (int i = 0; i < size; i += W) Part{least(W, size - i)}.store_to(to + i, load(from + i) * factor);
}

template <typename Plan>
void block_gradients(const AttentionBackward& all, const Plan& w, int64_t tile, const QueryBlock& block) {
  constexpr bool kPairs = Plan::Math::kPack == 2;
  const int rows = block.count;
  pack_block(all, w, block);
  memset(w.b.dq, 0, sizeof(float) * rows * w.width);
  visit_keys(w, tile, block, [&](const KeyBlock& keys) {
    multiply_panels(w, keys, rows, w.b.grad, w.b.v, w.b.slope);
    const float scale = w.p.key_log_weight ? 1.0f : w.scale;
    if constexpr (kPairs) {
      weights_in_pairs(w, keys, rows, scale);
    } else {
      weights_in_place(w, keys, rows, scale);
    }
    add_rows(w, keys, rows, w.b.slope, w.b.k_rows, w.b.dq);
    add_keys(w, keys, rows, kPairs ? w.b.weight_rows : w.b.score, w.b.grad_rows, w.b.dv);
    add_keys(w, keys, rows, kPairs ? w.b.slope_rows : w.b.slope, w.b.q_rows, w.b.dk);
  });
  using T = typename Plan::T;
  const AttentionForward& p = w.p;
  for (int r = 0; r < rows; ++r) {
    write_row(w.b.dq + r * w.width, p.softmax_scale, p.head_dim,
              static_cast<T*>(all.dq) + (int64_t{block.rows[r]} * p.heads + block.head) * p.head_dim);
  }
}

template <typename Math, typename T>
void gradients(const AttentionBackward& all, int64_t begin, int64_t end) {
  const AttentionForward& p = all.forward;
  const BackwardBuffers b = buffers(all);
  for (int64_t item = begin; item < end; ++item) {
    const int sequence = static_cast<int>(item / p.kv_heads), kv_head = static_cast<int>(item % p.kv_heads);
    const auto w = walk_sequence<Math, T>(p, b, sequence);
    const int64_t first_tile = attention_first_tile(p, sequence), last_tile = attention_first_tile(p, sequence + 1);
    if (first_tile == last_tile || w.k_count == 0) continue;
    const int64_t keys = round_up(w.k_count, kPanel);
    pack_tokens(w);
    pack_panels(w, keys_of<T>(p, w.k_base, kv_head), p.k_row, b.k);
    pack_panels(w, values_of<T>(p, w.k_base, kv_head), p.v_row, b.v);
    pack_rows(w, keys_of<T>(p, w.k_base, kv_head), p.k_row, w.k_count, keys, b.k_rows);
    memset(b.dk, 0, sizeof(float) * keys * w.width);
    memset(b.dv, 0, sizeof(float) * keys * w.width);
    const int group = p.heads / p.kv_heads;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        for_blocks(p, tile, head, [&](const QueryBlock& block) { block_gradients(all, w, tile, block); });
      }
    }
    for (int64_t key = 0; key < w.k_count; ++key) {
      const int64_t to = ((w.k_base + key) * p.kv_heads + kv_head) * p.head_dim;
      // the queries carry the scale's sign
      write_row(b.dk + key * w.width, fabsf(p.softmax_scale), p.head_dim, static_cast<T*>(all.dk) + to);
      write_row(b.dv + key * w.width, 1.0f, p.head_dim, static_cast<T*>(all.dv) + to);
    }
  }
}

}  // namespace

int64_t attention_backward_scratch_bytes(const AttentionBackward& p) { return buffers(p).bytes; }

void attention_backward_kernel(const AttentionBackward& p, int64_t begin, int64_t end) {
  with_float(p.forward.dtype, [&](auto element) {
    using T = decltype(element);
    gradients<MathOf<T>, T>(p, begin, end);
  });
}

}  // namespace flexkernels::FLEXKERNELS_ISA
