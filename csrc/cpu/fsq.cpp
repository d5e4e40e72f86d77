// FSQ on vectors: W rows of [rows, dims] are exactly `dims` vectors, and lane l of vector v always holds dimension
// (v * W + l) % dims, so thresholds, halves and id weights are laid out once per call in that pattern.
#include "../core/fsq.h"

#include "kernels.h"
#include "simd.h"

namespace flexkernels::FLEXKERNELS_ISA {
namespace {

struct QuantizeTables {
  vf thresholds[kFsqMaxDims][kFsqLinearCount];
  vf half[kFsqMaxDims];
  vl basis[kFsqMaxDims][2];
};

void fill_tables(const FsqQuantize& p, QuantizeTables& t) {
  for (int v = 0; v < p.dims; ++v) {
    for (int lane = 0; lane < W; ++lane) {
      const int dim = (v * W + lane) % p.dims;
      t.half[v][lane] = static_cast<float>(p.half[dim]);
      t.basis[v][lane / (W / 2)][lane % (W / 2)] = p.basis[dim];
      if (p.width > kFsqLinearCount) continue;
      for (int k = 0; k < p.width; ++k) t.thresholds[v][k][lane] = p.thresholds[dim * p.width + k];
    }
  }
}

inline vi count_levels(const FsqQuantize& p, const QuantizeTables& t, int v, vf z) {
  vi level = {};
  if (p.width <= kFsqLinearCount) {
    for (int k = 0; k < p.width; ++k) level -= z > t.thresholds[v][k];
  } else {
    for (int lane = 0; lane < W; ++lane) {
      const int dim = (v * W + lane) % p.dims;
      level[lane] = fsq_level(p.thresholds + static_cast<int64_t>(dim) * p.width, p.width, z[lane]);
    }
  }
  return level;
}

// one tile of W rows; `weighted` receives level * basis of every element
template <typename T, bool kIds>
void quantize_tile(const FsqQuantize& p, const QuantizeTables& t, const T* z, T* codes, int64_t* weighted) {
  for (int v = 0; v < p.dims; ++v) {
    const vi level = count_levels(p, t, v, load(z + v * W));
    if (codes) store(codes + v * W, (__builtin_convertvector(level, vf) - t.half[v]) / t.half[v]);
    if constexpr (kIds) {
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
template <typename Id, int D>
void sum_rows(const int64_t* weighted, int rows, Id* ids) {
  for (int r = 0; r < rows; ++r, weighted += D) {
    int64_t id = weighted[0];
#pragma GCC unroll 16
    for (int d = 1; d < D; ++d) id += weighted[d];
    ids[r] = static_cast<Id>(id);
  }
}

template <typename Id, int D = kFsqMaxDims>
void sum_rows_of(int dims, const int64_t* weighted, int rows, Id* ids) {
  if (dims == D) return sum_rows<Id, D>(weighted, rows, ids);
  if constexpr (D > 1) sum_rows_of<Id, D - 1>(dims, weighted, rows, ids);
}

template <typename T, bool kIds>
void quantize_rows(const FsqQuantize& p, int64_t begin, int64_t end) {
  QuantizeTables t;
  fill_tables(p, t);
  const T* z = static_cast<const T*>(p.z);
  T* codes = static_cast<T*>(p.codes);
  int64_t weighted[W * kFsqMaxDims];
  for (int64_t row = begin; row < end; row += W) {
    const int64_t at = row * p.dims;
    const int rows = end - row < W ? static_cast<int>(end - row) : W;
    if (rows == W) {
      quantize_tile<T, kIds>(p, t, z + at, codes ? codes + at : nullptr, weighted);
    } else {
      T z_tail[W * kFsqMaxDims] = {}, codes_tail[W * kFsqMaxDims];
      memcpy(z_tail, z + at, rows * p.dims * sizeof(T));
      quantize_tile<T, kIds>(p, t, z_tail, codes_tail, weighted);
      if (codes) memcpy(codes + at, codes_tail, rows * p.dims * sizeof(T));
    }
    if constexpr (kIds) {
      if (p.ids64)
        sum_rows_of(p.dims, weighted, rows, static_cast<int64_t*>(p.ids) + row);
      else
        sum_rows_of(p.dims, weighted, rows, static_cast<int32_t*>(p.ids) + row);
    }
  }
}

template <typename T>
void quantize(const FsqQuantize& p, int64_t begin, int64_t end) {
  if (p.ids)
    quantize_rows<T, true>(p, begin, end);
  else
    quantize_rows<T, false>(p, begin, end);
}

// id / level by the high half of a product; exact while id * level < 2^64
struct Divisor {
  uint64_t level, reciprocal;
};

inline uint64_t quotient(uint64_t id, Divisor by, bool exact) {
  if (!exact) return id / by.level;
  return static_cast<uint64_t>((static_cast<unsigned __int128>(id) * by.reciprocal) >> 64);
}

template <typename T, typename Id>
void dequantize_rows(const FsqDequantize& p, int64_t begin, int64_t end) {
  const Id* ids = static_cast<const Id*>(p.ids);
  T* codes = static_cast<T*>(p.codes);
  const uint64_t codebook = static_cast<uint64_t>(p.codebook);
  const bool exact = codebook < (uint64_t{1} << 32);
  Divisor by[kFsqMaxDims];
  for (int d = 0; d < p.dims; ++d) by[d] = {static_cast<uint64_t>(p.levels[d]), UINT64_MAX / p.levels[d] + 1};
  for (int64_t row = begin; row < end; ++row) {
    uint64_t id = static_cast<uint64_t>(static_cast<int64_t>(ids[row]));
    if (id >= codebook) id %= codebook;
    for (int d = 0; d < p.dims; ++d) {
      const uint64_t rest = quotient(id, by[d], exact);
      from_float(fsq_code(static_cast<int>(id - rest * by[d].level), p.levels[d] / 2), codes + row * p.dims + d);
      id = rest;
    }
  }
}

template <typename T>
void dequantize(const FsqDequantize& p, int64_t begin, int64_t end) {
  if (p.ids64)
    dequantize_rows<T, int64_t>(p, begin, end);
  else
    dequantize_rows<T, int32_t>(p, begin, end);
}

}  // namespace

void fsq_quantize_kernel(const FsqQuantize& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::f32) quantize<float>(p, begin, end);
  if (p.dtype == Dtype::bf16) quantize<bf16>(p, begin, end);
  if (p.dtype == Dtype::f16) quantize<f16>(p, begin, end);
}

void fsq_dequantize_kernel(const FsqDequantize& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::f32) dequantize<float>(p, begin, end);
  if (p.dtype == Dtype::bf16) dequantize<bf16>(p, begin, end);
  if (p.dtype == Dtype::f16) dequantize<f16>(p, begin, end);
}

}  // namespace flexkernels::FLEXKERNELS_ISA
