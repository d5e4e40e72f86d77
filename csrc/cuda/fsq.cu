// FSQ: a block takes kRows rows. Elements are read and written in memory order; the levels meet in shared memory,
// where one thread a row turns them into an id (or an id into them).
#include "kernels.h"
#include "launch.h"
#include "pack.h"
#include "ptx.h"

namespace flexkernels::cuda {
namespace {

constexpr int kRows = 256;
// thresholds up to this many bytes are staged in shared memory
constexpr int64_t kStagedBytes = 24 * 1024;

template <int N, typename T>
__device__ void quantize_pack(const FsqQuantize& p, const float* thresholds, const float* half, int64_t base, int e,
                              int* levels) {
  float z[N], code[N];
  load_floats<N>(static_cast<const T*>(p.z) + base + e, z);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int dim = (e + j) % p.dims;
    levels[e + j] = fsq_level(thresholds + static_cast<int64_t>(dim) * p.width, p.width, z[j]);
    code[j] = p.table ? p.table[dim * (p.width + 1) + levels[e + j]]
                      : (static_cast<float>(levels[e + j]) - half[dim]) / half[dim];
  }
  if (p.codes) store_floats<N>(static_cast<T*>(p.codes) + base + e, code);
}

// N elements at a time where N of them are left, else one
template <int N, typename T>
__global__ void __launch_bounds__(kRows) fsq_quantize_kernel(const __grid_constant__ FsqQuantize p, bool staged) {
  __shared__ int levels[kRows * kFsqMaxDims];
  __shared__ float half[kFsqMaxDims];
  float* staged_thresholds = ptx::dynamic_shared<float>();
  const int thread = threadIdx.x;
  if (thread < p.dims) half[thread] = static_cast<float>(p.half[thread]);
  if (staged) {
    for (int i = thread; i < p.dims * p.width; i += kRows) staged_thresholds[i] = p.thresholds[i];
  }
  const float* thresholds = staged ? staged_thresholds : p.thresholds;
  __syncthreads();

  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows, base = row0 * p.dims;
  const int rows = p.n - row0 < kRows ? static_cast<int>(p.n - row0) : kRows;
  const int count = rows * p.dims, packed = count / N * N;
  for (int e = thread * N; e < packed; e += kRows * N) quantize_pack<N, T>(p, thresholds, half, base, e, levels);
  for (int e = packed + thread; e < count; e += kRows) quantize_pack<1, T>(p, thresholds, half, base, e, levels);
  if (!p.ids) return;
  // a row's levels come from several threads
  __syncthreads();
  if (thread >= rows) return;
  int64_t id = 0;
  for (int d = 0; d < p.dims; ++d) id += levels[thread * p.dims + d] * p.basis[d];
  fsq_store_id(p.ids, p.id_type, row0 + thread, id);
}

template <typename Word>
__device__ void split_id(Word id, const FsqDequantize& p, int* levels) {
  for (int d = 0; d < p.dims; ++d) {
    const Word level = static_cast<Word>(p.levels[d]), rest = id / level;
    levels[d] = static_cast<int>(id - rest * level);
    id = rest;
  }
}

template <typename T>
__global__ void __launch_bounds__(kRows) fsq_dequantize_kernel(const __grid_constant__ FsqDequantize p) {
  __shared__ int levels[kRows * kFsqMaxDims];
  __shared__ int half[kFsqMaxDims];
  const int thread = threadIdx.x;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows, row = row0 + thread;
  const int rows = p.n - row0 < kRows ? static_cast<int>(p.n - row0) : kRows;
  if (thread < p.dims) half[thread] = p.levels[thread] / 2;
  if (thread < rows) {
    uint64_t id = fsq_load_id(p.ids, p.id_type, row);
    if (id >= static_cast<uint64_t>(p.codebook)) id %= static_cast<uint64_t>(p.codebook);
    if (p.codebook <= UINT32_MAX)
      split_id(static_cast<uint32_t>(id), p, levels + thread * p.dims);
    else
      split_id(id, p, levels + thread * p.dims);
  }
  __syncthreads();
  T* codes = static_cast<T*>(p.codes) + row0 * p.dims;
  for (int e = thread; e < rows * p.dims; e += kRows) {
    const int dim = e % p.dims;
    from_float(p.table ? p.table[dim * (p.width + 1) + levels[e]] : fsq_code(levels[e], half[dim]), codes + e);
  }
}

unsigned blocks_of(int64_t rows) { return static_cast<unsigned>((rows + kRows - 1) / kRows); }

template <typename T>
void quantize(const FsqQuantize& p, cudaStream_t stream) {
  const int64_t bytes = static_cast<int64_t>(p.dims) * p.width * sizeof(float);
  const bool staged = bytes <= kStagedBytes;
  const unsigned shared = staged ? static_cast<unsigned>(bytes) : 0;
  // kRows * dims elements are a whole number of 16-byte packs, so blocks stay aligned when the tensors are
  if (aligned16(p.z) && aligned16(p.codes))
    launch({"fsq_quantize", blocks_of(p.n), kRows, stream, shared}, fsq_quantize_kernel<16 / sizeof(T), T>, p, staged);
  else
    launch({"fsq_quantize", blocks_of(p.n), kRows, stream, shared}, fsq_quantize_kernel<1, T>, p, staged);
}

template <typename T>
void dequantize(const FsqDequantize& p, cudaStream_t stream) {
  launch({"fsq_dequantize", blocks_of(p.n), kRows, stream}, fsq_dequantize_kernel<T>, p);
}

}  // namespace

void fsq_quantize_launch(const FsqQuantize& p, void* stream) {
  if (p.dtype == Dtype::f32) quantize<float>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::bf16) quantize<bf16>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::f16) quantize<f16>(p, static_cast<cudaStream_t>(stream));
}

void fsq_dequantize_launch(const FsqDequantize& p, void* stream) {
  if (p.dtype == Dtype::f32) dequantize<float>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::bf16) dequantize<bf16>(p, static_cast<cudaStream_t>(stream));
  if (p.dtype == Dtype::f16) dequantize<f16>(p, static_cast<cudaStream_t>(stream));
}

}  // namespace flexkernels::cuda
