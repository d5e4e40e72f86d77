// Checks shared by the native ops, whose tensors become the plain structs that kernels take (CPU and CUDA alike).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../core/dtype.h"

namespace flexkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
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

template <typename T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
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

}  // namespace flexkernels
