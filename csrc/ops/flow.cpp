// The flow ops.
#include "../core/flow.h"

#include <tuple>
#include <type_traits>
#include <vector>

#include "op.h"

namespace flexkernels {
namespace {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

// offsets [rows + 1] must start at 0, never fall, and end at `total`
void check_rising(const char* name, const int64_t* offsets, int64_t rows, int64_t total) {
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[rows] == total, name, " must run from 0 to ", total, ", got ", offsets[0],
                  " to ", offsets[rows]);
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK(offsets[r] <= offsets[r + 1], name, " must not fall, got ", offsets[r], " before ", offsets[r + 1]);
  }
}

void check_offset_values(FlowUpdate p, const OptionalTensor& row_offsets, const OptionalTensor& prefix_offsets,
                         int64_t total, int64_t prefix_total) {
  if (!row_offsets && !prefix_offsets) return;
  const OptionalTensor rows = readable(row_offsets), prefixes = readable(prefix_offsets);
  if (rows) {
    p.row_offsets = read<int64_t>(*rows);
    check_rising("row_offsets", p.row_offsets, p.rows, total);
  }
  if (!prefixes) return;
  p.prefix_offsets = read<int64_t>(*prefixes);
  check_rising("prefix_offsets", p.prefix_offsets, p.rows, prefix_total);
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t length = flow_row_begin(p, r + 1) - flow_row_begin(p, r);
    const int64_t given = flow_prefix_begin(p, r + 1) - flow_prefix_begin(p, r);
    STD_TORCH_CHECK(given <= length, "prefix_offsets must give row ", r, " at most its ", length, " elements, got ",
                    given);
  }
}

void check_offsets(const char* name, const Tensor& offsets, const Tensor& x) {
  check_scalar_type(name, offsets, ScalarType::Long);
  check_dim(name, offsets, 1);
  check_device(name, offsets, x);
}

int64_t count_rows(const Tensor& x, const OptionalTensor& row_offsets) {
  if (!row_offsets) {
    STD_TORCH_CHECK(x.dim() >= 2, "x must have the shape [B, C, ...] without row_offsets, got ", x.dim(),
                    " dimensions");
    return x.size(0) * x.size(1);
  }
  check_offsets("row_offsets", *row_offsets, x);
  check_dim("x", x, 1);
  STD_TORCH_CHECK(row_offsets->numel() > 0, "row_offsets must have rows + 1 entries, got 0");
  return row_offsets->numel() - 1;
}

// prefix [B, C, k, ...] holds the first k of x [B, C, n, ...]
bool leads(const Tensor& prefix, const Tensor& x) {
  if (x.dim() <= 2 || prefix.dim() != x.dim() || prefix.size(2) > x.size(2)) return false;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != 2 && prefix.size(d) != x.size(d)) return false;
  }
  return true;
}

void check_prefix(const Tensor& x, int64_t rows, const OptionalTensor& row_offsets, const OptionalTensor& prefix,
                  const OptionalTensor& offsets, const OptionalTensor& noise) {
  if (!prefix) {
    STD_TORCH_CHECK(!offsets && !noise, "prefix must be given with prefix_offsets or prefix_noise, got none");
    return;
  }
  check_scalar_type("prefix", *prefix, ScalarType::Float);
  check_device("prefix", *prefix, x);
  if (noise) check_like("prefix_noise", *noise, *prefix);
  if (!offsets) {
    STD_TORCH_CHECK(!row_offsets, "prefix_offsets must be given with row_offsets and prefix, got none");
    STD_TORCH_CHECK(leads(*prefix, x), "prefix must be [B, C, k, ...] like x, got another shape");
    return;
  }
  check_offsets("prefix_offsets", *offsets, x);
  check_numel("prefix_offsets", *offsets, rows + 1);
  check_dim("prefix", *prefix, 1);
}

// a float32 tensor like x, made contiguous; null when absent
const float* read_like(const char* name, OptionalTensor& t, const Tensor& x) {
  if (!t) return nullptr;
  check_scalar_type(name, *t, ScalarType::Float);
  check_shape(name, *t, x);
  t = as_contiguous(t);
  return read<float>(*t);
}

