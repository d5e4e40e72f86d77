// Norms and rotary embedding of heads, W heads at a time, so that the sums over head_dim of W heads come out of one
// transposing reduction.
#include "../core/head_norm.h"

#include "dispatch.h"
#include "kernels.h"
#include "lanes.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {
namespace head_norm {

// W heads as float32, each padded with zeros to whole vectors
struct Heads {
  alignas(64) float x[W][kHeadNormMaxDim];
  alignas(64) float rstd[W];
};

template <typename T>
INLINE void load_heads(const T* x, int heads, int head_dim, float (*out)[kHeadNormMaxDim]) {
  for (int h = 0; h < heads; ++h) {
    for_vectors(head_dim, [&](int d, auto io) { store(out[h] + d, io.load_from(x + h * head_dim + d)); });
  }
}

// lane h = sum over d < head_dim of body(h, d, io), a vector that is 0 beyond head_dim
template <typename Body>
INLINE vf sum_heads(int heads, int head_dim, Body body) {
  vf sums[W] = {};
  for (int h = 0; h < heads; ++h) {
    vf sum = {};
    for_vectors(head_dim, [&](int d, auto io) { sum += body(h, d, io); });
    sums[h] = sum;
  }
  return sum_rows(sums);
}

INLINE vf square_root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int lane = 0; lane < W; ++lane) x[lane] = sqrtf(x[lane]);
  return x;
#endif
}

// x, less its mean for a layer norm, and rstd; x_hat = rstd * x
template <typename T>
INLINE void load_centred(const HeadNorm& p, const T* x, int heads, Heads& s) {
  const int dim = p.head_dim;
  const float size = static_cast<float>(dim);
  store(s.rstd, splat(1.0f));
  if (p.kind == kHeadNormNone) return load_heads(x, heads, dim, s.x);
  const bool layer = p.kind == kHeadNormLayer;
  const vf sums = sum_heads(heads, dim, [&](int h, int d, auto io) {
    const vf value = io.load_from(x + h * dim + d);
    store(s.x[h] + d, value);
    return layer ? value : value * value;
  });
  vf squares = sums;
  if (layer) {
    alignas(64) float mean[W];
    store(mean, sums / size);
    squares = sum_heads(heads, dim, [&](int h, int d, auto io) {
      io.store_to(s.x[h] + d, load(s.x[h] + d) - mean[h]);
      const vf value = io.load_from(s.x[h] + d);
      return value * value;
    });
  }
  store(s.rstd, 1.0f / square_root(squares / size + p.eps));
}

// out = x * rstd * weight
template <typename T>
INLINE void finish_heads(const Heads& s, int heads, int head_dim, const float* weight, T* out, int64_t out_stride) {
  for (int h = 0; h < heads; ++h) {
    const vf rstd = splat(s.rstd[h]);
    for_vectors(head_dim, [&](int d, auto io) {
      const vf x_hat = load(s.x[h] + d) * rstd;
      io.store_to(out + h * out_stride + d, weight ? x_hat * io.load_from(weight + d) : x_hat);
    });
  }
}

// turns the pairs (i, i + half) of every head by the angle whose cosine and sine are at `row`; back: by its negative
INLINE void rotate(const HeadNorm& p, float (*x)[kHeadNormMaxDim], int heads, int64_t row, bool back) {
  const int half = p.head_dim / 2;
  for_vectors(half, [&](int d, auto io) {
    const vf c = io.load_from(p.cos + row + d),
             s = back ? -io.load_from(p.sin + row + d) : io.load_from(p.sin + row + d);
    for (int h = 0; h < heads; ++h) {
      const vf low = io.load_from(x[h] + d), high = io.load_from(x[h] + half + d);
      io.store_to(x[h] + d, low * c - high * s);
      io.store_to(x[h] + half + d, high * c + low * s);
    }
  });
}

// heads of this size are normalised in registers, four at a time
constexpr int kQuadDim = 64;
constexpr int kQuadVectors = kQuadDim / W;

