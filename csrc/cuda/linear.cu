// A few rows of x against all rows of weight, each weight read once; whatever the number of rows, the sum behind a
// result has one order, so a row of x gives the same bits alone and among others.
//
// 16-bit x: weights go 16 bytes a lane straight into the registers of mma.sync: 8 rows of weight are the 8 columns of
// its B, the rows of x the 16 rows of its A. The order of k inside a product is free, so lane (g, t) = (lane / 4,
// lane % 4) takes 8 (16 of int8) neighbouring k of row g of weight, and the same k of rows g and g + 8 of x. The warps
// of a block share kTileRows rows of weight, each has its part of k, all of it in flight; their sums are added in
// order. To norm x, a warp does what norm_forward's does with a row, but for the result, which stays in shared
// memory; the first weights are on their way meanwhile.
//
// float32 x: a warp reads R rows of weight, 16 bytes a lane, against the rows of x with fused multiply-adds.
#include "../core/linear.h"

#include "kernels.h"
#include "launch.h"
#include "norm_row.h"
#include "pack.h"
#include "ptx.h"
#include "vectors.h"

namespace flexkernels::cuda {
namespace {

template <typename X>
__device__ __forceinline__ float finish(const SkinnyLinear& p, int64_t row, float dot) {
  if (p.scale) dot *= p.scale[row];
  if (p.bias) dot += to_float(static_cast<const X*>(p.bias)[row]);
  return dot;
}

// out[i][column] from the sums of weight row `column` and, with swiglu, of row outputs + column
template <typename X>
__device__ __forceinline__ void write(const SkinnyLinear& p, int i, int64_t column, float dot, float up) {
  float value = finish<X>(p, column, dot);
  if (p.swiglu) value = value / (1.0f + expf(-value)) * finish<X>(p, p.outputs + column, up);
  if (p.residual) value += to_float(static_cast<const X*>(p.residual)[i * p.residual_stride + column]);
  from_float(value, static_cast<X*>(p.out) + i * p.outputs + column);
}

// --- 16-bit x

constexpr int kWarps = 8, kThreads = 32 * kWarps;
// groups of 8 rows of weight a block takes at a time; with swiglu half of them are of w1, half of w3
constexpr int kGroups = 2, kTileRows = 8 * kGroups;

// How lanes divide k: a lane takes kLoads times 16 bytes of a row of weight a step
template <bool kInt8>
struct Split {
  static constexpr int kPer = kInt8 ? 16 : 8, kLoads = kInt8 ? 2 : 4, kStep = 4 * kPer * kWarps * kLoads;
  // 16-byte words of x that meet one of weights
  static constexpr int kX = kInt8 ? 2 : 1;

  // two loads are of 128 bytes of a 16-bit row
  static __device__ __forceinline__ int place(int step, int u, int warp, int t) {
    return step * kStep + 8 * kPer * (u / 2 * kWarps + warp) + 4 * kPer * (u % 2) + kPer * t;
  }
};

// the longest row of x that is normed here
constexpr int kMostNormed = 1024, kNormPacks = kMostNormed / (32 * kPack<bf16>);
static_assert(kNormPacks <= kWarpPacks);

// packs from one normed row to the next: eight lanes that read four neighbours of two rows meet no bank twice
__host__ __device__ __forceinline__ int normed_pitch(int64_t k) { return (static_cast<int>(k) / 8 + 3) / 8 * 8 + 4; }

// for sm_100 ptxas takes more registers for the same
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kNormBlocks = 2;
#else
constexpr int kNormBlocks = 3;
#endif
// blocks on a multiprocessor
constexpr int resident(int halves, bool norm) { return halves == 2 ? 2 : norm ? kNormBlocks : 3; }

template <typename X>
__device__ __forceinline__ void norm_rows(const SkinnyLinear& p, uint4* normed) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, packs = static_cast<int>(p.k) / kPack<X>;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int row = warp; row < p.m; row += kWarps) {
    const uint4* x = reinterpret_cast<const uint4*>(static_cast<const X*>(p.x) + row * p.x_stride);
    uint4 v[kNormPacks];
#pragma unroll
    for (int i = 0; i < kNormPacks; ++i) v[i] = i * 32 + lane < packs ? x[i * 32 + lane] : zero;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kNormPacks; ++i) squares += pack_squares<X>(v[i], 0.0f);
    const float rstd = rstd_of(warp_sum(squares), 1.0f / static_cast<float>(p.k), p.eps);
#pragma unroll
    for (int i = 0; i < kNormPacks; ++i) {
      const int pack = i * 32 + lane;
      if (pack >= packs) continue;
      const uint4 factor = static_cast<const uint4*>(p.norm)[pack];
      normed[row * normed_pitch(p.k) + pack] = norm_pack<X, true>(v[i], factor, zero, 0.0f, rstd);
    }
  }
  __syncthreads();
}

