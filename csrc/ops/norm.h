// Tensors of the norm ops and SwiGLU, checked and turned into what the kernels take.
#pragma once

#include "../core/norm.h"
#include "args.h"

namespace flexkernels {

// a tensor [rows, columns] whose rows lie `stride` apart, each contiguous
inline const void* norm_rows(const char* name, const Tensor& t, const Tensor& like, int64_t rows, int64_t columns,
                             int64_t* stride) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape [", rows, ", ",
                  columns, "], got ", t.dim(), " dimensions and ", t.numel(), " elements");
  STD_TORCH_CHECK(columns < 2 || t.stride(1) == 1, name, " must have contiguous rows, got a stride of ", t.stride(1));
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of the first argument (index ",
                  like.get_device_index(), "), got another (index ", t.get_device_index(), ")");
  *stride = t.stride(0);
  return t.const_data_ptr();
}

// contiguous [n, d] in `type`, or null
inline void* norm_dense(const char* name, const OptionalTensor& t, const Tensor& like, ScalarType type, int64_t numel) {
  if (!t) return nullptr;
  check_scalar_type(name, *t, type);
  check_numel(name, *t, numel);
  check_layout(name, *t, like);
  return const_cast<void*>(t->const_data_ptr());
}

// the modulation tables of one call: all [segments, d] and of one dtype
struct NormTables {
  const Tensor& like;
  int64_t n, d;
  int64_t segments = -1;
  Dtype dtype;

  NormTable take(const char* name, const OptionalTensor& t) {
    if (!t) return {nullptr, 0};
    const Dtype own = float_dtype(name, *t);
    STD_TORCH_CHECK(own == Dtype::f32 || t->scalar_type() == like.scalar_type(), name,
                    " must have the dtype of the rows or float32, got ", torch::headeronly::toString(t->scalar_type()));
    STD_TORCH_CHECK(t->dim() == 2, name, " must have 2 dimensions, got ", t->dim());
    STD_TORCH_CHECK(segments < 0 || own == dtype, name, " must have the dtype of the other tables, got ",
                    torch::headeronly::toString(t->scalar_type()));
    if (segments < 0) segments = t->size(0);
    dtype = own;
    NormTable table{};
    table.data = norm_rows(name, *t, like, segments, d, &table.stride);
    return table;
  }

  const int32_t* take_segment(const OptionalTensor& segment) {
    if (segments < 0) {
      segments = 1;
      return nullptr;
    }
    STD_TORCH_CHECK(segments > 0 || n == 0, "a table must have at least one row, got none");
    STD_TORCH_CHECK(segment || segments == 1, "segment must be given with tables of ", segments, " rows, got none");
    return read_optional<int32_t>("segment", segment, ScalarType::Int, n, like);
  }
};

inline int checked_norm_kind(int64_t kind) {
  STD_TORCH_CHECK(kind == kLayerNorm || kind == kRmsNorm, "kind must be 0 or 1, got ", kind);
  return static_cast<int>(kind);
}

inline NormForward norm_forward_args(const Tensor& x, const OptionalTensor& y, const OptionalTensor& gate,
                                     const OptionalTensor& shift, const OptionalTensor& scale,
                                     const OptionalTensor& segment, double eps, int64_t kind, const OptionalTensor& sum,
                                     const OptionalTensor& out) {
  NormForward p{};
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(y.has_value() == sum.has_value(), "y and sum must be given together, got one of them");
  STD_TORCH_CHECK(sum || out, "sum or out must be given, got neither");
  p.n = x.size(0);
  p.d = x.size(1);
  p.dtype = float_dtype("x", x);
  p.x = norm_rows("x", x, x, p.n, p.d, &p.x_stride);
  if (y) {
    check_scalar_type("y", *y, x.scalar_type());
    p.y = norm_rows("y", *y, x, p.n, p.d, &p.y_stride);
  }
  NormTables tables{x, p.n, p.d, -1, p.dtype};
  p.gate = tables.take("gate", gate);
  p.shift = tables.take("shift", shift);
  p.scale = tables.take("scale", scale);
  p.segment = tables.take_segment(segment);
  p.segments = tables.segments;
  p.table_dtype = tables.dtype;
  p.sum = norm_dense("sum", sum, x, x.scalar_type(), x.numel());
  p.out = norm_dense("out", out, x, x.scalar_type(), x.numel());
  p.eps = static_cast<float>(eps);
  p.kind = checked_norm_kind(kind);
  return p;
}

