// Norms and rotary embedding: `lanes` threads share a head, each with packs of both its halves, the pairs of the rotary
// embedding.
#include "kernels.h"
#include "lanes.h"
#include "launch.h"
#include "ptx.h"

namespace flexkernels::cuda {
namespace {

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
  bool aligned;

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
    if (valid && d < l.half) load_pack<V>(x + d, l.aligned, low);
    if (valid && d < l.head_dim - l.half) load_pack<V>(x + l.half + d, l.aligned, high);
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
    if (d < l.half) store_pack<V>(x + d, l.aligned, low);
    if (d < l.head_dim - l.half) store_pack<V>(x + l.half + d, l.aligned, high);
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
    load_pack<V>(p.cos + row + d, l.aligned, cosine);
    load_pack<V>(p.sin + row + d, l.aligned, sine);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float low = x.low[c * V + j], high = x.high[c * V + j], s = back ? -sine[j] : sine[j];
      x.low[c * V + j] = low * cosine[j] - high * s;
      x.high[c * V + j] = high * cosine[j] + low * s;
    }
  }
}

// how a head is split over threads, and whether all that is touched is aligned to packs
struct Split {
  int lanes;
  bool aligned;
};

// one head of one token a group of `lanes` threads
template <typename T, int V, int C>
__global__ void __launch_bounds__(kNormThreads) kv_append_kernel(const __grid_constant__ KvAppend p, Split split) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const HeadNorm& c = p.norm;
  const int lanes = split.lanes;
  const Lanes l{static_cast<int>(threadIdx.x) % lanes, lanes, (c.head_dim + 1) / 2, c.head_dim, split.aligned};
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
__global__ void __launch_bounds__(kNormThreads) qk_norm_kernel(const __grid_constant__ QkNorm p, Split split) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const HeadNorm& c = p.norm;
  const int lanes = split.lanes;
  const Lanes l{static_cast<int>(threadIdx.x) % lanes, lanes, (c.head_dim + 1) / 2, c.head_dim, split.aligned};
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
    qk_norm_backward_kernel(const __grid_constant__ QkNormBackward p, Split split) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  // [groups, 2 halves of lanes * V * C]
  __shared__ float parts[kNormThreads * 2 * V * C];
  const HeadNorm& c = p.norm;
  const int lanes = split.lanes;
  const Lanes l{static_cast<int>(threadIdx.x) % lanes, lanes, (c.head_dim + 1) / 2, c.head_dim, split.aligned};
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

template <typename T>
constexpr int kPack = 16 / sizeof(T);

// packs of 16 bytes, where a half is whole ones
template <typename T>
bool packed(const HeadNorm& p) {
  return p.head_dim % (2 * kPack<T>) == 0;
}

template <typename T>
Split split_of(const HeadNorm& p, bool aligned) {
  const int V = packed<T>(p) ? kPack<T> : 1, packs = ((p.head_dim + 1) / 2 + V - 1) / V;
  aligned = aligned && aligned16(p.q_weight) && aligned16(p.k_weight) && aligned16(p.cos) && aligned16(p.sin);
  return {packs < 32 ? power_of_two(packs) : 32, V == 1 || aligned};
}

unsigned blocks_for(int64_t tasks, const Split& split) {
  const int64_t groups = kNormThreads / split.lanes;
  return static_cast<unsigned>((tasks + groups - 1) / groups);
}

template <typename T>
void kv_append(const KvAppend& p, cudaStream_t stream) {
  constexpr int V = kPack<T>;
  bool aligned = aligned16(p.qkv) && aligned16(p.k) && aligned16(p.v) && aligned16(p.q);
  for (int i = 0; i < 3; ++i) aligned = aligned && p.k_stride[i] % V == 0 && p.v_stride[i] % V == 0;
  const Split split = split_of<T>(p.norm, aligned && p.qkv_stride[0] % V == 0 && p.qkv_stride[1] % V == 0);
  const unsigned blocks = blocks_for(p.batch * p.n * (p.heads + 2 * p.kv_heads), split);
  const Launch at{"kv_append_", blocks, kNormThreads, stream, 0, 1, true};
  if (packed<T>(p.norm)) return launch(at, kv_append_kernel<T, V, 1>, p, split);
  launch(at, kv_append_kernel<T, 1, 4>, p, split);
}

template <typename T>
void qk_norm(const QkNorm& p, cudaStream_t stream) {
  constexpr int V = kPack<T>;
  const bool aligned = aligned16(p.qk) && aligned16(p.q) && aligned16(p.k) && p.qk_stride % V == 0;
  const Split split = split_of<T>(p.norm, aligned);
  const Launch at{"qk_norm", blocks_for(p.total * (p.heads + p.kv_heads), split), kNormThreads, stream, 0, 1, true};
  if (packed<T>(p.norm)) return launch(at, qk_norm_kernel<T, V, 1>, p, split);
  launch(at, qk_norm_kernel<T, 1, 4>, p, split);
}

template <typename T>
void qk_norm_backward(const QkNormBackward& p, cudaStream_t stream) {
  constexpr int V = kPack<T>;
  const bool aligned = aligned16(p.qk) && aligned16(p.grad_q) && aligned16(p.grad_k) && aligned16(p.grad_qk);
  const Split split = split_of<T>(p.norm, aligned && p.qk_stride % V == 0);
  const dim3 grid(static_cast<unsigned>((p.total + kQkNormChunk - 1) / kQkNormChunk), 2);
  const Launch at{"qk_norm_backward", grid, kNormThreads, stream, 0, 1, true};
  if (packed<T>(p.norm)) return launch(at, qk_norm_backward_kernel<T, V, 1>, p, split);
  launch(at, qk_norm_backward_kernel<T, 1, 4>, p, split);
}

}  // namespace

void kv_append_launch(const KvAppend& p, void* stream) {
  by_dtype(p, stream, kv_append<float>, kv_append<bf16>, kv_append<f16>);
}

void qk_norm_launch(const QkNorm& p, void* stream) { by_dtype(p, stream, qk_norm<float>, qk_norm<bf16>, qk_norm<f16>); }

void qk_norm_backward_launch(const QkNormBackward& p, void* stream) {
  by_dtype(p, stream, qk_norm_backward<float>, qk_norm_backward<bf16>, qk_norm_backward<f16>);
}

}  // namespace flexkernels::cuda