// v_cond, v_uncond and the buffer, as the guidance asks for them
void take_velocities(const Tensor& x, Tensor& v_cond, OptionalTensor& v_uncond, OptionalTensor& buffer, FlowUpdate& p) {
  p.v_dtype = float_dtype("v_cond", v_cond);
  check_shape("v_cond", v_cond, x);
  v_cond = as_contiguous(v_cond);
  p.v_cond = v_cond.const_data_ptr();
  STD_TORCH_CHECK((p.guidance == kFlowNone) != v_uncond.has_value(),
                  "v_uncond must be given where there is guidance alone, got guidance ", p.guidance);
  if (v_uncond) {
    check_like("v_uncond", *v_uncond, v_cond);
    v_uncond = as_contiguous(v_uncond);
    p.v_uncond = v_uncond->const_data_ptr();
  }
  STD_TORCH_CHECK(!buffer || p.guidance == kFlowAPG,
                  "momentum_buffer must be absent unless guidance is 2, got guidance ", p.guidance);
  STD_TORCH_CHECK(buffer || p.momentum == 0, "momentum_buffer must be given with a momentum, got none");
  const float* data = read_like("momentum_buffer", buffer, x);
  p.momentum_buffer = p.momentum != 0 ? data : nullptr;
}

// the states x, *more_x and the past velocities with their numbers, less those whose number is 0 where it is known here
void take_terms(const Tensor& x, Tensors& more_x, Tensors& past, const Numbers& a, const Numbers& past_b,
                FlowUpdate& p) {
  STD_TORCH_CHECK(more_x.size() < kFlowMaxTerms, "more_x must hold at most ", kFlowMaxTerms - 1, " tensors, got ",
                  more_x.size());
  STD_TORCH_CHECK(past.size() <= kFlowMaxTerms, "past must hold at most ", kFlowMaxTerms, " tensors, got ",
                  past.size());
  STD_TORCH_CHECK(a.size() == more_x.size() + 1, "a must have ", more_x.size() + 1, " entries, got ", a.size());
  STD_TORCH_CHECK(past_b.size() == past.size(), "past_b must have ", past.size(), " entries, got ", past_b.size());
  for (const double weight : a) check_finite("a", weight);
  for (const double weight : past_b) check_finite("past_b", weight);
  p.x[0] = x.const_data_ptr();
  p.a[0] = static_cast<float>(a[0]);
  p.states = 1;
  for (size_t i = 0; i < more_x.size(); ++i) {
    check_like("more_x", more_x[i], x);
    if (a[i + 1] == 0 && !p.scalars) continue;
    more_x[i] = as_contiguous(more_x[i]);
    p.a[p.states] = static_cast<float>(a[i + 1]);
    p.x[p.states++] = more_x[i].const_data_ptr();
  }
  for (size_t j = 0; j < past.size(); ++j) {
    check_scalar_type("past", past[j], ScalarType::Float);
    check_shape("past", past[j], x);
    if (past_b[j] == 0 && !p.scalars) continue;
    past[j] = as_contiguous(past[j]);
    p.past_b[p.pasts] = static_cast<float>(past_b[j]);
    p.past[p.pasts++] = read<float>(past[j]);
  }
}

// x_next, which is x itself in place; the next momentum buffer; the guided velocity
template <bool kInPlace>
using Results = std::conditional_t<kInPlace, std::tuple<Tensor, Tensor>, std::tuple<Tensor, Tensor, Tensor>>;

