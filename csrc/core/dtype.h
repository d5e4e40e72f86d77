// Storage types and their conversion to float32, shared by CPU loops and CUDA threads.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FLEXKERNELS_HD static inline __host__ __device__
#define FLEXKERNELS_HD_MEMBER __host__ __device__
#else
#define FLEXKERNELS_HD static inline
#define FLEXKERNELS_HD_MEMBER
#endif

namespace flexkernels {

enum class Dtype : int { f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

FLEXKERNELS_HD float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FLEXKERNELS_HD uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FLEXKERNELS_HD float to_float(float value) { return value; }

FLEXKERNELS_HD float to_float(bf16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

FLEXKERNELS_HD float to_float(f16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // subnormals are multiples of 2^-24; infinity and NaN keep an all-ones exponent
  if (magnitude < 0x0400u) return float_of_bits(sign | bits_of_float(static_cast<float>(magnitude) * 0x1p-24f));
  const uint32_t bias = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
  return float_of_bits(sign | ((magnitude << 13) + bias));
#endif
}

// from_float(value, out): round to nearest, ties to even
FLEXKERNELS_HD void from_float(float value, float* out) { *out = value; }

FLEXKERNELS_HD void from_float(float value, bf16* out) {
  const uint32_t bits = bits_of_float(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x0040u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

FLEXKERNELS_HD void from_float(float value, f16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    magnitude = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {
    magnitude = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // below 2^-14: adding 0.5 leaves the result, a multiple of 2^-24, in the low bits
    magnitude = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    magnitude = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | magnitude);
#endif
}

}  // namespace flexkernels
