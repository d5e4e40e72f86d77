// FSQ on vectors: W rows of [rows, dims] are exactly `dims` vectors, and lane l of vector v always holds dimension
// (v * W + l) % dims, so thresholds, halves and id weights are laid out once per call in that pattern.
#include "../core/fsq.h"

#include "dispatch.h"
#include "kernels.h"
#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

// level / half as the division rounds it: a product with the reciprocal, corrected by its remainder (Markstein)
inline vf quotient(vf level, vf half, vf reciprocal) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
  const vf near = level * reciprocal;
  return fma(fma(-near, half, level), reciprocal, near);
#else
  (void)reciprocal;
  return level / half;
#endif
}

struct QuantizeTables {
  vf thresholds[kFsqMaxDims][kFsqLinearCount];
  vf half[kFsqMaxDims], reciprocal[kFsqMaxDims];
  vi basis32[kFsqMaxDims];
  vl basis[kFsqMaxDims][2];
};

// up to 8 levels, as nearly all codebooks have
constexpr int kFewThresholds = 7;

void fill_tables(const FsqQuantize& p, QuantizeTables& t) {
  for (int v = 0; v < p.dims; ++v) {
    for (int lane = 0; lane < W; ++lane) {
      const int dim = (v * W + lane) % p.dims;
      t.half[v][lane] = static_cast<float>(p.half[dim]);
      t.reciprocal[v][lane] = 1.0f / t.half[v][lane];
      t.basis32[v][lane] = static_cast<int32_t>(p.basis[dim]);
      t.basis[v][lane / (W / 2)][lane % (W / 2)] = p.basis[dim];
      if (p.width > kFsqLinearCount) continue;
      for (int k = 0; k < p.width; ++k) t.thresholds[v][k][lane] = p.thresholds[dim * p.width + k];
      for (int k = p.width; k < kFewThresholds; ++k) t.thresholds[v][k][lane] = __builtin_inff();
    }
  }
}

// kFew: at most kFewThresholds, so that the count unrolls; those beyond p.width are +inf and count nothing
template <bool kFew>
inline vi count_levels(const FsqQuantize& p, const QuantizeTables& t, int v, vf z) {
  vi level = {};
  if (kFew) {
#pragma GCC unroll 7
    for (int k = 0; k < kFewThresholds; ++k) level -= z > t.thresholds[v][k];
  } else if (p.width <= kFsqLinearCount) {
    for (int k = 0; k < p.width; ++k) level -= z > t.thresholds[v][k];
  } else {
    for (int lane = 0; lane < W; ++lane) {
      const int dim = (v * W + lane) % p.dims;
      level[lane] = fsq_level(p.thresholds + static_cast<int64_t>(dim) * p.width, p.width, z[lane]);
    }
  }
  return level;
}

inline vf codes_of(const FsqQuantize& p, const QuantizeTables& t, int v, vi level) {
  if (!p.table) return quotient(__builtin_convertvector(level, vf) - t.half[v], t.half[v], t.reciprocal[v]);
  vf code;
  for (int lane = 0; lane < W; ++lane) code[lane] = p.table[(v * W + lane) % p.dims * (p.width + 1) + level[lane]];
  return code;
}

// one tile of W rows; `weighted` receives level * basis of every element, in Word
template <typename T, typename Word, bool kFew>
inline void quantize_tile(const FsqQuantize& p, const QuantizeTables& t, const T* z, T* codes, Word* weighted) {
  for (int v = 0; v < p.dims; ++v) {
    const vi level = count_levels<kFew>(p, t, v, load(z + v * W));
    if (codes) store(codes + v * W, codes_of(p, t, v, level));
    if constexpr (sizeof(Word) == 4) {
      const vi product = level * t.basis32[v];
      memcpy(weighted + v * W, &product, sizeof product);
    } else {
      vl low, high;
      widen<vl, vi_half>(level, &low, &high);
      low *= t.basis[v][0];
      high *= t.basis[v][1];
      memcpy(weighted + v * W, &low, sizeof low);
      memcpy(weighted + v * W + W / 2, &high, sizeof high);
    }
  }
}

