// Decoding. Attention: a block takes one split of one kv head for R query rows. `lanes` neighbouring threads share a
// key, each with its packs of head_dim, and keep a running maximum, total and sum; these are merged over the groups of
// a warp, then over warps, in a fixed order. Norms: `lanes` threads share a head, each with packs of both its halves,
// the pairs of the rotary embedding.
#include "kernels.h"
#include "launch.h"
#include "pack.h"

namespace flexkernels::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// keys that a thread loads before it uses them
constexpr int kUnroll = 4;

__device__ __forceinline__ float sum_lanes(float value, int lanes) {
  for (int lane = lanes / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAll, value, lane);
  return value;
}

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

// the packs of V elements that thread `lane` of a group holds of a row: pack c starts at (c * lanes + lane) * V
template <typename T, int V, int C>
__device__ __forceinline__ void load_row(const T* row, int lane, int lanes, int head_dim, bool valid,
                                         float (&out)[V * C]) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int d = (c * lanes + lane) * V;
    float pack[V];
#pragma unroll
    for (int j = 0; j < V; ++j) pack[j] = 0;
    if (valid && d < head_dim) load_floats<V>(row + d, pack);
#pragma unroll
    for (int j = 0; j < V; ++j) out[c * V + j] = pack[j];
  }
}

struct Place {
  int64_t b;
  int kv_head, r0, split;
  int lane, lanes;  // of the group that shares a key
};

// sums over the keys [first, end): group g of the block takes first + g, first + g + groups, ...
template <typename T, int V, int C, int R>
__device__ __forceinline__ void sum_keys(const DecodeAttention& p, const Place& at, const float (&q)[R][V * C],
                                         const int64_t (&seen)[R], int64_t first, int64_t end, Sum<V * C> (&sums)[R]) {
  const T* k = static_cast<const T*>(p.k) + at.b * p.k_stride[0] + at.kv_head * p.k_stride[1];
  const T* v = static_cast<const T*>(p.v) + at.b * p.v_stride[0] + at.kv_head * p.v_stride[1];
  const float* weight = p.key_log_weight ? p.key_log_weight + at.b * p.max_len : nullptr;
  const int groups = kThreads / at.lanes, group = static_cast<int>(threadIdx.x) / at.lanes;
  // shuffles need whole warps: all threads of the block make the same number of steps
#pragma unroll 1
  for (int64_t base = first + group; base - group < end; base += groups * kUnroll) {
    float score[R][kUnroll], x[kUnroll][V * C];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = base + u * groups;
      load_row<T, V, C>(k + j * p.k_stride[2], at.lane, at.lanes, p.head_dim, j < end, x[u]);
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
      load_row<T, V, C>(v + j * p.v_stride[2], at.lane, at.lanes, p.head_dim, j < end, x[u]);
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
template <typename T>
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
  from_float(total == 0 ? 0.0f : value / total, static_cast<T*>(p.out) + row * p.head_dim + d);
  if (p.lse && d == 0) p.lse[row] = decode_lse(maximum, total);
}

// grid: splits, kv_heads * tiles of R rows, batch
template <typename T, int V, int C, int R>
__global__ void __launch_bounds__(kThreads) decode_split_kernel(const __grid_constant__ DecodeAttention p, int lanes) {
  __shared__ float warp_acc[kWarps][R][32 * V * C];
  __shared__ float warp_extremes[kWarps][R][2];
  const int tiles = (p.rows + R - 1) / R, warp = threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const Place at{blockIdx.z,
                 static_cast<int>(blockIdx.y) / tiles,
                 static_cast<int>(blockIdx.y) % tiles * R,
                 static_cast<int>(blockIdx.x),
                 lane,
                 lanes};
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
    load_row<T, V, C>(static_cast<const T*>(p.q) + decode_query(p, at.b, at.kv_head, row), at.lane, at.lanes,
                      p.head_dim, valid, q[r]);
    const int64_t visible = decode_visible(p, length, row);
    seen[r] = visible < end ? visible : end;
    sums[r].clear();
  }
  sum_keys<T, V, C, R>(p, at, q, seen, first, end, sums);

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
    write_row<T>(p, at, at.r0 + r, d, value, maximum, total);
  }
}

// one row of out a block, one element a thread
template <typename T>
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
  if (d < p.head_dim) from_float(total == 0 ? 0.0f : value / total, static_cast<T*>(p.out) + row * p.head_dim + d);
  if (p.lse && d == 0) p.lse[row] = decode_lse(maximum, total);
}

