// 16-byte packs of elements.
#pragma once

#include <stdint.h>

#include "../core/dtype.h"

namespace flexkernels::cuda {

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

template <int N, typename T>
static __device__ __forceinline__ void load_floats(const T* p, float (&out)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = to_float(pack.v[j]);
}

template <int N, typename T>
static __device__ __forceinline__ void store_floats(T* p, const float (&in)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) from_float(in[j], &pack.v[j]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

union Words {
  uint4 v;
  uint32_t w[4];
};

// 16 bytes from the `count` elements at p that exist, zeros behind them
template <typename T>
static __device__ __forceinline__ uint4 gather(const T* p, int count) {
  constexpr int kPerWord = 4 / sizeof(T), kBits = 8 * sizeof(T);
  Words words{};
#pragma unroll
  for (int j = 0; j < 4 * kPerWord; ++j) {
    if (j < count) words.w[j / kPerWord] |= static_cast<uint32_t>(p[j]) << j % kPerWord * kBits;
  }
  return words.v;
}

}  // namespace flexkernels::cuda
