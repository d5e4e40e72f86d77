// A row's norm by packs of 16 bytes, as all kernels compute it whose results are the same bits.
#pragma once

#include "vectors.h"

namespace flexkernels::cuda {

// a warp holds a row of at most so many packs a lane; a lane takes packs lane, lane + 32, ...
constexpr int kWarpPacks = 7;

// sum of (a - mean)^2 over a pack
template <typename X>
static __device__ __forceinline__ float pack_squares(const uint4& v, float mean) {
  float a[kPack<X>], sum = 0;
  unpack<X>(v, a);
#pragma unroll
  for (int j = 0; j < kPack<X>; ++j) sum = fmaf(a[j] - mean, a[j] - mean, sum);
  return sum;
}

// per: 1 / the row's width
static __device__ __forceinline__ float rstd_of(float squares, float per, float eps) {
  return 1.0f / sqrtf(squares * per + eps);
}

// xhat * scale, or xhat * (1 + scale) + shift
template <typename X, bool RMS>
static __device__ __forceinline__ uint4 norm_pack(const uint4& v, const uint4& scale, const uint4& shift, float mean,
                                                  float rstd) {
  float a[kPack<X>], by[kPack<X>], add[kPack<X>] = {};
  unpack<X>(v, a);
  unpack<X>(scale, by);
  if constexpr (!RMS) unpack<X>(shift, add);
#pragma unroll
  for (int j = 0; j < kPack<X>; ++j) a[j] = fmaf((a[j] - mean) * rstd, RMS ? by[j] : 1.0f + by[j], add[j]);
  return pack<X>(a);
}

}  // namespace flexkernels::cuda
