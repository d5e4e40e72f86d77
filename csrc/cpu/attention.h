// What the forward and the backward of attention share: products of packed tiles, and the walk of a block of query rows
// over the keys that it sees. Internal linkage, as in simd.h.
// A product is one micro-kernel on 32-bit lanes; a lane holds a float, or with AVX-512 BF16 a pair of bfloat16 that lie
// along the summed dimension.
#pragma once

#include "../core/attention.h"

#include <math.h>

#include "dispatch.h"
#include "lanes.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kCols = 4;  // vectors of the accumulator tile
#else
constexpr int kCols = 2;
#endif
constexpr int kRows = 6;  // rows of the accumulator tile
constexpr int kPanel = kCols * W;
constexpr int kBlockRows = 64, kBlockKeys = 512;
// scores of neighbouring rows must not share a cache set
constexpr int kScoreRow = kBlockKeys + 16;
constexpr float kHidden = -__builtin_inff();

static_assert(kBlockKeys % kPanel == 0, "blocks are whole panels");

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int least(int a, int b) { return a < b ? a : b; }

inline vi load(const int32_t* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}

// the second one where either is NaN
inline vf largest(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline float largest_lane(vf v) {
#pragma GCC unroll 4
  for (int step = W / 2; step > 0; step /= 2) v = largest(__builtin_shuffle(v, lane_numbers() ^ step), v);
  return v[0];
}

inline float sum_of_lanes(vf v) {
  float sum = 0;
  for (int lane = 0; lane < W; ++lane) sum += v[lane];
  return sum;
}

// p[0] + x (p[1] + x (p[2] + ...))
template <int n>
inline vf polynomial(const float (&p)[n], vf x) {
  vf sum = splat(p[n - 1]);
#pragma GCC unroll 8
  for (int i = n - 2; i >= 0; --i) sum = fma(sum, x, splat(p[i]));
  return sum;
}

// exp(x) for x <= 0 or barely above; 0 from about -87 (AVX-512: -104) down
inline vf exponential(vf x) {
  // relative error 2e-9 on |r| <= log(2) / 2, before rounding
  static constexpr float kTerms[] = {1.0f,         1.00000003f,   0.49999994f, 0.16666431f,
                                     0.041668005f, 0.0083741973f, 0.00138436f};
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
#if defined(__AVX512F__)
  x = largest(splat(-110.0f), x);
  const vf n = (vf)_mm512_maskz_roundscale_ps(0xffff, (__m512)(x * kLog2e), _MM_FROUND_TO_NEAREST_INT);
#else
  const vi zero = x < splat(-87.0f);
  x = largest(splat(-87.0f), x);
  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  const vf n = (x * kLog2e + 12582912.0f) - 12582912.0f;
#endif
  const vf r = fma(n, splat(-kLn2Low), fma(n, splat(-kLn2High), x));
  const vf p = polynomial(kTerms, r);
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  return (vf)((vi)(p * (vf)power) & ~zero);
#endif
}

// float lanes; exact float32
struct Single {
  static constexpr int kPack = 1;
  // keys of P V summed at a time: longer sums round more, shorter ones are slower
  static constexpr int kChunkKeys = 32;
  // scores are kept in units of 1 / kUnit
  static constexpr float kUnit = 1.0f;

  static vf multiply_add(vf sum, vf a, vf b) { return fma(a, b, sum); }
  static vf exp(vf x) { return exponential(x); }

  // W lanes of a row from element `at` on, zeros past its `size` elements
  template <typename T>
  static vf lanes(const T* row, int at, int size) {
    return at + W <= size ? load(row + at) : Part{size - at}.load_from(row + at);
  }

  // one row of packed V: W columns of key 0
  template <typename T>
  static vf column(const T* const (&key)[1], int at, int size) {
    return lanes(key[0], at, size);
  }

  static void store_two(float* row, int i, vf low, vf high) {
    store(row + i * W, low);
    store(row + (i + 1) * W, high);
  }
};

#if defined(__AVX512BF16__)
// pairs of bfloat16; float32 sums, P rounded to bfloat16
struct Pair {
  static constexpr int kPack = 2;
  static constexpr int kChunkKeys = 64;
  static constexpr float kUnit = 1.44269504f;

  static vf multiply_add(vf sum, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

  // 2^x to a relative error of 3e-6: scalef takes the floor of x, the polynomial what lies above it
  static vf exp(vf x) {
    static constexpr float kTerms[] = {1.0f, 0.693044844f, 0.241280207f, 0.0522424714f, 0.0134266855f};
    const vf f = (vf)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)polynomial(kTerms, f), (__m512)x);
  }

  static vf lanes(const bf16* row, int at, int size) {
    vf v = {};
    if (2 * (at + W) <= size) {
      memcpy(&v, row + 2 * at, sizeof v);
    } else {
      memcpy(&v, row + 2 * at, (size - 2 * at) * sizeof(bf16));
    }
    return v;
  }

  // W columns of keys 0 and 1, which may be absent
  static vf column(const bf16* const (&key)[2], int at, int size) {
    vh halves[2] = {};
    for (int i = 0; i < 2; ++i) {
      if (!key[i]) continue;
      if (at + W <= size) {
        memcpy(&halves[i], key[i] + at, sizeof halves[i]);
      } else {
        memcpy(&halves[i], key[i] + at, (size - at) * sizeof(bf16));
      }
    }
    return (vf)(__builtin_convertvector(halves[0], vu) | (__builtin_convertvector(halves[1], vu) << 16));
  }

  static void store_two(float* row, int i, vf low, vf high) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    memcpy(row + i * (W / 2), &both, sizeof both);
  }
};
#endif