// ids[r] = sum of weighted[r, :]; D is known so that the sum unrolls
template <typename Word, typename Id, int D>
inline void sum_rows(const Word* weighted, int rows, Id* ids) {
  for (int r = 0; r < rows; ++r, weighted += D) {
    if constexpr (sizeof(Word) == 4 && D % 2 == 0) {
      // two terms at a time: neither half of the sum reaches 2^31
      uint64_t pairs[D / 2], sum = 0;
      memcpy(pairs, weighted, sizeof pairs);
#pragma GCC unroll 8
      for (int d = 0; d < D / 2; ++d) sum += pairs[d];
      ids[r] = static_cast<Id>(static_cast<uint32_t>(sum + (sum >> 32)));
    } else {
      Word id = weighted[0];
#pragma GCC unroll 16
      for (int d = 1; d < D; ++d) id += weighted[d];
      ids[r] = static_cast<Id>(id);
    }
  }
}

#if defined(__AVX512F__)
// the same for six dimensions and a tile of W rows, by shuffles: sums of neighbours, then of three of those
inline __m512i pick(__m512i a, __m512i b, int first, int step, int from) {
  // lane l takes element first + step * l of a and b, counted from `from`
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i index =
      _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(step)), _mm512_set1_epi32(first - from));
  return _mm512_permutex2var_epi32(a, index, b);
}

inline __m512i sum_rows_of_six(const int32_t* weighted) {
  __m512i pairs[3];
  for (int v = 0; v < 3; ++v) {
    const __m512i a = _mm512_loadu_si512(weighted + 32 * v), b = _mm512_loadu_si512(weighted + 32 * v + 16);
    pairs[v] = _mm512_add_epi32(pick(a, b, 0, 2, 0), pick(a, b, 1, 2, 0));
  }
  __m512i sum = _mm512_setzero_si512();
  for (int k = 0; k < 3; ++k) {
    // elements 3 l + k of the 48: those below 32 from the first two vectors, the others from the third
    const __m512i low = pick(pairs[0], pairs[1], k, 3, 0), high = pick(pairs[1], pairs[2], k, 3, 16);
    const __mmask16 beyond = static_cast<__mmask16>(0xffffu << ((32 - k + 2) / 3));
    sum = _mm512_add_epi32(sum, _mm512_mask_blend_epi32(beyond, low, high));
  }
  return sum;
}

inline void store_ids(__m512i id, int32_t* ids) { _mm512_storeu_si512(ids, id); }

inline void store_ids(__m512i id, uint16_t* ids) {
  _mm256_storeu_si256((__m256i*)ids, _mm512_maskz_cvtepi32_epi16(0xffff, id));
}

inline void store_ids(__m512i id, int64_t* ids) {
  _mm512_storeu_si512(ids, _mm512_maskz_cvtepi32_epi64(0xff, _mm512_maskz_extracti64x4_epi64(0xf, id, 0)));
  _mm512_storeu_si512(ids + 8, _mm512_maskz_cvtepi32_epi64(0xff, _mm512_maskz_extracti64x4_epi64(0xf, id, 1)));
}

template <typename Id>
inline void sum_tile_of_six(const int32_t* weighted, Id* ids) {
  store_ids(sum_rows_of_six(weighted), ids);
}
#elif defined(__AVX2__)
// the same for six dimensions and four rows, an id in each 64-bit lane: a row is three pairs, and the blends bring the
// first, second and third pair of all rows into one vector each
inline __m256i sum_rows_of_six(const int32_t* weighted) {
  const __m256i* from = (const __m256i*)weighted;
  const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1), c = _mm256_loadu_si256(from + 2);
  constexpr int kLane1 = 0x0c, kLane2 = 0x30;
  const __m256i first = _mm256_blend_epi32(_mm256_blend_epi32(a, b, kLane2), c, kLane1);
  const __m256i second = _mm256_blend_epi32(_mm256_blend_epi32(b, a, kLane1), c, kLane2);
  const __m256i third = _mm256_blend_epi32(_mm256_blend_epi32(c, b, kLane1), a, kLane2);
  const __m256i pair = _mm256_add_epi32(_mm256_permute4x64_epi64(first, _MM_SHUFFLE(1, 2, 3, 0)),
                                        _mm256_add_epi32(_mm256_permute4x64_epi64(second, _MM_SHUFFLE(2, 3, 0, 1)),
                                                         _mm256_permute4x64_epi64(third, _MM_SHUFFLE(3, 0, 1, 2))));
  const __m256i low = _mm256_set1_epi64x(0xffffffff);
  return _mm256_and_si256(_mm256_add_epi32(pair, _mm256_srli_epi64(pair, 32)), low);
}

inline void store_ids(__m256i low, __m256i high, int64_t* ids) {
  _mm256_storeu_si256((__m256i*)ids, low);
  _mm256_storeu_si256((__m256i*)(ids + 4), high);
}

