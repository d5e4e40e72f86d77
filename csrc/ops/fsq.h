// Tensors of the FSQ ops, checked and turned into what the kernels take.
#pragma once

#include <algorithm>
#include <vector>

#include "../core/fsq.h"
#include "args.h"

namespace flexkernels {

using Levels = std::vector<int64_t>;

inline int checked_dims(const Levels& levels) {
  STD_TORCH_CHECK(!levels.empty() && levels.size() <= kFsqMaxDims, "levels must have 1 to ", kFsqMaxDims,
                  " entries, got ", levels.size());
  for (const int64_t level : levels) {
    STD_TORCH_CHECK(level >= 2 && level <= INT32_MAX, "levels must be integers of at least 2, got ", level);
  }
  return static_cast<int>(levels.size());
}

inline IdType checked_id_type(const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::UInt16, name,
                  " must have dtype int64, int32 or uint16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Long ? IdType::i64 : type == ScalarType::Int ? IdType::i32 : IdType::u16;
}

// basis[d] = product of the levels before d; returns the product of all
inline int64_t checked_codebook(const Levels& levels, IdType type, int64_t* basis) {
  const int64_t limit = type == IdType::i64 ? INT64_MAX : type == IdType::i32 ? INT32_MAX : UINT16_MAX + 1;
  int64_t product = 1;
  for (size_t d = 0; d < levels.size(); ++d) {
    basis[d] = product;
    STD_TORCH_CHECK(product <= limit / levels[d], "ids must have a dtype that holds the product of levels, got ",
                    type == IdType::i64   ? "int64"
                    : type == IdType::i32 ? "int32"
                                          : "uint16");
    product *= levels[d];
  }
  return product;
}

// what stands beside each level: the number of thresholds of a row
inline int table_width(const Levels& levels) {
  return static_cast<int>(*std::max_element(levels.begin(), levels.end())) - 1;
}

inline const float* checked_table(const OptionalTensor& table, int dims, int width, const Tensor& like) {
  const int64_t numel = static_cast<int64_t>(dims) * (width + 1);
  return read_optional<float>("table", table, ScalarType::Float, numel, like);
}

inline FsqQuantize fsq_quantize_args(const Tensor& z, const Tensor& thresholds, const Levels& levels,
                                     const OptionalTensor& codes, const OptionalTensor& ids,
                                     const OptionalTensor& table) {
  FsqQuantize p{};
  p.dims = checked_dims(levels);
  STD_TORCH_CHECK(z.dim() == 2 && z.size(1) == p.dims, "z must have shape [n, ", p.dims, "], got ", z.dim(),
                  " dimensions and ", z.numel(), " elements");
  p.n = z.size(0);
  p.dtype = float_dtype("z", z);
  check_layout("z", z, z);
  p.width = table_width(levels);
  check_scalar_type("thresholds", thresholds, ScalarType::Float);
  check_numel("thresholds", thresholds, static_cast<int64_t>(p.dims) * p.width);
  check_layout("thresholds", thresholds, z);
  for (int d = 0; d < p.dims; ++d) p.half[d] = static_cast<int>(levels[d] / 2);
  p.z = z.const_data_ptr();
  p.thresholds = read<float>(thresholds);
  p.table = checked_table(table, p.dims, p.width, z);
  if (codes) {
    check_scalar_type("codes", *codes, z.scalar_type());
    check_numel("codes", *codes, z.numel());
    check_layout("codes", *codes, z);
    p.codes = codes->mutable_data_ptr();
  }
  if (ids) {
    p.id_type = checked_id_type("ids", *ids);
    p.codebook = checked_codebook(levels, p.id_type, p.basis);
    check_numel("ids", *ids, p.n);
    check_layout("ids", *ids, z);
    p.ids = ids->mutable_data_ptr();
  }
  return p;
}

inline FsqDequantize fsq_dequantize_args(const Tensor& ids, const Levels& levels, const Tensor& codes,
                                         const OptionalTensor& table) {
  FsqDequantize p{};
  p.dims = checked_dims(levels);
  p.n = ids.numel();
  p.id_type = checked_id_type("ids", ids);
  check_layout("ids", ids, ids);
  int64_t basis[kFsqMaxDims];
  p.codebook = checked_codebook(levels, p.id_type, basis);
  for (int d = 0; d < p.dims; ++d) p.levels[d] = static_cast<int>(levels[d]);
  p.dtype = float_dtype("codes", codes);
  check_numel("codes", codes, p.n * p.dims);
  check_layout("codes", codes, ids);
  p.width = table_width(levels);
  p.table = checked_table(table, p.dims, p.width, ids);
  p.ids = ids.const_data_ptr();
  p.codes = codes.mutable_data_ptr();
  return p;
}

}  // namespace flexkernels