template <typename T>
struct MathFor {
  using Type = Single;
};
#if defined(__AVX512BF16__)
template <>
struct MathFor<bf16> {
  using Type = Pair;
};
#endif
template <typename T>
using MathOf = typename MathFor<T>::Type;

// c [R, C * W] (+)= a b in lanes of Math, b [depth, C * W]; a is [R, depth], or [depth, R] where it is transposed
template <typename Math, bool kTransposed, int R, int C>
void multiply_tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
                   bool add) {
  vf sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) sum[r][i] = vf{};
  }
  for (int64_t t = 0; t < depth; ++t) {
    vf column[C];
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) column[i] = load(b + t * b_row + i * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf value = splat(kTransposed ? a[t * a_row + r] : a[r * a_row + t]);
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) sum[r][i] = Math::multiply_add(sum[r][i], value, column[i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) {
      // short sums that are added up round less than one long sum
      float* to = c + r * c_row + i * W;
      store(to, add ? load(to) + sum[r][i] : sum[r][i]);
    }
  }
}

template <typename Math, bool kTransposed, int C>
void multiply_columns(int rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* c,
                      int64_t c_row, bool add) {
  for (int r = 0; r < rows; r += kRows, a += kTransposed ? kRows : kRows * a_row, c += kRows * c_row) {
    switch (least(rows - r, kRows)) {
      case 1:
        multiply_tile<Math, kTransposed, 1, C>(a, a_row, b, b_row, depth, c, c_row, add);
        break;
      case 2:
        multiply_tile<Math, kTransposed, 2, C>(a, a_row, b, b_row, depth, c, c_row, add);
        break;
      case 3:
        multiply_tile<Math, kTransposed, 3, C>(a, a_row, b, b_row, depth, c, c_row, add);
        break;
      case 4:
        multiply_tile<Math, kTransposed, 4, C>(a, a_row, b, b_row, depth, c, c_row, add);
        break;
      case 5:
        multiply_tile<Math, kTransposed, 5, C>(a, a_row, b, b_row, depth, c, c_row, add);
        break;
      default:
        multiply_tile<Math, kTransposed, 6, C>(a, a_row, b, b_row, depth, c, c_row, add);
    }
  }
}

// c [rows, vectors * W] (+)= a b, vectors <= kCols
template <typename Math, bool kTransposed = false>
void multiply(int rows, int vectors, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
              float* c, int64_t c_row, bool add) {
  if (vectors == kCols)
    return multiply_columns<Math, kTransposed, kCols>(rows, a, a_row, b, b_row, depth, c, c_row, add);
  if (vectors == 1) return multiply_columns<Math, kTransposed, 1>(rows, a, a_row, b, b_row, depth, c, c_row, add);
  if constexpr (kCols == 4) {
    if (vectors == 2) return multiply_columns<Math, kTransposed, 2>(rows, a, a_row, b, b_row, depth, c, c_row, add);
    multiply_columns<Math, kTransposed, 3>(rows, a, a_row, b, b_row, depth, c, c_row, add);
  }
}