inline void store_ids(__m256i low, __m256i high, int32_t* ids) {
  // 0 2 1 3 of the 64-bit lanes, since the shuffle works on halves
  const __m256 halves = _mm256_shuffle_ps((__m256)low, (__m256)high, _MM_SHUFFLE(2, 0, 2, 0));
  _mm256_storeu_si256((__m256i*)ids, _mm256_permute4x64_epi64((__m256i)halves, _MM_SHUFFLE(3, 1, 2, 0)));
}

inline void store_ids(__m256i low, __m256i high, uint16_t* ids) {
  vu id;
  store_ids(low, high, (int32_t*)&id);
  const vh words = narrow(id);
  memcpy(ids, &words, sizeof words);
}

template <typename Id>
inline void sum_tile_of_six(const int32_t* weighted, Id* ids) {
  store_ids(sum_rows_of_six(weighted), sum_rows_of_six(weighted + 24), ids);
}
#endif

template <typename Word, typename Id, int D = kFsqMaxDims>
inline void sum_rows_of(int dims, const Word* weighted, int rows, Id* ids) {
#if defined(__AVX2__)
  if constexpr (sizeof(Word) == 4 && D == kFsqMaxDims) {
    if (dims == 6 && rows == W) return sum_tile_of_six(weighted, ids);
  }
#endif
  if (dims == D) return sum_rows<Word, Id, D>(weighted, rows, ids);
  if constexpr (D > 1) sum_rows_of<Word, Id, D - 1>(dims, weighted, rows, ids);
}

template <typename T, typename Word, bool kFew>
void quantize_rows(const FsqQuantize& args, int64_t begin, int64_t end) {
  // a copy of our own: the compiler sees that stores cannot change it
  const FsqQuantize p = args;
  QuantizeTables t;
  fill_tables(p, t);
  const T* z = static_cast<const T*>(p.z);
  T* codes = static_cast<T*>(p.codes);
  Word weighted[W * kFsqMaxDims];
  for (int64_t row = begin; row < end; row += W) {
    const int64_t at = row * p.dims;
    const int rows = end - row < W ? static_cast<int>(end - row) : W;
    if (rows == W) {
      quantize_tile<T, Word, kFew>(p, t, z + at, codes ? codes + at : nullptr, weighted);
    } else {
      T z_tail[W * kFsqMaxDims] = {}, codes_tail[W * kFsqMaxDims];
      memcpy(z_tail, z + at, rows * p.dims * sizeof(T));
      quantize_tile<T, Word, kFew>(p, t, z_tail, codes_tail, weighted);
      if (codes) memcpy(codes + at, codes_tail, rows * p.dims * sizeof(T));
    }
    if (!p.ids) continue;
    with_id(p.id_type, [&](auto id) { sum_rows_of(p.dims, weighted, rows, static_cast<decltype(id)*>(p.ids) + row); });
  }
}

template <typename T>
void quantize(const FsqQuantize& p, int64_t begin, int64_t end) {
  const bool few = p.width <= kFewThresholds;
  if (p.codebook <= INT32_MAX)
    (few ? quantize_rows<T, int32_t, true> : quantize_rows<T, int32_t, false>)(p, begin, end);
  else
    (few ? quantize_rows<T, int64_t, true> : quantize_rows<T, int64_t, false>)(p, begin, end);
}

// id / level by the high half of a product; exact while id * level < 2^64
struct Divisor {
  uint64_t level, reciprocal;
};

inline uint64_t quotient(uint64_t id, Divisor by, bool exact) {
  if (!exact) return id / by.level;
  return static_cast<uint64_t>((static_cast<unsigned __int128>(id) * by.reciprocal) >> 64);
}

// any codebook and any id, one row after the other
template <typename T, typename Id>
void dequantize_some(const FsqDequantize& p, const Divisor* by, int64_t begin, int64_t end) {
  const Id* ids = static_cast<const Id*>(p.ids);
  T* codes = static_cast<T*>(p.codes);
  const uint64_t codebook = static_cast<uint64_t>(p.codebook);
  const bool exact = codebook < (uint64_t{1} << 32);
  for (int64_t row = begin; row < end; ++row) {
    uint64_t id = static_cast<uint64_t>(static_cast<int64_t>(ids[row]));
    if (id >= codebook) {
      __atomic_store_n(p.outside, true, __ATOMIC_RELAXED);
      id %= codebook;
    }
    for (int d = 0; d < p.dims; ++d) {
      const uint64_t rest = quotient(id, by[d], exact);
      const int level = static_cast<int>(id - rest * by[d].level);
      const float code = p.table ? p.table[d * (p.width + 1) + level] : fsq_code(level, p.levels[d] / 2);
      from_float(code, codes + row * p.dims + d);
      id = rest;
    }
  }
}

