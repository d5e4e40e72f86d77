// Decode attention over 16-bit caches on tensor cores: one launch, every key and value read once, all of it in flight.
//
// A block takes one split of the keys of one kv head and up to 16 of its query rows, a warp 16 or 32 keys of the split,
// held in registers as 16-byte words, in the places where mma.sync wants them (keys are the 16 rows of its A, query
// rows the 8 columns of its B). With (g, t) = (lane / 4, lane % 4):
//   S^T [keys, rows] = K Q^T      the order of head_dim inside the product is free: a lane takes channels 8 t .. 8 t +
//   7
//                                 of each 32, of keys g and g + 8 and of query row g
//   O^T [head_dim, rows] = V^T P^T  a lane takes channels 8 g .. 8 g + 7 of each 64, of keys 2 t, 2 t + 1, 2 t + 8 and
//                                 2 t + 9; byte permutes make pairs of keys. P is the sum of two 16-bit numbers, so
//                                 that it is not what limits the accuracy
//
// Warps merge in shared memory. Splits merge in global memory: each block writes its sums, then counts itself with
// acquire-release order; the block that finds all others counted sees their sums, merges them and puts the counter back
// to 0 for the kernel behind it. Which block that is changes from run to run, the order of the merge does not: a warp
// adds every eighth split in order, then warps are added in order. Splits have a fixed length, so a row's bits depend
// on its own keys alone.
//
// On an H100 (3.35 TB/s) 2 x 16 heads of 64 over 1,280 keys are 10.5 MB of keys and values in bfloat16, 3.1 us, and
// the sums of 5 splits 0.08 MB; to that come a start (1.3 us in a graph), two trips to memory (the keys, the sums: 0.7
// us each) and the counter (0.7 us). Batch 16 x 16 heads over 4,096 keys: 268 MB, 80 us; sums of 16 splits 1.1 MB.
#include "counters.h"
#include "kernels.h"
#include "launch.h"
#include "pack.h"
#include "vectors.h"

namespace flexkernels::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// what a launch adds to its arguments
struct Extra {
  uint32_t* counters;   // [batch, kv_heads * tiles]
  uint64_t reciprocal;  // r / group is r * reciprocal >> 40: a division takes long ahead of the loads
  bool aligned;         // rows of q, k, v and out begin at, and are a multiple of, 16 bytes
};

// D: head_dim at most, 64, 128 or 256; kRowTiles: 8 query rows each
template <int D, int kRowTiles>
struct Shape {
  static constexpr int kKeyTiles = D == 64 ? 2 : 1;  // 16 keys of a warp
  static constexpr int kKeys = 16 * kKeyTiles, kSplit = kWarps * kKeys;
  static constexpr int kRows = 8 * kRowTiles, kPacks = D / 4;
  static constexpr int kByKey = D / 32, kByChannel = D / 64;  // words of a lane in a row of k or q, and of v

  // a running softmax sum: what each warp has, of exp2(s - maximum) v and of exp2(s - maximum). The gap of 4 floats
  // moves a row to other banks.
  struct Sums {
    float sum[kWarps][kRows][D + 4];
    float maximum[kWarps][kRows], total[kWarps][kRows];
  };

  // a lane's part of the split
  struct Held {
    Words q[kRowTiles][kByKey], k[kKeyTiles][2][kByKey], v[kKeyTiles][4][kByChannel];
  };
};

struct Place {
  int64_t b;
  int kv_head, row0, rows;  // of this block's tile
  int split, splits;        // splits that hold keys of this sequence; 1 without keys
  int length, first;        // first key of this warp
};

// what is subtracted from scores; with no key at all the maximum is -inf
__device__ __forceinline__ float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

__device__ __forceinline__ int query_of(const Extra& extra, int r) {
  return static_cast<int>(static_cast<uint64_t>(r) * extra.reciprocal >> 40);
}

// 8 elements from p + d, zeros beyond head_dim and where !there, which are not read
template <bool kAligned>
__device__ __forceinline__ uint4 load8(const uint16_t* p, int d, int head_dim, bool there) {
  if constexpr (kAligned) return ptx::load_once(p + d, there && d < head_dim);
  return gather(p + d, there ? head_dim - d : 0);
}

