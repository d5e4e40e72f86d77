// Decoding on vectors: a unit of work is one split of one kv head for a tile of query rows. Whoever finishes a tile's
// last split merges its splits, always in their order: the sums of the others are seen, since each counted itself after
// it had written them.
#include "../core/decode.h"

#include "dispatch.h"
#include "kernels.h"
#include "lanes.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {
namespace decode {

// query rows that share one pass over keys and values
constexpr int kTile = kDecodeTile;
// rows whose scores share what is loaded of four keys
constexpr int kDotRows = W == 16 ? 4 : 3;
// rows and vectors of the sums that stay in registers; of a row alone, kLoneVectors
constexpr int kSumRows = 4;
constexpr int kSumVectors = W == 16 ? 4 : 2;
constexpr int kLoneVectors = 4;
// bytes between a load and what is asked for meanwhile
constexpr int kAhead = 4096;

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

// the same for R rows and W keys, four keys at a time, whole vectors of both
template <int R>
INLINE void dot_rows(const float (*q)[kDecodeMaxHeadDim], const float* k, int64_t stride, int wide, vf (&dots)[R]) {
  vf quads[R][W / 4];
#pragma GCC unroll 4
  for (int quad = 0; quad < W / 4; ++quad) {
    const float* keys = k + 4 * quad * stride;
    vf sums[R][4] = {};
    for (int d = 0; d < wide; d += W) {
      vf x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load(q[r] + d);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vf key = load(keys + j * stride + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r][j] = fma(x[r], key, sums[r][j]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) quads[r][quad] = add_quads(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) dots[r] = join_quads(quads[r]);
}

// keys that are vectors of float32 already
INLINE const float* as_they_are(const float* keys, int count, int head_dim) {
  return count == W && head_dim % W == 0 ? keys : nullptr;
}

template <typename T>
INLINE const float* as_they_are(const T*, int, int) {
  return nullptr;
}

// W keys in float32, whole vectors of each: themselves where they are that, else a copy
template <typename T>
INLINE const float* stage(const T* keys, int64_t* stride, int count, int head_dim, Scratch& s) {
  if (const float* same = as_they_are(keys, count, head_dim)) return same;
  for (int i = 0; i < count; ++i) {
    for_vectors(head_dim, [&](int d, auto io) { store(s.keys[i] + d, io.load_from(keys + i * *stride + d)); });
  }
  *stride = kDecodeMaxHeadDim;
  return s.keys[0];
}

template <int R>
INLINE void score_rows(const DecodeAttention& p, const float* keys, int64_t stride, vf add, int r, int j, Scratch& s) {
  vf dots[R];
  dot_rows<R>(s.q + r, keys, stride, round_up(p.head_dim), dots);
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) store(s.p[r + i] + j, p.scale * dots[i] + add);
}

// p[r][j] = scores of the unit's keys
template <typename T>
void score(const DecodeAttention& p, const Unit& u, Scratch& s) {
  const T* k = static_cast<const T*>(p.k) + u.b * p.k_stride[0] + u.kv_head * p.k_stride[1] + u.first * p.k_stride[2];
  const float* weight = p.key_log_weight ? p.key_log_weight + u.b * p.max_len + u.first : nullptr;
  for (int j = 0; j < u.keys; j += W) {
    const int count = u.keys - j < W ? u.keys - j : W;
    int64_t stride = p.k_stride[2];
    const T* keys = k + j * stride;
    const vf add = !weight ? vf{} : count == W ? load(weight + j) : Part{count}.load_from(weight + j);
    if (u.rows == 1) {
      const vf dots = count == W ? dot_all_keys(s.q[0], keys, stride, p.head_dim)
                                 : dot_keys(s.q[0], keys, stride, count, p.head_dim);
      store(s.p[0] + j, p.scale * dots + add);
      continue;
    }
    const float* staged = stage(keys, &stride, count, p.head_dim, s);
    int r = 0;
    for (; r + kDotRows <= u.rows; r += kDotRows) score_rows<kDotRows>(p, staged, stride, add, r, j, s);
    for (; r + 2 <= u.rows; r += 2) score_rows<2>(p, staged, stride, add, r, j, s);
    if (r < u.rows) score_rows<1>(p, staged, stride, add, r, j, s);
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
    if (R == 1 && N > 1) {
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
  constexpr int N = R == 1 ? kLoneVectors : kSumVectors;
  int d = 0;
  for (; d + N * W <= head_dim; d += N * W) weigh<R, N>(p, v + d, stride, keys, out + d, head_dim, Full{});
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

// where a row's sums of a split are kept: [b, kv_head, split, row]
int64_t slot(const DecodeAttention& p, int64_t b, int kv_head, int split) {
  return ((b * p.kv_heads + kv_head) * p.splits + split) * p.rows;
}

float* extremes_of(const DecodeAttention& p) {
  return p.partial ? p.partial + p.batch * p.kv_heads * p.splits * p.rows * p.head_dim : nullptr;
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

// the units [begin, end), counted over sequences, kv heads, the splits that hold keys, and tiles of rows, which read
// the same keys
template <typename T>
void attend_units(const DecodeAttention& p, int64_t begin, int64_t end) {
  Scratch s;
  if (p.rows > 1) memset(s.keys, 0, sizeof s.keys);
  const int tiles = decode_tiles(p);
  int64_t first = 0;
  for (int64_t b = 0; b < p.batch && first < end; ++b) {
    const int64_t length = decode_length(p, b);
    const int splits = decode_splits(length);
    const int64_t units = static_cast<int64_t>(p.kv_heads) * tiles * splits;
    const int64_t from = begin > first ? begin - first : 0, to = end - first < units ? end - first : units;
    for (int64_t i = from; i < to; ++i) {
      const int tile = static_cast<int>(i % tiles), split = static_cast<int>(i / tiles % splits);
      Unit u{};
      u.b = b;
      u.kv_head = static_cast<int>(i / tiles / splits);
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
      if (u.whole) continue;
      int32_t* done = p.done + (b * p.kv_heads + u.kv_head) * tiles + tile;
      if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) < splits) continue;
      for (int r = 0; r < u.rows; ++r) merge_row<T>(p, b, u.kv_head, u.r0 + r, splits);
    }
    first += units;
  }
}

}  // namespace decode
}  // namespace

void decode_attention_kernel(const DecodeAttention& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto element) { decode::attend_units<decltype(element)>(p, begin, end); });
}

}  // namespace flexkernels::FLEXKERNELS_ISA
