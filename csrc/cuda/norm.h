// What the kernels of the norms share.
#pragma once

#include "../core/norm.h"
#include "kernels.h"
#include "launch.h"
#include "pack.h"
#include "vectors.h"

namespace flexkernels::cuda {

// rows of zeros for a modulation that is absent, so that kernels need no branch for it
constexpr int64_t kZeroBytes = 16384;
static __device__ uint4 zero_row[kZeroBytes / 16];

// table row s, or zeros
template <typename M>
static __device__ __forceinline__ const M* table_or_zeros(const NormTable& table, int64_t s) {
  return table.data ? static_cast<const M*>(table.data) + s * table.stride : reinterpret_cast<const M*>(zero_row);
}

// table row s, or null
template <typename M>
static __device__ __forceinline__ const M* table_row(const NormTable& table, int64_t s) {
  return table.data ? static_cast<const M*>(table.data) + s * table.stride : nullptr;
}

// whether rows `stride` elements apart can be read by packs
template <typename X>
bool packed_rows(const void* data, int64_t stride) {
  return aligned16(data) && stride % kPack<X> == 0;
}

}  // namespace flexkernels::cuda
