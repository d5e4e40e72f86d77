// Guided flow update: one block a row. Sums are float32 trees of a fixed shape, so an update repeats bit for bit.
#include "kernels.h"
#include "launch.h"
#include "pack.h"

namespace flexkernels::cuda {
namespace {

constexpr int kMaxThreads = 512;

// elements a thread takes at once: 16 bytes of the wider type
template <typename X, typename V>
constexpr int kPack = 16 / (sizeof(X) > sizeof(V) ? sizeof(X) : sizeof(V));

template <int N>
struct Width {
  static constexpr int value = N;
};

// body(i, Width) over the elements [begin, end) of this block's row: packs while they are aligned, then single ones
template <int N, typename Body>
__device__ __forceinline__ void for_row(int64_t begin, int64_t end, bool aligned, Body body) {
  const int64_t packed = aligned && begin % N == 0 ? begin + (end - begin) / N * N : begin;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x * N; i < packed; i += blockDim.x * N) body(i, Width<N>{});
#pragma unroll 1
  for (int64_t i = packed + threadIdx.x; i < end; i += blockDim.x) body(i, Width<1>{});
}

// d = v_cond - v_uncond (+ momentum * buffer)
template <int N, typename V>
__device__ __forceinline__ void difference(const FlowUpdate& p, int64_t i, const float (&v_cond)[N], float (&d)[N]) {
  load_floats<N>(static_cast<const V*>(p.v_uncond) + i, d);
#pragma unroll
  for (int j = 0; j < N; ++j) d[j] = v_cond[j] - d[j];
  if (!p.momentum_buffer) return;
  float buffer[N];
  load_floats<N>(p.momentum_buffer + i, buffer);
#pragma unroll
  for (int j = 0; j < N; ++j) d[j] += p.momentum * buffer[j];
}

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

template <typename X, typename V>
__device__ FlowCoefficients<float> apg(const FlowUpdate& p, int64_t begin, int64_t end, bool aligned) {
  float dd = 0, dc = 0, cc = 0;
  for_row<kPack<X, V>>(begin, end, aligned, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    float c[N], d[N];
    load_floats<N>(static_cast<const V*>(p.v_cond) + i, c);
    difference<N, V>(p, i, c, d);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      dd += d[j] * d[j];
      dc += d[j] * c[j];
      cc += c[j] * c[j];
    }
  });
  return flow_apg<float>(p, block_sum(dd), block_sum(dc), block_sum(cc));
}

template <typename X, typename V>
__device__ FlowCoefficients<float> rescaled(const FlowUpdate& p, int64_t begin, int64_t end, bool aligned) {
  if (begin >= end) return flow_plain<float>(p);
  const float gain = p.scale - 1, first_c = to_float(static_cast<const V*>(p.v_cond)[begin]);
  const float first_g = first_c + gain * (first_c - to_float(static_cast<const V*>(p.v_uncond)[begin]));
  float c1 = 0, c2 = 0, g1 = 0, g2 = 0;
  for_row<kPack<X, V>>(begin, end, aligned, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    float v[N], d[N];
    load_floats<N>(static_cast<const V*>(p.v_cond) + i, v);
    difference<N, V>(p, i, v, d);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float c = v[j] - first_c, g = v[j] + gain * d[j] - first_g;
      c1 += c;
      c2 += c * c;
      g1 += g;
      g2 += g * g;
    }
  });
  return flow_rescaled<float>(p, static_cast<float>(end - begin), block_sum(c1), block_sum(c2), block_sum(g1),
                              block_sum(g2));
}

template <typename X, typename V>
__device__ FlowCoefficients<float> coefficients(const FlowUpdate& p, int64_t begin, int64_t end, bool aligned) {
  if (p.guidance == kFlowAPG) return apg<X, V>(p, begin, end, aligned);
  return flow_needs_sums(p) ? rescaled<X, V>(p, begin, end, aligned) : flow_plain<float>(p);
}

