// Row norms: one block a row, which it keeps in registers. Sums are float32 trees of a fixed shape.
#include "kernels.h"
#include "launch.h"
#include "pack.h"

namespace flexkernels::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kThreads = 256;

// the block's total in every thread
__device__ float block_sum(float value) {
  __shared__ float of_warp[kMaxThreads / 32];
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  // the last call's totals have been read
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += of_warp[warp];
  return total;
}

// a thread's share of a row: pack k begins at element (k * threads + thread) * N
template <int N, int K, typename Body>
__device__ __forceinline__ void for_packs(int64_t d, Body body) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t i = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * N;
    if (i < d) body(k, i);
  }
}

struct Stats {
  float mean, rstd;
};

// elements beyond the row are zero in v
template <int N, int K>
__device__ Stats row_stats(const float (&v)[K][N], int64_t d, float eps, int kind) {
  const float per = 1.0f / static_cast<float>(d);
  float mean = 0, squares = 0;
  if (kind == kLayerNorm) {
    float sum = 0;
    for_packs<N, K>(d, [&](int k, int64_t) {
#pragma unroll
      for (int j = 0; j < N; ++j) sum += v[k][j];
    });
    mean = block_sum(sum) * per;
  }
  for_packs<N, K>(d, [&](int k, int64_t) {
#pragma unroll
    for (int j = 0; j < N; ++j) squares += (v[k][j] - mean) * (v[k][j] - mean);
  });
  return {mean, 1.0f / sqrtf(block_sum(squares) * per + eps)};
}

template <typename M>
__device__ const M* table_row(const NormTable& table, int64_t s) {
  return table.data ? static_cast<const M*>(table.data) + s * table.stride : nullptr;
}

// a *= 1 + scale, or the weight of an RMS norm
template <int N, typename M>
__device__ __forceinline__ void times_factor(const M* scale, int kind, int64_t i, float (&a)[N]) {
  if (!scale) return;
  float by[N];
  load_floats<N>(scale + i, by);
#pragma unroll
  for (int j = 0; j < N; ++j) a[j] *= kind == kLayerNorm ? 1.0f + by[j] : by[j];
}

template <typename X, typename M, int N, int K>
__global__ void __launch_bounds__(kMaxThreads) norm_forward_kernel(const __grid_constant__ NormForward p) {
  const int64_t row = blockIdx.x, s = norm_segment(p.segment, row, p.segments);
  const X* x = static_cast<const X*>(p.x) + row * p.x_stride;
  const M *gate = table_row<M>(p.gate, s), *scale = table_row<M>(p.scale, s), *shift = table_row<M>(p.shift, s);
  float v[K][N];
  for_packs<N, K>(p.d, [&](int k, int64_t i) {
    load_floats<N>(x + i, v[k]);
    if (!p.y) return;
    float y[N], by[N];
    load_floats<N>(static_cast<const X*>(p.y) + row * p.y_stride + i, y);
    if (gate) load_floats<N>(gate + i, by);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      // the norm takes the rounded sum
      X rounded;
      from_float(gate ? fmaf(by[j], y[j], v[k][j]) : v[k][j] + y[j], &rounded);
      v[k][j] = to_float(rounded);
    }
    store_floats<N>(static_cast<X*>(p.sum) + row * p.d + i, v[k]);
  });
  if (!p.out) return;
  const Stats stats = row_stats<N, K>(v, p.d, p.eps, p.kind);
  for_packs<N, K>(p.d, [&](int k, int64_t i) {
    float add[N] = {};
    if (shift) load_floats<N>(shift + i, add);
#pragma unroll
    for (int j = 0; j < N; ++j) v[k][j] = (v[k][j] - stats.mean) * stats.rstd;
    times_factor<N>(scale, p.kind, i, v[k]);
#pragma unroll
    for (int j = 0; j < N; ++j) v[k][j] += add[j];
    store_floats<N>(static_cast<X*>(p.out) + row * p.d + i, v[k]);
  });
}

