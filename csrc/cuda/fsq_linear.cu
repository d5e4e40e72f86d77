// FSQ next to its linear layers: a warp a row, its lanes along the width. Sums are trees of a fixed shape.
#include "../core/fsq_linear.h"

#include "kernels.h"
#include "launch.h"
#include "pack.h"

namespace flexkernels::cuda {
namespace {

constexpr int kWarps = 4;

__device__ __forceinline__ float warp_sum(float value) {
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) fsq_project_kernel(const __grid_constant__ FsqProject p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.n) return;
  const T* x = static_cast<const T*>(p.hidden) + row * p.width;
  float sum = 0;
  for (int64_t j = lane; j < p.width; j += 32) sum += to_float(x[j]);
  const float mean = warp_sum(sum) / static_cast<float>(p.width);
  float square = 0, dots[kFsqMaxDims] = {};
  for (int64_t j = lane; j < p.width; j += 32) {
    const float centred = to_float(x[j]) - mean;
    square += centred * centred;
#pragma unroll
    for (int d = 0; d < kFsqMaxDims; ++d) {
      if (d < p.dims) dots[d] += p.weight[d * p.width + j] * centred;
    }
  }
  const float scale = 1.0f / sqrtf(warp_sum(square) / static_cast<float>(p.width) + p.eps);
  int64_t id = 0;
#pragma unroll
  for (int d = 0; d < kFsqMaxDims; ++d) {
    if (d >= p.dims) break;
    const float z = scale * warp_sum(dots[d]) + (p.bias ? p.bias[d] : 0.0f);
    const int level = fsq_level(p.thresholds + static_cast<int64_t>(d) * p.steps, p.steps, z);
    if (p.codes && lane == 0) from_float(fsq_code(level, p.half[d]), static_cast<T*>(p.codes) + row * p.dims + d);
    id += level * p.basis[d];
  }
  if (!p.ids || lane != 0) return;
  fsq_store_id(p.ids, p.id_type, row, id);
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) fsq_embed_kernel(const __grid_constant__ FsqEmbed p) {
  __shared__ float codes_of_warp[kWarps][kFsqMaxDims];
  const int lane = threadIdx.x % 32;
  float* codes = codes_of_warp[threadIdx.x / 32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.n) return;
  T* out = static_cast<T*>(p.out) + row * p.width;
  const int64_t token = p.token_index ? p.token_index[row] : -1;
  if (token >= 0) {
    const T* source = static_cast<const T*>(p.tokens) + token * p.width;
    for (int64_t j = lane; j < p.width; j += 32) out[j] = source[j];
    return;
  }
  if (lane == 0) fsq_codes_of(p, row, codes);
  __syncwarp();
  const int64_t at = p.position_index ? p.position_index[row] : row;
  const T* position = p.positions ? static_cast<const T*>(p.positions) + at * p.width : nullptr;
  for (int64_t j = lane; j < p.width; j += 32) {
    float sum = p.bias ? p.bias[j] : 0.0f;
    for (int d = 0; d < p.dims; ++d) sum += codes[d] * p.weight[d * p.width + j];
    if (position) sum += to_float(position[j]);
    from_float(sum, out + j);
  }
}

unsigned blocks_of(int64_t rows) { return static_cast<unsigned>((rows + kWarps - 1) / kWarps); }

template <typename T>
void project(const FsqProject& p, void* stream) {
  launch({"fsq_project_quantize", blocks_of(p.n), 32 * kWarps, static_cast<cudaStream_t>(stream)},
         fsq_project_kernel<T>, p);
}

template <typename T>
void embed(const FsqEmbed& p, void* stream) {
  launch({"fsq_embed", blocks_of(p.n), 32 * kWarps, static_cast<cudaStream_t>(stream)}, fsq_embed_kernel<T>, p);
}

}  // namespace

void fsq_project_launch(const FsqProject& p, void* stream) {
  if (p.dtype == Dtype::f32) project<float>(p, stream);
  if (p.dtype == Dtype::bf16) project<bf16>(p, stream);
  if (p.dtype == Dtype::f16) project<f16>(p, stream);
}

void fsq_embed_launch(const FsqEmbed& p, void* stream) {
  if (p.dtype == Dtype::f32) embed<float>(p, stream);
  if (p.dtype == Dtype::bf16) embed<bf16>(p, stream);
  if (p.dtype == Dtype::f16) embed<f16>(p, stream);
}

}  // namespace flexkernels::cuda