int power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

template <typename T, int V, int C, int R>
void queue_split(const DecodeAttention& p, cudaStream_t stream) {
  const int packs = (p.head_dim + V - 1) / V;
  const int lanes = packs < 32 ? power_of_two(packs) : 32;
  const dim3 grid(p.splits > 0 ? p.splits : 1, p.kv_heads * ((p.rows + R - 1) / R), static_cast<unsigned>(p.batch));
  launch({"decode_attention", grid, kThreads, stream}, decode_split_kernel<T, V, C, R>, p, lanes);
}

template <typename T, int V, int C>
void queue_rows(const DecodeAttention& p, cudaStream_t stream) {
  if (p.rows == 1) return queue_split<T, V, C, 1>(p, stream);
  // single elements take more registers than packs
  if (p.rows == 2 || V == 1) return queue_split<T, V, C, 2>(p, stream);
  if constexpr (V > 1) queue_split<T, V, C, 4>(p, stream);
}

template <typename T>
bool packs_fit(const DecodeAttention& p) {
  constexpr int V = 16 / sizeof(T);
  bool fit = aligned16(p.q) && aligned16(p.k) && aligned16(p.v) && p.head_dim % V == 0;
  for (int i = 0; i < 3; ++i) fit = fit && p.q_stride[i] % V == 0 && p.k_stride[i] % V == 0 && p.v_stride[i] % V == 0;
  return fit;
}

template <typename T>
void decode_attention(const DecodeAttention& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (!packs_fit<T>(p)) {
    queue_rows<T, 1, kDecodeMaxHeadDim / 32>(p, stream);
  } else if (p.head_dim <= 32 * V) {
    queue_rows<T, V, 1>(p, stream);
  } else {
    queue_rows<T, V, kDecodeMaxHeadDim / 32 / V>(p, stream);
  }
  if (p.splits <= 1) return;
  const unsigned rows = static_cast<unsigned>(p.batch * p.kv_heads * p.rows);
  launch({"decode_attention merge", rows, (p.head_dim + 31) / 32 * 32, stream}, decode_merge_kernel<T>, p);
}

// --- norms and rotary embedding

constexpr int kNormThreads = 256;

// thread `lane` of a head's group holds packs of V elements of either half: pack c starts at (c * lanes + lane) * V.
// Of an odd head_dim the low half has one element more; elements beyond a half are 0.
template <int V, int C>
struct Halves {
  static constexpr int E = V * C;
  float low[E], high[E];
};

struct Lanes {
  int lane, lanes, half, head_dim;

  template <int V>
  __device__ __forceinline__ int start(int c) const {
    return (c * lanes + lane) * V;
  }
};

template <int V, int C, typename T>
__device__ __forceinline__ void load_halves(const Lanes& l, const T* x, bool valid, Halves<V, C>& out) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int d = l.start<V>(c);
    float low[V], high[V];
#pragma unroll
    for (int j = 0; j < V; ++j) low[j] = high[j] = 0;
    if (valid && d < l.half) load_floats<V>(x + d, low);
    if (valid && d < l.head_dim - l.half) load_floats<V>(x + l.half + d, high);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      out.low[c * V + j] = low[j];
      out.high[c * V + j] = high[j];
    }
  }
}

template <int V, int C, typename T>
__device__ __forceinline__ void store_halves(const Lanes& l, T* x, const Halves<V, C>& in) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int d = l.start<V>(c);
    float low[V], high[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      low[j] = in.low[c * V + j];
      high[j] = in.high[c * V + j];
    }
    if (d < l.half) store_floats<V>(x + d, low);
    if (d < l.head_dim - l.half) store_floats<V>(x + l.half + d, high);
  }
}

// sum of a.low * b.low + a.high * b.high over the head
template <int V, int C>
__device__ __forceinline__ float dot(const Lanes& l, const Halves<V, C>& a, const Halves<V, C>& b) {
  float sum = 0;
#pragma unroll
  for (int e = 0; e < V * C; ++e) sum += a.low[e] * b.low[e] + a.high[e] * b.high[e];
  return sum_lanes(sum, l.lanes);
}

template <int V, int C>
__device__ __forceinline__ float sum(const Lanes& l, const Halves<V, C>& a) {
  float total = 0;
#pragma unroll
  for (int e = 0; e < V * C; ++e) total += a.low[e] + a.high[e];
  return sum_lanes(total, l.lanes);
}

