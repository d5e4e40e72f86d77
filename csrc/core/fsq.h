// Finite scalar quantisation by thresholds: a level is the count of float32 thresholds below z.
#pragma once

#include "dtype.h"

namespace flexkernels {

constexpr int kFsqMaxDims = 16;
// up to this many thresholds a linear count beats a binary search
constexpr int kFsqLinearCount = 32;

struct FsqQuantize {
  const void* z;            // [n, dims]
  const float* thresholds;  // [dims, width], ascending, padded with +inf
  const float* table;       // [dims, width + 1] codes of the levels, or null
  void* codes;              // [n, dims] or null
  void* ids;                // [n] or null
  int64_t n;
  int64_t basis[kFsqMaxDims];  // 1, L0, L0*L1, ...
  int64_t codebook;            // product of the levels, 0 without ids
  int dims, width;
  int half[kFsqMaxDims];  // L // 2
  Dtype dtype;            // of z and codes
  bool ids64;
};

struct FsqDequantize {
  const void* ids;     // [n]
  const float* table;  // [dims, width + 1] codes of the levels, or null
  void* codes;         // [n, dims]
  int64_t n;
  int64_t codebook;  // product of the levels
  int dims, width;
  int levels[kFsqMaxDims];
  Dtype dtype;  // of codes
  bool ids64;
};

// count(t < z) over `width` ascending thresholds, without branches on z; NaN gives 0
FLEXKERNELS_HD int fsq_level(const float* thresholds, int width, float z) {
  int top = 1;
  while (2 * top <= width) top *= 2;
  int count = 0;
  for (int step = top; step > 0; step /= 2) {
    const int next = count + step < width ? count + step : width;
    count = thresholds[next - 1] < z ? next : count;
  }
  return count;
}

// true float32 division, as the formula has it: a reciprocal would differ in the last bit
FLEXKERNELS_HD float fsq_code(int level, int half) {
  return static_cast<float>(level - half) / static_cast<float>(half);
}

}  // namespace flexkernels