template <bool kInPlace>
Results<kInPlace> flow_update(const Tensor& x, Tensor v_cond, OptionalTensor v_uncond, OptionalTensor momentum_buffer,
                              OptionalTensor row_offsets, OptionalTensor prefix, OptionalTensor prefix_offsets,
                              OptionalTensor prefix_noise, OptionalTensor scalars, Tensors more_x, Tensors past,
                              Numbers a, double b, Numbers past_b, int64_t guidance, double scale, double threshold,
                              double eta, double momentum, double rescale, double prefix_time, bool return_velocity) {
  STD_TORCH_CHECK(guidance >= kFlowNone && guidance <= kFlowAPG, "guidance must be 0, 1 or 2, got ", guidance);
  check_finite("b", b);
  check_finite("scale", scale);
  STD_TORCH_CHECK(isfinite(threshold) && threshold >= 0, "threshold must be finite and at least 0, got ", threshold);
  check_finite("eta", eta);
  check_finite("momentum", momentum);
  STD_TORCH_CHECK(momentum == 0 || guidance == kFlowAPG, "momentum must be 0 unless guidance is 2, got ", momentum);
  check_between("rescale", rescale, 0, 1);
  check_between("prefix_time", prefix_time, 0, 1);
  FlowUpdate p{};
  p.x_dtype = float_dtype("x", x);
  p.guidance = static_cast<int>(guidance);
  p.b = static_cast<float>(b);
  p.scale = static_cast<float>(scale);
  p.threshold = static_cast<float>(threshold);
  p.eta = static_cast<float>(eta);
  p.momentum = static_cast<float>(momentum);
  p.rescale = static_cast<float>(rescale);
  p.prefix_time = static_cast<float>(prefix_time);

  const int64_t total = x.numel();
  p.rows = count_rows(x, row_offsets);
  p.row_length = p.rows ? total / p.rows : 0;
  STD_TORCH_CHECK(!kCuda || p.rows <= INT32_MAX, "rows must be below 2**31, got ", p.rows);
  STD_TORCH_CHECK(!kInPlace || x.is_contiguous(), "x must be contiguous to be written in place, got other strides");
  const Tensor state = as_contiguous(x);
  if (scalars) {
    check_scalar_type("x with scalars", x, ScalarType::Float);
    check_scalar_type("scalars", *scalars, ScalarType::Float);
    check_device("scalars", *scalars, x);
    check_dim("scalars", *scalars, 1);
    check_numel("scalars", *scalars, kFlowScalars);
    scalars = as_contiguous(scalars);
    p.scalars = read<float>(*scalars);
  }
  take_velocities(x, v_cond, v_uncond, momentum_buffer, p);
  take_terms(state, more_x, past, a, past_b, p);

  check_prefix(x, p.rows, row_offsets, prefix, prefix_offsets, prefix_noise);
  const int64_t prefix_total = prefix ? prefix->numel() : 0;
  p.prefix_length = p.rows ? prefix_total / p.rows : 0;
  row_offsets = as_contiguous(row_offsets);
  prefix_offsets = as_contiguous(prefix_offsets);
  prefix = as_contiguous(prefix);
  prefix_noise = as_contiguous(prefix_noise);
  check_offset_values(p, row_offsets, prefix_offsets, total, prefix_total);
  p.row_offsets = static_cast<const int64_t*>(data_of(row_offsets));
  p.prefix_offsets = static_cast<const int64_t*>(data_of(prefix_offsets));
  p.prefix = static_cast<const float*>(data_of(prefix));
  p.prefix_noise = static_cast<const float*>(data_of(prefix_noise));

  const auto made = [&](bool wanted) {
    return wanted ? empty_like(x, ScalarType::Float) : nothing(x, ScalarType::Float);
  };
  const Tensor momentum_next = made(momentum != 0), velocity = made(return_velocity);
  const Tensor x_next = kInPlace ? x : empty_like(x, x.scalar_type());
  p.momentum_next = momentum != 0 ? static_cast<float*>(momentum_next.mutable_data_ptr()) : nullptr;
  p.velocity = return_velocity ? static_cast<float*>(velocity.mutable_data_ptr()) : nullptr;
  p.x_next = x_next.mutable_data_ptr();
  if (total > 0) FLEXKERNELS_LAUNCH(flow_update, p, x, p.rows, p.row_length);
  if constexpr (kInPlace) {
    return {momentum_next, velocity};
  } else {
    return {x_next, momentum_next, velocity};
  }
}

}  // namespace
}  // namespace flexkernels

FLEXKERNELS_OPS(m) {
  m.impl("flow_update", TORCH_BOX(&flexkernels::flow_update<false>));
  m.impl("flow_update_", TORCH_BOX(&flexkernels::flow_update<true>));
}
