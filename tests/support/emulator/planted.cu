// Kernels of the emulator's own tests: right ones, and the same with a fault that is marked by "fault" in its line.
#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/ptx.h"

using namespace flexkernels;
using namespace flexkernels::cuda;

namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

// out[i] = the sum of x over the block of 128 that i is in
template <bool RIGHT>
__global__ void block_sums(const float* x, float* out) {
  __shared__ float of_warp[kThreads / 32];
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  float value = x[i];
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(kAll, value, lane);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  if (RIGHT) __syncthreads();
  float total = 0;
  for (int w = 0; w < kThreads / 32; ++w) total += of_warp[w];  // fault: no barrier before
  out[i] = total;
}

// out[i] = 2 x[i] for i < n
template <int EXTRA>
__global__ void doubled(const float* x, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < n + EXTRA) out[i] = 2 * x[i < n ? i : 0];  // fault: one too many, or the last one left out
}

// out[i] = the sum over the half of a warp that i is in
template <bool RIGHT>
__global__ void half_warps(const float* x, float* out) {
  const unsigned lane = threadIdx.x, mask = RIGHT && lane >= 16 ? 0xffff0000u : 0xffffu;
  float value = x[lane];
  for (int other = 8; other > 0; other /= 2) value += __shfl_xor_sync(mask, value, other);  // fault: half the lanes
  out[lane] = value;
}

// out = x in reverse inside every 128, through a tile that is used again
template <bool RIGHT>
__global__ void reversed(const float* x, float* out, int n) {
  __shared__ float tile[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  for (int i = 0; i < n; i += kThreads) {
    tile[t] = x[i + t];  // fault: another warp may still read the last tile
    __syncthreads();
    out[i + t] = tile[kThreads - 1 - t];
    if (RIGHT) __syncthreads();
  }
}

// out[i] = x[i]: an array of which only the first half is filled
template <bool RIGHT>
__global__ void half_filled(const float* x, float* out) {
  __shared__ float tile[kThreads];
  const unsigned t = threadIdx.x;
  if (RIGHT || t < kThreads / 2) tile[t] = x[t];
  __syncthreads();
  out[t] = tile[t];  // fault: nobody wrote the second half
}

// one store beyond an array, in shared memory
template <bool RIGHT>
__global__ void shifted(const float* x, float* out) {
  __shared__ float tile[kThreads];
  const unsigned t = threadIdx.x;
  tile[t + (RIGHT ? 0 : 1)] = x[t];  // fault
  __syncthreads();
  if (t > 0) out[t] = tile[t];
  if (t == 0) out[0] = x[0];
}

template <bool RIGHT>
__global__ void half_waits(const float* x, float* out) {
  const unsigned t = threadIdx.x;
  if (RIGHT || t < 32) __syncthreads();  // fault: the other warps wait for ever below
  out[t] = x[t];
  if (!RIGHT && t >= 32) {
    __syncthreads();
  }
}

// block 1 waits for a flag that block 0 raises
template <bool RIGHT>
__global__ void spins(const float* x, float* out, uint32_t* flag) {
  if (blockIdx.x == 0) {
    out[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0 && RIGHT) ptx::store_release(flag, 1);
    return;
  }
  while (ptx::load_acquire(flag) == 0) {  // fault: nobody raises it
  }
  out[kThreads + threadIdx.x] = out[threadIdx.x] + 1;
}

// the same by a relaxed store, which without a fence publishes nothing
template <bool RIGHT>
__global__ void publishes(const float* x, float* out, uint32_t* flag) {
  if (blockIdx.x == 0) {
    out[threadIdx.x] = x[threadIdx.x];
    if (RIGHT) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && RIGHT) __threadfence();
    if (threadIdx.x == 0) atomicExch(flag, 1u);
    return;
  }
  while (ptx::load_acquire(flag) == 0) {
  }
  out[kThreads + threadIdx.x] = out[threadIdx.x] + 1;  // fault: no fence before the flag
}