// a = grad_out * factor, read again where it is needed: only v stays in registers
template <typename X, typename M, int N>
__device__ __forceinline__ void load_a(const NormBackward& p, const M* scale, int64_t at, int64_t i, float (&a)[N]) {
  load_floats<N>(static_cast<const X*>(p.grad_out) + at, a);
  times_factor<N>(scale, p.kind, i, a);
}

template <typename X, typename M, int N, int K>
__global__ void __launch_bounds__(kMaxThreads) norm_backward_kernel(const __grid_constant__ NormBackward p) {
  const int64_t row = blockIdx.x, s = norm_segment(p.segment, row, p.segments), base = row * p.d;
  const M *gate = table_row<M>(p.gate, s), *scale = table_row<M>(p.scale, s);
  float v[K][N];
  Stats stats{0, 0};
  float mean_a = 0, mean_ax = 0;
  if (p.grad_out) {
    for_packs<N, K>(p.d, [&](int k, int64_t i) { load_floats<N>(static_cast<const X*>(p.v) + base + i, v[k]); });
    stats = row_stats<N, K>(v, p.d, p.eps, p.kind);
    float sum_a = 0, sum_ax = 0;
    for_packs<N, K>(p.d, [&](int k, int64_t i) {
      float a[N];
      load_a<X>(p, scale, base + i, i, a);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        v[k][j] = (v[k][j] - stats.mean) * stats.rstd;
        sum_a += a[j];
        sum_ax += a[j] * v[k][j];
      }
    });
    mean_ax = block_sum(sum_ax) / static_cast<float>(p.d);
    if (p.kind == kLayerNorm) mean_a = block_sum(sum_a) / static_cast<float>(p.d);
  }
  if (p.stats && threadIdx.x == 0) {
    p.stats[2 * row] = stats.mean;
    p.stats[2 * row + 1] = stats.rstd;
  }
  for_packs<N, K>(p.d, [&](int k, int64_t i) {
    float dv[N] = {}, add[N] = {};
    if (p.grad_out) {
      load_a<X>(p, scale, base + i, i, dv);
#pragma unroll
      for (int j = 0; j < N; ++j) dv[j] = stats.rstd * (dv[j] - mean_a - v[k][j] * mean_ax);
    }
    if (p.grad_sum) load_floats<N>(static_cast<const X*>(p.grad_sum) + base + i, add);
#pragma unroll
    for (int j = 0; j < N; ++j) dv[j] += add[j];
    if (p.grad_x) store_floats<N>(static_cast<X*>(p.grad_x) + base + i, dv);
    if (!p.grad_y) return;
    if (gate) {
      load_floats<N>(gate + i, add);
#pragma unroll
      for (int j = 0; j < N; ++j) dv[j] *= add[j];
    }
    store_floats<N>(static_cast<X*>(p.grad_y) + base + i, dv);
  });
}

// block b of kNormRows rows in order and kThreads columns; a thread sums one column and writes the sums of each segment
// that b meets to slot b + segment: along the rows b or the segment rises, so no two share a slot
template <typename X>
__global__ void __launch_bounds__(kThreads) norm_sums_kernel(const __grid_constant__ NormSums p, int64_t slots) {
  const int64_t block = blockIdx.x, first = block * kNormRows;
  const int64_t end = first + kNormRows < p.n ? first + kNormRows : p.n;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= p.d) return;
  float gate = 0, shift = 0, scale = 0;
  for (int64_t i = first; i < end; ++i) {
    const int64_t row = p.order ? p.order[i] : i, at = row * p.d + column;
    if (p.grad_gate) gate += to_float(static_cast<const X*>(p.dv)[at]) * to_float(static_cast<const X*>(p.y)[at]);
    if (p.grad_shift || p.grad_scale) {
      const float grad = to_float(static_cast<const X*>(p.grad_out)[at]);
      shift += grad;
      if (p.grad_scale) {
        scale += grad * ((to_float(static_cast<const X*>(p.v)[at]) - p.stats[2 * row]) * p.stats[2 * row + 1]);
      }
    }
    const int64_t s = p.order ? norm_segment(p.segment, row, p.segments) : 0;
    if (i + 1 < end && i + 1 < p.offsets[s + 1]) continue;
    float* slot = p.partial + (block + s) * p.d + column;
    slot[0] = gate;
    slot[slots * p.d] = shift;
    slot[2 * slots * p.d] = scale;
    gate = shift = scale = 0;
  }
}

