// The norm ops and SwiGLU.
#include <tuple>

#include "../core/norm.h"
#include "op.h"

namespace flexkernels {
namespace {

// gradients beside that of x, as flexkernels/norm_math.py numbers them
enum Wanted : int64_t { kGradY = 1, kGradGate = 2, kGradShift = 4, kGradScale = 8, kNarrowSums = 16 };

// the grid of a GPU is 32-bit
void check_grid(int64_t n) { STD_TORCH_CHECK(!kCuda || n <= INT32_MAX, "rows must be below 2**31, got ", n); }

// dense rows; on a GPU on 16 bytes too where their width allows it, so that the width alone decides which kernel runs
// and with it the order of its sums
Tensor kernel_rows(const Tensor& t) {
  const Tensor rows = dense_rows(t);
  const int64_t pack = 16 / static_cast<int64_t>(t.element_size());
  const bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 && rows.stride(0) % pack == 0;
  return !kCuda || aligned || t.size(1) % pack ? rows : torch::stable::clone(as_contiguous(rows));
}

OptionalTensor kernel_rows(const OptionalTensor& t) {
  if (t) return kernel_rows(*t);
  return t;
}

// on a GPU looking at them would wait: the kernels clamp
void check_segments(const int32_t* segment, int64_t n, int64_t segments) {
  if (kCuda || !segment) return;
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(segment[i] >= 0 && segment[i] < segments, "segment must lie between 0 and ", segments - 1, ", got ",
                    segment[i]);
  }
}

// the modulation tables of one call: all [segments, d] and of one dtype, which the kernels take
class Tables {
 public:
  Tables(const Tensor& like, std::initializer_list<std::pair<const char*, const OptionalTensor*>> given)
      : like_(like), mixed_(false) {
    const Tensor* first = nullptr;
    for (const auto& [name, t] : given) {
      if (!*t) continue;
      check(name, **t);
      if (!first) first = &**t;
      STD_TORCH_CHECK((*t)->size(0) == first->size(0), name, " must have ", first->size(0), " rows, got ",
                      (*t)->size(0));
      mixed_ |= (*t)->scalar_type() != first->scalar_type();
    }
    any = first;
    segments = first ? first->size(0) : 1;
    dtype = mixed_ ? Dtype::f32 : float_dtype("a table", first ? *first : like);
  }

  NormTable take(const OptionalTensor& t) {
    if (!t) return {nullptr, 0};
    kept_[count_] = kernel_rows(
        dtype == Dtype::f32 && t->scalar_type() != ScalarType::Float ? torch::stable::to(*t, ScalarType::Float) : *t);
    const Tensor& rows = *kept_[count_++];
    return {rows.const_data_ptr(), rows.stride(0)};
  }

  // [n] int32 or null, values checked where that does not wait; kept alive with the tables
  const int32_t* take_segment(const OptionalTensor& segment) {
    const int64_t n = like_.size(0);
    if (segment) {
      check_scalar_type("segment", *segment, ScalarType::Int);
      check_dim("segment", *segment, 1);
      check_numel("segment", *segment, n);
      check_device("segment", *segment, like_);
    }
    STD_TORCH_CHECK(segment || segments == 1, "segment must be given with tables of ", segments, " rows, got none");
    STD_TORCH_CHECK(segments > 0 || n == 0, "a table must have at least one row, got none");
    if (!any || !segment) return nullptr;
    segment_ = as_contiguous(*segment);
    const int32_t* data = read<int32_t>(*segment_);
    check_segments(data, n, segments);
    return data;
  }

  bool any;
  int64_t segments;
  Dtype dtype;

 private:
  void check(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == like_.scalar_type(), name,
                    " must have the dtype of the rows or float32, got ", torch::headeronly::toString(t.scalar_type()));
    check_dim(name, t, 2);
    check_size(name, t, 1, like_.size(1));
    check_device(name, t, like_);
  }

  const Tensor& like_;
  bool mixed_;
  OptionalTensor kept_[3], segment_;
  int count_ = 0;
};

