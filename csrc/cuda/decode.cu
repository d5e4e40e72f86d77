// Decode attention over float32 caches; decode_mma.cu has the 16-bit ones. A block takes one split of one kv head for R
// query rows. `lanes` neighbouring threads share a key, each with its packs of head_dim, and keep a running maximum,
// total and sum; these are merged over the groups of a warp, then over warps, in a fixed order. A second kernel merges
// splits.
#include "kernels.h"
#include "lanes.h"
#include "launch.h"

namespace flexkernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// keys that a thread loads before it uses them
constexpr int kUnroll = 4;

// a running softmax sum of one row: acc = sum exp(s - maximum) v, total = sum exp(s - maximum)
template <int E>
struct Sum {
  float maximum, total, acc[E];

  __device__ __forceinline__ void clear() {
    maximum = -INFINITY;
    total = 0;
#pragma unroll
    for (int e = 0; e < E; ++e) acc[e] = 0;
  }

  // raises the maximum; what it was relative to before is scaled down
  __device__ __forceinline__ void raise(float to) {
    const float decay = decode_exp(maximum, to);
    total *= decay;
#pragma unroll
    for (int e = 0; e < E; ++e) acc[e] *= decay;
    maximum = to;
  }
};

struct Place {
  int64_t b;
  int kv_head, r0, split;
  int lane, lanes;  // of the group that shares a key
  bool aligned;
};

// the packs of V elements that thread `lane` of a group holds of a row: pack c starts at (c * lanes + lane) * V
template <int V, int C>
__device__ __forceinline__ void load_row(const float* row, const Place& at, int head_dim, bool valid,
                                         float (&out)[V * C]) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int d = (c * at.lanes + at.lane) * V;
    float pack[V];
#pragma unroll
    for (int j = 0; j < V; ++j) pack[j] = 0;
    if (valid && d < head_dim) load_pack<V>(row + d, at.aligned, pack);
#pragma unroll
    for (int j = 0; j < V; ++j) out[c * V + j] = pack[j];
  }
}

// sums over the keys [first, end): group g of the block takes first + g, first + g + groups, ...
template <int V, int C, int R>
__device__ __forceinline__ void sum_keys(const DecodeAttention& p, const Place& at, const float (&q)[R][V * C],
                                         const int64_t (&seen)[R], int64_t first, int64_t end, Sum<V * C> (&sums)[R]) {
  const float* k = static_cast<const float*>(p.k) + at.b * p.k_stride[0] + at.kv_head * p.k_stride[1];
  const float* v = static_cast<const float*>(p.v) + at.b * p.v_stride[0] + at.kv_head * p.v_stride[1];
  const float* weight = p.key_log_weight ? p.key_log_weight + at.b * p.max_len : nullptr;
  const int groups = kThreads / at.lanes, group = static_cast<int>(threadIdx.x) / at.lanes;
  // shuffles need whole warps: all threads of the block make the same number of steps
#pragma unroll 1
  for (int64_t base = first + group; base - group < end; base += groups * kUnroll) {
    float score[R][kUnroll], x[kUnroll][V * C];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = base + u * groups;
      load_row<V, C>(k + j * p.k_stride[2], at, p.head_dim, j < end, x[u]);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        score[r][u] = 0;
#pragma unroll
        for (int e = 0; e < V * C; ++e) score[r][u] += q[r][e] * x[u][e];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = base + u * groups;
      load_row<V, C>(v + j * p.v_stride[2], at, p.head_dim, j < end, x[u]);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float top = sums[r].maximum;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t j = base + u * groups;
        score[r][u] = p.scale * sum_lanes(score[r][u], at.lanes);
        if (weight && j < end) score[r][u] += weight[j];
        if (j >= seen[r]) score[r][u] = -INFINITY;
        top = fmaxf(top, score[r][u]);
      }
      sums[r].raise(top);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float share = decode_exp(score[r][u], top);
        sums[r].total += share;
#pragma unroll
        for (int e = 0; e < V * C; ++e) sums[r].acc[e] += share * x[u][e];
      }
    }
  }
}