__global__ void __launch_bounds__(kThreads) norm_merge_kernel(const __grid_constant__ NormSums p, int64_t slots) {
  const int64_t s = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (column >= p.d) return;
  const int64_t begin = p.offsets[s], end = p.offsets[s + 1];
  float sums[3] = {};
  for (int64_t block = begin / kNormRows; begin < end && block * kNormRows < end; ++block) {
    const float* slot = p.partial + (block + s) * p.d + column;
#pragma unroll
    for (int which = 0; which < 3; ++which) sums[which] += slot[which * slots * p.d];
  }
  if (p.grad_gate) p.grad_gate[s * p.d + column] = sums[0];
  if (p.grad_shift) p.grad_shift[s * p.d + column] = sums[1];
  if (p.grad_scale) p.grad_scale[s * p.d + column] = sums[2];
}

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename X, int N>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const __grid_constant__ Swiglu p) {
  const int64_t row = blockIdx.x, i = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * N;
  if (i >= p.h) return;
  const X* x = static_cast<const X*>(p.x) + row * p.x_stride + i;
  float a[N], b[N];
  load_floats<N>(x, a);
  load_floats<N>(x + p.h, b);
#pragma unroll
  for (int j = 0; j < N; ++j) b[j] *= a[j] * sigmoid(a[j]);
  store_floats<N>(static_cast<X*>(p.out) + row * p.h + i, b);
}

// d silu(a) / da = s * (1 + a * (1 - s)) with s = sigmoid(a)
template <typename X, int N>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(const __grid_constant__ Swiglu p) {
  const int64_t row = blockIdx.x, i = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * N;
  if (i >= p.h) return;
  const X* x = static_cast<const X*>(p.x) + row * p.x_stride + i;
  float a[N], b[N], grad[N];
  load_floats<N>(x, a);
  load_floats<N>(x + p.h, b);
  load_floats<N>(static_cast<const X*>(p.grad_out) + row * p.h + i, grad);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float s = sigmoid(a[j]), silu = a[j] * s;
    a[j] = grad[j] * b[j] * s * (1.0f + a[j] * (1.0f - s));
    b[j] = grad[j] * silu;
  }
  X* out = static_cast<X*>(p.out) + row * 2 * p.h + i;
  store_floats<N>(out, a);
  store_floats<N>(out + p.h, b);
}

int threads_of(int64_t packs) {
  int threads = 32;
  while (threads < kMaxThreads && threads < packs) threads *= 2;
  return threads;
}

template <int N>
bool rows_aligned(const void* data, int64_t stride) {
  return aligned16(data) && stride % N == 0;
}

template <typename X, typename M>
void forward(const NormForward& p, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(X);
  bool aligned = p.d % N == 0 && rows_aligned<N>(p.x, p.x_stride) && rows_aligned<N>(p.y, p.y_stride) &&
                 aligned16(p.sum) && aligned16(p.out);
  for (const NormTable& table : {p.gate, p.shift, p.scale}) {
    aligned = aligned && rows_aligned<N>(table.data, table.stride);
  }
  const unsigned rows = static_cast<unsigned>(p.n);
  const int threads = threads_of(aligned ? p.d / N : p.d);
  if (!aligned)
    launch({"norm_forward", rows, threads, stream}, norm_forward_kernel<X, M, 1, kNormMaxWidth / kMaxThreads>, p);
  else if (p.d <= kMaxThreads * N)
    launch({"norm_forward", rows, threads, stream}, norm_forward_kernel<X, M, N, 1>, p);
  else
    launch({"norm_forward", rows, threads, stream}, norm_forward_kernel<X, M, N, kNormMaxWidth / kMaxThreads / N>, p);
}