// fills sum = x + gate * y and out, either of which may be absent
void forward(const Tensor& x, const OptionalTensor& y, const OptionalTensor& gate, const OptionalTensor& shift,
             const OptionalTensor& scale, const OptionalTensor& segment, double eps, NormKind kind,
             const OptionalTensor& sum, const OptionalTensor& out) {
  NormForward p{};
  p.n = x.size(0);
  p.d = x.size(1);
  check_grid(p.n);
  p.dtype = float_dtype("x", x);
  Tables tables(x, {{"gate", &gate}, {"shift", &shift}, {"scale", &scale}});
  p.segment = tables.take_segment(segment);
  if (x.numel() == 0) return;
  p.segments = tables.segments;
  p.table_dtype = tables.dtype;
  p.gate = tables.take(gate);
  p.shift = tables.take(shift);
  p.scale = tables.take(scale);
  const Tensor rows = kernel_rows(x);
  const OptionalTensor y_rows = kernel_rows(y);
  p.x = rows.const_data_ptr();
  p.x_stride = rows.stride(0);
  p.y = data_of(y_rows);
  p.y_stride = y_rows ? y_rows->stride(0) : 0;
  p.sum = sum ? sum->mutable_data_ptr() : nullptr;
  p.out = out ? out->mutable_data_ptr() : nullptr;
  p.eps = static_cast<float>(eps);
  p.kind = kind;
#ifndef FLEXKERNELS_CUDA
  p.past_cache = bytes_of(x) + bytes_of(y) + bytes_of(sum) + bytes_of(out) > kCacheBytes;
#endif
  FLEXKERNELS_LAUNCH(norm_forward, p, rows, p.n, p.d);
}

Tensor empty_rows(const Tensor& x) { return empty(x, {x.size(0), x.size(1)}, x.scalar_type()); }

void check_rows(const Tensor& x, const OptionalTensor& y, const char* y_name, double eps) {
  check_dim("x", x, 2);
  if (y) check_like(y_name, *y, x);
  check_eps(eps);
}