// every block of four lanes = the sums of the lanes of a, b, c, d
INLINE vf sum_quad(const vf (&x)[4]) {
  vf sums = add_quads(x[0], x[1], x[2], x[3]);
#if defined(__AVX512F__)
  sums += SHUFFLE(sums, sums, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  sums += SHUFFLE(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
#elif defined(__AVX2__)
  sums += SHUFFLE(sums, sums, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
  return sums;
}

// lane h of every block of four
template <int h>
INLINE vf spread(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_permute_ps(0xffff, (__m512)v, 0x55 * h);
#elif defined(__AVX2__)
  return (vf)_mm256_permute_ps((__m256)v, 0x55 * h);
#else
  return SHUFFLE(v, v, h, h, h, h);
#endif
}

template <typename T>
INLINE void put(T* p, vf v) {
  store(p, v);
}

#if defined(__AVX512BF16__)
INLINE void put(bf16* p, vf v) {
  // the instruction would flush subnormals to zero
  if (_mm512_fpclass_ps_mask((__m512)v, 0x20)) return store(p, v);
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, sizeof h);
}
#endif

// up to four heads of kQuadDim: norm, weight, no rotation; heads beyond `heads` repeat the last one and are dropped
template <bool layer, typename T>
INLINE void norm_quad(const T* x, int heads, float eps, const float* weight, T* out, int64_t out_stride) {
  vf v[4][kQuadVectors], sums[4];
#pragma GCC unroll 4
  for (int h = 0; h < 4; ++h) {
    const T* head = x + (h < heads ? h : heads - 1) * kQuadDim;
#pragma GCC unroll 16
    for (int i = 0; i < kQuadVectors; ++i) v[h][i] = load(head + i * W);
  }
  if (layer) {
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
      sums[h] = v[h][0];
#pragma GCC unroll 16
      for (int i = 1; i < kQuadVectors; ++i) sums[h] += v[h][i];
    }
    const vf means = sum_quad(sums) * (1.0f / kQuadDim);
    const vf mean[4] = {spread<0>(means), spread<1>(means), spread<2>(means), spread<3>(means)};
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
#pragma GCC unroll 16
      for (int i = 0; i < kQuadVectors; ++i) v[h][i] -= mean[h];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < 4; ++h) {
    sums[h] = v[h][0] * v[h][0];
#pragma GCC unroll 16
    for (int i = 1; i < kQuadVectors; ++i) sums[h] = fma(v[h][i], v[h][i], sums[h]);
  }
  const vf rstds = 1.0f / square_root(sum_quad(sums) * (1.0f / kQuadDim) + eps);
  const vf rstd[4] = {spread<0>(rstds), spread<1>(rstds), spread<2>(rstds), spread<3>(rstds)};
#pragma GCC unroll 4
  for (int h = 0; h < 4; ++h) {
    if (h >= heads) break;
#pragma GCC unroll 16
    for (int i = 0; i < kQuadVectors; ++i) {
      const vf x_hat = v[h][i] * rstd[h];
      put(out + h * out_stride + i * W, weight ? x_hat * load(weight + i * W) : x_hat);
    }
  }
}

template <bool layer, typename T>
INLINE void norm_quads(const T* x, int count, float eps, const float* weight, T* out, int64_t out_stride) {
  int first = 0;
  for (; first + 4 <= count; first += 4) {
    norm_quad<layer>(x + first * kQuadDim, 4, eps, weight, out + first * out_stride, out_stride);
  }
  if (first < count) {
    norm_quad<layer>(x + first * kQuadDim, count - first, eps, weight, out + first * out_stride, out_stride);
  }
}

// `count` heads in a row at x -> out, out_stride apart; row: of the rotary tables, if any
template <typename T>
void norm_heads(const HeadNorm& p, const T* x, int count, const float* weight, int64_t row, T* out, int64_t out_stride,
                Heads& s) {
  if (p.head_dim == kQuadDim && p.kind != kHeadNormNone && !p.cos) {
    return p.kind == kHeadNormLayer ? norm_quads<true>(x, count, p.eps, weight, out, out_stride)
                                    : norm_quads<false>(x, count, p.eps, weight, out, out_stride);
  }
  for (int first = 0; first < count; first += W) {
    const int heads = count - first < W ? count - first : W;
    T* to = out + first * out_stride;
    load_centred(p, x + first * p.head_dim, heads, s);
    if (!p.cos) {
      finish_heads(s, heads, p.head_dim, weight, to, out_stride);
      continue;
    }
    finish_heads(s, heads, p.head_dim, weight, s.x[0], kHeadNormMaxDim);
    rotate(p, s.x, heads, row, false);
    for (int h = 0; h < heads; ++h) {
      for_vectors(p.head_dim, [&](int d, auto io) { io.store_to(to + h * out_stride + d, load(s.x[h] + d)); });
    }
  }
}

template <typename T>
void append(const KvAppend& p, int64_t begin, int64_t end) {
  const HeadNorm& c = p.norm;
  Heads s;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.n, i = token % p.n, position = append_position(p, b, i);
    const int64_t row = c.cos ? rotary_row(c, p.cache_len[b] - p.n + i) : 0;
    const T* q = static_cast<const T*>(p.qkv) + b * p.qkv_stride[0] + i * p.qkv_stride[1];
    const T *k = q + p.heads * c.head_dim, *v = k + p.kv_heads * c.head_dim;
    T* out = static_cast<T*>(p.q) + token * p.heads * c.head_dim;
    norm_heads(c, q, p.heads, c.q_weight, row, out, c.head_dim, s);
    if (position < 0) continue;
    T* to_k = static_cast<T*>(p.k) + b * p.k_stride[0] + position * p.k_stride[2];
    norm_heads(c, k, p.kv_heads, c.k_weight, row, to_k, p.k_stride[1], s);
    T* to_v = static_cast<T*>(p.v) + b * p.v_stride[0] + position * p.v_stride[2];
    for (int h = 0; h < p.kv_heads; ++h) memcpy(to_v + h * p.v_stride[1], v + h * c.head_dim, c.head_dim * sizeof(T));
  }
}