template <bool kAligned, typename S>
__device__ __forceinline__ void load(const DecodeAttention& p, const Extra& extra, const Place& at,
                                     typename S::Held& held) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint16_t* k = static_cast<const uint16_t*>(p.k) + at.b * p.k_stride[0] + at.kv_head * p.k_stride[1];
  const uint16_t* v = static_cast<const uint16_t*>(p.v) + at.b * p.v_stride[0] + at.kv_head * p.v_stride[1];
#pragma unroll
  for (int i = 0; i < S::kKeyTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = at.first + 16 * i + 8 * h + g;
#pragma unroll
      for (int c = 0; c < S::kByKey; ++c) {
        held.k[i][h][c].v = load8<kAligned>(k + key * p.k_stride[2], 32 * c + 8 * t, p.head_dim, key < at.length);
      }
    }
  }
#pragma unroll
  for (int a = 0; a < static_cast<int>(sizeof held.q / sizeof held.q[0]); ++a) {
    const int r = at.row0 + 8 * a + g, query = query_of(extra, r), head = at.kv_head * p.group + r - query * p.group;
    const uint16_t* q =
        static_cast<const uint16_t*>(p.q) + at.b * p.q_stride[0] + query * p.q_stride[1] + head * p.q_stride[2];
#pragma unroll
    for (int c = 0; c < S::kByKey; ++c) {
      held.q[a][c].v = load8<kAligned>(q, 32 * c + 8 * t, p.head_dim, r < p.rows);
    }
  }
#pragma unroll
  for (int i = 0; i < S::kKeyTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const int key = at.first + 16 * i + 8 * (h / 2) + 2 * t + h % 2;
#pragma unroll
      for (int c = 0; c < S::kByChannel; ++c) {
        held.v[i][h][c].v = load8<kAligned>(v + key * p.v_stride[2], 64 * c + 8 * g, p.head_dim, key < at.length);
      }
    }
  }
}

// this warp's sums of its keys, to shared memory
template <typename X, typename S, int kRowTiles>
__device__ __forceinline__ void sum_keys(const DecodeAttention& p, const Extra& extra, const Place& at,
                                         const typename S::Held& held, typename S::Sums& sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // s[i][a]: of keys 16 i + g (+ 8 for [2], [3]) and rows 8 a + 2 t (+ 1 for [1], [3])
  float s[S::kKeyTiles][kRowTiles][4] = {};
#pragma unroll
  for (int c = 0; c < S::kByKey; ++c) {
#pragma unroll
    for (int w = 0; w < 4; w += 2) {
#pragma unroll
      for (int i = 0; i < S::kKeyTiles; ++i) {
        const Words &low = held.k[i][0][c], &high = held.k[i][1][c];
#pragma unroll
        for (int a = 0; a < kRowTiles; ++a) {
          ptx::mma<X>(s[i][a], low.w[w], high.w[w], low.w[w + 1], high.w[w + 1], held.q[a][c].w[w],
                      held.q[a][c].w[w + 1]);
        }
      }
    }
  }
  float bias[S::kKeyTiles][2];
#pragma unroll
  for (int i = 0; i < S::kKeyTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = at.first + 16 * i + 8 * h + g;
      bias[i][h] = p.key_log_weight && key < at.length ? kLog2e * p.key_log_weight[at.b * p.max_len + key] : 0.0f;
    }
  }
  const float scale = kLog2e * p.scale;
  // P^T: keys 16 i + 8 h + {2 t, 2 t + 1} of row 8 a + g, and what that rounding left
  uint32_t share[S::kKeyTiles][kRowTiles][2], rest[S::kKeyTiles][kRowTiles][2];
#pragma unroll
  for (int a = 0; a < kRowTiles; ++a) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = 8 * a + 2 * t + e;
      const int causal = at.length - p.n + 1 + query_of(extra, at.row0 + r);
      const int seen = p.causal && causal < at.length ? causal : at.length;
      float maximum = -INFINITY, total = 0;