// kHalves: 1 for up to 8 rows of x, 2 for up to 16. kAligned: all rows begin at, and k is a multiple of, 16 bytes
template <typename X, bool kInt8, int kHalves, bool kAligned, bool kNorm>
__global__ void __launch_bounds__(kThreads, resident(kHalves, kNorm))
    linear_mma_kernel(const __grid_constant__ SkinnyLinear p, const int tiles) {
  using S = Split<kInt8>;
  constexpr int kLoads = S::kLoads, kX = S::kX;
  // a tile's sums are read while the next tile's are written
  __shared__ __align__(16) float s_part[2][kWarps][8 * kHalves][kTileRows];
  uint4* s_normed = ptx::dynamic_shared<uint4>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int k = static_cast<int>(p.k), steps = k ? (k + S::kStep - 1) / S::kStep : 1;
  const int columns = p.swiglu ? kTileRows / 2 : kTileRows;
  Words w[kGroups][kLoads], x[kLoads][kX][kHalves];
  float sum[kGroups][4] = {};

  const auto load_weights = [&](int tile, int step) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const bool second = p.swiglu && i >= kGroups / 2;
      const int64_t column = static_cast<int64_t>(tile) * columns + 8 * (second ? i - kGroups / 2 : i) + g;
      const int64_t row = column + (second ? p.outputs : 0);
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int at = S::place(step, u, warp, t);
        const bool there = column < p.outputs && at < k;
        if constexpr (kAligned) {
          const char* from = static_cast<const char*>(p.weight) + (row * k + at) * (kInt8 ? 1 : 2);
          w[i][u].v = ptx::load_once_256(from, there);
        } else if constexpr (kInt8) {
          w[i][u].v = gather(static_cast<const uint8_t*>(p.weight) + row * k + at, there ? k - at : 0);
        } else {
          w[i][u].v = gather(static_cast<const uint16_t*>(p.weight) + row * k + at, there ? k - at : 0);
        }
      }
    }
  };
  const auto load_x = [&](int step) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
#pragma unroll
      for (int e = 0; e < kX; ++e) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const int row = 8 * half + g, at = S::place(step, u, warp, t) + 8 * e;
          const bool there = row < p.m && at < k;
          const uint16_t* from = static_cast<const uint16_t*>(p.x) + row * p.x_stride + at;
          if constexpr (kNorm) {
            x[u][e][half].v = there ? s_normed[row * normed_pitch(k) + at / 8] : make_uint4(0, 0, 0, 0);
          } else {
            x[u][e][half].v = kAligned ? ptx::load_once(from, there) : gather(from, there ? k - at : 0);
          }
          if constexpr (kInt8) {
            // elements in the order of the widened weights: 0, 2, 1, 3
            for (int j = 0; j < 4; j += 2) {
              const uint32_t low = x[u][e][half].w[j], high = x[u][e][half].w[j + 1];
              x[u][e][half].w[j] = __byte_perm(low, high, 0x5410);
              x[u][e][half].w[j + 1] = __byte_perm(low, high, 0x7632);
            }
          }
        }
      }
    }
  };
  const auto multiply = [&](int i, int u, int e, int j, uint32_t b0, uint32_t b1) {
    const Words &low = x[u][e][0], &high = x[u][e][kHalves - 1];
    ptx::mma<X>(sum[i], low.w[j], kHalves == 2 ? high.w[j] : 0, low.w[j + 1], kHalves == 2 ? high.w[j + 1] : 0, b0, b1);
  };

  if (!p.constant_weight) ptx::wait_for_predecessors();
  int tile = blockIdx.x, step = 0, buffer = 0;
  load_weights(tile, 0);
  // ptxas would move these loads behind the wait
  __syncwarp();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  kNorm ? norm_rows<X>(p, s_normed) : load_x(0);