// float32 divides ids below this exactly: floor(id / m) = trunc((id + 1/2) * RN(1/m)), since (id + 1/2) / m is at least
// 1/(2m) away from an integer and the two roundings move it by less than 2^-23 (id + 1/2) / m
constexpr int64_t kFloatIds = 1 << 22;

// lane l of vector v holds element v * W + l of W rows: its row, and its dimension's constants
struct DequantizeTables {
  vi row[kFsqMaxDims];
  vf by_basis[kFsqMaxDims], by_next[kFsqMaxDims];  // 1 / basis, 1 / (basis * level)
  vf level[kFsqMaxDims], half[kFsqMaxDims], reciprocal[kFsqMaxDims];
};

void fill_tables(const FsqDequantize& p, DequantizeTables& t) {
  int64_t basis[kFsqMaxDims + 1] = {1};
  for (int d = 0; d < p.dims; ++d) basis[d + 1] = basis[d] * p.levels[d];
  for (int v = 0; v < p.dims; ++v) {
    for (int lane = 0; lane < W; ++lane) {
      const int dim = (v * W + lane) % p.dims;
      t.row[v][lane] = (v * W + lane) / p.dims;
      t.by_basis[v][lane] = 1.0f / static_cast<float>(basis[dim]);
      t.by_next[v][lane] = 1.0f / static_cast<float>(basis[dim + 1]);
      t.level[v][lane] = static_cast<float>(p.levels[dim]);
      t.half[v][lane] = static_cast<float>(p.levels[dim] / 2);
      t.reciprocal[v][lane] = 1.0f / t.half[v][lane];
    }
  }
}

inline vf truncate(vf x) { return __builtin_convertvector(__builtin_convertvector(x, vi), vf); }

inline vf permute(vf x, vi from) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)from, (__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_permutevar8x32_ps((__m256)x, (__m256i)from);
#else
  vf out;
  for (int lane = 0; lane < W; ++lane) out[lane] = x[from[lane]];
  return out;
#endif
}

// id + 1/2 of W ids; false when one of them lies outside the codebook
template <typename Id>
inline bool load_ids(const Id* ids, uint64_t codebook, vf* x) {
  uint64_t foreign = 0;
  vi low;
  for (int lane = 0; lane < W; ++lane) {
    const uint64_t id = static_cast<uint64_t>(static_cast<int64_t>(ids[lane]));
    foreign |= id >= codebook;
    low[lane] = static_cast<int32_t>(id);
  }
  *x = __builtin_convertvector(low, vf) + 0.5f;
  return !foreign;
}

template <typename T, typename Id>
void dequantize_rows(const FsqDequantize& p, int64_t begin, int64_t end) {
  Divisor by[kFsqMaxDims];
  for (int d = 0; d < p.dims; ++d) by[d] = {static_cast<uint64_t>(p.levels[d]), UINT64_MAX / p.levels[d] + 1};
  if (p.codebook > kFloatIds || p.table) return dequantize_some<T, Id>(p, by, begin, end);
  DequantizeTables t;
  fill_tables(p, t);
  int64_t row = begin;
  for (; row + W <= end; row += W) {
    vf id;
    if (!load_ids(static_cast<const Id*>(p.ids) + row, static_cast<uint64_t>(p.codebook), &id)) {
      dequantize_some<T, Id>(p, by, row, row + W);
      continue;
    }
    T* codes = static_cast<T*>(p.codes) + row * p.dims;
    for (int v = 0; v < p.dims; ++v) {
      const vf x = permute(id, t.row[v]);
      const vf level = truncate(x * t.by_basis[v]) - truncate(x * t.by_next[v]) * t.level[v];
      store(codes + v * W, quotient(level - t.half[v], t.half[v], t.reciprocal[v]));
    }
  }
  dequantize_some<T, Id>(p, by, row, end);
}

}  // namespace

void fsq_quantize_kernel(const FsqQuantize& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto element) { quantize<decltype(element)>(p, begin, end); });
}

void fsq_dequantize_kernel(const FsqDequantize& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto element) {
    with_id(p.id_type, [&](auto id) { dequantize_rows<decltype(element), decltype(id)>(p, begin, end); });
  });
}

}  // namespace flexkernels::FLEXKERNELS_ISA
