// Kernels of the emulator's own tests: right ones, and the same with one fault each.
#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/ptx.h"

using namespace flexkernels::cuda;

namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

// out[i] = the sum of x over the block of 128 that i is in
template <bool BARRIER>
__global__ void block_sums(const float* x, float* out, int n) {
  __shared__ float of_warp[kThreads / 32];
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  float value = i < n ? x[i] : 0.0f;
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(kAll, value, lane);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  if (BARRIER) __syncthreads();
  float total = 0;
  for (float part : of_warp) total += part;  // missing barrier
  if (i < n) out[i] = total;
}

// out[i] = 2 x[i]
template <int EXTRA>
__global__ void doubled(const float* x, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < n + EXTRA) out[i] = i < n ? 2 * x[i] : 0.0f;  // one too many, or the tail left out
}

// out[i] = the sum over the first half of a warp
template <unsigned MASK>
__global__ void half_warp(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x < 16) {
    for (int lane = 8; lane > 0; lane /= 2) value += __shfl_xor_sync(MASK, value, lane);  // wrong mask
    out[threadIdx.x] = value;
  }
}

// out = x, through shared memory that is used again and again
template <bool BARRIER>
__global__ void staged(const float* x, float* out, int n) {
  __shared__ float tile[kThreads];
  for (int i = 0; i < n; i += kThreads) {
    const int t = static_cast<int>(threadIdx.x);
    tile[t] = x[i + t];  // race with the read below
    __syncthreads();
    out[i + kThreads - 1 - t] = tile[kThreads - 1 - t];
    if (BARRIER) __syncthreads();
  }
}

template <typename... Args>
const char* run(unsigned grid, unsigned block, unsigned shared, void (*kernel)(Args...), typename Same<Args>::type... args) {
  static std::string error;
  try {
    launch({"planted", grid, block, nullptr, shared}, kernel, args...);
    return nullptr;
  } catch (const std::runtime_error& failure) {
    error = failure.what();
    return error.c_str();
  }
}

unsigned blocks(int n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

}  // namespace

extern "C" {
const char* run_block_sums(bool right, const float* x, float* out, int n) {
  return run(blocks(n), kThreads, 0, right ? block_sums<true> : block_sums<false>, x, out, n);
}
const char* run_doubled(int extra, const float* x, float* out, int n) {
  return run(blocks(n + 1), kThreads, 0, extra == 0 ? doubled<0> : extra > 0 ? doubled<1> : doubled<-1>, x, out, n);
}
const char* run_half_warp(bool right, const float* x, float* out) {
  return run(1, 32, 0, right ? half_warp<0xffff> : half_warp<0xff>, x, out);
}
const char* run_staged(bool right, const float* x, float* out, int n) {
  return run(1, kThreads, 0, right ? staged<true> : staged<false>, x, out, n);
}
}
