// The phases of a persistent step, as the sixteen warps of a block go through them.
#pragma once

#include <type_traits>

#include "step_attention.h"

namespace flexkernels::cuda::step {

// kWide: blocks of the width that a warp has at most, 1 or 2; of the hidden width it has three times as many
template <typename T, bool kInt8, int kWide>
struct Consumer {
  static constexpr bool kNarrow = kWide == 1;
  // blocks of the hidden width in registers together, and how often; of the wide, bfloat16 alone leaves room for two
  static constexpr bool kTwo = !kInt8 && std::is_same_v<T, bf16>;
  static constexpr int kDeep = kNarrow ? 3 : kTwo ? 2 : 1, kParts = 3 * kWide / kDeep;
  // whether a run of the width's channels is at most a tile
  static constexpr bool kTiled = kNarrow || kInt8;
  // runs in registers ahead of the activations, as many as the 96 registers of a lane allow. The weights of a norm too
  // are read ahead by the narrow alone
  static constexpr int kAhead = kNarrow ? 4 : 0, kAheadProj = kNarrow ? 1 : 0;

  Lanes<T, kInt8> l;
  const TransformerStep& p;
  const Counted& counted;
  const Places places;
  // the last one whose words this block has stored
  uint32_t phase = 0;

  __device__ Consumer(const TransformerStep& p, const Counted& counted, const Shared& s)
      : l(p, counted, s), p(p), counted(counted), places(p) {}

  __device__ __forceinline__ void norm_weights(const void* weight, uint4 (&w)[kWide][2]) const {
#pragma unroll
    for (int b = 0; b < kWide; ++b) {
      const int block = l.warp + kWarps * b;
      if (block * kBlock >= p.width) continue;
      const T* from = static_cast<const T*>(weight) + block * kBlock + quarters<kInt8>(l.t);
      w[b][0] = ptx::load_constant(from);
      w[b][1] = ptx::load_constant(from + quarter<kInt8>(2));
    }
  }

  // pairs of the residual's values in this lane's channels of a block: from words of this phase, first from x itself
  __device__ __forceinline__ void residual(int block, bool first, uint32_t (&pairs)[kValues]) const {
    const int place = l.g * p.width + block * kBlock + quarters<kInt8>(l.t);
    if (first) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const T* from = static_cast<const T*>(p.x) + place + quarter<kInt8>(2 * i);
        const uint4 u = ptx::load_relaxed(reinterpret_cast<const uint4*>(from));
        pairs[4 * i] = u.x, pairs[4 * i + 1] = u.y, pairs[4 * i + 2] = u.z, pairs[4 * i + 3] = u.w;
      }
      return;
    }
    const uint32_t* from = places.x + place;
    uint4 v[4];
    await<4>({from, from + quarter<kInt8>(1), from + quarter<kInt8>(2), from + quarter<kInt8>(3)}, phase, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[2 * i] = pair(v[i].x, v[i].y), pairs[2 * i + 1] = pair(v[i].z, v[i].w);
  }

  // blocks of x / rms(x) * weight, rounded once
  __device__ __forceinline__ void normed(const void* norm, uint4 (&w)[kWide][2], bool first,
                                         uint32_t (&x)[kWide][kValues]) {
    float square = 0;
#pragma unroll
    for (int b = 0; b < kWide; ++b) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) x[b][i] = 0;
      const int block = l.warp + kWarps * b;
      if (l.g < p.rows && block * kBlock < p.width) residual(block, first, x[b]);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        float low, high;
        unpack_pair<T>(x[b][i], low, high);
        square = fmaf(low, low, fmaf(high, high, square));
      }
    }
    if (!kNarrow) norm_weights(norm, w);
    __syncwarp();
    square += __shfl_xor_sync(0xffffffffu, square, 1);
    square += __shfl_xor_sync(0xffffffffu, square, 2);
    if (l.g < p.rows && l.t == 0) l.s.squares[l.g * kPitch + l.warp] = square;
    l.sync();
    float scale = 0;
    if (l.g < p.rows) {
      scale = ptx::rsqrt_approx(fmaf(sum16(l.s.squares + l.g * kPitch), counted.inverse_width, p.eps));
    }