// x -> x_hat; returns rstd
template <int V, int C>
__device__ __forceinline__ float normalise(const HeadNorm& p, const Lanes& l, Halves<V, C>& x) {
  if (p.kind == kHeadNormNone) return 1;
  if (p.kind == kHeadNormLayer) {
    const float mean = sum(l, x) / static_cast<float>(p.head_dim);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int d = l.start<V>(c);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (d < l.half) x.low[c * V + j] -= mean;
        if (d < l.head_dim - l.half) x.high[c * V + j] -= mean;
      }
    }
  }
  const float rstd = head_rstd(p, dot(l, x, x));
#pragma unroll
  for (int e = 0; e < V * C; ++e) {
    x.low[e] *= rstd;
    x.high[e] *= rstd;
  }
  return rstd;
}

template <int V, int C>
__device__ __forceinline__ void scale_halves(const Lanes& l, const float* weight, Halves<V, C>& x) {
  if (!weight) return;
  Halves<V, C> w;
  load_halves(l, weight, true, w);
#pragma unroll
  for (int e = 0; e < V * C; ++e) {
    x.low[e] *= w.low[e];
    x.high[e] *= w.high[e];
  }
}

// turns the pairs by the angle whose cosine and sine are at `row`; back: by its negative
template <int V, int C>
__device__ __forceinline__ void rotate(const HeadNorm& p, const Lanes& l, int64_t row, bool back, Halves<V, C>& x) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int d = l.start<V>(c);
    if (d >= l.half) continue;
    float cosine[V], sine[V];
    load_floats<V>(p.cos + row + d, cosine);
    load_floats<V>(p.sin + row + d, sine);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float low = x.low[c * V + j], high = x.high[c * V + j], s = back ? -sine[j] : sine[j];
      x.low[c * V + j] = low * cosine[j] - high * s;
      x.high[c * V + j] = high * cosine[j] + low * s;
    }
  }
}

// one head of one token a group of `lanes` threads
template <typename T, int V, int C>
__global__ void __launch_bounds__(kNormThreads) kv_append_kernel(const __grid_constant__ KvAppend p, int lanes) {
  const HeadNorm& c = p.norm;
  const Lanes l{static_cast<int>(threadIdx.x) % lanes, lanes, (c.head_dim + 1) / 2, c.head_dim};
  const int all = p.heads + 2 * p.kv_heads;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (kNormThreads / lanes) + threadIdx.x / lanes;
  const bool valid = task < p.batch * p.n * all;
  const int64_t token = valid ? task / all : 0, b = token / p.n, i = token % p.n;
  const int head = valid ? static_cast<int>(task % all) : 0, kv = head - p.heads;
  Halves<V, C> x;
  load_halves(l, static_cast<const T*>(p.qkv) + b * p.qkv_stride[0] + i * p.qkv_stride[1] + head * c.head_dim, valid,
              x);
  Halves<V, C> y = x;
  // shuffles need whole warps, so the heads of v go along
  normalise(c, l, y);
  scale_halves(l, kv < 0 ? c.q_weight : c.k_weight, y);
  if (c.cos) rotate(c, l, rotary_row(c, p.cache_len[b] - p.n + i), false, y);
  if (!valid) return;
  const int64_t position = append_position(p, b, i);
  if (kv < 0) {
    store_halves(l, static_cast<T*>(p.q) + (token * p.heads + head) * c.head_dim, y);
  } else if (position >= 0 && kv < p.kv_heads) {
    T* k = static_cast<T*>(p.k) + b * p.k_stride[0] + kv * p.k_stride[1] + position * p.k_stride[2];
    store_halves(l, k, y);
  } else if (position >= 0) {
    T* v = static_cast<T*>(p.v) + b * p.v_stride[0] + (kv - p.kv_heads) * p.v_stride[1] + position * p.v_stride[2];
    store_halves(l, v, x);
  }
}

