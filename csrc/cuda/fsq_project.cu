// LN, the projection to a few dimensions and their levels. fsq_project_kernel: a warp holds a row or two in registers
// and walks the dimensions, whose weights all warps of the block read from shared memory; for widths that are a
// multiple of four up to 2048. fsq_project_any_kernel: a block reads four rows anew for each pass. Width and dimensions
// alone choose, so the bits of a row depend on no other and not on its place in memory.
#include "../core/fsq_linear.h"

#include "fsq.h"

namespace flexkernels::cuda {
namespace {

// elements of a load: 16 bytes of float32, 8 of the others
constexpr int N = 4;
// shared memory for weights, of which every GPU has this much
constexpr int64_t kWeightBytes = 96 * 1024;
constexpr int kAnyThreads = 256, kAnyRows = 4;

template <typename T>
__device__ __forceinline__ void load_four(const T* from, float (&v)[N]) {
  if constexpr (sizeof(T) == 4) {
    unpack<T>(ptx::load_constant_once(from), v);
  } else {
    const uint2 words = __ldcs(reinterpret_cast<const uint2*>(from));
    unpack_pair<T>(words.x, v[0], v[1]);
    unpack_pair<T>(words.y, v[2], v[3]);
  }
}

__device__ __forceinline__ float weight_of(const FsqProject& p, int64_t at) {
  if (p.weight_dtype == Dtype::f32) return static_cast<const float*>(p.weight)[at];
  if (p.weight_dtype == Dtype::bf16) return to_float(static_cast<const bf16*>(p.weight)[at]);
  return to_float(static_cast<const f16*>(p.weight)[at]);
}

// W [count * N] to float32 in shared memory, four loads a thread at a time
template <typename W>
__device__ void stage(float4* to, const void* from, int count) {
  constexpr int kThreads = 32 * kFsqWarps, kAhead = 4;
  for (int begin = threadIdx.x; begin < count; begin += kAhead * kThreads) {
    float v[kAhead][N];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = begin + k * kThreads;
      load_four<W>(static_cast<const W*>(from) + static_cast<int64_t>(at < count ? at : count - 1) * N, v[k]);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = begin + k * kThreads;
      if (at < count) to[at] = make_float4(v[k][0], v[k][1], v[k][2], v[k][3]);
    }
  }
}

__device__ __forceinline__ float bias_of(const FsqProject& p, int d) {
  if (!p.bias) return 0.0f;
  if (p.weight_dtype == Dtype::f32) return static_cast<const float*>(p.bias)[d];
  if (p.weight_dtype == Dtype::bf16) return to_float(static_cast<const bf16*>(p.bias)[d]);
  return to_float(static_cast<const f16*>(p.bias)[d]);
}

__device__ __forceinline__ float scale_of(const FsqProject& p, float squares) {
  return 1.0f / sqrtf(squares / static_cast<float>(p.width) + p.eps);
}

// the code of dimension d, and its part of the id
template <typename T>
__device__ __forceinline__ int64_t write_level(const FsqProject& p, int64_t row, int d, float z) {
  const int level = fsq_level(p.thresholds + d * p.steps, p.steps, z);
  if (p.codes) from_float(fsq_code(level, p.levels[d] / 2), static_cast<T*>(p.codes) + row * p.dims + d);
  return level * p.basis[d];
}

// blocks that a multiprocessor's registers hold
template <int K>
constexpr int kBlocks = K > 9 ? 3 : 4;

// the total over the warp of v[0] in the lower half of the lanes and of v[1] in the upper, or of v[0] in all where R is
// 1. A half hands over the value that is the other's, so two totals cost the exchanges of one, in warp_sum's order.
template <int R>
__device__ __forceinline__ float sum_by_rows(const float (&v)[R]) {
  if constexpr (R == 1) return warp_sum(v[0]);
  static_assert(R <= 2, "a half of the warp has a row");
  const bool second = threadIdx.x % 32 >= 16;
  float sum = (second ? v[R - 1] : v[0]) + __shfl_xor_sync(0xffffffffu, second ? v[0] : v[R - 1], 16);
#pragma unroll
  for (int lane = 8; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  return sum;
}

// K loads a lane for each of R rows
template <typename T, int K, int R>
__global__ void __launch_bounds__(32 * kFsqWarps, kBlocks<K>) fsq_project_kernel(const __grid_constant__ FsqProject p) {
  float4* weights = ptx::dynamic_shared<float4>();  // [dims, packs]
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int lane = threadIdx.x % 32, packs = static_cast<int>(p.width / N);
  if (p.weight_dtype == Dtype::f32) stage<float>(weights, p.weight, p.dims * packs);
  if (p.weight_dtype == Dtype::bf16) stage<bf16>(weights, p.weight, p.dims * packs);
  if (p.weight_dtype == Dtype::f16) stage<f16>(weights, p.weight, p.dims * packs);
  __syncthreads();
  // lanes beyond the row take its last pack again, and count it as zero
  const auto pack_of = [&](int k) { return k * 32 + lane < packs ? k * 32 + lane : packs - 1; };
  const int64_t step = static_cast<int64_t>(gridDim.x) * kFsqWarps * R;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kFsqWarps + threadIdx.x / 32) * R;
  for (; first < p.n; first += step) {
    float x[R][K][N], scale[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const T* row = static_cast<const T*>(p.hidden) + (first + r < p.n ? first + r : p.n - 1) * p.width;
#pragma unroll
      for (int k = 0; k < K; ++k) load_four<T>(row + pack_of(k) * N, x[r][k]);
    }
    // the next rows come to L2 under the arithmetic of these
    const T* next = static_cast<const T*>(p.hidden) + (first + step) * p.width;
    const int64_t left = p.n - first - step, bytes = (left < R ? left : R) * p.width * sizeof(T);
    if (lane == 0 && left > 0 && (reinterpret_cast<uintptr_t>(next) | bytes) % 16 == 0) {
      ptx::prefetch(next, static_cast<uint32_t>(bytes));
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float part = (x[r][k][0] + x[r][k][1]) + (x[r][k][2] + x[r][k][3]);
        sum += k * 32 + lane < packs ? part : 0.0f;
      }
      const float mean = warp_sum(sum) / static_cast<float>(p.width);
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          x[r][k][j] = k * 32 + lane < packs ? x[r][k][j] - mean : 0.0f;
          squares = fmaf(x[r][k][j], x[r][k][j], squares);
        }
      }
      scale[r] = scale_of(p, warp_sum(squares));
    }
    // lane 16 r + d keeps z of row r and dimension d
    float z = 0;