inline NormBackward norm_backward_args(const OptionalTensor& grad_out, const OptionalTensor& grad_sum,
                                       const OptionalTensor& v, const OptionalTensor& gate, const OptionalTensor& scale,
                                       const OptionalTensor& segment, double eps, int64_t kind,
                                       const OptionalTensor& grad_x, const OptionalTensor& grad_y,
                                       const OptionalTensor& stats) {
  NormBackward p{};
  STD_TORCH_CHECK(grad_out || grad_sum, "grad_out or grad_sum must be given, got neither");
  STD_TORCH_CHECK(grad_out.has_value() == v.has_value(), "grad_out and v must be given together, got one of them");
  const Tensor& like = grad_out ? *grad_out : *grad_sum;
  STD_TORCH_CHECK(like.dim() == 2, "the gradient must have 2 dimensions, got ", like.dim());
  const ScalarType type = like.scalar_type();
  p.n = like.size(0);
  p.d = like.size(1);
  p.dtype = float_dtype("the gradient", like);
  p.grad_out = norm_dense("grad_out", grad_out, like, type, like.numel());
  p.grad_sum = norm_dense("grad_sum", grad_sum, like, type, like.numel());
  p.v = norm_dense("v", v, like, type, like.numel());
  p.grad_x = norm_dense("grad_x", grad_x, like, type, like.numel());
  p.grad_y = norm_dense("grad_y", grad_y, like, type, like.numel());
  p.stats = static_cast<float*>(norm_dense("stats", stats, like, ScalarType::Float, 2 * p.n));
  NormTables tables{like, p.n, p.d, -1, p.dtype};
  p.gate = tables.take("gate", gate);
  p.scale = tables.take("scale", scale);
  p.segment = tables.take_segment(segment);
  p.segments = tables.segments;
  p.table_dtype = tables.dtype;
  p.eps = static_cast<float>(eps);
  p.kind = checked_norm_kind(kind);
  return p;
}

inline NormSums norm_sums_args(const OptionalTensor& grad_out, const OptionalTensor& dv, const OptionalTensor& v,
                               const OptionalTensor& y, const OptionalTensor& stats, const OptionalTensor& segment,
                               const OptionalTensor& order, const Tensor& offsets, const OptionalTensor& grad_gate,
                               const OptionalTensor& grad_shift, const OptionalTensor& grad_scale,
                               const OptionalTensor& partial) {
  NormSums p{};
  STD_TORCH_CHECK(!grad_gate || (dv && y), "dv and y must be given with grad_gate, got none");
  STD_TORCH_CHECK(!grad_shift || grad_out, "grad_out must be given with grad_shift, got none");
  STD_TORCH_CHECK(!grad_scale || (grad_out && v && stats),
                  "grad_out, v and stats must be given with grad_scale, got none");
  STD_TORCH_CHECK(grad_gate || grad_shift || grad_scale, "a gradient must be asked for, got none");
  const Tensor& like = grad_gate ? *dv : *grad_out;
  STD_TORCH_CHECK(like.dim() == 2, "the gradient must have 2 dimensions, got ", like.dim());
  const ScalarType type = like.scalar_type();
  p.n = like.size(0);
  p.d = like.size(1);
  p.segments = offsets.numel() - 1;
  p.dtype = float_dtype("the gradient", like);
  p.grad_out = norm_dense("grad_out", grad_out, like, type, like.numel());
  p.dv = norm_dense("dv", dv, like, type, like.numel());
  p.v = norm_dense("v", v, like, type, like.numel());
  p.y = norm_dense("y", y, like, type, like.numel());
  p.stats = read_optional<float>("stats", stats, ScalarType::Float, 2 * p.n, like);
  p.segment = read_optional<int32_t>("segment", segment, ScalarType::Int, p.n, like);
  p.order = read_optional<int64_t>("order", order, ScalarType::Long, p.n, like);
  check_scalar_type("offsets", offsets, ScalarType::Long);
  check_layout("offsets", offsets, like);
  p.offsets = read<int64_t>(offsets);
  const int64_t sums = p.segments * p.d;
  p.grad_gate = static_cast<float*>(norm_dense("grad_gate", grad_gate, like, ScalarType::Float, sums));
  p.grad_shift = static_cast<float*>(norm_dense("grad_shift", grad_shift, like, ScalarType::Float, sums));
  p.grad_scale = static_cast<float*>(norm_dense("grad_scale", grad_scale, like, ScalarType::Float, sums));
  const int64_t slots = (p.n + kNormRows - 1) / kNormRows + p.segments;
  p.partial = static_cast<float*>(norm_dense("partial", partial, like, ScalarType::Float, 3 * slots * p.d));
  return p;
}

inline Swiglu swiglu_args(const Tensor& x, const OptionalTensor& grad_out, const Tensor& out) {
  Swiglu p{};
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, "x must have shape [n, 2 h], got ", x.dim(), " dimensions and ",
                  x.numel(), " elements");
  p.n = x.size(0);
  p.h = x.size(1) / 2;
  p.dtype = float_dtype("x", x);
  p.x = norm_rows("x", x, x, p.n, 2 * p.h, &p.x_stride);
  p.grad_out = norm_dense("grad_out", grad_out, x, x.scalar_type(), p.n * p.h);
  p.out = norm_dense("out", out, x, x.scalar_type(), grad_out ? x.numel() : p.n * p.h);
  return p;
}

}  // namespace flexkernels