template <typename T, int V, int C>
__global__ void __launch_bounds__(kNormThreads) qk_norm_kernel(const __grid_constant__ QkNorm p, int lanes) {
  const HeadNorm& c = p.norm;
  const Lanes l{static_cast<int>(threadIdx.x) % lanes, lanes, (c.head_dim + 1) / 2, c.head_dim};
  const int all = p.heads + p.kv_heads;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (kNormThreads / lanes) + threadIdx.x / lanes;
  const bool valid = task < p.total * all;
  const int64_t token = valid ? task / all : 0;
  const int head = valid ? static_cast<int>(task % all) : 0;
  Halves<V, C> x;
  load_halves(l, static_cast<const T*>(p.qk) + token * p.qk_stride + head * c.head_dim, valid, x);
  normalise(c, l, x);
  const bool is_q = head < p.heads;
  scale_halves(l, is_q ? c.q_weight : c.k_weight, x);
  if (c.cos) rotate(c, l, rotary_row(c, p.positions[token]), false, x);
  if (!valid) return;
  T* out = is_q ? static_cast<T*>(p.q) + (token * p.heads + head) * c.head_dim
                : static_cast<T*>(p.k) + (token * p.kv_heads + head - p.heads) * c.head_dim;
  store_halves(l, out, x);
}

// grid: chunks of kQkNormChunk tokens, q or k; the groups of a block share its heads
template <typename T, int V, int C>
__global__ void __launch_bounds__(kNormThreads)
    qk_norm_backward_kernel(const __grid_constant__ QkNormBackward p, int lanes) {
  // [groups, 2 halves of lanes * V * C]
  __shared__ float parts[kNormThreads * 2 * V * C];
  const HeadNorm& c = p.norm;
  const Lanes l{static_cast<int>(threadIdx.x) % lanes, lanes, (c.head_dim + 1) / 2, c.head_dim};
  const int groups = kNormThreads / lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const bool is_q = blockIdx.y == 0;
  const int heads = is_q ? p.heads : p.kv_heads, head0 = is_q ? 0 : p.heads, all = p.heads + p.kv_heads;
  const float* weight = is_q ? c.q_weight : c.k_weight;
  const T* grad = static_cast<const T*>(is_q ? p.grad_q : p.grad_k);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQkNormChunk;
  const int tokens = p.total - first < kQkNormChunk ? static_cast<int>(p.total - first) : kQkNormChunk;
  Halves<V, C> of_weight;
#pragma unroll
  for (int e = 0; e < V * C; ++e) of_weight.low[e] = of_weight.high[e] = 0;
  // all threads make the same number of steps, for the shuffles
#pragma unroll 1
  for (int base = 0; base < tokens * heads; base += groups) {
    const bool valid = base + group < tokens * heads;
    const int task = valid ? base + group : 0, head = task % heads;
    const int64_t token = first + task / heads;
    Halves<V, C> x, dy;
    load_halves(l, static_cast<const T*>(p.qk) + token * p.qk_stride + (head0 + head) * c.head_dim, valid, x);
    load_halves(l, grad + (token * heads + head) * c.head_dim, valid, dy);
    const float rstd = normalise(c, l, x);
    if (c.cos) rotate(c, l, rotary_row(c, p.positions[token]), true, dy);
#pragma unroll
    for (int e = 0; e < V * C; ++e) {
      of_weight.low[e] += dy.low[e] * x.low[e];
      of_weight.high[e] += dy.high[e] * x.high[e];
    }
    scale_halves(l, weight, dy);
    const float dim = static_cast<float>(c.head_dim);
    const float mean = c.kind == kHeadNormLayer ? sum(l, dy) / dim : 0.0f;
    const float along = c.kind == kHeadNormNone ? 0.0f : dot(l, dy, x) / dim;
#pragma unroll
    for (int e = 0; e < V * C; ++e) {
      dy.low[e] = rstd * (dy.low[e] - mean - x.low[e] * along);
      dy.high[e] = rstd * (dy.high[e] - mean - x.high[e] * along);
    }
    if (valid) store_halves(l, static_cast<T*>(p.grad_qk) + (token * all + head0 + head) * c.head_dim, dy);
  }
  if (!p.grad_weight) return;
  const int padded = lanes * V * C;
  float* mine = parts + group * 2 * padded;
#pragma unroll
  for (int k = 0; k < C; ++k) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      mine[l.start<V>(k) + j] = of_weight.low[k * V + j];
      mine[padded + l.start<V>(k) + j] = of_weight.high[k * V + j];
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < c.head_dim; d += kNormThreads) {
    const int from = d < l.half ? d : padded + d - l.half;
    float total = 0;
    for (int g = 0; g < groups; ++g) total += parts[g * 2 * padded + from];
    p.grad_weight[(blockIdx.x * int64_t{2} + blockIdx.y) * c.head_dim + d] = total;
  }
}