// out = x by way of cp.async
template <bool RIGHT>
__global__ void copies(const float* x, float* out) {
  __shared__ __align__(16) float tile[4 * kThreads];
  const unsigned t = threadIdx.x;
  ptx::cp_async<16>(tile + 4 * t, x + 4 * t);
  ptx::cp_async_commit();
  if (RIGHT) ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[i * kThreads + t] = tile[i * kThreads + t];  // fault: the copy is under way
}

// out = x by bulk copies through two buffers; thread 0 issues, all take
template <bool RIGHT>
__global__ void bulk_copies(const float* x, float* out, int tiles) {
  __shared__ __align__(16) float tile[2][kThreads];
  __shared__ uint64_t full[2], empty[2];
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    for (int b = 0; b < 2; ++b) {
      ptx::mbarrier_init(full + b, 1);
      ptx::mbarrier_init(empty + b, kThreads);
    }
    ptx::mbarrier_fence();
  }
  __syncthreads();
  for (int i = 0; i < tiles + 1; ++i) {
    if (t == 0 && i < tiles) {
      if (RIGHT) ptx::mbarrier_wait(empty + i % 2, (i / 2 + 1) % 2);
      ptx::mbarrier_expect(full + i % 2, sizeof tile[0]);
      ptx::bulk_copy(tile[i % 2], x + i * kThreads, sizeof tile[0], full + i % 2);  // fault: into a buffer in use
    }
    if (i == 0) continue;
    const int b = (i - 1) % 2;
    ptx::mbarrier_wait(full + b, (i - 1) / 2 % 2);
    out[(i - 1) * kThreads + t] = tile[b][t];
    ptx::mbarrier_arrive(empty + b);
  }
}

// out[block] = x of the next block of the cluster
template <bool RIGHT>
__global__ void cluster_ring(const float* x, float* out) {
  __shared__ float mine[kThreads];
  mine[threadIdx.x] = x[blockIdx.x * kThreads + threadIdx.x];
  ptx::cluster_sync();
  const int next = (ptx::cluster_rank() + 1) % ptx::cluster_size();
  const float other = ptx::cluster_load(mine + threadIdx.x, next);  // fault: that block may have returned
  out[blockIdx.x * kThreads + threadIdx.x] = other;
  if (RIGHT) ptx::cluster_sync();
}