#pragma unroll 1
    for (int d = 0; d < p.dims; ++d) {
      float dot[R][N] = {};
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float4 w = weights[d * packs + pack_of(k)];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          dot[r][0] = fmaf(w.x, x[r][k][0], dot[r][0]);
          dot[r][1] = fmaf(w.y, x[r][k][1], dot[r][1]);
          dot[r][2] = fmaf(w.z, x[r][k][2], dot[r][2]);
          dot[r][3] = fmaf(w.w, x[r][k][3], dot[r][3]);
        }
      }
      float sums[R];
#pragma unroll
      for (int r = 0; r < R; ++r) sums[r] = (dot[r][0] + dot[r][1]) + (dot[r][2] + dot[r][3]);
      const float sum = sum_by_rows<R>(sums);
      if (lane % kFsqMaxDims == d) z = scale[lane < kFsqMaxDims ? 0 : R - 1] * sum;
    }
    const int d = lane % kFsqMaxDims;
    const int64_t row = first + lane / kFsqMaxDims;
    const bool ours = d < p.dims && lane < kFsqMaxDims * R && row < p.n;
    int64_t id = ours ? write_level<T>(p, row, d, z + bias_of(p, d)) : 0;
#pragma unroll
    for (int half = kFsqMaxDims / 2; half > 0; half /= 2) id += __shfl_xor_sync(0xffffffffu, id, half);
    if (ours && d == 0) fsq_store_id(p.ids, p.id_type, row, id);
  }
}