#pragma unroll
      for (int i = 0; i < S::kKeyTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& x = s[i][a][2 * h + e];
          x = at.first + 16 * i + 8 * h + g < seen ? fmaf(x, scale, bias[i][h]) : -INFINITY;
          maximum = fmaxf(maximum, x);
        }
      }
#pragma unroll
      for (int other = 4; other < 32; other *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAll, maximum, other));
#pragma unroll
      for (int i = 0; i < S::kKeyTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& x = s[i][a][2 * h + e];
          x = ptx::exp2_approx(x - base_of(maximum));
          total += x;
        }
      }
#pragma unroll
      for (int other = 4; other < 32; other *= 2) total += __shfl_xor_sync(kAll, total, other);
      if (g == 0 && r < at.rows) {
        sums.maximum[warp][r] = maximum;
        sums.total[warp][r] = total;
      }
    }
#pragma unroll
    for (int i = 0; i < S::kKeyTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = s[i][a][2 * h], y = s[i][a][2 * h + 1];
        const uint32_t both = pack_pair<X>(x, y);
        float rounded_x, rounded_y;
        unpack_pair<X>(both, rounded_x, rounded_y);
        share[i][a][h] = ptx::movmatrix(both);
        rest[i][a][h] = ptx::movmatrix(pack_pair<X>(x - rounded_x, y - rounded_y));
      }
    }
  }
  // out[j] of words c: channels 64 c + 8 g + 2 j (+ 1 for [2], [3]) of rows 8 a + 2 t (+ 1 for [1], [3])
#pragma unroll
  for (int c = 0; c < S::kByChannel; ++c) {
    float out[kRowTiles][4][4] = {};
#pragma unroll
    for (int i = 0; i < S::kKeyTiles; ++i) {
      const auto& v = held.v[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t a0 = __byte_perm(v[0][c].w[j], v[1][c].w[j], 0x5410);
        const uint32_t a1 = __byte_perm(v[0][c].w[j], v[1][c].w[j], 0x7632);
        const uint32_t a2 = __byte_perm(v[2][c].w[j], v[3][c].w[j], 0x5410);
        const uint32_t a3 = __byte_perm(v[2][c].w[j], v[3][c].w[j], 0x7632);
#pragma unroll
        for (int a = 0; a < kRowTiles; ++a) {
          ptx::mma<X>(out[a][j], a0, a1, a2, a3, share[i][a][0], share[i][a][1]);
          ptx::mma<X>(out[a][j], a0, a1, a2, a3, rest[i][a][0], rest[i][a][1]);
        }
      }
    }
#pragma unroll
    for (int a = 0; a < kRowTiles; ++a) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = 8 * a + 2 * t + e;
        if (r >= at.rows) continue;
        const auto& o = out[a];
        float4* to = reinterpret_cast<float4*>(&sums.sum[warp][r][64 * c + 8 * g]);
        to[0] = make_float4(o[0][e], o[0][2 + e], o[1][e], o[1][2 + e]);
        to[1] = make_float4(o[2][e], o[2][2 + e], o[3][e], o[3][2 + e]);
      }
    }
  }
}

__device__ __forceinline__ void add_scaled(float4& sum, float factor, const float4& x) {
  sum.x = fmaf(factor, x.x, sum.x);
  sum.y = fmaf(factor, x.y, sum.y);
  sum.z = fmaf(factor, x.z, sum.z);
  sum.w = fmaf(factor, x.w, sum.w);
}

// channels d .. d + 3 of a result
template <typename X>
__device__ __forceinline__ void finish(const DecodeAttention& p, const Extra& extra, const Place& at, int r, int d,
                                       const float4& sum, float maximum, float total) {
  const int query = query_of(extra, at.row0 + r), in_group = at.row0 + r - query * p.group;
  const int64_t row = (at.b * p.n + query) * p.heads + at.kv_head * p.group + in_group;
  const float inverse = total == 0 ? 0.0f : 1.0f / total;
  const float value[4] = {sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse};
  X* out = static_cast<X*>(p.out) + row * p.head_dim + d;
  if (extra.aligned) {
    store_floats<4>(out, value);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (d + j < p.head_dim) from_float(value[j], out + j);
    }
  }
  if (p.lse && d == 0) p.lse[row] = total == 0 ? -INFINITY : (maximum + log2f(total)) * kLn2;
}