template <typename T>
void norm_tokens(const QkNorm& p, int64_t begin, int64_t end) {
  const HeadNorm& c = p.norm;
  Heads s;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = c.cos ? rotary_row(c, p.positions[token]) : 0;
    const T* x = static_cast<const T*>(p.qk) + token * p.qk_stride;
    T* q = static_cast<T*>(p.q) + token * p.heads * c.head_dim;
    T* k = static_cast<T*>(p.k) + token * p.kv_heads * c.head_dim;
    norm_heads(c, x, p.heads, c.q_weight, row, q, c.head_dim, s);
    norm_heads(c, x + p.heads * c.head_dim, p.kv_heads, c.k_weight, row, k, c.head_dim, s);
  }
}

struct Gradients {
  Heads heads;
  alignas(64) float dy[W][kHeadNormMaxDim];
  alignas(64) float of_weight[2][kHeadNormMaxDim];
};

// dy = weight * dy (dx_hat) and x_hat -> grad of the heads at `out`
template <typename T>
INLINE void write_gradient(const HeadNorm& p, Gradients& g, int heads, T* out) {
  const int dim = p.head_dim;
  alignas(64) float mean[W] = {}, along[W] = {};
  if (p.kind == kHeadNormLayer) {
    store(mean, sum_heads(heads, dim, [&](int h, int d, auto) { return load(g.dy[h] + d); }) / static_cast<float>(dim));
  }
  if (p.kind != kHeadNormNone) {
    store(along, sum_heads(heads, dim, [&](int h, int d, auto) { return load(g.dy[h] + d) * load(g.heads.x[h] + d); }) /
                     static_cast<float>(dim));
  }
  for (int h = 0; h < heads; ++h) {
    const float rstd = g.heads.rstd[h];
    for_vectors(dim, [&](int d, auto io) {
      const vf dx = load(g.dy[h] + d) - mean[h] - load(g.heads.x[h] + d) * along[h];
      io.store_to(out + h * dim + d, rstd * dx);
    });
  }
}

template <typename T>
void norm_heads_backward(const HeadNorm& p, const T* x, const T* dz, int count, const float* weight, int64_t row,
                         float* grad_weight, T* out, Gradients& g) {
  for (int first = 0; first < count; first += W) {
    const int heads = count - first < W ? count - first : W;
    load_centred(p, x + first * p.head_dim, heads, g.heads);
    finish_heads(g.heads, heads, p.head_dim, nullptr, g.heads.x[0], kHeadNormMaxDim);
    load_heads(dz + first * p.head_dim, heads, p.head_dim, g.dy);
    if (p.cos) rotate(p, g.dy, heads, row, true);
    for (int h = 0; weight && h < heads; ++h) {
      for (int d = 0; d < p.head_dim; d += W) {
        store(grad_weight + d, fma(load(g.dy[h] + d), load(g.heads.x[h] + d), load(grad_weight + d)));
      }
    }
    for (int h = 0; weight && h < heads; ++h) {
      for_vectors(p.head_dim,
                  [&](int d, auto io) { io.store_to(g.dy[h] + d, load(g.dy[h] + d) * io.load_from(weight + d)); });
    }
    write_gradient(p, g, heads, out + first * p.head_dim);
  }
}

// the chunks [begin, end) of tokens
template <typename T>
void norm_chunks_backward(const QkNormBackward& p, int64_t begin, int64_t end) {
  const HeadNorm& c = p.norm;
  const int64_t q_size = p.heads * c.head_dim, k_size = p.kv_heads * c.head_dim;
  Gradients g;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    memset(g.of_weight, 0, sizeof g.of_weight);
    const int64_t stop = (chunk + 1) * kQkNormChunk < p.total ? (chunk + 1) * kQkNormChunk : p.total;
    for (int64_t token = chunk * kQkNormChunk; token < stop; ++token) {
      const int64_t row = c.cos ? rotary_row(c, p.positions[token]) : 0;
      const T* x = static_cast<const T*>(p.qk) + token * p.qk_stride;
      T* out = static_cast<T*>(p.grad_qk) + token * (q_size + k_size);
      const T* grad_q = static_cast<const T*>(p.grad_q) + token * q_size;
      const T* grad_k = static_cast<const T*>(p.grad_k) + token * k_size;
      norm_heads_backward(c, x, grad_q, p.heads, c.q_weight, row, g.of_weight[0], out, g);
      norm_heads_backward(c, x + q_size, grad_k, p.kv_heads, c.k_weight, row, g.of_weight[1], out + q_size, g);
    }
    if (!p.grad_weight) continue;
    float* to = p.grad_weight + chunk * 2 * c.head_dim;
    for (int i = 0; i < 2; ++i) memcpy(to + i * c.head_dim, g.of_weight[i], c.head_dim * sizeof(float));
  }
}

}  // namespace head_norm
}  // namespace

void kv_append_kernel(const KvAppend& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto element) { head_norm::append<decltype(element)>(p, begin, end); });
}

void qk_norm_kernel(const QkNorm& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto element) { head_norm::norm_tokens<decltype(element)>(p, begin, end); });
}

void qk_norm_backward_kernel(const QkNormBackward& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto element) { head_norm::norm_chunks_backward<decltype(element)>(p, begin, end); });
}

}  // namespace flexkernels::FLEXKERNELS_ISA
