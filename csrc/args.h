// Tensors of the native ops, checked and turned into the plain structs that kernels take (CPU and CUDA alike).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "core/flow.h"
#include "core/fsq.h"

namespace flexkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Levels = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

inline void check_layout(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous, got strides of another layout");
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of the first argument (index ",
                  like.get_device_index(), "), got another (index ", t.get_device_index(), ")");
}

inline void check_numel(const char* name, const Tensor& t, int64_t numel) {
  STD_TORCH_CHECK(t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
}

inline void check_scalar_type(const char* name, const Tensor& t, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must have dtype ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline Dtype float_dtype(const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " must have dtype float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float ? Dtype::f32 : type == ScalarType::Half ? Dtype::f16 : Dtype::bf16;
}

inline bool is_int64(const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int, name, " must have dtype int32 or int64, got ",
                  torch::headeronly::toString(type));
  return type == ScalarType::Long;
}

template <typename T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

inline int checked_dims(const Levels& levels) {
  STD_TORCH_CHECK(!levels.empty() && levels.size() <= kFsqMaxDims, "levels must have 1 to ", kFsqMaxDims,
                  " entries, got ", levels.size());
  for (const int64_t level : levels) {
    STD_TORCH_CHECK(level >= 2 && level <= INT32_MAX, "levels must be integers of at least 2, got ", level);
  }
  return static_cast<int>(levels.size());
}

// basis[d] = product of the levels before d; returns the product of all
inline int64_t checked_codebook(const Levels& levels, bool ids64, int64_t* basis) {
  const int64_t limit = ids64 ? INT64_MAX : INT32_MAX;
  int64_t product = 1;
  for (size_t d = 0; d < levels.size(); ++d) {
    basis[d] = product;
    STD_TORCH_CHECK(product <= limit / levels[d], "ids must have a dtype that holds the product of levels, got ",
                    ids64 ? "int64" : "int32");
    product *= levels[d];
  }
  return product;
}

inline FsqQuantize fsq_quantize_args(const Tensor& z, const Tensor& thresholds, const Levels& levels,
                                     const OptionalTensor& codes, const OptionalTensor& ids) {
  FsqQuantize p{};
  p.dims = checked_dims(levels);
  STD_TORCH_CHECK(z.dim() == 2 && z.size(1) == p.dims, "z must have shape [n, ", p.dims, "], got ", z.dim(),
                  " dimensions and ", z.numel(), " elements");
  p.n = z.size(0);
  p.dtype = float_dtype("z", z);
  check_layout("z", z, z);
  for (const int64_t level : levels) p.width = level - 1 > p.width ? static_cast<int>(level - 1) : p.width;
  check_scalar_type("thresholds", thresholds, ScalarType::Float);
  check_numel("thresholds", thresholds, static_cast<int64_t>(p.dims) * p.width);
  check_layout("thresholds", thresholds, z);
  for (int d = 0; d < p.dims; ++d) p.half[d] = static_cast<int>(levels[d] / 2);
  p.z = z.const_data_ptr();
  p.thresholds = read<float>(thresholds);
  if (codes) {
    check_scalar_type("codes", *codes, z.scalar_type());
    check_numel("codes", *codes, z.numel());
    check_layout("codes", *codes, z);
    p.codes = codes->mutable_data_ptr();
  }
  if (ids) {
    p.ids64 = is_int64("ids", *ids);
    checked_codebook(levels, p.ids64, p.basis);
    check_numel("ids", *ids, p.n);
    check_layout("ids", *ids, z);
    p.ids = ids->mutable_data_ptr();
  }
  return p;
}

inline FsqDequantize fsq_dequantize_args(const Tensor& ids, const Levels& levels, const Tensor& codes) {
  FsqDequantize p{};
  p.dims = checked_dims(levels);
  p.n = ids.numel();
  p.ids64 = is_int64("ids", ids);
  check_layout("ids", ids, ids);
  int64_t basis[kFsqMaxDims];
  p.codebook = checked_codebook(levels, p.ids64, basis);
  for (int d = 0; d < p.dims; ++d) p.levels[d] = static_cast<int>(levels[d]);
  p.dtype = float_dtype("codes", codes);
  check_numel("codes", codes, p.n * p.dims);
  check_layout("codes", codes, ids);
  p.ids = ids.const_data_ptr();
  p.codes = codes.mutable_data_ptr();
  return p;
}

// the data of an optional float32 or int64 tensor of a known size; null when absent
template <typename T>
const T* read_optional(const char* name, const OptionalTensor& t, ScalarType type, int64_t numel, const Tensor& like) {
  if (!t) return nullptr;
  check_scalar_type(name, *t, type);
  check_numel(name, *t, numel);
  check_layout(name, *t, like);
  return read<T>(*t);
}

inline FlowStep flow_step_args(const Tensor& x, const Tensor& v_cond, const OptionalTensor& v_uncond,
                               const OptionalTensor& momentum_buffer, const OptionalTensor& row_offsets, int64_t rows,
                               double dt, int64_t guidance, double scale, double threshold, double eta, double momentum,
                               const OptionalTensor& prefix, const OptionalTensor& prefix_offsets,
                               const OptionalTensor& prefix_noise, double prefix_time, const Tensor& x_next,
                               const OptionalTensor& momentum_next) {
  FlowStep p{};
  const int64_t total = x.numel();
  p.x_dtype = float_dtype("x", x);
  p.v_dtype = float_dtype("v_cond", v_cond);
  check_layout("x", x, x);
  check_layout("v_cond", v_cond, x);
  check_numel("v_cond", v_cond, total);
  check_scalar_type("x_next", x_next, x.scalar_type());
  check_numel("x_next", x_next, total);
  check_layout("x_next", x_next, x);

  STD_TORCH_CHECK(guidance >= kFlowNone && guidance <= kFlowAPG, "guidance must be 0, 1 or 2, got ", guidance);
  STD_TORCH_CHECK(guidance == kFlowNone || v_uncond, "v_uncond must be given when guidance is ", guidance,
                  ", got none");
  STD_TORCH_CHECK(guidance == kFlowAPG || (!momentum_buffer && !momentum_next),
                  "momentum_buffer and momentum_next must be absent unless guidance is 2, got guidance ", guidance);
  STD_TORCH_CHECK(rows >= 0, "rows must not be negative, got ", rows);
  STD_TORCH_CHECK(row_offsets || (rows ? total % rows == 0 : total == 0), "rows must divide the ", total,
                  " elements of x, got ", rows);
  STD_TORCH_CHECK(prefix.has_value() == prefix_offsets.has_value(),
                  "prefix and prefix_offsets must be given together, got one of them");
  STD_TORCH_CHECK(prefix || !prefix_noise, "prefix must be given with prefix_noise, got none");

  p.x = x.const_data_ptr();
  p.v_cond = v_cond.const_data_ptr();
  if (v_uncond && guidance != kFlowNone) {
    check_scalar_type("v_uncond", *v_uncond, v_cond.scalar_type());
    check_numel("v_uncond", *v_uncond, total);
    check_layout("v_uncond", *v_uncond, x);
    p.v_uncond = v_uncond->const_data_ptr();
  }
  p.momentum_buffer = read_optional<float>("momentum_buffer", momentum_buffer, ScalarType::Float, total, x);
  p.momentum_next =
      const_cast<float*>(read_optional<float>("momentum_next", momentum_next, ScalarType::Float, total, x));
  p.row_offsets = read_optional<int64_t>("row_offsets", row_offsets, ScalarType::Long, rows + 1, x);
  p.prefix_offsets = read_optional<int64_t>("prefix_offsets", prefix_offsets, ScalarType::Long, rows + 1, x);
  const int64_t prefix_total = prefix ? prefix->numel() : 0;
  p.prefix = read_optional<float>("prefix", prefix, ScalarType::Float, prefix_total, x);
  p.prefix_noise = read_optional<float>("prefix_noise", prefix_noise, ScalarType::Float, prefix_total, x);
  p.x_next = x_next.mutable_data_ptr();
  p.rows = rows;
  p.row_length = rows ? total / rows : 0;
  p.guidance = static_cast<int>(guidance);
  p.dt = static_cast<float>(dt);
  p.scale = static_cast<float>(scale);
  p.threshold = static_cast<float>(threshold);
  p.eta = static_cast<float>(eta);
  p.momentum = static_cast<float>(momentum);
  p.prefix_time = static_cast<float>(prefix_time);
  return p;
}

}  // namespace flexkernels