Tensor adaln_norm(const Tensor& x, OptionalTensor shift, OptionalTensor scale, OptionalTensor segment, double eps) {
  check_rows(x, {}, "", eps);
  const Tensor out = empty_rows(x);
  forward(x, {}, {}, shift, scale, segment, eps, kLayerNorm, {}, out);
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_adaln_norm(const Tensor& x, const Tensor& y, OptionalTensor gate,
                                                     OptionalTensor shift, OptionalTensor scale, OptionalTensor segment,
                                                     double eps) {
  check_rows(x, y, "y", eps);
  const Tensor sum = empty_rows(x), out = empty_rows(x);
  forward(x, y, gate, shift, scale, segment, eps, kLayerNorm, sum, out);
  return {sum, out};
}

Tensor gated_residual(const Tensor& x, const Tensor& y, const Tensor& gate, OptionalTensor segment) {
  check_rows(x, y, "y", 0);
  const Tensor sum = empty_rows(x);
  forward(x, y, gate, {}, {}, segment, 0, kLayerNorm, sum, {});
  return sum;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, OptionalTensor residual, double eps) {
  check_rows(x, residual, "residual", eps);
  check_dim("weight", weight, 1);
  const Tensor sum = residual ? empty_rows(x) : nothing(x, x.scalar_type()), out = empty_rows(x);
  forward(x, residual, {}, {}, torch::stable::unsqueeze(weight, 0), {}, eps, kRmsNorm,
          residual ? OptionalTensor(sum) : std::nullopt, out);
  return {sum, out};
}

void check_order(const NormSums& p) {
  if (kCuda || !p.offsets) return;
  STD_TORCH_CHECK(p.offsets[0] == 0 && p.offsets[p.segments] == p.n, "offsets must run from 0 to ", p.n, ", got ",
                  p.offsets[0], " to ", p.offsets[p.segments]);
  for (int64_t s = 0; s < p.segments; ++s) {
    STD_TORCH_CHECK(p.offsets[s] <= p.offsets[s + 1], "offsets must not fall, got ", p.offsets[s], " before ",
                    p.offsets[s + 1]);
  }
  for (int64_t i = 0; p.order && i < p.n; ++i) {
    STD_TORCH_CHECK(p.order[i] >= 0 && p.order[i] < p.n, "order must lie between 0 and ", p.n - 1, ", got ",
                    p.order[i]);
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// gradients of x, y, gate, shift and scale (or of the weight), as `wanted` asks; the rest are empty. `order` and
// `offsets` may be absent where all rows take one table row, and on a GPU, which finds them
Gradients norm_backward(OptionalTensor grad_out, OptionalTensor grad_sum, OptionalTensor v, OptionalTensor y,
                        OptionalTensor gate, OptionalTensor scale, OptionalTensor segment, OptionalTensor order,
                        OptionalTensor offsets, int64_t rows, double eps, bool rms, int64_t wanted) {
  STD_TORCH_CHECK(grad_out || grad_sum, "grad_out or grad_sum must be given, got neither");
  STD_TORCH_CHECK(grad_out.has_value() == v.has_value(), "grad_out and v must be given together, got one of them");
  STD_TORCH_CHECK(rows >= 0, "rows must not be negative, got ", rows);
  STD_TORCH_CHECK(!(wanted & kGradY) || gate, "gate must be given where the gradient of y is wanted, got none");
  STD_TORCH_CHECK(!(wanted & kGradGate) || y, "y must be given where the gradient of gate is wanted, got none");
  STD_TORCH_CHECK(!(wanted & (kGradShift | kGradScale)) || grad_out,
                  "grad_out must be given where the gradient of shift or scale is wanted, got none");
  check_eps(eps);
  const Tensor& grad = grad_out ? *grad_out : *grad_sum;
  check_dim("the gradient", grad, 2);
  const std::pair<const char*, const OptionalTensor*> alike[] = {{"grad_sum", &grad_sum}, {"v", &v}, {"y", &y}};
  for (const auto& [name, t] : alike) {
    if (*t) check_like(name, **t, grad);
  }
  const int64_t n = grad.size(0), d = grad.size(1);
  check_grid(n);
  const ScalarType type = grad.scalar_type();
  const ScalarType sum_type = wanted & kNarrowSums ? type : ScalarType::Float;
  // the CPU sums float32 and rounds afterwards
  const ScalarType kept_type = kCuda ? sum_type : ScalarType::Float;
  const auto table = [&](int64_t bit) {
    return wanted & bit ? empty(grad, {rows, d}, kept_type) : nothing(grad, sum_type);
  };
  const Tensor grad_x = grad_out ? empty_rows(grad) : nothing(grad, type);
  const Tensor grad_y = wanted & kGradY ? empty_rows(grad) : nothing(grad, type);
  Tensor sums[] = {table(kGradGate), table(kGradShift), table(kGradScale)};
  const auto results = [&] {
    for (Tensor& sum : sums) {
      if (sum.scalar_type() != sum_type) sum = torch::stable::to(sum, sum_type);
    }
    return Gradients{grad_x, grad_y, sums[0], sums[1], sums[2]};
  };
  if (grad.numel() == 0) {
    for (Tensor& sum : sums) torch::stable::zero_(sum);
    return results();
  }

  grad_out = kernel_rows(as_contiguous(grad_out));
  grad_sum = kernel_rows(as_contiguous(grad_sum));
  v = kernel_rows(as_contiguous(v));
  y = kernel_rows(as_contiguous(y));
  NormBackward p{};
  p.n = n;
  p.d = d;
  p.dtype = float_dtype("the gradient", grad);
  p.grad_out = data_of(grad_out);
  p.grad_sum = data_of(grad_sum);
  p.v = data_of(v);
  Tables tables(grad, {{"gate", &gate}, {"scale", &scale}});
  // shift's gradient needs no shift: its rows are told by `rows` alone
  STD_TORCH_CHECK(!tables.any || tables.segments == rows, "rows must be the tables' ", tables.segments, ", got ", rows);
  tables.segments = rows;
  tables.any = true;
  p.segment = tables.take_segment(segment);
  if (kCuda && rows == 1) p.segment = nullptr;
  p.segments = rows;
  p.table_dtype = tables.dtype;
  p.gate = tables.take(gate);
  p.scale = tables.take(scale);
  p.grad_x = grad_out ? grad_x.mutable_data_ptr() : nullptr;
  p.grad_y = wanted & kGradY ? grad_y.mutable_data_ptr() : nullptr;
  const bool keeps = kCuda && (wanted & kGradScale);
  const Tensor stats = keeps ? empty(grad, {n, 2}, ScalarType::Float) : nothing(grad, ScalarType::Float);
  p.stats = keeps ? static_cast<float*>(stats.mutable_data_ptr()) : nullptr;
  p.eps = static_cast<float>(eps);
  p.kind = rms ? kRmsNorm : kLayerNorm;

  NormSums s{};
  s.n = n;
  s.d = d;
  s.segments = rows;
  s.dtype = p.dtype;
  s.sum_dtype = kept_type == ScalarType::Float ? Dtype::f32 : p.dtype;
  const bool summed = wanted & (kGradGate | kGradShift | kGradScale);
  OptionalTensor found[3];  // kept alive
  if (summed) {
    STD_TORCH_CHECK(kCuda || offsets || rows == 1, "offsets must be given with tables of ", rows, " rows, got none");
    s.grad_out = p.grad_out;
    s.dv = grad_out ? p.grad_x : p.grad_sum;
    s.v = p.v;
    s.y = data_of(y);
    s.stats = p.stats;
    s.segment = p.segment;
    s.order = read_optional<int64_t>("order", order, ScalarType::Long, n, grad);
    s.offsets = read_optional<int64_t>("offsets", offsets, ScalarType::Long, rows + 1, grad);
    check_order(s);
#ifdef FLEXKERNELS_CUDA
    if (!s.offsets && p.segment) {
      STD_TORCH_CHECK(n <= 1 << 30, "offsets must be given for ", n, " rows, got none");
      const auto ints = [&](int i, int64_t count) {
        found[i] = empty(grad, {count}, ScalarType::Long);
        return static_cast<int64_t*>(found[i]->mutable_data_ptr());
      };
      const SegmentOrder made{p.segment, ints(0, n), ints(1, n), ints(2, rows + 1), n, rows};
      launch(cuda::segment_order_launch, made, grad, n);
      s.order = made.order;
      s.offsets = made.offsets;
    }
#endif
    const auto sum_of = [&](int i, int64_t bit) { return wanted & bit ? sums[i].mutable_data_ptr() : nullptr; };
    s.grad_gate = sum_of(0, kGradGate);
    s.grad_shift = sum_of(1, kGradShift);
    s.grad_scale = sum_of(2, kGradScale);
  }
  const int64_t run = kCuda ? norm_run(n) : kNormRows, runs = (n + run - 1) / run;
  const Tensor partial = empty(grad, {3, summed ? runs + rows : 0, d}, ScalarType::Float);
  s.partial = summed ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
#ifdef FLEXKERNELS_CUDA
  launch(cuda::norm_backward_launch, NormGradients{p, s}, grad, n);
#else
  p.past_cache =
      bytes_of(grad_out) + bytes_of(grad_sum) + bytes_of(v) + bytes_of(y) + bytes_of(grad_x) + bytes_of(grad_y) >
      kCacheBytes;
  const NormGradients gradients{p, s};
  if (p.grad_x || p.grad_y || summed) FLEXKERNELS_LAUNCH(norm_backward, gradients, grad, runs, kNormRows * d);
  const int64_t items = summed ? rows * ((d + kNormColumns - 1) / kNormColumns) : 0;
  if (items) FLEXKERNELS_LAUNCH(norm_sums, s, grad, items, (runs + rows) * d / items);
#endif
  return results();
}

Swiglu swiglu_args(const Tensor& x, const Tensor& rows) {
  Swiglu p{};
  check_dim("x", x, 2);
  STD_TORCH_CHECK(x.size(1) % 2 == 0, "x must have an even number of columns, got ", x.size(1));
  p.n = x.size(0);
  p.h = x.size(1) / 2;
  STD_TORCH_CHECK(!kCuda || p.n <= INT32_MAX, "rows must be below 2**31, got ", p.n);
  p.dtype = float_dtype("x", x);
  p.x = rows.const_data_ptr();
  p.x_stride = rows.stride(0);
  return p;
}

Tensor swiglu(const Tensor& x) {
  const Tensor rows = dense_rows(x);
  Swiglu p = swiglu_args(x, rows);
  const Tensor out = empty(x, {p.n, p.h}, x.scalar_type());
  p.out = out.mutable_data_ptr();
  if (p.h > 0) FLEXKERNELS_LAUNCH(swiglu, p, x, p.n, p.h);
  return out;
}

Tensor swiglu_backward(const Tensor& grad_out, const Tensor& x) {
  const Tensor rows = dense_rows(x), grad = as_contiguous(grad_out);
  Swiglu p = swiglu_args(x, rows);
  check_dim("grad_out", grad, 2);
  check_size("grad_out", grad, 0, p.n);
  check_size("grad_out", grad, 1, p.h);
  check_scalar_type("grad_out", grad, x.scalar_type());
  check_device("grad_out", grad, x);
  p.grad_out = grad.const_data_ptr();
  const Tensor out = empty_rows(x);
  p.out = out.mutable_data_ptr();
  if (p.h > 0) FLEXKERNELS_LAUNCH(swiglu_backward, p, x, p.n, p.h);
  return out;
}

}  // namespace

void rms_norm_into(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  check_rows(x, out, "out", eps);
  forward(x, {}, {}, {}, weight, {}, eps, kRmsNorm, {}, out);
}

}  // namespace flexkernels

FLEXKERNELS_OPS(m) {
  m.impl("adaln_norm", TORCH_BOX(&flexkernels::adaln_norm));
  m.impl("gated_residual_adaln_norm", TORCH_BOX(&flexkernels::gated_residual_adaln_norm));
  m.impl("gated_residual", TORCH_BOX(&flexkernels::gated_residual));
  m.impl("rms_norm", TORCH_BOX(&flexkernels::rms_norm));
  m.impl("norm_backward", TORCH_BOX(&flexkernels::norm_backward));
  m.impl("swiglu", TORCH_BOX(&flexkernels::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&flexkernels::swiglu_backward));
}
