// Attention of a persistent step: a block takes one of two ranges of the keys of a head of a row. Eight channels of a
// key are a lane's, so a key takes head_dim / 8 lanes and a tile gives every such group of lanes of the block one key.
#pragma once

#include "step_linear.h"

namespace flexkernels::cuda::step {

constexpr float kNone = -1e30f, kLog2E = 1.4426950408889634f;

template <typename T>
__device__ __forceinline__ void unpack8(const uint4& v, float (&f)[8]) {
  unpack<T>(v, f);
}

// values so far of one group of lanes, weighted by 2^(score - top)
struct Running {
  float out[8] = {}, top = kNone, total = 0;

  // all lanes take part; `valid` says whether the key counts
  template <typename T>
  __device__ __forceinline__ void add(const float (&q)[8], const uint4& key, const uint4& value, int lanes,
                                      bool valid) {
    float f[8], score = 0;
    unpack8<T>(key, f);
#pragma unroll
    for (int i = 0; i < 8; ++i) score = fmaf(q[i], f[i], score);
#pragma unroll
    for (int lane = 1; lane < 8; lane *= 2) score += __shfl_xor_sync(0xffffffffu, score, lane);
    if (lanes == 16) score += __shfl_xor_sync(0xffffffffu, score, 8);
    if (!valid) return;
    const float higher = fmaxf(top, score), keep = ptx::exp2_approx(top - higher);
    const float weight = ptx::exp2_approx(score - higher);
    top = higher;
    total = fmaf(total, keep, weight);
    unpack8<T>(value, f);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = fmaf(out[i], keep, weight * f[i]);
  }
  // with those of the other groups of the warp
  __device__ __forceinline__ void merge(int lanes) {
#pragma unroll 1
    for (int lane = lanes; lane < 32; lane *= 2) {
      const float higher = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, lane)), keep = ptx::exp2_approx(top - higher);
      top = higher;
      total *= keep;
      total += __shfl_xor_sync(0xffffffffu, total, lane);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out[i] *= keep;
        out[i] += __shfl_xor_sync(0xffffffffu, out[i], lane);
      }
    }
  }
};

// words of x, of q, k and v, of the hidden values and of attention
struct Places {
  uint32_t *x, *qkv, *hidden, *parts;

  __device__ explicit Places(const TransformerStep& p) {
    x = p.words;
    qkv = x + p.rows * p.width;
    hidden = qkv + 3 * p.rows * p.width;
    parts = hidden + p.rows * p.hidden;
  }
};

