// What the blocks of a persistent step tell each other: 32-bit words, a 16-bit value above the number of the phase that
// made it. A word is stored and loaded whole, so a reader that finds the number it waits for has the value too, and no
// other access needs an order.
#pragma once

#include "vectors.h"

namespace flexkernels::cuda::step {

// then it is an error of the launch, not a GPU that hangs: about two seconds
constexpr int kMostLooks = 1 << 21;

template <typename T>
__device__ __forceinline__ uint32_t word(float value, uint32_t phase) {
  return (pack_pair<T>(0.0f, value) & 0xffff0000u) | phase;
}

template <typename T>
__device__ __forceinline__ float value_of(uint32_t word) {
  float low, high;
  unpack_pair<T>(word, low, high);
  return high;
}

// the values of two words as a pair
__device__ __forceinline__ uint32_t pair(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x7632); }

// N times four words, all loads under way together, until every one is of `phase`
template <int N>
__device__ __forceinline__ void await(const uint32_t* const (&from)[N], uint32_t phase, uint4 (&v)[N]) {
#pragma unroll 1
  for (int look = 0;; ++look) {
    uint32_t other = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = ptx::load_relaxed(reinterpret_cast<const uint4*>(from[i]));
#pragma unroll
    for (int i = 0; i < N; ++i) other |= (v[i].x ^ phase) | (v[i].y ^ phase) | (v[i].z ^ phase) | (v[i].w ^ phase);
    if (!(other & 0xffffu)) return;
    if (look >= kMostLooks) __trap();
  }
}

// the sum of the warps' sixteen parts, in one order
__device__ __forceinline__ float sum16(const float* parts) {
  const float4* v = reinterpret_cast<const float4*>(parts);
  const float4 a = v[0], b = v[1], c = v[2], d = v[3];
  return (((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w))) +
         (((c.x + c.y) + (c.z + c.w)) + ((d.x + d.y) + (d.z + d.w)));
}

}  // namespace flexkernels::cuda::step