// x += weight * term[i ..]
template <int N, typename T>
__device__ __forceinline__ void add_term(const T* term, int64_t i, float weight, float (&x)[N]) {
  float value[N];
  load_floats<N>(term + i, value);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] += weight * value[j];
}

template <typename X>
__device__ void write_prefix(const FlowUpdate& p, int64_t row, int64_t begin, int64_t end) {
  if (!p.prefix) return;
  // the step wrote these elements from other threads
  __syncthreads();
  X* out = static_cast<X*>(p.x_next) + begin;
  const int64_t first = flow_prefix_begin(p, row), given = flow_prefix_begin(p, row + 1) - first;
  const int64_t count = given < end - begin ? given : end - begin;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) from_float(flow_prefix(p, first + i), out + i);
}

template <typename X, typename V>
__global__ void __launch_bounds__(kMaxThreads, 2)
    flow_update_kernel(const __grid_constant__ FlowUpdate p, bool aligned) {
  const int64_t row = blockIdx.x, begin = flow_row_begin(p, row), end = flow_row_begin(p, row + 1);
  const FlowCoefficients<float> k = coefficients<X, V>(p, begin, end, aligned);
  for_row<kPack<X, V>>(begin, end, aligned, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    float v[N], d[N] = {}, x[N];
    load_floats<N>(static_cast<const V*>(p.v_cond) + i, v);
    if (p.guidance != kFlowNone) difference<N, V>(p, i, v, d);
    if (p.momentum_next) store_floats<N>(p.momentum_next + i, d);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      v[j] = k.alpha * v[j] + k.beta * d[j];
      x[j] = p.b * v[j];
    }
    if (p.velocity) store_floats<N>(p.velocity + i, v);
#pragma unroll 1
    for (int s = 0; s < p.states; ++s) add_term<N>(static_cast<const X*>(p.x[s]), i, p.a[s], x);
#pragma unroll 1
    for (int s = 0; s < p.pasts; ++s) add_term<N>(p.past[s], i, p.past_b[s], x);
    store_floats<N>(static_cast<X*>(p.x_next) + i, x);
  });
  write_prefix<X>(p, row, begin, end);
}

bool all_aligned(const FlowUpdate& p) {
  bool aligned = aligned16(p.v_cond) && aligned16(p.v_uncond) && aligned16(p.momentum_buffer) && aligned16(p.x_next) &&
                 aligned16(p.momentum_next) && aligned16(p.velocity);
  for (int s = 0; s < p.states; ++s) aligned = aligned && aligned16(p.x[s]);
  for (int s = 0; s < p.pasts; ++s) aligned = aligned && aligned16(p.past[s]);
  return aligned;
}

template <typename X, typename V>
void update(const FlowUpdate& p, cudaStream_t stream) {
  int threads = 32;
  while (threads < kMaxThreads && threads * kPack<X, V> < p.row_length) threads *= 2;
  launch({"flow_update", static_cast<unsigned>(p.rows), threads, stream}, flow_update_kernel<X, V>, p, all_aligned(p));
}

template <typename X>
void update_of_v(const FlowUpdate& p, cudaStream_t stream) {
  if (p.v_dtype == Dtype::f32) update<X, float>(p, stream);
  if (p.v_dtype == Dtype::bf16) update<X, bf16>(p, stream);
  if (p.v_dtype == Dtype::f16) update<X, f16>(p, stream);
}

}  // namespace

void flow_update_launch(const FlowUpdate& p, void* stream) {
  if (p.x_dtype == Dtype::f32) update_of_v<float>(p, static_cast<cudaStream_t>(stream));
  if (p.x_dtype == Dtype::bf16) update_of_v<bf16>(p, static_cast<cudaStream_t>(stream));
  if (p.x_dtype == Dtype::f16) update_of_v<f16>(p, static_cast<cudaStream_t>(stream));
}

}  // namespace flexkernels::cuda