template <int step>
inline void exchange(vf (&x)[W]) {
  vi low, high;
  for (int lane = 0; lane < W; ++lane) {
    low[lane] = lane & step ? W + lane - step : lane;
    high[lane] = lane & step ? W + lane : lane + step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & step) continue;
    const vf a = x[i], b = x[i + step];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + step] = __builtin_shuffle(a, b, high);
  }
}

inline void transpose(vf (&x)[W]) {
  exchange<1>(x);
  exchange<2>(x);
  if constexpr (W >= 8) exchange<4>(x);
  if constexpr (W >= 16) exchange<8>(x);
}

// a thread's buffers, in lanes; all sizes are whole vectors
struct Buffers {
  float* k;        // [panels, depth, kPanel]: of a key head of a sequence, keys in lanes
  float* weight;   // [keys] in units of 1 / kUnit
  int32_t* frame;  // [keys]
  int32_t* rank;   // [keys]
  float* q;        // [kBlockRows, depth]
  float* score;    // [kBlockRows, kScoreRow]
};

// parts of a thread's scratch, or its size where it is null
struct Room {
  char* scratch;
  int64_t lanes = 0;

  float* take(int64_t count) {
    float* here = scratch ? reinterpret_cast<float*>(scratch) + lanes : nullptr;
    lanes += round_up(count, 16);
    return here;
  }
};

inline int64_t padded_keys(const AttentionForward& p) { return round_up(p.max_keys, kPanel); }
inline int64_t padded_width(const AttentionForward& p) { return round_up(p.head_dim, W); }
// rows of a block of queries, an even number
inline int64_t block_rows(const AttentionForward& p) {
  return least(kBlockRows, static_cast<int>(round_up(p.max_rows, 2)));
}

inline void take_shared(const AttentionForward& p, Room& room, Buffers* b) {
  const int64_t keys = padded_keys(p), width = padded_width(p);
  b->k = room.take(keys * width);
  b->weight = room.take(keys);
  b->frame = reinterpret_cast<int32_t*>(room.take(keys));
  b->rank = reinterpret_cast<int32_t*>(room.take(keys));
  b->q = room.take(block_rows(p) * width);
  b->score = room.take(block_rows(p) * kScoreRow);
}

// the arguments, and what follows from them for one sequence
template <typename M, typename Element, typename B>
struct Walk {
  using Math = M;
  using T = Element;
  const AttentionForward& p;
  const B& b;
  int depth, width;        // lanes of a row of Q and K; of V and O
  float scale;             // positive, with kUnit inside
  float sign;              // Q is multiplied by it
  int32_t q_base, k_base;  // first row and first key of the sequence
  int32_t q_count, k_count;
};

template <typename T>
const T* keys_of(const AttentionForward& p, int64_t key, int kv_head) {
  return static_cast<const T*>(p.k) + key * p.k_row + kv_head * p.k_head;
}

template <typename T>
const T* values_of(const AttentionForward& p, int64_t key, int kv_head) {
  return static_cast<const T*>(p.v) + key * p.v_row + kv_head * p.v_head;
}

// the sequence's keys (or values) as panels [depth, kPanel], keys in lanes
template <typename Plan>
void pack_panels(const Plan& w, const typename Plan::T* k, int64_t k_row, float* to) {
  using Math = typename Plan::Math;
  for (int64_t key = 0; key < round_up(w.k_count, kPanel); key += W) {
    float* panel = to + key / kPanel * kPanel * w.depth + key % kPanel;
    for (int t = 0; t < w.depth; t += W) {
      vf x[W];
      for (int i = 0; i < W; ++i) {
        x[i] = key + i < w.k_count ? Math::lanes(k + (key + i) * k_row, t, w.p.head_dim) : vf{};
      }
      transpose(x);
      for (int i = 0; i < least(W, w.depth - t); ++i) store(panel + (t + i) * kPanel, x[i]);
    }
  }
}

// `count` rows, kPack of them in a lane, as [rows / kPack, width]; zeros up to `all` rows
template <typename Plan>
void pack_rows(const Plan& w, const typename Plan::T* v, int64_t v_row, int count, int64_t all, float* to) {
  using Math = typename Plan::Math;
  int64_t row = 0;
  for (; row < count; row += Math::kPack, to += w.width) {
    const typename Plan::T* rows[Math::kPack];
    for (int i = 0; i < Math::kPack; ++i) rows[i] = row + i < count ? v + (row + i) * v_row : nullptr;
    for (int t = 0; t < w.width; t += W) store(to + t, Math::column(rows, t, w.p.head_dim));
  }
  // weights are 0 there, and 0 times what is in memory might not be
  for (; row < all; row += Math::kPack, to += w.width) memset(to, 0, w.width * sizeof(float));
}

