// Guided flow step: one block a row. Sums are float32 trees of a fixed shape, so a step repeats bit for bit.
#include "kernels.h"
#include "pack.h"

namespace flexkernels::cuda {
namespace {

constexpr int kMaxThreads = 512;

// elements a thread takes at once: 16 bytes of the narrower type
template <typename X, typename V>
constexpr int kPack = 16 / (sizeof(X) < sizeof(V) ? sizeof(X) : sizeof(V));

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
__device__ __forceinline__ void difference(const FlowStep& p, int64_t i, const float (&v_cond)[N], float (&d)[N]) {
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
__device__ FlowCoefficients<float> coefficients(const FlowStep& p, int64_t begin, int64_t end, bool aligned) {
  if (p.guidance != kFlowAPG) return flow_plain<float>(p);
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

template <typename X>
__device__ void write_prefix(const FlowStep& p, int64_t row, int64_t begin, int64_t end) {
  if (!p.prefix) return;
  // the step wrote these elements from other threads
  __syncthreads();
  X* out = static_cast<X*>(p.x_next) + begin;
  const int64_t first = p.prefix_offsets[row], given = p.prefix_offsets[row + 1] - first;
  const int64_t count = given < end - begin ? given : end - begin;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) from_float(flow_prefix(p, first + i), out + i);
}

template <typename X, typename V>
__global__ void __launch_bounds__(kMaxThreads) flow_step_kernel(const __grid_constant__ FlowStep p, bool aligned) {
  const int64_t row = blockIdx.x, begin = flow_row_begin(p, row), end = flow_row_begin(p, row + 1);
  const FlowCoefficients<float> k = coefficients<X, V>(p, begin, end, aligned);
  for_row<kPack<X, V>>(begin, end, aligned, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    float c[N], d[N] = {}, x[N];
    load_floats<N>(static_cast<const V*>(p.v_cond) + i, c);
    if (p.guidance != kFlowNone) difference<N, V>(p, i, c, d);
    if (p.momentum_next) store_floats<N>(p.momentum_next + i, d);
    load_floats<N>(static_cast<const X*>(p.x) + i, x);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] += p.dt * (k.alpha * c[j] + k.beta * d[j]);
    store_floats<N>(static_cast<X*>(p.x_next) + i, x);
  });
  write_prefix<X>(p, row, begin, end);
}

template <typename X, typename V>
void step(const FlowStep& p, cudaStream_t stream) {
  bool aligned = true;
  for (const void* data : {p.x, p.v_cond, p.v_uncond, static_cast<const void*>(p.momentum_buffer),
                           static_cast<const void*>(p.x_next), static_cast<const void*>(p.momentum_next)}) {
    aligned = aligned && aligned16(data);
  }
  int threads = 32;
  while (threads < kMaxThreads && threads * kPack<X, V> < p.row_length) threads *= 2;
  flow_step_kernel<X, V><<<static_cast<unsigned>(p.rows), threads, 0, stream>>>(p, aligned);
  check_launch("flow_step");
}

template <typename X>
void step_of_v(const FlowStep& p, cudaStream_t stream) {
  if (p.v_dtype == Dtype::f32) step<X, float>(p, stream);
  if (p.v_dtype == Dtype::bf16) step<X, bf16>(p, stream);
  if (p.v_dtype == Dtype::f16) step<X, f16>(p, stream);
}

}  // namespace

void flow_step_launch(const FlowStep& p, void* stream) {
  if (p.x_dtype == Dtype::f32) step_of_v<float>(p, static_cast<cudaStream_t>(stream));
  if (p.x_dtype == Dtype::bf16) step_of_v<bf16>(p, static_cast<cudaStream_t>(stream));
  if (p.x_dtype == Dtype::f16) step_of_v<f16>(p, static_cast<cudaStream_t>(stream));
}

}  // namespace flexkernels::cuda
