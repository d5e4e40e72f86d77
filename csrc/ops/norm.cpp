// The norm ops and SwiGLU: schemas and CPU launches. Outputs are allocated by the caller; an op only fills them.
#include "norm.h"

#include "cpu.h"
#include "launches.h"

namespace flexkernels {
namespace {

void check_segments(const int32_t* segment, int64_t n, int64_t segments) {
  if (!segment) return;
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(segment[i] >= 0 && segment[i] < segments, "segment must lie between 0 and ", segments - 1, ", got ",
                    segment[i]);
  }
}

}  // namespace

void norm_forward_cpu(const Tensor& x, OptionalTensor y, OptionalTensor gate, OptionalTensor shift,
                      OptionalTensor scale, OptionalTensor segment, double eps, int64_t kind, OptionalTensor sum,
                      OptionalTensor out) {
  NormForward args = norm_forward_args(x, y, gate, shift, scale, segment, eps, kind, sum, out);
  check_segments(args.segment, args.n, args.segments);
  args.past_cache = bytes_of(x) + bytes_of(y) + bytes_of(sum) + bytes_of(out) > kCacheBytes;
  prefer_huge_pages(sum);
  prefer_huge_pages(out);
  launch(FLEXKERNELS_SELECT(norm_forward_kernel), args, args.n, args.d);
}

namespace {

void norm_backward_cpu(OptionalTensor grad_out, OptionalTensor grad_sum, OptionalTensor v, OptionalTensor gate,
                       OptionalTensor scale, OptionalTensor segment, double eps, int64_t kind, OptionalTensor grad_x,
                       OptionalTensor grad_y, OptionalTensor stats) {
  const NormBackward args =
      norm_backward_args(grad_out, grad_sum, v, gate, scale, segment, eps, kind, grad_x, grad_y, stats);
  check_segments(args.segment, args.n, args.segments);
  prefer_huge_pages(grad_x);
  prefer_huge_pages(grad_y);
  launch(FLEXKERNELS_SELECT(norm_backward_kernel), args, args.n, args.d);
}

void check_order(const NormSums& p) {
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

void norm_sums_cpu(OptionalTensor grad_out, OptionalTensor dv, OptionalTensor v, OptionalTensor y, OptionalTensor stats,
                   OptionalTensor segment, OptionalTensor order, const Tensor& offsets, OptionalTensor grad_gate,
                   OptionalTensor grad_shift, OptionalTensor grad_scale, OptionalTensor partial) {
  const NormSums args =
      norm_sums_args(grad_out, dv, v, y, stats, segment, order, offsets, grad_gate, grad_shift, grad_scale, partial);
  check_order(args);
  const int64_t items = args.segments * ((args.d + kNormColumns - 1) / kNormColumns);
  if (items) launch(FLEXKERNELS_SELECT(norm_sums_kernel), args, items, args.n * args.d / items);
}

void swiglu_cpu(const Tensor& x, const Tensor& out) {
  const Swiglu args = swiglu_args(x, {}, out);
  prefer_huge_pages(out);
  launch(FLEXKERNELS_SELECT(swiglu_kernel), args, args.n, args.h);
}

void swiglu_backward_cpu(const Tensor& grad_out, const Tensor& x, const Tensor& grad_x) {
  const Swiglu args = swiglu_args(x, grad_out, grad_x);
  prefer_huge_pages(grad_x);
  launch(FLEXKERNELS_SELECT(swiglu_backward_kernel), args, args.n, args.h);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flexkernels_native, m) {
  m.def(
      "norm_forward(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? segment, float eps, "
      "int kind, Tensor(a!)? sum, Tensor(b!)? out) -> ()");
  m.def(
      "norm_backward(Tensor? grad_out, Tensor? grad_sum, Tensor? v, Tensor? gate, Tensor? scale, Tensor? segment, "
      "float eps, int kind, Tensor(a!)? grad_x, Tensor(b!)? grad_y, Tensor(c!)? stats) -> ()");
  m.def(
      "norm_sums(Tensor? grad_out, Tensor? dv, Tensor? v, Tensor? y, Tensor? stats, Tensor? segment, Tensor? order, "
      "Tensor offsets, Tensor(a!)? grad_gate, Tensor(b!)? grad_shift, Tensor(c!)? grad_scale, "
      "Tensor(d!)? partial) -> ()");
  m.def("swiglu(Tensor x, Tensor(a!) out) -> ()");
  m.def("swiglu_backward(Tensor grad_out, Tensor x, Tensor(a!) grad_x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&flexkernels::norm_forward_cpu));
  m.impl("norm_backward", TORCH_BOX(&flexkernels::norm_backward_cpu));
  m.impl("norm_sums", TORCH_BOX(&flexkernels::norm_sums_cpu));
  m.impl("swiglu", TORCH_BOX(&flexkernels::swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&flexkernels::swiglu_backward_cpu));
}