template <typename Plan>
void pack_tokens(const Plan& w) {
  const AttentionForward& p = w.p;
  const int64_t size = w.k_count * sizeof(int32_t);
  if (!p.reach) memcpy(w.b.frame, p.k_frame + w.k_base, size);
  if (!p.reach) memcpy(w.b.rank, p.k_rank + w.k_base, size);
  if (!p.key_log_weight) return;
  for (int64_t key = 0; key < round_up(w.k_count, W); ++key) {
    w.b.weight[key] = key < w.k_count ? p.key_log_weight[w.k_base + key] * Plan::Math::kUnit : 0.0f;
  }
}

// one query, times the sign of the scale
template <typename Plan>
const typename Plan::T* signed_query(const Plan& w, int64_t row, int head, typename Plan::T* room) {
  const AttentionForward& p = w.p;
  const auto* q = static_cast<const typename Plan::T*>(p.q) + row * p.q_row + head * p.q_head;
  if (w.sign == 1.0f) return q;
  for (int i = 0; i < p.head_dim; ++i) from_float(w.sign * to_float(q[i]), room + i);
  return room;
}

// the query rows of a block, of one head
struct QueryBlock {
  const int32_t* rows;
  int count, head;
};

template <typename Plan>
void pack_queries(const Plan& w, const QueryBlock& block) {
  typename Plan::T room[kAttentionMaxHeadDim];
  for (int r = 0; r < block.count; ++r) {
    const auto* q = signed_query(w, block.rows[r], block.head, room);
    float* to = w.b.q + r * w.width;
    for (int t = 0; t < w.depth; t += W) store(to + t, Plan::Math::lanes(q, t, w.p.head_dim));
  }
}

// keys [begin, end) of the sequence, all in the columns from `column` on of one score block
struct KeyBlock {
  int begin, end, column, vectors;
};

// to [rows, keys] = a [rows, depth] times the panels of these keys
template <typename Plan>
void multiply_panels(const Plan& w, const KeyBlock& keys, int rows, const float* a, const float* panels, float* to) {
  const int64_t panel_size = static_cast<int64_t>(kPanel) * w.depth;
  for (int at = keys.column, vectors = keys.vectors; vectors > 0;) {
    const int first = at % kPanel, count = least(vectors, (kPanel - first) / W);
    multiply<typename Plan::Math>(rows, count, a, w.width, panels + at / kPanel * panel_size + first, kPanel, w.depth,
                                  to + (at - keys.column), kScoreRow, false);
    at += count * W;
    vectors -= count;
  }
}

// sum [rows, width] += weights [rows, keys] times the packed rows of these keys
template <typename Plan>
void add_rows(const Plan& w, const KeyBlock& keys, int rows, const float* weights, const float* packed, float* sum) {
  constexpr int kPack = Plan::Math::kPack, kChunkKeys = Plan::Math::kChunkKeys;
  const int all = keys.vectors * W;
  for (int done = 0; done < all; done += kChunkKeys) {
    const int depth = least(kChunkKeys, all - done) / kPack;
    const float* v = packed + static_cast<int64_t>(keys.column + done) / kPack * w.width;
    for (int i = 0; i < w.width; i += kPanel) {
      multiply<typename Plan::Math>(rows, least(kPanel, w.width - i) / W, weights + done / kPack, kScoreRow, v + i,
                                    w.width, depth, sum + i, w.width, true);
    }
  }
}

// S = scale * S + w
template <typename Plan>
void weigh_scores(const Plan& w, const KeyBlock& keys, int rows) {
  const vf scale = splat(w.scale);
  for (int r = 0; r < rows; ++r) {
    float* row = w.b.score + r * kScoreRow;
    for (int i = 0; i < keys.vectors * W; i += W) {
      store(row + i, fma(load(row + i), scale, load(w.b.weight + keys.column + i)));
    }
  }
}

// -inf in the lanes outside [begin, end)
template <typename Plan>
void cut_scores(const Plan& w, const KeyBlock& keys, int rows) {
  for (int r = 0; r < rows; ++r) {
    float* row = w.b.score + r * kScoreRow;
    for (int i = 0; i < keys.begin - keys.column; ++i) row[i] = kHidden;
    for (int i = keys.end - keys.column; i < keys.vectors * W; ++i) row[i] = kHidden;
  }
}