// use(r, d, sum, maximum, total) for the rows and channels of this thread, warps added in order
template <typename S, typename Use>
__device__ __forceinline__ void merge_warps(const DecodeAttention& p, const Place& at, const typename S::Sums& sums,
                                            Use use) {
  for (int i = threadIdx.x; i < at.rows * S::kPacks; i += kThreads) {
    const int r = i / S::kPacks, d = i % S::kPacks * 4;
    if (d >= p.head_dim) continue;
    float maximum = -INFINITY, total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, sums.maximum[w][r]);
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = ptx::exp2_approx(sums.maximum[w][r] - base_of(maximum));
      total = fmaf(factor, sums.total[w][r], total);
      add_scaled(sum, factor, *reinterpret_cast<const float4*>(&sums.sum[w][r][d]));
    }
    use(r, d, sum, maximum, total);
  }
}

// the sums of splits warp, warp + 8, ..., to shared memory; a lane has kEach packs at a time under way
template <typename S>
__device__ __forceinline__ void sum_splits(const DecodeAttention& p, const Place& at, const float* partial,
                                           const float2* extremes, typename S::Sums& sums) {
  constexpr int kEach = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pitch = decode_pitch(p.head_dim);
#pragma unroll 1
  for (int i0 = lane; i0 < at.rows * S::kPacks; i0 += 32 * kEach) {
    float4 sum[kEach];
    float2 whole[kEach];  // maximum, total
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      sum[e] = make_float4(0, 0, 0, 0);
      whole[e] = make_float2(-INFINITY, 0);
    }
#pragma unroll 2
    for (int split = warp; split < at.splits; split += kWarps) {
      float4 x[kEach];
      float2 extreme[kEach];
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int i = i0 + 32 * e, r = i / S::kPacks, d = i % S::kPacks * 4;
        const int64_t slot = static_cast<int64_t>(split) * p.rows + r;
        const bool there = r < at.rows && d < p.head_dim;
        x[e] = there ? __ldcg(reinterpret_cast<const float4*>(partial + slot * pitch + d)) : make_float4(0, 0, 0, 0);
        extreme[e] = there ? __ldcg(extremes + slot) : make_float2(-INFINITY, 0);
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const float maximum = fmaxf(whole[e].x, extreme[e].x);
        const float before = ptx::exp2_approx(whole[e].x - base_of(maximum));
        const float factor = ptx::exp2_approx(extreme[e].x - base_of(maximum));
        float4 next = make_float4(before * sum[e].x, before * sum[e].y, before * sum[e].z, before * sum[e].w);
        add_scaled(next, factor, x[e]);
        sum[e] = next;
        whole[e] = make_float2(maximum, fmaf(factor, extreme[e].y, before * whole[e].y));
      }
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = i0 + 32 * e, r = i / S::kPacks, d = i % S::kPacks * 4;
      if (r >= at.rows) continue;
      *reinterpret_cast<float4*>(&sums.sum[warp][r][d]) = sum[e];
      if (d == 0) {
        sums.maximum[warp][r] = whole[e].x;
        sums.total[warp][r] = whole[e].y;
      }
    }
  }
}