// out = acc / total, or the parts of this split for the merge
__device__ void write_row(const DecodeAttention& p, const Place& at, int r, int d, float value, float maximum,
                          float total) {
  if (p.splits > 1) {
    const int64_t slot = ((at.b * p.kv_heads + at.kv_head) * p.splits + at.split) * p.rows + r;
    p.partial[slot * p.head_dim + d] = value;
    if (d > 0) return;
    float* extremes = p.partial + p.batch * p.kv_heads * p.splits * p.rows * p.head_dim;
    extremes[2 * slot] = maximum;
    extremes[2 * slot + 1] = total;
    return;
  }
  const int64_t row = decode_out(p, at.b, at.kv_head, r);
  static_cast<float*>(p.out)[row * p.head_dim + d] = total == 0 ? 0.0f : value / total;
  if (p.lse && d == 0) p.lse[row] = decode_lse(maximum, total);
}

// grid: splits, kv_heads * tiles of R rows, batch
template <int V, int C, int R>
__global__ void __launch_bounds__(kThreads)
    decode_split_kernel(const __grid_constant__ DecodeAttention p, int lanes, bool aligned) {
  __shared__ float warp_acc[kWarps][R][32 * V * C];
  __shared__ float warp_extremes[kWarps][R][2];
  const int tiles = (p.rows + R - 1) / R, warp = threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const Place at{blockIdx.z,
                 static_cast<int>(blockIdx.y) / tiles,
                 static_cast<int>(blockIdx.y) % tiles * R,
                 static_cast<int>(blockIdx.x),
                 lane,
                 lanes,
                 aligned};
  const int64_t length = decode_length(p, at.b), first = static_cast<int64_t>(at.split) * kDecodeSplit;
  // the merge does not look at splits beyond the length, except the first
  if (first >= length && at.split > 0) return;
  const int64_t end = first + kDecodeSplit < length ? first + kDecodeSplit : length;

  float q[R][V * C];
  int64_t seen[R];
  Sum<V * C> sums[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const bool valid = at.r0 + r < p.rows;
    const int row = valid ? at.r0 + r : 0;
    load_row<V, C>(static_cast<const float*>(p.q) + decode_query(p, at.b, at.kv_head, row), at, p.head_dim, valid,
                   q[r]);
    const int64_t visible = decode_visible(p, length, row);
    seen[r] = visible < end ? visible : end;
    sums[r].clear();
  }
  sum_keys<V, C, R>(p, at, q, seen, first, end, sums);

#pragma unroll
  for (int r = 0; r < R; ++r) {
    // groups of this warp
    for (int other = lanes; other < 32; other *= 2) {
      const float maximum = __shfl_xor_sync(kAll, sums[r].maximum, other);
      sums[r].raise(fmaxf(sums[r].maximum, maximum));
      sums[r].total += __shfl_xor_sync(kAll, sums[r].total, other);
#pragma unroll
      for (int e = 0; e < V * C; ++e) sums[r].acc[e] += __shfl_xor_sync(kAll, sums[r].acc[e], other);
    }
    if (threadIdx.x % 32 < static_cast<unsigned>(lanes)) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int j = 0; j < V; ++j) warp_acc[warp][r][(c * lanes + lane) * V + j] = sums[r].acc[c * V + j];
      }
      if (lane == 0) {
        warp_extremes[warp][r][0] = sums[r].maximum;
        warp_extremes[warp][r][1] = sums[r].total;
      }
    }
  }
  __syncthreads();
  const int rows = p.rows - at.r0 < R ? p.rows - at.r0 : R;
  for (int i = threadIdx.x; i < rows * p.head_dim; i += kThreads) {
    const int r = i / p.head_dim, d = i % p.head_dim;
    float maximum = -INFINITY, total = 0, value = 0;
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, warp_extremes[w][r][0]);
    for (int w = 0; w < kWarps; ++w) {
      const float share = decode_exp(warp_extremes[w][r][0], maximum);
      total += share * warp_extremes[w][r][1];
      value += share * warp_acc[w][r][d];
    }
    write_row(p, at, at.r0 + r, d, value, maximum, total);
  }
}