// -inf where the mask forbids; the run may reach beyond the block
template <typename Plan>
void mask_scores(const Plan& w, const KeyBlock& keys, int begin, int end, const QueryBlock& block) {
  const AttentionForward& p = w.p;
  const int first = (begin > keys.begin ? begin : keys.begin) / W * W, last = least(end, keys.end);
  for (int r = 0; r < block.count; ++r) {
    const int64_t row = block.rows[r];
    float* score = w.b.score + r * kScoreRow - keys.column;
    if (p.reach) {
      const int seen = p.reach[row] - w.k_base;
      // whole vectors of seen keys stay as they are
      for (int key = seen > first ? seen / W * W : first; key < last; key += W) {
        store(score + key, lane_numbers() + key < seen ? load(score + key) : splat(kHidden));
      }
      continue;
    }
    for (int key = first; key < last; key += W) {
      const vi seen =
          attention_visible<vi>(p.mask, p.q_frame[row], p.q_rank[row], load(w.b.frame + key), load(w.b.rank + key));
      store(score + key, seen ? load(score + key) : splat(kHidden));
    }
  }
}

// visit(keys) with the scores of a query block, in b.score, for all that it sees, at most kBlockKeys at a time: scores
// are in units of 1 / w.scale, or of 1 / kUnit where keys are weighted, and -inf where a key is not seen
template <typename Plan, typename Visit>
void visit_span(const Plan& w, int first_run, int last_run, const QueryBlock& block, const Visit& visit) {
  const int32_t* runs = w.p.runs;
  const int span_end = runs[3 * last_run + 1] - w.k_base;
  int run = first_run;
  for (int begin = runs[3 * first_run] - w.k_base, end; begin < span_end; begin = end) {
    end = least(span_end, (begin / kBlockKeys + 1) * kBlockKeys);
    const int column = begin / W * W;
    const KeyBlock keys{begin, end, column, static_cast<int>(round_up(end, W) - column) / W};
    multiply_panels(w, keys, block.count, w.b.q, w.b.k, w.b.score);
    if (w.p.key_log_weight) weigh_scores(w, keys, block.count);
    if (begin > column || end % W) cut_scores(w, keys, block.count);
    for (; run <= last_run && runs[3 * run] - w.k_base < end; ++run) {
      const int run_end = runs[3 * run + 1] - w.k_base;
      if (!runs[3 * run + 2]) mask_scores(w, keys, runs[3 * run] - w.k_base, run_end, block);
      // the next block has the rest of it
      if (run_end > end) break;
    }
    visit(keys);
  }
}

template <typename Plan, typename Visit>
void visit_keys(const Plan& w, int64_t tile, const QueryBlock& block, const Visit& visit) {
  const int32_t *runs = w.p.runs, *ptr = w.p.ptr + tile;
  for (int first = ptr[0], last; first < ptr[1]; first = last + 1) {
    // runs that adjoin are one span
    for (last = first; last + 1 < ptr[1] && runs[3 * last + 1] == runs[3 * last + 3];) ++last;
    visit_span(w, first, last, block, visit);
  }
}

// body(block) for the query blocks of a tile and a head
template <typename Body>
void for_blocks(const AttentionForward& p, int64_t tile, int head, const Body& body) {
  const int32_t* rows = p.rows + tile * p.tile_rows;
  for (int first = 0; first < p.rows_of(tile); first += kBlockRows) {
    body(QueryBlock{rows + first, least(p.rows_of(tile) - first, kBlockRows), head});
  }
}

template <typename Math, typename T, typename B>
Walk<Math, T, B> walk_sequence(const AttentionForward& p, const B& b, int sequence) {
  const int32_t *cu_q = p.cu_seqlens_q + sequence, *cu_k = p.cu_seqlens_k + sequence;
  const float scale = p.softmax_scale;
  return {p, b, static_cast<int>(round_up(p.head_dim, Math::kPack)) / Math::kPack,
          static_cast<int>(round_up(p.head_dim, W)),
          // -inf times the scale must stay -inf
          scale == 0.0f ? 1.0f : fabsf(scale) * Math::kUnit,
          scale > 0.0f   ? 1.0f
          : scale < 0.0f ? -1.0f
                         : 0.0f,
          cu_q[0], cu_k[0], cu_q[1] - cu_q[0], cu_k[1] - cu_k[0]};
}

}  // namespace
}  // namespace flexkernels::FLEXKERNELS_ISA