template <typename X, typename M>
void backward(const NormBackward& p, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(X);
  bool aligned = p.d % N == 0;
  for (const void* data :
       {p.grad_out, p.grad_sum, p.v, static_cast<const void*>(p.grad_x), static_cast<const void*>(p.grad_y)}) {
    aligned = aligned && aligned16(data);
  }
  for (const NormTable& table : {p.gate, p.scale}) aligned = aligned && rows_aligned<N>(table.data, table.stride);
  const unsigned rows = static_cast<unsigned>(p.n);
  const int threads = threads_of(aligned ? p.d / N : p.d);
  if (!aligned)
    launch({"norm_backward", rows, threads, stream}, norm_backward_kernel<X, M, 1, kNormMaxWidth / kMaxThreads>, p);
  else if (p.d <= kMaxThreads * N)
    launch({"norm_backward", rows, threads, stream}, norm_backward_kernel<X, M, N, 1>, p);
  else
    launch({"norm_backward", rows, threads, stream}, norm_backward_kernel<X, M, N, kNormMaxWidth / kMaxThreads / N>, p);
}

unsigned columns_of(int64_t d, int64_t each) { return static_cast<unsigned>((d + each - 1) / each); }

template <typename X>
void sums(const NormSums& p, cudaStream_t stream) {
  const int64_t blocks = (p.n + kNormRows - 1) / kNormRows, slots = blocks + p.segments;
  const unsigned columns = columns_of(p.d, kThreads);
  if (blocks > 0) {
    launch({"norm_sums", dim3(static_cast<unsigned>(blocks), columns), kThreads, stream}, norm_sums_kernel<X>, p,
           slots);
  }
  launch({"norm_sums", dim3(static_cast<unsigned>(p.segments), columns), kThreads, stream}, norm_merge_kernel, p,
         slots);
}

template <typename X, int N>
void swiglu_packs(const Swiglu& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.n), columns_of(p.h, kThreads * N));
  if (p.grad_out)
    launch({"swiglu", grid, kThreads, stream}, swiglu_backward_kernel<X, N>, p);
  else
    launch({"swiglu", grid, kThreads, stream}, swiglu_kernel<X, N>, p);
}

template <typename X>
void swiglu(const Swiglu& p, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(X);
  const bool aligned = p.h % N == 0 && rows_aligned<N>(p.x, p.x_stride) && aligned16(p.grad_out) && aligned16(p.out);
  aligned ? swiglu_packs<X, N>(p, stream) : swiglu_packs<X, 1>(p, stream);
}

}  // namespace

void norm_forward_launch(const NormForward& p, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  const bool wide = p.table_dtype == Dtype::f32;
  if (p.dtype == Dtype::f32) forward<float, float>(p, stream);
  if (p.dtype == Dtype::bf16) (wide ? forward<bf16, float> : forward<bf16, bf16>)(p, stream);
  if (p.dtype == Dtype::f16) (wide ? forward<f16, float> : forward<f16, f16>)(p, stream);
}

void norm_backward_launch(const NormBackward& p, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  const bool wide = p.table_dtype == Dtype::f32;
  if (p.dtype == Dtype::f32) backward<float, float>(p, stream);
  if (p.dtype == Dtype::bf16) (wide ? backward<bf16, float> : backward<bf16, bf16>)(p, stream);
  if (p.dtype == Dtype::f16) (wide ? backward<f16, float> : backward<f16, f16>)(p, stream);
}

void norm_sums_launch(const NormSums& p, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  if (p.dtype == Dtype::f32) sums<float>(p, stream);
  if (p.dtype == Dtype::bf16) sums<bf16>(p, stream);
  if (p.dtype == Dtype::f16) sums<f16>(p, stream);
}

void swiglu_launch(const Swiglu& p, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  if (p.dtype == Dtype::f32) swiglu<float>(p, stream);
  if (p.dtype == Dtype::bf16) swiglu<bf16>(p, stream);
  if (p.dtype == Dtype::f16) swiglu<f16>(p, stream);
}

void swiglu_backward_launch(const Swiglu& p, void* queue) { swiglu_launch(p, queue); }

}  // namespace flexkernels::cuda