#pragma unroll 1
  while (true) {
    // from shared memory, so that it need not stay in registers
    if (kNorm) load_x(step);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (kInt8)
            multiply(i, u, j / 2, j % 2 * 2, widen<X>(w[i][u].w[j]), widen<X>(w[i][u].w[j] >> 8));
          else if (j % 2 == 0)
            multiply(i, u, 0, j, w[i][u].w[j], w[i][u].w[j + 1]);
        }
      }
    }
    const bool done = step + 1 == steps;
    const int next = done ? tile + gridDim.x : tile, next_step = done ? 0 : step + 1;
    const bool more = next < tiles;
    if (more) {
      load_weights(next, next_step);
      if (!kNorm && steps > 1) load_x(next_step);
    }
    if (done) {
      // sums 0 and 1: row g of x, rows 2 t and 2 t + 1 of weight; 2 and 3: row g + 8
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          float* at = &s_part[buffer][warp][8 * half + g][8 * i + 2 * t];
          *reinterpret_cast<float2*>(at) = make_float2(sum[i][2 * half], sum[i][2 * half + 1]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = 0;
      }
      __syncthreads();
      const int r = threadIdx.x / columns, c = threadIdx.x % columns;
      const int64_t column = static_cast<int64_t>(tile) * columns + c;
      if (r < p.m && column < p.outputs) {
        float dot = 0, up = 0;
#pragma unroll
        for (int v = 0; v < kWarps; ++v) dot += s_part[buffer][v][r][c];
        if (p.swiglu) {
#pragma unroll
          for (int v = 0; v < kWarps; ++v) up += s_part[buffer][v][r][c + kTileRows / 2];
        }
        write<X>(p, r, column, dot, up);
      }
      buffer ^= 1;
    }
    if (!more) break;
    tile = next;
    step = next_step;
  }
}

template <typename X, bool kInt8, int kHalves, bool kAligned, bool kNorm>
void queue_mma(const SkinnyLinear& p, cudaStream_t stream) {
  static_assert(kSkinnyMaxRows * kTileRows <= kThreads, "a thread writes one result of a tile");
  const int64_t columns = p.swiglu ? kTileRows / 2 : kTileRows;
  const int tiles = static_cast<int>((p.outputs + columns - 1) / columns);
  const int most = multiprocessors() * resident(kHalves, kNorm);
  const unsigned grid = static_cast<unsigned>(tiles < most ? tiles : most);
  const unsigned shared = kNorm ? static_cast<unsigned>(p.m * normed_pitch(p.k) * sizeof(uint4)) : 0;
  const Launch at{"skinny_linear", dim3(grid), dim3(kThreads), stream, shared, 1, true};
  launch(at, linear_mma_kernel<X, kInt8, kHalves, kAligned, kNorm>, p, tiles);
}

// whole packs of x and of weights
bool aligned_mma(const SkinnyLinear& p) {
  const int64_t pack = p.weight_type == WeightType::int8 ? Split<true>::kPer : Split<false>::kPer;
  return aligned16(p.x) && aligned16(p.weight) && p.k % pack == 0 && (p.x_stride % 8 == 0 || p.m == 1);
}

template <typename X, bool kInt8, int kHalves>
void queue_aligned(const SkinnyLinear& p, cudaStream_t stream) {
  p.norm ? queue_mma<X, kInt8, kHalves, true, true>(p, stream) : queue_mma<X, kInt8, kHalves, true, false>(p, stream);
}

template <typename X, bool kInt8>
void linear_mma(const SkinnyLinear& p, cudaStream_t stream) {
  if (!aligned_mma(p)) return queue_mma<X, kInt8, 2, false, false>(p, stream);
  p.m <= 8 ? queue_aligned<X, kInt8, 1>(p, stream) : queue_aligned<X, kInt8, 2>(p, stream);
}

