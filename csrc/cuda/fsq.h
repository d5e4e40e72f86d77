// What the FSQ kernels share: the arithmetic of codes, and tiles of rows that a warp moves in whole lines.
#pragma once

#include <type_traits>

#include "../core/fsq.h"
#include "kernels.h"
#include "launch.h"
#include "pack.h"
#include "vectors.h"

namespace flexkernels::cuda {

// kernels that know the dimensions take up to this many, and their ids a float32 holds: a codebook up to 2^24
constexpr int kFsqFewDims = 8;
constexpr int64_t kFsqFloatIds = 1 << 24;

constexpr int kFsqWarps = 4;

// calls visit with the constant n, 1 <= n <= N
template <int N, typename Visit>
void with_constant(int n, Visit visit) {
  if (n == N) return visit(std::integral_constant<int, N>{});
  if constexpr (N > 1) with_constant<N - 1>(n, visit);
}

template <typename Visit>
void with_float(Dtype dtype, Visit visit) {
  if (dtype == Dtype::f32) visit(float{});
  if (dtype == Dtype::bf16) visit(bf16{});
  if (dtype == Dtype::f16) visit(f16{});
}

inline unsigned fsq_blocks(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

inline int multiprocessors(const char* op) {
  int device = 0, count = 0;
  check_launch(op, cudaGetDevice(&device));
  check_launch(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// k / half as the division rounds it: a product with the reciprocal, corrected by its remainder (Markstein)
static __device__ __forceinline__ float fsq_quotient(float k, float half, float inverse) {
  const float near = __fmul_rn(k, inverse);
  return fmaf(fmaf(-near, half, k), inverse, near);
}

// the largest power of two that divides the dimensions, up to 16 bytes: a row is whole packs of it
template <typename T, int DIMS>
constexpr int kRowPack = DIMS % 8 == 0 && sizeof(T) == 2 ? 8
                         : DIMS % 4 == 0                 ? 4
                         : DIMS % 2 == 0                 ? 2
                                                         : 1;

// The rows [first, first + rows) of [n, DIMS] are one warp's: it moves them in packs of 16 bytes, neighbours by
// neighbours, and keeps them in shared memory, where each lane works on rows of its own.
template <typename T, int DIMS>
struct FsqTile {
  // about 48 bytes a lane, so that the loads of a warp fill three times 512 bytes
  static constexpr int kRowsPerLane = 48 / sizeof(T) / DIMS > 1 ? 48 / sizeof(T) / DIMS : 2;
  static constexpr int kRows = 32 * kRowsPerLane;
  static constexpr int kPacks = kRows * DIMS / kPack<T>;
  static constexpr int kMoves = (kPacks + 31) / 32;
  static constexpr int kRowsPerBlock = kFsqWarps * kRows;

  uint4 packs[kPacks];

  __device__ __forceinline__ T* row(int r) { return reinterpret_cast<T*>(packs) + r * DIMS; }

  // packed: where the rows begin at a multiple of 16 bytes
  __device__ __forceinline__ void load(const T* from, int rows, bool packed) {
    const int lane = threadIdx.x % 32;
    if (packed && rows == kRows) {
      uint4 v[kMoves];
      // all loads are under way before the first is used; lanes beyond the tile take its last pack again
#pragma unroll
      for (int i = 0; i < kMoves; ++i) {
        const int at = i * 32 + lane;
        v[i] = ptx::load_constant_once(reinterpret_cast<const uint4*>(from) + (at < kPacks ? at : kPacks - 1));
      }
#pragma unroll
      for (int i = 0; i < kMoves; ++i) {
        if (i * 32 + lane < kPacks) packs[i * 32 + lane] = v[i];
      }
    } else {
#pragma unroll 1
      for (int e = lane; e < rows * DIMS; e += 32) row(0)[e] = from[e];
    }
    __syncwarp();
  }

  __device__ __forceinline__ void store(T* to, int rows, bool packed) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if (packed && rows == kRows) {
#pragma unroll
      for (int i = 0; i < kMoves; ++i) {
        if (i * 32 + lane < kPacks) reinterpret_cast<uint4*>(to)[i * 32 + lane] = packs[i * 32 + lane];
      }
    } else {
#pragma unroll 1
      for (int e = lane; e < rows * DIMS; e += 32) to[e] = row(0)[e];
    }
  }
};

}  // namespace flexkernels::cuda