// every unit of this block: q (and, `fresh`, the row's new key and value) are of `phase`, results of the one behind it
template <typename T, bool kInt8>
__device__ __forceinline__ void attend(Lanes<T, kInt8>& l, const Places& places, const StepKeys& keys, bool fresh,
                                       uint32_t phase) {
  const TransformerStep& p = l.p;
  const int bits = head_bits(p) - 3, lanes = 1 << bits, channels = 8 * (l.lane & (lanes - 1)), group = l.lane >> bits;
  const int per_tile = tile_keys(p), key = l.warp * (32 >> bits) + group;
  const float scale = kLog2E * ptx::rsqrt_approx(static_cast<float>(p.head_dim));
  float *out = l.s.sums, *tops = out + kWarps * p.head_dim, *totals = tops + kWarps;
#pragma unroll 1
  for (int number = blockIdx.x; number < units(p); number += gridDim.x) {
    const Unit u(p, keys, number, fresh);
    const uint32_t* from = places.qkv + 3 * u.row * p.width + u.head * p.head_dim + channels;
    const bool newest = fresh && u.split == kStepSplits - 1 && l.warp == 0;
    uint4 v[6] = {};
    // shared memory of the unit, or of the phase, before this one is free
    l.sync();
    if (newest) {
      const uint32_t *k = from + p.width, *w = k + p.width;
      await<6>({from, from + 4, k, k + 4, w, w + 4}, phase, v);
    } else {
      uint4 only[2];
      await<2>({from, from + 4}, phase, only);
      v[0] = only[0], v[1] = only[1];
    }
    __syncwarp();
    const uint32_t words[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
    float q[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = value_of<T>(words[i]) * scale;
    Running sums;
    if (newest) {
      const uint4 k =
          make_uint4(pair(v[2].x, v[2].y), pair(v[2].z, v[2].w), pair(v[3].x, v[3].y), pair(v[3].z, v[3].w));
      const uint4 w =
          make_uint4(pair(v[4].x, v[4].y), pair(v[4].z, v[4].w), pair(v[5].x, v[5].y), pair(v[5].z, v[5].w));
      sums.add<T>(q, k, w, lanes, group == 0);
    }
#pragma unroll 1
    for (int first = u.begin; first < u.end; first += per_tile) {
      const Cursor tile = l.wait(1);
      const unsigned char* at = l.s.ring + (tile.slot << kTileBits) + 2 * (key * p.head_dim + channels);
      const bool valid = first + key < u.end;
      uint4 k{}, w{};
      if (valid) {
        k = *reinterpret_cast<const uint4*>(at);
        w = *reinterpret_cast<const uint4*>(at + kTile / 2);
      }
      l.release(tile, 1);
      sums.add<T>(q, k, w, lanes, valid);
    }
    sums.merge(lanes);
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[l.warp * p.head_dim + channels + i] = sums.out[i];
      if (channels == 0) tops[l.warp] = sums.top, totals[l.warp] = sums.total;
    }
    l.sync();
    const int channel = threadIdx.x;
    if (channel >= p.head_dim) continue;
    float top = kNone, total = 0, sum = 0;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, tops[w]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = ptx::exp2_approx(tops[w] - top);
      total = fmaf(weight, totals[w], total);
      sum = fmaf(weight, out[w * p.head_dim + channel], sum);
    }
    uint32_t* to = places.parts + static_cast<int64_t>(number) * step_part(p.head_dim);
    // NaN is more than 0 to nothing, and shows
    ptx::store_relaxed(to + channel, word<T>(total == 0.0f ? 0.0f : __fdividef(sum, total), phase + 1));
    if (channel < 4) {
      // the two halves of a float32, twice
      const uint32_t weight = bits_of_float(total == 0.0f ? kNone : top + ptx::log2_approx(total));
      const uint32_t half = channel % 2 ? weight << 16 : weight & 0xffff0000u;
      ptx::store_relaxed(to + p.head_dim + channel, half | (phase + 1));
    }
  }
}

// a row's channels of attention, its ranges of keys joined: block `block` of a lane, as `linear` takes it
template <typename T, bool kInt8>
__device__ __forceinline__ void joined(const Lanes<T, kInt8>& l, const Places& places, int block, uint32_t phase,
                                       uint32_t (&x)[kValues]) {
  static_assert(kStepSplits == 2, "two ranges are joined");
  const TransformerStep& p = l.p;
  const int head = block * kBlock >> head_bits(p), channel = block * kBlock & (p.head_dim - 1);
  const int part = step_part(p.head_dim);
  const uint32_t* low = places.parts + static_cast<int64_t>(l.g * p.heads + head) * kStepSplits * part;
  const uint32_t *high = low + part, *weights[2] = {low + p.head_dim, high + p.head_dim};
  uint4 v[10];
  low += channel + quarters<kInt8>(l.t), high += channel + quarters<kInt8>(l.t);
  const int b = quarter<kInt8>(1), c = quarter<kInt8>(2), d = quarter<kInt8>(3);
  await<10>({weights[0], weights[1], low, low + b, low + c, low + d, high, high + b, high + c, high + d}, phase, v);
  const float first = float_of_bits((v[0].x & 0xffff0000u) | v[0].y >> 16);
  const float second = float_of_bits((v[1].x & 0xffff0000u) | v[1].y >> 16), top = fmaxf(first, second);
  float share[2] = {ptx::exp2_approx(first - top), ptx::exp2_approx(second - top)};
  const float all = ptx::rcp_approx(share[0] + share[1]);
  share[0] *= all, share[1] *= all;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 &one = v[2 + i], &two = v[6 + i];
    const float f[4] = {share[0] * value_of<T>(one.x) + share[1] * value_of<T>(two.x),
                        share[0] * value_of<T>(one.y) + share[1] * value_of<T>(two.y),
                        share[0] * value_of<T>(one.z) + share[1] * value_of<T>(two.z),
                        share[0] * value_of<T>(one.w) + share[1] * value_of<T>(two.w)};
    pack_quarter<T, kInt8>(f, x + 2 * i);
  }
}

}  // namespace flexkernels::cuda::step
