// 16 bytes of a row as registers: a pack of 4 float32 or 8 bfloat16 or float16 elements.
#pragma once

#include "../core/dtype.h"
#include "pack.h"
#include "ptx.h"

namespace flexkernels::cuda {

template <typename X>
constexpr int kPack = 16 / static_cast<int>(sizeof(X));

template <typename X>
static __device__ __forceinline__ void unpack_pair(uint32_t w, float& low, float& high) {
  if constexpr (std::is_same_v<X, bf16>) {
    low = float_of_bits(w << 16);
    high = float_of_bits(w & 0xffff0000u);
  } else {
    low = to_float(f16{static_cast<uint16_t>(w)});
    high = to_float(f16{static_cast<uint16_t>(w >> 16)});
  }
}

template <typename X>
static __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  return std::is_same_v<X, bf16> ? ptx::pack_bf16(low, high) : ptx::pack_f16(low, high);
}

template <typename X>
static __device__ __forceinline__ void unpack(const uint4& r, float (&v)[kPack<X>]) {
  const uint32_t words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(X) == 4) {
      v[i] = float_of_bits(words[i]);
    } else {
      unpack_pair<X>(words[i], v[2 * i], v[2 * i + 1]);
    }
  }
}

template <typename X>
static __device__ __forceinline__ uint4 pack(const float (&v)[kPack<X>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(X) == 4) {
      words[i] = bits_of_float(v[i]);
    } else {
      words[i] = pack_pair<X>(v[2 * i], v[2 * i + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// elements 0 and 2 of four int8 as a pair of X: an exponent that gives the mantissa's last bit the value 1 makes
// 2^7 (bfloat16) or 2^10 (float16) plus the low 7 bits; what is taken from it is 2^7 more where the sign is set
template <typename X>
static __device__ __forceinline__ uint32_t widen(uint32_t bytes) {
  constexpr bool kBf16 = std::is_same_v<X, bf16>;
  constexpr uint32_t kOne = kBf16 ? 0x43004300u : 0x64006400u;
  const uint32_t low = (bytes & 0x007f007fu) | kOne, offset = (bytes & 0x00800080u) | kOne;
  return kBf16 ? ptx::sub_bf16x2(low, offset) : ptx::sub_f16x2(low, offset);
}

static __device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// totals over the block's warps in every thread, one barrier; `buffer` [warps of a block] must not be that of the call
// before
template <int N>
static __device__ __forceinline__ void block_sums(float (&v)[N], float (*buffer)[N], int warps) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = warp_sum(v[i]);
  if (warps == 1) return;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) buffer[threadIdx.x / 32][i] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = 0;
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += buffer[w][i];
  }
}

}  // namespace flexkernels::cuda
