// The FSQ ops with linear layers.
#include "../core/fsq_linear.h"

#include <math.h>

#include <tuple>

#include "fsq.h"

namespace flexkernels {
namespace {

// weight [rows, columns] in a float dtype, and bias [rows] in the same or none
void check_linear(const Tensor& weight, const OptionalTensor& bias, int64_t rows, int64_t columns, const Tensor& like) {
  float_dtype("weight", weight);
  check_dim("weight", weight, 2);
  check_size("weight", weight, 0, rows);
  check_size("weight", weight, 1, columns);
  check_device("weight", weight, like);
  if (!bias) return;
  check_scalar_type("bias", *bias, weight.scalar_type());
  check_dim("bias", *bias, 1);
  check_numel("bias", *bias, rows);
  check_device("bias", *bias, like);
}

Tensor as_floats(const Tensor& t) {
  return as_contiguous(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

OptionalTensor as_floats(const OptionalTensor& t) {
  if (t) return as_floats(*t);
  return t;
}

// on a GPU in packs of 16 bytes from its first element on: a row's place in memory chooses no kernel
Tensor aligned_contiguous(const Tensor& t) {
  const Tensor rows = as_contiguous(t);
  return kCuda && reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 ? torch::stable::clone(rows) : rows;
}

std::tuple<Tensor, Tensor> fsq_project_quantize(const Tensor& hidden, const Tensor& weight, OptionalTensor bias,
                                                const Levels& levels, double eps, bool codes, ScalarType ids_dtype) {
  FsqProject p{};
  p.dims = checked_dims(levels);
  p.dtype = float_dtype("hidden", hidden);
  check_dim("hidden", hidden, 2);
  p.n = hidden.size(0);
  p.width = hidden.size(1);
  STD_TORCH_CHECK(p.width > 0, "hidden must have a width of at least 1, got 0");
  check_linear(weight, bias, p.dims, p.width, hidden);
  STD_TORCH_CHECK(isfinite(eps) && eps >= 0, "eps must be finite and at least 0, got ", eps);
  p.id_type = checked_id_type("ids_dtype", ids_dtype);
  checked_codebook(levels, p.id_type, p.basis);
  const ScalarType type = hidden.scalar_type();
  const Tensor out_codes = codes ? empty(hidden, {p.n, p.dims}, type) : empty(hidden, {0}, type);
  const Tensor ids = empty(hidden, {p.n}, ids_dtype);
  if (p.n == 0) return {out_codes, ids};
  // kernels of a GPU read weights of any dtype
  const Tensor rows = aligned_contiguous(hidden), weights = kCuda ? aligned_contiguous(weight) : as_floats(weight);
  bias = kCuda ? as_contiguous(bias) : as_floats(bias);
  const FsqTables& tables = fsq_tables(levels, false, false, hidden);
  p.steps = tables.width();
  std::copy(levels.begin(), levels.end(), p.levels);
  p.weight_dtype = float_dtype("weight", weights);
  p.hidden = rows.const_data_ptr();
  p.weight = weights.const_data_ptr();
  p.bias = data_of(bias);
  p.thresholds = read<float>(tables.thresholds);
  p.codes = codes ? out_codes.mutable_data_ptr() : nullptr;
  p.ids = ids.mutable_data_ptr();
  p.eps = static_cast<float>(eps);
  FLEXKERNELS_LAUNCH(fsq_project, p, hidden, p.n, p.width);
  return {out_codes, ids};
}

// a table [.., width] of weight's dtype, and the row of it that each id takes, int32 [n]; either may be absent
void check_rows(const char* name, const OptionalTensor& table, const char* index_name, const OptionalTensor& index,
                const Tensor& weight, const Tensor& ids) {
  if (table) {
    check_scalar_type(name, *table, weight.scalar_type());
    check_dim(name, *table, 2);
    check_size(name, *table, 1, weight.size(0));
    check_device(name, *table, ids);
  }
  if (!index) return;
  STD_TORCH_CHECK(table, name, " must be given along with ", index_name, ", got none");
  check_scalar_type(index_name, *index, ScalarType::Int);
  check_dim(index_name, *index, 1);
  check_numel(index_name, *index, ids.numel());
  check_device(index_name, *index, ids);
}

Tensor fsq_embed(const Tensor& ids, const Levels& levels, const Tensor& weight, OptionalTensor bias,
                 OptionalTensor positions, OptionalTensor position_index, OptionalTensor tokens,
                 OptionalTensor token_index) {
  FsqEmbed p{};
  p.dims = checked_dims(levels);
  p.id_type = checked_id_type("ids", ids.scalar_type());
  p.codebook = checked_codebook(levels, IdType::i64, p.basis);
  check_dim("ids", ids, 1);
  check_dim("weight", weight, 2);
  p.n = ids.numel();
  p.width = weight.size(0);
  p.dtype = float_dtype("weight", weight);
  check_linear(weight, bias, p.width, p.dims, ids);
  check_rows("positions", positions, "position_index", position_index, weight, ids);
  check_rows("tokens", tokens, "token_index", token_index, weight, ids);
  STD_TORCH_CHECK(!tokens || token_index, "token_index must be given along with tokens, got none");
  STD_TORCH_CHECK(!positions || position_index || positions->size(0) >= p.n, "positions must have at least ", p.n,
                  " rows without position_index, got ", positions->size(0));
  const Tensor out = empty(ids, {p.n, p.width}, weight.scalar_type());
  const Tensor rows = as_contiguous(ids);
  position_index = as_contiguous(position_index);
  token_index = as_contiguous(token_index);
  check_ids(rows, p.id_type, p.codebook);
  if (position_index) check_values<int32_t>("position_index", *position_index, 0, positions->size(0) - 1);
  if (token_index) check_values<int32_t>("token_index", *token_index, INT32_MIN, tokens->size(0) - 1);
  if (out.numel() == 0) return out;

  // on the CPU [dims, width]: vectors run along the width
  const Tensor weights = kCuda ? as_contiguous(weight) : as_floats(torch::stable::transpose(weight, 0, 1));
  bias = kCuda ? as_contiguous(bias) : as_floats(bias);
  positions = as_contiguous(positions);
  tokens = as_contiguous(tokens);
  std::copy(levels.begin(), levels.end(), p.levels);
  p.ids = rows.const_data_ptr();
  p.weight = weights.const_data_ptr();
  p.bias = data_of(bias);
  p.positions = data_of(positions);
  p.position_rows = positions ? positions->size(0) : 0;
  p.position_index = static_cast<const int32_t*>(data_of(position_index));
  p.tokens = data_of(tokens);
  p.token_index = static_cast<const int32_t*>(data_of(token_index));
  p.out = out.mutable_data_ptr();
  FLEXKERNELS_LAUNCH(fsq_embed, p, ids, p.n, p.width);
  return out;
}

}  // namespace
}  // namespace flexkernels

FLEXKERNELS_OPS(m) {
  m.impl("fsq_project_quantize", TORCH_BOX(&flexkernels::fsq_project_quantize));
  m.impl("fsq_embed", TORCH_BOX(&flexkernels::fsq_embed));
}