#pragma unroll
    for (int b = 0; b < kWide; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4& u = w[b][i / 2];
        float y[4], weight[4];
        unpack_pair<T>(x[b][2 * i], y[0], y[1]);
        unpack_pair<T>(x[b][2 * i + 1], y[2], y[3]);
        unpack_pair<T>(i % 2 ? u.z : u.x, weight[0], weight[1]);
        unpack_pair<T>(i % 2 ? u.w : u.y, weight[2], weight[3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] *= scale * weight[j];
        pack_quarter<T, kInt8>(y, x[b] + 2 * i);
      }
    }
  }

  // a matrix of the width's channels
  template <int kRunsAhead, bool kGated, typename Fetch, typename Finish>
  __device__ __forceinline__ void linear(const StepMatrix& m, const Division& n, Fetch fetch, Finish finish) {
    if constexpr (kTiled) {
      l.template linear<kWide, kRunsAhead, kGated>(m, Share(n), p.width, fetch, finish);
    } else {
      l.template linear_of_long_runs<kWide, 1, kGated>(m, Share(n), p.width, fetch, finish);
    }
    ++phase;
  }

  // a matrix of the normed residual
  template <bool kGated, typename Finish>
  __device__ __forceinline__ void of_normed(const StepMatrix& m, const Division& n, const void* norm, bool first,
                                            Finish finish) {
    uint4 w[kWide][2] = {};
    if (kNarrow) norm_weights(norm, w);
    const auto fetch = [&](int, uint32_t (&x)[kWide][kValues]) { normed(norm, w, first, x); };
    linear<kAhead, kGated>(m, n, fetch, finish);
  }

  // adds to the residual, which stays in shared memory in float32 with the thread that made it; others see it rounded
  __device__ __forceinline__ void add(int n, int row, float sum, bool first, bool last) {
    float& kept = l.s.residual[((n - Share(counted.width).begin) << l.column_bits()) + row];
    const int place = row * p.width + n;
    const float before = first ? to_float(static_cast<const T*>(p.x)[place]) : kept;
    kept = before + sum;
    const uint32_t out = word<T>(kept, phase + 1);
    ptx::store_relaxed(places.x + place, out);
    // relaxed, as the first phase's loads of x in other blocks
    if (last) ptx::store_relaxed(static_cast<uint16_t*>(p.x) + place, static_cast<uint16_t>(out >> 16));
  }

  // x += proj attention
  __device__ __forceinline__ void project(const StepMatrix& m, bool first) {
    const auto fetch = [&](int, uint32_t (&x)[kWide][kValues]) {
      l.sync();
#pragma unroll
      for (int b = 0; b < kWide; ++b) {
        const int block = l.warp + kWarps * b;
#pragma unroll
        for (int i = 0; i < kValues; ++i) x[b][i] = 0;
        if (l.g < p.rows && block * kBlock < p.width) joined(l, places, block, phase, x[b]);
      }
      __syncwarp();
    };
    const auto finish = [&](int n, int row, float sum, float) { add(n, row, sum, first, false); };
    linear<kAheadProj, false>(m, counted.width, fetch, finish);
  }

  __device__ __forceinline__ void queries(const StepMatrix& m, const void* norm) {
    of_normed<false>(m, counted.width, norm, false, [&](int n, int row, float sum, float) {
      ptx::store_relaxed(places.qkv + 3 * row * p.width + n, word<T>(sum, phase + 1));
    });
  }

  // q, k and v; k and v also into the caches, for steps to come
  __device__ __forceinline__ void queries_keys_values(int layer, bool first) {
    const StepLayer& of = p.layer[layer];
    of_normed<false>(of.qkv, counted.qkv, of.norm_attn, first, [&](int n, int row, float sum, float) {
      const uint32_t out = word<T>(sum, phase + 1);
      ptx::store_relaxed(places.qkv + 3 * row * p.width + n, out);
      if (n < p.width) return;
      const bool key = n < 2 * p.width;
      const int channel = n - (key ? 1 : 2) * p.width, at = p.keys.length[row] - 1;
      if (at < 0 || at >= p.keys.max_len) return;
      const int64_t (&stride)[3] = key ? p.keys.k_stride : p.keys.v_stride;
      uint16_t* cache = static_cast<uint16_t*>(key ? p.k : p.v) + layer * (key ? p.k_layer : p.v_layer);
      const int head = channel >> head_bits(p), of_head = channel & (p.head_dim - 1);
      cache[row * stride[0] + head * stride[1] + at * stride[2] + of_head] = static_cast<uint16_t>(out >> 16);
    });
  }

  // x += w2 (silu(w1 normed) * w3 normed)
  __device__ __forceinline__ void feed_forward(const StepLayer& of, bool last) {
    of_normed<true>(of.w13, counted.hidden, of.norm_mlp, false, [&](int n, int row, float gate, float up) {
      const float sigmoid = ptx::rcp_approx(1.0f + ptx::exp2_approx(-kLog2E * gate));
      ptx::store_relaxed(places.hidden + row * p.hidden + n, word<T>(gate * sigmoid * up, phase + 1));
    });
    const auto fetch = [&](int part, uint32_t (&x)[kDeep][kValues]) {
      if (part == 0) l.sync();
      uint4 v[4 * kDeep] = {};
      const int begin = l.warp + kWarps * kDeep * part;
      if (l.g < p.rows && begin * kBlock < p.hidden) {
        const uint32_t *words[4 * kDeep], *row = places.hidden + l.g * p.hidden + quarters<kInt8>(l.t);
#pragma unroll
        for (int b = 0; b < kDeep; ++b) {
          const int block = begin + kWarps * b, there = block * kBlock < p.hidden ? block : begin;
          const uint32_t* from = row + there * kBlock;
#pragma unroll
          for (int i = 0; i < 4; ++i) words[4 * b + i] = from + quarter<kInt8>(i);
        }
        await<4 * kDeep>(words, phase, v);
      }
#pragma unroll
      for (int i = 0; i < 4 * kDeep; ++i) pack_quarter<kInt8>(v[i], x[i / 4] + 2 * (i % 4));
      __syncwarp();
    };
    const auto finish = [&](int n, int row, float sum, float) { add(n, row, sum, false, last); };
    l.template linear_of_long_runs<kDeep, kParts, false>(of.w2, Share(counted.width), p.hidden, fetch, finish);
    ++phase;
  }

  __device__ __forceinline__ void attention(const StepKeys& keys, bool fresh) {
    attend(l, places, keys, fresh, phase);
    ++phase;
  }

  // in the order of Producer::step
  __device__ void step() {
#pragma unroll 1
    for (int i = 0; i < p.layers; ++i) {
      const StepLayer& of = p.layer[i];
      queries_keys_values(i, i == 0);
      attention(p.keys, true);
      project(of.proj, i == 0);
      if (p.contexts) {
        queries(of.cross_q, of.norm_cross);
        attention(p.cross, false);
        project(of.cross_proj, false);
      }
      feed_forward(of, i + 1 == p.layers);
    }
  }
};

}  // namespace flexkernels::cuda::step
