// Guided flow update in one launch. Where guidance needs sums over a row a block does a row, which its second pass
// finds in the first-level cache; sums are float32 trees of a fixed shape, so an update repeats bit for bit. Where it
// needs none, blocks share the rows: a pack of 16 bytes of each tensor a thread, all of them under way at once. No
// element costs a division.
#include "kernels.h"
#include "launch.h"
#include "pack.h"
#include "vectors.h"

namespace flexkernels::cuda {
namespace {

constexpr int kMaxThreads = 512, kShareThreads = 256;
// blocks without sums that find room on a multiprocessor
constexpr int kShareBlocks = 5;
// packs of N elements of a row that a thread has under way in the pass that sums: what 64 registers hold
template <int N>
constexpr int kUnroll = N > 4 ? 2 : 3;

// elements a thread takes at once: 16 bytes of the wider type
template <typename X, typename V>
constexpr int kElements = kPack<std::conditional_t<(sizeof(X) > sizeof(V)), X, V>>;

template <int N>
struct Width {
  static constexpr int value = N;
};

// the elements of a row that are whole packs of N, and where they end
template <int N>
__device__ __forceinline__ int64_t packed_end(int64_t begin, int64_t end, bool aligned) {
  return aligned && begin % N == 0 ? begin + (end - begin) / N * N : begin;
}

// body(i, Width) over the elements [begin, end) that this block has of a row: packs while they are aligned, then single
// ones
template <int N, typename Body>
__device__ __forceinline__ void for_row(int64_t begin, int64_t end, bool aligned, Body body) {
  const int64_t packed = packed_end<N>(begin, end, aligned), threads = static_cast<int64_t>(gridDim.y) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
#pragma unroll 1
  for (int64_t i = begin + thread * N; i < packed; i += threads * N) body(i, Width<N>{});
#pragma unroll 1
  for (int64_t i = packed + thread; i < end; i += threads) body(i, Width<1>{});
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
  for (int j = 0; j < N; ++j) d[j] = fmaf(p.momentum, buffer[j], d[j]);
}

// totals over a row, which is this block's alone, of what term(v_cond, d, sums) adds for each element
template <typename X, typename V, int Count, typename Term>
__device__ __forceinline__ void sum_row(const FlowUpdate& p, int64_t begin, int64_t end, bool aligned,
                                        float (&sums)[Count], Term term) {
  constexpr int N = kElements<X, V>;
  __shared__ float of_warps[kMaxThreads / 32][Count];
  const int64_t packed = packed_end<N>(begin, end, aligned), step = static_cast<int64_t>(blockDim.x) * N;
#pragma unroll 1
  for (int64_t base = begin + threadIdx.x * N; base < packed; base += kUnroll<N> * step) {
    float c[kUnroll<N>][N] = {}, d[kUnroll<N>][N] = {};
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      const int64_t i = base + u * step;
      if (i >= packed) continue;
      load_floats<N>(static_cast<const V*>(p.v_cond) + i, c[u]);
      difference<N, V>(p, i, c[u], d[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<N>; ++u) {
      if (base + u * step >= packed) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) term(c[u][j], d[u][j], sums);
    }
  }
#pragma unroll 1
  for (int64_t i = packed + threadIdx.x; i < end; i += blockDim.x) {
    float c[1], d[1];
    load_floats<1>(static_cast<const V*>(p.v_cond) + i, c);
    difference<1, V>(p, i, c, d);
    term(c[0], d[0], sums);
  }
  block_sums<Count>(sums, of_warps, blockDim.x / 32);
}

template <typename X, typename V>
__device__ FlowCoefficients<float> apg(const FlowUpdate& p, int64_t begin, int64_t end, bool aligned) {
  float sums[3] = {};
  sum_row<X, V>(p, begin, end, aligned, sums, [](float c, float d, float (&of)[3]) {
    of[0] = fmaf(d, d, of[0]);
    of[1] = fmaf(d, c, of[1]);
    of[2] = fmaf(c, c, of[2]);
  });
  return flow_apg<float>(p, sums[0], sums[1], sums[2]);
}

template <typename X, typename V>
__device__ FlowCoefficients<float> rescaled(const FlowUpdate& p, int64_t begin, int64_t end, bool aligned) {
  if (begin >= end) return flow_plain<float>(p);
  const float gain = flow_scale(p) - 1, first_c = to_float(static_cast<const V*>(p.v_cond)[begin]);
  const float first_g = first_c + gain * (first_c - to_float(static_cast<const V*>(p.v_uncond)[begin]));
  float sums[4] = {};
  sum_row<X, V>(p, begin, end, aligned, sums, [&](float v, float d, float (&of)[4]) {
    const float c = v - first_c, g = v + gain * d - first_g;
    of[0] += c;
    of[1] = fmaf(c, c, of[1]);
    of[2] += g;
    of[3] = fmaf(g, g, of[3]);
  });
  return flow_rescaled<float>(p, static_cast<float>(end - begin), sums[0], sums[1], sums[2], sums[3]);
}

template <typename X, typename V, bool kSums>
__device__ FlowCoefficients<float> coefficients(const FlowUpdate& p, int64_t begin, int64_t end, bool aligned) {
  if constexpr (!kSums) return flow_plain<float>(p);
  return p.guidance == kFlowAPG ? apg<X, V>(p, begin, end, aligned) : rescaled<X, V>(p, begin, end, aligned);
}

// x += weight * term[i ..]
template <int N, typename T>
__device__ __forceinline__ void add_term(const T* term, int64_t i, float weight, float (&x)[N]) {
  float value[N];
  load_floats<N>(term + i, value);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] += weight * value[j];
}

// kSums: flow_needs_sums(p)
template <typename X, typename V, bool kSums>
__global__ void __launch_bounds__(kSums ? kMaxThreads : kShareThreads, kSums ? 2 : kShareBlocks)
    flow_update_kernel(const __grid_constant__ FlowUpdate p, bool aligned) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t row = blockIdx.x, begin = flow_row_begin(p, row), end = flow_row_begin(p, row + 1);
  const FlowCoefficients<float> k = coefficients<X, V, kSums>(p, begin, end, aligned);
  const int64_t first = p.prefix ? flow_prefix_begin(p, row) : 0;
  const int64_t given = p.prefix ? flow_prefix_begin(p, row + 1) - first : 0;
  for_row<kElements<X, V>>(begin, end, aligned, [&](int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    float v[N], d[N] = {}, state[N], x[N];
    load_floats<N>(static_cast<const V*>(p.v_cond) + i, v);
    load_floats<N>(static_cast<const X*>(p.x[0]) + i, state);
    if (p.guidance != kFlowNone) difference<N, V>(p, i, v, d);
    if (p.momentum_next) store_floats<N>(p.momentum_next + i, d);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      v[j] = fmaf(k.beta, d[j], k.alpha * v[j]);
      x[j] = fmaf(flow_a(p, 0), state[j], flow_b(p) * v[j]);
    }
    if (p.velocity) store_floats<N>(p.velocity + i, v);
#pragma unroll 1
    for (int s = 1; s < p.states; ++s) {
      const float weight = flow_a(p, s);
      if (!p.scalars || weight != 0) add_term<N>(static_cast<const X*>(p.x[s]), i, weight, x);
    }
#pragma unroll 1
    for (int s = 0; s < p.pasts; ++s) {
      const float weight = flow_past_b(p, s);
      if (!p.scalars || weight != 0) add_term<N>(p.past[s], i, weight, x);
    }
    if (i - begin < given) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (i - begin + j < given) x[j] = flow_prefix(p, first + i - begin + j);
      }
    }
    store_floats<N>(static_cast<X*>(p.x_next) + i, x);
  });
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
  const int64_t packs = (p.row_length + kElements<X, V> - 1) / kElements<X, V>;
  int threads = 32;
  dim3 grid(static_cast<unsigned>(p.rows));
  if (flow_needs_sums(p)) {
    while (threads < kMaxThreads && threads < packs) threads *= 2;
    const Launch at{"flow_update", grid, static_cast<unsigned>(threads), stream, 0, 1, true};
    return launch(at, flow_update_kernel<X, V, true>, p, all_aligned(p));
  }
  while (threads < kShareThreads && threads < packs) threads *= 2;
  const int64_t parts = (packs + threads - 1) / threads, most = 65535;
  grid.y = static_cast<unsigned>(parts < 1 ? 1 : parts < most ? parts : most);
  const Launch at{"flow_update", grid, static_cast<unsigned>(threads), stream, 0, 1, true};
  launch(at, flow_update_kernel<X, V, false>, p, all_aligned(p));
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