// grid: splits, kv_heads * tiles of rows, batch
template <typename X, int D, int kRowTiles>
__global__ void __launch_bounds__(kThreads, D == 256 ? 1 : 2)
    decode_mma_kernel(const __grid_constant__ DecodeAttention p, const __grid_constant__ Extra extra) {
  using S = Shape<D, kRowTiles>;
  typename S::Sums& sums = *ptx::dynamic_shared<typename S::Sums>();
  __shared__ bool s_last;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int tiles = (p.rows + S::kRows - 1) / S::kRows, y = static_cast<int>(blockIdx.y);
  const int kv_head = tiles == 1 ? y : y / tiles, row0 = (y - kv_head * tiles) * S::kRows;
  const int64_t b = blockIdx.z;
  const int split = static_cast<int>(blockIdx.x), length = static_cast<int>(decode_length(p, b));
  const int splits = length <= S::kSplit ? 1 : (length + S::kSplit - 1) / S::kSplit;
  if (split >= splits) return;
  const Place at{b,     kv_head, row0,   p.rows - row0 < S::kRows ? p.rows - row0 : S::kRows,
                 split, splits,  length, split * S::kSplit + static_cast<int>(threadIdx.x) / 32 * S::kKeys};
  typename S::Held held;
  // a branch, not a choice at every load: the loads stand alone in a block, so ptxas issues all of them before it waits
  // for the first
  if (extra.aligned) {
    load<true, S>(p, extra, at, held);
  } else {
    load<false, S>(p, extra, at, held);
  }
  sum_keys<X, S, kRowTiles>(p, extra, at, held, sums);
  __syncthreads();
  const auto result = [&](int r, int d, const float4& sum, float maximum, float total) {
    finish<X>(p, extra, at, r, d, sum, maximum, total);
  };
  if (splits == 1) return merge_warps<S>(p, at, sums, result);

  // [batch, kv_heads, splits, rows] sums, then as many pairs of maximum and total
  const int pitch = decode_pitch(p.head_dim);
  const int64_t first = (b * p.kv_heads + kv_head) * p.splits * p.rows + row0;
  const int64_t slots = p.batch * p.kv_heads * p.splits * p.rows;
  float* partial = p.partial + first * pitch;
  float2* extremes = reinterpret_cast<float2*>(p.partial + slots * pitch) + first;
  merge_warps<S>(p, at, sums, [&](int r, int d, const float4& sum, float maximum, float total) {
    const int64_t slot = static_cast<int64_t>(split) * p.rows + r;
    *reinterpret_cast<float4*>(partial + slot * pitch + d) = sum;
    if (d == 0) extremes[slot] = make_float2(maximum, total);
  });
  // all of the block has written, and has read `sums`
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* counter = extra.counters + b * gridDim.y + blockIdx.y;
    s_last = ptx::add_acquire_release(counter, 1) == static_cast<uint32_t>(splits - 1);
    if (s_last) *counter = 0;
  }
  __syncthreads();
  if (!s_last) return;
  sum_splits<S>(p, at, partial, extremes, sums);
  __syncthreads();
  merge_warps<S>(p, at, sums, result);
}

bool aligned(const DecodeAttention& p) {
  bool fit = aligned16(p.q) && aligned16(p.k) && aligned16(p.v) && aligned16(p.out) && p.head_dim % 8 == 0;
  for (int i = 0; i < 3; ++i) fit = fit && p.q_stride[i] % 8 == 0 && p.k_stride[i] % 8 == 0 && p.v_stride[i] % 8 == 0;
  return fit;
}

template <typename X, int D, int kRowTiles>
void queue(const DecodeAttention& p, cudaStream_t stream) {
  using S = Shape<D, kRowTiles>;
  const unsigned splits = p.splits > 0 ? p.splits : 1, tiles = (p.rows + S::kRows - 1) / S::kRows;
  const dim3 grid(splits, p.kv_heads * tiles, static_cast<unsigned>(p.batch));
  // exact for every number of rows that a grid holds
  const uint64_t reciprocal = ((uint64_t{1} << 40) + p.group - 1) / p.group;
  const Extra extra{splits > 1 ? counters(p.batch * grid.y, stream) : nullptr, reciprocal, aligned(p)};
  const Launch at{"decode_attention", grid, dim3(kThreads), stream, sizeof(typename S::Sums), 1, true};
  launch(at, decode_mma_kernel<X, D, kRowTiles>, p, extra);
}

template <typename X, int D>
void queue_rows(const DecodeAttention& p, cudaStream_t stream) {
  p.rows <= 8 ? queue<X, D, 1>(p, stream) : queue<X, D, 2>(p, stream);
}

template <typename X>
void decode(const DecodeAttention& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return queue_rows<X, 64>(p, stream);
  p.head_dim <= 128 ? queue_rows<X, 128>(p, stream) : queue_rows<X, 256>(p, stream);
}

}  // namespace

void decode_mma_launch(const DecodeAttention& p, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  p.dtype == Dtype::bf16 ? decode<bf16>(p, stream) : decode<f16>(p, stream);
}

}  // namespace flexkernels::cuda
