// The CUDA launches of the norm ops and SwiGLU.
#include "cuda.h"
#include "norm.h"

namespace flexkernels {
namespace {

void check_grid(int64_t n, int64_t d) {
  STD_TORCH_CHECK(n <= INT32_MAX, "rows must be below 2**31, got ", n);
  STD_TORCH_CHECK(d <= kNormMaxWidth, "rows must have at most ", kNormMaxWidth, " elements, got ", d);
}

void norm_forward_cuda(const Tensor& x, OptionalTensor y, OptionalTensor gate, OptionalTensor shift,
                       OptionalTensor scale, OptionalTensor segment, double eps, int64_t kind, OptionalTensor sum,
                       OptionalTensor out) {
  const NormForward args = norm_forward_args(x, y, gate, shift, scale, segment, eps, kind, sum, out);
  check_grid(args.n, args.d);
  if (args.n > 0) launch(cuda::norm_forward_launch, args, x);
}

void norm_backward_cuda(OptionalTensor grad_out, OptionalTensor grad_sum, OptionalTensor v, OptionalTensor gate,
                        OptionalTensor scale, OptionalTensor segment, double eps, int64_t kind, OptionalTensor grad_x,
                        OptionalTensor grad_y, OptionalTensor stats) {
  const NormBackward args =
      norm_backward_args(grad_out, grad_sum, v, gate, scale, segment, eps, kind, grad_x, grad_y, stats);
  check_grid(args.n, args.d);
  if (args.n > 0) launch(cuda::norm_backward_launch, args, grad_out ? *grad_out : *grad_sum);
}

void norm_sums_cuda(OptionalTensor grad_out, OptionalTensor dv, OptionalTensor v, OptionalTensor y,
                    OptionalTensor stats, OptionalTensor segment, OptionalTensor order, const Tensor& offsets,
                    OptionalTensor grad_gate, OptionalTensor grad_shift, OptionalTensor grad_scale,
                    OptionalTensor partial) {
  const NormSums args =
      norm_sums_args(grad_out, dv, v, y, stats, segment, order, offsets, grad_gate, grad_shift, grad_scale, partial);
  STD_TORCH_CHECK(args.partial, "partial must be given on a GPU, got none");
  check_grid(args.n, args.d);
  if (args.d > 0) launch(cuda::norm_sums_launch, args, offsets);
}

void swiglu_cuda(const Tensor& x, const Tensor& out) {
  const Swiglu args = swiglu_args(x, {}, out);
  check_grid(args.n, 0);
  if (args.n > 0 && args.h > 0) launch(cuda::swiglu_launch, args, x);
}

void swiglu_backward_cuda(const Tensor& grad_out, const Tensor& x, const Tensor& grad_x) {
  const Swiglu args = swiglu_args(x, grad_out, grad_x);
  check_grid(args.n, 0);
  if (args.n > 0 && args.h > 0) launch(cuda::swiglu_backward_launch, args, x);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CUDA, m) {
  m.impl("norm_forward", TORCH_BOX(&flexkernels::norm_forward_cuda));
  m.impl("norm_backward", TORCH_BOX(&flexkernels::norm_backward_cuda));
  m.impl("norm_sums", TORCH_BOX(&flexkernels::norm_sums_cuda));
  m.impl("swiglu", TORCH_BOX(&flexkernels::swiglu_cuda));
  m.impl("swiglu_backward", TORCH_BOX(&flexkernels::swiglu_backward_cuda));
}