// totals of V values over the block in every thread; `buffer` is free again after the call
template <int V>
__device__ void sum_over_block(float (&v)[V], float (*buffer)[V]) {
  block_sums<V>(v, buffer, kAnyThreads / 32);
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kAnyThreads) fsq_project_any_kernel(const __grid_constant__ FsqProject p) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  constexpr int R = kAnyRows;
  __shared__ float sums[kAnyThreads / 32][R];
  __shared__ float dots[kAnyThreads / 32][R * kFsqMaxDims];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * R;
  const T* rows[R];
  float mean[R] = {}, squares[R] = {}, dot[R * kFsqMaxDims] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) {
    rows[r] = static_cast<const T*>(p.hidden) + (first + r < p.n ? first + r : p.n - 1) * p.width;
  }
  for (int64_t j = threadIdx.x; j < p.width; j += kAnyThreads) {
#pragma unroll
    for (int r = 0; r < R; ++r) mean[r] += to_float(rows[r][j]);
  }
  sum_over_block<R>(mean, sums);
#pragma unroll
  for (int r = 0; r < R; ++r) mean[r] /= static_cast<float>(p.width);
  for (int64_t j = threadIdx.x; j < p.width; j += kAnyThreads) {
    float centred[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      centred[r] = to_float(rows[r][j]) - mean[r];
      squares[r] = fmaf(centred[r], centred[r], squares[r]);
    }
#pragma unroll
    for (int d = 0; d < kFsqMaxDims; ++d) {
      if (d >= p.dims) break;
      const float w = weight_of(p, d * p.width + j);
#pragma unroll
      for (int r = 0; r < R; ++r) dot[r * kFsqMaxDims + d] = fmaf(w, centred[r], dot[r * kFsqMaxDims + d]);
    }
  }
  sum_over_block<R>(squares, sums);
  sum_over_block<R * kFsqMaxDims>(dot, dots);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (threadIdx.x != r || first + r >= p.n) continue;
    const float scale = scale_of(p, squares[r]);
    int64_t id = 0;
#pragma unroll
    for (int d = 0; d < kFsqMaxDims; ++d) {
      if (d >= p.dims) break;
      id += write_level<T>(p, first + r, d, scale * dot[r * kFsqMaxDims + d] + bias_of(p, d));
    }
    fsq_store_id(p.ids, p.id_type, first + r, id);
  }
}

template <typename T, int K, int R>
void rows(const FsqProject& p, cudaStream_t stream) {
  const unsigned bytes = static_cast<unsigned>(p.dims * p.width * sizeof(float));
  // as many blocks as find room at once: each reads the weights anew
  const int64_t room =
      static_cast<int64_t>(multiprocessors("fsq_project_quantize")) * (bytes > kWeightBytes / 2 ? 2 : kBlocks<K>);
  const int64_t wanted = (p.n + kFsqWarps * R - 1) / (kFsqWarps * R);
  const unsigned blocks = static_cast<unsigned>(wanted < room ? wanted : room);
  launch({"fsq_project_quantize", blocks, 32 * kFsqWarps, stream, bytes, 1, true}, fsq_project_kernel<T, K, R>, p);
}

template <typename T>
void project(const FsqProject& p, cudaStream_t stream) {
  const bool held = p.width % N == 0 && p.dims * p.width * static_cast<int64_t>(sizeof(float)) <= kWeightBytes;
  if (held && p.width <= 4 * 32 * N) return rows<T, 4, 2>(p, stream);
  if (held && p.width <= 9 * 32 * N) return rows<T, 9, 2>(p, stream);
  if (held && p.width <= 16 * 32 * N) return rows<T, 16, 1>(p, stream);
  launch({"fsq_project_quantize", fsq_blocks(p.n, kAnyRows), kAnyThreads, stream, 0, 1, true},
         fsq_project_any_kernel<T>, p);
}

}  // namespace

void fsq_project_launch(const FsqProject& p, void* queue) {
  with_float(p.dtype, [&](auto element) { project<decltype(element)>(p, static_cast<cudaStream_t>(queue)); });
}

}  // namespace flexkernels::cuda
