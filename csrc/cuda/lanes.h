// What kernels share whose threads split a row: sums over neighbouring lanes, and packs of elements.
#pragma once

#include "pack.h"

namespace flexkernels::cuda {

constexpr unsigned kAll = 0xffffffffu;

static __device__ __forceinline__ float sum_lanes(float value, int lanes) {
  for (int lane = lanes / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAll, value, lane);
  return value;
}

// V neighbours of a row, in one access where that is `aligned`. The thread that holds an element, and with it the order
// of every sum, depends on V alone: a strided input gives the bits of a contiguous one.
template <int V, typename T>
static __device__ __forceinline__ void load_pack(const T* p, bool aligned, float (&out)[V]) {
  if (aligned) return load_floats<V>(p, out);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = to_float(p[j]);
}

template <int V, typename T>
static __device__ __forceinline__ void store_pack(T* p, bool aligned, const float (&in)[V]) {
  if (aligned) return store_floats<V>(p, in);
#pragma unroll
  for (int j = 0; j < V; ++j) from_float(in[j], p + j);
}

static inline int power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

template <typename Args>
static void by_dtype(const Args& p, void* stream, void (*f32)(const Args&, cudaStream_t),
                     void (*b16)(const Args&, cudaStream_t), void (*h16)(const Args&, cudaStream_t)) {
  (p.dtype == Dtype::f32 ? f32 : p.dtype == Dtype::bf16 ? b16 : h16)(p, static_cast<cudaStream_t>(stream));
}

}  // namespace flexkernels::cuda
