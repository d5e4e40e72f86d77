// The CUDA launch of the skinny linear op.
#include "cuda.h"
#include "linear.h"

namespace flexkernels {
namespace {

void skinny_linear_cuda(const Tensor& x, const Tensor& weight, OptionalTensor scale, OptionalTensor bias,
                        OptionalTensor residual, bool swiglu, const Tensor& out) {
  const SkinnyLinear args = skinny_linear_args(x, weight, scale, bias, residual, swiglu, out);
  if (args.m > 0 && args.outputs > 0) launch(cuda::skinny_linear_launch, args, x);
}

}  // namespace
}  // namespace flexkernels

STABLE_TORCH_LIBRARY_IMPL(flexkernels_native, CUDA, m) {
  m.impl("skinny_linear", TORCH_BOX(&flexkernels::skinny_linear_cuda));
}