// threads of a group that share a head's halves in packs of V
int norm_lanes(const HeadNorm& p, int V) {
  const int packs = ((p.head_dim + 1) / 2 + V - 1) / V;
  return packs < 32 ? power_of_two(packs) : 32;
}

template <typename T>
bool halves_fit(const HeadNorm& p) {
  constexpr int V = 16 / sizeof(T);
  return p.head_dim % (2 * V) == 0 && aligned16(p.q_weight) && aligned16(p.k_weight) && aligned16(p.cos) &&
         aligned16(p.sin);
}

unsigned blocks_for(int64_t tasks, int lanes) {
  const int64_t groups = kNormThreads / lanes;
  return static_cast<unsigned>((tasks + groups - 1) / groups);
}

// packs of 16 bytes where everything is aligned, else single elements
template <typename T>
void kv_append(const KvAppend& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  bool fit = halves_fit<T>(p.norm) && aligned16(p.qkv) && aligned16(p.k) && aligned16(p.v) && aligned16(p.q);
  for (int i = 0; i < 3; ++i) fit = fit && p.k_stride[i] % V == 0 && p.v_stride[i] % V == 0;
  fit = fit && p.qkv_stride[0] % V == 0 && p.qkv_stride[1] % V == 0;
  const int lanes = norm_lanes(p.norm, fit ? V : 1);
  const unsigned blocks = blocks_for(p.batch * p.n * (p.heads + 2 * p.kv_heads), lanes);
  if (fit)
    launch({"kv_append_", blocks, kNormThreads, stream}, kv_append_kernel<T, V, 1>, p, lanes);
  else
    launch({"kv_append_", blocks, kNormThreads, stream}, kv_append_kernel<T, 1, 4>, p, lanes);
}

template <typename T>
void qk_norm(const QkNorm& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const bool fit = halves_fit<T>(p.norm) && aligned16(p.qk) && aligned16(p.q) && aligned16(p.k) && p.qk_stride % V == 0;
  const int lanes = norm_lanes(p.norm, fit ? V : 1);
  const unsigned blocks = blocks_for(p.total * (p.heads + p.kv_heads), lanes);
  if (fit)
    launch({"qk_norm", blocks, kNormThreads, stream}, qk_norm_kernel<T, V, 1>, p, lanes);
  else
    launch({"qk_norm", blocks, kNormThreads, stream}, qk_norm_kernel<T, 1, 4>, p, lanes);
}

template <typename T>
void qk_norm_backward(const QkNormBackward& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const bool fit = halves_fit<T>(p.norm) && aligned16(p.qk) && aligned16(p.grad_q) && aligned16(p.grad_k) &&
                   aligned16(p.grad_qk) && p.qk_stride % V == 0;
  const int lanes = norm_lanes(p.norm, fit ? V : 1);
  const dim3 grid(static_cast<unsigned>((p.total + kQkNormChunk - 1) / kQkNormChunk), 2);
  if (fit)
    launch({"qk_norm_backward", grid, kNormThreads, stream}, qk_norm_backward_kernel<T, V, 1>, p, lanes);
  else
    launch({"qk_norm_backward", grid, kNormThreads, stream}, qk_norm_backward_kernel<T, 1, 4>, p, lanes);
}

template <typename Args>
void by_dtype(const Args& p, void* stream, void (*f32)(const Args&, cudaStream_t),
              void (*b16)(const Args&, cudaStream_t), void (*h16)(const Args&, cudaStream_t)) {
  (p.dtype == Dtype::f32 ? f32 : p.dtype == Dtype::bf16 ? b16 : h16)(p, static_cast<cudaStream_t>(stream));
}

}  // namespace

void decode_attention_launch(const DecodeAttention& p, void* stream) {
  by_dtype(p, stream, decode_attention<float>, decode_attention<bf16>, decode_attention<f16>);
}

void kv_append_launch(const KvAppend& p, void* stream) {
  by_dtype(p, stream, kv_append<float>, kv_append<bf16>, kv_append<f16>);
}

void qk_norm_launch(const QkNorm& p, void* stream) { by_dtype(p, stream, qk_norm<float>, qk_norm<bf16>, qk_norm<f16>); }

void qk_norm_backward_launch(const QkNormBackward& p, void* stream) {
  by_dtype(p, stream, qk_norm_backward<float>, qk_norm_backward<bf16>, qk_norm_backward<f16>);
}

}  // namespace flexkernels::cuda
