// A few rows of x against all of weight: a warp reads R rows of weight once, 16 bytes a lane, against M rows of x.
#include "../core/linear.h"

#include "kernels.h"
#include "launch.h"
#include "pack.h"

namespace flexkernels::cuda {
namespace {

constexpr int kWarps = 4;

template <int N>
__device__ __forceinline__ void load_weights(const int8_t* p, float (&out)[N]) {
  const Pack<int8_t, N> pack = *reinterpret_cast<const Pack<int8_t, N>*>(p);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = static_cast<float>(pack.v[j]);
}

template <int N, typename T>
__device__ __forceinline__ void load_weights(const T* p, float (&out)[N]) {
  load_floats<N>(p, out);
}

template <typename X>
__device__ __forceinline__ float finish(const SkinnyLinear& p, int64_t row, float dot) {
  if (p.scale) dot *= p.scale[row];
  if (p.bias) dot += to_float(static_cast<const X*>(p.bias)[row]);
  return dot;
}

template <typename X>
__device__ __forceinline__ void write(const SkinnyLinear& p, int i, int64_t column, float value) {
  if (p.residual) {
    value += to_float(static_cast<const X*>(p.residual)[i * p.residual_stride + column]);
  }
  from_float(value, static_cast<X*>(p.out) + i * p.outputs + column);
}

// R weight rows a warp; with swiglu R / 2 of w1, then as many of w3. The order of a sum does not depend on M.
template <typename T, typename X, int N, int M, int R>
__global__ void __launch_bounds__(32 * kWarps) skinny_linear_kernel(const __grid_constant__ SkinnyLinear p) {
  const int lane = threadIdx.x % 32, step = p.swiglu ? R / 2 : R;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * step;
  if (column >= p.outputs) return;
  int64_t rows[R];
  const T* weight[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    // past the end: the last row again
    const int64_t at = column + r % step;
    rows[r] = (at < p.outputs ? at : p.outputs - 1) + (r < step ? 0 : p.outputs);
    weight[r] = static_cast<const T*>(p.weight) + rows[r] * p.k;
  }
  float sum[M][R] = {};
#pragma unroll(M <= 4 && N > 1 ? 2 : 1)
  for (int64_t c = lane * N; c < p.k; c += 32 * N) {
    float w[R][N];
#pragma unroll
    for (int r = 0; r < R; ++r) load_weights<N>(weight[r] + c, w[r]);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (i >= p.m) break;
      float x[N];
      load_floats<N>(static_cast<const X*>(p.x) + i * p.x_stride + c, x);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum[i][r] = fmaf(w[r][j], x[j], sum[i][r]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      for (int other = 16; other > 0; other /= 2) sum[i][r] += __shfl_xor_sync(0xffffffffu, sum[i][r], other);
    }
  }
  // lane i writes row i
  float mine[R] = {};
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int r = 0; r < R; ++r) mine[r] = lane == i ? sum[i][r] : mine[r];
  }
  if (lane >= M || lane >= p.m) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r >= step || column + r >= p.outputs) continue;
    float value = finish<X>(p, rows[r], mine[r]);
    if (p.swiglu) {
      const float up = r + R / 2 < R ? finish<X>(p, rows[(r + R / 2) % R], mine[(r + R / 2) % R]) : 0.0f;
      value = value / (1.0f + expf(-value)) * up;
    }
    write<X>(p, lane, column + r, value);
  }
}

template <typename T, typename X, int N, int M, int R>
void queue(const SkinnyLinear& p, cudaStream_t stream) {
  const int64_t each = kWarps * (p.swiglu ? R / 2 : R);
  const unsigned blocks = static_cast<unsigned>((p.outputs + each - 1) / each);
  launch({"skinny_linear", blocks, 32 * kWarps, stream}, skinny_linear_kernel<T, X, N, M, R>, p);
}

template <typename T, typename X>
void linear(const SkinnyLinear& p, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  const bool aligned = aligned16(p.x) && aligned16(p.weight) && p.k % N == 0 && p.x_stride * sizeof(X) % 16 == 0;
  if (!aligned) return queue<T, X, 1, kSkinnyMaxRows, 2>(p, stream);
  if (p.m == 1) return queue<T, X, N, 1, 4>(p, stream);
  if (p.m == 2) return queue<T, X, N, 2, 4>(p, stream);
  if (p.m <= 4) return queue<T, X, N, 4, 4>(p, stream);
  // half the width: sums of so many rows do not fit into the registers beside 16 bytes of each
  if (p.m <= 8) return queue<T, X, N / 2, 8, 2>(p, stream);
  queue<T, X, N / 2, kSkinnyMaxRows, 2>(p, stream);
}

template <typename X>
void linear_of_x(const SkinnyLinear& p, cudaStream_t stream) {
  if (p.weight_type == WeightType::int8)
    linear<int8_t, X>(p, stream);
  else
    linear<X, X>(p, stream);
}

}  // namespace

void skinny_linear_launch(const SkinnyLinear& p, void* stream) {
  if (p.dtype == Dtype::f32) linear_of_x<float>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::bf16) linear_of_x<bf16>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::f16) linear_of_x<f16>(p, static_cast<cudaStream_t>(stream));
}

}  // namespace flexkernels::cuda