// c [16, 8] = a [16, 16] b [16, 8] of one warp: a from shared memory by ldmatrix, b [k, n] by its transposed form, or
// (direct) both from global memory as the layout says
template <typename T, bool DIRECT>
__global__ void product(const T* a, const T* b, float* c) {
  __shared__ __align__(16) T a_tile[16][16], b_tile[16][8];
  const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float sum[4] = {};
  uint32_t fa[4], fb[2];
  if (DIRECT) {
    const auto pair = [](const T* low, const T* high) {
      return static_cast<uint32_t>(low->bits) | static_cast<uint32_t>(high->bits) << 16;
    };
    for (unsigned i = 0; i < 4; ++i) {
      const T* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
      fa[i] = pair(at, at + 1);
    }
    for (unsigned i = 0; i < 2; ++i) {
      const T* at = b + (2 * t + 8 * i) * 8 + g;
      fb[i] = pair(at, at + 8);
    }
  } else {
    for (unsigned i = lane; i < 256; i += 32) a_tile[i / 16][i % 16] = a[i];
    for (unsigned i = lane; i < 128; i += 32) b_tile[i / 8][i % 8] = b[i];
    __syncwarp();
    ptx::ldmatrix(fa, &a_tile[lane % 16][lane / 16 * 8]);
    ptx::ldmatrix_trans(fb, b_tile[lane % 16]);
  }
  ptx::mma<T>(sum, fa[0], fa[1], fa[2], fa[3], fb[0], fb[1]);
  for (unsigned i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// out [8, 8] = x [8, 8] transposed, 16-bit elements
__global__ void transposed(const uint32_t* x, uint32_t* out) { out[threadIdx.x] = ptx::movmatrix(x[threadIdx.x]); }

// votes, matches, reductions and shuffles of one warp, a row of out each
__global__ void warp_functions(const int* x, int* out) {
  const int lane = static_cast<int>(threadIdx.x), v = x[lane];
  int all_equal = 0;
  const unsigned together = __match_all_sync(kAll, v / 100, &all_equal);
  const int results[] = {
      static_cast<int>(__ballot_sync(kAll, v % 2)),
      __any_sync(kAll, v == 7),
      __all_sync(kAll, v < 50),
      static_cast<int>(__match_any_sync(kAll, v % 3)),
      static_cast<int>(together) * all_equal,
      __reduce_add_sync(kAll, v),
      __reduce_max_sync(kAll, -v),
      static_cast<int>(__reduce_xor_sync(kAll, static_cast<unsigned>(v))),
      __shfl_sync(kAll, v, 35),
      __shfl_sync(kAll, v, 3, 8),
      __shfl_up_sync(kAll, v, 2, 16),
      __shfl_down_sync(kAll, v, 3, 8),
      __shfl_xor_sync(kAll, v, 5),
      __syncthreads_count(v % 2),
      __syncthreads_or(v == 7),
      __syncthreads_and(v < 50),
  };
  for (int i = 0; i < 16; ++i) out[32 * i + lane] = results[i];
}

template <typename... Args>
const char* run(const Launch& at, void (*kernel)(Args...), typename Same<Args>::type... args) {
  static std::string error;
  try {
    launch(at, kernel, args...);
    return nullptr;
  } catch (const std::runtime_error& failure) {
    error = failure.what();
    return error.c_str();
  }
}

Launch of(unsigned grid, unsigned block = kThreads, unsigned cluster = 1) {
  return {"planted", grid, block, nullptr, 0, cluster};
}

}  // namespace

#define RUN(NAME, LAUNCH, ...) return run(LAUNCH, right ? NAME<true> : NAME<false>, __VA_ARGS__)
extern "C" {
const char* run_block_sums(bool right, const float* x, float* out) { RUN(block_sums, of(3), x, out); }
const char* run_one_more(bool right, const float* x, float* out) {
  return run(of(4), right ? doubled<0> : doubled<1>, x, out, 384);
}
const char* run_one_less(bool right, const float* x, float* out) {
  return run(of(3), right ? doubled<0> : doubled<-1>, x, out, 384);
}
const char* run_half_warps(bool right, const float* x, float* out) { RUN(half_warps, of(1, 32), x, out); }
const char* run_reversed(bool right, const float* x, float* out) { RUN(reversed, of(1), x, out, 384); }
const char* run_half_filled(bool right, const float* x, float* out) { RUN(half_filled, of(1), x, out); }
const char* run_shifted(bool right, const float* x, float* out) { RUN(shifted, of(1), x, out); }
const char* run_half_waits(bool right, const float* x, float* out) { RUN(half_waits, of(1), x, out); }
const char* run_spins(bool right, const float* x, float* out, uint32_t* flag) { RUN(spins, of(2), x, out, flag); }
const char* run_publishes(bool right, const float* x, float* out, uint32_t* flag) {
  RUN(publishes, of(2), x, out, flag);
}
const char* run_copies(bool right, const float* x, float* out) { RUN(copies, of(1), x, out); }
const char* run_bulk_copies(bool right, const float* x, float* out) { RUN(bulk_copies, of(1), x, out, 3); }
const char* run_cluster_ring(bool right, const float* x, float* out) { RUN(cluster_ring, of(3, kThreads, 3), x, out); }
const char* run_product(bool direct, bool half, const void* a, const void* b, float* c) {
  const auto with = [&](auto type) {
    typedef decltype(type) T;
    return run(of(1, 32), direct ? product<T, true> : product<T, false>, static_cast<const T*>(a),
               static_cast<const T*>(b), c);
  };
  return half ? with(f16{}) : with(bf16{});
}
const char* run_transposed(const uint32_t* x, uint32_t* out) { return run(of(1, 32), transposed, x, out); }
const char* run_warp_functions(const int* x, int* out) { return run(of(1, 32), warp_functions, x, out); }
}
