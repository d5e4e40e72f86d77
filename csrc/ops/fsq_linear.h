// Tensors of the FSQ ops with linear layers, checked and turned into what the kernels take.
#pragma once

#include "../core/fsq_linear.h"
#include "fsq.h"

namespace flexkernels {

inline FsqProject fsq_project_args(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                                   const Tensor& thresholds, const Levels& levels, double eps,
                                   const OptionalTensor& codes, const OptionalTensor& ids) {
  FsqProject p{};
  p.dims = checked_dims(levels);
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden must have 2 dimensions, got ", hidden.dim());
  p.n = hidden.size(0);
  p.width = hidden.size(1);
  p.dtype = float_dtype("hidden", hidden);
  check_layout("hidden", hidden, hidden);
  check_scalar_type("weight", weight, ScalarType::Float);
  check_numel("weight", weight, p.dims * p.width);
  check_layout("weight", weight, hidden);
  p.bias = read_optional<float>("bias", bias, ScalarType::Float, p.dims, hidden);
  for (const int64_t level : levels) p.steps = level - 1 > p.steps ? static_cast<int>(level - 1) : p.steps;
  check_scalar_type("thresholds", thresholds, ScalarType::Float);
  check_numel("thresholds", thresholds, static_cast<int64_t>(p.dims) * p.steps);
  check_layout("thresholds", thresholds, hidden);
  for (int d = 0; d < p.dims; ++d) p.half[d] = static_cast<int>(levels[d] / 2);
  p.hidden = hidden.const_data_ptr();
  p.weight = read<float>(weight);
  p.thresholds = read<float>(thresholds);
  p.eps = static_cast<float>(eps);
  if (codes) {
    check_scalar_type("codes", *codes, hidden.scalar_type());
    check_numel("codes", *codes, p.n * p.dims);
    check_layout("codes", *codes, hidden);
    p.codes = codes->mutable_data_ptr();
  }
  if (ids) {
    p.id_type = checked_id_type("ids", *ids);
    checked_codebook(levels, p.id_type, p.basis);
    check_numel("ids", *ids, p.n);
    check_layout("ids", *ids, hidden);
    p.ids = ids->mutable_data_ptr();
  }
  return p;
}

// rows of a table [.., width] like out; null when absent
inline const void* read_table(const char* name, const OptionalTensor& t, const Tensor& out) {
  if (!t) return nullptr;
  check_scalar_type(name, *t, out.scalar_type());
  STD_TORCH_CHECK(t->dim() == 2 && t->size(1) == out.size(1), name, " must have shape [.., ", out.size(1), "], got ",
                  t->dim(), " dimensions and ", t->numel(), " elements");
  check_layout(name, *t, out);
  return t->const_data_ptr();
}

inline FsqEmbed fsq_embed_args(const Tensor& ids, const Levels& levels, const Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& positions,
                               const OptionalTensor& position_index, const OptionalTensor& tokens,
                               const OptionalTensor& token_index, const Tensor& out) {
  FsqEmbed p{};
  p.dims = checked_dims(levels);
  p.n = ids.numel();
  p.id_type = checked_id_type("ids", ids);
  check_layout("ids", ids, ids);
  int64_t basis[kFsqMaxDims];
  p.codebook = checked_codebook(levels, p.id_type, basis);
  for (int d = 0; d < p.dims; ++d) p.levels[d] = static_cast<int>(levels[d]);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == p.n, "out must have shape [", p.n, ", width], got ", out.dim(),
                  " dimensions and ", out.numel(), " elements");
  p.width = out.size(1);
  p.dtype = float_dtype("out", out);
  check_layout("out", out, ids);
  check_scalar_type("weight", weight, ScalarType::Float);
  check_numel("weight", weight, p.dims * p.width);
  check_layout("weight", weight, ids);
  STD_TORCH_CHECK(positions || !position_index, "positions must be given with position_index, got none");
  STD_TORCH_CHECK(tokens.has_value() == token_index.has_value(),
                  "tokens and token_index must be given together, got one of them");
  STD_TORCH_CHECK(!positions || position_index || positions->size(0) >= p.n, "positions must have at least ", p.n,
                  " rows without position_index, got ", positions->size(0));
  p.ids = ids.const_data_ptr();
  p.weight = read<float>(weight);
  p.bias = read_optional<float>("bias", bias, ScalarType::Float, p.width, ids);
  p.positions = read_table("positions", positions, out);
  p.position_index = read_optional<int32_t>("position_index", position_index, ScalarType::Int, p.n, ids);
  p.tokens = read_table("tokens", tokens, out);
  p.token_index = read_optional<int32_t>("token_index", token_index, ScalarType::Int, p.n, ids);
  p.out = out.mutable_data_ptr();
  return p;
}

}  // namespace flexkernels
