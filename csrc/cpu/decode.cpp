// Decoding on vectors. Attention: a unit of work is one split of one kv head for a tile of query rows; sums of a row
// over its splits are merged in order by decode_merge_kernel. Norms: W heads at a time, so that the sums over
// head_dim of W heads come out of one transposing reduction.
#include "../core/decode.h"

#include "kernels.h"
#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {
namespace decode {

// query rows that share one pass over keys and values
constexpr int kTile = 8;
// rows and vectors of the sums that stay in registers
constexpr int kSumRows = W == 16 ? 4 : 2;
constexpr int kSumVectors = 4;
// bytes between a load and what is asked for meanwhile
constexpr int kAhead = 4096;

#define INLINE inline __attribute__((always_inline))

// lanes of a and b by number: 0 .. W-1 and W .. 2W-1
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

// sums of neighbouring lanes, within each block of four
INLINE vf add_pairs(vf a, vf b) {
#if defined(__AVX512F__)
  return SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif defined(__AVX2__)
  return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
  return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

INLINE vf add_quads(vf a, vf b, vf c, vf d) { return add_pairs(add_pairs(a, b), add_pairs(c, d)); }

// lane j = sum of the lanes of rows[j]
INLINE vf sum_rows(const vf (&rows)[W]) {
#if defined(__AVX512F__)
  const vf x = add_quads(rows[0], rows[1], rows[2], rows[3]), y = add_quads(rows[4], rows[5], rows[6], rows[7]);
  const vf z = add_quads(rows[8], rows[9], rows[10], rows[11]), w = add_quads(rows[12], rows[13], rows[14], rows[15]);
  const vf xy = SHUFFLE(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                SHUFFLE(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  const vf zw = SHUFFLE(z, w, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                SHUFFLE(z, w, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  return SHUFFLE(xy, zw, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         SHUFFLE(xy, zw, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif defined(__AVX2__)
  const vf x = add_quads(rows[0], rows[1], rows[2], rows[3]), y = add_quads(rows[4], rows[5], rows[6], rows[7]);
  return SHUFFLE(x, y, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return add_quads(rows[0], rows[1], rows[2], rows[3]);
#endif
}

INLINE vf splat(float x) { return x - vf{}; }

INLINE vi lane_numbers() {
  vi lanes;
  for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
  return lanes;
}

// e^x for x <= 0 within 2 units in the last place; 0 below -87; NaN stays NaN
INLINE vf exp_negative(vf x) {
  const vf magic = splat(12582912.0f), shifted = fma(x, splat(1.44269504f), magic), n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf y = splat(1.0f / 720);
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1.0f));
  y = fma(y, r, splat(1.0f));
  // 2^n: the low bits of `shifted` hold n
  const vf power = (vf)(((vi)shifted << 23) + 0x3f800000);
  return x < splat(-87.0f) ? vf{} : y * power;
}

constexpr int round_up(int n) { return (n + W - 1) / W * W; }

// body(i, io) over the elements [0, n): whole vectors, then the rest
template <typename Body>
INLINE void for_vectors(int n, Body body) {
  int i = 0;
  for (; i + W <= n; i += W) body(i, Full{});
  if (i < n) body(i, Part{n - i});
}

// --- attention

// one unit's place: rows r0 .. r0 + rows of a kv head, keys first .. first + keys of sequence b
struct Unit {
  int64_t b, first;
  int kv_head, r0, rows, keys;
  bool whole;       // the sequence has no other split
  float* partial;   // [rows, head_dim], then of all units [rows, 2]
  float* extremes;  // [rows, 2]: maximum, total
};

struct Scratch {
  alignas(64) float q[kTile][kDecodeMaxHeadDim];
  alignas(64) float keys[W][kDecodeMaxHeadDim];
  alignas(64) float p[kTile][kDecodeSplit];
};

// the scores of the `count` keys at k (at least 1), W at most; rows beyond count repeat the last one
template <typename K>
INLINE vf dot_keys(const float* q, const K* k, int64_t stride, int count, int head_dim) {
  vf sums[W] = {};
  const K* rows[W];
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) rows[j] = k + (j < count ? j : count - 1) * stride;
  for_vectors(head_dim, [&](int d, auto io) {
    const vf x = load(q + d);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) sums[j] = fma(x, io.load_from(rows[j] + d), sums[j]);
  });
  return sum_rows(sums);
}

// the same for W keys; meanwhile the next W are asked for
template <typename K>
INLINE vf dot_all_keys(const float* q, const K* k, int64_t stride, int head_dim) {
  vf sums[W] = {};
  for_vectors(head_dim, [&](int d, auto io) {
    const vf x = load(q + d);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) {
      __builtin_prefetch(k + (j + W) * stride + d);
      sums[j] = fma(x, io.load_from(k + j * stride + d), sums[j]);
    }
  });
  return sum_rows(sums);
}

// p[r][j] = scores of the unit's keys
template <typename T>
void score(const DecodeAttention& p, const Unit& u, Scratch& s) {
  const T* k = static_cast<const T*>(p.k) + u.b * p.k_stride[0] + u.kv_head * p.k_stride[1] + u.first * p.k_stride[2];
  const float* weight = p.key_log_weight ? p.key_log_weight + u.b * p.max_len + u.first : nullptr;
  const int64_t stride = p.k_stride[2];
  const int wide = round_up(p.head_dim);
  for (int j = 0; j < u.keys; j += W) {
    const int count = u.keys - j < W ? u.keys - j : W;
    const T* keys = k + j * stride;
    const vf add = !weight ? vf{} : count == W ? load(weight + j) : Part{count}.load_from(weight + j);
    const bool staged = u.rows > 1;
    if (staged) {
      for (int i = 0; i < count; ++i) {
        for_vectors(p.head_dim, [&](int d, auto io) { store(s.keys[i] + d, io.load_from(keys + i * stride + d)); });
      }
    }
    for (int r = 0; r < u.rows; ++r) {
      const vf dots = staged       ? dot_all_keys(s.q[r], s.keys[0], kDecodeMaxHeadDim, wide)
                      : count == W ? dot_all_keys(s.q[r], keys, stride, p.head_dim)
                                   : dot_keys(s.q[r], keys, stride, count, p.head_dim);
      store(s.p[r] + j, p.scale * dots + add);
    }
  }
}

// turns row r's scores into exp(score - maximum), and its unseen keys into 0
void soften(const DecodeAttention& p, const Unit& u, int r, int64_t length, float* row, float* extremes) {
  const int64_t visible = decode_visible(p, length, u.r0 + r) - u.first;
  const int count = visible < 0 ? 0 : visible > u.keys ? u.keys : static_cast<int>(visible);
  const vi lanes = lane_numbers();
  vf top = splat(-INFINITY);
  for (int j = 0; j < u.keys; j += W) {
    const vf x = lanes < (vi{} + (count - j)) ? load(row + j) : splat(-INFINITY);
    store(row + j, x);
    top = x > top ? x : top;
  }
  float maximum = -INFINITY;
  for (int lane = 0; lane < W; ++lane) maximum = top[lane] > maximum ? top[lane] : maximum;
  const vf shift = splat(maximum == -INFINITY ? 0.0f : maximum);
  vf sum = {};
  for (int j = 0; j < u.keys; j += W) {
    const vf x = exp_negative(load(row + j) - shift);
    store(row + j, x);
    sum += x;
  }
  float total = 0;
  for (int lane = 0; lane < W; ++lane) total += sum[lane];
  extremes[0] = maximum;
  extremes[1] = total;
}

// out[r][d ..] = sum over keys of p[r][j] v[j][d ..]
template <int R, int N, typename T, typename IO>
INLINE void weigh(const float (*p)[kDecodeSplit], const T* v, int64_t stride, int keys, float* out, int out_stride,
                  IO io) {
  vf sums[R][N] = {};
  for (int j = 0; j < keys; ++j) {
    vf x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) x[n] = io.load_from(v + j * stride + n * W);
    if (N > 1) {
      __builtin_prefetch(reinterpret_cast<const char*>(v + j * stride) + kAhead);
      if (sizeof(vf) * N * sizeof(T) / 4 > 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(v + j * stride) + kAhead + 64);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf weight = splat(p[r][j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[r][n] = fma(weight, x[n], sums[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) io.store_to(out + r * out_stride + n * W, sums[r][n]);
  }
}

template <int R, typename T>
void weigh_rows(const float (*p)[kDecodeSplit], const T* v, int64_t stride, int keys, float* out, int head_dim) {
  int d = 0;
  for (; d + kSumVectors * W <= head_dim; d += kSumVectors * W) {
    weigh<R, kSumVectors>(p, v + d, stride, keys, out + d, head_dim, Full{});
  }
  for (; d + W <= head_dim; d += W) weigh<R, 1>(p, v + d, stride, keys, out + d, head_dim, Full{});
  if (d < head_dim) weigh<R, 1>(p, v + d, stride, keys, out + d, head_dim, Part{head_dim - d});
}

template <typename T>
void weigh_values(const DecodeAttention& p, const Unit& u, const Scratch& s, float* out) {
  const T* v = static_cast<const T*>(p.v) + u.b * p.v_stride[0] + u.kv_head * p.v_stride[1] + u.first * p.v_stride[2];
  int r = 0;
  for (; r + kSumRows <= u.rows; r += kSumRows) {
    weigh_rows<kSumRows>(s.p + r, v, p.v_stride[2], u.keys, out + r * p.head_dim, p.head_dim);
  }
  for (; r < u.rows; ++r) weigh_rows<1>(s.p + r, v, p.v_stride[2], u.keys, out + r * p.head_dim, p.head_dim);
}

// out = sums / total; no key at all: 0
template <typename T>
void write_row(const DecodeAttention& p, int64_t b, int kv_head, int r, const float* sums, float maximum, float total) {
  const int64_t at = decode_out(p, b, kv_head, r);
  T* out = static_cast<T*>(p.out) + at * p.head_dim;
  for_vectors(p.head_dim,
              [&](int d, auto io) { io.store_to(out + d, total == 0 ? vf{} : io.load_from(sums + d) / total); });
  if (p.lse) p.lse[at] = decode_lse(maximum, total);
}

template <typename T>
void attend(const DecodeAttention& p, const Unit& u, Scratch& s) {
  const int wide = round_up(p.head_dim);
  for (int r = 0; r < u.rows; ++r) {
    const T* q = static_cast<const T*>(p.q) + decode_query(p, u.b, u.kv_head, u.r0 + r);
    store(s.q[r] + wide - W, vf{});
    for_vectors(p.head_dim, [&](int d, auto io) { store(s.q[r] + d, io.load_from(q + d)); });
  }
  score<T>(p, u, s);
  const int64_t length = decode_length(p, u.b);
  alignas(64) float sums[kTile * kDecodeMaxHeadDim];
  float extremes[2 * kTile];
  for (int r = 0; r < u.rows; ++r) soften(p, u, r, length, s.p[r], extremes + 2 * r);
  weigh_values<T>(p, u, s, u.whole ? sums : u.partial);
  if (!u.whole) memcpy(u.extremes, extremes, 2 * u.rows * sizeof(float));
  for (int r = 0; u.whole && r < u.rows; ++r) {
    write_row<T>(p, u.b, u.kv_head, u.r0 + r, sums + r * p.head_dim, extremes[2 * r], extremes[2 * r + 1]);
  }
}

int splits_of(int64_t length) { return length == 0 ? 1 : static_cast<int>((length + kDecodeSplit - 1) / kDecodeSplit); }

// where a row's sums of a split are kept: [b, kv_head, split, row]
int64_t slot(const DecodeAttention& p, int64_t b, int kv_head, int split) {
  return ((b * p.kv_heads + kv_head) * p.splits + split) * p.rows;
}

float* extremes_of(const DecodeAttention& p) {
  return p.partial ? p.partial + p.batch * p.kv_heads * p.splits * p.rows * p.head_dim : nullptr;
}

// the units [begin, end), counted over sequences, kv heads, tiles of rows, and the splits that hold keys
template <typename T>
void attend_units(const DecodeAttention& p, int64_t begin, int64_t end) {
  Scratch s;
  memset(s.keys, 0, sizeof s.keys);
  const int tiles = (p.rows + kTile - 1) / kTile;
  int64_t first = 0;
  for (int64_t b = 0; b < p.batch && first < end; ++b) {
    const int64_t length = decode_length(p, b);
    const int splits = splits_of(length);
    const int64_t units = static_cast<int64_t>(p.kv_heads) * tiles * splits;
    const int64_t from = begin > first ? begin - first : 0, to = end - first < units ? end - first : units;
    for (int64_t i = from; i < to; ++i) {
      const int split = static_cast<int>(i % splits), tile = static_cast<int>(i / splits % tiles);
      Unit u{};
      u.b = b;
      u.kv_head = static_cast<int>(i / splits / tiles);
      u.first = static_cast<int64_t>(split) * kDecodeSplit;
      u.keys = static_cast<int>(length - u.first < kDecodeSplit ? length - u.first : kDecodeSplit);
      u.r0 = tile * kTile;
      u.rows = p.rows - u.r0 < kTile ? p.rows - u.r0 : kTile;
      u.whole = splits == 1;
      if (!u.whole) {
        const int64_t at = slot(p, b, u.kv_head, split) + u.r0;
        u.partial = p.partial + at * p.head_dim;
        u.extremes = extremes_of(p) + 2 * at;
      }
      attend<T>(p, u, s);
    }
    first += units;
  }
}

template <typename T>
void merge_row(const DecodeAttention& p, int64_t b, int kv_head, int r, int splits) {
  const float* extremes = extremes_of(p);
  float maximum = -INFINITY, total = 0;
  for (int split = 0; split < splits; ++split) {
    const float other = extremes[2 * (slot(p, b, kv_head, split) + r)];
    maximum = other > maximum ? other : maximum;
  }
  alignas(64) float sums[kDecodeMaxHeadDim] = {};
  for (int split = 0; split < splits; ++split) {
    const int64_t at = slot(p, b, kv_head, split) + r;
    const float share = decode_exp(extremes[2 * at], maximum);
    total += share * extremes[2 * at + 1];
    const float* partial = p.partial + at * p.head_dim;
    for_vectors(p.head_dim,
                [&](int d, auto io) { store(sums + d, fma(splat(share), io.load_from(partial + d), load(sums + d))); });
  }
  write_row<T>(p, b, kv_head, r, sums, maximum, total);
}

template <typename T>
void merge_rows(const DecodeAttention& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / p.kv_heads / p.rows;
    const int splits = splits_of(decode_length(p, b));
    if (splits > 1) {
      merge_row<T>(p, b, static_cast<int>(i / p.rows % p.kv_heads), static_cast<int>(i % p.rows), splits);
    }
  }
}

// --- norms and rotary embedding

// W heads as float32, each padded with zeros to whole vectors
struct Heads {
  alignas(64) float x[W][kDecodeMaxHeadDim];
  alignas(64) float rstd[W];
};

template <typename T>
INLINE void load_heads(const T* x, int heads, int head_dim, float (*out)[kDecodeMaxHeadDim]) {
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
INLINE void rotate(const HeadNorm& p, float (*x)[kDecodeMaxHeadDim], int heads, int64_t row, bool back) {
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
    finish_heads(s, heads, p.head_dim, weight, s.x[0], kDecodeMaxHeadDim);
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
  alignas(64) float dy[W][kDecodeMaxHeadDim];
  alignas(64) float of_weight[2][kDecodeMaxHeadDim];
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
    finish_heads(g.heads, heads, p.head_dim, nullptr, g.heads.x[0], kDecodeMaxHeadDim);
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

template <typename Args>
void by_dtype(const Args& p, int64_t begin, int64_t end, void (*f32)(const Args&, int64_t, int64_t),
              void (*b16)(const Args&, int64_t, int64_t), void (*h16)(const Args&, int64_t, int64_t)) {
  (p.dtype == Dtype::f32 ? f32 : p.dtype == Dtype::bf16 ? b16 : h16)(p, begin, end);
}

#undef SHUFFLE
#undef INLINE

}  // namespace decode
}  // namespace

void decode_attention_kernel(const DecodeAttention& p, int64_t begin, int64_t end) {
  decode::by_dtype(p, begin, end, decode::attend_units<float>, decode::attend_units<bf16>, decode::attend_units<f16>);
}

void decode_merge_kernel(const DecodeAttention& p, int64_t begin, int64_t end) {
  decode::by_dtype(p, begin, end, decode::merge_rows<float>, decode::merge_rows<bf16>, decode::merge_rows<f16>);
}

void kv_append_kernel(const KvAppend& p, int64_t begin, int64_t end) {
  decode::by_dtype(p, begin, end, decode::append<float>, decode::append<bf16>, decode::append<f16>);
}

void qk_norm_kernel(const QkNorm& p, int64_t begin, int64_t end) {
  decode::by_dtype(p, begin, end, decode::norm_tokens<float>, decode::norm_tokens<bf16>, decode::norm_tokens<f16>);
}

void qk_norm_backward_kernel(const QkNormBackward& p, int64_t begin, int64_t end) {
  decode::by_dtype(p, begin, end, decode::norm_chunks_backward<float>, decode::norm_chunks_backward<bf16>,
                   decode::norm_chunks_backward<f16>);
}

}  // namespace flexkernels::FLEXKERNELS_ISA
