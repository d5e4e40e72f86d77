// Finite scalar quantisation by thresholds: a level is the count of float32 thresholds below z.
#pragma once

#include "dtype.h"

namespace flexkernels {

constexpr int kFsqMaxDims = 16;
constexpr int kFsqMaxLevel = 256;
// up to this many thresholds a linear count beats a binary search
constexpr int kFsqLinearCount = 32;

enum class IdType : int { i64, i32, u16 };

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
  IdType id_type;
};

struct FsqDequantize {
  const void* ids;     // [n]
  const float* table;  // [dims, width + 1] codes of the levels, or null
  void* codes;         // [n, dims]
  int64_t n;
  int64_t codebook;  // product of the levels
  bool* outside;     // the CPU kernel sets it where an id is not one of the codebook's; not used on a GPU
  int dims, width;
  int levels[kFsqMaxDims];
  Dtype dtype;  // of codes
  IdType id_type;
};

// calls visit with a value of the ids' type
template <typename Visit>
static inline void with_id(IdType type, Visit visit) {
  if (type == IdType::i64) visit(int64_t{});
  if (type == IdType::i32) visit(int32_t{});
  if (type == IdType::u16) visit(uint16_t{});
}

FLEXKERNELS_HD uint64_t fsq_load_id(const void* ids, IdType type, int64_t row) {
  if (type == IdType::i64) return static_cast<uint64_t>(static_cast<const int64_t*>(ids)[row]);
  if (type == IdType::u16) return static_cast<const uint16_t*>(ids)[row];
  // a negative id lies outside every codebook
  return static_cast<uint64_t>(static_cast<int64_t>(static_cast<const int32_t*>(ids)[row]));
}

FLEXKERNELS_HD void fsq_store_id(void* ids, IdType type, int64_t row, int64_t id) {
  if (type == IdType::i64) static_cast<int64_t*>(ids)[row] = id;
  if (type == IdType::i32) static_cast<int32_t*>(ids)[row] = static_cast<int32_t>(id);
  if (type == IdType::u16) static_cast<uint16_t*>(ids)[row] = static_cast<uint16_t>(id);
}

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