// one row of out a block, one element a thread
__global__ void decode_merge_kernel(const __grid_constant__ DecodeAttention p) {
  const int64_t i = blockIdx.x, b = i / p.rows / p.kv_heads;
  const int r = static_cast<int>(i % p.rows), kv_head = static_cast<int>(i / p.rows % p.kv_heads);
  const int64_t length = decode_length(p, b);
  const int used = length <= kDecodeSplit ? 1 : static_cast<int>((length + kDecodeSplit - 1) / kDecodeSplit);
  const int64_t first = (b * p.kv_heads + kv_head) * p.splits * p.rows + r;
  const float* extremes = p.partial + p.batch * p.kv_heads * p.splits * p.rows * p.head_dim;
  float maximum = -INFINITY, total = 0, value = 0;
  for (int s = 0; s < used; ++s) maximum = fmaxf(maximum, extremes[2 * (first + static_cast<int64_t>(s) * p.rows)]);
  const int d = threadIdx.x;
#pragma unroll 4
  for (int s = 0; s < used; ++s) {
    const int64_t slot = first + static_cast<int64_t>(s) * p.rows;
    const float share = decode_exp(extremes[2 * slot], maximum);
    total += share * extremes[2 * slot + 1];
    if (d < p.head_dim) value += share * p.partial[slot * p.head_dim + d];
  }
  const int64_t row = decode_out(p, b, kv_head, r);
  if (d < p.head_dim) static_cast<float*>(p.out)[row * p.head_dim + d] = total == 0 ? 0.0f : value / total;
  if (p.lse && d == 0) p.lse[row] = decode_lse(maximum, total);
}

bool aligned(const DecodeAttention& p) {
  bool fit = aligned16(p.q) && aligned16(p.k) && aligned16(p.v);
  for (int i = 0; i < 3; ++i) fit = fit && p.q_stride[i] % 4 == 0 && p.k_stride[i] % 4 == 0 && p.v_stride[i] % 4 == 0;
  return fit;
}

template <int V, int C, int R>
void queue_split(const DecodeAttention& p, cudaStream_t stream) {
  const int packs = (p.head_dim + V - 1) / V;
  const int lanes = packs < 32 ? power_of_two(packs) : 32;
  const dim3 grid(p.splits > 0 ? p.splits : 1, p.kv_heads * ((p.rows + R - 1) / R), static_cast<unsigned>(p.batch));
  launch({"decode_attention", grid, kThreads, stream}, decode_split_kernel<V, C, R>, p, lanes, V == 1 || aligned(p));
}

template <int V, int C>
void queue_rows(const DecodeAttention& p, cudaStream_t stream) {
  if (p.rows == 1) return queue_split<V, C, 1>(p, stream);
  // single elements take more registers than packs
  if (p.rows == 2 || V == 1) return queue_split<V, C, 2>(p, stream);
  if constexpr (V > 1) queue_split<V, C, 4>(p, stream);
}

}  // namespace

void decode_attention_launch(const DecodeAttention& p, void* on) {
  if (p.dtype != Dtype::f32) return decode_mma_launch(p, on);
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  if (p.head_dim % 4) {
    queue_rows<1, kDecodeMaxHeadDim / 32>(p, stream);
  } else if (p.head_dim <= 128) {
    queue_rows<4, 1>(p, stream);
  } else {
    queue_rows<4, 2>(p, stream);
  }
  if (p.splits <= 1) return;
  const unsigned rows = static_cast<unsigned>(p.batch * p.kv_heads * p.rows);
  launch({"decode_attention merge", rows, (p.head_dim + 31) / 32 * 32, stream}, decode_merge_kernel, p);
}

}  // namespace flexkernels::cuda