// --- float32 x

constexpr int kFmaWarps = 4;

template <int N, bool kAligned, typename T>
__device__ __forceinline__ void load(const T* p, int64_t left, float (&out)[N]) {
  if constexpr (kAligned && sizeof(T) == 4) {
    load_floats<N>(p, out);
  } else if constexpr (kAligned) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = static_cast<float>(pack.v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = j < left ? static_cast<float>(p[j]) : 0.0f;
  }
}

// R weight rows a warp; with swiglu R / 2 of w1, then as many of w3; up to M rows of x
template <typename T, int M, int R, bool kAligned>
__global__ void __launch_bounds__(32 * kFmaWarps, 3) linear_fma_kernel(const __grid_constant__ SkinnyLinear p) {
  constexpr int N = 16 / sizeof(T);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int lane = threadIdx.x % 32, step = p.swiglu ? R / 2 : R;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kFmaWarps + threadIdx.x / 32) * step;
  if (column >= p.outputs) return;
  const T* weight[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    // past the end: the last row again
    const int64_t at = column + r % step, row = (at < p.outputs ? at : p.outputs - 1) + (r < step ? 0 : p.outputs);
    weight[r] = static_cast<const T*>(p.weight) + row * p.k;
  }
  float sum[M][R] = {};
#pragma unroll(M <= 4 && kAligned ? 2 : 1)
  for (int64_t c = lane * N; c < p.k; c += 32 * N) {
    float w[R][N];
#pragma unroll
    for (int r = 0; r < R; ++r) load<N, kAligned>(weight[r] + c, p.k - c, w[r]);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (i >= p.m) break;
      const float* row = static_cast<const float*>(p.x) + i * p.x_stride + c;
#pragma unroll
      for (int part = 0; part < N; part += 4) {
        float x[4];
        load<4, kAligned>(row + part, p.k - c - part, x);
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][r] = fmaf(w[r][part + j], x[j], sum[i][r]);
        }
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
  if (lane >= p.m) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r < step && column + r < p.outputs) write<float>(p, lane, column + r, mine[r], mine[(r + R / 2) % R]);
  }
}

template <typename T, int M, int R, bool kAligned>
void queue_fma(const SkinnyLinear& p, cudaStream_t stream) {
  const int64_t each = kFmaWarps * (p.swiglu ? R / 2 : R);
  const unsigned blocks = static_cast<unsigned>((p.outputs + each - 1) / each);
  const Launch at{"skinny_linear", dim3(blocks), dim3(32 * kFmaWarps), stream, 0, 1, true};
  launch(at, linear_fma_kernel<T, M, R, kAligned>, p);
}

template <typename T>
void linear_fma(const SkinnyLinear& p, cudaStream_t stream) {
  const bool aligned = aligned16(p.x) && aligned16(p.weight) && p.k % static_cast<int64_t>(16 / sizeof(T)) == 0 &&
                       (p.x_stride % 4 == 0 || p.m == 1);
  if (!aligned) return queue_fma<T, kSkinnyMaxRows, 2, false>(p, stream);
  if (p.m <= 4) return queue_fma<T, 4, 4, true>(p, stream);
  queue_fma<T, kSkinnyMaxRows, 2, true>(p, stream);
}

}  // namespace

bool skinny_linear_norms(const SkinnyLinear& p) {
  return p.dtype != Dtype::f32 && aligned_mma(p) && aligned16(p.norm) && p.k <= kMostNormed;
}

void skinny_linear_launch(const SkinnyLinear& p, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  const bool int8 = p.weight_type == WeightType::int8;
  if (p.dtype == Dtype::f32) return int8 ? linear_fma<int8_t>(p, stream) : linear_fma<float>(p, stream);
  if (p.dtype == Dtype::bf16) return int8 ? linear_mma<bf16, true>(p, stream) : linear_mma<bf16, false>(p, stream);
  int8 ? linear_mma<f16, true>(p, stream) : linear_mma<f16, false>(p, stream);
}

}  // namespace flexkernels::cuda
